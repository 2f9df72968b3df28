"""Markers, positions and masks of sets in a prompt, against loops."""

from __future__ import annotations

import random

import pytest
import torch

from smelt.attention._sets import Marker, Read, layout, markers, onward, sees
from smelt.spec import SmeltError


def test_markers_are_found_however_they_are_cut():
    assert markers(["a ", "{", "b", "|", "c", "} "], "{", "|", "}") == [Marker(1, 2, "open"), Marker(3, 4, "split"), Marker(5, 6, "close")]
    assert markers(list("a<set>b<or>c</set>"), "<set>", "<or>", "</set>") == [
        Marker(1, 6, "open"),
        Marker(7, 11, "split"),
        Marker(12, 18, "close"),
    ]
    assert markers(["x", " <", "set", ">\n", "", "y", " </", "set>"], "<set>", "<or>", "</set>") == [
        Marker(1, 4, "open"),
        Marker(6, 8, "close"),
    ]
    assert markers(["\n", "\n", "[", "A", "\n", "[", "B", "\n\n", "end"], "\n\n[", "\n[", "\n\nend") == [
        Marker(0, 3, "open"),
        Marker(4, 6, "split"),
        Marker(7, 9, "close"),
    ]
    spaced = ["a", " ", "{", " ", "b", "\n", " ", "|", " ", "c ", "}", " ", "d"]
    assert markers(spaced, "{", "|", "}") == [Marker(1, 3, "open"), Marker(5, 8, "split"), Marker(10, 11, "close")]
    assert markers(["{", " ", "|", "}"], "{", "|", "}") == [Marker(0, 1, "open"), Marker(1, 3, "split"), Marker(3, 4, "close")]
    assert markers(["no", "thing"], "{", "|", "}") == [] == markers([], "{", "|", "}")


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["{", "a", "|"], "never closed"),
        (["a", "|", "b"], "'|' outside of a set, at token 1"),
        (["a", "}"], "'}' outside"),
        (["{", "a", "{"], "'{' inside of a set, at token 2"),
        (["({", "a", "}"], "shares a token with text beside it"),
        (["{", "a", "})"], "shares a token"),
    ],
)
def test_what_does_not_match_is_refused(texts, said):
    with pytest.raises(SmeltError) as caught:
        markers(texts, "{", "|", "}")
    assert said in str(caught.value)


def random_row(rng, width):
    """A row of letters and markers of one token, padded on one side: (kinds, real)."""
    row = []
    for _ in range(rng.randint(0, 3)):
        row += ["t"] * rng.randint(0, 3) + ["{"]
        for at in range(rng.randint(1, 4)):
            row += ["|"] * (at > 0) + ["t"] * rng.randint(0, 4)
        row += ["}"]
    row += ["t"] * rng.randint(1, 3)
    row = row[-width:] if len(row) <= width else ["t"] * width
    pads = ["p"] * (width - len(row))
    return pads + row if rng.random() < 0.5 else row + pads


def by_hand(row):
    """One token after the other: (who it sees, position, position of the next one)."""
    start, longest, used, within, part = 0, 0, 0, False, 0
    about, position, after = [], [], []
    for kind in row:
        if kind == "t":
            used += 1
            position.append(start + used - 1)
            about.append(part if within else 0)
        elif kind == "p":
            position.append(max(0, start + used - 1))
            about.append("p")
        else:
            if not within:
                start, used = start + used, 0
            longest, used = (max(longest, used) if within else 0), 0
            part += 1
            within = kind != "}"
            if kind == "}":
                start += longest
            position.append(start)
            about.append("m")
        after.append(start + used)
    opened, sets = 0, []
    for kind in row:
        opened += kind == "{"
        sets.append(opened)
    seen = []
    for i, me in enumerate(about):
        line = []
        for j, other in enumerate(about):
            text = j <= i and other not in ("m", "p")
            mine = other == 0 or other == me or sets[j] < sets[i] or (sets[j] == sets[i] and "}" in row[j:i])
            if me == "m" and row[i] == "}" and sets[j] == sets[i]:
                mine = True  # the end of a set has read it
            line.append(i == j or (text and mine))
        seen.append(line)
    return seen, position, after


def test_layout_equals_the_loops():
    rng, kinds = random.Random(0), {"{": "open", "|": "split", "}": "close"}
    compared = 0
    for _ in range(60):
        rows = [random_row(rng, 30) for _ in range(3)]
        found = [[Marker(i, i + 1, kinds[k]) for i, k in enumerate(row) if k in kinds] for row in rows]
        prompt = layout(found, torch.tensor([[k != "p" for k in row] for row in rows]))
        seeing = sees(prompt)
        for at, row in enumerate(rows):
            wanted, position, after = by_hand(row)
            text = torch.tensor([k in "t}" for k in row])  # nobody reads what the other markers say
            assert prompt.position[at].tolist() == position and prompt.after[at].tolist() == after
            assert torch.equal(seeing[at][text], torch.tensor(wanted)[text])
            assert prompt.visible[at].tolist() == [k == "t" for k in row]
            assert not (seeing[at] & ~torch.eye(30, dtype=torch.bool))[:, ~prompt.visible[at]].any()
            compared += len(found[at])
    assert compared > 200


def test_going_on_equals_one_layout_whose_end_is_text():
    found = [[Marker(2, 3, "open"), Marker(5, 6, "split"), Marker(6, 7, "close")], []]
    real = torch.ones(2, 15, dtype=torch.bool)
    real[1, :4] = False
    whole = layout(found, real)
    first = layout(found, real[:, :9])
    read, cut = Read(first.visible, first.after, 9), 9
    for stop in (10, 13, 15):
        seeing, position, read = onward(read, real[:, :stop], cut)
        assert torch.equal(seeing, sees(whole)[:, cut:stop, :stop]) and torch.equal(position, whole.position[:, cut:stop])
        cut = stop
    assert torch.equal(read.visible, whole.visible) and torch.equal(read.after, whole.after)
    again, position, read = onward(read, real[:, :13], 11)  # four tokens taken back, two others read
    assert torch.equal(again, sees(whole)[:, 11:13, :13]) and torch.equal(position, whole.position[:, 11:13])
    for rows, seen in ((real[:1], 12), (real, 14), (real, 8)):
        with pytest.raises(SmeltError, match="other rows or tokens"):
            onward(read, rows, seen)


def test_a_member_is_the_same_tokens_before_either_marker():
    """A tokenizer may cut " |" as one token and " }" as two."""
    one = markers(["{", "a", " |", "b", " ", "}"], "{", "|", "}")
    two = markers(["{", "b", " |", "a", " ", "}"], "{", "|", "}")
    assert one == two == [Marker(0, 1, "open"), Marker(2, 3, "split"), Marker(4, 6, "close")]
