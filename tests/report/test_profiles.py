from __future__ import annotations

import subprocess
import sys
import time

import pytest
import scipy.stats
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from lewis_hub.calibration.profile import ImportanceProfile, SourceImportance
from lewis_hub.cli.main import cli
from lewis_hub.errors import ProfileError
from lewis_hub.report import plots
from lewis_hub.report.plots import draw_comparisons
from lewis_hub.report.profiles import ModuleChange, compare_profiles, spearman, unique_slugs

SHA = "a" * 40


def measured(source, modules, role="expert", **calibration):
    return SourceImportance(source, "1", role, 7, calibration, modules)


def profile(*sources):
    return ImportanceProfile("lewis", {}, sources)


def test_modules_are_listed_by_how_much_they_changed():
    before = measured(f"me/one@{SHA}", {"l.0.q": 2.0, "l.0.k": 4.0, "l.1.q": 1.0, "gone": 1.0})
    after = measured("other/two", {"l.0.q": 3.0, "l.0.k": 4.0, "l.1.q": 0.25, "new": 5.0})

    (one,) = compare_profiles(profile(before), profile(after))

    assert one.by_change == (
        ModuleChange("l.1.q", 1.0, 0.25, -0.75),
        ModuleChange("l.0.q", 2.0, 3.0, 0.5),
        ModuleChange("l.0.k", 4.0, 4.0, 0.0),
    )
    assert one.spearman == 1.0  # 1 < 2 < 4 and .25 < 3 < 4
    assert one.sentences == (
        f"A: me/one@{SHA}, B: other/two, 3 modules in both, Spearman's rank correlation 1.0000 "
        "(n = 3)",
        "1 modules only in A, such as gone",
        "1 modules only in B, such as new",
    )
    assert one.to_json()["n"] == 3


def test_a_module_that_starts_from_nothing_comes_first_and_has_no_change():
    before, after = measured("a/a", {"x": 1.0, "y": 0.0}), measured("a/a", {"x": 9.0, "y": 1.0})

    (one,) = compare_profiles(profile(before), profile(after))

    assert one.by_change == (ModuleChange("y", 0.0, 1.0, None), ModuleChange("x", 1.0, 9.0, 8.0))


def test_sources_are_paired_by_name_whatever_their_commits():
    names = ("me/base", "me/base", "me/math")
    before = profile(*(measured(f"{name}@{SHA}", {"x": n}) for n, name in enumerate(names, 1)))
    after = profile(*(measured(name, {"x": n}) for n, name in enumerate((*names, "me/code"), 5)))

    pairs = [(one.before, one.after, one.rows[0]) for one in compare_profiles(before, after)]

    assert pairs == [
        (f"me/base@{SHA}", "me/base", ModuleChange("x", 1, 5, 4.0)),
        (f"me/base@{SHA}", "me/base", ModuleChange("x", 2, 6, 2.0)),
        (f"me/math@{SHA}", "me/math", ModuleChange("x", 3, 7, 7 / 3 - 1)),
    ]


def test_profiles_without_a_source_in_common_are_refused():
    two = profile(measured("me/one", {"x": 1.0}), measured("me/two", {"x": 1.0}))

    with pytest.raises(ProfileError) as caught:
        compare_profiles(two, profile(measured("me/three", {"x": 1.0})))

    assert str(caught.value) == (
        "compare: no source is in both: A holds me/one, me/two; B holds me/three.\n"
        "Measure one model each: `lewis-hub importance MODEL --task TASK -o FOLDER`."
    )


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=40))
def test_rank_correlation_is_scipys_with_ties_and_without(pairs):
    first, second = (list(map(float, side)) for side in zip(*pairs, strict=True))
    ours = spearman(first, second)

    if len(set(first)) == 1 or len(set(second)) == 1:
        assert ours is None
    else:
        assert ours == pytest.approx(scipy.stats.spearmanr(first, second).statistic, abs=1e-12)


def test_very_many_sources_of_one_name_get_names_of_their_own_in_linear_time():
    began = time.process_time()
    found = unique_slugs(["a/b", "a/b-2"] * 10_000)

    assert found[:4] == ("b", "b-2", "b-3", "b-2-2")
    assert len(set(found)) == 20_000
    assert time.process_time() - began < 5  # hours if all numbers are tried again for each


def test_rank_correlation_of_nothing_is_not_defined():
    assert spearman([], []) is None
    assert spearman([1.0], [2.0]) is None


def test_a_comparison_is_drawn_light_and_dark(tmp_path):
    modules = {f"model.layers.{i}.mlp.up_proj": 1.0 + i for i in range(4)}
    twice = {module: 2 * value for module, value in modules.items()}
    compared = compare_profiles(profile(measured("a/a", modules)), profile(measured("a/b", twice)))

    names = draw_comparisons(compared, tmp_path / "plots")

    assert names == ("change-b-light.png", "change-b-dark.png")
    assert all((tmp_path / "plots" / name).read_bytes()[1:4] == b"PNG" for name in names)


def test_only_the_first_of_very_many_comparisons_are_drawn(tmp_path, monkeypatch):
    """Profiles of 1000 sources, 182 kB each, took minutes."""
    monkeypatch.setattr(plots, "MAX_MAPS", 2)
    before, after = (
        profile(*(measured(f"a/{n}", {"model.layers.0.mlp.up_proj": x}) for n in "abc"))
        for x in (1.0, 2.0)
    )
    for name, one in (("before", before), ("after", after)):
        (tmp_path / f"{name}.json").write_text(one.to_json())
    words = ["compare", str(tmp_path / "before.json"), str(tmp_path / "after.json")]

    done = CliRunner().invoke(cli, [*words, "-o", str(tmp_path / "out")])

    assert done.exit_code == 0, done.output
    assert "Only the first 2 of 3 comparisons are drawn." in done.stdout
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_compare_and_reading_a_profile_need_no_torch(tmp_path):
    file = tmp_path / "importance.json"
    file.write_text(profile(measured("a/a", {"model.layers.0.q": 1.0})).to_json())
    code = (
        "import sys\n"
        "from lewis_hub.cli.main import cli\n"
        f"cli(['compare', {str(file)!r}, {str(file)!r}, '-o', {str(tmp_path / 'out')!r}], "
        "standalone_mode=False)\n"
        "print({'torch', 'transformers', 'datasets', 'lm_eval', 'scipy'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.splitlines()[-1] == "set()"
