from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lewis_hub
from lewis_hub.errors import GuideError
from lewis_hub.guides import registry
from lewis_hub.guides.registry import Measurements, broken, find, guides, register

PLUGIN = """
from lewis_hub.guides.registry import register

@register("thirds")
def thirds(statistics, gamma, epsilon):
    \"\"\"A third of the way up.\"\"\"
    return dict.fromkeys(statistics.matrices, gamma + (epsilon - gamma) / 3)
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of installed packages, and a registry that is put back afterwards."""
    monkeypatch.setattr(registry._registry, "_entries", dict(registry._registry._entries))
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("thirds_plugin", None)


def install(site: Path, entry_point: str, code: str) -> None:
    (site / "thirds_plugin.py").write_text(code)
    info = site / "thirds-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: thirds\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[lewis_hub.guides]\n{entry_point}\n")


def test_the_built_in_guides_are_listed_with_what_they_do():
    listed = {guide.name: guide for guide in guides()}

    assert listed["uniform"].summary == (
        "Every matrix of a block gets the midpoint of gamma and epsilon; nothing is measured."
    )
    assert listed["uniform"].needs == ()
    assert listed["lewis"].summary == (
        "Densities follow the change of importance from base to expert on calibration data."
    )
    assert listed["lewis"].paper == "https://arxiv.org/abs/2503.03874"


def test_an_installed_package_adds_a_guide(site):
    install(site, "thirds = thirds_plugin:thirds", PLUGIN)

    guide = find("thirds")

    assert guide.decide(Measurements(("l.0.q",), {}, {}), 0.3, 0.6) == {"l.0.q": pytest.approx(0.4)}
    assert "thirds" in [one.name for one in guides()]


def test_a_name_is_taken_once(site):
    with pytest.raises(GuideError) as caught:
        register("uniform")(lambda statistics, gamma, epsilon: {})

    assert str(caught.value) == (
        "guide `uniform`: the name is already taken by lewis_hub.guides.baselines.uniform.\n"
        "Register it under another name."
    )


def test_an_unknown_guide_names_the_nearest(site):
    install(site, "thirds = thirds_plugin:thirds", PLUGIN)

    with pytest.raises(GuideError) as caught:
        find("unifrom")

    known = sorted(guide.name for guide in guides())
    assert {"lewis", "thirds", "uniform"} < set(known)
    assert str(caught.value) == (
        "guide `unifrom`: it is not known in this version.\n"
        f"Guides: {', '.join(known)}. Did you mean `uniform`?"
    )


@pytest.mark.parametrize(
    ("entry_point", "problem"),
    [
        ("thirds = thirds_plugin:fourths", "module 'thirds_plugin' has no attribute 'fourths'"),
        ("thirds = missing_plugin", "No module named 'missing_plugin'"),
    ],
)
def test_a_package_that_does_not_load_is_named(site, entry_point, problem):
    install(site, entry_point, PLUGIN)

    with pytest.raises(GuideError) as caught:
        find("thirds")

    assert str(caught.value) == (
        f"guide `thirds`: thirds provides it but does not load: {problem}.\n"
        "Repair or remove the package: pip uninstall thirds."
    )


def test_a_package_that_registers_another_name_is_told(site):
    install(site, "quarters = thirds_plugin", PLUGIN)

    with pytest.raises(GuideError) as caught:
        find("quarters")

    assert str(caught.value) == (
        "guide `quarters`: thirds provides it but thirds_plugin does not register it.\n"
        "Repair or remove the package: pip uninstall thirds."
    )


def test_a_package_that_raises_anything_is_named_and_the_others_are_listed(site):
    install(site, "thirds = thirds_plugin", "1 / 0\n")

    assert "uniform" in [guide.name for guide in guides()]
    (error,) = broken()

    assert str(error) == (
        "guide `thirds`: thirds provides it but does not load: ZeroDivisionError: "
        "division by zero.\n"
        "Repair or remove the package: pip uninstall thirds."
    )


def test_a_guide_that_needs_what_nothing_measures_is_refused(site):
    with pytest.raises(GuideError) as caught:
        register("bad", needs=("task_vectors",))

    assert str(caught.value) == (
        "guide `bad`: it needs `task_vectors`, which nothing measures.\n"
        "Measures: lewis, lewis_reference, outliers, evenness, output_shift, task_vector. "
        "Did you mean `task_vector`?"
    )


def test_a_package_whose_guide_needs_what_nothing_measures_is_named(site):
    install(
        site, "thirds = thirds_plugin", PLUGIN.replace('"thirds"', '"thirds", needs=("bogus",)')
    )

    with pytest.raises(GuideError) as caught:
        find("thirds")

    assert str(caught.value) == (
        "guide `thirds`: thirds provides it but does not load: guide `thirds`: it needs `bogus`, "
        "which nothing measures.\nRepair or remove the package: pip uninstall thirds."
    )


def test_a_file_in_the_package_that_registers_a_guide_is_found(tmp_path):
    package = tmp_path / "lewis_hub"
    shutil.copytree(Path(lewis_hub.__file__).parent, package)
    (package / "guides" / "thirds.py").write_text(PLUGIN)
    code = "from lewis_hub.guides.registry import find; print(find('thirds').summary)"

    found = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"],
        capture_output=True,
        text=True,
        check=True,
    )

    assert found.stdout == "A third of the way up.\n"


def test_errors_survive_pickling():
    error = GuideError("guide `x`", "there is none", "Guides: lewis.")

    again = pickle.loads(pickle.dumps(error))

    assert type(again) is GuideError
    assert str(again) == str(error)
