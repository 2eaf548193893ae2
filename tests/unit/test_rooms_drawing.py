"""docs/rooms.svg is what the imports give, and docs/architecture.md says what every room is for."""

from __future__ import annotations

import re
from itertools import combinations
from xml.etree import ElementTree

from draw_rooms import COMMAND, DRAWING, boxes, depths, reduction, svg
from rooms import MAY_IMPORT, ROOT, room_arrows


def test_the_drawing_is_that_of_the_imports():
    assert DRAWING.read_text() == svg(room_arrows()), f"docs/rooms.svg is out of date: run `{COMMAND}` and commit it"


def test_a_room_lies_above_what_it_imports_and_implied_arrows_are_left_out():
    graph = {"cli": ["comm", "errors", "planner"], "comm": ["errors"], "planner": ["errors"], "errors": []}
    assert depths(graph) == {"cli": 2, "comm": 1, "planner": 1, "errors": 0}
    assert reduction(graph) == {"cli": ["comm", "planner"], "comm": ["errors"], "planner": ["errors"], "errors": []}


def test_rooms_that_differ_in_name_alone_are_one_box():
    graph = {"top": ["a/x", "a/y", "a/z"], "a/x": ["low"], "a/y": ["low"], "a/z": [], "low": []}
    assert boxes(graph) == {"top": ["a/z", "a/{x, y}"], "a/{x, y}": ["low"], "a/z": [], "low": []}


def test_rooms_do_not_overlap():
    picture = ElementTree.fromstring(DRAWING.read_text())
    places = [
        tuple(int(box.attrib[name]) for name in ("x", "y", "width", "height"))
        for box in picture.iter("{http://www.w3.org/2000/svg}rect")
        if "stroke" in box.attrib
    ]
    assert len(places) == len(boxes(room_arrows()))
    for (x, y, width, height), (other_x, other_y, other_width, other_height) in combinations(places, 2):
        beside = x + width < other_x or other_x + other_width < x
        assert beside or y + height < other_y or other_y + other_height < y


def test_every_room_is_described():
    page = (ROOT / "docs" / "architecture.md").read_text()
    rooms = page.partition("## The rooms")[2].partition("\n## ")[0]
    first = re.compile(r"^\| (.*?) \|", re.MULTILINE)
    described = {word for cell in first.findall(rooms) for word in re.findall(r"`([^`]+)`", cell)}
    assert described == set(MAY_IMPORT)
