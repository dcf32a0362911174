"""Tokenizes documents once, and writes a folder that pretraining loads in an instant, with its tokenizer beside it.

    tjepa prepare configs/prepare_tinystories.yaml --max_length 256

Notable: no document disappears silently. Every row of the tokenized (and cached) data remembers why it was dropped and
how long its document was, so the statistics are the same whether the work was just done or came from the cache. The
folder says what it was made with, and training on it follows that.
"""

import os
import shlex
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset
from transformers.hf_argparser import HfArg

from .arguments import parse_arguments
from .atomic_writes import holds_something, replacing_folder
from .command_line import start
from .documents import PIECE_COLUMN, DataArguments, load_documents, record_source
from .files import without_query
from .preparation import read_preparation, write_preparation
from .tokenization import ENCODED_FEATURES, DocumentCounts, drop_and_count, encode_documents, warn_of_loss
from .tokenizers import HubArguments, load_tokenizer


@dataclass(kw_only=True)
class PreparationArguments(HubArguments, DataArguments):
    """The arguments of `prepare_dataset.py`."""

    output_dir: str = HfArg(help="The folder to write: train, validation and the tokenizer.")
    tokenizer_name: str = HfArg(help="A tokenizer on the Hub or in a local folder.")
    deduplicate: bool = HfArg(
        default=False,
        help="Drop documents whose text, apart from whitespace around it, came before, or the part of it that "
        "--max_length leaves; validation documents also where it is in train.",
    )
    overwrite_output_dir: bool = HfArg(default=False, help="Replace the prepared dataset that is in --output_dir.")

    def __post_init__(self):
        if read_preparation(self.dataset_name) is not None:
            raise ValueError(f"{self.dataset_name} is prepared already; pass the documents that it was made of.")
        super().__post_init__()
        if self.streaming and self.max_train_samples is None:
            raise ValueError(
                "--streaming prepares part of a dataset that is too large to download: "
                "pass --max_train_samples, the number of documents to read."
            )


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
    check_output_dir(args)
    with replacing_folder(args.output_dir) as folder:
        tokenizer = load_tokenizer(args.tokenizer_name, **args.for_hub())
        seen_hashes = set() if args.deduplicate else None
        # which rows are of one document, for whoever divides them later
        columns = ("input_ids", PIECE_COLUMN) if args.long_documents == "split" else ("input_ids",)
        splits, counts = DatasetDict(), {}
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}-") as stream_cache:
            for name, documents in load_documents(args, args.cache_dir, args.token).items():
                encoded = encode_documents(documents, tokenizer, args, name)
                if isinstance(encoded, IterableDataset):
                    encoded = Dataset.from_generator(
                        encoded.__iter__, features=ENCODED_FEATURES, cache_dir=stream_cache, fingerprint=name
                    )
                splits[name], counts[name] = drop_and_count(encoded, name, seen_hashes, columns)
                warn_of_loss(counts[name], args, name)
            splits.save_to_disk(folder)
        tokenizer.save_pretrained(folder)
        write_preparation(
            folder, record_arguments(args), {name: count.to_dict() for name, count in counts.items()}, tokenizer
        )
    return counts


def record_arguments(args: PreparationArguments) -> dict[str, Any]:
    """What was given, without secrets, such that it means the same from any folder of this machine."""
    record = {k: without_query(v) if isinstance(v, str) else v for k, v in asdict(args).items() if k != "token"}
    for name in ("tokenizer_name", "cache_dir", "output_dir"):
        if record[name] is not None and (name != "tokenizer_name" or Path(record[name]).exists()):
            record[name] = os.path.abspath(record[name])
    return {**record, **record_source(args)}


def check_output_dir(args: PreparationArguments) -> None:
    """Raises a `FileExistsError` if the folder to write holds anything but a prepared dataset that may be replaced."""
    output = Path(args.output_dir)
    if holds_something(output):
        if not args.overwrite_output_dir:
            raise FileExistsError(
                f"{args.output_dir} is not empty. Pass --overwrite_output_dir, or another --output_dir."
            )
        if read_preparation(output) is None:  # of no other folder can it be made again
            raise FileExistsError(
                f"{args.output_dir} is not a prepared dataset and is not overwritten; pass another folder."
            )


def main():
    (args,) = parse_arguments(PreparationArguments, description=__doc__)
    for name, counts in prepare_dataset(args).items():
        print(f"\n{name}\n{counts}")
    print(f"\nWritten to {args.output_dir}; train on it with --dataset_name {shlex.quote(args.output_dir)}")


if __name__ == "__main__":
    start(main)
