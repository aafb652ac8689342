"""The items of a report as a browser shows them: filters, search, and every width and scheme."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from lewis_hub.report.page import report_page
from tests.report.chromium import PROGRAM, Page, browser

pytestmark = [
    pytest.mark.slow,  # starts a browser
    pytest.mark.skipif(PROGRAM is None, reason="no chromium: apt-get install chromium"),
]
WIDER = "document.documentElement.scrollWidth > innerWidth"
# elements that leave the page, and elements whose text leaves them
CLIPPED = """[...document.querySelectorAll('main *')].filter(one => {
    const box = one.getBoundingClientRect();
    const leaves = box.right > innerWidth + 1 || box.left < -1;
    return leaves || (one.clientWidth && one.scrollWidth > one.clientWidth + 1);
}).map(one => one.outerHTML.slice(0, 80))"""
TOO_SMALL = """[...document.querySelectorAll('#modules .grid text')].filter(
    one => one.getBoundingClientRect().height < 9).length"""
TITLES = "[...document.querySelectorAll('.item h4')].map(one => one.textContent)"
COUNT = "document.querySelector('#items .count').textContent"
FILTERS = "[...document.querySelectorAll('.filters button')].map(one => one.textContent)"
PRESSED = "document.querySelector('.filters [aria-pressed=true]').textContent"
SEVEN = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browser() as opened:
        yield opened


@pytest.fixture
def report(make_facts, make_fake, make_told_samples, make_scores, tmp_path):
    """A merge of 48 blocks; it lost 60 items of 300 against zoo/math."""
    fake = make_fake(48, SEVEN)
    guided = replace(make_facts().guided, profile=fake.profile, schedule=fake.schedule)
    parameters = dict.fromkeys(fake.schedule.experts[0].tensors, 64)
    facts = make_facts(guided=guided, parameters=parameters)
    file = tmp_path / "report.html"
    file.write_text(report_page(facts, make_told_samples(make_scores())), encoding="utf-8")
    return file.as_uri()


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 768, 1280])
def test_a_report_of_48_blocks_fits_every_width_and_its_labels_can_be_read(
    page, report, dark, width
):
    page.open(report, dark=dark, width=width)

    assert not page.value(WIDER)
    assert page.value(CLIPPED) == []
    assert page.value(TOO_SMALL) == 0
    assert page.value("document.querySelectorAll('#modules .grid rect').length") == 2 * 48 * 7
    narrowest = "Math.min(...[...document.querySelectorAll('#modules .grid rect')].map("
    assert page.value(f"{narrowest}one => one.getBoundingClientRect().width))") >= 14
    assert page.requests == [report]
    assert page.complaints == []


def test_on_a_phone_blocks_are_rows_and_pointing_still_shows_all_numbers(page, report):
    page.open(report, width=390)
    page.point_at("#modules .grid rect", 2 * 7 + 6)

    shown = page.value("document.getElementById('tip').textContent")

    assert shown.startswith("block 2, mlp.down_proj\ndensity: ")
    labels = "[...document.querySelectorAll('#modules .grid text')].map(one => one.textContent)"
    found = page.value(labels)
    assert found[7 * 48 : 7 * 48 + 3] == ["0", "1", "2"]
    assert found[8 * 48 : 8 * 48 + 7] == [name.partition(".")[2] for name in SEVEN]


def test_the_report_opens_on_what_the_merge_lost_against_its_best_expert(page, report):
    page.open(report)

    counts = "document.querySelector('.outcomes .counts').textContent"
    assert page.value(counts) == "▼ 60 lost ▲ 0 won"
    assert page.value(PRESSED) == "Lost and won 60"
    assert page.value(COUNT) == "10 of 60 items"
    assert page.value(TITLES)[:2] == ["Item 30▼ lost", "Item 31▼ lost"]
    first = "[...document.querySelectorAll('.item')[0].querySelectorAll('.said')]"
    assert page.value(f"{first}.map(one => [...one.children].map(part => part.textContent))") == [
        ["Question", "What is 30 + 1?"],
        ["Expected", "31"],
        ["merged✗ wrong", "merged says 30"],
        ["zoo/math✓ right", "31"],
        ["Also answered by base, zoo/text, uniform twin"],
    ]


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_filters_show_the_lost_the_won_the_changed_and_all_items(page, report, width):
    page.open(report, width=width)
    assert page.value(FILTERS) == [
        *("Lost and won 60", "Lost 60", "Won 0", "Changed 90", "All 300"),
    ]

    page.click(".filters [data-filter=Changed]")
    assert (page.value(COUNT), page.value(PRESSED)) == ("10 of 90 items", "Changed 90")
    assert page.value(TITLES)[0] == "Item 0= neither right"
    page.click(".list + button")
    assert page.value(COUNT) == "20 of 90 items"
    page.click(".filters [data-filter=Won]")
    assert (page.value(COUNT), page.value(TITLES)) == ("No such item.", [])
    page.click(".filters [data-filter=All]")
    assert page.value(COUNT) == "10 of 300 items"


def test_search_finds_questions_answers_and_numbers_and_marks_them(page, report):
    page.open(report)
    page.click(".filters [data-filter=All]")
    page.click("#items input")

    page.write("IS 299")
    assert page.value(TITLES) == ["Item 299= both right"]
    assert page.value("document.querySelector('.item mark').textContent") == "is 299"
    page.value("document.querySelector('#items input').select()")
    page.write("uniform says 7")
    assert page.value(COUNT) == "10 of 11 items"  # 7, and 70 to 79
    page.value("document.querySelector('#items input').select()")
    page.write("#42")
    assert page.value(TITLES) == ["Item 42▼ lost"]


def test_a_click_on_an_item_of_the_picture_lists_it(page, report):
    page.open(report)

    page.click("#items .grid rect", 42)

    assert page.value(TITLES) == ["Item 42▼ lost"]
    answered = "[...document.querySelectorAll('.item .who')].map(one => one.textContent)"
    assert page.value(answered)[4:] == ["base✗ wrong", "zoo/text✗ wrong", "uniform twin✗ wrong"]


def test_the_other_models_answers_are_one_click_away(page, report):
    page.open(report)

    page.click(".item .others button")

    answered = (
        "[...document.querySelector('.item').querySelectorAll('.text')].map(t => t.textContent)"
    )
    assert page.value(answered)[4:] == ["base says 30", "expert:z says 30", "uniform says 30"]


def test_another_rival_is_compared_when_it_is_chosen(page, report):
    page.open(report)
    found = "document.querySelector('#items .controls ~ div select')"
    assert page.value(f"{found}.selectedOptions[0].textContent") == "zoo/math"

    page.value(f"{found}.value = 3; {found}.dispatchEvent(new Event('change'))")

    assert page.value(FILTERS)[1:3] == ["Lost 0", "Won 6"]
    assert page.value(TITLES)[0] == "Item 90▲ won"


def test_wins_and_losses_differ_in_shape_and_words_not_only_in_colour(page, report):
    page.open(report)
    shapes = "[...document.querySelectorAll('#items .key path')].map(one => one.getAttribute('d'))"

    assert len(set(page.value(shapes))) == 4
    assert page.value("document.querySelectorAll('#items .grid path').length") == 300


def test_a_long_answer_opens_on_demand(page, make_facts, make_told_samples, make_scores, tmp_path):
    samples = make_told_samples(make_scores(), 20)
    task = samples.tasks["sums"]
    answers = {**task.answers, "merged": ("word " * 180,) * 20}
    long = replace(samples, tasks={"sums": replace(task, answers=answers)})
    file = tmp_path / "report.html"
    file.write_text(report_page(make_facts(), long), encoding="utf-8")
    page.open(file.as_uri(), width=390)
    text = "document.querySelector('.said.merged .text').textContent"
    assert page.value(text).endswith("… show all")

    page.click(".said.merged .text button")

    assert page.value(text) == "word " * 180
    assert not page.value(WIDER)
