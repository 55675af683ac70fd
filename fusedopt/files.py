"""Writes files such that a crash or a full disk leaves the old one, and every error names the file."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Makes an OSError of the block name `path`, even if a library has wrapped it in an error of its own.

    Example:
        >>> with naming(Path("run/metrics.jsonl")):
        ...     raise OSError(28, "No space left on device")
        Traceback (most recent call last):
        ...
        OSError: [Errno 28] No space left on device: 'run/metrics.jsonl'
    """
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None or cause.errno is None:
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Replaces the file `path` by a new one, once that is complete and on the disk.

    Args:
        path: of the file, or of a link to it. The new file is written next to it, so its folder must be writable.
        write: is called with the new file, open for bytes; a library that wants a path takes its `name`.

    Raises:
        OSError: the file cannot be written; the error names `path`, and nothing is left behind.
    """
    target = Path(os.path.realpath(path))
    with naming(path):
        if target.exists() and not target.is_file():  # a device or a pipe is written to; a folder cannot be
            with open(target, "wb") as file:
                write(file)
            return
        temporary = target.with_name(target.name + ".tmp")
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        # The folder has to reach the disk as well; Windows cannot open one, and need not.
        if os.name == "posix":
            folder = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
