"""What a model is for and how it is run, by its class, its files and its parents' cards.

This gives the card's `pipeline_tag`, `library_name`, `widget`, snippet and intended use. The
snippets are in `templates/usage`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lewis_hub.documents import read_json
from lewis_hub.evaluate.scorable import architecture, is_known, named_classes, unscorable
from lewis_hub.hub.facts import ModelFacts
from lewis_hub.hub.source import EMBEDDER, MODULES

TRANSFORMERS, SENTENCES = "transformers", "sentence-transformers"
PROCESSORS = ("processor_config.json", "preprocessor_config.json")
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json")
SIMILAR = ("A cat sleeps on the sofa.", "A kitten naps on the couch.", "It will rain tomorrow.")
MTEB = "https://github.com/embeddings-benchmark/mteb"
EVALUATE = "https://huggingface.co/docs/evaluate"


@dataclass(frozen=True)
class Family:
    """Models that the same snippet runs."""

    name: str  # as in "this language model"
    task: str | None  # of the Hub, in `pipeline_tag`
    snippet: str  # in `templates/usage`
    purpose: str  # as in "Intended for: ..."
    mappings: tuple[str, ...] = ()  # `MODEL_FOR_..._MAPPING_NAMES` of transformers with its classes
    automatic: str = "AutoModel"  # the class of transformers that loads them
    related: tuple[str, ...] = ()  # tasks of the Hub that parents may name instead
    packages: tuple[str, ...] = ("accelerate", "torch", "transformers")
    example: str = ""  # text to run it on


WITH_SOUND = ("accelerate", "soundfile", "torch", "transformers")
WITH_PICTURES = ("accelerate", "pillow", "torch", "transformers")
FAMILIES = (  # the first with the class counts
    Family(
        "speech recognition model",
        "automatic-speech-recognition",
        "speech",
        "writing down what is said in a recording",
        ("SPEECH_SEQ_2_SEQ", "CTC"),
        "AutoModelForSpeechSeq2Seq",
        packages=WITH_SOUND,
    ),
    Family(
        "vision-language model",
        "image-text-to-text",
        "image-text",
        "writing text about pictures",
        ("IMAGE_TEXT_TO_TEXT",),
        "AutoModelForImageTextToText",
        ("image-to-text", "any-to-any", "video-text-to-text", "visual-question-answering"),
        WITH_PICTURES,
        "What is in this picture?",
    ),
    Family(
        "multimodal model",
        "any-to-any",
        "load",
        "writing text about text, pictures or sound",
        ("MULTIMODAL_LM",),
        "AutoModelForMultimodalLM",
        ("audio-text-to-text", "image-text-to-text", "automatic-speech-recognition"),
    ),
    Family(
        "encoder-decoder",
        "text-generation",  # where the Hub now lists text2text-generation
        "seq2seq",
        "writing a text from a text, such as a translation or a summary",
        ("SEQ_TO_SEQ_CAUSAL_LM",),
        "AutoModelForSeq2SeqLM",
        ("translation", "summarization", "text2text-generation"),
        example="translate English to German: The house is small.",
    ),
    Family(
        "masked language model",
        "fill-mask",
        "text",
        "filling in masked words, and as a start for fine-tuning",
        ("MASKED_LM",),
        "AutoModelForMaskedLM",
        ("feature-extraction",),
    ),
    Family(
        "language model",
        "text-generation",
        "generate",
        "text generation",
        ("CAUSAL_LM",),
        "AutoModelForCausalLM",
        ("text-classification", "text-ranking"),
        example="Once upon a time",
    ),
    Family(
        "text classifier",
        "text-classification",
        "text",
        "sorting texts into the classes in its configuration",
        ("SEQUENCE_CLASSIFICATION",),
        "AutoModelForSequenceClassification",
        ("zero-shot-classification", "text-ranking"),
        example="I like this film.",
    ),
    Family(
        "token classifier",
        "token-classification",
        "text",
        "marking words of a text, such as names",
        ("TOKEN_CLASSIFICATION",),
        "AutoModelForTokenClassification",
        example="Ada Lovelace was born in London.",
    ),
    Family(
        "question answering model",
        "question-answering",
        "answer",
        "finding the answer to a question in a text",
        ("QUESTION_ANSWERING",),
        "AutoModelForQuestionAnswering",
    ),
    Family(
        "image classifier",
        "image-classification",
        "picture",
        "sorting pictures into the classes in its configuration",
        ("IMAGE_CLASSIFICATION",),
        "AutoModelForImageClassification",
        packages=WITH_PICTURES,
    ),
    Family(
        "image-text model",
        "zero-shot-image-classification",
        "picture",
        "comparing pictures with texts",
        ("ZERO_SHOT_IMAGE_CLASSIFICATION",),
        related=("feature-extraction", "image-feature-extraction"),
        packages=WITH_PICTURES,
    ),
    Family(
        "audio classifier",
        "audio-classification",
        "speech",
        "sorting recordings into the classes in its configuration",
        ("AUDIO_CLASSIFICATION",),
        "AutoModelForAudioClassification",
        packages=WITH_SOUND,
    ),
)
FEATURES = Family(
    "encoder",
    "feature-extraction",
    "features",
    "features of texts, and as a start for fine-tuning",
    ("MODEL",),
    related=("fill-mask", "sentence-similarity"),
    packages=("accelerate", "torch", "transformers"),
    example="A cat sleeps on the sofa.",
)
OTHER = Family("model", None, "load", "what its parents are made for")
WITH_SENTENCES = {  # class of sentence-transformers -> family
    "SentenceTransformer": Family(
        "embedding model",
        "sentence-similarity",
        "similarity",
        "embeddings of texts: search, clustering, comparison",
        related=("feature-extraction",),
        packages=(SENTENCES,),
    ),
    "SparseEncoder": Family(
        "sparse embedding model",
        "feature-extraction",
        "sparse",
        "sparse embeddings of texts: search",
        related=("sentence-similarity",),
        packages=(SENTENCES,),
    ),
    "CrossEncoder": Family(
        "reranker",
        "text-ranking",
        "ranking",
        "ordering texts by how well they answer a question",
        related=("text-classification",),
        packages=(SENTENCES,),
    ),
}
MLX_TYPES = (  # of language models that mlx-lm 0.32 runs, as `model_type` in `config.json`
    "afmoe apertus bailing_moe bitnet cohere cohere2 dbrx deepseek deepseek_v2 "
    "deepseek_v3 dots1 ernie4_5 ernie4_5_moe exaone exaone4 falcon_h1 falcon_mamba "
    "gemma gemma2 gemma3_text glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neox gpt_oss "
    "granite granitemoe granitemoehybrid helium hunyuan_v1_dense internlm2 internlm3 "
    "jamba lfm2 lfm2_moe llama mamba mamba2 minicpm minicpm3 minimax mistral mixtral "
    "nanochat nemotron nemotron_h olmo olmo2 olmo3 olmoe openelm phi phi3 phimoe "
    "plamo plamo2 qwen qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next recurrent_gemma "
    "seed_oss smollm3 stablelm starcoder2"
)
MLX = frozenset(MLX_TYPES.split())
BY_NAME = {one.name: one for one in (*FAMILIES, FEATURES, OTHER, *WITH_SENTENCES.values())}
LANGUAGE_MODEL = BY_NAME["language model"]


@dataclass(frozen=True)
class ModelUsage:
    """How a model is run, and what the Hub is told about it."""

    family: Family = LANGUAGE_MODEL
    task: str | None = LANGUAGE_MODEL.task  # the parents' one, if it fits the family
    automatic: str = LANGUAGE_MODEL.automatic  # the class of transformers that loads it
    stated: str | None = None  # an example in a parent's card
    mask: str | None = None  # the token that hides a word
    unscored: str | None = None  # the class, if lm-eval cannot score it
    mlx: bool = False  # whether mlx-lm runs it

    @property
    def library(self) -> str:
        """The library whose classes the snippet uses."""
        return SENTENCES if SENTENCES in self.family.packages else TRANSFORMERS

    @property
    def example(self) -> str:
        """A text to run it on."""
        return self.stated or self.family.example

    @property
    def message(self) -> str:
        """What to say to a chat model."""
        return self.stated or "What can you do?"

    @property
    def sentences(self) -> list[str]:
        """Texts to compare."""
        first, *others = SIMILAR
        return [self.stated or first, *others]

    @property
    def scored_by(self) -> str:
        """What scores such a model, in Markdown."""
        if self.library == SENTENCES or self.family == FEATURES:
            return f"With `backend: mteb` it scores embeddings by tasks of [mteb](<{MTEB}>)."
        return f"Score it on labelled data of your own, for example by [evaluate](<{EVALUATE}>)."

    def widget(self, *, chat: bool) -> list[dict[str, Any]] | None:
        """An example for the model's page; None where the Hub's own ones are better."""
        if self.family.snippet == "generate" and chat:
            return [{"messages": [{"role": "user", "content": self.message}]}]
        if self.family.snippet == "similarity":
            first, *others = self.sentences
            return [{"source_sentence": first, "sentences": others}]
        if self.family.task == "fill-mask":
            return [{"text": f"The sun is {self.mask}."}] if self.mask else None
        is_text = self.family.snippet in ("generate", "seq2seq", "text", "features")
        return [{"text": self.example}] if is_text else None


def usage_of(folder: Path, config: Mapping[str, Any], parents: Sequence[ModelFacts]) -> ModelUsage:
    """Find how the model in a folder is run; its configuration is unchecked.

    The parents' task counts where they agree on one that fits the class of the model.
    """
    family, automatic = _family(folder, config)
    stated = {parent.task for parent in parents} - {None}
    task = stated.pop() if len(stated) == 1 else None
    return ModelUsage(
        family=family,
        task=task if task in family.related or family == OTHER else family.task,
        automatic=automatic,
        stated=next((parent.example for parent in parents if parent.example), None),
        mask=_mask(folder),
        mlx=family == LANGUAGE_MODEL and str(config.get("model_type")) in MLX,
        unscored=automatic if family in WITH_SENTENCES.values() else unscorable(config),
    )


def _family(folder: Path, config: Mapping[str, Any]) -> tuple[Family, str]:
    """The family of a model, and the class that loads it."""
    if kind := _sentence_class(folder, config):
        return WITH_SENTENCES[kind], kind
    named, mapped = architecture(config), config.get("auto_map")
    automatic = mapped if isinstance(mapped, Mapping) else {}
    for family in FAMILIES:
        if family.automatic in automatic or _is_one_of(named, family.mappings):
            return _runnable(folder, family), family.automatic
    if named is None:
        return LANGUAGE_MODEL, LANGUAGE_MODEL.automatic
    if _is_one_of(named, FEATURES.mappings) and not config.get("is_encoder_decoder"):
        return (FEATURES if _has(folder, TOKENIZERS) else OTHER), "AutoModel"
    return OTHER, named if is_known(named) else "AutoModel"


def _sentence_class(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The class of sentence-transformers that a folder is for; None: for another library."""
    kind = _read(folder / EMBEDDER).get("model_type")
    if kind in WITH_SENTENCES:
        return str(kind)
    if (folder / MODULES).exists():
        return "SentenceTransformer"
    return "CrossEncoder" if "sentence_transformers" in config else None


def _runnable(folder: Path, family: Family) -> Family:
    """The same family; with a plainer snippet if the files that the usual one needs are missing."""
    needs_processor = family.snippet in ("speech", "image-text", "picture")
    if not needs_processor or _has(folder, PROCESSORS):
        return family
    if family.snippet == "image-text" and _has(folder, TOKENIZERS):
        return replace(LANGUAGE_MODEL, name=family.name, automatic=family.automatic)
    return replace(family, snippet="load", packages=OTHER.packages)


def _is_one_of(named: str | None, mappings: Sequence[str]) -> bool:
    return named is not None and any(named in named_classes(mapping) for mapping in mappings)


def _has(folder: Path, names: Sequence[str]) -> bool:
    return any((folder / name).exists() for name in names)


def _mask(folder: Path) -> str | None:
    token = _read(folder / "tokenizer_config.json").get("mask_token")
    token = token.get("content") if isinstance(token, Mapping) else token
    return token if isinstance(token, str) else None


def _read(file: Path) -> Mapping[str, Any]:
    """A JSON file; empty if it is absent, damaged, too large, or no object."""
    try:
        found = read_json(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
