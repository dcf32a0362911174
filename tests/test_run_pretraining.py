"""The script as a user runs it: end to end, resumed, loaded elsewhere, and every refusal in plain words."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from fault_injection import Fault, InjectedError
from helpers import REPOSITORY, TINY, arguments, make_texts, make_tiny_config, run, run_elsewhere
from tjepa import TJEPAConfig, TJEPAForPreTraining, run_pretraining
from tjepa.layers_tjepa import VARLEN_ATTENTION
from tjepa.tools import search
from tjepa.training.loading import load_pretraining_config


def test_launched_end_to_end_then_loaded_elsewhere(inputs, tmp_path):
    output_dir = tmp_path / "out"
    config = tmp_path / "config.yaml"
    values = dict(argument[2:].split("=", 1) for argument in arguments(inputs, output_dir, max_steps="100"))
    config.write_text(yaml.safe_dump(values))
    launched = subprocess.run(
        ["accelerate", "launch", "--cpu", str(REPOSITORY / "run_pretraining.py"), str(config), "--max_steps", "4"]
        + ["--report_to", "tensorboard", "--gradient_accumulation_steps", "2"],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert launched.returncode == 0, launched.stderr
    assert json.loads((output_dir / "trainer_state.json").read_text())["global_step"] == 4  # the flag beat the file
    files = {path.name for path in output_dir.iterdir()}
    assert {"model.safetensors", "config.json", "modeling_tjepa.py", "configuration_tjepa.py", "README.md"} <= files
    assert {"tokenizer.json", "tokenizer_config.json", "masking_strategies.json", "all_results.json"} <= files

    loaded = run_elsewhere(
        """
from transformers import AutoModel, AutoModelForPreTraining, AutoTokenizer
from safetensors.torch import load_file
encoder, info = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
weights = load_file(folder + "/model.safetensors")
target = {name.removeprefix("target_encoder."): t for name, t in weights.items() if name.startswith("target_encoder.")}
state = encoder.state_dict()
assert state.keys() == target.keys() and all(state[name].equal(tensor) for name, tensor in target.items())
model, info = AutoModelForPreTraining.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
assert {name for name, _ in model.named_children()} >= {"context_encoder", "target_encoder", "predictor"}
assert not any(p.requires_grad for p in model.target_encoder.parameters())
tokens = AutoTokenizer.from_pretrained(folder)("the fox", return_tensors="pt")
print(encoder(**tokens).last_hidden_state.norm().item())
""",
        output_dir,
        tmp_path,
    )
    assert loaded.returncode == 0, loaded.stderr

    here = subprocess.run(  # with the package installed: no trust_remote_code
        [
            sys.executable,
            "-c",
            f"import tjepa; from transformers import AutoModel\nAutoModel.from_pretrained('{output_dir}')",
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert here.returncode == 0, here.stderr

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    event_files = list(tmp_path.rglob("events.out.tfevents.*"))
    tags = set()
    for file in event_files:
        accumulator = EventAccumulator(str(file))
        accumulator.Reload()
        tags |= set(accumulator.Tags()["scalars"])
    assert {"train/target_std", "train/target_rank", "train/cosine", "train/ema_momentum", "eval/cosine"} <= tags


def test_books_pretrain_and_the_loss_falls(shared_folder, tmp_path, monkeypatch):
    run(
        monkeypatch,
        [
            f"--train_file={shared_folder / 'data' / 'books-validation.parquet'}",
            f"--tokenizer_name={shared_folder / 'tokenizers' / 'bert-base-uncased'}",
            f"--config_overrides={TINY}",
            "--max_length=128",
            "--max_steps=30",
            "--per_device_train_batch_size=8",
            "--logging_steps=10",
            "--learning_rate=3e-3",
            "--warmup_steps=5",
            f"--output_dir={tmp_path / 'books'}",
            f"--cache_dir={tmp_path / 'cache'}",
        ],
    )
    history = json.loads((tmp_path / "books" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < losses[0]
    results = json.loads((tmp_path / "books" / "all_results.json").read_text())
    card = (tmp_path / "books" / "README.md").read_text()
    is_collapsed = results["eval_cosine"] <= results["eval_mean_target_cosine"] or results["eval_target_std"] < 0.1
    assert ("collapsed" in card) == is_collapsed  # the card says what the figures say


def test_interrupted_and_resumed_equals_uninterrupted(inputs, tmp_path, monkeypatch):
    run(monkeypatch, arguments(inputs, tmp_path / "whole", max_steps=4))

    with monkeypatch.context() as patch, pytest.raises(InjectedError):
        Fault("optimizer", "exception", step=4).install(patch)
        run(patch, arguments(inputs, tmp_path / "resumed", resume_from_checkpoint="last"))
    run(monkeypatch, arguments(inputs, tmp_path / "resumed", resume_from_checkpoint="last"))
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_streaming(inputs, tmp_path, monkeypatch):
    run(monkeypatch, arguments(inputs, tmp_path / "out", streaming=True))
    assert json.loads((tmp_path / "out" / "all_results.json").read_text())["eval_loss"] > 0


def test_overrides_add_to_the_quickstarts(tmp_path, monkeypatch):
    """Without a file and from any folder; the corpus is a small one."""
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["numpy"])})
    rows = datasets.Dataset.from_dict({"text": make_texts(60), "label": [0] * 60}, features)
    corpus = {"train": rows, "validation": rows.select(range(8))}
    for reader in ("corpus.documents", "tools.search"):
        monkeypatch.setattr(f"tjepa.{reader}.load_quickstart_documents", lambda cache_dir: corpus)
    monkeypatch.setattr(run_pretraining, "report_what_was_learned", lambda *args: {})
    monkeypatch.chdir(tmp_path)
    flags = "--config_overrides=hidden_size=64 --max_steps=2 --output_dir=out --use_cpu=true --save_strategy=no"
    run(monkeypatch, flags.split())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["hidden_size"], config["vocab_size"], config["num_hidden_layers"]) == (64, 2048, 4)
    assert (config["intermediate_size"], config["predictor_hidden_size"]) == (256, 64)  # they follow the width
    assert config["predictor_type"] == "boundary" and config["variance_covariance_weight"] == 0.5
    monkeypatch.setattr(search.SearchIndex, "build", None)  # the index is there, and is that of the saved encoder
    assert search.open_index("out").search(rows[0]["text"], 1)[0].label == "numpy"


def test_model_card_and_results(inputs, tmp_path, monkeypatch):
    run(monkeypatch, arguments(inputs, tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["library_name"] == "transformers" and "t-jepa" in metadata["tags"]
    metrics = {m["type"]: m["value"] for m in metadata["model-index"][0]["results"][0]["metrics"]}
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert metrics["eval_loss"] == pytest.approx(results["eval_loss"], abs=1e-5)
    assert "datasets" not in metadata and str(inputs) not in card  # a local file is no Hub dataset
    assert "null" in card and "empty or whitespace only" in card  # what was dropped, and why


# --- Refusals --------------------------------------------------------------------------------------------------------


def test_output_folder_that_holds_a_run(inputs, tmp_path, monkeypatch):
    run(monkeypatch, arguments(inputs, tmp_path / "out", max_steps=2))
    with pytest.raises(FileExistsError, match="--resume_from_checkpoint last.*--overwrite_output_dir"):
        run(monkeypatch, arguments(inputs, tmp_path / "out", max_steps=2))
    run(monkeypatch, arguments(inputs, tmp_path / "out", max_steps=2, overwrite_output_dir=True))


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"text_column_name": "body"}, ValueError, r"no column 'body'; it has \['text'\]"),
        ({"train_file": "empty.jsonl"}, ValueError, "is empty"),
        ({"train_file": "short.jsonl"}, ValueError, "Every document of the train split was dropped"),
        ({"train_file": "missing.jsonl"}, FileNotFoundError, "no file"),
        ({"tokenizer_name": None}, ValueError, "Which tokenizer"),
        ({"config_overrides": TINY + ",vocab_size=100"}, ValueError, "tokenizer has 300 tokens.*vocab_size=300"),
        ({"config_overrides": "hiden_size=3"}, ValueError, r"has no \['hiden_size'\]"),
        ({"config_overrides": "hidden_size"}, ValueError, "is a list such as"),
        ({"masking_strategies": "ul3"}, ValueError, "must be a preset"),
        ({"schedule_stretch": 0.5}, ValueError, "schedule_stretch must be at least 1"),
        (
            {"eval_strategy": "steps", "validation_file": None, "validation_split_percentage": 0},
            ValueError,
            "pass --validation_file, or a --validation_split_percentage above 0",
        ),
        ({"export_encoder": "context"}, ValueError, "--export_encoder context is for encoders of other architectures"),
        ({"attn_implementation": "fast"}, ValueError, '--attn_implementation fast: .*"fast"` is not supported'),
        (
            {"config_overrides": TINY + ",predictor_type=in_place", "mask_recurring_targets": True},
            ValueError,
            "leave out mask_recurring_targets",
        ),
        (
            {"config_overrides": TINY + ",pooled_weight=1", "per_device_train_batch_size": 1},
            ValueError,
            "raise --per_device_train_batch_size 1",
        ),
        (
            {"config_overrides": TINY + ",segment_weight=1", "segment_length": 64},
            ValueError,
            "--segment_length 64 leaves documents of --max_length 64 in one piece",
        ),
        ({"save_strategy": "best", "metric_for_best_model": "probe_accuracy"}, ValueError, "needs --probe_file"),
        ({"save_strategy": "best", "metric_for_best_model": "accuracy"}, ValueError, "accuracy is not among .*cosine"),
        (
            {"metric_for_best_model": "train_loss"},
            ValueError,
            "train_loss is not among .*: loss, jepa_loss, loss_b",
        ),
        ({"metric_for_best_model": "sigreg_loss"}, ValueError, "sigreg_loss is not among the figures"),
        (
            {"streaming": True, "max_steps": -1},
            ValueError,
            "--streaming the number of documents is.*--max_steps",
        ),
        ({"preprocessing_num_workers": -1}, ValueError, "preprocessing_num_workers is -1; it must be at least 1"),
        ({"save_strategy": "best"}, ValueError, "best needs --metric_for_best_model"),
        ({"attn_implementation": "flex_attention", "use_cpu": True}, ValueError, "flex_attention has no backward on"),
    ],
)
def test_bad_arguments_are_refused(inputs, tmp_path, monkeypatch, overrides, error, message):
    if overrides.get("train_file"):
        overrides = {"train_file": inputs / overrides["train_file"]}
    with pytest.raises(error, match=message):
        run(monkeypatch, arguments(inputs, tmp_path / "out", **overrides))
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_no_checkpoint_is_chosen_by_a_probe_that_fsdp_leaves_out(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    args = SimpleNamespace(metric_for_best_model="eval_probe_accuracy", eval_strategy="steps", do_train=True)
    args.save_strategy, args.fsdp, judged = "steps", None, SimpleNamespace(probe_file="labels.jsonl")
    with pytest.raises(ValueError, match="probe_accuracy needs .* no FSDP"):
        run_pretraining.check_evaluation({"validation": []}, None, args, judged, None, None)


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_parse(path):
    from tjepa.corpus.arguments import parse_arguments
    from tjepa.corpus.prepare_dataset import PreparationArguments

    if path.name.startswith("prepare_"):
        parse_arguments(PreparationArguments, [str(path)])
    else:
        types = (run_pretraining.ModelArguments, run_pretraining.DataArguments)
        types += (run_pretraining.MaskingArguments, run_pretraining.PretrainingArguments)
        types += (run_pretraining.BeforeAfterArguments,)
        model_args, *_ = parse_arguments(types, [str(path)])
        load_pretraining_config(overrides=model_args.config_overrides)


def test_what_would_compile_for_every_batch_is_refused(inputs, tmp_path, monkeypatch):
    for name in ("sdpa", VARLEN_ATTENTION):  # which has no kernel here
        flags = {"torch_compile": True, "attn_implementation": name}
        with pytest.raises(
            ValueError, match=f"--torch_compile with {name} attention would compile anew for every batch"
        ):
            run(monkeypatch, arguments(inputs, tmp_path / "out", **flags))


def test_a_compiled_run_is_the_same_run(inputs, tmp_path):
    """`--torch_compile` on fixed rows; in processes of their own, because transformers sets the environment for it."""
    losses = []
    for name, flags in (
        ("eager", []),
        ("compiled", ["--torch_compile", "--torch_compile_backend=aot_eager", "--torch_compile_mode=default"]),
    ):
        output_dir = tmp_path / name
        rows = {"attn_implementation": "eager", "row_length": 96}
        rows["config_overrides"] = f"{TINY},token_prediction_weight=1.0"  # the token head compiles with its loss
        command = [sys.executable, str(REPOSITORY / "run_pretraining.py"), *arguments(inputs, output_dir, **rows)]
        subprocess.run([*command, *flags], check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
        log = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
        losses.append([line["loss"] for line in log if "loss" in line])
    assert len(losses[0]) == 4
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


@pytest.mark.parametrize("predictor_type", ["boundary", "in_place"])
def test_attention_by_lengths_runs_everywhere(inputs, tmp_path, monkeypatch, predictor_type):
    """Without a GPU it is what sdpa computes."""
    losses = []
    for attention in ("sdpa", VARLEN_ATTENTION):
        output_dir = tmp_path / attention
        options = {"attn_implementation": attention, "config_overrides": f"{TINY},predictor_type={predictor_type}"}
        run(monkeypatch, arguments(inputs, output_dir, max_steps=2, **options))
        log = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
        losses.append([line["loss"] for line in log if "loss" in line])
    assert len(losses[0]) == 2
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.parametrize(
    ("device", "bf16", "has_kernel", "options", "expected"),
    [
        ("cpu", True, True, {}, "sdpa"),
        ("cuda", True, True, {}, VARLEN_ATTENTION),
        ("cuda", True, False, {}, "flex_attention"),
        ("cuda", False, True, {}, "flex_attention"),
        ("cuda", True, True, {"encoder": {"model_type": "bert"}}, "sdpa"),
        ("cuda", True, True, {"attention_probs_dropout_prob": 0.1}, "sdpa"),
    ],
)
def test_a_gpu_gets_its_fastest_attention(monkeypatch, device, bf16, has_kernel, options, expected):
    monkeypatch.setattr(run_pretraining, "has_varlen_kernel", lambda config: has_kernel)
    args = SimpleNamespace(device=torch.device(device), bf16=bf16, fp16=False)
    assert run_pretraining.choose_attention(TJEPAConfig(**options), args) == expected


@pytest.mark.parametrize(
    ("attention", "predictor_type", "expected"),
    [
        (VARLEN_ATTENTION, "self_attention", True),
        (VARLEN_ATTENTION, "boundary", False),
        ("flex_attention", "boundary", True),
        ("sdpa", "self_attention", False),
    ],
)
def test_rows_of_one_length_are_for_flex_attention_in_any_part(attention, predictor_type, expected):
    config = make_tiny_config(predictor_type=predictor_type)
    config._attn_implementation = attention
    assert run_pretraining.has_flex_attention(TJEPAForPreTraining(config)) == expected
