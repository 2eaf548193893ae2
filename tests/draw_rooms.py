"""Draws the rooms of the source and who imports whom, from the real imports, into docs/rooms.svg.

    python tests/draw_rooms.py

A room lies one row above the highest that it imports from. An arrow that others imply is left out: whoever imports comm
has errors below it anyway. All arithmetic is in whole numbers, so every interpreter draws the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from html import escape
from itertools import combinations, pairwise
from pathlib import Path

import rooms

DRAWING = Path(__file__).parents[1] / "docs" / "rooms.svg"
COMMAND = "make rooms"

# Columns from left to right, with the colours of border, box and background.
COLUMNS = {
    "dsp_plugin": ("#1d5fa8", "#e3eefb", "#f6f9fd"),
    "patches": ("#a2490f", "#fde9dc", "#fef8f4"),
    "launch": ("#2c7a3f", "#e1f3e5", "#f5fbf6"),
}
ROW, BOX, LETTER, PADDING, GAP, BEND = 62, 32, 8, 24, 22, 14
MARGIN, HEAD, FOOT = 20, 64, 44
SWEEPS, TOLL, STIFF = 12, 80, 8

Graph = Mapping[str, Iterable[str]]
# A room, or the place where the arrows to a room (its name) pass a row (the number).
Item = str | tuple[str, int]
Row = dict[str, list[Item]]


def depths(graph: Graph) -> dict[str, int]:
    """Of every room the longest way down from it."""
    found: dict[str, int] = {}

    def depth(room: str) -> int:
        if room not in found:
            found[room] = max((1 + depth(other) for other in graph[room]), default=0)
        return found[room]

    return {room: depth(room) for room in sorted(graph)}


def reduction(graph: Graph) -> dict[str, list[str]]:
    """The arrows that no way over another room implies."""
    below: dict[str, set[str]] = {}
    for room, _ in sorted(depths(graph).items(), key=lambda item: item[1]):
        below[room] = {further for other in graph[room] for further in (other, *below[other])}
    return {
        room: sorted(other for other in graph[room] if not any(other in below[via] for via in graph[room]))
        for room in sorted(graph)
    }


def boxes(graph: Graph) -> dict[str, list[str]]:
    """Rooms of one folder that import the same and are imported by the same are one box."""
    alike: dict[tuple, list[str]] = {}
    for room in sorted(graph):
        folder = room.rpartition("/")[0] or room
        importers = tuple(sorted(other for other in graph if room in graph[other]))
        alike.setdefault((folder, tuple(sorted(graph[room])), importers), []).append(room)
    box_of = {}
    for (folder, _, _), together in alike.items():
        names = ", ".join(room.rpartition("/")[2] for room in together)
        box_of |= {room: room if len(together) == 1 else f"{folder}/{{{names}}}" for room in together}
    return {box_of[room]: sorted({box_of[other] for other in graph[room]}) for room in sorted(graph)}


def label_of(room: str) -> str:
    """Without the package, in whose column it is."""
    return room.removeprefix(f"{column_of(room)}/")


def column_of(room: str) -> str:
    """The package that a room belongs to."""
    top = room.split("/")[0]
    return top if top in COLUMNS else "dsp_plugin"


@dataclass
class Drawing:
    """Where everything lies: rows of items from left to right, and the middle of each."""

    graph: Graph
    rows: list[Row] = field(default_factory=list)
    links: list[tuple[Item, Item]] = field(default_factory=list)
    beside: dict[bool, dict[Item, list[Item]]] = field(default_factory=lambda: {True: {}, False: {}})
    x: dict[Item, int] = field(default_factory=dict)
    borders: dict[str, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.depth = depths(self.graph)
        self.arrows = {(room, other) for room, others in reduction(self.graph).items() for other in others}
        self.rows = [{column: [] for column in COLUMNS} for _ in range(1 + max(self.depth.values()))]
        for room, row in self.depth.items():
            self.rows[row][column_of(room)].append(room)
        for room, other in sorted(self.arrows):
            way = self._way(room, other)
            self.links += [link for link in pairwise(way) if link not in self.links]
        for start, end in self.links:
            self.beside[True].setdefault(end, []).append(start)
            self.beside[False].setdefault(start, []).append(end)
        self._order()
        self._straighten()

    def _way(self, room: str, other: str) -> list[Item]:
        """From a room down to another, row by row. Arrows to one room share their places in between."""
        way: list[Item] = [room]
        for row in range(self.depth[room] - 1, self.depth[other], -1):
            bend = (other, row)
            way.append(bend)
            if bend not in self.rows[row][column_of(other)]:
                self.rows[row][column_of(other)].append(bend)
        return [*way, other]

    def _neighbours(self, item: Item, above: bool) -> list[Item]:
        return self.beside[above].get(item, [])

    def _order(self) -> None:
        """Fewer crossings: everything goes in order of the middle of what it is linked to, below and above in turns."""
        best, fewest = self.rows, self._crossings()
        for sweep in range(SWEEPS):
            above = sweep % 2 == 1
            for row in reversed(self.rows) if above else self.rows:
                for column, items in row.items():
                    middle = {item: self._middle(item, above, place) for place, item in enumerate(items)}
                    row[column] = sorted(items, key=lambda item: (middle[item], str(item)))
            if self._crossings() < fewest:
                best, fewest = [dict(row) for row in self.rows], self._crossings()
        self.rows = best

    def _straighten(self) -> None:
        """Better still, by trial: neighbours change places, or all arrows to a room pass left or right of all else."""
        self._place()
        fewest, tried = self._cost(), True
        while tried:
            tried = False
            for rows in list(self._variants()):
                kept, self.rows = self.rows, rows
                self._place()
                if self._cost() < fewest:
                    fewest, tried = self._cost(), True
                    break
                self.rows = kept
        self._place()

    def _variants(self) -> Iterator[list[Row]]:
        for number, row in enumerate(self.rows):
            for column, items in row.items():
                for place in range(len(items) - 1):
                    swapped = [*items[:place], items[place + 1], items[place], *items[place + 2 :]]
                    yield [*self.rows[:number], {**row, column: swapped}, *self.rows[number + 1 :]]
        for room in sorted({item[0] for row in self.rows for items in row.values() for item in items if is_bend(item)}):
            for side in (False, True):
                yield [
                    {
                        column: sorted(items, key=lambda item: (is_bend(item) and item[0] == room) == side)
                        for column, items in row.items()
                    }
                    for row in self.rows
                ]

    def _cost(self) -> int:
        """How far arrows go sideways and how much they turn, with a toll for every crossing."""
        aside = sum(abs(self.x[start] - self.x[end]) for start, end in self.links)
        turns = sum(
            abs(self.x[start] + self.x[further] - 2 * self.x[end])
            for start, end in self.links
            if is_bend(end)
            for further in self._neighbours(end, False)
        )
        return TOLL * self._crossings() + aside + turns

    def _places(self) -> dict[Item, int]:
        """Thousandths of the row's width, column by column."""
        return {
            item: 1000 * (number * 1000 + (2 * place + 1) * 500 // len(items))
            for row in self.rows
            for number, items in enumerate(row.values())
            for place, item in enumerate(items)
        }

    def _middle(self, item: Item, above: bool, place: int) -> int:
        places = self._places()
        linked = [places[other] for other in self._neighbours(item, above)]
        return sum(linked) // len(linked) if linked else places[item]

    def _crossings(self) -> int:
        places = self._places()
        by_row: dict[int, list[tuple[int, int]]] = {}
        for start, end in self.links:
            by_row.setdefault(self.row_of(start), []).append((places[start], places[end]))
        pairs = (pair for links in by_row.values() for pair in combinations(links, 2))
        return sum((one[0] - other[0]) * (one[1] - other[1]) < 0 for one, other in pairs)

    def row_of(self, item: Item) -> int:
        """Counted from below."""
        return self.depth[item] if isinstance(item, str) else item[1]

    def _place(self) -> None:
        left = MARGIN
        for column in COLUMNS:
            widest = max(sum(map(width_of, row[column])) + GAP * (len(row[column]) + 1) for row in self.rows)
            self.borders[column] = (left, left + widest)
            left += widest + GAP
        for row in self.rows:
            for column, items in row.items():
                middle = sum(self.borders[column]) // 2
                self.x |= dict(zip(items, self._spread(items, [middle for _ in items], column), strict=True))
        for sweep in range(SWEEPS):
            for row in self.rows if sweep % 2 == 0 else reversed(self.rows):
                for column, items in row.items():
                    wanted = [self._wanted(item) for item in items]
                    self.x |= dict(zip(items, self._spread(items, wanted, column), strict=True))

    def _wanted(self, item: Item) -> int:
        linked: list[int] = []
        for other in (*self._neighbours(item, True), *self._neighbours(item, False)):
            linked += [self.x[other]] * (STIFF if is_bend(item) and is_bend(other) else 1)
        return sum(linked) // len(linked) if linked else self.x[item]

    def _spread(self, items: list[Item], wanted: list[int], column: str) -> list[int]:
        """The places nearest to those wanted at which nothing overlaps."""
        offsets, offset = [], 0
        for number, item in enumerate(items):
            offset += 0 if number == 0 else (width_of(items[number - 1]) + width_of(item)) // 2 + GAP
            offsets.append(offset)
        blocks: list[list[int]] = []
        for place, offset in zip(wanted, offsets, strict=True):
            blocks.append([place - offset, 1])
            while len(blocks) > 1 and blocks[-2][0] * blocks[-1][1] > blocks[-1][0] * blocks[-2][1]:
                total, count = blocks.pop()
                blocks[-1][0] += total
                blocks[-1][1] += count
        places = [total // count for total, count in blocks for _ in range(count)]
        left, right = self.borders[column]
        if items:
            first, last = left + GAP + width_of(items[0]) // 2, right - GAP - width_of(items[-1]) // 2 - offsets[-1]
            places = [min(max(place, first), last) for place in places]
        return [place + offset for place, offset in zip(places, offsets, strict=True)]


def is_bend(item: Item) -> bool:
    return not isinstance(item, str)


def width_of(item: Item) -> int:
    return PADDING + LETTER * len(label_of(item)) if isinstance(item, str) else BEND


def svg(graph: Graph) -> str:
    """The picture, as a file."""
    drawing = Drawing(boxes(graph))
    height = HEAD + ROW * len(drawing.rows) + FOOT
    width = max(right for _, right in drawing.borders.values()) + MARGIN
    top = len(drawing.rows) - 1

    def y(item: Item) -> int:
        return HEAD + ROW * (top - drawing.row_of(item)) + ROW // 2

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        ' font-family="Helvetica, Arial, sans-serif" font-size="14">',
        f"<!-- Drawn by `{COMMAND}` from the imports; tests/unit/test_rooms_drawing.py compares. -->",
        "<title>The rooms of the source, and who imports whom</title>",
        "<defs>",
        *(
            f'<marker id="{column}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8"'
            f' orient="auto"><path d="M0 1L10 5L0 9z" fill="{border}"/></marker>'
            for column, (border, _, _) in COLUMNS.items()
        ),
        "</defs>",
        f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>',
    ]
    for column, (left, right) in drawing.borders.items():
        border, _, back = COLUMNS[column]
        lines += [
            f'<rect x="{left}" y="{MARGIN}" width="{right - left}" height="{height - MARGIN - FOOT}" rx="8"'
            f' fill="{back}"/>',
            f'<text x="{(left + right) // 2}" y="{MARGIN + 26}" text-anchor="middle" font-size="16" font-weight="bold"'
            f' fill="{border}">{column}/</text>',
        ]
    for start, end in drawing.links:
        half = BOX // 2
        x1, y1 = drawing.x[start], y(start) + (half if isinstance(start, str) else 0)
        x2, y2 = drawing.x[end], y(end) - (half if isinstance(end, str) else 0)
        # An arrow has the colour of the room that imports; a place that several pass has that of the first.
        colour = column_of(_source(drawing, start))
        head = f' marker-end="url(#{colour})"' if isinstance(end, str) else ""
        middle = (y1 + y2) // 2
        lines.append(
            f'<path d="M{x1} {y1}C{x1} {middle} {x2} {middle} {x2} {y2}" fill="none" stroke="{COLUMNS[colour][0]}"'
            f' stroke-width="1.5"{head}/>'
        )
    for room in sorted(drawing.depth):
        border, box, _ = COLUMNS[column_of(room)]
        wide = width_of(room)
        lines += [
            f'<rect x="{drawing.x[room] - wide // 2}" y="{y(room) - BOX // 2}" width="{wide}" height="{BOX}" rx="6"'
            f' fill="{box}" stroke="{border}"/>',
            f'<text x="{drawing.x[room]}" y="{y(room) + 5}" text-anchor="middle" fill="#111111">'
            f"{escape(label_of(room))}</text>",
        ]
    lines += [
        f'<text x="{width // 2}" y="{height - 16}" text-anchor="middle" font-size="13" fill="#444444">'
        "A room lies above all that it imports from. Arrows that others imply are left out.</text>",
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _source(drawing: Drawing, item: Item) -> str:
    while not isinstance(item, str):
        item = min((start for start, end in drawing.links if end == item), key=str)
    return item


if __name__ == "__main__":
    DRAWING.write_text(svg(rooms.room_arrows()))
    print(f"wrote {DRAWING}")
