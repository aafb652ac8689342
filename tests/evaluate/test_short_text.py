"""Models whose settings make any text very long, or repeat parts, and those without a tokenizer."""

import json
import re
import shutil
from importlib.util import find_spec

import pytest
import torch
import transformers
from tiny_models import tiny_model

import lewis_hub
from lewis_hub.calibration.model import load_model, load_tokenizer
from lewis_hub.checkpoint import configuration
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.errors import EvaluationError, LewisHubError, SourceError
from lewis_hub.evaluate import short_text
from lewis_hub.evaluate.backends import EvaluationSettings
from lewis_hub.evaluate.embeddings import load_embedder
from lewis_hub.evaluate.harness import load
from lewis_hub.evaluate.short_text import require_short_run

needs_library = pytest.mark.skipif(
    not find_spec("sentence_transformers"), reason="sentence_transformers is not installed"
)
MAMBA = ("mamba2", transformers.AutoModelForCausalLM)
LOOPED = ("dory", transformers.AutoModelForCausalLM)


def scored(folder):
    return load(folder, EvaluationSettings()).model


def embedded(folder):
    return load_embedder(folder, EvaluationSettings(backend="mteb"))


def measured(folder):
    return load_model(folder, "cpu", str(folder))


def saved(folder, model, tokenizer=True):
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json") if tokenizer else ():
        shutil.copy(zoo_folder() / "base" / name, folder / name)
    return folder


def change(folder, **settings):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))


def funnel():
    sizes = {"vocab_size": 400, "d_model": 32, "n_head": 2, "d_head": 16, "d_inner": 48}
    config = transformers.FunnelConfig(**sizes, block_sizes=[1, 1], num_decoder_layers=1)
    return transformers.FunnelModel(config)


@pytest.mark.parametrize(
    ("make", "setting", "loader", "told"),
    [
        (lambda: tiny_model(*MAMBA), {"chunk_size": 100_000}, scored, "1.1 GB"),
        (lambda: tiny_model(*MAMBA), {"chunk_size": 100_000}, measured, "1.1 GB"),
        (lambda: tiny_model(*LOOPED), {"n_recurrent_loops": 10**8}, scored, "1 s"),
        (funnel, {"block_repeats": [1, 10**8]}, measured, "1 s"),
        pytest.param(
            *(funnel, {"block_repeats": [1, 10**8]}, embedded, "1 s"), marks=needs_library
        ),
    ],
)
def test_a_model_that_takes_very_long_or_much_memory_for_a_few_words_is_refused(
    make, setting, loader, told, tmp_path, monkeypatch
):
    """177 kB ran for ever; chunks to which texts are padded filled the memory."""
    monkeypatch.setattr(configuration, "LIMITS", {})  # which know these, but not all
    folder = saved(tmp_path / "model", make())
    assert loader(folder) is not None
    monkeypatch.setattr(short_text, "MAX_PASS_S", 1)
    change(folder, **setting)

    with pytest.raises(SourceError) as caught:
        loader(folder)

    assert str(caught.value) == (
        f"{folder}: it takes more than {told} for a few words.\n"
        "Its files are damaged, or made to do so: use an intact copy of the model."
    )


@pytest.mark.parametrize(
    ("key", "value", "limit"),
    [
        ("block_repeats", [1, 101], "100"),
        ("H_cycles", 101, "100"),
        ("hc_sinkhorn_iters", 101, "100"),
        ("n_recurrent_loops", 101, "100"),
        ("loop_num_passes", 101, "100"),
        ("chunk_size", 1025, "1,024"),
        ("attention_window", [512, 8193], "8,192"),
    ],
)
def test_repeated_parts_and_chunks_have_a_limit(key, value, limit):
    configuration.require_buildable("a/b", {key: value[:1] if isinstance(value, list) else 64})

    with pytest.raises(SourceError) as caught:
        configuration.require_buildable("a/b", {"text_config": {key: value}})

    assert str(caught.value).startswith(
        f"a/b: `{key}` of its config.json is above the limit of {limit}.\n"
    )


@pytest.mark.parametrize("error", [ValueError, KeyError, RuntimeError, NotImplementedError])
def test_other_errors_of_a_model_are_left_to_the_texts(error):
    def run():
        raise error("too short")

    require_short_run("a/b", torch.nn.Linear(2, 2), run)


def bert():
    sizes = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48}
    return transformers.BertModel(transformers.BertConfig(**sizes, num_attention_heads=2))


def causal(model_type):
    return lambda: tiny_model(model_type, transformers.AutoModelForCausalLM)


def tokenized(folder):
    return load_tokenizer(str(folder), str(folder))


@pytest.mark.parametrize(
    ("make", "loader"),
    [
        (causal("gemma"), scored),
        (causal("qwen3"), scored),
        (causal("gemma"), tokenized),
        (bert, tokenized),
        pytest.param(bert, embedded, marks=needs_library),
    ],
)
def test_a_model_without_a_tokenizer_is_refused(make, loader, tmp_path):
    """transformers made one of special tokens alone: scores and densities of unknown words."""
    folder = saved(tmp_path / "model", make(), tokenizer=False)

    with pytest.raises(LewisHubError) as caught:
        loader(folder)

    assert str(caught.value) == (
        f"{folder}: it has no files of a tokenizer, or they have no tokens but special ones.\n"
        "Use a copy with the files, such as tokenizer.json."
    )


def test_a_tokenizer_of_characters_needs_no_files(tmp_path):
    config = transformers.CanineConfig(
        **{"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        intermediate_size=48,
    )
    config.save_pretrained(tmp_path)

    assert tokenized(tmp_path)("ab")["input_ids"][1:3] == [97, 98]


def test_check_tells_that_a_scored_model_has_no_tokenizer(tmp_path, monkeypatch):
    """An expert that lacked one was compared by a score of unknown words."""
    for name in ("base", "expert-reverse"):
        shutil.copytree(zoo_folder() / name, tmp_path / name)
    for file in (tmp_path / "expert-reverse").glob("token*"):
        file.unlink()
    shutil.copytree(zoo_folder() / "tasks", tmp_path / "tasks")
    monkeypatch.chdir(tmp_path)
    text = "{base_model: base, models: [expert-reverse], merge_method: linear, evaluate: "
    text += "{tasks: [zoo_reverse], include: tasks, compare: [COMPARED]}}"

    def problems(compared):
        (tmp_path / "recipe.yaml").write_text(text.replace("COMPARED", compared))
        return lewis_hub.check(lewis_hub.read_recipe("recipe.yaml")).problems

    told = "expert-reverse: it has no files of a tokenizer, so no text can run through it"
    assert problems("base") == ()
    assert problems("experts") == (f"{told}.\nUse a copy with the files, such as tokenizer.json.",)
    asked = lewis_hub.Evaluation(tasks=("zoo_reverse",), include=str(tmp_path / "tasks"))
    with pytest.raises(EvaluationError, match=re.escape(told)):
        lewis_hub.evaluate_model("expert-reverse", asked)
