"""Files and folders that are whole or not there, whatever interrupts the writing of them."""

import glob
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


UNFINISHED = ".unfinished-"
SECONDS_TO_WRITE = 3600  # no file takes longer
SECONDS_TO_PREPARE = 24 * 3600  # in which a folder may wait for what is to be written


def flush(path: str | Path) -> None:
    """Brings a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(folder: str | Path, flag: str = "--output_dir") -> None:
    """Raises a `PermissionError` or `FileExistsError`, before the work, if a folder cannot be written."""
    path = Path(folder).absolute()
    existing = next(place for place in (path, *path.parents) if place.exists())
    if not existing.is_dir():
        raise FileExistsError(f"{flag} {folder}: {existing} is a file: name a folder.".strip())
    try:
        tempfile.TemporaryFile(dir=existing).close()  # permissions do not tell: root, a read-only mount
    except OSError as error:
        reason = f"nothing can be made in {existing} ({error.strerror})"
        raise PermissionError(f"{flag} {folder} cannot be written: {reason}.".strip()) from error


def holds_something(path: Path) -> bool:
    """Whether a folder that is to be written would replace anything: all but an empty one."""
    return any(path.iterdir()) if path.is_dir() else path.exists()


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _clear_if_left_over(unfinished: Path, num_seconds: float) -> None:
    """Removes the folder of a process that was killed, not that of one that is writing."""
    with suppress(FileNotFoundError):  # another process has done so
        newest = max(path.stat().st_mtime for path in (unfinished, *unfinished.rglob("*")))
        if time.time() - newest > num_seconds:
            shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def replacing_files(folder: str | Path) -> Iterator[Path]:
    """
    A temporary folder whose files move into `folder` when all of them have been written: each file there is the old
    one or the new one, never half of one. Files of other names stay.
    """
    folder = Path(folder)
    check_writable(folder, flag="")
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"{UNFINISHED}*"):
        _clear_if_left_over(leftover, SECONDS_TO_WRITE)
    with tempfile.TemporaryDirectory(dir=folder, prefix=UNFINISHED) as unfinished:
        yield Path(unfinished)
        files = files_in(Path(unfinished))
        for path in files:
            flush(path)
        for path in files:
            target = folder / path.relative_to(unfinished)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
    flush(folder)


@contextmanager
def replacing_folder(folder: str | Path) -> Iterator[Path]:
    """
    A temporary folder that takes the place of `folder`, and of all that is in it, when it has been written.

    Raises:
        OSError: if it is a mount point, before anything is written.
    """
    folder = Path(folder).resolve()  # of a link what it points to is replaced
    if folder.is_mount():
        raise OSError(f"{folder} is a mount point, which cannot be replaced: name a folder in it.")
    check_writable(folder.parent, flag="")
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name}{UNFINISHED}"
    for leftover in folder.parent.glob(f"{glob.escape(prefix)}*"):
        if not folder.exists() and (leftover / "old").exists():  # killed between the two renames below
            (leftover / "old").rename(folder)
        _clear_if_left_over(leftover, SECONDS_TO_PREPARE)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=prefix) as parent:
        unfinished = Path(parent) / folder.name
        unfinished.mkdir()
        yield unfinished
        for path in files_in(unfinished):
            flush(path)
        if folder.exists():
            folder.rename(Path(parent) / "old")  # which goes with the temporary folder
        unfinished.rename(folder)
