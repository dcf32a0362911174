"""What several test files share: tiny models, documents, batches, Trainers, and runs of the scripts."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import datasets
import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback

from tjepa import TJEPAConfig, TJEPAForPreTraining, run_pretraining
from tjepa.corpus.streams import DocumentDataset
from tjepa.data_collator_tjepa import DataCollatorForTJEPA
from tjepa.training.arguments import PretrainingArguments
from tjepa.training.trainer import TJEPATrainer


REPOSITORY = Path(__file__).resolve().parents[1]
SHARED_FOLDER = REPOSITORY.parent / "shared"
WORDS = ["the", "fox", "sees", "a", "red", "hen", "and", "runs", "home", "before", "night", "falls"]
TINY = "hidden_size=32,num_hidden_layers=1,num_attention_heads=2,rotary_dim=8,predictor_num_hidden_layers=1"


def make_tiny_config(**overrides) -> TJEPAConfig:
    sizes = {
        "vocab_size": 60,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "rotary_dim": 4,
        "predictor_hidden_size": 16,
        "predictor_num_hidden_layers": 2,
        "predictor_num_attention_heads": 2,
        "predictor_rotary_dim": 8,
        "initializer_range": 0.2,  # large, so that attention matters and a leak would show
    }
    return TJEPAConfig(**{**sizes, **overrides})


def make_examples(lengths: list[int], vocab_size: int = 60, seed: int = 0, epoch: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    return [
        {"input_ids": rng.integers(0, vocab_size, size=length), "document_index": index, "epoch": epoch}
        for index, length in enumerate(lengths)
    ]


def make_texts(num_documents: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, size=rng.integers(20, 60))) for _ in range(num_documents)]


def write_jsonl(path: Path, rows: Iterable[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def with_target_of_its_own(model: TJEPAForPreTraining, scale: float = 0.1) -> TJEPAForPreTraining:
    """The target encoder differs from the context encoder, so that mixing them up would show."""
    with torch.no_grad():
        for parameter in model.target_encoder.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return model


def make_word_tokenizer(
    pieces: list[str], pre_tokenizer=None, normalizer=None, second_type: int = 0, **settings
) -> PreTrainedTokenizerFast:
    """A token for each piece of a text; with a cls_token [CLS] and [SEP] stand around it, as BERT has them."""
    backend = Tokenizer(models.WordLevel({p: i for i, p in enumerate(pieces)}, unk_token=settings["unk_token"]))
    backend.pre_tokenizer = pre_tokenizer or pre_tokenizers.Whitespace()
    if normalizer is not None:
        backend.normalizer = normalizer
    if "cls_token" in settings:
        pair = f"[CLS] $A [SEP] $B:{second_type} [SEP]:{second_type}"
        special = [(token, pieces.index(token)) for token in ("[CLS]", "[SEP]")]
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair=pair, special_tokens=special
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **settings)


def arguments(inputs: Path, output_dir: Path, **overrides) -> list[str]:
    values = {
        "train_file": inputs / "train.jsonl",
        "validation_file": inputs / "validation.jsonl",
        "tokenizer_name": inputs / "tokenizer",
        "config_overrides": TINY,
        "max_length": 64,
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "save_steps": 2,
        "output_dir": output_dir,
        "cache_dir": inputs / "cache",
    }
    return [f"--{name}={value}" for name, value in {**values, **overrides}.items() if value is not None]


def run(monkeypatch, argv: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["run_pretraining.py", *argv])
    run_pretraining.main()


def run_elsewhere(code: str, folder: Path, tmp_path: Path) -> subprocess.CompletedProcess:
    """A fresh process in another directory, without network, where the package is not installed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "FOLDER": str(folder)}
    blocked = "import os, sys; sys.modules['tjepa'] = None; folder = os.environ['FOLDER']\n"
    (tmp_path / "elsewhere").mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-c", blocked + code],
        cwd=tmp_path / "elsewhere",
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def make_dataset(num_documents: int = 24) -> DocumentDataset:
    examples = make_examples([10 + index for index in range(num_documents)])
    return DocumentDataset(datasets.Dataset.from_dict({"input_ids": [e["input_ids"].tolist() for e in examples]}))


class StopAfter(TrainerCallback):
    """Ends training after a step, with a checkpoint, as a signal would."""

    def __init__(self, step: int | None):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def make_trainer(tmp_path, config_options=None, collator=None, **arguments) -> Trainer:
    torch.manual_seed(0)
    defaults = {"per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    args = PretrainingArguments(output_dir=str(tmp_path), **{**defaults, **arguments})
    model = TJEPAForPreTraining(make_tiny_config(**(config_options or {})))
    collator = collator or DataCollatorForTJEPA()
    return TJEPATrainer(model, args, collator, make_dataset(), make_dataset(8))
