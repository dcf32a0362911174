"""The transformer layer over packed rows: the one attention rule in each backend's form, rotary angles, the layer.

Sequences share a row with no padding between them, and one rule on integer ids (`packed_attention_mask`) says who
attends to whom. No square mask is ever part of a batch. `packed_attention_forward` is registered with transformers as
the attention `tjepa_packed`, so that other encoders of transformers take packed rows by the same function.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec

import torch
from rotary_embedding_torch import RotaryEmbedding
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, create_bidirectional_mask, sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface, PreTrainedModel
from transformers.models.modernbert.modeling_modernbert import eager_attention_forward
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import is_flash_attention_requested

from .configuration_tjepa import TJEPAConfig


PACKED_ATTENTION = "tjepa_packed"  # the name under which transformers knows `packed_attention_forward`
VARLEN_ATTENTION = "tjepa_varlen"  # and `varlen_attention_forward`
LONGEST_BY_MATMULS = 1024  # keys of a view, see `attend`: weights of 1,024 tokens and 12 heads are 25 MB a layer
TORCH_HAS_VARLEN = find_spec("torch.nn.attention.varlen") is not None  # looked up once: every forward asks


def within_window(positions: torch.Tensor, window: int) -> torch.Tensor:
    """
    Local attention (ModernBERT, arXiv 2412.13663) by position instead of by index: positions [..., n] -> bool
    [..., n, n], True where two tokens are less than `window` positions apart.
    """
    return (positions.unsqueeze(-1) - positions.unsqueeze(-2)).abs() < window


@dataclass
class PackedViews:
    """
    The attention rule of a packed stream in the form that SDPA likes best: no mask at all for the context.

    The views of a stream lie one after the other, each its context tokens first and its target slots behind them.
    Neighbouring views of equal shape form a group, which SDPA takes as one batch; context tokens attend to the context
    without a mask, target slots to the whole view with a mask of [slots, view].

    Args:
        groups: for each group the number of views, of context tokens per view and of target slots per view.
        slot_masks: for each group a bool tensor [views, 1, slots, context + slots], or `None` where it has no slots.
        positions (`torch.LongTensor` of shape `[num_entries]`, *optional*):
            Position of each entry in its document, for encoders with local attention.
        longest (`int`, *optional*): no document has more tokens; a window that is wider needs no mask.
    """

    groups: list[tuple[int, int, int]]
    slot_masks: list[torch.Tensor | None]
    positions: torch.Tensor | None = None
    longest: int | None = None
    _masks_by_window: dict[int, list[torch.Tensor]] = field(default_factory=dict)

    def masks(self, window: int | None) -> list[torch.Tensor | None]:
        """`slot_masks`; for views without slots and a `window` those of local attention, bool [views, 1, n, n]."""
        if window is None or (self.longest is not None and self.longest <= window):
            return self.slot_masks
        if window not in self._masks_by_window:  # made once for all layers
            sizes = [views * (context + slots) for views, context, slots in self.groups]
            self._masks_by_window[window] = [
                within_window(positions.view(views, -1), window).unsqueeze(1)
                for (views, _, _), positions in zip(self.groups, self.positions.split(sizes), strict=True)
            ]
        return self._masks_by_window[window]

    @classmethod
    def from_ids(cls, view_ids: torch.Tensor, block_ids: torch.Tensor | None = None) -> "PackedViews":
        """
        Finds the groups, for which the host waits for the device; whoever packed the rows knows them.

        Args:
            view_ids (`torch.LongTensor` of shape [rows, row_length]): the view of each entry; negative is padding.
            block_ids (`torch.LongTensor` of shape [rows, row_length], *optional*):
                0 for context, 1, 2, ... for target blocks, ascending within a view; `None`: all context.
        """
        view_ids = view_ids.flatten()
        _, run_ids, view_lengths = torch.unique_consecutive(view_ids, return_inverse=True, return_counts=True)
        slot_counts = torch.zeros_like(view_lengths)
        if block_ids is not None:
            block_ids = block_ids.flatten()
            slot_counts.index_add_(0, run_ids, (block_ids > 0).long())
        shapes = torch.stack([view_lengths - slot_counts, slot_counts], dim=1)
        shapes, group_sizes = torch.unique_consecutive(shapes, dim=0, return_counts=True)
        groups = [(views, *shape) for views, shape in zip(group_sizes.tolist(), shapes.tolist(), strict=True)]
        return cls.from_groups(groups, block_ids)

    @classmethod
    def from_groups(cls, groups: list[tuple[int, int, int]], block_ids: torch.Tensor | None = None) -> "PackedViews":
        """groups as in the class, block_ids as in `from_ids`."""
        block_ids = None if block_ids is None else block_ids.flatten()
        slot_masks, start = [], 0
        for num_views, num_context, num_slots in groups:
            stop = start + num_views * (num_context + num_slots)
            if num_slots == 0:
                slot_masks.append(None)
            else:
                blocks = block_ids[start:stop].view(num_views, 1, 1, -1)
                slot_masks.append((blocks == 0) | (blocks == blocks[..., num_context:].transpose(2, 3)))
            start = stop
        return cls(groups, slot_masks)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> torch.Tensor:
    """
    `scaled_dot_product_attention`, but where a CPU trains in 16 bits: there its backward is slower than in float32,
    also on a processor with units for bfloat16. Plain matmuls use these in both directions. They keep the weights, so
    only views of at most `LONGEST_BY_MATMULS` tokens take them; longer ones, and float16, are computed in float32.

    Args:
        query (`torch.FloatTensor` of shape `[views, heads, queries, head_dim]`)
        key, value (`torch.FloatTensor` of shape `[views, key heads, keys, head_dim]`)
        mask (`torch.BoolTensor` of shape `[views, 1, queries, keys]`, *optional*): which keys each query sees.
    """
    settings = {"dropout_p": dropout_p, "scale": scale, "enable_gqa": key.shape[1] != query.shape[1]}
    if query.device.type != "cpu" or not query.requires_grad or query.dtype not in (torch.bfloat16, torch.float16):
        return F.scaled_dot_product_attention(query, key, value, mask, **settings)
    if query.dtype == torch.float16 or key.shape[2] > LONGEST_BY_MATMULS or settings["enable_gqa"]:
        with torch.autocast("cpu", enabled=False):
            states = (query.float(), key.float(), value.float())
            return F.scaled_dot_product_attention(*states, mask, **settings).to(query.dtype)
    weights = query * (scale or query.shape[-1] ** -0.5) @ key.transpose(2, 3)
    if mask is not None:  # adding it takes half the time of filling
        weights = weights + torch.zeros_like(mask, dtype=weights.dtype).masked_fill_(~mask, -math.inf)
    return F.dropout(weights.softmax(-1), dropout_p) @ value


def packed_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed_views: PackedViews | None = None,
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    Attention within each view of `packed_views`; without these, what `sdpa` gives. A function of transformers'
    `AttentionInterface`, to which encoders hand the `packed_views` of their own `forward`.

    Args:
        query (`torch.FloatTensor` of shape `[rows, heads, row_length, head_dim]`):
            One for every entry, or one for every target slot alone, in their order: `[1, heads, num_slots, head_dim]`.
        key, value (`torch.FloatTensor` of shape `[rows, key heads, row_length, head_dim]`): one for every entry.
        attention_mask: of rows that are not packed, as `sdpa` takes it.
        sliding_window (`int`, *optional*): an encoder's local attention, as in `within_window`.

    Returns:
        `torch.FloatTensor` of shape `[rows, row_length, heads, head_dim]`, or `[1, num_slots, heads, head_dim]`, and
        `None` for the weights.
    """
    if packed_views is None:
        kwargs.pop("is_causal", None)
        if attention_mask is None and sliding_window is not None:  # `packed_mask` leaves it out
            positions = torch.arange(query.shape[2], device=query.device)
            attention_mask = within_window(positions, sliding_window)[None, None]
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=False, **kwargs
        )

    def split_into_groups(states: torch.Tensor, num_entries: list[int]) -> tuple[torch.Tensor, ...]:
        # split, not slices: its backward is one concatenation, where each slice would fill a gradient of full size
        return states.transpose(1, 2).flatten(0, 1).split(num_entries)  # each [entries, heads, head_dim]

    num_rows, num_heads, num_queries, _ = query.shape
    num_keys = [views * (context + slots) for views, context, slots in packed_views.groups]
    num_slots = [views * slots for views, _, slots in packed_views.groups]
    slots_only = num_rows * num_queries < sum(num_keys)  # no view is without context
    settings = {"dropout_p": dropout, "scale": scaling}
    outputs = []
    for (num_views, num_context, group_slots), mask, q, k, v in zip(
        packed_views.groups,
        packed_views.masks(sliding_window),
        split_into_groups(query, num_slots if slots_only else num_keys),
        split_into_groups(key, num_keys),
        split_into_groups(value, num_keys),
        strict=True,
    ):
        q, k, v = (states.unflatten(0, (num_views, -1)).transpose(1, 2) for states in (q, k, v))
        if group_slots == 0 or slots_only:
            output = attend(q, k, v, mask, **settings)
        else:
            q_context, q_slots = q.tensor_split([num_context], dim=2)
            k_context, v_context = k[:, :, :num_context], v[:, :, :num_context]
            context = attend(q_context, k_context, v_context, **settings)
            slots = attend(q_slots, k, v, mask, **settings)
            output = torch.cat([context, slots], dim=2)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).view(num_rows, num_queries, num_heads, value.shape[-1]), None


def packed_mask(*args, attention_mask: torch.Tensor | None = None, use_vmap: bool = False, **kwargs):
    """A function of `AttentionMaskInterface`: none to build for packed rows, else what `sdpa` takes."""
    if attention_mask is None and not use_vmap:
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, use_vmap=use_vmap, **kwargs)


def varlen_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Attention within the views of packed rows by their lengths, with the flash attention kernels that torch (2.10 or
    newer) has for NVIDIA GPUs, in bfloat16 or float16. Rows that are not packed are attended to as by `sdpa`.

    Args:
        query, key, value (`torch.FloatTensor` of shape `[rows, heads, row_length, head_dim]`): one for every entry.
        attention_mask: of rows that are not packed, as `sdpa` takes it.
        cu_seq_lens_q, max_length_q: of `flash_attention_kwargs`.

    Returns:
        `torch.FloatTensor` of shape `[rows, row_length, heads, head_dim]`, and `None` for the weights.
    """
    if cu_seq_lens_q is None:
        return packed_attention_forward(module, query, key, value, attention_mask, **kwargs)
    from torch.nn.attention.varlen import varlen_attn  # newer than the oldest torch that will do

    flat = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
    output = varlen_attn(*flat, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
    return output.unflatten(0, (query.shape[0], -1)), None


AttentionInterface.register(PACKED_ATTENTION, packed_attention_forward)
AttentionMaskInterface.register(PACKED_ATTENTION, packed_mask)
AttentionInterface.register(VARLEN_ATTENTION, varlen_attention_forward)
AttentionMaskInterface.register(VARLEN_ATTENTION, sdpa_mask)


def has_varlen_kernel(config: TJEPAConfig) -> bool:
    """Whether the GPU of this machine has a kernel for `varlen_attention_forward` in 16 bits."""
    head_dim = config.hidden_size // config.num_attention_heads
    return (
        TORCH_HAS_VARLEN
        and torch.version.cuda is not None
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability() >= (8, 0)
        and head_dim % 8 == 0
        and head_dim <= 256
        and config.attention_probs_dropout_prob == 0.0
    )


def attends_by_lengths(config: TJEPAConfig, hidden_states: torch.Tensor) -> bool:
    """Whether packed rows of such states need no mask, but `flash_attention_kwargs`."""
    if config._attn_implementation != VARLEN_ATTENTION:
        return is_flash_attention_requested(config)
    device, dtype = hidden_states.device.type, hidden_states.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return device == "cuda" and dtype in (torch.bfloat16, torch.float16) and has_varlen_kernel(config)


def packed_attention_mask(
    config: TJEPAConfig,
    hidden_states: torch.Tensor,
    view_ids: torch.Tensor,
    block_ids: torch.Tensor | None = None,
    query_indices: torch.Tensor | None = None,
    groups: list[tuple[int, int, int]] | None = None,
):
    """
    The one attention rule of the model, in the form that `config._attn_implementation` takes:

        query q may attend key k  <=>  view[q] = view[k]  and  (block[k] = 0  or  block[k] = block[q])

    Padding (negative view) attends to padding only, so that no softmax is empty; nobody reads what it computes. Flash
    attention has no mask: there the lengths of the views say it all, see `flash_attention_kwargs`. With
    `query_indices` only these entries of the (only) row have a query: all target slots, ascending. `groups` are those
    of [`PackedViews`] where they are known; else they are found.
    """
    if attends_by_lengths(config, hidden_states):
        if block_ids is None:
            return None
        raise ValueError(
            f"{config._attn_implementation} cannot keep target blocks apart, so the predictor needs another backend: "
            "load the model with it and it chooses one, or set flex_attention or sdpa for the whole model."
        )
    is_empty = query_indices is not None and len(query_indices) == 0  # of which no mask can be made
    if is_empty or config._attn_implementation in ("sdpa", VARLEN_ATTENTION):
        if groups is not None:
            return PackedViews.from_groups(groups, block_ids)
        return PackedViews.from_ids(view_ids, block_ids)

    query_states, query_view_ids, query_block_ids = hidden_states, view_ids, block_ids
    if query_indices is not None:
        query_states, query_view_ids = hidden_states[:, query_indices], view_ids[:, query_indices]
        query_block_ids = block_ids[:, query_indices]

    def same_view(batch_idx, head_idx, q_idx, kv_idx):
        return query_view_ids[batch_idx, q_idx] == view_ids[batch_idx, kv_idx]

    def same_view_and_block(batch_idx, head_idx, q_idx, kv_idx):
        key_block = block_ids[batch_idx, kv_idx]
        return same_view(batch_idx, head_idx, q_idx, kv_idx) & (
            (key_block == 0) | (key_block == query_block_ids[batch_idx, q_idx])
        )

    mask_function = same_view if block_ids is None else same_view_and_block
    if config._attn_implementation == "flex_attention" and torch.compiler.is_compiling():
        # what transformers calls too, but with a warning, and a warning breaks the graph
        sizes = {"B": len(view_ids), "H": None, "Q_LEN": query_states.shape[1], "KV_LEN": view_ids.shape[1]}
        return create_block_mask(mask_function, **sizes, device=view_ids.device)
    return create_bidirectional_mask(
        config=config,
        inputs_embeds=query_states,
        encoder_hidden_states=hidden_states,
        attention_mask=None,
        and_mask_function=mask_function,
    )


def flash_attention_kwargs(view_ids: torch.Tensor, groups: list[tuple[int, int, int]] | None = None) -> dict:
    """
    Where each view starts in the flattened rows, as transformers hands it to flash attention's varlen kernels. Without
    the `groups` of [`PackedViews`] the host waits for the device.
    """
    if groups is None:
        view_lengths = torch.unique_consecutive(view_ids.flatten(), return_counts=True)[1]
    else:
        numbers, contexts, slots = torch.tensor(groups).T
        view_lengths = (contexts + slots).repeat_interleave(numbers)
    starts = F.pad(view_lengths.cumsum(0, dtype=torch.int32), (1, 0)).to(view_ids.device, non_blocking=True)
    longest = -(-int(view_lengths.max()) // 128) * 128  # a block of the kernels: compiled layers see few lengths
    return {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}


class TJEPARotaryEmbedding(RotaryEmbedding):
    """
    Rotary angles of arbitrary positions (RoFormer, arXiv 2104.09864), in float32 whatever the model's dtype or
    autocast: bfloat16 cannot tell position 257 from 258. The frequencies are recomputed rather than saved.
    """

    def __init__(self, config: TJEPAConfig):
        super().__init__(config.rotary_dim, theta=config.rope_theta, cache_if_possible=False, cache_max_seq_len=0)
        self.config = config
        del self.freqs  # a parameter in the library; here nothing to train, to save or to cast
        self.register_buffer("freqs", self.compute_freqs(), persistent=False)

    def compute_freqs(self, device: torch.device | None = None) -> torch.Tensor:
        exponents = torch.arange(0, self.config.rotary_dim, 2, device=device).float() / self.config.rotary_dim
        return 1.0 / (self.config.rope_theta**exponents)

    def reset_own_parameters(self) -> None:
        # buffers that are not saved are lost on the meta device
        init.copy_(self.freqs, self.compute_freqs())
        init.zeros_(self.dummy)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.freqs.dtype != torch.float32:  # after model.to(torch.bfloat16), say
            self.freqs = self.compute_freqs(self.freqs.device)
        return self

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        """position_ids [batch, length] -> cosine, sine of angles [batch, length, rotary_dim / 2, 2], float32."""
        with torch.autocast(device_type=position_ids.device.type, enabled=False):
            angles = super().forward(position_ids)[..., ::2]  # each stands there twice, for the two features of a pair
            return torch.stack([angles.cos(), angles.sin()], dim=-1)


class RotationInPlace(torch.autograd.Function):
    """`rotate` as one multiplication of complex numbers, each a pair of features, in the memory that they are in."""

    @staticmethod
    def forward(ctx, states: torch.Tensor, rotation: torch.Tensor, num_heads: int) -> torch.Tensor:
        ctx.save_for_backward(rotation)
        ctx.num_heads = num_heads
        ctx.mark_dirty(states)
        features = states[..., :num_heads, : 2 * rotation.shape[-2]]
        rotated = features.float()
        if states.shape[-1] % 2 == 1:  # complex numbers begin at even places
            rotated = rotated.contiguous()
        pairs = torch.view_as_complex(rotated.unflatten(-1, (-1, 2)))
        pairs.mul_(torch.view_as_complex(rotation).unsqueeze(-2))
        if rotated is not features:
            features.copy_(rotated)
        return states

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (rotation,) = ctx.saved_tensors
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        back = rotation * rotation.new_tensor([1.0, -1.0])
        return RotationInPlace.apply(gradient, back, ctx.num_heads), None, None


def rotate(states: torch.Tensor, rotation: torch.Tensor, num_heads: int) -> torch.Tensor:
    """
    What `apply_rotary_emb` of rotary-embedding-torch computes, some ten times as fast on a CPU.

    Args:
        states (`torch.FloatTensor` of shape `[batch, length, heads, head_dim]`): overwritten, but in a graph.
        rotation (`torch.FloatTensor` of shape `[batch, length, rotary_dim / 2, 2]`): of `TJEPARotaryEmbedding`.
        num_heads: the first ones of each token, which are rotated; the rest stays as it is.
    """
    is_graph = torch.compiler.is_compiling() or torch.jit.is_tracing()  # neither takes the function in place
    if not is_graph and states.device.type != "mps":
        return RotationInPlace.apply(states, rotation, num_heads)
    rotated, rest = states.split([num_heads, states.shape[-2] - num_heads], dim=-2)
    pairs, unrotated = rotated.tensor_split([2 * rotation.shape[-2]], dim=-1)
    first, second = pairs.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = rotation.unsqueeze(-3).unbind(-1)
    pairs = torch.stack([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
    return torch.cat([torch.cat([pairs.flatten(-2).to(states.dtype), unrotated], dim=-1), rest], dim=-2)


class TJEPAResidualProjection(nn.Linear):
    """The last linear layer of a residual branch: a class of its own, because it is initialised smaller."""


class TJEPAAttention(nn.Module):
    def __init__(self, config: TJEPAConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.is_causal = False
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.use_bias)
        self.out_proj = TJEPAResidualProjection(config.hidden_size, config.hidden_size, bias=config.use_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotation: torch.Tensor,
        attention_mask: "torch.Tensor | PackedViews | None" = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.attend(*self.project(hidden_states, rotation), attention_mask, **kwargs)

    def project(self, hidden_states: torch.Tensor, rotation: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[batch, length, hidden_size] -> rotated query, rotated key, value, each [batch, length, heads, head_dim]."""
        qkv = self.qkv_proj(hidden_states).unflatten(-1, (-1, self.head_dim))  # [batch, length, 3 * heads, head_dim]
        return rotate(qkv, rotation, 2 * self.num_heads).chunk(3, dim=2)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: "torch.Tensor | PackedViews | None",
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        name = self.config._attn_implementation
        if isinstance(attention_mask, PackedViews):
            name, kwargs["packed_views"], attention_mask = PACKED_ATTENTION, attention_mask, None
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        attn_output, attn_weights = attention_interface(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.head_dim**-0.5, **kwargs
        )
        return self.out_proj(attn_output.flatten(-2)), attn_weights


class TJEPAMLP(nn.Module):
    def __init__(self, config: TJEPAConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.use_bias)
        self.activation = ACT2FN[config.hidden_act]
        self.down_proj = TJEPAResidualProjection(config.intermediate_size, config.hidden_size, bias=config.use_bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.activation(self.up_proj(hidden_states)))


class TJEPALayerNorm(nn.LayerNorm):
    """In the dtype of its weights: of bfloat16 states (autocast) the CPU would sum its gradients in bfloat16, too."""

    def __init__(self, config: TJEPAConfig, width: int | None = None):
        super().__init__(width or config.hidden_size, eps=config.layer_norm_eps, bias=config.use_bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states.to(self.weight.dtype))


class TJEPALayer(GradientCheckpointingLayer):
    """Pre-norm block: x += attention(norm(x)); x += mlp(norm(x))."""

    compiles_alone = True
    attention_class = TJEPAAttention

    def __init__(self, config: TJEPAConfig):
        super().__init__()
        self.attention_norm = TJEPALayerNorm(config)
        self.attention = self.attention_class(config)
        self.mlp_norm = TJEPALayerNorm(config)
        self.mlp = TJEPAMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotation: torch.Tensor,
        attention_mask: "torch.Tensor | PackedViews | None" = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attn_output, _ = self.attention(self.attention_norm(hidden_states), rotation, attention_mask, **kwargs)
        hidden_states = hidden_states + self.dropout(attn_output)
        return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))


def compile_layers(model: nn.Module, **settings) -> None:
    """
    `torch.compile` with these settings for each kind of layer by itself, and for the token head, in place: what
    `--torch_compile` does.
    """
    # encoders and predictor, training and evaluation share the code of a layer, and torch's limit of 8 variants of it;
    # over the limit it runs uncompiled. (`recompile_limit` is the name from torch 2.7 on, this one is known to all.)
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 64)
    for module in model.modules():
        if getattr(module, "compiles_alone", False):
            module.compile(**settings)


class TJEPAModule(PreTrainedModel):
    """What encoders, predictors and heads share: the configuration, attention backends, and how weights start."""

    config: TJEPAConfig
    config_class = TJEPAConfig
    base_model_prefix = "encoder"  # where the heads keep it; `TJEPAModel` drops and adds this prefix when it loads
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TJEPALayer"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": TJEPALayer, "attentions": TJEPAAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)  # Linear and Embedding N(0, initializer_range), biases 0, norms 1
        if isinstance(module, TJEPAResidualProjection):
            init.normal_(
                module.weight, std=self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
            )
        elif hasattr(module, "reset_own_parameters"):
            module.reset_own_parameters()
