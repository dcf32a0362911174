"""Every private name of datasets, accelerate and transformers that this package needs, with the reason why.

It stands in this room because all later ones can import it. (The files of a model folder cannot: they hold to what
every `modeling_*.py` of transformers uses, `config._attn_implementation`, `_init_weights` and the class attributes of
`PreTrainedModel`, and `modeling_tjepa.py` to `_weight_conversions` besides.) `tests/corpus/test_private.py` fails by
name where a new version takes one of them away.
"""

import math
from collections.abc import Iterator
from itertools import chain, islice, repeat

import datasets
import torch
from accelerate.data_loader import BatchSamplerShard, IterableDatasetShard
from transformers import PreTrainedConfig, PreTrainedModel


# --- datasets --------------------------------------------------------------------------------------------------------


def has_shuffle_buffer(dataset: datasets.IterableDataset) -> bool:
    """
    Whether a streaming dataset draws from a shuffle buffer, whose content `datasets` does not save. Neither its
    `state_dict` nor anything else that is public tells.
    """
    return _draws_from_buffer(dataset._ex_iterable)


def _draws_from_buffer(iterable) -> bool:
    parents = [getattr(iterable, "ex_iterable", None), *getattr(iterable, "ex_iterables", [])]
    is_buffer = type(iterable).__name__ == "BufferShuffledExamplesIterable"
    return is_buffer or any(_draws_from_buffer(parent) for parent in parents if parent is not None)


# --- transformers ----------------------------------------------------------------------------------------------------


def initialise(model: PreTrainedModel, part: torch.nn.Module) -> None:
    """First weights for a part that a loaded model lacked: the public `initialize_weights` is for whole models."""
    part.apply(model._init_weights)


def get_attention(config: PreTrainedConfig) -> str | None:
    """The attention backend of a model: `from_pretrained` takes it, and nothing public gives it back."""
    return config._attn_implementation


def set_attention(config: PreTrainedConfig, name: str | None) -> None:
    """For a model that is made by its class: `from_config` of the Auto classes alone takes it as an argument."""
    config._attn_implementation = name


class TrainerHooks:
    """
    For a `Trainer`: hands the gradient's norm of every optimizer step to `on_gradient_norm` (its callbacks do not get
    it, and its log has that of the steps with a log line only), and the names of weights that a checkpoint lacks to
    `on_missing_weights` (it only warns of them).
    """

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        self.on_gradient_norm(norm)
        return norm

    def _issue_warnings_after_load(self, load_result) -> None:
        if missing := set(load_result.missing_keys) - self.model.all_tied_weights_keys.keys():
            self.on_missing_weights(missing)
        super()._issue_warnings_after_load(load_result)


# --- accelerate ------------------------------------------------------------------------------------------------------


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
    """
    Turns accelerate's classes into those above by changing the class of what is there. accelerate has no argument for
    it (`even_batches=False` gives the processes unequal numbers of batches, and streams know nothing of it), and torch
    does not let anyone exchange the dataset or the sampler of a DataLoader.
    """
    if isinstance(dataloader.batch_sampler, BatchSamplerShard):
        dataloader.batch_sampler.__class__ = UnpaddedBatchSamplerShard
    elif isinstance(dataloader.dataset, IterableDatasetShard):
        dataloader.dataset.__class__ = UnpaddedIterableDatasetShard
    return dataloader
