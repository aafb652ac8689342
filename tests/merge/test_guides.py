"""Every guide with every method that takes densities, from a recipe to merged weights."""

import json
import shutil
import sys
from math import prod

import pytest
import torch
from architectures import CAUSAL, Case, build
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lewis_hub import pipeline
from lewis_hub.calibration.profile import ImportanceProfile
from lewis_hub.display import Silent
from lewis_hub.errors import CheckFailedError, GuideError
from lewis_hub.guides import registry
from lewis_hub.guides.schedule import DensitySchedule, ScheduleSettings, schedule
from lewis_hub.methods.registry import methods
from lewis_hub.recipe.read import parse_recipe
from lewis_hub.workflow.resolve import read_recipe, rules

GUIDES = [guide.name for guide in registry.guides()]
FILE = "model.safetensors"
METHODS = [method.name for method in methods() if method.takes_density]

RECIPE = """base_model: base
models:
  - model: one
    calibration: {dataset: one.jsonl, text: "{text}", samples: 3}
  - model: two
    calibration: {dataset: two.jsonl, text: "{text}", samples: 4, max_tokens: 20}
merge_method: METHOD
seed: 5
guide: {name: GUIDE}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, two experts and their texts."""
    folder = tmp_path_factory.mktemp("models")
    letters = {"</s>": 0} | {
        c: i + 1 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    tokenizer = Tokenizer(models.BPE(letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    config = LlamaConfig(
        vocab_size=len(letters),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for name in ("base", "one", "two"):
        model.save_pretrained(folder / name)
        fast.save_pretrained(folder / name)
        generator = torch.Generator().manual_seed(len(name) + ord(name[0]))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    for name, text in {"one": "the cat sat on the mat", "two": "1 + 1 = 2; 2 + 2 = 4"}.items():
        rows = [json.dumps({"text": f"{text} {i}"}) for i in range(6)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture
def asked(folder, monkeypatch):
    monkeypatch.chdir(folder)

    def recipe(guide, method="ties"):
        text = RECIPE.replace("METHOD", method).replace("GUIDE", guide)
        return parse_recipe(text, "recipe.yaml", rules).placed_in(folder / guide)

    return recipe


@pytest.fixture(scope="module")
def known():
    return {}


@pytest.fixture
def calibrated(asked, folder, known):
    """What a guide measured and decided of the two experts; made once."""

    def once(guide):
        if guide not in known:
            known[guide] = pipeline.calibrate(asked(guide), folder / guide)
        return known[guide]

    return once


def merged(recipe, output):
    result = pipeline.merge_models(recipe, output)
    text = (result.output / "lewis" / "density.json").read_text()
    return load_file(result.output / "model.safetensors"), DensitySchedule.from_json(text)


@pytest.mark.parametrize(
    ("guide", "method"),
    [
        pytest.param(guide, method, marks=pytest.mark.slow if i and j else ())
        for i, guide in enumerate(GUIDES)
        for j, method in enumerate(METHODS)
    ],
)
def test_every_guide_works_with_every_method_that_takes_densities(
    guide, method, calibrated, folder, tmp_path, zoo_class
):
    experts = calibrated(guide).schedule.experts
    zoo = zoo_class(tmp_path)
    base, *others = (zoo.source(n, load_file(folder / n / FILE)) for n in ("base", "one", "two"))

    merged = zoo.merge(
        zoo.settings(method, base, others, seed=5),
        schedule={expert.source: expert.tensors for expert in experts},
    )

    expected = zoo.by_definition(merged.plan)
    assert all(torch.equal(merged.tensors[name], expected[name]) for name in expected)
    planned = {t.output.name: t.densities for shard in merged.plan.shards for t in shard.tensors}
    for name, densities in planned.items():
        assert densities == tuple(expert.density(name) for expert in experts)
    for expert in experts:
        assert len(expert.tensors) == 3 * 7
        assert 0.3 <= min(expert.tensors.values()) <= max(expert.tensors.values()) <= 0.8
    assert (experts[0].tensors == experts[1].tensors) == (guide == "uniform")


@pytest.mark.parametrize("guide", ["uniform", "magnitude", "owl"])
def test_a_guided_merge_leaves_what_its_guide_measured_and_is_not_made_twice(
    guide, asked, tmp_path
):
    recipe = asked(guide).placed_in(tmp_path)
    pipeline.merge_models(recipe, tmp_path / "out")

    there = {path.name for path in (tmp_path / "out" / "lewis").iterdir()}
    assert "density.json" in there
    assert ("importance.json" in there) == (guide != "uniform")
    assert pipeline.merge_models(recipe, tmp_path / "out").status == "unchanged"


@pytest.mark.parametrize("guide", ["uniform", "magnitude, mean_density: 0.5, apply_to: both"])
def test_a_matrix_without_values_takes_no_part_in_a_schedule(guide, asked, folder, tmp_path):
    recipe = asked(guide)
    tensors, plain = merged(recipe.placed_in(folder), tmp_path / "plain")
    empty = {"model.layers.0.mlp.more.weight": torch.zeros(0, 5)}
    for name in ("base", "one", "two"):
        shutil.copytree(folder / name, tmp_path / name)
        save_file(load_file(folder / name / FILE) | empty, tmp_path / name / FILE, {"format": "pt"})
    recipe = recipe.placed_in(tmp_path)

    assert pipeline.check(recipe).problems == ()
    with_empty, schedule = merged(recipe, tmp_path / "out")

    assert with_empty.keys() == tensors.keys() | empty.keys()
    assert all(torch.equal(with_empty[n], t) for n, t in (tensors | empty).items())
    for found, expected in zip(schedule.experts, plain.experts, strict=True):
        assert (found.tensors, found.weights) == (expected.tensors, expected.weights)


@pytest.mark.parametrize("guide", ["random", "magnitude", "activation_shift", "owl"])
def test_a_guide_decides_the_same_on_every_run_and_number_of_threads(
    asked, calibrated, guide, tmp_path
):
    before = torch.get_num_threads()
    torch.set_num_threads(1 if before > 1 else 2)
    try:
        again = pipeline.calibrate(asked(guide).placed_in(tmp_path), tmp_path / "out")
    finally:
        torch.set_num_threads(before)

    assert again.schedule == calibrated(guide).schedule


def shapes():
    return {name: tuple(t.shape) for name, t in load_file(f"base/{FILE}").items()}


@pytest.mark.parametrize("guide", GUIDES)
def test_a_mean_density_is_met_by_each_expert(calibrated, guide):
    settings = ScheduleSettings(0.4, 0.6, mean=0.35)
    profile = calibrated(guide).profile

    decided = schedule(registry.find(guide), settings, ["one", "two"], shapes(), profile).schedule

    sizes = {name: prod(shape) for name, shape in shapes().items()}
    for expert in decided.experts:
        assert DensitySchedule((expert,)).mean(sizes) == pytest.approx(0.35, abs=1e-12)
    assert decided.mean(sizes) == pytest.approx(0.35, abs=1e-12)


def test_a_mean_density_out_of_reach_is_refused(asked, tmp_path):
    recipe = parse_recipe(
        RECIPE.replace("METHOD", "ties").replace("GUIDE", "magnitude, mean_density: 0.01"),
        "recipe.yaml",
    )
    with pytest.raises(GuideError, match=r"guide.mean_density: a mean density of 0.01 is out of"):
        pipeline.calibrate(recipe.placed_in(tmp_path), tmp_path / "out")


def test_weights_scale_the_expert_module_by_module_and_task_arithmetic_takes_them(asked, tmp_path):
    recipe = asked("magnitude, apply_to: weight", "task_arithmetic").placed_in(tmp_path)

    weights, schedule = merged(recipe, tmp_path / "out")

    base, one, two = (load_file(f"{name}/model.safetensors") for name in ("base", "one", "two"))
    first, second = (expert.weights for expert in schedule.experts)
    assert not any(expert.tensors for expert in schedule.experts)
    assert (min(first.values()), max(first.values())) == (0.3, 0.8)
    for name in base:
        a, b = (torch.tensor(factors.get(name, 1.0)) for factors in (first, second))
        changes = a * (one[name] - base[name]) + b * (two[name] - base[name])
        torch.testing.assert_close(weights[name], base[name] + changes, rtol=0, atol=1e-6)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "multiplied the weight of each expert by a factor for each weight matrix" in card
    assert "mean factor of the weight" in card


def test_both_sets_densities_and_weights_by_the_same_values(calibrated):
    both = ScheduleSettings(0.3, 0.8, apply_to="both")
    lewis, aim = (
        schedule(
            registry.find(guide),
            both,
            ["one", "two"],
            shapes(),
            calibrated(guide).profile,
        ).schedule
        for guide in ("lewis", "aim")
    )

    assert all(expert.weights == expert.tensors for expert in lewis.experts)
    for expert in aim.experts:  # AIM's weights are means of the paper's factors
        assert expert.weights.keys() == expert.tensors.keys()
        assert all(0.4 <= weight < 1 for weight in expert.weights.values())
        assert expert.weights != expert.tensors


@pytest.mark.parametrize(
    ("guide", "method", "says"),
    [
        ("magnitude", "task_arithmetic", "`task_arithmetic` keeps every entry, so densities would"),
        ("magnitude, apply_to: weight", "model_stock", "`model_stock` has no task vector"),
        ("magnitude, apply_to: weight", "linear", "`linear` has no task vector weights"),
        ("magnitude, apply_to: both", "sce", "`sce` has no task vector weights that `app"),
    ],
)
def test_what_a_method_cannot_use_is_refused_by_the_check(asked, guide, method, says, tmp_path):
    recipe = asked(guide, method)
    with pytest.raises(CheckFailedError, match=says):
        pipeline.merge_models(recipe, tmp_path / "out")


def test_magnitude_loads_no_model_and_takes_its_measurements_over(asked, tmp_path):
    recipe = asked("magnitude").placed_in(tmp_path)
    first = pipeline.calibrate(recipe, tmp_path / "out")
    store = tmp_path / "out" / "importance.json"
    profile = ImportanceProfile.from_json(store.read_text())
    assert [(one.role, one.n_tokens, one.measure) for one in profile.sources] == [
        ("expert", 0, "task_vector"),
        ("expert", 0, "task_vector"),
    ]

    q = "model.layers.0.self_attn.q_proj"
    known = profile.sources[0].modules[q]
    store.write_text(store.read_text().replace(str(known), "9.5"))

    again = pipeline.calibrate(recipe, tmp_path / "out")
    assert again.profile.sources[0].modules == {**first.profile.sources[0].modules, q: 9.5}


def test_the_check_counts_the_models_that_a_guide_holds_at_once(asked):
    n_parameters = sum(prod(shape) for shape in shapes().values())

    memory_bytes = {
        guide: pipeline.check(asked(guide)).memory_bytes
        for guide in ("uniform", "magnitude", "lewis", "activation_shift")
    }

    assert memory_bytes["magnitude"] == memory_bytes["uniform"] == 300_000_000
    assert memory_bytes["lewis"] == 900_000_000 + 4 * n_parameters
    assert memory_bytes["activation_shift"] == 900_000_000 + 2 * 4 * n_parameters


MIXTRAL, VISION = Case("mixtral", CAUSAL), Case("qwen2_vl", "AutoModelForImageTextToText")
OTHERS = {  # matrices of the blocks; what is measured of a mixture of experts, by some guides
    MIXTRAL: (68, {"activation_shift": 16, "lewis_reference": 16}),
    VISION: (28, {}),
}
BY_TEXTS = """base_model: base
models: [{model: one}, {model: two}]
merge_method: ties
guide:
  name: GUIDE
  gamma: 0.4
  epsilon: 0.6
  mean_density: 0.45
  calibration: {dataset: texts.jsonl, text: "{text}", samples: 4, max_tokens: 64}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with tiny models of an architecture; made once."""
    known = {}

    def once(case):
        if case not in known:
            known[case] = tmp_path_factory.mktemp(case.model_type)
            build(case, known[case])
        return known[case]

    return once


@pytest.mark.parametrize(
    ("case", "guide"),
    [
        *(
            (MIXTRAL, name)
            for name in ("uniform", "magnitude", "lewis", "owl", *OTHERS[MIXTRAL][1])
        ),
        *((VISION, name) for name in ("uniform", "magnitude", "lewis", "activation_shift")),
    ],
    ids=lambda value: getattr(value, "model_type", value),
)
def test_all_guides_decide_the_same_matrices_of_an_architecture_to_the_same_mean(
    case, guide, made, monkeypatch
):
    folder = made(case)
    monkeypatch.chdir(folder)
    recipe = parse_recipe(BY_TEXTS.replace("GUIDE", guide), "recipe.yaml", rules)
    told = []
    monkeypatch.setattr(Silent, "say", lambda _, text: told.append(text))

    found = pipeline.calibrate(recipe.placed_in(folder / guide), folder / guide, progress=False)

    n_matrices, measured = OTHERS[case]
    shapes = {name: tuple(t.shape) for name, t in load_file(f"base/{FILE}").items()}
    inside = {name for name in shapes if ".layers." in name and len(shapes[name]) == 2}
    assert len(inside) == n_matrices
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    for expert in found.schedule.experts:
        assert expert.tensors.keys() == inside
        assert DensitySchedule((expert,)).mean(sizes) == pytest.approx(0.45, abs=1e-12)
    if guide in measured:
        n_left = n_matrices - measured[guide]
        of_all = [text for text in told if "the guide has no measurement of" in text]
        assert [text.partition(": ")[2] for text in of_all] == 2 * [
            f"the guide has no measurement of {n_left} of the {n_matrices} matrices of the blocks, "
            "such as model.layers.0.block_sparse_moe.experts.0.w1: they get the mean density of "
            "their component, or of all if it has none."
        ]
    else:
        assert not any("the guide measures nothing" in text for text in told)


def test_what_a_guide_measures_nothing_of_is_told_on_the_card(made, monkeypatch, tmp_path):
    folder = made(MIXTRAL)
    monkeypatch.chdir(folder)
    recipe = parse_recipe(BY_TEXTS.replace("GUIDE", "activation_shift"), "recipe.yaml", rules)

    output = pipeline.merge_models(recipe.placed_in(tmp_path), tmp_path / "out").output

    card = (output / "README.md").read_text()
    assert "the guide has no measurement of 52 of the 68 matrices of the blocks" in card


PLUGIN = '''
from lewis_hub.guides.registry import register


@register("deep", needs=("task_vector", "lewis"))
def deep(statistics, gamma, epsilon):
    """Later blocks keep more."""
    moved, important = (statistics.expert[one] for one in ("task_vector", "lewis"))
    assert moved.keys() == important.keys() == set(statistics.matrices)
    last = max(int(module.split(".")[2]) for module in moved)
    step = (epsilon - gamma) / last
    return {module: gamma + step * int(module.split(".")[2]) for module in moved}
'''


def test_an_installed_package_adds_a_guide_that_a_recipe_may_name(
    asked, folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(registry._registry, "_entries", dict(registry._registry._entries))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "deep_package.py").write_text(PLUGIN)
    info = tmp_path / "deep_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: deep-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lewis_hub.guides]\ndeep = deep_package:deep\n")
    (folder / "recipe.yaml").write_text(RECIPE.replace("METHOD", "ties").replace("GUIDE", "deep"))

    try:
        _, schedule = merged(read_recipe(folder / "recipe.yaml"), tmp_path / "out")
    finally:
        sys.modules.pop("deep_package", None)

    q = "model.layers.{}.self_attn.q_proj.weight"
    for expert in schedule.experts:
        assert [expert.tensors[q.format(b)] for b in range(3)] == pytest.approx([0.3, 0.55, 0.8])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "The guide deep chose the fraction of the task vector" in card
