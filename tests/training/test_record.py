"""What a run writes down and shows as it goes on: run.json, log.jsonl, and a line that a newcomer can read."""

import io
import json
import logging
import re
import sys
import time
from importlib.metadata import version

import pytest
import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainerState

from fault_injection import Fault, InjectedError
from helpers import arguments, make_trainer, run
from tjepa.corpus.documents import DataArguments
from tjepa.corpus.tokenizers import HubArguments
from tjepa.training.loop import train
from tjepa.training.progress import RunProgress, TokenClock
from tjepa.training.record import describe_run, find_changes, fingerprint, read_run


def read_log(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_log_file_is_the_log_after_a_resume_too(inputs, tmp_path, monkeypatch, caplog):
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(InjectedError):
        Fault("optimizer", "exception", step=4).install(patch)
        run(patch, arguments(inputs, out))
    assert [line["step"] for line in read_log(out)] == [1, 2, 3]  # one more than the checkpoint knows
    assert not (out / "trainer_state.json").exists() and read_run(out).last_step == 3
    run(monkeypatch, arguments(inputs, out, resume_from_checkpoint="last", seed=7, data_seed=42, learning_rate=1e-4))
    changes = [record.getMessage() for record in caplog.records if record.name.endswith("training.record")]
    assert changes == [
        "seed is 7 from here on; up to the checkpoint it was the default.",
        "data_seed is 42 from here on; up to the checkpoint it was the default.",
    ]
    log = read_log(out)
    assert [line["step"] for line in log if "loss" in line] == [1, 2, 3, 4]
    state = json.loads((out / "trainer_state.json").read_text())
    assert log[: len(state["log_history"])] == state["log_history"]
    assert all(line["tokens_per_second"] > 0 for line in log if "loss" in line)
    facts = json.loads((out / "run.json").read_text())
    assert facts["max_steps"] == 4 and facts["documents"]["train"]["dropped"]["null"] == 1
    assert len(facts["texts"]) == 8 and facts["settings"]["max_length"] == 64


def test_a_finished_run_is_not_described_anew(inputs, tmp_path, monkeypatch):
    """It makes no step: with other settings the card would tell what the model was not trained with."""
    out = tmp_path / "out"
    run(monkeypatch, arguments(inputs, out, max_steps=1))
    card = (out / "README.md").read_text()
    resume = {"max_steps": 1, "resume_from_checkpoint": "last"}
    with pytest.raises(ValueError, match="finished.*seed was the default and is 7, learning_rate was .* and is 0.5"):
        run(monkeypatch, arguments(inputs, out, seed=7, learning_rate=0.5, **resume))
    with pytest.raises(ValueError, match="finished.*split_percentage was .* is 50.*, max_train_samples was .* is 20"):
        run(monkeypatch, arguments(inputs, out, max_train_samples=20, validation_split_percentage=50, **resume))
    with pytest.raises(ValueError, match="finished.*masking strategies was .* and is block4_ratio0.5"):
        run(monkeypatch, arguments(inputs, out, masking_strategies="short_blocks", **resume))
    assert (out / "README.md").read_text() == card
    # the same in other words, and what is not of the training
    monkeypatch.chdir(inputs)
    run(monkeypatch, arguments(inputs, out, train_file="train.jsonl", logging_steps=3, **resume))


def test_one_folder_in_two_spellings_is_no_change(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"settings": {"dataset_name": "data/x", "seed": 1}}))
    facts = {"settings": {"dataset_name": f"{tmp_path}/data/x/", "seed": 2}}
    assert find_changes(tmp_path / "run.json", facts, ("dataset_name", "seed")) == [("seed", 1, 2)]


def test_a_run_over_a_finished_one_has_not_ended(inputs, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(monkeypatch, arguments(inputs, out, max_steps=1))
    assert read_run(out).has_ended
    with monkeypatch.context() as patch, pytest.raises(InjectedError):
        Fault("optimizer", "exception", step=3).install(patch)
        run(patch, arguments(inputs, out, overwrite_output_dir=True))
    assert not read_run(out).has_ended and not read_run(out).results


def test_secrets_stay_out():
    facts = describe_run(
        [DataArguments(train_file="https://me:key@host/a.txt?key=1"), HubArguments(token="hf_secret")], seed=1
    )
    text = json.dumps(facts)
    assert "hf_secret" not in text and "key" not in text and facts["settings"]["train_file"] == "https://host/a.txt"
    assert facts["seed"] == 1 and facts["versions"]["torch"] == version("torch")


def test_a_fingerprint_tells_weights_apart(make_model):
    assert fingerprint(make_model(0)) == fingerprint(make_model(0)) != fingerprint(make_model(1))


# --- The line of figures ---------------------------------------------------------------------------------------------


def test_a_line_fits_and_says_what_matters(tmp_path, capsys):
    trainer = make_trainer(tmp_path, max_steps=3, eval_strategy="steps", eval_steps=3)
    trainer.train()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5  # 3 steps, an evaluation, the end
    assert all(words in lines[0] for words in ("step 1/3", "loss ", "(constant guess ", "rank ", "tokens/s", " left"))
    assert "held out: loss" in lines[3] and lines[4].startswith("trained 3 steps in 00:0")
    progress = RunProgress()
    trainer.state.global_step = trainer.state.max_steps = 1_000_000
    logs = {"loss": 12345.678, "cosine": -0.1234, "mean_target_cosine": 0.1234, "target_rank": 0.1234}
    line = progress.describe({**logs, "tokens_per_second": 1_234_567.8}, trainer.state)
    assert len(line) <= 120 and "1.23M tokens/s" in line and "{" not in line
    probed = progress.describe({f"eval_{k}": v for k, v in logs.items()} | {"eval_probe_accuracy": 0.5}, trainer.state)
    assert "probe 50.0%" in probed and len(probed) <= 120
    counted = progress.describe({**logs, "train_runtime": 1.0, "num_input_tokens_seen": 9}, trainer.state)
    assert counted.startswith("step 1,000,000/1,000,000  loss ")  # with --include_num_input_tokens_seen


def test_a_run_that_evaluates_at_its_end_is_not_evaluated_again(inputs, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    run(monkeypatch, arguments(inputs, out, eval_strategy="steps", eval_steps=2, max_length=32))
    held_out = [line for line in capsys.readouterr().out.splitlines() if "held out" in line]
    assert [line.split()[1] for line in held_out] == ["2/4", "4/4"]
    results = json.loads((out / "all_results.json").read_text())
    last = [line for line in read_log(out) if "eval_loss" in line][-1]
    assert results["eval_loss"] == last["eval_loss"] and results["train_steps"] == last["step"] == 4


def test_one_bar_on_a_terminal_and_none_elsewhere(tmp_path, capsys, monkeypatch):
    trainer = make_trainer(tmp_path, max_steps=2, disable_tqdm=False)
    trainer.train()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    trainer = make_trainer(tmp_path, max_steps=2, disable_tqdm=False, eval_strategy="steps", eval_steps=1)
    trainer.train()
    bar = capsys.readouterr().err
    assert "2/2 steps" in bar and "tokens/s" in bar and "loss" in bar and " left" in bar
    assert bar.count("100%|") == 0  # the Trainer's own, of training and of evaluations


@pytest.mark.parametrize("columns", [80, 100, 120])
def test_a_line_fits_the_terminal(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    progress, state = RunProgress(), TrainerState(global_step=600, max_steps=1200)
    progress.training_bar = tqdm(file=io.StringIO())
    logs = {"loss": 9.788, "cosine": 0.511, "mean_target_cosine": 0.523, "target_rank": 0.69}
    training = progress.describe({**logs, "tokens_per_second": 699.0}, state)
    held_out = {f"eval_{name}": value for name, value in {**logs, "probe_accuracy": 0.745}.items()}
    assert len(training) <= columns and "cosine 0.511 (constant guess 0.523)" in training
    assert ("tokens/s" in training and " left" in training) == (columns > 100)
    assert len(line := progress.describe(held_out, state)) <= columns and "probe 74.5%" in line
    progress.training_bar = None  # a file: nothing is left out
    assert " left" in progress.describe({**logs, "tokens_per_second": 699.0}, state)


def test_a_warning_stands_above_the_bar(tmp_path, capsys, monkeypatch):
    class Warns(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            logging.getLogger().warning("look out")

    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr(logging.root, "handlers", [*logging.root.handlers, logging.StreamHandler(sys.stderr)])
    trainer = make_trainer(tmp_path, max_steps=2, disable_tqdm=False)
    train(trainer, None, None, [Warns()])
    bar = capsys.readouterr().err
    assert len(re.findall(r"\rlook out\n", bar)) == 2 and bar.count("look out") == 2


def test_tokens_per_second_leaves_pauses_out():
    clock = TokenClock()
    clock.resume()
    clock.count([{"document_ids": torch.tensor([[0, 0, 1, -1]])}] * 2)
    clock.on_step_end(None, None, None)
    clock.on_save(None, None, None)
    time.sleep(0.2)
    clock.resume()
    rate = clock.take(lambda tokens: tokens * 10)
    assert rate > 10 * 6 / 0.15
