"""The suites of `reproduce.py`: models, tasks and recipes, and what is published of them.

`suites/SUITE.yaml` has the settings and `suites/expected.json` the published values: suite ->
setting -> row -> task -> value, n, tolerance, source. The tolerance is two standard errors of a
difference of two proportions of n items. A value that could not be found is null, and `source`
says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent / "suites"
GLUE = "nyu-mll/glue"
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))

Texts = Mapping[str, Any]  # `calibration` of a recipe


@dataclass(frozen=True)
class Expected:
    """A published value, or why there is none."""

    value: float | None
    n: int | None
    tolerance: float | None
    source: str


@dataclass(frozen=True)
class Setting:
    """Models, tasks and rows of one table.

    Attributes:
        experts: name -> repo.
        tasks: task -> metric.
        rows: row -> parts of a recipe, or `base`, `experts`; None: published, without a recipe.
        calibration: texts of all experts.
        calibrations: expert -> its own texts.
    """

    name: str
    base: str
    experts: Mapping[str, str]
    tasks: Mapping[str, str]
    rows: Mapping[str, Any]
    calibration: Texts | None = None
    calibrations: Mapping[str, Texts] = field(default_factory=dict)

    @property
    def models(self) -> tuple[str, ...]:
        return (self.base, *self.experts.values())

    @property
    def datasets(self) -> tuple[str, ...]:
        """Of calibration texts."""
        texts = [self.calibration, *self.calibrations.values()]
        return tuple(dict.fromkeys(str(one["dataset"]) for one in texts if one))

    def recipe(self, row: str, at: Mapping[str, str]) -> dict[str, Any]:
        """The recipe of a row; `at`: repo -> repo@revision, or a folder."""
        parts = dict(self.rows[row])
        calibrated = parts.pop("calibrated", False)
        models: list[dict[str, Any]] = [{"model": at[repo]} for repo in self.experts.values()]
        if calibrated:
            for model, name in zip(models, self.experts, strict=True):
                model["calibration"] = self._texts(self.calibrations[name], at)
        guide = parts.get("guide")
        if guide and guide["name"] != "uniform" and self.calibration:
            parts["guide"] = {**guide, "calibration": self._texts(self.calibration, at)}
        return {"base_model": at[self.base], "models": models, "dtype": "bfloat16", **parts}

    @staticmethod
    def _texts(texts: Texts, at: Mapping[str, str]) -> dict[str, Any]:
        return {**texts, "dataset": at[texts["dataset"]]}


@dataclass(frozen=True)
class Suite:
    """One suite.

    Attributes:
        scoring: `lm-eval`; `glue-text`: answers in words; `glue-heads`: classification heads.
        gpu_hours: a guess for one GPU with 80 GB, not measured.
        abilities: lm-eval tasks of what the base can do, and their metrics.
        package: what pip installs for the prompts, without its dependencies.
    """

    name: str
    title: str
    paper: str
    scoring: str
    gpu_hours: float
    settings: Sequence[Setting]
    abilities: Mapping[str, str] = field(default_factory=dict)
    runs_code: bool = False
    package: str | None = None

    @property
    def models(self) -> tuple[str, ...]:
        """All repos of models, each once."""
        return tuple(dict.fromkeys(name for one in self.settings for name in one.models))

    @property
    def datasets(self) -> tuple[str, ...]:
        """All repos of calibration texts, and GLUE; not the data of lm-eval's tasks."""
        found = [name for one in self.settings for name in one.datasets]
        return tuple(dict.fromkeys([*found, *([GLUE] if self.scoring != "lm-eval" else [])]))


def read_suite(name: str) -> Suite:
    """Read a suite by name."""
    told = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    settings = [Setting(key, **value) for key, value in told.pop("settings").items()]
    return Suite(name, settings=settings, **told)


def expected(suite: str) -> dict[str, dict[str, dict[str, Expected]]]:
    """Published values: setting -> row -> task."""
    told = json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))[suite]
    return {
        setting: {
            row: {task: Expected(**one) for task, one in tasks.items()}
            for row, tasks in rows.items()
        }
        for setting, rows in told.items()
    }
