"""How a frozen encoder is judged, one way everywhere: mean-pool, whiten, logistic regression, accuracy.

Whitening is not a detail. Trained encoders keep much of what they know in directions of small variance, which a
regularised probe on the raw features never uses; without whitening an untrained encoder can win by default.
The statistics come from the probe's training part alone, the strength from its validation part, the verdict from its
test part. Everything after the encoder runs on the CPU in float64: small, deterministic, and free of scikit-learn.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


# scikit-learn's C, in half decades. From strong to weak, so that each fit starts near its optimum.
STRENGTHS = tuple(10 ** (exponent / 2) for exponent in range(-8, 5))


class ProbeResult(NamedTuple):
    accuracy: float  # on the test part
    strength: float  # scikit-learn's C, chosen on the validation part
    validation_accuracy: float  # at that strength: the maximum of a search, so a little optimistic


def embed_texts(
    model: torch.nn.Module,
    tokenizer,
    texts: Sequence[str],
    max_length: int,
    batch_size: int = 64,
    add_special_tokens: bool = False,
) -> Tensor:
    """
    One vector per text: the mean of the last hidden state over the text's tokens.

    Args:
        model: any transformers encoder, called with `input_ids` and `attention_mask`, int64 `[batch, length]`. It runs
            where its parameters are, in eval mode, and gets its training flags back.
        tokenizer: any transformers tokenizer; it needs no padding token.
        texts: sequence of `num_texts` strings.
        max_length: texts are cut off after this many tokens.
        batch_size: texts per forward.
        add_special_tokens: whether the tokenizer adds its own, as BERT expects; T-JEPA is trained without. They
            are tokens like any other in the mean.

    Returns:
        float32 `[num_texts, hidden_size]` on the CPU, in the order of `texts`.

    Raises:
        ValueError: a text, or `texts` itself, is empty: the mean over no tokens does not exist.
    """
    if not len(texts):
        raise ValueError("`texts` is empty; embed_texts needs at least one text.")
    encoded = tokenizer(list(texts), truncation=True, max_length=max_length, add_special_tokens=add_special_tokens)[
        "input_ids"
    ]
    lengths = [len(ids) for ids in encoded]
    if 0 in lengths:
        raise ValueError(
            f"Text {lengths.index(0)} of {len(texts)} has no tokens: {texts[lengths.index(0)]!r}. Every text needs at "
            "least one; drop empty texts, or pass add_special_tokens=True if the tokenizer has special tokens."
        )
    device = next(model.parameters()).device
    by_length = sorted(range(len(encoded)), key=lengths.__getitem__)  # neighbours of like length: little padding
    pooled = []
    training_flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            for start in range(0, len(encoded), batch_size):
                ids = [torch.tensor(encoded[index]) for index in by_length[start : start + batch_size]]
                input_ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)  # [batch, length], padded with 0
                mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
                input_ids, mask = input_ids.to(device), mask.to(device)
                hidden = model(input_ids=input_ids, attention_mask=mask).last_hidden_state.float()
                # masked_fill, not a product: whatever a padded position holds, NaN included, stays out
                hidden = hidden.masked_fill(mask[..., None] == 0, 0.0)  # [batch, length, hidden]
                pooled.append((hidden.sum(1) / mask.sum(1, keepdim=True)).cpu())  # [batch, hidden]
    finally:
        for module, was_training in training_flags:  # one by one: a part may be in eval mode for good
            module.training = was_training
    features = torch.empty(len(encoded), pooled[0].shape[1])  # made outside inference mode: an ordinary tensor
    features[torch.tensor(by_length)] = torch.cat(pooled)
    return features


def fit_whitening(train_features: Tensor) -> tuple[Tensor, Tensor]:
    """
    Centring and PCA whitening: `whiten` gives the training features mean 0 and covariance I (over N, not N - 1).

    Args:
        train_features: floating `[num_texts, hidden_size]`.

    Returns:
        mean `[hidden_size]` and projection `[hidden_size, rank]`, float64: the eigenvectors of the covariance divided
        by the roots of their eigenvalues. Directions whose variance is float32 rounding are dropped (rank 0 if
        all features are equal).
    """
    features = train_features.double()
    mean = features.mean(0)
    centred = features - mean
    variances, directions = torch.linalg.eigh(centred.T @ centred / len(features))
    # Features were computed in float32, so their rounding is relative to their size, the mean included.
    rounding = len(mean) * torch.finfo(torch.float32).eps
    kept = variances > rounding**2 * (variances.max() + mean.square().max())
    return mean, directions[:, kept] / variances[kept].sqrt()


def whiten(features: Tensor, mean: Tensor, projection: Tensor) -> Tensor:
    """`(features - mean) @ projection`: `[num_texts, hidden_size]` to float64 `[num_texts, rank]`."""
    return (features.double() - mean) @ projection


def fit_logistic_regression(
    features: Tensor, labels: Tensor, num_classes: int, strength: float, start: Tensor | None = None
) -> Tensor:
    """
    Multinomial logistic regression by full-batch L-BFGS, in float64. It minimises, over N texts,

        1/N · Σ_i cross_entropy(W x_i + b, y_i)  +  ‖W‖² / (2 · C · N)        with b not regularised,

    which is scikit-learn's `LogisticRegression(C=C)`: the same optimum for the same C.

    Args:
        features: floating `[num_texts, width]`.
        labels: int64 `[num_texts]`, each in `[0, num_classes)`.
        num_classes: number of classes.
        strength: C; the larger, the weaker the regularisation.
        start: weights to begin from, as returned here; zeros by default.

    Returns:
        float64 `[num_classes, width + 1]`: W, and b in the last column. Logits are `x @ W.T + b`.

    Raises:
        ValueError: features and labels differ in number, a label is out of range, or the strength is not positive.
    """
    if len(features) != len(labels):
        raise ValueError(f"{len(features)} features but {len(labels)} labels; every row of features needs one label.")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"Labels go from {labels.min()} to {labels.max()}, but num_classes={num_classes} allows 0 to "
            f"{num_classes - 1}; renumber the labels or raise num_classes."
        )
    if not strength > 0:
        raise ValueError(f"strength is {strength}; it must be positive (scikit-learn's C, for example 0.01).")
    features = features.double()
    weights = torch.zeros(num_classes, features.shape[1] + 1, dtype=torch.float64) if start is None else start.clone()
    weights.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=500, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        penalty = weights[:, :-1].square().sum() / (2 * strength * len(labels))
        loss = F.cross_entropy(_logits(features, weights), labels) + penalty
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weights.detach()


def linear_probe(
    train: Tensor,
    train_labels: Tensor,
    validation: Tensor,
    validation_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    whiten: bool = True,
) -> ProbeResult:
    """
    The probe: whitened features, logistic regression at each of `STRENGTHS`, the best on validation judged on test.

    Args:
        train, validation, test: floating `[num_texts, hidden_size]`, as from `embed_texts`.
        train_labels, validation_labels, test_labels: int64 `[num_texts]`, from 0 up.
        whiten: PCA whitening; without it the features are only centred.

    Returns:
        `ProbeResult`. Of equally good strengths the one that regularises most.
    """
    mean, projection = fit_whitening(train)
    if not whiten:
        projection = torch.eye(len(mean), dtype=torch.float64)
    train, validation, test = ((part.double() - mean) @ projection for part in (train, validation, test))
    num_classes = int(torch.cat([train_labels, validation_labels, test_labels]).max()) + 1
    weights, best = None, None
    for strength in STRENGTHS:
        weights = fit_logistic_regression(train, train_labels, num_classes, strength, start=weights)
        validation_accuracy = _accuracy(validation, validation_labels, weights)
        if best is None or validation_accuracy > best.validation_accuracy:
            best = ProbeResult(_accuracy(test, test_labels, weights), strength, validation_accuracy)
    return best


def nearest_neighbours(query_features: Tensor, corpus_features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """
    The `k` texts of the corpus nearest to each query, by cosine after the corpus's mean is taken off (the mean is most
    of what two raw features share). For whitened neighbours pass both through `whiten` first.

    Args:
        query_features: floating `[num_queries, hidden_size]`.
        corpus_features: floating `[num_texts, hidden_size]`.
        k: neighbours per query, at most `num_texts`.

    Returns:
        cosines float64 `[num_queries, k]`, the largest first, and int64 indices into the corpus, same shape.

    Raises:
        ValueError: `k` is not between 1 and the size of the corpus.
    """
    if not 1 <= k <= len(corpus_features):
        raise ValueError(f"k is {k}, but the corpus has {len(corpus_features)} texts; choose k from 1 to that.")
    mean = corpus_features.double().mean(0)
    queries, corpus = (F.normalize(part.double() - mean, dim=1) for part in (query_features, corpus_features))
    return tuple((queries @ corpus.T).topk(k, dim=1))


def _logits(features: Tensor, weights: Tensor) -> Tensor:
    return F.linear(features, weights[:, :-1], weights[:, -1])


def _accuracy(features: Tensor, labels: Tensor, weights: Tensor) -> float:
    return (_logits(features, weights).argmax(1) == labels).double().mean().item()
