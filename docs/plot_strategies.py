"""Draws what each UL2 masking strategy hides of one document: the picture in docs/pretraining.md.

python docs/plot_strategies.py docs/strategies.png
"""

import sys

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap

from tjepa.data_collator_tjepa import MASKING_PRESETS, draw_views, hash_keys


DOCUMENT_TOKENS = 160
FAMILIES = ["R", "R", "X", "X", "X", "X", "S"]
CONTEXT, BLOCK, NEIGHBOUR_BLOCK = 0, 1, 2  # two colours in turn, so that blocks side by side can be told apart


def main(path: str) -> None:
    strategies = MASKING_PRESETS["ul2"]
    views = draw_views([np.zeros(DOCUMENT_TOKENS, dtype=np.int64)], hash_keys(0, np.zeros(1)), strategies)
    rows = np.full((len(strategies), DOCUMENT_TOKENS), CONTEXT)
    rows[views.slot_view, views.slot_token] = np.where(views.slot_block % 2 == 1, BLOCK, NEIGHBOUR_BLOCK)

    figure, axis = plt.subplots(figsize=(9, 2.6))
    colours = ListedColormap(["#e8e8e8", "#2a6f97", "#61a5c2"])
    axis.pcolormesh(rows, cmap=colours, vmin=0, vmax=2, edgecolors="white", linewidth=0.3)
    axis.invert_yaxis()
    labels = [f"{family}  {strategy.name}" for family, strategy in zip(FAMILIES, strategies, strict=True)]
    axis.set_yticks(np.arange(len(strategies)) + 0.5, labels, fontsize=8)
    axis.set_xlabel(
        f"position in a document of {DOCUMENT_TOKENS} tokens (grey: context, blue: target blocks)", fontsize=8
    )
    axis.tick_params(length=0, labelsize=8)
    axis.spines[:].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "docs/strategies.png")
