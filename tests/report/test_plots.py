from __future__ import annotations

from lewis_hub.report.plots import draw_comparisons
from lewis_hub.report.profiles import ModuleChange, ProfileComparison, short_name, unique_slugs


def test_slugs_are_safe_and_unique():
    sources = ("a/Math_7B@" + "0" * 40, "b/math-7b", "/", "c/math.7b", "x/" + "y" * 200)

    slugs = unique_slugs(sources)

    assert slugs == ("math-7b", "math-7b-2", "expert", "math-7b-3", "y" * 60)


def test_readers_see_a_repo_without_its_commit_and_a_folder_without_its_path():
    assert short_name("a/b@" + "0" * 40) == "a/b"
    assert short_name("a/b@main") == "a/b@main"
    assert short_name("/home/somebody/models/x@y") == "x@y"
    assert short_name("./math/") == "math"
    assert short_name("~/models/math") == "math"
    assert short_name("./a/../b") == "b"


def test_a_source_of_a_stranger_may_have_any_characters():
    assert short_name("~a\0b") == "~a\0b"
    assert short_name("/x/a\0b") == "a\0b"


def test_the_working_folder_has_a_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    assert short_name(".") == tmp_path.name


def test_a_map_of_many_components_is_no_taller_than_a_few_screens(tmp_path):
    modules = tuple(
        ModuleChange(f"model.layers.{block}.part_{part}.weight", 1.0, 2.0, 1.0)
        for part in range(500)
        for block in range(2)
    )
    compared = ProfileComparison("a/b", "a/b", "lewis", "", "", modules, None, (), ())

    names = draw_comparisons([compared], tmp_path)

    heights = {int.from_bytes((tmp_path / name).read_bytes()[20:24]) for name in names}
    assert heights == {5908}  # of 21,748 for a row of 0.3 inches each
