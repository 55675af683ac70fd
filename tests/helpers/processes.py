"""Scripts of this folder in processes of their own."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent


def run_together(
    script: str, number: int, folder: Path, *words: str, timeout: float, killed: int | None = None, **environment: str
) -> None:
    """Runs `script RANK FOLDER WORDS` as so many processes, and fails with what the first that failed has to say.

    `killed`: the rank that ends by SIGKILL.
    """
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    variables = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(folder), *words], env=variables, stderr=subprocess.PIPE
        )
        for rank in range(number)
    ]
    try:
        for rank, process in enumerate(processes):
            _, errors = process.communicate(timeout=timeout)
            assert process.returncode == (-signal.SIGKILL if rank == killed else 0), errors.decode()
    finally:
        for process in processes:
            process.kill()


def run_without_interpreter(script: str, *words: str) -> Any:
    """Returns what a script of the tests prints as JSON, in a process where kernels are compiled, not interpreted."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *sys.path])}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(ROOT / "tests" / script), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
