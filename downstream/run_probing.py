"""Judges frozen encoders, any of transformers', beside baselines: untrained, the embedding layer alone, and TF-IDF.

    tjepa probe --model_name_or_path runs/quickstart bert-base-uncased --data_dir eval \
        --output probing.json --plot probing.png
    tjepa probe --model_name_or_path runs/quickstart --dataset mine=train.csv,test.csv
    tjepa probe --model_name_or_path runs/quickstart --mteb STSBenchmark mine.py

Every encoder embeds every data set once. The protocol (mean pooling, whitening, logistic regression whose strength is
chosen on a validation part) is in probe.py, and the same for every column of the table. What a data set is for is
seen from its columns: text and label; sentence1, sentence2 and score or label; sentences and label; title and
segments; paradigm, good and bad; tokens and one that ends in _tags.
"""

import itertools
import json
import logging
import math
import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import evaluate
import torch
from datasets import Dataset
from transformers import AutoModelForMaskedLM, AutoModelForPreTraining, PreTrainedConfig, PreTrainedModel
from transformers.hf_argparser import HfArg

from ..corpus.arguments import parse_arguments
from ..corpus.atomic_writes import check_writable
from ..corpus.command_line import first_line, start
from ..corpus.faults import find_fault
from ..corpus.files import CODECS, has_columns, load_table
from ..corpus.tokenizers import HubArguments, load_tokenizer, text_reader
from ..encoders_tjepa import encoder_class
from ..training.loading import load_config, load_encoder
from ..training.setup import default_device, hide_what_loading_says
from .embedding import MAX_DEFAULT_LENGTH, choose_max_length, encode_texts, reads_special_tokens
from .labels import IGNORED, class_name, flatten, has_fractions, is_finite_number, read_labels
from .mteb_tasks import load_mteb_tasks, run_mteb
from .probe import EmbeddingLayer, ProbeTask, embed_task, mean_and_std, probe_embedded_task, probe_tasks_with_tfidf
from .sentence_scores import why_it_cannot_score
from .structure_tasks import MINIMAL_PAIRS, PAIR_ORDER, POSITION, RETRIEVAL, mrr_of_a_guess


logger = logging.getLogger(__name__)


SPLITS = ("train", "validation", "test")
TFIDF = "TF-IDF"
QUALITY_METRIC = Path(__file__).parent / "metrics" / "representation_quality"
MAX_QUALITY_TEXTS = 4096  # uniformity takes all pairs
NEEDED_COLUMNS = {  # of each kind of task, but for tagging, and which of them is the answer; the first that fits
    "similarity": (("sentence1", "sentence2"), "score"),
    "classification": (("text",), "label"),
    PAIR_ORDER: (("sentence1", "sentence2"), "label"),
    POSITION: (("sentences",), "label"),
    RETRIEVAL: (("title", "segments"), None),
    MINIMAL_PAIRS: (("paradigm", "good", "bad"), None),
}
TRAINED = ("classification", "tagging", PAIR_ORDER, POSITION)


@dataclass(kw_only=True)
class ProbingArguments(HubArguments):
    """The arguments of `run_probing.py`."""

    model_name_or_path: list[str] = HfArg(help="Folders or Hub names of encoders, one or several.")
    data_dir: str | None = HfArg(
        default=None, help="A folder with NAME-train.jsonl, NAME-test.jsonl, ... (json, jsonl, csv or parquet)."
    )
    dataset: list[str] | None = HfArg(
        default=None,
        help="NAME=TRAIN,TEST or NAME=TRAIN,VALIDATION,TEST (files), NAME=TEST where nothing is trained, or "
        "NAME for one of --data_dir. Several may be given. Default: all of --data_dir.",
    )
    mteb: list[str] | None = HfArg(
        default=None,
        help="Tasks of the package mteb, by their names, or Python files that define some as mteb documents it; "
        "beside the data sets above, or without any.",
    )
    mteb_output: str = HfArg(default="runs/mteb", help="Folder for the JSON files of mteb.")
    encoder: Literal["target", "context"] = HfArg(
        default="target", help="Which encoder of T-JEPA pretraining folders; others have only one."
    )
    max_length: int | None = HfArg(
        default=None,
        help=f"Tokens of a text that are read. Default: what the model is made for, at most {MAX_DEFAULT_LENGTH}.",
    )
    add_special_tokens: bool | None = HfArg(
        default=None,
        help="Whether the tokenizer adds [CLS] and the like. Default: not for T-JEPA itself, yes for others.",
    )
    batch_size: int = HfArg(default=64, help="Texts per forward.")
    num_seeds: int = HfArg(default=3, help="Probes, each with another tenth held out, and untrained encoders.")
    seed: int = HfArg(default=0, help="The first seed.")
    max_samples: int = HfArg(default=10_000, help="Rows of a split that are used, drawn with the first seed.")
    max_words: int = HfArg(default=10_000, help="The same for tagging, in words (whole sentences, so a few more).")
    output: str | None = HfArg(default=None, help="JSON file for the figures.")
    plot: str | None = HfArg(default=None, help="PNG file for a bar chart, without k-NN and quality.")

    def __post_init__(self):
        for name in ("max_length", "batch_size", "num_seeds", "max_samples", "max_words"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.mteb and (self.encoder != "target" or self.add_special_tokens is not None):
            raise ValueError(
                "--mteb judges the vectors that `tjepa embed` makes: leave out --encoder and --add_special_tokens."
            )
        if self.mteb and not (self.dataset or self.data_dir) and (self.output or self.plot):
            raise ValueError(
                "--output and --plot are for the data sets of --dataset and --data_dir; mteb's JSON files go to "
                "--mteb_output. Leave them out, or name data sets, too."
            )
        if self.plot is not None and Path(self.plot).suffix.lower() != ".png":
            raise ValueError(f"--plot {self.plot} is to be a PNG file: give it a name that ends in .png.")


def main():
    (args,) = parse_arguments(ProbingArguments, description=__doc__)
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    hide_what_loading_says()
    seeds = range(args.seed, args.seed + args.num_seeds)
    for name in args.model_name_or_path:  # a mistyped one costs a second, not the time of all before it
        load_config(name, **args.for_hub())
    columns = short_names(args.model_name_or_path)
    for flag, path in {"--output": args.output, "--plot": args.plot}.items():
        if path is not None:
            check_writable(Path(path).parent, flag)
            Path(path).parent.mkdir(parents=True, exist_ok=True)
    tasks = []
    if args.dataset or args.data_dir or not args.mteb:
        tasks = load_tasks(args.dataset, args.data_dir, args.max_samples, args.max_words, args.seed)
    if args.mteb:
        check_writable(Path(args.mteb_output), "--mteb_output")
        mteb_tasks = load_mteb_tasks(args.mteb)
        options = {"max_length": args.max_length, "batch_size": args.batch_size, **args.for_hub()}
        scores = {
            column: run_mteb(name, column, mteb_tasks, args.mteb_output, **options)
            for name, column in zip(args.model_name_or_path, columns, strict=True)
        }
        print(f"\n{format_table(scores)}\n\nmteb's JSON files: {args.mteb_output}\n")
        if not tasks:
            return

    logger.info(f"{TFIDF} and logistic regression")  # first: what is wrong with a data set shows in seconds
    of_words = probe_tasks_with_tfidf(tasks, seeds)
    results = {}
    for name, column in zip(args.model_name_or_path, columns, strict=True):
        results.update(probe_model(name, column, tasks, args, seeds))
    results[TFIDF] = of_words

    print(f"\n{format_table(results)}\n")
    if args.output:
        sizes = {task.name: {split: count_rows(task, split) for split in task.splits} for task in tasks}
        arguments = {name: value for name, value in asdict(args).items() if name != "token"}
        content = {"arguments": arguments, "rows": sizes, "results": results}
        Path(args.output).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if args.plot:
        plot(results, args.plot)


# --- Data sets -------------------------------------------------------------------------------------------------------


def load_tasks(
    names: Sequence[str] | None,
    data_dir: str | None,
    max_samples: int = 10_000,
    max_words: int = 10_000,
    seed: int = 0,
) -> list[ProbeTask]:
    """
    Reads data sets from files and says what was read, what for, and what was left out and why.

    Args:
        names: as `--dataset`; `None`: every data set of `data_dir`.
        data_dir: as `--data_dir`.
        max_samples, max_words: how much of a split is used, drawn with `seed`.

    Raises:
        FileNotFoundError: a file, or a data set of `data_dir`, does not exist.
        ValueError: no data was named, or a data set cannot be used; the message says why.
    """
    in_folder = find_files(data_dir) if data_dir else {}
    if not names and not in_folder:
        where = f"{data_dir} has no files such as NAME-train.jsonl" if data_dir else "No data was named"
        raise ValueError(f"{where}: pass --data_dir FOLDER, or --dataset NAME=train.jsonl,test.jsonl.")
    tasks = []
    if len({name.partition("=")[0] for name in names or ()}) < len(names or ()):
        raise ValueError(f"--dataset {' '.join(names)}: two have one name. Give each data set a name of its own.")
    for name in names or sorted(in_folder):
        name, _, paths = name.partition("=")
        if paths:
            paths = [Path(path) for path in paths.split(",")]
            splits = {1: SPLITS[2:], 2: (SPLITS[0], SPLITS[2]), 3: SPLITS}.get(len(paths))
            if splits is None:
                raise ValueError(
                    f"--dataset {name} has {len(paths)} files: TEST, TRAIN,TEST or TRAIN,VALIDATION,TEST."
                )
            files = dict(zip(splits, paths, strict=True))
        elif name in in_folder:
            files = in_folder[name]
        else:
            raise FileNotFoundError(
                f"--dataset {name}: no such data set in --data_dir {data_dir}, which has {sorted(in_folder)}. "
                "Files are given with a name for them: --dataset mine=train.jsonl,test.jsonl."
            )
        if len({Path(path).resolve() for path in files.values()}) < len(files):
            raise ValueError(f"--dataset {name}: two splits are the same file, which would be judged by itself.")
        tasks += make_tasks(name, {split: load_table("--dataset", path) for split, path in files.items()})
    return [limit_task(task, max_samples, max_words, seed) for task in tasks]


def find_files(folder: str) -> dict[str, dict[str, Path]]:
    """
    The data sets of a folder: name -> split -> file, from file names such as sst2-train.jsonl.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if a split is there in two formats.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"--data_dir {folder} is not a folder.")
    files = {}
    for path in sorted(Path(folder).iterdir()):
        stem = Path(path.stem).stem if path.suffix.lower() in CODECS else path.stem
        name, _, split = stem.rpartition("-")
        if name and split in SPLITS and has_columns(path) and not path.name.startswith("."):
            if other := files.setdefault(name, {}).get(split):
                raise ValueError(f"--data_dir {folder} has {name}-{split} twice: {other.name} and {path.name}.")
            files[name][split] = path
    return files


def make_tasks(name: str, splits: dict[str, Dataset]) -> list[ProbeTask]:
    """One task, or for tagging one per column of tags; says which kind was seen and what was dropped."""
    columns = set.intersection(*(set(dataset.column_names) for dataset in splits.values()))
    for kind, (inputs, answer) in NEEDED_COLUMNS.items():
        if {*inputs, answer} - {None} <= columns:
            if kind == MINIMAL_PAIRS and "balanced" in columns:
                splits = {split: only_balanced(name, dataset) for split, dataset in splits.items()}
            return [make_task(name, kind, splits, inputs, answer)]
    tag_columns = sorted(column for column in columns if column.endswith("_tags"))
    if "tokens" in columns and tag_columns:
        names = [name if len(tag_columns) == 1 else f"{name}.{column}" for column in tag_columns]
        return [
            make_task(task_name, "tagging", splits, ("tokens",), column)
            for task_name, column in zip(names, tag_columns, strict=True)
        ]
    kinds = [
        f"{', '.join(filter(None, (*inputs, answer)))} ({kind})" for kind, (inputs, answer) in NEEDED_COLUMNS.items()
    ]
    raise ValueError(
        f"What is {name} for? All its files have the columns {sorted(columns)}. Needed are {'; '.join(kinds)}; or "
        "tokens and a column that ends in _tags (tagging)."
    )


def only_balanced(name: str, dataset: Dataset) -> Dataset:
    """The rows of paradigms that frequencies of words cannot tell."""
    rows = [row for row, given in enumerate(dataset["balanced"][:]) if str(given).lower() in ("1", "1.0", "true")]
    if not rows:
        raise ValueError(f"{name}: no row has a 1 or true in the column balanced; without that column all rows count.")
    if len(rows) < len(dataset):
        logger.info(f"{name}: {len(dataset) - len(rows):,} of {len(dataset):,} rows are not balanced and do not count")
    return dataset.select(rows)


def make_task(
    name: str, kind: str, splits: dict[str, Dataset], inputs: tuple[str, ...], answer: str | None
) -> ProbeTask:
    """Drops what cannot be used, numbers the labels, and says all of it in one line."""
    if kind in TRAINED and not {"train", "test"} <= set(splits):
        raise ValueError(f"{name} is for {kind}, which needs the splits train and test; it has {sorted(splits)}.")
    if kind not in TRAINED:
        test = splits.get("test") or next(iter(splits.values()))
        statistics = {"train": splits["train"]} if kind == RETRIEVAL and "train" in splits else {}
        splits = {**statistics, "test": test}
    columns, notes = {}, []
    taken, has_classes = tuple(filter(None, (*inputs, answer))), kind in TRAINED
    for split, dataset in splits.items():
        values = [
            read_labels(dataset, column) if has_classes and column == answer else dataset[column][:]
            for column in taken
        ]
        rows = list(zip(*values, strict=True))
        if has_classes and kind != "tagging" and any(isinstance(row[-1], list) for row in rows):
            raise ValueError(f"{name}: {answer} of {split} holds lists; a probe takes one class for each text.")
        usable = [row for row in rows if is_usable(kind, row)]
        if not usable:
            needed = f"both text and {answer}" if answer else f"usable {' and '.join(taken)}"
            lists = [column for column in taken if column in ("sentences", "segments") or kind == "tagging"]
            what = "with one entry for each word" if kind == "tagging" else "of two texts or more"
            note = f"; {' and '.join(lists)} are lists {what}, as json, jsonl and parquet can hold" if lists else ""
            raise ValueError(f"{name}: none of the {len(rows)} rows of {split} has {needed}{note}.")
        if len(usable) < len(rows):
            what = f"text or {answer}" if answer else " or ".join(taken)
            notes.append(f"{len(rows) - len(usable):,} rows of {split} dropped ({what} missing or invalid)")
        columns[split] = dict(zip(taken, map(list, zip(*usable, strict=True)), strict=True))

    number = ""
    if kind == "similarity":
        for content in columns.values():
            content[answer] = [float(score) for score in content[answer]]
            if len(set(content[answer])) < 2:
                raise ValueError(f"{name}: {answer} is the same in all rows, so that nothing correlates with it.")
    elif kind in TRAINED:
        labels = {split: set(flatten(c[answer])) - {IGNORED} for split, c in columns.items()}
        classes = {split: set(map(class_name, of_split)) for split, of_split in labels.items()}
        names = sorted(set.union(*classes.values()))
        if has_fractions(set.union(*labels.values())):
            raise ValueError(f"{name}: {answer} must hold classes, not numbers with a fraction; got {names[:5]}.")
        if len(classes["train"]) < 2:
            found = sorted(classes["train"])
            raise ValueError(f"{name}: {answer} must hold two classes or more in train; got {found}.")
        if unknown := sorted(classes["test"] - classes["train"]):
            notes.append(f"labels of test that train does not have, always wrong: {unknown}")
        ids = {label: index for index, label in enumerate(names)}
        for split, content in columns.items():
            values = content.pop(answer)
            if kind == "tagging":
                columns[split]["tags"] = [
                    [IGNORED if tag == IGNORED else ids[class_name(tag)] for tag in tags] for tags in values
                ]
            else:
                columns[split]["label"] = [ids[class_name(label)] for label in values]
        number = f", {len(names)} classes"
    task = ProbeTask(name, kind, columns)
    sizes = ", ".join(f"{split} {count_rows(task, split):,}" for split in columns)
    arrow = f" -> {answer}" if answer else ""
    logger.info("; ".join([f"{name}: {kind} ({' + '.join(inputs)}{arrow}{number}), {sizes}", *notes]))
    return task


def is_usable(kind: str, row: tuple) -> bool:
    """Whether a row has its texts and its answer."""
    if kind == RETRIEVAL:
        title, segments = row
        return title not in (None, "") and are_texts(segments)
    if kind == MINIMAL_PAIRS:
        return are_texts(list(row))
    *texts, answer = row
    has_answer = is_finite_number(answer) if kind == "similarity" else answer is not None  # a csv file holds text
    if kind == "tagging":
        (words,) = texts
        if not (isinstance(words, list) and isinstance(answer, list) and len(words) == len(answer)):
            return False
        has_answer = None not in answer and bool({*answer} - {IGNORED})
        return has_answer and all(isinstance(word, str) for word in words)
    if kind == POSITION:
        return has_answer and are_texts(texts[0])
    return has_answer and all(find_fault(text) is None for text in texts)


def are_texts(texts: Any) -> bool:
    """Whether these are two texts or more."""
    return isinstance(texts, list) and len(texts) >= 2 and all(find_fault(text) is None for text in texts)


def count_rows(task: ProbeTask, split: str) -> int:
    return len(next(iter(task.splits[split].values())))


def limit_task(task: ProbeTask, max_samples: int, max_words: int, seed: int) -> ProbeTask:
    """A random part of every split that is larger than the limit; of tagging as many sentences as make `max_words`."""
    for split, columns in task.splits.items():
        num_rows = count_rows(task, split)
        order = random.Random(seed).sample(range(num_rows), num_rows)
        if task.kind == "tagging":
            ends = itertools.accumulate(len(columns["tokens"][row]) for row in order)
            order = order[: 1 + sum(end < max_words for end in ends)]
        else:
            order = order[:max_samples]
        if len(order) < num_rows:
            logger.info(f"{task.name}: {len(order):,} of the {num_rows:,} rows of {split} are used")
            task.splits[split] = {name: [values[row] for row in sorted(order)] for name, values in columns.items()}
    if task.kind == RETRIEVAL:
        titles, segments = task.splits["test"]["title"], task.splits["test"]["segments"]
        logger.info(
            f"{task.name}: {sum(map(len, segments)):,} segments of {len(set(titles)):,} titles in test, where a guess "
            f"has mrr {100 * mrr_of_a_guess(titles, segments):.1f}"
        )
    return task


# --- Encoders --------------------------------------------------------------------------------------------------------


def probe_model(
    name: str, column: str, tasks: Sequence[ProbeTask], args: ProbingArguments, seeds: Sequence[int]
) -> dict[str, dict[str, float]]:
    """The figures of an encoder, of one untrained with its configuration for each seed, and of its embedding layer."""
    config = load_config(name, **args.for_hub())
    tokenizer = load_tokenizer(name, "--model_name_or_path", **args.for_hub())
    chosen = {"encoder": args.encoder} if config.model_type == "tjepa" else {}
    model = load_encoder(config, name, **chosen, **args.for_hub())
    adds_special_tokens = args.add_special_tokens
    if adds_special_tokens is None:
        adds_special_tokens = reads_special_tokens(config) and tokenizer.num_special_tokens_to_add() > 0
    max_length = choose_max_length(name, model, tokenizer, args.max_length)
    special_tokens = f"with{'' if adds_special_tokens else 'out'} special tokens"
    logger.info(f"{column}: the first {max_length} tokens of a text, {special_tokens}")
    report_truncation(tokenizer, tasks, max_length, adds_special_tokens)
    with_head = None
    if grammar := [task.name for task in tasks if task.kind == MINIMAL_PAIRS]:
        with_head, lack = load_with_token_head(name, config, tokenizer, args)
        if lack:
            logger.info(f"{column}: left out {', '.join(grammar)}, because {lack}")
        else:
            tasks = without_single_tokens(with_head, tokenizer, tasks, max_length, adds_special_tokens)
    options = {
        "max_length": max_length,
        "batch_size": args.batch_size,
        "add_special_tokens": adds_special_tokens,
    }
    results = {column: probe_encoder(model, tokenizer, tasks, seeds, options, with_head)}
    logger.info(f"{column}, its embedding layer alone")
    layer = probe_encoder(EmbeddingLayer(model), tokenizer, tasks, seeds, options)
    untrained = []
    for seed in seeds:
        logger.info(f"{column} untrained, seed {seed}")
        torch.manual_seed(seed)
        model = encoder_class(config).from_config(
            config, dtype=torch.float32, trust_remote_code=args.trust_remote_code
        )
        if with_head is not None:
            torch.manual_seed(seed)
            with_head = type(with_head)(config)
        untrained.append(probe_encoder(model, tokenizer, tasks, [seed], options, with_head))
    results[f"{column} untrained"] = mean_and_std(untrained)
    results[f"{column} embeddings"] = layer
    return results


def load_with_token_head(
    name: str, config: PreTrainedConfig, tokenizer, args: ProbingArguments
) -> tuple[PreTrainedModel | None, str | None]:
    """The model with its token head, for minimal pairs, or else why it has none that was trained."""
    is_pretraining = "TJEPAForPreTraining" in (config.architectures or [])
    auto_class = AutoModelForPreTraining if is_pretraining else AutoModelForMaskedLM
    try:
        model, info = auto_class.from_pretrained(name, dtype=torch.float32, output_loading_info=True, **args.for_hub())
    except ValueError as error:  # an architecture without one
        return None, f"{auto_class.__name__} cannot load it ({first_line(error)[:200]})"
    if info["missing_keys"]:
        return None, f"it has no token head: {', '.join(sorted(info['missing_keys'])[:3])} are not in its weights"
    lack = why_it_cannot_score(model, tokenizer)
    return (None, lack) if lack else (model, None)


def probe_encoder(
    model: torch.nn.Module,
    tokenizer,
    tasks: Sequence[ProbeTask],
    seeds: Sequence[int],
    options: dict,
    with_head: PreTrainedModel | None = None,
) -> dict[str, float]:
    """
    The figures of all tasks, and the quality of the same embeddings (`"quality/{measure}"`). Minimal pairs are judged
    with `with_head`, and left out without it.
    """
    device = default_device()
    results, features_of_texts = {}, []
    for task in tasks:
        judged = with_head if task.kind == MINIMAL_PAIRS else model
        if judged is None:
            continue
        embedded = embed_task(judged.to(device), tokenizer, task, **options)
        figures = probe_embedded_task(task, embedded, seeds)
        logger.info("  " + ", ".join(f"{name} {format_figure(figures, name)}" for name in measures({"": figures})))
        results.update(figures)
        if task.kind == MINIMAL_PAIRS:
            continue
        if task.kind != "tagging":
            features_of_texts.append(embedded["test"].features)
            continue
        num_words = sum(tag != IGNORED for columns in task.splits.values() for tag in flatten(columns["tags"]))
        if num_left_out := num_words - sum(len(part.labels) for part in embedded.values()):
            logger.info(f"    without {num_left_out:,} of {num_words:,} words, which have no token before the cut")
    if sum(map(len, features_of_texts)) > 1:
        features = torch.cat(features_of_texts)
        chosen = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:MAX_QUALITY_TEXTS]
        metric = evaluate.load(str(QUALITY_METRIC), keep_in_memory=True)
        quality = metric.compute(predictions=features[chosen].numpy())
        results.update({f"quality/{name}": figure for name, figure in quality.items() if figure is not None})
        results["quality/width"] = features.shape[1]
    return results


def report_truncation(tokenizer, tasks: Sequence[ProbeTask], max_length: int, add_special_tokens: bool) -> None:
    reader = text_reader(tokenizer)
    for task in tasks:
        texts = []
        for columns in task.splits.values():
            texts += [" ".join(words) for words in columns.get("tokens", [])]
            for column in ("text", "sentence1", "sentence2", "sentences", "segments", "good", "bad"):
                texts += flatten(columns.get(column, []))
        encoded = reader(texts, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        if num_cut := sum(len(ids) > max_length for ids in encoded):
            logger.info(f"  {task.name}: {num_cut:,} of {len(texts):,} texts are longer and cut")


def without_single_tokens(
    model: PreTrainedModel, tokenizer, tasks: Sequence[ProbeTask], max_length: int, add_special_tokens: bool
) -> list[ProbeTask]:
    """The tasks without the minimal pairs that `score_texts` refuses: of a single token nothing else tells."""
    kept = []
    for task in tasks:
        if task.kind == MINIMAL_PAIRS:
            pairs, usable = task.splits["test"], [True] * count_rows(task, "test")
            for column in ("good", "bad"):
                encoded = encode_texts(model, tokenizer, pairs[column], max_length, add_special_tokens)["input_ids"]
                usable = [can and len(ids) >= 2 for can, ids in zip(usable, encoded, strict=True)]
            if not all(usable):
                left_out = "" if any(usable) else ", which leaves none"
                logger.info(
                    f"  {task.name}: {usable.count(False):,} of {len(usable):,} pairs dropped{left_out} (a sentence "
                    "of fewer than two tokens)"
                )
            if not any(usable):
                continue
            chosen = {name: list(itertools.compress(values, usable)) for name, values in pairs.items()}
            task = ProbeTask(task.name, task.kind, {"test": chosen})
        kept.append(task)
    return kept


def short_names(names: Sequence[str]) -> list[str]:
    """The last part of every path, or the whole where that is not enough to tell them apart."""
    short = [Path(name).name or name for name in names]
    return short if len(set(short)) == len(short) else list(names)


# --- The report ------------------------------------------------------------------------------------------------------


def format_table(results: dict[str, dict[str, float]]) -> str:
    """A line for each measure, a column for each encoder; accuracies and correlations in percent."""
    lines = [["", *results]]
    for measure in measures(results):
        lines.append([measure.replace("/", " "), *(format_figure(column, measure) for column in results.values())])
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
    )


def measures(results: dict[str, dict[str, float]]) -> list[str]:
    """In the order of the first encoder."""
    return list(dict.fromkeys(key for column in results.values() for key in column if not key.endswith("_std")))


def format_figure(column: dict[str, float], measure: str) -> str:
    if measure not in column:
        return "-"
    if measure == "quality/width":
        return f"{column[measure]:.0f}"
    scale, digits = (1, 2) if measure.startswith("quality/") else (100, 1)
    spread = column.get(f"{measure}_std", 0.0)
    return f"{scale * column[measure]:.{digits}f}" + (f" ± {scale * spread:.{digits}f}" if spread else "")


def plot(results: dict[str, dict[str, float]], path: str) -> None:
    """Bars for encoders, a line across each group for TF-IDF; all but k-NN and the quality."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    shown = [key for key in measures(results) if not key.startswith("quality/") and not key.endswith("/knn")]
    encoders = [name for name in results if name != TFIDF]
    width = 0.8 / len(encoders)
    figure = Figure(figsize=(max(7, 2 + 1.4 * len(shown)), 4))
    axis = figure.subplots()
    colours = colormaps["tab20c"].colors  # fours from dark to light: trained, untrained, embeddings
    for index, name in enumerate(encoders):
        places = [group + (index - (len(encoders) - 1) / 2) * width for group in range(len(shown))]
        heights = [100 * results[name].get(key, math.nan) for key in shown]
        spreads = [100 * results[name].get(f"{key}_std", 0.0) for key in shown]
        colour = colours[(4 * (index // 3) + index % 3) % 20]
        axis.bar(places, heights, width, yerr=spreads, label=name, color=colour, error_kw={"lw": 1})
    for group, key in enumerate(shown):
        label = {"label": TFIDF} if group == 0 else {}
        axis.hlines(100 * results[TFIDF].get(key, math.nan), group - 0.45, group + 0.45, colors="black", lw=1, **label)
    axis.set_xticks(range(len(shown)), [re.sub("[./]", "\n", key).replace("_", " ") for key in shown], fontsize=8)
    axis.set_ylabel("accuracy, Spearman or reciprocal rank, %")
    figure.legend(loc="upper center", ncol=min(4, len(results)), fontsize="small")  # above the bars, hiding none
    figure.tight_layout(rect=(0, 0, 1, 0.92 - 0.06 * ((len(results) - 1) // 4)))
    figure.savefig(path, dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    start(main)
