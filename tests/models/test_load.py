"""Loading: the right weights, or a message that says why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from align.config import (
    CheckpointRewardConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    PolicyConfig,
    TrainedRewardConfig,
)
from align.errors import ModelError
from align.models import heads, load
from align.models.heads import is_packed

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


def model(path: str, **fields: Any) -> ModelConfig:
    return ModelConfig(path=path, **{"dtype": "float32", **fields})


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
    ours = load.scorer(CheckpointRewardConfig(path=reward_folder, dtype="float32"), 50, 0, head="trained").state_dict()
    theirs = AutoModelForSequenceClassification.from_pretrained(reward_folder, dtype=torch.float32).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_causal_lm_is_no_frozen_scorer(causal_folder):
    with pytest.raises(ModelError, match=r"no trained reward head, the checkpoint lacks score\.weight"):
        load.scorer(CheckpointRewardConfig(path=causal_folder, dtype="float32"), 50, 0, head="trained")


def test_a_new_head_is_drawn_from_the_seed_on_the_weights_of_the_folder(causal_folder):
    section = TrainedRewardConfig(path=causal_folder, dtype="float32")
    first, again, other = (load.scorer(section, 50, seed, head="auto").state_dict() for seed in (1, 1, 2))
    body = AutoModelForCausalLM.from_pretrained(causal_folder, dtype=torch.float32).state_dict()
    assert all(torch.equal(first[name], body[name]) for name in body if name != "lm_head.weight")
    assert first["score.weight"].shape == (1, 32)
    assert torch.equal(first["score.weight"], again["score.weight"])
    assert not torch.equal(first["score.weight"], other["score.weight"])


def test_a_trained_head_is_kept_when_training_goes_on(reward_folder):
    ours = load.scorer(TrainedRewardConfig(path=reward_folder, dtype="float32"), 50, 9, head="auto").state_dict()
    theirs = AutoModelForSequenceClassification.from_pretrained(reward_folder, dtype=torch.float32).state_dict()
    assert torch.equal(ours["score.weight"], theirs["score.weight"])


@pytest.mark.parametrize("labels", [2, 5])
def test_a_scorer_of_several_labels_is_refused(tmp_path, labels):
    path = saved(tmp_path, LlamaConfig(**SIZES, num_labels=labels), AutoModelForSequenceClassification)
    with pytest.raises(ModelError, match=f"its head has {labels} outputs, 1 wanted"):
        load.scorer(CheckpointRewardConfig(path=path), 50, 0, head="trained")
    with pytest.raises(ModelError, match=f"its head has {labels} outputs, 1 wanted"):  # nor half of it drawn anew
        load.scorer(TrainedRewardConfig(path=path), 50, 0, head="auto")
    with pytest.raises(ModelError, match=f"its head has {labels} outputs, 3 weights given"):
        load.scorer(TrainedRewardConfig(path=path), 50, 0, head="auto", combine=[1.0, 0.0, 0.0])


def test_a_scorer_is_no_causal_lm(reward_folder, tmp_path):
    tied = LlamaConfig(**SIZES, num_labels=1, tie_word_embeddings=True)  # all weights of a language model are there
    for folder in (reward_folder, saved(tmp_path, tied, AutoModelForSequenceClassification)):
        for refuse in (load.causal_lm, lambda one, *_: load.check(PolicyConfig(path=one.path, dtype="float32"), 50)):
            with pytest.raises(ModelError, match="not a causal language model, but LlamaForSequenceClassification"):
                refuse(model(folder), 50, 0)


def test_a_missing_body_weight_is_refused_even_with_a_new_head(causal_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(Path(causal_folder) / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((Path(causal_folder) / "config.json").read_text())
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj"):
        load.causal_lm(model(str(tmp_path)), 50, 0)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj"):
        load.scorer(TrainedRewardConfig(path=str(tmp_path)), 50, 0, head="auto")


def test_a_missing_folder(tmp_path):
    path = str(tmp_path / "gone")
    for call in (
        lambda: load.causal_lm(model(path), 50, 0),
        lambda: load.scorer(CheckpointRewardConfig(path=path), 50, 0, head="trained"),
        lambda: load.labels(CheckpointRewardConfig(path=path)),
    ):
        with pytest.raises(ModelError, match=r"no model folder: .*gone/config\.json does not exist"):
            call()


def test_a_tokenizer_larger_than_the_embedding(causal_folder):
    load.causal_lm(model(causal_folder), 50, 0)
    with pytest.raises(ModelError, match="the tokenizer has 51 entries, the model embeds only 50"):
        load.causal_lm(model(causal_folder), 51, 0)


def test_rows_beyond_the_tokenizer_are_not_predicted(causal_folder):
    logits = torch.arange(50.0)[None]
    columns = lambda *ids: heads.restricted(load.causal_lm(model(causal_folder), *ids), logits)  # noqa: E731
    assert columns(50, 0) is logits
    assert columns(45, 0).tolist() == [[*map(float, range(45))]]
    assert columns(50, 0, (1, 2))[0, :4].tolist() == [0.0, -float("inf"), -float("inf"), 3.0]


def test_labels_are_those_of_a_classifier(causal_folder, reward_folder):
    assert load.labels(CheckpointRewardConfig(path=reward_folder)) == ("LABEL_0",)
    assert load.labels(CheckpointRewardConfig(path=causal_folder)) == ()


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


SOFT_CAPS = {"model_type": "gemma2", **SIZES, "head_dim": 8}


@pytest.mark.parametrize("kind", [PolicyConfig, TrainedRewardConfig])
def test_an_architecture_without_sdpa_is_eager_by_itself(kind):
    take = lambda **fields: kind(path="", init=SOFT_CAPS, dtype="float32", optimizer=OptimizerConfig(lr=1.0), **fields)  # noqa: E731
    load.check(take(), 50)
    make = load.causal_lm if kind is PolicyConfig else lambda *rest: load.scorer(*rest, head="new")
    assert make(take(), 50, 0).config._attn_implementation == "eager"
    load.check(take(attention="eager"), 50)
    with pytest.raises(ModelError, match=r"reward.path: .*=sdpa: Gemma2\w+ does not support .*\n.*attention=auto"):
        load.check(take(attention="sdpa"), 50, "reward")


def test_flash_attention_that_cannot_be_is_refused(causal_folder, monkeypatch):
    flash = lambda **fields: PolicyConfig(path=causal_folder, attention="flash_attention_2", **fields)  # noqa: E731
    with pytest.raises(ModelError, match=r"computes in bfloat16, dtype is float32\n.*set dtype=bfloat16"):
        load.check(flash(dtype="float32"), 50)
    monkeypatch.setattr("align.models.attention.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="needs the package flash-attn"):
        load.check(flash(dtype="bfloat16"), 50)
    # The driver of a cluster may have the package and no GPU.
    monkeypatch.setattr("align.models.attention.find_spec", lambda name: name)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    load.check(flash(dtype="bfloat16"), 50)
    caps = {"model_type": "bloom", "hidden_size": 32, "n_head": 2, "n_layer": 1, "vocab_size": 50}
    with pytest.raises(ModelError, match="BloomForCausalLM does not support attention=flash_attention_2"):
        load.check(PolicyConfig(path="", init=caps, dtype="bfloat16", attention="flash_attention_2"), 50)


def test_an_architecture_without_a_classifier_is_no_reward_model():
    init = {"model_type": "cohere", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(ModelError, match="cannot build .*CohereConfig.* for this kind of AutoModel"):
        load.check(TrainedRewardConfig(path="", init=init, dtype="float32", optimizer=OptimizerConfig(lr=1.0)), 50)


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
    trained = PolicyConfig(path=path, dropout=0.2)
    assert load.causal_lm(trained, 50, 0).model.layers[0].self_attn.attention_dropout == 0.2
    gpt2 = saved(tmp_path / "gpt2", GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2))  # 0.1 by default
    quiet = load.causal_lm(model(gpt2), 50, 0)
    rates = [module.p for module in quiet.modules() if isinstance(module, torch.nn.Dropout)]
    assert rates
    assert set(rates) == {0.0}
    mpt = {"model_type": "mpt", "d_model": 32, "n_heads": 2, "n_layers": 1}
    load.check(PolicyConfig(path="", init=mpt, dtype="float32"), 50)
    with pytest.raises(ModelError, match=r"attn_pdrop of MptAttentionConfig cannot be 0\.2"):
        load.check(PolicyConfig(path="", init=mpt, dtype="float32", dropout=0.2), 50)


def test_an_architecture_without_gradient_checkpointing_is_refused():
    init = {"model_type": "jetmoe", "hidden_size": 32, "num_hidden_layers": 1, "num_key_value_heads": 2}
    load.check(PolicyConfig(path="", init=init, dtype="float32"), 50)
    with pytest.raises(ModelError, match="JetMoeForCausalLM does not support gradient_checkpointing"):
        load.check(PolicyConfig(path="", init=init, dtype="float32", gradient_checkpointing=True), 50)


def test_masks_that_an_architecture_does_not_read_are_no_quantized_weights(tmp_path):
    path = saved(tmp_path, GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2))
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    mask = {"transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8)}
    save_file(stored | mask, file, metadata={"format": "pt"})
    load.check(PolicyConfig(path=path, dtype="float32"), 50)
    load.causal_lm(PolicyConfig(path=path, dtype="float32"), 50, 0)
    quantized = {name: value.to(torch.int8) for name, value in stored.items() if name.endswith("c_attn.weight")}
    save_file(stored | quantized, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="holds I8 numbers, a quantized weight without its scale"):
        load.check(PolicyConfig(path=path, dtype="float32"), 50)


def test_lora_trains_adapters_and_a_new_head_only(causal_folder):
    policy = load.add_lora(load.causal_lm(model(causal_folder), 50, 0), LoraConfig(rank=3), task="CAUSAL_LM")
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * 2  # A and B of seven linear layers in two blocks
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    section = TrainedRewardConfig(path=causal_folder, dtype="float32")
    scorer = load.add_lora(load.scorer(section, 50, 0, head="auto"), LoraConfig(rank=3), task="SEQ_CLS")
    heads = {name for name, p in scorer.named_parameters() if p.requires_grad and ".lora_" not in name}
    assert heads == {"score.weight"}
    some = load.add_lora(
        load.causal_lm(model(causal_folder), 50, 0), LoraConfig(rank=3, targets=["q_proj"]), task="CAUSAL_LM"
    )
    assert sum(p.requires_grad for p in some.parameters()) == 4


# Heads that a reward model starts from


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> str:
    """A classifier of three named outputs."""
    names = ["helpfulness", "coherence", "verbosity"]
    config = LlamaConfig(**SIZES, id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})
    return saved(tmp_path_factory.mktemp("three"), config, AutoModelForSequenceClassification)


def head_of(model: Any) -> torch.Tensor:
    return model.score.weight.detach()


def test_several_outputs_come_back_or_are_combined_into_one(three):
    section = TrainedRewardConfig(path=three, dtype="float32")
    assert load.labels(section) == ("helpfulness", "coherence", "verbosity")
    whole = load.scorer(section, 50, 0, head="trained", num_labels=3)
    stored = AutoModelForSequenceClassification.from_pretrained(three, dtype=torch.float32)
    assert torch.equal(head_of(whole), head_of(stored))
    one: Any = load.scorer(section, 50, 0, head="trained", combine=[0.5, 0.0, -2.0])
    row = 0.5 * head_of(stored)[0] - 2 * head_of(stored)[2]
    torch.testing.assert_close(head_of(one), row[None], rtol=1e-6, atol=1e-9)
    assert (one.config.num_labels, one.num_labels, one.score.out_features) == (1, 1, 1)
    ids = torch.tensor([[5, 9, 3]])
    with torch.no_grad():
        several, single = stored(ids).logits[0], stored.model(ids).last_hidden_state[0, -1] @ head_of(one)[0]
    torch.testing.assert_close(single, 0.5 * several[0] - 2 * several[2], rtol=1e-5, atol=1e-7)


def test_a_new_head_is_drawn_whatever_the_checkpoint_brings(three, reward_folder):
    section = TrainedRewardConfig(path=three, dtype="float32")
    first, again, other = (load.scorer(section, 50, seed, head="new", num_labels=2) for seed in (1, 1, 2))
    assert head_of(first).shape == (2, 32)
    assert torch.equal(head_of(first), head_of(again))
    assert not torch.equal(head_of(first), head_of(other))
    assert 0.01 < head_of(first).std() < 0.03  # initializer_range is 0.02
    stored = AutoModelForSequenceClassification.from_pretrained(three, dtype=torch.float32)
    assert torch.equal(first.get_parameter("model.norm.weight"), stored.model.norm.weight)
    alone = TrainedRewardConfig(path=reward_folder, dtype="float32")
    brought, drawn = (load.scorer(alone, 50, 1, head=head) for head in ("auto", "new"))  # type: ignore[arg-type]
    assert not torch.equal(head_of(brought), head_of(drawn))


def test_a_head_with_a_bias_is_not_taken_apart(three, monkeypatch):
    section, build = TrainedRewardConfig(path=three, dtype="float32"), load._build

    def biased(*arguments: Any) -> Any:
        model, missing = build(*arguments)
        model.score = torch.nn.Linear(32, 3)
        return model, missing

    monkeypatch.setattr(load, "_build", biased)
    with pytest.raises(ModelError, match="its `score` head has a bias"):
        load.scorer(section, 50, 0, head="auto", combine=[1.0, 0.0, 0.0])


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, (1, [1.0, 0.0, 0.0])),
        ({"from_attribute": "verbosity"}, (1, [0.0, 0.0, 1.0])),
        ({"attributes": ["helpfulness", "coherence", "verbosity"]}, (3, None)),
        ({"attributes": ["nemo"], "head": "new"}, (9, None)),
        ({"head": "new"}, (1, None)),
    ],
)
def test_where_training_starts(three, fields, wanted):
    assert load.start_of(TrainedRewardConfig(path=three, **fields)) == wanted


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"from_attribute": "honesty"}, "has no output honesty, but helpfulness, coherence, verbosity"),
        (
            {"attributes": ["helpfulness"]},
            "has the outputs helpfulness, coherence, verbosity, reward.attributes are hel",
        ),
        ({"attributes": ["coherence", "helpfulness", "verbosity"]}, "are coherence, helpfulness, verbosity"),
    ],
)
def test_where_training_cannot_start(three, fields, message):
    with pytest.raises(ModelError, match=message):
        load.check(TrainedRewardConfig(path=three, **fields), 50)


def test_heads_that_a_checkpoint_does_not_name(causal_folder, reward_folder):
    assert load.start_of(TrainedRewardConfig(path=causal_folder, attributes=["a", "b"])) == (2, None)
    assert load.start_of(TrainedRewardConfig(path=reward_folder, attributes=["a"])) == (1, None)  # LABEL_0 is any name
    assert load.start_of(TrainedRewardConfig(path="nowhere", init=INIT, head="trained")) == (1, None)
    with pytest.raises(ModelError, match=r"reward\.head is trained, and the checkpoint is no sequence classifier"):
        load.check(TrainedRewardConfig(path=causal_folder, head="trained"), 50)
