"""Document tokens per second of the collator alone, on one core, seven strategies, ours against the plain one.

python benchmarks/collator_throughput.py --output result.json
"""

import argparse
import statistics
import time

import numpy as np
import torch
from plain_reference import plain_batch
from pretraining_throughput import read_documents
from reporting import add_data_arguments, add_report_arguments, write_report

from tjepa.data_collator_tjepa import MASKING_PRESETS, DataCollatorForTJEPA, draw_views, hash_keys


LENGTHS = (256, 1024)


def tokens_per_second(collate, documents: list[np.ndarray], repeats: int) -> float:
    collate()  # warm-up
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        collate()
        seconds.append(time.perf_counter() - start)
    return sum(len(document) for document in documents) / statistics.median(seconds)


def measure(args) -> dict:
    result = {}
    for args.max_length in LENGTHS:
        documents = read_documents(args)
        examples = [
            {"input_ids": document, "document_index": index, "epoch": 0} for index, document in enumerate(documents)
        ]
        collator, strategies = DataCollatorForTJEPA(), MASKING_PRESETS["ul2"]
        keys = hash_keys(0, np.arange(len(documents)))

        def ours(collator=collator, examples=examples):
            return collator(examples)

        def plain(documents=documents, keys=keys, strategies=strategies):
            return plain_batch(documents, draw_views(documents, keys, strategies), len(strategies))

        figures = {
            "ours": tokens_per_second(ours, documents, args.repeats),
            "plain": tokens_per_second(plain, documents, max(1, args.repeats // 5)),
        }
        result[str(args.max_length)] = {**figures, "ratio": figures["ours"] / figures["plain"]}
        print(f"maximum length {args.max_length}: {figures['ours']:,.0f} tokens/s, plain {figures['plain']:,.0f}")
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num_documents", type=int, default=32, help="documents per batch")
    parser.add_argument("--repeats", type=int, default=20)
    add_data_arguments(parser)
    add_report_arguments(parser, plot=False)
    args = parser.parse_args()
    args.model = "reference"
    torch.set_num_threads(1)
    result = measure(args)
    write_report(args, result)


if __name__ == "__main__":
    main()
