"""The cast in one process: the same faults, the same names for what goes wrong."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from align.config import LoraConfig, ModelConfig, OptimizerConfig, PolicyConfig, SamplerConfig
from align.errors import ModelError, WorkerError
from align.run import Clock
from align.utils import fault_injection
from align.workers import local
from align.workers.base import Worker, WorkerSpec, worker_method
from align.workers.critic import CriticWorker
from align.workers.policy import LocalTransfer, PolicyWorker, ReferenceWorker, SamplerWorker
from align.workers.reward import RewardWorker, TrainedRewardWorker


class Echo(Worker):
    """Says what it hears."""

    def start_alone(self) -> None:
        self.up = True

    @worker_method
    def echo(self, number: torch.Tensor) -> torch.Tensor:
        """The same tensor."""
        if number.isnan().any():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return number


@pytest.fixture(autouse=True)
def _no_fault() -> Iterator[None]:
    yield
    fault_injection.arm(None)


@pytest.fixture
def ranks() -> local.LocalWorkerGroup:
    return local.start_role(Echo, WorkerSpec("reward", 0, 1, ModelConfig(path="-"), 0, 1, 1.0), Clock(step=3))


def score(ranks: local.LocalWorkerGroup, number: torch.Tensor) -> torch.Tensor:
    return ranks.call("score", Echo.echo, [(number,)], lambda parts: parts[0]).result()


@pytest.mark.parametrize("phase", ["start", "load"])
def test_a_fault_strikes_as_the_role_comes_up(phase: str):
    fault_injection.arm(f"role=reward,phase={phase},step=0,kind=error")
    with pytest.raises(RuntimeError, match="on purpose"):
        local.start_role(Echo, WorkerSpec("reward", 0, 1, ModelConfig(path="-"), 0, 1, 1.0), Clock())


def test_the_start_is_announced_with_its_bytes(tmp_path: Path):
    for number, size in enumerate((1_000_000, 500_000)):
        (tmp_path / f"model-{number}.safetensors").write_bytes(b"0" * size)
    lines: list[str] = []
    local.start_role(
        Echo, WorkerSpec("reward", 0, 1, ModelConfig(path=str(tmp_path)), 0, 1, 1.0), Clock(), lines.append
    )
    assert lines == [f"reward: loading {tmp_path} (2 MB) in this process", "reward: ready in 0.0 s"]


def test_a_fault_strikes_in_its_phase_and_step_only(ranks: local.LocalWorkerGroup):
    fault_injection.arm("role=reward,phase=score,step=4,kind=error")
    assert score(ranks, torch.ones(1)) == 1
    ranks.clock.step = 4
    with pytest.raises(RuntimeError, match="on purpose"):
        score(ranks, torch.ones(1))
    assert score(ranks, torch.ones(1)) == 1


def test_the_first_number_of_an_answer_is_spoilt_once_and_its_source_is_not(ranks: local.LocalWorkerGroup):
    fault_injection.arm("role=reward,phase=score,kind=nan_answer")
    whole = torch.ones(2, 2).T
    spoilt = score(ranks, whole)
    assert spoilt.isnan().tolist() == [[True, False], [False, False]]
    assert whole.tolist() == [[1, 1], [1, 1]]
    assert score(ranks, whole).tolist() == [[1, 1], [1, 1]]


def test_memory_that_ran_out_is_named_with_its_remedy(ranks: local.LocalWorkerGroup):
    with pytest.raises(WorkerError) as caught:
        score(ranks, torch.tensor([torch.nan]))
    assert "reward ran out of memory in score, step 3: OutOfMemoryError: CUDA" in str(caught.value)
    assert "lower reward.max_tokens_per_micro_batch" in str(caught.value)


@pytest.mark.parametrize("worker", [PolicyWorker, SamplerWorker, CriticWorker, TrainedRewardWorker])
def test_workers_with_weights_of_their_own_are_never_brought_up_anew(worker: type[Worker]):
    assert not worker.stateless


@pytest.mark.parametrize("worker", [ReferenceWorker, RewardWorker])
def test_frozen_workers_are_without_state(worker: type[Worker]):
    assert worker.stateless


def test_a_renewed_sampler_computes_what_the_policy_does(tiny_policy):
    """A sampler that gets the policy's weights without some of the adapters stops the run."""
    section: dict[str, Any] = {"path": str(tiny_policy), "dtype": "float32", "init": {}, "trust_remote_code": False}
    trained = PolicyConfig(**section, zero_stage=0, lora=LoraConfig(rank=4), optimizer=OptimizerConfig(lr=1.0))
    policy = local.start_role(PolicyWorker, WorkerSpec("policy", 0, 1, trained, 0, 1, 1.0), Clock()).worker
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0), std=0.3)
    sampler = local.start_role(
        SamplerWorker, WorkerSpec("sampler", 0, 1, SamplerConfig(**section), 0, 1, 1.0), Clock()
    ).worker
    transfer = LocalTransfer()
    policy.send_weights(transfer)
    sampler.receive(transfer, 0)
    policy.send_weights(transfer)
    for name in transfer.weights:
        if "q_proj" in name or "down_proj" in name:
            transfer.weights[name] = policy.model.get_submodule(name.removesuffix(".weight")).base_layer.weight.detach()
    with pytest.raises(ModelError, match=r"does not hold the policy: .* differ by [\d.]+ on average") as caught:
        sampler.receive(transfer, 0)
    assert "rounding explains 0.001" in str(caught.value)
    assert "leave sampler out of placement" in str(caught.value.remedy)
