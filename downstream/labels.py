"""Labels in the shapes that people have: what kind they are, which classes there are, and which cannot be used."""

import ast
import logging
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

from datasets import ClassLabel, Dataset, Value
from transformers import PreTrainedConfig

from .arguments import MULTI, REGRESSION, SINGLE


logger = logging.getLogger(__name__)


IGNORED = -100  # what the loss passes over
NOTHING_TO_LEARN = (IGNORED, str(IGNORED))  # what data sets write where nothing is to be learned or judged
HIDDEN = (-1, "-1", "-1.0")  # what they write throughout a split whose labels are kept secret
NO_LABEL = "label missing"
MAX_CLASSES_LISTED = 20


# ---- reading ----


def read_labels(dataset: Dataset, column: str) -> list:
    """
    The column's values: names in place of the numbers of a `ClassLabel`, and None where there is no label, be it a
    null, NaN, an empty field, -100, a `ClassLabel`'s -1, or the -1 of a split that has nothing else (a hidden label).
    In lists -100 stays, because a word without a tag is not a reason to leave its sentence out.

    Raises:
        ValueError: for lists that are written as text: each would be a class of its own.
    """
    feature = inner_feature(dataset, column)
    values = dataset[column][:]
    given = [value for value in flatten(values) if value not in (None, "")]
    if lists := [value for value in given if isinstance(value, str) and is_list_as_text(value)]:
        raise ValueError(
            f"The column {column!r} holds lists that are written as text, for example {lists[0]!r}, as a csv file has "
            "them, or rows of which some have a list and others have none. Give json, jsonl or parquet with a list in "
            "every row."
        )
    if given and all(value in HIDDEN for value in given):
        return [None] * len(values)

    def read(value: Any) -> Any:
        if isinstance(value, list):
            return [IGNORED if one in NOTHING_TO_LEARN else read(one) for one in value]
        if value in (None, "", *NOTHING_TO_LEARN) or value != value:  # a field of numbers left empty is not a number
            return None
        if isinstance(feature, ClassLabel):
            return None if value < 0 else feature.names[value]
        return value

    return [read(value) for value in values]


def inner_feature(dataset: Dataset, column: str) -> Any:
    """The type of the column's values or, where they are lists, of what is in the lists."""
    feature = dataset.features[column]
    return getattr(feature, "feature", feature)


def flatten(labels: list) -> list:
    """The labels themselves, of lists of labels those in the lists."""
    return [one for label in labels for one in (label if isinstance(label, list) else [label])]


# ---- kinds ----


def find_problem_type(dataset: Dataset, column: str, labels: list) -> str:
    """
    Lists are several classes; names and integers are classes; numbers with a fraction, also as text, a regression.

    Args:
        dataset (`Dataset`), column (`str`): The train split, whose features tell the kind.
        labels (`list`): Its labels, as `read_labels` gives them.

    Raises:
        ValueError: if there are no labels, they are whole numbers written as 1.0, which may be either, or most but not
            all are numbers with a fraction.
    """
    feature, given = dataset.features[column], [label for label in labels if label is not None]
    if not given:
        raise ValueError("No row of the train split has a label.")
    if isinstance(given[0], list):
        return MULTI
    if isinstance(feature, ClassLabel):
        return SINGLE
    if not isinstance(feature, Value):
        raise ValueError(
            f"The labels of the train split are {feature}, for example {given[0]!r}. They must be all names or "
            "integers (classes), all lists (several classes for each text), or all numbers (regression)."
        )
    is_text = feature.dtype in ("string", "large_string", "string_view")
    is_whole = feature.dtype.endswith(", 0)")  # a decimal without digits behind the point
    is_number = feature.dtype.startswith(("float", "decimal")) and not is_whole
    numbers = [label for label in given if is_finite_number(label)]
    if is_text and len(given) > len(numbers) > len(given) / 2 and has_fractions(numbers):
        others = sorted({label for label in given if not is_finite_number(label)})
        raise ValueError(
            f"Most labels of the train split are numbers with a fraction, and {len(given) - len(numbers):,} are not: "
            f"{others[:5]}. Correct them or leave these rows out; or, if all are names, pass --problem_type {SINGLE}."
        )
    if not is_number and not (is_text and len(numbers) == len(given)):
        return SINGLE
    if is_text and all(map(is_integer, given)):
        return SINGLE
    if all(float(label).is_integer() for label in given if is_finite_number(label)):
        raise ValueError(
            f"The labels are whole numbers stored as floats, for example {sorted(set(given))[:5]}. Are they "
            f"classes or quantities? Pass --problem_type {SINGLE} or {REGRESSION}."
        )
    return REGRESSION


def is_finite_number(label: Any) -> bool:
    try:
        return math.isfinite(float(label)) and "_" not in str(label)  # which Python allows, as in 1_0
    except (TypeError, ValueError):
        return False


def has_fractions(labels: Iterable[Any]) -> bool:
    """Whether labels are numbers, also as text, and some have a fraction: quantities, and no classes."""
    labels = list(labels)
    return all(map(is_finite_number, labels)) and not all(float(label).is_integer() for label in labels)


def is_list_as_text(label: str) -> bool:
    try:
        return label.lstrip().startswith("[") and isinstance(ast.literal_eval(label.strip()), list)
    except (ValueError, SyntaxError):  # a name that begins with a bracket
        return False


def is_integer(label: str) -> bool:
    return label.strip().removeprefix("-").isdecimal()


def check_lists_of_classes(labels: list, split: str) -> None:
    """
    Raises:
        ValueError: if lists that should name the classes of a text hold a 0 or 1 for every class instead, or name a
            class twice.
    """
    lists = [label for label in labels if label]
    names = [[class_name(one) for one in label] for label in lists]
    advice = (
        'It must list the classes that apply, for example [0, 2] or ["a", "c"], and not hold a 0 or 1 for every '
        "class. Write rows such as [0, 1, 1] as [1, 2]; where exactly one class applies, write its number alone."
    )
    for label, given in zip(lists, names, strict=True):
        if len(set(given)) < len(given):
            raise ValueError(f"A label of the {split} split names a class twice: {label}. {advice}")
    if names and all(set(given) in ({"0", "1"}, {"False", "True"}) for given in names):
        raise ValueError(f"Every label of the {split} split holds both 0 and 1, for example {lists[0]}. {advice}")


# ---- classes ----


def class_name(value: Any) -> str:
    """1, 1.0, "1" and "1.0" are the same class: formats and splits differ in how they store it. "007" is another."""
    return str(value).removesuffix(".0") if is_finite_number(value) else str(value)


def find_class_names(dataset: Dataset, column: str, labels: list, config: PreTrainedConfig) -> list[str]:
    """
    The classes of `labels` (or lists of labels) in the order of their ids: that of a `ClassLabel`, else sorted. Where
    `config`, that of a model fine-tuned before, has the same classes, its order wins, because its head has it.
    """
    feature = inner_feature(dataset, column)
    if isinstance(feature, ClassLabel):
        names = list(feature.names)
    else:
        names = sorted({class_name(value) for value in flatten(labels) if value not in (None, IGNORED)})
        if all(map(is_integer, names)):
            names.sort(key=int)
    known = [config.id2label[index] for index in sorted(config.id2label)]
    return known if set(known) == set(names) else names


def check_classes(counts: dict[str, Counter], names: list[str]) -> None:
    """
    Logs how often each class occurs in each split, and refuses splits that do not fit each other.

    Args:
        counts (`dict[str, Counter]`): for each split how often each class occurs.
        names (`list[str]`): the classes of the model.

    Raises:
        ValueError: if a split has a class that is not in `names` or none that train has, or train has fewer than two.
    """
    occurring = [name for name in names if counts["train"][name]]
    if len(occurring) < 2:
        raise ValueError(f"The train split has one class only, {occurring}: there is nothing to tell it from.")
    for split, occurs in counts.items():
        unknown = sorted(set(occurs) - set(names))
        if not unknown and occurs and occurs.keys().isdisjoint(occurring):
            unknown = sorted(occurs)
        if unknown:
            raise ValueError(
                f"The {split} split has labels that the train split does not have, and that cannot be learned: "
                f"{unknown[:MAX_CLASSES_LISTED]}, {sum(occurs[name] for name in unknown):,} times. The train split "
                f"has {occurring[:MAX_CLASSES_LISTED]}. Correct the labels, or remove those rows."
            )
    logger.info(f"{len(names)} classes")
    for split, occurs in counts.items():
        listed = ", ".join(f"{name}: {occurs[name]:,}" for name in names[:MAX_CLASSES_LISTED])
        logger.info(f"  {split}: {listed}{', ...' if len(names) > MAX_CLASSES_LISTED else ''}")
        if absent := [name for name in names if not occurs[name]]:
            note = ", which cannot be learned and count as mistakes elsewhere" if split == "train" else ""
            logger.warning(f"  {split} lacks {len(absent)} of them{note}: {absent[:MAX_CLASSES_LISTED]}")
