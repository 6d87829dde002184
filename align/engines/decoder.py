"""Decoding on the policy's own weights.

`Decoder` runs the modules of a Llama-shaped transformer itself, with a slot cache: the K samples of a prompt share one
prefill, finished rows leave the batch, and waiting sequences take their places. It copies no weights, so a rollout
always comes from the weights that are being trained, and its log-probabilities are those of the training forward pass.
Other architectures use ``transformers.generate`` (`align.engines.generate`), with the same sampler.

Noise is that of `align.ops.sampling.uniform`: tokens do not depend on what else is in the batch.

On a GPU nothing in a decoding step waits for the device. The host counts positions itself, and reads every
`LOOK_EVERY` steps which rows have ended; until then it decodes ended rows too and drops their tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from align.config import SamplingConfig
from align.config.models import ModelConfig
from align.data import collate
from align.engines import products
from align.engines.cuda_graphs import StepGraphs
from align.engines.generate import generate_any
from align.engines.requests import SamplingRequest
from align.errors import ModelError
from align.models.attention import is_plain, packed_attention
from align.models.heads import lm_head
from align.models.invariance import check_sampling
from align.types import Packed, Prompts, Rollouts, Sequences

REFILL_FRACTION = 4
"""Waiting sequences are admitted when a quarter of the slots is free: one prefill for many is cheaper than many for
one."""
COMPACT_BELOW = 0.85
"""Finished rows are removed when fewer than this fraction of the rows of the batch is alive."""
KEY_BLOCK = 32
"""Keys are attended to in multiples of this many positions."""
GRAPH_ROWS, GRAPH_KEYS = 8, 128
"""Rows and keys of CUDA graphs are multiples of these, so that few graphs serve all steps."""
LOOK_EVERY = 8
"""Steps after which a GPU tells the host which rows have ended. On a CPU the host knows after every step."""

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Attention of a layer by its number, from q, k, v of (rows, heads, queries, head_dim)."""


class _Rows:
    """The rows of the batch; row i lives in cache slot i. Tensors have one entry for each slot and keep their place."""

    def __init__(self, num_slots: int, max_tokens: int, device: torch.device):
        integers = lambda device: torch.zeros(num_slots, dtype=torch.int64, device=device)  # noqa: E731
        self.sequence, self.token, self.position = integers(device), integers(device), integers(device)
        self.alive = torch.zeros(num_slots, dtype=torch.bool, device=device)
        self.uniform = torch.zeros(num_slots, max_tokens, dtype=torch.float64, device=device)
        # What the host counts: the position that a row has reached if it has not ended, and tokens that it may sample.
        self.reached, self.left = integers("cpu"), integers("cpu")
        self.count = 0

    def move(self, source: Tensor, holes: Tensor) -> None:
        """Copy rows ``source`` to the rows ``holes``; both are on the host."""
        for value in vars(self).values():
            if isinstance(value, Tensor):
                value[holes.to(value.device)] = value[source.to(value.device)]


def _module(module: Any, x: Tensor) -> Tensor:
    return module(x)


def _rounded_up(number: int, block: int) -> int:
    return -(-number // block) * block


class Decoder:
    """Decoding for models of `align.models.attention.FAMILIES`. Its caches stay between rollouts until `free`."""

    def __init__(
        self,
        model: PreTrainedModel,
        num_slots: int,
        agree: Callable[[int], int] | None = None,
        prefill_tokens: int = ModelConfig.max_tokens_per_micro_batch,
    ):
        """``agree`` (largest of a number over ranks) makes all ranks take equally many passes, for sharded weights.

        ``prefill_tokens`` bounds the tokens of prompts in one pass; a longer prompt is a pass of its own.
        """
        self.body: Any = model.model
        self.lm_head = lm_head(model)
        self.model, self.num_slots, self.agree, self.prefill_tokens = model, num_slots, agree, prefill_tokens
        config = model.config
        self.num_heads, self.num_kv = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        # With sharded weights only a module's own forward pass has its weight.
        self.linear, self.mlp = (products.linear, products.gated_mlp) if agree is None else (_module, _module)
        self._logits: Tensor | None = None
        self.look_every = 1 if model.device.type == "cpu" else LOOK_EVERY
        self.cache: list[tuple[Tensor, Tensor]] = []
        self.graphs = StepGraphs() if model.device.type == "cuda" and agree is None else None
        self._last: tuple[SamplingRequest, _Rows] | None = None

    def free(self) -> None:
        """Release caches and graphs."""
        self.cache, self._last, self._logits = [], None, None
        if self.graphs is not None:
            self.graphs.clear()

    @torch.no_grad()
    def generate(self, prompts: Prompts, sample: SamplingConfig, seed: int) -> Rollouts:
        """K responses to each prompt, adjacent, in the order of their number. Exact in the sense of `Rollouts`."""
        count = len(prompts) * sample.num_samples
        self._reserve(prompts, sample, count)
        request, rows = self._state(prompts, sample, seed)
        waiting, steps = 0, 0
        # Each iteration is one forward pass on every rank: with sharded weights a pass gathers them, a collective call.
        # So a rank without work continues with `_idle` until no rank has work.
        while self._more(waiting < count or rows.count > 0):
            free = self.num_slots - rows.count
            if waiting < count and (free * REFILL_FRACTION >= self.num_slots or rows.count == 0):
                admitted = self._admitted(request, waiting, min(count, waiting + free))
                self._prefill(request, rows, admitted)
                waiting += len(admitted)
            elif rows.count:
                self._decode(request, rows)
                steps += 1
            else:
                self._idle()
            if rows.count and (steps % self.look_every == 0 or bool((rows.left[: rows.count] == 0).any())):
                self._compact(rows, waiting < count)  # free slots first, so that the next pass can refill them
        return request.sampled.rollouts(prompts, sample)

    def _state(self, prompts: Prompts, sample: SamplingConfig, seed: int) -> tuple[SamplingRequest, _Rows]:
        """Tensors of a rollout: those of the last one if they fit, because graphs hold their addresses."""
        before = self._last[0] if self._last is not None else None
        request = SamplingRequest.of(self.model, prompts, sample, seed, before)
        if self._last is not None and before is not None and request.sampled is before.sampled:
            rows = self._last[1]
            rows.count = 0
            rows.alive.zero_()
        else:
            slots = min(self.num_slots, max(len(request.sampled.length_B), 1))
            rows = _Rows(slots, sample.max_tokens, self.model.device)
        self._last = request, rows
        return request, rows

    def _more(self, busy: bool) -> bool:
        return busy if self.agree is None else self.agree(int(busy)) > 0

    def _reserve(self, prompts: Prompts, sample: SamplingConfig, count: int) -> None:
        """Caches of (slots, kv heads, positions, head_dim) for each layer, unless those of an earlier rollout do."""
        longest = int(prompts.tokens.lengths_B.max()) + sample.max_tokens if len(prompts) else KEY_BLOCK
        slots, length = min(self.num_slots, count), _rounded_up(longest, KEY_BLOCK)
        if self.cache and self.cache[0][0].shape[0] >= slots and self.cache[0][0].shape[2] >= length:
            return
        self.free()
        shape = (slots, self.num_kv, length, self.head_dim)
        # Zeros, because a masked key has weight 0, and 0 times what memory held before may be NaN.
        empty = lambda: torch.zeros(shape, dtype=self.model.dtype, device=self.model.device)  # noqa: E731
        self.cache = [(empty(), empty()) for _ in self.body.layers]
        if self.agree is None and self.model.device.type == "cpu" and self.model.dtype == torch.float32:
            self._logits = torch.empty(slots, self.lm_head.out_features, device=self.model.device)

    def _admitted(self, request: SamplingRequest, first: int, end: int) -> Tensor:
        """The next sequences, from ``first`` up to ``end``, whose prompts fit into one pass. On the host."""
        sequence = torch.arange(first, end)
        prompt_of = sequence // request.sampling.num_samples
        opens = torch.ones_like(prompt_of, dtype=torch.bool)
        opens[1:] = prompt_of[1:] != prompt_of[:-1]
        tokens = (request.prompts.tokens.lengths_B[prompt_of] * opens).cumsum(0)
        return sequence[tokens <= max(self.prefill_tokens, int(tokens[0]))]

    def _prefill(self, request: SamplingRequest, rows: _Rows, sequence: Tensor) -> None:
        """Run the prompts of new sequences, each once, and sample every sequence's first token."""
        K, device, first = request.sampling.num_samples, request.stop_ids.device, rows.count
        used, prompt_B = (sequence // K).unique(return_inverse=True)
        prompts = request.prompts.tokens.select(used)
        nothing = Packed(torch.empty(0, dtype=torch.int64), torch.zeros(len(used) + 1, dtype=torch.int64))
        layout = collate.packed(Sequences(prompts, nothing, torch.arange(len(used)))).to(device)
        # Cache slot and position of every prompt token of every sequence, and the flat token whose keys go there.
        copies = prompts.select(prompt_B)
        slot_N = (torch.arange(len(sequence)) + first).repeat_interleave(copies.lengths_B)
        position_N = torch.arange(len(copies.ids_N)) - copies.offsets_B1[:-1].repeat_interleave(copies.lengths_B)
        source_N = position_N + prompts.offsets_B1[:-1][prompt_B].repeat_interleave(copies.lengths_B)
        slot, position, source = (index.to(device) for index in (slot_N, position_N, source_N))

        def attend(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for cached, fresh in zip(self.cache[index], (k, v), strict=True):
                cached[slot, :, position] = fresh[0].transpose(0, 1)[source]
            return packed_attention(self.body, q, k, v, None, layout=layout)[0]

        hidden = self._body(layout.input_ids, layout.position_ids, attend)[0]
        logits = self.lm_head(hidden[layout.last_B[prompt_B.to(device)]])
        new = slice(first, first + len(sequence))
        rows.sequence[new] = sequence.to(device)
        rows.uniform[new] = request.noise(rows.sequence[new])
        everyone = torch.ones(len(sequence), dtype=torch.bool, device=device)
        rows.token[new], rows.alive[new] = request.draw(logits, rows.uniform[new], rows.sequence[new], everyone)
        rows.position[new] = copies.lengths_B.to(device)
        rows.reached[new] = copies.lengths_B
        rows.left[new] = request.sampling.max_tokens - 1
        rows.count = new.stop

    def _decode(self, request: SamplingRequest, rows: _Rows) -> None:
        """Decode one token for every row. Rows that have ended are computed and ignored until `_compact` removes
        them."""
        num_rows, num_keys = rows.count, int(rows.reached[: rows.count].max()) + 1
        if self.graphs is None or request.sampling.top_p < 1.0:  # top-p asks the device for rows that need a full sort
            self._step(request, rows, num_rows, _rounded_up(num_keys, KEY_BLOCK))
        else:
            shape = (
                min(_rounded_up(num_rows, GRAPH_ROWS), len(rows.alive)),
                min(_rounded_up(num_keys, GRAPH_KEYS), self.cache[0][0].shape[2]),
            )
            places = (id(rows), *(parameter.data_ptr() for parameter in self.model.parameters()))
            self.graphs.run(shape, places, lambda: self._step(request, rows, *shape))
        rows.reached[:num_rows] += 1
        rows.left[:num_rows] -= 1

    def _step(self, request: SamplingRequest, rows: _Rows, num_rows: int, num_keys: int) -> None:
        """The device's part of a step: reads and writes tensors in place, and waits for nothing."""
        sequence, token, position, alive = (
            value[:num_rows] for value in (rows.sequence, rows.token, rows.position, rows.alive)
        )
        slots = torch.arange(num_rows, device=token.device)
        visible = torch.arange(num_keys, device=token.device)[None, :] <= position[:, None]

        def attend(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.cache[index]
            keys[slots, :, position] = k[:, :, 0]
            values[slots, :, position] = v[:, :, 0]
            # Grouped-query attention: the query heads that share a key head take the axis of query positions.
            grouped = q.view(num_rows, self.num_kv, self.num_heads // self.num_kv, self.head_dim)
            out = F.scaled_dot_product_attention(
                grouped,
                keys[:num_rows, :, :num_keys],
                values[:num_rows, :, :num_keys],
                attn_mask=visible[:, None, None],
            )
            return out.reshape(num_rows, 1, self.num_heads, self.head_dim)

        hidden = self._body(token[:, None], position[:, None], attend)[:, 0]
        logits = products.logits(self.lm_head, hidden, self._logits)
        ids, going = request.draw(logits, rows.uniform[:num_rows], sequence, alive)
        token.copy_(ids)
        position.add_(going)  # the first position of an ended row that is overwritten is its last
        alive.copy_(going)

    def _idle(self) -> None:
        """A discarded pass on one token: other ranks gather sharded weights, and need the shards of this rank."""
        token = torch.zeros(1, 1, dtype=torch.int64, device=self.model.device)
        self.lm_head(self._body(token, token, lambda index, q, k, v: q.transpose(1, 2)))

    def _compact(self, rows: _Rows, refill: bool) -> None:
        """Move live rows into the slots of ended ones, when that is worth it."""
        alive = rows.alive[: rows.count].cpu()
        total, live = rows.count, int(alive.sum())
        if live == total or (live > COMPACT_BELOW * total and not refill):
            return
        holes = (~alive[:live]).nonzero().squeeze(1)
        movers = alive[live:].nonzero().squeeze(1) + live
        if len(movers):
            filled = int(rows.reached[movers].max()) + 1
            to, source = holes.to(rows.token.device), movers.to(rows.token.device)
            for cached in (tensor for pair in self.cache for tensor in pair):
                cached[to, :, :filled] = cached[source, :, :filled]
            rows.move(movers, holes)
        rows.alive[live:] = False
        rows.count = live

    def _body(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """The transformer over ``ids`` (R, Q) with rotary positions."""
        hidden = self.body.embed_tokens(ids)
        cos, sin = self.body.rotary_emb(hidden, position_ids=positions)
        hidden, heads = hidden.flatten(0, 1), (*ids.shape, -1, self.head_dim)
        for index, layer in enumerate(self.body.layers):
            attention, normed = layer.self_attn, layer.input_layernorm(hidden)
            q, k = self.linear(attention.q_proj, normed).view(heads), self.linear(attention.k_proj, normed).view(heads)
            v = self.linear(attention.v_proj, normed).view(heads).transpose(1, 2)
            if hasattr(attention, "q_norm"):  # Qwen3
                q, k = attention.q_norm(q), attention.k_norm(k)
            q, k = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
            hidden = hidden + self.linear(attention.o_proj, attend(index, q, k, v).flatten(2).flatten(0, 1))
            hidden = hidden + self.mlp(layer.mlp, layer.post_attention_layernorm(hidden))
        return self.body.norm(hidden).view(*ids.shape, -1)


def decoder_of(
    model: PreTrainedModel,
    num_slots: int,
    agree: Callable[[int], int] | None = None,
    prefill_tokens: int = ModelConfig.max_tokens_per_micro_batch,
) -> Decoder | None:
    """A decoder, where `Decoder` knows the architecture. Raises `ModelError` if it does not and ``agree`` is given,
    which is the case where weights are fetched layer by layer."""
    if is_plain(model.config) and type(model).__module__.startswith("transformers."):
        return Decoder(model, num_slots, agree, prefill_tokens)
    if agree is not None:
        raise ModelError(
            f"{model.config.model_type} cannot be sampled layer by layer",
            remedy="set gather_weights_for_generation=true",
        )
    return None


def generate_by(
    decoder: Decoder | None, model: PreTrainedModel, prompts: Prompts, sample: SamplingConfig, seed: int, num_slots: int
) -> Rollouts:
    """K responses to each prompt, by ``decoder`` (one of ``model``) or else by `generate_any`.

    Raises `ModelError` for what `align.models.invariance.check_sampling` refuses.
    """
    longest = int(prompts.tokens.lengths_B.max()) if len(prompts) else 0
    check_sampling(model.config, longest + sample.max_tokens)
    if decoder is None:
        return generate_any(model, prompts, sample, seed, num_slots)
    return decoder.generate(prompts, sample, seed)


def generate(
    model: PreTrainedModel,
    prompts: Prompts,
    sample: SamplingConfig,
    seed: int,
    num_slots: int,
    agree: Callable[[int], int] | None = None,
) -> Rollouts:
    """`generate_by` a decoder of ``num_slots`` rows that is used once."""
    return generate_by(decoder_of(model, num_slots, agree), model, prompts, sample, seed, num_slots)
