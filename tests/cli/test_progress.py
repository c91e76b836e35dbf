"""Lines for logs, bars for terminals."""

import io
import sys

import pytest
from rich.console import Console

from llmshrink.cli.progress import EVERY, TOLD, Bars, Lines, listener
from llmshrink.forms import Event
from llmshrink.progress import Silent


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def lines(verbose=False):
    clock, stream = Clock(), io.StringIO()
    return clock, stream, Lines(stream, verbose=verbose, clock=clock)


def test_lines_come_seldom_and_once_per_step():
    clock, stream, shown = lines()
    shown.start("compress", 100)
    for _ in range(100):
        clock.now += EVERY / 10
        shown.advance(1, "block")
    shown.finish()
    told = stream.getvalue().splitlines()
    assert len(told) == 11
    assert told[0] == "compress: 10%, about 45.0 s left - block"
    assert told[-1] == "compress: done in 50.0 s"


def test_a_short_step_is_one_line():
    _, stream, shown = lines()
    shown.start("save", 0)
    shown.advance(5)
    shown.finish()
    assert stream.getvalue() == "save: done in 0.00 s\n"


def test_a_step_of_unknown_length_says_how_long_it_runs():
    clock, stream, shown = lines()
    shown.start("load", 0)
    clock.now = 61
    shown.advance(5)
    assert stream.getvalue() == "load: 1 min 01 s\n"


def test_verbose_tells_every_note():
    _, stream, shown = lines(verbose=True)
    shown.start("compress", 4)
    for i in range(4):
        shown.advance(1, f"block {i}")
    assert [line.rpartition(" - ")[2] for line in stream.getvalue().splitlines()] == [f"block {i}" for i in range(4)]


def test_steps_nest():
    clock, stream, shown = lines()
    shown.start("evaluate", 10)
    shown.start("load", 1)
    shown.finish()
    clock.now = 5
    shown.advance(5)
    shown.finish()
    assert stream.getvalue().splitlines() == [
        "load: done in 0.00 s",
        "evaluate: 50%, about 5.0 s left",
        "evaluate: done in 5.0 s",
    ]


def events(shown):
    for i in range(TOLD + 2):
        shown.event(Event("rtn_fallback", "rounded", layer=f"layer.{i}"))
    shown.event(Event("damping", "raised [red]"))
    shown.close()


EVENT_LINES = [
    *(f"note: layer.{i}: rounded" for i in range(TOLD)),
    "note: raised [red]",
    "note: 2 more of the kind 'rtn_fallback'; the report lists them",
]


def test_events_of_one_kind_do_not_flood():
    _, stream, shown = lines()
    events(shown)
    assert stream.getvalue().splitlines() == EVENT_LINES


def test_bars():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120, color_system=None)
    shown = Bars(console, verbose=True)
    shown.start("compress [red]", 100)
    shown.advance(50, "half [red]")
    shown.start("save", 0)
    shown.advance(3)
    shown.finish()
    shown.finish()
    events(shown)
    told = stream.getvalue()
    assert "compress [red]" in told
    assert "100%" in told
    assert "half [red]\n" in told
    for line in EVENT_LINES:
        assert line in told
    assert told.count("\x1b[?25h") == 1, "the cursor is shown again"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "term", "kind"),
    [
        (Terminal, "xterm-256color", Bars),
        (Terminal, "dumb", Lines),
        (Terminal, "", Lines),
        (io.StringIO, "xterm", Lines),
    ],
)
def test_the_listener_fits_the_stream(monkeypatch, stream, term, kind):
    monkeypatch.setattr(sys, "stderr", stream())
    monkeypatch.setenv("TERM", term)
    with listener() as shown:
        assert isinstance(shown, kind)
    with listener(quiet=True) as shown:
        assert isinstance(shown, Silent)


def test_no_color(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")
    with listener() as shown:
        shown.start("compress", 2)
        shown.advance(1)
        shown.finish()
    assert "\x1b[3" not in stream.getvalue(), "no colour codes"


def test_the_terminal_is_given_back_after_an_error(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    with pytest.raises(ZeroDivisionError), listener() as shown:
        shown.start("compress", 2)
        raise ZeroDivisionError
    assert "\x1b[?25h" in stream.getvalue()


def test_a_resumed_step_counts_what_is_done_but_not_its_time():
    clock, stream, shown = lines()
    shown.start("compress", 100, 50)
    clock.now += 10
    shown.advance(25)
    assert stream.getvalue() == "compress: 75%, about 10.0 s left\n"
