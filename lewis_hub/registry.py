"""Named entries that installed packages can add to by entry points."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from lewis_hub.errors import LewisHubError

Entry = TypeVar("Entry")


def choices(name: str, known: Sequence[str]) -> str:
    """The known names, and the one most similar to the unknown `name`."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean `{near[0]}`?" if near else ""
    return f"{', '.join(known)}.{hint}"


class Registry(Generic[Entry]):
    """Entries by name. A package is imported only for a name that is not built in, or for `all`.

    Args:
        word: for an entry in messages, such as `method`.
        group: of the entry points. Each has the name of its entry and loads code that calls `add`.
        error: the class of the errors; takes where, problem and remedy.
    """

    def __init__(
        self, word: str, group: str, error: Callable[[str, str, str], LewisHubError]
    ) -> None:
        self.word, self.group, self.error = word, group, error
        self._entries: dict[str, Entry] = {}
        self._owners: dict[str, str] = {}

    def add(self, name: str, entry: Entry, function: Callable[..., object]) -> None:
        """Add an entry; messages name its `function`.

        Raises:
            LewisHubError: the name is taken.
        """
        if name in self._entries:
            problem = f"the name is already taken by {self._owners[name]}"
            raise self._refused(name, problem, "Register it under another name.")
        self._entries[name] = entry
        self._owners[name] = f"{function.__module__}.{function.__qualname__}"

    def find(self, name: str) -> Entry:
        """Look an entry up.

        Raises:
            LewisHubError: the name is unknown, or the package that provides it does not load.
        """
        if name not in self._entries:
            self._load(name)
        if name not in self._entries:
            known = sorted({*self._entries, *entry_points(group=self.group).names})
            remedy = f"{self.word.capitalize()}s: {choices(name, known)}"
            raise self._refused(name, "it is not known in this version", remedy)
        return self._entries[name]

    def all(self) -> tuple[Entry, ...]:
        """All entries in the order of their names; `broken` lists those that do not load."""
        self.broken()
        return tuple(self._entries[name] for name in sorted(self._entries))

    def broken(self) -> tuple[LewisHubError, ...]:
        """An error for each name that an installed package provides and that does not load."""
        errors = []
        for name in sorted(entry_points(group=self.group).names):
            try:
                self.find(name)
            except LewisHubError as error:
                errors.append(error)
        return tuple(errors)

    def _load(self, name: str) -> None:
        for offered in entry_points(group=self.group, name=name):
            package = offered.dist.name if offered.dist else offered.value
            remedy = f"Repair or remove the package: pip uninstall {package}."
            try:
                offered.load()
            except Exception as error:  # noqa: BLE001 - another package may raise anything
                problem = f"{package} provides it but does not load: {_one_line(error)}"
                raise self._refused(name, problem, remedy) from error
            if name not in self._entries:
                problem = f"{package} provides it but {offered.value} does not register it"
                raise self._refused(name, problem, remedy)

    def _refused(self, name: str, problem: str, remedy: str) -> LewisHubError:
        return self.error(f"{self.word} `{name}`", problem, remedy)


def _one_line(error: Exception) -> str:
    """The message of an error in one line; of our own errors without the remedy."""
    line = str(error).partition("\n")[0].rstrip(".")
    own = isinstance(error, (ImportError, AttributeError, LewisHubError))
    return line if own else f"{type(error).__name__}: {line}"
