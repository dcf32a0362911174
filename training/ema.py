"""The moving average that makes the target encoder: a callback for any transformers Trainer."""

import math
from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainerCallback, TrainerControl, TrainerState

from .schedules import cosine_schedule, linear_schedule


MAX_SHARE_OF_START = 0.8  # of a target encoder that is said to move
EMA_SCHEDULES = {"linear": linear_schedule, "cosine": cosine_schedule}


@dataclass(eq=False)
class EMACallback(TrainerCallback):
    """
    Moves the target encoder after every optimizer step t = 0, 1, ... (never on a micro-step):

        m_t = m_0 + t/T * (m_1 - m_0),   T = schedule_stretch * max_steps
        target <- m_t * target + (1 - m_t) * context

    With the schedule `"cosine"` (BYOL, arXiv 2006.07733) m_t = m_1 - (m_1 - m_0) * (1 + cos(pi t/T)) / 2 instead. Of
    either the momentum stays at m_1 after `anneal_ratio * T` steps, which then stand for T above (data2vec, arXiv
    2202.03555, is linear up to a third of the steps or less).

    The momentum depends on the step only, so it is right after a resume and the same on every process. All that
    T-JEPA needs of a Trainer beside its model and collator, in whatever place among the callbacks:

        trainer = Trainer(model, args, data_collator=DataCollatorForTJEPA(), train_dataset=DocumentDataset(dataset),
                          callbacks=[EMACallback()])

    Args:
        momentum (`float`, defaults to 0.996): m_0.
        final_momentum (`float`, defaults to 1.0): m_1.
        schedule_stretch (`float`, defaults to 1.0):
            stretches the schedule beyond the end of training (I-JEPA's ipe_scale).
        schedule (`str`, defaults to `"linear"`): `"linear"` or `"cosine"`.
        anneal_ratio (`float`, defaults to 1.0): share of T after which the momentum is m_1, in (0, 1].

    Raises:
        ValueError: for a momentum outside [0, 1], a ratio outside (0, 1], a stretch of 0 or less, an unknown schedule.
    """

    momentum: float = 0.996
    final_momentum: float = 1.0
    schedule_stretch: float = 1.0
    schedule: Literal["linear", "cosine"] = "linear"
    anneal_ratio: float = 1.0
    first_step: int = field(init=False, default=0)  # of the schedule, where a run went on for more steps

    def __post_init__(self):
        for name in ("momentum", "final_momentum"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"EMACallback: {name} must be in [0, 1], got {getattr(self, name)}.")
        if self.schedule not in EMA_SCHEDULES:
            allowed = ", ".join(EMA_SCHEDULES)
            raise ValueError(f"EMACallback: schedule must be one of {allowed}, got {self.schedule!r}.")
        if not self.schedule_stretch > 0.0:
            raise ValueError(f"EMACallback: schedule_stretch must be positive, got {self.schedule_stretch}.")
        if not 0.0 < self.anneal_ratio <= 1.0:
            raise ValueError(f"EMACallback: anneal_ratio must be in (0, 1], got {self.anneal_ratio}.")

    def at(self, step: int, max_steps: int) -> float:
        num_steps = self.schedule_stretch * self.anneal_ratio * (max_steps - self.first_step)
        progress = (step - self.first_step) / num_steps
        return EMA_SCHEDULES[self.schedule](self.momentum, self.final_momentum, progress)

    def share_of_start(self, max_steps: int) -> float:
        """How much of the target encoder will be what it started as, after a run of so many optimizer steps."""
        return math.prod(self.at(step, max_steps) for step in range(self.first_step, max_steps))

    def on_optimizer_step(self, args, state: TrainerState, control: TrainerControl, model=None, **kwargs):
        # Fires once per optimizer step, before global_step counts up: global_step is t.
        model.update_target_encoder(self.at(state.global_step, state.max_steps))
