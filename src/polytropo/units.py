"""Sizes, CPU lists and durations as people write and read them; the only place that parses or prints them."""

import re
from collections.abc import Iterable

from polytropo.errors import PolytropoError

_BINARY = ("", "KiB", "MiB", "GiB", "TiB", "PiB")
_FACTORS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgtp", start=1):
    # A bare letter is binary, as in podman's --memory; "MB" is what its prefix says.
    _FACTORS |= {
        _letter: 1024**_power,
        f"{_letter}i": 1024**_power,
        f"{_letter}ib": 1024**_power,
        f"{_letter}b": 1000**_power,
    }
_SIZE_MAX_BYTES = 2**60
_CPU_MAX = 8191  # the kernel's own bound on CPU numbers


def parse_size(text: str) -> int:
    """Bytes for a size such as "2GiB", "512m", "1.5 GB" or "4096".

    >>> parse_size("2GiB"), parse_size("1.5k"), parse_size("1MB")
    (2147483648, 1536, 1000000)
    """
    match = re.fullmatch(r"([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([a-zA-Z]{0,3})", text.strip(), re.ASCII)
    factor = _FACTORS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise PolytropoError(f'"{text}" is not a size; write a number and a unit, such as 512MiB or 2GiB')
    size_bytes = int(match[1]) * factor if "." not in match[1] else int(float(match[1]) * factor)
    if size_bytes > _SIZE_MAX_BYTES:
        raise PolytropoError(f'"{text}" is too large; the most is {format_size(_SIZE_MAX_BYTES)}')
    return size_bytes


def format_size(size_bytes: int) -> str:
    """A size for people, three digits of it.

    >>> format_size(2147483648), format_size(1536), format_size(17)
    ('2 GiB', '1.5 KiB', '17 B')
    """
    value = float(size_bytes)
    for unit in _BINARY:
        if abs(value) < 999.5 or unit == _BINARY[-1]:
            break
        value /= 1024
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    text = f"{value:.{digits}f}"
    return f"{text.rstrip('0').rstrip('.') if digits else text} {unit or 'B'}"


def parse_cpus(text: str) -> list[int]:
    """CPU numbers for a list such as "1", "0-1" or "0,2-3", sorted.

    >>> parse_cpus("0,2-3")
    [0, 2, 3]
    """
    numbers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,5})(?:-([0-9]{1,5}))?\s*", part, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last or last > _CPU_MAX:
            raise PolytropoError(f'"{text}" is not a list of CPUs; write it like 1, 0-1 or 0,2')
        numbers.update(range(first, last + 1))
    return sorted(numbers)


def format_cpus(cpus: Iterable[int]) -> str:
    """The kernel's way of writing a CPU list.

    >>> format_cpus([0, 1, 2, 5])
    '0-2,5'
    """
    runs: list[list[int]] = []
    for cpu in sorted(set(cpus)):
        if runs and runs[-1][1] == cpu - 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def format_duration(duration_s: float) -> str:
    """A duration for people, its two largest parts.

    >>> format_duration(5), format_duration(90), format_duration(90000)
    ('5 s', '1 min 30 s', '1 d 1 h')
    """
    seconds = max(0, int(duration_s))
    parts = []
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, seconds = divmod(seconds, length)
        if count:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2]) or "0 s"


def format_ns(duration_ns: float) -> str:
    """A short duration for people.

    >>> format_ns(850), format_ns(12_345), format_ns(2_500_000_000)
    ('850 ns', '12.3 us', '2.5 s')
    """
    value = float(duration_ns)
    for unit in ("ns", "us", "ms"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} s"
