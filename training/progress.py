"""What a run shows while it trains: one bar with loss, tokens per second and time left, and a line for each report.

A line has what tells at a glance how it goes; everything else is in `log.jsonl` and in the trackers of `--report_to`.
"""

import shutil
import sys
import time
from collections.abc import Callable, Mapping

import torch
from tqdm.auto import tqdm
from transformers import PrinterCallback, TrainerCallback, TrainerState
from transformers.trainer_callback import ProgressCallback


PLAIN_PROGRESS = (ProgressCallback, PrinterCallback)  # whose place `RunProgress` takes; a notebook has its own table
BAR = "{percentage:3.0f}% {bar} {n_fmt}/{total_fmt} steps, {remaining} left{postfix}"


class TokenClock(TrainerCallback):
    """Tokens of documents per second of training: the time of evaluations and checkpoints does not count."""

    def __init__(self):
        self.on_train_begin(None, None, None)

    def on_train_begin(self, args, state, control, **kwargs):
        self._since, self._step_end, self._paused = time.perf_counter(), 0.0, False
        self.total: torch.Tensor | int = 0  # of this process; on the device: counting must not make a GPU wait
        self._taken: torch.Tensor | int = 0

    def on_step_end(self, args, state, control, **kwargs):
        self._step_end = time.perf_counter()

    def on_save(self, args, state, control, **kwargs):
        self._paused = True

    on_evaluate = on_save

    def resume(self) -> None:
        """Before the next step is prepared."""
        if self._paused:
            self._since += time.perf_counter() - max(self._step_end, self._since)
            self._paused = False

    def count(self, batches: list[dict[str, torch.Tensor]]) -> None:
        for batch in batches:
            self.total = self.total + (batch["document_ids"] >= 0).sum()

    def take(self, add_up: Callable[[torch.Tensor], torch.Tensor]) -> float:
        """
        Since the last call.

        Args:
            add_up: sums a tensor over processes.
        """
        tokens = int(add_up(torch.as_tensor(self.total - self._taken)))
        now = time.perf_counter()
        rate = tokens / max(now - self._since, 1e-9)
        self._since, self._taken = now, self.total
        return rate


class RunProgress(ProgressCallback):
    """
    The Trainer's bar with a line that fits 120 columns, or the terminal, for every report.

    Args:
        show_bar (`bool`): where it is off (`--disable_tqdm`), or the output is not a terminal, there are lines only.
    """

    def __init__(self, show_bar: bool = True):
        super().__init__()
        self.show_bar = show_bar
        self._started_at, self._first_step = time.monotonic(), 0

    def on_train_begin(self, args, state, control, **kwargs):
        self._started_at, self._first_step = time.monotonic(), state.global_step
        self.current_step = state.global_step
        if state.is_world_process_zero:
            off = not self.show_bar or not sys.stderr.isatty()
            total = {"initial": state.global_step, "total": state.max_steps}
            self.training_bar = tqdm(**total, dynamic_ncols=True, disable=off, bar_format=BAR)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        pass  # one bar is enough

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not (line := self.describe(logs, state)):
            return
        tqdm.write(line)  # above the bar, if there is one
        sys.stdout.flush()
        if "loss" in logs and self.training_bar is not None:
            self.training_bar.set_postfix_str(", ".join(loss_and_speed(logs)), refresh=False)

    def describe(self, logs: Mapping[str, float], state: TrainerState) -> str | None:
        """One line for a report, or `None` if there is nothing in it for people."""
        if "train_runtime" in logs and "loss" not in logs:  # with include_num_input_tokens_seen it is in every line
            steps = state.global_step - self._first_step
            return f"trained {steps:,} steps in {tqdm.format_interval(logs['train_runtime'])}"
        is_training = "loss" in logs
        figures = logs if is_training else {k.removeprefix("eval_"): v for k, v in logs.items()}
        if "loss" not in figures:
            return None
        width = len(f"{state.max_steps:,}")
        parts = [f"step {state.global_step:{width},}/{state.max_steps:,}", *loss_and_speed(figures)[:1]]
        if not is_training:
            parts[1] = f"held out: {parts[1]}"
        parts += [f"probe {value:.1%}" for name, value in figures.items() if name.endswith("probe_accuracy")]
        if "cosine" in figures:
            guess = figures["mean_target_cosine"]
            parts += [f"cosine {figures['cosine']:.3f} (constant guess {guess:.3f})"]
            parts += [f"rank {figures['target_rank']:.2f}"]
        if is_training:
            parts += loss_and_speed(figures)[1:]
            done, left = state.global_step - self._first_step, state.max_steps - state.global_step
            parts += [f"{tqdm.format_interval((time.monotonic() - self._started_at) * left / max(1, done))} left"]
        if self.training_bar is not None and not self.training_bar.disable:  # a terminal; the bar has speed and time
            while len("  ".join(parts)) > shutil.get_terminal_size().columns and len(parts) > 3:
                parts.pop()
        return "  ".join(parts)


def loss_and_speed(logs: Mapping[str, float]) -> list[str]:
    speed = logs.get("tokens_per_second")
    return [f"loss {logs['loss']:.4g}", *([] if speed is None else [f"{tqdm.format_sizeof(speed)} tokens/s"])]
