"""Commands that run a merge as a Hugging Face Job: `merge --on jobs` and `schedule`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from lewis_hub.cli import options
from lewis_hub.cli.help import Commands
from lewis_hub.cli.terminal import Terminal, terminal_options
from lewis_hub.display import TextTable
from lewis_hub.documents import MAX_JSON_BYTES, read_json

if TYPE_CHECKING:
    from lewis_hub.hub.jobs import JobRequest
    from lewis_hub.pipeline import Hardware
    from lewis_hub.recipe.schema import Recipe


LOCAL_OPTIONS = {"on", "flavor", "timeout", "namespace", "cron", "output", "push", "quiet"}
CRON = options.Format(
    "cron",
    "five fields such as '17 4 * * 1', or @daily, @weekly, @monthly",
    options.matching(r"@(annually|yearly|monthly|weekly|daily|hourly)|[\w*/,#-]+( [\w*/,#-]+){4}"),
)
MAX_SHOWN = 500  # letters of a cell of the table of schedules
STATUS = {0: "merged", 3: "refused"}
EXIT_CODE = {"merged": 0, "unchanged": 0, "refused": 3}


class Schedules(Commands):
    """A group whose default command is `create`: `lewis-hub schedule RECIPE --cron ...`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Insert `create` if the first argument is not the name of a command."""
        named = args and (args[0] in self.commands or args[0] in ("-h", "--help"))
        return super().parse_args(ctx, args if named else ["create", *args])


def merge_on_jobs(
    terminal: Terminal, recipe_file: Path, recipe: Recipe, hardware: Hardware
) -> NoReturn:
    """Run the merge as a Job, print the Job's log, and exit with its exit code."""
    from lewis_hub.hub import jobs
    from lewis_hub.workflow.resolve import destination, hub_api

    request, api = _checked_request(recipe_file, recipe, hardware, LOCAL_OPTIONS), hub_api()
    job = jobs.submit(api, request)
    cancel = f"Interrupting this command does not stop it; `hf jobs cancel {job.id}` does."
    say, log = terminal.progress.say, LogEnd()
    say(f"Job {job.id}: {job.url}\n{cancel}")

    def print_line(line: str) -> None:
        log.add(line)
        say(line)

    reported_code = jobs.follow(api, job, print_line)
    printed = printed_document(log.lines)
    code, status = job_result(reported_code, printed)
    document = {"repo": destination(recipe).repo} | printed
    document |= {"status": status, "output": None, "job": job.id, "job_url": job.url}
    terminal.finish(document, f"Job {job.id} ended with exit code {code}: {job.url}")
    raise click.exceptions.Exit(code)


def _checked_request(
    recipe_file: Path, recipe: Recipe, hardware: Hardware, local: Set[str]
) -> JobRequest:
    """Return the Job that merges a recipe, after all checks that need no weights.

    The options of the running command apply to the check as they do to the Job.
    """
    from lewis_hub import pipeline
    from lewis_hub.workflow.check import require_fine
    from lewis_hub.workflow.resolve import require_streamable

    ctx = click.get_current_context()
    request = pipeline.job_request(recipe_file, recipe, job_options(ctx, local), hardware)
    options.open_target(recipe)
    given = ctx.params
    if given.get("no_eval"):
        recipe = recipe.model_copy(update={"evaluate": None})
    if given.get("stream"):
        require_streamable(recipe)
    allow_pickle, limit = bool(given.get("allow_pickle")), given.get("max_memory_bytes")
    require_fine(pipeline.check(recipe, allow_pickle=allow_pickle, max_memory_bytes=limit))
    return request


@dataclass
class LogEnd:
    """The lines of a log from those of its last JSON document on; a Job may print without end."""

    lines: list[str] = field(default_factory=list)
    n_characters: int = 0

    def add(self, line: str) -> None:
        """Add the next line of the log."""
        if line == "{":
            self.lines.clear()
            self.n_characters = 0
        self.n_characters += len(line) + 1
        if self.n_characters <= MAX_JSON_BYTES:
            self.lines.append(line)


def printed_document(log: Sequence[str]) -> dict[str, Any]:
    """Read the JSON document that a command with --json printed; empty without one."""
    inside = "\n".join(["", *log]).rpartition("\n{\n")[2].partition("\n}")[0]
    try:
        document: dict[str, Any] = read_json(f"{{{inside}}}")
    except ValueError:
        return {}
    return document


def job_result(reported_code: int | None, printed: Mapping[str, Any]) -> tuple[int, str]:
    """Exit code and status of a Job: those that it printed, unless the Hub reports others."""
    status = str(printed.get("status", "failed"))
    printed_code = EXIT_CODE.get(status, 1)
    if printed and reported_code in (None, printed_code):
        return printed_code, status
    code = 1 if reported_code is None else reported_code
    return code, STATUS.get(code, "failed")


def job_options(ctx: click.Context, local: Set[str] = LOCAL_OPTIONS) -> list[str]:
    """List the typed options that the Job's `merge` gets too, all but the `local` ones."""
    words = ["--push"]
    for option in ctx.command.params:
        source = ctx.get_parameter_source(option.name or "")
        typed = source is click.core.ParameterSource.COMMANDLINE
        if typed and isinstance(option, click.Option) and option.name not in local:
            value = ctx.params[option.name or ""]
            for one in value if option.multiple else [value]:
                words += [option.opts[-1], *([] if option.is_flag else [_as_typed(one)])]
    return words


def _as_typed(value: Any) -> str:
    """The text of an option's value; a pair is NAME=VALUE."""
    return f"{value[0]}={json.dumps(value[1])}" if isinstance(value, tuple) else str(value)


@click.group(
    cls=Schedules,
    epilog="\b\nExamples:\n"
    "  lewis-hub schedule recipe.yaml --cron '17 4 * * 1' --flavor a100-large\n"
    "  lewis-hub schedule list\n  lewis-hub schedule delete 6874d1b8a5a3b2",
)
def schedule() -> None:
    """Merge and push at regular times, as a Hugging Face Job."""


@schedule.command()
@options.recipe
@click.option(
    "--cron",
    type=CRON,
    required=True,
    help="When to merge: five cron fields in UTC such as '17 4 * * 1', or @weekly.",
)
@options.hardware
@options.repo
@options.device
@options.code
@terminal_options
def create(
    terminal: Terminal,
    recipe_file: Path,
    cron: str,
    flavor: str | None,
    timeout: str | None,
    namespace: str | None,
    repo: str | None,
    **_: Any,
) -> None:
    """Schedule the merge of a recipe.

    The Job uses the recipe and its local files as they are now.
    """
    recipe = options.read_recipe(recipe_file, repo)
    from lewis_hub.hub import jobs
    from lewis_hub.pipeline import Hardware
    from lewis_hub.workflow.resolve import hub_api

    hardware = Hardware(flavor, timeout, namespace)
    request = _checked_request(recipe_file, recipe, hardware, LOCAL_OPTIONS | {"as_json"})
    scheduled = jobs.submit(hub_api(), request, cron)
    document = {"status": "scheduled", "id": scheduled.id, "schedule": cron, "url": scheduled.url}
    terminal.finish(document, f"Scheduled {scheduled.id} for {cron}: {scheduled.url}")


namespace_option = click.option(
    "--namespace", help="Account that owns the Jobs. [default: your account]"
)


@schedule.command("list")
@namespace_option
@terminal_options
def list_schedules(terminal: Terminal, namespace: str | None) -> None:
    """List the schedules that run lewis-hub."""
    from lewis_hub.hub import jobs
    from lewis_hub.workflow.resolve import hub_api

    header = ("id", "schedule", "flavor", "command")
    schedules = jobs.scheduled(hub_api(), namespace)
    rows = (tuple((one[name] or "-")[:MAX_SHOWN] for name in header) for one in schedules)
    terminal.finish({"schedules": schedules}, TextTable(header, tuple(rows)))


@schedule.command()
@click.argument("schedule_id", metavar="ID")
@namespace_option
@terminal_options
def delete(terminal: Terminal, schedule_id: str, namespace: str | None) -> None:
    """Delete a schedule.

    A Job that it has started continues.
    """
    from lewis_hub.hub import jobs
    from lewis_hub.workflow.resolve import hub_api

    jobs.unschedule(hub_api(), schedule_id, namespace)
    terminal.finish({"status": "deleted", "id": schedule_id}, f"Deleted {schedule_id}")
