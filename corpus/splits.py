"""Documents of all splits to what the Trainer reads: token ids in memory, or a stream that is tokenized on the way."""

import logging
from collections.abc import Mapping
from typing import Any

import datasets
import pyarrow.compute
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from .documents import DataArguments
from .preparation import check_vocabulary
from .streams import DocumentDataset, DocumentStream
from .tokenization import DocumentCounts, StreamTokenizer, check_columns, tokenize_documents


logger = logging.getLogger(__name__)


def tokenize_splits(
    documents: Mapping[str, datasets.Dataset | datasets.IterableDataset],
    tokenizer: PreTrainedTokenizerBase,
    args: DataArguments,
    training_args: Any,
) -> tuple[dict[str, Dataset], dict[str, DocumentCounts | StreamTokenizer | str]]:
    """Documents as token ids, wrapped for the collator, and what was kept and dropped.

    Args:
        documents: What `load_documents` returns.
        tokenizer: Any tokenizer of transformers; that of the rows, where they are tokenized already.
        args: How documents become token ids.
        training_args (`TrainingArguments`, with `shuffle_buffer_size`): Who reads a stream, and in which order.

    Raises:
        ValueError: As `tokenize_documents` and `check_vocabulary`, or if rows that were tokenized before are too long.
    """
    splits, counts = {}, {}
    for split, dataset in documents.items():
        if isinstance(dataset, datasets.IterableDataset) and split == "train":
            splits[split], counts[split] = make_stream(dataset, tokenizer, args, training_args)
            continue
        if "input_ids" in (dataset.column_names or []):
            check_token_ids(dataset, tokenizer, args, split)
            counts[split] = f"  {len(dataset):,} rows, tokenized before (counts in preparation.json of the dataset)"
        else:
            dataset, counts[split] = tokenize_documents(dataset, tokenizer, args, desc=split)
            logger.info(f"{split} documents:\n{counts[split]}")
        splits[split] = DocumentDataset(dataset)
    return splits, counts


def check_token_ids(
    dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, args: DataArguments, desc: str
) -> None:
    """Raises a `ValueError` if rows tokenized before are not this tokenizer's, or longer than `max_length`."""
    check_vocabulary(args.dataset_name, tokenizer)
    column = dataset.data.column("input_ids")
    longest = pyarrow.compute.max(pyarrow.compute.list_value_length(column)).as_py() or 0
    if longest > args.max_length:
        raise ValueError(
            f"{args.dataset_name}: the {desc} split has rows of up to {longest} tokens, and --max_length is "
            f"{args.max_length}. Rows that were tokenized before are not cut: pass --max_length {longest}."
        )
    highest = pyarrow.compute.max(pyarrow.compute.list_flatten(column)).as_py() or 0
    if highest > max(tokenizer.get_vocab().values()):
        raise ValueError(
            f"{args.dataset_name}: the {desc} split has the token id {highest}, which the tokenizer "
            f"{tokenizer.name_or_path} does not have. Pass --tokenizer_name with the one that the rows were made with."
        )


def make_stream(
    documents: datasets.IterableDataset, tokenizer: PreTrainedTokenizerBase, args: DataArguments, training_args: Any
) -> tuple[DocumentStream, StreamTokenizer]:
    """Endless training documents, of which this process and its workers read their share, and what counts them."""
    check_columns(documents, args.text_column_name, "train")
    stream_tokenizer = StreamTokenizer(tokenizer, args)
    stream = DocumentStream(
        documents,
        transform=stream_tokenizer,
        shuffle_buffer_size=training_args.shuffle_buffer_size,
        seed=training_args.data_seed if training_args.data_seed is not None else training_args.seed,
        rank=training_args.process_index,
        world_size=training_args.world_size,
        repeat=True,
    )
    num_shares = training_args.world_size * max(1, training_args.dataloader_num_workers)
    if documents.num_shards < num_shares:
        logger.warning(
            f"The stream has {documents.num_shards} files for {num_shares} readers (processes times workers): each "
            f"reads all of them, and tokenizes one document in {num_shares}. {num_shares} files or more are faster."
        )
    return stream, stream_tokenizer
