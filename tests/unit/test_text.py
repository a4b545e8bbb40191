"""Text for people."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mdattn_mpi import text
from mdattn_mpi.text import counted, duration, memory_size, printable, quantity, wrapped


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0 ms"),
        (5.8e-5, "58 µs"),
        (2.1e-4, "210 µs"),
        (2e-6, "2.0 µs"),
        (0.0006, "0.6 ms"),
        (0.9996, "1.0 s"),
        (59.97, "1 min 00 s"),
        (0.0123, "12.3 ms"),
        (4.24, "4.2 s"),
        (185, "3 min 05 s"),
        (42000, "11 h 40 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_lines_are_wrapped_between_words_and_tables_stay() -> None:
    path = "/a/very-long/path" * 8
    text = f"mdattn: {'word ' * 40}\n{'name':<30}{'1.0 s':>20}\nmdattn: summary in {path}"
    lines = wrapped(text).splitlines()
    assert all(len(line) <= 80 or line.strip() == path for line in lines)
    assert f"{'name':<30}{'1.0 s':>20}" in lines
    assert lines[-1].strip() == path


def test_counts() -> None:
    assert [counted(number, "item") for number in (0, 1, 2)] == ["0 items", "1 item", "2 items"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B/s"),
        (999.4, "999 B/s"),
        (999.6, "1 kB/s"),
        (1.88e9, "1.88 GB/s"),
        (3e18, "3e+03 PB/s"),
    ],
)
def test_quantities(value: float, text: str) -> None:
    assert quantity(value, "B/s") == text


def test_memory() -> None:
    assert [memory_size(n) for n in (0, 1000, 1536, 3 << 30)] == [
        "0 B",
        "0.977 KiB",
        "1.5 KiB",
        "3 GiB",
    ]


def test_what_could_drive_a_terminal_is_gone() -> None:
    assert printable("a\x1b[2Jb") == "a [2Jb"


def test_a_reader_that_has_left() -> None:
    read, write = os.pipe()
    os.close(read)
    program = "from mdattn_mpi.text import show; show('nobody reads this'); show('nor this')"
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=write, stderr=subprocess.PIPE, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_what_is_missing_can_be_installed_from_where_this_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(text, "__file__", str(tmp_path / "mdattn_mpi" / "text.py"))
    assert text.install("cuda") == "pip install 'mdattn_mpi[cuda]'"
    (tmp_path / "setup.cfg").touch()
    assert text.install("cuda") == f"pip install -e '{tmp_path}[cuda]'"
