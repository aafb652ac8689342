import ast
import doctest
import inspect
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from zoo_hub import put_zoo

import lewis_hub
from lewis_hub.recipe.read import schema

SLOW = {"calibrate", "tune_recipe"}  # `merge_models` calibrates as well
PUBLIC = {name: getattr(lewis_hub, name) for name in lewis_hub.__all__}
EXAMPLES = {name: thing for name, thing in PUBLIC.items() if inspect.isfunction(thing)}
EXAMPLES["schema"] = schema


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in EXAMPLES]
)
def test_the_example_of_each_public_function_runs(name, hub, tmp_path, monkeypatch):
    put_zoo(hub)
    monkeypatch.setitem(os.environ, "HF_TOKEN", hub.write_token)
    names = {"lewis_hub": lewis_hub, "tmp_path": tmp_path, "user": hub.user}
    names |= {"schema": schema}
    (example,) = doctest.DocTestFinder(recurse=False).find(EXAMPLES[name], name, globs=names)

    result = doctest.DocTestRunner().run(example)

    assert result.attempted > 0
    assert result.failed == 0


def test_every_public_name_exists_and_has_a_docstring():
    for name, thing in PUBLIC.items():
        assert thing.__doc__, name


def test_the_public_names_the_lazy_table_and_the_type_checked_imports_agree():
    source = ast.parse(Path(lewis_hub.__file__).read_text())
    (typed,) = (node for node in source.body if isinstance(node, ast.If))
    imported = [(i.module, alias.name, alias.asname) for i in typed.body for alias in i.names]
    table = {f"lewis_hub.{module}": names for module, names in lewis_hub._HOME.items()}
    names = [name for names in table.values() for name in names]

    assert imported == [(module, name, name) for module in table for name in table[module]]
    assert lewis_hub.__all__ == sorted(names) == sorted(set(names))
    assert set(names) <= set(dir(lewis_hub))


def test_no_public_name_is_a_module_of_the_package():
    modules = {path.stem for path in Path(lewis_hub.__file__).parent.iterdir()}

    assert not modules & set(lewis_hub.__all__)


def test_the_package_is_imported_without_torch_and_transformers():
    code = "import sys, lewis_hub; print({'torch', 'transformers', 'pydantic'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "set()\n"


def test_a_recipe_made_in_python_obeys_the_rules_of_a_file():
    recipe = lewis_hub.Recipe(models=["zoo/base", "zoo/base"], merge_method="linear")

    with pytest.raises(lewis_hub.LewisHubError, match="`zoo/base` is listed twice"):
        lewis_hub.check(recipe)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'lewis_hub' has no attribute 'mrege'"):
        lewis_hub.mrege  # noqa: B018


def test_every_package_is_in_the_wheel():
    root = Path(lewis_hub.__file__).parent
    folders = {path.parent.relative_to(root.parent) for path in root.rglob("__init__.py")}
    project = tomllib.loads((root.parent / "pyproject.toml").read_text())

    packages = set(project["tool"]["setuptools"]["packages"]) - {"lewis_hub.templates"}
    assert packages == {".".join(folder.parts) for folder in folders}
