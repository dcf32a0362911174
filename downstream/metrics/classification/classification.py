"""Accuracy, F1 and Matthews correlation, or Pearson and Spearman correlation, as an `evaluate` module.

    evaluate.load("downstream/metrics/classification").compute(predictions=[0, 1], references=[0, 0])
    evaluate.load("downstream/metrics/classification", "regression").compute(predictions=[0.1], references=[0.0])

For machines that cannot reach the Hub, where `evaluate.load("accuracy")` lives. Notable: numpy alone. One import per
line: `evaluate` reads these lines with a simple parser to find out what a module needs.
"""

import datasets
import evaluate
import numpy as np


_DESCRIPTION = "Plain metrics of classification and regression that need no network."
_CITATION = ""
_KWARGS_DESCRIPTION = """
Args:
    predictions, references: one entry per sample: a class (`int`); with the configuration `multi_label` a list of 0
        and 1, one per class; with the configuration `regression` a number.

Returns for classes:
    accuracy: the share of samples whose prediction is right (`multi_label`: right for every class).
    f1_macro: mean over classes of F1 = 2 TP / (2 TP + FP + FN) (van Rijsbergen, Information Retrieval, 1979); classes
        that occur neither in predictions nor in references do not count.
    f1_micro: the same F1 with TP, FP and FN summed over classes.
    mcc: Matthews correlation for any number of classes (Gorodkin, 2004); 0 where all is one class. Not with
        `multi_label`.
Returns for `regression`:
    pearson: the correlation of the values (Pearson, 1895); null where one side is constant.
    spearman: the same of their ranks, ties sharing the mean rank (Spearman, 1904).
    mse: the mean squared error.

Raises:
    ValueError: for no samples, or another configuration.
"""
_CONFIGURATIONS = ("default", "multi_label", "regression")


class Classification(evaluate.Metric):
    def _info(self):
        if self.config_name not in _CONFIGURATIONS:
            raise ValueError(f"The configuration must be one of {_CONFIGURATIONS}, got {self.config_name!r}.")
        kind = datasets.Value("float64" if self.config_name == "regression" else "int64")
        kind = datasets.List(kind) if self.config_name == "multi_label" else kind
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": kind, "references": kind}),
        )

    def _compute(self, predictions, references):
        predictions, references = np.asarray(predictions), np.asarray(references)
        if len(references) == 0:
            raise ValueError("There are no samples to compute a metric of.")
        if self.config_name == "regression":
            return {
                "pearson": _pearson(predictions, references),
                "spearman": _pearson(_ranks(predictions), _ranks(references)),
                "mse": float(np.square(predictions - references).mean()),
            }
        if self.config_name == "multi_label":
            return {"accuracy": float((predictions == references).all(axis=1).mean()), **_f1(predictions, references)}
        classes = np.union1d(predictions, references)
        predicted, actual = predictions[:, None] == classes, references[:, None] == classes  # [num_samples, classes]
        return {
            "accuracy": float((predictions == references).mean()),
            **_f1(predicted, actual),
            "mcc": _pearson(predicted, actual) or 0.0,
        }


def _f1(predicted, actual):
    hits = (predicted & actual).sum(axis=0)
    sizes = predicted.sum(axis=0) + actual.sum(axis=0)  # 2 TP + FP + FN
    f1 = 2 * hits[sizes > 0] / sizes[sizes > 0]
    return {
        "f1_macro": float(f1.mean()) if len(f1) else 0.0,
        "f1_micro": float(2 * hits.sum() / max(1, sizes.sum())),
    }


def _pearson(x, y):
    """Of vectors, or summed over the columns of matrices: with one-hot rows that is Gorodkin's coefficient."""
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    scale = np.sqrt(np.square(x).sum() * np.square(y).sum())
    return float((x * y).sum() / scale) if scale > 0 else None


def _ranks(values):
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]
