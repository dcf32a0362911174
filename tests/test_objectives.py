"""Mask tokens in place, segments, and pooled states: each against the plain way to compute it."""

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch.nn import functional as F

from helpers import TINY, arguments, make_examples, make_tiny_config, run
from tjepa import TJEPAConfig, TJEPAForMaskedLM, TJEPAForPreTraining
from tjepa.corpus.segments import SegmentCollator, cut_into_segments
from tjepa.data_collator_tjepa import DataCollatorForTJEPA, MaskingStrategy
from tjepa.encoders_tjepa import hide_in_place
from tjepa.losses_tjepa import contrastive_loss, pool, pooled_loss


SINGLE = [MaskingStrategy(1, max_target_mask_ratio=0.3)]
IN_PLACE = {"predictor_type": "in_place", "mask_token_id": 3, "token_prediction_weight": 1.0}
LENGTHS = [40, 23, 7, 64, 2]


def in_place(collator: DataCollatorForTJEPA, **overrides) -> DataCollatorForTJEPA:
    collator.fit_to(TJEPAConfig(**IN_PLACE, **overrides))
    return collator


def close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


# --- Mask tokens in place --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row_length", [None, max(LENGTHS), 96])
@torch.no_grad()
def test_in_place_is_masked_language_modelling_with_labels(make_model, row_length):
    model = make_model(**IN_PLACE).eval()
    examples = make_examples(LENGTHS)
    batch = in_place(DataCollatorForTJEPA(SINGLE, row_length=row_length))(examples)
    output = model(**batch)

    masked_lm = TJEPAForMaskedLM(model.config).eval()
    masked_lm.encoder.load_state_dict(model.context_encoder.state_dict())
    masked_lm.token_head.load_state_dict(model.token_head.state_dict())
    losses, labels = [], []
    documents = batch["document_ids"].flatten()[batch["label_indices"]]
    places = batch["position_ids"].flatten()[batch["label_indices"]]
    for number, example in enumerate(examples):
        tokens = torch.from_numpy(example["input_ids"])[None]
        hidden = places[documents == number].long()
        seen = tokens.index_fill(1, hidden, 3)
        logits = masked_lm(seen).logits[0, hidden]
        losses.append(F.cross_entropy(logits, tokens[0, hidden], reduction="none"))
        states = model.target_encoder(tokens).last_hidden_state[0, hidden]
        predictions = model.predictor(model.context_encoder(seen).last_hidden_state[0, hidden])
        labels.append(F.smooth_l1_loss(predictions, F.layer_norm(states, states.shape[-1:]), reduction="none").mean(1))
    close(output.token_prediction_loss, torch.cat(losses).mean())
    close(output.jepa_loss, torch.cat(labels).mean())


def test_in_training_some_hidden_places_get_other_tokens(make_model):
    config = make_model(**IN_PLACE).config
    torch.manual_seed(0)
    tokens, hidden = torch.full((1, 5000), 7), torch.arange(0, 5000, 2)
    seen = hide_in_place(tokens, hidden, config, training=True).flatten()
    assert (seen[1::2] == 7).all()
    shares = [(seen[hidden] == token).float().mean().item() for token in (3, 7)]
    assert shares == [pytest.approx(0.8, abs=0.03), pytest.approx(0.1, abs=0.03)]
    assert len(seen[hidden].unique()) > 40  # the rest is spread over the vocabulary of 60
    assert (hide_in_place(tokens, hidden, config, training=False).flatten()[hidden] == 3).all()


def test_what_in_place_needs_is_named(make_model):
    examples = make_examples(LENGTHS)
    model = make_model(**IN_PLACE)
    with pytest.raises(ValueError, match="collator.fit_to"):
        model(**DataCollatorForTJEPA(SINGLE)(examples))
    model.config.mask_token_id = None
    with pytest.raises(ValueError, match="mask_token_id"):
        model(**in_place(DataCollatorForTJEPA(SINGLE))(examples))


@pytest.mark.parametrize("options", [{"predictor_type": "in_place", "segment_weight": 1.0}, {}])
def test_a_mask_token_may_be_one_that_the_vocabulary_is_about_to_get(options, tmp_path):
    config = make_tiny_config(**options)
    config.mask_token_id, config.special_token_ids = 60, [61]
    model = TJEPAForPreTraining(config)
    with pytest.raises(StrictDataclassError, match="mask_token_id must be in the vocabulary, .* = 59, got 60"):
        model.save_pretrained(tmp_path)
    model.resize_token_embeddings(62)
    model.save_pretrained(tmp_path)


def test_denoising_leaves_hidden_places(make_model):
    model = make_model(**IN_PLACE, denoising_weight=1.0, denoising_ratio=1.0, attn_implementation="eager").train()
    batch = in_place(DataCollatorForTJEPA(SINGLE))(make_examples(LENGTHS))
    seen = []
    model.context_encoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].flatten()), with_kwargs=True
    )
    output = model(**batch)
    hidden = batch["hidden_indices"].long()
    assert 0.6 < (seen[0][hidden] == 3).float().mean() < 0.95  # 0.8, as without denoising
    clean = batch["input_ids"].flatten()[batch["context_indices"]].flatten()
    logits = model.token_head(output.context_states, model.get_input_embeddings().weight)
    losses = F.cross_entropy(logits, clean.long(), reduction="none")
    is_visible = torch.ones(len(clean), dtype=torch.bool).index_fill(0, hidden, False)
    close(output.denoising_loss, losses[is_visible].mean())


def test_in_place_refuses_what_would_leave_tokens_out():
    with pytest.raises(ValueError, match="leave out mask_recurring_targets and max_context_ratio"):
        in_place(DataCollatorForTJEPA(SINGLE, mask_recurring_targets=True))
    with pytest.raises(ValueError, match="leave out"):
        in_place(DataCollatorForTJEPA([MaskingStrategy(1, max_context_ratio=0.5)]))


# --- Segments and pooled states --------------------------------------------------------------------------------------


def test_pieces_are_even_and_lose_nothing():
    documents = [np.arange(n) for n in (2, 16, 17, 40)]
    pieces, counts = cut_into_segments(documents, 16)
    assert counts.tolist() == [1, 1, 2, 3]
    assert [len(piece) for piece in pieces] == [2, 16, 9, 8, 14, 13, 13]
    for document, of_document in zip(documents, np.split(np.arange(7), np.cumsum(counts)[:-1]), strict=True):
        assert np.concatenate([pieces[i] for i in of_document]).tolist() == document.tolist()
    with pytest.raises(ValueError, match="at least 4 tokens, got 3"):
        SegmentCollator(segment_length=3)


def mean_state(encoder, tokens, position_ids=None) -> torch.Tensor:
    return encoder(tokens[None], position_ids=position_ids).last_hidden_state[0].mean(dim=0)


@pytest.mark.parametrize("row_length", [None, 96])
def test_the_pooled_loss_equals_that_of_single_views(make_model, row_length):
    """Two of three strategies a document: each view against the hidden parts of all views of other documents."""
    model = make_model(pooled_weight=0.5)
    strategies = [*SINGLE, MaskingStrategy(3, max_target_mask_ratio=0.5), MaskingStrategy(8)]
    examples, around = make_examples(LENGTHS), ([1], [2, 2])
    collator = DataCollatorForTJEPA(strategies, row_length=row_length, views_per_document=2, special_tokens=around)
    with pytest.raises(ValueError, match="collator.fit_to"):
        model(**collator(examples))
    collator.fit_to(model.config)
    batch = collator(examples)
    output = model(**batch)
    close(output.loss, output.jepa_loss + 0.5 * output.pooled_loss)

    views, contexts = batch["context_view_ids"].flatten(), batch["context_indices"].flatten().long()
    slot_views = batch["prediction_view_ids"].flatten()[batch["slot_indices"].long()]
    documents, positions = batch["document_ids"].flatten(), batch["position_ids"].flatten().long()
    seen, hidden, owners = [], [], []
    for view in range(2 * len(LENGTHS)):
        places = contexts[views == view]
        document = [*around[0], *examples[documents[places[0]]]["input_ids"], *around[1]]
        visible, targets = positions[places], positions[batch["label_indices"].long()[slot_views == view]]
        tokens = torch.as_tensor(document)
        seen.append(mean_state(model.context_encoder, tokens[visible], visible[None]))
        part = torch.tensor([*around[0], *tokens[targets], *around[1]])  # a text of its own
        hidden.append(mean_state(model.target_encoder, part).detach())
        owners.append(int(documents[places[0]]))
    losses = []
    for view, owner in enumerate(owners):
        choice = [view, *(other for other in range(len(owners)) if owners[other] != owner)]
        similarity = F.cosine_similarity(seen[view], torch.stack([hidden[other] for other in choice]), dim=-1)
        losses.append(-torch.log_softmax(similarity / 0.05, dim=0)[0])
    close(output.pooled_loss, torch.stack(losses).mean())


@torch.no_grad()
def test_what_is_seen_is_pooled_without_hidden_places(make_model):
    model = make_model(**IN_PLACE, pooled_weight=1.0).eval()
    batch = in_place(DataCollatorForTJEPA(SINGLE), pooled_weight=1.0)(make_examples(LENGTHS))
    output = model(**batch)
    views, parts = batch["context_view_ids"].flatten(), batch["hidden_parts"]
    is_seen = torch.ones(len(views), dtype=torch.bool).index_fill(0, batch["hidden_indices"].long(), False)
    seen = torch.stack([output.context_states[is_seen & (views == view)].mean(dim=0) for view in views.unique()])
    states = model.target_encoder(parts["input_ids"], None, parts["position_ids"], view_ids=parts["document_ids"])
    hidden = pool(states[0][0], parts["document_ids"].flatten(), parts["document_ids"].flatten() >= 0, len(seen))
    close(output.pooled_loss, pooled_loss(seen, hidden, parts["view_documents"], 0.05))


def test_an_empty_batch_of_segments_trains_nothing(make_model):
    """A process's share of a step may be one."""
    model = make_model(segment_weight=0.3, pooled_weight=0.3).train()
    collator = SegmentCollator(segment_length=16)
    collator.fit_to(model.config)
    loss = model(**collator([])).loss
    loss.backward()
    assert loss == 0 and all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("row_length", [None, 96])
def test_the_segment_loss_equals_that_of_single_segments(make_model, row_length):
    model = make_model(segment_weight=0.25)
    examples = make_examples(LENGTHS)
    collator = SegmentCollator(SINGLE, row_length=row_length, segment_length=10)
    batch = collator(examples)
    output = model(**batch)
    close(output.loss, output.jepa_loss + 0.25 * output.segment_loss)

    pieces, counts = cut_into_segments([example["input_ids"] for example in examples], 10)
    views = batch["context_view_ids"].flatten()
    contexts = batch["context_indices"].flatten()
    pooled, keys = [], []
    for number, piece in enumerate(pieces):
        keys.append(mean_state(model.target_encoder, torch.from_numpy(piece)))
        places = batch["position_ids"].flatten()[contexts[views == number].long()].long()
        pooled.append(mean_state(model.context_encoder, torch.from_numpy(piece)[places], places[None]))
    pooled, keys = torch.stack(pooled), torch.stack(keys).detach()

    segments, losses = batch["segments"], []
    of_slot = segments["input_ids"].flatten()[segments["label_indices"]].tolist()
    assert len(of_slot) == sum(count // 2 for count in counts)
    for first, count in zip(np.cumsum(counts) - counts, counts, strict=True):
        hidden = [number for number in of_slot if first <= number < first + count]
        visible = [number for number in range(first, first + count) if number not in hidden]
        for number in hidden:  # one at a time: none sees another
            order = torch.tensor([*visible, number])[None]
            row = torch.arange(order.shape[1])[None]
            guess = model.segment_predictor(
                pooled, order, order - first, torch.zeros_like(row), (order == number).long(), row[0, -1:]
            )
            similarity = F.cosine_similarity(guess, keys - keys.mean(dim=0), dim=-1) / 0.05
            losses.append(F.cross_entropy(similarity, torch.tensor(number)))
    close(output.segment_loss, torch.stack(losses).mean())

    output.loss.backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_segments_are_asked_for(make_model, batch):
    with pytest.raises(ValueError, match="SegmentCollator"):
        make_model(segment_weight=1.0)(**batch)


def test_no_gradient_reaches_a_hidden_segment(make_model):
    model = make_model(segment_weight=1.0)
    batch = SegmentCollator(SINGLE, segment_length=10)(make_examples([20]))
    hidden = batch["segments"]["label_indices"].tolist()
    output = model(**batch)
    assert len(hidden) == 1
    (gradient,) = torch.autograd.grad(output.segment_loss, output.context_states)
    is_hidden = batch["context_view_ids"].flatten() == batch["segments"]["input_ids"].flatten()[hidden[0]]
    assert gradient[is_hidden].abs().max() == 0 < gradient[~is_hidden].abs().max()


def test_a_batch_without_a_second_segment_has_no_segment_loss(make_model):
    model = make_model(segment_weight=1.0)
    output = model(**SegmentCollator(SINGLE, segment_length=10)(make_examples([9, 5])))
    assert output.segment_loss == 0
    output.loss.backward()


def test_masks_of_segments_do_not_depend_on_the_batch():
    collator = SegmentCollator(SINGLE, segment_length=8)
    together, alone = collator(make_examples([30, 30])), collator(make_examples([30, 30])[1:])
    of_second = together["segments"]["input_ids"].flatten()[together["segments"]["label_indices"].long()]
    of_second = of_second[of_second >= 4] - 4
    assert of_second.tolist() == alone["segments"]["input_ids"].flatten()[alone["segments"]["label_indices"]].tolist()


def test_the_contrastive_loss_is_zero_where_only_the_answer_is_near():
    keys = torch.eye(4)
    assert contrastive_loss(keys[[2, 0]], keys, torch.tensor([2, 0]), 0.01) < 1e-6
    assert contrastive_loss(keys[[2, 0]], keys, torch.tensor([1, 0]), 0.5).item() == pytest.approx(
        np.mean([np.log(np.exp(2) + 3), np.log(np.exp(2) + 3) - 2])
    )


# --- A run -----------------------------------------------------------------------------------------------------------


def test_the_contrastive_loss_is_float32():
    torch.manual_seed(0)
    keys = torch.randn(64) + 0.1 * torch.randn(64, 64)  # all alike
    expected = contrastive_loss(keys + 0.01, keys, torch.arange(64), 0.01)
    with torch.autocast("cpu", torch.bfloat16):
        close(contrastive_loss(keys + 0.01, keys, torch.arange(64), 0.01), expected)


def test_a_run_with_all_of_them_saves_and_goes_on(inputs, tmp_path, monkeypatch):
    options = {
        "config_overrides": f"{TINY},{'predictor_type=in_place,segment_weight=0.3,pooled_weight=0.1'}",
        "masking_strategies": "single_tokens",
        "segment_length": 8,
        "max_steps": 2,
    }
    run(monkeypatch, arguments(inputs, tmp_path / "out", **options))
    model = TJEPAForPreTraining.from_pretrained(tmp_path / "out")
    assert model.config.mask_token_id is not None
    assert model.segment_predictor is not None
    more = {**options, "config_overrides": None, "tokenizer_name": None, "model_name_or_path": tmp_path / "out"}
    run(monkeypatch, arguments(inputs, tmp_path / "more", **more))


@pytest.mark.parametrize(("overrides", "length"), [("segment_weight=0.3", None), ("", 8)])
def test_segments_are_cut_and_predicted_or_neither(inputs, tmp_path, monkeypatch, overrides, length):
    flags = arguments(inputs, tmp_path, config_overrides=f"{TINY},{overrides}", segment_length=length)
    with pytest.raises(ValueError, match="set both, or neither"):
        run(monkeypatch, flags)
