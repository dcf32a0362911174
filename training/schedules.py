"""Learning rate and weight decay over the steps, and the optimizer's parameter groups.

Notable: a schedule is a function of the step and of the arguments of this start. A checkpoint only says which step it
is, so what is changed on a resume, a lower learning rate above all, counts from the next step on.
"""

import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler
from transformers import TrainerCallback, TrainerControl, TrainerState


logger = logging.getLogger(__name__)


def linear_schedule(start: float, end: float, progress: float) -> float:
    return start + min(progress, 1.0) * (end - start)


def cosine_schedule(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


def constant_schedule(start: float, end: float, progress: float) -> float:
    return start


# --lr_scheduler_type: how the rate goes from its highest to its final value, once the warm-up is over
LR_SCHEDULES: dict[str, Callable[[float, float, float], float]] = {
    "cosine": cosine_schedule,
    "linear": linear_schedule,
    "constant": constant_schedule,
    "constant_with_warmup": constant_schedule,
    "warmup_stable_decay": linear_schedule,  # over the last `num_decay_steps` only
}


EXTENSIONS = ("decay_again", "warm_up_again")  # --extend_schedule


class WarmupThenDecay(LRScheduler):
    """
    Linear from `start_lr` to the optimizer's rate over the warm-up, then to `final_lr` at
    `schedule_stretch * num_training_steps`. (transformers' schedules start their warm-up at zero, know no final rate,
    or are off by one step.)

    Args:
        optimizer (`torch.optim.Optimizer`): its default rate is the highest one, in every group.
        num_training_steps (`int`): optimizer steps of the run.
        num_warmup_steps (`int`): optimizer steps of the warm-up.
        start_lr, final_lr (`float`): rates before the first step and at the end.
        schedule_stretch (`float`): I-JEPA's ipe_scale.
        kind (`str`): one of `LR_SCHEDULES`.
        num_decay_steps (`int`, *optional*): for `"warmup_stable_decay"`; by default a tenth of the steps.
        first_step (`int`): of a run that went on for more steps, where the present schedule begins. All other
            numbers of steps here count from there.
        num_heads_first_steps (`int`): so many steps the heads train alone (`split_heads`): all other groups have the
            rate 0, and then a warm-up of their own.
    """

    SETTINGS = ("learning_rate", "start_lr", "final_lr", "kind", "num_training_steps", "num_warmup_steps")
    SETTINGS += ("num_decay_steps", "schedule_stretch", "first_step", "num_heads_first_steps")

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        num_training_steps: int,
        num_warmup_steps: int,
        start_lr: float = 0.0,
        final_lr: float = 0.0,
        schedule_stretch: float = 1.0,
        kind: str = "cosine",
        num_decay_steps: int | None = None,
        first_step: int = 0,
        num_heads_first_steps: int = 0,
    ):
        if kind not in LR_SCHEDULES:
            raise ValueError(f"The learning rate's schedule must be one of {', '.join(LR_SCHEDULES)}, got {kind!r}.")
        self.learning_rate = optimizer.defaults["lr"]
        self.start_lr = start_lr
        self.final_lr = final_lr
        self.kind = kind
        self.num_training_steps = num_training_steps
        self.num_warmup_steps = num_warmup_steps
        self.schedule_stretch = schedule_stretch
        self.first_step = first_step
        self.num_heads_first_steps = num_heads_first_steps
        end = schedule_stretch * num_training_steps
        if num_decay_steps is None and kind == "warmup_stable_decay":
            num_decay_steps = max(1, round(0.1 * end))
        self.num_decay_steps = num_decay_steps
        self._decay_start = num_warmup_steps
        if num_decay_steps is not None:
            self._decay_start = max(num_warmup_steps, end - num_decay_steps)
        self._decay_length = max(1.0, end - self._decay_start)
        super().__init__(optimizer)

    def factor(self, step: int) -> float:
        """The rate of optimizer step `step` = 0, 1, ... as a share of the highest one."""
        step = max(0, step - self.first_step)
        start, final = self.start_lr / self.learning_rate, self.final_lr / self.learning_rate
        if step < self.num_warmup_steps:
            return linear_schedule(start, 1.0, step / self.num_warmup_steps)
        progress = max(0.0, (step - self._decay_start) / self._decay_length)
        return LR_SCHEDULES[self.kind](1.0, final, progress)

    def ramp(self, step: int) -> float:
        """What keeps the encoder still while the heads train alone, and eases it in afterwards."""
        num_steps = step - self.first_step - self.num_heads_first_steps + 1
        return 1.0 if not self.num_heads_first_steps else max(0.0, min(1.0, num_steps / (self.num_warmup_steps + 1)))

    @property
    def last_step_before_decay(self) -> int | None:
        """After so many optimizer steps the rate is still the highest one; `None` if it always decays, or never."""
        return self.first_step + int(self._decay_start) if self.kind == "warmup_stable_decay" else None

    def get_lr(self) -> list[float]:
        groups = zip(self.base_lrs, self.optimizer.param_groups, strict=True)
        step = self.last_epoch
        return [lr * self.factor(step) * (1.0 if group.get("is_head") else self.ramp(step)) for lr, group in groups]

    def state_dict(self) -> dict[str, Any]:
        return {
            "last_epoch": self.last_epoch,
            "_last_lr": self.get_last_lr(),
            "last_step_before_decay": self.last_step_before_decay,
            "settings": {name: getattr(self, name) for name in self.SETTINGS},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Goes on at the checkpoint's step with the settings of this start, and says which of them are new. The
        optimizer, which was loaded before and has the checkpoint's, gets those of this start, too.
        """
        before = dict(state_dict.get("settings", {}))
        if "base_lrs" in state_dict:  # a LambdaLR's
            before["learning_rate"] = state_dict["base_lrs"][0]
        now = {name: getattr(self, name) for name in before}
        groups = self.optimizer.param_groups
        for name in ("betas", "eps"):
            if name in self.optimizer.defaults:
                before[name], now[name] = groups[0][name], self.optimizer.defaults[name]
                for group in groups:
                    group[name] = now[name]
        for name, value in now.items():
            if value != before[name]:
                logger.info(f"{name} is {value} from here on; up to the checkpoint it was {before[name]}.")
        self.last_epoch = state_dict["last_epoch"] - 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the optimizer has made no step yet in this process
            self.step()
        for group, base_lr in zip(groups, self.base_lrs, strict=True):
            group["initial_lr"] = base_lr


def split_heads(optimizer: torch.optim.Optimizer, encoder: torch.nn.Module, head_learning_rate: float) -> None:
    """Gives what is not the encoder's groups of its own, with another rate, behind the encoder's."""
    of_encoder = {id(parameter) for parameter in encoder.parameters()}
    groups = []
    for is_head in (False, True):
        for group in optimizer.param_groups:
            parameters = [p for p in group["params"] if (id(p) not in of_encoder) == is_head]
            groups.append({**group, "params": parameters, "is_head": is_head})
            groups[-1]["lr"] = head_learning_rate if is_head else group["lr"]
    optimizer.param_groups = groups


@dataclass(eq=False)
class WeightDecayCallback(TrainerCallback):
    """
    Weight decay of matrices from `weight_decay` to `final_weight_decay` along a cosine over
    `schedule_stretch * max_steps` optimizer steps; groups of biases, norms and other 1-D parameters keep none.

    Works in any Trainer whose optimizer has a group for each of the two, as `TJEPATrainer` makes them.
    """

    weight_decay: float = 0.04
    final_weight_decay: float = 0.4
    schedule_stretch: float = 1.0
    first_step: int = field(init=False, default=0)  # of the schedule, where a run went on for more steps

    def at(self, step: int, max_steps: int) -> float:
        progress = (step - self.first_step) / (self.schedule_stretch * (max_steps - self.first_step))
        return cosine_schedule(self.weight_decay, self.final_weight_decay, progress)

    def on_step_begin(self, args, state: TrainerState, control: TrainerControl, optimizer=None, **kwargs):
        for group in optimizer.param_groups:
            # DeepSpeed makes vectors of all parameters; there, what decays is known by its decay
            if group["weight_decay"] > 0.0 or any(parameter.ndim >= 2 for parameter in group["params"]):
                group["weight_decay"] = self.at(state.global_step, state.max_steps)
