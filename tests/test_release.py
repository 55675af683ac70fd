"""What is released: one version, everything that is needed, types that a user's mypy understands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fusedopt

ROOT = Path(__file__).parent.parent


def test_the_version_is_said_in_one_place():
    project = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in project and not re.search(r'^version = "', project, re.MULTILINE)
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest and newest[1] == fusedopt.__version__


def test_every_folder_of_modules_is_a_package():
    """setuptools finds no others."""
    for base in (ROOT / "fusedopt", ROOT / "kernels" / "fusedopt_kernels"):
        for folder in {path.parent for path in base.rglob("*.py")}:
            assert (folder / "__init__.py").exists(), f"{folder} has no __init__.py, so the wheel would lack it"


@pytest.mark.slow
def test_python_m_fusedopt():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-m", "fusedopt", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, done.stdout) == (0, f"fusedopt {fusedopt.__version__}\n"), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "change, complaint",
    [
        (("", ""), None),
        (("lr=1e-3, betas", 'lr="small", betas'), 'incompatible type "str"'),
        (("assert_type(verification.ok, bool)", "assert_type(verification.ok, int)"), 'of type "bool", not "int"'),
    ],
    ids=["as it is", "a rate that is a string", "a wrong type of a result"],
)
def test_a_typed_program_is_checked(change, complaint, tmp_path):
    pytest.importorskip("mypy")
    program = tmp_path / "program.py"
    program.write_text((ROOT / "tests" / "typed_program.py").read_text().replace(*change))
    environment = {**os.environ, "MYPYPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--follow-imports=silent", str(program)]
    command += ["--cache-dir", str(tmp_path.parent / "mypy")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    if complaint is None:
        assert done.returncode == 0, done.stdout
    else:
        assert done.returncode == 1 and complaint in done.stdout, done.stdout
