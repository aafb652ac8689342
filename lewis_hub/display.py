"""How results look: tables of text, sentences and sizes, for a terminal and a notebook."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class TextTable:
    """A table of texts; each row has as many cells as the header."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def to_html(self) -> str:
        """Write the table as HTML; all texts are escaped."""
        head = "".join(f"<th>{escape(cell)}</th>" for cell in self.header)
        body = "".join(
            f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in self.rows
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def to_html(*parts: TextTable | str) -> str:
    """Write tables and lines as HTML for a notebook's `_repr_html_`; all texts are escaped."""
    return "".join(
        part.to_html() if isinstance(part, TextTable) else f"<div>{escape(part)}</div>"
        for part in parts
    )


def size(n_bytes: float) -> str:
    """Format bytes in powers of 1000, as disks and the Hub do."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n_bytes) < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.2f} TB"
