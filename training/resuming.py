"""How a run goes on from a checkpoint: what the Trainer forgets between two starts, and what a schedule does when the
run has another number of steps than before."""

import logging
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.data_loader import IterableDatasetShard
from accelerate.utils import gather_object
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from .checkpoints import find_damage, list_checkpoints


logger = logging.getLogger(__name__)

STATE_KEY = "ResumeState"  # in trainer_state.json, under `stateful_callbacks`


# --- More steps than before ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScheduleStart:
    """Where the present schedules begin, of learning rate, weight decay and momentum: not at 0 in an extended run."""

    first_step: int = 0
    start_lr: float | None = None  # of the warm-up from there; `None`: that of the arguments


class Extension(NamedTuple):
    """How a run goes on that has another number of steps than before."""

    checkpoint: str
    schedule_start: ScheduleStart | None = None  # of new schedules; `None`: those of the checkpoint go on
    note: str | None = None  # for the log


def plan_extension(args: TrainingArguments, checkpoint: str, num_steps: int) -> Extension:
    """
    What `--extend_schedule` makes of a checkpoint whose run had another number of optimizer steps than `num_steps`.

    Raises:
        ValueError: if the schedules would jump and the arguments do not say what else to do, or if there is no
            checkpoint for what they say.
    """
    state = TrainerState.load_from_json(Path(checkpoint) / "trainer_state.json")
    if state.max_steps != num_steps and state.global_step >= num_steps == args.max_steps:
        raise ValueError(
            f"{checkpoint} lies at step {state.global_step:,} of {state.max_steps:,}, so --max_steps {num_steps} "
            f"leaves nothing to do. Pass --max_steps {state.max_steps} as before, or start a new run from its weights "
            f"with --model_name_or_path {shlex.quote(str(checkpoint))} and another --output_dir."
        )
    if state.max_steps == num_steps or state.global_step >= num_steps:
        return Extension(checkpoint)
    change = f"{checkpoint} is of a run of {state.max_steps:,} steps, and this one has {num_steps:,}"
    if not hasattr(args, "extend_schedule"):  # fine-tuning: the Trainer's own schedule
        return Extension(checkpoint, note=f"{change}: the learning rate is that of {num_steps:,} steps from here on.")

    file = Path(checkpoint) / "scheduler.pt"
    scheduler = torch.load(file, weights_only=True) if file.is_file() else {}
    kind = args.lr_scheduler_type.value
    will_decay_later = kind == "warmup_stable_decay" and num_steps > state.max_steps
    last_step_before_decay = scheduler.get("last_step_before_decay") or -1
    others = "Weight decay and momentum are those of the new number of steps."
    if kind.startswith("constant") or (will_decay_later and state.global_step <= last_step_before_decay):
        return Extension(checkpoint, note=f"{change}: the learning rate goes on as it was. {others}")
    if args.extend_schedule == "warm_up_again":
        note = f"{change}: learning rate, weight decay and momentum begin anew at step {state.global_step:,}."
        return Extension(checkpoint, ScheduleStart(state.global_step, scheduler.get("_last_lr", [None])[0]), note)
    if args.extend_schedule == "decay_again":
        folder = Path(checkpoint).parent
        before = [path for step, path in list_checkpoints(folder).items() if step <= last_step_before_decay]
        before = [path for path in before if find_damage(path) is None]
        if not before or not will_decay_later:
            raise ValueError(
                f"--extend_schedule decay_again: {change}. It needs more steps than before, --lr_scheduler_type "
                "warmup_stable_decay in both runs, and a complete checkpoint from before the decay, of which "
                f"{folder} holds {len(before)}. --extend_schedule warm_up_again goes on from any checkpoint."
            )
        return Extension(str(before[-1]), note=f"{change}: going on from {before[-1]}, before the decay. {others}")
    decay_again = "--extend_schedule decay_again (from the last checkpoint before the decay), "
    decay_again = decay_again if will_decay_later else ""
    raise ValueError(
        f"{change}: its schedules would jump. Choose one: --extend_schedule warm_up_again (from this checkpoint "
        f"through a new warm-up and a new decay), {decay_again}or --max_steps {state.max_steps} as before."
    )


# --- What the Trainer forgets ----------------------------------------------------------------------------------------


class ResumeStateCallback(TrainerCallback):
    """
    Keeps in `trainer_state.json` what the Trainer forgets between two starts: the loss summed up since the last log
    line, how far the workers of all processes have read a streaming dataset, how many documents a step has, and where
    the schedules begin.

    Attributes:
        unlogged_loss (0-dimensional `torch.Tensor`): of this process, summed up since the last log line.
        last_logged_step (`int`): the optimizer step of that line.
    """

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self._stream = None
        self._first_batch = 0  # how many batches more the Trainer counts than the stream gives out
        self.unlogged_loss, self.last_logged_step = torch.zeros(()), 0

    def on_train_begin(self, args, state: TrainerState, control, train_dataloader=None, **kwargs):
        saved = state.stateful_callbacks.get(STATE_KEY)
        self.unlogged_loss = torch.tensor(saved["unlogged_loss"] if saved else 0.0, device=args.device)
        self.last_logged_step = state.global_step - (saved["unlogged_steps"] if saved else 0)
        dataset = train_dataloader.dataset
        is_sharded = isinstance(dataset, IterableDatasetShard)  # reads the documents of all processes, keeps its own
        self._stream = dataset.dataset if is_sharded else dataset
        if hasattr(self._stream, "remember_positions"):
            batch_size = state.train_batch_size if args.auto_find_batch_size else args.train_batch_size
            self._stream.remember_positions(
                num_workers=args.dataloader_num_workers,
                documents_per_batch=batch_size * (dataset.num_processes if is_sharded else 1),
                num_batches=(args.dataloader_prefetch_factor or 2) + 2,  # how far a worker may be ahead
            )
            num_batches = state.global_step * args.gradient_accumulation_steps  # a stream is one endless epoch
            self._first_batch = num_batches if args.ignore_data_skip else 0
            if saved is not None:
                self._stream.load_state_dict(saved["streams"], num_batches - self._first_batch)
            return
        before, now = (saved or {}).get("documents_per_step"), self._trainer.get_total_train_batch_size(args)
        if before not in (None, now):
            logger.warning(
                f"A step has {now} documents from here on; up to the checkpoint it had {before}. The Trainer counts "
                "steps, so in this epoch some documents are left out, or come twice."
            )

    def collect(self) -> None:
        """Before a checkpoint is written. Every process must take part."""
        args, state = self._trainer.args, self._trainer.state
        streams = [None]
        if hasattr(self._stream, "state_dict"):
            num_batches = state.global_step * args.gradient_accumulation_steps - self._first_batch
            streams = gather_object([self._stream.state_dict(num_batches)])
        state.stateful_callbacks[STATE_KEY] = {
            "unlogged_steps": state.global_step - self.last_logged_step,
            "unlogged_loss": self._trainer.accelerator.gather(self.unlogged_loss).mean().item(),
            "streams": streams,
            "documents_per_step": self._trainer.get_total_train_batch_size(args),
            "schedule_start": asdict(self._trainer.schedule_start),
        }

    def take_loss(self) -> float:
        """The mean loss of the optimizer steps since the last log line, of all processes, which then begins anew."""
        num_steps = self._trainer.state.global_step - self.last_logged_step
        loss = self._trainer.accelerator.gather(self.unlogged_loss).mean().item() / num_steps
        self.unlogged_loss = torch.zeros_like(self.unlogged_loss)
        self.last_logged_step = self._trainer.state.global_step
        return loss


def saved_schedule_start(state: TrainerState) -> ScheduleStart:
    saved = state.stateful_callbacks.get(STATE_KEY) or {}
    return ScheduleStart(**saved.get("schedule_start", {}))
