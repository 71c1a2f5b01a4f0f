"""The plan's gain by size, as a picture."""

from pathlib import Path

from polytropo.errors import PolytropoError, storage_errors
from polytropo.tuning.measure import SITUATIONS
from polytropo.tuning.plans import Cell, Journal


def draw(journal: Journal, path: Path) -> None:
    """Draws GB/s by size, a panel a situation, with the 95 % interval of the gain as a band.

    The suffix of `path` says what kind of picture. Raises PolytropoError where matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PolytropoError(
            "pictures need matplotlib; install it beside polytropo (`pip install matplotlib`)"
        ) from error
    rows = {name: [c for c in journal.cells if c.situation == name and not c.keep] for name in SITUATIONS}
    shown = {name: sorted(cells, key=lambda c: c.size_bytes) for name, cells in rows.items() if cells}
    figure = Figure(figsize=(5 * max(1, len(shown)), 7), layout="constrained")
    FigureCanvasAgg(figure)
    for column, (name, cells) in enumerate(shown.items()):
        speed = figure.add_subplot(2, len(shown), column + 1, title=f"{name}: {SITUATIONS[name]}")
        gain = figure.add_subplot(2, len(shown), len(shown) + column + 1)
        _draw_speed(speed, cells)
        _draw_gain(gain, cells)
    with storage_errors("draw the picture", path.parent):
        try:
            figure.savefig(path)
        except ValueError as error:
            raise PolytropoError(
                f"{path} has no suffix of a picture; end it with .png, .svg or .pdf"
            ) from error


def _draw_speed(axes: object, cells: list[Cell]) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    sizes = [cell.size_bytes for cell in cells]
    axes.plot(sizes, [c.size_bytes / c.ns for c in cells], "o-", label="plan")
    axes.plot(sizes, [c.size_bytes / c.libc_ns for c in cells], "s--", label="memcpy(3)")
    axes.plot(sizes, [c.size_bytes / c.kernel_ns for c in cells], "^:", label="kernel's method")
    axes.set(xscale="log", yscale="log", ylabel="GB/s")
    axes.legend()


def _draw_gain(axes: object, cells: list[Cell]) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    sizes = [cell.size_bytes for cell in cells]
    for label, ratios in (
        ("memcpy(3)", [c.by_libc for c in cells]),
        ("kernel", [c.by_kernel for c in cells]),
    ):
        axes.plot(sizes, [1 / median for median, _, _ in ratios], "o-", label=f"gain on {label}")
        axes.fill_between(
            sizes, [1 / high for _, _, high in ratios], [1 / low for _, low, _ in ratios], alpha=0.2
        )
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(xscale="log", xlabel="bytes", ylabel="times as fast")
    axes.legend()
