"""Tagging as a user does it: words to tokens and back, end to end, and what happens to bad input."""

import logging

import datasets
import numpy as np
import pytest
from transformers import AutoModelForTokenClassification, AutoTokenizer, BertConfig

from finetuning_helpers import WORDS, arguments, run
from helpers import run_elsewhere, write_jsonl
from tjepa.downstream import run_token_classification
from tjepa.downstream.arguments import WordArguments
from tjepa.downstream.labels import IGNORED
from tjepa.downstream.tasks import WordTask, words_of_tokens


def make_rows(num_rows: int, seed: int = 0) -> list[dict]:
    """Sentences in which `red fox` is an animal and everything else is nothing."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(num_rows):
        parts = [["red", "fox"] if rng.random() < 0.3 else [str(rng.choice(WORDS))] for _ in range(8)]
        tags = [["B-ANIMAL", "I-ANIMAL"] if len(part) == 2 else ["O"] for part in parts]
        rows.append({"tokens": sum(parts, []), "tags": sum(tags, [])})
    return rows


def make_task(rows: list[dict], **options) -> WordTask:
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list(rows))
    return WordTask(splits, WordArguments(train_file="x.jsonl", **options), BertConfig())


def tag(monkeypatch, argv: list[str]) -> dict:
    return run(monkeypatch, argv, script=run_token_classification)


# --- End to end ------------------------------------------------------------------------------------------------------


def test_tagging_then_loaded_elsewhere(folder, tmp_path, monkeypatch, caplog):
    train = write_jsonl(tmp_path / "train.jsonl", make_rows(200))
    test = write_jsonl(tmp_path / "test.jsonl", make_rows(40, 1))
    options = {"train_file": train, "test_file": test, "max_length": 64}
    results = tag(monkeypatch, arguments(folder, tmp_path / "out", **options))
    assert results["test_f1"] > 0.9 and results["test_accuracy"] > 0.9
    assert results["test_samples"] == 40 and results["test_lost_words"] == 0
    assert "3 classes" in caplog.text

    loaded = run_elsewhere(
        """
from transformers import AutoModelForTokenClassification, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model, info = AutoModelForTokenClassification.from_pretrained(
    folder, trust_remote_code=True, output_loading_info=True
)
assert not info["missing_keys"] and not info["unexpected_keys"], info
assert tokenizer.model_max_length == model.config.max_position_embeddings == 64
logits = model.eval()(**tokenizer("the red fox runs", return_tensors="pt")).logits
tags = {model.config.id2label[index] for index in logits[0].argmax(-1).tolist()}
print(sorted(tags))
""",
        tmp_path / "out",
        tmp_path,
    )
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.split("\n")[-2] == "['B-ANIMAL', 'I-ANIMAL', 'O']"


def test_frozen_encoder_and_numbered_tags(folder, tmp_path, monkeypatch):
    rows = [{"words": row["tokens"], "labels": [len(word) for word in row["tokens"]]} for row in make_rows(60)]
    train = write_jsonl(tmp_path / "train.jsonl", rows)
    options = {"train_file": train, "freeze_encoder": True, "label_all_tokens": True, "max_steps": 3}
    results = tag(monkeypatch, arguments(folder, tmp_path / "out", **options))
    assert "eval_accuracy" in results and "eval_f1" not in results  # no B- and I-: there are no chunks
    names = AutoModelForTokenClassification.from_pretrained(tmp_path / "out").config.id2label
    assert names == dict(enumerate(["1", "3", "4", "5", "6"]))


def test_conll(shared_folder, folder, tmp_path, monkeypatch, caplog):
    """CoNLL-2000: its test split has a tag that its train split has not, and sentences are longer than the model."""
    data = shared_folder / "data" / "eval"
    options = {
        "train_file": data / "conll2000-chunking-train.jsonl",
        "test_file": data / "conll2000-chunking-test.jsonl",
        "max_train_samples": 200,
        "max_predict_samples": 100,
        "max_steps": 5,
    }
    with pytest.raises(ValueError, match=r"\['pos_tags', 'chunk_tags'\] are all usual names"):
        tag(monkeypatch, arguments(folder, tmp_path / "out", **options))
    results = tag(monkeypatch, arguments(folder, tmp_path / "out", **options, label_column="chunk_tags"))
    assert 0 <= results["test_f1"] <= results["test_accuracy"] <= 1
    assert results["test_lost_words"] > 0 and results["test_truncated"] > 0
    assert "'I-LST'" in caplog.text and "count as mistakes" in caplog.text


# --- Words and tokens ------------------------------------------------------------------------------------------------


def test_words_of_tokens_by_hand():
    words = ["New York", "is", "big"]  # "New York is big"
    offsets = [(0, 0), (0, 3), (3, 8), (8, 11), (11, 12), (12, 13), (13, 15), (0, 0)]
    assert words_of_tokens(words, offsets) == [None, 0, 0, 1, None, 2, 2, None]


@pytest.mark.parametrize("name", ["bert-base-uncased", "open-llama"])
def test_every_word_finds_its_tokens(shared_folder, name):
    tokenizer = AutoTokenizer.from_pretrained(shared_folder / "tokenizers" / name)
    words = ["Rockwell", "'s", "747", "jetliners", "cost", "$", "1.5", "billion", "中文", "."]
    encoding = tokenizer(" ".join(words), return_offsets_mapping=True)
    tokens_of_words = [[] for _ in words]
    for token, word in zip(encoding["input_ids"], words_of_tokens(words, encoding["offset_mapping"]), strict=True):
        if word is not None:
            tokens_of_words[word].append(token)
    spelled = [tokenizer.decode(tokens).replace(" ", "").lower() for tokens in tokens_of_words]
    assert spelled == [word.lower() for word in words]


@pytest.mark.parametrize("label_all_tokens", [False, True])
def test_labels_of_tokens(folder, label_all_tokens):
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    words, tags = ["Zebra", "runs", "", "xyz"], ["B-X", "O", "O", "B-Y"]
    task = make_task([{"tokens": ["a"] * 4, "tags": ["B-X", "I-X", "O", "B-Y"]}], label_all_tokens=label_all_tokens)
    assert task.names == ["B-X", "B-Y", "I-X", "O"]  # no I-Y
    dataset = task.encode(datasets.Dataset.from_dict({"tokens": [words]}), [tags], tokenizer, 32, "train")
    tokens, labels = tokenizer.convert_ids_to_tokens(dataset[0]["input_ids"]), dataset[0]["labels"]
    firsts = [index for index, token in enumerate(tokens) if token in ("Z", "Ġruns", "x")]
    assert len(firsts) == 3 and [labels[index] for index in firsts] == [0, 3, 1]
    others = [labels[index] for index in range(len(tokens)) if index not in firsts]
    # the rest of Zebra, of xyz, and the spaces around the word that is empty
    inside = [2] * 4 + [1] * 2 if label_all_tokens else [IGNORED] * 6
    assert [label for label in others if label != IGNORED] == [label for label in inside if label != IGNORED]
    assert dataset[0]["first_tokens"] == [firsts[0], firsts[1], -1, firsts[2]]
    assert dataset[0]["num_tokens"] == len(tokens)


# --- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "tags", "fault"),
    [
        (["a", "b"], ["X", "Y"], None),
        (None, ["X"], "null"),
        (["a", None], ["X", "Y"], "not a string"),
        ([1, 2], ["X", "Y"], "not a string"),
        ([], [], "empty or whitespace only"),
        (["a"], None, "label missing"),
        (["a", "b"], ["X", None], "label missing"),
        (["a", "b"], ["X"], "not as many tags as words"),
    ],
)
def test_rows_that_can_not_be_used(words, tags, fault):
    task = make_task([{"tokens": ["a"], "tags": ["X"]}])
    assert (task.input_fault(words) or task.label_fault(tags, (words,), "train")) == fault


def test_bad_rows_and_long_sentences_are_counted(folder, tmp_path, monkeypatch, caplog):
    bad = [{"tokens": None, "tags": ["O"]}, {"tokens": ["a"], "tags": ["O", "O"]}, {"tokens": ["a"], "tags": None}]
    long = {"tokens": ["fox"] * 40, "tags": ["O"] * 40}
    train = write_jsonl(tmp_path / "train.jsonl", [*make_rows(20), *bad, long])
    options = {"train_file": train, "validation_split_percentage": 0, "max_steps": 1}
    with caplog.at_level(logging.INFO, logger="tjepa"):
        results = tag(monkeypatch, arguments(folder, tmp_path / "out", **options))
    assert (results["train_samples"], results["train_dropped"], results["train_truncated"]) == (21, 3, 1)
    assert "null 1" in caplog.text and "not as many tags as words 1" in caplog.text
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    num_tokens = len(tokenizer(" ".join(["fox"] * 40), verbose=False)["input_ids"])
    assert num_tokens == 41 and results["train_lost_words"] == 41 - 32  # the first fox, without a space, is two tokens


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ([{"tokens": ["a"], "tags": ["O"]}], None, r"one class only, \['O'\]"),
        ([{"tokens": "a b", "tags": ["O", "X"]}], None, "must hold lists.*tjepa classify"),
        ([{"text": "a b", "tags": ["O", "X"]}], None, "--text_column.*none of the usual names"),
        ([{"tokens": ["a", "b"], "tags": ["O", "X"]}], [{"tokens": ["a"], "tags": ["1"]}], r"has labels.*\['1'\]"),
        (
            [{"tokens": ["a", "b"], "tags": ["O", "X"]}],
            [{"tokens": ["a"], "pos_tags": ["O"]}],
            "test split has no column 'tags'",
        ),
        ([{"tokens": [""], "tags": ["O"]}], None, "Nothing is left of the train split"),
    ],
)
def test_data_that_is_refused(folder, tmp_path, monkeypatch, train, test, message):
    options = {"train_file": write_jsonl(tmp_path / "train.jsonl", train), "validation_split_percentage": 0}
    if test is not None:
        options["test_file"] = write_jsonl(tmp_path / "test.jsonl", test)
    with pytest.raises(ValueError, match=message):
        tag(monkeypatch, arguments(folder, tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()
