"""When programs load the library where no option says it, and when those change over to shared memory."""

from collections.abc import Callable

import pytest

from polytropo.errors import PolytropoError
from polytropo.preload_mode import DEFAULT, VARIABLE, mode_of
from tests.preload.test_shared_reads import OnMount, data, mount, on_mount  # noqa: F401

READS = """
import os, sys
file = os.open("f6", os.O_RDONLY)
for number in range(int(sys.argv[1])):
    assert len(os.pread(file, 512, number % 100 * 512)) == 512
"""
NAMES = """
import os, sys
for number in range(int(sys.argv[1])):
    assert os.stat(f"f{number % 4}").st_size in (0, 1, 4095, 4096)
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
