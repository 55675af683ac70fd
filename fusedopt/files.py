"""Writing files: a crash or a full disk leaves the old one, and every error names the file."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError in the block names `path`, even where a library has put an error of its own around it.

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
    """Replaces `path` by what `write` puts into a file; until all of it is on the disk, `path` stays what it was.

    Args:
        path: The file, or a link to it. It is written beside the old one, so its folder has to be writable.
        write: Gets the new file, open for bytes; a library that wants a path takes its `name`.

    Raises:
        OSError: The file cannot be written; it names `path`. Nothing is left behind.
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
        # The new name must reach the disk as well; Windows cannot open a folder, and needs not.
        if os.name == "posix":
            folder = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
