"""Progress: sparse lines where there is no terminal, a bar where there is one, numbers people can read."""

from __future__ import annotations

import pytest

from smelt import progress
from smelt.progress import Track, clock, human, note, track


@pytest.fixture(autouse=True)
def _every_line(monkeypatch):
    monkeypatch.setattr(progress, "GAP", 0.0)


def lines(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line.strip()]


def test_a_log_gets_a_line_for_each_tenth(capsys):
    with track("training", 1000, "tokens") as bar:
        for i in range(1000):
            bar.advance(1, f"loss {i}")
    found = lines(capsys)
    assert len(found) == 10
    assert [line.split("training: ")[1].split(" %")[0] for line in found] == [str(10 * i) for i in range(1, 11)]
    assert all("tokens/s" in line and "left" in line and "loss" in line for line in found)
    assert found[-1].endswith("loss 999") and "0:00 left" in found[-1]


def test_large_steps_say_no_tenth_twice(capsys):
    with track("a", 10, "rows") as bar:
        bar.advance(7)
        bar.advance(0.5)
        bar.advance(2.5)
    found = lines(capsys)
    assert len(found) == 2 and "70 %" in found[0] and "100 %" in found[1]


def test_after_a_resume_it_goes_on_from_there(capsys):
    with track("a", 100, "rows", done=55) as bar:
        for _ in range(45):
            bar.advance()
    found = lines(capsys)
    at = [int(line.split("a: ")[1].split(" %")[0]) for line in found]
    assert bar.done == 100 and [round(share, -1) for share in at] == [60, 70, 80, 90, 100]


def test_the_rate_counts_what_was_done_since_it_began(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with track("a", 1000, "rows") as bar:
        bar.began = bar._said = 0.0
        now[0] = 10.0
        bar.advance(500)
    assert "50 % at 50 rows/s, 0:10 left" in lines(capsys)[0]


def test_the_rate_after_a_resume_leaves_out_what_was_done_before(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with track("a", 1000, "rows", done=800) as bar:
        bar.began = bar._said = 0.0
        now[0] = 10.0
        bar.advance(100)
    assert "90 % at 10 rows/s, 0:10 left" in lines(capsys)[0]


@pytest.mark.parametrize("total", [0, 0.0])
def test_nothing_to_do_is_not_an_error(total, capsys):
    with track("a", total, "rows") as bar:
        bar.advance(3)
    assert lines(capsys) == [] and bar.done == 3


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with track("training", 100, "tokens") as bar:
        bar.advance(50, "loss 1.5")
        assert callable(bar._show)
    assert "training" in capsys.readouterr().err


def test_an_error_inside_passes_through(capsys):
    with pytest.raises(KeyError), track("a", 10, "rows"):
        raise KeyError("x")


def test_notes_are_one_plain_line_on_standard_error(capsys):
    note("[bold]not markup[/bold] " + "x" * 300)
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == "[bold]not markup[/bold] " + "x" * 300 + "\n"


@pytest.mark.parametrize(
    "value, text",
    [(0, "0"), (0.1234, "0.123"), (12.345, "12.3"), (999.4, "999"), (12_345, "12.3k"), (1_234_567, "1.23M"), (5e9, "5G"), (-2e6, "-2M")],
)
def test_human_numbers_have_three_digits(value, text):
    assert human(value) == text


def test_human_numbers_are_near_their_value():
    powers = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
    for exponent in range(-30, 150):
        value = 1.2345 * 10 ** (exponent / 10)
        text = human(value)
        number = float(text[:-1]) * powers[text[-1]] if text[-1] in powers else float(text)
        assert abs(number / value - 1) < 0.006, (value, text)


@pytest.mark.parametrize(
    "seconds, text", [(0, "0:00"), (9.4, "0:09"), (59.6, "1:00"), (61, "1:01"), (3599.9, "1:00:00"), (3661, "1:01:01")]
)
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_a_track_made_by_hand_works():
    assert Track("a", 10, "rows").done == 0


def test_short_work_says_only_that_it_is_done(monkeypatch, capsys):
    monkeypatch.setattr(progress, "GAP", 60.0)
    with track("a", 100, "rows") as bar:
        for _ in range(100):
            bar.advance()
    assert len(lines(capsys)) == 1
