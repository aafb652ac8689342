"""The rows of new embeddings, against plain loops."""

import pytest
import torch

from lewis_hub.checkpoint.header import TensorHeader
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.errors import MergeError
from lewis_hub.merge.token_matches import TokenMatches, match, spell
from lewis_hub.merge.transplant import (
    CHUNK,
    MeanRows,
    RowOrigins,
    TransplantSettings,
    WeightedRows,
    mean_row,
    new_table,
    row_origins,
    token_tables,
)
from lewis_hub.tokenizer import Vocabulary


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def header(name, *shape, dtype="BF16"):
    return TensorHeader(name, dtype, shape, "model.safetensors", 0, 0)


def checkpoint(*headers):
    return Checkpoint("org/model", {one.name: one for one in headers})


def words(label, *tokens):
    return Vocabulary(label, {token: i for i, token in enumerate(tokens) if token}, {}, None)


def test_copied_rows_are_exact_and_others_are_weighted_sums():
    table = drawn(10, 6)
    origins = RowOrigins(5, {0: 7, 3: 2}, (1, 4), 5, 2)
    rows = WeightedRows(torch.tensor([[0, 9, 4], [5, 5, 0]]), drawn(2, 3, seed=1))

    made = new_table(table, origins, rows, [0, 1, 2, 3])

    assert torch.equal(made[0], table[7])
    assert torch.equal(made[3], table[2])
    for place, row in enumerate(origins.approximated):
        expected = sum(rows.weights[place, j] * table[rows.rows[place, j]] for j in range(3))
        torch.testing.assert_close(made[row], expected)
    torch.testing.assert_close(made[2], table[:4].double().mean(0).float())


def test_means_of_pieces():
    table = drawn(10, 6)
    pieces = {5: (1, 2, 3), 2: (4,), 3: (0, 9)}
    origins = RowOrigins(6, {0: 0, 1: 1, 4: 4}, (2, 3, 5), 6, 3)

    made = new_table(table, origins, MeanRows.of(pieces), list(range(10)))

    for row, own in pieces.items():
        torch.testing.assert_close(made[row], table[list(own)].mean(0))


def test_one_mean_of_many_rows_makes_only_its_part_wide():
    """A donor's tokenizer.json of 6 MB with one long token took 3.2 GB."""
    means = MeanRows([(1,)] * 4096 + [(2,) * 500])

    assert [means.part(first).rows.shape for first in (0, 4096)] == [(4096, 1), (1, 500)]


def test_the_mean_of_many_rows_is_that_of_float64():
    table = drawn(CHUNK * 2 + 5, 3) + 100

    found = mean_row(table, list(range(1, len(table))))

    assert found.shape == (1, 3)
    torch.testing.assert_close(found[0], table[1:].double().mean(0).float())


def test_a_bias_follows_its_head():
    head, bias = drawn(8, 4), drawn(8, seed=1)
    origins = RowOrigins(3, {0: 5}, (1,), 3, 1)
    rows = WeightedRows(torch.tensor([[2, 3]]), torch.tensor([[0.5, 2.0]]))
    hidden = drawn(4, seed=2)

    made = [new_table(one, origins, rows, list(range(8))) for one in (head, bias)]

    logits = head @ hidden + bias
    expected = torch.stack([logits[5], 0.5 * logits[2] + 2 * logits[3], logits.mean()])
    torch.testing.assert_close(made[0] @ hidden + made[1], expected)


def test_padding_is_the_models_padding_or_the_mean():
    # the model has tokens a, b and two rows of padding; the donor b, nothing, nothing, c, nothing
    model = spell(words("model", "a", "b"), {}, 4)
    donor = spell(words("donor", "b", "", "", "c"), {}, 6)

    found = row_origins(model, donor, match(model, donor), [3])

    assert found.copied == {0: 1, 2: 2}  # row 1 is a token of the model
    assert (found.n_rows, found.n_tokens, found.n_copied, found.n_means) == (6, 2, 1, 0)
    assert not found.keeps(4)


def test_a_table_stays_if_every_row_does():
    model = spell(words("model", "a", "b"), {}, 4)

    found = row_origins(model, model, match(model, model), [])

    assert found.keeps(4)
    assert not found.keeps(5)
    swapped = row_origins(model, model, TokenMatches({0: 1, 1: 0}, ()), [])
    assert not swapped.keeps(4)


def test_tables_are_found_by_their_rows():
    found = token_tables(
        checkpoint(
            header("lm_head.bias", 50),
            header("lm_head.weight", 50, 8),
            header("model.embed_tokens.weight", 50, 8),
            header("model.layers.0.mlp.up_proj.weight", 50, 8),
            header("model.norm.weight", 8),
        ),
        50,
    )

    assert [table.name for table in found.inputs] == ["model.embed_tokens.weight"]
    assert {table.name for table in found.heads} == {"lm_head.weight", "lm_head.bias"}
    assert found.matrix(is_head=True).name == "lm_head.weight"
    tied = token_tables(checkpoint(header("model.embed_tokens.weight", 50, 8)), None)
    assert tied.matrix(is_head=True).name == "model.embed_tokens.weight"


def test_embeddings_that_encoder_and_decoder_share_are_inputs():
    found = token_tables(
        checkpoint(header("shared.weight", 50, 8), header("lm_head.weight", 50, 8)), 50
    )

    assert [table.name for table in found.inputs] == ["shared.weight"]
    assert [table.name for table in found.heads] == ["lm_head.weight"]


def test_the_bias_of_a_masked_model_is_a_table():
    found = token_tables(
        checkpoint(
            header("bert.embeddings.word_embeddings.weight", 50, 8),
            header("bert.embeddings.position_embeddings.weight", 64, 8),
            header("cls.predictions.bias", 50),
            header("cls.predictions.transform.dense.bias", 8),
        ),
        50,
    )

    names = {"bert.embeddings.word_embeddings.weight", "cls.predictions.bias"}
    assert {table.name for table in found.all} == names


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        (
            [header("model.norm.weight", 8)],
            "org/model: it has no token embeddings with as many rows as its config.json has tokens",
        ),
        (
            [header("model.embed_tokens.weight", 50, 8, dtype="I8")],
            "its embeddings model.embed_tokens.weight are I8, not bfloat16, float16 or float32",
        ),
        (
            [
                header("model.embed_tokens.weight", 50, 8),
                header("model.embed_tokens_per_layer.weight", 48, 32),
            ],
            r"model.embed_tokens_per_layer.weight of shape \[48, 32\] has tokens, too, beside",
        ),
        (
            [header("model.embed_tokens.weight", 50, 8), header("final_logits_bias", 1, 50)],
            r"final_logits_bias of shape \[1, 50\] has tokens, too",
        ),
        (
            [
                header("model.embed_tokens.weight", 50, 8),
                header("model.layers.3.embed_tokens.weight", 50, 8),
            ],
            "model.layers.3.embed_tokens.weight of shape",
        ),
    ],
)
def test_other_tables_are_refused(headers, message):
    with pytest.raises(MergeError, match=message):
        token_tables(checkpoint(*headers), 50)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "nearest"}, "method: there is no `nearest`.\nChoose one of `omp`, `mean`, `su"),
        ({"k": 0}, "k: a combination of 0 tokens is none"),
    ],
)
def test_settings_are_checked(given, message):
    with pytest.raises(MergeError) as caught:
        TransplantSettings(**given)

    assert str(caught.value).startswith(message)
