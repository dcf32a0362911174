"""Files in all the shapes that people have: what is in them comes out, and what cannot be read is said."""

import bz2
import gzip
import json
import lzma
import re
import sys

import pyarrow
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from helpers import make_texts
from tjepa.corpus import files
from tjepa.corpus import train_tokenizer as tokenizer_script
from tjepa.corpus.documents import DataArguments, find_documents, limit_datasets, load_documents, load_splits
from tjepa.corpus.files import find_encoding, load_files, load_table
from tjepa.corpus.streams import DocumentStream
from tjepa.corpus.tokenization import StreamTokenizer, tokenize_documents
from tjepa.corpus.train_tokenizer import train_tokenizer
from tjepa.downstream.arguments import TextArguments


TEXTS = make_texts(30)


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=300, model_max_length=64)


def to_jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def texts_of(pattern, streaming: bool = False, **arguments) -> list:
    source = {"train_file": str(pattern), "validation_split_percentage": 0, "streaming": streaming, **arguments}
    column = arguments.get("text_column_name", "text")
    return [row[column] for row in load_documents(DataArguments(**source))["train"]]


def dropped_of(pattern, tokenizer, streaming: bool = False) -> tuple[int, dict[str, int]]:
    args = DataArguments(train_file=str(pattern), validation_split_percentage=0, streaming=streaming)
    _, counts = tokenize_documents(load_documents(args)["train"], tokenizer, args, "train")
    return counts.num_kept, counts.dropped


both = pytest.mark.parametrize("streaming", [False, True])


# ---- which files ----


@both
def test_brackets_in_a_name(tmp_path, streaming):
    """A path that a glob has found is not a glob."""
    names = ["part[1].jsonl", "part[2].jsonl", "part1.jsonl"]
    for name, text in zip(names, TEXTS, strict=False):
        (tmp_path / name).write_bytes(to_jsonl([{"text": text}]))
    assert sorted(texts_of(tmp_path / "part*.jsonl", streaming)) == sorted(TEXTS[:3])
    assert texts_of(tmp_path / "part[1].jsonl", streaming) == TEXTS[:1]


def test_brackets_in_the_name_of_a_labelled_file(tmp_path):
    for name, label in (("part[1]", 1), ("part1", 2)):
        Dataset.from_dict({"text": [name], "label": [label]}).to_parquet(tmp_path / f"{name}.parquet")
    assert load_files("--train_file", str(tmp_path / "*.parquet"))["label"][:] == [2, 1]


def test_a_name_that_is_nearly_right(tmp_path):
    (tmp_path / "stories.jsonl").write_bytes(to_jsonl([{"text": "x"}]))
    with pytest.raises(FileNotFoundError, match="--train_file: no file .*storys.jsonl.*Did you mean .*stories.jsonl"):
        texts_of(tmp_path / "storys.jsonl")


def test_a_folder_as_a_file_and_a_file_as_a_folder(tmp_path):
    (tmp_path / "stories.jsonl").write_bytes(to_jsonl([{"text": "x"}]))
    with pytest.raises(FileNotFoundError, match="It is a folder, which is given with --dataset_name; .*a glob"):
        texts_of(tmp_path)
    with pytest.raises(ValueError, match="it is a file, which is given with --train_file .*stories.jsonl"):
        load_documents(DataArguments(dataset_name=str(tmp_path / "stories.jsonl")))
    (tmp_path / "stories.jsonl").rename(tmp_path / "stories.csv")
    with pytest.raises(FileNotFoundError, match=r"It is a folder, whose files are given with .*/\*\.csv'"):
        load_files("--validation_file", str(tmp_path))


@pytest.mark.parametrize("names", [["a.md"], ["a.docx"], []])
def test_a_folder_of_files_that_are_not_read(tmp_path, names):
    (tmp_path / "data").mkdir()
    for name in names:
        (tmp_path / "data" / name).write_text("text\n")
    with pytest.raises(FileNotFoundError, match="no file in it that can be read, which is one of .parquet, .*holds"):
        load_documents(DataArguments(dataset_name=str(tmp_path / "data")))


def test_folders_that_datasets_cannot_read(tmp_path):
    (tmp_path / "data").mkdir()
    for name, column in (("a", "label"), ("b", "lab")):
        Dataset.from_dict({"text": [name], column: [1]}).to_parquet(tmp_path / "data" / f"{name}.parquet")
    arguments = TextArguments(dataset_name=str(tmp_path / "data"))
    with pytest.raises(ValueError, match="--dataset_name .*data cannot be read: Couldn't cast"):
        load_splits(arguments, ("train",))
    rows = Dataset.from_dict({"text": TEXTS})
    DatasetDict(train=rows, validation=rows.select([])).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="--dataset_name .*saved: one of its splits has no rows"):
        load_documents(DataArguments(dataset_name=str(tmp_path / "saved")))
    (tmp_path / "data [x]").mkdir()
    rows.to_parquet(tmp_path / "data [x]" / "a.parquet")
    with pytest.raises(FileNotFoundError, match="in a folder's name for a pattern: give the folder another name"):
        load_documents(DataArguments(dataset_name=str(tmp_path / "data [x]")))


# ---- columns ----


@both
def test_a_key_that_comes_late(tmp_path, streaming):
    """After more than the 10 MB from which datasets guesses the columns."""
    filler = "x" * 100_000
    rows = [{"text": f"{number} {filler}"} for number in range(110)]
    rows += [{"text": "the last", "note": {"deep": 1}}, {"text": "but one", "note": 3}]
    (tmp_path / "train.jsonl").write_bytes(to_jsonl(rows))
    found = texts_of(tmp_path / "train.jsonl", streaming)
    assert len(found) == 112 and found[-2:] == ["the last", "but one"]


@both
@pytest.mark.parametrize("extension", ["jsonl", "csv", "parquet"])
def test_files_that_differ_in_other_columns(tmp_path, streaming, extension):
    for name, column, value in (("a", "title", "t"), ("b", "score", 1.5)):
        table = Dataset.from_dict({column: [value], "text": [f"text of {name}"]})
        save = {"jsonl": table.to_json, "csv": table.to_csv, "parquet": table.to_parquet}[extension]
        save(tmp_path / f"{name}.{extension}")
    assert texts_of(tmp_path / f"*.{extension}", streaming) == ["text of a", "text of b"]


@both
def test_a_folder_of_such_files(tmp_path, streaming):
    """--dataset_name reads the same way as --train_file."""
    rows = [{"text": f"{number} {'x' * 100_000}"} for number in range(110)] + [{"text": "the last", "note": 1}]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train[1].jsonl").write_bytes(to_jsonl(rows))
    args = DataArguments(dataset_name=str(tmp_path / "data"), validation_split_percentage=0, streaming=streaming)
    assert [row["text"] for row in load_documents(args)["train"]] == [row["text"] for row in rows]


@both
def test_a_folder_of_parquet_files_that_differ(tmp_path, streaming):
    """As --train_file reads them: other columns, and one that is damaged."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name, column, value in (("a", "title", "t"), ("b", "score", 1.5), ("c", "score", 1.5)):
        Dataset.from_dict({column: [value], "text": [f"text of {name}"]}).to_parquet(folder / f"{name}.parquet")
    (folder / "c.parquet").write_bytes((folder / "c.parquet").read_bytes()[:-100])
    args = DataArguments(dataset_name=str(folder), validation_split_percentage=0, streaming=streaming)
    assert [row["text"] for row in load_documents(args)["train"]] == ["text of a", "text of b", None]
    (tmp_path / "rows").mkdir()
    Dataset.from_dict({"input_ids": [[1, 2, 3]], "text": ["abc"]}).to_parquet(tmp_path / "rows" / "train.parquet")
    args = DataArguments(dataset_name=str(tmp_path / "rows"), validation_split_percentage=0, streaming=streaming)
    assert next(iter(load_documents(args)["train"])) == {"input_ids": [1, 2, 3], "text": "abc"}


@pytest.mark.parametrize(
    ("names", "left_out"),
    [
        (
            ["a.jsonl", "b.csv", "c.csv", "notes.md", ".hidden.txt", "__x/x.txt", "config.json"],
            "a.jsonl",
        ),
        (["train-a.txt", "b.txt", "test.txt", "c.txt"], "b.txt, c.txt"),
        (["train/x.txt", "test/x.txt", "other/x.txt.gz"], "other/x.txt.gz"),
        (["train.txt", "test.txt", "README.md"], None),
        (["a.txt", "b.txt", "more/c.txt"], None),
    ],
)
def test_files_that_a_folder_leaves_out_are_named(tmp_path, monkeypatch, caplog, names, left_out):
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "data" / name for name in names):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(b"text\n") if path.suffix == ".gz" else b'text\n"a"\n')
    with caplog.at_level("WARNING"):
        load_documents(DataArguments(dataset_name="data", validation_split_percentage=0))
    warning = re.search("data: [0-9]+ of its files are left out: (.*)[.] Of a folder .* --train_file", caplog.text)
    assert (warning and warning[1]) == left_out


@both
def test_a_wrong_column(tmp_path, streaming, monkeypatch):
    for name in ("train.jsonl", "train.csv", "train.parquet"):
        table = Dataset.from_dict({"story": TEXTS[:3], "title": ["a", "b", "c"]})
        {"l": table.to_json, "v": table.to_csv, "t": table.to_parquet}[name[-1]](tmp_path / name)
        with pytest.raises(ValueError, match=r"no column 'text'; it has \['story', 'title'\].*--text_column_name"):
            texts_of(tmp_path / name, streaming)
    command = ["train_tokenizer.py", f"--train_file={tmp_path / 'train.jsonl'}", f"--output_dir={tmp_path / 'out'}"]
    monkeypatch.setattr(sys, "argv", [*command, f"--streaming={streaming}", "--text_column_name=body"])
    with pytest.raises(ValueError, match=r"no column 'body'.*--text_column_name"):
        tokenizer_script.main()


# ---- json ----


def test_labels_of_json_files_keep_their_types(tmp_path):
    rows = [{"text": "a", "label": 1, "tags": ["x"]}, {"text": "b", "label": 2}, {"text": "c", "note": "late"}]
    (tmp_path / "train.jsonl").write_bytes(to_jsonl(rows))
    loaded = load_files("--train_file", str(tmp_path / "train.jsonl"))
    assert loaded["label"][:] == [1, 2, None] and loaded["tags"][:] == [["x"], None, None]
    assert loaded["note"][:] == [None, None, "late"]
    (tmp_path / "mixed.jsonl").write_bytes(to_jsonl([*rows * 5000, {"text": "d", "label": "unknown"}]))
    assert load_files("--train_file", str(tmp_path / "mixed.jsonl"))["label"][-4:] == ["1", "2", None, "unknown"]
    (tmp_path / "torn.jsonl").write_bytes(to_jsonl(rows) + b'{"text": "d"')
    with pytest.raises(ValueError, match="row 4 of .*torn.jsonl cannot be read"):
        load_files("--train_file", str(tmp_path / "torn.jsonl"))


def test_damaged_json_keeps_the_lines_behind_it(tmp_path):
    (tmp_path / "a.json").write_text('{"text": 1\n{"text": "a\u2028b"}\n{"text": "c\u0085d"}\n', encoding="utf-8")
    path = [str(tmp_path / "a.json")]
    texts = [row.get("text") for row in files.read_documents(path, path, "text")]
    assert len(texts) == 3 and texts[1:] == ["a\u2028b", "c\u0085d"]


def test_numbers_larger_than_int64(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "id": 1}\n{"text": "b", "id": 18446744073709551616}\n')
    assert load_table("file", str(tmp_path / "a.jsonl"))["id"][:] == ["1", "18446744073709551616"]


def test_a_column_named_piece_says_nothing_of_documents():
    assert find_documents(Dataset.from_dict({"text": ["a"] * 3, "piece": ["knight"] * 3})).tolist() == [0, 1, 2]


def test_json_over_several_lines(tmp_path):
    rows = [{"text": text} for text in TEXTS]
    (tmp_path / "train.json").write_text(json.dumps(rows, indent=2))
    assert texts_of(tmp_path / "train.json") == texts_of(tmp_path / "train.json", True) == TEXTS


# ---- encodings, compression, damage ----


@both
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("extension", ["txt", "jsonl", "csv"])
def test_text_in_other_encodings(tmp_path, streaming, encoding, extension):
    texts = [f"café {text}" for text in TEXTS]
    content = {
        "txt": "\n".join(texts),
        "jsonl": "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts),
        "csv": "text\n" + "\n".join(texts),
    }[extension]
    (tmp_path / f"train.{extension}").write_bytes(content.encode(encoding))
    assert texts_of(tmp_path / f"train.{extension}", streaming) == texts


def test_what_is_not_another_encoding():
    samples = [b"", b"a", b"\x00" * 100, b"the fox\x00\x00\x00", "日本語".encode(), b"the fox sees"]
    assert {find_encoding(sample) for sample in samples} == {"utf-8-sig"}


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as file:
        file.write(content)
    return sink.getvalue().to_pybytes()


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


@both
@pytest.mark.parametrize("extension", list(COMPRESS))
def test_compressed_files_and_what_is_left_of_a_truncated_one(tmp_path, tokenizer, streaming, extension):
    """Without any package but those that are required."""
    texts = make_texts(8000)
    whole = COMPRESS[extension](to_jsonl([{"text": text} for text in texts]))
    path = tmp_path / f"train.jsonl{extension}"
    path.write_bytes(whole)
    assert texts_of(path, streaming) == texts
    path.write_bytes(whole[: len(whole) * 3 // 4])
    num_kept, dropped = dropped_of(path, tokenizer, streaming)
    assert 0 < num_kept < 8000 and dropped == {"unreadable": 1}
    (tmp_path / f"other.jsonl{extension}").write_bytes(b"no such format")
    assert dropped_of(tmp_path / f"*.jsonl{extension}", tokenizer, streaming) == (num_kept, {"unreadable": 2})


@both
@pytest.mark.parametrize(
    "error", [OSError(5, "Input/output error"), TimeoutError("timed out"), PermissionError(13, "no")]
)
def test_a_file_that_cannot_be_reached_is_an_error(tmp_path, streaming, error, monkeypatch):
    """Not damage, after which half of the corpus would be gone: it may be there at the next try."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_bytes(to_jsonl([{"text": text} for text in TEXTS]))
    open_file = files._open

    def fail(path, name, token):
        if name.endswith("b.jsonl"):
            raise error
        return open_file(path, name, token)

    monkeypatch.setattr(files, "_open", fail)
    with pytest.raises(type(error), match=str(error.args[-1])):
        texts_of(tmp_path / "*.jsonl", streaming)


@pytest.mark.parametrize("extension", COMPRESS)
def test_parquet_files_that_are_compressed_once_more(tmp_path, extension):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["x", "y"])})
    Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features).to_parquet(tmp_path / "train.parquet")
    packed = COMPRESS[extension]((tmp_path / "train.parquet").read_bytes())
    (tmp_path / f"packed.parquet{extension}").write_bytes(packed)
    assert texts_of(tmp_path / f"packed.parquet{extension}") == ["a", "b"]
    loaded = load_files("--train_file", str(tmp_path / f"packed.parquet{extension}"))
    assert loaded.features["label"].names == ["x", "y"] and loaded["label"][:] == [1, 0]


@both
def test_an_empty_compressed_file(tmp_path, streaming):
    for content in (gzip.compress(b""), b""):
        (tmp_path / "a.jsonl.gz").write_bytes(content)
        (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(to_jsonl([{"text": text} for text in TEXTS])))
        assert texts_of(tmp_path / "*.jsonl.gz", streaming) == TEXTS
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(ValueError, match="a.jsonl.gz' has no documents"):
        load_documents(DataArguments(train_file=str(tmp_path / "a.jsonl.gz"), streaming=streaming))


def test_a_damaged_stream_is_counted(tmp_path, tokenizer):
    (tmp_path / "train.jsonl").write_bytes(to_jsonl([{"text": text} for text in TEXTS]) + b'{"text": "the\n\xff\n')
    args = DataArguments(train_file=str(tmp_path / "train.jsonl"), validation_split_percentage=0, streaming=True)
    counter = StreamTokenizer(tokenizer, args)
    assert len(list(counter(load_documents(args)["train"]))) == 30
    assert counter.counts().dropped == {"unreadable": 2}


# ---- splits of a dataset ----


def save(folder, **splits) -> str:
    DatasetDict({name: Dataset.from_dict({"text": texts}) for name, texts in splits.items()}).save_to_disk(folder)
    return str(folder)


def test_a_saved_dataset_of_one_split_is_train(tmp_path):
    Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    args = DataArguments(dataset_name=str(tmp_path / "saved"), validation_split_percentage=10)
    documents = load_documents(args)
    assert sorted([*documents["train"]["text"], *documents["validation"]["text"]]) == sorted(TEXTS)
    for name in (args.dataset_name, save(tmp_path / "splits", train=TEXTS)):
        with pytest.raises(ValueError, match="--dataset_config_name en: .* has no configurations; leave it out"):
            load_documents(DataArguments(dataset_name=name, dataset_config_name="en"))
    fine_tuning = TextArguments(dataset_name=str(tmp_path / "saved"))
    assert load_splits(fine_tuning, ("train", "validation", "test"))["train"]["text"][:] == TEXTS


def test_names_of_splits(tmp_path, caplog):
    name = save(tmp_path / "mnli", train=TEXTS[:20], validation_matched=TEXTS[20:24], big=TEXTS[24:])
    with caplog.at_level("WARNING"):
        load_documents(DataArguments(dataset_name=name))
    assert "['validation_matched'] lie unused; --validation_split_name" in caplog.text
    named = {"train_split_name": "big", "validation_split_name": "validation_matched"}
    documents = load_documents(DataArguments(dataset_name=name, **named))
    assert documents["train"]["text"][:] == TEXTS[24:] and documents["validation"]["text"][:] == TEXTS[20:24]
    fine_tuning = TextArguments(dataset_name=name, **named, test_split_name="train")
    splits = load_splits(fine_tuning, ("train", "validation", "test"))
    assert [len(splits[split]) for split in ("train", "validation", "test")] == [6, 4, 20]
    with pytest.raises(ValueError, match=r"no split 'dev', only \['big', 'train', .*--validation_split_name"):
        load_documents(DataArguments(dataset_name=name, validation_split_name="dev"))


def test_the_train_split_is_not_the_validation_split_too(tmp_path):
    name = save(tmp_path / "saved", test=TEXTS[:10], validation=TEXTS[10:])
    documents = load_documents(DataArguments(dataset_name=name, train_split_name="validation"))
    assert [len(documents[split]) for split in ("train", "validation")] == [19, 1]
    assert sorted([*documents["train"]["text"], *documents["validation"]["text"]]) == sorted(TEXTS[10:])
    splits = load_splits(TextArguments(dataset_name=name, train_split_name="test"), ("train", "validation", "test"))
    assert set(splits) == {"train", "validation"}
    given = {"dataset_name": name, "train_split_name": "validation"}
    documents = load_documents(DataArguments(**given, validation_split_name="test"))
    assert [len(documents[split]) for split in ("train", "validation")] == [20, 10]
    for arguments in (DataArguments, TextArguments):
        with pytest.raises(ValueError, match="--train_split_name and --validation_split_name are both 'validation'"):
            arguments(**given, validation_split_name="validation")
    with pytest.raises(ValueError, match="leave --test_split_name out"):
        TextArguments(**given, test_split_name="validation")


def test_files_of_two_splits_are_apart(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("a text\n")
    (tmp_path / "link.txt").symlink_to(tmp_path / "b.txt")
    for train, validation in (("*.txt", "b.txt"), ("b.txt", "b.txt"), ("b.txt", "link.txt")):
        args = DataArguments(train_file=str(tmp_path / train), validation_file=str(tmp_path / validation))
        with pytest.raises(ValueError, match="both hold b.txt, so that what is trained on would be judged by itself"):
            load_documents(args)
    args = DataArguments(train_file=str(tmp_path / "a.txt"), validation_file=str(tmp_path / "b.txt"))
    assert set(load_documents(args)) == {"train", "validation"}


def test_flags_of_the_other_source_are_refused(tmp_path):
    name = save(tmp_path / "saved", train=TEXTS)
    with pytest.raises(ValueError, match="--validation_file: not used with --dataset_name"):
        DataArguments(dataset_name=name, validation_file="validation.jsonl")
    with pytest.raises(ValueError, match="--dataset_config_name, --train_split_name: not used with --train_file"):
        DataArguments(train_file="train.jsonl", train_split_name="train", dataset_config_name="en")


def test_blank_lines_are_not_held_out(tmp_path):
    for num_texts in (2, 4, 9, 17, 25):
        (tmp_path / "a.txt").write_text("\n\n".join(TEXTS[:1] * num_texts) + "\n")
        documents = load_documents(DataArguments(train_file=str(tmp_path / "a.txt")))
        assert set(documents["validation"]["text"]) == {TEXTS[0]}
        assert len(documents["train"]) + len(documents["validation"]) == 2 * num_texts - 1
    (tmp_path / "a.txt").write_text(f"\n{TEXTS[0]}\n\n")
    assert "validation" not in load_documents(DataArguments(train_file=str(tmp_path / "a.txt")))


def test_samples_are_drawn_from_all_over(tmp_path):
    """Of a file that is sorted by class, the first samples would be of one class."""
    rows = [{"text": f"text {row}", "label": row // 500} for row in range(1000)]
    (tmp_path / "train.jsonl").write_bytes(to_jsonl(rows))
    args = {"train_file": str(tmp_path / "train.jsonl"), "max_train_samples": 50, "validation_split_percentage": 0}
    splits = load_splits(TextArguments(**args), ("train", "validation", "test"))
    labels = limit_datasets(splits, TextArguments(**args))["train"]["label"][:]
    assert 15 < sum(labels) < 35 and len(labels) == 50
    assert limit_datasets(splits, TextArguments(**args))["train"]["label"][:] == labels


@pytest.mark.parametrize("num_workers", [0, 1, 2, 4, 8])
def test_a_limited_stream_has_as_many_documents_for_any_number_of_readers(tmp_path, num_workers):
    for part in range(4):
        rows = [{"text": f"{part}-{row}"} for row in range(60)]
        (tmp_path / f"{part}.jsonl").write_bytes(to_jsonl(rows))
    args = DataArguments(
        train_file=str(tmp_path / "*.jsonl"), streaming=True, max_train_samples=100, validation_split_percentage=0
    )
    num_readers = max(1, num_workers)
    stream = DocumentStream(load_documents(args)["train"])
    shares = [[row["text"] for row in stream.share(reader, num_readers)] for reader in range(num_readers)]
    found = [text for share in shares for text in share]
    assert len(found) == 100 and set(found) == {f"{part}-{row}" for part in (0, 1) for row in range(60)} - {
        f"1-{row}" for row in range(40, 60)
    }
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_stream_shuffles_its_files_by_epoch(tmp_path):
    """What `set_epoch` of datasets does from the version on that pyproject.toml asks for."""
    for part in range(8):
        (tmp_path / f"{part}.jsonl").write_bytes(to_jsonl([{"text": str(part)}]))
    args = DataArguments(train_file=str(tmp_path / "*.jsonl"), streaming=True, validation_split_percentage=0)
    documents = load_documents(args)["train"]
    orders = []
    for epoch in range(3):
        documents.set_epoch(epoch)
        orders.append([row["text"] for row in documents])
    assert orders[0] == sorted(orders[0]) and orders[0] != orders[1] != orders[2]
    assert {tuple(sorted(order)) for order in orders} == {tuple(orders[0])}
