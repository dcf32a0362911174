"""Whatever goes wrong in whatever phase of a step, the same command afterwards ends with the same weights."""

import json
import os
import signal
import socket
import time
from functools import partial
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from huggingface_hub import HfApi

from fault_injection import KINDS, PHASES, Fault, fork, wait
from helpers import arguments, make_trainer, run
from kill_and_resume import assert_same_end, read_end
from tjepa.training.checkpoints import find_checkpoint
from tjepa.training.loop import train
from tjepa.training.publishing import HubPublisher


STEPS = {"forward": 5, "optimizer": 5, "weights": 4, "state": 4, "rename": 4, "upload": 4}


class NowhereApi(HfApi):
    """A Hub that takes whatever it gets."""

    def whoami(self):
        return {"name": "nobody"}

    def create_repo(self, repo_id, **kwargs):
        pass

    def upload_folder(self, **kwargs):
        pass


def train_or_resume(folder: Path, fault: Fault | None = None) -> None:
    """Six steps with dropout, a checkpoint and an upload after every second one."""
    patch = pytest.MonkeyPatch()
    for name in ("whoami", "create_repo", "upload_folder"):
        patch.setattr(HfApi, name, getattr(NowhereApi, name))
    if fault is not None:
        fault.install(patch)
    trainer = make_trainer(
        folder,
        {"hidden_dropout_prob": 0.1},
        max_steps=6,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        logging_steps=2,
        resume_from_checkpoint="last",
        hub_strategy="every_save",
    )
    tokenizer = type("Tokenizer", (), {"vocab_files_names": {}, "save_pretrained": lambda *_: None})()
    trainer.processing_class = trainer.callback_handler.processing_class = tokenizer
    publisher = HubPublisher(trainer.args, token=None)
    train(trainer, find_checkpoint(trainer.args), publisher)
    trainer.model.save_pretrained(folder)
    publisher.publish_model_folder(str(folder), tokenizer)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert wait(fork(partial(train_or_resume, folder), folder / "log.txt")) == 0, (folder / "log.txt").read_text()
    return read_end(folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("phase", PHASES)
def test_a_fault_and_the_same_command_again(tmp_path, undisturbed, phase, kind):
    fault, log = Fault(phase, kind, STEPS[phase]), tmp_path / "log.txt"
    code = wait(fork(partial(train_or_resume, tmp_path, fault), log))
    text = log.read_text()
    if kind in ("kill", "torn write"):
        assert code == -9, text
    elif phase == "upload":  # in the background: training goes on and says so
        assert code == 0 and "the push to" in text and "failed" in text
    else:
        assert code == 1, text
        assert ("injected" if kind == "exception" else "No space left on device") in text
    if phase in ("weights", "state", "rename") and code == 1:
        error = text[text.rindex("\nOSError: ") :]
        assert "checkpoint-4 could not be written" in error and "MB are free" in error
        assert "Intact: checkpoint-2." in error and "again with --resume_from_checkpoint last" in error
    assert wait(fork(partial(train_or_resume, tmp_path), log)) == 0, log.read_text()
    assert_same_end(undisturbed, read_end(tmp_path))


# --- Another process than the first ----------------------------------------------------------------------------------


def start_process(rank: int, port: int, argv: list[str]) -> None:
    """One of two processes, as torchrun starts them; the second one dies while the checkpoint of step 4 is saved."""
    torchrun = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in torchrun.items()}, MASTER_ADDR="127.0.0.1")
    AcceleratorState._reset_state(reset_partial_state=True)
    patch = pytest.MonkeyPatch()
    Fault("state", "kill", step=4, process=1).install(patch)
    run(patch, argv)


def test_the_second_process_dies_while_saving(inputs, tmp_path, monkeypatch):
    """The first one does not call the checkpoint complete; one process alone goes on from the one before."""
    options = {"max_steps": 6, "save_steps": 2, "do_eval": False, "use_cpu": True}
    two = arguments(inputs, tmp_path / "out", **options, per_device_train_batch_size=4)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    log = tmp_path / "log.txt"
    processes = [fork(partial(start_process, rank, port, two), log) for rank in range(2)]
    assert wait(processes[1]) == -signal.SIGKILL, log.read_text()
    if wait(processes[0], until=time.monotonic() + 5) is None:  # it waits for the other one, until somebody ends it
        os.kill(processes[0], signal.SIGKILL)
        os.waitpid(processes[0], 0)
    assert find_marks(tmp_path / "out") == ["checkpoint-2"]
    options |= {"per_device_train_batch_size": 8}
    run(monkeypatch, arguments(inputs, tmp_path / "out", **options, resume_from_checkpoint="last"))
    run(monkeypatch, arguments(inputs, tmp_path / "whole", **options))
    states = [json.loads((tmp_path / name / "trainer_state.json").read_text()) for name in ("out", "whole")]
    losses = [[line["loss"] for line in state["log_history"] if "loss" in line] for state in states]
    assert len(losses[0]) == 6 and losses[0] == pytest.approx(losses[1], rel=1e-5)


def find_marks(output_dir: Path) -> list[str]:
    return sorted(path.parent.name for path in output_dir.glob("checkpoint-*/checkpoint_complete.json"))
