"""Labels in every shape in which data sets have them, and what is said of those that cannot be used."""

from collections import Counter
from decimal import Decimal

import datasets
import pyarrow
import pytest

from tjepa.downstream.labels import (
    IGNORED,
    check_classes,
    check_lists_of_classes,
    class_name,
    find_problem_type,
    has_fractions,
    read_labels,
)


@pytest.mark.parametrize(
    ("labels", "read"),
    [
        ([-1, -1], [None, None]),  # a hidden split
        (["-1", "-1.0", None], [None, None, None]),
        ([-1.0, -1.0], [None, None]),
        ([[-1], [-1, -1]], [None, None]),
        ([0, 0], [0, 0]),  # one class, but nothing is hidden
        ([0, -1], [0, -1]),  # a class named -1
        ([1, -100], [1, None]),
        ([0.0, 1.0, float("nan")], [0.0, 1.0, None]),
        (["a", "-100", ""], ["a", None, None]),
        ([[1, -100], [-100], []], [[1, IGNORED], [IGNORED], []]),  # a word without a tag keeps its sentence
    ],
)
def test_missing_and_hidden_labels(labels, read):
    assert read_labels(datasets.Dataset.from_dict({"label": labels}), "label") == read


def test_class_labels_in_lists_are_read_as_names():
    feature = datasets.Sequence(datasets.ClassLabel(names=["pos", "neg"]))
    dataset = datasets.Dataset.from_dict({"label": [[0, 1], [1]]}, features=datasets.Features({"label": feature}))
    assert read_labels(dataset, "label") == [["pos", "neg"], ["neg"]]


def test_one_class_stored_in_several_ways():
    values = (1, 1.0, "1", "1.0", 1.5, "1.5", "007", "v1.0")
    assert [class_name(value) for value in values] == ["1", "1", "1", "1", "1.5", "1.5", "007", "v1.0"]


def test_quantities_are_no_classes():
    assert has_fractions([0.5, 1, 2.0]) and has_fractions(["0.5", "1"])
    assert not has_fractions([1.0, 2]) and not has_fractions(["1.0", "2"]) and not has_fractions(["1.5", "two"])


def test_numbers_with_a_fraction_are_quantities_in_any_type():
    decimals = datasets.Dataset(pyarrow.table({"label": pyarrow.array([Decimal("0.5"), Decimal("2.0"), None])}))
    assert find_problem_type(decimals, "label", read_labels(decimals, "label")) == "regression"
    whole = datasets.Dataset(pyarrow.table({"label": pyarrow.array([Decimal(0), Decimal(1)])}))
    assert find_problem_type(whole, "label", read_labels(whole, "label")) == "single_label_classification"
    names = datasets.Dataset.from_dict({"label": ["1_0", "1_1"]})  # numbers to Python alone
    assert find_problem_type(names, "label", read_labels(names, "label")) == "single_label_classification"
    mixed = datasets.Dataset.from_dict({"label": ["0.5", "1.5", "N/A", "2"]})
    with pytest.raises(
        ValueError, match=r"numbers with a fraction, and 1 are not: \['N/A'\]. .*--problem_type single"
    ):
        find_problem_type(mixed, "label", read_labels(mixed, "label"))


def test_lists_written_as_text_are_not_classes():
    for text in ('["a", "b"]', "['a']", "[1, 2]"):
        with pytest.raises(ValueError, match="'label' holds lists that are written as text, for example .*json"):
            read_labels(datasets.Dataset.from_dict({"label": ["b", text]}), "label")
    names = ["[UNK]", "[a] b", "["]
    assert read_labels(datasets.Dataset.from_dict({"label": names}), "label") == names


def test_refused_labels_are_named():
    nested = datasets.Dataset.from_dict({"label": [{"a": 1}, {"a": 2}]})
    with pytest.raises(ValueError, match=r"for example \{'a': 1\}. They must be all names"):
        find_problem_type(nested, "label", read_labels(nested, "label"))
    with pytest.raises(ValueError, match=r"train split names a class twice: \['b', 'b'\]"):
        check_lists_of_classes([["a"], [], ["b", "b"]], "train")
    with pytest.raises(ValueError, match=r"Every label of the test split holds both 0 and 1, for example \[0, 1\]"):
        check_lists_of_classes([[0, 1], None, [1, 0]], "test")
    check_lists_of_classes([[0, 1], [1]], "test")
    check_lists_of_classes([[0, 2], [1, 2]], "test")


def check(names: str, **splits: str) -> None:
    check_classes({split: Counter(occurring) for split, occurring in splits.items()}, list(names))


def test_classes_of_splits_are_counted(caplog):
    with caplog.at_level("INFO", logger="tjepa"):
        check("ab", train="aab", validation="", test="bb")
    assert caplog.messages == [
        "2 classes",
        "  train: a: 2, b: 1",
        "  validation: a: 0, b: 0",
        "  validation lacks 2 of them: ['a', 'b']",
        "  test: a: 0, b: 2",
        "  test lacks 1 of them: ['a']",
    ]
    caplog.clear()
    letters = "abcdefghijklmnopqrstu"
    with caplog.at_level("INFO", logger="tjepa"):
        check(letters, train=letters[:-1])
    assert caplog.messages[1].endswith("t: 1, ...")  # twenty are listed
    assert caplog.messages[2].endswith(
        "lacks 1 of them, which cannot be learned and count as mistakes elsewhere: ['u']"
    )
    caplog.clear()
    with caplog.at_level("INFO", logger="tjepa"):
        check(letters[:-1], train=letters[:-1])
    assert caplog.messages[1].endswith("t: 1")


def test_splits_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"one class only, \['a'\]"):
        check("ab", train="aaa")
    with pytest.raises(ValueError, match=r"test split has labels .*: \['c'\], 2 times. The train.*\['a', 'b'\]"):
        check("ab", train="ab", test="acc")
    with pytest.raises(ValueError, match=r"test split has labels .*: \['c', 'd'\], 3 times"):  # none that train has
        check("abcd", train="ab", test="ccd")
    check("abcd", train="ab", test="acd")
