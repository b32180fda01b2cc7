"""How far a stage is, in a log file and on a terminal."""

import logging

import pytest

from pipeline import progress


@pytest.mark.parametrize(
    ("done", "total", "seconds", "expected"),
    [
        (500, 1000, 5.0, "500 of 1,000 tokens (50 %), 100 tokens/s, 5 s left"),
        (81_920, 1_000_000, 16.0, "81,920 of 1,000,000 tokens (8 %), 5,120 tokens/s, 3 min left"),
        (1000, 1_001_000, 10.0, "1,000 of 1,001,000 tokens (0 %), 100 tokens/s, 2.8 h left"),
    ],
)
def test_a_line_says_what_is_done_how_fast_and_what_is_left(done, total, seconds, expected):
    assert progress.line(done, total, seconds) == expected


def clock(monkeypatch, *times):
    left = iter(times)
    monkeypatch.setattr(progress, "monotonic", lambda: next(left))


def test_a_log_file_gets_a_line_when_enough_time_has_passed_and_none_at_the_end(monkeypatch, caplog):
    clock(monkeypatch, 0.0, 10.0, 25.0, 30.0, 60.0, 90.0)
    with caplog.at_level(logging.INFO):
        assert list(progress.tracked("abcde", [100] * 5)) == list("abcde")
    assert [message.split(" tokens")[0] for message in caplog.messages] == ["200 of 500", "400 of 500"]


def test_a_step_counts_when_it_is_done(monkeypatch, caplog):
    clock(monkeypatch, 0.0, 50.0, 100.0)
    steps = progress.tracked("ab", [1, 3])
    with caplog.at_level(logging.INFO):
        next(steps)
        assert caplog.messages == []
        next(steps)
        assert [message.split(" (")[0] for message in caplog.messages] == ["1 of 4 tokens"]


def test_a_terminal_gets_a_bar(monkeypatch, capsys, caplog):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    assert list(progress.tracked("ab", [1000, 3000])) == ["a", "b"]
    assert "4.00k/4.00k" in capsys.readouterr().err
    assert caplog.messages == []
