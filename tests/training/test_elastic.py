"""A run goes on with other numbers of processes and workers: the documents that remain, the same batches and masks."""

import json
import os
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import TINY, arguments, make_texts, run
from tjepa.corpus.streams import Division, DocumentStream
from tjepa.corpus.train_tokenizer import train_tokenizer


NUM_DOCUMENTS = 53


# --- Streams, reader by reader ---------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    division=st.builds(Division, st.integers(1, 5), st.integers(1, 5), st.integers(1, 7)),
    place=st.integers(0, 10_000),
)
def test_every_document_has_one_place(division, place):
    share, number = division.place_in_share(place)
    assert 0 <= share < division.world_size * division.num_workers
    assert division.place_in_stream(share, number) == place
    assert division.count(share, place) == number and division.count(share, place + 1) == number + 1
    assert sum(division.count(share, place) for share in range(division.world_size * division.num_workers)) == place


@settings(max_examples=30, deadline=None)
@given(
    shares=st.builds(Division, st.integers(1, 3), st.integers(1, 3), st.integers(1, 4)),
    readers=st.builds(Division, st.integers(1, 3), st.integers(1, 3), st.integers(1, 4)),
    first=st.integers(-50, 50),
)
def test_the_shares_of_a_reader(shares, readers, first):
    for reader in range(readers.world_size * readers.num_workers):
        places = (first + readers.place_in_stream(reader, number) for number in range(1000))
        seen = {shares.place_in_share(place)[0] for place in places if place >= 0}
        assert seen == set(shares.shares_read_by(reader, readers, first))


class Readers:
    """The workers of all processes, one after the other in this process, as accelerate and `DataLoader` start them."""

    def __init__(self, world_size: int, num_workers: int, documents_per_batch: int, buffer: int, num_files: int):
        rows = datasets.Dataset.from_dict({"input_ids": [[d, d + 1, 7] for d in range(NUM_DOCUMENTS)]})
        files = rows.to_iterable_dataset(num_shards=num_files)
        shared = {"shuffle_buffer_size": buffer, "world_size": world_size, "repeat": True}
        self.streams = [DocumentStream(files, rank=rank, **shared) for rank in range(world_size)]
        self.num_workers, self.documents_per_batch = num_workers, documents_per_batch
        for stream in self.streams:
            stream.remember_positions(num_workers, documents_per_batch, num_batches=4)

    def load(self, states: list[dict], num_skipped: int) -> None:
        for stream in self.streams:
            stream.load_state_dict(json.loads(json.dumps(states)), num_skipped)

    def read(self, monkeypatch, num_batches: int) -> list:
        """(document, epoch, index) of whole rounds, in the order of processes; `None` where one is skipped."""

        def documents(stream, worker):
            info = SimpleNamespace(id=worker, num_workers=self.num_workers)
            with monkeypatch.context() as patch:
                patch.setattr(torch.utils.data, "get_worker_info", lambda: info)
                iterator = iter(stream)
                yield next(iterator)
            yield from iterator

        iterators = [[documents(stream, worker) for worker in range(self.num_workers)] for stream in self.streams]
        examples = [
            example
            for number in range(num_batches)
            for workers in iterators
            for example in islice(workers[number % self.num_workers], self.documents_per_batch)
        ]
        return [e and (int(e["input_ids"][0]), e["epoch"], e["document_index"]) for e in examples]

    def states(self, num_batches: int) -> list[dict]:
        return [stream.state_dict(num_batches) for stream in self.streams]


# (processes, workers, documents per batch): the global batch has 8
LAYOUTS = [(2, 2, 4), (1, 1, 8), (1, 8, 8), (2, 2, 4), (4, 3, 2), (2, 1, 4)]


@pytest.mark.parametrize(("buffer", "num_files"), [(0, 8), (5, 8), (5, 2)])
def test_other_readers_go_on_with_the_same_batches(monkeypatch, buffer, num_files):
    """From layout to layout, each time after a few batches; some of them in the second and third epoch."""
    num_batches = 24
    whole = Readers(*LAYOUTS[0], buffer, num_files).read(monkeypatch, num_batches)
    done, states = 0, None
    for layout in LAYOUTS:
        readers = Readers(*layout, buffer, num_files)
        if states is not None:
            readers.load(states, done)
        documents = readers.read(monkeypatch, num_batches)
        assert documents == [None] * 8 * done + whole[8 * done :], layout
        done += 4  # readers are far ahead then, as they may be
        again = Readers(*layout, buffer, num_files)
        if states is not None:
            again.load(states, done - 4)
        again.read(monkeypatch, done + 2)
        states = again.states(done)
    assert {epoch for _, epoch, _ in whole} == {0, 1, 2, 3}


def test_another_batch_size_goes_on_with_the_documents_that_remain(monkeypatch):
    whole = Readers(2, 2, 4, 5, 8).read(monkeypatch, 20)
    first = Readers(2, 2, 4, 5, 8)
    assert first.read(monkeypatch, 3) == whole[:24]
    smaller = Readers(1, 3, 5, 5, 8)
    smaller.load(first.states(3), num_skipped=3)
    documents = smaller.read(monkeypatch, 20)
    assert documents == [None] * 15 + whole[24 : 24 + 85]
    remaining = Counter(document for document, epoch, _ in whole[:24] + documents[15:] if epoch == 0)
    assert remaining == Counter(range(NUM_DOCUMENTS))  # of the epoch: none twice, none missing


def test_nothing_is_skipped_where_nobody_skips(monkeypatch):
    """--ignore_data_skip: the Trainer draws no batches to skip, and a stream knows where to go on anyway."""
    whole = Readers(2, 2, 4, 5, 8).read(monkeypatch, 20)
    first = Readers(2, 2, 4, 5, 8)
    first.read(monkeypatch, 3)
    second = Readers(2, 2, 4, 5, 8)
    second.load(first.states(3), num_skipped=0)
    assert second.read(monkeypatch, 17) == whole[24:]
    third = Readers(2, 2, 4, 5, 8)
    third.load(second.states(5), num_skipped=0)
    assert third.read(monkeypatch, 12) == whole[64:]


# --- Runs ------------------------------------------------------------------------------------------------------------

SCRIPT = """
import json, sys
from tjepa import run_pretraining
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["run_pretraining.py", *arguments]
    run_pretraining.main()
"""
OPTIONS = {"max_steps": 12, "save_steps": 4, "learning_rate": "3e-3", "seed": 3, "do_eval": False}
OPTIONS |= {"validation_file": None, "validation_split_percentage": 0, "shuffle_buffer_size": 6, "use_cpu": True}
OPTIONS |= {"config_overrides": f"{TINY},token_prediction_weight=1.0", "disable_tqdm": True}
KINDS = {"in memory": {}, "stream": {"train_file": "train-*.jsonl", "streaming": True}}


def command(folder: Path, name: str, kind: str, num_workers: int, batch_size: int, **more) -> list[str]:
    options = {**OPTIONS, **KINDS[kind], "dataloader_num_workers": num_workers}
    if "train_file" in options:
        options["train_file"] = folder / options["train_file"]
    return arguments(folder, folder / f"{name} {kind}", **options, per_device_train_batch_size=batch_size, **more)


def launch_two_processes(folder: Path, commands: list[list[str]]) -> None:
    (folder / "runs.py").write_text(SCRIPT)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*start, str(folder / "runs.py"), json.dumps(commands)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-5000:]


def losses(folder: Path, name: str, kind: str) -> dict[int, float]:
    state = json.loads((folder / f"{name} {kind}" / "trainer_state.json").read_text())
    return {line["step"]: line["loss"] for line in state["log_history"] if "loss" in line}


def test_two_processes_one_process_and_back(tmp_path, monkeypatch):
    """2 processes x 2 workers, from there 1 x 0 and 1 x 8, from there 2 x 2; 60 documents in batches of 8."""
    texts = make_texts(60)
    train_tokenizer(texts, vocab_size=300, model_max_length=64).save_pretrained(tmp_path / "tokenizer")
    for number in range(4):
        rows = [json.dumps({"text": text}) + "\n" for text in texts[number * 15 : number * 15 + 15]]
        (tmp_path / f"train-{number}.jsonl").write_text("".join(rows))
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def resume(name: str, step: int, kind: str) -> dict:
        return {"resume_from_checkpoint": tmp_path / f"{name} {kind}" / f"checkpoint-{step}"}

    launch_two_processes(tmp_path, [command(tmp_path, "whole", kind, 2, 4) for kind in KINDS])
    for kind in KINDS:
        for name, num_workers in (("alone", 0), ("alone, eight workers", 8)):
            run(monkeypatch, command(tmp_path, name, kind, num_workers, 8, **resume("whole", 4, kind)))
    launch_two_processes(
        tmp_path,
        [command(tmp_path, "back", kind, 2, 4, **resume("alone, eight workers", 8, kind)) for kind in KINDS],
    )
    for kind in KINDS:
        expected = losses(tmp_path, "whole", kind)
        assert list(expected) == list(range(1, 13))
        for name in ("alone", "alone, eight workers", "back"):
            assert losses(tmp_path, name, kind) == pytest.approx(expected, rel=1e-5), (name, kind)
