"""One way to show that work goes on: a bar with rate and time left in a terminal, sparse lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

__all__ = ["Track", "note", "track"]

GAP = 2.0  # seconds between two lines of a log, so that short work does not fill it


@dataclass
class Track:
    """State of one running task. `advance(n)` moves it; `note` is the text behind the bar, such as the loss."""

    label: str
    total: float
    unit: str
    done: float = 0.0
    began: float = field(default_factory=time.monotonic)
    note: str = ""
    _show: object = None
    _next: float = 0.1
    _before: float = 0.0  # done by an earlier run, and no part of this one's rate
    _said: float = field(default_factory=time.monotonic)

    def advance(self, amount: float = 1.0, note: str | None = None) -> None:
        self.done += amount
        if note is not None:
            self.note = note
        if callable(self._show):
            self._show(self)
        elif self.total and self.done / self.total >= self._next and (time.monotonic() - self._said >= GAP or self.done >= self.total):
            self._said = time.monotonic()
            rate = (self.done - self._before) / max(time.monotonic() - self.began, 1e-9)
            left = (self.total - self.done) / max(rate, 1e-9)
            text = f"  {self.label}: {100 * self.done / self.total:.0f} % at {human(rate)} {self.unit}/s, {clock(left)} left"
            print(text + (f", {self.note}" if self.note else ""), file=sys.stderr, flush=True)
            self._next = 0.1 * (1 + int(10 * self.done / self.total))


@contextmanager
def track(label: str, total: float, unit: str, done: float = 0.0) -> Iterator[Track]:
    """A bar over `total` units of which `done` are done already (after a resume)."""
    from rich.console import Console

    console = Console(stderr=True)
    task = Track(label, total, unit, done, _before=done)
    if not console.is_terminal:
        task._next = 0.1 * (1 + int(10 * done / total)) if total else 1.0
        yield task
        return
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<28}"),
        BarColumn(bar_width=28),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[rate]:>14}"),
        TimeRemainingColumn(compact=True),
        TextColumn("[dim]{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        handle = bars.add_task(label, total=total, rate="", note="")
        bars.update(handle, completed=done)

        def show(state: Track) -> None:
            rate = (state.done - done) / max(time.monotonic() - state.began, 1e-9)
            bars.update(handle, completed=state.done, rate=f"{human(rate)} {state.unit}/s", note=state.note)

        task._show = show
        yield task


def note(text: str) -> None:
    """One line of what happened, to the terminal or the log."""
    from rich.console import Console

    Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)


def human(value: float) -> str:
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.3g}{unit}"
    return f"{value:.3g}"


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
