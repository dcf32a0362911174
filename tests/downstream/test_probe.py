"""The probe: pooling against a plain loop, whitening and regression against their definitions and scikit-learn."""

from functools import partial

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from tokenizers import pre_tokenizers
from transformers import BertConfig, BertModel

from helpers import make_tiny_config, make_word_tokenizer
from tjepa import TJEPAModel
from tjepa.downstream.embedding import embed_texts, embed_words
from tjepa.downstream.probe import (
    STRENGTHS,
    ProbeTask,
    as_array,
    embed_task,
    fit_whitening,
    hold_out,
    knn_accuracy,
    linear_probe,
    mean_and_std,
    probe_embedded_task,
    probe_tasks,
    spearman,
    sts_spearman,
)


WORDS = [f"word{i}" for i in range(30)]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = make_word_tokenizer(["unknown", *WORDS], unk_token="unknown")
    assert tokenizer.pad_token is None
    return tokenizer


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    return BertModel(config, add_pooling_layer=False)


def make_problem(seed: int = 0, num_texts: int = 600, width: int = 12, num_classes: int = 3):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_texts) % num_classes
    centres = torch.randn(num_classes, width, generator=torch.Generator().manual_seed(99))
    return centres[labels] + torch.randn(num_texts, width, generator=generator), labels


def test_embedding_is_the_mean_over_the_real_tokens_of_each_text_alone(model, tokenizer):
    texts = [" ".join(WORDS[i % 7 : i % 7 + 1 + i % 11]) for i in range(23)]
    features = embed_texts(model, tokenizer, texts, max_length=8, batch_size=4)
    assert features.shape == (23, 16) and features.dtype == torch.float32
    model.eval()
    for text, feature in zip(texts, features, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"][:8]])
        with torch.no_grad():
            alone = model(input_ids=ids).last_hidden_state[0].mean(0)
        torch.testing.assert_close(feature, alone, atol=1e-5, rtol=1e-4)


def test_embedding_restores_every_training_flag_and_can_be_trained_on(model, tokenizer):
    model.train()
    model.embeddings.eval()
    features = embed_texts(model, tokenizer, ["word1 word2", "word3"], max_length=8)
    assert model.training and model.encoder.training and not model.embeddings.training
    assert torch.equal(features, embed_texts(model, tokenizer, ["word1 word2", "word3"], max_length=8))  # no dropout
    head = torch.nn.Linear(16, 2)
    head(features).sum().backward()  # an inference-mode tensor would refuse
    assert head.weight.grad is not None


def test_special_tokens_are_those_of_the_pretraining_and_literal_ones_are_text(model):
    """BERT's tokenizer adds [CLS] and [SEP]: BERT reads them, T-JEPA does not. In a text they are characters."""
    pieces = ["[UNK]", "[CLS]", "[SEP]", "word1", "word2", "[", "]", "SEP"]
    special = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = make_word_tokenizer(pieces, pre_tokenizers.BertPreTokenizer(), **special)
    ours = TJEPAModel(make_tiny_config()).eval()
    for encoder, ids in ((model.eval(), [1, 3, 5, 7, 6, 4, 2]), (ours, [3, 5, 7, 6, 4])):
        with torch.no_grad():
            states = encoder(input_ids=torch.tensor([ids])).last_hidden_state[0]
        close = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-4)
        close(embed_texts(encoder, tokenizer, ["word1 [SEP] word2"], max_length=9)[0], states.mean(0))
        features, places = embed_words(encoder, tokenizer, [["word1", "[SEP]", "word2"]], max_length=9)
        close(features, states[[ids.index(first) for first in (3, 5, 4)]])
        assert places.tolist() == [[0, 0], [0, 1], [0, 2]]


def test_embedding_refuses_a_text_without_tokens(model, tokenizer):
    with pytest.raises(ValueError, match="Text 1 of 2 has no tokens.*leave out empty ones"):
        embed_texts(model, tokenizer, ["word1", ""], max_length=8)
    with pytest.raises(ValueError, match="at least one text"):
        embed_texts(model, tokenizer, [], max_length=8)


def test_whitening_gives_identity_covariance_and_drops_flat_directions():
    generator = torch.Generator().manual_seed(0)
    sources = torch.randn(500, 6, generator=generator) * torch.logspace(0, -3, 6)
    features = sources @ torch.randn(6, 10, generator=generator) + 5.0  # 6 directions of 10, float32
    white = fit_whitening(features).transform(as_array(features))
    assert white.shape == (500, 6)
    np.testing.assert_allclose(white.mean(0), np.zeros(6), atol=1e-9)
    np.testing.assert_allclose(np.cov(white.T), np.eye(6), atol=1e-8)


@pytest.mark.parametrize("num_classes", [2, 3, 8])
def test_the_probe_is_a_softmax_regression_whatever_the_number_of_classes(num_classes):
    """At the strength it chose, its accuracy is that of the minimum of 1/N sum CE + |W|^2 / (2 C N), b left free."""
    features, labels = make_problem(num_classes=num_classes)
    parts = [part for i in (0, 200, 400) for part in (features[i : i + 200], labels[i : i + 200])]
    probe = linear_probe(*parts, whiten=False)
    train, test = (part.double() - parts[0].double().mean(0) for part in (parts[0], parts[4]))
    weights = torch.zeros(num_classes, features.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=1000, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        logits = train @ weights[:, :-1].T + weights[:, -1]
        penalty = weights[:, :-1].square().sum() / (2 * probe.strength * len(train))
        loss = torch.nn.functional.cross_entropy(logits, parts[1]) + penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    predicted = (test @ weights[:, :-1].T + weights[:, -1]).argmax(1)
    assert probe.accuracy == (predicted == parts[5]).double().mean().item()


def test_probe_solves_a_separable_problem_and_is_at_chance_on_noise():
    angles = torch.arange(90) * 2 * torch.pi / 3
    features = torch.stack([angles.cos(), angles.sin()], 1) + 0.01 * torch.randn(90, 2, generator=torch.manual_seed(0))
    labels = torch.arange(90) % 3
    result = linear_probe(features[:30], labels[:30], features[30:60], labels[30:60], features[60:], labels[60:])
    assert result.accuracy == result.validation_accuracy == 1.0
    assert result.strength == STRENGTHS[0]  # of equally good ones, the most regularised
    same = torch.ones(90, 2)  # a collapsed encoder
    result = linear_probe(same[:30], labels[:30], same[30:60], labels[30:60], same[60:], labels[60:])
    assert result.accuracy == pytest.approx(1 / 3)


def test_whitening_lets_the_probe_see_directions_of_small_variance():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (900,), generator=generator)
    features = torch.randn(900, 8, generator=generator)
    features[:, 0] = 1e-4 * (features[:, 0] + 3 * labels)  # all that is known of the label
    parts = [part for i in (0, 300, 600) for part in (features[i : i + 300], labels[i : i + 300])]
    assert linear_probe(*parts).accuracy > 0.9
    assert linear_probe(*parts, whiten=False).accuracy < 0.65


def test_strengths_are_those_of_a_softmax_for_two_classes_too():
    """The weights of a softmax for two classes, made from scikit-learn's one vector, are a minimum at half its C."""
    features, labels = make_problem(num_classes=2)
    features, strength = features.double().numpy(), 0.01
    model = LogisticRegression(C=2 * strength, tol=1e-10, max_iter=5000).fit(features, labels.numpy())
    vector = torch.tensor(model.coef_[0])
    weights = torch.stack([-vector / 2, vector / 2]).requires_grad_(True)
    bias = torch.tensor([-model.intercept_[0] / 2, model.intercept_[0] / 2])
    logits = torch.tensor(features) @ weights.T + bias
    penalty = weights.square().sum() / (2 * strength * len(features))
    (torch.nn.functional.cross_entropy(logits, labels) + penalty).backward()
    assert weights.grad.abs().max() < 1e-6


# --- Words, neighbours, similarity, tasks ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def letters():
    """A tokenizer with a token per character, so that a word has several, and a word beside a space."""
    return make_word_tokenizer(list(" abcdefgh?"), pre_tokenizers.Split("", "isolated"), unk_token="?")


def test_a_word_is_its_first_token(model, letters):
    sentences = [["abc", "d", "ef"], ["h"], ["", "ga", "bcdefgh", "a"], ["abcdefghabc", "b"]]
    features, places = embed_words(model, letters, sentences, max_length=11, batch_size=2)
    # beyond 11 characters: the last word of the third sentence and of the fourth; the empty word has no token
    assert places.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [2, 1], [2, 2], [3, 0]]
    first_characters = [0, 4, 6, 0, 1, 4, 0]
    model.eval()
    for feature, (sentence, _), character in zip(features, places.tolist(), first_characters, strict=True):
        ids = torch.tensor([letters(" ".join(sentences[sentence]))["input_ids"][:11]])
        with torch.no_grad():
            expected = model(input_ids=ids).last_hidden_state[0, character]
        torch.testing.assert_close(feature, expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="None of the words of 1 sentences has a token"):
        embed_words(model, letters, [[""]], max_length=8)


def test_neighbours_vote_weighed_by_cosine():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 2
    train = torch.randn(60, 4, generator=generator) + 4.0 * labels[:, None]
    assert knn_accuracy(train, labels, train + 0.01, labels, k=1) == 1.0
    assert knn_accuracy(train, labels, train, 1 - labels, k=5) < 0.1
    assert knn_accuracy(train, labels, train, labels, k=1000) > 0.9  # all vote: the far ones against
    same = torch.ones(4, 3)
    assert knn_accuracy(same, torch.tensor([0, 1, 1, 1]), same, torch.tensor([1, 1, 1, 0])) == 0.75
    # two neighbours at an angle beat none: the vote of the nearest alone is 0, that of three is 1
    axes = torch.tensor([[1.0, 0.0], [0.9, 0.5], [0.9, -0.5], [-1.4, 0.5], [-1.4, -0.5]])
    assert knn_accuracy(axes, torch.tensor([0, 1, 1, 0, 0]), torch.tensor([[1.0, 0.0]]), torch.tensor([0]), k=1) == 1.0
    assert knn_accuracy(axes, torch.tensor([0, 1, 1, 0, 0]), torch.tensor([[1.0, 0.0]]), torch.tensor([1]), k=3) == 1.0


def test_spearman_by_hand_and_against_scipy():
    assert spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 1000.0, 100.0])) == pytest.approx(0.5)
    assert spearman(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 2.0])) == 0.0
    stats = pytest.importorskip("scipy.stats", reason="scipy, the yardstick, is not installed")
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(6, (200,), generator=generator).double()  # many ties
    second = first + 3 * torch.randn(200, generator=generator)
    assert spearman(first, second) == pytest.approx(stats.spearmanr(first, second).statistic)


def test_similarity_raw_and_whitened():
    generator = torch.Generator().manual_seed(0)
    meaning = torch.randn(400, 4, generator=generator)
    noise = torch.rand(400, 1, generator=generator)
    scores = 1 - noise[:, 0]
    first, second = meaning, (1 - noise) * meaning + noise * torch.randn(400, 4, generator=generator)
    figures = sts_spearman(first, second, scores)
    assert figures["spearman"] > 0.6 and figures["spearman_whitened"] > 0.6
    # one feature of large variance that means nothing: most of the raw cosine, a fifth of the whitened one
    nuisance = 30 * torch.randn(2, 400, 1, generator=generator)
    figures = sts_spearman(torch.cat([first, nuisance[0]], 1), torch.cat([second, nuisance[1]], 1), scores)
    assert abs(figures["spearman"]) < 0.2 and figures["spearman_whitened"] > 0.5


def test_held_out_tenth():
    groups = torch.arange(50).repeat_interleave(3)
    held_out = hold_out(groups, seed=0)
    assert held_out.sum() == 15 and held_out.view(50, 3).all(1).sum() == 5  # whole groups
    assert held_out.equal(hold_out(groups, seed=0)) and not held_out.equal(hold_out(groups, seed=1))
    assert hold_out(torch.tensor([4, 4, 7]), seed=0).sum() in (1, 2)  # at least one group


def test_mean_and_std():
    assert mean_and_std([{"a": 1.0}]) == {"a": 1.0}
    assert mean_and_std([{"a": 1.0}, {"a": 3.0}]) == pytest.approx({"a": 2.0, "a_std": 2**0.5})


def test_tasks(model, tokenizer):
    texts = [" ".join(WORDS[(7 * i) % 15 + 15 * (i % 2) :][:3]) for i in range(60)]
    labels = [i % 2 for i in range(60)]
    columns = {"text": texts, "label": labels}
    tags = {"tokens": [text.split() for text in texts], "tags": [[label] * 3 for label in labels]}
    pairs = {"sentence1": texts[:30], "sentence2": texts[30:], "score": [float(i % 5) for i in range(30)]}
    tasks = [
        ProbeTask("texts", "classification", {"train": columns, "test": columns}),
        ProbeTask("given", "classification", {"train": columns, "validation": columns, "test": columns}),
        ProbeTask("words", "tagging", {"train": tags, "test": tags}),
        ProbeTask("pairs", "similarity", {"test": pairs}),
    ]
    options = {"max_length": 8}
    embedded = [embed_task(model, tokenizer, task, **options) for task in tasks]
    results = {}
    for task, features in zip(tasks, embedded, strict=True):
        results.update(probe_embedded_task(task, features, seeds=(0, 1)))
    assert list(results) == [
        *("texts/linear_probe", "texts/linear_probe_std", "texts/knn", "texts/knn_std"),
        *("given/linear_probe", "given/linear_probe_std", "given/knn", "given/knn_std"),
        *("words/linear_probe", "words/linear_probe_std", "pairs/spearman", "pairs/spearman_whitened"),
    ]
    assert results["texts/linear_probe"] > 0.9 and results["words/linear_probe"] > 0.9
    features = embed_texts(model, tokenizer, texts, **options)
    sentences = embedded[3]["test"].features
    torch.testing.assert_close(torch.cat([sentences[0::2], sentences[1::2]]), features, atol=1e-5, rtol=1e-4)
    held_out, labels = hold_out(torch.arange(60), 1), torch.tensor(labels)
    expected = linear_probe(
        features[~held_out], labels[~held_out], features[held_out], labels[held_out], features, labels
    )
    alone = probe_tasks(model, tokenizer, tasks[:1], **options, seeds=(1,))
    assert alone["texts/linear_probe"] == expected.accuracy
