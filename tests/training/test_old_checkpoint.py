"""A checkpoint of an older version goes on: the weights, optimizer, schedule and data position that were saved, to the
bit, and then the losses and documents of the version that wrote it (tests/data/make_old_checkpoint.py)."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer
from transformers.trainer_pt_utils import safe_globals

from helpers import REPOSITORY, run
from tjepa.data_collator_tjepa import DataCollatorForTJEPA


@pytest.fixture(params=["map", "stream"])
def old_run(request, tmp_path) -> Path:
    archive = REPOSITORY / "tests" / "data" / f"checkpoint-of-9ad65c5-{request.param}.tar.xz"
    assert archive.stat().st_size < 200_000
    shutil.unpack_archive(archive, tmp_path, filter="data")
    return tmp_path


class FirstStep:
    """What the Trainer goes on from, copied before its first forward pass."""

    def __init__(self, monkeypatch):
        self.trainer = None
        step = Trainer.training_step

        def training_step(trainer, *args, **kwargs):
            if self.trainer is None:
                self.trainer = trainer
                self.random_state = torch.random.get_rng_state()
                self.weights = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
                moments = trainer.optimizer.state_dict()["state"]
                self.moments = {i: {k: v.clone() for k, v in state.items()} for i, state in moments.items()}
                self.rates = [group["lr"] for group in trainer.optimizer.param_groups]
                self.schedule = trainer.lr_scheduler.state_dict()
            return step(trainer, *args, **kwargs)

        monkeypatch.setattr(Trainer, "training_step", training_step)


def test_a_checkpoint_of_an_older_version_goes_on(old_run, monkeypatch):
    expected = json.loads((old_run / "expected.json").read_text())
    documents = []
    collate = DataCollatorForTJEPA.__call__

    def record(collator, examples):
        documents.append([[example["epoch"], example["document_index"]] for example in examples if example])
        return collate(collator, examples)

    monkeypatch.setattr(DataCollatorForTJEPA, "__call__", record)
    first_step = FirstStep(monkeypatch)
    paths = {name: old_run / file for name, file in expected["files"].items()}
    paths |= {"resume_from_checkpoint": old_run / "checkpoint-4"}
    paths |= {"output_dir": old_run / "out", "cache_dir": old_run / "cache"}
    run(monkeypatch, [f"--{name}={value}" for name, value in {**expected["flags"], **paths}.items()])

    checkpoint = old_run / "checkpoint-4"
    saved_weights = load_file(checkpoint / "model.safetensors")
    assert saved_weights.keys() <= first_step.weights.keys()
    assert all(torch.equal(first_step.weights[name], tensor) for name, tensor in saved_weights.items())
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert saved["state"].keys() == first_step.moments.keys()
    for index, moments in saved["state"].items():
        assert all(torch.equal(first_step.moments[index][name], moments[name]) for name in moments)
    schedule = torch.load(checkpoint / "scheduler.pt", weights_only=True)
    assert first_step.rates == schedule["_last_lr"]
    assert first_step.schedule["last_epoch"] == schedule["last_epoch"] == 4
    with safe_globals():
        random_states = torch.load(checkpoint / "rng_state.pth", weights_only=True)
    assert torch.equal(first_step.random_state, random_states["cpu"])

    log = json.loads((old_run / "out" / "trainer_state.json").read_text())["log_history"]
    lines = {line["step"]: line for line in log if "loss" in line}
    for line in expected["log"]:
        for name in ("loss", "jepa_loss", "token_prediction_loss", "learning_rate", "weight_decay", "ema_momentum"):
            assert lines[line["step"]][name] == pytest.approx(line[name], rel=1e-5), (line["step"], name)
    if not expected["flags"].get("dataloader_num_workers"):
        drawn = [batch for batch in documents if batch]
        assert drawn[: len(expected["documents"])] == expected["documents"]
