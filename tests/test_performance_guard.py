"""Not timed: what makes a step cheap, counted, so that a later change cannot quietly bring the padding back."""

import numpy as np
import pytest
import torch
from plain_reference import batch_bytes, plain_batch, plain_forward_backward  # noqa: E402
from pretraining_throughput import padding_share  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import make_examples
from tjepa.data_collator_tjepa import MASKING_PRESETS, DataCollatorForTJEPA, draw_views, hash_keys, pack_batch
from tjepa.layers_tjepa import PackedViews


def realistic_lengths(num_documents: int) -> list[int]:
    """Like the novels: median 280 tokens, a long tail, cut at 1024."""
    return np.random.default_rng(0).lognormal(np.log(280), 0.65, num_documents).clip(20, 1024).astype(int).tolist()


def test_one_forward_each(make_model, batch):
    model, calls = make_model(), []
    for name in ("context_encoder", "target_encoder", "predictor"):
        getattr(model, name).register_forward_hook(lambda *_, name=name: calls.append(name))
    model(**batch)
    assert sorted(calls) == ["context_encoder", "predictor", "target_encoder"]  # not one per strategy


class HostWaits(TorchDispatchMode):
    """Counts the operations for whose result, or for the size of it, the host waits for the device."""

    WAITS = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "equal.default")

    def __enter__(self):
        self.calls = []
        return super().__enter__()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if any(name in str(operation) for name in self.WAITS):
            self.calls.append(str(operation))
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("predictor_type", ["self_attention", "cross_attention", "boundary"])
def test_the_host_never_waits(make_model, predictor_type):
    """The collator hands over the groups of equal views, and they are those that the model would find."""
    model = make_model(predictor_type=predictor_type, denoising_weight=1.0, target_normalization="instance").train()
    batch = DataCollatorForTJEPA()(make_examples([40, 23, 23, 7, 64, 2]))
    torch.manual_seed(0)
    with HostWaits() as host:
        loss = model(**batch).loss
        loss.backward()
    assert host.calls == []
    groups = batch.pop("view_groups")
    assert groups.documents == PackedViews.from_ids(batch["document_ids"]).groups
    assert groups.contexts == PackedViews.from_ids(batch["context_view_ids"]).groups
    predictions = PackedViews.from_ids(batch["prediction_view_ids"], batch["prediction_block_ids"])
    assert groups.predictions == predictions.groups
    torch.manual_seed(0)
    with HostWaits() as host:
        assert model(**batch).loss == loss  # without them: the same
    assert len(host.calls) > 0


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
