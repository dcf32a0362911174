"""Not timed: what makes a step cheap, counted, so that a later change can not quietly bring the padding back."""

import numpy as np
import pytest
from plain_reference import batch_bytes, plain_batch, plain_forward_backward  # noqa: E402
from pretraining_throughput import padding_share  # noqa: E402

from helpers import make_examples
from tjepa.data_collator_tjepa import MASKING_PRESETS, DataCollatorForTJEPA, draw_views, hash_keys, pack_batch


def realistic_lengths(num_documents: int) -> list[int]:
    """Like the novels: median 280 tokens, a long tail, cut at 1024."""
    return np.random.default_rng(0).lognormal(np.log(280), 0.65, num_documents).clip(20, 1024).astype(int).tolist()


def test_one_forward_each(make_model, batch):
    model, calls = make_model(), []
    for name in ("context_encoder", "target_encoder", "predictor"):
        getattr(model, name).register_forward_hook(lambda *_, name=name: calls.append(name))
    model(**batch)
    assert sorted(calls) == ["context_encoder", "predictor", "target_encoder"]  # not one per strategy


def test_padding():
    examples = make_examples(realistic_lengths(32))
    assert padding_share(DataCollatorForTJEPA()(examples)) == 0.0
    batch = DataCollatorForTJEPA(row_length=4096)(make_examples(realistic_lengths(256)))
    assert padding_share(batch) <= 0.05
    for name in ("input_ids", "context_indices", "prediction_indices"):
        assert batch[name].shape[1] == 4096


def test_batch_bytes():
    documents = [example["input_ids"] for example in make_examples(realistic_lengths(32))]
    views = draw_views(documents, hash_keys(0, np.arange(32)), MASKING_PRESETS["ul2"])
    ours, plain = pack_batch(documents, views, 7), plain_batch(documents, views, 7)
    assert batch_bytes(ours) <= batch_bytes(plain) / 50
    assert batch_bytes(ours) <= 400 * sum(len(document) for document in documents)  # 7 views of 5 or 6 numbers


def test_the_plain_step_it_is_measured_against_has_the_same_loss(make_model):
    documents = [example["input_ids"] for example in make_examples([40, 23, 7, 64])]
    views = draw_views(documents, hash_keys(0, np.arange(4)), MASKING_PRESETS["ul2"])
    model, plain_model = make_model(), make_model()
    loss = model(**pack_batch(documents, views, 7)).loss
    loss.backward()
    plain_loss = plain_forward_backward(plain_model, plain_batch(documents, views, 7))
    assert loss.item() == pytest.approx(plain_loss, abs=1e-5)
    for ours, plain in zip(model.parameters(), plain_model.parameters(), strict=True):
        if ours.requires_grad:
            np.testing.assert_allclose(ours.grad, plain.grad, rtol=1e-5, atol=1e-5)
