"""The files by which a container finds itself and others: hosts, hostname, resolv.conf."""

from pathlib import Path

from polytropo.containers.records import Container, Files
from polytropo.containers.spec import Bind

_LOOPBACK_HOSTS = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"


def write_etc(container: Container, files: Files) -> list[Bind]:
    """Writes the container's files and returns where they belong in its root."""
    contents = {
        "resolv.conf": _resolv_conf(container),
        "hosts": _hosts(container),
        "hostname": f"{container.hostname}\n",
    }
    binds = []
    for name, content in contents.items():
        path = files.etc / name
        if not path.exists():  # what the container wrote there outlives its restart
            path.write_text(content, encoding="utf-8", errors="surrogateescape")
            path.chmod(0o644)
        binds.append(Bind(path, f"/etc/{name}"))
    return binds


def _hosts(container: Container) -> str:
    base = _LOOPBACK_HOSTS
    if container.network == "host":
        base = _read("/etc/hosts") or base
        base += "" if base.endswith("\n") else "\n"
    names = list(dict.fromkeys([container.hostname, container.name]))
    known = {word for line in base.splitlines() for word in line.partition("#")[0].split()[1:]}
    missing = [name for name in names if name not in known]
    return base + (f"127.0.1.1\t{' '.join(missing)}\n" if missing else "")


def _resolv_conf(container: Container) -> str:
    text = _read("/etc/resolv.conf")
    if container.network == "host":
        return text
    # A name server on the host's loopback does not answer in another network.
    return "".join(line for line in text.splitlines(keepends=True) if not _is_loopback_server(line))


def _is_loopback_server(line: str) -> bool:
    import ipaddress

    words = line.split()
    if len(words) < 2 or words[0] != "nameserver":
        return False
    try:
        return ipaddress.ip_address(words[1].partition("%")[0]).is_loopback
    except ValueError:
        return False


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""
