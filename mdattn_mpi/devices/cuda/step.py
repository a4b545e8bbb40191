"""Steps without their host: what a plan's call does is recorded once, then replayed.

The first call of a plan is done as ever. With the second one the ranks agree on its buffers, and
each records what the strategy does; from then on a call is one launch (two, where its transfers run
ahead), without a message between the hosts. Which calls are replayed depends only on the calls so
far, so that all ranks replay the same.

Where arrays lie that come from outside, or go there, is part of what is recorded: addresses that
were seen before have a recording of their own, all others are copied to and from a fixed place.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mdattn_mpi.devices.cuda.device import CudaDevice
from mdattn_mpi.devices.cuda.gpu import Gpu, Graph
from mdattn_mpi.devices.cuda.loans import Loans
from mdattn_mpi.devices.cuda.memory import DeviceArray, Memory
from mdattn_mpi.devices.cuda.order import Queue, events
from mdattn_mpi.devices.cuda.peers import Peers
from mdattn_mpi.devices.cuda.recorder import BYTE, Frame, Layout, Recorder, Result, Work
from mdattn_mpi.devices.cuda.windows import Route
from mdattn_mpi.errors import MdattnError
from mdattn_mpi.estimate import estimate
from mdattn_mpi.problem import Plan

MOST = 64  # plans that are remembered
MOST_BYTES = 1 << 31  # of all frames
# Seconds of an item of a batch behind which a host hides that asks for everything itself. On two
# H200s a stream of 8k (0.2 ms) took 0.27 ms replayed, else 0.52; of 16k (0.75 ms) 0.83, else 0.76.
HIDES_HOST = 5.5e-4
MOST_PLACES = 8  # recordings of one frame, by where arrays lie
SEEN = 32  # combinations of addresses that a frame remembers
LOAD = 16  # bytes; kernels load so many at a time

Arrays = tuple[DeviceArray, ...]
Addresses = tuple[int, ...]


class Recording(NamedTuple):
    """Graphs, and the arrays that they read and write instead of the caller's, if any."""

    graphs: tuple[Graph, ...]
    inputs: Arrays = ()
    outputs: Arrays = ()


@dataclass(eq=False)
class ReplayFrame:
    """A frame, and what was recorded in it."""

    frame: Frame
    copied: Recording
    direct: OrderedDict[Addresses, Recording] = field(default_factory=OrderedDict)
    seen: OrderedDict[Addresses, None] = field(default_factory=OrderedDict)
    busy: bool = False  # begun, and not launched to its end


@dataclass(eq=False)
class Step:
    """What is known of one plan's calls.

    Attributes
    ----------
    work
        What its calls do.
    nbytes
        Of one frame, as the same estimate says on all ranks.
    why_not
        Why it isn't recorded; empty where it may be.
    loans
        What its outputs lie in.

    """

    work: Work
    nbytes: int
    why_not: str
    loans: Loans | None = None
    frames: list[ReplayFrame] = field(default_factory=list)
    turn: int = 0

    def free_frame(self) -> ReplayFrame | None:
        """Take the next frame in turn, unless it is busy; None where there is no other."""
        if len(self.frames) < 2 and any(frame.busy for frame in self.frames):
            return None
        for _ in self.frames:
            self.turn = (self.turn + 1) % len(self.frames)
            if not self.frames[self.turn].busy:
                return self.frames[self.turn]
        return None


class Steps:
    """The steps of one device.

    Parameters
    ----------
    gpu, memory
        The driver, and device memory.
    recorder, peers
        What records; the other ranks.

    Attributes
    ----------
    counts
        How many calls were ``replayed``, and how many ``called`` as ever; how many times a step was
        ``recorded`` once more, for other addresses.
    why_not
        Why the last step wasn't recorded that should have been; empty if all were.

    """

    def __init__(self, gpu: Gpu, memory: Memory, recorder: Recorder, peers: Peers) -> None:
        self._gpu, self._memory, self._recorder, self._peers = gpu, memory, recorder, peers
        self._ahead = Queue(gpu, gpu.stream(5))
        self._steps: OrderedDict[Any, Step] = OrderedDict()
        self.counts: Counter[str] = Counter()
        self.why_not = ""

    def perform(
        self,
        device: CudaDevice,
        attend: Callable[..., Any],
        plan: Plan,
        inputs: Arrays,
        ahead: bool,
        options: dict[str, Any],
    ) -> Generator[None, None, Any]:
        """Collective. Attend as `attend` does: by replaying it, once it was recorded."""
        key = _key(plan, ahead, options)
        step = self._steps.get(key)
        frame = None
        if step is None:
            work = Work(attend, plan, options, tuple(map(Layout.of, inputs)), ahead)
            self._steps[key] = self._new_step(device, work)
            self._forget_old()
        else:
            frame = self._frame(step)
        if step is None or frame is None:
            self.counts["called"] += 1
            if step is not None:
                self._steps.move_to_end(key)
            steps: Generator[None, None, Any] = attend(device, plan, *inputs, **options)
            return steps
        return self._replay(device, key, frame, inputs)

    def is_ready(self, plan: Plan, options: dict[str, Any]) -> bool:
        """Whether a call that isn't ahead will be replayed without a word to other ranks."""
        step = self._steps.get(_key(plan, False, options))
        return step is not None and any(not frame.busy for frame in step.frames)

    def describe(self) -> str:
        """Say how many calls were replayed, for example ``38 of 40 calls``."""
        replayed, called = self.counts["replayed"], self.counts["called"]
        why = f" (not recorded: {self.why_not})" if self.why_not else ""
        return f"{replayed} of {replayed + called} calls{why}"

    def close(self) -> None:
        """Forget everything; the GPU has come to rest."""
        for step in self._steps.values():
            self._release(step)
        self._steps.clear()

    # -- what is recorded --------------------------------------------------------------------------

    def _frame(self, step: Step) -> ReplayFrame | None:
        """Collective. Find a frame for a call, or make one; None: do it as ever."""
        if step.why_not:
            return None
        frame = step.free_frame()
        if frame is None:
            frame = self._record(step)
            if frame is None:
                return None
            step.turn = len(step.frames)
            step.frames.append(frame)
            self._forget_old()
        frame.busy = True
        return frame

    def _new_step(self, device: CudaDevice, work: Work) -> Step:
        plan = work.plan
        costs = device.costs(plan.problem)
        found = estimate(
            plan.problem, plan.ranks, plan.strategy, costs, batch=work.ahead, owners=plan.partition
        )
        why_not = "it is too large" if found.memory > MOST_BYTES // 4 else ""
        if work.ahead and found.seconds > HIDES_HOST:
            why_not = "its host is hidden"
        return Step(work, found.memory, why_not)

    def _forget_old(self) -> None:
        """Keep within bounds, on all ranks alike."""
        for key, step in list(self._steps.items()):
            held = sum(len(step.frames) * step.nbytes for step in self._steps.values())
            if len(self._steps) <= MOST and held <= MOST_BYTES:
                return
            busy = any(frame.busy for frame in step.frames)
            if not busy and (step.frames or len(self._steps) > MOST):
                self._release(self._steps.pop(key))

    def _record(self, step: Step) -> ReplayFrame | None:
        """Collective. Agree on a frame's buffers, and record in it; None where a rank can't."""
        work = step.work
        flags = self._memory.empty((self._recorder.windows.flag_bytes,), BYTE)
        frame, wrong = Frame(Route(flags)), ""
        self._ahead.wait(flags.allocation.used)
        self._ahead.enqueue(self._gpu.fill, flags.address, 0, flags.nbytes // 4)
        try:  # the first time only to learn what arrays there are
            self._recorder.destroy(self._recorder.record(frame, work, {}))
        except Exception as error:  # all ranks must hear of it
            wrong = MdattnError.wrap(error).what
        self._ahead.mark().sync()  # nobody may raise a flag before it is down
        graphs: tuple[Graph, ...] = ()
        if self._peers.all_agree(not wrong):
            self._recorder.windows.agree(frame.route)
            try:
                graphs = self._recorder.record(frame, work, {})
            except Exception as error:
                wrong = MdattnError.wrap(error).what
        if self._peers.all_agree(bool(graphs)):
            frame.idle = frame.holding.begin
            copied = self._copied(frame, work, graphs)
            step.loans = step.loans or Loans(self._memory, copied.outputs)
            return ReplayFrame(frame, copied)
        self._recorder.destroy(graphs)
        self._recorder.release(frame)
        step.why_not = self.why_not = wrong or "another rank can't"
        return None

    def _copied(self, frame: Frame, work: Work, graphs: tuple[Graph, ...]) -> Recording:
        """What reads and writes arrays of the frame's own."""
        addresses = [
            self._memory.blocks[place.block] + place.start
            for place in frame.holding.places[: len(work.inputs)]
        ]
        inputs = (layout.at(at) for layout, at in zip(work.inputs, addresses, strict=True))
        outputs = (result.layout.at(result.address) for result in frame.results)
        return Recording(graphs, tuple(inputs), tuple(outputs))

    def _recording(
        self, found: ReplayFrame, work: Work, inputs: Arrays, outputs: Arrays
    ) -> Recording:
        """Find the recording for these arrays; make one where they lie as once before."""
        at = tuple(array.address for array in (*inputs, *outputs))
        if at in found.direct:
            found.direct.move_to_end(at)
            return found.direct[at]
        if at not in found.seen:
            found.seen[at] = None
            if len(found.seen) > SEEN:
                found.seen.popitem(last=False)
            return found.copied
        results = found.frame.results
        if not _may_be_direct((*inputs, *outputs), results):
            return found.copied
        numbers = (*range(len(inputs)), *(result.number for result in results))
        try:
            graphs = self._recorder.record(found.frame, work, dict(zip(numbers, at, strict=True)))
        except Exception as error:  # this rank can go on as before
            self.why_not = MdattnError.wrap(error).what
            return found.copied
        self.counts["recorded"] += 1
        found.direct[at] = Recording(graphs)
        if len(found.direct) > MOST_PLACES:
            self._rest(found)
            self._recorder.destroy(found.direct.popitem(last=False)[1].graphs)
        return found.direct[at]

    def _rest(self, found: ReplayFrame) -> None:
        """Wait for the end of what a frame is used for."""
        for event in events(found.frame.idle):
            event.sync()

    def _release(self, step: Step) -> None:
        for found in step.frames:
            self._rest(found)
            for recording in (found.copied, *found.direct.values()):
                self._recorder.destroy(recording.graphs)
            self._recorder.release(found.frame)
        step.frames.clear()
        step.loans = None

    # -- what is replayed --------------------------------------------------------------------------

    def _replay(
        self, device: CudaDevice, key: Any, found: ReplayFrame, inputs: Arrays
    ) -> Generator[None, None, Any]:
        """Do what was recorded, in the order of the device's kernels and transfers."""
        step, frame, main = self._steps[key], found.frame, device.kernels.main
        assert step.loans is not None
        try:
            at = tuple(array.address for array in inputs)
            known = {each[len(at) :] for each in found.direct if each[: len(at)] == at}
            outputs = step.loans.take(known)
            recording = self._recording(found, step.work, inputs, outputs)
            *first, last = recording.graphs
            before = [frame.idle, *(array.allocation.written for array in inputs)]
            if first:
                self._take_in(device, self._ahead, before, recording, inputs)
                self._ahead.enqueue(self._gpu.launch, first[0])
                before = [self._ahead.now]
                for array in inputs:
                    array.allocation.read(self._ahead.now)
            yield
        except BaseException:  # closed, as if it had not been called; or there is no memory
            found.busy = False
            raise
        self._steps.move_to_end(key)
        self.counts["replayed"] += 1
        device.kernels.join()
        start = device.clock.time(main)
        if first:
            main.wait(*before)
        else:
            self._take_in(device, main, before, recording, inputs)
        main.wait(*(array.allocation.used for array in outputs))
        main.enqueue(self._gpu.launch, last)
        for array, source in zip(outputs, recording.outputs, strict=False):
            device.move(main, source, array)
        device.clock.computed(start, device.clock.time(main))
        end = frame.idle = main.now
        for array in inputs:
            array.allocation.read(end)
        for array in outputs:
            array.allocation.wrote(end)
        found.busy = False
        return outputs

    def _take_in(
        self,
        device: CudaDevice,
        queue: Queue,
        before: list[Any],
        recording: Recording,
        inputs: Arrays,
    ) -> None:
        """Let `queue` come after all that must be over; copy what the graphs read elsewhere."""
        queue.wait(*before)
        for array, target in zip(inputs, recording.inputs, strict=False):
            device.move(queue, array, target)


def _key(plan: Plan, ahead: bool, options: dict[str, Any]) -> Any:
    """Return what calls of one step have in common."""
    return plan.digest, ahead, *sorted(options.items())


def _may_be_direct(arrays: Arrays, results: tuple[Result, ...]) -> bool:
    """Whether kernels can work on arrays as they are, and write results where they belong."""
    return all(array.is_contiguous and array.address % LOAD == 0 for array in arrays) and all(
        result.number >= 0 for result in results
    )
