"""The numbers per item that stand behind a correlation."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec

import numpy as np
import pytest
from scipy.stats import spearmanr
from sentence_models import embedder

from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.errors import EvaluationError, LewisHubError, SourceError
from lewis_hub.evaluate.backends import EvaluationSettings
from lewis_hub.evaluate.embeddings import correlation_parts, load_embedder
from lewis_hub.evaluate.tasks import TaskSelection
from lewis_hub.tune.objective import Search, choose_split

pytestmark = pytest.mark.skipif(
    not find_spec("sentence_transformers"), reason="sentence_transformers is not installed"
)


def noisy(n, seed):
    generator = np.random.default_rng(seed)
    expected = generator.normal(size=n)
    return expected, 0.6 * expected + generator.normal(size=n)


def test_the_parts_of_a_correlation_have_it_as_their_mean():
    expected, found = noisy(50, 1)
    expected[:10] = expected[0]  # ties

    parts = correlation_parts(expected, found)

    assert len(parts) == 50
    assert np.mean(parts) == pytest.approx(spearmanr(expected, found).statistic, abs=1e-12)


def test_their_standard_error_is_that_of_the_correlation():
    """The spread of the correlation over samples of the same population."""
    samples = [noisy(200, seed) for seed in range(300)]
    spread = np.std([spearmanr(*sample).statistic for sample in samples])

    errors = [np.std(correlation_parts(*sample), ddof=1) / np.sqrt(200) for sample in samples]

    assert np.mean(errors) == pytest.approx(spread, rel=0.15)


def test_a_constant_has_no_correlation():
    assert correlation_parts([1.0, 1.0, 1.0], [0.1, 0.2, 0.3]) == []


def test_a_search_needs_a_language_model():
    with pytest.raises(EvaluationError) as caught:
        choose_split(Search(), TaskSelection(("STS12",), library="mteb"))

    assert str(caught.value) == (
        "evaluate: `backend: mteb` scores embeddings, but a search needs answers of a language "
        "model.\nGive the parameters yourself."
    )


def modules(folder, kind):
    listed = [{"idx": 1, "name": "1", "path": "1_Dense", "type": kind}]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Dense").mkdir(exist_ok=True)


def test_no_code_of_others_and_no_pickle_is_loaded(tmp_path):
    modules(tmp_path, "subprocess.Popen")
    with pytest.raises(EvaluationError) as foreign:
        load_embedder(tmp_path, EvaluationSettings(backend="mteb"))
    modules(tmp_path, "sentence_transformers.models.Dense")
    (tmp_path / "1_Dense" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(EvaluationError) as pickled:
        load_embedder(tmp_path, EvaluationSettings(backend="mteb"))

    assert str(foreign.value) == (
        f"{tmp_path}: its module `subprocess.Popen` is none that is loaded.\n"
        "Use a model with modules of these classes of sentence-transformers: Dense, Dropout, "
        "LayerNorm, LogitScore, MLMTransformer, Normalize, Pooling, SpladePooling, Transformer."
    )
    assert "the weights of its module 1_Dense are pickled" in str(pickled.value)


@pytest.mark.parametrize(
    ("name", "settings", "named"),
    [
        (
            "config.json",
            {"sentence_transformers": {"activation_fn": "torch.distributed.run.main"}},
            "torch.distributed.run.main",
        ),
        (
            "config.json",
            {"sbert_ce_default_activation_function": "torch.utils.collect_env.main"},
            "torch.utils.collect_env.main",
        ),
    ],
)
def test_settings_lead_to_no_other_function(name, settings, named, tmp_path):
    (tmp_path / name).write_text(json.dumps(settings))

    with pytest.raises(EvaluationError) as caught:
        load_embedder(tmp_path, EvaluationSettings(backend="mteb"))

    assert str(caught.value) == (
        f"{tmp_path}: its {name} names `{named}`, which is not in its folder.\n"
        "Only the files of the model are used: use another one."
    )


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        (
            "processor_config.json",
            {
                "processor_class": "DiaProcessor",
                "audio_tokenizer": {
                    "audio_tokenizer_class": "BertModel",
                    "audio_tokenizer_name_or_path": "/home/me",
                },
            },
        ),
        ("preprocessor_config.json", {"repo_path": "/home/me", "class_info_file": "a.json"}),
        ("adapter_config.json", {"base_model_name_or_path": "/home/me"}),
    ],
)
def test_no_processor_or_adapter_leads_out_of_the_model(name, settings, tmp_path):
    """transformers loaded any folder of this machine, or repo of the Hub, that one named."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(json.dumps(settings))

    with pytest.raises(LewisHubError, match="/home/me"):
        load_embedder(tmp_path, EvaluationSettings(backend="mteb"))


def test_no_text_gets_a_very_long_prompt(tmp_path):
    """It goes before each text that the model embeds."""
    embedder(tmp_path, 1)
    prompts = {"prompts": {"query": "x" * 10_001}, "default_prompt_name": "query"}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(prompts))

    with pytest.raises(EvaluationError) as caught:
        load_embedder(tmp_path, EvaluationSettings(backend="mteb"))

    assert str(caught.value) == (
        f"{tmp_path}: its prompt `query`, which goes before each text, has 10,001 letters; "
        "the limit is 10,000.\nUse a copy with a shorter prompt."
    )


def test_a_model_of_another_class_is_refused(tmp_path):
    """It lost its modules, and was scored by the mean over its tokens."""
    embedder(tmp_path, 1)
    stated = json.dumps({"model_type": "MultiVectorEncoder"})
    (tmp_path / "config_sentence_transformers.json").write_text(stated)

    with pytest.raises(EvaluationError) as caught:
        load_embedder(tmp_path, EvaluationSettings(backend="mteb"))

    assert str(caught.value) == (
        f"{tmp_path}: its config_sentence_transformers.json names 'MultiVectorEncoder'.\n"
        "Expected: SentenceTransformer or SparseEncoder or CrossEncoder."
    )


def test_no_module_is_read_outside_of_the_model(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    modules(model, "sentence_transformers.models.Dense")
    text = (model / "modules.json").read_text()
    (model / "modules.json").write_text(text.replace("1_Dense", "../other"))
    (tmp_path / "other").mkdir()

    with pytest.raises(EvaluationError, match="`../other` is a link to outside of the folder"):
        load_embedder(model, EvaluationSettings(backend="mteb"))


@pytest.mark.parametrize("path", [".m", "1_Dense/2_Dense", "other", "1_Dense/.m"])
def test_modules_are_in_folders_of_the_usual_names(path, tmp_path):
    """Files in hidden ones are none of the source: links in them were followed."""
    modules(tmp_path, "sentence_transformers.models.Dense")
    (tmp_path / path).mkdir()
    text = (tmp_path / "modules.json").read_text()
    (tmp_path / "modules.json").write_text(text.replace("1_Dense", path))

    with pytest.raises(EvaluationError) as caught:
        load_embedder(tmp_path, EvaluationSettings(backend="mteb"))

    assert str(caught.value) == (
        f"{tmp_path}: `modules.json` names the folder `{path}`, expected one such as `1_Pooling`.\n"
        "Load it in sentence-transformers and save it again."
    )


def test_a_dense_layer_with_a_pickle_is_told_to_be_pickled(tmp_path):
    modules(tmp_path, "sentence_transformers.models.Dense")
    place = tmp_path / "1_Dense"
    (place / "config.json").write_text(json.dumps({"in_features": 768, "out_features": 512}))
    (place / "pytorch_model.bin").write_bytes(bytes(4 * 768 * 512))

    with pytest.raises(EvaluationError) as pickled:
        load_embedder(tmp_path, EvaluationSettings(backend="mteb"))

    assert f"the weights of its module {place.name} are pickled" in str(pickled.value)


def test_a_dense_layer_without_its_pickle_is_not_told_to_be_damaged(tmp_path):
    modules(tmp_path, "sentence_transformers.models.Dense")
    config = tmp_path / "1_Dense" / "config.json"
    config.write_text(json.dumps({"in_features": 768, "out_features": 512}))

    with pytest.raises(EvaluationError) as fetched:  # no pickle is downloaded
        load_embedder(tmp_path, EvaluationSettings(backend="mteb"))

    assert str(fetched.value) == (
        f"{tmp_path}: the weights of its module 1_Dense are in no safetensors file.\n"
        "Load it in sentence-transformers and save it again."
    )


def test_a_configuration_for_onnx_describes_no_weights(tmp_path):
    base = shutil.copytree(zoo_folder() / "base", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "onnx").mkdir()
    (base / "onnx" / "config.json").write_text(json.dumps(config | {"vocab_size": 10**8}))

    loaded = load_embedder(base, EvaluationSettings(backend="mteb"))

    assert loaded.encode("hello").shape == (config["hidden_size"],)


def test_no_module_is_built_that_is_larger_than_its_files(tmp_path):
    modules(tmp_path, "sentence_transformers.models.Dense")
    config = tmp_path / "1_Dense" / "config.json"
    config.with_name("model.safetensors").write_bytes(b"")
    config.write_text(json.dumps({"in_features": 10**6, "out_features": 10**6}))
    with pytest.raises(EvaluationError) as dense:
        load_embedder(tmp_path, EvaluationSettings(backend="mteb"))
    config.write_text(json.dumps({"model_type": "bert", "num_hidden_layers": 10**6}))
    with pytest.raises(SourceError) as deep:
        load_embedder(tmp_path, EvaluationSettings(backend="mteb"))

    assert str(dense.value) == (
        f"{tmp_path}: its module 1_Dense has 1000000 × 1000000 weights, its file fewer.\n"
        "The file is damaged: use an intact copy."
    )
    assert str(deep.value).startswith(
        f"{tmp_path / '1_Dense'}: `num_hidden_layers` of its config.json is above the limit of 1"
    )
