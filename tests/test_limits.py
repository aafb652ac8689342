"""Limits of time and memory that Python code has on data of others."""

from __future__ import annotations

import math
import sys
import time

import pytest

from lewis_hub import limits
from lewis_hub.limits import TooMuchError, limited

SLOW = r"it takes more than 0\.05 s for a part"


def grow_in_part():
    kept = []
    with limited(60, "a part", max_bytes=10**12):
        for _ in range(100):
            kept.append(b"x" * 10_000_000)
            time.sleep(0.01)


def test_the_limit_around_another_one_says_what_was_too_much():
    with (
        pytest.raises(TooMuchError, match=r"more than 0.1 GB for all"),
        limited(math.inf, "all", max_bytes=100_000_000),
    ):
        grow_in_part()


def go_on(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.001)


def ignore_the_stop(seconds):
    """As callbacks of the garbage collector do, and `__del__`: Python ignores their errors."""
    try:
        go_on(seconds)
    except BaseException:  # noqa: BLE001
        return True
    return False


def ignore_the_stop_and_go_on():
    assert ignore_the_stop(60)
    go_on(60)


def make_an_error_of_the_stop():
    if ignore_the_stop(60):
        raise ValueError("unreadable")


def test_code_that_ignored_the_stop_is_stopped_again(monkeypatch):
    monkeypatch.setattr(limits, "STOP_AGAIN_S", 0.1)
    began = time.monotonic()

    with pytest.raises(TooMuchError, match=SLOW), limited(0.05, "a part"):
        ignore_the_stop_and_go_on()

    assert time.monotonic() - began < 30


def test_code_that_ignored_the_stop_and_ends_took_too_much_all_the_same():
    with pytest.raises(TooMuchError, match=SLOW), limited(0.05, "a part"):
        assert ignore_the_stop(60)


class Slow:
    def __del__(self):
        go_on(60)


class Broken:
    def __del__(self):
        raise ValueError("in __del__")


def test_a_stop_that_python_ignores_is_not_printed_but_other_errors_are(capsys, monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)

    with pytest.raises(TooMuchError, match=SLOW), limited(0.05, "a part"):
        Slow()
    assert capsys.readouterr().err == ""
    with limited(60, "a part"):
        Broken()
    assert "ValueError: in __del__" in capsys.readouterr().err
    assert sys.unraisablehook is sys.__unraisablehook__


def test_an_error_that_code_made_of_the_stop_is_told_as_the_limit():
    with pytest.raises(TooMuchError, match=SLOW), limited(0.05, "a part"):
        make_an_error_of_the_stop()


def test_nothing_is_stopped_after_the_limit_has_ended(monkeypatch):
    monkeypatch.setattr(limits, "STOP_AGAIN_S", 0.05)

    with pytest.raises(TooMuchError), limited(0.05, "a part"):
        go_on(60)

    assert not ignore_the_stop(0.3)


def test_a_limit_that_is_kept_lets_errors_pass():
    with pytest.raises(ValueError, match="unreadable"), limited(60, "a part"):
        raise ValueError("unreadable")
