"""The two tasks of fine-tuning: a label for each text or pair of texts, and a tag for each word.

A task says which columns it reads, what its labels are, how rows become token ids and labels, and how logits become
figures and predictions. `finetuning.finetune` does the rest, the same way for both.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from ..corpus.faults import DROP_REASONS, find_fault
from .arguments import MULTI, REGRESSION, SINGLE, TextArguments, WordArguments
from .labels import (
    IGNORED,
    NO_LABEL,
    check_classes,
    check_lists_of_classes,
    class_name,
    find_class_names,
    find_problem_type,
    flatten,
    is_finite_number,
    read_labels,
)


logger = logging.getLogger(__name__)


def find_column(splits: DatasetDict, flag: str, given: str | None, usual: tuple[str, ...], can_lack: bool) -> str:
    """
    The column `given`, or the only one of the `usual` names that is there. Every split must have it; with `can_lack`
    a test split may come without it and without any of the usual names, as in contests.

    Raises:
        ValueError: if it does not exist, or several of the usual names or none of them do.
    """
    columns = splits["train"].column_names
    candidates = [name for name in usual if name in columns] if given is None else [given]
    if len(candidates) != 1:
        raise ValueError(
            f"Which column does {flag} mean? The train split has {sorted(columns)}, and "
            f"{f'{candidates} are all usual names' if candidates else f'none of the usual names {list(usual)}'}. "
            f"Pass {flag} with one of them."
        )
    for split, dataset in splits.items():
        if candidates[0] in dataset.column_names:
            continue
        if split == "test" and can_lack and not set(usual) & set(dataset.column_names):
            continue
        raise ValueError(
            f"The {split} split has no column {candidates[0]!r}; it has {sorted(dataset.column_names)}. "
            f"Pass {flag} with the one that is meant."
        )
    return candidates[0]


class Task:
    """What both tasks have in common. `names` are the classes in the order of their ids; a regression has none."""

    arguments: type
    auto_class: type
    collator: type
    pipeline: str
    metric: str  # a folder in metrics/
    metric_configuration: str | None = None
    figures: tuple[str, ...]  # that the metric has
    columns: list[str]
    label_column: str

    def set_names(self, names: list[str]) -> None:
        self.names = names
        self.ids = {name: index for index, name in enumerate(names)}

    def check_labels(self, labels: dict[str, list]) -> None:
        """
        Logs the classes or the range of the usable labels of each split.

        Raises:
            ValueError: if there is nothing to learn, or the splits do not fit each other.
        """
        counts = {
            split: Counter(class_name(label) for label in flatten(part) if label != IGNORED)
            for split, part in labels.items()
        }
        check_classes(counts, self.names)

    def set_head(self, config: PreTrainedConfig) -> None:
        """Tells the configuration what the head is for."""
        config.id2label = dict(enumerate(self.names))
        config.label2id = dict(self.ids)

    def map_inputs(self, dataset: Dataset, encode_batch: Callable[[dict, list[int]], dict]) -> Dataset:
        """What `encode_batch` makes of the inputs and the numbers of their rows, and nothing else."""
        # datasets would give `labels` the type of a column of that name, so none is left
        dataset = dataset.select_columns([*dict.fromkeys(self.columns)])
        return dataset.map(encode_batch, batched=True, with_indices=True, remove_columns=dataset.column_names)

    def report_encoded(self, encoded: Dataset, split: str, counts: dict) -> None:
        """Says what was lost of a split beyond the tokens that were cut."""


class TextTask(Task):
    """One class, several classes, or a number for each text or pair of texts."""

    arguments = TextArguments
    auto_class = AutoModelForSequenceClassification
    collator = DataCollatorWithPadding
    pipeline = "text-classification"
    metric = "classification"

    LABEL_COLUMNS = ("label", "labels", "score", "target", "class")
    TEXT_COLUMNS = (  # the first that is there; a pair only where both are
        ("sentence1", "sentence2"),
        ("premise", "hypothesis"),
        ("question1", "question2"),
        ("question", "sentence"),
        ("text", None),
        ("sentence", None),
        ("content", None),
    )
    METRIC_CONFIGURATIONS = {SINGLE: "default", MULTI: "multi_label", REGRESSION: "regression"}
    FIGURES = {
        SINGLE: ("accuracy", "f1_macro", "mcc"),
        MULTI: ("accuracy", "f1_macro", "f1_micro"),
        REGRESSION: ("mse", "pearson", "spearman"),
    }

    def __init__(self, splits: DatasetDict, args: TextArguments, config: PreTrainedConfig):
        given = (args.text_column, args.text_pair_column)
        if args.text_column is None:
            columns = set(splits["train"].column_names) | {None}
            given = next((pair for pair in self.TEXT_COLUMNS if columns >= set(pair)), (None, None))
        usual = tuple(dict.fromkeys(name for pair in self.TEXT_COLUMNS for name in pair if name is not None))
        self.columns = [find_column(splits, "--text_column", given[0], usual, can_lack=False)]
        if given[1] is not None:
            self.columns.append(find_column(splits, "--text_pair_column", given[1], usual, can_lack=False))
        self.label_column = find_column(splits, "--label_column", args.label_column, self.LABEL_COLUMNS, can_lack=True)
        labels = read_labels(splits["train"], self.label_column)
        self.kind = args.problem_type or find_problem_type(splits["train"], self.label_column, labels)
        logger.info(f"{self.kind}: texts in {', '.join(self.columns)}, labels in {self.label_column}")
        is_number = self.kind == REGRESSION
        self.set_names([] if is_number else find_class_names(splits["train"], self.label_column, labels, config))
        self.metric_configuration, self.figures = self.METRIC_CONFIGURATIONS[self.kind], self.FIGURES[self.kind]

    # ---- rows ----

    def input_fault(self, *texts: Any) -> str | None:
        """Why a text, or one of a pair, cannot be used, in the words of corpus/faults.py; None if it can."""
        faults = [fault for fault in map(find_fault, texts) if fault is not None]
        return DROP_REASONS[faults[0]] if faults else None

    def label_fault(self, label: Any, texts: tuple, split: str) -> str | None:
        """
        Why the label cannot be used; None if it can.

        Raises:
            ValueError: if the label is a list and should not be, or the other way round.
        """
        if label is None:
            return NO_LABEL
        if isinstance(label, list) != (self.kind == MULTI):
            raise ValueError(
                f"A label of the {split} split is {label!r}; for {self.kind} it must "
                f"{'be a list of classes' if self.kind == MULTI else 'not be a list'}. Is --problem_type right?"
            )
        if self.kind == REGRESSION and not is_finite_number(label):
            return "label is not a finite number"
        return NO_LABEL if self.kind == MULTI and not {None, IGNORED}.isdisjoint(label) else None

    def check_labels(self, labels: dict[str, list]) -> None:
        if self.kind != REGRESSION:
            for split, part in labels.items() if self.kind == MULTI else ():
                check_lists_of_classes(part, split)
            super().check_labels(labels)
            return
        for split, part in labels.items():
            values = np.array(part, dtype=np.float64)
            logger.info(f"  {split}: from {values.min():g} to {values.max():g}, mean {values.mean():.3g}")
            if split == "train" and values.min() == values.max():
                raise ValueError(f"Every label of the train split is {values[0]:g}: there is nothing to learn.")

    def set_head(self, config: PreTrainedConfig) -> None:
        config.problem_type = self.kind
        if self.kind == REGRESSION:
            config.num_labels = 1
        else:
            super().set_head(config)

    # ---- rows -> token ids and labels ----

    def encode(
        self, dataset: Dataset, labels: list | None, tokenizer: PreTrainedTokenizerBase, max_length: int, split: str
    ) -> Dataset:
        """
        Token ids of at most `max_length`, `num_tokens`, the length before the cut, and, unless `labels` is None,
        `labels`: ids of classes, a 0 or 1 for every class, or numbers, as the model's loss takes them.
        """
        numbers = None if labels is None else self.numeric_labels(labels)

        def encode_batch(batch: dict[str, list], rows: list[int]) -> dict[str, list]:
            texts = [batch[column] for column in self.columns]
            encoding = tokenizer(*texts, verbose=False)
            lengths = [len(ids) for ids in encoding["input_ids"]]
            if max(lengths) > max_length:
                encoding = tokenizer(*texts, truncation=True, max_length=max_length)
            answers = {} if numbers is None else {"labels": [numbers[row] for row in rows]}
            return {**encoding, **answers, "num_tokens": lengths}

        return self.map_inputs(dataset, encode_batch)

    def numeric_labels(self, labels: list) -> list:
        if self.kind == REGRESSION:
            return [float(label) for label in labels]
        if self.kind == SINGLE:
            return [self.ids[class_name(label)] for label in labels]
        rows = np.zeros((len(labels), len(self.names)), dtype=np.float32)
        for row, label in zip(rows, labels, strict=True):
            row[[self.ids[class_name(one)] for one in label]] = 1.0
        return rows.tolist()

    # ---- logits -> figures and predictions ----

    @staticmethod
    def reduce_logits(logits: torch.Tensor | tuple, labels: Any) -> torch.Tensor:
        """What of the model's output is kept of every row: the logits `[batch, num_labels]`."""
        return logits[0] if isinstance(logits, tuple) else logits

    def judged(self, predictions: np.ndarray, labels: np.ndarray) -> tuple[Any, Any]:
        """Logits `[rows, num_labels]` and labels -> the predictions and references that a metric takes."""
        return self.decide(predictions), labels

    def decide(self, logits: np.ndarray) -> np.ndarray:
        """Logits [rows, num_labels] -> classes [rows], 0 and 1 [rows, num_labels] (p > 1/2), or numbers [rows]."""
        if self.kind == REGRESSION:
            return logits.squeeze(-1)
        return logits.argmax(axis=-1) if self.kind == SINGLE else (logits > 0).astype(np.int64)

    def describe(self, predictions: np.ndarray, encoded: Dataset) -> Iterator[dict]:
        """For each row of the logits what `predict_results.jsonl` says of it."""
        logits = torch.from_numpy(predictions).double()
        shares = logits.softmax(-1) if self.kind == SINGLE else logits.sigmoid()
        for decision, row in zip(self.decide(predictions), shares.tolist(), strict=True):
            if self.kind == REGRESSION:
                yield {"prediction": float(decision)}
                continue
            chosen = [self.names[index] for index in np.flatnonzero(decision)] if self.kind == MULTI else None
            probabilities = {name: round(share, 6) for name, share in zip(self.names, row, strict=True)}
            yield {
                "prediction": self.names[decision] if self.kind == SINGLE else chosen,
                "probabilities": probabilities,
            }


class WordTask(Task):
    """
    A tag for each word: parts of speech, chunks, named entities. The words are joined by spaces and tokenized like any
    text, as in pretraining; a token belongs to the word that its last character lies in. The first token of a word
    bears its tag, which is judged there alone.
    """

    arguments = WordArguments
    auto_class = AutoModelForTokenClassification
    collator = DataCollatorForTokenClassification
    pipeline = "token-classification"
    metric = "tagging"
    figures = ("accuracy", "precision", "recall", "f1")  # of chunks, B-X and I-X, all but the first

    WORD_COLUMNS = ("tokens", "words")
    TAG_COLUMNS = ("tags", "labels", "ner_tags", "pos_tags", "chunk_tags")

    def __init__(self, splits: DatasetDict, args: WordArguments, config: PreTrainedConfig):
        self.columns = [find_column(splits, "--text_column", args.text_column, self.WORD_COLUMNS, can_lack=False)]
        self.label_column = find_column(splits, "--label_column", args.label_column, self.TAG_COLUMNS, can_lack=True)
        self.label_all_tokens = args.label_all_tokens
        logger.info(f"words in {self.columns[0]}, tags in {self.label_column}")
        self.check_lists(splits)
        # of all splits: CoNLL-2000 itself has a tag that only its test split has, and such tags are honest mistakes
        tags = [
            row
            for dataset in splits.values()
            if self.label_column in dataset.column_names
            for row in read_labels(dataset, self.label_column)
        ]
        self.set_names(find_class_names(splits["train"], self.label_column, tags, config))

    def check_lists(self, splits: DatasetDict) -> None:
        """
        Raises:
            ValueError: if a column does not hold lists.
        """
        for split, dataset in splits.items():
            for column in {*self.columns, self.label_column} & set(dataset.column_names):
                example = next((value for value in dataset[column] if value is not None), [])
                if not isinstance(example, list):
                    raise ValueError(
                        f"The column {column!r} of the {split} split holds {example!r}; it must hold lists, one entry "
                        "for each word. `tjepa classify` is for texts that have one label."
                    )

    # ---- rows ----

    def input_fault(self, words: list | None) -> str | None:
        """Why a row of words cannot be used, in the words of corpus/faults.py; None if it can."""
        is_text = words is not None and all(isinstance(word, str) for word in words)
        fault = find_fault(" ".join(words) if is_text else words)
        return None if fault is None else DROP_REASONS[fault]

    def label_fault(self, tags: list | None, texts: tuple, split: str) -> str | None:
        """Why tags cannot be used; None if they can."""
        if tags is None or None in tags or (tags and set(tags) == {IGNORED}):
            return NO_LABEL
        return None if len(tags) == len(texts[0]) else "not as many tags as words"

    # ---- rows -> token ids and labels ----

    def encode(
        self, dataset: Dataset, labels: list | None, tokenizer: PreTrainedTokenizerBase, max_length: int, split: str
    ) -> Dataset:
        """
        Token ids of at most `max_length`, `labels` for every token unless `labels` is None, `num_tokens`, the length
        before the cut, and `first_tokens`, where each word begins: -1 for one that has no token.
        """
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} does not say which characters a token stands for: a fast tokenizer does."
            )
        label_all_tokens = self.label_all_tokens and split == "train"

        def encode_batch(batch: dict[str, list], rows: list[int]) -> dict[str, list]:
            texts = [" ".join(words) for words in batch[self.columns[0]]]
            whole = tokenizer(texts, verbose=False)
            encoding = tokenizer(texts, truncation=True, max_length=max_length, return_offsets_mapping=True)
            first_tokens, token_labels = [], []
            for words, row, offsets in zip(batch[self.columns[0]], rows, encoding.pop("offset_mapping"), strict=True):
                words_of_this_row = words_of_tokens(words, offsets)
                firsts = [-1] * len(words)
                for token, word in reversed(list(enumerate(words_of_this_row))):
                    if word is not None:
                        firsts[word] = token
                first_tokens.append(firsts)
                if labels is not None:
                    token_labels.append(self.token_labels(labels[row], words_of_this_row, firsts, label_all_tokens))
            answers = {} if labels is None else {"labels": token_labels}
            num_tokens = list(map(len, whole["input_ids"]))
            return {**encoding, **answers, "num_tokens": num_tokens, "first_tokens": first_tokens}

        return self.map_inputs(dataset, encode_batch)

    def token_labels(
        self, tags: list, words: list[int | None], firsts: list[int], label_all_tokens: bool
    ) -> list[int]:
        """The label of each token: its word's where it is the word's first, else nothing to learn, or I-X for B-X."""
        labels = []
        for token, word in enumerate(words):
            tag = IGNORED if word is None else tags[word]
            if tag == IGNORED or (token != firsts[word] and not label_all_tokens):
                labels.append(IGNORED)
                continue
            tag = class_name(tag)
            if token != firsts[word] and tag.startswith("B-") and f"I-{tag[2:]}" in self.ids:
                tag = f"I-{tag[2:]}"
            labels.append(self.ids[tag])
        return labels

    def report_encoded(self, encoded: Dataset, split: str, counts: dict) -> None:
        """Says how many words have no token: cut off, or unknown to the tokenizer. Their tags count nowhere."""
        firsts = flatten(encoded["first_tokens"][:])
        counts[f"{split}_lost_words"] = num_lost = firsts.count(-1)
        if num_lost:
            logger.warning(
                f"{split}: {num_lost:,} of {len(firsts):,} words have no token left; their tags count nowhere"
            )

    # ---- logits -> figures and predictions ----

    @staticmethod
    def reduce_logits(logits: torch.Tensor | tuple, labels: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """What of the logits `[batch, length, num_labels]` is kept: each token's tag, and the tag's probability."""
        logits = logits[0] if isinstance(logits, tuple) else logits
        probability, tag = logits.float().softmax(dim=-1).max(dim=-1)
        return tag, probability

    def judged(self, predictions: tuple[np.ndarray, np.ndarray], labels: np.ndarray) -> tuple[list, list]:
        """Tags and labels `[rows, length]` -> the names of those that are judged, row by row."""
        is_judged = labels != IGNORED
        return tuple(
            [[self.names[tag] for tag in row[mask]] for row, mask in zip(tags, is_judged, strict=True)]
            for tags in (predictions[0], labels)
        )

    def describe(self, predictions: tuple[np.ndarray, np.ndarray], encoded: Dataset) -> Iterator[dict]:
        """For each row what `predict_results.jsonl` says of it: a tag and its probability for each word."""
        for tags, shares, firsts in zip(*predictions, encoded["first_tokens"], strict=True):
            yield {
                "prediction": [None if token < 0 else self.names[tags[token]] for token in firsts],
                "probabilities": [None if token < 0 else round(float(shares[token]), 6) for token in firsts],
            }


def words_of_tokens(words: list[str], offsets: list[tuple[int, int]]) -> list[int | None]:
    """
    The word of each token: the one that its last character lies in. None for special tokens and for spaces.

    Args:
        words (`list[str]`): the words of a text that joins them with one space.
        offsets (`list[tuple[int, int]]`): where each token begins and ends in that text; both equal for a special one.
    """
    word_of_character = []
    for index, word in enumerate(words):
        word_of_character += [index] * len(word) + [None]
    return [word_of_character[end - 1] if end > start else None for start, end in offsets]
