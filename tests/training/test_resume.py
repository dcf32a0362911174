"""A run that was stopped and resumed is the run that was not: weights, optimizer, masks and log, to the last bit."""

import json
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config

from helpers import StopAfter, make_examples, make_tiny_config
from tjepa import TJEPAConfig, TJEPAForPreTraining
from tjepa.corpus.streams import DocumentDataset, DocumentStream
from tjepa.data_collator_tjepa import DataCollatorForTJEPA, MaskingStrategy
from tjepa.run_pretraining import PretrainingArguments
from tjepa.training.checkpoints import CheckpointCallback, is_finished
from tjepa.training.trainer import TJEPATrainer


NUM_EVAL_DOCUMENTS = 5  # one batch, and no training batch has as many
STRATEGIES = [MaskingStrategy(3), MaskingStrategy(8, max_target_mask_ratio=0.5)]
TIMES = ("tokens_per_second", "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss")
EVAL_TIMES = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")


class RecordingCollator(DataCollatorForTJEPA):
    """Remembers a checksum of every training batch that it made (in this process only)."""

    def __init__(self):
        super().__init__(STRATEGIES)
        self.drawn = []

    def __call__(self, examples):
        batch = super().__call__(examples)
        if examples[0] is not None and len(examples) != NUM_EVAL_DOCUMENTS:  # None: skipped
            tensors = [tensor for name, tensor in batch.items() if name != "view_groups"]
            self.drawn.append(zlib.crc32(b"".join(tensor.numpy().tobytes() for tensor in tensors)))
        return batch


def make_dataset(num_documents: int = 22) -> datasets.Dataset:
    examples = make_examples([10 + index for index in range(num_documents)])
    return datasets.Dataset.from_dict({"input_ids": [example["input_ids"].tolist() for example in examples]})


def make_stream(num_documents: int = 22) -> DocumentStream:
    return DocumentStream(make_dataset(num_documents).to_iterable_dataset(num_shards=2), repeat=True)


def run(folder: Path, resume=None, streaming=False, train_dataset=None, stop_after=None, config=None, **arguments):
    torch.manual_seed(0)
    defaults = {"per_device_train_batch_size": 4, "logging_steps": 3, "save_steps": 2, "disable_tqdm": True}
    defaults |= {"learning_rate": 1e-2, "ema_momentum": 0.9}
    args = PretrainingArguments(output_dir=str(folder), **{**defaults, **arguments})
    model = TJEPAForPreTraining(config or make_tiny_config(hidden_dropout_prob=0.1, attention_dropout=0.1))
    collator = RecordingCollator()
    train_dataset = train_dataset or (make_stream() if streaming else DocumentDataset(make_dataset()))
    eval_dataset = DocumentDataset(make_dataset(NUM_EVAL_DOCUMENTS))
    trainer = TJEPATrainer(model, args, collator, train_dataset, eval_dataset)
    trainer.add_callback(CheckpointCallback())
    if stop_after is not None:
        trainer.callback_handler.callbacks.insert(0, StopAfter(stop_after))
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


def history(trainer, ignored=TIMES + EVAL_TIMES) -> list[dict]:
    lines = [{k: v for k, v in entry.items() if k not in ignored} for entry in trainer.state.log_history]
    return [line for line in lines if "loss" in line or "eval_loss" in line]


def assert_same_end(whole, resumed, step: int) -> None:
    for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    states = [
        torch.load(Path(trainer.args.output_dir) / f"checkpoint-{step}" / "optimizer.pt")
        for trainer in (whole, resumed)
    ]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    for index, moments in states[0]["state"].items():
        assert all(torch.equal(moments[name], states[1]["state"][index][name]) for name in moments)
    assert whole.lr_scheduler.state_dict() == resumed.lr_scheduler.state_dict()
    assert history(whole) == history(resumed)


# 6 batches an epoch; with 2 micro-batches 3 steps, with 4 of them 2 steps, the second of 2 micro-batches only
CASES = {
    "mid-epoch": ({}, 2),
    "at the end of an epoch": ({"save_steps": 3}, 6),
    "in the second epoch, between two log lines": ({"save_steps": 4}, 8),
    "accumulation, mid-epoch": ({"gradient_accumulation_steps": 2}, 2),
    "accumulation, at the end of an epoch": ({"gradient_accumulation_steps": 2, "save_steps": 3}, 3),
    "accumulation with a remainder": ({"gradient_accumulation_steps": 4}, 2),
    "two workers": ({"dataloader_num_workers": 2, "gradient_accumulation_steps": 2}, 4),
    "epochs, saved at their end": (
        {"max_steps": -1, "num_train_epochs": 2, "save_strategy": "epoch", "logging_strategy": "epoch"},
        6,
    ),
    "evaluation in between": ({"eval_strategy": "steps", "eval_steps": 1}, 4),
    "streaming": ({"streaming": True}, 2),
    "streaming, in the second pass": ({"streaming": True}, 8),
    "streaming, two workers": ({"streaming": True, "dataloader_num_workers": 2}, 2),
    "streaming, two workers, second pass, accumulation": (
        {"streaming": True, "dataloader_num_workers": 2, "gradient_accumulation_steps": 2},
        4,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_resumed_equals_uninterrupted(tmp_path, case):
    arguments, resumed_step = CASES[case]
    arguments = {"max_steps": 10 if arguments.get("gradient_accumulation_steps", 1) == 1 else 6, **arguments}
    whole = run(tmp_path / "whole", **arguments)
    resumed = run(tmp_path / "resumed", tmp_path / "whole" / f"checkpoint-{resumed_step}", **arguments)
    assert whole.state.global_step > resumed_step
    assert_same_end(whole, resumed, whole.state.global_step)
    if not arguments.get("dataloader_num_workers"):
        masks = whole.data_collator.drawn
        assert resumed.data_collator.drawn == masks[len(masks) - len(resumed.data_collator.drawn) :]


def test_stopped_at_any_step(tmp_path):
    """As a signal does: where neither a log line nor a checkpoint was due."""
    arguments = {"max_steps": 8, "save_steps": 4, "logging_steps": 4}
    whole = run(tmp_path / "whole", **arguments)
    run(tmp_path / "stopped", stop_after=5, **arguments)
    resumed = run(tmp_path / "stopped", tmp_path / "stopped" / "checkpoint-5", **arguments)
    assert_same_end(whole, resumed, 8)


def test_another_number_of_documents_a_step_is_warned_of(tmp_path, caplog):
    """In a dataset in memory the Trainer skips as many steps of the new size; a stream goes on where it was."""
    for streaming in (True, False):
        run(tmp_path / str(streaming), max_steps=2, streaming=streaming)
        run(tmp_path / str(streaming), tmp_path / str(streaming) / "checkpoint-2", streaming, max_steps=3)
        assert "documents from here on" not in caplog.text
    for streaming in (True, False):
        options = {"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
        run(tmp_path / str(streaming), tmp_path / str(streaming) / "checkpoint-2", streaming, **options)
        assert ("A step has 6 documents from here on; up to the checkpoint it had 4" in caplog.text) == (not streaming)


def test_the_last_checkpoint_is_the_end(tmp_path):
    """The Trainer itself would do one more step from a checkpoint at max_steps in the middle of an epoch."""
    run(tmp_path, max_steps=4)
    assert is_finished(tmp_path / "checkpoint-4", 4) and not is_finished(tmp_path / "checkpoint-2", 4)


# --- Streams ---------------------------------------------------------------------------------------------------------


def test_a_checkpoint_without_all_weights_is_refused(tmp_path):
    tied = T5Config(vocab_size=60, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)  # saves its embedding once
    config = TJEPAConfig(encoder=tied, predictor_num_hidden_layers=1)
    run(tmp_path, max_steps=2, config=config)
    run(tmp_path, resume=tmp_path / "checkpoint-2", max_steps=4, config=config)
    file = tmp_path / "checkpoint-2" / "model.safetensors"
    weights = load_file(file)
    weights["of_an_older_version"] = weights.pop("predictor.final_norm.weight")
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights of this model, such as predictor.final_norm.weight"):
        run(tmp_path, resume=tmp_path / "checkpoint-2", max_steps=4, config=config)


class CountingSource:
    """Documents from twenty shards; counts how many were read (in this process only)."""

    def __init__(self, num_documents: int):
        self.documents = [example["input_ids"].tolist() for example in make_examples([12] * num_documents)]
        self.num_read = 0

    def stream(self) -> DocumentStream:
        def read(shards):
            for shard in shards:
                for document in self.documents[shard::20]:
                    self.num_read += 1
                    yield {"input_ids": document}

        dataset = datasets.IterableDataset.from_generator(read, gen_kwargs={"shards": list(range(20))})
        stream = DocumentStream(dataset, repeat=True)
        # the copy that each iteration makes shall count here, too
        type(self).__deepcopy__ = lambda source, memo: source
        return stream


def documents_of(stream: DocumentStream, num_documents: int) -> list:
    documents = []
    for document in stream:
        documents.append(document and (document["document_index"], document["epoch"]))
        if len(documents) == num_documents:
            return documents


@pytest.mark.parametrize("num_batches", [1, 5, 7, 12])
def test_a_stream_goes_on_in_the_middle(num_batches):
    whole = make_stream(22)
    whole.remember_positions(num_workers=0, documents_per_batch=4, num_batches=4)
    seen = documents_of(whole, num_batches * 4)
    state = json.loads(json.dumps(whole.state_dict(num_batches)))
    expected = documents_of(make_stream(22), num_batches * 4 + 30)
    assert seen == expected[: num_batches * 4]

    resumed = make_stream(22)
    resumed.remember_positions(num_workers=0, documents_per_batch=4, num_batches=4)
    resumed.load_state_dict([state], num_batches)
    actual = documents_of(resumed, num_batches * 4 + 30)
    assert actual[: num_batches * 4] == [None] * num_batches * 4
    assert actual[num_batches * 4 :] == expected[num_batches * 4 :]
    assert {epoch for _, epoch in expected} == set(range(len(expected) // 22 + 1))


def test_a_resumed_stream_does_not_reread(tmp_path):
    source = CountingSource(400)
    arguments = {"max_steps": 60, "save_steps": 50, "logging_steps": 10}
    run(tmp_path, train_dataset=source.stream(), **arguments)
    assert source.num_read >= 60 * 4
    source.num_read = 0
    run(tmp_path, tmp_path / "checkpoint-50", train_dataset=source.stream(), **arguments)
    # what it trained on, a batch that the loader and one that the stream reads ahead, one that is read again, and the
    # part of one shard that cannot be skipped
    assert 10 * 4 <= source.num_read <= 10 * 4 + 3 * 4 + 400 // 20


@pytest.mark.parametrize("change", ["another order", "no position"])
def test_a_stream_that_does_not_fit_is_reread(tmp_path, caplog, change):
    arguments = {"max_steps": 4, "streaming": True}
    whole = run(tmp_path / "whole", **arguments)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    streams = state["stateful_callbacks"]["ResumeState"]["streams"]
    streams[0] = {**streams[0], "seed": 1} if change == "another order" else None
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    resumed = run(tmp_path / "resumed", checkpoint, **arguments)
    assert "rereading it from the start" in caplog.text
    assert_same_end(whole, resumed, 4)  # the same documents, only slower


def test_a_stream_that_the_trainer_does_not_skip_goes_on(tmp_path):
    """--ignore_data_skip: the same documents, since to go on where a stream was costs nothing."""
    arguments = {"max_steps": 8, "streaming": True, "dataloader_num_workers": 2, "logging_steps": 1}
    arguments["config"] = make_tiny_config()  # without dropout
    whole = run(tmp_path / "whole", **arguments)
    resumed = run(tmp_path / "first", tmp_path / "whole" / "checkpoint-2", ignore_data_skip=True, **arguments)
    again = run(tmp_path / "again", tmp_path / "first" / "checkpoint-6", ignore_data_skip=True, **arguments)
    for trainer in (resumed, again):
        assert history(trainer, (*TIMES, "epoch")) == history(whole, (*TIMES, "epoch"))


def test_a_shuffle_buffer_is_reread(tmp_path, caplog):
    """datasets does not save the buffer's content, so the only exact way is to read it all again."""

    def shuffled():
        dataset = make_dataset(30).to_iterable_dataset(num_shards=2).shuffle(seed=1, buffer_size=8)
        return DocumentStream(dataset, repeat=True)

    whole = run(tmp_path / "whole", train_dataset=shuffled(), max_steps=10)
    resumed = run(tmp_path / "resumed", tmp_path / "whole" / "checkpoint-8", train_dataset=shuffled(), max_steps=10)
    assert "rereading it from the start" in caplog.text
    assert_same_end(whole, resumed, 10)


def test_a_repeated_stream_draws_new_masks_and_an_empty_one_is_refused():
    first, second = (documents_of(make_stream(10), 20)[part] for part in (slice(10), slice(10, 20)))
    assert [index for index, _ in first] == [index for index, _ in second]
    assert {epoch for _, epoch in first} == {0} and {epoch for _, epoch in second} == {1}
    empty = datasets.IterableDataset.from_generator(lambda: iter(()))
    with pytest.raises(ValueError, match="share 0 has no usable document"):
        next(iter(DocumentStream(empty, repeat=True)))


def test_what_is_skipped_is_an_empty_batch():
    collator = DataCollatorForTJEPA(STRATEGIES)
    assert len(collator([None, None])["slot_indices"]) == 0 and collator.num_dropped_documents == 0
    assert np.all(collator(make_examples([9]))["input_ids"].numpy() >= 0)
