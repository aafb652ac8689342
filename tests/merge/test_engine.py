import hashlib
import json
import os
import time
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from lewis_hub.errors import BrokenCheckpointError, MergeError, NonFiniteError
from lewis_hub.merge import chunks
from lewis_hub.merge.engine import run
from lewis_hub.merge.plan import make_plan
from lewis_hub.merge.runners import Backend, Ray, Runner, parse_runner, threads
from lewis_hub.methods import registry
from lewis_hub.system import n_cores


def test_the_result_is_the_same_on_every_runner(zoo, settings):
    runners = [Runner(), threads(1), threads(2), threads(4), Runner(3, large_elements=100)]
    runners += [threads(8), Runner(30, large_elements=100)]  # shards are made at the same time

    first, *others = (
        zoo.merge(settings, str(i), shard=10_000, runner=r).bytes for i, r in enumerate(runners)
    )

    assert len(first) == 6
    assert all(other == first for other in others)


def test_the_tensors_are_the_same_for_every_shard_size(zoo, settings):
    outcomes = [zoo.merge(settings, str(size), shard=size) for size in (1, 9_000, 10**9)]

    counts = [len(outcome.results) for outcome in outcomes]
    one, *others = (outcome.tensors for outcome in outcomes)
    assert counts == [10, 6, 1]
    for other in others:
        assert set(other) == set(one)
        assert all(torch.equal(other[name], tensor) for name, tensor in one.items())


def test_a_tensor_too_long_to_be_counted_at_once_is_counted_in_parts(zoo, settings, monkeypatch):
    asked = replace(settings, method="ties")
    whole = zoo.merge(asked, "whole").bytes

    monkeypatch.setattr(chunks, "LONGEST_SPAN", 100)

    assert zoo.merge(asked, "in parts").bytes == whole


def test_rows_too_long_to_be_ranked_by_a_kernel_are_left_to_the_definition(zoo, monkeypatch):
    base, expert = (
        zoo.source(label, {"a": zoo.mixed(i)["z"]}, {"density": 0.5})
        for i, label in enumerate("bx")
    )
    asked = zoo.settings("della", base, [expert])
    by_kernel = zoo.merge(asked, "by kernel").bytes

    monkeypatch.setattr(chunks, "LONGEST_ROW", 32)

    assert zoo.merge(asked, "by definition").bytes == by_kernel


def test_counts_and_flags_are_those_of_the_base(zoo, settings):
    merged = zoo.merge(settings).tensors

    assert torch.equal(merged["counts"], zoo.mixed(0)["counts"])
    assert merged["flag"].tolist() == [True, False, True]


def test_experts_equal_to_the_base_give_the_base(zoo):
    sources = [zoo.source(label, zoo.mixed(3), {"density": 0.4}) for label in ("base", "x")]
    base = zoo.source("plain", zoo.mixed(3))

    merged = zoo.merge(zoo.settings("ties", base, sources)).tensors

    assert all(torch.equal(merged[name], tensor) for name, tensor in zoo.mixed(3).items())


def test_what_mergekit_only_needs_to_save_memory_changes_no_byte(zoo, settings):
    told = replace(settings, parameters={"int8_mask": True, "rescale": True})

    assert zoo.merge(told, "told").bytes == zoo.merge(settings, "plain").bytes


def test_results_tell_digest_and_size_of_every_file(zoo, settings):
    outcome = zoo.merge(settings, shard=10_000)

    for name, result in outcome.results.items():
        content = (outcome.folder / name).read_bytes()
        assert result.name == name
        assert result.sha256 == hashlib.sha256(content).hexdigest()
        assert result.n_bytes == len(content)
    assert set(outcome.results) == set(outcome.bytes)


def test_the_index_locates_every_tensor(zoo, settings):
    outcome = zoo.merge(settings, shard=10_000)

    for name, shard in outcome.index["weight_map"].items():
        with safe_open(outcome.folder / shard, "pt") as opened:
            assert opened.get_slice(name).get_shape() == list(outcome.tensors[name].shape)
            assert opened.metadata() == {"format": "pt"}
    assert outcome.index["metadata"] == {
        "total_parameters": 7 * 64 * 33 + 70_000 + 3,
        "total_size": 7 * 64 * 33 * 2 + 70_000 * 8 + 3,
    }


def test_progress_adds_up_to_the_plans_bytes_whether_made_or_kept(zoo, settings):
    told = []
    plan = make_plan(settings, 10_000)
    (zoo.root / "out").mkdir()

    run(plan, zoo.folders, zoo.root / "out", Backend(threads(2)), told.append)
    run(plan, zoo.folders, zoo.root / "out", Backend(threads(2)), told.append)

    assert sum(told) == 2 * plan.n_bytes


def test_a_rerun_keeps_finished_shards_and_makes_the_others_anew(zoo, settings):
    first = zoo.merge(settings, shard=5_000)
    whole = first.bytes
    names = sorted(name for name in whole if name.endswith(".safetensors"))
    (first.folder / names[0]).unlink()
    os.truncate(first.folder / names[1], 100)
    content = bytearray(whole[names[2]])
    content[-1] ^= 1
    (first.folder / names[2]).write_bytes(content)
    (first.folder / f"{names[3]}.done.json").unlink()
    (first.folder / f"{names[4]}.done.json").write_text("{")

    again = zoo.merge(settings, shard=5_000)

    assert again.bytes == whole
    kept = [name for name in names if again.results[name].is_kept]
    assert kept == names[5:]


def test_shards_of_an_older_version_of_the_method_are_not_kept(zoo, settings, monkeypatch):
    older = zoo.merge(settings)
    method = registry.find(settings.method)
    monkeypatch.setitem(
        registry._registry._entries, method.name, replace(method, version=method.version + 1)
    )

    newer = zoo.merge(settings)

    assert not any(result.is_kept for result in newer.results.values())
    assert newer.plan.digest != older.plan.digest  # so scores of the older merge are not reused


def test_shards_of_another_plan_are_not_kept(zoo, settings):
    zoo.merge(settings)

    again = zoo.merge(zoo.settings("ties", settings.base, settings.experts))

    assert [result.is_kept for result in again.results.values()] == [False]


def test_a_shard_is_only_noted_when_it_is_whole(zoo, settings):
    broken = zoo.mixed(1)
    broken["z"][3, 3] = float("nan")
    bad = zoo.source("bad", broken)
    asked = zoo.settings("dare_ties", settings.base, [settings.experts[0], bad])

    with pytest.raises(NonFiniteError):
        zoo.merge(asked, shard=10_000)

    notes = sorted(path.name for path in (zoo.root / "out").glob("*.done.json"))
    shards = sorted(path.name for path in (zoo.root / "out").glob("*.safetensors"))
    assert notes == [f"{name}.done.json" for name in shards[:-1]]
    note = json.loads((zoo.root / "out" / notes[0]).read_text())
    assert note["n_bytes"] == (zoo.root / "out" / shards[0]).stat().st_size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", ["base", "x"])
@pytest.mark.parametrize("method", ["ties", "linear"])
def test_nan_and_infinity_name_tensor_and_source(zoo, dtype, bad, place, method):
    values = {label: torch.ones(5000, dtype=dtype) for label in ("base", "x", "y")}
    values[place][4321] = bad
    base, *experts = (zoo.source(label, {"a.weight": v}) for label, v in values.items())
    if method == "linear":
        base, experts = None, [base, *experts]

    with pytest.raises(NonFiniteError) as caught:
        zoo.merge(zoo.settings(method, base, experts))

    remedies = {
        ("ties", "base"): ".",
        ("ties", "x"): ", leave it out, or use the base's values there with `--allow-nan`.",
    }
    assert str(caught.value) == (
        f"a.weight holds NaN or infinity in {place}.\nUse another revision of that model"
        + remedies.get((method, place), ", or leave it out.")
    )


@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
def test_a_result_that_overflows_is_told(zoo, method):
    base, x = (zoo.source(label, {"a": torch.full((9,), 60_000.0)}) for label in ("base", "x"))
    common = {"normalize": False, "weight": 2.0}
    sources = (base, [zoo.source("y", {"a": torch.full((9,), 65_000.0)})])
    sources = (None, [base, x]) if method == "linear" else sources

    with pytest.raises(NonFiniteError) as caught:
        zoo.merge(zoo.settings(method, *sources, dtype="float16", parameters=common))

    assert str(caught.value) == (
        "a holds NaN or infinity in the merged model.\n"
        "It does not fit into F16: lower the weights, or choose `dtype: bfloat16`."
    )


def test_a_source_that_changed_since_the_check_is_told(zoo, settings):
    os.truncate(zoo.folders["y"] / "model.safetensors", 10_000)

    with pytest.raises(BrokenCheckpointError, match="y: model.safetensors: it ends inside"):
        zoo.merge(settings, runner=threads(2))


def test_a_method_without_a_kernel_runs_by_its_definition(zoo, settings, monkeypatch):
    monkeypatch.setattr(registry._registry, "_entries", dict(registry._registry._entries))

    @registry.register("boldest")
    def boldest(base, task_vectors, *, weights, lambda_=1.0):
        """Keep, entry by entry, the task vector that moved most."""
        most = task_vectors.abs().argmax(dim=0, keepdim=True)
        return base + lambda_ * task_vectors.gather(0, most)[0]

    experts = [zoo.source(label, zoo.mixed(i)) for i, label in enumerate(("x", "y"), start=1)]
    asked = zoo.settings("boldest", settings.base, experts, parameters={"lambda": 0.5})

    merged = zoo.merge(asked, runner=threads(2))

    defined = zoo.by_definition(merged.plan)
    assert torch.equal(merged.tensors["z"], defined["z"])


def test_a_runner_is_named():
    assert parse_runner("inline") == Runner()
    assert parse_runner("threads:3") == threads(3)
    assert parse_runner("threads").n_workers == n_cores()
    assert parse_runner("ray") == Ray(None)


@pytest.mark.parametrize("name", ["ray:2", "threads:", "threads:0", "threads:x", "inline:2", ""])
def test_an_unknown_runner_is_refused(name):
    with pytest.raises(MergeError) as caught:
        parse_runner(name)

    assert str(caught.value) == (
        f"runner: there is no runner `{name}`.\nWrite `inline`, `threads`, `threads:N` or `ray`."
    )


def test_after_an_error_a_runner_begins_nothing_new():
    begun = []

    def work(i):
        begun.append(i)
        if i == 2:
            raise KeyError(i)
        time.sleep(0.005)
        return i

    with pytest.raises(KeyError):
        list(threads(1).map(work, range(1000)))

    assert len(begun) < 1000
