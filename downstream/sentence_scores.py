"""How probable a model with a token head finds a text: the sum over its tokens, each hidden in turn.

This pseudo-log-likelihood (Salazar et al., arXiv 1910.14659) needs no training, and tells whether of two sentences
that differ in one point of grammar the model prefers the good one (Zorro, Huebner et al. 2021; BLiMP).
"""

from collections.abc import Sequence

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..data_collator_tjepa import Views, pack_batch, ragged_arange
from ..modeling_tjepa import TJEPAForMaskedLM, TJEPAForPreTraining
from .embedding import encode_texts, frozen


def why_it_cannot_score(model: torch.nn.Module, tokenizer) -> str | None:
    """What a model lacks for `score_texts`, or `None` where it lacks nothing."""
    if isinstance(model, TJEPAForPreTraining):
        if model.token_head is None:
            return "it was pretrained without token prediction and denoising, so it has no token head"
    elif not type(model).__name__.endswith("ForMaskedLM"):
        return "it has no token head, which pretraining folders with token prediction or denoising and masked LMs have"
    if not _predicts_at_slots(model) and mask_token_of(model, tokenizer) is None:
        return "its tokenizer has no mask token to hide others behind"
    return None


def mask_token_of(model: torch.nn.Module, tokenizer) -> int | None:
    if tokenizer.mask_token_id is not None:
        return tokenizer.mask_token_id
    return getattr(model.config, "mask_token_id", None)


def score_texts(
    model: torch.nn.Module,
    tokenizer,
    texts: Sequence[str],
    max_length: int,
    batch_size: int = 64,
    add_special_tokens: bool | None = None,
) -> Tensor:
    """
    For each text the sum over its tokens of log p(token | all others), in nats.

    A T-JEPA model that learned to predict tokens at target slots gets the token as a slot, others a mask token in its
    place. Special tokens around a text are seen and not scored.

    Args:
        model: `TJEPAForPreTraining` with a token head, or a masked language model of transformers.
        batch_size: places per forward.
        tokenizer, texts, max_length, add_special_tokens: as in `embed_texts`.

    Returns:
        float64 `[num_texts]`.

    Raises:
        ValueError: the model cannot do it (`why_it_cannot_score`), or a text has no second token to be told from.
    """
    if lack := why_it_cannot_score(model, tokenizer):
        raise ValueError(f"{type(model).__name__} cannot score texts: {lack}.")
    options = {"return_special_tokens_mask": True}
    encoded = encode_texts(model, tokenizer, list(texts), max_length, add_special_tokens, **options)
    documents = [np.array(ids, dtype=np.int64) for ids in encoded["input_ids"]]
    for text, document in zip(texts, documents, strict=True):
        if len(document) < 2:
            raise ValueError(f"{text!r} has {len(document)} tokens; it takes two to tell one from the others.")
    by_length = sorted(range(len(documents)), key=lambda text: len(documents[text]))  # little padding
    is_special = encoded["special_tokens_mask"]
    places = [(text, place) for text in by_length for place, special in enumerate(is_special[text]) if not special]
    text_of_place, place = (torch.tensor(numbers) for numbers in zip(*places, strict=True))
    scores = torch.zeros(len(documents), dtype=torch.float64)
    predict = _predict_at_slots if _predicts_at_slots(model) else _predict_at_masks
    with frozen(model):
        for chunk, at in zip(text_of_place.split(batch_size), place.split(batch_size), strict=True):
            chosen, document = chunk.unique(return_inverse=True)
            rows = [torch.from_numpy(documents[text]) for text in chosen.tolist()]
            logits = predict(model, rows, document, at, mask_token_of(model, tokenizer))  # [places, vocab_size]
            answers = torch.stack(
                [rows[row][column] for row, column in zip(document.tolist(), at.tolist(), strict=True)]
            )
            log_probabilities = logits.float().cpu().log_softmax(-1)[torch.arange(len(at)), answers]
            scores.index_add_(0, chunk, log_probabilities.double())
    return scores


def _predicts_at_slots(model: torch.nn.Module) -> bool:
    if not isinstance(model, TJEPAForPreTraining) or model.config.predictor_type == "in_place":
        return False
    return model.config.token_prediction_weight > 0


def _predict_at_slots(
    model: TJEPAForPreTraining, documents: list[Tensor], document: Tensor, place: Tensor, mask_token_id: int | None
) -> Tensor:
    """The token head's logits `[places, vocab_size]` where each place of a document is a slot in a view of its own."""
    document, place = document.numpy(), place.numpy()
    lengths = np.array([len(row) for row in documents])
    starts = (np.cumsum(lengths) - lengths)[document]
    of_view = lengths[document]
    token = np.repeat(starts, of_view) + ragged_arange(of_view)
    view, numbers = np.repeat(np.arange(len(document)), of_view), np.arange(len(document))
    is_visible = token != np.repeat(starts + place, of_view)
    views = Views(
        document=document,
        strategy=np.zeros_like(document),
        context_token=token[is_visible],
        context_view=view[is_visible],
        slot_token=starts + place,
        slot_view=numbers,
        slot_block=np.ones_like(document),
    )
    batch = pack_batch([row.numpy() for row in documents], views, num_strategies=1)
    view_of_slot = batch["prediction_view_ids"].flatten()[batch["slot_indices"]]
    device = next(model.parameters()).device
    logits = model.token_head(model(**send_to_device(batch, device)).predictions, model.get_input_embeddings().weight)
    return logits[view_of_slot.argsort().to(device)]


def _predict_at_masks(
    model: torch.nn.Module, documents: list[Tensor], document: Tensor, place: Tensor, mask_token_id: int
) -> Tensor:
    """The same where each place holds a mask token in a row of its own."""
    numbers = torch.arange(len(document))
    input_ids = pad_sequence(documents, batch_first=True)[document]  # [places, length]
    mask = pad_sequence([torch.ones_like(row) for row in documents], batch_first=True)[document]
    input_ids[numbers, place] = mask_token_id
    device = next(model.parameters()).device
    inputs = {"input_ids": input_ids.to(device), "attention_mask": mask.to(device)}
    # logits at the hidden places alone: a vocabulary is wide
    if isinstance(model, TJEPAForPreTraining):  # its token head has learned from the context encoder's states
        states = model.context_encoder(**inputs).last_hidden_state[numbers, place]
        return model.token_head(states, model.get_input_embeddings().weight)
    if isinstance(model, TJEPAForMaskedLM):
        return model.compute_logits(model.encoder(**inputs).last_hidden_state[numbers, place], None)
    return model(**inputs).logits[numbers, place]


def prefers_good(scores: Tensor, paradigms: Tensor) -> float:
    """
    Args:
        scores: `[2 * num_pairs]`, of the good and the bad sentence of each pair, one after the other.
        paradigms: int64 `[2 * num_pairs]`, of both sentences of a pair the same.

    Returns:
        How often the good sentence has the higher score (half where equal), the mean over paradigms.
    """
    good, bad = scores.view(-1, 2).unbind(1)
    is_right = (torch.sign(good - bad) + 1) / 2
    return torch.stack([is_right[paradigms[::2] == one].mean() for one in paradigms.unique()]).mean().item()
