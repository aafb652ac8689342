"""A merge that the disk cannot hold is refused before the first byte is pulled."""

from collections import namedtuple

import pytest
from zoo_hub import put_zoo

from lewis_hub import check, merge_models, read_recipe
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.errors import OutputError
from lewis_hub.hub.source import cache_root

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def recipe(hub, monkeypatch):
    put_zoo(hub)
    monkeypatch.setattr("lewis_hub.hub.fetch.SPARE_BYTES", 0)  # rows of its data are read first
    return read_recipe(zoo_folder() / "recipe.yaml")


def test_sources_merge_and_twin_on_one_disk_are_added_up(recipe, tmp_path, monkeypatch):
    free = 11_000_000  # 7.0 MB of sources and two results of 2.3 MB are more
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(10**9, 10**9 - free, free))

    with pytest.raises(OutputError) as raised:
        merge_models(recipe, tmp_path / "merged")

    assert str(raised.value) == (
        f"{cache_root()} and {tmp_path / 'merged.partial'}: download and merge need 0.01 GB, "
        "0.01 GB are free.\n"
        "Free some space, or use another disk: HF_HUB_CACHE names the folder for the download, "
        "-o that for the merge."
    )
    assert not any(path.suffix == ".safetensors" for path in cache_root().rglob("*"))
    assert not (tmp_path / "merged").exists()


def test_check_tells_what_the_disks_here_cannot_hold_and_refuses_nothing(recipe, monkeypatch):
    free = 11_000_000
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(10**9, 10**9 - free, free))

    report = check(recipe)

    assert report.problems == ()
    assert report.notes[-1] == (
        f"{cache_root()} and {recipe.locate('merged.partial')}: download and merge need 0.01 GB, "
        "0.01 GB are free. A merge on this machine needs `--stream`; without it, the merge is "
        "refused."
    )


def test_what_an_interrupted_run_left_counts_as_free(recipe, tmp_path, monkeypatch):
    unscored = recipe.model_copy(update={"evaluate": None, "guide": None})
    (tmp_path / "merged.partial").mkdir()
    (tmp_path / "merged.partial" / "model.safetensors").write_bytes(bytes(2_300_000))
    free = 7_500_000  # enough for the sources alone
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(10**9, 10**9 - free, free))

    assert merge_models(unscored, tmp_path / "merged").status == "merged"
