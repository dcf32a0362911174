"""What an evaluation is: one definition of its loss, the same masks every time, a verdict when there can be one; and
what `--do_train False` leaves alone."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

from helpers import arguments, make_dataset, make_tiny_config, make_trainer, run
from tjepa import TJEPAForPreTraining, run_pretraining
from tjepa.data_collator_tjepa import DataCollatorForTJEPA
from tjepa.downstream import quickstart_report
from tjepa.training import publishing
from tjepa.training.arguments import PretrainingArguments
from tjepa.training.health import HEALTH_FIGURES, collapse_verdict, evaluation_figures, moment_sums, rank_share
from tjepa.training.trainer import TJEPATrainer


STEPS = {"eval_strategy": "steps", "eval_steps": 1}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# --- Without training ------------------------------------------------------------------------------------------------


def test_evaluation_only_writes_figures_of_what_it_loads(inputs, tmp_path, monkeypatch):
    output_dir = tmp_path / "out"
    with pytest.raises(FileNotFoundError, match="evaluates a trained model, and .* holds none"):
        run(monkeypatch, arguments(inputs, output_dir, do_train=False))
    run(monkeypatch, arguments(inputs, output_dir))
    before = contents(output_dir)
    expected = json.loads(before["all_results.json"])

    def refuse(*args, **kwargs):
        raise AssertionError("something was published")

    monkeypatch.setattr(publishing.HubPublisher, "__init__", refuse)
    figures = {}
    for name, flags in {
        "the folder": {"push_to_hub": True},
        "the last checkpoint": {"resume_from_checkpoint": "last"},
        "another": {"resume_from_checkpoint": output_dir / "checkpoint-2"},
    }.items():
        run(monkeypatch, arguments(inputs, output_dir, do_train=False, config_overrides=None, **flags))
        figures[name] = json.loads((output_dir / "eval_results.json").read_text())
        (output_dir / "eval_results.json").unlink()
        assert contents(output_dir) == before
    assert figures["the folder"]["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-6)
    assert figures["the last checkpoint"]["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-6)
    assert figures["the folder"]["train_steps"] == 4 and figures["another"]["train_steps"] == 2
    assert abs(figures["another"]["eval_loss"] - expected["eval_loss"]) > 1e-6


@pytest.mark.parametrize("what_fails", ["evaluate", "report_what_was_learned"])
def test_the_model_is_saved_before_anything_else_can_fail(inputs, tmp_path, monkeypatch, what_fails):
    def fail(*args, **kwargs):
        raise RuntimeError("failed")

    monkeypatch.setattr(run_pretraining, what_fails, fail)
    monkeypatch.setattr(run_pretraining, "QUICKSTART", None)  # any run without a dataset's name is the quickstart
    with pytest.raises(RuntimeError, match="failed"):
        run(monkeypatch, arguments(inputs, tmp_path / "out", max_steps=1))
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= contents(tmp_path / "out").keys()


def test_the_closing_report_reads_the_corpus_where_it_is_kept(monkeypatch):
    class Read(Exception):
        pass

    def load(cache_dir):
        raise Read(cache_dir)

    monkeypatch.setattr(quickstart_report, "load_quickstart_documents", load)
    with pytest.raises(Read, match="my-cache"):
        quickstart_report.report_what_was_learned(None, None, None, "my-cache")


def test_a_run_without_evaluation(inputs, tmp_path, monkeypatch):
    run(monkeypatch, arguments(inputs, tmp_path / "out", max_steps=1, do_eval=False))
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results["train_steps"] == 1 and not any(name.startswith("eval_") for name in results)
    assert "Health: not evaluated" in (tmp_path / "out" / "README.md").read_text()


def test_results_name_the_step_of_the_best_weights(inputs, tmp_path, monkeypatch):
    best = {"load_best_model_at_end": True, "greater_is_better": True, "save_steps": 1}
    run(monkeypatch, arguments(inputs, tmp_path / "out", **STEPS, **best))
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    losses = {line["step"]: line["eval_loss"] for line in log if "eval_loss" in line}
    assert results["best_step"] == max(losses, key=losses.get) and results["best_by"] == "loss"
    assert results["eval_loss"] == pytest.approx(max(losses.values()), abs=1e-6)


@pytest.mark.parametrize(
    ("name", "is_better"), [("loss_block8", False), ("eval_loss_block8", False), ("loss", False), ("cosine", True)]
)
def test_the_smaller_loss_is_the_better_one(tmp_path, name, is_better):
    options = {"output_dir": str(tmp_path), "metric_for_best_model": name}
    assert PretrainingArguments(**options).greater_is_better is is_better
    assert PretrainingArguments(**options, greater_is_better=True).greater_is_better


def test_a_finished_run_that_is_resumed_keeps_its_figures_wherever_it_lies(inputs, tmp_path, monkeypatch):
    best = {**STEPS, "load_best_model_at_end": True, "greater_is_better": True, "save_steps": 1}
    run(monkeypatch, arguments(inputs, tmp_path / "out", **best))
    results, weights = (contents(tmp_path / "out")[name] for name in ("all_results.json", "model.safetensors"))
    (tmp_path / "out").rename(tmp_path / "moved")
    run(monkeypatch, arguments(inputs, tmp_path / "moved", **best, resume_from_checkpoint="last"))
    again = contents(tmp_path / "moved")
    assert again["model.safetensors"] == weights
    before, now = json.loads(results), json.loads(again["all_results.json"])
    assert before.keys() <= now.keys() and before["train_loss"] == now["train_loss"]


# --- The loss and the masks ------------------------------------------------------------------------------------------


def test_an_evaluation_is_that_of_one_batch_of_all_documents(tmp_path):
    weights = {"token_prediction_weight": 0.5}
    figures = [
        make_trainer(tmp_path, weights, per_device_eval_batch_size=size, dataloader_drop_last=drop_last).evaluate()
        for size, drop_last in ((8, False), (3, False), (5, True))
    ]
    trainer = make_trainer(tmp_path, weights)
    trainer.model.eval()
    whole = trainer.model(**DataCollatorForTJEPA()(make_dataset(8).__getitems__(list(range(8)))))
    for metrics in figures:
        assert metrics["eval_jepa_loss"] == pytest.approx(whole.jepa_loss.item(), abs=1e-6)
        assert metrics["eval_token_prediction_loss"] == pytest.approx(whole.token_prediction_loss.item(), abs=1e-5)
        assert metrics["eval_loss"] == pytest.approx(whole.loss.item(), abs=1e-5)
        losses = {name.removeprefix("eval_") for name in metrics if "loss" in name}
        names = [strategy.name for strategy in trainer.data_collator.strategies]
        assert losses == {*evaluation_figures(trainer.model.config, names)} - {*HEALTH_FIGURES}
    plain = make_trainer(tmp_path, per_device_eval_batch_size=3).evaluate()
    assert plain["eval_loss"] == plain["eval_jepa_loss"]
    ours = {name.removeprefix("eval_") for name in plain if "loss" not in name} - {"epoch"}
    assert {name for name in ours if not name.startswith(("model_", "runtime", "s"))} == {*HEALTH_FIGURES}


@pytest.mark.parametrize("workers", [0, 2])
def test_every_evaluation_has_the_masks_of_the_first_epoch(tmp_path, workers):
    options = {"dataloader_num_workers": workers, "dataloader_persistent_workers": workers > 0, "learning_rate": 1e-9}
    trainer = make_trainer(tmp_path, num_train_epochs=3, eval_strategy="epoch", ema_momentum=1.0, **options)
    trainer.train()
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)  # the weights hardly moved; other masks differ by 1e-2
    trained_on = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    trainer.train_dataset.set_epoch(5)
    if not workers:  # the Trainer keeps the loader of persistent workers, whatever is asked for
        assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == pytest.approx(trained_on, abs=1e-6)


def test_an_evaluation_on_the_training_set_leaves_the_masks_of_training(tmp_path):
    def losses(evaluates_on_training_set: bool) -> list[float]:
        trainer = make_trainer(tmp_path, num_train_epochs=2, **{**STEPS, "eval_steps": 2, "max_steps": -1})
        if evaluates_on_training_set:
            trainer.eval_dataset = trainer.train_dataset
        trainer.train()
        return [line["loss"] for line in trainer.state.log_history if "loss" in line]

    assert losses(True) == losses(False)


def test_several_evaluation_sets(tmp_path):
    """Also with workers that stay: the Trainer keeps a loader for each name."""
    options = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    trainer = make_trainer(tmp_path, **options)
    expected = [trainer.evaluate(dataset)["eval_loss"] for dataset in (trainer.eval_dataset,)]
    trainer = make_trainer(tmp_path, **options)
    trainer.eval_dataset = {"a": trainer.train_dataset, "b": trainer.eval_dataset}
    metrics = trainer.evaluate()
    assert metrics["eval_b_loss"] == pytest.approx(expected[0], abs=1e-6) != metrics["eval_a_loss"]
    trainer.eval_dataset = None
    with pytest.raises(ValueError, match="eval_dataset"):
        trainer.evaluate()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_evaluates_as_the_uninterrupted_one(tmp_path, workers):
    options = {"dataloader_num_workers": workers, "dataloader_persistent_workers": workers > 0, "max_steps": 8}
    options |= {**STEPS, "eval_steps": 2, "save_strategy": "steps", "save_steps": 4}

    def losses(checkpoint=None):
        trainer = make_trainer(tmp_path, {"hidden_dropout_prob": 0.1}, **options)
        trainer.train(resume_from_checkpoint=checkpoint)
        return {line["step"]: line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line}

    whole = losses()
    assert list(whole) == [2, 4, 6, 8] and len(set(whole.values())) == 4
    assert losses(str(tmp_path / "checkpoint-4")) == pytest.approx(whole, abs=1e-6)


def test_health_figures_are_logged_by_epoch(tmp_path):
    trainer = make_trainer(tmp_path, num_train_epochs=2, logging_strategy="epoch", gradient_accumulation_steps=4)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert all({"target_std", "cosine", "ema_momentum", "weight_decay", "jepa_loss"} <= line.keys() for line in lines)


def test_a_batch_that_is_never_full_is_said_to_be(tmp_path):
    trainer = make_trainer(tmp_path, per_device_train_batch_size=25, dataloader_drop_last=True)
    with pytest.raises(ValueError, match="24 rows do not fill a batch of 25"):
        trainer.train()


# --- Verdicts --------------------------------------------------------------------------------------------------------


def test_no_verdict_before_the_warm_up_is_over(inputs, tmp_path, monkeypatch, caplog):
    run(monkeypatch, arguments(inputs, tmp_path / "trial", max_steps=2))
    run(monkeypatch, arguments(inputs, tmp_path / "warm-up", max_steps=12, warmup_steps=12, **STEPS))
    assert "collapsed" not in caplog.text
    assert "Health: No collapse. Look at: " in (tmp_path / "trial" / "README.md").read_text()


class Collapse(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            for encoder in (model.context_encoder, model.target_encoder):
                embedding = encoder.get_input_embeddings().weight
                embedding[:] = embedding[:1]


@pytest.mark.parametrize(
    "options",
    [
        {"eval_strategy": "epoch", "save_strategy": "epoch", "num_train_epochs": 5},
        {**STEPS, "save_strategy": "epoch", "num_train_epochs": 5},
        {**STEPS, "save_strategy": "best", "metric_for_best_model": "loss", "max_steps": 5},
    ],
)
def test_no_checkpoint_after_the_verdict(tmp_path, options):
    trainer = make_trainer(tmp_path, stop_on_collapse=True, collapse_patience=1, **options)
    trainer.add_callback(Collapse())
    trainer.train()
    assert trainer.health.must_stop and trainer.state.global_step == (6 if options["eval_strategy"] == "epoch" else 1)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_figures_that_are_not_finite_are_a_verdict(tmp_path):
    figures = {"target_std": math.nan, "cosine": 0.5, "mean_target_cosine": 0.2}
    assert collapse_verdict(figures).startswith("not finite")
    assert collapse_verdict({**figures, "target_std": 0.5, "cosine": math.nan}).startswith("not finite")
    assert math.isnan(rank_share(moment_sums(torch.full((4, 3), torch.nan))))
    trainer = make_trainer(tmp_path)
    trainer.model.predictor.final_norm.weight.data.fill_(torch.nan)
    trainer.evaluate()
    assert trainer.health.verdict.startswith("not finite")


def test_weights_that_are_not_finite_end_the_run_at_the_evaluation(tmp_path):
    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.predictor.final_norm.weight.data.fill_(torch.nan)

    trainer = make_trainer(tmp_path, max_steps=3, **STEPS, save_strategy="steps", save_steps=1)
    trainer.add_callback(Poison())
    with pytest.raises(FloatingPointError, match="evaluation after step 1 is not finite.*--learning_rate"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


# --- Schedules of this start -----------------------------------------------------------------------------------------


def test_weight_decay_from_zero(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=4, weight_decay=0.0, final_weight_decay=0.4)
    trainer.train()
    logged = [line["weight_decay"] for line in trainer.state.log_history if "loss" in line]
    matrices, others = trainer.optimizer.param_groups
    assert logged[0] == 0.0 and 0 < logged[1] < logged[3] == matrices["weight_decay"] and others["weight_decay"] == 0.0


def test_a_lower_rate_counts_on_a_resume(tmp_path, caplog):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "warmup_steps": 1}
    make_trainer(tmp_path, **options).train()
    caplog.set_level("INFO", logger="tjepa")
    changed = make_trainer(tmp_path, learning_rate=1e-4, adam_beta2=0.9, **options)
    changed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    rates = [line["learning_rate"] for line in changed.state.log_history if "loss" in line]
    fresh = make_trainer(tmp_path / "fresh", learning_rate=1e-4, **options)
    fresh.train()
    assert rates[2:] == [line["learning_rate"] for line in fresh.state.log_history if "loss" in line][2:]
    assert {group["betas"] for group in changed.optimizer.param_groups} == {(0.9, 0.9)}
    assert "learning_rate is 0.0001 from here on; up to the checkpoint it was 0.001" in caplog.text
    assert "betas is (0.9, 0.9)" in caplog.text


def test_start_and_final_rate_follow_the_rate(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=6, learning_rate=1e-5, warmup_steps=3)
    trainer.train()
    rates = [line["learning_rate"] for line in trainer.state.log_history if "loss" in line]
    assert rates[0] == pytest.approx(2e-6) and rates[0] < rates[1] < rates[2] < rates[3] == pytest.approx(1e-5)


def test_an_optimizer_that_is_given_keeps_its_rate_and_its_weight_decay(tmp_path):
    model = TJEPAForPreTraining(make_tiny_config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01)
    options = {"max_steps": 6, "warmup_steps": 3, "logging_steps": 1, "save_strategy": "no"}
    args = PretrainingArguments(str(tmp_path), **options)
    trainer = TJEPATrainer(model, args, DataCollatorForTJEPA(), make_dataset(), optimizers=(optimizer, None))
    trainer.train()
    rates = [line["learning_rate"] for line in trainer.state.log_history if "loss" in line]
    assert rates[0] == pytest.approx(2e-6) and max(rates) == rates[3] == pytest.approx(1e-5)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01]
    assert not any("weight_decay" in line for line in trainer.state.log_history)


def test_another_batch_size_is_found_before_the_schedule_is_made(inputs, tmp_path, monkeypatch):
    forward = run_pretraining.TJEPATrainer.compute_loss

    def compute_loss(trainer, model, batch, *args, **kwargs):
        if model.training and batch["document_ids"].max() >= 4:
            raise RuntimeError("CUDA out of memory.")
        return forward(trainer, model, batch, *args, **kwargs)

    monkeypatch.setattr(run_pretraining.TJEPATrainer, "compute_loss", compute_loss)
    options = {"max_steps": None, "num_train_epochs": 1, "auto_find_batch_size": True, "save_total_limit": 1}
    run(monkeypatch, arguments(inputs, tmp_path / "out", save_steps=1, warmup_steps=2, **options))
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    rates = [line["learning_rate"] for line in log if "loss" in line]
    assert len(rates) >= 15 and rates[2] == max(rates) and len(set(rates)) == len(rates)
    per_step = math.ceil(60 / len(rates))
    assert f"| documents per step and process | {per_step} |" in (tmp_path / "out" / "README.md").read_text()
    assert len(list((tmp_path / "out").glob("checkpoint-*"))) == 1


def test_a_plain_trainer_needs_only_the_moving_average(tmp_path):
    from transformers import Trainer

    from tjepa.training.ema import EMACallback

    args = TrainingArguments(str(tmp_path), max_steps=1, remove_unused_columns=False, use_cpu=True, report_to="none")
    model = make_trainer(tmp_path).model
    before = [parameter.clone() for parameter in model.target_encoder.parameters()]
    Trainer(model, args, DataCollatorForTJEPA(), make_dataset(), callbacks=[EMACallback(0.5)]).train()
    pairs = zip(before, model.target_encoder.parameters(), model.context_encoder.parameters(), strict=True)
    for old, target, context in pairs:
        torch.testing.assert_close(target, 0.5 * old + 0.5 * context)
