"""SEMANTICS.md is true: every promise in it is tried on a mount of each kind, and no other."""

import json
import re
import sys
from pathlib import Path

import pytest

from tests.conftest import Isolated
from tests.semantics import attributes, files, names  # noqa: F401  they register their promises
from tests.semantics.__main__ import make_image
from tests.semantics.registry import PROMISES
from tests.stacks import KINDS, PASSING, PRIVATE, READING, WRITING_BACK, document, mount

REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_document_and_the_promises_name_each_other() -> None:
    written = re.findall(r"^\| `([a-z-]+)` \|", (REPOSITORY / "SEMANTICS.md").read_text(), re.MULTILINE)
    assert sorted(written) == sorted(PROMISES)


@pytest.mark.parametrize(
    "kind", [*KINDS, PASSING, WRITING_BACK, *(f"{PRIVATE}{kind}" for kind in KINDS), READING]
)
def test_every_promise_is_kept(isolated: Isolated, library: Path, kind: str) -> None:
    """On private stacks by programs that load the preload library."""
    below = isolated.directory / "stack.below"
    document(kind, below)
    for name in PROMISES:
        make_image(below / ("upper" if kind.endswith("dir") else "lowest") / name)
    mounted = mount(isolated, kind)
    empty = mounted.at / "empty"
    isolated.run("mkdir", empty)
    words = ["passthrough"] if kind == PASSING else []
    preloading = mounted.preload_variables() if kind.startswith(PRIVATE) else {}
    done = isolated.run(
        *(sys.executable, "-m", "tests.semantics", empty, mounted.at),
        *words,
        environment={"PYTHONPATH": str(REPOSITORY)} | preloading,
    )
    found = json.loads(done.stdout)
    assert found["tried"] == sorted(PROMISES)
    assert found["broken"] == {}, "\n".join(found["broken"].values())
    mounted.unmount()
