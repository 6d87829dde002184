"""A Python function that judges in runs that are killed."""


def different_words(prompts, completions, completion_ids, **kwargs):
    """Different words of an answer that its prompt has, less a little for each token."""
    asked = [set(turns[-1]["content"].split()) for turns in prompts]
    said = [set(turns[0]["content"].split()) for turns in completions]
    lengths = [len(ids) for ids in completion_ids]
    return [len(a & b) - 0.1 * length for a, b, length in zip(asked, said, lengths, strict=True)]
