"""Documents to token ids: cut to length, checked and counted, in memory or streamed."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from .documents import DataArguments, hash_text
from .faults import DROP_REASONS, DUPLICATE, KEPT, TOO_SHORT, advise, find_fault, list_reasons
from .files import FAULT_COLUMN
from .tokenizers import text_reader


logger = logging.getLogger(__name__)


BATCH_SIZE = 256  # documents tokenized at once; bounds the memory that book-length ones take
MAX_SHARE_CUT_UNSAID = 0.01
TALLIED = ("num_documents", "num_truncated", "num_split", "num_tokens_cut", *DROP_REASONS)  # see tally
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
        "row_hash": Value("int64"),  # of the row that the beginning of a truncated text has in common with other texts
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

    @classmethod
    def from_tally(cls, total: np.ndarray) -> "DocumentCounts":
        """From the sum of what `tally` returns."""
        by_name = dict(zip(TALLIED, map(int, total), strict=False))
        by_length = total[len(TALLIED) :]
        dropped = {reason: count for reason in DROP_REASONS if (count := by_name.pop(reason))}
        num_rows, num_up_to = int(by_length.sum()), np.cumsum(by_length)
        percentiles = {}
        for percentile in PERCENTILES if num_rows else ():
            rank = percentile * (num_rows - 1) // 100  # as np.percentile(method="lower")
            name = f"{percentile}%" if percentile < 100 else "max"
            percentiles[name] = int(np.searchsorted(num_up_to, rank, side="right"))
        return cls(
            **by_name,
            num_kept=by_name["num_documents"] - sum(dropped.values()),
            dropped=dropped,
            num_rows=num_rows,
            num_tokens=int((by_length * np.arange(len(by_length))).sum()),
            length_percentiles=percentiles,
        )

    @property
    def share_cut(self) -> float:
        """Tokens that are in no row, as a share of all tokens of the documents that were kept."""
        return self.num_tokens_cut / max(1, self.num_tokens + self.num_tokens_cut)

    def to_dict(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        lines = [("documents read", self.num_documents), ("kept", self.num_kept)]
        lines += [("dropped", sum(self.dropped.values()))]
        lines += [(f"  {reason}", count) for reason, count in self.dropped.items()]
        lines += [("truncated", self.num_truncated), ("split into several rows", self.num_split)]
        lines += [("rows", self.num_rows), ("tokens", self.num_tokens)]
        lines += [(f"tokens cut off ({self.share_cut:.1%})", self.num_tokens_cut)]
        text = "\n".join(f"  {name:<30}{count:>15,}" for name, count in lines)
        percentiles = "   ".join(f"{name} {length:,}" for name, length in self.length_percentiles.items())
        return f"{text}\n  tokens per row: {percentiles or 'no rows'}"


def tally(rows: Mapping[str, np.ndarray], max_length: int) -> np.ndarray:
    """Counts rows of `ENCODED_FEATURES`, all pieces of each document.

    Returns:
        int64 [len(TALLIED) + max_length + 1]: documents or tokens by what became of them, in the order of `TALLIED`,
        then the rows that were kept by their number of tokens. The sum over batches is that of all.
    """
    is_first = rows["piece"] == 0
    document_of_row = np.cumsum(is_first) - 1
    drop_reason = rows["drop_reason"][is_first]  # per document, like the next two
    is_kept = drop_reason == KEPT
    num_tokens_in_rows = np.bincount(document_of_row, weights=rows["num_tokens"]).astype(np.int64)
    num_cut = np.where(is_kept, rows["num_document_tokens"][is_first] - num_tokens_in_rows, 0)
    num_split = (is_kept & (np.bincount(document_of_row) > 1)).sum()
    by_reason = [(drop_reason == reason).sum() for reason in range(len(DROP_REASONS))]
    by_length = np.bincount(rows["num_tokens"][rows["drop_reason"] == KEPT], minlength=max_length + 1)
    return np.array([len(is_kept), (num_cut > 0).sum(), num_split, num_cut.sum(), *by_reason, *by_length])


def encode_batch(
    texts: list,
    known_faults: list[int] | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    min_tokens: int,
    long_documents: str,
) -> dict[str, list]:
    """Turns a batch of documents into rows of `ENCODED_FEATURES`. `known_faults` are those of `read_documents`."""
    faults = [find_fault(text) for text in texts]
    if known_faults is not None:
        faults = [fault if known == KEPT else known for fault, known in zip(faults, known_faults, strict=True)]
    valid_texts = [text for text, fault in zip(texts, faults, strict=True) if fault is None]
    token_lists = iter(_tokenize(valid_texts, tokenizer))

    rows = []
    for text, fault in zip(texts, faults, strict=True):
        token_ids, text_hash, row_hash = [], 0, 0
        if fault is None:
            token_ids, text_hash = next(token_lists), hash_text(text)
            fault = TOO_SHORT if len(token_ids) < min_tokens else None
        pieces = [[]]
        if fault is None:
            starts = range(0, len(token_ids), max_length) if long_documents == "split" else (0,)
            pieces = [token_ids[start : start + max_length] for start in starts]
            pieces = [piece for piece in pieces if len(piece) >= min_tokens]
            row_hash = hash_text(" ".join(map(str, pieces[0]))) if long_documents == "truncate" else text_hash
        drop_reason = KEPT if fault is None else fault
        for index, piece in enumerate(pieces):
            rows.append((piece, drop_reason, index, len(piece), len(token_ids), text_hash, row_hash))
    return dict(zip(ENCODED_FEATURES, map(list, zip(*rows, strict=True)), strict=True))


def _tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    if not texts:
        return []
    try:
        # verbose=False: that a document is longer than the tokenizer's model_max_length is not news here.
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    except Exception as error:
        if type(error) is not Exception:  # those of the library tokenizers are
            raise
        name = tokenizer.name_or_path or type(tokenizer).__name__
        raise ValueError(
            f"The tokenizer {name} has no tokens for some of the texts ({error}). Give it an unknown token, or pass "
            "another; `tjepa tokenizer` makes one that can write every text."
        ) from error


def check_columns(dataset: Dataset | IterableDataset, text_column_name: str, desc: str) -> None:
    """Raises a `ValueError` if there are no documents, or none in the column `text_column_name`."""
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"The {desc} split has no documents.")
    if text_column_name not in first:
        raise ValueError(
            f"The {desc} split has no column {text_column_name!r}; it has {sorted(first)}. "
            "Pass --text_column_name with the one that holds the text."
        )


def encode_documents(
    dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, args: DataArguments, desc: str
) -> Dataset | IterableDataset:
    """Documents to rows of `ENCODED_FEATURES`, those of dropped documents included; `desc` is the split's name."""
    check_columns(dataset, args.text_column_name, desc)
    parameters = encoding_parameters(dataset, text_reader(tokenizer), args)
    if isinstance(dataset, Dataset):
        parameters["num_proc"] = args.preprocessing_num_workers
        parameters["load_from_cache_file"] = not args.overwrite_cache
        parameters["desc"] = f"Tokenizing {desc}"
    inputs = parameters["input_columns"]
    return dataset.select_columns(inputs).map(encode_batch, features=ENCODED_FEATURES, **parameters)


def encoding_parameters(
    dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, args: DataArguments
) -> dict[str, Any]:
    """How `map` is called with `encode_batch`, or with what calls it."""
    has_faults = FAULT_COLUMN in (dataset.column_names or [])
    inputs = [args.text_column_name, *([FAULT_COLUMN] if has_faults else [])]
    rules = {name: getattr(args, name) for name in ("max_length", "min_tokens", "long_documents")}
    return {
        "batched": True,
        "batch_size": BATCH_SIZE,
        "input_columns": inputs,
        "remove_columns": inputs,
        "fn_kwargs": {"tokenizer": tokenizer, **rules},
    }


def drop_and_count(
    encoded: Dataset, desc: str, seen_hashes: set[int] | None = None, columns: tuple[str, ...] = ("input_ids",)
) -> tuple[Dataset, DocumentCounts]:
    """
    The `columns` of the rows that are kept, and the counts of all; errors as in `tokenize_documents`.

    Args:
        seen_hashes: if given, documents whose text, or what truncation leaves of it, is in it as a hash are dropped as
            duplicates, and the hashes of all are added: one set for several splits.
    """
    names = [name for name in ENCODED_FEATURES if name != "input_ids"]
    rows = encoded.select_columns(names).with_format("numpy")[:]
    if seen_hashes is not None:
        is_first = rows["piece"] == 0
        drop_reason = rows["drop_reason"][is_first]
        hashes = zip(rows["text_hash"][is_first].tolist(), rows["row_hash"][is_first].tolist(), strict=True)
        for document, both in enumerate(hashes):
            if drop_reason[document] == KEPT:
                if not seen_hashes.isdisjoint(both):
                    drop_reason[document] = DUPLICATE
                seen_hashes.update(both)
        rows["drop_reason"] = drop_reason[np.cumsum(is_first) - 1]
    counts = DocumentCounts.from_tally(tally(rows, max_length=int(rows["num_tokens"].max())))
    if not counts.num_kept:
        dropped = counts.dropped
        raise ValueError(f"Every document of the {desc} split was dropped: {list_reasons(dropped)}. {advise(dropped)}")
    is_kept = rows["drop_reason"] == KEPT
    tokenized = encoded.select_columns(list(columns))
    return (tokenized if is_kept.all() else tokenized.select(np.flatnonzero(is_kept))), counts


def warn_of_loss(counts: DocumentCounts, args: DataArguments, desc: str) -> None:
    """Says in the log how much of the documents was cut off, where it is more than a hundredth."""
    if args.long_documents == "truncate" and counts.share_cut > MAX_SHARE_CUT_UNSAID:
        logger.warning(
            f"{desc}: {counts.share_cut:.1%} of all tokens lie beyond the {args.max_length} tokens of --max_length "
            f"and were left out, in {counts.num_truncated:,} of {counts.num_kept:,} documents. "
            "--long_documents split makes them further sequences; a higher --max_length keeps them in one."
        )


def tokenize_documents(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    args: DataArguments,
    desc: str,
) -> tuple[Dataset, DocumentCounts]:
    """Tokenizes documents without special tokens, drops those that cannot be used and cuts those that are too long.

    Args:
        dataset (`Dataset` or `IterableDataset`): The documents, in the column `args.text_column_name`.
        tokenizer (`PreTrainedTokenizerBase`): Any tokenizer of transformers.
        args (`DataArguments`): `max_length`, `min_tokens` and `long_documents`; workers and cache.
        desc (`str`): What the split is called in the progress bar and in errors.

    Returns:
        `tuple`: The dataset, whose only column `input_ids` holds int32 token ids, and its `DocumentCounts`. An
        `IterableDataset` is read into memory: for a stream that does not end soon there is `StreamTokenizer`.

    Raises:
        ValueError: If the text column is missing, there are no documents, or all of them were dropped.
    """
    encoded = encode_documents(dataset, tokenizer, args, desc)
    if isinstance(encoded, IterableDataset):
        encoded = Dataset.from_list(list(encoded), features=ENCODED_FEATURES)
    tokenized, counts = drop_and_count(encoded, desc)
    warn_of_loss(counts, args, desc)
    return tokenized, counts


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

    def __init__(self, tokenizer: PreTrainedTokenizerBase, args: DataArguments):
        self.tokenizer = text_reader(tokenizer)
        self.args = args
        num_counts = len(TALLIED) + args.max_length + 1
        self._counts = torch.zeros((self.NUM_WORKERS, num_counts), dtype=torch.int64).share_memory_()

    def __call__(self, dataset: IterableDataset) -> IterableDataset:
        """The rows of a stream of documents, in the column `input_ids`."""
        parameters = encoding_parameters(dataset, self.tokenizer, self.args)
        return dataset.select_columns(parameters["input_columns"]).map(self._encode_and_count, **parameters)

    def _encode_and_count(self, *columns: list, **rules) -> dict[str, list]:
        rows = encode_batch(*columns, **rules)
        counted = tally({name: np.array(rows[name]) for name in rows if name != "input_ids"}, self.args.max_length)
        worker = torch.utils.data.get_worker_info()
        self._counts[0 if worker is None else worker.id % self.NUM_WORKERS] += torch.from_numpy(counted)
        kept = zip(rows["input_ids"], rows["drop_reason"], strict=True)
        return {"input_ids": [input_ids for input_ids, reason in kept if reason == KEPT]}

    def counts(self, over_processes: Callable[[torch.Tensor], torch.Tensor] | None = None) -> DocumentCounts:
        """
        What became of the documents that were read so far.

        Args:
            over_processes (`Callable`, *optional*): sums an int64 tensor over processes, if there are several.
        """
        total = self._counts.sum(dim=0)
        return DocumentCounts.from_tally((total if over_processes is None else over_processes(total)).cpu().numpy())
