"""What rank 0 shows of the groups that it isn't in."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import pytest

from mdattn_mpi.dataset import open_output
from mdattn_mpi.problem import AttentionProblem
from mdattn_mpi.runner import batch
from mdattn_mpi.runner.batch import Batch
from mdattn_mpi.runner.progress import Progress
from tests.support.finished import finished

PROBLEM = AttentionProblem(40, 40, 2, 1, 16, 16)


def test_what_other_groups_did_is_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "LOOK", 0.0)
    files = finished(tmp_path, dict.fromkeys("abcd", PROBLEM))
    said = io.StringIO()
    progress = Progress(4, 1, 3 * PROBLEM.work, shown=True, stream=said)
    with open_output(files.output, writable=True) as output:
        a, b, c, _ = output.items
        output.ledger.fail(c, "item 'c': query holds NaN, says the job before this one")
        elsewhere = {"a": "todo", "b": "todo", "c": "failed"}
        rank = SimpleNamespace(output=output, progress=progress, elsewhere=elsewhere, looked=0.0)
        output.ledger.reopen(a)
        output.ledger.fail(b, "item 'b': query holds NaN")
        for _ in range(2):
            Batch.look_around(rank)  # type: ignore[arg-type]
            assert (progress.done, progress.failed) == (1, 1)
            assert elsewhere == {"a": "todo", "c": "failed"}
    assert said.getvalue() == "mdattn: item 'b': query holds NaN\n"
    (again := tmp_path / "again").mkdir()
    with open_output(finished(again, dict.fromkeys("abcd", PROBLEM)).output) as output:
        rank.output = output
        Batch.look_around(rank)  # type: ignore[arg-type]
    assert (progress.done, progress.failed) == (3, 1)
    assert not elsewhere
