"""A run as a page: `report.html` in its folder, one file that needs no network.

    tjepa report runs/quickstart

Notable: everything comes from the run's folder, so the folder of a crashed run has its report, too; a panel that
cannot be made says why. Pretraining writes the page at every save, and at its end with the panels that need the
encoders. The pictures for the model card lie in `pictures/`; texts are in the page only.
"""

import argparse
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import datasets
import jinja2
import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics.pairwise import cosine_similarity
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed

from ..corpus.atomic_writes import replacing_files
from ..corpus.command_line import start
from ..corpus.faults import find_fault
from ..corpus.paths import find_newest_run
from ..corpus.tokenizers import load_tokenizer, text_reader
from ..data_collator_tjepa import MaskingStrategy, Views, draw_views, hash_keys
from ..downstream.before_after import BeforeAfter, held_out_texts
from ..downstream.embedding import embed_texts
from ..downstream.labels import read_labels
from ..modeling_tjepa import TJEPAForPreTraining
from ..training.checkpoints import list_checkpoints
from ..training.loading import load_pretraining_config, load_pretraining_model
from ..training.model_folder import PRETRAINING_FOLDER
from ..training.record import Run, fingerprint, read_run, suppressing_errors
from ..training.setup import default_device, hide_what_loading_says
from . import pictures
from .health import add_folder_argument, diagnose, summarise
from .lookup import split_into_tokens


REPORT_FILE, PICTURES_FOLDER = "report.html", "pictures"
MAX_TEXTS, MAX_CHARS = 300, 2000  # that a run keeps for its report
MAX_TOKENS = 128  # of a text, for maps and neighbours
MIN_TEXTS = 12  # fewer make no map
SHOWN_TOKENS = 90  # of the document that the strategies hide parts of
NUM_QUERIES, NUM_FOUND, SHOWN_CHARS = 4, 3, 160
MAX_COMPONENTS = 50
LATER = "Made at the end of the run, and by `tjepa report {folder}`."
CURVES = {  # section -> words, then (drawing, title, caption)
    "Loss": (
        "Lines: training texts. Dots: held-out texts, where the run evaluates. A falling loss alone proves little: "
        "labels that become easy make it fall, too.",
        (pictures.draw_loss, "Loss", "What the optimizer minimises. Held-out texts are read without denoising."),
        (pictures.draw_terms, "Terms of the loss", "jepa: predictions against targets. The others are options."),
        (pictures.draw_strategies, "Loss of each masking strategy", "The more is hidden at once, the harder."),
    ),
    "Representations": (
        "Is there something to predict, and is it predicted? Grey: the quickstart's run, stretched to these steps.",
        (
            pictures.draw_cosine,
            "Cosine with the targets",
            "Predictions must pull away from what one constant guess gets. At the start they lie under it.",
        ),
        (
            pictures.draw_spread,
            "Standard deviation across tokens",
            "Under the dotted line all tokens have nearly the same target: a collapse.",
        ),
        (pictures.draw_rank, "Share of directions in use", "A low share alone is not a collapse; falling to 0 is."),
        (pictures.draw_probe, "Probe", "Of the frozen encoder, on the texts of --probe_file that it did not see."),
    ),
    "Schedules and speed": (
        "",
        (pictures.draw_learning_rate, "Learning rate", "Warm-up, then decay."),
        (pictures.draw_momentum, "Momentum", "The nearer to 1, the slower the target encoder follows."),
        (pictures.draw_weight_decay, "Weight decay", "Of matrices only."),
        (pictures.draw_throughput, "Tokens per second", "Without the time of evaluations and checkpoints."),
        (pictures.draw_documents, "Documents", "What could not be used was dropped, by reason."),
    ),
}


# --- What a run keeps for its report ---------------------------------------------------------------------------------


def texts_to_keep(
    documents: datasets.DatasetDict,
    text_column_name: str,
    tokenizer: PreTrainedTokenizerBase,
    comparison: BeforeAfter | None = None,
) -> dict[str, Any]:
    """
    A few held-out texts, with labels where there are any: `texts`, `labels` and `why_no_texts` of `Run`. They are
    those of `--probe_file`, else of the validation split.
    """
    if comparison is not None and comparison.labelled:
        texts, labels = comparison.labelled, [comparison.class_names[label] for label in comparison.labels]
    elif "validation" in documents:
        rows, labels = documents["validation"], None
        if isinstance(rows, datasets.Dataset):
            rows = rows.select(np.linspace(0, len(rows) - 1, min(len(rows), 2 * MAX_TEXTS)).astype(int))
            if "label" in rows.column_names:
                labels = ["none" if label is None else str(label) for label in read_labels(rows, "label")]
        texts = list(islice(held_out_texts(rows, text_column_name, tokenizer), 2 * MAX_TEXTS))
    else:
        return {"why_no_texts": "The run has no held-out texts: it has no validation split."}
    usable = [index for index, text in enumerate(texts) if find_fault(text) is None][:MAX_TEXTS]
    return {
        "texts": [texts[index].strip()[:MAX_CHARS] for index in usable],
        "labels": None if labels is None else [labels[index] for index in usable],
    }


class ReportCallback(TrainerCallback):
    """Writes the report at every save, without the panels that need the encoders. A failure is a warning."""

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            with suppressing_errors("The report"):
                write_report(args.output_dir, with_encoders=False)


# --- The page --------------------------------------------------------------------------------------------------------


def write_report(folder: str | Path, with_encoders: bool = True) -> dict[str, str]:
    """
    Writes `report.html` and `pictures/` into a run's folder, whatever became of the run.

    Args:
        with_encoders: whether to embed texts with the trained and the untrained encoder.

    Returns:
        For the model card: picture -> what it shows.

    Raises:
        FileNotFoundError, ValueError: as `read_run`.
    """
    run = read_run(folder)
    findings = diagnose(run)
    figures = {}
    sections = []
    for title, (words, *panels) in CURVES.items():
        shown = []
        for draw, name, caption in panels:
            figure = figures[draw] = draw(run)
            svg = None if figure is None else pictures.as_svg(figure)
            shown.append({"svg": svg, "title": name, "caption": caption if svg else why_missing(run, draw)})
        sections.append({"title": title, "words": words, "pictures": shown})
    place = find_weights(run)
    maps, neighbours = {}, {"queries": [], "missing": [LATER.format(folder=folder)]}
    if with_encoders:
        vectors, missing = embed_with_both(run, place)
        maps = {name: draw_map_of(name, features, run.labels) for name, features in vectors.items()}
        neighbours = describe_neighbours(run, vectors, missing)
        shown = [
            {"svg": pictures.as_svg(maps[name]), "title": name, "caption": CAPTION_OF_MAP}
            if name in maps
            else {"svg": None, "title": f"{name} encoder", "caption": missing[name]}
            for name in ("Trained", "Untrained")
        ]
        sections.append({"title": "A map of your texts", "words": neighbours.pop("agreement"), "pictures": shown})
    page = jinja2.Template(
        Path(__file__).with_name("report.html").read_text(encoding="utf-8"), autoescape=True
    ).render(
        name=run.folder.resolve().name,
        head=describe_head(run),
        verdict=summarise(findings),
        findings=findings,
        sections=sections,
        hidden=describe_hidden(run, place),
        neighbours=neighbours,
        tables={
            "Settings that are not the default": run.settings,
            "Versions": {**run.versions, **({"device": run.device} if run.device else {})},
        },
    )
    for_card = {
        "loss.png": ("the loss over steps", figures[pictures.draw_loss]),
        "cosine.png": ("predictions against one constant guess", figures[pictures.draw_cosine]),
        "map.png": ("held-out texts, as the encoder places them", maps.get("Trained")),
        "spread.png": ("standard deviation across tokens", figures[pictures.draw_spread]),
    }
    there_is = ((name, what) for name, what in for_card.items() if what[1] is not None)
    for_card = dict(islice(there_is, 3 if with_encoders else 0))
    with replacing_files(folder) as unfinished:
        (unfinished / REPORT_FILE).write_text(page, encoding="utf-8")
        for name, (_, figure) in for_card.items():
            (unfinished / PICTURES_FOLDER).mkdir(exist_ok=True)
            pictures.save_png(figure, unfinished / PICTURES_FOLDER / name)
    return {f"{PICTURES_FOLDER}/{name}": caption for name, (caption, _) in for_card.items()}


def why_missing(run: Run, draw: Callable) -> str:
    """Why a picture cannot be drawn of a run's log."""
    if draw is pictures.draw_documents:
        return "The run has not written down what became of its documents; of a stream that is known at its end."
    if draw is pictures.draw_probe:
        trained, untrained = (run.results.get(name) for name in ("probe_accuracy", "probe_accuracy_untrained"))
        if trained is not None and untrained is not None:
            return f"Judged once, at the end: {trained:.1%}, the untrained encoder {untrained:.1%}."
        if "probe_file" in run.settings:
            return "The labels of --probe_file are judged at evaluations, and none is in the log (--eval_strategy)."
        return "The run was given no labelled texts to judge the encoder by (--probe_file)."
    if run.training:
        return "This run does not have it: no line of its log holds it."
    strategy, steps = (run.settings.get(f"logging_{name}") for name in ("strategy", "steps"))
    if strategy not in (None, "steps"):
        return f"No step is in the log: --logging_strategy is {strategy}."
    steps = "--logging_steps" if steps is None else f"--logging_steps, which is {steps:,}"
    if run.has_ended:
        return f"No step is in the log: the run of {run.last_step:,} steps was shorter than {steps}."
    return f"No step is in the log yet: the first comes after {steps}."


def describe_head(run: Run) -> str:
    steps = f"Step {run.last_step:,}" + (f" of {run.max_steps:,}" if run.max_steps else "")
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"A run of T-JEPA. {steps}. Written {written}."


# --- Encoders --------------------------------------------------------------------------------------------------------


def find_weights(run: Run) -> Path | None:
    """The folder with the weights of a finished run or, of another one, its newest checkpoint that has weights."""
    places = [run.folder / PRETRAINING_FOLDER, run.folder, *reversed(list_checkpoints(run.folder).values())]
    return next((place for place in places if any(place.glob("model*.safetensors"))), None)


def embed_with_both(run: Run, place: Path | None) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """
    Vectors of the kept texts by the encoders, float64 [num_texts, hidden_size], and why those that are not there are
    missing, under the names `Trained` and `Untrained`.
    """
    names = ("Trained", "Untrained")
    if len(run.texts) < MIN_TEXTS:
        why = run.why_no_texts if not run.texts else f"{len(run.texts)} held-out texts are too few."
        return {}, dict.fromkeys(names, why)
    if place is None:
        return {}, dict.fromkeys(names, "The folder holds no weights: the run ended before its first checkpoint.")
    vectors, missing = {}, {}
    for name, load in zip(names, (trained_encoder, untrained_encoder), strict=True):
        try:
            tokenizer = load_tokenizer(str(place), "folder")
            encoder = load(run, place, tokenizer).to(default_device())
            length = min(run.max_length or MAX_TOKENS, MAX_TOKENS)
            vectors[name] = embed_texts(encoder, tokenizer, run.texts, length).double().numpy()
        except Exception as error:  # a panel is missing, not the page
            missing[name] = f"{type(error).__name__}: {error}"
    return vectors, missing


def trained_encoder(run: Run, place: Path, tokenizer: PreTrainedTokenizerBase) -> torch.nn.Module:
    model = TJEPAForPreTraining.from_pretrained(place, dtype=torch.float32)
    return getattr(model, f"{run.exported}_encoder")


def untrained_encoder(run: Run, place: Path, tokenizer: PreTrainedTokenizerBase) -> torch.nn.Module:
    """
    The encoder at the start, made again from the seed or from what training started from.

    Raises:
        ValueError: if that gives other weights.
    """
    if run.started_from is None:
        config = load_pretraining_config(str(place))
        set_seed(run.seed)
        encoder = TJEPAForPreTraining(config).target_encoder
        source = f"seed {run.seed} gives other weights with this version of torch"
    else:
        config = load_pretraining_config(run.started_from, revision=run.revision)
        settings = (config, tokenizer, run.max_length or MAX_TOKENS, None, run.started_from)
        encoder = load_pretraining_model(*settings, revision=run.revision).target_encoder
        source = f"{run.started_from} holds other weights now"
    if not np.isclose(fingerprint(encoder), run.fingerprint_at_start, rtol=1e-9, atol=0.0):
        raise ValueError(f"the encoder at the start cannot be made again: {source}.")
    return encoder


# --- Panels of texts -------------------------------------------------------------------------------------------------


CAPTION_OF_MAP = "Each dot is a held-out text; texts that the encoder finds alike lie together (t-SNE)."


def directions(vectors: np.ndarray) -> np.ndarray:
    """The first whitened directions, in which the common mean does not hide what differs."""
    num_components = max(2, min(MAX_COMPONENTS, len(vectors) // 4, vectors.shape[1]))
    return PCA(num_components, whiten=True, svd_solver="full").fit_transform(vectors)


def draw_map_of(name: str, vectors: np.ndarray, labels: Sequence[str] | None):
    perplexity = min(30.0, (len(vectors) - 1) / 3)
    points = TSNE(2, perplexity=perplexity, metric="cosine", init="random", random_state=0)
    return pictures.draw_map(f"{name} encoder", points.fit_transform(directions(vectors)), labels)


def describe_neighbours(run: Run, vectors: dict[str, np.ndarray], missing: dict[str, str]) -> dict[str, Any]:
    """For the page: a few texts with those that are nearest to them, and how often the nearest has the same label."""
    similarity = {name: cosine_similarity(directions(features)) for name, features in vectors.items()}
    for values in similarity.values():
        np.fill_diagonal(values, -np.inf)
    queries = []
    for query in np.linspace(0, len(run.texts) - 1, NUM_QUERIES).astype(int) if similarity else ():
        columns = []
        for name, values in similarity.items():
            nearest = np.argsort(-values[query], kind="stable")[:NUM_FOUND]
            found = [(f"{values[query, index]:.2f}", shown_text(run, index)) for index in nearest]
            columns.append({"name": f"{name} encoder", "found": found})
        queries.append({"text": shown_text(run, query), "columns": columns})
    agreement = ""
    if run.labels is not None and similarity:
        labels = np.array(run.labels)
        shares = [f"{np.mean(labels[v.argmax(1)] == labels):.0%} {name.lower()}" for name, v in similarity.items()]
        _, counts = np.unique(labels, return_counts=True)
        chance = np.square(counts / counts.sum()).sum()
        agreement = f"A text's nearest neighbour has its label: {', '.join(shares)}, {chance:.0%} by chance."
    return {
        "queries": queries,
        "missing": [f"{name} encoder: {why}" for name, why in missing.items()],
        "words": "Texts that training did not see, and the nearest others among them." if similarity else "",
        "agreement": agreement,
    }


def shown_text(run: Run, index: int) -> str:
    text = " ".join(run.texts[index].split())
    text = text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}…"
    return text if run.labels is None else f"[{run.labels[index]}] {text}"


def describe_hidden(run: Run, place: Path | None) -> dict[str, Any]:
    """For the page: the tokens of one text, hidden or not, under every strategy."""
    if not run.texts:
        return {"why": run.why_no_texts}
    if place is None:
        return {"why": "The folder holds no tokenizer yet: the run ended before its first checkpoint."}
    tokenizer = load_tokenizer(str(place), "folder")
    reader = text_reader(tokenizer)
    texts = [split_into_tokens(text, reader, SHOWN_TOKENS) for text in run.texts[:20]]
    tokens = next((tokens for tokens in texts if len(tokens) >= SHOWN_TOKENS // 2), max(texts, key=len))
    if len(tokens) < 2:
        return {"why": "None of the texts has two tokens."}
    ids, pieces = zip(*tokens, strict=True)
    strategies = [MaskingStrategy.from_dict(strategy) for strategy in run.strategies]
    keys = hash_keys(run.seed, np.zeros(1, dtype=np.int64))
    views = draw_views([np.array(ids)], keys, strategies, run.settings.get("mask_recurring_targets", False))
    shown = []
    for view, strategy in zip(range(len(views.strategy)), strategies, strict=True):
        runs = group_pieces(token_kinds(views, view, len(ids)), pieces)
        slots = views.slot_view == view
        shown.append({"name": strategy.name, "share": f"{slots.sum() / len(ids):.0%}", "tokens": runs})
    words = "A held-out text" if len(ids) < SHOWN_TOKENS else f"The first {len(ids)} tokens of a held-out text"
    return {
        "strategies": shown,
        "words": f"{words}, of {len(ids)} tokens." if len(ids) < SHOWN_TOKENS else f"{words}.",
    }


def token_kinds(views: Views, view: int, num_tokens: int) -> list[str]:
    """Of each token of a single document: hidden ("a" and "b" tell neighbouring blocks apart), "dropped" or ""."""
    kinds = np.full(num_tokens, "dropped", dtype=object)
    kinds[views.context_token[views.context_view == view]] = ""
    slots = views.slot_view == view
    kinds[views.slot_token[slots]] = np.where(views.slot_block[slots] % 2 == 1, "a", "b")
    return kinds.tolist()


def group_pieces(kinds: Sequence[str], pieces: Sequence[str]) -> list[tuple[str, str]]:
    """Kinds, and the pieces of neighbours of one kind together."""
    runs = groupby(zip(kinds, pieces, strict=True), key=itemgetter(0))
    return [(kind, "".join(piece for _, piece in run)) for kind, run in runs]


# --- The command -----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_folder_argument(parser)
    folder = parser.parse_args().folder or find_newest_run()
    hide_what_loading_says()
    write_report(folder)
    print(f"Wrote {Path(folder) / REPORT_FILE}: open it in a browser")


if __name__ == "__main__":
    start(main)
