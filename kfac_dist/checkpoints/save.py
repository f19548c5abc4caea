"""One save of all ranks: each writes its shard in a thread; rank 0 commits when every shard is there.

The threads use the run's folder, which all ranks must see, and no collective: the training goes on with those. A rank
tells that its shard is on the disk by a small JSON file beside it.
"""

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from kfac_dist.checkpoints.shard import FileRecord, write_shard, write_tensors
from kfac_dist.errors import InputError

MODEL_FILE = "model.safetensors"
_POLL_SECONDS = 0.02
_PATIENCE_SECONDS = 10.0  # for a folder that another host has just made, on a network's file system


def shard_name(rank: int) -> str:
    """File of a rank's items."""
    return f"rank-{rank:05d}.safetensors"


class ShardSave:
    """A thread that writes this rank's shard, and on rank 0 the weights, and then commits.

    Attributes:
        error: Why it failed; None until it did.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        num_ranks: int,
        items: Mapping[str, Any],
        weights: Mapping[str, Tensor] | None,
        commit: Callable[[Mapping[str, FileRecord]], None] | None,
    ) -> None:
        """Start.

        Args:
            folder: Of the unfinished checkpoint; rank 0 has made it.
            rank: This rank.
            num_ranks: Those that write a shard each.
            items: Of this rank, with tensors on the CPU that nobody changes any more.
            weights: The network's, on rank 0 only.
            commit: Called with the records of all files, on rank 0 only, once all are written.
        """
        self.error: BaseException | None = None
        self._folder, self._rank, self._num_ranks = folder, rank, num_ranks
        self._items, self._weights, self._commit = items, weights, commit
        self._written = threading.Event()
        self._abandoned = threading.Event()
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def wait_until_written(self) -> bool:
        """Whether this rank's part is on the disk, after it has been tried."""
        self._written.wait()
        return self.error is None

    def abandon(self) -> None:
        """Some rank failed: do not wait for its shard any longer."""
        self._abandoned.set()

    def join(self) -> bool:
        """Whether all went well here, after the end."""
        self._thread.join()
        return self.error is None

    def _run(self) -> None:
        try:
            records = self._write()
            self._written.set()
            if self._commit is not None:
                self._commit(self._gather(records))
        except BaseException as error:  # whatever it was, training goes on and says so
            self.error = error
        finally:
            self._written.set()
            self._items = {}
            self._weights = None

    def _write(self) -> dict[str, FileRecord]:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not self._folder.is_dir() and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        for weight, tensor in (self._weights or {}).items():
            if not bool(tensor.isfinite().all()):  # nobody could go on from there
                raise InputError(f"the network's {weight} is not finite")
        name = shard_name(self._rank)
        records = {name: write_shard(self._folder / name, self._items)}
        if self._weights is not None:
            records[MODEL_FILE] = write_tensors(self._folder / MODEL_FILE, self._weights)
        told = self._folder / f"{name}.tmp"
        told.write_text(json.dumps({file: asdict(record) for file, record in records.items()}), encoding="utf-8")
        told.rename(self._folder / f"{name}.json")
        return records

    def _gather(self, records: dict[str, FileRecord]) -> dict[str, FileRecord]:
        """Records of all ranks' files; waits for them."""
        missing = set(range(1, self._num_ranks))
        while missing:
            for rank in sorted(missing):
                told = self._folder / f"{shard_name(rank)}.json"
                if told.exists():
                    found = json.loads(told.read_text(encoding="utf-8"))
                    records |= {file: FileRecord(**record) for file, record in found.items()}
                    missing.discard(rank)
            if self._abandoned.is_set():
                raise InputError("another rank could not write its shard")
            if missing:
                time.sleep(_POLL_SECONDS)
        for told in self._folder.glob("*.json"):
            told.unlink()
        return records
