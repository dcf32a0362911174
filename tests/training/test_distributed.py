"""Many processes: one, two with DDP and two with FSDP2 end with the same weights and losses, through the launchers
that users type (gloo on CPUs); uneven and empty shares; accelerate's ready-made configs, as far as they parse."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.run as torchrun
import yaml
from accelerate.commands import launch
from safetensors.torch import load_file
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import Trainer

import finetuning_helpers
from helpers import REPOSITORY, TINY, arguments, make_examples, make_trainer, run
from tjepa.corpus.private import UnpaddedBatchSamplerShard, UnpaddedIterableDatasetShard
from tjepa.data_collator_tjepa import DataCollatorForTJEPA
from tjepa.losses_tjepa import variance_covariance_loss
from tjepa.training.health import covariance, moment_sums
from tjepa.training.setup import check_number_of_processes


ACCELERATE_CONFIGS = REPOSITORY / "configs" / "accelerate"
SCRIPT = REPOSITORY / "run_pretraining.py"

# 60 documents in batches of 8: 8 rounds, the last of 4 documents, so that the second of two processes gets none of
# them. 8 evaluation documents in batches of 6: the second process gets none of the last 2.
OPTIONS = {
    "config_overrides": f"{TINY},variance_covariance_weight=1.0,token_prediction_weight=1.0",
    "max_steps": None,
    "num_train_epochs": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": "3e-3",
    "ema_momentum": 0.9,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "save_steps": 4,
    "seed": 3,
}
ONE_PROCESS = {**OPTIONS, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 6}
TWO_PROCESSES = {**OPTIONS, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 3}

# run_pretraining.py, and every process writes down the target encoder that it ends with
RECORDING_SCRIPT = """
import sys
import torch
from torch.distributed.tensor import DTensor
from tjepa import run_pretraining

folder, gather_model = sys.argv.pop(1), run_pretraining.gather_model

def record(trainer):
    target = {k: v for k, v in trainer.model.state_dict().items() if k.startswith("target_encoder.")}
    sharded = [v for v in target.values() if isinstance(v, DTensor)]
    whole = {k: v.full_tensor() if isinstance(v, DTensor) else v.clone() for k, v in target.items()}
    share = sum(v.to_local().numel() for v in sharded) / sum(v.numel() for v in whole.values())
    torch.save({"target": whole, "share": share}, f"{folder}/rank{trainer.args.process_index}.pt")
    return gather_model(trainer)

run_pretraining.gather_model = record
run_pretraining.main()
"""


def launch_command(command: list[str], cwd: Path) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    modules = [str(Path(__file__).parent), str(REPOSITORY / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(modules)}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stderr


def accelerate_launch(config: str, script: list[str | Path], cwd: Path, *flags: str) -> str:
    command = ["accelerate", "launch", "--config_file", str(ACCELERATE_CONFIGS / config), *flags]
    return launch_command([*command, *map(str, script)], cwd)


def assert_same_run(expected: Path, actual: Path) -> None:
    """The same final weights and the same log, health figures included."""
    weights, other_weights = (load_file(folder / "model.safetensors") for folder in (expected, actual))
    assert weights.keys() == other_weights.keys()
    for name, tensor in weights.items():  # AdamW makes steps of one size out of gradients that are mostly rounding
        torch.testing.assert_close(other_weights[name], tensor, rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    histories = [json.loads((f / "trainer_state.json").read_text())["log_history"] for f in (expected, actual)]
    assert len(histories[0]) == len(histories[1])
    for entry, other in zip(*histories, strict=True):
        assert entry.keys() == other.keys()
        for name, value in entry.items():
            if name.startswith(("train_", "total_")) or name.endswith(("runtime", "_per_second")):
                continue
            tolerance = 1e-3 if "rank" in name or name == "grad_norm" else 1e-5
            assert other[name] == pytest.approx(value, abs=tolerance), (entry["step"], name)
    names = [{path.name for path in folder.iterdir()} for folder in (expected, actual)]
    assert names[0] <= names[1]


@pytest.fixture(scope="module")
def one_process(inputs, tmp_path_factory) -> Path:  # noqa: F811
    """The output folder of the run that the others must equal."""
    folder = tmp_path_factory.mktemp("one") / "out"
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(monkeypatch, arguments(inputs, folder, **ONE_PROCESS))
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == list(range(1, 9))
    return folder


# --- The launchers ---------------------------------------------------------------------------------------------------


def test_two_processes_with_ddp(inputs, one_process, tmp_path):  # noqa: F811
    (tmp_path / "script.py").write_text(RECORDING_SCRIPT)
    script = ["script.py", tmp_path, *arguments(inputs, tmp_path / "out", **TWO_PROCESSES)]
    errors = accelerate_launch("cpu.yaml", script, tmp_path)
    assert "2 processes" in errors
    assert_same_run(one_process, tmp_path / "out")
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert ranks[0]["share"] == ranks[1]["share"] == 0
    assert all(torch.equal(ranks[0]["target"][name], tensor) for name, tensor in ranks[1]["target"].items())


def test_two_processes_with_fsdp2_then_resumed(inputs, one_process, tmp_path):  # noqa: F811
    (tmp_path / "script.py").write_text(RECORDING_SCRIPT)
    script = ["script.py", tmp_path, *arguments(inputs, tmp_path / "out", **TWO_PROCESSES)]
    accelerate_launch("fsdp2.yaml", script, tmp_path)
    assert_same_run(one_process, tmp_path / "out")
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert ranks[0]["share"] + ranks[1]["share"] == pytest.approx(1) and 0.4 < ranks[0]["share"] < 0.6
    assert all(torch.equal(ranks[0]["target"][name], tensor) for name, tensor in ranks[1]["target"].items())
    auto_map = json.loads((tmp_path / "out" / "checkpoint-4" / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForPreTraining"] == "modeling_tjepa.TJEPAForPreTraining"

    shutil.copytree(tmp_path / "out" / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4")
    resumed = arguments(inputs, tmp_path / "resumed", **TWO_PROCESSES, resume_from_checkpoint="last")
    accelerate_launch("fsdp2.yaml", [SCRIPT, *resumed], tmp_path, "--fsdp_reshard_after_forward", "false")
    assert_same_run(one_process, tmp_path / "resumed")


def test_fsdp2_evaluates_without_a_step_of_training(inputs, one_process, tmp_path):  # noqa: F811
    """A finished run without its final folder, and --do_train False."""
    shutil.copytree(one_process / "checkpoint-8", tmp_path / "out" / "checkpoint-8")
    finished = arguments(inputs, tmp_path / "out", **TWO_PROCESSES, resume_from_checkpoint="last")
    accelerate_launch("fsdp2.yaml", [SCRIPT, *finished], tmp_path)
    weights, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", one_process))
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    accelerate_launch("fsdp2.yaml", [SCRIPT, *finished, "--do_train=False"], tmp_path)
    results = [
        json.loads(file.read_text())
        for file in (
            one_process / "all_results.json",
            tmp_path / "out" / "all_results.json",
            tmp_path / "out" / "eval_results.json",
        )
    ]
    assert len({result["train_steps"] for result in results}) == 1
    for name in ("eval_loss", "eval_cosine"):
        assert [result[name] for result in results] == pytest.approx([results[0][name]] * 3, abs=1e-5)


def test_fsdp2_in_bfloat16(inputs, tmp_path, monkeypatch):  # noqa: F811
    """As without FSDP: float32 weights, autocast, and no cast of rotary angles and numbers of slots."""
    options = {**OPTIONS, "max_steps": 2, "gradient_accumulation_steps": 1, "eval_steps": 2, "save_strategy": "no"}
    run(monkeypatch, arguments(inputs, tmp_path / "one", **options, per_device_train_batch_size=8, bf16=True))
    script = [SCRIPT, *arguments(inputs, tmp_path / "two", **options, per_device_train_batch_size=4)]
    accelerate_launch("fsdp2.yaml", script, tmp_path, "--mixed_precision", "bf16")
    logs = [json.loads((tmp_path / f / "trainer_state.json").read_text())["log_history"] for f in ("one", "two")]
    for entry, other in zip(*logs, strict=True):
        for name in {"loss", "eval_loss"} & entry.keys():
            assert other[name] == pytest.approx(entry[name], abs=1e-3)
    assert all(tensor.dtype == torch.float32 for tensor in load_file(tmp_path / "two" / "model.safetensors").values())


def test_torchrun_goes_on_from_the_checkpoint_of_one_process(inputs, one_process, tmp_path):  # noqa: F811
    shutil.copytree(one_process / "checkpoint-4", tmp_path / "out" / "checkpoint-4")
    resumed = arguments(inputs, tmp_path / "out", **TWO_PROCESSES, resume_from_checkpoint="last", ddp_backend="gloo")
    launch_command(["torchrun", "--nproc_per_node", "2", str(SCRIPT), *resumed], tmp_path)
    assert_same_run(one_process, tmp_path / "out")


# Two streams of different length on two processes, of which accelerate takes every other batch: the first process gets
# documents 0 and 1 of its stream, then 4; the second gets none at all.
UNEVEN_STREAMS = """
import sys
import torch
from test_distributed import ListStream, train_on_stream

rank = int(__import__("os").environ["RANK"])
model = train_on_stream([[0, 1, 2, 3, 4], []][rank], sys.argv[1] + "/out")
torch.save(model.state_dict(), f"{sys.argv[1]}/rank{rank}.pt")
"""


class ListStream(torch.utils.data.IterableDataset):
    def __init__(self, indices: list[int]):
        examples = make_examples([20, 9, 30, 14, 25])
        self.examples = [examples[index] for index in indices]

    def __iter__(self):
        return iter(self.examples)


def train_on_stream(indices: list[int], output_dir: str) -> torch.nn.Module:
    weights = {"variance_covariance_weight": 1.0, "token_prediction_weight": 1.0}
    trainer = make_trainer(output_dir, weights, max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2)
    trainer.train_dataset = ListStream(indices)
    trainer.train()
    return trainer.model


def test_a_share_of_a_stream_may_be_empty(tmp_path):
    (tmp_path / "script.py").write_text(UNEVEN_STREAMS)
    launch_command(["torchrun", "--nproc_per_node", "2", "script.py", str(tmp_path)], tmp_path)
    expected = train_on_stream([0, 1, 4], str(tmp_path / "one")).state_dict()
    for rank in range(2):
        weights = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        for name, tensor in expected.items():
            torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-5)


def test_one_process_instead_of_two_is_refused(inputs, tmp_path):  # noqa: F811
    """accelerate starts one process where a config asks for two of MULTI_CPU."""
    config = yaml.safe_load((ACCELERATE_CONFIGS / "cpu.yaml").read_text())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**config, "distributed_type": "MULTI_CPU"}))
    with pytest.raises(AssertionError, match="asked for several processes and started one"):
        accelerate_launch(
            str(tmp_path / "config.yaml"), [SCRIPT, *arguments(inputs, tmp_path / "out", max_steps=1)], tmp_path
        )
    assert not (tmp_path / "out").exists()


def test_number_of_processes(monkeypatch):
    for name in ("WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    check_number_of_processes(SimpleNamespace(world_size=1))
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_number_of_processes(SimpleNamespace(world_size=2))
    with pytest.raises(ValueError, match="started 2 processes, but this one trains in a group of 1"):
        check_number_of_processes(SimpleNamespace(world_size=1))


def test_two_processes_fine_tune_as_one(tmp_path, monkeypatch):
    folder = finetuning_helpers.make_folder(tmp_path)
    options = {"config_overrides": "hidden_dropout_prob=0.0", "test_file": folder / "test.jsonl", "max_steps": 6}
    one = {**options, "per_device_train_batch_size": 8}
    finetuning_helpers.run(monkeypatch, finetuning_helpers.arguments(folder, tmp_path / "one", **one))
    two = finetuning_helpers.arguments(folder, tmp_path / "two", **options, per_device_train_batch_size=4)
    accelerate_launch("cpu.yaml", ["-m", "tjepa.downstream.run_classification", *two], tmp_path)
    predictions = (finetuning_helpers.read_predictions(tmp_path / name) for name in ("one", "two"))
    for line, other in zip(*predictions, strict=True):
        assert other["probabilities"] == pytest.approx(line["probabilities"], abs=1e-4)


# --- The ready-made configs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "num_machines", "processes_per_machine"),
    [
        ("cpu", 1, 2),
        ("multi_gpu", 1, 8),
        ("multi_node", 2, 8),
        ("fsdp2", 1, 8),
        ("deepspeed_zero2", 1, 8),
    ],
)
def test_config_of_accelerate(monkeypatch, name, num_machines, processes_per_machine):
    """The command in a config's head comment makes accelerate start the processes it speaks of."""
    head = (ACCELERATE_CONFIGS / f"{name}.yaml").read_text().split("\n")
    comment = " ".join(line.lstrip("# ").rstrip("\\") for line in head if line.startswith("#"))
    command = comment[comment.index("accelerate launch ") :].split()
    script = command.index("run_pretraining.py")
    assert f"configs/accelerate/{name}.yaml" in command and (REPOSITORY / command[script + 1]).is_file()

    started = {}
    monkeypatch.setattr(
        torchrun,
        "run",
        lambda args: started.update(
            vars(args), **{key: os.environ.get(f"ACCELERATE_USE_{key}") for key in ("FSDP", "DEEPSPEED")}
        ),
    )
    if name == "deepspeed_zero2":  # it is not installed here
        monkeypatch.setattr(launch, "is_deepspeed_available", lambda: True)
        runner = SimpleNamespace(DEEPSPEED_ENVIRONMENT_NAME=".deepspeed_env")
        for module in ("deepspeed", "deepspeed.launcher", "deepspeed.launcher.runner"):
            monkeypatch.setitem(sys.modules, module, runner)
    monkeypatch.chdir(REPOSITORY)
    launch.launch_command(launch.launch_command_parser().parse_args(command[2 : script + 1]))
    assert started["nproc_per_node"] == str(processes_per_machine)
    assert int(started["nnodes"].split(":")[-1]) == num_machines
    assert started["training_script"] == "run_pretraining.py"
    assert (started["FSDP"] == "true") == (name == "fsdp2")
    assert (started["DEEPSPEED"] == "true") == (name == "deepspeed_zero2")


def test_every_config_of_accelerate_is_tested():
    assert len(list(ACCELERATE_CONFIGS.iterdir())) == len(test_config_of_accelerate.pytestmark[0].args[1])


# --- Shares ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("num_documents", [0, 1, 7, 8, 9, 12, 23, 24])
def test_shares_of_an_epoch(num_documents, drop_last):
    batches = BatchSampler(SequentialSampler(range(num_documents)), batch_size=4, drop_last=drop_last)
    shares = [UnpaddedBatchSamplerShard(batches, num_processes=3, process_index=rank) for rank in range(3)]
    given_out = [list(share) for share in shares]
    assert [len(share) for share in given_out] == [len(share) for share in shares]
    assert len({len(share) for share in shares}) == 1  # as many on every process
    rounds = [sum(batches_of_round, []) for batches_of_round in zip(*given_out, strict=True)]
    whole_rounds = BatchSampler(SequentialSampler(range(num_documents)), batch_size=12, drop_last=drop_last)
    assert rounds == list(whole_rounds)  # what one process with batches of 12 gets


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("num_documents", [0, 1, 7, 23, 24])
def test_shares_of_a_stream(num_documents, drop_last):
    options = {"batch_size": 4, "num_processes": 3, "drop_last": drop_last}
    shares = [
        list(UnpaddedIterableDatasetShard(range(num_documents), process_index=rank, **options)) for rank in range(3)
    ]
    assert len({len(share) for share in shares}) == 1 and len(shares[0]) % 4 == 0
    rounds = [sum((share[start : start + 4] for share in shares), []) for start in range(0, len(shares[0]), 4)]
    whole_rounds = BatchSampler(SequentialSampler(range(num_documents)), batch_size=12, drop_last=drop_last)
    assert [[index for index in of_round if index is not None] for of_round in rounds] == list(whole_rounds)


def test_places_without_a_document_are_no_dropped_documents():
    collator, examples = DataCollatorForTJEPA(), make_examples([20, 9])
    with_gaps, without = collator([None, *examples, None]), collator(examples)
    assert with_gaps.pop("view_groups") == without.pop("view_groups")
    assert all(torch.equal(with_gaps[name], tensor) for name, tensor in without.items())
    assert collator.num_dropped_documents == 0


def test_loss_of_uneven_shares(make_model):
    """Each share's loss, with the slots of the mean share: their mean is the loss of all documents together."""
    model = make_model(token_prediction_weight=0.7)
    examples, collator = make_examples([40, 23, 7, 64, 2, 30]), DataCollatorForTJEPA(views_per_document=3)
    whole = model(**collator(examples))
    shares = [collator(examples[:1]), collator(examples[1:]), collator([])]
    slots = sum(share["slots_per_strategy"] for share in shares) / len(shares)
    outputs = [model(**{**share, "slots_per_strategy": slots}) for share in shares]
    for name in ("loss", "jepa_loss", "token_prediction_loss", "loss_per_strategy"):
        mean = torch.stack([getattr(output, name) for output in outputs]).mean(dim=0)
        torch.testing.assert_close(mean, getattr(whole, name))
    per_share = torch.stack([model(**share).loss for share in shares[:2]]).mean()
    assert abs(per_share - whole.loss) > 1e-3  # the mean of the shares' own means is another number


def test_moments_of_uneven_shares():
    """Three threads for three processes: the sums meet at a barrier."""
    from threading import Barrier, Thread

    states = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shares, barrier, parts, losses = states.split([30, 19, 1]), Barrier(3), {}, {}

    def train(rank: int) -> None:
        def total(tensor):
            parts[rank] = tensor
            barrier.wait()
            result = sum(parts.values())
            barrier.wait()
            return result

        losses[rank] = variance_covariance_loss(shares[rank], torch.ones(len(shares[rank]), dtype=torch.bool), total)

    threads = [Thread(target=train, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = variance_covariance_loss(states, torch.ones(50, dtype=torch.bool))
    torch.testing.assert_close(torch.stack(list(losses.values())), expected.expand(3))


def test_an_empty_batch_trains_nothing(make_model):
    model = make_model(variance_covariance_weight=1.0, token_prediction_weight=1.0, pooled_weight=1.0).train()
    collator = DataCollatorForTJEPA()
    collator.fit_to(model.config)
    output = model(**collator([]))
    output.loss.backward()
    assert output.jepa_loss == 0 and output.token_prediction_loss == 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:  # every one has a gradient, or DDP would wait for it
            assert parameter.grad is not None and not parameter.grad.any(), name


def test_gradient_accumulation_equals_one_batch(tmp_path):
    def train(folder: str, trainer_class=None, **options) -> list[torch.Tensor]:
        # no keys' biases: attention ignores them, and AdamW makes steps of the rounding errors that are their gradient
        config = {"token_prediction_weight": 1.0, "use_bias": False}
        trainer = make_trainer(tmp_path / folder, config, max_steps=4, **options)
        if trainer_class is not None:
            trainer.__class__ = trainer_class
        trainer.train()
        return [parameter.detach() for parameter in trainer.model.parameters()]

    whole = train("whole", per_device_train_batch_size=6)
    parts = train("parts", per_device_train_batch_size=2, gradient_accumulation_steps=3)
    plain = train("plain", Trainer, per_device_train_batch_size=2, gradient_accumulation_steps=3)
    assert all(torch.allclose(a, b, atol=1e-5, rtol=0) for a, b in zip(whole, parts, strict=True))
    assert not all(torch.allclose(a, b, atol=1e-5, rtol=0) for a, b in zip(whole, plain, strict=True))


def test_sums_of_moments_add_up():
    features = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)) + 1000.0
    sums = sum(moment_sums(part) for part in features.split([300, 200, 0]))
    assert sums[0, 0] == 500
    torch.testing.assert_close(sums[0, 1:] / 500, features.double().mean(dim=0))
    torch.testing.assert_close(covariance(sums), features.double().T.cov(correction=0))


def test_deepspeed_in_bfloat16_is_refused(tmp_path, monkeypatch):
    def pretend(trainer):
        trainer.is_fsdp_enabled, trainer.is_deepspeed_enabled = False, True
        trainer.accelerator = SimpleNamespace(mixed_precision="bf16")

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", pretend)
    with pytest.raises(ValueError, match="lose its updates to rounding"):
        make_trainer(tmp_path)
