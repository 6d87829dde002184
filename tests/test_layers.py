"""The import law of docs/architecture.md, read from the source with `ast`."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "align"

ROWS = [
    {"types", "errors", "config", "utils"},
    {"ops", "data", "roles", "prechecks"},
    {"models", "engines", "generators", "rewards", "checkpoint", "run"},
    {"algorithms", "workers", "cluster"},
    {"prepare", "launch", "replay", "eval", "scale", "serve", "report", "plan", "commands", "cli"},
]
"""A unit (a module or package directly below align) may import its own unit and those of rows above it."""

BESIDE = {
    ("config", "utils"),
    ("config", "errors"),
    ("utils", "errors"),
    ("run", "checkpoint"),
    ("models", "checkpoint"),
    ("engines", "models"),
    ("rewards", "models"),
    ("rewards", "engines"),
    ("rewards", "generators"),
    ("generators", "models"),
    ("generators", "engines"),
    ("launch", "prepare"),
    ("cli", "commands"),
    ("replay", "launch"),
    ("replay", "prepare"),
    ("eval", "report"),
    ("scale", "eval"),
    ("scale", "report"),
    ("cluster", "workers"),
}
"""Edges within a row that are meant; docs/architecture.md says why."""

ONLY = {"deepspeed": {"engines"}, "ray": {"cluster", "serve"}, "peft": {"models"}}
"""Who may name a library."""

TORCH_FREE = {"config", "config.load", "errors", "utils", "roles", "prechecks", "algorithms", "commands", "cli"} | {
    f"utils.{path.stem}" for path in (ROOT / "utils").glob("*.py") if path.stem != "__init__"
}
"""Units that load no torch when imported."""

GIVEN_ELSEWHERE = {"packed_attention"}
"""Functions whose parameters another library prescribes."""

FILES = sorted(ROOT.rglob("*.py"))
ROW_OF = {unit: index for index, row in enumerate(ROWS) for unit in row}


def unit_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> list[tuple[str, ast.stmt]]:
    """Modules imported anywhere, `from align import x` read as align.x."""
    found: list[tuple[str, ast.stmt]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"align.{alias.name}" for alias in node.names] if node.module == "align" else [node.module]
            found += [(name, node) for name in names]
    return found


def typing_only(tree: ast.Module) -> set[ast.stmt]:
    """Statements below `if TYPE_CHECKING`."""
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    return {statement for block in blocks for statement in ast.walk(block) if isinstance(statement, ast.stmt)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_obey_the_law(path: Path):
    unit, tree = unit_of(path), ast.parse(path.read_text())
    if unit == "__init__":
        return
    exempt = typing_only(tree)
    for module, statement in imports(tree):
        if module.startswith("align.") and statement not in exempt:
            other = module.split(".")[1]
            if other == "__version__":
                continue
            allowed = other == unit or ROW_OF[other] < ROW_OF[unit] or (unit, other) in BESIDE
            assert allowed, f"{unit} imports {other}"
        library = module.split(".")[0]
        assert unit in ONLY.get(library, {unit}), f"{unit} names {library}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_import_inside_functions(path: Path):
    tree = ast.parse(path.read_text())
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            inner = [node for node in ast.walk(function) if isinstance(node, (ast.Import, ast.ImportFrom))]
            assert not inner, f"{function.name} imports"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_budgets(path: Path):
    text = path.read_text()
    limit = 150 if unit_of(path) == "algorithms" else 400
    assert text.count("\n") <= limit
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 60, node.name
            arguments = [a for a in node.args.posonlyargs + node.args.args if a.arg not in ("self", "cls")]
            assert len(arguments) <= 6 or node.name in GIVEN_ELSEWHERE, node.name


def test_every_unit_has_a_row():
    assert {unit_of(path) for path in FILES} - {"__init__"} == set(ROW_OF)


def test_every_listed_edge_exists():
    edges = {
        (unit_of(p), m.split(".")[1]) for p in FILES for m, _ in imports(ast.parse(p.read_text())) if "align." in m
    }
    assert edges >= BESIDE


def test_configuration_loads_no_torch():
    algorithms = [path.stem for path in (ROOT / "algorithms").glob("*.py") if path.stem != "__init__"]
    modules = (
        [f"align.{unit}" for unit in TORCH_FREE]
        + ["align.eval.arguments"]
        + [f"align.algorithms.{name}" for name in algorithms]
    )
    heavy = ("torch", "ray", "deepspeed", "transformers", "datasets")
    code = f"import sys, {', '.join(modules)}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


CODE_RUNNERS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "runpy.run_path", "runpy.run_module"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads", "shelve.open", "joblib.load"),
    *("torch.load", "dcp.load", "torch.distributed.checkpoint.load", "numpy.load", "np.load"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "yaml.unsafe_load_all"),
}
"""Calls that can run what a stranger wrote; ``dcp.load`` unpickles its ``.metadata`` whatever its arguments are."""
LOOSE = {"weights_only": "False", "shell": "True", "allow_pickle": "True", "use_safetensors": "False"}
"""Arguments that open such a door."""


def doors(tree: ast.AST) -> set[str]:
    """Calls, arguments and imports in a source that can run what a stranger wrote."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    found = {ast.unparse(call.func) for call in calls} & CODE_RUNNERS
    found |= {
        f"{word.arg}={ast.unparse(word.value)}"
        for call in calls
        for word in call.keywords
        if word.arg in LOOSE and ast.unparse(word.value) == LOOSE[word.arg]
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] != "align":
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & (CODE_RUNNERS | {"torch.distributed.checkpoint"})
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & {"torch.distributed.checkpoint", "dill", "cloudpickle"}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_unpickling_and_no_dynamic_code(path: Path):
    """Weights come from safetensors, configuration from YAML nodes: nothing is executed that a stranger wrote."""
    assert not doors(ast.parse(path.read_text()))


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(f)",
        "torch.load(f, weights_only=True)",
        "pickle.loads(b)",
        "pickle.Unpickler(f).load()",
        "from pickle import loads",
        "from torch import load",
        "dcp.load(state)",
        "import torch.distributed.checkpoint as dcp",
        "from torch.distributed import checkpoint",
        "engine.load(f, weights_only=False)",
        "np.load(f, allow_pickle=True)",
        "subprocess.run(c, shell=True)",
        "yaml.load(text, Loader)",
        "eval(text)",
    ],
)
def test_each_way_to_run_a_strangers_code_is_seen(source: str):
    assert doors(ast.parse(source))
