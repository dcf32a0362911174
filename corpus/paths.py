"""Paths that a user typed: what looks like one and is not there is named as such, with the nearest name that is."""

import difflib
import os
from pathlib import Path


NUM_NAMES_LISTED = 10
RUN_FILE = "run.json"  # what tells the folder of a run from that of a model made of one


def check_exists(name: str | Path, flag: str) -> None:
    """
    Refuses a path that leads nowhere, before it is taken for a name on the Hub. Names such as `gpt2` and `owner/name`
    pass, unless `owner` is a folder here.

    Args:
        name (`str` or `Path`): a path, or a name on the Hub.
        flag (`str`): the argument that it was given for, for the message.

    Raises:
        FileNotFoundError: naming the nearest path that exists, or what the last folder on the way holds.
    """
    text, path = str(name), Path(name).expanduser()
    is_path = text.startswith((".", "~", os.sep)) or text.endswith(os.sep) or len(path.parts) > 2
    is_path = is_path or (len(path.parts) == 2 and path.parent.is_dir())
    if is_path and not path.exists():
        raise FileNotFoundError(f"{flag} {name}: there is no such file or folder. {hint_at_nearest(path)}".strip())


def hint_at_nearest(name: str | Path) -> str:
    """A sentence that names the existing path nearest to `name`, or what its last existing folder holds; else ''."""
    path = Path(name).expanduser()
    found = Path(path.anchor)
    for part in path.relative_to(path.anchor).parts:
        if not (found / part).exists():
            names = [entry.name for entry in found.iterdir()] if found.is_dir() else []
            close = difflib.get_close_matches(part, names, n=1)
            if not close:
                return _list_folder(found) if found.parts else ""
            part = close[0]
        found /= part
    return _list_folder(found) if found == path else f"Did you mean {found}?"


def _list_folder(folder: Path) -> str:
    if folder.is_file():
        return f"{folder} is a file."
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    return f"{folder} holds: {list_names(names) or 'nothing'}."


def list_names(names: list[str]) -> str:
    """The first names of a list, in a line."""
    return ", ".join(names[:NUM_NAMES_LISTED]) + (", ..." if len(names) > NUM_NAMES_LISTED else "")


def find_newest_run() -> Path:
    """
    The run whose weights, `runs/*/model.safetensors`, are the newest. Classifiers and exports are no runs.

    Raises:
        FileNotFoundError: if there is none.
    """
    weights = [path for path in Path("runs").glob("*/model.safetensors") if (path.parent / RUN_FILE).is_file()]
    if not weights:
        raise FileNotFoundError(
            f"There is no run with a model under runs/ (seen from {os.getcwd()}). Train one with "
            "`tjepa pretrain`, or name another folder."
        )
    return max(weights, key=os.path.getmtime).parent
