"""Local files to rows: which format, which files, and what is still readable in damaged ones."""

import csv
import glob
import io
import json
import logging
import lzma
import os
import zlib
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import fsspec
from datasets import (
    Dataset,
    Features,
    IterableDataset,
    Value,
    load_dataset,
)
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from pyarrow import ArrowException, parquet

from .faults import DAMAGED, DROP_REASONS, KEPT, UNREADABLE, find_fault


logger = logging.getLogger(__name__)


FILE_FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".txt": "text"}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
FAULT_COLUMN = "fault_found_when_read"
DAMAGES = (ArrowException, csv.Error, EOFError, lzma.LZMAError, OSError, UnicodeError, ValueError, zlib.error)


def load_files(
    argument: str, pattern: str, streaming: bool, cache_dir: str | None, text_column_name: str | None = None
) -> Dataset | IterableDataset:
    """
    The rows of the files that match `pattern`; `argument` is what errors call the flag it came from. Damaged files are
    read past the damage where `text_column_name` is the only column that is needed, and are an error elsewhere.
    """
    paths = [pattern] if "://" in pattern else sorted(glob.glob(pattern, recursive=True))
    if not paths:
        raise FileNotFoundError(f"--{argument}: no file {pattern!r} (seen from {os.getcwd()}).")
    formats = {FILE_FORMATS.get(_extension(path)) for path in paths}
    if len(formats) > 1 or None in formats:
        raise ValueError(
            f"--{argument} {without_query(pattern)!r} has the extension(s) {sorted({*map(_extension, paths)})}; it "
            f"must be one of {', '.join(FILE_FORMATS)}, as it is or compressed ({', '.join(COMPRESSIONS)}). "
            "A folder is given with --dataset_name."
        )
    if "://" not in pattern and not any(os.path.getsize(path) for path in paths):
        raise ValueError(f"--{argument}: {pattern!r} is empty; it must hold at least one document.")
    file_format = formats.pop()
    load = {"data_files": {"train": paths}, "split": "train", "streaming": streaming, "cache_dir": cache_dir}
    if streaming or "://" in pattern:
        return load_dataset(file_format, **load)
    try:
        return load_dataset(file_format, **load)
    except (DatasetGenerationError, *DAMAGES) as error:
        if text_column_name is None:
            raise ValueError(f"--{argument}: {pattern!r} cannot be read. {error.__cause__ or error}") from error
        logger.warning(
            f"--{argument} {pattern!r} cannot be read as a whole: {error.__cause__ or error}. "
            "Reading it document by document, past what is damaged."
        )
    states = [(os.path.getsize(path), os.stat(path).st_mtime_ns) for path in paths]
    return Dataset.from_generator(
        read_damaged_files,
        gen_kwargs={"paths": paths, "file_format": file_format, "text_column_name": text_column_name},
        features=Features({text_column_name: Value("string"), FAULT_COLUMN: Value("int8")}),
        cache_dir=cache_dir,
        fingerprint=Hasher.hash([paths, states, text_column_name, DROP_REASONS]),
    )


def read_damaged_files(paths: list[str], file_format: str, text_column_name: str) -> Iterator[dict]:
    """Reads the documents of files one by one, past those that are damaged.

    A line that is no JSON is one unreadable document. Where a whole file cannot be read further (a truncated gzip
    file, a parquet file without its footer), what came before is used and the rest counts as one unreadable document;
    the log names the file.

    Args:
        paths (`list[str]`): Local files, as they are or compressed.
        file_format (`str`): One of the values of `FILE_FORMATS`.
        text_column_name (`str`): The column that holds the text.

    Yields:
        `dict`: The text, or `None` where there is none to use; and why, as an index into `DROP_REASONS`, or `KEPT`.
    """
    for path in paths:
        try:
            for text in _read_texts(path, file_format, text_column_name):
                fault = find_fault(text)
                is_usable = fault is None
                yield {text_column_name: text if is_usable else None, FAULT_COLUMN: KEPT if is_usable else fault}
        except DAMAGES as error:
            logger.warning(f"{path} is damaged, and what follows in it is left out: {error or type(error).__name__}")
            yield {text_column_name: None, FAULT_COLUMN: UNREADABLE}


def _read_texts(path: str, file_format: str, text_column_name: str) -> Iterator[Any]:
    with fsspec.open(path, "rb", compression="infer") as file:
        if file_format == "parquet":
            for batch in parquet.ParquetFile(file).iter_batches(columns=[text_column_name]):
                yield from batch[text_column_name].to_pylist()
            return
        # bytes that are no UTF-8 become lone surrogates, which find_fault knows
        lines = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="\n")
        if file_format == "text":
            yield from (line.rstrip("\r\n") for line in lines)
        elif file_format == "csv":
            csv.field_size_limit(2**31 - 1)
            yield from (row.get(text_column_name) for row in csv.DictReader(lines))
        else:
            for line in lines:
                yield from _parse_json(line, text_column_name)


def _parse_json(line: str, text_column_name: str) -> Iterator[Any]:
    if not line.strip():
        return
    try:
        value = json.loads(line)
    except ValueError:
        yield DAMAGED
        return
    for row in value if isinstance(value, list) else [value]:  # a .json file may be one long list
        yield row.get(text_column_name) if isinstance(row, dict) else DAMAGED


def without_query(path_or_url: str) -> str:
    """A path as it is; a URL without what may be secret in it: user, password, query and fragment."""
    if "://" not in path_or_url:
        return path_or_url
    parts = urlsplit(path_or_url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _extension(path: str) -> str:
    stem, extension = os.path.splitext(without_query(path).lower())
    return os.path.splitext(stem)[1] if extension in COMPRESSIONS else extension
