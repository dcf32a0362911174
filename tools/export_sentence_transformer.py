"""Makes a folder that sentence-transformers loads: encoder, mean over the tokens, unit length.

    tjepa export runs/quickstart runs/quickstart-sentences

Notable: sentence-transformers is not needed to write the folder, only to use it. The tokenizer in it adds no special
tokens, because T-JEPA is trained without them, and has a padding token, because batches need one.
"""

import argparse
import json
from pathlib import Path

from transformers import AutoModel, PreTrainedTokenizerBase

from ..corpus.command_line import start
from ..corpus.tokenizers import ensure_pad_token, load_tokenizer, without_special_tokens
from ..downstream.embedding import as_text_only
from ..training.loading import load_config


def export_sentence_transformer(
    model_name_or_path: str | Path,
    output_folder: str | Path,
    encoder: str = "target",
    max_length: int | None = None,
    normalize: bool = True,
) -> None:
    """
    Writes the encoder and the modules around it: `SentenceTransformer(output_folder, trust_remote_code=True)` encodes
    a text as the mean of the last hidden state over its tokens, as the probes do. After `import tjepa` it loads
    without `trust_remote_code`. The folder is an encoder folder for `AutoModel`, too.

    Args:
        model_name_or_path (`str` or `Path`): A folder or Hub name of a T-JEPA model, its tokenizer included.
        output_folder (`str` or `Path`): The folder to write; must not exist yet, or be empty.
        encoder (`str`, defaults to `"target"`): Which encoder of a pretraining folder, `"target"` or `"context"`.
        max_length (`int`, *optional*):
            Tokens of a text that are read. Default: the smaller of what tokenizer and model are made for.
        normalize (`bool`, defaults to `True`): Whether embeddings are scaled to length 1.

    Raises:
        FileExistsError: if the output folder holds files.
        FileNotFoundError: if the model is a path that is not there.
        ValueError: if the model is not a T-JEPA model, or the tokenizer is not a fast one or cannot pad.
    """
    output_folder = Path(output_folder)
    if output_folder.exists() and any(output_folder.iterdir()):
        raise FileExistsError(f"{output_folder} holds files already: choose another folder, or empty it.")
    flag = "model_name_or_path"
    model_type = load_config(str(model_name_or_path), flag=flag).model_type
    if model_type != "tjepa":
        raise ValueError(f"{model_name_or_path} is a {model_type} model; only T-JEPA models are exported here.")
    model = AutoModel.from_pretrained(model_name_or_path, encoder=encoder)
    tokenizer = load_tokenizer(str(model_name_or_path), flag)
    max_length = max_length or min(tokenizer.model_max_length, model.config.max_position_embeddings)

    model.save_pretrained(output_folder)
    sentence_tokenizer(tokenizer, max_length).save_pretrained(output_folder)
    # The names that modules and options have had since sentence-transformers 2: newer versions read them as well.
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")][: 3 if normalize else 2]
    files = {
        "modules.json": [
            {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{module}"}
            for index, (path, module) in enumerate(modules)
        ],
        "sentence_bert_config.json": {"max_seq_length": max_length, "do_lower_case": False},
        "1_Pooling/config.json": {
            "word_embedding_dimension": model.config.hidden_size,
            "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": True,
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
        },
        **({"2_Normalize/config.json": {}} if normalize else {}),
        "config_sentence_transformers.json": {"prompts": {}, "similarity_fn_name": "cosine"},
    }
    for name, content in files.items():
        path = output_folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def sentence_tokenizer(tokenizer: PreTrainedTokenizerBase, max_length: int) -> PreTrainedTokenizerBase:
    """The tokenizer with nothing added to a text and nothing special read in one, and with a token to pad with."""
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer, and only those are written here.")
    tokenizer = as_text_only(without_special_tokens(tokenizer))
    ensure_pad_token(tokenizer)
    tokenizer.model_max_length = max_length
    return tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("model_name_or_path", help="T-JEPA folder or Hub name")
    parser.add_argument("output_folder", type=Path)
    parser.add_argument("--encoder", choices=("target", "context"), default="target", help="of a pretraining folder")
    parser.add_argument("--max_length", type=int, help="tokens of a text that are read")
    parser.add_argument("--no_normalize", action="store_true", help="leave the embeddings' length as it is")
    args = parser.parse_args()
    export_sentence_transformer(
        args.model_name_or_path, args.output_folder, args.encoder, args.max_length, not args.no_normalize
    )
    print(f"Wrote {args.output_folder}: SentenceTransformer({str(args.output_folder)!r}, trust_remote_code=True)")


if __name__ == "__main__":
    start(main)
