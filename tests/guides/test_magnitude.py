from __future__ import annotations

from lewis_hub.guides.baselines import magnitude
from lewis_hub.guides.registry import Measurements, find


def changed(values: dict[str, float]) -> Measurements:
    return Measurements(tuple(values), {}, {"task_vector": values})


def test_densities_span_the_bounds_by_the_size_of_the_task_vector():
    found = magnitude(changed({"l.0.q": 0.01, "l.1.q": 0.03, "l.0.v": 0.05}), 0.2, 0.6)

    assert found == {"l.0.q": 0.2, "l.1.q": 0.4, "l.0.v": 0.6}


def test_modules_that_moved_equally_get_the_midpoint():
    assert magnitude(changed({"l.0.q": 0.0, "l.1.q": 0.0}), 0.2, 0.6) == {
        "l.0.q": 0.4,
        "l.1.q": 0.4,
    }


def test_it_needs_no_texts():
    assert find("magnitude").needs == ("task_vector",)
    assert not find("magnitude").needs_texts
