"""Makes the archives that tests/training/test_old_checkpoint.py resumes from, with the code of an old commit:

    git worktree add /tmp/old/tjepa 9ad65c5
    PYTHONPATH=/tmp/old python tests/data/make_old_checkpoint.py tests/data

An archive holds the documents, the tokenizer, the checkpoint of step 4, and `expected.json`: the command line's flags,
and for each of the steps after it what was logged and which documents it was trained on.
"""

import json
import random
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from tjepa import run_pretraining
from tjepa.data_collator_tjepa import DataCollatorForTJEPA
from tjepa.train_tokenizer import train_tokenizer  # pyright: ignore[reportMissingImports]  # where it was then


WORDS = "the fox sees a red hen and runs home before night falls over hills where no one waits".split()
SAVED_STEP, LAST_STEP = 4, 10
FLAGS = {
    "config_overrides": "hidden_size=8,num_hidden_layers=1,num_attention_heads=2,rotary_dim=4,"
    "predictor_num_hidden_layers=1,token_prediction_weight=1.0",
    "max_length": 64,
    "per_device_train_batch_size": 4,
    "max_steps": LAST_STEP,
    "logging_steps": 1,
    "save_steps": SAVED_STEP,
    "learning_rate": 1e-2,
    "start_lr": 1e-3,
    "final_lr": 1e-4,
    "warmup_steps": 3,
    "weight_decay": 0.04,
    "final_weight_decay": 0.4,
    "ema_momentum": 0.9,
    "validation_split_percentage": 0,
    "do_eval": False,
    "use_cpu": True,
    "seed": 5,
    "report_to": "none",
    "disable_tqdm": True,
}
KINDS = {"map": {}, "stream": {"streaming": True, "shuffle_buffer_size": 8, "dataloader_num_workers": 2}}


def make(kind: str, folder: Path) -> None:
    choose = random.Random(0)
    texts = [" ".join(choose.choices(WORDS, k=choose.randint(10, 30))) for _ in range(26)]
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_tokenizer(texts, vocab_size=280, model_max_length=64).save_pretrained(folder / "tokenizer")
    (folder / "strategies.json").write_text('[{"target_block_size_mean": 1, "max_target_mask_ratio": 0.25}]\n')
    files = {"train_file": "train.jsonl", "tokenizer_name": "tokenizer", "masking_strategies": "strategies.json"}
    flags = {**FLAGS, **KINDS[kind]}

    documents = []
    collate = DataCollatorForTJEPA.__call__

    def record(collator, examples):
        documents.append([[example["epoch"], example["document_index"]] for example in examples])
        return collate(collator, examples)

    DataCollatorForTJEPA.__call__ = record  # in this process: not in a worker
    paths = {name: folder / file for name, file in files.items()}
    places = {**paths, "output_dir": folder / "out", "cache_dir": folder / "cache"}
    sys.argv = ["run_pretraining.py", *(f"--{name}={value}" for name, value in {**flags, **places}.items())]
    run_pretraining.main()
    DataCollatorForTJEPA.__call__ = collate

    state = json.loads((folder / "out" / "trainer_state.json").read_text())
    log = [line for line in state["log_history"] if "loss" in line and line["step"] > SAVED_STEP]
    documents = documents[SAVED_STEP:LAST_STEP]
    expected = {"flags": flags, "files": files, "log": log, "documents": documents}
    shutil.move(folder / "out" / f"checkpoint-{SAVED_STEP}", folder)
    shutil.rmtree(folder / "out")
    shutil.rmtree(folder / "cache")
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def main():
    torch.set_num_threads(1)
    target = Path(sys.argv[1]).resolve()
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            make(kind, Path(folder))
            archive = shutil.make_archive(str(target / f"checkpoint-of-9ad65c5-{kind}"), "xztar", folder)
        print(archive, Path(archive).stat().st_size)


if __name__ == "__main__":
    main()
