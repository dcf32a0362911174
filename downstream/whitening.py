"""Whitening of embeddings, without which the cosine of two texts says little: all vectors point much the same way.

Trained encoders keep much of what they know in directions of small variance. Whitening (Su et al., arXiv 2103.15316)
takes the mean away and gives every direction the variance 1, with the statistics of texts that need no labels.
"""

import logging
import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from sklearn.covariance import ledoit_wolf
from sklearn.decomposition import PCA
from torch import Tensor

from ..corpus.faults import find_fault
from .embedding import embed_tokens, encode_texts


logger = logging.getLogger(__name__)

VECTORS_PER_DIMENSION = 10  # that a covariance is estimated from; more change the similarities little
MIN_VECTORS = 2000
MIN_SENTENCE_CHARS = 10


class Whitening(NamedTuple):
    """
    What a linear layer does to embeddings: `weight` float32 `[num_dimensions, hidden_size]`, of the directions of
    largest variance first, and `bias` float32 `[num_dimensions]`.
    """

    weight: Tensor
    bias: Tensor

    def __call__(self, embeddings: Tensor) -> Tensor:
        """`[num_texts, hidden_size]` to `[num_texts, num_dimensions]`."""
        return torch.nn.functional.linear(embeddings, self.weight, self.bias)

    @classmethod
    def fit(cls, embeddings: Tensor, num_dimensions: int | None = None) -> "Whitening":
        """
        Args:
            embeddings: floating `[num_texts, hidden_size]`, whose mean becomes 0 and whose covariance I.
            num_dimensions: how many directions are kept. Default: all that are more than float32 rounding.

        Raises:
            ValueError: for fewer texts than dimensions, or for more dimensions than there are.
        """
        num_texts, hidden_size = embeddings.shape
        if num_dimensions is not None and not 1 <= num_dimensions <= hidden_size:
            raise ValueError(f"Embeddings have {hidden_size} dimensions; whitening cannot keep {num_dimensions}.")
        if num_texts <= (num_dimensions or hidden_size):
            raise ValueError(
                f"{num_texts} vectors of texts are too few to whiten {num_dimensions or hidden_size} dimensions with: "
                f"it takes more than dimensions, and is good with {VECTORS_PER_DIMENSION} for each."
            )
        whitening = fit_whitening(embeddings)
        if num_dimensions is not None and whitening.n_components_ < num_dimensions:
            logger.warning(
                f"Embeddings have {whitening.n_components_} dimensions in place of {num_dimensions}: in all "
                "others the texts differ by rounding alone."
            )
        scale = np.sqrt(whitening.explained_variance_[:num_dimensions])
        weight = whitening.components_[:num_dimensions] / scale[:, None]
        return cls(torch.from_numpy(weight).float(), torch.from_numpy(-weight @ whitening.mean_).float())

    @classmethod
    def fit_to_few(cls, embeddings: Tensor) -> "Whitening":
        """
        As `fit`, of however few texts: their covariance is drawn towards a multiple of I as far as their number asks
        for (Ledoit & Wolf, 2004). With two texts and more for each dimension `fit` is better.
        """
        features = as_array(embeddings)
        mean = features.mean(0)
        covariance = np.eye(len(mean))
        if len(features) > 1:
            covariance = ledoit_wolf(features - mean, assume_centered=True)[0]
        variances, directions = np.linalg.eigh(covariance)
        weight = directions.T[::-1] / np.sqrt(variances[::-1].clip(np.finfo(np.float32).eps))[:, None]
        return cls(torch.from_numpy(weight).float(), torch.from_numpy(-weight @ mean).float())


def fit_whitening(train_features: Tensor) -> PCA:
    """
    Centring and PCA whitening: `transform` gives the training features mean 0 and covariance I.

    Args:
        train_features: floating `[num_texts, hidden_size]`.

    Returns:
        A fitted `PCA`, whose `transform` takes `[num_texts, hidden_size]` to float64 `[num_texts, rank]`. Directions
        whose variance is float32 rounding are dropped, but for the first.
    """
    features = as_array(train_features)
    spectrum = PCA(svd_solver="covariance_eigh").fit(features).explained_variance_
    # Features were computed in float32, so their rounding is relative to their size, the mean included.
    rounding = features.shape[1] * np.finfo(np.float32).eps
    rank = (spectrum > rounding**2 * (spectrum.max() + np.square(features.mean(0)).max())).sum()
    return PCA(int(max(1, rank)), whiten=True, svd_solver="covariance_eigh").fit(features)


def as_array(features: Tensor) -> np.ndarray:
    return features.double().cpu().numpy()


def fit_text_whitening(
    model: torch.nn.Module, tokenizer, texts: Iterable[str | None], max_length: int, num_dimensions: int | None = None
) -> Whitening:
    """
    The whitening of an encoder's embeddings, fitted on texts such as it will read. Of each text it reads the whole and
    one sentence, because long and short texts differ in their statistics, and queries are short.

    Args:
        model, tokenizer, max_length: as in `embed_texts`.
        texts: only as many are read as the statistics need; those that cannot be used are passed over.
        num_dimensions: as in `Whitening.fit`.

    Raises:
        ValueError: for too few texts.
    """
    wanted = max(MIN_VECTORS, VECTORS_PER_DIMENSION * model.config.hidden_size)
    rng, chosen = np.random.default_rng(0), {}  # texts, each once
    for text in texts:
        if find_fault(text) is None:
            parts = sentences(text)
            chosen |= {text: None, parts[rng.integers(len(parts))]: None}
        if len(chosen) >= wanted:
            break
    if not chosen:
        raise ValueError("There is no text to fit a whitening on.")
    if len(chosen) < wanted:
        logger.warning(
            f"The whitening is fitted on {len(chosen):,} texts and sentences, all that there are; {wanted:,} would be "
            "better."
        )
    encoded = encode_texts(model, tokenizer, list(chosen), max_length)["input_ids"]
    return Whitening.fit(embed_tokens(model, [ids for ids in encoded if ids]), num_dimensions)


def sentences(text: str) -> list[str]:
    """The sentences and lines of a text, but for very short ones; the text itself where it has none."""
    parts = [part.strip() for part in re.split(r"(?<=[.!?:])\s+|\n+", text)]
    return [part for part in parts if len(part) >= MIN_SENTENCE_CHARS] or [text]
