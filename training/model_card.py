"""README.md of a model folder: what the weights were trained on, how, and their figures, as the Hub shows them.

Notable: a card keeps private what is private. It has the file name of a local path or a URL only: the folder may
name a person, and the URL may hold a key.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig, TrainerState, TrainingArguments

from ..corpus.documents import QUICKSTART
from ..corpus.files import without_query
from ..data_collator_tjepa import MaskingStrategy
from .arguments import PretrainingArguments
from .model_folder import name_of_exported


TEMPLATE = Path(__file__).with_name("model_card.md")
UNNAMED = "PATH_OR_REPO_ID"  # of a run without a name on the Hub
SPEED_FIGURES = ("_runtime", "_samples_per_second", "_steps_per_second", "_preparation_time")


def write_card(
    args: TrainingArguments,
    state: TrainerState,
    *,
    dataset: str,
    is_on_hub: bool,
    figures: Mapping[str, float | None],
    settings: Mapping[str, object],
    task_type: str,
    tags: list[str],
    license: str | None,
    max_length: int,
    base_model: str | None = None,
    **sections: object,
) -> None:
    """
    Writes `README.md` into `args.output_dir`, with `model_card.md` as its template.

    Args:
        args, state: Those of the run; `hub_model_id` is the model's name, where it has one.
        dataset, is_on_hub: What `describe_source` returns of the data.
        figures: Those of the weights in the folder; None for what is undefined.
        settings: The rows of the table of how it was trained, but for those that every run has.
        max_length: Tokens of a text that were read.
        task_type, tags, license, base_model: The card's metadata, as the Hub names them.
        sections: What else the template shows: `summary`, `auto_class`, `loaded`, `before_after`, `rows`,
            `strategies`, `health`, `pictures`.
    """
    repo_id = args.hub_model_id or UNNAMED
    name = Path(args.hub_model_id or Path(args.output_dir).resolve()).name
    figures = {metric: value for metric, value in figures.items() if not metric.endswith(SPEED_FIGURES)}
    card_data = ModelCardData(
        library_name="transformers",
        license=license,
        base_model=base_model,
        tags=tags,
        datasets=[dataset] if is_on_hub else None,
        pipeline_tag=task_type,
        model_name=name,
        eval_results=[
            EvalResult(
                task_type=task_type,
                dataset_type=re.sub(r"[^\w./-]+", "-", dataset),  # the Hub takes nothing else, "*" in globs included
                dataset_name=dataset,
                metric_type=metric,
                metric_value=round(value, 5),
            )
            for metric, value in figures.items()
            if value is not None
        ]
        or None,
    )
    ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        name=name,
        repo_id=repo_id,
        revision=args.hub_revision,
        weights=describe_weights(args, state),
        source=dataset,
        settings={
            "optimizer steps": state.global_step,
            "processes": args.world_size,
            **settings,
            "maximum length (tokens)": max_length,
            "seed": args.seed,
        },
        figures={name: "undefined" if value is None else f"{value:.4f}" for name, value in sorted(figures.items())},
        **sections,
    ).save(Path(args.output_dir) / "README.md")


def describe_weights(args: TrainingArguments, state: TrainerState) -> str:
    """Which weights a run ends with: those of its last step or, with `load_best_model_at_end`, of its best."""
    if args.load_best_model_at_end and state.best_global_step and state.best_metric is not None:
        return (
            f"those of step {state.best_global_step} of {state.global_step}, which had the best "
            f"{args.metric_for_best_model} ({state.best_metric:.4f})"
        )
    return f"those of step {state.global_step}, the last"


def describe_source(dataset_name: str | None, train_file: str | None) -> tuple[str, bool]:
    """What a card calls the data, and whether that is the name of a dataset on the Hub."""
    is_on_hub = dataset_name not in (None, QUICKSTART) and not Path(dataset_name).exists()
    return (dataset_name if is_on_hub else Path(without_query(dataset_name or train_file)).name), is_on_hub


def write_pretraining_card(
    args: PretrainingArguments,
    state: TrainerState,
    config: PreTrainedConfig,
    strategies: list[MaskingStrategy],
    counts: Mapping[str, object],
    metrics: Mapping[str, float],
    verdict: str,
    *,
    dataset_name: str | None,
    train_file: str | None,
    max_length: int,
    ema_momentum: float,
    license: str,
    pictures: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """
    The card of a pretraining folder.

    Args:
        args, state: As in `write_card`.
        config (`PreTrainedConfig`): The model's.
        strategies (`list[MaskingStrategy]`): What was hidden.
        counts (`Mapping[str, object]`): Split -> what became of its documents; what `str` makes of it is shown.
        metrics (`Mapping[str, float]`): The results, of which evaluation and probe are shown.
        verdict (`str`): What the health figures say.
        dataset_name, train_file, max_length, license: As the arguments of `run_pretraining.py` of these names.
        ema_momentum (`float`): Of the target encoder at the start.
        pictures (`Mapping[str, str]`): Those to show: file in the folder -> what it shows.
    """
    encoder = config.encoder  # of another architecture, which needs no code of ours
    dataset, is_on_hub = describe_source(dataset_name, train_file)
    figures = {name: value for name, value in metrics.items() if name.startswith(("eval_", "probe_"))}
    write_card(
        args,
        state,
        dataset=dataset,
        is_on_hub=is_on_hub,
        figures=figures,
        task_type="feature-extraction",
        tags=["t-jepa", "feature-extraction", "self-supervised", "text-encoder"],
        license=license,
        max_length=max_length,
        base_model=None if encoder is None or Path(encoder.name_or_path).exists() else encoder.name_or_path or None,
        summary=f"A text encoder{f' ({encoder.model_type})' if encoder else ''} pretrained with T-JEPA: it learned to "
        f"predict the representations of hidden text{' and its words' if config.token_prediction_weight else ''}. "
        f"{config.num_hidden_layers} layers, {config.hidden_size} wide, vocabulary {config.vocab_size}.",
        auto_class="AutoModel",
        loaded=f"the {name_of_exported(config, args)} encoder",
        has_code=encoder is None,
        before_after=metrics.get("before_after", {}).get("lines"),
        pictures=pictures,
        rows="\n\n".join(f"{split}:\n\n```\n{count}\n```" for split, count in counts.items()),
        strategies=yaml.safe_dump([asdict(strategy) for strategy in strategies], sort_keys=False).strip(),
        health=verdict.rstrip(".") if figures else "not evaluated",
        settings={
            "documents per step and process": (state.train_batch_size or args.train_batch_size)
            * args.gradient_accumulation_steps,
            "learning rate": f"{args.start_lr} -> {args.learning_rate} -> {args.final_lr}",
            **({} if args.head_learning_rate is None else {"learning rate of the heads": args.head_learning_rate}),
            "weight decay": f"{args.weight_decay} -> {args.final_weight_decay}",
            "target encoder momentum": f"{ema_momentum:.5g} -> {args.final_ema_momentum} "
            f"({args.ema_schedule}, over {args.ema_anneal_ratio:.0%} of the steps)",
            "loss": config.loss_type,
            "target layers": f"{config.target_layers} ({config.target_normalization} normalisation)",
            "variance/covariance weight": config.variance_covariance_weight,
            "SIGReg weight": config.sigreg_weight,
            "token prediction weight": config.token_prediction_weight,
            "denoising weight": f"{config.denoising_weight} (ratio {config.denoising_ratio})",
            "segment weight": config.segment_weight,
            "pooled weight": config.pooled_weight,
            "predictor": config.predictor_type,
            "masking strategies": ", ".join(strategy.name for strategy in strategies),
        },
    )
