"""A second rollout engine plugs in by a recipe key, and log-probabilities that are not exact are recomputed."""

from pathlib import Path

import pytest
import torch

from align.config import ModelConfig, OptimizerConfig, PolicyConfig, SamplerConfig, SamplingConfig
from align.config.load import load_recipe
from align.engines.decoder_engine import DecoderEngine
from align.prepare import prepare
from align.roles import Loss
from align.run import Clock
from align.types import Packed, Prompts, Rollouts
from align.workers import local
from align.workers.base import WorkerSpec
from align.workers.policy import Policy, PolicyWorker

SAMPLING = SamplingConfig(num_samples=2, max_tokens=5)


class PerturbedEngine(DecoderEngine):
    """Log-probabilities are off by 0.1, as those of another kernel may be."""

    exact = False

    def generate(self, prompts: Prompts, sampling: SamplingConfig) -> Rollouts:
        rollouts = super().generate(prompts, sampling)
        logprob_BT = torch.where(rollouts.mask_BT, rollouts.logprob_BT - 0.1, rollouts.logprob_BT)
        return Rollouts(
            rollouts.sequences,
            logprob_BT,
            rollouts.untempered_logprob_BT,
            rollouts.finished_B,
            rollouts.temperature,
            rollouts.step,
        )


def loss(*, logprob_BT: torch.Tensor, mask_BT: torch.Tensor, old_BT: torch.Tensor, **_: torch.Tensor) -> Loss:
    ratio_BT = torch.where(mask_BT, (logprob_BT - old_BT).exp(), 0.0)
    return Loss(-ratio_BT.sum(), mask_BT.sum(), {"ratio": (ratio_BT.sum(), mask_BT.sum())})


def start_policy(folder: Path, engine: str) -> Policy:
    optimizer = OptimizerConfig(lr=0.01)
    section = PolicyConfig(path=str(folder), dtype="float32", zero_stage=0, optimizer=optimizer, engine=engine)
    ranks = local.start_role(PolicyWorker, WorkerSpec("policy", 0, 1, section, 0, 1, 60.0), Clock(step=1))
    return Policy(ranks, section)


@pytest.mark.parametrize(("engine", "exact"), [("decoder", True), (f"{__file__}:PerturbedEngine", False)])
def test_old_logprobs_are_recomputed_unless_exact_and_rollouts_train(tiny_policy: Path, engine: str, exact: bool):
    policy = start_policy(tiny_policy, engine)
    prompts = Prompts(Packed.from_lists([[5, 6, 7], [8, 9]]), torch.tensor([0, 1]), (2,), 1)
    rollouts = policy.generate(prompts, SAMPLING).result()
    old_BT = policy.old_logprobs(rollouts).result()
    assert (old_BT is rollouts.logprob_BT) == exact
    computed_BT = policy.logprobs(rollouts.sequences, rollouts.temperature).result()
    assert torch.allclose(old_BT, computed_BT, atol=1e-5)
    before = policy.ranks.worker.model.get_input_embeddings().weight.detach().clone()  # type: ignore[attr-defined]
    metrics = policy.update(rollouts.batch(old_BT=old_BT), loss).result()
    assert abs(metrics["ratio"] - 1.0) < 1e-4
    assert not torch.equal(before, policy.ranks.worker.model.get_input_embeddings().weight)  # type: ignore[attr-defined]


@pytest.mark.parametrize("section", [PolicyConfig, SamplerConfig])
def test_an_unknown_engine_is_refused(section: type[ModelConfig]):
    with pytest.raises(ValueError, match="engine must be one of decoder, or module:Class"):
        section(path="p", dtype="float32", engine="vlm")  # type: ignore[call-arg]


def test_a_run_resumes_only_with_the_same_engine(tmp_path: Path, toy_data: Path, tiny_policy: Path):
    engine, recipe = tmp_path / "engine.py", tmp_path / "recipe.yaml"
    recipe.write_text(
        f"algorithm: sft\nrun: {{dir: {tmp_path / 'run'}, steps: 1}}\nexecutor: local\ndata: {{path: {toy_data}}}\n"
        f"batch_size: 4\npolicy: {{path: {tiny_policy}, dtype: float32, optimizer: {{lr: 1}}, engine: '{engine}:E'}}\n"
    )
    engine.write_text("from align.engines.decoder_engine import DecoderEngine as E\n")
    first, again = (prepare(load_recipe(recipe)).identity for _ in range(2))
    assert first == again
    engine.write_text("from align.engines.decoder_engine import DecoderEngine as E  # changed\n")
    assert prepare(load_recipe(recipe)).identity != first
