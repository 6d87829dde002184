"""Decoding on the policy's own weights.

`Decoder` runs the modules of a Llama-shaped transformer itself, with a slot cache: the K samples of a prompt share one
prefill, finished rows leave the batch, and waiting sequences take their places. It copies no weights, so a rollout
always comes from the weights that are being trained, and its log-probabilities are those of the training forward pass.
Other architectures use ``transformers.generate`` (`generate_any`), with the same sampler.

Noise is that of `align.ops.sampling.uniform`: tokens do not depend on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from align.config import SamplingConfig
from align.data import collate
from align.engines.rollout import InProcessReceiver, RolloutContext
from align.errors import ModelError
from align.models.attention import is_plain, packed_attention
from align.models.heads import TokenLogprobs, lm_head, restricted
from align.models.invariance import check_sampling
from align.models.weights import named_weights
from align.ops import sampling
from align.types import Packed, Prompts, Rollouts, Sequences

REFILL_FRACTION = 4
"""Waiting sequences are admitted when a quarter of the slots is free: one prefill for many is cheaper than many for
one."""
COMPACT_BELOW = 0.85
"""Finished rows are removed when fewer than this fraction of the rows of the batch is alive."""
KEY_BLOCK = 32
"""Keys are attended to in multiples of this many positions."""


@dataclass
class _SampledTokens:
    """Tokens sampled so far. Row i is sequence i of the request, column t its token t."""

    ids_BT: Tensor
    logprob_BT: Tensor
    untempered_BT: Tensor
    length_B: Tensor
    finished_B: Tensor

    @classmethod
    def empty(cls, num_sequences: int, max_tokens: int, device: torch.device) -> _SampledTokens:
        shape = (num_sequences, max_tokens)
        zeros = lambda dtype: torch.zeros(shape, dtype=dtype, device=device)  # noqa: E731
        length = torch.zeros(num_sequences, dtype=torch.int64, device=device)
        return cls(zeros(torch.int64), zeros(torch.float32), zeros(torch.float32), length, length.bool())

    def rollouts(self, prompts: Prompts, sample: SamplingConfig) -> Rollouts:
        length = self.length_B.cpu()
        longest = int(length.max()) if len(length) else 0
        mask = torch.arange(longest)[None, :] < length[:, None]
        cut = lambda x: torch.where(mask, x[:, :longest].cpu(), torch.zeros((), dtype=x.dtype))  # noqa: E731
        offsets = torch.cat([length.new_zeros(1), length.cumsum(0)])
        prompt_B = torch.arange(len(prompts)).repeat_interleave(sample.num_samples)
        return Rollouts(
            Sequences(prompts.tokens, Packed(self.ids_BT[:, :longest].cpu()[mask], offsets), prompt_B),
            cut(self.logprob_BT),
            cut(self.untempered_BT),
            self.finished_B.cpu(),
            sample.temperature or 1.0,
            prompts.step,
        )


@dataclass
class _SamplingState:
    """B = P * K sequences to sample, sequence i being sample ``i % K`` of prompt ``i // K``."""

    model: PreTrainedModel
    prompts: Prompts
    sampling: SamplingConfig
    seed: int
    stop_ids: Tensor
    sampled: _SampledTokens

    @classmethod
    def of(cls, model: PreTrainedModel, prompts: Prompts, sample: SamplingConfig, seed: int) -> _SamplingState:
        """A request to ``model``, whose generation config may add stop ids (Llama 3 has several)."""
        device = model.device
        configured = getattr(model.generation_config, "eos_token_id", None)
        own = configured if isinstance(configured, list) else [configured]
        stop_ids = sorted({*prompts.stop_ids, *(id for id in own if id is not None)})
        sampled = _SampledTokens.empty(len(prompts) * sample.num_samples, sample.max_tokens, device)
        return cls(model, prompts, sample, seed, torch.tensor(stop_ids, dtype=torch.int64, device=device), sampled)

    def noise(self, sequence_B: Tensor) -> Tensor:
        """Uniform numbers for every token that each of these sequences may sample, (B, max_tokens)."""
        T, K = self.sampling.max_tokens, self.sampling.num_samples
        sequence_N = sequence_B.repeat_interleave(T)
        prompt_N = self.prompts.index_P.to(sequence_B.device)[sequence_N // K]
        token_N = torch.arange(T, device=sequence_B.device).repeat(len(sequence_B))
        return sampling.uniform(self.seed, self.prompts.step, prompt_N, sequence_N % K, token_N).view(-1, T)

    def draw(self, logits_BV: Tensor, uniform_B: Tensor, sequence_B: Tensor) -> tuple[Tensor, Tensor]:
        """Sample and record the next token of each sequence, among ids that the tokenizer has. Returns the ids, and
        which sequences continue."""
        s, sampled = self.sampling, self.sampled
        logits_BV = restricted(self.model, logits_BV)
        ids, logprob, untempered = sampling.sample(logits_BV, uniform_B, s.temperature, s.top_k, s.top_p, s.min_p)
        t = sampled.length_B[sequence_B]
        sampled.ids_BT[sequence_B, t] = ids
        sampled.logprob_BT[sequence_B, t] = logprob
        sampled.untempered_BT[sequence_B, t] = untempered
        sampled.length_B[sequence_B] = t + 1
        sampled.finished_B[sequence_B] = torch.isin(ids, self.stop_ids)
        return ids, ~sampled.finished_B[sequence_B] & (t + 1 < s.max_tokens)


@dataclass
class _Rows:
    """State of the rows of the batch; row i lives in cache slot i."""

    sequence: Tensor
    token: Tensor
    position: Tensor
    uniform: Tensor
    alive: Tensor

    def joined(self, other: _Rows) -> _Rows:
        return _Rows(**{name: torch.cat([value, getattr(other, name)]) for name, value in vars(self).items()})

    def take(self, rows: Tensor) -> _Rows:
        return _Rows(**{name: value[rows] for name, value in vars(self).items()})


class Decoder:
    """Decoding for models of `align.models.attention.FAMILIES`."""

    def __init__(self, model: PreTrainedModel, num_slots: int, agree: Callable[[int], int] | None = None):
        """``agree`` (largest of a number over ranks) makes all ranks take equally many passes, for sharded weights."""
        self.body: Any = model.model
        self.lm_head = lm_head(model)
        self.model, self.num_slots, self.agree = model, num_slots, agree
        config = model.config
        self.num_heads, self.num_kv = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    @torch.no_grad()
    def generate(self, prompts: Prompts, sample: SamplingConfig, seed: int) -> Rollouts:
        """K responses to each prompt, adjacent, in the order of their number. Exact in the sense of `Rollouts`."""
        request = _SamplingState.of(self.model, prompts, sample, seed)
        count = len(prompts) * sample.num_samples
        self._reserve(prompts, sample, count)
        waiting, rows = 0, self._no_rows(sample.max_tokens)
        # Each iteration is one forward pass on every rank: with sharded weights a pass gathers them, a collective call.
        # So a rank without work continues with `_idle` until no rank has work.
        while self._more(waiting < count or len(rows.alive) > 0):
            free = self.num_slots - len(rows.alive)
            if waiting < count and (free * REFILL_FRACTION >= self.num_slots or len(rows.alive) == 0):
                admitted = torch.arange(waiting, min(count, waiting + free), device=request.stop_ids.device)
                rows = rows.joined(self._prefill(request, admitted, first_slot=len(rows.alive)))
                waiting += len(admitted)
            elif len(rows.alive):
                self._decode(request, rows)
            else:
                self._idle()
            rows = self._compact(rows, waiting < count)  # free slots first, so that the next pass can refill them
        return request.sampled.rollouts(prompts, sample)

    def _more(self, busy: bool) -> bool:
        return busy if self.agree is None else self.agree(int(busy)) > 0

    def _no_rows(self, max_tokens: int) -> _Rows:
        none = torch.empty(0, dtype=torch.int64, device=self.model.device)
        uniform = torch.empty(0, max_tokens, dtype=torch.float64, device=self.model.device)
        return _Rows(none, none, none, uniform, none.bool())

    def _reserve(self, prompts: Prompts, sample: SamplingConfig, count: int) -> None:
        """Caches of (slots, kv heads, positions, head_dim) for each layer."""
        longest = int(prompts.tokens.lengths_B.max()) + sample.max_tokens if len(prompts) else KEY_BLOCK
        length = -(-longest // KEY_BLOCK) * KEY_BLOCK
        shape = (min(self.num_slots, count), self.num_kv, length, self.head_dim)
        empty = lambda: torch.zeros(shape, dtype=self.model.dtype, device=self.model.device)  # noqa: E731
        self.cache = [(empty(), empty()) for _ in self.body.layers]

    def _prefill(self, request: _SamplingState, sequence: Tensor, first_slot: int) -> _Rows:
        """Run the prompts of new sequences, each once, and sample every sequence's first token."""
        K = request.sampling.num_samples
        prompt_of = (sequence // K).cpu()
        used, prompt_B = prompt_of.unique(return_inverse=True)
        prompts = request.prompts.tokens.select(used)
        nothing = Packed(torch.empty(0, dtype=torch.int64), torch.zeros(len(used) + 1, dtype=torch.int64))
        layout = collate.packed(Sequences(prompts, nothing, torch.arange(len(used)))).to(sequence.device)
        # Cache slot and position of every prompt token of every sequence, and the flat token whose keys go there.
        copies = prompts.select(prompt_B)
        slot_N = (torch.arange(len(sequence)) + first_slot).repeat_interleave(copies.lengths_B)
        position_N = torch.arange(len(copies.ids_N)) - copies.offsets_B1[:-1].repeat_interleave(copies.lengths_B)
        source_N = position_N + prompts.offsets_B1[:-1][prompt_B].repeat_interleave(copies.lengths_B)
        place = [index.to(sequence.device) for index in (slot_N, position_N, source_N)]

        def attend(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            slot, position, source = place
            for cached, fresh in zip(self.cache[index], (k, v), strict=True):
                cached[slot, :, position] = fresh[0].transpose(0, 1)[source]
            return packed_attention(self.body, q, k, v, None, layout=layout)[0]

        hidden = self._body(layout.input_ids, layout.position_ids, attend)[0]
        logits = self.lm_head(hidden[layout.last_B[prompt_B.to(sequence.device)]])
        uniform = request.noise(sequence)
        ids, alive = request.draw(logits, uniform[:, 0], sequence)
        return _Rows(sequence, ids, copies.lengths_B.to(sequence.device), uniform, alive)

    def _decode(self, request: _SamplingState, rows: _Rows) -> None:
        """Decode one token for every row. Finished rows are computed and ignored until `_compact` removes them."""
        num_rows = len(rows.alive)
        slots = torch.arange(num_rows, device=rows.token.device)
        num_keys = -(-(int(rows.position.max()) + 1) // KEY_BLOCK) * KEY_BLOCK
        visible = torch.arange(num_keys, device=rows.token.device)[None, :] <= rows.position[:, None]

        def attend(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.cache[index]
            keys[slots, :, rows.position] = k[:, :, 0]
            values[slots, :, rows.position] = v[:, :, 0]
            # Grouped-query attention: the query heads that share a key head take the axis of query positions.
            grouped = q.view(num_rows, self.num_kv, self.num_heads // self.num_kv, self.head_dim)
            out = F.scaled_dot_product_attention(
                grouped,
                keys[:num_rows, :, :num_keys],
                values[:num_rows, :, :num_keys],
                attn_mask=visible[:, None, None],
            )
            return out.reshape(num_rows, 1, self.num_heads, self.head_dim)

        hidden = self._body(rows.token[:, None], rows.position[:, None], attend)[:, 0]
        logits = self.lm_head(hidden)
        live = rows.alive.nonzero().squeeze(1)
        sequence = rows.sequence[live]
        t = request.sampled.length_B[sequence]
        ids, alive = request.draw(logits[live], rows.uniform[live, t], sequence)
        rows.token[live] = ids
        rows.position[live] += 1
        rows.alive[live] = alive

    def _idle(self) -> None:
        """A discarded pass on one token: other ranks gather sharded weights, and need the shards of this rank."""
        token = torch.zeros(1, 1, dtype=torch.int64, device=self.model.device)
        self.lm_head(self._body(token, token, lambda index, q, k, v: q.transpose(1, 2)))

    def _compact(self, rows: _Rows, refill: bool) -> _Rows:
        """Move live rows into the slots of finished ones, when that is worth it."""
        total, live = len(rows.alive), int(rows.alive.sum())
        if live == total or (live > COMPACT_BELOW * total and not refill):
            return rows
        holes = (~rows.alive[:live]).nonzero().squeeze(1)
        movers = rows.alive[live:].nonzero().squeeze(1) + live
        if len(movers):
            filled = int(rows.position[movers].max()) + 1
            for cached in (tensor for pair in self.cache for tensor in pair):
                cached[holes, :, :filled] = cached[movers, :, :filled]
        source = torch.arange(live, device=holes.device)
        source[holes] = movers
        return rows.take(source)

    def _body(self, ids: Tensor, positions: Tensor, attend: Callable[[int, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """The transformer over ``ids`` (R, Q) with rotary positions; ``attend`` gets q, k, v as (R, heads, Q,
        head_dim)."""
        hidden = self.body.embed_tokens(ids)
        cos, sin = self.body.rotary_emb(hidden, position_ids=positions)
        for index, layer in enumerate(self.body.layers):
            attention, normed = layer.self_attn, layer.input_layernorm(hidden)
            heads = (*ids.shape, -1, self.head_dim)
            q, k = attention.q_proj(normed).view(heads), attention.k_proj(normed).view(heads)
            v = attention.v_proj(normed).view(heads).transpose(1, 2)
            if hasattr(attention, "q_norm"):  # Qwen3
                q, k = attention.q_norm(q), attention.k_norm(k)
            q, k = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
            hidden = hidden + attention.o_proj(attend(index, q, k, v).flatten(2))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return self.body.norm(hidden)


class _HashSampler(LogitsProcessor):
    """Draws with our sampler inside ``transformers.generate``: leaves only the drawn token possible."""

    def __init__(self, request: _SamplingState, prompt_length: int):
        sequence = torch.arange(len(request.sampled.length_B), device=request.stop_ids.device)
        self.request, self.prompt_length, self.uniform = request, prompt_length, request.noise(sequence)
        self.sequence, self.open = sequence, torch.ones_like(sequence, dtype=torch.bool)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        t = input_ids.shape[1] - self.prompt_length
        live = self.open.nonzero().squeeze(1)
        forced = torch.full_like(scores, -float("inf"))
        ids, alive = self.request.draw(scores[live], self.uniform[live, t], self.sequence[live])
        forced[live, ids] = 0.0
        forced[~self.open, self.request.stop_ids[0]] = 0.0
        self.open[live] = alive
        return forced


@torch.no_grad()
def generate_any(model: PreTrainedModel, prompts: Prompts, sample: SamplingConfig, seed: int) -> Rollouts:
    """The same rollouts for any causal language model, by ``transformers.generate`` on left-padded prompts."""
    request = _SamplingState.of(model, prompts, sample, seed)
    stop_ids = request.stop_ids
    if not len(prompts):
        return request.sampled.rollouts(prompts, sample)
    prompt_B = torch.arange(len(prompts)).repeat_interleave(sample.num_samples)
    rows = prompts.tokens.select(prompt_B)
    empty = Packed(torch.empty(0, dtype=torch.int64), torch.zeros(len(rows) + 1, dtype=torch.int64))
    layout = collate.padded(Sequences(rows, empty, torch.arange(len(rows))), side="left").to(stop_ids.device)
    length = layout.input_ids.shape[1]
    generator: Any = model
    # Penalties and suppressed tokens of the checkpoint would make the sampled distribution differ from the trained one.
    saved_config, generator.generation_config = generator.generation_config, GenerationConfig()
    try:
        generator.generate(
            layout.input_ids,
            attention_mask=layout.attention_mask,
            do_sample=False,
            num_beams=1,
            max_new_tokens=sample.max_tokens,
            eos_token_id=stop_ids.tolist(),
            pad_token_id=int(stop_ids[0]),
            logits_processor=LogitsProcessorList([_HashSampler(request, length)]),
        )
    finally:
        generator.generation_config = saved_config
    return request.sampled.rollouts(prompts, sample)


def generate(
    model: PreTrainedModel,
    prompts: Prompts,
    sample: SamplingConfig,
    seed: int,
    num_slots: int,
    agree: Callable[[int], int] | None = None,
) -> Rollouts:
    """K responses to each prompt, by `Decoder` where it knows the architecture and by `generate_any` elsewhere.

    ``agree`` (the largest of a number over ranks) is given where weights are fetched layer by layer; see `Decoder`.
    Raises `ModelError` for what `align.models.invariance.check_sampling` refuses.
    """
    longest = int(prompts.tokens.lengths_B.max()) if len(prompts) else 0
    check_sampling(model.config, longest + sample.max_tokens)
    if is_plain(model.config) and type(model).__module__.startswith("transformers."):
        return Decoder(model, num_slots, agree).generate(prompts, sample, seed)
    if agree is not None:
        raise ModelError(
            f"{model.config.model_type} cannot be sampled layer by layer",
            remedy="set gather_weights_for_generation=true",
        )
    return generate_any(model, prompts, sample, seed)


class DecoderEngine(InProcessReceiver):
    """The default `align.engines.rollout.RolloutEngine`: decodes on the worker's own model."""

    exact = True
    shares_weights = True

    def __init__(self, context: RolloutContext):
        self.context = context

    def generate(self, prompts: Prompts, sampling: SamplingConfig) -> Rollouts:
        section, model, training = self.context.section, self.context.model, self.context.training
        arguments = (model, prompts, sampling, self.context.seed, section.max_num_seqs)
        if training is None:
            return generate(*arguments)
        if training.sharded and not section.gather_weights_for_generation:
            return generate(*arguments, training.agree)
        with training.full(model.parameters()):
            return generate(*arguments)

    @torch.no_grad()
    def load_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        weights, loaded = dict(named_weights(self.context.model)), set()
        for name, value in tensors:
            if name in weights:
                weights[name].copy_(value)
            loaded.add(name)
        if loaded != weights.keys():
            raise ModelError(f"policy and sampler differ in weights: {sorted(loaded ^ weights.keys())[:3]}")

    @torch.no_grad()
    def logprobs(self, sequences: Sequences) -> Tensor:
        head = TokenLogprobs(self.context.model)
        layout = (collate.packed if head.packed else collate.padded)(sequences).to(self.context.model.device)
        return head(layout, temperature=1.0)["logprob_BT"].float().cpu()

    def sleep(self) -> None:
        """The weights are in use between rollouts too, and a cache lives for one rollout."""

    def wake(self) -> None:
        """Nothing to do: `sleep` frees nothing."""
