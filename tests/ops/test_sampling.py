"""Noise against SplitMix64 on Python integers, filters against transformers, draws by hand and by frequency."""

from __future__ import annotations

import math
import random

import pytest
import torch
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from align.ops import sampling

WORD = 2**64
GOLDEN = 0x9E3779B97F4A7C15
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
INF = math.inf


def mix(z: int) -> int:
    """The finalizer of SplitMix64 as published, on a word in [0, 2^64)."""
    z = (z ^ (z >> 30)) * MIX_1 % WORD
    z = (z ^ (z >> 27)) * MIX_2 % WORD
    return z ^ (z >> 31)


def unmix(z: int) -> int:
    """The inverse of `mix`."""
    z ^= (z >> 31) ^ (z >> 62)
    z = z * pow(MIX_2, -1, WORD) % WORD
    z ^= (z >> 27) ^ (z >> 54)
    z = z * pow(MIX_1, -1, WORD) % WORD
    return z ^ (z >> 30) ^ (z >> 60)


def hashed(*words: int) -> int:
    state = 0
    for word in words:
        state = mix(((state ^ (word % WORD)) + GOLDEN) % WORD)
    return state


def reference_uniform(*words: int) -> float:
    return ((hashed(*words) >> 12) + 0.5) / 2**52


def signed(word: int) -> int:
    return word - WORD if word >= WORD // 2 else word


def uniform(seed: int, step: int, triples: list[tuple[int, int, int]]) -> list[float]:
    prompt, sample, token = torch.tensor(triples).T
    return sampling.uniform(seed, step, prompt, sample, token).tolist()


def test_the_finalizer_is_splitmix64():
    # First output of SplitMix64 with seed 0 (state 0 + golden gamma), as published with the reference code.
    assert mix(GOLDEN) == 0xE220A8397B1DCDAF
    assert unmix(mix(123456789)) == 123456789


@pytest.mark.parametrize("seed", [0, 1, -1, 42, 2**31, 2**63 - 1, 2**63, -(2**63), 2**64 - 1, 2**64 + 5, -(10**30)])
def test_noise_against_python_integers(seed: int):
    triples = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (63, 7, 1023), (2**40, 2**33, 2**20)]
    for step in (0, 1, 999, 2**62):
        expected = [reference_uniform(seed, step, *triple) for triple in triples]
        assert uniform(seed, step, triples) == expected


def test_noise_is_pinned():
    # A run that is resumed by a later version must draw the same numbers.
    assert uniform(0, 1, [(0, 0, 0), (3, 2, 1)]) == [0.9752873302169826, 0.6252889658281459]


@pytest.mark.parametrize(("word", "u"), [(0, 2.0**-53), (WORD - 1, 1 - 2.0**-53)])
def test_the_interval_is_open(word: int, u: float):
    # The token number that makes the hash end in all zeros or all ones.
    token = signed(((unmix(word) - GOLDEN) % WORD) ^ hashed(5, 1, 2, 3))
    assert hashed(5, 1, 2, 3, token % WORD) == word
    assert uniform(5, 1, [(2, 3, token)]) == [u]


def test_the_five_words_are_not_interchangeable():
    names = [(1, 0, 0, 0, 0), (0, 1, 0, 0, 0), (0, 0, 1, 0, 0), (0, 0, 0, 1, 0), (0, 0, 0, 0, 1), (0, 0, 0, 0, 0)]
    assert len({uniform(seed, step, [(p, k, t)])[0] for seed, step, p, k, t in names}) == 6


def test_noise_does_not_depend_on_what_else_is_in_the_batch():
    triples = [(p, k, t) for p in range(5) for k in range(3) for t in range(4)]
    alone = [uniform(7, 3, [triple])[0] for triple in triples]
    shuffled = list(range(len(triples)))
    random.Random(0).shuffle(shuffled)
    together = uniform(7, 3, [triples[i] for i in shuffled])
    assert together == [alone[i] for i in shuffled]


def chi_square(counts: torch.Tensor, probability: torch.Tensor) -> float:
    expected = counts.sum() * probability
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("axis", range(3))
def test_noise_is_uniform_along_each_counter(axis: int):
    n = 20_000
    columns = [torch.full((n,), 3) for _ in range(3)]
    columns[axis] = torch.arange(n)
    u = sampling.uniform(11, 2, *columns)
    counts = torch.histc(u, bins=100, min=0, max=1)
    # 99 degrees of freedom: mean 99, standard deviation 14; 160 has probability 1e-4.
    assert chi_square(counts, torch.full((100,), 0.01)) < 160
    # Neighbours are independent: pairs over a 10 x 10 grid.
    cells = (u[:-1] * 10).long() * 10 + (u[1:] * 10).long()
    assert chi_square(cells.bincount(minlength=100).double(), torch.full((100,), 0.01, dtype=torch.float64)) < 160


def test_one_flipped_bit_changes_half_of_the_hash():
    # The top 52 bits of the hash, compared between token numbers that differ in one bit.
    flips = []
    for bit in range(40):
        a, b = uniform(0, 1, [(0, 0, 12345), (0, 0, 12345 ^ (1 << bit))])
        flips.append((int(a * 2**52) ^ int(b * 2**52)).bit_count())
    assert 23 < sum(flips) / len(flips) < 29
    assert min(flips) > 8


# Filters

LOGITS = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
"""Probabilities 50, 25, 15 and 10 %."""


def filtered(logits: torch.Tensor, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """Logits, those without mass -inf."""
    mass = sampling.filter_(sampling.mass_(logits.clone()), top_k, top_p, min_p)
    return logits.masked_fill(mass == 0, -INF)


def kept(logits: torch.Tensor) -> list[list[int]]:
    return [row.isfinite().nonzero().flatten().tolist() for row in logits]


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p", "survivors"),
    [
        (0, 1.0, 0.0, [0, 1, 2, 3]),
        (1, 1.0, 0.0, [0]),
        (3, 1.0, 0.0, [0, 1, 2]),
        (4, 1.0, 0.0, [0, 1, 2, 3]),
        (9, 1.0, 0.0, [0, 1, 2, 3]),
        (0, 0.0, 0.0, [0]),
        (0, 0.01, 0.0, [0]),  # the most likely token always stays
        (0, 0.45, 0.0, [0]),
        (0, 0.55, 0.0, [0, 1]),  # 50 % does not reach 55 %
        (0, 0.76, 0.0, [0, 1, 2]),
        (0, 0.95, 0.0, [0, 1, 2, 3]),
        (0, 1.0, 0.25, [0, 1, 2]),  # at least 12.5 %
        (0, 1.0, 0.4, [0, 1]),
        (0, 1.0, 1.0, [0]),
        (2, 0.7, 0.0, [0, 1]),  # after top-k 67 % and 33 %: 67 % does not reach 70 %; over all tokens 50 + 25 % would
        (2, 0.6, 0.0, [0]),  # 67 % reaches 60 %; over all tokens 50 % would not
    ],
)
def test_filters_by_hand(top_k: int, top_p: float, min_p: float, survivors: list[int]):
    assert kept(filtered(LOGITS, top_k, top_p, min_p)) == [survivors]
    mass = sampling.mass_(LOGITS.clone())
    left = sampling.filter_(mass.clone(), top_k, top_p, min_p)
    assert left[0, survivors].equal(mass[0, survivors])  # those that stay are not changed


@pytest.mark.parametrize(("top_p", "number"), [(0.25, 1), (0.5, 2), (0.75, 3), (0.7500001, 4)])
def test_top_p_stops_where_the_mass_is_reached_exactly(top_p: float, number: int):
    assert kept(filtered(torch.zeros(1, 4), 0, top_p, 0.0)) == [list(range(number))]  # 25 % each, exactly


def test_top_k_larger_than_the_vocabulary_and_equal_logits():
    tied = torch.tensor([[1.0, 3.0, 1.0, 1.0]])
    assert kept(filtered(tied, 2, 1.0, 0.0)) == [[0, 1, 2, 3]]  # ties at the border of top-k all stay
    # 71 % for token 1 and 9.6 % for each other: 80.7 % with token 0 reaches 80 %. Ties go by token id.
    assert kept(filtered(tied, 0, 0.8, 0.0)) == [[0, 1]]


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(5, 1.0, 0.0), (0, 0.7, 0.0), (0, 1.0, 0.1), (20, 0.9, 0.0), (20, 0.9, 0.05), (3, 0.3, 0.9), (50, 0.99, 0.001)],
)
def test_filters_against_transformers(top_k: int, top_p: float, min_p: float):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 50, generator=generator) * 3
    expected = logits
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    if min_p:
        expected = MinPLogitsWarper(min_p)(None, expected)
    left = filtered(logits, top_k, top_p, min_p)
    assert left.equal(expected)
    assert (left == -INF).any()
    assert not left.isnan().any()


# Draws


def draw_from(logits: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    mass = sampling.mass_(logits.clone())
    return sampling.draw(mass, sampling._block_sums(mass), u)


def draw(probability: list[float], *uniforms: float) -> list[int]:
    logits = torch.tensor([probability]).log().expand(len(uniforms), -1)
    return draw_from(logits, torch.tensor(uniforms, dtype=torch.float64)).tolist()


def test_inverse_of_the_cumulative_distribution_by_hand():
    # Borders at 0.25, 0.5 and 0.75, each of which belongs to the token after it.
    logits = torch.zeros(7, 4)
    u = torch.tensor([0.1, 0.25, 0.3, 0.5, 0.74, 0.75, 0.9], dtype=torch.float64)
    assert draw_from(logits, u).tolist() == [0, 1, 1, 2, 2, 3, 3]
    assert draw([0.1, 0.6, 0.3], 0.05, 0.15, 0.65, 0.75, 0.95) == [0, 1, 1, 2, 2]


TINY = 2.0**-53


@pytest.mark.parametrize(
    ("probability", "first", "last"),
    [
        ([0.25, 0.25, 0.25, 0.25], 0, 3),
        ([0.0, 0.5, 0.0, 0.5, 0.0], 1, 3),  # the ends have no probability
        ([0.0, 0.0, 1.0, 0.0], 2, 2),
        ([1 / 3, 1 / 3, 1 / 3, 0.0], 0, 2),  # sums to 1 only up to rounding
        ([0.1] * 10 + [0.0], 0, 9),
    ],
)
def test_both_ends_of_the_unit_interval(probability: list[float], first: int, last: int):
    assert draw(probability, TINY, 0.0) == [first, first]
    assert draw(probability, 1 - TINY, 1.0) == [last, last]


def test_a_token_without_probability_is_never_drawn():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2000, 30, generator=generator)
    logits[torch.rand(2000, 30, generator=generator) < 0.6] = -INF
    logits[:, 17] = 0.0  # at least one token in each row
    for u in (torch.rand(2000, generator=generator, dtype=torch.float64), torch.full((2000,), 1 - TINY).double()):
        ids = draw_from(logits, u)
        assert logits.gather(1, ids[:, None]).isfinite().all()


def test_draw_against_a_loop():
    generator = torch.Generator().manual_seed(2)
    logits, u = torch.randn(300, 9, generator=generator) * 2, torch.rand(300, generator=generator, dtype=torch.float64)
    for row, x, drawn in zip(logits.double(), u.tolist(), draw_from(logits, u).tolist(), strict=True):
        weights = [math.exp(z) for z in row.tolist()]
        sums = [sum(weights[: token + 1]) / sum(weights) for token in range(9)]
        assert drawn == next(token for token in range(9) if sums[token] > x)


@pytest.mark.parametrize("V", [511, 512, 513, 5000])
def test_draws_from_several_blocks_against_one_float64_sum(V: int):
    generator = torch.Generator().manual_seed(V)
    logits, u = torch.randn(200, V, generator=generator) * 3, torch.rand(200, generator=generator, dtype=torch.float64)
    logits[:, V // 3 : V // 2] = -INF  # whole blocks without mass
    cumulative = logits.double().softmax(-1).cumsum(-1)
    expected = torch.searchsorted(cumulative, u[:, None] * cumulative[:, -1:], right=True).squeeze(1)
    ids = draw_from(logits, u)
    assert (ids != expected).sum() <= 1  # a border that lies within the rounding of float32
    ends = torch.tensor([0.0, TINY, 1 - TINY, 1.0], dtype=torch.float64)
    lone = torch.full((4, V), -INF)
    lone[:, V // 5] = lone[:, V // 2 + 1] = 0.0
    assert draw_from(lone, ends).tolist() == [V // 5, V // 5, V // 2 + 1, V // 2 + 1]


@pytest.mark.parametrize(("spread", "top_p"), [(5.0, 0.9), (0.5, 0.3), (0.1, 0.8), (0.0, 0.5)])
def test_top_p_of_a_large_vocabulary_against_transformers(spread: float, top_p: float):
    """Sharp rows need few candidates, flat ones more than `sampling.CANDIDATES`; of equal ones the ids decide."""
    logits = torch.randn(6, 4096, generator=torch.Generator().manual_seed(8)) * spread
    left = filtered(logits, 0, top_p, 0.0)
    if spread:
        assert left.equal(TopPLogitsWarper(top_p)(None, logits))
    else:
        assert kept(left) == [list(range(2048))] * 6
    assert bool((left != -INF).sum(1).max() > sampling.CANDIDATES) == (spread < 0.5)
    mixed = torch.cat([logits, torch.randn(3, 4096) * 8])
    assert filtered(mixed, 0, top_p, 0.0)[:6].equal(left)  # whatever the other rows need


def test_rows_of_a_large_vocabulary_do_not_see_each_other():
    generator = torch.Generator().manual_seed(9)
    logits, u = torch.randn(12, 5003, generator=generator), torch.rand(12, generator=generator, dtype=torch.float64)
    for filters in ((0, 1.0, 0.0), (300, 0.95, 0.0), (0, 0.5, 0.001)):
        whole = sampling.sample(logits.clone(), u, 0.8, *filters)
        for i in range(12):
            alone = sampling.sample(logits[i : i + 1].clone(), u[i : i + 1], 0.8, *filters)
            assert all(a.equal(b[i : i + 1]) for a, b in zip(alone, whole, strict=True))
        wider = torch.cat([logits, torch.full((12, 700), 9.0)], 1)[:, :5003]  # ids that the tokenizer lacks
        assert sampling.sample(wider, u, 0.8, *filters)[0].equal(whole[0])


def test_log_probabilities_against_log_softmax_in_float64():
    generator = torch.Generator().manual_seed(10)
    logits, u = torch.randn(64, 5003, generator=generator) * 4, torch.rand(64, generator=generator, dtype=torch.float64)
    ids, logprob, untempered = sampling.sample(logits.clone(), u, 0.7, 0, 1.0, 0.0)
    for ours, scale in ((logprob, 0.7), (untempered, 1.0)):
        exact = (logits.double() / scale).log_softmax(-1).gather(1, ids[:, None]).squeeze(1)
        assert float((ours - exact).abs().max()) < 4e-6


def test_frequencies():
    n = 40_000
    probability = torch.tensor([0.5, 0.2, 0.0, 0.15, 0.1, 0.05])
    u = sampling.uniform(0, 1, torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.int64), torch.arange(n))
    ids, _, _ = sampling.sample(probability.log().repeat(n, 1), u, 1.0, 0, 1.0, 0.0)
    counts = ids.bincount(minlength=6).double()
    assert counts[2] == 0
    seen = [0, 1, 3, 4, 5]
    assert chi_square(counts[seen], probability[seen].double()) < 23.5  # 4 degrees of freedom: probability 1e-4


def test_sample_reports_logprobs_before_the_filters_at_both_temperatures():
    # Odds 4 : 2 : 1 at temperature 1, 16 : 4 : 1 at temperature 1/2. Top-k leaves tokens 0 and 1 with odds 4 : 1, so
    # u = 0.79 and 0.81 lie on both sides of the border.
    logits = torch.tensor([[4.0, 2.0, 1.0]]).log().expand(2, -1)
    ids, logprob, untempered = sampling.sample(
        logits.clone(), torch.tensor([0.79, 0.81], dtype=torch.float64), 0.5, 2, 1.0, 0.0
    )
    assert ids.tolist() == [0, 1]
    torch.testing.assert_close(logprob, torch.tensor([16 / 21, 4 / 21]).log())
    torch.testing.assert_close(untempered, torch.tensor([4 / 7, 2 / 7]).log())
    assert logprob.dtype == untempered.dtype == torch.float32


def test_at_temperature_one_both_logprobs_are_the_same():
    logits = torch.tensor([[3.0, 1.0]]).log()
    ids, logprob, untempered = sampling.sample(
        logits.clone(), torch.tensor([0.8], dtype=torch.float64), 1.0, 0, 1.0, 0.0
    )
    assert ids.tolist() == [1]
    assert logprob.equal(untempered)
    assert logprob.item() == pytest.approx(math.log(0.25), abs=1e-6)


@pytest.mark.parametrize("u", [0.001, 0.999])
def test_greedy_takes_the_most_likely_token_at_any_noise(u: float):
    logits = torch.tensor([[1.0, 2.0, 5.0], [5.0, 2.0, 1.0], [2.0, 2.0, 1.0]]).log()
    ids, logprob, untempered = sampling.sample(logits.clone(), torch.full((3,), u), 0.0, 1, 0.1, 0.9)
    assert ids.tolist() == [2, 0, 0]  # the first of two equals
    torch.testing.assert_close(logprob, torch.tensor([5 / 8, 5 / 8, 2 / 5]).log())  # those of the model itself
    assert untempered.equal(logprob)


def test_bfloat16_logits_are_sampled_in_float32():
    generator = torch.Generator().manual_seed(3)
    logits = (torch.randn(20, 40, generator=generator) * 3).bfloat16()
    u = torch.rand(20, generator=generator, dtype=torch.float64)
    low, high = (
        sampling.sample(logits.clone(), u, 0.7, 10, 0.9, 0.0),
        sampling.sample(logits.float().clone(), u, 0.7, 10, 0.9, 0.0),
    )
    assert all(a.equal(b) for a, b in zip(low, high, strict=True))


def test_rows_do_not_see_each_other():
    generator = torch.Generator().manual_seed(4)
    logits, u = torch.randn(12, 33, generator=generator), torch.rand(12, generator=generator, dtype=torch.float64)
    ids, _, _ = sampling.sample(logits.clone(), u, 0.8, 20, 0.95, 0.01)
    order = torch.randperm(12, generator=generator)
    moved, _, _ = sampling.sample(logits[order], u[order], 0.8, 20, 0.95, 0.01)
    assert moved.equal(ids[order])
    assert [
        sampling.sample(logits[i : i + 1], u[i : i + 1], 0.8, 20, 0.95, 0.01)[0].item() for i in range(12)
    ] == ids.tolist()
