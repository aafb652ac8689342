from __future__ import annotations

import json
import mmap
import sys
import time

import pytest

from lewis_hub.report import cost
from lewis_hub.report.cost import Costs, Machine, StageCost


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts bytes")
def test_a_stage_is_measured(tmp_path):
    costs = Costs()
    with costs.measure("merge"):
        (tmp_path / "file").write_bytes(bytes(3_000_000))
        (tmp_path / "file").read_bytes()
        time.sleep(0.02)

    (stage,) = costs.stages
    assert stage.stage == "merge"
    assert 0.02 <= stage.seconds < 10
    assert stage.read_bytes is not None
    assert stage.written_bytes is not None
    assert 3_000_000 <= stage.read_bytes < 3_200_000
    assert 3_000_000 <= stage.written_bytes < 3_200_000
    assert stage.peak_rss_bytes > 1_000_000


def test_the_peak_of_memory_is_that_of_the_stage():
    costs = Costs()
    with costs.measure("big"):
        block = mmap.mmap(-1, 200_000_000)
        block.write(bytes(1) * 200_000_000)
        block.close()
    with costs.measure("small"):
        pass

    big, small = costs.stages
    if big.peak_over == "process":
        pytest.skip("this system cannot forget an earlier peak")
    assert big.peak_rss_bytes - small.peak_rss_bytes > 150_000_000
    assert big.rss_before_bytes is not None
    assert 390_000_000 < big.peak_rss_bytes - big.rss_before_bytes < 420_000_000  # and its copy
    assert small.rss_before_bytes is not None
    assert 0 <= small.peak_rss_bytes - small.rss_before_bytes < 20_000_000


def test_a_stage_that_fails_is_measured_too():
    costs = Costs()
    with pytest.raises(KeyError), costs.measure("merge"):
        raise KeyError

    assert [stage.stage for stage in costs.stages] == ["merge"]


def test_a_system_that_counts_nothing_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "PROC", tmp_path / "absent")
    costs = Costs()
    with costs.measure("merge"):
        pass

    (stage,) = costs.stages
    assert stage.peak_over == "process"
    assert sys.platform == "win32" or stage.peak_rss_bytes > 1_000_000
    assert stage.read_bytes is stage.written_bytes is stage.disk_read_bytes is None
    assert stage.rss_before_bytes is None


def test_what_comes_by_ranges_is_counted_stage_by_stage():
    costs, came = Costs(), [5]
    for stage in ("calibrate", "merge"):
        with costs.measure(stage, lambda: came[0]):
            came[0] += 7

    assert [one.fetched_bytes for one in costs.stages] == [7, 7]


def test_costs_are_written_and_read_back():
    costs = Costs()
    costs.stages.append(StageCost("merge", 1.5, 10, "stage", 1, 2, None, None))
    told = costs.to_json(Machine("Xeon", 2, 8_000_000_000))

    assert json.loads(told) == {
        "version": 1,
        "machine": {
            "processor": "Xeon",
            "n_cores": 2,
            "memory_bytes": 8_000_000_000,
            "accelerator": None,
        },
        "stages": [
            {
                "stage": "merge",
                "seconds": 1.5,
                "peak_rss_bytes": 10,
                "peak_over": "stage",
                "read_bytes": 1,
                "written_bytes": 2,
                "disk_read_bytes": None,
                "disk_written_bytes": None,
                "fetched_bytes": None,
                "rss_before_bytes": None,
            }
        ],
    }
