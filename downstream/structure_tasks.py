"""Tasks on the order of sentences and segments, in which a bag of words cannot win.

Pair order and position are those of DiscoEval (Chen et al., arXiv 1909.00142): a linear probe on the sentences'
vectors, their differences and products. Retrieval trains nothing: is the next segment of a book the nearest one?
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.sparse import hstack, issparse
from sklearn.preprocessing import normalize


PAIR_ORDER, POSITION, RETRIEVAL, MINIMAL_PAIRS = "pair order", "position", "retrieval", "minimal pairs"
COMBINED = (PAIR_ORDER, POSITION)  # a row of these is several sentences, whose vectors are combined for one probe
QUERIES_AT_ONCE = 1024


def rows_of_sentences(splits: dict[str, dict[str, list]]) -> dict[str, list[list[str]]]:
    """
    The sentences of each row of a task of pair order or position, as many in every row of every split: a row that has
    fewer gets its first again, whose difference to the first is 0.
    """
    rows = {
        split: columns.get("sentences") or list(zip(columns["sentence1"], columns["sentence2"], strict=True))
        for split, columns in splits.items()
    }
    longest = max(len(row) for of_split in rows.values() for row in of_split)
    return {split: [[*row, *row[:1] * (longest - len(row))] for row in of_split] for split, of_split in rows.items()}


def number_equal_sets(rows: Sequence[Sequence[str]]) -> list[int]:
    """Rows of the same texts in any order share a number, from 0 up."""
    numbers = {}
    return [numbers.setdefault(frozenset(row), len(numbers)) for row in rows]


def combine(kind: str, sentences: Sequence[Any]) -> Any:
    """
    The features of rows of sentences: [u, v, u - v, u * v] of pairs, else [s0, s0 - s1, s0 - s2, ...].

    Args:
        kind: `"pair order"` or `"position"`.
        sentences: for each place in a row the vectors `[num_rows, width]`, arrays or sparse.
    """
    first, *others = sentences
    blocks = [first, *(first - other for other in others)]
    if kind == PAIR_ORDER:
        (second,) = others
        product = first.multiply(second) if issparse(first) else first * second
        blocks = [first, second, first - second, product]
    return hstack(blocks, format="csr") if issparse(first) else np.hstack(blocks)


def next_segment_figures(vectors: Any, passages: np.ndarray, books: np.ndarray) -> dict[str, float]:
    """
    How near, by cosine, the next segment of a text is.

    Args:
        vectors: of the segments, `[num_segments, width]`, an array or sparse, those of a passage in their order.
        passages: int `[num_segments]`, the passage of each; the next of a segment is in the same passage.
        books: int `[num_segments]`, the book of each; a passage lies in one book.

    Returns:
        `mrr`, the mean reciprocal rank of the next among all other segments of the book, over all segments but the
        last of each passage, and `direction`, how often the next is nearer than the one before, over all segments
        that have both (without them there is no such key). Of equal cosines half count as nearer.
    """
    reciprocal_ranks, is_nearer = [], []
    for book in np.unique(books):
        rows = np.flatnonzero(books == book)
        of_book, passage = normalize(vectors[rows]), passages[rows]
        queries = np.flatnonzero(passage[:-1] == passage[1:])  # that have a next
        for start in range(0, len(queries), QUERIES_AT_ONCE):
            query = queries[start : start + QUERIES_AT_ONCE]
            cosines = of_book[query] @ of_book.T  # [queries, segments of the book]
            cosines = cosines.toarray() if issparse(cosines) else cosines
            of_next = np.take_along_axis(cosines, query[:, None] + 1, axis=1)
            of_previous = np.take_along_axis(cosines, query[:, None] - 1, axis=1)  # wrong for a first; not used
            np.put_along_axis(cosines, query[:, None], -np.inf, axis=1)  # a segment does not find itself
            num_equal = (cosines == of_next).sum(1) - 1
            reciprocal_ranks.append(1 / (1 + (cosines > of_next).sum(1) + num_equal / 2))
            has_previous = (query > 0) & (passage[query - 1] == passage[query])
            difference = (of_next - of_previous)[has_previous, 0]
            is_nearer.append((np.sign(difference) + 1) / 2)
    figures = {"mrr": float(np.concatenate(reciprocal_ranks).mean())}
    if len(of_both := np.concatenate(is_nearer)):
        figures["direction"] = float(of_both.mean())
    return figures


def mrr_of_a_guess(titles: Sequence[Any], segments: Sequence[Sequence[str]]) -> float:
    """The mean reciprocal rank of a random order, for the passages of a task of retrieval."""
    sizes = Counter()
    for title, row in zip(titles, segments, strict=True):
        sizes[title] += len(row)
    of_book = {title: float((1 / np.arange(1, size)).mean()) for title, size in sizes.items()}
    return float(np.average([of_book[title] for title in titles], weights=[len(row) - 1 for row in segments]))
