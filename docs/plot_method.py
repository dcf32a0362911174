"""Draws the method in one picture, the README's first: a text with hidden words, the two encoders, the predictor.

python docs/plot_method.py docs/method.png
"""

import sys

import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch


WORDS = ["The", "river", "rose", "and", "the", "old", "bridge", "gave", "way"]
HIDDEN = {2, 5, 6}
CONTEXT, TARGET, PREDICTOR, INK, FAINT = "#2a6f97", "#b5651d", "#4d7c0f", "#1f2933", "#c9d1d9"


def box(axis, x: float, y: float, width: float, height: float, text: str, colour: str, filled: bool = True) -> None:
    shape = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.12", linewidth=1.2)
    shape.set(facecolor=colour if filled else "white", edgecolor=colour)
    axis.add_patch(shape)
    colour = "white" if filled else colour
    axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=colour, fontsize=10)


def arrow(axis, start: tuple, end: tuple, colour: str = INK, style: str = "-") -> None:
    line = FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=colour, linestyle=style)
    axis.add_patch(line)


def row_of_words(axis, y: float, hides: bool) -> None:
    x = 0.15
    for place, word in enumerate(WORDS):
        width = 0.24 + 0.105 * len(word)
        is_hidden = hides and place in HIDDEN
        box(axis, x, y, width, 0.42, "" if is_hidden else word, FAINT if is_hidden else INK, filled=is_hidden)
        x += width + 0.07


def main(path: str) -> None:
    figure, axis = plt.subplots(figsize=(11.2, 3.3), facecolor="white")  # a ground of its own: legible on dark pages
    axis.set(xlim=(0, 14), ylim=(0, 4.1))
    axis.axis("off")
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.99)

    row_of_words(axis, 2.9, hides=True)
    row_of_words(axis, 0.8, hides=False)
    box(axis, 6.95, 2.75, 1.75, 0.72, "context encoder", CONTEXT)
    box(axis, 9.3, 2.75, 1.5, 0.72, "predictor", PREDICTOR)
    box(axis, 6.95, 0.65, 1.75, 0.72, "target encoder", TARGET)
    arrow(axis, (6.5, 3.11), (6.9, 3.11))
    arrow(axis, (8.75, 3.11), (9.25, 3.11))
    arrow(axis, (6.5, 1.01), (6.9, 1.01))
    for y, colour, end in ((3.11, PREDICTOR, 10.85), (1.01, TARGET, 8.75)):
        arrow(axis, (end, y), (11.35, y))
        for column in range(len(HIDDEN)):
            box(axis, 11.45 + 0.42 * column, y - 0.42, 0.3, 0.84, "", colour)
    axis.text(12.9, 3.11, "guesses", va="center", color=PREDICTOR, fontsize=10)
    axis.text(12.9, 1.01, "labels", va="center", color=TARGET, fontsize=10)
    arrow(axis, (12.02, 2.6), (12.02, 1.5), "#9b1c31")
    arrow(axis, (12.02, 1.5), (12.02, 2.6), "#9b1c31")
    axis.text(12.2, 2.06, "distance = loss", va="center", color="#9b1c31", fontsize=10)
    arrow(axis, (7.8, 2.7), (7.8, 1.42), TARGET, "--")
    axis.text(7.95, 2.06, "moving average, no gradient", va="center", color=TARGET, fontsize=10)
    axis.text(0.15, 3.62, "what the context encoder reads: some words are hidden", color=INK, fontsize=10)
    axis.text(0.15, 0.3, "what the target encoder reads: all of it", color=INK, fontsize=10)
    figure.savefig(path, dpi=160)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "docs/method.png")
