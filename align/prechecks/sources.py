"""Whether the models, data and files that a config names exist: on this machine, in the hub's cache, or on the hub."""

from __future__ import annotations

import difflib
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import constants, get_token

from align.config import (
    BenchmarkDataConfig,
    DataConfig,
    EnsembleRewardConfig,
    GenerativeRewardConfig,
    ModelConfig,
    QuestionDataConfig,
    RecipeConfig,
    ScalePromptsConfig,
)
from align.errors import ConfigError

SUFFIXES = {".csv", ".gz", ".jinja", ".json", ".jsonl", ".parquet", ".py", ".safetensors", ".txt", ".yaml", ".yml"}
"""Suffixes of files; no hub id ends with one."""
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?", re.ASCII)
HUB_S = 5.0
"""Timeout of a request to the hub, in seconds."""


@dataclass(frozen=True)
class Source:
    """A model, data or file that a key names."""

    key: str
    text: str
    kind: Literal["model", "rows", "local"]
    """``model``: a folder or hub id. ``rows``: data, as a file, folder or hub id. ``local``: a path of this machine."""
    revision: str | None = None
    weights: bool = True
    """For a model: whether its weights are read."""


def sources(config: Any, absent: set[str] = frozenset()) -> Iterator[Source]:  # type: ignore[assignment]
    """The sources of a config, without those of its ``absent`` fields."""
    for name, value in vars(config).items():
        if name not in absent:
            yield from _of_field(name, value)
    if isinstance(config, RecipeConfig):
        for name, path in config.evaluations().items():
            yield Source(f"benchmarks.{name}", path, "rows")
        # A run with checkpoints resumes from its own; the checkpoint that run.resume names may have been deleted.
        has_checkpoint = any(Path(config.run.dir).expanduser().glob("checkpoints/step-*"))
        if config.run.resume not in ("auto", "never") and not has_checkpoint:
            yield Source("run.resume", config.run.resume, "local")
    for key in ("answers", "judge_prompt", "scores", "compare"):
        yield Source(key, getattr(config, key, ""), "local")
    for category, path in getattr(config, "baseline_answers", {}).items():
        yield Source(f"baseline_answers.{category}", path, "local")


def _of_field(key: str, value: Any) -> Iterator[Source]:
    if isinstance(value, (ModelConfig, DataConfig)):
        yield Source(f"{key}.chat_template", vars(value).get("chat_template") or "", "local")
    if isinstance(value, ModelConfig):
        yield Source(f"{key}.path", value.path, "model", value.revision, not value.init)
    if isinstance(value, EnsembleRewardConfig):
        for index, path in enumerate(value.paths):
            yield Source(f"{key}.paths[{index}]", path, "model")
    if isinstance(value, GenerativeRewardConfig):
        yield from _of_field(f"{key}.judge", value.judge)
    if isinstance(value, (DataConfig, BenchmarkDataConfig, QuestionDataConfig, ScalePromptsConfig)):
        yield Source(f"{key}.path", value.path, "rows", value.revision)
    if isinstance(value, DataConfig):
        for name, part in value.sources.items():
            yield Source(f"{key}.sources.{name}.path", part.path, "rows", part.revision)
    if isinstance(value, QuestionDataConfig):
        yield Source(f"{key}.references", value.references, "local")


def missing(sources: Iterable[Source], places: Mapping[str, str]) -> list[ConfigError]:
    """An error for each source that does not exist, its place taken from ``places``. A source that several keys name is
    reported once, under the first key."""
    distinct = {(item.kind, item.text, item.revision): item for item in reversed([*sources]) if item.text}
    errors = []
    for source in reversed(distinct.values()):
        if (problem := _problem(source)) is not None:
            message, remedy = problem
            where = places.get(source.key.partition("[")[0])
            errors.append(ConfigError(f"{source.key}={source.text}: {message}", where=where, remedy=remedy))
    return errors


def require(key: str, text: str, kind: Literal["model", "rows", "local"], revision: str | None = None) -> None:
    """Raise `ConfigError` if a source of the command line does not exist."""
    for error in missing([Source(key, text, kind, revision)], {key: "command line"}):
        raise error


def _problem(source: Source) -> tuple[str, str] | None:
    """The problem of a source and its remedy; None if it exists."""
    path = Path(source.text).expanduser()
    if path.is_file() and source.kind == "model":
        return "is a file, but must be a folder", f"give the folder: {source.key}={path.parent}"
    if path.exists():
        return None
    is_id = HUB_ID.fullmatch(source.text) and (source.kind == "model" or "/" in source.text)
    close = near(source.text)
    suggestion = f"did you mean {close}? Otherwise " if close else ""
    if source.kind == "local" or looks_local(source.text) or not is_id:
        kinds = {"model": "a folder or a hub id (ORG/NAME)", "rows": "a file, a folder or a hub id (ORG/NAME)"}
        kinds["local"] = "a path that exists"
        return f"there is no such file or folder (from {Path.cwd()})", f"{suggestion}give {kinds[source.kind]}"
    problem = _not_on_hub(source)
    return None if problem is None else (problem, suggestion + _download(source))


def looks_local(text: str) -> bool:
    """Whether a text can only be a path of this machine, and not a hub id."""
    first, slash, _ = text.partition("/")
    is_path = text.startswith((".", "/", "~")) or text.count("/") > 1
    return is_path or Path(text).suffix.lower() in SUFFIXES or (bool(slash) and Path(first).is_dir())


def near(text: str) -> str | None:
    """An existing path that is spelled like ``text``."""
    path = Path(text).expanduser()
    here = Path(path.anchor)
    for part in path.parts[1:] if path.anchor else path.parts:
        if not (here / part).exists():
            try:
                names = [item.name for item in here.iterdir()]
            except OSError:
                return None
            if not (close := difflib.get_close_matches(part, names, n=1)):
                return None
            part = close[0]
        here = here / part
    return str(here)


def _download(source: Source) -> str:
    kind = "" if source.kind == "model" else " --repo-type dataset"
    revision = f" --revision {source.revision}" if source.revision else ""
    command = f"hf download {source.text}{kind}{revision}"
    return f"run `{command}` where there is a network, or give a folder: {source.key}=FOLDER"


def _not_on_hub(source: Source) -> str | None:
    """Why a hub id cannot be read: it is neither cached nor downloadable. None if it can be read."""
    kind = "model" if source.kind == "model" else "dataset"
    root = Path(constants.HF_HUB_CACHE) / f"{kind}s--{source.text.replace('/', '--')}"
    if _in_cache(root, source) or (kind == "dataset" and _in_datasets_cache(source.text)):
        return None
    here = f"is not a folder here, and is not in the hub's cache ({constants.HF_HUB_CACHE})"
    if root.is_dir():
        here = f"is not a folder here, and is incomplete in the hub's cache ({root})"
    if constants.HF_HUB_OFFLINE or os.environ.get("TRANSFORMERS_OFFLINE", "") in ("1", "true", "ON", "YES"):
        return f"{here}; HF_HUB_OFFLINE forbids downloads"
    answer = _ask_hub(kind, source.text, source.revision)
    return None if answer is None else f"{here}; {answer}"


def _in_cache(root: Path, source: Source) -> bool:
    revision = source.revision or "main"
    reference = root / "refs" / revision
    snapshot = root / "snapshots" / (reference.read_text().strip() if reference.is_file() else revision)
    pattern = "*.safetensors" if source.kind == "model" and source.weights else "*"
    return snapshot.is_dir() and any(snapshot.glob(pattern))


def _in_datasets_cache(name: str) -> bool:
    """Whether `datasets` has cached a data set, in a folder that it calls ``org___data_set`` for ``org/DataSet``."""
    folder = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
    letters = _letters(name)
    return folder.is_dir() and any(_letters(item.name) == letters for item in folder.iterdir())


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


@cache
def _ask_hub(kind: str, name: str, revision: str | None) -> str | None:
    """Why the hub does not give an id; None if it does, or if the answer is unclear."""
    if _unreachable():
        return _unreachable()
    branch = f"/revision/{revision}" if revision else ""
    token = get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(f"{constants.ENDPOINT}/api/{kind}s/{name}{branch}", headers=headers)
    try:
        urllib.request.urlopen(request, timeout=HUB_S).close()
    except urllib.error.HTTPError as error:
        if error.code in (401, 403, 404):
            name = f"{kind} of revision {revision}" if revision else kind
            return f"{constants.ENDPOINT} has no such {name}, or your token may not read it (status {error.code})"
    except OSError as error:
        return f"{constants.ENDPOINT} cannot be reached: {getattr(error, 'reason', error)}"
    return None


@cache
def _unreachable() -> str | None:
    """Why the hub does not answer at all, tried once per process."""
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=HUB_S).close()
    except urllib.error.HTTPError:
        return None
    except OSError as error:
        return f"{constants.ENDPOINT} cannot be reached: {getattr(error, 'reason', error)}"
    return None
