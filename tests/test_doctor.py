"""What doctor finds: on this host, and on one that lacks things."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from polytropo import hostprobe
from polytropo.doctor import Finding, examine
from polytropo.state import State

_AS_NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")


def found(home: Path) -> dict[str, Finding]:
    return {finding.name: finding for finding in examine(home)}


def test_every_finding_is_one_sentence_and_nothing_is_changed(tmp_path: Path) -> None:
    findings = examine(tmp_path / "home")
    assert {"fuse", "runtime", "control-groups", "landlock", "free-space"} <= {each.name for each in findings}
    for each in findings:
        assert each.sentence and "\n" not in each.sentence and not each.sentence.endswith("."), each
        assert (each.advice is None) <= (each.level != "lacking") or each.name == "fuse-passthrough", each
    assert list(tmp_path.iterdir()) == []
    assert msgspec.json.decode(msgspec.json.encode(findings), type=list[Finding]) == findings


def test_whether_programs_are_preloaded(
    tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("POLYTROPO_PRELOAD", raising=False)
    assert found(tmp_path)["preload"].sentence == "programs can reach files through shared memory"
    monkeypatch.setenv("POLYTROPO_PRELOAD", "off")
    assert "POLYTROPO_PRELOAD is off" in found(tmp_path)["preload"].sentence
    monkeypatch.setenv("POLYTROPO_PRELOAD", "sometimes")
    assert found(tmp_path)["preload"].level == "missing"
    monkeypatch.delenv("POLYTROPO_PRELOAD")
    monkeypatch.setattr("polytropo.preload_files.LIBRARY", "nonesuch.so")
    assert (found(tmp_path)["preload"].level, library.exists()) == ("lacking", True)


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("POLYTROPO_SERVICE_BIN", str(tmp_path / "service"))
    here = found(tmp_path / "home")
    assert (here["runtime"].level, here["bootstrap"].level) == ("missing", "lacking")
    assert here["service"].level == "missing" and "correct POLYTROPO_SERVICE_BIN" in here["service"].sentence


def test_the_state_directory_is_looked_at(tmp_path: Path) -> None:
    state = State.open(tmp_path / "home")
    assert "may be used (version 1)" in found(state.home)["state-directory"].sentence
    (state.home / "version").write_text("9\n")
    newer = found(state.home)["state-directory"]
    assert newer.level == "missing" and "has layout version 9" in newer.sentence


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts in a namespace of its own, as root")
@pytest.mark.parametrize(
    ("setup", "name", "words"),
    [
        ("mount -t tmpfs none /dev", "fuse-device", "there is no /dev/fuse"),
        ("mount -t tmpfs none /dev", "fuse", "could not be tried: No such file or directory"),
        ("mount -t tmpfs -o ro none $1", "state-directory", "is read-only"),
        ("mount -t tmpfs -o size=1m none $1", "free-space", "has 1 MiB free"),
        (
            "umount -R -l /sys/fs/cgroup",
            "control-groups",
            "no control groups, without cpu, cpuset, memory, pids",
        ),
        ("ulimit -n 512", "open-files", "may have 512 files open, which is few"),
    ],
)
def test_hosts_that_lack_things(tmp_path: Path, setup: str, name: str, words: str) -> None:
    code = (
        "import sys, pathlib, polytropo.doctor as d\n"
        "print(*(f.sentence for f in d.examine(pathlib.Path(sys.argv[1])) if f.name == sys.argv[2]))"
    )
    script = f'{setup}; exec "$2" -c "$3" "$1/home" "$4"'
    command = ["unshare", "--mount", "sh", "-ec", script, "sh", str(tmp_path), sys.executable, code, name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert words in done.stdout, done


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
@pytest.mark.parametrize(("mode", "told"), [("600", "Permission denied"), ("666", "Fuse(major=7")])
def test_an_ordinary_user_may_or_may_not_mount(mode: str, told: str) -> None:
    # The probes stand alone, so that a user who may not read this clone can run them.
    source = Path(hostprobe.__file__).read_text()
    code = "try:\n    user_namespace(); print(fuse())\nexcept ProbeError as error: print(error)\n"
    device = (
        f"mount -t tmpfs none /mnt; mknod /mnt/fuse c 10 229; chmod {mode} /mnt/fuse;"
        ' mount --bind /mnt/fuse /dev/fuse; exec "$@"'
    )
    command = ["unshare", "--mount", "sh", "-ec", device, "sh", *_AS_NOBODY, "/usr/bin/python3", "-"]
    done = subprocess.run(command, input=source + code, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and told in done.stdout, done


def test_a_probe_that_hangs_is_ended() -> None:
    with pytest.raises(hostprobe.ProbeError, match="timed out"):
        hostprobe._in_child(lambda: bytes(signal.sigwait([signal.SIGUSR1])), timeout_s=0.2)


def test_a_probe_that_dies_is_told() -> None:
    def die() -> bytes:
        os.kill(os.getpid(), signal.SIGKILL)
        return b""

    with pytest.raises(hostprobe.ProbeError, match="Input/output error"):
        hostprobe._in_child(die)
