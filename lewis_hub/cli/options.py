"""Options and arguments that several commands take."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

import click

import lewis_hub

if TYPE_CHECKING:
    from pydantic import BaseModel

    from lewis_hub.recipe.formats import ExportFormat
    from lewis_hub.workflow.publish import Destination


COUNT = click.IntRange(min=1)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
OUTPUT = click.Path(file_okay=False, path_type=Path)

flag = partial(click.option, is_flag=True)
repeated = partial(click.option, multiple=True)


T = TypeVar("T")


class Format(click.ParamType[T]):
    """A text that `parse` reads; `parse` returns None if the text has another format."""

    def __init__(self, name: str, expected: str, parse: Callable[[str], T | None]) -> None:
        self.name, self.expected, self.parse = name, expected, parse

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> T:
        """Refuse a text in another format."""
        parsed = self.parse(value)
        if parsed is None:
            self.fail(f"expected {self.expected}, found {value!r}", param, ctx)
        return parsed


class FiniteRange(click.FloatRange):
    """A number in a range: `nan` is in none, but no comparison refuses it."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Refuse a number that is not finite, as click refuses one out of the range."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"expected a finite number, found {value!r}", param, ctx)
        return number


def matching(pattern: str) -> Callable[[str], str | None]:
    """Return a parser that keeps a text as it is, if it matches the pattern."""
    return lambda text: text if re.fullmatch(pattern, text) else None


def _parse_repo(text: str) -> str | None:
    from lewis_hub.recipe import reference

    return text if reference.REPO.fullmatch(text) else None


def _parse_tag(text: str) -> str | None:
    from lewis_hub.recipe import reference

    return text if reference.TAG.fullmatch(text) else None


def _parse_size(text: str) -> int | None:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMGT]?)B?", text.strip())
    if not match or float(match[1]) == 0:
        return None
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))


REPO = Format("owner/name", "owner/name such as me/my-merge", _parse_repo)
TAG = Format("text", "the name of a tag, such as v1.0, by the rules of git", _parse_tag)
SIZE = Format("size", "a size such as 500MB or 5GB", _parse_size)  # in powers of 1000
DURATION = Format("duration", "a duration such as 90m or 2h", matching(r"\d+(\.\d+)?[smhd]"))


def _parse_pair(text: str) -> tuple[str, Any] | None:
    """Read NAME=VALUE; the value is a number, true, false or a text."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        return None
    try:
        read = json.loads(value)
    except ValueError:
        return name, value
    return name, read if isinstance(read, bool | int | float | str) else value


PAIR = Format("name=value", "NAME=VALUE such as temperature=0.6", _parse_pair)


def _parse_export(text: str) -> ExportFormat | None:
    from lewis_hub.recipe.formats import ALIASES, FORMATS

    name = ALIASES.get(text, text)
    return next((one for one in FORMATS if one == name), None)


EXPORT = Format("format", "gguf, gguf:f16, gguf:bf16 or gguf:q8_0", _parse_export)

M = TypeVar("M", bound="BaseModel")


def validated(kind: type[M], **given: Any) -> M:
    """Make a part of a recipe from options; a contradiction is a usage error."""
    from pydantic import ValidationError

    try:
        return kind.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        problem = first["msg"].removeprefix("Value error, ")
        place = ".".join(map(str, first["loc"]))
        raise click.UsageError(f"{place}: {problem}" if place else problem) from None


def line_breaks(text: str) -> str:
    r"""Replace each typed `\n` by a line break: shells pass the two characters on unchanged."""
    return text.replace(r"\n", "\n")


class RecipePath(click.Path):
    """The path of a recipe; a folder means the `recipe.yaml` in it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path of the file, which may not exist."""
        path = Path(str(super().convert(value, param, ctx)))
        return path / "recipe.yaml" if path.is_dir() else path


class ExecutionOptions(TypedDict, total=False):
    """The options that are fields of `Execution`."""

    runner: str
    ray_address: str | None
    device: str
    max_shard_bytes: int
    max_memory_bytes: int | None
    replace: bool
    allow_code: bool
    allow_nan: bool
    allow_pickle: bool


recipe = click.argument("recipe_file", metavar="[RECIPE]", default="recipe.yaml", type=RecipePath())
pickle = flag(
    "--allow-pickle",
    help="Also read models that only have pytorch_model.bin. Use it for authors you trust.",
)
nan = flag(
    "--allow-nan",
    help="Where an expert contains NaN or infinity, use the base's value instead of stopping.",
)
device = click.option(
    "--device",
    default="cpu",
    help="Device to run and merge models on: cpu, cuda, cuda:1 or mps.",
)
code = flag(
    "--allow-code-execution",
    "allow_code",
    help="Allow benchmarks that run code written by a model (mbpp, humaneval).",
)
overlap = flag(
    "--allow-overlap", help="Continue even if calibration texts contain items that are scored."
)
memory = click.option(
    "--max-memory",
    "max_memory_bytes",
    type=SIZE,
    help="Load models block by block if they need more memory than this (for example 8GB).",
)
runner = click.option(
    "--runner", default="threads", help="How to run it: inline, threads, threads:N or ray."
)
max_shard_size = click.option(
    "--max-shard-size",
    "max_shard_bytes",
    type=SIZE,
    default="5GB",
    help="Maximum size of an output file.",
)
repo = click.option(
    "--repo", type=REPO, help="Repo to publish to, instead of the recipe's `publish.repo`."
)
error = click.option(
    "--error",
    type=FiniteRange(0, 1, max_open=True),
    default=0.0,
    help="Use the lowest rank in each module whose relative error is at most this.",
)
sign = click.option(
    "--sign",
    "private_key",
    metavar="KEY.pem",
    type=FILE,
    help="Sign the files with this elliptic curve key; writes model.sig.",
)


def scoring(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say how lm-eval runs models; a command gets them as `running`."""

    @click.option(
        "--backend",
        type=click.Choice(["hf", "vllm", "local-completions", "mteb"]),
        help="lm-eval's backend: transformers, vLLM, or a server of completions; or mteb, for "
        "embedding models. [default: hf]",
    )
    @repeated(
        "--backend-arg",
        "backend_args",
        type=PAIR,
        help="Argument of the backend, by lm-eval's name; may be repeated. A server needs "
        "base_url=http://127.0.0.1:8000/v1/completions.",
    )
    @click.option(
        "--num-fewshot",
        type=click.IntRange(min=0),
        help="Examples in a prompt. [default: the task's number]",
    )
    @click.option(
        "--batch-size", type=COUNT, help="Requests at a time. [default: as memory allows]"
    )
    @repeated(
        "--generation",
        "generation",
        type=PAIR,
        help="Option for tasks that generate: temperature=0.6; may be repeated.",
    )
    @functools.wraps(command)
    def with_running(*args: Any, **given: Any) -> None:
        running = {name: given.pop(name) for name in ("backend", "num_fewshot", "batch_size")}
        running |= {name: dict(given.pop(name)) for name in ("backend_args", "generation")}
        typed = {name: value for name, value in running.items() if value not in (None, {})}
        command(*args, running=typed, **given)

    return with_running


def rescored(recipe: lewis_hub.Recipe, running: Mapping[str, Any]) -> lewis_hub.Recipe:
    """Apply the options of `scoring` to a recipe; they replace the settings of its `evaluate`.

    An argument or an option of generation replaces that of its name, and arguments of another
    backend.
    """
    if not running:
        return recipe
    if recipe.evaluate is None:
        named = ", ".join(running)
        raise click.UsageError(
            f"the recipe scores nothing: add `evaluate` to it, or remove {named}"
        )
    evaluation = recipe.evaluate.model_dump(by_alias=True, exclude_unset=True)
    stays = running.get("backend") in (None, recipe.evaluate.backend or "hf")
    for name in ("generation", "backend_args") if stays else ("generation",):
        if name in running:
            running = {**running, name: {**(evaluation.get(name) or {}), **running[name]}}
    changed = validated(type(recipe.evaluate), **{**evaluation, **running})
    return recipe.model_copy(update={"evaluate": changed})


def exported(recipe: lewis_hub.Recipe, exports: Sequence[str]) -> lewis_hub.Recipe:
    """Add the formats of --export to those of a recipe."""
    from lewis_hub.recipe.formats import FORMATS

    asked = {*exports, *(recipe.export or ())}
    formats = tuple(one for one in FORMATS if one in asked)
    return recipe.model_copy(update={"export": formats or None})


def execution(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of every command that runs models."""
    return device(code(pickle(command)))


def hardware(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that select the machine of a Job."""
    account = "Account that runs and pays for the Job. [default: your account]"
    limit = "Time limit of the Job, such as 90m or 2h. [default: 30m]"
    flavors = "Machine type of the Job: cpu-upgrade, a100-large, ..."
    for option in (
        click.option("--namespace", help=account),
        click.option("--timeout", type=DURATION, help=limit),
        click.option("--flavor", help=flavors),
    ):
        command = option(command)
    return command


def output(help_text: str, default: str | None = None) -> Callable[[Any], Any]:
    """Make the option -o for a folder; a command without `default` derives it itself."""
    return click.option("-o", "--output", type=OUTPUT, default=default, help=help_text)


def read_recipe(
    file: Path, repo: str | None = None, *, allow_overlap: bool = False
) -> lewis_hub.Recipe:
    """Read a recipe, and apply --repo and --allow-overlap to it."""
    from lewis_hub.workflow import resolve

    recipe = resolve.read_recipe(file)
    if repo:
        recipe = resolve.published_at(recipe, repo)
    return resolve.allowing_overlap(recipe) if allow_overlap else recipe


def open_target(recipe: lewis_hub.Recipe) -> Destination:
    """Open the repo that a recipe publishes to."""
    from lewis_hub.workflow.resolve import destination

    return lewis_hub.open_target(destination(recipe))
