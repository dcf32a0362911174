"""Accuracy, F1 and Matthews correlation, or Pearson and Spearman correlation, as an `evaluate` module.

    evaluate.load("downstream/metrics/classification").compute(predictions=[0, 1], references=[0, 0])
    evaluate.load("downstream/metrics/classification", "regression").compute(predictions=[0.1], references=[0.0])

For machines that cannot reach the Hub, where `evaluate.load("accuracy")` lives; scikit-learn and scipy compute it. One
import per line: `evaluate` reads these lines with a simple parser to find out what a module needs.
"""

import datasets
import evaluate
import numpy as np
from scipy import stats
from sklearn import metrics


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
    f1_micro: the same F1 with TP, FP and FN summed over classes (`multi_label` only: else it is the accuracy).
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
            is_constant = np.ptp(predictions) == 0 or np.ptp(references) == 0
            correlations = {"pearson": stats.pearsonr, "spearman": stats.spearmanr}
            return {
                **{n: None if is_constant else float(f(predictions, references)[0]) for n, f in correlations.items()},
                "mse": float(metrics.mean_squared_error(references, predictions)),
            }
        results = {"accuracy": float(metrics.accuracy_score(references, predictions))}
        kinds = ("macro", "micro") if self.config_name == "multi_label" else ("macro",)
        for kind in kinds:
            f1 = metrics.f1_score(references, predictions, average=kind, zero_division=np.nan)
            results[f"f1_{kind}"] = float(np.nan_to_num(f1))
        if self.config_name == "default":
            results["mcc"] = float(metrics.matthews_corrcoef(references, predictions))
        return results
