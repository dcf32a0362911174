"""Which encoders of transformers can be pretrained, and how they are fed: measured on tiny random ones.

python benchmarks/encoder_families.py --output result.json

An encoder is fed packed rows where these give the same states as padded ones, up to rounding; `packed − padded` is the
largest difference, relative to the states' mean size.
"""

import argparse

import torch
from reporting import add_report_arguments, write_report
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.utils import logging

from tjepa.encoders_tjepa import build_encoder, measure_encoder


NUM_TOKENS, PADDING, PREFIX, SUFFIX, MASK = 120, 1, [2], [3], 4

SIZES = {
    "vocab_size": NUM_TOKENS,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 160,
    "initializer_range": 0.3,  # large, so that attention matters and a leak would show
    "pad_token_id": PADDING,
}
NARROW_EMBEDDING = {**SIZES, "embedding_size": 16}
T5 = {"vocab_size": NUM_TOKENS, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4}
XLM = {"vocab_size": NUM_TOKENS, "emb_dim": 32, "n_layers": 3, "n_heads": 4, "pad_index": 1, "pad_token_id": 1}
DEBERTA = {**SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}

COUNTS_FROM_PADDING = (
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "data2vec-text",
    "roberta-prelayernorm",
)
PACKED = {  # model type -> its configuration
    **dict.fromkeys(("bert", "ernie", "roc_bert", "layoutlm"), SIZES),
    **dict.fromkeys(("electra", "albert"), NARROW_EMBEDDING),
    "distilbert": {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 64, **SIZES},
    **dict.fromkeys(COUNTS_FROM_PADDING, SIZES),
    "gte": SIZES,
    "eurobert": {**SIZES, "num_key_value_heads": 2, "head_dim": 8},
    "jina_embeddings_v3": SIZES,
    "modernbert": {
        **SIZES,
        "local_attention": 16,
        "global_attn_every_n_layers": 3,
        "cls_token_id": 2,
        "sep_token_id": 3,
    },
    "nomic_bert": {**SIZES, "head_dim": 8},
}
PADDED = {
    "deberta": {**DEBERTA, "type_vocab_size": 0},
    "deberta-v2": {**DEBERTA, "position_buckets": 16, "norm_rel_ebd": "layer_norm", "share_att_key": True},
    **dict.fromkeys(("mpnet", "roformer", "megatron-bert", "ibert", "luke"), SIZES),
    **dict.fromkeys(("t5", "umt5"), T5),
    "xlnet": {"vocab_size": NUM_TOKENS, "d_model": 32, "n_layer": 3, "n_head": 4, "d_inner": 64},
    "longformer": {**SIZES, "attention_window": 16},
    **dict.fromkeys(("flaubert", "xlm"), XLM),
    "rembert": {**SIZES, "input_embedding_size": 16},
    "big_bird": {**SIZES, "attention_type": "original_full"},
}
T5_LIKE = ("t5", "umt5", "xlnet", "flaubert", "xlm")
REFUSED = {
    "fnet": SIZES,
    "convbert": NARROW_EMBEDDING,
    "nystromformer": SIZES,
    "yoso": SIZES,
    "gpt2": {"vocab_size": NUM_TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 160},
    "llama": SIZES,
}


def make_encoder(model_type: str, seed: int = 0) -> PreTrainedModel:
    """In float32, without dropout, with weights so large that states are of size 1."""
    config = CONFIG_MAPPING[model_type](**{**PACKED, **PADDED, **REFUSED}[model_type])
    for name in vars(config):
        if "dropout" in name and isinstance(getattr(config, name), float):
            setattr(config, name, 0.0)
    torch.manual_seed(seed)
    encoder = build_encoder(config).eval()
    if model_type in T5_LIKE:
        with torch.no_grad():
            for parameter in encoder.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=0.3)
    return encoder


def measure(model_type: str) -> dict:
    """One line of the table."""
    encoder = make_encoder(model_type)
    line = {"model_type": model_type, "class": type(encoder).__name__, "fed": "refused"}
    try:
        traits = measure_encoder(encoder, MASK)
    except ValueError as error:
        return {**line, "note": str(error).removeprefix(f"{line['class']} ").partition(":")[0]}
    note = "" if not traits.position_offset else f"positions + {traits.position_offset}"
    fed = "packed" if traits.is_packed else "padded"
    return {**line, "fed": fed, "difference": traits.difference if traits.is_packed else None, "note": note}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    add_report_arguments(parser, plot=False)
    args = parser.parse_args()
    logging.set_verbosity_error()
    lines = [measure(model_type) for model_type in (*PACKED, *PADDED, *REFUSED)]
    print("| model type | class | fed | packed − padded | |\n| --- | --- | --- | --- | --- |")
    for line in lines:
        difference = "" if line.get("difference") is None else f"{line['difference']:.0e}"
        print(f"| {line['model_type']} | {line['class']} | {line['fed']} | {difference} | {line['note']} |")
    write_report(args, lines)


if __name__ == "__main__":
    main()
