"""Plans of copies on disk: one small text file a processor model, which services and clients read at their
start.
"""

import re
from pathlib import Path
from typing import ClassVar, NamedTuple

import msgspec

from polytropo import _native
from polytropo.errors import storage_errors
from polytropo.state import TUNING, Record, State, write_atomically

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_CPUINFO = Path("/proc/cpuinfo")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class Surroundings(NamedTuple):
    """What else a plan's figures depend on. Zero is unknown."""

    microcode: int
    caches_bytes: tuple[int, int, int]


class Cell(Record):
    """What a search found for one size in one situation. Times are nanoseconds a copy; ratios: median, low,
    high.
    """

    situation: str
    size_bytes: int
    keep: bool
    variant: str
    ns: float
    libc_ns: float
    kernel_ns: float
    by_libc: tuple[float, float, float]
    by_kernel: tuple[float, float, float]
    tried: int
    # What else was good, best first: looked at again later.
    finalists: list[str]
    # How often it was looked at again since, with the others of the plan in between.
    looks: int = 0


class Journal(Record, kw_only=True):
    """What a search has found so far: it goes on from here when it was interrupted."""

    VERSION: ClassVar[int] = 2
    version: int = 2
    exhaustive: bool
    surroundings: tuple[int, tuple[int, int, int]]
    cells: list[Cell]
    elapsed_s: float = 0.0


def surroundings() -> Surroundings:
    """Those of this machine: CPUs of one model differ in microcode and in the caches that a host gives to
    its guests.
    """
    found = {1: 0, 2: 0, 3: 0}
    for index in sorted(_CACHES.glob("index*")):
        try:
            level = int((index / "level").read_text())
            kind = (index / "type").read_text().strip()
            size = re.fullmatch(r"(\d+)([KMG]?)", (index / "size").read_text().strip())
        except (OSError, ValueError):
            continue
        if kind != "Instruction" and level in found and size is not None:
            found[level] = int(size[1]) * _UNITS[size[2]]
    try:
        told = re.search(r"^microcode\s*:\s*(0x[0-9a-f]+)", _CPUINFO.read_text(), re.MULTILINE)
    except OSError:
        told = None
    return Surroundings(int(told[1], 16) if told else 0, (found[1], found[2], found[3]))


def plan_path(state: State) -> Path:
    """Where the plan for this machine's processor model is kept."""
    vendor, family, model, stepping = _native.copy_processor()
    return state.home / TUNING / f"{vendor}-{family}-{model}-{stepping}.plan"


def journal_path(state: State) -> Path:
    return plan_path(state).with_suffix(".json")


def load(state: State) -> tuple[_native.CopyPlan, str | None]:
    """The plan for this machine, else the default one with a sentence that says why; None where none was
    ever made.
    """
    path = plan_path(state)
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return _native.CopyPlan.default(), None
    except OSError as error:
        return (
            _native.CopyPlan.default(),
            f"the plan {path} cannot be read ({error.strerror}); the default one is used",
        )
    try:
        plan = _native.CopyPlan.parse(text.decode("ascii"))
    except ValueError as error:
        reason = error if not isinstance(error, UnicodeDecodeError) else "it is not plain text"
        return (
            _native.CopyPlan.default(),
            f"{path}: {reason}; the default plan is used, `polytropo tune memcpy` makes a new one",
        )
    here = surroundings()
    if (plan.microcode, plan.caches_bytes) != here:
        return _native.CopyPlan.default(), (
            f"the plan {path} is stale: microcode or caches of this machine are not those it was made with;"
            " the default one is used, `polytropo tune memcpy` makes a new one"
        )
    return plan, None


def save(state: State, plan: _native.CopyPlan) -> Path:
    """Replaces the plan for this machine. Others may read it: it tells nothing but the processor."""
    here = surroundings()
    plan.set_surroundings(here.microcode, here.caches_bytes)
    path = plan_path(state)
    with storage_errors("save the plan", path.parent):
        path.parent.mkdir(mode=0o755, exist_ok=True)
        write_atomically(path, plan.text().encode(), mode=0o644)
    return path


def read_journal(state: State) -> Journal | None:
    """What the last search here found; None if there was none, or of another machine or version."""
    try:
        journal = msgspec.json.decode(journal_path(state).read_bytes(), type=Journal)
    except (OSError, msgspec.DecodeError):
        return None
    return journal if journal.version == Journal.VERSION and journal.surroundings == surroundings() else None


def write_journal(state: State, journal: Journal) -> None:
    path = journal_path(state)
    with storage_errors("save what was measured", path.parent):
        path.parent.mkdir(mode=0o755, exist_ok=True)
        write_atomically(path, msgspec.json.encode(journal), mode=0o644)
