"""The `lewis-hub` command: it runs a subcommand and turns each expected error into a message."""

from __future__ import annotations

import errno
import gc
import io
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit

import click

from lewis_hub import __version__
from lewis_hub.cli import adapters, demo, init, jobs, merge, models, recipes, transplant, tuning
from lewis_hub.cli.help import Commands
from lewis_hub.cli.terminal import escape_logs, say, say_json
from lewis_hub.errors import LewisHubError, SourceError
from lewis_hub.files import DISK_FULL, TOO_MANY_OPEN
from lewis_hub.system import (
    allow_open_files,
    is_out_of_memory,
    make_nonblocking,
    open_closed_streams,
    write_utf8,
)
from lewis_hub.working_folder import keep_out_of_path

UNUSABLE = {
    *(errno.EIO, errno.EROFS, errno.ESTALE, errno.EACCES, errno.EPERM),
    *(errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.EEXIST, errno.EISDIR, errno.ENOTEMPTY),  # something else is where a file belongs
    *(errno.EINTR, errno.EBUSY, errno.ENODEV),  # disks in a network, and those unplugged
}
BUGS = {errno.ENOENT, errno.EINVAL, errno.EBADF}  # of a call that should not have been made
GC_THRESHOLD = 50_000  # imports create many objects and no garbage: collect less often
SECONDS = ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT")
INTERRUPTED = "interrupted. Run the same command again to continue."
EPILOG = """\b
Examples:
  lewis-hub demo                                  merge, score and publish tiny models, offline
  lewis-hub init --base B --expert E1 --expert E2 write recipe.yaml
  lewis-hub check                                 check recipe.yaml before any download
  lewis-hub merge --push                          download, calibrate, merge, score, publish

Exit codes: 0 success, 1 failure, 2 wrong usage, 3 refused by the quality gate, 130 interrupted."""


@click.group(
    cls=Commands,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)
@click.version_option(__version__, prog_name="lewis-hub")
def cli() -> None:
    """Merge language models, score the result, and publish it on the Hugging Face Hub."""


for command in (
    merge.merge,
    merge.check,
    models.importance,
    models.compare,
    tuning.tune,
    jobs.schedule,
    models.evaluate,
    models.push,
    models.verify,
    models.diff,
    models.export,
    adapters.extract_lora,
    adapters.merge_lora,
    transplant.transplant_tokenizer,
    init.init,
    recipes.schema,
    recipes.methods,
    recipes.guides,
    recipes.actions,
    demo.hub,
    demo.demo,
    demo.bench,
):
    cli.add_command(command)


OUT_OF_MEMORY = (
    "there is not enough memory.\nUse a machine with more, or smaller models; `lewis-hub check` "
    "tells what a merge takes. Finished work is kept."
)


def main() -> None:
    """Run a command and exit with its code."""
    gc.set_threshold(GC_THRESHOLD)
    sys.excepthook = _print_bug
    open_closed_streams()
    write_utf8(sys.stdout, sys.stderr)
    keep_out_of_path()
    allow_open_files()
    escape_logs()
    _exit_within_a_second_of_ctrl_c()
    code = _run()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # nobody reads it, or its disk is full
            code = code or 1
    # Not sys.exit: threads that wait for a server would keep an interrupted run alive.
    os._exit(code)


def _run() -> int:
    # Hide warnings of libraries: lewis-hub reports what a user must know in its own messages.
    warnings.filterwarnings("ignore", module=r"(?!lewis_hub\b)")
    try:
        _require_environment()
        code = cli(standalone_mode=False)  # click returns the code of an `Exit`
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        shown = io.StringIO()
        error.show(shown)
        with suppress(OSError):
            say(shown.getvalue(), err=True, nl=False)
        return error.exit_code
    except LewisHubError as error:
        return _failed(type(error).__name__, str(error), error.exit_code, error.status)
    except (click.Abort, KeyboardInterrupt):
        return _failed("Interrupted", INTERRUPTED, 130)
    except BrokenPipeError:
        return 1
    except OSError as error:
        if (failure := disk_failure(error)) is None:
            raise
        return _failed(*failure, 1)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _failed("OutOfMemory", OUT_OF_MEMORY, 1)


def _require_environment() -> None:
    """Refuse what huggingface_hub cannot even be imported with, and a folder that is gone."""
    asked = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        parts = urlsplit(asked)
        is_address = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        is_address = is_address and asked.split() == [asked]  # a password has no spaces
    except ValueError:
        is_address = False
    if not is_address:
        remedy = "Expected: one such as https://huggingface.co, or no such variable."
        raise SourceError("HF_ENDPOINT", "it is not the address of a Hub", remedy)
    for name in SECONDS:
        if not os.environ.get(name, "0").strip().isdecimal():
            remedy = "Expected: a number such as 10, or no such variable."
            raise SourceError(name, "it is not a whole number of seconds", remedy)
    try:
        Path.cwd()
    except FileNotFoundError:
        remedy = "Change to another one with `cd`, then run the same command again."
        raise SourceError("The working folder", "it was deleted", remedy) from None


def disk_failure(error: OSError) -> tuple[str, str] | None:
    """The kind and message of an error of the disk or of permissions; None for a bug."""
    if error.errno in DISK_FULL:
        where = f" (writing {error.filename})" if error.filename else ""
        remedy = "Free some space, then run the same command again: finished work is kept."
        return "DiskFull", f"the disk is full, or a quota or limit is reached{where}.\n{remedy}"
    if error.errno in TOO_MANY_OPEN:
        remedy = "Allow more open files, such as with `ulimit -n 10240`, then run it again."
        return "TooManyFiles", f"{error.filename or 'a file'}: {error.strerror}.\n{remedy}"
    # disks in a network have more: ENOTCONN where they were mounted, ETIMEDOUT, EREMOTEIO
    if error.errno in UNUSABLE or (error.filename is not None and error.errno not in BUGS):
        where = error.filename or "a file"
        remedy = "Make it usable, or name other folders: -o for the output, HF_HOME for caches."
        return "DiskError", f"{where}: it cannot be read or written ({error.strerror}).\n{remedy}"
    return None


def _exit_within_a_second_of_ctrl_c() -> None:
    """Exit from a thread: Python handles a signal only after the matrix product that runs."""
    read, write = os.pipe()
    make_nonblocking(write)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    def watch() -> None:
        while os.read(read, 1)[0] != signal.SIGINT:
            pass
        time.sleep(0.7)  # normally the main thread has printed the message and exited by then
        click.echo(f"\x1b[?25h\nlewis-hub: {INTERRUPTED}", err=True)
        os._exit(130)

    threading.Thread(target=watch, daemon=True).start()


def _print_bug(kind: type[BaseException], bug: BaseException, trace: TracebackType | None) -> None:
    say("".join(traceback.format_exception(kind, bug, trace)), err=True, nl=False)


def _failed(kind: str, message: str, code: int, status: str = "failed") -> int:
    with suppress(OSError):  # the other stream may still be read
        say(f"lewis-hub: {message}", err=True)
    if "--json" in sys.argv:
        with suppress(OSError):
            say_json({"status": status, "error": {"kind": kind, "message": message}})
    return code
