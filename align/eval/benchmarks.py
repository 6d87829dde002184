"""Read benchmarks from the files that their authors publish, or from the Hugging Face hub.

========================  =====================================================================================
RM-Bench                  JSON lists of {id, prompt, chosen (3), rejected (3), domain}; without ``domain`` the name of
                          the file gives it: ``safety-refuse_filtered.json``
JudgeBench                JSON lines of {pair_id, source, question, response_A, response_B, label}
RewardBench               {id, prompt, chosen, rejected, subset}
RewardBench 2             {id, prompt, chosen (list), rejected (list), num_correct, subset}
heldout                   pairs of any format of ``data.format``
========================  =====================================================================================
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError

from align.config import BenchmarkDataConfig, DataConfig
from align.data import dataset
from align.data.rows import BadRow, conversation, integer, parse_row, require_fields, text, texts, turns
from align.data.sources import read_lines
from align.errors import DataError
from align.eval.items import Benchmark, Item, digest, from_text
from align.eval.protocols import (
    JUDGEBENCH_CATEGORIES,
    PRIOR_SETS,
    REWARDBENCH2_SUBSETS,
    REWARDBENCH_SECTIONS,
    RM_BENCH_DOMAINS,
    tied_prompts,
)

HUB = {
    "rm-bench": ("THU-KEG/RM-Bench", "train"),
    "judgebench": ("ScalerLab/JudgeBench", "gpt"),
    "rewardbench": ("allenai/reward-bench", "filtered"),
    "rewardbench2": ("allenai/reward-bench-2", "test"),
}
"""Hub id and split of each benchmark."""

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")

SECTION_OF = {subset: section for section, subsets in REWARDBENCH_SECTIONS.items() for subset in subsets}
SECTION_OF |= dict.fromkeys((*PRIOR_SETS, "mtbench_gpt4", "mtbench_human"), "prior sets")


def load(name: str, data: BenchmarkDataConfig) -> Benchmark:
    """The items of a benchmark. Raises `DataError` for an invalid source, row or id."""
    if name == "heldout":
        return _heldout(data)
    hub, split = HUB[name]
    source, parse, items, bad = data.path or hub, PARSERS[name], {}, Counter()
    for where, stem, raw in tables(source, data.split or split, data.revision):
        if data.max_items is not None and len(items) == data.max_items:
            break
        try:
            item = parse(parse_row(raw), stem)
        except BadRow as error:
            if data.bad_rows == "stop":
                remedy = f"give the files of {name}, or leave such rows out and have them counted: data.bad_rows=skip"
                raise DataError(str(error), where=where, remedy=remedy) from None
            bad[error.reason] += 1
            continue
        if item.id in items:
            remedy = "give each file once; data.split picks files by name"
            raise DataError(f"id {item.id!r} occurs twice", where=where, remedy=remedy)
        items[item.id] = item
    if not items:
        raise DataError("no items are left", where=source, remedy="check data.path and data.split")
    notes = [f"{count} rows left out: {reason}" for reason, count in bad.items()]
    notes += [f"only the first {data.max_items} items"] * (data.max_items is not None)
    return Benchmark(name, list(items.values()), source, [*notes, *gaps(name, list(items.values()))])


def gaps(name: str, items: list[Item]) -> list[str]:
    """Notes on parts of the benchmark that are missing; averages cover only the parts present."""
    expected: dict[str, tuple[str, set[str]]] = {
        "rm-bench": ("domain", set(RM_BENCH_DOMAINS)),
        "judgebench": ("domain", set(JUDGEBENCH_CATEGORIES.values())),
        "rewardbench": ("subset", {subset for subsets in REWARDBENCH_SECTIONS.values() for subset in subsets}),
        "rewardbench2": ("subset", set(REWARDBENCH2_SUBSETS)),
    }
    if name not in expected:
        return []
    tag, names = expected[name]
    tags = {item.tags.get(tag, "") for item in items}
    tags |= {value.split("-")[0] for value in tags} if name == "rm-bench" else set()
    tags -= {"Ties"} if not tied_prompts(items) else set()
    missing = sorted(names - tags)
    return [f"without {tag} {', '.join(missing)}: averages are over the others"] if missing else []


def tables(source: str, split: str, revision: str | None, **hub: Any) -> Iterator[tuple[str, str, Any]]:
    """Location, file name (or split) and content of every row. ``hub`` are arguments of ``load_dataset``."""
    path = Path(source).expanduser()
    if path.exists():
        for file in _files(path, split):
            for where, raw in _rows_of(file):
                yield where, file.name.split(".")[0], raw
        return
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        remedy = "set data.path to a file, a folder or a hub id"
        raise DataError("there is no such file or folder", where=source, remedy=remedy)
    try:
        table = datasets.load_dataset(source, **hub, split=split, revision=revision)
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            f"neither here nor a split {split} that the hub gives: {next(iter(str(error).splitlines()), '')}",
            where=source,
            remedy="check data.path, data.split and the network, or download it and give the folder",
        ) from error
    for number, row in enumerate(table, start=1):
        yield f"{source}/{split}:{number}", split, row


def _files(path: Path, split: str) -> list[Path]:
    if path.is_file():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name.endswith(SUFFIXES))
    if not files:
        raise DataError(f"no {', '.join(SUFFIXES)} file in this folder", where=str(path), remedy="check data.path")
    return [file for file in files if split in file.name] or files


def _rows_of(file: Path) -> Iterator[tuple[str, Any]]:
    if file.suffix == ".parquet":
        table = datasets.Dataset.from_parquet(str(file))
        yield from ((f"{file}:{number}", row) for number, row in enumerate(table, start=1))
    elif file.suffix == ".json":
        try:
            rows = json.loads(file.read_bytes())
        except ValueError as error:
            raise DataError(f"is not JSON: {error}", where=str(file), remedy="copy or download it again") from error
        if not isinstance(rows, list):
            raise DataError("is not a JSON list of items", where=str(file), remedy="give the benchmark's own file")
        yield from ((f"{file}[{number}]", row) for number, row in enumerate(rows))
    else:
        yield from read_lines(file)


def _rm_bench(row: dict[str, Any], stem: str) -> Item:
    require_fields(row, ("id", "prompt", "chosen", "rejected"))
    domain = text("domain", row.get("domain", stem.removesuffix("_filtered")))
    if domain.split("-")[0] not in RM_BENCH_DOMAINS:
        raise BadRow("domain", f"begins with none of {', '.join(RM_BENCH_DOMAINS)}", domain)
    responses = texts("chosen", row["chosen"]), texts("rejected", row["rejected"])
    for field, values in zip(("chosen", "rejected"), responses, strict=True):
        if len(values) != 3:
            raise BadRow(field, "has not three responses", list(values))
    tags = {"domain": domain, "language": row.get("language") or ""}
    context = conversation("prompt", turns("prompt", row["prompt"]))
    return from_text(f"{domain}/{row['id']}", context, responses[0] + responses[1], 3, tags)


def category(source: str) -> str:
    """JudgeBench's category of a source. Raises `BadRow`."""
    for begin, name in JUDGEBENCH_CATEGORIES.items():
        if source.startswith(begin):
            return name
    raise BadRow("source", f"begins with none of {', '.join(JUDGEBENCH_CATEGORIES)}", source)


def _judgebench(row: dict[str, Any], stem: str) -> Item:
    require_fields(row, ("pair_id", "source", "question", "response_A", "response_B", "label"))
    if row["label"] not in ("A>B", "B>A"):
        raise BadRow("label", "is neither A>B nor B>A", row["label"])
    source, pair_id = text("source", row["source"]), text("pair_id", row["pair_id"])
    responses = [text(field, row[field]) for field in ("response_A", "response_B")]
    context = conversation("question", turns("question", row["question"]))
    tags = {"domain": category(source), "subset": source, "label": row["label"]}
    return from_text(pair_id, context, responses if row["label"] == "A>B" else responses[::-1], 1, tags)


def _rewardbench(row: dict[str, Any], stem: str) -> Item:
    require_fields(row, ("id", "prompt", "chosen", "rejected", "subset"))
    subset = text("subset", row["subset"])
    if subset not in SECTION_OF:
        raise BadRow("subset", "is none of RewardBench", subset)
    responses = [text(field, row[field]) for field in ("chosen", "rejected")]
    context = conversation("prompt", turns("prompt", row["prompt"]))
    return from_text(f"{subset}/{row['id']}", context, responses, 1, {"domain": SECTION_OF[subset], "subset": subset})


def _rewardbench2(row: dict[str, Any], stem: str) -> Item:
    require_fields(row, ("id", "prompt", "chosen", "rejected", "num_correct", "subset"))
    named = {name.lower(): name for name in REWARDBENCH2_SUBSETS}
    subset = named.get(text("subset", row["subset"]).lower())
    if subset is None:
        raise BadRow("subset", "is none of RewardBench 2", row["subset"])
    chosen, rejected = texts("chosen", row["chosen"]), texts("rejected", row["rejected"])
    integer("num_correct", row["num_correct"], len(chosen), len(chosen))
    id, more = str(row["id"]), {}
    if subset == "Ties":
        if not re.fullmatch(r"(ref|tied):.+", id):
            raise BadRow("id", "of a tie is neither ref:n nor tied:n", id)
        more["prompt"] = id.split(":", 1)[1].rjust(16, "-")  # pairs the two items with the same n
    elif (len(chosen), len(rejected)) != (1, 3):
        raise BadRow("chosen", "and rejected are not one and three responses", [len(chosen), len(rejected)])
    context = conversation("prompt", turns("prompt", row["prompt"]))
    return from_text(id, context, chosen + rejected, len(chosen), {"domain": subset, "subset": subset}, **more)


def _heldout(data: BenchmarkDataConfig) -> Benchmark:
    section = DataConfig(
        path=data.path,
        format=data.format,
        revision=data.revision,
        domains=data.domains,
        max_spread=data.max_spread,
        bad_rows=data.bad_rows,
    )
    return held_out(section, data.split or "validation", data.max_items)


def held_out(section: DataConfig, split: str = "validation", max_items: int | None = None) -> Benchmark:
    """The pairs of a split as items. Reads only this split, unless it is ``train``."""
    source = section.path or ", ".join(section.sources)
    if split == "train":
        corpus = dataset.load_dataset(section)
        rows, counts = corpus.train, corpus.counts[split]
    else:
        rows, counts = dataset.load_validation(section)
    judged = [row for row in rows if row.preference][:max_items]
    if not judged:
        raise DataError(f"all {len(rows)} rows of {split} are ties", where=source, remedy="give other data")
    items = [
        from_text(
            digest([*row.key]),
            row.context,
            [row.chosen, row.rejected],
            1,
            {"domain": row.domain, "language": row.language},
            strength=row.strength,
        )
        for row in judged
    ]
    dropped = {"duplicates": counts.duplicates, "ties": len(rows) - sum(1 for row in rows if row.preference)}
    dropped |= {
        "of other domains": counts.other_domain,
        "too far apart": counts.spread,
        "in validation too": counts.in_validation,
    }
    dropped |= counts.bad
    left_out = ", ".join(f"{count} {name}" for name, count in dropped.items() if count) or "none"
    notes = [f"{counts.read} rows of {split} read, left out: {left_out}"]
    notes += [f"only the first {max_items} items"] * (max_items is not None)
    return Benchmark("heldout", items, source, notes)


PARSERS: dict[str, Callable[[dict[str, Any], str], Item]] = {
    "rm-bench": _rm_bench,
    "judgebench": _judgebench,
    "rewardbench": _rewardbench,
    "rewardbench2": _rewardbench2,
}
"""Parser of a row for each benchmark; the second argument is the file name."""
