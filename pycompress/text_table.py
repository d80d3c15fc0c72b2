"""A report that prints as a table: as plain text with `print(report)`, in colour where rich prints it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from rich.table import Table


class TextTable:
    """Gives a report `__str__` and `__rich__`. A subclass supplies `header`, `rows` and `summary`.

    header: the names of the columns; those also in `right` hold numbers, which rich aligns right.
    """

    header: ClassVar[tuple[str, ...]]
    right: ClassVar[frozenset[str]] = frozenset()

    def rows(self) -> list[tuple[str, ...]]:
        """The cells as text, one for each name of `header`."""
        raise NotImplementedError

    def summary(self) -> str:
        """One line below the table, and rich's title."""
        raise NotImplementedError

    def is_dim(self, row: tuple[str, ...]) -> bool:
        """Whether rich shows the row in grey: one to which nothing was done."""
        return False

    def __str__(self) -> str:
        table = [self.header, *self.rows()]
        widths = [max(len(row[i]) for row in table) for i in range(len(self.header))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([*lines, self.summary()])

    def __rich__(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table(title=self.summary(), title_justify="left")
        for name in self.header:
            table.add_column(name, justify="right" if name in self.right else "left")
        for row in self.rows():
            # Text, not str: a name or reason such as skip=['x'] is no markup.
            table.add_row(*map(Text, row), style="dim" if self.is_dim(row) else "")
        return table
