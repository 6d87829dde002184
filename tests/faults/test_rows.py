"""Rows of data that are wrong, at the level of the command: status 78 with file, line and reason before any worker
starts, or skipped and counted. What is harmless is read, and tested here as well."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from align import launch
from align.cli import main
from align.config.load import load_recipe
from align.data import toy
from align.errors import AlignError

RECIPE = """
algorithm: reward_model
run: {{dir: {run}, steps: 1, progress: none, trackers: []}}
data: {{path: {data}, max_response_tokens: 8}}
batch_size: 1
reward: {{path: {model}, dtype: float32, init: {init}, optimizer: {{lr: 1e-3}}}}
placement: {{reward: 0}}
"""
INIT = "{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 4}"
REACHED = 99


class WouldStart(AlignError):
    """Every check has passed, and now workers would start."""

    exit_status = REACHED


@pytest.fixture(autouse=True)
def no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    def cast(*_: object) -> Any:
        raise WouldStart("workers would start now")

    monkeypatch.setattr(launch, "start_roles", cast)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    toy.tokenizer().save_pretrained(folder)
    return folder


def row(prompt: str = "repeat the words : cat dog", **changes: Any) -> dict[str, Any]:
    return {
        "domain": "general",
        "language": "english",
        "context": [{"role": "user", "content": prompt}],
        "response1": "cat dog",
        "response2": "cat pig",
        "overall_preference": -2,
    } | changes


def encoded(*rows: Any) -> bytes:
    """Lines of a file; bytes are taken as they are."""
    return b"".join((one if isinstance(one, bytes) else json.dumps(one).encode()) + b"\n" for one in rows)


class Command:
    """``align train`` on a folder of one split under test and one sound split."""

    def __init__(self, folder: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]):
        self.folder, self.tokenizer, self.capsys = folder, tokenizer, capsys
        self.file, self.run = folder / "data" / "preference" / "train.jsonl", folder / "run"

    def __call__(self, train: bytes, *overrides: str, suffix: str = "jsonl") -> tuple[int, str]:
        """Exit status and what was printed on stderr."""
        self.file = self.file.with_name(f"train.{suffix}")
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_bytes(train)
        (self.file.parent / "validation.jsonl").write_bytes(encoded(row("say the last word : cat dog")))
        recipe = self.folder / "recipe.yaml"
        recipe.write_text(RECIPE.format(run=self.run, data=self.folder / "data", model=self.tokenizer, init=INIT))
        status = main(["train", str(recipe), *overrides])
        return status, self.capsys.readouterr().err

    def counts(self) -> dict[str, Any]:
        """What became of the rows of train, as the run says, with what became of the pairs."""
        told = json.loads((self.run / "data.json").read_text())
        return told["source"]["train"] | {"prepared": told["prepared"]}


@pytest.fixture
def command(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path, tokenizer, capsys)


BAD_ROWS = {
    "half a line": (json.dumps(row()).encode()[:50], "row is not JSON"),
    "not JSON": (b"domain: general", "row is not JSON"),
    "a hole of NUL bytes": (b"\0" * 4096, "row is not JSON"),
    "a NUL byte in a text": (json.dumps(row()).replace("cat dog", "cat\0dog").encode(), "row is not JSON"),
    "10 MB without a quote": (b"x" * 10_000_000, "row is not JSON"),
    "a mark of byte order in the middle": (b"\xef\xbb\xbf" + json.dumps(row()).encode(), "row is not JSON"),
    "UTF-16": (json.dumps(row()).encode("utf-16-le"), "row is not JSON"),
    "Latin-1": (json.dumps(row("caf\xe9"), ensure_ascii=False).encode("latin-1"), "row is not UTF-8"),
    "a missing key": ({k: v for k, v in row().items() if k != "response2"}, "response2 is missing"),
    "a key twice": (json.dumps(row()).replace("{", '{"response1": "owl", ', 1).encode(), "row has a duplicate key"),
    "null": (row(response1=None), "response1 is NoneType, not text"),
    "a number in place of text": (row(response1=7), "response1 is int, not text"),
    "text in place of a number": (row(overall_preference="2"), "overall_preference is not an integer"),
    "NaN": (row(overall_preference=float("nan")), "overall_preference is not an integer"),
    "an empty prompt": (row(" "), "context ends with an empty user turn"),
    "an empty chosen response": (row(response1=""), "response1 is the preferred response but is empty"),
    "an unpaired surrogate pair": (row(response1="cat \ud83d"), "response1 has an unpaired surrogate"),
    "roles out of order": (
        row(context=[{"role": "assistant", "content": "cat"}, {"role": "user", "content": "dog"}]),
        "context roles do not alternate",
    ),
    "a label out of range": (row(overall_preference=-100), "overall_preference is outside -3 to 3"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_stops_the_command_with_its_line_and_leaves_no_run_folder(command: Command, name: str):
    bad, reason = BAD_ROWS[name]
    status, said = command(encoded(row("say the first word : cat dog"), bad))
    assert status == 78, said
    assert said.startswith(f"align: {command.file}:2: {reason}"), said
    assert "data.bad_rows=skip" in said
    assert len(said) < 600
    assert not command.run.exists()


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_skipped_and_counted_where_the_recipe_says_so(command: Command, name: str):
    bad, reason = BAD_ROWS[name]
    status, said = command(encoded(row("say the first word : cat dog"), bad), "data.bad_rows=skip")
    assert status == REACHED, said
    counts = command.counts()
    assert (counts["read"], counts["kept"], sum(counts["bad"].values())) == (2, 1, 1)
    assert next(iter(counts["bad"])).startswith(reason)


@pytest.mark.parametrize("bad_rows", ["stop", "skip"])
def test_a_last_line_cut_in_half_is_a_bad_row(command: Command, bad_rows: str):
    """A file of plain lines that was not copied whole cannot be told from one that ends with a bad row."""
    whole = encoded(row("say the first word : cat dog"), row())
    status, said = command(whole[:-40], f"data.bad_rows={bad_rows}")
    if bad_rows == "stop":
        assert (status, f"{command.file}:2: row is not JSON" in said) == (78, True)
    else:
        assert (status, command.counts()["bad"]) == (REACHED, {"row is not JSON": 1})


@pytest.mark.parametrize("bad_rows", ["stop", "skip"])
@pytest.mark.parametrize("content", [b"", b"\n\r\n \n"], ids=["empty", "blank lines"])
def test_a_file_without_rows_stops_whatever_is_skipped(command: Command, content: bytes, bad_rows: str):
    status, said = command(content, f"data.bad_rows={bad_rows}")
    assert status == 78
    assert "no rows are left in split train" in said
    assert "read=0" in said
    assert not command.run.exists()


def test_a_file_of_nothing_but_bad_rows_stops_though_they_are_skipped(command: Command):
    status, said = command(encoded(b"{", b"}", row(response1="")), "data.bad_rows=skip")
    assert status == 78
    assert "'row is not JSON': 2, 'response1 is the preferred response but is empty': 1" in said
    assert not command.run.exists()


def test_no_rows_are_read_where_the_recipe_asks_for_none(command: Command):
    status, said = command(encoded(row()), "data.max_rows=0")
    assert (status, "no rows are left in split validation" in said) == (78, True)
    assert not command.run.exists()


@pytest.mark.parametrize("bad_rows", ["stop", "skip"])
@pytest.mark.parametrize("cut", [30, 1, 8], ids=["in the data", "in the length", "without checksum"])
def test_a_gzip_torso_stops_whatever_is_skipped(command: Command, cut: int, bad_rows: str):
    """No one can say how many rows are lost."""
    rows = [row(f"say the first word : cat {n}") for n in range(100)]
    content = gzip.compress(encoded(*rows))[:-cut]
    status, said = command(content, f"data.bad_rows={bad_rows}", suffix="jsonl.gz")
    assert status == 78, said
    assert f"{command.file}:" in said
    assert "the file is damaged after this line" in said
    assert not command.run.exists()


def test_a_flipped_bit_of_a_gzip_file_is_seen(command: Command):
    content = bytearray(gzip.compress(encoded(*[row(f"say the first word : cat {n}") for n in range(100)])))
    content[-6] ^= 1  # of the checksum, so that every row still unpacks
    status, said = command(bytes(content), suffix="jsonl.gz")
    assert status == 78
    assert "the file is damaged after this line: CRC check failed" in said
    assert not command.run.exists()


HARMLESS = {
    "CRLF": encoded(row("a"), row("b")).replace(b"\n", b"\r\n"),
    "no line end after the last row": encoded(row("a"), row("b"))[:-1],
    "a mark of byte order at the start": b"\xef\xbb\xbf" + encoded(row("a"), row("b")),
    "keys that are not read": encoded(row("a", extra={"nested": [1]}), row("b", individual_preference=None)),
    "an escaped NUL": encoded(row("a", response2="cat\0pig"), row("b")),
    "an empty response that lost": encoded(row("a", response2=""), row("b")),
    "emoji as a pair of surrogates": encoded(row("a", response2="\ud83d\ude00"), row("b")),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_harmless_is_read(command: Command, name: str):
    status, said = command(HARMLESS[name])
    assert status == REACHED, said
    counts = command.counts()
    assert (counts["read"], counts["kept"], counts["bad"]) == (2, 2, {})
    assert counts["prepared"]["kept"] == 2


def test_the_same_row_twice_is_counted_and_kept_once(command: Command):
    """Rows have no ids of their own; an extra key with an equal id is no duplicate, the same texts are."""
    status, said = command(encoded(row("a", id=1), row("b", id=1), row("a", id=2, overall_preference=1)))
    assert status == REACHED, said
    assert (command.counts()["duplicates"], command.counts()["kept"]) == (1, 2)


@pytest.mark.parametrize(
    ("responses", "reason"),
    [
        (("cat dog", "cat dog"), "identical"),
        (("cat  dog", "cat dog"), "identical"),
        (("cat " * 8 + "dog", "cat " * 8 + "pig"), "too_long"),
    ],
    ids=["the same text", "the same tokens", "the same up to the limit"],
)
def test_responses_that_cannot_be_told_apart_are_dropped_and_counted(
    command: Command, responses: tuple[str, str], reason: str
):
    """Nothing is ever cut, so two responses that agree up to ``max_response_tokens`` never become the same: a row with
    a response beyond it is dropped."""
    bad = row("a", response1=responses[0], response2=responses[1])
    status, said = command(encoded(bad, row("b")))
    assert status == REACHED, said
    assert (command.counts()["prepared"][reason], command.counts()["prepared"]["kept"]) == (1, 1)
    status, said = command(encoded(bad), f"run.dir={command.folder / 'other'}")
    assert status == 78
    assert f"{reason} 1" in said
    assert not (command.folder / "other").exists()


def test_a_prompt_longer_than_the_window_is_dropped_and_counted(command: Command):
    long = row("repeat the words : " + "cat " * 20)
    status, said = command(encoded(long, row("b")), "data.max_prompt_tokens=12")
    assert status == REACHED, said
    assert (command.counts()["prepared"]["too_long"], command.counts()["prepared"]["kept"]) == (1, 1)
    status, said = command(encoded(long), "data.max_prompt_tokens=12", f"run.dir={command.folder / 'other'}")
    assert status == 78
    assert "no pairs are left in the data" in said
    assert "too_long 1" in said
    assert not (command.folder / "other").exists()


@pytest.mark.slow  # 7 s: the row is tokenized before its length is known
def test_a_sound_row_of_10_MB_is_dropped_for_its_length(command: Command):
    status, said = command(encoded(row("a", response2="cat " * 2_500_000), row("b")))
    assert status == REACHED, said
    counts = command.counts()
    assert (counts["kept"], counts["prepared"]["too_long"], counts["prepared"]["kept"]) == (2, 1, 1)


def test_a_row_that_the_template_refuses(command: Command):
    """As Gemma's template refuses a system turn."""
    template, text = command.folder / "template.jinja", str(toy.tokenizer().chat_template)
    template.write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + text
    )
    rows = encoded(row("a"), row(context=[{"role": "system", "content": "b"}, {"role": "user", "content": "c"}]))
    status, said = command(rows, f"data.chat_template={template}")
    assert status == 78, said
    assert f"{command.file}:2: {template} cannot render the row: the template fails: no system role" in said
    assert "data.bad_rows=skip" in said and not command.run.exists()
    status, said = command(rows, f"data.chat_template={template}", "data.bad_rows=skip")
    assert status == REACHED, said
    assert (command.counts()["prepared"]["not_rendered"], command.counts()["prepared"]["kept"]) == (1, 1)


def test_a_batch_larger_than_the_data(command: Command):
    rows = encoded(row("a"), row("b"), row("c", response2="cat dog"))  # the last one is identical
    status, said = command(rows, "batch_size=3")
    assert status == 78
    assert "batch_size is 3, and the data has 2 rows to draw from" in said
    assert "data.repeat_within_batch=true" in said and not command.run.exists()
    assert command(rows, "batch_size=3", "data.repeat_within_batch=true")[0] == REACHED
    assert command(rows, "batch_size=0", f"run.dir={command.folder / 'other'}")[0] == 78


def test_epochs_in_place_of_steps(command: Command):
    file = command.folder / "recipe.yaml"
    assert command(encoded(row("a"), row("b")))[0] == REACHED
    text = file.read_text().replace("steps: 1", "epochs: 2.5").replace(str(command.run), str(command.folder / "other"))
    file.write_text(text)
    assert main(["train", str(file), "--dry-run"]) == 0
    assert "2.5 epochs on" in command.capsys.readouterr().out
    assert main(["train", str(file)]) == REACHED
    assert "2.5 epochs: run.steps 5 x batch_size 1 / 2 rows" in command.capsys.readouterr().out
    assert load_recipe(command.folder / "other" / "config.yaml").config.run.steps == 5
    assert main(["train", str(file)]) == REACHED  # the same run
    assert main(["train", str(file), "run.epochs=3"]) == REACHED  # no step was taken yet
    assert "3 epochs: run.steps 6 x batch_size 1 / 2 rows" in command.capsys.readouterr().out
