"""Small tables, as plain text for the terminal and as Markdown for reports."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Table:
    """A header and rows of ready-made cells; the first column is text, the others are figures."""

    header: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        """Append one row; raises ``ValueError`` when it is not as wide as the header."""
        if len(cells) != len(self.header):
            raise ValueError(f"a row needs {len(self.header)} cells, got {len(cells)}: {cells}")
        self.rows.append(cells)

    def text(self) -> str:
        """Aligned columns, a rule under the header, no trailing blanks."""
        widths = self._widths()
        rule = "  ".join("-" * width for width in widths)
        body = [self._line(row, widths) for row in self.rows]
        return "\n".join([self._line(self.header, widths), rule, *body])

    def markdown(self) -> str:
        """A GitHub-flavoured Markdown table, padded so that the source reads well too."""
        widths = [max(width, 3) for width in self._widths()]
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        cells = [self._pad(row, widths) for row in (self.header, *self.rows)]
        lines = ["| " + " | ".join(row) + " |" for row in (cells[0], rule, *cells[1:])]
        return "\n".join(lines)

    def _widths(self) -> list[int]:
        return [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]

    @staticmethod
    def _pad(row: Sequence[str], widths: Sequence[int]) -> list[str]:
        return [row[0].ljust(widths[0])] + [
            cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)
        ]

    def _line(self, row: Sequence[str], widths: Sequence[int]) -> str:
        return "  ".join(self._pad(row, widths)).rstrip()


def mean_std(values: Sequence[float], digits: int = 3) -> str:
    """``"0.414 ± 0.006"``: mean and sample standard deviation (n - 1); one value stands alone."""
    if not values:
        raise ValueError("mean_std needs at least one value")
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def human_time(seconds: float) -> str:
    """``"3:07"`` or ``"1:02:03"``: a duration in minutes and seconds, hours where needed."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
