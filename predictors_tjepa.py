"""From the context encoder's states to predictions at the target slots, and from states to tokens."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.utils.generic import is_flash_attention_requested

from .configuration_tjepa import TJEPAConfig
from .layers_tjepa import (
    VARLEN_ATTENTION,
    PackedViews,
    TJEPAAttention,
    TJEPALayer,
    TJEPALayerNorm,
    TJEPAModule,
    TJEPARotaryEmbedding,
    packed_attention_mask,
    rotate,
)


class TJEPAPredictorAttention(TJEPAAttention):
    """With `slot_indices` the queries are those of the target slots alone; keys and values are all entries."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotation: torch.Tensor,
        attention_mask: "torch.Tensor | PackedViews | None",
        slot_indices: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if slot_indices is None:
            return super().forward(hidden_states, rotation, attention_mask)
        if type(self.qkv_proj) is not nn.Linear:  # LoRA, or quantised: no plain weight to take apart
            query, key, value = self.project(hidden_states, rotation)
            return self.attend(query[:, slot_indices], key, value, attention_mask)
        sizes = [hidden_states.shape[-1], 2 * hidden_states.shape[-1]]
        q_weight, kv_weight = self.qkv_proj.weight.split(sizes)
        q_bias, kv_bias = (None, None) if self.qkv_proj.bias is None else self.qkv_proj.bias.split(sizes)
        query = F.linear(hidden_states[:, slot_indices], q_weight, q_bias).unflatten(-1, (-1, self.head_dim))
        key_value = F.linear(hidden_states, kv_weight, kv_bias).unflatten(-1, (-1, self.head_dim))
        query = rotate(query, rotation[:, slot_indices], self.num_heads)
        return self.attend(query, *rotate(key_value, rotation, self.num_heads).chunk(2, dim=2), attention_mask)


class TJEPAPredictorLayer(TJEPALayer):
    """
    With `slot_indices` only the target slots move: the context keeps its states, and costs keys and values. What comes
    back is then the slots alone, [1, num_slots, hidden_size].
    """

    attention_class = TJEPAPredictorAttention

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotation: torch.Tensor,
        attention_mask: "torch.Tensor | PackedViews | None",
        slot_indices: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """hidden_states [rows, row_length, hidden_size]; slot_indices int [num_slots], ascending, for a single row."""
        if slot_indices is None:
            return super().forward(hidden_states, rotation, attention_mask)
        normed = self.attention_norm(hidden_states)
        attn_output, _ = self.attention(normed, rotation, attention_mask, slot_indices)
        slots = hidden_states[:, slot_indices] + self.dropout(attn_output)
        return slots + self.dropout(self.mlp(self.mlp_norm(slots)))


class TJEPAPredictor(TJEPAModule):
    """
    Predicts the target encoder's output at the target slots from the context encoder's output. All target blocks of a
    view share one sequence (target packing): blocks see the context and themselves, not each other. With
    `config.predictor_type="cross_attention"` only the slots are carried through the layers, and attend to the context
    encoder's output as it is.
    """

    _no_split_modules = ["TJEPAPredictorLayer"]

    def __init__(self, config: TJEPAConfig):
        super().__init__(config.predictor_config())
        by_lengths = self.config._attn_implementation == VARLEN_ATTENTION or is_flash_attention_requested(self.config)
        if by_lengths:  # without a mask for target blocks
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
        self.final_norm = TJEPALayerNorm(self.config)
        self.gradient_checkpointing = False
        self.post_init()

    @torch.no_grad()
    def reset_own_parameters(self) -> None:
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
        groups: list[tuple[int, int, int]] | None = None,
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
                Where the target slots lie in the flattened rows, ascending.
            groups (`list[tuple[int, int, int]]`, *optional*): of equal views, where known; see [`PackedViews`].

        Returns:
            `torch.FloatTensor` of shape `[num_slots, hidden_size]`: the predictions.
        """
        # The mask token is one more row of the table that the entries are gathered from.
        table = self.in_proj(torch.cat([context_states, self.mask_token.to(context_states.dtype).unsqueeze(0)]))
        table = table.to(context_states.dtype)  # under autocast not bfloat16: the mask token's gradient sums many
        entries = prediction_indices.masked_fill(prediction_block_ids > 0, len(context_states))
        hidden_states = F.embedding(entries, table)  # [rows, row_length, predictor_hidden_size]

        rotation = self.rotary_embedding(prediction_position_ids)
        view_ids, block_ids = prediction_view_ids, prediction_block_ids
        slot_indices, queries = slot_indices.long(), None
        # Layers behind these move the target slots alone. With SDPA that is the last one, whose context states nobody
        # reads; with flex_attention it is like the others, because its rows keep their length.
        num_full_layers = len(self.layers) - (self.config._attn_implementation == "sdpa")
        if self.config.predictor_type == "cross_attention":
            num_full_layers, queries = 0, slot_indices
            hidden_states = hidden_states.flatten(0, 1)[None]  # the slots of all rows are one row of queries
            view_ids, block_ids = view_ids.view(1, -1), block_ids.view(1, -1)
        attention_mask = packed_attention_mask(self.config, hidden_states, view_ids, block_ids, queries, groups)
        for layer in self.layers[:num_full_layers]:
            hidden_states = layer(hidden_states, rotation, attention_mask=attention_mask)
        hidden_states, rotation = hidden_states.flatten(0, 1)[None], rotation.flatten(0, 1)[None]
        slot_states = None
        for layer in self.layers[num_full_layers:]:
            if slot_states is not None:
                hidden_states = hidden_states.index_copy(1, slot_indices, slot_states)
            slot_states = layer(hidden_states, rotation, attention_mask=attention_mask, slot_indices=slot_indices)
        slot_states = hidden_states[0].index_select(0, slot_indices) if slot_states is None else slot_states[0]
        return self.out_proj(self.final_norm(slot_states))


class TJEPAInPlacePredictor(TJEPAModule):
    """
    Predicts at a target slot from the state s that the context encoder has at its place, where it met a mask token:

        LayerNorm(W_2 LayerNorm(GELU(W_1 s)))
    """

    def __init__(self, config: TJEPAConfig):
        super().__init__(config)
        self.add_layers(config, config.hidden_size)

    def add_layers(self, config: TJEPAConfig, input_width: int) -> None:
        width = config.predictor_intermediate_size
        self.up_proj = nn.Linear(input_width, width, bias=config.use_bias)
        self.activation = ACT2FN[config.hidden_act]
        self.norm = TJEPALayerNorm(config, width)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=config.use_bias)
        self.final_norm = TJEPALayerNorm(config)
        self.post_init()

    def forward(self, slot_states: torch.Tensor) -> torch.Tensor:
        """float [num_slots, input_width] -> the predictions, [num_slots, hidden_size]."""
        return self.final_norm(self.down_proj(self.norm(self.activation(self.up_proj(slot_states)))))


class TJEPABoundaryPredictor(TJEPAInPlacePredictor):
    """
    Predicts at a target slot from two states, those of the nearest visible tokens to its left and right, and the
    distances to them: the span boundary objective of SpanBERT (arXiv 1907.10529) for representations. With l and r the
    two states, each plus the embedding of its distance (where there is no such token, that embedding alone):

        LayerNorm(W_2 LayerNorm(GELU(W_1 [l; r])))

    It cannot look further: what it needs from there, the encoder has to gather in the visible tokens' states.
    """

    MAX_DISTANCE = 31  # in tokens; those further away share an embedding

    def add_layers(self, config: TJEPAConfig, input_width: int) -> None:
        self.distance_embedding = nn.Embedding(2 * self.MAX_DISTANCE + 1, config.hidden_size)  # 0: there is no token
        super().add_layers(config, 2 * input_width)

    def forward(
        self,
        context_states: torch.Tensor,
        prediction_indices: torch.LongTensor,
        prediction_position_ids: torch.LongTensor,
        prediction_view_ids: torch.LongTensor,
        prediction_block_ids: torch.LongTensor,
        slot_indices: torch.LongTensor,
        groups: list[tuple[int, int, int]] | None = None,
    ) -> torch.Tensor:
        """As [`TJEPAPredictor.forward`]."""
        view_ids, position_ids = prediction_view_ids.flatten().long(), prediction_position_ids.flatten().long()
        num_positions = position_ids.max() + 1
        flat_positions = view_ids * num_positions + position_ids  # ascending by view, in it by position
        no_position = torch.iinfo(flat_positions.dtype).max
        is_context = (prediction_block_ids.flatten() == 0) & (view_ids >= 0)
        context_positions, order = flat_positions.masked_fill(~is_context, no_position).sort()
        slot_positions = flat_positions[slot_indices].unsqueeze(-1)
        right_neighbour = torch.searchsorted(context_positions, slot_positions)
        neighbours = torch.cat([right_neighbour - 1, right_neighbour], dim=-1)  # [num_slots, 2]
        found = context_positions[neighbours.clamp(min=0)]  # right of the last stands a slot, which has no position
        has_neighbour = (neighbours >= 0) & (found // num_positions == slot_positions // num_positions)

        distances = (found - slot_positions).clamp(-self.MAX_DISTANCE, self.MAX_DISTANCE)
        distances = distances.masked_fill(~has_neighbour, 0)
        entries = prediction_indices.flatten()[order[neighbours.clamp(min=0)]].masked_fill(~has_neighbour, 0)
        states = F.embedding(entries, context_states).masked_fill(~has_neighbour.unsqueeze(-1), 0.0)
        states = states + self.distance_embedding(distances % (2 * self.MAX_DISTANCE + 1))  # [slots, 2, hidden_size]
        return super().forward(states.flatten(-2))


class TJEPATokenHead(nn.Module):
    """From hidden states to logits over the vocabulary: linear, GELU, LayerNorm, the tied input embedding, a bias."""

    compiles_alone = True

    def __init__(self, config: TJEPAConfig, embedding_width: int | None = None):
        """`embedding_width`: of an encoder whose embedding is not as wide as its states (ELECTRA, ALBERT)."""
        super().__init__()
        width = embedding_width or config.hidden_size
        self.dense = nn.Linear(config.hidden_size, width, bias=config.use_bias)
        self.norm = TJEPALayerNorm(config, width)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(
        self,
        hidden_states: torch.Tensor,
        embedding_weight: torch.Tensor | None = None,
        token_ids: torch.LongTensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """
        hidden_states [..., hidden_size], embedding_weight [vocab_size, hidden_size] -> logits [..., vocab_size]; with
        token_ids [n] for hidden_states [n, hidden_size] -> the cross entropy of each, float32 [n]. Without an
        embedding_weight -> what a decoder reads [..., hidden_size], and the bias that its output lacks [vocab_size].
        """
        states = self.norm(F.gelu(self.dense(hidden_states)))
        if embedding_weight is None:
            return states, self.bias
        logits = F.linear(states, embedding_weight, self.bias)
        if token_ids is None:
            return logits
        return F.cross_entropy(logits.float(), token_ids.long(), reduction="none")

    def reset_own_parameters(self) -> None:
        init.zeros_(self.bias)

    @torch.no_grad()
    def fit_to(self, embedding_weight: torch.Tensor) -> None:
        """Scales the norm so that logits start no wider than with deviation 1: T5's embeddings are not scaled."""
        scale = 1.0 / (float(embedding_weight.std()) * embedding_weight.shape[1] ** 0.5)
        self.norm.weight.fill_(min(1.0, scale))

    def resize(self, num_tokens: int) -> None:
        """Cuts the bias to a new vocabulary, or extends it by zeros."""
        bias = F.pad(self.bias.data, (0, num_tokens - len(self.bias)))  # a negative number cuts
        self.bias = nn.Parameter(bias, requires_grad=self.bias.requires_grad)
