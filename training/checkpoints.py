"""Which checkpoint is whole: a mark that is written last, the newest marked checkpoint, rotation, and atomic folders.

The Trainer writes a checkpoint file by file. A run that is killed meanwhile, or a disk that fills up, leaves a folder
that looks like a checkpoint and is none. So a complete checkpoint gets a mark, `checkpoint_complete.json`, with the
size of every file in it, written when everything else has reached the disk; `--resume_from_checkpoint last` takes
nothing else, and older checkpoints are only deleted when a newer one has its mark.
"""

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from .arguments import PretrainingArguments
from .health import collapsed_evaluations


logger = logging.getLogger(__name__)


MARK = "checkpoint_complete.json"
UNFINISHED = ".unfinished-"


# --- Complete or torn ------------------------------------------------------------------------------------------------


def list_checkpoints(output_dir: str | Path) -> dict[int, Path]:
    """Optimizer step -> checkpoint folder, complete or not, oldest first."""
    folders = {}
    for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if path.is_dir() and (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)):
            folders[int(match[1])] = path
    return dict(sorted(folders.items()))


def is_marked(checkpoint: str | Path) -> bool:
    return (Path(checkpoint) / MARK).is_file()


def find_damage(checkpoint: str | Path) -> str | None:
    """Why a checkpoint is not complete, in plain words, or `None` if it is."""
    checkpoint = Path(checkpoint)
    try:
        sizes = json.loads((checkpoint / MARK).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return (
            f"it has no {MARK}, which is written last: saving was interrupted (or it is the plain Trainer's; then "
            "name it with --resume_from_checkpoint)"
        )
    except (ValueError, KeyError, TypeError):
        return f"its {MARK} cannot be read"
    for name, size in sizes.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size:,} bytes instead of {size:,}"
    return None


def find_last_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint; newer ones that are torn are named in the log, with the reason."""
    for checkpoint in reversed(list_checkpoints(output_dir).values()):
        damage = find_damage(checkpoint)
        if damage is None:
            return checkpoint
        logger.warning(f"Skipping {checkpoint}: {damage}.")
    return None


def mark_complete(checkpoint: Path) -> None:
    """Brings every file of a checkpoint to the disk, then writes the mark."""
    (checkpoint / MARK).unlink(missing_ok=True)
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    for path in (*files, checkpoint):
        _flush(path)
    sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}
    unfinished = checkpoint / f"{MARK}.unfinished"
    unfinished.write_text(json.dumps({"files": sizes}, indent=2) + "\n", encoding="utf-8")
    _flush(unfinished)
    unfinished.replace(checkpoint / MARK)
    for folder in (checkpoint, checkpoint.parent):
        _flush(folder)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class CheckpointCallback(TrainerCallback):
    """
    Marks every checkpoint when it is complete, and then deletes those beyond `save_total_limit`. (The Trainer would
    delete them before other processes have finished writing, and would count torn ones.)

    Kept whatever the limit: the best checkpoint, and while the latest evaluations found a collapse, the newest
    checkpoint from before it. Must come after the Trainer's own callbacks, which decide whether to save.
    """

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.save_total_limit, args.save_total_limit = args.save_total_limit, None
        if state.is_world_process_zero:
            later = [path for step, path in list_checkpoints(args.output_dir).items() if step > state.global_step]
            marked = [path for path in later if is_marked(path)]
            for path in marked:
                (path / MARK).unlink()
            if marked:
                logger.warning(
                    f"This run starts at step {state.global_step}, so the later {', '.join(p.name for p in marked)} "
                    f"in {args.output_dir} will be overwritten, and 'last' no longer means them."
                )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        may_save = control.should_evaluate and args.save_strategy == SaveStrategy.BEST
        if (control.should_save or may_save) and state.is_world_process_zero:
            # a checkpoint that is being overwritten is not complete, whatever it was before
            (_checkpoint_folder(args, state) / MARK).unlink(missing_ok=True)

    on_epoch_end = on_evaluate = on_step_end

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        PartialState().wait_for_everyone()  # until every process has written its part
        if state.is_world_process_zero:
            mark_complete(_checkpoint_folder(args, state))
            self._rotate(args, state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        args.save_total_limit = self.save_total_limit

    def _rotate(self, args: TrainingArguments, state: TrainerState) -> None:
        if not self.save_total_limit or self.save_total_limit < 0:
            return
        checkpoints = {s: p for s, p in list_checkpoints(args.output_dir).items() if s <= state.global_step}
        complete = [step for step, path in checkpoints.items() if is_marked(path)]
        kept = set(complete[-self.save_total_limit :])
        if state.best_model_checkpoint is not None:
            kept |= {step for step, path in checkpoints.items() if path == Path(state.best_model_checkpoint)}
        if collapsed := collapsed_evaluations(state):
            kept |= set([step for step in complete if step < collapsed[0]][-1:])
        for step, path in checkpoints.items():
            if step not in kept:
                (path / MARK).unlink(missing_ok=True)  # first: half a checkpoint must not look whole
                shutil.rmtree(path, ignore_errors=True)


def _checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


# --- Errors while saving, and folders that are whole or not there ----------------------------------------------------


@contextmanager
def explain_failed_save(trainer: Trainer) -> Iterator[None]:
    """
    Around training: an error that left a checkpoint unfinished is raised again in plain words.

    Raises:
        OSError: what could not be written, how much space is free, and which checkpoints are intact.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch, safetensors and Python each raise their own
        output_dir, unfinished = trainer.args.output_dir, _checkpoint_folder(trainer.args, trainer.state)
        if not unfinished.is_dir() or find_damage(unfinished) is None:
            raise
        free = shutil.disk_usage(output_dir).free
        intact = [path.name for path in list_checkpoints(output_dir).values() if find_damage(path) is None]
        raise OSError(
            f"{unfinished} could not be written ({type(error).__name__}: {error}). {free / 1e6:,.0f} MB are free on "
            f"that disk. Intact: {', '.join(intact) or 'no checkpoint'}. Make room (a lower --save_total_limit, or "
            "another --output_dir) and start again with --resume_from_checkpoint last."
        ) from error


@contextmanager
def replacing_files(folder: str | Path) -> Iterator[Path]:
    """
    A temporary folder whose files move into `folder` when all of them have been written: each file there is the old
    one or the new one, never half of one.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"{UNFINISHED}*"):  # of a run that was killed here
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=UNFINISHED) as unfinished:
        yield Path(unfinished)
        files = sorted(path for path in Path(unfinished).rglob("*") if path.is_file())
        for path in files:
            _flush(path)
        for path in files:
            target = folder / path.relative_to(unfinished)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)


def find_checkpoint(args: PretrainingArguments) -> str | None:
    """
    The checkpoint to resume from: `--resume_from_checkpoint last` takes the newest complete one in `output_dir`, or
    starts anew where there is none.

    Raises:
        FileExistsError: if `output_dir` holds a run, and neither resuming nor overwriting was asked for.
        FileNotFoundError: if the checkpoint asked for is none.
        ValueError: if it was complete once and is not any more.
    """
    output_dir = Path(args.output_dir)
    if args.resume_from_checkpoint is not None:
        if args.resume_from_checkpoint.lower() in ("last", "true"):
            # one process looks: the others must not find another one
            found = [find_last_checkpoint(output_dir) if args.process_index == 0 else None]
            last = broadcast_object_list(found)[0]
            logger.info(f"Resuming from {last}" if last else f"No complete checkpoint in {output_dir}: starting anew")
            return last and str(last)
        if not (Path(args.resume_from_checkpoint) / "trainer_state.json").is_file():
            raise FileNotFoundError(
                f"--resume_from_checkpoint {args.resume_from_checkpoint} is no checkpoint (it has no "
                "trainer_state.json). Name a folder such as runs/mine/checkpoint-1000, or 'last' for the newest "
                "complete one in --output_dir."
            )
        if is_marked(args.resume_from_checkpoint) and (damage := find_damage(args.resume_from_checkpoint)):
            raise ValueError(f"--resume_from_checkpoint {args.resume_from_checkpoint} is damaged: {damage}.")
        return args.resume_from_checkpoint
    holds_run = bool(list_checkpoints(output_dir)) or (output_dir / "config.json").is_file()
    if args.do_train and holds_run and not args.overwrite_output_dir:
        raise FileExistsError(
            f"{output_dir} already holds a run. Continue it with --resume_from_checkpoint last, replace it with "
            "--overwrite_output_dir, or choose another --output_dir."
        )
    return None


def is_finished(trainer: Trainer, checkpoint: str) -> bool:
    """Whether a checkpoint lies at the last step. (The Trainer would do another step from there.)"""
    num_steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
    return TrainerState.load_from_json(Path(checkpoint) / "trainer_state.json").global_step >= num_steps
