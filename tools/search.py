"""Finds texts by what they mean, with the encoder that was just trained, beside what counting words finds.

    tjepa search "eigenvalues of a matrix"
    tjepa search "who opens the door" --model runs/mine --file my.txt --tfidf

Notable: texts are compared by the cosine of whitened vectors, as in the probe. Reading all texts takes the time, so
their vectors are kept in the model's folder, and read again where either the texts or the encoder are others: the
encoder is asked for the first few vectors anew. The first paragraph of a docstring is what is found, because it says
what the rest explains, and is as short as a query.
"""

import argparse
import hashlib
import logging
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import torch
from datasets.utils import tqdm
from safetensors import safe_open
from safetensors.torch import save_file
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..corpus.atomic_writes import replacing_files
from ..corpus.command_line import at_least_one, printable, start
from ..corpus.faults import KEPT, advise, count_reasons, list_reasons
from ..corpus.files import FAULT_COLUMN, load_files, without_query
from ..corpus.paths import find_newest_run
from ..corpus.quickstart import load_quickstart_documents
from ..downstream.embedding import Embedder, load_embedder
from ..downstream.whitening import Whitening
from ..training.setup import hide_what_loading_says


logger = logging.getLogger(__name__)


INDEX_FOLDER = "search_index"  # in the model's folder
DOCSTRINGS = "docstrings"
CHUNK = 4096  # texts between two steps of the progress bar
TEXTS_PER_DIMENSION = 2  # with fewer the covariance is too uncertain to be whitened as it is
NUM_COMPARED = 4  # texts whose vectors tell whether an index is this encoder's
MIN_SIMILARITY = 0.99  # of these vectors then and now; other weights give other directions


class Hit(NamedTuple):
    score: float  # cosine
    text: str
    label: str  # where the text is from; "" where that is not known


# ---- texts ----


def load_docstrings(cache_dir: str | None = None) -> dict[str, str]:
    """The first paragraph, in one line, of every docstring of the quickstart's corpus, and the library it is from."""
    passages = {}
    for documents in load_quickstart_documents(cache_dir).values():
        libraries = documents.features["label"].names
        for text, label in zip(documents["text"][:], documents["label"][:], strict=True):
            passages.setdefault(" ".join(text.strip().split("\n\n")[0].split()), libraries[label])
    return passages


def load_passages(file: str | None = None, text_column_name: str | None = None) -> dict[str, str]:
    """
    The texts to search, each once, and where each is from.

    Args:
        file: a text file with a text in each line, or any file of documents; `None`: the docstrings.
        text_column_name: its column of texts. Default: `text`.

    Raises:
        FileNotFoundError, ValueError: as `load_files`; if no text can be used; for the column of no file.
    """
    if file is None:
        if text_column_name is not None:
            raise ValueError(f"--text_column_name {text_column_name} is a column of --file, and there is none.")
        return load_docstrings()
    text_column_name = text_column_name or "text"
    rows = load_files("--file", file, text_column_name=text_column_name)
    faults = rows[FAULT_COLUMN][:]
    passages = {text: "" for text, fault in zip(rows[text_column_name][:], faults, strict=True) if fault == KEPT}
    left_out = count_reasons(faults)
    if not passages:
        raise ValueError(
            f"--file {file} holds no text that could be found: {list_reasons(left_out)}. {advise(left_out)}"
        )
    if copies := len(rows) - left_out.total() - len(passages):
        left_out["copy of another"] = copies
    if left_out:
        logger.warning(f"--file {file}: {left_out.total():,} of {len(rows):,} left out: {list_reasons(left_out)}")
    return passages


# ---- the index ----


class SearchIndex:
    """
    Texts as an encoder sees them.

    Args:
        embedder: reads the texts and the queries.
        passages: each text, and where it is from.
        whitening: of the texts' vectors.
        vectors: float `[num_texts, num_dimensions]`, whitened and of unit length.
    """

    def __init__(
        self,
        embedder: Embedder,
        passages: dict[str, str],
        whitening: Whitening,
        vectors: Tensor,
    ):
        self.embedder, self.passages, self.texts = embedder, passages, list(passages)
        self.whitening, self.vectors = whitening, vectors.float()

    @classmethod
    def build(cls, embedder: Embedder, passages: dict[str, str]) -> "SearchIndex":
        """Reads all texts, under a progress bar."""
        texts = list(passages)
        chunks = range(0, len(texts), CHUNK)
        bar = tqdm(chunks, desc=f"Reading {len(texts):,} texts", disable=len(chunks) < 2)
        embeddings = torch.cat([embedder(texts[at : at + CHUNK]) for at in bar])
        is_few = len(texts) < TEXTS_PER_DIMENSION * embeddings.shape[1]
        whitening = (Whitening.fit_to_few if is_few else Whitening.fit)(embeddings)
        return cls(embedder, passages, whitening, F.normalize(whitening(embeddings)))

    @classmethod
    def load(cls, path: Path, embedder: Embedder, passages: dict[str, str]) -> "SearchIndex | None":
        """What `save` wrote, or `None` where there is nothing, or it is of other texts or another encoder."""
        if not path.is_file():
            return None
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("texts") != hash_texts(passages):
                return None
            whitening = Whitening(file.get_tensor("weight"), file.get_tensor("bias"))
            index = cls(embedder, passages, whitening, file.get_tensor("vectors"))
        if whitening.weight.shape[1] != embedder.width:
            return None
        now = index.embed(index.texts[:NUM_COMPARED])
        return index if bool((F.cosine_similarity(now, index.vectors[:NUM_COMPARED]) > MIN_SIMILARITY).all()) else None

    def save(self, path: Path) -> None:
        tensors = {"vectors": self.vectors.half(), "weight": self.whitening.weight, "bias": self.whitening.bias}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        with replacing_files(path.parent) as folder:
            save_file(tensors, folder / path.name, metadata={"texts": hash_texts(self.passages)})

    def embed(self, texts: list[str]) -> Tensor:
        """float32 `[num_texts, num_dimensions]`, whitened and of unit length."""
        return F.normalize(self.whitening(self.embedder(texts)))

    def search(self, query: str, num_results: int) -> list[Hit]:
        """
        The texts nearest to a query, the nearest first.

        Raises:
            ValueError: if the query has no tokens.
        """
        if not query.strip():
            raise ValueError("The query is empty: what should be found?")
        return best_hits(self.vectors @ self.embed([query])[0], self.passages, num_results)


class WordIndex:
    """The same by counting words: TF-IDF of words and pairs of words, as in the probe."""

    def __init__(self, passages: dict[str, str]):
        self.passages = passages
        self.vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), token_pattern=r"(?u)\w+|[^\w\s]")
        self.vectors = self.vectorizer.fit_transform(passages)

    def search(self, query: str, num_results: int) -> list[Hit]:
        """The texts that share the most telling words with the query; none where they share none."""
        scores = torch.from_numpy((self.vectors @ self.vectorizer.transform([query]).T).toarray().ravel())
        return [hit for hit in best_hits(scores, self.passages, num_results) if hit.score > 0]


def best_hits(scores: Tensor, passages: dict[str, str], num_results: int) -> list[Hit]:
    best, places = scores.topk(min(num_results, len(passages)))
    texts = list(passages)
    hits = ((score, texts[place]) for score, place in zip(best.tolist(), places.tolist(), strict=True))
    return [Hit(score, text, passages[text]) for score, text in hits]


def hash_texts(passages: dict[str, str]) -> str:
    return hashlib.sha256("\0".join(passages).encode()).hexdigest()


# ---- models ----


def open_index(name: str, file: str | None = None, text_column_name: str | None = None) -> SearchIndex:
    """
    The index of texts as a model sees them: the saved one, or a new one, which is saved.

    Args:
        name: a folder or a name on the Hub; of the latter nothing is saved.
        file, text_column_name: as for `load_passages`.

    Raises:
        FileNotFoundError, ValueError: as `load_embedder` and `load_passages`.
    """
    passages = load_passages(file, text_column_name)
    embedder = load_embedder(name, flag="--model")
    path = index_path(name, file)
    index = SearchIndex.load(path, embedder, passages)
    if index is not None:
        return index
    index = SearchIndex.build(embedder, passages)
    if Path(name).is_dir():
        try:
            index.save(path)
        except OSError as error:  # a folder that may only be read
            logger.warning(f"The index is not saved, and is built again the next time: {error}")
    return index


def build_docstring_index(
    folder: str | Path, encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cache_dir: str | None = None
) -> None:
    """What the quickstart leaves in its folder, so that the first search need not wait."""
    embedder = Embedder(encoder, tokenizer, tokenizer.model_max_length)
    SearchIndex.build(embedder, load_docstrings(cache_dir)).save(index_path(folder))


def index_path(folder: str | Path, file: str | None = None) -> Path:
    name = DOCSTRINGS if file is None else Path(without_query(file)).name
    return Path(folder) / INDEX_FOLDER / f"{name}.safetensors"


# ---- the command ----


def format_hits(hits: list[Hit], width: int) -> list[str]:
    """A line for each, cut to `width` characters."""
    lines = []
    for hit in hits:
        line = " ".join(f"{hit.score:5.2f}  {f'[{hit.label}] ' if hit.label else ''}{hit.text[: 2 * width]}".split())
        line = printable(line)
        lines.append(line if len(line) <= width else f"{line[: width - 1]}…")
    return lines


def beside(left: list[str], right: list[str], width: int) -> list[str]:
    return [f"{a:<{width}}   {b}" for a, b in zip_longest(left, right, fillvalue="")]


def read_queries(query: str | None) -> Iterator[str]:
    """The query of the command line, or one for each line of the standard input."""
    if query is not None:
        yield query
        return
    prompt = "\nSearch for (Ctrl-D ends): " if sys.stdin.isatty() else ""
    with suppress(EOFError):
        while True:
            if line := input(prompt).strip():
                yield line


def add_text_flags(parser: argparse.ArgumentParser) -> None:
    """Those of `load_passages`."""
    parser.add_argument(
        "--file",
        help="texts: txt (one in each line), parquet, json, jsonl, csv or tsv; default: the docstrings of "
        "the libraries that are installed here",
    )
    parser.add_argument("--text_column_name", help="the column of --file that holds the texts; default: text")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("query", nargs="?", help="default: one query in each line of the standard input")
    parser.add_argument("--model", help="folder or Hub name of an encoder; default: the newest run under runs/")
    add_text_flags(parser)
    parser.add_argument("--num_results", type=at_least_one, default=5, help="answers to a query (default: 5)")
    parser.add_argument("--tfidf", action="store_true", help="show beside it what counting words finds")
    args = parser.parse_args()
    if args.query is not None and not args.query.strip():
        raise ValueError("The query is empty: what should be found?")
    logging.basicConfig(format="%(message)s")
    hide_what_loading_says()
    name = args.model or str(find_newest_run())
    index = open_index(name, args.file, args.text_column_name)
    words = WordIndex(index.passages) if args.tfidf else None
    print(f"{name}, {len(index.texts):,} {DOCSTRINGS if args.file is None else f'texts of {args.file}'}")
    columns = shutil.get_terminal_size((120, 24)).columns
    for query in read_queries(args.query):
        started = time.perf_counter()
        hits = index.search(query, args.num_results)
        seconds = time.perf_counter() - started
        print(f"\n{query!r} ({seconds:.2f} s)")
        if words is None:
            lines = format_hits(hits, columns)
        else:
            width = max(30, (columns - 3) // 2)
            lines = beside(
                ["By the encoder", *format_hits(hits, width)],
                ["By words (TF-IDF)", *(format_hits(words.search(query, args.num_results), width) or ["nothing"])],
                width,
            )
        print("\n".join(lines), flush=True)


if __name__ == "__main__":
    start(main)
