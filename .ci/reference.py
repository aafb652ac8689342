"""The reference of the documentation, made from the code: the recipe, commands, methods, guides.

`pages.py` puts each text into the page that has its marker.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from lewis_hub.methods.registry import Method

Schema = Mapping[str, Any]
SIMPLE = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "true or false",
    "null": "none",
}
SETTINGS = "settings"  # `weight`, `density`, ...: see the section of this name
NAMED_BY_TEXT = {"ModelReference": "model"}  # what a recipe writes as a text


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    names = list(header)
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def recipe() -> str:
    """A section for each mapping that a recipe may contain, in the order of their first use."""
    from lewis_hub.recipe.mixture import Mixture
    from lewis_hub.recipe.schema import Recipe

    schema = Recipe.model_json_schema()
    inherited = Mixture.model_json_schema()["properties"]  # of a mixture of experts: the last
    schema["properties"] = {
        name: schema["properties"][name]
        for name in sorted(schema["properties"], key=lambda name: name in inherited)
    }
    return "\n\n".join(_mapping(name, node) for name, node in _mappings(schema))


def _mappings(schema: Schema) -> Iterator[tuple[str, Schema]]:
    """The recipe and the types that it refers to, each once."""
    waiting, seen = [("Recipe", schema)], {"Recipe", *NAMED_BY_TEXT}
    while waiting:
        name, node = waiting.pop(0)
        yield name, _object(node)
        for other in _references(_object(node)["properties"]):
            if other not in seen:
                seen.add(other)
                waiting.append((other, schema["$defs"][other]))


def _object(node: Schema) -> Schema:
    """The mapping of a type that may also be written as a name."""
    return next((one for one in node.get("anyOf", ()) if "properties" in one), node)


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        if "$ref" in node:
            yield node["$ref"].rpartition("/")[2]
        for value in node.values():
            yield from _references(value)
    elif isinstance(node, list):
        for value in node:
            yield from _references(value)


def _mapping(name: str, node: Schema) -> str:
    required = node.get("required", ())
    rows = (
        (
            f"`{field}`",
            _kind(one) + (", required" if field in required else _default(one)),
            one.get("description", ""),
        )
        for field, one in node["properties"].items()
    )
    about = node["description"].replace("\n", " ")
    return f"### {name}\n\n{about}\n\n{table(('field', 'value', 'meaning'), rows)}"


def _default(node: Schema) -> str:
    value = node.get("default")
    if value is None or value == []:
        return ""
    words = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"; default: `{words.lower() if isinstance(value, bool) else words}`"


def _kind(node: Schema) -> str:
    """The values that a field takes, in words."""
    if "$ref" in node:
        name = node["$ref"].rpartition("/")[2]
        return NAMED_BY_TEXT.get(name) or f"[{name}](#{name.lower()})"
    if options := node.get("anyOf") or node.get("oneOf"):
        kinds = [_kind(one) for one in options if one.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if words := node.get("enum") or ("const" in node and [node["const"]]):
        return " or ".join(f"`{word}`" for word in words)
    if node.get("type") == "array":
        return _list(node)
    if node.get("type") == "object":
        inner = node.get("additionalProperties", True)
        settings = "/Conditional" in str(inner)
        return f"[{SETTINGS}](#{SETTINGS})" if settings else f"name: {_kind(inner)}"
    return SIMPLE[node["type"]] + _range(node)


def _list(node: Schema) -> str:
    if parts := node.get("prefixItems"):
        return f"[{', '.join(_kind(part) for part in parts)}]"
    return f"list of {_kind(node['items'])}"


def _range(node: Schema) -> str:
    low, above = node.get("minimum"), node.get("exclusiveMinimum")
    high, below = node.get("maximum"), node.get("exclusiveMaximum")
    lowest = (
        f"at least {low:g}" if low is not None else f"above {above:g}" if above is not None else ""
    )
    highest = f"at most {high:,g}" if high is not None else f"below {below:g}" if below else ""
    limits = " and ".join(filter(None, (lowest, highest)))
    return f", {limits}" if limits else ""


def commands() -> str:
    """A section for each command: its use, its text, its options and its examples."""
    from lewis_hub.cli.main import cli

    return "\n\n".join(_command(path, one) for path, one in _leaves(cli, "lewis-hub"))


def _leaves(group: click.Group, path: str) -> Iterator[tuple[str, click.Command]]:
    for name, one in sorted(group.commands.items()):
        if isinstance(one, click.Group):
            yield from _leaves(one, f"{path} {name}")
        else:
            yield f"{path} {name}", one


def _command(path: str, command: click.Command) -> str:
    context = click.Context(command, info_name=path, show_default=True)
    usage = " ".join(command.collect_usage_pieces(context))
    parts = [
        f"### {path.removeprefix('lewis-hub ')}",
        f"```text\n{path} {usage}\n```",
        inspect.cleandoc(command.help or ""),
    ]
    sections: Mapping[str, Iterable[str]] = getattr(command, "sections", {})
    options = {one.name: one for one in command.params if isinstance(one, click.Option)}
    records = {name: one.get_help_record(context) for name, one in options.items()}
    listed = {name for names in sections.values() for name in names}
    rest = [name for name in records if name not in listed]
    rows = [
        (f"`{record[0]}`", record[1], title)
        for title, names in {**sections, "": rest}.items()
        for name in names
        if (record := records[name])
    ]
    if rows and sections:
        parts.append(table(("option", "meaning", "group"), rows))
    elif rows:
        parts.append(table(("option", "meaning"), (row[:2] for row in rows)))
    if command.epilog:
        _, _, examples = inspect.cleandoc(command.epilog).partition("\n")
        lines = inspect.cleandoc(examples.partition("\n")[2])
        parts.append(f"```text\n{lines}\n```")
    return "\n\n".join(part for part in parts if part)


def methods() -> str:
    """A section for each method: its formula, its paper, its options with default and meaning."""
    from lewis_hub.merge.settings import parameters_of
    from lewis_hub.methods.registry import methods as all_methods

    def section(method: "Method") -> str:
        rows = [
            (
                f"`{one.name}`",
                "required" if one.default is None else f"`{str(one.default).lower()}`",
                one.values,
                one.description,
            )
            for one in parameters_of(method)
        ]
        header = ("option", "default", "values", "meaning")
        parts = [
            f"### {method.name}",
            method.summary,
            _sources(method),
            f"```text\n{method.formula}\n```" if method.formula else "",
            table(header, rows) if rows else "It has no options.",
            f"Paper: <{method.paper}>" if method.paper else "",
        ]
        return "\n\n".join(part for part in parts if part)

    return "\n\n".join(map(section, all_methods()))


def _sources(method: "Method") -> str:
    """What a method merges, in a sentence."""
    low, high = method.n_experts
    number = f"{low}" if low == high else f"{low} to {high}" if high else f"{low} or more"
    ending = "" if high == 1 else "s"
    if not method.takes_base:
        return f"Merges {number} model{ending}, without a base."
    into = ", or into a base" if method.base_is_optional else " into a base"
    what = "model" if method.base_is_optional else "expert"
    return f"Merges {number} {what}{ending}{into}."


def guides() -> str:
    """A section for each guide: what it measures, and its paper."""
    from lewis_hub.guides.registry import RegisteredGuide
    from lewis_hub.guides.registry import guides as all_guides

    def section(guide: RegisteredGuide) -> str:
        about = inspect.getdoc(guide.decide) or ""
        body, _, source = about.partition("\nSource:\n")
        needs = (
            "calibration texts" if guide.needs_texts else "weights" if guide.needs else "nothing"
        )
        parts = [
            f"### {guide.name}",
            body.strip(),
            " ".join(source.split()),
            f"Measured from: {needs}.",
            f"Paper: <{guide.paper}>" if guide.paper else "",
        ]
        return "\n\n".join(part for part in parts if part)

    return "\n\n".join(map(section, all_guides()))


def python() -> str:
    """A section for each public name; mkdocstrings fills it in."""
    import lewis_hub
    from lewis_hub.recipe.schema import Part

    def section(name: str) -> str:
        public = getattr(lewis_hub, name)
        in_recipe = isinstance(public, type) and issubclass(public, Part)
        fields = f"\n\n[Its fields](recipe.md#{name.lower()})"
        told = in_recipe and name not in NAMED_BY_TEXT
        return f"::: lewis_hub.{name}" + (fields if told else "")

    return "\n\n".join(map(section, lewis_hub.__all__))


TEXTS = {
    "recipe": recipe,
    "commands": commands,
    "methods": methods,
    "guides": guides,
    "python": python,
}
