"""Fine-tunes an encoder to classify texts or pairs of texts: one class, several classes, or a number for each.

    python run_classification.py --model_name_or_path runs/quickstart --dataset_name stanfordnlp/sst2
    python run_classification.py --model_name_or_path runs/quickstart --train_file train.csv --test_file test.csv
    python run_classification.py my.yaml --freeze_encoder                                   # a linear probe

Arguments come from the dataclasses, from a YAML file as the first argument, or from both (flags win). Notable: the
labels decide what is trained. Names and integers are classes, lists of them are several classes for a text, numbers
with a fraction are a regression; `--problem_type` overrides this. The rest is in finetuning_tjepa.py.
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from datasets import Dataset, DatasetDict
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.hf_argparser import HfArg

from ..corpus.arguments import parse_arguments
from ..training.checkpoints import find_checkpoint
from ..training.setup import set_up_logging, use_all_cores
from .finetuning import (
    NO_LABEL,
    DataArguments,
    FinetuningArguments,
    HubMetric,
    ModelArguments,
    check_classes,
    class_name,
    drop_rows,
    find_class_names,
    find_column,
    find_max_length,
    is_missing,
    limit_splits,
    load_config,
    load_metrics,
    load_model,
    load_splits,
    load_tokenizer,
    logger,
    read_labels,
    report_truncation,
    set_classes,
    text_fault,
    train_and_evaluate,
)


SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
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
HUB_METRICS = {
    SINGLE: [
        HubMetric("accuracy", None, {}, {"accuracy": "accuracy"}),
        HubMetric("f1", None, {"average": "macro"}, {"f1": "f1_macro"}),
        HubMetric("matthews_correlation", None, {}, {"matthews_correlation": "mcc"}),
    ],
    MULTI: [
        HubMetric("accuracy", "multilabel", {}, {"accuracy": "accuracy"}),
        HubMetric("f1", "multilabel", {"average": "macro"}, {"f1": "f1_macro"}),
        HubMetric("f1", "multilabel", {"average": "micro"}, {"f1": "f1_micro"}),
    ],
    REGRESSION: [
        HubMetric("pearsonr", None, {}, {"pearsonr": "pearson"}),
        HubMetric("spearmanr", None, {}, {"spearmanr": "spearman"}),
    ],
}
OUR_CONFIGURATIONS = {SINGLE: "default", MULTI: "multi_label", REGRESSION: "regression"}


@dataclass(kw_only=True)
class ClassificationArguments(DataArguments):
    text_column: str | None = HfArg(default=None, help="The column of the texts. Default: one of the usual names.")
    text_pair_column: str | None = HfArg(
        default=None,
        help="The column of the second text of each pair. Default: none, or that of a usual pair.",
    )
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] | None = HfArg(
        default=None, help="What the labels are. Default: found out from those of the train split."
    )


def main():
    model_args, data_args, training_args = parse_arguments(
        (ModelArguments, ClassificationArguments, FinetuningArguments)
    )
    set_up_logging(training_args)
    use_all_cores(training_args)
    checkpoint = find_checkpoint(training_args)
    set_seed(training_args.seed)
    config = load_config(model_args)

    # Rows -> token ids and labels
    counts = {}
    with training_args.main_process_first(desc="preparing the texts"):
        splits = load_splits(data_args, model_args)
        text_columns = find_text_columns(splits, data_args)
        label_column = find_column(splits, "--label_column", data_args.label_column, LABEL_COLUMNS)
        labels = read_labels(splits["train"], label_column)
        problem_type = data_args.problem_type or detect_problem_type(labels)
        logger.info(f"{problem_type}: texts in {', '.join(text_columns)}, labels in {label_column}")
        names = []
        if problem_type != REGRESSION:
            names = find_class_names(splits["train"], label_column, labels, config)
        splits, labels = keep_usable_rows(
            limit_splits(splits, data_args), text_columns, label_column, problem_type, counts
        )
        if problem_type == REGRESSION:
            report_range(labels)
        else:
            check_classes({split: count_classes(split_labels) for split, split_labels in labels.items()}, names)
        tokenizer = load_tokenizer(model_args, config, for_pairs=len(text_columns) == 2)
        max_length = find_max_length(data_args.max_length, tokenizer, config)
        splits = {
            split: encode(
                dataset, text_columns, numeric_labels(labels[split], names, problem_type), tokenizer, max_length
            )
            for split, dataset in splits.items()
        }
    for split, dataset in splits.items():
        report_truncation(dataset["num_tokens"][:], max_length, split, counts)

    # Training
    config.problem_type = problem_type
    if problem_type == REGRESSION:
        config.num_labels = 1
    else:
        set_classes(config, names)
    model = load_model(AutoModelForSequenceClassification, model_args, config, tokenizer)
    metrics = load_metrics(HUB_METRICS[problem_type], "classification", OUR_CONFIGURATIONS[problem_type])

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        return metrics(decide(prediction.predictions, problem_type), prediction.label_ids)

    train_and_evaluate(
        model,
        training_args,
        splits,
        tokenizer,
        DataCollatorWithPadding(tokenizer),
        compute_metrics,
        lambda logits, labels: logits[0] if isinstance(logits, tuple) else logits,
        counts,
        checkpoint,
    )


def find_text_columns(splits: DatasetDict, args: ClassificationArguments) -> list[str]:
    """The column of the texts, or the two of the pairs: as given, else the first usual ones."""
    given = (args.text_column, args.text_pair_column)
    if args.text_pair_column is not None and args.text_column is None:
        raise ValueError("--text_pair_column is the second text of each pair: pass --text_column, the first, as well.")
    if args.text_column is None:
        columns = set(splits["train"].column_names) | {None}
        given = next((pair for pair in TEXT_COLUMNS if columns >= set(pair)), (None, None))
    usual = tuple(name for pair in TEXT_COLUMNS for name in pair if name is not None)
    columns = [find_column(splits, "--text_column", given[0], usual)]
    if given[1] is not None:
        columns.append(find_column(splits, "--text_pair_column", given[1], usual))
    return columns


def detect_problem_type(labels: list) -> str:
    """
    Lists are several classes; names and integers are classes; numbers with a fraction, also as text, a regression.

    Raises:
        ValueError: if there are no labels, different kinds of them, or whole numbers stored as floats, which may be
            either (an integer column of a csv file with a gap in it is read like that).
    """
    labels = [label for label in labels if not is_missing(label)]
    kinds = {type(label) for label in labels}
    if not labels:
        raise ValueError("No row of the train split has a label.")
    if kinds == {list}:
        return MULTI
    if kinds == {float}:
        if all(label.is_integer() for label in labels):
            raise ValueError(
                f"The labels are whole numbers stored as floats, for example {sorted(set(labels))[:5]}. Are they "
                f"classes or quantities? Pass --problem_type {SINGLE} or {REGRESSION}."
            )
        return REGRESSION
    if kinds == {str} and all(map(is_finite_number, labels)) and not all(map(is_integer, labels)):
        logger.warning(
            f"The labels are numbers written as text: a {REGRESSION}; for classes pass --problem_type {SINGLE}"
        )
        return REGRESSION
    if kinds <= {str, int, bool}:
        return SINGLE
    raise ValueError(
        f"The labels of the train split are of several kinds, {sorted(kind.__name__ for kind in kinds)}. They must be "
        "all names or integers (classes), all lists (several classes for each text), or all floats (regression)."
    )


def is_finite_number(label: Any) -> bool:
    try:
        return math.isfinite(float(label))
    except (TypeError, ValueError):
        return False


def is_integer(label: str) -> bool:
    return label.strip().removeprefix("-").isdecimal()


def keep_usable_rows(
    splits: DatasetDict, text_columns: list[str], label_column: str, problem_type: str, counts: dict
) -> tuple[dict[str, Dataset], dict[str, list]]:
    """The splits without rows that have no usable text or label, and the labels of the rows that are left."""
    kept, labels = {}, {}
    for split, dataset in splits.items():
        split_labels = read_labels(dataset, label_column)
        texts = zip(*(dataset[column][:] for column in text_columns), strict=True)
        faults = [
            text_fault(*row) or label_fault(label, problem_type, split)
            for row, label in zip(texts, split_labels, strict=True)
        ]
        dataset = drop_rows(dataset, faults, split, counts)
        if dataset is not None:
            kept[split] = dataset
            labels[split] = [label for label, fault in zip(split_labels, faults, strict=True) if fault is None]
    return kept, labels


def label_fault(label: Any, problem_type: str, split: str) -> str | None:
    """
    Why the row can not be used; None if it can.

    Raises:
        ValueError: if the label is a list and should not be, or the other way round, or names a class twice.
    """
    if is_missing(label):
        return NO_LABEL
    if isinstance(label, list) != (problem_type == MULTI):
        raise ValueError(
            f"A label of the {split} split is {label!r}; for {problem_type} it must "
            f"{'be a list of classes' if problem_type == MULTI else 'not be a list'}. Is --problem_type right?"
        )
    if problem_type == REGRESSION and not is_finite_number(label):
        return "label is no finite number"
    if problem_type == MULTI:
        if any(map(is_missing, label)):
            return NO_LABEL
        if len(set(label)) < len(label):
            raise ValueError(
                f"A label of the {split} split names a class twice: {label}. It must list the classes that apply, "
                'for example ["a", "c"] or [0, 2], and not hold a 0 or 1 for every class.'
            )
    return None


def count_classes(labels: list) -> Counter:
    return Counter(class_name(one) for label in labels for one in (label if isinstance(label, list) else [label]))


def report_range(labels: dict[str, list]) -> None:
    """Logs the range of the numbers, and refuses to learn a constant."""
    for split, split_labels in labels.items():
        values = np.array(split_labels, dtype=np.float64)
        logger.info(f"  {split}: from {values.min():g} to {values.max():g}, mean {values.mean():.3g}")
        if split == "train" and values.min() == values.max():
            raise ValueError(f"Every label of the train split is {values[0]:g}: there is nothing to learn.")


def numeric_labels(labels: list, names: list[str], problem_type: str) -> list:
    """Ids of classes, 0 and 1 for every class, or numbers: what the model's loss takes."""
    if problem_type == REGRESSION:
        return [float(label) for label in labels]
    ids = {name: index for index, name in enumerate(names)}
    if problem_type == SINGLE:
        return [ids[class_name(label)] for label in labels]
    rows = np.zeros((len(labels), len(names)), dtype=np.float32)
    for row, label in zip(rows, labels, strict=True):
        row[[ids[class_name(one)] for one in label]] = 1.0
    return rows.tolist()


def encode(
    dataset: Dataset, text_columns: list[str], labels: list, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Dataset:
    """Token ids of at most `max_length`, `labels`, and `num_tokens`, the length before the cut."""

    def encode_batch(batch: dict[str, list], rows: list[int]) -> dict[str, list]:
        texts = [batch[column] for column in text_columns]
        encoding = tokenizer(*texts, verbose=False)
        lengths = [len(ids) for ids in encoding["input_ids"]]
        if max(lengths) > max_length:
            encoding = tokenizer(*texts, truncation=True, max_length=max_length)
        return {**encoding, "labels": [labels[row] for row in rows], "num_tokens": lengths}

    return dataset.map(encode_batch, batched=True, with_indices=True, remove_columns=dataset.column_names)


def decide(logits: np.ndarray, problem_type: str) -> np.ndarray:
    """logits [rows, num_labels] -> classes [rows], 0 and 1 [rows, num_labels] (probability 1/2), or numbers [rows]."""
    if problem_type == REGRESSION:
        return logits.squeeze(-1)
    return logits.argmax(axis=-1) if problem_type == SINGLE else (logits > 0).astype(np.int64)


if __name__ == "__main__":
    main()
