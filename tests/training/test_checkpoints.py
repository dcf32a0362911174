"""What a killed, stopped or disk-starved run leaves behind, and that the next start takes only what is whole."""

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer_callback import TrainerControl

from helpers import REPOSITORY, StopAfter, make_trainer
from kill_and_resume import write_inputs
from tjepa.corpus.atomic_writes import replacing_files, replacing_folder
from tjepa.training.arguments import PretrainingArguments
from tjepa.training.checkpoints import (
    MARK,
    WEIGHTS_MARK,
    CheckpointCallback,
    explain_failed_save,
    find_checkpoint,
    find_damage,
    find_last_checkpoint,
    list_checkpoints,
    mark_complete,
)
from tjepa.training.loop import train
from tjepa.training.signals import StopOnSignalCallback


FILES = ("model.safetensors", "optimizer.pt", "trainer_state.json", "part/shard")


def make_checkpoint(output_dir: Path, step: int, mark: bool = True, files=FILES) -> Path:
    folder = output_dir / f"checkpoint-{step}"
    (folder / "part").mkdir(parents=True)
    for name in files:
        (folder / name).write_text(f"{name} {step}")
    if mark:
        mark_complete(folder)
    return folder


# --- Complete or torn ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda folder: (folder / MARK).unlink(), "saving was interrupted"),
        (lambda folder: (folder / MARK).write_text('{"files": {'), "cannot be read"),
        (lambda folder: (folder / "part" / "shard").unlink(), "part/shard is missing"),
        (lambda folder: os.truncate(folder / "optimizer.pt", 3), "optimizer.pt has 3 bytes instead of 15"),
    ],
)
def test_a_torn_checkpoint_is_skipped_with_its_reason(tmp_path, caplog, harm, reason):
    good, torn = make_checkpoint(tmp_path, 2), make_checkpoint(tmp_path, 10)
    assert find_last_checkpoint(tmp_path) == torn  # 10 is more than 2
    harm(torn)
    assert find_last_checkpoint(tmp_path) == good
    assert f"Skipping {torn}" in caplog.text and reason in caplog.text


def test_last_starts_anew_where_nothing_is_complete(tmp_path):
    make_checkpoint(tmp_path, 2, mark=False)
    args = PretrainingArguments(output_dir=str(tmp_path), resume_from_checkpoint="last")
    assert find_checkpoint(args) is None
    args = PretrainingArguments(output_dir=str(tmp_path / "nowhere"), resume_from_checkpoint="last")
    assert find_checkpoint(args) is None


def test_what_a_killed_process_left_is_no_part_of_a_checkpoint(tmp_path):
    checkpoint = make_checkpoint(tmp_path, 2, mark=False)
    (checkpoint / ".unfinished-x").mkdir()
    (checkpoint / ".unfinished-x" / "checkpoint_complete.json").touch()
    mark_complete(checkpoint)
    assert not [name for name in json.loads((checkpoint / MARK).read_text())["files"] if "unfinished" in name]


def test_a_checkpoint_that_is_named(tmp_path):
    plain = make_checkpoint(tmp_path, 2, mark=False)  # as the plain Trainer leaves it
    assert find_checkpoint(PretrainingArguments(resume_from_checkpoint=str(plain))) == str(plain)
    damaged = make_checkpoint(tmp_path, 4)
    (damaged / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match="cannot be resumed: optimizer.pt is missing"):
        find_checkpoint(PretrainingArguments(resume_from_checkpoint=str(damaged)))
    with pytest.raises(FileNotFoundError, match="has no trainer_state.json"):
        find_checkpoint(PretrainingArguments(resume_from_checkpoint=str(tmp_path / "checkpoint-8")))


@pytest.mark.parametrize("arguments_class", [PretrainingArguments, TrainingArguments])
def test_a_folder_that_holds_a_run_is_not_trained_over(tmp_path, arguments_class):
    def start(name: str, **options) -> str | None:
        return find_checkpoint(arguments_class(output_dir=str(tmp_path / name), **options))

    (tmp_path / "finished").mkdir()
    (tmp_path / "finished" / "config.json").write_text("{}")
    make_checkpoint(tmp_path / "killed", 2)
    for name in ("finished", "killed"):
        with pytest.raises(FileExistsError, match="already holds a run"):
            start(name, do_train=True)
        assert start(name, do_train=False) is None
    (tmp_path / "empty").mkdir()
    assert start("empty", do_train=True) is None
    wanted = str(make_checkpoint(tmp_path / "other", 2))
    for name in ("finished", "killed"):  # another run's checkpoint does not make this one's weights its own
        with pytest.raises(FileExistsError, match="already holds a run"):
            start(name, do_train=True, resume_from_checkpoint=wanted)
    assert start("empty", do_train=True, resume_from_checkpoint=wanted) == wanted
    assert start("other", do_train=True, resume_from_checkpoint=wanted) == wanted
    with pytest.raises(FileExistsError, match="holds a model, but no complete checkpoint"):
        start("finished", do_train=True, resume_from_checkpoint="last")
    if arguments_class is PretrainingArguments:
        assert start("killed", do_train=True, overwrite_output_dir=True) is None
        assert start("finished", do_train=True, overwrite_output_dir=True, resume_from_checkpoint="last") is None


def test_a_folder_that_cannot_be_written_is_said_before_training(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="file is a file: name a folder"):
        find_checkpoint(PretrainingArguments(output_dir=str(tmp_path / "file" / "run")))

    def refuse(dir):  # the user of a test may write everywhere
        raise OSError(errno.EROFS, f"Read-only: {dir}")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(
        PermissionError, match=f"new/run cannot be written: nothing can be made in {tmp_path} .Read-only: {tmp_path}"
    ):
        find_checkpoint(PretrainingArguments(output_dir=str(tmp_path / "new" / "run")))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("error", [OSError, RuntimeError, SafetensorError])
def test_a_failed_save_is_explained(tmp_path, error):
    trainer = SimpleNamespace(args=SimpleNamespace(output_dir=str(tmp_path)), state=TrainerState(global_step=4))
    make_checkpoint(tmp_path, 2)
    with pytest.raises(error, match="^unrelated$"), explain_failed_save(trainer):
        raise error("unrelated")
    with pytest.raises(OSError, match=r"runs/mine could not be written .*no space"):
        with explain_failed_save(trainer, "runs/mine"):
            raise error("no space")
    unfinished = make_checkpoint(tmp_path, 4, mark=False)
    explained = (
        rf"checkpoint-4 could not be written \({error.__name__}: no space\).* MB are free.*Intact: checkpoint-2\."
    )
    with pytest.raises(OSError, match=explained), explain_failed_save(trainer):
        raise error("no space")
    mark_complete(unfinished)
    with pytest.raises(error, match="^unrelated$"), explain_failed_save(trainer):
        raise error("unrelated")
    (unfinished / "optimizer.pt").unlink()  # of --save_only_model
    mark_complete(unfinished)
    with pytest.raises(error, match="^unrelated$"), explain_failed_save(trainer):
        raise error("unrelated")


WEIGHTS = ("model.safetensors", "trainer_state.json")  # what --save_only_model leaves


def test_weights_without_an_optimizer_are_not_complete(tmp_path):
    weights = make_checkpoint(tmp_path, 4, files=WEIGHTS)
    assert (weights / WEIGHTS_MARK).exists() and not (weights / MARK).exists()
    for wanted in ("last", str(weights)):
        args = PretrainingArguments(output_dir=str(tmp_path), resume_from_checkpoint=wanted)
        with pytest.raises(ValueError, match="cannot be resumed.*weights only.*--model_name_or_path"):
            find_checkpoint(args)
    (weights / WEIGHTS_MARK).rename(weights / MARK)  # as version 0.1.0 left it
    with pytest.raises(ValueError, match="cannot be resumed"):
        find_checkpoint(args)
    with pytest.raises(ValueError, match="cannot be resumed"):
        find_checkpoint(PretrainingArguments(output_dir=str(tmp_path), resume_from_checkpoint="last"))
    make_checkpoint(tmp_path, 2)
    assert find_last_checkpoint(tmp_path).name == "checkpoint-2"


def test_save_only_model(tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    trainer = make_trainer(tmp_path, save_only_model=True, **options)
    trainer.add_callback(CheckpointCallback())
    trainer.train()
    assert list(list_checkpoints(tmp_path)) == [2] and (tmp_path / "checkpoint-2" / WEIGHTS_MARK).is_file()
    assert find_last_checkpoint(tmp_path) is None


def test_rotation_of_weights_keeps_one_that_can_be_resumed(tmp_path):
    args = PretrainingArguments(output_dir=str(tmp_path), save_total_limit=2)
    callback = CheckpointCallback()
    call("on_train_begin", args, callback)
    make_checkpoint(tmp_path, 1)
    make_checkpoint(tmp_path, 2)
    for step in (4, 6, 8):
        make_checkpoint(tmp_path, step, files=WEIGHTS)
    call("on_save", args, callback, global_step=8)
    assert list(list_checkpoints(tmp_path)) == [2, 6, 8]


def test_rotation_keeps_a_checkpoint_without_a_mark_until_there_is_a_newer_one(tmp_path):
    """A plain Trainer's, from which training goes on."""
    args = PretrainingArguments(output_dir=str(tmp_path), save_total_limit=1)
    make_checkpoint(tmp_path, 2)
    make_checkpoint(tmp_path, 5, mark=False)
    callback = CheckpointCallback()
    call("on_train_begin", args, callback, global_step=5)
    assert list(list_checkpoints(tmp_path)) == [2, 5]
    make_checkpoint(tmp_path, 6)
    call("on_save", args, callback, global_step=6)
    assert list(list_checkpoints(tmp_path)) == [6]


def test_a_second_beginning(tmp_path):
    """--auto_find_batch_size: training begins again without having ended."""
    args = PretrainingArguments(output_dir=str(tmp_path), save_total_limit=1)
    callback, signals = CheckpointCallback(), StopOnSignalCallback()
    before = signal.getsignal(signal.SIGTERM)
    loader = SimpleNamespace(worker_init_fn=None)
    for _ in range(2):
        call("on_train_begin", args, callback)
        signals.on_train_begin(args, None, None, train_dataloader=loader)
    make_checkpoint(tmp_path, 2)
    make_checkpoint(tmp_path, 4)
    call("on_save", args, callback, global_step=4)
    assert list(list_checkpoints(tmp_path)) == [4]
    call("on_train_end", args, callback)
    signals.on_train_end(args, None, None)
    assert args.save_total_limit == 1 and signal.getsignal(signal.SIGTERM) == before


def test_checkpoints_of_a_plain_trainer(tmp_path):
    """As fine-tuning uses it: any model, any TrainingArguments. Stopped and resumed with `last` it ends the same."""

    def train(folder: Path, stop_after: int | None = None) -> Trainer:
        torch.manual_seed(0)
        args = TrainingArguments(
            output_dir=str(folder), max_steps=6, save_steps=2, save_total_limit=1, use_cpu=True, report_to="none",
            per_device_train_batch_size=2, disable_tqdm=True, resume_from_checkpoint="last",
        )  # fmt: skip
        rows = [{"x": torch.randn(3), "labels": torch.randn(1)} for _ in range(16)]
        trainer = Trainer(LinearModel(), args, train_dataset=rows, callbacks=[CheckpointCallback()])
        if stop_after is not None:
            trainer.add_callback(StopAfter(stop_after))
        trainer.train(resume_from_checkpoint=find_checkpoint(args))
        return trainer

    whole = train(tmp_path / "whole")
    assert list(list_checkpoints(tmp_path / "whole")) == [6]
    train(tmp_path / "stopped", stop_after=4)
    assert find_last_checkpoint(tmp_path / "stopped").name == "checkpoint-4"
    resumed = train(tmp_path / "stopped")
    assert resumed.state.global_step == 6
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


class LinearModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": torch.nn.functional.mse_loss(self.layer(x), labels)}


def test_an_error_in_training_leaves_no_signal_handler(tmp_path):
    """In a notebook Ctrl-C must go on working, and a forked process must end by SIGTERM."""
    before = [signal.getsignal(number) for number in StopOnSignalCallback.SIGNALS]
    args = TrainingArguments(output_dir=str(tmp_path), max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True)
    trainer = Trainer(LinearModel(), args, train_dataset=[{"x": torch.randn(3), "labels": torch.randn(2)}])
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        trainer.model.forward = lambda x: None
        train(trainer, None, None)
    assert [signal.getsignal(number) for number in StopOnSignalCallback.SIGNALS] == before


def call(event: str, args: PretrainingArguments, callback: CheckpointCallback, **state) -> None:
    getattr(callback, event)(args, TrainerState(**state), TrainerControl(should_save=True))


def test_rotation_counts_complete_checkpoints_only(tmp_path):
    args = PretrainingArguments(output_dir=str(tmp_path), save_total_limit=2)
    callback = CheckpointCallback()
    call("on_train_begin", args, callback)
    assert args.save_total_limit is None  # the Trainer deletes nothing
    for step in (2, 4, 6):
        make_checkpoint(tmp_path, step)
    make_checkpoint(tmp_path, 7, mark=False)  # torn
    make_checkpoint(tmp_path, 8, mark=False)  # just being saved
    make_checkpoint(tmp_path, 10, mark=False)  # torn, and ahead of us
    call("on_save", args, callback, global_step=8)
    assert list(list_checkpoints(tmp_path)) == [6, 8, 10]
    assert find_last_checkpoint(tmp_path).name == "checkpoint-8"
    call("on_train_end", args, callback)
    assert args.save_total_limit == 2
    args.save_total_limit = 1  # a lower limit makes room before the next one is written
    call("on_train_begin", args, CheckpointCallback(), global_step=8)
    assert list(list_checkpoints(tmp_path)) == [8, 10]


def test_rotation_keeps_the_best_and_the_last_from_before_a_collapse(tmp_path):
    args = PretrainingArguments(output_dir=str(tmp_path), save_total_limit=1)
    callback = CheckpointCallback()
    call("on_train_begin", args, callback)
    for step in (20, 40, 60, 80, 100):
        make_checkpoint(tmp_path, step)
    healthy = {"eval_target_std": 0.5, "eval_cosine": 0.9, "eval_mean_target_cosine": 0.5}
    history = [{**healthy, "step": 40}, {**healthy, "step": 70, "eval_cosine": 0.4}, {**healthy, "step": 90}]
    history[2]["eval_target_std"] = 0.01
    best = "where/it/was/before/checkpoint-20"  # the folder was moved
    call("on_save", args, callback, global_step=100, log_history=history, best_model_checkpoint=best)
    assert list(list_checkpoints(tmp_path)) == [20, 60, 100]
    history.append({**healthy, "step": 100})  # recovered
    call("on_save", args, callback, global_step=100, log_history=history)
    assert list(list_checkpoints(tmp_path)) == [100]


def test_marks_of_what_will_be_overwritten(tmp_path, caplog):
    """--overwrite_output_dir, or going back to an older checkpoint: 'last' must not find the abandoned future."""
    args = PretrainingArguments(output_dir=str(tmp_path))
    early, late = make_checkpoint(tmp_path, 2), make_checkpoint(tmp_path, 4)
    call("on_train_begin", args, CheckpointCallback(), global_step=2)
    assert find_damage(early) is None and find_damage(late) is not None and "checkpoint-4" in caplog.text
    call("on_step_end", args, CheckpointCallback(), global_step=2)  # it is about to be written again
    assert find_damage(early) is not None


@pytest.mark.parametrize(("strategy", "saved"), [("steps", [4]), ("epoch", [4]), ("no", [])])
def test_the_last_step_before_the_decay_is_saved(tmp_path, strategy, saved):
    args = PretrainingArguments(output_dir=str(tmp_path), save_strategy=strategy)
    scheduler, found = SimpleNamespace(last_step_before_decay=4), []
    for step in (3, 4, 5):
        control = TrainerControl()
        CheckpointCallback().on_step_end(args, TrainerState(global_step=step), control, lr_scheduler=scheduler)
        found += [step] * control.should_save
    assert found == saved


def test_an_evaluation_leaves_the_mark(tmp_path):
    """At the end of an epoch, after the checkpoint of its last step."""
    args = PretrainingArguments(output_dir=str(tmp_path))
    folder = make_checkpoint(tmp_path, 2)
    CheckpointCallback().on_epoch_end(args, TrainerState(global_step=2), TrainerControl(should_evaluate=True))
    assert find_damage(folder) is None


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "old").write_text("old")
    with pytest.raises(OSError), replacing_folder(tmp_path / "data") as folder:
        (folder / "new").write_text("half of the n")
        raise OSError
    assert [path.name for path in tmp_path.rglob("*")] == ["data", "old"]
    with replacing_folder(tmp_path / "data") as folder:
        (folder / "new").write_text("new")
    assert [path.name for path in tmp_path.rglob("*")] == ["data", "new"]


def test_what_a_killed_process_left_of_a_folder(tmp_path):
    killed, writing = tmp_path / ".da[t]a.unfinished-killed", tmp_path / ".da[t]a.unfinished-writing"
    for leftover in (killed, writing):
        for name in ("da[t]a", "old"):
            (leftover / name).mkdir(parents=True)
            (leftover / name / "file").write_text(f"{leftover.name} {name}")
    (writing / "old").rename(tmp_path / "elsewhere")
    paths = [killed / "da[t]a" / "file", killed / "da[t]a", killed / "old", killed, writing / "da[t]a", writing]
    for path in paths:  # but the file that is being written
        os.utime(path, (0, 0))
    with pytest.raises(OSError), replacing_folder(tmp_path / "da[t]a"):
        raise OSError
    assert (tmp_path / "da[t]a" / "file").read_text() == f"{killed.name} old"
    os.utime(killed, (0, 0))  # which the renaming has touched
    with replacing_folder(tmp_path / "da[t]a") as folder:
        (folder / "file").write_text("new")
    assert (tmp_path / "da[t]a" / "file").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == [writing.name, "da[t]a", "elsewhere"]


def test_what_a_link_points_to_is_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with replacing_folder(tmp_path / "link") as folder:
        (folder / "new").write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "new").is_file()


def test_files_are_replaced_as_a_whole(tmp_path):
    (tmp_path / "model.safetensors").write_text("old")
    (tmp_path / ".unfinished-of-a-killed-run").mkdir()
    os.utime(tmp_path / ".unfinished-of-a-killed-run", (0, 0))
    with pytest.raises(OSError), replacing_files(tmp_path) as folder:
        (folder / "model.safetensors").write_text("half of the n")
        raise OSError
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_text() == "old"
    with replacing_files(tmp_path) as folder, replacing_files(tmp_path):  # another process at the same time
        (folder / "model.safetensors").write_text("new")
    assert (tmp_path / "model.safetensors").read_text() == "new" and len(list(tmp_path.iterdir())) == 1


# --- Real processes --------------------------------------------------------------------------------------------------


def test_killed_at_random_moments(tmp_path):
    """20 times SIGKILL, each followed by the same command: the end equals that of an undisturbed run, to the bit."""
    command = [sys.executable, REPOSITORY / "tests" / "kill_and_resume.py", "--num_kills=20", "--seed=1"]
    output_file = tmp_path / "kills.json"
    done = subprocess.run([*command, f"--output_file={output_file}"], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    counts = json.loads(output_file.read_text())
    assert counts["kills"] == 20 and counts["resumed"] > 0
    assert counts["torn_checkpoints_skipped"] > 0  # else the moments were not those that matter


@pytest.fixture
def launch(tmp_path):
    """Starts the script, endless and with a checkpoint at every step, and waits for the first two of them."""
    processes = []

    def start(*overrides: str) -> subprocess.Popen:
        arguments = [
            *write_inputs(tmp_path),
            "--max_steps=100000",
            "--save_steps=1",
            f"--output_dir={tmp_path / 'out'}",
        ]
        process = subprocess.Popen(
            [sys.executable, REPOSITORY / "run_pretraining.py", *arguments, *overrides],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        while find_last_checkpoint(tmp_path / "out") is None or len(list_checkpoints(tmp_path / "out")) < 2:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        return process

    yield start
    for process in processes:
        process.kill()


@pytest.mark.parametrize(
    ("number", "workers", "exit_code"), [(signal.SIGTERM, 2, 143), (signal.SIGINT, 0, 130)], ids=["SIGTERM", "SIGINT"]
)
def test_a_signal_saves_and_stops(tmp_path, launch, number, workers, exit_code):
    process = launch(f"--dataloader_num_workers={workers}", "--save_total_limit=2", "--save_steps=3")
    os.killpg(process.pid, number)  # as schedulers and terminals do: to the workers, too
    output = process.communicate(timeout=300)[0]
    assert process.returncode == exit_code, output
    assert f"{number.name}: finishing the step" in output and "--resume_from_checkpoint last" in output
    last = find_last_checkpoint(tmp_path / "out")
    assert last == list(list_checkpoints(tmp_path / "out").values())[-1]  # none is torn
    assert f"after step {last.name.removeprefix('checkpoint-')}," in output
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_second_signal_kills_at_once():
    child = os.fork()
    if not child:
        callback = StopOnSignalCallback()
        args = PretrainingArguments(output_dir="unused")
        callback.on_train_begin(args, None, None, train_dataloader=type("Loader", (), {"worker_init_fn": None})())
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # at the same time: from the launcher
        time.sleep(1.2)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


@pytest.mark.parametrize(
    ("flags", "exit_code"),
    [(["--learning_rate=1e30"], 1), (["--dataloader_persistent_workers=True"], 0)],
    ids=["an error", "persistent workers"],
)
def test_workers_end_with_the_run(tmp_path, flags, exit_code):
    """The interpreter ends them by one SIGTERM, and then waits for them however long it takes."""
    values = [f"--output_dir={tmp_path / 'out'}", "--max_steps=8", "--logging_steps=1", "--dataloader_num_workers=1"]
    command = [sys.executable, REPOSITORY / "run_pretraining.py", *write_inputs(tmp_path), *values, *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == exit_code, done.stderr[-2000:]
