"""Tokenized documents for the collator: in memory (`DocumentDataset`) or streamed (`DocumentStream`)."""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator
from itertools import islice, repeat

import datasets
import numpy as np
import torch

from ..data_collator_tjepa import hash_keys


logger = logging.getLogger(__name__)


class DocumentDataset(torch.utils.data.Dataset):
    """
    A tokenized `datasets.Dataset` whose examples say which document they are and in which epoch: what the collator
    draws masks from. `set_epoch` reaches the workers too, also persistent ones.

    Args:
        dataset (`datasets.Dataset`): with a column `input_ids` (list of token ids).
    """

    def __init__(self, dataset: datasets.Dataset):
        self.dataset = dataset.with_format("numpy", columns=["input_ids"])
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict]:
        epoch = int(self.epoch)
        return [
            {"input_ids": input_ids, "document_index": index, "epoch": epoch}
            for index, input_ids in zip(indices, self.dataset[indices]["input_ids"], strict=True)
        ]


class DocumentStream(torch.utils.data.IterableDataset):
    """
    The same for a streaming `datasets.IterableDataset`, of which only a bounded part is ever in memory.

    - *Split*: every worker of every process reads a share of its own, whole files where there are at least as many
      files as shares, else every n-th document of all files. No document is in two shares or in none.
    - *Shuffled* in blocks of `shuffle_buffer_size` documents (one fills while the other is given out), and the files
      by epoch. A rolling buffer, as `datasets` has it, can not be restored: on a resume its documents are lost.
    - *Index*: no running number is the same however the stream is split, so a 64-bit hash of a document's tokens is
      its index. Masks depend neither on the order nor on the number of processes and workers; documents of equal
      tokens have equal masks in an epoch.
    - *Resumed* in the middle: a worker notes where each of its blocks begins (`IterableDataset.state_dict`) in shared
      memory, where the main process finds it when a checkpoint is saved. A resumed worker hands out `None` for the
      documents that the Trainer is going to skip, and goes on from there: the order, the epochs and the masks are
      those of a run without interruption, also within a shuffled block. Read again are at most two blocks, and what
      `datasets` can not skip (what lies before them in the same file, which is not tokenized). What was noted by
      another number of workers, with another batch size or order, or of a dataset that has a shuffle buffer itself,
      is reread from the start.

    Args:
        dataset (`datasets.IterableDataset`): with a column `input_ids` (list of token ids), or what `transform` needs.
        transform (`Callable`, *optional*):
            From a share of `dataset` to an `IterableDataset` with a column `input_ids`: so each worker tokenizes its
            share only.
        shuffle_buffer_size (`int`, defaults to 0): documents per block. 0: the order of the dataset.
        seed (`int`, defaults to 0): of the order.
        rank, world_size (`int`, defaults to 0 and 1):
            This process and how many there are. With the defaults every process reads the whole stream and accelerate
            drops the documents of the others; with any other, `EpochCallback` keeps accelerate from splitting again.
        repeat (`bool`, defaults to `False`):
            Go on with the next epoch instead of ending. For training: no process ends before the others, whose shares
            are never equally long. The Trainer sees one endless epoch, and its count of batches says how far each
            worker has come.

    Raises:
        ValueError: while iterating with `repeat`, if a share has no documents.
    """

    MAX_POSITION_BYTES = 16384  # as JSON; a longer one is not noted

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        transform: Callable[[datasets.IterableDataset], datasets.IterableDataset] | None = None,
        shuffle_buffer_size: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        repeat: bool = False,
    ):
        if shuffle_buffer_size < 0:
            raise ValueError(f"shuffle_buffer_size is {shuffle_buffer_size}; it counts documents, 0 for no shuffling.")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be at least 0 and less than world_size, got {rank} of {world_size}.")
        self.dataset = dataset
        self.transform = transform
        self.shuffle_buffer_size = shuffle_buffer_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.repeat = repeat
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self.documents_per_batch = 1
        self._noted_documents = None  # int64 [num_workers, num_noted]: after how many documents of a worker
        self._noted_positions = None  # uint8 [num_workers, num_noted, MAX_POSITION_BYTES]: JSON, padded with spaces
        self._start = {}  # worker -> how many documents it has given out, and a block's beginning before that

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration is, or with `repeat` begins with."""
        self.epoch.fill_(epoch)

    # Reading

    def share(self, index: int, num_shares: int) -> datasets.IterableDataset:
        """The `index`-th of `num_shares` parts, which have no document in common and together are the dataset."""
        if self.dataset.num_shards >= num_shares:
            share = self.dataset.shard(num_shares, index, contiguous=False)
        else:  # before tokenization: what a document of another share costs is reading it
            share = self.dataset.filter(
                lambda _, places: [place % num_shares == index for place in places],
                with_indices=True,
                batched=True,
                batch_size=256,
            )
        return share if self.transform is None else self.transform(share)

    def __iter__(self) -> Iterator[dict | None]:
        info = torch.utils.data.get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        start = self._start.get(worker)
        num_given_out = 0 if start is None else start["num_documents"]
        position = first_position(int(self.epoch)) if start is None else start["position"]
        yield from repeat(None, position["num_documents"])  # the Trainer skips them
        documents = self._read(worker, num_workers, position)
        for number, (epoch, input_ids) in enumerate(documents, position["num_documents"]):
            if number < num_given_out:
                yield None
                continue
            digest = hashlib.blake2b(input_ids, digest_size=8).digest()
            index = int.from_bytes(digest, "little", signed=True)
            yield {"input_ids": input_ids, "document_index": index, "epoch": epoch}

    def _read(self, worker: int, num_workers: int, position: dict) -> Iterator[tuple[int, np.ndarray]]:
        """(epoch, token ids) of a worker's documents from a block's beginning on; notes where each block begins."""
        index, num_shares = self.rank * num_workers + worker, self.world_size * num_workers
        epoch, block, num_documents, source = (position[key] for key in ("epoch", "block", "num_documents", "source"))
        while True:
            share = self.share(index, num_shares)
            # datasets shuffles the files in every epoch but 0
            shuffled_epoch = 1 + int(hash_keys(self.seed, epoch)[0] >> np.uint64(33))
            share.set_epoch(shuffled_epoch if self.shuffle_buffer_size else epoch)
            if source is not None:
                share.load_state_dict(source)
            # iter(share) would split it between the workers once more, share.iter does not
            rows = (np.asarray(batch["input_ids"][0], dtype=np.int32) for batch in share.iter(batch_size=1))
            documents = list(islice(rows, self._block_size))
            if self.repeat and block == 0 and not documents:
                raise ValueError(
                    f"{self.world_size} processes with {num_workers} workers each split the stream of "
                    f"{self.dataset.num_shards} files, and share {index} has no usable document. Take fewer "
                    "processes, a lower --dataloader_num_workers, or more data."
                )
            while documents:
                self._note(worker, {"epoch": epoch, "block": block, "num_documents": num_documents, "source": source})
                source = share.state_dict()  # where the next block begins
                order = np.arange(len(documents))
                if self.shuffle_buffer_size:
                    np.random.default_rng([self.seed, epoch, index, block]).shuffle(order)
                next_documents = []
                for place in order:
                    yield epoch, documents[place]
                    num_documents += 1
                    next_documents.extend(islice(rows, 1))  # one in for one out: no pause between blocks
                documents, block = next_documents, block + 1
            if not self.repeat:
                return
            epoch, block, source = epoch + 1, 0, None

    @property
    def _block_size(self) -> int:
        return self.shuffle_buffer_size or self.documents_per_batch

    # Resuming

    def remember_positions(self, num_workers: int, documents_per_batch: int, num_batches: int) -> None:
        """Before the workers start: how many read, in what portions, and how many batches each may be ahead."""
        self.num_workers, self.documents_per_batch = max(1, num_workers), documents_per_batch
        if not self.repeat or has_shuffle_buffer(self.dataset._ex_iterable):
            return
        size = (self.num_workers, 2 + math.ceil(num_batches * documents_per_batch / self._block_size))
        self._noted_documents = torch.full(size, -1, dtype=torch.int64).share_memory_()
        self._noted_positions = torch.zeros((*size, self.MAX_POSITION_BYTES), dtype=torch.uint8).share_memory_()

    def _note(self, worker: int, position: dict) -> None:
        text = json.dumps(position).encode()
        if self._noted_documents is None or len(text) > self.MAX_POSITION_BYTES:
            return
        slot = int(self._noted_documents[worker].argmin())  # the oldest
        padded = np.frombuffer(text.ljust(self.MAX_POSITION_BYTES), dtype=np.uint8)
        self._noted_documents[worker, slot] = -1
        self._noted_positions[worker, slot] = torch.from_numpy(padded.copy())
        self._noted_documents[worker, slot] = position["num_documents"]

    def state_dict(self, num_batches: int) -> dict | None:
        """Where every worker stood after `num_batches` batches in all; `None` where that is not known."""
        if self._noted_documents is None:
            return None
        workers = []
        for worker in range(self.num_workers):
            # batches come from the workers in turn
            num_given_out = len(range(worker, num_batches, self.num_workers)) * self.documents_per_batch
            position = self._start[worker]["position"] if worker in self._start else first_position()
            noted = self._noted_documents[worker]
            noted = torch.where(noted <= num_given_out, noted, -1)
            if noted.max() >= position["num_documents"]:
                position = json.loads(self._noted_positions[worker, noted.argmax()].numpy().tobytes())
            workers.append({"num_documents": num_given_out, "position": position})
        return {**self._settings, "workers": workers}

    def load_state_dict(self, state: dict | None) -> None:
        """Goes on where `state` says. If it does not fit, nothing changes: the Trainer rereads from the start."""
        fits = state is not None and len(state["workers"]) == self.num_workers
        if not fits or any(state[name] != value for name, value in self._settings.items()):
            reason = "has no position in it" if state is None else "was read by other workers or in other batches"
            logger.warning(f"The streaming dataset {reason}: rereading it from the start up to the checkpoint.")
            return
        self._start = dict(enumerate(state["workers"]))

    @property
    def _settings(self) -> dict[str, int]:
        names = ("documents_per_batch", "shuffle_buffer_size", "seed", "rank", "world_size")
        return {name: getattr(self, name) for name in names}


def first_position(epoch: int = 0) -> dict:
    """Of a `DocumentStream`: a worker's first block (`source`: a state of `datasets.IterableDataset`)."""
    return {"epoch": epoch, "block": 0, "num_documents": 0, "source": None}


def has_shuffle_buffer(iterable) -> bool:
    """Whether a streaming dataset draws from a shuffle buffer, whose content `datasets` does not save."""
    parents = [getattr(iterable, "ex_iterable", None), *getattr(iterable, "ex_iterables", [])]
    is_buffer = type(iterable).__name__ == "BufferShuffledExamplesIterable"
    return is_buffer or any(has_shuffle_buffer(parent) for parent in parents if parent is not None)
