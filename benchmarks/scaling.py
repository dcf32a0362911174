"""How a step's cost and memory grow with the length of documents (at equal tokens) and the number of strategies.

python benchmarks/scaling.py --output result.json --plot result.png

Cost and peak memory per predictor token should be flat with length but for attention's own share, which is printed
beside them: the part of the useful FLOPs that pairs of query and key need.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import numpy as np
import torch
from flops import useful_flops
from reporting import add_report_arguments, new_figure, write_report

from tjepa import TJEPAConfig, TJEPAForPreTraining
from tjepa.data_collator_tjepa import MASKING_PRESETS, draw_views, hash_keys, pack_batch


LENGTHS = (128, 256, 512, 1024, 2048, 4096)


def measure_one(length: int, num_strategies: int, args) -> dict:
    """In a process of its own, for its peak memory."""
    torch.set_num_threads(args.num_threads)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 1000, size=length) for _ in range(max(1, args.num_tokens // length))]
    strategies = MASKING_PRESETS["ul2"][:num_strategies]
    views = draw_views(documents, hash_keys(0, np.arange(len(documents))), strategies)
    batch = pack_batch(documents, views, num_strategies)
    config = TJEPAConfig(vocab_size=1000, hidden_size=args.hidden_size, num_hidden_layers=args.num_layers)
    model = TJEPAForPreTraining(config).train()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(args.repeats + 1):
        start = time.perf_counter()
        model(**batch).loss.backward()
        seconds.append(time.perf_counter() - start)
    tokens = batch["prediction_indices"].numel()
    flops, linear_flops = (useful_flops(config, batch, with_attention) for with_attention in (True, False))
    return {
        "length": length,
        "num_strategies": num_strategies,
        "predictor_tokens": tokens,
        "microseconds_per_token": statistics.median(seconds[1:]) / tokens * 1e6,
        "peak_kilobytes_per_token": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / tokens,
        "attention_share": 1 - linear_flops / flops,
    }


def in_own_process(length: int, num_strategies: int, argv: list[str]) -> dict:
    command = [sys.executable, __file__, *argv, "--one", str(length), str(num_strategies)]
    row = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    print(
        f"{row['length']:>7}{row['num_strategies']:>12}{row['microseconds_per_token']:>16.1f}"
        f"{row['peak_kilobytes_per_token']:>14.1f}{row['attention_share']:>16.1%}"
    )
    return row


def draw(result: dict):
    figure = new_figure(10, 3.2)
    axes = figure.subplots(1, 2)
    for axis, rows, x in zip(axes, result.values(), ("length", "num_strategies"), strict=True):
        counts = [row[x] for row in rows]
        times = np.array([row["microseconds_per_token"] for row in rows])
        attention = np.array([row["attention_share"] for row in rows])
        memory = [row["peak_kilobytes_per_token"] for row in rows]
        axis.plot(counts, times, "o-", color="#2a6f97", label="time")
        axis.plot(counts, times * (1 - attention), "o:", color="#2a6f97", label="time less attention's share of FLOPs")
        axis.plot([], [], "s--", color="#bb7733", label="peak memory (right axis)")
        axis.set_ylabel("microseconds per predictor token")
        axis.set_ylim(0, 1.1 * max(times))
        twin = axis.twinx()
        twin.plot(counts, memory, "s--", color="#bb7733")
        twin.set_ylabel("peak kB per predictor token")
        twin.set_ylim(0, 1.1 * max(memory))
        axis.set_xlabel(x.replace("_", " "))
    axes[1].legend(fontsize="small", loc="lower left")
    axes[0].set_xscale("log", base=2)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num_tokens", type=int, default=4096, help="document tokens per step")
    parser.add_argument("--max_length", type=int, default=4096, help="longest documents, in tokens")
    parser.add_argument("--max_strategies", type=int, choices=range(1, 8), default=7, help="measured from 1 to this")
    parser.add_argument("--hidden_size", type=int, default=384)
    parser.add_argument("--num_layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--num_threads", type=int, default=2)
    add_report_arguments(parser)
    parser.add_argument("--one", nargs=2, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure_one(*args.one, args)))
        return
    print(f"{'length':>7}{'strategies':>12}{'us per token':>16}{'kB per token':>14}{'attention FLOPs':>16}")
    argv = sys.argv[1:]
    lengths = [length for length in LENGTHS if length <= args.max_length]
    result = {
        "by_length": [in_own_process(length, 7, argv) for length in lengths],
        "by_strategies": [
            in_own_process(min(512, args.max_length), count, argv) for count in range(1, args.max_strategies + 1)
        ],
    }
    write_report(args, result, draw)


if __name__ == "__main__":
    main()
