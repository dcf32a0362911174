"""Configurations and models as flags ask for them: read, changed, checked, and fitted to their tokenizer."""

import ast
import copy
import difflib
import logging
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..configuration_tjepa import ENCODER_SIZES, TJEPAConfig
from ..corpus.command_line import first_line
from ..corpus.paths import NUM_NAMES_LISTED, check_exists, hint_at_nearest
from ..corpus.private import get_attention, set_attention
from ..corpus.tokenizers import count_positions, load_tokenizer, same_ids, special_tokens_around, vocabulary_size
from ..encoders_tjepa import encoder_class, find_unused_parameters
from ..layers_tjepa import TJEPAModule
from ..modeling_tjepa import TJEPAForPreTraining


logger = logging.getLogger(__name__)

WORDS = {"true": True, "false": False, "none": None, "null": None}


# ---- configurations ----


def parse_config_overrides(overrides: str | None) -> dict[str, Any]:
    """
    `"hidden_size=128,use_bias=false"` as a mapping; of a name that occurs twice the last value counts.

    Returns:
        Values as Python reads them (`1e-6` is a number), with `true`, `false`, `none` and `null` in any case; all else
        is text.

    Raises:
        ValueError: if it is not a list of `name=value`.
    """
    values = {}
    for pair in (overrides or "").split(","):
        name, equals, value = (part.strip() for part in pair.partition("="))
        if not pair.strip():
            continue
        if not equals or not name:
            raise ValueError(
                f"--config_overrides is a list such as hidden_size=128,num_hidden_layers=4, got {overrides!r}."
            )
        try:
            values[name] = WORDS[value.lower()] if value.lower() in WORDS else ast.literal_eval(value)
        except (ValueError, SyntaxError):
            values[name] = value
    return values


def apply_overrides(config: PreTrainedConfig, overrides: dict[str, Any]) -> PreTrainedConfig:
    """
    A configuration of the same class with other values, checked as a new one is. Sizes of a T-JEPA configuration that
    follow from others (`intermediate_size` from `hidden_size`, ...) go on doing so, unless they were set apart.

    Raises:
        ValueError: for a name that the configuration does not have, or a value that it refuses.
    """
    if not overrides:
        return config
    values = config.to_dict()
    names = {name: config.attribute_map.get(name, name) for name in overrides}
    if unknown := sorted(name for name, attribute in names.items() if attribute not in values):
        known = sorted(name for name in {*values, *config.attribute_map} if not name.startswith("_"))
        close = [match for name in unknown for match in difflib.get_close_matches(name, known, n=1)]
        hint = f"Did you mean {' and '.join(close)}?" if close else f"It has {', '.join(known)}."
        raise ValueError(f"--config_overrides: {type(config).__name__} has no {unknown}. {hint}")
    if isinstance(config, TJEPAConfig):
        values.update(dict.fromkeys(config.derived_sizes()))
    values.update({names[name]: value for name, value in overrides.items()})
    try:
        changed = type(config).from_dict(values)
    except (ValueError, TypeError, StrictDataclassError) as error:
        given = ",".join(f"{name}={value}" for name, value in overrides.items())
        reason = str(error.__cause__ or error)
        raise ValueError(f"--config_overrides {given}: {reason}") from error
    changed.name_or_path = config.name_or_path
    set_attention(changed, get_attention(config))
    return changed


def load_config(
    name: str, overrides: str | None = None, flag: str = "--model_name_or_path", **for_hub
) -> PreTrainedConfig:
    """
    The configuration of a folder or a name on the Hub, which is also the check that there is a model at all.

    Args:
        name (`str`): the folder or name.
        overrides (`str`, *optional*): as `parse_config_overrides` takes it.
        flag (`str`): the argument that `name` was given for, for messages.
        for_hub: what `HubArguments.for_hub` returns, and `revision`.

    Raises:
        FileNotFoundError: if `name` is a path that is not there.
        ValueError: if there is no configuration, or for `overrides` that it refuses.
    """
    check_exists(name, flag)
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        files = sorted(path.name for path in folder.iterdir())[:NUM_NAMES_LISTED]
        raise ValueError(
            f"{flag} {name} is not the folder of a model: it has no config.json, only {files}. Give one that "
            "pretraining wrote, or one that save_pretrained made."
        )
    try:
        config = AutoConfig.from_pretrained(name, **{"trust_remote_code": False, **for_hub})
    except StrictDataclassError as error:
        raise ValueError(f"{flag} {name}: {error.__cause__ or error}") from error
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{flag} {name}: the model has code of its own; pass --trust_remote_code if you trust its source."
            ) from error
        raise ValueError(
            f"{flag} {name}: no model could be found there ({first_line(error)}). {hint_at_nearest(name)}".strip()
        ) from error
    return apply_overrides(config, parse_config_overrides(overrides))


def load_pretraining_config(
    model_name_or_path: str | None = None,
    config_name: str | None = None,
    overrides: str | None = None,
    revision: str = "main",
    **for_hub,
) -> TJEPAConfig:
    """
    The configuration to pretrain with: that of a model to continue, a named one, or the default, each with
    `overrides`. That of another architecture's model becomes the `encoder` of a new one, which has no `name_or_path`.
    Needs no data and no tokenizer, so that a mistake costs a second.

    Raises:
        FileNotFoundError, ValueError: as `load_config`; for a model that does not read text.
    """
    if model_name_or_path is None and config_name is None:
        return apply_overrides(TJEPAConfig(), parse_config_overrides(overrides))
    flag = "--config_name" if model_name_or_path is None else "--model_name_or_path"
    name = model_name_or_path or config_name
    config = load_config(name, None, flag, revision=revision, **for_hub)
    given = parse_config_overrides(overrides)
    if not isinstance(config, TJEPAConfig):
        if not getattr(config, "vocab_size", None):
            raise ValueError(f"{flag} {name} is a {config.model_type} model, which is not a text encoder.")
        config = TJEPAConfig(encoder=config)
    if config.encoder is not None:
        of_encoder = [size for size in (*ENCODER_SIZES, "intermediate_size") if size in given]
        if of_encoder:
            raise ValueError(
                f"--config_overrides: {', '.join(of_encoder)} belong to the {config.encoder.model_type} encoder, and "
                "stay as they are; the predictor's are predictor_hidden_size, predictor_num_hidden_layers and so "
                "on. For another size from scratch edit its config.json, and name that with --config_name."
            )
    return apply_overrides(config, given)


# ---- models ----


def load_pretraining_model(
    config: TJEPAConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    overrides: str | None = None,
    model_name_or_path: str | None = None,
    attn_implementation: str | None = None,
    revision: str = "main",
    **for_hub,
) -> TJEPAForPreTraining:
    """
    The model to train, in float32 whatever dtype its folder has, with an embedding for every id of the tokenizer.

    Args:
        config (`TJEPAConfig`): what `load_pretraining_config` returned.
        tokenizer (`PreTrainedTokenizerBase`): may have more tokens than the model that is continued, whose embeddings
            then grow.
        max_length (`int`): tokens of the longest document of this run. The configuration states the longest that the
            model was trained on: this, or what the model came with.
        overrides (`str`, *optional*): those of `config`; what they set is not changed here.
        model_name_or_path (`str`, *optional*): folder or name of the model to continue. Default: from scratch.
        attn_implementation (`str`, *optional*): the attention backend.
        revision, for_hub: as for `load_config`.

    Raises:
        ValueError: if tokenizer and model do not belong together, or weights do not have the sizes of `config`.
    """
    given = parse_config_overrides(overrides)
    num_tokens = vocabulary_size(tokenizer)
    if config.encoder is not None:
        set_attention(config, attn_implementation)
        fit_to_tokenizer(config, tokenizer, model_name_or_path or config.encoder.name_or_path)
        if model_name_or_path is None:
            model = TJEPAForPreTraining(config)
        else:
            check_tokenizer(tokenizer, config, model_name_or_path, revision=revision, **for_hub)
            model = load_other_encoder(config, model_name_or_path, revision=revision, **for_hub)
        traits = model.measure_encoders()
        check_positions(model.target_encoder, tokenizer, max_length)
        way = "packed rows" if traits.is_packed else "padded rows"
        logger.info(f"{type(model.context_encoder).__name__} is fed {way} (difference {traits.difference:.1e})")
        return model
    if config.predictor_type == "in_place":
        set_mask_token(config, tokenizer)
    if model_name_or_path is None:
        facts = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        facts["max_position_embeddings"] = max_length
        if not config.name_or_path:  # the default configuration; a named one has a vocabulary of its own
            facts["vocab_size"] = num_tokens
        for name in facts.keys() - given.keys():
            setattr(config, name, facts[name])
        if num_tokens > config.vocab_size:
            raise ValueError(
                f"The tokenizer has {num_tokens} tokens (highest id + 1), the model's embedding {config.vocab_size}: "
                f"pass --config_overrides vocab_size={num_tokens}, or the tokenizer that belongs to the configuration."
            )
        set_attention(config, attn_implementation)
        return TJEPAForPreTraining(config)

    check_tokenizer(tokenizer, config, model_name_or_path, revision=revision, **for_hub)
    model, info = TJEPAForPreTraining.from_pretrained(
        model_name_or_path,
        config=config,
        dtype=torch.float32,
        attn_implementation=attn_implementation,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        revision=revision,
        **for_hub,
    )
    parts = ("context_encoder.", "target_encoder.", *(() if "predictor_type" in given else ("predictor.",)))
    check_weights(model, info, parts, model_name_or_path, overrides)
    if num_tokens > model.config.vocab_size:
        logger.warning(
            f"The tokenizer has {num_tokens - model.config.vocab_size} tokens more than {model_name_or_path}: both "
            f"encoders' embeddings and the token head grow from {model.config.vocab_size} to {num_tokens} rows; new "
            "rows are drawn around the mean of the others"
        )
        model.resize_token_embeddings(num_tokens)
    if "max_position_embeddings" not in given:
        model.config.max_position_embeddings = max(max_length, model.config.max_position_embeddings)
    return model


def fit_to_tokenizer(config: TJEPAConfig, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """
    What another architecture's encoder has to know of its tokenizer: the mask token, and the tokens around a text.

    Raises:
        ValueError: for a tokenizer with more tokens than the encoder has embeddings, or whose mask token it takes for
            padding.
    """
    num_tokens = vocabulary_size(tokenizer)
    if num_tokens > config.vocab_size:
        raise ValueError(
            f"The tokenizer has {num_tokens} tokens (highest id + 1), the embedding of {name} {config.vocab_size}. "
            "Name the tokenizer that belongs to it, or give it more rows: "
            f"model.resize_token_embeddings({num_tokens}), save_pretrained, and name that folder."
        )
    mask = tokenizer.mask_token_id
    if mask is not None and mask == getattr(config.encoder, "pad_token_id", None):
        raise ValueError(
            f"The tokenizer's mask token has the id {mask}, which {name} takes for padding "
            "(pad_token_id). Name the tokenizer that belongs to it, or set pad_token_id in its config.json to "
            f"{tokenizer.pad_token_id}, the tokenizer's."
        )
    prefix, suffix = special_tokens_around(tokenizer)
    config.special_token_ids = sorted({*prefix, *suffix})
    set_mask_token(config, tokenizer)


def set_mask_token(config: TJEPAConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """What stands in hidden places: the mask token, or a token that a text rarely has."""
    config.mask_token_id = tokenizer.mask_token_id
    if config.mask_token_id is None:
        others = (tokenizer.unk_token_id, tokenizer.eos_token_id, 0)
        config.mask_token_id = next(token_id for token_id in others if token_id is not None)
        token = tokenizer.convert_ids_to_tokens(config.mask_token_id)
        logger.warning(f"The tokenizer has no mask token: {token} stands in hidden places")


def load_other_encoder(config: TJEPAConfig, name: str, **for_hub) -> TJEPAForPreTraining:
    """
    Both encoders from the folder of another architecture's encoder, with a new predictor, or all three from a folder
    that pretraining such an encoder wrote.

    Raises:
        ValueError: if the folder lacks weights that the states depend on, or has them in other sizes.
    """
    if config.name_or_path:
        model, info = TJEPAForPreTraining.from_pretrained(
            name, config=config, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True, **for_hub
        )
        check_weights(model, info, ("context_encoder.", "target_encoder."), name)
        return model
    encoder, drawn = load_whole_encoder(config.encoder, name, **for_hub)
    model = TJEPAForPreTraining.from_encoder(encoder, config)
    model.config.encoder.name_or_path = name
    if drawn:
        model.config.drawn_parameters = drawn
        logger.info(f"{name} has no {', '.join(drawn)}, which no state depends on: neither will this run's folder")
    return model


def load_encoder(
    config: PreTrainedConfig,
    name: str,
    dtype: torch.dtype | str = torch.float32,
    flag: str = "--model_name_or_path",
    **options,
) -> PreTrainedModel:
    """
    The trained encoder of a folder, to read texts with: of an encoder-decoder the encoder alone, of a pretraining
    folder the target encoder.

    Args:
        config (`PreTrainedConfig`): what `load_config` returned of `name`.
        flag (`str`): the argument that `name` was given for, for messages.
        options: others of `from_pretrained`.

    Raises:
        ValueError: if there is no encoder to read with, or weights of it are missing or have other sizes.
    """
    check_has_encoder(config, name, flag)
    return load_whole_encoder(config, name, dtype=dtype, **options)[0]


def check_has_encoder(config: PreTrainedConfig, name: str, flag: str = "--model_name_or_path") -> None:
    """
    Raises:
        ValueError: for a folder that only pretraining goes on from.
    """
    if config.model_type == TJEPAConfig.model_type and config.encoder is not None:
        raise ValueError(
            f"{flag} {name}: pretraining of a {config.encoder.model_type} model goes on from there. The encoder, as "
            f"it was at the end of that run, is in the folder of the run: {Path(name).parent}."
        )


def load_whole_encoder(
    config: PreTrainedConfig, name: str, dtype: torch.dtype | str = torch.float32, **options
) -> tuple[PreTrainedModel, list[str]]:
    """
    An encoder, and the names of its parameters that its folder lacks and no state depends on, such as a pooler's.

    Raises:
        ValueError: if the folder lacks weights that the states depend on, or has them in other sizes.
    """
    encoder, info = encoder_class(config).from_pretrained(
        name, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True, **options
    )
    of_head = f"{encoder.base_model_prefix}."  # how they are named in the folder of an encoder with a head
    unexpected = {weight.removeprefix(of_head) for weight in info["unexpected_keys"]}
    check_weights(encoder, {**info, "unexpected_keys": unexpected}, ("",), name, of_layers=True)
    return encoder, check_missing(encoder, info["missing_keys"], name)


def check_missing(encoder: PreTrainedModel, missing: Iterable[str], name: str) -> list[str]:
    """
    Of the weights that a folder lacks those that no state of the encoder depends on.

    Raises:
        ValueError: for any other.
    """
    missing = set(missing) & dict(encoder.named_parameters()).keys()
    unused = set(find_unused_parameters(encoder)) if missing else set()
    if needed := sorted(missing - unused):
        raise ValueError(
            f"{name} has no weights for {len(needed)} parameters of {type(encoder).__name__}, such as {needed[0]}: "
            "they would be random. Name a folder that holds the whole encoder."
        )
    return sorted(missing)


def check_attention(config: TJEPAConfig, name: str) -> None:
    """
    Raises:
        ValueError: if transformers does not know this attention, or cannot run it here.
    """
    config = copy.deepcopy(config)
    set_attention(config, name)
    try:
        TJEPAModule(config)
    except (ValueError, ImportError) as error:
        raise ValueError(f"--attn_implementation {name}: {error}") from error


def check_positions(encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """
    Raises:
        ValueError: if a document with its special tokens has more tokens than the encoder has positions.
    """
    num_special = tokenizer.num_special_tokens_to_add()
    longest = count_positions(encoder) - num_special
    if max_length > longest:
        raise ValueError(
            f"--max_length is {max_length}, but a {encoder.config.model_type} encoder of "
            f"{encoder.config.max_position_embeddings} positions reads texts of {longest} tokens at most, beside "
            f"{num_special} special tokens: pass --max_length {longest}."
        )


# of a configuration: what a library writes into it, and what a run may change
NOT_OF_THE_RUN = {"_name_or_path", "architectures", "auto_map", "dtype", "encoder", "transformers_version"}
NOT_OF_THE_RUN |= {"max_position_embeddings", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"}
NOT_OF_THE_RUN |= {"drawn_parameters"}  # what the folder of another encoder lacked


def check_tokenizer(
    tokenizer: PreTrainedTokenizerBase, config: TJEPAConfig, model_name_or_path: str, **for_hub
) -> None:
    """
    Raises:
        ValueError: if the model's folder has a tokenizer that gives a token of this one another id.
    """
    try:
        of_model = load_tokenizer(model_name_or_path, "--model_name_or_path", **for_hub)
    except ValueError:
        return  # none to compare with
    if not same_ids(tokenizer, of_model):
        name, num_tokens = shlex.quote(str(model_name_or_path)), vocabulary_size(tokenizer)
        scratch = f"with --config_name {name} --config_overrides vocab_size={num_tokens}"
        if config.encoder is not None:  # whose sizes are those of its own configuration
            scratch = f"with a copy of its config.json in which vocab_size is {num_tokens}, named with --config_name,"
        raise ValueError(
            f"{model_name_or_path} was trained with another tokenizer: tokens that both have differ in their ids. "
            "Leave out --tokenizer_name to go on with its own (text must be tokenized with it, too), or train from "
            f"scratch {scratch} in place of --model_name_or_path."
        )


def check_resumed(checkpoint: str, config: TJEPAConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """
    A checkpoint goes on as the model that it is of: with another head or other ids it would be a new one.

    Raises:
        ValueError: if the configuration or the ids of the tokenizer differ from the checkpoint's.
    """
    before, now = TJEPAConfig.from_pretrained(checkpoint).to_dict(), config.to_dict()
    other = [name for name in before if name not in NOT_OF_THE_RUN and before[name] != now.get(name)]
    if other:
        raise ValueError(
            f"{checkpoint} was made with {other[0]}={before[other[0]]}, and now it is {now.get(other[0])}. Give the "
            f"flags of that run, or start a new one from its weights with --model_name_or_path {checkpoint} and "
            "another --output_dir."
        )
    check_tokenizer(tokenizer, config, checkpoint)


def check_weights(
    model: PreTrainedModel,
    info: dict,
    parts: tuple[str, ...],
    name: str,
    overrides: str | None = None,
    of_layers: bool = False,
) -> None:
    """
    What a folder has of these parts of a model must be all of it, and fit the configuration in every size and number
    of layers.

    Args:
        model: the model that was loaded, with `ignore_mismatched_sizes=True`.
        info: the `output_loading_info`.
        parts: the prefixes of the weights that count. A part of which the folder has nothing is not checked.
        name, overrides: of the model, for the message.
        of_layers: whether other weights than those of layers may be missing, which `check_missing` then judges.

    Raises:
        ValueError: naming the weights, and their sizes in the folder and by the configuration.
    """

    def layer(name: str) -> str:
        return re.sub(r"\.\d+\.", ".*.", name)

    def is_of_layer(name: str) -> bool:
        return "*" in layer(name) and layer(name) in layers

    names = list(model.state_dict())
    absent = tuple(part for part in parts if {n for n in names if n.startswith(part)} <= set(info["missing_keys"]))
    parts = tuple(part for part in parts if part not in absent)
    layers = {layer(weight) for weight in names if weight.startswith(parts)}
    problems = [
        f"{weight} is {list(there)} there and {list(here)} by the configuration"
        for weight, there, here in info["mismatched_keys"]
        if weight.startswith(parts)
    ]
    missing = [weight for weight in info["missing_keys"] if weight.startswith(parts)]
    others = [weight if weight.startswith(parts) else parts[0] + weight for weight in info["unexpected_keys"] if parts]
    problems += [f"{weight} is not there" for weight in missing if not of_layers or is_of_layer(weight)]
    problems += [f"{weight} is a layer too many there" for weight in others if is_of_layer(weight)]
    if problems:
        given = f"; --config_overrides is {overrides}" if overrides else ""
        raise ValueError(
            f"The weights in {name} do not fit the configuration, and only a head may be replaced: "
            f"{'; '.join(sorted(problems)[:3])}{f' and {len(problems) - 3} more' if len(problems) > 3 else ''}{given}."
        )
