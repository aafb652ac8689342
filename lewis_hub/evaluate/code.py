"""The Python of tasks, by its text alone: what it imports, and whether it runs code of others."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
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
MAX_NAME = 250  # letters of a path that is looked for
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
    for node in ast.walk(_parsed(text)) if IMPORTS_OTHERS.search(text) else ():
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


def with_imports(modules: Iterable[Path], folder: Path) -> set[Path]:
    """Python files of a folder, and those of it that their imports name, and so on.

    An import may name a file beside it, or one from any folder above: it depends on `sys.path`.
    """
    seen: set[Path] = set()
    left = [module for module in modules if module.is_relative_to(folder)]
    while left:
        module = left.pop()
        if module not in seen:
            seen.add(module)
            left += filter(Path.is_file, _imported_beside(module, folder))
    return seen


def named_files(module: Path, folders: Iterable[Path]) -> Iterator[Path]:
    """The files that a text in a Python file names, from its own folder or one of others."""
    places = [module.parent, *folders]
    for node in _nodes(module):
        text = node.value if isinstance(node, ast.Constant) else None
        if not (isinstance(text, str) and 0 < len(text) <= MAX_NAME and text.isprintable()):
            continue
        for place in places:
            # a path may be put together, as in f"{HERE}/words.json"
            for file in (place / text, place / text.lstrip("/")):
                with suppress(OSError):
                    if file.is_file():
                        yield file.resolve()


def _imported_beside(module: Path, folder: Path) -> Iterator[Path]:
    """The files that may be meant by the imports of a module."""
    above = [place for place in module.parents if place.is_relative_to(folder)]
    for node in _nodes(module):
        named: list[str] = []
        places = above
        if isinstance(node, ast.Import):
            named = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            places = above[node.level - 1 : node.level] if node.level else above
            named = [f"{node.module or ''}.{name.name}" for name in node.names]
        for place in places:
            for name in named:
                parts = name.strip(".").split(".")
                for n in range(1, len(parts) + 1):
                    found = place.joinpath(*parts[:n])
                    yield from (found.with_suffix(".py"), found / "__init__.py")


def _nodes(module: Path) -> Iterator[ast.AST]:
    """The syntax tree of a Python file; none if it is not valid, which is told when it is run."""
    with suppress(SyntaxError, ValueError):
        yield from ast.walk(_parsed(module.read_text(encoding="utf-8")))


def _parsed(text: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in its strings
        return ast.parse(text)


def _place(folder: Path, name: str) -> Path:
    """The path of a module without its ending."""
    return folder.joinpath(*name.strip(".").split("."))
