"""Figures that make a collapse visible, and the verdict over them."""

import logging
import math

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..modeling_tjepa import TJEPAForPreTraining, TJEPAForPreTrainingOutput
from .schedules import add_to_log


logger = logging.getLogger(__name__)


# data2vec 2.0 (arXiv 2212.07525) stops below this; centred RankMe under MIN_RANK is a warning, not a verdict
MIN_TARGET_STD = 0.1
MIN_RANK = 0.1
COLLAPSE_PATIENCE = 3  # evaluations in a row, for a collapse to be called lasting


class FeatureMoments:
    """
    Mean and covariance of features over all tokens seen, without keeping the tokens.

    The first batch's mean is taken off before squaring, so that a large common mean does not swallow the variance.
    """

    def __init__(self):
        self.count = 0

    @torch.no_grad()
    def update(self, features: torch.Tensor) -> None:
        """features: float [num_tokens, hidden_size]."""
        features = features.detach().float()
        if self.count == 0:
            self.shift = features.mean(dim=0) if len(features) > 0 else features.new_zeros(features.shape[1])
            self.total = torch.zeros_like(self.shift)
            self.products = features.new_zeros(features.shape[1], features.shape[1])
        features = features - self.shift
        self.count += len(features)
        self.total += features.sum(dim=0)
        self.products += features.T @ features

    @property
    def mean(self) -> torch.Tensor:
        return self.shift + self.total / self.count

    def sums(self) -> torch.Tensor:
        """Number, sum and sum of outer products of all tokens, flat: what can be added up over processes."""
        shift, total = self.shift.double(), self.total.double()  # float64: a large common mean comes back in here
        cross = torch.outer(shift, total)
        products = self.products + cross + cross.T + self.count * torch.outer(shift, shift)
        count = shift.new_tensor([self.count])
        return torch.cat([count, total + self.count * shift, products.flatten()])

    def set_sums(self, sums: torch.Tensor) -> None:
        count, total, products = sums.split([1, len(self.total), len(self.total) ** 2])
        mean = total / count.clamp(min=1)
        self.count = int(count)
        self.shift, self.total = mean.float(), torch.zeros_like(self.total)
        self.products = (products.view_as(self.products) - count * torch.outer(mean, mean)).float()

    def covariance(self) -> torch.Tensor:
        mean = self.total / self.count
        return self.products / self.count - torch.outer(mean, mean)

    def std(self) -> float:
        """Standard deviation across tokens, averaged over features."""
        return self.covariance().diagonal().clamp(min=0).sqrt().mean().item()

    def rank(self) -> float:
        """
        RankMe (arXiv 2210.02885) of the centred features divided by their width, in (0, 1]: the exponential of the
        entropy of the singular values.
        """
        singular_values = torch.linalg.eigvalsh(self.covariance().double()).clamp(min=0).sqrt()
        shares = singular_values / singular_values.sum().clamp(min=1e-12)
        return torch.exp(-torch.xlogy(shares, shares).sum()).item() / len(shares)


class PretrainingStatistics:
    """What one log line says of the batches it stands for: loss terms and the health of the representations."""

    def __init__(self, strategy_names: list[str]):
        self.strategy_names = strategy_names
        self.targets, self.predictions, self.contexts = FeatureMoments(), FeatureMoments(), FeatureMoments()
        self.target_directions, self.cosines = FeatureMoments(), FeatureMoments()
        self.losses: dict[str, list[torch.Tensor]] = {}

    @torch.no_grad()
    def update(self, output: TJEPAForPreTrainingOutput, inputs: dict) -> None:
        is_token = inputs["context_view_ids"].flatten() >= 0
        self.targets.update(output.labels)
        self.predictions.update(output.predictions)
        self.contexts.update(output.context_states[is_token])
        self.target_directions.update(torch.nn.functional.normalize(output.labels.float(), dim=-1))
        self.cosines.update(torch.cosine_similarity(output.predictions.float(), output.labels.float())[:, None])
        terms = ("jepa_loss", "variance_covariance_loss", "sigreg_loss", "token_prediction_loss", "denoising_loss")
        for name in terms:
            if getattr(output, name) is not None:
                self.losses.setdefault(name, []).append(getattr(output, name).detach())
        if len(self.strategy_names) > 1:
            seen = inputs["slots_per_strategy"] > 0
            for name, loss, was_seen in zip(self.strategy_names, output.loss_per_strategy, seen, strict=True):
                if was_seen:
                    self.losses.setdefault(f"loss_{name}", []).append(loss.detach())

    def _add_other_processes(self) -> None:
        """One all-reduce. Every process must take part; they have the same losses, since they share their slots."""
        moments = [self.targets, self.predictions, self.contexts, self.target_directions, self.cosines]
        sums = [moment.sums() for moment in moments]
        losses = torch.stack([torch.stack(values).mean() for values in self.losses.values()]).double()
        *sums, losses = reduce(torch.cat([*sums, losses]), "sum").split([len(part) for part in (*sums, losses)])
        for moment, moment_sums in zip(moments, sums, strict=True):
            moment.set_sums(moment_sums)
        self.losses = dict(zip(self.losses, losses[:, None] / PartialState().num_processes, strict=True))

    def summary(self) -> dict[str, float]:
        """Figures of all processes together for the log; empty if there was no target slot."""
        if self.losses and PartialState().num_processes > 1:
            self._add_other_processes()
        if self.targets.count == 0:
            return {}
        # the cosine that always predicting the mean label would get: no learning needed for that
        mean_target = torch.nn.functional.normalize(self.targets.mean, dim=0)
        return {
            **{name: torch.stack(list(values)).mean().item() for name, values in self.losses.items()},
            "target_std": self.targets.std(),
            "prediction_std": self.predictions.std(),
            "target_rank": self.targets.rank(),
            "prediction_rank": self.predictions.rank(),
            "context_rank": self.contexts.rank(),
            "cosine": self.cosines.mean.item(),
            "mean_target_cosine": torch.dot(mean_target, self.target_directions.mean).item(),
        }


def collapse_verdict(metrics: dict[str, float], prefix: str = "") -> str | None:
    """
    What is wrong with the representations, in plain words, or `None`.

    A run is collapsed when the targets' standard deviation across tokens is under 0.1, or when the predictions are no
    closer to the targets than the mean target is. A low rank alone is no collapse.
    """
    std = metrics[f"{prefix}target_std"]
    cosine, baseline = metrics[f"{prefix}cosine"], metrics[f"{prefix}mean_target_cosine"]
    if std < MIN_TARGET_STD:
        return (
            f"collapsed: the targets barely differ from token to token (standard deviation {std:.3f}, healthy is "
            f"above {MIN_TARGET_STD})"
        )
    if cosine <= baseline:
        return (
            f"collapsed: the predictions are no closer to the targets (cosine {cosine:.3f}) than the mean target is "
            f"({baseline:.3f})"
        )
    return None


def collapsed_evaluations(state: TrainerState) -> list[int]:
    """Optimizer steps of the latest evaluations in a row that found a collapse; empty if the last one did not."""
    is_collapsed = {
        entry["step"]: collapse_verdict(entry, prefix="eval_") is not None
        for entry in state.log_history
        if "eval_target_std" in entry
    }
    steps = []
    for step in reversed(is_collapsed):
        if not is_collapsed[step]:
            break
        steps.insert(0, step)
    return steps


class HealthCallback(TrainerCallback):
    """
    Adds loss terms and the health of the representations to the Trainer's log, warns of a collapse at every
    evaluation, and stops at a non-finite loss or gradient.

    Training figures are those of the logged step, evaluation figures those of the whole evaluation set. Nothing is
    read from the device on other steps.

    A collapse in `patience` evaluations in a row after the warm-up is a lasting one: it is reported as an error and,
    with `stop_on_collapse`, ends training without another checkpoint. Non-finite gradients are counted
    (`nonfinite_gradients` in the log). Under float16 the gradient scaler skips their steps, which is its way to find
    the scale; else they stop the run.

    Args:
        strategy_names (`list[str]`): names of the collator's strategies, in order.
        stop_on_collapse (`bool`, defaults to `False`): whether a lasting collapse ends training.
        patience (`int`, defaults to 3): evaluations in a row.
    """

    def __init__(self, strategy_names: list[str], stop_on_collapse: bool = False, patience: int = COLLAPSE_PATIENCE):
        if patience < 1:
            raise ValueError(f"HealthCallback: patience counts evaluations and must be at least 1, got {patience}.")
        self.strategy_names = strategy_names
        self.stop_on_collapse = stop_on_collapse
        self.patience = patience
        self.verdict: str | None = None  # of the latest evaluation
        self.stopped_run = False
        self._train_statistics = PretrainingStatistics(strategy_names)
        self._eval_statistics = PretrainingStatistics(strategy_names)
        # both on the device: the first step with a non-finite value, or inf
        self._first_bad_loss: torch.Tensor | None = None
        self._first_bad_gradient: torch.Tensor | None = None
        self._bad_gradients = torch.zeros((), dtype=torch.int64)
        self._reported_bad_gradients = 0
        self._will_log = False
        self._step = 0

    def watch(self, model: TJEPAForPreTraining) -> None:
        model.register_forward_hook(self._after_forward, with_kwargs=True)

    @property
    def num_nonfinite_gradients(self) -> int:
        return int(self._bad_gradients)

    def _after_forward(self, model, args, inputs, output):
        if not model.training:
            self._eval_statistics.update(output, inputs)
            return
        self._first_bad_loss = self._first_bad_step(self._first_bad_loss, output.loss.detach())
        if self._will_log:
            self._train_statistics.update(output, inputs)

    def _first_bad_step(self, earlier: torch.Tensor | None, value: torch.Tensor) -> torch.Tensor:
        bad_step = torch.where(torch.isfinite(value), math.inf, float(self._step))
        return bad_step if earlier is None else earlier.minimum(bad_step)

    def _raise_if_not_finite(self) -> None:
        for name, first_bad_step in (("loss", self._first_bad_loss), ("gradient", self._first_bad_gradient)):
            step = math.inf if first_bad_step is None else first_bad_step.item()
            if step < math.inf:
                raise FloatingPointError(
                    f"The {name} was not finite in optimizer step {int(step)}; stopped before saving another "
                    "checkpoint. The last checkpoint is good; resume from it with --resume_from_checkpoint, with a "
                    "lower --learning_rate, a longer warm-up or a lower --max_grad_norm."
                )

    def on_train_begin(self, args, state: TrainerState, control, **kwargs):
        counts = [entry["nonfinite_gradients"] for entry in state.log_history if "nonfinite_gradients" in entry]
        self._reported_bad_gradients = counts[-1] if counts else 0
        self._bad_gradients = torch.tensor(self._reported_bad_gradients, device=args.device)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._step = state.global_step + 1
        self._will_log = self._step % state.logging_steps == 0 or (self._step == 1 and args.logging_first_step)

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        # The Trainer's own norm is not handed to callbacks; clipping keeps what is not finite that way.
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of sharded parameters
        self._bad_gradients += ~torch.isfinite(norm)
        if getattr(optimizer, "scaler", None) is None:
            self._first_bad_gradient = self._first_bad_step(self._first_bad_gradient, norm)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        # reading a loss makes a GPU wait; on the CPU it costs nothing
        will_save = control.should_save or state.global_step % state.save_steps == 0
        is_last = state.global_step >= state.max_steps
        if args.device.type == "cpu" or self._will_log or will_save or is_last:
            self._raise_if_not_finite()

    def on_epoch_end(self, args, state, control, **kwargs):
        self._raise_if_not_finite()

    def on_log(self, args, state: TrainerState, control: TrainerControl, logs=None, **kwargs):
        if "eval_loss" in logs:
            metrics = {f"eval_{name}": value for name, value in self._eval_statistics.summary().items()}
            self._eval_statistics = PretrainingStatistics(self.strategy_names)
            if metrics:
                add_to_log(state, logs, metrics)
                self._judge(metrics, args, state, control)
        elif "loss" in logs:
            add_to_log(state, logs, self._train_statistics.summary())
            self._train_statistics = PretrainingStatistics(self.strategy_names)
            self._report_nonfinite_gradients(state, logs)

    def _report_nonfinite_gradients(self, state: TrainerState, logs: dict) -> None:
        count = self.num_nonfinite_gradients
        if count:
            add_to_log(state, logs, {"nonfinite_gradients": count})
        if count > self._reported_bad_gradients:
            logger.warning(
                f"The gradient was not finite in {count - self._reported_bad_gradients} optimizer steps since the "
                f"last report, {count} in all: the float16 gradient scaler skipped these steps and lowered its scale. "
                "A few are normal; if it goes on, use --bf16 or a lower --learning_rate."
            )
        self._reported_bad_gradients = count

    def _judge(self, metrics: dict[str, float], args, state: TrainerState, control: TrainerControl) -> None:
        self.verdict = collapse_verdict(metrics, prefix="eval_")
        if self.verdict is not None:
            num_warmup_steps = args.get_warmup_steps(state.max_steps)  # nothing is learned before the first steps
            steps = [step for step in collapsed_evaluations(state) if step > num_warmup_steps]
            if len(steps) > 1:
                self.verdict += f"; so in the last {len(steps)} evaluations, since step {steps[0]}"
            report = logger.error if len(steps) >= self.patience else logger.warning
            report(f"The representations have {self.verdict}. See the collapse advice in the README.")
            if self.stop_on_collapse and len(steps) >= self.patience:
                logger.error(f"Stopping at step {state.global_step} without another checkpoint (--stop_on_collapse).")
                self.stopped_run = control.should_training_stop = True
                control.should_save = False
        elif (rank := metrics["eval_target_rank"]) < MIN_RANK:
            logger.warning(
                f"The targets use few directions (RankMe {rank:.3f} of the width). That alone is no collapse: judge "
                "by a frozen probe against the untrained encoder."
            )
