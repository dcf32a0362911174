"""A run from its first step or a checkpoint to its end: what pretraining and fine-tuning do around `Trainer.train`."""

import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import Trainer, TrainerCallback, TrainerState

from .checkpoints import CheckpointCallback, checkpoint_folder, count_steps, explain_failed_save, is_finished
from .model_folder import PRETRAINING_FOLDER
from .publishing import HubPublisher
from .resuming import plan_extension
from .signals import StopOnSignalCallback


logger = logging.getLogger(__name__)


def train(
    trainer: Trainer, checkpoint: str | None, publisher: HubPublisher | None, callbacks: Sequence[TrainerCallback] = ()
) -> dict[str, float]:
    """
    Trains to the end, from the start or from a checkpoint, and returns the Trainer's metrics. `callbacks` are called
    last at a save, when the checkpoint is complete.

    Raises:
        PermissionError: if the publisher may not make its repository.
        SystemExit: with 128 + the signal's number after SIGTERM (143) or SIGINT (130), when a checkpoint was saved.
        OSError: if a checkpoint could not be written.
        ValueError: if the checkpoint's run had another number of steps, and it is not said what the schedules do then,
            or `max_steps` lies before the checkpoint.
    """
    num_steps = None if checkpoint is None else count_steps(trainer)
    if checkpoint is not None:
        checkpoint, schedule_start, note = plan_extension(trainer.args, checkpoint, num_steps)
        if note is not None:
            logger.info(note)
        if schedule_start is not None:
            trainer.new_schedule_start = schedule_start
    if publisher is not None:
        publisher.create_repository()
    if checkpoint is not None and is_finished(checkpoint, num_steps):
        logger.info(f"{checkpoint} is the end of training already")
        load_state(trainer, checkpoint)
        best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
        # beside the last one, wherever the folder of the run has been moved to
        folder = checkpoint if best is None else Path(checkpoint).with_name(Path(best).name)
        weights = type(trainer.model).from_pretrained(folder, dtype=torch.float32).state_dict()
        trainer.model.load_state_dict(weights)  # before it is wrapped or sharded, which an evaluation does
        return {}
    stop_on_signal = StopOnSignalCallback()
    trainer.callback_handler.callbacks.insert(0, stop_on_signal)  # before those that look at control.should_save
    trainer.add_callback(CheckpointCallback())
    # what is uploaded, or described, must be complete by then
    for callback in (*([] if publisher is None else [publisher]), *callbacks):
        trainer.add_callback(callback)
    try:
        with explain_failed_save(trainer), logging_redirect_tqdm():  # a warning stands above the bar, not behind it
            metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    finally:
        stop_on_signal.restore_handlers()
    if stop_on_signal.signal_number is not None:
        step = trainer.state.global_step
        advice = "with a checkpoint. Start again with --resume_from_checkpoint last."
        if trainer.args.save_only_model:
            folder = checkpoint_folder(trainer.args, trainer.state)
            advice = f"with its weights. Start a new run from them with --model_name_or_path {folder}."
        logger.warning(f"Stopped by {signal.Signals(stop_on_signal.signal_number).name} after step {step}, {advice}")
        sys.exit(128 + stop_on_signal.signal_number)
    trainer.save_state()
    return metrics


def load_state(trainer: Trainer, folder: str) -> None:
    """Takes the step and the log of the run that wrote a folder, if there are any in it."""
    folder = Path(folder)
    path = (folder.parent if folder.name == PRETRAINING_FOLDER else folder) / "trainer_state.json"
    if path.is_file():
        trainer.state = TrainerState.load_from_json(path)
        trainer.state.is_local_process_zero = trainer.is_local_process_zero()
        trainer.state.is_world_process_zero = trainer.is_world_process_zero()
