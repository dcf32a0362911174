"""Kills a real pretraining run with SIGKILL at random moments, starts it again with the same command until it is
through, and compares the end with a run that nobody disturbed: weights, optimizer and log must be equal to the bit.

    python tests/kill_and_resume.py --num_kills 200 --output_file kills.json
    python tests/kill_and_resume.py --num_kills 50 -- --streaming=True --dataloader_num_workers=2

Half of the kills come at any moment, half within milliseconds after a checkpoint folder has appeared, while it is
being written. Every start is a fork of this process, which has imported everything and done nothing: a real process
with its own memory, without the seconds that imports take. (tests/test_kill.py runs it with few kills.)
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from fault_injection import fork, wait
from tjepa import run_pretraining
from tjepa.corpus.train_tokenizer import train_tokenizer
from tjepa.training.checkpoints import find_damage, list_checkpoints


WORDS = "the fox sees a red hen and runs home before night falls over hills where no one waits".split()
TIMES = ("runtime", "per_second", "train_loss", "total_flos")  # those of the last start, not of the whole run


def write_inputs(folder: Path) -> list[str]:
    """Documents and a tokenizer, and the command line that trains on them."""
    choose = random.Random(0)
    texts = [" ".join(choose.choices(WORDS, k=choose.randint(20, 60))) for _ in range(60)]
    files = {"train-0": texts[:26], "train-1": texts[26:52], "validation": texts[52:]}
    for name, texts_of_file in files.items():
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts_of_file)
        (folder / f"{name}.jsonl").write_text(rows)
    train_tokenizer(texts, vocab_size=300, model_max_length=64).save_pretrained(folder / "tokenizer")
    return [
        f"--train_file={folder / 'train-*.jsonl'}",
        f"--validation_file={folder / 'validation.jsonl'}",
        f"--tokenizer_name={folder / 'tokenizer'}",
        f"--cache_dir={folder / 'cache'}",
        "--config_overrides=hidden_size=32,num_hidden_layers=1,num_attention_heads=2,rotary_dim=8,"
        "predictor_num_hidden_layers=1,hidden_dropout_prob=0.1",
        "--max_length=64",
        "--per_device_train_batch_size=4",
        "--gradient_accumulation_steps=2",
        "--max_steps=24",
        "--save_steps=2",
        "--save_total_limit=1",
        "--logging_steps=3",
        "--eval_strategy=steps",
        "--eval_steps=4",
        "--learning_rate=1e-2",
        "--disable_tqdm=True",
        "--resume_from_checkpoint=last",
    ]


def start(arguments: list[str], log: Path) -> int:
    """The process id of a new run."""

    def run() -> None:
        sys.argv = ["run_pretraining.py", *arguments]
        run_pretraining.main()

    return fork(run, log)


def times_of_checkpoints(output_dir: Path) -> dict[str, int]:
    """Checkpoint folder -> when a file in it was last created."""
    if not output_dir.is_dir():
        return {}
    with os.scandir(output_dir) as entries:
        return {entry.name: entry.stat().st_mtime_ns for entry in entries if entry.name.startswith("checkpoint-")}


def has_changed(output_dir: Path, times: dict[str, int]) -> bool:
    return times_of_checkpoints(output_dir) != times


def is_torn(output_dir: Path) -> bool:
    newest = list(list_checkpoints(output_dir).values())[-1:]
    return bool(newest) and find_damage(newest[0]) is not None


def read_end(output_dir: Path) -> tuple[dict, dict, list]:
    """Weights of the model folder, optimizer state of the last checkpoint, and the log without times."""
    checkpoint = list(list_checkpoints(output_dir).values())[-1]
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    state = {f"{i}.{name}": moment for i, moments in optimizer["state"].items() for name, moment in moments.items()}
    log = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    lines = [{k: v for k, v in line.items() if not k.endswith(TIMES)} for line in log]
    return load_file(output_dir / "model.safetensors"), state, lines


def assert_same_end(expected: tuple, actual: tuple) -> None:
    for tensors, others in zip(expected[:2], actual[:2], strict=True):
        assert tensors.keys() == others.keys()
        different = [name for name in tensors if not torch.equal(tensors[name], others[name])]
        assert not different, f"different after kills: {different}"
    assert expected[2] == actual[2], "the logs differ"


def kill_until_done(arguments, output_dir, log, choose: random.Random, duration: float, num_kills: int) -> dict:
    """One run to its end, killed at most `num_kills` times. Counts of kills, torn checkpoints and starts."""
    counts = {"kills": 0, "torn_checkpoints": 0, "half_written_model_folders": 0, "starts": 0}
    while True:
        pid = start(arguments, log)
        counts["starts"] += 1
        if counts["kills"] == num_kills:
            code = wait(pid)
        elif choose.random() < 0.5:
            code = wait(pid, time.monotonic() + choose.uniform(0, duration))
        else:
            code = wait(pid, stop_waiting=partial(has_changed, output_dir, times_of_checkpoints(output_dir)))
            if code is None:
                code = wait(pid, time.monotonic() + choose.uniform(0, 0.1))
        if code == 0:
            return counts
        assert code is None, f"a start ended with exit code {code}; see {log}"
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        counts["kills"] += 1
        counts["torn_checkpoints"] += is_torn(output_dir)
        counts["half_written_model_folders"] += any(output_dir.glob(".unfinished-*"))
        if (output_dir / "model.safetensors").exists():
            load_file(output_dir / "model.safetensors")  # raises if it is not whole


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_seconds", type=float, default=float("inf"), help="Start no further run after these.")
    parser.add_argument("--output_file", type=Path, help="JSON with the counts.")
    parser.add_argument("overrides", nargs="*", help="More flags for the run, after --: -- --streaming=True")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    choose, began = random.Random(args.seed), time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="kill-and-resume-"))
    arguments = write_inputs(folder) + args.overrides

    # twice: the first start fills the cache of datasets
    for name in ("first", "undisturbed"):
        started = time.monotonic()
        code = wait(start([*arguments, f"--output_dir={folder / name}"], folder / "undisturbed.log"))
        assert code == 0, f"the undisturbed run ended with exit code {code}; see {folder / 'undisturbed.log'}"
        duration = time.monotonic() - started
    expected = read_end(folder / "undisturbed")
    assert_same_end(expected, read_end(folder / "first"))

    counts = {"runs": 0, "seconds_of_an_undisturbed_run": round(duration, 2)}
    while counts.get("kills", 0) < args.num_kills and time.monotonic() - began < args.max_seconds:
        output_dir = folder / f"run-{counts['runs']}"
        num_kills = min(10, args.num_kills - counts.get("kills", 0))
        of_run = kill_until_done(
            [*arguments, f"--output_dir={output_dir}"], output_dir, folder / "killed.log", choose, duration, num_kills
        )
        assert_same_end(expected, read_end(output_dir))
        counts["runs"] += 1
        for name, count in of_run.items():
            counts[name] = counts.get(name, 0) + count
        shutil.rmtree(output_dir)
        print(json.dumps(counts), flush=True)
    log = (folder / "killed.log").read_text()
    counts["resumed"] = log.count("Resuming from")
    counts["started_anew"] = log.count("starting anew")
    counts["torn_checkpoints_skipped"] = log.count("Skipping ")
    counts["seconds"] = round(time.monotonic() - began)
    if args.output_file:
        args.output_file.write_text(json.dumps(counts, indent=2) + "\n")
    print(json.dumps(counts, indent=2))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
