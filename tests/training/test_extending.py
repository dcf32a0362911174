"""A finished run goes on for more steps, with the schedules that were chosen."""

import json
import logging
from pathlib import Path

import pytest
import torch

from helpers import StopAfter, arguments, make_trainer
from helpers import run as run_command
from kill_and_resume import assert_same_end, read_end
from tjepa.training.checkpoints import find_checkpoint, list_checkpoints
from tjepa.training.loop import train


CONSTANT = {"weight_decay": 0.1, "final_weight_decay": 0.1, "ema_momentum": 0.9, "final_ema_momentum": 0.9}
STABLE = {**CONSTANT, "lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 3}}


def run(folder: Path, max_steps: int, stop_after: int | None = None, **options):
    """With dropout; a checkpoint after every fourth step, of which one is kept."""
    defaults = {"save_strategy": "steps", "save_steps": 4, "save_total_limit": 1, "resume_from_checkpoint": "last"}
    defaults |= {"max_steps": max_steps, "warmup_steps": 2, "learning_rate": 1e-2, "do_eval": False}
    trainer = make_trainer(folder, {"hidden_dropout_prob": 0.1}, **{**defaults, **options})
    trainer.add_callback(StopAfter(stop_after))
    train(trainer, find_checkpoint(trainer.args), None)
    trainer.model.save_pretrained(folder)
    return trainer


def logged(folder: Path, name: str) -> list[float]:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [line[name] for line in log if name in line]


def test_another_number_of_steps_needs_a_choice(tmp_path):
    run(tmp_path, 6)
    for max_steps in (12, 9):
        with pytest.raises(ValueError, match="of a run of 6 steps.*--extend_schedule warm_up_again") as error:
            run(tmp_path, max_steps)
        assert "decay_again" not in str(error.value), "which such a schedule cannot do"
    with pytest.raises(ValueError, match="needs more steps than before.*holds 0"):
        run(tmp_path, 12, extend_schedule="decay_again")
    with pytest.raises(ValueError, match="allowed are decay_again, warm_up_again"):
        run(tmp_path, 12, extend_schedule="further")
    assert run(tmp_path, 6).state.global_step == 6  # the end already
    with pytest.raises(ValueError, match="checkpoint-6 lies at step 6 of 6, so --max_steps 4 leaves nothing to do"):
        run(tmp_path, 4)


def test_the_choice_is_asked_for_before_the_data_is_read(inputs, tmp_path, monkeypatch):
    options = {"do_eval": False, "report_to": "none"}
    run_command(monkeypatch, arguments(inputs, tmp_path, **options, max_steps=2))
    options |= {"max_steps": 4, "train_file": inputs / "empty.jsonl", "resume_from_checkpoint": "last"}
    with pytest.raises(ValueError, match="--extend_schedule"):
        run_command(monkeypatch, arguments(inputs, tmp_path, **options))


def test_warm_up_again(tmp_path, caplog):
    """All schedules begin anew where the run ended; stopped in between, it goes on like one that was not."""
    for name in ("whole", "stopped"):
        run(tmp_path / name, 6)
    first = {name: logged(tmp_path / "whole", name) for name in ("learning_rate", "weight_decay", "ema_momentum")}
    with caplog.at_level(logging.INFO, logger="tjepa"):
        run(tmp_path / "whole", 14, extend_schedule="warm_up_again")
    assert "begin anew at step 6" in caplog.text
    rates = logged(tmp_path / "whole", "learning_rate")
    assert rates[:6] == first["learning_rate"]
    assert rates[6] == pytest.approx(1e-5)  # where the first decay ended
    assert rates[8] == 1e-2 and rates[7] == pytest.approx((rates[6] + 1e-2) / 2)  # two steps of warm-up
    assert rates[8:] == sorted(rates[8:], reverse=True) and rates[-1] < 1e-3
    for name in ("weight_decay", "ema_momentum"):
        values = logged(tmp_path / "whole", name)
        assert values[:6] == first[name] and values[6] == first[name][0] and values[6:] == sorted(values[6:])

    options = {"extend_schedule": "warm_up_again"}
    trainer = run(tmp_path / "stopped", 14, stop_after=9, **options)
    assert trainer.state.global_step == 9
    run(tmp_path / "stopped", 14, **options)
    assert_same_end(read_end(tmp_path / "whole"), read_end(tmp_path / "stopped"))


def test_decay_again(tmp_path, caplog):
    """The checkpoint before the decay is kept; from there the run goes on like one that was longer at once."""
    run(tmp_path / "longer", 10, **STABLE)
    assert list(list_checkpoints(tmp_path / "longer")) == [7, 10]
    with caplog.at_level(logging.INFO, logger="tjepa"):
        run(tmp_path / "longer", 16, **STABLE, extend_schedule="decay_again")
    assert "going on from" in caplog.text and "checkpoint-7, before the decay" in caplog.text
    assert list(list_checkpoints(tmp_path / "longer")) == [13, 16]
    run(tmp_path / "at once", 16, **STABLE)
    assert_same_end(read_end(tmp_path / "at once"), read_end(tmp_path / "longer"))


def test_before_the_decay_there_is_nothing_to_choose(tmp_path):
    run(tmp_path / "longer", 10, stop_after=6, **STABLE)
    run(tmp_path / "longer", 16, **STABLE)
    run(tmp_path / "at once", 16, **STABLE)
    assert_same_end(read_end(tmp_path / "at once"), read_end(tmp_path / "longer"))


def test_a_stable_part_of_an_extended_run(tmp_path):
    trainer = run(tmp_path, 6)
    assert trainer.lr_scheduler.last_step_before_decay is None
    trainer = run(tmp_path, 14, **STABLE, extend_schedule="warm_up_again")
    assert trainer.lr_scheduler.last_step_before_decay == 11
    assert 11 in list_checkpoints(tmp_path)
    assert torch.isfinite(torch.tensor(logged(tmp_path, "loss"))).all()
