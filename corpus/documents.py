"""Where documents come from: the Hub, a folder, files, or the built-in corpus; and their splits."""

import hashlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from datasets import (
    Dataset,
    DatasetBuilder,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.data_files import FILES_TO_IGNORE, EmptyDatasetError
from datasets.exceptions import DataFilesNotFoundError, DatasetGenerationError, DatasetNotFoundError
from datasets.packaged_modules.csv.csv import Csv
from datasets.packaged_modules.json.json import Json
from datasets.packaged_modules.parquet.parquet import Parquet
from datasets.packaged_modules.text.text import Text
from pyarrow import parquet
from transformers.hf_argparser import HfArg

from .command_line import CONFIGS, first_line
from .faults import KEPT, find_fault
from .files import EXTENSIONS, FAULT_COLUMN, can_be_read, find_paths, is_damage, load_files, load_paths, without_query
from .paths import check_exists, hint_at_nearest, list_names
from .preparation import settle_with_preparation
from .quickstart import load_quickstart_documents


logger = logging.getLogger(__name__)


SPLITS = ("train", "validation")
PIECE_COLUMN = "piece"  # of prepared rows: 0 for the first piece of each document
QUICKSTART = "quickstart"  # the --dataset_name of the docstrings that are installed with this project
NUM_STREAMED_EVAL_DOCUMENTS = 1000
SPLIT_SEED = 0
DEFAULTS = {"max_length": 1024, "long_documents": "truncate", "min_tokens": 2}
COUNTS = ("max_train_samples", "max_eval_samples", "max_predict_samples", "max_length", "preprocessing_num_workers")
OF_PREPARED = "A prepared folder keeps what it was prepared with."


@dataclass
class SourceArguments:
    """Where documents come from."""

    dataset_name: str | None = HfArg(
        default=None,
        help="A dataset on the Hub, or a local folder: of files or, to pretrain on, one that `tjepa prepare` wrote.",
    )
    dataset_config_name: str | None = HfArg(
        default=None, help="The configuration of the Hub dataset, where it has several."
    )
    train_file: str | None = HfArg(
        default=None,
        help="A local file, or a glob in quotes: parquet, json, jsonl, csv, tsv or txt (one document per line), as it "
        "is or compressed (.gz, .bz2, .xz, .zst). What can be read of a damaged file is used, and the rest is counted "
        "as unreadable.",
    )
    validation_file: str | None = HfArg(default=None, help="The same for the validation split.")
    train_split_name: str | None = HfArg(default=None, help="The split of --dataset_name to train on. Default: train.")
    validation_split_name: str | None = HfArg(
        default=None, help="The split of --dataset_name to evaluate on. Default: validation, where there is one."
    )
    validation_split_percentage: float = HfArg(
        default=5,
        help="Percentage of the train documents, drawn at random with a fixed seed, that becomes the validation split "
        "where there is none. 0: no validation split. With --streaming the length is unknown: any other value takes "
        "the first --max_eval_samples documents of the stream, and training leaves these texts out wherever they are.",
    )
    streaming: bool = HfArg(default=False, help="Read the dataset while it is used, without downloading it first.")
    max_train_samples: int | None = HfArg(
        default=None,
        help="Use at most this many train documents, drawn with a fixed seed; with --streaming the first ones. "
        "Default: all.",
    )
    max_eval_samples: int | None = HfArg(
        default=None,
        help="The same for the validation documents. Default: all, "
        f"but {NUM_STREAMED_EVAL_DOCUMENTS} with --streaming.",
    )
    text_column_name: str = HfArg(default="text", help="The column that holds the text.")

    def __post_init__(self):
        if not 0 <= self.validation_split_percentage < 100:
            raise ValueError(
                f"validation_split_percentage is {self.validation_split_percentage}; it must be at least 0, and less "
                "than 100 so that documents to train on remain."
            )
        if self.dataset_name is not None or self.train_file is not None:
            self.check_source()
        for name in COUNTS:
            value = getattr(self, name, None)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1, or left out.")

    def check_source(self) -> None:
        """Raises a `ValueError` if not exactly one source was given, or a flag that goes with the other one."""
        if (self.dataset_name is None) == (self.train_file is None):
            raise ValueError(
                f"Pass either --dataset_name (given: {self.dataset_name}) or --train_file (given: {self.train_file})."
            )
        names = [field.name for field in fields(self)]
        of_files = [name for name in names if name.endswith("_file")]
        of_names = ["dataset_config_name", *(name for name in names if name.endswith("_split_name"))]
        source, others = ("train_file", of_names) if self.dataset_name is None else ("dataset_name", of_files)
        if misplaced := [f"--{name}" for name in others if getattr(self, name) is not None]:
            raise ValueError(f"{', '.join(misplaced)}: not used with --{source}; leave it out.")
        for name in [name for name in of_names[1:] if name != "train_split_name"]:
            if self.train_split_name is not None and getattr(self, name) == self.train_split_name:
                raise ValueError(
                    f"--train_split_name and --{name} are both {self.train_split_name!r}, so that what is trained on "
                    f"would be judged by itself: name another split, or leave --{name} out."
                )

    @property
    def is_streamed(self) -> bool:
        """Whether `streaming` means anything for this source."""
        name = self.dataset_name
        return self.streaming and (name is None or (name != QUICKSTART and not is_saved(name)))

    @property
    def validation_flags(self) -> str:
        """What gives a validation split where there is none, for messages."""
        own = "--validation_split_name" if self.train_file is None else "--validation_file"
        if self.validation_split_percentage > 0:
            return f"{own} (of a single document --validation_split_percentage makes none)"
        return f"{own}, or a --validation_split_percentage above 0"


@dataclass
class DataArguments(SourceArguments):
    """Where documents come from and how they become token sequences."""

    max_length: int | None = HfArg(
        default=None, help=f"Tokens a sequence may have at most. Default: {DEFAULTS['max_length']}. {OF_PREPARED}"
    )
    long_documents: Literal["truncate", "split"] | None = HfArg(
        default=None,
        help="What happens beyond --max_length tokens: 'truncate' leaves the rest out, 'split' makes it "
        f"further sequences. Default: {DEFAULTS['long_documents']}. {OF_PREPARED}",
    )
    min_tokens: int | None = HfArg(
        default=None,
        help="Documents of fewer tokens are dropped, and the last piece of a split document likewise. At least 2: "
        f"one token to see and one to predict. Default: {DEFAULTS['min_tokens']}. {OF_PREPARED}",
    )
    preprocessing_num_workers: int | None = HfArg(
        default=None, help="Processes that tokenize. Default: one, with the tokenizer's own threads."
    )
    overwrite_cache: bool = HfArg(default=False, help="Tokenize again even if the result is in the cache of datasets.")

    def __post_init__(self):
        super().__post_init__()
        given = {name: getattr(self, name) for name in DEFAULTS}
        column = {} if self.text_column_name == "text" else {"text_column_name": self.text_column_name}
        for name, value in settle_with_preparation(self.dataset_name, {**given, **column}, DEFAULTS).items():
            setattr(self, name, value)
        if self.long_documents not in ("truncate", "split"):
            raise ValueError(f"long_documents is {self.long_documents!r}; allowed are 'truncate' and 'split'.")
        if not 2 <= self.min_tokens <= self.max_length:
            raise ValueError(
                f"min_tokens is {self.min_tokens} and max_length is {self.max_length}; min_tokens must be at least 2 "
                "(one token to see, one to predict) and not more than max_length."
            )


def record_source(args: SourceArguments) -> dict[str, Any]:
    """What `SourceArguments` must be given to read the same documents again, from any folder of this machine."""
    record = {field.name: getattr(args, field.name) for field in fields(SourceArguments)}
    record = {name: value for name, value in record.items() if value is not None}
    for name in ("dataset_name", "train_file", "validation_file"):
        path = record.get(name)
        if path is not None and "://" in path:
            record[name] = without_query(path)  # which may hold a key
        elif path not in (None, QUICKSTART) and (name != "dataset_name" or Path(path).exists()):
            record[name] = os.path.abspath(path)
    return record


def load_documents(
    args: SourceArguments, cache_dir: str | None = None, token: str | bool | None = None
) -> DatasetDict | IterableDatasetDict:
    """Loads the splits `train` and, unless there is none and none was asked for, `validation`.

    Args:
        args (`SourceArguments`): The source: `dataset_name` or `train_file`, and how much of it to read.
        cache_dir (`str`, *optional*): Where `datasets` keeps its cache.
        token (`str` or `bool`, *optional*): The access token for the Hub.

    Returns:
        `DatasetDict` or, with `args.streaming`, `IterableDatasetDict`. A folder written by `prepare_dataset` has the
        column `input_ids` already and is never streamed: it is memory-mapped anyway. Files of text come with the text
        column only and, in `FAULT_COLUMN`, why a text is missing.

    Raises:
        ValueError: If not exactly one source was given, a file has an unknown extension or is empty, or there is no
            such split or column.
        FileNotFoundError: If a file or folder does not exist.
    """
    args.check_source()
    if args.dataset_name == QUICKSTART:
        splits = load_quickstart_documents(cache_dir)
    else:
        splits = load_splits(args, SPLITS, cache_dir, token, args.text_column_name, args.streaming)
    if isinstance(splits["train"], IterableDataset):
        return _limit_streams(splits, args)
    return limit_datasets(splits, args)


def load_splits(
    args: Any,
    splits: tuple[str, ...],
    cache_dir: str | None = None,
    token: str | bool | None = None,
    text_column_name: str | None = None,
    streaming: bool = False,
) -> dict[str, Dataset | IterableDataset]:
    """
    The splits of a source, as far as they exist, whole and as they are.

    Args:
        args: has `dataset_name`, `dataset_config_name`, and for each split `{split}_file` and `{split}_split_name`.
        splits (`tuple`): which ones, such as `("train", "validation")`.
        cache_dir, token, text_column_name, streaming: as for `load_paths`.

    Raises:
        ValueError: if a split that was asked for is not there; `train` must be.
        FileNotFoundError: if a file or folder does not exist.
    """
    if args.train_file is not None:
        given = {split: getattr(args, f"{split}_file") for split in splits}
        if args.validation_file is not None:
            check_files_are_apart(args.train_file, args.validation_file)
        return {
            split: load_files(f"--{split}_file", pattern, streaming, cache_dir, text_column_name)
            for split, pattern in given.items()
            if pattern is not None
        }
    found = _load_by_name(args, cache_dir, token, text_column_name, streaming)
    names = {split: getattr(args, f"{split}_split_name") or split for split in splits}
    for split in splits:  # where "validation" is trained on, there is no other of that name
        if split == names["train"] != "train" and getattr(args, f"{split}_split_name") is None:
            del names[split]
    for split, name in names.items():
        if name not in found and (split == "train" or name != split):
            raise ValueError(
                f"{args.dataset_name} has no split {name!r}, only {sorted(found)}. Name one with --{split}_split_name."
            )
    if unused := sorted(set(found) - set(names.values())):
        looks_like_validation = [name for name in unused if name.startswith(("val", "dev"))]
        if looks_like_validation and "validation" in splits:
            logger.warning(
                f"{args.dataset_name}: the split(s) {looks_like_validation} lie unused; --validation_split_name "
                "takes one of them as the validation split."
            )
        else:
            logger.info(f"{args.dataset_name}: the split(s) {unused} are not used")
    return {split: found[name] for split, name in names.items() if name in found}


def check_files_are_apart(train: str, validation: str) -> None:
    """Raises a `ValueError` if a file of the validation split is trained on, too; both are a path or a glob."""
    trained_on, judged_by = (set(map(os.path.realpath, find_paths(pattern))) for pattern in (train, validation))
    if shared := sorted(trained_on & judged_by):
        raise ValueError(
            f"--train_file and --validation_file both hold {list_names([*map(os.path.basename, shared)])}, so that "
            "what is trained on would be judged by itself: name other files, or leave --validation_file out."
        )


def _load_by_name(
    args: Any, cache_dir: str | None, token: str | bool | None, text_column_name: str | None, streaming: bool
) -> dict[str, Dataset | IterableDataset]:
    name, folder = args.dataset_name, Path(args.dataset_name)
    check_dataset_exists(name)
    if is_saved(folder):
        if args.dataset_config_name is not None:
            raise ValueError(
                f"--dataset_config_name {args.dataset_config_name}: {name} is a dataset as it was saved, which has "
                "no configurations; leave it out."
            )
        try:
            splits = load_from_disk(name)
        except IndexError as error:  # of datasets, for a split that has no file
            raise ValueError(
                f"--dataset_name {name}: one of its splits has no rows. Save it without that one."
            ) from error
        return {"train": splits} if isinstance(splits, Dataset) else splits
    try:
        builder = load_dataset_builder(name, args.dataset_config_name, cache_dir=cache_dir, token=token)
    except (DataFilesNotFoundError, EmptyDatasetError) as error:
        raise _no_file_to_read(name) from error
    except (DatasetNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"--dataset_name {name}: there is no such folder (seen from {os.getcwd()}), and no dataset of that name "
            f"could be loaded from the Hub ({first_line(error)}). "
            f"{hint_at_nearest(name)}".rstrip()
        ) from error
    except ValueError as error:  # of several configurations none is named, or another one
        flags = f"--dataset_name {name} --dataset_config_name {args.dataset_config_name}"
        raise ValueError(f"{flags}: {error}") from error
    if folder.is_dir() and args.dataset_config_name is None:
        _warn_of_files_left_out(name, builder)
    if _is_plain_text(builder, text_column_name is not None, folder.is_dir()):
        return {
            str(split): load_paths(name, list(paths), streaming, cache_dir, text_column_name, token)
            for split, paths in builder.config.data_files.items()
        }
    try:
        return load_dataset(name, args.dataset_config_name, streaming=streaming, cache_dir=cache_dir, token=token)
    except DataFilesNotFoundError as error:
        raise _no_file_to_read(name) from error
    except DatasetGenerationError as error:  # of columns or types that differ between files, or of a damaged file
        raise ValueError(f"--dataset_name {name} cannot be read: {first_line(error.__cause__ or error)}") from error


def is_saved(folder: str | Path) -> bool:
    """Whether a folder is what `save_to_disk` of datasets, or `tjepa prepare`, wrote: it is never streamed."""
    of_splits, *of_one = (Path(folder) / name for name in ("dataset_dict.json", "state.json", "dataset_info.json"))
    return of_splits.is_file() or all(path.is_file() for path in of_one)


def _no_file_to_read(name: str) -> FileNotFoundError:
    hint = hint_at_nearest(name)
    if set("[]*?") & set(name) and Path(name).is_dir():
        hint = "datasets takes [, ], * and ? in a folder's name for a pattern: give the folder another name."
    message = f"--dataset_name {name}: there is no file in it that can be read, which is one of {EXTENSIONS}. {hint}"
    return FileNotFoundError(message.rstrip())


def check_dataset_exists(name: str) -> None:
    """
    Refuses a folder that is not there before its name is taken for one on the Hub.

    Raises:
        ValueError: if it is a file.
        FileNotFoundError: naming the command that prepares the folder, where one of our configs does, else the
            nearest name.
    """
    if Path(name).is_file() and can_be_read([name]):
        raise ValueError(f"--dataset_name {name}: it is a file, which is given with --train_file {name}.")
    if Path(name).exists():
        return
    for path in sorted(CONFIGS.glob("prepare_*.yaml")):
        if Path(yaml.safe_load(path.read_text(encoding="utf-8"))["output_dir"]) == Path(name):
            raise FileNotFoundError(
                f"--dataset_name {name}: there is no such folder (seen from {os.getcwd()}) yet. "
                f"Prepare it with: tjepa prepare configs/{path.name}"
            )
    check_exists(name, "--dataset_name")


def _paths_of(builder: DatasetBuilder) -> list[str]:
    return [path for files in (builder.config.data_files or {}).values() for path in files]


def _warn_of_files_left_out(name: str, builder: DatasetBuilder) -> None:
    """`datasets` takes the files of one format, and where some are named as splits are, those alone."""
    folder = Path(name).resolve()
    read = {Path(path).resolve() for path in _paths_of(builder)}
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.resolve() not in read]
    names = [
        str(path)
        for path in (path.relative_to(folder) for path in found)
        if can_be_read([path.name])
        and path.name not in FILES_TO_IGNORE
        and not any(part.startswith((".", "__")) for part in path.parts)
    ]
    if names:
        logger.warning(
            f"--dataset_name {name}: {len(names)} of its files are left out: {list_names(names)}. Of a "
            "folder the files of one format are read, and where some are named as splits are (train, validation, "
            "test), those alone; --train_file with a glob in quotes reads all files of a format."
        )


def _is_plain_text(builder: DatasetBuilder, needs_text_only: bool, is_local: bool) -> bool:
    """
    Whether a dataset consists of files of text that are read as they are. `datasets` guesses what is in such files
    from the first rows, and gives up on those that differ; of parquet files it gives up on those that have other
    columns, and on damaged ones.
    """
    config, paths = builder.config, _paths_of(builder)
    if isinstance(builder, Parquet):
        return needs_text_only and is_local and can_be_read(paths) and not any(map(_holds_token_ids, paths))
    if not isinstance(builder, Csv | Json | Text) or not can_be_read(paths):
        return False
    # "sep" is that of .tsv files, and the rest says how to find them
    ignored = {"name", "version", "description", "data_dir", "data_files", "sep"}
    if any(getattr(config, field.name) != field.default for field in fields(config) if field.name not in ignored):
        return False
    features = builder.info.features or {}
    return needs_text_only or not any("ClassLabel" in str(feature) for feature in features.values())


def _holds_token_ids(path: str) -> bool:
    """Whether a parquet file has a column `input_ids`, and is no text to read."""
    try:
        return "input_ids" in parquet.read_schema(path).names
    except Exception as error:
        if not is_damage(error):
            raise
        return False


def limit_datasets(splits: dict[str, Dataset], args: Any) -> DatasetDict:
    """
    `train` and `validation`, drawn from `train` where there is none, both cut to their maximum. Whole
    documents are drawn, with all rows that they were split into, by the same seed in every run; they keep their order.
    """
    train, validation = splits["train"], splits.get("validation")
    if validation is None and args.validation_split_percentage > 0:
        document_of_row = find_documents(train)
        usable = np.unique(document_of_row)
        if FAULT_COLUMN in train.column_names:  # of texts that are dropped nothing would be left to judge by
            usable = usable[train.with_format("numpy")[FAULT_COLUMN][:] == KEPT]
        num_validation = max(1, round(len(usable) * args.validation_split_percentage / 100))
        if len(usable) > 1:
            drawn = usable[draw(len(usable), min(len(usable) - 1, num_validation))]
            is_validation = np.isin(document_of_row, drawn)
            validation = train.select(np.flatnonzero(is_validation))
            train = train.select(np.flatnonzero(~is_validation))
    limited = DatasetDict(train=draw_documents(train, args.max_train_samples))
    if validation is not None:
        limited["validation"] = draw_documents(validation, args.max_eval_samples)
    return limited


def draw_documents(dataset: Dataset, num_drawn: int | None) -> Dataset:
    """`num_drawn` documents, drawn with a fixed seed, in their order; all of them if there are no more than that."""
    document_of_row = find_documents(dataset)
    num_documents = int(document_of_row[-1]) + 1 if len(dataset) else 0
    if num_drawn is None or num_drawn >= num_documents:
        return dataset
    return dataset.select(np.flatnonzero(draw(num_documents, num_drawn)[document_of_row]))


def draw(num_things: int, num_drawn: int | None) -> np.ndarray:
    """bool [num_things]: which are drawn, always the same ones; all of them where `num_drawn` is `None`."""
    is_drawn = np.zeros(num_things, dtype=bool)
    is_drawn[np.random.default_rng(SPLIT_SEED).permutation(num_things)[:num_drawn]] = True
    return is_drawn


def find_documents(dataset: Dataset) -> np.ndarray:
    """int64 [num_rows]: which document each row is of, counted from 0."""
    if not {"input_ids", PIECE_COLUMN} <= set(dataset.column_names):  # a column of that name in a user's texts
        return np.arange(len(dataset))
    return np.cumsum(dataset.with_format("numpy", columns=[PIECE_COLUMN])[:][PIECE_COLUMN] == 0) - 1


def _limit_streams(splits: dict[str, IterableDataset], args: SourceArguments) -> IterableDatasetDict:
    train, validation = splits["train"], splits.get("validation")
    num_validation = args.max_eval_samples or NUM_STREAMED_EVAL_DOCUMENTS
    if validation is None and args.validation_split_percentage > 0:
        validation = train
        held_out = [_hash_if_valid(example.get(args.text_column_name)) for example in train.take(num_validation)]
        if len(held_out) < num_validation:
            raise ValueError(
                f"The stream has only {len(held_out)} documents, and all of them would become the validation split: "
                "pass a --max_eval_samples below that, or --validation_split_percentage 0."
            )
        # not train.skip, which skips other documents as soon as the stream is split between processes or workers
        train = train.filter(_is_not_in, fn_kwargs={"hashes": {*held_out} - {None}, "column": args.text_column_name})
    if args.max_train_samples is not None:
        # not train.take, which takes a share of them from every file, as many as there are readers
        beginning = {"documents": train, "num_documents": args.max_train_samples}
        train = IterableDataset.from_generator(_take, train.features, beginning)
    if validation is None:
        return IterableDatasetDict(train=train)
    return IterableDatasetDict(train=train, validation=validation.take(num_validation))


def _take(documents: IterableDataset, num_documents: int) -> Iterator[dict]:
    """The first documents: as one file, whoever reads, so that they are the same however it is shared."""
    for examples in islice(documents.iter(batch_size=1), num_documents):  # iter(documents) would share between workers
        yield {name: values[0] for name, values in examples.items()}


def _hash_if_valid(text: Any) -> int | None:
    return hash_text(text) if find_fault(text) is None else None


def _is_not_in(example: dict, hashes: set[int], column: str) -> bool:
    return _hash_if_valid(example.get(column)) not in hashes


def hash_text(text: str) -> int:
    return hash_bytes(text.strip().encode("utf-8"))


def hash_bytes(data: bytes | np.ndarray) -> int:
    """64 bits, signed."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)
