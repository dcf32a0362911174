"""Draws the rooms and which imports from which, read from the source, as docs/architecture.png.

python docs/plot_architecture.py docs/architecture.png
"""

import ast
import sys
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)


ROOT = Path(__file__).resolve().parents[1]
ROOMS = [  # from the bottom to the top; each imports only from rooms below it
    "configuration",
    "layers",
    "encoders",
    "predictors",
    "losses",
    "modeling",
    "data_collator",
    "corpus",
    "training",
    "downstream",
    "tools",
    "run_pretraining",
    "cli",
]


def room_of(parts: tuple[str, ...]) -> str | None:
    """`("corpus", "files")` -> `corpus`; `("modeling_tjepa",)` -> `modeling`."""
    name = parts[0].removesuffix("_tjepa") if parts else ""
    return name if name in ROOMS else None


def imported_rooms(path: Path) -> set[str]:
    """The rooms that a file imports from."""
    folder = path.relative_to(ROOT).parent.parts
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        parts = tuple(node.module.split(".")) if node.module else ()
        if node.level:
            parts = folder[: len(folder) - node.level + 1] + parts
        elif parts[:1] == ("tjepa",):
            parts = parts[1:]
        else:
            continue
        candidates = [parts] if parts else [(alias.name,) for alias in node.names]
        rooms |= {room_of(candidate) for candidate in candidates}
    return rooms - {None}


def find_imports() -> dict[str, set[str]]:
    """Room -> the rooms that it imports from."""
    imports = {room: set() for room in ROOMS}
    for path in sorted(ROOT.rglob("*.py")):
        room = room_of(path.relative_to(ROOT).with_suffix("").parts)
        if room is not None:
            imports[room] |= imported_rooms(path) - {room}
    return imports


def main(output: str) -> None:
    figure, axis = plt.subplots(figsize=(7, 7))
    heights = {room: index for index, room in enumerate(ROOMS)}
    for room, others in find_imports().items():
        for other in others:
            distance = heights[room] - heights[other]
            side = 1 if distance % 2 else -1
            curve = {
                "arrowstyle": "->",
                "color": "0.5",
                "connectionstyle": f"arc3,rad={side * min(0.9, 0.1 * distance)}",
            }
            axis.annotate("", xy=(0, heights[other] + 0.3), xytext=(0, heights[room] - 0.3), arrowprops=curve)
    for room, height in heights.items():
        box = {"boxstyle": "round", "facecolor": "white", "edgecolor": "black"}
        axis.text(0, height, room, ha="center", va="center", bbox=box)
    axis.set(xlim=(-3, 3), ylim=(-0.7, len(ROOMS) - 0.3))
    axis.axis("off")
    figure.tight_layout()
    figure.savefig(output, dpi=100)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "docs/architecture.png")
