"""`--forecast`: what it says against what is known, and that it leaves nothing behind."""

import re
import time

import pytest

from helpers import arguments, run
from tjepa.training import forecast
from tjepa.training.trainer import TJEPATrainer


@pytest.mark.parametrize(
    ("evaluations", "number"),
    [
        ({"eval_strategy": "steps", "eval_steps": 100}, "5 evaluations"),
        ({"eval_strategy": "steps", "eval_steps": 0.25}, "5 evaluations"),
        ({"eval_strategy": "no"}, "1 evaluation,"),  # the one at the end
    ],
)
def test_what_the_run_would_take(inputs, tmp_path, monkeypatch, capsys, evaluations, number):
    """60 rows in batches of 8 for 400 steps, each of which takes at least 10 ms."""
    batches = []
    step = TJEPATrainer.training_step

    def slow_step(trainer, model, batch, *args, **kwargs):
        batches.append(int((batch["document_ids"] >= 0).sum()))
        time.sleep(0.01)
        return step(trainer, model, batch, *args, **kwargs)

    monkeypatch.setattr(TJEPATrainer, "training_step", slow_step)
    settings = {"max_steps": 400, **evaluations}
    out = tmp_path / "out"
    started = time.perf_counter()
    run(monkeypatch, [*arguments(inputs, out, **settings), "--forecast", "--push_to_hub", "--report_to=tensorboard"])
    seconds = (time.perf_counter() - started) / len(batches)
    said = capsys.readouterr().out
    assert len(batches) == forecast.NUM_FIRST_STEPS + forecast.NUM_STEPS and not out.exists()

    steps, per_step = re.search(rf"(\S+) steps of (\S+) s, \S+ tokens/s, \S+ of it for {number}", said).groups()
    assert steps == "400" and 0.01 < float(per_step) < seconds
    used, there_is = map(float, re.search(r"memory +(\S+) GB of (\S+) GB", said).groups())
    assert 0.2 < used < there_is
    epochs, rows = re.search(r"epochs +(\S+) of (\d+) rows with \S+ tokens\n +> --max_steps 8 is one", said).groups()
    assert rows == "60" and float(epochs) == pytest.approx(400 * 8 / 60, rel=0.01)
    ratio, tokens = re.search(r"tokens a parameter +(\S+): (\S+)k tokens, \S+k of them different", said).groups()
    assert float(tokens) == pytest.approx(sum(batches) / len(batches) * 400 / 1000, rel=0.01)
    assert float(ratio) > 1.0


@pytest.mark.parametrize(
    "ends, expected", [([0, 9, 12, 13, 13.5, 14.5], 0.75), ([0, 9, 9.5], 0.5), ([0, 9], 9.0)], ids=["6", "2", "1"]
)
def test_the_first_steps_count_only_where_there_are_no_others(ends, expected):
    stopwatch = forecast.Stopwatch()
    stopwatch.ends = ends
    assert stopwatch.seconds_per_step() == expected


@pytest.mark.parametrize("batch_size", [8, 30])
def test_a_run_that_is_shorter_than_the_measurement(inputs, tmp_path, monkeypatch, capsys, batch_size):
    settings = {"max_steps": 60 // batch_size, "per_device_train_batch_size": batch_size, "validation_file": None}
    run(
        monkeypatch,
        [*arguments(inputs, tmp_path / "out", **settings), "--forecast", "--validation_split_percentage=0"],
    )
    said = capsys.readouterr().out
    assert f"From {60 // batch_size} steps" in said and "evaluations" not in said


def test_without_training_there_is_nothing_to_forecast(inputs, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="--forecast is about training"):
        run(monkeypatch, [*arguments(inputs, tmp_path / "out"), "--forecast", "--do_train=False"])
