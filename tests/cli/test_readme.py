"""What the documentation tells people to type works.

Commands are the lines with a prompt, ``$ ``, in blocks marked ``console`` or ``sh``. Those of one
document run in their order, in one folder that holds the sample as data/, and as programs the
blocks marked ``python`` whose first line names a file, ``# example.py``.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from mdattn_mpi.text import COLUMNS
from tests.support.mpirun import ROOT, environment, kill_all

DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("data/*.md"))
)
BLOCK = re.compile(r"^ *```(?:console|sh)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
PROGRAM = re.compile(r"^```python\n# (\w+\.py)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^ *\$ ((?:.*\\\n)*.*)$", re.MULTILINE)

# Why a command isn't run here, by what is in it. The first that matches counts.
ELSEWHERE = {
    **(
        {}
        if find_spec("transformers")
        else {r"(transformer|make_model|parallel)\.py|\btiny": "needs the extra transformers"}
    ),
    r"\b(sbatch|srun|squeue|scancel|salloc|mdattn submit)\b": "needs Slurm",
    r"-b (cuda|tensorrt)|\bmdattn build\b|nvidia-smi|--backend (cuda|tensorrt)": "needs a GPU",
    r"^git |^cd ": "about getting the source",
    r"^make |^\. |^source |\bpip install\b": "about the environment that these tests run in",
    r"^(sudo |apt)": "installs system packages",
    r"\b(less|vi|h5dump|h5ls)\b": "needs a program that may not be here",
}
SCREEN = 40  # rows, of 80 columns: what a newcomer sees at once
NEITHER_ROOT_NOR_CORES = {  # for mpirun as people type it
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
}


def commands(text: str) -> list[str]:
    """All commands of a document."""
    return [command for block in BLOCK.findall(text) for command in COMMAND.findall(block)]


def reason_elsewhere(command: str) -> str:
    """Why `command` can't run here; empty when it can."""
    found = (reason for pattern, reason in ELSEWHERE.items() if re.search(pattern, command))
    return next(found, "")


def text_of(document: str) -> str:
    """The text of one of `DOCUMENTS`."""
    return (ROOT / document).read_text("utf-8")


def run(command: str, folder: Path) -> str:
    """Run one command; what it printed.

    Raises
    ------
    AssertionError
        It failed.

    """
    variables = environment(NEITHER_ROOT_NOR_CORES)
    try:
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )
    finally:
        kill_all(variables["MDATTN_TEST_RUN"])
    assert done.returncode == 0, f"$ {command}\n{done.stdout}exit code {done.returncode}"
    return done.stdout


@pytest.mark.timeout(900)
@pytest.mark.parametrize("document", [name for name in DOCUMENTS if commands(text_of(name))])
def test_commands_of(document, tmp_path, record_property):
    found = commands(text_of(document))
    here = [command for command in found if not reason_elsewhere(command)]
    for command in found:
        if reason := reason_elsewhere(command):
            record_property("skipped", f"{command}: {reason}")
            print(f"not run ({reason}): {command}")
    if not here:
        pytest.skip(f"none of its {len(found)} commands can run here")
    shutil.copytree(ROOT / "data", tmp_path / "data")
    lacking = [command for command in found if "needs the extra" in reason_elsewhere(command)]
    for name, program in PROGRAM.findall(text_of(document)):
        assert any(name in command for command in (*here, *lacking)), f"nothing runs {name}"
        (tmp_path / name).write_text(program)
    for command in here:
        said = run(command, tmp_path)
        print(f"$ {command}\n{said}")
        if document == "docs/tutorial.md":
            assert rows(said) <= SCREEN, f"$ {command}\n{said}fills more than a screen"


def rows(text: str) -> int:
    """How many rows of a terminal `text` takes."""
    return sum(max(1, -(-len(line) // COLUMNS)) for line in text.splitlines())


def test_finds_commands_and_what_belongs_to_them():
    text = """
```console
$ mdattn inspect data/sample.h5
what it printed
$ mpirun -n 2 mdattn run \\
    data/sample.h5 -o out.h5
$ sbatch jobs/attention.sbatch
```
```python
$ not this
```
  ```sh
  $ make run
  not this either
  ```
"""
    found = commands(text)
    assert found == [
        "mdattn inspect data/sample.h5",
        "mpirun -n 2 mdattn run \\\n    data/sample.h5 -o out.h5",
        "sbatch jobs/attention.sbatch",
        "make run",
    ]
    assert [bool(reason_elsewhere(command)) for command in found] == [False, False, True, True]


def test_a_command_that_fails_is_reported_with_what_it_printed(tmp_path):
    with pytest.raises(AssertionError, match=r"\$ mdattn inspect nowhere\.h5(.|\n)*exit code 2"):
        run("mdattn inspect nowhere.h5", tmp_path)


@pytest.mark.parametrize("document", ["README.md", "docs/library.md", "docs/tutorial.md"])
def test_every_program_that_people_copy_is_run(document):
    text = text_of(document)
    assert len(PROGRAM.findall(text)) == text.count("```python") > 0
