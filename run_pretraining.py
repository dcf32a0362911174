"""Pretrains a T-JEPA text encoder.

    accelerate launch run_pretraining.py                                      # quickstart: no data, no network needed
    accelerate launch run_pretraining.py configs/tinystories.yaml --max_steps 100
    accelerate launch run_pretraining.py --train_file stories.parquet --tokenizer_name my-tokenizer --output_dir out

Arguments come from the dataclasses below, from a YAML file as the first argument, or from both (flags win). This file
only parses and connects; masks and packing are in data_collator_tjepa.py, the model in modeling_tjepa.py, moving
average, schedules and monitoring in training/, text to tokens in corpus/.
"""

from tjepa.corpus.command_line import answer_early, start


if __name__ == "__main__":  # before torch is imported
    answer_early("pretrain")


import copy
import json
import logging
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import datasets
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, set_seed
from transformers.hf_argparser import HfArg

from tjepa import TJEPAConfig, TJEPAForPreTraining
from tjepa.corpus.arguments import parse_arguments
from tjepa.corpus.atomic_writes import replacing_files
from tjepa.corpus.documents import QUICKSTART, DataArguments, check_dataset_exists, load_documents, record_source
from tjepa.corpus.private import get_attention
from tjepa.corpus.segments import SegmentCollator
from tjepa.corpus.splits import tokenize_splits
from tjepa.corpus.strategies import load_masking_strategies
from tjepa.corpus.tokenization import DocumentCounts, StreamTokenizer, warn_of_loss
from tjepa.corpus.tokenizers import HubArguments, load_tokenizer, special_tokens_around, without_special_tokens
from tjepa.corpus.train_tokenizer import train_tokenizer
from tjepa.data_collator_tjepa import MASKING_PRESETS, DataCollatorForTJEPA
from tjepa.downstream.before_after import BeforeAfter, BeforeAfterArguments, held_out_texts
from tjepa.downstream.quickstart_report import report_what_was_learned
from tjepa.layers_tjepa import VARLEN_ATTENTION, has_varlen_kernel
from tjepa.tools.health import closing_lines, summarise_run
from tjepa.tools.report import ReportCallback, texts_to_keep, write_report
from tjepa.tools.search import build_docstring_index
from tjepa.training.arguments import PretrainingArguments
from tjepa.training.checkpoints import count_steps, explain_failed_save, find_checkpoint, is_finished
from tjepa.training.forecast import Forecast
from tjepa.training.health import evaluation_figures
from tjepa.training.loading import check_attention, check_resumed, load_pretraining_config, load_pretraining_model
from tjepa.training.loop import load_state, train
from tjepa.training.model_card import write_pretraining_card
from tjepa.training.model_folder import (
    exported_encoder,
    find_sentence_modules,
    name_of_exported,
    pretraining_folder,
    save_model_folder,
)
from tjepa.training.publishing import create_publisher
from tjepa.training.record import (
    RESULTS_FILE,
    RUN_FILE,
    RunRecorder,
    check_unchanged,
    describe_run,
    earlier_results,
    fingerprint,
    log_changes,
    suppressing_errors,
)
from tjepa.training.resuming import plan_extension
from tjepa.training.setup import check_number_of_processes, keep_freed_memory, set_up_logging, use_all_cores
from tjepa.training.trainer import TJEPATrainer, wants_fsdp


logger = logging.getLogger(__name__)


QUICKSTART_CONFIG = Path(__file__).parent / "configs" / "quickstart.yaml"


@dataclass
class ModelArguments(HubArguments):
    model_name_or_path: str | None = HfArg(
        default=None,
        help="Pretraining folder, or any text encoder of transformers, here or on the Hub, to start from. "
        "Default: from scratch.",
    )
    config_name: str | None = HfArg(
        default=None,
        help="Configuration to train from scratch, if not the default one; also of another text encoder of "
        "transformers.",
    )
    config_overrides: str | None = HfArg(
        default=None, help="Overrides of the configuration, added to a YAML file's: hidden_size=128,use_bias=false"
    )
    tokenizer_name: str | None = HfArg(
        default=None, help="Tokenizer on the Hub or in a folder. Default: that of the model or the data."
    )
    attn_implementation: str | None = HfArg(
        default=None,
        help=f"sdpa, flex_attention, {VARLEN_ATTENTION}, eager, ... Default: sdpa; for our own architecture on a GPU "
        f"flex_attention, and with --bf16 or --fp16 {VARLEN_ATTENTION}, in which the predictor takes flex_attention.",
    )
    encoder_input: Literal["auto", "packed", "padded"] | None = HfArg(
        default=None,
        help="How an encoder of another architecture is fed. Default: packed where that gives the same states "
        "as padded, which is measured.",
    )
    model_revision: str = HfArg(default="main", help="Branch, tag or commit of model_name_or_path.")
    model_license: str = HfArg(default="apache-2.0", help="Licence of the weights, for the model card.")

    def __post_init__(self):
        if self.config_name is not None and self.model_name_or_path is not None:
            raise ValueError(
                f"--config_name {self.config_name} is for training from scratch, and --model_name_or_path "
                f"{self.model_name_or_path} has a configuration. Leave one of them out; --config_overrides changes "
                "single values."
            )


@dataclass
class MaskingArguments:
    masking_strategies: str = HfArg(
        default="ul2",
        help=f"Preset ({', '.join(MASKING_PRESETS)}), or a YAML or JSON file with a list of masking strategies.",
    )
    mask_recurring_targets: bool = HfArg(
        default=False, help="Hide other occurrences of a target block's tokens from the context."
    )
    views_per_document: int | None = HfArg(
        default=None, help="Draw so many strategies for each document. Default: all of them."
    )
    segment_length: int | None = HfArg(
        default=None,
        help="Cut documents into segments of at most so many tokens, each encoded by itself; with "
        "--config_overrides segment_weight=0.3, which predicts hidden ones from the others.",
    )
    row_length: int | None = HfArg(
        default=None, help="Tokens per packed row. Default: one row without padding; with flex_attention by the batch."
    )


def main():
    model_args, data_args, masking_args, training_args, report_args = parse_arguments(
        (ModelArguments, DataArguments, MaskingArguments, PretrainingArguments, BeforeAfterArguments),
        description=__doc__,
        default_file=QUICKSTART_CONFIG,
        default_unless=("dataset_name", "train_file"),
    )
    # Mistakes in masks, configuration and tokenizer show before a document is read or a repository made
    collator = create_collator(masking_args, data_args, training_args)
    set_up_logging(training_args)
    if training_args.device.type == "cpu":
        use_all_cores(training_args)
        keep_freed_memory()
    check_number_of_processes(training_args)
    if training_args.n_gpu > 1:
        raise ValueError(
            f"One process sees {training_args.n_gpu} GPUs. Start one process for each with accelerate launch "
            f"--num_processes {training_args.n_gpu}, or show it only one with CUDA_VISIBLE_DEVICES=0."
        )
    forecast = Forecast(training_args) if training_args.forecast else None
    checkpoint = None if forecast else find_checkpoint(training_args)
    if not training_args.do_train:
        model_args.model_name_or_path = find_weights_to_evaluate(model_args, training_args, checkpoint)
    elif checkpoint is not None and training_args.max_steps > 0:
        plan_extension(training_args, checkpoint, training_args.max_steps)  # an error comes before the work
    from_hub = {"revision": model_args.model_revision, **model_args.for_hub()}
    config = load_pretraining_config(
        model_args.model_name_or_path,
        model_args.config_name,
        model_args.config_overrides,
        **from_hub,
    )
    goes_on = config.encoder is not None and model_args.model_name_or_path is not None
    training_args.settle_rates(goes_on, new_heads=goes_on and not config.name_or_path)
    attention = model_args.attn_implementation or choose_attention(config, training_args)
    check_choices(config, attention, model_args, masking_args, training_args)
    check_length(data_args, training_args)
    collator.fit_to(config)
    if model_args.encoder_input is not None:
        config.encoder_input = model_args.encoder_input
    tokenizer = choose_tokenizer(model_args, data_args, config)
    publisher = create_publisher(training_args, model_args.token)
    set_seed(training_args.seed)

    # Model, which needs a tokenizer; that of the quickstart needs the documents
    is_quickstart, documents = data_args.dataset_name == QUICKSTART, None
    if tokenizer is None:
        documents = read_documents(model_args, data_args, training_args)
        tokenizer = train_tokenizer(documents["train"]["text"], config.vocab_size, data_args.max_length)
    model = load_pretraining_model(
        config,
        tokenizer,
        data_args.max_length,
        model_args.config_overrides,
        model_args.model_name_or_path,
        attention,
        **from_hub,
    )
    if checkpoint is not None and training_args.do_train:
        check_resumed(checkpoint, model.config, tokenizer)
    if config.encoder is None:
        tokenizer.model_max_length = model.config.max_position_embeddings
    else:
        collator.special_tokens = special_tokens_around(tokenizer)
        check_row_length(masking_args, data_args, num_special=sum(map(len, collator.special_tokens)))
    sentence_modules = None
    if goes_on:
        where = (model_args.model_revision, model_args.cache_dir, model_args.token)
        sentence_modules = find_sentence_modules(model_args.model_name_or_path, *where)
    untrained_encoder = copy.deepcopy(model.target_encoder) if is_quickstart else None
    logger.info(f"{model.num_parameters(only_trainable=True):,} trainable parameters")

    # Text -> tokens
    if documents is None:
        documents = read_documents(model_args, data_args, training_args)
    check_evaluation(documents, data_args, training_args, report_args, config, collator)
    comparison = create_comparison(report_args, data_args, documents, tokenizer)
    if not training_args.do_train:
        documents.pop("train")
    with training_args.main_process_first(desc="tokenizing the documents"):
        datasets_by_split, counts = tokenize_splits(documents, tokenizer, data_args, training_args)

    # Views and batches
    if collator.row_length is None and has_flex_attention(model):
        collator.row_length = "auto"

    # Training
    train_dataset, eval_dataset = (datasets_by_split.get(split) for split in ("train", "validation"))
    trainer = TJEPATrainer(model, training_args, collator, train_dataset, eval_dataset, tokenizer)
    if comparison is not None and report_args.probe_file is not None:
        trainer.judge_encoder = lambda: probe_encoder(trainer, comparison, tokenizer, data_args.max_length)
    if forecast is not None:
        lines = forecast.measure(trainer, counts["train"])
        if trainer.is_world_process_zero():
            print("", *lines, sep="\n")
        return
    arguments = [model_args, data_args, masking_args, training_args, report_args]
    strategies = [asdict(strategy) for strategy in collator.strategies]
    if not training_args.do_train:
        load_state(trainer, model_args.model_name_or_path)
        save_figures("eval_results.json", evaluate(trainer), training_args)
        return
    if checkpoint is not None and is_finished(checkpoint, count_steps(trainer)):
        check_unchanged(Path(checkpoint).resolve().with_name(RUN_FILE), describe_run(arguments, strategies=strategies))
    before = probe_at_start = None
    if comparison is not None and trainer.is_world_process_zero():
        before = comparison.embed(model.target_encoder, tokenizer, data_args.max_length)
        probe_at_start = comparison.probe(before.labelled)[0] if report_args.probe_file is not None else None
    callbacks = []
    if trainer.is_world_process_zero():
        with suppressing_errors("The run's record"):
            facts = describe_run(
                arguments,
                seed=training_args.seed,
                strategies=strategies,
                documents={split: count.to_dict() for split, count in counts.items() if hasattr(count, "to_dict")},
                max_length=data_args.max_length,
                exported=name_of_exported(model.config, training_args),
                started_from=model_args.model_name_or_path,
                revision=model_args.model_revision,
                fingerprint_at_start=fingerprint(model.target_encoder),
                probe_at_start=probe_at_start,
                **texts_to_keep(documents, data_args.text_column_name, tokenizer, comparison),
            )
            if checkpoint is not None:
                log_changes(Path(checkpoint).resolve().with_name(RUN_FILE), facts)
            callbacks = [RunRecorder(facts), ReportCallback()]
    results = train(trainer, checkpoint, publisher, callbacks) or earlier_results(training_args.output_dir)
    for name in ("best_step", "best_by"):  # the evaluation below says which weights these are
        results.pop(name, None)

    # The model folder: the weights first, whatever becomes of the figures
    model = gather_model(trainer)
    if trainer.is_world_process_zero():
        with explain_failed_save(trainer, training_args.output_dir):
            save_model_folder(model, tokenizer, collator.strategies, training_args, sentence_modules)
    results |= evaluate(trainer)
    results |= count_documents(trainer, counts)
    results["source"] = record_source(data_args)
    results["dropped_in_batches"] = collator.num_dropped_documents
    results["nonfinite_gradients"] = trainer.health.num_nonfinite_gradients
    if trainer.is_world_process_zero():
        pictures = {}

        def save_results():
            save_figures(RESULTS_FILE, results, training_args)
            write_pretraining_card(
                training_args,
                trainer.state,
                model.config,
                collator.strategies,
                counts,
                results,
                trainer.health.verdict or summarise_run(training_args.output_dir),
                dataset_name=data_args.dataset_name,
                train_file=data_args.train_file,
                max_length=data_args.max_length,
                ema_momentum=trainer.ema.momentum,
                license=model_args.model_license,
                pictures=pictures,
            )

        save_results()
        if is_quickstart:
            encoders = (model.target_encoder, untrained_encoder)
            results |= report_what_was_learned(*encoders, tokenizer, model_args.cache_dir)
            save_results()
            build_docstring_index(training_args.output_dir, model.target_encoder, tokenizer, model_args.cache_dir)
        if comparison is not None:
            after = comparison.embed(exported_encoder(model, training_args), tokenizer, data_args.max_length)
            results["before_after"] = comparison.report(before, after)
            print("\nWhat it did to the encoder", *results["before_after"]["lines"], "", sep="\n  ")
            save_results()
        with suppressing_errors("The report"):
            pictures = write_report(training_args.output_dir)
            save_results()
        if publisher is not None:
            publisher.publish_model_folder(training_args.output_dir, tokenizer)
        with suppressing_errors("How good the model is"):
            print("", *closing_lines(training_args.output_dir), sep="\n")
    if trainer.health.must_stop:
        sys.exit(3)


def read_documents(
    model_args: ModelArguments, data_args: DataArguments, args: PretrainingArguments
) -> datasets.DatasetDict:
    with args.main_process_first(desc="reading the documents"):
        return load_documents(data_args, model_args.cache_dir, model_args.token)


def choose_attention(config: TJEPAConfig, args: PretrainingArguments) -> str:
    """
    What is fastest on a GPU; sdpa beside another encoder, because packed rows of equal views suit both, and with
    dropout in the attention, which the others lack.
    """
    if args.device.type != "cuda" or config.encoder is not None or config.attention_probs_dropout_prob > 0.0:
        return "sdpa"
    return VARLEN_ATTENTION if (args.bf16 or args.fp16) and has_varlen_kernel(config) else "flex_attention"


def has_flex_attention(model: TJEPAForPreTraining) -> bool:
    """In any of its parts: the predictor's can be another one than the encoders'."""
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    return any(get_attention(part.config) == "flex_attention" for part in parts)


def check_choices(
    config: TJEPAConfig,
    attention: str,
    model_args: ModelArguments,
    masking_args: MaskingArguments,
    training_args: PretrainingArguments,
) -> None:
    """
    Raises:
        ValueError: for flags that would do nothing, or not work, with this configuration.
    """
    for name, value in (("export_encoder", training_args.export_encoder), ("encoder_input", model_args.encoder_input)):
        if config.encoder is None and value is not None:
            raise ValueError(
                f"--{name} {value} is for encoders of other architectures. Leave it out: our own takes packed rows, "
                'and AutoModel.from_pretrained(FOLDER, encoder="context") loads the one that was trained by gradient.'
            )
    if config.encoder is not None and training_args.torch_compile:
        raise ValueError(
            f"--torch_compile would compile a {config.encoder.model_type} encoder anew for every batch, whose groups "
            "of equal views differ. Leave it out: it is for our own architecture."
        )
    check_attention(config, attention)
    if attention == "flex_attention" and training_args.do_train and training_args.device.type == "cpu":
        raise ValueError("flex_attention has no backward on a CPU: pass --attn_implementation sdpa, or leave it out.")
    has_kernel = attention == VARLEN_ATTENTION == choose_attention(config, training_args)
    if attention in ("sdpa", VARLEN_ATTENTION) and not has_kernel and training_args.torch_compile:
        raise ValueError(
            f"--torch_compile with {attention} attention would compile anew for every batch, whose groups of equal "
            "views differ. Leave it out; on a GPU it goes with the attention that a run takes there by itself."
        )
    if config.pooled_weight > 0 and training_args.per_device_train_batch_size == 1:
        raise ValueError(
            "With pooled_weight a document's hidden part is told from those of the others in its batch: raise "
            "--per_device_train_batch_size 1."
        )
    if (config.segment_weight > 0) != (masking_args.segment_length is not None):
        raise ValueError(
            f"Segments are cut by --segment_length (given: {masking_args.segment_length}) and predicted with "
            f"--config_overrides segment_weight=0.3 (here {config.segment_weight}): set both, or neither."
        )


def check_length(data_args: DataArguments, args: PretrainingArguments) -> None:
    """Raises a `ValueError` for a stream, whose length nobody knows, without a number of steps."""
    if data_args.is_streamed and args.do_train and args.max_steps <= 0:
        raise ValueError(
            f"With --streaming the number of documents is unknown, and with it that of {args.num_train_epochs:g} "
            "epochs: pass --max_steps, or leave --streaming out."
        )


def create_collator(
    masking_args: MaskingArguments, data_args: DataArguments, training_args: PretrainingArguments
) -> DataCollatorForTJEPA:
    """
    What draws the views of documents or, with `--segment_length`, of their segments.

    Raises:
        ValueError: if a row is shorter than these may be; for masks that cannot be drawn.
    """
    if masking_args.segment_length is not None and masking_args.segment_length >= data_args.max_length:
        raise ValueError(
            f"--segment_length {masking_args.segment_length} leaves documents of --max_length "
            f"{data_args.max_length} in one piece, and there is nothing to predict it from. Lower it, or raise "
            "--max_length."
        )
    check_row_length(masking_args, data_args)
    options = {
        "strategies": load_masking_strategies(masking_args.masking_strategies),
        "seed": training_args.data_seed if training_args.data_seed is not None else training_args.seed,
        "row_length": masking_args.row_length,
        "mask_recurring_targets": masking_args.mask_recurring_targets,
        "views_per_document": masking_args.views_per_document,
    }
    if masking_args.segment_length is None:
        return DataCollatorForTJEPA(**options)
    return SegmentCollator(segment_length=masking_args.segment_length, **options)


def check_row_length(masking_args: MaskingArguments, data_args: DataArguments, num_special: int = 0) -> None:
    """
    Raises:
        ValueError: if a document or segment, with the special tokens around it, is longer than a row.
    """
    flag = "--max_length" if masking_args.segment_length is None else "--segment_length"
    longest = (masking_args.segment_length or data_args.max_length) + num_special
    if masking_args.row_length is not None and masking_args.row_length < longest:
        special = f" and {num_special} special tokens" if num_special else ""
        raise ValueError(
            f"--row_length {masking_args.row_length} is too short for {flag} {longest - num_special}{special}: a row "
            "holds whole sequences. Raise it, or leave it out."
        )


def choose_tokenizer(
    model_args: ModelArguments, data_args: DataArguments, config: TJEPAConfig
) -> PreTrainedTokenizerBase | None:
    """
    The tokenizer asked for, else the model's, else the prepared dataset's; None for the quickstart, which trains one.
    It adds no special tokens, because our own encoder is trained without; that of another encoder stays as it is.
    """
    name, flag, revision = model_args.tokenizer_name, "--tokenizer_name", "main"
    if name is None and model_args.model_name_or_path is not None:
        name, flag, revision = model_args.model_name_or_path, "--model_name_or_path", model_args.model_revision
    if name is None and data_args.dataset_name is not None:
        if data_args.dataset_name == QUICKSTART:
            return None
        check_dataset_exists(data_args.dataset_name)
        if (Path(data_args.dataset_name) / "tokenizer_config.json").is_file():
            name, flag = data_args.dataset_name, "--dataset_name"
    if name is None and config.encoder is not None:
        name, flag = model_args.config_name, "--config_name"
    if name is None:
        raise ValueError(
            "Which tokenizer? Pass --tokenizer_name (a folder, or a name on the Hub); `tjepa tokenizer` makes one of "
            "your own texts."
        )
    tokenizer = load_tokenizer(name, flag, revision=revision, **model_args.for_hub())
    return tokenizer if config.encoder is not None else without_special_tokens(tokenizer)


def find_weights_to_evaluate(
    model_args: ModelArguments, training_args: PretrainingArguments, checkpoint: str | None
) -> str:
    """
    What `--do_train False` evaluates: the checkpoint or model that it names, else the model in the output folder.

    Raises:
        FileNotFoundError: if there is none.
    """
    if checkpoint is not None:
        return checkpoint
    name = model_args.model_name_or_path
    folder = Path(name or training_args.output_dir)
    if training_args.resume_from_checkpoint is None and (name is not None or (folder / "config.json").is_file()):
        return pretraining_folder(name or training_args.output_dir)
    raise FileNotFoundError(
        f"--do_train False evaluates a trained model, and {training_args.output_dir} holds none. Name one with "
        "--model_name_or_path, a checkpoint with --resume_from_checkpoint, or the --output_dir of a run."
    )


def check_evaluation(
    documents: datasets.DatasetDict,
    data_args: DataArguments,
    args: PretrainingArguments,
    report_args: BeforeAfterArguments,
    config: TJEPAConfig,
    collator: DataCollatorForTJEPA,
) -> None:
    """
    Raises:
        ValueError: if evaluations were asked for and there is nothing to evaluate, or nothing that the best checkpoint
            is to be chosen by.
    """
    if "validation" not in documents and (args.eval_strategy != "no" or not args.do_train):
        raise ValueError(
            f"eval_strategy is {args.eval_strategy.value} and do_train {args.do_train}, but there is no validation "
            f"split: pass {data_args.validation_flags}."
        )
    best_by = (args.metric_for_best_model or "").removeprefix("eval_")
    if args.save_strategy == "best" and not best_by:
        raise ValueError("--save_strategy best needs --metric_for_best_model: loss, or another figure.")
    if best_by == "probe_accuracy" and (report_args.probe_file is None or wants_fsdp(args)):
        raise ValueError(f"--metric_for_best_model {best_by} needs --probe_file, and no FSDP: or choose another.")
    figures = evaluation_figures(config, [strategy.name for strategy in collator.strategies])
    if best_by not in ("", "probe_accuracy", *figures):
        raise ValueError(
            f"--metric_for_best_model {best_by} is not among the figures of an evaluation: {', '.join(figures)}, or "
            "with --probe_file probe_accuracy."
        )


def create_comparison(
    args: BeforeAfterArguments,
    data_args: DataArguments,
    documents: datasets.DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
) -> BeforeAfter | None:
    """
    Raises:
        ValueError: if there are no held-out texts to compare on; as `BeforeAfter`.
    """
    if not args.report_before_after:
        return None
    if "validation" not in documents:
        raise ValueError(
            "--report_before_after judges on held-out texts, and there is no validation split: pass "
            f"{data_args.validation_flags}, or --report_before_after false."
        )
    return BeforeAfter(held_out_texts(documents["validation"], data_args.text_column_name, tokenizer), args.probe_file)


def probe_encoder(trainer: TJEPATrainer, comparison: BeforeAfter, tokenizer, max_length: int) -> dict[str, float]:
    """For every evaluation: the probe's accuracy on the encoder that the run exports. A sharded one is not judged."""
    if isinstance(trainer.model, FSDPModule):
        return {}
    encoder = exported_encoder(trainer.model, trainer.args)
    return {"probe_accuracy": comparison.probe_now(encoder, tokenizer, max_length)}


def evaluate(trainer: TJEPATrainer) -> dict[str, float]:
    """The figures of the validation split, if there is one to evaluate, and the step that they belong to."""
    if not trainer.args.do_eval or trainer.eval_dataset is None:
        return {"train_steps": trainer.state.global_step}
    step, figures = trainer.latest_evaluation
    if step != trainer.state.global_step or trainer.args.load_best_model_at_end:  # else training ended with it
        figures = trainer.evaluate()
    figures = {**figures, "train_steps": trainer.state.global_step}
    if trainer.args.load_best_model_at_end and trainer.state.best_global_step:
        figures |= {"best_step": trainer.state.best_global_step, "best_by": trainer.args.metric_for_best_model}
    return figures


def count_documents(trainer: TJEPATrainer, counts: dict[str, DocumentCounts | StreamTokenizer | str]) -> dict:
    """What became of the documents of each split, for the results; what a stream counted is added up in `counts`."""
    if isinstance(stream := counts["train"], StreamTokenizer):
        counts["train"] = stream.counts(lambda count: trainer.accelerator.reduce(count.to(trainer.args.device), "sum"))
        logger.info(f"train documents, as far as they were read since this start:\n{counts['train']}")
        if trainer.is_world_process_zero():
            warn_of_loss(counts["train"], stream.args, "train")
    return {"documents": {split: count.to_dict() for split, count in counts.items() if not isinstance(count, str)}}


def gather_model(trainer: Trainer) -> TJEPAForPreTraining:
    """The trained model in one piece. Every process takes part; where it is sharded, only the first one gets it."""
    if not isinstance(trainer.model, FSDPModule):
        return trainer.model
    weights = trainer.accelerator.get_state_dict(trainer.model)
    model = TJEPAForPreTraining(trainer.model.config)
    if trainer.is_world_process_zero():
        model.load_state_dict(weights)
    return model


def save_figures(name: str, figures: dict[str, float], args: PretrainingArguments) -> None:
    if args.process_index == 0:
        with replacing_files(args.output_dir) as folder:
            (folder / name).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    start(main)
