"""What interception could get wrong: programs that print the same on ext4 and, preloaded, on a mount."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Isolated, machine
from tests.preload.conftest import NEWER_GLIBC, Compile
from tests.stacks import KINDS, PRIVATE, Mounted, mount

TRAPS = Path(__file__).parent / "traps"
NAMES = sorted(
    path.name for path in TRAPS.iterdir() if path.suffix in (".c", ".py", ".sh") and path.stem != "trap"
)
TIMEOUT_S = 100.0
# One that ordinary users may run.
PYTHON = "/usr/bin/python3.11"


def test_the_table_names_every_trap_and_each_has_its_tests() -> None:
    table = (TRAPS / "README.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", table, re.MULTILINE)[2:]
    assert len(rows) > 40
    named: set[str] = set()
    for trap, tests in rows:
        found = re.findall(r"`([^`]+)`", tests)
        assert found, f"nothing tries this: {trap}"
        for name in found:
            path, _, function = name.partition("::")
            place = TRAPS / path if "/" not in path else Path(__file__).parents[2] / path
            assert place.is_file(), f"{name} is not there"
            assert not function or re.search(rf"\b{function}\b", place.read_text()), f"{name} is not there"
            named.add(path)
    assert named >= set(NAMES), f"not in the table: {sorted(set(NAMES) - named)}"


class Grounds:
    """A machine with a mount of each kind and a plain directory, where each program gets new directories."""

    def __init__(self, place: Isolated) -> None:
        self.place = place
        self.plain = place.directory / "plain"
        self.plain.mkdir(mode=0o755)
        # Where ordinary users can read them.
        self.programs = Path(shutil.copytree(TRAPS, place.directory / "programs"))
        self.mounts: dict[str, tuple[Mounted, dict[str, str]]] = {}
        self.answers: dict[str, tuple[int, str, str]] = {}

    def run(self, words: list[str | Path], ground: Path, variables: dict[str, str]) -> tuple[int, str, str]:
        directory = ground / "_".join(Path(word).name for word in words[-1:])
        elsewhere = self.place.directory / "elsewhere"
        prepare = (
            f'rm -rf {elsewhere} {directory}; mkdir -p {elsewhere} {directory}; cd {directory}; exec "$@"'
        )
        told = self.place.run(
            *(
                "sh",
                "-c",
                prepare,
                "sh",
                "env",
                *(f"{name}={value}" for name, value in variables.items()),
                *words,
            ),
            environment={
                "TMPDIR": str(elsewhere),
                "PYTHONPATH": str(self.programs),
                "PYTHONDONTWRITEBYTECODE": "1",
            },
            timeout_s=TIMEOUT_S,
            check=False,
        )
        return (
            told.returncode,
            told.stdout.replace(str(ground), "HERE"),
            told.stderr.replace(str(ground), "HERE"),
        )

    def expected(self, words: list[str | Path]) -> tuple[int, str, str]:
        key = str(words)
        if key not in self.answers:
            self.answers[key] = self.run(words, self.plain, {})
        return self.answers[key]


def open_the_way(place: Isolated, socket: Path) -> None:
    """Ordinary users reach the service, as they do in containers."""
    for directory in socket.parents:
        if directory.is_relative_to(place.directory):
            directory.chmod(directory.stat().st_mode | 0o011)


@pytest.fixture(scope="module")
def grounds(library: Path) -> Iterator[Grounds]:
    with machine() as place:
        found = Grounds(place)
        for kind in KINDS:
            mounted = mount(place, f"{PRIVATE}{kind}", kind)
            variables = mounted.preload_variables()
            open_the_way(place, Path(variables["POLYTROPO_CHANNEL"]))
            found.mounts[kind] = mounted, variables
        yield found
        for mounted, _ in found.mounts.values():
            mounted.unmount()


# Those of C by a later C library as well.
WAYS = [
    *((name, kind, "gcc") for name in NAMES for kind in KINDS),
    *((name, KINDS[-1], NEWER_GLIBC) for name in NAMES if name.endswith(".c")),
]


@pytest.mark.parametrize(("name", "kind", "compiler"), WAYS)
def test_it_is_as_on_ext4(
    grounds: Grounds, compile_program: Compile, name: str, kind: str, compiler: str
) -> None:
    interpreters: dict[str, list[str | Path]] = {".py": [PYTHON], ".sh": ["bash"], ".c": []}
    words = interpreters[Path(name).suffix]
    program = (
        compile_program(TRAPS / name, compiler=compiler) if name.endswith(".c") else grounds.programs / name
    )
    words.append(program)
    expected = grounds.expected(words)
    assert expected[0] == 0, expected
    mounted, variables = grounds.mounts[kind]
    trace = grounds.place.directory / f"trace-{name}-{kind}-{compiler}"
    tracing = {"POLYTROPO_TRACE": "1", "POLYTROPO_TRACE_FILE": str(trace)}
    done = grounds.run(words, mounted.at, variables | tracing)
    for got, wanted in zip(done, expected, strict=True):
        assert str(got).splitlines() == str(wanted).splitlines()
    told = trace.read_text() if trace.exists() else ""
    assert ": sites " in told, "the library did nothing"
