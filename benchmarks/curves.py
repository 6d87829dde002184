"""Plot the curve of each recipe from the results of `benchmarks/algorithms.py`.

    python benchmarks/curves.py OUT docs/images

One SVG for each recipe: ground truth of held-out prompts (greedy and sampled) and the reward model's score of the
rollouts or held-out answers, by step; a line is the mean over seeds, a band spans the lowest to the highest.
Needs matplotlib: ``pip install -e ".[docs]"``.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

INK, MUTED = "#1f2430", "#6b7280"
COLOURS = {"greedy": "#0b7285", "sampled": "#c2410c"}
LABELS = {"ground_truth": "ground truth, 0 to 4", "reward": "reward model's score"}


def series(folders: list[Path], name: str) -> dict[int, list[float]]:
    """Values of a held-out metric by step, over all seeds."""
    found: dict[int, list[float]] = defaultdict(list)
    for folder in folders:
        for line in (folder / "evaluations.jsonl").read_text().splitlines():
            row = json.loads(line)
            if name in row:
                found[row["step"]].append(row[name])
    return dict(sorted(found.items()))


def draw(recipe: str, folders: list[Path], target: Path) -> None:
    """One figure with two panels."""
    plt.rcParams.update(
        {"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": recipe, "axes.edgecolor": MUTED, "text.color": INK}
    )
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 2.6), layout="constrained")
    for axis, (metric, label) in zip(axes, LABELS.items(), strict=True):
        for kind, colour in COLOURS.items():
            points = series(folders, f"heldout/{kind}/{metric}")
            steps, values = list(points), list(points.values())
            means = [sum(v) / len(v) for v in values]
            axis.plot(steps, means, color=colour, lw=1.8, marker="o", ms=3.5, label=kind)
            axis.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.18, lw=0)
        axis.set_xlabel("step")
        axis.set_ylabel(label)
        axis.grid(axis="y", color="#e5e7eb", lw=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylim(0, 4.1)
    axes[0].legend(frameon=False, loc="lower right")
    figure.suptitle(f"recipes/quickstart/{recipe}.yaml, 100 held-out prompts, {len(folders)} seeds", fontsize=9)
    figure.savefig(target / f"{recipe}.svg", metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Draw every recipe of the table."""
    out, target = Path(sys.argv[1]), Path(sys.argv[2])
    target.mkdir(parents=True, exist_ok=True)
    table = json.loads((out / "table.json").read_text())
    for recipe in table["runs"]:
        draw(recipe, [out / f"runs/{recipe}-{seed}" for seed in table["seeds"]], target)


if __name__ == "__main__":
    main()
