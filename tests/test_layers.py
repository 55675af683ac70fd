"""The arrows between the modules go one way, and what is optional stays optional."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = {
    ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__"): path
    for base in (ROOT, ROOT / "kernels")
    for package in ("fusedopt", "fusedopt_kernels")
    for path in sorted((base / package).rglob("*.py"))
}

# Lowest first. A module may import those of its own layer and of lower ones; the longest name that fits says which.
LAYERS = [
    {"fusedopt.moved"},
    {"fusedopt_kernels.rules", "fusedopt_kernels.record", "fusedopt_kernels.layout", "fusedopt_kernels.memory"},
    {"fusedopt_kernels.measures"},
    {"fusedopt_kernels.device", "fusedopt_kernels.table"},
    {"fusedopt_kernels.storage", "fusedopt_kernels.statistics"},
    {"fusedopt_kernels.step", "fusedopt_kernels.elementwise"},
    {"fusedopt_kernels"},
    {
        "fusedopt.checks",
        "fusedopt.without_data",
        "fusedopt.warn",
        "fusedopt.wrappers",
        "fusedopt.files",
        "fusedopt.out_of_memory",
        "fusedopt.columns",
        "fusedopt.drawing",
        "fusedopt.statistics.findings",
    },
    {"fusedopt.precision"},
    {
        "fusedopt.interface",
        "fusedopt.sharding",
        "fusedopt.backends.graphs",
        "fusedopt.reference",
        "fusedopt.statistics",
    },
    {"fusedopt.backends.scratch", "fusedopt.backends.work", "fusedopt.backends.eager", "fusedopt.backends.triton"},
    {"fusedopt.backends"},
    {"fusedopt.schedules.base", "fusedopt.schedules.checks", "fusedopt.schedules.forms", "fusedopt.schedules.followed"},
    {"fusedopt.schedules.functions", "fusedopt.schedules.metric"},
    {"fusedopt.schedules.registry", "fusedopt.schedules.recorder", "fusedopt.schedules.diagnosis"},
    {"fusedopt.schedules", "fusedopt.schedules.curves", "fusedopt.schedules.verification"},
    {"fusedopt.schedules.plotting"},
    {
        "fusedopt.optimizer.described",
        "fusedopt.optimizer.compile",
        "fusedopt.optimizer.skipped",
        "fusedopt.optimizer.whose",
        "fusedopt.optimizer.looks",
        "fusedopt.optimizer.clipping",
    },
    {
        "fusedopt.optimizer.ranks",
        "fusedopt.optimizer.state_check",
        "fusedopt.optimizer.numbering",
        "fusedopt.optimizer.distributed_checkpoint",
    },
    {"fusedopt.optimizer.state"},
    {"fusedopt.optimizer.state_changes", "fusedopt.optimizer.loading", "fusedopt.optimizer.saving"},
    {"fusedopt.optimizer.engine"},
    {"fusedopt.optimizer"},
    {
        "fusedopt.elementwise",
        "fusedopt.float32",
        "fusedopt.in_backward",
        "fusedopt.accumulate",
        "fusedopt.decay_groups",
        "fusedopt.statistics.recorder",
        "fusedopt.statistics.plotting",
    },
    {"fusedopt.adamw", "fusedopt.adafactor", "fusedopt.lion"},
    {"fusedopt.adafactor_schedule", "fusedopt.keras", "fusedopt.plan"},
    {"fusedopt.public", "fusedopt.__init__"},
    {"fusedopt.demo"},
    {"fusedopt.cli", "fusedopt.__main__"},
]


def imported(path: Path, *, at_import: bool = False) -> set[str]:
    """Modules that a file imports; with `at_import` only those that importing the file imports."""
    tree = ast.parse(path.read_text())
    nodes: list[ast.AST] = list(ast.walk(tree))
    if at_import:
        nodes = [n for statement in tree.body if not _deferred(statement) for n in _outside_functions(statement)]
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= inside & FILES.keys() or {node.module}
    return names


def _deferred(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.dump(statement.test)


def _outside_functions(node: ast.AST) -> list[ast.AST]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return []
    return [node, *(n for child in ast.iter_child_nodes(node) for n in _outside_functions(child))]


def roots(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def layer(module: str) -> int | None:
    parts = [*module.split("."), "__init__"][: module.count(".") + 1 + (module == "fusedopt")]
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        if name != "fusedopt":
            for number, names in enumerate(LAYERS):
                if name in names:
                    return number
    return None


def test_the_formulas_import_only_math_and_typing():
    assert roots(imported(FILES["fusedopt_kernels.rules"])) <= {"math", "typing"}


@pytest.mark.parametrize("module", FILES)
def test_every_module_has_a_layer_and_imports_none_above_it(module):
    here = layer(module)
    assert here is not None, f"{module} has no layer: give it one in LAYERS"
    for name in imported(FILES[module], at_import=True) & FILES.keys():
        there = layer(name)
        assert there is not None and (there <= here or name == "fusedopt"), f"{module} imports {name}, above it"


def test_a_new_module_without_a_layer_is_found():
    assert layer("fusedopt.new") is None and layer("fusedopt.adamw_new") is None
    assert layer("fusedopt") == layer("fusedopt.public")
    assert layer("fusedopt.backends.eager.new") == layer("fusedopt.backends.eager")


def test_there_is_no_circle_of_imports():
    """`fusedopt` itself imports the others when a name is asked for."""
    arrows = {
        module: (imported(path, at_import=True) & FILES.keys()) - {module, "fusedopt"} for module, path in FILES.items()
    }
    assert len(list(TopologicalSorter(arrows).static_order())) >= len(FILES) - 1


@pytest.mark.parametrize("module", [module for module in FILES if module.split(".")[0] == "fusedopt"])
def test_only_the_triton_backend_imports_triton_at_import(module):
    names = roots(imported(FILES[module], at_import=True))
    if not module.startswith("fusedopt.backends.triton"):
        assert "triton" not in names
    assert "matplotlib" not in names


@pytest.mark.slow
def test_works_without_triton_and_matplotlib():
    """As on macOS and Windows: everything but the kernels."""
    program = """
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
optional = ("triton", "matplotlib", "tqdm")
PathFinder.find_spec = lambda name, *args: None if name.split(".")[0] in optional else find(name, *args)
import fusedopt, torch
p = torch.nn.Parameter(torch.ones(3))
optimizer = fusedopt.AdamW([p], lr=0.1)
p.grad = torch.ones(3)
optimizer.step()
assert not set(optional) & set(sys.modules)
print(p.tolist())
"""
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[0.9")
