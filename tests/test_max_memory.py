"""Models that are larger than memory: measured block by block, and what is said of them."""

import json

import pytest
from click.testing import CliRunner

import lewis_hub
from lewis_hub.checkpoint.reader import local_checkpoint
from lewis_hub.cli.main import cli
from lewis_hub.demo.zoo import seed_hub, zoo_folder
from lewis_hub.guides.calibrate import Subject
from lewis_hub.recipe_file import parse_recipe
from lewis_hub.stages.bringing import in_memory
from lewis_hub.stages.execution import Execution
from lewis_hub.stages.loading import Loading

TEXT = "Question: {question}\\nAnswer: {answer}"
RECIPE = f"""base_model: zoo/base
models:
  - model: zoo/expert-reverse
    calibration: {{dataset: zoo/reverse, text: "{TEXT}", samples: 4}}
  - model: zoo/expert-cipher
    calibration: {{dataset: zoo/cipher, text: "{TEXT}", samples: 4}}
merge_method: regmean
guide: {{name: lewis}}
"""
SMALL = Execution(max_memory_bytes=1_000_000)  # the zoo's models have 4,630,016 bytes in float32


@pytest.fixture(autouse=True)
def seeded(hub, monkeypatch):
    seed_hub(hub.api())
    monkeypatch.setenv("HF_TOKEN", hub.write_token)


def test_a_merge_by_a_guide_and_statistics_has_the_same_bytes_block_by_block(tmp_path):
    recipe = parse_recipe(RECIPE, "recipe.yaml")

    merged = lewis_hub.merge_models(recipe, tmp_path / "blocks", SMALL)

    whole = lewis_hub.merge_models(recipe, tmp_path / "whole")
    for name in ("model.safetensors", "lewis/importance.json", "lewis/density.json"):
        assert (merged.output / name).read_bytes() == (whole.output / name).read_bytes()


def test_one_model_is_measured_block_by_block(tmp_path):
    words = ["importance", str(zoo_folder() / "base"), "--dataset", "zoo/cipher", "--text", TEXT]

    for option, folder in ((["--max-memory", "1MB"], "blocks"), ([], "whole")):
        done = CliRunner().invoke(cli, [*words, *option, "-o", str(tmp_path / folder)])
        assert done.exit_code == 0, done.output

    blocks, whole = (tmp_path / f"{name}/importance.json" for name in ("blocks", "whole"))
    assert blocks.read_bytes() == whole.read_bytes()


def test_check_tells_what_is_in_memory_at_once(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("regmean", "ties"))

    def check(*option):
        told = CliRunner().invoke(cli, ["check", str(path), "--json", *option])
        return json.loads(told.stdout)

    blocks, whole = check("--max-memory", "1MB"), check()

    elements, width = 1_157_504, 128
    block, rows = 184_576, 390 * 128 + 128  # embeddings and the last norm
    texts = 2 * 4 * 512 * width
    assert whole["memory_bytes"] == 900_000_000 + 4 * elements
    assert blocks["memory_bytes"] == 900_000_000 + 4 * (rows + 2 * block + texts)
    size = f"{4 * elements:,}"
    assert (
        f"zoo/base takes {size} bytes in memory, more than `--max-memory`: it is measured block "
        "by block."
    ) in blocks["notes"]


def test_on_a_cpu_a_model_goes_by_block_where_that_takes_less(tmp_path):
    folder = zoo_folder() / "base"
    checkpoint = local_checkpoint("zoo/base", folder)
    elements, width = 1_157_504, 128
    blocks = 390 * 128 + 128 + 2 * 184_576
    most = (elements - blocks) // width  # tokens, of which the hidden states take the rest

    assert Loading().is_less_by_block(checkpoint, most - 1)
    assert not Loading().is_less_by_block(checkpoint, most)
    assert not Loading("cuda").is_less_by_block(checkpoint, 1)


@pytest.mark.parametrize(
    ("loading", "by_block", "may_be_whole"),
    [
        (Loading(), True, True),
        (Loading("cpu", 1_000_000), True, False),
        (Loading("cuda"), False, True),
        (Loading("cuda", 1_000_000), True, False),
    ],
)
def test_a_limit_forbids_to_load_a_model_whole(loading, by_block, may_be_whole):
    folder = zoo_folder() / "base"
    subject = Subject("zoo/base", "sha", "base", folder, ())

    found = in_memory(subject, local_checkpoint("zoo/base", folder), loading)

    assert (found.weights is not None, found.may_be_whole) == (by_block, may_be_whole)


def test_a_guide_that_needs_whole_models_is_refused_before_a_download(tmp_path):
    text = RECIPE.replace("regmean", "ties").replace("name: lewis", "name: lewis_reference")
    recipe = parse_recipe(text.replace("samples: 4", "max_tokens: 64"), "r.yaml")

    report = lewis_hub.check(recipe, max_memory_bytes=1_000_000)

    assert report.problems[0] == (
        "guide `lewis_reference` runs whole models, and zoo/base takes 4,630,016 bytes in memory, "
        "more than `--max-memory`. Allow more, or take a guide that measures block by block, such "
        "as `lewis`."
    )
    assert lewis_hub.check(recipe, max_memory_bytes=5_000_000).problems == ()


def test_a_size_that_is_none_is_named():
    done = CliRunner().invoke(cli, ["check", str(zoo_folder()), "--max-memory", "lots"])

    assert "Invalid value for --max-memory: expected a size such as 500MB" in done.output
