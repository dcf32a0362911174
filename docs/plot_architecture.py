"""Draws the way of a document through the rooms: boxes are rooms, arrows say what goes from one to the next.

python docs/plot_architecture.py docs/architecture.png
"""

import sys

import matplotlib.pyplot as plt


WIDTH, HEIGHT = 2.5, 0.9
HUB, OURS = "#dbe9f4", "#f3ede0"  # files that go to the Hub with a checkpoint, and the rest
ROOMS = {  # name -> (x, y, what it holds, colour)
    "corpus/": (0.0, 3.0, "documents, tokens, streams", OURS),
    "data_collator": (3.9, 3.0, "masks and packing", OURS),
    "encoders": (7.8, 3.0, "context and target encoder", HUB),
    "predictors": (7.8, 1.5, "at the target slots", HUB),
    "losses": (3.9, 1.5, "distances, regularisers", HUB),
    "training/": (0.0, 1.5, "steps, moving average, health", OURS),
    "downstream/, tools/": (0.0, 0.0, "probe, fine-tune, export", OURS),
    "layers, configuration": (7.8, 0.0, "under all of the model", HUB),
}
ARROWS = [  # from, to, what goes
    ("corpus/", "data_collator", "token ids"),
    ("data_collator", "encoders", "packed rows"),
    ("encoders", "predictors", "context states"),
    ("predictors", "losses", "predictions"),
    ("losses", "training/", "loss"),
    ("training/", "downstream/, tools/", "model folder"),
]


def main():
    figure, axis = plt.subplots(figsize=(10, 4.2))
    for name, (x, y, content, colour) in ROOMS.items():
        axis.add_patch(plt.Rectangle((x, y), WIDTH, HEIGHT, facecolor=colour, edgecolor="#444444"))
        axis.text(x + WIDTH / 2, y + 0.58, name, ha="center", va="center", fontsize=10, weight="bold", color="black")
        axis.text(x + WIDTH / 2, y + 0.27, content, ha="center", va="center", fontsize=8, color="black")
    for start, end, label in ARROWS:
        (x0, y0, *_), (x1, y1, *_) = ROOMS[start], ROOMS[end]
        if y0 == y1:  # along the row
            tail, head = ((x0 + WIDTH, x1), (x0, x1 + WIDTH))[x1 < x0]
            ends, align = ((head, y1 + HEIGHT / 2), (tail, y0 + HEIGHT / 2)), "center"
            place = ((head + tail) / 2, y0 + HEIGHT / 2 + 0.12)
        else:  # down the column
            ends, align = ((x1 + WIDTH / 2, y1 + HEIGHT), (x0 + WIDTH / 2, y0)), "left"
            place = (x0 + WIDTH / 2 + 0.12, (y0 + y1 + HEIGHT) / 2 - 0.06)
        axis.annotate("", *ends, arrowprops={"arrowstyle": "-|>", "color": "#444444"})
        axis.text(*place, label, ha=align, fontsize=8, color="#222222")
    left, top = ROOMS["losses"][0] + WIDTH, ROOMS["losses"][1] + HEIGHT
    axis.annotate(
        "", (left - 0.4, top), (ROOMS["encoders"][0], 3.2), arrowprops={"arrowstyle": "-|>", "color": "#444444"}
    )
    axis.text(left + 0.62, 2.62, "labels", fontsize=8, color="#222222")
    axis.text(0.0, 4.15, "text", fontsize=9, style="italic")
    axis.text(7.8, 4.15, "blue: goes to the Hub beside every checkpoint", fontsize=8, color="#222222")
    axis.annotate("", (0.12, 3.9), (0.12, 4.12), arrowprops={"arrowstyle": "-|>", "color": "#444444"})
    axis.set_xlim(-0.1, 10.5)
    axis.set_ylim(-0.1, 4.4)
    axis.axis("off")
    figure.savefig(sys.argv[1], dpi=130, bbox_inches="tight", facecolor="white")


if __name__ == "__main__":
    main()
