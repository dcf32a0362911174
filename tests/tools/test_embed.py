"""`tjepa embed`: vectors with ids in either format, going on after an interruption, and what it refuses."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet

import tjepa
from finetuning_helpers import make_folder, make_rows
from helpers import write_jsonl
from tjepa.downstream.embedding import Embedder
from tjepa.tools import embed


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("embed")) / "encoder"


@pytest.fixture
def texts(monkeypatch):
    monkeypatch.setattr(embed, "TEXTS_PER_PART", 8)
    monkeypatch.setattr(embed, "TEXTS_PER_STEP", 3)
    return [row["text"] for row in make_rows(20)]


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr("sys.argv", ["tjepa embed", *map(str, arguments)])
    embed.main()


def check(vectors, expected) -> None:
    torch.testing.assert_close(torch.tensor(np.array(vectors, np.float32)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("format", ["parquet", "npy"])
def test_vectors_have_the_ids_of_their_texts(model, texts, tmp_path, monkeypatch, capsys, format):
    rows = [{"body": text, "key": f"k{index}"} for index, text in enumerate(texts)]
    rows[2]["body"], rows[9]["body"], rows[10]["body"] = "", None, "\ufffd"
    rows[4]["key"] = "k3"
    tokenize = Embedder.tokenize  # for which the last one has no token
    monkeypatch.setattr(
        Embedder,
        "tokenize",
        lambda self, texts: [[] if text == "\ufffd" else tokenize(self, [text])[0] for text in texts],
    )
    file = write_jsonl(tmp_path / "texts.jsonl", rows)
    options = ["--model", model, "--text_column_name", "body", "--id_column_name", "key", "--format", format]
    run(monkeypatch, file, "--output", tmp_path / "out", *options)
    kept = [row for index, row in enumerate(rows) if index not in (2, 9, 10)]
    if format == "parquet":
        assert sorted(path.name for path in (tmp_path / "out").glob("part*")) == [
            f"part-0000{i}.parquet" for i in range(3)
        ]
        found = parquet.read_table(tmp_path / "out").to_pydict()  # of all parts, in order
        ids, vectors = found["id"], found["embedding"]
    else:
        assert {path.name for path in (tmp_path / "out").iterdir()} == {"ids.npy", "embeddings.npy", embed.SETTINGS}
        ids, vectors = np.load(tmp_path / "out" / "ids.npy").tolist(), np.load(tmp_path / "out" / "embeddings.npy")
    assert ids == [row["key"] for row in kept]
    check(vectors, tjepa.embed(model, [row["body"] for row in kept]))
    said = "left out: empty or whitespace only 1, null 1, without a token 1; 1 rows have the id of another"
    assert said in capsys.readouterr().out


def test_a_file_without_texts_and_a_folder_that_cannot_be_written_are_errors(model, tmp_path, monkeypatch):
    (tmp_path / "texts.txt").write_text(" \n\t\n")
    with pytest.raises(
        ValueError, match="holds no text that could be read: empty or whitespace only 2. --text_column"
    ):
        run(monkeypatch, tmp_path / "texts.txt", "--output", tmp_path / "out", "--model", model)
    with pytest.raises(FileExistsError, match="--output .*texts.txt is a file: name a folder"):
        run(monkeypatch, tmp_path / "texts.txt", "--output", tmp_path / "texts.txt" / "out", "--model", model)


def test_texts_without_a_token_are_no_vectors(model, tmp_path, monkeypatch):
    monkeypatch.setattr(Embedder, "tokenize", lambda self, texts: [[] for _ in texts])
    (tmp_path / "texts.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match="holds no text that could be read: without a token 2"):
        run(monkeypatch, tmp_path / "texts.txt", "--output", tmp_path / "out", "--model", model)


def test_an_interrupted_command_goes_on(model, texts, tmp_path, monkeypatch, capsys):
    file, out = tmp_path / "texts.txt", tmp_path / "out"
    file.write_text("\n".join(texts) + "\n")
    embedded, embed_part = [], embed.embed_part

    def interrupted(embedder, ids, *others):
        if len(embedded) == 2:
            raise KeyboardInterrupt
        embedded.append(ids.to_pylist())
        return embed_part(embedder, ids, *others)

    monkeypatch.setattr(embed, "embed_part", interrupted)
    command = [file, "--output", out, "--model", model, "--format", "npy"]
    with pytest.raises(SystemExit, match="130"):
        run(monkeypatch, *command)
    assert "The same command goes on" in capsys.readouterr().err
    assert not (out / "ids.npy").exists()
    embedded[:] = [None]  # room for one more part: the third
    run(monkeypatch, *command)
    assert embedded[1:] == [list(range(16, 20))]
    assert np.load(out / "ids.npy").tolist() == list(range(20))
    check(np.load(out / "embeddings.npy"), tjepa.embed(model, texts))
    before = (out / "embeddings.npy").stat().st_mtime_ns
    index = Path(model) / "search_index" / "texts.safetensors"  # as `tjepa search` leaves it
    index.parent.mkdir(exist_ok=True)
    index.touch()
    run(monkeypatch, *command)  # nothing is left to do
    assert (out / "embeddings.npy").stat().st_mtime_ns == before


def test_the_newest_run_and_numbers_of_rows_are_the_defaults(model, texts, tmp_path, monkeypatch):
    shutil.copytree(model, tmp_path / "runs" / "mine")
    (tmp_path / "runs" / "mine" / "run.json").write_text("{}")
    write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, "texts.jsonl", "--output", "embeddings")
    found = parquet.read_table("embeddings").to_pydict()
    assert found["id"] == list(range(20))
    check(found["embedding"], tjepa.embed(model, texts))


def test_what_it_refuses(model, texts, tmp_path, monkeypatch, capsys):
    file = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    out = tmp_path / "out"
    command = [file, "--output", out, "--model", model]
    with pytest.raises(FileExistsError, match="holds other files: choose another --output"):
        run(monkeypatch, file, "--model", model, "--output", model)
    with pytest.raises(ValueError, match=r"no column 'key'.*pass --id_column_name"):
        run(monkeypatch, *command, "--id_column_name", "key")
    with pytest.raises(FileNotFoundError, match="--model .*nowhere"):
        run(monkeypatch, file, "--output", out, "--model", tmp_path / "nowhere")
    for flag in ("--batch_size", "--max_length"):
        with pytest.raises(SystemExit):
            run(monkeypatch, *command, flag, "0")
        assert f"argument {flag}: 0; it must be at least 1" in capsys.readouterr().err
    assert not out.exists()
    run(monkeypatch, *command)
    with pytest.raises(ValueError, match=r"vectors of another max_length \(32; now 4\): choose another --output"):
        run(monkeypatch, *command, "--max_length", 4)
    write_jsonl(file, [{"text": text} for text in texts[1:]])
    with pytest.raises(ValueError, match=r"vectors of another file \(\S*texts.jsonl changed\)"):
        run(monkeypatch, *command)
    write_jsonl(file, [{"text": "a fox", "key": 1}, {"text": "a hen", "key": None}])
    with pytest.raises(ValueError, match="a row without an id in its column 'key'"):
        run(monkeypatch, file, "--model", model, "--output", tmp_path / "b", "--id_column_name", "key")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json", "1_Pooling/config.json"])
def test_vectors_of_a_model_that_has_changed_are_not_kept(model, texts, tmp_path, monkeypatch, name):
    file = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    changed = shutil.copytree(model, tmp_path / "model") / name
    changed.parent.mkdir(exist_ok=True)
    command = [file, "--output", tmp_path / "out", "--model", tmp_path / "model"]
    run(monkeypatch, *command)
    before = changed.read_bytes() if changed.exists() else b"{}"
    changed.write_bytes(before)
    with pytest.raises(ValueError, match=rf"vectors of another model \(\S*{name} changed\)"):
        run(monkeypatch, *command)


@pytest.mark.parametrize(
    ("ids", "format"),
    [
        (pyarrow.array([2**63 + index for index in range(20)], pyarrow.uint64()), "npy"),
        (pyarrow.array([f"k{index}" for index in range(20)]), "npy"),
        (pyarrow.array([f"k{index}" for index in range(20)], pyarrow.string_view()), "parquet"),
        (pyarrow.array(range(20), pyarrow.timestamp("s")), "parquet"),
    ],
)
def test_ids_keep_their_type(model, texts, tmp_path, monkeypatch, ids, format):
    """Also where a part of the folder has no text that can be read; which readers of `datasets` pass over."""
    from datasets import load_dataset

    texts[8:16] = [""] * 8
    parquet.write_table(pyarrow.table({"text": texts, "key": ids}), tmp_path / "texts.parquet")
    out = tmp_path / "out"
    command = [tmp_path / "texts.parquet", "--model", model, "--id_column_name", "key", "--output", out]
    run(monkeypatch, *command, "--format", format)
    kept = ids.to_pylist()[:8] + ids.to_pylist()[16:]
    if format == "npy":
        assert np.load(out / "ids.npy").tolist() == kept
    else:
        assert load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))["id"][:] == kept
    if ids.type == pyarrow.timestamp("s"):
        with pytest.raises(ValueError, match="The ids of .* are Value.*timestamp.*, and --format npy takes numbers"):
            run(monkeypatch, *command[:-1], tmp_path / "arrays", "--format", "npy")


def test_settings_are_read_by_nobody_else(model, texts, tmp_path, monkeypatch):
    """The folder is a dataset of parquet files, as it is."""
    from datasets import load_dataset

    file = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    run(monkeypatch, file, "--output", tmp_path / "out", "--model", model)
    rows = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows.column_names == ["id", "embedding"] and len(rows) == 20
    assert json.loads((tmp_path / "out" / embed.SETTINGS).read_text())["format"] == "parquet"
