"""Methods that merge by statistics, from the recipe to the card, on the zoo."""

import importlib.util
import json
import shutil

import pytest
import torch
from statistical_merges import (
    DOWN,
    GUIDE,
    MODELS,
    NORM,
    TEXT,
    Q,
    Recorder,
    merge,
    merge_whole_and_in_shards,
    recipe,
    weights,
    write_adapter,
    zoo_weights,
)
from transformers import LlamaConfig, LlamaForCausalLM

import lewis_hub
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.errors import LewisHubError, OutputError, RecipeError
from lewis_hub.methods.registry import methods
from lewis_hub.recipe.read import parse_recipe
from lewis_hub.recipe.rules import STATISTICAL
from lewis_hub.workflow.examine import plain_twin
from lewis_hub.workflow.resources import Execution

RECIPE = MODELS + "merge_method: regmean\n"
PLAIN = RECIPE.replace("regmean", "ties")
TRIM = "parameters: {density: 0.2, trim: activation}\n"


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_a_merge_by_regmean_is_nearer_to_each_expert_on_its_own_texts(api, tmp_path):
    found = {n: t.float() for n, t in weights(merge(tmp_path / "out", RECIPE)).items()}

    base, *experts = (zoo_weights(n) for n in ("base", "expert-reverse", "expert-cipher"))
    mean = {n: sum(expert[n] for expert in experts) / 2 for n in base}
    torch.testing.assert_close(found[NORM], mean[NORM], rtol=1e-2, atol=1e-2)
    assert (found[Q] - mean[Q]).norm() > 0.05 * (mean[Q] - base[Q]).norm()
    assert not (tmp_path / "out" / ".scratch").exists()
    assert sorted(path.name for path in (tmp_path / "out" / "lewis").iterdir()) == [
        *("cost.json", "lock.json", "provenance.json", "recipe.yaml", "report.html"),
    ]
    assert not (tmp_path / "out" / "mergekit_config.yml").exists()
    lock = json.loads((tmp_path / "out" / "lewis" / "lock.json").read_text())
    assert [one["name"] for one in lock["calibration"]] == ["zoo/reverse", "zoo/cipher"]


USUAL = (
    "Merge models with matrices of the usual proportions, or choose a method that needs no second "
    "moments of their inputs."
)

ON_ROWS = ", calibration: {dataset: rows.jsonl, text: '{text}', samples: 1}"


@pytest.fixture
def wide(tmp_path):
    """The problems of a merge of two models of one wide matrix, by a method."""
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')

    def problems(method, calibration="", n_units=60_000):
        config = LlamaConfig(
            vocab_size=390,
            hidden_size=4,
            intermediate_size=n_units,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
        )
        for name in ("base", "expert"):
            shutil.copytree(zoo_folder() / "base", tmp_path / name)
            LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / name)
        models = f"models: [{{model: expert{calibration}}}]"
        text = f"{{base_model: base, merge_method: {method}, {models}}}"
        return lewis_hub.check(parse_recipe(text, "recipe.yaml").placed_in(tmp_path)).problems

    return problems


def test_a_model_whose_second_moments_are_far_larger_than_its_weights_is_refused(wide):
    """In a model of 2.4 MB a matrix with 100,000 inputs took 6.3 GB."""
    problems = wide("regmean", ON_ROWS)

    assert problems[:2] == tuple(
        f"{name} has 1.4 MB of weights, and its second moments take 1.8 GB. {USUAL}"
        for name in ("base", "expert")
    )


def test_a_model_whose_second_moments_have_very_many_parts_is_refused(wide):
    """A prime number of inputs has no equal parts but single ones, which took minutes."""
    assert wide("regmean", ON_ROWS, 20_011)[:2] == tuple(
        f"{name} has a matrix with 20,011 inputs, whose second moments are in 20,011 parts. {USUAL}"
        for name in ("base", "expert")
    )


@pytest.mark.parametrize(
    ("method", "n_units", "n_bytes"),
    [("wudi", 60_000, "129.6 GB"), ("regmean, parameters: {inputs: merged}", 8192, "4.8 GB")],
)
def test_models_of_a_matrix_that_takes_far_more_memory_to_fit_are_refused(
    wide, method, n_units, n_bytes
):
    """`wudi` took 8.3 GB and 66 s for models of 388 kB, of which `check` told 0.9 GB."""
    [problem] = wide(method, ON_ROWS if n_units == 8192 else "", n_units)

    assert problem.startswith(f"The method takes {n_bytes} of memory for the inputs of one matrix")
    assert problem.endswith(f" of weights. {USUAL}")


def test_a_merge_can_be_made_again_from_its_lock(api, tmp_path):
    output = merge(tmp_path / "out", RECIPE)

    verdict = lewis_hub.verify(lewis_hub.ModelReference(name=str(output)), rebuild=True)

    assert verdict.problems == ()
    assert lewis_hub.merge_models(recipe(RECIPE), output).status == "unchanged"


def test_statistics_are_gathered_on_a_tasks_items_which_are_carried_and_never_scored(api, tmp_path):
    own = f"calibration: {{task: zoo_reverse, include: {zoo_folder() / 'tasks'}, samples: 32}}\n"
    written_out = f"calibration: {{dataset: zoo/reverse, text: {TEXT}, samples: 32}}\n"
    models = "models: [{model: zoo/expert-reverse}, {model: zoo/expert-cipher}]\n"
    text = f"base_model: zoo/base\nmerge_method: regmean\n{models}"
    output = merge(tmp_path / "task", text + own)

    assert bytes_of(output) == bytes_of(merge(tmp_path / "dataset", text + written_out))
    lock = json.loads((output / "lewis" / "lock.json").read_text())
    assert lock["recipe"]["calibration"]["include"] == "tasks"
    assert "task zoo_reverse" in [one["name"] for one in lock["calibration"]]
    assert (output / "lewis" / "tasks" / "zoo_reverse.yaml").exists()
    assert "`task zoo_reverse`" in (output / "README.md").read_text()
    reference = lewis_hub.ModelReference(name=str(output))
    with pytest.raises(OutputError, match="it was calibrated on its own task files, and those"):
        lewis_hub.verify(reference, rebuild=True)
    allowed = Execution(allow_code=True)
    assert lewis_hub.verify(reference, allowed, rebuild=True).problems == ()
    scored = f"evaluate: {{tasks: [zoo_reverse], include: {zoo_folder() / 'tasks'}}}\n"
    on_scored = own.replace("samples", "split: test, allow_overlap: false, samples")
    refusal = "the task scores split `test`, so calibration must not use it"
    with pytest.raises(LewisHubError, match=refusal):
        merge(tmp_path / "scored", text + on_scored + scored)


def test_the_card_tells_what_was_measured_and_on_what(api, tmp_path):
    card = (merge(tmp_path / "out", RECIPE) / "README.md").read_text()

    card = " ".join(card.split())
    assert "[RegMean on task vectors](<https://arxiv.org/abs/2212.09849>)" in card
    assert "weighted by second moments of their inputs on calibration texts of that expert" in card
    assert "zoo/cipher" in card
    assert "jin2023dataless" in card
    assert "on other tasks the merge may be no better than a merge without them" in card


@pytest.mark.parametrize(
    "text",
    [
        *(pytest.param(text, marks=pytest.mark.slow) for text in (RECIPE, RECIPE + GUIDE)),
        PLAIN + TRIM,
    ],
)
def test_the_bytes_are_the_same_on_any_runner_in_any_shards_and_on_any_number_of_threads(
    api, tmp_path, text
):
    whole, parts = merge_whole_and_in_shards(tmp_path, text)

    assert len(bytes_of(parts)) > 2
    found = weights(parts)
    for name, tensor in weights(whole).items():
        assert torch.equal(found[name], tensor)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the ray extra")
@pytest.mark.filterwarnings("default")  # Ray's own
def test_ray_makes_the_same_bytes(api, tmp_path):
    whole = merge(tmp_path / "whole", RECIPE, Execution(runner="inline"))

    assert bytes_of(merge(tmp_path / "ray", RECIPE, Execution(runner="ray"))) == bytes_of(whole)


def test_an_interrupted_merge_takes_up_its_statistics(api, tmp_path):
    whole, first, second = (
        merge(tmp_path / "whole", RECIPE),
        Recorder("Merging"),
        Recorder(),
    )
    with pytest.raises(KeyboardInterrupt):
        merge(tmp_path / "out", RECIPE, progress=first)

    found = merge(tmp_path / "out", RECIPE, progress=second)

    assert first.totals["Gathering statistics"] > 1000
    assert second.totals["Gathering statistics"] == 0
    assert bytes_of(found) == bytes_of(whole)


@pytest.mark.parametrize(
    "text",
    [
        RECIPE + GUIDE,
        pytest.param(PLAIN + TRIM.replace("density: 0.2, ", "") + GUIDE, marks=pytest.mark.slow),
    ],
)
def test_a_guides_pass_leaves_the_statistics_that_a_pass_of_their_own_would(
    api, tmp_path, monkeypatch, text
):
    monkeypatch.chdir(tmp_path)
    both, known = Recorder(), Recorder()

    found = merge(tmp_path / "both", text, progress=both)

    lewis_hub.calibrate(recipe(text), "importance")
    apart = merge(tmp_path / "apart", text, progress=known)
    n_tokens = known.totals["Gathering statistics"]
    assert both.totals["Gathering statistics"] == known.totals["Calibrating"] == 0
    assert both.totals["Calibrating"] == 2 * n_tokens > 2000  # once through the base too
    assert bytes_of(found) == bytes_of(apart)
    locks = [json.loads((one / "lewis" / "lock.json").read_text()) for one in (found, apart)]
    assert locks[0] == locks[1]


@pytest.mark.slow
def test_a_guides_pass_that_was_interrupted_leaves_the_statistics_of_what_it_measured(
    api, tmp_path
):
    whole = Recorder()
    expected = merge(tmp_path / "whole", RECIPE + GUIDE, progress=whole)
    n_tokens, rerun = whole.totals["Calibrating"], Recorder()
    with pytest.raises(KeyboardInterrupt):
        merge(
            tmp_path / "out",
            RECIPE + GUIDE,
            progress=Recorder("Calibrating", 0.9 * n_tokens),
        )
    scratch = tmp_path / "out.partial" / ".scratch" / "statistics"
    assert len(list(scratch.rglob("grams.json"))) == 1
    assert len({path.parent for path in scratch.rglob("*.safetensors")}) == 2

    found = merge(tmp_path / "out", RECIPE + GUIDE, progress=rerun)

    assert 0 < rerun.totals["Calibrating"] < n_tokens / 3
    assert rerun.totals["Gathering statistics"] == 0
    assert bytes_of(found) == bytes_of(expected)


@pytest.mark.slow
def test_other_texts_are_gathered_anew_and_give_other_weights(api, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        merge(tmp_path / "out", RECIPE, progress=Recorder("Merging"))
    fewer, told = RECIPE.replace("samples: 32", "samples: 16"), Recorder()

    found = merge(tmp_path / "out", fewer, progress=told)

    assert told.totals["Gathering statistics"] > 500
    assert bytes_of(found) == bytes_of(merge(tmp_path / "fewer", fewer))
    assert bytes_of(found) != bytes_of(merge(tmp_path / "whole", RECIPE))


@pytest.mark.slow
def test_a_guides_densities_are_heard_and_calibration_may_be_the_recipes(api, tmp_path):
    common = f"calibration: {{dataset: zoo/reverse, text: {TEXT}, samples: 8}}\n"
    text = "\n".join(line for line in RECIPE.splitlines() if "calibration" not in line)

    plain = weights(merge(tmp_path / "plain", f"{text}\n{common}"))
    guided = weights(merge(tmp_path / "guided", f"{text}\n{common}{GUIDE}"))

    assert torch.equal(plain[NORM], guided[NORM])  # density 1
    assert not torch.equal(plain[Q], guided[Q])


def test_trimming_by_activation_changes_the_matrices_of_the_blocks_alone(api, tmp_path):
    by_activation = merge(tmp_path / "activation", PLAIN + TRIM)
    found = weights(by_activation)
    plain = weights(merge(tmp_path / "plain", PLAIN + "parameters: {density: 0.2}\n"))

    differing = {name for name in plain if not torch.equal(found[name], plain[name])}
    assert differing == {n for n in plain if ".layers." in n and plain[n].dim() == 2}
    assert (
        "ranked by magnitude times the activation norm" in (by_activation / "README.md").read_text()
    )
    assert not (by_activation / "mergekit_config.yml").exists()


def test_an_adapter_counts_as_the_expert_that_it_makes(api, tmp_path):
    change = write_adapter(tmp_path / "adapter")
    text = RECIPE.replace("zoo/expert-reverse", str(tmp_path / "adapter"))

    found = weights(merge(tmp_path / "out", text))

    base, cipher = zoo_weights("base"), zoo_weights("expert-cipher")
    norms = (base[NORM] + cipher[NORM]) / 2
    torch.testing.assert_close(found[NORM].float(), norms, rtol=1e-2, atol=1e-2)
    assert (found[DOWN].float() - base[DOWN]).norm() > 0.1 * change.norm()


SCORED = f"""evaluate:
  tasks: [zoo_reverse]
  include: {zoo_folder() / "tasks"}
  limit: 10
  compare: [uniform]
  gate: {{task: zoo_reverse, metric: "exact_match,none"}}
"""


def test_the_twin_of_regmean_is_the_mean_of_its_task_vectors(api, tmp_path):
    weighted = RECIPE.replace("expert-cipher\n", "expert-cipher\n    parameters: {weight: 3}\n")
    label, twin = plain_twin(recipe(f"{weighted}parameters: {{off_diagonal: 0.3}}\n{SCORED}"))
    alone = twin.model_copy(update={"evaluate": None})
    found = weights(lewis_hub.merge_models(alone, tmp_path / "twin").output)

    reverse, cipher = (zoo_weights(n) for n in ("expert-reverse", "expert-cipher"))
    assert label == "task_arithmetic"
    for name in (Q, NORM):
        mean = (reverse[name] + 3 * cipher[name]) / 4
        torch.testing.assert_close(found[name].float(), mean, rtol=1e-2, atol=1e-3)


def test_the_twin_of_a_trim_by_activation_keeps_all_but_the_statistics():
    label, twin = plain_twin(recipe(PLAIN + TRIM.replace("}", ", lambda: 0.8}") + SCORED))

    assert label == "by_magnitude"
    assert (twin.merge_method, dict(twin.parameters)) == ("ties", {"density": 0.2, "lambda": 0.8})


def test_a_gate_holds_a_merge_by_statistics_against_its_twin(api, tmp_path):
    told = Recorder()
    merged = lewis_hub.merge_models(recipe(RECIPE + SCORED), tmp_path / "out", progress=told)

    assert told.said.count("Loading the benchmarks") == 1  # to look for overlaps, and to score
    assert list(merged.scores.tasks["zoo_reverse"].models) == ["task_arithmetic", "merged"]
    (check,) = merged.gate.checks
    assert (check.against, check.missed) == ("task_arithmetic", False)
    assert check.difference == pytest.approx(check.value - check.other)
    card = (merged.output / "README.md").read_text()
    page = (merged.output / "lewis" / "report.html").read_text()
    twin = "The task arithmetic twin is the same merge without statistics: the mean of the task"
    assert twin in card
    assert twin in page
    assert " is not significantly worse than its task arithmetic twin: " in card


def test_check_counts_the_disk_and_the_memory_of_statistics(api):
    plain, by_activation, regmean = (
        lewis_hub.check(recipe(text)) for text in (PLAIN, PLAIN + TRIM, RECIPE)
    )

    assert plain.problems == by_activation.problems == regmean.problems == ()
    assert plain.disk_bytes < by_activation.disk_bytes < regmean.disk_bytes
    assert plain.memory_bytes < regmean.memory_bytes


def test_methods_that_need_statistics_are_known_when_a_recipe_is_read():
    assert {method.name for method in methods() if method.needs_grams} == STATISTICAL


WITHOUT = "\n".join(line for line in RECIPE.splitlines() if "calibration" not in line) + "\n"
COMMON = f"calibration: {{dataset: zoo/reverse, text: {TEXT}}}\n"
SLICES = """base_model: b
slices: [{sources: [{model: b, layer_range: [0, 1]}, {model: e, layer_range: [0, 1]}]}]
merge_method: regmean
"""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (WITHOUT, "`regmean` needs calibration data, but `zoo/expert-reverse` has none."),
        (WITHOUT.replace("regmean", "ties") + TRIM, "`trim: activation` needs calibration data"),
        (PLAIN + COMMON, "`ties` uses no calibration, and the recipe has no guide."),
        (
            RECIPE + COMMON + f"guide: {{{COMMON.strip()}}}\n",
            "both `calibration` and `guide.calibration` are given.",
        ),
        (SLICES, "`regmean` works with `models` only."),
    ],
)
def test_what_cannot_be_measured_is_refused_on_reading(text, says):
    with pytest.raises(RecipeError) as caught:
        recipe(text)

    assert says in str(caught.value)
