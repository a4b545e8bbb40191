"""The exception family: what a stranger becomes, how errors travel, and what the log keeps."""

import logging
from collections.abc import Callable, Iterator

import pytest

from mdattn_mpi.errors import (
    LOGGER,
    DeviceError,
    InternalError,
    ItemError,
    MdattnError,
    OutputError,
    RejectedError,
    name_ranks,
)
from mdattn_mpi.text import wrapped


class Log(logging.Handler):
    """Keeps what is logged, formatted with tracebacks."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += self.format(record) + "\n"


@pytest.fixture
def log() -> Iterator[Log]:
    handler = Log()
    LOGGER.addHandler(handler)
    yield handler
    LOGGER.removeHandler(handler)


class LibraryError(Exception):
    """Stands for what a library raises."""


def raised(error: Exception) -> Exception:
    def deep_down() -> None:
        raise error

    try:
        deep_down()
    except Exception as caught:
        return caught
    raise AssertionError


@pytest.mark.parametrize(
    "bug", [TypeError, KeyError, AssertionError, IndexError, NameError, ZeroDivisionError,
            AttributeError, ValueError, RecursionError, NotImplementedError, UnicodeError],
)  # fmt: skip
def test_an_exception_that_only_a_mistake_explains_is_internal(
    bug: Callable[[str], Exception],
) -> None:
    error = MdattnError.wrap(raised(bug("odd")), rank=2, item="x")
    assert type(error) is InternalError
    assert error.exit_code == 4
    text = str(error)
    assert text.startswith("item 'x', rank 2: ")
    for part in (bug.__name__, "odd", "(test_errors.py, line ", "a bug in mdattn_mpi", "log"):
        assert part in text


@pytest.mark.parametrize(
    "failure",
    [OSError(5, "broken"), RuntimeError("cuDNN"), LibraryError("x"), ImportError("libcuda.so")],
)
def test_what_a_library_reports_is_of_the_device(failure: Exception) -> None:
    assert type(MdattnError.wrap(raised(failure))) is DeviceError


def test_no_memory_has_a_fix() -> None:
    assert "-s ring" in str(MdattnError.wrap(MemoryError("8 GiB")))


@pytest.mark.parametrize("kind", [ItemError, OutputError, RejectedError])
def test_one_of_the_family_stays_what_it_is(kind: type[MdattnError]) -> None:
    error = kind("no", rank=1)
    assert MdattnError.wrap(error, rank=2, item="x") is error
    assert (error.rank, error.item) == (1, "x")


def test_an_error_says_the_same_on_other_ranks() -> None:
    for error in (MdattnError.wrap(raised(KeyError("x")), rank=1), RejectedError("no", fix="yes")):
        again = MdattnError.from_json(error.to_json())
        assert (type(again), str(again)) == (type(error), str(error))


def test_the_log_gets_the_traceback_and_what_led_to_it(log: Log) -> None:
    try:
        raise OutputError("can't be written") from OSError(28, "no space")
    except OutputError as error:
        MdattnError.wrap(error)
    MdattnError.wrap(raised(KeyError("x")))
    assert log.text.count("Traceback") == 2
    assert "no space\n\nThe above exception was the direct cause" in log.text
    assert log.text.count("in deep_down") == 1


def test_an_error_of_another_rank_is_not_logged_as_ones_own(log: Log) -> None:
    error = RejectedError("no", rank=1)
    error.agreed = True
    MdattnError.wrap(error, rank=0)
    assert log.text == ""


def test_without_a_log_nothing_is_printed_but_what_happened_goes_along(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    failure = raised(KeyError("x"))
    assert MdattnError.wrap(failure).__cause__ is failure
    assert capsys.readouterr().err == ""


def test_ranks_are_named_in_runs() -> None:
    assert name_ranks([3]) == "rank 3"
    assert name_ranks([0, 1, 2, 5]) == "ranks 0-2, 5"
    assert name_ranks(range(0, 100, 2), most=2) == "ranks 0, 2 and 48 more"


def test_messages_fit_a_narrow_terminal_and_keep_their_words() -> None:
    path = "/a/" + "long-" * 30
    text = wrapped(f"mdattn: error: {path} " + "some words " * 30)
    assert path in text
    assert max(len(line) for line in text.splitlines() if path not in line) <= 80
