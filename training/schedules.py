"""Learning rate and weight decay over the steps, and the optimizer's parameter groups."""

import math
from functools import partial

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def linear_schedule(start: float, end: float, progress: float) -> float:
    return start + min(progress, 1.0) * (end - start)


def cosine_schedule(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


def learning_rate_factor(
    step: int, start_factor: float, final_factor: float, num_warmup_steps: int, num_schedule_steps: float
) -> float:
    if step < num_warmup_steps:
        return linear_schedule(start_factor, 1.0, step / num_warmup_steps)
    return cosine_schedule(
        1.0, final_factor, (step - num_warmup_steps) / max(1.0, num_schedule_steps - num_warmup_steps)
    )


def get_lr_scheduler(
    optimizer: torch.optim.Optimizer,
    num_training_steps: int,
    num_warmup_steps: int,
    start_lr: float = 0.0,
    final_lr: float = 0.0,
    ipe_scale: float = 1.0,
) -> LambdaLR:
    """
    I-JEPA's learning rate: linear from `start_lr` to the optimizer's rate over the warm-up, then cosine to `final_lr`
    at `ipe_scale * num_training_steps`. (transformers' cosine schedules start their warm-up at zero, or are off by one
    step.)
    """
    lr = optimizer.defaults["lr"]
    return LambdaLR(
        optimizer,
        partial(
            learning_rate_factor,
            start_factor=start_lr / lr,
            final_factor=final_lr / lr,
            num_warmup_steps=num_warmup_steps,
            num_schedule_steps=ipe_scale * num_training_steps,
        ),
    )


def create_optimizer(model: torch.nn.Module, args: TrainingArguments) -> torch.optim.Optimizer:
    """
    The Trainer's own optimizer of `args.optim` with weight decay on matrices only: never on biases, norms, the mask
    token or any other 1-D parameter. Parameters without gradient (the target encoder) are not in it.
    """
    optimizer_class, optimizer_kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return optimizer_class(groups, **optimizer_kwargs)


class WeightDecayCallback(TrainerCallback):
    """
    Weight decay from its value in the optimizer *up* to `final_weight_decay`, along a cosine over
    `ipe_scale * max_steps` optimizer steps; groups without decay keep none.
    """

    def __init__(self, weight_decay: float = 0.04, final_weight_decay: float = 0.4, ipe_scale: float = 1.0):
        self.weight_decay = weight_decay
        self.final_weight_decay = final_weight_decay
        self.ipe_scale = ipe_scale

    def at(self, step: int, max_steps: int) -> float:
        return cosine_schedule(self.weight_decay, self.final_weight_decay, step / (self.ipe_scale * max_steps))

    def on_step_begin(self, args, state: TrainerState, control: TrainerControl, optimizer=None, **kwargs):
        for group in optimizer.param_groups:
            if group["weight_decay"] > 0.0:
                group["weight_decay"] = self.at(state.global_step, state.max_steps)

    def on_log(self, args, state: TrainerState, control: TrainerControl, logs=None, **kwargs):
        if "learning_rate" in logs:
            add_to_log(state, logs, {"weight_decay": self.at(state.global_step - 1, state.max_steps)})


def add_to_log(state: TrainerState, logs: dict[str, float], metrics: dict[str, float]) -> None:
    """Into the line that is being logged, and into the history that the Trainer has already written it to."""
    logs.update(metrics)
    state.log_history[-1].update(metrics)
