"""Documents in, token rows and honest counts out; and every message a user can meet on the way."""

import copy
import gzip
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, IterableDataset, load_from_disk
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast, TrainingArguments

from tjepa.corpus import prepare_dataset as script
from tjepa.corpus.arguments import parse_arguments
from tjepa.corpus.documents import DataArguments, load_documents
from tjepa.corpus.faults import DROP_REASONS, KEPT
from tjepa.corpus.prepare_dataset import PreparationArguments, prepare_dataset
from tjepa.corpus.tokenization import StreamTokenizer, encode_batch, tokenize_documents
from tjepa.corpus.train_tokenizer import train_tokenizer


# Ten words each; the tokenizer of these tests has every word of them as one token.
DOCUMENTS = [f"the cat {number} sat on the mat with the dog" for number in "abcdefghijklmnopqrst"]


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(DOCUMENTS * 3, vocab_size=320, model_max_length=8)


@pytest.fixture
def stories_file(tmp_path):
    return write_jsonl(tmp_path / "stories.jsonl", DOCUMENTS)


def write_jsonl(path, texts, column="text"):
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))
    return str(path)


def stream_of(texts):
    return IterableDataset.from_generator(lambda: ({"text": text} for text in texts))


def preparation(tmp_path, tokenizer, **arguments):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    defaults = {"output_dir": str(tmp_path / "prepared"), "tokenizer_name": str(tmp_path / "tokenizer")}
    return PreparationArguments(**{**defaults, "min_tokens": 4, **arguments})


# ---- load_documents ----


@pytest.mark.parametrize("file_format", ["parquet", "json", "jsonl", "csv", "txt", "jsonl.gz", "txt.gz", "csv.gz"])
@pytest.mark.parametrize("streaming", [False, True])
def test_every_file_format_gives_the_same_documents(tmp_path, file_format, streaming):
    path = tmp_path / f"stories.{file_format}"
    plain = tmp_path / f"stories.{file_format.removesuffix('.gz')}"
    dataset = Dataset.from_dict({"text": DOCUMENTS})
    if plain.suffix == ".parquet":
        dataset.to_parquet(plain)
    elif plain.suffix == ".csv":
        dataset.to_csv(plain)
    elif plain.suffix == ".txt":
        plain.write_text("\n".join(DOCUMENTS))
    else:
        dataset.to_json(plain)
    if path != plain:
        path.write_bytes(gzip.compress(plain.read_bytes()))
    arguments = DataArguments(train_file=str(path), validation_split_percentage=0, streaming=streaming)
    splits = load_documents(arguments)
    assert list(splits) == ["train"]
    assert [row["text"] for row in splits["train"]] == DOCUMENTS


def test_validation_split_is_deterministic_and_disjoint(stories_file):
    first, second = (
        load_documents(DataArguments(train_file=stories_file, validation_split_percentage=20)) for _ in range(2)
    )
    assert len(first["validation"]) == 4 and len(first["train"]) == 16
    assert first["validation"]["text"][:] == second["validation"]["text"][:]
    assert sorted([*first["train"]["text"], *first["validation"]["text"]]) == DOCUMENTS


def test_one_document_stays_in_train(tmp_path):
    splits = load_documents(DataArguments(train_file=write_jsonl(tmp_path / "one.jsonl", DOCUMENTS[:1])))
    assert {name: len(split) for name, split in splits.items()} == {"train": 1}


def test_limits_and_given_validation_file(tmp_path, stories_file):
    (tmp_path / "validation.txt").write_text("one\ntwo\nthree\n")
    arguments = DataArguments(
        train_file=stories_file,
        validation_file=str(tmp_path / "validation.txt"),
        max_train_samples=7,
        max_eval_samples=2,
    )
    splits = load_documents(arguments)
    drawn = splits["train"]["text"][:]
    assert len(drawn) == 7 and drawn == sorted(set(drawn)) and drawn != DOCUMENTS[:7]  # from all over, in their order
    assert load_documents(arguments)["train"]["text"][:] == drawn
    assert len(splits["validation"]) == 2


def test_streamed_validation_is_the_head_that_training_skips(stories_file):
    arguments = DataArguments(train_file=stories_file, streaming=True, max_train_samples=5, max_eval_samples=3)
    splits = load_documents(arguments)
    assert [row["text"] for row in splits["validation"]] == DOCUMENTS[:3]
    assert [row["text"] for row in splits["train"]] == DOCUMENTS[3:8]
    with pytest.raises(ValueError, match="only 20 documents.*--max_eval_samples below that"):
        load_documents(DataArguments(train_file=stories_file, streaming=True))


def test_a_glob_reads_several_files(tmp_path):
    write_jsonl(tmp_path / "part-0.jsonl", DOCUMENTS[:8])
    write_jsonl(tmp_path / "part-1.jsonl", DOCUMENTS[8:])
    arguments = DataArguments(train_file=str(tmp_path / "part-*.jsonl"), validation_split_percentage=0)
    assert load_documents(arguments)["train"]["text"][:] == DOCUMENTS


def test_dataset_name_loads_a_dataset_repository(tmp_path):
    for split, texts in (("train", DOCUMENTS[:15]), ("validation", DOCUMENTS[15:]), ("test", ["held out"])):
        write_jsonl(tmp_path / f"{split}.jsonl", texts)
    splits = load_documents(DataArguments(dataset_name=str(tmp_path), max_eval_samples=2))
    assert {name: len(split) for name, split in splits.items()} == {"train": 15, "validation": 2}


def test_source_errors(tmp_path, stories_file):
    with pytest.raises(ValueError, match="either --dataset_name .* or --train_file"):
        load_documents(DataArguments())
    with pytest.raises(ValueError, match="either --dataset_name .* or --train_file"):
        load_documents(DataArguments(dataset_name="some/name", train_file=stories_file))
    with pytest.raises(FileNotFoundError, match="--train_file: no file .*missing.jsonl"):
        load_documents(DataArguments(train_file=str(tmp_path / "missing.jsonl")))
    with pytest.raises(FileNotFoundError, match="--validation_file: no file .*missing.txt"):
        load_documents(DataArguments(train_file=stories_file, validation_file=str(tmp_path / "missing.txt")))
    (tmp_path / "stories.docx.gz").write_text("x")
    with pytest.raises(ValueError, match=r"extension\(s\) \['.docx'\].* one of .parquet, .*, .tsv, .txt"):
        load_documents(DataArguments(train_file=str(tmp_path / "stories.docx.gz")))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="empty.txt' is empty"):
        load_documents(DataArguments(train_file=str(tmp_path / "empty.txt")))
    datasets.DatasetDict(test=Dataset.from_dict({"text": DOCUMENTS})).save_to_disk(tmp_path / "only-test")
    with pytest.raises(ValueError, match=r"no split 'train', only \['test'\]"):
        load_documents(DataArguments(dataset_name=str(tmp_path / "only-test")))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"validation_split_percentage": 100}, "validation_split_percentage is 100"),
        ({"max_train_samples": 0}, "max_train_samples is 0"),
        ({"max_eval_samples": -1}, "max_eval_samples is -1"),
        ({"long_documents": "fold"}, "'fold'; allowed are 'truncate' and 'split'"),
        ({"min_tokens": 1}, "min_tokens is 1 .* at least 2"),
        ({"min_tokens": 9, "max_length": 8}, "not more than max_length"),
    ],
)
def test_argument_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**arguments)


# ---- tokenize_documents ----


def test_counts_every_reason_and_never_crashes(tmp_path, tokenizer):
    texts = [*DOCUMENTS[:3], None, 7, 1.5, True, "", " \n\t", "the", "bad \ud800 half", ["list"]]
    # A column that mixes types is read as JSON values, which is how numbers and half surrogates arrive.
    splits = load_documents(
        DataArguments(train_file=write_jsonl(tmp_path / "mixed.jsonl", texts[:-2]), validation_split_percentage=0)
    )
    tokenized, counts = tokenize_documents(splits["train"], tokenizer, DataArguments(), "train")
    assert counts.dropped == {
        "null": 1,
        "not a string": 3,
        "empty or whitespace only": 2,
        "shorter than min_tokens": 1,
    }
    assert (counts.num_documents, counts.num_kept, len(tokenized)) == (10, 3, 3)
    assert tokenized.features == datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})
    expected = tokenizer(DOCUMENTS[:3], add_special_tokens=False)["input_ids"]
    assert tokenized["input_ids"][:] == expected
    assert counts.num_tokens == sum(map(len, expected)) and counts.num_tokens_cut == 0
    for words in ("documents read", "not a string", "tokens per row", "10"):
        assert words in str(counts)

    encoded = encode_batch(texts, tokenizer=tokenizer, max_length=8, min_tokens=2, long_documents="truncate")
    reasons = [DROP_REASONS[index] for index in encoded["drop_reason"] if index != KEPT]
    assert reasons.count("invalid unicode") == 1 and reasons.count("not a string") == 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, 2, 3], "not a string 3. --text_column_name names the column that holds the text."),
        ([None, None], "null 2. --text_column_name names the column that holds the text."),
        ([" ", "a", "b"], "shorter than min_tokens 2, empty or whitespace only 1. A lower --min_tokens"),
    ],
)
def test_a_split_without_usable_texts_says_why_in_one_line(tokenizer, values, message):
    with pytest.raises(ValueError, match=f"^Every document of the train split was dropped: {message}[^\n]*$"):
        tokenize_documents(Dataset.from_dict({"text": values}), tokenizer, DataArguments(), "train")


def test_a_tokenizer_without_an_unknown_token(tmp_path, stories_file):
    words = Tokenizer(WordLevel({"the": 0, "cat": 1}))
    words.pre_tokenizer = Whitespace()
    with pytest.raises(ValueError, match="has no tokens for some of the texts .*Missing .UNK.* an unknown token"):
        prepare_dataset(
            preparation(tmp_path, PreTrainedTokenizerFast(tokenizer_object=words), train_file=stories_file)
        )


def test_no_special_tokens_are_added(tokenizer):
    adding = copy.deepcopy(tokenizer)
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", adding.bos_token_id), ("</s>", adding.eos_token_id)]
    )
    assert adding(DOCUMENTS[0])["input_ids"][0] == adding.bos_token_id
    tokenized, _ = tokenize_documents(Dataset.from_dict({"text": DOCUMENTS}), adding, DataArguments(), "train")
    assert tokenized["input_ids"][:] == tokenizer(DOCUMENTS)["input_ids"]


def test_truncate_and_split(tokenizer):
    words = "the cat sat on the mat with the dog"
    dataset = Dataset.from_dict({"text": [words, "the cat sat on"]})
    (long_ids, short_ids) = tokenizer(dataset["text"][:], add_special_tokens=False)["input_ids"]
    assert len(long_ids) > 8 and len(short_ids) <= 4  # the first is 4 + 4 + a remainder

    truncated, counts = tokenize_documents(dataset, tokenizer, DataArguments(max_length=4), "train")
    assert truncated["input_ids"][:] == [long_ids[:4], short_ids]
    assert (counts.num_truncated, counts.num_split, counts.num_rows) == (1, 0, 2)
    assert counts.num_tokens_cut == len(long_ids) - 4

    arguments = DataArguments(max_length=4, min_tokens=4, long_documents="split")
    split, counts = tokenize_documents(dataset, tokenizer, arguments, "train")
    pieces = [long_ids[start : start + 4] for start in range(0, len(long_ids), 4)]
    pieces = [piece for piece in pieces if len(piece) == 4]
    assert split["input_ids"][:] == [*pieces, short_ids]
    assert (counts.num_documents, counts.num_kept, counts.num_split) == (2, 2, 1)
    assert counts.num_truncated == (len(long_ids) % 4 > 0)  # a last piece under min_tokens is left out
    assert counts.num_rows == len(split) == len(pieces) + 1
    assert counts.num_tokens + counts.num_tokens_cut == len(long_ids) + len(short_ids)
    assert counts.length_percentiles["5%"] == counts.length_percentiles["max"] == 4


def test_counts_are_right_from_the_cache_and_with_workers(tmp_path, stories_file, tokenizer):
    # Truncation that a tokenizer's file asks for is neither applied nor a reason to miss the cache.
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(3)
    results, num_cache_files = [], []
    for num_workers in (None, None, 2):
        arguments = DataArguments(train_file=stories_file, max_length=6, preprocessing_num_workers=num_workers)
        tokenized, counts = tokenize_documents(load_documents(arguments)["train"], tokenizer, arguments, "train")
        results.append((tokenized["input_ids"][:], asdict(counts)))
        num_cache_files.append(len(list(tmp_path.glob("cache/**/cache-*.arrow"))))
    assert results[0] == results[1] == results[2]
    assert results[0][1]["num_truncated"] == 19
    assert num_cache_files[0] == num_cache_files[1] > 0


def test_streams_are_tokenized_alike(tokenizer):
    texts = [*DOCUMENTS, None, " ", "the"]
    arguments = DataArguments(max_length=4, min_tokens=3, long_documents="split")
    expected, expected_counts = tokenize_documents(Dataset.from_dict({"text": texts}), tokenizer, arguments, "train")
    held, held_counts = tokenize_documents(stream_of(texts), tokenizer, arguments, "train")
    assert list(held) == list(expected) and held_counts == expected_counts
    stream_tokenizer = StreamTokenizer(tokenizer, arguments)
    assert list(stream_tokenizer(stream_of(texts))) == list(expected)
    assert stream_tokenizer.counts() == expected_counts


def test_a_stream_survives_anything(tokenizer):
    texts = [DOCUMENTS[0], None, 3, "bad \ud800 half", DOCUMENTS[1]]
    stream = StreamTokenizer(tokenizer, DataArguments())(stream_of(texts))
    assert [row["input_ids"] for row in stream] == tokenizer(DOCUMENTS[:2], add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("make", [lambda rows: Dataset.from_list(rows), lambda rows: stream_of_rows(rows)])
def test_missing_column_and_empty_split(tokenizer, make):
    with pytest.raises(ValueError, match=r"no column 'text'; it has \['story', 'title'\].*--text_column_name"):
        tokenize_documents(make([{"story": "x", "title": "y"}]), tokenizer, DataArguments(), "train")
    with pytest.raises(ValueError, match="The train split has no documents"):
        tokenize_documents(make([]), tokenizer, DataArguments(), "train")


def stream_of_rows(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


# ---- prepare_dataset ----


def test_prepared_folder_is_whole_and_self_sufficient(tmp_path, stories_file, tokenizer):
    counts = prepare_dataset(preparation(tmp_path, tokenizer, train_file=stories_file, token="hf_secret"))
    folder = tmp_path / "prepared"
    assert not any(b"hf_secret" in path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert sorted(os.listdir(tmp_path)) == ["cache", "prepared", "stories.jsonl", "tokenizer"]
    assert {name: len(split) for name, split in load_from_disk(folder).items()} == {"train": 19, "validation": 1}
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == tokenizer.get_vocab()
    assert json.loads((folder / "preparation.json").read_text())["counts"]["train"] == asdict(counts["train"])

    splits = load_documents(DataArguments(dataset_name=str(folder), max_train_samples=5))
    assert splits["train"].column_names == ["input_ids"] and len(splits["train"]) == 5
    decoded = [tokenizer.decode(row["input_ids"]) for row in splits["train"]]
    assert set(decoded) < set(DOCUMENTS)


def test_deduplication_reaches_across_splits(tmp_path, tokenizer):
    train = write_jsonl(tmp_path / "train.jsonl", [*DOCUMENTS[:4], DOCUMENTS[0], f"  {DOCUMENTS[1]}\n", None, None])
    validation = write_jsonl(tmp_path / "validation.jsonl", [DOCUMENTS[2], DOCUMENTS[9], DOCUMENTS[9]])
    arguments = {"train_file": train, "validation_file": validation, "long_documents": "split", "max_length": 4}
    counts = prepare_dataset(preparation(tmp_path, tokenizer, **arguments, deduplicate=True))
    assert counts["train"].dropped == {"null": 2, "duplicate": 2} and counts["train"].num_kept == 4
    assert counts["validation"].dropped == {"duplicate": 2} and counts["validation"].num_kept == 1
    write_jsonl(tmp_path / "validation.jsonl", DOCUMENTS[:2])
    with pytest.raises(ValueError, match="the validation split was dropped: duplicate 2. .* other documents as --val"):
        all_again = {**arguments, "deduplicate": True, "output_dir": str(tmp_path / "other")}
        prepare_dataset(preparation(tmp_path, tokenizer, **all_again))
    with_duplicates = preparation(tmp_path, tokenizer, **arguments, overwrite_output_dir=True)
    assert prepare_dataset(with_duplicates)["train"].dropped == {"null": 2}


def test_streamed_preparation(tmp_path, stories_file, tokenizer):
    arguments = {"train_file": stories_file, "streaming": True, "max_eval_samples": 2}
    with pytest.raises(ValueError, match="pass --max_train_samples"):
        preparation(tmp_path, tokenizer, **arguments)
    counts = prepare_dataset(preparation(tmp_path, tokenizer, **arguments, max_train_samples=6))
    splits = load_from_disk(tmp_path / "prepared")
    assert [tokenizer.decode(row["input_ids"]) for row in splits["validation"]] == DOCUMENTS[:2]
    assert [tokenizer.decode(row["input_ids"]) for row in splits["train"]] == DOCUMENTS[2:8]
    assert counts["train"].num_documents == counts["train"].num_kept == 6
    assert not list(tmp_path.glob(".prepared*"))


def test_output_folder_is_refused_kept_or_replaced(tmp_path, stories_file, tokenizer, monkeypatch):
    (tmp_path / "prepared").mkdir()  # an empty folder is welcome
    prepare_dataset(preparation(tmp_path, tokenizer, train_file=stories_file))
    with pytest.raises(FileExistsError, match="not empty. Pass --overwrite_output_dir"):
        prepare_dataset(preparation(tmp_path, tokenizer, train_file=stories_file))

    overwriting = preparation(tmp_path, tokenizer, train_file=stories_file, overwrite_output_dir=True, max_length=5)
    with monkeypatch.context() as patch:  # a failure in the middle leaves the old folder and no other
        patch.setattr(datasets.DatasetDict, "save_to_disk", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            prepare_dataset(overwriting)
    assert not list(tmp_path.glob(".prepared*"))
    assert max(map(len, load_from_disk(tmp_path / "prepared")["train"]["input_ids"])) > 5

    prepare_dataset(overwriting)
    assert max(map(len, load_from_disk(tmp_path / "prepared")["train"]["input_ids"])) == 5

    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.md").write_text("years of work")
    arguments = {"train_file": stories_file, "overwrite_output_dir": True, "output_dir": str(tmp_path / "thesis")}
    with pytest.raises(FileExistsError, match="is not a prepared dataset"):
        prepare_dataset(preparation(tmp_path, tokenizer, **arguments))
    assert (tmp_path / "thesis" / "chapter1.md").exists()
    datasets.DatasetDict(train=Dataset.from_dict({"text": DOCUMENTS})).save_to_disk(tmp_path / "raw")
    arguments = {"overwrite_output_dir": True, "output_dir": str(tmp_path / "raw")}
    for source in ({"train_file": stories_file}, {"dataset_name": str(tmp_path / "raw")}):
        with pytest.raises(FileExistsError, match="raw is not a prepared dataset"):
            prepare_dataset(preparation(tmp_path, tokenizer, **arguments, **source))
    assert load_from_disk(tmp_path / "raw")["train"]["text"][:] == DOCUMENTS
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "prepared")
    with pytest.raises(OSError, match="is a mount point, which cannot be replaced: name a folder in it"):
        prepare_dataset(overwriting)


def test_script_prints_statistics(tmp_path, stories_file, tokenizer, monkeypatch, capsys):
    arguments = preparation(tmp_path, tokenizer, train_file=stories_file)
    (tmp_path / "prepare.yaml").write_text(f"train_file: {stories_file}\noutput_dir: {arguments.output_dir}\n")
    flags = ["--tokenizer_name", arguments.tokenizer_name, "--min_tokens", "4"]
    monkeypatch.setattr(sys, "argv", ["prepare_dataset.py", str(tmp_path / "prepare.yaml"), *flags])
    script.main()
    assert "documents read" in capsys.readouterr().out


def test_script_runs_from_anywhere(tmp_path):
    command = [sys.executable, "-m", "tjepa.corpus.prepare_dataset", "--help"]
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "--max_length" in output and "Default: truncate." in output


def test_tinystories(shared_folder, tmp_path):
    arguments = PreparationArguments(
        train_file=str(shared_folder / "data" / "tinystories-validation.parquet"),
        tokenizer_name=str(shared_folder / "tokenizers" / "bert-base-uncased"),
        output_dir=str(tmp_path / "prepared"),
        max_length=256,
    )
    counts = prepare_dataset(arguments)
    assert counts["train"].num_documents + counts["validation"].num_documents == 732
    assert counts["train"].num_kept > 680 and counts["train"].length_percentiles["max"] == 256
    assert 150 < counts["train"].length_percentiles["50%"] < 200


# ---- parse_arguments ----


def write_yaml(tmp_path, text):
    (tmp_path / "arguments.yaml").write_text(text)
    return str(tmp_path / "arguments.yaml")


def test_flags_win_over_the_yaml_file(tmp_path):
    path = write_yaml(tmp_path, "max_length: 512\nmin_tokens: 8\nstreaming: true\ndataset_name: 1984\n")
    (args,) = parse_arguments(DataArguments, [path, "--max_length", "256", "--streaming", "false"])
    assert (args.max_length, args.min_tokens, args.streaming, args.dataset_name) == (256, 8, False, "1984")
    (args,) = parse_arguments(DataArguments, ["--max_length", "128"])
    assert args.max_length == 128


def test_yaml_values_of_every_kind(tmp_path):
    text = (
        "learning_rate: 1e-3\nreport_to: [tensorboard]\nlr_scheduler_kwargs: {num_cycles: 1}\nmax_eval_samples: null\n"
    )
    path = write_yaml(tmp_path, f"{text}use_cpu: true\n")
    data, training = parse_arguments([DataArguments, TrainingArguments], [path, "--output_dir", str(tmp_path)])
    assert training.learning_rate == 1e-3 and training.report_to == ["tensorboard"] and training.use_cpu
    assert training.lr_scheduler_kwargs == {"num_cycles": 1} and data.max_eval_samples is None


def test_yaml_errors(tmp_path, capsys):
    with pytest.raises(ValueError, match="unknown key 'max_lenght'. Did you mean 'max_length'. --help"):
        parse_arguments(DataArguments, [write_yaml(tmp_path, "max_lenght: 5\n")])
    with pytest.raises(ValueError, match="must consist of lines `name: value`, but holds list"):
        parse_arguments(DataArguments, [write_yaml(tmp_path, "- max_length\n")])
    with pytest.raises(FileNotFoundError, match="missing.yaml"):
        parse_arguments(DataArguments, [str(tmp_path / "missing.yaml")])
    with pytest.raises(SystemExit):
        parse_arguments(DataArguments, [write_yaml(tmp_path, "long_documents: fold\n")])
    assert "invalid choice: 'fold'" in capsys.readouterr().err
