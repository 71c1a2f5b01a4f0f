"""When programs load the library where no option says it, and when those change over to shared memory."""

from collections.abc import Callable
from pathlib import Path

import pytest

from polytropo.errors import PolytropoError
from polytropo.preload_mode import DEFAULT, VARIABLE, mode_of
from tests.conftest import Isolated
from tests.preload import test_names
from tests.preload.test_shared_reads import OnMount, data, mount, on_mount  # noqa: F401

READS = """
import os, sys
file = os.open("f6", os.O_RDONLY)
for number in range(int(sys.argv[1])):
    assert len(os.pread(file, 512, number % 100 * 512)) == 512
"""
WRITES = """
import os, sys
for name, count in (("first", int(sys.argv[1])), ("second", 200)):
    file = os.open(name, os.O_WRONLY | os.O_CREAT)
    for number in range(count):
        assert os.write(file, bytes([number % 250]) * 4096) == 4096
    os.close(file)
    assert os.stat(name).st_size == count * 4096
"""
NAMES = """
import os, sys
for number in range(int(sys.argv[1])):
    assert os.stat(f"f{number % 4}").st_size in (0, 1, 4095, 4096)
"""


# As `tar -C` does, and others by deeper names and by none.
BELOW = """
import os
os.makedirs("made/deeper", exist_ok=True)
made = os.open("made", os.O_RDONLY | os.O_DIRECTORY)
flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOCTTY | os.O_NONBLOCK
for number in range(100):
    name = ["./f", "f", "./deeper/f", "././f"][number % 4] + str(number)
    file = os.open(name, flags, 0o600, dir_fd=made)
    assert os.write(file, bytes([number]) * 6000) == 6000
    os.fchmod(file, 0o644)
    os.close(file)
    assert open("made/" + name, "rb").read() == bytes([number]) * 6000
for name in ("./", ".", "./..", "./../made"):
    try:
        os.open(name, os.O_WRONLY | os.O_CREAT, dir_fd=made)
    except OSError as error:
        print(name, error.errno)
"""


def test_an_option_goes_before_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert mode_of(None) == DEFAULT
    for wanted in ("off", "auto", "on"):
        monkeypatch.setenv(VARIABLE, wanted)
        assert (mode_of(None), mode_of(True), mode_of(False)) == (wanted, "on", "off")
    monkeypatch.setenv(VARIABLE, "yes")
    with pytest.raises(PolytropoError, match='set it to "off", "auto" or "on"'):
        mode_of(None)


@pytest.mark.parametrize("script", [READS, NAMES])
def test_patient_programs_change_over_when_it_pays(
    on_mount: Callable[[str], OnMount],  # noqa: F811
    script: str,
) -> None:
    place = on_mount("immutable")

    def answered(count: int, **options: object) -> int:
        done = place.run("/usr/bin/python3", "-c", script, str(count), **options)  # type: ignore[arg-type]
        assert (done.returncode, done.stderr) == (0, ""), done
        return place.in_process()

    auto = {"preload": None, VARIABLE: "auto"}
    # Where preloading was asked for little is enough.
    assert answered(500, preload=True) > 350
    assert answered(500, **auto) < 50
    assert answered(20_000, **auto) > 10_000
    # Nobody says anything: the same.
    assert answered(500, preload=None) < 50 and place.trace.exists()
    assert answered(20_000, preload=None) > 10_000
    place.trace.unlink()
    assert answered(500, preload=False) == 0 and not place.trace.exists()


def test_programs_that_write_much_change_over_for_the_files_that_follow(
    isolated: Isolated, library: Path
) -> None:
    """Few writes to the first file and many."""
    place = OnMount(isolated, test_names.mount(isolated, "exclusive, writes"))
    for writes, changes_over in ((8, False), (64, True)):
        done = place.run("/usr/bin/python3", "-c", WRITES, str(writes))
        assert (done.returncode, done.stderr) == (0, ""), done
        assert (place.in_process() > 150) == changes_over


def test_files_are_made_below_open_directories(isolated: Isolated, library: Path) -> None:
    place = OnMount(isolated, test_names.mount(isolated, "exclusive, writes"))
    done = place.run("/usr/bin/python3", "-c", BELOW)
    assert (done.returncode, done.stderr) == (0, ""), done
    assert place.in_process() > 50
    assert done.stdout.splitlines() == ["./ 21", ". 21", "./.. 21", "./../made 21"]
