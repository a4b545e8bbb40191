"""Draw shares of ideal over the number of ranks, as SVG.

    mdattn bench predict --kernels docs/h200-kernels.json --against docs/h200-attention.json \
        --lengths 131072 --ranks 1,2,4,8 --json > a.json
    mdattn bench predict --kernels docs/h200-kernels.json --against docs/h200-attention.json \
        --lengths 65536 --q-heads 32 --ranks 1,2,4,8 --json > b.json
    python docs/plot_shares.py a.json b.json > docs/shares.svg

    mdattn bench scaling --json > c.json
    python docs/plot_shares.py c.json > docs/scaling.svg
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from math import log2
from pathlib import Path
from typing import Any, NamedTuple

WIDTH, HEIGHT, LEFT, TOP, GAP = 340, 230, 46, 64, 50  # of a panel, and around it
COLORS = {
    "ring": "#0969da", "allgather": "#bc4c00", "ulysses": "#1a7f37", "hierarchical": "#8250df"
}  # fmt: skip
MEASURED = {"share": "measured_share", "batch_share": "measured_batch_share"}
NAMES = {"share": "", "batch_share": ", in a batch"}
STYLE = """<style>
  text { font: 13px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: #6e7781 }
  .h { font-weight: 600 }
  .g { stroke: #6e7781; stroke-opacity: .25 }
</style>"""


class Picture(NamedTuple):
    """What is drawn: lines of a strategy and a share, dashed or not, between two shares."""

    description: str
    lines: tuple[tuple[str, str, str], ...]
    low: float
    high: float
    grid: int  # percent
    dots: bool = False


SHARES = Picture(
    "Four panels, 128k tokens 8/8 and 64k tokens 32/8, full and causal. Lines: predicted shares of "
    "ring, allgather, allgather in a batch and ulysses on 1 to 8 GPUs. Dots: measured on 2.",
    (
        ("ring", "share", ""),
        ("allgather", "share", ""),
        ("allgather", "batch_share", "5 4"),
        ("ulysses", "share", ""),
    ),
    0.84, 1.12, 4, dots=True,
)  # fmt: skip
SCALING = Picture(
    "Four panels, 128k and 1024k tokens 32/8, full and causal. Lines: predicted shares of ring, "
    "allgather, ulysses and hierarchical in a batch on 8 to 128 GPUs, 8 a node.",
    tuple((name, "batch_share", "") for name in COLORS),
    0.0, 1.1, 20,
)  # fmt: skip


def main() -> None:
    """Read the rows of all files; print the picture."""
    picture = SHARES
    panels: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in sys.argv[1:]:
        for row in json.loads(Path(path).read_text())["rows"]:
            picture = SCALING if row["strategy"] == "hierarchical" else picture
            panels[f"{row['tokens'] // 1024}k, {row['heads']}, {row['mask']}"].append(row)
    across = 2
    down = -(-len(panels) // across)
    width, height = across * (WIDTH + GAP) + LEFT, TOP + down * (HEIGHT + GAP) - GAP + 8
    print(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" aria-labelledby="title desc">'
    )
    print('<title id="title">Share of ideal over the number of GPUs</title>')
    print(f'<desc id="desc">{picture.description}</desc>', STYLE, sep="\n")
    print(*legend(picture), sep="\n")
    for number, (title, rows) in enumerate(panels.items()):
        x, y = LEFT + number % across * (WIDTH + GAP), TOP + number // across * (HEIGHT + GAP)
        print(f'<g transform="translate({x} {y})">', *panel(picture, title, rows), "</g>", sep="\n")
    print("</svg>")


def legend(picture: Picture) -> Iterator[str]:
    """Name the lines, and say what dots are."""
    x = LEFT
    for strategy, what, dashes in picture.lines:
        style = f'stroke="{COLORS[strategy]}" stroke-width="2" stroke-dasharray="{dashes}"'
        yield f'<path d="M{x} 22h26" {style}/>'
        name = NAMES[what] if picture.dots else ""
        yield f'<text x="{x + 32}" y="26">{strategy}{name}</text>'
        x += 110 + 75 * bool(name)
    if picture.dots:
        yield f'<circle cx="{x + 10}" cy="22" r="4" fill="#6e7781"/>'
    told = "measured; lines are predicted" if picture.dots else "predicted, not measured"
    yield f'<text x="{x + 20}" y="26">{told}</text>'


def panel(picture: Picture, title: str, rows: list[dict[str, Any]]) -> Iterator[str]:
    """Draw one problem."""
    low = picture.low
    ranks = sorted({row["ranks"] for row in rows})

    def at(count: int) -> float:
        return WIDTH * log2(count / ranks[0]) / log2(ranks[-1] / ranks[0])

    def up(share: float) -> float:
        return HEIGHT - 24 - (HEIGHT - 40) * (share - low) / (picture.high - low)

    yield f'<text x="0" y="4"><tspan class="h">{title}</tspan>: share of ideal by GPUs</text>'
    for percent in range(round(100 * low), round(100 * picture.high) + 1, picture.grid):
        y = up(percent / 100)
        yield f'<path class="g" d="M0 {y:.1f}h{WIDTH}"/>'
        yield f'<text x="-8" y="{y + 4:.1f}" text-anchor="end">{percent / 100:.2f}</text>'
    for count in ranks:
        yield f'<text x="{at(count):.1f}" y="{HEIGHT - 4}" text-anchor="middle">{count}</text>'
    for strategy, what, dashes in picture.lines:
        color = COLORS[strategy]
        own = sorted((r for r in rows if r["strategy"] == strategy), key=lambda r: r["ranks"])
        points = " ".join(f"{at(row['ranks']):.1f},{up(row[what]):.1f}" for row in own)
        yield (
            f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2" '
            f'stroke-dasharray="{dashes}"/>'
        )
        for row in own:
            if MEASURED[what] in row:
                y = up(row[MEASURED[what]])
                fill = "white" if dashes else color
                yield (
                    f'<circle cx="{at(row["ranks"]):.1f}" cy="{y:.1f}" r="4" fill="{fill}" '
                    f'stroke="{color}" stroke-width="2"/>'
                )


if __name__ == "__main__":
    main()
