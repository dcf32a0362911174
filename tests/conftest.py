"""What several test files share: where the shared data lies, a tiny model, documents, batches."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tjepa import TJEPAConfig, TJEPAForPreTraining
from tjepa.data_collator_tjepa import DataCollatorForTJEPA


torch.set_num_threads(1)  # tiny tensors: threads only wait for each other

SHARED_FOLDER = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    if not SHARED_FOLDER.is_dir():
        pytest.skip(f"needs the shared folder with golden numbers and data, which is not at {SHARED_FOLDER}")
    return SHARED_FOLDER


@pytest.fixture
def tiny_config() -> TJEPAConfig:
    return make_tiny_config()


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


@pytest.fixture
def make_model():
    def make(seed: int = 0, **overrides) -> TJEPAForPreTraining:
        torch.manual_seed(seed)
        attn_implementation = overrides.pop("attn_implementation", "sdpa")
        config = make_tiny_config(**overrides)
        config._attn_implementation = attn_implementation
        model = TJEPAForPreTraining(config)
        with torch.no_grad():  # a target encoder of its own, so that mixing the encoders up would show
            for parameter in model.target_encoder.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    return make


def make_examples(lengths: list[int], vocab_size: int = 60, seed: int = 0, epoch: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    return [
        {"input_ids": rng.integers(0, vocab_size, size=length), "document_index": index, "epoch": epoch}
        for index, length in enumerate(lengths)
    ]


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return DataCollatorForTJEPA()(make_examples([40, 23, 7, 64, 2]))
