"""Extrapolation: the formula weight by weight, its ends bit for bit, and what is refused before anything is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, LlamaConfig

from align import __version__
from align.cli import _run
from align.commands import build_parser
from align.data import toy
from align.errors import AlignError, ModelError
from align.models import merge
from align.rewards import card
from align.rewards.card import Card, ScoreMoments

CONFIG: dict[str, Any] = {
    "vocab_size": 80,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_labels": 1,
}


def saved(folder: Path, seed: int, dtype: Any = torch.float32, **config: Any) -> Path:
    torch.manual_seed(seed)
    changed: Any = LlamaConfig(**{**CONFIG, **config})
    model: Any = AutoModelForSequenceClassification.from_config(changed, dtype=dtype)
    model.save_pretrained(folder, max_shard_size="10KB")
    toy.tokenizer().save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: value for file in files for name, value in load_file(file).items()}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.fixture(scope="module")
def ends(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("ends")
    return saved(root / "weak", 1), saved(root / "strong", 2)


def test_every_weight_is_extrapolated_in_the_files_of_strong(ends: tuple[Path, Path], tmp_path):
    weak, strong = ends
    out = tmp_path / "out"
    assert merge.expo(weak, strong, out, 1.52, {}) == len(weights(strong))
    low, high, found = weights(weak), weights(strong), weights(out)
    assert found.keys() == high.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, low[name] + 1.52 * (high[name] - low[name]), rtol=1e-6, atol=1e-7)
    names = {*(file.name for file in strong.iterdir()), "align_manifest.json"}
    assert {file.name for file in out.iterdir()} == names and len(list(out.glob("*.safetensors"))) > 2
    old, new = (json.loads((folder / "model.safetensors.index.json").read_text()) for folder in (strong, out))
    assert old["weight_map"] == new["weight_map"]
    assert (out / "config.json").read_bytes() == (strong / "config.json").read_bytes()
    loaded: Any = AutoModelForSequenceClassification.from_pretrained(out)
    assert torch.equal(loaded.score.weight, found["score.weight"])


def test_arithmetic_is_in_float32_whatever_the_format(tmp_path):
    weak, strong = (saved(tmp_path / name, seed, torch.bfloat16) for name, seed in (("weak", 1), ("strong", 2)))
    merge.expo(weak, strong, tmp_path / "out", 1.52, {})
    low, high, found = (weights(folder) for folder in (weak, strong, tmp_path / "out"))
    exact = {name: low[name].float() + 1.52 * (high[name].float() - low[name].float()) for name in low}
    assert all(value.dtype == torch.bfloat16 for value in found.values())
    assert all(torch.equal(found[name], exact[name].bfloat16()) for name in found)
    rough = {name: low[name] + 1.52 * (high[name] - low[name]) for name in low}
    assert any(not torch.equal(found[name], rough[name]) for name in found)  # else this test could not fail


@pytest.mark.parametrize(("alpha", "end"), [(0.0, 0), (1.0, 1)])
def test_the_ends_come_back_bit_for_bit(ends: tuple[Path, Path], alpha, end, tmp_path):
    merge.expo(*ends, tmp_path / "out", alpha, {})
    wanted, found = weights(ends[end]), weights(tmp_path / "out")
    assert all(bits(found[name]) == bits(wanted[name]) for name in wanted)


def other_shape(weak: Path) -> str:
    shutil.rmtree(weak)
    saved(weak, 1, intermediate_size=32)
    return "the configs differ: intermediate_size is 32 and 24"


def other_format(weak: Path) -> str:
    shutil.rmtree(weak)
    saved(weak, 1, torch.bfloat16)
    config = json.loads((weak / "config.json").read_text()) | {"dtype": "float32"}
    (weak / "config.json").write_text(json.dumps(config))
    return r"the weights differ: model\.embed_tokens\.weight is \('BF16', \(80, 16\)\) and \('F32', \(80, 16\)\)"


def other_words(weak: Path) -> str:
    file = weak / "tokenizer.json"
    file.write_text(file.read_text().replace('"ant"', '"gnu"'))
    return "WEAK .* and STRONG .* have different tokenizers"


def other_template(weak: Path) -> str:
    (weak / "chat_template.jinja").write_text("{{ messages }}")
    return "the chat templates differ"


def no_weights(weak: Path) -> str:
    next(weak.glob("*.safetensors")).unlink()
    return "which is not in the folder"


@pytest.mark.parametrize("spoil", [other_shape, other_format, other_words, other_template, no_weights])
def test_two_that_do_not_fit_leave_nothing_behind(ends: tuple[Path, Path], spoil, tmp_path):
    weak = Path(shutil.copytree(ends[0], tmp_path / "weak"))
    message = spoil(weak)
    with pytest.raises(AlignError, match=message):
        merge.expo(weak, ends[1], tmp_path / "out", 1.5, {})
    assert [path.name for path in tmp_path.iterdir()] == ["weak"]


def test_weights_out_of_range_leave_nothing_behind(ends: tuple[Path, Path], tmp_path):
    with pytest.raises(ModelError, match="is not finite with alpha 1e[+]39"):
        merge.expo(*ends, tmp_path / "out", 1e39, {})
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_left_alone(ends: tuple[Path, Path], tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match="exists already"):
        merge.expo(*ends, tmp_path / "out", 1.5, {})
    assert not list((tmp_path / "out").iterdir())


def test_the_command_carries_the_card_over_without_its_moments(ends: tuple[Path, Path], tmp_path):
    strong = Path(shutil.copytree(ends[1], tmp_path / "strong"))
    given = Card("sequence_classification", moments=ScoreMoments(1.0, 2.0, 3), data="d", loss="scaled")
    (strong / card.NAME).write_text(given.dumps())
    console = Console(record=True, width=500)
    arguments = build_parser().parse_args(["merge", "expo", str(ends[0]), str(strong), str(tmp_path / "out")])
    assert arguments.alpha == 1.52
    assert _run(arguments, console) == 0
    assert card.read(tmp_path / "out") == Card("sequence_classification", data="d", loss="scaled")
    assert "without the moments, which belong to other scores" in console.export_text()
    about = (tmp_path / "out" / "README.md").read_text()
    assert f"of align {__version__}: `{ends[0]}` (weak) and `{strong}` (strong), extrapolated with alpha 1.52." in about
