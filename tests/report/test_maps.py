from __future__ import annotations

from dataclasses import replace

import pytest
from PIL import Image

from lewis_hub.report.maps import MAX_WIDTH, draw_maps, map_columns
from lewis_hub.report.plots import DPI

PAPER = {"light": (255, 255, 255), "dark": (11, 15, 25)}


def with_outlier(fake, module, factor):
    first, expert, *rest = fake.profile.sources
    louder = replace(expert, modules={**expert.modules, module: expert.modules[module] * factor})
    return replace(fake, profile=replace(fake.profile, sources=(first, louder, *rest)))


def test_all_maps_are_in_one_picture_with_one_sentence(fake, tmp_path):
    picture = draw_maps(fake.profile, fake.schedule, tmp_path)

    assert picture.files == ("maps-light.png", "maps-dark.png")
    assert {path.name for path in tmp_path.iterdir()} == set(picture.files)
    assert picture.caption == (
        "Components (rows) by blocks (columns) of zoo/math, zoo/text: change of importance is "
        "highest in model.layers.0.mlp.down_proj of zoo/text (20 %), and density is highest in "
        "model.layers.2.self_attn.q_proj.weight of zoo/math (0.80)."
    )
    assert picture.note == ""
    for name, theme in zip(picture.files, ("light", "dark"), strict=True):
        with Image.open(tmp_path / name) as opened:
            assert opened.convert("RGB").getpixel((1, 1)) == PAPER[theme]


def test_experts_share_the_colour_scale_of_a_column(fake):
    importance, density = map_columns(fake.profile, fake.schedule)

    assert (
        list(importance.maps)
        == list(density.maps)
        == [expert.source for expert in fake.profile.experts]
    )
    lowest = min(min(expert.tensors.values()) for expert in fake.schedule.experts)
    highest = max(max(expert.tensors.values()) for expert in fake.schedule.experts)
    assert (density.pooled.known[0], density.pooled.known[-1]) == (lowest, highest)


def test_pictures_are_the_same_bytes_each_time_and_carry_no_date(make_fake, tmp_path):
    import matplotlib

    fake = make_fake(2, experts=("zoo/math",))
    first = draw_maps(fake.profile, None, tmp_path / "first")
    with matplotlib.rc_context({"font.size": 30, "axes.grid": True, "figure.dpi": 33}):
        draw_maps(fake.profile, None, tmp_path / "second")
        assert matplotlib.rcParams["font.size"] == 30  # the caller's own style is as it was

    for name in first.files:
        picture = (tmp_path / "first" / name).read_bytes()
        assert picture == (tmp_path / "second" / name).read_bytes()
        assert b"tEXt" not in picture
        assert b"Software" not in picture


@pytest.mark.parametrize(("n_blocks", "n_components"), [(1, 1), (14, 7), (80, 20)])
def test_the_picture_fits_a_card_and_stays_a_small_file(
    n_blocks, n_components, make_fake, tmp_path
):
    components = tuple(f"mixer.projection_{i:02}" for i in range(n_components))
    fake = make_fake(n_blocks, components, experts=("zoo/math", "zoo/text"))

    picture = draw_maps(fake.profile, fake.schedule, tmp_path)

    with Image.open(tmp_path / picture.light) as opened:
        width, height = opened.size
    assert 144 * 4.8 - 1 <= width <= 144 * 6.5 + 1
    assert 144 * 2 * 0.55 <= height <= 144 * 9
    assert (tmp_path / picture.light).stat().st_size < 200_000


def test_an_outlier_is_clipped_named_and_has_a_colour_of_its_own(make_fake, tmp_path):
    fake, module = make_fake(experts=("zoo/math",)), "model.layers.1.mlp.down_proj"
    loud = with_outlier(fake, module, 9.0)

    clipped = draw_maps(loud.profile, None, tmp_path / "loud")
    plain = draw_maps(fake.profile, None, tmp_path / "plain")

    assert (
        clipped.note
        == f"The colour scale ends at 20 % (percentile 95.8). Above it: {module}, 979 %."
    )
    assert f"change of importance is highest in {module} (979 %)" in clipped.caption
    assert plain.note == ""
    with (
        Image.open(tmp_path / "loud" / clipped.light) as loud_picture,
        Image.open(tmp_path / "plain" / plain.light) as plain_picture,
    ):
        assert loud_picture.size[1] > plain_picture.size[1]  # the note has a line of its own
        colours = {colour for _, colour in loud_picture.convert("RGB").getcolors(1 << 24)}
    assert (0xD1, 0x49, 0x5B) in colours


def test_without_the_base_the_experts_importance_is_shown(make_fake):
    fake = make_fake(2, experts=("zoo/math",))

    [column] = map_columns(replace(fake.profile, sources=fake.profile.experts), None)

    assert (column.title, column.scale) == ("importance", "% of the component's mean")


def test_a_model_of_a_thousand_blocks_is_drawn(make_fake, tmp_path):
    assert draw_maps(make_fake(1000, experts=("zoo/math",)).profile, None, tmp_path)


def test_names_of_a_thousand_letters_leave_room_for_the_map(make_fake, tmp_path):
    components = tuple(f"{'x' * 900}.{i}" for i in "abc")
    fake = make_fake(4, components, experts=("zoo/math", "zoo/text"))

    picture = draw_maps(fake.profile, fake.schedule, tmp_path)

    with Image.open(tmp_path / picture.files[0]) as opened:
        assert opened.width <= MAX_WIDTH * DPI


def test_a_profile_without_blocks_and_an_empty_schedule_give_no_picture(fake, tmp_path):
    flat = tuple(replace(one, modules={"lm_head": 1.0}) for one in fake.profile.sources)

    assert draw_maps(replace(fake.profile, sources=flat), None, tmp_path) is None
    assert draw_maps(None, None, tmp_path) is None


def test_hostile_names_are_drawn_as_text(make_fake, tmp_path):
    hostile = make_fake(2, ("q\n$\\frac{$",), experts=("./../<b>$x^$ 模型", "emoji/😀"))

    picture = draw_maps(hostile.profile, hostile.schedule, tmp_path)

    assert {path.name for path in tmp_path.iterdir()} == set(picture.files)


def test_a_map_says_what_its_guide_measured_and_weights_have_one_too(make_fake):
    fake = make_fake(2, experts=("zoo/math",))
    [_, measured] = fake.profile.sources
    moved = replace(measured, calibration={"measure": "task_vector"})
    profile = replace(fake.profile, sources=(moved,))
    [expert] = fake.schedule.experts
    schedule = replace(
        fake.schedule, experts=(replace(expert, tensors={}, weights=expert.tensors),)
    )

    columns = map_columns(profile, schedule)

    assert [(column.kind, column.title, column.scale) for column in columns] == [
        ("importance", "size of the task vector", "% of the base's"),
        ("weight", "weight", "factor"),
    ]
