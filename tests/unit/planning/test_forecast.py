"""What a job will take: against jobs that were measured, and what must hold for any."""

from __future__ import annotations

import re
from dataclasses import replace
from math import inf

import pytest

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.estimate import Costs, input_bytes, output_bytes, typical_costs
from mdattn_mpi.planning.forecast import Hardware, Work, forecast
from mdattn_mpi.planning.gpus import GPUS, like
from mdattn_mpi.planning.memory import usable_gpu_memory
from mdattn_mpi.planning.schedule import ATTENTION
from mdattn_mpi.problem import AttentionProblem

LONG = AttentionProblem(65536, 65536, 32, 8, 128, 128)


def gpu(name: str, preparing: float = 0.0) -> Hardware:
    room = usable_gpu_memory(GPUS[name].memory)
    near, far = (
        GPUS[name].costs(near=near, memory=room, preparing=preparing) for near in (True, False)
    )
    return Hardware(near, far, typical_costs("cuda", room, preparing=preparing), 3.0)


def work(*problems: AttentionProblem, weights: int = 0) -> Work:
    def files(problem: AttentionProblem) -> tuple[int, int]:
        return input_bytes(problem), output_bytes(problem)

    return Work(problems, ATTENTION, lambda problem: problem, files, weights)


def test_a_job_that_was_measured() -> None:
    """docs/performance.md, the whole job: 3.54 s and 3.71 s without what stands before it."""
    found = forecast(work(*[LONG] * 16), 1, 2, "all", gpu("h200", 0.04))
    assert found.seconds - found.starting == pytest.approx(3.6, rel=0.2)
    assert found.bound == "files"


def test_the_same_on_a_disk_of_a_known_speed() -> None:
    """The same page: writing alone takes 6.33 s there, the whole job took 5.78 s."""
    disk = replace(gpu("h200", 0.04), disk=16 * output_bytes(LONG) / 6.33)
    found = forecast(work(*[LONG] * 16), 1, 2, "all", disk)
    assert found.seconds - found.starting == pytest.approx(5.78, rel=0.2)
    slower = forecast(work(*[LONG] * 16), 1, 2, "all", replace(disk, disk=disk.disk / 10))
    assert slower.seconds - slower.starting == pytest.approx(63.3, rel=0.01)
    assert slower.bound == "files"


def test_what_bounds_a_job_of_long_items_is_computing() -> None:
    million = replace(LONG, q_tokens=1 << 20, kv_tokens=1 << 20)
    found = forecast(work(million, million), 1, 2, "all", gpu("h200"))
    costs = gpu("h200").near
    first_and_last = input_bytes(million) / costs.reading + output_bytes(million) / costs.writing
    expected = 2 * million.flops / 2 / costs.flops + first_and_last / 2
    assert found.bound == "GPUs"
    assert found.seconds - found.starting == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("name", GPUS)
def test_twice_as_many_gpus_are_twice_as_fast_where_nothing_else_counts(name: str) -> None:
    million = replace(LONG, q_tokens=1 << 20, kv_tokens=1 << 20)
    one, two, nodes = (
        forecast(work(*[million] * 16), *size, "auto", gpu(name))
        for size in ((1, 4), (1, 8), (2, 8))
    )
    for fewer, more in ((one, two), (two, nodes)):
        gain = (fewer.seconds - fewer.starting) / (more.seconds - more.starting)
        assert gain == pytest.approx(2, rel=0.1)


def test_a_group_across_nodes_has_the_links_between_them() -> None:
    item = replace(LONG, q_tokens=32768, kv_tokens=32768)
    hardware = replace(gpu("h100"), far=replace(gpu("h100").far, bandwidth=1e8))
    inside, across = (
        forecast(work(item), nodes, ranks, "all", hardware) for nodes, ranks in ((1, 8), (4, 2))
    )
    assert across.seconds > inside.seconds + 0.1


def test_weights_are_loaded_by_every_rank() -> None:
    hardware = gpu("h100")
    bare, loaded = (
        forecast(work(LONG, weights=nbytes), 1, 2, "auto", hardware) for nbytes in (0, 16 << 30)
    )
    expected = (16 << 30) / hardware.near.reading
    assert loaded.starting - bare.starting == pytest.approx(expected)
    assert loaded.seconds - bare.seconds == pytest.approx(expected)


def test_memory_is_that_of_the_largest_item_and_what_surrounds_it() -> None:
    short = replace(LONG, q_tokens=1024, kv_tokens=1024)
    small, both = (
        forecast(work(*items), 1, 2, "1", gpu("h100")) for items in ((short,), (short, LONG))
    )
    assert small.memory < both.memory
    assert both.memory > input_bytes(LONG) + output_bytes(LONG) + (1 << 30)
    assert both.host_memory > small.host_memory > 2 << 30


def test_an_item_that_does_not_fit_is_refused_and_the_remedy_works() -> None:
    huge = replace(LONG, q_tokens=1 << 22, kv_tokens=1 << 22)
    with pytest.raises(RejectedError, match=r"start at least \d+ ranks") as caught:
        forecast(work(huge), 1, 1, "auto", gpu("h100"))
    enough = int(re.findall(r"\d+", caught.value.fix)[0])
    assert enough > 1
    assert forecast(work(huge), 1, enough, "auto", gpu("h100")).memory <= 80e9


def test_cores_read_write_and_compute_in_turn() -> None:
    costs: Costs = typical_costs("cpu")
    item = AttentionProblem(4096, 4096, 8, 8, 128, 128)
    found = forecast(work(item), 1, 1, "1", Hardware(costs, costs, costs, 1.5))
    free = replace(costs, reading=inf, writing=inf)
    without = forecast(work(item), 1, 1, "1", Hardware(free, free, free, 1.5))
    files = input_bytes(item) / costs.reading + output_bytes(item) / costs.writing
    assert found.seconds - without.seconds == pytest.approx(files)
    assert (found.bound, found.memory) == ("cores", 0)


def test_a_faster_kernel_and_small_heads_count() -> None:
    hardware = gpu("h100")
    small = replace(LONG, head_dim=64, v_head_dim=64)
    faster = replace(hardware, gains={64: 1.2, 128: 1.1})
    base = hardware.near.flops
    assert hardware.costs(LONG, 8, 8).flops == base
    assert faster.costs(LONG, 8, 8).flops == pytest.approx(1.1 * base)
    assert faster.costs(small, 8, 8).flops / hardware.costs(small, 8, 8).flops == pytest.approx(1.2)
    assert hardware.costs(small, 8, 8).flops < base
    assert hardware.costs(LONG, 9, 8).bandwidth < hardware.costs(LONG, 8, 8).bandwidth


def test_a_gpu_that_is_found_is_described_by_its_generation() -> None:
    h200 = GPUS["h200"]
    assert like(*h200[:4]) == h200
    assert not like("NVIDIA A100-PCIE-40GB", (8, 0), 108, 40 << 30).measured
    assert like("new", (13, 0), 100, 1 << 30).link < GPUS["a100"].link


def test_what_is_done_takes_no_time() -> None:
    hardware = replace(gpu("h200"), disk=2e9)
    every = work(*[LONG] * 16)
    whole, half, none = (
        forecast(replace(every, left=left), 1, 2, "all", hardware) for left in (None, range(8), ())
    )
    assert whole.seconds - whole.starting == pytest.approx(2 * (half.seconds - half.starting))
    assert none.seconds == none.starting
