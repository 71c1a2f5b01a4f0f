"""Docker's default system-call filter, in the form that OCI runtimes read."""

import os
import re
from pathlib import Path
from typing import Any

from polytropo.errors import PolytropoError

PROFILE = Path("/usr/share/containers/seccomp.json")

# What the profile calls an architecture, by what the kernel calls the machine.
_ARCHES = {
    "x86_64": ("amd64", "SCMP_ARCH_X86_64"),
    "aarch64": ("arm64", "SCMP_ARCH_AARCH64"),
    "ppc64le": ("ppc64le", "SCMP_ARCH_PPC64LE"),
    "s390x": ("s390x", "SCMP_ARCH_S390X"),
    "riscv64": ("riscv64", "SCMP_ARCH_RISCV64"),
}


def default_filter(capabilities: frozenset[str], profile: Path = PROFILE) -> dict[str, Any]:
    """The `linux.seccomp` part of a runtime specification for a process with `capabilities`.

    Raises PolytropoError if the profile is missing or not one.
    """
    import msgspec

    try:
        document = msgspec.json.decode(profile.read_bytes())
    except FileNotFoundError:
        raise PolytropoError(
            f"the system-call profile {profile} is missing; install golang-github-containers-common"
        ) from None
    except (OSError, msgspec.DecodeError) as error:
        raise PolytropoError(f"the system-call profile {profile} cannot be read: {error}") from error
    machine = os.uname()
    try:
        return _convert(document, capabilities, machine.machine, machine.release)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise PolytropoError(f"{profile} is no system-call profile: {error!r}") from error


def _convert(document: Any, capabilities: frozenset[str], machine: str, release: str) -> dict[str, Any]:
    arch, native = _ARCHES.get(machine, (machine, None))
    syscalls = []
    for rule in document["syscalls"]:
        includes, excludes = rule.get("includes") or {}, rule.get("excludes") or {}
        if not _included(includes, arch, capabilities, release):
            continue
        if _excluded(excludes, arch, capabilities, release):
            continue
        names = rule.get("names") or [rule["name"]]
        converted: dict[str, Any] = {"names": names, "action": rule["action"]}
        if rule.get("errnoRet") is not None:
            converted["errnoRet"] = rule["errnoRet"]
        if rule.get("args"):
            converted["args"] = [_argument(argument) for argument in rule["args"]]
        syscalls.append(converted)
    result: dict[str, Any] = {"defaultAction": document["defaultAction"], "syscalls": syscalls}
    if document.get("defaultErrnoRet") is not None:
        result["defaultErrnoRet"] = document["defaultErrnoRet"]
    for entry in document.get("archMap") or []:
        if entry["architecture"] == native:
            result["architectures"] = [native, *(entry.get("subArchitectures") or [])]
    return result


def _included(conditions: Any, arch: str, capabilities: frozenset[str], release: str) -> bool:
    """Whether all conditions of a rule hold."""
    if (arches := conditions.get("arches")) and arch not in arches:
        return False
    if (wanted := conditions.get("caps")) and not capabilities.issuperset(wanted):
        return False
    minimum = conditions.get("minKernel")
    return not minimum or _kernel(release) >= _kernel(minimum)


def _excluded(conditions: Any, arch: str, capabilities: frozenset[str], release: str) -> bool:
    """Whether one of the conditions that switch a rule off holds."""
    if arch in (conditions.get("arches") or ()):
        return True
    if not capabilities.isdisjoint(conditions.get("caps") or ()):
        return True
    minimum = conditions.get("minKernel")
    return bool(minimum) and _kernel(release) >= _kernel(minimum)


def _argument(argument: Any) -> dict[str, Any]:
    return {
        "index": argument["index"],
        "value": argument["value"],
        "valueTwo": argument.get("valueTwo", 0),
        "op": argument["op"],
    }


def _kernel(release: str) -> tuple[int, int]:
    match = re.match(r"(\d+)\.(\d+)", release)
    if match is None:
        raise ValueError(f"{release} is no kernel version")
    return int(match[1]), int(match[2])
