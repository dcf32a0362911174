"""Tokenized documents for the collator: in memory (`DocumentDataset`) or streamed (`DocumentStream`)."""

import json
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import count, islice

import datasets
import numpy as np
import torch

from ..data_collator_tjepa import hash_keys
from .documents import hash_bytes
from .faults import advise, list_reasons
from .private import has_shuffle_buffer


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


@dataclass(frozen=True)
class Division:
    """
    How the documents of a stream are dealt out to readers (the workers of all processes), as `DataLoader` does it: in
    rounds, each of which is one batch for every process, made by workers of one number; the workers take turns.
    Reader `rank * num_workers + worker` reads the share of that number. Numbers may also be arrays of them.
    """

    world_size: int
    num_workers: int
    documents_per_batch: int

    @property
    def num_shares(self) -> int:
        return self.world_size * self.num_workers

    @property
    def documents_per_round(self) -> int:
        return self.world_size * self.documents_per_batch

    def place_in_stream(self, share: int, number: int) -> int:
        """Where the `number`-th document of a share stands in the stream."""
        rank, worker = divmod(share, self.num_workers)
        batch, place = divmod(number, self.documents_per_batch)
        return ((batch * self.num_workers + worker) * self.world_size + rank) * self.documents_per_batch + place

    def place_in_share(self, place: int) -> tuple[int, int]:
        """The share of the document at a place in the stream, and its number there."""
        batch, place = divmod(place, self.documents_per_batch)
        number_of_round, rank = divmod(batch, self.world_size)
        batch, worker = divmod(number_of_round, self.num_workers)
        return rank * self.num_workers + worker, batch * self.documents_per_batch + place

    def count(self, share: int, num_documents: int) -> int:
        """How many of the stream's first `num_documents` documents are of a share."""
        rank, worker = divmod(share, self.num_workers)
        num_rounds, rest = divmod(num_documents, self.documents_per_round)
        num_batches = len(range(worker, num_rounds, self.num_workers))
        rest = rest - rank * self.documents_per_batch if num_rounds % self.num_workers == worker else 0
        return num_batches * self.documents_per_batch + min(max(rest, 0), self.documents_per_batch)

    def shares_read_by(self, reader: int, readers: "Division", first: int) -> list[int]:
        """The shares from which a reader of another division takes documents, if that one begins at `first`."""
        own, other = (d.num_workers * d.documents_per_round for d in (self, readers))
        num_documents = readers.documents_per_batch * (own // math.gcd(own, other))  # then it begins again
        if num_documents > 2**22:
            return list(range(self.num_shares))
        places = first + readers.place_in_stream(reader, np.arange(num_documents))
        return np.unique(self.place_in_share(places)[0]).tolist()


@dataclass(eq=False, repr=False)
class DocumentStream(torch.utils.data.IterableDataset):
    """
    The same for a streaming `datasets.IterableDataset`, of which only a bounded part is ever in memory.

    - *Split*: every worker of every process reads a share of its own, whole files where there are at least as many
      files as shares, else every n-th document of all files. No document is in two shares or in none.
    - *Shuffled* in blocks of `shuffle_buffer_size` documents (one fills while the other is given out), and the files
      by epoch. A rolling buffer, as `datasets` has it, cannot be restored: on a resume its documents are lost.
    - *Index*: no running number is the same however the stream is split, so a 64-bit hash of a document's tokens is
      its index. Masks depend neither on the order nor on the number of processes and workers; documents of equal
      tokens have equal masks in an epoch.
    - *Resumed* in the middle: a worker notes where each of its blocks begins (`IterableDataset.state_dict`) in shared
      memory, where the main process finds it when a checkpoint is saved. A resumed worker hands out `None` for the
      documents that the Trainer is going to skip, and goes on from there: the order, the epochs and the masks are
      those of a run without interruption, also within a shuffled block. At most two blocks are reread, and what
      `datasets` cannot skip (what lies before them in the same file, which is not tokenized). What was noted in
      another order, or of a dataset that has a shuffle buffer itself, is reread from the start.
    - *Resumed by other readers*: the shares stay those of the run's beginning, and with them the order of the stream.
      Each of the new readers reads all shares that hold documents of its batches, and skips the documents of others.
      So a run goes on with the same batches where processes times documents per batch stay the same, and in any case
      with the documents that remain. More readers than at the beginning do not read faster: choose many at first.

    Args:
        dataset (`datasets.IterableDataset`): with a column `input_ids` (list of token ids), or what `transform` needs.
        transform (`Callable`, *optional*):
            From a share of `dataset` to an `IterableDataset` with a column `input_ids`: so each worker tokenizes its
            share only.
        shuffle_buffer_size (`int`, defaults to 0): documents per block. 0: the order of the dataset.
        seed (`int`, defaults to 0): of the order.
        rank, world_size (`int`, defaults to 0 and 1):
            This process and how many there are. With the defaults every process reads the whole stream and accelerate
            drops the documents of the others; with any other, `TJEPATrainer` keeps accelerate from splitting again.
        repeat (`bool`, defaults to `False`):
            Go on with the next epoch instead of ending. For training: no process ends before the others, whose shares
            are never equally long. The Trainer sees one endless epoch, and its count of batches says how far each
            worker has come.

    Raises:
        ValueError: while iterating with `repeat`, if a share has no documents.
    """

    MAX_POSITION_BYTES = 16384  # as JSON; a longer one is not noted

    dataset: datasets.IterableDataset
    transform: Callable[[datasets.IterableDataset], datasets.IterableDataset] | None = None
    shuffle_buffer_size: int = 0
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    repeat: bool = False

    def __post_init__(self):
        if self.shuffle_buffer_size < 0:
            given = self.shuffle_buffer_size
            raise ValueError(f"shuffle_buffer_size is {given}; it counts documents, 0 for no shuffling.")
        if not 0 <= self.rank < self.world_size:
            given = f"{self.rank} of {self.world_size}"
            raise ValueError(f"rank must be at least 0 and less than world_size, got {given}.")
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        # Before `remember_positions` nothing is known of batches, and nothing is noted.
        self._readers: Division | None = None  # those of this start
        self._batches_ahead = 0
        self._rows: dict[tuple[int, int], int] = {}  # (worker, share) -> row of what is noted
        self._noted_documents = None  # int64 [num_rows, num_noted]: after how many documents of the share
        self._noted_positions = None  # uint8 [num_rows, num_noted, MAX_POSITION_BYTES]: JSON, padded with spaces
        # What a checkpoint says
        self._shares: Division | None = None  # those of the run's beginning
        self._first_place = 0  # where in the stream the first document of this start would stand,
        self._num_documents_done = 0  # and how many come before the first that is not skipped
        self._start_positions: dict[int, dict] = {}  # share -> a block's beginning before that

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
                lambda _, rows: [row % num_shares == index for row in rows],
                with_indices=True,
                batched=True,
                batch_size=256,
            )
        return share if self.transform is None else self.transform(share)

    def __iter__(self) -> Iterator[dict | None]:
        info = torch.utils.data.get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        readers = self._readers or Division(self.world_size, num_workers, documents_per_batch=1)
        shares = self._shares or readers
        reader = self.rank * num_workers + worker
        documents_of = {}
        for number in count():
            place = self._first_place + readers.place_in_stream(reader, number)
            if place < self._num_documents_done:
                yield None  # the Trainer skips it
                continue
            share, wanted = shares.place_in_share(place)
            if share not in documents_of:
                position = self._start_positions.get(share) or first_position(int(self.epoch))
                documents = self._read(worker, share, shares, position)
                documents_of[share] = enumerate(documents, position["num_documents"])
            found = next((document for n, document in documents_of[share] if n == wanted), None)
            if found is None:  # the end, without `repeat`
                return
            epoch, input_ids = found
            yield {"input_ids": input_ids, "document_index": hash_bytes(input_ids), "epoch": epoch}

    def _read(self, worker: int, index: int, shares: Division, position: dict) -> Iterator[tuple[int, np.ndarray]]:
        """(epoch, token ids) of a share's documents from a block's beginning on; notes where each block begins."""
        block_size = self.shuffle_buffer_size or shares.documents_per_batch
        epoch, block, num_documents, source = (position[key] for key in ("epoch", "block", "num_documents", "source"))
        while True:
            share = self.share(index, shares.num_shares)
            # datasets shuffles the files in every epoch but 0
            shuffled_epoch = 1 + int(hash_keys(self.seed, epoch)[0] >> np.uint64(33))
            share.set_epoch(shuffled_epoch if self.shuffle_buffer_size else epoch)
            # iter(share) would split it between the workers once more, share.iter does not
            rows = (np.asarray(batch["input_ids"][0], dtype=np.int32) for batch in share.iter(batch_size=1))
            try:
                if source is not None:
                    share.load_state_dict(source)
                documents = list(islice(rows, block_size))
            except KeyError:  # noted by a version that read in other steps: the epoch is reread up to here
                share.load_state_dict(None)
                rows = (np.asarray(batch["input_ids"][0], dtype=np.int32) for batch in share.iter(batch_size=1))
                documents = list(islice(rows, block * block_size, (block + 1) * block_size))
            if self.repeat and block == 0 and not documents:
                counts = self.transform.counts() if hasattr(self.transform, "counts") else None
                if counts is not None and counts.dropped and not counts.num_kept:
                    reasons = f"{list_reasons(counts.dropped)}. {advise(counts.dropped)}"
                    raise ValueError(f"Every document of the stream that was read was dropped: {reasons}")
                raise ValueError(
                    f"{shares.world_size} processes with {shares.num_workers} workers each split the stream of "
                    f"{self.dataset.num_shards} files, and share {index} has no usable document. Take fewer "
                    "processes, a lower --dataloader_num_workers, or more data."
                )
            while documents:
                noted = {"epoch": epoch, "block": block, "num_documents": num_documents, "source": source}
                self._note(worker, index, noted)
                source = share.state_dict()  # where the next block begins
                order = np.arange(len(documents))
                if self.shuffle_buffer_size:
                    np.random.default_rng([self.seed, epoch, index, block]).shuffle(order)
                next_documents = []
                for row in order:
                    yield epoch, documents[row]
                    num_documents += 1
                    next_documents.extend(islice(rows, 1))  # one in for one out: no pause between blocks
                documents, block = next_documents, block + 1
            if not self.repeat:
                return
            epoch, block, source = epoch + 1, 0, None

    # Resuming

    def remember_positions(self, num_workers: int, documents_per_batch: int, num_batches: int) -> None:
        """Before the workers start: how many read, in what portions, and how many batches each may be ahead."""
        self._readers = Division(self.world_size, max(1, num_workers), documents_per_batch)
        self._batches_ahead = num_batches
        self._make_room()

    def _make_room(self) -> None:
        """For what this process's workers note: enough blocks of each share for a checkpoint to find one in time."""
        if not self.repeat or has_shuffle_buffer(self.dataset):
            return
        readers, shares = self._readers, self._shares or self._readers
        rows = [
            (worker, share)
            for worker in range(readers.num_workers)
            for share in shares.shares_read_by(self.rank * readers.num_workers + worker, readers, self._first_place)
        ]
        self._rows = {row: number for number, row in enumerate(rows)}
        num_places_ahead = self._batches_ahead * readers.num_workers * readers.documents_per_round
        num_documents_ahead = num_places_ahead / shares.num_shares + shares.documents_per_batch
        block_size = self.shuffle_buffer_size or shares.documents_per_batch
        size = (len(rows), 2 + math.ceil(num_documents_ahead / block_size))
        self._noted_documents = torch.full(size, -1, dtype=torch.int64).share_memory_()
        self._noted_positions = torch.zeros((*size, self.MAX_POSITION_BYTES), dtype=torch.uint8).share_memory_()

    def _note(self, worker: int, share: int, position: dict) -> None:
        text = json.dumps(position).encode()
        if self._noted_documents is None or len(text) > self.MAX_POSITION_BYTES:
            return
        row = self._rows[worker, share]
        slot = int(self._noted_documents[row].argmin())  # the oldest
        padded = np.frombuffer(text.ljust(self.MAX_POSITION_BYTES), dtype=np.uint8)
        self._noted_documents[row, slot] = -1
        self._noted_positions[row, slot] = torch.from_numpy(padded.copy())
        self._noted_documents[row, slot] = position["num_documents"]

    def state_dict(self, num_batches: int) -> dict | None:
        """
        Where the shares that this process reads stood after `num_batches` batches of this start, those that were
        skipped included; `None` where that is not known.
        """
        if self._noted_documents is None:
            return None
        shares = self._shares or self._readers
        num_documents = self._first_place + num_batches * self._readers.documents_per_round
        positions = {}
        for (_, share), row in self._rows.items():
            position = positions.get(str(share)) or self._start_positions.get(share) or first_position()
            noted = self._noted_documents[row]
            noted = torch.where(noted <= shares.count(share, num_documents), noted, -1)
            if noted.max() >= position["num_documents"]:
                position = json.loads(self._noted_positions[row, noted.argmax()].numpy().tobytes())
            positions[str(share)] = position
        return {**self._order, "shares": asdict(shares), "num_documents": num_documents, "positions": positions}

    def load_state_dict(self, states: list[dict | None], num_skipped_batches: int) -> None:
        """
        Goes on where the `state_dict`s of all processes say, whatever their number was.

        Args:
            states: they, or `None` for those that are not known.
            num_skipped_batches: how many batches of this start are going to be skipped.

        If they do not fit, nothing changes: the Trainer rereads what it skips.
        """
        states = [state and _in_shares(state) for state in states]
        if not all(states):
            reason = "has no position in it"
        elif any(state[name] != value for state in states for name, value in self._order.items()):
            reason = "was read in another order"
        else:
            self._shares = Division(**states[0]["shares"])
            self._num_documents_done = states[0]["num_documents"]
            self._first_place = self._num_documents_done - num_skipped_batches * self._readers.documents_per_round
            self._start_positions = {}
            for share, position in (item for state in states for item in state["positions"].items()):
                known = self._start_positions.setdefault(int(share), position)
                if position["num_documents"] > known["num_documents"]:
                    self._start_positions[int(share)] = position
            self._make_room()
            return
        logger.warning(f"The streaming dataset {reason}: rereading it from the start up to the checkpoint.")

    @property
    def _order(self) -> dict[str, int]:
        return {"shuffle_buffer_size": self.shuffle_buffer_size, "seed": self.seed}


def _in_shares(state: dict) -> dict:
    """A state as it is; one of version 0.1.0, with a position for each worker of a process, in today's form."""
    if "workers" not in state:
        return state
    workers, world_size = state["workers"], state["world_size"]
    shares = Division(world_size, len(workers), state["documents_per_batch"])
    num_documents = sum(worker["num_documents"] for worker in workers) * world_size
    positions = {str(state["rank"] * len(workers) + i): worker["position"] for i, worker in enumerate(workers)}
    return {**state, "shares": asdict(shares), "num_documents": num_documents, "positions": positions}


def first_position(epoch: int = 0) -> dict:
    """Where a share of a `DocumentStream` begins (`source`: a state of `datasets.IterableDataset`)."""
    return {"epoch": epoch, "block": 0, "num_documents": 0, "source": None}
