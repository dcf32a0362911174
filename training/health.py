"""Figures that make a collapse visible, and the verdict over them."""

import logging
import math
from dataclasses import dataclass, fields
from itertools import takewhile

import torch
from accelerate.utils import reduce
from torch.nn import functional as F
from transformers import TrainerState

from ..configuration_tjepa import TJEPAConfig
from ..modeling_tjepa import TJEPAForPreTrainingOutput


logger = logging.getLogger(__name__)


# data2vec 2.0 (arXiv 2212.07525) stops below this; centred RankMe under MIN_RANK is a warning, not a verdict
MIN_TARGET_STD = 0.1
MIN_RANK = 0.1
MIN_STEPS = 10  # a predictor that was just drawn does not beat the mean target, warm-up or not
COLLAPSE_PATIENCE = 3  # evaluations in a row, for a collapse to be called lasting
NOT_FINITE_ADVICE = (
    "; stopped before saving another checkpoint. Go on with --resume_from_checkpoint last (or an earlier one, if this "
    "comes back at once) and a lower --learning_rate, a longer warm-up or a lower --max_grad_norm."
)


def moment_sums(features: torch.Tensor) -> torch.Tensor:
    """
    What mean and covariance of features come from: float [num_tokens, width] -> float64 [1 + width, 1 + width], the
    sums over tokens of 1, of the features (first row and column) and of their products. They add up over batches and
    processes. In float64 a large common mean does not swallow the variance.
    """
    extended = F.pad(in_float64(features), (1, 0), value=1.0)
    return extended.T @ extended


def in_float64(values: torch.Tensor) -> torch.Tensor:
    values = values.detach()
    return (values.cpu() if values.device.type == "mps" else values).double()  # Apple's GPUs have no float64


def covariance(sums: torch.Tensor) -> torch.Tensor:
    moments = sums / sums[0, 0]
    return moments[1:, 1:] - torch.outer(moments[0, 1:], moments[0, 1:])


def feature_std(sums: torch.Tensor) -> float:
    """Of `moment_sums`: the standard deviation across tokens, averaged over features."""
    return covariance(sums).diagonal().clamp(min=0).sqrt().mean().item()


def rank_share(sums: torch.Tensor) -> float:
    """
    Of `moment_sums`: RankMe (arXiv 2210.02885) of the centred features divided by their width, in (0, 1], the
    exponential of the entropy of the singular values. NaN if a feature is not finite.
    """
    matrix = covariance(sums).cpu()
    if not matrix.isfinite().all():
        return math.nan
    singular_values = torch.linalg.eigvalsh(matrix).clamp(min=0).sqrt()
    shares = singular_values / singular_values.sum().clamp(min=1e-12)
    return torch.exp(-torch.xlogy(shares, shares).sum()).item() / len(shares)


HEALTH_FIGURES = ("target_std", "prediction_std", "target_rank", "prediction_rank", "context_rank", "cosine")
HEALTH_FIGURES += ("mean_target_cosine",)
SLOT_LOSSES = ("jepa_loss", "token_prediction_loss")  # means over target slots, by strategy
LOSSES = [field.name for field in fields(TJEPAForPreTrainingOutput) if field.name.endswith("_loss")]
TERMS = [name for name in LOSSES if name not in SLOT_LOSSES]  # means over something else


def loss_weights(config: TJEPAConfig) -> dict[str, float]:
    """With which weight each loss counts in the sum of all: `jepa_loss` with 1."""
    return {name: getattr(config, name.replace("_loss", "_weight"), 1.0) for name in LOSSES}


def evaluation_figures(config: TJEPAConfig, strategy_names: list[str]) -> list[str]:
    """What an evaluation of `PretrainingStatistics` can hold, besides what is judged by labels."""
    weights = loss_weights(config) | {"denoising_loss": 0}  # of training alone
    terms = [name for name, weight in weights.items() if weight > 0]
    per_strategy = [f"loss_{name}" for name in strategy_names] if len(strategy_names) > 1 else []
    return ["loss", *terms, *per_strategy, *HEALTH_FIGURES]


class PretrainingStatistics:
    """
    Loss terms and health of the representations over some batches: those of a training step, or of an evaluation.

    A strategy's loss is its mean over all target slots of these batches on all processes, and a loss the mean over
    strategies: what one batch of all their documents would have, however they are divided. Terms that are not means
    over slots are averaged over the batches, weighed by their context tokens. `loss` is the sum of all terms with the
    weights of the configuration, as in `TJEPAForPreTraining`.
    """

    def __init__(self, strategy_names: list[str], config: TJEPAConfig):
        self.strategy_names = strategy_names
        self.config = config
        self.sums: dict[str, torch.Tensor] = {}  # float64, over batches

    @torch.no_grad()
    def update(self, output: TJEPAForPreTrainingOutput, inputs: dict[str, torch.Tensor]) -> None:
        is_token = inputs["context_view_ids"].flatten() >= 0
        # of a step's batches each has the mean of their slots, so these add up to all slots of the step
        slots, num_tokens = inputs["slots_per_strategy"], is_token.sum()
        labels, predictions = output.labels.float(), output.predictions.float()
        sums = {
            "slots": slots,
            "tokens": num_tokens,
            "targets": moment_sums(labels),
            "predictions": moment_sums(predictions),
            "contexts": moment_sums(output.context_states[is_token]),
            "target_directions": F.normalize(labels, dim=-1).sum(dim=0),
            "cosines": torch.cosine_similarity(predictions, labels).sum(),
            "jepa_loss": output.loss_per_strategy * slots,
        }
        if output.token_loss_per_strategy is not None:
            sums["token_prediction_loss"] = output.token_loss_per_strategy * slots
        sums |= {name: term * num_tokens for name in TERMS if (term := getattr(output, name)) is not None}
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0) + in_float64(value)

    def losses(self) -> dict[str, float]:
        slots = self.sums["slots"]
        seen = slots > 0
        per_strategy = {name: self.sums[name][seen] / slots[seen] for name in SLOT_LOSSES if name in self.sums}
        losses = {name: values.mean().item() for name, values in per_strategy.items()}
        losses |= {name: (self.sums[name] / self.sums["tokens"]).item() for name in TERMS if name in self.sums}
        weights = loss_weights(self.config)
        loss = sum(weights[name] * value for name, value in losses.items())
        if len(self.strategy_names) > 1:
            names = [f"loss_{strategy}" for strategy, n in zip(self.strategy_names, slots, strict=True) if n]
            losses |= dict(zip(names, per_strategy["jepa_loss"].tolist(), strict=True))
        return {"loss": loss, **losses}

    def summary(self) -> dict[str, float]:
        """
        Figures of all processes together for the log, each of which must take part; empty if there was no target slot.
        """
        sums = self.sums = reduce(self.sums, "sum")
        if not sums or not (num_targets := sums["targets"][0, 0]):
            return {}
        # the cosine that always predicting the mean label would get: no learning needed for that
        mean_target = F.normalize(sums["targets"][0, 1:], dim=0)
        return {
            **self.losses(),
            "target_std": feature_std(sums["targets"]),
            "prediction_std": feature_std(sums["predictions"]),
            "target_rank": rank_share(sums["targets"]),
            "prediction_rank": rank_share(sums["predictions"]),
            "context_rank": rank_share(sums["contexts"]),
            "cosine": (sums["cosines"] / num_targets).item(),
            "mean_target_cosine": (torch.dot(mean_target, sums["target_directions"]) / num_targets).item(),
        }


def collapse_verdict(metrics: dict[str, float], prefix: str = "", is_new: bool = False) -> str | None:
    """
    What is wrong with the representations, in plain words, or `None`.

    A run is collapsed when the targets' standard deviation across tokens is under 0.1, or when the predictions are no
    closer to the targets than the mean target is (which says nothing while the predictor is new: `is_learning`). A low
    rank alone is not a collapse. Figures that are not finite are a verdict, too.
    """
    std = metrics[f"{prefix}target_std"]
    cosine, baseline = metrics[f"{prefix}cosine"], metrics[f"{prefix}mean_target_cosine"]
    if not all(map(math.isfinite, (std, cosine, baseline))):
        return "not finite: the weights or what comes out of them are NaN or infinite"
    if std < MIN_TARGET_STD:
        return (
            f"collapsed: the targets barely differ from token to token (standard deviation {std:.3f}, healthy is "
            f"above {MIN_TARGET_STD})"
        )
    if cosine <= baseline and not is_new:
        return (
            f"collapsed: the predictions are no closer to the targets (cosine {cosine:.3f}) than the mean target is "
            f"({baseline:.3f})"
        )
    return None


def is_learning(lead: float, step: int, earlier_lead: float | None, max_steps: int | None) -> bool:
    """
    Whether predictions that do not beat the mean target yet are on their way to: the predictor was just drawn, or, in
    the first half of a run, they come nearer from evaluation to evaluation. A healthy run needs up to two fifths.

    Args:
        lead (`float`): cosine of predictions and targets less that of the mean target.
        step (`int`): the optimizer step of the figures.
        earlier_lead (`float`, *optional*): of the evaluation before.
        max_steps (`int`, *optional*): of the whole run.
    """
    rises = earlier_lead is None or lead > earlier_lead
    return 0 < step <= MIN_STEPS or (0 < step <= (max_steps or 0) / 2 and rises)


def verdicts_of_evaluations(state: TrainerState) -> dict[int, str | None]:
    """Optimizer step of each evaluation in the log -> what `collapse_verdict` says of it."""
    verdicts, earlier_lead = {}, None
    for entry in state.log_history:
        if "eval_target_std" in entry:
            lead, step = entry["eval_cosine"] - entry["eval_mean_target_cosine"], entry["step"]
            is_new = is_learning(lead, step, earlier_lead, state.max_steps)
            verdicts[step], earlier_lead = collapse_verdict(entry, prefix="eval_", is_new=is_new), lead
    return verdicts


def collapsed_evaluations(state: TrainerState) -> list[int]:
    """Optimizer steps of the latest evaluations in a row that found a collapse; empty if the last one did not."""
    latest_first = list(verdicts_of_evaluations(state).items())[::-1]
    return [step for step, _ in takewhile(lambda item: item[1] is not None, latest_first)][::-1]


@dataclass
class HealthMonitor:
    """
    What `TJEPATrainer` knows of a run's health: the figures of the current step and of an evaluation, the verdict of
    the latest evaluation, and losses and gradients that are not finite.

    Training figures are those of the logged step, evaluation figures those of the whole evaluation set. On a GPU
    nothing is read from the device but in steps that log, evaluate or save.

    A collapse in `patience` evaluations in a row after the warm-up is a lasting one: it is reported as an error and,
    with `stop_on_collapse`, ends training without another checkpoint. Non-finite gradients are counted
    (`nonfinite_gradients` in the log). Under float16 the gradient scaler skips their steps, which is its way to find
    the scale; else they stop the run.

    Args:
        strategy_names (`list[str]`): names of the collator's strategies, in order.
        config (`TJEPAConfig`): the model's, for the weights of the loss terms.
        stop_on_collapse (`bool`, defaults to `False`): whether a lasting collapse ends training.
        patience (`int`, defaults to 3): evaluations in a row.
    """

    strategy_names: list[str]
    config: TJEPAConfig
    stop_on_collapse: bool = False
    patience: int = COLLAPSE_PATIENCE

    def __post_init__(self):
        self.verdict: str | None = None  # of the latest evaluation
        self.must_stop = False
        self.step_statistics: PretrainingStatistics | None = None  # of the current step, if it is going to be logged
        self.num_nonfinite_gradients = 0  # as far as they were counted
        # both on the device: the first step with a non-finite value, or inf, and how many since the last count
        self._first_bad_step: dict[str, torch.Tensor] = {}
        self._new_bad_gradients: torch.Tensor | int = 0

    def new_statistics(self) -> PretrainingStatistics:
        return PretrainingStatistics(self.strategy_names, self.config)

    def watch(self, name: str, value: torch.Tensor, step: int, is_fatal: bool = True) -> None:
        """
        Notes whether a loss or a gradient norm is finite; on the CPU, where asking costs nothing, raises if it is not.

        Args:
            name (`str`): what it is, `"loss"` or `"gradient"`.
            value (`torch.Tensor`): a scalar.
            step (`int`): the optimizer step that it belongs to, from 1.
            is_fatal (`bool`): whether it stops the run; a gradient scaler skips the step instead.
        """
        is_bad = ~torch.isfinite(value.detach())
        if name == "gradient":
            self._new_bad_gradients = self._new_bad_gradients + is_bad.int()
        if is_fatal:
            bad_step = torch.where(is_bad, float(step), math.inf)
            earlier = self._first_bad_step.get(name)
            self._first_bad_step[name] = bad_step if earlier is None else earlier.minimum(bad_step)
            if bad_step.device.type == "cpu":
                self.raise_if_not_finite()

    def raise_if_not_finite(self) -> None:
        """
        Raises:
            FloatingPointError: if a loss or gradient that was watched was not finite.
        """
        for name, first_bad_step in self._first_bad_step.items():
            if (step := first_bad_step.item()) < math.inf:
                self.num_nonfinite_gradients += int(self._new_bad_gradients)
                raise FloatingPointError(f"The {name} was not finite in optimizer step {int(step)}{NOT_FINITE_ADVICE}")

    def count_nonfinite_gradients(self, num_logged: int) -> dict[str, int]:
        """For the log: how many there were in all, `num_logged` of them in the log; empty if there were none."""
        new, self._new_bad_gradients = int(self._new_bad_gradients), 0
        self.num_nonfinite_gradients = num_logged + new
        if new:
            logger.warning(
                f"The gradient was not finite in {new} optimizer steps since the last report, "
                f"{self.num_nonfinite_gradients} in all: the float16 gradient scaler skipped these steps and "
                "lowered its scale. A few are normal; if it goes on, use --bf16 or a lower --learning_rate."
            )
        return {"nonfinite_gradients": self.num_nonfinite_gradients} if self.num_nonfinite_gradients else {}

    def judge(self, metrics: dict[str, float], state: TrainerState, num_warmup_steps: int, is_training: bool) -> None:
        """
        The verdict over an evaluation, which the last entry of the log belongs to. There is none in the warm-up.

        Raises:
            FloatingPointError: in training, if the figures are not finite.
        """
        if "eval_target_std" not in metrics:
            return
        step = state.global_step
        is_untrained_model = is_training and step == 0
        if is_untrained_model or 0 < step <= num_warmup_steps:
            self.verdict = None
            return
        self.verdict = verdicts_of_evaluations(state)[step]
        if self.verdict is None:
            if (rank := metrics["eval_target_rank"]) < MIN_RANK:
                logger.warning(
                    f"The targets use few directions (RankMe {rank:.3f} of the width). That alone is not a collapse: "
                    "judge by a frozen probe against the untrained encoder."
                )
            return
        if is_training and self.verdict.startswith("not finite"):
            raise FloatingPointError(f"The evaluation after step {step} is {self.verdict}{NOT_FINITE_ADVICE}")
        steps = [step for step in collapsed_evaluations(state) if step > num_warmup_steps]
        if len(steps) > 1:
            self.verdict += f"; so in the last {len(steps)} evaluations, since step {steps[0]}"
        is_lasting = len(steps) >= self.patience
        report = logger.error if is_lasting else logger.warning
        report(f"The representations are {self.verdict}. `tjepa health` says what to do (docs/health.md).")
        if is_training and is_lasting and self.stop_on_collapse:
            logger.error(f"Stopping at step {step} without another checkpoint (--stop_on_collapse).")
            self.must_stop = True
