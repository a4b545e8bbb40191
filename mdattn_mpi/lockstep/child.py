"""The rank itself: what the watchdog's child does around the job's `main`."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from mdattn_mpi.errors import LOGGER, InternalError, MdattnError, log_traceback
from mdattn_mpi.lockstep.blame import BY_MPI, INTERRUPTED
from mdattn_mpi.lockstep.board import Board
from mdattn_mpi.lockstep.launcher import launcher
from mdattn_mpi.lockstep.process import set_death_signal
from mdattn_mpi.lockstep.record import ENDED, RUNNING
from mdattn_mpi.text import wrapped

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
DUMP = signal.SIGRTMIN + 9  # asks the rank for its stacks


def be_the_rank(main: Callable[[], int], board: Board, stacks: int, watchdog: int) -> NoReturn:
    """Run `main` and exit with its code; what goes wrong is left on the board and in `stacks`."""
    code = InternalError.exit_code
    try:
        set_death_signal(signal.SIGKILL)
        if os.getppid() != watchdog:
            os._exit(INTERRUPTED)
        board.identify(watchdog_pid=watchdog)
        faulthandler.enable(stacks)
        faulthandler.register(DUMP, stacks)
        threading.excepthook = lambda thread: _fail(board, stacks, thread.exc_value)
        for number in STOPS:
            signal.signal(number, lambda *_: board.request_stop())
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {*STOPS, signal.SIGCHLD})
        code = _run(main, board)
    except BaseException as error:
        code = _note_failure(board, stacks, error)
    finally:
        _exit(board, code)


def _run(main: Callable[[], int], board: Board) -> int:
    """Call `main` and leave the world with the others, if they are leaving too."""
    try:
        code = main()
    except MdattnError as error:
        if not error.agreed and board.page.state != RUNNING:
            raise
        if isinstance(error, InternalError) and error.__cause__ and not LOGGER.handlers:
            traceback.print_exception(error)  # it is this rank's own, and there is no log yet
        if not error.agreed or launcher().rank == 0:
            print(wrapped(f"mdattn: error: {error}"), file=sys.stderr, flush=True)
        code = error.exit_code
    except SystemExit as stop:
        if board.page.state != RUNNING or not stop.code:
            raise
        code = stop.code if isinstance(stop.code, int) else 1
    if board.page.state == RUNNING:
        board.end()
    elif board.page.state != ENDED:
        from mdattn_mpi.lockstep.world import leave

        leave(board)
    return code


def _note_failure(board: Board, stacks: int, error: BaseException) -> int:
    """Leave for the watchdog what went wrong, and where; return the exit code."""
    if isinstance(error, SystemExit):
        board.fail(f"called sys.exit({error.code!r})")
        code = INTERRUPTED
    else:
        by_mpi = type(error).__module__.partition(".")[0] == "mpi4py"
        board.fail(f"{BY_MPI if by_mpi else 'raised ' + type(error).__name__}: {error}")
        code = error.exit_code if isinstance(error, MdattnError) else InternalError.exit_code
        log_traceback(error)
        if not LOGGER.handlers and not board.page.folder:  # nor will there be a death note
            traceback.print_exception(error)
    text = "".join(traceback.format_exception(error))
    os.write(stacks, text.encode(errors="replace"))
    return code


def _fail(board: Board, stacks: int, error: BaseException | None) -> None:
    """Take the rank down for an exception that nobody caught in a thread."""
    if error is not None and not isinstance(error, SystemExit):  # a thread may end itself that way
        _exit(board, _note_failure(board, stacks, error))


def _exit(board: Board, code: int) -> NoReturn:
    """Exit at once: no thread is waited for, and no destructor talks to ranks that are gone."""
    board.exit(code)
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    if board.page.state == ENDED and "PMI_FD" in os.environ:
        # MPICH signs off from its launcher in an exit handler, and is killed if it doesn't.
        ctypes.PyDLL(None).exit(code)
    os._exit(code)
