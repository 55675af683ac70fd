"""Writes files such that a crash or a full disk leaves the old one, and every error names the file."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
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
        _bring_to_disk(target.parent)


_NEVER_WILL = (errno.EACCES, errno.EINVAL, errno.ENOTSUP)
"""Errors of a folder that may not be read, or of a file system whose folders cannot be brought to the disk."""


def _bring_to_disk(folder: Path) -> None:
    if os.name != "posix":  # Windows cannot open a folder, and need not.
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NEVER_WILL:
            raise


def write_text(path: Path, text: str) -> None:
    """Replaces the file `path` by this text, in UTF-8, as `write_atomically` does."""
    write_atomically(path, lambda file: file.write(text.encode()))


def save_figure(figure: Any, path: str | os.PathLike[str], **options: Any) -> None:
    """Replaces the file `path` by a picture, as `write_atomically` does.

    Args:
        figure: of matplotlib.
        path: its ending says in which format; without one it gets matplotlib's usual one.
        options: of matplotlib's `savefig`.
    """
    target = Path(path)
    if not target.suffix:
        target = target.with_name(f"{target.name}.{figure.canvas.get_default_filetype()}")
    suffix = target.suffix.removeprefix(".").lower()
    # By the name: some formats are text, and some are written by another program.
    write_atomically(target, lambda file: figure.savefig(file.name, format=suffix, **options))


def append(file: FileIO, line: bytes) -> None:
    """Adds a line to a file that was opened for appending without a buffer: whole, or not at all.

    Raises:
        OSError: the line does not fit; the error names the file.
    """
    start = file.seek(0, os.SEEK_END)
    with naming(Path(os.fsdecode(file.name))):
        try:
            left = memoryview(line)
            while left:  # A disk that fills up takes a part, and says so the next time.
                left = left[file.write(left) :]
        except BaseException:
            with suppress(OSError):
                file.truncate(start)
            raise
