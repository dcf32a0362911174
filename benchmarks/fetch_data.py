"""Copies the public data sets that the docs and the benchmarks use from the Hub, about 20 MB, into the folder `data`.

python benchmarks/fetch_data.py
python benchmarks/fetch_data.py --only sst2 trec

Probes and fine-tuning read `data/eval/NAME-SPLIT.jsonl`; pretraining reads `data/books-train.parquet`, passages of
English books of Project Gutenberg. The books are not those behind the tables of the docs, so figures come out alike,
not equal. A file that is there is not fetched again.
"""

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, load_dataset
from tqdm.auto import tqdm

from tjepa.corpus.atomic_writes import replacing_files


class Source(NamedTuple):
    """A data set on the Hub, and which of its columns become which."""

    name: str
    splits: tuple[str, ...]
    columns: dict[str, str]  # theirs -> ours
    revision: str | None = None


EVALUATION = {
    "sst2": Source("SetFit/sst2", ("train", "validation", "test"), {"text": "text", "label": "label"}),
    "subj": Source("SetFit/subj", ("train", "test"), {"text": "text", "label": "label"}),
    "trec": Source("SetFit/TREC-QC", ("train", "test"), {"text": "text", "label_coarse": "label"}),
    "sts14": Source("mteb/sts14-sts", ("test",), {name: name for name in ("sentence1", "sentence2", "score")}),
    "conll2000-chunking": Source(
        "eriktks/conll2000",
        ("train", "test"),
        {name: name for name in ("tokens", "pos_tags", "chunk_tags")},
        "refs/convert/parquet",  # its main branch is a script, which `datasets` does not run any more
    ),
}
BOOKS, NUM_BOOKS, WORDS_OF_A_PASSAGE = "sedthh/gutenberg_english", 40, 200


def with_names_of_classes(dataset: Dataset) -> Iterator[dict]:
    """Rows without empty ones, and tags by their names instead of their numbers."""
    for row in dataset:
        for column, feature in dataset.features.items():
            if isinstance(row[column], list) and hasattr(feature.feature, "int2str"):
                row[column] = feature.feature.int2str(row[column])
        if row.get("tokens") != []:
            yield row


def passages_of(text: str) -> Iterator[str]:
    """Paragraphs, put together until they have `WORDS_OF_A_PASSAGE` words."""
    passage, num_words = [], 0
    for paragraph in text.replace("\r\n", "\n").split("\n\n"):
        words = paragraph.split()
        passage += [" ".join(words)] if words else []
        num_words += len(words)
        if num_words >= WORDS_OF_A_PASSAGE:
            yield "\n".join(passage)
            passage, num_words = [], 0


def fetch_evaluation(name: str, folder: Path) -> None:
    source = EVALUATION[name]
    for split in source.splits:
        path = folder / "eval" / f"{name}-{split}.jsonl"
        if not path.exists():
            dataset = load_dataset(source.name, split=split, revision=source.revision)
            dataset = dataset.select_columns(list(source.columns)).rename_columns(source.columns)
            write(Dataset.from_list(list(with_names_of_classes(dataset))), path)


def fetch_books(folder: Path) -> None:
    if (folder / "books-train.parquet").exists():
        return
    books = itertools.islice(load_dataset(BOOKS, split="train", streaming=True), NUM_BOOKS)
    texts = [text for book in tqdm(books, "books", NUM_BOOKS) for text in passages_of(book["TEXT"])]
    is_held_out = [index % 20 == 0 for index in range(len(texts))]
    for split, wanted in (("validation", True), ("train", False)):
        rows = [{"text": text} for text, held_out in zip(texts, is_held_out, strict=True) if held_out is wanted]
        write(Dataset.from_list(rows), folder / f"books-{split}.parquet")


def write(dataset: Dataset, path: Path) -> None:
    with replacing_files(path.parent) as folder:
        new = folder / path.name
        dataset.to_parquet(new) if path.suffix == ".parquet" else dataset.to_json(new, force_ascii=False)
    print(f"{path}: {len(dataset):,} rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output_dir", type=Path, default=Path("data"))
    parser.add_argument("--only", nargs="+", choices=(*EVALUATION, "books"), default=(*EVALUATION, "books"))
    args = parser.parse_args()
    for name in args.only:
        fetch_books(args.output_dir) if name == "books" else fetch_evaluation(name, args.output_dir)


if __name__ == "__main__":
    main()
