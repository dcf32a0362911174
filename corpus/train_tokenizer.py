"""Trains a byte-level BPE tokenizer on your own documents.

    tjepa tokenizer --train_file stories.parquet --vocab_size 8000 --output_dir my-tokenizer

Notable: bytes are the alphabet, so every text can be written, no unknown token is needed, and decoding gives back
exactly what went in. The same texts always give the same tokenizer.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from datasets.utils import tqdm
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AddedToken, PreTrainedTokenizerFast
from transformers.hf_argparser import HfArg

from .arguments import parse_arguments
from .atomic_writes import check_writable, replacing_files
from .command_line import start
from .documents import SourceArguments, load_documents
from .faults import DROP_REASONS, KEPT, advise, find_fault, list_reasons
from .files import FAULT_COLUMN
from .preparation import read_preparation
from .tokenization import check_columns


# Pretraining itself needs none of these; batches of a downstream task are padded, masked language models need the
# mask, and generation or sequence pairs need a beginning and an end. The order fixes the ids: <pad> is 0. The mask
# takes the space before it, as RoBERTa's does: the word that stood there has that space in its own first token.
MASK = AddedToken("<mask>", lstrip=True, special=True, normalized=False)
SPECIAL_TOKENS = {"pad_token": "<pad>", "mask_token": MASK, "bos_token": "<s>", "eos_token": "</s>"}

LONGEST_WORD = 1000  # bytes that are trained on in one piece

# what tokenizers of other kinds or older versions have beside tokenizer.json and tokenizer_config.json
FILES_OF_OTHERS = ("special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model")


@dataclass(kw_only=True)
class TokenizerArguments(SourceArguments):
    """The arguments of `train_tokenizer.py`."""

    output_dir: str = HfArg(help="The folder that the tokenizer is written to.")
    vocab_size: int = HfArg(default=32000, help="Tokens in the vocabulary, with the 256 bytes and the special tokens.")
    model_max_length: int = HfArg(default=1024, help="Tokens to which the tokenizer truncates when asked to.")


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, model_max_length: int, left_out: Counter | None = None
) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer; the same texts give the same tokenizer.

    Args:
        texts (`Iterable[str]`): The documents; what is not text (null, empty, invalid unicode) is passed over.
        vocab_size (`int`): Tokens in the vocabulary at most; few texts may not have that many different pieces.
        model_max_length (`int`): The length, in tokens, to which the tokenizer truncates when asked to.
        left_out (`Counter`, *optional*): Counts what is passed over, by reason.

    Returns:
        `PreTrainedTokenizerFast`: With the special tokens `<pad>`, `<mask>`, `<s>` and `</s>`, none of which it adds
        by itself.

    Raises:
        ValueError: If `vocab_size` has no room for the bytes and the special tokens, or there is no text.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    min_vocab_size = len(alphabet) + len(SPECIAL_TOKENS)
    if vocab_size < min_vocab_size:
        raise ValueError(
            f"vocab_size is {vocab_size}; it must be at least {min_vocab_size}: {len(alphabet)} bytes and "
            f"{len(SPECIAL_TOKENS)} special tokens."
        )
    left_out = Counter() if left_out is None else left_out

    def keep_usable() -> Iterator[str]:
        for text in tqdm(texts, desc="Training the tokenizer", unit=" documents"):
            fault = find_fault(text)
            if fault is None:
                yield text
            else:
                left_out[DROP_REASONS[fault]] += 1

    usable_texts = keep_usable()
    first_text = next(usable_texts, None)
    if first_text is None:
        why = f"{list_reasons(left_out)}. {advise(left_out)}" if left_out else "there are no documents."
        raise ValueError(f"There is no text to train the tokenizer on: {why}")

    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # a word takes time that grows with the square of its length: of DNA, say, or of text without spaces
    in_pieces = pre_tokenizers.Split(Regex(f".{{{LONGEST_WORD}}}"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([byte_level, in_pieces])
    tokenizer.decoder = decoders.ByteLevel()
    special = {"special_tokens": list(SPECIAL_TOKENS.values()), "initial_alphabet": alphabet}
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, **special)  # the bar above is enough
    tokenizer.train_from_iterator(chain([first_text], usable_texts), trainer)
    tokenizer.pre_tokenizer = byte_level
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
        **SPECIAL_TOKENS,
    )


def check_output_dir(folder: Path) -> None:
    """As `check_writable`; and a `FileExistsError` if a tokenizer written to the folder would not be alone there."""
    check_writable(folder)
    if (folder / "config.json").is_file():
        raise FileExistsError(
            f"--output_dir {folder} holds a model, which would read its texts by another tokenizer from then on: name "
            "another folder."
        )
    if read_preparation(folder) is not None:
        raise FileExistsError(
            f"--output_dir {folder} holds a prepared dataset, whose token ids are those of the tokenizer that is "
            "there: name another folder."
        )
    if others := sorted(path.name for pattern in FILES_OF_OTHERS for path in folder.glob(pattern)):
        raise FileExistsError(
            f"--output_dir {folder} holds files of another tokenizer, which would be read along with the new one's: "
            f"{', '.join(others)}. Name another folder, or remove them."
        )


def main():
    (args,) = parse_arguments(TokenizerArguments, description=__doc__)
    check_output_dir(Path(args.output_dir))
    documents = load_documents(args)["train"]
    check_columns(documents, args.text_column_name, "train")
    left_out = Counter()

    def texts() -> Iterator[str]:
        for row in documents:
            fault = row.get(FAULT_COLUMN, KEPT)
            if fault == KEPT:
                yield row[args.text_column_name]
            else:
                left_out[DROP_REASONS[fault]] += 1

    tokenizer = train_tokenizer(texts(), args.vocab_size, args.model_max_length, left_out)
    with replacing_files(args.output_dir) as folder:
        tokenizer.save_pretrained(folder)
    print(f"{len(tokenizer):,} tokens; written to {args.output_dir}")
    if left_out:
        print(f"{left_out.total():,} documents were left out: {list_reasons(left_out)}")


if __name__ == "__main__":
    start(main)
