"""Events of a job that nobody ran: as many ranks and items as a page should be able to show."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from mdattn_mpi.runner.events import Events

NODE = 8  # ranks


def write_run(
    folder: Path,
    names: Sequence[str],
    *,
    ranks: int,
    run: int = 1,
    item_seconds: float = 0.1,
    slow: tuple[int, int] = (-1, -1),
    seed: int = 0,
    closed: bool = True,
) -> None:
    """Write what ranks would have kept of a run over all items.

    On the rank and item of `slow` computing takes ten times as long.
    """
    folder.mkdir(exist_ok=True)
    chance = random.Random(seed)
    begins, ends = [0.0], []
    for number in range(len(names)):
        took = item_seconds * chance.uniform(0.8, 1.2) * (10 if number == slow[1] else 1)
        ends.append(begins[-1] + took)
        begins.append(ends[-1] + 0.01 * item_seconds)
    rows = {name: number for number, name in enumerate(names)}
    for rank in range(ranks):
        path = folder / f"events-{rank // NODE * NODE:04}.jsonl"
        events = Events(path, ranks, rows)
        about = {"about": _about(ranks, len(names))} if rank == 0 else {}
        events.start(run, rank, host=f"node{rank // NODE}", device_name="made up", **about)
        for number, name in enumerate(names):
            _item(events, chance, number, name, begins[number], ends[number], rank, slow)
            if rank == 0:
                events._done.append((name, events.zero + round(1e9 * ends[number])))
        events._over.set()
        events._thread.join()
        events._append({**events._taken(), **({"ended": 0, "stopped": False} if closed else {})})
        events._forgo()


def _about(ranks: int, items: int) -> dict[str, object]:
    return {"command": "mdattn run", "ranks": ranks, "todo": items, "strategies": ["ring"]}


def _item(
    events: Events,
    chance: random.Random,
    number: int,
    name: str,
    begin: float,
    end: float,
    rank: int,
    slow: tuple[int, int],
) -> None:
    """One item of one rank: compute, wait for the others, and what the threads do meanwhile."""

    def at(seconds: float) -> int:
        return events.zero + round(1e9 * seconds)

    is_late = rank == slow[0] or number != slow[1]
    whole = end - begin
    computed = begin + whole * (chance.uniform(0.9, 0.99) if is_late else 0.1)
    begun = begin + 0.01 * whole
    events.main += [
        ("begin", name, at(begin), at(begun)),
        ("enqueue", name, at(begun), at(computed)),
        ("agree", name, at(computed), at(end)),
    ]
    read = begin + whole * chance.uniform(0.1, 0.4)
    written = begin + whole * chance.uniform(0.2, 0.5)
    events.read.append(("read", name, at(begin), at(read)))
    events.write += [
        ("collect", name, at(begin), at(begin + 0.05 * whole)),
        ("write", name, at(begin + 0.05 * whole), at(written)),
        ("sync", name, at(written), at(written + 0.1 * whole)),
    ]
    exchange = whole * chance.uniform(0.01, 0.1)
    compute = computed - begun - exchange
    events._device.append((at(begin), at(end), compute, exchange, 0.0))
