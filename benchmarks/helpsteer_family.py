"""Measure the systems of the HelpSteer family on the bundled task over several seeds.

    python benchmarks/helpsteer_family.py OUT [--seeds 0 1 2] [--only steerlm genrm feedback_edit]

Trained once: the imitation stages (fine-tuned model, feedback model, edit model, generative reward model) and the
reward models. For each seed (data order and noise): SteerLM with high and low helpfulness and verbosity, and SteerLM
2.0 from it; GRPO of the generative reward model, and RLOO against it; RLOO of the edit model, and feedback-edit scaling
against the best of as many tokens of drafts. Every run is one process with one thread. Finished runs are not repeated,
so seeds may run in parallel after ``--seeds`` without a number has trained the shared models.
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
from align.config import ModelGeneratorConfig, SamplingConfig
from align.data import steerlm as steering
from align.data import toy, toy_family
from align.data.chat import Message
from align.engines import distributed
from align.generators.base import Request
from align.generators.models import ModelGenerator

RECIPES = Path(__file__).resolve().parents[1] / "recipes" / "quickstart"
SCALE = RECIPES.parent / "scale" / "quickstart.yaml"
ROWS, HELD_OUT, PROMPTS = 8000, 300, 200
SETTINGS = {
    f"helpfulness {helpfulness}, verbosity {verbosity}": {"helpfulness": helpfulness, "verbosity": verbosity}
    for helpfulness, verbosity in ((4, 2), (1, 2), (3, 2), (3, 4))
}

SHARED = {  # the trained role, and the recipe that it starts from
    "family_sft": ("policy", ""),
    "family_attributes": ("reward", "family_sft"),
    "feedback_edit_feedback": ("policy", "family_sft"),
    "feedback_edit_edit": ("policy", "family_sft"),
    "feedback_edit_reward": ("reward", "family_sft"),
    "feedback_edit_select": ("reward", "family_sft"),
    "genrm_sft": ("policy", "feedback_edit_feedback"),
}

VERDICTS = [
    f"{kind}/{measure}"
    for kind in ("sampled", "greedy")
    for measure in ("agreement", "first_order", "order_consistency", "reward")
]

Numbers = dict[str, float]


class Seed:
    """The runs of one seed, and those shared by all seeds."""

    def __init__(self, out: Path, seed: int):
        self.out, self.seed, self.own = out, seed, out / f"seed-{seed}"

    def train(self, recipe: str, *changes: str, shared: bool = False) -> Path:
        """Run a recipe in this process, unless it is finished; returns its run folder."""
        folder = (self.out if shared else self.own) / recipe
        seed = [] if shared else [f"run.seed={self.seed}"]
        common = [f"run.dir={folder}", "executor=local", "run.progress=none", "checkpoint.every=0"]
        everything = [*common, *seed, f"data.path={self.out / 'data'}", *changes]
        if not (folder / "final").is_dir() and align(["train", str(RECIPES / f"{recipe}.yaml"), *everything]):
            raise SystemExit(f"{folder} failed")
        return folder

    def shared(self, recipe: str) -> Path:
        """A model that all seeds start from; trains its own start first."""
        if not (self.out / "data").is_dir():
            toy_family.write_toy_family(self.out / "data", ROWS, HELD_OUT, seed=0)
        role, start = SHARED[recipe]
        path = self.shared(start) if start else self.out / "data" / "tokenizer"
        return self.train(recipe, f"{role}.path={path}", shared=True) / "final"


def held_out(out: Path) -> list[str]:
    """Instructions of the validation split."""
    with gzip.open(out / "data" / "preference" / "validation.jsonl.gz", "rt") as file:
        return [json.loads(line)["context"][-1]["content"] for line in file][:PROMPTS]


def steered(model: Path, instructions: list[str], values: Mapping[str, int], seed: int) -> tuple[float, float]:
    """Mean ground truth and number of words of sampled answers, with ``values`` in the prompt."""
    form = steering.read_steering_card(model / steering.NAME).asking(values)
    generator = ModelGenerator(
        ModelGeneratorConfig(path=str(model), dtype="float32"), distributed.initialize_alone(), seed
    )
    requests = []
    for text in instructions:
        messages, opening = form.steered((Message("user", text),))
        requests.append(Request(messages, 0, opening))
    answers = [completion.text for completion in generator.complete(requests, SamplingConfig(max_tokens=32))]
    scores = [toy.score(text, answer) for text, answer in zip(instructions, answers, strict=True)]
    return fmean(scores), fmean(len(answer.split()) for answer in answers)


def lines(folder: Path, name: str) -> list[dict[str, float]]:
    """The lines of a file of a run."""
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def steerlm(seed: Seed) -> Numbers:
    """SteerLM at four settings, and SteerLM 2.0 at the best."""
    base, attributes = seed.shared("family_sft"), seed.shared("family_attributes")
    first = seed.train("steerlm", f"policy.path={base}", f"reward.path={attributes}") / "final"
    places = [f"policy.path={first}", f"base.path={base}", f"reward.path={attributes}"]
    second = seed.train("steerlm2", *places) / "final"
    instructions, numbers = held_out(seed.out), {}
    for name, model in (("SteerLM", first), ("SteerLM 2.0", second)):
        for setting, values in SETTINGS.items():
            score, words = steered(model, instructions, values, seed.seed)
            numbers |= {f"{name}, {setting}: ground truth": score, f"{name}, {setting}: words": words}
    return numbers


def genrm(seed: Seed) -> Numbers:
    """Agreement of a generative judge with the ground truth before and after GRPO, and of a policy aligned with it."""
    trained = seed.train("genrm", f"policy.path={seed.shared('genrm_sft')}")
    measured = lines(trained, "evaluations.jsonl")
    numbers = {}
    for when, line in (("before", measured[0]), ("after", measured[-1])):
        for key in VERDICTS:
            numbers[f"judge {when} GRPO: {key}"] = line[f"heldout/{key}"]
    base = seed.shared("family_sft")
    aligned = seed.train("rloo_genrm", f"policy.path={base}", f"reward.judge.path={trained / 'final'}")
    measured = lines(aligned, "evaluations.jsonl")
    for when, line in (("before", measured[0]), ("after", measured[-1])):
        numbers[f"policy {when} RLOO against the judge: ground truth"] = line["heldout/sampled/ground_truth"]
    return numbers


def feedback_edit(seed: Seed) -> Numbers:
    """Ground truth of drafts, edits, and the best of as many tokens of drafts; edits before and after RLOO."""
    base, feedback, imitated, judge, select = map(
        seed.shared, ("family_sft", *(f"feedback_edit_{name}" for name in ("feedback", "edit", "reward", "select")))
    )
    edit = seed.train("feedback_edit", f"policy.path={imitated}", f"reward.path={judge}")
    measured = lines(edit, "evaluations.jsonl")
    numbers = {}
    for when, line in (("before", measured[0]), ("after", measured[-1])):
        for kind in ("sampled", "greedy"):
            for key in ("ground_truth", "copies"):
                numbers[f"edits {when} RLOO: {kind}/{key}"] = line[f"heldout/{kind}/{key}"]
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
    for name, setting in compared.items():
        numbers |= {f"{name}: ground truth": setting["ground_truth"], f"{name}: tokens": setting["tokens"]}
    return numbers


PARTS: dict[str, Callable[[Seed], Numbers]] = {
    "steerlm": steerlm,
    "genrm": genrm,
    "feedback_edit": feedback_edit,
}


def main() -> None:
    """Run missing runs and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="parts (all)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for recipe in SHARED:
        Seed(arguments.out.resolve(), 0).shared(recipe)
    numbers = {seed: {} for seed in arguments.seeds}
    for name in arguments.only:
        for number in arguments.seeds:
            numbers[number] |= PARTS[name](Seed(arguments.out.resolve(), number))
    if not arguments.seeds:
        return
    print(f"| | mean | spread | seeds {' '.join(map(str, arguments.seeds))} |\n|---|---|---|---|")
    for key in numbers[arguments.seeds[0]]:
        values = [numbers[number][key] for number in arguments.seeds]
        spread = f"{stdev(values):.3f}" if len(values) > 1 else ""
        print(f"| {key} | {fmean(values):.3f} | {spread} | {', '.join(f'{value:.3f}' for value in values)} |")


if __name__ == "__main__":
    main()
