from __future__ import annotations

from lewis_hub.report.profiles import short_name, unique_slugs


def test_slugs_are_safe_and_unique():
    sources = ("a/Math_7B@" + "0" * 40, "b/math-7b", "/", "c/math.7b", "x/" + "y" * 200)

    slugs = unique_slugs(sources)

    assert slugs == ("math-7b", "math-7b-2", "expert", "math-7b-3", "y" * 60)


def test_readers_see_a_repo_without_its_commit_and_a_folder_without_its_path():
    assert short_name("a/b@" + "0" * 40) == "a/b"
    assert short_name("a/b@main") == "a/b@main"
    assert short_name("/home/somebody/models/x@y") == "x@y"
    assert short_name("./math/") == "math"
