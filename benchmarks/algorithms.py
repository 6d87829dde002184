"""Measure every alignment recipe of the quickstart on the bundled task over several seeds.

    python benchmarks/algorithms.py OUT [--seeds 0 1 2] [--recipes rloo ppo ...] [--jobs 2] [--executor local]

Fine-tunes and trains the reward model once (`recipes/quickstart/{sft,reward_model}.yaml`), then aligns from there with
each recipe and seed (data order and sampling noise), ``--jobs`` runs in parallel with one thread each, and measures
every policy by `align compare` on 200 held-out prompts. Writes OUT/table.json and OUT/table.md; finished runs are kept,
so the same command resumes. `benchmarks/curves.py` plots the curves.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean, stdev

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes" / "quickstart"
BASE = ("sft", "reward_model")
COLUMNS = ("ground_truth", "kl", "reward", "tokens")


def align(out: Path, *words: str, threads: int) -> None:
    """Run the command in OUT; the recipes refer to its ``runs/quickstart``."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "align.cli", *words]
    done = subprocess.run(command, cwd=out, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def prepare(out: Path) -> None:
    """Make the data, the fine-tuned policy and the reward model, if they are missing."""
    if not (out / "runs/quickstart/data").is_dir():
        align(out, "toy", "runs/quickstart/data", "--train", "12000", threads=1)
    for name in BASE:
        if not (out / f"runs/quickstart/{name}/final").is_dir():
            shutil.rmtree(out / f"runs/quickstart/{name}", ignore_errors=True)
            align(out, "train", str(RECIPES / f"{name}.yaml"), threads=os.cpu_count() or 1)


def run_recipe(out: Path, recipe: str, seed: int, executor: str) -> dict[str, float]:
    """Align with one recipe and seed, and measure; returns the numbers before and after."""
    folder = out / f"runs/{recipe}-{seed}"
    verdict = folder / "verdict.json"
    if not verdict.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        start = time.perf_counter()
        changes = [f"run.dir={folder}", f"run.seed={seed}", f"executor={executor}", "run.progress=none"]
        align(out, "train", str(RECIPES / f"{recipe}.yaml"), *changes, threads=1)
        seconds = time.perf_counter() - start
        base = "runs/quickstart"
        compare = ["--reward", f"{base}/reward_model/final", "--data", f"{base}/data", "--json", str(verdict)]
        align(out, "compare", f"{base}/sft/final", str(folder / "final"), *compare, threads=1)
        verdict.write_text(json.dumps(json.loads(verdict.read_text()) | {"seconds": seconds}))
    numbers = json.loads(verdict.read_text())
    print(
        recipe,
        seed,
        {name: round(numbers["after"][name], 3) for name in COLUMNS},
        round(numbers["seconds"]),
        flush=True,
    )
    return {
        "before": numbers["before"]["ground_truth"],
        **{name: numbers["after"][name] for name in COLUMNS},
        "seconds": numbers["seconds"],
    }


def main() -> None:
    """Run missing runs and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    every = sorted(path.stem for path in RECIPES.glob("*.yaml") if path.stem not in BASE)
    parser.add_argument("--recipes", nargs="+", choices=every, default=every)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--executor", choices=("local", "ray"), default="local")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    prepare(out)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        futures = {
            (recipe, seed): pool.submit(run_recipe, out, recipe, seed, arguments.executor)
            for seed in arguments.seeds
            for recipe in arguments.recipes
        }
        numbers = {key: future.result() for key, future in futures.items()}
    table = {recipe: [numbers[recipe, seed] for seed in arguments.seeds] for recipe in arguments.recipes}
    (out / "table.json").write_text(json.dumps({"seeds": arguments.seeds, "runs": table}, indent=2) + "\n")
    names = ["before", *COLUMNS, "seconds"]
    lines = ["| recipe | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for recipe, runs in table.items():
        cells = []
        for name in names:
            values = [run[name] for run in runs]
            spread = f" ± {stdev(values):.3f}" if len(values) > 1 and name not in ("before", "seconds") else ""
            cells.append(f"{fmean(values):.0f}" if name == "seconds" else f"{fmean(values):.3f}{spread}")
        lines.append(f"| {recipe} | " + " | ".join(cells) + " |")
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
