"""The models: packed equals unpacked, backends agree, nothing leaks, both ways to load, the arithmetic of the loss."""

import copy

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from helpers import make_examples, make_tiny_config
from tjepa import TJEPAConfig, TJEPAForPreTraining, TJEPAModel, layers_tjepa, modeling_tjepa
from tjepa.data_collator_tjepa import (
    MASKING_PRESETS,
    DataCollatorForTJEPA,
    MaskingStrategy,
    draw_views,
    hash_keys,
    pack_batch,
)
from tjepa.layers_tjepa import VARLEN_ATTENTION, compile_layers, packed_attention_mask
from tjepa.losses_tjepa import variance_covariance_loss


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def gradients(model, batch):
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


# --- Packed and unpacked ---------------------------------------------------------------------------------------------


def boundary_predictions(predictor, context, context_states, targets):
    """Target by target: the nearest visible token on either side, plus the embedding of its distance (0: none)."""
    predictions, nothing = [], torch.zeros_like(context_states[0])
    for target in targets.tolist():
        before, after = (context < target).nonzero().flatten(), (context > target).nonzero().flatten()
        sides = [before[-1:].tolist(), after[:1].tolist()]
        states = [context_states[side[0]] if side else nothing for side in sides]
        distances = [max(-31, min(31, int(context[side[0]]) - target)) if side else 0 for side in sides]
        pair = [s + predictor.distance_embedding.weight[d] for s, d in zip(states, distances, strict=True)]
        hidden_states = predictor.norm(F.gelu(predictor.up_proj(torch.cat(pair))))
        predictions.append(predictor.final_norm(predictor.down_proj(hidden_states)))
    return torch.stack(predictions)


def predictor_predictions(predictor, context, context_states, targets, context_stays):
    """One target block in one sequence, by a dense mask: context tokens must not see the slots."""
    num_context, num_targets = len(context), len(targets)
    entries = torch.cat([context_states, predictor.mask_token.expand(num_targets, -1)])
    hidden_states = predictor.in_proj(entries)[None]
    angles = predictor.rotary_embedding(torch.cat([context, targets])[None])
    allowed = torch.ones(num_context + num_targets, num_context + num_targets, dtype=torch.bool)
    allowed[:num_context, num_context:] = False
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)[None, None]
    for layer in predictor.layers:
        output = layer(hidden_states, angles, attention_mask=mask)
        if context_stays:
            output = torch.cat([hidden_states[:, :num_context], output[:, num_context:]], dim=1)
        hidden_states = output
    return predictor.out_proj(predictor.final_norm(hidden_states))[0, num_context:]


def unpacked_loss(model, documents, views, num_strategies, context_stays=False):
    """
    The loss the plain way: document by document, view by view, one target block at a time, dense and unpacked;
    `context_stays` makes the predictor's layers leave the context as it is.
    """
    starts = np.cumsum([0] + [len(document) for document in documents])
    per_strategy = [[] for _ in range(num_strategies)]
    token_losses = [[] for _ in range(num_strategies)]
    all_contexts = []
    for view, (d, s) in enumerate(zip(views.document, views.strategy, strict=True)):
        tokens = torch.from_numpy(documents[d])[None]
        with torch.no_grad():
            labels = model.target_encoder(tokens)[0][0]
            labels = F.layer_norm(labels, labels.shape[-1:])
        context = torch.from_numpy(views.context_token[views.context_view == view] - starts[d])
        context_states = model.context_encoder(tokens[:, context], position_ids=context[None])[0][0]
        all_contexts.append(context_states)
        slots = torch.from_numpy(views.slot_token[views.slot_view == view] - starts[d])
        blocks = torch.from_numpy(views.slot_block[views.slot_view == view])
        for block in blocks.unique():
            targets = slots[blocks == block]
            if model.config.predictor_type == "boundary":
                predictions = boundary_predictions(model.predictor, context, context_states, targets)
            else:
                predictions = predictor_predictions(model.predictor, context, context_states, targets, context_stays)
            loss = F.smooth_l1_loss(predictions, labels[targets], reduction="none").mean(dim=-1)
            per_strategy[s].append(loss)
            if model.token_head is not None:
                logits = model.token_head(predictions, model.get_input_embeddings().weight)
                token_losses[s].append(F.cross_entropy(logits, tokens[0, targets], reduction="none"))
    loss = torch.stack([torch.cat(losses).mean() for losses in per_strategy]).mean()
    if model.token_head is not None:
        token_loss = torch.stack([torch.cat(losses).mean() for losses in token_losses]).mean()
        loss = loss + model.config.token_prediction_weight * token_loss
    if model.config.variance_covariance_weight > 0:
        z = torch.cat(all_contexts)
        z = z - z.mean(dim=0)
        c = z.T @ z / len(z)
        variance = torch.relu(1 - torch.sqrt(c.diagonal() + 1e-4)).mean()
        covariance = (c - torch.diag(c.diagonal())).square().sum() / len(c)
        loss = loss + model.config.variance_covariance_weight * (variance + 0.04 * covariance)
    return loss


@pytest.mark.parametrize("row_length", [None, 64, 100])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"variance_covariance_weight": 0.7, "token_prediction_weight": 0.3},
        {"predictor_type": "cross_attention"},
        {"predictor_type": "cross_attention", "use_bias": False},
        {"predictor_type": "boundary", "token_prediction_weight": 0.3},
        {"predictor_type": "boundary", "use_bias": False},
    ],
)
def test_packed_equals_unpacked(make_model, row_length, options):
    documents = [example["input_ids"] for example in make_examples([40, 23, 7, 64, 2])]
    strategies = [*MASKING_PRESETS["ul2"], MaskingStrategy(4, 1.5, 0.4, 0.2, None, 0.3)]
    views = draw_views(documents, hash_keys(0, np.arange(5)), strategies)
    batch = pack_batch(documents, views, len(strategies), row_length)
    model = make_model(**options)
    context_stays = options.get("predictor_type") == "cross_attention"
    plain_type = "self_attention" if context_stays else options.get("predictor_type", "self_attention")
    expected_model = make_model(attn_implementation="eager", **{**options, "predictor_type": plain_type})

    packed_gradients = gradients(model, batch)
    expected = unpacked_loss(expected_model, documents, views, len(strategies), context_stays)
    expected.backward()
    close(model(**batch).loss, expected)
    for name, parameter in expected_model.named_parameters():
        if parameter.requires_grad:
            close(packed_gradients[name], parameter.grad)


@pytest.mark.parametrize(
    ("attn_implementation", "row_length", "predictor_type"),
    [
        ("eager", None, "self_attention"),
        ("eager", 96, "self_attention"),
        ("flex_attention", 96, "self_attention"),
        ("eager", None, "cross_attention"),
        ("eager", 96, "cross_attention"),
        # not flex_attention with slots as queries: the C++ that torch 2.13 makes of it for the CPU does not compile
    ],
)
def test_attention_backends_agree(make_model, attn_implementation, row_length, predictor_type):
    batch = DataCollatorForTJEPA(row_length=row_length)(make_examples([40, 23, 7, 64, 2]))
    # flex_attention needs heads of at least 16 features
    sizes = {"num_attention_heads": 2, "predictor_num_attention_heads": 1}
    sizes["predictor_type"] = predictor_type
    reference, model = make_model(**sizes), make_model(attn_implementation=attn_implementation, **sizes)
    with torch.no_grad():
        expected, actual = reference(**batch), model(**batch)
    close(actual.loss, expected.loss)
    close(actual.predictions, expected.predictions)
    close(actual.labels, expected.labels)
    if attn_implementation == "eager":  # torch has no backward of flex_attention on the CPU
        for actual, expected in zip(
            gradients(model, batch).values(), gradients(reference, batch).values(), strict=True
        ):
            close(actual, expected)


@pytest.mark.parametrize("predictor_type", ["self_attention", "boundary"])
def test_compiled_as_one_graph_and_not_for_every_batch(make_model, predictor_type):
    """Rows of a fixed length: after another number of documents, then of rows, no batch compiles again."""
    options = {"num_attention_heads": 2, "predictor_num_attention_heads": 1, "predictor_type": predictor_type}
    options |= {"variance_covariance_weight": 1.0, "token_prediction_weight": 1.0, "denoising_weight": 1.0}
    options["pooled_weight"] = 1.0
    expected = make_model(**options).train()
    model = make_model(attn_implementation="flex_attention", **options).train()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    collator, num_rows = DataCollatorForTJEPA(row_length=96), set()
    collator.fit_to(model.config)
    for step, num_more in enumerate([0, 1, 2, 4, 6, 9]):
        batch = collator(make_examples([40, 23, 7, 64] + [30] * num_more, seed=step))
        num_rows.add(len(batch["input_ids"]))
        losses = []
        for candidate in (compiled, expected):
            torch.manual_seed(step)
            with torch.no_grad():  # torch has no backward of flex_attention on the CPU
                losses.append(candidate(**batch).loss)
        close(*losses)
    assert len(num_rows) > 2
    assert counter.frame_count <= 3


def test_compiled_layers_do_not_compile_for_every_batch(make_model):
    """As `--torch_compile` does it: after another number of rows or two no batch compiles again."""
    torch._dynamo.reset()  # variants that other tests left behind would count
    options = {"num_attention_heads": 2, "predictor_num_attention_heads": 1}
    expected, model = make_model(**options), make_model(attn_implementation="flex_attention", **options)
    counter = CompileCounterWithBackend("aot_eager")
    compile_layers(model, backend=counter)
    collator, num_frames = DataCollatorForTJEPA(row_length=128), []
    for step, num_more in enumerate([0, 1, 6, 9, 3, 15]):
        batch = collator(make_examples([40, 23, 7, 64] + [30] * num_more, seed=step))
        with torch.no_grad():  # torch has no backward of flex_attention on the CPU
            close(model(**batch).loss, expected(**batch).loss)
        num_frames.append(counter.frame_count)
    assert num_frames[0] <= 3 and num_frames[2] == num_frames[-1] <= 5


def test_layers_of_many_models_stay_compiled(make_model, batch):
    """All share the code of a layer, which torch by itself compiles eight times and then no more."""
    torch._dynamo.reset()
    counter = CompileCounter()
    for num_attention_heads in (1, 2, 4, 8):
        model = make_model(num_attention_heads=num_attention_heads, attn_implementation="eager")
        compile_layers(model, backend=counter)
        model(**batch)
    assert counter.frame_count > 8


@torch.library.custom_op("tjepa_tests::varlen", mutates_args={})
def varlen_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor, longest: int
) -> torch.Tensor:
    """On the CPU what torch's kernel computes on a GPU: states [num_entries, heads, head_dim], starts [views + 1]."""
    assert 0 < starts.diff().max() <= longest and starts[-1] == len(query)
    outputs = []
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        q, k, v = (states[start:end].transpose(0, 1) for states in (query, key, value))
        outputs.append(F.scaled_dot_product_attention(q, k, v).transpose(0, 1))
    return torch.cat(outputs)


@varlen_kernel.register_fake
def _(query, key, value, starts, longest):
    return torch.empty_like(query)


@pytest.fixture
def has_kernel(monkeypatch):
    """The kernel needs a GPU; a stand-in shows that it is handed the right views."""

    def forward(module, query, key, value, attention_mask, cu_seq_lens_q, max_length_q, **kwargs):
        assert attention_mask is None
        flat = [states.transpose(1, 2).flatten(0, 1) for states in (query, key, value)]
        output = varlen_kernel(*flat, cu_seq_lens_q, max_length_q)
        return output.unflatten(0, (query.shape[0], -1)), None

    names = ("flash_attention_2", VARLEN_ATTENTION)
    for module in (layers_tjepa, modeling_tjepa):
        monkeypatch.setattr(module, "attends_by_lengths", lambda config, _: config._attn_implementation in names)
    for name in names:
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, name, forward)


@pytest.mark.parametrize("attn_implementation", ["flash_attention_2", VARLEN_ATTENTION])
@pytest.mark.parametrize("knows_groups", [True, False])
def test_attention_by_lengths_gets_the_views(has_kernel, attn_implementation, knows_groups):
    batch = DataCollatorForTJEPA(row_length=70)(make_examples([40, 23, 7, 64, 2]))
    torch.manual_seed(0)
    model = TJEPAModel(make_tiny_config()).eval()
    inputs = {"position_ids": batch["position_ids"], "view_ids": batch["document_ids"]}
    inputs["groups"] = batch["view_groups"].documents if knows_groups else None
    expected = model(batch["input_ids"], **inputs)[0]
    model.config._attn_implementation_internal = attn_implementation
    is_token = batch["document_ids"] >= 0
    close(model(batch["input_ids"], **inputs)[0][is_token], expected[is_token])
    with pytest.raises(ValueError, match="target blocks"):
        packed_attention_mask(model.config, expected, batch["document_ids"], batch["document_ids"])


@pytest.mark.parametrize("row_length", [None, 96])
@pytest.mark.parametrize("predictor_type", ["self_attention", "boundary"])
def test_without_its_kernel_attention_by_lengths_is_that_of_sdpa(make_model, row_length, predictor_type):
    batch = DataCollatorForTJEPA(row_length=row_length)(make_examples([40, 23, 7, 64, 2]))
    options = {"num_attention_heads": 2, "predictor_num_attention_heads": 1, "predictor_type": predictor_type}
    expected, model = make_model(**options), make_model(attn_implementation=VARLEN_ATTENTION, **options)
    if predictor_type == "self_attention":
        assert model.predictor.config._attn_implementation == "flex_attention"
        model.predictor.config._attn_implementation = "sdpa"  # flex_attention has no backward on the CPU
    expected, actual = gradients(expected, batch), gradients(model, batch)
    for name, gradient in actual.items():
        close(gradient, expected[name])


def test_layers_with_attention_by_lengths_do_not_compile_for_every_batch(make_model, has_kernel):
    """The number of texts, and the longest of them, change without compiling again."""
    torch._dynamo.reset()
    options = {"num_attention_heads": 2, "predictor_type": "boundary", "token_prediction_weight": 1.0}
    expected, model = make_model(**options), make_model(attn_implementation=VARLEN_ATTENTION, **options)
    counter = CompileCounterWithBackend("aot_eager")
    compile_layers(model, backend=counter)
    assert model.token_head._compiled_call_impl is not None
    collator, num_frames = DataCollatorForTJEPA(), []
    for step, num_more in enumerate([0, 1, 6, 9, 3, 15, 2]):
        batch = collator(make_examples([40, 23, 7, 64 + 100 * (step % 3)] + [30] * num_more, seed=step))
        with torch.no_grad():  # the stand-in has no backward
            close(model(**batch).loss, expected(**batch).loss)
        num_frames.append(counter.frame_count)
    assert num_frames[3] == num_frames[-1] <= 6


def test_activation_checkpointing_changes_nothing(make_model, batch):
    model, checkpointed = make_model(), make_model()
    checkpointed.activation_checkpointing_enable()
    expected = gradients(model.train(), batch)
    for name, gradient in gradients(checkpointed.train(), batch).items():
        close(gradient, expected[name], 0)


def test_encoder_on_packed_rows_equals_one_by_one():
    torch.manual_seed(0)
    model = TJEPAModel(make_tiny_config()).eval()
    lengths = [5, 9, 3]
    sequences = [torch.randint(0, 60, (n,)) for n in lengths]
    packed = model(
        torch.cat(sequences)[None],
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
        view_ids=torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None],
    )[0][0].split(lengths)
    padded = torch.zeros(3, 9, dtype=torch.long)
    mask = torch.zeros(3, 9, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        padded[row, : len(sequence)], mask[row, : len(sequence)] = sequence, 1
    for row, sequence in enumerate(sequences):
        alone = model(sequence[None])[0][0]
        close(packed[row], alone)
        close(model(padded, attention_mask=mask)[0][row, : len(sequence)], alone)


def test_no_batch_tensor_grows_with_the_square_of_a_length():
    sizes = []
    for n in (100, 200, 400, 800):
        batch = DataCollatorForTJEPA()(make_examples([n] * 4))
        del batch["view_groups"]  # a few plain integers
        assert all(not tensor.is_floating_point() and tensor.dtype != torch.bool for tensor in batch.values())
        sizes.append(sum(tensor.numel() for tensor in batch.values()))
    assert np.diff(np.log2(sizes)) == pytest.approx(1.0, abs=0.05)  # twice the length, twice the size


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("predictor", ["self_attention", "cross_attention"])
@pytest.mark.parametrize("row_length", [None, 64])
def test_empty_batch(make_model, row_length, predictor, attention):
    weights = dict.fromkeys(("variance_covariance_weight", "token_prediction_weight", "pooled_weight"), 1.0)
    model = make_model(predictor_type=predictor, **weights)
    model.set_attn_implementation(attention)
    collator = DataCollatorForTJEPA(row_length=row_length)
    collator.fit_to(model.config)
    assert all(gradient.isfinite().all() for gradient in gradients(model, collator(make_examples([1, 0]))).values())


# --- No leak ---------------------------------------------------------------------------------------------------------


def test_changing_a_target_token_changes_no_state_and_no_prediction(make_model):
    examples = make_examples([40, 23])
    model = make_model().eval()
    collator = DataCollatorForTJEPA([MaskingStrategy(4, max_target_mask_ratio=0.5)])
    batch = collator(examples)
    output = model(**batch)
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"].view(-1)[batch["label_indices"]] = 59 - changed["input_ids"].view(-1)[batch["label_indices"]]
    changed_output = model(**changed)
    close(changed_output.context_states, output.context_states, 0)
    close(changed_output.predictions, output.predictions, 0)
    assert not torch.allclose(changed_output.labels, output.labels)  # the labels did change


def test_removing_a_target_block_changes_no_other_prediction(make_model):
    documents = [example["input_ids"] for example in make_examples([40, 30])]
    views = draw_views(documents, hash_keys(0, np.arange(2)), [MaskingStrategy(4, max_target_mask_ratio=0.5)])
    model = make_model().eval()
    full_batch = pack_batch(documents, views, 1)
    full = model(**full_batch).predictions
    for removed in np.unique(views.slot_block):
        keep = views.slot_block != removed
        fewer = copy.copy(views)
        fewer.slot_token, fewer.slot_view, fewer.slot_block = (
            array[keep] for array in (views.slot_token, views.slot_view, views.slot_block)
        )
        batch = pack_batch(documents, fewer, 1)
        predictions = model(**batch).predictions
        # slots come in the same order in both batches
        close(predictions, full[torch.from_numpy(keep)])


def test_packed_neighbours_do_not_see_each_other(make_model):
    model = make_model().eval()
    examples = make_examples([40, 23])
    other = [examples[0], {**examples[1], "input_ids": examples[1]["input_ids"][::-1].copy()}]
    collator = DataCollatorForTJEPA([MaskingStrategy(4, max_target_mask_ratio=0.5)])
    outputs = [model(**collator(pair)) for pair in (examples, other)]
    views = collator(examples)["prediction_view_ids"].flatten()[collator(examples)["slot_indices"]]
    close(outputs[0].predictions[views == 0], outputs[1].predictions[views == 0], 0)
    assert not torch.allclose(outputs[0].predictions[views == 1], outputs[1].predictions[views == 1])


# --- Positions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["autocast", "cast"])
def test_rotary_angles_are_float32(how):
    model = TJEPAModel(make_tiny_config())
    expected = model.rotary_embedding(torch.tensor([[257, 258]]))
    if how == "cast":
        model.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        angles = model.rotary_embedding(torch.tensor([[257, 258]]))
    assert angles.dtype == torch.float32 and torch.equal(angles, expected)
    assert not torch.equal(angles[0, 0], angles[0, 1])


# --- Loss, target encoder, initialisation ----------------------------------------------------------------------------


def test_strategies_count_equally(make_model, batch):
    output = make_model()(**batch)
    per_slot = F.smooth_l1_loss(output.predictions, output.labels, reduction="none").mean(dim=-1)
    means = torch.stack([per_slot[batch["slot_strategy_ids"] == s].mean() for s in range(7)])
    close(output.loss_per_strategy, means)
    close(output.loss, means.mean())


def test_variance_covariance_loss_ignores_padding():
    torch.manual_seed(0)
    states = torch.randn(50, 8)
    padded = torch.cat([states, 100 * torch.ones(7, 8)])
    is_token = torch.arange(57) < 50
    close(variance_covariance_loss(padded, is_token), variance_covariance_loss(states, torch.ones(50) > 0))


def test_target_encoder_starts_equal_and_never_trains(batch):
    model = TJEPAForPreTraining(make_tiny_config(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3))
    for target, context in zip(model.target_encoder.parameters(), model.context_encoder.parameters(), strict=True):
        assert torch.equal(target, context)
    model.train()
    assert not any(module.training for module in model.target_encoder.modules())
    assert not any(parameter.requires_grad for parameter in model.target_encoder.parameters())
    assert torch.equal(model(**batch).labels, model(**batch).labels)  # no dropout there ...
    assert not torch.equal(model(**batch).predictions, model(**batch).predictions)  # ... but here
    model(**batch).loss.backward()
    assert all(parameter.grad is None for parameter in model.target_encoder.parameters())
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)  # and no unused parameter


def test_update_target_encoder(make_model):
    model = make_model()
    before = [p.clone() for p in model.target_encoder.parameters()]
    model.update_target_encoder(0.9)
    contexts = model.context_encoder.parameters()
    for target, old, context in zip(model.target_encoder.parameters(), before, contexts, strict=True):
        close(target, 0.9 * old + 0.1 * context, 1e-7)
    with pytest.raises(ValueError, match=r"in \[0, 1\], got 1.5"):
        model.update_target_encoder(1.5)
    model.context_encoder.final_norm.adapter = torch.nn.Linear(2, 2)  # as an adapter's layers are added
    with pytest.raises(ValueError, match="One encoder alone has final_norm.adapter.bias: adapters such as LoRA"):
        model.update_target_encoder(0.9)


def test_initialisation_of_residual_projections():
    torch.manual_seed(0)
    model = TJEPAForPreTraining(TJEPAConfig(vocab_size=100, predictor_num_hidden_layers=2))
    layer, predictor_layer = model.context_encoder.layers[0], model.predictor.layers[0]
    assert layer.mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert layer.mlp.down_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.03)  # 8 layers
    assert layer.attention.out_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.03)
    assert predictor_layer.mlp.down_proj.weight.std().item() == pytest.approx(0.02 / 2, rel=0.03)  # 2 layers
    assert layer.mlp.up_proj.bias.abs().max() == 0


def test_mask_token(tmp_path):
    assert torch.equal(TJEPAForPreTraining(make_tiny_config()).predictor.mask_token, torch.ones(32))
    model = TJEPAForPreTraining(make_tiny_config(learned_mask_token=False))
    assert "mask_token" not in dict(model.predictor.named_parameters())
    assert model.predictor.mask_token.norm().item() == pytest.approx(1.0)
    model.save_pretrained(tmp_path)
    assert torch.equal(TJEPAForPreTraining.from_pretrained(tmp_path).predictor.mask_token, model.predictor.mask_token)


# --- Standard arguments ----------------------------------------------------------------------------------------------


def test_hidden_states_and_attentions():
    config = make_tiny_config()
    config._attn_implementation = "eager"
    model = TJEPAModel(config).eval()
    output = model(torch.randint(0, 60, (2, 11)), output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 3 and output.hidden_states[0].shape == (2, 11, 32)
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    assert len(output.attentions) == 2 and output.attentions[0].shape == (2, 4, 11, 11)
    close(output.attentions[0].sum(dim=-1), torch.ones(2, 4, 11))


def test_inputs_embeds_and_position_ids():
    model = TJEPAModel(make_tiny_config()).eval()
    input_ids = torch.randint(0, 60, (2, 11))
    expected = model(input_ids)[0]
    close(model(inputs_embeds=model.get_input_embeddings()(input_ids))[0], expected, 0)
    close(model(input_ids, position_ids=torch.arange(11)[None])[0], expected, 0)
    close(model(input_ids, position_ids=7 + torch.arange(11)[None])[0], expected)  # rotary: relative positions only
    assert not torch.allclose(model(input_ids, position_ids=2 * torch.arange(11)[None])[0], expected, atol=1e-3)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="not both"):
        model(input_ids, attention_mask=torch.ones_like(input_ids), view_ids=torch.zeros_like(input_ids))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_attention_heads": 5}, r"hidden_size \(384\) must be a multiple of num_attention_heads \(5\)"),
        *(({"rotary_dim": x}, rf"rotary_dim \({x}\) must be even") for x in (64, 7)),
        ({"predictor_hidden_size": 100}, r"predictor_hidden_size \(100\) must be a multiple"),
        ({"predictor_rotary_dim": 64}, r"predictor_rotary_dim \(64\)"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1"),
        ({"vocab_size": 0}, "vocab_size must be at least 1"),
        ({"hidden_dropout_prob": 1.0}, r"hidden_dropout_prob must be in \[0, 1\)"),
        *(({"sigreg_weight": x}, "sigreg_weight must be 0") for x in (-1.0, float("nan"), float("inf"))),
        *(({"rope_theta": x}, "rope_theta must be a positive number, such as") for x in (0, -1, float("nan"))),
        *(({name: -1}, f"{name} must be 0 or a positive") for name in ("layer_norm_eps", "initializer_range")),
        *(({"mask_token_id": x}, "mask_token_id must .* from 0 to .* = 31999, got") for x in (-1, 32000)),
        ({"special_token_ids": [1, 32000]}, r"special_token_ids must be in the vocabulary, .*, got \[1, 32000\]"),
        ({"denoising_ratio": 0.0}, r"denoising_ratio must be in \(0, 1\], got 0.0; set denoising_weight=0"),
        ({"predictor_type": "mlp"}, r"predictor_type' expected one of \('self_attention', .*'in_place'\), got mlp"),
        ({"target_layers": 9}, r"target_layers must be between 1 and num_hidden_layers \(8\), got 9"),
        ({"target_normalization": "batch"}, "target_normalization' expected one of .*'instance'.*, got batch"),
        ({"loss_type": "huber"}, r"loss_type' expected one of \('smooth_l1', .*, got huber"),
        ({"hidden_act": "swishh"}, "hidden_act must be one of gelu, .*, got 'swishh'"),
        ({"smooth_l1_beta": 0.0}, "smooth_l1_beta must be positive, got 0.0; for 0 set loss_type='l1'"),
    ],
)
def test_impossible_configurations_are_refused(values, message):
    with pytest.raises(Exception, match=message):
        TJEPAConfig(**values)


def test_predictor_sizes_follow_the_encoder():
    config = TJEPAConfig(hidden_size=128, num_hidden_layers=4, num_attention_heads=4)
    assert (config.intermediate_size, config.predictor_hidden_size, config.predictor_intermediate_size) == (
        512,
        128,
        512,
    )
    assert (config.predictor_num_hidden_layers, config.predictor_num_attention_heads) == (4, 4)
    assert TJEPAConfig().rotary_dim == TJEPAConfig().predictor_rotary_dim == 32


# --- Loading and resizing the whole ----------------------------------------------------------------------------------


def test_pretraining_from_an_encoder_folder_fills_both_encoders(make_model, tmp_path, batch):
    TJEPAModel.from_pretrained(save(make_model(), tmp_path / "pretraining")).save_pretrained(tmp_path / "encoder")
    model, info = TJEPAForPreTraining.from_pretrained(tmp_path / "encoder", output_loading_info=True)
    assert info["missing_keys"] and all(key.startswith("predictor.") for key in info["missing_keys"])
    encoder = TJEPAModel.from_pretrained(tmp_path / "encoder").state_dict()
    for part in (model.context_encoder, model.target_encoder):
        assert all(part.state_dict()[name].equal(tensor) for name, tensor in encoder.items())
    assert gradients(model, batch)["context_encoder.final_norm.weight"].any()
    assert not any(parameter.requires_grad for parameter in model.target_encoder.parameters())


def test_pretraining_from_its_own_folder_keeps_both_encoders(make_model, tmp_path):
    model = make_model(token_prediction_weight=1.0)
    again, info = TJEPAForPreTraining.from_pretrained(save(model, tmp_path), output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(again.state_dict()[name].equal(tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("num_tokens", [70, 60, 59])
def test_resizing_the_vocabulary_reaches_both_encoders_and_the_token_head(make_model, tmp_path, num_tokens):
    model = make_model(token_prediction_weight=1.0)
    with torch.no_grad():
        model.token_head.bias.normal_()
    batch = DataCollatorForTJEPA()(make_examples([40, 23, 7], vocab_size=50))
    with torch.no_grad():
        before, bias = model(**batch), model.token_head.bias.clone()
    assert model.resize_token_embeddings(num_tokens) is model.context_encoder.token_embedding
    context, target = (e.token_embedding.weight for e in (model.context_encoder, model.target_encoder))
    assert len(context) == len(target) == len(model.token_head.bias) == model.config.vocab_size == num_tokens
    assert target[60:].equal(context[60:]) and not target[:59].equal(context[:59])  # new rows equal, old ones kept
    assert model.token_head.bias[:59].equal(bias[:59]) and not model.token_head.bias[60:].any()
    assert context.requires_grad and model.token_head.bias.requires_grad and not target.requires_grad
    close(model(**batch).jepa_loss, before.jepa_loss)

    grown = DataCollatorForTJEPA()(make_examples([40, 23, 7], vocab_size=num_tokens))
    again = TJEPAForPreTraining.from_pretrained(save(model, tmp_path))
    close(again(**grown).loss, model(**grown).loss)
    assert gradients(model, grown)["token_head.bias"].shape == (num_tokens,)
    model.update_target_encoder(0.5)


def save(model, folder):
    model.save_pretrained(folder)
    return folder
