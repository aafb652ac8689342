"""The `lewis-hub` command: its groups, and the one place where an error becomes a message."""

from __future__ import annotations

import errno
import gc
import json
import os
import signal
import sys
import threading
import time
import warnings

import click

from lewis_hub import __version__
from lewis_hub.cli import jobs, merge, models, profiles, recipes, tuning
from lewis_hub.errors import LewisHubError

RARELY = 50_000  # new objects before garbage is looked for: importing makes many, and none of it
INTERRUPTED = "interrupted; the same command goes on from here."
EPILOG = """\b
Examples:
  lewis-hub demo                                  the whole path on a tiny zoo, offline
  lewis-hub init --base B --expert E1 --expert E2 write recipe.yaml
  lewis-hub check                                 all that can be known before a download
  lewis-hub merge --push                          pull, calibrate, merge, score, publish

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 refused by the quality gate, 130 interrupted."""


@click.group(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="lewis-hub")
def cli() -> None:
    """Merge language models, measure what the merge keeps, publish it with its scores."""


for command in (
    merge.merge,
    merge.check,
    profiles.importance,
    profiles.compare,
    tuning.tune,
    jobs.schedule,
    models.evaluate,
    models.push,
    models.verify,
    models.diff,
    models.extract_lora,
    recipes.init,
    recipes.schema,
    recipes.methods,
    recipes.guides,
    recipes.actions,
    models.hub,
    models.demo,
):
    cli.add_command(command)


def main() -> None:
    """Run a command; every expected failure ends here as one message and an exit code."""
    gc.set_threshold(RARELY)
    _leave_within_a_second_of_ctrl_c()
    code = _run()
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = 1
    sys.stderr.flush()
    # Not sys.exit: threads that wait for a server would keep an interrupted run alive.
    os._exit(code)


def _run() -> int:
    # of libraries: what a user must know is a message of ours
    warnings.filterwarnings("ignore", module=r"(?!lewis_hub\b)")
    try:
        left_with = cli(standalone_mode=False)  # click hands back the code of an `Exit`
        return left_with if isinstance(left_with, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except LewisHubError as error:
        return _failed(type(error).__name__, str(error), error.exit_code, error.status)
    except (click.Abort, KeyboardInterrupt):
        return _failed("Interrupted", INTERRUPTED, 130)
    except BrokenPipeError:
        return 1
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        where = f" while writing {error.filename}" if error.filename else ""
        remedy = "Free some space, then run the same command: finished work is kept."
        return _failed("DiskFull", f"the disk is full{where}.\n{remedy}", 1)


def _leave_within_a_second_of_ctrl_c() -> None:
    """Python sees a signal between bytecodes only; one matrix product can take longer."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    def watch() -> None:
        while os.read(read, 1)[0] != signal.SIGINT:
            pass
        time.sleep(0.7)  # the usual way out restores the cursor and says the same
        click.echo(f"\x1b[?25h\nlewis-hub: {INTERRUPTED}", err=True)
        os._exit(130)

    threading.Thread(target=watch, daemon=True).start()


def _failed(kind: str, message: str, code: int, status: str = "failed") -> int:
    click.echo(f"lewis-hub: {message}", err=True)
    if "--json" in sys.argv:
        document = {"status": status, "error": {"kind": kind, "message": message}}
        click.echo(json.dumps(document, indent=2, ensure_ascii=False))
    return code
