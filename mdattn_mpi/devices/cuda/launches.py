"""Calls made ready, before they are wanted where somebody knows of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from mdattn_mpi.devices.cuda.attention import AttentionCall, Launch
from mdattn_mpi.devices.cuda.choice import Chooser

MOST = 2048


class Launches:
    """The launches of one GPU, made once a call and kept.

    Parameters
    ----------
    chooser
        Which engine does what.
    enter
        Makes the GPU current in a thread.

    """

    def __init__(self, chooser: Chooser, enter: Callable[[], None]) -> None:
        self.chooser = chooser
        self._ready: OrderedDict[AttentionCall, Launch] = OrderedDict()
        self._coming: dict[AttentionCall, Future[Launch]] = {}
        self._thread = ThreadPoolExecutor(1, "prepare", initializer=enter)

    def get(self, call: AttentionCall) -> Launch:
        """Return the launch of `call`, as soon as it is ready.

        Raises
        ------
        RejectedError
            No engine can do it.

        """
        launch = self._ready.get(call)
        if launch is None:
            launch = self._ready[call] = self._make_or_await(call)
            if len(self._ready) > MOST:
                self._ready.popitem(last=False)
        else:
            self._ready.move_to_end(call)
        return launch

    def prepare(self, calls: Iterable[AttentionCall]) -> None:
        """Make calls ready in a thread, in this order."""
        for call in calls:
            if call not in self._ready and call not in self._coming:
                self._coming[call] = self._thread.submit(self._make, call)

    def abort(self) -> None:
        """Drop what isn't begun; wait for nothing."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Drop what isn't begun; release the engines."""
        self._thread.shutdown(cancel_futures=True)
        self._ready.clear()
        for engine in self.chooser.engines.values():
            engine.close()

    def _make_or_await(self, call: AttentionCall) -> Launch:
        coming = self._coming.pop(call, None)
        # One that the thread hasn't come to yet isn't waited for.
        return self._make(call) if coming is None or coming.cancel() else coming.result()

    def _make(self, call: AttentionCall) -> Launch:
        return self.chooser.choose(call).engine.prepare(call)
