"""What several test files share: where the shared data lies, a tiny model, documents, batches."""

import gc
import os
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the real Hub: unreachable, it costs a minute of retries
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: threads only wait for each other, in subprocesses, too


import pytest
import torch

from helpers import (
    SHARED_FOLDER,
    make_examples,
    make_texts,
    make_tiny_config,
    with_target_of_its_own,
    write_jsonl,
)
from tjepa import TJEPAConfig, TJEPAForPreTraining, run_pretraining
from tjepa.corpus.train_tokenizer import train_tokenizer
from tjepa.data_collator_tjepa import DataCollatorForTJEPA


@pytest.fixture(autouse=True, scope="module")
def quick_garbage_collection():
    """Every start of a Trainer collects garbage, and looks through all of torch and transformers for it: seconds."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def with_reports() -> None:
    """For tests of what a run's report says; all others do without the second or two that each takes."""


@pytest.fixture(autouse=True)
def without_reports(request, monkeypatch):
    if "with_reports" not in request.fixturenames:
        monkeypatch.setattr(run_pretraining, "write_report", lambda folder: {})
        monkeypatch.setattr(run_pretraining.ReportCallback, "on_save", lambda *args, **kwargs: None)


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    if not SHARED_FOLDER.is_dir():
        pytest.skip(f"needs the shared folder with golden numbers and data, which is not at {SHARED_FOLDER}")
    return SHARED_FOLDER


@pytest.fixture
def tiny_config() -> TJEPAConfig:
    return make_tiny_config()


@pytest.fixture
def make_model():
    def make(seed: int = 0, **overrides) -> TJEPAForPreTraining:
        torch.manual_seed(seed)
        attn_implementation = overrides.pop("attn_implementation", "sdpa")
        config = make_tiny_config(**overrides)
        config._attn_implementation = attn_implementation
        return with_target_of_its_own(TJEPAForPreTraining(config))

    return make


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return DataCollatorForTJEPA()(make_examples([40, 23, 7, 64, 2]))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with documents, some of them unusable, and a tokenizer."""
    folder = tmp_path_factory.mktemp("inputs")
    rows = [{"text": text} for text in make_texts(60)] + [{"text": None}, {"text": " "}, {"text": "a"}]
    write_jsonl(folder / "train.jsonl", rows)
    write_jsonl(folder / "validation.jsonl", [{"text": text} for text in make_texts(8, 1)])
    (folder / "empty.jsonl").write_text("")
    (folder / "short.jsonl").write_text('{"text": ""}\n{"text": " "}\n')
    train_tokenizer(make_texts(60), vocab_size=300, model_max_length=64).save_pretrained(folder / "tokenizer")
    return folder
