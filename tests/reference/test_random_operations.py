"""Random operations on a mount and on a plain directory of the host: every answer must be the same."""

import sys
from pathlib import Path

import pytest

from tests.conftest import Isolated
from tests.stacks import KINDS, PASSING, document, fill, mount

REPOSITORY = Path(__file__).resolve().parents[2]


def _compare(place: Isolated, kind: str, *, seed: int, steps: int, actors: int) -> None:
    plain = place.directory / "plain"
    plain.mkdir(mode=0o755)
    if kind != "dir":
        below = place.directory / "stack.below"
        document(kind, below)
        fill(below / "low", below / "lowest", plain)
    mounted = mount(place, kind)
    words = ("--seed", str(seed), "--steps", str(steps), "--actors", str(actors))
    done = place.run(
        *(sys.executable, "-m", "tests.reference", mounted.at, plain, *words),
        environment={"PYTHONPATH": str(REPOSITORY)},
        timeout_s=600,
    )
    succeeded = int(done.stdout.split()[0])
    assert succeeded > steps // 4, "the operations were mostly refused; the comparison says little"
    mounted.unmount()


@pytest.mark.parametrize(
    ("kind", "actors", "seed"),
    [(kind, *each) for kind in KINDS for each in [(1, 1), (1, 2), (2, 3)]] + [(PASSING, 2, 3)],
)
def test_random_operations_answer_as_on_the_host(
    isolated: Isolated, kind: str, actors: int, seed: int
) -> None:
    _compare(isolated, kind, seed=seed, steps=1500, actors=actors)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", [*KINDS, PASSING])
@pytest.mark.parametrize("seed", range(100, 112))
def test_many_random_operations_answer_as_on_the_host(isolated: Isolated, kind: str, seed: int) -> None:
    _compare(isolated, kind, seed=seed, steps=20_000, actors=1 + seed % 3)
