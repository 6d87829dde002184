"""Writing: what is read back is what was held, adapters merged."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)

from align.data import collate, toy
from align.errors import ModelError
from align.models import export, load
from align.models.heads import LastTokenScore, TokenLogprobs
from align.sections import Lora, Model
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
    return model


def written(model: Any, tokenizer: Any, folder: Path) -> Path:
    export.write(model, tokenizer, export.state_dict(model, whole, keep=True), folder, {"note.txt": "é\n"})
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
    section = Model(path=str(folder), dtype="float32")
    assert len(load.labels(section)) == 1
    assert torch.equal(load.scorer(section, 80, 0, head="trained").score.weight, model.score.weight.float())


def adapted(model: Any, task: str, seed: int = 3) -> Any:
    load.add_lora(model, Lora(rank=4, alpha=12.0), task=task)
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
    export._verify(folder, state, tokenizer, type(model))
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    content[header + int(place * (len(content) - header))] ^= 1
    file.write_bytes(content)
    with pytest.raises(ModelError, match="reads back other than it was written"):
        export._verify(folder, state, tokenizer, type(model))


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
        export.write(model, tokenizer, state, tmp_path / "final", {})
    assert not (tmp_path / "final").exists()


def test_a_weight_that_was_not_written_is_found(tokenizer, tmp_path):
    model = build(CONFIGS["llama"])
    state = export.state_dict(model, whole, keep=True)
    folder = written(model, tokenizer, tmp_path / "final")
    with pytest.raises(ModelError, match=r"weights were not written: extra\.weight"):
        export._verify(folder, {**state, "extra.weight": torch.ones(2)}, tokenizer, type(model))
    less = {name: value for name, value in state.items() if name != "lm_head.weight"}
    with pytest.raises(ModelError, match=r"lm_head\.weight reads back other"):
        export._verify(folder, less, tokenizer, type(model))


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
