"""How good a set of representations looks without any labels, as an `evaluate` module.

    evaluate.load("downstream/metrics/representation_quality").compute(predictions=embeddings)

Notable: everything is computed in float64 with numpy alone. One import per line: `evaluate` reads these lines with a
simple parser to find out what a module needs.
"""

import datasets
import evaluate
import numpy as np


_DESCRIPTION = "Rank, spectrum, spread and similarity of representations (embeddings), without labels."
_CITATION = ""
_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[list[float]]` of shape `[num_samples, num_features]`): the representations z, two or more.

With s_k the singular values of the centred z, eigenvalues l_k = s_k^2 and u = z / |z|, returns:
    rankme: exp(-sum_k p_k log p_k), p_k = s_k / sum_j s_j (Garrido et al., arXiv 2210.02885, there not centred).
    effective_dimension: the participation ratio (sum_k l_k)^2 / sum_k l_k^2 (Gao et al., bioRxiv 214262).
    alpha_req: -slope of the least-squares line of log l_k over log k (Agrawal et al., NeurIPS 2022, "alpha-ReQ");
        null where fewer than two eigenvalues are above rounding.
    mean_cosine: mean of u_i . u_j over i != j (Ethayarajh, arXiv 1909.00512).
    uniformity: log of the mean of exp(-2 |u_i - u_j|^2) over i != j (Wang & Isola, arXiv 2005.10242).
    feature_std: standard deviation over samples, averaged over features (data2vec 2.0, arXiv 2212.07525).

Raises:
    ValueError: for fewer than two samples, values that are not finite, and vectors of length 0.
"""
_ROWS_AT_ONCE = 1024  # the pairs of so many samples with all others are in memory together


class RepresentationQuality(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.List(datasets.Value("float64"))}),
        )

    def _compute(self, predictions):
        states = _as_matrix(predictions)
        directions = _normalise(states)
        num_samples = len(states)
        centred = states - states.mean(axis=0)
        singular_values = np.linalg.svd(centred, compute_uv=False)
        rounding = np.finfo(np.float64).eps * max(states.shape) * np.abs(states).max()
        singular_values = singular_values[singular_values > rounding]
        eigenvalues = singular_values**2

        shares = singular_values / singular_values.sum()
        alpha = None
        if len(eigenvalues) >= 2:
            alpha = -np.polyfit(np.log(np.arange(1, len(eigenvalues) + 1)), np.log(eigenvalues), deg=1)[0]
        kernel_sum = 0.0
        for start in range(0, num_samples, _ROWS_AT_ONCE):
            cosines = directions[start : start + _ROWS_AT_ONCE] @ directions.T
            kernel_sum += np.exp(-4.0 * (1.0 - cosines)).sum()  # |u - v|^2 = 2 - 2 u.v
        num_pairs = num_samples * (num_samples - 1)
        return {
            "rankme": float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0,
            "effective_dimension": float(eigenvalues.sum() ** 2 / (eigenvalues**2).sum()) if len(shares) else 0.0,
            "alpha_req": None if alpha is None else float(alpha),
            "mean_cosine": float((np.square(directions.sum(axis=0)).sum() - num_samples) / num_pairs),
            "uniformity": float(np.log((kernel_sum - num_samples) / num_pairs)),
            "feature_std": float(states.std(axis=0).mean()),
        }


def _as_matrix(vectors):
    matrix = np.asarray(vectors, dtype=np.float64)
    if matrix.ndim != 2 or len(matrix) < 2:
        shape = list(matrix.shape)
        raise ValueError(f"predictions must be two or more vectors, [num_samples, num_features], got {shape}.")
    if not np.isfinite(matrix).all():
        raise ValueError("predictions hold values that are not finite.")
    return matrix


def _normalise(matrix):
    lengths = np.linalg.norm(matrix, axis=1, keepdims=True)
    if not lengths.all():
        raise ValueError(f"predictions hold {int((lengths == 0).sum())} vectors of length 0, which have no direction.")
    return matrix / lengths
