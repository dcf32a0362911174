"""The Trainer side: schedules to the last digit, the moving average in closed form, parameter groups, health."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments

from helpers import make_dataset, make_trainer
from tjepa import TJEPAForPreTraining
from tjepa.data_collator_tjepa import DataCollatorForTJEPA, MaskingStrategy
from tjepa.run_pretraining import PretrainingArguments
from tjepa.training.ema import EMACallback
from tjepa.training.health import HealthMonitor, collapse_verdict, feature_std, moment_sums, rank_share
from tjepa.training.schedules import WarmupThenDecay, WeightDecayCallback
from tjepa.training.trainer import TJEPATrainer


# --- Schedules -------------------------------------------------------------------------------------------------------


def test_schedules_equal_the_golden_ones(shared_folder):
    golden = json.loads((shared_folder / "golden" / "schedules.json").read_text())
    num_steps, ipe_scale = golden["num_training_steps"], golden["ipe_scale"]
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=golden["lr"])
    scheduler = WarmupThenDecay(
        optimizer, num_steps, golden["warmup_steps"], golden["start_lr"], golden["final_lr"], ipe_scale
    )
    momentum = EMACallback(golden["ema_momentum"], 1.0, ipe_scale)
    weight_decay = WeightDecayCallback(golden["weight_decay"], golden["final_weight_decay"], ipe_scale)
    for step in range(num_steps):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(golden["lr_by_step"][step], abs=1e-9, rel=0)
        assert momentum.at(step, num_steps) == pytest.approx(golden["ema_momentum_by_step"][step], abs=1e-9, rel=0)
        assert weight_decay.at(step, num_steps) == pytest.approx(golden["weight_decay_by_step"][step], abs=1e-9, rel=0)
        optimizer.step()
        scheduler.step()


def rates(steps, num_steps: int, num_warmup_steps: int, **options) -> list[float]:
    """In units of the highest one; from a tenth of it to a fifth."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = WarmupThenDecay(optimizer, num_steps, num_warmup_steps, 0.2, 0.4, **options)
    return [scheduler.factor(step) for step in steps]


def test_learning_rates_by_hand():
    assert rates(range(7), 6, 2, kind="linear") == pytest.approx([0.1, 0.55, 1.0, 0.8, 0.6, 0.4, 0.2])
    assert rates(range(7), 6, 2, kind="constant") == pytest.approx([0.1, 0.55] + 5 * [1.0])
    assert rates([2, 4, 6, 9], 6, 2) == pytest.approx([1.0, 0.6, 0.2, 0.2])  # a cosine; it does not rise again
    assert rates([2, 6, 10], 6, 2, schedule_stretch=10 / 6) == pytest.approx([1.0, 0.6, 0.2])
    stable = {"kind": "warmup_stable_decay"}
    assert rates([2, 15, 18, 19, 20], 20, 2, **stable) == pytest.approx([1.0, 1.0, 1.0, 0.6, 0.2])  # a tenth: 2 steps
    assert rates([8, 9, 10], 10, 2, **stable) == pytest.approx([1.0, 1.0, 0.2])  # one step
    assert rates([2, 3], 3, 2, **stable, num_decay_steps=9) == pytest.approx([1.0, 0.2])  # not before the warm-up ends
    assert rates([0, 3], 3, 3) == pytest.approx([0.1, 1.0])  # all warm-up
    assert rates([0, 10, 11, 12, 14], 4, 2, first_step=10, kind="linear") == pytest.approx([0.1, 0.1, 0.55, 1.0, 0.2])
    assert [WeightDecayCallback().at(step, 4) for step in (0, 2, 4)] == pytest.approx([0.04, 0.22, 0.4])
    decay = WeightDecayCallback(0.1, 0.3, schedule_stretch=2.0)
    decay.first_step = 6
    assert [decay.at(step, 10) for step in (6, 10, 14, 20)] == pytest.approx([0.1, 0.2, 0.3, 0.3])


def test_what_is_new_in_the_schedule_is_said(caplog):
    def schedule(lr: float, **options) -> WarmupThenDecay:
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=lr, betas=(0.9, options.pop("beta")))
        return WarmupThenDecay(optimizer, 8, 2, kind="linear", **options)

    before, now = schedule(1.0, beta=0.95), schedule(0.5, beta=0.999, final_lr=0.25)
    for _ in range(4):
        before.optimizer.step(), before.step()
    now.optimizer.load_state_dict(before.optimizer.state_dict())
    with caplog.at_level("INFO", logger="tjepa"):
        now.load_state_dict(before.state_dict())
    assert sorted(record.message.split(" is ")[0] for record in caplog.records) == [
        "betas",
        "final_lr",
        "learning_rate",
    ]
    assert "learning_rate is 0.5 from here on; up to the checkpoint it was 1.0." in caplog.text
    (group,) = now.optimizer.param_groups
    assert group["betas"] == (0.9, 0.999) and group["initial_lr"] == 0.5
    assert now.last_epoch == 4 and group["lr"] == pytest.approx(0.5 - 0.25 * 2 / 6)


def test_schedules_are_used_and_logged(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=6, warmup_steps=2, learning_rate=1e-3, start_lr=2e-4, ema_momentum=0.9)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["learning_rate"] for entry in logs][:3] == pytest.approx([2e-4, 6e-4, 1e-3])
    assert [entry["ema_momentum"] for entry in logs] == pytest.approx([0.9 + 0.1 * t / 6 for t in range(6)])
    expected = [0.4 - 0.36 * 0.5 * (1 + math.cos(math.pi * t / 6)) for t in range(6)]
    assert [entry["weight_decay"] for entry in logs] == pytest.approx(expected)
    decayed, not_decayed = trainer.optimizer.param_groups
    assert decayed["weight_decay"] == pytest.approx(expected[-1]) and not_decayed["weight_decay"] == 0.0


def test_optimizer_groups(tmp_path):
    trainer = make_trainer(tmp_path, {"token_prediction_weight": 1.0})
    model, optimizer = trainer.model, trainer.create_optimizer()
    decayed, not_decayed = optimizer.param_groups
    assert decayed["weight_decay"] == 0.04 and decayed["betas"] == (0.9, 0.95)
    assert all(p.ndim >= 2 for p in decayed["params"]) and all(p.ndim == 1 for p in not_decayed["params"])
    in_optimizer = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert in_optimizer == {id(p) for p in model.parameters() if p.requires_grad}
    assert not in_optimizer & {id(p) for p in model.target_encoder.parameters()}


# --- The moving average ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation_steps", [1, 3])
def test_moving_average_equals_the_closed_form(tmp_path, accumulation_steps):
    """target_k = prod(m_t) * target_0 + sum_t (1 - m_t) prod_{s>t}(m_s) * context_t, on an unmodified Trainer."""
    num_steps, contexts = 5, []

    class Recorder(EMACallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            contexts.append([p.detach().clone().double() for p in model.context_encoder.parameters()])
            super().on_optimizer_step(args, state, control, model=model, **kwargs)

    trainer = make_trainer(
        tmp_path, max_steps=num_steps, gradient_accumulation_steps=accumulation_steps, per_device_train_batch_size=2
    )
    trainer = Trainer(trainer.model, trainer.args, trainer.data_collator, trainer.train_dataset)
    trainer.add_callback(Recorder(0.8, 1.0))
    start = [p.detach().clone().double() for p in trainer.model.target_encoder.parameters()]
    trainer.train()

    momenta = [0.8 + 0.2 * t / num_steps for t in range(num_steps)]
    assert len(contexts) == num_steps  # once per optimizer step, never on a micro-step
    for index, target in enumerate(trainer.model.target_encoder.parameters()):
        expected = start[index] * np.prod(momenta)
        for t in range(num_steps):
            expected = expected + (1 - momenta[t]) * np.prod(momenta[t + 1 :]) * contexts[t][index]
        torch.testing.assert_close(target.double(), expected, rtol=1e-6, atol=1e-6)


def test_target_encoder_is_updated_in_float32_under_bfloat16(tmp_path, make_model):
    make_model().save_pretrained(tmp_path)
    model = TJEPAForPreTraining.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in model.context_encoder.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.target_encoder.parameters()} == {torch.float32}
    before = model.target_encoder.token_embedding.weight.clone()
    for _ in range(10):
        model.update_target_encoder(0.9999)
    context = model.context_encoder.token_embedding.weight.float()
    expected = context + 0.9999**10 * (before - context)
    torch.testing.assert_close(model.target_encoder.token_embedding.weight, expected, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="The target encoder is in 16 bits"):
        model.bfloat16().update_target_encoder(0.9999)
    model.update_target_encoder(1.0)  # stands still


def test_momentum_out_of_range():
    with pytest.raises(ValueError, match=r"final_momentum must be in \[0, 1\], got 1.1"):
        EMACallback(0.9, 1.1)
    with pytest.raises(ValueError, match="schedule_stretch must be positive, got 0"):
        EMACallback(schedule_stretch=0)


# --- Resume and evaluation -------------------------------------------------------------------------------------------


def run(tmp_path, resume=None, **arguments):
    trainer = make_trainer(tmp_path, {"hidden_dropout_prob": 0.1}, save_strategy="steps", save_steps=4, **arguments)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_evaluation_does_not_disturb_training(tmp_path):
    quiet = run(tmp_path / "quiet", max_steps=6)
    evaluated = run(tmp_path / "evaluated", max_steps=6, eval_strategy="steps", eval_steps=2)
    for a, b in zip(quiet.model.parameters(), evaluated.model.parameters(), strict=True):
        assert torch.equal(a, b)
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (quiet, evaluated)]
    assert losses[0] == losses[1]
    evaluations = [entry for entry in evaluated.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 3 and "eval_cosine" in evaluations[0]
    assert evaluated.evaluate()["eval_loss"] == evaluated.evaluate()["eval_loss"]  # always the same masks


def test_every_epoch_draws_new_masks(tmp_path):
    seen = []

    class Recorder(DataCollatorForTJEPA):
        def __call__(self, examples):
            seen.append({example["epoch"] for example in examples})
            return super().__call__(examples)

    trainer = make_trainer(tmp_path, collator=Recorder(), num_train_epochs=3, eval_strategy="epoch")
    trainer.train()
    train_batches, eval_batches = 6, 1
    assert seen == sum(([{epoch}] * train_batches + [{0}] * eval_batches for epoch in range(3)), [])


# --- Health ----------------------------------------------------------------------------------------------------------


def test_health_is_logged(tmp_path):
    strategies = [MaskingStrategy(3), MaskingStrategy(8, max_target_mask_ratio=0.5)]
    weights = {"variance_covariance_weight": 0.5, "token_prediction_weight": 0.5}
    trainer = make_trainer(tmp_path, weights, DataCollatorForTJEPA(strategies), max_steps=4, logging_steps=2)
    seen_by_later_callbacks = []

    class Reporter(EMACallback):  # stands for TensorBoard: it only reads what it is handed
        def on_optimizer_step(self, *args, **kwargs):
            pass

        def on_log(self, args, state, control, logs=None, **kwargs):
            seen_by_later_callbacks.append(dict(logs))

    trainer.add_callback(Reporter())
    trainer.train()
    first = trainer.state.log_history[0]
    figures = {"target_std", "prediction_std", "target_rank", "prediction_rank", "context_rank", "cosine"}
    figures |= {"mean_target_cosine", "jepa_loss", "variance_covariance_loss", "token_prediction_loss"}
    figures |= {"loss_block3_ratio0.25", "loss_block8_ratio0.5", "ema_momentum"}
    assert figures <= first.keys() and figures <= seen_by_later_callbacks[0].keys()
    per_strategy = [first["loss_block3_ratio0.25"], first["loss_block8_ratio0.5"]]
    assert first["jepa_loss"] == pytest.approx(np.mean(per_strategy), rel=1e-5)
    assert 0 < first["target_rank"] <= 1 and -1 <= first["cosine"] <= 1


def test_feature_moments():
    torch.manual_seed(0)
    features = torch.randn(500, 6) * torch.tensor([3.0, 1.0, 1.0, 1.0, 0.1, 0.0]) + 1000.0
    sums = sum(map(moment_sums, features.split(130)))
    assert feature_std(sums) == pytest.approx(features.std(dim=0, correction=0).mean().item(), rel=1e-4)
    singular_values = torch.linalg.svdvals((features - features.mean(dim=0)).double())
    shares = singular_values / singular_values.sum()
    entropy = -(shares * torch.log(shares.clamp(min=1e-30))).sum()
    assert rank_share(sums) == pytest.approx(entropy.exp().item() / 6, rel=1e-2)


@pytest.mark.parametrize(
    ("std", "cosine", "verdict"),
    [(0.9, 0.6, None), (0.05, 0.6, "barely differ"), (0.9, 0.4, "no closer to the targets"), (0.9, 0.5, "no closer")],
)
def test_collapse_verdict(std, cosine, verdict):
    metrics = {"eval_target_std": std, "eval_cosine": cosine, "eval_mean_target_cosine": 0.5}
    actual = collapse_verdict(metrics, prefix="eval_")
    assert actual is None if verdict is None else verdict in actual


def test_a_collapsed_model_is_called_collapsed(tmp_path, caplog):
    trainer = make_trainer(tmp_path, max_steps=1)
    with torch.no_grad():  # the same embedding for every token: every token has nearly the same label
        for encoder in (trainer.model.context_encoder, trainer.model.target_encoder):
            encoder.token_embedding.weight[:] = encoder.token_embedding.weight[:1]
    trainer.evaluate()
    assert trainer.health.verdict.startswith("collapsed")


def test_non_finite_loss_stops_the_run(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=6, save_strategy="steps", save_steps=2)

    class Poison(EMACallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                model.predictor.final_norm.weight.data.fill_(torch.nan)

    trainer.add_callback(Poison())
    with pytest.raises(FloatingPointError, match="not finite in optimizer step 4"):
        trainer.train()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["checkpoint-2"]
    saved = TJEPAForPreTraining.from_pretrained(tmp_path / "checkpoint-2")
    assert all(torch.isfinite(parameter).all() for parameter in saved.parameters())


def test_an_evaluation_without_slots_has_no_figures(tiny_config):
    assert HealthMonitor(["s"], tiny_config).new_statistics().summary() == {}


def test_what_the_trainer_needs_is_named(tmp_path, make_model):
    with pytest.raises(ValueError, match="needs PretrainingArguments as args .* got TrainingArguments and function"):
        TJEPATrainer(make_model(), TrainingArguments(tmp_path))
    with pytest.raises(ValueError, match="TJEPATrainer takes no compute_metrics"):
        TJEPATrainer(make_model(), PretrainingArguments(tmp_path), DataCollatorForTJEPA(), compute_metrics=len)
    args = PretrainingArguments(tmp_path, stop_on_collapse=True)
    with pytest.raises(ValueError, match="stop_on_collapse judges one evaluation set, and eval_dataset has .*: a, b"):
        TJEPATrainer(
            make_model(), args, DataCollatorForTJEPA(), eval_dataset={"a": make_dataset(), "b": make_dataset()}
        )


def test_heads_first_needs_no_rate_of_their_own(tmp_path):
    trainer = make_trainer(tmp_path, heads_first_ratio=0.5, max_steps=4)
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    rates = [line["learning_rate"] for line in trainer.state.log_history if "loss" in line]
    assert rates[:2] == [0.0, 0.0] and rates[2] > 0
    assert not all(p.equal(before[name]) for name, p in trainer.model.predictor.named_parameters(prefix="predictor"))
