"""Texts and words to vectors, as a frozen encoder has them: the mean over a text's tokens, a word's first token.

Notable: on a CPU nothing is padded where an encoder takes packed rows, texts one behind the other (ours, and of
transformers' those in which that is measured to give the same states). Others, and all encoders on a GPU, get texts of
like length in padded batches.
"""

import copy
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BatchEncoding, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..corpus.faults import DROP_REASONS, EMPTY, find_fault
from ..corpus.private import get_attention
from ..corpus.tokenizers import load_tokenizer, longest_input, text_reader
from ..encoders_tjepa import encode, measure_packing
from ..layers_tjepa import PACKED_ATTENTION, VARLEN_ATTENTION
from ..modeling_tjepa import TJEPAModel
from ..training.loading import load_config, load_encoder
from ..training.model_folder import find_sentence_modules
from ..training.setup import default_device


logger = logging.getLogger(__name__)

MAX_DEFAULT_LENGTH = 512  # tokens


# --- Texts to vectors, from a folder ---------------------------------------------------------------------------------


def embed(
    model: str | Path | PreTrainedModel,
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
    batch_size: int = 64,
) -> Tensor:
    """
    One vector per text: the mean of the encoder's last hidden state over the text's tokens, and what the modules of
    sentence-transformers beside it make of that, where there are some (pooling, whitening, length 1).

    Args:
        model: the folder of an encoder or its name on the Hub (T-JEPA's or any other of transformers), or a model that
            is loaded already; of T-JEPA's pretraining folders it is the target encoder.
        texts: sequence of `num_texts` strings, none of them empty.
        tokenizer: default: the one that lies beside the model.
        max_length: tokens of a text that are read. Default: what the modules of sentence-transformers say; without
            them what the model is made for, at most 512.
        batch_size: texts per forward.

    Returns:
        float32 `[num_texts, width]` on the CPU, in the order of `texts`; the width is the encoder's `hidden_size`, or
        what the modules make of it. A folder runs on the GPU if there is one, a loaded model where it is.

    Raises:
        FileNotFoundError: if the model is a path that is not there.
        ValueError: for a folder without model or tokenizer, or with a module that is not computed here; for no texts,
            an empty one or one that is no string, and for one string in place of several.
    """
    if isinstance(texts, str):
        raise ValueError("embed takes a list of texts, got one string: each of its characters would be a text.")
    if not isinstance(model, (str, Path, PreTrainedModel)):
        raise ValueError(f"embed takes a folder, a name on the Hub or a model of transformers, got a {type(model)}.")
    for name, value in (("max_length", max_length), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    texts = list(texts)
    for number, text in enumerate(texts):
        if (fault := find_fault(text)) not in (None, EMPTY):  # a tokenizer may have a token for white space
            raise ValueError(f"Text {number} of {len(texts)} is {DROP_REASONS[fault]}: {text!r}. Leave it out.")
    return load_embedder(model, tokenizer, max_length)(texts, batch_size)


@dataclass
class Embedder:
    """A text encoder with all that makes one vector of a text; `load_embedder` makes it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    pooling: Literal["mean", "first"] = "mean"
    modules: list[nn.Module] = field(default_factory=list)  # of sentence-transformers, behind the pooling

    def __call__(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """`num_texts` strings, none of them empty -> float32 `[num_texts, width]` on the CPU."""
        encoded = self.tokenize(texts)
        check_tokens(texts, encoded)
        return self.embed_tokens(encoded, batch_size)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        return encode_texts(self.model, self.tokenizer, list(texts), self.max_length)["input_ids"]

    @torch.no_grad()
    def embed_tokens(self, encoded: Sequence[list[int]], batch_size: int = 64) -> Tensor:
        """What `tokenize` made of texts, without those that have no token."""
        vectors = embed_tokens(self.model, encoded, batch_size, self.pooling)
        for module in self.modules:
            vectors = module(vectors)
        return vectors

    @property
    def width(self) -> int:
        """Dimensions of a vector."""
        widths = [module.out_features for module in self.modules if hasattr(module, "out_features")]
        return widths[-1] if widths else self.model.config.hidden_size


def load_embedder(
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
    dtype: torch.dtype = torch.float32,
    flag: str = "--model_name_or_path",
    **for_hub,
) -> Embedder:
    """Arguments and errors as in `embed`; `for_hub` is what `HubArguments.for_hub` returns."""
    name = model.name_or_path if isinstance(model, PreTrainedModel) else str(model)
    folder, pooling, modules = None, "mean", []
    if not isinstance(model, PreTrainedModel):
        config = load_config(name, flag=flag, **for_hub)
        folder = find_sentence_modules(name, "main", for_hub.get("cache_dir"), for_hub.get("token"))
        if folder is not None:
            pooling, modules, longest = read_sentence_modules(folder)
            max_length = max_length or longest
        model = load_encoder(config, name, dtype, flag, **for_hub).to(default_device())
    model = model.base_model  # of a head or of pretraining the encoder
    if tokenizer is None:
        if not name:
            raise ValueError("This model is of no folder that could hold its tokenizer: pass it, too (tokenizer=...).")
        tokenizer = load_tokenizer(name, flag, **for_hub)
    if folder is not None:
        check_sentence_options(folder, tokenizer)
    return Embedder(model, tokenizer, choose_max_length(name, model, tokenizer, max_length), pooling, modules)


class UnitLength(nn.Module):
    def forward(self, vectors: Tensor) -> Tensor:
        return nn.functional.normalize(vectors, dim=-1)


def read_sentence_modules(folder: Path) -> tuple[Literal["mean", "first"], list[nn.Module], int | None]:
    """
    What a folder of sentence-transformers does behind its encoder: pooling, linear layers and unit length; and how
    many tokens of a text it reads, where it says so.

    Raises:
        ValueError: for anything else.
    """
    pooling, layers = "mean", []
    for module in json.loads((folder / "modules.json").read_text(encoding="utf-8")):
        path, kind = folder / module["path"], module["type"].rpartition(".")[2]
        config = read_options(path / "config.json")
        if kind == "Pooling":
            older = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
            modes = [key.removeprefix("pooling_mode_") for key in older] or [config.get("pooling_mode", "mean")]
            if modes not in (["mean_tokens"], ["mean"], ["cls_token"], ["cls"]):
                raise not_computed(folder, f"the pooling {', '.join(map(str, modes))}")
            pooling = "first" if modes[0].startswith("cls") else "mean"
        elif kind == "Dense":
            weights = load_file(path / "model.safetensors") if (path / "model.safetensors").is_file() else {}
            if not config.get("activation_function", "").endswith(".Identity") or "linear.weight" not in weights:
                raise not_computed(folder, f"a Dense layer with {config.get('activation_function')}")
            layer = nn.Linear(config["in_features"], config["out_features"], bias=config["bias"])
            layer.load_state_dict({name.removeprefix("linear."): weight for name, weight in weights.items()})
            layers.append(layer)
        elif kind == "Normalize":
            layers.append(UnitLength())
        elif kind != "Transformer":
            raise not_computed(folder, f"a module {kind}")
    return pooling, layers, read_options(folder / "sentence_bert_config.json").get("max_seq_length")


def check_sentence_options(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Raises:
        ValueError: if sentence-transformers would change a text before the folder's tokenizer reads it.
    """
    options = read_options(folder / "config_sentence_transformers.json")
    if prompt := (options.get("prompts") or {}).get(options.get("default_prompt_name")):
        raise not_computed(folder, f"the default prompt {prompt!r}")
    is_cased = tokenizer.tokenize("The A I") != tokenizer.tokenize("the a i")
    if is_cased and read_options(folder / "sentence_bert_config.json").get("do_lower_case"):
        raise not_computed(folder, "do_lower_case in sentence_bert_config.json")


def read_options(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def not_computed(folder: Path, what: str) -> ValueError:
    return ValueError(
        f"{folder} has {what}, which is not computed here: use SentenceTransformer({str(folder)!r}).encode."
    )


def choose_max_length(name: str, model: nn.Module, tokenizer, max_length: int | None) -> int:
    """
    Raises:
        ValueError: if the model is not made for so many tokens.
    """
    longest = longest_input(tokenizer, model)
    if max_length is None:
        return min(longest, MAX_DEFAULT_LENGTH)
    if max_length > longest and model.config.model_type != "tjepa":
        raise ValueError(f"--max_length is {max_length}, but {name} is made for {longest} tokens at most.")
    if max_length > longest:  # rotary positions have no end
        logger.warning(f"--max_length {max_length} is more than the {longest} tokens that {name} was made for")
    return max_length


# --- Texts and words to vectors, with a model ------------------------------------------------------------------------


def embed_texts(
    model: torch.nn.Module,
    tokenizer,
    texts: Sequence[str],
    max_length: int,
    batch_size: int = 64,
    add_special_tokens: bool | None = None,
) -> Tensor:
    """
    One vector per text: the mean of the last hidden state over the text's tokens.

    Args:
        model: any transformers encoder, called with `input_ids` and `attention_mask`, int64 `[batch, length]`. It runs
            where its parameters are, in eval mode, and gets its training flags back.
        tokenizer: any transformers tokenizer; it needs no padding token.
        texts: sequence of `num_texts` strings.
        max_length: texts are cut off after this many tokens.
        batch_size: texts per forward.
        add_special_tokens: whether the tokenizer adds its own, which are tokens like any other in the mean. Default:
            as in the encoder's pretraining, see `reads_special_tokens`.

    Returns:
        float32 `[num_texts, hidden_size]` on the CPU, in the order of `texts`.

    Raises:
        ValueError: a text, or `texts` itself, is empty: the mean over no tokens does not exist.
    """
    encoded = encode_texts(model, tokenizer, list(texts), max_length, add_special_tokens)["input_ids"]
    check_tokens(texts, encoded)
    return embed_tokens(model, encoded, batch_size)


def check_tokens(texts: Sequence[str], encoded: Sequence[list[int]]) -> None:
    """Raises a `ValueError` if there is no text, or one without a token: the mean over no tokens does not exist."""
    if not len(texts):
        raise ValueError("`texts` is empty; give at least one text.")
    lengths = [len(ids) for ids in encoded]
    if 0 in lengths:
        raise ValueError(
            f"Text {lengths.index(0)} of {len(texts)} has no tokens: {texts[lengths.index(0)]!r}. Every text needs at "
            "least one: leave out empty ones and those of spaces alone."
        )


def embed_tokens(
    model: torch.nn.Module,
    encoded: Sequence[list[int]],
    batch_size: int = 64,
    pooling: Literal["mean", "first"] = "mean",
) -> Tensor:
    """
    What `embed_texts` makes of texts that are tokenized already, each of at least one token. The `pooling` `"first"`
    takes the state of the first token alone.
    """
    features, order = [], []
    with frozen(model):
        for indices, hidden, lengths in _hidden_states(model, encoded, batch_size):
            if pooling == "first":
                vectors = hidden[lengths.cumsum(0) - lengths]
            else:
                if hidden.device.type == "mps":  # has no kernel for it
                    hidden, lengths = hidden.cpu(), lengths.cpu()
                vectors = torch.segment_reduce(hidden, "mean", lengths=lengths, unsafe=True)
            features.append(vectors.cpu())  # [batch, hidden]
            order.extend(indices)
    return torch.cat(features)[torch.tensor(order).argsort()]


def embed_words(
    model: torch.nn.Module,
    tokenizer,
    sentences: Sequence[Sequence[str]],
    max_length: int,
    batch_size: int = 64,
    add_special_tokens: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """
    One vector per word, for probes of tagging: the last hidden state of the word's first token. A sentence is read as
    its words with a space between them, which is how encoders meet words in running text.

    Args:
        model, max_length, batch_size, add_special_tokens: as in `embed_texts`.
        tokenizer: a fast tokenizer (it must know which character each token comes from).
        sentences: the words of each sentence.

    Returns:
        float32 `[num_words, hidden_size]` and int64 `[num_words, 2]`: sentence and place in it of each word, in order.
        Words that have no token (beyond `max_length`, empty, removed by the tokenizer) are not among them.

    Raises:
        ValueError: the tokenizer is not a fast one, or no word has a token.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} does not tell where its tokens come from; use a fast tokenizer.")
    encoding = encode_texts(model, tokenizer, [" ".join(words) for words in sentences], max_length, add_special_tokens)
    tokens_of_sentence, found = [], []
    for sentence, words in enumerate(sentences):
        start, tokens = 0, []
        for place, word in enumerate(words):
            token = encoding.char_to_token(sentence, start) if word else None
            start += len(word) + 1
            if token is not None:
                found.append((sentence, place))
                tokens.append(token)
        tokens_of_sentence.append(torch.tensor(tokens, dtype=torch.long))
    if not found:
        raise ValueError(f"None of the words of {len(sentences)} sentences has a token: there is nothing to embed.")
    kept = [sentence for sentence, tokens in enumerate(tokens_of_sentence) if len(tokens)]
    encoded, features = [encoding["input_ids"][sentence] for sentence in kept], {}
    with frozen(model):
        for indices, hidden, lengths in _hidden_states(model, encoded, batch_size):
            for index, states in zip(indices, hidden.cpu().split(lengths.tolist()), strict=True):
                features[kept[index]] = states[tokens_of_sentence[kept[index]]]  # [words, hidden]
    return torch.cat([features[sentence] for sentence in kept]), torch.tensor(found)


def reads_special_tokens(config: PreTrainedConfig) -> bool:
    """
    Whether an encoder was pretrained with what its tokenizer adds to a text. T-JEPA's own architecture was not; every
    other encoder, one that T-JEPA went on pretraining included, was.
    """
    return config.model_type != "tjepa" or getattr(config, "encoder", None) is not None


def as_text_only(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """
    The tokenizer, which from now on, and when it is loaded from where it is saved, reads "</s>" in a text as these
    characters. For the folder of a model that reads texts and fills no mask.
    """
    tokenizer.split_special_tokens = tokenizer.init_kwargs["split_special_tokens"] = True
    return tokenizer


_readers: WeakKeyDictionary = WeakKeyDictionary()  # of tokenizers, made once


def encode_texts(
    model: torch.nn.Module,
    tokenizer,
    texts: list[str],
    max_length: int,
    add_special_tokens: bool | None = None,
    **options,
) -> BatchEncoding:
    """Token ids of texts, in which nothing is read as a special token; `options` are those of the tokenizer's call."""
    if not texts:
        return BatchEncoding({"input_ids": []})
    if add_special_tokens is None:
        add_special_tokens = reads_special_tokens(model.config)
    made_of = (len(tokenizer), str(tokenizer.special_tokens_map))
    if tokenizer not in _readers or _readers[tokenizer][0] != made_of:  # it takes seconds for a large vocabulary
        _readers[tokenizer] = (made_of, text_reader(tokenizer))
    reader = _readers[tokenizer][1]
    options |= {"truncation": True, "max_length": max_length, "add_special_tokens": add_special_tokens}
    return reader(texts, **options)


def _hidden_states(
    model: torch.nn.Module, encoded: Sequence[list[int]], batch_size: int
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Of each batch the indices into `encoded`, hidden states float32 [num_tokens, hidden], and lengths [batch]."""
    by_length = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
    batches = [by_length[start : start + batch_size] for start in range(0, len(encoded), batch_size)]
    # where all texts of a batch are of one length, as one text alone is, both ways are the same
    needs_padding = any(len(encoded[batch[0]]) < len(encoded[batch[-1]]) for batch in batches)
    is_packed = needs_padding and takes_packed_rows(model)
    for batch in batches:
        rows = [torch.tensor(encoded[index]) for index in batch]
        hidden = packed_states(model, rows) if is_packed else padded_states(model, rows)
        yield batch, hidden.float(), torch.tensor([len(row) for row in rows], device=hidden.device)


@contextmanager
def frozen(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode without gradients. The training flags come back one by one: a part may be in eval mode for good."""
    training_flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, was_training in training_flags:
            module.training = was_training


# --- The two ways to feed an encoder ---------------------------------------------------------------------------------


_traits: WeakKeyDictionary = WeakKeyDictionary()  # of encoders that are not ours, measured once


def takes_packed_rows(model: torch.nn.Module) -> bool:
    """
    Whether an encoder is fed packed rows: where it has the same states there (ours does, and of others it is measured,
    once), and where these are the faster way: on a GPU packing costs more than what is padded of sorted texts.
    """
    if next(model.parameters()).is_cuda:
        return False
    if isinstance(model, TJEPAModel):  # with other backends the mask of a packed row would be a square
        return get_attention(model.config) in ("sdpa", VARLEN_ATTENTION)
    if not isinstance(model, PreTrainedModel) or model.get_input_embeddings() is None:
        return False
    if model not in _traits:
        # rounding to 16 bits is larger than what is measured
        measured = model if model.dtype == torch.float32 else copy.deepcopy(model).float()
        attention = get_attention(measured.config)
        _traits[model] = measure_packing(measured)
        measured.set_attn_implementation(attention)
    return _traits[model].is_packed


def padded_states(model: torch.nn.Module, rows: list[Tensor]) -> Tensor:
    """Token ids int64 `[length]` of texts, one text per row -> states `[num_tokens, hidden]`, text after text."""
    device = next(model.parameters()).device
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)  # [batch, length], padded with 0
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(device)
    return model(input_ids=input_ids, attention_mask=mask).last_hidden_state[mask.bool()]


def packed_states(model: torch.nn.Module, rows: list[Tensor]) -> Tensor:
    """The same with all texts in one row, one behind the other; those of equal length are to be neighbours."""
    row, groups = pack_into_row(rows, next(model.parameters()).device)
    traits, attention = _traits.get(model), get_attention(model.config)
    if traits is not None:
        model.set_attn_implementation(PACKED_ATTENTION)
    try:
        return encode(model, model.config, traits, *row, groups, longest=max(map(len, rows)))[0]
    finally:
        model.set_attn_implementation(attention)


def pack_into_row(rows: list[Tensor], device: torch.device) -> tuple[list[Tensor], list[tuple[int, int, int]]]:
    """
    Token ids int64 `[length]` of texts -> ids, positions and numbers of the texts, int64 `[1, num_tokens]` each, and
    the groups of neighbours of equal length (see [`PackedViews`]).
    """
    lengths = torch.tensor([len(row) for row in rows])
    groups = [(len(list(equal)), length, 0) for length, equal in groupby(lengths.tolist())]
    positions = torch.cat([torch.arange(length) for length in lengths])
    texts = torch.arange(len(rows)).repeat_interleave(lengths)
    return [ids[None].to(device) for ids in (torch.cat(rows), positions, texts)], groups
