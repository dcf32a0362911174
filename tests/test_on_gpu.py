"""The run-book for a GPU, all of it at tiny size on the CPU: without `datasets` where it says that none is needed."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from helpers import REPOSITORY, SHARED_FOLDER


def run(out: Path, *arguments: str, lacking: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """Where the packages `lacking` cannot be imported."""
    for name in lacking:
        (out / "packages").mkdir(parents=True, exist_ok=True)
        (out / "packages" / f"{name}.py").write_text(f"raise ImportError('no {name} here')\n")
    return subprocess.run(
        ["bash", str(REPOSITORY / "benchmarks" / "on_gpu.sh"), *arguments],
        cwd=out.parent,
        env={
            **os.environ,
            "PYTHON": sys.executable,
            "PYTHONPATH": "",
            "HF_DATASETS_CACHE": str(out.parent / "cache"),
            "TJEPA_DATA": str(SHARED_FOLDER / "data"),
        },
        capture_output=True,
        text=True,
        timeout=500,
    )


def results(out: Path, piece: str) -> list[dict]:
    return json.loads((out / f"{piece}.json").read_text())["results"]


def test_equality_and_speed_without_datasets(tmp_path):
    out = tmp_path / "out"
    done = run(out, str(out), "--tiny", lacking=("datasets", "evaluate"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped: datasets and evaluate are not installed and not in wheels" in done.stdout
    paths = {(r["attention"], r["compiled"], r["dtype"]): r for r in results(out, "equality")}
    assert len(paths) == 14
    held = {path for path, figures in paths.items() if figures.get("holds")}
    ways = (("sdpa", "no"), ("eager", "no"), ("eager", "layers"))
    assert held == {(*way, dtype) for way in ways for dtype in ("float32", "bfloat16")}
    assert all("skipped" in figures for path, figures in paths.items() if path not in held)
    for piece, row_length in (("speed-384", 96), ("speed-768", 96), ("recipe-768", None), ("encoder-768", 192)):
        ways = ["layers", "no", *(["layers"] if piece == "recipe-768" else [])]  # this one with more documents, too
        assert [(r.get("row_length"), r["compiled"]) for r in results(out, piece)] == [(row_length, w) for w in ways]
        assert all(r["tokens_per_second"] > 0 for r in results(out, piece))
        assert piece == "recipe-768" or all(r["mfu"] > 0 for r in results(out, piece))
        assert "aten::" in (out / f"{piece}-profile.txt").read_text()


def test_learning(shared_folder, tmp_path):
    out = tmp_path / "out"
    done = run(out, str(out), "--tiny", "learning")
    assert done.returncode == 0, done.stdout + done.stderr
    found = {r["recipe"]: r for r in results(out, "learning")}
    assert {"tf-idf", "untrained-seed0", "tjepa-large-seed0", "control-large-seed0", "mlm-large-seed0"} == set(found)
    assert all(0 < r["score"] <= 1 for r in found.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out", "speed"], "there is no piece speed"),
        (["out", "--quick"], "there is no flag --quick"),
        (["--download"], "name the folder"),
        ([], "OUT [--wheels WHEELS]"),
    ],
)
def test_wrong_arguments_are_said(tmp_path, arguments, message):
    done = run(tmp_path / "out", *arguments)
    assert done.returncode == 2 and message in done.stdout + done.stderr


def test_a_missing_package_names_the_command_that_fetches_it(tmp_path):
    done = run(tmp_path / "out", str(tmp_path / "out"), "--tiny", lacking=("rotary_embedding_torch",))
    assert done.returncode == 2 and "benchmarks/on_gpu.sh --download wheels" in done.stderr


def test_the_recipe_is_the_one_of_the_config():
    on_gpu = runpy.run_path(str(REPOSITORY / "benchmarks" / "on_gpu.py"))
    config = yaml.safe_load((REPOSITORY / "configs" / "default.yaml").read_text())
    overrides = [pair.split("=") for pair in config["config_overrides"].split(",")]
    of_config = {name: yaml.safe_load(value) for name, value in overrides if name in on_gpu["DEFAULT_RECIPE"]}
    assert of_config == on_gpu["DEFAULT_RECIPE"] and config["masking_strategies"] == "single_tokens"
    sizes = {"hidden_size", "num_hidden_layers", "num_attention_heads"}
    assert {name for name, _ in overrides} == sizes | set(of_config)
