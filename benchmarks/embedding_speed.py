"""Texts a second: `tjepa embed` beside sentence-transformers' own `encode`, with the same model, float32.

    python benchmarks/embedding_speed.py runs/quickstart-sentences --max_length 256

From texts to vectors, tokenizing included, without loading. Both ways in turns, each with its own batch size. Times
are CPU time of this process, which others beside it lengthen little. It stops if the vectors differ.
"""

import argparse
import statistics
import time

import numpy as np
import pyarrow
import torch
from datasets.utils import tqdm
from reporting import add_report_arguments, write_report
from sentence_transformers import SentenceTransformer

from tjepa.corpus.quickstart import load_quickstart_documents
from tjepa.downstream.embedding import load_embedder
from tjepa.tools.embed import embed_part, load_texts


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="a folder that sentence-transformers loads")
    parser.add_argument("--file", help="texts, as for `tjepa embed`; default: docstrings of installed libraries")
    parser.add_argument("--num_texts", type=int, default=2000)
    parser.add_argument("--max_length", type=int, help="tokens of a text that are read; default: as the model")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--num_threads", type=int, default=1)
    add_report_arguments(parser, plot=False)
    args = parser.parse_args()
    torch.set_num_threads(args.num_threads)
    documents = load_texts(args.file, "text") if args.file else load_quickstart_documents()["train"]
    theirs = SentenceTransformer(args.model, device="cpu")
    theirs.max_seq_length = args.max_length = args.max_length or theirs.max_seq_length
    ours = load_embedder(args.model, max_length=args.max_length)
    ours.model.cpu()
    # without those that name a special token, which `encode` may read as that token, and `tjepa embed` as text
    special = ours.tokenizer.all_special_tokens
    texts = [text for text in documents.shuffle(seed=0)["text"] if not any(token in text for token in special)]
    texts = texts[: args.num_texts]

    def embed() -> np.ndarray:
        table = embed_part(ours, pyarrow.array(range(len(texts))), texts, 64, tqdm(disable=True))
        return np.stack(table["embedding"].to_numpy())

    ways = {"embed": embed, "encode": lambda: theirs.encode(texts, show_progress_bar=False)}
    vectors = {name: way() for name, way in ways.items()}  # the warm-up
    difference = float(np.abs(vectors["embed"] - vectors["encode"]).max())
    if difference > 1e-4:
        raise SystemExit(f"The two do not compute the same: the vectors differ by {difference:.1e}.")
    seconds = {name: [] for name in ways}
    for _ in range(args.repeats):
        for name, way in ways.items():
            start = time.process_time()
            way()
            seconds[name].append(time.process_time() - start)
    lengths = [len(ids) for ids in ours.tokenize(texts)]
    pairs = [encode / embed for encode, embed in zip(seconds["encode"], seconds["embed"], strict=True)]
    result = {
        "texts_per_second": {name: len(texts) / statistics.median(times) for name, times in seconds.items()},
        "embed_over_encode": statistics.median(pairs),
        "spread": [min(pairs), max(pairs)],
        "difference": difference,
        "tokens": {"median": statistics.median(lengths), "mean": statistics.mean(lengths), "max": max(lengths)},
    }
    for name, figure in result["texts_per_second"].items():
        print(f"{name:8}{figure:10,.0f} texts/s")
    low, high = result["spread"]
    print(
        f"embed over encode: {result['embed_over_encode']:.2f} ({low:.2f} to {high:.2f}); tokens: {result['tokens']}"
    )
    write_report(args, result)


if __name__ == "__main__":
    main()
