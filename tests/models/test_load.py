"""Loading: the right weights, or a message that says why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from align.errors import ModelError
from align.models import load
from align.models.heads import is_packed
from align.sections import Lora, Model, Policy, Reward, TrainedReward

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
INIT = {"model_type": "llama", **{name: value for name, value in SIZES.items() if name != "vocab_size"}}


def saved(folder: Path, config: Any, auto: Any = AutoModelForCausalLM) -> str:
    torch.manual_seed(7)
    auto.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def causal_folder(tmp_path_factory) -> str:
    return saved(tmp_path_factory.mktemp("causal"), LlamaConfig(**SIZES))


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory) -> str:
    config = LlamaConfig(**SIZES, num_labels=1)
    return saved(tmp_path_factory.mktemp("reward"), config, AutoModelForSequenceClassification)


def model(path: str, **fields: Any) -> Model:
    return Model(path=path, **{"dtype": "float32", **fields})


def test_a_folder_gives_its_weights_in_the_dtype_asked_for(causal_folder):
    theirs = AutoModelForCausalLM.from_pretrained(causal_folder, dtype=torch.float32).state_dict()
    ours = load.causal_lm(model(causal_folder), 50, seed=0).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    short = load.causal_lm(model(causal_folder, dtype="bfloat16"), 50, seed=0).state_dict()
    assert all(torch.equal(short[name], theirs[name].bfloat16()) for name in theirs)


def test_init_is_seeded_and_takes_the_vocabulary_of_the_tokenizer():
    draw = lambda seed: load.causal_lm(model("nowhere", init=INIT), 37, seed).state_dict()  # noqa: E731
    first = draw(3)
    torch.rand(5)  # the state of the generator does not matter
    again, other = draw(3), draw(4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = [name for name in first if not name.endswith("norm.weight")]
    assert all(not torch.equal(first[name], other[name]) for name in drawn)
    assert len(drawn) == 2 + 7 * 2
    assert first["lm_head.weight"].shape == (37, 32)


def test_init_leaves_the_section_as_it_is():
    section = model("nowhere", init=dict(INIT))
    load.causal_lm(section, 37, 0)
    assert section.init == INIT


def test_init_of_an_unknown_architecture():
    with pytest.raises(ModelError, match="init needs a model_type that transformers knows"):
        load.causal_lm(model("nowhere", init={"hidden_size": 3}), 37, 0)
    with pytest.raises(ModelError, match="flurb"):
        load.causal_lm(model("nowhere", init={"model_type": "flurb"}), 37, 0)


def test_a_frozen_scorer_gives_its_weights(reward_folder):
    ours = load.scorer(Reward(path=reward_folder, dtype="float32"), 50, 0, new_head=False).state_dict()
    theirs = AutoModelForSequenceClassification.from_pretrained(reward_folder, dtype=torch.float32).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_causal_lm_is_no_frozen_scorer(causal_folder):
    with pytest.raises(ModelError, match=r"no trained reward head, the checkpoint lacks score\.weight"):
        load.scorer(Reward(path=causal_folder, dtype="float32"), 50, 0, new_head=False)


def test_a_new_head_is_drawn_from_the_seed_on_the_weights_of_the_folder(causal_folder):
    section = TrainedReward(path=causal_folder, dtype="float32")
    first, again, other = (load.scorer(section, 50, seed, new_head=True).state_dict() for seed in (1, 1, 2))
    body = AutoModelForCausalLM.from_pretrained(causal_folder, dtype=torch.float32).state_dict()
    assert all(torch.equal(first[name], body[name]) for name in body if name != "lm_head.weight")
    assert first["score.weight"].shape == (1, 32)
    assert torch.equal(first["score.weight"], again["score.weight"])
    assert not torch.equal(first["score.weight"], other["score.weight"])


def test_a_trained_head_is_kept_when_training_goes_on(reward_folder):
    ours = load.scorer(TrainedReward(path=reward_folder, dtype="float32"), 50, 9, new_head=True).state_dict()
    theirs = AutoModelForSequenceClassification.from_pretrained(reward_folder, dtype=torch.float32).state_dict()
    assert torch.equal(ours["score.weight"], theirs["score.weight"])


@pytest.mark.parametrize("labels", [2, 5])
def test_a_scorer_of_several_labels_is_refused(tmp_path, labels):
    path = saved(tmp_path, LlamaConfig(**SIZES, num_labels=labels), AutoModelForSequenceClassification)
    with pytest.raises(ModelError, match=f"has one label, this checkpoint has {labels}"):
        load.scorer(Reward(path=path), 50, 0, new_head=False)
    with pytest.raises(ModelError, match="cannot load"):  # and is not trained on with half of its head drawn anew
        load.scorer(TrainedReward(path=path), 50, 0, new_head=True)


def test_a_scorer_is_no_causal_lm(reward_folder):
    with pytest.raises(ModelError, match=r"not a causal language model.*lm_head\.weight"):
        load.causal_lm(model(reward_folder), 50, 0)


def test_a_missing_body_weight_is_refused_even_with_a_new_head(causal_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(Path(causal_folder) / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((Path(causal_folder) / "config.json").read_text())
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj"):
        load.causal_lm(model(str(tmp_path)), 50, 0)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj"):
        load.scorer(TrainedReward(path=str(tmp_path)), 50, 0, new_head=True)


def test_a_missing_folder(tmp_path):
    path = str(tmp_path / "gone")
    for call in (
        lambda: load.causal_lm(model(path), 50, 0),
        lambda: load.scorer(Reward(path=path), 50, 0, new_head=False),
        lambda: load.reward_kind(Reward(path=path), "auto"),
    ):
        with pytest.raises(ModelError, match=r"no model folder: .*gone/config\.json does not exist"):
            call()


def test_a_tokenizer_larger_than_the_embedding(causal_folder):
    load.causal_lm(model(causal_folder), 50, 0)
    with pytest.raises(ModelError, match="the tokenizer has 51 entries, the model embeds only 50"):
        load.causal_lm(model(causal_folder), 51, 0)


def test_reward_kinds(causal_folder, reward_folder):
    assert load.reward_kind(Reward(path=reward_folder), "auto") == "sequence_classification"
    assert load.reward_kind(Reward(path=causal_folder), "lm_head_row0") == "lm_head_row0"
    with pytest.raises(ModelError, match="cannot tell how LlamaForCausalLM gives a reward") as refusal:
        load.reward_kind(Reward(path=causal_folder), "auto")
    assert "lm_head_row0" in str(refusal.value)


def test_attention_follows_the_architecture(causal_folder, tmp_path):
    assert is_packed(load.causal_lm(model(causal_folder), 50, 0))
    for attention in ("sdpa", "eager"):
        ours = load.causal_lm(model(causal_folder, attention=attention), 50, 0)
        assert ours.config._attn_implementation == attention
    window = saved(tmp_path / "window", MistralConfig(**SIZES, sliding_window=8))
    layered = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    mixed = saved(tmp_path / "mixed", layered)
    gpt2 = saved(tmp_path / "gpt2", GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2))
    for path, kind in ((window, "mistral"), (mixed, "qwen2"), (gpt2, "gpt2")):
        assert load.causal_lm(model(path), 50, 0).config._attn_implementation == "sdpa"
        with pytest.raises(ModelError, match=f"attention=packed does not fit {kind}"):
            load.causal_lm(model(path, attention="packed"), 50, 0)


def test_pickled_weights_are_refused(causal_folder, tmp_path):
    weights = AutoModelForCausalLM.from_pretrained(causal_folder, dtype=torch.float16).state_dict()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((Path(causal_folder) / "config.json").read_text())
    for refuse in (lambda one: load.causal_lm(one, 50, 0), lambda one: load.check(one, 50)):
        with pytest.raises(ModelError, match=r"no weights in .*safetensors.*but pytorch_model\.bin: pickles"):
            refuse(model(str(tmp_path)))


def test_a_damaged_config_is_a_message(causal_folder, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"')
    with pytest.raises(ModelError, match="cannot read the config of"):
        load.causal_lm(model(str(tmp_path)), 50, 0)


def test_a_truncated_weight_file_is_a_message(causal_folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((Path(causal_folder) / name).read_bytes()[: 10**6 if name[0] == "c" else 5000])
    with pytest.raises(ModelError, match="cannot load"):
        load.causal_lm(model(str(tmp_path)), 50, 0)


def test_dropout_is_what_the_recipe_says_not_what_the_checkpoint_says(tmp_path):
    config = LlamaConfig(**SIZES, attention_dropout=0.3)
    path = saved(tmp_path / "llama", config)
    assert json.loads((tmp_path / "llama" / "config.json").read_text())["attention_dropout"] == 0.3
    assert load.causal_lm(model(path), 50, 0).config.attention_dropout == 0.0
    trained = Policy(path=path, dropout=0.2)
    assert load.causal_lm(trained, 50, 0).model.layers[0].self_attn.attention_dropout == 0.2
    gpt2 = saved(tmp_path / "gpt2", GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2))  # 0.1 by default
    quiet = load.causal_lm(model(gpt2), 50, 0)
    rates = [module.p for module in quiet.modules() if isinstance(module, torch.nn.Dropout)]
    assert rates
    assert set(rates) == {0.0}


def test_lora_trains_adapters_and_a_new_head_only(causal_folder):
    policy = load.add_lora(load.causal_lm(model(causal_folder), 50, 0), Lora(rank=3), task="CAUSAL_LM")
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * 2  # A and B of seven linear layers in two blocks
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    section = TrainedReward(path=causal_folder, dtype="float32")
    scorer = load.add_lora(load.scorer(section, 50, 0, new_head=True), Lora(rank=3), task="SEQ_CLS")
    heads = {name for name, p in scorer.named_parameters() if p.requires_grad and ".lora_" not in name}
    assert heads == {"score.weight"}
    some = load.add_lora(
        load.causal_lm(model(causal_folder), 50, 0), Lora(rank=3, targets=["q_proj"]), task="CAUSAL_LM"
    )
    assert sum(p.requires_grad for p in some.parameters()) == 4
