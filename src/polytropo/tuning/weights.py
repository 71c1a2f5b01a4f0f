"""What the private path really copies: how much of a search's time each size and situation is worth, and what
a plan gains on all of them together.
"""

import importlib.resources
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from polytropo.errors import PolytropoError
from polytropo.observe import Copies, sum_copies
from polytropo.tuning.measure import SITUATIONS, SIZES_BYTES
from polytropo.tuning.plans import Cell

Weights = Mapping[tuple[str, int], float]
"""By situation and size of the search: the share of all bytes that are copied so; together 1."""

# Counts of services while `make bench-path` ran.
_RECORDED = "weights.json"


def recorded() -> Weights:
    """Those that come with the package, recorded while the benchmark of the private path ran."""
    text = importlib.resources.files(__package__).joinpath(_RECORDED).read_bytes()
    return weights_of(msgspec.json.decode(text, type=Copies))


def load(path: Path) -> Weights:
    """Reads what `polytropo stats --json` printed, or counts alone: `{"hot": {"4096": 17}}`."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PolytropoError(f"the weights {path} cannot be read: {error.strerror}") from error
    try:
        told = msgspec.json.decode(data)
        if isinstance(told, list):
            tenants = msgspec.convert(told, list[_Tenant], strict=False)
            counts = sum_copies(tenant.copies for tenant in tenants)
        else:
            counts = msgspec.convert(told, Copies, strict=False)
    except msgspec.ValidationError as error:
        raise PolytropoError(
            f"{path} holds no counts of copies ({error}); save what `polytropo stats --json` prints"
        ) from error
    except msgspec.DecodeError as error:
        raise PolytropoError(f"{path} is not JSON: {error}") from error
    if unknown := sorted(set(counts) - set(SITUATIONS)):
        raise PolytropoError(f"{path} names unknown situations: {', '.join(unknown)}")
    if not any(count > 0 for sizes in counts.values() for count in sizes.values()):
        raise PolytropoError(f"{path} counts no copies; record it while programs use a mount")
    return weights_of(counts)


class _Tenant(msgspec.Struct):
    copies: Copies = {}


def weights_of(counts: Copies) -> Weights:
    """Shares of bytes. Sizes between those of the search count for the one below."""
    bytes_by_cell: dict[tuple[str, int], float] = {}
    for situation, sizes in counts.items():
        for size_bytes, count in sizes.items():
            below = [each for each in SIZES_BYTES if each <= size_bytes]
            if below and count > 0:
                cell = (situation, below[-1])
                # A power of two and all up to the next: half as much again.
                bytes_by_cell[cell] = bytes_by_cell.get(cell, 0) + 1.5 * size_bytes * count
    total = sum(bytes_by_cell.values())
    return {cell: share / total for cell, share in bytes_by_cell.items()} if total else {}


def gain(cells: Iterable[Cell], weights: Weights) -> tuple[float, float] | None:
    """How many times as fast as memcpy(3) and as the kernel's method that mixture is copied, all together;
    None if none of them was searched.
    """
    ours = libc = kernel = 0.0
    for cell in cells:
        weight = 0.0 if cell.keep else weights.get((cell.situation, cell.size_bytes), 0.0)
        ours += weight * cell.ns / cell.size_bytes
        libc += weight * cell.libc_ns / cell.size_bytes
        kernel += weight * cell.kernel_ns / cell.size_bytes
    return (libc / ours, kernel / ours) if ours else None
