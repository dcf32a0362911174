"""Every argument of a pretraining run that is not about its model, data or masks."""

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from .health import COLLAPSE_PATIENCE


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
