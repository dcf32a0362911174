"""What a run writes about itself as it goes on: `run.json` when it starts (`finetuning.json` where a head is trained),
and in pretraining a line of `log.jsonl` for every report.

They lie in the run's folder whatever becomes of the run; `read_run` puts them together with what else is there. They
stay on this machine: nothing of them goes to the Hub.
"""

import json
import logging
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from ..corpus.atomic_writes import replacing_files
from ..corpus.files import without_query
from ..corpus.paths import RUN_FILE
from ..data_collator_tjepa import MaskingStrategy
from .health import in_float64


logger = logging.getLogger(__name__)

LOG_FILE, RESULTS_FILE, FINETUNING_FILE = "log.jsonl", "all_results.json", "finetuning.json"
PACKAGES = ("tjepa", "torch", "transformers", "datasets", "accelerate", "tokenizers", "numpy")
RESUMED_AS_GIVEN = ("seed", "data_seed", "views_per_document", "mask_recurring_targets")
RESUMED_AS_GIVEN += ("segment_length", "dataset_name", "train_file", "max_length", "min_tokens", "long_documents")
# and what decides which texts are held out: else some that were trained on would be
RESUMED_AS_GIVEN += ("dataset_config_name", "train_split_name", "validation_split_name", "text_column_name")
RESUMED_AS_GIVEN += ("validation_file", "validation_split_percentage", "max_train_samples", "max_eval_samples")
TOLD_BY_THE_CARD = ("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "start_lr")
TOLD_BY_THE_CARD += ("final_lr", "head_learning_rate", "weight_decay", "final_weight_decay")
TOLD_BY_THE_CARD += ("ema_momentum", "final_ema_momentum", "ema_schedule", "ema_anneal_ratio")
SECRETS = ("token", "hub_token")  # never written


# --- Writing ---------------------------------------------------------------------------------------------------------


class SettingsRecorder(TrainerCallback):
    """
    Writes what a run is when training starts.

    Args:
        facts: what the file says, see `describe_run`.
        file: its name in the folder of the run.
        outdated: files of a run that was there before; this one has not ended.
    """

    def __init__(self, facts: dict[str, Any], file: str, outdated: Sequence[str] = (RESULTS_FILE,)):
        self.facts, self.file, self.outdated = facts, file, outdated

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            for name in self.outdated:
                (Path(args.output_dir) / name).unlink(missing_ok=True)
            with suppressing_errors("The run's record"), replacing_files(args.output_dir) as folder:
                facts = {**self.facts, "max_steps": state.max_steps}
                (folder / self.file).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


class RunRecorder(SettingsRecorder):
    """Keeps `log.jsonl` equal to the log of the run, line by line, beside `run.json`."""

    def __init__(self, facts: dict[str, Any]):
        super().__init__(facts, RUN_FILE)

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            with suppressing_errors("The log"), replacing_files(args.output_dir) as folder:
                # of a resumed run the lines up to its checkpoint
                lines = [json.dumps(entry) + "\n" for entry in state.log_history]
                (folder / LOG_FILE).write_text("".join(lines), encoding="utf-8")
        super().on_train_begin(args, state, control, **kwargs)

    def on_log(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            with suppressing_errors("The log"), open(Path(args.output_dir) / LOG_FILE, "a", encoding="utf-8") as file:
                file.write(json.dumps(state.log_history[-1]) + "\n")


@contextmanager
def suppressing_errors(what: str) -> Iterator[None]:
    """Around what must not end a run, such as a picture of it: an error becomes a warning."""
    try:
        yield
    except Exception as error:
        logger.warning(f"{what} could not be written ({type(error).__name__}: {error}). Training does not need it.")


def describe_run(arguments: list, **facts) -> dict[str, Any]:
    """
    What `run.json` says of a run: the settings that differ from their defaults, the versions of what it runs with, and
    `facts`, which are those of `Run`.

    Args:
        arguments: the dataclasses of arguments.
    """
    settings = {}
    for group in arguments:
        for item in fields(group):
            value = getattr(group, item.name)
            if (
                item.name in SECRETS
                or value == item.default
                or value is None
                or (value is False and item.default is None)
            ):
                continue
            value = getattr(value, "value", value)  # of an enum
            if item.name.endswith("_file") and isinstance(value, str):
                value = without_query(value)  # which may hold a key
            if isinstance(value, (str, int, float, bool)):
                settings[item.name] = value
    versions = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # a clone that was not installed
            continue
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"settings": settings, "versions": versions, "device": device, **facts}


def find_changes(file: Path, facts: dict[str, Any], names: Sequence[str]) -> list[tuple[str, Any, Any]]:
    """
    What of a resumed run is not as it was: name, value before, value now.

    Args:
        file: the record of the run that the checkpoint is of.
        facts: of this start, as from `describe_run`; of pretraining with its `strategies`.
        names: settings to compare.
    """
    before, changes = read_json(file) or facts, []
    for name in names:
        old, new = (run["settings"].get(name) for run in (before, facts))
        if isinstance(old, str) and isinstance(new, str) and Path(old).resolve() == Path(new).resolve():
            continue  # one path in two spellings
        if old != new:
            changes.append((name, *("the default" if value is None else value for value in (old, new))))
    old, new = ([MaskingStrategy(**values).name for values in run.get("strategies", ())] for run in (before, facts))
    if old != new:
        changes.append(("masking strategies", ", ".join(old), ", ".join(new)))
    return changes


def log_changes(file: Path, facts: dict[str, Any], names: Sequence[str] = RESUMED_AS_GIVEN) -> None:
    """
    Says what of a resumed run's text, masks and random numbers is new. (Rates and their schedules say it themselves;
    another model is refused.) Arguments as of `find_changes`.
    """
    for name, old, new in find_changes(file, facts, names):
        logger.warning(f"{name} is {new} from here on; up to the checkpoint it was {old}.")


def check_unchanged(file: Path, facts: dict[str, Any], names: Sequence[str] = RESUMED_AS_GIVEN) -> None:
    """
    For a run that is finished: it makes no step, and its card would tell what it was not trained with. Arguments as of
    `find_changes`.

    Raises:
        ValueError: if a setting differs.
    """
    if changes := list_changes(file, facts, [*dict.fromkeys([*names, *TOLD_BY_THE_CARD])]):
        raise ValueError(
            f"The run in {file.parent} is finished, and other settings would change nothing of it: {changes}. Give "
            "those of before, more steps (--max_steps) to train on, or another --output_dir for a new run."
        )


def list_changes(file: Path, facts: dict[str, Any], names: Sequence[str]) -> str:
    """What `find_changes` says, in words."""
    return ", ".join(f"{name} was {old} and is {new}" for name, old, new in find_changes(file, facts, names))


def fingerprint(model: torch.nn.Module) -> float:
    """A number that tells whether two models have the same weights: the sum of their squares."""
    with torch.no_grad():
        return sum(in_float64(parameter).square().sum().item() for parameter in model.parameters())


# --- Reading ---------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What is known of a run from its folder; what a run did not write is empty or `None`."""

    folder: Path
    log: list[dict[str, float]]  # as the Trainer's `log_history`
    results: dict[str, Any]  # figures of the end; empty if it did not come to that
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    device: str | None = None
    max_steps: int | None = None
    seed: int = 0
    strategies: list[dict] = field(default_factory=list)
    documents: dict[str, dict] = field(default_factory=dict)  # split -> counts
    texts: list[str] = field(default_factory=list)  # held out
    labels: list[str] | None = None  # of these texts
    why_no_texts: str = ""
    max_length: int | None = None  # tokens of a text
    exported: str = "target"  # which encoder is the product
    started_from: str | None = None  # folder or name of the model; `None`: from scratch
    revision: str = "main"
    fingerprint_at_start: float | None = None  # of the target encoder
    probe_at_start: float | None = None  # accuracy on the texts of --probe_file

    @property
    def last_step(self) -> int:
        return max((entry.get("step", 0) for entry in self.log), default=0)

    @property
    def has_ended(self) -> bool:
        """Whether all steps were made."""
        return bool(self.results) or (self.max_steps is not None and self.last_step >= self.max_steps)

    @property
    def training(self) -> list[dict[str, float]]:
        """The lines about training."""
        return [entry for entry in self.log if "loss" in entry]

    @property
    def evaluations(self) -> list[dict[str, float]]:
        """The lines about evaluations, with the names of training's figures."""
        prefix = "eval_"
        return [
            {"step": entry["step"], **{k.removeprefix(prefix): v for k, v in entry.items() if k.startswith(prefix)}}
            for entry in self.log
            if "eval_target_std" in entry
        ]


def read_run(folder: str | Path) -> Run:
    """
    A run's folder, whether the run has come to its end or not.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it is not a run's.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}. Name that of a run, such as runs/quickstart.")
    facts = read_json(folder / RUN_FILE)
    if facts is None:
        raise ValueError(
            f"{folder} is not the folder of a pretraining run: it has no {RUN_FILE}, which a run writes when it "
            "starts. Name the --output_dir of `tjepa pretrain`."
        )
    results = earlier_results(folder)
    known = {item.name for item in fields(Run)}
    facts = {name: value for name, value in facts.items() if name in known}
    run = Run(folder, _read_log(folder / LOG_FILE), results, **facts)
    run.documents = results.get("documents") or run.documents  # those of a stream are known at the end
    return run


def earlier_results(folder: str | Path) -> dict[str, Any]:
    """The figures that a finished run left in its folder."""
    return read_json(Path(folder) / RESULTS_FILE) or {}


def _read_log(path: Path) -> list[dict]:
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:  # the last one of a run that was killed
            continue
    return lines


def read_json(path: Path) -> Any:
    """`None` where there is no such file, or half of one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
