"""One side of `pretraining_throughput.py --baseline`: a process that imports whichever `tjepa` its path leads to.

`draw FOLDER` draws the views of the documents in FOLDER. `step FOLDER BATCHES DTYPE` makes one training step for every
line that it reads, and answers with a line of JSON. Both keep to what older checkouts have, too.
"""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from tjepa import TJEPAConfig, TJEPAForPreTraining
from tjepa.data_collator_tjepa import MASKING_PRESETS, draw_views, hash_keys, pack_batch


def draw(folder: Path) -> None:
    """documents.npz (token ids of each document) -> batches.pt: for each document the batch of its UL2 views."""
    strategies, batches = MASKING_PRESETS["ul2"], []
    with np.load(folder / "documents.npz") as documents:
        for index, name in enumerate(documents.files):
            views = draw_views([documents[name]], hash_keys(0, np.array([index])), strategies)
            batches.append(pack_batch([documents[name]], views, len(strategies)))
    torch.save(batches, folder / "batches.pt")


def run_steps(folder: Path, batches_name: str, dtype: torch.dtype) -> None:
    """
    Forward and backward of every batch, AdamW with the rate 0, moving average; what they cost, and the loss. The
    first step leaves its gradients in a file beside the batches, and the process's number of threads is the machine's.
    """
    start = torch.load(folder / "start.pt", weights_only=True)
    with torch.serialization.safe_globals([SimpleNamespace]):
        batches = torch.load(folder / batches_name, weights_only=True)
    model = TJEPAForPreTraining(TJEPAConfig(**start["config"])).train()
    model.load_state_dict(start["weights"])
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.0, weight_decay=0.0, fused=True)  # weights stay the same
    slots_per_strategy = sum(batch["slots_per_strategy"] for batch in batches)
    gradients_file = folder / f"gradients_{batches_name}_{dtype}.pt".replace("torch.", "")
    for _ in sys.stdin:
        wall, cpu, loss = time.perf_counter(), time.process_time(), 0.0
        for batch in batches:
            with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
                part = model(**{**batch, "slots_per_strategy": slots_per_strategy}).loss
            part.backward()
            loss += part.item()
        if not gradients_file.exists():
            gradients = [trained[name].grad.flatten() for name in sorted(trained)]
            torch.save(torch.cat(gradients), gradients_file)
        optimizer.step()
        optimizer.zero_grad()
        model.update_target_encoder(0.999)
        times = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        print(json.dumps({"seconds": times, "loss": loss, "gradients": str(gradients_file)}), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "draw":
        draw(Path(sys.argv[2]))
    else:
        run_steps(Path(sys.argv[2]), sys.argv[3], getattr(torch, sys.argv[4]))
