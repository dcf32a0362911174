"""The quickstart's corpus, which needs no download.

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
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path

import numpy as np
from datasets import ClassLabel, DatasetDict, Features, Value

from .command_line import available_cores
from .files import generate


# Dependencies of this project, direct or not, with some hundred docstrings each. The order is that of the labels.
PACKAGES = ("torch", "transformers", "sympy", "pandas", "networkx", "numpy", "huggingface_hub", "datasets")
MIN_DOCUMENT_CHARS = 200
VALIDATION_SHARE_OF_FILES = 0.1
SKIPPED_FOLDERS = frozenset({"test", "tests", "testing", "_vendor"})
FILES_PER_PROCESS = 200  # fewer do not repay starting a process


def load_quickstart_documents(cache_dir: str | None = None) -> DatasetDict:
    """
    Docstrings of 200 characters or more of the `PACKAGES` that are installed, each text once.

    The first call reads the libraries' sources (seconds); later ones load what it saved, until a library changes its
    version. Several processes may call it at once: one reads, the others wait.

    Args:
        cache_dir (`str`, *optional*, defaults to `datasets`' own cache):
            Where the saved documents go.

    Returns:
        `DatasetDict` with `train` and `validation`, columns `text` (`str`, dedented) and `label` (`ClassLabel`, the
        library). No text and no module file is in both.

    Raises:
        ValueError: none of the packages is installed with its `.py` sources.
    """
    features = {"text": Value("string"), "label": ClassLabel(names=list(PACKAGES)), "is_validation": Value("bool")}
    rows = generate(read_docstrings, Features(features), cache_dir, split="quickstart", fingerprint=_fingerprint())
    is_validation = np.array(rows["is_validation"][:])
    documents = rows.remove_columns("is_validation")
    return DatasetDict(
        train=documents.select(np.flatnonzero(~is_validation)),
        validation=documents.select(np.flatnonzero(is_validation)),
    )


def read_docstrings() -> Iterator[dict]:
    """Rows `text`, `label` and `is_validation`, each text once."""
    files = _source_files()
    paths = [path for path, *_ in files]
    seen = set()
    # Not multiprocessing.Pool: it ends its workers by SIGTERM, which a worker forked during training survives.
    with ProcessPoolExecutor(max(1, min(available_cores(), len(files) // FILES_PER_PROCESS))) as pool:
        texts_of_files = pool.map(docstrings_of_file, paths, chunksize=50)
        for (*_, label, is_validation), texts in zip(files, texts_of_files, strict=True):
            for text in texts:
                if text not in seen:
                    seen.add(text)
                    yield {"text": text, "label": label, "is_validation": is_validation}
    if not seen:
        raise ValueError(
            f"No docstrings of {MIN_DOCUMENT_CHARS} characters or more in the sources of {', '.join(PACKAGES)}. "
            "The default corpus needs at least one of them installed with its .py files; "
            "install one with pip, or pretrain on your own text."
        )


def docstrings_of_file(path: str | Path) -> list[str]:
    """
    The docstrings in one Python file: module, classes and functions, nested ones included, in the order of the file,
    cleaned by `inspect.cleandoc` and of `MIN_DOCUMENT_CHARS` or more. A file that cannot be read, or that this
    Python's parser refuses, has none.
    """
    try:
        source = Path(path).read_bytes()
    except OSError:  # a link that leads nowhere, no permission
        return []
    if b'"""' not in source and b"'''" not in source:  # a quarter of all files; parsing is what takes the time
        return []
    gc.disable()  # syntax trees are many small objects without cycles: collecting doubles the time
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escape sequences
            module = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []  # templates, files for another Python, null bytes, and what is nested too deeply
    finally:
        gc.enable()
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
                if SKIPPED_FOLDERS.isdisjoint(relative.parts) and path.is_file():
                    place = hashlib.sha256(f"{package}/{relative.as_posix()}".encode()).hexdigest()
                    files.append((str(path), place, label, int(place[:8], 16) < VALIDATION_SHARE_OF_FILES * 2**32))
    return sorted(files, key=lambda file: file[1])


def _fingerprint() -> str:
    """Changes with the version of any package and with this file, which holds all the rules."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return hashlib.sha256(Path(__file__).read_bytes() + json.dumps(versions).encode()).hexdigest()[:16]
