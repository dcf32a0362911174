"""T-JEPA configuration: the encoder, the predictor, the loss and the downstream heads in one `TJEPAConfig`.

The predictor is built from the same layers as the encoder, so it gets a configuration of its own, derived by
`TJEPAConfig.predictor_config()`; a predictor size left at `None` is the encoder's.
"""

import copy
import math
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig


AUTO_MAP = {
    "AutoConfig": "configuration_tjepa.TJEPAConfig",
    "AutoModel": "modeling_tjepa.TJEPAModel",
    "AutoModelForPreTraining": "modeling_tjepa.TJEPAForPreTraining",
    "AutoModelForSequenceClassification": "modeling_tjepa.TJEPAForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_tjepa.TJEPAForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_tjepa.TJEPAForQuestionAnswering",
    "AutoModelForMaskedLM": "modeling_tjepa.TJEPAForMaskedLM",
}

# What the predictor starts from; configurations of other encoders have it under these names in every family.
ENCODER_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")

# Sizes that follow from others, those earlier in this list among them, where they are left at None.
DERIVED_SIZES = {
    "intermediate_size": lambda config: 4 * config.hidden_size,
    # Heads that do not divide the width are reported by `validate_architecture`; max(1, ...) gets us there.
    "rotary_dim": lambda config: (
        min(32, config.hidden_size // max(1, config.num_attention_heads)) if config.encoder is None else 32
    ),
    "predictor_hidden_size": lambda config: config.hidden_size,
    "predictor_num_hidden_layers": lambda config: config.num_hidden_layers,
    # Heads of another encoder need not divide its width (umT5): so many of them that they do.
    "predictor_num_attention_heads": lambda config: (
        config.num_attention_heads
        if config.encoder is None
        else math.gcd(config.predictor_hidden_size, config.num_attention_heads)
    ),
    "predictor_intermediate_size": lambda config: 4 * config.predictor_hidden_size,
    "predictor_rotary_dim": lambda config: min(
        config.rotary_dim, config.predictor_hidden_size // max(1, config.predictor_num_attention_heads)
    ),
}


WEIGHTS = (  # of the optional terms of the loss
    *("variance_covariance_weight", "sigreg_weight", "token_prediction_weight", "denoising_weight"),
    *("pooled_weight", "segment_weight"),
)


@strict
class TJEPAConfig(PreTrainedConfig):
    r"""
    Configuration of [`TJEPAModel`] and [`TJEPAForPreTraining`]. The defaults are the reference's: 8 layers of width
    384 in the encoder and again in the predictor.

    Args:
        encoder (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of another text encoder of transformers (BERT, ModernBERT, ...) to pretrain in place of our
            own architecture. The sizes below that it has are then its own, whatever is given here.
        encoder_input (`str`, defaults to `"auto"`):
            How another encoder is fed: `"packed"`, without padding, `"padded"`, one view per row, or `"auto"`: packed
            where it gives the same states, which is measured when a run starts.
        mask_token_id (`int`, *optional*):
            Stands in hidden places with `predictor_type="in_place"`, and where another encoder is fed padded rows, of
            which no state depends on it.
        special_token_ids (`list[int]`, *optional*):
            Tokens that another encoder's tokenizer puts around a text; denoising leaves them as they are.
        drawn_parameters (`list[str]`, *optional*):
            Of another encoder those that its folder lacked and no state depends on, such as a pooler's. They stay
            random, and are not saved with the encoder.
        vocab_size (`int`, defaults to 32000):
            Number of tokens in the vocabulary: the first dimension of the embedding matrix.
        hidden_size (`int`, defaults to 384):
            Width of the encoder.
        num_hidden_layers (`int`, defaults to 8):
            Number of encoder blocks.
        num_attention_heads (`int`, defaults to 12):
            Number of attention heads per block; must divide `hidden_size`.
        intermediate_size (`int`, *optional*, defaults to `4 * hidden_size`):
            Width of the MLP inside a block.
        hidden_act (`str`, defaults to `"gelu"`):
            Activation of the MLP; `"gelu"` is the exact one.
        max_position_embeddings (`int`, defaults to 1024):
            Longest document, in tokens, that the model is meant for. Rotary positions are computed on the fly, so
            nothing breaks beyond it. A run sets it, and the tokenizer's `model_max_length`, to its `--max_length`, or
            to what the model that it goes on from has, if that is more.
        rotary_dim (`int`, *optional*, defaults to `min(32, head width)`):
            The first `rotary_dim` features of each head are rotated; even, at least 4, and no wider than a head.
        rope_theta (`float`, defaults to 10000.0):
            Base of the rotary frequencies.
        use_bias (`bool`, defaults to `True`):
            Whether linear layers and LayerNorms have biases.
        hidden_dropout_prob (`float`, defaults to 0.0):
            Dropout after the embedding, after attention and after the MLP. The target encoder never drops.
        attention_probs_dropout_prob (`float`, defaults to 0.0):
            Dropout on attention weights.
        layer_norm_eps (`float`, defaults to 1e-5):
            Epsilon of every LayerNorm, that of the labels included.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of initial weights; residual output projections get it divided by sqrt(2 * layers).
        pad_token_id (`int`, *optional*):
            Id of the padding token, if the tokenizer has one. Packed batches need none.
        predictor_hidden_size (`int`, *optional*, defaults to `hidden_size`):
            Width of the predictor. Where it differs from `hidden_size`, the predictor projects in and out.
        predictor_num_hidden_layers (`int`, *optional*, defaults to `num_hidden_layers`):
            Number of predictor blocks.
        predictor_num_attention_heads (`int`, *optional*, defaults to `num_attention_heads`):
            Number of attention heads of a predictor block; must divide `predictor_hidden_size`.
        predictor_intermediate_size (`int`, *optional*, defaults to `4 * predictor_hidden_size`):
            Width of the MLP inside a predictor block.
        predictor_rotary_dim (`int`, *optional*, defaults to `min(rotary_dim, predictor head width)`):
            `rotary_dim` of the predictor.
        predictor_type (`str`, defaults to `"self_attention"`):
            `"self_attention"`, the reference's, which encodes the context again; `"cross_attention"`, which carries
            only the target slots through its layers, where they attend to each other and to the context encoder's
            output as it is, with less than half the arithmetic; `"boundary"` (SpanBERT, arXiv 1907.10529), an MLP on
            the states of the nearest visible tokens to a slot's left and right; or `"in_place"`, an MLP on the state
            that the context encoder itself has at the slot's place, where it meets a mask token as in BERT, and from
            which tokens are predicted directly. These two have no layers, heads, mask token or dropout: of the
            predictor's sizes only `predictor_intermediate_size` counts.
        learned_mask_token (`bool`, defaults to `True`):
            Whether the mask token is learned (initialised to ones) or fixed (ones scaled to unit norm).
        variance_covariance_weight (`float`, defaults to 0.0):
            Weight of the variance/covariance term (VICReg, arXiv 2105.04906) on the context encoder's output.
        token_prediction_weight (`float`, defaults to 0.0):
            Weight of predicting the hidden token itself at every target slot.
        denoising_weight (`float`, defaults to 0.0):
            Weight of predicting tokens from the context encoder's own output, in training: `denoising_ratio` of its
            input is picked, half of that is replaced by random tokens, and the original is predicted at all of it.
            The loss of an evaluation has no such term.
        denoising_ratio (`float`, defaults to 0.1):
            See `denoising_weight`.
        token_decoder (`bool`, defaults to `False`):
            Whether there is a token head although no loss of pretraining has one: the one that `tjepa train-decoder`
            fitted to the predictions. Pretraining leaves it as it is.
        sigreg_weight (`float`, defaults to 0.0):
            Weight of SIGReg (LeJEPA, arXiv 2511.08544) on the context encoder's output: how far its tokens are from
            an isotropic Gaussian.
        pooled_weight (`float`, defaults to 0.0):
            Weight of telling what is hidden of a document by what is seen of it: the mean state of the visible tokens
            of a view against the target encoder's mean states of what is hidden of this view and of those of the
            other documents in the batch (InfoNCE, arXiv 1807.03748). What is hidden is encoded as a text of its own.
        segment_weight (`float`, defaults to 0.0):
            Weight of telling hidden segments of a document by its visible ones (`segment_length` of the collator). A
            predictor of `segment_predictor_num_hidden_layers` blocks sees the mean states of the visible segments and
            the places of the hidden ones, and its output is compared with the target encoder's mean states of all
            segments of the batch, less what these have in common, those of the same document among them (InfoNCE).
        segment_predictor_num_hidden_layers (`int`, defaults to 2):
            See `segment_weight`.
        contrastive_temperature (`float`, defaults to 0.05):
            Of both InfoNCE terms: cosines are divided by it.
        target_layers (`int`, defaults to 1):
            The labels are the mean of the outputs of so many of the target encoder's last blocks, each normalised
            before (data2vec, arXiv 2202.03555). The output of the last block is taken after the final LayerNorm.
        target_normalization (`str`, defaults to `"layer"`):
            How they are normalised: `"layer"`, each token over its features, or `"instance"` (data2vec 2.0, arXiv
            2212.07525), each feature over the tokens of its document, which takes the document's mean out.
        loss_type (`str`, defaults to `"smooth_l1"`):
            Distance of a prediction x and its label y, over features j: `"smooth_l1"`, `"l1"` mean |x_j - y_j|,
            `"l2"` mean (x_j - y_j)^2, or `"cosine"` 1 - cos(x, y).
        smooth_l1_beta (`float`, defaults to 1.0):
            Where `"smooth_l1"` turns from (x_j - y_j)^2 / (2 beta) into |x_j - y_j| - beta / 2.
        classifier_pooling (`str`, defaults to `"mean"`):
            How [`TJEPAForSequenceClassification`] makes one vector of a text: `"mean"` over its real tokens, `"first"`
            real token, or `"attention"`, a mean with learned weights.
        classifier_dropout (`float`, *optional*, defaults to `hidden_dropout_prob`):
            Dropout before the linear layer of the classification and question answering heads.

    Raises:
        ValueError: for an `encoder` as a dict without a `model_type`, or with one that transformers does not know.
        StrictDataclassError: (of huggingface_hub) for sizes that do not fit each other, numbers below zero or not
            finite, probabilities outside [0, 1), mask and special tokens outside the vocabulary, more target layers
            than there are, a base or a beta that is not positive, and an unknown activation, predictor, pooling, loss
            or normalisation.
    """

    model_type = "tjepa"
    sub_configs = {"encoder": AutoConfig}

    encoder: dict | PreTrainedConfig | None = None
    encoder_input: Literal["auto", "packed", "padded"] = "auto"
    mask_token_id: int | None = None
    special_token_ids: list[int] | None = None
    drawn_parameters: list[str] | None = None
    vocab_size: int = 32000
    hidden_size: int = 384
    num_hidden_layers: int = 8
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    hidden_act: str = "gelu"
    max_position_embeddings: int = 1024
    rotary_dim: int | None = None
    rope_theta: float | int = 10000.0
    use_bias: bool = True
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    layer_norm_eps: float | int = 1e-5
    initializer_range: float | int = 0.02
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    tie_word_embeddings: bool = True
    predictor_hidden_size: int | None = None
    predictor_num_hidden_layers: int | None = None
    predictor_num_attention_heads: int | None = None
    predictor_intermediate_size: int | None = None
    predictor_rotary_dim: int | None = None
    predictor_type: Literal["self_attention", "cross_attention", "boundary", "in_place"] = "self_attention"
    learned_mask_token: bool = True
    variance_covariance_weight: float | int = 0.0
    token_prediction_weight: float | int = 0.0
    denoising_weight: float | int = 0.0
    denoising_ratio: float | int = 0.1
    token_decoder: bool = False
    sigreg_weight: float | int = 0.0
    pooled_weight: float | int = 0.0
    segment_weight: float | int = 0.0
    segment_predictor_num_hidden_layers: int = 2
    contrastive_temperature: float | int = 0.05
    target_layers: int = 1
    target_normalization: Literal["layer", "instance"] = "layer"
    loss_type: Literal["smooth_l1", "l1", "l2", "cosine"] = "smooth_l1"
    smooth_l1_beta: float | int = 1.0
    classifier_pooling: Literal["mean", "first", "attention"] = "mean"
    classifier_dropout: float | int | None = None

    def __post_init__(self, **kwargs):
        if isinstance(self.encoder, dict):
            if "model_type" not in self.encoder:
                raise ValueError(f"encoder must name its model_type, such as 'bert', got {self.encoder}.")
            self.encoder = AutoConfig.for_model(**self.encoder)
        self.encoder = copy.deepcopy(self.encoder)  # setting our attention backend sets that of a sub-config, too
        for name in ENCODER_SIZES if self.encoder is not None else ():
            if isinstance(size := getattr(self.encoder, name, None), int) and size > 0:
                setattr(self, name, size)
        for name, derive in DERIVED_SIZES.items():
            if getattr(self, name) is None:
                setattr(self, name, derive(self))
        super().__post_init__(**kwargs)
        # Every saved folder names every class, so that AutoModel finds the encoder in a pretraining folder too.
        if getattr(self, "auto_map", None) is None:
            self.auto_map = dict(AUTO_MAP)

    def validate_architecture(self):
        """Refuses impossible values; called by `@strict` when a config is made and when it is saved."""
        # another encoder has checked its own sizes
        counts = {"": self.encoder is None, "predictor_": self.predictor_type not in ("boundary", "in_place")}
        for prefix in [prefix for prefix in counts if counts[prefix]]:
            hidden_size = getattr(self, f"{prefix}hidden_size")
            num_heads = getattr(self, f"{prefix}num_attention_heads")
            rotary_dim = getattr(self, f"{prefix}rotary_dim")
            for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
                if getattr(self, prefix + name) < 1:
                    raise ValueError(f"{prefix}{name} must be at least 1, got {getattr(self, prefix + name)}.")
            if hidden_size % num_heads != 0:
                raise ValueError(
                    f"{prefix}hidden_size ({hidden_size}) must be a multiple of {prefix}num_attention_heads "
                    f"({num_heads})."
                )
            head_dim = hidden_size // num_heads
            if not 4 <= rotary_dim <= head_dim or rotary_dim % 2 != 0:
                raise ValueError(
                    f"{prefix}rotary_dim ({rotary_dim}) must be even, at least 4 and at most the width of a head: "
                    f"{prefix}hidden_size / {prefix}num_attention_heads = {head_dim}."
                )
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act must be one of {', '.join(ACT2FN)}, got {self.hidden_act!r}.")
        for name in ("vocab_size", "max_position_embeddings", "predictor_intermediate_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        num_tokens = getattr(self.encoder or self, "vocab_size", None)  # some encoders have it under another name
        for name in ("mask_token_id", "special_token_ids") if isinstance(num_tokens, int) else ():
            value = getattr(self, name)
            token_ids = value if isinstance(value, list) else [] if value is None else [value]
            if not all(0 <= token_id < num_tokens for token_id in token_ids):
                raise ValueError(
                    f"{name} must be in the vocabulary, from 0 to vocab_size - 1 = {num_tokens - 1}, got {value}."
                )
        if not 0.0 < self.rope_theta < math.inf:
            raise ValueError(f"rope_theta must be a positive number, such as 10000.0, got {self.rope_theta}.")
        for name in ("layer_norm_eps", "initializer_range"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or a positive number, got {getattr(self, name)}.")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            if getattr(self, name) is not None and not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}.")
        for name in WEIGHTS:
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 (off) or a positive number, got {getattr(self, name)}.")
        if not 0.0 < self.denoising_ratio <= 1.0:
            raise ValueError(f"denoising_ratio must be in (0, 1], got {self.denoising_ratio}; set denoising_weight=0.")
        if not 1 <= self.target_layers <= self.num_hidden_layers:
            raise ValueError(
                f"target_layers must be between 1 and num_hidden_layers ({self.num_hidden_layers}), got "
                f"{self.target_layers}."
            )
        if self.segment_predictor_num_hidden_layers < 1 or not 0.0 < self.contrastive_temperature < math.inf:
            raise ValueError(
                "segment_predictor_num_hidden_layers must be at least 1 and contrastive_temperature positive, got "
                f"{self.segment_predictor_num_hidden_layers} and {self.contrastive_temperature}."
            )
        if not 0.0 < self.smooth_l1_beta < math.inf:
            raise ValueError(f"smooth_l1_beta must be positive, got {self.smooth_l1_beta}; for 0 set loss_type='l1'.")

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As in transformers, but that `encoder="context"` of `AutoModel.from_pretrained` is left for the model."""
        choice = {"encoder": kwargs.pop("encoder")} if isinstance(kwargs.get("encoder"), str) else {}
        config = super().from_dict(config_dict, **kwargs)
        return (config[0], {**config[1], **choice}) if isinstance(config, tuple) else config

    def derived_sizes(self) -> list[str]:
        """The optional sizes that have the value which they would have by themselves, given the others."""
        return [name for name, derive in DERIVED_SIZES.items() if getattr(self, name) == derive(self)]

    def segment_predictor_config(self) -> "TJEPAConfig":
        """The configuration that makes a `TJEPAPredictor` of segments."""
        sizes = dict.fromkeys(name for name in DERIVED_SIZES if name.startswith("predictor_"))
        sizes |= {"predictor_type": "self_attention", "mask_token_id": None, "special_token_ids": None}
        sizes["predictor_num_hidden_layers"] = self.segment_predictor_num_hidden_layers
        return TJEPAConfig.from_dict({**self.to_dict(), **sizes}, attn_implementation=self._attn_implementation)

    def predictor_config(self) -> "TJEPAConfig":
        """The configuration of the predictor's blocks: this one, with the predictor's sizes for the encoder's."""
        config = self.to_dict()
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "rotary_dim"):
            config[name] = config[f"predictor_{name}"]
        config["encoder"] = config["mask_token_id"] = config["special_token_ids"] = None  # it reads no tokens
        config["target_layers"] = 1  # the predictor may have fewer layers than the encoder's labels are made of
        return TJEPAConfig.from_dict(config, attn_implementation=self._attn_implementation)


__all__ = ["TJEPAConfig"]
