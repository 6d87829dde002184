"""Local models as generators, and the table of all kinds of generators."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from align.config import GeneratorConfig, ModelGeneratorConfig, SamplingConfig
from align.data import chat
from align.data.chat import Renderer
from align.engines import decoder
from align.engines.deepspeed import Engine, sharded_loading
from align.generators.base import Completion, Request, TextGenerator
from align.generators.endpoint import EndpointGenerator
from align.generators.functions import FunctionGenerator
from align.models import heads, identity, load, positions
from align.types import Packed, Prompts, Rollouts, Sequences

NOISE = -2
"""The step that names the sampling noise; training counts from 1, held-out evaluation uses -1."""
IDENTITY_FIELDS = ("kind", "path", "revision", "init", "dtype", "function", "date", "url", "model", "extra")
"""Fields that change the answers, besides weights and template; a kind of generator has some of them."""


class ModelGenerator(TextGenerator):
    """A causal language model with its own tokenizer and template, in this process."""

    def __init__(self, config: ModelGeneratorConfig, device: torch.device, seed: int = 0):
        self.config, self.seed = config, seed
        tokenizer = chat.load_tokenizer(config.path, config.revision, config.trust_remote_code)
        self.renderer = Renderer(tokenizer, config.chat_template, config.date, section="generator")
        with sharded_loading(config):
            self.model = load.causal_lm(config, chat.vocab_size(tokenizer), seed, chat.gaps(tokenizer))
        self.engine = Engine(heads.TokenLogprobs(self.model), config, device, total_steps=0)
        self._counts = {"requests": 0.0, "prompt_tokens": 0.0, "completion_tokens": 0.0}

    @classmethod
    def check(cls, config: ModelGeneratorConfig, name: str) -> Renderer:
        tokenizer = chat.load_tokenizer(config.path, config.revision, config.trust_remote_code)
        load.check(config, chat.vocab_size(tokenizer), name, sampled=1)  # lengths are checked in each call
        return Renderer(tokenizer, config.chat_template, config.date, section=name)

    @classmethod
    def fingerprint(cls, config: ModelGeneratorConfig, seed: int) -> str:
        return identity.model_fingerprint(config, seed)

    def complete(
        self, requests: Sequence[Request], sampling: SamplingConfig, margins: bool = False
    ) -> list[Completion]:
        ids = [self.renderer.prompt_ids(request.messages, request.opening) for request in requests]
        longest = max(map(len, ids), default=0)
        positions.require(
            self.model.config,
            longest + sampling.max_tokens,
            self.config.path,
            subject=f"a conversation of {longest} tokens with an answer of sampling.max_tokens={sampling.max_tokens}",
            remedy="lower sampling.max_tokens, or leave the conversation out",
        )
        # The request names its noise, so its position and the other requests of the call do not matter.
        noise_P = torch.tensor([int.from_bytes(request.key[:8], "big", signed=True) for request in requests]).long()
        prompts = Prompts(Packed.from_lists(ids), noise_P, self.renderer.stop_ids, NOISE)
        with self.engine.full(self.model.parameters()):
            rollouts = decoder.generate(
                self.model, prompts, replace(sampling, num_samples=1), self.seed, self.config.max_num_seqs
            )
        responses = rollouts.sequences.responses
        completions = [
            Completion(self.renderer.text(row), finished, len(prompt), len(row), margin)
            for row, finished, prompt, margin in zip(
                responses.lists(),
                rollouts.finished_B.tolist(),
                ids,
                self._margins(rollouts) if margins else [None] * len(requests),
                strict=True,
            )
        ]
        self._counts["requests"] += len(requests)
        self._counts["prompt_tokens"] += sum(map(len, ids))
        self._counts["completion_tokens"] += len(responses.ids_N)
        return completions

    def metrics(self) -> dict[str, float]:
        counts, self._counts = self._counts, dict.fromkeys(self._counts, 0.0)
        return counts

    @cached_property
    def _yes_no(self) -> dict[int, tuple[int, int]]:
        """For each token that is Yes or No, its pair (Yes, No): with or without a leading space."""
        encode = lambda text: self.renderer.tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
        unknown = self.renderer.tokenizer.unk_token_id
        pairs = {}
        for yes, no in ((encode("Yes"), encode("No")), (encode(" Yes"), encode(" No"))):
            if len(yes) == len(no) == 1 and unknown not in (yes[0], no[0]):
                pairs |= dict.fromkeys((yes[0], no[0]), (yes[0], no[0]))
        return pairs

    def _margins(self, rollouts: Rollouts) -> list[float | None]:
        """log p(Yes) - log p(No) at the last Yes or No of each answer; None if it has neither."""
        responses = rollouts.sequences.responses.lists()
        places = [max((t for t, id in enumerate(ids) if id in self._yes_no), default=None) for ids in responses]
        rows = [(i, place) for i, place in enumerate(places) if place is not None]
        # Each answer is cut before its verdict and continued with both words.
        candidates = [[*responses[i][:place], word] for i, place in rows for word in self._yes_no[responses[i][place]]]
        row_B = torch.tensor([i for i, _ in rows], dtype=torch.int64)
        used, prompt_B = rollouts.sequences.prompt_B[row_B].repeat_interleave(2).unique(return_inverse=True)
        sequences = Sequences(rollouts.sequences.prompts.select(used), Packed.from_lists(candidates), prompt_B)
        # All ranks compute, even without candidates, as sharded weights require.
        logprob_BT = self.engine.infer(sequences, temperature=1.0, entropy=False)["logprob_BT"]
        last_B = torch.tensor([len(ids) - 1 for ids in candidates], dtype=torch.int64)
        logprob_B = logprob_BT[torch.arange(len(candidates)), last_B] if candidates else torch.zeros(0)
        margins = dict(zip(row_B.tolist(), (logprob_B[::2] - logprob_B[1::2]).tolist(), strict=True))
        return [margins.get(i) for i in range(len(responses))]


GENERATORS: dict[str, type[TextGenerator]] = {
    "model": ModelGenerator,
    "endpoint": EndpointGenerator,
    "function": FunctionGenerator,
}


def generator_class(config: GeneratorConfig) -> type[TextGenerator]:
    """The class that answers for a section."""
    return GENERATORS[config.kind]


def build_generator(config: GeneratorConfig, device: torch.device, seed: int = 0) -> TextGenerator:
    """The generator of a section, ready to answer. Raises `ModelError`, `ConfigError` or `DataError` with a remedy."""
    return generator_class(config)(config, device, seed)


def identity_keys(name: str, config: GeneratorConfig, seed: int) -> dict[str, Any]:
    """Everything that the answers depend on, by key below ``name``. Raises as `TextGenerator.check` does."""
    generator = generator_class(config)
    renderer = generator.check(config, name)
    keys = {f"{name}.{field}": vars(config)[field] for field in IDENTITY_FIELDS if field in vars(config)}
    content = f"{generator.fingerprint(config, seed)} {renderer.fingerprint if renderer else ''}"
    return keys | {f"{name}, its content": hashlib.sha256(content.encode()).hexdigest()}
