"""Documents to token ids: cut to length, checked and counted, in memory or streamed."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from .documents import DataArguments, hash_text
from .faults import DROP_REASONS, DUPLICATE, KEPT, TOO_SHORT, find_fault
from .files import FAULT_COLUMN
from .tokenizers import text_reader


BATCH_SIZE = 256  # documents tokenized at once; bounds the memory that book-length ones take
PERCENTILES = (5, 25, 50, 75, 95, 100)
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
            token_ids, text_hash = next(token_lists), hash_text(text)
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
            "tokenizer": text_reader(tokenizer),
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
        self.tokenizer = text_reader(tokenizer)
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
