"""Against an own transcription of the published procedure, `by_loops`."""

import copy

import published
import pytest
import reference_procedure
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from lewis_hub.calibration.model import block_linears
from lewis_hub.calibration.reference import block_importance, measure_reference, padded, text_blocks
from lewis_hub.calibration.subject import Snapshot
from lewis_hub.errors import CalibrationModelError
from lewis_hub.guides.lewis import lewis_reference
from lewis_hub.guides.registry import Measurements

from .conftest import ARCHITECTURES, N_TOKENS, tiny_model, tokens_of


def importance(model, texts):
    """All blocks together; the model is pruned then."""
    found = {}
    for measured in block_importance(model, *text_blocks(model, "tiny", texts[0]), texts):
        found |= measured
    return found


@pytest.fixture
def texts():
    generator = torch.Generator().manual_seed(5)
    found = tokens_of(
        [torch.randint(3, N_TOKENS, (n,), generator=generator).tolist() for n in (5, 12, 1)]
    )
    return padded(type(found)(**{**vars(found), "limit": 12, "end": 2}), "tiny")


def test_texts_are_padded_with_the_end_of_sequence(texts):
    assert texts.shape == (3, 12)
    assert texts[0, 5:].tolist() == [2] * 7
    assert texts[2, 1:].tolist() == [2] * 11


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_importance_is_that_of_the_published_procedure(architecture, texts):
    model = tiny_model(architecture)

    found = importance(copy.deepcopy(model), texts)

    assert found == pytest.approx(reference_procedure.importance(model, texts), rel=1e-4)


def test_what_the_benchmark_runs_in_the_authors_place_finds_the_same(llama, texts):
    found = published.importance(copy.deepcopy(llama), texts)

    expected = importance(llama, texts)
    # to the last bit, as what is pruned turns on it
    assert {f"model.layers.{name}": one for name, one in found.items()} == expected


class Routed(nn.Module):
    """Leaves some texts alone."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) if x[0, 0, 0] > 0 else x


def test_a_module_that_some_texts_do_not_reach_has_the_mean_over_the_others(llama, texts):
    block = llama.model.layers[0]
    block.mlp = Routed(block.mlp)
    reached = []
    handle = block.mlp.inner.register_forward_hook(lambda *_: reached.append(1))
    for text in texts:
        llama(input_ids=text[None])
    handle.remove()
    assert len(reached) == 2  # of 3

    found = importance(copy.deepcopy(llama), texts)

    assert found == pytest.approx(reference_procedure.importance(llama, texts), rel=1e-4)


def test_pruning_changes_what_later_blocks_are_measured_on(llama, texts):
    found = importance(llama, texts)

    first = llama.model.layers[0].mlp.down_proj.weight
    assert ((first == 0).sum(dim=1) == first.shape[1] // 2).all()
    assert set(found) == set(block_linears(llama, "llama"))


def test_each_set_is_measured_on_the_whole_model(llama, saved, texts):
    folder = saved(llama)
    tokens = tokens_of([[5, 6, 7], [8, 9]])
    tokens = type(tokens)(**{**vars(tokens), "limit": 6, "end": 2})
    done = []

    first, second = measure_reference(Snapshot("me", folder), [tokens, tokens], "cpu", done.append)

    assert first == second
    assert sum(done) == 2 * tokens.n_tokens


def test_a_tokenizer_without_an_end_cannot_pad(llama, saved):
    with pytest.raises(CalibrationModelError) as raised:
        measure_reference(
            Snapshot("me/model", saved(llama)), [tokens_of([[5, 6]])], "cpu", lambda _: None
        )

    assert str(raised.value) == (
        "me/model: the tokenizer of tiny has no end-of-sequence token to pad with.\n"
        "Use guide `lewis`, which pads nothing."
    )


def test_shares_are_rounded_before_the_span():
    q, down = "model.layers.{}.self_attn.q_proj", "model.layers.{}.mlp.down_proj"
    names = [q.format(b) for b in range(3)] + [down.format(b) for b in range(3)]
    base = dict.fromkeys(names, 10.0)
    expert = dict(zip(names, [11.0, 12.0, 14.0, 10.0, 10.000004, 11.0], strict=True))

    measured = ({"lewis_reference": values} for values in (base, expert))
    found = lewis_reference(Measurements(tuple(names), *measured), 0.3, 0.8)

    # q: 1/7, 2/7, 4/7 to 5 decimals; down: 0, .000004 (rounds to 0), .999996 (rounds to 1)
    wanted = [0.3 + 0.5 * s for s in (0.14286, 0.28571, 0.57143, 0.0, 0.0, 1.0)]
    assert list(found.values()) == pytest.approx(wanted, abs=5e-5)
    assert found[down.format(1)] == found[down.format(0)] == 0.3


def test_an_encoder_decoder_is_refused(texts):
    sizes = {"d_model": 8, "d_ff": 8, "num_layers": 1, "num_heads": 2, "d_kv": 4}
    model = T5ForConditionalGeneration(T5Config(vocab_size=N_TOKENS, **sizes))

    with pytest.raises(CalibrationModelError) as caught:
        text_blocks(model, "me/t5", texts[0])

    assert str(caught.value) == (
        "me/t5: it has an encoder, and the published procedure knows decoders alone.\n"
        "Use guide `lewis`."
    )
