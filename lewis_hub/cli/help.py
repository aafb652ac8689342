"""How --help lists commands and options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

WHOLE = 10_000  # characters: a summary is wrapped, never cut


class Commands(click.Group):
    """A group of commands whose summaries are shown in full."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands."""
        found = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [(name, one.get_short_help_str(WHOLE)) for name, one in found if one]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


class Sectioned(click.Command):
    """A command with many options, which --help lists in sections."""

    def __init__(
        self, *args: Any, sections: Mapping[str, Sequence[str]] | None = None, **kwargs: Any
    ) -> None:
        """`sections`: title -> names of parameters; all others are under `Options`."""
        super().__init__(*args, **kwargs)
        self.sections = sections or {}

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the options of each section, in the section's order."""
        options = [one for one in self.get_params(ctx) if isinstance(one, click.Option)]
        records = {one.name: one.get_help_record(ctx) for one in options}
        listed = {name for names in self.sections.values() for name in names}
        others = [name for name in records if name not in listed]
        for title, names in {**self.sections, "Options": others}.items():
            rows = [record for name in names if (record := records[name])]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)
