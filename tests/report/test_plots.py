from __future__ import annotations

from dataclasses import replace

import pytest
from PIL import Image

from lewis_hub.report.plots import draw, pictures
from lewis_hub.report.profiles import short_name, unique_slugs

PAPER = {"light": (255, 255, 255), "dark": (11, 15, 25)}


def with_outlier(fake, module, factor):
    first, expert, *rest = fake.profile.sources
    louder = replace(expert, modules={**expert.modules, module: expert.modules[module] * factor})
    return replace(fake, profile=replace(fake.profile, sources=(first, louder, *rest)))


def test_each_expert_gets_both_maps_in_both_versions(fake, tmp_path):
    plots = draw(fake.profile, fake.schedule, tmp_path)

    assert [(plot.kind, short_name(plot.expert)) for plot in plots] == [
        ("importance", "zoo/math"),
        ("importance", "zoo/text"),
        ("density", "zoo/math"),
        ("density", "zoo/text"),
    ]
    assert plots[0].files == (
        "importance-math-light.png",
        "importance-math-dark.png",
    )
    assert plots[0].caption == "Change of importance, base to zoo/math, % of the base's."
    assert plots[3].caption == "Density of zoo/text, fraction kept."
    for plot in plots:
        for name, theme in zip(plot.files, ("light", "dark"), strict=True):
            with Image.open(tmp_path / name) as picture:
                assert picture.convert("RGB").getpixel((1, 1)) == PAPER[theme]


def test_pictures_are_the_same_bytes_each_time_and_carry_no_date(make_fake, tmp_path):
    import matplotlib

    fake = make_fake(2, experts=("zoo/math",))
    first = draw(fake.profile, None, tmp_path / "first")
    pictures.cache_clear()
    with matplotlib.rc_context({"font.size": 30, "axes.grid": True, "figure.dpi": 33}):
        draw(fake.profile, None, tmp_path / "second")
        assert matplotlib.rcParams["font.size"] == 30  # the caller's own style is as it was

    for name in first[0].files:
        picture = (tmp_path / "first" / name).read_bytes()
        assert picture == (tmp_path / "second" / name).read_bytes()
        assert b"tEXt" not in picture
        assert b"Software" not in picture


@pytest.mark.parametrize(("n_blocks", "n_components"), [(1, 1), (14, 7), (80, 20)])
def test_pictures_grow_with_the_model_and_stay_small_files(
    n_blocks, n_components, make_fake, tmp_path
):
    components = tuple(f"mixer.projection_{i:02}" for i in range(n_components))
    fake = make_fake(n_blocks, components, experts=("zoo/math",))

    (plot,) = draw(None, fake.schedule, tmp_path)

    with Image.open(tmp_path / plot.light) as picture:
        width, height = picture.size
    assert 144 * 2.4 <= height <= 144 * 8
    assert 144 * 4.5 <= width <= 144 * 13
    assert width >= 144 * 0.117 * n_blocks
    assert height >= 144 * 0.3 * n_components
    assert (tmp_path / plot.light).stat().st_size < 150_000


def test_an_outlier_is_clipped_named_and_has_a_colour_of_its_own(make_fake, tmp_path):
    fake, module = make_fake(experts=("zoo/math",)), "model.layers.1.mlp.down_proj"
    loud = with_outlier(fake, module, 9.0)

    (clipped,) = draw(loud.profile, None, tmp_path / "loud")
    (plain,) = draw(fake.profile, None, tmp_path / "plain")

    assert clipped.caption == "Change of importance, base to zoo/math, % of the base's."
    assert (
        clipped.note
        == f"The colour scale ends at 20 % (percentile 95.8). Above it: {module}, 979 %."
    )
    assert plain.note == ""
    with (
        Image.open(tmp_path / "loud" / clipped.light) as loud_picture,
        Image.open(tmp_path / "plain" / plain.light) as plain_picture,
    ):
        assert loud_picture.size[1] > plain_picture.size[1]  # the note has a line of its own
        colours = {colour for _, colour in loud_picture.convert("RGB").getcolors(1 << 24)}
    assert (0xD1, 0x49, 0x5B) in colours


def test_without_the_base_the_experts_importance_is_shown(make_fake, tmp_path):
    fake = make_fake(2, experts=("zoo/math",))
    alone = replace(fake.profile, sources=fake.profile.experts)

    plot = draw(alone, None, tmp_path)[0]

    assert plot.caption == "Importance in zoo/math, % of the component's mean."


def test_a_profile_without_blocks_and_an_empty_schedule_give_no_picture(fake, tmp_path):
    flat = tuple(replace(one, modules={"lm_head": 1.0}) for one in fake.profile.sources)

    assert draw(replace(fake.profile, sources=flat), None, tmp_path) == ()
    assert draw(None, None, tmp_path) == ()


def test_hostile_names_are_drawn_as_text_and_give_plain_file_names(make_fake, tmp_path):
    hostile = make_fake(2, ("q\n$\\frac{$",), experts=("./../<b>$x^$ 模型", "emoji/😀"))

    plots = draw(hostile.profile, hostile.schedule, tmp_path)

    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == len(plots) * 2 == 8
    assert names[0] == "density-b-x-dark.png"
    assert "density-expert-light.png" in names


def test_slugs_are_safe_and_unique():
    sources = ("a/Math_7B@" + "0" * 40, "b/math-7b", "/", "c/math.7b", "x/" + "y" * 200)

    slugs = unique_slugs(sources)

    assert slugs == ("math-7b", "math-7b-2", "expert", "math-7b-3", "y" * 60)


def test_readers_see_a_repo_without_its_commit_and_a_folder_without_its_path():
    assert short_name("a/b@" + "0" * 40) == "a/b"
    assert short_name("a/b@main") == "a/b@main"
    assert short_name("/home/somebody/models/x@y") == "x@y"
    assert short_name("./math/") == "math"


def test_a_map_says_what_its_guide_measured_and_weights_have_one_too(make_fake, tmp_path):
    fake = make_fake(2, experts=("zoo/math",))
    [_, measured] = fake.profile.sources
    moved = replace(measured, calibration={"measure": "task_vector"})
    profile = replace(fake.profile, sources=(moved,))
    [expert] = fake.schedule.experts
    schedule = replace(
        fake.schedule, experts=(replace(expert, tensors={}, weights=expert.tensors),)
    )

    plots = draw(profile, schedule, tmp_path)

    assert [(plot.kind, plot.caption) for plot in plots] == [
        ("importance", "Size of the task vector in zoo/math, % of the base's."),
        ("weight", "Weight of zoo/math, factor."),
    ]
