"""The arrows between the files go one way, and what is optional stays optional."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FUSEDOPT = sorted((ROOT / "fusedopt").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels" / "fusedopt_kernels").rglob("*.py"))

# Lowest first: a file may import what stands above it in this list, or beside it on the same line.
LAYERS = [
    {"batch", "checks", "sharding", "wrappers", "without_data"},
    {"backends"},
    {"optimizer.compile", "optimizer.whose", "optimizer.clipping", "optimizer.state_check"},
    {"optimizer.state"},
    {"optimizer.loading", "optimizer.engine"},
    {"optimizer.base"},
    {"elementwise"},
    {"adamw", "adafactor", "lion"},
    {"adafactor_schedule", "keras", "accumulate", "decay_groups", "in_backward", "reference"},
]


def imported(path: Path, *, at_import: bool = False) -> set[str]:
    """Modules that a file imports; with `at_import` only those that importing the file imports."""
    tree = ast.parse(path.read_text())
    if at_import:
        nodes = [n for statement in tree.body for n in ([statement] if not _deferred(statement) else [])]
    else:
        nodes = list(ast.walk(tree))
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def _deferred(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.dump(statement.test)


def roots(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_the_ground_floor_knows_nothing_above_it(path):
    assert "fusedopt" not in roots(imported(path))


def test_the_formulas_import_only_math_and_typing():
    (rules,) = [path for path in KERNELS if path.name == "rules.py"]
    assert roots(imported(rules)) <= {"math", "typing"}


def layer(module: str) -> int | None:
    parts = module.split(".")
    here = {parts[1], ".".join(parts[1:3])} if parts[0] == "fusedopt" and parts[1:] else set()
    return next((i for i, names in enumerate(LAYERS) if here & names), None)


@pytest.mark.parametrize("path", FUSEDOPT, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_go_one_way(path):
    here = layer(".".join(path.relative_to(ROOT).with_suffix("").parts))
    if here is None:
        return
    for name in imported(path, at_import=True):
        there = layer(name)
        assert there is None or there <= here, f"{path.name} imports {name}, which stands above it"


@pytest.mark.parametrize("path", FUSEDOPT, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_triton_backend_imports_triton_at_import(path):
    if not path.stem.startswith(("triton", "capture")):
        assert "triton" not in roots(imported(path, at_import=True))
    assert "matplotlib" not in roots(imported(path, at_import=True))


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
