"""Every flag of `TrainingArguments` does what docs/flags.md says: it works, it is refused by name, or it has
no effect and a warning says so. For pretraining and for fine-tuning, in one process."""

import logging
import os
import runpy
import sys
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import datasets
import numpy as np
import pytest
import torch
import transformers
from torch._dynamo import OptimizedModule
from transformers import DataCollatorWithPadding, TrainingArguments

from helpers import REPOSITORY, make_examples, make_tiny_config, make_trainer
from tjepa import TJEPAForSequenceClassification
from tjepa.corpus.train_tokenizer import train_tokenizer
from tjepa.downstream.arguments import FinetuningArguments
from tjepa.downstream.finetuning import FinetuningTrainer
from tjepa.layers_tjepa import TJEPALayer
from tjepa.training.arguments import PretrainingArguments
from tjepa.training.checkpoints import CheckpointCallback, find_last_checkpoint
from tjepa.training.flags import FLAGS, check_what_processes_share
from tjepa.training.setup import set_up_logging


KINDS = ("pretraining", "finetuning")
BASE = {"max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no", "use_cpu": True}


def make_arguments(kind: str, folder: Path, **given) -> TrainingArguments:
    arguments = {**BASE, "disable_tqdm": True, "report_to": "none", "output_dir": str(folder), **given}
    return (PretrainingArguments if kind == "pretraining" else FinetuningArguments)(**arguments)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the fox sees a red hen and runs home"] * 20, vocab_size=300, model_max_length=64)


def make(kind: str, folder: Path, tokenizer, **given):
    if kind == "pretraining":
        return make_trainer(folder, {"hidden_dropout_prob": 0.1}, **{**BASE, "report_to": "none", **given})
    torch.manual_seed(0)
    rows = [{"input_ids": e["input_ids"].tolist()} for e in make_examples([10 + index for index in range(24)])]
    rows = datasets.Dataset.from_list([{**row, "labels": index % 2} for index, row in enumerate(rows)])
    config = make_tiny_config(hidden_dropout_prob=0.1, num_labels=2, pad_token_id=0)
    return FinetuningTrainer(
        TJEPAForSequenceClassification(config),
        make_arguments(kind, folder, **given),
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=rows,
        eval_dataset=rows.select(range(8)),
        compute_metrics=lambda p: {"accuracy": float(np.mean(p.predictions.argmax(-1) == p.label_ids))},
    )


class Run:
    """A short training, and what can be seen of it."""

    def __init__(self, kind: str, folder: Path, tokenizer, **given):
        self.kind, self.folder = kind, folder
        self.trainer = trainer = make(kind, folder, tokenizer, **given)
        self.args = trainer.args
        self.result = trainer.train()
        self.history = trainer.state.log_history
        self.losses = [line["loss"] for line in self.history if "loss" in line]
        self.rates = [line["learning_rate"] for line in self.history if "loss" in line]
        self.evaluations = [line["step"] for line in self.history if "eval_loss" in line]
        self.group = trainer.optimizer.param_groups[0]
        self.steps = trainer.state.global_step
        self.checkpoints = sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))
        self.loader = trainer.callback_handler.train_dataloader


@pytest.fixture(scope="module")
def plain(tmp_path_factory, tokenizer) -> dict[str, Run]:
    return {kind: Run(kind, tmp_path_factory.mktemp(kind), tokenizer) for kind in KINDS}


def differs(run: Run, plain: Run) -> bool:
    return run.losses != plain.losses


def same(run: Run, plain: Run) -> bool:
    return run.losses == pytest.approx(plain.losses, abs=1e-6)


STAND_IN = MagicMock()  # for trackio, which is not installed here, and for what only a GPU would do
REPLACED = {"torch_empty_cache_steps": "trainer.clear_device_cache", "tf32": "training_args.enable_tf32"}


def reported(value: str, call: str, argument: str):
    """That trackio is handed the value."""
    return lambda run, plain: getattr(STAND_IN.trackio, call).call_args.kwargs[argument] == value


def on_second_node(args: TrainingArguments, ask) -> list:
    """What the first and the second process of a second node answer, as processes 2 and 3 of all."""
    answers = []
    for local in (0, 1):
        with (
            patch.object(type(args), "process_index", 2 + local),
            patch.object(type(args), "local_process_index", local),
        ):
            answers.append(ask(args))
    return answers


def pins_on_a_gpu(run: Run) -> bool:
    run.args.dataloader_pin_memory = True  # PretrainingArguments and torch turn it off on a CPU
    return run.trainer.get_train_dataloader().pin_memory


STEPS = {"eval_strategy": "steps", "eval_steps": 1}
SAVES = {"save_strategy": "steps", "save_steps": 1}
WSD = {"lr_scheduler_type": "warmup_stable_decay"}


# flag -> what is given (one value stands for the flag itself), and what must be true of the run
def prints_lines_only(trainer) -> bool:
    shows_bar = [getattr(callback, "show_bar", None) for callback in trainer.callback_handler.callbacks]
    return "PrinterCallback" in trainer.callback_handler.callback_list or False in shows_bar


CASES = {
    "output_dir": ({**SAVES}, lambda r, p: (r.folder / "checkpoint-3").is_dir()),
    "per_device_train_batch_size": (2, differs),
    "num_train_epochs": ({"max_steps": -1, "num_train_epochs": 0.5}, lambda r, p: r.steps == 3 and len(r.loader) == 6),
    "max_steps": (2, lambda r, p: r.steps == 2),
    "learning_rate": (1e-5, lambda r, p: max(r.rates) == pytest.approx(1e-5)),
    "lr_scheduler_type": ("linear", lambda r, p: r.rates[1] == pytest.approx(r.rates[0] * 2 / 3, rel=1e-3)),
    "lr_scheduler_kwargs": (
        {
            "lr_scheduler_type": "warmup_stable_decay",
            "lr_scheduler_kwargs": '{"num_decay_steps": 1}',
            "warmup_steps": 1,
        },
        lambda r, p: r.rates[1] == r.rates[2],
    ),
    "warmup_steps": (2, lambda r, p: r.rates[0] < r.rates[1] < r.rates[2]),
    "optim": ("adafactor", lambda r, p: type(r.trainer.optimizer.optimizer).__name__ == "Adafactor"),
    "optim_args": ({"optim": "sgd", "optim_args": "momentum=0.5"}, lambda r, p: r.group["momentum"] == 0.5),
    "weight_decay": (0.3, lambda r, p: r.group["weight_decay"] >= 0.3),
    "adam_beta1": (0.5, lambda r, p: r.group["betas"][0] == 0.5),
    "adam_beta2": (0.5, lambda r, p: r.group["betas"][1] == 0.5),
    "adam_epsilon": (1e-3, lambda r, p: r.group["eps"] == 1e-3),
    "gradient_accumulation_steps": (2, lambda r, p: r.trainer.state.epoch == pytest.approx(1.0)),
    "max_grad_norm": (1e-3, differs),
    "label_smoothing_factor": (0.5, differs),
    "auto_find_batch_size": (True, same),
    "bf16": (True, differs),
    "bf16_full_eval": (True, lambda r, p: r.trainer.evaluate() and r.trainer.model.dtype == torch.bfloat16),
    "fp16_full_eval": (True, lambda r, p: r.trainer.evaluate() and r.trainer.model.dtype == torch.float16),
    "tf32": (False, lambda r, p: same(r, p) and STAND_IN.enable_tf32.call_args.args == (False,)),
    "activation_checkpointing": (True, lambda r, p: same(r, p) and r.trainer.model.is_activation_checkpointing),
    "activation_checkpointing_kwargs": (
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
        lambda r, p: same(r, p) and r.trainer.model.is_activation_checkpointing,
    ),
    "gradient_checkpointing": (True, lambda r, p: r.args.activation_checkpointing),
    "gradient_checkpointing_kwargs": ({"use_reentrant": False}, lambda r, p: r.args.activation_checkpointing_kwargs),
    "neftune_noise_alpha": (50.0, differs),
    "torch_empty_cache_steps": (2, lambda r, p: same(r, p) and STAND_IN.clear_device_cache.call_count == 2),
    "logging_strategy": ("epoch", lambda r, p: len(r.losses) == 1),
    "logging_steps": (2, lambda r, p: [line["step"] for line in r.history if "loss" in line] == [2]),
    "logging_first_step": ({"logging_steps": 3, "logging_first_step": True}, lambda r, p: len(r.losses) == 2),
    "log_on_each_node": (
        False,
        lambda r, p: (
            on_second_node(r.args, lambda args: args.should_log) == [False, False]
            and on_second_node(p.args, lambda args: args.should_log) == [True, False]
        ),
    ),
    "logging_nan_inf_filter": (False, same),
    "include_num_input_tokens_seen": ("all", lambda r, p: r.trainer.state.num_input_tokens_seen > 100),
    "log_level": ("error", lambda r, p: transformers.logging.get_verbosity() == logging.ERROR),
    "log_level_replica": (
        {"log_level": "info", "log_level_replica": "error"},
        lambda r, p: on_second_node(r.args, TrainingArguments.get_process_log_level) == [logging.INFO, logging.ERROR],
    ),
    "disable_tqdm": (True, lambda r, p: prints_lines_only(r.trainer)),
    "report_to": ("tensorboard", lambda r, p: "TensorBoardCallback" in r.trainer.callback_handler.callback_list),
    "run_name": ({"report_to": "trackio", "run_name": "mine"}, reported("mine", "init", "name")),
    "project": ({"report_to": "trackio", "project": "mine"}, reported("mine", "init", "project")),
    "trackio_space_id": (
        {"report_to": "trackio", "trackio_space_id": "me/space"},
        reported("me/space", "init", "space_id"),
    ),
    "trackio_bucket_id": (
        {"report_to": "trackio", "trackio_bucket_id": "me/bucket"},
        reported("me/bucket", "init", "bucket_id"),
    ),
    "trackio_static_space_id": (
        {"report_to": "trackio", "trackio_static_space_id": "me/static"},
        reported("me/static", "freeze", "new_space_id"),
    ),
    "eval_strategy": ("epoch", lambda r, p: r.evaluations == [3]),
    "eval_steps": ({"eval_strategy": "steps", "eval_steps": 2}, lambda r, p: r.evaluations == [2, 3]),
    "eval_delay": ({**STEPS, "eval_delay": 2}, lambda r, p: r.evaluations == [2, 3]),
    "per_device_eval_batch_size": (3, lambda r, p: len(r.trainer.get_eval_dataloader()) == 3),
    "eval_on_start": (
        {**STEPS, "eval_on_start": True},
        lambda r, p: r.evaluations == [0, 1, 2, 3] and (r.kind == "finetuning" or same(r, p)),
    ),
    "eval_accumulation_steps": ({**STEPS, "eval_accumulation_steps": 1}, lambda r, p: len(r.evaluations) == 3),
    "save_only_model": (
        {**SAVES, "save_only_model": True},
        lambda r, p: (
            not (r.folder / "checkpoint-3" / "optimizer.pt").exists() and find_last_checkpoint(r.folder) is None
        ),
    ),
    "save_strategy": ({"save_strategy": "epoch"}, lambda r, p: r.checkpoints == [3]),
    "save_steps": ({**SAVES, "save_steps": 2}, lambda r, p: r.checkpoints == [2, 3]),
    "save_on_each_node": (
        True,
        lambda r, p: (
            on_second_node(r.args, lambda args: args.should_save) == [True, False]
            and on_second_node(p.args, lambda args: args.should_save) == [False, False]
        ),
    ),
    "save_total_limit": ({**SAVES, "save_total_limit": 1}, lambda r, p: r.checkpoints == [3]),
    "load_best_model_at_end": (
        {**STEPS, **SAVES, "load_best_model_at_end": True},
        lambda r, p: r.trainer.evaluate()["eval_loss"] == pytest.approx(r.trainer.state.best_metric, abs=1e-6),
    ),
    "metric_for_best_model": (
        {**STEPS, **SAVES, "metric_for_best_model": "runtime", "load_best_model_at_end": True},
        lambda r, p: r.trainer.state.best_metric in [line.get("eval_runtime") for line in r.history],
    ),
    "greater_is_better": (
        {**STEPS, **SAVES, "load_best_model_at_end": True, "greater_is_better": True},
        lambda r, p: r.trainer.state.best_metric == max(line.get("eval_loss", 0) for line in r.history[:-1]),
    ),
    "ignore_data_skip": (True, same),
    "full_determinism": (True, lambda r, p: torch.are_deterministic_algorithms_enabled()),
    "seed": (7, differs),
    "data_seed": ({"data_seed": 7, "accelerator_config": {"use_seedable_sampler": True}}, differs),
    "use_cpu": (True, lambda r, p: r.args.device.type == "cpu"),
    "accelerator_config": ({"accelerator_config": '{"use_seedable_sampler": false}'}, differs),
    "ddp_find_unused_parameters": (True, lambda r, p: r.trainer.accelerator.ddp_handler.find_unused_parameters),
    "ddp_bucket_cap_mb": (7, lambda r, p: r.trainer.accelerator.ddp_handler.bucket_cap_mb == 7),
    "ddp_broadcast_buffers": (False, lambda r, p: r.trainer.accelerator.ddp_handler.broadcast_buffers is False),
    "ddp_static_graph": (True, lambda r, p: r.trainer.accelerator.ddp_handler.static_graph),
    "ddp_timeout": (7, lambda r, p: r.args.ddp_timeout_delta.seconds == 7),
    "dataloader_drop_last": (
        {"per_device_train_batch_size": 5, "per_device_eval_batch_size": 5, "dataloader_drop_last": True},
        lambda r, p: len(r.loader) == 4 and len(r.trainer.get_eval_dataloader()) == 2,
    ),
    "dataloader_num_workers": (1, lambda r, p: r.loader.num_workers == 1),
    "dataloader_pin_memory": (True, lambda r, p: r.loader.pin_memory is False and pins_on_a_gpu(r)),
    "dataloader_persistent_workers": (
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, **STEPS},
        lambda r, p: r.loader.persistent_workers,
    ),
    "dataloader_prefetch_factor": (
        {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 3},
        lambda r, p: r.loader.prefetch_factor == 3,
    ),
    "dataloader_multiprocessing_context": (
        {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": "fork"},
        lambda r, p: r.loader.multiprocessing_context.get_start_method() == "fork",
    ),
    "remove_unused_columns": (False, same),
    "train_sampling_strategy": ("sequential", differs),
    "debug": ("underflow_overflow", same),
    "skip_memory_metrics": (False, lambda r, p: "train_mem_cpu_alloc_delta" in r.result.metrics),
}
# what the scripts do with it, what needs a launcher, and what no machine of ours has
TESTED_IN = {
    **dict.fromkeys(("torch_compile", "torch_compile_backend", "torch_compile_mode"), "test_run_pretraining.py"),
    **dict.fromkeys(("push_to_hub", "hub_token", "hub_model_id", "hub_strategy"), "training/test_publishing.py"),
    **dict.fromkeys(("hub_private_repo", "hub_always_push", "hub_revision"), "training/test_publishing.py"),
    **dict.fromkeys(("resume_from_checkpoint", "do_train", "do_eval"), "training/test_evaluation.py"),
    "do_predict": "training/test_flags.py",
    "fp16": "training/test_flags.py",
    "ddp_backend": "training/test_distributed.py",
    "fsdp": "training/test_distributed.py",
    "fsdp_config": "training/test_flags.py",
    "deepspeed": "training/test_distributed.py",
}
OTHER_VALUES = {
    "label_smoothing_factor": 0.1,
    "liger_kernel_config": {"rope": True},
    "parallelism_config": SimpleNamespace(),
    "label_names": ["tags"],
    "include_for_metrics": ["loss"],
    "eval_accumulation_steps": 1,
    "optim_target_modules": "all-linear",
    "local_rank": 1,
    "debug": "underflow_overflow",
    "length_column_name": "size",
}


def with_status(*statuses: str) -> list[tuple[str, str]]:
    return [(name, kind) for name, rules in FLAGS.items() for kind in KINDS if getattr(rules, kind).status in statuses]


def test_the_table_knows_every_flag_of_the_installed_version():
    assert set(FLAGS) == {field.name for field in fields(TrainingArguments)}


def test_the_page_is_the_table():
    made = runpy.run_path(str(REPOSITORY / "docs" / "write_flags.py"))["to_markdown"]()
    assert (REPOSITORY / "docs" / "flags.md").read_text(encoding="utf-8") == made, "python docs/write_flags.py"


def test_every_flag_that_works_has_a_test():
    assert {name for name, _ in with_status("works")} == set(CASES) | set(TESTED_IN)
    for name, file in TESTED_IN.items():
        assert name in (REPOSITORY / "tests" / file).read_text(encoding="utf-8"), (name, file)


@pytest.fixture
def untouched():
    """Some flags change the process, not the run only."""
    verbosity, environment = transformers.logging.get_verbosity(), dict(os.environ)
    yield
    transformers.logging.set_verbosity(verbosity)
    torch.use_deterministic_algorithms(False)
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def stand_in(monkeypatch):
    """`STAND_IN` in the place of trackio."""
    STAND_IN.reset_mock()
    STAND_IN.trackio.__version__ = "1.0"
    STAND_IN.trackio.context_vars.current_space_id.get.return_value = "me/space"
    monkeypatch.setitem(sys.modules, "trackio", STAND_IN.trackio)
    monkeypatch.setattr("transformers.integrations.integration_utils.is_trackio_available", lambda: True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "kind"), [case for case in with_status("works") if case[0] in CASES])
def test_a_flag_that_works(tmp_path, plain, tokenizer, untouched, stand_in, monkeypatch, name, kind):
    if name in REPLACED:
        function = REPLACED[name].split(".")[1]
        monkeypatch.setattr(f"transformers.{REPLACED[name]}", getattr(STAND_IN, function))
        monkeypatch.setattr("transformers.training_args.is_torch_tf32_available", lambda: True)
    given, holds = CASES[name]
    if not isinstance(given, dict) or name == "gradient_checkpointing_kwargs":
        given = {name: given}
    if name == "gradient_checkpointing_kwargs":
        given["gradient_checkpointing"] = True
    if name in ("save_only_model", "save_total_limit"):
        trainer = make(kind, tmp_path, tokenizer, **given)
        trainer.add_callback(CheckpointCallback())
        trainer.train()
        run = SimpleNamespace(folder=tmp_path)
        run.checkpoints = sorted(int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*"))
    else:
        run = Run(kind, tmp_path, tokenizer, **given)
    assert holds(run, plain[kind]), (run.__dict__, plain[kind].__dict__)


def other_value(name: str, kind: str):
    """One that is not the default."""
    if name in OTHER_VALUES:
        return OTHER_VALUES[name]
    default = getattr(make_arguments(kind, Path("unused")), name)
    assert isinstance(default, bool), name
    return not default


@pytest.mark.parametrize(("name", "kind"), with_status("refused"))
def test_a_flag_that_is_refused(tmp_path, name, kind):
    with pytest.raises(ValueError, match=f"--{name} is refused: "):
        make_arguments(kind, tmp_path, **{name: other_value(name, kind)})


@pytest.mark.parametrize(("name", "kind"), with_status("unused"))
def test_a_flag_without_effect_is_said_to_have_none(tmp_path, tokenizer, caplog, name, kind):
    make(kind, tmp_path, tokenizer, **{name: other_value(name, kind)}).evaluate()
    assert f"--{name} has no effect here: " in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_float16_on_a_cpu(tmp_path, kind):
    with pytest.raises(ValueError, match="--fp16 is refused on a CPU"):
        make_arguments(kind, tmp_path, fp16=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", [{"auto_find_batch_size": True}, {"accelerator_config": {"even_batches": False}}])
def test_nothing_that_one_of_several_processes_does_alone(kind, given, tmp_path):
    args = make_arguments(kind, tmp_path, **given)
    is_refused = kind == "finetuning" or "auto_find_batch_size" in given
    with patch.object(type(args), "world_size", 2), pytest.raises(ValueError) if is_refused else nullcontext():
        check_what_processes_share(args)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("instructions", [(), ("amx_bf16",), ("avx512_bf16",)])
def test_bf16_warns_where_the_processor_knows_no_bfloat16(kind, tmp_path, monkeypatch, caplog, instructions):
    capabilities = {"architecture": "x86_64", "amx_bf16": False, "avx512_bf16": False}
    capabilities.update(dict.fromkeys(instructions, True))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)  # torch 2.10 has none
    make_arguments(kind, tmp_path)
    assert caplog.text == ""
    make_arguments(kind, tmp_path, bf16=True)
    assert ("--bf16 will be many times slower" in caplog.text) == (not instructions)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"optim": "lion_32bit"}, "--optim lion_32bit: .*pip install"),
        ({"report_to": ["neptune"]}, "--report_to neptune is not installed"),
        ({"optim": "schedule_free_adamw"}, "--optim schedule_free_adamw is refused"),
        ({"include_num_input_tokens_seen": "non_padding"}, "--include_num_input_tokens_seen non_padding is refused"),
        ({"lr_scheduler_type": "polynomial"}, "--lr_scheduler_type polynomial.*cosine, linear"),
        ({"accelerator_config": '{"split_batches": true}'}, "split_batches must stay false"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches must stay false"),
        ({"learning_rate": 1e-5, "start_lr": 2e-4}, "start_lr must be between 0 and the learning rate"),
        ({"learning_rate": 1e-5, "final_lr": 2e-5}, "final_lr must be between 0 and the learning rate"),
        ({"lr_scheduler_kwargs": {"num_cycles": 2}}, "--lr_scheduler_kwargs takes num_decay_steps"),
        ({"ema_schedule": "steps"}, "schedule must be one of linear, cosine, got 'steps'"),
        ({"export_encoder": "both"}, "--export_encoder must be target or context, got 'both'"),
        ({"ema_momentum": 1.5}, r"momentum must be in \[0, 1\], got 1.5"),
        ({"lr_scheduler_kwargs": {"num_decay_steps": "x"}}, "num_decay_steps is a number of steps, got 'x'"),
        ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps must be at least 1, got 0"),
        ({"seed": -1, "final_weight_decay": -0.1}, "--seed must be at least 0, got -1; --final_weight_decay must be"),
        ({"collapse_patience": 0}, "collapse_patience must be at least 1, got 0"),
        ({"do_train": False, "do_eval": False}, "leave nothing to do"),
    ],
)
def test_values_that_are_refused(tmp_path, given, message):
    with pytest.raises((ValueError, ImportError), match=message):
        make_arguments("pretraining", tmp_path, **given)


def test_the_log_level_is_that_of_our_lines_too(tmp_path, untouched):
    logger = logging.getLogger("tjepa")
    for level, expected in (("error", logging.ERROR), ("debug", logging.DEBUG), ("passive", logging.INFO)):
        set_up_logging(make_arguments("pretraining", tmp_path, log_level=level))
        assert logger.level == expected
    replica = make_arguments("pretraining", tmp_path, log_level="info", log_level_replica="error")
    with patch.object(PretrainingArguments, "local_process_index", 1):
        set_up_logging(replica)
        assert logger.level == logging.ERROR
    datasets.enable_progress_bars()
    set_up_logging(replica)
    assert logger.level == logging.INFO


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_is_the_same_run(tmp_path, plain, tokenizer, untouched, kind):
    compiled = {"torch_compile": True, "torch_compile_backend": "eager", "torch_compile_mode": "default"}
    run = Run(kind, tmp_path, tokenizer, max_steps=1, **compiled)
    assert run.losses == pytest.approx(plain[kind].losses[:1], abs=1e-6)
    assert run.trainer.accelerator.state.dynamo_plugin.mode == "default"
    assert isinstance(run.trainer.model_wrapped, OptimizedModule) == (kind == "finetuning")


def test_what_is_compiled_of_pretraining_is_each_layer(tmp_path, tokenizer, untouched):
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    with patch.object(TJEPALayer, "compile", autospec=True) as compile_layer:
        trainer = make("pretraining", tmp_path, tokenizer, **compiled)
    layers = [module for module in trainer.model.modules() if isinstance(module, TJEPALayer)]
    assert [call.args[0] for call in compile_layer.call_args_list] == layers and len(layers) >= 3
    assert all(call.kwargs["backend"] == "eager" for call in compile_layer.call_args_list)


def test_predictions_keep_the_last_batch(tmp_path, tokenizer):
    """As `--do_predict` makes them: a row for each of the 24, also with `--dataloader_drop_last`."""
    trainer = make("finetuning", tmp_path, tokenizer, per_device_eval_batch_size=10, dataloader_drop_last=True)
    assert len(trainer.predict(trainer.train_dataset).predictions) == 24


@pytest.mark.parametrize("kind", KINDS)
def test_fsdp_needs_several_processes(tmp_path, tokenizer, untouched, kind):
    config = {"transformer_layer_cls_to_wrap": ["TJEPALayer"]}
    with pytest.raises(ValueError, match="--fsdp is for several processes"):
        make(kind, tmp_path, tokenizer, fsdp="full_shard", fsdp_config=config)
