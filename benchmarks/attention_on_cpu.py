"""Attention forward and backward in bfloat16 on a CPU: torch's own, the same in float32, and plain matmuls.

    python benchmarks/attention_on_cpu.py

Milliseconds of CPU time of one thread for one layer, medians of interleaved runs. `float32` counts the casts from and
to bfloat16. What a training step takes is `layers_tjepa.attend`.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from reporting import add_report_arguments, write_report
from torch.nn.functional import scaled_dot_product_attention

from tjepa import layers_tjepa
from tjepa.training.setup import keep_freed_memory


SHAPES = [  # views, heads, queries, keys, whether a mask says which keys a query sees
    (1, 4, 64, 64, False),
    (1, 12, 64, 64, False),
    (1, 12, 256, 256, False),
    (7, 12, 256, 256, False),
    (3, 12, 128, 256, True),
    (1, 12, 1024, 1024, False),
    (1, 12, 512, 1024, True),
]
HEAD_DIM = 32


def attend_up_to(longest: int) -> Callable[..., torch.Tensor]:
    """`attend` with matmuls for views of at most so many tokens."""

    def attend(*args) -> torch.Tensor:
        layers_tjepa.LONGEST_BY_MATMULS = longest
        return layers_tjepa.attend(*args)

    return attend


WAYS = {"torch": scaled_dot_product_attention, "float32": attend_up_to(0), "matmuls": attend_up_to(10**9)}


def measure(shape: tuple[int, int, int, int, bool], repeats: int) -> dict[str, float]:
    views, heads, num_queries, num_keys, has_mask = shape
    lengths = (num_queries, num_keys, num_keys)
    states = [torch.randn(views, n, heads, HEAD_DIM, dtype=torch.bfloat16, requires_grad=True) for n in lengths]
    mask = torch.rand(views, 1, num_queries, num_keys) > 0.3 if has_mask else None
    towards = torch.randn(views, num_queries, heads, HEAD_DIM, dtype=torch.bfloat16).transpose(1, 2)
    times = {name: [] for name in WAYS}
    for _ in range(repeats + 1):
        for name, attend in WAYS.items():
            start = time.process_time()
            torch.autograd.grad(attend(*(x.transpose(1, 2) for x in states), mask), states, towards)
            times[name].append(1000 * (time.process_time() - start))
    return {name: statistics.median(of_name[1:]) for name, of_name in times.items()}  # the first warms up


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--longest", type=int, default=1024, help="leaves out what has more keys")
    add_report_arguments(parser, plot=False)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as a run does
    print("views  heads  queries  keys   mask" + "".join(f"{name:>10}" for name in WAYS))
    result = []
    for shape in SHAPES:
        if shape[3] <= args.longest:
            result.append({"shape": shape, "milliseconds": measure(shape, args.repeats)})
            row = "{:5}  {:5}  {:7}  {:4}  {!s:5}".format(*shape)
            print(row + "".join(f"{ms:10.2f}" for ms in result[-1]["milliseconds"].values()))
    write_report(args, {"head_dim": HEAD_DIM, "shapes": result})


if __name__ == "__main__":
    main()
