"""Search: nearest texts by whitened vectors, an index that is kept as long as it is right, and the command."""

import io
import json
import os
import sys

import encoder_folders
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from transformers import AutoModel, AutoTokenizer

import tjepa
from finetuning_helpers import make_folder, make_rows
from tjepa import cli
from tjepa.corpus.paths import find_newest_run
from tjepa.downstream.embedding import Embedder, embed_texts, load_embedder
from tjepa.downstream.whitening import Whitening
from tjepa.tools import search
from tjepa.tools.search import Hit, SearchIndex, WordIndex, format_hits, index_path, load_passages, open_index


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("search"))


@pytest.fixture
def model(folder):
    """The tiny encoder's folder without an index."""
    for path in (folder / "encoder" / search.INDEX_FOLDER).glob("*"):
        path.unlink()
    return folder / "encoder"


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(row["text"] for row in make_rows(100)) + "\n\n")
    return path


@pytest.fixture
def docstrings(monkeypatch):
    """Few of them, in place of the installed libraries'."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=["torch", "numpy"])})
    rows = {
        "train": {"text": ["The fox runs.\nHome.\n\nArgs: night", "The hen falls.\n\nred"], "label": [0, 1]},
        "validation": {"text": ["The fox runs. Home.\n\nAgain: a blue hen"], "label": [1]},
    }
    documents = {split: Dataset.from_dict(columns, features=features) for split, columns in rows.items()}
    monkeypatch.setattr(search, "load_quickstart_documents", lambda cache_dir: documents)
    return {"The fox runs. Home.": "torch", "The hen falls.": "numpy"}


@pytest.fixture
def texts_read(monkeypatch):
    """How many texts were embedded in each call."""
    seen, call = [], Embedder.__call__
    monkeypatch.setattr(Embedder, "__call__", lambda self, texts: seen.append(len(texts)) or call(self, texts))
    return seen


def run(monkeypatch, *arguments, stdin: str = ""):
    monkeypatch.setattr(sys, "argv", ["tjepa", "search", *map(str, arguments)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    cli.main()


# ---- what is found ----


def test_scores_are_cosines_of_whitened_vectors_the_nearest_first(model, texts):
    index = open_index(str(model), str(texts))
    embeddings = embed_texts(AutoModel.from_pretrained(model), AutoTokenizer.from_pretrained(model), index.texts, 32)
    vectors = Whitening.fit(embeddings)(embeddings)
    expected = torch.cosine_similarity(vectors[7], vectors).sort(descending=True)
    hits = index.search(index.texts[7], 5)
    assert [hit.text for hit in hits] == [index.texts[at] for at in expected.indices[:5]]
    assert [hit.score for hit in hits] == pytest.approx(expected.values[:5].tolist(), abs=1e-2)
    assert hits[0].text == index.texts[7]


@pytest.mark.parametrize("num_texts", [1, 2, 20, 40])
def test_few_texts_are_found_too(model, num_texts):
    passages = {row["text"]: "" for row in make_rows(num_texts)}
    index = SearchIndex.build(load_embedder(model), passages)
    for text in index.texts:
        assert index.search(text, 1)[0].text == text
    assert len(index.search("a fox", 1000)) == len(passages)


def test_docstrings_are_their_first_paragraphs_each_once(docstrings):
    assert load_passages() == docstrings


def test_files_with_columns_and_unusable_rows(tmp_path, caplog):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"body": text}) for text in ["a fox", None, " ", "a fox", "a hen"]))
    assert load_passages(str(path), "body") == {"a fox": "", "a hen": ""}
    assert "3 of 5 left out: null 1, empty or whitespace only 1, copy of another 1" in caplog.text


def test_what_a_text_would_do_to_a_terminal_is_not_done():
    (line,) = format_hits([Hit(0.5, "x\x1b]0;mine\x07y \x9b31m", "")], 60)
    assert line == "0.50 x\ufffd]0;mine\ufffdy \ufffd31m"


def test_words_find_what_shares_words_and_nothing_else():
    words = WordIndex({"the red fox": "", "the hen falls": "", "🦊!": ""})
    assert [hit.text for hit in words.search("a hen falls", 3)] == ["the hen falls"]
    assert words.search("night", 3) == [] and words.search("🦊", 3)[0].text == "🦊!"


def test_an_encoder_of_transformers_searches_too(tmp_path):
    """By its own pooling, that of sentence-transformers beside it."""
    folder = encoder_folders.make_folder(tmp_path / "bert")
    pooling = {**encoder_folders.POOLING, "pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (tmp_path / "texts.txt").write_text("\n".join(row["text"] for row in make_rows(12)))
    index = open_index(str(folder), str(tmp_path / "texts.txt"))
    assert index.search(index.texts[3], 1)[0].text == index.texts[3]
    vectors = index.whitening(tjepa.embed(folder, index.texts))
    torch.testing.assert_close(index.vectors, torch.nn.functional.normalize(vectors))


# ---- the index ----


def test_the_index_is_read_the_second_time_and_says_the_same(model, texts, texts_read):
    first = open_index(str(model), str(texts)).search("red fox", 4)
    assert sum(texts_read) > 90
    texts_read.clear()
    second = open_index(str(model), str(texts)).search("red fox", 4)
    assert sum(texts_read) == search.NUM_COMPARED + 1
    assert [hit.text for hit in second] == [hit.text for hit in first]
    assert [hit.score for hit in second] == pytest.approx([hit.score for hit in first], abs=1e-2)


def test_other_texts_or_another_encoder_make_another_index(model, texts, texts_read):
    open_index(str(model), str(texts))
    texts.write_text(texts.read_text() + "a new text\n")
    assert "a new text" in [hit.text for hit in open_index(str(model), str(texts)).search("a new text", 1)]
    embedder = load_embedder(str(model))
    path, passages = index_path(model, str(texts)), load_passages(str(texts))
    assert SearchIndex.load(path, embedder, passages) is not None
    with torch.no_grad():
        for parameter in embedder.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    assert SearchIndex.load(path, embedder, passages) is None
    assert index_path("run", "https://a.host/x.jsonl?token=secret").name == "x.jsonl.safetensors"


def test_a_folder_that_cannot_be_written_is_searched_all_the_same(model, texts, caplog):
    blocked = model / search.INDEX_FOLDER
    if blocked.is_dir():
        blocked.rmdir()
    blocked.write_text("in the way")
    try:
        assert open_index(str(model), str(texts)).search("a fox", 1)
    finally:
        blocked.unlink()
    assert "The index is not saved" in caplog.text


def test_the_newest_run_is_the_one_with_the_newest_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no run with a model under runs/.*tjepa pretrain.*another folder"):
        find_newest_run()
    for name, time in (("old", 2), ("new", 3), ("oldest", 1), ("classifier", 4)):
        weights = tmp_path / "runs" / name / "model.safetensors"
        weights.parent.mkdir(parents=True)
        weights.touch()
        os.utime(weights, (time, time))
        if name != "classifier":
            (weights.parent / "run.json").write_text("{}")
    (tmp_path / "runs" / "unfinished").mkdir()  # newer, and without weights
    assert str(find_newest_run()) == "runs/new"


# ---- the command ----


def test_the_command_answers_from_the_newest_run(folder, tmp_path, docstrings, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(folder / "pretraining")
    (tmp_path / "runs" / "mine" / "run.json").write_text("{}")
    monkeypatch.setenv("COLUMNS", "120")
    run(monkeypatch, "The hen falls.", "--tfidf", "--num_results", "1")
    out = capsys.readouterr().out
    assert out.startswith("runs/mine, 2 docstrings\n") and index_path(folder / "pretraining").is_file()
    line = next(line for line in out.splitlines() if "[numpy]" in line)
    assert line.count("[numpy] The hen falls.") == 2 and line.split()[0] == "1.00"


def test_without_a_query_each_line_of_the_input_is_one(model, texts, monkeypatch, capsys):
    run(monkeypatch, "--model", model, "--file", texts, stdin="red fox\n\nread my config.yaml\n")
    out = capsys.readouterr().out
    assert out.count(" s)\n") == 2 and "'read my config.yaml'" in out
    run(monkeypatch, "read my config.yaml", "--model", model, "--file", texts)
    assert "'read my config.yaml'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([" "], "The query is empty"),
        (["fox", "--text_column_name", "body"], "--text_column_name body is a column of --file, and there is none"),
        (["fox", "--num_results", "0"], "argument --num_results: 0; it must be at least 1"),
        (["fox", "--file", "missing.txt"], "--file: no file 'missing.txt'"),
        (["fox", "--file", "EMPTY", "--text_column_name", "body"], "has no column 'body'"),
        (["fox", "--file", "EMPTY"], "holds no text that could be found: empty or whitespace only 1. --text_column"),
        (["fox", "--model", "./missing"], "--model ./missing: there is no such file or folder"),
    ],
)
def test_what_cannot_be_searched_is_said_in_one_line(arguments, message, model, texts, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty.jsonl").write_text('{"text": " "}\n')
    names = {"TEXTS": texts, "EMPTY": tmp_path / "empty.jsonl"}
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, "--model", model, *[names.get(argument, argument) for argument in arguments])
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and lines[-1].startswith("tjepa search: error: ") and message in lines[-1]


@pytest.mark.parametrize("query", ["x" * 100_000, "🦊🦊", "الثعلب يركض", "eigenvalues\nof a matrix"])
def test_any_query_gets_an_answer_that_fits(query, model, texts, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    run(monkeypatch, query, "--model", model, "--file", texts)
    answers = capsys.readouterr().out.splitlines()[-5:]
    assert len(answers) == 5 and all(len(line) <= 60 for line in answers)
