"""The store's few ways of touching a disk, one method per system call, and the error line when the disk refuses."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_replay.errors import StoreError

Buffer = bytes | bytearray | memoryview

_ADVICE = {
    errno.ENOSPC: "free some space and run the same command again; everything stored so far is kept",
    errno.EDQUOT: "raise the quota or free some space and run the same command again; everything stored so far is kept",
    errno.EACCES: "give write permission or choose another folder",
    errno.EPERM: "give write permission or choose another folder",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a file stands where a folder should be; choose another folder",
    errno.EEXIST: "a file stands where a folder should be; choose another folder",
}


class Damage(StoreError):
    """Bytes on disk that are not what was written: `file`, byte `offset`, and what is wrong there."""

    def __init__(self, file: Path, offset: int, problem: str) -> None:
        super().__init__(f"{file}: byte {offset}: {problem}; run `store repair` and then collect again")
        self.file, self.offset, self.problem = file, offset, problem


@contextmanager
def disk_errors(path: Path, doing: str) -> Iterator[None]:
    """Turn an OSError inside the block into a one-line StoreError that names the path, the reason and the way out."""
    try:
        yield
    except OSError as err:
        advice = _ADVICE.get(err.errno or 0, "")
        reason = err.strerror or str(err)
        raise StoreError(f"{path}: cannot {doing}: {reason}" + (f"; {advice}" if advice else "")) from err


def lock(fd: int, path: Path) -> None:
    """Keep the open journal `path` for this process until it is closed.

    Raises StoreError where another process has it.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as err:
        raise StoreError(
            f"{path}: another process is writing as this rank; wait for it, or use another folder"
        ) from err
    except OSError as err:
        # file systems without locks: the launcher's ranks keep apart by themselves
        if err.errno not in (errno.ENOLCK, errno.ENOTSUP):
            raise StoreError(f"{path}: cannot lock: {err.strerror}") from err


class Disk:
    """Writing system calls: every byte of a store goes through here.

    So a test can end the process at any one of them.
    """

    def create(self, path: Path) -> int:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)

    def reopen(self, path: Path) -> int:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def write(self, fd: int, data: Buffer) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(fd, rest) :]

    def sync(self, fd: int) -> None:
        os.fsync(fd)

    def truncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)
        os.lseek(fd, size, os.SEEK_SET)

    def rename(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def sync_folder(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def replace(self, path: Path, data: bytes) -> None:
        """Write the whole file or leave the old one: temporary file, fsync, rename, fsync of the folder."""
        with disk_errors(path, "write"):
            fresh = path.with_name(f".{path.name}.new")
            fd = self.create(fresh)
            try:
                self.write(fd, data)
                self.sync(fd)
            finally:
                os.close(fd)
            self.rename(fresh, path)
            self.sync_folder(path.parent)
