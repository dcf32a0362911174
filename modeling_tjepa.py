"""T-JEPA: a text encoder pretrained by predicting its own representations.

The encoder (`TJEPAModel`); `TJEPAForPreTraining`, which holds the context encoder, its moving average (the target
encoder), the predictor and the loss; and the downstream heads on an encoder. The parts are in the files beside it:
layers, encoders, predictors, losses. None of them knows masking strategies, training loops or processes, because they
are copied to the Hub beside every checkpoint.
"""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, find_adapter_config_file, logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_tjepa import WEIGHTS, TJEPAConfig
from .encoders_tjepa import (
    EncoderTraits,
    build_encoder,
    copy_weights,
    encode,
    encode_documents,
    hide_in_place,
    is_special_token,
    lengths_of_views,
    longest_document,
    make_labels,
    measure_encoder,
    replace_tokens,
)
from .layers_tjepa import (
    TJEPALayer,
    TJEPALayerNorm,
    TJEPAModule,
    TJEPARotaryEmbedding,
    attends_by_lengths,
    flash_attention_kwargs,
    packed_attention_mask,
)
from .losses_tjepa import (
    contrastive_loss,
    distance_to_labels,
    mean_over_strategies,
    pool,
    pooled_loss,
    sigreg_loss,
    variance_covariance_loss,
)
from .predictors_tjepa import TJEPABoundaryPredictor, TJEPAInPlacePredictor, TJEPAPredictor, TJEPATokenHead


logger = logging.get_logger(__name__)


# --- The encoder -----------------------------------------------------------------------------------------------------


# What a pretraining folder holds beside the encoder that was asked for, so that loading does not warn.
OTHER_PRETRAINING_WEIGHTS = [r"^(target|context)_encoder\.", r"^(segment_)?predictor\."]
# Arguments of `from_pretrained` that say where files come from, and so count for config.json, too.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


class TJEPAPreTrainedModel(TJEPAModule):
    """Loading: which encoder of a folder, and nothing but safetensors."""

    _keys_to_ignore_on_load_unexpected = [*OTHER_PRETRAINING_WEIGHTS, r"^token_head\."]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *model_args, encoder: Literal["target", "context"] = "target", **kwargs
    ) -> Self:
        r"""
        As in transformers, and for the encoder and the heads one argument more, which `AutoModel...from_pretrained`
        passes on as well. Weights are read from safetensors files only: others can hold code.

        Args:
            encoder (`str`, defaults to `"target"`):
                Which encoder of a pretraining folder to take: `"target"`, the moving average, which is the product
                of pretraining; or `"context"`, the one that was trained by gradient. Folders of an encoder or of a
                head hold only one: for them leave it out.

        Raises:
            ValueError: for another `encoder`, or for `"context"` where the folder has no context encoder; for the
                folder of another architecture, or without an encoder's weights; for `use_safetensors=False`.
            OSError: if there are no safetensors files.
        """
        if kwargs.pop("use_safetensors", None) is False:
            raise ValueError("T-JEPA weights are safetensors files only: leave out use_safetensors=False.")
        if encoder not in ("target", "context"):
            raise ValueError(f"encoder must be 'target' (the moving average) or 'context', got {encoder!r}.")
        name = pretrained_model_name_or_path
        if not isinstance(kwargs.get("config"), PreTrainedConfig):
            hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
            values = PreTrainedConfig.get_config_dict(kwargs.get("config") or name, **hub)[0]
            model_type = values.get("model_type")
            is_adapter = not values and find_adapter_config_file(name, **hub) is not None  # it names its base model
            if model_type != cls.config_class.model_type and not is_adapter:
                raise ValueError(
                    f"{name} holds {f'a {model_type} model' if model_type else 'no model that names its type'}, and "
                    f"{cls.__name__} loads T-JEPA models only. Load others with AutoModel of transformers; to pretrain"
                    " one further hand it to TJEPAForPreTraining.from_encoder, or run `tjepa pretrain` on the folder."
                )
        wants_info = kwargs.pop("output_loading_info", False)
        has_choice = not issubclass(cls, TJEPAForPreTraining)
        if has_choice:  # of an encoder alone the prefix is dropped afterwards
            kwargs["key_mapping"] = {rf"^{encoder}_encoder\.": "encoder.", **(kwargs.get("key_mapping") or {})}
        elif encoder != "target":
            raise ValueError(f"{cls.__name__} holds both encoders: leave out encoder={encoder!r}.")
        model, info = super().from_pretrained(
            name, *model_args, use_safetensors=True, output_loading_info=True, **kwargs
        )
        if has_choice:
            # transformers would undo the renaming when it saves; what we save is an encoder or a head with its names.
            conversions = model.__dict__.pop("_weight_conversions", None) or []
            if encoder == "context" and not any(conversion.was_used() for conversion in conversions):
                raise ValueError(
                    f"{name} has no context encoder: only folders of TJEPAForPreTraining have one. Leave out "
                    "encoder='context' to load the encoder that is there."
                )
        model._complete(info, name)
        return (model, info) if wants_info else model  # type: ignore[return-value]  # as transformers declares it

    def _complete(self, info: dict, name: str) -> None:
        """Refuses a folder that has no weights of the encoder: what came of it would be random."""
        weights = self.base_model.state_dict()
        prefix = "" if self.base_model is self else f"{self.base_model_prefix}."
        if {prefix + key for key in weights} <= set(info["missing_keys"]):
            raise ValueError(f"{name} has none of the weights of a T-JEPA encoder.")


def refuse_other_encoder(config: TJEPAConfig, name: str) -> None:
    """Raises a `ValueError` where a folder's encoders are not of our own architecture."""
    if config.encoder is not None:
        raise ValueError(
            f"{name} is our own architecture, and this folder is for going on with the pretraining of a "
            f"{config.encoder.model_type} model: load it with TJEPAForPreTraining, or the encoder with AutoModel from "
            "the folder above."
        )


class TJEPAModel(TJEPAPreTrainedModel):
    """
    The encoder: bidirectional pre-norm transformer with rotary positions. `AutoModel` on a pretraining folder gives
    the target encoder, with `encoder="context"` the context encoder; on the folder of a head, the head's encoder.
    """

    _input_embed_layer = "token_embedding"

    def __init__(self, config: TJEPAConfig):
        refuse_other_encoder(config, type(self).__name__)
        super().__init__(config)
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary_embedding = TJEPARotaryEmbedding(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList([TJEPALayer(config) for _ in range(config.num_hidden_layers)])
        self.final_norm = TJEPALayerNorm(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        view_ids: torch.LongTensor | None = None,
        groups: list[tuple[int, int, int]] | None = None,
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
                For packed rows: which sequence each token belongs to; tokens attend within their sequence. An id is
                that of one sequence, whose tokens are neighbours in one row; negative ids are padding.
            groups (`list[tuple[int, int, int]]`, *optional*):
                What `view_ids` say, for the host: of neighbouring sequences of equal length their number, that length
                and 0; padding is sequences, too. Without it some backends wait for the device to find it.

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
            attention_mask = packed_attention_mask(self.config, inputs_embeds, view_ids, groups=groups)
            if attends_by_lengths(self.config, inputs_embeds):
                kwargs.update(flash_attention_kwargs(view_ids, groups))
        else:
            attention_mask = create_bidirectional_mask(self.config, inputs_embeds, attention_mask)

        hidden_states = self.dropout(inputs_embeds)
        rotation = self.rotary_embedding(position_ids)
        for layer in self.layers if hidden_states.shape[1] > 0 else ():  # an empty text: attention refuses no tokens
            hidden_states = layer(hidden_states, rotation, attention_mask=attention_mask, **kwargs)
        return BaseModelOutput(last_hidden_state=self.final_norm(hidden_states))


# --- Pretraining -----------------------------------------------------------------------------------------------------


def groups_of(view_groups: object | None, stream: str) -> list[tuple[int, int, int]] | None:
    """The groups of a stream; without them a graph of the whole model serves more than one batch."""
    return None if torch.compiler.is_compiling() else getattr(view_groups, stream, None)


PREDICTORS = {"boundary": TJEPABoundaryPredictor, "in_place": TJEPAInPlacePredictor}  # others: TJEPAPredictor


@dataclass
class TJEPAForPreTrainingOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `[]`): the weighted sum of the terms below.
        jepa_loss (`torch.FloatTensor` of shape `[]`): distance between prediction and label, strategies equal.
        loss_per_strategy (`torch.FloatTensor` of shape `[num_strategies]`): the same for each strategy.
        variance_covariance_loss, sigreg_loss, token_prediction_loss, denoising_loss, pooled_loss, segment_loss
            (`torch.FloatTensor` of shape `[]`, *optional*):
            The optional terms before their weights; `None` where the weight is 0, and `denoising_loss` in evaluation.
        token_loss_per_strategy (`torch.FloatTensor` of shape `[num_strategies]`, *optional*):
            `token_prediction_loss` for each strategy.
        predictions (`torch.FloatTensor` of shape `[num_slots, hidden_size]`): the predictor's output.
        labels (`torch.FloatTensor` of shape `[num_slots, hidden_size]`): what they should be.
        context_states (`torch.FloatTensor` of shape `[rows * row_length, hidden_size]`):
            The context encoder's output; what it has at padding means nothing.
    """

    loss: torch.FloatTensor | None = None
    jepa_loss: torch.FloatTensor | None = None
    loss_per_strategy: torch.FloatTensor | None = None
    variance_covariance_loss: torch.FloatTensor | None = None
    sigreg_loss: torch.FloatTensor | None = None
    token_prediction_loss: torch.FloatTensor | None = None
    token_loss_per_strategy: torch.FloatTensor | None = None
    denoising_loss: torch.FloatTensor | None = None
    pooled_loss: torch.FloatTensor | None = None
    segment_loss: torch.FloatTensor | None = None
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
        own = config.encoder is None
        self.context_encoder = TJEPAModel(config) if own else build_encoder(config.encoder)
        self.target_encoder = (TJEPAModel(config) if own else build_encoder(config.encoder)).float()
        self.encoder_traits: EncoderTraits | None = None  # of another encoder; see `measure_encoder`
        self.predictor = PREDICTORS.get(config.predictor_type, TJEPAPredictor)(config)
        self.segment_predictor = None
        if config.segment_weight > 0:
            self.segment_predictor = TJEPAPredictor(config.segment_predictor_config())
        self.trains_token_head = config.token_prediction_weight > 0 or config.denoising_weight > 0
        predicts_tokens = self.trains_token_head or config.token_decoder
        width = self.context_encoder.get_input_embeddings().weight.shape[1]
        self.token_head = TJEPATokenHead(config, width) if predicts_tokens else None
        self.post_init()
        # FSDP shards each of these apart: there must be some, and none may hold the embedding, which it shards itself
        names = {type(module).__name__ for module in self.modules()}
        embedding = self.get_input_embeddings()
        around = {type(module).__name__ for module in self.modules() if embedding in set(module.modules())}
        self._no_split_modules &= names - around
        self._keys_to_ignore_on_load_unexpected = set()  # the encoders' own, of folders like this one, do not apply
        self.train(self.training)
        self.update_target_encoder(0.0)  # training starts with both encoders equal

    def train(self, mode: bool = True) -> "TJEPAForPreTraining":
        """The target encoder never trains: no gradient, no dropout (loading from disk sets `requires_grad` anew)."""
        super().train(mode)
        self.target_encoder.eval().requires_grad_(False)
        for name in () if self.encoder_traits is None else self.encoder_traits.unused_parameters:
            self.context_encoder.get_parameter(name).requires_grad_(False)
        if self.token_head is not None and not self.trains_token_head:
            self.token_head.requires_grad_(False)
        return self

    @classmethod
    def from_encoder(cls, encoder: PreTrainedModel, config: TJEPAConfig | None = None) -> "TJEPAForPreTraining":
        """
        Both encoders equal to an encoder of transformers, which is copied, and a new predictor.

        Args:
            encoder (`PreTrainedModel`): a bidirectional text encoder, as `AutoModel` loads it.
            config (`TJEPAConfig`, *optional*):
                Of predictor and loss; its `encoder` is the configuration of this one. Default: the reference's.

        Raises:
            ValueError: if the encoder cannot be trained (see `measure_encoder`), or is not of the class and sizes that
                AutoModel makes of its configuration; for a `config` of our own architecture.
        """
        if not isinstance(encoder, nn.Module):
            raise ValueError(f"from_encoder needs a model: load it with AutoModel.from_pretrained. Got {encoder!r}.")
        config = config or TJEPAConfig(encoder=encoder.config)
        if config.encoder is None:
            raise ValueError("from_encoder needs TJEPAConfig(encoder=encoder.config, ...): this one is of no encoder.")
        model = cls(config)
        for part in (model.context_encoder, model.target_encoder):
            missing, unknown = copy_weights(encoder, part)
        if model.token_head is not None:
            model.token_head.fit_to(model.get_input_embeddings().weight)
        needed = set(missing) - set(model.measure_encoders().unused_parameters)
        if needed or unknown:
            raise ValueError(
                f"{type(encoder).__name__} is not the {type(model.target_encoder).__name__} that its configuration "
                f"stands for: {len(needed)} weights are missing and {len(unknown)} are left over, such as "
                f"{next(iter([*needed, *unknown]))}. Give the encoder alone, as AutoModel loads it."
            )
        return model

    def measure_encoders(self) -> EncoderTraits | None:
        """
        How another encoder is fed, measured where it is not known yet (`measure_encoder`); parameters that no loss
        depends on get no gradient from then on. A run calls it before it makes its optimizer, else the first `forward`
        does. For our own architecture there is nothing to measure.
        """
        if self.config.encoder is not None and self.encoder_traits is None:
            mask_token_id = self.config.mask_token_id or 0
            with torch.inference_mode(False), torch.autocast(self.device.type, enabled=False):  # of a first `forward`
                traits = measure_encoder(self.target_encoder, mask_token_id, self.config.encoder_input)
            if traits.is_packed:
                self.context_encoder.set_attn_implementation(self.target_encoder.config._attn_implementation)
            self.encoder_traits = traits
            self.train(self.training)
        return self.encoder_traits

    def save_pretrained(self, *args, save_original_format: bool = False, **kwargs) -> None:
        """As in transformers, with the names that weights have here, not older ones: the Trainer resumes by these."""
        super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)

    def _complete(self, info: dict, name: str) -> None:
        """From the folder of an encoder both encoders start equal to it, as untrained ones do. A head is refused."""
        missing = set(info["missing_keys"])
        parts = ("context_encoder", "target_encoder")
        context, target = ({f"{part}.{key}" for key in getattr(self, part).state_dict()} for part in parts)
        if not context <= missing:
            return
        if target <= missing:
            flags = shlex.join(["--model_name_or_path", f"{name}-encoder", "--tokenizer_name", str(name)])
            raise ValueError(
                f"{name} has no weights that {type(self).__name__} could go on with. If it holds a head with its "
                'encoder, save the encoder by itself: python -c "from transformers import AutoModel; AutoModel.'
                f"from_pretrained('{name}', trust_remote_code=True).save_pretrained('{name}-encoder')\"; then "
                f"pretrain with {flags}."
            )
        self.context_encoder.load_state_dict(self.target_encoder.state_dict())
        info["missing_keys"] = type(info["missing_keys"])(missing - context)
        logger.warning(f"{name} holds one encoder: the context encoder starts equal to it.")

    def get_input_embeddings(self) -> nn.Embedding:
        return self.context_encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding):
        self.context_encoder.set_input_embeddings(value)

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """As in transformers, for both encoders, which get the same new rows, and for the token head's bias."""
        num_before = len(self.get_input_embeddings().weight)
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        num_tokens = len(embeddings.weight)
        target_embeddings = self.target_encoder.resize_token_embeddings(*args, **kwargs)
        with torch.no_grad():
            target_embeddings.weight[num_before:] = embeddings.weight[num_before:]
        if self.config.encoder is not None:
            for config in (self.config.encoder, self.context_encoder.config, self.target_encoder.config):
                config.vocab_size = num_tokens
        if self.token_head is not None:
            self.token_head.resize(num_tokens)
        return embeddings

    @torch.no_grad()
    def update_target_encoder(self, momentum: float) -> None:
        """
        target <- momentum * target + (1 - momentum) * context, for every parameter, in the target's dtype.

        Args:
            momentum (`float`): in [0, 1].

        Raises:
            ValueError: for a momentum outside [0, 1]; if one encoder has parameters that the other lacks; for a
                momentum below 1 if the target encoder is in 16 bits.
        """
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"The momentum of the target encoder must be in [0, 1], got {momentum}.")
        targets, contexts = (dict(part.named_parameters()) for part in (self.target_encoder, self.context_encoder))
        if others := sorted(targets.keys() ^ contexts.keys()):
            raise ValueError(f"One encoder alone has {others[0]}: adapters such as LoRA are for encoders and heads.")
        if momentum < 1.0 and any(target.dtype.itemsize < 4 for target in targets.values()):
            raise ValueError("The target encoder is in 16 bits, where small updates are lost: use autocast instead.")
        contexts = [contexts[name].to(target.dtype) for name, target in targets.items()]
        get_ema_multi_avg_fn(momentum)(list(targets.values()), contexts, None)  # exact where both are equal

    @torch.no_grad()
    def predict_states(self, input_ids: torch.LongTensor, is_hidden: torch.Tensor) -> torch.Tensor:
        """
        What the predictor expects of a text's hidden tokens. Neighbours are a block; blocks do not see each other.

        Args:
            input_ids (`torch.LongTensor` of shape `[length]`):
                One text, with the special tokens around it that the encoder is used to. Those hidden do not count.
            is_hidden (`torch.BoolTensor` of shape `[length]`): which tokens are hidden.

        Returns:
            `torch.FloatTensor` of shape `[num_hidden, hidden_size]`: predictions of the labels, in the text's order.

        Raises:
            ValueError: if no token is hidden, or none is visible.
        """
        return self._predict(input_ids, is_hidden)[1]

    @torch.no_grad()
    def predict_tokens(self, input_ids: torch.LongTensor, is_hidden: torch.Tensor) -> torch.Tensor:
        """Logits `[num_hidden, vocab_size]` of the same; without a token head a `ValueError`, too."""
        if self.token_head is None:
            raise ValueError("This model has no token head. `tjepa train-decoder FOLDER` fits one to its predictions.")
        states = self._predict(input_ids, is_hidden)[0]
        return self.token_head(states, self.get_input_embeddings().weight).float()

    def _predict(self, input_ids: torch.LongTensor, is_hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The states [num_hidden, hidden_size] that tokens are predicted from, and the predictions of the labels."""
        if is_hidden.all() or not is_hidden.any():
            raise ValueError("There must be a hidden token to predict, and a visible one to predict it from.")
        is_hidden, was_training, traits = is_hidden.bool(), self.training, self.measure_encoders()
        self.eval()
        places, slots = torch.arange(len(input_ids), device=input_ids.device)[None], is_hidden.nonzero().T
        in_place, views = self.config.predictor_type == "in_place", torch.zeros_like(places)
        visible = places if in_place else (~is_hidden).nonzero().T  # [1, num_visible]: one row, and one view
        ids = hide_in_place(input_ids[None], slots[0], self.config, False) if in_place else input_ids[visible]
        lengths, num_visible = views.new_tensor([len(input_ids)]), visible.shape[1]
        view = (ids, visible, views[:, :num_visible])
        (states,) = encode(self.context_encoder, self.config, traits, *view, view_lengths=lengths)
        if in_place:
            slot_states = states[slots[0]]
            predictions = self.predictor(slot_states)
        else:
            blocks = (is_hidden & ~is_hidden.roll(1).index_fill(0, places[0, :1], False)).cumsum(0)[slots]
            block_ids = torch.cat([views[:, :num_visible], blocks], dim=1)
            position_ids = torch.cat([visible, slots], dim=1)
            slot_states = self.predictor(states, places, position_ids, views, block_ids, places[0, num_visible:])
            predictions = slot_states
        self.train(was_training)
        return slot_states, predictions

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
        tokens_per_document: torch.LongTensor | None = None,
        hidden_indices: torch.LongTensor | None = None,
        segments: dict[str, torch.LongTensor] | None = None,
        hidden_parts: dict[str, torch.LongTensor] | None = None,
        view_groups: object | None = None,
        sum_over_processes: Callable[[torch.Tensor], torch.Tensor] | None = None,
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
                For every target slot its index in stream 3 (ascending), the index of its label in stream 1, and its
                strategy.
            slots_per_strategy (`torch.Tensor` of shape `[num_strategies]`):
                Number of slots of each strategy. Where this batch is one of several that make a step (on as many
                processes, or one after the other), the mean over those batches: the mean of their losses is then the
                loss of all their documents together, however unevenly these are divided.
            tokens_per_document (`torch.LongTensor` of shape `[num_documents]`, *optional*):
                Their tokens; for `segment_weight`.
            hidden_indices (`torch.LongTensor` of shape `[num_slots]`, *optional*):
                Where hidden tokens keep their places (`predictor_type="in_place"`): of each slot the index of its
                place in stream 2, which then holds every token of a view. Stream 3 is not read.
            segments (`dict`, *optional*):
                Where the documents are segments of longer ones (`segment_weight`): a batch like this one whose
                documents are the longer ones and whose token ids are the segments' numbers in this one.
            hidden_parts (`dict`, *optional*):
                For `pooled_weight`: what is hidden of each view as a text of its own, in a stream like the first whose
                document ids are the views', with its groups; and `view_documents`, the document of each view.
            view_groups (`SimpleNamespace`, *optional*):
                The groups of equal views in each stream, `documents`, `contexts` and `predictions`, as plain integers
                (padding is views, too): with them the host never waits for the device.
            sum_over_processes (`Callable`, *optional*):
                Where the batch is spread over processes, what sums a tensor over them, differentiably: the
                variance/covariance term and SIGReg take their moments over the whole batch.
        """
        flat_input_ids = input_ids.flatten()
        traits = self.measure_encoders()
        is_padded = traits is not None and not traits.is_packed
        view_lengths = lengths_of_views(document_ids, context_indices, context_view_ids) if is_padded else None

        document_groups = groups_of(view_groups, "documents")
        with torch.no_grad():
            documents = (input_ids, position_ids, document_ids)
            labels, target_states = make_labels(
                self.target_encoder, self.config, *documents, label_indices, document_groups, traits
            )
            if self.config.pooled_weight > 0:
                if hidden_parts is None:
                    raise ValueError("pooled_weight needs more of a batch: call collator.fit_to(model.config) first.")
                parts = [hidden_parts[name] for name in ("input_ids", "position_ids", "document_ids")]
                part_groups = groups_of(hidden_parts["view_groups"], "documents")
                (part_states,) = encode_documents(self.target_encoder, self.config, traits, *parts, part_groups)

        context_input_ids = visible_input_ids = flat_input_ids[context_indices]
        is_token = is_visible = context_view_ids.flatten() >= 0
        denoises = self.training and self.config.denoising_weight > 0
        if denoises:
            visible_input_ids, picked = replace_tokens(visible_input_ids, self.config)
        in_place = self.config.predictor_type == "in_place"
        if in_place:
            if hidden_indices is None:
                raise ValueError("predictor_type='in_place' needs other batches: collator.fit_to(model.config) first.")
            visible_input_ids = hide_in_place(visible_input_ids, hidden_indices, self.config, self.training)
            is_visible = is_token.index_fill(0, hidden_indices.long(), False)
        contexts = (visible_input_ids, position_ids.flatten()[context_indices], context_view_ids)
        shapes = (groups_of(view_groups, "contexts"), view_lengths, longest_document(document_groups))
        (context_states,) = encode(self.context_encoder, self.config, traits, *contexts, *shapes)

        if in_place:
            slot_states = context_states.index_select(0, hidden_indices)
            predictions = self.predictor(slot_states)
        else:
            stream = (prediction_indices, prediction_position_ids, prediction_view_ids, prediction_block_ids)
            groups = groups_of(view_groups, "predictions")
            predictions = slot_states = self.predictor(context_states, *stream, slot_indices, groups)

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
        if self.config.variance_covariance_weight > 0:
            output.variance_covariance_loss = variance_covariance_loss(context_states, is_token, sum_over_processes)
        if self.config.sigreg_weight > 0:
            output.sigreg_loss = sigreg_loss(context_states, is_token, sum_over_processes)
        embedding_weight = self.get_input_embeddings().weight
        if self.config.token_prediction_weight > 0:
            token_losses = self.token_head(slot_states, embedding_weight, flat_input_ids[label_indices])
            output.token_prediction_loss, output.token_loss_per_strategy = mean_over_strategies(
                token_losses, slot_strategy_ids, slots_per_strategy
            )
        if denoises:
            picked_ids = context_input_ids.flatten()[picked]
            token_losses = self.token_head(context_states[picked], embedding_weight, picked_ids)
            is_counted = is_visible[picked] & ~is_special_token(picked_ids, self.config)
            output.denoising_loss = (token_losses * is_counted).sum() / is_counted.sum().clamp(min=1)
        if self.config.pooled_weight > 0:
            view_documents, part_ids = hidden_parts["view_documents"], parts[-1].flatten()
            seen = pool(context_states, context_view_ids.flatten(), is_visible, len(view_documents))
            hidden = pool(part_states, part_ids, part_ids >= 0, len(view_documents))
            output.pooled_loss = pooled_loss(seen, hidden, view_documents, self.config.contrastive_temperature)
        if self.config.segment_weight > 0:
            if segments is None:
                raise ValueError("segment_weight needs documents in segments: SegmentCollator makes its batches.")
            num_documents = max(1, len(tokens_per_document))  # which are segments
            flat_document_ids = document_ids.flatten()
            keys = pool(target_states, flat_document_ids, flat_document_ids >= 0, num_documents)
            pooled = pool(context_states, flat_document_ids[context_indices.flatten()], is_token, num_documents)
            numbers = segments["input_ids"].flatten().long()
            visible = pooled[numbers[segments["context_indices"].flatten()]]
            stream = (segments[f"prediction_{name}"] for name in ("indices", "position_ids", "view_ids", "block_ids"))
            groups = groups_of(segments["view_groups"], "predictions")
            guesses = self.segment_predictor(visible, *stream, segments["slot_indices"], groups)
            answers = numbers[segments["label_indices"]]
            centred = keys - keys.mean(dim=0)  # what all segments have in common would leave little to tell them by
            output.segment_loss = contrastive_loss(guesses, centred, answers, self.config.contrastive_temperature)
        for name in WEIGHTS:
            if (term := getattr(output, name.replace("_weight", "_loss"))) is not None:
                output.loss = output.loss + getattr(self.config, name) * term
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
        # An empty text has weights and a vector of 0.
        if self.pooling == "first":  # of the real tokens: not the first entry where padding is on the left
            weights = is_token & (is_token.cumsum(dim=1) == 1)
        elif self.pooling == "attention":
            scores = self.score(hidden_states).squeeze(-1).float()
            weights = scores.masked_fill(~is_token, torch.finfo(torch.float32).min).softmax(dim=-1) * is_token
        else:
            weights = is_token / is_token.sum(dim=1, keepdim=True).clamp(min=1)
        return torch.einsum("bl,bld->bd", weights.to(hidden_states.dtype), hidden_states)


class TJEPAHeadModel(TJEPAPreTrainedModel):
    """
    What the heads share: an encoder, and the way from it to logits and a loss. They load from a pretraining folder
    (the target encoder, or the context encoder with `from_pretrained(..., encoder="context")`), from an encoder
    folder, and from their own.
    """

    output_class: type[ModelOutput]

    def __init__(self, config: TJEPAConfig):
        refuse_other_encoder(config, type(self).__name__)
        super().__init__(config)
        self.encoder = TJEPAModel(config)
        dropout = config.classifier_dropout
        self.dropout = nn.Dropout(config.hidden_dropout_prob if dropout is None else dropout)

    def compute_logits(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """hidden_states [batch, length, hidden_size], attention_mask [batch, length] -> logits."""
        raise NotImplementedError

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ModelOutput:
        r"""
        Args:
            input_ids, attention_mask, position_ids, inputs_embeds: as in [`TJEPAModel`]; one text per row.
            labels (`torch.Tensor`, *optional*): see the class.

        Returns:
            The class's output, with `logits` and, with labels, `loss`.
        """
        outputs: BaseModelOutput = self.encoder(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **{**kwargs, "return_dict": True},
        )
        logits, loss = self.compute_logits(outputs.last_hidden_state, attention_mask), None
        if labels is not None:  # by the task, as each of transformers' losses takes them
            sizes = {"config": self.config, "vocab_size": logits.shape[-1]}
            loss = self.loss_function(logits=logits, pooled_logits=logits, labels=labels, **sizes, **kwargs)
        return self.output_class(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class TJEPAForSequenceClassification(TJEPAHeadModel):
    """
    Pooling, dropout and a linear layer: `logits` [batch, num_labels] for classes (one or several per text) or a
    regression.

    `labels` are a `torch.LongTensor` of shape `[batch]` with classes below `config.num_labels`; for several classes
    per text (`config.problem_type="multi_label_classification"`) a `torch.FloatTensor` of shape `[batch, num_labels]`
    with 0 and 1; for regression (`num_labels=1` or `problem_type="regression"`) a `torch.FloatTensor` of shape
    `[batch]` or `[batch, num_labels]`. Without a `problem_type` integers are classes and floats are several classes
    per text.
    """

    accepts_loss_kwargs = False  # the loss is a mean over the batch: the Trainer averages micro-batches itself
    output_class = SequenceClassifierOutput

    def __init__(self, config: TJEPAConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.pooling = TJEPAPooling(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def compute_logits(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        return self.classifier(self.dropout(self.pooling(hidden_states, attention_mask)))


class TJEPAForTokenClassification(TJEPAHeadModel):
    """
    Dropout and a linear layer on every token, for tagging: `logits` [batch, length, num_labels]. `labels` are a
    `torch.LongTensor` of shape `[batch, length]` with classes; -100 does not count.
    """

    output_class = TokenClassifierOutput

    def __init__(self, config: TJEPAConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def compute_logits(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        return self.classifier(self.dropout(hidden_states))


class TJEPAForQuestionAnswering(TJEPAHeadModel):
    """Dropout and a linear layer on every token that scores it as the first and as the last of the answer."""

    accepts_loss_kwargs = False  # the loss is a mean over the batch: the Trainer averages micro-batches itself
    output_class = TokenClassifierOutput  # of which `forward` makes one with the names of this task

    def __init__(self, config: TJEPAConfig):
        super().__init__(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def compute_logits(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        return self.qa_outputs(self.dropout(hidden_states))  # [batch, length, 2]

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
                First and last token of the answer; positions outside the row, -1 for example, do not count.

        Returns:
            `QuestionAnsweringModelOutput` with `start_logits`, `end_logits` [batch, length] and, with both positions,
            `loss`.
        """
        kwargs["return_dict"] = True
        outputs = super().forward(input_ids, attention_mask, position_ids, inputs_embeds, **kwargs)
        start_logits, end_logits = (part.contiguous() for part in outputs.logits.unbind(dim=-1))
        loss = None
        if start_positions is not None and end_positions is not None:
            length = start_logits.shape[1]  # transformers' loss leaves it out, and would count -1 as position 0
            positions = (at.masked_fill(at < 0, length) for at in (start_positions, end_positions))
            loss = self.loss_function(start_logits, end_logits, *positions)
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
    a masked language model: `logits` [batch, length, vocab_size]. The head is that of the token prediction in
    pretraining, and starts from its weights where the folder has them. `labels` are a `torch.LongTensor` of shape
    `[batch, length]` with token ids; -100 does not count.
    """

    _keys_to_ignore_on_load_unexpected = OTHER_PRETRAINING_WEIGHTS
    _tied_weights_keys = {"decoder.weight": "encoder.token_embedding.weight"}
    output_class = MaskedLMOutput

    def __init__(self, config: TJEPAConfig):
        super().__init__(config)
        self.token_head = TJEPATokenHead(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=False)  # its bias is the token head's
        self.post_init()

    def _complete(self, info: dict, name: str) -> None:
        """Untied from the token embedding, the decoder starts equal to it: pretraining has them tied."""
        super()._complete(info, name)
        if "decoder.weight" in info["missing_keys"]:
            self.decoder.weight.data.copy_(self.encoder.token_embedding.weight)
            info["missing_keys"].remove("decoder.weight")

    def get_output_embeddings(self) -> nn.Linear:
        return self.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear):
        """Also resizes the bias."""
        self.decoder = new_embeddings
        if len(new_embeddings.weight) != len(self.token_head.bias):
            self.token_head.resize(len(new_embeddings.weight))

    def compute_logits(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        states, bias = self.token_head(hidden_states)
        logits = self.decoder(states)  # called, not read: LoRA, hooks and quantised layers count
        return logits + bias.to(logits.dtype)


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
