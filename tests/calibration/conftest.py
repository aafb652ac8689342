from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lewis_hub.calibration.grams import sum_of_squares
from lewis_hub.calibration.model import block_linears
from lewis_hub.calibration.passes import input_sums
from lewis_hub.calibration.summaries import norms_of
from lewis_hub.calibration.texts import CalibrationTokens, TokenBatch

N_TOKENS = 97  # of the tiny models' vocabulary
CHAT_TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"

SMALL = {"vocab_size": N_TOKENS, "max_position_embeddings": 64}
LLAMA = {
    **SMALL,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", LLAMA),
    "qwen2": ("Qwen2Config", LLAMA),  # biases on q, k, v
    "gpt2": ("GPT2Config", {**SMALL, "n_embd": 16, "n_layer": 2, "n_head": 4}),  # Conv1D
    "gpt_neox": (  # fused q, k, v
        "GPTNeoXConfig",
        {
            **SMALL,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
    ),
    "mamba": (  # no attention at all
        "MambaConfig",
        {"vocab_size": N_TOKENS, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2},
    ),
}


def tiny_model(architecture: str, seed: int = 0) -> PreTrainedModel:
    config_class, settings = ARCHITECTURES[architecture]
    config = getattr(transformers, config_class)(**settings, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def activation_norms(
    model: PreTrainedModel,
    name: str,
    calibration: Iterable[TokenBatch],
    advance: Callable[[int], None],
) -> dict[str, Tensor]:
    batches = list(calibration)
    modules = block_linears(model, name)
    sums = input_sums(model, name, modules, batches, sum_of_squares, advance)
    return norms_of(sums, sum(int(batch.attention_mask.sum()) for batch in batches))


def tokens_of(ids: Sequence[Sequence[int]]) -> CalibrationTokens:
    return CalibrationTokens(
        ids=tuple(map(tuple, ids)),
        rows=tuple(range(len(ids))),
        n_asked=len(ids),
        n_truncated=0,
        n_empty=0,
        tokenizer="tiny",
    )


@pytest.fixture(params=sorted(ARCHITECTURES))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(request.param)


@pytest.fixture
def llama() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture
def texts() -> CalibrationTokens:
    generator = torch.Generator().manual_seed(7)
    return tokens_of(
        [torch.randint(3, N_TOKENS, (n,), generator=generator).tolist() for n in (5, 11, 1, 8, 5)]
    )


@pytest.fixture
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, after a beginning-of-sequence token; with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1, **{letter: i + 2 for i, letter in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[PreTrainedModel], Path]:
    def save(model: PreTrainedModel) -> Path:
        model.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save
