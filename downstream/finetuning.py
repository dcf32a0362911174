"""Fine-tuning from top to bottom: splits and rows, tokenizer and model, training, figures, predictions.

Notable: nothing disappears silently. Rows that are dropped and texts that are cut are counted, in the log and in
`all_results.json`; what would make the figures meaningless, such as a class that only the test split has, is an error.
Without training nothing but figures and predictions is written.
"""

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import evaluate
import numpy as np
import torch
from datasets import Dataset, DatasetDict
from tokenizers.processors import TemplateProcessing
from torch import nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, Trainer, set_seed

from ..corpus.arguments import parse_arguments
from ..corpus.atomic_writes import replacing_files
from ..corpus.documents import draw, limit_datasets, load_splits
from ..corpus.faults import list_reasons
from ..corpus.paths import RUN_FILE
from ..corpus.tokenizers import ensure_pad_token, longest_input, text_reader, vocabulary_size, without_special_tokens
from ..corpus.tokenizers import load_tokenizer as load_any_tokenizer
from ..training.checkpoints import count_steps, find_checkpoint, is_finished
from ..training.loading import check_has_encoder, check_missing, check_weights
from ..training.loading import load_config as load_any_config
from ..training.loop import train
from ..training.model_card import describe_source, write_card
from ..training.publishing import create_publisher
from ..training.record import (
    FINETUNING_FILE,
    RESULTS_FILE,
    SettingsRecorder,
    check_unchanged,
    describe_run,
    earlier_results,
    list_changes,
    log_changes,
)
from ..training.setup import check_number_of_processes, set_up_logging, use_all_cores
from ..training.trainer import check_batches, dataloaders_for_evaluation
from .arguments import SINGLE, DataArguments, FinetuningArguments, ModelArguments
from .embedding import as_text_only, reads_special_tokens
from .labels import NO_LABEL, read_labels
from .tasks import Task


logger = logging.getLogger(__name__)


SPLITS = ("train", "validation", "test")
METRICS = Path(__file__).parent / "metrics"
OUR_COLUMNS = ("num_tokens", "first_tokens")  # of a task's rows, and nothing that a model takes
PREDICTIONS, EVALUATION = "predict_results.jsonl", "eval_results.json"
OUTDATED = (RESULTS_FILE, PREDICTIONS, EVALUATION)  # when a run begins to train, whatever was there before
# what a resumed run should have as before: what is trained, and on which rows
RESUMED_AS_GIVEN = ("model_name_or_path", "model_revision", "encoder", "freeze_encoder", "config_overrides")
RESUMED_AS_GIVEN += ("tokenizer_name", "dataset_name", "dataset_config_name", "train_file", "train_split_name")
RESUMED_AS_GIVEN += ("validation_file", "validation_split_name", "validation_split_percentage", "max_train_samples")
RESUMED_AS_GIVEN += ("text_column", "text_pair_column", "label_column", "problem_type", "label_all_tokens")
RESUMED_AS_GIVEN += ("max_length", "seed", "data_seed", "label_smoothing_factor", "lr_scheduler_type")
RESUMED_AS_GIVEN += ("per_device_train_batch_size", "gradient_accumulation_steps")
KEPT_BY_CHECKPOINTS = ("optim", "learning_rate", "weight_decay")  # with the optimizer's state, whatever is given


def finetune(task_class: type[Task], description: str | None = None) -> dict[str, float | None]:
    """
    Fine-tunes as the command line says, and writes a model folder: weights, config, code, tokenizer, model card, and
    beside them `all_results.json` and, where there is a test split, `predict_results.jsonl`. With `--do_train False`
    it writes the predictions and `eval_results.json` alone.

    Args:
        task_class: `TextTask` or `WordTask`.
        description: what the command does, for its help.

    Returns:
        The figures and counts, as in these files; None for a figure that is undefined.

    Raises:
        ValueError, OSError: for arguments and data that cannot be used; the message says why.
    """
    model_args, data_args, args = parse_arguments(
        (ModelArguments, task_class.arguments, FinetuningArguments), description=description
    )
    set_up_logging(args)
    check_number_of_processes(args)
    use_all_cores(args)
    if args.do_train and (Path(args.output_dir) / RUN_FILE).is_file():
        raise FileExistsError(
            f"--output_dir {args.output_dir} is the folder of a pretraining run, whose weights would be replaced by "
            "those of the fine-tuned model: choose another one."
        )
    checkpoint = find_checkpoint(args)
    if not args.do_train and args.resume_from_checkpoint is not None:
        if checkpoint is None:
            raise FileNotFoundError(
                f"--do_train False evaluates what was trained, but {args.output_dir} has no complete checkpoint. Name "
                "a model as --model_name_or_path, or the --output_dir of the run."
            )
        model_args.model_name_or_path = checkpoint
    publisher = create_publisher(args, model_args.token)
    set_seed(args.seed)
    config = load_config(model_args)
    tokenizer = load_tokenizer(model_args, config)  # what is wrong with it shows before a row is read

    # Rows, model, and rows -> token ids and labels
    counts = {}
    with args.main_process_first(desc="preparing the rows"):
        splits = DatasetDict(load_splits(data_args, SPLITS, model_args.cache_dir, model_args.token))
        if empty := [split for split, dataset in splits.items() if not len(dataset)]:
            raise ValueError(f"Nothing is left of the {empty[0]} split: it has no rows.")
        task = task_class(splits, data_args, config)
        if not args.do_train:
            check_same_classes(task.names, model_args.model_name_or_path, config)
        elif checkpoint is not None and (Path(checkpoint) / "config.json").is_file():  # of an adapter there is none
            check_same_classes(task.names, checkpoint, load_any_config(checkpoint, **model_args.for_hub()))
        splits, test_rows = limit_splits(splits, data_args)
        rows = {split: select_rows(task, dataset, split, counts) for split, dataset in splits.items()}
        warn_of_copies(task, splits, rows)
        if args.eval_strategy != "no" and not ("validation" in rows and rows["validation"].judged):
            raise ValueError(
                f"eval_strategy is {args.eval_strategy.value}, but there is no validation split with labels: pass "
                f"{data_args.validation_flags}."
            )
        task.check_labels({split: part.labels for split, part in rows.items() if part.labels})
        check_flags_of_task(args, task)
        if len(task.columns) == 2:
            separate_pairs(tokenizer)
    task.set_head(config)
    model = load_model(task.auto_class, model_args, config, tokenizer, needs_head=not args.do_train)
    max_length = find_max_length(data_args.max_length, tokenizer, model)
    with args.main_process_first(desc="tokenizing the rows"):
        reader = text_reader(tokenizer)
        encoded = {
            split: task.encode(splits[split].select(part.judged), part.labels, reader, max_length, split)
            for split, part in rows.items()
            if part.judged
        }
        unjudged = None
        if args.do_predict and "test" in rows and rows["test"].unjudged:
            unjudged = task.encode(splits["test"].select(rows["test"].unjudged), None, reader, max_length, "test")
    for split, dataset in encoded.items():
        report_truncation(dataset["num_tokens"][:], max_length, split, counts)
        task.report_encoded(dataset, split, counts)

    # Trainer
    inputs = {split: without_our_columns(dataset) for split, dataset in encoded.items()}
    trainer = FinetuningTrainer(
        model=model,
        args=args,
        data_collator=task.collator(tokenizer),
        train_dataset=inputs["train"] if args.do_train else None,
        eval_dataset=inputs.get("validation"),
        processing_class=tokenizer,
        compute_metrics=make_compute_metrics(task),
        preprocess_logits_for_metrics=task.reduce_logits,
    )

    # Training, then the model before anything else can fail
    metrics = dict(counts)
    if args.do_train:
        facts = describe_run([model_args, data_args, args])
        if checkpoint is not None:
            before = Path(checkpoint).resolve().with_name(FINETUNING_FILE)
            if is_finished(checkpoint, count_steps(trainer)):
                check_unchanged(before, facts, RESUMED_AS_GIVEN + KEPT_BY_CHECKPOINTS)
            elif changes := list_changes(before, facts, KEPT_BY_CHECKPOINTS):
                raise ValueError(
                    f"{checkpoint} goes on with its own optimizer: {changes}. Give that of before, or start a new run "
                    f"from its weights with --model_name_or_path {checkpoint} and another --output_dir."
                )
            log_changes(before, facts, RESUMED_AS_GIVEN)
        results = train(trainer, checkpoint, publisher, [SettingsRecorder(facts, FINETUNING_FILE, OUTDATED)])
        trainer.save_model()
        if results:
            trainer.log_metrics("train", results)
        else:  # a finished run is written again
            earlier = earlier_results(args.output_dir).items()
            results = {name: value for name, value in earlier if not name.startswith(("eval_", "test_"))}
        metrics = {**results, **metrics}

    # Figures and predictions
    figures = {}
    if args.do_eval and "validation" in inputs:
        figures.update(trainer.evaluate(inputs["validation"]))
    if args.do_predict and "test" in rows:
        descriptions = {}
        for indices, dataset in ((rows["test"].judged, encoded.get("test")), (rows["test"].unjudged, unjudged)):
            if dataset is not None:
                output = trainer.predict(without_our_columns(dataset), metric_key_prefix="test")
                described = task.describe(output.predictions, dataset)
                descriptions.update(zip(indices, described, strict=True))
                if "labels" in dataset.column_names:
                    figures.update(output.metrics)
        write_predictions(trainer, test_rows, rows["test"], descriptions)
    figures = {name: None if is_undefined(value) else value for name, value in figures.items()}
    for prefix in ("eval", "test"):
        shown = {name: value for name, value in figures.items() if name.startswith(f"{prefix}_")}
        if shown:
            trainer.log_metrics(prefix, {name: "undefined" if v is None else v for name, v in shown.items()})
    metrics.update(figures)
    trainer.save_metrics("all" if args.do_train else "eval", metrics, combined=False)
    if args.do_train and trainer.is_world_process_zero():
        write_finetuning_card(trainer, model_args, data_args, task, rows, figures, max_length)
        if publisher is not None:
            publisher.publish_model_folder(args.output_dir, tokenizer)
        logger.info(f"The model folder is {args.output_dir}")
    return metrics


# ---- splits and rows ----


def limit_splits(splits: DatasetDict, args: DataArguments) -> tuple[DatasetDict, list[int]]:
    """
    The splits of a run: a validation split drawn from train where there is none, and all cut to their maximum; and
    which rows of the test split these are, by their number.
    """
    if "validation" not in splits and args.validation_split_percentage > 0:
        logger.info(f"validation: {args.validation_split_percentage:g}% of the train rows, drawn at random")
    limited, test_rows = limit_datasets(splits, args), []
    if "test" in splits:
        test_rows = np.flatnonzero(draw(len(splits["test"]), args.max_predict_samples)).tolist()
        limited["test"] = splits["test"].select(test_rows)
    return limited, test_rows


class Rows(NamedTuple):
    """The rows of a split, by their number in it."""

    judged: list[int]  # rows with an input and a label
    labels: list  # theirs
    unjudged: list[int]  # rows of the test split with an input alone, of which there is a prediction but no figure
    faults: dict[int, str]  # rows without an input, and why


def warn_of_copies(task: Task, splits: DatasetDict, rows: dict[str, Rows]) -> None:
    """Says how many rows are judged by an input that was trained on, be it a row that stands twice in a file."""

    def inputs(split: str) -> list[str]:
        dataset = splits[split].select(rows[split].judged)
        return [str(of_row) for of_row in zip(*(dataset[column][:] for column in task.columns), strict=True)]

    seen = set(inputs("train"))
    for split in rows.keys() - {"train"}:
        if num_copies := sum(row in seen for row in inputs(split)):
            logger.warning(
                f"{num_copies:,} of the {len(rows[split].judged):,} rows that the {split} split is judged by have an "
                "input of the train split: the figures tell what was remembered, too. Leave such rows out of one."
            )


def select_rows(task: Task, dataset: Dataset, split: str, counts: dict) -> Rows:
    """
    Which rows of a split can be used, with a line in the log and the numbers in `counts`.

    Raises:
        ValueError: if nothing is left, unless the split is not train and nothing is missing but labels.
    """
    has_labels = task.label_column in dataset.column_names
    labels = read_labels(dataset, task.label_column) if has_labels else [None] * len(dataset)
    judged, unlabelled, faults = [], [], {}
    label_faults = Counter()
    for row, inputs in enumerate(zip(*(dataset[column][:] for column in task.columns), strict=True)):
        if fault := task.input_fault(*inputs):
            faults[row] = fault
        elif fault := task.label_fault(labels[row], inputs, split):
            unlabelled.append(row)
            label_faults[fault] += 1
        else:
            judged.append(row)
    is_predicted, input_faults = split == "test", Counter(faults.values())
    if not judged and (split == "train" or set(label_faults) != {NO_LABEL}):
        raise ValueError(f"Nothing is left of the {split} split: dropped {list_reasons(input_faults + label_faults)}.")
    reasons = input_faults if is_predicted else input_faults + label_faults
    why = list_reasons(reasons)
    logger.info(f"{split}: {len(dataset):,} rows, {len(judged):,} kept{f'; dropped: {why}' if why else ''}")
    if not judged:
        logger.warning(f"{split}: none of its {len(unlabelled):,} rows has a label, so it is not evaluated")
    if is_predicted and unlabelled:
        logger.info(f"{split}: {len(unlabelled):,} rows without a label that can be used are predicted all the same")
        counts[f"{split}_unlabelled"] = len(unlabelled)
    counts[f"{split}_samples"] = len(judged)
    counts[f"{split}_dropped"] = reasons.total()
    return Rows(judged, [labels[row] for row in judged], unlabelled if is_predicted else [], faults)


def without_our_columns(dataset: Dataset) -> Dataset:
    return dataset.remove_columns([name for name in OUR_COLUMNS if name in dataset.column_names])


def check_same_classes(names: list[str], trained: str, config: PreTrainedConfig) -> None:
    """
    Raises:
        ValueError: if a head that goes on as it is was trained for other classes than the data's: it would be read as
            if it knew these.
    """
    known = set(config.id2label.values())
    is_unnamed = all(name.startswith("LABEL_") for name in known)  # as in models whose classes nobody named
    if names and not is_unnamed and known != set(names):
        raise ValueError(
            f"{trained} tells the classes {sorted(known)} apart, and the data has {sorted(names)}. Give it data with "
            "the same classes, or fine-tune it anew in another --output_dir."
        )


def check_flags_of_task(args: FinetuningArguments, task: Task) -> None:
    """
    Raises:
        ValueError: for a figure to choose checkpoints by that there is not, or for smoothing what are no classes.
    """
    name = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if name not in ("loss", *task.figures):
        raise ValueError(
            f"--metric_for_best_model {args.metric_for_best_model}: figures are loss, {', '.join(task.figures)}."
        )
    if args.label_smoothing_factor and getattr(task, "kind", SINGLE) != SINGLE:
        raise ValueError(f"--label_smoothing_factor smooths one class for each text, and this is {task.kind}.")


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
    config = load_any_config(args.model_name_or_path, args.config_overrides, **hub_arguments(args))
    check_has_encoder(config, args.model_name_or_path)
    if args.encoder == "context" and config.model_type != "tjepa":
        raise ValueError(
            f"--encoder context is for T-JEPA pretraining folders; {args.model_name_or_path} is a {config.model_type} "
            "model."
        )
    return config


def hub_arguments(args: ModelArguments) -> dict:
    return {"revision": args.model_revision, **args.for_hub()}


def load_tokenizer(args: ModelArguments, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """
    The tokenizer, able to pad. It adds to a text what the encoder was pretrained with, and from now on, saved with the
    model, reads "</s>" in a text as text.

    Raises:
        ValueError: if there is none, or it has no special token that could do that.
    """
    name = args.tokenizer_name or args.model_name_or_path
    where = args.for_hub() if args.tokenizer_name else hub_arguments(args)
    flag = "--tokenizer_name" if args.tokenizer_name else "--model_name_or_path"
    tokenizer = load_any_tokenizer(name, flag, **where)
    ensure_pad_token(tokenizer)
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    if not reads_special_tokens(config):
        tokenizer = without_special_tokens(tokenizer)
    as_text_only(tokenizer)
    return tokenizer


def separate_pairs(tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Lets the tokenizer put something between the texts of a pair, if it does not yet.

    Raises:
        ValueError: if it has no special token that could stand there.
    """
    if tokenizer.num_special_tokens_to_add(pair=True) != tokenizer.num_special_tokens_to_add():
        return
    separator = tokenizer.sep_token or tokenizer.eos_token
    if separator is None or not tokenizer.is_fast:
        raise ValueError(
            f"The tokenizer of {tokenizer.name_or_path} puts nothing between the texts of a pair: give it a sep_token."
        )
    # saved with the tokenizer, so that a pipeline on the model puts it there, too
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        pair=f"$A {separator} $B", special_tokens=[(separator, tokenizer.convert_tokens_to_ids(separator))]
    )
    logger.info(f"The tokenizer puts nothing between the texts of a pair: from now on {separator!r}")


def find_max_length(asked: int | None, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> int:
    """
    Tokens that a text may have: `asked`, by default what tokenizer and model are made for. Only T-JEPA takes more:
    its rotary positions have no end, and its config and tokenizer then say so.
    """
    longest = longest_input(tokenizer, model)
    if asked is None or asked <= longest:
        return asked or longest
    if model.config.model_type != "tjepa":
        logger.warning(f"--max_length {asked} is more than model and tokenizer take: {longest} it is")
        return longest
    logger.warning(f"--max_length {asked} is more than the {longest} tokens that the model was made for")
    tokenizer.model_max_length = model.config.max_position_embeddings = asked
    return asked


def load_model(
    auto_class: type,
    args: ModelArguments,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    needs_head: bool = False,
) -> PreTrainedModel:
    """
    The encoder with a head of `auto_class`, as `config` has it. A head of another size in the folder is replaced.

    Args:
        needs_head (`bool`): whether a head that is new is an error: nothing would train it.

    Raises:
        ValueError: if the tokenizer has tokens that the model does not know, weights of the encoder are not in the
            folder in the size that `config` gives them, or the head is new and should not be.
    """
    which = {"encoder": args.encoder} if args.encoder != "target" else {}
    model, info = auto_class.from_pretrained(
        args.model_name_or_path,
        config=config,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **which,
        **hub_arguments(args),
    )
    name, base = args.model_name_or_path, f"{model.base_model_prefix}."
    if any(".decoder." in weight for weight in info["missing_keys"]):
        raise ValueError(
            f"{type(model).__name__} reads with a decoder, which {name}, an encoder, has not got. `tjepa tag` and "
            "`tjepa probe` read with the encoder alone."
        )
    check_weights(model, info, (base,), name, args.config_overrides, of_layers=True)
    of_encoder = {weight.removeprefix(base) for weight in info["missing_keys"] if weight.startswith(base)}
    check_missing(model.base_model, of_encoder, name)
    if needs_head and (new := sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})):
        raise ValueError(
            f"--do_train False evaluates a model as it is, but {args.model_name_or_path} has no head for these "
            f"labels: {', '.join(new)} would be drawn at random. Name the folder of a fine-tuned model as "
            "--model_name_or_path, or one of its checkpoints as --resume_from_checkpoint."
        )
    num_embeddings, num_needed = len(model.get_input_embeddings().weight), vocabulary_size(tokenizer)
    if num_needed > num_embeddings:
        raise ValueError(
            f"The tokenizer has tokens up to the id {num_needed - 1}, the model {num_embeddings} embeddings: pass "
            "--tokenizer_name with the one the model was trained on."
        )
    if args.freeze_encoder:
        freeze_encoder(model, new=info["missing_keys"])
    num_parameters, num_trained = model.num_parameters(), model.num_parameters(only_trainable=True)
    logger.info(f"{type(model).__name__}: {num_parameters:,} parameters, {num_trained:,} of them trained")
    return model


def freeze_encoder(model: PreTrainedModel, new: Collection[str] = ()) -> None:
    """
    The encoder gets no gradient, and stays in eval mode (no dropout) although the Trainer calls `model.train()`; but
    parameters that are `new`, such as a pooler that the folder lacks, train as the head does.
    """
    encoder = model.base_model
    encoder.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name in new:
            parameter.requires_grad_(True)
    encoder.train = lambda mode=True: nn.Module.train(encoder, False)
    encoder.eval()


# ---- figures and predictions ----


def make_compute_metrics(task: Task) -> Callable[[EvalPrediction], dict[str, float]]:
    metric = evaluate.load(str(METRICS / task.metric), task.metric_configuration, keep_in_memory=True)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        predictions, references = task.judged(prediction.predictions, prediction.label_ids)
        figures = metric.compute(predictions=predictions, references=references)
        # not None, which the Trainer cannot compare with the best figure so far
        return {name: math.nan if value is None else float(value) for name, value in figures.items()}

    return compute_metrics


def is_undefined(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


class FinetuningTrainer(Trainer):
    """
    The Trainer as it is, but that evaluations see every row in its order, whatever training does, and that an
    undefined figure is null in its history, because NaN is not JSON.
    """

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        check_batches(loader, self.args)
        return loader

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        with dataloaders_for_evaluation(self.args):
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        with dataloaders_for_evaluation(self.args):
            return super().get_test_dataloader(test_dataset)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        super().log({name: None if is_undefined(value) else value for name, value in logs.items()}, *args, **kwargs)


def write_predictions(trainer: Trainer, numbers: list[int], rows: Rows, descriptions: dict[int, dict]) -> None:
    """
    `predict_results.jsonl`: a line for each row of the test split, in its order, with the row's number in the split as
    it was read, the class, classes, number or tags, and probabilities; null where the input cannot be used, and why.
    """
    if not trainer.is_world_process_zero():
        return
    lines = [
        {"row": number, **descriptions.get(row, {"prediction": None, "fault": rows.faults.get(row)})}
        for row, number in enumerate(numbers)
    ]
    content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    with replacing_files(trainer.args.output_dir) as folder:
        (folder / PREDICTIONS).write_text(content, encoding="utf-8")
    logger.info(f"The predictions of the test split are in {Path(trainer.args.output_dir) / PREDICTIONS}")


def write_finetuning_card(
    trainer: Trainer,
    model_args: ModelArguments,
    data_args: DataArguments,
    task: Task,
    rows: dict[str, Rows],
    figures: dict[str, float | None],
    max_length: int,
) -> None:
    args, config = trainer.args, trainer.model.config
    base, base_is_on_hub = describe_source(model_args.model_name_or_path, None)
    dataset, is_on_hub = describe_source(data_args.dataset_name, data_args.train_file)
    classes = f", {config.num_labels} classes" if task.names else ""
    write_card(
        args,
        trainer.state,
        dataset=dataset,
        is_on_hub=is_on_hub,
        figures=figures,
        task_type=task.pipeline,
        tags=[*(["t-jepa"] if config.model_type == "tjepa" else []), task.pipeline],
        license=model_args.model_license,
        base_model=base if base_is_on_hub else None,
        summary=f"{base}, fine-tuned on {dataset}: {task.pipeline}{classes}.",
        auto_class=task.auto_class.__name__,
        has_code=config.model_type == "tjepa",
        rows="\n".join(f"- {split}: {len(part.judged):,} rows" for split, part in rows.items()),
        max_length=max_length,
        settings={
            "rows per step and process": args.train_batch_size * args.gradient_accumulation_steps,
            "learning rate": f"{args.learning_rate} ({args.lr_scheduler_type.value})",
            "weight decay": args.weight_decay,
            "trained": "the head alone" if model_args.freeze_encoder else "encoder and head",
        },
    )
