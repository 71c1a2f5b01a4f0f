"""Images at work: a large lower that is changed and committed, and Debian that installs packages."""

import os
import re
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.conftest import Isolated
from tests.containers.conftest import BUSYBOX, shell
from tests.images.archives import Layout, directory, hard_link, member, symlink, tar

_FILES = 10_000
_DIRECTORIES = 100
_APPLETS = (
    "chmod", "chown", "echo", "find", "ln", "md5sum", "mkdir", "mkfifo",
    "mv", "printf", "rm", "sh", "sort", "stat", "tar", "touch", "xargs",
)  # fmt: skip
_MIRROR = "http://deb.debian.org/debian/dists/bookworm/InRelease"

# Everything that a program can see of a tree, one line a name.
_LOOK = r"""
    cd /data; find . -print0 | sort -z | xargs -0 stat -c '%n|%F|%a|%u|%g|%h|%Y|%N'
    find . -type f -print0 | sort -z | xargs -0 md5sum
"""
# Writes, appends, links, renames a directory of the lower, removes and remakes one.
_CHANGE = r"""
    cd /data; echo new > d1/new; echo more >> d2/f20; mv d3 moved; mv moved/f30 d1/f30; rm -r d4; rm d5/f50
    rm -r d6; mkdir d6; echo fresh > d6/only; ln d7/f70 d7/second; ln -s f71 d7/link; chmod 600 d8/f80
    chown 7:8 d8/f81; touch -d '2001-02-03 04:05:06' d9/f90 d9; mkfifo d9/pipe; echo x > "d9/$(printf 'a\nb')"
"""


@pytest.fixture(scope="module")
def large_layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image with 10,000 files in 100 directories."""
    path = tmp_path_factory.mktemp("large") / "layout"
    base = [directory(name) for name in ("bin", "data", "dev", "etc", "proc", "sys", "tmp")]
    base += [member("bin/busybox", BUSYBOX.read_bytes(), mode=0o755)]
    base += [symlink(f"bin/{name}", "busybox") for name in _APPLETS]
    per_directory = _FILES // _DIRECTORIES
    files = []
    for i in range(_DIRECTORIES):
        files.append(directory(f"data/d{i}", mtime=1000 + i))
        for j in range(per_directory):
            text = f"{i} {j}\n".encode() * (1 + (i * j) % 50)
            files.append(member(f"data/d{i}/f{i}{j}", text, mtime=2000 + j, uid=j % 3, mode=0o600 + j % 64))
    files += [hard_link("data/d0/hard", "data/d0/f00"), symlink("data/d0/soft", "../d1")]
    Layout(path).image([tar(base), tar(files)])
    return path


@pytest.mark.timeout(200)
def test_ten_thousand_files_changed_committed_and_imported_again(
    isolated: Isolated, large_layout: Path
) -> None:
    isolated.polytropo("image", "import", large_layout, "--name", "large")
    before = isolated.polytropo("run", "--rm", "large", "sh", "-c", _LOOK).stdout
    assert before.count("\n") > 2 * _FILES
    isolated.polytropo("run", "--name", "c", "large", "sh", "-c", _CHANGE)
    isolated.polytropo("commit", "c", "changed")
    stay = f"{_CHANGE} echo done > /tmp/done; while :; do read x < d9/pipe; done"
    isolated.polytropo("run", "-d", "--name", "live", "large", "sh", "-c", stay)
    isolated.polytropo("exec", "live", "sh", "-c", "until [ -e /tmp/done ]; do :; done")
    changed = isolated.polytropo("exec", "live", "sh", "-c", _LOOK).stdout
    assert changed != before
    looks = {"changed": isolated.polytropo("run", "--rm", "changed", "sh", "-c", _LOOK).stdout}
    # From a container that runs, and as an archive through standard output and input.
    isolated.polytropo("commit", "live", "changed-live")
    looks["live"] = isolated.polytropo("run", "--rm", "changed-live", "sh", "-c", _LOOK).stdout
    shell(isolated, "polytropo image save changed-live | gzip -1 | polytropo image import --name saved -")
    looks["saved"] = isolated.polytropo("run", "--rm", "saved", "sh", "-c", _LOOK).stdout
    same = {name: _comparable(look) == _comparable(changed) for name, look in looks.items()}
    assert same == dict.fromkeys(looks, True), _difference(changed, looks, same)
    # The image is as it was.
    assert isolated.polytropo("run", "--rm", "large", "sh", "-c", _LOOK).stdout == before


def _comparable(look: str) -> list[str]:
    """Without the times of what the change itself touched, which are those of each run, and without the link
    counts of directories, which say nothing once they are merged."""
    lines = []
    for line in look.splitlines():
        fields = line.split("|")
        if len(fields) == 8 and int(fields[6]) > 1_500_000_000:
            fields[6] = "now"
        if len(fields) == 8 and fields[1] == "directory":
            fields[5] = "any"
        lines.append("|".join(fields))
    return lines


def _difference(expected: str, looks: dict[str, str], same: dict[str, bool]) -> str:
    name = next(name for name, equal in same.items() if not equal)
    wanted, got = set(_comparable(expected)), set(_comparable(looks[name]))
    return f"{name}: missing {sorted(wanted - got)[:10]}, unexpected {sorted(got - wanted)[:10]}"


@pytest.mark.timeout(400)
@pytest.mark.parametrize("way", ["--no-preload", "--preload"])
def test_debian_installs_packages(isolated: Isolated, way: str) -> None:
    """Also with all programs of the container preloaded: apt, dpkg, perl, shells, those of other users."""
    try:
        urllib.request.urlopen(_MIRROR, timeout=10).close()
    except (urllib.error.URLError, TimeoutError) as error:
        pytest.skip(f"the Debian mirror cannot be reached: {error}")
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    isolated.polytropo("image", "bootstrap", "debian", environment={"XDG_CACHE_HOME": cache}, timeout_s=300)
    script = "apt-get update && apt-get install -y --no-install-recommends hello && dpkg --verify"
    script += " && cp /usr/bin/id /usr/local/bin/setuid-id && chmod 4755 /usr/local/bin/setuid-id && hello"
    done = isolated.polytropo(
        "run", way, "-e", "POLYTROPO_TRACE=1", "--name", "apt", "debian", "sh", "-c", script, timeout_s=200
    )
    assert done.stdout.rstrip().endswith("Hello, world!")
    if way == "--preload":
        assert sum(map(int, re.findall(r"in the process (\d+)", done.stderr))) > 500, done.stderr
    isolated.polytropo("commit", "apt", "hello")
    assert isolated.polytropo("run", way, "--rm", "hello", "hello").stdout == "Hello, world!\n"
    asked = ("run", way, "--rm", "-u", "nobody", "hello", "sh", "-c", "id -u; setuid-id -u")
    assert isolated.polytropo(*asked).stdout.split() == ["65534", "0"]
    listing = isolated.polytropo("run", way, "--rm", "hello", "cat", "/var/lib/dpkg/status").stdout
    assert "Package: hello\n" in listing
