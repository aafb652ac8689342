import os
import platform

from lewis_hub.report import cost
from lewis_hub.report.cost import this_machine


def test_the_machine_is_told_by_processor_cores_and_memory(tmp_path, monkeypatch):
    told = tmp_path / "cpuinfo"
    told.write_text("processor\t: 0\nmodel name\t: Intel(R)  Xeon(R) @ 2.80GHz\nflags\t: fpu\n")
    monkeypatch.setattr(cost, "CPU_INFO", told)

    found = this_machine("cpu")

    assert found.processor == "Intel(R) Xeon(R) @ 2.80GHz"
    assert 1 <= found.n_cores <= os.cpu_count()
    if hasattr(os, "sysconf"):
        assert found.memory_bytes is not None
        assert found.memory_bytes > 100_000_000
    assert found.accelerator is None


def test_a_system_that_names_no_processor_tells_its_kind(tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "CPU_INFO", tmp_path / "none")

    assert this_machine("cpu").processor == platform.machine()
