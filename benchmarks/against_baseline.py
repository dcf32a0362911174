"""Our training step in float32 and bfloat16 against that of another checkout (`pretraining_throughput.py --baseline`).

Each side is a process of its own (one_side.py), and they make their steps in turn. All have the same weights and the
same views, which the baseline's collator draws once; here they are put into the form that our model takes.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from tjepa import TJEPAConfig, TJEPAForPreTraining
from tjepa.layers_tjepa import PackedViews


REPOSITORY = Path(__file__).resolve().parents[1]
# what training/setup.py does for a run: glibc keeps freed memory
KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}


def converted(batch: dict) -> dict:
    """A batch of the baseline, whose slots need not be in the order of the rows, and which knows no groups."""
    order = batch["slot_indices"].argsort()
    slots = {name: batch[name][order] for name in ("slot_indices", "label_indices", "slot_strategy_ids")}
    groups = SimpleNamespace(
        documents=PackedViews.from_ids(batch["document_ids"]).groups,
        contexts=PackedViews.from_ids(batch["context_view_ids"]).groups,
        predictions=PackedViews.from_ids(batch["prediction_view_ids"], batch["prediction_block_ids"]).groups,
    )
    return {**batch, **slots, "view_groups": groups}


class Side:
    """A process of one_side.py that makes a step whenever it is called."""

    def __init__(self, stack: ExitStack, folder: Path, package: Path, batches: str, dtype: str, num_threads: int):
        self.command = [sys.executable, str(Path(__file__).with_name("one_side.py")), "step", str(folder)]
        self.command += [batches, dtype]
        environment = {**path_to(package, folder), "OMP_NUM_THREADS": str(num_threads), **KEEP_FREED_MEMORY}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
        self.process = stack.enter_context(subprocess.Popen(self.command, **pipes))
        stack.callback(self.process.stdin.close)  # which ends it
        self.steps: list[dict] = []

    def __call__(self) -> dict:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"A side ended with code {self.process.wait()}: {' '.join(self.command)}")
        self.steps.append(json.loads(line))
        return self.steps[-1]

    @property
    def gradients(self) -> torch.Tensor:
        return torch.load(self.steps[0]["gradients"], weights_only=True)


def path_to(package: Path, folder: Path) -> dict[str, str]:
    """The environment of a process for which `tjepa` is the checkout `package`, whatever that folder is called."""
    if not (package / "modeling_tjepa.py").is_file():
        raise ValueError(f"{package} is not a checkout of this project: there is no modeling_tjepa.py in it.")
    parent = folder / str(package.resolve()).strip("/").replace("/", "-")
    parent.mkdir(exist_ok=True)
    if not (parent / "tjepa").exists():
        (parent / "tjepa").symlink_to(package.resolve(), target_is_directory=True)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(parent), *filter(None, [os.environ.get("PYTHONPATH")])])}


def compare(args, documents: list[np.ndarray], config: dict, flops: float, matmul_rate) -> dict:
    """
    Args:
        args: of the command line.
        documents: token ids of each.
        config: of the model, beyond the defaults.
        flops: useful ones of a step.
        matmul_rate: function of a dtype and a clock, FLOP/s.
    """
    sides = {"float32": (REPOSITORY, "converted.pt", "float32")}
    if args.dtype == "bfloat16":
        sides["bfloat16"] = (REPOSITORY, "converted.pt", "bfloat16")
    if args.baseline:
        sides["baseline"] = (args.baseline, "batches.pt", "float32")
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        np.savez(folder / "documents.npz", *documents)
        torch.manual_seed(0)
        weights = TJEPAForPreTraining(TJEPAConfig(**config)).state_dict()
        torch.save({"config": config, "weights": weights}, folder / "start.pt")
        draw = [sys.executable, str(Path(__file__).with_name("one_side.py")), "draw", name]
        subprocess.run(draw, check=True, env=path_to(args.baseline or REPOSITORY, folder))
        with torch.serialization.safe_globals([SimpleNamespace]):
            batches = torch.load(folder / "batches.pt", weights_only=True)
        torch.save([converted(batch) for batch in batches], folder / "converted.pt")

        runs = {side: Side(stack, folder, *of_side, args.num_threads) for side, of_side in sides.items()}
        first = {side: run() for side, run in runs.items()}  # also the warm-up
        agreement = {side: agree(runs["float32"], run) for side, run in runs.items() if side != "float32"}
        if args.baseline and not max(agreement["baseline"]["loss"], agreement["baseline"]["gradients"]) < 1e-5:
            raise RuntimeError(f"The sides disagree, so nothing can be compared: {agreement['baseline']}")
        rates = dict.fromkeys((args.dtype, "float32"), 0.0)
        clock = time.process_time if args.cpu_time else time.perf_counter
        for _ in range(args.repeats):
            for run in runs.values():
                run()
                rates = {dtype: max(rate, matmul_rate(getattr(torch, dtype), clock)) for dtype, rate in rates.items()}

    num_tokens, clock_name = sum(len(document) for document in documents), "cpu" if args.cpu_time else "wall"
    seconds = {side: [step["seconds"][clock_name] for step in run.steps[1:]] for side, run in runs.items()}
    speed = {side: num_tokens / statistics.median(times) for side, times in seconds.items()}
    result = {
        "useful_flop_utilisation": flops / num_tokens * speed[args.dtype] / rates[args.dtype],
        "tokens_per_second": speed,
        "seconds_per_step": seconds,
        "clock": clock_name,
        "matmul_flops_per_second": rates,
        "loss": {side: step["loss"] for side, step in first.items()},
        "difference_from_float32": agreement,
        **{name: getattr(args, name) for name in ("dtype", "max_length", "model", "num_threads")},
        "num_documents": len(documents),
    }
    for side, other in (("bfloat16", "float32"), ("float32", "baseline"), ("bfloat16", "baseline")):
        if side in speed and other in speed:
            result[f"{side.replace('bfloat', 'bf')}_over_{other}"] = speed[side] / speed[other]
    return result


def agree(side: Side, other: Side) -> dict[str, float]:
    """By how much loss and gradients of the first step differ, and the cosine of the gradients."""
    gradients, others = side.gradients, other.gradients
    return {
        "loss": abs(side.steps[0]["loss"] - other.steps[0]["loss"]),
        "gradients": (gradients - others).abs().max().item(),
        "gradient_cosine": torch.cosine_similarity(gradients.double(), others.double(), dim=0).item(),
    }


def report(result: dict) -> None:
    for side, speed in result["tokens_per_second"].items():
        difference = result["difference_from_float32"].get(side)
        print(f"{side:10}{speed:>12,.1f} tokens/s", end="")
        print(
            f"   loss differs by {difference['loss']:.1e}, gradients' cosine {difference['gradient_cosine']:.6f}"
            if difference
            else ""
        )
    for name, value in result.items():
        if "_over_" in name:
            print(f"{name} {value:.2f}")
    rate = result["matmul_flops_per_second"][result["dtype"]] / 1e9
    print(
        f"useful-FLOP utilisation {result['useful_flop_utilisation']:.1%} of {rate:.0f} GFLOP/s in {result['dtype']}"
    )
