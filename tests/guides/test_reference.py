"""Against an own transcription of the published procedure, in loops and whole forward passes."""

import copy
import math

import published
import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from lewis_hub.errors import CalibrationModelError
from lewis_hub.guides.blocks import decoder_blocks, linears, matrix
from lewis_hub.guides.lewis import lewis_reference
from lewis_hub.guides.reference import block_importance, measure, padded
from lewis_hub.guides.registry import Statistics

from .conftest import ARCHITECTURES, N_TOKENS, tiny_model, tokens_of


def naive(model, texts):
    """Every pass goes through the whole model; earlier blocks are pruned by then."""
    model = copy.deepcopy(model)
    path, blocks = decoder_blocks(model)
    importance = {}
    for b in range(len(blocks)):
        inside = dict(linears(f"{path}.{b}", blocks[b]))
        seen = {at: [] for at in inside}
        handles = [
            module.register_forward_pre_hook(lambda _, args, at=seen[at]: at.append(args[0][0]))
            for at, module in inside.items()
        ]
        for text in texts:
            with torch.no_grad():
                model(input_ids=text[None])
        for handle in handles:
            handle.remove()
        for at, module in inside.items():
            if not seen[at]:
                continue  # its weight is used without a call
            weight = matrix(module)
            n_out, n_in = weight.shape
            squares = [0.0] * n_in
            for x in seen[at]:
                for j in range(n_in):
                    squares[j] += float((x[:, j].double() ** 2).sum()) / len(seen[at])
            total = 0.0
            for i in range(n_out):
                metric = [abs(float(weight[i, j])) * math.sqrt(squares[j]) for j in range(n_in)]
                total += sum(value**2 for value in metric)
                for j in sorted(range(n_in), key=lambda j: metric[j])[: n_in // 2]:
                    weight[i, j] = 0.0
            importance[at] = math.sqrt(total)
    return importance


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

    found = {}
    for measured in block_importance(copy.deepcopy(model), architecture, texts):
        found |= measured

    assert found == pytest.approx(naive(model, texts), rel=1e-4)


def test_what_the_benchmark_runs_in_the_authors_place_finds_the_same(llama, texts):
    found = published.importance(copy.deepcopy(llama), texts)

    expected = {}
    for measured in block_importance(llama, "llama", texts):
        expected |= measured
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

    found = {}
    for measured in block_importance(copy.deepcopy(llama), "llama", texts):
        found |= measured

    assert found == pytest.approx(naive(llama, texts), rel=1e-4)


def test_pruning_changes_what_later_blocks_are_measured_on(llama, texts):
    found = {}
    for measured in block_importance(llama, "llama", texts):
        found |= measured

    first = llama.model.layers[0].mlp.down_proj.weight
    assert ((first == 0).sum(dim=1) == first.shape[1] // 2).all()
    assert set(found) == {at for at, _ in linears(*decoder_blocks(llama))}


def test_each_set_is_measured_on_the_whole_model(llama, saved, texts):
    folder = saved(llama)
    tokens = tokens_of([[5, 6, 7], [8, 9]])
    tokens = type(tokens)(**{**vars(tokens), "limit": 6, "end": 2})
    done = []

    first, second = measure(folder, "me", [tokens, tokens], "cpu", done.append)

    assert first == second
    assert sum(done) == 2 * tokens.n_tokens


def test_a_tokenizer_without_an_end_cannot_pad(llama, saved):
    with pytest.raises(CalibrationModelError) as raised:
        measure(saved(llama), "me/model", [tokens_of([[5, 6]])], "cpu", lambda _: None)

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
    found = lewis_reference(Statistics(tuple(names), *measured), 0.3, 0.8)

    # q: 1/7, 2/7, 4/7 to 5 decimals; down: 0, .000004 (rounds to 0), .999996 (rounds to 1)
    wanted = [0.3 + 0.5 * s for s in (0.14286, 0.28571, 0.57143, 0.0, 0.0, 1.0)]
    assert list(found.values()) == pytest.approx(wanted, abs=5e-5)
    assert found[down.format(1)] == found[down.format(0)] == 0.3


def test_an_encoder_decoder_is_refused(texts):
    sizes = {"d_model": 8, "d_ff": 8, "num_layers": 1, "num_heads": 2, "d_kv": 4}
    model = T5ForConditionalGeneration(T5Config(vocab_size=N_TOKENS, **sizes))

    with pytest.raises(CalibrationModelError) as caught:
        list(block_importance(model, "me/t5", texts))

    assert str(caught.value) == (
        "me/t5: it has an encoder, and the published procedure knows decoders alone.\n"
        "Use guide `lewis`."
    )
