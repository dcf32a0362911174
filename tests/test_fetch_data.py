"""`benchmarks/fetch_data.py` makes of data sets on the Hub the files that the docs and benchmarks read."""

import json
import sys

import fetch_data
import pytest
from datasets import ClassLabel, Dataset, Features, IterableDataset, List, Value, load_dataset

from tjepa.downstream.run_probing import load_tasks


def rows_on_the_hub(name: str, split: str) -> Dataset:
    """A few rows with the columns of each data set, and one that is not wanted."""
    texts = [f"{split} text {index}" for index in range(8)]
    labels = [index % 2 for index in range(8)]
    if name == "eriktks/conll2000":
        tags = List(ClassLabel(names=["O", "B-NP", "I-NP"]))
        features = {"id": Value("string"), "tokens": List(Value("string")), "pos_tags": tags, "chunk_tags": tags}
        words = [text.split() for text in texts[:-1]] + [[]]  # as the last row there
        numbers = [[1, 2, 0][: len(row)] for row in words]
        columns = {"id": texts, "tokens": words, "pos_tags": numbers, "chunk_tags": numbers}
        return Dataset.from_dict(columns, Features(features))
    if name == "mteb/sts14-sts":
        scores = [index / 2 for index in range(8)]
        return Dataset.from_dict({"genre": texts, "sentence1": texts, "sentence2": texts[::-1], "score": scores})
    coarse = {"label_coarse": labels} if name == "SetFit/TREC-QC" else {}
    fine = [10 + index for index in range(8)] if coarse else labels
    return Dataset.from_dict({"text": texts, "label": fine, "label_text": texts, **coarse})


@pytest.fixture
def asked(monkeypatch):
    asked = []

    def load(name, split, revision=None, streaming=False):
        asked.append((name, split, revision))
        if streaming:
            book = "\r\n\r\n".join(f"Paragraph {index}. " + "word " * 90 for index in range(70))
            return IterableDataset.from_generator(lambda: ({"TEXT": book} for _ in range(100)))
        return rows_on_the_hub(name, split)

    monkeypatch.setattr(fetch_data, "load_dataset", load)
    return asked


def start(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["fetch_data.py", *map(str, flags)])
    fetch_data.main()


def test_the_files_are_what_probes_and_pretraining_read(asked, tmp_path, monkeypatch):
    start(monkeypatch, "--output_dir", tmp_path)
    tasks = load_tasks(None, str(tmp_path / "eval"))
    names = {task.name for task in tasks}
    assert names == {"sst2", "subj", "trec", "sts14", "conll2000-chunking.chunk_tags", "conll2000-chunking.pos_tags"}

    lines = (tmp_path / "eval" / "conll2000-chunking-train.jsonl").read_text().splitlines()
    assert len(lines) == 7 and json.loads(lines[0]) == {
        "tokens": ["train", "text", "0"],
        "pos_tags": ["B-NP", "I-NP", "O"],
        "chunk_tags": ["B-NP", "I-NP", "O"],
    }
    trec = [json.loads(line) for line in (tmp_path / "eval" / "trec-test.jsonl").read_text().splitlines()]
    assert {row["label"] for row in trec} == {0, 1} and set(trec[0]) == {"text", "label"}

    books = [load_dataset("parquet", data_files=str(tmp_path / f"books-{split}.parquet"), split="train") for split in
             ("train", "validation")]  # fmt: skip
    num_passages = 23 * fetch_data.NUM_BOOKS  # of three paragraphs each
    assert [len(part) for part in books] == [num_passages - num_passages // 20, num_passages // 20]
    assert all(200 <= len(text.split()) < 300 for text in books[1]["text"])

    asked.clear()
    start(monkeypatch, "--output_dir", tmp_path)
    assert asked == []  # everything is there


def test_only_some(asked, tmp_path, monkeypatch):
    start(monkeypatch, "--output_dir", tmp_path, "--only", "sts14")
    assert asked == [("mteb/sts14-sts", "test", None)]
    assert [path.name for path in (tmp_path / "eval").iterdir()] == ["sts14-test.jsonl"]
