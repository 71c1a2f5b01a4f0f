"""Docker's system-call profile in the runtime's form."""

import json
from pathlib import Path
from typing import Any

import pytest

from polytropo.containers.seccomp import _convert, default_filter
from polytropo.containers.spec import CAPABILITIES
from polytropo.errors import PolytropoError


def _names(document: dict[str, Any], **where: Any) -> set[str]:
    """The calls whose first matching rule is to allow."""
    values = {"machine": "x86_64", "release": "6.1.0-13", "capabilities": frozenset[str](), **where}
    converted = _convert(document, values["capabilities"], values["machine"], values["release"])
    return {name for rule in converted["syscalls"] for name in rule["names"]}


def _rule(**conditions: Any) -> dict[str, Any]:
    rule = {"names": ["call"], "action": "SCMP_ACT_ALLOW", **conditions}
    return {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [rule]}


@pytest.mark.parametrize(
    ("conditions", "where", "included"),
    [
        ({}, {}, True),
        ({"includes": {"caps": ["A", "B"]}}, {"capabilities": frozenset("A")}, False),
        ({"includes": {"caps": ["A", "B"]}}, {"capabilities": frozenset("ABC")}, True),
        ({"excludes": {"caps": ["A", "B"]}}, {"capabilities": frozenset("B")}, False),
        ({"excludes": {"caps": ["A", "B"]}}, {"capabilities": frozenset("C")}, True),
        ({"includes": {"arches": ["arm64"]}}, {}, False),
        ({"includes": {"arches": ["arm64"]}}, {"machine": "aarch64"}, True),
        ({"excludes": {"arches": ["amd64"]}}, {}, False),
        ({"includes": {"minKernel": "6.1"}}, {}, True),
        ({"includes": {"minKernel": "6.10"}}, {}, False),
        ({"includes": {"minKernel": "4.8"}}, {"release": "10.0"}, True),
        ({"includes": {"caps": [], "arches": None}, "excludes": None}, {}, True),
    ],
)
def test_conditions(conditions: dict[str, Any], where: dict[str, Any], included: bool) -> None:
    assert ("call" in _names(_rule(**conditions), **where)) is included


def test_arguments_and_errors_are_kept() -> None:
    argument = {"index": 0, "value": 8, "valueTwo": 0, "op": "SCMP_CMP_EQ"}
    document = _rule(args=[argument], errnoRet=1) | {
        "defaultErrnoRet": 38,
        "archMap": [{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]}],
    }
    converted = _convert(document, frozenset(), "x86_64", "6.1")
    assert converted == {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": 38,
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
        "syscalls": [{"names": ["call"], "action": "SCMP_ACT_ALLOW", "errnoRet": 1, "args": [argument]}],
    }


def test_the_installed_profile() -> None:
    converted = default_filter(frozenset(CAPABILITIES))
    allowed = {n for r in converted["syscalls"] if r["action"] == "SCMP_ACT_ALLOW" for n in r["names"]}
    refused = {n for r in converted["syscalls"] if r["action"] == "SCMP_ACT_ERRNO" for n in r["names"]}
    assert {"openat2", "chroot", "clone3", "statx"} <= allowed
    assert {"bpf", "init_module", "settimeofday"} <= refused - allowed


def test_bad_profiles(tmp_path: Path) -> None:
    missing = tmp_path / "missing.json"
    with pytest.raises(PolytropoError, match="install golang-github-containers-common"):
        default_filter(frozenset(), missing)
    for text in ("{", "[]", json.dumps({"syscalls": [{}]})):
        missing.write_text(text)
        with pytest.raises(PolytropoError, match="profile"):
            default_filter(frozenset(), missing)
