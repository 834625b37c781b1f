"""Writing so that nothing is lost: a file or folder is there whole, or the old one is."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

RENAME_EXCHANGE = 2
AT_FDCWD = -100
RACES = 20  # how often another process may get in between before this one gives up
NAME_PART = 32  # of the final name in the temporary one, so that a long name does not become too long


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8; undecodable file names stay as they were."""
    write_bytes(path, text.encode("utf-8", errors="surrogateescape"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file through a temporary one beside it.

    A symbolic link stays one. What is no file (a pipe, a terminal, /dev/null) is written to directly.

    Raises:
        OSError: the old file is then untouched.
    """
    if is_stream(path):
        with path.open("wb") as stream:
            stream.write(data)
        return
    write_together({path: data})


def write_together(files: Mapping[Path, bytes]) -> None:
    """Write files that belong together: all of them lie there whole before the first takes its name, in order.

    Raises:
        OSError: the old files are then untouched, unless the system failed between two renamings.
    """
    ready: dict[str, Path] = {}
    try:
        for named, data in files.items():
            path = Path(os.path.realpath(named))
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=f".{path.name[:NAME_PART]}.", dir=path.parent)
            ready[name] = path
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o666 & ~_umask())
        for name, path in ready.items():
            os.replace(name, path)
    except BaseException:
        for name in ready:
            with suppress(OSError):
                os.unlink(name)
        raise


def is_stream(path: Path) -> bool:
    """Whether this is a pipe, a terminal or a device, which must not be replaced by a file."""
    return str(path.parent) in ("/dev", "/dev/fd") or path.is_fifo() or path.is_char_device()


def write_folder(path: Path, fill: Callable[[Path], None], *, replace: bool = True) -> None:
    """Fill a temporary folder beside `path`, then put it there in one step; what was there goes after that.

    Files get the permissions that the umask allows. A symbolic link to a folder stays one.

    Args:
        replace: put it in the place of a folder that is not empty.

    Raises:
        OSError, or whatever `fill` raises: the old folder is then untouched.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name[:NAME_PART]}.", dir=path.parent))
    try:
        fill(temporary)
        for file in temporary.iterdir():
            file.chmod(0o666 & ~_umask())
            _sync(file)
        temporary.chmod(0o777 & ~_umask())
        _sync(temporary)
        _put(temporary, path, replace)
        with suppress(OSError):  # it is there; only a power cut within seconds could still undo the renaming
            _sync(path.parent)
    finally:
        _remove(temporary)


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:  # Ctrl-C in the middle of cleaning up: clean up, then stop
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _put(new: Path, path: Path, replace: bool) -> None:
    for attempt in range(RACES):
        try:
            if replace and path.exists():
                _exchange(new, path)
            else:
                new.rename(path)  # onto nothing, or onto an empty folder
            return
        except OSError as error:
            # Another process put something there, or took it away, in between.
            between = error.errno in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST)
            if not (replace and between and new.exists()) or attempt == RACES - 1:
                raise


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders in one step where the system can, else in two renames with a way back."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        done = libc.renameat2(AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(old), RENAME_EXCHANGE)
        if done == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise OSError(code, os.strerror(code), str(old))
    aside = new.with_name(f"{new.name}.old")
    old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        aside.rename(old)
        raise
    aside.rename(new)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
