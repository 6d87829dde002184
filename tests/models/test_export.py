"""Writing: what is read back is what was held, adapters merged."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DeepseekV3Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)

from align.config import LoraConfig, ModelConfig
from align.data import collate, toy
from align.errors import ModelError
from align.models import export, heads, load, verify_export
from align.models.heads import LastTokenAttributes, LastTokenScore, TokenLogprobs, TokenValues, is_packed
from align.types import Packed, Sequences

SIZES: dict[str, Any] = {
    "vocab_size": 80,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2 with biases": Qwen2Config(**SIZES),
    "gpt2": GPT2Config(vocab_size=80, n_embd=32, n_layer=2, n_head=4),
    "experts": Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "experts chosen by a buffer": DeepseekV3Config(
        **{**SIZES, "num_key_value_heads": 4},
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
    ),
    "gpt_neox": GPTNeoXConfig(**{name: value for name, value in SIZES.items() if name != "num_key_value_heads"}),
}
IDS = torch.tensor([[5, 9, 3, 70, 12, 2]])


def whole(_: Iterable[nn.Parameter]) -> nullcontext[None]:
    return nullcontext()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return toy.tokenizer()


def build(config: Any, auto: Any = AutoModelForCausalLM, attention: str = "sdpa", dtype: Any = torch.float32) -> Any:
    torch.manual_seed(5)
    model = auto.from_config(copy.deepcopy(config), attn_implementation=attention, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.tensor([3.0, 0.0, -2.0, 0.5]))
    return model


def outputs(model: Any, tokenizer: Any) -> dict[str, torch.Tensor]:
    """What the head of a role gives on the batch that an export is checked on."""
    layout = (collate.packed if is_packed(model) else collate.padded)(verify_export.probe(tokenizer))
    with torch.no_grad():
        if not hasattr(model, "score"):
            return TokenLogprobs(model)(layout, temperature=1.0)
        return LastTokenAttributes(model)(layout) if model.config.num_labels > 1 else LastTokenScore(model)(layout)


def written(model: Any, tokenizer: Any, folder: Path, dtype: torch.dtype | None = None) -> Path:
    state = export.state_dict(model, whole, keep=True, dtype=dtype)
    export.write(model, tokenizer, state, folder, {"note.txt": "é\n"}, outputs(model, tokenizer))
    assert state == {}  # no second copy stays in memory
    assert (folder / "note.txt").read_text(encoding="utf-8") == "é\n"
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_a_causal_lm_comes_back(name, tokenizer, tmp_path):
    model = build(CONFIGS[name])
    folder = written(model, tokenizer, tmp_path / "final")
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, again(IDS).logits)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) if name == "tied" else True
    assert not list(tmp_path.glob("*.partial"))
    back = AutoTokenizer.from_pretrained(folder)
    assert back.get_vocab() == tokenizer.get_vocab()
    assert back.chat_template == tokenizer.chat_template


def test_a_packed_model_is_written_without_our_attention(tokenizer, tmp_path):
    model = build(CONFIGS["llama"], attention="packed")
    folder = written(model, tokenizer, tmp_path / "final")
    assert "packed" not in (folder / "config.json").read_text()
    assert model.config._attn_implementation == "packed"  # and goes on as it was
    layout = collate.packed(Sequences(Packed.from_lists([[5, 9, 3]]), Packed.from_lists([[70, 12]]), torch.tensor([0])))
    TokenLogprobs(model)(layout, temperature=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scorer_comes_back(dtype, tokenizer, tmp_path):
    config = LlamaConfig(**SIZES, num_labels=1, pad_token_id=0)
    model = build(config, AutoModelForSequenceClassification, dtype=dtype)
    folder = written(model, tokenizer, tmp_path / "final")
    again = AutoModelForSequenceClassification.from_pretrained(folder, dtype="auto").eval()
    assert again.dtype == dtype
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, again(IDS).logits)
    section = ModelConfig(path=str(folder), dtype="float32")
    assert len(load.labels(section)) == 1
    assert torch.equal(load.scorer(section, 80, 0, head="trained").score.weight, model.score.weight.float())


def adapted(model: Any, task: str, seed: int = 3) -> Any:
    load.add_lora(model, LoraConfig(rank=4, alpha=12.0), task=task)
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:  # zero at the start, which would hide a merge that does nothing
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=source))
    return model


@pytest.mark.parametrize("name", ["llama", "tied", "qwen2 with biases", "gpt2", "experts"])
def test_adapters_are_merged(name, tokenizer, tmp_path):
    plain = build(CONFIGS[name])
    model = adapted(build(CONFIGS[name]), "CAUSAL_LM").eval()
    folder = written(model, tokenizer, tmp_path / "final")
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=0, atol=2e-6)
        assert float((again(IDS).logits - plain(IDS).logits).abs().max()) > 0.05
    assert set(again.state_dict()) == set(plain.state_dict())
    assert any(".lora_" in key for key, _ in model.named_parameters())  # the model in training keeps its adapters


def test_adapters_of_a_scorer_are_merged_beside_its_new_head(tokenizer, tmp_path):
    config = LlamaConfig(**SIZES, num_labels=1, pad_token_id=0)
    model = adapted(build(config, AutoModelForSequenceClassification, "packed"), "SEQ_CLS").eval()
    folder = written(model, tokenizer, tmp_path / "final")
    again = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="packed"
    )
    rows = Sequences(Packed.from_lists([[5, 9, 3]]), Packed.from_lists([[70, 12], [4]]), torch.tensor([0, 0]))
    with torch.no_grad():
        ours, theirs = (LastTokenScore(m.eval())(collate.packed(rows))["score_B"] for m in (model, again))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)


# The folder computes what the model in training computes


def test_the_oracle_of_each_head(tokenizer, tmp_path):
    """Log-probabilities, values, scores and attributes by transformers alone are those of our heads."""
    sequences = verify_export.probe(tokenizer)
    layout = collate.packed(sequences)
    causal = build(CONFIGS["llama"], attention="packed")
    scorers = [
        build(LlamaConfig(**SIZES, num_labels=n, pad_token_id=0), AutoModelForSequenceClassification, "packed")
        for n in (1, 3)
    ]
    for head, arguments in (
        (TokenLogprobs(causal), {"temperature": 1.0}),
        (TokenValues(scorers[0]), {}),
        (LastTokenScore(scorers[0]), {}),
        (LastTokenAttributes(scorers[1]), {}),
    ):
        name = head.outputs[0]
        with torch.no_grad():
            expected = head(layout, **arguments)[name]
        plain = type(head.model)(copy.deepcopy(head.model.config)).eval()
        plain.load_state_dict(head.model.state_dict())
        plain.config._attn_implementation = "eager"
        with torch.no_grad():
            found = verify_export.READERS[name](plain, sequences, expected)
        assert verify_export.difference(expected, found) < 1e-5
        assert float(expected.abs().max()) > 0.01


def test_a_folder_that_computes_something_else_is_refused(tokenizer, tmp_path):
    """Adapters on one end of tied embeddings, put there past the check of targets: the weights agree bit for bit with
    the state that was meant to be written, and the behaviour does not."""
    model = build(CONFIGS["tied"])
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM"), model)
    with torch.no_grad():
        model.lm_head.lora_B.default.weight.normal_(generator=torch.Generator().manual_seed(0), std=0.3)
    state = export.state_dict(model, whole, keep=True)
    with pytest.raises(
        ModelError, match=r"not the trained model: .* log-probabilities differ by [\d.]+ on average"
    ) as caught:
        export.write(model, tokenizer, state, tmp_path / "final", {}, outputs(model, tokenizer))
    assert "rounding explains 0.001" in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("gaps", [0, 20])
def test_a_head_with_more_rows_than_the_tokenizer_has_ids_comes_back(gaps: int, tokenizer, tmp_path):
    """The model in training predicts the tokenizer's ids alone; transformers gives the other rows a probability too."""
    size = len(tokenizer)
    model = build(LlamaConfig(**SIZES | {"vocab_size": size + 40}))
    heads.restrict(model, heads.TokenizerIds(size + gaps, tuple(range(size, size + gaps))))
    expected = outputs(model, tokenizer)
    folder = written(model, tokenizer, tmp_path / "final")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sequences = verify_export.probe(tokenizer)
    with torch.no_grad():
        apart = verify_export.difference(
            expected["logprob_BT"], verify_export.READERS["logprob_BT"](plain, sequences, expected["logprob_BT"])
        )
    assert apart > 0.05  # over all rows


def test_numbers_that_are_not_finite_are_refused(tokenizer, tmp_path):
    model = build(CONFIGS["llama"])
    expected = {"logprob_BT": outputs(model, tokenizer)["logprob_BT"].fill_(float("nan"))}
    with pytest.raises(ModelError, match="not the trained model"):
        export.write(model, tokenizer, export.state_dict(model, whole, keep=True), tmp_path / "final", {}, expected)


def test_the_difference_is_absolute_for_small_numbers_and_relative_for_large_ones():
    assert verify_export.difference(torch.tensor([0.5, -4.0]), torch.tensor([0.75, -4.0])) == 0.125
    assert verify_export.difference(torch.tensor([0.5, -4.0]), torch.tensor([0.5, -5.0])) == 0.125
    assert verify_export.tolerance(torch.float32, torch.bfloat16) == verify_export.tolerance(torch.bfloat16)


# Number formats of merged weights


@pytest.mark.parametrize(("scale", "dtype"), [(0.1, torch.bfloat16), (1e-4, torch.float32)])
def test_merged_weights_have_the_base_s_format_unless_rounding_loses_the_update(scale, dtype, tokenizer, tmp_path):
    """A base in bfloat16, held in float32 for training."""
    base = build(CONFIGS["llama"]).bfloat16()
    model = adapted(copy.deepcopy(base).float(), "CAUSAL_LM")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.mul_(scale / 0.1)
    assert export.merged_dtype(model, whole, torch.bfloat16) == dtype
    exact = export.state_dict(model, whole, keep=True)
    layers = [(exact[name], base.get_parameter(name).float()) for name in exact if "proj" in name]
    lost = sum(float((merged.bfloat16().float() - merged).square().sum()) for merged, _ in layers)
    learned = sum(float((merged - before).square().sum()) for merged, before in layers)
    print(f"rounding to bfloat16 loses {(lost / learned) ** 0.5:.2f} of the update")
    assert ((lost / learned) ** 0.5 < 0.25) == (dtype == torch.bfloat16)
    folder = written(model, tokenizer, tmp_path / "final", dtype)
    stored = load_file(folder / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {dtype}
    assert json.loads((folder / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == dtype
    frozen = [name for name in stored if "proj" not in name]
    assert len(frozen) == 7  # embeddings, output layer, norms: the base's own, bit for bit
    assert all(torch.equal(stored[name].bfloat16(), base.get_parameter(name)) for name in frozen)


def test_a_weight_that_was_trained_whole_is_not_rounded(tokenizer, tmp_path):
    config = LlamaConfig(**SIZES, num_labels=1, pad_token_id=0)
    model = adapted(build(config, AutoModelForSequenceClassification).bfloat16().float(), "SEQ_CLS")
    with torch.no_grad():
        model.score.weight.mul_(1.0001)
    stored = load_file(written(model, tokenizer, tmp_path / "final", torch.bfloat16) / "model.safetensors")
    assert torch.equal(stored["score.weight"], model.score.weight)
    assert stored["model.embed_tokens.weight"].dtype == torch.bfloat16


def test_only_adapters_move_in_a_step():
    model = adapted(build(CONFIGS["llama"], attention="packed"), "CAUSAL_LM")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    layout = collate.packed(Sequences(Packed.from_lists([[5, 9, 3]]), Packed.from_lists([[70, 12]]), torch.tensor([0])))
    step = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    TokenLogprobs(model)(layout, temperature=1.0)["logprob_BT"].sum().backward()
    step.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".lora_" in name}


def test_ranks_that_do_not_keep_get_nothing_but_gather_everything():
    model, gathered = adapted(build(CONFIGS["llama"]), "CAUSAL_LM"), []

    def note(parameters: Iterable[nn.Parameter]) -> nullcontext[None]:
        gathered.extend(parameters)
        return nullcontext()

    assert export.state_dict(model, note, keep=False) == {}
    assert {id(p) for p in gathered} == {id(p) for p in model.parameters()}


def test_the_state_is_a_copy():
    model = build(CONFIGS["llama"])
    state = export.state_dict(model, whole, keep=True)
    before = state["lm_head.weight"].clone()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert torch.equal(state["lm_head.weight"], before)


@pytest.mark.parametrize("place", [0.1, 0.5, 0.99])
def test_a_flipped_bit_is_found(place, tokenizer, tmp_path):
    model = build(CONFIGS["llama"])
    state = export.state_dict(model, whole, keep=True)
    folder = written(model, tokenizer, tmp_path / "final")
    verify_export.check_weights(folder, state, type(model))
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    content[header + int(place * (len(content) - header))] ^= 1
    file.write_bytes(content)
    with pytest.raises(ModelError, match="reads back other than it was written"):
        verify_export.check_weights(folder, state, type(model))


def test_a_flipped_bit_stops_the_export(tokenizer, tmp_path):
    model = build(CONFIGS["llama"])
    state = export.state_dict(model, whole, keep=True)
    save = model.save_pretrained

    def damaged(folder: Path, **arguments: Any) -> None:
        save(folder, **arguments)
        content = bytearray((folder / "model.safetensors").read_bytes())
        content[-5] ^= 1
        (folder / "model.safetensors").write_bytes(content)

    model.save_pretrained = damaged
    with pytest.raises(ModelError, match="reads back other"):
        export.write(model, tokenizer, state, tmp_path / "final", {}, outputs(model, tokenizer))
    assert not (tmp_path / "final").exists()


def test_a_weight_that_was_not_written_is_found(tokenizer, tmp_path):
    model = build(CONFIGS["llama"])
    state = export.state_dict(model, whole, keep=True)
    folder = written(model, tokenizer, tmp_path / "final")
    with pytest.raises(ModelError, match=r"weights were not written: extra\.weight"):
        verify_export.check_weights(folder, {**state, "extra.weight": torch.ones(2)}, type(model))
    less = {name: value for name, value in state.items() if name != "lm_head.weight"}
    with pytest.raises(ModelError, match=r"lm_head\.weight reads back other"):
        verify_export.check_weights(folder, less, type(model))


def test_an_existing_target_is_refused_and_left_alone(tokenizer, tmp_path):
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "mine").write_text("precious")
    with pytest.raises(ModelError, match="final exists already"):
        written(build(CONFIGS["llama"]), tokenizer, tmp_path / "final")
    assert [file.name for file in (tmp_path / "final").iterdir()] == ["mine"]


def test_what_a_killed_export_left_is_replaced(tokenizer, tmp_path):
    (tmp_path / "final.partial").mkdir()
    (tmp_path / "final.partial" / "model-00001-of-00002.safetensors").write_text("half")
    folder = written(build(CONFIGS["llama"]), tokenizer, tmp_path / "final")
    assert [file.name for file in folder.glob("*.safetensors")] == ["model.safetensors"]
    assert not (tmp_path / "final.partial").exists()
