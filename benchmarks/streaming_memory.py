"""Memory of the streaming pipeline (read, tokenize, split, shuffle, draw masks, pack) over a long run.

    python benchmarks/streaming_memory.py --minutes 60 --output result.json

Runs what a training process does before the model, as fast as it goes: a `DocumentStream` over files (endless: they
are read again with new masks), tokenized on the way, shuffled, collated with the seven UL2 strategies. The resident
memory of this process is noted after every batch of documents. `--minutes` are minutes of a training run that takes
`--tokens_per_second` document tokens, so a fast pipeline needs less time for them: what is measured is memory after
so many documents, not after so much time. `--files` copies of the corpus are made as compressed json lines, so that
reading, decompressing and changing files are part of it.
"""

import argparse
import gzip
import json
import resource
import tempfile
import time
from pathlib import Path

import datasets
import psutil
import torch
from reporting import add_data_arguments, add_report_arguments, write_report
from transformers import AutoTokenizer

from tjepa.corpus.documents import DataArguments, load_documents
from tjepa.corpus.streams import DocumentStream
from tjepa.corpus.tokenization import StreamTokenizer
from tjepa.data_collator_tjepa import DataCollatorForTJEPA


def write_files(args, folder: Path) -> None:
    """The corpus as `--files` files of compressed json lines."""
    texts = load_documents(DataArguments(train_file=str(args.train_file), validation_split_percentage=0))["train"]
    for number in range(args.files):
        with gzip.open(folder / f"{number:03}.jsonl.gz", "wt", compresslevel=1) as file:
            for text in texts.shard(args.files, number)["text"]:
                file.write(json.dumps({"text": text}) + "\n")


def measure(args, folder: Path) -> dict:
    data_args = DataArguments(
        train_file=str(folder / "*.jsonl.gz"),
        streaming=True,
        validation_split_percentage=0,
        max_length=args.max_length,
        long_documents="split",
    )
    tokenizer = StreamTokenizer(AutoTokenizer.from_pretrained(args.tokenizer), data_args)
    stream = DocumentStream(
        load_documents(data_args)["train"],
        transform=tokenizer,
        shuffle_buffer_size=args.shuffle_buffer_size,
        repeat=True,
    )
    stream.remember_positions(num_workers=0, documents_per_batch=args.batch_size, num_batches=4)
    loader = torch.utils.data.DataLoader(stream, args.batch_size, collate_fn=DataCollatorForTJEPA())
    goal = args.minutes * 60 * args.tokens_per_second
    rows, num_documents, num_tokens = [], 0, 0
    start_cpu, start = sum(resource.getrusage(resource.RUSAGE_SELF)[:2]), time.perf_counter()
    for batch in loader:
        num_documents += args.batch_size
        num_tokens += int((batch["document_ids"] >= 0).sum())
        if num_tokens >= goal * (len(rows) + 1) / args.points:
            rows.append(
                {
                    "minutes": num_tokens / args.tokens_per_second / 60,
                    "documents": num_documents,
                    "tokens": num_tokens,
                    "resident_megabytes": psutil.Process().memory_info().rss / 2**20,
                    "seconds": time.perf_counter() - start,
                    "cpu_seconds": sum(resource.getrusage(resource.RUSAGE_SELF)[:2]) - start_cpu,
                }
            )
            row = rows[-1]
            print(
                f"{row['minutes']:>8.1f} min{row['documents']:>12,} documents{row['tokens']:>15,} tokens"
                f"{row['resident_megabytes']:>9.1f} MB{row['cpu_seconds']:>9.0f} CPU s",
                flush=True,
            )
        if num_tokens >= goal:
            break
    sixth = min(rows, key=lambda row: abs(row["minutes"] - args.minutes / 6))
    return {
        "megabytes_after_a_sixth": sixth["resident_megabytes"],
        "megabytes_at_the_end": rows[-1]["resident_megabytes"],
        "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "tokens_per_cpu_second": rows[-1]["tokens"] / rows[-1]["cpu_seconds"],
        "counts": str(tokenizer.counts()),
        "arguments": {name: str(value) for name, value in vars(args).items()},
        "rows": rows,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=60, help="of a training run")
    parser.add_argument("--tokens_per_second", type=int, default=50_000, help="document tokens that it takes")
    parser.add_argument("--max_length", type=int, default=1024, help="tokens; longer documents are split")
    parser.add_argument("--batch_size", type=int, default=32, help="documents per batch")
    parser.add_argument("--shuffle_buffer_size", type=int, default=10_000, help="documents")
    parser.add_argument("--files", type=int, default=16, help="into which the corpus is divided")
    parser.add_argument("--points", type=int, default=60, help="measurements")
    add_data_arguments(parser)
    add_report_arguments(parser, plot=False)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
        write_files(args, Path(folder))
        result = measure(args, Path(folder))
    print(
        f"{result['megabytes_after_a_sixth']:.1f} MB after {args.minutes / 6:g} minutes' worth of documents, "
        f"{result['megabytes_at_the_end']:.1f} MB after {args.minutes:g}; "
        f"{result['tokens_per_cpu_second']:,.0f} tokens per CPU second"
    )
    write_report(args, result)


if __name__ == "__main__":
    main()
