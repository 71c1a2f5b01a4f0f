"""The frame of the command line: what it imports, how it helps, what a shell completes."""

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest

from polytropo.cli.main import ALIASES, COMMANDS, cli, run
from polytropo.state import State
from polytropo.tenants import create_tenant
from polytropo.volumes import create_volume
from tests.conftest import POLYTROPO

# Each costs more than it gives to a command that has to start at once.
_DEAR = {
    "rich",
    "asyncio",
    "hashlib",
    "http",
    "multiprocessing",
    "ssl",
    "traceback",
    "zstandard",
    "importlib.metadata",
}


def every_command(
    command: click.Command, name: str, context: click.Context
) -> list[tuple[str, click.Command]]:
    found = [(name, command)]
    if isinstance(command, click.Group):
        for below in command.list_commands(context):
            inner = command.get_command(context, below)
            assert inner is not None, below
            found += every_command(inner, f"{name} {below}", context)
    return found


EVERY = every_command(cli, "polytropo", click.Context(cli))


@pytest.mark.parametrize(("name", "command"), EVERY, ids=[name for name, _ in EVERY])
def test_every_command_helps_with_an_example(name: str, command: click.Command) -> None:
    told = command.get_help(click.Context(command, info_name=name))
    assert "Example:" in told and f"  {name}" in told.partition("Example:")[2], told
    for parameter in command.params:
        assert not isinstance(parameter, click.Option) or parameter.help, f"{parameter.name} says nothing"


@pytest.mark.parametrize("module", ["main", "run", "exec", "mount"])
def test_commands_start_with_little(module: str) -> None:
    code = f"import sys, polytropo.cli.main, polytropo.cli.{module}; print(*sys.modules, sep='\\n')"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    dear = _DEAR - {"importlib.metadata"}
    assert not dear & set(loaded.stdout.split())


def test_version_loads_no_command() -> None:
    code = (
        "import sys; from polytropo.cli.main import run; run(['--version']); print(*sys.modules, sep='\\n')"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    ours = {name for name in loaded.stdout.split() if name.startswith("polytropo.")}
    assert ours == {
        "polytropo.cli",
        "polytropo.cli.main",
        "polytropo.cli.failures",
        "polytropo.cli.quick",
        "polytropo.errors",
    }
    assert not _DEAR & set(loaded.stdout.split())


def test_aliases_work_and_are_not_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(COMMANDS) >= ALIASES
    assert run(["--help"]) == 0
    assert not any(f"\n  {alias} " in capsys.readouterr().out for alias in ALIASES)
    assert run(["umount", "--help"]) == 0


def test_debug_shows_where_it_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("POLYTROPO_HOME", str(tmp_path / "home"))
    assert run(["--debug", "tenant", "show", "shop"]) == 1
    told = capsys.readouterr().err
    assert "Traceback" in told and told.splitlines()[-1].startswith("polytropo: there is no tenant")


def test_an_error_of_our_own_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("POLYTROPO_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("polytropo.tenants.list_tenants", lambda _state: 1 / 0)
    assert run(["tenant", "list"]) == 1
    told = capsys.readouterr().err
    assert "an error in polytropo itself, ZeroDivisionError" in told and told.count("\n") == 1


def test_output_that_nobody_reads_is_no_error() -> None:
    command = f"{POLYTROPO} --help | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("0\n", "")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    state = State.open(tmp_path / "home")
    create_tenant(state, "shop")
    create_volume(state, "shop", "orders")
    for name in ("debian", "demo/app"):
        (state.images / f"{name.replace('/', '-')}.json").write_text(json.dumps({"names": {name: 1.0}}))
    container = state.containers / "0123"
    container.mkdir()
    (container / "container.json").write_text(json.dumps({"name": "web"}))
    return state.home


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        (["ten"], ["tenant"]),
        (["tenant", "st"], ["stop"]),
        (["tenant", "show", ""], ["shop"]),
        (["stats", "--tenant", "s"], ["shop"]),
        (["volume", "rm", "--tenant", "shop", ""], ["orders"]),
        (["image", "rm", "de"], ["debian", "demo/app"]),
        (["run", "deb"], ["debian"]),
        (["mount", "deb"], ["debian"]),
        (["stop", ""], ["web"]),
        (["exec", "w"], ["web"]),
        (["completion", "f"], ["fish"]),
        (["tenant", "create", "--mem"], ["--memory"]),
        (["unmount", "/nonexistent"], ["/nonexistent"]),
    ],
)
def test_shells_complete_names(home: Path, words: list[str], completed: list[str]) -> None:
    environment = {
        "PATH": "/usr/bin:/bin",
        "POLYTROPO_HOME": str(home),
        "_POLYTROPO_COMPLETE": "zsh_complete",
        "COMP_WORDS": " ".join(["polytropo", *words]),
        "COMP_CWORD": str(len(words)),
    }
    before = sorted(home.rglob("*"))
    done = subprocess.run([POLYTROPO], env=environment, capture_output=True, text=True, timeout=60)
    # zsh: a line each for kind, word and help.
    assert done.stdout.splitlines()[1::3] == completed, done
    assert sorted(home.rglob("*")) == before


def test_completion_works_in_bash(home: Path) -> None:
    script = (
        'eval "$(polytropo completion bash)"; COMP_WORDS=(polytropo tenant show sh); COMP_CWORD=3;'
        ' _polytropo_completion polytropo; echo "${COMPREPLY[@]}"'
    )
    path = f"{Path(POLYTROPO).parent}:/usr/bin:/bin"
    environment = {"PATH": path, "POLYTROPO_HOME": str(home)}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("shop\n", "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_know_the_program(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", shell]) == 0
    assert "_POLYTROPO_COMPLETE" in capsys.readouterr().out
