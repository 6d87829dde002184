"""Options of a site: containers, options of sbatch, memory, setup files and exported variables."""

from __future__ import annotations

from pathlib import Path

import pytest
from submission import calls_of, directives, submit

from align.errors import ConfigError


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Folders of models, data and a cache outside the working directory; the model is links to blobs elsewhere."""
    folders = {name: tmp_path / name for name in ("models", "blobs", "data", "cache", "work", "templates")}
    for folder in folders.values():
        folder.mkdir()
    (folders["blobs"] / "0a1b").touch()
    (folders["models"] / "config.json").symlink_to(folders["blobs"] / "0a1b")
    (folders["templates"] / "chat.jinja").touch()
    monkeypatch.setenv("HF_HOME", str(folders["cache"]))
    monkeypatch.chdir(folders["work"])
    return folders


def test_a_container_sees_all_that_the_recipe_names(recipe: Path, sbatch: Path, places: dict[str, Path]):
    paths = [f"data.path={places['data']}", f"policy.path={places['models']}", "reward.path=org/name"]
    paths.append(f"data.chat_template={places['templates']}/chat.jinja")
    assert submit(recipe, "--container=registry#image:1", "--container-mounts=/d:/d:ro", *paths) == 0
    (call,) = calls_of(sbatch)
    assert call[-4:-1] == [f"{recipe.parent}/run/launch", "python3", "--container-image=registry#image:1"]
    (first, *more) = call[-1].removeprefix("--container-mounts=").split(f",{recipe.parent}/")
    assert first == "/tmp:/tmp"
    assert [mount.partition(":")[0] for mount in more] == [
        "blobs",
        "cache",
        "data",
        "models",
        "run",
        "templates",
        "work",
    ]
    assert call[-1].endswith(f"/work:{recipe.parent}/work,/d:/d:ro")


def test_apptainer_runs_before_the_command_of_every_step(recipe: Path, sbatch: Path, places: dict[str, Path]):
    image = places["work"] / "align.sif"
    image.touch()
    assert submit(recipe, "--container=align.sif", f"policy.path={places['models']}") == 0
    assert submit(recipe, "--container=align.sif", "--cpus-per-task=4", f"run.dir={recipe.parent}/cpu", gpus=0) == 0
    on_gpus, on_cpus = (call[call.index("python3") + 1 :] for call in calls_of(sbatch))
    assert on_gpus[:4] == ["--", "apptainer", "exec", "--nv"] and "--nv" not in on_cpus
    assert on_gpus[-2].startswith("--bind=/tmp:/tmp,") and f"{places['blobs']}:{places['blobs']}" in on_gpus[-2]
    assert on_gpus[-1] == on_cpus[-1] == str(image)


def test_any_option_of_sbatch_is_passed_on_as_one_argument(recipe: Path, sbatch: Path, tmp_path: Path):
    further = ["--sbatch=--exclusive", "--sbatch=--comment=for $(touch owned) 'us'", "--sbatch=--gres=gpu:a100:2"]
    assert submit(recipe, *further, "--sbatch=--mem-per-gpu=64G", "--dependency=after:7", "--export=NONE") == 0
    (call,) = calls_of(sbatch)
    expected = [option.removeprefix("--sbatch=") for option in further]
    assert call[3:8] == ["--dependency=after:7", *expected, "--mem-per-gpu=64G"]
    assert call[8] == "--export=NONE"
    names = {option.partition("=")[0] for option in directives((tmp_path / "run/launch/job.sbatch").read_text())}
    assert not names & {"--gpus-per-node", "--mem"}  # what is passed on asks for these


@pytest.mark.parametrize(
    ("arguments", "expected"), [([], ["--mem=0"]), (["--mem=200G"], ["--mem=200G"]), (["--mem=site"], [])]
)
def test_a_job_asks_for_all_memory_unless_told_otherwise(recipe: Path, sbatch: Path, capsys, arguments, expected):
    assert submit(recipe, "--dry-run", *arguments) == 0
    assert [line for line in directives(capsys.readouterr().out) if line.startswith("--mem")] == expected


def test_what_the_site_needs_is_read_by_every_step(recipe: Path, sbatch: Path, tmp_path: Path):
    (tmp_path / "site.sh").write_text("module load cuda\nexport HF_HUB_OFFLINE=1\n")
    assert submit(recipe, f"--setup={tmp_path}/site.sh") == 0
    assert (tmp_path / "run/launch/setup.sh").read_text() == (tmp_path / "site.sh").read_text()


@pytest.mark.parametrize(
    ("export", "reaches"), [("NONE", False), ("HOME,TOKEN", True), ("ALL,X=1", True), (None, False)]
)
def test_a_token_that_the_job_would_lack_is_refused(service: Path, sbatch: Path, monkeypatch, export, reaches: bool):
    monkeypatch.setenv("SBATCH_EXPORT", "NONE")
    arguments = ["--service=reward", "token_env=TOKEN", *([f"--export={export}"] if export else [])]
    if reaches:
        assert submit(service, *arguments, nodes=1, gpus=3) == 0
    else:
        with pytest.raises(ConfigError, match=r"(?s)token_env=TOKEN: the job does not get .*'NONE'.*--export=TOKEN$"):
            submit(service, *arguments, nodes=1, gpus=3)
