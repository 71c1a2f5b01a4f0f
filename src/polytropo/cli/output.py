"""What commands print: JSON for programs, tables for people, progress for those who look."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from polytropo.cli.failures import printable


class Progress(Protocol):
    """Told how far a long piece of work is."""

    def __call__(self, done: int, total: int | None, what: str = "") -> None: ...


def print_json(value: Any) -> None:
    """Prints a JSON array or object; msgspec structs are taken as they are."""
    import msgspec

    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def print_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints a table: with lines and colours on a terminal, else plain aligned columns."""
    texts = [[printable(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _print_rich(headers, texts)
        return
    widths = [max(map(len, column)) for column in zip(headers, *texts, strict=True)]
    for row in ([header.upper() for header in headers], *texts):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print(line.rstrip())


def print_fields(fields: Sequence[tuple[str, object]]) -> None:
    """Prints one thing's properties, a line each."""
    width = max((len(name) for name, _ in fields), default=0)
    for name, value in fields:
        print(f"{name.ljust(width)}  {printable(value)}")


@contextmanager
def progress(title: str, *, of_bytes: bool = True) -> Iterator[Progress]:
    """A progress bar on stderr while a person is looking; otherwise nothing is shown.

    What is counted is bytes, or something that a person need not read the number of.
    """
    if not sys.stderr.isatty():
        yield lambda done, total, what="": None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    counted = DownloadColumn() if of_bytes else TaskProgressColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), counted, TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)

        def told(done: int, total: int | None, what: str = "") -> None:
            bar.update(task, completed=done, total=total, description=f"{title} {what}".rstrip())

        yield told


def _print_rich(headers: Sequence[str], texts: list[list[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for header in headers:
        table.add_column(Text(header), overflow="fold", min_width=len(header))
    for row in texts:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)
