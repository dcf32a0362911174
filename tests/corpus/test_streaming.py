"""Streams: every document in exactly one share, an order and masks that a seed decides, and counts without rows."""

import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import load_dataset
from torch.utils.data import DataLoader

from helpers import REPOSITORY, TINY, make_texts
from tjepa import run_pretraining
from tjepa.corpus.documents import DataArguments, load_documents
from tjepa.corpus.streams import DocumentStream
from tjepa.corpus.tokenization import StreamTokenizer, tokenize_documents
from tjepa.corpus.train_tokenizer import train_tokenizer


pytestmark = pytest.mark.usefixtures("own_cache")


def write_files(folder: Path, num_files: int, num_documents: int, file_format: str = "jsonl") -> str:
    """Files of unequal length; document d has the tokens [d, d + 1, 7]. Returns the pattern that names them."""
    parts = np.array_split(
        np.arange(num_documents), np.sort(np.random.default_rng(0).choice(num_documents, num_files - 1))
    )
    for number, part in enumerate(parts):
        documents = datasets.Dataset.from_dict({"input_ids": [[int(d), int(d) + 1, 7] for d in part]})
        path = folder / f"part-{number:02}.{file_format}"
        documents.to_parquet(path) if file_format == "parquet" else documents.to_json(path)
    return str(folder / f"part-*.{file_format}")


def make_stream(pattern: str, **arguments) -> DocumentStream:
    loader = "parquet" if pattern.endswith("parquet") else "json"
    return DocumentStream(load_dataset(loader, data_files=pattern, split="train", streaming=True), **arguments)


def keep_list(examples: list) -> list:
    return examples


def read(stream: DocumentStream, num_workers: int = 0, num_batches: int | None = None) -> list:
    """(epoch, document) of everything, or of the first batches of four; `None` for what a resumed stream skips."""
    stream.remember_positions(num_workers, documents_per_batch=4, num_batches=4)
    batches = itertools.islice(DataLoader(stream, 4, num_workers=num_workers, collate_fn=keep_list), num_batches)
    return [e and (e["epoch"], int(e["input_ids"][0])) for batch in batches for e in batch]


# --- Every document exactly once -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_files", [1, 2, 6, 7])
@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (2, 0), (3, 2), (1, 3)])
def test_every_document_is_in_one_share(tmp_path, num_files, world_size, num_workers):
    """Fewer files than shares, as many, a multiple and no multiple of them; counted in each share by itself."""
    pattern, num_shares = write_files(tmp_path, num_files, 61), world_size * max(1, num_workers)
    shares = []
    for rank, worker in itertools.product(range(world_size), range(max(1, num_workers))):
        stream = make_stream(pattern, rank=rank, world_size=world_size, shuffle_buffer_size=5)
        rows = stream.share(rank * max(1, num_workers) + worker, num_shares)
        shares.append([row["input_ids"][0] for row in rows])
    assert Counter(itertools.chain(*shares)) == Counter(range(61))


@pytest.mark.parametrize(("num_files", "world_size", "num_workers"), [(1, 2, 2), (5, 2, 2), (8, 2, 2), (3, 1, 2)])
def test_every_document_comes_out_of_the_workers_once(tmp_path, num_files, world_size, num_workers):
    pattern = write_files(tmp_path, num_files, 50)
    seen = []
    for rank in range(world_size):
        stream = make_stream(pattern, rank=rank, world_size=world_size, shuffle_buffer_size=6)
        seen += read(stream, num_workers)
    assert Counter(seen) == Counter((0, document) for document in range(50))


def test_an_endless_stream_takes_every_document_once_per_epoch(tmp_path):
    pattern = write_files(tmp_path, 3, 40)
    seen = read(make_stream(pattern, repeat=True, shuffle_buffer_size=8), num_batches=30)
    assert Counter(seen) == Counter(itertools.product(range(3), range(40)))
    orders = [[document for epoch, document in seen if epoch == wanted] for wanted in range(3)]
    assert orders[0] != orders[1] != orders[2]


def test_an_empty_share_is_an_error_and_no_hang(tmp_path):
    stream = make_stream(write_files(tmp_path, 1, 3), rank=3, world_size=4, repeat=True)
    with pytest.raises(ValueError, match="4 processes with 1 workers.*share 3 has no usable document. Take fewer"):
        next(iter(stream))


def test_a_stream_of_which_nothing_can_be_used_says_why(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": 7}\n' * 5)
    args = DataArguments(train_file=str(tmp_path / "a.jsonl"), streaming=True, validation_split_percentage=0)
    tokenizer = train_tokenizer(make_texts(9), vocab_size=270, model_max_length=64)
    stream = DocumentStream(load_documents(args)["train"], StreamTokenizer(tokenizer, args), repeat=True)
    with pytest.raises(
        ValueError, match="Every document of the stream .* dropped: not a string 5. --text_column_name"
    ):
        next(iter(stream))


def test_bad_settings(tmp_path):
    pattern = write_files(tmp_path, 1, 3)
    with pytest.raises(ValueError, match="shuffle_buffer_size is -1"):
        make_stream(pattern, shuffle_buffer_size=-1)
    with pytest.raises(ValueError, match="got 2 of 2"):
        make_stream(pattern, rank=2, world_size=2)


# --- Order, index and masks ------------------------------------------------------------------------------------------


def test_the_order_is_the_seed_s(tmp_path):
    pattern = write_files(tmp_path, 3, 60)
    plain = read(make_stream(pattern))
    assert [document for _, document in plain] == list(range(60))
    first, again, other = (read(make_stream(pattern, shuffle_buffer_size=20, seed=seed)) for seed in (0, 0, 1))
    assert first == again != other and first != plain
    assert Counter(first) == Counter(other) == Counter(plain)


def test_the_index_does_not_depend_on_the_split(tmp_path):
    """The masks are a function of it, the seed and the epoch."""
    pattern = write_files(tmp_path, 4, 40)

    def indices(world_size: int) -> dict[int, int]:
        streams = [make_stream(pattern, rank=rank, world_size=world_size) for rank in range(world_size)]
        return {int(e["input_ids"][0]): e["document_index"] for stream in streams for e in stream}

    assert indices(1) == indices(3)
    assert len(set(indices(1).values())) == 40


# --- Resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file_format", ["jsonl", "jsonl.gz", "parquet"])
@pytest.mark.parametrize(("num_files", "num_workers", "world_size"), [(5, 0, 1), (1, 2, 1), (6, 2, 2)])
def test_a_shuffled_stream_goes_on_where_it_was(tmp_path, file_format, num_files, num_workers, world_size):
    """Also in the middle of a block, of a file, and in the second epoch; buffered documents are not lost."""
    pattern = write_files(tmp_path, num_files, 60, file_format)
    settings = {"rank": world_size - 1, "world_size": world_size, "shuffle_buffer_size": 7, "repeat": True}
    whole = read(make_stream(pattern, **settings), num_workers, num_batches=30)
    for num_batches in (1, 6, 19) if num_workers == 0 else (11,):
        interrupted = make_stream(pattern, **settings)
        assert read(interrupted, num_workers, num_batches) == whole[: 4 * num_batches]
        state = json.loads(json.dumps(interrupted.state_dict(num_batches)))
        assert any(position["num_documents"] for position in state["positions"].values()) or num_batches == 1
        resumed = make_stream(pattern, **settings)
        resumed.remember_positions(num_workers, documents_per_batch=4, num_batches=4)
        resumed.load_state_dict([state], num_batches)
        skipped = [None] * 4 * num_batches
        assert read(resumed, num_workers, num_batches=30) == skipped + whole[4 * num_batches :]


def test_a_resume_does_not_tokenize_what_came_before(tmp_path):
    """Of 1,000 documents in ten files 800 are done: of the rest, and of two blocks, nothing before is read."""
    texts = [f"{number} and some words" for number in range(1000)]
    for part in range(10):
        lines = [json.dumps({"text": text}) + "\n" for text in texts[part * 100 : part * 100 + 100]]
        (tmp_path / f"part-{part}.jsonl").write_text("".join(lines))
    arguments = DataArguments(train_file=str(tmp_path / "*.jsonl"), streaming=True, validation_split_percentage=0)
    tokenizer = train_tokenizer(texts, vocab_size=300, model_max_length=32)

    def make() -> tuple[DocumentStream, StreamTokenizer]:
        transform = StreamTokenizer(tokenizer, arguments)
        documents = load_documents(arguments)["train"]
        stream = DocumentStream(documents, transform, shuffle_buffer_size=20, repeat=True)
        stream.remember_positions(num_workers=0, documents_per_batch=4, num_batches=4)
        return stream, transform

    stream, _ = make()
    seen = [example["document_index"] for example in itertools.islice(stream, 900)]
    interrupted, _ = make()
    assert [example["document_index"] for example in itertools.islice(interrupted, 800)] == seen[:800]
    state = interrupted.state_dict(200)
    resumed, counter = make()
    resumed.load_state_dict([state], 200)
    rest = [example and example["document_index"] for example in itertools.islice(resumed, 900)]
    assert rest == [None] * 800 + seen[800:]
    assert counter.counts().num_documents <= 2 * 256 + 100  # whole batches of the tokenizer, as far as a file goes


# --- Counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("long_documents", ["truncate", "split"])
def test_counts_of_a_stream_are_those_of_a_dataset(tmp_path, long_documents):
    texts = [*make_texts(50), None, "", "  ", "a", *make_texts(3, 1)]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = train_tokenizer(make_texts(50), vocab_size=300, model_max_length=32)
    arguments = DataArguments(
        train_file=str(path),
        validation_split_percentage=0,
        max_length=32,
        min_tokens=4,
        long_documents=long_documents,
    )
    _, expected = tokenize_documents(load_documents(arguments)["train"], tokenizer, arguments, "train")
    arguments.streaming = True
    stream_tokenizer = StreamTokenizer(tokenizer, arguments)
    stream = DocumentStream(load_documents(arguments)["train"], stream_tokenizer, shuffle_buffer_size=10)
    num_rows = sum(len(batch) for batch in DataLoader(stream, 4, num_workers=2, collate_fn=keep_list))
    assert stream_tokenizer.counts() == expected and num_rows == expected.num_rows
    assert set(expected.dropped) == {"null", "empty or whitespace only", "shorter than min_tokens"}
    twice = stream_tokenizer.counts(over_processes=lambda counts: 2 * counts)
    assert twice.num_tokens == 2 * expected.num_tokens and twice.length_percentiles == expected.length_percentiles


def test_validation_documents_stay_out_of_every_share(tmp_path):
    """`skip` of datasets skips other documents as soon as the stream is split."""
    texts = make_texts(40)
    for part in range(4):
        lines = [json.dumps({"text": text}) + "\n" for text in [*texts[part * 10 : part * 10 + 10], texts[0]]]
        (tmp_path / f"part-{part}.jsonl").write_text("".join(lines))
    arguments = DataArguments(train_file=str(tmp_path / "*.jsonl"), streaming=True, max_eval_samples=7)
    splits = load_documents(arguments)
    validation = [row["text"] for row in splits["validation"]]
    assert validation == texts[:7]
    shares = [DocumentStream(splits["train"]).share(index, 3) for index in range(3)]
    assert Counter(row["text"] for share in shares for row in share) == Counter(texts[7:])


# --- The whole command -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    texts = make_texts(96)
    for part in range(3):
        lines = [json.dumps({"text": text}) + "\n" for text in [*texts[part * 32 : part * 32 + 32], None]]
        (folder / f"part-{part}.jsonl").write_text("".join(lines))
    train_tokenizer(texts, vocab_size=300, model_max_length=64).save_pretrained(folder / "tokenizer")
    return folder


RECORDER = """
import sys, torch
from tjepa import run_pretraining
from tjepa.data_collator_tjepa import DataCollatorForTJEPA

class Recorder(DataCollatorForTJEPA):
    def __call__(self, examples):
        lines = [f"{e['epoch']} {e['document_index']}\\n" for e in examples]
        with open(f"{folder}/rank-{torch.distributed.get_rank()}.txt", "a") as file:
            file.write("".join(lines))
        return super().__call__(examples)

folder = sys.argv.pop(1)
run_pretraining.DataCollatorForTJEPA = Recorder
run_pretraining.main()
"""


def test_two_processes_share_the_stream(corpus, tmp_path):
    """Started by torchrun: no document twice in an epoch, none on both processes, and the counts are of both."""
    (tmp_path / "record.py").write_text(RECORDER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(tmp_path / "record.py"), str(tmp_path), f"--train_file={corpus}/part-*.jsonl", "--streaming"]
    command += [f"--tokenizer_name={corpus}/tokenizer", f"--config_overrides={TINY}", "--max_length=64"]
    command += ["--validation_split_percentage=0", "--max_steps=12", "--per_device_train_batch_size=6", "--use_cpu"]
    command += ["--shuffle_buffer_size=10", f"--output_dir={tmp_path / 'out'}", "--save_strategy=no"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [(tmp_path / f"rank-{rank}.txt").read_text().split("\n")[:-1] for rank in range(2)]
    seen = [[tuple(map(int, line.split())) for line in of_rank] for of_rank in lines]
    assert all(len(of_rank) >= 12 * 6 for of_rank in seen)
    assert max(Counter(itertools.chain(*seen)).values()) == 1
    documents = [{index for _, index in of_rank} for of_rank in seen]
    assert not documents[0] & documents[1] and len(documents[0] | documents[1]) == 96
    card = (tmp_path / "out" / "README.md").read_text()
    assert "null" in card and "documents read" in card


def test_the_command_streams_and_reports(corpus, tmp_path, monkeypatch, caplog):
    command = [f"--train_file={corpus}/part-*.jsonl", "--streaming", f"--tokenizer_name={corpus}/tokenizer"]
    command += [f"--config_overrides={TINY}", "--max_length=32", "--max_steps=3", "--max_eval_samples=5"]
    command += ["--shuffle_buffer_size=16", "--dataloader_num_workers=2", f"--output_dir={tmp_path / 'out'}"]
    monkeypatch.setattr(sys, "argv", ["run_pretraining.py", *command])
    run_pretraining.main()
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results["train_steps"] == 3 and results["eval_loss"] > 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.count("documents read") == 2  # training as far as it was read, and validation
    (hint,) = [line for line in caplog.messages if line.startswith("train: ")]
    assert "of all tokens lie beyond the 32 tokens" in hint and "--long_documents split" in hint


def test_memory_benchmark(corpus, tmp_path):
    output = tmp_path / "result.json"
    options = ["--minutes", "1", "--tokens_per_second", "100", "--points", "6", "--shuffle_buffer_size", "20"]
    options += ["--files", "2", "--train_file", str(corpus / "part-0.jsonl"), "--tokenizer", str(corpus / "tokenizer")]
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "streaming_memory.py"), *options]
    done = subprocess.run([*command, "--output", str(output)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert len(result["rows"]) >= 4 and result["rows"][-1]["tokens"] >= 6000
    assert result["megabytes_at_the_end"] > 0


def test_arithmetic_of_scaling(tmp_path):
    output = tmp_path / "result.json"
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "scaling_arithmetic.py"), "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = {(row["corpus"], row["model"]): row for row in json.loads(output.read_text())}
    # by hand (docs/performance.md): 8 (1 + 3 * 4.6 + 3 * 7) layers of 3.5 MFLOP, and attention's share on top
    assert 1.0 < rows["SlimPajama", "reference"]["gigaflops_per_token"] < 1.4
    assert (
        rows["TinyStories", "reference"]["gigaflops_per_token"] < rows["MiniPile", "reference"]["gigaflops_per_token"]
    )
