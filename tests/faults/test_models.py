"""Tokenizers and checkpoints that do not fit: status 78 before the run folder is made and any worker starts, in a
message that names both sides. What is harmless gives the same numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from align import launch
from align.cli import main
from align.data import chat

RECIPE = """
algorithm: rloo
run: {{dir: {run}, steps: 2, seed: 1, progress: none, trackers: []}}
data: {{path: {data}}}
executor: local
prompts_per_step: 2
sampling: {{num_samples: 2, max_tokens: 6}}
truncated: keep
policy: {{path: {policy}, dtype: float32, zero_stage: 0, optimizer: {{lr: 1e-3}}}}
reference: {{dtype: float32}}
reward: {{path: {reward}, dtype: float32}}
"""


class Command:
    """``align train`` with copies of the policy and the reward model that a test may damage."""

    def __init__(self, folder: Path, data: Path, policy: Path, reward: Path):
        self.folder, self.data = folder, data
        self.run = folder / "run"
        self.policy = Path(shutil.copytree(policy, folder / "policy"))
        self.reward = Path(shutil.copytree(reward, folder / "reward"))
        self.more: list[str] = []

    def reference(self) -> Path:
        """A copy of the policy from which only the reference comes."""
        folder = Path(shutil.copytree(self.policy, self.folder / "reference"))
        self.more.append(f"reference.path={folder}")
        return folder

    def __call__(self, *overrides: str) -> int:
        recipe = self.folder / "recipe.yaml"
        recipe.write_text(RECIPE.format(run=self.run, data=self.data, policy=self.policy, reward=self.reward))
        return main(["train", str(recipe), *self.more, *overrides])

    def metrics(self, run: str = "run") -> list[dict[str, Any]]:
        """Lines of ``metrics.jsonl`` without what depends on the clock."""
        lines = [json.loads(line) for line in (self.folder / run / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in line.items() if "second" not in key} for line in lines]


@pytest.fixture
def command(tmp_path: Path, toy_data: Path, tiny_policy: Path, tiny_reward: Path) -> Command:
    return Command(tmp_path, toy_data, tiny_policy, tiny_reward)


def change(file: Path, **values: object) -> None:
    """Set keys of a JSON file; None takes one away."""
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def vocabulary(folder: Path, edit: Callable[[dict[str, int]], None]) -> None:
    """Edit the words of a tokenizer."""
    content = json.loads((folder / "tokenizer.json").read_text())
    edit(content["model"]["vocab"])
    (folder / "tokenizer.json").write_text(json.dumps(content))


def swap(words: dict[str, int]) -> None:
    words["cat"], words["dog"] = words["dog"], words["cat"]


def embedding(folder: Path, more: int) -> None:
    """Add rows to the embedding of a folder, which is its head too, or take some away."""
    file, name = folder / "model.safetensors", "model.embed_tokens.weight"
    weights = load_file(file)
    rows = weights[name]
    new = 3 * rows.std() * torch.randn(max(more, 0), rows.shape[1], generator=torch.Generator().manual_seed(8))
    save_file(weights | {name: torch.cat([rows[: len(rows) + more], new])}, file, metadata={"format": "pt"})
    change(folder / "config.json", vocab_size=len(rows) + more)


def sharded(folder: Path) -> dict[str, Path]:
    """Divide the weights of a folder over two files; the file of each weight."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: weights[name] for name in own}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    table = {name: file for file, own in parts.items() for name in own}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return {name: folder / file for name, file in table.items()}


def other_vocabulary(command: Command) -> list[str]:
    vocabulary(command.reference(), lambda words: words.update(zebra=len(words)))
    return ["policy (64 entries) and reference (65 entries)", "id 64 is missing in policy and 'zebra' in reference"]


def same_size_in_another_order(command: Command) -> list[str]:
    vocabulary(command.reference(), swap)
    return ["policy (64 entries) and reference (64 entries)", "is 'cat' in policy and 'dog' in reference"]


def another_end_token(command: Command) -> list[str]:
    change(command.reference() / "tokenizer_config.json", eos_token="<pad>")
    return ["beginning- and end-of-sequence ids are [1, 2] in policy and [1, 0] in reference"]


def no_chat_template(command: Command) -> list[str]:
    (command.policy / "chat_template.jinja").unlink()
    return [str(command.policy), "the tokenizer has no chat template", "data.chat_template=FILE"]


def reward_model_without_tokenizer(command: Command) -> list[str]:
    (command.reward / "tokenizer.json").unlink()
    return [str(command.reward), "the folder has no tokenizer"]


def vocabulary_beyond_the_embedding(command: Command) -> list[str]:
    for folder in (command.policy, command.reward):
        vocabulary(folder, lambda words: words.update({f"new{i}": len(words) + i for i in range(3)}))
    return [str(command.policy), "the tokenizer has 67 entries, the model embeds only 64"]


def a_reward_model_that_embeds_less(command: Command) -> list[str]:
    embedding(command.reward, -1)
    return [f"reward.path: {command.reward}: the tokenizer has 64 entries, the model embeds only 63"]


def an_id_beyond_the_embedding(command: Command) -> list[str]:
    """One word more, whose id leaves a gap: the number of words would fit."""
    for folder in (command.policy, command.reward):
        vocabulary(folder, lambda words: words.update(zebra=words.pop("dog") + 60))
    return [f"policy.path: {command.policy}: the tokenizer has ", "the model embeds only 64"]


def adapters_alone(command: Command) -> list[str]:
    (command.policy / "config.json").unlink()
    return adapters_beside_a_model(command)


def adapters_beside_a_model(command: Command) -> list[str]:
    (command.policy / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/other-base"}))
    return [str(command.policy), "holds adapters for someone/other-base, not a whole model", "merge_and_unload"]


def a_missing_shard(command: Command) -> list[str]:
    lost = sharded(command.reward)["score.weight"]
    lost.unlink()
    return [f"{command.reward}/model.safetensors.index.json names {lost.name}, which is not in the folder"]


def a_shard_outside_the_folder(command: Command) -> list[str]:
    index = command.reward / "model.safetensors.index.json"
    outside = "../policy/model.safetensors"
    table = dict.fromkeys(map(str, sharded(command.reward)), outside)
    index.write_text(json.dumps({"weight_map": table}))
    return [f"{index} names {outside}, which is not in the folder"]


def an_index_that_is_no_index(command: Command) -> list[str]:
    sharded(command.policy)
    (command.policy / "model.safetensors.index.json").write_text("[]")
    return [f"{command.policy}/model.safetensors.index.json has no weight_map"]


def half_a_weight_file(command: Command) -> list[str]:
    file = command.policy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return [f"{file} is damaged"]


def whole_numbers_in_place_of_weights(command: Command) -> list[str]:
    file = command.policy / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(weights | {name: (weights[name] * 100).to(torch.int8)}, file, metadata={"format": "pt"})
    return [f"{file}: {name} holds I8 numbers", "F64, F32, F16, BF16"]


def a_tokenizer_that_cannot_be_saved(command: Command) -> list[str]:
    code = "from transformers import PreTrainedTokenizerFast\nclass OwnTokenizerFast(PreTrainedTokenizerFast):\n"
    code += "    def save_pretrained(self, *_, **__):\n        raise OSError('saved by nobody')\n"
    (command.policy / "own.py").write_text(code)
    own = {"auto_map": {"AutoTokenizer": [None, "own.OwnTokenizerFast"]}, "tokenizer_class": "OwnTokenizerFast"}
    change(command.policy / "tokenizer_config.json", **own)
    command.more.append("policy.trust_remote_code=true")
    return [f"{command.policy}: its config or tokenizer cannot be exported: OSError: saved by nobody"]


def a_quantized_checkpoint(command: Command) -> list[str]:
    change(command.policy / "config.json", quantization_config={"quant_method": "fp8"})
    return [str(command.policy), "the checkpoint is quantized, and dtype=float32 asks for its plain weights"]


def an_architecture_of_its_own_code(command: Command) -> list[str]:
    change(command.policy / "config.json", model_type="mystery", auto_map={"AutoConfig": "code.C"})
    return [f"cannot read the config of {command.policy}", "custom code", "trust_remote_code=true"]


def a_tokenizer_of_its_own_code(command: Command) -> list[str]:
    own = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["code.T", "code.T"]}}
    change(command.policy / "tokenizer_config.json", **own)
    return [str(command.policy), "custom code", "trust_remote_code=true"]


def adapters_on_a_tied_output_layer(command: Command) -> list[str]:
    command.more += ["policy.lora.rank=2", "policy.lora.targets=[lm_head]"]
    return ["policy.lora.targets: lm_head: model.embed_tokens.weight and lm_head.weight are one weight", "all-linear"]


def fewer_positions_than_the_data_needs(command: Command) -> list[str]:
    change(command.reward / "config.json", max_position_embeddings=12)
    return [
        f"reward.path: {command.reward}: the longest prompt of ",
        "tokens and sampling.max_tokens=6 need ",
        "the model has 12 positions (max_position_embeddings)",
        "lower sampling.max_tokens, or data.max_prompt_tokens",
    ]


MISFITS = [
    adapters_on_a_tied_output_layer,
    other_vocabulary,
    same_size_in_another_order,
    another_end_token,
    no_chat_template,
    reward_model_without_tokenizer,
    vocabulary_beyond_the_embedding,
    a_reward_model_that_embeds_less,
    an_id_beyond_the_embedding,
    adapters_alone,
    adapters_beside_a_model,
    a_missing_shard,
    a_shard_outside_the_folder,
    an_index_that_is_no_index,
    half_a_weight_file,
    whole_numbers_in_place_of_weights,
    a_quantized_checkpoint,
    a_tokenizer_that_cannot_be_saved,
    an_architecture_of_its_own_code,
    a_tokenizer_of_its_own_code,
    fewer_positions_than_the_data_needs,
]


@pytest.mark.parametrize("executor", ["local", "ray"])
@pytest.mark.parametrize("misfit", MISFITS, ids=lambda one: one.__name__)
def test_what_does_not_fit_is_refused_before_a_folder_or_a_worker(
    command: Command, misfit: Any, executor: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    started: list[str] = []
    monkeypatch.setattr(launch, "start_roles", lambda *_: started.append("start_roles"))
    (command.folder / "policy" / "code.py").write_text(f"open({str(command.folder / 'ran')!r}, 'w')\n")
    parts = misfit(command)
    assert command(f"executor={executor}") == 78
    said = capsys.readouterr().err
    assert said.startswith("align: "), said
    missing = [part for part in parts if part not in said]
    assert not missing, said
    assert not started
    assert not command.run.exists()
    assert not (command.folder / "ran").exists()


@pytest.mark.parametrize("dtype", ["float16", "int8", "fp8"])
def test_a_number_format_that_cannot_be_trained_is_refused_at_its_key(command: Command, dtype: str, capsys):
    assert command(f"policy.dtype={dtype}") == 78
    said = capsys.readouterr().err
    assert f"policy.dtype: expected one of auto, float32, bfloat16, found '{dtype}'" in said
    assert not command.run.exists()


def test_a_head_that_is_missing_is_refused_before_the_first_step(command: Command, capsys):
    """Whether all weights are there is known when they are loaded."""
    file = command.reward / "model.safetensors"
    weights = load_file(file)
    del weights["score.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    assert command() == 78
    assert f"{command.reward}: no trained reward head, the checkpoint lacks score.weight" in capsys.readouterr().err
    metrics = command.run / "metrics.jsonl"
    assert not metrics.exists() or not metrics.read_text()


def no_pad_token(folder: Path) -> None:
    change(folder / "tokenizer_config.json", pad_token=None)


def pad_is_eos(folder: Path) -> None:
    change(folder / "tokenizer_config.json", pad_token="</s>")


@pytest.mark.parametrize("attention", ["packed", "sdpa"])
@pytest.mark.parametrize(("edit", "pad"), [(no_pad_token, None), (pad_is_eos, "</s>")])
def test_the_pad_token_changes_no_number(command: Command, edit: Any, pad: str | None, attention: str):
    """Ids travel packed, and the end token of a response is never taken for padding, nor padding for an end."""
    same = ["reference.attention", "policy.attention", "reward.attention"]
    options = [f"{key}={attention}" for key in same]
    assert command(*options) == 0
    for folder in (command.policy, command.reward):
        edit(folder)
        assert chat.load_tokenizer(folder).pad_token == pad
    assert command(*options, f"run.dir={command.folder / 'edited'}") == 0
    assert command.metrics() == command.metrics("edited")
    assert len(command.metrics()) == 2


@pytest.mark.parametrize("attention", ["packed", "sdpa"])
def test_rows_that_pad_the_embedding_change_no_number(command: Command, attention: str):
    """No id beyond the tokenizer is sampled, so a reward model may embed fewer of them than the policy."""
    options = [f"policy.attention={attention}", "sampling.temperature=1.5"]
    assert command(*options) == 0
    embedding(command.policy, 40)
    assert command(*options, f"run.dir={command.folder / 'padded'}") == 0
    for plain, padded in zip(command.metrics(), command.metrics("padded"), strict=True):
        if plain["step"] == 1:  # policy and reference are the same: their KL is rounding, and so is its correlation
            assert plain.pop("kl") == pytest.approx(padded.pop("kl"), abs=1e-5)
            del plain["correlation/reward_kl"], padded["correlation/reward_kl"]
        assert plain == pytest.approx(padded, rel=1e-4, abs=1e-6)


def test_code_beside_an_architecture_that_transformers_has_is_not_run(command: Command):
    """Such a checkpoint loads with the class of transformers, as those of Phi-3 do."""
    (command.policy / "code.py").write_text(f"open({str(command.folder / 'ran')!r}, 'w')\n")
    change(command.policy / "config.json", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})
    assert command("run.steps=1") == 0
    assert not (command.folder / "ran").exists()


def test_a_run_does_not_go_on_with_another_template(command: Command, capsys):
    template = command.policy / "chat_template.jinja"
    assert command("run.steps=1") == 0
    before = (command.run / "metrics.jsonl").read_bytes()
    template.write_text(template.read_text().replace("{{ message.content }}", "{{ message.content }} :"))
    capsys.readouterr()
    assert command("run.steps=2", "run.allow_change=[run.steps]") == 78
    said = capsys.readouterr().err
    assert "data: renderer" in said
    assert "in the checkpoint" in said
    assert " now" in said
    assert (command.run / "metrics.jsonl").read_bytes() == before
