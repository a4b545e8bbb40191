"""HTML and SVG as a tree of elements: text in it can't be taken for markup, whatever it is."""

from __future__ import annotations

from collections.abc import Iterable
from xml.etree.ElementTree import Element, SubElement, tostring

from mdattn_mpi.text import printable

__all__ = ["DOCTYPE", "Element", "add", "document", "table"]

DOCTYPE = "<!doctype html>\n"


def add(parent: Element, tag: str, text: object = "", /, **attributes: object) -> Element:
    """Add an element with `text`; attributes are written ``class_`` and ``stroke_width``."""
    named = {
        name.rstrip("_").replace("_", "-"): printable(value) for name, value in attributes.items()
    }
    element = SubElement(parent, tag, named)
    element.text = printable(text)
    return element


def table(
    parent: Element, heads: Iterable[str], rows: Iterable[Iterable[object]], numbers: int = 0
) -> Element:
    """Add a table; the last `numbers` columns hold figures. It scrolls by itself if it is wide."""
    heads = list(heads)
    made = add(add(parent, "div", class_="scrolls"), "table")
    head, body = add(made, "thead"), add(made, "tbody")
    for tag, row in (("th", heads), *(("td", row) for row in rows)):
        line = add(head if tag == "th" else body, "tr")
        for place, cell in enumerate(row):
            right = {"class_": "number"} if place >= len(heads) - numbers else {}
            add(line, tag, cell, **right)
    return made


def document(root: Element) -> str:
    """Write the whole page."""
    return DOCTYPE + tostring(root, encoding="unicode", method="html") + "\n"
