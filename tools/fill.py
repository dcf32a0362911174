"""What the predictor expects in the gaps of a text, as words.

    tjepa fill "The [3] sat on the mat"

Notable: [3] stands for three hidden tokens, which are predicted together, from the visible ones, without any mask
token in the encoder's input: as in pretraining. The token head turns each prediction into words.
"""

import argparse
import re
import shlex
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from ..corpus.command_line import at_least_one, printable, start
from ..corpus.paths import find_newest_run
from ..corpus.tokenizers import load_tokenizer, longest_input, special_tokens_around, text_reader
from ..modeling_tjepa import TJEPAForPreTraining
from ..training.loading import check_weights, load_config
from ..training.model_folder import pretraining_folder
from ..training.setup import default_device, hide_what_loading_says


GAP = re.compile(r"\[(\d+)\]")
SPACE_MARKS = ("▁", "Ġ")  # of SentencePiece and of byte-level BPE


class Gapped(NamedTuple):
    """A text with hidden tokens: `input_ids` int64 `[length]`, `is_hidden` bool `[length]`."""

    input_ids: torch.Tensor
    is_hidden: torch.Tensor


class Guess(NamedTuple):
    token_id: int
    token: str
    probability: float


def load_for_filling(name: str, flag: str = "--model") -> tuple[TJEPAForPreTraining, PreTrainedTokenizerBase]:
    """
    The context encoder and predictor of a run's folder, also where that of another architecture holds them below.

    Raises:
        FileNotFoundError, ValueError: as `load_config` and `load_tokenizer`; if it holds no predictor, or lacks
            weights.
    """
    name = pretraining_folder(name)
    config = load_config(name, flag=flag)
    tokenizer = load_tokenizer(name, flag)
    if config.model_type != "tjepa":
        raise ValueError(
            f"{flag} {name} is a {config.model_type} model: it has no predictor, which pretraining makes."
        )
    architecture = next(iter(config.architectures or ()), None)
    if architecture not in ("TJEPAForPreTraining", "TJEPAModel", None):
        raise ValueError(
            f"{flag} {name} is a {architecture}: it has no predictor. Name the folder of the pretraining run."
        )
    model, info = TJEPAForPreTraining.from_pretrained(
        name, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
    )
    if any(key.startswith("predictor.") for key in info["missing_keys"]):
        raise ValueError(f"{flag} {name} is the folder of an encoder without its predictor: name that of the run.")
    check_weights(model, info, ("context_encoder.", "target_encoder.", "predictor.", "token_head."), name)
    return model.to(default_device()).eval(), tokenizer


def tokens_around(model: TJEPAForPreTraining, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens before and behind a text: none for our own encoder."""
    return ([], []) if model.config.encoder is None else special_tokens_around(tokenizer)


def read_gaps(text: str, model: TJEPAForPreTraining, tokenizer: PreTrainedTokenizerBase) -> Gapped:
    """
    A text in which `[N]` stands for N hidden tokens.

    Raises:
        ValueError: if nothing is hidden or nothing visible, a gap is of 0 tokens, or the text is too long.
    """
    pieces = GAP.split(text)  # text, number, text, number, ..., text
    reader, lengths = text_reader(tokenizer), [int(number) for number in pieces[1::2]]
    if not lengths or 0 in lengths:
        raise ValueError('Write [3] where three tokens are to be guessed, as in "The [3] sat on the mat".')
    # a space belongs to the word behind it, and some tokenizers put one before every text by themselves
    adds_space = reader.tokenize("a")[0].startswith(SPACE_MARKS)
    before, behind = tokens_around(model, tokenizer)
    max_length = longest_input(tokenizer, model)
    input_ids, is_hidden = list(before), [False] * len(before)
    for place, piece in enumerate(pieces[0::2]):
        if place < len(lengths):
            piece = piece.rstrip(" ")
        if place > 0 and adds_space:
            piece = piece.lstrip(" ")
        ids = reader(piece, add_special_tokens=False, verbose=False)["input_ids"] if piece else []
        num_hidden = min(lengths[place], max_length + 1) if place < len(lengths) else 0
        input_ids += ids + [0] * num_hidden
        is_hidden += [False] * len(ids) + [True] * num_hidden
    input_ids, is_hidden = torch.tensor(input_ids + behind), torch.tensor(is_hidden + [False] * len(behind))
    if len(input_ids) > max_length:
        raise ValueError(f"The text has {len(input_ids):,} tokens or more, and the model reads {max_length} at most.")
    if is_hidden.sum() + len(before) + len(behind) == len(input_ids):
        raise ValueError("All of the text is hidden: leave something from which the rest can be guessed.")
    return Gapped(input_ids, is_hidden)


def guess_tokens(
    model: TJEPAForPreTraining, tokenizer: PreTrainedTokenizerBase, gapped: Gapped, num_guesses: int
) -> list[list[Guess]]:
    """The likeliest tokens at each hidden place, and their probabilities."""
    gapped = Gapped(*(part.to(model.device) for part in gapped))
    probabilities = model.predict_tokens(*gapped).softmax(dim=-1)
    best = probabilities[:, : len(tokenizer)].topk(min(num_guesses, len(tokenizer)))
    return [
        [Guess(token, tokenizer.decode([token]), value) for token, value in zip(tokens, values, strict=True)]
        for tokens, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def fill(tokenizer: PreTrainedTokenizerBase, gapped: Gapped, guesses: list[list[Guess]]) -> str:
    """The text with the likeliest token in each hidden place."""
    best = torch.tensor([of_place[0].token_id for of_place in guesses])
    return tokenizer.decode(gapped.input_ids.masked_scatter(gapped.is_hidden, best), skip_special_tokens=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("text", help='with [N] where N tokens are to be guessed: "The [3] sat on the mat"')
    parser.add_argument("--model", help="folder or Hub name of a run's model; default: the newest under runs/")
    parser.add_argument("--num_results", type=at_least_one, default=5, help="guesses for each token (default: 5)")
    args = parser.parse_args()
    hide_what_loading_says()
    name = args.model or str(find_newest_run())
    model, tokenizer = load_for_filling(name)
    if model.token_head is None:
        raise ValueError(
            f"{name} predicts no tokens. Fit a token head to its predictions: tjepa train-decoder {shlex.quote(name)}"
        )
    gapped = read_gaps(args.text, model, tokenizer)
    guesses = guess_tokens(model, tokenizer, gapped, args.num_results)
    print(f"{name}\n\n{printable(fill(tokenizer, gapped, guesses).replace(chr(10), '⏎'))}\n")
    for place, of_place in enumerate(guesses, start=1):
        print(f"{place:>3}  " + "  ".join(f"{guess.token!r} {guess.probability:.1%}" for guess in of_place))


if __name__ == "__main__":
    start(main)
