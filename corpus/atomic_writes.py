"""Files and folders that are whole or not there, whatever interrupts the writing of them."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


UNFINISHED = ".unfinished-"
SECONDS_TO_WRITE = 3600  # no file takes longer


def flush(path: str | Path) -> None:
    """Brings a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def holds_something(path: Path) -> bool:
    """Whether a folder that is to be written would replace anything: all but an empty one."""
    return path.exists() and not (path.is_dir() and not any(path.iterdir()))


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@contextmanager
def replacing_files(folder: str | Path) -> Iterator[Path]:
    """
    A temporary folder whose files move into `folder` when all of them have been written: each file there is the old
    one or the new one, never half of one. Files of other names stay.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"{UNFINISHED}*"):  # of a process that was killed here, not of one that is writing
        if time.time() - leftover.stat().st_mtime > SECONDS_TO_WRITE:
            shutil.rmtree(leftover, ignore_errors=True)
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
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}{UNFINISHED}") as parent:
        unfinished = Path(parent) / folder.name
        unfinished.mkdir()
        yield unfinished
        for path in files_in(unfinished):
            flush(path)
        if folder.exists():
            folder.rename(Path(parent) / "old")  # which goes with the temporary folder
        unfinished.rename(folder)
