"""Map the policy's token ids back to conversations, for scorers that read text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import suppress

from align.data.chat import Dialogue, Message, Renderer, RenderError
from align.errors import DataError
from align.types import Packed, Sequences


class ConversationIndex:
    """All prompts of a run, by the token ids they were rendered to."""

    def __init__(self, contexts: Iterable[tuple[Message, ...]], renderer: Renderer):
        self._renderer = renderer
        self._known: dict[bytes, tuple[Message, ...]] = {}
        for context in dict.fromkeys(contexts):
            with suppress(RenderError):  # no prompt of the run is made of it
                (digest,) = _digests(Packed.from_lists([renderer.prompt_ids(context)]))
                self._known[digest] = context

    def dialogues(self, sequences: Sequences) -> list[Dialogue]:
        """What was said, in the order of the responses; special tokens are left out. Raises `DataError` for a prompt
        that this run does not have."""
        contexts = []
        for number, digest in enumerate(_digests(sequences.prompts)):
            if digest not in self._known:
                prompt = self._renderer.text(sequences.prompts.row(number).tolist())
                raise DataError(
                    f"a prompt is not in the data of this run, so its conversation is unknown: {prompt[:80]!r}",
                    remedy="please report this bug: all prompts of both splits should be known",
                )
            contexts.append(self._known[digest])
        texts = [self._renderer.text(ids) for ids in sequences.responses.lists()]
        return [
            Dialogue(contexts[prompt], text) for prompt, text in zip(sequences.prompt_B.tolist(), texts, strict=True)
        ]


def _digests(prompts: Packed) -> list[bytes]:
    """A hash of each row: ids of all prompts as Python numbers would take gigabytes."""
    return [hashlib.sha256(prompts.row(i).contiguous().numpy().tobytes()).digest() for i in range(len(prompts))]
