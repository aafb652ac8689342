"""Every package that lewis_hub imports is in the dependencies of pyproject.toml."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]


def imported() -> set[str]:
    """Top-level names of all imports, also of those inside functions."""
    names = set()
    for file in (ROOT / "lewis_hub").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
    return names - sys.stdlib_module_names - {"lewis_hub"}


def normalized(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def test_every_imported_package_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    optional = [line for name, lines in extras.items() if name != "dev" for line in lines]
    declared = {
        normalized(re.split(r"[<>=\[;!~ ]", line)[0])
        for line in (*project["dependencies"], *optional)
    }
    owners = packages_distributions()

    undeclared = {
        name
        for name in imported()
        if not declared & {normalized(owner) for owner in owners.get(name, [name])}
    }

    assert undeclared == set()
