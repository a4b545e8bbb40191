"""``mdattn submit``: golden scripts, what is refused, and what names may hold."""

from __future__ import annotations

import shlex
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdattn_mpi.cli import main
from mdattn_mpi.cli.submit import SIGNATURE, seconds_of
from tests.support.complaint import complaint

GOLDEN = Path(__file__).with_name("golden")

CASES = {
    "one-node": "data.h5 -o out.h5 --nodes 1 --gpus-per-node 8 --time 04:00:00",
    "many-nodes": "data.h5 -o out.h5 --nodes 16 --gpus-per-node 4 --cpus-per-rank 12 --doctor "
    "--account ab12 --partition gpu --qos long --time 1-12:00:00 --run -b cuda --group-size auto",
    "array": "data.h5 more.h5 -o results --array 2 --nodes 1 --gpus-per-node 8",
    "requeue": "data.h5 -o out.h5 --nodes 2 --gpus-per-node 8 --requeue --setup env.sh",
    "mpirun": "data.h5 -o out.h5 --nodes 2 --ranks-per-node 4 --launcher mpirun --warning 60",
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("data.h5", "more.h5"):
        (tmp_path / name).write_bytes(dataset())
    (tmp_path / "env.sh").touch()
    (tmp_path / "foreign.h5").write_bytes(b"x" * 5000)
    return tmp_path


@cache
def dataset() -> bytes:
    """The bytes of a small dataset."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "data.h5")
        assert main(["make-data", str(path), "--items", "1", "--length", "3", "--quiet"]) == 0
        return path.read_bytes()


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["submit", "--dry-run", *words]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, *CASES[name].split())
    assert list(folder.glob("*.sbatch")) == []
    assert text.replace(str(folder), "/home/me") == (GOLDEN / f"{name}.sbatch").read_text()


@pytest.mark.parametrize("name", CASES)
def test_bash_can_read_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, *CASES[name].split())
    subprocess.run(["bash", "-n"], input=text, text=True, check=True, timeout=30)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("data.h5 -o out.h5 --nodes 1 --account 'a;touch x'", "--account is 'a;touch x'"),
        ("data.h5 -o out.h5 --nodes 1 --partition=-x", "--partition is '-x'"),
        ("data.h5 -o out.h5 --nodes 1 --qos 'a b'", "--qos is 'a b'"),
        ("data.h5 -o out.h5 --nodes 1 --qos 'a\n#SBATCH --wrap=x'", "--qos is"),
        ("data.h5 -o out.h5 --nodes 1 --mpi 'pmix -w n3'", "--mpi is"),
        ("data.h5 -o out.h5 --nodes 1 --time 'an hour'", "write minutes"),
        ("data.h5 -o out.h5 --nodes 1 --time '10\n'", "write minutes"),
        ("data.h5 -o 'out\n#SBATCH.h5' --nodes 1", "control characters"),
        ("none.h5 -o out.h5 --nodes 1", "none.h5: no such file"),
        ("foreign.h5 -o out.h5 --nodes 1", "foreign.h5: is not an HDF5 file"),
        ("data.h5 -o data.h5 --nodes 1", "would be the dataset itself"),
        ("data.h5 more.h5 -o . --nodes 1 --array 1", "would be the dataset itself"),
        (
            "data.h5 -o out.h5 --nodes 3 --run --group-size 2",
            "cut into groups of 2",
        ),
        ("data.h5 -o out.h5 --nodes 1 --time 2 --warning 120", "limit of 2 min 00 s"),
        ("data.h5 -o there/out.h5 --nodes 1", "folder isn't there"),
        ("data.h5 more.h5 -o out --nodes 1", "add --array"),
        ("data.h5 ./data.h5 -o out --nodes 1 --array 1", "different -o"),
        ("data.h5 -o out.h5 --nodes 1 --setup nowhere.sh", "no such file"),
        ("data.h5 -o out.h5 --nodes 1 --gpus-per-node 8 --ranks-per-node 2", "2 ranks for 8 GPUs"),
        ("data.h5 -o out.h5 --nodes 1 --requeue --launcher mpirun", "use --launcher srun"),
        ("data.h5 -o out.h5 --nodes 1 --run --nonsense", "mdattn run would refuse"),
        ("data.h5 -o out.h5 --nodes 1 --run other.h5", "data is named twice"),
        ("data.h5 -o out.h5 --nodes 1 --run -o other.h5", "output is named twice"),
        ("data.h5 -o out.h5 --nodes 1 --run --items 'a\nb'", "control characters"),
    ],
)
def test_refused(words: str, said: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", *shlex.split(words)]) == 2
    assert said in complaint(capsys)
    assert list(folder.glob("**/*.sbatch")) == []


@pytest.mark.parametrize("nodes", ["0", "-1", "two", "1;2"])
def test_node_counts(nodes: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["submit", "data.h5", "-o", "out.h5", "--nodes", nodes])
    assert stop.value.code == 2
    assert nodes in complaint(capsys)


printable = st.text(
    st.characters(min_codepoint=32, max_codepoint=0x2FFF, exclude_categories=("Cs", "Cc"))
    .filter(lambda letter: letter != "/"),
    min_size=1, max_size=30,
).filter(lambda name: name not in (".", ".."))  # fmt: skip


@given(data=printable, output=printable, pattern=printable)
def test_names_reach_the_program_as_they_are(
    data: str, output: str, pattern: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Run the script for real, with an srun that writes down what it got."""
    folder = tmp_path_factory.mktemp("names")
    try:
        (folder / data).write_bytes(dataset())
    except OSError:  # this file system takes no such name
        return
    bin_folder = folder / "a bin of mine"
    bin_folder.mkdir()
    (bin_folder / "srun").write_text('#!/bin/sh\nprintf "%s\\0" "$@" > "$GOT"\n')
    (bin_folder / "srun").chmod(0o755)
    (bin_folder / "squeue").write_text("#!/bin/sh\n")
    (bin_folder / "squeue").chmod(0o755)
    (bin_folder / "sbatch").write_text('#!/bin/sh\nshift 2; exec bash "$1" > /dev/null\n')
    (bin_folder / "sbatch").chmod(0o755)
    got = folder / "what srun got"
    out = folder / "out"
    out.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{bin_folder}:/usr/bin:/bin")
        patch.setenv("GOT", str(got))
        patch.setenv("SLURM_CPUS_PER_TASK", "1")
        words = [str(folder / data), "-o", str(out / output), "--nodes", "1"]
        assert main(["submit", *words, "--run", f"--items={pattern}"]) == 0
    assert got.read_text().split("\0")[:-1] == [
        "--mpi=pmix", "--kill-on-bad-exit=1", "mdattn", "run", str(folder / data),
        "-o", str(out / output), f"--items={pattern}",
    ]  # fmt: skip


def test_it_replaces_only_its_own_scripts(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "sbatch").write_text("#!/bin/sh\necho 4711\n")
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    assert main(["submit", "data.h5", "-o", "out.h5", "--nodes", "1"]) == 0
    said = capsys.readouterr().out
    assert "submitted job 4711 with out.h5.sbatch" in said
    assert "squeue --jobs 4711" in said
    assert "mdattn status out.h5" in said
    assert "mdattn-out-4711.log" in said
    assert main(["submit", "data.h5", "-o", "out.h5", "--nodes", "3"]) == 0
    assert "--nodes=3" in (folder / "out.h5.sbatch").read_text()
    (folder / "out.h5.sbatch").write_text("#!/bin/bash\n# the work of many days\n")
    assert main(["submit", "data.h5", "-o", "out.h5", "--nodes", "1"]) == 2
    assert "many days" in (folder / "out.h5.sbatch").read_text()
    assert SIGNATURE not in (folder / "out.h5.sbatch").read_text()


def test_what_slurm_says_is_passed_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(folder))
    assert main(["submit", "data.h5", "-o", "out.h5", "--nodes", "1"]) == 2
    assert "no sbatch here" in complaint(capsys)
    (folder / "sbatch").write_text("#!/bin/sh\necho invalid partition >&2\nexit 1\n")
    (folder / "sbatch").chmod(0o755)
    assert main(["submit", "data.h5", "-o", "out.h5", "--nodes", "1"]) == 2
    assert "invalid partition" in complaint(capsys)
    assert list(folder.glob("*.sbatch")) == []  # no script of a job that isn't there


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [
        ("2", 120),
        ("5:30", 330),
        ("04:00:00", 14400),
        ("1-12", 129600),
        ("1-12:30", 131400),
        ("2-00:00:01", 172801),
    ],
)
def test_limits(limit: str, seconds: int) -> None:
    assert seconds_of(limit) == seconds


@pytest.mark.parametrize(
    ("limit", "options", "signal"),
    [("2", "", 12), ("5", "", 30), ("04:00:00", "", 180), ("2", "--warning 40", 40)],
)
def test_a_short_job_gets_a_short_warning(
    limit: str, options: str, signal: int, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"data.h5 -o out.h5 --nodes 1 --time {limit} {options}"
    assert f"#SBATCH --signal=USR1@{signal}\n" in shown(capsys, *words.split())


def test_a_job_in_the_queue(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody submits it twice, and `status` shows it before there is an output."""
    for name, does in (("sbatch", "echo 4711"), ("squeue", "cat queue")):
        (folder / name).write_text(f"#!/bin/sh\n{does}\n")
        (folder / name).chmod(0o755)
    (folder / "queue").touch()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    command = ["submit", "data.h5", "-o", "out.h5", "--nodes", "1"]
    assert main(command) == 0
    script = (folder / "out.h5.sbatch").read_text()
    assert main(["status", "out.h5"]) == 2
    (folder / "queue").write_text("PENDING Priority\n")
    capsys.readouterr()
    assert main(["status", "out.h5"]) == 0
    assert capsys.readouterr().out == "out.h5: queued\n  Slurm's job 4711: PENDING (Priority)\n"
    (folder / "queue").write_text("RUNNING None\n")
    assert main(["status", "out.h5"]) == 0
    assert capsys.readouterr().out == "out.h5: starting\n  Slurm's job 4711: RUNNING\n"
    (folder / "queue").write_text("PENDING Priority\n")
    assert main(command) == 2
    assert "a job writes this output already: job 4711" in complaint(capsys)
    assert (folder / "out.h5.sbatch").read_text() == script
    (folder / "queue").write_text("COMPLETED None\n")
    assert main(["status", "out.h5"]) == 2
    assert main(command) == 0
