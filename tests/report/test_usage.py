"""A merge of every family of models gets a card whose snippet runs."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from tiny_models import fine_tuned, tiny_model
from transformers.convert_slow_tokenizer import bytes_to_unicode

import lewis_hub
from lewis_hub.hub.facts import ModelFacts
from lewis_hub.report.usage import BY_NAME, ModelUsage, usage_of

RATE = 16_000
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 48}
VISION = SIZES | {"image_size": 32, "patch_size": 16}
CONV = {"conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 8)}
CONV |= {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4}
CONV |= {"num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer"}


def text_tokenizer(**special: str) -> transformers.PreTrainedTokenizerFast:
    """The zoo's tokenizer with more special tokens."""
    file = str(lewis_hub.zoo_folder() / "base" / "tokenizer.json")
    tokens = {"pad_token": "<pad>", "unk_token": "<unk>", **special}
    return transformers.PreTrainedTokenizerFast(tokenizer_file=file, **tokens)


def with_text(model_type: str, automatic: str) -> Callable[[Path], Any]:
    def build(folder: Path) -> Any:
        text_tokenizer(mask_token="[MASK]").save_pretrained(folder)
        return tiny_model(model_type, getattr(transformers, automatic))

    return build


def with_chat(folder: Path) -> Any:
    tokenizer = text_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return tiny_model("llama", transformers.AutoModelForCausalLM)


def llava(folder: Path) -> Any:
    tokenizer = text_tokenizer(image_token="<image>")
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**SIZES, vocab_size=400),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    processor = transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(size=32, crop_size=32),
        tokenizer=tokenizer,
        patch_size=16,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    )
    processor.save_pretrained(folder)
    return transformers.LlavaForConditionalGeneration(config)


def clip(folder: Path) -> Any:
    config = transformers.CLIPConfig(
        text_config=SIZES | {"vocab_size": 400, "eos_token_id": 2},
        vision_config=VISION,
        projection_dim=32,
    )
    images = transformers.CLIPImageProcessor(size=32, crop_size=32)
    transformers.CLIPProcessor(images, text_tokenizer()).save_pretrained(folder)
    return transformers.CLIPModel(config)


def vit(folder: Path) -> Any:
    size = {"height": 32, "width": 32}
    transformers.ViTImageProcessor(size=size).save_pretrained(folder)
    return transformers.ViTForImageClassification(transformers.ViTConfig(**VISION))


def sound_features() -> Any:
    return transformers.Wav2Vec2FeatureExtractor(sampling_rate=RATE)


def wav2vec2_ctc(folder: Path) -> Any:
    vocabulary = folder / "vocab.json"
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary.write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(str(vocabulary))
    transformers.Wav2Vec2Processor(sound_features(), tokenizer).save_pretrained(folder)
    config = transformers.Wav2Vec2Config(**SIZES, **CONV, vocab_size=len(letters))
    return transformers.Wav2Vec2ForCTC(config)


def wav2vec2_classifier(folder: Path) -> Any:
    sound_features().save_pretrained(folder)
    config = transformers.Wav2Vec2Config(**SIZES, **CONV, classifier_proj_size=8)
    return transformers.Wav2Vec2ForSequenceClassification(config)


def whisper(folder: Path) -> Any:
    alphabet = bytes_to_unicode().values()
    vocabulary = {letter: i for i, letter in enumerate(alphabet)}
    tokenizer = transformers.WhisperTokenizer(vocab=vocabulary, merges=[])
    languages = ["<|en|>", "<|transcribe|>", "<|translate|>", "<|notimestamps|>"]
    start = ["<|startoftranscript|>", "<|endoftext|>", *languages]
    tokenizer.add_special_tokens({"additional_special_tokens": start})
    features = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=2)
    transformers.WhisperProcessor(features, tokenizer).save_pretrained(folder)
    first, end = (tokenizer.convert_tokens_to_ids(token) for token in start[:2])
    config = transformers.WhisperConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=16,
        max_source_positions=100, max_target_positions=300, vocab_size=len(tokenizer),
        decoder_start_token_id=first, bos_token_id=end, eos_token_id=end, pad_token_id=end,
        begin_suppress_tokens=None,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


def with_modules(folder: Path, kinds: dict[str, str]) -> None:
    pytest.importorskip("sentence_transformers")
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))


def sentence_transformer(folder: Path) -> Any:
    with_modules(folder, {"": "models.Transformer", "1_Pooling": "models.Pooling"})
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return with_text("bert", "AutoModel")(folder)


SPARSE = "sparse_encoder.models"


def sparse_encoder(folder: Path) -> Any:
    with_modules(folder, {"": "models.Transformer", "1_SpladePooling": f"{SPARSE}.SpladePooling"})
    own = {"model_type": "SparseEncoder"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(own))
    task = {"transformer_task": "fill-mask"}
    (folder / "sentence_bert_config.json").write_text(json.dumps(task))
    (folder / "1_SpladePooling").mkdir()
    pooling = {"pooling_strategy": "sum", "embedding_dimension": None}
    (folder / "1_SpladePooling" / "config.json").write_text(json.dumps(pooling))
    return with_text("bert", "AutoModelForMaskedLM")(folder)


def cross_encoder(folder: Path) -> Any:
    pytest.importorskip("sentence_transformers")
    text_tokenizer().save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, vocab_size=400, num_labels=1)
    config.sentence_transformers = {"version": "5.0.0"}
    return transformers.BertForSequenceClassification(config)


CASES = {  # family, the card's task, builder, what the snippet prints
    "llama": ("language model", "text-generation", with_text("llama", "AutoModelForCausalLM"), ""),
    "llama, chat": ("language model", "text-generation", with_chat, ""),
    "mamba": ("language model", "text-generation", with_text("mamba", "AutoModelForCausalLM"), ""),
    "t5": ("encoder-decoder", "text-generation", with_text("t5", "AutoModelForSeq2SeqLM"), ""),
    "bert": ("encoder", "feature-extraction", with_text("bert", "AutoModel"), r"torch.Size\(\[1, "),
    "bert, masked": (
        *("masked language model", "fill-mask", with_text("bert", "AutoModelForMaskedLM")),
        r"'sequence': '[Tt]he",
    ),
    "bert, classes": (
        *("text classifier", "text-classification"),
        with_text("bert", "AutoModelForSequenceClassification"),
        r"\[\{'label': 'LABEL_[01]', 'score': 0\.\d+\}\]",
    ),
    "bert, tokens": (
        *("token classifier", "token-classification"),
        with_text("bert", "AutoModelForTokenClassification"),
        r"'entity': 'LABEL_[01]'",
    ),
    "bert, answers": (
        *("question answering model", "question-answering"),
        with_text("bert", "AutoModelForQuestionAnswering"),
        "",
    ),
    "llava": ("vision-language model", "image-text-to-text", llava, ""),
    "clip": (
        *("image-text model", "zero-shot-image-classification", clip),
        r"'label': 'a (cat|dog)'",
    ),
    "vit": ("image classifier", "image-classification", vit, r"'label': 'LABEL_[01]'"),
    "wav2vec2": (
        *("speech recognition model", "automatic-speech-recognition", wav2vec2_ctc),
        r"\{'text': '",
    ),
    "whisper": (
        *("speech recognition model", "automatic-speech-recognition", whisper),
        r"\{'text': '",
    ),
    "wav2vec2, classes": (
        *("audio classifier", "audio-classification", wav2vec2_classifier),
        r"'label': 'LABEL_[01]'",
    ),
    "embeddings": (
        *("embedding model", "sentence-similarity", sentence_transformer),
        r"tensor\(\[\[1\.0000,",
    ),
    "sparse embeddings": (
        *("sparse embedding model", "feature-extraction", sparse_encoder),
        r"tensor\(\[\[",
    ),
    "reranker": ("reranker", "text-ranking", cross_encoder, r"'corpus_id': [01]"),
}


def parents(build: Callable[[Path], Any], folder: Path) -> tuple[Path, Path]:
    """A tiny base and a model that was fine-tuned from it, with all files that the base has."""
    base, expert = folder / "base", folder / "expert"
    base.mkdir()
    model = build(base)
    model.save_pretrained(base)
    shutil.copytree(base, expert)
    fine_tuned(model, 1).save_pretrained(expert)
    return base, expert


def merge(base: Path, expert: Path, folder: Path) -> Path:
    recipe = {
        "base_model": str(base),
        "models": [{"model": str(expert), "parameters": {"weight": 0.5}}],
        "merge_method": "task_arithmetic",
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return lewis_hub.merge_models(lewis_hub.read_recipe(file), folder / "merged").output


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")  # torch, of a product
@pytest.mark.parametrize("name", CASES)
def test_the_snippet_in_the_card_of_every_family_runs(name, tmp_path, monkeypatch, capsys):
    family, task, build, printed = CASES[name]
    folder = merge(*parents(build, tmp_path), tmp_path)
    card = ModelCard.load(folder / "README.md")
    Image.new("RGB", (40, 30), "red").save(folder / "picture.png")
    if BY_NAME[family].snippet == "speech":
        soundfile = pytest.importorskip("soundfile")
        soundfile.write(folder / "speech.wav", np.sin(np.arange(RATE) / 20), RATE)
    capsys.readouterr()

    [program] = re.findall(r"^```python\n(.*?)\n```$", card.text, flags=re.M | re.S)
    monkeypatch.chdir(folder)
    exec(compile(program, "snippet", "exec"), {"__name__": "snippet"})

    assert re.search(printed, capsys.readouterr().out)
    assert card.data.pipeline_tag == task
    assert f"\nThis {family} merges" in card.text
    library = "sentence-transformers" if "sentence_transformers" in program else "transformers"
    assert card.data.library_name == library
    assert f"pip install -U {' '.join(BY_NAME[family].packages)}\n" in card.text
    scored = "lewis-hub scores by lm-eval, which runs only" in card.text
    assert scored == (task != "text-generation")


def test_every_family_is_run_or_only_loaded():
    run = {family for family, *_ in CASES.values()}

    assert {"model", "multimodal model"} == set(BY_NAME) - run


def test_the_documents_list_every_family_with_its_task():
    page = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text(encoding="utf-8")
    table = page.partition("| a merge of a ... |")[2].partition("\n\n")[0]
    rows = [line.split(" | ")[:2] for line in table.splitlines()[2:]]

    assert {name.removeprefix("| "): task for name, task in rows} == {
        name: f"`{family.task}`" if family.task else "that of its parents"
        for name, family in BY_NAME.items()
    }


def facts(task: str | None = None, example: str | None = None) -> ModelFacts:
    return ModelFacts("a/b", None, (), None, task, example)


def test_the_parents_task_counts_if_it_fits_the_class_and_they_agree(tmp_path):
    t5 = {"architectures": ["T5ForConditionalGeneration"]}

    assert usage_of(tmp_path, t5, [facts("translation"), facts()]).task == "translation"
    assert usage_of(tmp_path, t5, [facts("translation"), facts("summarization")]).task == (
        "text-generation"
    )
    assert usage_of(tmp_path, t5, [facts("image-classification")]).task == "text-generation"
    own = {"architectures": ["MyOwnModel"]}
    assert usage_of(tmp_path, own, [facts("text-to-video")]).task == "text-to-video"
    assert usage_of(tmp_path, own, [facts()]).task is None


def test_a_parents_example_is_the_snippets_and_the_widgets(tmp_path):
    config = {"architectures": ["BertForSequenceClassification"]}

    usage = usage_of(tmp_path, config, [facts(), facts(example='Ein "guter" Film')])

    assert usage.example == 'Ein "guter" Film'
    assert usage.widget(chat=False) == [{"text": 'Ein "guter" Film'}]


def test_a_vision_model_without_its_processor_gets_a_snippet_for_text(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")

    usage = usage_of(tmp_path, {"architectures": ["Gemma3ForConditionalGeneration"]}, [])

    assert (usage.family.snippet, usage.task) == ("generate", "text-generation")
    assert usage.automatic == "AutoModelForImageTextToText"


def test_a_repos_own_class_is_loaded_by_the_automatic_class_that_it_names(tmp_path):
    config = {
        "architectures": ["MyMaskedModel"],
        "auto_map": {"AutoConfig": "x.C", "AutoModelForMaskedLM": "x.MyMaskedModel"},
    }

    assert usage_of(tmp_path, config, []).automatic == "AutoModelForMaskedLM"


@pytest.mark.parametrize("broken", [{}, {"architectures": "x"}, {"architectures": [7]}])
def test_a_configuration_that_names_no_class_is_taken_for_a_language_model(tmp_path, broken):
    assert usage_of(tmp_path, broken, []) == ModelUsage()


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "[]", "\ufeff", "9" * 5000])
def test_a_damaged_file_counts_as_empty(tmp_path, text):
    for name in ("tokenizer_config.json", "config_sentence_transformers.json"):
        (tmp_path / name).write_text(text, encoding="utf-8")

    assert usage_of(tmp_path, {}, []) == ModelUsage()
