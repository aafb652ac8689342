"""The same merge on the Hub's machines: `merge --on jobs`, and `schedule`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from lewis_hub.cli.options import (
    RepoName,
    code_option,
    device_option,
    hardware_options,
    recipe_argument,
)
from lewis_hub.cli.terminal import Terminal, terminal_options

if TYPE_CHECKING:
    from lewis_hub.recipe.schema import Recipe
    from lewis_hub.workflow.ci import Hardware


OWN = {"on", "flavor", "timeout", "namespace", "cron", "output", "push", "quiet"}
CRON = re.compile(r"@(annually|yearly|monthly|weekly|daily|hourly)|[\w*/,#-]+( [\w*/,#-]+){4}")
STATUS = {0: "merged", 3: "refused"}
EXIT_CODE = {"merged": 0, "unchanged": 0, "refused": 3}


class Cron(click.ParamType[str]):
    """Five fields, or one of the Hub's words."""

    name = "cron"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Refuse what is no schedule before anything is sent."""
        if not CRON.fullmatch(value):
            expected = "five fields such as '17 4 * * 1', or @daily, @weekly, @monthly"
            self.fail(f"expected {expected}; found {value!r}", param, ctx)
        return value


class Schedules(click.Group):
    """Without a command's name, it makes a schedule: `lewis-hub schedule RECIPE --cron ...`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put `create` before what is no command."""
        named = args and (args[0] in self.commands or args[0] in ("-h", "--help"))
        return super().parse_args(ctx, args if named else ["create", *args])


def merge_on_jobs(
    terminal: Terminal, recipe_file: Path, recipe: Recipe, hardware: Hardware
) -> NoReturn:
    """Run this command's merge as a Job, show its log, and leave with its exit code."""
    from lewis_hub import pipeline
    from lewis_hub.hub import jobs
    from lewis_hub.workflow.ci import request
    from lewis_hub.workflow.read import destination
    from lewis_hub.workflow.resolve import hub_api

    asked = request(recipe_file, recipe, handed_on(click.get_current_context()), hardware)
    pipeline.open_target(destination(recipe))
    api = hub_api()
    job = jobs.submit(api, asked)
    ends = f"It goes on if this command is interrupted; `hf jobs cancel {job.id}` ends it."
    say, log = terminal.progress.say, list[str]()
    say(f"Job {job.id}: {job.url}\n{ends}")

    def hear(line: str) -> None:
        log.append(line)
        say(line)

    named = jobs.follow(api, job, hear)
    told = printed(log)
    code, status = ended(named, told)
    document = {"repo": destination(recipe).repo} | told
    document |= {"status": status, "output": None, "job": job.id, "job_url": job.url}
    terminal.finish(document, f"Job {job.id} ended with exit code {code}: {job.url}")
    raise click.exceptions.Exit(code)


def printed(log: Sequence[str]) -> dict[str, Any]:
    """The document that the Job's command printed, if it had --json; else nothing."""
    inside = "\n".join(["", *log]).rpartition("\n{\n")[2].partition("\n}")[0]
    try:
        found: dict[str, Any] = json.loads(f"{{{inside}}}")
    except ValueError:
        return {}
    return found


def ended(named: int | None, told: Mapping[str, Any]) -> tuple[int, str]:
    """Exit code and status of a Job: what its document says, unless the Hub names another code."""
    status = str(told.get("status", "failed"))
    stated = EXIT_CODE.get(status, 1)
    if told and named in (None, stated):
        return stated, status
    code = 1 if named is None else named
    return code, STATUS.get(code, "failed")


def handed_on(ctx: click.Context, own: Set[str] = OWN) -> list[str]:
    """The options that were given here and are for the Job's `merge`, as they are typed."""
    words = ["--push"]
    for option in ctx.command.params:
        source = ctx.get_parameter_source(option.name or "")
        given = source is click.core.ParameterSource.COMMANDLINE
        if given and isinstance(option, click.Option) and option.name not in own:
            value = [] if option.is_flag else [str(ctx.params[option.name or ""])]
            words += [option.opts[-1], *value]
    return words


@click.group(
    cls=Schedules,
    epilog="\b\nExamples:\n"
    "  lewis-hub schedule recipe.yaml --cron '17 4 * * 1' --flavor a100-large\n"
    "  lewis-hub schedule list\n  lewis-hub schedule delete 6874d1b8a5a3b2",
)
def schedule() -> None:
    """Merge and push again and again, as a scheduled Hugging Face Job."""


@schedule.command()
@recipe_argument
@click.option("--cron", type=Cron(), required=True, help="'17 4 * * 1' (UTC), or @weekly.")
@hardware_options
@click.option("--repo", type=RepoName(), help="Where to publish.")
@device_option
@code_option
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
    """Merge RECIPE as it is now, with all that it names, whenever --cron says."""
    from lewis_hub.workflow.read import destination, published_at, read_recipe

    recipe = read_recipe(recipe_file)
    from lewis_hub import pipeline
    from lewis_hub.hub import jobs
    from lewis_hub.workflow.ci import Hardware, request
    from lewis_hub.workflow.resolve import hub_api

    if repo:
        recipe = published_at(recipe, repo)
    hardware = Hardware(flavor, timeout, namespace)
    words = handed_on(click.get_current_context(), OWN | {"as_json"})
    asked = request(recipe_file, recipe, words, hardware)
    pipeline.open_target(destination(recipe))
    made = jobs.schedule(hub_api(), asked, cron)
    document = {"status": "scheduled", "id": made.id, "schedule": cron, "url": made.url}
    terminal.finish(document, f"Scheduled {made.id} for {cron}: {made.url}")


def namespace_option(command: Callable[..., None]) -> Callable[..., None]:
    """Whose schedules."""
    told = "Whose Jobs [the token's user]."
    return click.option("--namespace", help=told)(command)


@schedule.command("list")
@namespace_option
@terminal_options
def list_schedules(terminal: Terminal, namespace: str | None) -> None:
    """List the schedules that run lewis-hub."""
    from lewis_hub.cli.tables import schedules_table
    from lewis_hub.hub import jobs
    from lewis_hub.workflow.resolve import hub_api

    found = jobs.scheduled(hub_api(), namespace)
    terminal.finish({"schedules": found}, schedules_table(found))


@schedule.command()
@click.argument("schedule_id", metavar="ID")
@namespace_option
@terminal_options
def delete(terminal: Terminal, schedule_id: str, namespace: str | None) -> None:
    """Remove the schedule ID; a Job that it started goes on."""
    from lewis_hub.hub import jobs
    from lewis_hub.workflow.resolve import hub_api

    jobs.unschedule(hub_api(), schedule_id, namespace)
    terminal.finish({"status": "deleted", "id": schedule_id}, f"Deleted {schedule_id}")
