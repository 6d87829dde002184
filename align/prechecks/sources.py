"""Whether what a recipe reads is there: folders and files of this machine, and ids in the hub's cache or on the hub."""

from __future__ import annotations

import difflib
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import constants, get_token

from align.config import (
    BenchmarkDataConfig,
    DataConfig,
    GeneratorConfig,
    ModelConfig,
    PolicyEvaluationConfig,
    QuestionDataConfig,
    RecipeConfig,
    RewardConfig,
    RewardEvaluationConfig,
    RewardServiceConfig,
    ScaleConfig,
    ScalePromptsConfig,
)
from align.errors import ConfigError

SUFFIXES = {".csv", ".gz", ".jinja", ".json", ".jsonl", ".parquet", ".py", ".safetensors", ".txt", ".yaml", ".yml"}
"""A name that ends so is a file: no hub id does."""
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?", re.ASCII)
HUB_S = 5.0
"""Seconds for the hub to say whether it has an id."""

Configuration = RecipeConfig | RewardEvaluationConfig | PolicyEvaluationConfig | ScaleConfig | RewardServiceConfig


@dataclass(frozen=True)
class Source:
    """Something that a key names to be read."""

    key: str
    text: str
    kind: Literal["model", "rows", "local"]
    """``model``: a folder or a hub id. ``rows``: the same of data, or a file. ``local``: what only this machine can
    have."""
    revision: str | None = None
    weights: bool = True
    """Whether weights are read, of a model."""


def sources(config: Any, absent: set[str] = frozenset()) -> Iterator[Source]:  # type: ignore[assignment]
    """What a configuration reads, section by section, without the sections called ``absent``."""
    for name, value in vars(config).items():
        if name not in absent:
            yield from _of_field(name, value)
    if isinstance(config, RecipeConfig):
        for name, path in config.evaluations().items():
            yield Source(f"benchmarks.{name}", path, "rows")
        begun = any(Path(config.run.dir).expanduser().glob("checkpoints/step-*"))  # these count, and it may be gone
        if config.run.resume not in ("auto", "never") and not begun:
            yield Source("run.resume", config.run.resume, "local")
    for key in ("answers", "judge_prompt", "scores", "compare"):
        yield Source(key, getattr(config, key, ""), "local")
    for category, path in getattr(config, "baseline_answers", {}).items():
        yield Source(f"baseline_answers.{category}", path, "local")


def _of_field(key: str, value: Any) -> Iterator[Source]:
    if isinstance(value, (RewardConfig, GeneratorConfig, DataConfig)):
        yield Source(f"{key}.chat_template", value.chat_template or "", "local")
    if isinstance(value, ModelConfig):
        yield Source(f"{key}.path", value.path, "model", value.revision, not value.init)
    if isinstance(value, RewardConfig):
        for index, path in enumerate(value.ensemble.paths):
            yield Source(f"{key}.ensemble.paths[{index}]", path, "model")
        yield from _of_field(f"{key}.generative.judge", value.generative.judge)
    if isinstance(value, (DataConfig, BenchmarkDataConfig, QuestionDataConfig, ScalePromptsConfig)):
        yield Source(f"{key}.path", value.path, "rows", value.revision)
    if isinstance(value, DataConfig):
        for name, part in value.sources.items():
            yield Source(f"{key}.sources.{name}.path", part.path, "rows", part.revision)
    if isinstance(value, QuestionDataConfig):
        yield Source(f"{key}.references", value.references, "local")


def missing(found: Iterator[Source], places: Mapping[str, str]) -> list[ConfigError]:
    """An error for each source that is not there, its place taken from ``places``. A source that several keys name is
    reported once, under the first."""
    distinct = {(one.kind, one.text, one.revision): one for one in reversed([*found]) if one.text}
    faults = []
    for source in reversed(distinct.values()):
        if (problem := _problem(source)) is not None:
            what, remedy = problem
            where = places.get(source.key.partition("[")[0])
            faults.append(ConfigError(f"{source.key}={source.text}: {what}", where=where, remedy=remedy))
    return faults


def require(key: str, text: str, kind: Literal["model", "rows", "local"], revision: str | None = None) -> None:
    """Raises `ConfigError` for a source of the command line that is not there."""
    for fault in missing(iter([Source(key, text, kind, revision)]), {key: "command line"}):
        raise fault


def _problem(source: Source) -> tuple[str, str] | None:
    """What is wrong with a source, and the remedy."""
    path = Path(source.text).expanduser()
    if path.is_file() and source.kind == "model":
        return "is a file, and a folder is read here", f"give the folder: {source.key}={path.parent}"
    if path.exists():
        return None
    is_id = HUB_ID.fullmatch(source.text) and (source.kind == "model" or "/" in source.text)
    close = near(source.text)
    suggestion = f"did you mean {close}? Else " if close else ""
    if source.kind == "local" or looks_local(source.text) or not is_id:
        kinds = {"model": "a folder or a hub id (ORG/NAME)", "rows": "a file, a folder or a hub id (ORG/NAME)"}
        kinds["local"] = "a path that exists"
        return f"there is no such file or folder (from {Path.cwd()})", f"{suggestion}give {kinds[source.kind]}"
    return None if (what := _not_on_hub(source)) is None else (what, suggestion + _download(source))


def looks_local(text: str) -> bool:
    """Whether a text that names a source can only mean a path of this machine."""
    first, slash, _ = text.partition("/")
    is_path = text.startswith((".", "/", "~")) or text.count("/") > 1
    return is_path or Path(text).suffix.lower() in SUFFIXES or (bool(slash) and Path(first).is_dir())


def near(text: str) -> str | None:
    """An existing path whose parts are spelled like those of ``text``."""
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
    """Why a hub id cannot be read: it is not in the cache, and no download can be made; None where it can be read."""
    kind = "model" if source.kind == "model" else "dataset"
    root = Path(constants.HF_HUB_CACHE) / f"{kind}s--{source.text.replace('/', '--')}"
    if _in_cache(root, source) or (kind == "dataset" and _in_datasets_cache(source.text)):
        return None
    here = f"is no folder here, and the cache of the hub ({constants.HF_HUB_CACHE}) does not hold it"
    if root.is_dir():
        here = f"is no folder here, and the cache of the hub ({root}) holds it without all that is needed"
    if constants.HF_HUB_OFFLINE or os.environ.get("TRANSFORMERS_OFFLINE", "") in ("1", "true", "ON", "YES"):
        return f"{here}; HF_HUB_OFFLINE forbids a download"
    answer = _ask_hub(kind, source.text, source.revision)
    return None if answer is None else f"{here}; {answer}"


def _in_cache(root: Path, source: Source) -> bool:
    revision = source.revision or "main"
    reference = root / "refs" / revision
    checkpoint = root / "checkpoints" / (reference.read_text().strip() if reference.is_file() else revision)
    wanted = "*.safetensors" if source.kind == "model" and source.weights else "*"
    return checkpoint.is_dir() and any(checkpoint.glob(wanted))


def _in_datasets_cache(name: str) -> bool:
    """Whether `datasets` has prepared a data set, in a folder that it calls ``org___data_set`` for ``org/DataSet``."""
    folder = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
    letters = _letters(name)
    return folder.is_dir() and any(_letters(item.name) == letters for item in folder.iterdir())


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


@cache
def _ask_hub(kind: str, name: str, revision: str | None) -> str | None:
    """Why the hub does not give an id; None where it has it, or does not say."""
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
            what = f"has no such {kind}" + (f" of revision {revision}" if revision else "")
            return f"{constants.ENDPOINT} {what}, or gives it only to a token that may read it (status {error.code})"
    except OSError as error:
        return f"{constants.ENDPOINT} cannot be reached: {getattr(error, 'reason', error)}"
    return None


@cache
def _unreachable() -> str | None:
    """Why the hub does not answer at all, looked for once."""
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=HUB_S).close()
    except urllib.error.HTTPError:
        return None
    except OSError as error:
        return f"{constants.ENDPOINT} cannot be reached: {getattr(error, 'reason', error)}"
    return None
