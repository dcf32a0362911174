"""What may go wrong, at a named point: `Fault(phase, kind, step, process)` makes it happen in a training run.

    Fault("state", "full disk", step=4).install(monkeypatch)      # in this process
    pid = fork(train, log)                                         # in one that may die

Phases, in the order of a step: `forward` (after it), `optimizer` (after its step), `weights` and `state` (while the
checkpoint's file of weights or of the optimizer is written; `state` of another process than the first is the file of
its random numbers), `rename` (the file that makes the checkpoint complete gets its name), `upload` (to the Hub).

Kinds: `kill` (SIGKILL), `full disk` (half of the file is written, then ENOSPC), `torn write` (as after a power cut:
the file that was written last is cut in half, and the process is gone) and `exception`.
"""

import errno
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers.modeling_utils
from accelerate import PartialState
from huggingface_hub import HfApi
from transformers import Trainer


PHASES = ("forward", "optimizer", "weights", "state", "rename", "upload")
KINDS = ("kill", "full disk", "torn write", "exception")


class InjectedError(RuntimeError):
    pass


@dataclass
class Fault:
    """Happens once, in optimizer step `step` = 1, 2, ... (or while its checkpoint is saved) of process `process`."""

    phase: str
    kind: str
    step: int
    process: int = 0

    def __post_init__(self):
        assert self.phase in PHASES and self.kind in KINDS, self
        self.current_step, self.last_checkpoint, self.happened = 0, None, False

    def install(self, patch: pytest.MonkeyPatch) -> None:
        training_step, optimizer_step = Trainer.training_step, torch.optim.AdamW.step
        save_weights, save, replace = transformers.modeling_utils.safe_save_file, torch.save, Path.replace
        upload_folder = HfApi.upload_folder

        def faulty_training_step(trainer, model, *args, **kwargs):
            self.current_step = trainer.state.global_step + 1
            if self.phase != "forward" or self.current_step != self.step:
                return training_step(trainer, model, *args, **kwargs)
            handle = model.register_forward_hook(lambda *_: self.happen())
            try:
                return training_step(trainer, model, *args, **kwargs)
            finally:
                handle.remove()

        def faulty_optimizer_step(optimizer, *args, **kwargs):
            loss = optimizer_step(optimizer, *args, **kwargs)
            if self.phase == "optimizer" and self.current_step == self.step:
                self.happen()
            return loss

        def faulty_save_weights(tensors, filename, *args, **kwargs):
            save_weights(tensors, filename, *args, **kwargs)
            self.happen_if_written("weights", filename)

        def faulty_save(obj, f, *args, **kwargs):
            save(obj, f, *args, **kwargs)
            self.happen_if_written("state", f)

        def faulty_replace(path, target):
            if self.kind == "torn write":
                replaced = replace(path, target)
                self.happen_if_written("rename", target)
                return replaced
            self.happen_if_written("rename", target, path)
            return replace(path, target)

        def faulty_upload_folder(api, *args, **kwargs):
            if self.phase == "upload" and f"step {self.step}" in kwargs["commit_message"]:
                self.happen()
            return upload_folder(api, *args, **kwargs)

        patch.setattr(Trainer, "training_step", faulty_training_step)
        patch.setattr(torch.optim.AdamW, "step", faulty_optimizer_step)
        patch.setattr(transformers.modeling_utils, "safe_save_file", faulty_save_weights)
        patch.setattr(torch, "save", faulty_save)
        patch.setattr(Path, "replace", faulty_replace)
        patch.setattr(HfApi, "upload_folder", faulty_upload_folder)

    def happen_if_written(self, phase: str, path: str | Path, file: str | Path | None = None) -> None:
        """If `path` belongs to the step's checkpoint; `file` is what holds its content, where that is another one."""
        if not isinstance(path, (str, Path)) or not Path(path).parent.name.startswith("checkpoint-"):
            return
        if self.phase == phase and Path(path).parent.name == f"checkpoint-{self.step}":
            self.happen(Path(file or path))
        self.last_checkpoint = Path(path).parent

    def happen(self, file: Path | None = None) -> None:
        if self.happened or PartialState().process_index != self.process:
            return
        self.happened = True
        if file is None and self.kind == "torn write" and self.last_checkpoint is not None:
            file = self.last_checkpoint / "optimizer.pt"
        if file is not None and self.kind in ("full disk", "torn write"):
            os.truncate(file, file.stat().st_size // 2)
        if self.kind == "exception":
            raise InjectedError(f"injected: {self}")
        if self.kind == "full disk":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        os.kill(os.getpid(), signal.SIGKILL)


def fork(function: Callable[[], object], log: Path) -> int:
    """The id of a process that calls `function`, with what it prints in `log`: without the seconds of imports."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(1), "w", buffering=1) for _ in range(2))
        logging.basicConfig(force=True)  # not into the records of the test that started it
        function()
        code = 0
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(pid: int, until: float = float("inf"), stop_waiting: Callable[[], bool] = lambda: False) -> int | None:
    """The exit code, or `None` if the process still runs at the time `until` or when `stop_waiting()` is true."""
    while time.monotonic() < until and not stop_waiting():
        finished, status = os.waitpid(pid, os.WNOHANG)
        if finished:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    return None
