"""What a prepared folder says of itself and what may not contradict it; documents stay whole when it is divided."""

import json
import re
import shlex

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer

from helpers import REPOSITORY, make_texts
from tjepa.corpus.arguments import parse_arguments
from tjepa.corpus.documents import DataArguments, limit_datasets, load_documents
from tjepa.corpus.preparation import fingerprint
from tjepa.corpus.prepare_dataset import PreparationArguments, prepare_dataset
from tjepa.corpus.splits import tokenize_splits
from tjepa.corpus.tokenization import tokenize_documents
from tjepa.corpus.train_tokenizer import train_tokenizer


@pytest.fixture(autouse=True)
def own_folder(own_cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def prepare(tmp_path):
    """Prepares 24 documents of some 40 tokens, each with a number as its first token."""
    texts = [f"{number} {text}" for number, text in enumerate(make_texts(24))]
    (tmp_path / "stories.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_tokenizer(texts, vocab_size=300, model_max_length=64).save_pretrained(tmp_path / "tokenizer")

    def run(**arguments):
        defaults = {"train_file": "stories.jsonl", "tokenizer_name": "tokenizer", "output_dir": "prepared"}
        return prepare_dataset(PreparationArguments(**{**defaults, "min_tokens": 4, **arguments}))

    return run


# ---- documents stay whole ----


def documents_of(rows: list[list[int]], documents: list[list[int]]) -> set[int]:
    """Which documents the rows are pieces of."""
    return {
        number
        for number, document in enumerate(documents)
        for row in rows
        if any(document[start : start + len(row)] == row for start in range(0, len(document), 8))
    }


def test_a_split_dataset_is_divided_by_document(prepare, tmp_path):
    prepare(long_documents="split", max_length=8, validation_split_percentage=0)
    tokenizer = AutoTokenizer.from_pretrained("tokenizer")
    texts = [json.loads(line)["text"] for line in (tmp_path / "stories.jsonl").read_text().splitlines()]
    documents = tokenizer(texts, add_special_tokens=False)["input_ids"]
    splits = load_documents(DataArguments(dataset_name="prepared", validation_split_percentage=25))
    rows = {split: dataset["input_ids"][:] for split, dataset in splits.items()}
    whole = {
        split: documents_of([row for row in of_split if len(row) == 8], documents) for split, of_split in rows.items()
    }
    assert len(whole["validation"]) == 6 and len(whole["train"]) == 18
    assert not whole["train"] & whole["validation"]

    limited = load_documents(
        DataArguments(dataset_name="prepared", max_train_samples=5, validation_split_percentage=0)
    )["train"]
    assert sum(piece == 0 for piece in limited["piece"]) == 5 < len(limited)


def test_documents_are_divided_and_drawn_whole():
    num_pieces = np.random.default_rng(0).integers(1, 6, size=40)
    pieces = [
        {"input_ids": [0], "document": d, "piece": piece} for d, num in enumerate(num_pieces) for piece in range(num)
    ]
    args = DataArguments(validation_split_percentage=20, max_train_samples=10, max_eval_samples=4)
    splits = limit_datasets({"train": Dataset.from_list(pieces)}, args)
    for split, num_documents in (("train", 10), ("validation", 4)):
        found = splits[split]["document"][:]
        assert len(set(found)) == num_documents and found == sorted(found)
        assert all(found.count(document) == num_pieces[document] for document in found)
    assert not set(splits["train"]["document"]) & set(splits["validation"]["document"])


# ---- what contradicts the folder ----


def test_the_folder_says_how_it_was_made(prepare):
    prepare(max_length=16, long_documents="split")
    record = json.loads(open("prepared/preparation.json").read())
    assert record["tokenizer_fingerprint"] == fingerprint(AutoTokenizer.from_pretrained("tokenizer"))
    args = DataArguments(dataset_name="prepared")
    assert (args.max_length, args.min_tokens, args.long_documents) == (16, 4, "split")
    same = DataArguments(dataset_name="prepared", max_length=16, min_tokens=4, long_documents="split")
    assert same.max_length == 16
    args = DataArguments(train_file="stories.jsonl")
    assert (args.max_length, args.min_tokens, args.long_documents) == (1024, 2, "truncate")


@pytest.mark.parametrize(
    "flag", [{"max_length": 8}, {"max_length": 32}, {"min_tokens": 2}, {"long_documents": "truncate"}]
)
def test_flags_that_contradict_the_folder(prepare, flag):
    """A shorter length included; the command in the message prepares what was asked for."""
    prepare(max_length=16, long_documents="split")
    [(name, value)] = flag.items()
    with pytest.raises(ValueError, match=f"prepared with --{name} .*--{name} {value} can have no effect") as error:
        DataArguments(dataset_name="prepared", **flag)
    with pytest.raises(ValueError, match="with --max_length 16, --min_tokens 4, so --max_length 8, --min_tokens 2"):
        DataArguments(dataset_name="prepared", max_length=8, min_tokens=2)
    command = shlex.split(re.search("again: (tjepa prepare .*)$", str(error.value))[1])
    (again,) = parse_arguments(PreparationArguments, command[2:])
    prepare_dataset(again)
    assert getattr(DataArguments(dataset_name="prepared", **flag), name) == value


def test_the_command_in_the_message_works_from_elsewhere(prepare, tmp_path, monkeypatch):
    """And where the folder was moved it leaves alone what has taken its old place."""
    prepare(max_length=16)
    (tmp_path / "prepared").rename(tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="prepare the documents again") as error:
        DataArguments(dataset_name="../moved", max_length=8)
    command = shlex.split(re.search("again: (tjepa prepare .*)$", str(error.value))[1])
    (again,) = parse_arguments(PreparationArguments, command[2:])
    prepare_dataset(again)
    assert DataArguments(dataset_name="../moved", max_length=8).max_length == 8
    assert not (tmp_path / "prepared").exists()


def test_another_column_contradicts_the_folder(prepare):
    prepare()
    with pytest.raises(ValueError, match="prepared with --text_column_name text, so --text_column_name story"):
        DataArguments(dataset_name="prepared", text_column_name="story")
    with pytest.raises(ValueError, match="prepared is prepared already"):
        PreparationArguments(dataset_name="prepared", tokenizer_name="tokenizer", output_dir="again")


def tokenize(tokenizer, **arguments):
    args = DataArguments(dataset_name="prepared", **arguments)
    return tokenize_splits(load_documents(args), tokenizer, args, training_args=None)


def test_ids_of_another_vocabulary(prepare):
    prepare(max_length=16)
    splits, _ = tokenize(AutoTokenizer.from_pretrained("tokenizer"))
    assert len(splits["train"]) == 23
    tokenize(AutoTokenizer.from_pretrained("prepared"))
    other = train_tokenizer([text[::-1] for text in make_texts(24)], vocab_size=300, model_max_length=64)
    other.save_pretrained("other")
    with pytest.raises(ValueError, match="prepared holds token ids of another vocabulary") as error:
        tokenize(AutoTokenizer.from_pretrained("other"))
    command = shlex.split(re.search("again: (tjepa prepare .*)$", str(error.value))[1])
    (again,) = parse_arguments(PreparationArguments, command[2:])
    assert again.tokenizer_name == "other" and again.max_length == 16 and again.overwrite_output_dir
    longer = AutoTokenizer.from_pretrained("tokenizer")
    longer.add_tokens(["hippogriff"])  # ids beyond those of the folder
    tokenize(longer)


def test_a_folder_without_a_fingerprint(prepare):
    """As older versions wrote it: its tokenizer tells."""
    prepare(max_length=16)
    record = json.loads(open("prepared/preparation.json").read())
    del record["tokenizer_fingerprint"]
    open("prepared/preparation.json", "w").write(json.dumps(record))
    tokenize(AutoTokenizer.from_pretrained("tokenizer"))
    with pytest.raises(ValueError, match="another vocabulary"):
        tokenize(train_tokenizer([text[::-1] for text in make_texts(24)], vocab_size=300, model_max_length=64))


def test_token_ids_from_elsewhere(prepare):
    prepare()
    tokenizer = AutoTokenizer.from_pretrained("tokenizer")
    DatasetDict(train=Dataset.from_dict({"input_ids": [[1, 2, 3], [4] * 20]})).save_to_disk("rows")
    args = DataArguments(dataset_name="rows", max_length=16, validation_split_percentage=0)
    with pytest.raises(ValueError, match="rows of up to 20 tokens.*pass --max_length 20"):
        tokenize_splits(load_documents(args), tokenizer, args, training_args=None)
    DatasetDict(train=Dataset.from_dict({"input_ids": [[1, 2, 30_000]]})).save_to_disk("high")
    args = DataArguments(dataset_name="high", validation_split_percentage=0)
    with pytest.raises(ValueError, match="token id 30000, which the tokenizer .* does not have"):
        tokenize_splits(load_documents(args), tokenizer, args, training_args=None)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[5, 6, -100]], "token id -100, which"),
        ([[5, 6, None]], "token id None, which"),
        ([[5, 6, 7], None], "the train split has 1 rows of fewer than 2 tokens"),
        ([[5, 6, 7], [5], None, []], "the train split has 3 rows of fewer than 2 tokens"),
        (
            [[5.0, 6.0]],
            "input_ids of the train split are of the type list<item: double>, and must be lists of integers",
        ),
        ([[[5], [6]]], "must be lists of integers"),
        (["a text"], "must be lists of integers"),
    ],
)
def test_token_ids_that_are_none(prepare, rows, message):
    prepare()
    DatasetDict(train=Dataset.from_dict({"input_ids": rows})).save_to_disk("rows")
    args = DataArguments(dataset_name="rows", validation_split_percentage=0)
    with pytest.raises(ValueError, match=re.escape(message)):
        tokenize_splits(load_documents(args), AutoTokenizer.from_pretrained("tokenizer"), args, training_args=None)


def test_presets_go_together():
    """configs/tinystories.yaml trains on what configs/prepare_tinystories.yaml prepares."""
    import yaml

    for training in ("tinystories", "reference"):
        asked = yaml.safe_load((REPOSITORY / "configs" / f"{training}.yaml").read_text())
        prepared = yaml.safe_load((REPOSITORY / "configs" / "prepare_tinystories.yaml").read_text())
        for name in ("max_length", "min_tokens", "long_documents"):
            assert asked.get(name) in (None, prepared[name])


def test_a_folder_that_is_not_prepared_yet():
    with pytest.raises(FileNotFoundError, match="data/tinystories.*tjepa prepare configs/prepare_tinystories.yaml"):
        load_documents(DataArguments(dataset_name="data/tinystories"))
    with pytest.raises(FileNotFoundError, match=r"--dataset_name ./prepard.*Did you mean prepared\?"):
        Dataset.from_dict({"text": ["x"]}).save_to_disk("prepared")
        load_documents(DataArguments(dataset_name="./prepard"))


# ---- what is lost, and what is there twice ----


def test_the_share_that_truncation_loses(tmp_path, caplog):
    texts = make_texts(40)
    tokenizer = train_tokenizer(texts, vocab_size=300, model_max_length=64)
    num_tokens = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    expected = 1 - sum(min(16, num) for num in num_tokens) / sum(num_tokens)
    dataset = Dataset.from_dict({"text": texts})
    _, counts = tokenize_documents(dataset, tokenizer, DataArguments(max_length=16), "train")
    assert counts.share_cut == pytest.approx(expected) and expected > 0.3
    assert f"tokens cut off ({expected:.1%})" in str(counts)
    assert f"train: {expected:.1%} of all tokens lie beyond the 16 tokens" in caplog.text
    assert "in 40 of 40 documents. --long_documents split" in caplog.text
    caplog.clear()
    args = DataArguments(max_length=16, long_documents="split")
    assert tokenize_documents(dataset, tokenizer, args, "train")[1].share_cut < 0.02
    tokenize_documents(dataset, tokenizer, DataArguments(max_length=600), "train")
    assert "--long_documents split" not in caplog.text


def test_texts_that_are_the_same_as_far_as_they_are_kept(prepare, tmp_path):
    text = "the fox sees a red hen and runs home"
    texts = [f"{text} before night falls", f"{text} and falls", text, "a red hen sees the fox", f"  {text} and falls "]
    (tmp_path / "stories.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    arguments = {"deduplicate": True, "validation_split_percentage": 0, "overwrite_output_dir": True}
    cut = prepare(max_length=4, **arguments)["train"]
    assert (cut.num_kept, cut.dropped) == (2, {"duplicate": 3})
    rows = load_documents(DataArguments(dataset_name="prepared", validation_split_percentage=0))["train"]["input_ids"]
    assert len({tuple(row) for row in rows}) == 2
    whole = prepare(max_length=4, long_documents="split", **arguments)["train"]
    assert (whole.num_kept, whole.dropped) == (4, {"duplicate": 1})
