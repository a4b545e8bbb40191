"""How long a library call waits for ranks, and what is said of those that don't come."""

import pytest

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.lockstep.arrival import DEFAULT, call_deadline, missing_ranks


def test_the_argument_goes_before_the_environment_and_that_before_the_default() -> None:
    assert call_deadline(None, {}) == DEFAULT
    assert call_deadline(None, {"MDATTN_DEADLINE": ""}) == DEFAULT
    assert call_deadline(None, {"MDATTN_DEADLINE": "2.5"}) == 2.5
    assert call_deadline(7, {"MDATTN_DEADLINE": "2.5"}) == 7.0
    assert call_deadline(float("inf"), {}) == float("inf")


@pytest.mark.parametrize("value", ["0", "-1", "nan", "soon", "1e"])
def test_what_is_no_time_is_refused(value: str) -> None:
    with pytest.raises(RejectedError, match="MDATTN_DEADLINE is"):
        call_deadline(None, {"MDATTN_DEADLINE": value})


def test_a_bad_argument_is_refused() -> None:
    with pytest.raises(RejectedError, match="deadline is '0'"):
        call_deadline(0, {})


def test_missing_ranks_are_named_in_few_words() -> None:
    error = missing_ranks([2, 3, 4, 9], "attention", 600.0)
    assert str(error).startswith("ranks 2-4, 9 never reached attention (waited 600 s). Fix: ")
    assert error.exit_code == 75
