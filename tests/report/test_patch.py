from dataclasses import replace

import pytest

from lewis_hub.report.card import dark_folder, model_card
from lewis_hub.report.patch import patched
from lewis_hub.report.usage import BY_NAME, ModelUsage

BEFORE = "# Merged model\n\n- size: 1\n\nname = '.'\n"
AFTER = "# mine\n\n- size: 1\n- by: me\n\nname = 'me/mine'\n"


def test_the_differences_are_applied_to_an_edited_text():
    edited = "# Merged model\n\nMy own words.\n\n- size: 1\n- colour: red\n\nname = '.'\n"

    assert patched(edited, BEFORE, AFTER) == (
        "# mine\n\nMy own words.\n\n- size: 1\n- by: me\n- colour: red\n\nname = 'me/mine'\n"
    )


def test_a_line_that_the_owner_rewrote_stays():
    edited = BEFORE.replace("# Merged model", "# My title")

    assert patched(edited, BEFORE, AFTER) == AFTER.replace("# mine", "# My title")


def test_the_difference_of_a_text_with_itself_changes_nothing():
    assert patched("any\ntext", BEFORE, BEFORE) == "any\ntext"
    assert patched(BEFORE, BEFORE, AFTER) == AFTER
    assert patched(AFTER, AFTER, BEFORE) == BEFORE


def test_of_equal_blocks_the_one_below_the_same_line_changes():
    before, after = "a\nx\nb\nx\n", "a\nx\nb\ny\n"

    assert patched("0\na\nx\nb\nx\n", before, after) == "0\na\nx\nb\ny\n"
    assert patched("x\nx\n", before, after) == "x\nx\n"


def test_a_line_is_inserted_above_an_equal_one():
    before, after = "a\nb\nc\nb", "a\nb\nb\nc\nb"

    assert patched(before, before, after) == after


@pytest.mark.parametrize("name", BY_NAME)
def test_a_card_with_a_repo_differs_in_lines_that_need_nothing_of_the_run(name, make_facts):
    on_disk = make_facts(title="Merged model", repo=None, usage=ModelUsage(BY_NAME[name]))
    on_hub = replace(on_disk, title="zoo-merge", repo="me/zoo-merge")
    nothing = {"guided": None, "chart": None, "scored_data": {}, "costs": (), "usage": ModelUsage()}
    before, after = (str(model_card(replace(one, **nothing))) for one in (on_disk, on_hub))
    card = str(model_card(on_disk))

    moved = card.replace(f'srcset="{dark_folder(on_disk)}/', f'srcset="{dark_folder(on_hub)}/')

    assert moved.count("https://huggingface.co/me/zoo-merge/resolve/main/lewis/") == 2
    assert patched(moved, before, after) == str(model_card(on_hub))


def test_an_item_is_inserted_below_the_item_with_the_label_above_it():
    before = "## What it is\n\n- **Languages:** none\n- **Licence:** none\n"
    after = before.replace("- **Licence", "- **Published by:** me\n- **Licence")
    text = "## What it is\n\n- **Context:** 9\n- **Languages:** en\n- **Licence:** mit\n"

    assert patched(text, before, after) == text.replace(
        "- **Licence", "- **Published by:** me\n- **Licence"
    )
