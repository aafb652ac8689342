"""Python of tasks that runs what a model wrote, or what the Hub has: found by its text alone."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

PREFIX = "lm_eval.tasks."
# Whether the task is marked unsafe or not. SymPy's `parse_expr` and `sympify` call `eval`. Its
# `parse_latex` does not, nor does math_verify, which gives `parse_expr` digits and operators only.
RUNS_CODE = re.compile(
    r"\bexec\(|(?<!\.)\beval\(|\bcode_eval\b|\bsubprocess\.(run|Popen|call|check_)|\bPopen\("
    r"|\bparse_expr\b|\bsympify\b"
)
# `evaluate` runs the script of a metric, from the newest commit of a Space.
LOADS_CODE = re.compile(r"\b\w*evaluate\.load\(|\bfrom +evaluate +import\b")
IMPORTS_OTHERS = re.compile(r"\blm_eval\.tasks\b|\bfrom +\.")


def runs_code(modules: Iterable[Path], root: Path) -> bool:
    """Whether Python files, or those of lm-eval's tasks in `root` that they import, run code."""
    return _is_found(RUNS_CODE, modules, root)


def loads_code(modules: Iterable[Path], root: Path) -> bool:
    """Whether they load code from the Hub."""
    return _is_found(LOADS_CODE, modules, root)


def _is_found(pattern: re.Pattern[str], modules: Iterable[Path], root: Path) -> bool:
    seen: set[Path] = set()
    left = list(modules)
    while left:
        module = left.pop()
        if module in seen:
            continue
        seen.add(module)
        text = module.read_text(encoding="utf-8")
        if pattern.search(text):
            return True
        left += _imported(module, text, root)
    return False


def _imported(module: Path, text: str, root: Path) -> Iterator[Path]:
    """The files of lm-eval's tasks that the imports of a module name."""
    if not IMPORTS_OTHERS.search(text):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in its strings
        tree = ast.parse(text)
    for node in ast.walk(tree):
        places: list[Path] = []
        if isinstance(node, ast.Import):
            places = [_place(root, name.name.removeprefix(PREFIX)) for name in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            places = [_place(module.parents[node.level - 1], node.module or "")]
        elif isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith(PREFIX):
            places = [_place(root, f"{node.module}."[len(PREFIX) :])]
        if isinstance(node, ast.ImportFrom):
            places += [place / name.name for place in places for name in node.names]
        for place in places:
            yield from filter(Path.is_file, (place.with_suffix(".py"), place / "__init__.py"))


def _place(folder: Path, name: str) -> Path:
    """The path of a module without its ending."""
    return folder.joinpath(*name.strip(".").split("."))
