"""Checkpoints of the demo, whose errors name what does not fit."""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from fusedopt.demo.settings import Settings
from fusedopt.files import write_atomically
from fusedopt.out_of_memory import is_out_of_memory


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    write_atomically(path, lambda file: torch.save(checkpoint, file))


# The parts of a checkpoint, the fields of a record, and their types.
_PARTS = {
    "settings": dict,
    "identity": dict,
    "step": int,
    "records": list,
    "batches": torch.Tensor,
    "runs": dict,
}
_RECORD = {"run": str, "step": int, "train_loss": float, "lr": (float, type(None)), "optimizer_ms": float}
_MAY_BE_IN_A_RECORD = {"val_loss": float}


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Returns the checkpoint in `path`, with its tensors on the CPU.

    Raises:
        ValueError: the file does not exist, or is no checkpoint of the demo.
    """
    if not path.exists():
        raise ValueError(f"nothing to resume: {path} does not exist; start without resuming, or name another folder")
    with reading(path):
        _check_archive(path)
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        missing = _PARTS.keys() - set(checkpoint)
        wrong = [name for name, kind in _PARTS.items() if not missing and not _is(checkpoint[name], kind)]
        if not missing and not wrong:
            _check_contents(checkpoint)
    if missing:
        raise ValueError(f"cannot resume: {path} is no checkpoint of this demo, {', '.join(sorted(missing))} missing")
    if wrong:
        raise ValueError(
            f"cannot resume: {path} is no checkpoint of this demo, its {wrong[0]} is {checkpoint[wrong[0]]!r:.80}"
        )
    return checkpoint


def _check_archive(path: Path) -> None:
    """Raises where a byte is another one than was written, which torch does not check, or the file would swell."""
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
            raise ValueError("it is compressed")
        if sum(part.file_size for part in parts) > path.stat().st_size:
            raise ValueError("its parts are larger than itself")
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns every error of the block, but that there is no memory, into one ValueError that names `path`."""
    try:
        yield
    except Exception as error:  # torch.load alone raises a dozen kinds for damaged files
        if is_out_of_memory(error):
            raise
        text = " ".join(str(error).split())
        said = f": {text}" if text and isinstance(error, (ValueError, TypeError)) else ""
        raise ValueError(
            f"cannot resume: {path} is damaged, or no checkpoint ({type(error).__name__}{said})"
        ) from error


def _is(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _check_contents(checkpoint: dict[str, Any]) -> None:
    """Raises ValueError where a run writes something else; states are checked by those who load them."""
    defaults = {field.name: field.default for field in fields(Settings)}
    for name, value in checkpoint["settings"].items():
        if name not in defaults or not (value is None or defaults[name] is None or _is(value, type(defaults[name]))):
            raise ValueError(f"the setting {name} is {value!r}")
    for name in defaults.keys() - checkpoint["settings"].keys():
        raise ValueError(f"the setting {name} is missing")
    step, records = checkpoint["step"], checkpoint["records"]
    for name, value in checkpoint["identity"].items():
        if not isinstance(value, (str, int, float, type(None))):
            raise ValueError(f"{name} of the run is {type(value).__name__}")
    for record in records:
        given = {name: kind for name, kind in _MAY_BE_IN_A_RECORD.items() if name in record}
        for name, kind in {**_RECORD, **given}.items():
            if not _is(record[name], kind):
                raise ValueError(f"{name} of a record is {record[name]!r}")
        if unknown := record.keys() - _RECORD.keys() - given.keys():
            raise ValueError(f"a record has {sorted(map(str, unknown))} besides")
    if len(records) != 2 * step or sorted(record["step"] for record in records) != sorted([*range(1, step + 1)] * 2):
        raise ValueError(f"there are {len(records)} records of {step} steps")


def check_same_run(checkpoint: dict[str, Any], identity: dict[str, Any], steps: int) -> None:
    """Raises ValueError if a run with this identity and number of steps cannot continue the checkpoint."""
    saved = checkpoint["identity"]
    for name, value in identity.items():
        if saved.get(name) != value:
            was, now = ("another one", "") if name == "text" else (repr(saved.get(name)), f", now {value!r}")
            raise ValueError(f"cannot resume: {name} was {was} in the checkpoint{now}; start anew in another folder")
    if steps < checkpoint["step"]:
        raise ValueError(f"cannot resume: {checkpoint['step']} steps are done, steps={steps} asks for fewer")
