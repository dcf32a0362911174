"""Documents a second of a frozen encoder: ours against BertModel and ModernBertModel of the same size.

    python benchmarks/encoder_throughput.py --output result.json

All read the same documents of mixed lengths. `padded`: batches in the order in which they come, padded to the longest
text, `model(input_ids, attention_mask)` with sdpa attention. `sorted`: the same of documents in the order of length.
`embed`: what `tjepa.embed` makes of the same documents (tokenized before): sorted, and packed without padding where
the encoder takes that. On the CPU times are CPU time of this process, which another one beside it does not lengthen
much; with `--device cuda` they are wall time until the device is done. The ways take turns, and ratios are medians
over turns. Token ids and weights are random: time does not depend on them. The MLP of ModernBERT, which has a gate, is
as much narrower as makes its parameters as many.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from reporting import add_report_arguments, write_report
from transformers import BertConfig, BertModel, ModernBertConfig, ModernBertModel, PreTrainedModel

from tjepa import TJEPAConfig, TJEPAModel
from tjepa.downstream.embedding import embed_tokens


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
VOCAB_SIZE = 30522


def make_models(args: argparse.Namespace, dtype: torch.dtype) -> dict[str, PreTrainedModel]:
    width = args.hidden_size
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": width,
        "num_hidden_layers": args.num_layers,
        "num_attention_heads": width // args.head_dim,
        "max_position_embeddings": args.max_length,
        "attn_implementation": "sdpa",
    }
    modern = {"intermediate_size": 8 * width // 3, "pad_token_id": 0}
    modern |= dict.fromkeys(("cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id"), 1)
    models = {
        "ours": TJEPAModel(TJEPAConfig(intermediate_size=4 * width, **sizes)),
        "BertModel": BertModel(BertConfig(intermediate_size=4 * width, **sizes), add_pooling_layer=False),
        "ModernBertModel": ModernBertModel(ModernBertConfig(**modern, **sizes)),
    }
    return {name: model.to(args.device, dtype).eval() for name, model in models.items()}


def draw_documents(num_documents: int, median_length: int, max_length: int) -> list[list[int]]:
    """Random token ids; lengths are log-normal, as those of texts are, and cut off."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(median_length), 0.8, num_documents).astype(int), 2, max_length)
    return [rng.integers(3, VOCAB_SIZE, length).tolist() for length in lengths]


@torch.inference_mode()
def run_padded(model: PreTrainedModel, documents: list[list[int]], batch_size: int) -> None:
    for start in range(0, len(documents), batch_size):
        rows = [torch.tensor(ids) for ids in documents[start : start + batch_size]]
        input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # [batch, length]
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        input_ids, mask = input_ids.to(model.device), mask.to(model.device)
        hidden = model(input_ids=input_ids, attention_mask=mask).last_hidden_state
        ((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)).float().cpu()


def seconds_of(run: Callable[[], object], device: str) -> float:
    """Both ways end with vectors on the CPU, so with a device that is done."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    run()
    return clock() - start


def measure(args: argparse.Namespace, dtype: str) -> dict:
    documents = draw_documents(args.num_documents, args.median_length, args.max_length)
    models = make_models(args, DTYPES[dtype])
    ways = {
        "padded": lambda model: run_padded(model, documents, args.batch_size),
        "sorted": lambda model: run_padded(model, sorted(documents, key=len), args.batch_size),
        "embed": lambda model: embed_tokens(model, documents, args.batch_size),
    }
    runs = {
        (way, name): lambda model=model, run=run: run(model)
        for way, run in ways.items()
        for name, model in models.items()
    }
    for run in runs.values():
        run()  # warm-up, which also finds out whether an encoder takes packed rows
    seconds = {key: [] for key in runs}
    for turn in range(args.repeats):
        for key, run in runs.items():
            seconds[key].append(seconds_of(run, args.device))
            speed = len(documents) / seconds[key][-1]
            print(f"{dtype}, turn {turn + 1}, {' '.join(key)}: {speed:.2f} documents/s", file=sys.stderr, flush=True)

    def over(numerator: tuple[str, str], denominator: tuple[str, str]) -> float:
        return statistics.median(a / b for a, b in zip(seconds[numerator], seconds[denominator], strict=True))

    ours, others = ("padded", "ours"), [("padded", name) for name in models if name != "ours"]
    fastest = min(others, key=lambda key: statistics.median(seconds[key]))
    return {
        "documents_per_second": {
            way: {name: len(documents) / statistics.median(seconds[way, name]) for name in models} for way in ways
        },
        "faster_other": fastest[1],
        "ours_over_faster_other": over(fastest, ours),
        "embed_over_padded": over(ours, ("embed", "ours")),
        "embed_over_sorted": over(("sorted", "ours"), ("embed", "ours")),
        "embed_over_faster_other": over(fastest, ("embed", "ours")),
        "seconds": {f"{way} {name}": values for (way, name), values in seconds.items()},
        "padding_share": padding_share(documents, args.batch_size),
    }


def padding_share(documents: list[list[int]], batch_size: int) -> float:
    batches = [documents[start : start + batch_size] for start in range(0, len(documents), batch_size)]
    places = sum(len(batch) * max(map(len, batch)) for batch in batches)
    return 1 - sum(map(len, documents)) / places


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hidden_size", type=int, default=384)
    parser.add_argument("--head_dim", type=int, default=32)
    parser.add_argument("--num_layers", type=int, default=6)
    parser.add_argument("--num_documents", type=int, default=128)
    parser.add_argument("--median_length", type=int, default=80, help="tokens")
    parser.add_argument("--max_length", type=int, default=512, help="tokens")
    parser.add_argument("--batch_size", type=int, default=32, help="documents of a batch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--num_threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    add_report_arguments(parser, plot=False)
    args = parser.parse_args()
    torch.set_num_threads(args.num_threads)
    result = {dtype: measure(args, dtype) for dtype in args.dtypes}
    for dtype, figures in result.items():
        print(
            f"\n{dtype}, documents/s{'':10}"
            + "".join(f"{name:>17}" for name in figures["documents_per_second"]["padded"])
        )
        for way, by_model in figures["documents_per_second"].items():
            print(f"  {way:24}" + "".join(f"{figure:17.2f}" for figure in by_model.values()))
        print(
            f"  ours over {figures['faster_other']}, padded: {figures['ours_over_faster_other']:.2f}; embed over it: "
            f"{figures['embed_over_faster_other']:.2f}; embed over ours padded: {figures['embed_over_padded']:.2f} "
            f"(padding {figures['padding_share']:.0%})"
        )
    write_report(args, result)


if __name__ == "__main__":
    main()
