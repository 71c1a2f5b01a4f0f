"""The wheel: it carries the service program, works where it is installed, and names its platform."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CLONE = Path(__file__).parents[1]


def pip(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a wheel is made of, apart from the clone that others build in."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "hatch_build.py", "LICENSE"):
        shutil.copy(CLONE / name, source)
    (source / "src").mkdir()
    shutil.copytree(
        CLONE / "src/polytropo", source / "src/polytropo", ignore=shutil.ignore_patterns("__pycache__")
    )
    return source


def test_an_installed_wheel_runs(source: Path, tmp_path: Path) -> None:
    done = pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith("polytropo-") and wheel.name.endswith(
        f"-py3-none-linux_{os.uname().machine}.whl"
    )

    site = tmp_path / "site"
    done = pip("install", "--no-deps", "--no-index", "--target", site, wheel)
    assert done.returncode == 0, done.stderr
    program = site / "polytropo/_bin/polytropo-service"
    assert program.stat().st_mode & 0o111 == 0o111
    assert (site / "polytropo/py.typed").exists()

    # Its dependencies come from here; the clone is found by a .pth file, which this path does not read.
    (packages,) = (Path(sys.prefix) / "lib").glob("python3.*/site-packages")
    environment = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "PYTHONPATH": f"{site}:{packages}",
        "POLYTROPO_HOME": str(tmp_path / "home"),
    }
    python = str(Path(sys.executable).resolve())
    where = [python, "-c", "import polytropo.service as s; print(s.__file__, s.service_binary())"]
    done = subprocess.run(where, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == [str(site / "polytropo/service.py"), str(program)]
    command = [python, str(site / "bin/polytropo"), "doctor", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert f"{program} runs" in done.stdout, done


def test_a_wheel_without_the_service_is_not_built(source: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(source, bare, ignore=shutil.ignore_patterns("_bin"))
    done = pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, bare)
    assert done.returncode != 0 and "run `make build` first" in done.stderr + done.stdout
    assert not list(tmp_path.glob("*.whl"))
