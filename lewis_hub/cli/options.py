"""Options and arguments that several commands take."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click


class RepoName(click.ParamType[str]):
    """A repository on the Hub: owner/name."""

    name = "owner/name"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Refuse a text that cannot be the name of a repository."""
        from lewis_hub.recipe.schema import REPO

        if not REPO.fullmatch(value):
            self.fail(f"expected owner/name such as me/my-merge, found {value!r}", param, ctx)
        return value


class Duration(click.ParamType[str]):
    """A number and a unit, in the Hub's format."""

    name = "duration"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Refuse a text that is not a duration."""
        if not re.fullmatch(r"\d+(\.\d+)?[smhd]", value):
            self.fail(f"expected a duration such as 90m or 2h, found {value!r}", param, ctx)
        return value


class Template(click.ParamType[str]):
    r"""A template over columns, in which a typed `\n` means a line break."""

    name = "text"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:  # noqa: ARG002
        r"""Replace each `\n` by a line break: shells pass the two characters on unchanged."""
        return value.replace(r"\n", "\n")


class RecipePath(click.Path):
    """The path of a recipe; a folder means the `recipe.yaml` in it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path of the file."""
        path = Path(str(super().convert(value, param, ctx)))
        return path / "recipe.yaml" if path.is_dir() else path


def parse_size(text: str, option: str) -> int:
    """Parse a size such as 500MB or 5GB, in powers of 1000.

    Args:
        text: what the user typed.
        option: the option's name, for the message.

    Raises:
        click.BadParameter: `text` is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMGT]?)B?", text.strip())
    if not match or float(match[1]) == 0:
        raise click.BadParameter(
            f"expected a size such as 500MB or 5GB, found {text!r}", param_hint=option
        )
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))


recipe_argument = click.argument(
    "recipe_file", metavar="[RECIPE]", default="recipe.yaml", type=RecipePath()
)
pickle_option = click.option(
    "--allow-pickle",
    is_flag=True,
    help="Also read models that only have pytorch_model.bin. Use it for authors you trust.",
)
nan_option = click.option(
    "--allow-nan",
    is_flag=True,
    help="Where a model contains NaN or infinity, use the base's value instead of stopping.",
)
device_option = click.option(
    "--device",
    default="cpu",
    help="Device to run and merge models on: cpu, cuda or cuda:1.",
)
code_option = click.option(
    "--allow-code-execution",
    is_flag=True,
    help="Allow benchmarks that run code written by a model (mbpp, humaneval).",
)
overlap_option = click.option(
    "--allow-overlap",
    is_flag=True,
    help="Continue even if calibration texts contain items that are scored.",
)
memory_option = click.option(
    "--max-memory",
    callback=lambda _, option, text: text and parse_size(text, option.opts[0]),
    metavar="SIZE",
    help="Load models block by block if they need more memory than this (for example 8GB).",
)
sign_option = click.option(
    "--sign",
    "private_key",
    metavar="KEY.pem",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Sign the files with this elliptic curve key; writes model.sig.",
)


def hardware_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that select the machine of a Job."""
    for option in (
        click.option(
            "--namespace", help="Account that runs and pays for the Job. [default: your account]"
        ),
        click.option(
            "--timeout",
            type=Duration(),
            help="Time limit of the Job, such as 90m or 2h. [default: 30m]",
        ),
        click.option("--flavor", help="Machine type of the Job: cpu-upgrade, a100-large, ..."),
    ):
        command = option(command)
    return command


def output_option(help_text: str, default: str | None = None) -> Callable[[Any], Any]:
    """Make the option -o for a folder; a command without `default` derives it itself."""
    kind = click.Path(file_okay=False, path_type=Path)
    return click.option("-o", "--output", type=kind, default=default, help=help_text)
