"""ZeRO 3 from a checkpoint: what is a matrix stays a matrix, and gathered weights stay gathered."""

import torch

from align.config import OptimizerConfig, PolicyConfig, SamplingConfig
from align.engines import deepspeed, distributed
from align.engines.decoder import generate
from align.models import heads, load
from align.types import Packed, Prompts


def test_decay_and_gathering_see_whole_weights(tiny_policy, monkeypatch):
    section = PolicyConfig(
        path=str(tiny_policy), dtype="float32", zero_stage=3, optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.1)
    )
    monkeypatch.setitem(vars(deepspeed), "_configuration", _without_persistence(deepspeed._configuration))
    device = distributed.initialize_alone()
    with deepspeed.sharded_loading(section):
        model = load.causal_lm(section, 60, seed=0)
        decayed = {
            group["weight_decay"]: len(group["params"])
            for group in deepspeed._adamw(model, section.optimizer).param_groups
        }
        engine = deepspeed.Engine(heads.TokenLogprobs(model), section, device, total_steps=1)
    matrices = 1 + 2 * 7  # embedding; q, k, v, o, gate, up, down of two layers
    assert decayed == {0.1: matrices, 0.0: 2 * 2 + 1}
    prompts = Prompts(Packed.from_lists([[1, 2, 3], [4, 5]]), torch.arange(2), (2,), 1)
    with engine.full(model.parameters()):
        generate(model, prompts, SamplingConfig(max_tokens=4), 0, 8)
        assert all(parameter.ds_status.name == "AVAILABLE" for parameter in model.parameters())
    assert not any(parameter.ds_status.name == "AVAILABLE" for parameter in model.parameters())


def _without_persistence(original):
    """DeepSpeed never shards small parameters; here all are small."""

    def configuration(section, head=None):
        settings = original(section, head)
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return settings

    return configuration
