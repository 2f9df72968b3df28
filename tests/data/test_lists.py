"""The helper smelt/data/_lists.py."""

from __future__ import annotations

import json

import pytest

from smelt.data._lists import Row, lists_of, read_lists
from smelt.data.files import Files
from smelt.spec import SmeltError

GOOD = [
    ({"query": "q", "passages": ["a", "b", "c"], "grades": [0, 3, 1.5]}, Row("q", ["b", "c", "a"], [3.0, 1.5, 0.0])),
    ({"query": "q", "positive": "a", "negatives": ["b"]}, Row("q", ["a", "b"], [1.0, 0.0])),
    ({"query": "", "positive": ["a", "é🙂"], "negatives": ["b", ""], "id": 7}, Row("", ["a", "é🙂", "b", ""], [1.0, 1.0, 0.0, 0.0])),
]


def test_rows_of_both_kinds_in_falling_order(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_bytes("\ufeff".encode() + b"\r\n".join(json.dumps(row).encode() for row, _ in GOOD) + b"\n\n")
    assert list(read_lists(file)) == [wanted for _, wanted in GOOD]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{", "not JSON"),
        ("[1]", "no text 'query'"),
        ('{"quary": "x"}', "no text 'query'; did you mean 'quary'"),
        ('{"query": 3}', "no text 'query'"),
        ('{"query": "q", "passages": ["a", "b"]}', "'grades' is a list"),
        ('{"query": "q", "passages": ["a", "b"], "grades": [1]}', "lists of one length; there are 1 grades"),
        ('{"query": "q", "passages": ["a", "b"], "grades": [1, true]}', "'grades' is a list"),
        ('{"query": "q", "passages": ["a", 2], "grades": [1, 0]}', "every passage is a text"),
        ('{"query": "q", "passages": ["a", "b"], "grades": [1, 1]}', "different grades"),
        ('{"query": "q", "positive": "a"}', "'negatives' a list"),
        ('{"query": "q", "positive": "a", "negatives": []}', "two passages"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, line, what):
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps(GOOD[0][0]) + "\n" + line + "\n")
    with pytest.raises(SmeltError, match=what) as error:
        list(read_lists(file))
    assert error.value.line == 2 and error.value.file == str(file)


class Own:
    def __init__(self, rows):
        self.rows = rows

    def lists(self, split):
        return iter(self.rows if split == "train" else [])


def test_a_corpus_with_lists_a_file_of_rows_and_any_other(tmp_path):
    rows = [Row(f"q{i}", ["a", "b"], [1.0, 0.0]) for i in range(50)]
    one, two = lists_of(Own(rows), 1, Own([])), lists_of(Own(rows), 2, Own([]))
    assert sorted(one) == sorted(two) == sorted(rows) and one != two and one == lists_of(Own(rows), 1, Own([]))
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps(GOOD[1][0]) + "\n")
    assert lists_of(Files(path=str(file)), 0, Own([])) == [GOOD[1][1]]
    (tmp_path / "y.txt").write_text("words")
    assert sorted(lists_of(Files(path=str(tmp_path / "y.txt")), 0, Own(rows))) == sorted(rows)
    with pytest.raises(SmeltError, match="no list to learn from"):
        lists_of(Own([]), 0, Own([]))
