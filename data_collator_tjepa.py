"""From tokenized documents to one packed batch: masking strategies, mask drawing, packing, `DataCollatorForTJEPA`.

What is notable:

- All views of a batch are drawn at once with numpy; there is no Python loop over tokens, blocks or views. (What is
  hidden of a view becomes a text of its own, where `pooled_weight` asks for it, in a loop over views.)
- Randomness is a hash of (seed, epoch, document index, strategy, counter), not the state of a generator. So a
  document's masks do not depend on the batch it is in, on the number of workers or processes, or on a resume.
- The batch holds integers only, nearly all in tensors, and none of these grows with the square of a length.

Words: a *view* is one document under one strategy, that is its context tokens and its target blocks; a *slot* is one
hidden position of one block. The collator does not know any model.
"""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch


# --- Masking strategies ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MaskingStrategy:
    """
    Which positions of a document become targets (the reference's parameters; UL2, arXiv 2205.05131).

    Args:
        target_block_size_mean (`float`, *optional*): mean tokens of a target block; `None`: one of the whole budget.
        target_block_size_std (`float`, *optional*):
            `None`: every block has the mean length. Otherwise lengths are drawn from a normal distribution, rounded,
            and clipped to [1, budget]. Either way the last block shrinks to what is left of the budget.
        max_target_mask_ratio (`float`, defaults to 0.25):
            At most this share of a document's n tokens becomes targets: the budget is max(1, floor(n * ratio)).
        max_target_mask_start_ratio (`float`, defaults to 0.0): blocks lie in [ceil(n * this), n) only.
        target_block_num (`int`, *optional*): at most so many blocks; `None`: as many as fill the budget.
        max_context_ratio (`float`, defaults to 1.0):
            The context keeps at most this share of the document's tokens, sampled from the visible ones.

    Raises:
        ValueError: for values out of range.
    """

    target_block_size_mean: float | None
    target_block_size_std: float | None = None
    max_target_mask_ratio: float = 0.25
    max_target_mask_start_ratio: float = 0.0
    target_block_num: int | None = None
    max_context_ratio: float = 1.0

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            optional = field.name in ("target_block_size_mean", "target_block_size_std", "target_block_num")
            if value is None and optional:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                allowed = "a number or null" if optional else "a number"
                raise ValueError(f"{field.name} must be {allowed}, got {value!r}.")
        mean, std, number = self.target_block_size_mean, self.target_block_size_std, self.target_block_num
        if mean is not None and mean < 1:
            raise ValueError(f"target_block_size_mean must be at least 1 token, got {mean}.")
        if std is not None and (std < 0 or mean is None):
            raise ValueError(f"target_block_size_std must be 0 or more, with a target_block_size_mean, got {std}.")
        if not std and mean is not None and mean != int(mean):
            raise ValueError(f"target_block_size_mean must be whole without target_block_size_std, got {mean}.")
        for name in ("max_target_mask_ratio", "max_context_ratio"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be in (0, 1], got {getattr(self, name)}.")
        if not 0.0 <= self.max_target_mask_start_ratio < 1.0:
            raise ValueError(f"max_target_mask_start_ratio must be in [0, 1), got {self.max_target_mask_start_ratio}.")
        if number is not None and (number < 1 or number != int(number)):
            raise ValueError(f"target_block_num must be a whole number of at least 1, got {number}.")

    @classmethod
    def from_dict(cls, values: dict) -> "MaskingStrategy":
        """A strategy from a mapping; an unknown key is an error (the reference ignored misspelled ones)."""
        if not isinstance(values, dict):
            raise ValueError(f"A masking strategy is a mapping of {[f.name for f in fields(cls)]}, got {values!r}.")
        allowed = [field.name for field in fields(cls)]
        if unknown := sorted(map(str, set(values) - set(allowed))):
            raise ValueError(f"Unknown masking strategy keys {unknown}; allowed are {allowed}.")
        if "target_block_size_mean" not in values:
            raise ValueError("A masking strategy needs target_block_size_mean (a number of tokens, or null).")
        return cls(**values)

    @property
    def name(self) -> str:
        """Name for logs, such as `block8_ratio0.5` or `blockall_ratio0.25_start0.75`: one for each set of values."""
        whole = self.target_block_size_mean is None  # then there is one block, whatever their number may be
        parts = {
            "block": "all" if whole else self.target_block_size_mean,
            "std": self.target_block_size_std,
            "ratio": self.max_target_mask_ratio,
            "start": self.max_target_mask_start_ratio or None,
            "num": None if whole else self.target_block_num,
            "context": self.max_context_ratio if self.max_context_ratio < 1 else None,
        }
        # 15 digits tell apart any two numbers that somebody would write
        return "_".join(f"{k}{v if v == 'all' else format(v, '.15g')}" for k, v in parts.items() if v is not None)


MASKING_PRESETS = {
    "ul2": [
        *(  # R denoising, and X denoising by high rates and by long spans
            MaskingStrategy(length, max_target_mask_ratio=ratio)
            for length, ratio in ((3, 0.25), (8, 0.25), (3, 0.5), (8, 0.5), (64, 0.15), (64, 0.5))
        ),
        # S denoising: the last quarter from the rest
        MaskingStrategy(None, max_target_mask_ratio=0.25, max_target_mask_start_ratio=0.75, target_block_num=1),
    ],
    # for small encoders on short pieces of text (docs/learning_log.md); the last one for `pooled_weight`
    "single_tokens": [MaskingStrategy(target_block_size_mean=1, max_target_mask_ratio=0.3)],
    "short_blocks": [MaskingStrategy(target_block_size_mean=4, max_target_mask_ratio=0.5)],
    "second_half": [MaskingStrategy(None, max_target_mask_ratio=0.5, max_target_mask_start_ratio=0.5)],
}


# --- Drawing ---------------------------------------------------------------------------------------------------------


@dataclass
class Views:
    """
    Views in flat arrays, ordered by view; a token is named by its index in the concatenated documents. In `slot_*`
    the blocks of a view stand one after the other, numbered from 1.
    """

    document: np.ndarray  # [num_views] which document
    strategy: np.ndarray  # [num_views] which strategy
    context_token: np.ndarray  # [num_contexts]
    context_view: np.ndarray  # [num_contexts]
    slot_token: np.ndarray  # [num_slots]
    slot_view: np.ndarray  # [num_slots]
    slot_block: np.ndarray  # [num_slots]


def mix_bits(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al., 2014), elementwise: uint64 to well mixed uint64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def hash_keys(*parts: np.ndarray | int) -> np.ndarray:
    """One well mixed uint64 for every tuple of integers (arrays broadcast)."""
    key = np.zeros(1, dtype=np.uint64)  # one-dimensional: numpy warns when scalars overflow, and here they shall
    for part in parts:
        key = mix_bits((key ^ np.asarray(part).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15))
    return key


def uniform(keys: np.ndarray, counters: np.ndarray) -> np.ndarray:
    """Uniform float64 in [0, 1), one for every (key, counter)."""
    bits = mix_bits(keys + counters.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return (bits >> np.uint64(11)) * 2.0**-53


def ragged_arange(counts: np.ndarray) -> np.ndarray:
    """0..counts[0]-1, 0..counts[1]-1, ... in one array."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


# Separate random streams of one view
BLOCK_LENGTHS, BLOCK_STARTS, CONTEXT_SAMPLE = range(3)


def draw_block_lengths(
    budget: np.ndarray, mean: np.ndarray, std: np.ndarray, max_blocks: np.ndarray, keys: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """
    Lengths of the target blocks: of each view as many as fill its budget of tokens (int [num_views], at least 1), the
    last one shrunk to what is left, or its first `max_blocks` (int [num_views]). `mean`, `std` (float [num_views]) are
    those of the length in tokens, a mean of inf is one block of the whole budget; `keys` (uint64 [num_views]) random.
    Returns lengths, int [total blocks], ordered by view, and how many each view has, int [num_views].
    """
    fixed_length = np.minimum(mean, budget).astype(np.int64)
    draws = np.minimum(max_blocks, np.where(std > 0, budget, -(-budget // fixed_length)))  # rounded up
    view = np.repeat(np.arange(len(budget)), draws)
    lengths = fixed_length[view]
    varies = std[view] > 0
    if varies.any():  # Box-Muller
        counter = 2 * ragged_arange(draws)[varies]
        key = hash_keys(keys[view[varies]], BLOCK_LENGTHS)
        radius = np.sqrt(-2.0 * np.log1p(-uniform(key, counter)))
        normal = radius * np.cos(2.0 * np.pi * uniform(key, counter + 1))
        drawn = np.rint(mean[view[varies]] + std[view[varies]] * normal)
        lengths[varies] = np.clip(drawn, 1, budget[view[varies]]).astype(np.int64)
    before = np.cumsum(lengths) - lengths
    left = budget[view] - (before - np.repeat(before[np.cumsum(draws) - draws], draws))
    taken = left > 0
    return np.minimum(lengths, left)[taken], np.bincount(view[taken], minlength=len(budget))


def draw_block_starts(
    lengths: np.ndarray, num_blocks: np.ndarray, first: np.ndarray, end: np.ndarray, keys: np.ndarray
) -> np.ndarray:
    """
    Starts of non-overlapping blocks in [first, end), every arrangement of the gaps equally likely: k of the
    (free tokens + k) places are chosen, and each is then widened to its block's length. `lengths` and `num_blocks` are
    those of `draw_block_lengths`, the others [num_views]. Returns positions, int [total blocks], ascending in a view.
    """
    num_views = len(num_blocks)
    view_of_block = np.repeat(np.arange(num_views), num_blocks)
    lengths_before = np.cumsum(lengths) - lengths
    lengths_before -= np.repeat(lengths_before[np.cumsum(num_blocks) - num_blocks], num_blocks)
    covered = np.bincount(view_of_block, weights=lengths, minlength=num_views).astype(np.int64)

    num_places = end - first - covered + num_blocks
    view_of_place = np.repeat(np.arange(num_views), num_places)
    place = ragged_arange(num_places)
    # views first, then random: the first num_blocks places of every view are a sample without replacement
    order = np.argsort(view_of_place + uniform(hash_keys(keys, BLOCK_STARTS)[view_of_place], place))
    chosen = np.sort(order[place < num_blocks[view_of_place]])
    return first[view_of_block] + place[chosen] - ragged_arange(num_blocks) + lengths_before


def find_recurring(
    documents: list[np.ndarray],
    document: np.ndarray,
    block_view: np.ndarray,
    block_start: np.ndarray,
    block_length: np.ndarray,
) -> np.ndarray:
    """
    Which tokens belong to an occurrence of one of their view's target blocks of two tokens or more.

    Equal windows get equal ranks by prefix doubling (Karp, Miller and Rosenberg, 1972): two are equal if their first
    and their last 2^k tokens are. Time and memory grow with the tokens of the views, not with the occurrences.

    Args:
        document (int [num_views]): which of the documents, token ids.
        block_view, block_start, block_length (int [num_blocks]): view, position in the document, and tokens.

    Returns:
        bool [tokens of all views, one after the other]: True in every occurrence, the blocks themselves included.
    """
    lengths = np.array([len(tokens) for tokens in documents], dtype=np.int64)
    document_starts, num_tokens = np.cumsum(lengths) - lengths, lengths.sum()
    shift = np.cumsum(lengths[document]) - lengths[document] - document_starts[document]  # from a token to the views'
    tokens = np.unique(np.concatenate(documents), return_inverse=True)[1]
    # the first ranks differ between documents, and so do all later ones
    ranks, width = tokens + np.repeat(np.arange(len(documents)), lengths) * (tokens.max() + 1), 1
    changes = np.zeros(lengths[document].sum() + 1, dtype=np.int64)  # +1 where an occurrence starts, -1 behind it
    for length in np.unique(block_length[block_length >= 2]).tolist():
        while 2 * width <= length:
            ranks, width = np.unique(ranks[:-width] * num_tokens + ranks[width:], return_inverse=True)[1], 2 * width
        view = block_view[block_length == length]
        start = document_starts[document[view]] + block_start[block_length == length]
        searched = np.unique(document[view])
        num_windows = lengths[searched] - length + 1
        window = np.repeat(document_starts[searched], num_windows) + ragged_arange(num_windows)

        key, window_key = (ranks[at] * num_tokens + ranks[at + length - width] for at in (start, window))
        key, view = np.unique(np.stack([key, view]), axis=1)  # by key; a view's equal blocks count once
        low = np.searchsorted(key, window_key, side="left")
        counts = np.searchsorted(key, window_key, side="right") - low
        found = np.repeat(window, counts) + shift[view[np.repeat(low, counts) + ragged_arange(counts)]]
        changes[found] += 1
        changes[found + length] -= 1
    return np.cumsum(changes[:-1]) > 0


def draw_views(
    documents: list[np.ndarray],
    keys: np.ndarray,
    strategies: list[MaskingStrategy],
    mask_recurring_targets: bool = False,
    views_per_document: int | None = None,
    in_place: bool = False,
) -> Views:
    """
    Draws the masks of all documents (token ids, int [n] with n >= 2) under all strategies, or `views_per_document` of
    them; with `in_place` every token is context. A document's views depend on its key (uint64 [num_documents]) and
    its tokens only.
    """
    num_documents, num_strategies = len(documents), len(strategies)
    lengths = np.array([len(document) for document in documents], dtype=np.int64)
    document_starts = np.concatenate([[0], np.cumsum(lengths)])

    document = np.repeat(np.arange(num_documents), num_strategies)
    strategy = np.tile(np.arange(num_strategies), num_documents)
    if views_per_document is not None and views_per_document < num_strategies:
        shuffled = np.argsort(hash_keys(keys[:, None], -1, np.arange(num_strategies)), axis=1)
        chosen = np.sort(shuffled[:, :views_per_document], axis=1)
        document, strategy = np.repeat(np.arange(num_documents), views_per_document), chosen.reshape(-1)
    num_views, n, view_key = len(document), lengths[document], hash_keys(keys[document], strategy)

    def parameter(name: str, default: float = 0.0) -> np.ndarray:
        values = [getattr(s, name) for s in strategies]
        return np.array([default if value is None else value for value in values], dtype=np.float64)[strategy]

    def floor_of_share(tokens: np.ndarray, name: str) -> np.ndarray:
        """floor(tokens * ratio) of each view, exact for the decimal that was written: 50 * 0.58 is 29, not 28.99."""
        ratios = [Fraction(str(getattr(s, name))) for s in strategies]
        # Python's integers, because those of numpy overflow at a ratio of many digits
        numerator, denominator = np.array([[r.numerator, r.denominator] for r in ratios], dtype=object).T
        return (tokens.astype(object) * numerator[strategy] // denominator[strategy]).astype(np.int64)

    first = np.minimum(-floor_of_share(-n, "max_target_mask_start_ratio"), n - 1)  # rounded up
    budget = np.maximum(1, floor_of_share(n, "max_target_mask_ratio"))
    budget = np.minimum(budget, np.minimum(n - 1, n - first))  # one token stays for the context
    whole = np.array([s.target_block_size_mean is None for s in strategies])[strategy]
    max_blocks = np.where(whole, 1, np.minimum(parameter("target_block_num", np.inf), budget)).astype(np.int64)
    block_length, num_blocks = draw_block_lengths(
        budget, parameter("target_block_size_mean", np.inf), parameter("target_block_size_std"), max_blocks, view_key
    )
    block_start = draw_block_starts(block_length, num_blocks, first, n, view_key)
    block_view = np.repeat(np.arange(num_views), num_blocks)

    view_starts = np.cumsum(n) - n  # in the concatenation of whole documents, one per view
    slot_view = np.repeat(block_view, block_length)
    slot_position = np.repeat(block_start, block_length) + ragged_arange(block_length)
    slot_block = np.repeat(ragged_arange(num_blocks) + 1, block_length)
    visible = np.ones(n.sum(), dtype=bool)
    visible[view_starts[slot_view] + slot_position] = in_place

    if mask_recurring_targets and num_views:
        not_copied = visible & ~find_recurring(documents, document, block_view, block_start, block_length)
        emptied = np.add.reduceat(not_copied, view_starts) == 0
        if emptied.any():  # all that is visible repeats a target: the first of it stays
            visible_places = np.flatnonzero(visible)
            not_copied[visible_places[np.searchsorted(visible_places, view_starts[emptied])]] = True
        visible = not_copied

    if (parameter("max_context_ratio") < 1).any():
        place_view = np.repeat(np.arange(num_views), n)[visible]
        position = ragged_arange(n)[visible]
        order = np.argsort(place_view + uniform(hash_keys(view_key, CONTEXT_SAMPLE)[place_view], position))
        max_context = np.maximum(1, floor_of_share(n, "max_context_ratio"))
        num_visible = np.bincount(place_view, minlength=num_views)
        dropped = order[ragged_arange(num_visible) >= max_context[place_view]]
        visible[np.flatnonzero(visible)[dropped]] = False

    context_place = np.flatnonzero(visible)
    context_view = np.repeat(np.arange(num_views), n)[context_place]
    return Views(
        document=document,
        strategy=strategy,
        context_token=context_place + (document_starts[document] - view_starts)[context_view],
        context_view=context_view,
        slot_token=document_starts[document[slot_view]] + slot_position,
        slot_view=slot_view,
        slot_block=slot_block,
    )


def add_special_tokens(
    documents: list[np.ndarray], views: Views, prefix: Sequence[int], suffix: Sequence[int]
) -> tuple[list[np.ndarray], Views]:
    """Documents between special tokens, which every view sees and none predicts; the masks do not depend on them."""
    num_special = len(prefix) + len(suffix)
    lengths = np.array([len(document) for document in documents], dtype=np.int64) + num_special
    ends = np.cumsum(lengths)
    first, last = (ends - lengths)[:, None] + np.arange(len(prefix)), ends[:, None] - np.arange(len(suffix), 0, -1)
    special = np.concatenate([first, last], axis=1)[views.document]  # [num_views, num_special]
    shift = (np.arange(len(documents)) * num_special + len(prefix))[views.document]  # of the tokens between them
    token = np.concatenate([views.context_token + shift[views.context_view], special.ravel()])
    view = np.concatenate([views.context_view, np.repeat(np.arange(len(special)), num_special)])
    order = np.lexsort((token, view))
    slots = views.slot_token + shift[views.slot_view]
    views = replace(views, context_token=token[order], context_view=view[order], slot_token=slots)
    return [np.concatenate([prefix, document, suffix]).astype(np.int64) for document in documents], views


# --- Packing ---------------------------------------------------------------------------------------------------------


LONGEST_ROW = 4096  # of the lengths that are chosen: the block mask of a row is built from (length / 128)^2 blocks
ROW_STEP = 128  # flex_attention's blocks; and a compiled model sees few lengths
RowLength = int | Literal["auto"] | None
SpecialTokens = tuple[Sequence[int], Sequence[int]]  # before and behind a text


def fill_rows(lengths: np.ndarray, row_length: int, order: np.ndarray) -> tuple[np.ndarray, int]:
    """Best fit in the order given: where each sequence starts in the flattened rows, and the number of rows."""
    starts, num_rows = np.zeros_like(lengths), 0
    free = []  # (tokens left, row), ascending: the first that is large enough fits best
    for sequence, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        at = bisect.bisect_left(free, (length,))
        if at < len(free):
            space, row = free.pop(at)
        else:
            space, row = row_length, num_rows
            num_rows += 1
        starts[sequence] = (row + 1) * row_length - space
        bisect.insort(free, (space - length, row))
    return starts, max(1, num_rows)


def pack_rows(lengths: np.ndarray, row_length: RowLength, order: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """
    Places sequences of `lengths` (int [num_sequences], tokens) in rows, in the `order` given: by default in one row,
    exactly as long as all together; else in rows of `row_length`, filled by best fit. `"auto"`: of the multiples of
    128 up to 4,096 (or the longest sequence) a length that leaves little padding. Returns where each sequence starts
    in the flattened rows, and their shape (num_rows, row_length).
    """
    total, longest = int(lengths.sum()), int(lengths.max(initial=0))
    if row_length is None:
        row_length = max(1, total)
    elif row_length == "auto":
        # as few rows as can be, as equal as can be; some steps more where that leaves a remainder for one row more
        limit = max(LONGEST_ROW, -(-longest // ROW_STEP) * ROW_STEP)
        fewest_rows = max(1, math.ceil(total / limit))
        shortest = max(1, math.ceil(max(longest, total / fewest_rows) / ROW_STEP)) * ROW_STEP
        candidates = range(shortest, min(shortest + 3 * ROW_STEP, limit) + 1, ROW_STEP)
        row_length = min(candidates, key=lambda candidate: fill_rows(lengths, candidate, order)[1] * candidate)
    elif longest > row_length:
        raise ValueError(
            f"A sequence of {longest} tokens does not fit into rows of row_length={row_length}: raise it, or "
            f"truncate documents to max_length={row_length} when tokenizing."
        )
    starts, num_rows = fill_rows(lengths, row_length, order)
    return starts, (num_rows, row_length)


def group_equal_shapes(
    starts: np.ndarray, num_contexts: np.ndarray, num_slots: np.ndarray, shape: tuple[int, int]
) -> list[tuple[int, int, int]]:
    """
    int [num_sequences] each, where sequences start in rows of this shape and what they have -> (number of neighbours
    of equal shape, contexts, slots). Padding counts as sequences, none longer than the longest of the others.
    """
    order, ones, lengths = np.argsort(starts, kind="stable"), np.ones_like(starts), num_contexts + num_slots
    gaps, longest = np.diff(starts[order], append=math.prod(shape)) - lengths[order], lengths.max(initial=1)
    padding = [gaps // longest, longest * ones, 0 * ones, ones, gaps % longest, 0 * ones]
    runs = np.stack([ones, num_contexts[order], num_slots[order], *padding], axis=1).reshape(-1, 3)
    runs = runs[runs[:, 0] * runs[:, 1:].sum(axis=1) > 0]
    changes = np.flatnonzero(np.diff(runs[:, 1:], axis=0, prepend=-1).any(axis=1))
    sizes = np.add.reduceat(runs[:, 0], changes) if len(runs) else changes
    return [(size, *of_one) for size, of_one in zip(sizes.tolist(), runs[changes, 1:].tolist(), strict=True)]


def pack_batch(
    documents: list[np.ndarray],
    views: Views,
    num_strategies: int,
    row_length: RowLength = None,
    in_place: bool = False,
) -> dict[str, torch.Tensor]:
    """
    The packed rows that `TJEPAForPreTraining.forward` takes (see there for names and shapes), from the token ids of
    each document and their views; for `row_length` see `pack_rows`, for `in_place` `draw_views`.
    """
    num_views = len(views.document)
    lengths = np.array([len(document) for document in documents], dtype=np.int64)
    num_contexts = np.bincount(views.context_view, minlength=num_views)
    num_slots = np.bincount(views.slot_view, minlength=num_views)
    # Longest first packs best, and views of equal shape side by side are attended to as one batch.
    view_order = np.lexsort((num_slots, num_contexts))[::-1]
    document_order = np.argsort(-lengths, kind="stable")
    document_starts, document_shape = pack_rows(lengths, row_length, document_order)
    context_starts, context_shape = pack_rows(num_contexts, row_length, view_order)
    entry_row_length = None if in_place else row_length  # a stream that nobody reads in place
    prediction_starts, prediction_shape = pack_rows(num_contexts + num_slots, entry_row_length, view_order)
    view_groups = SimpleNamespace(  # plain integers, in what nobody moves to a device
        documents=group_equal_shapes(document_starts, lengths, 0 * lengths, document_shape),
        contexts=group_equal_shapes(context_starts, num_contexts, 0 * num_contexts, context_shape),
        predictions=group_equal_shapes(prediction_starts, num_contexts, num_slots, prediction_shape),
    )

    token_position = ragged_arange(lengths)
    token_place = np.repeat(document_starts, lengths) + token_position  # index in stream 1
    context_order = ragged_arange(num_contexts)
    context_place = np.repeat(context_starts, num_contexts) + context_order  # index in stream 2
    context_entry = np.repeat(prediction_starts, num_contexts) + context_order  # index in stream 3
    slot_entry = np.repeat(prediction_starts + num_contexts, num_slots) + ragged_arange(num_slots)
    entries = np.concatenate([context_entry, slot_entry])

    def rows(shape: tuple[int, int], places: np.ndarray, values: np.ndarray, padding: int) -> torch.Tensor:
        stream = np.full(shape[0] * shape[1], padding, dtype=np.int32)  # half the bytes of int64 to move
        stream[places] = values
        return torch.from_numpy(stream.reshape(shape))

    tokens = np.concatenate(documents) if documents else np.zeros(0, dtype=np.int64)
    entry_position = token_position[np.concatenate([views.context_token, views.slot_token])]
    entry_view = np.concatenate([views.context_view, views.slot_view])
    slot_strategy = views.strategy[views.slot_view]
    in_order = np.argsort(slot_entry)  # the model takes the slots as they lie in the rows
    hidden_place = np.repeat(context_starts, num_slots) + token_position[views.slot_token]  # where a view is whole
    return {
        "input_ids": rows(document_shape, token_place, tokens, 0),
        "position_ids": rows(document_shape, token_place, token_position, 0),
        "document_ids": rows(document_shape, token_place, np.repeat(np.arange(len(documents)), lengths), -1),
        "context_indices": rows(context_shape, context_place, token_place[views.context_token], 0),
        "context_view_ids": rows(context_shape, context_place, views.context_view, -1),
        "prediction_indices": rows(prediction_shape, context_entry, context_place, 0),
        "prediction_position_ids": rows(prediction_shape, entries, entry_position, 0),
        "prediction_view_ids": rows(prediction_shape, entries, entry_view, -1),
        "prediction_block_ids": rows(prediction_shape, slot_entry, views.slot_block, 0),
        "slot_indices": torch.from_numpy(slot_entry[in_order].astype(np.int32)),
        "label_indices": torch.from_numpy(token_place[views.slot_token[in_order]].astype(np.int32)),
        "slot_strategy_ids": torch.from_numpy(slot_strategy[in_order].astype(np.int32)),
        "slots_per_strategy": torch.from_numpy(np.bincount(slot_strategy, minlength=num_strategies)),
        **({"hidden_indices": torch.from_numpy(hidden_place[in_order].astype(np.int32))} if in_place else {}),
        "tokens_per_document": torch.from_numpy(lengths.astype(np.int32)),
        "view_groups": view_groups if documents else None,
    }


def pack_hidden_parts(
    documents: list[np.ndarray], views: Views, special_tokens: SpecialTokens, row_length: RowLength
) -> dict:
    """What is hidden of each view as a text of its own: stream 1, with the views' numbers; and their documents."""
    tokens = np.concatenate([np.zeros(0, dtype=np.int64), *documents])[views.slot_token]
    parts = np.split(tokens, np.bincount(views.slot_view).cumsum()[:-1]) if documents else []
    parts = [np.concatenate([special_tokens[0], part, special_tokens[1]]).astype(np.int64) for part in parts]
    batch = pack_batch(parts, Views(*[np.zeros(0, dtype=np.int64)] * 7), 0, row_length)
    kept = {name: batch[name] for name in ("input_ids", "position_ids", "document_ids", "view_groups")}
    return {**kept, "view_documents": torch.from_numpy(views.document.astype(np.int32))}


class DataCollatorForTJEPA:
    """
    Makes the packed batch of `TJEPAForPreTraining` from the examples of a `DocumentDataset` or `DocumentStream`. Use
    it with `remove_unused_columns=False`, and without accelerate's `dispatch_batches` and `split_batches`: the tensors
    of a batch belong together and differ in their first dimension.

    Args:
        strategies (`list[MaskingStrategy | dict]`, *optional*): by default UL2; every document under each of them.
        seed (`int`, defaults to 0): masks are a pure function of (seed, epoch, document index).
        row_length (`int` or `"auto"`, *optional*):
            Rows of this many tokens, or of a length that suits the batch (`pack_rows`), as `flex_attention` and
            `torch.compile` like them. By default each stream is one row without padding, which is best for `sdpa`.
        mask_recurring_targets (`bool`, defaults to `False`):
            Hide from the context every other occurrence of a target block of two tokens or more: no copied answers.
        views_per_document (`int`, *optional*): draw so many of the strategies for each document instead of all.
        special_tokens (`tuple[Sequence[int], Sequence[int]]`): ids before and behind each document, always visible.
    """

    def __init__(
        self,
        strategies: list[MaskingStrategy] | None = None,
        seed: int = 0,
        row_length: RowLength = None,
        mask_recurring_targets: bool = False,
        views_per_document: int | None = None,
        special_tokens: SpecialTokens = ((), ()),
    ):
        strategies = MASKING_PRESETS["ul2"] if strategies is None else strategies
        self.strategies = [s if isinstance(s, MaskingStrategy) else MaskingStrategy.from_dict(s) for s in strategies]
        if not (most := len(self.strategies)):
            raise ValueError("DataCollatorForTJEPA needs at least one masking strategy.")
        if views_per_document is not None and not 1 <= views_per_document <= most:
            raise ValueError(f"views_per_document: 1 to {most}, one for each strategy, got {views_per_document}.")
        self.seed, self.row_length, self.views_per_document = seed, row_length, views_per_document
        self.mask_recurring_targets, self.special_tokens = mask_recurring_targets, special_tokens
        self.in_place = self.hidden_parts = False
        self._num_dropped_documents = torch.zeros((), dtype=torch.int64).share_memory_()  # workers count too

    def fit_to(self, config) -> None:
        """
        To a `TJEPAConfig`: with `predictor_type="in_place"` hidden tokens keep their places (a `ValueError` where
        others lose them), and for `pooled_weight` what is hidden is handed out as texts, too.
        """
        self.in_place, self.hidden_parts = config.predictor_type == "in_place", config.pooled_weight > 0
        if self.in_place and (self.mask_recurring_targets or any(s.max_context_ratio < 1 for s in self.strategies)):
            raise ValueError("In place every token is read: leave out mask_recurring_targets and max_context_ratio.")

    @property
    def num_dropped_documents(self) -> int:
        """Documents of fewer than two tokens so far: they hold nothing to predict from, so they were dropped."""
        return int(self._num_dropped_documents)

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        """
        `examples` have `input_ids` (int [n]), `document_index`, `epoch` (int), else a `ValueError`. `None` stands for
        no document: where there are fewer than processes, and in what a resumed stream skips.
        """
        examples = [example for example in examples if example is not None]
        for key in ("input_ids", "document_index", "epoch"):
            if lacking := [example for example in examples if key not in example]:
                raise ValueError(
                    f"The collator needs {key!r} in every example, got {sorted(lacking[0])}. Wrap the tokenized data "
                    "in DocumentDataset (or DocumentStream), and set remove_unused_columns=False in TrainingArguments."
                )
        kept = [example for example in examples if len(example["input_ids"]) >= 2]
        self._num_dropped_documents += len(examples) - len(kept)
        documents = [np.asarray(example["input_ids"], dtype=np.int64) for example in kept]
        epochs = np.array([example["epoch"] for example in kept], dtype=np.int64)
        indices = np.array([example["document_index"] for example in kept], dtype=np.int64)
        return self.collate(documents, hash_keys(self.seed, epochs, indices))

    def collate(self, documents: list[np.ndarray], keys: np.ndarray) -> dict[str, torch.Tensor]:
        """From the token ids of each document and its random key (uint64 [num_documents]) to the batch."""
        options = (self.mask_recurring_targets, self.views_per_document, self.in_place)
        views = draw_views(documents, keys, self.strategies, *options)
        if documents and any(self.special_tokens):
            documents, views = add_special_tokens(documents, views, *self.special_tokens)
        batch = pack_batch(documents, views, len(self.strategies), self.row_length, self.in_place)
        if self.hidden_parts:
            batch["hidden_parts"] = pack_hidden_parts(documents, views, self.special_tokens, self.row_length)
        return batch
