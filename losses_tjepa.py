"""The terms of the pretraining loss: distances of predictions and labels, their mean over strategies, regularisers."""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from .configuration_tjepa import TJEPAConfig


def distance_to_labels(config: TJEPAConfig, predictions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`config.loss_type` of each slot: two float [num_slots, hidden_size] -> [num_slots]."""
    if config.loss_type == "cosine":
        return 1.0 - F.cosine_similarity(predictions, labels, dim=-1)
    if config.loss_type == "l2":
        return F.mse_loss(predictions, labels, reduction="none").mean(dim=-1)
    beta = 0.0 if config.loss_type == "l1" else config.smooth_l1_beta
    return F.smooth_l1_loss(predictions, labels, beta=beta, reduction="none").mean(dim=-1)


def mean_over_strategies(
    loss_per_slot: torch.Tensor, slot_strategy_ids: torch.Tensor, slots_per_strategy: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Each strategy counts equally, however many slots it has: the mean over strategies of the mean over their slots.

    Args:
        loss_per_slot (`torch.FloatTensor` of shape `[num_slots]`): losses.
        slot_strategy_ids (`torch.LongTensor` of shape `[num_slots]`): strategy of each slot.
        slots_per_strategy (`torch.Tensor` of shape `[num_strategies]`):
            How often each occurs among them; where the batch is a share of a larger one, how often on average in a
            share, a fraction (see [`TJEPAForPreTraining.forward`]).

    Returns:
        The loss (scalar) and the loss per strategy [num_strategies], 0 where a strategy has no slot in the batch.
    """
    sums = loss_per_slot.new_zeros(len(slots_per_strategy)).index_add(0, slot_strategy_ids, loss_per_slot)
    has_slots = slots_per_strategy > 0
    loss_per_strategy = sums / slots_per_strategy.masked_fill(~has_slots, 1)
    return loss_per_strategy.sum() / has_slots.sum().clamp(min=1), loss_per_strategy


def pool(states: torch.Tensor, groups: torch.Tensor, is_token: torch.Tensor, num_groups: int) -> torch.Tensor:
    """
    Mean states of groups of tokens, float32 [num_groups, hidden_size]; 0 for a group without a token.

    Args:
        states (`torch.FloatTensor` of shape `[num_entries, hidden_size]`): states.
        groups (`torch.LongTensor` of shape `[num_entries]`): the group of each entry, below `num_groups`.
        is_token (`torch.BoolTensor` of shape `[num_entries]`): False for padding, which does not count.
    """
    weights, groups = is_token.float().unsqueeze(-1), groups.long().clamp(min=0)
    sums = states.new_zeros(max(1, num_groups), states.shape[-1], dtype=torch.float32)  # padding needs a place
    counts = sums[:, :1].index_add(0, groups, weights).clamp(min=1)
    return (sums.index_add(0, groups, states.float() * weights) / counts)[:num_groups]


def contrastive_loss(
    queries: torch.Tensor,
    keys: torch.Tensor,
    answers: torch.Tensor,
    temperature: float,
    left_out: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    InfoNCE (arXiv 1807.03748): cross entropy of choosing each query's key by their cosines; 0 without a query.

    Args:
        queries, keys (`torch.FloatTensor` of shape `[num_queries, hidden_size]` and `[num_keys, hidden_size]`):
            What is compared; keys without direction (0) are chosen like any other.
        answers (`torch.LongTensor` of shape `[num_queries]`): which key is right; -100: the query does not count.
        temperature: cosines are divided by it.
        left_out (`torch.BoolTensor` of shape `[num_queries, num_keys]`, *optional*): keys that are not to choose from.
    """
    with torch.autocast(device_type=queries.device.type, enabled=False):  # cosines of 0.99 are told apart
        logits = F.normalize(queries.float(), dim=-1) @ F.normalize(keys.float(), dim=-1).T / temperature
    if left_out is not None:
        logits = logits.masked_fill(left_out, torch.finfo(logits.dtype).min)
    return F.cross_entropy(logits, answers, reduction="sum") / (answers >= 0).sum().clamp(min=1)


def pooled_loss(
    seen: torch.Tensor, hidden: torch.Tensor, view_documents: torch.Tensor, temperature: float
) -> torch.Tensor:
    """
    Which hidden part belongs to what is seen: [`contrastive_loss`] of the mean state of what is seen of each view
    against those of what is hidden of it and of the views of other documents.

    Args:
        seen, hidden (`torch.FloatTensor` of shape `[num_views, hidden_size]`):
            Mean states, the context encoder's of what is seen and the target encoder's of what is hidden, by itself.
        view_documents (`torch.LongTensor` of shape `[num_views]`): the document of each view.
        temperature: cosines are divided by it.
    """
    numbers = torch.arange(len(view_documents), device=view_documents.device)
    same_document = (view_documents[:, None] == view_documents) & (numbers[:, None] != numbers)
    return contrastive_loss(seen, hidden, numbers, temperature, same_document)


# LeJEPA's knots; fewer directions than there, because tokens are many and every call draws new ones
SIGREG_DIRECTIONS, SIGREG_KNOTS = 64, 17


def variance_covariance_loss(
    states: torch.Tensor,
    is_token: torch.Tensor,
    sum_over_processes: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """
    The variance and covariance terms of VICReg (arXiv 2105.04906), features centred over the batch, C = z'z / N:

        mean_j max(0, 1 - sqrt(C_jj + 1e-4)) + 0.04 * (1/d) * sum_{i != j} C_ij^2

    Args:
        states (`torch.FloatTensor` of shape `[num_entries, hidden_size]`): the context encoder's output z.
        is_token (`torch.BoolTensor` of shape `[num_entries]`): False for padding, which does not count.
        sum_over_processes (`Callable`, *optional*): see [`TJEPAForPreTraining.forward`].
    """
    total = sum_over_processes or (lambda tensor: tensor)
    with torch.autocast(device_type=states.device.type, enabled=False):
        num_tokens = total(is_token.sum()).clamp(min=1)
        states = states.float() * is_token.unsqueeze(-1)
        centred = (states - total(states.sum(dim=0)) / num_tokens) * is_token.unsqueeze(-1)
        covariance = total(centred.T @ centred) / num_tokens  # [hidden_size, hidden_size]
        variances = covariance.diagonal()
        variance_loss = F.relu(1.0 - torch.sqrt(variances + 1e-4)).mean()
        covariance_loss = (covariance.square().sum() - variances.square().sum()) / len(variances)
    return variance_loss + 0.04 * covariance_loss


def sigreg_loss(
    states: torch.Tensor,
    is_token: torch.Tensor,
    sum_over_processes: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """
    SIGReg of LeJEPA (arXiv 2511.08544): the test statistic of Epps and Pulley for N(0, 1), averaged over random
    directions a of unit length. With the empirical characteristic function phi_a(t) = 1/N sum_n exp(i t a'z_n):

        mean_a integral_{-3}^{3} |phi_a(t) - exp(-t^2/2)|^2 exp(-t^2/2) dt

    by the trapezoidal rule on 17 knots of [0, 3], twice. The paper's statistic is N times this; without it the weight
    means the same for every batch size.

    The directions come anew from torch's generator in every call. On several processes the sum of their draws is
    used, so that all have the same, and N and phi_a are those of the batch of all processes.

    Args:
        states, is_token, sum_over_processes: as in [`variance_covariance_loss`].
    """
    total = sum_over_processes or (lambda tensor: tensor)
    with torch.autocast(device_type=states.device.type, enabled=False):
        directions = torch.randn(states.shape[-1], SIGREG_DIRECTIONS, device=states.device)
        projections = states.float() @ F.normalize(total(directions), dim=0)  # [num_entries, directions]
        knots = torch.linspace(0.0, 3.0, SIGREG_KNOTS, device=states.device)
        gaussian = torch.exp(-knots.square() / 2)  # the characteristic function of N(0, 1), and the window
        angles = projections.unsqueeze(-1) * knots  # [num_entries, directions, knots]
        waves = torch.stack([angles.cos(), angles.sin()])  # the real and the imaginary part of exp(i t a'z)
        waves = torch.einsum("wndk,n->wdk", waves, is_token.to(waves.dtype))
        cosines, sines = total(waves) / total(is_token.sum()).clamp(min=1)
        errors = (cosines - gaussian).square() + sines.square()
        return 2.0 * torch.trapezoid(errors * gaussian, knots).mean()  # the integrand is even
