"""Several processes of one script, as a launcher of training would start them."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def run_together(script: str, number: int, folder: Path, timeout: float, **environment: str) -> None:
    """Runs `script RANK FOLDER` as so many processes, and fails with what the first one that failed has to say."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    variables = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    processes = [
        subprocess.Popen([sys.executable, script, str(rank), str(folder)], env=variables, stderr=subprocess.PIPE)
        for rank in range(number)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=timeout)
            assert process.returncode == 0, errors.decode()
    finally:
        for process in processes:
            process.kill()
