"""Makes a folder that sentence-transformers loads: encoder, mean over the tokens, whitening, unit length.

    tjepa export runs/quickstart runs/quickstart-sentences
    tjepa export runs/quickstart runs/quickstart-sentences --whitening_file my-texts.jsonl --whitening_dimensions 64

Notable: sentence-transformers is not needed to write the folder, only to use it. The tokenizer in it adds no special
tokens, because T-JEPA is trained without them, and has a padding token, because batches need one. The whitening is
fitted on --whitening_file, else on the documents that the run was trained on.
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoModel, PreTrainedTokenizerBase

from ..corpus.atomic_writes import replacing_folder
from ..corpus.command_line import start
from ..corpus.documents import SourceArguments, load_documents
from ..corpus.files import load_files
from ..corpus.tokenizers import ensure_pad_token, load_tokenizer, without_special_tokens
from ..downstream.before_after import held_out_texts
from ..downstream.embedding import as_text_only
from ..downstream.whitening import fit_text_whitening
from ..training.loading import load_config


def export_sentence_transformer(
    model_name_or_path: str | Path,
    output_folder: str | Path,
    encoder: str = "target",
    max_length: int | None = None,
    normalize: bool = True,
    whitening_texts: Iterable[str | None] | None = None,
    whitening_dimensions: int | None = None,
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
        whitening_texts (iterable of `str`, *optional*):
            Texts such as will be embedded, to fit a whitening on, which makes cosines tell texts apart
            (`fit_text_whitening`). Default: embeddings are not whitened.
        whitening_dimensions (`int`, *optional*): How many dimensions the whitening keeps. Default: all.

    Raises:
        FileExistsError: if the output folder holds files.
        FileNotFoundError: if the model is a path that is not there.
        ValueError: if the model is not a T-JEPA model, the tokenizer is not a fast one or cannot pad, or the texts are
            too few for a whitening.
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

    whitening = None
    if whitening_texts is not None:
        whitening = fit_text_whitening(model, tokenizer, whitening_texts, max_length, whitening_dimensions)
    # The names that modules and options have had since sentence-transformers 2: newer versions read them as well.
    kinds = ["Transformer", "Pooling"] + ["Dense"] * (whitening is not None) + ["Normalize"] * normalize
    paths = [f"{index}_{kind}" if index else "" for index, kind in enumerate(kinds)]
    files = {
        "modules.json": [
            {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for index, (path, kind) in enumerate(zip(paths, kinds, strict=True))
        ],
        "sentence_bert_config.json": {"max_seq_length": max_length, "do_lower_case": False},
        "1_Pooling/config.json": {
            "word_embedding_dimension": model.config.hidden_size,
            "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": True,
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
        },
        **({f"{paths[-1]}/config.json": {}} if normalize else {}),
        "config_sentence_transformers.json": {"prompts": {}, "similarity_fn_name": "cosine"},
    }
    if whitening is not None:
        files["2_Dense/config.json"] = {
            "in_features": whitening.weight.shape[1],
            "out_features": whitening.weight.shape[0],
            "bias": True,
            "activation_function": "torch.nn.modules.linear.Identity",
        }
    with replacing_folder(output_folder) as folder:
        model.save_pretrained(folder)
        sentence_tokenizer(tokenizer, max_length).save_pretrained(folder)
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if whitening is not None:
            weights = {"linear.weight": whitening.weight.contiguous(), "linear.bias": whitening.bias}
            save_file(weights, folder / "2_Dense" / "model.safetensors", metadata={"format": "pt"})


def sentence_tokenizer(tokenizer: PreTrainedTokenizerBase, max_length: int) -> PreTrainedTokenizerBase:
    """The tokenizer with nothing added to a text and nothing special read in one, and with a token to pad with."""
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer, and only those are written here.")
    tokenizer = as_text_only(without_special_tokens(tokenizer))
    ensure_pad_token(tokenizer)
    tokenizer.model_max_length = max_length
    return tokenizer


def read_whitening_texts(
    model_name_or_path: str, whitening_file: str | None, text_column_name: str = "text"
) -> Iterator[str | None]:
    """
    Texts to fit a whitening on: those of a file, else the documents that a run was trained on, in random order.

    Raises:
        FileNotFoundError, ValueError: if there are none; the message names the flag.
    """
    if whitening_file is not None:
        documents = load_files("whitening_file", whitening_file, text_column_name=text_column_name)
        yield from documents.shuffle(seed=0)[text_column_name]
        return
    flag = "Pass --whitening_file with texts such as you will embed, or --no_whitening."
    folder = Path(model_name_or_path)
    for path in (folder / "all_results.json", folder.parent / "all_results.json"):  # of a checkpoint
        source = json.loads(path.read_text()).get("source") if path.is_file() else None
        if source is not None:
            break
    else:
        raise ValueError(f"{model_name_or_path} does not say which texts it was trained on. {flag}")
    args = SourceArguments(**source)
    try:
        documents = load_documents(args)["train"]
    except (OSError, ValueError) as error:
        raise ValueError(f"The texts that {folder} was trained on cannot be read ({error}). {flag}") from error
    if isinstance(documents, Dataset):
        documents = documents.shuffle(seed=0)
    tokenizer = load_tokenizer(model_name_or_path, "model_name_or_path")  # for rows that were tokenized before
    yield from held_out_texts(documents, args.text_column_name, tokenizer)


def add_whitening_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--whitening_file",
        help="texts such as will be embedded, to fit the whitening on (parquet, json, jsonl, csv, tsv, txt); default: "
        "what the run was trained on",
    )
    parser.add_argument("--text_column_name", default="text", help="the column of --whitening_file that holds texts")
    parser.add_argument("--whitening_dimensions", type=int, help="how many the embeddings have; default: all")
    parser.add_argument("--no_whitening", action="store_true", help="leave the mean over the tokens as it is")


def whitening_texts(args: argparse.Namespace, model_name_or_path: str) -> Iterator[str | None] | None:
    """
    What those flags ask for.

    Raises:
        ValueError: if they contradict each other.
    """
    if not args.no_whitening:
        return read_whitening_texts(model_name_or_path, args.whitening_file, args.text_column_name)
    if args.whitening_file is not None or args.whitening_dimensions is not None:
        raise ValueError("--no_whitening has no use for --whitening_file and --whitening_dimensions: leave them out.")
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("model_name_or_path", help="T-JEPA folder or Hub name")
    parser.add_argument("output_folder", type=Path)
    parser.add_argument("--encoder", choices=("target", "context"), default="target", help="of a pretraining folder")
    parser.add_argument("--max_length", type=int, help="tokens of a text that are read")
    add_whitening_flags(parser)
    parser.add_argument("--no_normalize", action="store_true", help="leave the embeddings' length as it is")
    args = parser.parse_args()
    export_sentence_transformer(
        args.model_name_or_path,
        args.output_folder,
        args.encoder,
        args.max_length,
        not args.no_normalize,
        whitening_texts(args, args.model_name_or_path),
        args.whitening_dimensions,
    )
    print(f"Wrote {args.output_folder}: SentenceTransformer({str(args.output_folder)!r}, trust_remote_code=True)")


if __name__ == "__main__":
    start(main)
