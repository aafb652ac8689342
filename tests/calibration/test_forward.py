"""Products and threads with equal bytes; hidden states in memory and on the disk."""

from __future__ import annotations

import errno
from collections import namedtuple

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear

from lewis_hub.calibration import forward
from lewis_hub.calibration.forward import ActivationCache, ByOneDNN, by_rows, whole_shares
from lewis_hub.calibration.measure import measure_inputs
from lewis_hub.calibration.subject import Snapshot
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.errors import OutputError
from lewis_hub.methods.numerics import torch_threads

from .conftest import tokens_of

sizes = st.integers(1, 70)


@settings(deadline=None)
@given(sizes, sizes, sizes, st.booleans())
def test_products_are_those_of_the_definition_and_the_same_on_any_number_of_threads(
    n_rows, n_in, n_out, has_bias
):
    x, weight = torch.randn(n_rows, n_in), torch.randn(n_out, n_in)
    bias = torch.randn(n_out) if has_bias else None
    wide = x.double() @ weight.double().T + (0 if bias is None else bias.double())

    found = []
    for n_threads in (1, 2, 3, 8):
        with torch_threads(n_threads):
            found.append(by_rows(x, weight, bias))

    torch.testing.assert_close(found[0].double(), wide, rtol=0, atol=1e-4)
    assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.parametrize("shape", [(33,), (0, 33), (2, 0, 33), (2, 3, 4, 33)])
def test_rows_may_have_any_shape(shape):
    x, weight = torch.randn(shape), torch.randn(7, 33)

    torch.testing.assert_close(by_rows(x, weight), x @ weight.T)


def test_a_bias_that_is_every_other_entry_of_a_tensor_is_added():
    x, weight, bias = torch.ones(3, 8), torch.zeros(4, 8), torch.arange(8.0)[::2]

    assert by_rows(x, weight, bias).tolist() == [[0.0, 2.0, 4.0, 6.0]] * 3


@settings(deadline=None)
@given(sizes, sizes, sizes, st.booleans(), st.booleans())
def test_products_without_copies_of_rows_have_the_same_bytes(
    n_rows, n_in, n_out, has_bias, transposed
):
    x, weight = torch.randn(n_rows, n_in), torch.randn(n_out, n_in)
    weight = weight.T.contiguous().T if transposed else weight
    bias = torch.randn(n_out) if has_bias else None

    found = by_rows(x, weight, bias)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(forward, "_without_copies", lambda: None)
        assert torch.equal(by_rows(x, weight, bias), found)


def test_matrices_may_be_parts_of_others_in_any_layout():
    whole = torch.randn(40, 50)
    parts = [whole[3:9, 4:20], whole[4:20, 3:9].T, whole[:, :16], whole[0, :16].expand(5, 16)]

    for weight in parts:
        for x in (whole[1:8, 30:46], whole[1:17, 30:41].T, whole[::3, 2:34:2]):
            torch.testing.assert_close(by_rows(x, weight), x @ weight.T)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_multiplied_as_ever(dtype):
    x, weight = torch.randn(3, 33, dtype=dtype), torch.randn(7, 33, dtype=dtype)

    assert torch.equal(by_rows(x, weight), x @ weight.T)


def test_a_linear_inside_the_context_multiplies_so_with_its_bias_and_none_outside():
    module = torch.nn.Linear(33, 5)
    x = torch.randn(7, 33)

    with torch.no_grad(), ByOneDNN():
        inside = module(x), linear(input=x, weight=module.weight, bias=None)
    outside = module(x)

    assert torch.equal(inside[0], by_rows(x, module.weight, module.bias))
    assert torch.equal(inside[1], by_rows(x, module.weight))
    assert outside.requires_grad


def test_a_weight_without_values_is_an_error_though_torch_would_return_nonsense():
    with pytest.raises(RuntimeError, match="a weight that is on meta has no values"):
        by_rows(torch.randn(2, 3), torch.empty(4, 3, device="meta"))


def test_rows_of_another_width_are_refused_in_torchs_words():
    with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied \(2x33 and 32x7\)"):
        by_rows(torch.ones(2, 33), torch.ones(7, 32))


@pytest.mark.parametrize(
    ("widths", "available", "n_threads"),
    [
        ([4096, 14336], 64, 64),
        ([4096, 14336], 6, 4),
        ([576, 1536], 64, 2),  # 192 divides both: 2 torch_threads of 3 pairs
        ([896, 4864], 64, 4),
        ([100, 200], 8, 1),
        ([16], 8, 1),
        ([4096], 1, 1),
    ],
)
def test_every_thread_gets_whole_pairs_of_vectors(widths, available, n_threads):
    assert whole_shares(widths, available) == n_threads


def test_the_number_of_threads_is_put_back():
    before = torch.get_num_threads()
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


@pytest.fixture
def wide(saved):
    """A folder with a model that four torch_threads can share."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=390, num_hidden_layers=2, **sizes)
    torch.manual_seed(0)
    return saved(transformers.LlamaForCausalLM(config))


def test_importance_is_the_same_to_the_last_bit_on_any_number_of_threads(wide):
    generator = torch.Generator().manual_seed(3)
    sets = [
        tokens_of([torch.randint(3, 390, (61,), generator=generator).tolist() for _ in range(23)])
    ]
    for folder in (zoo_folder() / "base", wide):
        found = []
        for n_threads in (1, 2, 3, 4, 5, 8):
            with torch_threads(n_threads):
                found.append(measure_inputs(Snapshot("base", folder), sets, "cpu", lambda _: None))

        assert all(measured == found[0] for measured in found)


Usage = namedtuple("Usage", "total used free")


@pytest.fixture(params=[1, 1 << 20], ids=["on the disk", "in memory"])
def held(request, monkeypatch):
    monkeypatch.setattr(forward, "HELD_BYTES", request.param)


@pytest.mark.usefixtures("held")
def test_what_was_written_last_is_read_in_its_dtype_and_layout(tmp_path):
    first = torch.arange(24.0).reshape(2, 3, 4)
    second = torch.arange(6, dtype=torch.bfloat16).reshape(1, 2, 3).transpose(1, 2)
    with ActivationCache(tmp_path) as kept:
        numbers = [kept.add(first), kept.add(second)]
        found = [kept.read(number) for number in numbers]
        turned = -first.reshape(3, 4, 2).permute(2, 0, 1)
        kept.write(numbers[0], turned)

        assert torch.equal(found[0], first)
        assert torch.equal(found[1], second)
        assert found[1].stride() == second.stride()
        assert torch.equal(kept.read(numbers[0]), turned)
        assert kept.read(numbers[0]).stride() == turned.stride()
        assert torch.equal(kept.read(numbers[1]), second)


@pytest.mark.usefixtures("held")
def test_a_wider_dtype_than_before_overwrites_no_other(tmp_path):
    with ActivationCache(tmp_path) as kept:
        numbers = [kept.add(torch.full((3,), i, dtype=torch.bfloat16)) for i in (1, 2)]
        kept.write(numbers[0], torch.full((3,), 0.1))

        assert torch.equal(kept.read(numbers[0]), torch.full((3,), 0.1))
        assert torch.equal(kept.read(numbers[1]), torch.full((3,), 2, dtype=torch.bfloat16))


@pytest.mark.usefixtures("held")
def test_nothing_is_left_in_the_folder_after_an_error(tmp_path):
    def fail(kept: ActivationCache) -> None:
        kept.add(torch.ones(1000))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), ActivationCache(tmp_path) as kept:
        fail(kept)

    assert list(tmp_path.iterdir()) == []


def test_more_than_the_disk_holds_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(10**9, 0, 10**9))
    with ActivationCache(tmp_path) as kept:
        kept.require_room(forward.HELD_BYTES)
        kept.require_room(10**9)
        with pytest.raises(OutputError) as raised:
            kept.require_room(10**9 + 10**7)

    assert str(raised.value) == (
        f"{tmp_path}: the hidden states of all calibration texts need 1.01 GB, 1.00 GB are free.\n"
        "Free some space, or lower `samples` or `max_tokens` of the calibration."
    )


def test_a_disk_that_fills_up_meanwhile_is_told(tmp_path, monkeypatch):
    with ActivationCache(tmp_path) as kept:

        def full(_: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(kept._file, "write", full)
        with pytest.raises(OutputError) as raised:
            kept.add(torch.ones(3))

    assert str(raised.value) == (
        f"{tmp_path}: the hidden states of all calibration texts cannot be written: No space left "
        "on device.\n"
        "Free some space, or lower `samples` or `max_tokens` of the calibration."
    )
