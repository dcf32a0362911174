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
from .tokenizers import vocabulary_size


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
    """
    Raises:
        ValueError: if rows tokenized before are not lists of this tokenizer's ids, or have fewer than `min_tokens` or
            more than `max_length` of them.
    """
    check_vocabulary(args.dataset_name, tokenizer)
    column = dataset.data.column("input_ids")
    if not pyarrow.types.is_integer(getattr(column.type, "value_type", pyarrow.null())):
        raise ValueError(
            f"{args.dataset_name}: input_ids of the {desc} split are of the type {column.type}, and must be lists of "
            "integers. Without that column the texts are tokenized here."
        )
    lengths, ids = pyarrow.compute.list_value_length(column), pyarrow.compute.list_flatten(column)
    num_short = pyarrow.compute.sum(pyarrow.compute.less(lengths, args.min_tokens)).as_py() or 0
    if num_short + column.null_count:
        raise ValueError(
            f"{args.dataset_name}: the {desc} split has {num_short + column.null_count:,} rows of fewer than "
            f"{args.min_tokens} tokens (--min_tokens). Rows that were tokenized before are not dropped: take them out."
        )
    longest = pyarrow.compute.max(lengths).as_py() or 0
    if longest > args.max_length:
        raise ValueError(
            f"{args.dataset_name}: the {desc} split has rows of up to {longest} tokens, and --max_length is "
            f"{args.max_length}. Rows that were tokenized before are not cut: pass --max_length {longest}."
        )
    lowest, highest = (pyarrow.compute.min_max(ids)[of].as_py() or 0 for of in ("min", "max"))
    if lowest < 0 or ids.null_count or highest >= vocabulary_size(tokenizer):
        wrong = None if ids.null_count else lowest if lowest < 0 else highest
        raise ValueError(
            f"{args.dataset_name}: the {desc} split has the token id {wrong}, which the tokenizer "
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
