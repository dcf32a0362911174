"""Text -> tokens: the one place where documents are read, checked, tokenized, cut to length and counted.

As a script it writes a folder that pretraining loads in an instant, with its tokenizer beside it:

    python prepare_dataset.py configs/prepare_tinystories.yaml --max_length 256

Notable: no document disappears silently. Every row of the tokenized (and cached) data remembers why it was dropped and
how long its document was, so the statistics are the same whether the work was just done or came from the cache. Files
that `datasets` refuses as a whole because a part of them is damaged are read once more, document by document.
"""

import csv
import difflib
import glob
import hashlib
import io
import json
import logging
import lzma
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import fsspec
import numpy as np
import torch
import yaml
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    IterableDatasetDict,
    List,
    Value,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from pyarrow import ArrowException, parquet
from transformers import AutoTokenizer, HfArgumentParser, PreTrainedTokenizerBase
from transformers.hf_argparser import HfArg

from tjepa.quickstart import load_quickstart_documents


logger = logging.getLogger(__name__)

QUICKSTART = "quickstart"  # the --dataset_name of the docstrings that are installed with this project
FILE_FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".txt": "text"}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
NUM_STREAMED_EVAL_DOCUMENTS = 1000
BATCH_SIZE = 256  # documents tokenized at once; bounds the memory that book-length ones take
SPLIT_SEED = 0
PERCENTILES = (5, 25, 50, 75, 95, 100)

DROP_REASONS = (
    "null",
    "not a string",
    "empty or whitespace only",
    "invalid unicode",
    "shorter than min_tokens",
    "duplicate",
    "unreadable",
)
NULL, NOT_A_STRING, EMPTY, INVALID_UNICODE, TOO_SHORT, DUPLICATE, UNREADABLE = range(len(DROP_REASONS))
KEPT = -1
DAMAGED = object()  # stands for a document that is in a file but cannot be read from it
FAULT_COLUMN = "fault_found_when_read"
DAMAGES = (ArrowException, csv.Error, EOFError, lzma.LZMAError, OSError, UnicodeError, ValueError, zlib.error)

# One row per piece of a document; a dropped document is one row without tokens.
ENCODED_FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "drop_reason": Value("int8"),  # index into DROP_REASONS, or KEPT
        "piece": Value("int32"),  # 0 for the first piece of each document
        "num_tokens": Value("int32"),  # of this piece
        "num_document_tokens": Value("int64"),  # of the whole document
        "text_hash": Value("int64"),
    }
)


# ---- arguments ----


@dataclass
class SourceArguments:
    """Where documents come from."""

    dataset_name: str | None = HfArg(
        default=None, help="A dataset on the Hub, or a local folder that prepare_dataset.py wrote."
    )
    dataset_config_name: str | None = HfArg(
        default=None, help="The configuration of the Hub dataset, where it has several."
    )
    train_file: str | None = HfArg(
        default=None,
        help="A local file, or a glob in quotes: parquet, json, jsonl, csv or txt (one document per line), as it is "
        "or compressed (.gz). Of a damaged file all that can be read is used, and what cannot is counted as "
        "unreadable; with --streaming it ends the run.",
    )
    validation_file: str | None = HfArg(default=None, help="The same for the validation split.")
    validation_split_percentage: float = HfArg(
        default=5,
        help="Percentage of the train documents, drawn at random with a fixed seed, that becomes the validation split "
        "where there is none. 0: no validation split. With --streaming the length is unknown: any other value takes "
        "the first --max_eval_samples documents of the stream, and training leaves these texts out wherever they are.",
    )
    streaming: bool = HfArg(default=False, help="Read the dataset while it is used, without downloading it first.")
    max_train_samples: int | None = HfArg(default=None, help="Read at most this many train documents. Default: all.")
    max_eval_samples: int | None = HfArg(
        default=None,
        help="Read at most this many validation documents. Default: all, "
        f"but {NUM_STREAMED_EVAL_DOCUMENTS} with --streaming.",
    )
    text_column_name: str = HfArg(default="text", help="The column that holds the text.")

    def __post_init__(self):
        if not 0 <= self.validation_split_percentage < 100:
            raise ValueError(
                f"validation_split_percentage is {self.validation_split_percentage}; it must be at least 0, and less "
                "than 100 so that documents to train on remain."
            )
        for name in ("max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(
                    f"{name} is {value}; it counts documents and must be at least 1, or left out for all."
                )


@dataclass
class DataArguments(SourceArguments):
    """Where documents come from and how they become token sequences."""

    max_length: int = HfArg(default=1024, help="Tokens a sequence may have at most.")
    long_documents: Literal["truncate", "split"] = HfArg(
        default="truncate",
        help="What happens beyond --max_length tokens: 'truncate' leaves the rest out, 'split' makes it "
        "further sequences.",
    )
    min_tokens: int = HfArg(
        default=2,
        help="Documents of fewer tokens are dropped, and the last piece of a split document likewise. At least 2: "
        "one token to see and one to predict.",
    )
    preprocessing_num_workers: int | None = HfArg(
        default=None, help="Processes that tokenize. Default: one, with the tokenizer's own threads."
    )
    overwrite_cache: bool = HfArg(default=False, help="Tokenize again even if the result is in the cache of datasets.")

    def __post_init__(self):
        super().__post_init__()
        if self.long_documents not in ("truncate", "split"):
            raise ValueError(f"long_documents is {self.long_documents!r}; allowed are 'truncate' and 'split'.")
        if not 2 <= self.min_tokens <= self.max_length:
            raise ValueError(
                f"min_tokens is {self.min_tokens} and max_length is {self.max_length}; min_tokens must be at least 2 "
                "(one token to see, one to predict) and not more than max_length."
            )


@dataclass(kw_only=True)
class PreparationArguments(DataArguments):
    """The arguments of `prepare_dataset.py`."""

    output_dir: str = HfArg(help="The folder to write: train, validation and the tokenizer.")
    tokenizer_name: str = HfArg(help="A tokenizer on the Hub or in a local folder.")
    min_tokens: int = HfArg(
        default=64, help="Documents of fewer tokens are dropped, and the last piece of a split document likewise."
    )
    deduplicate: bool = HfArg(
        default=False,
        help="Drop documents whose text, apart from whitespace around it, came before; validation documents also "
        "where it is in train.",
    )
    overwrite_output_dir: bool = HfArg(default=False, help="Replace the prepared dataset that is in --output_dir.")

    def __post_init__(self):
        super().__post_init__()
        if self.streaming and self.max_train_samples is None:
            raise ValueError(
                "--streaming prepares part of a dataset that is too large to download: "
                "pass --max_train_samples, the number of documents to read."
            )


def parse_arguments(dataclass_types: Any, arguments: list[str] | None = None) -> tuple:
    """Parses the command line, `[file.yaml] [--name value ...]`; what is on the command line wins over the file.

    A line `name: value` of the file means what `--name value` means, with the same conversions and errors.

    Args:
        dataclass_types (`type` or `list[type]`): The dataclasses to fill.
        arguments (`list[str]`, *optional*): What to parse, `sys.argv[1:]` by default.

    Returns:
        `tuple`: One instance per dataclass, in their order.

    Raises:
        ValueError: If the file is not a list of `name: value` lines, or has a name that is no argument.
    """
    parser = HfArgumentParser(dataclass_types)
    flags = list(sys.argv[1:] if arguments is None else arguments)
    if not flags or not flags[0].endswith((".yaml", ".yml")):
        return parser.parse_args_into_dataclasses(flags)

    path = flags.pop(0)
    values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"{path} must consist of lines `name: value`, but holds {type(values).__name__}.")
    allowed = [field.name for dataclass_type in parser.dataclass_types for field in fields(dataclass_type)]
    for name in values:
        if name not in allowed:
            close = difflib.get_close_matches(str(name), allowed, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{path} has the unknown key {name!r}.{hint} Allowed are: {', '.join(sorted(allowed))}.")
    # Lists, mappings and null cannot be written as one flag; as defaults they also give way to the command line.
    scalars = {name: value for name, value in values.items() if isinstance(value, (str, int, float))}
    parser.set_defaults(**{name: value for name, value in values.items() if name not in scalars})
    return parser.parse_args_into_dataclasses([f"--{name}={value}" for name, value in scalars.items()] + flags)


# ---- documents ----


def load_documents(
    args: SourceArguments, cache_dir: str | None = None, token: str | bool | None = None
) -> DatasetDict | IterableDatasetDict:
    """Loads the splits `train` and, unless there is none and none was asked for, `validation`.

    Args:
        args (`SourceArguments`): The source: `dataset_name` or `train_file`, and how much of it to read.
        cache_dir (`str`, *optional*): Where `datasets` keeps its cache.
        token (`str` or `bool`, *optional*): The access token for the Hub.

    Returns:
        `DatasetDict` or, with `args.streaming`, `IterableDatasetDict`. A folder written by this script has the column
        `input_ids` already and is never streamed: it is memory-mapped anyway. Local files with damaged parts, unless
        they are streamed, come with the text column only and, in another column, why a text is missing.

    Raises:
        ValueError: If not exactly one source was given, a file has an unknown extension or is empty, or there is no
            train split.
        FileNotFoundError: If a file does not exist.
    """
    if (args.dataset_name is None) == (args.train_file is None):
        raise ValueError(
            f"Pass either --dataset_name (given: {args.dataset_name}) or --train_file (given: {args.train_file})."
        )
    if args.train_file is not None:
        files = {"train": args.train_file, "validation": args.validation_file}
        splits = {
            name: load_files(f"{name}_file", pattern, args.streaming, cache_dir, args.text_column_name)
            for name, pattern in files.items()
            if pattern is not None
        }
    elif args.dataset_name == QUICKSTART:
        splits = load_quickstart_documents(cache_dir)
    elif (Path(args.dataset_name) / "dataset_dict.json").is_file():
        splits = load_from_disk(args.dataset_name)
    else:
        splits = load_dataset(
            args.dataset_name, args.dataset_config_name, streaming=args.streaming, cache_dir=cache_dir, token=token
        )
    if "train" not in splits:
        raise ValueError(f"{args.dataset_name} has no split 'train', only {sorted(splits)}.")

    if isinstance(splits["train"], IterableDataset):
        return _limit_streams(splits, args)
    return limit_datasets(splits, args)


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


def limit_datasets(splits: dict[str, Dataset], args: SourceArguments) -> DatasetDict:
    """`train` and `validation`, drawn from `train` where there is none, both cut to their maximum."""
    train, validation = splits["train"], splits.get("validation")
    if validation is None and args.validation_split_percentage > 0 and len(train) > 1:
        num_validation = min(len(train) - 1, max(1, round(len(train) * args.validation_split_percentage / 100)))
        parts = train.train_test_split(test_size=num_validation, seed=SPLIT_SEED)
        train, validation = parts["train"], parts["test"]
    limited = DatasetDict(train=train) if validation is None else DatasetDict(train=train, validation=validation)
    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples}
    for name, dataset in limited.items():
        if limits[name] is not None and limits[name] < len(dataset):
            limited[name] = dataset.select(range(limits[name]))
    return limited


def _limit_streams(splits: dict[str, IterableDataset], args: SourceArguments) -> IterableDatasetDict:
    train, validation = splits["train"], splits.get("validation")
    num_validation = args.max_eval_samples or NUM_STREAMED_EVAL_DOCUMENTS
    if validation is None and args.validation_split_percentage > 0:
        validation = train
        held_out = [_hash_if_valid(example.get(args.text_column_name)) for example in train.take(num_validation)]
        if len(held_out) < num_validation:
            raise ValueError(
                f"The stream has only {len(held_out)} documents, and all of them would become the validation split: "
                "pass --validation_file, a --max_eval_samples below that, or --validation_split_percentage 0."
            )
        # not train.skip, which skips other documents as soon as the stream is split between processes or workers
        train = train.filter(_is_not_in, fn_kwargs={"hashes": {*held_out} - {None}, "column": args.text_column_name})
    if args.max_train_samples is not None:
        train = train.take(args.max_train_samples)
    if validation is None:
        return IterableDatasetDict(train=train)
    return IterableDatasetDict(train=train, validation=validation.take(num_validation))


def _hash_if_valid(text: Any) -> int | None:
    return _hash_text(text) if find_fault(text) is None else None


def _is_not_in(example: dict, hashes: set[int], column: str) -> bool:
    return _hash_if_valid(example.get(column)) not in hashes


# ---- tokens ----


@dataclass
class DocumentCounts:
    """What became of the documents of one split. Tokens and lengths are those of the rows that were kept."""

    num_documents: int
    num_kept: int
    dropped: dict[str, int]  # reason -> documents, without the reasons that did not occur
    num_truncated: int  # documents whose end is in no row
    num_split: int  # documents that became several rows
    num_rows: int
    num_tokens: int
    num_tokens_cut: int  # tokens of kept documents that are in no row
    length_percentiles: dict[str, int]  # tokens per row; "5%", ..., "95%", "max"

    def to_dict(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        lines = [("documents read", self.num_documents), ("kept", self.num_kept)]
        lines += [("dropped", sum(self.dropped.values()))]
        lines += [(f"  {reason}", count) for reason, count in self.dropped.items()]
        lines += [("truncated", self.num_truncated), ("split into several rows", self.num_split)]
        lines += [("rows", self.num_rows), ("tokens", self.num_tokens), ("tokens cut off", self.num_tokens_cut)]
        text = "\n".join(f"  {name:<30}{count:>15,}" for name, count in lines)
        percentiles = "   ".join(f"{name} {length:,}" for name, length in self.length_percentiles.items())
        return f"{text}\n  tokens per row: {percentiles or 'no rows'}"


def find_fault(text: Any) -> int | None:
    """The reason (an index into `DROP_REASONS`) why `text` cannot be tokenized, or `None` if it can."""
    if text is DAMAGED:
        return UNREADABLE
    if text is None:
        return NULL
    if not isinstance(text, str):
        return NOT_A_STRING
    if not text.strip():
        return EMPTY
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, on which tokenizers would raise
        return INVALID_UNICODE
    return None


def encode_batch(
    texts: list,
    known_faults: list[int] | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    min_tokens: int,
    long_documents: str,
) -> dict[str, list]:
    """Turns a batch of documents into rows of `ENCODED_FEATURES`. `known_faults` are those of `read_damaged_files`."""
    faults = [find_fault(text) for text in texts]
    if known_faults is not None:
        faults = [fault if known == KEPT else known for fault, known in zip(faults, known_faults, strict=True)]
    valid_texts = [text for text, fault in zip(texts, faults, strict=True) if fault is None]
    # verbose=False: that a document is longer than the tokenizer's model_max_length is no news here.
    encoding = tokenizer(valid_texts, add_special_tokens=False, verbose=False) if valid_texts else {"input_ids": []}
    token_lists = iter(encoding["input_ids"])

    rows = []
    for text, fault in zip(texts, faults, strict=True):
        token_ids, text_hash = [], 0
        if fault is None:
            token_ids, text_hash = next(token_lists), _hash_text(text)
            fault = TOO_SHORT if len(token_ids) < min_tokens else None
        pieces = [[]]
        if fault is None:
            starts = range(0, len(token_ids), max_length) if long_documents == "split" else (0,)
            pieces = [token_ids[start : start + max_length] for start in starts]
            pieces = [piece for piece in pieces if len(piece) >= min_tokens]
        drop_reason = KEPT if fault is None else fault
        for index, piece in enumerate(pieces):
            rows.append((piece, drop_reason, index, len(piece), len(token_ids), text_hash))
    return dict(zip(ENCODED_FEATURES, map(list, zip(*rows, strict=True)), strict=True))


def _hash_text(text: str) -> int:
    digest = hashlib.blake2b(text.strip().encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def check_columns(dataset: Dataset | IterableDataset, text_column_name: str, desc: str) -> None:
    """Raises a `ValueError` if there are no documents, or none in the column `text_column_name`."""
    columns = dataset.column_names or list(next(iter(dataset), {}))  # a stream may not know its columns beforehand
    if not columns or (isinstance(dataset, Dataset) and len(dataset) == 0):
        raise ValueError(f"The {desc} split has no documents.")
    if text_column_name not in columns:
        raise ValueError(
            f"The {desc} split has no column {text_column_name!r}; it has {sorted(columns)}. "
            "Pass --text_column_name with the one that holds the text."
        )


def _encode(dataset: Dataset | IterableDataset, tokenizer, args: DataArguments, desc: str):
    check_columns(dataset, args.text_column_name, desc)
    inputs = [args.text_column_name] + ([FAULT_COLUMN] if FAULT_COLUMN in (dataset.column_names or []) else [])
    parameters = {
        "batched": True,
        "batch_size": BATCH_SIZE,
        "input_columns": inputs,
        "remove_columns": inputs,
        "features": ENCODED_FEATURES,
        "fn_kwargs": {
            "tokenizer": tokenizer,
            "max_length": args.max_length,
            "min_tokens": args.min_tokens,
            "long_documents": args.long_documents,
        },
    }
    if isinstance(dataset, Dataset):
        parameters["num_proc"] = args.preprocessing_num_workers
        parameters["load_from_cache_file"] = not args.overwrite_cache
        parameters["desc"] = f"Tokenizing {desc}"
    return dataset.select_columns(inputs).map(encode_batch, **parameters)


def _keep(encoded: Dataset, desc: str, seen_hashes: set[int] | None = None) -> tuple[Dataset, DocumentCounts]:
    columns = encoded.select_columns([name for name in ENCODED_FEATURES if name != "input_ids"])
    row = columns.with_format("numpy")[:]
    is_first = row["piece"] == 0
    document_of_row = np.cumsum(is_first) - 1
    drop_reason = row["drop_reason"][is_first]  # per document, like all that follows
    num_document_tokens = row["num_document_tokens"][is_first]
    num_tokens_in_rows = np.bincount(document_of_row, weights=row["num_tokens"]).astype(np.int64)
    if seen_hashes is not None:
        text_hashes = row["text_hash"][is_first]
        for document in np.flatnonzero(drop_reason == KEPT):
            text_hash = int(text_hashes[document])
            if text_hash in seen_hashes:
                drop_reason[document] = DUPLICATE
            seen_hashes.add(text_hash)

    is_kept = drop_reason == KEPT
    num_cut = np.where(is_kept, num_document_tokens - num_tokens_in_rows, 0)
    is_kept_row = is_kept[document_of_row]
    lengths = row["num_tokens"][is_kept_row]
    percentiles = np.percentile(lengths, PERCENTILES, method="lower") if len(lengths) else []
    names = [f"{percentile}%" if percentile < 100 else "max" for percentile in PERCENTILES]
    num_dropped = {reason: int((drop_reason == index).sum()) for index, reason in enumerate(DROP_REASONS)}
    counts = DocumentCounts(
        num_documents=len(drop_reason),
        num_kept=int(is_kept.sum()),
        dropped={reason: count for reason, count in num_dropped.items() if count},
        num_truncated=int((num_cut > 0).sum()),
        num_split=int((is_kept & (np.bincount(document_of_row) > 1)).sum()),
        num_rows=len(lengths),
        num_tokens=int(num_tokens_in_rows[is_kept].sum()),
        num_tokens_cut=int(num_cut.sum()),
        length_percentiles={name: int(length) for name, length in zip(names, percentiles, strict=False)},
    )
    if not counts.num_kept:
        raise ValueError(f"Every document of the {desc} split was dropped:\n{counts}")
    tokenized = encoded.select_columns("input_ids")
    return (tokenized if is_kept_row.all() else tokenized.select(np.flatnonzero(is_kept_row))), counts


def tokenize_documents(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    args: DataArguments,
    desc: str,
    seen_hashes: set[int] | None = None,
) -> tuple[Dataset, DocumentCounts]:
    """Tokenizes documents without special tokens, drops those that cannot be used and cuts those that are too long.

    Args:
        dataset (`Dataset` or `IterableDataset`): The documents, in the column `args.text_column_name`.
        tokenizer (`PreTrainedTokenizerBase`): Any tokenizer of transformers.
        args (`DataArguments`): `max_length`, `min_tokens` and `long_documents`; workers and cache.
        desc (`str`): What the split is called in the progress bar and in errors.
        seen_hashes (`set[int]`, *optional*): If given, documents whose hash is in it are dropped as duplicates, and
            those that are kept are added; pass one set for several splits.

    Returns:
        `tuple`: The dataset, whose only column `input_ids` holds int32 token ids, and its `DocumentCounts`. An
        `IterableDataset` is read into memory: for a stream that does not end soon there is `StreamTokenizer`.

    Raises:
        ValueError: If the text column is missing, there are no documents, or all of them were dropped.
    """
    encoded = _encode(dataset, tokenizer, args, desc)
    if isinstance(encoded, IterableDataset):
        encoded = Dataset.from_list(list(encoded), features=ENCODED_FEATURES)
    return _keep(encoded, desc, seen_hashes)


class StreamTokenizer:
    """
    `tokenize_documents` for a stream that is read in shares, by several workers: the same rows, and the same counts,
    without holding any of them. The counts are in shared memory (each worker has a line of its own there), so that the
    main process knows them at any time. A document counts when it is read, in every epoch, and again after a resume.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Any tokenizer of transformers.
        args (`DataArguments`): `text_column_name`, `max_length`, `min_tokens` and `long_documents`.
    """

    NUM_WORKERS = 64
    NAMES = ("num_documents", "num_truncated", "num_split", "num_tokens_cut", *DROP_REASONS)

    def __init__(self, tokenizer: PreTrainedTokenizerBase, args: DataArguments):
        self.tokenizer = tokenizer
        self.args = args
        # counts by name, then rows by their number of tokens
        num_counts = len(self.NAMES) + args.max_length + 1
        self._counts = torch.zeros((self.NUM_WORKERS, num_counts), dtype=torch.int64).share_memory_()

    def __call__(self, dataset: IterableDataset) -> IterableDataset:
        """The rows of a stream of documents, in the column `input_ids`."""
        name = self.args.text_column_name
        return dataset.select_columns(name).map(
            self._encode_and_count, batched=True, batch_size=BATCH_SIZE, input_columns=[name], remove_columns=[name]
        )

    def _encode_and_count(self, texts: list) -> dict[str, list]:
        rows = encode_batch(
            texts,
            tokenizer=self.tokenizer,
            max_length=self.args.max_length,
            min_tokens=self.args.min_tokens,
            long_documents=self.args.long_documents,
        )
        drop_reason, num_tokens = np.array(rows["drop_reason"]), np.array(rows["num_tokens"])
        is_first = np.array(rows["piece"]) == 0
        document = np.cumsum(is_first) - 1
        num_cut = np.array(rows["num_document_tokens"])[is_first] - np.bincount(document, weights=num_tokens)
        num_cut[drop_reason[is_first] != KEPT] = 0
        by_name = {
            "num_documents": len(texts),
            "num_truncated": (num_cut > 0).sum(),
            "num_split": (np.bincount(document) > 1).sum(),
            "num_tokens_cut": num_cut.sum(),
            **{reason: (drop_reason == index).sum() for index, reason in enumerate(DROP_REASONS)},
        }
        by_length = np.bincount(num_tokens[drop_reason == KEPT], minlength=self.args.max_length + 1)
        worker = torch.utils.data.get_worker_info()
        line = self._counts[0 if worker is None else worker.id % self.NUM_WORKERS]
        line += torch.tensor([*(by_name[name] for name in self.NAMES), *by_length], dtype=torch.int64)
        kept = zip(rows["input_ids"], rows["drop_reason"], strict=True)
        return {"input_ids": [input_ids for input_ids, reason in kept if reason == KEPT]}

    def counts(self, over_processes: Callable[[torch.Tensor], torch.Tensor] | None = None) -> DocumentCounts:
        """
        What became of the documents that were read so far.

        Args:
            over_processes (`Callable`, *optional*): sums an int64 tensor over processes, if there are several.
        """
        total = self._counts.sum(dim=0)
        total = (total if over_processes is None else over_processes(total)).cpu().numpy()
        by_name = dict(zip(self.NAMES, map(int, total), strict=False))
        by_length = total[len(self.NAMES) :]
        dropped = {reason: by_name[reason] for reason in DROP_REASONS if by_name[reason]}
        num_rows, num_up_to = int(by_length.sum()), np.cumsum(by_length)
        percentiles = {}
        for percentile in PERCENTILES if num_rows else ():
            rank = percentile * (num_rows - 1) // 100  # as np.percentile(method="lower")
            name = f"{percentile}%" if percentile < 100 else "max"
            percentiles[name] = int(np.searchsorted(num_up_to, rank, side="right"))
        return DocumentCounts(
            num_documents=by_name["num_documents"],
            num_kept=by_name["num_documents"] - sum(dropped.values()),
            dropped=dropped,
            num_truncated=by_name["num_truncated"],
            num_split=by_name["num_split"],
            num_rows=num_rows,
            num_tokens=int((by_length * np.arange(len(by_length))).sum()),
            num_tokens_cut=by_name["num_tokens_cut"],
            length_percentiles=percentiles,
        )


# ---- the prepared folder ----


@contextmanager
def _new_folder(output_dir: str, overwrite: bool) -> Iterator[Path]:
    """A temporary sibling of `output_dir` that takes its place only when everything in it has been written."""
    output = Path(output_dir).absolute()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        if not overwrite:
            raise FileExistsError(f"{output_dir} is not empty. Pass --overwrite_output_dir, or another --output_dir.")
        if not (output / "dataset_dict.json").is_file():
            raise FileExistsError(f"{output_dir} is no prepared dataset and is not overwritten; pass another folder.")
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f".{output.name}.unfinished-{os.getpid()}")
    unfinished.mkdir()
    try:
        yield unfinished
        if output.exists():
            shutil.rmtree(output)
        unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def prepare_dataset(args: PreparationArguments) -> dict[str, DocumentCounts]:
    """Writes `args.output_dir`: the tokenized splits, the tokenizer, and `preparation.json` with arguments and counts.

    Args:
        args (`PreparationArguments`): The source, the tokenizer, and what to keep.

    Returns:
        `dict[str, DocumentCounts]`: Split -> counts.

    Raises:
        FileExistsError: If `args.output_dir` is not empty and may not be overwritten.
        ValueError, FileNotFoundError: As `load_documents` and `tokenize_documents`.
    """
    with _new_folder(args.output_dir, args.overwrite_output_dir) as folder:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name)
        seen_hashes = set() if args.deduplicate else None
        splits, counts = DatasetDict(), {}
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}-") as stream_cache:
            for name, documents in load_documents(args).items():
                encoded = _encode(documents, tokenizer, args, name)
                if isinstance(encoded, IterableDataset):
                    encoded = Dataset.from_generator(
                        encoded.__iter__, features=ENCODED_FEATURES, cache_dir=stream_cache, fingerprint=name
                    )
                splits[name], counts[name] = _keep(encoded, name, seen_hashes)
            splits.save_to_disk(folder)
        tokenizer.save_pretrained(folder)
        arguments = {k: without_query(v) if isinstance(v, str) else v for k, v in asdict(args).items()}
        record = {"arguments": arguments, "counts": {name: count.to_dict() for name, count in counts.items()}}
        (folder / "preparation.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return counts


def main():
    (args,) = parse_arguments(PreparationArguments)
    for name, counts in prepare_dataset(args).items():
        print(f"\n{name}\n{counts}")
    print(f"\nWritten to {args.output_dir}; train on it with --dataset_name {args.output_dir}")


if __name__ == "__main__":
    main()
