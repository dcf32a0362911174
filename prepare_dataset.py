"""Text -> tokens: the one place where documents are read, checked, tokenized, cut to length and counted.

As a script it writes a folder that pretraining loads in an instant, with its tokenizer beside it:

    python prepare_dataset.py configs/prepare_tinystories.yaml --max_length 256

Notable: no document disappears silently. Every row of the tokenized (and cached) data remembers why it was dropped and
how long its document was, so the statistics are the same whether the work was just done or came from the cache.
"""

import difflib
import glob
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
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
from transformers import AutoTokenizer, HfArgumentParser, PreTrainedTokenizerBase
from transformers.hf_argparser import HfArg

from tjepa.quickstart import load_quickstart_documents


QUICKSTART = "quickstart"  # the --dataset_name of the docstrings that are installed with this project
FILE_FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".txt": "text"}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
NUM_STREAMED_EVAL_DOCUMENTS = 1000
SPLIT_SEED = 0
PERCENTILES = (5, 25, 50, 75, 95, 100)

DROP_REASONS = (
    "null",
    "not a string",
    "empty or whitespace only",
    "invalid unicode",
    "shorter than min_tokens",
    "duplicate",
)
NULL, NOT_A_STRING, EMPTY, INVALID_UNICODE, TOO_SHORT, DUPLICATE = range(len(DROP_REASONS))
KEPT = -1

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
        "or compressed (.gz).",
    )
    validation_file: str | None = HfArg(default=None, help="The same for the validation split.")
    validation_split_percentage: float = HfArg(
        default=5,
        help="Percentage of the train documents, drawn at random with a fixed seed, that becomes the validation split "
        "where there is none. 0: no validation split. With --streaming the length is unknown: any other value takes "
        "the first --max_eval_samples documents of the stream, and training skips them.",
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
        `input_ids` already and is never streamed: it is memory-mapped anyway.

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
            name: load_files(f"{name}_file", pattern, args.streaming, cache_dir)
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


def load_files(argument: str, pattern: str, streaming: bool, cache_dir: str | None) -> Dataset | IterableDataset:
    """The rows of the files that match `pattern`; `argument` is what errors call the flag it came from."""
    paths = [pattern] if "://" in pattern else sorted(glob.glob(pattern, recursive=True))
    if not paths:
        raise FileNotFoundError(f"--{argument}: no file {pattern!r} (seen from {os.getcwd()}).")
    formats = {FILE_FORMATS.get(_extension(path)) for path in paths}
    if len(formats) > 1 or None in formats:
        raise ValueError(
            f"--{argument} {pattern!r} has the extension(s) {sorted({_extension(path) for path in paths})}; it must "
            f"be one of {', '.join(FILE_FORMATS)}, as it is or compressed ({', '.join(COMPRESSIONS)}). "
            "A folder is given with --dataset_name."
        )
    if "://" not in pattern and not any(os.path.getsize(path) for path in paths):
        raise ValueError(f"--{argument}: {pattern!r} is empty; it must hold at least one document.")
    return load_dataset(
        formats.pop(), data_files={"train": paths}, split="train", streaming=streaming, cache_dir=cache_dir
    )


def _extension(path: str) -> str:
    stem, extension = os.path.splitext(path.lower())
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
        train, validation = train.skip(num_validation), train
    if args.max_train_samples is not None:
        train = train.take(args.max_train_samples)
    if validation is None:
        return IterableDatasetDict(train=train)
    return IterableDatasetDict(train=train, validation=validation.take(num_validation))


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
    texts: list, tokenizer: PreTrainedTokenizerBase, max_length: int, min_tokens: int, long_documents: str
) -> dict[str, list]:
    """Turns a batch of documents into rows of `ENCODED_FEATURES`."""
    faults = [find_fault(text) for text in texts]
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


def _encode(dataset: Dataset | IterableDataset, tokenizer, args: DataArguments, desc: str):
    columns = dataset.column_names or list(next(iter(dataset), {}))  # a stream may not know its columns beforehand
    if not columns or (isinstance(dataset, Dataset) and len(dataset) == 0):
        raise ValueError(f"The {desc} split has no documents.")
    if args.text_column_name not in columns:
        raise ValueError(
            f"The {desc} split has no column {args.text_column_name!r}; it has {sorted(columns)}. "
            "Pass --text_column_name with the one that holds the text."
        )
    parameters = {
        "batched": True,
        "batch_size": 256,  # documents; bounds the memory that book-length ones take
        "input_columns": [args.text_column_name],
        "remove_columns": [args.text_column_name],
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
    return dataset.select_columns(args.text_column_name).map(encode_batch, **parameters)


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
) -> tuple[Dataset | IterableDataset, DocumentCounts | None]:
    """Tokenizes documents without special tokens, drops those that cannot be used and cuts those that are too long.

    Args:
        dataset (`Dataset` or `IterableDataset`): The documents, in the column `args.text_column_name`.
        tokenizer (`PreTrainedTokenizerBase`): Any tokenizer of transformers.
        args (`DataArguments`): `max_length`, `min_tokens` and `long_documents`; workers and cache.
        desc (`str`): What the split is called in the progress bar and in errors.
        seen_hashes (`set[int]`, *optional*): If given, documents whose hash is in it are dropped as duplicates, and
            those that are kept are added; pass one set for several splits. Not for streams.

    Returns:
        `tuple`: The dataset, whose only column `input_ids` holds int32 token ids, and its `DocumentCounts`. For an
        `IterableDataset` the work is done while it is read and the counts are `None`.

    Raises:
        ValueError: If the text column is missing, there are no documents, or all of them were dropped.
    """
    encoded = _encode(dataset, tokenizer, args, desc)
    if isinstance(encoded, Dataset):
        return _keep(encoded, desc, seen_hashes)
    is_kept = encoded.filter(lambda drop_reason: drop_reason == KEPT, input_columns=["drop_reason"])
    return is_kept.select_columns("input_ids"), None


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
        record = {"arguments": asdict(args), "counts": {name: asdict(count) for name, count in counts.items()}}
        (folder / "preparation.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return counts


def main():
    (args,) = parse_arguments(PreparationArguments)
    for name, counts in prepare_dataset(args).items():
        print(f"\n{name}\n{counts}")
    print(f"\nWritten to {args.output_dir}; train on it with --dataset_name {args.output_dir}")


if __name__ == "__main__":
    main()
