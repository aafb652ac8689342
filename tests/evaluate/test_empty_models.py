"""Models that are built without values, to compare their sizes with those of the files."""

import shutil
import sys
import time
from importlib.util import find_spec

import pytest
import transformers
from sentence_models import embedder

from lewis_hub.calibration.model import load_model
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.errors import SourceError
from lewis_hub.evaluate import empty_models
from lewis_hub.evaluate.backends import EvaluationSettings, load_backend
from lewis_hub.evaluate.embeddings import load_embedder
from lewis_hub.evaluate.empty_models import build_empty, require_size_of_files

LOADERS = {
    "measured": lambda base: load_model(base, "cpu", str(base)),
    "scored": lambda base: load_backend(base, EvaluationSettings()),
    "embedding": lambda base: load_embedder(base, EvaluationSettings(backend="mteb")),
}
SMALL = {"hidden_size": 8, "embedding_size": 8, "intermediate_size": 8, "num_attention_heads": 1}


def small(folder):
    transformers.AlbertConfig(**SMALL, num_hidden_groups=2).save_pretrained(folder)


@pytest.fixture
def model(tmp_path):
    """A configuration whose model has 20,000 groups of modules, which takes a minute."""
    small(tmp_path / "first")
    build_empty(tmp_path / "first", transformers.AutoModel)  # no limit is to stop an import
    config = transformers.AlbertConfig(**SMALL, num_hidden_groups=20_000, num_hidden_layers=1)
    config.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("limit", "value", "told"),
    [
        ("MAX_BUILD_S", 0.2, "it takes more than 0.2 s for its modules"),
        ("MAX_BUILD_BYTES", 10_000_000, "it takes more than 0.0 GB for its modules"),
    ],
)
def test_a_model_of_very_many_modules_is_not_built(model, monkeypatch, limit, value, told):
    """Keys of each architecture count modules: a model of 50 kB took hours, and all memory."""
    monkeypatch.setattr(empty_models, limit, value)

    with pytest.raises(SourceError) as caught:
        require_size_of_files("me/model", model, transformers.AutoModel, 10**9)

    assert str(caught.value) == (
        f"me/model: the model that its config.json describes cannot be built: {told}.\n"
        "The file is damaged: use an intact copy of the model."
    )


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a limit of memory")
@pytest.mark.parametrize(
    ("depth", "told"),
    [(10**9, "it takes too much memory"), (5 * 10**7, "it takes more than 0.1 GB for its modules")],
)
def test_one_call_cannot_take_more_memory_while_a_model_is_built(
    depth, told, tmp_path, monkeypatch
):
    """A vision tower makes a number for each of its layers at once: 12 GB of 330 kB of files."""
    settings = {"embed_dim": 8, "num_heads": [1], "image_size": 8, "patch_size": 4}
    transformers.Swinv2Config(**settings, depths=[1]).save_pretrained(tmp_path)
    build_empty(tmp_path, transformers.AutoModel)  # imports it
    transformers.Swinv2Config(**settings, depths=[depth]).save_pretrained(tmp_path)
    monkeypatch.setattr(empty_models, "MAX_MAPPED_BYTES", 1_000_000_000)
    monkeypatch.setattr(empty_models, "MAX_BUILD_BYTES", 100_000_000)

    with pytest.raises(SourceError, match=rf"cannot be built: {told}\.\n"):
        build_empty(tmp_path, transformers.AutoModel)


@pytest.mark.parametrize("load", ["scored", "measured", "embedding"])
def test_a_load_that_takes_more_than_the_files_of_the_model_is_stopped(load, tmp_path, monkeypatch):
    if load == "embedding":
        if not find_spec("sentence_transformers"):
            pytest.skip("sentence-transformers is not installed")
        embedder(tmp_path, 1)
    else:
        shutil.copytree(zoo_folder() / "base", tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(empty_models, "FREE_BYTES", 20_000_000)
    monkeypatch.setattr(empty_models, "MAX_LOAD_BYTES", 60_000_000)
    monkeypatch.setattr(empty_models, "MOST_TIMES", 20)
    read = transformers.PreTrainedModel._load_pretrained_model

    def read_and_grow(*args, **options):
        kept = [b"x" * (10_000_000 + n) for n in range(100) if time.sleep(0.01) is None]
        return kept and read(*args, **options)

    monkeypatch.setattr(transformers.PreTrainedModel, "_load_pretrained_model", read_and_grow)

    with pytest.raises(SourceError, match=rf"{tmp_path}: it takes more than 0\.1 GB for its load"):
        LOADERS[load](tmp_path)


def test_positions_that_are_in_no_file_are_few(tmp_path):
    """transformers computes those of RoFormer one by one when it loads: 240 kB took minutes."""

    def require(n):
        settings = {**SMALL, "vocab_size": 8, "num_hidden_layers": 1}
        config = transformers.RoFormerConfig(**settings, max_position_embeddings=n)
        config.save_pretrained(tmp_path)
        return require_size_of_files("me/model", tmp_path, transformers.AutoModel, 10_000)

    assert require(2_000_000) > 64_000_000

    with pytest.raises(SourceError) as caught:
        require(2_200_000)

    assert str(caught.value) == (
        "me/model: its config.json describes a model of 70,402,240 bytes, but its weights have "
        "10,000 bytes in its files.\n"
        "The file is damaged: use an intact copy of the model."
    )


def test_a_model_within_the_limits_is_built(tmp_path):
    small(tmp_path)

    groups = build_empty(tmp_path, transformers.AutoModel).encoder.albert_layer_groups

    assert [next(one.parameters()).device.type for one in groups] == ["meta", "meta"]
