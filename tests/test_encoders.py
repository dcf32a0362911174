"""Other encoders of transformers: packed rows, padded rows and single texts give the same states; nothing that is
hidden reaches them; what is saved is what transformers saves."""

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForPreTraining,
    AutoModelForTextEncoding,
    BertConfig,
    BertForMaskedLM,
    CLIPVisionConfig,
    ResNetConfig,
    UMT5Config,
    ViTConfig,
)

from encoder_families import (
    COUNTS_FROM_PADDING,
    MASK,
    NUM_TOKENS,
    PACKED,
    PADDED,
    PREFIX,
    REFUSED,
    SUFFIX,
    make_encoder,
)
from helpers import make_tiny_config
from tjepa import TJEPAConfig, TJEPAForPreTraining, TJEPAForSequenceClassification, TJEPAModel
from tjepa.data_collator_tjepa import DataCollatorForTJEPA, MaskingStrategy
from tjepa.encoders_tjepa import encode, lengths_of_views, measure_encoder, replace_tokens
from tjepa.layers_tjepa import PACKED_ATTENTION, PackedViews


ALL = {**PACKED, **PADDED}
SMALL_PREDICTOR = {
    "predictor_type": "boundary",
    "token_prediction_weight": 1.0,
    "mask_token_id": MASK,
    "special_token_ids": [*PREFIX, *SUFFIX],
}
STRATEGIES = [MaskingStrategy(3, max_target_mask_ratio=0.4), MaskingStrategy(None, max_target_mask_ratio=0.25)]


def make_documents(lengths: tuple[int, ...] = (57, 33, 12)) -> list[dict]:
    rng = np.random.default_rng(0)
    return [
        {"input_ids": rng.integers(5, NUM_TOKENS, size=length), "document_index": index, "epoch": 0}
        for index, length in enumerate(lengths)
    ]


def make_batch(row_length: int | None = None, **options) -> dict:
    collator = DataCollatorForTJEPA(STRATEGIES, special_tokens=(PREFIX, SUFFIX), row_length=row_length, **options)
    collator.hidden_parts = True
    return collator(make_documents())


def make_pretraining_model(encoder, **overrides) -> TJEPAForPreTraining:
    torch.manual_seed(1)
    return TJEPAForPreTraining.from_encoder(
        encoder, TJEPAConfig(encoder=encoder.config, **{**SMALL_PREDICTOR, **overrides})
    )


def encode_stream(model: TJEPAForPreTraining, batch: dict, stream: str) -> tuple[torch.Tensor, torch.Tensor]:
    """States and view ids of the entries of one stream of a batch, by the way that the model takes."""
    traits = model.measure_encoders()
    if stream == "documents":
        ids = [batch[name] for name in ("input_ids", "position_ids", "document_ids")]
        lengths = batch["document_ids"][batch["document_ids"] >= 0].bincount()
    else:
        at = batch["context_indices"]
        ids = [batch["input_ids"].flatten()[at], batch["position_ids"].flatten()[at], batch["context_view_ids"]]
        lengths = lengths_of_views(batch["document_ids"], at, batch["context_view_ids"])
    groups = getattr(batch["view_groups"], stream, None)
    with torch.no_grad():
        (states,) = encode(model.context_encoder, model.config, traits, *ids, groups, lengths)
    return states, ids


def states_one_by_one(encoder, batch: dict, stream: str) -> torch.Tensor:
    """The plainest way: each view alone, as a text of its document's length in which hidden tokens are masked out."""
    document_ids, documents = batch["document_ids"].flatten(), {}
    for index in document_ids[document_ids >= 0].unique().tolist():
        documents[index] = batch["input_ids"].flatten()[document_ids == index].long()
    if stream == "documents":
        order = dict.fromkeys(document_ids[document_ids >= 0].tolist())
        with torch.no_grad():
            return torch.cat([encoder(input_ids=documents[index][None])[0][0] for index in order])
    at, view_ids = batch["context_indices"].flatten().long(), batch["context_view_ids"].flatten()
    states = []
    for view in dict.fromkeys(view_ids[view_ids >= 0].tolist()):
        entries = at[view_ids == view]
        tokens = documents[int(document_ids[entries[0]])].clone()
        is_visible = torch.zeros(len(tokens), dtype=torch.long)
        positions = batch["position_ids"].flatten()[entries].long()
        is_visible[positions] = 1
        tokens[is_visible == 0] = MASK
        with torch.no_grad():
            states.append(encoder(input_ids=tokens[None], attention_mask=is_visible[None])[0][0][positions])
    return torch.cat(states)


@pytest.mark.parametrize("model_type", ALL)
@pytest.mark.parametrize("row_length", [None, 128])
def test_states_are_those_of_texts_one_by_one(model_type, row_length):
    encoder, batch = make_encoder(model_type), make_batch(row_length)
    model = make_pretraining_model(encoder)
    traits = model.encoder_traits
    assert traits.is_packed == (model_type in PACKED)
    assert not traits.is_packed or traits.position_offset == (2 if model_type in COUNTS_FROM_PADDING else 0)
    for stream in ("documents", "contexts"):
        states, (_, _, view_ids) = encode_stream(model, batch, stream)
        expected = states_one_by_one(encoder, batch, stream)
        assert expected.abs().mean() > 0.1
        states = states[view_ids.flatten() >= 0]
        torch.testing.assert_close(states, expected, rtol=0, atol=3e-5 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("model_type", PACKED)
def test_packed_is_padded(model_type):
    encoder, batch = make_encoder(model_type), make_batch()
    results = []
    for way in ("packed", "padded"):
        model = make_pretraining_model(encoder, encoder_input=way, pooled_weight=0.5).train()
        assert model.encoder_traits.is_packed == (way == "packed")
        loss = model(**batch).loss
        loss.backward()
        results.append((loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (loss, gradients), (other_loss, other_gradients) = results
    torch.testing.assert_close(other_loss, loss, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == other_gradients.keys()
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(other_gradients[name], gradient, rtol=0, atol=float(2e-5 * largest), msg=name)


@pytest.mark.parametrize("model_type", ALL)
def test_nothing_hidden_leaks_and_unused_parameters_are_frozen(model_type):
    model, batch = make_pretraining_model(make_encoder(model_type)).train(), make_batch()
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    document_ids, visible = batch["document_ids"].flatten(), torch.zeros(batch["input_ids"].numel(), dtype=torch.bool)
    first = batch["context_view_ids"].flatten() == int(batch["context_view_ids"].flatten()[0])
    entries = batch["context_indices"].flatten()[first].long()
    visible[entries] = True
    hidden = (document_ids == document_ids[entries[0]]) & ~visible
    assert hidden.any()
    changed["input_ids"].view(-1)[hidden] = MASK + 1
    before, after = (model(**inputs) for inputs in (batch, changed))
    assert after.context_states[first].equal(before.context_states[first])
    assert not after.labels.equal(before.labels), "the target encoder sees the whole document"
    before.loss.backward()
    for name, parameter in model.context_encoder.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
        assert not (parameter.requires_grad and name in model.encoder_traits.unused_parameters), name


@pytest.mark.parametrize("model_type", ALL)
def test_what_is_saved_is_what_transformers_saves(model_type, tmp_path):
    encoder = make_encoder(model_type)
    model = make_pretraining_model(encoder, predictor_type="self_attention", predictor_num_hidden_layers=1)
    model.target_encoder.save_pretrained(tmp_path / "stock")
    assert "tjepa" not in (tmp_path / "stock" / "config.json").read_text()
    auto_class = AutoModelForTextEncoding if model_type in ("t5", "umt5") else AutoModel
    stock, info = auto_class.from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert type(stock) is type(encoder) and not info["missing_keys"] and not info["unexpected_keys"]
    assert stock.config._attn_implementation == encoder.config._attn_implementation
    batch = make_batch()
    input_ids = batch["input_ids"][:, :20].long()
    with torch.no_grad():
        assert stock(input_ids=input_ids)[0].equal(encoder(input_ids=input_ids)[0])

    model.save_pretrained(tmp_path / "pretraining")
    saved = load_file(tmp_path / "pretraining" / "model.safetensors")
    assert saved.keys() == model.state_dict().keys() - model.all_tied_weights_keys, "the Trainer resumes by these"
    again, info = TJEPAForPreTraining.from_pretrained(tmp_path / "pretraining", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, tensor in model.state_dict().items():
        assert again.state_dict()[name].equal(tensor), name
    assert again.eval()(**batch).loss.equal(model.eval()(**batch).loss)


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_cannot_be_trained_is_refused_with_what_was_measured(model_type):
    message = "does not look ahead" if model_type in ("gpt2", "llama") else "change the states of others, by .e"
    with pytest.raises(ValueError, match=message):
        make_pretraining_model(make_encoder(model_type))


def test_another_attention_mask_would_lose_the_window():
    """What the measurement is for: with a plain mask of its views, ModernBERT runs, and its local layers see all."""
    encoder, batch = make_encoder("modernbert"), make_batch()
    expected = states_one_by_one(encoder, batch, "documents")
    ids = batch["document_ids"]
    mask = (ids[:, :, None] == ids[:, None])[:, None]
    with torch.no_grad():
        states = encoder(batch["input_ids"].long(), attention_mask=mask, position_ids=batch["position_ids"].long())[0]
    assert (states[0] - expected).abs().max() > 1.0


def test_a_window_wider_than_every_document_needs_no_mask():
    views = PackedViews.from_groups([(2, 3, 0)])
    views.positions = torch.tensor([0, 4, 9, 0, 1, 2])
    views.longest = 10
    assert views.masks(None) == views.masks(10) == [None]
    (mask,) = views.masks(5)
    assert mask.tolist() == [[[[1, 1, 0], [1, 1, 0], [0, 0, 1]]], [[[1] * 3] * 3]]
    assert views.masks(5)[0] is mask, "made once for all layers"
    views.longest = None
    assert views.masks(10)[0].all()


@pytest.mark.parametrize("model_type", ["bert", "modernbert"])
def test_the_registered_attention_is_sdpa_without_packed_rows(model_type):
    encoder = make_encoder(model_type)
    tokens, mask = torch.arange(5, 105).view(2, 50), torch.ones(2, 50, dtype=torch.long)
    mask[1, 30:] = 0
    with torch.no_grad():
        expected = [encoder(tokens)[0], encoder(tokens, attention_mask=mask)[0]]
        encoder.set_attn_implementation("tjepa_packed")
        assert encoder(tokens)[0].equal(expected[0])
        assert encoder(tokens, attention_mask=mask)[0].equal(expected[1])


def test_what_is_no_encoder_of_its_configuration_is_refused():
    encoder = make_encoder("bert")
    whole = BertForMaskedLM(encoder.config)
    TJEPAForPreTraining.from_encoder(whole.bert)  # has no pooler, which no state depends on
    with pytest.raises(ValueError, match="BertForMaskedLM is not the BertModel that its configuration stands for"):
        TJEPAForPreTraining.from_encoder(whole)
    narrow = TJEPAConfig(encoder=BertConfig(**{**encoder.config.to_dict(), "hidden_size": 16}))
    with pytest.raises(
        ValueError, match=r"BertModel has not the sizes .*embeddings.weight is \[\d+, 32\], and \[\d+, 16\]"
    ):
        TJEPAForPreTraining.from_encoder(encoder, narrow)
    with pytest.raises(ValueError, match="needs a model: load it with AutoModel.from_pretrained. Got 'bert'"):
        TJEPAForPreTraining.from_encoder("bert")
    with pytest.raises(ValueError, match=r"needs TJEPAConfig\(encoder=encoder.config"):
        TJEPAForPreTraining.from_encoder(encoder, TJEPAConfig(predictor_type="boundary"))


ONE_LAYER = {"num_hidden_layers": 1, "hidden_size": 24, "intermediate_size": 24}


@pytest.mark.parametrize("config", [ViTConfig(**ONE_LAYER), CLIPVisionConfig(**ONE_LAYER), ResNetConfig()])
def test_what_reads_no_tokens_is_refused(config):
    with pytest.raises(ValueError, match="Model has no token embedding: give an encoder of texts"):
        TJEPAForPreTraining(TJEPAConfig(encoder=config, predictor_type="boundary"))


def test_an_encoder_without_a_type_is_refused():
    with pytest.raises(
        ValueError, match=r"encoder must name its model_type, such as 'bert', got \{'hidden_size': 8\}"
    ):
        TJEPAConfig(encoder={"hidden_size": 8})


def test_packing_is_asked_for_or_refused():
    with pytest.raises(ValueError, match="DebertaModel cannot be fed packed rows: its states differ .* 'padded'"):
        measure_encoder(make_encoder("deberta"), MASK, "packed")
    encoder = make_encoder("bert")
    assert not measure_encoder(encoder, MASK, "padded").is_packed and encoder.config._attn_implementation == "sdpa"
    with pytest.raises(StrictDataclassError, match="'encoder_input' expected one of .*, got both"):
        TJEPAConfig(encoder=encoder.config, encoder_input="both")


@pytest.mark.parametrize("model_type", ["bert", "roberta", "modernbert"])
def test_special_tokens_are_seen_and_not_predicted(model_type):
    plain = DataCollatorForTJEPA(STRATEGIES)(make_documents())
    batch = make_batch()
    special = torch.tensor([*PREFIX, *SUFFIX])
    ids, at = batch["input_ids"].flatten(), batch["context_indices"].flatten().long()
    assert torch.equal(ids[ids >= 5], plain["input_ids"].flatten()), "the masks are those of the text"
    num_views = len(batch["context_view_ids"].unique())
    assert torch.isin(ids[at], special).sum() == 2 * num_views
    assert not torch.isin(ids[batch["label_indices"].long()], special).any()
    labels = batch["label_indices"].long()
    position = batch["position_ids"].flatten()
    assert torch.equal(ids[labels], plain["input_ids"].flatten()[plain["label_indices"].long()])
    assert torch.equal(position[labels], plain["position_ids"].flatten()[plain["label_indices"].long()] + 1)
    for view in batch["context_view_ids"].unique():
        tokens = ids[at[batch["context_view_ids"].flatten() == view]]
        assert tokens[0] == PREFIX[0] and tokens[-1] == SUFFIX[0]


def test_denoising_leaves_special_tokens():
    config = make_tiny_config(special_token_ids=[2, 3], denoising_weight=1.0, denoising_ratio=1.0)
    tokens = torch.tensor([[2, *[7] * 200, 3] * 5])
    torch.manual_seed(0)
    replaced, picked = replace_tokens(tokens, config)
    is_special = torch.isin(tokens, torch.tensor([2, 3]))
    assert len(picked) == tokens.numel() and replaced[is_special].equal(tokens[is_special])
    assert 0.4 < (replaced != tokens)[~is_special].float().mean() < 0.5
    assert (replace_tokens(tokens, make_tiny_config(denoising_ratio=1.0))[0] != tokens)[is_special].any()


@pytest.mark.parametrize(
    "options",
    [
        {"predictor_type": "self_attention"},
        {"predictor_type": "cross_attention", "predictor_hidden_size": 16, "predictor_num_attention_heads": 2},
        {"denoising_weight": 0.5, "variance_covariance_weight": 0.5, "sigreg_weight": 0.1},
        {"target_layers": 2, "target_normalization": "instance"},
        {"loss_type": "cosine", "learned_mask_token": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("model_type", ["bert", "electra", "modernbert", "deberta-v2", "t5"])
def test_every_option_trains_every_way(model_type, options):
    """One step lowers the loss of its batch; the target encoder follows by the moving average alone."""
    encoder = make_encoder(model_type)
    torch.manual_seed(1)
    config = TJEPAConfig(encoder=encoder.config, **{**SMALL_PREDICTOR, **options})
    model, batch = TJEPAForPreTraining.from_encoder(encoder, config).train(), make_batch()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def loss() -> torch.Tensor:
        torch.manual_seed(2)
        return model(**batch).loss

    before = loss()
    before.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    assert not any(p.requires_grad for p in model.target_encoder.parameters())
    optimizer.step()
    assert loss() < before
    target = [p.clone() for p in model.target_encoder.parameters()]
    model.update_target_encoder(0.5)
    pairs = zip(model.target_encoder.named_parameters(), target, strict=True)
    moved = {name for (name, parameter), old in pairs if not parameter.equal(old)}
    assert moved and moved.isdisjoint(model.encoder_traits.unused_parameters)


@pytest.mark.parametrize("model_type", ["bert", "modernbert"])
def test_activation_checkpointing_changes_nothing(model_type):
    encoder, batch = make_encoder(model_type), make_batch()
    expected = make_pretraining_model(encoder).train()
    expected(**batch).loss.backward()
    model = make_pretraining_model(encoder).train()
    model.activation_checkpointing_enable()
    model(**batch).loss.backward()
    for parameter, other in zip(expected.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(other.grad, parameter.grad)


def test_an_empty_batch_and_a_short_one():
    """What a process gets whose share of a step is empty; and more parts than views."""
    for model_type in ("bert", "deberta-v2"):
        model = make_pretraining_model(make_encoder(model_type), pooled_weight=0.5).train()
        collator = DataCollatorForTJEPA(STRATEGIES[:1], special_tokens=(PREFIX, SUFFIX))
        collator.fit_to(model.config)
        loss = model(**collator([])).loss
        loss.backward()
        assert loss == 0 and all(p.grad is not None for p in model.parameters() if p.requires_grad)
        assert torch.isfinite(model(**collator(make_documents((2,)))).loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_folder_in_half_precision_trains_in_float32(tmp_path, dtype):
    make_encoder("bert").to(dtype).save_pretrained(tmp_path)
    model = make_pretraining_model(AutoModel.from_pretrained(tmp_path))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.encoder_traits.is_packed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["bert", "t5"])
def test_the_target_encoder_is_float32_where_the_rest_is_not(tmp_path, model_type, dtype):
    model = make_pretraining_model(make_encoder(model_type))
    made = AutoModelForPreTraining.from_config(model.config, dtype=dtype)
    assert {parameter.dtype for parameter in made.target_encoder.parameters()} == {torch.float32}
    model.save_pretrained(tmp_path)
    model = TJEPAForPreTraining.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in model.target_encoder.parameters()} == {torch.float32}
    assert model.context_encoder.dtype == model.predictor.dtype == dtype  # but T5's `wo` in float16
    assert torch.isfinite(model(**make_batch()).loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["bert", "t5"])
def test_all_of_a_model_in_half_precision_is_measured_in_float32(model_type, dtype):
    traits = measure_encoder(make_encoder(model_type), MASK)
    encoder = make_encoder(model_type).to(dtype)
    again = measure_encoder(encoder, MASK)
    assert (again.is_packed, again.unused_parameters) == (traits.is_packed, traits.unused_parameters)
    assert encoder.dtype == dtype
    assert (encoder.config._attn_implementation == PACKED_ATTENTION) == traits.is_packed
    model = make_pretraining_model(make_encoder(model_type))
    model.encoder_traits = None
    assert torch.isfinite(model.to(dtype)(**make_batch()).loss)


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_a_first_forward_measures_in_float32(tmp_path, mode):
    make_pretraining_model(make_encoder("bert")).save_pretrained(tmp_path)
    model = TJEPAForPreTraining.from_pretrained(tmp_path)
    with mode():
        model(**make_batch())
    assert model.encoder_traits.is_packed


def test_padded_rows_need_no_mask_token():
    encoder = make_encoder("t5")
    model = TJEPAForPreTraining.from_encoder(encoder, TJEPAConfig(encoder=encoder.config))
    model(**make_batch()).loss.backward()


def test_a_tokens_embedding_grows_in_both_encoders():
    model = make_pretraining_model(make_encoder("electra"))
    model.resize_token_embeddings(NUM_TOKENS + 7)
    for config in (model.config, model.config.encoder, model.context_encoder.config, model.target_encoder.config):
        assert config.vocab_size == NUM_TOKENS + 7
    embeddings = [part.get_input_embeddings().weight for part in (model.context_encoder, model.target_encoder)]
    assert embeddings[0].shape == (NUM_TOKENS + 7, 16) and embeddings[0].equal(embeddings[1])
    assert torch.isfinite(model(**make_batch()).loss)


def test_token_prediction_starts_like_a_guess():
    """T5's embeddings are not scaled: without care cross entropy would start at 40 and more."""
    for model_type in ("bert", "t5", "electra"):
        model = make_pretraining_model(make_encoder(model_type))
        assert model(**make_batch()).token_prediction_loss.item() < np.log(NUM_TOKENS) + 1.0


def test_a_pretraining_folder_of_another_encoder_is_not_one_of_ours(tmp_path):
    make_pretraining_model(make_encoder("bert")).save_pretrained(tmp_path)
    for model_class in (TJEPAModel, TJEPAForSequenceClassification):
        with pytest.raises(ValueError, match="is for going on with the pretraining of a bert model: load it with"):
            model_class.from_pretrained(tmp_path)


def test_config_takes_its_sizes_from_the_encoder():
    for model_type in ALL:
        encoder = make_encoder(model_type).config
        config = TJEPAConfig(encoder=encoder)
        sizes = (config.vocab_size, config.hidden_size, config.num_hidden_layers, config.predictor_hidden_size)
        assert sizes == (NUM_TOKENS, 32, 3, 32), model_type
        again = TJEPAConfig.from_dict(config.to_dict())
        assert again.encoder.to_dict() == config.encoder.to_dict() and again.encoder_input == "auto"
    with pytest.raises(StrictDataclassError, match="target_layers must be between 1 and num_hidden_layers .3., got 4"):
        TJEPAConfig(encoder=encoder, target_layers=4)
    with pytest.raises(StrictDataclassError, match=f"mask_token_id must .* = {NUM_TOKENS - 1}, got {NUM_TOKENS}"):
        TJEPAConfig(encoder=encoder, mask_token_id=NUM_TOKENS)
    assert TJEPAConfig().encoder is None
    odd = UMT5Config(d_model=32, d_kv=8, num_heads=6)  # as umT5's small one: heads that do not divide the width
    assert TJEPAConfig(encoder=odd).predictor_num_attention_heads == 2
