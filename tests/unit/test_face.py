"""What the package offers: `dir()`, types, and an import that costs nothing."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import mdattn_mpi
from mdattn_mpi.errors import MdattnError

ROOT = Path(__file__).resolve().parents[2]


def test_everything_offered_is_there_and_shown() -> None:
    assert set(mdattn_mpi.__all__) <= set(dir(mdattn_mpi))
    assert list(mdattn_mpi.__all__) == sorted(set(mdattn_mpi.__all__))
    for name in mdattn_mpi.__all__:
        assert getattr(mdattn_mpi, name) is not None


def test_all_errors_are_offered() -> None:
    family = [MdattnError]
    for member in family:
        family.extend(c for c in member.__subclasses__() if c.__module__ == "mdattn_mpi.errors")
    assert {member.__name__ for member in family} <= set(mdattn_mpi.__all__)
    assert mdattn_mpi.RejectedError is import_module("mdattn_mpi.errors").RejectedError


def test_a_name_that_is_not_there_is_no_error_of_ours() -> None:
    with pytest.raises(AttributeError, match="no attribute 'atention'"):
        _ = mdattn_mpi.atention  # type: ignore[attr-defined]
    assert not hasattr(mdattn_mpi, "library_of_dreams")


@pytest.mark.parametrize(
    ("use", "unneeded"),
    [
        ("dir(mdattn_mpi), mdattn_mpi.__version__", {"numpy", "mpi4py", "h5py", "ml_dtypes"}),
        ("mdattn_mpi.RejectedError('no')", {"numpy", "mpi4py", "h5py", "ml_dtypes"}),
        ("mdattn_mpi.shard_spans(10, 0, 2), mdattn_mpi.Attention", {"mpi4py", "h5py", "torch"}),
        ("mdattn_mpi.open_dataset", {"mpi4py", "torch"}),
    ],
)
def test_nothing_is_imported_before_it_is_needed(use: str, unneeded: set[str]) -> None:
    program = f"import sys, mdattn_mpi; {use}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60,
        check=True,
    )  # fmt: skip
    loaded = set(done.stdout.split())
    assert "mdattn_mpi" in loaded
    assert not unneeded & loaded
