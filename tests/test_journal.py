from __future__ import annotations

import json
import os

import pytest

from smelt.journal import Journal
from smelt.spec import SmeltError


def test_what_was_put_is_there_for_the_next_process(tmp_path):
    file = tmp_path / "deep" / "answers.jsonl"
    journal = Journal(file)
    assert "a" not in journal
    journal.put("a", {"text": "naïve\n"})
    journal.put("b", 2)
    again = Journal(file)
    assert (again["a"], again["b"], len(again)) == ({"text": "naïve\n"}, 2, 2)
    with pytest.raises(SmeltError, match="'a' is in the journal already"):
        again.put("a", 1)


@pytest.mark.parametrize("left", range(1, 24))
def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path, left):
    file = tmp_path / "j.jsonl"
    Journal(file).put("a", 1)
    whole = file.read_bytes()
    line = (json.dumps({"key": "b", "value": "xyz"}) + "\n").encode()
    file.write_bytes(whole + line[:left])
    journal = Journal(file)
    assert len(journal) == 1
    journal.put("b", 3)
    assert Journal(file)["b"] == 3


def test_a_failed_write_leaves_no_half_line(tmp_path, monkeypatch):
    file = tmp_path / "j.jsonl"
    journal = Journal(file)
    journal.put("a", 1)

    def full(handle):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(SmeltError, match="No space left"):
        patch.setattr(os, "fsync", full)
        journal.put("b", 2)
    assert "b" not in journal
    journal.put("b", 3)
    assert (Journal(file)["b"], len(Journal(file))) == (3, 2)


def test_damage_in_the_middle_is_named(tmp_path):
    file = tmp_path / "j.jsonl"
    file.write_text('{"key": "a", "value": 1}\nrubbish\n{"key": "b", "value": 1}\n')
    with pytest.raises(SmeltError, match="damaged"):
        Journal(file)
