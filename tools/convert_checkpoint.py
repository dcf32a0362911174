"""Turns a run folder of the original T-JEPA code into one of our model folders, every tensor accounted for.

    tjepa convert REFERENCE_FOLDER OUTPUT_FOLDER

The reference folder holds `context_encoder.pt`, `target_encoder.pt`, `predictor.pt` (state dicts), their configs
`encoder_config.json` and `predictor_config.json`, and, if it was kept, `target_masking_strategies.json`, which becomes
`masking_strategies.json` in our words.
"""

import argparse
import json
import re
from pathlib import Path

import torch

from ..configuration_tjepa import TJEPAConfig
from ..corpus.atomic_writes import holds_something, replacing_folder
from ..corpus.command_line import start
from ..modeling_tjepa import TJEPAForPreTraining
from ..training.model_folder import STRATEGIES_FILE


TENSOR_NAMES = [  # reference -> ours, applied in this order
    (r"^transformer\.", ""),
    (r"^wte\.", "token_embedding."),
    (r"^h\.", "layers."),
    (r"\.ln_1\.", ".attention_norm."),
    (r"\.ln_2\.", ".mlp_norm."),
    (r"\.attn\.c_attn\.", ".attention.qkv_proj."),
    (r"\.attn\.c_proj\.", ".attention.out_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.up_proj."),
    (r"\.mlp\.c_proj\.", ".mlp.down_proj."),
    (r"^ln_f\.", "final_norm."),
    (r"^mask_embedding$", "mask_token"),
]
STRATEGY_KEYS = {
    "target_block_size": "target_block_size_mean",
    "target_max_mask_ratio": "max_target_mask_ratio",
    "target_block_max_num": "target_block_num",
    "target_mask_start_ratio": "max_target_mask_start_ratio",
    "context_max_mask_ratio": "max_context_ratio",
}


def convert_config(encoder: dict, predictor: dict) -> TJEPAConfig:
    """Our config from the reference's `encoder_config.json` and `predictor_config.json`."""
    if predictor["ext_n_embd"] != encoder["n_embd"]:
        raise ValueError(
            f"The predictor takes representations of width {predictor['ext_n_embd']} (ext_n_embd), the encoder gives "
            f"{encoder['n_embd']} (n_embd): these two configs do not belong together."
        )
    for key in ("dropout", "bias"):
        if predictor[key] != encoder[key]:
            raise ValueError(
                f"Encoder and predictor must agree on {key}, which TJEPAConfig has only once; got {encoder[key]} and "
                f"{predictor[key]}."
            )
    return TJEPAConfig(
        vocab_size=encoder["vocab_size"],
        max_position_embeddings=encoder["block_size"],
        hidden_size=encoder["n_embd"],
        num_hidden_layers=encoder["n_layer"],
        num_attention_heads=encoder["n_head"],
        rotary_dim=encoder["rotary_n_embd"],
        use_bias=encoder["bias"],
        hidden_dropout_prob=encoder["dropout"],
        attention_probs_dropout_prob=encoder["dropout"],
        predictor_hidden_size=predictor["n_embd"],
        predictor_num_hidden_layers=predictor["n_layer"],
        predictor_num_attention_heads=predictor["n_head"],
        predictor_rotary_dim=predictor["rotary_n_embd"],
        learned_mask_token=predictor["trainable_mask_emb"],
    )


def convert_state_dict(state_dict: dict[str, torch.Tensor], prefix: str, rotary_dim: int) -> dict[str, torch.Tensor]:
    """
    The tensors of one reference file under our names, behind `prefix`.

    Raises:
        ValueError: if its rotary frequencies are not those that our model computes.
    """
    converted = {}
    for name, tensor in state_dict.items():
        if name == "rotary_embedding.freqs":  # computed, not stored, in our model: theta 10000
            expected = 10000.0 ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)
            if not torch.allclose(tensor.float(), expected, rtol=1e-5, atol=0):
                raise ValueError(f"{prefix}{name} holds other frequencies than theta 10000 gives: not supported.")
            continue
        for pattern, replacement in TENSOR_NAMES:
            name = re.sub(pattern, replacement, name)
        converted[prefix + name] = tensor
    return converted


def convert_strategies(strategies: list[dict]) -> list[dict]:
    """
    A reference strategy list in our words.

    Raises:
        ValueError: for a key that the reference did not have (it ignored those silently).
    """
    for strategy in strategies:
        if unknown := set(strategy) - set(STRATEGY_KEYS):
            raise ValueError(f"Unknown strategy keys {sorted(unknown)}; the reference's are {sorted(STRATEGY_KEYS)}.")
    return [{STRATEGY_KEYS[key]: value for key, value in strategy.items()} for strategy in strategies]


def convert_checkpoint(reference_folder: str | Path, output_folder: str | Path) -> TJEPAForPreTraining:
    """
    Reads a reference folder (tensors with `weights_only=True`), writes ours, and returns the model.

    Raises:
        FileExistsError: if the output folder holds files.
        FileNotFoundError: naming the files that the folder lacks.
        ValueError: naming every tensor that is missing, left over or of another shape; for unknown strategies.
    """
    reference_folder, output_folder = Path(reference_folder), Path(output_folder)
    if holds_something(output_folder):
        raise FileExistsError(f"{output_folder} is not an empty folder: choose another one, or empty it.")
    parts = ("context_encoder", "target_encoder", "predictor")
    needed = [f"{part}.pt" for part in parts] + ["encoder_config.json", "predictor_config.json"]
    if missing := [name for name in needed if not (reference_folder / name).is_file()]:
        raise FileNotFoundError(f"{reference_folder} is not a reference run: it lacks {', '.join(missing)}.")

    encoder_config, predictor_config = (
        json.loads((reference_folder / f"{part}_config.json").read_text()) for part in ("encoder", "predictor")
    )
    config = convert_config(encoder_config, predictor_config)
    state_dict = {}
    for part in parts:
        tensors = torch.load(reference_folder / f"{part}.pt", weights_only=True, map_location="cpu")
        rotary_dim = config.predictor_rotary_dim if part == "predictor" else config.rotary_dim
        state_dict.update(convert_state_dict(tensors, f"{part}.", rotary_dim))

    model = TJEPAForPreTraining(config)
    if not config.learned_mask_token:  # fixed by definition, so ours does not store it
        state_dict.pop("predictor.mask_token", None)
    try:
        model.load_state_dict(state_dict, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{reference_folder}: {error}") from error
    strategy_file = reference_folder / "target_masking_strategies.json"
    with replacing_folder(output_folder) as folder:
        if strategy_file.is_file():
            strategies = convert_strategies(json.loads(strategy_file.read_text()))
            (folder / STRATEGIES_FILE).write_text(json.dumps(strategies, indent=2) + "\n")
        model.save_pretrained(folder)
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("reference_folder", type=Path, help="of the original code: three .pt files and their configs")
    parser.add_argument("output_folder", type=Path, help="the folder to write")
    args = parser.parse_args()
    model = convert_checkpoint(args.reference_folder, args.output_folder)
    print(f"Wrote {args.output_folder}: {model.num_parameters():,} parameters, all tensors accounted for.")


if __name__ == "__main__":
    start(main)
