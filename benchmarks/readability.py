"""Measure how readable a checkout is: names, recipe keys, lines, comments, and the files one RLOO step enters.

    python benchmarks/readability.py [--root CHECKOUT] [--json]

Everything is measured on the checkout at ``--root`` with its own package, so that two commits can be compared. The last
number trains a tiny Llama for two steps on the CPU, which takes about half a minute.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import tokenize
from collections import Counter
from pathlib import Path

BANNED = {"one", "found", "said", "told", "asked", "wanted", "known", "seen"}
"""Names that say nothing about the value they hold."""
RECIPES = {"RLOO": "quickstart/rloo.yaml", "PPO": "quickstart/ppo.yaml", "DPO": "quickstart/dpo.yaml"}
SHOWN = re.compile(r"\s*[a-z]\w*(?:\.[\w-]+)*\s.*(?:default|command line|\.yaml:\d+|auto)\s*")
"""A line of ``align show`` that holds a key, its value and its origin."""

TRACED_RUN = """
import sys
from pathlib import Path
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from align import cli

cli.main(["toy", "data", "--train", "64", "--validation", "16", "--seed", "0"])
package, steps, entered = str(Path(cli.__file__).parent), [0], set()
tokenizer = AutoTokenizer.from_pretrained("data/tokenizer")

def save(auto, folder, **fields):
    config = AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, **fields,
    )
    torch.manual_seed(0)
    auto.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)

def profile(frame, event, argument):
    code = frame.f_code
    if event != "call" or not code.co_filename.startswith(package):
        return
    file = code.co_filename[len(package) + 1 :]
    # `Run.log` ends a step: what is called between the first and the second call of it belongs to step 2.
    steps[0] += (file, code.co_name) == ("run/run.py", "log")
    if steps[0] == 1 or (steps[0] == 2 and code.co_name == "log"):
        entered.add(file)

save(AutoModelForCausalLM, "policy")
save(AutoModelForSequenceClassification, "reward", num_labels=1)
sys.setprofile(profile)
status = cli.main([
    "train", "recipe.yaml", "executor=local", "run.steps=2", "run.dir=run", "run.progress=none", "data.path=data",
    "prompts_per_step=8", "sampling.num_samples=4", "sampling.max_tokens=8", "policy.path=policy", "reward.path=reward",
    "evaluation.every=0", "placement={}", "policy.zero_stage=1",
])
sys.setprofile(None)
assert status in (0, None), status
print("\\nENTERED " + " ".join(sorted(entered)))
"""


def measure_names(trees: dict[Path, ast.Module]) -> dict[str, float]:
    """The share of banned names among all stored names (variables and parameters), and class names defined twice."""
    names: Counter[str] = Counter()
    classes: dict[str, set[Path]] = {}
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names[node.id] += 1
            elif isinstance(node, ast.arg):
                names[node.arg] += 1
            elif isinstance(node, ast.ClassDef):
                classes.setdefault(node.name, set()).add(path)
    doubles = [name for name, paths in classes.items() if len(paths) > 1]
    banned = sum(names[name] for name in BANNED)
    return {
        "stored names": names.total(),
        "banned names": banned,
        "banned names, share of stored names (%)": round(100 * banned / names.total(), 3),
        "class names defined in several files": len(doubles),
        "... but for Config": len(set(doubles) - {"Config"}),
    }


def measure_lines(sources: dict[Path, str]) -> dict[str, float]:
    """Lines of the package, and lines that hold only a comment as a share of the lines that hold code."""
    comments = code = 0
    ignored = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.COMMENT)
    for text in sources.values():
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
        comments += sum(token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip() for token in tokens)
        lines = {
            line for token in tokens if token.type not in ignored for line in range(token.start[0], token.end[0] + 1)
        }
        code += len(lines)
    return {
        "python files of the package": len(sources),
        "lines of the package": sum(text.count("\n") for text in sources.values()),
        "comment lines": comments,
        "comment lines, share of lines of code (%)": round(100 * comments / code, 2),
    }


def measure_docstrings(trees: dict[Path, ast.Module]) -> dict[str, float]:
    """The share of public modules, classes, functions and methods that have a docstring."""
    total = documented = 0
    definitions = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

    def visit(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        nonlocal total, documented
        total, documented = total + 1, documented + (ast.get_docstring(node) is not None)
        if isinstance(node, ast.Module | ast.ClassDef):
            for child in node.body:
                if isinstance(child, definitions) and not child.name.startswith("_"):
                    visit(child)

    for tree in trees.values():
        visit(tree)
    return {"public docstrings (%)": round(100 * documented / total, 1)}


def run_python(root: Path, arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python with the package of ``root``."""
    environment = os.environ | {"PYTHONPATH": str(root), "COLUMNS": "400", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def count_keys(root: Path, recipe: str) -> int:
    """Keys that ``align show --all`` prints for a recipe (all of them; older versions have no ``--all``)."""
    command = ["-c", "import sys; from align.cli import main; sys.exit(main(sys.argv[1:]))", "show"]
    done = run_python(root, [*command, "--all", f"recipes/{recipe}"], root)
    if done.returncode:
        done = run_python(root, [*command, f"recipes/{recipe}"], root)
    if done.returncode:
        raise SystemExit(f"{root}: align show recipes/{recipe} failed:\n{done.stderr or done.stdout}")
    return sum(SHOWN.fullmatch(line) is not None for line in done.stdout.splitlines())


def list_entered_files(root: Path) -> list[str]:
    """Files of the package that step 2 of a tiny RLOO run enters: local executor, two layers, 8 prompts x 4 samples."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "recipe.yaml").write_text((root / "recipes" / RECIPES["RLOO"]).read_text())
        (folder / "traced_run.py").write_text(TRACED_RUN)
        done = run_python(root, ["traced_run.py"], folder)
    for line in done.stdout.splitlines():
        if line.startswith("ENTERED "):
            return line.split()[1:]
    raise SystemExit(f"{root}: the traced run failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def measure(root: Path) -> dict[str, float]:
    """Every number, in the order in which they are printed."""
    sources = {path: path.read_text() for path in sorted((root / "align").rglob("*.py"))}
    trees = {path: ast.parse(text) for path, text in sources.items()}
    numbers = measure_names(trees)
    for name, recipe in RECIPES.items():
        numbers[f"recipe keys of {name}"] = count_keys(root, recipe)
    numbers["lines of the README"] = (root / "README.md").read_text().count("\n")
    numbers |= measure_lines(sources) | measure_docstrings(trees)
    entered = list_entered_files(root)
    numbers["files that one RLOO step enters"] = len(entered)
    numbers["lines of these files"] = sum(sources[root / "align" / name].count("\n") for name in entered)
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help="the checkout to measure")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    arguments = parser.parse_args()
    numbers = measure(arguments.root.resolve())
    if arguments.json:
        print(json.dumps(numbers, indent=2))
        return
    for name, value in numbers.items():
        print(f"{name:<44} {value:>10,}")


if __name__ == "__main__":
    main()
