from __future__ import annotations

import pytest
from transformers.models.auto import modeling_auto

from lewis_hub.errors import EvaluationError
from lewis_hub.evaluate.scorable import named_classes, require_scorable, unscorable

NAMED = {  # class -> what cannot be scored
    "LlamaForCausalLM": None,
    "T5ForConditionalGeneration": None,
    "MambaForCausalLM": None,
    "MyOwnModel": None,  # left to lm-eval
    "BertForMaskedLM": "BertForMaskedLM",
    "BertModel": "BertModel",
    "WhisperForConditionalGeneration": "WhisperForConditionalGeneration",
    "LlavaForConditionalGeneration": "LlavaForConditionalGeneration",
}


@pytest.mark.parametrize("mapping", ["CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "CTC"])
def test_classes_are_read_from_the_file_of_transformers_as_it_maps_them(mapping):
    mapped = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES")

    assert named_classes(mapping) == set(mapped.values())


def test_classes_without_a_head_are_known_too():
    assert {"BertModel", "FunnelBaseModel", "FunnelModel"} <= named_classes("MODEL")


def test_what_generates_text_is_scored_and_unknown_classes_are_left_to_lm_eval():
    assert {name: unscorable({"architectures": [name]}) for name in NAMED} == NAMED
    assert unscorable({}) is None
    pictures = {"architectures": ["MllamaForConditionalGeneration"], "model_type": "mllama"}
    assert unscorable(pictures) is None  # MllamaForCausalLM loads its language model


def test_a_classifier_is_refused_before_its_head_would_be_random():
    with pytest.raises(EvaluationError) as raised:
        require_scorable("me/mood", {"architectures": ["BertForSequenceClassification"]})

    assert str(raised.value) == (
        "me/mood: is a BertForSequenceClassification, and lm-eval runs only models that generate "
        "text.\nScore it on labelled data of your own."
    )


def test_vllm_scores_what_also_reads_pictures_and_a_server_what_it_answers():
    pictures = {"architectures": ["LlavaForConditionalGeneration"]}
    moods = {"architectures": ["BertForSequenceClassification"]}

    found = {
        backend: (unscorable(pictures, backend), unscorable(moods, backend))
        for backend in ("hf", "vllm", "local-completions")
    }

    assert found == {
        "hf": ("LlavaForConditionalGeneration", "BertForSequenceClassification"),
        "vllm": (None, "BertForSequenceClassification"),
        "local-completions": (None, None),
    }


def test_mteb_scores_encoders_and_models_of_sentence_transformers():
    llama, bert = ({"architectures": [name]} for name in ("LlamaForCausalLM", "BertModel"))

    assert unscorable(bert, "mteb") is None
    assert unscorable(llama, "mteb") == "LlamaForCausalLM"
    assert unscorable(llama, "mteb", has_modules=True) is None
    assert unscorable({"architectures": ["MyOwnModel"]}, "mteb") is None
    reranker = {"architectures": ["BertForSequenceClassification"]}
    assert unscorable(reranker, "mteb") == "BertForSequenceClassification"
    assert unscorable(reranker | {"sentence_transformers": {}}, "mteb") is None
