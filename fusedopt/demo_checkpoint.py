"""Checkpoints of the demo: what does not fit is named."""

from pathlib import Path
from typing import Any

import torch

from fusedopt.files import write_atomically


def save(path: Path, checkpoint: dict[str, Any]) -> None:
    write_atomically(path, lambda file: torch.save(checkpoint, file))


def load(path: Path) -> dict[str, Any]:
    """The checkpoint in `path`, with its tensors on the CPU.

    Raises:
        ValueError: There is none, or it is no checkpoint of the demo.
    """
    if not path.exists():
        raise ValueError(f"nothing to resume: {path} does not exist; start without resuming, or name another folder")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        missing = {"settings", "identity", "step", "records", "batches", "runs"} - set(checkpoint)
    except Exception as error:  # torch.load names a dozen kinds of damage in as many ways
        raise ValueError(f"cannot resume: {path} is damaged, or no checkpoint ({type(error).__name__})") from error
    if missing:
        raise ValueError(f"cannot resume: {path} is no checkpoint of this demo, {', '.join(sorted(missing))} missing")
    return checkpoint


def check_same_run(checkpoint: dict[str, Any], identity: dict[str, Any], steps: int) -> None:
    """Raises ValueError if a run with this identity and number of steps cannot continue the checkpoint."""
    saved = checkpoint["identity"]
    for name, value in identity.items():
        if saved.get(name) != value:
            was, now = ("another one", "") if name == "text" else (repr(saved.get(name)), f", now {value!r}")
            raise ValueError(f"cannot resume: {name} was {was} in the checkpoint{now}; start anew in another folder")
    if steps < checkpoint["step"]:
        raise ValueError(f"cannot resume: {checkpoint['step']} steps are done, steps={steps} asks for fewer")
