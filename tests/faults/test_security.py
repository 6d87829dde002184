"""Hostile recipes, checkpoints and templates; folders that others may write to; secrets of the environment."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from align import launch
from align.cli import main
from align.errors import ConfigError
from align.private import require_private
from align.redact import redact, secrets

ROOT = Path(__file__).parents[2]

RECIPE = """
algorithm: rloo
run: {{dir: {run}, steps: 1, seed: 1, progress: none}}
data: {{path: {data}}}
executor: local
prompts_per_step: 2
sampling: {{num_samples: 2, max_tokens: 4}}
unfinished: keep
policy: {{path: {policy}, dtype: float32, zero_stage: 0, optimizer: {{lr: 1e-3}}}}
reference: {{dtype: float32}}
reward: {{path: {reward}, dtype: float32}}
placement: {{policy: 0, reference: 1, reward: 2}}
"""


@pytest.fixture
def recipe(tmp_path: Path, toy_data: Path, tiny_policy: Path, tiny_reward: Path) -> Path:
    """A recipe whose policy and reward model a test may damage."""
    policy, reward = (
        shutil.copytree(source, tmp_path / name) for name, source in (("policy", tiny_policy), ("reward", tiny_reward))
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(run=tmp_path / "run", data=toy_data, policy=policy, reward=reward))
    return path


# Recipes


SECRET_NAMES = [
    "HF_TOKEN",
    "WANDB_API_KEY",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_ACCESS_KEY_ID",
    "OPENAI_API_KEY",
    "GITHUB_TOKEN",
    "DATABASE_PASSWORD",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "CLIENT_SECRET",
    "SSH_PRIVATE_KEY",
]


@pytest.mark.parametrize("command", ["train", "show", "dry run"])
@pytest.mark.parametrize("name", SECRET_NAMES)
def test_a_recipe_cannot_read_a_secret(recipe: Path, name: str, command: str, monkeypatch, capsys):
    monkeypatch.setenv(name, "canary-0123456789")
    recipe.write_text(recipe.read_text().replace("seed: 1", f"seed: 1, resume: 'x${{oc.env:{name}}}'"))
    arguments = ["train", "--dry-run"] if command == "dry run" else [command]
    assert main([*arguments, str(recipe)]) == 78
    out, err = capsys.readouterr()
    assert f"recipe.yaml:3: run.resume: 'x${{oc.env:{name}}}' holds more than references to keys" in err
    assert "canary" not in out + err
    assert not (recipe.parent / "run").exists()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (
            "seed: !!python/object/apply:os.system ['touch {ran}']",
            "tag tag:yaml.org,2002:python/object/apply:os.system",
        ),
        ("seed: !!python/name:os.system ''", "tag tag:yaml.org,2002:python/name:os.system"),
        ("seed: !include /etc/passwd", "tag !include"),
        ("seed: &a 1, steps: *a", "alias *a"),
        ("seed: 1, seed: 2", "run.seed"),
        ("resume: '${{eval:1+1}}'", "holds more than references to keys"),
        ("resume: '${{oc.create:1}}'", "holds more than references to keys"),
        ("resume: '${{oc.decode:1}}'", "holds more than references to keys"),
    ],
)
def test_a_recipe_cannot_make_objects_or_compute(recipe: Path, line: str, reason: str, capsys):
    ran = recipe.parent / "ran"
    recipe.write_text(recipe.read_text().replace("seed: 1", line.format(ran=ran)))
    assert main(["train", str(recipe)]) == 78
    said = capsys.readouterr().err
    assert "recipe.yaml:3" in said, said
    assert reason in said, said
    assert not ran.exists()
    assert not (recipe.parent / "run").exists()


def test_an_alias_bomb_stops_at_its_first_alias(recipe: Path, capsys):
    levels = "\n".join(f"  l{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 40))
    recipe.write_text(f"algorithm: rloo\nplacement:\n  l0: &a0 [x]\n{levels}\n")
    begun = time.perf_counter()
    assert main(["train", str(recipe)]) == 78
    assert time.perf_counter() - begun < 1.0
    assert "recipe.yaml:4: not readable: alias *a0" in capsys.readouterr().err


# Checkpoints


class Payload:
    """An object whose pickle makes a file when it is read."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("role", ["policy", "reward"])
@pytest.mark.parametrize("form", ["pickle", "torch", "sharded"])
def test_pickled_weights_are_refused_unread(recipe: Path, role: str, form: str, monkeypatch, capsys):
    monkeypatch.setattr(launch, "cast", lambda *_: pytest.fail("workers would start"))
    folder, ran = recipe.parent / role, recipe.parent / "ran"
    (folder / "model.safetensors").unlink()
    if form == "torch":
        torch.save({"x": Payload(ran)}, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Payload(ran)}))
    if form == "sharded":
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"x": "pytorch_model.bin"}}))
    assert main(["train", str(recipe)]) == 78
    said = capsys.readouterr().err
    assert f"{folder}: there are no weights in model.safetensors or model.safetensors.index.json" in said
    assert "pytorch_model.bin: pickles, which can run code when they are loaded" in said
    assert "remedy: give a checkpoint in safetensors" in said
    assert not ran.exists()
    assert not (recipe.parent / "run").exists()
    pickle.loads(pickle.dumps(Payload(ran)))  # and this is what the payload would have done
    assert ran.exists()


def test_pickles_beside_safetensors_are_not_read(recipe: Path):
    ran = recipe.parent / "ran"
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (recipe.parent / "policy" / name).write_bytes(pickle.dumps(Payload(ran)))
    assert main(["train", str(recipe)]) == 0
    assert not ran.exists()
    assert load_file(recipe.parent / "run" / "final" / "model.safetensors")
    assert not list((recipe.parent / "run").rglob("*.bin"))


@pytest.mark.parametrize(
    "expression",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch RAN') }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{{ 1 / 0 }}",
        "{% for i in range(1000000000) %}{% endfor %}",
    ],
)
def test_a_template_reaches_nothing_but_the_messages(recipe: Path, expression: str, capsys):
    ran = recipe.parent / "ran"
    template = recipe.parent / "policy" / "chat_template.jinja"
    template.write_text(expression.replace("RAN", str(ran)) + template.read_text())
    assert main(["train", str(recipe)]) == 78
    assert "the template fails: " in capsys.readouterr().err
    assert not ran.exists()
    assert not (recipe.parent / "run").exists()


COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.mark.parametrize("revision", ["null", "main", "v1.0", "0123abc", COMMIT.upper(), f"{COMMIT}0"])
@pytest.mark.parametrize("command", ["train", "show"])
def test_code_of_a_hub_id_needs_a_commit(recipe: Path, revision: str, command: str, capsys):
    options = ["policy.path=someone/model", "policy.trust_remote_code=true", f"policy.revision={revision}"]
    assert main([command, str(recipe), *options]) == 78
    said = capsys.readouterr().err
    assert "command line: policy: trust_remote_code runs code of others: path someone/model is no folder here" in said
    assert "policy.revision" in said.partition("remedy")[2]
    assert not (recipe.parent / "run").exists()


def test_the_plan_names_code_that_would_run(recipe: Path, capsys):
    folder = recipe.parent / "reward"
    hub = ["policy.path=someone/model", "policy.trust_remote_code=true", f"policy.revision={COMMIT}"]
    assert main(["train", "--dry-run", str(recipe), *hub, "reward.trust_remote_code=true"]) == 0
    plan = capsys.readouterr().out
    assert f"policy runs the Python code that comes with someone/model at {COMMIT}\n" in plan
    assert f"reward runs the Python code that comes with {folder}\n" in plan
    assert main(["train", "--dry-run", str(recipe)]) == 0
    assert "Python code" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_of_another_repository_is_refused_since_no_revision_pins_it(recipe: Path, name: str, capsys):
    file = recipe.parent / "policy" / name
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": {"AutoConfig": "other/code--c.C"}}))
    assert main(["train", str(recipe), "policy.trust_remote_code=true"]) == 78
    said = capsys.readouterr().err
    assert f"{file.parent}: {name} takes code from another repository, which no revision pins" in said
    assert "other/code--c.C" in said
    assert not (recipe.parent / "run").exists()


# Folders


def test_a_folder_of_ones_own_is_private(tmp_path: Path):
    for mode in (0o700, 0o750, 0o755):
        folder = tmp_path / f"{mode:o}"
        folder.mkdir()
        folder.chmod(mode)
        require_private(folder)
    require_private(tmp_path / "does not exist")


@pytest.mark.parametrize(("mode", "who"), [(0o777, "everybody"), (0o1777, "everybody"), (0o775, "its group")])
def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path, mode: int, who: str):
    folder, link = tmp_path / "run", tmp_path / "link"
    folder.mkdir()
    folder.chmod(mode)
    link.symlink_to(folder)
    for name in (folder, link):
        with pytest.raises(ConfigError, match=f"{name}: {who} may write to it") as refusal:
            require_private(name)
        assert f"chmod go-w {name}" in str(refusal.value)
        assert refusal.value.exit_status == 78


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    own = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    with pytest.raises(ConfigError, match=f"belongs to user {own}, and this process runs as user {own + 1}"):
        require_private(tmp_path)


def test_a_name_below_a_file_is_no_folder(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="Not a directory"):
        require_private(tmp_path / "file" / "run")


@pytest.mark.parametrize("umask", [0o022, 0o000])
def test_a_run_folder_is_made_for_its_owner_alone(recipe: Path, umask: int):
    before = os.umask(umask)
    try:
        assert main(["train", str(recipe)]) == 0
    finally:
        os.umask(before)
    assert (recipe.parent / "run").stat().st_mode & 0o777 == 0o700


def test_a_run_folder_that_everybody_may_write_to_is_refused_and_stays_empty(recipe: Path, capsys):
    run = recipe.parent / "run"
    run.mkdir()
    run.chmod(0o777)
    assert main(["train", str(recipe)]) == 78
    assert f"{run}: everybody may write to it (mode 777)" in capsys.readouterr().err
    assert not list(run.iterdir())


# Secrets


def test_secrets_are_told_by_their_names_and_by_their_length(monkeypatch: pytest.MonkeyPatch):
    for name in list(os.environ):
        monkeypatch.delenv(name)
    held = {f"X_{word}_Y": f"{word}-0123" for word in ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL", "api_key")}
    others = {
        "HOME": "/home/somebody",
        "TOKENIZERS_PARALLELISM": "false-and-long",
        "RAY_AUTH_TOKEN_PATH": "/home/somebody/token",
        "AWS_SHARED_CREDENTIALS_FILE": "/home/somebody/aws",
        "SHORT_TOKEN": "1234567",
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
    assert "/nowhere/<HF_TOKEN>: there is no such folder" in said
    assert "canary" not in said


def test_an_unexpected_error_is_printed_with_its_traceback_and_without_secrets(recipe: Path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "canary-0123456789")

    def fail(*_: object) -> None:
        raise RuntimeError("cannot log in with canary-0123456789")

    monkeypatch.setattr(launch, "check", fail)
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
@pytest.mark.parametrize("executor", ["local", "ray"])
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
    if fails:  # workers on Ray get one of them, for the hub
        assert "cannot log in with " in said, said
        assert {name for name in CANARIES if f"<{name}>" in said} == (
            {"HF_TOKEN"} if executor == "ray" else {*CANARIES}
        )
    assert "canary-" not in said + out.read_text()
    assert not found_in(recipe.parent)
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
    "align/redact.py": "looks for secrets in it",
    "align/run/stopping.py": "scontrol on this machine, which would inherit it, gets another time zone",
    "align/workers/session.py": "chooses the variables that Ray's processes get, and puts the rest back",
    "launchers/local.py": "the run on this machine, which would inherit it, gets one variable more",
    "launchers/ray.py": "the run on this machine, which would inherit it, gets the cluster's token",
}
"""Sources that take the whole environment, and what for. It never goes into a file, to Ray or to another machine."""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_hands_on_the_whole_environment(path: Path):
    """What is handed on by name is what is needed."""
    wholes = whole_environments(path.read_text())
    assert bool(wholes) == (str(path.relative_to(ROOT)) in MEANT), wholes
