"""The documentation: its reference is made from the code, and every link of the site leads on."""

import re
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

import lewis_hub
from lewis_hub.cli.main import cli
from lewis_hub.guides.registry import guides
from lewis_hub.merge.settings import parameters_of
from lewis_hub.methods.registry import methods

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def reference():
    return runpy.run_path(str(ROOT / ".ci" / "reference.py"))["TEXTS"]


def section(text, name):
    """The text under a heading of the third level."""
    found = re.search(rf"^### {re.escape(name)}\n(.+?)(?=^### |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, name
    return found[1]


def test_the_reference_of_the_recipe_has_kinds_ranges_and_defaults(reference):
    text = reference["recipe"]()

    gate = section(text, "Gate")
    assert "| `tolerance` | number, at least 0; default: `0.0` | How much worse the merge" in gate
    rivals = "`base` or `experts` or `uniform` or `previous`"
    assert f"| `not_worse_than` | list of {rivals}; default: `uniform` |" in gate
    guide = section(text, "Guide")
    assert "| `gamma` | number, above 0 and at most 1; default: `0.3` | Lowest density" in guide
    assert "| `calibration` | [Calibration](#calibration) | Calibration texts" in guide
    assert "| `layer_range` | [whole number, whole number], required |" in section(
        text, "SliceSource"
    )
    assert "| `parameters` | [settings](#settings) |" in section(text, "Recipe")


def test_the_reference_has_every_command_with_every_option(reference):
    text = reference["commands"]()

    for name, command in cli.commands.items():
        for leaf, one in getattr(command, "commands", {"": command}).items():
            told = section(text, f"{name} {leaf}".strip())
            options = {word for option in one.params for word in option.opts if "--" in word}
            assert {word for word in options if f"{word}" not in told} == set(), name
    assert "| `--push` | Publish the result in one commit." in section(text, "merge")
    assert "  lewis-hub" not in section(text, "verify")


def test_the_reference_has_every_method_and_guide(reference):
    of_methods, of_guides = reference["methods"](), reference["guides"]()

    for method in methods():
        told = section(of_methods, method.name)
        assert method.summary in told
        assert method.paper is None or f"<{method.paper}>" in told
        assert all(f"| `{one.name}` |" in told for one in parameters_of(method))
    assert "u_i = w_i trim(v_i)" in section(of_methods, "ties")
    for guide in guides():
        assert guide.summary in " ".join(section(of_guides, guide.name).split())
    assert "Measured from: weights." in section(of_guides, "magnitude")


def test_the_reference_has_every_public_name(reference):
    assert re.findall(r"::: lewis_hub\.(\w+)", reference["python"]()) == lewis_hub.__all__


def test_every_page_is_in_the_navigation_once():
    class Loader(yaml.SafeLoader):
        """Reads the names of Python functions in mkdocs.yml as texts."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: "")
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")

    def pages(node):
        if isinstance(node, str):
            return [node]
        values = node.values() if isinstance(node, dict) else node
        return [page for value in values for page in pages(value)]

    listed = pages(yaml.load(text, Loader)["nav"])
    written = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert sorted(listed) == sorted({*written, "results.md", "contributing.md"})


class Addresses(HTMLParser):
    """What a page refers to, what it loads, and the places in it."""

    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.places = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.places |= {given[key] for key in ("id", "name") if given.get(key)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        elif tag in ("link", "script", "img", "iframe"):
            self.loads += [given[key] for key in ("href", "src") if given.get(key)]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site: the parsed pages by their paths."""
    pytest.importorskip("material")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return {path: Addresses(path.read_text("utf-8")) for path in folder.rglob("*.html")}


def target(page, address):
    """The file and the place that an address in a page means; None for another site."""
    parts = urlsplit(address)
    if parts.scheme or parts.netloc:
        return None
    return (page.parent / unquote(parts.path)).resolve() if parts.path else page, parts.fragment


@pytest.mark.slow
def test_every_link_of_the_site_leads_to_a_page_and_a_place_in_it(site):
    lost = []
    for page, addresses in site.items():
        if page.name == "404.html":  # its links start at the site's root
            continue
        for address in addresses.links:
            if (found := target(page, address)) is None:
                continue
            file, place = found
            file = file / "index.html" if file.is_dir() else file
            known = site[file].places if file in site else None
            if not file.is_file() or (place and known is not None and unquote(place) not in known):
                lost.append((page.name, address))

    assert len(site) >= 30
    assert lost == []


@pytest.mark.slow
def test_no_page_of_the_site_loads_anything_from_another_host(site):
    elsewhere = {
        address
        for page, addresses in site.items()
        for address in addresses.loads
        if page.name != "404.html" and target(page, address) is None
    }

    assert elsewhere == set()


@pytest.mark.slow
def test_the_site_has_the_docstrings_of_python_and_the_fields_of_the_recipe(site):
    pages = {path.name: path for path in site}
    python = pages["python.html"].read_text("utf-8")

    assert {f"lewis_hub.{name}" for name in lewis_hub.__all__} <= site[pages["python.html"]].places
    assert "whether sources may have only pickled weights" in python
    recipe = site[pages["recipe.html"]].places
    assert {"fields", "recipe", "gate", "calibration", "settings"} <= recipe
    assert "<!-- reference" not in "".join(path.read_text("utf-8") for path in site)
