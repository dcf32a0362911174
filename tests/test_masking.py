"""Every property that DESIGN promises of masks, over random documents and strategies (hypothesis)."""

import json
import math
import time
import tracemalloc
from dataclasses import asdict
from fractions import Fraction

import numpy as np
import pytest
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helpers import make_examples
from tjepa.corpus.strategies import load_masking_strategies
from tjepa.corpus.streams import DocumentDataset
from tjepa.data_collator_tjepa import (
    MASKING_PRESETS,
    DataCollatorForTJEPA,
    MaskingStrategy,
    draw_views,
    hash_keys,
    pack_rows,
    uniform,
)


ratios = st.floats(0.01, 1.0)


@st.composite
def masking_strategies(draw, **fixed):
    mean = draw(st.one_of(st.none(), st.integers(1, 80)))
    std = None if mean is None else draw(st.one_of(st.none(), st.floats(0.0, 10.0)))
    values = {
        "target_block_size_mean": mean,
        "target_block_size_std": std,
        "max_target_mask_ratio": draw(ratios),
        "max_target_mask_start_ratio": draw(st.floats(0.0, 0.99)),
        "target_block_num": draw(st.one_of(st.none(), st.integers(1, 6))),
        "max_context_ratio": draw(ratios),
    }
    return MaskingStrategy(**{**values, **fixed})


documents_of_few_words = st.lists(
    st.lists(st.integers(0, 5), min_size=2, max_size=120).map(np.array), min_size=1, max_size=5
)
seeds = st.integers(0, 2**31)


def draw_one_by_one(documents, strategies, seed=0, **options):
    """`[(document, strategy, context positions, {block: positions})]`, in plain Python."""
    views = draw_views(documents, hash_keys(seed, np.arange(len(documents))), strategies, **options)
    starts = np.cumsum([0] + [len(document) for document in documents])
    result = []
    for view, (d, s) in enumerate(zip(views.document, views.strategy, strict=True)):
        blocks = {}
        for token, block in zip(
            views.slot_token[views.slot_view == view], views.slot_block[views.slot_view == view], strict=True
        ):
            blocks.setdefault(int(block), []).append(int(token - starts[d]))
        context = (views.context_token[views.context_view == view] - starts[d]).tolist()
        result.append((documents[d], strategies[s], context, blocks))
    return result


def test_random_numbers_are_those_of_splitmix64():
    """Known outputs, of the seed 1234567 and, the first one, of 0."""
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    drawn = uniform(np.array([1234567], dtype=np.uint64), np.arange(1, 6))
    assert drawn.tolist() == [(number >> 11) * 2.0**-53 for number in known]
    assert hash_keys(0).tolist() == [0xE220A8397B1DCDAF]
    several = uniform(hash_keys(3) ^ np.uint64(4), np.arange(1, 2))  # one part after the other
    assert (hash_keys(3, 4) >> np.uint64(11)).tolist() == (several * 2**53).tolist()


def test_the_masks_of_a_seed_stay():
    """From one version to the next: a run that goes on draws the masks that it would have drawn."""
    strategies = [MaskingStrategy(3, 1.5, 0.5), MaskingStrategy(4, None, 0.5, 0.25, 2, 0.3), MaskingStrategy(2)]
    views = draw_views([np.arange(24)], hash_keys(7, np.array([2]), np.array([11])), strategies)
    pictures = np.full((3, 24), "-")
    pictures[views.context_view, views.context_token] = "."
    pictures[views.slot_view, views.slot_token] = views.slot_block
    assert ["".join(picture) for picture in pictures] == [
        "..11222333.....4444.....",
        "..-.---1111-2222..----..",
        ".............11..22.33..",
    ]


# 13 and 22 tokens have budgets of 6 and 11: the last block of each shrinks to what is left, also behind another view
SHRINKING = [MaskingStrategy(4, None, 0.5), MaskingStrategy(4, 2.0, 0.5), MaskingStrategy(64, None, 0.5)]


@settings(max_examples=200, deadline=None)
@given(documents_of_few_words, st.lists(masking_strategies(), min_size=1, max_size=3), seeds)
@example([np.arange(13), np.arange(22)], SHRINKING, 0)
def test_blocks_and_context(documents, strategies, seed):
    views = draw_one_by_one(documents, strategies, seed)
    assert len(views) == len(documents) * len(strategies)
    for document, strategy, context, blocks in views:
        n = len(document)
        targets = [position for block in blocks.values() for position in block]
        budget = max(1, math.floor(n * Fraction(str(strategy.max_target_mask_ratio))))
        first = min(math.ceil(n * Fraction(str(strategy.max_target_mask_start_ratio))), n - 1)
        assert len(set(targets)) == len(targets) <= budget  # no overlap, within the budget
        assert targets and context  # at least one of each
        assert min(targets) >= first and max(targets) < n
        assert sorted(blocks) == list(range(1, len(blocks) + 1))
        for block in blocks.values():
            assert block == list(range(block[0], block[0] + len(block)))  # contiguous
        assert context == sorted(set(context)) and not set(context) & set(targets)
        assert len(context) <= max(1, math.floor(n * Fraction(str(strategy.max_context_ratio))))
        usable, lengths = min(budget, n - 1, n - first), [len(block) for block in blocks.values()]
        if strategy.target_block_num is None or len(blocks) < strategy.target_block_num:
            assert sum(lengths) == usable  # the last block takes what is left
        else:
            assert len(blocks) == strategy.target_block_num
        if strategy.target_block_size_mean is None:
            assert lengths == [usable]
        elif strategy.target_block_size_std is None:
            length = min(strategy.target_block_size_mean, usable)  # shrinks rather than vanishes
            expected = [length] * (usable // length) + [usable % length] * (usable % length > 0)
            assert lengths == expected[: strategy.target_block_num]


@settings(max_examples=100, deadline=None)
@given(documents_of_few_words, st.lists(masking_strategies(max_context_ratio=1.0), min_size=1, max_size=3), seeds)
def test_context_and_targets_are_the_document(documents, strategies, seed):
    for document, _, context, blocks in draw_one_by_one(documents, strategies, seed):
        targets = [position for block in blocks.values() for position in block]
        assert sorted(context + targets) == list(range(len(document)))


@settings(max_examples=150, deadline=None)
@given(documents_of_few_words, st.lists(masking_strategies(max_context_ratio=1.0), min_size=1, max_size=3), seeds)
def test_recurring_targets_leave_the_context(documents, strategies, seed):
    plain = draw_one_by_one(documents, strategies, seed)
    masked = draw_one_by_one(documents, strategies, seed, mask_recurring_targets=True)
    for (document, _, context, blocks), (_, _, remaining, same_blocks) in zip(plain, masked, strict=True):
        assert blocks == same_blocks  # copies do not become targets
        copies = set()
        for block in blocks.values():
            sequence = document[block].tolist()
            if len(sequence) >= 2:
                for start in range(len(document) - len(sequence) + 1):
                    if start != block[0] and document[start : start + len(sequence)].tolist() == sequence:
                        copies.update(range(start, start + len(sequence)))
        expected = sorted(set(context) - copies)
        assert remaining == (expected or context[:1])


@pytest.mark.parametrize("strategies", [MASKING_PRESETS["ul2"], [MaskingStrategy(8, 3.0, 0.5)]])
def test_repetition_costs_no_more_than_other_text(strategies):
    """Memory and work grow with the length, also where every window repeats every block."""
    keys, peaks = hash_keys(0, np.arange(1)), []
    rng = np.random.default_rng(0)
    for document in (rng.integers(0, 30000, size=4096), np.zeros(4096, dtype=int), np.zeros(16384, dtype=int)):
        tracemalloc.start()
        views = draw_views([document], keys, strategies, mask_recurring_targets=True)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert np.bincount(views.context_view).tolist() == [1] * len(strategies)  # all that is left of one token
    assert peaks[1] < 2 * peaks[0] and peaks[2] < 5 * peaks[1]
    assert peaks[1] < 20e6 * len(strategies)


def test_s_denoising_is_exactly_the_last_quarter():
    s_denoising = MASKING_PRESETS["ul2"][-1]
    for n in range(4, 200):
        ((_, _, context, blocks),) = draw_one_by_one([np.zeros(n, dtype=int)], [s_denoising])
        assert blocks == {1: list(range(math.ceil(0.75 * n), n))}
        assert context == list(range(math.ceil(0.75 * n)))


def test_ul2_preset_in_order():
    values = [(s.target_block_size_mean, s.max_target_mask_ratio) for s in MASKING_PRESETS["ul2"]]
    assert values == [(3, 0.25), (8, 0.25), (3, 0.5), (8, 0.5), (64, 0.15), (64, 0.5), (None, 0.25)]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(2, 600), min_size=1, max_size=6),
    st.integers(1, 100),
    st.one_of(st.none(), st.floats(0.0, 40.0)),
    st.integers(1, 100),
    seeds,
)
def test_the_share_of_targets_is_nominal_at_every_length(lengths, mean, std, percent, seed):
    strategy = MaskingStrategy(mean, std, percent / 100)
    for document, _, context, _ in draw_one_by_one([np.zeros(n, dtype=int) for n in lengths], [strategy], seed):
        n = len(document)
        assert n - len(context) == min(max(1, n * percent // 100), n - 1)


@pytest.mark.parametrize(
    ("n", "values", "num_targets", "first"),
    [
        (50, {"max_target_mask_ratio": 0.58}, 29, 0),  # 28.999999999999996 in floating point
        (100, {"max_target_mask_ratio": 1.0, "max_target_mask_start_ratio": 0.55}, 45, 55),  # 55.00000000000001
        (4000, {"max_target_mask_ratio": 0.12345678901234567}, 493, 0),  # more digits than fit into int64
    ],
)
def test_budget_and_first_position_are_exact(n, values, num_targets, first):
    strategy = MaskingStrategy(target_block_size_mean=None, **values)
    ((_, _, _, blocks),) = draw_one_by_one([np.zeros(n, dtype=int)], [strategy])
    assert len(blocks[1]) == num_targets and blocks[1][0] >= first
    if first:
        assert blocks[1] == list(range(first, n))


def test_the_context_ratio_is_exact():
    strategy = MaskingStrategy(target_block_size_mean=1, max_target_mask_ratio=0.1, max_context_ratio=0.58)
    ((_, _, context, _),) = draw_one_by_one([np.zeros(50, dtype=int)], [strategy])
    assert len(context) == 29


def test_names_tell_strategies_apart_and_those_of_the_preset_stay():
    assert [strategy.name for strategy in MASKING_PRESETS["ul2"]] == [
        "block3_ratio0.25",
        "block8_ratio0.25",
        "block3_ratio0.5",
        "block8_ratio0.5",
        "block64_ratio0.15",
        "block64_ratio0.5",
        "blockall_ratio0.25_start0.75",
    ]
    others = [
        {"target_block_size_std": 2},
        {"target_block_size_std": 2.5},
        {"target_block_num": 3},
        {"max_context_ratio": 0.5},
        {"max_target_mask_ratio": 0.25000001},
        {"max_target_mask_start_ratio": 0.5},
    ]
    names = [MaskingStrategy(target_block_size_mean=8, **values).name for values in [{}, *others]]
    assert len(set(names)) == len(names)
    assert names[1:5] == [
        "block8_std2_ratio0.25",
        "block8_std2.5_ratio0.25",
        "block8_ratio0.25_num3",
        "block8_ratio0.25_context0.5",
    ]


@pytest.mark.parametrize(("mean", "ratio"), [(3, 0.25), (8, 0.5), (3, 0.8), (64, 0.5)])
def test_every_position_can_be_a_target_and_the_share_is_nominal(mean, ratio):
    n, num_documents = 256, 3000
    strategy = MaskingStrategy(target_block_size_mean=mean, max_target_mask_ratio=ratio)
    views = draw_views([np.zeros(n, dtype=int)] * num_documents, hash_keys(1, np.arange(num_documents)), [strategy])
    counts = np.bincount(views.slot_token % n, minlength=n)
    assert counts.min() > 0
    assert counts.sum() / (n * num_documents) == pytest.approx(ratio, abs=0.004)


def test_arrangements_are_equally_likely():
    # 2 blocks of 2 in 6 tokens leave 2 free tokens: 6 arrangements
    n, num_documents = 6, 6000
    strategy = MaskingStrategy(target_block_size_mean=2, max_target_mask_ratio=0.7)
    views = draw_views([np.zeros(n, dtype=int)] * num_documents, hash_keys(2, np.arange(num_documents)), [strategy])
    starts = (views.slot_token % n).reshape(num_documents, 4)[:, ::2]
    arrangements, counts = np.unique(starts, axis=0, return_counts=True)
    assert len(arrangements) == 6
    assert counts.min() > 850 and counts.max() < 1150  # 1000 expected, standard deviation 29


def test_block_lengths_vary_with_std():
    strategy = MaskingStrategy(target_block_size_mean=8, target_block_size_std=2, max_target_mask_ratio=0.5)
    lengths = [
        len(block)
        for _, _, _, blocks in draw_one_by_one([np.zeros(400, dtype=int)] * 50, [strategy])
        for block in blocks.values()
    ]
    assert np.mean(lengths) == pytest.approx(8, abs=0.3) and np.std(lengths) == pytest.approx(2, abs=0.3)


def test_masks_are_a_function_of_seed_epoch_and_document():
    rng = np.random.default_rng(0)
    examples = [
        {"input_ids": rng.integers(0, 9, size=n), "document_index": 1000 + n, "epoch": 3} for n in (20, 31, 50)
    ]

    def masks(examples, seed=5):
        batch = DataCollatorForTJEPA(seed=seed)(examples)
        tokens = batch["input_ids"].flatten()[batch["label_indices"]].tolist()
        assert (batch["slot_indices"].diff() > 0).all()  # as they lie in the rows
        position = batch["prediction_position_ids"].flatten()[batch["slot_indices"]].tolist()
        view = batch["prediction_view_ids"].flatten()[batch["slot_indices"]]
        document = [len(examples[v // 7]["input_ids"]) for v in view.tolist()]
        strategy = batch["slot_strategy_ids"].tolist()
        return sorted(zip(document, strategy, position, tokens, strict=True))

    alone = sorted(sum((masks([example]) for example in examples), []))
    assert masks(examples) == alone == masks(examples[::-1])
    assert masks(examples, seed=6) != alone
    assert masks([{**example, "epoch": 4} for example in examples]) != alone
    assert masks([{**example, "document_index": 7} for example in examples]) != alone


def test_views_per_document():
    documents = [np.arange(30)] * 200
    views = draw_views(documents, hash_keys(0, np.arange(200)), MASKING_PRESETS["ul2"], views_per_document=2)
    assert len(views.document) == 400
    strategies = views.strategy.reshape(200, 2)
    assert (strategies[:, 0] < strategies[:, 1]).all()  # two different ones
    assert np.bincount(views.strategy, minlength=7).min() > 30  # 57 expected of each


def test_short_documents_are_dropped_and_counted():
    collator = DataCollatorForTJEPA()
    examples = [{"input_ids": list(range(n)), "document_index": n, "epoch": 0} for n in (0, 1, 2, 5)]
    batch = collator(examples)
    assert batch["document_ids"].max() == 1
    assert collator.num_dropped_documents == 2
    empty = collator(examples[:2])  # nothing left: an empty batch, no crash
    assert len(empty["slot_indices"]) == 0 and empty["input_ids"].tolist() == [[0]]
    assert collator.num_dropped_documents == 4


@pytest.mark.parametrize("num_workers", [0, 2])
def test_epochs_and_drops_reach_workers(num_workers):
    import datasets
    from torch.utils.data import DataLoader

    dataset = DocumentDataset(datasets.Dataset.from_dict({"input_ids": [[1] * 20, [2], [3] * 30]}))
    collator = DataCollatorForTJEPA()
    loader = DataLoader(
        dataset,
        batch_size=1,
        collate_fn=collator,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )
    first = [batch["label_indices"].tolist() for batch in loader]
    again = [batch["label_indices"].tolist() for batch in loader]
    dataset.set_epoch(1)
    second = [batch["label_indices"].tolist() for batch in loader]
    assert first == again and first != second
    assert collator.num_dropped_documents == 3


@pytest.mark.parametrize("special_tokens", [((101,), (102, 103)), ((101, 104), ())])
def test_special_tokens_are_seen_by_every_view_and_change_no_mask(special_tokens):
    examples = [{"input_ids": list(range(n)), "document_index": n, "epoch": 0} for n in (9, 20, 2)]
    prefix, suffix = special_tokens

    def views(batch):
        """`[(strategy, document, positions of the context, of the slots)]`, sorted."""
        ids, documents = batch["input_ids"].flatten(), batch["document_ids"].flatten()
        positions, view_ids = batch["prediction_position_ids"].flatten(), batch["prediction_view_ids"].flatten()
        is_slot = batch["prediction_block_ids"].flatten() > 0
        labels = dict(zip(batch["slot_indices"].tolist(), batch["label_indices"].tolist(), strict=True))
        strategies = dict(zip(batch["slot_indices"].tolist(), batch["slot_strategy_ids"].tolist(), strict=True))
        found = []
        for view in view_ids.unique().tolist():
            slots = (is_slot & (view_ids == view)).nonzero().flatten().tolist()
            (document,) = {int(documents[labels[slot]]) for slot in slots}
            length = int((documents == document).sum())
            context = positions[~is_slot & (view_ids == view)].tolist()
            hidden = {int(positions[slot]): int(ids[labels[slot]]) for slot in slots}
            found.append((strategies[slots[0]], length, context, hidden))
        return sorted(found, key=lambda view: view[:2])

    plain = views(DataCollatorForTJEPA()(examples))
    more, shift = len(prefix) + len(suffix), len(prefix)
    for (_, length, context, hidden), (_, longer, all_context, all_hidden) in zip(
        plain, views(DataCollatorForTJEPA(special_tokens=special_tokens)(examples)), strict=True
    ):
        assert longer == length + more
        behind = range(shift + length, shift + length + len(suffix))
        assert all_context == [*range(shift), *(position + shift for position in context), *behind]
        assert all_hidden == {position + shift: token for position, token in hidden.items()}
    batch = DataCollatorForTJEPA(special_tokens=special_tokens)(examples[:1])
    assert batch["input_ids"].flatten().tolist() == [*prefix, *range(9), *suffix]


# --- Packing ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=40), st.integers(40, 90))
def test_rows_are_filled_by_best_fit(lengths, row_length):
    lengths = np.array(lengths, dtype=np.int64)
    order, free, expected = np.argsort(-lengths, kind="stable"), [], np.zeros_like(lengths)
    for sequence in order:
        fitting = [(space, row) for row, space in enumerate(free) if space >= lengths[sequence]]
        space, row = min(fitting, default=(row_length, len(free)))
        free[row:] = [space - lengths[sequence], *free[row + 1 :]]
        expected[sequence] = (row + 1) * row_length - space
    starts, shape = pack_rows(lengths, row_length, order)
    assert starts.tolist() == expected.tolist() and shape == (max(1, len(free)), row_length)


def test_many_rows_are_not_all_looked_at():
    lengths = np.full(20000, 60)
    started = time.process_time()
    _, shape = pack_rows(lengths, 100, np.arange(20000))  # no two fit into one row
    assert shape == (20000, 100)
    assert time.process_time() - started < 2.0  # a scan of all rows for each sequence takes ten times as long


@pytest.mark.parametrize(("num_documents", "most_padding"), [(4, 0.15), (8, 0.06), (16, 0.05), (64, 0.04)])
def test_chosen_rows_pad_little_and_have_few_lengths(num_documents, most_padding):
    rng, shares = np.random.default_rng(0), []
    for _ in range(8):
        lengths = rng.integers(10, 600, size=num_documents)
        examples = [{"input_ids": [1] * n, "document_index": index, "epoch": 0} for index, n in enumerate(lengths)]
        batch = DataCollatorForTJEPA(row_length="auto")(examples)
        views = [batch[name] for name in ("document_ids", "context_view_ids", "prediction_view_ids")]
        assert all(ids.shape[1] % 128 == 0 and ids.shape[1] <= 4096 for ids in views)
        shares.append([(ids < 0).float().mean() for ids in views])
    assert np.mean(shares, axis=0).max() < most_padding
    assert DataCollatorForTJEPA(row_length="auto")([])["input_ids"].shape == (1, 128)


@pytest.mark.parametrize("lengths", [[1000], [300, 290, 40], [130] * 40, [4000, 200], [129, 5], [700] * 9, [900] * 5])
def test_chosen_rows_are_the_best_of_four_lengths(lengths):
    """From the shortest that takes as few rows of at most 4,096 as can be, in steps of 128."""
    lengths, order = np.array(lengths), np.arange(len(lengths))
    num_rows = -(-lengths.sum() // 4096)
    shortest = 128 * math.ceil(max(lengths.max(), lengths.sum() / num_rows) / 128)
    candidates = [min(shortest + 128 * more, 4096) for more in range(4)]
    sizes = [pack_rows(lengths, candidate, order)[1] for candidate in candidates]
    assert pack_rows(lengths, "auto", order)[1] == min(sizes, key=math.prod)


def test_a_document_longer_than_the_rows_gets_longer_rows():
    batch = DataCollatorForTJEPA(row_length="auto")([{"input_ids": [1] * 5000, "document_index": 0, "epoch": 0}])
    assert batch["input_ids"].shape == (1, 5120)


# --- Strategy files and errors ---------------------------------------------------------------------------------------


def test_strategies_load_from_yaml_and_json(tmp_path):
    strategies = MASKING_PRESETS["ul2"]
    (tmp_path / "s.json").write_text(json.dumps([asdict(strategy) for strategy in strategies]))
    (tmp_path / "s.yaml").write_text(yaml.safe_dump([asdict(strategy) for strategy in strategies]))
    assert load_masking_strategies("ul2") == strategies
    assert load_masking_strategies(tmp_path / "s.json") == strategies
    assert load_masking_strategies(tmp_path / "s.yaml") == strategies


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target_block_size": 3}, r"Unknown masking strategy keys \['target_block_size'\]; allowed are"),
        ({"max_target_mask_ratio": 0.5}, "needs target_block_size_mean"),
        ({"target_block_size_mean": 3, "max_target_mask_ratio": 0.0}, r"max_target_mask_ratio must be in \(0, 1\]"),
        ({"target_block_size_mean": 3, "max_target_mask_ratio": 1.2}, r"must be in \(0, 1\], got 1.2"),
        ({"target_block_size_mean": 3, "max_context_ratio": 0}, r"max_context_ratio must be in \(0, 1\]"),
        ({"target_block_size_mean": 3, "max_target_mask_start_ratio": 1.0}, r"must be in \[0, 1\)"),
        ({"target_block_size_mean": 0}, "at least 1 token"),
        ({"target_block_size_mean": 2.5}, "must be whole"),
        ({"target_block_size_mean": "3"}, "must be a number or null"),
        ({"target_block_size_mean": None, "target_block_size_std": 1.0}, "with a target_block_size_mean"),
        ({"target_block_size_mean": 3, "target_block_num": 0}, "at least 1"),
        (["target_block_size_mean"], "is a mapping"),
        ({"target_block_size_mean": 3, "seed": 0, 1: 2}, r"keys \['1', 'seed'\]"),
    ],
)
def test_bad_strategies_are_refused(tmp_path, values, message):
    path = tmp_path / "strategies.json"
    path.write_text(json.dumps([values]))
    with pytest.raises(ValueError, match=message):
        load_masking_strategies(path)


def test_bad_strategy_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="preset"):
        load_masking_strategies("ul3")
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ValueError, match="list of masking strategies"):
        load_masking_strategies(tmp_path / "empty.yaml")
    for name in ("broken.yaml", "broken.json"):
        (tmp_path / name).write_text("[{")
        with pytest.raises(ValueError, match=name):
            load_masking_strategies(tmp_path / name)


def test_collator_errors():
    with pytest.raises(ValueError, match="DocumentDataset"):
        DataCollatorForTJEPA()([{"input_ids": [1, 2, 3]}])
    whole, bare = {"input_ids": [1, 2], "document_index": 0, "epoch": 0}, {"input_ids": [1, 2], "document_index": 0}
    with pytest.raises(ValueError, match=r"needs 'epoch' in every example, got \['document_index', 'input_ids'\]"):
        DataCollatorForTJEPA()([whole, bare, {**bare, "text": ""}])  # the first that lacks one
    with pytest.raises(ValueError, match="at least one masking strategy"):
        DataCollatorForTJEPA([])
    assert DataCollatorForTJEPA([{"target_block_size_mean": 3}]).strategies == [MaskingStrategy(3)]
    with pytest.raises(ValueError, match="masking strategy"):
        DataCollatorForTJEPA("ul2")  # the name of a preset
    assert DataCollatorForTJEPA(views_per_document=7).views_per_document == 7
    for number in (0, 8):
        with pytest.raises(ValueError, match="views_per_document"):
            DataCollatorForTJEPA(views_per_document=number)
    with pytest.raises(ValueError, match="row_length=16"):
        DataCollatorForTJEPA(row_length=16)([{"input_ids": list(range(20)), "document_index": 0, "epoch": 0}])


@pytest.mark.parametrize("row_length", [None, 90, "auto"])
def test_groups_say_what_the_ids_say(row_length):
    """Run after run, in every stream; padding is cut into runs that are no longer than a text."""
    batch = DataCollatorForTJEPA(row_length=row_length)(make_examples([40, 23, 7, 64, 2, 23, 23]))
    streams = {"documents": "document_ids", "contexts": "context_view_ids", "predictions": "prediction_view_ids"}
    for name, ids in streams.items():
        ids, groups = batch[ids].flatten(), getattr(batch["view_groups"], name)
        lengths = torch.tensor([context + slots for views, context, slots in groups for _ in range(views)])
        assert lengths.sum() == len(ids)
        runs = [run.unique().tolist() for run in ids.split(lengths.tolist())]
        assert all(len(run) == 1 for run in runs)
        texts = [run[0] for run in runs if run[0] >= 0]
        assert len(texts) == len(set(texts)) == len(ids[ids >= 0].unique())
        is_padding = torch.tensor([run[0] < 0 for run in runs])
        assert lengths[is_padding].max() <= lengths[~is_padding].max() if is_padding.any() else row_length is None
        assert is_padding.sum() <= 2 * len(batch[streams[name]])  # rows
        if name == "predictions":
            slots = [slots for views, _, slots in groups for _ in range(views)]
            blocks = batch["prediction_block_ids"].flatten().split(lengths.tolist())
            assert slots == [int((block > 0).sum()) for block in blocks]
