"""Whitening as a linear layer, fitted on vectors and on texts."""

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from tjepa.downstream.embedding import embed_texts
from tjepa.downstream.whitening import Whitening, as_array, fit_text_whitening, fit_whitening, sentences


def correlated_vectors(num_texts: int = 400, width: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(width, width, generator=generator)
    return torch.randn(num_texts, width, generator=generator) @ mixing + 3


def test_the_layer_gives_mean_0_and_covariance_1_as_the_probes_whitening_does():
    vectors = correlated_vectors()
    whitened = Whitening.fit(vectors)(vectors)
    torch.testing.assert_close(whitened.mean(0), torch.zeros(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(whitened.T.cov(correction=1), torch.eye(8), atol=1e-3, rtol=0)
    np.testing.assert_allclose(whitened, fit_whitening(vectors).transform(as_array(vectors)), atol=1e-3)


def test_fewer_dimensions_are_those_of_largest_variance():
    vectors = correlated_vectors()
    torch.testing.assert_close(Whitening.fit(vectors, 3)(vectors), Whitening.fit(vectors)(vectors)[:, :3])


@pytest.mark.parametrize(
    ("num_texts", "num_dimensions", "message"),
    [(8, None, "8 texts are too few to whiten 8 dimensions"), (400, 9, "Embeddings have 8 dimensions")],
)
def test_what_cannot_be_fitted_is_said(num_texts, num_dimensions, message):
    with pytest.raises(ValueError, match=message):
        Whitening.fit(correlated_vectors(num_texts), num_dimensions)


def test_of_texts_the_whole_and_one_sentence_are_read(folder):
    encoder = folder / "encoder"
    model, tokenizer = AutoModel.from_pretrained(encoder), AutoTokenizer.from_pretrained(encoder)
    words = "the fox sees a red hen and runs home before night falls".split()
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, 6)) + ".\n" + " ".join(rng.choice(words, 9)) for _ in range(60)]
    whitening = fit_text_whitening(model, tokenizer, [None, " ", *texts], max_length=16)
    pieces = [piece for text in texts for piece in (text, *sentences(text))]
    whitened = whitening(embed_texts(model, tokenizer, pieces, 16))
    # a third of the pieces was not fitted on
    assert whitened.mean(0).abs().max() < 0.5 and 0.5 < whitened.var(0).mean() < 2
    with pytest.raises(ValueError, match="no text to fit a whitening on"):
        fit_text_whitening(model, tokenizer, [None, ""], max_length=16)


def test_sentences_are_lines_too_and_a_short_text_is_its_own():
    assert sentences("Return the sum.\nArgs:\n  axis of the array.") == ["Return the sum.", "axis of the array."]
    assert sentences("a fox") == ["a fox"]


@pytest.mark.parametrize("num_texts", [1, 2, 8, 400])
def test_few_vectors_are_whitened_as_far_as_their_number_tells(num_texts):
    vectors = correlated_vectors(num_texts)
    whitened = Whitening.fit_to_few(vectors)(vectors)
    torch.testing.assert_close(whitened.mean(0), torch.zeros(8), atol=1e-2, rtol=0)
    assert whitened.isfinite().all()
    if num_texts == 400:  # enough: hardly drawn towards a multiple of I
        torch.testing.assert_close(whitened.T.cov(correction=1), torch.eye(8), atol=0.4, rtol=0)
    if num_texts == 8:  # as far apart as they were, nearly: full whitening would make all equally far apart
        assert torch.corrcoef(torch.stack([torch.pdist(whitened), torch.pdist(vectors)]))[0, 1] > 0.3
