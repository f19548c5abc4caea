"""Saving a run while it goes on, and going on with one: what belongs to which rank, and what must be alike.

Rank 0 saves what all ranks have alike, each block's first owner its curvature, each rank its mixup batches and buffers.
So a run may go on with another number of ranks: each then reads the blocks that it owns now.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kfac_dist import __version__
from kfac_dist.checkpoints.manifest import MANIFEST_FILE, Manifest, read_manifest
from kfac_dist.checkpoints.save import MODEL_FILE, ShardSave
from kfac_dist.checkpoints.shard import FileRecord, ShardReader, check_file, read_tensors
from kfac_dist.checkpoints.store import CheckpointStore
from kfac_dist.communicator import Communicator
from kfac_dist.errors import InputError
from kfac_dist.tensors.host_copy import HostSnapshot
from kfac_dist.tensors.nested_state import flatten, unflatten

logger = logging.getLogger(__name__)

_ANY = "surrogateescape"  # a path may be no text


@dataclass(frozen=True)
class RankState:
    """All that a rank's future depends on.

    Attributes:
        run: What all ranks have alike but the weights: iteration, optimizer without its blocks, loss scale, …
        weights: The network's parameters and buffers, running statistics averaged over the ranks, by name.
        buffers: The network's buffers as this rank has them, by name.
        blocks: Curvature of each block that this rank owns, by name.
        mixup: What running mixup keeps of each of this rank's slots, by slot.
    """

    run: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    blocks: Mapping[str, Any]
    mixup: Mapping[int, Any]


class Checkpointer:
    """Saves a run's state; collective.

    Attributes:
        num_failed: Checkpoints that could not be written.
        newest_failed: Whether the newest is one of them.
    """

    def __init__(self, run: Path, communicator: Communicator, keep: int, keep_best: bool) -> None:
        """Set up; writes nothing.

        Args:
            run: The run's folder, which all ranks see.
            communicator: Collectives over the ranks.
            keep: How many of the newest checkpoints stay.
            keep_best: Whether the one of the best evaluation stays besides.
        """
        self._store = CheckpointStore(run)
        self._communicator = communicator
        self._keep, self._keep_best = keep, keep_best
        self._save: ShardSave | None = None
        self._snapshot = HostSnapshot()
        self.num_failed = 0
        self.newest_failed = False

    def save(self, state: RankState, first_owned: list[str], manifest: Manifest, wait: bool) -> bool:
        """Begin to write a checkpoint, after the one before is done.

        A failure, such as of a full disk, is logged and counted; the checkpoints that are there stay.

        Args:
            state: Of this rank; it is copied to the host before this returns.
            first_owned: Names of the blocks that this rank is the one to write.
            manifest: What holds for all ranks; the records of the files are added.
            wait: Return when it is on the disk.

        Returns:
            Whether nothing has failed that is known by now; the same on every rank.
        """
        fine = self.finish()
        self.newest_failed = False
        unfinished = self._open(manifest.iteration)
        if unfinished is None:
            fine = False
        else:
            rank = self._communicator.rank
            items: dict[str, Any] = {f"block/{name}": state.blocks[name] for name in first_owned}
            items |= {f"mixup/{slot}": kept for slot, kept in state.mixup.items()}
            items[f"buffers/{rank}"] = dict(state.buffers)
            if rank == 0:
                items["run"] = dict(state.run)
            weights = dict(state.weights) if rank == 0 else {}
            copies = self._copy_to_host({"items": items, "weights": weights})
            self._save = ShardSave(
                unfinished,
                rank,
                self._communicator.size,
                copies["items"],
                copies["weights"] if rank == 0 else None,
                partial(self._commit, unfinished, manifest) if rank == 0 else None,
            )
            if wait:
                fine &= self.finish()
        return fine

    def finish(self) -> bool:
        """Wait for the checkpoint that is being written, if any; whether it is there, the same on every rank."""
        if self._save is None:
            return True
        save, self._save = self._save, None
        if self._agree(save.wait_until_written()):
            fine = self._agree(save.join())
        else:
            save.abandon()
            save.join()
            fine = False
        if not fine:
            if self._communicator.is_main:
                self._store.discard_unfinished()
            self._say_failed(save.error)
        return fine

    def _open(self, iteration: int) -> Path | None:
        """Make the folder to write into; None, on every rank, if that fails."""
        token = self._communicator.gather_bytes(os.urandom(4).hex().encode())[0].decode()
        unfinished = self._store.unfinished(iteration, token)
        error = None
        if self._communicator.is_main:
            self._store.discard_unfinished()  # a full disk may need the room
            try:
                unfinished.mkdir(parents=True)
            except OSError as problem:
                error = problem
        if self._agree(error is None):
            return unfinished
        self._say_failed(error)
        return None

    def _copy_to_host(self, state: dict[str, Any]) -> dict[str, Any]:
        """A copy on the CPU that holds until the next checkpoint, which waits for this one."""
        tensors, tree = flatten(state)
        copies: dict[str, Any] = unflatten(self._snapshot.take(tensors), tree)
        return copies

    def _commit(self, unfinished: Path, manifest: Manifest, records: Mapping[str, FileRecord]) -> None:
        """In rank 0's thread."""
        self._store.commit(unfinished, manifest.with_files(records))
        try:
            self._store.prune(self._keep, self._keep_best)
        except OSError as error:  # the new one is there all the same
            logger.warning("older checkpoints could not be deleted: %s", error)

    def _agree(self, fine: bool) -> bool:
        return not bool(self._communicator.all_reduce_(torch.tensor(float(not fine)), "max"))

    def _say_failed(self, error: BaseException | None) -> None:
        self.num_failed += 1
        self.newest_failed = True
        if error is not None:
            logger.warning("a checkpoint could not be written, training goes on: %s", error)


@dataclass(frozen=True)
class Found:
    """A checkpoint that is whole.

    Attributes:
        path: Its folder.
        manifest: What it says of itself.
    """

    path: Path
    manifest: Manifest


def find_checkpoint(place: Path, communicator: Communicator) -> Found | None:
    """The newest checkpoint of a run that is whole, or the one that `place` itself is; collective.

    Damaged ones are named in the log and passed over. The files are checked by all ranks together.

    Returns:
        None, on every rank, if there is none.
    """
    with communicator.raise_on_all_ranks():
        candidates = [place] if (place / MANIFEST_FILE).exists() else CheckpointStore(place).newest_first()
        names = [str(path) for path in candidates]
    chosen = communicator.gather_bytes("\0".join(names).encode(errors=_ANY))[0].decode(errors=_ANY)
    for path in map(Path, filter(None, chosen.split("\0"))):
        problem = ""
        manifest = None
        try:
            manifest = read_manifest(path)
            for number, (name, record) in enumerate(sorted(manifest.files.items())):
                if number % communicator.size == communicator.rank:
                    check_file(path / name, record)
        except InputError as error:
            problem = str(error)
        problems = [text.decode(errors=_ANY) for text in communicator.gather_bytes(problem.encode(errors=_ANY)) if text]
        if not problems and manifest is not None:
            return Found(path, manifest)
        if communicator.is_main:
            logger.warning("checkpoint %s is not used: %s", path, problems[0])
    return None


def read_state(found: Found, rank: int, num_ranks: int, blocks: list[str], slots: list[int]) -> RankState:
    """What a rank goes on with.

    Args:
        found: The checkpoint.
        rank: This rank.
        num_ranks: Ranks that there are now.
        blocks: Names of the blocks that it owns.
        slots: Its slots of an iteration.

    Raises:
        InputError: If something is missing; nothing has been changed then.
    """
    place = {item: name for name, record in found.manifest.files.items() for item in record.items}
    readers = {name: ShardReader(found.path / name) for name in set(place.values())}

    def read(item: str) -> Any:
        if item not in place:
            raise InputError(f"{found.path}: has no {item}: it was written for another model or configuration")
        return readers[place[item]].read(item)

    weights = read_tensors(found.path / MODEL_FILE)
    own_buffers = num_ranks == found.manifest.num_ranks
    kept = [slot for slot in slots if f"mixup/{slot}" in place]
    return RankState(
        run=read("run"),
        weights=weights,
        buffers=read(f"buffers/{rank}") if own_buffers else {},
        blocks={name: read(f"block/{name}") for name in blocks},
        mixup={slot: read(f"mixup/{slot}") for slot in kept},
    )


def code_version() -> str:
    """Of kfac_dist."""
    return __version__


def now() -> str:
    """The time, UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
