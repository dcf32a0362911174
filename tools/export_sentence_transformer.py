"""Makes a folder that sentence-transformers loads: encoder, mean over the tokens, whitening, unit length.

    tjepa export runs/quickstart runs/quickstart-sentences
    tjepa export runs/quickstart runs/quickstart-sentences --whitening_file my-texts.jsonl --whitening_dimensions 64

Notable: sentence-transformers is not needed to write the folder, only to use it. The tokenizer in it adds no special
tokens, because T-JEPA is trained without them, and has a padding token, because batches need one. The whitening is
fitted on --whitening_file, else on the documents that the run was trained on.
"""

import argparse
import contextlib
import copy
import io
import json
import logging
import warnings
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from ..corpus.atomic_writes import check_writable, holds_something, replacing_folder
from ..corpus.command_line import at_least_one, first_line, start
from ..corpus.documents import SourceArguments, load_documents
from ..corpus.files import load_files
from ..corpus.tokenizers import ensure_pad_token, load_tokenizer, longest_input, without_special_tokens
from ..downstream.before_after import held_out_texts
from ..downstream.embedding import as_text_only, read_sentence_modules
from ..downstream.whitening import fit_text_whitening
from ..training.loading import load_config, load_encoder
from ..training.model_folder import ONNX_FILES
from ..training.record import earlier_results
from ..training.setup import hide_what_loading_says


def check_onnx(way_out: str) -> None:
    """
    Raises:
        ImportError: if what makes ONNX graphs is not installed; `way_out` says how to do without.
    """
    if None in (find_spec("onnx"), find_spec("onnxscript")):
        raise ImportError(f'An ONNX graph needs onnx and onnxscript: pip install "tjepa[export]", or {way_out}.')


def export_sentence_transformer(
    model_name_or_path: str | Path,
    output_folder: str | Path,
    encoder: str = "target",
    max_length: int | None = None,
    normalize: bool = True,
    whitening_texts: Iterable[str | None] | None = None,
    whitening_dimensions: int | None = None,
    with_onnx: bool = False,
) -> int:
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
        with_onnx (`bool`, defaults to `False`): Whether to write `onnx/model.onnx` as well (`export_onnx`).

    Returns:
        `int`: The dimensions of a vector. Whitening leaves out those in which texts differ by rounding alone.

    Raises:
        FileExistsError: if the output folder holds files.
        FileNotFoundError: if the model is a path that is not there.
        ValueError: if the model is not a T-JEPA model, the tokenizer is not a fast one or cannot pad, or the texts are
            too few for a whitening; if the folder lacks weights.
    """
    output_folder = Path(output_folder)
    if with_onnx:
        check_onnx("leave out --onnx")
    if holds_something(output_folder):
        raise FileExistsError(f"{output_folder} is not an empty folder: choose another one, or empty it.")
    check_writable(output_folder, "")
    flag = "model_name_or_path"
    config = load_config(str(model_name_or_path), flag=flag)
    if config.model_type != "tjepa":
        raise ValueError(f"{model_name_or_path} is a {config.model_type} model; only T-JEPA models are exported here.")
    model = load_encoder(config, str(model_name_or_path), "auto", flag, encoder=encoder)
    tokenizer = load_tokenizer(str(model_name_or_path), flag)
    max_length = max_length or longest_input(tokenizer, model)

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
        if with_onnx:
            export_onnx(AutoModel.from_pretrained(folder, attn_implementation="eager"), folder / ONNX_FILES[0], folder)
    return model.config.hidden_size if whitening is None else len(whitening.weight)


class SentenceGraph(torch.nn.Module):
    """An encoder, and what makes one vector of a text's states, as an ONNX graph needs it."""

    def __init__(self, encoder: PreTrainedModel, pooling: Literal["mean", "first"], modules: list[torch.nn.Module]):
        super().__init__()
        self.encoder, self.pooling = encoder, pooling
        self.behind = torch.nn.Sequential(*modules)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        num_tokens = mask.sum(dim=1).clamp(min=1)  # of an empty text the mean is zero, as in sentence-transformers
        vectors = states[:, 0] if self.pooling == "first" else (states * mask).sum(dim=1) / num_tokens
        return states, self.behind(vectors)


def export_onnx(encoder: PreTrainedModel, path: Path, sentence_folder: Path | None = None) -> None:
    """
    Writes an encoder as an ONNX graph. Inputs: `input_ids` and `attention_mask`, int64 `[batch, length]`. Outputs:
    `last_hidden_state`, float32 `[batch, length, hidden_size]`, and `sentence_embedding`, float32 `[batch, width]`.
    Batch and length are free.

    Args:
        encoder: with `attn_implementation="eager"`. The graph is in float32, whatever the encoder is in.
        path: the file to write.
        sentence_folder: where the modules of sentence-transformers lie that make a vector of the states (pooling,
            whitening, length 1). Default: the vector is the mean over the tokens.

    Raises:
        ValueError: if torch can make no graph of this encoder.
    """
    pooling, modules = "mean", []
    if sentence_folder is not None:
        pooling, modules, _ = read_sentence_modules(sentence_folder)
    if encoder.dtype != torch.float32:  # 16 bits in some nodes and 32 in others make no graph
        encoder = copy.deepcopy(encoder).float()
    names = ("input_ids", "attention_mask")
    tokens = torch.arange(5, 15).view(2, 5) % encoder.config.vocab_size
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # that torchvision is missing, say
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():  # it tells its progress
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                SentenceGraph(encoder, pooling, modules).eval(),
                (tokens, torch.ones_like(tokens)),
                dynamo=True,
                dynamic_shapes=dict.fromkeys(names, {0: "batch", 1: "length"}),
                input_names=list(names),
                output_names=["last_hidden_state", "sentence_embedding"],
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise ValueError(
                f"torch makes no ONNX graph of {type(encoder).__name__} ({first_line(error)}): leave the graph out."
            ) from error
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # the lines of code that it came from, with the paths of this machine
    path.parent.mkdir(parents=True, exist_ok=True)
    program.save(path)


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
        documents = load_files("--whitening_file", whitening_file, text_column_name=text_column_name)
        yield from documents.shuffle(seed=0)[text_column_name]
        return
    flag = "Pass --whitening_file with texts such as you will embed, or --no_whitening."
    folder = Path(model_name_or_path)
    source = earlier_results(folder).get("source") or earlier_results(folder.parent).get("source")  # of a checkpoint
    if source is None:
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
    parser.add_argument("--text_column_name", help="the column of --whitening_file that holds texts; default: text")
    parser.add_argument("--whitening_dimensions", type=int, help="how many the embeddings have; default: all")
    parser.add_argument("--no_whitening", action="store_true", help="leave the mean over the tokens as it is")


def whitening_texts(args: argparse.Namespace, model_name_or_path: str) -> Iterator[str | None] | None:
    """
    What those flags ask for.

    Raises:
        ValueError: if they contradict each other.
    """
    if args.text_column_name is not None and args.whitening_file is None:
        raise ValueError(f"--text_column_name {args.text_column_name} is a column of --whitening_file: leave it out.")
    if not args.no_whitening:
        return read_whitening_texts(model_name_or_path, args.whitening_file, args.text_column_name or "text")
    if args.whitening_file is not None or args.whitening_dimensions is not None:
        raise ValueError("--no_whitening has no use for --whitening_file and --whitening_dimensions: leave them out.")
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("model_name_or_path", help="T-JEPA folder or Hub name")
    parser.add_argument("output_folder", type=Path, help="the folder to write; new or empty")
    parser.add_argument("--encoder", choices=("target", "context"), default="target", help="of a pretraining folder")
    parser.add_argument("--max_length", type=at_least_one, help="tokens of a text that are read")
    add_whitening_flags(parser)
    parser.add_argument("--onnx", action="store_true", help="write onnx/model.onnx as well, for ONNX Runtime")
    parser.add_argument("--no_normalize", action="store_true", help="leave the embeddings' length as it is")
    args = parser.parse_args()
    hide_what_loading_says()
    width = export_sentence_transformer(
        args.model_name_or_path,
        args.output_folder,
        args.encoder,
        args.max_length,
        not args.no_normalize,
        whitening_texts(args, args.model_name_or_path),
        args.whitening_dimensions,
        args.onnx,
    )
    print(
        f"Wrote {args.output_folder}, for vectors of {width} dimensions: "
        f"SentenceTransformer({str(args.output_folder)!r}, trust_remote_code=True)"
    )


if __name__ == "__main__":
    start(main)
