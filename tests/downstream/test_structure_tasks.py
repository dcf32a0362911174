"""Order and retrieval: what a bag of words cannot see is found in vectors that hold it, and not in others."""

import logging

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from transformers import BertConfig
from transformers.modeling_outputs import BaseModelOutput

from helpers import make_word_tokenizer, write_jsonl
from tjepa.downstream import probe
from tjepa.downstream.probe import (
    EmbeddingLayer,
    LabelledFeatures,
    ProbeTask,
    embed_task,
    groups_of_rows,
    probe_embedded_task,
    probe_tasks,
    probe_tasks_with_tfidf,
)
from tjepa.downstream.run_probing import load_tasks
from tjepa.downstream.structure_tasks import combine, mrr_of_a_guess, next_segment_figures, rows_of_sentences
from tjepa.downstream.whitening import as_array, fit_whitening


FILLERS = [f"w{i}" for i in range(40)]


class OrderedModel(torch.nn.Module):
    """Embeddings weighed by where their token stands, so that the mean of a text knows the order of its words."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.config = BertConfig(hidden_size=48)
        self.embedding = torch.nn.Embedding(43, 48)

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self.embedding

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> BaseModelOutput:
        weights = 1 + torch.arange(input_ids.shape[1])[:, None]
        return BaseModelOutput(last_hidden_state=self.embedding(input_ids) * weights)


@pytest.fixture(scope="module")
def model():
    return OrderedModel()


@pytest.fixture(scope="module")
def tokenizer():
    return make_word_tokenizer(["unknown", "a", "b", *FILLERS], unk_token="unknown")


def sentence(rng: np.random.Generator, order: str) -> str:
    """The letters of `order` with other words around each, so that no pair of neighbours tells the order either."""
    words = list(rng.choice(FILLERS, size=3 * len(order) + 1))
    for place, letter in enumerate(order):
        words[3 * place + 1] = letter
    return " ".join(words)


def pair_order(rng: np.random.Generator, num_pairs: int) -> dict[str, list]:
    """The sentence in which a comes before b is first (1) or second (0): every pair in both orders."""
    pairs = [(sentence(rng, "ab"), sentence(rng, "ba")) for _ in range(num_pairs)]
    first, second = map(list, zip(*pairs, strict=True))
    return {"sentence1": first + second, "sentence2": second + first, "label": [1] * num_pairs + [0] * num_pairs}


def position(rng: np.random.Generator, num_rows: int) -> dict[str, list]:
    """Three sentences, three labels: where b stands among the letters of the first. One row has a sentence less."""
    labels = rng.integers(3, size=num_rows).tolist()
    orders = ("baa", "aba", "aab")
    rows = [[sentence(rng, orders[label]), *(sentence(rng, "aba") for _ in range(2))] for label in labels]
    return {"sentences": [rows[0][:2], *rows[1:]], "label": labels}


def retrieval(rng: np.random.Generator) -> dict[str, list]:
    """Passages whose segments hold the same words, in an order that each passage keeps."""
    orders = [" ".join(rng.permutation(FILLERS[:10])) for _ in range(60)]
    return {"title": [f"book {row % 2}" for row in range(60)], "segments": [[order] * 2 for order in orders]}


def test_order_is_found_by_vectors_that_hold_it_and_not_by_bags_of_words(model, tokenizer):
    rng = np.random.default_rng(0)
    tasks = [
        ProbeTask("pairs", "pair order", {"train": pair_order(rng, 250), "test": pair_order(rng, 100)}),
        ProbeTask("places", "position", {"train": position(rng, 400), "test": position(rng, 200)}),
        ProbeTask("books", "retrieval", {"test": retrieval(rng)}),
    ]
    found = probe_tasks(model, tokenizer, tasks, seeds=(0, 1), max_length=32)
    bag = probe_tasks(EmbeddingLayer(model), tokenizer, tasks, seeds=(0,), max_length=32)
    tfidf = probe_tasks_with_tfidf(tasks, seeds=(0,))
    assert found["pairs/linear_probe"] > 0.9 and found["places/linear_probe"] > 0.8 and found["books/mrr"] > 0.99
    for control in (bag, tfidf):
        assert set(control) == {"pairs/linear_probe", "places/linear_probe", "books/mrr"}
        assert control["pairs/linear_probe"] < 0.65 and control["places/linear_probe"] < 0.5
        assert control["books/mrr"] < 0.2
    assert {name for name in found if name.endswith("_std")} == {"pairs/linear_probe_std", "places/linear_probe_std"}


def test_features_of_several_sentences():
    u, v, w = (np.array([row]) for row in ([1.0, 2.0], [3.0, 0.0], [5.0, 7.0]))
    expected = {"pair order": [1, 2, 3, 0, -2, 2, 3, 0], "position": [1, 2, -2, 2, -4, -5]}
    for kind, sentences in (("pair order", (u, v)), ("position", (u, v, w))):
        assert combine(kind, sentences).tolist() == [expected[kind]]
        assert combine(kind, [csr_matrix(one) for one in sentences]).toarray().tolist() == [expected[kind]]
    splits = {"train": {"sentences": [["x", "y"]]}, "test": {"sentences": [["x", "y", "z"]]}}
    assert rows_of_sentences(splits) == {"train": [["x", "y", "x"]], "test": [["x", "y", "z"]]}


def test_rows_of_the_same_sentences_are_held_out_together(model, tokenizer):
    columns = {"sentence1": ["a", "b", "w1"], "sentence2": ["b", "a", "w2"], "label": [1, 0, 1]}
    task = ProbeTask("pairs", "pair order", {"train": columns})
    assert groups_of_rows(task, "train") == [0, 0, 1]
    features, labels, groups = embed_task(model, tokenizer, task, max_length=8)["train"]
    assert groups.tolist() == [0, 0, 0, 0, 1, 1] and labels.tolist() == [1, 1, 0, 0, 1, 1]
    assert features[0].equal(features[3]) and features[1].equal(features[2]) and not features[0].equal(features[1])


def test_both_orders_are_held_out_together_and_retrieval_is_whitened_with_the_training_part(monkeypatch):
    seen = []
    monkeypatch.setattr(probe, "hold_out", lambda groups, seed: seen.append(groups.tolist()) or groups == 0)
    columns = {"sentence1": [*"abcd"], "sentence2": [*"badc"], "label": [1, 0, 1, 0]}
    features = torch.randn(8, 2, generator=torch.manual_seed(0))
    part = LabelledFeatures(features, torch.tensor([1, 1, 0, 0, 1, 1, 0, 0]), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]))
    task = ProbeTask("pairs", "pair order", {"train": columns, "test": columns})
    probe_embedded_task(task, {"train": part, "test": part}, seeds=(0,))
    assert seen == [[0, 0, 1, 1]]

    vectors = torch.randn(60, 3, generator=torch.manual_seed(0)) * torch.tensor([1.0, 9.0, 0.1])
    test = LabelledFeatures(vectors, torch.arange(60) // 3, torch.zeros(60))
    train = LabelledFeatures(torch.eye(3).repeat(9, 1) - torch.eye(3).repeat_interleave(9, 0) * 0.5, test[1], test[2])
    task = ProbeTask("books", "retrieval", {})
    for embedded, statistics in (({"test": test}, test), ({"train": train, "test": test}, train)):
        white = fit_whitening(statistics.features).transform(as_array(vectors))
        expected = next_segment_figures(white, test.labels.numpy(), test.groups.numpy())
        found = probe_embedded_task(task, embedded)
        assert found == {f"books/{name}": pytest.approx(figure) for name, figure in expected.items()}


def test_the_next_segment_by_hand_and_by_a_plain_loop():
    angles = np.radians([0, 10, 30, 35, 201, 5])  # a passage of four and one of two, in one book
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.array([[1], [5], [1], [2], [1], [9]])
    passages = np.array([0, 0, 0, 0, 1, 1])
    # 0 -> 1: only 5 is nearer; 10 -> 30: behind 5, 0; 30 -> 35: nearest; 201 -> 5: behind 0
    figures = next_segment_figures(vectors, passages, np.zeros(6))
    assert figures == pytest.approx({"mrr": np.mean([1 / 2, 1 / 3, 1, 1 / 2]), "direction": 0.5})
    apart = next_segment_figures(vectors, passages, passages)  # each passage is a book
    assert apart == pytest.approx({"mrr": np.mean([1, 1 / 2, 1, 1]), "direction": 0.5})
    assert "direction" not in next_segment_figures(vectors[4:], passages[4:], passages[4:])
    same = next_segment_figures(np.ones((9, 2)), np.arange(9) // 3, np.zeros(9))
    assert same == {"mrr": pytest.approx(1 / 4.5), "direction": 0.5}  # all as near: the middle of 8

    rng = np.random.default_rng(0)
    vectors, passages = rng.normal(size=(120, 5)), np.repeat(np.arange(30), 4)
    books = (passages * 7) % 3  # not one after the other
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    ranks, nearer = [], []
    for query in range(119):
        if passages[query] == passages[query + 1]:
            cosine = {other: unit[query] @ unit[other] for other in range(120) if other != query}
            rivals = [other for other in cosine if books[other] == books[query]]
            ranks.append(1 + sum(cosine[other] > cosine[query + 1] for other in rivals))
            if query and passages[query - 1] == passages[query]:
                nearer.append(cosine[query + 1] > cosine[query - 1])
    expected = {"mrr": np.mean(1 / np.array(ranks)), "direction": np.mean(nearer)}
    for given in (vectors, csr_matrix(vectors)):
        assert next_segment_figures(given, passages, books) == pytest.approx(expected)


def test_the_mrr_of_a_guess():
    assert mrr_of_a_guess(["x", "y"], [["a", "b"], ["a", "b", "c"]]) == pytest.approx((1 + 2 * 3 / 4) / 3)
    rng = np.random.default_rng(0)
    rows = [["s"] * 4] * 10
    guesses = [
        next_segment_figures(rng.normal(size=(40, 30)), np.repeat(range(10), 4), np.zeros(40)) for _ in range(30)
    ]
    assert mrr_of_a_guess(["x"] * 10, rows) == pytest.approx(np.mean([guess["mrr"] for guess in guesses]), abs=0.01)


# --- Files -----------------------------------------------------------------------------------------------------------


PAIRS = [{"sentence1": "a", "sentence2": "b", "label": "yes"}, {"sentence1": "b", "sentence2": "a", "label": "no"}]
PLACES = [{"sentences": ["a", "b", "c"], "label": 2}, {"sentences": ["b", "c"], "label": 0}]
BOOKS = [{"title": "x", "segments": ["a", "b", "c"]}, {"title": "x", "segments": ["d", "e"]}]


def test_kinds_are_seen_from_the_columns(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="tjepa")
    for name, rows in {"pairs": PAIRS, "places": PLACES, "books": BOOKS}.items():
        for split in ("train", "test"):
            write_jsonl(tmp_path / f"{name}-{split}.jsonl", rows)
    broken = [{"title": "x", "segments": ["a"]}, {"title": None, "segments": ["a", "b"]}]
    broken += [{"title": "x", "segments": ["a", None]}, {"title": "x", "segments": None}]
    write_jsonl(tmp_path / "books-test.jsonl", BOOKS + broken)
    books, pairs, places = load_tasks(None, str(tmp_path))
    assert (books.kind, pairs.kind, places.kind) == ("retrieval", "pair order", "position")
    assert pairs.splits["test"] == {"sentence1": ["a", "b"], "sentence2": ["b", "a"], "label": [1, 0]}
    assert places.splits["train"] == {"sentences": [["a", "b", "c"], ["b", "c"]], "label": [1, 0]}
    assert books.splits["test"]["segments"] == [["a", "b", "c"], ["d", "e"]]
    assert "books: retrieval (title + segments), train 2, test 2; 4 rows of test dropped" in caplog.text
    assert "5 segments of 1 titles in test, where a guess has mrr 52.1" in caplog.text
    (alone,) = load_tasks([f"mine={tmp_path}/books-test.jsonl"], None)
    assert list(alone.splits) == ["test"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"sentences": ["a"], "label": 0}],
            "mine: none of the 1 rows of train has both text and label; sentences are",
        ),
        ([{"sentences": "a b", "label": 0}], "sentences are lists of two texts or more, as json, jsonl and parquet"),
        (
            [{"title": "x", "segments": ["a"]}],
            "none of the 1 rows of train has usable title and segments; segments are",
        ),
        ([{**row, "label": [0]} for row in PAIRS], "label of train holds lists"),
        ([{**row, "label": 1} for row in PLACES], "two classes or more"),
        ([{"sentences": ["a", "b"]}], "Needed are .*sentences, label \\(position\\); title, segments \\(retrieval\\)"),
    ],
)
def test_data_that_is_refused(tmp_path, rows, message):
    train, test = (write_jsonl(tmp_path / name, rows) for name in ("a.jsonl", "b.jsonl"))
    with pytest.raises(ValueError, match=message):
        load_tasks([f"mine={train},{test}"], None)


def test_a_task_that_is_trained_needs_a_training_part(tmp_path):
    with pytest.raises(ValueError, match="mine is for pair order, which needs the splits train and test"):
        load_tasks([f"mine={write_jsonl(tmp_path / 'a.jsonl', PAIRS)}"], None)


def test_shared_sets(shared_folder):
    tasks = load_tasks(None, str(shared_folder / "data" / "eval-structure"), max_samples=50)
    kinds = {task.name: task.kind for task in tasks}
    assert kinds == {
        "minimalpairs-zorro": "minimal pairs",
        "nextsegment": "retrieval",
        "order-wiki": "pair order",
        "position-stories": "position",
    }
