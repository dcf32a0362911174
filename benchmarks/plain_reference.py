"""The reference's algorithm written plainly, to measure against: a padded batch, dense boolean masks made by the
collator, and one forward and backward after another for each strategy. Model code, weights and views are ours.
"""

from types import SimpleNamespace

import numpy as np
import torch
from torch.nn import functional as F

from tjepa import TJEPAForPreTraining
from tjepa.data_collator_tjepa import Views


def pad(sequences: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [batch, longest] and a bool mask of the same shape, True at real entries."""
    mask = torch.zeros(len(sequences), max(len(sequence) for sequence in sequences), dtype=torch.bool)
    padded = torch.zeros(mask.shape, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        mask[row, : len(sequence)] = True
        padded[row, : len(sequence)] = torch.from_numpy(sequence)
    return padded, mask


def plain_batch(documents: list[np.ndarray], views: Views, num_strategies: int) -> dict:
    """Padded token ids and, for every strategy, padded positions and a dense [batch, entries, entries] mask."""
    starts = np.cumsum([0] + [len(document) for document in documents])
    input_ids, is_token = pad(documents)
    batch = {"input_ids": input_ids, "attention_mask": is_token, "strategies": []}
    context_bounds = np.searchsorted(views.context_view, np.arange(len(views.document) + 1))
    slot_bounds = np.searchsorted(views.slot_view, np.arange(len(views.document) + 1))
    for strategy in range(num_strategies):
        contexts, slots, blocks = [], [], []
        for view in np.flatnonzero(views.strategy == strategy):
            start = starts[views.document[view]]
            contexts.append(views.context_token[slice(*context_bounds[view : view + 2])] - start)
            slots.append(views.slot_token[slice(*slot_bounds[view : view + 2])] - start)
            blocks.append(views.slot_block[slice(*slot_bounds[view : view + 2])])
        context_positions, is_context = pad(contexts)
        slot_positions, is_slot = pad(slots)
        block_ids, _ = pad(blocks)
        num_contexts, num_slots = is_context.shape[1], is_slot.shape[1]
        mask = torch.zeros(len(contexts), num_contexts + num_slots, num_contexts + num_slots, dtype=torch.bool)
        mask[:, :, :num_contexts] = is_context[:, None, :]
        same_block = (block_ids[:, :, None] == block_ids[:, None, :]) & is_slot[:, None, :]
        mask[:, num_contexts:, num_contexts:] = same_block
        batch["strategies"].append(
            {
                "context_positions": context_positions,
                "context_mask": is_context,
                "slot_positions": slot_positions,
                "slot_mask": is_slot,
                "prediction_mask": mask,
            }
        )
    return batch


def batch_bytes(batch: dict | torch.Tensor | list) -> int:
    if isinstance(batch, torch.Tensor):
        return batch.numel() * batch.element_size()
    if isinstance(batch, SimpleNamespace):  # stays with the host
        return 0
    return sum(batch_bytes(value) for value in (batch.values() if isinstance(batch, dict) else batch))


def plain_forward_backward(model: TJEPAForPreTraining, batch: dict) -> float:
    """
    Strategy after strategy, each with its own backward, so that only one strategy's activations are held. (The
    reference takes one backward of the mean loss, which holds them all.)
    """
    with torch.no_grad():
        labels = model.target_encoder(batch["input_ids"], attention_mask=batch["attention_mask"])[0]
        labels = F.layer_norm(labels, labels.shape[-1:], eps=model.config.layer_norm_eps)
    total = 0.0
    for strategy in batch["strategies"]:
        context_positions, slot_positions = strategy["context_positions"], strategy["slot_positions"]
        context_states = model.context_encoder(
            batch["input_ids"].gather(1, context_positions),
            position_ids=context_positions,
            attention_mask=strategy["context_mask"],
        )[0]
        predictor = model.predictor
        mask_tokens = predictor.mask_token.expand(*slot_positions.shape, -1)
        hidden_states = predictor.in_proj(torch.cat([context_states, mask_tokens], dim=1))
        rotation = predictor.rotary_embedding(torch.cat([context_positions, slot_positions], dim=1))
        attention_mask = strategy["prediction_mask"].unsqueeze(1)
        for layer in predictor.layers:
            hidden_states = layer(hidden_states, rotation, attention_mask=attention_mask)
        slot_states = hidden_states[:, context_positions.shape[1] :][strategy["slot_mask"]]
        predictions = predictor.out_proj(predictor.final_norm(slot_states))
        slot_labels = labels.gather(1, slot_positions[..., None].expand(-1, -1, labels.shape[-1]))
        loss = F.smooth_l1_loss(predictions, slot_labels[strategy["slot_mask"]]) / len(batch["strategies"])
        loss.backward()
        total += loss.item()
    return total
