"""What every benchmark does with its figures: a JSON file with `--output`, a picture with `--plot`."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path


def add_report_arguments(parser: argparse.ArgumentParser, plot: bool = True) -> None:
    parser.add_argument("--output", type=Path, help="JSON file")
    if plot:
        parser.add_argument("--plot", type=Path, help="PNG file")


def write_report(args: argparse.Namespace, result: dict | list, draw: Callable | None = None) -> None:
    """`draw(plt, result)` makes and returns the figure."""
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")
    if draw is not None and args.plot:
        save_figure(draw(pyplot(), result), args.plot)


def pyplot():
    """Matplotlib without a screen, imported only when a picture is asked for."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_figure(figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=150)
