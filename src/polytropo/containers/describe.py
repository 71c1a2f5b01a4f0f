"""Containers for people and programs to read: summaries and the whole of what is known."""

import time
from typing import Any

import msgspec

from polytropo.containers import records
from polytropo.containers.records import Container
from polytropo.state import State

_UNITS = (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1))


def summary(state: State, container: Container) -> dict[str, Any]:
    """One container in a list."""
    files = records.files_of(state, container.id)
    status = records.status_of(files)
    process, result = records.process_of(files), records.result_of(files)
    started = process.started_unix_s if process else result.started_unix_s if result else None
    finished = None
    if status == "exited":
        finished = result.finished_unix_s if result else records.monitored_status(container, files)[1]
    return {
        "id": container.id,
        "name": container.name,
        "tenant": container.tenant,
        "image": container.image,
        "args": container.args,
        "status": status,
        "pid": process.pid if process and status == "running" else None,
        "exit_status": records.exit_status(container, files) if status == "exited" else None,
        "created_unix_s": container.created_unix_s,
        "started_unix_s": started,
        "finished_unix_s": finished,
    }


def whole(state: State, container: Container) -> dict[str, Any]:
    """All that is known of one container."""
    files = records.files_of(state, container.id)
    shown: dict[str, Any] = summary(state, container)
    for name, value in msgspec.to_builtins(container).items():
        if name not in ("version", "root"):
            shown.setdefault(name, value)
    shown["stack"] = container.root
    shown["paths"] = {"root": str(files.rootfs), "upper": str(files.upper), "log": str(files.log)}
    return shown


def state_in_words(shown: dict[str, Any]) -> str:
    """As podman says it: "Up 5 minutes", "Exited (0) 2 hours ago", "Created"."""
    if shown["status"] == "running":
        return f"Up {age(shown['started_unix_s'])}"
    if shown["status"] == "created":
        return "Created"
    status = "unknown" if shown["exit_status"] is None else shown["exit_status"]
    return f"Exited ({status}) {age(shown['finished_unix_s'])} ago"


def age(since_unix_s: float | None) -> str:
    """How long ago, in the largest unit that fits."""
    seconds = max(0, int(time.time() - (since_unix_s or time.time())))
    for unit, length in _UNITS:
        if seconds >= length:
            count = seconds // length
            return f"{count} {unit}{'' if count == 1 else 's'}"
    return "0 seconds"
