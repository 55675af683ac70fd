"""`python -m pages.notebooks [NAME...]`: runs notebooks, all if none is named, and keeps what they print and draw.

Run it on a quiet machine, from a clean tree: the performance notebook measures times, and prints the commit.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent / "notebooks"


def main(names: Sequence[str]) -> None:
    """Runs these notebooks in place; "schedules" stands for schedules.ipynb.

    Raises:
        FileNotFoundError: there is no notebook of that name.
    """
    import nbformat
    from nbclient import NotebookClient

    untyped: Any = nbformat  # has no types
    os.environ.pop("TRITON_INTERPRET", None)  # as in a reader's kernel
    for path in [FOLDER / f"{name}.ipynb" for name in names] or sorted(FOLDER.glob("*.ipynb")):
        notebook = untyped.read(path, untyped.NO_CONVERT)
        resources = {"metadata": {"path": FOLDER}}
        NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=resources).execute()
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # the time of day
        untyped.write(notebook, path)
        print(path.name)


if __name__ == "__main__":
    main(sys.argv[1:])
