"""The run folder: configuration, environment, metrics, samples."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from align import config as configuration
from align.data.prompts import PromptStream
from align.errors import ConfigError
from align.roles import Future, Policy
from align.run import display
from align.run.clock import Clock
from align.sections import Recipe, Sampling
from align.types import Rollouts

PACKAGES = ("torch", "transformers", "deepspeed", "ray", "trl", "omegaconf", "datasets", "peft", "numpy")


def environment() -> dict[str, Any]:
    """What the numbers of a run depend on beside its configuration."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        revision = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git on this machine
        revision = ""
    return {
        "align": metadata.version("align"),
        "python": sys.version.split()[0],
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "git_revision": revision or None,
        "machine": {"node": platform.node(), "system": platform.platform(), "cores": os.cpu_count()},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


class Run:
    """One training run. Use as a context manager; an algorithm iterates over `steps` and calls `log` in each."""

    def __init__(self, recipe: Recipe, decode: Callable[[Sequence[int]], str]):
        """Make the folder and write what is known before the start. ``decode`` turns token ids into text for
        samples."""
        self.recipe, self.section, self.decode = recipe, recipe.run, decode
        self.folder = Path(self.section.dir).expanduser().absolute()
        self.clock = Clock()
        self.round = 1
        self.state: dict[str, float] = {}
        """Numbers that an algorithm carries from step to step: KL coefficient, moments of rewards, best score."""
        self._create()

    def _create(self) -> None:
        if self.folder.is_dir() and any(self.folder.iterdir()):
            raise ConfigError(
                f"run.dir={self.folder} is not empty", remedy="choose another run.dir, or move the old run away"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigError(f"run.dir={self.folder} cannot be made: {error.strerror}") from error
        configuration.dump(self.recipe, self.folder / "config.yaml")
        self.write_json("environment.json", environment())

    @property
    def _here(self) -> Path:
        """Where this round's models go: the last round's into the run folder itself."""
        last = self.recipe.num_rounds()
        return self.folder if self.round == last else self.folder / f"round-{self.round}"

    @property
    def final(self) -> Path:
        """Where the trained model of this round goes."""
        return self._here / "final"

    @property
    def best(self) -> Path | None:
        """The policy of this round that did best on held-out prompts, where one was kept."""
        step = self.state.get("best_step")
        return None if step is None else self._best_at(int(step))

    def _best_at(self, step: int) -> Path:
        return self._here / "best" / f"step-{step:06d}"

    def keep_best(self, step: int, policy: Policy) -> None:
        """Write the policy as the best one so far; the one before is deleted when the new one is complete."""
        before, folder = self.best, self._best_at(step)
        folder.parent.mkdir(parents=True, exist_ok=True)
        policy.export(folder).result()
        self.state["best_step"] = step
        if before is not None:
            shutil.rmtree(before)

    def begin_round(self, number: int) -> None:
        """Round 1, 2, ...: steps go on counting, and the numbers that an algorithm carries start anew."""
        self.round, self.state = number, {}

    @property
    def logs(self) -> Path:
        """Where workers write."""
        return self.folder / "logs"

    def write_json(self, name: str, content: Any) -> None:
        """Write a small file of the run folder."""
        (self.folder / name).write_text(json.dumps(content, indent=2) + "\n")

    def __enter__(self) -> Run:
        self._metrics = (self.folder / "metrics.jsonl").open("a", buffering=1, encoding="utf-8")
        self._samples = (self.folder / "samples.jsonl").open("a", buffering=1, encoding="utf-8")
        self._board = SummaryWriter(self.folder / "tensorboard") if self.section.tensorboard else None
        self._evaluations = (self.folder / "evaluations.jsonl").open("a", buffering=1, encoding="utf-8")
        total = self.section.steps * self.recipe.num_rounds()
        self._display = display.make(self.section.progress, self.recipe.algorithm, total)
        self.clock.on_phase = self._display.phase
        return self

    def __exit__(self, *_: object) -> None:
        self._display.close()
        self._metrics.close()
        self._samples.close()
        self._evaluations.close()
        if self._board:
            self._board.close()

    def steps(self) -> Iterator[int]:
        """1, 2, ..., ``run.steps``; in a later round on from there."""
        self._begun = time.perf_counter()
        yield from range(self.first_step, self.round * self.section.steps + 1)

    @property
    def first_step(self) -> int:
        """The first step of this round."""
        return (self.round - 1) * self.section.steps + 1

    def is_last(self, step: int) -> bool:
        """Whether a step is the last of its round."""
        return step == self.round * self.section.steps

    def rollouts(
        self, prompts: PromptStream, policy: Policy, sampling: Sampling, lag: int
    ) -> Iterator[tuple[int, Rollouts]]:
        """Each step with the rollouts it learns from.

        Those of step s + lag are asked for before step s trains, so they come from the weights after step s - 1 and
        meet a policy that is ``lag`` updates further. With ``lag`` 0 a step asks for its own rollouts and waits.
        """
        waiting: deque[Future[Rollouts]] = deque()
        last = self.round * self.section.steps
        for step in self.steps():
            while len(waiting) <= min(lag, last - step):
                waiting.append(policy.generate(prompts.batch(step + len(waiting)), sampling))
            yield step, waiting.popleft().result()

    def log(
        self, step: int, metrics: Mapping[str, float], rollouts: Rollouts | None = None, score_B: Tensor | None = None
    ) -> None:
        """End a step: add seconds by phase and tokens per second, and write everything where it belongs.

        ``rollouts`` and their ``score_B`` give a few samples in readable form.
        """
        now = time.perf_counter()
        seconds = self.clock.drain(now - self._begun)
        self._begun = now
        line = {"step": step, **metrics, **{f"seconds/{name}": value for name, value in seconds.items()}}
        if rollouts is not None:
            line["generated_tokens"] = float(rollouts.mask_BT.sum())
            self._log_samples(step, rollouts, score_B)
        for phase, tokens in (("generate", "generated_tokens"), ("update", "trained_tokens")):
            if tokens in line and seconds.get(phase):
                line[f"tokens_per_second/{phase}"] = line[tokens] / seconds[phase]
        self._metrics.write(json.dumps(_finite(line)) + "\n")
        if self._board:
            for name, value in line.items():
                self._board.add_scalar(name, value, step)
        self._display.step(step, line)

    def evaluated(self, step: int, metrics: Mapping[str, float], answers: Sequence[Mapping[str, Any]]) -> None:
        """Write a held-out evaluation: its numbers and the answers they were taken from, one line."""
        line = {"step": step, **_finite(metrics), "answers": [_finite(answer) for answer in answers]}
        self._evaluations.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _log_samples(self, step: int, rollouts: Rollouts, score_B: Tensor | None) -> None:
        sequences = rollouts.sequences
        count = min(self.section.logged_samples, len(rollouts))
        for i in (k * len(rollouts) // count for k in range(count)):  # spread over the prompts
            sample = {
                "step": step,
                "prompt": self.decode(sequences.prompts.row(int(sequences.prompt_B[i])).tolist()),
                "response": self.decode(sequences.responses.row(i).tolist()),
                "finished": bool(rollouts.finished_B[i]),
                "score": None if score_B is None else float(score_B[i]),
            }
            self._samples.write(json.dumps(_finite(sample), ensure_ascii=False) + "\n")


def _finite(line: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers that are not finite as text, since JSON has no word for them."""
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in line.items()
    }
