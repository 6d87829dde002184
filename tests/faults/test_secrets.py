"""Secrets of the environment, which no output, file or process may show."""

from __future__ import annotations

import ast
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from secret_names import SECRET_NAMES

from align import prepare
from align.cli import main
from align.utils.security import RedactedStream, redact, secrets

ROOT = Path(__file__).parents[2]


WORDS = (
    *("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL", "api_key", "PASSWD", "AUTH", "AUTHORIZATION", "DSN", "PWD"),
    *("CREDENTIALS", "COOKIE", "SESSION", "PASSPHRASE"),
)


def test_secrets_are_told_by_their_names_and_by_their_length(monkeypatch: pytest.MonkeyPatch):
    for name in list(os.environ):
        monkeypatch.delenv(name)
    held = {f"X_{word}_Y": f"{word}-0123" for word in WORDS}
    others = {
        "HOME": "/home/somebody",
        "TOKENIZERS_PARALLELISM": "false-and-long",
        "RAY_AUTH_TOKEN_PATH": "/home/somebody/token",
        "AWS_SHARED_CREDENTIALS_FILE": "/home/somebody/aws",
        "SHORT_TOKEN": "1234567",
        "PWD": "/home/somebody",
        "OLDPWD": "/home/somebody",
        "SSH_AUTH_SOCK": "/run/somebody/agent",
        "GIT_AUTHOR_NAME": "somebody",
        "XAUTHORITY": "/home/somebody/x",
    }
    for name, value in (held | others).items():
        monkeypatch.setenv(name, value)
    assert secrets() == held


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("no secret", "no secret"),
        ("a p&ss'w\nord/8 b p&ss'w\nord/8", "a <DB_PASSWORD> b <DB_PASSWORD>"),
        (f"{chr(10)}{['p&ss' + chr(39) + 'w' + chr(10) + 'ord/8']}", '\n["<DB_PASSWORD>"]'),
        ("https://me:p%26ss%27w%0Aord%2F8@host/", "https://me:<DB_PASSWORD>@host/"),
        ("short-one and short-one-and-longer", "<A_TOKEN> and <B_TOKEN>"),
        (json.dumps("p&ss'w\nord/8"), '"<DB_PASSWORD>"'),
        (
            "postgres://me:s3cr@t@db:5432/x and http://h:80/a@b",
            "postgres://me:<password>@db:5432/x and http://h:80/a@b",
        ),
        ("['redis://:hunter2@h/0', 'b@c']", "['redis://:<password>@h/0', 'b@c']"),
        ("https://ghp_0123456789abcdefghij@github.com/a", "https://<token>@github.com/a"),
        ("GET http://h/a?x=1&api_key=abc&y=2", "GET http://h/a?x=1&api_key=<secret>&y=2"),
        ("Authorization: Bearer abcdefghijklmnop", "Authorization: Bearer <token>"),
        ("ssh://git@host/a, mailto:a@b.c, user@host:path", "ssh://git@host/a, mailto:a@b.c, user@host:path"),
    ],
)
def test_values_are_replaced_by_their_names(text: str, redacted: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DB_PASSWORD", "p&ss'w\nord/8")
    monkeypatch.setenv("A_TOKEN", "short-one")
    monkeypatch.setenv("B_TOKEN", "short-one-and-longer")
    assert redact(text) == redacted


def test_an_error_for_the_user_shows_no_secret(recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "canary-0123456789")
    assert main(["train", str(recipe), "data.path=/nowhere/canary-0123456789"]) == 78
    said = capsys.readouterr().err
    assert "/nowhere/<HF_TOKEN>: there is no such file or folder" in said
    assert "canary" not in said


def test_a_password_in_a_recipe_is_shown_nowhere(recipe: Path, capsys):
    for command, status in (["show"], 0), (["train"], 78):
        assert main([*command, str(recipe), "data.path=https://me:hunter22@host/d"]) == status
        out, err = capsys.readouterr()
        assert "https://me:<password>@host/d" in out + err
        assert "hunter22" not in out + err


def test_what_a_worker_writes_is_redacted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "canary-0123456789")
    held = io.StringIO()
    stream = RedactedStream(held)
    print("a canary-01234", end="", file=stream)
    print("56789 b\nc", end="", file=stream)
    assert held.getvalue() == "a <HF_TOKEN> b\n"
    stream.flush()
    assert held.getvalue() == "a <HF_TOKEN> b\nc"


def test_an_unexpected_error_is_printed_with_its_traceback_and_without_secrets(recipe: Path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "canary-0123456789")

    def fail(*_: object) -> None:
        raise RuntimeError("cannot log in with canary-0123456789")

    monkeypatch.setattr(prepare, "check_roles", fail)
    assert main(["train", str(recipe)]) == 1
    out, err = capsys.readouterr()
    assert err.endswith("RuntimeError: cannot log in with <HF_TOKEN>\n")
    assert "in fail" in err
    assert "canary" not in out + err


CANARIES = {
    name: f"canary-{number:02d}-0123456789abcdef" for number, name in enumerate([*SECRET_NAMES, "A_KEY", "B_TOKEN"])
}


def found_in(folder: Path) -> list[Path]:
    """Files below a folder that hold a canary, or are named after one."""
    held = []
    for file in folder.rglob("*"):
        try:
            if "canary-" in file.name or (file.is_file() and b"canary-" in file.read_bytes()):
                held.append(file)
        except OSError:  # it ended meanwhile
            continue
    return held


def command_lines() -> str:
    lines = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(file.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return "\n".join(lines)


FAILING = """
import os
from transformers import LlamaConfig, LlamaForSequenceClassification

class Config(LlamaConfig):
    model_type = "leaky"

class Model(LlamaForSequenceClassification):
    config_class = Config

    def __init__(self, config):
        secrets = " ".join(os.environ.get(name, "nothing") for name in {names})
        raise LookupError(f"cannot log in with {{secrets}}")
"""
"""Code of a reward model that fails where a worker loads it, with what secrets the worker has in its message."""


def make_leaky(folder: Path) -> None:
    (folder / "leaky.py").write_text(FAILING.format(names=sorted(CANARIES)))
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "leaky.Config", "AutoModelForSequenceClassification": "leaky.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "leaky", "auto_map": own}))


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["local", pytest.param("ray", marks=pytest.mark.full)])
@pytest.mark.parametrize("fails", [False, True], ids=["to its end", "failing"])
def test_twelve_secrets_of_the_environment_are_found_nowhere(recipe: Path, executor: str, fails: bool):
    """In what is printed, in every file of the run, in Ray's files while it runs, and in command lines. The failing run
    raises them in a worker."""
    recipe.write_text(recipe.read_text().replace("seed: 1", "seed: 1, max_restarts: 0"))
    environment = {**os.environ, **CANARIES, "HF_MODULES_CACHE": str(recipe.parent / "modules")}
    command = [sys.executable, "-m", "align.cli", "train", str(recipe), f"executor={executor}"]
    if fails:
        make_leaky(recipe.parent / "reward")
        command.append("reward.trust_remote_code=true")
    out, err = (recipe.parent / name for name in ("out", "err"))
    with out.open("wb") as stdout, err.open("wb") as stderr:
        run = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=stdout, stderr=stderr)
        while run.poll() is None:
            assert "canary-" not in command_lines()
            assert not [file for folder in Path("/tmp").glob("align-ray-*") for file in found_in(folder)]
            time.sleep(1.0)
    said = err.read_text()
    assert (run.returncode != 0) == fails, said
    if fails:  # workers on Ray get two of them, for the hub and for endpoints (`align.cluster.process.INHERITED`)
        assert "cannot log in with " in said, said
        assert {name for name in CANARIES if f"<{name}>" in said} == (
            {"HF_TOKEN", "OPENAI_API_KEY"} if executor == "ray" else {*CANARIES}
        )
    assert "canary-" not in said + out.read_text()
    assert not found_in(recipe.parent)
    if not fails:  # the model's code raises before there is a run folder
        told = (recipe.parent / "run" / "environment.json").read_text()
        assert not [name for name in CANARIES if name in told]
        assert '"python"' in told


def whole_environments(source: str) -> list[str]:
    """Expressions that take all of ``os.environ`` and not a variable of it."""
    tree = ast.parse(source)
    single = {"get", "setdefault", "pop", "update"}
    allowed: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) or (isinstance(node, ast.Attribute) and node.attr in single):
            allowed.add(node.value)
        elif isinstance(node, ast.Compare):
            allowed.update(node.comparators)
    names = ("os.environ", "os.environb", "environ")
    wholes = [node for node in ast.walk(tree) if isinstance(node, (ast.Attribute, ast.Name))]
    return [f"line {node.lineno}" for node in wholes if ast.unparse(node) in names and node not in allowed]


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("os.environ.copy()", 1),
        ("dict(os.environ)", 1),
        ("run(env=os.environ)", 1),
        ("run(env={**os.environ, 'A': 1})", 1),
        ("os.environ | {}", 1),
        ("from os import environ\nf(environ)", 1),
        ("os.environ.get('A'), os.environ['A'], 'A' in os.environ, os.environ.setdefault('A', '')", 0),
    ],
)
def test_the_reading_of_sources_finds_each_way_to_take_the_environment(source: str, count: int):
    assert len(whole_environments(source)) == count


SOURCES = [*sorted((ROOT / "align").rglob("*.py")), *sorted((ROOT / "launchers").rglob("*.py"))]

MEANT = {
    "align/utils/security.py": "looks for secrets in it",
    "align/run/stopping.py": "scontrol on this machine, which would inherit it, gets another time zone",
    "align/cluster/session.py": "chooses the variables that Ray's processes get, and puts the rest back",
    "launchers/local.py": "the run on this machine, which would inherit it, gets one variable more",
    "launchers/options.py": "looks for folders of caches, to mount them into a container",
    "launchers/ray.py": "the run on this machine, which would inherit it, gets the cluster's token",
}
"""Sources that take the whole environment, and what for. It never goes into a file, to Ray or to another machine."""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_hands_on_the_whole_environment(path: Path):
    """What is handed on by name is what is needed."""
    wholes = whole_environments(path.read_text())
    assert bool(wholes) == (str(path.relative_to(ROOT)) in MEANT), wholes
