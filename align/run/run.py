"""A run: its steps, metrics and checkpoints, and how it stops and resumes."""

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
from align.run.display import Clock
from align.run.folder import Folder, damage_of
from align.run.identity import Identity
from align.run.stopping import StopRequests
from align.run.tracking import format_samples
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
        stopping: StopRequests | None = None,
        decode_samples: Callable[[Sequence[int]], str] | None = None,
    ):
        """``decode`` turns token ids into text, ``decode_samples`` does so for ``samples.jsonl`` (default: ``decode``).
        Without ``stopping``, signals are not handled. Nothing is written before the context is entered."""
        self.recipe, self.section, self.decode = recipe, recipe.run, decode
        self._decode_samples = decode_samples or decode
        self.identity = identity or Identity.of(recipe, {}, {})
        self.stopping = stopping or StopRequests(self.folder, self.section.max_seconds)
        self.clock = Clock()
        self.progress = Progress()
        self.tensors: dict[str, Tensor] = {}
        """Tensors that an algorithm carries from step to step; `state` holds its scalars."""
        self.stop_after: int | None = None
        """Step after which a replay ends, without a checkpoint."""
        self._roles: dict[str, StatefulRole] = {}
        self._metered: dict[str, MeteredRole] = {}
        self._rollouts_ahead: deque[Future[Rollouts]] = deque()
        self.sampled: Rollouts | None = None
        """Rollouts of the current step."""
        self.metrics: dict[str, float] = {}
        """Metrics of the last step."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.section.dir).expanduser().absolute()

    @property
    def state(self) -> dict[str, float]:
        """Numbers that an algorithm carries from step to step: KL coefficient, reward moments, best score."""
        return self.progress.state

    @property
    def round(self) -> int:
        """Number of the round, counted from 1."""
        return self.progress.round

    @property
    def _round_folder(self) -> Path:
        """Folder of this round's models: for the last round, the run folder."""
        last = self.recipe.num_rounds()
        return self.folder if self.round == last else self.folder / f"round-{self.round}"

    @property
    def final(self) -> Path:
        """Folder of this round's trained model."""
        return self._round_folder / "final"

    @property
    def best(self) -> Path | None:
        """Folder of this round's best policy on held-out prompts; None if none was kept."""
        step = self.state.get("best_step")
        return None if step is None else self._round_folder / "best" / f"step-{int(step):06d}"

    def keep_best(self, step: int, policy: PolicyRole, extra: Mapping[str, str] | None = None) -> None:
        """Export the policy as the best so far, with the ``extra`` files, text by name.

        Earlier best models are deleted once no checkpoint refers to them.
        """
        folder = self._round_folder / "best" / f"step-{step:06d}"
        with saving(folder.parent):
            folder.parent.mkdir(parents=True, exist_ok=True)
        policy.export(folder, extra).result()
        self.state["best_step"] = step

    @property
    def logs(self) -> Path:
        """Folder of the workers' logs."""
        return self.folder / "logs"

    def write_json(self, name: str, content: Any) -> None:
        """Write a file of the run folder atomically."""
        self.disk.write_json(name, content)

    def write_text(self, name: str, text: str) -> None:
        """Write a file of the run folder atomically."""
        self.disk.write_text(name, text)

    def report(self, line: str) -> None:
        """Print a line for the user."""
        self.disk.report(line)

    # Start, resume, end

    def __enter__(self) -> Run:
        self.disk = Folder(self.recipe, self.identity)
        self.disk.open()
        try:
            self._load_progress()
            total = self.section.steps * self.recipe.num_rounds()
            self._display = display.make_display(self.section.progress, self.recipe.algorithm, total)
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
        """Whether the final model exists already."""
        return self.disk.finished

    def _load_progress(self) -> None:
        """Set the driver's state to that of the checkpoint, or to the start of a new run."""
        self.saver = Saver(self.disk.checkpoints, self.disk.facts, self.recipe.checkpoint.overlap)
        checkpoint = self.disk.checkpoint
        content = Content(Progress(), {}, []) if checkpoint is None else read_content(checkpoint)
        self.progress, self.tensors = content.progress, dict(content.tensors)
        self._rollouts_ahead = deque(CompletedFuture(rollouts) for rollouts in content.rollouts_ahead)
        self.clock.step = self.progress.step
        self.disk.truncate_to_step(self.progress)

    def start_of(self, number: int) -> Path | None:
        """The model that a round starts from: the best of the previous round, else its last; None for round 1, which
        starts from the recipe's model."""
        if number == 1:
            return None
        path = self.progress.start_models.get(str(number))
        return self.folder / path if path else self.best or self.final

    def begin_round(self, number: int, start: Path | None = None) -> bool:
        """Start round 1, 2, ...: steps continue to count, `state` and `tensors` are reset.

        Returns False if the round is done, as in a resumed run. ``start`` is the model that the round starts from.
        """
        if number > self.round:
            new = {} if start is None else {str(number): str(start.relative_to(self.folder))}
            models = self.progress.start_models | new
            self.progress = Progress(self.progress.step, number, start_models=models, totals=self.progress.totals)
            self.tensors = {}
        if not os.path.lexists(self.final):
            return True
        why = "the run continues past its step"
        if self.progress.step >= self.round * self.section.steps:
            damage = damage_of(self.final)
            if damage is None:
                return False
            why = f"it is damaged ({damage}); it is written again from the last checkpoint"
        self.disk.rename_final(self.final, why)
        return True

    def rounds(self) -> Iterator[RecipeConfig]:
        """The recipe of each remaining round, with the model that the round starts from."""
        for number in range(self.round, self.recipe.num_rounds() + 1):
            start = self.start_of(number)
            if self.begin_round(number, start):
                yield self.recipe if start is None else self.recipe.in_round(str(start))

    def attach(self, roles: object, worlds: Mapping[str, Mapping[str, int]]) -> None:
        """Register the roles of this round: save those with state, log the metrics of those that measure their work.

        ``worlds`` holds the world size and ZeRO stage of each role, for the checkpoint manifest.
        """
        self._metered = {name: role for name, role in vars(roles).items() if isinstance(role, MeteredRole)}
        self._roles = {name: role for name, role in vars(roles).items() if isinstance(role, StatefulRole)}
        self.saver.roles = self._roles
        self.saver.facts = {**self.disk.facts, "roles": {name: dict(worlds[name]) for name in self._roles}}

    def recover(self, error: AlignError, attempt: int) -> None:
        """Go back to the last checkpoint after a lost worker. Raises ``error`` after ``run.max_restarts`` attempts."""
        self.saver.abandon()
        if attempt > self.section.max_restarts:
            raise error
        self.report(f"{error}\nrestart {attempt} of {self.section.max_restarts}, from the last checkpoint")
        self.disk.find_checkpoint_again()
        self._load_progress()

    def raise_on_force_quit(self) -> None:
        """Raise `KeyboardInterrupt` after a second signal. Called between steps and while waiting for workers."""
        if self.stopping.force_quit:
            raise KeyboardInterrupt(self.stopping.exit_status)

    # Steps

    @property
    def first_step(self) -> int:
        """The first step of this round."""
        return (self.round - 1) * self.section.steps + 1

    def is_last(self, step: int) -> bool:
        """Whether ``step`` is the last of its round."""
        return step == self.round * self.section.steps

    def steps(self) -> Iterator[int]:
        """The steps 1, 2, ..., ``run.steps``. A later round continues the count, a resumed run starts after its
        checkpoint.

        Raises `StoppedError` between two steps, once a run that was asked to stop has saved.
        """
        self._restore()
        self._step_start = time.perf_counter()
        self.stop_if_requested()
        for step in range(max(self.first_step, self.progress.step + 1), self.round * self.section.steps + 1):
            self.clock.step = step
            fault_injection.maybe_inject("driver", 0, "step", step)
            begun = time.monotonic()
            yield step
            self.stopping.record_step(time.monotonic() - begun)
            self._after_step(step)
        self.saver.wait_for_save()
        self._prune_best()
        self.disk.lock.check()  # the algorithm exports next: another owner's model must not be overwritten

    def _restore(self) -> None:
        checkpoint = self.disk.checkpoint
        if checkpoint is None or checkpoint.manifest.round != self.round:
            return
        self.saver.restore(checkpoint)
        for name, counters in self.progress.role_counters.items():
            self._roles[name].load_counters(counters)

    def stop_if_requested(self) -> None:
        """Raise `StoppedError` if the run was asked to stop; for places where there is nothing to save."""
        self._stop(self.stopping.stop_reason())

    def _stop(self, reason: str | None) -> None:
        if reason is not None:
            raise StoppedError(
                f"stopped by {reason} at step {self.progress.step}", remedy="run the same command again to resume"
            )

    def _after_step(self, step: int) -> None:
        """Publish the previous checkpoint, save a new one if it is due, stop if requested."""
        self.raise_on_force_quit()
        self.progress.step = step
        if step == self.stop_after:
            raise StoppedError(f"replayed to step {step}")
        self.saver.wait_for_save()
        self._prune_best()
        if step in self.section.bundle_steps:
            self._bundle(step, "requested by run.bundle_steps", self.metrics)
        every = self.recipe.checkpoint.every
        stop_reason = self.stopping.stop_reason()  # read once: a request after the save must not stop without a save
        must = stop_reason is not None or self.is_last(step) or step + 1 in self.section.bundle_steps
        if must or (every and step % every == 0):
            begun = time.monotonic()
            self._save(must)
            if stop_reason:
                self.saver.wait_for_save()
            self.stopping.record_save(time.monotonic() - begun)
        if not (self.is_last(step) and self.round == self.recipe.num_rounds()):
            self._stop(stop_reason)

    def _save(self, must: bool) -> None:
        ahead = [future.result() for future in self._rollouts_ahead]
        self._rollouts_ahead = deque(CompletedFuture(rollouts) for rollouts in ahead)
        self.progress.rollouts_ahead = len(ahead)
        self.progress.role_counters = {name: role.counters() for name, role in self._roles.items()}
        try:
            self.progress.file_sizes = self.disk.sync_files()
        except SaveError as error:
            self.saver.failed(error, must)
            return
        self.saver.begin(Content(replace(self.progress), dict(self.tensors), ahead), self.metrics, must)

    def _prune_best(self) -> None:
        """Delete the best models that neither this run, nor a round, nor a kept checkpoint needs."""
        needed = {self.folder / path for path in self.progress.start_models.values()}
        needed |= self.disk.best_of_checkpoints()
        for folder in (*self.folder.glob("best/step-*"), *self.folder.glob("round-*/best/step-*")):
            if folder != self.best and folder not in needed:
                shutil.rmtree(folder, ignore_errors=True)

    def _bundle(self, step: int, reason: str, metrics: Mapping[str, float] | None) -> Path:
        return bundle.write_bundle(self.disk, self.recipe, step, reason, metrics, self.sampled)

    def add_bundle(self, error: DivergedError) -> DivergedError:
        """Write a replay bundle of the current step; returns the error with the command that replays it."""
        self.saver.wait_for_save()
        try:
            folder = self._bundle(self.clock.step, error.message, None)
        except SaveError as refused:
            self.report(f"no bundle of the step was written: {refused}")
            return error
        remedy = f"{error.remedy}; " if error.remedy else ""
        remedy += f"run the step again: align replay {folder}"
        return DivergedError(error.message, where=error.where, remedy=remedy)

    def rollouts(
        self, prompts: PromptStream, policy: SamplingRole, sampling: SamplingConfig, max_off_policy_steps: int
    ) -> Iterator[tuple[int, Rollouts]]:
        """Each step with the rollouts that it trains on.

        With n = ``max_off_policy_steps``, the rollouts of step s + n are requested before step s trains. They are
        sampled with the weights after step s - 1, and the policy trained on them is n steps further. With n = 0 a step
        requests its own rollouts and waits for them.
        """
        last = self.round * self.section.steps
        for step in self.steps():
            while len(self._rollouts_ahead) <= min(max_off_policy_steps, last - step):
                self._rollouts_ahead.append(policy.generate(prompts.batch(step + len(self._rollouts_ahead)), sampling))
            self.sampled = self._rollouts_ahead.popleft().result()
            yield step, self.sampled

    # Metrics

    def log(
        self, step: int, metrics: Mapping[str, float], rollouts: Rollouts | None = None, score_B: Tensor | None = None
    ) -> None:
        """End a step: add seconds by phase, tokens per second and totals; write metrics and samples to files, trackers
        and display.

        A few of the ``rollouts`` with their ``score_B`` become samples. Raises `DivergedError` after
        ``run.max_non_finite`` consecutive optimizer steps that were not finite.
        """
        now = time.perf_counter()
        seconds = self.clock.drain(now - self._step_start)
        self._step_start = now
        counted = {f"{name}/{key}": v for name, role in self._metered.items() for key, v in role.drain().items()}
        line = {"step": step, **metrics, **counted, **{f"seconds/{name}": value for name, value in seconds.items()}}
        samples: list[dict[str, Any]] = []
        if rollouts is not None:
            line["generated_tokens"] = float(rollouts.mask_BT.sum())
            count = min(self.section.logged_samples, len(rollouts))
            samples = format_samples(step, rollouts, score_B, count, self._decode_samples)
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
        skipped = int(sum(value for name, value in metrics.items() if name.rpartition("/")[2] == "non_finite"))
        self.progress.non_finite = self.progress.non_finite + skipped if skipped else 0
        if self.progress.non_finite >= self.section.max_non_finite:
            message = f"{self.progress.non_finite} optimizer steps in a row had a loss or gradient that is not finite"
            raise DivergedError(message, remedy="lower the learning rate, and look at the last rollouts")

    def log_evaluation(self, step: int, metrics: Mapping[str, float], answers: Sequence[Mapping[str, Any]]) -> None:
        """Write a held-out evaluation: its metrics and the answers that they were computed from, one line."""
        self.disk.evaluations.append({"step": step, **metrics, "answers": list(answers)}, step)
        self.disk.trackers.log_evaluation(step, metrics, answers)
