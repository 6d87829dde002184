"""Faults seen in public systems (reference/algorithms.md, section 7), each put in on purpose.

A trap is a check that holds for this code and a fault under which it must not hold, so that no check can be one that
never fails. Faults that cannot be put into this code without rewriting it are replaced by what would commit them.
"""

from __future__ import annotations

import ast
import functools
import importlib
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from align import ops
from align.algorithms import _policy_loss, _rewards, _rollout, rloo
from align.config import CheckpointRewardConfig, OptimizerConfig, PolicyConfig, PolicyLossConfig, SamplingConfig
from align.data import chat, collate, toy
from align.data.chat import Message, Renderer
from align.engines import decoder, decoder_engine, distributed, requests
from align.engines import deepspeed as engine_module
from align.engines.deepspeed import Engine
from align.errors import DataError
from align.models import heads
from align.models.heads import LastTokenScore, TokenLogprobs, TokenValues
from align.roles import CompletedFuture, Loss
from align.types import Batch, Packed, Prompts, Rollouts, Sequences
from align.workers import base
from align.workers.policy import PolicyWorker
from align.workers.reward import RankScores, Reward

ALIGN = Path(base.__file__).parents[1]
Patch = pytest.MonkeyPatch
Check = Callable[[], None]
Fault = Callable[[Patch], None]
LAST = 1  # the id that ends a response in these tests


@pytest.fixture(autouse=True, scope="module")
def alone():
    distributed.initialize_alone()


def assert_caught(check: Check, fault: Fault) -> None:
    """The check holds; with the fault it does not; and the fault is gone afterwards."""
    check()
    with Patch.context() as patch:
        fault(patch)
        with pytest.raises(AssertionError):
            check()
    check()


def llama(auto: Any = AutoModelForCausalLM, attention: str = "packed", **changes: Any) -> Any:
    """A tiny random Llama, always the same."""
    torch.manual_seed(5)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    fields = {**sizes, "vocab_size": 40, "num_hidden_layers": 2, "initializer_range": 0.2, "eos_token_id": LAST}
    return auto.from_config(LlamaConfig(**{**fields, **changes}), attn_implementation=attention).eval()


def policy_section(**changes: Any) -> PolicyConfig:
    fields = {
        "path": "unused",
        "dtype": "float32",
        "zero_stage": 0,
        "optimizer": OptimizerConfig(lr=0.0, max_grad_norm=0.0),
    }
    return PolicyConfig(**{**fields, **changes})


def engine_of(head: Any, **changes: Any) -> Engine:
    return Engine(head, policy_section(**changes), torch.device("cpu"), total_steps=10)


def random_rows(prompts: list[int], responses: list[list[int]]) -> Sequences:
    """Random ids above those that are special here: lengths of prompts, and of the responses to each."""
    source = torch.Generator().manual_seed(0)
    row = lambda length: torch.randint(5, 40, (length,), generator=source).tolist()  # noqa: E731
    return Sequences(
        Packed.from_lists([row(length) for length in prompts]),
        Packed.from_lists([row(length) for lengths in responses for length in lengths]),
        torch.tensor([i for i, lengths in enumerate(responses) for _ in lengths]),
    )


ROWS = random_rows([3, 6, 2, 4], [[4, 2, 7], [1, 5, 3], [6, 2, 2], [3, 3, 8]])


def rollouts_of(sequences: Sequences) -> Rollouts:
    noise_BT = torch.randn(sequences.mask_BT.shape, generator=torch.Generator().manual_seed(1))
    logprob_BT = torch.where(sequences.mask_BT, noise_BT - 2, 0.0)
    return Rollouts(sequences, logprob_BT, logprob_BT, torch.ones(len(sequences), dtype=torch.bool), 1.0, step=1)


def seen_of(rollouts: Rollouts, score_B: Tensor, reference_BT: Tensor | None = None) -> _rollout.ScoredRollouts:
    reference_BT = rollouts.logprob_BT if reference_BT is None else reference_BT
    return _rollout.ScoredRollouts(rollouts, score_B, None, reference_BT, rollouts.logprob_BT)


def recipe(K: int = 3, **changes: Any) -> rloo.Config:
    return rloo.Config(
        reward=CheckpointRewardConfig(path="r"), sampling=SamplingConfig(num_samples=K, max_tokens=8), **changes
    )


# value at t computed after token t


@torch.no_grad()
def value_comes_before_its_token() -> None:
    scorer = llama(AutoModelForSequenceClassification, "sdpa", num_labels=1)
    ids = [7, 8, 9, 10, 11]
    values = []
    for token in (9, 20):
        rows = Sequences(
            Packed.from_lists([[5, 6]]), Packed.from_lists([[*ids[:2], token, *ids[3:]]]), torch.tensor([0])
        )
        values.append(TokenValues(scorer)(collate.padded(rows))["value_BT"][0])
    changed = [bool((a - b).abs() > 1e-5) for a, b in zip(*values, strict=True)]
    assert changed == [False, False, False, True, True]  # token 2 was changed


def read_after_the_token(patch: Patch) -> None:
    def forward(self: TokenValues, layout: collate.Layout) -> dict[str, Tensor]:
        value_N = self.model.score(heads._hidden(self.model, layout)[layout.predicting_N + 1]).squeeze(-1)
        return {"value_BT": ops.logprobs.to_padded(value_N, layout.mask_BT)}

    patch.setattr(TokenValues, "forward", forward)


def gae_reads_the_next_state() -> None:
    # r = 0 1, V = 2 3: delta_1 = 1 - 3 = -2, delta_0 = 0 + 3 - 2 = 1, A_0 = 1 + 0.5 (-2) = 0; returns A + V.
    mask_BT = torch.ones(1, 2, dtype=torch.bool)
    gae = ops.advantages.gae(torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0, 3.0]]), mask_BT, 1.0, 0.5)
    assert [x_BT.tolist() for x_BT in gae] == [[[0.0, -2.0]], [[2.0, 1.0]]]


def gae_on_values_shifted_by_one(patch: Patch) -> None:
    right = ops.advantages.gae
    shifted = lambda reward_BT, value_BT, *rest: right(reward_BT, value_BT.roll(-1, 1), *rest)  # noqa: E731
    patch.setattr(ops.advantages, "gae", shifted)


# leave-one-out divided by K instead of K - 1


def the_baseline_is_the_mean_of_the_others() -> None:
    score_B = torch.tensor([1.0, 2.0, 6.0])
    rollouts = rollouts_of(random_rows([3], [[2, 4, 3]]))
    config = recipe(kl_coef=0.0)
    batch, _ = rloo.make_batch(config, seen := seen_of(rollouts, score_B), _rewards.shape_rewards(config, seen, {}))
    assert batch.columns["advantage_BT"][:, 0].tolist() == [1 - 4, 2 - 3.5, 6 - 1.5]


def divided_by_K(patch: Patch) -> None:
    def leave_one_out(reward_PK: Tensor, usable_PK: Tensor) -> tuple[Tensor, Tensor]:
        others_PK = reward_PK.sum(1, keepdim=True) - reward_PK
        return reward_PK - others_PK / reward_PK.shape[1], usable_PK

    patch.setattr(ops.advantages, "leave_one_out", leave_one_out)


# each rank trains on the whole batch; ranks get unequal work


class Asked(base.WorkerGroup):
    """Ranks that note what they are asked and answer for all with what a function of the arguments gives."""

    def __init__(self, world_size: int, answer: Callable[..., Any]):
        self.world_size, self.answer = world_size, answer
        self.arguments: list[tuple[Any, ...]] = []

    def call(self, phase: str, method: Any, arguments: Any, gather: Any) -> CompletedFuture[Any]:
        self.arguments = list(arguments)
        return CompletedFuture(gather([self.answer(*own) for own in arguments]))

    def start(self, method: Any, arguments: Any) -> list[Any]:
        raise NotImplementedError


def every_sequence_is_trained_on_once() -> None:
    ranks = Asked(2, lambda batch, loss: {})
    number_B = torch.arange(len(ROWS))
    base.TrainedRole(ranks, policy_section()).update(Batch(ROWS, {"number_B": number_B}, 1, 1.0), lambda: None)
    shares = [batch.columns["number_B"].tolist() for batch, _ in ranks.arguments]
    assert all(shares)
    assert sorted(shares[0] + shares[1]) == number_B.tolist()


def the_whole_batch_for_each(patch: Patch) -> None:
    patch.setattr(collate, "split", lambda sequences, unit, num_ranks: [torch.arange(len(sequences))] * num_ranks)


def summed(logprob_BT: Tensor, mask_BT: Tensor, **_: Tensor) -> Loss:
    return Loss(-torch.where(mask_BT, logprob_BT, 0.0).sum(), mask_BT.sum(), {})


def all_ranks_make_as_many_passes() -> None:
    """The peer, who is not there, has seven micro-batches; a rank that made fewer passes would leave it waiting."""
    head, passes = TokenLogprobs(llama()), []
    head.register_forward_pre_hook(lambda *_: passes.append(1))
    engine = engine_of(head, max_tokens_per_micro_batch=30)
    assert len(collate.micro_batches(ROWS, 1, 30)) < 7
    gathered = dist.all_reduce

    def with_peer(tensor: Tensor, op: Any = dist.ReduceOp.SUM, **rest: Any) -> Any:
        return tensor.clamp_(min=7) if op == dist.ReduceOp.MAX else gathered(tensor, op=op, **rest)

    with Patch.context() as patch:
        patch.setattr(engine_module.dist, "all_reduce", with_peer)
        engine.update(Batch(ROWS, {}, 1, 1.0), summed, temperature=1.0)
    assert len(passes) == 7


def each_rank_counts_for_itself(patch: Patch) -> None:
    patch.setattr(Engine, "agree", lambda self, number: number)


# NaN at a masked position; every loss and column: tests/engines/test_invariance.py


def what_is_masked_is_not_seen() -> None:
    columns = {name: torch.where(ROWS.mask_BT, 0.5, math.nan) for name in ("advantage_BT", "old_BT", "rollout_BT")}
    loss = _policy_loss.loss(
        logprob_BT=torch.where(ROWS.mask_BT, -1.0, math.nan),
        entropy_BT=torch.where(ROWS.mask_BT, 1.0, math.nan),
        mask_BT=ROWS.mask_BT,
        reference_BT=torch.where(ROWS.mask_BT, -1.5, math.nan),
        learnable_B=torch.ones(len(ROWS), dtype=torch.bool),
        **columns,
        how=PolicyLossConfig(kind="clipped", entropy_coef=0.1),
        kl_coef=0.1,
        estimator="k3",
        max_tokens=8,
    )
    numbers = [loss.sum, *(total for total, _ in loss.metrics.values())]
    assert all(bool(number.isfinite()) for number in numbers)


def masks_that_multiply(patch: Patch) -> None:
    multiplied = lambda values_BT, mask_BT: (values_BT * mask_BT).sum(1)  # noqa: E731
    patch.setattr(ops.policy_losses, "masked_sum", multiplied)


# Sampling


PROMPTS = Prompts(Packed.from_lists([[5, 6, 7], [8], [5, 6, 7], [9, 10]]), torch.arange(4), (LAST,), step=3)
SHORT = SamplingConfig(num_samples=4, max_tokens=12)


def gpt2() -> Any:
    """An architecture with dropout in every layer, that our decoder does not know."""
    torch.manual_seed(5)
    config = GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.5
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def sampled(model: Any) -> Rollouts:
    return decoder.generate(model, PROMPTS, SHORT, seed=2, num_slots=3)


# truncated responses get EOS written over their last token


def a_response_that_is_cut_off_keeps_its_last_token(model: Any) -> None:
    rollouts = sampled(model)
    cut_off = (~rollouts.finished_B).nonzero().squeeze(1).tolist()
    assert 0 < len(cut_off) < len(rollouts)
    engine = engine_of(TokenLogprobs(model))
    again_BT = engine.infer(rollouts.sequences, temperature=1.0)["logprob_BT"]
    for i in cut_off:
        row = rollouts.sequences.responses.row(i).tolist()
        assert len(row) == SHORT.max_tokens
        assert LAST not in row
        assert float(again_BT[i, -1]) == pytest.approx(float(rollouts.logprob_BT[i, -1]), abs=1e-4)
    for i in rollouts.finished_B.nonzero().squeeze(1).tolist():
        assert rollouts.sequences.responses.row(i).tolist().index(LAST) == len(rollouts.sequences.responses.row(i)) - 1


def a_llama_that_is_cut_off_keeps_its_last_token() -> None:
    a_response_that_is_cut_off_keeps_its_last_token(llama())


def a_gpt2_that_is_cut_off_keeps_its_last_token() -> None:
    a_response_that_is_cut_off_keeps_its_last_token(gpt2())


def an_end_written_over_the_last_token(patch: Patch) -> None:
    honest = requests.SampledTokens.rollouts

    def rollouts(self: Any, prompts: Prompts, sample: SamplingConfig) -> Rollouts:
        full_B = self.length_B == sample.max_tokens
        self.ids_BT[full_B, sample.max_tokens - 1] = LAST
        return honest(self, prompts, sample)

    patch.setattr(requests.SampledTokens, "rollouts", rollouts)


def an_end_called_finished(patch: Patch) -> None:
    honest = requests.SampledTokens.rollouts

    def rollouts(self: Any, prompts: Prompts, sample: SamplingConfig) -> Rollouts:
        self.stops_B[:] = 1
        return honest(self, prompts, sample)

    patch.setattr(requests.SampledTokens, "rollouts", rollouts)


# responses are decoded and tokenized again for the reward model


ODD = [[3, 3, 4], [0, 7, 1, 7], [6, 2, 9, 9, 1]]
"""Ids that text does not keep: special tokens in mid-sentence, no end, an end that is not the last."""


def the_reward_model_gets_the_ids_that_were_sampled() -> None:
    rows = Sequences(Packed.from_lists([[5, 6]]), Packed.from_lists(ODD), torch.tensor([0, 0, 0]))
    section = CheckpointRewardConfig(path="unused")
    asked = Asked(2, lambda sequences, *_: RankScores(torch.zeros(len(sequences)), {}))
    cast: Any = type("Cast", (), {})()
    cast.reward, cast.eval_reward = Reward(asked, section), Reward(other := Asked(1, asked.answer), section)
    cast.reference = base_reference = type("Frozen", (), {})()
    base_reference.logprobs = lambda sequences, temperature: CompletedFuture(torch.zeros(sequences.mask_BT.shape))
    cast.policy = type("Actor", (), {"old_logprobs": lambda self, rollouts: CompletedFuture(rollouts.logprob_BT)})()
    _rollout.score_rollouts(cast, rollouts_of(rows))
    for ranks in (asked, other):
        given = [row for (sequences,) in ranks.arguments for row in sequences.responses.lists()]
        assert sorted(given) == sorted(ODD)


def text_in_between(patch: Patch) -> None:
    tokenizer, honest = toy.tokenizer(), Reward.score

    def score(self: Reward, sequences: Sequences) -> Any:
        texts = [tokenizer.decode(row, skip_special_tokens=True) for row in sequences.responses.lists()]
        again = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        return honest(self, Sequences(sequences.prompts, Packed.from_lists(again), sequences.prompt_B))

    patch.setattr(Reward, "score", score)


def an_end_for_the_reward_model(patch: Patch) -> None:
    honest = Reward.score

    def score(self: Reward, sequences: Sequences) -> Any:
        ended = [[*row[:-1], LAST] for row in sequences.responses.lists()]
        return honest(self, Sequences(sequences.prompts, Packed.from_lists(ended), sequences.prompt_B))

    patch.setattr(Reward, "score", score)


# a template that writes today's date; more cases: tests/data/test_chat.py


def a_template_that_asks_for_today_is_refused() -> None:
    tokenizer = toy.tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + str(tokenizer.chat_template)
    refused = False
    try:
        Renderer(tokenizer).prompt_ids([Message("user", "cat")])
    except DataError as error:
        refused = "today's date" in str(error)
    assert refused


def the_clock_left_in_reach(patch: Patch) -> None:
    patch.setattr(chat, "_NO_CLOCK", "")


# duplicate prompts in a batch merge into one baseline group


def equal_prompts_are_two_groups() -> None:
    rows = Sequences(Packed.from_lists([[5, 6], [5, 6]]), Packed.from_lists([[7, 8]] * 4), torch.tensor([0, 0, 1, 1]))
    config = recipe(K=2, kl_coef=0.0)
    seen = seen_of(rollouts_of(rows), torch.tensor([1.0, 2.0, 10.0, 30.0]))
    batch, _ = rloo.make_batch(config, seen, _rewards.shape_rewards(config, seen, {}))
    assert batch.columns["advantage_BT"][:, 0].tolist() == [-1, 1, -20, 20]


def groups_by_text(patch: Patch) -> None:
    honest = ops.advantages.leave_one_out

    def merged(reward_PK: Tensor, usable_PK: Tensor) -> tuple[Tensor, Tensor]:
        one = honest(reward_PK.view(1, -1), usable_PK.view(1, -1))
        return one[0].view_as(reward_PK), one[1].view_as(usable_PK)

    patch.setattr(ops.advantages, "leave_one_out", merged)


def equal_prompts_get_responses_of_their_own() -> None:
    responses = sampled(llama()).sequences.responses.lists()
    assert PROMPTS.tokens.lists()[0] == PROMPTS.tokens.lists()[2]
    assert responses[0:4] != responses[8:12]


def noise_by_text(patch: Patch) -> None:
    honest = requests.SamplingRequest.noise

    def noise(self: Any, sequence_B: Tensor) -> Tensor:
        K = self.sampling.num_samples
        return honest(self, torch.where(sequence_B // K == 2, sequence_B - 2 * K, sequence_B))

    patch.setattr(requests.SamplingRequest, "noise", noise)


# logged losses are 1/M of the truth under accumulation; the same number feeds the KL controller


def logged_losses_do_not_depend_on_micro_batches() -> None:
    logged = []
    for tokens in (10**6, 20, 1):
        engine = engine_of(TokenLogprobs(llama()), max_tokens_per_micro_batch=tokens)
        logged.append(engine.update(Batch(ROWS, {}, 1, 1.0), summed, temperature=1.0)["loss"])
    assert logged == pytest.approx([logged[0]] * 3, rel=1e-5)
    assert logged[0] > 1


def a_mean_over_micro_batches(patch: Patch) -> None:
    rounds, agree, summed_up = [1], Engine.agree, Engine._sum

    def noted(self: Engine, number: int) -> int:
        rounds[0] = agree(self, number)
        return rounds[0]

    def divided(self: Engine, values: Tensor) -> Tensor:
        return summed_up(self, values / torch.tensor([rounds[0], 1.0]) if values.ndim == 2 else values)

    patch.setattr(Engine, "agree", noted)
    patch.setattr(Engine, "_sum", divided)


def the_controller_does_not_see_micro_batches() -> None:
    rollouts, coefficients, kls = rollouts_of(ROWS), [], []
    for tokens in (10**6, 20, 1):
        reference = engine_of(TokenLogprobs(llama()), max_tokens_per_micro_batch=tokens)
        reference_BT = reference.infer(ROWS, temperature=1.0)["logprob_BT"]
        kls.append(float(torch.where(ROWS.mask_BT, rollouts.logprob_BT - reference_BT, 0.0).sum()) / len(ROWS))
        config = recipe(kl_coef=0.5, kl_target=kls[0] / 1.1, kl_horizon=120, prompts_per_step=4)
        state: dict[str, float] = {}
        _rewards.shape_rewards(config, seen_of(rollouts, torch.zeros(len(ROWS)), reference_BT), state)
        coefficients.append(state["kl_coef"])
    assert kls[0] > 1
    # Ziegler et al.: c (1 + (kl / target - 1) n / horizon) for n = 12 responses
    assert coefficients == pytest.approx([0.5 * (1 + 0.1 * 12 / 120)] * 3, rel=1e-6)


def a_share_for_the_controller(patch: Patch) -> None:
    honest = ops.kl.adapted
    patch.setattr(ops.kl, "adapted", lambda coefficient, kl, *rest: honest(coefficient, kl / 2, *rest))


# dropout is on while sampling


def sampling_is_without_dropout(folder: Path) -> None:
    """After an update too, and for an architecture that samples through transformers."""
    section = policy_section(path=str(folder), dropout=0.5, optimizer=OptimizerConfig(lr=0.0))
    worker = PolicyWorker(base.WorkerSpec("policy", 0, 1, section, seed=0, total_steps=5, timeout_s=60.0))
    worker.start_alone()
    rates = {name: rate for name, rate in vars(worker.model.config).items() if name.endswith(("dropout", "_pdrop"))}
    assert rates and set(rates.values()) == {0.5}
    prompts = Prompts(Packed.from_lists([[5, 6, 7], [8, 9]]), torch.arange(2), (LAST,), step=1)
    for _ in range(2):
        rollouts = worker.generate(prompts, SamplingConfig(num_samples=2, max_tokens=5)).value
        again_BT = worker.logprobs(rollouts.sequences, 1.0).value
        assert float((again_BT - rollouts.logprob_BT).abs().max()) < 1e-4
        worker.update(rollouts.batch(), summed)


def left_in_training(patch: Patch) -> None:
    honest = decoder.generate_by

    def generate_by(loop: Any, model: Any, *arguments: Any) -> Rollouts:
        return honest(loop, model.train(), *arguments)

    patch.setattr(decoder_engine, "generate_by", generate_by)


# bf16 is on by default on CPU


def the_dtype_is_that_of_the_recipe() -> None:
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        head = TokenLogprobs(llama().to(dtype))
        engine_of(head, dtype=name, zero_stage=1)
        assert {p.dtype for p in head.parameters()} == {dtype}


def bf16_by_surprise(patch: Patch) -> None:
    honest = engine_module._configuration
    patch.setattr(engine_module, "_configuration", lambda *given: {**honest(*given), "bf16": {"enabled": True}})


# HF Trainer with DeepSpeed on CPU silently runs plain data parallelism


@functools.cache
def trainers_named(path: Path) -> set[str]:
    """Trainers and accelerators that a module imports or reaches for."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
    return {name for name in names if name.split(".")[0] == "accelerate" or name.endswith(("Trainer", "Accelerator"))}


SOURCES = sorted(ALIGN.rglob("*.py"))


def no_module_names_a_trainer() -> None:
    assert len(SOURCES) > 50
    assert set().union(*map(trainers_named, SOURCES)) == set()


# DeepSpeed compiles a shared-memory op at its first CPU start


def nothing_is_compiled_at_the_start() -> None:
    if torch.cuda.is_available():
        pytest.skip("DeepSpeed has this operator for CPUs only")
    compiled = []
    with Patch.context() as patch:
        stub = type("Builder", (), {"NAME": distributed.SHARED_MEMORY_OP})()
        stub.load, stub.absolute_name = (lambda: compiled.append(1)), (lambda: stub.NAME)
        communication: Any = importlib.import_module("deepspeed.comm.torch")
        accelerator = communication.get_accelerator()
        real = accelerator.create_op_builder("ShareMemCommBuilder")
        assert real.NAME == stub.NAME  # the name that our table holds is the one that DeepSpeed asks for
        patch.setattr(type(accelerator), "create_op_builder", lambda self, name: stub)
        communication.build_shm_op()
    assert not compiled


def operators_as_deepspeed_finds_them(patch: Patch) -> None:
    patch.setitem(deepspeed.ops.__dict__, "__compatible_ops__", {distributed.SHARED_MEMORY_OP: True})


# transformers 5 replaces a custom pre-tokenizer in a qwen2 folder; more cases: tests/data/test_chat.py


def a_pre_tokenizer_survives(folder: Path) -> None:
    raw = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "cat": 2, "dog": 3}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    assert chat.load_tokenizer(folder).encode("dog cat bird", add_special_tokens=False) == [3, 2, 0]


def as_transformers_loads_it(patch: Patch) -> None:
    plain = lambda path, *_: AutoTokenizer.from_pretrained(path)  # noqa: E731
    patch.setattr(chat, "load_tokenizer", plain)


# pad == eos shifts heads by one


@torch.no_grad()
def the_score_is_read_at_the_end_whatever_pads() -> None:
    ended = Sequences(
        Packed.from_lists([[5, 6], [7]]),
        Packed.from_lists([[8, LAST], [9, 10, 11, LAST], [12, LAST, LAST]]),
        torch.tensor([0, 0, 1]),
    )
    for attention, layout in (("sdpa", collate.padded(ended)), ("packed", collate.packed(ended))):
        scorer = llama(AutoModelForSequenceClassification, attention, num_labels=1, pad_token_id=LAST)
        plain = llama(AutoModelForSequenceClassification, "eager", num_labels=1, pad_token_id=LAST)
        whole = [[5, 6, 8, LAST], [5, 6, 9, 10, 11, LAST], [7, 12, LAST, LAST]]
        by_hand = [plain.score(plain.model(torch.tensor([row])).last_hidden_state)[0, -1, 0] for row in whole]
        torch.testing.assert_close(LastTokenScore(scorer)(layout)["score_B"], torch.stack(by_hand), rtol=0, atol=1e-5)


def by_looking_for_pads(patch: Patch) -> None:
    def forward(self: LastTokenScore, layout: collate.Layout) -> dict[str, Tensor]:
        output = self.model(input_ids=layout.input_ids, attention_mask=layout.attention_mask)
        return {"score_B": output.logits.squeeze(-1)}

    patch.setattr(LastTokenScore, "forward", forward)


# The traps

TRAPS: list[tuple[Check, Fault]] = [
    (value_comes_before_its_token, read_after_the_token),
    (gae_reads_the_next_state, gae_on_values_shifted_by_one),
    (the_baseline_is_the_mean_of_the_others, divided_by_K),
    (every_sequence_is_trained_on_once, the_whole_batch_for_each),
    (all_ranks_make_as_many_passes, each_rank_counts_for_itself),
    (what_is_masked_is_not_seen, masks_that_multiply),
    (a_llama_that_is_cut_off_keeps_its_last_token, an_end_written_over_the_last_token),
    (a_llama_that_is_cut_off_keeps_its_last_token, an_end_called_finished),
    (a_gpt2_that_is_cut_off_keeps_its_last_token, an_end_written_over_the_last_token),
    (the_reward_model_gets_the_ids_that_were_sampled, text_in_between),
    (the_reward_model_gets_the_ids_that_were_sampled, an_end_for_the_reward_model),
    (a_template_that_asks_for_today_is_refused, the_clock_left_in_reach),
    (equal_prompts_are_two_groups, groups_by_text),
    (equal_prompts_get_responses_of_their_own, noise_by_text),
    (logged_losses_do_not_depend_on_micro_batches, a_mean_over_micro_batches),
    (the_controller_does_not_see_micro_batches, a_share_for_the_controller),
    (the_dtype_is_that_of_the_recipe, bf16_by_surprise),
    (nothing_is_compiled_at_the_start, operators_as_deepspeed_finds_them),
    (the_score_is_read_at_the_end_whatever_pads, by_looking_for_pads),
]


@pytest.mark.parametrize(("check", "fault"), TRAPS, ids=lambda function: function.__name__)
def test_fault_is_caught(check: Check, fault: Fault):
    assert_caught(check, fault)


def test_dropout_while_sampling_is_caught(tmp_path: Path):
    toy.tokenizer().save_pretrained(tmp_path)
    model = gpt2()
    model.resize_token_embeddings(len(toy.tokenizer()))
    model.save_pretrained(tmp_path)
    assert_caught(partial(sampling_is_without_dropout, tmp_path), left_in_training)


def test_a_replaced_pre_tokenizer_is_caught(tmp_path: Path):
    assert_caught(partial(a_pre_tokenizer_survives, tmp_path), as_transformers_loads_it)


@pytest.mark.parametrize(
    "line",
    [
        "from transformers import Trainer",
        "from trl import RLOOTrainer",
        "import accelerate",
        "import trl; trl.DPOTrainer()",
        "from accelerate import Accelerator",
    ],
)
def test_a_trainer_of_others_is_caught(line: str, tmp_path: Path):
    module = tmp_path / "module.py"
    module.write_text(line)
    assert_caught(no_module_names_a_trainer, lambda patch: patch.setitem(globals(), "SOURCES", [*SOURCES, module]))
