"""Tokenizers, for every script: how one is loaded, how many ids it has, and how it reads a text as text.

Notable: a text may hold what a tokenizer takes for a special token ("</s>" in a page on HTML, "[SEP]" in one on BERT).
`split_special_tokens=True` of transformers is not enough to read it as text: tokenizers whose model knows the token as
a piece of its own (Unigram, as in XLM-R and T5, or whole words) give its id all the same. See `text_reader`.
"""

import copy
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.hf_argparser import HfArg

from .command_line import first_line
from .paths import check_exists, hint_at_nearest


NO_LIMIT = 2**31 - 1  # tokens: some tokenizers say 1e30

logger = logging.getLogger(__name__)


@dataclass
class HubArguments:
    """How tokenizers and models are loaded, the same in every script."""

    cache_dir: str | None = HfArg(default=None, help="Where downloads are kept.")
    token: str | None = HfArg(default=None, help="Access token for the Hub, if not logged in.")
    trust_remote_code: bool = HfArg(
        default=False, help="Run the code that lies beside a tokenizer or model. Not needed for T-JEPA itself."
    )

    def for_hub(self) -> dict:
        """The keyword arguments of `from_pretrained` that these flags stand for."""
        return {"cache_dir": self.cache_dir, "token": self.token, "trust_remote_code": self.trust_remote_code}


def load_tokenizer(name: str, flag: str = "--tokenizer_name", **for_hub) -> PreTrainedTokenizerBase:
    """
    The tokenizer of a folder or a name on the Hub.

    Args:
        name (`str`): the folder or name.
        flag (`str`): the argument that it was given for, for messages.
        for_hub: what `HubArguments.for_hub` returns, and `revision`.

    Raises:
        FileNotFoundError: if `name` is a path that is not there.
        ValueError: if there is no tokenizer, or it has code of its own that is not trusted.
    """
    check_exists(name, flag)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **{"trust_remote_code": False, **for_hub})
        # where a model lies without files of a tokenizer, transformers makes one that knows no word (of T5's, a space)
        if len(tokenizer.get_vocab().keys() - tokenizer.get_added_vocab() - {*tokenizer.all_special_tokens}) <= 1:
            raise ValueError("the files of a tokenizer are missing")
        return tokenizer
    except (OSError, ValueError, KeyError) as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{flag} {name}: the tokenizer has code of its own; pass --trust_remote_code if you trust its source."
            ) from error
        advice = "Save the model's own there, or pass --tokenizer_name where the command takes it"
        if flag == "--tokenizer_name":
            advice = "Pass a folder or a name on the Hub"
        raise ValueError(
            f"{flag} {name}: no tokenizer could be loaded from there ({first_line(error)}). {hint_at_nearest(name)} "
            f"{advice}; `tjepa tokenizer` makes one from your texts."
        ) from error


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that an embedding needs for the tokenizer: its highest id + 1, however many of the ids below are unused."""
    return max(tokenizer.get_vocab().values()) + 1


def same_ids(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """
    Whether the tokens that both have, have the same ids, so that embeddings made for one fit the other. It holds where
    tokens were added to one of them, and where unused ones got a name.
    """
    ids, other_ids = tokenizer.get_vocab(), other.get_vocab()
    shared = ids.keys() & other_ids.keys()
    return bool(shared) and all(ids[token] == other_ids[token] for token in shared)


def without_special_tokens(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """
    The tokenizer, adding no special tokens to a text, which is how T-JEPA is pretrained; it still has them, so that it
    reads its mask token in a text. One that adds none comes back as it is. Others become a `PreTrainedTokenizerFast`:
    saved under its own class, BERT's would add its tokens again when it is loaded.
    """
    if tokenizer.num_special_tokens_to_add(pair=True) == 0:
        return tokenizer
    if not tokenizer.is_fast or not type(tokenizer).__module__.startswith("transformers."):
        logger.warning(
            f"{type(tokenizer).__name__} adds special tokens that the encoder is trained without: read texts with "
            "add_special_tokens=False."
        )
        return tokenizer
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    # no token types either, which T-JEPA does not take
    inputs = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    return _fast_tokenizer(backend, tokenizer, model_input_names=inputs)


def special_tokens_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """
    The ids that a tokenizer puts before and behind a text ([CLS] and [SEP], say), found by tokenizing one.

    Raises:
        ValueError: if what it adds does not stand around the text.
    """
    for text in ("a", "the", "0"):
        inner = tokenizer(text, add_special_tokens=False)["input_ids"]
        outer = tokenizer(text)["input_ids"]
        for start in range(len(outer) - len(inner) + 1):
            if inner and outer[start : start + len(inner)] == inner:
                return outer[:start], outer[start + len(inner) :]
    raise ValueError(f"The special tokens of {type(tokenizer).__name__} do not stand before and behind a text.")


def longest_input(tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> int:
    """Tokens that a text may have: the fewer of those that tokenizer and model are made for, where they say it."""
    return min(tokenizer.model_max_length, count_positions(model))


def count_positions(model: nn.Module) -> int:
    """Tokens that a model has positions for; `NO_LIMIT` where they are relative."""
    num_positions = getattr(model.config, "max_position_embeddings", None)
    limits = [num_positions if isinstance(num_positions, int) and num_positions > 0 else NO_LIMIT, NO_LIMIT]
    for name, module in model.named_modules():
        # RoBERTa and its like count positions from their padding id + 1, which no configuration says
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limits.append(len(module.weight) - module.padding_idx - 1)
    return min(limits)


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Gives a tokenizer without a padding token another one for it; what stands at a padded position is never looked at.

    Raises:
        ValueError: if there is none that could take its place.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if tokenizer.pad_token is None:
            raise ValueError(
                f"The tokenizer of {tokenizer.name_or_path} has no token to pad with: give it a pad_token."
            )
        logger.info(f"The tokenizer has no padding token: {tokenizer.pad_token!r} takes its place")


def text_reader(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """
    A copy of the tokenizer, with the same ids, for which a text is nothing but text: `"</s>"` is its characters.
    Special tokens that the tokenizer itself puts around a text (unless `add_special_tokens=False`) stay, and so do
    tokens that were added to its vocabulary without being special. For encoding only: save the original, which still
    reads its mask token. Tokenizers written in Python get transformers' `split_special_tokens`.
    """
    if not tokenizer.is_fast:
        reader = copy.deepcopy(tokenizer)
        reader.split_special_tokens = True
        return reader
    # Special tokens get names that occur in no text (U+FDD0 is not a character), wherever the vocabulary has them.
    # Their ids stay, which the post-processor uses, and so do those of all other tokens.
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    names = {token["content"]: f"\ufdd0{token['id']}\ufdd0" for token in state["added_tokens"] if token["special"]}
    for token in state["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = state["model"]
    if isinstance(model["vocab"], Mapping):
        model["vocab"] = {names.get(piece, piece): id_ for piece, id_ in model["vocab"].items()}
    else:  # Unigram
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        pairs = (tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"])
        model["merges"] = [list(pair) for pair in pairs if names.keys().isdisjoint({*pair, "".join(pair)})]
    return _fast_tokenizer(Tokenizer.from_str(json.dumps(state)), tokenizer, names)


def _fast_tokenizer(
    backend: Tokenizer, like: PreTrainedTokenizerBase, renamed: Mapping[str, str] = MappingProxyType({}), **settings
) -> PreTrainedTokenizerFast:
    """A tokenizer of the general class, with another one's settings and its special tokens under their new names."""
    kept = ("name_or_path", "model_max_length", "padding_side", "truncation_side", "clean_up_tokenization_spaces")
    special_tokens = {name: renamed.get(token, token) for name, token in like.special_tokens_map.items()}
    extra = [renamed.get(str(token), str(token)) for token in like.extra_special_tokens]
    settings = {"model_input_names": like.model_input_names, "extra_special_tokens": extra, **settings}
    backend.no_truncation()  # left over from the last call
    backend.no_padding()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **{name: getattr(like, name) for name in kept}, **settings, **special_tokens
    )
