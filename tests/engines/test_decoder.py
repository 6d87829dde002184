"""Decoding against transformers, against the training forward pass, and against itself in other batches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from align.config import SamplingConfig
from align.data import collate
from align.engines.cuda_graphs import StepGraphs
from align.engines.decoder import Decoder, generate
from align.engines.generate import generate_any
from align.models.attention import is_plain
from align.models.heads import TokenizerIds, TokenLogprobs, restrict
from align.types import Packed, Prompts, Rollouts, Sequences

SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "llama one key head": LlamaConfig(**SIZES | {"num_key_value_heads": 1}),
    "llama all heads": LlamaConfig(**SIZES | {"num_key_value_heads": 4}),
    "llama3 rope": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "llama wide heads": LlamaConfig(**SIZES, head_dim=16),
    "llama tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
}
GPT2 = GPT2Config(
    vocab_size=60, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3, bos_token_id=None, eos_token_id=None
)
NEOX = GPTNeoXConfig(**{name: value for name, value in SIZES.items() if name != "num_key_value_heads"})
LENGTHS = [5, 1, 40, 12, 3, 17, 8]


def build(config: Any, attention: str | None = None) -> Any:
    torch.manual_seed(5)
    attention = attention or ("packed" if is_plain(config) else "sdpa")
    model = AutoModelForCausalLM.from_config(
        copy.deepcopy(config), attn_implementation=attention, dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms that are not 0 and 1
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def prompts(lengths: list[int] = LENGTHS, stop_ids: tuple[int, ...] = (2, 7, 11, 30), step: int = 3) -> Prompts:
    source = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, 60, (length,), generator=source).tolist() for length in lengths]
    return Prompts(Packed.from_lists(rows), torch.arange(len(rows)) + 100, stop_ids, step)


def tokens(rollouts: Rollouts) -> list[list[int]]:
    return rollouts.sequences.responses.lists()


def by_transformers(model: Any, asked: Prompts, max_tokens: int, **options: Any) -> list[list[int]]:
    """Greedy responses, one prompt at a time."""
    model.set_attn_implementation("eager")
    responses = []
    for row in asked.tokens.lists():
        ids = torch.tensor([row])
        stop: Any = list(asked.stop_ids) or None
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max_tokens,
            eos_token_id=stop,
            pad_token_id=0,
            **options,
        )
        responses.append(out[0, len(row) :].tolist())
    return responses


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_equals_transformers(name):
    asked, greedy = prompts(), SamplingConfig(max_tokens=20, temperature=0.0)
    model = build(CONFIGS[name])
    assert is_plain(model.config)
    ours = Decoder(model, 3).generate(asked, greedy, seed=0)
    theirs = by_transformers(model, asked, 20)
    assert tokens(ours) == theirs
    assert ours.finished_B.tolist() == [row[-1] in asked.stop_ids for row in theirs]
    assert len({len(row) for row in theirs}) > 1  # some stop early


def test_stop_ids_of_the_model_itself_end_a_response():
    asked = prompts(stop_ids=(2,))
    model = build(CONFIGS["llama"])
    greedy = SamplingConfig(max_tokens=12, temperature=0.0)
    plain = tokens(generate(model, asked, greedy, 0, 8))
    own = sorted({row[2] for row in plain})  # ends every response at its third token or before
    model.generation_config.eos_token_id = own
    ours = generate(model, asked, greedy, 0, 8)
    for row, whole, finished in zip(tokens(ours), plain, ours.finished_B.tolist(), strict=True):
        end = next(i for i, token in enumerate(whole) if token in {2, *own})
        assert row == whole[: end + 1]
        assert finished
    model.generation_config.eos_token_id = own[0]  # a single number is allowed
    assert any(row[-1] == own[0] for row in tokens(generate(model, asked, greedy, 0, 8)))


@pytest.fixture(scope="module")
def llama():
    return build(CONFIGS["llama"])


SAMPLING = SamplingConfig(num_samples=4, max_tokens=24, temperature=0.8)


def test_samples_do_not_depend_on_the_batch(llama):
    asked = prompts()
    whole = generate(llama, asked, SAMPLING, 9, num_slots=64)
    table = tokens(whole)
    for slots in (1, 3, 8, 28):
        assert tokens(generate(llama, asked, SAMPLING, 9, num_slots=slots)) == table
    for index in ([0, 2, 4, 6], [1, 3, 5], [4], [6, 5, 4, 3, 2, 1, 0]):
        part = generate(llama, asked.select(torch.tensor(index)), SAMPLING, 9, num_slots=5)
        rows = [4 * i + k for i in index for k in range(4)]
        assert tokens(part) == [table[row] for row in rows]
        torch.testing.assert_close(
            part.logprob_BT, whole.logprob_BT[rows][:, : part.logprob_BT.shape[1]], rtol=1e-5, atol=1e-5
        )
        assert part.finished_B.tolist() == whole.finished_B[rows].tolist()
    assert part.sequences.prompts.lists() == asked.tokens.lists()[::-1]
    assert part.sequences.prompt_B.tolist() == [p for p in range(7) for _ in range(4)]


def test_samples_depend_on_seed_step_prompt_number_and_sample(llama):
    asked = prompts([5, 5, 9])
    same = Prompts(asked.tokens.select(torch.tensor([0, 0])), torch.arange(2), asked.stop_ids, 3)
    a = tokens(generate(llama, asked, SAMPLING, 9, 64))
    twins = tokens(generate(llama, same, SAMPLING, 9, 64))
    assert twins[:4] != twins[4:]  # one text at two places of a step
    assert len({tuple(row) for row in a[:4]}) == 4
    assert a != tokens(generate(llama, asked, SAMPLING, 10, 64))
    later = Prompts(asked.tokens, asked.index_P, asked.stop_ids, 4)
    rollouts = generate(llama, later, SAMPLING, 9, 64)
    assert a != tokens(rollouts)
    assert rollouts.step == 4


def test_finished_rows_make_room_and_survivors_move(llama, monkeypatch):
    prefills, moved = [], []
    prefill, compact = Decoder._prefill, Decoder._compact

    def counted(self: Decoder, request: Any, rows: Any, sequence: Any) -> None:
        prefills.append((len(sequence), rows.count))
        prefill(self, request, rows, sequence)

    def watched(self: Decoder, rows: Any, refill: bool) -> None:
        total, live = rows.count, rows.sequence[: rows.count][rows.alive[: rows.count]].tolist()
        compact(self, rows, refill)
        if rows.count < total:
            after = rows.sequence[: rows.count].tolist()
            assert sorted(after) == sorted(live)
            moved.append(after != live)

    monkeypatch.setattr(Decoder, "_prefill", counted)
    monkeypatch.setattr(Decoder, "_compact", watched)
    rollouts = Decoder(llama, 8).generate(prompts(), SAMPLING, 9)
    assert sum(count for count, _ in prefills) == 28
    assert any(first > 0 for _, first in prefills)  # admitted beside rows under way
    assert all(count + first <= 8 for count, first in prefills)
    assert any(moved)
    monkeypatch.undo()
    assert tokens(rollouts) == tokens(Decoder(llama, 64).generate(prompts(), SAMPLING, 9))


def test_a_budget_of_prompt_tokens_splits_the_prefill_and_changes_no_token(llama, monkeypatch):
    passes = []
    prefill = Decoder._prefill

    def counted(self: Decoder, request: Any, rows: Any, sequence: Any) -> None:
        prompt_P = (sequence // SAMPLING.num_samples).unique()
        passes.append(int(request.prompts.tokens.lengths_B[prompt_P].sum()))
        prefill(self, request, rows, sequence)

    monkeypatch.setattr(Decoder, "_prefill", counted)
    whole = Decoder(llama, 64).generate(prompts(), SAMPLING, 9)
    assert passes == [sum(LENGTHS)]
    passes.clear()
    parts = Decoder(llama, 64, prefill_tokens=20).generate(prompts(), SAMPLING, 9)
    assert passes == [6, 40, 15, 17, 8]  # of 5, 1, 40, 12, 3, 17, 8: the prompt of 40 has a pass of its own
    assert tokens(parts) == tokens(whole)
    torch.testing.assert_close(parts.logprob_BT, whole.logprob_BT, rtol=1e-5, atol=1e-5)


def test_a_host_that_looks_rarely_and_caches_of_earlier_rollouts_change_no_token(llama):
    expected = tokens(Decoder(llama, 8).generate(prompts(), SAMPLING, 9))
    decoder = Decoder(llama, 8)
    decoder.look_every = 8
    other = Prompts(prompts().tokens, torch.arange(7) + 3, (2, 7), 5)
    for asked, seed in ((prompts(), 9), (other, 1), (prompts(), 9)):
        rollouts = decoder.generate(asked, SAMPLING, seed)
    cached = decoder.cache[0][0].data_ptr()
    assert tokens(rollouts) == expected
    decoder.generate(prompts([3, 2]), SamplingConfig(max_tokens=4), 9)
    assert decoder.cache[0][0].data_ptr() == cached
    decoder.generate(prompts([90]), SAMPLING, 9)  # longer than the cache
    assert tokens(decoder.generate(prompts(), SAMPLING, 9)) == expected


def test_steps_read_and_write_in_place_so_that_a_graph_of_one_rollout_serves_the_next(llama):
    """A recorded step runs again with other contents of the same tensors. Here the record is the Python step of the
    first rollout; a stale tensor in it would show."""
    recorded, replayed = [], []

    class Record:
        def __init__(self, step: Any):
            self.step = step
            recorded.append(self)

        def replay(self) -> None:
            replayed.append(self)
            self.step()

    decoder = Decoder(llama, 8)
    decoder.look_every = 8
    decoder.graphs = StepGraphs(lambda step, other: Record(step))
    for seed in (9, 4, 9):
        rollouts = decoder.generate(prompts(step=seed), SAMPLING, seed)
        count = len(recorded)
    assert tokens(rollouts) == tokens(Decoder(llama, 8).generate(prompts(step=9), SAMPLING, 9))
    assert len(replayed) > 4 * len(recorded)
    llama.lm_head.weight.data = llama.lm_head.weight.data.clone()  # another place: the records are of no use
    assert tokens(decoder.generate(prompts(step=9), SAMPLING, 9)) == tokens(rollouts)
    assert len(recorded) > count


def test_a_capture_that_fails_is_told_and_decoding_goes_on(llama):
    def fail(step: Any, other: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    decoder = Decoder(llama, 8)
    decoder.graphs = StepGraphs(fail)
    with pytest.warns(UserWarning, match="without CUDA graphs: operation not permitted"):
        rollouts = decoder.generate(prompts(), SAMPLING, 9)
    assert tokens(rollouts) == tokens(Decoder(llama, 8).generate(prompts(), SAMPLING, 9))


def check_logprobs(model: Any, rollouts: Rollouts, temperature: float) -> None:
    head = TokenLogprobs(model)
    layout = (collate.packed if head.packed else collate.padded)(rollouts.sequences)
    with torch.no_grad():
        tempered = head(layout, temperature=temperature)["logprob_BT"]
        plain = head(layout, temperature=1.0)["logprob_BT"]
    torch.testing.assert_close(rollouts.logprob_BT, tempered, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rollouts.untempered_logprob_BT, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_logprobs_are_those_of_training(name):
    model = build(CONFIGS[name])
    rollouts = generate(model, prompts(), SamplingConfig(num_samples=3, max_tokens=40, temperature=1.7), 2, num_slots=9)
    assert rollouts.temperature == 1.7
    assert not torch.allclose(rollouts.logprob_BT, rollouts.untempered_logprob_BT, atol=0.1)
    check_logprobs(model, rollouts, 1.7)


def test_logprobs_are_before_the_filters_and_of_temperature_one_when_greedy(llama):
    filtered = generate(llama, prompts(), SamplingConfig(max_tokens=10, temperature=0.5, top_k=3, top_p=0.9), 2, 64)
    check_logprobs(llama, filtered, 0.5)
    greedy = generate(llama, prompts(), SamplingConfig(max_tokens=10, temperature=0.0), 2, 64)
    assert greedy.temperature == 1.0
    check_logprobs(llama, greedy, 1.0)


def check_ends(rollouts: Rollouts, stop_ids: tuple[int, ...], limit: int) -> None:
    """Only a sampled stop id ends a response, and only at its end."""
    rows, finished = tokens(rollouts), rollouts.finished_B.tolist()
    for row, done in zip(rows, finished, strict=True):
        assert not set(row[:-1]) & set(stop_ids)
        assert done == (row[-1] in stop_ids)
        assert done or len(row) == limit
    assert set(finished) == {True, False}
    cut = ~rollouts.mask_BT
    assert cut.any()
    assert (rollouts.logprob_BT[cut] == 0).all()
    assert (rollouts.logprob_BT[~cut] < 0).all()


def test_ends(llama):
    check_ends(generate(llama, prompts(), SAMPLING, 9, 8), prompts().stop_ids, 24)


def test_a_response_cut_by_the_limit_is_the_beginning_of_the_whole(llama):
    long = tokens(generate(llama, prompts(), SAMPLING, 9, 8))
    short = SamplingConfig(num_samples=4, max_tokens=5, temperature=0.8)
    cut = generate(llama, prompts(), short, 9, 8)
    assert tokens(cut) == [row[:5] for row in long]
    assert not cut.finished_B.all()
    for row, done in zip(tokens(cut), cut.finished_B.tolist(), strict=True):
        assert done == (row[-1] in prompts().stop_ids)
    one = generate(llama, prompts(), SamplingConfig(num_samples=4, max_tokens=1, temperature=0.8), 9, 8)
    assert tokens(one) == [row[:1] for row in long]


def test_an_empty_request(llama):
    none = prompts().select(torch.empty(0, dtype=torch.int64))
    for rollouts in (generate(llama, none, SAMPLING, 9, 8), generate_any(llama, none, SAMPLING, 9, 8)):
        assert len(rollouts) == 0
        assert rollouts.logprob_BT.shape == (0, 0)
        assert rollouts.finished_B.shape == (0,)


@pytest.mark.parametrize("sample", [SAMPLING, SamplingConfig(num_samples=2, max_tokens=15, temperature=1.3, top_k=9)])
def test_transformers_path_draws_the_same_tokens(sample):
    ours = Decoder(build(CONFIGS["llama"]), 6).generate(prompts(), sample, 9)
    theirs = generate_any(build(CONFIGS["llama"], "sdpa"), prompts(), sample, 9, 5)
    assert tokens(ours) == tokens(theirs)
    assert ours.finished_B.tolist() == theirs.finished_B.tolist()
    torch.testing.assert_close(ours.logprob_BT, theirs.logprob_BT, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.untempered_logprob_BT, theirs.untempered_logprob_BT, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [GPT2, NEOX], ids=["gpt2", "gpt_neox"])
def test_another_architecture(config):
    model = build(config)
    assert not is_plain(model.config)
    greedy = SamplingConfig(max_tokens=15, temperature=0.0)
    assert tokens(generate(model, prompts(), greedy, 0, 8)) == by_transformers(build(config), prompts(), 15)
    rollouts = generate(model, prompts(), SAMPLING, 9, 8)
    check_ends(rollouts, prompts().stop_ids, 24)
    check_logprobs(model, rollouts, 0.8)
    part = generate(model, prompts().select(torch.tensor([5, 1])), SAMPLING, 9, 8)
    table = tokens(rollouts)
    assert tokens(part) == table[20:24] + table[4:8]


@pytest.mark.parametrize("config", [GPT2, CONFIGS["llama"]], ids=["gpt2", "llama"])
def test_habits_of_the_generation_config_are_not_taken_over(config):
    # A checkpoint's own sampling settings would part the sampled distribution from the one that is trained.
    asked, plain, model = prompts(), build(config), build(config)
    model.generation_config.update(
        repetition_penalty=3.0, min_new_tokens=9, suppress_tokens=[5, 6], no_repeat_ngram_size=1, temperature=0.1
    )
    ours = generate(model, asked, SAMPLING, 9, 8)
    assert tokens(ours) == tokens(generate(plain, asked, SAMPLING, 9, 8))
    check_logprobs(model, ours, 0.8)
    assert model.generation_config.repetition_penalty == 3.0


@pytest.mark.parametrize("config", [GPT2, CONFIGS["llama"]], ids=["gpt2", "llama"])
def test_ids_that_the_tokenizer_lacks_are_never_sampled(config):
    model, lacking = build(config), [8, 9, *range(40, 60)]
    restrict(model, TokenizerIds(40, gaps=(8, 9)))
    greedy = tokens(generate(model, prompts(), SamplingConfig(max_tokens=15, temperature=0.0), 0, 8))
    assert greedy == by_transformers(build(config), prompts(), 15, suppress_tokens=lacking)
    for sample in (
        SAMPLING,
        SamplingConfig(num_samples=4, max_tokens=24, temperature=3.0, top_p=0.95, min_p=1e-3, top_k=50),
    ):
        rollouts = generate(model, prompts(), sample, 9, 8)
        assert not set(rollouts.sequences.responses.ids_N.tolist()) & set(lacking)
        check_logprobs(model, rollouts, sample.temperature)
    assert set(generate(build(config), prompts(), sample, 9, 8).sequences.responses.ids_N.tolist()) & set(lacking)


def test_a_sliding_window_goes_through_transformers():
    config = MistralConfig(**SIZES, sliding_window=8)
    model = build(config, "sdpa")
    assert not is_plain(model.config)
    ours = generate(model, prompts(), SamplingConfig(max_tokens=15, temperature=0.0), 0, 8)
    assert tokens(ours) == by_transformers(build(config, "sdpa"), prompts(), 15)


def test_first_tokens_are_distributed_as_the_model_says(llama):
    K = 4000
    asked = prompts([6], stop_ids=(2,))
    sample = SamplingConfig(num_samples=K, max_tokens=1, temperature=1.5)
    rollouts = generate(llama, asked, sample, 123, num_slots=512)
    counts = torch.bincount(rollouts.sequences.responses.ids_N, minlength=60).double()
    rows = Sequences(asked.tokens, Packed.from_lists([[v] for v in range(60)]), torch.zeros(60, dtype=torch.int64))
    with torch.no_grad():
        probability = TokenLogprobs(llama)(collate.packed(rows), temperature=1.5)["logprob_BT"][:, 0].exp().double()
    assert float(probability.sum()) == pytest.approx(1.0, abs=1e-5)
    often = probability * K >= 5
    observed = torch.cat([counts[often], counts[~often].sum()[None]])
    expected = K * torch.cat([probability[often], probability[~often].sum()[None]])
    chi_square = float(((observed - expected) ** 2 / expected).sum())
    freedom = len(expected) - 1
    assert freedom >= 10
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5  # 4 sigma; the seed is fixed


def test_second_tokens_follow_the_first(llama):
    # The two-token law p(a) p(b | a) rather than one draw used twice.
    asked = prompts([6], stop_ids=(2,))
    rollouts = generate(llama, asked, SamplingConfig(num_samples=4000, max_tokens=2, temperature=1.5), 77, 1024)
    pair = rollouts.sequences.responses.padded(-1)
    first = int(pair[:, 0].mode().values)
    while first in asked.stop_ids:
        first = int(pair[:, 0][pair[:, 0] != first].mode().values)
    follow = pair[pair[:, 0] == first][:, 1]
    rows = Sequences(
        asked.tokens, Packed.from_lists([[first, v] for v in range(60)]), torch.zeros(60, dtype=torch.int64)
    )
    with torch.no_grad():
        probability = TokenLogprobs(llama)(collate.packed(rows), temperature=1.5)["logprob_BT"][:, 1].exp().double()
    n, counts = len(follow), torch.bincount(follow, minlength=60).double()
    often = probability * n >= 5
    observed = torch.cat([counts[often], counts[~often].sum()[None]])
    expected = n * torch.cat([probability[often], probability[~often].sum()[None]])
    chi_square, freedom = float(((observed - expected) ** 2 / expected).sum()), len(expected) - 1
    assert n > 200
    assert freedom >= 5
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5
