import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import ValidationError

from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.errors import RecipeError
from lewis_hub.recipe.parts import parts_of
from lewis_hub.recipe.read import parse_recipe, read_recipe, schema
from lewis_hub.recipe.reference import TAG, ModelReference
from lewis_hub.recipe.schema import Conditional, ModelEntry, Recipe

GOOD = """base_model: a/b
models:
  - model: a/c@main
    parameters: {weight: 1.0}
merge_method: ties
"""
CALIBRATION = "{dataset: x/y, text: '{a}'}"
SETTING = "a number, a list of numbers (a gradient over blocks) or a list of {filter, value}."

# what is wrong with the recipe -> the whole message
BROKEN = {
    GOOD + "merge_metod: x\n": (
        "r.yaml:6: `merge_metod`: unknown key `merge_metod`.\nDid you mean `merge_method`?"
    ),
    GOOD.replace("merge_method: ties\n", ""): (
        "r.yaml:1: `merge_method`: `merge_method` is missing.\n"
        "Add `merge_method:`; `lewis-hub schema` describes it."
    ),
    GOOD + "merge_method: ties\n": (
        "r.yaml:6: not valid YAML: `merge_method` is given twice.\nFix the line, then run again."
    ),
    "": (
        "r.yaml: expected a mapping with `models` and `merge_method`, found nothing.\n"
        "`lewis-hub init` writes a recipe to start from."
    ),
    GOOD + "modules: {}\n": (
        "r.yaml:6: `modules`: `modules` is not supported by this version.\n"
        "Only `modules: {default: ...}` is: list whole models under `models`."
    ),
    GOOD + "tokenizer_source: a/x\n": (
        "r.yaml:6: `tokenizer_source`: `a/x` is not one of the models.\n"
        "Write `base`, `union` or one of `a/b`, `a/c@main`."
    ),
    GOOD + "tokenizer_source: base\ntokenizer: {}\n": (
        "r.yaml:7: `tokenizer`: both `tokenizer_source` and `tokenizer` are given.\n"
        "Keep one of the two; `tokenizer.source` is the same as `tokenizer_source`."
    ),
    GOOD + "tokenizer: {tokens: {<x>: {source: a/x}}}\n": (
        "r.yaml:6: `tokenizer.tokens.<x>.source`: `a/x` is not one of the models.\n"
        "Write one of `a/b`, `a/c@main`."
    ),
    GOOD + "tokenizer: {tokens: {<x>: {source: ''}}}\n": (
        "r.yaml:6: `tokenizer.tokens.<x>.source`: `` is not one of the models.\n"
        "Write one of `a/b`, `a/c@main`."
    ),
    GOOD + "tokenizer: {tokens: {<x>: {force: true}}}\n": (
        "r.yaml:6: `tokenizer.tokens.<x>`: `force` is set without a `source`.\n"
        "Give its `source`: a model, {kind: model_token, ...} or {kind: zero}."
    ),
    GOOD + "tokenizer: {tokens: {<x>: {source: {kind: model_token, model: a/b}}}}\n": (
        "r.yaml:6: `tokenizer.tokens.<x>.source`: give `token` (its text) or `token_id`.\n"
        "`lewis-hub schema` describes every field."
    ),
    GOOD + "tokenizer: {pad_to: 8}\n": (
        "r.yaml:6: `tokenizer.pad_to`: unknown key `pad_to`.\nDid you mean `pad_to_multiple_of`?"
    ),
    GOOD + "chat_template: llama4\n": (
        "r.yaml:6: `chat_template`: `llama4` is neither one of the models nor a template.\n"
        "Write `auto`, one of `a/b`, `a/c@main`, `alpaca`, `chatml`, `exaone`, `llama3`, "
        "`mistral`, or the template's text (Jinja)."
    ),
    GOOD + "dtype: bf16\n": (
        "r.yaml:6: `dtype`: expected 'float32', 'float16', 'bfloat16' or 'float64', found 'bf16'.\n"
        "`lewis-hub schema` describes every field."
    ),
    GOOD.replace("1.0", "heavy"): (
        f"r.yaml:4: `models[0].parameters.weight`: expected numbers, found 'heavy'.\nGive {SETTING}"
    ),
    GOOD.replace("1.0", "[1, x]"): (
        f"r.yaml:4: `models[0].parameters.weight`: found a list.\nExpected {SETTING}"
    ),
    GOOD.replace("1.0", "[{filter: mlp, valu: 3}]"): (
        "r.yaml:4: `models[0].parameters.weight[0].valu`: unknown key `valu`.\n"
        "Did you mean `value`?\n"
        "r.yaml:4: `models[0].parameters.weight[0].value`: `value` is missing."
    ),
    GOOD.replace("weight: 1.0", "density: 1.5"): (
        "r.yaml:4: `models[0].parameters.density`: expected a density between 0 and 1, found 1.5.\n"
        "It is the fraction of entries kept."
    ),
    GOOD + f"guide: {{gamma: 0.9, epsilon: 0.2, calibration: {CALIBRATION}}}\n": (
        "r.yaml:6: `guide`: gamma (0.9) is above epsilon (0.2).\n"
        "`lewis-hub schema` describes every field."
    ),
    GOOD + f"guide: {{gamma: 2, calibration: {CALIBRATION}}}\n": (
        "r.yaml:6: `guide.gamma`: expected less than or equal to 1, found 2.\n"
        "`lewis-hub schema` describes every field."
    ),
    GOOD + "guide: {name: magnitude, gamma: 0}\n": (
        "r.yaml:6: `guide.gamma`: expected greater than 0, found 0.\n"
        "`lewis-hub schema` describes every field."
    ),
    GOOD + "guide: {name: magnitude, epsilon: 1.1}\n": (
        "r.yaml:6: `guide.epsilon`: expected less than or equal to 1, found 1.1.\n"
        "`lewis-hub schema` describes every field."
    ),
    GOOD + "guide: {name: magnitude, gamma: .nan}\n": (
        "r.yaml:6: `guide.gamma`: expected less than or equal to 1, found nan.\n"
        "`lewis-hub schema` describes every field."
    ),
    GOOD + "guide: {name: magnitude, default_density: 0.0}\n": (
        "r.yaml:6: `guide.default_density`: expected greater than 0, found 0.0.\n"
        "`lewis-hub schema` describes every field."
    ),
    GOOD + "guide: {calibration: {dataset: x/y}}\n": (
        "r.yaml:6: `guide.calibration`: give `text` (a template over columns) or `messages` "
        "(a column).\n`lewis-hub schema` describes every field."
    ),
    GOOD + "guide: {name: magnitude, mean_density: 0}\n": (
        "r.yaml:6: `guide.mean_density`: expected greater than 0, found 0.\n"
        "`lewis-hub schema` describes every field."
    ),
    GOOD + "guide: {name: magnitude, mean_density: 0.5, apply_to: weight}\n": (
        "r.yaml:6: `guide`: `mean_density` has no effect with `apply_to: weight`.\n"
        "`lewis-hub schema` describes every field."
    ),
    GOOD + "guide: {calibration: {task: gsm8k, dataset: x/y, text: '{q}'}}\n": (
        "r.yaml:6: `guide.calibration`: give `dataset` (with a template), `task` (an lm-eval "
        "task) or `from: model`.\n`lewis-hub schema` describes every field."
    ),
    GOOD + "guide: {calibration: {from: model, answers: model}}\n": (
        "r.yaml:6: `guide.calibration`: `answers` cannot be used with `from: model`.\n"
        "`lewis-hub schema` describes every field."
    ),
    GOOD + "guide: {calibration: {from: model, text: '{q}'}}\n": (
        "r.yaml:6: `guide.calibration`: `text` cannot be used with `from: model`.\n"
        "`lewis-hub schema` describes every field."
    ),
    GOOD + "guide: {calibration: {task: gsm8k, prompt: 'Question:'}}\n": (
        "r.yaml:6: `guide.calibration`: `prompt` cannot be used with `task`.\n"
        "`lewis-hub schema` describes every field."
    ),
    GOOD + "guide: {calibration: {dataset: x/y, text: '{q}', temperature: 0.7}}\n": (
        "r.yaml:6: `guide.calibration`: `temperature` cannot be used with `dataset`.\n"
        "`lewis-hub schema` describes every field."
    ),
    GOOD + "guide: {calibration: {from: model, top_p: 0}}\n": (
        "r.yaml:6: `guide.calibration.top_p`: expected greater than 0, found 0.\n"
        "`lewis-hub schema` describes every field."
    ),
    GOOD + "guide: {calibration: {from: model, samples: 1000000}}\n": (
        "r.yaml:6: `guide.calibration`: a model writes at most 100,000 `samples`.\n"
        "`lewis-hub schema` describes every field."
    ),
    GOOD + "guide: {calibration: {task: gsm8k, text: '{q}'}}\n": (
        "r.yaml:6: `guide.calibration`: `text` cannot be used with `task`.\n"
        "`lewis-hub schema` describes every field."
    ),
    GOOD + "guide: {calibration: {dataset: x/y, text: '{q}', include: tasks}}\n": (
        "r.yaml:6: `guide.calibration`: `include` cannot be used with `dataset`.\n"
        "`lewis-hub schema` describes every field."
    ),
    GOOD + "evaluate: {tasks: [a], gate: {task: a, metric: m}}\n": (
        "r.yaml:6: `evaluate.gate.not_worse_than`: without a guide the merge and its uniform "
        "twin are the same.\nWrite `base`, `experts` or `previous`, or add a `guide`."
    ),
    GOOD + "evaluate: {tasks: [a, b], gate: {task: c, metric: m, not_worse_than: [base]}}\n": (
        "r.yaml:6: `evaluate.gate.task`: `c` is not in `evaluate.tasks`.\n"
        "Write one of a, b, or add it."
    ),
    GOOD + "evaluate:\n  tasks: [a]\n  compare: [base]\n  gate:\n"
    "    - {task: a, metric: m, not_worse_than: [base]}\n"
    "    - {task: a, metric: m, not_worse_than: [experts]}\n": (
        "r.yaml:11: `evaluate.gate[1].not_worse_than`: `experts` is not scored: it is not in "
        "`evaluate.compare`.\nAdd `experts` to `evaluate.compare`."
    ),
    GOOD + "evaluate: {tasks: [a], gate: {task: a, metric: m, on_refusal: pr}}\n": (
        "r.yaml:6: `evaluate.gate.on_refusal`: expected 'stop' or 'pull-request', found 'pr'.\n"
        "`lewis-hub schema` describes every field."
    ),
    GOOD + "evaluate: {tasks: [a], gate: {task: a, metrik: m}}\n": (
        "r.yaml:6: `evaluate.gate.metrik`: unknown key `metrik`.\nDid you mean `metric`?\n"
        "r.yaml:6: `evaluate.gate.metric`: `metric` is missing."
    ),
    GOOD + "evaluate:\n  tasks: [a]\n  benchmarks:\n"
    "    a: {dataset: gsm8k, task_id: x, metric: m}\n": (
        "r.yaml:9: `evaluate.benchmarks.a.dataset`: 'gsm8k' is not owner/name (letters, digits, "
        "`-`, `_`, `.`).\nName the benchmark's dataset on the Hub."
    ),
    GOOD + "evaluate:\n  tasks: [a]\n  benchmarks:\n"
    "    b: {dataset: o/b, task_id: x, metric: m}\n": (
        "r.yaml:9: `evaluate.benchmarks.b`: `b` is not in `evaluate.tasks`.\n"
        "Write one of a, or add it."
    ),
    GOOD + "evaluate:\n  tasks: [a]\n  limit: 5\n  benchmarks:\n"
    "    a: {dataset: o/b, task_id: x, metric: m}\n": (
        "r.yaml:10: `evaluate.benchmarks.a`: `limit` scores a part of the items, which is "
        "not a benchmark result.\nRemove `limit`, or `benchmarks`."
    ),
    GOOD + "evaluate:\n  tasks: [a]\n  benchmarks:\n"
    "    a: {dataset: o/b, task_id: x, metric: m, scale: 0}\n": (
        "r.yaml:9: `evaluate.benchmarks.a.scale`: expected greater than 0, found 0.\n"
        "`lewis-hub schema` describes every field."
    ),
    GOOD.replace("a/c@main", "a/b+d/e+f/g"): (
        "r.yaml:3: `models[0].model`: a base takes one adapter: list each adapter as an expert.\n"
        "`lewis-hub schema` describes every field."
    ),
    GOOD.replace("model: a/c@main", "{model: a/c, revision: main}").replace(
        "\n    parameters: {weight: 1.0}", ""
    ): (
        "r.yaml:3: `models[0].revision`: `revision` is not a key of its own.\n"
        "Write it after the model's name: `model: OWNER/NAME@main`."
    ),
    GOOD + "parameters: {dtype: bfloat16}\n": (
        "r.yaml:6: `parameters.dtype`: `dtype` is not a parameter of the method.\n"
        "Write it without `parameters`, at the top: `dtype: bfloat16`."
    ),
    GOOD + "seed: 1\nrandom_seed: 1\n": (
        "r.yaml:7: `random_seed`: unknown key `random_seed`.\nDid you mean `seed`?"
    ),
    GOOD + "publish: {repo: '$(rm -rf x)/y'}\n": (
        "r.yaml:6: `publish.repo`: '$(rm -rf x)/y' is not owner/name (letters, digits, `-`, `_`, "
        "`.`).\n`lewis-hub schema` describes every field."
    ),
    GOOD + "publish: {repo: me/x, tag: v1.lock}\n": (
        "r.yaml:6: `publish.tag`: 'v1.lock' is not a name that git allows for a tag, such as "
        "v1.0.\n`lewis-hub schema` describes every field."
    ),
    GOOD.replace("base_model: a/b\n", "") + f"guide: {{calibration: {CALIBRATION}}}\n": (
        "r.yaml:5: `guide`: a guide needs a `base_model` to compare with.\nName the base model."
    ),
    GOOD + "seed: -1\n": (
        "r.yaml:6: `seed`: expected greater than or equal to 0, found -1.\n"
        "`lewis-hub schema` describes every field."
    ),
    "merge_method: ties\nmodels: []\n": (
        "r.yaml:2: `models`: expected at least one item, found a list.\n"
        "`lewis-hub schema` describes every field."
    ),
    "merge_method: ties\nmodels: a/b\n": (
        "r.yaml:2: `models`: expected a list, found 'a/b'.\n"
        "`lewis-hub schema` describes every field."
    ),
    GOOD + "evaluate: {task: [a]}\n": (
        "r.yaml:6: `evaluate.task`: unknown key `task`.\nDid you mean `tasks`?\n"
        "r.yaml:6: `evaluate.tasks`: `tasks` is missing."
    ),
    GOOD + "publish: {repo: a/b, as: pr}\n": (
        "r.yaml:6: `publish.as`: expected 'commit' or 'pull-request', found 'pr'.\n"
        "`lewis-hub schema` describes every field."
    ),
    GOOD.replace("merge_method", "  - model: a/c@main\nmerge_method"): (
        "r.yaml:2: `models`: `a/c@main` is listed twice.\nList each expert once, with its weight."
    ),
    GOOD.replace("weight", "density") + f"guide: {{calibration: {CALIBRATION}}}\n": (
        "r.yaml:4: `models[0].parameters.density`: both a guide and a density are given.\n"
        "Remove one of the two."
    ),
}


SLICES = """base_model: a/b
slices:
  - sources:
      - {model: a/b, layer_range: [0, 4]}
      - {model: a/c, layer_range: [1, 5]}
    parameters: {t: 0.5}
merge_method: slerp
"""
SCHEMA = "`lewis-hub schema` describes every field."
BROKEN |= {
    "merge_method: ties\n": (
        "r.yaml:1: `models`: `models` is missing.\n"
        "Add `models:`, or `slices:` to stack blocks; `lewis-hub schema` describes both."
    ),
    "merge_method: ties\nslices: []\n": (
        f"r.yaml:2: `slices`: expected at least one item, found a list.\n{SCHEMA}"
    ),
    SLICES + "tokenizer_source: a/d\n": (
        "r.yaml:8: `tokenizer_source`: `a/d` is not one of the models.\n"
        "Write `base`, `union` or one of `a/b`, `a/c`."
    ),
    SLICES + "missing: base\n": (
        "r.yaml:8: `missing`: `missing` does not apply to slices.\nLeave it out."
    ),
    SLICES + "models: [{model: a/d}]\n": (
        "r.yaml:2: `slices`: both `models` and `slices` are given.\n"
        "List whole models under `models`, or ranges of their blocks under `slices`."
    ),
    SLICES.replace("[1, 5]", "[1, 6]"): (
        "r.yaml:3: `slices[0].sources`: its sources have 4 and 5 blocks.\n"
        "The sources are merged block by block: give ranges of equal length."
    ),
    SLICES.replace("[1, 5]", "[5, 5]"): (
        "r.yaml:5: `slices[0].sources[1].layer_range`: [5, 5] is not a range of blocks: "
        f"blocks count from 0, and the end is exclusive.\n{SCHEMA}"
    ),
    SLICES.replace("[1, 5]", "[-4, 0]"): (
        "r.yaml:5: `slices[0].sources[1].layer_range`: [-4, 0] is not a range of blocks: "
        f"blocks count from 0, and the end is exclusive.\n{SCHEMA}"
    ),
    SLICES.replace("[1, 5]", f"[1, {10**30}]"): (
        "r.yaml:5: `slices[0].sources[1].layer_range`: no model has more than 100,000 blocks.\n"
        f"{SCHEMA}"
    ),
    SLICES.replace("[1, 5]", "[1, 3, 5]"): (
        "r.yaml:5: `slices[0].sources[1].layer_range`: expected [first block, last block + 1], "
        f"found [1, 3, 5].\n{SCHEMA}"
    ),
    SLICES.replace("[1, 5]", "4"): (
        "r.yaml:5: `slices[0].sources[1].layer_range`: expected [first block, last block + 1], "
        f"found 4.\n{SCHEMA}"
    ),
    SLICES.replace(", layer_range: [1, 5]", ""): (
        "r.yaml:5: `slices[0].sources[1].layer_range`: `layer_range` is missing.\n"
        "Add `layer_range:`; `lewis-hub schema` describes it."
    ),
    SLICES.replace("layer_range: [1, 5]", "layer_range: [1, 5], parametres: {}"): (
        "r.yaml:5: `slices[0].sources[1].parametres`: unknown key `parametres`.\n"
        "Did you mean `parameters`?"
    ),
    SLICES.replace("    parameters", "    residual_weight: 0.1\n    parameters"): (
        "r.yaml:6: `slices[0].residual_weight`: `residual_weight` is not supported by this "
        "version.\nmergekit reads it and ignores it: remove it."
    ),
    SLICES.replace("{t: 0.5}", "{t: 0.5, density: 2}"): (
        "r.yaml:6: `slices[0].parameters.density`: expected a density between 0 and 1, found 2.\n"
        "It is the fraction of entries kept."
    ),
    SLICES.replace("[1, 5]", "[1, 5], parameters: {weight: [a]}"): (
        f"r.yaml:5: `slices[0].sources[1].parameters.weight`: found a list.\nExpected {SETTING}"
    ),
    SLICES.replace("a/c", "a/b"): (
        "r.yaml:3: `slices[0].sources`: `a/b` is listed twice.\n"
        "List each model once in a slice; another slice may list it again."
    ),
    SLICES.replace("    parameters", "    base_model: a/d\n    parameters"): (
        "r.yaml:6: `slices[0].base_model`: the base `a/d` is not among the slice's sources.\n"
        "Add it to `sources` with its `layer_range`."
    ),
    SLICES.replace("    parameters", "    merge_method: ties\n    parameters"): (
        "r.yaml:6: `slices[0].merge_method`: it is not the recipe's `slerp`.\n"
        "All slices have the recipe's `merge_method`. To use several methods, write several "
        "documents separated by `---`, each a merge with a `name`; the last can name the others as "
        "models."
    ),
    SLICES + f"guide: {{calibration: {CALIBRATION}}}\n": (
        "r.yaml:5: `slices[0].sources[1].layer_range`: a guide compares blocks with the "
        "same number, but the base has the range [0, 4] in this slice.\n"
        "Give the same range, or densities without a guide."
    ),
    SLICES.replace("[1, 5]", "[0, 4]").replace("{t: 0.5}", "{density: 0.5}")
    + "guide: {name: uniform}\n": (
        "r.yaml:6: `slices[0].parameters.density`: both a guide and a density are given.\n"
        "Remove one of the two."
    ),
    SLICES.replace("[1, 5]", "[0, 4]").replace(
        "    parameters", "    base_model: a/c\n    parameters"
    )
    + "guide: {name: uniform}\n": (
        "r.yaml:6: `slices[0].base_model`: a guide compares with `a/b`, but this slice has another "
        "base.\nLeave it out, or give densities without a guide."
    ),
}


STEP = "name: step\nmodels: [{model: a/c}]\nmerge_method: linear\n---\n"
LAST = "models: [{model: step}]\nmerge_method: linear\n"
BROKEN |= {
    STEP + LAST + "---\n" + LAST: (
        "r.yaml: `name`: two of its merges have the same name, or none.\n"
        "Give each merge that others use its own `name`; one may have none: the last."
    ),
    STEP + GOOD: (
        "r.yaml: `name`: no other merge uses `step`.\n"
        "Only the last merge is kept: use it there, or move it to a file of its own."
    ),
    STEP.replace("a/c", "step") + LAST: (
        "r.yaml: `name`: the merges use each other: step -> step.\n"
        "A merge can only use merges that do not need it."
    ),
    STEP.replace("---", "publish: {repo: a/b}\n---") + LAST: (
        "r.yaml: `publish`: `step` has `publish`, but it is only a step to another merge.\n"
        "Move `publish` to the last merge."
    ),
    STEP + LAST + "dtype: bf16\n": (
        "r.yaml:7: `dtype`: expected 'float32', 'float16', 'bfloat16' or 'float64', found 'bf16'.\n"
        f"{SCHEMA}"
    ),
    f"modules:\n  default:\n    models: [{{model: a/c}}]\n    parametres: {{}}\n{GOOD[:16]}"
    "merge_method: ties\n": (
        "r.yaml:4: `parametres`: unknown key `parametres`.\nDid you mean `parameters`?"
    ),
}


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_recipe_gets_one_message_that_says_where_and_what_to_do(text):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yaml")

    assert str(caught.value) == BROKEN[text]


def test_the_keys_of_another_mapping_are_used_unless_they_are_overridden():
    settings = "&settings {weight: 1.0, density: 0.5}"
    other = "\n  - {model: a/d, parameters: {<<: *settings, weight: 0.3}}"
    text = GOOD.replace("{weight: 1.0}", settings + other)

    first, second = parse_recipe(text, "r.yaml").models

    assert first.parameters == {"weight": 1.0, "density": 0.5}
    assert second.parameters == {"weight": 0.3, "density": 0.5}


def test_yaml_that_does_not_parse_names_its_line():
    with pytest.raises(RecipeError, match=r"^r\.yaml:2: not valid YAML: "):
        parse_recipe("models:\n  - {model: a/b", "r.yaml")


def test_a_recipe_cannot_make_python_objects():
    with pytest.raises(RecipeError, match="not valid YAML: could not determine a constructor"):
        parse_recipe("!!python/object/apply:os.system ['true']", "r.yaml")


def test_a_missing_file_says_how_to_write_one(tmp_path):
    with pytest.raises(RecipeError) as caught:
        read_recipe(tmp_path / "recipe.yaml")

    assert str(caught.value) == (
        f"{tmp_path / 'recipe.yaml'}: the file does not exist.\n"
        "Name a recipe, or write one with `lewis-hub init`."
    )


# the shapes of mergekit's example configurations, in our words
MERGEKIT = {
    "linear": """
models:
  - model: org/one
    parameters: {weight: 1.0}
  - model: org/two
    parameters: {weight: 0.3}
  - model: org/three
    parameters: {weight: 0.5}
merge_method: linear
dtype: float16
""",
    "ties with gradients and filters": """
models:
  - model: org/one
    parameters:
      density: [1, 0.7, 0.1]  # a gradient
      weight: 1.0
  - model: org/two
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1]
  - model: org/three
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: org/base
parameters:
  normalize: true
  int8_mask: true
dtype: float16
""",
    "dare_ties with the base among the models": """
models:
  - model: org/base
    # no parameters necessary for the base
  - model: org/one
    parameters: {weight: 0.4, density: 0.53}
  - model: org/two
    parameters:
merge_method: dare_ties
base_model: org/base
parameters:
dtype: bfloat16
""",
}


@pytest.mark.parametrize("name", MERGEKIT)
def test_a_mergekit_configuration_is_a_recipe(name):
    recipe = parse_recipe(MERGEKIT[name], "r.yaml")

    assert [str(entry.model) for entry in recipe.experts][:2] == ["org/one", "org/two"]


# mergekit's example configurations with slices, in our words
STACKED = {
    "slerp with a gradient": """
slices:
  - sources:
      - model: org/one
        layer_range: [0, 40]
      - model: org/two
        layer_range: [0, 40]
merge_method: slerp
base_model: org/one
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: float16
""",
    "passthrough with overlap": """
slices:
  - sources:
    - model: org/one
      layer_range: [0, 24]
  - sources:
    - model: org/two
      layer_range: [20, 40]
merge_method: passthrough
dtype: float16
""",
    "one model, scaled": """
slices:
  - sources:
    - model: org/one
      layer_range: [0, 8]
      parameters:
  - parameters:
    sources:
    - model: org/one
      layer_range: [4, 12]
      parameters:
        scale:
          - filter: o_proj
            value: 0.0
          - filter: down_proj
            value: 0.0
          - value: 1.0
merge_method: passthrough
dtype: bfloat16
""",
    "ties slice by slice": """
slices:
  - sources: [{model: org/base, layer_range: [0, 4]}, {model: org/one, layer_range: [0, 4]}]
    base_model: org/base
    parameters: {weight: 0.5}
  - sources: [{model: org/two, layer_range: [4, 8], parameters: {density: [0.2, 1]}},
              {model: org/base, layer_range: [0, 4]}]
merge_method: ties
base_model: org/base
""",
}


def test_mergekits_slices_are_recipes():
    recipes = {name: parse_recipe(text, "r.yaml") for name, text in STACKED.items()}

    experts = {name: [str(e.model) for e in recipe.experts] for name, recipe in recipes.items()}
    assert experts == {
        "slerp with a gradient": ["org/two"],
        "passthrough with overlap": ["org/one", "org/two"],
        "one model, scaled": ["org/one"],
        "ties slice by slice": ["org/one", "org/two"],
    }
    second = recipes["passthrough with overlap"].slices[1].sources[0]
    assert (str(second.model), second.blocks) == ("org/two", range(20, 40))
    assert recipes["one model, scaled"].slices[1].sources[0].parameters["scale"][1] == (
        Conditional(filter="down_proj", value=0.0)
    )
    assert recipes["ties slice by slice"].slices[0].parameters == {"weight": 0.5}


def test_mergekits_spellings_are_read():
    text = (
        "name: blend\nmodules:\n  default:\n    models: [{model: org/one}]\n"
        "    parameters: {weight: 0.5}\nmerge_method: ties\nbase_model: org/base\n"
        "parameters: {density: 0.3}\nrandom_seed: 7\ndtype: torch.float64\n"
    )

    recipe = parse_recipe(text, "r.yaml")

    assert (recipe.name, recipe.seed, recipe.dtype) == ("blend", 7, "float64")
    assert [str(entry.model) for entry in recipe.models] == ["org/one"]
    assert recipe.parameters == {"weight": 0.5, "density": 0.3}
    assert "name" in recipe.model_dump(exclude_none=True)


def test_several_documents_are_one_recipe_with_its_parts_in_order_of_need():
    def part(name, *models):
        return f"name: {name}\nmodels: [{', '.join(models)}]\nmerge_method: linear\n---\n"

    text = part("c", "a", "b") + "---\n" + part("b", "a", "x/y+x/lora") + part("a", "x/y", "x/z")
    last = "models: [c, a+x/lora]\nmerge_method: linear\n"

    for recipe in (parse_recipe(last + "---\n" + text, "r.yaml"), parse_recipe(text + last, "r")):
        assert [str(entry.model) for entry in recipe.models] == ["c", "a+x/lora"]
        assert [one.name for one in recipe.intermediate] == ["a", "b", "c"]
        assert [one.name for one in parts_of(recipe)] == ["a", "b", "c", "a+x/lora"]
        assert [one.name for one in parts_of(recipe.intermediate[1])] == ["x/y+x/lora"]


def test_settings_keep_what_was_written():
    recipe = parse_recipe(MERGEKIT["ties with gradients and filters"], "r.yaml")

    assert recipe.models[0].parameters["density"] == (1.0, 0.7, 0.1)
    assert recipe.models[2].parameters["weight"] == (
        Conditional(filter="mlp", value=0.5),
        Conditional(value=0),
    )
    assert recipe.parameters["normalize"] is True


def test_a_number_in_powers_of_ten_needs_no_point():
    told = GOOD + "parameters: {tol: 1e-5, a: +2E3, b: 1e, c: [{filter: x, value: 3e-2}]}"

    parameters = parse_recipe(told, "r.yaml").parameters

    assert parameters["tol"] == 1e-5
    assert parameters["a"] == 2000.0
    assert parameters["b"] == "1e"
    assert parameters["c"] == (Conditional(filter="x", value=0.03),)


@pytest.mark.parametrize(
    ("written", "name", "revision"),
    [
        ("org/model", "org/model", None),
        ("org/model@v1.0", "org/model", "v1.0"),
        ("org/model@refs/pr/3", "org/model", "refs/pr/3"),
        ("./folder@home", "./folder@home", None),
        ({"model": {"path": "org/model", "revision": "main"}}, "org/model", "main"),
        ({"model": "org/model"}, "org/model", None),
    ],
)
def test_a_model_reference_is_a_repo_with_a_revision_or_a_folder(written, name, revision):
    reference = ModelReference.model_validate(written)

    assert (reference.name, reference.revision) == (name, revision)


@pytest.mark.parametrize(
    "written",
    [
        "a/b@v1+c/d@v2",
        {"model": "a/b@v1", "lora": {"path": "c/d", "revision": "v2"}},
        {"model": {"path": "a/b", "revision": "v1"}, "lora": "c/d@v2"},
    ],
)
def test_an_adapter_may_be_written_on_its_base(written):
    reference = ModelReference.model_validate(written)

    assert (reference.name, reference.revision, str(reference.on)) == ("c/d", "v2", "a/b@v1")
    assert str(reference) == "a/b@v1+c/d@v2"
    assert ModelReference.model_validate(str(reference)) == reference


@pytest.mark.parametrize(
    ("written", "base"),
    [("./a+./b", "./a"), ("/a+c/d", "/a"), ("a/b+/c", "a/b"), ("./a+b", None), ("/c++/x", None)],
)
def test_a_plus_in_a_folders_name_puts_nothing_on_anything(written, base):
    reference = ModelReference.model_validate(written)

    assert (str(reference.on) if reference.on else None) == base
    assert str(reference) == written


def test_relative_paths_are_looked_up_beside_the_recipe_first(tmp_path, monkeypatch):
    beside, working = tmp_path / "recipes", tmp_path / "elsewhere"
    for folder in (beside / "a", working / "a", working / "b"):
        folder.mkdir(parents=True)
    (beside / "recipe.yaml").write_text(GOOD)
    monkeypatch.chdir(working)

    recipe = read_recipe(beside / "recipe.yaml")

    assert recipe.locate("a") == str(beside / "a")
    assert recipe.locate("./b") == str(working / "b")
    assert recipe.locate("org/model") == "org/model"
    assert recipe.locate("./missing") == str(beside / "missing")


def test_a_recipe_in_python_takes_names_as_a_file_does(tmp_path):
    recipe = Recipe(
        base_model="x@rev", models=["a", tmp_path, {"model": "b@v1"}], merge_method="linear"
    )

    assert recipe.base_model == ModelReference(name="x", revision="rev")
    assert [str(entry.model) for entry in recipe.models] == ["a", str(tmp_path), "b@v1"]
    assert recipe.models[0] == ModelEntry(model=ModelReference(name="a"))
    named = parse_recipe("{models: [a, b], merge_method: linear}", "r.yaml")
    assert named.models[0] == recipe.models[0]


def test_a_wrong_name_among_models_is_refused():
    with pytest.raises(ValidationError, match="a base takes one adapter|one adapter at a time"):
        Recipe(models=["org/a+org/b+org/c"], merge_method="linear")


def test_the_schema_accepts_names_and_mappings():
    validator = Draft202012Validator(json.loads(schema()))
    document = yaml.safe_load((zoo_folder() / "recipe.yaml").read_text())
    assert isinstance(document["base_model"], str)

    validator.validate(document)
    validator.validate({**document, "models": ["zoo/expert-reverse", "zoo/expert-cipher"]})
    assert not validator.is_valid({**document, "models": [1]})


def test_the_schema_describes_every_top_level_key():
    properties = json.loads(schema())["properties"]

    assert {
        "base_model",
        "models",
        "slices",
        "merge_method",
        "guide",
        "evaluate",
        "publish",
    } <= set(properties)
    parts = json.loads(schema())["$defs"]
    assert set(parts["Slice"]["properties"]) == {
        *("sources", "base_model", "parameters", "merge_method"),
    }
    assert parts["SliceSource"]["required"] == ["model", "layer_range"]
    assert "description" in parts["SliceSource"]["properties"]["layer_range"]
    assert json.loads(schema())["additionalProperties"] is False


@given(st.text(max_size=200))
def test_any_text_is_a_recipe_or_one_recipe_error(text):
    try:
        parse_recipe(text, "r.yaml")
    except RecipeError as error:
        complaint = str(error)
    else:
        complaint = "r.yaml: fine"
    assert complaint.startswith("r.yaml")


def test_calibration_on_a_task_uses_the_chat_template_where_evaluate_does_unless_it_says():
    text = (
        "base_model: b\nmerge_method: ties\nmodels:\n"
        "- {model: one, calibration: {task: gsm8k}}\n"
        "- {model: two, calibration: {task: gsm8k, chat_template: false}}\n"
        "- {model: three, calibration: {dataset: d, text: '{t}'}}\n"
        "guide: {calibration: {task: mmlu}}\n"
    )
    plain = parse_recipe(text + "evaluate: {tasks: [gsm8k]}", "recipe.yaml")
    chat = parse_recipe(text + "evaluate: {tasks: [gsm8k], chat_template: true}", "recipe.yaml")

    def told(recipe):
        own = [entry.calibration.chat_template for entry in recipe.models]
        return [*own, recipe.guide.calibration.chat_template]

    assert told(plain) == [None, False, None, None]
    assert told(chat) == [True, False, None, True]


@pytest.mark.parametrize(
    ("name", "number", "shown"),
    [
        ("weight", "1" + "0" * 400, "10000000000000000000"),
        ("weight", "-.inf", "-inf"),
        ("scale", ".nan", "nan"),
        ("weight", "[1, 1e39]", "1e+39"),
    ],
)
def test_a_number_that_float32_does_not_have_is_refused(name, number, shown):
    text = f"base_model: a/b\nmodels: [{{model: a/c, parameters: {{{name}: {number}}}}}]\n"

    with pytest.raises(RecipeError) as caught:
        parse_recipe(text + "merge_method: ties\n", "r.yaml")

    assert str(caught.value) == (
        f"r.yaml:2: `models[0].parameters.{name}`: expected a number up to 3.4e+38, "
        f"found {shown}.\n"
        "Merges are computed in float32, which has no larger ones."
    )


@pytest.mark.parametrize("multiple", [65_537, 10**9, 10**400])
def test_embeddings_are_not_padded_without_bound(multiple):
    text = "base_model: a/b\nmodels: [{model: a/c, parameters: {weight: 1}}]\n"
    text += f"merge_method: linear\ntokenizer: {{source: base, pad_to_multiple_of: {multiple}}}\n"

    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yaml")

    told = "r.yaml:4: `tokenizer.pad_to_multiple_of`: expected less than or equal to 65536"
    assert str(caught.value).startswith(told)


def test_a_density_of_many_digits_is_refused():
    text = (
        "base_model: a/b\nmodels: [{model: a/c, parameters: {density: 1%s}}]\nmerge_method: ties\n"
    )

    with pytest.raises(RecipeError, match="expected a density between 0 and 1, found 1000"):
        parse_recipe(text % ("0" * 400), "r.yaml")


@pytest.mark.parametrize(
    ("name", "is_allowed"),
    [
        *((name, True) for name in ("v1", "v1.0", "a/b", "a@b", "@a", "1-2", "a.locked", "é", "+")),
        *(
            (name, False)
            for name in ("", " ", "a b", "a..b", "a.", ".a", "a/.b", "/a", "a/", "a//b")
        ),
        *((name, False) for name in ("@", "a@{b", "a.lock", "a.lock/b", "-a", "refs/tags/a")),
        *((f"a{letter}b", False) for letter in "\x00\t\n\x1b\x7f~^:?*[\\"),
    ],
)
def test_a_tag_has_a_name_that_git_allows(name, is_allowed):
    assert bool(TAG.fullmatch(name)) == is_allowed
