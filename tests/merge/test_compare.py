import pytest
import torch

from lewis_hub.merge.compare import compare, passed_over

WIDE = torch.zeros(10, 4)
BASE = {
    "model.embed_tokens.weight": WIDE,
    "model.layers.0.q.weight": torch.zeros(4, 4),
    "model.layers.1.q.weight": torch.zeros(4, 4),
    "steps": torch.zeros(2, dtype=torch.int64),
}


def mismatches(zoo, expert, base=BASE):
    copies = [{name: tensor.clone() for name, tensor in one.items()} for one in (base, expert)]
    labels = ("base", "expert")
    ours, theirs = (
        zoo.source(label, one).checkpoint for label, one in zip(labels, copies, strict=True)
    )
    return compare(ours, [theirs])


def changed(**tensors):
    renamed = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in (BASE | renamed).items() if tensor is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sources_that_fit_have_no_mismatch_whatever_their_float_dtypes(zoo, dtype):
    expert = {n: t.to(dtype) if t.is_floating_point() else t for n, t in BASE.items()}

    assert mismatches(zoo, expert) == ()


@pytest.mark.parametrize(
    ("expert", "kind", "says"),
    [
        (
            changed(model__layers__1__q__weight=None),
            "missing",
            "expert lacks model.layers.1.q.weight of the base base. Use models of one architecture "
            "and depth, or set `missing: base` to keep the base's.",
        ),
        (
            changed(model__layers__2__q__weight=torch.zeros(4)),
            "extra",
            "expert has model.layers.2.q.weight, which the base base lacks. Use models of one "
            "architecture and depth, or set `missing: base` to leave them out.",
        ),
        (
            changed(model__layers__0__q__weight=torch.zeros(4, 5)),
            "shape",
            "expert has model.layers.0.q.weight of shape [4, 5], the base base has [4, 4]. A task "
            "vector needs equal shapes: use experts of the same size as the base.",
        ),
        (
            changed(model__embed_tokens__weight=torch.zeros(12, 4)),
            "vocabulary",
            "expert has a vocabulary of 12 rows in model.embed_tokens.weight, the base base has "
            "10. No tokenizer.json of theirs says which token a row is for: bring the expert to "
            "the base's vocabulary with transformers' `model.resize_token_embeddings`.",
        ),
        (
            changed(lm_head__weight=WIDE),
            "tied",
            "expert has a lm_head.weight of its own, the base base ties its head to the "
            "embeddings. Use the base that it was trained from, or set `missing: base` to leave "
            "its head out.",
        ),
        (
            changed(steps=torch.zeros(2)),
            "dtype",
            "expert holds steps as F32, the base base as I64. Numbers and counts cannot be "
            "merged: use experts that were trained from the base.",
        ),
        (
            changed(model__layers__0__q__weight=torch.zeros(4, 4, dtype=torch.float64)),
            "dtype",
            "expert holds model.layers.0.q.weight as F64, which this version does not read. Use "
            "the model in bfloat16, float16 or float32.",
        ),
    ],
)
def test_each_mismatch_is_told_in_a_sentence_with_what_to_do(zoo, expert, kind, says):
    found = mismatches(zoo, expert)[0]

    assert (found.kind, found.source, str(found)) == (kind, "expert", says)


def test_a_base_with_its_own_head_wants_experts_that_have_one(zoo):
    (found,) = mismatches(zoo, BASE, base=changed(lm_head__weight=WIDE))

    assert found.kind == "tied"
    assert str(found).startswith("expert has no lm_head.weight (its head is tied to the embed")


def test_many_missing_tensors_are_one_sentence(zoo):
    many = BASE | {f"model.layers.{i}.k.weight": torch.zeros(1) for i in range(9)}

    (found,) = mismatches(zoo, BASE, base=many)

    assert len(found.tensors) == 9
    assert "lacks 9 tensors (model.layers.0.k.weight, model.layers.1.k.weight, model." in str(found)
    assert "2.k.weight, ...) of the base" in str(found)


def test_a_base_that_cannot_be_read_is_told(zoo):
    eight_bits = changed(model__layers__0__q__weight=torch.zeros(4, 4, dtype=torch.float8_e4m3fn))

    assert {(found.source, found.kind) for found in mismatches(zoo, eight_bits, eight_bits)} == {
        ("base", "dtype"),
        ("expert", "dtype"),
    }


def opened(zoo, **tensors):
    return [zoo.source(label, one).checkpoint for label, one in tensors.items()]


def test_with_missing_base_names_may_differ_and_a_note_says_what_happens(zoo):
    expert = changed(model__layers__1__q__weight=None, lm_head__weight=WIDE.clone())
    base, other = opened(zoo, base=dict(BASE), expert=expert)

    assert compare(base, [other], "base") == ()
    assert passed_over(base, [other]) == (
        "expert lacks model.layers.1.q.weight: the base's stand in.",
        "lm_head.weight of expert are left out: the base has none.",
    )
    assert passed_over(base, [base]) == ()


def test_a_model_without_any_tensor_of_the_base_is_never_merged(zoo):
    base, other = opened(zoo, base=dict(BASE), expert={"h.0.w": torch.zeros(2)})

    (found,) = compare(base, [other], "base")

    assert str(found).startswith("expert has no tensor of the base base. Nothing of it would be")


def test_rows_of_tensors_that_are_put_together_may_differ_and_their_width_may_not(zoo):
    name = "model.embed_tokens.weight"
    base, longer, wider = opened(
        zoo,
        base=dict(BASE),
        longer={**BASE, name: torch.zeros(12, 4)},
        wider={**BASE, name: torch.zeros(12, 5)},
    )

    assert compare(base, [longer], assembled=[name]) == ()
    assert [found.kind for found in compare(base, [wider], assembled=[name])] == ["shape"]
