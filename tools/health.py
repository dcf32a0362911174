"""Is a run healthy? What its figures say, what they mean, and what to do about it.

    tjepa health runs/quickstart

Notable: it judges by the last evaluation on held-out texts or, where there is none, by the last logged step. What the
curves of good runs look like is in docs/health.md. The exit code is 3 where a run is not healthy, as that of
`--stop_on_collapse`.
"""

import argparse
import math
import shlex
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Literal, NamedTuple

from ..corpus.command_line import start
from ..corpus.paths import RUN_FILE, find_newest_run
from ..training.checkpoints import list_checkpoints
from ..training.ema import MAX_SHARE_OF_START
from ..training.health import MIN_RANK, MIN_STEPS, MIN_TARGET_STD, is_learning
from ..training.record import Run, read_run


MIN_LEAD = 0.02  # of the cosine over a constant guess, for predictions that are said to be learned
MAX_DROPPED = 0.1  # share of documents, and of tokens cut off, that goes unsaid
MAX_EPOCHS = 20
MOST_TO_SEARCH = 20_000  # documents that are embedded within minutes on a CPU
NOT_HEALTHY = 3  # the exit code
WIDTH = 100

Level = Literal["good", "watch", "bad"]


class Finding(NamedTuple):
    """One thing that a run's figures say."""

    level: Level
    name: str
    figures: str
    meaning: str
    advice: str = ""  # what to do; nothing where all is well


def diagnose(run: Run) -> list[Finding]:
    """What a run's log, counts and results say, in the order in which to read it."""
    findings = [find_end(run), find_finite(run)]
    figures, where, earlier = figures_to_judge(run)
    if figures is None:
        advice = "A lower --logging_steps in the next run." if run.has_ended else "Wait, or lower --logging_steps."
        findings.append(Finding("watch", "figures", "none", "The run has logged no step.", advice))
    else:
        findings += [find_spread(run, figures, where), find_lead(run, figures, where, earlier)]
        findings.append(find_rank(figures, where))
    findings += [find_loss(run), find_moving_target(run), *find_documents(run), find_judgement(run)]
    return [finding for finding in findings if finding is not None]


def worst_level(findings: list[Finding]) -> Level:
    levels = {finding.level for finding in findings}
    return "bad" if "bad" in levels else "watch" if "watch" in levels else "good"


def summarise(findings: list[Finding]) -> str:
    """One sentence for the head of a page."""
    level = worst_level(findings)
    names = ", ".join(finding.name for finding in findings if finding.level == level)
    return {"good": "Healthy.", "watch": f"No collapse. Look at: {names}.", "bad": f"Not healthy: {names}."}[level]


def figures_to_judge(run: Run) -> tuple[dict[str, float] | None, str, list[dict[str, float]]]:
    """The latest figures, what they are of, and those before them of the same kind."""
    lines, kind = run.evaluations, "on held-out texts"
    if not lines:
        lines, kind = [line for line in run.training if "target_std" in line], "on training texts"
    if not lines:
        return None, "", []
    return lines[-1], f"{kind}, step {lines[-1]['step']:,}", lines[:-1]


def switch_on(run: Run, **weights: float) -> list[str]:
    """The advice to use these loss terms, if the run does without some of them."""
    logged = set().union(*run.training)
    off = [f"{name}={weight:g}" for name, weight in weights.items() if name.replace("_weight", "_loss") not in logged]
    return [f"add {','.join(off)} to --config_overrides"] if off else []


def as_choice(mends: list[str]) -> str:
    """["lower a", "raise b", "add c"] -> 'Lower a, raise b, or add c'."""
    text = ", ".join(mends[:-1]) + f", or {mends[-1]}"
    return text[0].upper() + text[1:]


# --- The findings ----------------------------------------------------------------------------------------------------


def find_end(run: Run) -> Finding:
    step, total = run.last_step, run.max_steps
    steps = f"step {step:,}" if total is None else f"{step:,} of {total:,} steps"
    if run.has_ended:
        return Finding("good", "end", steps, "The run came to its end.")
    checkpoints = list_checkpoints(run.folder)
    advice = (
        "If it is not running any more: start it again with the same flags and --resume_from_checkpoint last."
        if checkpoints
        else "If it is not running any more: it left no checkpoint. Start anew, with a lower --save_steps."
    )
    return Finding("watch", "end", steps, "The run goes on, or was interrupted.", advice)


def find_finite(run: Run) -> Finding:
    values = [entry[name] for entry in run.log for name in ("loss", "eval_loss", "grad_norm") if name in entry]
    num_bad = max((entry.get("nonfinite_gradients", 0) for entry in run.log), default=0)
    if not all(map(math.isfinite, values[-3:])):
        return Finding(
            "bad",
            "numbers",
            "NaN or infinite",
            "The weights are lost from here on.",
            "Resume from the last checkpoint with a lower --learning_rate, a longer --warmup_steps, or a lower "
            "--max_grad_norm.",
        )
    if num_bad:
        return Finding(
            "watch",
            "numbers",
            f"{num_bad} steps skipped",
            "Gradients were not finite, and float16's scaler skipped these steps. A few are normal.",
            "If it goes on: --bf16 in place of --fp16, or a lower --learning_rate.",
        )
    return Finding("good", "numbers", "all finite", "No NaN and no infinity.")


def find_spread(run: Run, figures: dict[str, float], where: str) -> Finding:
    std = figures["target_std"]
    shown = f"target_std {std:.2f} ({where}); at least {MIN_TARGET_STD}"
    if std >= MIN_TARGET_STD:
        return Finding("good", "spread of the targets", shown, "Targets differ from token to token.")
    terms = switch_on(run, variance_covariance_weight=0.5, token_prediction_weight=1)
    mends = [*terms, "lower --learning_rate", "raise --ema_momentum"]
    return Finding(
        "bad",
        "spread of the targets",
        shown,
        "Collapsed: the target encoder says nearly the same of every token, and a low loss means nothing.",
        f"{as_choice(mends)}. Start from a checkpoint of before the fall, or anew.",
    )


def find_lead(run: Run, figures: dict[str, float], where: str, earlier: list[dict[str, float]]) -> Finding:
    cosine, guess = figures["cosine"], figures["mean_target_cosine"]
    lead = cosine - guess
    shown = f"cosine {cosine:.3f}, constant guess {guess:.3f} ({where})"
    name = "predictions"
    if lead >= MIN_LEAD:
        return Finding("good", name, shown, "Predictions are nearer to the targets than one constant guess is.")
    earlier_lead = earlier[-1]["cosine"] - earlier[-1]["mean_target_cosine"] if earlier else None
    if lead > 0 or is_learning(lead, figures["step"], earlier_lead, run.max_steps):
        return Finding(
            "watch",
            name,
            shown,
            "Predictions are no better than one constant guess yet. In the first two fifths of a run that is normal.",
            "Wait while the cosine rises. If it does not: a higher --learning_rate, shorter blocks, more steps.",
        )
    blocks_are_short = run.settings.get("masking_strategies") in ("short_blocks", "single_tokens")
    mends = ["lower --learning_rate if the loss jumps", "raise it if nothing moves", "train longer"]
    mends += [] if blocks_are_short else ["hide shorter blocks (--masking_strategies single_tokens)"]
    return Finding(
        "bad",
        name,
        shown,
        "The predictor has learned nothing that one constant guess does not know: of this the encoder learns nothing.",
        f"{as_choice([*mends, *switch_on(run, token_prediction_weight=1)])}.",
    )


def find_rank(figures: dict[str, float], where: str) -> Finding:
    rank = figures["target_rank"]
    shown = f"target_rank {rank:.2f} of 1 ({where})"
    if rank >= MIN_RANK:
        return Finding("good", "directions in use", shown, "Targets use many directions of the space.")
    return Finding(
        "watch",
        "directions in use",
        shown,
        f"Targets use few directions (under {MIN_RANK}). Alone that is not a collapse.",
        "Judge by `tjepa probe` against the untrained encoder; variance_covariance_weight spreads them.",
    )


def find_loss(run: Run) -> Finding | None:
    losses = [entry["loss"] for entry in run.training]
    if len(losses) < 4 or not all(map(math.isfinite, losses)):
        return None
    quarter = len(losses) // 4
    first, last = (sum(part) / quarter for part in (losses[:quarter], losses[-quarter:]))
    shown = f"{first:.4g} at first, {last:.4g} at last"
    if last < first:
        return Finding("good", "loss", shown, "It falls. That alone proves little: labels may become easy.")
    return Finding(
        "watch",
        "loss",
        shown,
        "It does not fall. The labels change as the encoder learns, so a rise can be harmless.",
        "Look whether the cosine pulls away from the constant guess, and at token_prediction_loss, which must fall. "
        "If neither does: a lower --learning_rate.",
    )


def find_moving_target(run: Run) -> Finding | None:
    """How much of the target encoder is still what it started as, by the momentum that was logged."""
    points = [(entry["step"], entry["ema_momentum"]) for entry in run.training if "ema_momentum" in entry]
    if not points or points[-1][0] < MIN_STEPS:
        return None
    if all(momentum == 1.0 for _, momentum in points):
        return Finding("good", "target encoder", "frozen", "The labels stay those of the encoder at the start.")
    share, before = 1.0, 0
    for step, momentum in points:
        share, before = share * momentum ** (step - before), step
    shown = f"{share:.0%} of it is what it started as"
    if share <= MAX_SHARE_OF_START:
        return Finding("good", "target encoder", shown, "It follows the encoder that is trained.")
    return Finding(
        "watch",
        "target encoder",
        shown,
        "It hardly moves: labels are still those of the start, and what you get is nearly the untrained encoder.",
        "Lower --ema_momentum (1 - 10 / steps suits a run of any length), or train longer.",
    )


def find_documents(run: Run) -> list[Finding]:
    findings = []
    counts = run.documents.get("train")
    if counts and counts["num_documents"]:
        dropped = sum(counts["dropped"].values()) / counts["num_documents"]
        cut = counts["num_tokens_cut"] / max(1, counts["num_tokens"] + counts["num_tokens_cut"])
        shown = f"{counts['num_kept']:,} kept ({dropped:.0%} dropped), {counts['num_tokens']:,} tokens ({cut:.0%} cut)"
        if max(dropped, cut) <= MAX_DROPPED:
            findings.append(Finding("good", "documents", shown, "Nearly all of your text is used."))
        else:
            advice = "Look at the reasons in the report."
            if cut > MAX_DROPPED and run.settings.get("long_documents") != "split":
                advice += " --long_documents split keeps what is beyond --max_length."
            findings.append(Finding("watch", "documents", shown, "Much of your text is not used.", advice))
    epochs = max((entry.get("epoch", 0.0) for entry in run.log), default=0.0)
    if epochs > MAX_EPOCHS:
        findings.append(
            Finding(
                "watch",
                "passes over the text",
                f"{epochs:.0f}",
                "Every text was seen many times (with other masks each time).",
                "More text teaches more than more steps do.",
            )
        )
    return findings


def find_judgement(run: Run) -> Finding:
    """The verdict on learning, which the figures of training cannot give."""
    name = "what was learned"
    trained, untrained = (run.results.get(key) for key in ("probe_accuracy", "probe_accuracy_untrained"))
    if trained is not None and untrained is not None:
        shown = f"probe {trained:.1%}, the untrained encoder {untrained:.1%}"
        if trained > untrained:
            return Finding("good", name, shown, "A linear probe reads more from it than from the untrained encoder.")
        return Finding(
            "bad",
            name,
            shown,
            f"The frozen encoder tells {'less' if trained < untrained else 'no more'} than it did before training.",
            "Train longer; or with token_prediction_weight and single_tokens: plain T-JEPA needs long runs.",
        )
    folder = shlex.quote(str(run.folder))
    if lines := run.results.get("before_after", {}).get("lines"):
        is_worse = any(": worse." in line for line in lines)
        is_better = any(": better." in line for line in lines)
        advice = "" if is_better and not is_worse else "Other texts, more of them, or another --learning_rate."
        return Finding("watch" if advice else "good", name, lines[0], "The encoder before and after training.", advice)
    return Finding(
        "watch",
        name,
        "not judged",
        "Loss and cosine do not tell whether the encoder is good; only a probe does.",
        f"tjepa probe --model_name_or_path {folder} --dataset mine=train.jsonl,test.jsonl, with labelled texts; or "
        "--probe_file in the next run.",
    )


def summarise_run(folder: str) -> str:
    """`summarise`, of the run in a folder."""
    if not (Path(folder) / RUN_FILE).is_file():
        return "Not known: the run has kept no record."
    return summarise(diagnose(read_run(folder)))


def closing_lines(folder: str) -> list[str]:
    """What a run ends with: where the model is, how good it is, what to type next."""
    run = read_run(folder)
    findings = diagnose(run)
    learned = findings[-1]
    good = f"{summarise(findings)} {learned.name.capitalize()}: {learned.figures.rstrip('.')}."
    name = shlex.quote(folder)
    search, look = f'tjepa search "eigenvalues of a matrix" --model {name}', f"tjepa health {name}"
    if "train_file" in run.settings and run.documents["train"]["num_documents"] <= MOST_TO_SEARCH:
        search = f'tjepa search "some words" --model {name} --file {shlex.quote(run.settings["train_file"])}'
        if "text_column_name" in run.settings:
            search += f" --text_column_name {shlex.quote(run.settings['text_column_name'])}"
    return [
        f"Model   {folder}  (its report: {Path(folder) / 'report.html'})",
        f"Good?   {good}",
        f"Next    {look if worst_level(findings) == 'bad' else search}",
    ]


# --- The command -----------------------------------------------------------------------------------------------------


def as_text(findings: list[Finding]) -> str:
    """For a terminal: at most 100 columns."""
    width = min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)
    marks = {"good": "ok   ", "watch": "look ", "bad": "BAD  "}
    lines = [summarise(findings), ""]
    for finding in findings:
        lines.append(f"{marks[finding.level]} {finding.name}: {finding.figures}")
        for words, sign in ((finding.meaning, "  "), (finding.advice, "> ")):
            indent = " " * 6
            lines += textwrap.wrap(words, width, initial_indent=indent + sign, subsequent_indent=f"{indent}  ")
    return "\n".join(lines)


def add_folder_argument(parser: argparse.ArgumentParser) -> None:
    help = "the run's folder, whether it is finished, running or crashed; default: the newest finished run under runs/"
    parser.add_argument("folder", nargs="?", help=help)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_folder_argument(parser)
    folder = parser.parse_args().folder or find_newest_run()
    findings = diagnose(read_run(folder))
    print(f"{folder}: {as_text(findings)}")
    if worst_level(findings) == "bad":
        sys.exit(NOT_HEALTHY)


if __name__ == "__main__":
    start(main)
