"""What run_classification.py and run_token_classification.py share, in the order of a run: arguments, splits, classes,
rows that can not be used, tokenizer and model, metrics, training.

Notable: nothing disappears silently. Rows that are dropped and texts that are cut are counted, in the log and in
`all_results.json`; what would make the figures meaningless, such as a class that only the test split has, is an error.
"""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import evaluate
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset, load_from_disk
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)
from transformers.hf_argparser import HfArg

from ..corpus.documents import limit_datasets
from ..corpus.faults import DROP_REASONS, find_fault
from ..corpus.files import load_files
from ..training.loading import parse_config_overrides


logger = logging.getLogger(__name__)


SPLITS = ("train", "validation", "test")
METRICS = Path(__file__).parent / "metrics"
NO_LABEL = "label missing"
MAX_CLASSES_LISTED = 20


# ---- arguments ----


@dataclass(kw_only=True)
class ModelArguments:
    model_name_or_path: str = HfArg(
        help="The encoder to start from, on the Hub or in a folder: one that run_pretraining.py wrote, one of an "
        "encoder or of a fine-tuned model, or another encoder of transformers."
    )
    tokenizer_name: str | None = HfArg(default=None, help="The tokenizer, if it is not that of the model.")
    encoder: Literal["target", "context"] = HfArg(
        default="target", help="Which encoder of a pretraining folder: target, the moving average, or context."
    )
    freeze_encoder: bool = HfArg(
        default=False, help="Train the head alone, on the encoder as it is and without dropout in it: a linear probe."
    )
    config_overrides: str | None = HfArg(
        default=None,
        help="Overrides of the configuration: classifier_pooling=attention,classifier_dropout=0.1",
    )
    trust_remote_code: bool = HfArg(
        default=False, help="Run the code that lies beside a model on the Hub. Not needed for T-JEPA itself."
    )
    cache_dir: str | None = HfArg(default=None, help="Where downloads are kept.")
    model_revision: str = HfArg(default="main", help="Branch, tag or commit of model_name_or_path.")
    token: str | None = HfArg(default=None, help="Access token for the Hub, if not logged in.")


@dataclass(kw_only=True)
class DataArguments:
    dataset_name: str | None = HfArg(
        default=None, help="A dataset on the Hub or in a folder, with a train split; validation and test are optional."
    )
    dataset_config_name: str | None = HfArg(
        default=None, help="The configuration of the Hub dataset, where it has several."
    )
    train_file: str | None = HfArg(
        default=None, help="A local file, or a glob in quotes: json, jsonl, csv or parquet, as it is or compressed."
    )
    validation_file: str | None = HfArg(default=None, help="The same for the validation split.")
    test_file: str | None = HfArg(default=None, help="The same for the test split.")
    validation_split_percentage: float = HfArg(
        default=10,
        help="Percentage of the train rows, drawn at random with a fixed seed, that becomes the validation split "
        "where there is none. 0: no validation split.",
    )
    label_column: str | None = HfArg(default=None, help="The column of the labels. Default: one of the usual names.")
    max_length: int | None = HfArg(
        default=None, help="Texts are cut off after so many tokens. Default: what model and tokenizer were made for."
    )
    max_train_samples: int | None = HfArg(default=None, help="Use at most so many rows of the train split.")
    max_eval_samples: int | None = HfArg(default=None, help="Use at most so many rows of the validation split.")
    max_predict_samples: int | None = HfArg(default=None, help="Use at most so many rows of the test split.")

    def __post_init__(self):
        if (self.dataset_name is None) == (self.train_file is None):
            raise ValueError(
                f"Pass either --dataset_name (given: {self.dataset_name}) or --train_file (given: {self.train_file})."
            )
        if self.train_file is None and (self.validation_file or self.test_file):
            raise ValueError("--validation_file and --test_file go with --train_file; --dataset_name has its own.")
        if not 0 <= self.validation_split_percentage < 100:
            raise ValueError(
                f"validation_split_percentage is {self.validation_split_percentage}; it must be at least 0, and less "
                "than 100 so that rows to train on remain."
            )
        for name in ("max_length", "max_train_samples", "max_eval_samples", "max_predict_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1, or left out.")


@dataclass
class FinetuningArguments(TrainingArguments):
    """`TrainingArguments` that train, evaluate and test unless told otherwise."""

    output_dir: str | None = HfArg(default="runs/finetuned", help="Model, checkpoints and results go here.")
    overwrite_output_dir: bool = HfArg(default=False, help="Go on although output_dir holds a run.")
    per_device_train_batch_size: int = HfArg(default=32, help="Rows of each training step and process.")
    per_device_eval_batch_size: int = HfArg(default=128, help="Rows of each forward when evaluating.")
    do_train: bool = HfArg(default=True, help="Whether to train.")
    do_eval: bool = HfArg(default=True, help="Whether to evaluate on the validation split at the end.")
    do_predict: bool = HfArg(default=True, help="Whether to evaluate on the test split, if there is one, at the end.")
    learning_rate: float = HfArg(
        default=3e-4, help="Highest learning rate; 3e-4 suits encoders of a few million parameters, 2e-5 BERT's size."
    )

    def __post_init__(self):
        super().__post_init__()
        self.dataloader_pin_memory &= self.device.type != "cpu"  # nothing to pin for, and torch warns


# ---- splits and columns ----


def load_splits(args: DataArguments, model_args: ModelArguments) -> DatasetDict:
    """
    The splits train, validation and test, as far as they exist, whole and as they are.

    Raises:
        ValueError: if there is no train split, or a file is empty or of an unknown format.
        FileNotFoundError: if a file does not exist.
    """
    if args.train_file is not None:
        files = {split: getattr(args, f"{split}_file") for split in SPLITS}
        splits = {
            split: load_files(f"{split}_file", pattern, streaming=False, cache_dir=model_args.cache_dir)
            for split, pattern in files.items()
            if pattern is not None
        }
    elif (Path(args.dataset_name) / "dataset_dict.json").is_file():
        splits = load_from_disk(args.dataset_name)
    else:
        splits = load_dataset(
            args.dataset_name, args.dataset_config_name, cache_dir=model_args.cache_dir, token=model_args.token
        )
    if "train" not in splits:
        raise ValueError(f"{args.dataset_name} has no split 'train', only {sorted(splits)}.")
    if others := sorted(set(splits) - set(SPLITS)):
        logger.info(f"Not used: the splits {others}")
    return DatasetDict({split: splits[split] for split in SPLITS if split in splits})


def limit_splits(splits: DatasetDict, args: DataArguments) -> DatasetDict:
    """The splits of a run: a validation split drawn from train where there is none, and all cut to their maximum."""
    if "validation" not in splits and args.validation_split_percentage > 0:
        logger.info(f"validation: {args.validation_split_percentage:g}% of the train rows, drawn at random")
    limited = limit_datasets(splits, args)
    if "test" in splits:
        num_rows = len(splits["test"])
        limited["test"] = splits["test"].select(range(min(num_rows, args.max_predict_samples or num_rows)))
    return limited


def find_column(splits: DatasetDict, flag: str, given: str | None, usual: tuple[str, ...]) -> str:
    """
    The column `given`, or the only one of the `usual` names that is there; every split must have it.

    Raises:
        ValueError: if it does not exist, or several of the usual names or none of them do.
    """
    columns = splits["train"].column_names
    candidates = [name for name in usual if name in columns] if given is None else [given]
    if len(candidates) != 1:
        raise ValueError(
            f"Which column does {flag} mean? The train split has {sorted(columns)}, and "
            f"{f'{candidates} are all usual names' if candidates else f'none of the usual names {list(usual)}'}. "
            f"Pass {flag} with one of them."
        )
    for split, dataset in splits.items():
        if candidates[0] not in dataset.column_names:
            raise ValueError(
                f"The {split} split has no column {candidates[0]!r}; it has {sorted(dataset.column_names)}. "
                f"Pass {flag} with the one that is meant."
            )
    return candidates[0]


# ---- labels ----


def read_labels(dataset: Dataset, column: str) -> list:
    """The column's values; names in place of the numbers of a `ClassLabel`, None where it has -1 (a hidden label)."""
    feature = inner_feature(dataset, column)
    if not isinstance(feature, ClassLabel):
        return dataset[column][:]

    def name(value: int | list | None) -> Any:
        if isinstance(value, list):
            return [name(one) for one in value]
        return None if value is None or value < 0 else feature.names[value]

    return [name(value) for value in dataset[column][:]]


def inner_feature(dataset: Dataset, column: str) -> Any:
    """The type of the column's values or, where they are lists, of what is in the lists."""
    feature = dataset.features[column]
    return getattr(feature, "feature", feature)


def class_name(value: Any) -> str:
    """1, 1.0 and "1" are the same class: formats and splits differ in how they store it."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def find_class_names(dataset: Dataset, column: str, labels: list, config: PreTrainedConfig) -> list[str]:
    """
    The classes of `labels` (or lists of labels) in the order of their ids: that of a `ClassLabel`, else sorted. Where
    `config`, that of a model fine-tuned before, has the same classes, its order wins, because its head has it.
    """
    feature = inner_feature(dataset, column)
    if isinstance(feature, ClassLabel):
        names = list(feature.names)
    else:
        values = (value for label in labels for value in (label if isinstance(label, list) else [label]))
        names = {class_name(value) for value in values if not is_missing(value)}
        is_number = all(name.removeprefix("-").isdecimal() for name in names)
        names = sorted(names, key=int if is_number else None)
    known = [config.id2label[index] for index in sorted(config.id2label)]
    return known if set(known) == set(names) else names


def is_missing(label: Any) -> bool:
    return label is None or label == ""


def check_classes(counts: dict[str, Counter], names: list[str]) -> None:
    """
    Logs how often each class occurs in each split, and refuses splits that do not fit each other.

    Args:
        counts (`dict[str, Counter]`): for each split how often each class occurs.
        names (`list[str]`): the classes of the model.

    Raises:
        ValueError: if a split has a class that is not in `names` or none that train has, or train has fewer than two.
    """
    occurring = [name for name in names if counts["train"][name]]
    if len(occurring) < 2:
        raise ValueError(f"The train split has one class only, {occurring}: there is nothing to tell it from.")
    for split, occurs in counts.items():
        unknown = sorted(set(occurs) - set(names)) or (sorted(occurs) if occurs.keys().isdisjoint(occurring) else [])
        if unknown:
            raise ValueError(
                f"The {split} split has labels that the train split has not, and that can not be learned: "
                f"{unknown[:MAX_CLASSES_LISTED]}, {sum(occurs[name] for name in unknown):,} times. The train split "
                f"has {occurring[:MAX_CLASSES_LISTED]}. Correct the labels, or remove those rows."
            )
    logger.info(f"{len(names)} classes")
    for split, occurs in counts.items():
        listed = ", ".join(f"{name}: {occurs[name]:,}" for name in names[:MAX_CLASSES_LISTED])
        logger.info(f"  {split}: {listed}{', ...' if len(names) > MAX_CLASSES_LISTED else ''}")
        if absent := [name for name in names if not occurs[name]]:
            note = ", which can not be learned and count as mistakes elsewhere" if split == "train" else ""
            logger.warning(f"  {split} lacks {len(absent)} of them{note}: {absent[:MAX_CLASSES_LISTED]}")


# ---- rows ----


def text_fault(*texts: Any) -> str | None:
    """Why a text, or one of a pair, can not be used, in the words of prepare_dataset.py; None if it can."""
    faults = [fault for fault in map(find_fault, texts) if fault is not None]
    return DROP_REASONS[faults[0]] if faults else None


def drop_rows(dataset: Dataset, faults: list[str | None], split: str, metrics: dict) -> Dataset | None:
    """
    The rows whose fault is None, with a line in the log and the counts in `metrics`.

    Returns:
        The rows, or None for a split other than train whose labels are all missing, as in the test splits of contests.

    Raises:
        ValueError: if nothing is left for any other reason.
    """
    reasons = Counter(fault for fault in faults if fault is not None)
    why = ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common())
    kept = [row for row, fault in enumerate(faults) if fault is None]
    if not kept and split != "train" and set(reasons) == {NO_LABEL}:
        logger.warning(f"{split}: none of its {len(faults):,} rows has a label, so it is not evaluated")
        return None
    if not kept:
        raise ValueError(f"Nothing is left of the {split} split: {f'dropped {why}' if why else 'it has no rows'}.")
    logger.info(f"{split}: {len(faults):,} rows, {len(kept):,} kept{f'; dropped: {why}' if why else ''}")
    metrics[f"{split}_samples"] = len(kept)
    metrics[f"{split}_dropped"] = len(faults) - len(kept)
    return dataset.select(kept) if reasons else dataset


def report_truncation(lengths: list[int], max_length: int, split: str, metrics: dict) -> None:
    """Says how many texts of `lengths` tokens were cut to `max_length`, and how much was lost."""
    num_cut = sum(length > max_length for length in lengths)
    metrics[f"{split}_truncated"] = num_cut
    if num_cut:
        num_tokens_cut = sum(max(0, length - max_length) for length in lengths)
        logger.warning(
            f"{split}: {num_cut:,} of {len(lengths):,} texts are longer than {max_length} tokens and were cut; "
            f"{num_tokens_cut / sum(lengths):.1%} of all tokens were lost"
        )


# ---- tokenizer and model ----


def load_config(args: ModelArguments) -> PreTrainedConfig:
    """
    The model's configuration, which is also the check that there is a model at all.

    Raises:
        ValueError: if the folder holds no model, or `--encoder context` does not apply to it.
    """
    folder = Path(args.model_name_or_path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} is not the folder of a model: it has no config.json, only "
            f"{sorted(path.name for path in folder.iterdir())[:10]}. Give one that run_pretraining.py wrote, or one "
            "that save_pretrained made."
        )
    overrides = parse_config_overrides(args.config_overrides)
    config = AutoConfig.from_pretrained(args.model_name_or_path, **hub_arguments(args), **overrides)
    if args.encoder == "context" and config.model_type != "tjepa":
        raise ValueError(
            f"--encoder context is for T-JEPA pretraining folders; {folder} is a {config.model_type} model."
        )
    return config


def hub_arguments(args: ModelArguments) -> dict:
    return {
        "cache_dir": args.cache_dir,
        "token": args.token,
        "revision": args.model_revision,
        "trust_remote_code": args.trust_remote_code,
    }


def load_tokenizer(args: ModelArguments, config: PreTrainedConfig, for_pairs: bool = False) -> PreTrainedTokenizerBase:
    """
    The tokenizer, able to pad and, with `for_pairs`, to put something between the texts of a pair.

    Raises:
        ValueError: if there is none, or it has no special token that could do that.
    """
    name = args.tokenizer_name or args.model_name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **hub_arguments(args))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} has no tokenizer; pass --tokenizer_name with the one the model was trained on."
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if tokenizer.pad_token is None:
            raise ValueError(f"The tokenizer of {name} has no token to pad with: give it a pad_token.")
        logger.info(f"The tokenizer has no padding token: {tokenizer.pad_token!r} takes its place")
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    if for_pairs and tokenizer.num_special_tokens_to_add(pair=True) == tokenizer.num_special_tokens_to_add():
        separator = tokenizer.sep_token or tokenizer.eos_token
        if separator is None or not tokenizer.is_fast:
            raise ValueError(f"The tokenizer of {name} puts nothing between the texts of a pair: give it a sep_token.")
        # saved with the tokenizer, so that a pipeline on the model puts it there, too
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            pair=f"$A {separator} $B", special_tokens=[(separator, tokenizer.convert_tokens_to_ids(separator))]
        )
        logger.info(f"The tokenizer puts nothing between the texts of a pair: from now on {separator!r}")
    return tokenizer


def find_max_length(asked: int | None, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> int:
    """
    Tokens that a text may have: `asked`, by default what tokenizer and model are made for. More than that only T-JEPA
    takes, whose rotary positions have no end; its config and tokenizer then say so, too.
    """
    longest = tokenizer.model_max_length
    if getattr(config, "max_position_embeddings", None):
        longest = min(longest, config.max_position_embeddings)
    if asked is None or asked <= longest:
        return asked or longest
    if config.model_type != "tjepa":
        logger.warning(f"--max_length {asked} is more than model and tokenizer take: {longest} it is")
        return longest
    logger.warning(f"--max_length {asked} is more than the {longest} tokens that the model was made for")
    tokenizer.model_max_length = config.max_position_embeddings = asked
    return asked


def set_classes(config: PreTrainedConfig, names: list[str]) -> None:
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}


def load_model(
    auto_class: type, args: ModelArguments, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """
    The encoder with a head of `auto_class`, as `config` has it. A head of another size in the folder is replaced.

    Raises:
        ValueError: if the tokenizer has tokens that the model does not know.
    """
    which = {"encoder": args.encoder} if args.encoder != "target" else {}
    model = auto_class.from_pretrained(
        args.model_name_or_path, config=config, ignore_mismatched_sizes=True, **which, **hub_arguments(args)
    )
    num_embeddings = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > num_embeddings:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens, the model {num_embeddings}: pass --tokenizer_name with the "
            "one the model was trained on."
        )
    if args.freeze_encoder:
        freeze_encoder(model)
    num_parameters, num_trained = model.num_parameters(), model.num_parameters(only_trainable=True)
    logger.info(f"{type(model).__name__}: {num_parameters:,} parameters, {num_trained:,} of them trained")
    return model


def freeze_encoder(model: PreTrainedModel) -> None:
    """The encoder gets no gradient, and stays in eval mode (no dropout) although the Trainer calls `model.train()`."""
    encoder = model.base_model
    encoder.requires_grad_(False)
    encoder.train = lambda mode=True: nn.Module.train(encoder, False)
    encoder.eval()


# ---- metrics ----


class HubMetric(NamedTuple):
    """A module of the Hub, its configuration, further arguments of `compute`, and its figures -> our names of them."""

    module: str
    configuration: str | None
    arguments: dict
    figures: dict[str, str]


def load_metrics(hub_metrics: list[HubMetric], folder: str, configuration: str | None = None) -> Callable[..., dict]:
    """
    The metrics of the Hub or, where it can not be reached or they need a package that is missing, our own.

    Args:
        hub_metrics (`list[HubMetric]`): what to load from the Hub.
        folder (`str`): our module, in `metrics/`, which has figures of the same names.
        configuration (`str`, *optional*): of our module.

    Returns:
        A function of `predictions` and `references` that returns the figures, by the same names from either source.
    """
    modules = sorted({metric.module for metric in hub_metrics})
    try:
        loaded = [
            (evaluate.load(metric.module, metric.configuration, keep_in_memory=True), metric) for metric in hub_metrics
        ]
        logger.info(f"Metrics: {', '.join(modules)} of the Hub")
    except (OSError, ImportError) as error:
        reason = str(error).splitlines()[0] if isinstance(error, ImportError) else "it can not be reached"
        logger.info(f"Metrics: metrics/{folder} of this repository, not {', '.join(modules)} of the Hub: {reason}")
        names = {name: name for metric in hub_metrics for name in metric.figures.values()}
        ours = evaluate.load(str(METRICS / folder), configuration, keep_in_memory=True)
        loaded = [(ours, HubMetric(folder, configuration, {}, names))]

    def compute(predictions: Any, references: Any) -> dict[str, float | None]:
        results = {}
        for module, metric in loaded:
            computed = module.compute(predictions=predictions, references=references, **metric.arguments)
            results.update({ours: computed[theirs] for theirs, ours in metric.figures.items() if theirs in computed})
        return results

    return compute


# ---- training ----


def train_and_evaluate(
    model: PreTrainedModel,
    args: FinetuningArguments,
    splits: dict[str, Dataset],
    tokenizer: PreTrainedTokenizerBase,
    collator: Callable,
    compute_metrics: Callable,
    preprocess_logits: Callable,
    counts: dict[str, int],
    checkpoint: str | None,
) -> dict[str, float]:
    """
    Trains with an unmodified `Trainer`, evaluates on the validation and the test split, and saves what a folder needs
    to be loaded: weights, config, code, tokenizer, model card, and beside them `all_results.json`.

    Returns:
        What `all_results.json` holds.

    Raises:
        ValueError: if `--eval_strategy` asks for evaluations and there is no validation split.
    """
    if args.eval_strategy != "no" and "validation" not in splits:
        raise ValueError(
            f"eval_strategy is {args.eval_strategy}, but there is no validation split: pass --validation_file or a "
            "--validation_split_percentage above 0."
        )
    trainer = Trainer(
        model=model,
        args=args,
        data_collator=collator,
        train_dataset=splits["train"] if args.do_train else None,
        eval_dataset=splits.get("validation"),
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=preprocess_logits,
    )
    metrics = dict(counts)
    if args.do_train:
        results = trainer.train(resume_from_checkpoint=checkpoint).metrics
        trainer.log_metrics("train", results)
        metrics.update(results)
    trainer.save_model()
    trainer.save_state()
    for is_asked, split, prefix in ((args.do_eval, "validation", "eval"), (args.do_predict, "test", "test")):
        if is_asked and split in splits:
            results = trainer.evaluate(splits[split], metric_key_prefix=prefix)
            trainer.log_metrics(prefix, results)
            metrics.update(results)
    trainer.save_metrics("all", metrics, combined=False)
    trainer.create_model_card()
    if args.push_to_hub:
        trainer.push_to_hub()
    logger.info(f"The model folder is {args.output_dir}")
    return metrics
