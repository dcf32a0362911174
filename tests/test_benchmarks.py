"""Every benchmark command runs once, as small as it goes, and writes what it says it writes. No figure is judged."""

import json
import subprocess
import sys
from pathlib import Path

import embedding_speed
import numpy as np
import pytest
import token_accuracy
import torch
from encoder_folders import make_folder

from helpers import make_texts, make_tiny_config
from tjepa import TJEPAForMaskedLM
from tjepa.data_collator_tjepa import DataCollatorForTJEPA


BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def run_benchmark(name: str, output: Path, *options: str) -> dict:
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *options, "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text())


@pytest.fixture
def generated_text(shared_folder, tmp_path) -> list[str]:
    """Options for a few generated documents; the tokenizer is the shared one."""
    tokenizer = shared_folder / "tokenizers" / "open-llama"
    if not tokenizer.is_dir():
        pytest.skip(f"needs a tokenizer, and there is none at {tokenizer}")
    documents = tmp_path / "documents.jsonl"
    texts = [" ".join(f"word {i * j % 97} of many" for j in range(4 + i)) for i in range(12)]
    documents.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return ["--train_file", str(documents), "--tokenizer", str(tokenizer)]


def test_pretraining_throughput(generated_text, tmp_path):
    options = ["--model", "quickstart", "--max_length", "32", "--num_documents", "4", "--repeats", "1"]
    options += ["--num_threads", "1"]
    result = run_benchmark("pretraining_throughput", tmp_path / "result.json", *generated_text, *options)
    for key in (
        "tokens_per_second_ratio",
        "peak_memory_ratio",
        "batch_bytes_ratio",
        "padding_share",
        "useful_flop_utilisation",
    ):
        assert isinstance(result[key], float), key
    assert result["padding_share"] == 0.0
    assert result["loss"]["ours"] == pytest.approx(result["loss"]["plain"], abs=1e-5)


def test_pretraining_throughput_against_a_checkout(generated_text, tmp_path):
    """This one, under another name: our step against itself, and in bfloat16."""
    (tmp_path / "another").symlink_to(BENCHMARKS.parent, target_is_directory=True)
    options = ["--model", "quickstart", "--max_length", "32", "--num_documents", "8", "--repeats", "1"]
    options += ["--num_threads", "1", "--dtype", "bfloat16", "--baseline", str(tmp_path / "another"), "--cpu_time"]
    result = run_benchmark("pretraining_throughput", tmp_path / "result.json", *generated_text, *options)
    for key in ("bf16_over_float32", "float32_over_baseline", "bf16_over_baseline", "useful_flop_utilisation"):
        assert isinstance(result[key], float), key
    assert result["bf16_over_baseline"] == pytest.approx(result["bf16_over_float32"] * result["float32_over_baseline"])
    difference = result["difference_from_float32"]
    assert difference["baseline"]["loss"] < 1e-6 and difference["baseline"]["gradients"] < 1e-6
    assert 0 < difference["bfloat16"]["loss"] < 0.01 and difference["bfloat16"]["gradient_cosine"] > 0.99


def test_a_missing_file_is_named(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "pretraining_throughput.py"), "--train_file", str(tmp_path / "no.txt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and "--train_file: " in done.stderr and "is not there: pass another" in done.stderr
    assert "Traceback" not in done.stderr


def test_collator_throughput(generated_text, tmp_path):
    result = run_benchmark(
        "collator_throughput", tmp_path / "result.json", *generated_text, "--num_documents", "4", "--repeats", "1"
    )
    assert set(result) == {"256", "1024"}
    assert all(set(figures) == {"ours", "plain", "ratio"} for figures in result.values())


def test_scaling(tmp_path):
    sizes = ["--num_tokens", "128", "--max_length", "128", "--hidden_size", "96", "--num_layers", "1"]
    sizes += ["--max_strategies", "1"]
    result = run_benchmark("scaling", tmp_path / "result.json", *sizes, "--repeats", "1", "--num_threads", "1")
    assert [row["length"] for row in result["by_length"]] == [128]
    assert [row["num_strategies"] for row in result["by_strategies"]] == [1]


def test_encoder_families(tmp_path):
    lines = {line["model_type"]: line for line in run_benchmark("encoder_families", tmp_path / "result.json")}
    assert lines["modernbert"]["fed"] == "packed" and lines["modernbert"]["difference"] < 1e-4
    assert lines["deberta"]["fed"] == "padded" and lines["xlm-roberta"]["note"] == "positions + 2"
    assert (lines["gpt2"]["fed"], lines["gpt2"]["note"]) == ("refused", "does not look ahead")


@torch.no_grad()
def test_token_accuracy_asks_both_models_for_the_same_hidden_tokens(make_model):
    strategy, documents = token_accuracy.HIDDEN["blocks of 4"], [np.arange(40) % 60, np.arange(25) % 60]
    examples = [{"input_ids": ids, "document_index": index, "epoch": 0} for index, ids in enumerate(documents)]
    batch = DataCollatorForTJEPA([strategy], seed=0)(examples)
    places = batch["label_indices"].long()
    tokens = batch["input_ids"].flatten()[places].long()
    model, mlm = make_model(token_prediction_weight=1.0).eval(), TJEPAForMaskedLM(make_tiny_config()).eval()
    is_masked = torch.zeros(65, dtype=torch.bool).index_fill(0, places, True)
    expected = [model.token_head(model(**batch).predictions, model.get_input_embeddings().weight)]
    rows = [
        torch.arange(length).where(~part, 59) for length, part in zip((40, 25), is_masked.split([40, 25]), strict=True)
    ]
    expected.append(torch.cat([mlm(row[None]).logits[0] for row in rows])[places])
    for candidate, logits in zip((model, mlm), expected, strict=True):
        nats = torch.nn.functional.cross_entropy(logits, tokens).item()
        right = (logits.argmax(-1) == tokens).float().mean().item()
        assert token_accuracy.judge(candidate, strategy, documents, 59) == pytest.approx((right, nats), abs=1e-4)
    frequencies = torch.eye(60)[3:4] * 100  # always 3
    share = (tokens == 3).float().mean().item()
    assert token_accuracy.judge(frequencies, strategy, documents, 59)[0] == pytest.approx(share)


def test_embedding_speed(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sentence_transformers")
    (tmp_path / "texts.txt").write_text("\n".join(make_texts(20)))
    options = ["--file", str(tmp_path / "texts.txt"), "--repeats", "1", "--output", str(tmp_path / "result.json")]
    monkeypatch.setattr("sys.argv", ["embedding_speed.py", str(make_folder(tmp_path / "bert")), *options])
    embedding_speed.main()
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result["texts_per_second"]) == {"embed", "encode"} and result["difference"] < 1e-5
    assert "embed over encode" in capsys.readouterr().out
    load = embedding_speed.load_embedder  # other vectors: no figure

    def load_without_modules(*args, **kwargs):
        embedder = load(*args, **kwargs)
        embedder.modules.clear()
        return embedder

    monkeypatch.setattr(embedding_speed, "load_embedder", load_without_modules)
    with pytest.raises(SystemExit, match="do not compute the same"):
        embedding_speed.main()
