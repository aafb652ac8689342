"""The plan of docs/large.md follows from its own tables and formulas."""

import re
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[1] / "docs" / "large.md").read_text()
PARAMETERS, BYTES, PROCESSORS = 405.9e9, 2, 8
GIGABIT = 1e9 / 8


def rows(first_cell):
    """Cells of each row of the table whose header begins so, backticks and units taken off."""
    table = TEXT[TEXT.index(f"\n| {first_cell} |") :].partition("\n\n")[0].strip().splitlines()
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table[2:]]


COSTS = {
    row[0].replace("`", ""): [float(cell) for cell in row[1:]] for row in rows("method | threshold")
}


def moved(method, passes=1):
    n_sources = 3 if method == "linear" else 4
    return PARAMETERS * BYTES * (n_sources * passes + 1)


def hours(method, machines, net, passes=1):
    t_net = moved(method, passes) / (machines * net)
    t_cpu = PARAMETERS * COSTS[method][-1] / 1e9 / (machines * PROCESSORS)
    return max(t_net, t_cpu) / 3600


@pytest.mark.parametrize("method", COSTS)
def test_the_cost_of_a_parameter_is_1_6_times_the_sum_of_its_parts(method):
    *parts, total, planned = COSTS[method]

    assert sum(parts) == pytest.approx(total, abs=0.011)
    assert planned == pytest.approx(1.6 * total, abs=0.051)


def test_hours_of_one_processor_and_processors_that_keep_a_network_busy():
    methods = ("linear", "dare_ties", "ties", "ties, many ties", "della")
    work = {method: PARAMETERS * COSTS[method][-1] / 1e9 for method in methods}

    told = re.search(
        r"is ([\d.]+) hours of one processor by `linear`, (.*?)\n(.*?) by `della`", TEXT
    )
    alone = re.findall(r"\d+\.\d+", told[0])
    assert [float(one) for one in alone] == [
        pytest.approx(seconds / 3600, abs=0.006) for seconds in work.values()
    ]
    busy = re.search(r"processors, which are (.*?) \(", TEXT)[1]
    assert [float(one) for one in re.findall(r"\d+\.\d+", busy)] == [
        pytest.approx(work[m] * 10 * GIGABIT / moved(m), abs=0.051) for m in methods
    ]


def test_the_hours_of_each_cluster_follow_from_the_formulas():
    for machines, net, storage, *told in rows("machines"):
        rate = int(net.split()[0]) * GIGABIT
        found = [float(cell.removesuffix(" h")) for cell in told]

        assert float(storage.split()[0]) == int(machines) * rate / 1e9
        asked = [
            ("linear", 1),
            ("dare_ties", 1),
            ("della", 1),
            ("ties, many ties", 1),
            ("ties, many ties", 2),
        ]
        wanted = [hours(m, int(machines), rate, passes) for m, passes in asked]
        assert found == [pytest.approx(one, abs=0.006) for one in wanted]


def test_bytes_and_hours_of_the_network_follow_from_the_formulas():
    told = {row[0]: row[1:] for row in rows("| bytes moved")}
    wanted = {
        "sources from the Hub to the storage": PARAMETERS * BYTES * 4,
        "merge in one pass": moved("ties"),
        "merge by `ties`, the second pass over the network too": moved("ties", 2),
    }
    for name, n_bytes in wanted.items():
        terabytes, slow, fast = (float(cell.split()[0]) for cell in told[name])
        assert terabytes == pytest.approx(n_bytes / 1e12, abs=0.006)
        assert slow == pytest.approx(n_bytes / (10 * GIGABIT) / 3600, abs=0.006)
        assert fast == pytest.approx(n_bytes / (25 * GIGABIT) / 3600, abs=0.006)
