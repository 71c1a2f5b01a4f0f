"""Random operations on a mount and on a plain directory of the host: every answer must be the same."""

import re
import sys
from pathlib import Path

import pytest

from tests.conftest import Isolated
from tests.stacks import KINDS, PASSING, PRIVATE, READING, WRITING_BACK, document, fill, mount

REPOSITORY = Path(__file__).resolve().parents[2]


PRELOADED = [f"{PRIVATE}{kind}" for kind in (*KINDS, WRITING_BACK)]


def _compare(place: Isolated, kind: str, *, seed: int, steps: int, actors: int) -> None:
    """Half of the actors on a private stack, or a lone one, load the preload library; the others do not."""
    plain = place.directory / "plain"
    plain.mkdir(mode=0o755)
    if not kind.endswith("dir"):
        below = place.directory / "stack.below"
        document(kind, below)
        fill(below / "low", below / "lowest", plain)
    mounted = mount(place, kind)
    words = ["--seed", str(seed), "--steps", str(steps), "--actors", str(actors)]
    trace = place.directory / "trace"
    if kind.startswith(PRIVATE):
        variables = mounted.preload_variables() | {"POLYTROPO_TRACE": "1", "POLYTROPO_TRACE_FILE": str(trace)}
        words += [f"--variable={name}={value}" for name, value in variables.items()]
    done = place.run(
        *[sys.executable, "-m", "tests.reference", str(mounted.at), str(plain), *words],
        environment={"PYTHONPATH": str(REPOSITORY)},
        timeout_s=600,
    )
    succeeded = int(done.stdout.split()[0])
    assert succeeded > steps // 4, "the operations were mostly refused; the comparison says little"
    if kind.startswith(PRIVATE):
        told = trace.read_text().splitlines()
        assert len(told) == (actors + 1) // 2
        assert all(re.search(r"answered in the process [1-9]", line) for line in told), told
    mounted.unmount()


@pytest.mark.parametrize(
    ("kind", "actors", "seed"),
    [(kind, *each) for kind in KINDS for each in [(1, 1), (1, 2), (2, 3)]]
    + [(PASSING, 2, 3), (WRITING_BACK, 2, 3)],
)
def test_random_operations_answer_as_on_the_host(
    isolated: Isolated, kind: str, actors: int, seed: int
) -> None:
    _compare(isolated, kind, seed=seed, steps=1500, actors=actors)


@pytest.mark.parametrize(("actors", "seed"), [(1, 4), (2, 5), (3, 6)])
@pytest.mark.parametrize("kind", [*PRELOADED[: len(KINDS)], READING])
def test_preloaded_and_other_programs_see_the_same(
    isolated: Isolated, library: Path, kind: str, actors: int, seed: int
) -> None:
    _compare(isolated, kind, seed=seed, steps=1500, actors=actors)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", [*KINDS, PASSING, WRITING_BACK, *PRELOADED, READING])
@pytest.mark.parametrize("seed", range(100, 103))
def test_many_random_operations_answer_as_on_the_host(isolated: Isolated, kind: str, seed: int) -> None:
    _compare(isolated, kind, seed=seed, steps=20_000, actors=1 + seed % 3)
