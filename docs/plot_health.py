"""Keeps the curves of runs as references, and draws the kept ones: the picture and the table in docs/health.md.

python docs/plot_health.py tools/reference_runs.json --keep runs/quickstart runs/stories
python docs/plot_health.py docs/health.png
"""

import argparse
import json
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from tjepa.tools.pictures import REFERENCE_FILE, STYLE, draw_threshold
from tjepa.training.health import MIN_TARGET_STD
from tjepa.training.record import read_run


CURVES = ("loss", "cosine", "mean_target_cosine", "target_std", "prediction_std")
CURVES += ("target_rank", "context_rank", "prediction_rank")
PANELS = {  # title -> figure of the log -> style
    "Loss": {"loss": {}},
    "Cosine with the targets\n(dashed: one constant guess)": {"cosine": {}, "mean_target_cosine": {"linestyle": "--"}},
    "Standard deviation of the targets\nacross tokens": {"target_std": {}},
    "Share of directions in use\nby the targets": {"target_rank": {}},
}


def keep(path: str, folders: list[str]) -> None:
    """Writes the curves of runs, with four digits, under the names of their folders."""
    lines = []
    for folder in folders:
        run = read_run(folder)
        kept = {
            "seed": run.seed,
            "optimizer_steps": run.max_steps,
            "versions": run.versions,
            "share": [round(line["step"] / run.max_steps, 4) for line in run.training],
            "curves": {curve: [float(f"{line[curve]:.4g}") for line in run.training] for curve in CURVES},
        }
        lines.append(f" {json.dumps(run.folder.resolve().name)}: {json.dumps(kept)}")
    Path(path).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def draw(path: str) -> None:
    kept = json.loads(REFERENCE_FILE.read_text(encoding="utf-8"))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 2.9), layout="constrained")
        for axis, (title, curves) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
            axis.set_title(title)
            axis.set_xlabel("share of the run")
            for index, (name, run) in enumerate(kept.items()):
                for curve, style in curves.items():
                    label = name if not style else None
                    axis.plot(run["share"], run["curves"][curve], color=f"C{index}", label=label, **style)
            if "target_std" in curves:
                draw_threshold(axis, MIN_TARGET_STD, "#c0392b", "collapsed")
        figure.axes[0].legend()
        figure.savefig(path, dpi=130, facecolor="white")


def as_table() -> str:
    """What the kept runs have in common, in Markdown: figures at the first report and at the end."""
    lines = [
        "| run | loss | cosine (constant guess) | ahead from | spread of the targets | rank: first, least, last |"
    ]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for name, run in json.loads(REFERENCE_FILE.read_text(encoding="utf-8")).items():
        loss, cosine, guess, std, rank = (np.array(run["curves"][curve]) for curve in (*CURVES[:4], "target_rank"))
        ahead = run["share"][np.flatnonzero(cosine <= guess)[-1] + 1] if (cosine <= guess).any() else run["share"][0]
        cosines = " → ".join(f"{cosine[at]:.2f} ({guess[at]:.2f})" for at in (0, -1))
        lines.append(
            f"| `{name}` | {loss[0]:.1f} → {loss[-1]:.1f} | {cosines} | {ahead:.0%} | {std[0]:.2f} → {std[-1]:.2f} | "
            f"{rank[0]:.2f}, {rank.min():.2f}, {rank[-1]:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("path", help="the picture; with --keep the file of curves")
    parser.add_argument("--keep", metavar="FOLDER", nargs="+", help="runs whose curves are kept, in place of others")
    args = parser.parse_args()
    if args.keep:
        keep(args.path, args.keep)
    else:
        draw(args.path)
        print(as_table())
