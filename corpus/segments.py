"""Documents in segments: each is encoded by itself, and hidden ones are predicted from the visible ones."""

import numpy as np
import torch

from ..data_collator_tjepa import (
    DataCollatorForTJEPA,
    MaskingStrategy,
    draw_views,
    hash_keys,
    pack_batch,
    ragged_arange,
)


SHORTEST_SEGMENT = 4  # tokens: halves of a document that is one token too long still have two
EVERY_SECOND = MaskingStrategy(1, max_target_mask_ratio=0.5)  # segment is hidden, at random
SEGMENTS = 2**32  # the random stream of hidden segments, beside those of masking strategies


def cut_into_segments(documents: list[np.ndarray], segment_length: int) -> tuple[list[np.ndarray], np.ndarray]:
    """
    Documents (int [n] each) in as few pieces of at most `segment_length` tokens as can be, as even as can be.

    Returns:
        The pieces, and int [num_documents], how many each document has.
    """
    counts = np.array([-(-len(document) // segment_length) for document in documents], dtype=np.int64)
    pieces = [np.array_split(document, count) for document, count in zip(documents, counts, strict=True)]
    return [piece for of_document in pieces for piece in of_document], counts


class SegmentCollator(DataCollatorForTJEPA):
    """
    The batch of `DataCollatorForTJEPA` in which each segment is a document. Its `segments` is a batch one level up,
    whose documents are those of two segments or more, and whose token ids are the numbers of their segments.

    Args:
        segment_length (`int`): the most tokens that a segment has.
        kwargs: as of [`DataCollatorForTJEPA`].
    """

    def __init__(self, *args, segment_length: int, **kwargs):
        super().__init__(*args, **kwargs)
        if segment_length < SHORTEST_SEGMENT:
            raise ValueError(f"segment_length must be at least {SHORTEST_SEGMENT} tokens, got {segment_length}.")
        self.segment_length = segment_length

    def collate(self, documents: list[np.ndarray], keys: np.ndarray) -> dict[str, torch.Tensor]:
        pieces, counts = cut_into_segments(documents, self.segment_length)
        batch = super().collate(pieces, hash_keys(np.repeat(keys, counts), ragged_arange(counts)))
        numbers = np.split(np.arange(counts.sum()), np.cumsum(counts)[:-1])
        has_several = np.flatnonzero(counts >= 2)
        longer = [numbers[document] for document in has_several]
        views = draw_views(longer, hash_keys(keys[has_several], SEGMENTS), [EVERY_SECOND])
        row_length = None if self.row_length is None else "auto"
        return {**batch, "segments": pack_batch(longer, views, 1, row_length)}
