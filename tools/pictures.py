"""The pictures of a run's report, each small enough for a phone: curves, what became of the documents, maps of texts.

Every function returns a figure of matplotlib, or `None` where the run has not logged what it shows.
"""

import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import matplotlib.ticker
import numpy as np
from matplotlib.figure import Figure

from ..training.health import LOSSES, MIN_RANK, MIN_TARGET_STD
from ..training.record import Run


SIZE = (4.4, 2.7)  # inches
STYLE = {
    "font.size": 8,
    "font.family": "sans-serif",
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "tjepa",  # the same picture is the same file
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8a8a",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#ececec",
    "legend.frameon": False,
    "legend.fontsize": 7,
    "lines.linewidth": 1.5,
    "axes.prop_cycle": matplotlib.cycler(linestyle=["-", "--"])
    * matplotlib.cycler(color=["#2a6f97", "#e07a3f", "#5b8e3e", "#8257a5", "#b8405e", "#6b6b6b"]),
}
GREY, RED, AMBER = "#b5b5b5", "#c0392b", "#d99a2b"
MAX_CLASSES = 12  # with a colour of their own
HATCHES = (None, "//", "..", "xx", "--", "oo", "||", "**")  # of what was kept, and of each reason to drop
REFERENCE_FILE = Path(__file__).with_name("reference_runs.json")


def new_axis(title: str, xlabel: str = "optimizer step", **layout):
    figure = Figure(figsize=SIZE, **layout)
    axis = figure.add_subplot()
    axis.set(title=title, xlabel=xlabel)
    if not layout:  # fixed margins take half the time
        figure.subplots_adjust(left=0.13, right=0.97, top=0.9, bottom=0.16)
    return figure, axis


def as_svg(figure: Figure) -> str:
    """For the inside of a page, as wide as there is room."""
    file = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    svg = file.getvalue()[file.getvalue().index("<svg") :]
    return re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)


def save_png(figure: Figure, path: Path) -> None:
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, dpi=150, facecolor="white")


# --- Curves ----------------------------------------------------------------------------------------------------------


def curves(
    run: Run,
    title: str,
    names: Mapping[str, str],
    reference: Mapping | None = None,
    styles: Mapping[str, Mapping] | None = None,
):
    """
    Figures of the log over steps: lines for training, dots for held-out texts.

    Args:
        names: figure -> what it is called in the picture.
        reference: a kept run (`load_reference`), drawn in grey as if it had as many steps.
    """
    with matplotlib.rc_context(STYLE):
        figure, axis = new_axis(title)
        any_drawn = False
        for name, label in names.items():
            steps, values = series(run.training, name)
            held_out = series(run.evaluations, name)
            if not len(steps) and not len(held_out[0]):
                continue
            any_drawn = True
            marker = "o" if len(steps) == 1 else None
            (line,) = axis.plot(
                steps, values, label=label, marker=marker, markersize=3, **(styles or {}).get(name, {})
            )
            axis.plot(*held_out, "o", markersize=4, color=line.get_color(), zorder=3)
            if reference is not None and name in reference["curves"]:
                share, kept = np.array(reference["share"]), reference["curves"][name]
                style = {"linestyle": line.get_linestyle(), "color": GREY, "linewidth": 1, "zorder": 0}
                axis.plot(share * (run.max_steps or run.last_step), kept, **style)
        if not any_drawn:
            return None, None
        if len(axis.get_legend_handles_labels()[1]) > 1:
            axis.legend()
    return figure, axis


def series(lines: Sequence[Mapping[str, float]], name: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(line["step"], line[name]) for line in lines if name in line and np.isfinite(line[name])]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.array(steps), np.array(values)


def draw_loss(run: Run) -> Figure | None:
    figure, _ = curves(run, "Loss (sum of all terms)", {"loss": "loss"})
    return figure


def draw_terms(run: Run) -> Figure | None:
    names = {name: name.removesuffix("_loss").replace("_", " ") for name in LOSSES}
    figure, axis = curves(run, "Terms of the loss, before their weights", names)
    if axis is not None and all((line.get_ydata() > 0).all() for line in axis.lines):
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    return figure


def draw_strategies(run: Run) -> Figure | None:
    """With one strategy alone, the log has no loss beside `jepa_loss`."""
    lines = (*run.training, *run.evaluations)
    names = sorted({name for line in lines for name in line if name.startswith("loss_")}) or ["jepa_loss"]
    figure, _ = curves(run, "Loss of each masking strategy", {name: name.removeprefix("loss_") for name in names})
    return figure


def draw_cosine(run: Run) -> Figure | None:
    names = {"cosine": "predictions", "mean_target_cosine": "one constant guess"}
    styles = {"mean_target_cosine": {"linestyle": "--"}}
    figure, axis = curves(run, "Cosine with the targets", names, load_reference(), styles)
    if axis is not None:
        steps, cosine = series(run.training, "cosine")
        _, guess = series(run.training, "mean_target_cosine")
        if len(cosine) == len(guess):
            axis.fill_between(steps, guess, cosine, where=cosine < guess, color=RED, alpha=0.12, linewidth=0)
            axis.fill_between(steps, guess, cosine, where=cosine >= guess, color="#5b8e3e", alpha=0.12, linewidth=0)
    return figure


def draw_spread(run: Run) -> Figure | None:
    names = {"target_std": "targets", "prediction_std": "predictions"}
    figure, axis = curves(run, "Standard deviation across tokens", names, load_reference())
    if axis is not None:
        draw_threshold(axis, MIN_TARGET_STD, RED, f"targets under {MIN_TARGET_STD}: collapsed")
    return figure


def draw_rank(run: Run) -> Figure | None:
    names = {"target_rank": "targets", "context_rank": "context encoder", "prediction_rank": "predictions"}
    figure, axis = curves(run, "Share of directions in use (RankMe)", names, load_reference())
    if axis is not None:
        draw_threshold(axis, MIN_RANK, AMBER, f"under {MIN_RANK}: look")
    return figure


def draw_probe(run: Run) -> Figure | None:
    steps, accuracies = series(run.evaluations, "probe_accuracy")
    if not len(steps):
        return None
    with matplotlib.rc_context(STYLE):
        figure, axis = new_axis("Accuracy of the probe for your labels")
        axis.plot(steps, accuracies, "o-", markersize=4)
        if run.probe_at_start is not None:
            axis.axhline(run.probe_at_start, color=GREY, linestyle="--", label="before training")
            axis.legend()
    return figure


def draw_threshold(axis, height: float, colour: str, label: str) -> None:
    axis.axhline(height, color=colour, linestyle=":", linewidth=1.2)
    axis.axhspan(0, height, color=colour, alpha=0.08, linewidth=0)
    axis.text(
        0.99, height, label, color=colour, fontsize=7, ha="right", va="bottom", transform=axis.get_yaxis_transform()
    )
    axis.set_ylim(bottom=0)


def draw_learning_rate(run: Run) -> Figure | None:
    return curves(run, "Learning rate", {"learning_rate": "learning rate"})[0]


def draw_momentum(run: Run) -> Figure | None:
    return curves(run, "Momentum of the target encoder", {"ema_momentum": "momentum"})[0]


def draw_weight_decay(run: Run) -> Figure | None:
    return curves(run, "Weight decay", {"weight_decay": "weight decay"})[0]


def draw_throughput(run: Run) -> Figure | None:
    figure, axis = curves(run, "Tokens of documents per second", {"tokens_per_second": "tokens/s"})
    if axis is not None:
        axis.set_ylim(bottom=0)
    return figure


# --- Documents and maps ----------------------------------------------------------------------------------------------


def draw_documents(run: Run) -> Figure | None:
    """What became of the documents, by split."""
    counts = run.documents
    if not counts:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axis = new_axis("Documents: kept and dropped", "share of the documents read", layout="constrained")
        reasons = ["kept", *dict.fromkeys(reason for count in counts.values() for reason in count["dropped"])]
        left = np.zeros(len(counts))
        for index, reason in enumerate(reasons):
            numbers = [c["num_kept"] if reason == "kept" else c["dropped"].get(reason, 0) for c in counts.values()]
            shares = np.array(numbers) / [max(1, count["num_documents"]) for count in counts.values()]
            label = f"{reason} ({sum(numbers):,})"
            look = {"color": f"C{index}", "hatch": HATCHES[index], "edgecolor": "white", "height": 0.5}
            axis.barh(list(counts), shares, left=left, label=label, **look)
            left += shares
        axis.set_xlim(0, 1)
        axis.grid(axis="y", visible=False)
        axis.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
        axis.invert_yaxis()
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.28), ncols=2)
    return figure


def draw_map(title: str, points: np.ndarray, labels: Sequence[str] | None) -> Figure:
    """
    Texts as dots.

    Args:
        points: float [num_texts, 2].
        labels: of each text, whose colour it gets.
    """
    with matplotlib.rc_context(STYLE):
        figure, axis = new_axis(title, "", layout="constrained")
        axis.set_aspect("equal", adjustable="datalim")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        if labels is None:
            axis.scatter(*points.T, s=9, linewidth=0, alpha=0.8)
            return figure
        names, counts = np.unique(labels, return_counts=True)
        common = names[np.argsort(-counts, kind="stable")][:MAX_CLASSES]
        colours = matplotlib.colormaps["tab20" if len(common) > 10 else "tab10"]
        for index, name in enumerate([*common, *({"others"} if len(names) > len(common) else ())]):
            is_one = np.isin(labels, common, invert=True) if index == len(common) else np.array(labels) == name
            colour = GREY if index == len(common) else colours(index)
            axis.scatter(*points[is_one].T, s=9, linewidth=0, alpha=0.85, color=colour, label=name)
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), markerscale=1.6, handletextpad=0.1)
    return figure


# --- Reference runs --------------------------------------------------------------------------------------------------


def load_reference() -> dict:
    """The kept run that a report shows in grey: the quickstart's."""
    return json.loads(REFERENCE_FILE.read_text(encoding="utf-8"))["quickstart"]
