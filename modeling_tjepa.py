"""T-JEPA: a text encoder pretrained by predicting its own representations.

Top to bottom in the order data flows: rotary positions, attention, MLP, one block, the encoder (`TJEPAModel`), the
predictor, `TJEPAForPreTraining`, which holds the context encoder, its moving average (the target encoder), the
predictor and the loss, and the downstream heads on an encoder. Notable:

- Everything runs on packed rows: sequences share a row with no padding between them, and one rule on integer ids
  (`packed_attention_mask`) says who attends to whom. No square mask is ever part of a batch.
- The file knows nothing of masking strategies, training loops or processes; it needs only its configuration, because
  it is copied to the Hub beside every checkpoint.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from rotary_embedding_torch import RotaryEmbedding, apply_rotary_emb
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, logging
from transformers.utils.generic import (
    can_return_tuple,
    is_flash_attention_requested,
    merge_with_config_defaults,
)
from transformers.utils.output_capturing import capture_outputs

from .configuration_tjepa import TJEPAConfig


logger = logging.get_logger(__name__)


# --- Attention over packed rows --------------------------------------------------------------------------------------


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
    """

    groups: list[tuple[int, int, int]]
    slot_masks: list[torch.Tensor | None]

    @classmethod
    def from_ids(cls, view_ids: torch.Tensor, block_ids: torch.Tensor | None = None) -> "PackedViews":
        """
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


def packed_sdpa_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed_views: PackedViews, dropout: float
) -> torch.Tensor:
    """
    Attention within each view of `packed_views`.

    Args:
        query (`torch.FloatTensor` of shape `[rows, heads, row_length, head_dim]`):
            One for every entry, or one for every target slot alone, in their order: `[1, heads, num_slots, head_dim]`.
        key, value (`torch.FloatTensor` of shape `[rows, heads, row_length, head_dim]`): one for every entry.

    Returns:
        `torch.FloatTensor` of shape `[rows, row_length, heads, head_dim]`, or `[1, num_slots, heads, head_dim]`.
    """

    def split_into_groups(states: torch.Tensor, num_entries: list[int]) -> tuple[torch.Tensor, ...]:
        # split, not slices: its backward is one concatenation, where each slice would fill a gradient of full size
        return states.transpose(1, 2).flatten(0, 1).split(num_entries)  # each [entries, heads, head_dim]

    num_rows, num_heads, num_queries, head_dim = query.shape
    num_keys = [views * (context + slots) for views, context, slots in packed_views.groups]
    num_slots = [views * slots for views, _, slots in packed_views.groups]
    slots_only = num_rows * num_queries < sum(num_keys)  # no view is without context
    outputs = []
    for (num_views, num_context, _), slot_mask, q, k, v in zip(
        packed_views.groups,
        packed_views.slot_masks,
        split_into_groups(query, num_slots if slots_only else num_keys),
        split_into_groups(key, num_keys),
        split_into_groups(value, num_keys),
        strict=True,
    ):
        q, k, v = (states.unflatten(0, (num_views, -1)).transpose(1, 2) for states in (q, k, v))
        if slot_mask is None or slots_only:
            output = F.scaled_dot_product_attention(q, k, v, attn_mask=slot_mask, dropout_p=dropout)
        else:
            q_context, q_slots = q.tensor_split([num_context], dim=2)
            k_context, v_context = k[:, :, :num_context], v[:, :, :num_context]
            context = F.scaled_dot_product_attention(q_context, k_context, v_context, dropout_p=dropout)
            slots = F.scaled_dot_product_attention(q_slots, k, v, attn_mask=slot_mask, dropout_p=dropout)
            output = torch.cat([context, slots], dim=2)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).view(num_rows, num_queries, num_heads, head_dim)


def packed_attention_mask(
    config: TJEPAConfig,
    hidden_states: torch.Tensor,
    view_ids: torch.Tensor,
    block_ids: torch.Tensor | None = None,
    query_indices: torch.Tensor | None = None,
):
    """
    The one attention rule of the model, in the form that `config._attn_implementation` takes:

        query q may attend key k  <=>  view[q] = view[k]  and  (block[k] = 0  or  block[k] = block[q])

    Padding (negative view) attends to padding only, so that no softmax is empty; nobody reads what it computes. Flash
    attention has no mask: there the lengths of the views say it all, see `flash_attention_kwargs`. With
    `query_indices` only these entries of the (only) row have a query: all target slots, ascending.
    """
    if is_flash_attention_requested(config):
        if block_ids is None:
            return None
        raise ValueError(
            f"{config._attn_implementation} can not keep target blocks apart, so the predictor needs another backend: "
            "load the model with it and it chooses one, or set flex_attention or sdpa for the whole model."
        )
    if config._attn_implementation == "sdpa":
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


def flash_attention_kwargs(view_ids: torch.Tensor) -> dict:
    """Where each view starts in the flattened rows, as transformers hands it to flash attention's varlen kernels."""
    view_lengths = torch.unique_consecutive(view_ids.flatten(), return_counts=True)[1]
    starts = F.pad(view_lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = view_ids.shape[1]  # a bound is enough, and needs no value from the device
    return {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    attn_weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        attn_weights = attn_weights + attention_mask
    attn_weights = F.softmax(attn_weights, dim=-1, dtype=torch.float32).to(query.dtype)
    attn_weights = F.dropout(attn_weights, p=dropout, training=module.training)
    attn_output = torch.matmul(attn_weights, value)  # [batch, heads, length, head_dim]
    return attn_output.transpose(1, 2).contiguous(), attn_weights


# --- Layers, shared by the encoder and the predictor -----------------------------------------------------------------


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

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.freqs.dtype != torch.float32:  # after model.to(torch.bfloat16), say
            self.freqs = self.compute_freqs(self.freqs.device)
        return self

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        """position_ids [batch, length] -> angles [batch, length, rotary_dim], float32."""
        with torch.autocast(device_type=position_ids.device.type, enabled=False):
            return super().forward(position_ids)


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
        rotary_angles: torch.Tensor,
        attention_mask: "torch.Tensor | PackedViews | None" = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.attend(*self.project(hidden_states, rotary_angles), attention_mask, **kwargs)

    def project(self, hidden_states: torch.Tensor, rotary_angles: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[batch, length, hidden_size] -> rotated query, rotated key, value, each [batch, length, heads, head_dim]."""
        qkv = self.qkv_proj(hidden_states).unflatten(-1, (-1, self.head_dim))  # [batch, length, 3 * heads, head_dim]
        query_key, value = qkv.split([2 * self.num_heads, self.num_heads], dim=2)
        query_key = apply_rotary_emb(rotary_angles.unsqueeze(2), query_key)
        return (*query_key.chunk(2, dim=2), value)

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
        if isinstance(attention_mask, PackedViews):
            attn_output, attn_weights = packed_sdpa_attention(query, key, value, attention_mask, dropout), None
        else:
            attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, eager_attention_forward
            )
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


def layer_norm(config: TJEPAConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=config.use_bias)


class TJEPALayer(GradientCheckpointingLayer):
    """Pre-norm block: x += attention(norm(x)); x += mlp(norm(x))."""

    attention_class = TJEPAAttention

    def __init__(self, config: TJEPAConfig):
        super().__init__()
        self.attention_norm = layer_norm(config)
        self.attention = self.attention_class(config)
        self.mlp_norm = layer_norm(config)
        self.mlp = TJEPAMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotary_angles: torch.Tensor,
        attention_mask: "torch.Tensor | PackedViews | None" = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attn_output, _ = self.attention(self.attention_norm(hidden_states), rotary_angles, attention_mask, **kwargs)
        hidden_states = hidden_states + self.dropout(attn_output)
        return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))


# --- The encoder -----------------------------------------------------------------------------------------------------


# What a pretraining folder holds beside the encoder that was asked for, so that loading does not warn.
OTHER_PRETRAINING_WEIGHTS = [r"^target_encoder\.", r"^context_encoder\.", r"^predictor\."]


class TJEPAPreTrainedModel(PreTrainedModel):
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
        elif isinstance(module, TJEPARotaryEmbedding):  # buffers that are not saved are lost on the meta device
            init.copy_(module.freqs, module.compute_freqs())
            init.zeros_(module.dummy)
        elif isinstance(module, TJEPAPredictor):
            module.init_mask_token()
        elif isinstance(module, TJEPATokenHead):
            init.zeros_(module.bias)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *model_args, encoder: Literal["target", "context"] = "target", **kwargs
    ):
        r"""
        As in transformers, and for the encoder and the heads one argument more, which `AutoModel...from_pretrained`
        passes on as well. Weights are read from safetensors files only: others can hold code.

        Args:
            encoder (`str`, defaults to `"target"`):
                Which encoder of a pretraining folder to take: `"target"`, the moving average, which is the product
                of pretraining; or `"context"`, the one that was trained by gradient. Folders of an encoder or of a
                head hold only one: for them leave it out.

        Raises:
            ValueError: for another `encoder`, or for `"context"` where the folder has no context encoder; for
                `use_safetensors=False`.
            OSError: if there are no safetensors files.
        """
        if kwargs.pop("use_safetensors", None) is False:
            raise ValueError("T-JEPA weights are safetensors files only: leave out use_safetensors=False.")
        kwargs["use_safetensors"] = True
        if encoder not in ("target", "context"):
            raise ValueError(f"encoder must be 'target' (the moving average) or 'context', got {encoder!r}.")
        if not hasattr(cls, "encoder_weights"):  # a class that has no encoder to choose
            if encoder != "target":
                raise ValueError(f"{cls.__name__} holds both encoders: leave out encoder={encoder!r}.")
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

        renaming = {rf"^{encoder}_encoder\.": cls.encoder_weights, **(kwargs.pop("key_mapping", None) or {})}
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, key_mapping=renaming, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple with output_loading_info=True
        # transformers would undo the renaming when it saves; what we save is an encoder or a head under its own names.
        conversions = model.__dict__.pop("_weight_conversions", None) or []
        if encoder == "context" and not any(conversion.was_used() for conversion in conversions):
            raise ValueError(
                f"{pretrained_model_name_or_path} has no context encoder: only folders of TJEPAForPreTraining have "
                "one. Leave out encoder='context' to load the encoder that is there."
            )
        return loaded


class TJEPAModel(TJEPAPreTrainedModel):
    """
    The encoder: bidirectional pre-norm transformer with rotary positions. `AutoModel` on a pretraining folder gives
    the target encoder, with `encoder="context"` the context encoder; on the folder of a head, the head's encoder.
    """

    encoder_weights = "encoder."  # what the chosen encoder's weights are called before the prefix is dropped
    _keys_to_ignore_on_load_unexpected = [*OTHER_PRETRAINING_WEIGHTS, r"^token_head\."]

    def __init__(self, config: TJEPAConfig):
        super().__init__(config)
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary_embedding = TJEPARotaryEmbedding(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList([TJEPALayer(config) for _ in range(config.num_hidden_layers)])
        self.final_norm = layer_norm(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.token_embedding

    def set_input_embeddings(self, value: nn.Embedding):
        self.token_embedding = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        view_ids: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `[batch, length]`, *optional*): token ids.
            attention_mask (`torch.Tensor` of shape `[batch, length]`, *optional*):
                1 for real tokens, 0 for padding. For rows of one sequence each; packed rows have `view_ids`.
            position_ids (`torch.LongTensor` of shape `[batch, length]`, *optional*):
                Position of each token in its document; defaults to 0, 1, 2, ... in every row.
            inputs_embeds (`torch.FloatTensor` of shape `[batch, length, hidden_size]`, *optional*):
                Embeddings in place of `input_ids`.
            view_ids (`torch.LongTensor` of shape `[batch, length]`, *optional*):
                For packed rows: which sequence each token belongs to; tokens attend within their sequence. Ids differ
                between neighbouring sequences, also across rows; negative ids are padding.

        Returns:
            `BaseModelOutput` with `last_hidden_state` [batch, length, hidden_size], after the final LayerNorm.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give the model exactly one of input_ids and inputs_embeds.")
        if view_ids is not None and attention_mask is not None:
            raise ValueError(
                "Give the model attention_mask (one sequence per row) or view_ids (packed rows), not both."
            )
        if inputs_embeds is None:
            inputs_embeds = self.token_embedding(input_ids)
        if position_ids is None:
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device).unsqueeze(0)

        if view_ids is not None:
            attention_mask = packed_attention_mask(self.config, inputs_embeds, view_ids)
            if is_flash_attention_requested(self.config):
                kwargs.update(flash_attention_kwargs(view_ids))
        else:
            attention_mask = create_bidirectional_mask(self.config, inputs_embeds, attention_mask)

        hidden_states = self.dropout(inputs_embeds)
        rotary_angles = self.rotary_embedding(position_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states, rotary_angles, attention_mask=attention_mask, **kwargs)
        return BaseModelOutput(last_hidden_state=self.final_norm(hidden_states))


# --- The predictor ---------------------------------------------------------------------------------------------------


class TJEPAPredictorAttention(TJEPAAttention):
    """With `slot_indices` the queries are those of the target slots alone; keys and values are all entries."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotary_angles: torch.Tensor,
        attention_mask: "torch.Tensor | PackedViews | None",
        slot_indices: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if slot_indices is None:
            return super().forward(hidden_states, rotary_angles, attention_mask)
        sizes = [hidden_states.shape[-1], 2 * hidden_states.shape[-1]]
        q_weight, kv_weight = self.qkv_proj.weight.split(sizes)
        q_bias, kv_bias = (None, None) if self.qkv_proj.bias is None else self.qkv_proj.bias.split(sizes)
        query = F.linear(hidden_states[:, slot_indices], q_weight, q_bias).unflatten(-1, (-1, self.head_dim))
        key, value = F.linear(hidden_states, kv_weight, kv_bias).unflatten(-1, (-1, self.head_dim)).chunk(2, dim=2)
        rotary_angles = rotary_angles.unsqueeze(2)
        query, key = apply_rotary_emb(rotary_angles[:, slot_indices], query), apply_rotary_emb(rotary_angles, key)
        return self.attend(query, key, value, attention_mask)


class TJEPAPredictorLayer(TJEPALayer):
    """With `slot_indices` only the target slots move: the context keeps its states, and costs keys and values."""

    attention_class = TJEPAPredictorAttention

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotary_angles: torch.Tensor,
        attention_mask: "torch.Tensor | PackedViews | None",
        slot_indices: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """hidden_states [rows, row_length, hidden_size]; slot_indices int [num_slots], ascending, for a single row."""
        if slot_indices is None:
            return super().forward(hidden_states, rotary_angles, attention_mask)
        normed = self.attention_norm(hidden_states)
        attn_output, _ = self.attention(normed, rotary_angles, attention_mask, slot_indices)
        slots = hidden_states[:, slot_indices] + self.dropout(attn_output)
        slots = slots + self.dropout(self.mlp(self.mlp_norm(slots)))
        return hidden_states.index_copy(1, slot_indices, slots)


class TJEPAPredictor(TJEPAPreTrainedModel):
    """
    Predicts the target encoder's output at the target slots from the context encoder's output. All target blocks of a
    view share one sequence (target packing): blocks see the context and themselves, not each other. With
    `config.predictor_type="cross_attention"` only the slots are carried through the layers, and attend to the context
    encoder's output as it is.
    """

    def __init__(self, config: TJEPAConfig):
        super().__init__(config.predictor_config())
        if is_flash_attention_requested(self.config):  # it has no mask for target blocks
            self.config._attn_implementation = "flex_attention"
        encoder_width, width = config.hidden_size, config.predictor_hidden_size
        self.encoder_width = encoder_width
        # The mask token lives in the encoder's width: it takes the place of a context representation.
        if config.learned_mask_token:
            self.mask_token = nn.Parameter(torch.empty(encoder_width))
        else:
            self.register_buffer("mask_token", torch.empty(encoder_width), persistent=False)
        self.in_proj, self.out_proj = nn.Identity(), nn.Identity()
        if width != encoder_width:
            self.in_proj = nn.Linear(encoder_width, width, bias=config.use_bias)
            self.out_proj = nn.Linear(width, encoder_width, bias=config.use_bias)
        self.rotary_embedding = TJEPARotaryEmbedding(self.config)
        self.layers = nn.ModuleList([TJEPAPredictorLayer(self.config) for _ in range(self.config.num_hidden_layers)])
        self.final_norm = layer_norm(self.config)
        self.gradient_checkpointing = False
        self.post_init()

    @torch.no_grad()
    def init_mask_token(self):
        scale = 1.0 if self.config.learned_mask_token else self.encoder_width**-0.5
        init.constant_(self.mask_token, scale)

    def forward(
        self,
        context_states: torch.Tensor,
        prediction_indices: torch.LongTensor,
        prediction_position_ids: torch.LongTensor,
        prediction_view_ids: torch.LongTensor,
        prediction_block_ids: torch.LongTensor,
        slot_indices: torch.LongTensor,
    ) -> torch.Tensor:
        r"""
        Args:
            context_states (`torch.FloatTensor` of shape `[num_contexts, hidden_size]`):
                The context encoder's output, rows flattened.
            prediction_indices (`torch.LongTensor` of shape `[rows, row_length]`):
                For context entries the index into `context_states`; not read at target slots and padding.
            prediction_position_ids, prediction_view_ids, prediction_block_ids (as `prediction_indices`):
                Position in the document, view (negative: padding) and block (0: context) of every entry.
            slot_indices (`torch.LongTensor` of shape `[num_slots]`):
                Where the target slots lie in the flattened rows.

        Returns:
            `torch.FloatTensor` of shape `[num_slots, hidden_size]`: the predictions.
        """
        # The mask token is one more row of the table that the entries are gathered from.
        table = self.in_proj(torch.cat([context_states, self.mask_token.to(context_states.dtype).unsqueeze(0)]))
        entries = prediction_indices.masked_fill(prediction_block_ids > 0, len(context_states))
        hidden_states = F.embedding(entries, table)  # [rows, row_length, predictor_hidden_size]

        rotary_angles = self.rotary_embedding(prediction_position_ids)
        view_ids, block_ids = prediction_view_ids, prediction_block_ids
        sorted_slots, queries = slot_indices.long().sort().values, None
        # Layers behind these move the target slots alone. With SDPA that is the last one, whose context states nobody
        # reads; with flex_attention it is like the others, because its rows keep their length.
        num_full_layers = len(self.layers) - (self.config._attn_implementation == "sdpa")
        if self.config.predictor_type == "cross_attention":
            num_full_layers, queries = 0, sorted_slots
            hidden_states = hidden_states.flatten(0, 1)[None]  # the slots of all rows are one row of queries
            view_ids, block_ids = view_ids.view(1, -1), block_ids.view(1, -1)
        attention_mask = packed_attention_mask(self.config, hidden_states, view_ids, block_ids, queries)
        for layer in self.layers[:num_full_layers]:
            hidden_states = layer(hidden_states, rotary_angles, attention_mask=attention_mask)
        hidden_states, rotary_angles = hidden_states.flatten(0, 1)[None], rotary_angles.flatten(0, 1)[None]
        for layer in self.layers[num_full_layers:]:
            hidden_states = layer(
                hidden_states, rotary_angles, attention_mask=attention_mask, slot_indices=sorted_slots
            )
        slot_states = hidden_states[0].index_select(0, slot_indices)
        return self.out_proj(self.final_norm(slot_states))


class TJEPABoundaryPredictor(TJEPAPreTrainedModel):
    """
    Predicts at a target slot from two states, those of the nearest visible tokens to its left and right, and the
    distances to them: the span boundary objective of SpanBERT (arXiv 1907.10529) for representations. With l and r the
    two states, each plus the embedding of its distance (where there is no such token, that embedding alone):

        LayerNorm(W_2 LayerNorm(GELU(W_1 [l; r])))

    It can not look further: what it needs from there, the encoder has to gather in the visible tokens' states.
    """

    MAX_DISTANCE = 31  # in tokens; those further away share an embedding

    def __init__(self, config: TJEPAConfig):
        super().__init__(config)
        width = config.predictor_intermediate_size
        self.distance_embedding = nn.Embedding(2 * self.MAX_DISTANCE + 1, config.hidden_size)  # 0: there is no token
        self.up_proj = nn.Linear(2 * config.hidden_size, width, bias=config.use_bias)
        self.activation = ACT2FN[config.hidden_act]
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps, bias=config.use_bias)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=config.use_bias)
        self.final_norm = layer_norm(config)
        self.post_init()

    def forward(
        self,
        context_states: torch.Tensor,
        prediction_indices: torch.LongTensor,
        prediction_position_ids: torch.LongTensor,
        prediction_view_ids: torch.LongTensor,
        prediction_block_ids: torch.LongTensor,
        slot_indices: torch.LongTensor,
    ) -> torch.Tensor:
        """As [`TJEPAPredictor.forward`]."""
        view_ids, position_ids = prediction_view_ids.flatten().long(), prediction_position_ids.flatten().long()
        num_positions = position_ids.max() + 1
        places = view_ids * num_positions + position_ids  # ascending by view, in it by position
        nowhere = torch.iinfo(places.dtype).max
        is_context = (prediction_block_ids.flatten() == 0) & (view_ids >= 0)
        context_places, order = places.masked_fill(~is_context, nowhere).sort()
        slot_places = places[slot_indices].unsqueeze(-1)
        behind = torch.searchsorted(context_places, slot_places)
        neighbours = torch.cat([behind - 1, behind], dim=-1)  # [num_slots, 2]
        found_places = context_places[neighbours.clamp(min=0)]  # behind the last is a slot, which counts as nowhere
        is_there = (neighbours >= 0) & (found_places // num_positions == slot_places // num_positions)

        distances = (found_places - slot_places).clamp(-self.MAX_DISTANCE, self.MAX_DISTANCE).masked_fill(~is_there, 0)
        entries = prediction_indices.flatten()[order[neighbours.clamp(min=0)]].masked_fill(~is_there, 0)
        states = F.embedding(entries, context_states).masked_fill(~is_there.unsqueeze(-1), 0.0)
        states = states + self.distance_embedding(distances % (2 * self.MAX_DISTANCE + 1))  # [slots, 2, hidden_size]
        hidden_states = self.norm(self.activation(self.up_proj(states.flatten(-2))))
        return self.final_norm(self.down_proj(hidden_states))


# --- Pretraining -----------------------------------------------------------------------------------------------------


class TJEPATokenHead(nn.Module):
    """From hidden states to logits over the vocabulary: linear, GELU, LayerNorm, the tied input embedding, a bias."""

    def __init__(self, config: TJEPAConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=config.use_bias)
        self.norm = layer_norm(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden_states: torch.Tensor, embedding_weight: torch.Tensor) -> torch.Tensor:
        """hidden_states [..., hidden_size], embedding_weight [vocab_size, hidden_size] -> logits [..., vocab_size]."""
        return F.linear(self.norm(F.gelu(self.dense(hidden_states))), embedding_weight, self.bias)

    def resize(self, num_tokens: int) -> None:
        """Cuts the bias to a new vocabulary, or extends it by zeros."""
        bias = F.pad(self.bias.data, (0, num_tokens - len(self.bias)))  # a negative number cuts
        self.bias = nn.Parameter(bias, requires_grad=self.bias.requires_grad)


def mean_over_strategies(
    loss_per_slot: torch.Tensor, slot_strategy_ids: torch.Tensor, slots_per_strategy: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Each strategy counts equally, however many slots it has: the mean over strategies of the mean over their slots.

    Args:
        loss_per_slot (`torch.FloatTensor` of shape `[num_slots]`): losses.
        slot_strategy_ids (`torch.LongTensor` of shape `[num_slots]`): strategy of each slot.
        slots_per_strategy (`torch.Tensor` of shape `[num_strategies]`):
            How often each occurs among them; where the batch is a share of a larger one, how often on average in a
            share, a fraction (see [`TJEPAForPreTraining.forward`]).

    Returns:
        The loss (scalar) and the loss per strategy [num_strategies], 0 where a strategy has no slot in the batch.
    """
    sums = loss_per_slot.new_zeros(len(slots_per_strategy)).index_add(0, slot_strategy_ids, loss_per_slot)
    is_there = slots_per_strategy > 0
    loss_per_strategy = sums / slots_per_strategy.masked_fill(~is_there, 1)
    return loss_per_strategy.sum() / is_there.sum().clamp(min=1), loss_per_strategy


# LeJEPA's knots; fewer directions than there, because tokens are many and every call draws new ones
SIGREG_DIRECTIONS, SIGREG_KNOTS = 64, 17


def variance_covariance_loss(
    states: torch.Tensor,
    is_token: torch.Tensor,
    sum_over_processes: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """
    The variance and covariance terms of VICReg (arXiv 2105.04906), features centred over the batch, C = z'z / N:

        mean_j max(0, 1 - sqrt(C_jj + 1e-4)) + 0.04 * (1/d) * sum_{i != j} C_ij^2

    Args:
        states (`torch.FloatTensor` of shape `[num_entries, hidden_size]`): the context encoder's output z.
        is_token (`torch.BoolTensor` of shape `[num_entries]`): False for padding, which does not count.
        sum_over_processes (`Callable`, *optional*): see [`TJEPAForPreTraining.forward`].
    """
    total = sum_over_processes or (lambda tensor: tensor)
    with torch.autocast(device_type=states.device.type, enabled=False):
        num_tokens = total(is_token.sum()).clamp(min=1)
        states = states.float() * is_token.unsqueeze(-1)
        centred = (states - total(states.sum(dim=0)) / num_tokens) * is_token.unsqueeze(-1)
        covariance = total(centred.T @ centred) / num_tokens  # [hidden_size, hidden_size]
        variances = covariance.diagonal()
        variance_loss = F.relu(1.0 - torch.sqrt(variances + 1e-4)).mean()
        covariance_loss = (covariance.square().sum() - variances.square().sum()) / len(variances)
    return variance_loss + 0.04 * covariance_loss


def sigreg_loss(
    states: torch.Tensor,
    is_token: torch.Tensor,
    sum_over_processes: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """
    SIGReg of LeJEPA (arXiv 2511.08544): the test statistic of Epps and Pulley for N(0, 1), averaged over random
    directions a of unit length. With the empirical characteristic function phi_a(t) = 1/N sum_n exp(i t a'z_n):

        mean_a integral_{-3}^{3} |phi_a(t) - exp(-t^2/2)|^2 exp(-t^2/2) dt      by the trapezoidal rule on 17 knots

    The paper's statistic is N times this; without it the weight means the same for every batch size.

    The directions come anew from torch's generator in every call. On several processes the sum of their draws is
    used, so that all have the same, and N and phi_a are those of the batch of all processes.

    Args:
        states, is_token, sum_over_processes: as in [`variance_covariance_loss`].
    """
    total = sum_over_processes or (lambda tensor: tensor)
    with torch.autocast(device_type=states.device.type, enabled=False):
        directions = torch.randn(states.shape[-1], SIGREG_DIRECTIONS, device=states.device)
        projections = states.float() @ F.normalize(total(directions), dim=0)  # [num_entries, directions]
        knots = torch.linspace(0.0, 3.0, SIGREG_KNOTS, device=states.device)
        gaussian = torch.exp(-knots.square() / 2)  # the characteristic function of N(0, 1), and the window
        angles = projections.unsqueeze(-1) * knots  # [num_entries, directions, knots]
        waves = torch.stack([angles.cos(), angles.sin()])  # the real and the imaginary part of exp(i t a'z)
        waves = torch.einsum("wndk,n->wdk", waves, is_token.to(waves.dtype))
        cosines, sines = total(waves) / total(is_token.sum()).clamp(min=1)
        errors = (cosines - gaussian).square() + sines.square()
        return 2.0 * torch.trapezoid(errors * gaussian, knots).mean()  # the integrand is even


def normalise_per_document(states: torch.Tensor, document_ids: torch.Tensor, eps: float) -> torch.Tensor:
    """
    Instance normalisation without parameters: every feature gets mean 0 and variance 1 over the tokens of a document.

    Args:
        states (`torch.FloatTensor` of shape `[num_tokens, hidden_size]`): rows flattened.
        document_ids (`torch.LongTensor` of shape `[num_tokens]`): neighbours of the same id are a document.
        eps (`float`): added to the variance.
    """
    is_new = document_ids.diff(prepend=document_ids[:1]) != 0
    segments = is_new.cumsum(dim=0)  # 0, 0, 0, 1, 1, 2, ...
    counts = torch.zeros_like(states[:, :1]).index_add(0, segments, torch.ones_like(states[:, :1])).clamp(min=1)

    def document_mean(values: torch.Tensor) -> torch.Tensor:
        # room for as many documents as tokens: their number would have to be fetched from the device
        return (torch.zeros_like(values).index_add(0, segments, values) / counts)[segments]

    centred = states - document_mean(states)
    return centred * torch.rsqrt(document_mean(centred.square()) + eps)


def replace_tokens(input_ids: torch.Tensor, config: TJEPAConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Picks `config.denoising_ratio` of the entries, and replaces every second of these by a token drawn uniformly from
    the vocabulary: what BERT (arXiv 1810.04805) does to the tokens that it predicts and does not mask. Drawn from
    torch's generator, as dropout is: other than the masks, the draw depends on how a step is divided.

    Args:
        input_ids (`torch.LongTensor` of shape `[rows, row_length]`): token ids.

    Returns:
        The token ids with some replaced, and the picked entries' indices in the flattened rows, int64 [num_picked].
    """
    num_picked = max(1, round(config.denoising_ratio * input_ids.numel()))
    picked = torch.randperm(input_ids.numel(), device=input_ids.device)[:num_picked]
    replaced = picked[::2]
    tokens = torch.randint(config.vocab_size, replaced.shape, dtype=input_ids.dtype, device=input_ids.device)
    return input_ids.flatten().index_copy(0, replaced, tokens).view_as(input_ids), picked


def distance_to_labels(config: TJEPAConfig, predictions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`config.loss_type` of each slot: two float [num_slots, hidden_size] -> [num_slots]."""
    if config.loss_type == "cosine":
        return 1.0 - F.cosine_similarity(predictions, labels, dim=-1)
    if config.loss_type == "l2":
        return F.mse_loss(predictions, labels, reduction="none").mean(dim=-1)
    beta = 0.0 if config.loss_type == "l1" else config.smooth_l1_beta
    return F.smooth_l1_loss(predictions, labels, beta=beta, reduction="none").mean(dim=-1)


@dataclass
class TJEPAForPreTrainingOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `[]`): the weighted sum of the terms below.
        jepa_loss (`torch.FloatTensor` of shape `[]`): distance between prediction and label, strategies equal.
        loss_per_strategy (`torch.FloatTensor` of shape `[num_strategies]`): the same for each strategy.
        variance_covariance_loss, sigreg_loss, token_prediction_loss, denoising_loss
            (`torch.FloatTensor` of shape `[]`, *optional*):
            The optional terms before their weights; `None` where the weight is 0, and the last in evaluation.
        predictions (`torch.FloatTensor` of shape `[num_slots, hidden_size]`): the predictor's output.
        labels (`torch.FloatTensor` of shape `[num_slots, hidden_size]`): what they should be.
        context_states (`torch.FloatTensor` of shape `[num_contexts, hidden_size]`): the context encoder's output.
    """

    loss: torch.FloatTensor | None = None
    jepa_loss: torch.FloatTensor | None = None
    loss_per_strategy: torch.FloatTensor | None = None
    variance_covariance_loss: torch.FloatTensor | None = None
    sigreg_loss: torch.FloatTensor | None = None
    token_prediction_loss: torch.FloatTensor | None = None
    denoising_loss: torch.FloatTensor | None = None
    predictions: torch.FloatTensor | None = None
    labels: torch.FloatTensor | None = None
    context_states: torch.FloatTensor | None = None


class TJEPAForPreTraining(TJEPAPreTrainedModel):
    """
    Context encoder, target encoder and predictor (I-JEPA, arXiv 2301.08243, for text). Batches come from
    `DataCollatorForTJEPA`; the target encoder moves only by [`~TJEPAForPreTraining.update_target_encoder`].
    """

    base_model_prefix = "target_encoder"  # `base_model` is the product
    accepts_loss_kwargs = False  # the loss is a mean over the batch: the Trainer averages micro-batches itself
    _keep_in_fp32_modules_strict = ["target_encoder"]  # at momentum 0.999 a bfloat16 average loses its updates

    def __init__(self, config: TJEPAConfig):
        super().__init__(config)
        self.context_encoder = TJEPAModel(config)
        self.target_encoder = TJEPAModel(config)
        boundary = config.predictor_type == "boundary"
        self.predictor = (TJEPABoundaryPredictor if boundary else TJEPAPredictor)(config)
        predicts_tokens = config.token_prediction_weight > 0 or config.denoising_weight > 0
        self.token_head = TJEPATokenHead(config) if predicts_tokens else None
        self.post_init()
        self.train(self.training)
        self.update_target_encoder(0.0)  # training starts with both encoders equal

    def train(self, mode: bool = True) -> "TJEPAForPreTraining":
        """The target encoder never trains: no gradient, no dropout (loading from disk sets `requires_grad` anew)."""
        super().train(mode)
        self.target_encoder.eval().requires_grad_(False)
        return self

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, output_loading_info=False, **kwargs):
        """As in transformers. From the folder of an encoder both encoders start equal to it, as untrained ones do."""
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        missing, context_keys = (
            set(info["missing_keys"]),
            {f"context_encoder.{k}" for k in model.context_encoder.state_dict()},
        )
        if context_keys <= missing and not any(key.startswith("target_encoder.") for key in missing):
            model.context_encoder.load_state_dict(model.target_encoder.state_dict())
            info["missing_keys"] = type(info["missing_keys"])(missing - context_keys)
            logger.warning(
                f"{pretrained_model_name_or_path} holds one encoder: the context encoder starts equal to it."
            )
        return (model, info) if output_loading_info else model

    def get_input_embeddings(self) -> nn.Embedding:
        return self.context_encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding):
        self.context_encoder.set_input_embeddings(value)

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """As in transformers, for both encoders, which get the same new rows, and for the token head's bias."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        num_kept = min(len(embeddings.weight), len(self.target_encoder.token_embedding.weight))
        self.target_encoder.resize_token_embeddings(*args, **kwargs)
        with torch.no_grad():
            self.target_encoder.token_embedding.weight[num_kept:] = embeddings.weight[num_kept:]
        if self.token_head is not None:
            self.token_head.resize(len(embeddings.weight))
        return embeddings

    def _encoder_parameter_pairs(self):
        return zip(self.target_encoder.parameters(), self.context_encoder.parameters(), strict=True)

    @torch.no_grad()
    def update_target_encoder(self, momentum: float) -> None:
        """
        target <- momentum * target + (1 - momentum) * context, for every parameter, in the target's dtype.

        Args:
            momentum (`float`): in [0, 1].

        Raises:
            ValueError: for a momentum outside [0, 1].
        """
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"The momentum of the target encoder must be in [0, 1], got {momentum}.")
        targets, contexts = zip(*self._encoder_parameter_pairs(), strict=True)
        contexts = [context.to(target.dtype) for target, context in zip(targets, contexts, strict=True)]
        torch._foreach_mul_(targets, momentum)
        torch._foreach_add_(targets, contexts, alpha=1.0 - momentum)

    def _labels(
        self,
        input_ids: torch.LongTensor,
        position_ids: torch.LongTensor,
        document_ids: torch.LongTensor,
        label_indices: torch.LongTensor,
    ) -> torch.Tensor:
        """What the predictions should be, float32 [num_slots, hidden_size]; arguments as in `forward`."""
        num_layers, eps = self.config.target_layers, self.config.layer_norm_eps
        outputs = self.target_encoder(
            input_ids, position_ids=position_ids, view_ids=document_ids, output_hidden_states=num_layers > 1
        )
        layers = [outputs.last_hidden_state] if num_layers == 1 else outputs.hidden_states[-num_layers:]
        labels = []
        for states in layers:
            states = states.flatten(0, 1)
            if self.config.target_normalization == "instance":
                states = normalise_per_document(states.float(), document_ids.flatten(), eps)
                labels.append(states.index_select(0, label_indices))
            else:
                states = states.index_select(0, label_indices).float()
                labels.append(F.layer_norm(states, states.shape[-1:], eps=eps))
        return torch.stack(labels).mean(dim=0)

    def _token_losses(self, states: torch.Tensor, token_ids: torch.LongTensor) -> torch.Tensor:
        """Cross entropy of the token head: states [n, hidden_size], token_ids [n] -> [n]."""
        logits = self.token_head(states, self.get_input_embeddings().weight)
        return F.cross_entropy(logits.float(), token_ids.long(), reduction="none")

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor,
        position_ids: torch.LongTensor,
        document_ids: torch.LongTensor,
        context_indices: torch.LongTensor,
        context_view_ids: torch.LongTensor,
        prediction_indices: torch.LongTensor,
        prediction_position_ids: torch.LongTensor,
        prediction_view_ids: torch.LongTensor,
        prediction_block_ids: torch.LongTensor,
        slot_indices: torch.LongTensor,
        label_indices: torch.LongTensor,
        slot_strategy_ids: torch.LongTensor,
        slots_per_strategy: torch.Tensor,
        sum_over_processes: Callable[[torch.Tensor], torch.Tensor] | None = None,
        return_dict: bool | None = None,
    ) -> TJEPAForPreTrainingOutput:
        r"""
        Three streams of packed rows, made by `DataCollatorForTJEPA`; an index points into the flattened rows of
        another stream, and a negative document or view id is padding. Any integer type does; the collator makes int32.

        Args:
            input_ids, position_ids, document_ids (`torch.LongTensor` of shape `[rows, row_length]`):
                Stream 1, the documents: token, position in the document, and document of each entry.
            context_indices, context_view_ids (`torch.LongTensor` of shape `[rows, row_length]`):
                Stream 2, the visible tokens of every view: index into stream 1, and view.
            prediction_indices, prediction_position_ids, prediction_view_ids, prediction_block_ids
                (`torch.LongTensor` of shape `[rows, row_length]`):
                Stream 3, per view its context (`prediction_indices` points into stream 2, block 0) and behind it its
                target slots (blocks 1, 2, ... ascending).
            slot_indices, label_indices, slot_strategy_ids (`torch.LongTensor` of shape `[num_slots]`):
                For every target slot its index in stream 3, the index of its label in stream 1, and its strategy.
            slots_per_strategy (`torch.Tensor` of shape `[num_strategies]`):
                Number of slots of each strategy. Where this batch is one of several that make a step (on as many
                processes, or one after the other), the mean over those batches: the mean of their losses is then the
                loss of all their documents together, however unevenly these are divided.
            sum_over_processes (`Callable`, *optional*):
                Where the batch is spread over processes, what sums a tensor over them, differentiably: the
                variance/covariance term and SIGReg take their moments over the whole batch.
        """
        flat_input_ids, flat_position_ids = input_ids.flatten(), position_ids.flatten()

        with torch.no_grad():
            labels = self._labels(input_ids, position_ids, document_ids, label_indices)

        context_input_ids = visible_input_ids = flat_input_ids[context_indices]
        denoises = self.training and self.config.denoising_weight > 0
        if denoises:
            visible_input_ids, picked = replace_tokens(context_input_ids, self.config)
        context_states = self.context_encoder(
            visible_input_ids,
            position_ids=flat_position_ids[context_indices],
            view_ids=context_view_ids,
        )[0].flatten(0, 1)

        predictions = self.predictor(
            context_states,
            prediction_indices,
            prediction_position_ids,
            prediction_view_ids,
            prediction_block_ids,
            slot_indices,
        )

        loss_per_slot = distance_to_labels(self.config, predictions.float(), labels)
        jepa_loss, loss_per_strategy = mean_over_strategies(loss_per_slot, slot_strategy_ids, slots_per_strategy)
        output = TJEPAForPreTrainingOutput(
            loss=jepa_loss,
            jepa_loss=jepa_loss,
            loss_per_strategy=loss_per_strategy,
            predictions=predictions,
            labels=labels,
            context_states=context_states,
        )
        is_token = context_view_ids.flatten() >= 0
        if self.config.variance_covariance_weight > 0:
            output.variance_covariance_loss = variance_covariance_loss(context_states, is_token, sum_over_processes)
            output.loss = output.loss + self.config.variance_covariance_weight * output.variance_covariance_loss
        if self.config.sigreg_weight > 0:
            output.sigreg_loss = sigreg_loss(context_states, is_token, sum_over_processes)
            output.loss = output.loss + self.config.sigreg_weight * output.sigreg_loss
        if self.config.token_prediction_weight > 0:
            token_losses = self._token_losses(predictions, flat_input_ids[label_indices])
            output.token_prediction_loss, _ = mean_over_strategies(token_losses, slot_strategy_ids, slots_per_strategy)
            output.loss = output.loss + self.config.token_prediction_weight * output.token_prediction_loss
        if denoises:
            token_losses = self._token_losses(context_states[picked], context_input_ids.flatten()[picked])
            is_counted = is_token[picked]
            output.denoising_loss = (token_losses * is_counted).sum() / is_counted.sum().clamp(min=1)
            output.loss = output.loss + self.config.denoising_weight * output.denoising_loss
        return output


# --- Downstream heads ------------------------------------------------------------------------------------------------


class TJEPAPooling(nn.Module):
    """
    One vector per sequence, by `config.classifier_pooling`: the mean over the real tokens, the first real token, or a
    mean whose weights are learned (one score per token, softmax over the real tokens).
    """

    def __init__(self, config: TJEPAConfig):
        super().__init__()
        self.pooling = config.classifier_pooling
        if self.pooling == "attention":
            self.score = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """hidden_states [batch, length, hidden_size], attention_mask [batch, length] -> [batch, hidden_size]."""
        if attention_mask is None:
            is_token = hidden_states.new_ones(hidden_states.shape[:2], dtype=torch.bool)
        elif attention_mask.dim() == 2:
            is_token = attention_mask.to(hidden_states.device, torch.bool)
        else:
            raise ValueError(
                f"Pooling needs an attention_mask of shape [batch, length], got {list(attention_mask.shape)}."
            )
        if self.pooling == "first":  # of the real tokens: not the first entry where padding is on the left
            rows = torch.arange(len(hidden_states), device=hidden_states.device)
            return hidden_states[rows, is_token.int().argmax(dim=1)]
        if self.pooling == "attention":
            scores = self.score(hidden_states).squeeze(-1).float()
            weights = scores.masked_fill(~is_token, torch.finfo(torch.float32).min).softmax(dim=-1)
        else:
            weights = is_token / is_token.sum(dim=1, keepdim=True).clamp(min=1)
        return torch.einsum("bl,bld->bd", weights.to(hidden_states.dtype), hidden_states)


class TJEPAHeadModel(TJEPAPreTrainedModel):
    """
    What the heads share: an encoder. They load from a pretraining folder (the target encoder, or the context encoder
    with `from_pretrained(..., encoder="context")`), from an encoder folder, and from their own.
    """

    encoder_weights = "encoder."
    _keys_to_ignore_on_load_unexpected = [*OTHER_PRETRAINING_WEIGHTS, r"^token_head\."]

    def __init__(self, config: TJEPAConfig):
        super().__init__(config)
        self.encoder = TJEPAModel(config)
        dropout = config.classifier_dropout
        self.dropout = nn.Dropout(config.hidden_dropout_prob if dropout is None else dropout)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding):
        self.encoder.set_input_embeddings(value)


class TJEPAForSequenceClassification(TJEPAHeadModel):
    """Pooling, dropout and a linear layer: classes (one or several per text) or a regression."""

    accepts_loss_kwargs = False  # the loss is a mean over the batch: the Trainer averages micro-batches itself

    def __init__(self, config: TJEPAConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.pooling = TJEPAPooling(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        r"""
        Args:
            input_ids, attention_mask, position_ids, inputs_embeds: as in [`TJEPAModel`]; one text per row.
            labels (`torch.Tensor`, *optional*):
                `torch.LongTensor` of shape `[batch]` with classes below `config.num_labels`; for several classes per
                text (`config.problem_type="multi_label_classification"`) `torch.FloatTensor` of shape
                `[batch, num_labels]` with 0 and 1; for regression (`num_labels=1` or `problem_type="regression"`)
                `torch.FloatTensor` of shape `[batch]` or `[batch, num_labels]`. Without a `problem_type` integers
                are classes and floats are several classes per text.

        Returns:
            `SequenceClassifierOutput` with `logits` [batch, num_labels] and, with labels, `loss`.
        """
        outputs: BaseModelOutput = self.encoder(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        logits = self.classifier(self.dropout(self.pooling(outputs.last_hidden_state, attention_mask)))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class TJEPAForTokenClassification(TJEPAHeadModel):
    """Dropout and a linear layer on every token: tagging."""

    def __init__(self, config: TJEPAConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenClassifierOutput:
        r"""
        Args:
            input_ids, attention_mask, position_ids, inputs_embeds: as in [`TJEPAModel`].
            labels (`torch.LongTensor` of shape `[batch, length]`, *optional*): classes; -100 does not count.

        Returns:
            `TokenClassifierOutput` with `logits` [batch, length, num_labels] and, with labels, `loss`.
        """
        outputs: BaseModelOutput = self.encoder(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None if labels is None else self.loss_function(logits, labels, self.config, **kwargs)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class TJEPAForQuestionAnswering(TJEPAHeadModel):
    """Dropout and a linear layer on every token that scores it as the first and as the last of the answer."""

    accepts_loss_kwargs = False  # the loss is a mean over the batch: the Trainer averages micro-batches itself

    def __init__(self, config: TJEPAConfig):
        super().__init__(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> QuestionAnsweringModelOutput:
        r"""
        Args:
            input_ids, attention_mask, position_ids, inputs_embeds: as in [`TJEPAModel`]; question and text in a row.
            start_positions, end_positions (`torch.LongTensor` of shape `[batch]`, *optional*):
                First and last token of the answer; positions outside the row do not count.

        Returns:
            `QuestionAnsweringModelOutput` with `start_logits`, `end_logits` [batch, length] and, with both positions,
            `loss`.
        """
        outputs: BaseModelOutput = self.encoder(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        logits = self.qa_outputs(self.dropout(outputs.last_hidden_state))  # [batch, length, 2]
        start_logits, end_logits = (part.squeeze(-1).contiguous() for part in logits.split(1, dim=-1))
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class TJEPAForMaskedLM(TJEPAHeadModel):
    """
    Token prediction on the encoder's own output, for fine-tuning on a domain and for comparing against pretraining as
    a masked language model. The head is that of the token prediction in pretraining, and starts from its weights where
    the folder has them.
    """

    _keys_to_ignore_on_load_unexpected = OTHER_PRETRAINING_WEIGHTS
    _tied_weights_keys = {"decoder.weight": "encoder.token_embedding.weight"}

    def __init__(self, config: TJEPAConfig):
        super().__init__(config)
        self.token_head = TJEPATokenHead(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=False)  # its bias is the token head's
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear):
        """Also resizes the bias."""
        self.decoder = new_embeddings
        if len(new_embeddings.weight) != len(self.token_head.bias):
            self.token_head.resize(len(new_embeddings.weight))

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput:
        r"""
        Args:
            input_ids, attention_mask, position_ids, inputs_embeds: as in [`TJEPAModel`].
            labels (`torch.LongTensor` of shape `[batch, length]`, *optional*): token ids; -100 does not count.

        Returns:
            `MaskedLMOutput` with `logits` [batch, length, vocab_size] and, with labels, `loss`.
        """
        outputs: BaseModelOutput = self.encoder(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        logits = self.token_head(outputs.last_hidden_state, self.decoder.weight)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=logits.shape[-1], **kwargs)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


TJEPAConfig.register_for_auto_class()
TJEPAModel.register_for_auto_class("AutoModel")
TJEPAForPreTraining.register_for_auto_class("AutoModelForPreTraining")
TJEPAForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
TJEPAForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
TJEPAForQuestionAnswering.register_for_auto_class("AutoModelForQuestionAnswering")
TJEPAForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")

__all__ = [
    "TJEPAForMaskedLM",
    "TJEPAForPreTraining",
    "TJEPAForPreTrainingOutput",
    "TJEPAForQuestionAnswering",
    "TJEPAForSequenceClassification",
    "TJEPAForTokenClassification",
    "TJEPAModel",
    "TJEPAPreTrainedModel",
]
