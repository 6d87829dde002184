"""What is refused before torch is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from align import prechecks
from align.config import ClusterConfig
from align.config.load import load_recipe
from align.errors import AlignError, ConfigError, PlacementError
from align.prechecks import folders, functions, placement, sources

RECIPE = """\
algorithm: rloo
run: {{dir: {root}/run, steps: 1}}
data: {{path: {root}/data}}
policy: {{path: {root}/model, dtype: float32, zero_stage: 0, optimizer: {{lr: 1e-6}}}}
reward: {{path: {root}/model, dtype: float32}}
executor: local
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, data and a recipe, and a cache of the hub that holds ``org/whole`` and a part of
    ``org/part``."""
    for name in ("model", "data"):
        (tmp_path / name).mkdir()
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(root=tmp_path))
    for name, files in {"whole": ["config.json", "model.safetensors"], "part": ["config.json"]}.items():
        folder = tmp_path / "hub" / f"models--org--{name}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("abc")
        (folder / "snapshots" / "abc").mkdir(parents=True)
        for file in files:
            (folder / "snapshots" / "abc" / file).touch()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(root: Path, *overrides: str) -> str:
    with pytest.raises(AlignError) as caught:
        prechecks.check(load_recipe(root / "recipe.yaml", overrides))
    assert caught.value.exit_status == 78
    return str(caught.value)


def test_a_recipe_whose_sources_are_there_passes(root: Path):
    prechecks.check(load_recipe(root / "recipe.yaml", ["reward.path=org/whole", "policy.path=~/"]))


@pytest.mark.parametrize(
    "text", ["./x", "../x", "/x", "~/x", ".", "a/b/c", "rows.jsonl", "org/rows.json", "model/x", "x/template.jinja"]
)
def test_what_looks_like_a_path(root: Path, text: str):
    assert sources.looks_local(text)


@pytest.mark.parametrize("text", ["gpt2", "org/name", "meta-llama/Llama-3.1-8B", "nvidia/HelpSteer3", "a.b/c.d"])
def test_what_may_be_a_hub_id(root: Path, text: str):
    assert not sources.looks_local(text)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("policy.path=./modle", "policy.path=./modle: there is no such file or folder"),
        ("policy.path=modle", "did you mean model?"),
        ("policy.path=model/final", "there is no such file or folder"),
        ("policy.path=recipe.yaml", "is a file, but must be a folder"),
        ("policy.path='no id'", "there is no such file or folder"),
        ("policy.path=org/absent", "HF_HUB_OFFLINE forbids downloads\n  remedy: run `hf download"),
        ("policy.path=org/part", "is incomplete in the hub"),
        ("reward={kind: ensemble, paths: [./other]}", "reward.paths[0]=./other: there is no such"),
        ("policy={init: {model_type: llama}, path: ./none}", "policy.path=./none: there is no such"),
        ("data.path=dta", "did you mean data?"),
        ("data.path=org/rows", "hf download org/rows --repo-type dataset"),
        ("data.chat_template=none.jinja", "data.chat_template=none.jinja: there is no such"),
        ("reward.chat_template=none.jinja", "reward.chat_template=none.jinja: there is no such"),
        ("run.resume=run/checkpoints/step-000001", "run.resume=run/checkpoints/step-000001: there is no such"),
        ("eval_reward.path=./none", "eval_reward.path=./none: there is no such"),
        ("policy.engine=none.py:Engine", "policy.engine=none.py:Engine: there is no file none.py"),
        ("policy.engine=no_such_module:Engine", "there is no module no_such_module"),
        ("run.dir=recipe.yaml/run", "cannot be made: "),
        ("run.dir=data", "does not hold a run"),
        ("placement={policy: 3-1}", "placement.policy: cannot read '3-1' as slots"),
        ("placement={critic: 0}", "no role is called critic"),
    ],
)
def test_what_is_refused(root: Path, override: str, message: str):
    (root / "data" / "file").touch()
    text = refusal(root, override)
    assert message in text and "remedy: " in text
    assert text.count("remedy: ") == 1


def test_all_faults_come_in_one_message_each_with_its_place(root: Path):
    (root / "model").rmdir()
    text = refusal(root, "data.path=./none", "run.dir=recipe.yaml")
    assert "3 problems" in text
    assert f"{root}/recipe.yaml:4: policy.path={root}/model: there is no such" in text
    assert "command line: data.path=./none" in text and "run.dir" in text
    assert "reference" not in text  # it follows the policy


def test_the_hub_is_asked_once_where_it_cannot_be_reached(root: Path, monkeypatch: pytest.MonkeyPatch):
    calls = []

    def unreachable(request, timeout):
        calls.append(request.full_url)
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    sources._unreachable.cache_clear()
    text = refusal(root, "policy.path=org/absent", "reward.path=org/other")
    sources._unreachable.cache_clear()
    assert len(calls) == 1 and text.count("cannot be reached: no route to host") == 2


FUNCTION = [
    "reward.kind=function",
]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scores.py:lenght", "scores.py has no function lenght\n  remedy: it has: length, other"),
        ("scroes.py:length", "did you mean scores.py:length?"),
        ("no_such_module:f", "there is no module no_such_module"),
        ("align.no_such:f", "there is no module align.no_such"),
        ("align.utils.plugins:laod", "align.utils.plugins has no function laod"),
        ("broken.py:f", "broken.py cannot be read: SyntaxError"),
    ],
)
def test_functions_that_are_not_there(root: Path, name: str, message: str):
    (root / "scores.py").write_text("if True:\n    def length(c): return [0.0]\ndef other(c):\n    inner = 1\n")
    (root / "broken.py").write_text("def f(:\n")
    assert message in refusal(root, *FUNCTION, f"reward.function={name}")


@pytest.mark.parametrize("name", ["f", "g", "h", "k", "path"])
def test_functions_that_may_be_there(root: Path, name: str):
    (root / "scores.py").write_text("from os import path\nf = g = lambda c: c\nfor h in (f,): pass\nclass k: pass\n")
    assert functions.problem("reward.function", f"scores.py:{name}", None) is None
    (root / "scores.py").write_text("from elsewhere import *\n")
    assert functions.problem("reward.function", f"scores.py:{name}", None) is None


def test_a_module_is_looked_for_without_importing_it():
    assert functions.problem("reward.function", "math:floor", None) is None
    assert functions.problem("reward.function", "xml.dom.pulldom:parse", None) is None
    assert "xml.dom.pulldom" not in sys.modules


def test_a_folder_that_this_user_may_not_write_to(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != root)  # root may write anywhere
    with pytest.raises(ConfigError, match=rf"may not write to {root}\n  remedy: choose another run.dir, or let"):
        folders.require_writable(root / "a" / "b", "run.dir")


def test_slots_that_this_machine_lacks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(placement, "machine_gpus", lambda: 0)
    placement.require_machine(4, ClusterConfig())
    placement.require_machine(5, ClusterConfig(address="host:1"))
    with pytest.raises(PlacementError, match=r"5 slots, but this machine has 4 \(2 cores with 2 slots each\)"):
        placement.require_machine(5, ClusterConfig())
    monkeypatch.setattr(placement, "machine_gpus", lambda: 3)
    with pytest.raises(PlacementError, match=r"4 slots, but this machine has 3 \(3 GPUs\)"):
        placement.require_machine(4, ClusterConfig())


@pytest.mark.parametrize(
    ("slots", "total", "line"),
    [
        ({"policy": (0,), "reward": (0,)}, 16, "placement uses slot 0 only: 15 of 16 stay idle"),
        ({"policy": (0, 1), "reward": (4, 5, 6)}, 8, "placement uses slots 0-1,4-6 only: 3 of 8 stay idle"),
        ({"policy": (0, 1), "reward": (1,)}, 2, None),
    ],
)
def test_idle_slots(slots: dict[str, tuple[int, ...]], total: int, line: str | None):
    assert placement.idle(slots, total) == line


COMMANDS = [
    ["train", "recipe.yaml", "policy.path=./modle"],
    ["train", "recipe.yaml", "--dry-run", "data.path=./none"],
    ["train", "recipe.yaml", "run.dir=recipe.yaml/run"],
    ["train", "recipe.yaml", *FUNCTION, "reward.function=xml.dom.pulldom:no"],
    ["eval", "reward", "--benchmark=heldout", "--data=./none", "--model=model"],
    ["eval", "policy", "--benchmark", "prompts", "./none.jsonl", "--model", "model", "--judge", "model"],
    ["scale", "scale.yaml"],
    ["serve", "reward", "service.yaml", "--check"],
    ["generate", "./modle", "--prompt=x"],
    ["merge", "expo", "./modle", "model", "out"],
    ["data", "lint", "./none"],
    ["replay", "./none"],
]


def test_no_command_imports_torch_before_it_refuses_a_path(root: Path, monkeypatch: pytest.MonkeyPatch):
    """In one process: a command that gets as far as its own module fails on the import."""
    roles = "".join(f"{name}: {{path: ./modle}}\n" for name in ("policy", "feedback", "edit", "select"))
    (root / "scale.yaml").write_text(f"{roles}prompts: {{path: none.jsonl}}\nout: out\n")
    (root / "service.yaml").write_text("reward: {path: ./modle}\n")
    code = f"""
import sys
from align import cli
statuses = [cli.main(command) for command in {COMMANDS!r}]
heavy = [name for name in ("torch", "ray", "transformers", "datasets", "peft") if name in sys.modules]
sys.exit(f"{{statuses}} {{heavy}}" if set(statuses) != {{78}} or heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("there is no such file or folder") >= 10
