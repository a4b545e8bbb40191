"""Queues and fences: what is waited for is over, and nothing is waited for twice."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from mdattn_mpi.devices.cuda.order import KEPT, Fence, Held, Queue, extend, is_past, latest
from tests.support.fake_gpu import FakeGpu, Machine


class Counted(FakeGpu):
    """Counts what it is asked for."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self.records = self.waits = 0

    def record(self, *args: Any, **options: Any) -> Any:
        self.records += 1
        return super().record(*args, **options)

    def wait(self, *args: Any) -> None:
        self.waits += 1
        super().wait(*args)


def queues(count: int, seed: int = 0) -> tuple[Counted, list[Queue]]:
    gpu = Counted(Machine(seed))
    return gpu, [Queue(gpu, gpu.stream()) for _ in range(count)]


def add(queue: Queue, done: list[Any], what: Any) -> Fence:
    queue.enqueue(lambda stream: stream.push(lambda: done.append(what)))
    return queue.now


ACTIONS = st.tuples(
    st.integers(0, 3), st.sampled_from(["add", "mark", "wait", "advance"]), st.integers(0, 99)
)


@settings(max_examples=60, deadline=None)
@given(st.lists(ACTIONS, max_size=60), st.integers(0, 99))
def test_what_comes_after_a_fence_comes_after_all_of_it(
    actions: list[tuple[int, str, int]], seed: int
) -> None:
    gpu, some = queues(4, seed)
    done: list[int] = []
    fences: list[tuple[Fence, set[int]]] = [({}, set())]
    after: list[set[int]] = [set() for _ in some]  # what has to be done before a queue goes on
    checks: list[tuple[int, set[int]]] = []
    for number, (which, action, choice) in enumerate(actions):
        queue = some[which]
        if action == "mark":
            queue.mark()
        elif action == "advance":
            fences.append((queue.advance(), set(after[which])))
        elif action == "wait":
            fence, needed = fences[choice % len(fences)]
            queue.wait(fence)
            after[which] |= needed
        else:
            checks.append((number, set(after[which])))
            after[which].add(number)
            fences.append((add(queue, done, number), set(after[which])))
    gpu.synchronize()
    for number, needed in checks:
        assert needed <= set(done[: done.index(number)])


def test_an_event_never_stands_for_what_came_later() -> None:
    gpu, (one, other) = queues(2)
    done: list[str] = []
    other.wait(add(one, done, "first"))
    early = add(one, done, "late")  # an event of `one` is there, from before
    other.wait(early)
    add(other, done, "after")
    gpu.synchronize()
    assert done.index("late") < done.index("after")
    assert gpu.records == gpu.waits == 2


def test_nothing_is_waited_for_twice() -> None:
    gpu, (one, two, three) = queues(3)
    fence = add(one, [], 0)
    two.wait(fence)
    two.wait(fence)
    assert (gpu.records, gpu.waits) == (1, 1)
    three.wait(add(two, [], 1))  # which has waited for `one`
    three.wait(fence)
    assert (gpu.records, gpu.waits) == (2, 2)
    three.wait(three.now)
    assert gpu.waits == 2


def test_what_is_past_is_not_waited_for() -> None:
    gpu, (one, two) = queues(2)
    fence = add(one, [], 0)
    assert not is_past(fence)  # nobody has asked the driver
    one.mark()
    gpu.synchronize()
    assert is_past(fence)
    two.wait(fence)
    assert gpu.waits == 0


def test_using_something_asks_nothing_of_the_driver() -> None:
    gpu, (one, two) = queues(2)
    fence = latest(one.advance(), two.advance(), one.advance())
    assert fence == {one: 2, two: 1}
    extend(fence, {one: 1})
    assert fence == {one: 2, two: 1}
    assert (gpu.records, gpu.waits) == (0, 0)


def test_an_old_place_is_stood_for_by_a_later_event() -> None:
    gpu, (one, two) = queues(2)
    done: list[int] = []
    old = add(one, done, 0)
    for number in range(1, 3 * KEPT):
        add(one, done, number)
        one.mark()
    two.wait(old)
    add(two, done, -1)
    gpu.synchronize()
    assert done.index(0) < done.index(-1)


def test_what_is_held_lives_until_its_fence_is_past() -> None:
    class Thing:
        pass

    from weakref import ref

    gpu, (one,) = queues(1)
    held, thing = Held(), Thing()
    alive = ref(thing)
    add(one, [], 0)
    held.hold(thing, one.now)
    del thing
    assert alive()
    gpu.synchronize()
    held.let_go()
    assert not alive()
