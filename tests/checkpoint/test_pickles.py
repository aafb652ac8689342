"""Pickles to safetensors: what is written, what is left out, and what is refused unexecuted."""

import os
import pickle
import zipfile
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file

from lewis_hub.checkpoint.pickles import convert
from lewis_hub.errors import PickleError


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def converted(tmp_path, *saved, ties=None, **options):
    pickles = {}
    for i, tensors in enumerate(saved):
        name = f"pytorch_model-{i + 1:05d}-of-{len(saved):05d}.bin"
        name = name if len(saved) > 1 else "pytorch_model.bin"
        torch.save(tensors, tmp_path / name, **options)
        pickles[name] = tmp_path / name
    output = tmp_path / "out"
    output.mkdir()
    told = []
    files = convert("me/model", pickles, output, told.append, ties=ties)
    return files, output, told


def test_every_dtype_and_shape_comes_out_as_it_was(tmp_path):
    tensors = {
        "a": normal(5, 7).bfloat16(),
        "b": normal(3).half(),
        "c": normal(2, 3, 4),
        "d": torch.tensor(2.5),
        "e": torch.arange(4),
        "f": torch.tensor([True, False]),
        "g": torch.empty(0, 4),
        "h": normal(6, 8).t(),  # lies in another order
        "i": torch.nn.Parameter(normal(4)),
        "j": normal(10)[3:6],
        "k": torch._neg_view(normal(4)),  # stored with the other sign
    }

    files, output, told = converted(tmp_path, OrderedDict(tensors))

    found = load_file(output / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor.detach()), name
    assert [file.name for file in files] == ["model.safetensors"]
    assert files[0].n_bytes == (output / "model.safetensors").stat().st_size
    assert sum(told) == sum(tensor.nbytes for tensor in tensors.values())


def test_shards_stay_shards_and_get_an_index(tmp_path):
    first, second = {"a": normal(4, 4)}, {"b": normal(3), "c": normal(2)}

    files, output, _ = converted(tmp_path, first, second)

    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert [file.name for file in files] == [*names, "model.safetensors.index.json"]
    assert load_file(output / names[0]).keys() == {"a"}
    assert load_file(output / names[1]).keys() == {"b", "c"}


def test_a_pickle_of_the_older_kind_is_read(tmp_path):
    tensors = {"a": normal(4, 4)}

    _, output, _ = converted(tmp_path, tensors, _use_new_zipfile_serialization=False)

    assert torch.equal(load_file(output / "model.safetensors")["a"], tensors["a"])


EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("ties", [True, False, None])
def test_a_head_that_is_the_embeddings_is_written_once(tmp_path, ties, shared):
    embeddings = normal(8, 4)
    tensors = {HEAD: embeddings if shared else embeddings + 1, EMBED: embeddings}
    tensors["norm.weight"] = normal(4)

    _, output, _ = converted(tmp_path, tensors, ties=ties)

    both = ties is False or (ties is None and not shared)
    wanted = {EMBED, "norm.weight"} | ({HEAD} if both else set())
    assert load_file(output / "model.safetensors").keys() == wanted


@pytest.mark.parametrize("ties", [True, False, None])
def test_of_other_shared_tensors_the_first_is_written(tmp_path, ties):
    one = normal(8, 4)
    tensors = {"b.weight": one, "a.weight": one, "c.weight": one[:4], "d.weight": one.view(4, 8)}

    _, output, _ = converted(tmp_path, tensors, ties=ties)

    assert load_file(output / "model.safetensors").keys() == {"b.weight", "c.weight", "d.weight"}


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def refusal(tmp_path, content, name="pytorch_model.bin", **options):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path, **options)
    (tmp_path / "out").mkdir()
    with pytest.raises(PickleError) as caught:
        convert("me/model", {name: path}, tmp_path / "out", lambda _: None, ties=None)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("newer", [True, False])
def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path, newer):
    proof = tmp_path / "proof"
    content = {"a": torch.ones(2), "b": Malicious(proof)}

    text = refusal(tmp_path, content, _use_new_zipfile_serialization=newer)

    assert text == (
        "me/model: pytorch_model.bin: it contains `posix.system`, but only tensors are read "
        "from a pickle.\nUse the model as safetensors: ask its author, or convert it on a machine "
        "without secrets."
    )
    assert not proof.exists()


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_bare_pickle_is_refused_and_not_executed(tmp_path, protocol):
    proof = tmp_path / "proof"

    text = refusal(tmp_path, pickle.dumps(Malicious(proof), protocol=protocol))

    assert text.startswith("me/model: pytorch_model.bin: it ")
    assert not proof.exists()


def test_a_whole_module_is_refused(tmp_path):
    text = refusal(tmp_path, torch.nn.Linear(2, 2))

    assert "it contains `torch.nn.modules.linear.Linear`, but only tensors" in text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([torch.ones(2)], "it contains a list, expected a dict from names to tensors"),
        ({}, "it contains an empty dict, expected a dict from names to tensors"),
        ({"state_dict": {"a": torch.ones(2)}}, "it contains 'state_dict', which is not a named"),
        ({3: torch.ones(2)}, "it contains '3', which is not a named dense tensor"),
        (
            {"a": torch.ones(2, dtype=torch.complex64)},
            "it contains `a` as torch.complex64, which is",
        ),
        ({"a": torch.eye(2).to_sparse()}, "it contains 'a', which is not a named dense tensor"),
        ({"a": torch.ones(2, device="meta")}, "it contains 'a', which is not a named dense tensor"),
        (b"", "torch cannot read it"),
        (b"not a pickle", "it is not a pickle that torch wrote"),
        (b"PK\x03\x04 cut short", "torch cannot read it"),
    ],
)
def test_what_is_no_model_is_told(tmp_path, content, said):
    text = refusal(tmp_path, content)

    assert text.startswith(f"me/model: pytorch_model.bin: {said}")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_tensor_of_tensors_is_told(tmp_path):
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])

    assert "'a', which is not a named dense tensor" in refusal(tmp_path, {"a": nested})


def test_a_file_that_is_cut_short_is_told(tmp_path):
    torch.save({"a": normal(100, 100)}, tmp_path / "whole.bin")
    content = (tmp_path / "whole.bin").read_bytes()

    assert "pytorch_model.bin: " in refusal(tmp_path, content[: len(content) // 2])


def test_a_compressed_file_is_refused_before_it_takes_memory(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "whole.bin")
    with (
        zipfile.ZipFile(tmp_path / "whole.bin") as whole,
        zipfile.ZipFile(tmp_path / "pressed.bin", "w", zipfile.ZIP_DEFLATED) as pressed,
    ):
        for name in whole.namelist():
            pressed.writestr(name, whole.read(name) + bytes(10_000_000))
    content = (tmp_path / "pressed.bin").read_bytes()

    assert len(content) < 200_000
    text = refusal(tmp_path, content)
    assert text.startswith("me/model: pytorch_model.bin: it is a compressed zip file.")


def test_a_tensor_in_two_files_is_told(tmp_path):
    with pytest.raises(PickleError, match="`a` is in another file too"):
        converted(tmp_path, {"a": normal(2)}, {"a": normal(2)})


def test_tensors_that_repeat_a_few_bytes_are_told(tmp_path):
    with pytest.raises(PickleError) as caught:
        converted(tmp_path, {"a": torch.zeros(1).expand(20_000, 20_000)})

    said, remedy = str(caught.value).splitlines()
    n_bytes = (tmp_path / "pytorch_model.bin").stat().st_size
    assert said.startswith("me/model: its tensors have 1,600,000,")
    assert said.endswith(f" bytes, its pickles {n_bytes:,}.")
    assert remedy == "The file is damaged or was not written by torch: use an intact copy."
    assert list((tmp_path / "out").iterdir()) == []
