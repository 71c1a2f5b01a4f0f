"""`polytropo tune`: find what is fastest on this machine."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from polytropo.cli.options import Size, json_option

if TYPE_CHECKING:
    from polytropo.tuning.plans import Cell, Journal
    from polytropo.tuning.weights import Weights

_SITUATIONS = ("hot", "fresh", "handed", "relayed", "cold", "read")


@click.group()
def tune() -> None:
    """Find what is fastest on this machine.

    \b
    Example:
      polytropo tune memcpy
      polytropo tune show
    """


@tune.command()
@click.option(
    "--exhaustive", is_flag=True, help="Measure every variant with full care: hours instead of minutes."
)
@click.option(
    "--situation",
    "situations",
    multiple=True,
    type=click.Choice(_SITUATIONS),
    help="Only this one; may be repeated.",
)
@click.option(
    "--size",
    "sizes",
    multiple=True,
    type=Size(),
    help="Only this size (a power of two from 64B on); may be repeated.",
)
@click.option(
    "--weights",
    type=click.Path(path_type=Path, dir_okay=False),
    help="What is copied, as `polytropo stats --json` prints it; else what came with polytropo.",
)
@click.option("--restart", is_flag=True, help="Forget what an earlier search found.")
@json_option
def memcpy(
    exhaustive: bool,
    situations: tuple[str, ...],
    sizes: tuple[int, ...],
    weights: Path | None,
    restart: bool,
    as_json: bool,
) -> None:
    """Search for the fastest memory copies.

    Machine code is made for thousands of variants and measured for each size and situation: both in cache,
    fresh from another core, soon read by another core, cold, read from wherever it is. The best become a
    plan that services load at their start. Best on an idle machine. An interrupted search goes on where it
    was.

    \b
    Example:
      polytropo tune memcpy
      polytropo tune memcpy --situation hot --size 4KiB --size 64KiB
      polytropo stats --json >copied.json; polytropo tune memcpy --weights copied.json
    """
    from polytropo.cli.output import print_json, progress
    from polytropo.errors import PolytropoError
    from polytropo.state import State
    from polytropo.tuning.measure import SIZES_BYTES
    from polytropo.tuning.memcpy import tune as search
    from polytropo.tuning.weights import load, recorded

    for size_bytes in sizes:
        if size_bytes < 64 or size_bytes & (size_bytes - 1) or size_bytes > 64 << 20:
            raise PolytropoError(
                f"a size of {size_bytes} bytes cannot be searched; give powers of two from 64B to 64MiB"
            )
    worth = recorded() if weights is None else load(weights)
    state = State.open()
    try:
        with progress("searching", of_bytes=False) as told:
            journal, path = search(
                state,
                situations=situations or None,
                sizes_bytes=sorted(sizes) or SIZES_BYTES,
                exhaustive=exhaustive,
                restart=restart,
                weights=worth,
                told=told,
            )
    except KeyboardInterrupt:
        click.echo("what was found so far is kept; the same command goes on from there", err=True)
        raise
    if as_json:
        print_json({"plan": str(path), "elapsed_s": journal.elapsed_s, "cells": journal.cells})
        return
    _print_cells(journal)
    _print_gain(journal, worth)
    click.echo(f"\nthe plan is {path}; services that start from now on use it")


@tune.command()
@click.option(
    "--picture",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Draw it to this file (.png, .svg, .pdf).",
)
@json_option
def show(picture: Path | None, as_json: bool) -> None:
    """Show the plan for this machine and what it gains.

    \b
    Example:
      polytropo tune show
      polytropo tune show --picture gain.png
    """
    from polytropo.cli.output import print_json
    from polytropo.errors import PolytropoError
    from polytropo.state import State
    from polytropo.tuning import plans
    from polytropo.tuning.weights import recorded

    state = State.open()
    plan, reason = plans.load(state)
    journal = plans.read_journal(state)
    if as_json:
        print_json({"plan": plan.text(), "reason": reason, "cells": journal.cells if journal else []})
        return
    if reason is not None:
        raise PolytropoError(reason)
    if journal is None or not journal.cells:
        raise PolytropoError("nothing was searched on this machine yet; run `polytropo tune memcpy`")
    if picture is not None:
        from polytropo.tuning.picture import draw

        draw(journal, picture)
        click.echo(f"drawn to {picture}")
        return
    _print_cells(journal)
    _print_gain(journal, recorded())


def _print_cells(journal: "Journal") -> None:
    from polytropo.cli.output import print_table

    headers = (
        "situation",
        "size",
        "variant",
        "GB/s",
        "memcpy(3)",
        "kernel",
        "gain on memcpy(3)",
        "gain on the kernel",
    )
    order = {name: index for index, name in enumerate(_SITUATIONS)}
    cells = sorted(journal.cells, key=lambda cell: (cell.keep, order[cell.situation], cell.size_bytes))
    print_table(headers, [_row(cell) for cell in cells])


def _print_gain(journal: "Journal", weights: "Weights") -> None:
    from polytropo.tuning.weights import gain

    if (gained := gain(journal.cells, weights)) is not None:
        on_libc, on_kernel = gained
        click.echo(
            f"\nwhat the private path copies, all together: {on_libc:.2f} times as fast as memcpy(3),"
            f" {on_kernel:.2f} times as fast as by the kernel's method"
        )


def _row(cell: "Cell") -> tuple[str, ...]:
    from polytropo.units import format_size

    return (
        cell.situation + (" (keep)" if cell.keep else ""),
        format_size(cell.size_bytes),
        cell.variant,
        *(f"{cell.size_bytes / ns:.1f}" for ns in (cell.ns, cell.libc_ns, cell.kernel_ns)),
        _gain(cell.by_libc),
        _gain(cell.by_kernel),
    )


def _gain(ratio: tuple[float, float, float]) -> str:
    """Times as fast, with its 95 % interval: the ratio of times turned round."""
    median, low, high = (1 / value for value in (ratio[0], ratio[2], ratio[1]))
    return f"{median:.2f} ({low:.2f}-{high:.2f})"
