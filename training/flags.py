"""Every flag of transformers' `TrainingArguments`: whether it works here, is refused, or has nothing to act on.

Notable: a flag of the installed version that is not in the table fails a test (tests/training/test_flags.py), and so
does one that does not do what the table says. docs/flags.md is this table; `python docs/write_flags.py` writes it.
"""

import logging
from dataclasses import MISSING, fields
from functools import partial
from typing import Literal, NamedTuple

import torch
from transformers import Trainer, TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations


logger = logging.getLogger(__name__)


class Rule(NamedTuple):
    """
    Args:
        status: `"works"`, `"refused"` (an error where it is not the default), or `"unused"` (a warning there).
        reason: why not, or what to know about a flag that works.
        refused_values: of a flag that works, values that are refused all the same, for the `reason`.
    """

    status: Literal["works", "refused", "unused"]
    reason: str = ""
    refused_values: tuple = ()


class Rules(NamedTuple):
    pretraining: Rule
    finetuning: Rule


works, refused, unused = (partial(Rule, status) for status in ("works", "refused", "unused"))


def both(rule: Rule) -> Rules:
    return Rules(rule, rule)


BOTH_WORK = both(works())
WORKING = """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate warmup_steps optim_args
    weight_decay adam_beta1 adam_beta2 adam_epsilon gradient_accumulation_steps max_grad_norm
    bf16 activation_checkpointing activation_checkpointing_kwargs
    torch_compile_backend torch_compile_mode neftune_noise_alpha logging_strategy logging_steps
    logging_first_step log_level disable_tqdm report_to eval_strategy eval_steps eval_delay
    per_device_eval_batch_size eval_on_start save_strategy save_steps save_total_limit push_to_hub hub_token
    hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision load_best_model_at_end
    metric_for_best_model greater_is_better ignore_data_skip full_determinism seed data_seed use_cpu
    dataloader_num_workers dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context train_sampling_strategy skip_memory_metrics do_train do_eval
"""
WORKING_WHERE = {
    "with several processes": """
        log_on_each_node log_level_replica save_on_each_node ddp_find_unused_parameters ddp_bucket_cap_mb
        ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config
    """,
    "on a GPU only": "tf32 torch_empty_cache_steps dataloader_pin_memory",
    "passed on to the reporting integration": "run_name project trackio_space_id trackio_bucket_id "
    "trackio_static_space_id",
}
TOKENS_SEEN = "counts the tokens of all documents; use true: packed rows hold no padding token to tell"
NO_METRICS = "an evaluation computes its figures batch by batch and keeps no predictions"
OWN_SCHEDULE = (
    "it steps each layer by itself or has a schedule of its own, and weight decay, learning rate and moving average "
    "here follow one schedule of optimizer steps"
)
OWN_SCHEDULE_OPTIMIZERS = (
    *("lomo", "adalomo", "galore_adamw_layerwise", "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise"),
    *("apollo_adamw_layerwise", "schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"),
)
NO_PARALLELISM = "packed rows cannot be cut between processes; use DDP, FSDP2 or DeepSpeed through accelerate"
KEEP_WEIGHTS = "it would cast the weights, of which the target encoder must stay in float32; use --bf16"

FLAGS: dict[str, Rules] = {
    **dict.fromkeys(WORKING.split(), BOTH_WORK),
    **{name: both(works(note)) for note, names in WORKING_WHERE.items() for name in names.split()},
    # how long, how fast
    "lr_scheduler_type": Rules(
        works("cosine, linear, constant, constant_with_warmup or warmup_stable_decay, after the warm-up"), works()
    ),
    "lr_scheduler_kwargs": Rules(works("num_decay_steps, of warmup_stable_decay"), works()),
    "optim": Rules(works(OWN_SCHEDULE, OWN_SCHEDULE_OPTIMIZERS), works()),
    "optim_target_modules": both(unused("only GaLore and APOLLO read it, which are packages of their own")),
    "average_tokens_across_devices": Rules(
        unused("a step's loss is always that of all its documents on all processes"),
        unused("the loss of a head is the mean over the rows of each process"),
    ),
    "label_smoothing_factor": Rules(
        refused("the targets are vectors: there are no classes to smooth"),
        works("of one class for each text, and tags"),
    ),
    "torch_compile": Rules(
        works(
            "each kind of layer and the token head by itself; refused with sdpa attention and for other architectures"
        ),
        works(),
    ),
    # numbers and memory
    "fp16": both(works("on a GPU only; on a CPU it is refused: --bf16 works there, too")),
    "bf16_full_eval": Rules(refused(KEEP_WEIGHTS), works()),
    "fp16_full_eval": Rules(refused(KEEP_WEIGHTS), works()),
    "gradient_checkpointing": both(works("the old name of activation_checkpointing")),
    "gradient_checkpointing_kwargs": both(works("the old name of activation_checkpointing_kwargs")),
    "use_liger_kernel": both(refused("Liger has no kernels for these encoders")),
    "liger_kernel_config": both(refused("Liger has no kernels for these encoders")),
    "use_cache": both(unused("an encoder has no cache")),
    # logs
    "logging_nan_inf_filter": Rules(refused("a loss that is not finite ends the run instead"), works()),
    "include_num_input_tokens_seen": Rules(works(TOKENS_SEEN, refused_values=("non_padding",)), works()),
    # evaluation
    "prediction_loss_only": Rules(unused(NO_METRICS), refused("the figures need the predictions")),
    "eval_do_concat_batches": Rules(unused(NO_METRICS), refused("the figures need the predictions in one piece")),
    "eval_use_gather_object": Rules(unused(NO_METRICS), refused("the predictions are tensors, gathered as such")),
    "eval_accumulation_steps": Rules(unused(NO_METRICS), works()),
    "include_for_metrics": both(unused("no figure here is computed from inputs or losses")),
    "batch_eval_metrics": Rules(unused(NO_METRICS), refused("F1 and correlations are not means over batches")),
    # checkpoints and the Hub
    "save_only_model": both(works("such a checkpoint cannot be resumed")),
    "enable_jit_checkpoint": both(refused("SIGTERM always finishes the step and saves a checkpoint here")),
    "resume_from_checkpoint": both(works("a folder, or 'last'")),
    "restore_callback_states_from_checkpoint": both(
        refused("it would restore the stop request of a run that a signal ended; all state is resumed without it")
    ),
    # random numbers and devices
    "accelerator_config": Rules(
        works("without split_batches and dispatch_batches, which are refused"),
        works("with several processes even_batches false is refused: they would wait for each other"),
    ),
    "auto_find_batch_size": both(works("in one process; where one of several runs out of memory, the others wait")),
    "parallelism_config": both(refused(NO_PARALLELISM)),
    "deepspeed": both(works("with the package deepspeed, in float32; never run in the tests")),
    "local_rank": both(unused("the launcher says which process this is")),
    # batches
    "dataloader_drop_last": both(works("of training batches; an evaluation sees every row")),
    "dataloader_in_order": both(refused("batches in the order in which workers finish cannot be repeated or resumed")),
    "remove_unused_columns": Rules(refused("it must stay false: the collator needs every column"), works()),
    "label_names": Rules(
        unused("the labels are the target encoder's outputs"), refused("the labels are in the column 'labels'")
    ),
    "length_column_name": both(unused("lengths are counted")),
    # the rest
    "debug": Rules(
        works("with a value it is transformers' flag; without one an error ends with its traceback"),
        refused("transformers' detector cannot read attention masks; without a value --debug shows tracebacks"),
    ),
    "do_predict": Rules(refused("there is no test split in pretraining"), works()),
}


LEAST = dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), 1)
LEAST |= dict.fromkeys(("seed", "data_seed", "weight_decay", "final_weight_decay", "dataloader_num_workers"), 0)


def check_flags(args: TrainingArguments) -> None:
    """
    For `__post_init__`, before anything else: flags that would have no effect, or another one than they promise.

    Args:
        args (`RunArguments`): as given; what differs from the defaults of its class was asked for. Its `KIND` is the
            column of the table.

    Raises:
        ValueError: naming the flags that are refused, and why.
    """
    problems = []
    for field in fields(args):
        rule = getattr(FLAGS.get(field.name, BOTH_WORK), args.KIND)
        value = getattr(args, field.name)
        default = field.default if field.default is not MISSING else field.default_factory()
        if rule.status == "works":
            if rule.refused_values and (chosen := getattr(value, "value", value)) in rule.refused_values:
                problems.append(f"--{field.name} {chosen} is refused: {rule.reason}")
        elif value not in (None, default):  # the parser makes None of a list's default
            if rule.status == "refused":
                problems.append(f"--{field.name} is refused: {rule.reason}")
            else:
                logger.warning(f"--{field.name} has no effect here: {rule.reason}.")
    for name, least in LEAST.items():
        value = getattr(args, name, None)
        if value is not None and value < least:
            problems.append(f"--{name} must be at least {least}, got {value}")
    if problems:
        raise ValueError("; ".join(problems) + ".")


def computes_in_bfloat16() -> bool:
    """Whether this processor has instructions for matrices in bfloat16; True, too, where that is not known."""
    cpu = getattr(torch.cpu, "get_capabilities", dict)()  # of newer versions of torch
    return cpu.get("architecture") != "x86_64" or cpu["amx_bf16"] or cpu["avx512_bf16"]


def check_packages(args: TrainingArguments) -> None:
    """
    Raises:
        ImportError: if what `--report_to` or `--optim` names needs a package that is not installed.
    """
    known = {*INTEGRATION_TO_CALLBACK} - {"flyte"}  # of which transformers does not say whether it is there
    if missing := sorted({*args.report_to} & known - {*get_available_reporting_integrations()}):
        raise ImportError(f"--report_to {' '.join(missing)} is not installed: install it, or pass --report_to none.")
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except ImportError as error:
        raise ImportError(f"--optim {args.optim.value}: {error}") from error
    except ValueError:  # some need the model, which is not there yet
        pass


def check_what_processes_share(args: TrainingArguments) -> None:
    """
    At the end of `__post_init__`, when the number of processes is known.

    Raises:
        ValueError: for a flag with which one of several processes may take other steps than the rest, which wait.
    """
    if args.world_size == 1:
        return
    if args.auto_find_batch_size:
        raise ValueError(
            f"--auto_find_batch_size is refused with {args.world_size} processes: where one of them runs out of "
            "memory, the others would wait for it. Find --per_device_train_batch_size with one process."
        )
    if args.KIND == "finetuning" and not args.accelerator_config.even_batches:
        raise ValueError(
            f"--accelerator_config: even_batches must stay true with {args.world_size} processes, of which one may "
            "have a batch more than another and would wait for it."
        )


def check_precision(args: TrainingArguments) -> None:
    """
    At the end of `__post_init__`, when the device is known. bfloat16 on a CPU without instructions for it is warned
    of: it works, and is slower.

    Raises:
        ValueError: for float16 on a CPU, which would have no effect.
    """
    if args.mixed_precision == "fp16" and args.device.type == "cpu":
        raise ValueError("--fp16 is refused on a CPU, which does not train in float16. Use --bf16, or leave it out.")
    if args.mixed_precision == "bf16" and args.device.type == "cpu" and not computes_in_bfloat16():
        logger.warning(
            "--bf16 will be many times slower than float32: this processor has no instructions for it (amx_bf16 or "
            "avx512_bf16). Leave it out."
        )
