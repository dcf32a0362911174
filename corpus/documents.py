"""Where documents come from: the Hub, a folder, files, or the built-in corpus; and their splits."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset, load_from_disk
from transformers.hf_argparser import HfArg

from .faults import find_fault
from .files import load_files
from .quickstart import load_quickstart_documents


QUICKSTART = "quickstart"  # the --dataset_name of the docstrings that are installed with this project
NUM_STREAMED_EVAL_DOCUMENTS = 1000
SPLIT_SEED = 0


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
    return hash_text(text) if find_fault(text) is None else None


def _is_not_in(example: dict, hashes: set[int], column: str) -> bool:
    return _hash_if_valid(example.get(column)) not in hashes


def hash_text(text: str) -> int:
    digest = hashlib.blake2b(text.strip().encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
