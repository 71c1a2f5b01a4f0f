"""Stacks mounted, used and unmounted."""

import json
import subprocess
from pathlib import Path

from tests.conftest import POLYTROPO, Isolated
from tests.stacks import write_stack


def test_a_directory_is_served_both_ways(isolated: Isolated, data: Path, mnt: Path) -> None:
    isolated.polytropo("mount", data, mnt)
    assert isolated.run("cat", mnt / "file").stdout == "content\n"
    isolated.run("sh", "-c", 'echo more >"$1/new" && mkdir "$1/d"', "sh", mnt)
    assert (data / "new").read_text() == "more\n" and (data / "d").is_dir()
    assert not (mnt / "file").exists(), "the mount is seen outside of its namespace"

    (stats,) = isolated.json("stats", "--tenant", "default")
    assert stats["running"] and stats["mounts"][0]["mountpoint"] == str(mnt)
    assert stats["mounts"][0]["operations"]["lookup"]["count"] > 0
    assert (stats["read_bytes"], stats["written_bytes"]) == (8, 5)
    assert "write" in isolated.polytropo("stats", "--operations").stdout

    isolated.polytropo("umount", mnt)
    assert isolated.run("ls", mnt).stdout == ""
    (after,) = isolated.json("stats", "--tenant", "default")
    assert after["mounts"] == []
    assert after["operation_count"] >= stats["operation_count"] > 0, (
        "what ended mounts did is not told any more"
    )
    assert (after["read_bytes"], after["written_bytes"]) == (8, 5)
    isolated.polytropo("mount", data, mnt, "--read-only")
    assert "Read-only file system" in isolated.run("touch", mnt / "x", check=False).stderr
    isolated.polytropo("unmount", mnt)
    assert "nothing is mounted at" in isolated.refused("unmount", mnt)


def test_a_stack_that_cannot_be_built_is_refused(isolated: Isolated, data: Path, mnt: Path) -> None:
    gone = write_stack(isolated.directory / "gone.json", {"kind": "dir", "path": str(data / "absent")})
    assert str(data / "absent") in isolated.refused("mount", gone, mnt)
    file = write_stack(isolated.directory / "file.json", {"kind": "dir", "path": str(data / "file")})
    assert "is not a directory" in isolated.refused("mount", file, mnt)
    assert isolated.json("stats")[0]["mounts"] == []


def test_programs_run_on_the_stack(isolated: Isolated, data: Path, mnt: Path) -> None:
    (data / "sub").mkdir()
    isolated.polytropo("mount", data, mnt)
    done = isolated.polytropo("on", mnt, "--", "sh", "-c", "pwd; cat file; exit 7", check=False)
    assert (done.returncode, done.stdout) == (7, f"{mnt}\ncontent\n")
    assert isolated.polytropo("on", mnt / "sub", "pwd").stdout == f"{mnt / 'sub'}\n"
    assert isolated.polytropo("on", "-w", "/", mnt, "--", "pwd").stdout == "/\n"
    assert isolated.polytropo("on", mnt, "--", "cat", "--", "file").stdout == "content\n"
    isolated.refused("on", mnt, "--", "nonesuch", status=127)
    isolated.refused("on", mnt, "--", "./file", status=126)
    killed = isolated.polytropo("on", mnt, "--", "sh", "-c", "kill -9 $$", check=False)
    assert killed.returncode in (-9, 137)
    assert f"there are mounts at {mnt}" in isolated.refused("on", data, "--", "true", status=125)


def test_places_that_are_taken(isolated: Isolated, data: Path, mnt: Path) -> None:
    isolated.polytropo("mount", data, mnt)
    assert "is in use by a fuse.polytropo mount" in isolated.refused("mount", data, mnt)
    with subprocess.Popen(isolated.command("sleep", "100"), cwd="/") as outside:
        busy = subprocess.Popen(
            isolated.command("sh", "-c", f"cd {mnt}; echo; exec sleep 100"), stdout=subprocess.PIPE
        )
        assert busy.stdout is not None and busy.stdout.readline() == b"\n"
        assert "in use" in isolated.refused("unmount", mnt)
        assert "in use" in isolated.refused("tenant", "stop", "default")
        assert isolated.run("cat", mnt / "file").stdout == "content\n"
        isolated.polytropo("unmount", "--lazy", mnt)
        assert isolated.run("ls", mnt).stdout == ""
        busy.kill()
        busy.wait(10)
        outside.kill()


def test_identical_stacks_are_one_filesystem(isolated: Isolated, data: Path, mnt: Path) -> None:
    other = isolated.directory / "other"
    other.mkdir()
    isolated.polytropo("mount", data, mnt)
    isolated.polytropo("mount", data, other)
    one, two = (isolated.run("stat", "-c", "%d %i", path / "file").stdout for path in (mnt, other))
    assert one == two
    isolated.polytropo("unmount", mnt, other)


def test_who_mounts_first_says_whether_channels_write(isolated: Isolated, data: Path, mnt: Path) -> None:
    root = {"kind": "dir", "path": str(data), "coherence": "exclusive"}
    stack = isolated.directory / "stack.json"
    other = isolated.directory / "other"
    other.mkdir()
    for at, settings in ((mnt, {"channel_writes": True}), (other, {})):
        stack.write_text(json.dumps({"version": 1, "root": root, **settings}))
        isolated.polytropo("mount", stack, at)
    devices = isolated.run("stat", "-c", "%d", mnt, other).stdout.split()
    assert devices[0] == devices[1]
    isolated.run("sh", "-c", 'echo new >"$1/file" && test "$(cat "$2/file")" = new', "sh", mnt, other)


def test_small_files_of_an_image_are_read_once(isolated: Isolated, data: Path) -> None:
    """By programs in two containers, of which the second one has changed a file."""
    for number in range(20):
        (data / f"f{number}").write_text(f"{number}\n" * 500)
    places = [isolated.directory / f"container{number}" for number in range(2)]
    for place in places:
        upper = place.with_name(f"{place.name}-upper")
        place.mkdir()
        upper.mkdir()
        root = {
            "kind": "union",
            "lowers": [{"kind": "dir", "path": str(data), "coherence": "immutable", "read_only": True}],
            "upper": {"kind": "dir", "path": str(upper), "coherence": "exclusive"},
        }
        isolated.polytropo("mount", write_stack(place.with_suffix(".json"), root), place)
    isolated.run("sh", "-c", 'echo own >"$1/f3"', "sh", places[1])
    for place, changed in zip(places, (None, data / "f3"), strict=True):
        shown = isolated.run("sh", "-c", 'cat "$1"/*', "sh", place).stdout
        texts = ("own\n" if path == changed else path.read_text() for path in sorted(data.iterdir()))
        assert shown == "".join(texts)
    (stats,) = isolated.json("stats")
    assert (stats["slabs"]["fills"], stats["slabs"]["files"]) == (21, 21)
    assert stats["slabs"]["hits"] >= 20
    assert "small files" in isolated.polytropo("stats", "--windows").stdout.lower()


def test_commands_at_once_share_one_service(isolated: Isolated, data: Path) -> None:
    places = [isolated.directory / f"m{i}" for i in range(6)]
    for place in places:
        place.mkdir()
    running = [
        subprocess.Popen(isolated.command(POLYTROPO, "mount", data, place), env=isolated.environment)
        for place in places
    ]
    assert [process.wait(60) for process in running] == [0] * 6
    (stats,) = isolated.json("stats")
    assert sorted(mount["mountpoint"] for mount in stats["mounts"]) == sorted(map(str, places))
    assert stats["process_count"] == 2, "keeper and worker"
    same = [
        subprocess.Popen(
            isolated.command(POLYTROPO, "unmount", places[0]),
            env=isolated.environment,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(3)
    ]
    assert sorted(process.wait(60) for process in same)[0] == 0
    isolated.polytropo("unmount", *places[1:])
