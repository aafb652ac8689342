"""Texts of others control neither a terminal nor a log, and no credentials are shown."""

import json
import logging
import shutil
import subprocess
import sys

import pytest

from lewis_hub.cli.terminal import Terminal, escape_logs
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.display import TextTable
from lewis_hub.errors import SourceError
from lewis_hub.progress import Bars, Lines

HOSTILE = "a\x1b[2J\x9b\r\n  ::error::b\u202e ##[error]c https://me:pass@word@hub.example/x"
HARMLESS = "a\\x1b[2J\\x9b\\r\n  : :error::b\\u202e ## [error]c https://hub.example/x\n"


def test_a_text_is_printed_without_what_controls_a_terminal_or_a_log(capsys):
    Terminal(json=False, quiet=False).finish({}, HOSTILE)
    for progress in (Bars(), Lines()):
        progress.say(HOSTILE)

    assert tuple(capsys.readouterr()) == (HARMLESS, HARMLESS * 2)


def test_a_table_is_printed_without_what_controls_a_terminal_or_a_log(capsys):
    Terminal(json=False, quiet=False).finish({}, TextTable((HOSTILE, "b"), ((HOSTILE, "::c"),)))

    out = capsys.readouterr().out
    assert not {"\x1b", "\x9b", "\r", "\u202e"} & set(out)
    assert not [line for line in out.splitlines() if line.lstrip().startswith("::")]
    assert "##[" not in out


def test_a_title_of_a_bar_is_no_markup(capsys):
    with Bars().stage("[red]a[/]\x1b[2J", 1, "items") as advance:
        advance(1)

    assert "[red]a[/]\\x1b[2J" in capsys.readouterr().err


def test_json_has_the_same_values_but_no_credentials(capsys):
    Terminal(json=True, quiet=False).finish({"a": HOSTILE})

    out = capsys.readouterr().out
    assert not {"\x1b", "\x9b", "\r", "\u202e"} & set(out)
    assert "##[" not in out
    assert json.loads(out) == {"a": HOSTILE.replace("me:pass@word@", "")}


def test_a_name_of_several_lines_stays_on_one_line_of_a_message():
    assert str(SourceError("a\n::error::b", "it is missing", "Find it.")) == (
        "a\\n::error::b: it is missing.\nFind it."
    )


@pytest.mark.parametrize("word", ["a\x1b[2J\n::error::b", "a##[error]b"])
def test_wrong_usage_and_bugs_are_printed_the_same_way(word):
    for code in (
        f"import sys; sys.argv = ['lewis-hub', {word!r}]; from lewis_hub.cli import main; "
        "main.main()",
        "import signal; from lewis_hub.cli import main; "
        f"main._run = lambda: [][{word!r}]; main.main()",
    ):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        lines = done.stderr.splitlines()
        assert done.returncode
        assert lines
        assert "\x1b" not in done.stderr
        assert not [line for line in lines if line.lstrip().startswith("::") or "##[" in line]


def test_what_libraries_log_controls_no_terminal_and_no_log_of_actions(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(zoo_folder() / "base", base)
    config = json.loads((base / "config.json").read_text())
    rope = {**config["rope_parameters"], "rope_type": "\n::error::\x1b[31m100%"}
    (base / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))

    words = [sys.executable, "-m", "lewis_hub", "export", "base", "-o", "gguf"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert "[transformers]" in done.stderr
    assert ": :error::\\x1b[31m100%" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert not [line for line in done.stderr.splitlines() if line.lstrip().startswith("::")]


def test_an_error_in_a_log_shows_no_password_either(monkeypatch):
    """huggingface_hub logs some errors of its requests, with their addresses, if it is verbose."""
    monkeypatch.setattr(logging, "_logRecordFactory", logging.LogRecord)
    escape_logs()
    log = logging.getLogger("of.a.library")
    try:
        raise ValueError("cannot reach https://me:hunter2@hub.example/api \x1b[31m")
    except ValueError:
        record = log.makeRecord(log.name, logging.DEBUG, "", 1, "failed", (), sys.exc_info())

    shown = logging.Formatter().format(record)

    assert "hunter2" not in shown
    assert shown.startswith("failed\nTraceback (most recent call last):\n  File ")
    assert shown.endswith("ValueError: cannot reach https://hub.example/api \\x1b[31m")
