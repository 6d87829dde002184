"""Measure whether a first stage of regression improves a reward model on the bundled task (HelpSteer2-Preference).

    python benchmarks/two_stage_reward.py OUT [--seeds 0 1 2] [--steps 300] [--lr 2e-4] [--first-lr 3e-4]

From one fine-tuned model, for each seed (data order, new heads): scaled Bradley-Terry only; helpfulness regression for
as many steps, then scaled Bradley-Terry from its body and head; and scaled Bradley-Terry only, for the steps of both.
Accuracy and loss on held-out pairs, mean and standard deviation over seeds. Finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean, stdev

from align.cli import main as align
from align.data import toy

RECIPES = Path(__file__).resolve().parents[1] / "recipes" / "quickstart"
ROWS, HELD_OUT = 6000, 1000


def train(recipe: str, folder: Path, *changes: str) -> Path:
    """Run a recipe of the quickstart in this process, unless it is finished; returns the model."""
    common = [f"run.dir={folder}", "executor=local", "run.progress=none", "checkpoint.every=0"]
    if not (folder / "final").is_dir() and align(["train", str(RECIPES / f"{recipe}.yaml"), *common, *changes]):
        raise SystemExit(f"{folder} failed")
    return folder / "final"


def compare(out: Path, base: Path, seed: int, arguments: argparse.Namespace) -> dict[str, Path]:
    """Train the runs of one seed; returns their folders by name."""
    common = [f"run.seed={seed}", f"data.path={out / 'data'}", "batch_size=64", "validate_every=0"]
    pairs = [*common, "loss=scaled", f"reward.optimizer.lr={arguments.lr}"]
    regression = ["loss=regression", "data.format=helpsteer2", "reward.attributes=[helpfulness]"]
    regression += [f"reward.optimizer.lr={arguments.first_lr}"]
    steps = arguments.steps
    runs = {name: out / f"{name}-{seed}" for name in ("scaled", "regression", "two stages", "scaled, longer")}
    start = f"reward.path={base}"
    train("reward_model", runs["scaled"], *pairs, start, f"run.steps={steps}")
    train("reward_model", runs["scaled, longer"], *pairs, start, f"run.steps={2 * steps}")
    first = train("reward_model", runs["regression"], *common, *regression, start, f"run.steps={steps}")
    train("reward_model", runs["two stages"], *pairs, f"reward.path={first}", f"run.steps={steps}")
    return runs


def main() -> None:
    """Run missing runs and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300, help="of each stage (%(default)s)")
    parser.add_argument("--lr", default="2e-4", help="of pairs, falling to 0 (%(default)s)")
    parser.add_argument("--first-lr", default="3e-4", help="of the regression, falling to 0 (%(default)s)")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    if not (out / "data").is_dir():
        toy.write_toy(out / "data", ROWS, HELD_OUT, seed=0)
    places = [f"data.path={out / 'data'}", f"policy.path={out / 'data' / 'tokenizer'}"]
    base = train("sft", out / "sft", *places)
    runs = [compare(out, base, seed, arguments) for seed in arguments.seeds]
    print("| | accuracy | loss |\n|---|---|---|")
    for name in ("scaled", "two stages", "scaled, longer"):
        last = [json.loads((run[name] / "metrics.jsonl").read_text().splitlines()[-1]) for run in runs]
        cells = []
        for key in ("validation/accuracy", "validation/loss"):
            values = [line[key] for line in last]
            spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{fmean(values):.3f}{spread} ({', '.join(f'{value:.3f}' for value in values)})")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
