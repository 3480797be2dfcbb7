"""Draws quartermap.svg: what QuarterMap does to one feature map, as the README shows it.

    python docs/pictures/quartermap.py        # writes quartermap.svg beside this file

The picture is written as text, so it needs no library, and a change of it is a line of a diff.
"""

from __future__ import annotations

from pathlib import Path

SIDE = 8
"""Rows and columns of the map that is drawn."""
CELL = 22
GAP = 112
TOP = 58
KEPT, LEFT_OUT, EDGE, INK = "#2563eb", "#e5e7eb", "#ffffff", "#6b7280"
SHADES = ("#1d4ed8", "#2563eb", "#3b82f6", "#60a5fa")
"""Colours of the kept positions, by the sum of row and column: after the fill a reader sees where each went."""


def shade(row: int, column: int) -> str:
    """The colour of a kept position."""
    return SHADES[(row + 2 * column) % len(SHADES)]


def cell(left: float, top: float, size: float, colour: str) -> str:
    """One position of a map."""
    return (
        f'<rect x="{left:g}" y="{top:g}" width="{size:g}" height="{size:g}" fill="{colour}" '
        f'stroke="{EDGE}" stroke-width="1.5"/>'
    )


def title(left: float, width: float, head: str, below: str) -> list[str]:
    """What stands over and under a map, centred."""
    middle = left + width / 2
    return [
        f'<text x="{middle:g}" y="24" font-size="15" font-weight="600">{head}</text>',
        f'<text x="{middle:g}" y="{TOP + SIDE * CELL + 26:g}" font-size="12.5">{below}</text>',
    ]


def arrow(left: float, top: float, name: str) -> list[str]:
    """From one map to the next."""
    return [
        f'<path d="M{left:g} {top:g}h{GAP - 56}" stroke="{INK}" stroke-width="2" marker-end="url(#tip)"/>',
        f'<text x="{left + (GAP - 56) / 2:g}" y="{top - 10:g}" font-size="12.5">{name}</text>',
    ]


def scans(left: float, top: float, side: float) -> list[str]:
    """The four directions, around the map: along the rows and the columns, forwards and backwards."""
    away, right, bottom = 9, left + side, top + side
    lines = [
        (left, top - away, right, top - away),
        (right, bottom + away, left, bottom + away),
        (left - away, bottom, left - away, top),
        (right + away, top, right + away, bottom),
    ]
    return [
        f'<path d="M{x1:g} {y1:g}L{x2:g} {y2:g}" stroke="{KEPT}" stroke-width="2" marker-end="url(#scan)"/>'
        for x1, y1, x2, y2 in lines
    ]


def picture() -> str:
    """The picture as SVG."""
    width = SIDE * CELL
    half = width / 2
    small_left = 12 + width + GAP
    small_top = TOP + half / 2
    last_left = small_left + half + GAP
    total = last_left + width + 12
    parts: list[str] = []
    for row in range(SIDE):
        for column in range(SIDE):
            kept = row % 2 == 0 and column % 2 == 0
            colour = shade(row // 2, column // 2)
            parts.append(cell(12 + column * CELL, TOP + row * CELL, CELL, colour if kept else LEFT_OUT))
            filled = shade(row // 2, column // 2)
            parts.append(cell(last_left + column * CELL, TOP + row * CELL, CELL, filled))
            if kept:
                parts.append(cell(small_left + column // 2 * CELL, small_top + row // 2 * CELL, CELL, colour))
    parts += title(12, width, "lattice", "one of every 2×2 positions")
    parts += title(small_left, half, "scan", "four directions, a quarter of the steps")
    parts += title(last_left, width, "fill", "nearest upsampling")
    parts += scans(small_left, small_top, half)
    middle = TOP + half
    parts += arrow(12 + width + 20, middle, "Slice")
    parts += arrow(small_left + half + 28, middle, "Resize")
    tip = (
        '<marker id="{}" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
        + ('<path d="M0 0L8 4L0 8z" fill="{}" stroke="none"/></marker>')
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total:g} {TOP + width + 40:g}" width="{total:g}" '
            f'font-family="system-ui, sans-serif" text-anchor="middle" fill="{INK}" stroke="none" role="img" '
            'aria-label="QuarterMap: one of every 2 by 2 positions is kept, scanned, and the map is filled again">',
            f"<defs>{tip.format('tip', INK)}{tip.format('scan', KEPT)}</defs>",
            *parts,
            "</svg>",
            "",
        ]
    )


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(picture(), encoding="utf-8")
