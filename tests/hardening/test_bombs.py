"""Small files that would take all time or memory, in each place where a file of others is read.

`tests/test_bombs.py` has those of YAML and of adapters' patterns, `tests/evaluate/test_chat.py`
those of templates, `tests/hub/test_rows.py` those of datasets. Here they lie in files of models.
"""

import json
import re
import shutil
import struct
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import lewis_hub
from hardening.fuzz import failure, limits
from hardening.targets import (
    FILE,
    SMALL,
    TARGETS,
    hostile_base,
    merge_a_folder,
    read_tokenizers,
    run_a_model,
    stored,
)
from lewis_hub import pipeline
from lewis_hub.calibration.meta_model import build_meta_model, build_named
from lewis_hub.calibration.model import load_model, load_tokenizer
from lewis_hub.calibration.subject import in_folder
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.errors import (
    BrokenCheckpointError,
    CheckFailedError,
    EvaluationError,
    LewisHubError,
    SourceError,
    TokenizerError,
)
from lewis_hub.evaluate import chat
from lewis_hub.evaluate.backends import EvaluationSettings
from lewis_hub.evaluate.embeddings import load_embedder
from lewis_hub.evaluate.harness import load
from lewis_hub.recipe.read import parse_recipe

PACKAGE = Path(chat.__file__).parents[1]
DEEP = "[" * 200_000 + "]" * 200_000
OBJECTS = {
    "deep": '{"a": ' + DEEP + "}",
    "deep objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "many values": '{"a": [' + "[]," * 5_000_000 + "1]}",
    "a number of a million digits": '{"a": ' + "9" * 1_000_000 + "}",
    "not UTF-8": '{"a": "\ud800"}',
    "not JSON": "{" * 100_000,
}
NAMES = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "model.safetensors.index.json"),
    *("hf_quant_config.json", "preprocessor_config.json", "chat_template.json", "README.md"),
)


@pytest.fixture(scope="module", autouse=True)
def imported():
    """Import what reads a model: on a busy machine that alone takes longer than a case may."""
    merge_a_folder(SMALL[0])
    run_a_model(SMALL[0])
    read_tokenizers(TARGETS["tokenizers"].seeds[0])


COUNTS = {
    "num_hidden_layers": 2**31,
    "n_layer": 1e300,
    "num_labels": 2**31,
    "num_local_experts": 2**31,
    "vision_config": {"depth": 10**9},
}
# what parses texts that lewis_hub itself wrote, or that the user types
OWN_TEXTS = {
    *("cli/jobs.py", "cli/models.py", "cli/merge.py", "cli/options.py", "cli/recipes.py"),
    *("demo/zoo.py", "distribution.py", "hub/converted.py", "merge/engine.py"),
    *("workflow/statistics.py", "workflow/tokenizers.py"),
    "evaluate/embeddings.py",  # predictions that mteb wrote in this run
    "recipe/read.py",  # in an example
    *("documents.py", "checkpoint/header.py"),  # which limit what they parse
}
PARSERS = re.compile(r"json\.loads?\(|yaml\.(?:safe_|full_|unsafe_)?load|(?<![.\w])eval\(")


@pytest.mark.parametrize("name", NAMES)
def test_a_bomb_in_a_file_of_a_model_is_refused_or_has_no_effect(name):
    texts = OBJECTS if name != "README.md" else {k: f"---\n{v}\n---\n" for k, v in OBJECTS.items()}
    with limits():
        found = {
            kind: failure(merge_a_folder, {**SMALL[0], name: text}) for kind, text in texts.items()
        }

    assert found == dict.fromkeys(texts)


@pytest.mark.parametrize("key", COUNTS)
def test_modules_without_number_are_refused_before_one_is_built(key):
    config = {**SMALL[0]["config.json"], key: COUNTS[key]}
    with limits():
        assert failure(run_a_model, {**SMALL[0], "config.json": config}) is None


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("attn_implementation", "evil/kernel"),
        ("_attn_implementation", {"": "eager", "text_config": "evil/kernel@main:f"}),
        ("experts_implementation", "evil/kernel"),
    ],
)
def test_a_kernel_of_the_hub_is_not_run(key, named, tmp_path):
    base = shutil.copytree(zoo_folder() / "base", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {key: named}))

    with pytest.raises(SourceError) as caught:
        load(base, EvaluationSettings())

    assert str(caught.value) == (
        f"{base}: `{key}` of its config.json names code of the Hub, {named}.\n"
        "Remove it in a copy of the model: only its own values and weights are used."
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("text_config", [1]),
        ("text_config", "a"),
        ("text_config", {"vocab_size": "390"}),
        ("vocab_size", [390]),
        ("model_type", ["llama"]),
    ],
)
def test_a_configuration_of_other_types_is_one_message(key, value, tmp_path):
    base = shutil.copytree(zoo_folder() / "base", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {key: value}))

    with pytest.raises(CheckFailedError, match=r"base: `\w+` of its config.json is no "):
        lewis_hub.transplant_tokenizer(base, base, tmp_path / "out")


def test_the_number_of_layers_is_told(tmp_path):
    base = shutil.copytree(zoo_folder() / "base", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}))

    with pytest.raises(SourceError) as caught:
        load(base, EvaluationSettings())

    assert str(caught.value) == (
        f"{base}: `num_hidden_layers` of its config.json is above the limit of 1,000.\n"
        "The file is damaged: use an intact copy of the model."
    )


LOADED = {
    "scored": lambda base: load(base, EvaluationSettings()),
    "measured": lambda base: load_model(base, "cpu", str(base)),
    "measured by block": lambda base: build_meta_model(in_folder(str(base), base), "cpu"),
    "embedding": lambda base: load_embedder(base, EvaluationSettings(backend="mteb")),
}


@pytest.mark.parametrize("load_base", LOADED.values(), ids=LOADED)
@pytest.mark.parametrize("key", ["num_key_value_heads", "head_dim", "intermediate_size"])
def test_a_configuration_is_refused_whose_model_is_far_larger_than_its_files(
    load_base, key, tmp_path
):
    """transformers made 9 GB of random weights for a model of 0.3 MB, and took a minute."""
    base = shutil.copytree(zoo_folder() / "base", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {key: 10**7}))

    told = (
        r"describes a model of [0-9,]{13,} bytes, but its weights have 2,\d{3},\d{3} bytes in its"
    )
    with pytest.raises(LewisHubError, match=f"{base}: its config.json {told}"):
        load_base(base)


@pytest.mark.parametrize("load_base", LOADED.values(), ids=LOADED)
def test_an_architecture_of_another_type_hides_no_size(load_base, tmp_path):
    """What is loaded is of the type; BERT has no `head_dim`, so it was far smaller."""
    base = shutil.copytree(zoo_folder() / "base", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config |= {"architectures": ["BertModel"], "head_dim": 10**7, "position_embedding_type": "x"}
    config |= {"type_vocab_size": 2, "hidden_dropout_prob": 0.0, "layer_norm_eps": 1e-6}
    config |= {"attention_probs_dropout_prob": 0.0, "chunk_size_feed_forward": 0}
    config |= {"is_decoder": False, "add_cross_attention": False}
    (base / "config.json").write_text(json.dumps(config))

    with pytest.raises(LewisHubError, match=r"describes a model of|lack"):
        load_base(base)


def test_a_configuration_asks_nobody_to_run_its_code(tmp_path, monkeypatch):
    """transformers asked on the terminal, and ran the code of the model after a `y`."""
    base = shutil.copytree(zoo_folder() / "base", tmp_path / "base")
    code = {"AutoModelForCausalLM": "modeling.Own"}
    config = {"model_type": "vit", "architectures": ["Own"], "auto_map": code}
    (base / "config.json").write_text(json.dumps(config))
    asked = []
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or "y")

    with pytest.raises(LewisHubError, match="needs Python code from its repo, which is not run"):
        load_model(base, "cpu", str(base))

    assert asked == []


def test_a_model_inside_a_model_asks_nobody_to_run_its_code(tmp_path, monkeypatch):
    """transformers asked all the same, and ran the code of any folder or repo after a `y`."""
    base = shutil.copytree(zoo_folder() / "base", tmp_path / "base")
    (base / "evil.py").write_text("raise SystemExit\n")
    code = {"AutoModelForCausalLM": "evil.Own"}
    inner = {"model_type": "vit", "num_hidden_layers": 1}
    config = {"model_type": "vision-encoder-decoder", "encoder": inner}
    config |= {"architectures": ["VisionEncoderDecoderModel"]}
    config |= {"decoder": {**inner, "auto_map": code, "_name_or_path": str(base)}}
    (base / "config.json").write_text(json.dumps(config))
    asked = []
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or "y")

    for load_it in (lambda: load_model(base, "cpu", str(base)), lambda: build_named(base, "a/b")):
        with pytest.raises(LewisHubError, match="needs Python code from its repo, which is not"):
            load_it()

    assert asked == []


def test_a_model_that_asks_for_very_many_beams_is_refused(tmp_path):
    """With 20,000 a model of 2 MB took 2 GB, for one short answer; with 100 some answers took 8."""
    base = shutil.copytree(zoo_folder() / "base", tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps({"num_beams": 17}))

    with pytest.raises(EvaluationError) as caught:
        load(base, EvaluationSettings())

    assert str(caught.value) == (
        f"{base}: `num_beams` of its generation_config.json is above the limit of 16.\n"
        "Each beam takes memory: set fewer in a copy of it."
    )


def test_a_model_with_very_many_words_that_it_may_not_write_is_refused(tmp_path):
    """Each word was looked at for each token: 4 MB took minutes."""
    base = shutil.copytree(zoo_folder() / "base", tmp_path / "base")
    words = {"bad_words_ids": [[5, 6]] * 5001}
    (base / "generation_config.json").write_text(json.dumps(words))

    with pytest.raises(EvaluationError) as caught:
        load(base, EvaluationSettings())

    assert str(caught.value) == (
        f"{base}: `bad_words_ids` of its generation_config.json has 10,002 values, the limit is "
        "10,000.\nEach takes time for each token: remove some in a copy of it."
    )


def test_a_model_writes_no_more_tokens_than_a_task_asks_for(tmp_path):
    """Without an end it wrote as many as its own settings ask for: scoring never ended."""
    base = shutil.copytree(zoo_folder() / "base", tmp_path / "base")
    settings = {"max_new_tokens": 10**9, "eos_token_id": None}
    (base / "generation_config.json").write_text(json.dumps(settings))
    lm = load(base, EvaluationSettings())

    made = lm._model_generate(torch.tensor([[5, 6]]), max_length=5, stop=[])

    assert made.shape == (1, 5)


def test_many_added_tokens_are_read_at_once():
    """One by one they took minutes: each takes time for all before it."""
    tokens = {str(390 + i): {"content": f"<t{i}>", "special": True} for i in range(20_000)}
    document = {"a/base: tokenizer.json": SMALL[0]["tokenizer.json"]}
    document["a/base: tokenizer_config.json"] = {"added_tokens_decoder": tokens}
    with limits():
        assert failure(read_tokenizers, document) is None


def test_a_tensor_without_values_has_no_billions_of_rows():
    entry = {"dtype": "BF16", "shape": [10**9, 0], "data_offsets": [0, 0]}

    with pytest.raises(BrokenCheckpointError, match=r"shape \[1000000000, 0\], but no values"):
        stored({"header": {"model.embed_tokens.weight": entry}, "n_data": 0})


@pytest.mark.parametrize(
    "name", ["layers." + "9" * 5000 + ".q.weight", "a." * 100_000 + "weight", "q" * 1001]
)
def test_a_tensor_has_no_endless_name(name):
    entry = {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}

    with pytest.raises(BrokenCheckpointError, match=r"characters, .* and so on; at most 1,000 are"):
        stored({"header": {name: entry}, "n_data": 2})
    assert stored({"header": {name[:1000]: entry}, "n_data": 2})


def test_a_header_that_claims_more_than_there_is_takes_no_memory():
    for begin in (b"\xff" * 8, struct.pack("<Q", 100_000_000), struct.pack("<Q", 2**63)):
        path = zoo_folder() / "base" / FILE
        with limits():
            found = failure(merge_with_header, {"begin": begin.hex(), "rest": str(path)})
        assert found is None


def merge_with_header(document):
    with hostile_base(SMALL[0]) as (base, recipe):
        content = bytes.fromhex(document["begin"]) + Path(document["rest"]).read_bytes()[8:]
        (base / FILE).write_bytes(content)
        pipeline.merge_models(parse_recipe(json.dumps(recipe), "r.yaml"), base.with_name("merged"))


def test_every_tokenizer_renders_within_limits(tmp_path, monkeypatch):
    monkeypatch.setattr(chat, "MAX_S", 0.2)
    base = shutil.copytree(zoo_folder() / "base", tmp_path / "base")
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    (base / "chat_template.jinja").write_text(loops)
    said = [{"role": "user", "content": "hi"}]

    for tokenizer in (
        load_tokenizer(str(base), "zoo/base"),
        load(base, EvaluationSettings()).tokenizer,
    ):
        with pytest.raises(TokenizerError, match="it takes more than 0.2 s for one conversation"):
            tokenizer.apply_chat_template(said, tokenize=False)


def assert_refused(base):
    loaders = [
        lambda: load_tokenizer(str(base), "zoo/base"),
        lambda: load(base, EvaluationSettings()),
    ]
    if find_spec("sentence_transformers"):
        loaders.append(lambda: load_embedder(base, EvaluationSettings()))
    for loader in loaders:
        with pytest.raises(TokenizerError, match="a text more than 2,000 times as long"):
            loader()


def test_every_tokenizer_of_transformers_is_refused_if_it_makes_texts_very_long(tmp_path):
    base = shutil.copytree(zoo_folder() / "base", tmp_path / "base")
    step = {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 50}
    document = json.loads((base / "tokenizer.json").read_text())
    document["normalizer"] = {"type": "Sequence", "normalizers": [step] * 2}
    (base / "tokenizer.json").write_text(json.dumps(document))

    assert_refused(base)


def test_a_tokenizer_of_another_file_is_refused_if_it_makes_texts_very_long(tmp_path):
    """transformers takes the newest `tokenizer.VERSION.json` that the configuration lists."""
    base = shutil.copytree(zoo_folder() / "base", tmp_path / "base")
    config = json.loads((base / "tokenizer_config.json").read_text())
    listed = {"fast_tokenizer_files": ["tokenizer.4.0.0.json"]}
    (base / "tokenizer_config.json").write_text(json.dumps(config | listed))
    step = {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 2001}
    document = json.loads((base / "tokenizer.json").read_text()) | {"normalizer": step}
    (base / "tokenizer.4.0.0.json").write_text(json.dumps(document))

    assert_refused(base)


def test_added_tokens_are_not_made_very_long_while_they_are_read():
    step = {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 1000}
    added = {**dict.fromkeys(("single_word", "lstrip", "rstrip", "special"), False), "id": 390}
    document = {
        **json.loads((zoo_folder() / "base" / "tokenizer.json").read_text()),
        "added_tokens": [{**added, "content": "e", "normalized": True}],
        "normalizer": {"type": "Sequence", "normalizers": [step] * 4},
    }
    with limits():
        found = failure(read_tokenizers, {"a/base: tokenizer.json": document})

    assert found is None


def test_added_tokens_pass_through_no_pattern_while_they_are_read():
    """The library took 4 s for each of them, in one call that nothing could stop."""
    added = {**dict.fromkeys(("single_word", "lstrip", "rstrip", "special"), False)}
    tokens = [{**added, "id": 390 + i, "content": f"{i}" + "x" * 4000} for i in range(5)]
    document = {
        **json.loads((zoo_folder() / "base" / "tokenizer.json").read_text()),
        "added_tokens": [{**one, "normalized": True} for one in tokens],
        "normalizer": {"type": "Replace", "pattern": {"Regex": r"(x+)\1+y"}, "content": "y"},
    }
    with limits():
        found = failure(read_tokenizers, {"a/base: tokenizer.json": document})

    assert found is None


def test_only_limited_parsers_read_what_others_wrote():
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if PARSERS.search(path.read_text(encoding="utf-8"))
    }

    assert found - OWN_TEXTS - {path for path in found if path.startswith("localhub/")} == set()
