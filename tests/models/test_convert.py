"""Row 0 of an output layer as a classifier's head: the same rewards, however rows are padded and cut into batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from align.cli import _run
from align.commands import build_parser
from align.config import CheckpointRewardConfig
from align.data import collate, toy
from align.errors import ModelError
from align.models import convert, heads, load
from align.rewards import card
from align.rewards.card import Card
from align.types import Packed, Sequences

SIZES: dict[str, Any] = {
    "vocab_size": 80,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
ROWS = [[1, 20, 31, 2], [1, 8, 9, 70, 12, 44, 2], [1, 30, 2], [1, 0, 9, 7, 7, 2]]
"""Conversations; one holds the padding token, and all end with an end of sequence."""


def saved(folder: Path, config: Any = None, tokenizer: Any = None) -> Path:
    torch.manual_seed(4)
    config = config or LlamaConfig(**SIZES, tie_word_embeddings=False)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder, max_shard_size="20KB")
    (tokenizer or toy.tokenizer()).save_pretrained(folder)
    return folder


def by_reader(section: RewardConfig, head: Any) -> torch.Tensor:
    prompts = Packed.from_lists([row[: len(row) // 2] for row in ROWS])
    responses = Packed.from_lists([row[len(row) // 2 :] for row in ROWS])
    sequences = Sequences(prompts, responses, torch.arange(len(ROWS)))
    with torch.no_grad():
        return head(collate.packed(sequences))["score_B"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("row0")
    source = saved(root / "source")
    arguments = build_parser().parse_args(["convert", "row0", str(source), str(root / "out")])
    assert _run(arguments, Console(quiet=True)) == 0
    return source, root / "out"


def test_reader_and_converted_folder_give_the_same_rewards(folders):
    source, out = folders
    section = CheckpointRewardConfig(path=str(source), head="lm_head_row0", dtype="float32")
    theirs = by_reader(section, heads.RowZeroLogit(load.causal_lm(section, 80, 0)))
    converted = CheckpointRewardConfig(path=str(out), dtype="float32")
    assert len(load.labels(converted)) == 1
    ours = by_reader(converted, heads.LastTokenScore(load.scorer(converted, 80, 0, head="trained")))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert theirs.std() > 0.1
    # and by hand, from transformers' own causal model
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = torch.stack([model(torch.tensor([row])).logits[0, -1, 0] for row in ROWS])
    torch.testing.assert_close(ours, logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_padding_and_batch_size_change_no_score_in_transformers(folders, side, batch):
    model: Any = AutoModelForSequenceClassification.from_pretrained(folders[1], dtype=torch.float32).eval()
    pad = model.config.pad_token_id
    alone = torch.cat([scores(model, [row], side, pad) for row in ROWS])
    cut = [ROWS[i : i + batch] for i in range(0, len(ROWS), batch)]
    torch.testing.assert_close(torch.cat([scores(model, rows, side, pad) for rows in cut]), alone, rtol=0, atol=1e-6)
    section = CheckpointRewardConfig(path=str(folders[1]), dtype="float32")
    ours = by_reader(section, heads.LastTokenScore(load.scorer(section, 80, 0, head="trained")))
    torch.testing.assert_close(alone, ours, rtol=0, atol=1e-6)


def scores(model: Any, rows: list[list[int]], side: str, pad: int) -> torch.Tensor:
    longest = max(map(len, rows))
    blank = [[pad] * (longest - len(row)) for row in rows]
    ones = [[1] * len(row) for row in rows]
    zeros = [[0] * len(one) for one in blank]
    ids, mask = (
        torch.tensor([(b + a if side == "left" else a + b) for a, b in zip(*pair, strict=True)])
        for pair in ((rows, blank), (ones, zeros))
    )
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits[:, 0]


def test_only_row_zero_and_the_body_are_written(folders):
    source, out = folders
    index = json.loads((out / "model.safetensors.index.json").read_text())
    names = set(json.loads((source / "model.safetensors.index.json").read_text())["weight_map"])
    assert set(index["weight_map"]) == names - {"lm_head.weight"} | {"score.weight"}
    assert index["metadata"]["total_size"] == sum(
        p.numel() * 4 for p in load.scorer(CheckpointRewardConfig(path=str(out)), 80, 0, head="trained").parameters()
    )
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["pad_token_id"] == 0
    assert card.read(out) == Card("sequence_classification")
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_another_family_becomes_its_own_classifier(tmp_path):
    source = saved(tmp_path / "source", Qwen2Config(**SIZES, tie_word_embeddings=False))
    assert convert.row_zero(source, tmp_path / "out", {}) == "Qwen2ForSequenceClassification"
    section = CheckpointRewardConfig(path=str(tmp_path / "out"), dtype="float32")
    row = load.row_zero(CheckpointRewardConfig(path=str(source)))
    assert torch.equal(load.scorer(section, 80, 0, head="trained").get_parameter("score.weight")[0], row)


def test_tied_and_missing_output_layers_are_refused(tmp_path):
    tied = saved(tmp_path / "tied", LlamaConfig(**SIZES, tie_word_embeddings=True))
    with pytest.raises(ModelError, match=r"has no output layer of its own \(lm_head.weight\)"):
        convert.row_zero(tied, tmp_path / "out", {})
    config = json.loads((tied / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"has no output layer of its own"):
        convert.row_zero(tied, tmp_path / "out", {})
    assert [path.name for path in tmp_path.iterdir()] == ["tied"]


def test_a_tokenizer_that_pads_with_its_end_gets_another_padding_token(tmp_path):
    tokenizer = toy.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    source = saved(tmp_path / "source", tokenizer=tokenizer)
    convert.row_zero(source, tmp_path / "out", {})
    assert AutoTokenizer.from_pretrained(tmp_path / "out").pad_token == "<pad>"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pad_token_id"] == 0


def test_a_tokenizer_that_has_nothing_but_its_end_is_refused(tmp_path):
    words = Tokenizer(models.WordLevel({"</s>": 2, **{f"w{id}": id for id in range(80) if id != 2}}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>")
    source = saved(tmp_path / "source", tokenizer=tokenizer)
    with pytest.raises(ModelError, match="has no padding token that is not an end of sequence: '</s>'"):
        convert.row_zero(source, tmp_path / "out", {})
    assert not (tmp_path / "out").exists()
