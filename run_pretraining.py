"""Pretrains a T-JEPA text encoder.

    accelerate launch run_pretraining.py                                      # quickstart: no data, no network needed
    accelerate launch run_pretraining.py configs/tinystories.yaml --max_steps 100
    accelerate launch run_pretraining.py --train_file stories.parquet --tokenizer_name my-tokenizer --output_dir out

Arguments come from the dataclasses below, from a YAML file as the first argument, or from both (flags win). This file
only parses and connects; masks and packing are in data_collator_tjepa.py, the model in modeling_tjepa.py, moving
average, schedules and monitoring in trainer_tjepa.py, text to tokens in prepare_dataset.py.
"""

import copy
import ctypes
import json
import logging
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import torch
import transformers
import yaml
from accelerate.utils import broadcast_object_list
from huggingface_hub import (
    EvalResult,
    ModelCard,
    ModelCardData,
    create_branch,
    create_repo,
    run_as_future,
    upload_folder,
)
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import HubStrategy

from tjepa import TJEPAConfig, TJEPAForPreTraining
from tjepa.checkpointing_tjepa import (
    CheckpointCallback,
    explain_failed_save,
    find_damage,
    find_last_checkpoint,
    is_marked,
    list_checkpoints,
    replacing_files,
)
from tjepa.data_collator_tjepa import (
    DataCollatorForTJEPA,
    DocumentDataset,
    DocumentStream,
    MaskingStrategy,
    load_masking_strategies,
    strategies_to_dicts,
)
from tjepa.prepare_dataset import (
    QUICKSTART,
    DataArguments,
    DocumentCounts,
    StreamTokenizer,
    check_columns,
    load_documents,
    parse_arguments,
    tokenize_documents,
    without_query,
)
from tjepa.quickstart import report_what_was_learned
from tjepa.train_tokenizer import train_tokenizer
from tjepa.trainer_tjepa import (
    COLLAPSE_PATIENCE,
    EMACallback,
    HealthCallback,
    StopOnSignalCallback,
    TJEPATrainer,
    WeightDecayCallback,
    add_tjepa_callbacks,
    create_optimizer,
    get_lr_scheduler,
)


logger = logging.getLogger(__name__)

QUICKSTART_CONFIG = Path(__file__).parent / "configs" / "quickstart.yaml"
# What --push_to_hub publishes of a folder; the tokenizer's vocabulary files come to it by their own names.
PUBLISHED_FILES = [
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "README.md"),
    *("config.json", "configuration_tjepa.py", "modeling_tjepa.py", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
]


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Pretraining folder or Hub model to start from. Default: from scratch."}
    )
    config_name: str | None = field(
        default=None, metadata={"help": "Configuration to train from scratch, if not the default one."}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "Overrides of the configuration: hidden_size=128,num_hidden_layers=4"}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer on the Hub or in a folder. Default: that of the model or the data."}
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "sdpa, flex_attention, eager, ... Default: flex_attention on a GPU, sdpa elsewhere."},
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of model_name_or_path."})
    token: str | None = field(default=None, metadata={"help": "Access token for the Hub, if not logged in."})
    model_license: str = field(default="apache-2.0", metadata={"help": "Licence of the weights, for the model card."})


@dataclass
class MaskingArguments:
    masking_strategies: str = field(
        default="ul2", metadata={"help": "Preset (ul2), or a YAML or JSON file with a list of masking strategies."}
    )
    mask_recurring_targets: bool = field(
        default=False, metadata={"help": "Hide other occurrences of a target block's tokens from the context."}
    )
    views_per_document: int | None = field(
        default=None, metadata={"help": "Draw so many strategies for each document. Default: all of them."}
    )
    row_length: int | None = field(
        default=None,
        metadata={"help": "Tokens per packed row. Default: one row without padding; with flex_attention 4096."},
    )


@dataclass
class PretrainingArguments(TrainingArguments):
    """`TrainingArguments` with the reference's optimization as defaults, and what it has beyond them."""

    output_dir: str | None = field(default="runs/tjepa", metadata={"help": "Model, checkpoints and logs go here."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Go on although output_dir holds a run."})
    do_train: bool = field(default=True, metadata={"help": "Whether to train."})
    do_eval: bool = field(default=True, metadata={"help": "Whether to evaluate at the end."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Highest learning rate, after the warm-up."})
    start_lr: float = field(default=2e-4, metadata={"help": "Learning rate at the start of the warm-up."})
    final_lr: float = field(default=1e-6, metadata={"help": "Learning rate at the end of the cosine."})
    weight_decay: float = field(default=0.04, metadata={"help": "Weight decay of matrices at the start."})
    final_weight_decay: float = field(default=0.4, metadata={"help": "Weight decay of matrices at the end."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Beta2 of AdamW."})
    ema_momentum: float = field(default=0.996, metadata={"help": "Momentum of the target encoder at the start."})
    final_ema_momentum: float = field(default=1.0, metadata={"help": "Momentum of the target encoder at the end."})
    ema_schedule: str = field(default="linear", metadata={"help": "How the momentum gets there: linear or cosine."})
    ema_anneal_ratio: float = field(
        default=1.0, metadata={"help": "The momentum is at its end after this share of the steps, and stays there."}
    )
    ipe_scale: float = field(
        default=1.0, metadata={"help": "Schedules are made for this many times the number of training steps."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Folder of a checkpoint, or 'last': the newest complete one in output_dir, or the start where "
            "there is none. SIGTERM and SIGINT save a checkpoint and end the run with exit code 143 and 130."
        },
    )
    stop_on_collapse: bool = field(
        default=False,
        metadata={
            "help": "End training, with exit code 3, when collapse_patience evaluations in a row find a collapse."
        },
    )
    collapse_patience: int = field(
        default=COLLAPSE_PATIENCE,
        metadata={"help": "Collapsed evaluations in a row, after the warm-up."},
    )
    shuffle_buffer_size: int = field(
        default=10_000, metadata={"help": "With --streaming: documents that each worker shuffles at a time. 0: none."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay False: the collator needs all."})
    push_to_hub: bool = field(
        default=False,
        metadata={
            "help": "Publish the model folder as --hub_model_id at the end and, unless --hub_strategy is 'end', the "
            "model at every save. Checkpoints go there only with the strategies 'checkpoint' and 'all_checkpoints'."
        },
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "A non-finite loss stops the run instead."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "Every parameter is used."})

    def __post_init__(self):
        # without it accelerate takes the processes of a machine without GPU for so many lone ones
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        # The tensors of a batch differ in their first dimension: accelerate must neither split nor pad them.
        self.accelerator_config = {
            **(self.accelerator_config or {}),
            "split_batches": False,
            "dispatch_batches": False,
        }
        super().__post_init__()
        self.dataloader_pin_memory &= self.device.type != "cpu"  # nothing to pin for, and torch warns
        self.accelerator_config.non_blocking = self.dataloader_pin_memory
        if self.ipe_scale < 1.0:
            raise ValueError(f"ipe_scale must be at least 1, got {self.ipe_scale}: schedules can not end early.")


def main():
    model_args, data_args, masking_args, training_args = parse_arguments(
        (ModelArguments, DataArguments, MaskingArguments, PretrainingArguments), with_quickstart_default(sys.argv[1:])
    )
    set_up_logging(training_args)
    if training_args.device.type == "cpu":
        use_all_cores(training_args)
        keep_freed_memory()
    check_number_of_processes(training_args)
    if training_args.n_gpu > 1:
        raise RuntimeError(
            f"One process sees {training_args.n_gpu} GPUs. Start one process for each with accelerate launch "
            f"--num_processes {training_args.n_gpu}, or show it only one with CUDA_VISIBLE_DEVICES=0."
        )
    checkpoint = find_checkpoint(training_args)
    publisher = create_publisher(training_args, model_args.token)
    set_seed(training_args.seed)

    # Text -> tokens
    is_quickstart = data_args.dataset_name == QUICKSTART
    with training_args.main_process_first(desc="preparing the documents"):
        documents = load_documents(data_args, model_args.cache_dir, model_args.token)
        tokenizer = load_tokenizer(model_args, data_args, documents)
        datasets_by_split, counts = tokenize_splits(documents, tokenizer, data_args, training_args)

    # Model
    model = load_model(model_args, data_args, tokenizer, training_args)
    untrained_encoder = copy.deepcopy(model.target_encoder) if is_quickstart else None
    logger.info(f"{model.num_parameters(only_trainable=True):,} trainable parameters")

    # Views and batches
    strategies = load_masking_strategies(masking_args.masking_strategies)
    row_length = masking_args.row_length
    if row_length is None and model.config._attn_implementation == "flex_attention":
        row_length = max(4096, data_args.max_length)
    collator = DataCollatorForTJEPA(
        strategies,
        seed=training_args.data_seed if training_args.data_seed is not None else training_args.seed,
        row_length=row_length,
        mask_recurring_targets=masking_args.mask_recurring_targets,
        views_per_document=masking_args.views_per_document,
    )

    # Training
    trainer = create_trainer(model, training_args, collator, datasets_by_split, tokenizer)
    strategy_names = [strategy.name for strategy in strategies]
    health = add_tjepa_callbacks(
        trainer,
        strategy_names,
        EMACallback(
            training_args.ema_momentum,
            training_args.final_ema_momentum,
            training_args.ipe_scale,
            training_args.ema_schedule,
            training_args.ema_anneal_ratio,
        ),
        WeightDecayCallback(training_args.weight_decay, training_args.final_weight_decay, training_args.ipe_scale),
        HealthCallback(strategy_names, training_args.stop_on_collapse, training_args.collapse_patience),
    )
    metrics = {}
    if training_args.do_train:
        metrics.update(train(trainer, checkpoint, publisher))
    if training_args.do_eval and trainer.eval_dataset is not None:
        metrics.update(trainer.evaluate())
        metrics.update({k: v for k, v in trainer.state.log_history[-1].items() if k.startswith("eval_")})
    metrics["train_steps"] = trainer.state.global_step
    metrics["dropped_in_batches"] = collator.num_dropped_documents
    metrics["nonfinite_gradients"] = health.num_nonfinite_gradients
    if isinstance(counts["train"], StreamTokenizer):
        counts["train"] = counts["train"].counts(
            lambda count: trainer.accelerator.reduce(count.to(training_args.device), "sum")
        )
        logger.info(f"train documents, as far as they were read since this start:\n{counts['train']}")
    metrics["documents"] = {split: count.to_dict() for split, count in counts.items() if not isinstance(count, str)}

    # The model folder
    model = gather_model(trainer)
    if trainer.is_world_process_zero():
        if is_quickstart:
            metrics.update(report_what_was_learned(model.target_encoder, untrained_encoder, tokenizer))
        save_model_folder(model, tokenizer, strategies, metrics, training_args)
        write_model_card(model, model_args, data_args, training_args, strategies, counts, metrics, health.verdict)
        logger.info(f"The model folder is {training_args.output_dir}")
        if publisher is not None:
            publisher.publish_model_folder(training_args.output_dir, tokenizer)
    if health.stopped_run:
        sys.exit(3)


def with_quickstart_default(arguments: list[str]) -> list[str]:
    """Without a YAML file and without data the run is the quickstart, whatever other flags are given."""
    has_yaml = bool(arguments) and arguments[0].endswith((".yaml", ".yml"))
    names_data = any(argument.split("=")[0] in ("--dataset_name", "--train_file") for argument in arguments)
    asks_for_help = any(argument in ("-h", "--help") for argument in arguments)
    return arguments if has_yaml or names_data or asks_for_help else [str(QUICKSTART_CONFIG), *arguments]


def set_up_logging(args: TrainingArguments) -> None:
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    level = logging.INFO if args.process_index == 0 else logging.WARNING
    logger.setLevel(level)
    logging.getLogger("tjepa").setLevel(level)  # the modules; `logger` may be `__main__`
    transformers.utils.logging.set_verbosity(logging.WARNING)
    if args.process_index != 0:
        datasets.disable_progress_bars()


def check_number_of_processes(args: TrainingArguments) -> None:
    """
    Raises:
        RuntimeError: if processes that were started together do not train together, or if `accelerate launch` was
            asked for several processes and started one.
    """
    num_started = int(os.environ.get("WORLD_SIZE", 1))
    if num_started != args.world_size:
        raise RuntimeError(
            f"The launcher started {num_started} processes, but this one trains in a group of {args.world_size}. "
            "Start them with accelerate launch --config_file and a file of configs/accelerate, or with torchrun; on "
            "the CPUs of a machine with GPUs pass --use_cpu, too."
        )
    # accelerate launch sets MASTER_ADDR for several processes only; a launcher that starts them sets WORLD_SIZE, too
    launched_by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ
    if launched_by_accelerate and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise RuntimeError(
            "accelerate launch was asked for several processes and started one: with distributed_type MULTI_CPU it "
            "leaves starting them to mpirun, and --cpu or distributed_type NO never start more than one. Use "
            "configs/accelerate/cpu.yaml, or torchrun --nproc_per_node. (If one process is meant: --num_processes 1, "
            "and no MASTER_ADDR in the environment.)"
        )
    if args.world_size > 1:
        logger.info(f"{args.world_size} processes")


def use_all_cores(args: TrainingArguments) -> None:
    """`accelerate launch` gives a CPU process one thread unless told otherwise; a single process may have them all."""
    launched_by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ
    if args.world_size == 1 and launched_by_accelerate:
        if os.environ.get("OMP_NUM_THREADS") == "1":
            torch.set_num_threads(os.cpu_count())


def keep_freed_memory() -> None:
    """
    Lets glibc keep what is freed. It hands large blocks back to the kernel and asks for them again, and a training
    step on the CPU, which makes and drops gigabytes of activations, spends up to a quarter of its time in page faults.
    """
    if platform.libc_ver()[0] == "glibc":
        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, -1)


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


def train(trainer: Trainer, checkpoint: str | None, publisher: "HubPublisher | None") -> dict[str, float]:
    """
    Trains to the end, from the start or from a checkpoint, and returns the Trainer's metrics.

    Raises:
        SystemExit: with 128 + the signal's number after SIGTERM (143) or SIGINT (130), when a checkpoint was saved.
        OSError: if a checkpoint could not be written.
    """
    if checkpoint is not None and is_finished(trainer, checkpoint):
        logger.info(f"{checkpoint} is the end of training already")
        trainer._load_from_checkpoint(checkpoint)
        trainer.state = TrainerState.load_from_json(Path(checkpoint) / "trainer_state.json")
        return {}
    stop_on_signal = StopOnSignalCallback()
    trainer.callback_handler.callbacks.insert(0, stop_on_signal)  # before those that look at control.should_save
    trainer.add_callback(CheckpointCallback())
    if publisher is not None:  # what it uploads must be complete by then
        trainer.add_callback(publisher)
    with explain_failed_save(trainer):
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    if stop_on_signal.signal_number is not None:
        logger.warning(
            f"Stopped by {signal.Signals(stop_on_signal.signal_number).name} after step {trainer.state.global_step}, "
            "with a checkpoint. Start again with --resume_from_checkpoint last."
        )
        sys.exit(128 + stop_on_signal.signal_number)
    trainer.save_state()
    return metrics


def is_finished(trainer: Trainer, checkpoint: str) -> bool:
    """Whether a checkpoint lies at the last step. (The Trainer would do another step from there.)"""
    num_steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
    return TrainerState.load_from_json(Path(checkpoint) / "trainer_state.json").global_step >= num_steps


# ---- the Hub ----


class HubPublisher(TrainerCallback):
    """
    `--push_to_hub`: the model folder at the end of training and, by `--hub_strategy`, at every save before it.

    The Trainer's own push is not used: it uploads whatever lies in the run folder, TensorBoard files and pickled
    arguments among it. Here only `PUBLISHED_FILES` go out, and with the strategies `checkpoint` and `all_checkpoints`,
    as their names say, the whole checkpoint folder beside them (`last-checkpoint/` or `checkpoint-N/`).

    Args:
        args (`PretrainingArguments`): the `hub_` arguments and `output_dir`, whose name is the default repository.
        token (`str`, *optional*): a token with write permission; default: the one that is logged in.

    Raises:
        PermissionError: if the Hub does not let this token create or use the repository.
    """

    def __init__(self, args: PretrainingArguments, token: str | None):
        self.strategy = HubStrategy(args.hub_strategy)
        self.hub = {"token": token, "revision": args.hub_revision}
        repo_id = args.hub_model_id or Path(args.output_dir).resolve().name
        try:
            self.repo_id = create_repo(repo_id, token=token, private=args.hub_private_repo, exist_ok=True).repo_id
            if args.hub_revision is not None:
                create_branch(self.repo_id, branch=args.hub_revision, token=token, exist_ok=True)
        except HfHubHTTPError as error:
            raise PermissionError(
                f"The Hub does not give access to {repo_id}: {error}\nPass a token that may write there as "
                "--hub_token, or log in with `hf auth login`. Nothing was trained yet."
            ) from error
        self.jobs = []

    def upload(self, folder: str, message: str, allow_patterns: list[str] | None, path_in_repo: str | None = None):
        upload_folder(
            repo_id=self.repo_id,
            folder_path=folder,
            path_in_repo=path_in_repo,
            commit_message=message,
            allow_patterns=allow_patterns,
            **self.hub,
        )

    def on_train_begin(self, args, state, control, **kwargs):
        disable_progress_bars()  # tqdm breaks when bars come and go in the background while the Trainer's is written

    def on_save(self, args, state, control, processing_class: PreTrainedTokenizerBase = None, **kwargs):
        """Uploads in the background; while one upload runs the next is left out, unless `hub_always_push`."""
        if self.strategy == HubStrategy.END or not state.is_world_process_zero:
            return
        if self.jobs and not self.jobs[-1].done() and not args.hub_always_push:
            logger.info(f"Step {state.global_step} is not pushed: the push before it still runs.")
            return
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        copy = tempfile.TemporaryDirectory()  # the Trainer may delete the checkpoint while it is read
        shutil.copytree(checkpoint, copy.name, dirs_exist_ok=True)
        message = f"Training in progress, step {state.global_step}"
        folder_on_hub = {
            HubStrategy.CHECKPOINT: "last-checkpoint",
            HubStrategy.ALL_CHECKPOINTS: checkpoint.name,
        }.get(self.strategy)
        self.jobs.append(run_as_future(self._upload_checkpoint, copy, message, processing_class, folder_on_hub))

    def _upload_checkpoint(self, copy: tempfile.TemporaryDirectory, message: str, tokenizer, folder_on_hub) -> None:
        try:
            with copy as folder:
                self.upload(folder, message, published_files(tokenizer))
                if folder_on_hub is not None:
                    self.upload(folder, f"{message}, checkpoint", allow_patterns=None, path_in_repo=folder_on_hub)
        except Exception as error:  # training goes on; the push at its end counts
            logger.warning(f"{message}: the push to {self.repo_id} failed. {error}")

    def publish_model_folder(self, folder: str, tokenizer: PreTrainedTokenizerBase) -> None:
        """
        Raises:
            RuntimeError: if the upload failed; the folder is whole all the same.
        """
        for job in self.jobs:
            job.result()
        enable_progress_bars()
        try:
            self.upload(folder, "End of training", published_files(tokenizer))
        except Exception as error:
            raise RuntimeError(
                f"The push to {self.repo_id} failed, but nothing is lost: {folder} holds the whole model. Push it "
                f"later with `hf upload {self.repo_id} {folder}` and --include for each of its model files."
            ) from error
        logger.info(f"Pushed to {self.repo_id}")


def published_files(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [*PUBLISHED_FILES, *tokenizer.vocab_files_names.values()]


def create_publisher(args: PretrainingArguments, token: str | None) -> HubPublisher | None:
    """
    The publisher that `--push_to_hub` asks for, on the main process. Afterwards the arguments hold no token, for they
    are pickled into every checkpoint, and the Trainer does not push by itself.
    """
    token, args.hub_token = args.hub_token or token, None
    publisher = None
    if args.push_to_hub and args.process_index == 0:
        publisher = HubPublisher(args, token)
        args.hub_model_id = publisher.repo_id  # with the user's name, if it had none
    args.push_to_hub = False
    return publisher


def load_tokenizer(
    model_args: ModelArguments, data_args: DataArguments, documents: datasets.DatasetDict
) -> PreTrainedTokenizerBase:
    """The tokenizer asked for, else the model's, else the prepared dataset's; the quickstart trains one."""
    name = model_args.tokenizer_name or model_args.model_name_or_path
    if name is None and data_args.dataset_name is not None:
        if data_args.dataset_name == QUICKSTART:
            overrides = parse_config_overrides(model_args.config_overrides)
            return train_tokenizer(documents["train"]["text"], overrides["vocab_size"], data_args.max_length)
        if (Path(data_args.dataset_name) / "tokenizer_config.json").is_file():
            name = data_args.dataset_name
    if name is None:
        raise ValueError(
            "Which tokenizer? Pass --tokenizer_name (a name on the Hub or a folder), or make one of your own with "
            "train_tokenizer.py."
        )
    return AutoTokenizer.from_pretrained(
        name, cache_dir=model_args.cache_dir, token=model_args.token, revision=model_args.model_revision
    )


def tokenize_splits(
    documents: datasets.DatasetDict | datasets.IterableDatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    args: DataArguments,
    training_args: PretrainingArguments,
) -> tuple[dict[str, torch.utils.data.Dataset], dict[str, DocumentCounts | StreamTokenizer | str]]:
    """Training and evaluation documents as token ids, wrapped for the collator, and what was kept and dropped."""
    splits, counts = {}, {}
    for split, dataset in documents.items():
        if isinstance(dataset, datasets.IterableDataset) and split == "train":
            splits[split], counts[split] = make_stream(dataset, tokenizer, args, training_args)
            continue
        if "input_ids" in (dataset.column_names or []):
            counts[split] = f"  {len(dataset):,} rows, tokenized before (counts in preparation.json of the dataset)"
        else:
            dataset, counts[split] = tokenize_documents(dataset, tokenizer, args, desc=split)
            logger.info(f"{split} documents:\n{counts[split]}")
        splits[split] = DocumentDataset(dataset)
    return splits, counts


def make_stream(
    documents: datasets.IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    args: DataArguments,
    training_args: PretrainingArguments,
) -> tuple[DocumentStream, StreamTokenizer]:
    """Endless training documents, of which this process and its workers read their share, and what counts them."""
    check_columns(documents, args.text_column_name, "train")
    stream_tokenizer = StreamTokenizer(tokenizer, args)
    stream = DocumentStream(
        documents,
        transform=stream_tokenizer,
        shuffle_buffer_size=training_args.shuffle_buffer_size,
        seed=training_args.data_seed if training_args.data_seed is not None else training_args.seed,
        rank=training_args.process_index,
        world_size=training_args.world_size,
        repeat=True,
    )
    num_shares = training_args.world_size * max(1, training_args.dataloader_num_workers)
    if documents.num_shards < num_shares:
        logger.warning(
            f"The stream has {documents.num_shards} files for {num_shares} readers (processes times workers): each "
            f"reads all of them, and tokenizes one document in {num_shares}. {num_shares} files or more are faster."
        )
    return stream, stream_tokenizer


def parse_config_overrides(overrides: str | None) -> dict:
    """`"hidden_size=128,use_bias=false"` as a mapping with typed values."""
    if not overrides:
        return {}
    pairs = [pair.split("=", 1) for pair in overrides.split(",")]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(
            f"--config_overrides is a list such as hidden_size=128,num_hidden_layers=4, got {overrides!r}."
        )
    values = {name.strip(): yaml.safe_load(value) for name, value in pairs}
    if unknown := sorted(set(values) - set(TJEPAConfig().to_dict())):
        raise ValueError(f"--config_overrides: TJEPAConfig has no {unknown}; see configuration_tjepa.py.")
    return values


def load_model(
    model_args: ModelArguments,
    data_args: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    training_args: TrainingArguments,
) -> TJEPAForPreTraining:
    overrides = parse_config_overrides(model_args.config_overrides)
    attn_implementation = model_args.attn_implementation or (
        "flex_attention" if training_args.device.type == "cuda" else "sdpa"
    )
    hub = {"cache_dir": model_args.cache_dir, "token": model_args.token, "revision": model_args.model_revision}
    if model_args.model_name_or_path is not None:
        model = TJEPAForPreTraining.from_pretrained(
            model_args.model_name_or_path, attn_implementation=attn_implementation, **hub, **overrides
        )
    else:
        given = {"vocab_size": len(tokenizer), "max_position_embeddings": data_args.max_length}
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            given[name] = getattr(tokenizer, name)
        if model_args.config_name is not None:
            config = TJEPAConfig.from_pretrained(model_args.config_name, **hub, **overrides)
        else:
            config = TJEPAConfig(**{**given, **overrides})
        config._attn_implementation = attn_implementation
        model = TJEPAForPreTraining(config)
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens, the model's embedding {model.config.vocab_size}: set "
            f"--config_overrides vocab_size={len(tokenizer)}, or use the tokenizer that belongs to the model."
        )
    return model


def create_trainer(
    model: TJEPAForPreTraining,
    args: PretrainingArguments,
    collator: DataCollatorForTJEPA,
    splits: dict[str, torch.utils.data.Dataset],
    tokenizer: PreTrainedTokenizerBase,
) -> Trainer:
    """A Trainer with T-JEPA's optimizer and learning-rate schedule."""
    if args.eval_strategy != "no" and "validation" not in splits:
        raise ValueError(
            f"eval_strategy is {args.eval_strategy}, but there is no validation split: pass --validation_file or a "
            "--validation_split_percentage above 0."
        )
    trainer = TJEPATrainer(
        model=model,
        args=args,
        data_collator=collator,
        train_dataset=splits["train"] if args.do_train else None,
        eval_dataset=splits.get("validation"),
        processing_class=tokenizer,
    )
    if args.do_train:
        # batches of all processes together: only their number matters here
        batches = torch.utils.data.DataLoader(
            splits["train"], args.train_batch_size * args.world_size, drop_last=args.dataloader_drop_last
        )
        num_training_steps = trainer.set_initial_training_values(args, batches)[-1]
        trainer.optimizer = create_optimizer(model, args)
        trainer.lr_scheduler = get_lr_scheduler(
            trainer.optimizer,
            num_training_steps,
            args.get_warmup_steps(num_training_steps),
            start_lr=args.start_lr,
            final_lr=args.final_lr,
            ipe_scale=args.ipe_scale,
        )
    return trainer


def gather_model(trainer: Trainer) -> TJEPAForPreTraining:
    """The trained model in one piece. Every process takes part; where it is sharded, only the first one gets it."""
    if not trainer.is_fsdp_enabled:
        return trainer.model
    weights = trainer.accelerator.get_state_dict(trainer.model)
    model = TJEPAForPreTraining(trainer.model.config)
    if trainer.is_world_process_zero():
        model.load_state_dict(weights)
    return model


def save_model_folder(
    model: TJEPAForPreTraining,
    tokenizer: PreTrainedTokenizerBase,
    strategies: list[MaskingStrategy],
    metrics: dict[str, float],
    args: PretrainingArguments,
) -> None:
    """Weights, config, code files, tokenizer, and beside them the masking strategies and the final figures."""
    with replacing_files(args.output_dir) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for name, content in {
            "masking_strategies.json": strategies_to_dicts(strategies),
            "all_results.json": metrics,
        }.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_model_card(
    model: TJEPAForPreTraining,
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: PretrainingArguments,
    strategies: list[MaskingStrategy],
    counts: dict[str, DocumentCounts | str],
    metrics: dict[str, float],
    verdict: str | None,
) -> None:
    """README.md of the model folder: what it was trained on, how, and its final figures."""
    output_dir = Path(training_args.output_dir)
    repo_id = training_args.hub_model_id or "PATH_OR_REPO_ID"
    name = Path(training_args.hub_model_id or output_dir.resolve()).name
    on_hub = data_args.dataset_name not in (None, QUICKSTART) and not Path(data_args.dataset_name).exists()
    # of a path or URL only the file name: where it lay is nobody's business, and a URL may hold a key
    source = (
        data_args.dataset_name if on_hub else Path(without_query(data_args.dataset_name or data_args.train_file)).name
    )
    figures = {k: v for k, v in metrics.items() if k.startswith(("eval_", "probe_"))}
    card_data = ModelCardData(
        library_name="transformers",
        license=model_args.model_license,
        tags=["t-jepa", "feature-extraction", "self-supervised", "text-encoder"],
        datasets=[source] if on_hub else None,
        pipeline_tag="feature-extraction",
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="feature-extraction",
                dataset_type=re.sub(r"[^\w./-]+", "-", source),  # the Hub takes nothing else, "*" in globs included
                dataset_name=source,
                metric_type=metric,
                metric_value=round(value, 5),
            )
            for metric, value in figures.items()
            if metric not in ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
        ]
        or None,
    )
    health = verdict or "no collapse was seen in the last evaluation" if figures else "not evaluated"
    trained_on = "\n\n".join(f"{split}:\n\n```\n{count}\n```" for split, count in counts.items())
    figure_rows = "\n".join(f"| {metric} | {value:.4f} |" for metric, value in sorted(figures.items()))
    training = {
        "optimizer steps": metrics["train_steps"],
        "documents per step and process": training_args.train_batch_size * training_args.gradient_accumulation_steps,
        "processes": training_args.world_size,
        "learning rate": f"{training_args.start_lr} -> {training_args.learning_rate} -> {training_args.final_lr}",
        "weight decay": f"{training_args.weight_decay} -> {training_args.final_weight_decay}",
        "target encoder momentum": f"{training_args.ema_momentum} -> {training_args.final_ema_momentum} "
        f"({training_args.ema_schedule}, over {training_args.ema_anneal_ratio:.0%} of the steps)",
        "loss": model.config.loss_type,
        "target layers": f"{model.config.target_layers} ({model.config.target_normalization} normalisation)",
        "variance/covariance weight": model.config.variance_covariance_weight,
        "SIGReg weight": model.config.sigreg_weight,
        "token prediction weight": model.config.token_prediction_weight,
        "denoising weight": f"{model.config.denoising_weight} (ratio {model.config.denoising_ratio})",
        "predictor": model.config.predictor_type,
        "masking strategies": ", ".join(strategy.name for strategy in strategies),
        "maximum length (tokens)": data_args.max_length,
        "seed": training_args.seed,
    }
    training_rows = "\n".join(f"| {setting} | {value} |" for setting, value in training.items())
    card = ModelCard(
        f"""---
{card_data.to_yaml()}
---

# {name}

A text encoder pretrained with T-JEPA: it learned to predict the representations of hidden text rather than the hidden
words. {model.config.num_hidden_layers} layers, {model.config.hidden_size} wide, vocabulary {model.config.vocab_size}.

```python
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo_id}", trust_remote_code=True)
model = AutoModel.from_pretrained("{repo_id}", trust_remote_code=True)  # the target encoder
```

## Trained on

{source}

{trained_on}

## How

| | |
| --- | --- |
{training_rows}

The masking strategies, as `--masking_strategies` takes them:

```yaml
{yaml.safe_dump(strategies_to_dicts(strategies), sort_keys=False).strip()}
```

## Final figures

Health: {health}.

| on the validation documents | |
| --- | --- |
{figure_rows}
"""
    )
    card.save(output_dir / "README.md")


if __name__ == "__main__":
    main()
