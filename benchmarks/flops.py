"""Useful FLOPs: what the real tokens of a training step need.

Per token and layer 8 d^2 (projections) + 4 d i (MLP), 4 d for every pair of query and key that the attention rule
allows, the target encoder once, the trained parts three times; of the context in the predictor's last layer only keys
and values.
"""

import torch

from tjepa import TJEPAConfig


def stack_flops(tokens: float, pairs: float, width: int, mlp_width: int, layers: int) -> float:
    return float(layers * (tokens * (8 * width**2 + 4 * width * mlp_width) + 4 * width * pairs))


def useful_flops(config: TJEPAConfig, batch: dict, with_attention: bool = True) -> float:
    """From the ids of a step's batch; without attention only those of the linear layers."""
    ids = {name: batch[name].flatten().cpu().long() for name in batch if torch.is_tensor(batch[name])}
    encoder = (config.hidden_size, config.intermediate_size, config.num_hidden_layers)
    predictor = (config.predictor_hidden_size, config.predictor_intermediate_size)
    num_layers = config.predictor_num_hidden_layers

    def encoder_flops(view_ids: torch.Tensor) -> float:
        lengths = view_ids[view_ids >= 0].bincount().double()
        return stack_flops(lengths.sum(), with_attention * lengths.square().sum(), *encoder)

    is_real = ids["prediction_view_ids"] >= 0
    views, blocks = ids["prediction_view_ids"][is_real], ids["prediction_block_ids"][is_real]
    is_slot = blocks > 0
    contexts = views[~is_slot].bincount(minlength=int(views.max()) + 1).double()
    of_block, sizes = torch.stack([views[is_slot], blocks[is_slot]]).unique(dim=1, return_counts=True)
    slot_pairs = (sizes * (contexts[of_block[0]] + sizes)).sum()
    num_slots = float(is_slot.sum())
    slots = stack_flops(num_slots, with_attention * slot_pairs, *predictor, num_layers)
    context_pairs = with_attention * contexts.square().sum()
    context = stack_flops(contexts.sum(), context_pairs, *predictor, num_layers - 1)
    last_keys_and_values = 4 * config.predictor_hidden_size**2 * float(contexts.sum())
    trained = encoder_flops(ids["context_view_ids"]) + context + last_keys_and_values + slots
    return encoder_flops(ids["document_ids"]) + 3 * trained
