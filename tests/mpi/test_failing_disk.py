"""The disk fails at the Nth write or sync: a clean exit, finished items intact, then resumed.

A few N here; ``make storm`` tries all of them.
"""

import pytest

from tests.support.failing_disk import MODES, FailingDisk, build


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> FailingDisk:
    folder = tmp_path_factory.mktemp("disk")
    library = build(folder)
    if library is None:
        pytest.skip("no C compiler here")
    (folder / "job").mkdir()
    return FailingDisk(folder / "job", library)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("mode", MODES, ids="-".join)
@pytest.mark.parametrize("part", [0.3, 0.75])
def test_making_and_committing(disk: FailingDisk, part: float, mode: tuple[str, str]) -> None:
    """Rank 0 makes the output, writes its shards, and keeps the ledger."""
    disk.strike(0, 1 + int(part * disk.counts[0]), mode)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("mode", MODES, ids="-".join)
def test_writing_shards(disk: FailingDisk, mode: tuple[str, str]) -> None:
    """Rank 1 only writes shards and syncs them."""
    for at in (1, disk.counts[1]):
        disk.strike(1, at, mode)
