"""Options and arguments that several commands take."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click


class RepoName(click.ParamType[str]):
    """owner/name, as the Hub writes it."""

    name = "owner/name"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Refuse what cannot be a repo before anything else happens."""
        from lewis_hub.recipe.schema import REPO

        if not REPO.fullmatch(value):
            self.fail(f"expected owner/name such as me/my-merge, found {value!r}", param, ctx)
        return value


class Duration(click.ParamType[str]):
    """A number and a unit, as the Hub reads it."""

    name = "duration"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Refuse what is no time before anything is sent."""
        if not re.fullmatch(r"\d+(\.\d+)?[smhd]", value):
            self.fail(f"expected a time such as 90m or 2h, found {value!r}", param, ctx)
        return value


class Template(click.ParamType[str]):
    r"""A template over columns; `\n`, which a shell hands on as it is, is a new line."""

    name = "text"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:  # noqa: ARG002
        """Put the new lines in."""
        return value.replace(r"\n", "\n")


class RecipePath(click.Path):
    """A recipe's file; a folder stands for the `recipe.yaml` in it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Name the file."""
        path = Path(str(super().convert(value, param, ctx)))
        return path / "recipe.yaml" if path.is_dir() else path


recipe_argument = click.argument(
    "recipe_file", metavar="[RECIPE]", default="recipe.yaml", type=RecipePath()
)
pickle_option = click.option(
    "--allow-pickle",
    is_flag=True,
    help="Read models that have pytorch_model.bin alone: for authors that you trust.",
)
nan_option = click.option(
    "--allow-nan",
    is_flag=True,
    help="Carry on where a source holds NaN or infinity: it counts as the base's there.",
)
device_option = click.option(
    "--device", default="cpu", help="Where models run and merge: cpu, cuda, cuda:1."
)
code_option = click.option(
    "--allow-code-execution",
    is_flag=True,
    help="Let benchmarks run code that a model wrote (mbpp, humaneval).",
)
overlap_option = click.option(
    "--allow-overlap",
    is_flag=True,
    help="Carry on where calibration draws items that are scored.",
)


memory_option = click.option(
    "--max-memory",
    callback=lambda _, option, text: text and parse_size(text, option.opts[0]),
    metavar="SIZE",
    help="Never load a model to measure it that takes more, such as 8GB: only block by block.",
)


def hardware_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that say which of the Hub's machines a Job gets."""
    for option in (
        click.option("--namespace", help="Who runs and pays the Job [the token's user]."),
        click.option(
            "--timeout", type=Duration(), help="Of the Job, such as 90m or 2h [the Hub's: 30m]."
        ),
        click.option("--flavor", help="Of the Job's machine: cpu-upgrade, a100-large, ..."),
    ):
        command = option(command)
    return command


sign_option = click.option(
    "--sign",
    "private_key",
    metavar="KEY.pem",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Sign the files with this elliptic curve key: writes model.sig.",
)


def output_option(told: str, default: str | None = None) -> Callable[[Any], Any]:
    """The folder to write; `told` is its help, the default it names is the command's to fill in."""
    kind = click.Path(file_okay=False, path_type=Path)
    return click.option("-o", "--output", type=kind, default=default, help=told)


def parse_size(text: str, option: str) -> int:
    """Bytes from a size such as 500MB or 5GB, in powers of 1000; `option` is named in messages."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMGT]?)B?", text.strip())
    if not match or float(match[1]) == 0:
        raise click.BadParameter(
            f"expected a size such as 500MB or 5GB, found {text!r}", param_hint=option
        )
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))
