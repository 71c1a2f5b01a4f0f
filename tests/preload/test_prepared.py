"""C libraries that were prepared: their code is mapped from a file, with the jumps in it."""

import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from polytropo.preload_files import stage_sites
from tests.preload.conftest import Compile, Preloaded

DESCRIPTION_BYTES = 24 * 8
SIZE_WORD, MTIME_WORD, CODE_WORD = 7, 8, 11
LIBC = Path("/lib/x86_64-linux-gnu/libc.so.6")


@pytest.fixture
def prepared(with_sites: Preloaded, tmp_path: Path) -> Path:
    (file,) = tmp_path.glob("*.code")
    return file


def mapped_code(preloaded: Preloaded) -> list[str]:
    """Mappings of prepared code in a program."""
    shown = preloaded.run("cat", "/proc/self/maps")
    assert shown.returncode == 0, shown
    return [line for line in shown.stdout.decode().splitlines() if line.endswith(".code")]


def test_its_code_is_mapped_and_no_page_of_it_is_copied(with_sites: Preloaded, prepared: Path) -> None:
    code, trampolines = sorted((line.split()[:2] for line in mapped_code(with_sites)), reverse=True)
    assert code[1] == trampolines[1] == "r-xp"
    shown = with_sites.run("cat", "/proc/self/smaps").stdout.decode()
    blocks = shown.split(str(prepared))[1:]
    assert len(blocks) == 2
    for block in blocks:
        assert "Anonymous:             0 kB" in block.split("VmFlags")[0], block
    with_sites.same("sh", "-c", "cat /etc/passwd | wc -l; exit 3")


def test_only_its_jumps_differ_from_the_library(prepared: Path) -> None:
    library, made = LIBC.read_bytes(), prepared.read_bytes()
    differing = sum(a != b for a, b in zip(library, made, strict=False))
    assert 0 < differing < 4096 and len(made) > len(library)


def test_code_is_not_left_to_another_library_that_claims_to_be_the_same(tmp_path: Path) -> None:
    staged, copy, forged = (tmp_path / name for name in ("staged", "copy", "forged"))
    staged.mkdir()
    for made in copy, forged:
        shutil.copy2(LIBC, made)
    with forged.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"!")
    status = LIBC.stat()
    os.utime(forged, ns=(status.st_atime_ns, status.st_mtime_ns))
    umask = os.umask(0)
    try:
        for library, there in (LIBC, True), (copy, True), (forged, False), (LIBC, False):
            with library.open("rb") as file:
                stage_sites(staged, file.fileno())
            assert bool(list(staged.glob("*.code"))) == there, library
            assert {path.stat().st_mode & 0o777 for path in staged.iterdir()} == {0o644}
    finally:
        os.umask(umask)


@pytest.mark.parametrize(
    "damage",
    ["empty", "cut", "longer", "magic", "build id", "size", "time", "place", "place beyond the file"],
)
def test_files_of_other_libraries_are_not_used(with_sites: Preloaded, prepared: Path, damage: str) -> None:
    good = prepared.read_bytes()
    body, words = good[:-DESCRIPTION_BYTES], list(struct.unpack("<24Q", good[-DESCRIPTION_BYTES:]))
    at = {"magic": 0, "build id": 3, "size": SIZE_WORD, "time": MTIME_WORD}.get(damage)
    if at is not None:
        words[at] ^= 1
    words[CODE_WORD] += {"place": 4096, "place beyond the file": 1 << 25}.get(damage, 0)
    whole = body + struct.pack("<24Q", *words)
    changed = {"empty": b"", "cut": good[:-1], "longer": good + bytes(8)}.get(damage, whole)
    # Programs that run have the old one mapped.
    prepared.unlink()
    prepared.write_bytes(changed)
    assert mapped_code(with_sites) == []
    with_sites.same("sh", "-c", "cat /etc/passwd | wc -l; exit 3")


def test_a_library_that_was_replaced_is_not_given_the_code_of_the_old_one(
    with_sites: Preloaded, prepared: Path, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    environment = with_sites.environment(LD_LIBRARY_PATH=str(tmp_path / "other"))
    shutil.copy2(LIBC, tmp_path / "other" / LIBC.name)
    same = with_sites.run("cat", "/proc/self/maps", environment=environment).stdout.decode()
    shutil.copy(LIBC, tmp_path / "other" / LIBC.name)
    changed = with_sites.run("cat", "/proc/self/maps", environment=environment).stdout.decode()
    assert (prepared.name in same, prepared.name in changed) == (True, False)
    assert any(": sites " in line for line in with_sites.report())


def test_a_policy_against_writable_code_is_no_hindrance(with_sites: Preloaded, prepared: Path) -> None:
    done = with_sites.run_under_mdwe("/bin/cat", "/proc/self/maps")
    assert done.returncode == 0 and prepared.name in done.stdout.decode(), done


def test_twice_does_no_harm(with_sites: Preloaded, prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    again = shutil.copy(with_sites.library, tmp_path / "second" / "again.so")
    shutil.copy(prepared, tmp_path / "second")
    environment = with_sites.environment(LD_PRELOAD=f"{with_sites.library} {again}")
    done = with_sites.run("cat", "/etc/passwd", environment=environment)
    assert done.returncode == 0 and done.stdout == Path("/etc/passwd").read_bytes()
    assert any("stepped aside" in line for line in with_sites.report())


def test_programs_at_fixed_addresses_and_without_an_environment(
    with_sites: Preloaded, prepared: Path, compile_program: Compile
) -> None:
    program = compile_program("children", "-no-pie")
    with_sites.same(program)
    # The loader run as a program: its headers lead nowhere, and the long way is gone.
    with_sites.same("/lib64/ld-linux-x86-64.so.2", "/bin/cat", "/etc/passwd")
    empty = subprocess.run(
        ["/lib64/ld-linux-x86-64.so.2", "--preload", with_sites.library, "/bin/cat", "/etc/passwd"],
        env={},
        capture_output=True,
        timeout=30,
        check=True,
    )
    assert empty.stdout == Path("/etc/passwd").read_bytes()
