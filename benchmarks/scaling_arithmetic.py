"""Days and cost of one pass over a corpus, calculated: nothing is timed here.

    python benchmarks/scaling_arithmetic.py --gpu H100 --utilisation 0.4
    python benchmarks/scaling_arithmetic.py --gpu A100 --views_per_document 2 --token_prediction

FLOPs per document token are the useful ones (flops.py) for documents of a fixed length, with masks really drawn;
`--token_prediction` adds its head. Tokens/s = utilisation x peak / FLOPs. What is assumed, and nothing else decides
the outcome: the GPU's peak (its maker's figure for dense bfloat16), its price, the utilisation, that processes scale
without loss, and the corpora's token counts (their papers and dataset cards; other tokenizers count differently).
"""

import argparse

import numpy as np
from flops import useful_flops
from reporting import add_report_arguments, write_report

from tjepa import TJEPAConfig
from tjepa.data_collator_tjepa import MASKING_PRESETS, draw_views, hash_keys, pack_batch


# peak dense bfloat16 FLOP/s from the maker's data sheet, and an assumed price in dollars per hour
GPUS = {"RTX4090": (165e12, 0.5), "A100": (312e12, 1.5), "H100": (989e12, 2.5)}
# Tokens, and tokens per sequence. TinyStories: 2.12 million stories (card of roneneldan/TinyStories) of 209 tokens,
# the mean of 7,123 of them with LLaMA's tokenizer. MiniPile: arXiv 2304.08442. SlimPajama: its dataset card.
CORPORA = {"TinyStories": (0.44e9, 209), "MiniPile": (1.5e9, 1024), "SlimPajama": (627e9, 1024)}
MODELS = {
    "reference": {},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
}


def flops_per_token(model: str, length: int, args) -> float:
    """Training FLOPs per document token."""
    sizes = MODELS[model]
    layers = sizes.get("num_hidden_layers", TJEPAConfig().num_hidden_layers)
    config = TJEPAConfig(**sizes, predictor_num_hidden_layers=min(layers, args.max_predictor_layers))
    documents = [np.zeros(length, dtype=np.int64)] * 64
    keys = hash_keys(0, np.arange(len(documents)))
    views = draw_views(documents, keys, MASKING_PRESETS["ul2"], views_per_document=args.views_per_document)
    flops = useful_flops(config, pack_batch(documents, views, len(MASKING_PRESETS["ul2"])))
    if args.token_prediction:
        flops += 6 * len(views.slot_token) * config.hidden_size * (config.hidden_size + config.vocab_size)
    return flops / (length * len(documents))


def calculate(args) -> list[dict]:
    peak, price = GPUS[args.gpu]
    rows = []
    for corpus, (num_tokens, length) in CORPORA.items():
        for model in MODELS:
            flops = flops_per_token(model, length, args)
            tokens_per_second = args.utilisation * peak / flops
            gpu_hours = num_tokens / tokens_per_second / 3600
            rows.append(
                {
                    "corpus": corpus,
                    "model": model,
                    "gigaflops_per_token": flops / 1e9,
                    "tokens_per_second": tokens_per_second,
                    "gpu_hours": gpu_hours,
                    "days": gpu_hours / 24 / args.num_gpus,
                    "dollars": gpu_hours * (args.dollars_per_hour or price),
                }
            )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gpu", choices=GPUS, default="H100")
    parser.add_argument("--num_gpus", type=int, default=8)
    parser.add_argument("--utilisation", type=float, default=0.4, help="share of the peak that useful FLOPs get")
    parser.add_argument("--dollars_per_hour", type=float, help="of one GPU. Default: the one assumed in this file.")
    parser.add_argument("--views_per_document", type=int, help="strategies per document. Default: all seven.")
    parser.add_argument(
        "--max_predictor_layers", type=int, default=12, help="a predictor is as deep as its encoder to this"
    )
    parser.add_argument("--token_prediction", action="store_true", help="with the token prediction head")
    add_report_arguments(parser, plot=False)
    args = parser.parse_args()
    rows = calculate(args)
    header = [
        "corpus",
        "model",
        "GFLOP/token",
        f"tokens/s per {args.gpu}",
        "GPU hours",
        f"days on {args.num_gpus}",
        "$",
    ]
    formats = ["", "", ".2f", ",.0f", ",.1f", ".2f", ",.0f"]
    print(f"| {' | '.join(header)} |\n|{' --- |' * len(header)}")
    for row in rows:
        print("| " + " | ".join(format(value, form) for value, form in zip(row.values(), formats, strict=True)) + " |")
    write_report(args, rows)


if __name__ == "__main__":
    main()
