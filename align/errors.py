"""Errors a user can act on. Each carries its place, what is wrong and the remedy, and an exit status."""

from __future__ import annotations


class AlignError(Exception):
    """Base of every error that is shown as a message, without a traceback of ours.

    ``exit_status`` tells a batch script what to do. 75: saved, with more to do; run it again. 76: a fault of the
    infrastructure; the last checkpoint is good, and a retry may help. 77: another process owns the run; leave it alone.
    78: a fault of configuration or data; a retry cannot help. 79: training diverged. 75, 76 and 78 follow sysexits(3).
    """

    exit_status = 1

    def __init__(self, message: str, *, where: str | None = None, remedy: str | None = None):
        self.message, self.where, self.remedy = message, where, remedy
        lines = [f"{where}: {message}" if where else message]
        if remedy:
            lines.append(f"  remedy: {remedy}")
        super().__init__("\n".join(lines))


class ConfigError(AlignError):
    """A recipe, an override or a combination of options that cannot be run."""

    exit_status = 78


class DataError(AlignError):
    """A data source, a row, a tokenizer or a template that cannot be used."""

    exit_status = 78


class ConversationError(DataError):
    """A conversation that a model cannot read: too long for it, or refused by its chat template or tokenizer.

    ``public`` says so to whoever sent the conversation, in words that hold nothing of this machine; it is empty where
    the template or the tokenizer itself may be at fault.
    """

    def __init__(self, message: str, *, public: str = "", where: str | None = None, remedy: str | None = None):
        super().__init__(message, where=where, remedy=remedy)
        self.public = public


class ModelError(AlignError):
    """A checkpoint that cannot be loaded as what the recipe says it is."""

    exit_status = 78


class PlacementError(AlignError):
    """Roles that do not fit on the cluster."""

    exit_status = 78


class DivergedError(AlignError, FloatingPointError):
    """A loss or a reward that is not a finite number; the same run would meet it again."""

    exit_status = 79


class WorkerError(AlignError):
    """A worker that died, raised or did not answer within its deadline."""

    exit_status = 76


class LoadError(WorkerError):
    """A role that raised while it came up for the first time: the same recipe would raise again."""

    exit_status = 78


class SaveError(AlignError):
    """A checkpoint that could not be written; the ones before are untouched."""

    exit_status = 76


class LockError(AlignError):
    """A run folder that another process owns, or that was taken over from this one."""

    exit_status = 77


class StoppedError(AlignError):
    """A run that was asked to stop, has saved, and has more to do."""

    exit_status = 75
