"""The `evaluate` modules, loaded from their folders, against cases computed by hand."""

import math

import evaluate
import pytest

from helpers import REPOSITORY


METRICS = REPOSITORY / "downstream" / "metrics"


@pytest.fixture
def load(tmp_path):
    def load(name, configuration=None):
        return evaluate.load(str(METRICS / name), configuration, cache_dir=str(tmp_path))

    return load


def test_representation_quality_by_hand(load):
    metric = load("representation_quality")
    cross = [[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]  # two equal directions
    results = metric.compute(predictions=cross)
    assert results == pytest.approx(
        {
            "rankme": 2.0,
            "effective_dimension": 2.0,
            "alpha_req": 0.0,
            "mean_cosine": -1 / 3,  # of the six pairs four are at right angles and two opposite
            "uniformity": math.log((4 * math.exp(-4) + 2 * math.exp(-8)) / 6),
            "feature_std": math.sqrt(0.5),
        },
        abs=1e-9,
    )
    results = metric.compute(predictions=[[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]])  # singular values 2 : 1
    assert results["rankme"] == pytest.approx(math.exp(-(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))))
    assert results["effective_dimension"] == pytest.approx((8 + 2) ** 2 / (8**2 + 2**2))
    assert results["alpha_req"] == pytest.approx(2.0)  # eigenvalues 4 : 1 over k = 1, 2


def test_collapsed_representations(load):
    results = load("representation_quality").compute(predictions=[[0.1, 0.7, 0.3]] * 5)
    assert results["rankme"] == results["effective_dimension"] == 0.0 and results["alpha_req"] is None
    assert results["mean_cosine"] == pytest.approx(1.0) and results["uniformity"] == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        ([[1.0, 2.0]], "two or more"),
        ([[1.0, 2.0], [0.0, 0.0]], "1 vectors of length 0"),
        ([[1.0, 2.0], [math.nan, 0.0]], "not finite"),
    ],
)
def test_representations_that_are_refused(load, predictions, message):
    with pytest.raises(ValueError, match=message):
        load("representation_quality").compute(predictions=predictions)


def test_classes_by_hand(load):
    results = load("classification").compute(predictions=[1, 1, 1, 0], references=[1, 1, 0, 1])
    # class 1: TP 2, FP 1, FN 1; class 0: TP 0, FP 1, FN 1; MCC = (2*0 - 1*1) / sqrt(3*3*1*1)
    assert results == pytest.approx({"accuracy": 0.5, "f1_macro": (4 / 6 + 0) / 2, "mcc": -1 / 3})
    assert load("classification").compute(predictions=[1, 1], references=[0, 1])["mcc"] == 0.0


def test_several_labels_by_hand(load):
    results = load("classification", "multi_label").compute(predictions=[[1, 0], [1, 1]], references=[[1, 0], [0, 1]])
    assert results == pytest.approx({"accuracy": 0.5, "f1_macro": (2 / 3 + 1) / 2, "f1_micro": 4 / 5})


def test_regression_by_hand(load):
    results = load("classification", "regression").compute(predictions=[1, 2, 2, 4], references=[1, 2, 3, 10])
    # centred: (-1.25, -.25, -.25, 1.75) and (-3, -2, -1, 6); ranks (1, 2.5, 2.5, 4) and (1, 2, 3, 4)
    assert results["pearson"] == pytest.approx(15.0 / math.sqrt(4.75 * 50))
    assert results["spearman"] == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert results["mse"] == pytest.approx((0 + 0 + 1 + 36) / 4)
    assert load("classification", "regression").compute(predictions=[1, 1], references=[1, 2])["pearson"] is None


def test_chunks_by_hand(load):
    references = [["B-NP", "I-NP", "O", "B-VP", "B-NP"], ["O", "B-PP"]]
    predictions = [["B-NP", "I-NP", "O", "I-VP", "I-NP"], ["B-PP", "I-PP"]]
    # true: NP 0-2, VP 3, NP 4, PP 1; predicted: NP 0-2, VP 3 (I-VP after O begins), NP 4 (another type), PP 0-2
    results = load("tagging").compute(predictions=predictions, references=references)
    assert results == pytest.approx({"accuracy": 3 / 7, "precision": 3 / 4, "recall": 3 / 4, "f1": 3 / 4})


@pytest.mark.parametrize(
    ("tags", "same_chunks", "other_chunks"),
    [
        (["B-X", "I-X"], ["I-X", "I-X"], ["B-X", "B-X"]),
        (["B-X", "E-X", "S-X"], ["B-X", "I-X", "B-X"], ["B-X", "I-X", "I-X"]),
        (["B-X", "B-Y", "I-Y"], ["I-X", "I-Y", "I-Y"], ["B-X", "I-Y", "B-Y"]),
        (["E-X", "I-X"], ["S-X", "S-X"], ["B-X", "I-X"]),
    ],
)
def test_what_a_chunk_is(load, tags, same_chunks, other_chunks):
    metric = load("tagging")
    assert metric.compute(predictions=[same_chunks], references=[tags])["f1"] == 1.0
    assert metric.compute(predictions=[other_chunks], references=[tags])["f1"] < 1.0


def test_tags_without_chunks(load):
    metric = load("tagging")
    assert metric.compute(predictions=[["NN", "VB"]], references=[["NN", "NN"]]) == {"accuracy": 0.5}
    assert metric.compute(predictions=[["O", "O"]], references=[["O", "B-X"]])["f1"] == 0.0
    with pytest.raises(ValueError, match="2 predicted tags and 1 true"):
        metric.compute(predictions=[["O", "O"]], references=[["O"]])
    with pytest.raises(ValueError, match="no words"):
        metric.compute(predictions=[[]], references=[[]])
