"""Which encoder, how it is fed from a packed batch, and what is taken from it: states, and labels.

Notable: beside our own architecture any bidirectional text encoder of transformers can be both encoders. Its modules
are used as they are. There are two ways to show one a part of a document, and both give the same states:

- *packed*: the visible tokens of all views in one row, with their positions and without a mask. For encoders that take
  their attention from transformers' `AttentionInterface` and read `position_ids`.
- *padded*: one view per row, the whole document in it; hidden places hold the mask token and are padding to the
  attention, so that every position is right, absolute or relative, without `position_ids`. For all others.

Which of them an encoder can do is measured on made-up views (`measure_encoder`), not looked up by its name.
"""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    AutoModel,
    AutoModelForTextEncoding,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from .configuration_tjepa import TJEPAConfig
from .layers_tjepa import PACKED_ATTENTION, PackedViews


logger = logging.get_logger(__name__)


# --- What the context encoder reads, and what becomes of states ------------------------------------------------------


def replace_tokens(input_ids: torch.Tensor, config: TJEPAConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Picks `config.denoising_ratio` of the entries, and replaces every second of these by a token drawn uniformly from
    the vocabulary: what BERT (arXiv 1810.04805) does to the tokens that it predicts and does not mask. Drawn from
    torch's generator, as dropout is: unlike the masks, the draw depends on how a step is divided.

    Args:
        input_ids (`torch.LongTensor` of shape `[rows, row_length]`): token ids.

    Returns:
        The token ids with some replaced, and the picked entries' indices in the flattened rows, int64 [num_picked].
        Special tokens can be among the picked; they stay as they are.
    """
    num_picked = max(1, round(config.denoising_ratio * input_ids.numel()))
    picked = torch.randperm(input_ids.numel(), device=input_ids.device)[:num_picked]
    replaced = picked[::2]
    tokens = torch.randint(config.vocab_size, replaced.shape, dtype=input_ids.dtype, device=input_ids.device)
    flat_ids = input_ids.flatten()
    if config.special_token_ids:
        tokens = torch.where(is_special_token(flat_ids[replaced], config), flat_ids[replaced], tokens)
    return flat_ids.index_copy(0, replaced, tokens).view_as(input_ids), picked


def hide_in_place(input_ids: torch.Tensor, hidden: torch.Tensor, config: TJEPAConfig, training: bool) -> torch.Tensor:
    """
    Puts the mask token at hidden places. In training, as in BERT (arXiv 1810.04805), a tenth of them gets a token
    drawn uniformly from the vocabulary instead, and a tenth keeps its own.

    Args:
        input_ids (`torch.LongTensor` of shape `[rows, row_length]`): token ids.
        hidden (`torch.LongTensor` of shape `[num_slots]`): where the hidden places lie in the flattened rows.

    Raises:
        ValueError: if the configuration names no mask token.
    """
    if config.mask_token_id is None:
        raise ValueError("predictor_type='in_place' puts config.mask_token_id at hidden places: set it.")
    flat_ids = input_ids.flatten()
    tokens = torch.full_like(flat_ids[hidden], config.mask_token_id)
    if training:
        draw = torch.rand(tokens.shape, device=tokens.device)
        other = torch.randint(config.vocab_size, tokens.shape, dtype=tokens.dtype, device=tokens.device)
        tokens = torch.where(draw < 0.8, tokens, torch.where(draw < 0.9, other, flat_ids[hidden]))
    return flat_ids.index_copy(0, hidden.long(), tokens).view_as(input_ids)


def is_special_token(input_ids: torch.Tensor, config: TJEPAConfig) -> torch.Tensor:
    """Which of the token ids are the special tokens around a text; of our own architecture none are."""
    special = torch.tensor(config.special_token_ids or [], dtype=input_ids.dtype, device=input_ids.device)
    return torch.isin(input_ids, special)


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


# --- Other encoders of transformers ----------------------------------------------------------------------------------


TOLERANCE = 1e-4  # of the states' mean size, in float32: rounding stays below, and nothing else does
NUM_CHUNKS = 4  # padded views go through the encoder in so many parts; a fixed number, the same on every process


@dataclass(frozen=True)
class EncoderTraits:
    """
    What `measure_encoder` found.

    Args:
        is_packed: whether packed rows are used.
        difference: largest difference of packed from padded states, relative to their mean size; inf where the
            encoder does not take packed rows.
        position_offset: added to position ids (RoBERTa counts from its padding id + 1).
        unused_parameters: names of those that the last hidden state does not depend on, such as a pooler's.
    """

    is_packed: bool
    difference: float
    position_offset: int
    unused_parameters: tuple[str, ...]


def build_encoder(config: PreTrainedConfig) -> PreTrainedModel:
    """
    An encoder of transformers with random weights, of an encoder-decoder (T5) the encoder alone.

    Raises:
        ValueError: if transformers has no model of that kind, or it reads no tokens.
    """
    config = copy.deepcopy(config)  # T5EncoderModel writes into it, and two encoders must not share one
    config._attn_implementation = None  # what suits it
    # whatever its folder has: float32, or what `from_pretrained` was asked for
    encoder = encoder_class(config).from_config(config, dtype=torch.get_default_dtype())
    try:
        embedding = encoder.get_input_embeddings()
    except NotImplementedError:  # transformers' own, for sounds and some images
        embedding = None
    if not hasattr(embedding, "weight") or embedding.weight.dim() != 2:  # patches of an image have no or another one
        raise ValueError(f"{type(encoder).__name__} has no token embedding: give an encoder of texts, such as BERT.")
    return encoder


def copy_weights(encoder: nn.Module, copied: PreTrainedModel) -> tuple[list[str], list[str]]:
    """Gives `copied` the weights of `encoder` -> the names that it lacks, and those that `copied` does not know."""
    weights, own = encoder.state_dict(), copied.state_dict()
    for name in weights:
        if name in own and weights[name].shape != own[name].shape:
            raise ValueError(
                f"{type(encoder).__name__} has not the sizes of its configuration: {name} is "
                f"{list(weights[name].shape)}, and {list(own[name].shape)} by the configuration. Give "
                "TJEPAConfig(encoder=encoder.config, ...) of this encoder."
            )
    return tuple(copied.load_state_dict(weights, strict=False))


def encoder_class(config: PreTrainedConfig) -> type:
    """The Auto class that makes an encoder of a configuration: of T5 AutoModel would make encoder and decoder."""
    return AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel


def encode_padded(
    encoder: nn.Module,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    rows: torch.Tensor,
    row_lengths: torch.Tensor,
    mask_token_id: int,
    num_layers: int = 1,
) -> list[torch.Tensor]:
    """
    One view per row, its hidden tokens as padding in their places; what they are does not enter.

    Args:
        input_ids, position_ids, rows (`torch.LongTensor` of shape `[num_entries]`):
            Of each visible token its id, its position in the document, and its row.
        row_lengths (`torch.LongTensor` of shape `[num_rows]`): tokens of the document, hidden ones included.
        mask_token_id: what stands in hidden places. (RoBERTa numbers positions by what is not the padding token.)
        num_layers: how many of the last blocks' outputs are returned.

    Returns:
        For each of the last `num_layers` blocks its output, `[num_entries, hidden_size]`.
    """
    shape = (len(row_lengths), int(row_lengths.max()))
    padded_ids = torch.full(shape, mask_token_id, dtype=torch.long, device=input_ids.device)
    is_visible = torch.zeros(shape, dtype=torch.long, device=input_ids.device)
    padded_ids[rows, position_ids], is_visible[rows, position_ids] = input_ids, 1
    is_visible[:, 0] |= is_visible.sum(dim=1) == 0  # a row without a view: no softmax may be empty
    inputs = {"input_ids": padded_ids, "attention_mask": is_visible}
    outputs = encoder(**inputs, output_hidden_states=num_layers > 1, return_dict=True)
    return [states[rows, position_ids] for states in last_layers(outputs, num_layers)]


def last_layers(outputs, num_layers: int) -> tuple[torch.Tensor, ...]:
    """The outputs of the last blocks, of the last one after a final norm."""
    return (outputs[0],) if num_layers == 1 else outputs.hidden_states[-num_layers:]


def encode(
    encoder: nn.Module,
    config: TJEPAConfig,
    traits: EncoderTraits | None,
    input_ids: torch.LongTensor,
    position_ids: torch.LongTensor,
    view_ids: torch.LongTensor,
    groups: list[tuple[int, int, int]] | None = None,
    view_lengths: torch.LongTensor | None = None,
    longest: int | None = None,
    num_layers: int = 1,
) -> list[torch.Tensor]:
    """
    The states of the visible tokens of views, which attend within their view.

    Args:
        encoder: ours, or another one of transformers.
        traits: of another one; `None` for ours.
        input_ids, position_ids, view_ids (`torch.LongTensor` of shape `[rows, row_length]`):
            Token, position in the document, and view of each entry; a negative view is padding.
        groups: of equal views, where they are known; see [`PackedViews`].
        view_lengths (`torch.LongTensor` of shape `[num_views]`, *optional*):
            Tokens of each view's whole document; for padded rows.
        longest: tokens of the longest document, where that is known; for local attention in packed rows.
        num_layers: how many of the last blocks' outputs are returned.

    Returns:
        For each of the last `num_layers` blocks its output, `[rows * row_length, hidden_size]`; what it has at padding
        means nothing.
    """
    if traits is None or traits.is_packed:
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "view_ids": view_ids, "groups": groups}
        if traits is not None:
            views = PackedViews.from_ids(view_ids) if groups is None else PackedViews.from_groups(groups)
            views.positions, views.longest = position_ids.long().flatten(), longest
            position_ids = position_ids.long() + traits.position_offset
            inputs = {"input_ids": input_ids.long(), "position_ids": position_ids, "packed_views": views}
        outputs = encoder(**inputs, output_hidden_states=num_layers > 1, return_dict=True)
        return [states.flatten(0, 1) for states in last_layers(outputs, num_layers)]

    input_ids, position_ids, view_ids = (ids.long().flatten() for ids in (input_ids, position_ids, view_ids))
    layers = None
    for views in view_lengths.argsort().tensor_split(NUM_CHUNKS):  # rows of like length together: little padding
        row_of_view = view_ids.new_full((len(view_lengths) + 1,), -1)  # the last one is that of padding
        row_of_view[views] = torch.arange(len(views), device=views.device)
        rows = row_of_view[view_ids.clamp(min=-1)]
        entries = (rows >= 0).nonzero()[:, 0]
        row_lengths = view_lengths[views] if len(views) else view_lengths.new_ones(1)
        chosen = (of_entry[entries] for of_entry in (input_ids, position_ids, rows))
        states = encode_padded(encoder, *chosen, row_lengths, config.mask_token_id or 0, num_layers)
        if layers is None:
            layers = [layer.new_zeros(len(view_ids), layer.shape[-1]) for layer in states]
        layers = [whole.index_copy(0, entries, part) for whole, part in zip(layers, states, strict=True)]
    return layers


def encode_documents(
    encoder: nn.Module,
    config: TJEPAConfig,
    traits: EncoderTraits | None,
    input_ids: torch.LongTensor,
    position_ids: torch.LongTensor,
    document_ids: torch.LongTensor,
    groups: list[tuple[int, int, int]] | None = None,
    num_layers: int = 1,
) -> list[torch.Tensor]:
    """[`encode`] of whole documents, of which nothing is hidden."""
    lengths = None
    if traits is not None and not traits.is_packed:
        lengths = document_ids[document_ids >= 0].bincount()
    documents = (input_ids, position_ids, document_ids, groups, lengths, longest_document(groups))
    return encode(encoder, config, traits, *documents, num_layers)


def longest_document(groups: list[tuple[int, int, int]] | None) -> int | None:
    """From the groups of equal documents, where they are known."""
    return None if groups is None else max(length for _, length, _ in groups)


def lengths_of_views(
    document_ids: torch.LongTensor, context_indices: torch.LongTensor, context_view_ids: torch.LongTensor
) -> torch.LongTensor:
    """
    Tokens of each view's whole document, int64 [num_views], from the streams of a batch (`TJEPAForPreTraining`). The
    host waits for the device here; packed rows do without.
    """
    document_ids, view_ids = document_ids.flatten().long(), context_view_ids.flatten().long()
    is_token = view_ids >= 0
    view_documents = document_ids.new_zeros(int(view_ids.max()) + 1)
    view_documents[view_ids[is_token]] = document_ids[context_indices.flatten().long()[is_token]]
    return document_ids[document_ids >= 0].bincount()[view_documents]


@dataclass
class MadeUpViews:
    """
    Views with gaps to measure an encoder on; of each visible token its id, position and row, int64 [num_tokens]. The
    first row is longer than a local window, and all rows together are longer than a table of positions.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    rows: torch.Tensor
    row_lengths: torch.Tensor
    other_token: int  # neither the padding token nor the mask token

    @classmethod
    def draw(cls, encoder: PreTrainedModel, mask_token_id: int) -> "MadeUpViews":
        first_position = position_offsets(encoder.config)[-1]
        num_positions = (getattr(encoder.config, "max_position_embeddings", None) or 0) - first_position
        window = getattr(encoder.config, "sliding_window", None) or 0
        longest = max(24, 2 * window + 8)
        longest = min(longest, num_positions) if num_positions > 0 else longest
        lengths = [longest, *[11] * (2 + (num_positions // 4 if 0 < num_positions <= 1024 else 0))]
        positions = [torch.arange(0, length, 2 if row == 0 else 3) for row, length in enumerate(lengths)]
        rows = [torch.full_like(places, row) for row, places in enumerate(positions)]
        num_tokens = len(encoder.get_input_embeddings().weight)
        excluded = {getattr(encoder.config, "pad_token_id", None) or 0, mask_token_id}
        allowed = torch.tensor([token for token in range(min(num_tokens, 1000)) if token not in excluded])
        generator = torch.Generator().manual_seed(0)
        tokens = allowed[torch.randint(len(allowed), (sum(map(len, rows)),), generator=generator)]
        tensors = (tokens, torch.cat(positions), torch.cat(rows), torch.tensor(lengths))
        return cls(*(tensor.to(encoder.device) for tensor in tensors), other_token=int(allowed[0]))

    def without_first_row(self) -> "MadeUpViews":
        is_kept = self.rows > 0
        kept = (self.tokens[is_kept], self.positions[is_kept], self.rows[is_kept] - 1, self.row_lengths[1:])
        return MadeUpViews(*kept, other_token=self.other_token)

    def encode(self, encoder: PreTrainedModel, filling: int) -> torch.Tensor:
        """Padded, with the token `filling` in hidden places -> float32 [num_tokens, hidden_size]."""
        return encode_padded(encoder, self.tokens, self.positions, self.rows, self.row_lengths, filling)[0].float()


def position_offsets(config: PreTrainedConfig) -> list[int]:
    """What encoders add to positions: nothing, or (RoBERTa) their padding id + 1."""
    return [0, (getattr(config, "pad_token_id", None) or 0) + 1]


def measure_encoder(encoder: PreTrainedModel, mask_token_id: int, encoder_input: str = "auto") -> EncoderTraits:
    """
    Feeds an encoder made-up views, padded and packed, and compares. Where packed rows are used, the encoder's
    attention becomes `tjepa_packed`; nothing else in it changes.

    Args:
        encoder: with its weights.
        mask_token_id: stands in hidden places.
        encoder_input: `"auto"`: packed where it can be; `"packed"` or `"padded"`.

    Raises:
        ValueError: for an encoder whose states depend on what is padding, or not on later tokens; if it is to be
            packed and cannot be.
    """
    if encoder.dtype.itemsize < 4:  # rounding to 16 bits is larger than what is measured
        traits = measure_encoder(copy.deepcopy(encoder).float(), mask_token_id, encoder_input)
        if traits.is_packed:
            encoder.set_attn_implementation(PACKED_ATTENTION)
        return traits
    name, was_training = type(encoder).__name__, encoder.training
    encoder.eval()
    views = MadeUpViews.draw(encoder, mask_token_id)
    unused = find_unused_parameters(encoder)
    with torch.no_grad():
        expected = views.encode(encoder, mask_token_id)
        size = mean_size(expected)

        changed = copy.copy(views)
        changed.tokens = views.tokens.clone()
        changed.tokens[1] += 1 if views.tokens[1] == views.other_token else views.other_token - views.tokens[1]
        if torch.equal(changed.encode(encoder, mask_token_id)[0], expected[0]):
            raise ValueError(
                f"{name} does not look ahead: the state of a text's first token is the same whatever comes next, as "
                "in a language model that writes. T-JEPA trains encoders that read in both directions."
            )
        by_hidden = (views.encode(encoder, views.other_token) - expected).abs().max() / size
        alone = views.without_first_row().encode(encoder, mask_token_id)
        by_padding = (alone - expected[views.rows > 0]).abs().max() / size
        if not max(by_hidden, by_padding) < TOLERANCE:
            raise ValueError(
                f"{name} sees through its attention_mask: tokens that it hides change the states of others, by "
                f"{by_hidden:.0e} of their size in the middle of a text and by {by_padding:.0e} behind it. T-JEPA "
                "cannot hide anything from such an encoder."
            )
        difference, offset = float("inf"), 0
        if encoder_input != "padded":
            difference, offset = measure_packed(encoder, views, expected)
    encoder.train(was_training)
    if encoder_input == "packed" and not difference < TOLERANCE:
        raise ValueError(
            f"{name} cannot be fed packed rows: its states differ from those of padded ones by {difference:.0e} of "
            "their size. Leave encoder_input at 'auto', or set 'padded'."
        )
    return EncoderTraits(difference < TOLERANCE, difference, offset, unused)


@torch.enable_grad()
def find_unused_parameters(encoder: PreTrainedModel) -> tuple[str, ...]:
    """Names of the parameters that the last hidden state does not depend on."""
    views = MadeUpViews.draw(encoder, mask_token_id=0)
    required_grad = [parameter.requires_grad for parameter in encoder.parameters()]
    encoder.requires_grad_(True)
    names, parameters = zip(*encoder.named_parameters(), strict=True)
    total = views.encode(encoder, views.other_token).square().sum()
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    for parameter, requires_grad in zip(parameters, required_grad, strict=True):
        parameter.requires_grad_(requires_grad)
    return tuple(name for name, gradient in zip(names, gradients, strict=True) if gradient is None)


@torch.no_grad()
def measure_packing(encoder: PreTrainedModel) -> EncoderTraits:
    """Of `measure_encoder` what counts where nothing is hidden and nothing is trained: whether rows can be packed."""
    encoder.eval()
    views = MadeUpViews.draw(encoder, mask_token_id=0)
    expected = views.encode(encoder, views.other_token)
    difference, offset = measure_packed(encoder, views, expected)
    return EncoderTraits(difference < TOLERANCE, difference, offset, ())


def mean_size(states: torch.Tensor) -> float:
    return float(states.abs().mean().clamp(min=1e-6))


def measure_packed(encoder: PreTrainedModel, views: MadeUpViews, expected: torch.Tensor) -> tuple[float, int]:
    """
    The largest difference of packed from padded states, relative to their mean size, and the position offset that
    makes it so small. Where it is below `TOLERANCE`, the encoder keeps the attention that packed rows need.
    """
    before, smallest, size = encoder.config._attn_implementation, float("inf"), mean_size(expected)
    for offset in position_offsets(encoder.config):
        traits = EncoderTraits(True, 0.0, offset, ())
        row = (views.tokens[None], views.positions[None], views.rows[None])
        try:
            encoder.set_attn_implementation(PACKED_ATTENTION)
            states = encode(encoder, TJEPAConfig(), traits, *row)[0].float()
        except Exception as error:  # no attention interface, no position_ids, no place for packed_views
            logger.info(f"{type(encoder).__name__} does not take packed rows: {error}")
            continue
        if states.shape == expected.shape:
            smallest = min(smallest, float((states - expected).abs().max()) / size)
        if smallest < TOLERANCE:
            return smallest, offset
    if encoder.config._attn_implementation != before:
        encoder.set_attn_implementation(before)
    return smallest, 0


# --- Labels ----------------------------------------------------------------------------------------------------------


def make_labels(
    encoder: nn.Module,
    config: TJEPAConfig,
    input_ids: torch.LongTensor,
    position_ids: torch.LongTensor,
    document_ids: torch.LongTensor,
    label_indices: torch.LongTensor,
    groups: list[tuple[int, int, int]] | None = None,
    traits: EncoderTraits | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What the predictions should be: the target encoder's outputs at the hidden positions, normalised
    (`config.target_normalization`) and averaged over its last `config.target_layers` blocks.

    Args:
        encoder: the target encoder.
        input_ids, position_ids, document_ids (`torch.LongTensor` of shape `[rows, row_length]`): the documents.
        label_indices (`torch.LongTensor` of shape `[num_slots]`): where the labels lie in the flattened rows.
        groups: of equal documents, where they are known; see [`PackedViews`].
        traits: of an encoder of another architecture.

    Returns:
        The labels, float32 [num_slots, hidden_size], and the outputs of the last block that they come from,
        [rows * row_length, hidden_size].
    """
    layers = encode_documents(
        encoder, config, traits, input_ids, position_ids, document_ids, groups, config.target_layers
    )
    eps, labels = config.layer_norm_eps, []
    for states in layers:
        if config.target_normalization == "instance":
            states = normalise_per_document(states.float(), document_ids.flatten(), eps)
            labels.append(states.index_select(0, label_indices))
        else:
            states = states.index_select(0, label_indices).float()
            labels.append(F.layer_norm(states, states.shape[-1:], eps=eps))
    return torch.stack(labels).mean(dim=0), layers[-1]
