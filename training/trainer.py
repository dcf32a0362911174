"""`TJEPATrainer`: a `transformers.Trainer` whose optimizer step is the same however its documents are divided.

    trainer = TJEPATrainer(model, args, data_collator=DataCollatorForTJEPA(), train_dataset=DocumentDataset(dataset))
    trainer.train()

It makes optimizer, schedules, moving average and health figures from its `PretrainingArguments`. An unmodified Trainer
needs `callbacks=[EMACallback()]` and nothing else, as long as one process makes its steps of one batch each.
"""

import copy
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from accelerate.data_loader import IterableDatasetShard
from accelerate.utils import DistributedType, DynamoBackend, parse_flag_from_env, reduce, send_to_device
from torch.distributed.fsdp import FSDPModule
from transformers import DefaultFlowCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, IntervalStrategy, SaveStrategy, has_length

from ..corpus.private import TrainerHooks, without_repeated_documents
from ..layers_tjepa import compile_layers
from ..modeling_tjepa import TJEPAForPreTraining
from .arguments import MOVES, TRAINED_ENCODER_MOVES, PretrainingArguments
from .ema import MAX_SHARE_OF_START, EMACallback
from .health import HealthMonitor
from .progress import PLAIN_PROGRESS, RunProgress, TokenClock
from .resuming import ResumeStateCallback, ScheduleStart, saved_schedule_start
from .schedules import WarmupThenDecay, WeightDecayCallback, split_heads


logger = logging.getLogger(__name__)

MIN_STEPS_TO_JUDGE = 20


class EpochCallback(TrainerCallback):
    """
    Tells the dataset which epoch it is, so that every epoch draws new masks. (accelerate does so itself on one
    process, but not through the batch sampler of several.) Before the first one it keeps what FSDP2 would take away.
    """

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        keep_embedding_for_token_head(model)

    def on_epoch_begin(self, args, state: TrainerState, control: TrainerControl, train_dataloader=None, **kwargs):
        if hasattr(train_dataloader.dataset, "set_epoch"):
            train_dataloader.dataset.set_epoch(int(state.epoch))

    def on_evaluate(self, args, state, control, train_dataloader=None, **kwargs):
        if train_dataloader is not None:  # accelerate counts the evaluations on a dataset, which may be this one
            self.on_epoch_begin(args, state, control, train_dataloader)


def keep_embedding_for_token_head(model: torch.nn.Module) -> None:
    """The token head reads the input embedding after the encoder is done with it, when FSDP2 has sharded it again."""
    if isinstance(model, FSDPModule) and model.token_head is not None:
        model.get_input_embeddings().set_reshard_after_forward(False)


def in_first_epoch(collator: Callable[[list], dict], examples: list[dict | None]) -> dict:
    """Every evaluation has epoch 0 and so the same masks, whatever epoch training has come to."""
    return collator([example and {**example, "epoch": 0} for example in examples])


class SumOverProcesses(torch.autograd.Function):
    """
    A tensor's sum over all processes. A process's part enters the loss of every process, so its gradient is the sum
    of theirs. (Of torch's own two differentiable all-reduces one is deprecated and the other private.)
    """

    @staticmethod
    def forward(ctx, tensor: torch.Tensor) -> torch.Tensor:
        return reduce(tensor, reduction="sum")

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return reduce(gradient, reduction="sum")


def wants_fsdp(args: TrainingArguments) -> bool:
    """Whether the model will be sharded, as far as flags and launcher say."""
    return bool(args.fsdp) or parse_flag_from_env("ACCELERATE_USE_FSDP")


@contextmanager
def dataloaders_for_evaluation(args: TrainingArguments) -> Iterator[None]:
    """What is evaluated, or predicted, is all that there is, in its order: these flags are for training."""
    given = args.dataloader_drop_last, args.train_sampling_strategy
    args.dataloader_drop_last, args.train_sampling_strategy = False, "sequential"
    try:
        yield
    finally:
        args.dataloader_drop_last, args.train_sampling_strategy = given


def check_batches(loader: torch.utils.data.DataLoader, args: TrainingArguments) -> None:
    """Raises a `ValueError` if `dataloader_drop_last` leaves no batch to train on."""
    if args.dataloader_drop_last and has_length(loader) and len(loader) == 0:
        raise ValueError(
            f"--dataloader_drop_last drops all there is: {len(loader.dataset):,} rows do not fill a batch of "
            f"{args.train_batch_size} on {args.world_size} processes. Leave it out, or take a lower "
            "--per_device_train_batch_size."
        )


class TJEPATrainer(TrainerHooks, Trainer):
    """
    A Trainer for which an optimizer step is the same however its documents are divided: over processes (DDP, FSDP2,
    DeepSpeed), over micro-batches (gradient accumulation), evenly or not. A strategy's loss is its mean over all slots
    of the step; an evaluation's loss that over all slots of the evaluation set. Only the variance/covariance term
    and SIGReg, which are not sums over tokens, are computed for each micro-batch (of all processes) and averaged; the
    pooled and the segment term choose among the texts of their own micro-batch and process, so these decide how hard
    that is; and denoising draws the tokens it replaces anew in each process and micro-batch.

    An evaluation has the masks of epoch 0, sees every row, leaves training's random state as it was, and judges the
    health of the representations (`trainer.health.verdict`).

    Args:
        model (`TJEPAForPreTraining`): what is trained.
        args (`PretrainingArguments`): optimizer, schedules, moving average and all that a Trainer takes.
        data_collator (`DataCollatorForTJEPA`): its strategies name the losses in the log.
        others: as in `Trainer`, but for functions of losses and metrics. With an optimizer of your own weight decay
            stays as it is there. An `EMACallback` among `callbacks` takes the place of the one that `args` describe.
    """

    def __init__(self, model=None, args: PretrainingArguments | None = None, *other_args, **kwargs):
        super().__init__(model, args, *other_args, **kwargs)
        args = self.args
        for name in ("compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"TJEPATrainer takes no {name}: the model computes its losses, and an evaluation keeps no "
                    "predictions. Set trainer.judge_encoder to a function that returns further figures."
                )
        if not isinstance(args, PretrainingArguments) or not hasattr(self.data_collator, "strategies"):
            raise ValueError(
                "TJEPATrainer needs PretrainingArguments as args and a DataCollatorForTJEPA as data_collator, got "
                f"{type(args).__name__} and {type(self.data_collator).__name__}."
            )
        if args.stop_on_collapse and isinstance(self.eval_dataset, dict):
            raise ValueError(
                "stop_on_collapse judges one evaluation set, and eval_dataset has several: "
                f"{', '.join(self.eval_dataset)}. Leave it out, or give one."
            )
        self._compile_layers()
        names = [strategy.name for strategy in self.data_collator.strategies]
        self.health = HealthMonitor(names, self.model.config, args.stop_on_collapse, args.collapse_patience)
        self.judge_encoder: Callable[[], dict[str, float]] | None = None  # more figures for every evaluation
        self.latest_evaluation: tuple[int | None, dict[str, float]] = (None, {})  # its step, and what came out
        self._evaluation = None
        self._given_optimizer, self._given_scheduler = self.optimizer, self.lr_scheduler
        self.ema = next((c for c in self.callback_handler.callbacks if isinstance(c, EMACallback)), None)
        if self.ema is None:
            self.ema = args.create_ema()
            self.add_callback(self.ema)
        self.weight_decay = WeightDecayCallback(args.weight_decay, args.final_weight_decay, args.schedule_stretch)
        self.resume_state = ResumeStateCallback(self)
        self.schedule_start = ScheduleStart()
        self.new_schedule_start: ScheduleStart | None = None  # for the next start of training (`plan_extension`)
        self.token_clock = TokenClock()
        ours = [] if self._given_optimizer is not None else [self.weight_decay]
        for callback in (*ours, EpochCallback(), self.resume_state, self.token_clock):
            self.add_callback(callback)
        for plain in [c for c in self.callback_handler.callbacks if type(c) in PLAIN_PROGRESS]:
            self.remove_callback(plain)
            self.add_callback(RunProgress(show_bar=not args.disable_tqdm))

    # The accelerator and the model on it

    def create_accelerator_and_postprocess(self) -> None:
        # accelerate shards on GPUs only; on CPUs it would go on without a word, each process with the whole model
        state = self.args.distributed_state
        if wants_fsdp(self.args) and state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.MULTI_GPU  # the device stays the CPU
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled:
            # autocast instead, as without FSDP: its policy casts what goes into a module, rotary angles and numbers of
            # slots included, and bfloat16 cannot tell position 257 from 258
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = None
        if self.is_deepspeed_enabled and self.accelerator.mixed_precision != "no":
            raise ValueError(
                f"DeepSpeed with {self.accelerator.mixed_precision} holds the target encoder in that type, too, and "
                "its moving average would lose its updates to rounding. Train in float32 (mixed_precision: no), or "
                "take configs/accelerate/fsdp2.yaml, which keeps float32 weights under bf16."
            )

    def _compile_layers(self) -> None:
        """
        `--torch_compile`: each kind of layer by itself. One graph of the whole model takes minutes, and with
        flex_attention and torch 2.11 it ended in an illegal memory access.
        """
        plugin = self.accelerator.state.dynamo_plugin
        if plugin.backend != DynamoBackend.NO:
            compile_layers(self.model, **plugin.to_kwargs())
            plugin.backend = DynamoBackend.NO  # nothing is left to do for accelerate

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True):
        if self.is_fsdp_enabled:
            return self.accelerator.autocast()
        return super().autocast_smart_context_manager(cache_enabled)

    def _prepare_model_for_evaluation(self) -> None:
        """FSDP2 shards a model only together with its optimizer, and an evaluation before any training has none."""
        if self.is_fsdp_enabled and not isinstance(self.model, FSDPModule):
            self.create_optimizer()
            self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
            self.model_wrapped = self.model
            keep_embedding_for_token_head(self.model)

    # Optimizer and schedules, made for every start of training: a second one may have another number of steps

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Matrices only: never biases, norms, the mask token or any other 1-D parameter."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        self.optimizer = self._given_optimizer
        optimizer = super().create_optimizer(model)
        if self.args.head_learning_rate is not None and self._given_optimizer is None:
            encoder = (self.model if model is None else model).context_encoder
            split_heads(optimizer, encoder, self.args.head_learning_rate)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        args = self.args
        start = self.schedule_start = self.new_schedule_start or saved_schedule_start(self.state)
        self.ema.first_step = self.weight_decay.first_step = start.first_step
        num_schedule_steps = num_training_steps - start.first_step
        if args.ema_momentum is None:
            self.ema.momentum = max(0.0, 1.0 - TRAINED_ENCODER_MOVES / num_schedule_steps)
        self._warn_of_still_target(num_training_steps)
        optimizer = self.optimizer if optimizer is None else optimizer
        start_lr, final_lr = args.rates_around(optimizer.defaults["lr"])  # of an optimizer or a search, not of args
        num_heads_first_steps = 0
        if not start.first_step and any(group.get("is_head") for group in optimizer.param_groups):
            num_heads_first_steps = int((args.heads_first_ratio or 0.0) * num_schedule_steps)
        self.lr_scheduler = self._given_scheduler or WarmupThenDecay(
            optimizer,
            num_schedule_steps,
            args.get_warmup_steps(num_schedule_steps),
            start_lr if start.start_lr is None else start.start_lr,
            final_lr,
            args.schedule_stretch,
            args.lr_scheduler_type.value,
            first_step=start.first_step,
            num_heads_first_steps=num_heads_first_steps,
            **(args.lr_scheduler_kwargs or {}),
        )
        # a checkpoint holds the intervals of the run that wrote it
        self.state.compute_steps(args, num_training_steps)
        return self.lr_scheduler

    def _warn_of_still_target(self, max_steps: int) -> None:
        """Warns of a target encoder that hardly moves, whose labels are those of the encoder at the start."""
        num_steps, share = max_steps - self.ema.first_step, self.ema.share_of_start(max_steps)
        if share == 1.0 and self.model.config.encoder is None:
            logger.warning(
                "The target encoder is frozen. It is what AutoModel loads from the run's folder, and what is judged: "
                'for the encoder that is trained pass encoder="context" to from_pretrained.'
            )
        if num_steps >= MIN_STEPS_TO_JUDGE and MAX_SHARE_OF_START < share < 1.0:
            logger.warning(
                f"The target encoder hardly moves in {num_steps} steps: {share:.0%} of it will be what it starts as. "
                f"Lower --ema_momentum ({self.ema.momentum:.5g}), say to {max(0.0, 1.0 - MOVES / num_steps):.4g}, or "
                "freeze it with --ema_momentum 1."
            )

    # Batches

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """
        Raises:
            ValueError: if `dataloader_drop_last` leaves no batch.
        """
        loader = without_repeated_documents(super().get_train_dataloader())
        if self.args.dataloader_persistent_workers:
            # Workers draw a seed when they start, which no batch depends on. Persistent ones start once, but after a
            # resume once more: the seed must not come from the generator that dropout draws from.
            getattr(loader, "base_dataloader", loader).generator = torch.Generator()
        shard = loader.dataset
        if isinstance(shard, IterableDatasetShard) and getattr(shard.dataset, "world_size", 1) > 1:
            # a stream of which every process reads its own share: accelerate must not take a part of that part
            shard.num_processes, shard.process_index = 1, 0
        check_batches(loader, self.args)
        return loader

    def get_eval_dataloader(self, eval_dataset=None) -> torch.utils.data.DataLoader:
        with self._for_evaluation():
            return without_repeated_documents(super().get_eval_dataloader(eval_dataset))

    def get_test_dataloader(self, test_dataset) -> torch.utils.data.DataLoader:
        with self._for_evaluation():
            return without_repeated_documents(super().get_test_dataloader(test_dataset))

    @contextmanager
    def _for_evaluation(self) -> Iterator[None]:
        collator, self.data_collator = self.data_collator, partial(in_first_epoch, self.data_collator)
        try:
            with dataloaders_for_evaluation(self.args):
                yield
        finally:
            self.data_collator = collator

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """The batches of one optimizer step, as many on every process: a share that ends early adds empty batches."""
        self.health.step_statistics = self.health.new_statistics() if self._will_log_next_step() else None
        self.token_clock.resume()
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if isinstance(self.train_dataset, torch.utils.data.IterableDataset):
            # it may divide itself unequally; asking makes a GPU wait once a step
            longest = int(reduce(torch.tensor(len(batches), device=device), reduction="max"))
            batches += [send_to_device(self.data_collator([]), device) for _ in range(longest - len(batches))]
        self.token_clock.count(batches)
        if batches:
            self._share_slot_counts(batches)
        else:
            self.control.should_epoch_stop = True
        return batches, num_items

    def _will_log_next_step(self) -> bool:
        args, state = self.args, copy.copy(self.state)
        state.global_step += 1
        if DefaultFlowCallback().on_step_end(args, state, TrainerControl()).should_log:
            return True
        loader = self.callback_handler.train_dataloader
        steps_per_epoch = math.ceil(len(loader) / args.gradient_accumulation_steps) if has_length(loader) else math.inf
        ends_epoch = state.global_step % max(1, steps_per_epoch) == 0 or state.global_step >= state.max_steps
        return args.logging_strategy == IntervalStrategy.EPOCH and ends_epoch

    def _share_slot_counts(self, batches: list[dict]) -> None:
        """Makes one batch of a step's batches on all processes, as far as means over target slots are concerned."""
        slots_per_strategy = sum(batch["slots_per_strategy"] for batch in batches) / len(batches)
        slots_per_strategy = reduce(slots_per_strategy, reduction="mean")
        for batch in batches:
            batch["slots_per_strategy"] = slots_per_strategy

    # Loss and health

    def compute_loss(self, model, inputs: dict, return_outputs: bool = False, num_items_in_batch=None):
        is_shared = self.args.world_size > 1
        outputs = model(**inputs, sum_over_processes=SumOverProcesses.apply if is_shared else None)
        if model.training:
            self.health.watch("loss", outputs.loss, self.state.global_step + 1)
            statistics = self.health.step_statistics
        else:
            statistics = self._evaluation
        if statistics is not None:
            statistics.update(outputs, inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.resume_state.unlogged_loss += loss
        return loss

    def on_gradient_norm(self, norm: torch.Tensor | float) -> None:
        value = norm.full_tensor() if hasattr(norm, "full_tensor") else torch.as_tensor(norm)
        self.health.watch("gradient", value, self.state.global_step + 1, is_fatal=self.accelerator.scaler is None)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds to a line about training what T-JEPA knows of the step that it is about."""
        self.health.raise_if_not_finite()
        if "loss" in logs:
            logs["loss"] = self.resume_state.take_loss()  # that of a checkpoint's steps included
            step, max_steps = self.state.global_step - 1, self.state.max_steps
            logs["ema_momentum"] = self.ema.at(step, max_steps)
            if self._given_optimizer is None:
                logs["weight_decay"] = self.weight_decay.at(step, max_steps)
            if self.health.step_statistics is not None:
                figures = self.health.step_statistics.summary()
                logs.update({name: value for name, value in figures.items() if name != "loss"})
                self.health.step_statistics = None
            logs["tokens_per_second"] = self.token_clock.take(lambda n: reduce(n.to(self.args.device), "sum"))
            counts = [line["nonfinite_gradients"] for line in self.state.log_history if "nonfinite_gradients" in line]
            logs.update(self.health.count_nonfinite_gradients(counts[-1] if counts else 0))
        super().log(logs, start_time)

    # Evaluation

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """As in `Trainer`, with the health figures among the metrics, and the verdict over them."""
        self.health.raise_if_not_finite()
        on_gpu = self.args.device.type == "cuda"
        # opening a DataLoader draws a seed, and with dropout the steps after it would differ
        with torch.random.fork_rng([self.args.device] if on_gpu else []):
            metrics = super().evaluate(*args, **kwargs)
        state = self.state
        self.latest_evaluation = (state.global_step, metrics)
        self.health.judge(metrics, state, self.args.get_warmup_steps(state.max_steps), self.is_in_train)
        if self.health.must_stop:
            self.control.should_training_stop, self.control.should_save = True, False
            self.args.save_strategy = SaveStrategy.NO  # nor at the end of the epoch, nor as the best
        return metrics

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        self._prepare_model_for_evaluation()
        self._evaluation = self.health.new_statistics()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        figures, self._evaluation = self._evaluation.summary(), None
        if self.judge_encoder is not None:
            figures |= self.judge_encoder()
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in figures.items()})
        return output

    def prediction_step(self, model, inputs: dict, prediction_loss_only: bool, ignore_keys: list[str] | None = None):
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, send_to_device(inputs, self.args.device)), None, None

    # Saving and loading

    def on_missing_weights(self, names: set[str]) -> None:
        raise ValueError(
            f"The checkpoint lacks {len(names)} weights of this model, such as {min(names)}, and cannot be resumed. "
            "Its folder as --model_name_or_path starts a new run from it, if it can be loaded."
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self.health.raise_if_not_finite()
        if _internal_call:
            self.resume_state.collect()
        if self.is_fsdp_enabled:
            # FSDP2 derives a class of its own from the model's; a checkpoint is to name ours and to hold its code
            for name in ("__name__", "__module__"):
                setattr(type(self.model), name, getattr(TJEPAForPreTraining, name))
        super().save_model(output_dir, _internal_call)
