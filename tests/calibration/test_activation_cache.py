"""Hidden states in memory and on the disk."""

from __future__ import annotations

import errno
from collections import namedtuple

import pytest
import torch

from lewis_hub.calibration import activation_cache
from lewis_hub.calibration.activation_cache import ActivationCache
from lewis_hub.errors import OutputError

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(params=[1, 1 << 20], ids=["on the disk", "in memory"])
def held(request, monkeypatch):
    monkeypatch.setattr(activation_cache, "HELD_BYTES", request.param)


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
        kept.require_room(activation_cache.HELD_BYTES)
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
