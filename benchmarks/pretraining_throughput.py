"""One pretraining step, ours against the reference's algorithm written plainly (plain_reference.py).

    python benchmarks/pretraining_throughput.py --max_length 1024 --output result.json --plot result.png

Both take the same documents, views and weights, in turn, and must agree on the loss. A step is collator, forward,
backward, AdamW and moving average; ratios are ours / plain. Ours divides a step into micro-batches of
`--micro_batch_size` documents, as `TJEPATrainer` does with gradient accumulation: same loss, same gradients, and
activations of one micro-batch only. The plain side pads the whole batch, and runs backward strategy after strategy, so
that it holds the activations of one strategy only.

Memory and batches are those of `--num_documents`; peak memory is what one step adds to a process of its own. (The
plain side's step is there its most expensive strategy alone, which is where its peak lies.) Time is taken on every
fourth of these documents by length, the longest among them: the same share of padding in a quarter of the time.

Utilisation is the useful FLOPs (flops.py) over the step's time and over the highest rate of float32 matmuls, measured
before and after every step in the same run. `flop_ratio` is what the plain side computes, padding and masked pairs
included, over the useful FLOPs: what the tokens/s ratio would be at equal speed per FLOP.

With `--dtype bfloat16` or `--baseline FOLDER`, another checkout, it compares our own steps (against_baseline.py):

    git worktree add /tmp/baseline 9ad65c5
    python benchmarks/pretraining_throughput.py --dtype bfloat16 --baseline /tmp/baseline --max_length 256
"""

from tjepa.corpus.command_line import wait_briefly


if __name__ == "__main__":  # before torch is imported, as the commands do
    wait_briefly()


import argparse
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import against_baseline
import numpy as np
import torch
from flops import stack_flops, useful_flops
from plain_reference import batch_bytes, plain_batch, plain_forward_backward
from reporting import add_data_arguments, add_report_arguments, new_figure, write_report
from transformers import AutoTokenizer

from tjepa import TJEPAConfig, TJEPAForPreTraining
from tjepa.corpus.documents import DataArguments, load_documents
from tjepa.corpus.tokenization import tokenize_documents
from tjepa.data_collator_tjepa import MASKING_PRESETS, Views, draw_views, hash_keys, pack_batch
from tjepa.training.setup import keep_freed_memory


SIDES = ("ours", "plain")
MATMUL_SHAPES = [(1024, 384, 384), (1024, 1024, 1024), (4096, 384, 1536), (2048, 2048, 2048)]
MODELS = {
    "reference": {},
    "quickstart": {
        "vocab_size": 2048,
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "predictor_num_hidden_layers": 2,
    },
}


def read_documents(args) -> list[np.ndarray]:
    data_args = DataArguments(train_file=str(args.train_file), max_length=args.max_length, max_train_samples=2000)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    dataset, _ = tokenize_documents(load_documents(data_args)["train"], tokenizer, data_args, "train")
    vocab_size = TJEPAConfig(**MODELS[args.model]).vocab_size
    documents = [np.asarray(ids) % vocab_size for ids in dataset["input_ids"][:]]
    order = np.random.default_rng(0).permutation(len(documents))
    return [documents[index] for index in order[: args.num_documents]]


def plain_flops(config: TJEPAConfig, batch: dict) -> float:
    """What the plain side computes in one training step, padding and masked pairs included."""
    encoder = (config.hidden_size, config.intermediate_size, config.num_hidden_layers)
    predictor = (config.predictor_hidden_size, config.predictor_intermediate_size, config.predictor_num_hidden_layers)
    num_documents, length = batch["input_ids"].shape
    total = stack_flops(num_documents * length, num_documents * length**2, *encoder)
    for strategy in batch["strategies"]:
        num_contexts = strategy["context_positions"].shape[1]
        entries = num_contexts + strategy["slot_positions"].shape[1]
        total += 3 * stack_flops(num_documents * num_contexts, num_documents * num_contexts**2, *encoder)
        total += 3 * stack_flops(num_documents * entries, num_documents * entries**2, *predictor)
    return total


def matmul_rate(dtype: torch.dtype = torch.float32, clock: Callable[[], float] = time.perf_counter) -> float:
    """FLOP/s of matmuls, of the shape that runs fastest here: the best of five."""
    rates = [0.0]
    for m, k, n in MATMUL_SHAPES:
        flops = 2 * m * k * n
        if 0.0 < max(rates) < flops:  # more than a second: a processor that knows no bfloat16
            break
        a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
        for _ in range(5):
            start = clock()
            a @ b
            rates.append(flops / (clock() - start))
    return max(rates)


class Step:
    """One side's training step on fixed documents."""

    def __init__(self, args, documents: list[np.ndarray], side: str):
        torch.manual_seed(0)
        self.side, self.documents = side, documents
        self.strategies = MASKING_PRESETS["ul2"]
        self.micro_batch_size = args.micro_batch_size if side == "ours" else len(documents)
        self.model = TJEPAForPreTraining(TJEPAConfig(**MODELS[args.model])).train()
        if side == "ours" and args.activation_checkpointing:
            self.model.activation_checkpointing_enable()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, fused=True)  # weights stay the same

    def draw(self, first: int, last: int) -> Views:
        """The views of some of the documents: the same however they are divided."""
        return draw_views(self.documents[first:last], hash_keys(0, np.arange(first, last)), self.strategies)

    def batches(self) -> list[dict]:
        make = pack_batch if self.side == "ours" else plain_batch
        bounds = [*range(0, len(self.documents), self.micro_batch_size), len(self.documents)]
        return [
            make(self.documents[first:last], self.draw(first, last), len(self.strategies))
            for first, last in pairwise(bounds)
        ]

    def useful_flops(self) -> float:
        return sum(useful_flops(self.model.config, batch) for batch in self.batches())

    def forward_backward(self, batches: list[dict]) -> float:
        if self.side == "plain":
            (batch,) = batches
            return plain_forward_backward(self.model, batch)
        slots_per_strategy, total = sum(batch["slots_per_strategy"] for batch in batches), 0.0
        for batch in batches:
            loss = self.model(**{**batch, "slots_per_strategy": slots_per_strategy}).loss
            loss.backward()
            total += loss.item()
        return total

    def __call__(self) -> float:
        loss = self.forward_backward(self.batches())
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.update_target_encoder(0.999)
        return loss


def peak_memory_growth(args, documents: list[np.ndarray], side: str) -> float:
    """Bytes that one step adds to the largest resident size of a process of its own."""

    def run(connection):
        torch.set_num_threads(args.num_threads)
        step = Step(args, documents, side)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        batches = step.batches()
        if side == "plain":
            batches[0]["strategies"] = [max(batches[0]["strategies"], key=batch_bytes)]
        step.forward_backward(batches)
        step.optimizer.step()
        connection.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)

    context = multiprocessing.get_context("fork")  # the documents and imports are there already
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run, args=(sender,))
    process.start()
    sender.close()
    try:
        return float(receiver.recv())
    except EOFError as error:
        process.join()
        raise RuntimeError(
            f"The process that measures the memory of {side!r} ended with code {process.exitcode}: if it ran out of "
            "memory, pass a smaller --num_documents."
        ) from error


def padding_share(batch: dict) -> float:
    """The worst of the three streams."""
    return max(
        (batch[name] < 0).float().mean().item() for name in ("document_ids", "context_view_ids", "prediction_view_ids")
    )


def measure(args) -> dict:
    documents = read_documents(args)
    # first, while this process is small and before it starts threads, which would not survive the fork
    memory = {side: peak_memory_growth(args, documents, side) for side in SIDES}
    batches = {side: Step(args, documents, side).batches() for side in SIDES}
    timed_documents = sorted(documents, key=len, reverse=True)[::4]

    torch.set_num_threads(args.num_threads)
    keep_freed_memory()
    peak = matmul_rate()
    steps = {side: Step(args, timed_documents, side) for side in SIDES}
    losses = {side: step() for side, step in steps.items()}  # also the warm-up
    if abs(losses["ours"] - losses["plain"]) > 1e-5:
        raise RuntimeError(f"The two sides disagree on the loss, so nothing can be compared: {losses}")
    seconds = {side: [] for side in steps}
    for _ in range(args.repeats):
        for side, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[side].append(time.perf_counter() - start)
            peak = max(peak, matmul_rate())
    ratios = [plain / ours for ours, plain in zip(seconds["ours"], seconds["plain"], strict=True)]
    tokens = sum(len(document) for document in timed_documents)
    median = {side: statistics.median(times) for side, times in seconds.items()}
    flops = steps["ours"].useful_flops()
    return {
        "tokens_per_second_ratio": statistics.median(ratios),
        "tokens_per_second_ratio_spread": [min(ratios), max(ratios)],
        "peak_memory_ratio": memory["ours"] / memory["plain"],
        "batch_bytes_ratio": batch_bytes(batches["ours"]) / batch_bytes(batches["plain"]),
        "padding_share": max(padding_share(batch) for batch in batches["ours"]),
        "useful_flop_utilisation": flops / median["ours"] / peak,
        "flop_ratio": plain_flops(steps["plain"].model.config, steps["plain"].batches()[0]) / flops,
        "profile": profile_by_operator(steps["ours"]),
        "max_length": args.max_length,
        "model": args.model,
        "activation_checkpointing": args.activation_checkpointing,
        "num_documents": len(documents),
        "micro_batch_size": args.micro_batch_size,
        "loss": losses,
        "matmul_flops_per_second": peak,
        **{
            side: {
                "documents_per_second": len(timed_documents) / median[side],
                "tokens_per_second": tokens / median[side],
                "seconds_per_step": seconds[side],
                "peak_memory_bytes": memory[side],
                "batch_bytes": batch_bytes(batches[side]),
            }
            for side in SIDES
        },
        "plain_padding_share": 1 - batches["plain"][0]["attention_mask"].float().mean().item(),
    }


def profile_by_operator(step: Step, num_operators: int = 12) -> dict[str, float]:
    """The share of one step's CPU time that each of torch's operators takes by itself."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    total = sum(times.values())
    return {name: time / total for name, time in sorted(times.items(), key=lambda kv: -kv[1])[:num_operators]}


def report(result: dict) -> None:
    print(f"{'':24}{'ours':>14}{'plain':>14}")
    for name, scale in (
        ("documents_per_second", 1),
        ("tokens_per_second", 1),
        ("peak_memory_bytes", 1e9),
        ("batch_bytes", 1e6),
    ):
        unit = {1: name.replace("_", " "), 1e9: "peak memory (GB)", 1e6: "batch (MB)"}[scale]
        print(f"{unit:24}{result['ours'][name] / scale:>14,.2f}{result['plain'][name] / scale:>14,.2f}")
    print(f"{'padding share':24}{result['padding_share']:>14.1%}{result['plain_padding_share']:>14.1%}")
    for name in ("peak_memory_ratio", "batch_bytes_ratio"):
        print(f"{name.replace('_', ' '):24}{result[name]:>14.3f}")
    low, high = result["tokens_per_second_ratio_spread"]
    print(f"\ntokens/s ratio {result['tokens_per_second_ratio']:.2f} ({low:.2f} to {high:.2f})")
    print(f"FLOPs of the plain side over the useful ones: {result['flop_ratio']:.2f}")
    peak = result["matmul_flops_per_second"] / 1e9
    print(f"useful-FLOP utilisation {result['useful_flop_utilisation']:.1%} of {peak:.0f} GFLOP/s")
    print("\nour step's CPU time by operator:")
    for name, share in result["profile"].items():
        print(f"{share:>8.1%}  {name}")


def draw(result: dict):
    names = ["tokens_per_second", "peak_memory_bytes", "batch_bytes"]
    figure = new_figure(9, 2.8)
    for axis, name in zip(figure.subplots(1, len(names)), names, strict=True):
        axis.bar(["ours", "plain"], [result["ours"][name], result["plain"][name]], color=["#2a6f97", "#bbbbbb"])
        axis.set_title(name.replace("_", " "), fontsize=9)
    figure.suptitle(f"one training step, maximum length {result['max_length']}", fontsize=10)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--max_length", type=int, default=1024, help="tokens")
    parser.add_argument("--num_documents", type=int, default=32, help="documents per step")
    parser.add_argument("--micro_batch_size", type=int, default=1, help="documents per micro-batch of ours")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", choices=MODELS, default="reference")
    add_data_arguments(parser)
    parser.add_argument("--num_threads", type=int, default=2)
    add_report_arguments(parser)
    parser.add_argument(
        "--activation_checkpointing", action="store_true", help="of ours: less memory, more arithmetic"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of our step (autocast)")
    parser.add_argument("--baseline", type=Path, help="another checkout, whose float32 step ours is compared with")
    parser.add_argument(
        "--cpu_time", action="store_true", help="with these two: processor time, where others use the machine, too"
    )
    args = parser.parse_args()
    if args.baseline is not None and not args.baseline.is_dir():
        parser.error(f"--baseline {args.baseline} is not there: git worktree add {args.baseline} COMMIT")
    if args.dtype == "float32" and args.baseline is None:
        result = measure(args)
        report(result)
        write_report(args, result, draw)
        return
    documents = sorted(read_documents(args), key=len, reverse=True)[::4]
    torch.set_num_threads(args.num_threads)
    step = Step(args, documents, "ours")
    result = against_baseline.compare(args, documents, MODELS[args.model], step.useful_flops(), matmul_rate)
    against_baseline.report(result)
    write_report(args, result)


if __name__ == "__main__":
    main()
