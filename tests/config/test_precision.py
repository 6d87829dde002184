"""What ``dtype: auto`` is on which machine, and that a run keeps it."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.cli import main
from align.config import CheckpointRewardConfig, FunctionGeneratorConfig, ModelGeneratorConfig, PolicyConfig, precision
from align.config.load import load_recipe, write_config
from align.config.precision import Precision
from align.errors import ConfigError
from align.prechecks.roles import dtype_notes
from align.run.identity import Identity

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart" / "dpo.yaml"
AUTO = ("policy.dtype=auto", "reference.dtype=${policy.dtype}")


@pytest.fixture
def without_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "automatic", lambda: Precision("float32", "this CPU has no bfloat16 units"))


@pytest.fixture
def with_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "automatic", lambda: Precision("bfloat16", "this GPU has bfloat16 units"))


@pytest.mark.parametrize(
    ("cpuinfo", "capability", "dtype", "reason"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 amx_tile\n", None, "bfloat16", "avx512_bf16"),
        ("flags\t\t: fpu amx_bf16 amx_tile\nflags\t\t: fpu\n", None, "bfloat16", "amx_bf16"),
        ("flags\t\t: fpu avx2 avx512f avx512_vnni\n", None, "float32", "this CPU has no bfloat16 units"),
        ("Features\t: fp asimd bf16 i8mm\n", None, "bfloat16", "bf16"),
        ("Features\t: fp asimd fphp\n", None, "float32", "this CPU has no bfloat16 units"),
        ("", None, "float32", "this CPU has no bfloat16 units"),
        ("flags\t\t: fpu\n", (8, 0), "bfloat16", "this GPU has bfloat16 units"),
        ("flags\t\t: fpu\n", (9, 0), "bfloat16", "this GPU has bfloat16 units"),
        ("flags\t\t: avx512_bf16\n", (7, 5), "float32", "compute capability 7.5"),
    ],
)
def test_the_format_by_machine(cpuinfo: str, capability: tuple[int, int] | None, dtype: str, reason: str):
    found = precision.choose(precision.cpu_flags(cpuinfo), capability)
    assert found.dtype == dtype
    assert reason in found.reason


def test_a_section_with_a_model_holds_the_format_of_this_machine(without_units: None):
    assert CheckpointRewardConfig(path="p").dtype == ModelGeneratorConfig(path="p").dtype == "float32"
    assert PolicyConfig(path="p", zero_stage=0).dtype == "float32"  # bfloat16 would be refused
    assert CheckpointRewardConfig(path="p", dtype="bfloat16").dtype == "bfloat16"
    assert FunctionGeneratorConfig(function="m:f").dtype == "float32"  # no weights, so no difference between machines


def test_show_tells_the_format_and_why(without_units: None, capsys: pytest.CaptureFixture[str]):
    assert main(["show", str(RECIPE), *AUTO]) == 0
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines()]
    rows = [row for row in rows if row and row[0] in ("policy.dtype", "reference.dtype")]
    assert [row[1:] for row in rows] == [["'float32'", "command", "line:", "auto"]] * 2
    assert "dtype auto is float32: this CPU has no bfloat16 units" in shown


def test_a_run_keeps_its_format_on_another_machine(
    without_units: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    begun = load_recipe(RECIPE, AUTO)
    write_config(begun.config, tmp_path / "config.yaml")
    facts = vars(Identity.of(begun.config, {}, {}))
    monkeypatch.setattr(precision, "automatic", lambda: Precision("bfloat16", "this GPU has bfloat16 units"))
    assert load_recipe(tmp_path / "config.yaml").config == begun.config
    with pytest.raises(ConfigError, match=r"policy\.dtype: 'float32' in the checkpoint, 'bfloat16' now"):
        Identity.of(load_recipe(RECIPE, AUTO).config, {}, {}).require(facts, [], "x")


def test_what_a_driver_without_a_gpu_cannot_tell(without_units: None):
    cluster = (*AUTO, "executor=ray", "cluster.address=10.0.0.1:6379")
    with pytest.raises(ConfigError, match=r"policy\.dtype, reference\.dtype: auto .*cluster\.address=10\.0\.0\.1"):
        dtype_notes(load_recipe(RECIPE, cluster))
    assert dtype_notes(load_recipe(RECIPE, [*cluster, "policy.dtype=bfloat16"])) == []
    here = dtype_notes(load_recipe(RECIPE, (*AUTO, "reference.dtype=bfloat16")))
    assert here == [
        "policy.dtype: auto is float32, this CPU has no bfloat16 units",
        "reference.dtype: bfloat16 is slow here, this CPU has no bfloat16 units; use float32",
    ]


def test_a_driver_with_units_tells_for_a_cluster(with_units: None):
    notes = dtype_notes(load_recipe(RECIPE, (*AUTO, "executor=ray", "cluster.address=10.0.0.1:6379")))
    assert notes == ["policy.dtype, reference.dtype: auto is bfloat16, this GPU has bfloat16 units"]
