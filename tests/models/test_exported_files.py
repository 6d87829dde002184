"""What lies beside the weights: plain transformers stops, renders, pads and scores as align does."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from align.config import ModelGeneratorConfig, PolicyConfig, SamplingConfig, TrainedRewardConfig
from align.data import chat, collate
from align.data.chat import Message, Renderer
from align.errors import ModelError
from align.generators.base import Request
from align.generators.models import ModelGenerator
from align.models import exported_files, heads, load, readme
from align.models.exported_files import Chat
from align.types import Packed, Sequences

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "no newline": CHATML.replace("<|im_end|>\n", "<|im_end|>"),
    "eos": CHATML.replace("<|im_start|>", "|").replace("<|im_end|>\n", "{{ eos_token }}"),
    "no end": "{% for m in messages %}|{{ m.role }}|{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}|assistant|{% endif %}",
    "dated": "{{ date_string }}" + CHATML,
}
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
CONFIGS = {
    "llama": lambda rows: LlamaConfig(vocab_size=rows, **SIZES),
    "qwen2": lambda rows: Qwen2Config(vocab_size=rows, **SIZES),
    "gpt2": lambda rows: GPT2Config(vocab_size=rows, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3),
}
TURNS = [
    [Message("user", "question"), Message("assistant", "a longer answer than the other")],
    [Message("user", "q"), Message("assistant", "no")],
    [Message("user", "1"), Message("assistant", "a"), Message("user", "2"), Message("assistant", "<|im_end|> is b")],
]


def tokenizer(template: str = "chatml", pad: str | None = "<pad>", special: tuple[str, ...] = ()) -> Any:
    """One token a byte, then ``</s>`` (256), which is the end of sequence, and the others."""
    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({word: id for id, word in enumerate(words)}, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    marks = () if template in ("eos", "no end") else ("<|im_start|>", "<|im_end|>")
    raw.add_special_tokens([AddedToken(word, special=True) for word in ("</s>", *marks, *special)])
    given = {} if pad is None else {"pad_token": pad}
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="</s>", chat_template=TEMPLATES[template], model_max_length=512, **given
    )


PADDING = {
    "a token of its own": ({"pad": "<pad>"}, 0, "<pad>"),
    "eos, turns end otherwise": ({"pad": "</s>"}, 0, "</s>"),
    "eos, which ends turns": (
        {"template": "eos", "pad": "</s>", "special": ("<a>", "<reserved_0>")},
        0,
        "<reserved_0>",
    ),
    "missing": ({"pad": None, "special": ("<|fim_pad|>",)}, 0, "<|fim_pad|>"),
    "missing, a row to spare": ({"template": "eos", "pad": None}, 3, "<|pad|>"),
    "eos, a row to spare": ({"template": "eos", "pad": "</s>"}, 3, "<|pad|>"),
    "the end of turns": ({"pad": "<|im_end|>"}, 1, "<|pad|>"),
    "missing, no row": ({"template": "eos", "pad": None}, 0, None),
    "eos, no row": ({"template": "no end", "pad": "</s>"}, 0, None),
}


@pytest.mark.parametrize("case", PADDING)
def test_what_pads_is_in_no_conversation_and_has_a_row(case):
    keys, spare, expected = PADDING[case]
    tok = tokenizer(**keys)
    rows = len(tok) + spare
    config = LlamaConfig(vocab_size=rows, **SIZES)
    before = tok.encode("a conversation</s>")
    exported_files.set_padding(tok, config, Chat.of(Renderer(tok)))
    assert config.pad_token_id == (None if expected is None else tok.convert_tokens_to_ids(expected))
    assert expected is None or (tok.pad_token == expected and tok.pad_token_id < rows)
    assert tok.encode("a conversation</s>") == before


def dialogues(renderer: Renderer) -> list[list[int]]:
    """As a reward model in training reads them."""
    found = [renderer.dialogue_ids(turns[:-1], [turns[-1].content]) for turns in TURNS]
    return [prompt + response for prompt, (response,) in found]


def by_align(model: Any, head: Any, rows: list[list[int]]) -> torch.Tensor:
    sequences = Sequences(Packed.from_lists(rows), Packed.from_lists([[]] * len(rows)), torch.arange(len(rows)))
    with torch.no_grad():
        (outputs,) = head(model)(collate.padded(sequences, side="right")).values()
    return outputs.reshape(len(rows), -1)


def snippet(folder: Path, turns: list[Message] | None, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Names that the code of a README leaves, run in its folder as it stands or with another conversation."""
    code = (folder / readme.NAME).read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    if turns is not None:
        lines = code.splitlines()
        (place,) = (i for i, line in enumerate(lines) if line.startswith("messages = "))
        lines[place] = f"messages = {[turn._asdict() for turn in turns]!r}"
        code = "\n".join(lines)
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def written(folder: Path, model: Any, tok: Any, about: str, more: dict[str, str] | None = None) -> Path:
    exported_files.write(model, tok, model.state_dict(), folder, {readme.NAME: about, **(more or {})})
    exported_files.verify(folder, tok, trust_remote_code=False)
    return folder


REWARDS = [
    ("llama", {"template": "chatml", "pad": "</s>"}, 0, 1),
    ("qwen2", {"template": "no newline", "pad": None, "special": ("<|endoftext|>",)}, 0, 2),
    ("gpt2", {"template": "eos", "pad": "</s>"}, 4, 1),
    ("gpt2", {"template": "dated", "pad": "<pad>"}, 0, 2),
    ("llama", {"template": "no end", "pad": None, "special": ("<unused>",)}, 0, 1),
    ("llama", {"template": "eos", "pad": None}, 0, 2),
]


@pytest.mark.parametrize(("family", "keys", "spare", "labels"), REWARDS)
def test_plain_transformers_scores_as_align_does(family, keys, spare, labels, tmp_path, monkeypatch):
    tok = tokenizer(**keys)
    date = "26 Jul 2024" if keys["template"] == "dated" else None
    renderer = Renderer(tok, date=date)
    rows, settings = dialogues(renderer), Chat.of(renderer)
    config = CONFIGS[family](len(tok) + spare)
    config.num_labels = labels
    if labels == 2:
        config.id2label, config.label2id = {0: "a", 1: "b"}, {"a": 0, "b": 1}
    torch.manual_seed(3)
    model: Any = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()
    exported_files.set_padding(tok, model.config, settings)
    pads = model.config.pad_token_id is not None
    assert pads is not (labels == 2 and keys["template"] == "eos")
    about = readme.reward("Trained.", settings, tok, pads, weighted=labels == 2, trust=False)
    weights = {"a": 0.5, "b": -2.0}
    folder = written(tmp_path / "final", model, tok, about, {"align_reward.json": json.dumps({"weights": weights})})
    head = heads.LastTokenAttributes if labels == 2 else heads.LastTokenScore
    ours = by_align(model, head, rows)
    score_B = ours @ torch.tensor(list(weights.values())) if labels == 2 else ours[:, 0]
    assert score_B.std() > 0.05
    for turns, score in zip(TURNS[:2], score_B, strict=False):
        found = snippet(folder, turns, monkeypatch)["scores"]
        torch.testing.assert_close(found[0].detach(), score, rtol=0, atol=1e-5)
    assert snippet(folder, None, monkeypatch)["scores"].shape == (1,)
    if not pads:
        return
    again: Any = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    plain: Any = AutoTokenizer.from_pretrained(folder)
    for side in ("left", "right"):
        batch = plain.pad({"input_ids": rows}, padding_side=side, return_tensors="pt")
        mask = batch["attention_mask"]
        places = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if family == "gpt2" else {}
        with torch.no_grad():
            theirs = again(input_ids=batch["input_ids"], attention_mask=mask, **places).logits
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


def greedy_policy(folder: Path, base: dict[str, Any]) -> tuple[PolicyConfig, Any]:
    """A model that answers ``hello`` with three tokens and ``<|im_end|>``; its checkpoint names ``</s>`` alone."""
    tok = tokenizer(pad="</s>")
    torch.manual_seed(1)
    config = LlamaConfig(vocab_size=len(tok), **SIZES, tie_word_embeddings=False, eos_token_id=256)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    ids = torch.tensor([Renderer(tok).prompt_ids([Message("user", "hello")])])
    end = tok.convert_tokens_to_ids("<|im_end|>")
    drawn = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)[0, ids.shape[1] :]
    place = next(t for t in range(2, 8) if int(drawn[t]) not in (*drawn[:t].tolist(), end))
    with torch.no_grad():
        model.lm_head.weight[[end, int(drawn[place])]] = model.lm_head.weight[[int(drawn[place]), end]]
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(base))
    return PolicyConfig(path=str(folder), dtype="float32"), int(place) + 1


def test_plain_transformers_stops_where_align_does(tmp_path, monkeypatch):
    """With a base whose generation config has a penalty, a least length and a sampling field that would part them."""
    base = {"eos_token_id": 256, "max_new_tokens": 30, "repetition_penalty": 5.0, "min_new_tokens": 25, "top_p": 0.1}
    section, length = greedy_policy(tmp_path / "base", base)
    for folder in (tmp_path / "first", tmp_path / "second"):
        settings = exported_files.try_out(section, Renderer(chat.load_tokenizer(section.path)))
        tok = chat.load_tokenizer(section.path)
        model = load.causal_lm(section, len(tok), 0)
        exported_files.set_stop_ids(model, settings.stop_ids)
        about = readme.policy("Trained.", settings, tok, [256, 258], trust=False)
        written(folder, model, tok, about)
        stored = json.loads((folder / "generation_config.json").read_text())
        assert stored.pop("transformers_version")
        assert stored == {"eos_token_id": [256, 258], "max_new_tokens": 30}
        assert json.loads((folder / "config.json").read_text())["eos_token_id"] == [256, 258]
        section = PolicyConfig(path=str(folder), dtype="float32")
    generator = ModelGenerator(ModelGeneratorConfig(path=section.path, dtype="float32"), torch.device("cpu"), 0)
    sampling = SamplingConfig(num_samples=1, max_tokens=30, temperature=0.0)
    (answer,) = generator.complete([Request((Message("user", "hello"),), 0)], sampling)
    names = snippet(tmp_path / "second", [Message("user", "hello")], monkeypatch)
    theirs = names["ids"][0, names["inputs"].input_ids.shape[1] :]
    assert (len(theirs), answer.tokens, answer.finished) == (length, length, True)
    assert names["tokenizer"].decode(theirs, skip_special_tokens=True) == answer.text


def test_stop_ids_beyond_the_vocabulary_go_and_other_fields_stay():
    config = LlamaConfig(vocab_size=300, **SIZES)
    model: Any = SimpleNamespace(config=config, generation_config=SimpleNamespace(eos_token_id=[5, 300], top_k=4))
    exported_files.set_stop_ids(model, (7,))
    assert (config.eos_token_id, model.generation_config.eos_token_id) == ([5, 7], [5, 7])
    assert model.generation_config.top_k is None  # no use without do_sample, and refused by transformers
    model.generation_config = SimpleNamespace(do_sample=True, top_k=4, temperature=0.6, num_beams=4)
    exported_files.set_stop_ids(model, (7,))
    kept = model.generation_config
    assert (config.eos_token_id, kept.eos_token_id, kept.do_sample, kept.top_k, kept.temperature) == (
        7,
        [7],
        True,
        4,
        0.6,
    )
    assert kept.num_beams is None


def test_random_weights_stop_by_their_tokenizer_alone():
    section = PolicyConfig(init={"model_type": "llama", **SIZES}, path="x")
    assert load.without_weights(section, 300).config.eos_token_id is None  # 2 is the family's, another token here


TOKENIZER = """
import os
from transformers import PreTrainedTokenizer
from .letters import LETTERS
class OwnTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "words.own"}
    def __init__(self, vocab_file=None, **keys):
        self.letters = LETTERS
        super().__init__(**keys)
    @property
    def vocab_size(self):
        return 256
    def get_vocab(self):
        return {chr(i): i for i in range(256)} | self.added_tokens_encoder
    def _tokenize(self, text):
        return list(text)
    def _convert_token_to_id(self, token):
        return ord(token) if ord(token) < 256 else 63
    def _convert_id_to_token(self, index):
        return chr(index)
    def save_vocabulary(self, folder, filename_prefix=None):
        {save}
"""
MODEL = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own_llama"
class OwnLM(LlamaForCausalLM):
    config_class = OwnConfig
    def forward(self, *arguments, **keys):
        output = super().forward(*arguments, **keys)
        output.logits = 2 * output.logits
        return output
"""
SAVES = 'file = os.path.join(folder, "words.own"); open(file, "w").write("x"); return (file,)'


def own_code(folder: Path, save: str = SAVES) -> PolicyConfig:
    """A checkpoint whose tokenizer, config and model are Python files of its own."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=258, **SIZES), dtype=torch.float32)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "own_model.OwnConfig", "AutoModelForCausalLM": "own_model.OwnLM"}
    config |= {"model_type": "own_llama", "architectures": ["OwnLM"], "auto_map": names}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own_model.py").write_text(MODEL)
    (folder / "own_tokenizer.py").write_text(TOKENIZER.replace("{save}", save))
    (folder / "letters.py").write_text("LETTERS = 256\n")
    (folder / "words.own").write_text("x")
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own_tokenizer.OwnTokenizer", None]}}
    marks = {"eos_token": "</s>", "pad_token": "<pad>", "chat_template": TEMPLATES["no end"]}
    (folder / "tokenizer_config.json").write_text(json.dumps({**own, **marks}))
    return PolicyConfig(path=str(folder), dtype="float32", trust_remote_code=True)


def test_code_of_tokenizer_config_and_model_travels(tmp_path):
    section = own_code(tmp_path / "base")
    tok = chat.load_tokenizer(section.path, trust_remote_code=True)
    exported_files.try_out(section, Renderer(tok))
    model: Any = load.causal_lm(section, len(tok), 0).eval()
    exported_files.write(model, tok, model.state_dict(), tmp_path / "final", exported_files.code(section))
    exported_files.verify(tmp_path / "final", tok, trust_remote_code=True)
    for file in ("own_model.py", "own_tokenizer.py", "letters.py"):
        assert (tmp_path / "final" / file).read_text() == (tmp_path / "base" / file).read_text()
    plain: Any = AutoTokenizer.from_pretrained(tmp_path / "final", trust_remote_code=True)
    ids = plain("A question</s>", add_special_tokens=False).input_ids
    assert ids == tok.encode("A question</s>") == [*b"A question", 256]
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "final", trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.equal(again(torch.tensor([ids])).logits, model(torch.tensor([ids])).logits)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda base: own_code(base, "raise NotImplementedError('no')"), "cannot be exported: NotImplementedError: no"),
        (lambda base: own_code(base) and (base / "letters.py").unlink(), "the tokenizer cannot be loaded|letters"),
    ],
    ids=["saves nothing", "lacks a module"],
)
def test_what_cannot_be_exported_is_refused_without_a_step(damage, message, tmp_path):
    renderer = Renderer(tokenizer("no end"))
    damage(tmp_path / "base")
    with pytest.raises((ModelError, chat.DataError), match=message) as caught:
        exported_files.try_out(PolicyConfig(path=str(tmp_path / "base"), trust_remote_code=True), renderer)
    assert caught.value.exit_status == 78 and caught.value.remedy


def test_a_tokenizer_that_reads_back_otherwise_is_refused(tmp_path):
    section = own_code(tmp_path / "base")
    tok: Any = chat.load_tokenizer(section.path, trust_remote_code=True)
    tok.save_pretrained(tmp_path / "final")
    (tmp_path / "final" / "config.json").write_bytes((tmp_path / "base" / "config.json").read_bytes())
    (tmp_path / "final" / "own_model.py").write_text(MODEL)
    tok._tokenize = lambda text: list(text[::-1])
    with pytest.raises(ModelError, match="the tokenizer reads back other than it was written"):
        exported_files.verify(tmp_path / "final", tok, trust_remote_code=True)


def test_code_that_was_not_used_is_not_named(tmp_path):
    """As of Phi-3, whose class transformers has: ``auto_map`` would name files that are not in the folder."""
    tok = tokenizer()
    model: Any = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tok), **SIZES))
    model.config.auto_map = {"AutoModelForCausalLM": "modeling_x.X"}
    folder = written(tmp_path / "final", model, tok, "")
    assert "auto_map" not in json.loads((folder / "config.json").read_text())


def test_a_reward_model_is_tried_out_with_its_head(tmp_path):
    section, _ = greedy_policy(tmp_path / "base", {"eos_token_id": 256})
    attributes = TrainedRewardConfig(path=section.path, attributes=["helpfulness", "verbosity"])
    settings = exported_files.try_out(attributes, Renderer(chat.load_tokenizer(section.path)))
    assert (settings.end_id, settings.end, settings.loader) == (258, "cut", "AutoTokenizer")
    assert load.without_weights(attributes, 259).get_parameter("score.weight").shape == (2, 32)
