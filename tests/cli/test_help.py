"""Help: every command has some, and asking for it loads nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from mdattn_mpi import __version__
from mdattn_mpi.cli import COMMANDS, main, make_parser
from tests.support.complaint import complaint

LOADED = """
    import sys
    from mdattn_mpi.cli import main
    try:
        main(sys.argv[1:])
    except SystemExit:
        print(*sys.modules, file=sys.stderr)
"""
HEAVY = {"numpy", "mpi4py", "h5py", "torch", "tensorrt", "tensorrt_rtx", "cuda", "onnx"}


def loaded(*argv: str) -> set[str]:
    """Modules that are there after asking for help."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LOADED), *argv],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "usage: mdattn" in done.stdout
    return set(done.stderr.split())


def commands_in(modules: set[str]) -> set[str]:
    inside = "mdattn_mpi.cli."
    return {name.removeprefix(inside) for name in modules if name.startswith(inside)} - {"options"}


def test_the_list_of_commands_loads_none_of_them() -> None:
    modules = loaded("--help")
    assert not commands_in(modules)
    assert not HEAVY & modules
    assert not {name for name in modules if name.startswith("mdattn_mpi.bench")}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_loads_no_other(name: str) -> None:
    modules = loaded(name, "--help")
    assert commands_in(modules) == {name.replace("-", "_")}
    assert not HEAVY & modules
    benchmarks = {module for module in modules if module.startswith("mdattn_mpi.bench")}
    assert bool(benchmarks) == (name == "bench")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_a_narrow_terminal(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([name, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 5
    assert not [line for line in lines if len(line) > 80]


def test_the_list_says_what_each_command_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    for name, about in COMMANDS.items():
        assert name in text
        assert about in text


def test_an_unknown_command_is_told_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["walk"])
    assert exit.value.code == 2
    assert "make-data" in complaint(capsys)


def test_completion_can_see_all_commands_at_once() -> None:
    assert make_parser().parse_args(["make-data", "x.h5"]).path == "x.h5"
    assert make_parser().parse_args(["inspect", "x.h5"]).main


@pytest.mark.parametrize(
    "name",
    [
        *("agree", "attention", "broadcast", "groups", "job", "memory", "predict", "ranks"),
        *("scaling", "tensorrt"),
    ],
)
def test_every_benchmark_is_there(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["bench", name, "--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert f"mdattn bench {name}" in text
    assert "--json" in text


def test_mdattn_alone_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main([])
    assert exit.value.code == 0
    assert "doctor" in capsys.readouterr().out


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"mdattn {__version__}\n"


def test_control_c_gets_no_traceback(tmp_path: Path) -> None:
    program = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"
    program += "; from mdattn_mpi.cli import main; sys.exit(main())"  # SIGINT as from a terminal
    command = [sys.executable, "-c", program, "make-data", str(tmp_path / "d.h5")]
    made = subprocess.Popen(
        [*command, "--items", "40", "--length", "8192"],
        stderr=subprocess.PIPE,
        text=True,
    )
    while made.poll() is None and not list(tmp_path.glob(".d.h5*")):
        time.sleep(0.05)
    made.send_signal(signal.SIGINT)
    _, errors = made.communicate(timeout=60)
    assert (made.returncode, errors) == (130, "mdattn: interrupted\n")
    assert not (tmp_path / "d.h5").exists()


@pytest.mark.parametrize(
    ("line", "answer"), [("mdattn ins", "inspect "), ("mdattn run --overw", "--overwrite ")]
)
def test_the_shell_completes(line: str, answer: str) -> None:
    pytest.importorskip("argcomplete", reason="pip install 'mdattn_mpi[completion]'")
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line))}
    command = f'exec "{sys.executable}" -m mdattn_mpi 8>&1 9>/dev/null'
    done = subprocess.run(
        ["bash", "-c", command],
        env={**os.environ, **asked},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == answer
