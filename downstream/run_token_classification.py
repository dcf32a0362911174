"""Fine-tunes an encoder to tag words: parts of speech, chunks, named entities.

    python run_token_classification.py --model_name_or_path runs/quickstart --dataset_name eriktks/conll2003 \\
        --label_column ner_tags
    python run_token_classification.py --model_name_or_path runs/quickstart --train_file train.jsonl

Rows have a list of words and a list of as many tags (names or numbers). Arguments come from the dataclasses, from a
YAML file as the first argument, or from both (flags win). Notable: the words are joined by spaces and tokenized like
any text, as in pretraining; a token belongs to the word that its last character lies in. The first token of a word
bears its tag, and only there a tag is judged. The rest is in finetuning_tjepa.py.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, DatasetDict
from transformers import (
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    EvalPrediction,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.hf_argparser import HfArg

from ..corpus.arguments import parse_arguments
from ..training.checkpoints import find_checkpoint
from ..training.setup import set_up_logging, use_all_cores
from .finetuning import (
    NO_LABEL,
    DataArguments,
    FinetuningArguments,
    HubMetric,
    ModelArguments,
    check_classes,
    class_name,
    drop_rows,
    find_class_names,
    find_column,
    find_max_length,
    is_missing,
    limit_splits,
    load_config,
    load_metrics,
    load_model,
    load_splits,
    load_tokenizer,
    logger,
    read_labels,
    report_truncation,
    set_classes,
    text_fault,
    train_and_evaluate,
)


WORD_COLUMNS = ("tokens", "words")
TAG_COLUMNS = ("tags", "labels", "ner_tags", "pos_tags", "chunk_tags")
HUB_METRICS = [
    HubMetric(
        "seqeval",
        None,
        {},
        {
            "overall_accuracy": "accuracy",
            "overall_precision": "precision",
            "overall_recall": "recall",
            "overall_f1": "f1",
        },
    )
]
IGNORED = -100  # what the loss passes over


@dataclass(kw_only=True)
class TaggingArguments(DataArguments):
    text_column: str | None = HfArg(
        default=None, help="The column of the word lists. Default: one of the usual names."
    )
    label_all_tokens: bool = HfArg(
        default=False,
        help="Train on all tokens of a word, the first with its tag and the others with it, too (B-X becomes I-X). "
        "Figures count the first alone in any case.",
    )


def main():
    model_args, data_args, training_args = parse_arguments((ModelArguments, TaggingArguments, FinetuningArguments))
    set_up_logging(training_args)
    use_all_cores(training_args)
    checkpoint = find_checkpoint(training_args)
    set_seed(training_args.seed)
    config = load_config(model_args)

    # Rows -> token ids and tags
    counts = {}
    with training_args.main_process_first(desc="preparing the words"):
        splits = load_splits(data_args, model_args)
        word_column = find_column(splits, "--text_column", data_args.text_column, WORD_COLUMNS)
        tag_column = find_column(splits, "--label_column", data_args.label_column, TAG_COLUMNS)
        logger.info(f"words in {word_column}, tags in {tag_column}")
        check_lists(splits, word_column, tag_column)
        # of all splits: CoNLL-2000 itself has a tag that only its test split has, and such tags are honest mistakes
        all_tags = [row for dataset in splits.values() for row in read_labels(dataset, tag_column)]
        names = find_class_names(splits["train"], tag_column, all_tags, config)
        splits, tags = keep_usable_rows(limit_splits(splits, data_args), word_column, tag_column, counts)
        check_classes({split: Counter(tag for row in rows for tag in row) for split, rows in tags.items()}, names)
        tokenizer = load_tokenizer(model_args, config)
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} does not say which characters a token stands for: a fast tokenizer does."
            )
        max_length = find_max_length(data_args.max_length, tokenizer, config)
        splits = {
            split: encode(
                dataset,
                word_column,
                tags[split],
                names,
                tokenizer,
                max_length,
                label_all_tokens=data_args.label_all_tokens and split == "train",
            )
            for split, dataset in splits.items()
        }
    for split, dataset in splits.items():
        report_truncation(dataset["num_tokens"][:], max_length, split, counts)
        report_lost_words(dataset, tags[split], split, counts)

    # Training
    set_classes(config, names)
    model = load_model(AutoModelForTokenClassification, model_args, config, tokenizer)
    metrics = load_metrics(HUB_METRICS, "tagging")

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        is_word = prediction.label_ids != IGNORED
        predicted, actual = (
            [[names[tag] for tag in row[mask]] for row, mask in zip(ids, is_word, strict=True)]
            for ids in (prediction.predictions, prediction.label_ids)
        )
        return metrics(predicted, actual)

    train_and_evaluate(
        model,
        training_args,
        splits,
        tokenizer,
        DataCollatorForTokenClassification(tokenizer),
        compute_metrics,
        lambda logits, labels: (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1),
        counts,
        checkpoint,
    )


def check_lists(splits: DatasetDict, *columns: str) -> None:
    """
    Raises:
        ValueError: if a column does not hold lists.
    """
    for split, dataset in splits.items():
        for column in columns:
            example = next((value for value in dataset[column] if value is not None), [])
            if not isinstance(example, list):
                raise ValueError(
                    f"The column {column!r} of the {split} split holds {example!r}; it must hold lists, one entry for "
                    "each word. run_classification.py is for texts that have one label."
                )


def keep_usable_rows(
    splits: DatasetDict, word_column: str, tag_column: str, counts: dict
) -> tuple[dict[str, Dataset], dict[str, list[list[str]]]]:
    """The splits without rows that have no words or tags that fit, and the tags' names of the rows that are left."""
    kept, tags = {}, {}
    for split, dataset in splits.items():
        split_tags = read_labels(dataset, tag_column)
        faults = [row_fault(*row) for row in zip(dataset[word_column], split_tags, strict=True)]
        dataset = drop_rows(dataset, faults, split, counts)
        if dataset is not None:
            kept[split] = dataset
            rows = (row for row, fault in zip(split_tags, faults, strict=True) if fault is None)
            tags[split] = [[class_name(tag) for tag in row] for row in rows]
    return kept, tags


def row_fault(words: list | None, tags: list | None) -> str | None:
    """Why a row can not be used; None if it can."""
    fault = text_fault(None if words is None else " ".join(words) if all(map(is_text, words)) else words)
    if fault is not None:
        return fault
    if tags is None or any(map(is_missing, tags)):
        return NO_LABEL
    return None if len(words) == len(tags) else "not as many tags as words"


def is_text(word: Any) -> bool:
    return isinstance(word, str)


def encode(
    dataset: Dataset,
    word_column: str,
    tags: list[list[str]],
    names: list[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    label_all_tokens: bool,
) -> Dataset:
    """
    Token ids of at most `max_length`, `labels` for every token, `num_tokens`, the length before the cut, and
    `num_words`, how many words have a token after it.
    """
    ids = {name: index for index, name in enumerate(names)}

    def encode_batch(batch: dict[str, list], rows: list[int]) -> dict[str, list]:
        texts = [" ".join(words) for words in batch[word_column]]
        whole = tokenizer(texts, verbose=False)
        encoding = tokenizer(texts, truncation=True, max_length=max_length, return_offsets_mapping=True)
        labels, num_words = [], []
        for words, row, offsets in zip(batch[word_column], rows, encoding.pop("offset_mapping"), strict=True):
            token_labels, seen = [], set()
            for word in words_of_tokens(words, offsets):
                label = IGNORED
                if word is not None and word not in seen:
                    label = ids[tags[row][word]]
                    seen.add(word)
                elif word is not None and label_all_tokens:
                    label = ids[inside(tags[row][word], ids)]
                token_labels.append(label)
            labels.append(token_labels)
            num_words.append(len(seen))
        num_tokens = [len(token_ids) for token_ids in whole["input_ids"]]
        return {**encoding, "labels": labels, "num_tokens": num_tokens, "num_words": num_words}

    return dataset.map(encode_batch, batched=True, with_indices=True, remove_columns=dataset.column_names)


def words_of_tokens(words: list[str], offsets: list[tuple[int, int]]) -> list[int | None]:
    """
    The word of each token: the one that its last character lies in. None for special tokens and for spaces.

    Args:
        words (`list[str]`): the words of a text that joins them with one space.
        offsets (`list[tuple[int, int]]`): where each token begins and ends in that text; both equal for a special one.
    """
    word_of_character = []
    for index, word in enumerate(words):
        word_of_character += [index] * len(word) + [None]
    return [word_of_character[end - 1] if end > start else None for start, end in offsets]


def inside(tag: str, known: dict[str, int]) -> str:
    """I-X for B-X, where there is an I-X."""
    return f"I-{tag[2:]}" if tag.startswith("B-") and f"I-{tag[2:]}" in known else tag


def report_lost_words(dataset: Dataset, tags: list[list[str]], split: str, counts: dict) -> None:
    """Says how many words have no token: cut off, or nothing that the tokenizer knows. Their tags count nowhere."""
    num_words = sum(map(len, tags))
    num_lost = num_words - sum(dataset["num_words"])
    counts[f"{split}_lost_words"] = num_lost
    if num_lost:
        logger.warning(f"{split}: {num_lost:,} of {num_words:,} words have no token left; their tags count nowhere")


if __name__ == "__main__":
    main()
