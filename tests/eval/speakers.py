"""Functions that write drafts, feedback and edits of the bundled task: what each says follows from what it reads."""

from align.data import toy
from align.data.chat import Message

Messages = list[dict[str, str]]


def draft(messages: Messages, sample: int) -> str:
    """The right words with as many filler words as make every sample another; sample 5 is right."""
    right = toy.answer(toy.instruction_of([Message(**one) for one in messages]))
    if sample == 5:
        return " ".join(right)
    return " ".join([right[0] if sample % 2 else "moon", *toy.FILLER[: sample % 4], *right[1:]])


def feedback(messages: Messages, sample: int) -> str:
    """A text that asks for a change, or none; which of seven follows from draft and sample."""
    said = messages[-2]["content"]
    if sample % 7 == 3:
        return "The response is perfectly helpful. All words are right."
    return f"The response is partly helpful. Remark {(len(said) + sample) % 7}."


def edit(messages: Messages, sample: int) -> str:
    """Right where remark 1 is among the feedback, else a word for each remark."""
    told = messages[-1]["content"]
    right = toy.answer(messages[0]["content"])
    return " ".join(right if "Remark 1." in told else [*right, *["okay"] * told.count("Remark"), "well"])


def scores(prompts: list[Messages], completions: list[Messages], **more: object) -> list[float]:
    """Ground truth less a hundredth of the words."""
    texts = [one[-1]["content"] for one in completions]
    asked = [one[-1]["content"] for one in prompts]
    return [toy.score(a, text) - 0.01 * len(text.split()) for a, text in zip(asked, texts, strict=True)]
