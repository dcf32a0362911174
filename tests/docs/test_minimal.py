"""docs/minimal.py runs, and the library computes the loss that it spells out."""

import importlib.util
import subprocess
import sys

import torch

from helpers import REPOSITORY, make_examples
from tjepa import TJEPAConfig, TJEPAForPreTraining
from tjepa.data_collator_tjepa import DataCollatorForTJEPA, MaskingStrategy


MINIMAL = REPOSITORY / "docs" / "minimal.py"


def load_minimal():
    spec = importlib.util.spec_from_file_location("minimal", MINIMAL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_short_runs_alone_and_learns(tmp_path):
    source = MINIMAL.read_text()
    assert len(source.splitlines()) <= 150 and "import tjepa" not in source and "from tjepa" not in source
    command = [sys.executable, "-I", MINIMAL]
    help_text = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    assert "The target\nencoder is a moving average" in help_text or "target encoder is a moving" in help_text
    (tmp_path / "a.txt").write_text("The fox sees a red hen and runs home before night falls.\n" * 40)
    result = subprocess.run([*command, "--file", tmp_path / "a.txt"], capture_output=True, text=True, check=True)
    losses = [float(line.split()[-1]) for line in result.stdout.splitlines()]
    assert result.stdout.startswith("step   0") and "step  49" in result.stdout
    assert losses[-1] < 0.9 * losses[0]


def test_the_library_computes_the_same_loss():
    minimal = load_minimal()
    width, num_layers, num_heads = 32, 2, 2
    torch.manual_seed(0)
    parts = {
        "context_encoder": minimal.Encoder(60, width, num_layers, num_heads),
        "target_encoder": minimal.Encoder(60, width, num_layers, num_heads),
        "predictor": minimal.Predictor(width, num_layers, num_heads),
    }
    with torch.no_grad():
        for part in parts.values():
            for parameter in part.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))  # so that biases, norms and attention matter
    sizes = {"hidden_size": width, "num_hidden_layers": num_layers, "num_attention_heads": num_heads}
    sizes |= {f"predictor_{name}": value for name, value in sizes.items()}
    rotary = {"rotary_dim": width // num_heads, "predictor_rotary_dim": width // num_heads}
    model = TJEPAForPreTraining(TJEPAConfig(vocab_size=60, use_bias=True, **sizes, **rotary))
    weights = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}
    model.load_state_dict(weights, strict=True)

    examples = make_examples([50, 23, 9, 2])
    strategy = MaskingStrategy(target_block_size_mean=3, max_target_mask_ratio=0.5)
    batch = DataCollatorForTJEPA([strategy])(examples)
    documents = [torch.as_tensor(example["input_ids"]) for example in examples]
    blocks = [torch.zeros(len(document), dtype=torch.long) for document in documents]
    slot_blocks = batch["prediction_block_ids"].flatten()[batch["slot_indices"]]
    for label, block in zip(batch["label_indices"].tolist(), slot_blocks.tolist(), strict=True):
        document, position = (batch[name].flatten()[label] for name in ("document_ids", "position_ids"))
        blocks[document][position] = block
    assert max(map(max, blocks)) > 3  # several target blocks that must not see each other

    model.train()
    output = model(**batch)
    expected = minimal.jepa_loss(**parts, documents=documents, blocks_of_documents=blocks)
    torch.testing.assert_close(output.loss, expected, atol=1e-5, rtol=0)
    output.loss.backward()
    expected.backward()
    gradients = dict(model.named_parameters())
    for name in ("context_encoder", "predictor"):
        for key, parameter in parts[name].named_parameters():
            torch.testing.assert_close(gradients[f"{name}.{key}"].grad, parameter.grad, atol=1e-5, rtol=1e-4)
