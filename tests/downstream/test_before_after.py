"""The report on what continued pretraining did to an encoder: measures with known answers, and what the lines say."""

import numpy as np
import pytest
import torch
from sklearn.metrics import label_ranking_average_precision_score
from sklearn.metrics.pairwise import cosine_similarity

from helpers import write_jsonl
from tjepa.downstream import before_after
from tjepa.downstream.before_after import (
    MAX_TEXTS,
    MIN_TEXTS,
    BeforeAfter,
    BeforeAfterArguments,
    Difference,
    Embedded,
    difference_of_accuracies,
    halves,
    held_out_texts,
    neighbours_kept,
    paired_difference,
    read_labelled_texts,
    reciprocal_ranks,
)
from tjepa.downstream.probe import ProbeResult
from tjepa.tools.report import texts_to_keep


def some_texts(num: int) -> list[str]:
    return [f"text number {index} has a first half, and then its second half {index}" for index in range(num)]


@pytest.mark.parametrize(
    "text, cut",
    [
        ("one two three four", ("one two", "three four")),
        ("  a bb\ncc d  ", ("a bb", "cc d")),
        ("一二三四五六", ("一二三", "四五六")),  # no white space
        ("x " + "y" * 20, ("x", "y" * 20)),
    ],
)
def test_a_text_is_cut_between_words(text, cut):
    assert halves(text) == cut


def test_reciprocal_ranks_of_known_vectors():
    answers = torch.eye(3)
    queries = torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.5, 0.0], [0.9, 0.5, 0.1]])
    np.testing.assert_allclose(reciprocal_ranks(queries, answers), [1, 1 / 2, 1 / 3])


def test_an_encoder_for_which_all_texts_are_equal_finds_nothing():
    vectors = torch.randn(1, 8, generator=torch.Generator().manual_seed(0)).repeat(10, 1)
    np.testing.assert_allclose(reciprocal_ranks(vectors, vectors), 1 / 10)


def test_the_mean_is_scikit_learns_label_ranking_precision():
    first, second = torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = label_ranking_average_precision_score(np.eye(30), cosine_similarity(first, second))
    assert reciprocal_ranks(first, second).mean() == pytest.approx(expected)
    assert 0 < expected < 1


def test_neighbours_are_those_of_the_other_space():
    before = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))[0]
    np.testing.assert_allclose(neighbours_kept(before, 3.0 * before @ rotation), 1.0)
    unrelated = torch.randn(40, 3, generator=torch.Generator().manual_seed(2))
    assert neighbours_kept(before, unrelated).mean() == pytest.approx(10 / 39, abs=0.1)


def test_one_of_two_neighbours_is_kept():
    def at(*degrees: float) -> torch.Tensor:
        angles = torch.tensor(degrees).deg2rad()
        return torch.stack([angles.cos(), angles.sin()], dim=1)

    # the nearest of the first: the second and third before, the second and fourth after
    kept = neighbours_kept(at(0, 10, 20, 90), at(0, 10, 90, 20), k=2)
    assert kept[0] == 0.5


def test_a_difference_counts_beyond_two_standard_errors():
    before = np.array([0.0, 1.0] * 50)
    gain = np.array([0.2, 0.4] * 50)
    difference = paired_difference(before, before + gain)
    assert (difference.before, difference.after) == pytest.approx((0.5, 0.8))
    assert difference.error == pytest.approx(gain.std(ddof=1) / 10)  # of the differences, not of the figures
    assert difference.verdict == "better"
    assert paired_difference(before + gain, before).verdict == "worse"
    assert Difference(0.5, 0.58, 0.05).verdict == Difference(0.5, 0.5, 0.0).verdict == "no difference beyond chance"
    assert difference_of_accuracies(0.5, 0.5, 50).error == pytest.approx(0.1)


def report(first, second, texts, labelled=None):
    comparison = BeforeAfter(some_texts(texts))
    return comparison.report(Embedded(*first, labelled), Embedded(*second, labelled))


def test_the_lines_say_what_helped_and_what_hurt():
    noise = torch.randn(3, 40, 16, generator=torch.Generator().manual_seed(0))
    good, poor = (noise[0], noise[0] + 0.1 * noise[1]), (noise[0], noise[0] + 4.0 * noise[1])
    helped, hurt, same = report(poor, good, 40), report(good, poor, 40), report(good, good, 40)
    assert [figures["lines"][0].split(": ")[1].split(".")[0] for figures in (helped, hurt, same)] == [
        "better",
        "worse",
        "no difference beyond chance",
    ]
    assert helped["retrieval_after"] == hurt["retrieval_before"] == 1.0 > helped["retrieval_before"]
    assert same["neighbours_kept"] == 1.0 and same["lines"][2].startswith("Similarity: kept. ")
    assert "changed; embed anew" in hurt["lines"][2]
    assert all(len(figures["lines"]) == 3 for figures in (helped, hurt, same))


def test_too_few_texts_are_said_to_be_too_few():
    comparison = BeforeAfter([*some_texts(MIN_TEXTS - 1), "short", None, *some_texts(3)])
    assert comparison.embed(None, None, 8) is None
    figures = comparison.report(None, None)
    assert list(figures) == ["lines"] and f"{MIN_TEXTS - 1} held-out texts" in figures["lines"][0]
    assert "Hold out more of them" in figures["lines"][0]


def test_of_many_texts_some_are_drawn_each_once():
    texts = some_texts(MAX_TEXTS + 100)
    comparison = BeforeAfter(iter([*texts, *texts]))
    assert len(comparison.pairs) == len(set(comparison.pairs)) == MAX_TEXTS
    assert comparison.pairs == BeforeAfter(texts).pairs


def write_labelled(path, rows):
    write_jsonl(path, [{"text": text, "label": label} for text, label in rows])
    return str(path)


def test_the_probe_finds_what_became_separable(tmp_path):
    rows = [(f"a text of kind {'ab'[index % 2]}, {index}", "ab"[index % 2]) for index in range(200)]
    comparison = BeforeAfter([], write_labelled(tmp_path / "labelled.jsonl", [*rows, ("no label", None), ("", "a")]))
    assert len(comparison.labelled) == 200 and comparison.labels.bincount().tolist() == [100, 100]
    noise = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    empty = noise[:0]
    separable = noise + 8.0 * comparison.labels[:, None]
    figures = comparison.report(Embedded(empty, empty, noise), Embedded(empty, empty, separable))
    assert figures["probe_after"] > 0.95 and figures["probe_before"] == pytest.approx(0.5, abs=0.15)
    assert figures["lines"][1].startswith("Probe for the labels: better. ") and "100 texts" in figures["lines"][1]


def test_the_probe_is_judged_on_texts_that_it_did_not_see(tmp_path, monkeypatch):
    path = write_labelled(
        tmp_path / "labelled.jsonl", [(text, index % 2) for index, text in enumerate(some_texts(60))]
    )
    parts = []

    def probe(train, train_labels, validation, validation_labels, test, test_labels):
        parts.extend(part[:, 0].tolist() for part in (train, validation, test))
        return ProbeResult(0.5, 1.0, 0.5)

    monkeypatch.setattr(before_after, "linear_probe", probe)
    assert BeforeAfter([], path).probe(torch.arange(60)[:, None]) == (0.5, 30)
    assert [len(part) for part in parts] == [27, 3, 30]
    assert sorted(sum(parts, [])) == list(range(60))


@pytest.mark.parametrize(
    "name, rows, message",
    [
        ("few.jsonl", [("a", 0), ("b", 1)], "has 2 texts with a label, of 2 classes"),
        ("one.jsonl", [(text, 0) for text in some_texts(30)], "of 1 classes"),
        ("lines.txt", [("a", 0)], "with columns"),
        ("sizes.jsonl", [(text, i / 2) for i, text in enumerate(some_texts(30))], "not numbers with a fraction"),
        ("rare.jsonl", [(text, int(i == 0)) for i, text in enumerate(some_texts(30))], "too few texts of all classes"),
    ],
)
def test_a_probe_file_that_tells_nothing_is_refused(name, rows, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_labelled_texts(write_labelled(tmp_path / name, rows))


def test_a_text_counts_once(tmp_path):
    rows = [(f"text {index % 30}", index % 2) for index in range(90)]
    texts, labels, _ = read_labelled_texts(write_labelled(tmp_path / "a.jsonl", rows))
    assert len(set(texts)) == len(texts) == len(labels) == 30


def test_a_report_shows_the_names_of_the_classes(tmp_path):
    rows = [(f"the {name} text {index}", name) for index in range(40) for name in ("sad", "glad")]
    comparison = BeforeAfter([], write_labelled(tmp_path / "a.jsonl", rows))
    kept = texts_to_keep({}, "text", None, comparison)
    assert all(label in text.split() for text, label in zip(kept["texts"], kept["labels"], strict=True))


def test_a_probe_file_without_its_columns_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "kind": 1}\n')
    with pytest.raises(ValueError, match=r"no column 'label', only \['kind', 'text'\]"):
        read_labelled_texts(str(tmp_path / "a.jsonl"))
    with pytest.raises(FileNotFoundError, match="--probe_file nowhere.jsonl"):
        read_labelled_texts("nowhere.jsonl")


def test_a_probe_file_asks_for_the_report():
    assert BeforeAfterArguments(probe_file="x.jsonl").report_before_after
    assert not BeforeAfterArguments().report_before_after


def test_texts_of_tokens_are_decoded():
    class Tokenizer:
        def decode(self, ids, skip_special_tokens):
            return " ".join(map(str, ids))

    assert list(held_out_texts([{"body": "a"}, {"body": None}], "body", Tokenizer())) == ["a", None]
    assert list(held_out_texts([{"input_ids": [3, 4]}], "text", Tokenizer())) == ["3 4"]
