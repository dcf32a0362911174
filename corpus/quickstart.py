"""The quickstart: a corpus that needs no download, and a report in plain words of what was learned from it.

The documents are the docstrings of the libraries this project is installed with. Files are parsed with `ast` and never
imported: importing runs code and takes long. A module file, not a docstring, goes to training or validation as a
whole, because docstrings of one file repeat each other. Its place is the hash of its path: every machine with the same
library versions gets the same documents, in the same, already mixed, order. The library a docstring comes from is a
class label at no cost, and every class has enough documents for the probe.
"""

import ast
import gc
import hashlib
import importlib.util
import inspect
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import datasets
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from filelock import FileLock


# Dependencies of this project, direct or not, with some hundred docstrings each. The order is that of the labels.
PACKAGES = ("torch", "transformers", "sympy", "pandas", "networkx", "numpy", "huggingface_hub", "datasets")
MIN_DOCUMENT_CHARS = 200
VALIDATION_SHARE_OF_FILES = 0.1
SKIPPED_FOLDERS = frozenset({"test", "tests", "testing", "_vendor"})
FILES_PER_PROCESS = 200  # fewer do not repay starting a process
WHOLE_MARKER = "whole.json"  # the rows per split, written last: without it, or with other counts, a cache is torn


def load_quickstart_documents(cache_dir: str | None = None) -> DatasetDict:
    """
    Docstrings of 200 characters or more of the `PACKAGES` that are installed, each text once.

    The first call reads the libraries' sources (seconds); later ones load what it saved, until a library changes its
    version. Several processes may call it at once: one reads, the others wait.

    Args:
        cache_dir (`str`, *optional*, defaults to `datasets`' own cache):
            Where the saved documents go, in a folder `tjepa-quickstart`.

    Returns:
        `DatasetDict` with `train` and `validation`, columns `text` (`str`, dedented) and `label` (`ClassLabel`, the
        library). No text and no module file is in both.

    Raises:
        RuntimeError: none of the packages is installed with its `.py` sources.
    """
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "tjepa-quickstart" / _fingerprint()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        documents = _load_if_whole(folder)
        if documents is None:
            _save(_read_documents(), folder)
            # Loaded again, so that what is derived from it (tokenized text, ...) finds its cache in the next run too.
            documents = DatasetDict.load_from_disk(str(folder))
    return documents


def docstrings_of_file(path: str | Path) -> list[str]:
    """
    The docstrings in one Python file: module, classes and functions, nested ones included, in the order of the file,
    cleaned by `inspect.cleandoc` and of `MIN_DOCUMENT_CHARS` or more. A file that is not valid Python has none.
    """
    source = Path(path).read_bytes()
    if b'"""' not in source and b"'''" not in source:  # a quarter of all files; parsing is what takes the time
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escape sequences
            module = ast.parse(source)
    except (SyntaxError, ValueError):  # templates, files for another Python, null bytes
        return []
    texts = (ast.get_docstring(node, clean=False) for node in [module, *_definitions(module.body)])
    # An escaped lone surrogate is a valid docstring and invalid UTF-8.
    cleaned = (inspect.cleandoc(text).encode("utf-8", "ignore").decode("utf-8") for text in texts if text)
    return [text for text in cleaned if len(text) >= MIN_DOCUMENT_CHARS]


def _definitions(statements: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Classes and functions below `statements`. Unlike `ast.walk` it stays out of expressions: four times as fast."""
    for statement in statements:
        if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield statement
        for block in ("body", "handlers", "orelse", "finalbody"):
            yield from _definitions(getattr(statement, block, []))


def _source_files() -> list[tuple[str, str, int, bool]]:
    """(path, place, label, whether it is for validation) of every module file, ordered by place: the path's hash."""
    files = []
    for label, package in enumerate(PACKAGES):
        spec = importlib.util.find_spec(package)  # finds a top-level package without importing it
        for root in (spec.submodule_search_locations or []) if spec else []:
            for path in Path(root).rglob("*.py"):
                relative = path.relative_to(root)
                if SKIPPED_FOLDERS.isdisjoint(relative.parts):
                    place = hashlib.sha256(f"{package}/{relative.as_posix()}".encode()).hexdigest()
                    files.append((str(path), place, label, int(place[:8], 16) < VALIDATION_SHARE_OF_FILES * 2**32))
    return sorted(files, key=lambda file: file[1])


def _docstrings_of_batch(batch: dict[str, list]) -> dict[str, list]:
    rows = {"text": [], "label": [], "is_validation": []}
    gc.disable()  # syntax trees are many small objects without cycles: collecting doubles the time
    try:
        for path, label, is_validation in zip(batch["path"], batch["label"], batch["is_validation"], strict=True):
            texts = docstrings_of_file(path)
            rows["text"] += texts
            rows["label"] += [label] * len(texts)
            rows["is_validation"] += [is_validation] * len(texts)
    finally:
        gc.enable()
    return rows


def _read_documents() -> DatasetDict:
    files = _source_files()
    columns = zip(*files, strict=True) if files else [[]] * 4
    table = Dataset.from_dict(dict(zip(("path", "place", "label", "is_validation"), columns, strict=True)))
    num_processes = min(os.cpu_count() or 1, len(files) // FILES_PER_PROCESS)
    rows = table.map(
        _docstrings_of_batch,
        batched=True,
        batch_size=100,
        remove_columns=table.column_names,
        num_proc=num_processes if num_processes > 1 else None,
        desc="Reading docstrings",
    )
    splits = {split: {"text": [], "label": []} for split in ("train", "validation")}
    seen = set()
    for row in rows:
        if row["text"] not in seen:
            seen.add(row["text"])
            split = splits["validation" if row["is_validation"] else "train"]
            split["text"].append(row["text"])
            split["label"].append(row["label"])
    if not seen:
        raise RuntimeError(
            f"No docstrings of {MIN_DOCUMENT_CHARS} characters or more in the sources of {', '.join(PACKAGES)}. "
            "The default corpus needs at least one of them installed with its .py files; "
            "install one with pip, or pretrain on your own text."
        )
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(PACKAGES))})
    return DatasetDict({name: Dataset.from_dict(split, features=features) for name, split in splits.items()})


def _fingerprint() -> str:
    """Changes with the version of any package and with this file, which holds all the rules."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return hashlib.sha256(Path(__file__).read_bytes() + json.dumps(versions).encode()).hexdigest()[:16]


def _save(documents: DatasetDict, folder: Path) -> None:
    """Under another name first: whoever is interrupted here leaves no folder that looks like the finished one."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
        documents.save_to_disk(os.path.join(unfinished, folder.name))
        Path(unfinished, folder.name, WHOLE_MARKER).write_text(json.dumps(documents.num_rows))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(os.path.join(unfinished, folder.name), folder)


def _load_if_whole(folder: Path) -> DatasetDict | None:
    try:
        num_rows = json.loads((folder / WHOLE_MARKER).read_text())
        documents = DatasetDict.load_from_disk(str(folder))
        return documents if documents.num_rows == num_rows else None
    except (
        OSError,
        ValueError,
        KeyError,
    ):  # something is missing, cut off or not what was written (Arrow: ValueError)
        return None
