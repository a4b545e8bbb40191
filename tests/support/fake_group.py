"""A double of MPI as a device uses it: ranks are threads of one process."""

from __future__ import annotations

import json
import threading
from collections import deque
from types import SimpleNamespace
from typing import Any

import numpy as np

from mdattn_mpi.errors import MdattnError

DEADLINE = 30.0


class FakeComm:
    """An MPI communicator whose ranks are threads."""

    def __init__(self, rank: int, size: int, shared: dict[Any, Any] | None = None) -> None:
        self.rank, self.size = rank, size
        self.shared = {} if shared is None else shared
        self.shared.setdefault("lock", threading.Condition())
        self.shared.setdefault("barrier", threading.Barrier(size, timeout=DEADLINE))
        self._duplicates = 0

    def Dup(self) -> FakeComm:
        self._duplicates += 1
        with self.shared["lock"]:
            inner = self.shared.setdefault(("dup", self._duplicates), {})
            return FakeComm(self.rank, self.size, inner)

    def Isend(self, words: Any, peer: int, tag: int) -> Any:
        self._put((self.rank, peer, tag), np.array(words))
        return self

    def Test(self) -> bool:
        return True

    def Wait(self) -> None:
        pass

    def Recv(self, words: Any, peer: int, tag: int) -> None:
        message = self._get((peer, self.rank, tag))
        words.reshape(-1)[: message.size] = message.reshape(-1)

    def Barrier(self) -> None:
        self.shared["barrier"].wait()

    def Allgather(self, mine: Any, everyone: Any) -> None:
        for peer in range(self.size):
            self._put((self.rank, peer, "all"), np.array(mine))
        for peer in range(self.size):
            everyone.reshape(self.size, -1)[peer] = self._get((peer, self.rank, "all"))

    def _put(self, key: Any, message: Any) -> None:
        with self.shared["lock"]:
            self.shared.setdefault(key, deque()).append(message)
            self.shared["lock"].notify_all()

    def _get(self, key: Any) -> Any:
        with self.shared["lock"]:
            found = self.shared["lock"].wait_for(lambda: self.shared.get(key), DEADLINE)
            assert found, f"no message {key}"
            return self.shared[key].popleft()


class FakeGroup:
    """What `lockstep.Group` is to a device."""

    def __init__(self, rank: int, size: int, shared: dict[Any, Any]) -> None:
        self.board = SimpleNamespace(enter=lambda phase: None)
        self.rank = self.world_rank = self.local_rank = rank
        self.size = self.local_size = size
        self.comm = FakeComm(rank, size, shared)

    def agree(self, step: Any, *, error: MdattnError | None = None) -> None:
        errors = self.allgather(error.to_json().decode() if error else "")
        for found in filter(None, errors):
            raise MdattnError.from_json(found.encode())

    def allgather(self, own: Any) -> list[Any]:
        for peer in range(self.size):
            self.comm._put((self.rank, peer, "allgather"), json.dumps(own))
        return [
            json.loads(self.comm._get((peer, self.rank, "allgather"))) for peer in range(self.size)
        ]

    def node_size(self) -> int:
        return 1

    def sum_in_order(self, own: Any) -> Any:
        return sum(np.array(each) for each in self.allgather(np.asarray(own).tolist()))
