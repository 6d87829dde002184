"""The systems of the HelpSteer family on the bundled task, each over several seeds.

    python benchmarks/helpsteer_family.py OUT [--seeds 0 1 2] [--only steerlm genrm feedback_edit]

Trained once: a fine-tuned model and a reward model of five attributes. For each seed (data order, new heads, noise):
SteerLM asked for high and low helpfulness and verbosity, and SteerLM 2.0 from it; a generative judge by imitation and
then GRPO, and RLOO against it; feedback and edit models, their reward models, RLOO of the edit model, and drafts that
are improved against the best of as many tokens of drafts. Every run is one process with one thread. Runs that are there
are not repeated, so seeds may be started side by side once the first has made what they share.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean, stdev

import torch

from align.cli import main as align
from align.data import steering, toy, toy_family
from align.data.chat import Message
from align.engines import distributed
from align.generators.base import Request
from align.generators.models import ModelGenerator
from align.sections import Generator, Sampling

RECIPES = Path(__file__).resolve().parents[1] / "recipes" / "quickstart"
SCALE = RECIPES.parent / "scale" / "quickstart.yaml"
ROWS, HELD_OUT, PROMPTS = 8000, 300, 200
SETTINGS = {
    "helpfulness 4, verbosity 2": {"helpfulness": 4, "verbosity": 2},
    "helpfulness 1, verbosity 2": {"helpfulness": 1, "verbosity": 2},
    "helpfulness 3, verbosity 4": {"helpfulness": 3, "verbosity": 4},
    "helpfulness 0, verbosity 1": {"helpfulness": 0, "verbosity": 1},
}

Numbers = dict[str, float]


class Seed:
    """The runs of one seed, and what they share with others."""

    def __init__(self, out: Path, seed: int):
        self.out, self.seed, self.own = out, seed, out / f"seed-{seed}"

    def train(self, recipe: str, *changes: str, shared: bool = False) -> Path:
        """Run a recipe in this process, where it has not run yet; returns its run folder."""
        folder = (self.out if shared else self.own) / recipe
        seed = [] if shared else [f"run.seed={self.seed}"]
        common = [f"run.dir={folder}", "executor=local", "run.progress=none", "checkpoint.every=0"]
        everything = [*common, *seed, f"data.path={self.out / 'data'}", *changes]
        if not (folder / "final").is_dir() and align(["train", str(RECIPES / f"{recipe}.yaml"), *everything]):
            raise SystemExit(f"{folder} failed")
        return folder

    def shared(self) -> tuple[Path, Path]:
        """The fine-tuned model and the attribute model."""
        if not (self.out / "data").is_dir():
            toy_family.write(self.out / "data", ROWS, HELD_OUT, seed=0)
        base = self.train("family_sft", f"policy.path={self.out / 'data' / 'tokenizer'}", shared=True) / "final"
        return base, self.train("family_attributes", f"reward.path={base}", shared=True) / "final"


def held_out(out: Path) -> list[str]:
    """Instructions of the validation split."""
    with gzip.open(out / "data" / "preference" / "validation.jsonl.gz", "rt") as file:
        return [json.loads(line)["context"][-1]["content"] for line in file][:PROMPTS]


def steered(model: Path, instructions: list[str], values: Mapping[str, int], seed: int) -> tuple[float, float]:
    """Mean ground truth and words of sampled answers that ask for ``values``."""
    form = steering.read(model / steering.NAME).asking(values)
    generator = ModelGenerator(Generator(path=str(model), dtype="float32"), distributed.initialize_alone(), seed)
    requests = []
    for text in instructions:
        messages, opening = form.steered((Message("user", text),))
        requests.append(Request(messages, 0, opening))
    answers = [one.text for one in generator.complete(requests, Sampling(max_tokens=32))]
    scores = [toy.score(text, answer) for text, answer in zip(instructions, answers, strict=True)]
    return fmean(scores), fmean(len(answer.split()) for answer in answers)


def lines(folder: Path, name: str) -> list[dict[str, float]]:
    """The lines of a file of a run."""
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def steerlm(seed: Seed) -> Numbers:
    """SteerLM at four settings, and SteerLM 2.0 at the best."""
    base, attributes = seed.shared()
    first = seed.train("steerlm", f"policy.path={base}", f"reward.path={attributes}") / "final"
    places = [f"policy.path={first}", f"base.path={base}", f"reward.path={attributes}"]
    second = seed.train("steerlm2", *places) / "final"
    instructions, found = held_out(seed.out), {}
    for name, model in (("SteerLM", first), ("SteerLM 2.0", second)):
        for setting, values in SETTINGS.items():
            score, words = steered(model, instructions, values, seed.seed)
            found |= {f"{name}, {setting}: ground truth": score, f"{name}, {setting}: words": words}
    return found


def genrm(seed: Seed) -> Numbers:
    """Agreement of a generative judge with the ground truth before and after GRPO, and of a policy aligned with it."""
    base, _ = seed.shared()
    start = seed.train("genrm_sft", f"policy.path={base}") / "final"
    trained = seed.train("genrm", f"policy.path={start}")
    measured = lines(trained, "evaluations.jsonl")
    found = {}
    for when, line in (("before", measured[0]), ("after", measured[-1])):
        for key in (key for key in line if "agree" in key):
            found[f"judge {when} GRPO: {key.removeprefix('heldout/greedy/')}"] = line[key]
    aligned = seed.train("rloo_genrm", f"policy.path={base}", f"reward.generative.judge.path={trained / 'final'}")
    measured = lines(aligned, "evaluations.jsonl")
    for when, line in (("before", measured[0]), ("after", measured[-1])):
        found[f"policy {when} RLOO against the judge: ground truth"] = line["heldout/sampled/ground_truth"]
    return found


def feedback_edit(seed: Seed) -> Numbers:
    """Ground truth of drafts, of drafts that were improved, and of the best of as many tokens of drafts; what RLOO did
    to the edit model."""
    base, _ = seed.shared()
    start = f"policy.path={base}"
    feedback = seed.train("feedback_edit_feedback", start, shared=True) / "final"
    judge = seed.train("feedback_edit_reward", f"reward.path={base}", shared=True) / "final"
    select = seed.train("feedback_edit_select", f"reward.path={base}", shared=True) / "final"
    imitated = seed.train("feedback_edit_edit", start) / "final"
    edit = seed.train("feedback_edit", f"policy.path={imitated}", f"reward.path={judge}")
    measured = lines(edit, "evaluations.jsonl")
    found = {}
    for when, line in (("before", measured[0]), ("after", measured[-1])):
        found[f"edits {when} RLOO: ground truth"] = line["heldout/sampled/ground_truth"]
    out = seed.own / "scale"
    models = {"policy": base, "feedback": feedback, "edit": edit / "final", "select": select}
    places = [f"{role}.path={model}" for role, model in models.items()]
    places += [f"prompts.path={seed.out / 'data'}", f"out={out}", f"seed={seed.seed}", "executor=local"]
    if not (out / "scaling.json").is_file() and align(["scale", str(SCALE), *places]):
        raise SystemExit(f"{out} failed")
    whole = json.loads((out / "scaling.json").read_text())
    compared = {
        "one draft": whole["one_draft"],
        "best of the drafts that were edited": whole["drafts_alone"],
        "feedback and edits": whole["whole"]["feedback_edit"],
        "best of as many tokens of drafts": whole["whole"]["best_of_n"],
    }
    for name, one in compared.items():
        found |= {f"{name}: ground truth": one["ground_truth"], f"{name}: tokens": one["tokens"]}
    return found


PARTS: dict[str, Callable[[Seed], Numbers]] = {
    "steerlm": steerlm,
    "genrm": genrm,
    "feedback_edit": feedback_edit,
}


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="parts (all)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    numbers = {seed: {} for seed in given.seeds}
    for name in given.only:
        for number in given.seeds:
            numbers[number] |= PARTS[name](Seed(given.out.resolve(), number))
    print(f"| | mean | spread | seeds {' '.join(map(str, given.seeds))} |\n|---|---|---|---|")
    for key in numbers[given.seeds[0]]:
        values = [numbers[number][key] for number in given.seeds]
        spread = f"{stdev(values):.3f}" if len(values) > 1 else ""
        print(f"| {key} | {fmean(values):.3f} | {spread} | {', '.join(f'{value:.3f}' for value in values)} |")


if __name__ == "__main__":
    main()
