"""What recipes learn for the same compute: T-JEPA in variants beside masked language modelling, by frozen probes.

python benchmarks/learning_curve.py --dataset_name data/books --data_dir eval --seconds 240 --output_dir out
python benchmarks/learning_curve.py ... --only tjepa mlm --variant "top3=tjepa,target_layers=3" --seeds 0
python benchmarks/learning_curve.py ... --recipes benchmarks/learning_branches.yaml   # each goes on from one MLM

All recipes train the same encoder on the same documents in the same order, packed without padding; MLM computes its
logits at the masked tokens only, as T-JEPA does at its slots. The clock is the CPU time of one thread that training
steps take (judging is not in it): on shared machines it is what the wall-clock of a core would be on a quiet one.
Steps are timed first, and the schedules made for as many as fit. With --tokens, runs are of equal tokens instead, as
they should be on a GPU, whose time this clock does not see.

Each finished run is a JSON in --output_dir and is not run again, so the same command goes on where it was stopped;
several processes may share the folder when each is given recipes or seeds of its own. Recipes are chosen with
--judge_on validation, which never looks at a test part, and reported with --judge_on test.
"""

import argparse
import copy
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Literal
from unittest import mock

import numpy as np
import torch
import yaml
from accelerate.utils import send_to_device
from reporting import finished_or_run, new_figure, save_figure
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, Trainer, set_seed

import tjepa.layers_tjepa
from tjepa import TJEPAConfig, TJEPAForMaskedLM, TJEPAForPreTraining
from tjepa.corpus.documents import DataArguments, load_documents
from tjepa.corpus.segments import SegmentCollator, cut_into_segments
from tjepa.corpus.strategies import load_masking_strategies
from tjepa.data_collator_tjepa import DataCollatorForTJEPA, MaskingStrategy, ragged_arange
from tjepa.downstream.probe import ProbeTask, embed_task, groups_of_rows, probe_embedded_task, probe_tasks_with_tfidf
from tjepa.downstream.run_probing import load_tasks
from tjepa.downstream.sentence_scores import why_it_cannot_score
from tjepa.layers_tjepa import VARLEN_ATTENTION, PackedViews
from tjepa.training.arguments import PretrainingArguments
from tjepa.training.health import moment_sums, rank_share
from tjepa.training.loading import parse_config_overrides
from tjepa.training.schedules import WarmupThenDecay, WeightDecayCallback


NUM_TIMED_STEPS, NUM_WARMUP_STEPS = 20, 4
UNTRAINED, TFIDF = "untrained", "TF-IDF"
SCORED_MEASURES = {  # of each kind of task the one that counts for the score, the next where a baseline has not got it
    "classification": ("linear_probe",),
    "similarity": ("spearman_whitened", "spearman"),
    "tagging": ("linear_probe",),
    "pair order": ("linear_probe",),
    "position": ("linear_probe",),
    "retrieval": ("mrr",),
    "minimal pairs": ("accuracy",),
}


# --- Recipes ---------------------------------------------------------------------------------------------------------


@dataclass
class Recipe:
    """
    Args:
        objective: `"tjepa"` or `"mlm"`.
        masking: of T-JEPA, a preset, a file, or a list of masking strategies as mappings.
        views_per_document: of T-JEPA, how many of the strategies each document gets; `None`: all.
        mask_ratio: of MLM, the share of tokens that is predicted (80% masked, 10% random, 10% kept, as in BERT).
        random_ratio: of MLM, the share of these that is random.
        final_mask_ratio: of MLM, what that share goes to, linearly, by the last step; `None`: it stays.
        causal_first: of MLM, the share of its steps, at the start, in which each token is told from those before it
            (arXiv 2605.12438).
        causal_mixed: of MLM, the share of such steps among all others (GPT-BERT, arXiv 2410.24159, mixes both).
        muon: of MLM, torch's Muon trains the matrices of the layers at so many times the rate of AdamW, which trains
            the rest; 0: AdamW trains all.
        segment_length: documents are cut into segments of at most so many tokens, each encoded by itself.
        permute_segments: of T-JEPA, each segment's label is that of another hidden one of its document (a control).
        static_labels: of T-JEPA, labels are the first encoder's embeddings of the hidden tokens (a control).
        jepa_weight: weight of the T-JEPA loss beside the optional terms; 0 for the control.
        encoder: which of T-JEPA's encoders is judged, `"target"` or `"context"`.
        start: the MLM recipe from whose last weights this one goes on.
        seconds: CPU seconds of training, in place of --seconds.
        config: the rest that `TJEPAConfig` takes.
        training: the rest that `PretrainingArguments` takes.
    """

    objective: Literal["tjepa", "mlm"] = "tjepa"
    masking: str | list[dict] = "single_tokens"
    views_per_document: int | None = None
    mask_ratio: float = 0.15
    random_ratio: float = 0.1
    final_mask_ratio: float | None = None
    causal_first: float = 0.0
    causal_mixed: float = 0.0
    muon: float = 0.0
    segment_length: int | None = None
    permute_segments: bool = False
    static_labels: bool = False
    jepa_weight: float = 1.0
    encoder: Literal["target", "context"] = "target"
    start: str | None = None
    seconds: float | None = None
    config: dict = field(default_factory=dict)
    training: dict = field(default_factory=dict)

    @classmethod
    def from_dict(cls, name: str, values: dict) -> "Recipe":
        """From a flat mapping, whose keys say by their names where they belong."""
        own = {f.name for f in fields(cls)} - {"config", "training"}
        config = set(TJEPAConfig().to_dict())
        training = {f.name for f in fields(PretrainingArguments)} - {"output_dir", "use_cpu", "seed"}
        if unknown := sorted(set(values) - own - config - training):
            raise ValueError(
                f"Recipe {name} has the unknown keys {unknown}: a key is one of {sorted(own)}, of TJEPAConfig or of "
                "PretrainingArguments."
            )
        recipe = cls(
            **{key: value for key, value in values.items() if key in own},
            config={key: value for key, value in values.items() if key in config - own},
            training={key: value for key, value in values.items() if key in training - own - config},
        )
        if recipe.objective not in ("tjepa", "mlm") or recipe.encoder not in ("target", "context"):
            raise ValueError(
                f"Recipe {name}: objective must be tjepa or mlm, and encoder target or context, got "
                f"{recipe.objective!r} and {recipe.encoder!r}."
            )
        return recipe


def load_recipes(path: Path, variants: list[str], only: list[str] | None) -> dict[str, dict]:
    """
    Flat mappings by name, the file's defaults filled in, variants such as `name=base,key=value` added. The first is
    the untrained encoder: the defaults alone.
    """
    recipes = yaml.safe_load(path.read_text(encoding="utf-8"))
    defaults = recipes.pop("defaults", {})
    recipes = {UNTRAINED: defaults, **{name: {**defaults, **values} for name, values in recipes.items()}}
    for variant in variants:
        pairs = [pair.partition("=") for pair in variant.split(",")]
        name, _, base = pairs[0]
        if base not in recipes or not all(separator for _, separator, _ in pairs):
            raise ValueError(f"--variant is NAME=BASE,key=value with a BASE of {sorted(recipes)}, got {variant!r}.")
        recipes[name] = {**recipes[base], **parse_config_overrides(variant.partition(",")[2])}
    if unknown := sorted(set(only or []) - set(recipes)):
        raise ValueError(f"--only: there is no recipe {unknown}, only {sorted(recipes)}.")
    return {name: recipes[name] for name in (recipes if only is None else [UNTRAINED, *only])}


# --- Objectives: a model, the loss of a batch, what follows a step, and the encoder to judge -------------------------


class TJEPA:
    def __init__(self, recipe: Recipe, config: TJEPAConfig, args: PretrainingArguments, tokenizer):
        if isinstance(recipe.masking, list):
            strategies = [MaskingStrategy.from_dict(strategy) for strategy in recipe.masking]
        else:
            strategies = load_masking_strategies(recipe.masking)
        options = {"views_per_document": recipe.views_per_document}
        if recipe.segment_length is None:
            self.collator = DataCollatorForTJEPA(strategies, args.seed, **options)
        else:
            self.collator = SegmentCollator(strategies, args.seed, segment_length=recipe.segment_length, **options)
        self.collator.fit_to(config)
        self.model = TJEPAForPreTraining(config).train()
        self.recipe = recipe
        self.ema = args.create_ema()
        self.encoder = getattr(self.model, f"{recipe.encoder}_encoder")

    def start_from(self, start: TJEPAForMaskedLM) -> None:
        self.model.context_encoder.load_state_dict(start.encoder.state_dict())
        self.model.update_target_encoder(0.0)
        self.model.token_head.load_state_dict(start.token_head.state_dict())
        if self.recipe.static_labels:
            self.model.target_encoder = StaticEncoder(start.encoder.token_embedding)

    def loss(self, examples: list[dict]) -> torch.Tensor:
        batch = self.collator(examples)
        if self.recipe.permute_segments:
            permute_labels(batch["segments"])
        output = self.model(**send_to_device(batch, self.model.device))
        return output.loss + (self.recipe.jepa_weight - 1.0) * output.jepa_loss

    def after_step(self, step: int, num_steps: int) -> None:
        if not self.recipe.static_labels:
            self.model.update_target_encoder(self.ema.at(step, num_steps))

    def save(self, folder: Path) -> None:
        if self.recipe.static_labels:  # what the folder says of a target encoder must be one
            self.model.target_encoder = copy.deepcopy(self.model.context_encoder)
        self.model.save_pretrained(folder)


class StaticEncoder(torch.nn.Module):
    """In the target encoder's place: what a token is labelled with does not depend on its text."""

    def __init__(self, embedding: torch.nn.Embedding):
        super().__init__()
        self.embedding = embedding.requires_grad_(False)

    def forward(self, input_ids: torch.Tensor, **kwargs) -> tuple[torch.Tensor]:
        return (self.embedding(input_ids),)


def permute_labels(segments: dict) -> None:
    """The labels of a document's hidden segments change places, each to the next and the last to the first."""
    views = segments["prediction_view_ids"].flatten()[segments["slot_indices"]]  # slots of a view are neighbours
    is_last = views.diff(append=views.new_tensor([-1])) != 0
    first = torch.cat([torch.zeros(1, dtype=torch.bool), is_last[:-1]]).nonzero()[:, 0]
    first = torch.cat([first.new_zeros(1), first]) if len(views) else first
    following = torch.arange(1, len(views) + 1)
    following[is_last] = first
    segments["label_indices"] = segments["label_indices"][following]


class CausalViews(PackedViews):
    """Packed texts in which a token sees itself and those before it."""

    def masks(self, window: int | None) -> list[torch.Tensor]:
        return [torch.ones(length, length, dtype=torch.bool).tril() for _, length, _ in self.groups]


class MLM:
    def __init__(self, recipe: Recipe, config: TJEPAConfig, args: PretrainingArguments, tokenizer):
        ratios = {"mlm_probability": recipe.mask_ratio, "random_replace_prob": recipe.random_ratio}
        self.collator = DataCollatorForLanguageModeling(tokenizer, **ratios)
        self.recipe = recipe
        self.model = TJEPAForMaskedLM(config).train()
        self.encoder = self.model.encoder
        self.is_causal = recipe.causal_first > 0.0

    def start_from(self, start: TJEPAForMaskedLM) -> None:
        self.model.load_state_dict(start.state_dict())

    def loss(self, examples: list[dict]) -> torch.Tensor:
        documents = [example["input_ids"] for example in examples]
        if self.recipe.segment_length is not None:
            documents, _ = cut_into_segments(documents, self.recipe.segment_length)
        documents = sorted(documents, key=len)  # equal shapes side by side
        lengths = np.array([len(document) for document in documents])
        input_ids = torch.from_numpy(np.concatenate(documents)).long()
        ends = np.cumsum(lengths) - 1
        if self.is_causal:
            labels = input_ids.roll(-1)
            labels[ends] = -100
        else:
            input_ids, labels = self.collator.torch_mask_tokens(input_ids, torch.zeros_like(input_ids))
        positions = torch.from_numpy(ragged_arange(lengths))
        views = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))
        inputs = send_to_device((input_ids, positions, views, labels), self.model.device)
        input_ids, positions, views, labels = inputs
        with mock.patch.object(tjepa.layers_tjepa, "PackedViews", CausalViews if self.is_causal else PackedViews):
            states = self.model.encoder(
                input_ids[None], position_ids=positions[None], view_ids=views[None]
            ).last_hidden_state[0]
        is_masked = labels >= 0
        return self.model.token_head(states[is_masked], self.model.decoder.weight, labels[is_masked]).mean()

    def after_step(self, step: int, num_steps: int) -> None:
        first, last = self.recipe.mask_ratio, self.recipe.final_mask_ratio
        if last is not None:
            self.collator.mlm_probability = first + (last - first) * (step + 1) / num_steps
        following, mixed = step + 1, self.recipe.causal_mixed
        is_mixed_in = int((following + 1) * mixed) > int(following * mixed)
        self.is_causal = following / num_steps < self.recipe.causal_first or is_mixed_in

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)


OBJECTIVES = {"tjepa": TJEPA, "mlm": MLM}


# --- Training --------------------------------------------------------------------------------------------------------


def draw_batches(documents: list[np.ndarray], batch_size: int, seed: int) -> Iterator[list[dict]]:
    """Endless; the same for all recipes of a seed. A rest that makes no full batch waits for the next shuffle."""
    if len(documents) < batch_size:
        raise ValueError(f"A batch has {batch_size} documents, but there are only {len(documents)}.")
    for epoch in itertools.count():
        order = np.random.default_rng([seed, epoch]).permutation(len(documents))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            indices = order[start : start + batch_size]
            yield [{"input_ids": documents[i], "document_index": int(i), "epoch": epoch} for i in indices]


def create_optimizer(model: torch.nn.Module, args: PretrainingArguments) -> torch.optim.Optimizer:
    """With the groups of `TJEPATrainer`: weight decay for matrices only."""
    optimizer_class, optimizer_kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices, others = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return optimizer_class(groups, **optimizer_kwargs)


def split_off_muon(
    optimizer: torch.optim.Optimizer, layers: torch.nn.Module, times_rate: float, args: PretrainingArguments
) -> torch.optim.Muon:
    """Takes the matrices of the layers out of AdamW's first group; at once its rate steps are of like size."""
    matrices = [parameter for parameter in layers.parameters() if parameter.ndim == 2]
    taken, group = set(map(id, matrices)), optimizer.param_groups[0]
    group["params"] = [parameter for parameter in group["params"] if id(parameter) not in taken]
    return torch.optim.Muon(
        matrices, times_rate * args.learning_rate, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"
    )


@dataclass
class Training:
    """A run from its first step; iterating makes one step after the other and yields what it took."""

    recipe: Recipe
    documents: list[np.ndarray]
    tokenizer: object
    seed: int
    num_steps: int
    start: Path | None = None

    def __post_init__(self):
        self.args = PretrainingArguments(output_dir="unused", use_cpu=True, seed=self.seed, **self.recipe.training)
        set_seed(self.seed)
        config = TJEPAConfig(
            vocab_size=len(self.tokenizer),
            max_position_embeddings=max(map(len, self.documents)),
            mask_token_id=self.tokenizer.mask_token_id,
            **self.recipe.config,
        )
        is_causal = self.recipe.causal_first > 0.0 or self.recipe.causal_mixed > 0.0  # which is a mask
        if torch.cuda.is_available() and self.args.bf16 and not is_causal:
            config._attn_implementation = VARLEN_ATTENTION
        self.objective = OBJECTIVES[self.recipe.objective](self.recipe, config, self.args, self.tokenizer)
        self.objective.model.to("cuda" if torch.cuda.is_available() else "cpu")
        if self.start is not None:
            self.objective.start_from(TJEPAForMaskedLM.from_pretrained(self.start))

    def __iter__(self) -> Iterator[dict[str, float]]:
        """CPU seconds, document tokens and loss of each step."""
        args, model = self.args, self.objective.model
        optimizers = [create_optimizer(model, args)]
        if self.recipe.muon:
            optimizers.insert(0, split_off_muon(optimizers[0], model.encoder.layers, self.recipe.muon, args))
        warmup_steps = args.get_warmup_steps(self.num_steps)
        schedule = (self.num_steps, warmup_steps, args.start_lr, args.final_lr, args.schedule_stretch)
        schedulers = [WarmupThenDecay(optimizer, *schedule) for optimizer in optimizers]
        weight_decay = WeightDecayCallback(args.weight_decay, args.final_weight_decay, args.schedule_stretch)
        batches = draw_batches(self.documents, args.per_device_train_batch_size, self.seed)
        for step, examples in zip(range(self.num_steps), batches, strict=False):
            start = time.process_time()
            for optimizer in optimizers:
                optimizer.param_groups[0]["weight_decay"] = weight_decay.at(step, self.num_steps)
            with torch.autocast(model.device.type, torch.bfloat16, enabled=args.bf16):
                loss = self.objective.loss(examples)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
                optimizer.step()
                scheduler.step()
            self.objective.after_step(step, self.num_steps)
            model.zero_grad()
            seconds = time.process_time() - start
            yield {"seconds": seconds, "tokens": sum(len(e["input_ids"]) for e in examples), "loss": loss.item()}


def train_and_judge(
    recipe: Recipe, seed: int, documents, tokenizer, tasks, args, weights: Path
) -> list[dict[str, float]]:
    """
    The checkpoints: step, CPU seconds and document tokens so far, the mean loss since the last, and the figures. The
    last weights are saved in the folder `weights`, for others to start from and to be judged on more tasks.
    """
    start = None if recipe.start is None else args.output_dir / f"{recipe.start}-seed{seed}"
    if start is not None and not start.is_dir():
        raise FileNotFoundError(f"{start} is not there: run the recipe {recipe.start} with this seed first.")
    timed = list(Training(recipe, documents, tokenizer, seed, NUM_TIMED_STEPS, start))[NUM_WARMUP_STEPS:]
    budget, unit = (recipe.seconds or args.seconds, "seconds") if args.seconds else (args.tokens, "tokens")
    num_steps = max(1, round(budget / statistics.mean(step[unit] for step in timed)))
    training = Training(recipe, documents, tokenizer, seed, num_steps, start)
    marks = {round(num_steps * (part + 1) / args.num_checkpoints) for part in range(args.num_checkpoints)}
    checkpoints, seconds, tokens, losses = [], 0.0, 0, []
    for step, taken in enumerate(training, start=1):
        seconds, tokens = seconds + taken["seconds"], tokens + taken["tokens"]
        losses.append(taken["loss"])
        if step in marks:
            figures = judge(training.objective, tokenizer, tasks, max(map(len, documents)))
            mean_loss = statistics.mean(losses)
            checkpoints.append({"step": step, "seconds": seconds, "tokens": tokens, "loss": mean_loss, **figures})
            losses = []
    training.objective.save(weights)
    return checkpoints


# --- Judging ---------------------------------------------------------------------------------------------------------


def judge(objective: TJEPA | MLM, tokenizer, tasks: list[ProbeTask], max_length: int) -> dict[str, float]:
    """
    The figures of `probe_tasks`, the centred RankMe of the texts' vectors over their width, and the score. Minimal
    pairs are judged with the whole model, and left out where it has not learned to predict tokens.
    """
    figures, sums = {}, None
    for task in tasks:
        is_of_tokens = task.kind == "minimal pairs"
        if is_of_tokens and why_it_cannot_score(objective.model, tokenizer):
            continue
        embedded = embed_task(objective.model if is_of_tokens else objective.encoder, tokenizer, task, max_length)
        figures.update(probe_embedded_task(task, embedded, seeds=[0]))
        if task.kind not in ("tagging", "minimal pairs"):
            of_task = moment_sums(embedded["test"].features)
            sums = of_task if sums is None else sums + of_task
    rank = {} if sums is None else {"rank": rank_share(sums)}
    return {**figures, **rank, "score": score(figures, tasks)}


def score(figures: dict[str, float], tasks: list[ProbeTask]) -> float:
    """The mean, over the tasks that have it, of the measure that counts (`SCORED_MEASURES`); NaN without any."""
    measures = [measure for task in tasks if (measure := scored_measure(figures, task)) is not None]
    return statistics.mean(figures[measure] for measure in measures) if measures else float("nan")


def scored_measure(figures: dict[str, float], task: ProbeTask) -> str | None:
    names = [f"{task.name}/{measure}" for measure in SCORED_MEASURES[task.kind]]
    return next((name for name in names if name in figures), None)


def for_validation(task: ProbeTask) -> ProbeTask:
    """
    A task whose test part is a fifth of the training part (rows that answer each other stay together); where there is
    none, a third of the test part.
    """
    if "train" not in task.splits:
        return part_of_test(task, for_validation=True)
    columns, groups = task.splits["train"], np.array(groups_of_rows(task, "train"))
    order = np.random.default_rng(0).permutation(groups.max() + 1)
    is_test = np.isin(groups, order[: len(order) // 5])
    splits = {
        name: take_rows(columns, np.flatnonzero(rows)) for name, rows in (("test", is_test), ("train", ~is_test))
    }
    return ProbeTask(task.name, task.kind, {**task.splits, **splits})


def part_of_test(task: ProbeTask, for_validation: bool) -> ProbeTask:
    """Of a task that trains nothing, a random third of the rows for validation, the others for the test."""
    columns = task.splits["test"]
    order = np.random.default_rng(0).permutation(len(next(iter(columns.values()))))
    rows = order[: len(order) // 3] if for_validation else order[len(order) // 3 :]
    return ProbeTask(task.name, task.kind, {"test": take_rows(columns, rows)})


def take_rows(columns: dict[str, list], rows: np.ndarray) -> dict[str, list]:
    return {name: [values[row] for row in rows] for name, values in columns.items()}


# --- The folder of results -------------------------------------------------------------------------------------------


def format_checkpoint(checkpoint: dict[str, float]) -> str:
    accuracies = [f"{name} {100 * value:.1f}" for name, value in checkpoint.items() if name.endswith("linear_probe")]
    others = [
        f"{name} {100 * value:.1f}"
        for name, value in checkpoint.items()
        if name.rpartition("/")[2] in ("spearman", "spearman_whitened", "mrr", "direction", "accuracy")
    ]
    spent = f"{checkpoint['seconds']:.0f} s, {checkpoint['tokens'] / 1e6:.2f} M tokens, " if checkpoint["step"] else ""
    rank = f", rank {checkpoint['rank']:.2f}" if "rank" in checkpoint else ""
    return f"score {100 * checkpoint['score']:.1f} ({spent}{', '.join(accuracies + others)}{rank})"


def plot(runs: dict[str, list[list[dict]]], tasks: list[ProbeTask], path: Path) -> None:
    """Mean over seeds and the range of seeds, against CPU time above and document tokens below."""

    def kind_mean(kind: str):
        of_kind = [task for task in tasks if task.kind == kind]
        return lambda checkpoint: score(checkpoint, of_kind) if of_kind else None

    panels = {
        "score (mean of the tasks)": lambda checkpoint: checkpoint["score"],
        "classification probes": kind_mean("classification"),
        "similarity (Spearman)": kind_mean("similarity"),
        "tagging probe": kind_mean("tagging"),
        "RankMe / width": lambda checkpoint: checkpoint.get("rank"),
        "loss (own objective)": lambda checkpoint: checkpoint.get("loss"),
    }
    figure = new_figure(3.2 * len(panels), 6)
    axes = figure.subplots(2, len(panels), squeeze=False)
    baselines = {UNTRAINED: ":", TFIDF: "--"}
    for row, (unit, scale, label) in enumerate((("seconds", 1, "CPU seconds"), ("tokens", 1e6, "million tokens"))):
        for axis, (title, value_of) in zip(axes[row], panels.items(), strict=True):
            for name, of_seeds in runs.items():
                values = np.array([[value_of(c) for c in checkpoints] for checkpoints in of_seeds], dtype=float)
                if np.isnan(values).all():
                    continue
                if name in baselines:
                    axis.axhline(values.mean(), color="black", linestyle=baselines[name], linewidth=1, label=name)
                    continue
                x = np.mean([[c[unit] / scale for c in checkpoints] for checkpoints in of_seeds], axis=0)
                (line,) = axis.plot(x, values.mean(axis=0), "o-", markersize=3, label=name)
                axis.fill_between(x, values.min(axis=0), values.max(axis=0), color=line.get_color(), alpha=0.15)
            axis.set_title(title, fontsize="medium")
            axis.set_xlabel(label)
    axes[0][0].legend(fontsize="small")
    save_figure(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dataset_name", required=True, help="folder written by tjepa prepare")
    parser.add_argument("--data_dir", required=True, help="data sets to judge with, as for tjepa probe")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--recipes", type=Path, default=Path(__file__).with_name("learning_recipes.yaml"))
    parser.add_argument("--only", nargs="+", help="names of recipes; default: all of the file")
    parser.add_argument("--variant", action="append", default=[], help='one more recipe: "NAME=BASE,key=value,..."')
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--seconds", type=float, help="CPU seconds of training per run")
    budget.add_argument("--tokens", type=float, help="document tokens of training per run")
    parser.add_argument("--num_checkpoints", type=int, default=4, help="how often a run is judged, evenly spread")
    parser.add_argument("--judge_on", choices=("validation", "test"), default="validation")
    parser.add_argument(
        "--tasks", nargs="+", help="which of them; default: all. Tagging: NAME.COLUMN where it has several"
    )
    parser.add_argument("--max_samples", type=int, default=10_000, help="texts of a split that are used")
    parser.add_argument("--max_words", type=int, default=10_000, help="the same for tagging, in words")
    args = parser.parse_args()
    torch.set_num_threads(1)
    only = None if args.only is None else [*args.only, *(variant.split("=")[0] for variant in args.variant)]
    recipes = load_recipes(args.recipes, args.variant, only)

    dataset = load_documents(DataArguments(dataset_name=args.dataset_name))["train"]
    if "input_ids" not in dataset.column_names:
        parser.error(f"{args.dataset_name} is not tokenized: make it with tjepa prepare")
    documents = dataset.with_format("numpy")["input_ids"]
    documents = list(documents[:])
    tokenizer = AutoTokenizer.from_pretrained(args.dataset_name)
    tasks = load_tasks(None, args.data_dir, args.max_samples, args.max_words)
    if unknown := sorted(set(args.tasks or []) - {task.name for task in tasks}):
        parser.error(f"--tasks: {args.data_dir} has no {unknown}, only {[task.name for task in tasks]}")
    tasks = [task for task in tasks if args.tasks is None or task.name in args.tasks]
    if args.judge_on == "validation":
        tasks = [for_validation(task) for task in tasks]
    else:
        tasks = [t if "train" in t.splits else part_of_test(t, for_validation=False) for t in tasks]

    args.output_dir.mkdir(parents=True, exist_ok=True)
    judging = {
        name: str(getattr(args, name)) for name in ("data_dir", "tasks", "judge_on", "max_samples", "max_words")
    }
    spent = {name: getattr(args, name) for name in ("dataset_name", "seconds", "tokens", "num_checkpoints")}
    nothing = {"step": 0, "seconds": 0.0, "tokens": 0}

    def finished_checkpoints(name: str, settings: dict, run) -> list[dict]:
        path = args.output_dir / f"{name}.json"
        is_new = not path.is_file()
        checkpoints = finished_or_run(path, settings, lambda: {"checkpoints": run()})["checkpoints"]
        if is_new:
            print(f"{name:<40} {format_checkpoint(checkpoints[-1])}", flush=True)
        return checkpoints

    def tfidf() -> list[dict]:
        figures = probe_tasks_with_tfidf(tasks, seeds=[0])
        return [{**nothing, **figures, "score": score(figures, tasks)}]

    runs = {TFIDF: [finished_checkpoints("tf-idf", judging, tfidf)]}
    for seed in args.seeds:
        for name, values in recipes.items():
            recipe = Recipe.from_dict(name, values)
            settings = {**judging, "recipe": values, "seed": seed, **({} if name == UNTRAINED else spent)}

            def run(name=name, recipe=recipe, seed=seed) -> list[dict]:
                if name == UNTRAINED:
                    objective = Training(recipe, documents, tokenizer, seed, num_steps=1).objective
                    return [{**nothing, **judge(objective, tokenizer, tasks, max(map(len, documents)))}]
                weights = args.output_dir / f"{name}-seed{seed}"
                return train_and_judge(recipe, seed, documents, tokenizer, tasks, args, weights)

            runs.setdefault(name, []).append(finished_checkpoints(f"{name}-seed{seed}", settings, run))

    (args.output_dir / "result.json").write_text(json.dumps({"recipes": recipes, "runs": runs}, indent=2) + "\n")
    if find_spec("matplotlib"):  # machines with a GPU may lack it
        plot(runs, tasks, args.output_dir / "learning_curve.png")
    print("\nLast checkpoints, mean over seeds ± their standard deviation")
    for name, of_seeds in runs.items():
        scores = [100 * checkpoints[-1]["score"] for checkpoints in of_seeds]
        spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
        print(f"  {name:<30} score {statistics.mean(scores):.1f}{spread}")


if __name__ == "__main__":
    main()
