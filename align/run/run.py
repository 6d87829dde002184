"""A run: its folder, its steps, its numbers, and how it stops and goes on."""

from __future__ import annotations

import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from align.config import RecipeConfig, SamplingConfig
from align.data.prompts import PromptStream
from align.errors import AlignError, DivergedError, SaveError, StoppedError
from align.roles import CompletedFuture, Future, MeteredRole, PolicyRole, SamplingRole, StatefulRole
from align.run import bundle, display
from align.run.checkpointing import Content, Progress, Saver, read_content
from align.run.clock import Clock
from align.run.folder import Folder, damage_of
from align.run.identity import Identity
from align.run.stopping import Stopping
from align.types import Rollouts
from align.utils import fault_injection
from align.utils.disk import saving


class Run:
    """One training run. Use as a context manager; an algorithm iterates over `steps` and calls `log` in each.

    Between two steps it saves checkpoints and checks for requests to stop. What an algorithm does before its first step
    uses the weights that the round starts from, in a resumed run too: the roles load the checkpoint when `steps` is
    first iterated.
    """

    def __init__(
        self,
        recipe: RecipeConfig,
        decode: Callable[[Sequence[int]], str],
        identity: Identity | None = None,
        stopping: Stopping | None = None,
        decode_samples: Callable[[Sequence[int]], str] | None = None,
    ):
        """``decode`` turns token ids into text, ``decode_samples`` for ``samples.jsonl`` (``decode`` where it is None).
        Without ``stopping`` no signal is heard. Nothing is touched before the context is entered."""
        self.recipe, self.section, self.decode = recipe, recipe.run, decode
        self._decode_samples = decode_samples or decode
        self.identity = identity or Identity.of(recipe, {}, {})
        self.stopping = stopping or Stopping(self.folder, self.section.max_seconds)
        self.clock = Clock()
        self.progress = Progress()
        self.tensors: dict[str, Tensor] = {}
        """Tensors that an algorithm carries from step to step, as `state` does with numbers."""
        self.stop_after: int | None = None
        """A step after which the run ends at once, without a checkpoint: the end of a replay."""
        self._roles: dict[str, StatefulRole] = {}
        self._counting: dict[str, MeteredRole] = {}
        self._waiting: deque[Future[Rollouts]] = deque()
        self.sampled: Rollouts | None = None
        """The rollouts of the step under way."""
        self.metrics: dict[str, float] = {}
        """The numbers of the last step."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.section.dir).expanduser().absolute()

    @property
    def state(self) -> dict[str, float]:
        """Numbers that an algorithm carries from step to step: KL coefficient, moments of rewards, best score."""
        return self.progress.state

    @property
    def round(self) -> int:
        """Number of the round, from 1."""
        return self.progress.round

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

    def keep_best(self, step: int, policy: PolicyRole, extra: Mapping[str, str] | None = None) -> None:
        """Write the policy as the best one so far, with the ``extra`` files, text by name. Those before go when no
        checkpoint speaks of them any more."""
        folder = self._best_at(step)
        with saving(folder.parent):
            folder.parent.mkdir(parents=True, exist_ok=True)
        policy.export(folder, extra).result()
        self.state["best_step"] = step

    @property
    def logs(self) -> Path:
        """Where workers write."""
        return self.folder / "logs"

    def write_json(self, name: str, content: Any) -> None:
        """Write a small file of the run folder."""
        self.disk.write_json(name, content)

    def write_text(self, name: str, text: str) -> None:
        """Write a file of the run folder, whole or not at all."""
        self.disk.write_text(name, text)

    def report(self, line: str) -> None:
        """Tell the user something at once."""
        self.disk.report(line)

    # Beginning, going on, ending

    def __enter__(self) -> Run:
        self.disk = Folder(self.recipe, self.identity)
        self.disk.open()
        try:
            self._rewind()
            total = self.section.steps * self.recipe.num_rounds()
            self._display = display.make(self.section.progress, self.recipe.algorithm, total)
            self.clock.on_phase = self._display.phase
        except BaseException:
            self.disk.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._display.close()
        self.disk.close()

    @property
    def finished(self) -> bool:
        """Whether the folder holds the run's final model already."""
        return self.disk.finished

    def _rewind(self) -> None:
        """Stand where the checkpoint to go on from was taken, or at the beginning."""
        self.saver = Saver(self.disk.checkpoints, self.disk.facts, self.recipe.checkpoint.overlap)
        checkpoint = self.disk.checkpoint
        content = Content(Progress(), {}, []) if checkpoint is None else read_content(checkpoint)
        self.progress, self.tensors = content.progress, dict(content.tensors)
        self._waiting = deque(CompletedFuture(rollouts) for rollouts in content.waiting)
        self.clock.step = self.progress.step
        self.disk.truncate_to_step(self.progress)

    def start_of(self, number: int) -> Path | None:
        """The model that a round starts from: the best of the one before, or its last; None for the recipe's own."""
        if number == 1:
            return None
        known = self.progress.starts.get(str(number))
        return self.folder / known if known else self.best or self.final

    def begin_round(self, number: int, start: Path | None = None) -> bool:
        """Round 1, 2, ...: steps go on counting, and the numbers that an algorithm carries start anew.

        Returns whether anything is left to do: a resumed run has rounds behind it. ``start`` is the model that the
        round starts from.
        """
        if number > self.round:
            new = {} if start is None else {str(number): str(start.relative_to(self.folder))}
            starts = self.progress.starts | new
            self.progress = Progress(step=self.progress.step, round=number, starts=starts, totals=self.progress.totals)
            self.tensors = {}
        if not os.path.lexists(self.final):
            return True
        why = "the run goes on beyond it"
        if self.progress.step >= self.round * self.section.steps:
            damage = damage_of(self.final)
            if damage is None:
                return False
            why = f"it is damaged ({damage}), and is written again from the last checkpoint"
        self.disk.rename_final(self.final, why)
        return True

    def rounds(self) -> Iterator[RecipeConfig]:
        """The recipe of each round that is left, with the models that the round starts from."""
        for number in range(self.round, self.recipe.num_rounds() + 1):
            start = self.start_of(number)
            if self.begin_round(number, start):
                yield self.recipe if start is None else self.recipe.in_round(str(start))

    def attach(self, roles: object, worlds: Mapping[str, Mapping[str, int]]) -> None:
        """The roles of this round are up: those with state are saved from now on, and what they count is logged.
        ``worlds`` tells how each role is split over processes."""
        self._counting = {name: role for name, role in vars(roles).items() if isinstance(role, MeteredRole)}
        self._roles = {name: role for name, role in vars(roles).items() if isinstance(role, StatefulRole)}
        self.saver.roles = self._roles
        self.saver.facts = {**self.disk.facts, "roles": {name: dict(worlds[name]) for name in self._roles}}

    def recover(self, error: AlignError, attempt: int) -> None:
        """Go back to the last checkpoint after workers were lost, or raise ``error`` when that was done too often."""
        self.saver.abandon()
        if attempt > self.section.max_restarts:
            raise error
        self.report(f"{error}\nrestart {attempt} of {self.section.max_restarts}, from the last checkpoint")
        self.disk.find_checkpoint_again()
        self._rewind()

    def stop_at_once(self) -> None:
        """Raises `KeyboardInterrupt` after a second signal; asked between steps, and by whoever waits for workers."""
        if self.stopping.now:
            raise KeyboardInterrupt(self.stopping.status)

    # Steps

    @property
    def first_step(self) -> int:
        """The first step of this round."""
        return (self.round - 1) * self.section.steps + 1

    def is_last(self, step: int) -> bool:
        """Whether a step is the last of its round."""
        return step == self.round * self.section.steps

    def steps(self) -> Iterator[int]:
        """1, 2, ..., ``run.steps``; in a later round on from there, in a resumed run on from its checkpoint.

        Raises `StoppedError` between two steps when the run was asked to stop and has saved.
        """
        self._restore()
        self._begun = time.perf_counter()
        self.stop_if_asked()
        for step in range(max(self.first_step, self.progress.step + 1), self.round * self.section.steps + 1):
            self.clock.step = step
            fault_injection.maybe_inject("driver", 0, "step", step)
            begun = time.monotonic()
            yield step
            self.stopping.note_step(time.monotonic() - begun)
            self._between(step)
        self.saver.wait_for_save()
        self._prune_best()
        self.disk.lock.check()  # the algorithm exports next

    def _restore(self) -> None:
        checkpoint = self.disk.checkpoint
        if checkpoint is None or checkpoint.manifest.round != self.round:
            return
        self.saver.restore(checkpoint)
        for name, counters in self.progress.roles.items():
            self._roles[name].load_counters(counters)

    def stop_if_asked(self) -> None:
        """Raise `StoppedError` where the run was asked to stop; for where there is nothing to save."""
        self._stop(self.stopping.asked())

    def _stop(self, reason: str | None) -> None:
        if reason is not None:
            raise StoppedError(f"stopped by {reason} at step {self.progress.step}", remedy="run it again to go on")

    def _between(self, step: int) -> None:
        """After a step: publish what was begun before, take a checkpoint where one is due, stop where that is asked."""
        self.stop_at_once()
        self.progress.step = step
        if step == self.stop_after:
            raise StoppedError(f"replayed to step {step}")
        self.saver.wait_for_save()
        self._prune_best()
        if step in self.section.bundle_steps:
            self._bundle(step, "asked for by run.bundle_steps", self.metrics)
        every, asked = self.recipe.checkpoint.every, self.stopping.asked()  # once: a stop needs the save that it led to
        must = asked is not None or self.is_last(step) or step + 1 in self.section.bundle_steps
        if must or (every and step % every == 0):
            begun = time.monotonic()
            self._save(must)
            if asked:
                self.saver.wait_for_save()
            self.stopping.note_save(time.monotonic() - begun)
        if not (self.is_last(step) and self.round == self.recipe.num_rounds()):
            self._stop(asked)

    def _save(self, must: bool) -> None:
        waiting = [future.result() for future in self._waiting]
        self._waiting = deque(CompletedFuture(rollouts) for rollouts in waiting)
        self.progress.waiting = len(waiting)
        self.progress.roles = {name: role.counters() for name, role in self._roles.items()}
        try:
            self.progress.ends = self.disk.ends()
        except SaveError as error:
            self.saver.failed(error, must)
            return
        self.saver.begin(Content(replace(self.progress), dict(self.tensors), waiting), self.metrics, must)

    def _prune_best(self) -> None:
        spoken_of = {self.folder / start for start in self.progress.starts.values()} | self.disk.best_of_checkpoints()
        for folder in (*self.folder.glob("best/step-*"), *self.folder.glob("round-*/best/step-*")):
            if folder != self.best and folder not in spoken_of:
                shutil.rmtree(folder, ignore_errors=True)

    def _bundle(self, step: int, reason: str, metrics: Mapping[str, float] | None) -> Path:
        """Write what `align replay` needs to run a step again."""
        return bundle.write(self.disk, self.recipe, step, reason, metrics, self.sampled)

    def diverged(self, error: DivergedError) -> DivergedError:
        """The error of the step under way, with a bundle to replay it."""
        self.saver.wait_for_save()
        try:
            folder = self._bundle(self.clock.step, error.message, None)
        except SaveError as refused:
            self.report(f"no bundle of the step was written: {refused}")
            return error
        remedy = f"{error.remedy}; " if error.remedy else ""
        return DivergedError(
            error.message, where=error.where, remedy=f"{remedy}run the step again: align replay {folder}"
        )

    def rollouts(
        self, prompts: PromptStream, policy: SamplingRole, sampling: SamplingConfig, max_off_policy_steps: int
    ) -> Iterator[tuple[int, Rollouts]]:
        """Each step with the rollouts it learns from.

        With n = ``max_off_policy_steps``, the rollouts of step s + n are requested before step s trains: they come from
        the weights after step s - 1, and the policy that learns from them is n steps further. With n = 0 a step
        requests its own rollouts and waits for them.
        """
        last = self.round * self.section.steps
        for step in self.steps():
            while len(self._waiting) <= min(max_off_policy_steps, last - step):
                self._waiting.append(policy.generate(prompts.batch(step + len(self._waiting)), sampling))
            self.sampled = self._waiting.popleft().result()
            yield step, self.sampled

    # Numbers

    def log(
        self, step: int, metrics: Mapping[str, float], rollouts: Rollouts | None = None, score_B: Tensor | None = None
    ) -> None:
        """End a step: add seconds by phase, tokens per second and totals, and write everything where it belongs.

        ``rollouts`` and their ``score_B`` give a few samples in readable form. Raises `DivergedError` when
        ``run.max_non_finite`` optimizer steps in a row had to be left out.
        """
        now = time.perf_counter()
        seconds = self.clock.drain(now - self._begun)
        self._begun = now
        counted = {f"{name}/{key}": v for name, role in self._counting.items() for key, v in role.drain().items()}
        line = {"step": step, **metrics, **counted, **{f"seconds/{name}": value for name, value in seconds.items()}}
        samples: list[dict[str, Any]] = []
        if rollouts is not None:
            line["generated_tokens"] = float(rollouts.mask_BT.sum())
            samples = self._samples(step, rollouts, score_B)
            for sample in samples:
                self.disk.samples.append(sample, step)
        for phase, tokens in (("generate", "generated_tokens"), ("update", "trained_tokens")):
            if tokens in line and seconds.get(phase):
                line[f"tokens_per_second/{phase}"] = line[tokens] / seconds[phase]
        line |= self._totals(line, rollouts)
        self.metrics = line
        self.disk.metrics.append(line, step)
        self.disk.trackers.log(step, line, samples)
        self._display.step(step, line)
        self._count_not_finite(metrics)

    def _totals(self, line: Mapping[str, float], rollouts: Rollouts | None) -> dict[str, float]:
        totals = self.progress.totals
        more = {
            "total/generated_tokens": line.get("generated_tokens"),
            "total/trained_tokens": line.get("trained_tokens"),
            "total/rollouts": None if rollouts is None else float(len(rollouts)),
            "seconds/total": line["seconds/step"],
        }
        for name, value in more.items():
            if value is not None:
                totals[name] = totals.get(name, 0.0) + value
        return totals

    def _count_not_finite(self, metrics: Mapping[str, float]) -> None:
        found = int(sum(value for name, value in metrics.items() if name.rpartition("/")[2] == "non_finite"))
        self.progress.not_finite = self.progress.not_finite + found if found else 0
        if self.progress.not_finite >= self.section.max_non_finite:
            message = f"{self.progress.not_finite} optimizer steps in a row had a loss or gradient that is not finite"
            raise DivergedError(message, remedy="lower the learning rate, and look at the last rollouts")

    def log_evaluation(self, step: int, metrics: Mapping[str, float], answers: Sequence[Mapping[str, Any]]) -> None:
        """Write a held-out evaluation: its metrics and the answers that they were computed from, one line."""
        self.disk.evaluations.append({"step": step, **metrics, "answers": list(answers)}, step)
        self.disk.trackers.log_evaluation(step, metrics, answers)

    def _samples(self, step: int, rollouts: Rollouts, score_B: Tensor | None) -> list[dict[str, Any]]:
        """A few responses in readable form, spread over the prompts."""
        sequences, samples = rollouts.sequences, []
        count = min(self.section.logged_samples, len(rollouts))
        for i in (k * len(rollouts) // count for k in range(count)):
            sample = {
                "step": step,
                "prompt": self._decode_samples(sequences.prompts.row(int(sequences.prompt_B[i])).tolist()),
                "response": self._decode_samples(sequences.responses.row(i).tolist()),
                "finished": bool(rollouts.finished_B[i]),
                "score": None if score_B is None else float(score_B[i]),
            }
            samples.append(sample)
        return samples
