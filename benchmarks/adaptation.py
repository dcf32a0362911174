"""What continuing its pretraining does to a trained encoder: recipes beside the untouched encoder.

python benchmarks/adaptation.py --encoder all-MiniLM-L6-v2 --sts_file eval/sts14-test.jsonl --output_dir out
python benchmarks/adaptation.py ... --seconds 150 --recipe "faster=--learning_rate 1e-4" --only adapt faster

A recipe is `tjepa adapt` with these flags; `adapt` alone is the recipe that comes with the package. With
`--only mlm simcse halves tsdae` others' objectives stand beside it, for the same time and batch (rivals.py). The
texts are the docstrings of the quickstart, their labels the libraries. Half of the held-out ones are there to choose a
recipe by, the others to report on (--judge_on test). The clock is the CPU time of the training steps on one thread:
steps are timed first, and a run has as many as fit. Each finished run is a JSON in --output_dir and is not run again,
so the same command goes on where it was stopped. A text is judged by its first --max_length tokens:

- retrieval: mean reciprocal rank of a held-out docstring's second half, by its first half, and of the rest of a
  docstring by its summary line, among all held-out ones;
- STS: Spearman's correlation with human scores, raw and whitened; general English, which training does not see;
- probe: whitened, for the library of a held-out docstring.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import numpy as np
import torch
from reporting import finished_or_run
from rivals import RIVALS, train_rival
from transformers import AutoModel, AutoTokenizer

from tjepa import cli, run_pretraining
from tjepa.corpus.atomic_writes import replacing_files
from tjepa.corpus.documents import draw
from tjepa.corpus.quickstart import load_quickstart_documents
from tjepa.downstream.before_after import halves, reciprocal_ranks
from tjepa.downstream.embedding import embed_texts
from tjepa.downstream.probe import linear_probe, sts_spearman


NUM_TIMED_STEPS = 8
UNTOUCHED, DEFAULT = "untouched", "adapt"
JUDGING = ("encoder", "max_length", "judge_on", "num_texts", "num_pairs", "num_probe_texts")
MEASURES = ("retrieval", "summary_retrieval", "sts", "sts_whitened", "probe")


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)
    recipes = {DEFAULT: "", **dict(recipe.split("=", 1) for recipe in args.recipe)}
    if unknown := sorted(set(args.only or ()) - {*recipes, *RIVALS}):
        raise SystemExit(f"--only: there is no recipe {unknown}, only {sorted({*recipes, *RIVALS})}")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    judge = Judge(args)
    judging = {name: getattr(args, name) for name in JUDGING} | {"sts_file": args.sts_file and args.sts_file.name}
    before = finished_or_run(args.output_dir / f"{UNTOUCHED}.json", judging, partial(judge, args.encoder))
    results = {UNTOUCHED: [before]}
    for seed in args.seeds:
        for name in args.only or recipes:
            flags = shlex.split(recipes.get(name, ""))
            run = finished_or_run(
                args.output_dir / f"{name}-{args.seconds:g}s-seed{seed}.json",
                judging | {"flags": flags, "max_train_samples": args.max_train_samples},
                partial(train_and_judge, name, flags, seed, judge, args),
            )
            results.setdefault(name, []).append(run)
            print(f"{name}, seed {seed}: {run}", flush=True)
    table = format_table(results)
    content = {"arguments": vars(args), "recipes": recipes, "results": results}
    (args.output_dir / "result.json").write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    print(f"\n{table}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True, help="folder or name of a trained encoder")
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--sts_file", type=Path, help="jsonl with sentence1, sentence2 and score")
    parser.add_argument("--seconds", type=float, default=600.0, help="CPU seconds of training steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipe", nargs="*", default=[], help='more of them: "name=--flag value --flag value"')
    parser.add_argument("--only", nargs="*", help="recipes to run, by name")
    parser.add_argument("--max_length", type=int, default=64, help="tokens, in training and judging")
    parser.add_argument("--max_train_samples", type=int, default=10_000, help="docstrings to train on")
    parser.add_argument("--judge_on", choices=("validation", "test"), default="validation", help="which half")
    parser.add_argument("--num_texts", type=int, default=400, help="held-out docstrings for retrieval")
    parser.add_argument("--num_pairs", type=int, default=850, help="pairs of --sts_file")
    parser.add_argument("--num_probe_texts", type=int, default=1000, help="docstrings that the probe is trained on")
    return parser.parse_args()


# --- Training --------------------------------------------------------------------------------------------------------


def train_and_judge(name: str, flags: list[str], seed: int, judge: "Judge", args: argparse.Namespace) -> dict:
    train_file = args.output_dir / "train.jsonl"
    documents = load_quickstart_documents()["train"].select_columns("text")
    if not train_file.is_file():
        with replacing_files(args.output_dir) as unfinished:
            documents.to_json(unfinished / train_file.name)

    def train(folder: Path, num_steps: int) -> float:
        if name not in RIVALS:
            return adapt(train_file, folder, flags, seed, num_steps, args)
        texts = documents.shuffle(seed=seed)["text"][: args.max_train_samples]
        return train_rival(name, texts, args.encoder, folder, seed, num_steps, args.max_length)

    with TemporaryDirectory(dir=args.output_dir) as folder:
        seconds = train(Path(folder) / "timed", NUM_TIMED_STEPS)
        num_steps = max(1, round(args.seconds * NUM_TIMED_STEPS / seconds))
        seconds = train(Path(folder) / "run", num_steps)
        return {"steps": num_steps, "seconds": seconds, **judge(Path(folder) / "run")}


def adapt(train_file: Path, folder: Path, flags: list[str], seed: int, num_steps: int, args) -> float:
    """`tjepa adapt`, and the CPU seconds that its training took."""
    seconds = []
    train = run_pretraining.train

    def timed(*arguments):
        start = time.process_time()
        figures = train(*arguments)
        seconds.append(time.process_time() - start)
        return figures

    fixed = {
        "train_file": train_file,
        "output_dir": folder,
        "seed": seed,
        "max_steps": num_steps,
        "max_length": args.max_length,
        "max_train_samples": args.max_train_samples,
        "validation_split_percentage": 0,
        "report_before_after": False,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    command = ["tjepa", "adapt", args.encoder, *(f"--{name}={value}" for name, value in fixed.items()), *flags]
    with mock.patch.object(run_pretraining, "train", timed), mock.patch.object(sys, "argv", command):
        cli.main()
    return seconds[0]


# --- Judging ---------------------------------------------------------------------------------------------------------


class Judge:
    """The texts; called with the folder of an encoder it gives the figures."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        documents = load_quickstart_documents()
        held_out = documents["validation"].shuffle(seed=0)
        half = held_out.shard(2, ["validation", "test"].index(args.judge_on), contiguous=True)
        self.test = half.select(range(min(args.num_texts, len(half))))
        self.train = documents["train"].shuffle(seed=0).select(range(args.num_probe_texts))
        self.pairs = []
        if args.sts_file is not None:
            self.pairs = [json.loads(line) for line in args.sts_file.read_text(encoding="utf-8").splitlines()]
            self.pairs = [self.pairs[index] for index in np.flatnonzero(draw(len(self.pairs), args.num_pairs))]
        self.tokenizer = AutoTokenizer.from_pretrained(args.encoder)

    def __call__(self, folder: str | Path) -> dict[str, float]:
        encoder = AutoModel.from_pretrained(folder)

        def embed(texts) -> torch.Tensor:
            return embed_texts(encoder, self.tokenizer, list(texts), self.args.max_length)

        texts = self.test["text"][:]
        first, second = (embed(part) for part in zip(*map(halves, texts), strict=True))
        ranks = reciprocal_ranks(first, second)
        titled = [text.split("\n", 1) for text in texts if len(text.split("\n", 1)[-1].strip()) > 40 and "\n" in text]
        summary_ranks = reciprocal_ranks(*(embed(map(str.strip, part)) for part in zip(*titled, strict=True)))
        figures = {"retrieval": ranks.mean(), "summary_retrieval": summary_ranks.mean()}
        figures["retrieval_error"] = ranks.std(ddof=1) / len(ranks) ** 0.5  # standard error over the texts
        if self.pairs:
            sentences = (embed(pair[name] for pair in self.pairs) for name in ("sentence1", "sentence2"))
            correlations = sts_spearman(*sentences, torch.tensor([float(pair["score"]) for pair in self.pairs]))
            figures |= {"sts": correlations["spearman"], "sts_whitened": correlations["spearman_whitened"]}
        known, labels = embed(self.train["text"][:]), torch.tensor(self.train["label"][:])
        test, test_labels = torch.cat([first, second]), torch.tensor(self.test["label"][:]).repeat(2)
        part = len(known) // 5  # chooses the strength
        probe = linear_probe(known[part:], labels[part:], known[:part], labels[:part], test, test_labels)
        figures["probe"] = probe.accuracy
        return {name: float(figure) for name, figure in figures.items()}


def format_table(results: dict[str, list[dict]]) -> str:
    """Markdown: of each recipe the mean over seeds and their standard deviation."""
    measures = [measure for measure in MEASURES if measure in results[UNTOUCHED][0]]
    lines = [f"| recipe | steps | {' | '.join(measures)} |", f"| --- | {' | '.join(['---:'] * (len(measures) + 1))} |"]
    for name, runs in results.items():
        cells = []
        for measure in measures:
            values = [run[measure] for run in runs]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        steps = str(round(statistics.mean(run.get("steps", 0) for run in runs)))
        lines.append(f"| {name} | {steps} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
