"""The layer's parts by hand: which entries may attend to which, local attention, dropout, what is saved."""

import copy

import pytest
import torch
from rotary_embedding_torch import RotaryEmbedding, apply_rotary_emb
from transformers.utils import is_flash_attn_2_available

from helpers import make_examples, make_tiny_config
from tjepa import TJEPAForPreTraining, TJEPAModel, layers_tjepa
from tjepa.data_collator_tjepa import DataCollatorForTJEPA
from tjepa.layers_tjepa import (
    VARLEN_ATTENTION,
    PackedViews,
    TJEPARotaryEmbedding,
    attends_by_lengths,
    flash_attention_kwargs,
    has_varlen_kernel,
    packed_attention_forward,
    rotate,
    varlen_attention_forward,
)


def test_groups_and_masks_of_packed_views():
    """Two views of a context token and two slots, in two blocks and in one; then one of two context tokens."""
    views = PackedViews.from_ids(
        torch.tensor([[0, 0, 0, 1], [1, 1, 2, 2]]), torch.tensor([[0, 1, 2, 0], [1, 1, 0, 0]])
    )
    assert views.groups == [(2, 1, 2), (1, 2, 0)]
    assert views.slot_masks[0].tolist() == [[[[True, True, False], [True, False, True]]], [[[True] * 3] * 2]]
    assert views.slot_masks[1] is None
    assert PackedViews.from_ids(torch.tensor([[0, 0, 1, 1, 1, -1]])).groups == [(1, 2, 0), (1, 3, 0), (1, 1, 0)]


def test_local_attention_is_by_position():
    views = PackedViews([(2, 3, 0)], [None], positions=torch.tensor([0, 1, 2, 4, 6, 7]))
    (mask,) = views.masks(2)  # tokens less than two positions apart
    assert mask.tolist() == [
        [[[True, True, False], [True, True, True], [False, True, True]]],
        [[[True, False, False], [False, True, True], [False, True, True]]],
    ]
    assert views.masks(2)[0] is mask and views.masks(3)[0][1, 0, 0].tolist() == [True, True, False]
    assert views.masks(None) is views.slot_masks
    views.longest = 8
    assert views.masks(8) is views.slot_masks and views.masks(7) is not views.slot_masks


def test_flash_attention_is_told_where_views_start():
    views = torch.tensor([[3, 3, 5], [5, 5, -1]])
    for settings in (flash_attention_kwargs(views), flash_attention_kwargs(views, [(1, 2, 0), (1, 1, 2), (1, 1, 0)])):
        assert settings["cu_seq_lens_q"].tolist() == settings["cu_seq_lens_k"].tolist() == [0, 2, 5, 6]
        assert settings["cu_seq_lens_q"].dtype == torch.int32
        assert settings["max_length_q"] == settings["max_length_k"] == 128  # at least 3, in steps of a block


def test_attention_dropout_is_for_training_only():
    ids = torch.arange(12)[None]
    for attn_implementation in ("sdpa", "eager"):
        config = make_tiny_config(attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0)
        model = TJEPAModel._from_config(config, attn_implementation=attn_implementation)
        states = [model.train(training)(ids)[0] for training in (False, False, True, True)]
        assert torch.equal(states[0], states[1])
        assert not torch.allclose(states[1], states[2]) and not torch.allclose(states[2], states[3])


@pytest.mark.parametrize("how", ["autocast", "weights"])
@pytest.mark.parametrize(("longest", "key_heads", "num_calls"), [(0, 2, 2), (3, 2, 1), (4, 2, 0), (4, 1, 2)])
def test_sdpa_never_trains_in_bfloat16_on_a_cpu(monkeypatch, how, longest, key_heads, num_calls):
    """Its backward is slow there: short views are plain matmuls, the others `sdpa` in float32."""
    seen, sdpa = [], torch.nn.functional.scaled_dot_product_attention

    def spy(query, *args, **kwargs):
        seen.append((query.dtype, torch.is_autocast_enabled("cpu")))
        return sdpa(query, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(layers_tjepa, "LONGEST_BY_MATMULS", longest)
    views = PackedViews.from_groups([(2, 3, 0), (1, 4, 0)])
    query = torch.randn(1, 2, 10, 8, dtype=torch.bfloat16, requires_grad=True)
    key, value = torch.randn(2, 1, key_heads, 10, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        packed_attention_forward(None, query, key, value, None, packed_views=views)
        assert seen == num_calls * [(torch.float32, False)]
        with torch.no_grad():  # forward alone is fast enough
            packed_attention_forward(None, query.detach(), key, value, None, packed_views=views)
    assert seen[num_calls:] == 2 * [(torch.bfloat16, how == "autocast")]


@pytest.mark.parametrize("longest", [0, 4])
def test_attention_that_trains_in_bfloat16_is_that_of_float32(monkeypatch, longest):
    monkeypatch.setattr(layers_tjepa, "LONGEST_BY_MATMULS", longest)
    views = PackedViews.from_groups([(2, 2, 1), (1, 1, 3)], torch.tensor([0, 0, 1, 0, 0, 1, 0, 1, 2, 2]))
    narrow = [torch.randn(1, 2, 10, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    wide = [states.detach().float().requires_grad_() for states in narrow]
    output, _ = packed_attention_forward(None, *narrow, None, packed_views=views)
    expected, _ = packed_attention_forward(None, *wide, None, packed_views=views)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=0, atol=0.02)
    towards = torch.randn_like(expected)
    gradients = torch.autograd.grad(output, narrow, towards.bfloat16())
    for gradient, right in zip(gradients, torch.autograd.grad(expected, wide, towards), strict=True):
        assert torch.cosine_similarity(gradient.float().flatten(), right.flatten(), dim=0) > 0.9999


def test_an_encoder_is_traced():
    """As TorchScript and its ONNX exporter do; for other shapes than those it was traced with, too."""
    model = TJEPAModel(make_tiny_config(return_dict=False)).eval()
    with torch.no_grad():
        traced = torch.jit.trace(model, torch.arange(22).view(2, 11))
        other = torch.arange(21).view(3, 7)
        torch.testing.assert_close(traced(other)[0], model(other)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("width", "dtype"), [(8, torch.float32), (6, torch.float32), (7, torch.float32), (8, torch.bfloat16)]
)
@pytest.mark.parametrize("compiling", [False, True])
def test_rotation_is_that_of_the_library(monkeypatch, width, dtype, compiling):
    """Of the first heads alone, and of their first features; gradients, too."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    config = make_tiny_config(hidden_size=2 * width, num_attention_heads=2, rotary_dim=6)
    positions = torch.randint(0, 4096, (2, 5))
    library = RotaryEmbedding(6)
    states, gradient = torch.randn(2, 5, 3, width).to(dtype), torch.randn(2, 5, 3, width).to(dtype)
    expected = states.clone().requires_grad_()
    rotated = apply_rotary_emb(library(positions.flatten()).view(2, 5, 1, 6), expected[:, :, :2])
    rotated = torch.cat([rotated, expected[:, :, 2:]], dim=2)
    rotated.backward(gradient)
    states.requires_grad_()
    ours = rotate(states + 0, TJEPARotaryEmbedding(config)(positions), num_heads=2)
    ours.backward(gradient)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2  # half a bit of bfloat16
    torch.testing.assert_close(ours, rotated, rtol=0, atol=tolerance)
    torch.testing.assert_close(states.grad, expected.grad, rtol=0, atol=tolerance)


class Adapted(torch.nn.Linear):
    """As LoRA wraps a linear layer: its weight is not all that it computes."""

    def forward(self, states):
        return super().forward(states) + states.repeat(1, 1, 3)


@pytest.mark.parametrize("predictor_type", ["self_attention", "cross_attention"])
def test_the_predictor_calls_projections_that_are_more_than_a_weight(predictor_type):
    torch.manual_seed(0)
    config = make_tiny_config(predictor_type=predictor_type, predictor_hidden_size=32)
    model = TJEPAForPreTraining(config).eval()
    batch = DataCollatorForTJEPA()(make_examples([40, 23, 7]))
    attention = model.predictor.layers[-1].attention
    plain, adapted = attention.qkv_proj, Adapted(32, 96)
    adapted.load_state_dict(plain.state_dict())
    merged = copy.deepcopy(plain)
    with torch.no_grad():
        merged.weight += torch.eye(32).repeat(3, 1)
    losses = []
    for attention.qkv_proj in (merged, adapted, plain):
        losses.append(model(**batch).loss)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)
    assert abs(losses[0] - losses[2]) > 1e-4


def test_rotary_frequencies_are_not_saved():
    model = TJEPAModel(make_tiny_config(rotary_dim=8, rope_theta=10000.0, hidden_size=64))
    assert not [name for name in model.state_dict() if "rotary" in name]
    assert model.rotary_embedding.freqs.tolist() == torch.tensor([1.0, 0.1, 0.01, 0.001]).tolist()


@pytest.mark.parametrize(
    ("capability", "options", "expected"),
    [
        ((9, 0), {}, True),
        ((8, 0), {}, True),
        ((7, 5), {}, False),
        (None, {}, False),  # no GPU
        ((9, 0), {"hidden_size": 36, "rotary_dim": 4}, False),
        ((9, 0), {"attention_probs_dropout_prob": 0.1}, False),
    ],
)
def test_which_gpus_have_a_kernel_for_attention_by_lengths(monkeypatch, capability, options, expected):
    pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert has_varlen_kernel(make_tiny_config(**options)) == expected


@pytest.mark.skipif(is_flash_attn_2_available(), reason="flash-attn is installed")
def test_flash_attention_lacks_nothing_but_its_package():
    with pytest.raises(ImportError, match="package for FlashAttention2"):
        TJEPAModel(make_tiny_config()).set_attn_implementation("flash_attention_2")


def test_attention_by_lengths_of_packed_rows(monkeypatch):
    """What torch's kernel is handed: the entries of all rows one after another, [num_entries, heads, head_dim]."""
    pytest.importorskip("torch.nn.attention.varlen")
    query, key, value = torch.randn(3, 2, 4, 5, 8)  # [rows, heads, row_length, head_dim]
    starts = torch.tensor([0, 3, 5, 10], dtype=torch.int32)

    def kernel(query, key, value, *bounds):
        assert query.shape == (10, 4, 8) and bounds[0] is bounds[1] is starts and bounds[2:] == (5, 5)
        return 2 * query + key + value

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    output, _ = varlen_attention_forward(None, query, key, value, None, starts, 5)
    torch.testing.assert_close(output, (2 * query + key + value).transpose(1, 2))


@pytest.mark.parametrize(
    ("name", "expected"), [("flash_attention_2", True), ("sdpa", False), (VARLEN_ATTENTION, False)]
)
def test_which_backends_attend_by_lengths_on_a_cpu(name, expected):
    config = make_tiny_config()
    config._attn_implementation_internal = name
    assert attends_by_lengths(config, torch.zeros(1, 2, 32, dtype=torch.bfloat16)) == expected


@pytest.mark.parametrize(
    ("predictor", "expected"),
    [("self_attention", {"TJEPALayer", "TJEPAPredictorLayer"}), ("boundary", {"TJEPALayer"})],
)
def test_layers_stay_whole_when_a_model_is_divided_over_devices(predictor, expected):
    """FSDP shards each of these apart, and `device_map` puts each on one device."""
    assert TJEPAForPreTraining(make_tiny_config(predictor_type=predictor))._no_split_modules == expected
