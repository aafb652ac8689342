"""The README and the pages in docs/ agree with the program."""

import re
import runpy
import shlex
from pathlib import Path

import click
import pytest

import lewis_hub
from lewis_hub.cli.main import cli
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.methods.registry import methods
from lewis_hub.recipe.evaluation import Benchmark, Evaluation, Gate
from lewis_hub.recipe.read import parse_recipe, read_recipe
from lewis_hub.recipe.schema import Calibration, Guide, Publishing, Recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
PAGES = sorted((ROOT / "docs").rglob("*.md"))
DOCUMENTS = "\n".join([README, *(path.read_text() for path in PAGES)]).replace("\\\n", " ")
YAML = re.compile(r"```yaml[^\n]*\n(.+?)```", re.DOTALL)
WHOLE = re.compile(r"^(merge_method|experts):", re.MULTILINE)  # a recipe, and no part of one
COMMANDS = sorted(set(re.findall(r"^(lewis-hub .+?)(?:\s+#.*)?$", DOCUMENTS, re.MULTILINE)))


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_in_the_documents_parses(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for key in ("key.pem", "key.pub"):
        (tmp_path / key).touch()
    (tmp_path / "tasks").mkdir()
    name, *words = shlex.split(line)[1:]
    command = cli.commands[name]

    context = command.make_context(name, list(words), resilient_parsing=False)

    assert isinstance(context, click.Context)


def test_the_readme_has_at_most_900_words():
    assert len(README.split()) <= 900


def test_the_recipe_in_the_documents_is_the_one_of_the_demo():
    page = (ROOT / "docs" / "recipe.md").read_text()
    (text,) = re.findall(r"```yaml\n(.+?)```", page, re.DOTALL)

    shown, shipped = parse_recipe(text, "recipe.md"), read_recipe(zoo_folder() / "recipe.yaml")

    assert shown.model_dump(exclude={"models"}) == shipped.model_dump(exclude={"models"})
    assert [str(m.model) for m in shown.models] == [str(m.model) for m in shipped.models]


def test_every_recipe_in_the_documents_is_valid():
    texts = [(page, text) for page in PAGES for text in YAML.findall(page.read_text())]
    recipes = [(page, text) for page, text in texts if WHOLE.search(text)]

    assert len(recipes) >= 10
    for page, text in recipes:
        parse_recipe(text, page.name)


def test_the_make_targets_in_readme_and_contributing_exist():
    targets, more = (
        set(re.findall(r"^make ([\w-]+)", text, re.MULTILINE)) for text in (README, CONTRIBUTING)
    )

    assert targets == {"demo", "test"}
    assert more == {"quick", "test", "test-all", "test-hardening", "docs", "lock", "fix"}
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in targets | more)


def anchors(text):
    """The addresses of the headings of a document, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


def test_the_target_of_every_link_exists():
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES):
        for link, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", document.read_text()):
            target = document.parent / link if link else document
            assert target.exists(), f"{document.name}: {link}"
            if anchor:
                assert anchor in anchors(target.read_text()), f"{document.name}: {link}#{anchor}"


def test_every_path_in_the_file_map_exists():
    table = CONTRIBUTING.partition("## The packages")[2]
    for cell in re.findall(r"^\| (`.+?`) \|", table, re.MULTILINE):
        for path in re.findall(r"`([^`]+)`", cell):
            assert (ROOT / path).exists(), path


def test_the_file_map_names_every_package():
    packages = {path.parent.name for path in (ROOT / "lewis_hub").glob("*/__init__.py")}

    assert packages <= set(re.findall(r"^\| `lewis_hub/(\w+)/`", CONTRIBUTING, re.MULTILINE))


def test_every_file_that_contributing_names_for_a_change_exists():
    table = CONTRIBUTING.partition("## Where does my change belong")[2].partition("\n## ")[0]
    paths = re.findall(r"`((?:lewis_hub|templates|docs)/[\w./]+)`", table)

    assert len(paths) > 20
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize(
    "model", [Recipe, Guide, Calibration, Evaluation, Gate, Benchmark, Publishing]
)
def test_every_field_of_the_recipe_is_described(model):
    page = (ROOT / "docs" / "recipe.md").read_text()
    assert "<!-- reference: recipe -->" in page
    text = page + runpy.run_path(str(ROOT / ".ci" / "reference.py"))["TEXTS"]["recipe"]()

    for name, field in model.model_fields.items():
        assert re.search(rf"[`.]{field.alias or name}[`.[]", text), name


def test_the_numbers_of_methods_are_right():
    named = (ROOT / "docs" / "mergekit.md").read_text().partition("for `linear`")[2]
    shared = re.findall(r"`(\w+)`", "`linear`" + named.partition("`cabs`")[0])

    assert len(shared) == len({m.name for m in methods()} & set(shared)) == 20
    told = " ".join(README.split())
    assert f"with all of its {len(shared)} methods" in told
    assert f"`lewis-hub methods` lists all {len(list(methods()))} methods" in told


def test_the_program_in_the_documents_uses_public_names():
    page = (ROOT / "docs" / "python.md").read_text()
    (program,) = re.findall(r"```python\n(.+?)```", page, re.DOTALL)

    compile(program, "python.md", "exec")
    assert set(re.findall(r"lewis_hub\.(\w+)", program)) <= set(lewis_hub.__all__)
