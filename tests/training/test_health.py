"""A lasting collapse and non-finite gradients: said in plain words, and stopping what must be stopped."""

import json

import pytest
import torch
from transformers import TrainerCallback, TrainerState

import helpers
from helpers import make_trainer
from tjepa.training.health import HealthMonitor, collapsed_evaluations, verdicts_of_evaluations


class Collapse(TrainerCallback):
    """From a step on, or for a single step: every token has the same embedding, so nearly the same label."""

    def __init__(self, first: int, last: int = 10**6):
        self.first, self.last = first, last
        self.healthy = None

    def on_step_end(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            if state.global_step == self.first:
                self.healthy = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            if self.first <= state.global_step <= self.last:
                for encoder in (model.context_encoder, model.target_encoder):
                    encoder.token_embedding.weight[:] = encoder.token_embedding.weight[:1]
            elif state.global_step == self.last + 1:
                model.load_state_dict(self.healthy)


class Verdicts(HealthMonitor):
    """Judges by the targets' deviation alone: predictions of so small a model never beat the mean target."""

    def judge(self, metrics, state, num_warmup_steps, is_training):
        for figures in (metrics, state.log_history[-1]):
            figures["eval_cosine"], figures["eval_mean_target_cosine"] = 1.0, 0.5
        super().judge(metrics, state, num_warmup_steps, is_training)


def run(tmp_path, collapse: Collapse, stop_on_collapse: bool = True, resume=None, **arguments):
    defaults = {"max_steps": 8, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(tmp_path, **{**defaults, **arguments})
    trainer.health = Verdicts(["s"] * 7, trainer.model.config, stop_on_collapse, patience=3)
    trainer.add_callback(collapse)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, trainer.health


def test_a_lasting_collapse_stops_the_run(tmp_path, caplog):
    trainer, health = run(tmp_path, Collapse(first=3))
    assert trainer.state.global_step == 5 and health.must_stop  # evaluations 3, 4, 5
    assert "so in the last 3 evaluations, since step 3" in health.verdict and health.verdict.startswith("collapsed")
    assert any(record.levelname == "ERROR" and health.verdict in record.getMessage() for record in caplog.records)
    saved = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert saved == ["checkpoint-1", "checkpoint-2", "checkpoint-3", "checkpoint-4"]  # not the one of the stop


def test_the_epoch_that_a_verdict_cuts_short_is_not_saved(tmp_path):
    """With `--save_strategy epoch`: `last` would take that checkpoint."""
    trainer, health = run(tmp_path, Collapse(first=3), save_strategy="epoch")
    assert trainer.state.global_step == 5 and health.must_stop
    assert not list(tmp_path.glob("checkpoint-*"))


def test_without_the_flag_it_is_only_said(tmp_path, caplog):
    trainer, health = run(tmp_path, Collapse(first=3), stop_on_collapse=False)
    assert trainer.state.global_step == 8 and not health.must_stop
    assert "so in the last 6 evaluations, since step 3" in caplog.text
    assert collapsed_evaluations(trainer.state) == [3, 4, 5, 6, 7, 8]


def test_a_passing_collapse_does_not_stop(tmp_path):
    trainer, health = run(tmp_path, Collapse(first=3, last=4))
    assert trainer.state.global_step == 8 and health.verdict is None


def test_evaluations_in_the_warm_up_do_not_count(tmp_path):
    trainer, _ = run(tmp_path, Collapse(first=1), warmup_steps=3)
    assert trainer.state.global_step == 6  # evaluations 4, 5, 6


def test_the_count_goes_on_after_a_resume(tmp_path):
    run(tmp_path / "a", Collapse(first=3), max_steps=4, stop_on_collapse=False)
    trainer, health = run(tmp_path / "b", Collapse(first=5), resume=str(tmp_path / "a" / "checkpoint-4"))
    assert trainer.state.global_step == 5 and "in the last 3 evaluations, since step 3" in health.verdict


def verdicts(leads: list[float], max_steps: int, first_step: int = 100) -> list[bool]:
    """Whether an evaluation each 100 steps, whose predictions lead the mean target by so much, is called collapsed."""
    figures = {"eval_target_std": 0.5, "eval_mean_target_cosine": 0.5}
    log = [{**figures, "step": 100 * i + first_step, "eval_cosine": 0.5 + lead} for i, lead in enumerate(leads)]
    found = verdicts_of_evaluations(TrainerState(log_history=log, max_steps=max_steps))
    return [verdict is not None for verdict in found.values()]


def test_predictions_may_come_from_below():
    """A healthy run begins under the mean target, and overtakes it before half of its steps."""
    assert verdicts([-0.2, -0.15, -0.1, 0.0, 0.1], max_steps=1000) == [False] * 5
    assert verdicts([-0.2, -0.15, -0.1, -0.05, -0.01], max_steps=600) == [False, False, False, True, True]
    assert verdicts([-0.2, -0.25, -0.25, -0.2], max_steps=1000) == [False, True, True, False]
    assert verdicts([-0.2, -0.15], max_steps=1000, first_step=0) == [True, False]  # step 0: what was not trained


def test_the_script_says_it_in_the_card_and_by_its_exit_code(inputs, tmp_path, monkeypatch):  # noqa: F811
    """So high a learning rate that the predictions never beat the mean target."""
    flags = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 30, "learning_rate": 1.0, "start_lr": 1.0}
    arguments = helpers.arguments(inputs, tmp_path / "out", stop_on_collapse=True, **flags)
    with pytest.raises(SystemExit) as stop:
        helpers.run(monkeypatch, arguments)
    assert stop.value.code == 3
    card = (tmp_path / "out" / "README.md").read_text()
    steps = json.loads((tmp_path / "out" / "all_results.json").read_text())["train_steps"]
    assert 10 <= steps < 20  # how soon is a matter of rounding at such a rate
    assert "Health: collapsed: " in card and f"so in the last 3 evaluations, since step {steps - 2}" in card


# --- Non-finite gradients --------------------------------------------------------------------------------------------


class PoisonGradient(TrainerCallback):
    """A non-finite gradient under a finite loss: the backward pass of one parameter overflows."""

    def __init__(self, step: int, value: float):
        self.step, self.value = step, value

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.predictor.mask_token.register_hook(
            lambda gradient: torch.full_like(gradient, self.value) if state.global_step + 1 == self.step else gradient
        )


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_non_finite_gradient_stops_the_run_before_it_is_saved(tmp_path, value, max_grad_norm):
    trainer = make_trainer(
        tmp_path, max_steps=6, save_strategy="steps", save_steps=1, logging_steps=5, max_grad_norm=max_grad_norm
    )
    health = trainer.health
    trainer.add_callback(PoisonGradient(3, value))
    with pytest.raises(FloatingPointError, match="not finite in optimizer step 3.*--resume_from_checkpoint last"):
        trainer.train()
    assert health.num_nonfinite_gradients == 1
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["checkpoint-1", "checkpoint-2"]


def test_steps_that_the_gradient_scaler_skips_are_counted(tmp_path, caplog):
    """torch's own gradient scaler, on the CPU."""
    trainer = make_trainer(tmp_path, max_steps=6, logging_steps=2)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    trainer.accelerator.native_amp = True
    health = trainer.health
    trainer.add_callback(PoisonGradient(3, torch.inf))
    weights = []

    class Recorder(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            weights.append(model.context_encoder.token_embedding.weight.detach().clone())

    trainer.add_callback(Recorder())
    trainer.train()
    assert trainer.state.global_step == 6 and health.num_nonfinite_gradients == 1
    assert torch.equal(weights[1], weights[2]) and not torch.equal(weights[2], weights[3])  # step 3 was skipped
    counts = [entry.get("nonfinite_gradients") for entry in trainer.state.log_history if "loss" in entry]
    assert counts == [None, 1, 1]
    assert caplog.text.count("skipped these steps") == 1 and "1 in all" in caplog.text
