"""SIGTERM and SIGINT: save a checkpoint, then stop."""

import math
import os
import signal
import time
from functools import partial

import torch
from transformers import TrainerCallback, TrainerControl, TrainingArguments


def absorb_first_signal(is_training: torch.Tensor, initialize_worker, worker_id: int) -> None:
    """
    While the process trains (bool `[]`, in shared memory) its workers must outlive the first SIGTERM or SIGINT, which
    schedulers and terminals send to them, too. Afterwards it ends them: the interpreter waits for them when it exits.
    """

    def receive(number: int, frame) -> None:
        signal.signal(number, signal.SIG_DFL)
        if not is_training:
            os.kill(os.getpid(), number)

    for number in StopOnSignalCallback.SIGNALS:
        signal.signal(number, receive)
    if initialize_worker is not None:
        initialize_worker(worker_id)


class StopOnSignalCallback(TrainerCallback):
    """
    SIGTERM or SIGINT (Ctrl-C): the optimizer step is finished, a checkpoint is saved, training ends, on all
    processes after the same step. A second signal kills at once; one within a second of the first is the same one,
    sent by terminal and launcher both. (transformers' `enable_jit_checkpoint` saves between forward pass and optimizer
    step, and a run resumed from there differs.)

    After training `signal_number` says which signal it was, or `None`. Training that ends by an error does not tell
    its callbacks: whoever starts it calls `restore_handlers`.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.signal_number: int | None = None
        self._received_at = math.inf
        self._previous_handlers = {}
        self._group = None
        self._is_training = torch.zeros((), dtype=torch.bool).share_memory_()

    def _receive(self, number: int, frame) -> None:
        if self.signal_number is None:
            self.signal_number, self._received_at = number, time.monotonic()
            os.write(2, f"\n{signal.Signals(number).name}: finishing the step, then saving a checkpoint.\n".encode())
        elif time.monotonic() - self._received_at > 1.0:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _stop_if_received(self, args: TrainingArguments, control: TrainerControl) -> None:
        number = self.signal_number or 0
        if self._group is not None:
            numbers = torch.tensor(number)
            torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX, self._group)
            number = int(numbers)
        if number:
            self.signal_number = number
            control.should_save = control.should_training_stop = True

    def on_train_begin(self, args: TrainingArguments, state, control, train_dataloader=None, **kwargs):
        if not self._previous_handlers:  # training may begin a second time (--auto_find_batch_size)
            self._previous_handlers = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        loader = getattr(train_dataloader, "base_dataloader", train_dataloader)
        loader.worker_init_fn = partial(absorb_first_signal, self._is_training, loader.worker_init_fn)
        self._is_training.fill_(True)
        if args.world_size > 1 and self._group is None:  # on the CPU: asking must not make a GPU wait
            self._group = torch.distributed.new_group(backend="gloo")

    def on_step_end(self, args: TrainingArguments, state, control: TrainerControl, **kwargs):
        self._stop_if_received(args, control)

    on_evaluate = on_step_end  # an evaluation may take long, and its checkpoint is written after it

    def on_train_end(self, args, state, control, **kwargs):
        self.restore_handlers()

    def restore_handlers(self) -> None:
        self._is_training.fill_(False)
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}
