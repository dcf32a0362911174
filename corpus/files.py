"""Files to rows: which files, which format, and what is still readable in damaged ones.

Notable: one reader takes every format, for datasets and for streams. It reads the columns that are asked for and no
others, so that files may differ in the rest, and it guesses no types: a csv file holds text. What cannot be decoded is
one unreadable document and is counted; a file that cannot be reached is an error.
"""

import bz2
import csv
import glob
import gzip
import io
import json
import logging
import lzma
import os
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import pyarrow
from datasets import Dataset, DownloadConfig, DownloadManager, Features, IterableDataset, Value, concatenate_datasets
from datasets.data_files import DataFilesList
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from datasets.table import InMemoryTable
from datasets.utils.file_utils import xopen
from pyarrow import parquet

from .faults import ADVICE, DAMAGED, INVALID_UNICODE, KEPT, UNREADABLE, find_fault
from .paths import hint_at_nearest


logger = logging.getLogger(__name__)


FILE_FORMATS = {
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "text",
}
CODECS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": lambda file: pyarrow.CompressedInputStream(file, "zstd"),
}
EXTENSIONS = f"{', '.join(FILE_FORMATS)}, as it is or compressed ({', '.join(CODECS)})"  # for messages
FAULT_COLUMN = "fault_found_when_read"
# of a quoted field of a tsv file, whose own quotes are doubled: its beginning, a line of it, and its end
OPEN_FIELD = re.compile(r'(?:^|\t)"[^"\t]*(?:""[^"\t]*)*$')
MIDDLE_OF_FIELD = re.compile(r'[^"\t]*(?:""[^"\t]*)*')
END_OF_FIELD = re.compile(r'[^"\t]*(?:""[^"\t]*)*"(?=\t|$)')
MAX_LINES_READ_ANEW = 10_000_000  # of a csv file in which quotes are not closed
NUM_SAMPLED_BYTES = 4096  # from which the encoding is told
NUM_SAMPLED_ROWS = 1000  # in which the text column must occur
DECODING_ERRORS = (
    EOFError,
    UnicodeError,
    csv.Error,
    gzip.BadGzipFile,
    lzma.LZMAError,
    pyarrow.ArrowInvalid,
    zlib.error,
)


# ---- which files ----


def load_files(
    argument: str,
    pattern: str,
    streaming: bool = False,
    cache_dir: str | None = None,
    text_column_name: str | None = None,
) -> Dataset | IterableDataset:
    """
    The rows of the files that match `pattern`.

    Args:
        argument (`str`): what errors call the flag that the pattern came from.
        pattern (`str`): a path, a glob or a URL. A file of exactly that name wins over a glob.
        streaming (`bool`): give an `IterableDataset` with the files as its shards.
        cache_dir (`str`, *optional*): where `datasets` keeps its cache.
        text_column_name (`str`, *optional*): the only column that is needed, see `load_paths`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the extension is unknown, the files are empty, or there is no such column.
    """
    paths = find_paths(pattern)
    if not paths:
        hint = "" if "://" in pattern else hint_at_nearest(pattern)
        if os.path.isdir(pattern):
            whole = "which is given with --dataset_name; its" if argument == "--train_file" else "whose"
            extension = next(
                (os.path.splitext(name)[1] for name in os.listdir(pattern) if can_be_read([name])), ".jsonl"
            )
            example = os.path.join(pattern, f"*{extension}")
            hint = f"It is a folder, {whole} files are given with a glob in quotes, such as {example!r}."
        raise FileNotFoundError(
            f"{argument}: no file {without_query(pattern)!r} (seen from {os.getcwd()}). {hint}".rstrip()
        )
    formats = {FILE_FORMATS.get(_extension(path)) for path in paths}
    if len(formats) > 1 or None in formats:
        raise ValueError(
            f"{argument} {without_query(pattern)!r} has the extension(s) {sorted({*map(_extension, paths)})}; it "
            f"must be one of {EXTENSIONS}."
        )
    if "://" not in pattern and not any(os.path.getsize(path) for path in paths):
        raise ValueError(f"{argument}: {pattern!r} is empty; it must hold at least one document.")
    return load_paths(f"{argument} {without_query(pattern)!r}", paths, streaming, cache_dir, text_column_name)


def load_table(argument: str, path: str | Path) -> Dataset:
    """
    All columns of the rows of one local file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file has no columns, or cannot be read.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{argument} {path}: there is no such file. {hint_at_nearest(path)}".rstrip())
    if not has_columns(path):
        raise ValueError(f"{argument} {path} must be a json, jsonl, csv, tsv or parquet file, with columns.")
    return load_paths(f"{argument} {path}", [str(path)])


def has_columns(path: str | Path) -> bool:
    """Whether a file's name is that of a table, and not of plain text or of something else."""
    return FILE_FORMATS.get(_extension(str(path)), "text") != "text"


def find_paths(pattern: str) -> list[str]:
    """The files that a path, a glob or a URL means, in the order of their names."""
    if "://" in pattern:  # a "?" begins a query
        return list(DataFilesList.from_patterns([pattern])) if "*" in pattern else [pattern]
    return [pattern] if os.path.isfile(pattern) else sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))


def can_be_read(paths: list[str]) -> bool:
    """Whether all files have an extension that `load_paths` knows."""
    return all(_extension(path) in FILE_FORMATS for path in paths)


def load_paths(
    source: str,
    paths: list[str],
    streaming: bool = False,
    cache_dir: str | None = None,
    text_column_name: str | None = None,
    token: str | bool | None = None,
) -> Dataset | IterableDataset:
    """
    The rows of files, which may be URLs.

    With `text_column_name` that column alone, and beside it why a text is missing (`FAULT_COLUMN`: an index into
    `DROP_REASONS`, or `KEPT`). Otherwise every column that a row has, and a damaged file is an error.

    Raises:
        ValueError: if there is no such column; without `text_column_name` also if a file is damaged.
    """
    names = [without_query(path) for path in paths]
    if any("://" in path for path in paths) and not streaming:
        downloads = cache_dir and os.path.join(cache_dir, "downloads")
        paths = DownloadManager(download_config=DownloadConfig(cache_dir=downloads, token=token)).download(paths)
        token = None
    if text_column_name is None:
        return _load_all_columns(source, paths, names, cache_dir)
    check_text_column(source, paths, names, text_column_name, token)
    gen_kwargs = {"paths": paths, "names": names, "text_column_name": text_column_name, "token": token}
    features = Features({text_column_name: Value("string"), FAULT_COLUMN: Value("int8")})
    if streaming:
        return IterableDataset.from_generator(read_documents, features, gen_kwargs)
    states = [(os.path.getsize(path), os.stat(path).st_mtime_ns) for path in paths]
    rules = Path(__file__).read_bytes()
    fingerprint = Hasher.hash([paths, names, states, text_column_name, rules])
    return generate(read_documents, features, cache_dir, gen_kwargs=gen_kwargs, fingerprint=fingerprint)


def generate(*args, **kwargs) -> Dataset:
    """`Dataset.from_generator`, with the generator's own errors."""
    try:
        return Dataset.from_generator(*args, **kwargs)
    except DatasetGenerationError as error:
        raise error.__cause__ or error from None


def check_text_column(source: str, paths: list[str], names: list[str], column: str, token: Any = None) -> None:
    """Raises a `ValueError` if there are no rows, or none of the first has the column."""
    seen, has_rows = set(), False
    for path, name in zip(paths, names, strict=True):
        try:
            columns = None if _extension(name) == ".parquet" else [column]  # which reads no others
            for row in islice(read_rows(path, name, columns, token), NUM_SAMPLED_ROWS):
                has_rows = True
                seen |= row.keys() if row is not DAMAGED else set()
                if column in seen:
                    return
        except Exception as error:
            if not is_damage(error):
                raise
            has_rows = True
    if not has_rows:
        raise ValueError(f"{source} has no documents; it must hold at least one.")
    if seen:
        raise ValueError(
            f"{source} has no column {column!r}; it has {sorted(map(str, seen))}. "
            "Pass --text_column_name with the one that holds the text."
        )


def _load_all_columns(source: str, paths: list[str], names: list[str], cache_dir: str | None) -> Dataset:
    """All columns, of types that hold every value: for files that fit into memory, as those of labelled texts do."""
    parts = []
    for path, name in zip(paths, names, strict=True):
        try:
            if _extension(name) == ".parquet":  # which says itself what types and classes it has
                parts.append(_load_parquet(path, name, cache_dir))
            else:
                parts.append(list(read_rows(path, name)))
        except Exception as error:
            if not is_damage(error.__cause__ or error):
                raise
            raise ValueError(f"{source}: {name} cannot be read: {error.__cause__ or error}.") from error
        if isinstance(parts[-1], list) and DAMAGED in parts[-1]:
            raise ValueError(
                f"{source}: row {parts[-1].index(DAMAGED) + 1} of {name} cannot be read: it is not a JSON object, or "
                "has more fields than the first line names, or a quote in it is not closed."
            )
    if not isinstance(parts[0], list):
        try:
            return concatenate_datasets(parts)
        except ValueError as error:
            raise ValueError(f"{source}: the files do not have columns of the same types: {error}") from error
    rows = [row for part in parts for row in part]
    columns = dict.fromkeys(column for row in rows for column in row)
    try:
        return Dataset.from_dict({column: _column([row.get(column) for row in rows]) for column in columns})
    except UnicodeEncodeError as error:
        at = next(n for n, row in enumerate(rows, 1) if any(find_fault(v) == INVALID_UNICODE for v in row.values()))
        raise ValueError(f"{source}: row {at} is not valid unicode. {ADVICE[INVALID_UNICODE]}") from error


def _load_parquet(path: str, name: str, cache_dir: str | None) -> Dataset:
    if name.lower().endswith(".parquet"):
        return Dataset.from_parquet(glob.escape(path), cache_dir=cache_dir)
    with _open(path, name, None) as file:  # compressed once more, which datasets does not expect
        return Dataset(InMemoryTable(parquet.read_table(io.BytesIO(file.read()))))


def _column(values: list) -> pyarrow.Array:
    """Values of one type as they are; where types are mixed, all as text, in lists what is in them."""

    def as_text(value: Any) -> str | None:
        return value if value is None or isinstance(value, str) else json.dumps(value)

    try:
        return pyarrow.array(values)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, OverflowError):
        if all(value is None or isinstance(value, list) for value in values):
            return pyarrow.array([value and [as_text(one) for one in value] for value in values])
        return pyarrow.array(map(as_text, values))


# ---- rows ----


def read_documents(
    paths: list[str], names: list[str], text_column_name: str, token: str | bool | None = None
) -> Iterator[dict]:
    """Reads the documents of files one by one, past those that are damaged.

    A line that is not JSON is one unreadable document. Where a whole file cannot be read further (a truncated gzip
    file, a parquet file without its footer), what came before is used and the rest counts as one unreadable document;
    the log names the file.

    Args:
        paths (`list[str]`): Files or URLs, as they are or compressed.
        names (`list[str]`): What the files are called: tells format and compression, and stands in messages.
        text_column_name (`str`): The column that holds the text.
        token (`str` or `bool`, *optional*): The access token for the Hub.

    Yields:
        `dict`: The text, or `None` where there is none to use; and why, as an index into `DROP_REASONS`, or `KEPT`.

    Raises:
        OSError: If a file cannot be reached.
    """
    for path, name in zip(paths, names, strict=True):
        try:
            for row in read_rows(path, name, [text_column_name], token):
                text = DAMAGED if row is DAMAGED else row.get(text_column_name)
                fault = find_fault(text)
                is_usable = fault is None
                yield {text_column_name: text if is_usable else None, FAULT_COLUMN: KEPT if is_usable else fault}
        except Exception as error:
            if not is_damage(error):
                raise
            logger.warning(f"{name} is damaged, and what follows in it is left out: {error or type(error).__name__}")
            yield {text_column_name: None, FAULT_COLUMN: UNREADABLE}


def is_damage(error: BaseException) -> bool:
    """
    Whether the bytes of a file cannot be decoded. Otherwise they could not be read, and may be at the next try: the
    errors of the operating system have a number, those of bz2 and pyarrow are an `OSError` without one.
    """
    return isinstance(error, DECODING_ERRORS) or (type(error) is OSError and error.errno is None)


def read_rows(
    path: str, name: str, columns: list[str] | None = None, token: str | bool | None = None
) -> Iterator[dict | Any]:
    """The rows of one file, as mappings of column to value, or `DAMAGED`. Every value of a csv file is text."""
    extension = _extension(name)
    with _open(path, name, token) as file:
        if extension == ".parquet":
            yield from _read_parquet(file, columns)
            return
        encoding = find_encoding(file.peek(NUM_SAMPLED_BYTES))
        # bytes that are not UTF-8 become lone surrogates, which find_fault knows
        errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
        newline = "" if FILE_FORMATS[extension] == "csv" else "\n"
        lines = io.TextIOWrapper(file, encoding=encoding, errors=errors, newline=newline)
        if extension == ".txt":
            column = columns[0] if columns else "text"
            yield from ({column: line.rstrip("\r\n")} for line in lines)
        elif extension == ".csv":
            csv.field_size_limit(2**31 - 1)
            yield from _read_table(_split_csv(lines), name, columns)
        elif extension == ".tsv":
            yield from _read_table(_split_tsv(lines), name, columns)
        else:
            yield from _read_json(lines, name, is_one_value=extension == ".json")


def find_encoding(sample: bytes) -> str:
    """UTF-8, unless a byte-order mark says otherwise or every other byte is zero, as in UTF-16 of Latin script."""
    if sample.startswith((b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff")):
        return "utf-32"
    if sample.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    half = max(1, len(sample) // 2)
    is_zero = [sample[start::2].count(0) / half for start in (0, 1)]
    if max(is_zero) > 0.4 and min(is_zero) < 0.1:
        return "utf-16-le" if is_zero[1] > is_zero[0] else "utf-16-be"
    return "utf-8-sig"


def _open(path: str, name: str, token: str | bool | None) -> io.BufferedReader:
    # xopen tries again where a connection fails
    file = xopen(path, "rb", download_config=DownloadConfig(token=token)) if "://" in path else open(path, "rb")
    codec = CODECS.get(os.path.splitext(name)[1].lower())
    return io.BufferedReader(file if codec is None else codec(file))


def _read_parquet(file: BinaryIO, columns: list[str] | None) -> Iterator[dict]:
    content = parquet.ParquetFile(file if file.seekable() else io.BytesIO(file.read()))
    if columns is not None:
        columns = [column for column in columns if column in content.schema_arrow.names]
    for batch in content.iter_batches(columns=columns):
        yield from batch.to_pylist() if batch.num_columns else ({} for _ in range(batch.num_rows))


def _read_table(rows: Iterator[list[str] | Any], name: str, columns: list[str] | None) -> Iterator[dict | Any]:
    """
    Rows of fields, of which the first names the columns; an empty or missing field is `None`.

    Raises:
        ValueError: if a column that is wanted (`None`: any) is there twice, or the first row has a quote that is not
            closed, or other separators than the format.
    """
    header = next((row for row in rows if row is DAMAGED or any(row)), [])  # blank lines may come first
    if header is DAMAGED:
        raise ValueError(f"{name} begins with a quote that is not closed.")
    wanted = [column for column in header if column and (columns is None or column in columns)]
    if twice := [column for column in wanted if wanted.count(column) > 1]:
        raise ValueError(f"{name} has two columns {twice[0]!r}: give one of them another name, or take it out.")
    others = (";", "\t") if _extension(name) == ".csv" else (",", ";")
    found = next((mark for mark in others if len(header) == 1 and mark in header[0]), None)
    if found and header != columns:
        raise ValueError(
            f"{name} begins with {header[0]!r}, where {found!r} separates the columns: in a csv file commas do, in a "
            "tsv file tabs."
        )
    for fields in rows:
        if fields is DAMAGED or len(fields) > len(header):
            yield DAMAGED  # a comma in a text without quotes, of which only a part would be read
        elif any(fields) or len(fields) > 1:  # not a blank line
            yield {column: field or None for column, field in zip_longest(header, fields)}


def _split_csv(lines: Iterable[str]) -> Iterator[list[str] | Any]:
    """
    The fields of each row of a csv file. A quote that is not closed takes the rows behind it into its field, up to the
    next quote or to the end: then its own row is `DAMAGED`, and the others are read anew.
    """
    lines, again, held = iter(lines), deque(), []
    num_columns, num_anew, is_open = 0, 0, False

    def take() -> Iterator[str]:
        nonlocal is_open
        while (line := again.popleft() if again else next(lines, None)) is not None:
            held.append(line)
            yield line
        is_open = bool(held)  # for another line is only asked within a row

    rows = csv.reader(take())
    while (fields := next(rows, None)) is not None:
        num_columns = num_columns or len(fields)
        if is_open or _holds_rows(held, num_columns):
            fields, rest = DAMAGED, held[1:]
            if is_open and not any(line.count(",") >= num_columns - 1 for line in rest):
                rest = []  # a text that is cut off
            again.extendleft(reversed(rest))
            num_anew, is_open = num_anew + len(rest), False
            rows = csv.reader(take())
        held.clear()
        yield fields
        if num_anew > MAX_LINES_READ_ANEW:
            yield from (DAMAGED for _ in chain(again, lines))
            return


def _holds_rows(lines: list[str], num_columns: int) -> bool:
    """Whether what was read as one row is several: each has its commas, and the quotes are not those of one row."""
    if len(lines) < 2 or any(line.count(",") != num_columns - 1 for line in lines[:-1]):
        return False
    try:
        return len(list(csv.reader(lines, strict=True))) > 1
    except csv.Error:
        return True


def _split_tsv(lines: Iterable[str]) -> Iterator[list[str]]:
    """
    The fields of each row of a tsv file. A row is a line; it is several where a quoted field is over several lines and
    they have, together, just the tabs of the header. That no two rows have, so a lone quote is text, as in the files
    of shared tasks. Where there is one column, without tabs, each line is a row.
    """
    num_tabs, held = None, []  # the lines of a row whose last field is still open
    for line in lines:
        num_tabs = line.count("\t") if num_tabs is None and line.strip() else num_tabs
        content = line.rstrip("\r\n")
        if held and MIDDLE_OF_FIELD.fullmatch(content):
            held.append(line)
            continue
        if held and (end := END_OF_FIELD.match(content)):
            row = "".join([*held, content])
            if row.count("\t") <= num_tabs and OPEN_FIELD.search(content, end.end()):
                held.append(line)
                continue
            if row.count("\t") == num_tabs:
                held = []
                yield [_unquote(field) for field in row.split("\t")]
                continue
        yield from map(_split_line, held)
        held = [line] if num_tabs and OPEN_FIELD.search(content) else []
        if not held:
            yield _split_line(line)
    yield from map(_split_line, held)


def _split_line(line: str) -> list[str]:
    return [_unquote(field) for field in line.rstrip("\r\n").split("\t")]


def _unquote(field: str) -> str:
    """A field of a tsv file, without the quotes that some programs put around it when they double those inside."""
    inner = field[1:-1]
    is_quoted = field[:1] == field[-1:] == '"' and ('""' in inner or "\n" in inner)
    is_quoted = is_quoted and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if is_quoted else field


def _read_json(lines: io.TextIOWrapper, name: str, is_one_value: bool) -> Iterator[dict | Any]:
    """
    One value per line, or one list over many lines.

    Raises:
        ValueError: for one mapping of columns, each a mapping of row numbers, as pandas writes it.
    """
    first = next((line for line in lines if line.strip()), "")
    value = _parse_json(first)
    if value is DAMAGED and is_one_value:
        content = first + lines.read()
        value = _parse_json(content)
        lines = [] if value is not DAMAGED else content.split("\n")[1:]
    if isinstance(value, dict) and value and all(isinstance(of, dict) and "0" in of for of in value.values()):
        raise ValueError(f"{name} holds columns in place of rows: write it by to_json(..., orient='records').")
    if first:
        yield from _rows_of_json(value)
    for line in lines:
        if line.strip():
            yield from _rows_of_json(_parse_json(line))


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return DAMAGED


def _rows_of_json(value: Any) -> Iterator[dict | Any]:
    for row in value if isinstance(value, list) else [value]:
        yield row if isinstance(row, dict) else DAMAGED


# ---- names ----


def without_query(path_or_url: str) -> str:
    """A path as it is; a URL without what may be secret in it: user, password, query and fragment."""
    if "://" not in path_or_url:
        return path_or_url
    parts = urlsplit(path_or_url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _extension(path: str) -> str:
    stem, extension = os.path.splitext(without_query(path).lower())
    return os.path.splitext(stem)[1] if extension in CODECS else extension
