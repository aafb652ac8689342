"""Tensors put together row by row, against a naive loop."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lewis_hub.errors import MergeError
from lewis_hub.merge.alignment import Alignment, Override
from lewis_hub.merge.runners import Runner, threads

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LACKS = -1
IDS = {  # 9 rows of the merge
    "base": [0, 1, 2, 3, 4, 5, LACKS, LACKS, LACKS],
    "x": [3, 2, 1, 0, LACKS, 4, 5, 6, LACKS],
    "y": [0, 1, LACKS, 9, 8, LACKS, 7, LACKS, LACKS],
}
ROWS = {"base": 6, "x": 7, "y": 8}  # y's ids 8 and 9 lie beyond its rows


def model(seed, n_rows, dtype=torch.bfloat16, width=33):
    generator = torch.Generator().manual_seed(seed)
    names = {EMBEDDING: (n_rows, width), HEAD: (n_rows, width), "model.layers.0.q.weight": (8, 4)}
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in names.items()}


def alignment(**more):
    ids = {label: np.array(rows, np.int32) for label, rows in IDS.items()}
    told = {"tensors": frozenset({EMBEDDING, HEAD}), "n_rows": 9, "ids": ids, "base": "base"}
    return Alignment(**(told | more))


def naive(sources, name, base, overrides):
    """Row by row, in words: own row, else the base's, else the mean; (n_sources, 9, width)."""
    tables = {label: tensors[name].float() for label, tensors in sources.items() if name in tensors}
    whole = next(iter(tables.values())).double().mean(dim=0).float()
    made = []
    for label in sources:
        for row in range(9):
            having = {
                s: tables[s][IDS[s][row]] for s in tables if 0 <= IDS[s][row] < len(tables[s])
            }
            override = overrides.get(row)
            if label in having and not (override and override.is_forced):
                made.append(having[label])
            elif override:
                nothing = torch.zeros(whole.shape)
                made.append(tables[override.source][override.row] if override.source else nothing)
            elif base in having:
                made.append(having[base])
            elif having:
                made.append(torch.stack(list(having.values())).double().mean(dim=0).float())
            else:
                made.append(whole)
    return torch.stack(made).reshape(len(sources), 9, -1)


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16,) * 3, (torch.float32, torch.float16, torch.bfloat16)]
)
@pytest.mark.parametrize(
    "overrides",
    [{}, {1: Override("y", 5, is_forced=True), 4: Override("x", 0), 7: Override(None)}],
)
@pytest.mark.parametrize("lacking", [None, HEAD])
def test_every_row_is_that_of_the_naive_rule(zoo, dtypes, overrides, lacking):
    tensors = {
        label: model(i, ROWS[label], dtype)
        for i, (label, dtype) in enumerate(zip(ROWS, dtypes, strict=True))
    }
    if lacking:
        del tensors["x"][lacking]
        overrides = {row: o for row, o in overrides.items() if o.source != "x"}
    base, *experts = (zoo.source(label, one) for label, one in tensors.items())
    settings = zoo.settings(
        "task_arithmetic",
        base,
        experts,
        missing="base",
        dtype="float32",
        parameters={"weight": 0.5},
        alignment=alignment(overrides=overrides),
    )

    merged = zoo.merge(settings).tensors

    for name in (EMBEDDING, HEAD):
        start, *others = naive(tensors, name, "base", overrides)
        expected = start + (0.5 * (others[0] - start) + 0.5 * (others[1] - start))
        assert torch.allclose(merged[name], expected, rtol=0, atol=1e-6)


def test_a_base_that_the_method_does_not_take_stands_in_for_a_head_but_gives_no_single_row(zoo):
    tensors = {label: model(i, ROWS[label]) for i, label in enumerate(ROWS)}
    del tensors["x"][HEAD]
    base, x, y = (zoo.source(label, one) for label, one in tensors.items())

    def settings(source):
        told = alignment(overrides={1: Override(source, 2, is_forced=True)})
        common = {"missing": "base", "dtype": "float32"}
        return zoo.settings("linear", base, [x, y], alignment=told, **common)

    merged = zoo.merge(settings("x")).tensors[HEAD]

    start, theirs = naive({label: tensors[label] for label in ("base", "y")}, HEAD, "base", {})
    assert torch.allclose(merged, (start + theirs) / 2, rtol=0, atol=1e-6)
    with pytest.raises(MergeError, match="a token takes its row from base, which is not merged"):
        zoo.merge(settings("base"))


def test_without_a_base_the_mean_stands_in(zoo):
    tensors = {label: model(i, ROWS[label]) for i, label in enumerate(ROWS)}
    sources = [zoo.source(label, one) for label, one in tensors.items()]
    settings = zoo.settings(
        "linear", None, sources, alignment=alignment(base=None), dtype="float32"
    )

    merged = zoo.merge(settings).tensors[EMBEDDING]

    expected = naive(tensors, EMBEDDING, None, {}).mean(dim=0)
    assert torch.allclose(merged, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["ties", "dare_ties", "della", "sce"])
def test_the_bytes_are_the_same_on_every_runner_and_shard_size(zoo, method):
    base, *experts = (
        zoo.source(label, model(i, ROWS[label], width=5000), {"density": 0.4} if i else {})
        for i, label in enumerate(ROWS)
    )
    settings = zoo.settings(method, base, experts, alignment=alignment())
    runners = [
        Runner(),
        threads(2),
        Runner(3, large_elements=100),
        Runner(2, large_elements=9000),
    ]

    first, *others = (
        zoo.merge(settings, f"{i}-{size}", shard=size, runner=runner).tensors
        for i, runner in enumerate(runners)
        for size in (1, 10**9)
    )

    assert first[EMBEDDING].shape == (9, 5000)
    for other in others:
        assert all(torch.equal(other[name], tensor) for name, tensor in first.items())


def test_kernel_and_definition_agree_on_assembled_tensors(zoo, monkeypatch):
    from lewis_hub.merge import chunks

    base, *experts = (
        zoo.source(label, model(i, ROWS[label]), {"density": 0.4} if i else {})
        for i, label in enumerate(ROWS)
    )
    settings = zoo.settings("ties", base, experts, alignment=alignment())
    by_kernel = zoo.merge(settings, "kernel").bytes

    monkeypatch.delitem(chunks.FUSED, "ties")

    assert zoo.merge(settings, "definition").bytes == by_kernel


def test_the_map_is_part_of_the_digest(zoo):
    base, *experts = (zoo.source(label, model(i, ROWS[label])) for i, label in enumerate(ROWS))

    def digest(**more):
        settings = zoo.settings("ties", base, experts, alignment=alignment(**more))
        return zoo.merge(settings).plan.digest

    other = {label: np.array(rows, np.int32) for label, rows in IDS.items()}
    other["x"][0] = 1
    forced = {0: Override(None, is_forced=True)}
    digests = [digest(), digest(overrides=forced), digest(ids=other), digest(base=None)]
    assert len(set(digests)) == 4
    assert digest() == digests[0]


def test_rows_that_lie_as_they_are_needed_are_read_as_they_lie(zoo):
    base, *experts = (zoo.source(label, model(i, 9)) for i, label in enumerate(ROWS))
    ids = {label: np.arange(9, dtype=np.int32) for label in IDS}
    plain = zoo.merge(zoo.settings("ties", base, experts), "plain")
    settings = zoo.settings("ties", base, experts, alignment=replace(alignment(), ids=ids))

    aligned = zoo.merge(settings, "aligned")

    assert aligned.plan == plain.plan
    assert aligned.bytes == plain.bytes
