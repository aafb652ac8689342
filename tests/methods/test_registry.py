import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from lewis_hub.errors import MergeError
from lewis_hub.methods import registry
from lewis_hub.methods.registry import find, methods, register


def message(call):
    with pytest.raises(MergeError) as caught:
        call()
    return str(caught.value)


@pytest.fixture
def own_registry(monkeypatch):
    """Registrations that end with the test."""
    monkeypatch.setattr(registry._registry, "_entries", dict(registry._registry._entries))


TRIM = {"trim": "magnitude", "trim_exponent": 1.0}  # not in mergekit
ALL = [
    *("arcee_fusion", "breadcrumbs", "breadcrumbs_ties", "cabs", "dare_linear", "dare_ties"),
    *("della", "della_linear", "iso_c", "karcher", "knots_ties", "linear", "model_stock"),
    *("multislerp", "nearswap", "nuslerp", "passthrough", "pcb", "ram", "ramplus_tl"),
    *("regmean", "sce", "slerp", "task_arithmetic", "ties", "tsv_m", "wudi"),
]


def test_methods_are_listed_by_name_with_summary_and_paper():
    found = {method.name: method for method in methods()}

    assert list(found) == ALL
    assert found["ties"].summary.startswith("Trim each task vector, elect a sign per entry")
    assert found["ties"].paper == "https://arxiv.org/abs/2306.01708"
    assert all(method.summary.endswith(".") for method in found.values())
    assert [name for name in ALL if found[name].paper is None] == ["passthrough"]


def test_options_and_their_defaults_are_mergekits():
    options = {method.name: dict(method.options) for method in methods()}

    assert options == {
        "linear": {"normalize": True},
        "task_arithmetic": {"normalize": False, "lambda": 1.0},
        "ties": {"normalize": True, "rescale": False, "lambda": 1.0, **TRIM},
        "dare_linear": {"normalize": False, "rescale": True, "lambda": 1.0},
        "dare_ties": {"normalize": False, "rescale": True, "lambda": 1.0},
        "della": {"normalize": True, "rescale": True, "lambda": 1.0, **TRIM},
        "della_linear": {"normalize": False, "rescale": True, "lambda": 1.0, **TRIM},
        "breadcrumbs": {"normalize": False, "rescale": False, "lambda": 1.0},
        "breadcrumbs_ties": {"normalize": False, "rescale": False, "lambda": 1.0},
        "sce": {"select_topk": 1.0},
        "slerp": {"t": None},
        "nuslerp": {"nuslerp_row_wise": False, "nuslerp_flatten": True},
        "multislerp": {"normalize_weights": True, "eps": 1e-8},
        "karcher": {"max_iter": 10, "tol": 1e-5},
        "model_stock": {"filter_wise": False},
        "nearswap": {"t": None},
        "arcee_fusion": {},
        "ram": {"epsilon": 1e-5},
        "ramplus_tl": {"r": 0.1, "alpha": 0.2, "epsilon": 1e-5},
        "passthrough": {},
        "cabs": {"group": 256, "lambda": 1.0},  # not in mergekit
        "pcb": {"lambda": 1.0},  # not in mergekit
        "regmean": {  # not in mergekit
            "off_diagonal": 0.5,
            "lambda": 1.0,
            "inputs": "own",
            "normalize_grams": "none",
            "ridge": 0.0,
            "anchor": "task_arithmetic",
            "anchor_scale": 1.0,
            "anchor_density": 0.5,
            "interpolation": 1.0,
            "prior": 0.0,
            "compensate": True,
            "affine": False,
            "embeddings": False,
            **TRIM,
        },
        "wudi": {"ridge": 0.1, "anchor_scale": 1.0, "lambda": 1.0},  # not in mergekit
        "tsv_m": {"lambda": 1.0},  # not in mergekit
        "iso_c": {"lambda": 1.0},  # not in mergekit
        "knots_ties": {"normalize": True, "lambda": 1.0},  # not in mergekit
    }


def test_a_method_says_what_it_takes():
    without_density = [m.name for m in methods() if not m.takes_density]
    assert without_density == [
        *("arcee_fusion", "iso_c", "karcher", "linear", "model_stock", "multislerp", "nearswap"),
        *("nuslerp", "passthrough", "ram", "ramplus_tl", "slerp", "task_arithmetic", "tsv_m"),
        "wudi",
    ]
    random = [m.name for m in methods() if m.takes("streams")]
    assert random == ["dare_linear", "dare_ties", "della", "della_linear"]
    assert [m.name for m in methods() if not m.takes_base] == ["karcher", "linear", "passthrough"]
    assert [m.name for m in methods() if m.base_is_optional] == ["multislerp", "nuslerp"]
    assert [m.name for m in methods() if m.n_experts == (1, 1)] == [
        *("arcee_fusion", "nearswap", "passthrough", "slerp"),
    ]
    assert find("ties").settings == ("weight", "density")
    assert [m.name for m in methods() if m.takes("grams")] == [
        *("della", "della_linear", "regmean", "ties"),
    ]
    assert [m.name for m in methods() if m.needs_grams] == ["regmean"]
    assert find("della").settings == ("weight", "density", "epsilon")
    assert find("breadcrumbs_ties").settings == ("weight", "density", "gamma")
    assert find("passthrough").settings == ("scale",)


def test_an_unknown_method_names_the_nearest():
    text = message(lambda: find("tie"))

    assert text.startswith(
        "method `tie`: it is not known in this version.\nMethods: arcee_fusion, "
    )
    assert text.endswith("Did you mean `ties`?")


@pytest.mark.parametrize(
    ("name", "per_source", "says"),
    [
        ("normalise", False, "`ties` has no such parameter.\nIt knows weight, density,"),
        ("normalise", False, "Did you mean `normalize`?"),
        ("trim", True, "takes one value for all models, not one per model.\nMove it to"),
        ("rescale_", False, "Did you mean `rescale`?"),
    ],
)
def test_an_unknown_parameter_is_refused(name, per_source, says):
    assert says in message(lambda: find("ties").require_known([name], per_source=per_source))


def test_a_parameter_of_another_method_of_mergekit_is_known_but_not_used():
    task_arithmetic, ties = find("task_arithmetic"), find("ties")

    task_arithmetic.require_known(["density", "t", "embed_slerp"], per_source=False)
    ties.require_known(["normalize"], per_source=True)
    assert not task_arithmetic.uses("density", per_source=True)
    assert task_arithmetic.uses("weight", per_source=True)
    assert ties.uses("normalize", per_source=False)
    assert not ties.uses("normalize", per_source=True)


def test_a_name_that_is_taken_is_refused(own_registry):
    text = message(lambda: register("ties")(print))

    assert text.startswith("method `ties`: the name is already taken by lewis_hub.methods.ties.")


def test_a_package_adds_a_method_by_an_entry_point(own_registry, monkeypatch, tmp_path):
    (tmp_path / "boldest_package.py").write_text(
        "from lewis_hub.methods.registry import register\n"
        "@register('boldest')\n"
        "def boldest(base, task_vectors, *, weights, power=2.0):\n"
        "    '''Keep what moved most.'''\n"
        "    return base\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    offered(monkeypatch, EntryPoint("boldest", "boldest_package:boldest", registry.GROUP))

    assert find("boldest").options == {"power": 2.0}
    assert "boldest" in [method.name for method in methods()]


def test_a_package_that_does_not_load_is_named(own_registry, monkeypatch):
    offered(monkeypatch, EntryPoint("gone", "no_such_package:gone", registry.GROUP))

    text = message(lambda: find("gone"))

    assert "provides it but does not load: No module named 'no_such_package'" in text
    assert "pip uninstall" in text


def test_listing_methods_does_not_import_torch():
    code = (
        "import sys; from lewis_hub.methods.registry import methods; methods();"
        "print(*(name in sys.modules for name in ('torch', 'llvmlite', 'numba')))"
    )

    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert run.stdout == "False False False\n"


def offered(monkeypatch, entry):
    class Offered(tuple):
        @property
        def names(self):
            return {one.name for one in self}

    def entry_points(*, group, name=None):
        return Offered([entry] if group == registry.GROUP and name in {None, entry.name} else [])

    monkeypatch.setattr("lewis_hub.registry.entry_points", entry_points)
