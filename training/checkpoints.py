"""Which checkpoint is complete: a mark that is written last, the newest marked checkpoint, and rotation.

The Trainer writes a checkpoint file by file. A run that is killed meanwhile, or a disk that fills up, leaves a folder
that looks like a checkpoint and cannot be resumed. So a complete checkpoint gets a mark, `checkpoint_complete.json`,
with the size of every file in it, written when everything else has reached the disk; `--resume_from_checkpoint last`
takes nothing else, and older checkpoints are only deleted when a newer one has its mark. Weights without an optimizer
(`--save_only_model`) get another mark, `weights_complete.json`: they count for rotation, but cannot be resumed.
"""

import json
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from ..corpus.atomic_writes import UNFINISHED, check_writable, files_in, flush, replacing_files
from .health import collapsed_evaluations


logger = logging.getLogger(__name__)


MARK = "checkpoint_complete.json"
WEIGHTS_MARK = "weights_complete.json"
OPTIMIZER_FILES = ("optimizer", "global_step")  # how their names begin: of torch and FSDP, and of DeepSpeed
WEIGHTS_ONLY = "it holds weights only (--save_only_model), without the optimizer that training needs to go on"


# --- Complete or torn ------------------------------------------------------------------------------------------------


def list_checkpoints(output_dir: str | Path) -> dict[int, Path]:
    """Optimizer step -> checkpoint folder, complete or not, oldest first."""
    folders = {}
    for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if path.is_dir() and (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)):
            folders[int(match[1])] = path
    return dict(sorted(folders.items()))


def is_marked(checkpoint: str | Path) -> bool:
    return any((Path(checkpoint) / mark).is_file() for mark in (MARK, WEIGHTS_MARK))


def remove_mark(checkpoint: Path) -> None:
    """Before a checkpoint is overwritten or deleted: half a checkpoint must not look whole."""
    for mark in (MARK, WEIGHTS_MARK):
        (checkpoint / mark).unlink(missing_ok=True)


def has_weights_only(checkpoint: str | Path) -> bool:
    """Whether a checkpoint has been saved as a whole, but without the optimizer that training needs to go on."""
    return is_marked(checkpoint) and not has_optimizer(checkpoint)


def has_optimizer(checkpoint: str | Path) -> bool:
    return any(path.name.startswith(OPTIMIZER_FILES) for path in Path(checkpoint).iterdir())


def find_damage(checkpoint: str | Path) -> str | None:
    """Why a checkpoint is not complete, so that it cannot be resumed, in plain words; `None` if it is."""
    checkpoint = Path(checkpoint)
    try:
        sizes = json.loads((checkpoint / MARK).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        if has_weights_only(checkpoint):
            return WEIGHTS_ONLY
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
    return WEIGHTS_ONLY if has_weights_only(checkpoint) else None


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
    remove_mark(checkpoint)
    with replacing_files(checkpoint) as folder:
        files = [path for path in files_in(checkpoint) if UNFINISHED not in path.relative_to(checkpoint).parts[0]]
        for path in files:
            flush(path)
        sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}
        mark = MARK if any(name.startswith(OPTIMIZER_FILES) for name in sizes) else WEIGHTS_MARK
        (folder / mark).write_text(json.dumps({"files": sizes}, indent=2) + "\n", encoding="utf-8")
    flush(checkpoint.parent)


class CheckpointCallback(TrainerCallback):
    """
    Marks every checkpoint of a Trainer, of whatever model, when it is complete, and then deletes those beyond
    `save_total_limit`. (The Trainer would delete them before other processes have finished writing, and would count
    torn ones.)

    Kept whatever the limit: the best checkpoint, the newest that can be resumed, the newest from before the decay of a
    schedule that has a stable part (where one is saved in any case), and while the latest evaluations of a T-JEPA run
    found a collapse, the newest checkpoint from before it. Must come after the Trainer's own callbacks, which decide
    whether to save.
    """

    def __init__(self):
        self.save_total_limit = None
        self.last_step_before_decay = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if args.save_total_limit is not None:  # `None` at a second beginning (--auto_find_batch_size)
            self.save_total_limit, args.save_total_limit = args.save_total_limit, None
        if state.is_world_process_zero:
            later = [path for step, path in list_checkpoints(args.output_dir).items() if step > state.global_step]
            marked = [path for path in later if is_marked(path)]
            for path in marked:
                remove_mark(path)
            if marked:
                logger.warning(
                    f"This run starts at step {state.global_step}, so the later {', '.join(p.name for p in marked)} "
                    f"in {args.output_dir} will be overwritten, and 'last' no longer means them."
                )
            self._rotate(args, state)  # a lower limit than before makes room for the next one

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        scheduler = kwargs.get("lr_scheduler")
        self.last_step_before_decay = getattr(scheduler, "last_step_before_decay", None)
        if state.global_step == self.last_step_before_decay and args.save_strategy != SaveStrategy.NO:
            control.should_save = True
        self._unmark(args, state, control)

    def _unmark(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        may_save = control.should_evaluate and args.save_strategy == SaveStrategy.BEST
        if (control.should_save or may_save) and state.is_world_process_zero:
            # a checkpoint that is being overwritten is not complete, whatever it was before
            remove_mark(checkpoint_folder(args, state))

    on_epoch_end = on_evaluate = _unmark

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        PartialState().wait_for_everyone()  # until every process has written its part
        if state.is_world_process_zero:
            mark_complete(checkpoint_folder(args, state))
            self._rotate(args, state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        args.save_total_limit, self.save_total_limit = self.save_total_limit, None

    def _rotate(self, args: TrainingArguments, state: TrainerState) -> None:
        if not self.save_total_limit or self.save_total_limit < 0:
            return
        checkpoints = {s: p for s, p in list_checkpoints(args.output_dir).items() if s <= state.global_step}
        marked = [step for step, path in checkpoints.items() if is_marked(path)]
        kept = set(marked[-self.save_total_limit :])
        # a plain Trainer's has no mark: the one that is resumed stays until there is a newer one
        kept |= {step for step in checkpoints if step > max(marked, default=-1)}
        kept |= set([step for step in marked if not has_weights_only(checkpoints[step])][-1:])
        if state.best_model_checkpoint is not None:
            # by its name: the folder of the run may have been another one before a resume
            best = Path(state.best_model_checkpoint).name
            kept |= {step for step, path in checkpoints.items() if path.name == best}
        if self.last_step_before_decay is not None:
            kept |= set([step for step in marked if step <= self.last_step_before_decay][-1:])
        if collapsed := collapsed_evaluations(state):
            kept |= set([step for step in marked if step < collapsed[0]][-1:])
        for step, path in checkpoints.items():
            if step not in kept:
                remove_mark(path)
                shutil.rmtree(path, ignore_errors=True)


def checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Where the checkpoint of the present step lies, or would."""
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


# --- Errors while saving, and the start ------------------------------------------------------------------------------


@contextmanager
def explain_failed_save(trainer: Trainer, folder: str | None = None) -> Iterator[None]:
    """
    Around the writing of a model's `folder`, or around training: an error while it is written, or one that left a
    checkpoint unfinished, is raised again in plain words.

    Raises:
        OSError: what could not be written, how much space is free, and which checkpoints are intact.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch, safetensors and Python each raise their own
        output_dir, unfinished = trainer.args.output_dir, checkpoint_folder(trainer.args, trainer.state)
        if folder is None and (not unfinished.is_dir() or is_marked(unfinished)):
            raise
        free = shutil.disk_usage(output_dir).free
        intact = [path.name for path in list_checkpoints(output_dir).values() if find_damage(path) is None]
        raise OSError(
            f"{folder or unfinished} could not be written ({type(error).__name__}: {error}). {free / 1e6:,.0f} MB are "
            f"free on that disk. Intact: {', '.join(intact) or 'no checkpoint'}. Make room (a lower "
            "--save_total_limit, another --output_dir) and start again with --resume_from_checkpoint last."
        ) from error


def find_checkpoint(args: TrainingArguments) -> str | None:
    """
    The checkpoint to resume from: `--resume_from_checkpoint last` takes the newest complete one in `output_dir`, or
    starts anew where there is none.

    Args:
        args (`TrainingArguments`): of any Trainer; one that has `overwrite_output_dir` may start anew over a run.

    Raises:
        FileExistsError: if `output_dir` holds another run or model, and overwriting was not asked for.
        PermissionError: if `output_dir` cannot be written.
        FileNotFoundError: if what was asked for is not a checkpoint.
        ValueError: if it cannot be resumed: it was complete once and is not any more, or holds weights only.
    """
    output_dir, wanted = Path(args.output_dir), args.resume_from_checkpoint
    check_writable(output_dir)
    may_replace = not args.do_train or getattr(args, "overwrite_output_dir", False)
    if wanted is not None and wanted.lower() in ("last", "true"):
        # one process looks: the others must not find another one
        found = [find_last_checkpoint(output_dir) if args.process_index == 0 else None]
        last = broadcast_object_list(found)[0]
        if last is not None:
            logger.info(f"Resuming from {last}")
            return str(last)
        if weights := [path for path in list_checkpoints(output_dir).values() if has_weights_only(path)]:
            raise ValueError(
                f"--resume_from_checkpoint {wanted}: {weights[-1]} cannot be resumed, {WEIGHTS_ONLY}. Start a new run "
                f"from its weights with --model_name_or_path {weights[-1]} and another --output_dir, or replace it "
                "with --overwrite_output_dir and without --resume_from_checkpoint."
            )
        if not may_replace and (output_dir / "config.json").is_file():
            raise FileExistsError(
                f"--resume_from_checkpoint {wanted}: {output_dir} holds a model, but no complete checkpoint to go on "
                "from. Choose another --output_dir, or replace the model with --overwrite_output_dir."
            )
        logger.info(f"No complete checkpoint in {output_dir}: starting anew")
        return None
    if wanted is not None:
        if list_checkpoints(wanted):
            raise ValueError(
                f"--resume_from_checkpoint {wanted} is the folder of a run: name one of its checkpoints, or go on "
                f"with --output_dir {wanted} --resume_from_checkpoint last."
            )
        if not (Path(wanted) / "trainer_state.json").is_file():
            raise FileNotFoundError(
                f"--resume_from_checkpoint {wanted} is not a checkpoint (it has no trainer_state.json). Name a folder "
                "such as runs/mine/checkpoint-1000, or 'last' for the newest complete one in --output_dir."
            )
        damage = find_damage(wanted) if is_marked(wanted) else None
        if damage or not has_optimizer(wanted):
            raise ValueError(
                f"--resume_from_checkpoint {wanted} cannot be resumed: {damage or WEIGHTS_ONLY}. Name another one, "
                f"or start a new run from its weights with --model_name_or_path {wanted}."
            )
        if Path(wanted).resolve().parent == output_dir.resolve():
            return wanted
    holds_run = bool(list_checkpoints(output_dir)) or (output_dir / "config.json").is_file()
    if holds_run and not may_replace:
        raise FileExistsError(
            f"{output_dir} already holds a run. Continue it with --resume_from_checkpoint last, replace it with "
            "--overwrite_output_dir, or choose another --output_dir."
        )
    return wanted


def count_steps(trainer: Trainer) -> int:
    """Optimizer steps of a whole run, by the arguments and the data of this start."""
    return trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]


def is_finished(checkpoint: str, num_steps: int) -> bool:
    """Whether a checkpoint lies at the last step. (The Trainer would do another step from there.)"""
    return TrainerState.load_from_json(Path(checkpoint) / "trainer_state.json").global_step >= num_steps
