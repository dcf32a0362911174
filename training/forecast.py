"""`--forecast`: what a run would take, measured on its own first steps, with its own data, on this machine.

Notable: nothing is written, whatever the other flags say. The steps are those that the run itself would begin with, so
compilation, packing and the loading of data cost what they will cost.
"""

import math
import tempfile
import time
from typing import Any

import psutil
import torch
from accelerate.utils import reduce
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, has_length

from .checkpoints import count_steps


NUM_STEPS = 20  # that are measured
NUM_FIRST_STEPS = 3  # before them: they compile, and fill caches


class Stopwatch(TrainerCallback):
    """When each step ended, and the most memory that was in use then; ends training after the last one."""

    def __init__(self):
        self.ends, self.memory = [], 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.ends.append(time.perf_counter())

    def on_step_end(self, args, state, control, **kwargs):
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        self.memory = max(self.memory, memory_in_use(args.device))
        control.should_training_stop |= state.global_step >= NUM_FIRST_STEPS + NUM_STEPS

    def seconds_per_step(self) -> float:
        """The mean, without the first steps where there are others."""
        num_left_out = min(NUM_FIRST_STEPS, len(self.ends) - 2)
        return (self.ends[-1] - self.ends[num_left_out]) / (len(self.ends) - 1 - num_left_out)


def memory_in_use(device: torch.device) -> int:
    """Bytes: on a GPU the most that torch has reserved there, else those of this process and its workers."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    process = psutil.Process()
    return sum(each.memory_info().rss for each in (process, *process.children(recursive=True)))


def memory_there_is(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


def plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' if number != 1 else ''}"


class Forecast:
    """
    Args:
        args (`TrainingArguments`): those of the run. They are changed so that nothing is written or published.

    Raises:
        ValueError: if the run would not train.
    """

    def __init__(self, args: TrainingArguments):
        if not args.do_train:
            raise ValueError("--forecast is about training: leave out --do_train False.")
        self.eval_strategy, self.eval_steps = args.eval_strategy, args.eval_steps
        args.output_dir = tempfile.gettempdir()
        args.save_strategy, args.load_best_model_at_end = SaveStrategy.NO, False
        args.eval_strategy = args.logging_strategy = IntervalStrategy.NO
        args.report_to, args.push_to_hub, args.disable_tqdm = [], False, True

    def measure(self, trainer: Trainer, counts: Any) -> list[str]:
        """
        Trains `NUM_STEPS` steps, and evaluates one batch if the run evaluates.

        Args:
            trainer (`TJEPATrainer`): that of the run.
            counts: of the training documents; `num_tokens` is used where it has that.

        Returns:
            Lines that say what the run would take, and which flag would change it.
        """
        args = trainer.args
        num_steps, stopwatch = count_steps(trainer), Stopwatch()
        trainer.add_callback(stopwatch)
        trainer.train()
        num_measured = trainer.state.global_step
        tokens = torch.as_tensor(trainer.token_clock.total, device=args.device)
        num_tokens = int(reduce(tokens, "sum")) / num_measured * num_steps
        seconds = stopwatch.seconds_per_step() * num_steps
        seconds_evaluating, num_evaluations = self.time_evaluations(trainer, num_steps)

        documents = trainer.get_total_train_batch_size(args) * num_steps
        num_parameters = sum(parameter.numel() for parameter in trainer.model.context_encoder.parameters())
        there_is = memory_there_is(args.device)
        device = "1 GPU" if args.device.type == "cuda" else plural(torch.get_num_threads(), "CPU thread")
        processes = f" in each of {args.world_size} processes" if args.world_size > 1 else ""
        total, rate = tqdm.format_interval(seconds + seconds_evaluating), tqdm.format_sizeof(num_tokens / seconds)
        evaluations = f", {tqdm.format_interval(seconds_evaluating)} of it for {plural(num_evaluations, 'evaluation')}"
        lines = [
            f"From {num_measured} steps with {device}{processes}:",
            f"  time      {total}: {num_steps:,} steps of {seconds / num_steps:.3g} s, {rate} tokens/s"
            f"{evaluations if num_evaluations else ''}, without saving",
            "            > --max_steps or --num_train_epochs; --eval_steps, --max_eval_samples",
            f"  memory    {stopwatch.memory / 1e9:.2f} GB of {there_is / 1e9:.1f} GB{processes}",
            "            > --per_device_train_batch_size, with --gradient_accumulation_steps for the same step; "
            "--max_length",
        ]
        if has_length(trainer.train_dataset):
            rows = len(trainer.train_dataset)
            corpus = getattr(counts, "num_tokens", None) or num_tokens / documents * rows
            one_epoch = math.ceil(rows * num_steps / documents)
            lines += [
                f"  epochs    {documents / rows:.3g} of {rows:,} rows with {tqdm.format_sizeof(corpus)} tokens",
                f"            > --max_steps {one_epoch} is one",
            ]
            different = f", {tqdm.format_sizeof(min(corpus, num_tokens))} of them different,"
        else:
            lines += ["  epochs    not known of a stream", "            > --max_steps"]
            different = ""
        lines += [
            f"  tokens a parameter  {num_tokens / num_parameters:.3g}: {tqdm.format_sizeof(num_tokens)} tokens"
            f"{different} for {tqdm.format_sizeof(num_parameters)} parameters of the encoder",
            "            > --config_overrides hidden_size=...,num_hidden_layers=..., or more text",
        ]
        return lines

    def time_evaluations(self, trainer: Trainer, num_steps: int) -> tuple[float, int]:
        """Seconds and number of the run's evaluations, by the time that one batch takes."""
        args, dataset = trainer.args, trainer.eval_dataset
        if dataset is None or not has_length(dataset) or not args.do_eval:
            return 0.0, 0
        eval_steps = self.eval_steps or math.inf  # None without evaluations by steps; below 1 a share of the run
        eval_steps *= num_steps if eval_steps < 1 else 1
        every = {IntervalStrategy.NO: math.inf, IntervalStrategy.STEPS: eval_steps}
        steps_per_evaluation = every.get(self.eval_strategy, num_steps / max(1.0, args.num_train_epochs))
        num_evaluations = 1 + int(num_steps / steps_per_evaluation)
        num_rows = min(len(dataset), args.eval_batch_size * args.world_size)
        judge, trainer.judge_encoder = trainer.judge_encoder, None
        started = time.perf_counter()
        trainer.evaluate(torch.utils.data.Subset(dataset, range(num_rows)))
        seconds = (time.perf_counter() - started) * len(dataset) / num_rows
        if judge is not None:
            started = time.perf_counter()
            judge()
            seconds += time.perf_counter() - started
        return num_evaluations * seconds, num_evaluations
