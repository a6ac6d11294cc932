"""What people read on a terminal is broken between words, and elsewhere not at all."""

from __future__ import annotations

import pytest

from sfkt_cli.console import console, say

LINE = "bridge  1/3  " + "  ".join(f"term_{number} 0.12{number}" for number in range(8))


def test_long_lines_break_between_fields_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_force_terminal", True)
    monkeypatch.setattr(console, "width", 40)
    with console.capture() as caught:
        say(f"short  line\n{LINE}")
    lines = caught.get().splitlines()
    assert lines[0] == "short  line"
    assert max(map(len, lines)) <= 40
    assert [part for line in lines[1:] for part in line.strip().split("  ")] == LINE.split("  ")


def test_a_path_is_never_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_force_terminal", True)
    monkeypatch.setattr(console, "width", 20)
    path = "runs/" + "a" * 40
    with console.capture() as caught:
        say(f"see the picture in {path} now")
    assert path in caught.get()


def test_elsewhere_a_message_stays_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    say(LINE * 3)
    assert capfd.readouterr().err == LINE * 3 + "\n"
