"""A recipe from YAML: everything that can be known without a network is refused here.

Every complaint names the file, the line, the field, what was expected and what to do.
"""

from __future__ import annotations

import difflib
import json
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from lewis_hub.errors import RecipeError
from lewis_hub.recipe import Recipe

SETTING = "a number, a list of numbers (a gradient over blocks) or a list of {filter, value}"

# What mergekit or a later version knows and this one does not: refused by name, never ignored.
NOT_YET = {
    "slices": "Layer stacking is not in this version: list whole models under `models`.",
    "modules": "Per-module merges are not in this version: list whole models under `models`.",
    "tokenizer": "Rebuilding a tokenizer is not in this version: the base's is carried over.",
    "chat_template": "Choosing a chat template is not in this version: the base's is carried over.",
    "adapter": "LoRA adapters as sources are not in this version: fold the adapter first.",
    "task": "Calibrating on an lm-eval task is not in this version: name its dataset and `text`.",
    "gate": "The quality gate is not in this version: read the scores before you publish.",
    "trim": "Choosing how to trim is not in this version: magnitude is used.",
    "mean_density": "Budgeted schedules are not in this version: set gamma and epsilon.",
    "apply_to": "LEWIS weights are not in this version: the schedule sets densities.",
}
GUIDES_NOT_YET = ("lewis_reference", "magnitude", "activation_shift", "aim", "owl")

Path_ = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """Safe, and refuses a key that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002 (PyYAML's signature)
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"`{key}` is given twice", key_node.start_mark
                )
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


def read_recipe(path: Path | str) -> Recipe:
    """Read and validate a recipe file.

    Args:
        path: a YAML file; relative paths inside it are looked up beside it, then in the
            working folder.

    Raises:
        RecipeError: the file is missing, is not YAML, or asks for something that cannot be done.

    Example:
        >>> import lewis_hub
        >>> recipe = lewis_hub.read_recipe(lewis_hub.zoo_folder() / "recipe.yaml")
        >>> recipe.merge_method
        'ties'
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(
            str(path),
            "",
            "there is no such file.",
            "Name a recipe, or write one with `lewis-hub init`.",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            str(path), "", f"it cannot be read: {error}", "A recipe is a YAML file in UTF-8."
        ) from None
    return parse_recipe(text, str(path)).placed_in(path.parent)


def parse_recipe(text: str, file: str) -> Recipe:
    """Validate a recipe's text; `file` is what messages call it.

    Raises:
        RecipeError: as for `read_recipe`.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        document = loader.construct_document(node) if node is not None else None
    except yaml.YAMLError as error:
        raise _not_yaml(error, file) from None
    finally:
        loader.dispose()
    if not isinstance(document, dict):
        raise RecipeError(
            file,
            "",
            f"expected a mapping with `models` and `merge_method`, found {_kind(document)}.",
            "`lewis-hub init` writes a recipe to start from.",
        )
    complaints = _complaints(document)
    if complaints:
        (where, problem, remedy), *others = complaints
        raise RecipeError(
            f"{file}:{_line(node, where)}",
            _dotted(where),
            problem,
            remedy,
            tuple(f"{file}:{_line(node, w)}: `{_dotted(w)}`: {p}" for w, p, _ in others),
        )
    return Recipe.model_validate(document)


def schema() -> str:
    """The recipe's JSON Schema, for editors.

    Example:
        >>> import json
        >>> json.loads(schema())["title"]
        'Recipe'
    """
    return json.dumps(Recipe.model_json_schema(), indent=2) + "\n"


def _not_yaml(error: yaml.YAMLError, file: str) -> RecipeError:
    mark = getattr(error, "problem_mark", None)
    where = f"{file}:{mark.line + 1}" if mark else file
    problem = getattr(error, "problem", None) or str(error)
    return RecipeError(where, "", f"not valid YAML: {problem}.", "Mend the line, then run again.")


Complaint = tuple[Path_, str, str]


def _complaints(document: Mapping[str, Any]) -> list[Complaint]:
    try:
        recipe = Recipe.model_validate(document)
    except ValidationError as error:
        by_place: dict[Path_, list[ErrorDetails]] = {}
        for detail in error.errors(include_url=False):
            by_place.setdefault(_in_document(detail["loc"], document), []).append(detail)
        return [_complaint(where, details) for where, details in by_place.items()]
    return list(_contradictions(recipe))


def _complaint(where: Path_, details: Sequence[ErrorDetails]) -> Complaint:
    kinds = {detail["type"] for detail in details}
    key = where[-1] if where else ""
    found = details[0]["input"]
    if kinds == {"extra_forbidden"}:
        if key in NOT_YET:
            return where, f"`{key}` is not understood by this version.", NOT_YET[str(key)]
        return where, f"unknown key `{key}`.", _nearest(str(key), _known_keys(where[:-1]))
    if kinds == {"missing"}:
        return where, f"`{key}` is missing.", f"Add `{key}:`; `lewis-hub schema` describes it."
    if "parameters" in where:
        return where, f"found {_kind(found)}.", f"Expected {SETTING}."
    if where == ("guide", "name") and found in GUIDES_NOT_YET:
        return where, f"the guide `{found}` is not in this version.", "Use `lewis` or `uniform`."
    problem = details[0]["msg"].removeprefix("Value error, ")
    return where, f"{problem} (found {_kind(found)}).", "`lewis-hub schema` describes every field."


def _contradictions(recipe: Recipe) -> typing.Iterator[Complaint]:
    """What each field allows and the whole does not."""
    if recipe.evaluate and recipe.evaluate.gate:
        yield ("evaluate", "gate"), "`gate` is not understood by this version.", NOT_YET["gate"]
    base = recipe.base_model
    if recipe.tokenizer_source not in {"base", *([base.name, str(base)] if base else [])}:
        problem = f"only the base's tokenizer is carried over, found `{recipe.tokenizer_source}`."
        yield ("tokenizer_source",), problem, "Write `tokenizer_source: base`, or leave it out."
    if not recipe.experts:
        yield ("models",), "only the base is listed.", "Add at least one expert."
    names = [str(entry.model) for entry in recipe.experts]
    for twice in sorted({name for name in names if names.count(name) > 1}):
        yield ("models",), f"`{twice}` is listed twice.", "List each expert once, with its weight."
    if recipe.guide:
        yield from _guide_contradictions(recipe)
    yield from _bad_numbers(recipe)


def _guide_contradictions(recipe: Recipe) -> typing.Iterator[Complaint]:
    assert recipe.guide
    if recipe.base_model is None:
        yield ("guide",), "a guide needs a `base_model` to compare with.", "Name the base model."
    needs_texts = recipe.guide.name != "uniform"
    for index, entry in enumerate(recipe.models):
        if entry.model == recipe.base_model:
            continue
        if needs_texts and recipe.calibration_of(entry) is None:
            problem = f"no calibration data for `{entry.model}`."
            yield ("guide",), problem, "Add `guide.calibration`, or `calibration` to this model."
        if "density" in entry.parameters:
            place = ("models", index, "parameters", "density")
            yield place, "both a guide and a density are given.", "Remove one of the two."
    if "density" in recipe.parameters:
        place_all = ("parameters", "density")
        yield place_all, "both a guide and a density are given.", "Remove one of the two."


def _bad_numbers(recipe: Recipe) -> typing.Iterator[Complaint]:
    places: list[tuple[Path_, Mapping[str, Any]]] = [(("parameters",), recipe.parameters)]
    places += [
        (("models", index, "parameters"), entry.parameters)
        for index, entry in enumerate(recipe.models)
    ]
    for where, settings in places:
        for name in ("weight", "density"):
            for value in _values(settings.get(name, ())):
                if isinstance(value, bool | str):
                    yield (*where, name), f"expected numbers, found {value!r}.", f"Give {SETTING}."
                elif name == "density" and not 0 <= value <= 1:
                    problem = f"a density lies between 0 and 1, found {value:g}."
                    yield (*where, name), problem, "It is the fraction of entries kept."


def _values(setting: Any) -> list[Any]:
    if isinstance(setting, tuple):
        return [value for item in setting for value in _values(getattr(item, "value", item))]
    return [setting]


def _in_document(loc: tuple[str | int, ...], document: Any) -> Path_:
    """Drop what pydantic adds to a path (the branches of unions) and keep the user's keys."""
    where: list[str | int] = []
    for index, step in enumerate(loc):
        inside = isinstance(document, dict) and step in document
        if inside or (isinstance(document, list) and isinstance(step, int)):
            document = document[step]  # type: ignore[index]
            where.append(step)
        elif index == len(loc) - 1 and isinstance(document, dict):
            where.append(step)  # a missing key
    return tuple(where)


def _known_keys(where: Path_) -> list[str]:
    model: type[BaseModel] | None = Recipe
    for step in where:
        if isinstance(step, str) and model:
            names = {field.alias or name: field for name, field in model.model_fields.items()}
            model = _model_in(names[step].annotation) if step in names else None
    if model is None:
        return []
    return [field.alias or name for name, field in model.model_fields.items()]


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, typing.get_args(annotation))), None)


def _nearest(key: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if close:
        return f"Did you mean `{close[0]}`?"
    return f"Known here: {', '.join(known)}." if known else "Remove it."


def _line(node: yaml.Node | None, where: Path_) -> int:
    line = node.start_mark.line if node else 0
    for step in where:
        if isinstance(node, yaml.MappingNode):
            found = [(k, v) for k, v in node.value if getattr(k, "value", None) == str(step)]
            if not found:
                break
            line, node = found[0][0].start_mark.line, found[0][1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int):
            node = node.value[step]
            line = node.start_mark.line
    return line + 1


def _dotted(where: Path_) -> str:
    text = ""
    for step in where:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return repr(value)
