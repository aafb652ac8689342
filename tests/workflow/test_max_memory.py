"""Models that are larger than memory: measured block by block, and what is said of them."""

import json
import subprocess
import sys
from collections import namedtuple

import pytest
from click.testing import CliRunner
from zoo_hub import put_zoo

import lewis_hub
from lewis_hub.calibration.subject import Subject
from lewis_hub.checkpoint.reader import local_checkpoint
from lewis_hub.cli.main import cli
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.errors import OutputError
from lewis_hub.hub.source import cache_root
from lewis_hub.recipe.read import parse_recipe
from lewis_hub.workflow.fetch import choose_loading
from lewis_hub.workflow.resources import Execution, Loading

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
SMALL = Execution(max_memory_bytes=2_000_000)  # the zoo's models have 4,630,016 bytes in float32
BLOCKS = 1_676_800  # of these embeddings, the last norm, and a block twice

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def seeded(hub, monkeypatch):
    put_zoo(hub)
    monkeypatch.setenv("HF_TOKEN", hub.write_token)


def test_a_merge_by_a_guide_and_statistics_has_the_same_bytes_block_by_block(tmp_path):
    recipe = parse_recipe(RECIPE, "recipe.yaml")

    merged = lewis_hub.merge_models(recipe, tmp_path / "blocks", SMALL)

    whole = lewis_hub.merge_models(recipe, tmp_path / "whole")
    for name in ("model.safetensors", "lewis/importance.json", "lewis/density.json"):
        assert (merged.output / name).read_bytes() == (whole.output / name).read_bytes()


def test_one_model_is_measured_block_by_block(tmp_path):
    words = ["importance", str(zoo_folder() / "base"), "--dataset", "zoo/cipher", "--text", TEXT]

    for option, folder in ((["--max-memory", "2MB"], "blocks"), ([], "whole")):
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

    blocks, whole = check("--max-memory", "2MB"), check()

    elements, width = 1_157_504, 128
    block, rows = 184_576, 390 * 128 + 128  # embeddings and the last norm
    texts = 2 * 4 * 512 * width
    batch = 4 * 512 * 8 * 352  # eight rows of the widest matrix, for each token of one batch
    assert whole["memory_bytes"] == 900_000_000 + 4 * elements
    assert blocks["memory_bytes"] == 900_000_000 + 4 * (rows + 2 * block + texts + batch)
    assert 4 * (rows + 2 * block) == BLOCKS
    size = f"{4 * elements:,}"
    assert (
        f"zoo/base takes {size} bytes in memory, more than `--max-memory` allows, so it is "
        "measured block by block."
    ) in blocks["notes"]


def test_on_a_cpu_a_model_goes_by_block_where_that_takes_less(tmp_path):
    folder = zoo_folder() / "base"
    checkpoint = local_checkpoint("zoo/base", folder)
    elements, width = 1_157_504, 128
    blocks = 390 * 128 + 128 + 2 * 184_576
    most = (elements - blocks) // width  # tokens, of which the hidden states take the rest

    assert Loading().goes_by_block(checkpoint, most - 1)
    assert not Loading().goes_by_block(checkpoint, most)
    assert not Loading("cuda").goes_by_block(checkpoint, 1)


@pytest.mark.parametrize(
    ("loading", "by_block", "may_be_whole"),
    [
        (Loading(), True, True),
        (Loading("cpu", 1_000_000), True, False),
        (Loading("cuda"), False, True),
        (Loading("cuda", 1_000_000), True, False),
    ],
)
def test_a_limit_forbids_to_load_a_model_whole(loading, by_block, may_be_whole, tmp_path):
    folder = zoo_folder() / "base"
    subject = Subject("zoo/base", "sha", "base", folder, ())

    found = choose_loading(subject, local_checkpoint("zoo/base", folder), loading, tmp_path)

    assert (found.weights is not None, found.may_be_whole) == (by_block, may_be_whole)


def test_a_guide_that_needs_whole_models_is_refused_before_a_download(tmp_path):
    text = RECIPE.replace("regmean", "ties").replace("name: lewis", "name: lewis_reference")
    recipe = parse_recipe(text.replace("samples: 4", "max_tokens: 64"), "r.yaml")

    report = lewis_hub.check(recipe, max_memory_bytes=2_000_000)

    assert report.problems[0] == (
        "guide `lewis_reference` runs whole models, and zoo/base takes 4,630,016 bytes in memory, "
        "more than `--max-memory` allows. Raise the limit, or use a guide that measures block by "
        "block, such as `lewis`."
    )
    assert lewis_hub.check(recipe, max_memory_bytes=5_000_000).problems == ()


def test_many_texts_take_disk_and_no_more_memory(tmp_path):
    def check(samples):
        recipe = parse_recipe(RECIPE.replace("samples: 4", f"samples: {samples}"), "recipe.yaml")
        return lewis_hub.check(recipe, max_memory_bytes=2_000_000)

    some, many = check(1000), check(1_000_000)

    assert some.states_bytes == 2 * 1000 * 512 * 128 * 4
    assert many.states_bytes == 1000 * some.states_bytes
    assert many.disk_bytes - some.disk_bytes == many.states_bytes - some.states_bytes
    assert many.memory_bytes == some.memory_bytes < 1_100_000_000


def test_a_limit_that_two_blocks_do_not_fit_in_is_refused_before_a_download():
    report = lewis_hub.check(parse_recipe(RECIPE, "r.yaml"), max_memory_bytes=BLOCKS - 1)

    assert report.problems[0] == (
        "block by block zoo/base takes 1,676,800 bytes in memory, more than `--max-memory` allows: "
        "the embeddings and all other tensors before the blocks, and one block twice while it is "
        "loaded. Raise the limit, or leave the option out if the memory holds the whole model."
    )
    assert len(report.problems) == 3
    assert lewis_hub.check(parse_recipe(RECIPE, "r.yaml"), max_memory_bytes=BLOCKS).problems == ()


def test_one_model_is_refused_so_too(tmp_path):
    words = ["importance", "zoo/base", "--dataset", "zoo/cipher", "--text", TEXT]

    done = CliRunner().invoke(cli, [*words, "--max-memory", "1MB", "-o", str(tmp_path / "out")])

    told = "zoo/base: block by block it takes 1,676,800 bytes in memory, more than `--max-memory` "
    assert str(done.exception).startswith(told)
    assert not any(path.suffix == ".safetensors" for path in cache_root().rglob("*"))


def test_a_merge_fitted_in_sequence_counts_all_models_at_once():
    fitted = RECIPE.replace("guide: {name: lewis}", "parameters: {inputs: merged}")
    recipe = parse_recipe(fitted, "recipe.yaml")

    report = lewis_hub.check(recipe, max_memory_bytes=3 * BLOCKS - 1)

    assert report.problems[0].startswith(
        "`inputs: merged` runs the merge and all experts block by block, which takes 5,030,400 "
        "bytes in memory, more than `--max-memory`"
    )
    assert lewis_hub.check(recipe, max_memory_bytes=3 * BLOCKS).problems == ()


def one_model(recipe, output, execution):
    calibration = recipe.experts[0].calibration
    lewis_hub.measure_model("zoo/base", calibration, output, execution, seed=recipe.seed)


@pytest.mark.parametrize(
    ("free", "what", "run"),
    [
        (10_000_000, "download and merge", lewis_hub.merge_models),  # 9.3 MB without the texts
        (1_000_000, "the hidden states of all calibration texts", lewis_hub.calibrate),
        (1_000_000, "the hidden states of all calibration texts", one_model),
    ],
)
def test_texts_whose_states_the_disk_cannot_hold_are_refused_before_a_download(
    free, what, run, tmp_path, monkeypatch
):
    monkeypatch.setattr("lewis_hub.workflow.resources.HELD_BYTES", 0)
    monkeypatch.setattr("lewis_hub.hub.fetch.SPARE_BYTES", 0)
    words = RECIPE.replace("samples: 4", "samples: 400").replace("regmean", "ties")
    recipe = parse_recipe(words, "recipe.yaml")
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(10**9, 10**9 - free, free))

    with pytest.raises(OutputError, match=what):
        run(recipe, tmp_path / "out", SMALL)

    assert not any(path.suffix == ".safetensors" for path in cache_root().rglob("*"))


MEASURED = """
import sys
from pathlib import Path
from random import Random

from transformers import AutoModelForCausalLM, LlamaConfig

from lewis_hub.calibration import forward
from lewis_hub.calibration.measure import measure_inputs
from lewis_hub.calibration.subject import in_folder
from lewis_hub.calibration.texts import CalibrationTokens

forward.HELD_BYTES = 4_000_000
folder = Path(sys.argv[1])
small = dict(vocab_size=256, intermediate_size=16, num_hidden_layers=2, head_dim=16)
config = LlamaConfig(hidden_size=2048, num_attention_heads=1, num_key_value_heads=1, **small)
AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")


def peak_bytes(n_texts):
    ids = tuple(tuple(range(250)) for _ in range(n_texts))
    texts = CalibrationTokens(ids, tuple(range(n_texts)), n_texts, 0, 0, "t")
    weights = in_folder("wide", folder / "model", folder)
    measure_inputs(weights, [texts], "cpu", lambda _: None)
    told = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()
    return int(told[0]) * 1024


print(peak_bytes(16), peak_bytes(200))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_does_not_grow_with_the_texts(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path)], capture_output=True, text=True, check=True
    )

    few, many = map(int, done.stdout.split())
    states = 200 * 250 * 2048 * 4  # 410 MB
    assert many - few < states // 10


def test_a_size_that_is_none_is_named():
    done = CliRunner().invoke(cli, ["check", str(zoo_folder()), "--max-memory", "lots"])

    assert "Invalid value for '--max-memory': expected a size such as 500MB" in done.output
