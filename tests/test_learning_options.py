"""Labels from several layers, SIGReg, other losses and momentum schedules: each against its formula."""

import math
import shutil
from threading import Barrier, Thread

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from helpers import TINY, arguments, make_examples, make_tiny_config, run
from tjepa import TJEPAForPreTraining
from tjepa.data_collator_tjepa import DataCollatorForTJEPA
from tjepa.encoders_tjepa import make_labels, normalise_per_document, replace_tokens
from tjepa.losses_tjepa import distance_to_labels, sigreg_loss, variance_covariance_loss
from tjepa.run_pretraining import PretrainingArguments
from tjepa.training.ema import EMACallback


def close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


# --- Labels ----------------------------------------------------------------------------------------------------------


def block_outputs(encoder, tokens: torch.Tensor) -> list[torch.Tensor]:
    """One document, block by block, without any recording: [length, hidden_size] each, the last after the norm."""
    hidden_states = encoder.token_embedding(tokens)[None]
    angles = encoder.rotary_embedding(torch.arange(len(tokens))[None])
    outputs = []
    for layer in encoder.layers:
        hidden_states = layer(hidden_states, angles)
        outputs.append(hidden_states[0])
    return [*outputs[:-1], encoder.final_norm(outputs[-1])]


@pytest.mark.parametrize("row_length", [None, 96])
@pytest.mark.parametrize("normalization", ["layer", "instance"])
@pytest.mark.parametrize("target_layers", [1, 2, 3])
@torch.no_grad()
def test_labels_are_the_mean_of_normalised_layers(make_model, target_layers, normalization, row_length):
    options = {"num_hidden_layers": 3, "target_layers": target_layers, "target_normalization": normalization}
    model = make_model(**options)
    examples = make_examples([40, 23, 7, 64, 2])
    batch = DataCollatorForTJEPA(row_length=row_length)(examples)
    labels = model(**batch).labels

    dim = {"layer": 1, "instance": 0}[normalization]  # over a token's features, or over a document's tokens
    expected = {}
    for document, example in enumerate(examples):
        layers = block_outputs(model.target_encoder, torch.from_numpy(example["input_ids"]))[-target_layers:]
        normalised = [
            (states - states.mean(dim, keepdim=True)) / (states.var(dim, keepdim=True, correction=0) + 1e-5).sqrt()
            for states in layers
        ]
        expected[document] = sum(normalised) / target_layers
    documents = batch["document_ids"].flatten()[batch["label_indices"]].tolist()
    positions = batch["position_ids"].flatten()[batch["label_indices"]].tolist()
    close(labels, torch.stack([expected[d][p] for d, p in zip(documents, positions, strict=True)]), 1e-4)


def test_the_defaults_are_the_references_labels_and_loss(make_model, batch):
    model = make_model()
    output = model(**batch)
    states = model.target_encoder(
        batch["input_ids"], position_ids=batch["position_ids"], view_ids=batch["document_ids"]
    ).last_hidden_state.flatten(0, 1)[batch["label_indices"]]
    assert torch.equal(output.labels, F.layer_norm(states, states.shape[-1:]))
    per_slot = F.smooth_l1_loss(output.predictions, output.labels, reduction="none").mean(dim=-1)
    assert torch.equal(distance_to_labels(model.config, output.predictions, output.labels), per_slot)
    assert torch.equal(output.loss, output.jepa_loss) and output.sigreg_loss is None


def test_instance_normalisation_by_hand():
    states = torch.tensor([[1.0, 5.0], [3.0, 5.0], [10.0, 2.0], [10.0, 4.0], [10.0, 6.0], [7.0, 7.0]])
    document_ids = torch.tensor([4, 4, 0, 0, 0, -1])  # ids need no order; negative is padding
    root = math.sqrt(1.5)
    expected = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, -root], [0.0, 0.0], [0.0, root], [0.0, 0.0]])
    close(normalise_per_document(states, document_ids, 1e-12), expected)
    assert normalise_per_document(states[:0], document_ids[:0], 1e-5).shape == (0, 2)


def test_instance_normalisation_keeps_no_mean_of_a_document(make_model):
    batch = DataCollatorForTJEPA()(make_examples([30, 30, 30]))
    # every token of the batch once
    every_token = torch.arange(90, dtype=torch.int32)
    model = make_model(target_normalization="instance")
    ids = [batch[name] for name in ("input_ids", "position_ids", "document_ids")]
    means = make_labels(model.target_encoder, model.config, *ids, every_token)[0].unflatten(0, (3, 30)).mean(dim=1)
    close(means, torch.zeros(3, 32))
    plain = make_model()
    assert (
        make_labels(plain.target_encoder, plain.config, *ids, every_token)[0]
        .unflatten(0, (3, 30))
        .mean(dim=1)
        .abs()
        .max()
        > 0.1
    )


# --- SIGReg ----------------------------------------------------------------------------------------------------------


def integral(values) -> float:
    """2 * integral_0^3 values(t) exp(-t^2/2) dt, on a fine grid."""
    t = torch.linspace(0, 3, 3001, dtype=torch.float64)
    return 2 * torch.trapezoid(values(t) * torch.exp(-t.square() / 2), t).item()


def test_sigreg_of_known_distributions():
    """One feature leaves only the directions 1 and -1: the characteristic functions are known."""
    everything = torch.ones(2, dtype=torch.bool)
    at_zero = integral(lambda t: (1 - torch.exp(-t.square() / 2)).square())  # phi = 1
    assert sigreg_loss(torch.zeros(2, 1), everything).item() == pytest.approx(at_zero, abs=1e-3)
    two_points = integral(lambda t: (t.cos() - torch.exp(-t.square() / 2)).square())  # phi = cos t
    assert sigreg_loss(torch.tensor([[-1.0], [1.0]]), everything).item() == pytest.approx(two_points, abs=1e-3)
    one_point = integral(lambda t: (t.cos() - torch.exp(-t.square() / 2)).square() + t.sin().square())
    assert sigreg_loss(torch.ones(2, 1), everything).item() == pytest.approx(one_point, abs=1e-3)


@pytest.mark.parametrize("is_autocast", [False, True])
def test_sigreg_by_hand_and_in_float32(is_autocast):
    states = torch.randn(30, 1, generator=torch.Generator().manual_seed(0))
    t, z = np.linspace(0, 3, 17), states[:20].double().numpy()  # the rest is padding
    error = np.abs(np.exp(1j * t * z).mean(axis=0) - np.exp(-(t**2) / 2)) ** 2
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast):
        loss = sigreg_loss(states, torch.arange(30) < 20)
    expected = 2 * torch.trapezoid(torch.from_numpy(error * np.exp(-(t**2) / 2)), torch.from_numpy(t)).item()
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_sigreg_likes_an_isotropic_gaussian_best():
    torch.manual_seed(0)
    states, everything = torch.randn(4000, 8), torch.ones(4000, dtype=torch.bool)
    gaussian = sigreg_loss(states, everything)
    assert gaussian < 1e-3
    for worse in (2 * states, 0.3 * states, states + 1, states @ torch.ones(8, 8) / 8**0.5, states.sign()):
        assert sigreg_loss(worse, everything) > 3 * gaussian


def test_sigreg_ignores_padding_and_repeats_with_the_generator():
    states = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([states, 100 * torch.ones(7, 8)])

    def from_seed(seed: int, states: torch.Tensor, num_tokens: int = 50) -> torch.Tensor:
        torch.manual_seed(seed)
        return sigreg_loss(states, torch.arange(len(states)) < num_tokens)

    close(from_seed(0, padded), from_seed(0, states), 1e-6)
    assert torch.equal(from_seed(0, states), from_seed(0, states))
    assert not torch.equal(from_seed(0, states), from_seed(1, states))  # new directions


def test_sigreg_of_uneven_shares():
    """Three threads for three processes. Whatever each draws, all see the same directions and the whole batch."""
    states = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    shares, barrier, parts, sums, losses = states.split([30, 19, 1]), Barrier(3), {}, {}, {}

    def train(rank: int) -> None:
        def total(tensor):
            parts[rank] = tensor
            barrier.wait()
            result = sum(parts[other] for other in range(3))  # the same order, so the same rounding
            barrier.wait()
            sums.setdefault(rank, []).append(result)
            return result

        losses[rank] = sigreg_loss(shares[rank], torch.ones(len(shares[rank]), dtype=torch.bool), total)

    threads = [Thread(target=train, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    directions = sums[0][0]
    whole = iter([directions, None, None])  # the sums that a single process with those directions would see
    expected = sigreg_loss(
        states, torch.ones(50, dtype=torch.bool), lambda tensor: tensor if (given := next(whole)) is None else given
    )
    torch.testing.assert_close(torch.stack([losses[rank] for rank in range(3)]), expected.expand(3))


def test_sigreg_enters_the_loss_and_trains_the_context_encoder(make_model, batch):
    model = make_model(sigreg_weight=0.5)
    output = model(**batch)
    close(output.loss, output.jepa_loss + 0.5 * output.sigreg_loss)
    output.sigreg_loss.backward()
    assert all(parameter.grad.any() for parameter in model.context_encoder.layers.parameters() if parameter.ndim > 1)
    assert not any(parameter.grad is not None for parameter in model.predictor.parameters())


@pytest.mark.parametrize("is_autocast", [False, True])
def test_variance_and_covariance_by_hand_and_in_float32(is_autocast):
    states = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.1, 0.5, 1, 2, 3, 5]) + 1
    z = states[:40].double().numpy()  # the rest is padding
    covariance = np.cov(z, rowvar=False, bias=True)
    variances = np.diag(covariance)
    expected = np.maximum(0, 1 - np.sqrt(variances + 1e-4)).mean()
    expected += 0.04 * (np.sum(covariance**2) - np.sum(variances**2)) / 6
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast):
        loss = variance_covariance_loss(states, torch.arange(50) < 40)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=1e-5)


# --- The loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (0.125 + 1.5) / 2),
        ({"smooth_l1_beta": 4.0}, (0.25 / 8 + 4 / 8) / 2),
        ({"loss_type": "l1"}, (0.5 + 2) / 2),
        ({"loss_type": "l2"}, (0.25 + 4) / 2),
        ({"loss_type": "cosine"}, 1 - (1.5 * 1 + 0 * 2) / (1.5 * math.sqrt(5))),
    ],
)
def test_losses_by_hand(make_model, batch, options, expected):
    """Differences 0.5 and -2 between the prediction (1.5, 0) and the label (1, 2)."""
    config = make_tiny_config(**options)
    per_slot = distance_to_labels(config, torch.tensor([[1.5, 0.0]]), torch.tensor([[1.0, 2.0]]))
    assert per_slot.tolist() == pytest.approx([expected])
    output = make_model(**options)(**batch)
    output.loss.backward()
    assert output.loss_per_strategy.mean().item() == pytest.approx(output.loss.item())


# --- The momentum ----------------------------------------------------------------------------------------------------


def test_momentum_schedules_by_hand():
    linear = EMACallback(0.9, 1.0, anneal_ratio=0.5)
    assert [linear.at(step, 8) for step in range(8)] == pytest.approx([0.9, 0.925, 0.95, 0.975, 1.0, 1.0, 1.0, 1.0])
    linear.first_step = 3  # of a run that went on: the schedule has the steps from there on
    assert linear.at(4, 7) == pytest.approx(0.95) and linear.at(5, 7) == 1.0
    cosine = EMACallback(0.9, 1.0, schedule="cosine")
    expected = [1 - 0.1 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(5)]
    assert [cosine.at(step, 4) for step in range(5)] == pytest.approx(expected)
    stretched = EMACallback(0.9, 1.0, schedule_stretch=2.0, anneal_ratio=0.5)  # half of twice the steps
    assert stretched.at(4, 8) == pytest.approx(0.95)


def test_the_momentum_by_default_and_of_a_run_that_went_on():
    default = EMACallback()
    assert [default.at(step, 10) for step in (0, 5, 10)] == pytest.approx([0.996, 0.998, 1.0])
    for schedule in ("linear", "cosine"):
        longer = EMACallback(0.9, 1.0, schedule=schedule, anneal_ratio=0.5)
        longer.first_step = 6  # the schedule begins anew there
        assert [longer.at(step, 10) for step in (6, 7, 8, 9)] == pytest.approx([0.9, 0.95, 1.0, 1.0])


def test_impossible_momentum_schedules_are_refused():
    EMACallback(0.0, 0.0), EMACallback(1.0, 1.0, anneal_ratio=1.0)  # the bounds are allowed
    for values in ({"momentum": -0.01}, {"momentum": 1.01}, {"final_momentum": -0.01}, {"final_momentum": 1.01}):
        with pytest.raises(ValueError, match=rf"{min(values)} must be in \[0, 1\]"):
            EMACallback(**values)
    for ratio in (-0.5, 1.01):
        with pytest.raises(ValueError, match=r"anneal_ratio must be in \(0, 1\]"):
            EMACallback(anneal_ratio=ratio)
    with pytest.raises(ValueError, match="schedule must be one of linear, cosine, got 'sudden'"):
        EMACallback(schedule="sudden")
    with pytest.raises(ValueError, match=r"anneal_ratio must be in \(0, 1\], got 0"):
        EMACallback(anneal_ratio=0)
    args = PretrainingArguments(output_dir="unused")
    assert (args.ema_schedule, args.ema_anneal_ratio) == ("linear", 1.0)


# --- Denoising -------------------------------------------------------------------------------------------------------


def test_half_of_the_picked_tokens_are_replaced():
    config = make_tiny_config(denoising_ratio=0.2)
    input_ids = torch.full((4, 250), -1, dtype=torch.int32)  # no token of the vocabulary
    noisy, picked = replace_tokens(input_ids, config)
    assert noisy.dtype == input_ids.dtype and noisy.shape == input_ids.shape and (input_ids == -1).all()
    assert len(picked) == len(picked.unique()) == 200
    replaced = noisy.flatten() != -1
    assert replaced.sum() == replaced[picked].sum() == 100
    tokens = noisy.flatten()[replaced]
    assert tokens.min() >= 0 and tokens.max() < config.vocab_size and len(tokens.unique()) > 10


@pytest.mark.parametrize("row_length", [None, 96])
def test_denoising_enters_the_loss_in_training_only(make_model, row_length):
    batch = DataCollatorForTJEPA(row_length=row_length)(make_examples([40, 23, 7, 64, 2]))
    model = make_model(denoising_weight=0.5, denoising_ratio=0.5).train()
    torch.manual_seed(1)
    output = model(**batch)
    close(output.loss, output.jepa_loss + 0.5 * output.denoising_loss)

    # by hand: the same draw, and the clean tokens predicted where it fell on tokens
    torch.manual_seed(1)
    clean = batch["input_ids"].flatten()[batch["context_indices"]]
    noisy, picked = replace_tokens(clean, model.config)
    states = model.context_encoder(
        noisy,
        position_ids=batch["position_ids"].flatten()[batch["context_indices"]],
        view_ids=batch["context_view_ids"],
    ).last_hidden_state.flatten(0, 1)
    picked = picked[batch["context_view_ids"].flatten()[picked] >= 0]
    logits = model.token_head(states[picked], model.get_input_embeddings().weight)
    close(output.denoising_loss, F.cross_entropy(logits, clean.flatten()[picked].long()))
    output.denoising_loss.backward()
    assert model.context_encoder.layers[0].mlp.up_proj.weight.grad.any()
    assert all(parameter.grad is None for parameter in model.predictor.parameters())

    output = model.eval()(**batch)
    assert output.denoising_loss is None and torch.equal(output.loss, output.jepa_loss)


# --- All of them together --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("predictor_type", ["self_attention", "cross_attention", "boundary"])
def test_gradients_of_autocast_point_where_those_of_float32_do(make_model, predictor_type):
    """Those of norms and of the mask token sum over all tokens: in bfloat16 little of them would be left."""
    options = {"token_prediction_weight": 1.0, "predictor_hidden_size": 16, "predictor_num_attention_heads": 2}
    model = make_model(predictor_type=predictor_type, **options)
    batch = DataCollatorForTJEPA()(make_examples([60] * 24))

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**batch).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    with torch.autocast("cpu", torch.bfloat16):
        actual = gradients()
    errors = {name: float((actual[name] - expected[name]).norm() / expected[name].norm()) for name in expected}
    assert max(errors.values()) < 0.05, {name: error for name, error in errors.items() if error >= 0.05}


def test_options_survive_saving(make_model, batch, tmp_path):
    options = {
        "target_layers": 2,
        "target_normalization": "instance",
        "loss_type": "cosine",
        "smooth_l1_beta": 0.5,
        "sigreg_weight": 0.1,
        "predictor_num_hidden_layers": 1,
        "predictor_type": "boundary",
        "denoising_weight": 0.3,
        "denoising_ratio": 0.2,
    }
    model = make_model(**options)
    model.save_pretrained(tmp_path)
    loaded = TJEPAForPreTraining.from_pretrained(tmp_path)
    for name, value in options.items():
        assert getattr(loaded.config, name) == value
    for candidate in (model, loaded):
        candidate.eval()
    assert torch.equal(model(**batch).jepa_loss, loaded(**batch).jepa_loss)


@pytest.mark.parametrize("overrides", ["sigreg_weight=1.0", "denoising_weight=0.3,predictor_type=boundary"])
def test_draws_are_the_same_after_a_resume(inputs, tmp_path, monkeypatch, overrides):  # noqa: F811
    options = {"config_overrides": f"{TINY},{overrides}", "save_steps": 2, "max_steps": 4}
    run(monkeypatch, arguments(inputs, tmp_path / "whole", **options))
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    run(monkeypatch, arguments(inputs, tmp_path / "resumed", resume_from_checkpoint="last", **options))
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_an_empty_batch_trains_nothing(make_model):
    options = {"target_layers": 2, "target_normalization": "instance", "loss_type": "cosine"}
    options |= {"predictor_type": "boundary", "denoising_weight": 1.0}
    model = make_model(sigreg_weight=1.0, **options).train()
    output = model(**DataCollatorForTJEPA()([]))
    output.loss.backward()
    assert output.jepa_loss == 0
    assert not any(parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)
