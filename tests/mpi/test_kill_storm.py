"""A short kill storm; ``make storm SEEDS=200`` raises long ones."""

import pytest

from tests.support.storm import Storm


@pytest.fixture(scope="module")
def storm(tmp_path_factory: pytest.TempPathFactory) -> Storm:
    return Storm(tmp_path_factory.mktemp("storm"))


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("seed", [3])
def test_killed_again_and_again_the_job_gives_the_same_bytes(storm: Storm, seed: int) -> None:
    print(storm.run(seed))
