import json
import time
from datetime import date

import pytest

from lewis_hub.errors import OutputError
from lewis_hub.report.difference import ChangelogEntry, from_json, in_card, shown, to_json
from lewis_hub.workflow.republish import PUSHED_TO

FIRST = ChangelogEntry(date(2026, 1, 2), "a" * 40, "sha256:01", ("expert a/code: 1111 → 2222",))
SECOND = ChangelogEntry(date(2026, 1, 3), "b" * 40, "sha256:02", ("seed: 1 → 2", "weights: 1 of 1"))
CARD = "---\nlicense: mit\n---\n\n# Mine\n\nText.\n"


def test_a_changelog_is_read_back():
    assert from_json(to_json((SECOND, FIRST))) == (SECOND, FIRST)


def test_a_long_changelog_loses_its_oldest_entries():
    assert len(from_json(to_json((FIRST,) * 150))) == 100


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "it is not a changelog of merges."),
        ("[]", "it is not a changelog of merges."),
        ('{"version": 7}', "it has version 7, this program reads version 1."),
        ('{"version": 1, "entries": [{"day": 3}]}', "it is not a changelog of merges."),
    ],
)
def test_another_document_is_refused(text, problem):
    with pytest.raises(OutputError) as refused:
        from_json(text, "x.json")

    assert str(refused.value) == (
        f"x.json: {problem}\nRepair or delete it. The next push starts a new changelog."
    )


def test_the_card_gets_a_section_with_the_newest_first():
    assert in_card(CARD, (SECOND, FIRST)) == (
        "---\nlicense: mit\n---\n\n# Mine\n\nText.\n\n"
        "<!-- lewis-hub: changelog -->\n"
        "## Changelog\n\n"
        "**2026-01-03**, replaces `bbbbbbbbbbbb`:\n\n"
        "- seed: 1 → 2\n- weights: 1 of 1\n\n"
        "**2026-01-02**, replaces `aaaaaaaaaaaa`:\n\n"
        "- expert a/code: 1111 → 2222\n"
        "<!-- lewis-hub: end of changelog -->\n"
    )


def test_the_section_takes_the_place_of_the_former_one_and_leaves_other_text_alone():
    once = in_card(CARD, (FIRST,)) + "\nWritten by hand.\n"

    twice = in_card(once, (SECOND, FIRST))

    assert twice.count("## Changelog") == 1
    assert "Written by hand." in twice
    assert in_card(twice, (SECOND, FIRST)) == twice
    assert in_card(in_card(CARD, (FIRST,)), ()) == CARD


def test_what_a_repo_wrote_into_its_changelog_shows_as_text():
    evil = ChangelogEntry(
        date(2026, 1, 2), "`](<b>x)", "", ("<img src=x onerror=alert(1)>\n# Big", "x" * 900)
    )

    card = in_card(CARD, from_json(json.dumps(json.loads(to_json((evil,))))))

    assert "<img" not in card
    assert "<b>" not in card
    assert "\n# Big" not in card
    assert "x" * 301 not in card


def test_the_card_shows_ten_and_links_to_all():
    card = in_card(CARD, (FIRST,) * 12)

    assert card.count("**, replaces `") == 10
    assert "All 12 entries are in [lewis/changelog.json](lewis/changelog.json)." in card


def test_a_card_of_empty_lines_and_of_beginnings_takes_no_minutes():
    began, many = time.process_time(), "\n" * 1_000_000
    assert in_card(f"a{many}b", ()) == f"a{many}b\n"
    beginnings = "<!-- lewis-hub: changelog -->\n" * 30_000
    assert in_card(beginnings, ()) == beginnings
    assert PUSHED_TO.search(f"a{many}b") is None
    assert PUSHED_TO.sub("\n", f"a{many}<!-- lewis-hub: pushed to me/merge -->\nb") == "a\nb"
    assert time.process_time() - began < 5


def test_half_a_letter_is_no_part_of_a_changelog():
    """It was a traceback when the changelog was written, after a merge and its scores."""
    entry = '{"day": "2026-01-02", "replaced": "0", "digest": "0", "changes": ["CHANGE"]}'
    document = f'{{"version": 1, "entries": [{entry}]}}'
    assert from_json(document)[0].changes == ("CHANGE",)

    with pytest.raises(OutputError, match="it is not a changelog of merges"):
        from_json(document.replace("CHANGE", "\\ud800"))


def test_of_very_many_changes_the_first_are_shown():
    """12 MB of them made a card of 12 MB, at each push."""
    found = shown(["a" * 1000, *map(str, range(1, 150))])

    assert found == ["a" * 297 + "...", *map(str, range(1, 100)), "50 more changes"]
    assert shown(["a", "b"]) == ["a", "b"]


def test_changes_are_lines_without_control_characters():
    """They are the message of a commit, too, and texts of the lock before are those of others."""
    told = "name: \x1b[31mred\n\n::error::x\x07 → \u202ea"

    assert shown([told]) == [r"name: \x1b[31mred ::error::x\x07 → \u202ea"]
