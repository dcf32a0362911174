"""What T-JEPA adds to an unmodified `transformers.Trainer`: the target encoder's moving average, the schedules, the
optimizer's parameter groups, and a monitor that makes a collapse visible; and a `TJEPATrainer` for many processes.

    trainer = Trainer(model, args, data_collator=DataCollatorForTJEPA(), train_dataset=DocumentDataset(dataset),
                      optimizers=create_optimizer_and_scheduler(model, args, num_training_steps=args.max_steps))
    add_tjepa_callbacks(trainer)
    trainer.train()

Nothing here reads or writes files.
"""

import math
from collections.abc import Iterator
from itertools import chain, islice, repeat

import torch
from accelerate.data_loader import BatchSamplerShard, IterableDatasetShard
from accelerate.utils import DistributedType, gather_object, parse_flag_from_env, reduce
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from ..modeling_tjepa import TJEPAForPreTraining
from .ema import EMACallback
from .health import HealthCallback
from .schedules import WeightDecayCallback


class EpochCallback(TrainerCallback):
    """
    Tells the dataset which epoch it is, so that every epoch draws new masks. (accelerate does so itself on one
    process, but not through the batch sampler of several.) And keeps accelerate from splitting a stream that is split.
    """

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        shard = train_dataloader.dataset
        if isinstance(shard, IterableDatasetShard) and getattr(shard.dataset, "world_size", 1) > 1:
            # a stream of which every process reads its own share: accelerate must not take a part of that part
            shard.num_processes, shard.process_index = 1, 0

    def on_epoch_begin(self, args, state: TrainerState, control: TrainerControl, train_dataloader=None, **kwargs):
        train_dataloader.dataset.set_epoch(int(state.epoch))


class EvaluationRandomStateCallback(TrainerCallback):
    """
    Gives training its random state back after an evaluation: opening a DataLoader draws a seed, and with dropout the
    steps after it would differ from those of a run without evaluation. Must come after the Trainer's own callbacks,
    which decide whether to evaluate.
    """

    def __init__(self):
        self._fork = None

    def _on_end(self, args, state, control: TrainerControl, **kwargs):
        if control.should_evaluate and self._fork is None:
            self._fork = torch.random.fork_rng()
            self._fork.__enter__()

    on_step_end = on_epoch_end = _on_end

    def on_evaluate(self, args, state, control, **kwargs):
        if self._fork is not None:
            self._fork.__exit__(None, None, None)
            self._fork = None


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


class UnpaddedBatchSamplerShard(BatchSamplerShard):
    """
    A process's batches of an epoch, as many on every process: where the last round has too few, an empty batch fills
    the place. (accelerate fills it with documents of the epoch's beginning, which then count twice.)
    """

    def __len__(self) -> int:
        batches = len(self.batch_sampler)
        return batches // self.num_processes if self.drop_last else math.ceil(batches / self.num_processes)

    def __iter__(self) -> Iterator[list[int]]:
        share = islice(self.batch_sampler, self.process_index, None, self.num_processes)
        return islice(chain(share, repeat([])), len(self))


class UnpaddedIterableDatasetShard(IterableDatasetShard):
    """The same for a stream that all processes read: `None` fills a place for which there is no document."""

    def __iter__(self) -> Iterator[dict | None]:
        documents, first = iter(self.dataset), self.process_index * self.batch_size
        while documents_of_round := list(islice(documents, self.num_processes * self.batch_size)):
            missing = self.num_processes * self.batch_size - len(documents_of_round)
            if missing and self.drop_last:
                return
            yield from (documents_of_round + [None] * missing)[first : first + self.batch_size]


def without_repeated_documents(dataloader: torch.utils.data.DataLoader) -> torch.utils.data.DataLoader:
    """Makes the above of accelerate's classes: torch lets nobody exchange a DataLoader's dataset or sampler."""
    if isinstance(dataloader.batch_sampler, BatchSamplerShard):
        dataloader.batch_sampler.__class__ = UnpaddedBatchSamplerShard
    elif isinstance(dataloader.dataset, IterableDatasetShard):
        dataloader.dataset.__class__ = UnpaddedIterableDatasetShard
    return dataloader


class TJEPATrainer(Trainer):
    """
    A Trainer for which an optimizer step is the same however its documents are divided: over processes (DDP, FSDP2,
    DeepSpeed), over micro-batches (gradient accumulation), evenly or not. A strategy's loss is its mean over all slots
    of the step; an evaluation's loss that over all slots of a round of batches. Only the variance/covariance term
    and SIGReg, which are no sums over tokens, are computed for each micro-batch (of all processes) and averaged, and
    denoising draws the tokens it replaces anew in each process and micro-batch.

    On one process without gradient accumulation an unmodified Trainer does the same.
    """

    def create_accelerator_and_postprocess(self) -> None:
        # accelerate shards on GPUs only; on CPUs it would go on without a word, each process with the whole model
        state = self.args.distributed_state
        wants_fsdp = self.args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP")
        if wants_fsdp and state.distributed_type == DistributedType.MULTI_CPU:
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

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True):
        if self.is_fsdp_enabled:
            return self.accelerator.autocast()
        return super().autocast_smart_context_manager(cache_enabled)

    def _prepare_for_training(self, *args, **kwargs):
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.is_fsdp_enabled and self.model.token_head is not None:
            # the token head reads the input embedding after the encoder is done with it
            self.model.get_input_embeddings().set_reshard_after_forward(False)
        return prepared

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        return without_repeated_documents(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset=None) -> torch.utils.data.DataLoader:
        return without_repeated_documents(super().get_eval_dataloader(eval_dataset))

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """The batches of one optimizer step, as many on every process: a share that ends early adds empty batches."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if isinstance(self.train_dataset, torch.utils.data.IterableDataset):
            # it may divide itself, unequally; to know makes a GPU wait once a step
            longest = int(reduce(torch.tensor(len(batches), device=device), reduction="max"))
            batches += [self._prepare_inputs(self.data_collator([])) for _ in range(longest - len(batches))]
        if batches:
            self._join(batches)
        else:
            self.control.should_epoch_stop = True
        return batches, num_items

    def prediction_step(self, model, inputs: dict, prediction_loss_only: bool, ignore_keys: list[str] | None = None):
        inputs = self._prepare_inputs(inputs)
        self._join([inputs])
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        return reduce(loss, reduction="mean"), logits, labels

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.is_fsdp_enabled:
            # FSDP2 derives a class of its own from the model's; a checkpoint is to name ours and to hold its code
            for name in ("__name__", "__module__"):
                setattr(type(self.model), name, getattr(TJEPAForPreTraining, name))
        super().save_model(output_dir, _internal_call)

    def _join(self, batches: list[dict]) -> None:
        """Makes one batch of the batches of all processes, as far as the loss is concerned."""
        slots_per_strategy = sum(batch["slots_per_strategy"] for batch in batches) / len(batches)
        slots_per_strategy = reduce(slots_per_strategy, reduction="mean")
        for batch in batches:
            batch["slots_per_strategy"] = slots_per_strategy
            if self.args.world_size > 1:
                batch["sum_over_processes"] = SumOverProcesses.apply


class ResumeStateCallback(TrainerCallback):
    """
    Keeps in `trainer_state.json` what the Trainer forgets between two starts: the loss summed up since the last log
    line, and how far every worker of every process has read a streaming dataset. Must come after the Trainer's own
    callbacks, which decide whether to log and to save.
    """

    KEY = "ResumeState"

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self._stream = None

    def on_train_begin(self, args, state: TrainerState, control, train_dataloader=None, **kwargs):
        saved = state.stateful_callbacks.get(self.KEY)
        if saved is not None and saved["unlogged_steps"]:
            self._trainer._globalstep_last_logged -= saved["unlogged_steps"]
            self._trainer._tr_loss += saved["unlogged_loss"]
            self._trainer._total_loss_scalar -= saved["unlogged_loss"]  # train_loss is that of this start only
        dataset = train_dataloader.dataset
        is_sharded = isinstance(dataset, IterableDatasetShard)  # reads the documents of all processes, keeps its own
        self._stream = dataset.dataset if is_sharded else dataset
        if hasattr(self._stream, "remember_positions"):
            self._stream.remember_positions(
                num_workers=args.dataloader_num_workers,
                documents_per_batch=args.train_batch_size * (dataset.num_processes if is_sharded else 1),
                num_batches=(args.dataloader_prefetch_factor or 2) + 2,  # how far a worker may be ahead
            )
            num_skipped = 0 if args.ignore_data_skip else state.global_step * args.gradient_accumulation_steps
            self._batches_before = num_skipped - state.global_step * args.gradient_accumulation_steps
            if saved is not None:
                self._stream.load_state_dict(saved["streams"], num_skipped)

    def on_step_end(self, args, state: TrainerState, control: TrainerControl, **kwargs):
        if not (control.should_save or control.should_evaluate):
            return
        loss, num_steps, streams = 0.0, 0, [None]
        if not control.should_log:  # else the sum starts anew before the checkpoint is written
            num_steps = state.global_step - self._trainer._globalstep_last_logged
            loss = self._trainer.accelerator.gather(self._trainer._tr_loss).mean().item()
        if hasattr(self._stream, "state_dict"):
            # a stream is one endless epoch
            num_batches = self._batches_before + state.global_step * args.gradient_accumulation_steps
            streams = gather_object([self._stream.state_dict(num_batches)])
        state.stateful_callbacks[self.KEY] = {
            "unlogged_steps": num_steps,
            "unlogged_loss": loss,
            "streams": streams,
        }

    on_epoch_end = on_step_end


def add_tjepa_callbacks(
    trainer: Trainer,
    strategy_names: list[str],
    ema: EMACallback | None = None,
    weight_decay: WeightDecayCallback | None = None,
    health: HealthCallback | None = None,
) -> HealthCallback:
    """
    Adds everything above to a Trainer. The callbacks go first in its list: what they add to a log line reaches those
    that come later, such as the TensorBoard writer. (`EMACallback` alone also works through `callbacks=[...]`.)

    Returns:
        The `HealthCallback`, which knows the latest verdict.
    """
    health = health or HealthCallback(strategy_names)
    health.watch(trainer.model)
    callbacks = [ema or EMACallback(), EpochCallback(), health]
    if weight_decay is not None:
        callbacks.append(weight_decay)
    trainer.callback_handler.callbacks[:0] = callbacks
    trainer.add_callback(EvaluationRandomStateCallback())
    trainer.add_callback(ResumeStateCallback(trainer))
    return health
