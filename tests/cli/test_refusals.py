"""Bad input gets one clear sentence and a non-zero status."""

import json
from pathlib import Path

import pytest

from polytropo.cli.main import run


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POLYTROPO_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 1) -> str:
    assert run(list(arguments)) == status
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("polytropo: ") and told.err.count("\n") == 1, told
    return told.err.removeprefix("polytropo: ").rstrip("\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("tenant", "show", "shop"), 'there is no tenant "shop"; there is none yet'),
        (("tenant", "stop", "shop"), "make it with `polytropo tenant create shop`"),
        (("tenant", "rm", "shop"), 'there is no tenant "shop"'),
        (("tenant", "create", "../x"), '"../x" cannot name a tenant'),
        (("tenant", "create", "x" * 65), "cannot name a tenant"),
        (("tenant", "create", "a\nb"), r"'a\nb' cannot name a tenant"),
        (("tenant", "create", "shop", "--cpus", "1-0"), '"1-0" is not a list of CPUs'),
        (("tenant", "create", "shop", "--cpus", "8000"), "this machine has no CPU 8000"),
        (("tenant", "create", "shop", "--memory", "2 parsecs"), '"2 parsecs" is not a size'),
        (("tenant", "create", "shop", "--memory", "1PiB"), "more than the machine's"),
        (("tenant", "create", "shop", "--memory", "1MiB"), "is too little"),
        (
            ("tenant", "create", "shop", "--memory", "1GiB", "--cache", "2GiB"),
            "a cache of 2 GiB does not fit",
        ),
        (("volume", "create", "-t", "shop", "data"), 'there is no tenant "shop"'),
        (("volume", "rm", "data"), 'there is no volume of the tenant default named "data"'),
        (("volume", "create", ".data"), '".data" cannot name a volume'),
        (("mount", "/etc", "/nonexistent"), "the mount point /nonexistent does not exist"),
        (("mount", "/etc", "/etc/passwd"), "the mount point /etc/passwd is not a directory"),
        (("mount", "/etc", "/proc"), "the mount point /proc is in use by a proc mount"),
        (("mount", "/nonexistent", "/mnt"), "the stack /nonexistent cannot be read: No such file"),
        (("mount", "", "/mnt"), "the stack's name is empty"),
        (("mount", "-t", "shop", "/etc", "/mnt"), 'there is no tenant "shop"'),
        (
            ("mount", "/etc", "/mnt", "--upper", "/nonexistent"),
            "the upper directory /nonexistent does not exist",
        ),
        (("unmount", "/etc"), "nothing is mounted at /etc"),
        (("unmount", "/proc"), "/proc is a proc mount and none of polytropo's"),
    ],
)
def test_names_and_places(
    home: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    assert words in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ("", "stack document: document: "),
        ("{", "stack document: document: "),
        ("\x00", "stack document: document: "),
        ("[]", "version: is missing"),
        (
            '{"version":2,"root":{"kind":"hologram"}}',
            "version: is 2, but this program reads version 1; use a newer",
        ),
        ('{"version":"1","root":{}}', "version: is not a whole number"),
        ('{"version":1}', "document: object missing required field `root`"),
        ('{"version":1,"root":{"kind":"dir","path":"a"}}', 'root.path: "a" is not absolute'),
        ('{"version":1,"root":{"kind":"dir","path":"/a","colour":1}}', "root: object contains unknown field"),
        ('{"version":1,"version":1,"root":{"kind":"dir","path":"/a"}}', 'the field "version" is there twice'),
        ('{"version":1,"root":{"kind":"union","lowers":[{"kind":"dir","path":3}]}}', "root.lowers[0].path: "),
        ('{"version":1,"root":{"kind":"volume","name":"data"}}', "there is no volume"),
    ],
)
def test_stack_documents(home: Path, capsys: pytest.CaptureFixture[str], document: str, words: str) -> None:
    path = home.parent / "stack.json"
    path.write_text(document)
    sentence = refused(capsys, "mount", "stack.json", "/mnt")
    assert words in sentence


def test_on_answers_as_programs_do(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no stack is mounted at /etc" in refused(capsys, "on", "/etc", "--", "true", status=125)
    assert "missing argument 'COMMAND...'" in refused(capsys, "on", "/etc", status=125)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("mount",), "missing argument 'STACK'; see `polytropo mount --help`"),
        (("launch",), "no such command 'launch'"),
        (("tenant", "list", "--jsn"), "no such option"),
        (("--verbose",), "no such option"),
        (("tenant", "create", "x", "--idle-timeout", "-1"), "invalid value for '--idle-timeout'"),
    ],
)
def test_misuse_is_told_in_one_sentence(
    home: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    assert words in refused(capsys, *arguments, status=2)


def test_damaged_records_are_named(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["tenant", "create", "shop"]) == 0
    capsys.readouterr()
    record = home / "tenants/shop/tenant.json"
    kept = json.loads(record.read_text())
    record.write_text(json.dumps(kept | {"version": 7}))
    assert f"{record} has version 7" in refused(capsys, "tenant", "show", "shop")
    record.write_text('{"version": 1, "name": "shop"')
    assert f"{record} is damaged" in refused(capsys, "tenant", "list")
    (home / "version").write_text("99\n")
    assert "has layout version 99, this program knows up to 1" in refused(capsys, "tenant", "list")


def test_places_that_hold_something_else(capsys: pytest.CaptureFixture[str], home: Path) -> None:
    home.mkdir()
    (home / "thesis.tex").write_text("x")
    assert "holds other files and is no state directory" in refused(capsys, "tenant", "list")
    assert [path.name for path in home.iterdir()] == ["thesis.tex"]
    (home / "thesis.tex").unlink()
    home.rmdir()
    home.write_text("")
    assert "cannot open the state directory" in refused(capsys, "tenant", "list")
