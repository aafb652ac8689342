"""Card and report as a browser shows them: in headless Chromium, where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from huggingface_hub import CommitOperationAdd

from lewis_hub.report.card import model_card
from lewis_hub.report.chart import draw_scores
from lewis_hub.report.maps import draw_maps
from lewis_hub.report.page import report_page
from tests.report.chromium import PROGRAM, Page, browser
from tests.report.test_escaping import NAME, hostile_facts, hostile_samples

pytestmark = [
    pytest.mark.slow,  # starts a browser
    pytest.mark.skipif(PROGRAM is None, reason="no chromium: apt-get install chromium"),
]
TIP = "document.getElementById('tip')"
PICTURES = "[...document.images].map(one => [one.currentSrc, one.complete, one.naturalWidth > 0])"
SCRIPTS = "document.querySelectorAll('script, [onerror], [onload]').length"
CLIPPED = """[...document.querySelectorAll('.card *')].filter(one => {
    const box = one.getBoundingClientRect(), page = document.querySelector('.card');
    return !one.closest('table, pre') && box.right > page.getBoundingClientRect().right + 1;
}).map(one => one.outerHTML.slice(0, 80))"""
WIDER = "document.documentElement.scrollWidth > innerWidth"


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browser() as opened:
        yield opened


@pytest.fixture
def report(make_facts, make_samples, make_scores, tmp_path):
    file = tmp_path / "report.html"
    file.write_text(report_page(make_facts(), make_samples(make_scores())), encoding="utf-8")
    return file.as_uri()


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1100])
def test_the_report_draws_everything_asks_for_nothing_and_complains_of_nothing(
    page, report, dark, width
):
    page.open(report, dark=dark, width=width)

    assert page.value("document.querySelectorAll('#items .grid rect').length") == 300
    assert page.value("document.querySelectorAll('#modules .grid rect').length") == 2 * 24
    paper = page.value("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(18, 22, 28)" if dark else "rgb(255, 255, 255)")
    assert not page.value(WIDER)
    assert page.requests == [report]
    assert page.complaints == [], page.requests


def test_pointing_at_a_module_shows_all_its_numbers(page, report):
    page.open(report)
    assert page.value(f"{TIP}.hidden")

    page.point_at("#modules .grid rect", 24 + 3 * 6 + 2)  # the second expert's

    assert page.value(f"{TIP}.textContent").splitlines() == [
        "block 2, mlp.down_proj",
        "density: 0.5354 of the task vector",
        "change of importance: 9.416 % of the base's",
        "importance in the expert: 15.32",
        "importance in the base: 14",
    ]
    page.point_at("h1")
    assert page.value(f"{TIP}.hidden")


def test_arrow_keys_lead_from_module_to_module(page, report):
    page.open(report)
    page.value("document.querySelector('#modules .grid').focus()")

    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "ArrowUp"):
        page.press(key)

    assert page.value(f"{TIP}.textContent").startswith("block 2, self_attn.q_proj\n")


def test_another_map_is_drawn_when_it_is_chosen(page, report):
    page.open(report)
    shown = "document.querySelector('#modules .grid').getAttribute('aria-label')"
    assert page.value(shown) == "density, zoo/math"

    choose(page, "#modules select", 1)

    assert page.value(shown) == "change of importance, zoo/math"
    assert page.value("document.querySelector('#modules .scale').textContent").endswith(
        "% of the base's"
    )


def test_items_are_told_apart_by_who_was_right(page, report):
    page.open(report)
    choose(page, "#items .controls ~ div select", 1)  # beside zoo/math: 270 of 300 right

    key = "[...document.querySelectorAll('#items .key li')].map(one => one.textContent)"
    assert page.value(key) == [
        "only the merged model is right: 0",
        "only the other model is right: 60",
        "both are right: 210",
        "neither is right, or no answer: 30",
    ]
    page.point_at("#items .grid rect", 42)
    assert page.value(f"{TIP}.textContent").splitlines() == [
        "item 42: only the other model is right",
        "base: wrong",
        "zoo/math: right",
        "zoo/text: wrong",
        "uniform twin: wrong",
        "merged: wrong",
    ]


def test_hostile_names_run_nothing_in_the_report(
    page, make_facts, make_results, make_scores, tmp_path
):
    file = tmp_path / "report.html"
    told = report_page(hostile_facts(make_facts), hostile_samples(make_results, make_scores))
    file.write_text(told, encoding="utf-8")

    page.open(file.as_uri())
    page.point_at("#items .grid rect", 0)

    assert page.value("document.images.length") == 0
    assert page.value("document.scripts.length") == 2
    shown = " ".join(NAME.replace("\u202e", "").split())
    assert f"{shown}: wrong" in page.value(f"{TIP}.textContent").splitlines()
    assert page.complaints == [], page.requests


@pytest.mark.parametrize("width", [390, 768, 1280])
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("hostile", [False, True])
def test_the_hubs_page_shows_the_card_with_every_picture_and_runs_no_script(
    page, hub, make_facts, tmp_path, dark, hostile, width
):
    facts, repo = make_facts(), f"{hub.user}/zoo-merge"
    maps = draw_maps(facts.guided.profile, facts.guided.schedule, tmp_path)
    chart = draw_scores(facts.scores, tmp_path)
    facts = replace(facts, guided=replace(facts.guided, maps=maps), chart=chart)
    shown = hostile_facts(lambda: facts) if hostile else facts
    card = model_card(replace(shown, repo=repo))
    push(hub, repo, card, tmp_path)

    page.open(f"{hub.url}/{repo}", dark=dark, width=width)

    pictures = page.value(PICTURES)
    assert len(pictures) == 2
    for address, complete, drawn in pictures:
        assert ("dark" in address.rpartition("/")[2]) == dark
        assert complete
        assert drawn
    assert page.value(SCRIPTS) == 0
    assert not page.value(WIDER)
    assert page.value(CLIPPED) == []
    assert all(one.startswith((hub.url, hub.storage_url)) for one in page.requests)
    assert page.complaints == [], page.requests


def choose(page: Page, selector: str, number: int) -> None:
    found = f"document.querySelector('{selector}')"
    page.value(f"{found}.value = {number}; {found}.dispatchEvent(new Event('change'))")


def push(hub, repo, card, pictures) -> None:
    api = hub.api()
    api.create_repo(repo)
    files = [CommitOperationAdd("README.md", str(card).encode())]
    files += [CommitOperationAdd(f"lewis/{one.name}", one) for one in pictures.glob("*.png")]
    api.create_commit(repo, files, commit_message="Merge")
