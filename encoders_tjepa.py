"""How the encoders are fed from a packed batch, and what is taken from them: the noise in what the context encoder
reads, and the labels that the target encoder makes.
"""

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_tjepa import TJEPAConfig


def replace_tokens(input_ids: torch.Tensor, config: TJEPAConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Picks `config.denoising_ratio` of the entries, and replaces every second of these by a token drawn uniformly from
    the vocabulary: what BERT (arXiv 1810.04805) does to the tokens that it predicts and does not mask. Drawn from
    torch's generator, as dropout is: other than the masks, the draw depends on how a step is divided.

    Args:
        input_ids (`torch.LongTensor` of shape `[rows, row_length]`): token ids.

    Returns:
        The token ids with some replaced, and the picked entries' indices in the flattened rows, int64 [num_picked].
    """
    num_picked = max(1, round(config.denoising_ratio * input_ids.numel()))
    picked = torch.randperm(input_ids.numel(), device=input_ids.device)[:num_picked]
    replaced = picked[::2]
    tokens = torch.randint(config.vocab_size, replaced.shape, dtype=input_ids.dtype, device=input_ids.device)
    return input_ids.flatten().index_copy(0, replaced, tokens).view_as(input_ids), picked


def normalise_per_document(states: torch.Tensor, document_ids: torch.Tensor, eps: float) -> torch.Tensor:
    """
    Instance normalisation without parameters: every feature gets mean 0 and variance 1 over the tokens of a document.

    Args:
        states (`torch.FloatTensor` of shape `[num_tokens, hidden_size]`): rows flattened.
        document_ids (`torch.LongTensor` of shape `[num_tokens]`): neighbours of the same id are a document.
        eps (`float`): added to the variance.
    """
    is_new = document_ids.diff(prepend=document_ids[:1]) != 0
    segments = is_new.cumsum(dim=0)  # 0, 0, 0, 1, 1, 2, ...
    counts = torch.zeros_like(states[:, :1]).index_add(0, segments, torch.ones_like(states[:, :1])).clamp(min=1)

    def document_mean(values: torch.Tensor) -> torch.Tensor:
        # room for as many documents as tokens: their number would have to be fetched from the device
        return (torch.zeros_like(values).index_add(0, segments, values) / counts)[segments]

    centred = states - document_mean(states)
    return centred * torch.rsqrt(document_mean(centred.square()) + eps)


def make_labels(
    encoder: nn.Module,
    config: TJEPAConfig,
    input_ids: torch.LongTensor,
    position_ids: torch.LongTensor,
    document_ids: torch.LongTensor,
    label_indices: torch.LongTensor,
    groups: list[tuple[int, int, int]] | None = None,
) -> torch.Tensor:
    """
    What the predictions should be: the target encoder's outputs at the hidden positions, normalised
    (`config.target_normalization`) and averaged over its last `config.target_layers` blocks.

    Args:
        encoder: the target encoder.
        input_ids, position_ids, document_ids (`torch.LongTensor` of shape `[rows, row_length]`): the documents.
        label_indices (`torch.LongTensor` of shape `[num_slots]`): where the labels lie in the flattened rows.
        groups: of equal documents, where they are known; see [`PackedViews`].

    Returns:
        `torch.FloatTensor` of shape `[num_slots, hidden_size]`, float32.
    """
    num_layers, eps = config.target_layers, config.layer_norm_eps
    outputs = encoder(
        input_ids,
        position_ids=position_ids,
        view_ids=document_ids,
        groups=groups,
        output_hidden_states=num_layers > 1,
    )
    layers = [outputs.last_hidden_state] if num_layers == 1 else outputs.hidden_states[-num_layers:]
    labels = []
    for states in layers:
        states = states.flatten(0, 1)
        if config.target_normalization == "instance":
            states = normalise_per_document(states.float(), document_ids.flatten(), eps)
            labels.append(states.index_select(0, label_indices))
        else:
            states = states.index_select(0, label_indices).float()
            labels.append(F.layer_norm(states, states.shape[-1:], eps=eps))
    return torch.stack(labels).mean(dim=0)
