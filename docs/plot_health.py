"""Keeps the curves of a run as a reference, and draws the kept ones: the pictures in docs/health.md.

python docs/plot_health.py --keep quickstart runs/quickstart
python docs/plot_health.py docs/health.png
"""

import argparse
import json

import matplotlib
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


def keep(name: str, folder: str) -> None:
    """Adds a run's curves to the kept ones, with four digits."""
    run = read_run(folder)
    kept = json.loads(REFERENCE_FILE.read_text(encoding="utf-8")) if REFERENCE_FILE.is_file() else {}
    kept[name] = {
        "seed": run.seed,
        "optimizer_steps": run.max_steps,
        "versions": run.versions,
        "share": [round(line["step"] / run.max_steps, 4) for line in run.training],
        "curves": {curve: [float(f"{line[curve]:.4g}") for line in run.training] for curve in CURVES},
    }
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in kept.items()]
    REFERENCE_FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("path", help="the picture; with --keep a run's folder")
    parser.add_argument("--keep", metavar="NAME", help="what the run is called in the pictures")
    args = parser.parse_args()
    if args.keep:
        keep(args.keep, args.path)
    else:
        draw(args.path)
