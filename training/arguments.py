"""Every argument of a pretraining run that is not about its model, data or masks."""

import os
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from transformers import TrainingArguments
from transformers.hf_argparser import HfArg

from .ema import EMACallback
from .flags import check_flags, check_packages, check_precision, check_what_processes_share
from .health import COLLAPSE_PATIENCE
from .schedules import EXTENSIONS, LR_SCHEDULES


# For an encoder that comes with trained weights; how they were found is in docs/any-encoder.md
TRAINED_ENCODER_LR = 1e-5
HEAD_RATE_MULTIPLE = 100.0
HEADS_FIRST_RATIO = 0.1
# what launchers say how many processes there are by
LAUNCHED = {"WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"}
RATES = ("learning_rate", "head_learning_rate", "start_lr", "final_lr", "heads_first_ratio", "ema_momentum")
# 1 - MOVES / steps, rising to 1, is the momentum with which exp(-MOVES / 2) of a target encoder is what it started as,
# in a run of any length. With 10 that is nothing. Beside a trained encoder it is a third, with 2: an average of two
# encoders keeps more of what the first one knew than the second one does.
MOVES = 10.0
TRAINED_ENCODER_MOVES = 2.0


@dataclass
class RunArguments(TrainingArguments):
    """What runs of pretraining and of fine-tuning have in common beyond `TrainingArguments`."""

    KIND: ClassVar[Literal["pretraining", "finetuning"]]  # the column of the table in flags.py

    overwrite_output_dir: bool = HfArg(default=False, help="Go on although output_dir holds a run.")
    resume_from_checkpoint: str | None = HfArg(
        default=None,
        help="Folder of a checkpoint, or 'last': the newest complete one in output_dir, or the start where "
        "there is none. SIGTERM and SIGINT save a checkpoint and end the run with exit code 143 and 130.",
    )
    push_to_hub: bool = HfArg(
        default=False,
        help="Publish the model folder as --hub_model_id at the end and, unless --hub_strategy is 'end', the "
        "model at every save. Checkpoints go there only with the strategies 'checkpoint' and 'all_checkpoints'.",
    )

    def __post_init__(self):
        check_flags(self)
        if self.do_train and (self.max_steps == 0 or self.max_steps < 0 and self.num_train_epochs <= 0):
            raise ValueError(
                f"--max_steps {self.max_steps} and --num_train_epochs {self.num_train_epochs:g} make a run without a "
                "step. Raise one of them, or pass --do_train False to evaluate a trained model."
            )
        if (self.fsdp or self.ddp_backend) and not LAUNCHED & os.environ.keys():
            raise ValueError(
                f"--{'fsdp' if self.fsdp else 'ddp_backend'} is for several processes, and this is one: start them "
                "with accelerate launch or torchrun, or leave it out."
            )
        # without it accelerate takes the processes of a machine without GPU for so many lone ones
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()
        check_packages(self)
        check_precision(self)
        check_what_processes_share(self)
        self.dataloader_pin_memory &= self.device.type != "cpu"  # nothing to pin for, and torch warns


@dataclass
class PretrainingArguments(RunArguments):
    """`TrainingArguments` with the reference's optimization as defaults, and what it has beyond them."""

    KIND = "pretraining"

    output_dir: str | None = HfArg(default="runs/tjepa", help="Model, checkpoints and logs go here.")
    do_train: bool = HfArg(default=True, help="Whether to train.")
    do_eval: bool = HfArg(default=True, help="Whether to evaluate at the end.")
    learning_rate: float | None = HfArg(
        default=None,
        help="Highest learning rate, after the warm-up. Default: 1e-3; 1e-5 for a trained encoder of another "
        "architecture.",
    )
    head_learning_rate: float | None = HfArg(
        default=None,
        help="Highest rate of the predictor and the heads. Default: the learning rate; 100 times as much beside "
        "a trained encoder of another architecture.",
    )
    heads_first_ratio: float | None = HfArg(
        default=None,
        help="Share of the steps in which predictor and heads train alone. Default: 0; 0.1 where they are new "
        "beside a trained encoder.",
    )
    start_lr: float | None = HfArg(
        default=None, help="Learning rate at the start of the warm-up. Default: a fifth of the highest one."
    )
    final_lr: float | None = HfArg(
        default=None, help="Learning rate at the end. Default: a thousandth of the highest one."
    )
    lr_scheduler_type: Literal[*LR_SCHEDULES] = HfArg(
        default="cosine",
        help="How the learning rate falls to --final_lr after the warm-up. For warmup_stable_decay "
        "--lr_scheduler_kwargs '{\"num_decay_steps\": 100}' says how long that is, in place of a tenth of the steps.",
    )
    weight_decay: float = HfArg(default=0.04, help="Weight decay of matrices at the start.")
    final_weight_decay: float = HfArg(default=0.4, help="Weight decay of matrices at the end.")
    adam_beta2: float = HfArg(default=0.95, help="Beta2 of AdamW.")
    ema_momentum: float | None = HfArg(
        default=None,
        help="Momentum of the target encoder at the start; 1 freezes it. Default: 0.996; for a trained encoder "
        "of another architecture 1 - 2 / steps, with which a third of it stays as it was.",
    )
    final_ema_momentum: float = HfArg(default=1.0, help="Momentum of the target encoder at the end.")
    ema_schedule: Literal["linear", "cosine"] = HfArg(
        default="linear", help="How the momentum rises to --final_ema_momentum."
    )
    ema_anneal_ratio: float = HfArg(
        default=1.0, help="The momentum is at its end after this share of the steps, and stays there."
    )
    export_encoder: Literal["target", "context"] | None = HfArg(
        default=None,
        help="Which encoder of another architecture the run's folder holds. "
        "Default: target, or context where the target is frozen.",
    )
    schedule_stretch: float = HfArg(
        default=1.0, help="Schedules are made for this many times the number of training steps (I-JEPA's ipe_scale)."
    )
    forecast: bool = HfArg(
        default=False,
        help="Only measure twenty steps, and say what the run would take on this machine: time, memory, epochs, "
        "tokens a parameter, and which flag changes each. Nothing is written.",
    )
    extend_schedule: Literal["warm_up_again", "decay_again"] | None = HfArg(
        default=None,
        help="How a checkpoint goes on whose run had another number of steps. warm_up_again: from its last "
        "rate through a new warm-up and decay; weight decay and momentum begin anew, too. decay_again: from the "
        "last checkpoint before the decay of --lr_scheduler_type warmup_stable_decay, which is always kept.",
    )
    stop_on_collapse: bool = HfArg(
        default=False,
        help="End training, with exit code 3, when collapse_patience evaluations in a row find a collapse.",
    )
    collapse_patience: int = HfArg(
        default=COLLAPSE_PATIENCE, help="Collapsed evaluations in a row, after the warm-up."
    )
    shuffle_buffer_size: int = HfArg(
        default=10_000, help="With --streaming: documents that each worker shuffles at a time. 0: none."
    )
    remove_unused_columns: bool = HfArg(default=False, help="Must stay False: the collator needs all.")
    logging_nan_inf_filter: bool = HfArg(default=False, help="Must stay false: a non-finite loss ends the run.")
    ddp_find_unused_parameters: bool | None = HfArg(
        default=False, help="May stay false: every parameter gets a gradient."
    )

    def __post_init__(self):
        if self.greater_is_better is None and "loss_" in (self.metric_for_best_model or ""):
            self.greater_is_better = False  # of a strategy: transformers knows only names that end in loss
        super().__post_init__()
        for name in ("split_batches", "dispatch_batches"):  # the tensors of a batch differ in their first dimension
            if getattr(self.accelerator_config, name):
                raise ValueError(
                    f"--accelerator_config: {name} must stay false, because the tensors of a batch belong together "
                    "and cannot be cut. Every process reads its own batches."
                )
            setattr(self.accelerator_config, name, False)
        self.accelerator_config.non_blocking = self.dataloader_pin_memory
        if not self.do_train and not self.do_eval:
            raise ValueError("--do_train False and --do_eval False leave nothing to do.")
        if self.collapse_patience < 1:
            raise ValueError(f"collapse_patience must be at least 1, got {self.collapse_patience}.")
        if self.schedule_stretch < 1.0:
            raise ValueError(
                f"schedule_stretch must be at least 1, got {self.schedule_stretch}: no schedule ends early."
            )
        if self.heads_first_ratio is not None and not 0.0 <= self.heads_first_ratio < 1.0:
            raise ValueError(f"heads_first_ratio must be in [0, 1), got {self.heads_first_ratio}.")
        if self.export_encoder not in (None, "target", "context"):
            raise ValueError(f"--export_encoder must be target or context, got {self.export_encoder!r}.")
        if self.extend_schedule not in (None, *EXTENSIONS):
            raise ValueError(f"--extend_schedule is {self.extend_schedule!r}; allowed are {', '.join(EXTENSIONS)}.")
        if self.lr_scheduler_type.value not in LR_SCHEDULES:
            raise ValueError(
                f"--lr_scheduler_type {self.lr_scheduler_type.value}: the learning rate goes from start_lr over "
                f"learning_rate to final_lr, after the warm-up by one of {', '.join(LR_SCHEDULES)}."
            )
        if other := sorted(set(self.lr_scheduler_kwargs or {}) - {"num_decay_steps"}):
            raise ValueError(f"--lr_scheduler_kwargs takes num_decay_steps, of warmup_stable_decay; got {other}.")
        num_decay_steps = (self.lr_scheduler_kwargs or {}).get("num_decay_steps", 1)
        if not isinstance(num_decay_steps, int) or num_decay_steps < 1:
            raise ValueError(f"--lr_scheduler_kwargs: num_decay_steps is a number of steps, got {num_decay_steps!r}.")
        self.create_ema()  # which refuses what cannot be
        self._left_out = [name for name in RATES if getattr(self, name) is None]
        self.settle_rates()

    def settle_rates(self, goes_on: bool = False, new_heads: bool = False) -> None:
        """
        Fills in what was left out of the rates: the reference's, or those that change a trained encoder little
        (docs/any-encoder.md). Of the latter `ema_momentum` stays `None` until the number of steps is known.

        Args:
            goes_on: whether an encoder of another architecture starts with trained weights.
            new_heads: whether predictor and heads are new beside it.

        Raises:
            ValueError: for a rate that is not positive, or a start or an end above the highest one.
        """
        for name in self._left_out:
            setattr(self, name, None)
        if self.learning_rate is None:
            self.learning_rate = TRAINED_ENCODER_LR if goes_on else 1e-3
        if self.head_learning_rate is None and (goes_on or self.heads_first_ratio):
            self.head_learning_rate = (HEAD_RATE_MULTIPLE if goes_on else 1.0) * self.learning_rate
        if self.heads_first_ratio is None and (goes_on or new_heads):
            self.heads_first_ratio = HEADS_FIRST_RATIO if new_heads else 0.0
        if self.ema_momentum is None and not goes_on:
            self.ema_momentum = 0.996
        self.start_lr, self.final_lr = self.rates_around(self.learning_rate)
        for name in ("learning_rate", "head_learning_rate"):
            if getattr(self, name) is not None and getattr(self, name) <= 0.0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}.")
        for name in ("start_lr", "final_lr"):
            if not 0.0 <= getattr(self, name) <= self.learning_rate:
                raise ValueError(
                    f"{name} must be between 0 and the learning rate, which is the highest one, got "
                    f"{getattr(self, name)} with --learning_rate {self.learning_rate}. Lower --{name}, or leave it "
                    "out: then it follows the learning rate."
                )

    def rates_around(self, highest: float) -> tuple[float, float]:
        """`start_lr` and `final_lr`; where they were left out, what belongs to this highest rate."""
        shares = {"start_lr": 1 / 5, "final_lr": 1 / 1000}
        return tuple(s * highest if name in self._left_out else getattr(self, name) for name, s in shares.items())

    def create_ema(self) -> EMACallback:
        """Where the number of steps decides its first momentum, `TJEPATrainer.create_scheduler` sets it later."""
        last = self.final_ema_momentum
        first = last if self.ema_momentum is None else self.ema_momentum
        return EMACallback(first, last, self.schedule_stretch, self.ema_schedule, self.ema_anneal_ratio)
