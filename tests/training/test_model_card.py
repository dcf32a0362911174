"""The card of a pretraining folder says which weights it describes, and nothing that is nobody's business."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerState, TrainingArguments

from helpers import arguments, run
from tjepa.training.model_card import describe_source, describe_weights, write_card


def test_the_card_names_the_step_and_the_figure_of_the_best_weights(inputs, tmp_path, monkeypatch):
    best = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    best |= {"metric_for_best_model": "target_std", "greater_is_better": False}
    run(monkeypatch, arguments(inputs, tmp_path / "out", **best, max_steps=3, learning_rate="3e-2", warmup_steps=1))
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    step = state["best_global_step"]
    card = (tmp_path / "out" / "README.md").read_text()
    figure = f"target_std ({state['best_metric']:.4f})"
    assert f"those of step {step} of 3, which had the best {figure}" in card
    saved, at_step = (load_file(tmp_path / "out" / name / "model.safetensors") for name in ("", f"checkpoint-{step}"))
    assert all(torch.equal(saved[name], at_step[name]) for name in saved)


def test_which_weights_a_run_ends_with(tmp_path):
    state = TrainerState(global_step=7, best_global_step=3, best_metric=0.25)
    plain = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert describe_weights(plain, state) == "those of step 7, the last"
    best = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, eval_strategy="steps", save_strategy="steps", eval_steps=1,
        save_steps=1, load_best_model_at_end=True, metric_for_best_model="loss",
    )  # fmt: skip
    assert describe_weights(best, state) == "those of step 3 of 7, which had the best loss (0.2500)"
    assert describe_weights(best, TrainerState(global_step=7)) == "those of step 7, the last"


@pytest.mark.parametrize(
    ("dataset_name", "train_file", "expected"),
    [
        ("owner/name", None, ("owner/name", True)),
        ("quickstart", None, ("quickstart", False)),
        (None, "/home/ann/secret project/stories.jsonl", ("stories.jsonl", False)),
        (None, "https://ann:pass@host.example/data/a.parquet?key=1", ("a.parquet", False)),
    ],
)
def test_a_source_has_its_name_alone(dataset_name, train_file, expected):
    assert describe_source(dataset_name, train_file) == expected


def test_the_template_is_filled(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True)
    write_card(
        args,
        TrainerState(global_step=2),
        dataset="part-*.jsonl",
        is_on_hub=False,
        figures={"eval_loss": 0.5, "eval_pearson": None, "eval_runtime": 1.0},
        settings={"rate": 3},
        max_length=64,
        task_type="text-classification",
        tags=["t-jepa"],
        license=None,
        summary="A model.",
        auto_class="AutoModelForSequenceClassification",
        rows="- train: 3 rows",
    )
    card = (tmp_path / "run" / "README.md").read_text()
    assert (
        "# run\n" in card
        and "| rate | 3 |" in card
        and "| maximum length (tokens) | 64 |" in card
        and "| eval_loss | 0.5000 |" in card
    )
    assert "| eval_pearson | undefined |" in card and "runtime" not in card
    assert "{{" not in card and "{%" not in card and "Health" not in card and "masking" not in card
    assert card.count("\n\n\n") == 0
