from __future__ import annotations

import hashlib
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lewis_hub.calibration import texts
from lewis_hub.calibration.model import load_tokenizer
from lewis_hub.calibration.texts import batches, beginnings, calibration_tokens, draw_rows
from lewis_hub.errors import CalibrationError, CalibrationModelError, EmptyCalibrationError
from lewis_hub.recipe.schema import Calibration

from .conftest import tokens_of


class Table:
    def __init__(self, rows: list[dict[str, Any]], columns: tuple[str, ...] = ("text",)) -> None:
        self.columns = columns
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return [self._rows[i] for i in indices]


def asking(**settings: Any) -> Calibration:
    return Calibration(**{"dataset": "me/data", "text": "{text}", "samples": 3, **settings})


def test_the_rows_that_a_seed_draws_never_change():
    """As `printf 42:219 | b2sum -l 64` and so on order them."""
    assert draw_rows(1000, 8, seed=42) == (219, 380, 601, 138, 190, 97, 289, 378)
    assert draw_rows(300, 8, seed=0) == (62, 177, 173, 269, 248, 273, 3, 52)
    assert draw_rows(10, 4, seed=42) == (0, 2, 5, 9)


def test_a_larger_sample_begins_with_the_smaller_one():
    assert draw_rows(500, 40, seed=1)[:15] == draw_rows(500, 15, seed=1)


def test_fewer_rows_than_samples_are_all_drawn_once():
    drawn = draw_rows(7, 100, seed=3)

    assert sorted(drawn) == list(range(7))
    assert draw_rows(0, 5, seed=3) == ()


def test_every_row_is_drawn_about_as_often_as_any_other():
    counts = [0] * 20
    for seed in range(2000):
        for row in draw_rows(20, 5, seed=seed):
            counts[row] += 1

    assert sum(counts) == 2000 * 5
    assert all(400 < count < 600 for count in counts)  # 500 expected, standard deviation 19


def test_texts_are_tokenised_with_special_tokens_and_cut(byte_tokenizer):
    table = Table([{"text": "abcdef"}, {"text": "ab"}, {"text": "abc"}])

    tokens = calibration_tokens(table, asking(max_tokens=4), byte_tokenizer, seed=5)

    by_row = dict(zip(tokens.rows, tokens.ids, strict=True))
    decoded = {row: byte_tokenizer.decode(ids) for row, ids in by_row.items()}
    assert decoded == {0: "<s>abc", 1: "<s>ab", 2: "<s>abc"}
    assert tokens.n_tokens == 4 + 3 + 4
    assert tokens.n_truncated == 1
    assert tokens.notes == (
        "1 of 3 texts were cut to 4 tokens: 3 tokens where they end are left out",
    )


@pytest.mark.parametrize(
    ("limit", "chat", "expected"),
    [(6, None, "<s>tem 7"), (6, True, "item 7"), (1, None, "<s>")],
)
def test_of_a_task_the_item_and_its_answer_stay(byte_tokenizer, limit, chat, expected):
    table = Table([{"text": "many shots, item 7"}])
    byte_tokenizer.chat_template = f"<s>{byte_tokenizer.chat_template}"  # so that none is added
    asked = Calibration(task="mine", samples=1, max_tokens=limit, chat_template=chat)

    tokens = calibration_tokens(table, asked, byte_tokenizer, seed=0)

    assert byte_tokenizer.decode(tokens.ids[0]) == expected
    n_cut = 18 + (chat is None) - limit
    assert tokens.notes == (
        f"1 of 1 texts were cut to {limit} tokens: {n_cut} tokens where they begin are left out",
    )


def test_a_text_of_a_task_that_is_not_too_long_stays_whole(byte_tokenizer):
    asked = Calibration(task="mine", samples=1, max_tokens=5)

    tokens = calibration_tokens(Table([{"text": "abcd"}]), asked, byte_tokenizer, seed=0)

    assert byte_tokenizer.decode(tokens.ids[0]) == "<s>abcd"
    assert (tokens.n_truncated, tokens.notes) == (0, ())


def test_rows_without_text_count_for_nothing_and_are_reported(byte_tokenizer):
    table = Table([{"text": " \n"}, {"text": None}, {"text": "abc"}])

    tokens = calibration_tokens(table, asking(samples=9), byte_tokenizer, seed=0)

    ids = ",".join(map(str, byte_tokenizer("abc")["input_ids"]))
    assert tokens.rows == (2,)
    assert tokens.facts == {
        "rows_digest": "sha256:d4735e3a265e16eee03f59718b9b5d03019c07d8b6c51f90da3a666eec13ab35",
        "tokens_digest": "sha256:" + hashlib.sha256(ids.encode()).hexdigest(),
        "n_texts": 1,
        "n_empty": 2,
        "n_tokens": 4,
        "n_truncated": 0,
    }
    assert tokens.notes == (
        "the data has 3 rows, 9 were asked for: all are used",
        "2 of 3 texts are empty and count for nothing",
    )


@pytest.mark.parametrize(
    ("rows", "found"),
    [([], "there are no rows"), ([{"text": ""}, {"text": " "}], "all 2 texts are empty")],
)
def test_data_without_any_text_is_an_error(byte_tokenizer, rows, found):
    with pytest.raises(EmptyCalibrationError) as caught:
        calibration_tokens(Table(rows), asking(split="test"), byte_tokenizer, seed=0)

    assert str(caught.value) == (
        f"calibration on me/data, split test: {found}.\n"
        "Choose a split with rows and a `text` or `messages` that is filled in them."
    )


def test_chat_messages_go_through_the_chat_template_without_a_second_start_token(byte_tokenizer):
    conversation = [
        {"role": "user", "content": "hi", "tool_calls": None},
        {"role": "assistant", "content": "ho"},
    ]
    table = Table([{"chat": conversation}], ("chat",))

    tokens = calibration_tokens(table, asking(text=None, messages="chat"), byte_tokenizer, seed=0)

    assert [byte_tokenizer.decode(ids) for ids in tokens.ids] == ["<user>hi\n<assistant>ho\n"]


def test_batches_hold_like_lengths_within_the_budget_padded_on_the_right():
    tokens = tokens_of([[1, 2], [3] * 5, [4], [5, 6, 7], [8] * 9])

    found = list(batches(tokens, budget_tokens=8))

    assert [b.input_ids.tolist() for b in found] == [
        [[8] * 9],  # longer than the budget: alone
        [[3] * 5],
        [[5, 6, 7], [1, 2, 0]],
        [[4]],
    ]
    assert found[2].attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert sum(int(b.attention_mask.sum()) for b in found) == tokens.n_tokens


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=60))
def test_a_batch_has_less_padding_than_a_batch_more_would_cost(lengths):
    tokens = tokens_of([[number + 1] * length for number, length in enumerate(lengths)])

    found = list(batches(tokens, budget_tokens=128))

    for batch in found:
        assert batch.input_ids.numel() <= 128
        assert int((batch.attention_mask == 0).sum()) <= 32
        assert batch.attention_mask[0].all()
    held = [int(row[0]) for batch in found for row in batch.input_ids]
    assert sorted(held) == list(range(1, len(lengths) + 1))
    assert sum(int(batch.attention_mask.sum()) for batch in found) == sum(lengths)


def test_a_tokenizer_is_loaded_from_a_local_folder(byte_tokenizer, tmp_path):
    byte_tokenizer.save_pretrained(tmp_path)

    loaded = load_tokenizer(tmp_path, "me/model")

    assert loaded("abc")["input_ids"] == byte_tokenizer("abc")["input_ids"]
    assert loaded.chat_template == byte_tokenizer.chat_template


def test_a_folder_without_a_tokenizer_is_an_error_naming_the_source(tmp_path):
    with pytest.raises(CalibrationModelError) as caught:
        load_tokenizer(tmp_path, "me/model@main")

    assert str(caught.value).startswith("me/model@main: ")
    assert str(caught.value).endswith(
        "\nCalibration loads a tokenizer with transformers; see what it needs above."
    )


def test_a_prompt_that_is_too_long_loses_its_beginning(byte_tokenizer):
    asked = asking(samples=1, max_tokens=4, answers="model")

    tokens = calibration_tokens(Table([{"text": "abcdef"}]), asked, byte_tokenizer, seed=0)

    assert byte_tokenizer.decode(tokens.ids[0]) == "<s>def"
    assert tokens.limit == 4


def test_texts_without_data_begin_with_the_prompt_or_the_first_token(byte_tokenizer):
    begun = beginnings(Calibration(source="model", prompt="Q:", samples=3), byte_tokenizer)

    assert [byte_tokenizer.decode(ids) for ids in begun.ids] == ["<s>Q:"] * 3
    assert (begun.rows, begun.limit, begun.end) == ((0, 1, 2), 512, byte_tokenizer.eos_token_id)
    empty = beginnings(Calibration(source="model", samples=1), byte_tokenizer)
    assert byte_tokenizer.decode(empty.ids[0]) == "<s>"
    with pytest.raises(EmptyCalibrationError, match="`prompt` has 3 tokens, and `max_tokens` is 3"):
        beginnings(Calibration(source="model", prompt="Q:", max_tokens=3), byte_tokenizer)


def test_a_row_with_half_a_letter_is_an_error(byte_tokenizer):
    with pytest.raises(CalibrationError) as caught:
        calibration_tokens(Table([{"text": "a\ud800"}]), asking(), byte_tokenizer, seed=0)
    assert str(caught.value) == (
        "calibration on me/data: row 0 has half a letter, which UTF-8 cannot encode.\n"
        "Repair the row, or draw others by `seed`."
    )


@pytest.mark.parametrize("name", ["samples", "max_tokens"])
def test_a_calibration_has_a_bounded_number_of_tokens(name):
    assert getattr(asking(**{name: 1_000_000}), name) == 1_000_000
    with pytest.raises(ValueError, match="less than or equal to 1000000"):
        asking(**{name: 1_000_001})


class Counting:
    """A tokenizer that tells how many letters it was given at once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.n_letters: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, some: list[str], **options: Any) -> Any:
        self.n_letters.append(sum(map(len, some)))
        return self._tokenizer(some, **options)


def test_long_texts_are_tokenised_one_by_one(byte_tokenizer):
    """All at once took 100 times the memory of the texts: 6.7 GB for 64 MB."""
    counting = Counting(byte_tokenizer)
    table = Table([{"text": "ab" * n} for n in (1, 30_000, 10_000, 10_000, 10_000, 20_000)])

    tokens = calibration_tokens(table, asking(samples=6, max_tokens=4), counting, seed=0)

    assert counting.n_letters == [2, 60_000, 40_000, 20_000, 40_000]
    assert [len(ids) for ids in tokens.ids] == [3, 4, 4, 4, 4, 4]
    assert (tokens.n_truncated, tokens.n_cut) == (5, 2 * 80_000 - 5 * 3)


def test_short_texts_are_tokenised_together(byte_tokenizer, monkeypatch):
    table = Table([{"text": "abcdef" * i} for i in range(1, 8)])
    whole = calibration_tokens(table, asking(samples=7), byte_tokenizer, seed=0)
    for n_letters in (1, 6, 18, 30, 1000):
        monkeypatch.setattr(texts, "LETTERS_AT_ONCE", n_letters)
        assert calibration_tokens(table, asking(samples=7), byte_tokenizer, seed=0) == whole


def test_a_text_that_takes_very_much_memory_is_refused(byte_tokenizer):
    table = Table([{"text": "a"}, {"text": "a" * 10_000_001}])

    with pytest.raises(CalibrationError) as caught:
        calibration_tokens(table, asking(), byte_tokenizer, seed=0)

    assert str(caught.value) == (
        "calibration on me/data: row 1 has a text of 10,000,001 letters, the limit is 10,000,000.\n"
        "Split the row, or draw others by `seed`."
    )


def test_texts_that_together_take_very_long_are_refused_before_any_is_tokenised(
    byte_tokenizer, monkeypatch
):
    """15 texts of 9 million letters took three minutes and 3 GB."""
    monkeypatch.setattr(texts, "MAX_LETTERS_TOGETHER", 100)
    monkeypatch.setattr(texts, "MAX_LETTERS_ON_AVERAGE", 12)
    counting, rows = Counting(byte_tokenizer), [{"text": "a" * 25}] * 4

    assert calibration_tokens(Table(rows), asking(samples=4), byte_tokenizer, seed=0).n_tokens
    with pytest.raises(CalibrationError) as caught:
        calibration_tokens(Table([*rows, *rows]), asking(samples=8), counting, seed=0)

    assert str(caught.value) == (
        "calibration on me/data: up to row 4 there are 125 letters, the limit is 100."
        "\nSet fewer `samples`, or draw shorter texts."
    )
    assert counting.n_letters == []
    monkeypatch.setattr(texts, "MAX_LETTERS_ON_AVERAGE", 25)
    assert calibration_tokens(Table([*rows, *rows]), asking(samples=8), counting, seed=0).n_tokens


class Tokens(list[int]):
    """Tokens that tell whether something holds them."""


class Watching(Counting):
    """A tokenizer that counts the texts whose tokens something holds while it makes others."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self.made: list[weakref.ref[Tokens]] = []
        self.n_held: list[int] = []

    def __call__(self, some: list[str], **options: Any) -> Any:
        self.n_held.append(sum(one() is not None for one in self.made))
        ids = [Tokens(one) for one in super().__call__(some, **options)["input_ids"]]
        self.made += map(weakref.ref, ids)
        return {"input_ids": ids}


@pytest.mark.parametrize("settings", [{}, {"dataset": None, "text": None, "task": "any"}])
def test_the_tokens_of_a_long_text_are_not_held_while_another_is_tokenised(
    settings, byte_tokenizer
):
    watching = Watching(byte_tokenizer)
    rows = Table([{"text": "ab" * 30_000}] * 3)

    tokens = calibration_tokens(rows, asking(max_tokens=4, **settings), watching, seed=0)

    assert [len(ids) for ids in tokens.ids] == [4, 4, 4]
    assert watching.n_held == [0, 0, 0]
