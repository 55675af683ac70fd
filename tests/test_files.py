"""Files that are written whole or not at all."""

import errno
import os

import pytest
from helpers.demo import Killed

from fusedopt.files import write_atomically


@pytest.mark.parametrize("moment", ["while writing", "before renaming"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, moment):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"half of the ne")
        if moment == "while writing":
            raise Killed

    def fsync(descriptor):
        raise Killed

    if moment == "before renaming":
        monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(Killed):
        write_atomically(path, write)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_link_to_a_file_stays_a_link(tmp_path):
    (tmp_path / "there").write_bytes(b"old")
    (tmp_path / "here").symlink_to(tmp_path / "there")
    write_atomically(tmp_path / "here", lambda file: file.write(b"new"))
    assert (tmp_path / "here").is_symlink() and (tmp_path / "there").read_bytes() == b"new"


@pytest.mark.parametrize("wrapped", [False, True], ids=["as it is", "in an error of a library"])
def test_a_full_disk_names_the_file(tmp_path, wrapped):
    def write(file):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            if wrapped:
                raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904 - as C++ does
            raise

    with pytest.raises(OSError, match="No space left") as caught:
        write_atomically(tmp_path / "file", write)
    assert caught.value.filename == str(tmp_path / "file")
    assert os.listdir(tmp_path) == []
