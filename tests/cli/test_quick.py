"""Command lines that are read without click mean what click makes of them."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polytropo.cli import quick
from polytropo.cli.exec import execute
from polytropo.cli.run import run

COMMANDS: dict[str, click.Command] = {"run": run, "exec": execute}


def by_click(name: str, words: list[str]) -> dict[str, Any] | None:
    """What click hands to the command; None for what it refuses or answers itself."""
    try:
        return COMMANDS[name].make_context(name, list(words)).params
    except (click.ClickException, click.exceptions.Exit):
        return None


@pytest.mark.parametrize("name", COMMANDS)
def test_the_tables_name_what_click_declares(name: str) -> None:
    kinds: dict[str, tuple[str | None, str]] = {}
    for parameter in COMMANDS[name].params:
        if isinstance(parameter, click.Option):
            kind = quick.FLAG if parameter.is_flag else quick.MANY if parameter.multiple else quick.ONE
            kinds |= {word: (parameter.name, kind) for word in parameter.opts}
            kinds |= {word: (parameter.name, quick.OFF) for word in parameter.secondary_opts}
    assert dict(quick.TABLES[name][0]) == kinds


def _words(name: str) -> st.SearchStrategy[list[str]]:
    options = sorted(quick.TABLES[name][0])
    letters = "".join(word[1] for word in options if not word.startswith("--"))
    word = st.one_of(
        st.sampled_from([*options, "--help", "--", "-", "", "=", "none", "host", "debian", "a=b", "-x"]),
        st.text(letters, min_size=1, max_size=3).map(lambda text: f"-{text}"),
        st.sampled_from(options).map(lambda text: f"{text}=value"),
        st.text(max_size=3),
    )
    return st.lists(word, max_size=7)


@pytest.mark.parametrize("name", COMMANDS)
def test_random_command_lines_mean_the_same(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    understood = 0

    @settings(max_examples=1500, deadline=None, derandomize=True, database=None)
    @given(_words(name))
    def compare(words: list[str]) -> None:
        nonlocal understood
        read = quick.parse([name, *words])
        if read is not None:
            understood += 1
            assert read == by_click(name, words)

    compare()
    assert understood > 100


@pytest.mark.parametrize(
    "line",
    [
        "run debian",
        "run --rm -it debian bash -c ls",
        "run -d --name=db -v orders:/data -vb:/b:ro -e A=1 --env B=2 debian server --flag",
        "run --no-preload --preload debian",
        "run --network none --env-file /env --cidfile /id --runtime crun debian",
        "exec db ls -l",
        "exec -itu nobody db sh",
    ],
)
def test_plain_command_lines_are_understood(line: str) -> None:
    name, *words = line.split()
    read = quick.parse([name, *words])
    assert read is not None and read == by_click(name, words)


def test_it_imports_little(tmp_path: Path) -> None:
    code = (
        "import sys; from polytropo.cli import entry, quick; entry.do_without_extensions();"
        " assert quick.run(['run', 'nothing']) == 125;"
        " print(*(name for name, module in sys.modules.items() if module is not None), sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={"POLYTROPO_HOME": str(tmp_path / "home"), "PATH": "/usr/bin:/bin"},
    )
    dear = {"click", "dataclasses", "hashlib", "inspect", "json", "shutil", "tempfile", "typing_extensions"}
    assert not dear & set(done.stdout.split()), done
