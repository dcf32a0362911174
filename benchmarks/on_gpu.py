"""The pieces of on_gpu.sh: what a GPU has to show, each written to OUT/PIECE.json while it is measured.

    python benchmarks/on_gpu.py speed-768 --output_dir out

All but `learning` need neither `datasets` nor any data: documents are random token ids. MFU is the share of the card's
dense bfloat16 rate that useful FLOPs (flops.py) come to. Where the card's rate is not known, that of a large matmul,
measured here, takes its place.
"""

import argparse
import functools
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from flops import stack_flops, useful_flops
from reporting import DATA
from torch.nn import functional as F

from tjepa import TJEPAConfig, TJEPAForMaskedLM, TJEPAForPreTraining
from tjepa.data_collator_tjepa import MASKING_PRESETS, DataCollatorForTJEPA
from tjepa.layers_tjepa import VARLEN_ATTENTION, compile_layers


VOCAB_SIZE = 32000
CARD_RATES = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16, of the SXM form, from the data sheets
SIZES = {  # encoder and predictor
    "speed-384": {"hidden_size": 384, "num_attention_heads": 6, "num_hidden_layers": 8},
    "speed-768": {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12},
    "recipe-768": {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12},  # 110M parameters
    "encoder-768": {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 18},  # 152M parameters
    "equality": {"hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 2},
    "tiny": {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "rotary_dim": 8, "vocab_size": 120},
}
DEFAULT_RECIPE = {  # configs/default.yaml
    "predictor_type": "boundary",
    "token_prediction_weight": 1.0,
    "denoising_weight": 0.3,
    "variance_covariance_weight": 0.2,
}
WAYS = ("layers", "no")  # of compiling
GPU_ATTENTIONS = (VARLEN_ATTENTION, "flex_attention")  # of the encoders; the predictor has the second one
BOUNDS = {"float32": {"loss": 1e-4, "direction": 0.9999}, "bfloat16": {"loss": 2e-2, "direction": 0.99}}
TOKENS_AT_100_TIMES = 1.1e7  # at 384 x 6, of 13.5 times the FLOPs of the page's 128 x 4, which saw 1.5e6


class Report:
    """A JSON file that holds whatever was measured so far."""

    def __init__(self, path: Path, device: torch.device):
        name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        self.path, self.content = path, {"device": name, "torch": torch.__version__, "results": []}

    def add(self, **figures) -> None:
        print(json.dumps(figures), flush=True)
        self.content["results"].append(figures)
        self.path.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")


def make_config(size: dict, attention: str) -> TJEPAConfig:
    config = TJEPAConfig(**{"vocab_size": VOCAB_SIZE, "max_position_embeddings": 16384, **size})
    config._attn_implementation = attention
    return config


def draw_documents(size: dict, num_tokens: int, median: int, longest: int) -> list[np.ndarray]:
    """Random token ids, lengths log-normal and cut off, until there are so many tokens."""
    rng, documents = np.random.default_rng(0), []
    while sum(map(len, documents)) < num_tokens:
        length = int(np.clip(rng.lognormal(np.log(median), 0.7), 8, longest))
        documents.append(rng.integers(0, size.get("vocab_size", VOCAB_SIZE), length))
    return documents


def make_batch(
    documents: list[np.ndarray], row_length: int | None, device: torch.device, masking: str = "ul2"
) -> dict:
    examples = [{"input_ids": ids, "document_index": i, "epoch": 0} for i, ids in enumerate(documents)]
    batch = DataCollatorForTJEPA(MASKING_PRESETS[masking], row_length=row_length)(examples)
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def build_model(model_class: type, config: TJEPAConfig, way: str, device: torch.device) -> torch.nn.Module:
    """Compiled as `--torch_compile` does it; on the CPU without code generation, which takes minutes there."""
    torch.manual_seed(0)
    model = model_class(config).to(device).train()
    if way == "layers":
        compile_layers(model, **({} if device.type == "cuda" else {"backend": "aot_eager"}))
    return model


# --- equality --------------------------------------------------------------------------------------------------------


def loss_and_gradient(model: Callable, parameters: list, batch: dict, dtype: str) -> tuple[float, torch.Tensor]:
    with torch.autocast(batch["input_ids"].device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        loss = model(**batch).loss
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return loss.item(), torch.cat([gradient.float().flatten() for gradient in gradients if gradient is not None])


def check_equality(args: argparse.Namespace, report: Report) -> bool:
    """Every path against eager attention in float32: the loss, and the direction of the gradient."""
    size = SIZES["tiny" if args.tiny else "equality"]
    documents = draw_documents(size, *((300, 40, 96) if args.tiny else (4000, 60, 900)))
    batch = make_batch(documents, 96 if args.tiny else 1024, args.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    reference = build_model(TJEPAForPreTraining, make_config(size, "eager"), "no", args.device)
    parameters = [parameter for parameter in reference.parameters() if parameter.requires_grad]
    expected_loss, expected_gradient = loss_and_gradient(reference, parameters, batch, "float32")
    all_hold = True
    # what a GPU run takes comes first, should time run out
    ways = [
        ("flex_attention", "no"),
        ("flex_attention", "layers"),
        (VARLEN_ATTENTION, "no"),
        (VARLEN_ATTENTION, "layers"),
        ("sdpa", "no"),
        ("eager", "no"),
        ("eager", "layers"),
    ]
    for (attention, way), dtype in itertools.product(ways, BOUNDS):
        what = {"attention": attention, "compiled": way, "dtype": dtype}
        if attention == VARLEN_ATTENTION and dtype == "float32":
            report.add(**what, skipped="flash attention takes no float32")
            continue
        if attention in GPU_ATTENTIONS and args.device.type != "cuda":
            report.add(**what, skipped=f"torch has no {attention} on the CPU, or not its backward")
            continue
        try:
            model = build_model(TJEPAForPreTraining, make_config(size, attention), way, args.device)
            parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
            loss, gradient = loss_and_gradient(model, parameters, batch, dtype)
        except Exception as error:  # one path that fails does not hide the others
            report.add(**what, failed=f"{type(error).__name__}: {str(error)[:300]}")
            all_hold = False
            continue
        finally:
            torch._dynamo.reset()
        figures = {"loss": loss, "loss_difference": abs(loss - expected_loss) / abs(expected_loss)}
        figures["gradient_direction"] = float(F.cosine_similarity(gradient, expected_gradient, dim=0))
        holds = figures["loss_difference"] < BOUNDS[dtype]["loss"]
        holds &= figures["gradient_direction"] > BOUNDS[dtype]["direction"]
        report.add(**what, **figures, holds=holds)
        all_hold &= holds
    return all_hold


# --- speed -----------------------------------------------------------------------------------------------------------


@functools.cache
def card_rate(device: torch.device) -> float:
    if device.type == "cuda":
        for name, rate in CARD_RATES.items():
            if name in torch.cuda.get_device_name():
                return rate
    n, times = 8192 if device.type == "cuda" else 256, []
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        start = time.perf_counter()
        a @ b
        synchronise(device)
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times)


def time_steps(step: Callable, args: argparse.Namespace) -> dict:
    """Seconds of a step (median), of the first one (compiling included), and the peak of memory in bytes."""
    seconds = []
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(3 if args.tiny else 13):
        start = time.perf_counter()
        step()
        synchronise(args.device)
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if args.device.type == "cuda" else None
    return {"seconds": float(np.median(seconds[-10:])), "first_seconds": seconds[0], "peak_memory_bytes": peak}


def make_step(model: torch.nn.Module, loss: Callable, device: torch.device, after: Callable) -> Callable:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=device.type == "cuda")

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        after()

    return step


def measure_speed(args: argparse.Namespace, report: Report) -> None:
    """The pretraining step. The row length that says most comes first, should time run out."""
    size = SIZES["tiny" if args.tiny else args.piece]
    documents = draw_documents(size, *((300, 40, 96) if args.tiny else (8192, 400, 1024)))
    first, *others = attentions_of(args.device)
    row_lengths = (96,) if args.tiny else (4096, 1024, 16384)
    runs = [(row_lengths[0], first, way) for way in WAYS]
    runs += [(row_lengths[0], attention, WAYS[0]) for attention in others]
    runs += [(row_length, first, WAYS[0]) for row_length in row_lengths[1:]]
    for row_length, attention, way in runs:
        batch = make_batch(documents, row_length, args.device)
        config = make_config(size, attention)
        what = {"model": "pretraining", "row_length": row_length, "attention": attention}
        measure_step(config, batch, way, what, documents, useful_flops(config, batch), args, report)


def measure_recipe(args: argparse.Namespace, report: Report) -> None:
    """The step of configs/default.yaml, in one row without padding; with few documents the card waits for the host."""
    size = {**SIZES["tiny" if args.tiny else args.piece], **DEFAULT_RECIPE}
    attention = attentions_of(args.device)[0]
    for num_tokens, way in ((16384, WAYS[0]), (16384, WAYS[1]), (65536, WAYS[0])):
        documents = draw_documents(size, *((num_tokens // 50, 40, 96) if args.tiny else (num_tokens, 200, 256)))
        batch = make_batch(documents, None, args.device, "single_tokens")
        what = {"model": "configs/default.yaml", "attention": attention}
        measure_step(make_config(size, attention), batch, way, what, documents, None, args, report)


def measure_step(
    config: TJEPAConfig,
    batch: dict,
    way: str,
    what: dict,
    documents: list,
    flops: float | None,
    args: argparse.Namespace,
    report: Report,
) -> None:
    model = build_model(TJEPAForPreTraining, config, way, args.device)
    what |= {"compiled": way, "parameters": sum(p.numel() for p in model.context_encoder.parameters())}
    step = make_step(model, lambda: model(**batch).loss, args.device, lambda: model.update_target_encoder(0.99))
    measure(what, step, documents, flops, args, report)


def measure_encoder_alone(args: argparse.Namespace, report: Report) -> None:
    """Masked language modelling, a third of the tokens predicted, logits at these only."""
    size = SIZES["tiny" if args.tiny else args.piece]
    documents = draw_documents(size, *((300, 40, 96) if args.tiny else (49152, 400, 1024)))
    batch = make_batch(documents, 192 if args.tiny else 4096, args.device)
    input_ids, positions, views = (batch[name] for name in ("input_ids", "position_ids", "document_ids"))
    groups = batch["view_groups"].documents
    picked = torch.randperm(input_ids.numel(), device=args.device)[: input_ids.numel() // 3]
    labels = input_ids.flatten()[picked].long()
    lengths = torch.tensor([len(document) for document in documents]).double()
    config = make_config(size, "eager")
    d, sizes = config.hidden_size, (config.hidden_size, config.intermediate_size, config.num_hidden_layers)
    head = 2 * d * (d + config.vocab_size) * len(labels)
    flops = 3 * (stack_flops(lengths.sum(), lengths.square().sum(), *sizes) + head)
    for attention, way in itertools.product(attentions_of(args.device), WAYS):
        model = build_model(TJEPAForMaskedLM, make_config(size, attention), way, args.device)

        def loss(model=model):
            states = model.encoder(input_ids, position_ids=positions, view_ids=views, groups=groups).last_hidden_state
            states = states.flatten(0, 1)
            return model.token_head(states[picked], model.decoder.weight, labels).mean()

        what = {"model": "encoder alone (MLM)", "parameters": sum(p.numel() for p in model.parameters())}
        what |= {"row_length": input_ids.shape[1], "attention": attention, "compiled": way}
        step = make_step(model, loss, args.device, lambda: None)
        measure(what, step, documents, flops, args, report)


def attentions_of(device: torch.device) -> tuple[str, ...]:
    return GPU_ATTENTIONS if device.type == "cuda" else ("eager",)


def measure(
    what: dict,
    step: Callable,
    documents: list,
    flops: float | None,
    args: argparse.Namespace,
    report: Report,
) -> None:
    """
    Adds a line for what was timed, or for what failed: out of memory, say, and the next one may fit. Of what is timed
    first there is a profile, too.
    """
    num_tokens, rate = sum(map(len, documents)), card_rate(args.device)
    what = {**what, "document_tokens": num_tokens}
    try:
        figures = time_steps(step, args)
    except Exception as error:
        report.add(**what, failed=f"{type(error).__name__}: {str(error)[:300]}")
    else:
        figures["tokens_per_second"] = num_tokens / figures["seconds"]
        if flops is not None:
            figures |= {"mfu": flops / figures["seconds"] / rate, "flops": flops, "rate": rate}
        report.add(**what, **figures)
        if len(report.content["results"]) == 1:
            write_profile(step, args)
    torch._dynamo.reset()


def write_profile(step: Callable, args: argparse.Namespace) -> None:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if args.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        step()
        synchronise(args.device)
    table = profile.key_averages().table(sort_by=f"self_{args.device.type}_time_total", row_limit=30)
    (args.output_dir / f"{args.piece}-profile.txt").write_text(table, encoding="utf-8")


# --- learning --------------------------------------------------------------------------------------------------------


def compare_learning(args: argparse.Namespace, report: Report) -> None:
    """docs/learning.md's comparison with a larger encoder on more tokens: the best T-JEPA, its control, and MLM."""
    if not DATA.is_dir():
        report.add(skipped=f"no corpus and no data sets to judge with at {DATA}: python benchmarks/fetch_data.py")
        return
    out = args.output_dir / "learning"
    train = ["--train_file", str(DATA / ("books-validation.parquet" if args.tiny else "books-train.parquet"))]
    larger = "hidden_size=384,num_hidden_layers=6,num_attention_heads=6,per_device_train_batch_size=128,bf16=true"
    larger = "hidden_size=32,num_hidden_layers=1,num_attention_heads=2,rotary_dim=8" if args.tiny else larger
    prepared, cli = str(out / "books64"), [sys.executable, "-m", "tjepa.cli"]
    tokenizer = ["--vocab_size", "300" if args.tiny else "4096", "--output_dir", str(out / "tokenizer")]
    pieces = ["--max_length", "64", "--long_documents", "split", "--min_tokens", "16", "--output_dir", prepared]
    curve = [sys.executable, str(Path(__file__).with_name("learning_curve.py")), "--output_dir", str(out / "runs")]
    curve += ["--dataset_name", prepared, "--data_dir", str(DATA / "eval"), "--judge_on", "test"]
    curve += ["--tokens", "1000" if args.tiny else str(TOKENS_AT_100_TIMES)]
    curve += ["--num_checkpoints", "1" if args.tiny else "2", "--max_samples", "40" if args.tiny else "5000"]
    curve += ["--tasks", "trec", *(() if args.tiny else ("sst2", "subj", "sts14")), "--only", "untrained"]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(out / "cache")}
    if not (out / "tokenizer").exists():
        subprocess.run([*cli, "tokenizer", *train, *tokenizer], check=True, env=environment)
    if not Path(prepared).exists():
        subprocess.run(
            [*cli, "prepare", *train, "--tokenizer_name", str(out / "tokenizer"), *pieces], check=True, env=environment
        )
    subprocess.run(curve, check=True, env=environment)
    # Side by side: such small models leave the card idle, and a run's length is counted in tokens
    variants = [f"{name}-large={name},{larger},learning_rate=0.001" for name in ("tjepa", "control", "mlm")]
    runs = [subprocess.Popen([*curve, "--variant", variant], env=environment) for variant in variants]
    failed = [run.args[-1] for run in runs if run.wait() != 0]
    for path in sorted({*(out / "runs").glob("*.json")} - {out / "runs" / "result.json"}):
        report.add(recipe=path.stem, **json.loads(path.read_text(encoding="utf-8"))["checkpoints"][-1])
    if failed:
        raise SystemExit(f"These runs failed: {failed}")


PIECES = {
    "equality": check_equality,
    "speed-384": measure_speed,
    "speed-768": measure_speed,
    "recipe-768": measure_recipe,
    "encoder-768": measure_encoder_alone,
    "learning": compare_learning,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("piece", choices=PIECES)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="at a size for the CPU, to see that it runs")
    args = parser.parse_args()
    args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.device.type != "cuda" and not args.tiny:
        parser.error("there is no GPU here; --tiny runs all of it on the CPU, to see that it works")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if PIECES[args.piece](args, Report(args.output_dir / f"{args.piece}.json", args.device)) is False:
        sys.exit("A path does not agree with eager attention, or failed: see the lines above.")


if __name__ == "__main__":
    main()
