"""The charts that don't move, as SVG: items over time, their rate, and where each rank's time went.

Widths are in percent, or stretched without their text, so that they fit any screen and paper.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

from mdattn_mpi.report.findings import seconds_of
from mdattn_mpi.report.markup import Element, add
from mdattn_mpi.report.phases import PHASES, THREADS, phase_of
from mdattn_mpi.report.runs import Rank, Run
from mdattn_mpi.text import duration

WIDE = 1000  # units that a chart is wide, however it is stretched
POINTS = 500  # of a curve
BINS = 60  # of a rate, at most …
PER_BIN = 4  # … and so many items in each, so that there is a rate to speak of
FEWEST_BINS = 3
FEW_RANKS = 16  # that have broad bars
MOST_RANKS = 64  # that have bars


def progress_chart(parent: Element, runs: Sequence[Run], items: int) -> None:
    """Add how many of the `items` were done when, and how many a second.

    Runs follow each other at once.
    """
    whole = sum(run.until for run in runs) / 1e6
    if not whole:
        return
    starts = [0.0, *accumulate(run.until / 1e6 for run in runs[:-1])]
    timed = [*zip(starts, runs, strict=True)]
    done = sorted(start + one.at / 1e6 for start, run in timed for one in run.done)
    failed = sorted(start + one.at / 1e6 for start, run in timed for one in run.failed)
    steps = _steps(timed, items)
    top = max([items, *(number for _, number in steps)])

    figure = _figure(parent, "Items done", f"{top}")
    svg = _stretched(figure, 160)
    for start in starts[1:]:
        _upright(svg, start / whole, 160, "border", "the job was started again")
    curve = f"M0 {160 - 158 * steps[0][1] / top:.1f}"
    for at, number in _thinned(steps):
        curve += f"H{WIDE * at / whole:.1f}V{160 - 158 * number / top:.1f}"
    add(svg, "path", d=f"{curve}H{WIDE}", class_="curve")
    for at in failed[:POINTS]:
        _upright(svg, at / whole, 160, "failure", "an item failed")
    _time_axis(figure, whole)

    bins = min(len(done) // PER_BIN, BINS)
    if bins < FEWEST_BINS:
        return
    width = whole / bins
    counts = [0] * bins
    for at in done:
        counts[min(int(at / width), bins - 1)] += 1
    most = max([*counts, 1])
    figure = _figure(parent, "Items a second", f"{most / width:.3g}")
    svg = _stretched(figure, 70)
    for place, count in enumerate(counts):
        if count:
            height, wide = 68 * count / most, WIDE / bins
            bar = add(
                svg, "rect", x=f"{wide * place:.1f}", y=f"{70 - height:.1f}",
                width=f"{wide - 2:.1f}", height=f"{height:.1f}", class_="compute",
            )  # fmt: skip
            add(bar, "title", f"{count / width:.3g} items/s from {duration(width * place)}")
    _time_axis(figure, whole)


def _steps(timed: Sequence[tuple[float, Run]], items: int) -> list[tuple[float, int]]:
    """When so many items were done; a run says how many there were when it began."""
    steps, number = [], 0
    for start, run in timed:
        number = items - int(run.about.get("todo", items - number))
        steps.append((start, number))
        for one in run.done:
            number += 1
            steps.append((start + one.at / 1e6, number))
    return steps


def _thinned(points: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """So many points at most, the last among them."""
    step = -(-len(points) // POINTS) or 1
    return points[::-step][::-1]


def _figure(parent: Element, title: str, top: str) -> Element:
    figure = add(parent, "figure")
    caption = add(figure, "figcaption", title)
    add(caption, "span", f"up to {top}", class_="aside")
    return figure


def _stretched(parent: Element, height: int) -> Element:
    return add(
        parent, "svg", viewBox=f"0 0 {WIDE} {height}", preserveAspectRatio="none", class_="chart",
        style=f"height: {height}px", role="img",
    )  # fmt: skip


def _upright(svg: Element, share: float, height: int, kind: str, title: str) -> None:
    x = f"{WIDE * share:.1f}"
    line = add(svg, "line", x1=x, x2=x, y1=0, y2=height, class_=kind)
    add(line, "title", title)


def _time_axis(parent: Element, whole: float) -> None:
    axis = add(parent, "div", class_="axis")
    for quarter in range(5):
        add(axis, "span", "0" if not quarter else duration(whole * quarter / 4))


def rank_bars(parent: Element, run: Run) -> None:
    """Add a bar a rank of where its main thread's time went, and one of its device's."""
    whole = run.until / 1e6
    if not whole:
        return
    legend(parent, run, ("main", "device"))
    ranks = run.ranks
    if len(ranks) > MOST_RANKS:
        ranks = sorted(ranks, key=lambda rank: rank.seconds["main"].get("agree", 0.0))
        half = MOST_RANKS // 2
        ranks = [*ranks[:half], *ranks[-half:]]
        words = f"The {half} ranks that waited least for others, and the {half} that waited most"
        add(parent, "p", f"{words}, of {len(run.ranks)}.", class_="aside")
    few = len(ranks) <= FEW_RANKS
    grid = add(parent, "div", class_="bars" if few else "bars thin")
    for rank in ranks:
        add(grid, "span", f"rank {rank.rank} · {rank.host}", class_="label")
        svg = add(grid, "svg", width="100%", height=20 if few else 11, role="img")
        for thread, top, height in (("main", 0, 12 if few else 7), ("device", 13 if few else 7, 4)):
            _bar(svg, rank, thread, whole, top, height)


def _bar(svg: Element, rank: Rank, thread: str, whole: float, top: int, height: int) -> None:
    at = 0.0
    for phase, seconds in _ordered(rank, thread):
        share = 100 * seconds / whole
        about = phase_of(thread, phase)
        bar = add(
            svg, "rect", x=f"{at:.2f}%", y=top, width=f"{share:.2f}%", height=height,
            class_=about.colour,
        )  # fmt: skip
        text = f"rank {rank.rank}, {THREADS[thread]} {about.words}: {duration(seconds)}"
        add(bar, "title", f"{text} ({share:.1f} %)")
        at += share


def _ordered(rank: Rank, thread: str) -> Iterator[tuple[str, float]]:
    found = seconds_of(rank, thread)
    for phase in dict.fromkeys([*PHASES[thread], *found]):
        if found.get(phase, 0.0) > 0:
            yield phase, found[phase]


def legend(parent: Element, run: Run, threads: Sequence[str]) -> None:
    """Add what each colour means, for what occurs."""
    for thread in threads:
        phases = dict.fromkeys(phase for rank in run.ranks for phase, _ in _ordered(rank, thread))
        if phases:
            line = add(parent, "p", class_="legend")
            add(line, "b", f"{THREADS[thread]}:")
            for phase in phases:
                about = phase_of(thread, phase)
                entry = add(line, "span")
                svg = add(entry, "svg", width=12, height=12)
                add(svg, "rect", width=12, height=12, class_=about.colour)
                add(entry, "span", about.words)
