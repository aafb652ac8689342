import doctest
import os
import tomllib
from pathlib import Path

import pytest

import lewis_hub
from lewis_hub import pipeline
from lewis_hub.demo.zoo import seed_hub
from lewis_hub.recipe.read import schema
from lewis_hub.workflow.read import read_recipe

SLOW = {"calibrate"}  # `merge_models` calibrates as well
EXAMPLES = {
    function.__name__: function
    for function in (
        read_recipe,
        schema,
        pipeline.check,
        pipeline.calibrate,
        pipeline.merge_models,
        pipeline.stream,
        pipeline.evaluate_model,
        pipeline.publish,
        pipeline.verify,
    )
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in EXAMPLES]
)
def test_the_example_of_each_public_function_runs(name, hub, tmp_path, monkeypatch):
    seed_hub(hub.api())
    monkeypatch.setitem(os.environ, "HF_TOKEN", hub.write_token)
    names = {"lewis_hub": lewis_hub, "tmp_path": tmp_path, "user": hub.user}
    names |= {"schema": schema}
    (example,) = doctest.DocTestFinder(recurse=False).find(EXAMPLES[name], name, globs=names)

    result = doctest.DocTestRunner().run(example)

    assert result.attempted > 0
    assert result.failed == 0


def test_every_public_name_exists_and_has_a_docstring():
    for name in lewis_hub.__all__:
        assert getattr(lewis_hub, name).__doc__, name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'lewis_hub' has no attribute 'mrege'"):
        lewis_hub.mrege  # noqa: B018


def test_every_package_is_in_the_wheel():
    root = Path(lewis_hub.__file__).parent
    folders = {path.parent.relative_to(root.parent) for path in root.rglob("__init__.py")}
    project = tomllib.loads((root.parent / "pyproject.toml").read_text())

    packages = set(project["tool"]["setuptools"]["packages"]) - {"lewis_hub.templates"}
    assert packages == {".".join(folder.parts) for folder in folders}
