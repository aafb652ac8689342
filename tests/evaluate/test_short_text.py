"""Models whose settings make any text very long, or repeat parts, and those without a tokenizer."""

import json
import re
import shutil
from importlib.util import find_spec

import pytest
import torch
import transformers
from tiny_models import tiny_model
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from zoo_hub import put_zoo

import lewis_hub
from lewis_hub.calibration.model import load_model, load_tokenizer
from lewis_hub.checkpoint import configuration
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.errors import EvaluationError, LewisHubError, SourceError, TokenizerError
from lewis_hub.evaluate import short_text
from lewis_hub.evaluate.backends import EvaluationSettings
from lewis_hub.evaluate.embeddings import load_embedder
from lewis_hub.evaluate.harness import load
from lewis_hub.evaluate.short_text import require_short_run
from lewis_hub.tokenizer import token_ids

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


def test_a_block_that_takes_very_long_is_stopped(tmp_path, monkeypatch):
    """Models of several blocks are measured one at a time: a loop in a block had no limit."""
    monkeypatch.setattr(configuration, "LIMITS", {})
    sizes = {"vocab_size": 512, "hidden_size": 64, "n_layer": 8, "n_head": 2}
    for name, seed in {"base": 0, "expert": 1}.items():
        torch.manual_seed(seed)
        model = transformers.BloomForCausalLM(transformers.BloomConfig(**sizes))
        saved(tmp_path / name, model)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "a few words"}) + "\n")
    calibration = "{dataset: rows.jsonl, text: '{text}', samples: 1}"
    text = "{base_model: base, models: [expert], merge_method: ties, "
    text += f"guide: {{name: lewis, calibration: {calibration}}}}}"
    (tmp_path / "recipe.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    recipe = lewis_hub.read_recipe("recipe.yaml")
    by_block = lewis_hub.Execution(max_memory_bytes=10_000_000_000)
    assert lewis_hub.merge_models(recipe, "merged", by_block, progress=False).status == "merged"
    monkeypatch.setattr(short_text, "MAX_PASS_S", 1)
    change(tmp_path / "expert", slow_but_exact=True, pretraining_tp=10**9)

    with pytest.raises(SourceError) as caught:
        lewis_hub.merge_models(recipe, "other", by_block, progress=False)

    assert str(caught.value) == (
        "expert: it takes more than 1 s for a batch of texts.\n"
        "Its files are damaged, or made to do so: use an intact copy of the model."
    )


LETTERS = {"<pad>": 0, "A": 1, "C": 2, "G": 3, "T": 4}


@needs_library
def test_a_tokenizer_that_knows_a_few_letters_embeds_texts_of_them(tmp_path):
    """A tokenizer for DNA has no token for other letters, and fails there."""
    folder = saved(tmp_path / "model", bert(), tokenizer=False)
    words = Tokenizer(models.WordLevel(LETTERS, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokens = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")
    tokens.save_pretrained(folder)

    assert embedded(folder).encode(["ACGT"]).shape == (1, 32)
    with pytest.raises(TokenizerError) as caught:
        token_ids(tokenized(folder), "a few words")

    assert str(caught.value).startswith(
        f"{folder}: it makes no tokens of a text: Exception: WordLevel error: "
    )


@pytest.mark.parametrize("how", ["scored", "calibrated"])
def test_a_tokenizer_that_fails_at_texts_is_one_message(how, hub, tmp_path, monkeypatch):
    """An error of code in Rust is no Exception: a traceback, after the merge, at each run."""
    put_zoo(hub)
    for name in ("base", "expert-reverse"):
        shutil.copytree(zoo_folder() / name, tmp_path / name)
        file = tmp_path / name / "tokenizer.json"
        document = json.loads(file.read_text())
        document["pre_tokenizer"] = {"type": "FixedLength", "length": 0}
        file.write_text(json.dumps(document))
    shutil.copytree(zoo_folder() / "tasks", tmp_path / "tasks")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "a few words"}) + "\n")
    monkeypatch.chdir(tmp_path)
    text = "{base_model: base, models: [expert-reverse], merge_method: ties, "
    text += {
        "scored": "evaluate: {tasks: [zoo_reverse], include: tasks, limit: 2}}",
        "calibrated": "guide: {name: lewis, calibration: "
        "{dataset: rows.jsonl, text: '{text}', samples: 1}}}",
    }[how]
    (tmp_path / "recipe.yaml").write_text(text)

    with pytest.raises(LewisHubError, match="chunk size must be non-zero"):
        lewis_hub.merge_models(lewis_hub.read_recipe("recipe.yaml"), "merged", progress=False)

    assert not (tmp_path / "merged").exists()
