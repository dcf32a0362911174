"""What a process sets up before it trains: logging, threads, memory, and that it is not alone by mistake."""

import ctypes
import logging
import os
import platform
import shlex
import sys
from pathlib import Path

import datasets
import torch
import transformers
from transformers import TrainingArguments

from ..corpus.command_line import available_cores


logger = logging.getLogger(__name__)

CPU_CONFIG = Path(__file__).parents[1] / "configs" / "accelerate" / "cpu.yaml"  # it is in the package, too


def set_up_logging(args: TrainingArguments) -> None:
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    level = args.get_process_log_level()
    is_ours_to_choose = args.should_log and args.log_level == "passive"
    for name in ("tjepa", "__main__"):  # the package, and a script started as a file
        logging.getLogger(name).setLevel(logging.INFO if is_ours_to_choose else level)
    transformers.utils.logging.set_verbosity(level)
    transformers.utils.logging.disable_progress_bar()  # of reading and writing a file of weights
    if args.process_index != 0 or not sys.stderr.isatty():
        datasets.disable_progress_bars()


def hide_what_loading_says() -> None:
    """For a command that loads a model only to use it: a head that is left out is not news there."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def check_number_of_processes(args: TrainingArguments) -> None:
    """
    Raises:
        ValueError: if processes that were started together do not train together, or if `accelerate launch` was
            asked for several processes and started one.
    """
    num_started = int(os.environ.get("WORLD_SIZE", 1))
    if num_started != args.world_size:
        raise ValueError(
            f"The launcher started {num_started} processes, but this one trains in a group of {args.world_size}. "
            f"Start them with accelerate launch --config_file and a file of {CPU_CONFIG.parent}, or with torchrun; on "
            "the CPUs of a machine with GPUs pass --use_cpu, too."
        )
    # accelerate launch sets MASTER_ADDR for several processes only; a launcher that starts them sets WORLD_SIZE, too
    launched_by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ
    if launched_by_accelerate and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "accelerate launch was asked for several processes and started one: with distributed_type MULTI_CPU it "
            "leaves starting them to mpirun, and --cpu or distributed_type NO never start more than one. Use "
            f"--config_file {shlex.quote(str(CPU_CONFIG))}, or torchrun --nproc_per_node. (If one process is meant: "
            "--num_processes 1, and no MASTER_ADDR in the environment.)"
        )
    if args.world_size > 1:
        logger.info(f"{args.world_size} processes")


def default_device() -> torch.device:
    """Where a command reads with a model."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def use_all_cores(args: TrainingArguments) -> None:
    """
    `accelerate launch` gives a CPU process one thread unless told otherwise; a single process may have them all. More
    threads than cores that it may use only wait for each other, so what torch took from the machine's size is lowered.
    """
    launched_by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ
    is_limited = args.world_size == 1 and launched_by_accelerate and os.environ.get("OMP_NUM_THREADS") == "1"
    if is_limited or torch.get_num_threads() > available_cores():
        torch.set_num_threads(available_cores())


def keep_freed_memory() -> None:
    """
    Lets glibc keep what is freed. It hands large blocks back to the kernel and asks for them again, and a training
    step on the CPU, which makes and drops gigabytes of activations, spends up to a quarter of its time in page faults.
    """
    if platform.libc_ver()[0] == "glibc":
        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, -1)
