"""What T-JEPA adds to an unmodified `transformers.Trainer`: the target encoder's moving average, the schedules, the
optimizer's parameter groups, and a monitor that makes a collapse visible; and a `TJEPATrainer` for many processes.

    trainer = Trainer(model, args, data_collator=DataCollatorForTJEPA(), train_dataset=DocumentDataset(dataset),
                      optimizers=create_optimizer_and_scheduler(model, args, num_training_steps=args.max_steps))
    add_tjepa_callbacks(trainer)
    trainer.train()

Nothing here reads or writes files.
"""

import math
import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from itertools import chain, islice, repeat
from typing import Literal

import torch
from accelerate import PartialState
from accelerate.data_loader import BatchSamplerShard, IterableDatasetShard
from accelerate.utils import DistributedType, gather_object, parse_flag_from_env, reduce
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from .modeling_tjepa import TJEPAForPreTraining, TJEPAForPreTrainingOutput


logger = logging.get_logger(__name__)

# data2vec 2.0 (arXiv 2212.07525) stops below this; centred RankMe under MIN_RANK is a warning, not a verdict
MIN_TARGET_STD = 0.1
MIN_RANK = 0.1
COLLAPSE_PATIENCE = 3  # evaluations in a row, for a collapse to be called lasting


# --- Schedules and optimizer -----------------------------------------------------------------------------------------


def linear_schedule(start: float, end: float, progress: float) -> float:
    return start + min(progress, 1.0) * (end - start)


def cosine_schedule(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


EMA_SCHEDULES = {"linear": linear_schedule, "cosine": cosine_schedule}


def learning_rate_factor(
    step: int, start_factor: float, final_factor: float, num_warmup_steps: int, num_schedule_steps: float
) -> float:
    if step < num_warmup_steps:
        return linear_schedule(start_factor, 1.0, step / num_warmup_steps)
    return cosine_schedule(
        1.0, final_factor, (step - num_warmup_steps) / max(1.0, num_schedule_steps - num_warmup_steps)
    )


def get_lr_scheduler(
    optimizer: torch.optim.Optimizer,
    num_training_steps: int,
    num_warmup_steps: int,
    start_lr: float = 0.0,
    final_lr: float = 0.0,
    ipe_scale: float = 1.0,
) -> LambdaLR:
    """
    I-JEPA's learning rate: linear from `start_lr` to the optimizer's rate over the warm-up, then cosine to `final_lr`
    at `ipe_scale * num_training_steps`. (transformers' cosine schedules start their warm-up at zero, or are off by one
    step.)
    """
    lr = optimizer.defaults["lr"]
    return LambdaLR(
        optimizer,
        partial(
            learning_rate_factor,
            start_factor=start_lr / lr,
            final_factor=final_lr / lr,
            num_warmup_steps=num_warmup_steps,
            num_schedule_steps=ipe_scale * num_training_steps,
        ),
    )


def create_optimizer(model: torch.nn.Module, args: TrainingArguments) -> torch.optim.Optimizer:
    """
    The Trainer's own optimizer of `args.optim` with weight decay on matrices only: never on biases, norms, the mask
    token or any other 1-D parameter. Parameters without gradient (the target encoder) are not in it.
    """
    optimizer_class, optimizer_kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return optimizer_class(groups, **optimizer_kwargs)


class WeightDecayCallback(TrainerCallback):
    """
    Weight decay from its value in the optimizer *up* to `final_weight_decay`, along a cosine over
    `ipe_scale * max_steps` optimizer steps; groups without decay keep none.
    """

    def __init__(self, weight_decay: float = 0.04, final_weight_decay: float = 0.4, ipe_scale: float = 1.0):
        self.weight_decay = weight_decay
        self.final_weight_decay = final_weight_decay
        self.ipe_scale = ipe_scale

    def at(self, step: int, max_steps: int) -> float:
        return cosine_schedule(self.weight_decay, self.final_weight_decay, step / (self.ipe_scale * max_steps))

    def on_step_begin(self, args, state: TrainerState, control: TrainerControl, optimizer=None, **kwargs):
        for group in optimizer.param_groups:
            if group["weight_decay"] > 0.0:
                group["weight_decay"] = self.at(state.global_step, state.max_steps)

    def on_log(self, args, state: TrainerState, control: TrainerControl, logs=None, **kwargs):
        if "learning_rate" in logs:
            add_to_log(state, logs, {"weight_decay": self.at(state.global_step - 1, state.max_steps)})


class EMACallback(TrainerCallback):
    """
    Moves the target encoder after every optimizer step t = 0, 1, ... (never on a micro-step):

        m_t = m_0 + t/T * (m_1 - m_0),   T = ipe_scale * max_steps
        target <- m_t * target + (1 - m_t) * context

    With the schedule `"cosine"` (BYOL, arXiv 2006.07733) m_t = m_1 - (m_1 - m_0) * (1 + cos(pi t/T)) / 2 instead. Of
    either the momentum stays at m_1 after `anneal_ratio * T` steps, which then stand for T above (data2vec, arXiv
    2202.03555, is linear up to a third of the steps or less).

    The momentum depends on the step only, so it is right after a resume and the same on every process.

    Args:
        momentum (`float`, defaults to 0.996): m_0.
        final_momentum (`float`, defaults to 1.0): m_1.
        ipe_scale (`float`, defaults to 1.0): stretches the schedule beyond the end of training.
        schedule (`str`, defaults to `"linear"`): `"linear"` or `"cosine"`.
        anneal_ratio (`float`, defaults to 1.0): share of T after which the momentum is m_1, in (0, 1].

    Raises:
        ValueError: for a momentum outside [0, 1], a ratio outside (0, 1] and an unknown schedule.
    """

    def __init__(
        self,
        momentum: float = 0.996,
        final_momentum: float = 1.0,
        ipe_scale: float = 1.0,
        schedule: Literal["linear", "cosine"] = "linear",
        anneal_ratio: float = 1.0,
    ):
        for name, value in (("momentum", momentum), ("final_momentum", final_momentum)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"EMACallback: {name} must be in [0, 1], got {value}.")
        if schedule not in EMA_SCHEDULES:
            raise ValueError(f"EMACallback: schedule must be one of {', '.join(EMA_SCHEDULES)}, got {schedule!r}.")
        if not 0.0 < anneal_ratio <= 1.0:
            raise ValueError(f"EMACallback: anneal_ratio must be in (0, 1], got {anneal_ratio}.")
        self.momentum = momentum
        self.final_momentum = final_momentum
        self.ipe_scale = ipe_scale
        self.schedule = EMA_SCHEDULES[schedule]
        self.anneal_ratio = anneal_ratio

    def at(self, step: int, max_steps: int) -> float:
        progress = step / (self.ipe_scale * self.anneal_ratio * max_steps)
        return self.schedule(self.momentum, self.final_momentum, progress)

    def on_optimizer_step(self, args, state: TrainerState, control: TrainerControl, model=None, **kwargs):
        # Fires once per optimizer step, before global_step counts up: global_step is t.
        model.update_target_encoder(self.at(state.global_step, state.max_steps))

    def on_log(self, args, state: TrainerState, control: TrainerControl, logs=None, **kwargs):
        if "learning_rate" in logs:
            add_to_log(state, logs, {"ema_momentum": self.at(state.global_step - 1, state.max_steps)})


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


# --- Many processes --------------------------------------------------------------------------------------------------


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


# --- Resuming and stopping -------------------------------------------------------------------------------------------


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
            if saved is not None:
                streams = saved["streams"]
                self._stream.load_state_dict(streams[args.process_index] if len(streams) == args.world_size else None)

    def on_step_end(self, args, state: TrainerState, control: TrainerControl, **kwargs):
        if not (control.should_save or control.should_evaluate):
            return
        loss, num_steps, streams = 0.0, 0, [None]
        if not control.should_log:  # else the sum starts anew before the checkpoint is written
            num_steps = state.global_step - self._trainer._globalstep_last_logged
            loss = self._trainer.accelerator.gather(self._trainer._tr_loss).mean().item()
        if hasattr(self._stream, "state_dict"):
            num_batches = state.global_step * args.gradient_accumulation_steps  # a stream is one endless epoch
            streams = gather_object([self._stream.state_dict(num_batches)])
        state.stateful_callbacks[self.KEY] = {
            "unlogged_steps": num_steps,
            "unlogged_loss": loss,
            "streams": streams,
        }

    on_epoch_end = on_step_end


def absorb_first_signal(initialize_worker, worker_id: int) -> None:
    """A worker must outlive the first SIGTERM or SIGINT: schedulers and terminals send it to the workers, too."""
    for number in StopOnSignalCallback.SIGNALS:
        signal.signal(number, lambda number, frame: signal.signal(number, signal.SIG_DFL))
    if initialize_worker is not None:
        initialize_worker(worker_id)


class StopOnSignalCallback(TrainerCallback):
    """
    SIGTERM or SIGINT (Ctrl-C): the optimizer step is finished, a checkpoint is saved, training ends, on all
    processes after the same step. A second signal kills at once; one within a second of the first is the same one,
    sent by terminal and launcher both. (transformers' `enable_jit_checkpoint` saves between forward pass and optimizer
    step, and a run resumed from there differs.)

    After training `signal_number` says which signal it was, or `None`.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.signal_number: int | None = None
        self._received_at = math.inf
        self._previous_handlers = {}
        self._group = None

    def _receive(self, number: int, frame) -> None:
        if self.signal_number is None:
            self.signal_number, self._received_at = number, time.monotonic()
            os.write(2, f"\n{signal.Signals(number).name}: finishing the step, then saving a checkpoint.\n".encode())
        elif time.monotonic() - self._received_at > 1.0:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _stop_if_received(self, args: TrainingArguments, control: TrainerControl) -> None:
        number = self.signal_number or 0
        if self._group is not None:
            numbers = torch.tensor(number)
            torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX, self._group)
            number = int(numbers)
        if number:
            self.signal_number = number
            control.should_save = control.should_training_stop = True

    def on_train_begin(self, args: TrainingArguments, state, control, train_dataloader=None, **kwargs):
        self._previous_handlers = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        loader = getattr(train_dataloader, "base_dataloader", train_dataloader)
        loader.worker_init_fn = partial(absorb_first_signal, loader.worker_init_fn)
        if args.world_size > 1:  # on the CPU: asking must not make a GPU wait
            self._group = torch.distributed.new_group(backend="gloo")

    def on_step_end(self, args: TrainingArguments, state, control: TrainerControl, **kwargs):
        self._stop_if_received(args, control)

    on_evaluate = on_step_end  # an evaluation may take long, and its checkpoint is written after it

    def on_train_end(self, args, state, control, **kwargs):
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)


# --- Health ----------------------------------------------------------------------------------------------------------


class FeatureMoments:
    """
    Mean and covariance of features over all tokens seen, without keeping the tokens.

    The first batch's mean is taken off before squaring, so that a large common mean does not swallow the variance.
    """

    def __init__(self):
        self.count = 0

    @torch.no_grad()
    def update(self, features: torch.Tensor) -> None:
        """features: float [num_tokens, hidden_size]."""
        features = features.detach().float()
        if self.count == 0:
            self.shift = features.mean(dim=0) if len(features) > 0 else features.new_zeros(features.shape[1])
            self.total = torch.zeros_like(self.shift)
            self.products = features.new_zeros(features.shape[1], features.shape[1])
        features = features - self.shift
        self.count += len(features)
        self.total += features.sum(dim=0)
        self.products += features.T @ features

    @property
    def mean(self) -> torch.Tensor:
        return self.shift + self.total / self.count

    def sums(self) -> torch.Tensor:
        """Number, sum and sum of outer products of all tokens, flat: what can be added up over processes."""
        shift, total = self.shift.double(), self.total.double()  # float64: a large common mean comes back in here
        cross = torch.outer(shift, total)
        products = self.products + cross + cross.T + self.count * torch.outer(shift, shift)
        count = shift.new_tensor([self.count])
        return torch.cat([count, total + self.count * shift, products.flatten()])

    def set_sums(self, sums: torch.Tensor) -> None:
        count, total, products = sums.split([1, len(self.total), len(self.total) ** 2])
        mean = total / count.clamp(min=1)
        self.count = int(count)
        self.shift, self.total = mean.float(), torch.zeros_like(self.total)
        self.products = (products.view_as(self.products) - count * torch.outer(mean, mean)).float()

    def covariance(self) -> torch.Tensor:
        mean = self.total / self.count
        return self.products / self.count - torch.outer(mean, mean)

    def std(self) -> float:
        """Standard deviation across tokens, averaged over features."""
        return self.covariance().diagonal().clamp(min=0).sqrt().mean().item()

    def rank(self) -> float:
        """
        RankMe (arXiv 2210.02885) of the centred features divided by their width, in (0, 1]: the exponential of the
        entropy of the singular values.
        """
        singular_values = torch.linalg.eigvalsh(self.covariance().double()).clamp(min=0).sqrt()
        shares = singular_values / singular_values.sum().clamp(min=1e-12)
        return torch.exp(-torch.xlogy(shares, shares).sum()).item() / len(shares)


class PretrainingStatistics:
    """What one log line says of the batches it stands for: loss terms and the health of the representations."""

    def __init__(self, strategy_names: list[str]):
        self.strategy_names = strategy_names
        self.targets, self.predictions, self.contexts = FeatureMoments(), FeatureMoments(), FeatureMoments()
        self.target_directions, self.cosines = FeatureMoments(), FeatureMoments()
        self.losses: dict[str, list[torch.Tensor]] = {}

    @torch.no_grad()
    def update(self, output: TJEPAForPreTrainingOutput, inputs: dict) -> None:
        is_token = inputs["context_view_ids"].flatten() >= 0
        self.targets.update(output.labels)
        self.predictions.update(output.predictions)
        self.contexts.update(output.context_states[is_token])
        self.target_directions.update(torch.nn.functional.normalize(output.labels.float(), dim=-1))
        self.cosines.update(torch.cosine_similarity(output.predictions.float(), output.labels.float())[:, None])
        terms = ("jepa_loss", "variance_covariance_loss", "sigreg_loss", "token_prediction_loss", "denoising_loss")
        for name in terms:
            if getattr(output, name) is not None:
                self.losses.setdefault(name, []).append(getattr(output, name).detach())
        if len(self.strategy_names) > 1:
            seen = inputs["slots_per_strategy"] > 0
            for name, loss, was_seen in zip(self.strategy_names, output.loss_per_strategy, seen, strict=True):
                if was_seen:
                    self.losses.setdefault(f"loss_{name}", []).append(loss.detach())

    def _add_other_processes(self) -> None:
        """One all-reduce. Every process must take part; they have the same losses, since they share their slots."""
        moments = [self.targets, self.predictions, self.contexts, self.target_directions, self.cosines]
        sums = [moment.sums() for moment in moments]
        losses = torch.stack([torch.stack(values).mean() for values in self.losses.values()]).double()
        *sums, losses = reduce(torch.cat([*sums, losses]), "sum").split([len(part) for part in (*sums, losses)])
        for moment, moment_sums in zip(moments, sums, strict=True):
            moment.set_sums(moment_sums)
        self.losses = dict(zip(self.losses, losses[:, None] / PartialState().num_processes, strict=True))

    def summary(self) -> dict[str, float]:
        """Figures of all processes together for the log; empty if there was no target slot."""
        if self.losses and PartialState().num_processes > 1:
            self._add_other_processes()
        if self.targets.count == 0:
            return {}
        # the cosine that always predicting the mean label would get: no learning needed for that
        mean_target = torch.nn.functional.normalize(self.targets.mean, dim=0)
        return {
            **{name: torch.stack(list(values)).mean().item() for name, values in self.losses.items()},
            "target_std": self.targets.std(),
            "prediction_std": self.predictions.std(),
            "target_rank": self.targets.rank(),
            "prediction_rank": self.predictions.rank(),
            "context_rank": self.contexts.rank(),
            "cosine": self.cosines.mean.item(),
            "mean_target_cosine": torch.dot(mean_target, self.target_directions.mean).item(),
        }


def collapse_verdict(metrics: dict[str, float], prefix: str = "") -> str | None:
    """
    What is wrong with the representations, in plain words, or `None`.

    A run is collapsed when the targets' standard deviation across tokens is under 0.1, or when the predictions are no
    closer to the targets than the mean target is. A low rank alone is no collapse.
    """
    std = metrics[f"{prefix}target_std"]
    cosine, baseline = metrics[f"{prefix}cosine"], metrics[f"{prefix}mean_target_cosine"]
    if std < MIN_TARGET_STD:
        return (
            f"collapsed: the targets barely differ from token to token (standard deviation {std:.3f}, healthy is "
            f"above {MIN_TARGET_STD})"
        )
    if cosine <= baseline:
        return (
            f"collapsed: the predictions are no closer to the targets (cosine {cosine:.3f}) than the mean target is "
            f"({baseline:.3f})"
        )
    return None


def collapsed_evaluations(state: TrainerState) -> list[int]:
    """Optimizer steps of the latest evaluations in a row that found a collapse; empty if the last one did not."""
    is_collapsed = {
        entry["step"]: collapse_verdict(entry, prefix="eval_") is not None
        for entry in state.log_history
        if "eval_target_std" in entry
    }
    steps = []
    for step in reversed(is_collapsed):
        if not is_collapsed[step]:
            break
        steps.insert(0, step)
    return steps


class HealthCallback(TrainerCallback):
    """
    Adds loss terms and the health of the representations to the Trainer's log, warns of a collapse at every
    evaluation, and stops at a non-finite loss or gradient.

    Training figures are those of the logged step, evaluation figures those of the whole evaluation set. Nothing is
    read from the device on other steps.

    A collapse in `patience` evaluations in a row after the warm-up is a lasting one: it is reported as an error and,
    with `stop_on_collapse`, ends training without another checkpoint. Non-finite gradients are counted
    (`nonfinite_gradients` in the log). Under float16 the gradient scaler skips their steps, which is its way to find
    the scale; else they stop the run.

    Args:
        strategy_names (`list[str]`): names of the collator's strategies, in order.
        stop_on_collapse (`bool`, defaults to `False`): whether a lasting collapse ends training.
        patience (`int`, defaults to 3): evaluations in a row.
    """

    def __init__(self, strategy_names: list[str], stop_on_collapse: bool = False, patience: int = COLLAPSE_PATIENCE):
        if patience < 1:
            raise ValueError(f"HealthCallback: patience counts evaluations and must be at least 1, got {patience}.")
        self.strategy_names = strategy_names
        self.stop_on_collapse = stop_on_collapse
        self.patience = patience
        self.verdict: str | None = None  # of the latest evaluation
        self.stopped_run = False
        self._train_statistics = PretrainingStatistics(strategy_names)
        self._eval_statistics = PretrainingStatistics(strategy_names)
        # both on the device: the first step with a non-finite value, or inf
        self._first_bad_loss: torch.Tensor | None = None
        self._first_bad_gradient: torch.Tensor | None = None
        self._bad_gradients = torch.zeros((), dtype=torch.int64)
        self._reported_bad_gradients = 0
        self._will_log = False
        self._step = 0

    def watch(self, model: TJEPAForPreTraining) -> None:
        model.register_forward_hook(self._after_forward, with_kwargs=True)

    @property
    def num_nonfinite_gradients(self) -> int:
        return int(self._bad_gradients)

    def _after_forward(self, model, args, inputs, output):
        if not model.training:
            self._eval_statistics.update(output, inputs)
            return
        self._first_bad_loss = self._first_bad_step(self._first_bad_loss, output.loss.detach())
        if self._will_log:
            self._train_statistics.update(output, inputs)

    def _first_bad_step(self, earlier: torch.Tensor | None, value: torch.Tensor) -> torch.Tensor:
        bad_step = torch.where(torch.isfinite(value), math.inf, float(self._step))
        return bad_step if earlier is None else earlier.minimum(bad_step)

    def _raise_if_not_finite(self) -> None:
        for name, first_bad_step in (("loss", self._first_bad_loss), ("gradient", self._first_bad_gradient)):
            step = math.inf if first_bad_step is None else first_bad_step.item()
            if step < math.inf:
                raise FloatingPointError(
                    f"The {name} was not finite in optimizer step {int(step)}; stopped before saving another "
                    "checkpoint. The last checkpoint is good; resume from it with --resume_from_checkpoint, with a "
                    "lower --learning_rate, a longer warm-up or a lower --max_grad_norm."
                )

    def on_train_begin(self, args, state: TrainerState, control, **kwargs):
        counts = [entry["nonfinite_gradients"] for entry in state.log_history if "nonfinite_gradients" in entry]
        self._reported_bad_gradients = counts[-1] if counts else 0
        self._bad_gradients = torch.tensor(self._reported_bad_gradients, device=args.device)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._step = state.global_step + 1
        self._will_log = self._step % state.logging_steps == 0 or (self._step == 1 and args.logging_first_step)

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        # The Trainer's own norm is not handed to callbacks; clipping keeps what is not finite that way.
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of sharded parameters
        self._bad_gradients += ~torch.isfinite(norm)
        if getattr(optimizer, "scaler", None) is None:
            self._first_bad_gradient = self._first_bad_step(self._first_bad_gradient, norm)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        # reading a loss makes a GPU wait; on the CPU it costs nothing
        will_save = control.should_save or state.global_step % state.save_steps == 0
        is_last = state.global_step >= state.max_steps
        if args.device.type == "cpu" or self._will_log or will_save or is_last:
            self._raise_if_not_finite()

    def on_epoch_end(self, args, state, control, **kwargs):
        self._raise_if_not_finite()

    def on_log(self, args, state: TrainerState, control: TrainerControl, logs=None, **kwargs):
        if "eval_loss" in logs:
            metrics = {f"eval_{name}": value for name, value in self._eval_statistics.summary().items()}
            self._eval_statistics = PretrainingStatistics(self.strategy_names)
            if metrics:
                add_to_log(state, logs, metrics)
                self._judge(metrics, args, state, control)
        elif "loss" in logs:
            add_to_log(state, logs, self._train_statistics.summary())
            self._train_statistics = PretrainingStatistics(self.strategy_names)
            self._report_nonfinite_gradients(state, logs)

    def _report_nonfinite_gradients(self, state: TrainerState, logs: dict) -> None:
        count = self.num_nonfinite_gradients
        if count:
            add_to_log(state, logs, {"nonfinite_gradients": count})
        if count > self._reported_bad_gradients:
            logger.warning(
                f"The gradient was not finite in {count - self._reported_bad_gradients} optimizer steps since the "
                f"last report, {count} in all: the float16 gradient scaler skipped these steps and lowered its scale. "
                "A few are normal; if it goes on, use --bf16 or a lower --learning_rate."
            )
        self._reported_bad_gradients = count

    def _judge(self, metrics: dict[str, float], args, state: TrainerState, control: TrainerControl) -> None:
        self.verdict = collapse_verdict(metrics, prefix="eval_")
        if self.verdict is not None:
            num_warmup_steps = args.get_warmup_steps(state.max_steps)  # nothing is learned before the first steps
            steps = [step for step in collapsed_evaluations(state) if step > num_warmup_steps]
            if len(steps) > 1:
                self.verdict += f"; so in the last {len(steps)} evaluations, since step {steps[0]}"
            report = logger.error if len(steps) >= self.patience else logger.warning
            report(f"The representations have {self.verdict}. See the collapse advice in the README.")
            if self.stop_on_collapse and len(steps) >= self.patience:
                logger.error(f"Stopping at step {state.global_step} without another checkpoint (--stop_on_collapse).")
                self.stopped_run = control.should_training_stop = True
                control.should_save = False
        elif (rank := metrics["eval_target_rank"]) < MIN_RANK:
            logger.warning(
                f"The targets use few directions (RankMe {rank:.3f} of the width). That alone is no collapse: judge "
                "by a frozen probe against the untrained encoder."
            )


def add_to_log(state: TrainerState, logs: dict[str, float], metrics: dict[str, float]) -> None:
    """Into the line that is being logged, and into the history that the Trainer has already written it to."""
    logs.update(metrics)
    state.log_history[-1].update(metrics)


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
