"""What the tests of fine-tuning share: data, a tiny encoder in a folder, and a run of the command in this process."""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from helpers import make_tiny_config, with_target_of_its_own, write_jsonl
from tjepa import TJEPAForPreTraining
from tjepa.corpus.train_tokenizer import train_tokenizer
from tjepa.downstream import run_classification


WORDS = ["the", "fox", "sees", "a", "hen", "and", "runs", "home", "before", "night", "falls"]
COLOURS = ["red", "green", "blue"]


def make_rows(num_rows: int, seed: int = 0) -> list[dict]:
    """Texts that name one or two colours; the first is the label, both are the labels."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(num_rows):
        colours = rng.choice(COLOURS, size=rng.integers(1, 3), replace=False).tolist()
        words = rng.choice(WORDS, size=8).tolist()
        rows.append({"text": " ".join([*words, colours[0]] * 2), "label": colours[0], "colours": colours})
    return rows


def make_folder(folder: Path) -> Path:
    """A pretraining folder (with dropout) and an encoder folder, whose tokenizer knows the words; train and test."""
    tokenizer = train_tokenizer([" ".join([*WORDS, *COLOURS])] * 50, vocab_size=320, model_max_length=32)
    torch.manual_seed(0)
    config = make_tiny_config(
        vocab_size=320, max_position_embeddings=32, hidden_dropout_prob=0.1, initializer_range=0.02, pad_token_id=0
    )
    model = with_target_of_its_own(TJEPAForPreTraining(config), scale=0.02)
    for name, saved in (("pretraining", model), ("encoder", model.context_encoder)):
        saved.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / "tokenizer")
    write_jsonl(folder / "train.jsonl", make_rows(200))
    write_jsonl(folder / "test.jsonl", make_rows(60, seed=1))
    return folder


def arguments(folder: Path, output_dir: Path, **overrides) -> list[str]:
    values = {
        "model_name_or_path": folder / "pretraining",
        "train_file": folder / "train.jsonl",
        "learning_rate": "1e-2",
        "lr_scheduler_type": "constant",
        "max_steps": 40,
        "report_to": "none",
        "save_strategy": "no",
        "output_dir": output_dir,
        "cache_dir": output_dir.parent / "cache",
    }
    return [f"--{name}={value}" for name, value in {**values, **overrides}.items() if value is not None]


def run(monkeypatch, argv: list[str], script=run_classification) -> dict:
    """Runs the command; returns what it wrote into all_results.json, or eval_results.json without training."""
    monkeypatch.setattr(sys, "argv", ["script.py", *argv])
    script.main()
    output_dir = next(Path(argument.split("=", 1)[1]) for argument in argv if argument.startswith("--output_dir="))
    name = "eval_results.json" if "--do_train=False" in argv else "all_results.json"
    return json.loads((output_dir / name).read_text(), parse_constant=no_constant)


def read_predictions(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "predict_results.jsonl").read_text().splitlines()]


def no_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")
