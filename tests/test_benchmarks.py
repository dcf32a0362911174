"""Every benchmark command runs once, as small as it goes, and writes what it says it writes. No figure is judged."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


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


def test_a_missing_file_is_named(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "pretraining_throughput.py"), "--train_file", str(tmp_path / "no.txt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and "--train_file: " in done.stderr and "pass one of your own" in done.stderr
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
