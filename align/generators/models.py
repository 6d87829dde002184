"""Checkpoints that answer, in this process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch

from align.config import GeneratorConfig, SamplingConfig
from align.data import chat
from align.data.chat import Renderer
from align.engines import decoder
from align.engines.deepspeed import Engine, sharded_loading
from align.errors import DataError
from align.generators.base import Completion, Request
from align.models import heads, load
from align.models.positions import positions
from align.types import Packed, Prompts, Rollouts, Sequences

NOISE = -2
"""The step in the name of the noise; training counts from 1, held-out evaluation is -1."""


class ModelGenerator:
    """A causal language model with its own tokenizer and template."""

    def __init__(self, section: GeneratorConfig, device: torch.device, seed: int):
        """Raises `ModelError` and `DataError`, each with a remedy."""
        self.section, self.seed = section, seed
        tokenizer = chat.load_tokenizer(section.path, section.revision, section.trust_remote_code)
        self.renderer = Renderer(tokenizer, section.chat_template, section.date, section="generator")
        with sharded_loading(section):
            self.model = load.causal_lm(section, chat.vocab_size(tokenizer), seed, chat.gaps(tokenizer))
        self.engine = Engine(heads.TokenLogprobs(self.model), section, device, total_steps=0)
        self._counts = {"requests": 0.0, "prompt_tokens": 0.0, "completion_tokens": 0.0}

    def complete(
        self, requests: Sequence[Request], sampling: SamplingConfig, margins: bool = False
    ) -> list[Completion]:
        """See `align.generators.base.Generator`."""
        ids = [self.renderer.prompt_ids(one.messages, one.opening) for one in requests]
        self._require_positions(ids, sampling)
        # The noise of a request is named by what is asked, so neither its place nor its company matters.
        names = [int.from_bytes(one.key[:8], "big", signed=True) for one in requests]
        prompts = Prompts(Packed.from_lists(ids), torch.tensor(names, dtype=torch.int64), self.renderer.stop_ids, NOISE)
        with self.engine.full(self.model.parameters()):
            slots, one_each = self.section.max_num_seqs, replace(sampling, num_samples=1)
            rollouts = decoder.generate(self.model, prompts, one_each, self.seed, slots)
        found = self._margins(rollouts) if margins else [None] * len(requests)
        lengths = rollouts.sequences.responses.lengths_B.tolist()
        self._counts["requests"] += len(requests)
        self._counts["prompt_tokens"] += sum(map(len, ids))
        self._counts["completion_tokens"] += sum(lengths)
        texts = [self.renderer.text(row) for row in rollouts.sequences.responses.lists()]
        return [
            Completion(text, finished, len(prompt), length, margin)
            for text, finished, prompt, length, margin in zip(
                texts, rollouts.finished_B.tolist(), ids, lengths, found, strict=True
            )
        ]

    def metrics(self) -> dict[str, float]:
        """See `align.generators.base.Generator`."""
        found, self._counts = self._counts, dict.fromkeys(self._counts, 0.0)
        return found

    def close(self) -> None:
        """Nothing is open."""

    def _require_positions(self, ids: Sequence[Sequence[int]], sampling: SamplingConfig) -> None:
        longest = max(map(len, ids), default=0)
        limit = positions(self.model.config)
        if limit is not None and longest + sampling.max_tokens > limit[0]:
            raise DataError(
                f"a conversation of {longest} tokens and an answer of max_tokens={sampling.max_tokens} exceed the "
                f"{limit[0]} positions of the model",
                where=self.section.path,
                remedy="lower sampling.max_tokens, or leave the conversation out",
            )

    @cached_property
    def _yes_no(self) -> dict[int, tuple[int, int]]:
        """Of every token that says Yes or No, the pair it belongs to: with and without a blank before the word."""
        encode = lambda text: self.renderer.tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
        unknown = self.renderer.tokenizer.unk_token_id
        found = {}
        for yes, no in ((encode("Yes"), encode("No")), (encode(" Yes"), encode(" No"))):
            if len(yes) == len(no) == 1 and unknown not in (yes[0], no[0]):
                found |= dict.fromkeys((yes[0], no[0]), (yes[0], no[0]))
        return found

    def _margins(self, rollouts: Rollouts) -> list[float | None]:
        """log p(Yes) - log p(No) where the last Yes or No of each answer stands; None where there is none."""
        responses = rollouts.sequences.responses.lists()
        places = [max((t for t, id in enumerate(ids) if id in self._yes_no), default=None) for ids in responses]
        rows = [i for i, place in enumerate(places) if place is not None]
        said = [
            [*responses[i][:place], word]
            for i in rows
            if (place := places[i]) is not None
            for word in self._yes_no[responses[i][place]]
        ]
        both_B = rollouts.sequences.prompt_B[torch.tensor(rows, dtype=torch.int64)].repeat_interleave(2)
        used, prompt_B = both_B.unique(return_inverse=True)
        asked = Sequences(rollouts.sequences.prompts.select(used), Packed.from_lists(said), prompt_B)
        logprob_BT = self.engine.infer(asked, temperature=1.0)["logprob_BT"]  # every rank, as sharded weights need
        last_B = torch.tensor([len(ids) - 1 for ids in said], dtype=torch.int64)
        word_B = logprob_BT[torch.arange(len(said)), last_B] if said else torch.zeros(0)
        margins = dict(zip(rows, (word_B[::2] - word_B[1::2]).tolist(), strict=True))
        return [margins.get(i) for i in range(len(responses))]
