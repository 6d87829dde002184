"""Hostile recipes, checkpoints and templates; folders that others may write to."""

from __future__ import annotations

import json
import os
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from secret_names import SECRET_NAMES

from align import launch
from align.cli import main
from align.errors import ConfigError
from align.utils.security import require_private

ROOT = Path(__file__).parents[2]

# Recipes


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
    begun = time.process_time()
    assert main(["train", str(recipe)]) == 78
    assert time.process_time() - begun < 5.0  # 10^39 entries would not end
    assert "recipe.yaml:4: not readable: alias *a0" in capsys.readouterr().err


def doubled(value: str, join: str) -> str:
    """Keys of which each holds the one before twice, 16 times."""
    lines = [f"l{i}: {join.replace('X', f'${{policy.init.l{i - 1}}}')}" for i in range(1, 17)]
    return "\n".join(f"    {line}" for line in [f"l0: {value}", *lines])


@pytest.mark.parametrize(
    ("lines", "place", "reason"),
    [
        (doubled("word", "'XX'"), ":17: policy.init.l8:", "of 511 values, at most 100000 and 300"),
        (doubled("''", "'XX'"), ":17: policy.init.l8:", "of 511 values"),
        (doubled("word", "['X', 'X']"), ":16: policy.init.l7:", "of 382 values"),
        (doubled("word", "{a: 'X', b: 'X'}"), ":17: policy.init.l8.a:", "of 383 values"),
        (doubled("w" * 60_000, "'XX'"), ":10: policy.init.l1:", "becomes 120034 characters of 3 values"),
        (doubled("w" * 90_000, "'${policy.init.l0}'"), ":21: policy.init.l12:", "more than 1000000 characters"),
        ("    a: '${.b}'\n    b: '${.a}'", ":9: policy.init.a:", "'${.b}': Recursive interpolation"),
        ("    a: {b: '${policy.init}'}", ":9: policy.init.a.b:", "Recursive interpolation detected"),
        ("    a: [" + "[], " * 6000 + "]", ":9: not readable:", "more than 5000 keys and values"),
        ("    a: " + "[" * 50 + "]" * 50, ":9: not readable:", "nested too deeply"),
        ("#" * 300_000, ":", "the file is longer than 262144 bytes"),
    ],
    ids=["text", "nothing", "lists", "mappings", "long", "often", "circle", "own section", "wide", "deep", "huge"],
)
def test_what_a_recipe_makes_of_itself_is_bounded(tmp_path: Path, lines: str, place: str, reason: str, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "algorithm: rloo\nrun: {dir: x, steps: 1}\nreward: {path: /x}\ndata: {path: /x}\npolicy:\n  path: /x\n"
        f"  optimizer: {{lr: 1e-6}}\n  init:\n{lines}\n"
    )
    begun = time.perf_counter()
    assert main(["show", str(file)]) == 78
    assert time.perf_counter() - begun < 5.0
    said = capsys.readouterr().err
    assert f"recipe.yaml{place}" in said and reason in said, said
    assert len(said) < 10_000


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ([f"policy.init.l{i}=${{policy.init.l{i - 1}}}${{policy.init.l{i - 1}}}" for i in range(1, 17)], "511 values"),
        ([f"policy.init.{'a.' * 5000}b=1"], "nested too deeply"),
        (["policy.init.a=" + "[" * 5000], "nested too deeply"),
        (["run.steps=" + "9" * 5000], "expected a whole number"),
    ],
    ids=["doubled", "long key", "deep", "digits"],
)
def test_what_a_command_line_makes_of_itself_is_bounded(recipe: Path, overrides: list[str], reason: str, capsys):
    assert main(["show", str(recipe), "policy.init.l0=x", *overrides]) == 78
    said = capsys.readouterr().err
    assert "command line" in said and reason in said, said
    assert len(said) < 15_000


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
    monkeypatch.setattr(launch, "start_roles", lambda *_: pytest.fail("workers would start"))
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
        "{{ 'a' * 10000000000 }}",
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
    assert main(["train", "--dry-run", str(recipe), *hub, "reward.trust_remote_code=true"]) == 78  # not in the cache
    plan = capsys.readouterr().out
    assert f"policy runs the Python code of someone/model at {COMMIT}\n" in plan
    assert f"reward runs the Python code of {folder}\n" in plan
    assert main(["train", "--dry-run", str(recipe)]) == 0
    assert "Python code" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_of_another_repository_is_refused_since_no_revision_pins_it(recipe: Path, name: str, capsys):
    file = recipe.parent / "policy" / name
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": {"AutoConfig": "other/code--c.C"}}))
    assert main(["train", str(recipe), "policy.trust_remote_code=true"]) == 78
    said = capsys.readouterr().err
    assert f"{file.parent}: {name} refers to code in another repository, which a revision cannot pin" in said
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
