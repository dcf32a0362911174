"""What the benchmarks share: which documents, runs that are not run twice, a JSON file, a picture."""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path


DATA = Path(os.environ.get("TJEPA_DATA", "data"))  # what benchmarks/fetch_data.py makes


def add_report_arguments(parser: argparse.ArgumentParser, plot: bool = True) -> None:
    parser.add_argument("--output", type=Path, help="JSON file")
    if plot:
        parser.add_argument("--plot", type=Path, help="PNG file")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--train_file",
        type=existing,
        default=str(DATA / "books-train.parquet"),
        help="a .parquet, .jsonl or .txt file with one document per row",
    )
    parser.add_argument("--tokenizer", default="openlm-research/open_llama_7b", help="a folder, or a name on the Hub")


def existing(path: str) -> Path:
    if not Path(path).exists():
        raise argparse.ArgumentTypeError(f"{path} is not there: pass another, or python benchmarks/fetch_data.py")
    return Path(path)


def finished_or_run(path: Path, settings: dict, run: Callable[[], dict]) -> dict:
    """
    What `path` holds, or what `run()` gives, which is then written there beside `settings`.

    Raises:
        ValueError: `path` was made with other settings.
    """
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.pop("settings", None) != json.loads(json.dumps(settings)):
            raise ValueError(f"{path} was made with other settings: take another --output_dir, or remove the file.")
        return found
    figures = run()
    unfinished = path.with_suffix(f".{os.getpid()}")  # whoever is killed while writing leaves no torn file
    unfinished.write_text(json.dumps({"settings": settings, **figures}, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
    return figures


def write_report(args: argparse.Namespace, result: dict | list, draw: Callable | None = None) -> None:
    """`draw(result)` makes the figure."""
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")
    if draw is not None and args.plot:
        save_figure(draw(result), args.plot)


def new_figure(width: float, height: float):
    """In inches. Matplotlib is imported only when a picture is asked for."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def save_figure(figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=150)
