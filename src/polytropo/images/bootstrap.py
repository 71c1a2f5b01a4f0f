"""Makes images of Debian with mmdebstrap, and keeps what it made for the next time."""

import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import msgspec

from polytropo.errors import storage_errors
from polytropo.host import host_ownership
from polytropo.images.blobs import FileReader
from polytropo.images.diff import changes
from polytropo.images.errors import ImageError, shown
from polytropo.images.extract import unpack
from polytropo.images.importing import root_config
from polytropo.images.layers import LayerRecord, layer_tree, use_layers
from polytropo.images.progress import Meter, Progress, silent
from polytropo.images.references import normalized
from polytropo.images.store import Image, add_image
from polytropo.images.streams import CHUNK_BYTES, DigestReader, Readable
from polytropo.images.unpacking import add_layer
from polytropo.images.walk import Tree
from polytropo.state import State, write_atomically

DEFAULT_SUITE = "bookworm"
DEFAULT_MIRROR = "http://deb.debian.org/debian"
_CACHE_VERSION = 1  # raise it when the same input is to give another image
_TIMEOUT_S = 1800
_LOG_LINES_SHOWN = 1
_SUITE = re.compile(r"[a-z][a-z0-9.-]{0,63}")
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]{1,127}(:[a-z0-9]+)?([=/][A-Za-z0-9.+:~-]+)?")
_MIRROR = re.compile(r"(https?|file|copy)://[^\s\[\]]+")
_MMDEBSTRAP = ("mmdebstrap", "--format=tar")
# mmdebstrap leaves processes, mounts and files when it is killed. In namespaces of its own the first two end
# with the first process, and that with us.
_ENDS_WITH_US = ("setpriv", "--pdeathsig", "KILL")
_NAMESPACES = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
# mmdebstrap makes the device nodes itself, in the way that its rights allow.
_UNPACK = 'tar --xattrs --xattrs-include="*" --exclude="./dev/*" -C "$1" -xpf'


class _CachedLayer(msgspec.Struct):
    """What lies beside a cached layer's archive."""

    diff_id: str
    made_unix_s: int


def bootstrap(
    state: State,
    name: str,
    *,
    suite: str = DEFAULT_SUITE,
    include: Sequence[str] = (),
    mirror: str | None = None,
    progress: Progress = silent,
) -> Image:
    """Makes an image of minimal Debian, and with `include` a second layer of these packages.

    The layers' archives are kept in the user's cache, by suite, packages and sources. Without `mirror`
    this machine's own sources are used where they have the suite. Raises ImageError.
    """
    wanted = normalized(name)
    packages = _checked(suite, include, mirror)
    sources = [f"deb {mirror} {suite} main"] if mirror else _host_sources(suite)
    maker = _Maker(state, suite, sources, Meter(progress))
    with use_layers(state), storage_errors("keep what was bootstrapped", cache_directory()):
        layers = [maker.base()]
        if packages:
            layers.append(maker.added(layers[0], packages))
        return add_image(state, root_config(layers, "/bin/bash"), [wanted])


def cache_directory() -> Path:
    """Where bootstrapped layers are kept: outside of any state directory."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(cache) if cache.startswith("/") else Path.home() / ".cache") / "polytropo" / "bootstrap"


class _Maker:
    def __init__(self, state: State, suite: str, sources: list[str], meter: Meter) -> None:
        self._state = state
        self._suite = suite
        self._sources = sources
        self._meter = meter
        self._cache = cache_directory()
        self._cache.mkdir(mode=0o700, parents=True, exist_ok=True)

    def base(self) -> LayerRecord:
        """The layer of minimal Debian."""
        with self._held("base", []) as archive:
            if (record := self._from_cache(archive)) is None:
                made_unix_s = int(time.time())
                with self._made(archive, made_unix_s) as temporary:
                    self._run(["--variant=minbase"], temporary, made_unix_s)
                record = self._from_cache(archive)
        return _there(record)

    def added(self, base: LayerRecord, packages: list[str]) -> LayerRecord:
        """The layer that adds packages to minimal Debian."""
        with self._held("added", [base.diff_id, *packages]) as archive:
            if (record := self._from_cache(archive)) is None:
                made_unix_s = int(time.time())
                with self._made(archive, made_unix_s) as temporary:
                    self._install(base, packages, temporary, made_unix_s)
                record = self._from_cache(archive)
        return _there(record)

    def _install(self, base: LayerRecord, packages: list[str], target: Path, made_unix_s: int) -> None:
        with tempfile.TemporaryDirectory(dir=self._cache, prefix=".full-") as directory:
            full = Path(directory) / "full.tar"
            hook = f"{_UNPACK} {shlex.quote(str(self._archive('base', [])))}"
            options = ["--variant=custom", f"--include={','.join(packages)}", f"--setup-hook={hook}"]
            self._run(options, full, made_unix_s)
            with self._state.scratch("bootstrap") as scratch:
                tree = scratch.path / "tree"
                ownership = host_ownership()
                with full.open("rb") as file:
                    unpack(file, tree, ownership)
                with (
                    Tree(layer_tree(self._state, base.diff_id), base.ownership) as before,
                    Tree(tree, ownership) as after,
                    target.open("wb") as file,
                ):
                    for chunk in changes(before, after):
                        file.write(chunk)

    @contextmanager
    def _held(self, kind: str, inputs: list[str]) -> Iterator[Path]:
        """The place of a layer's archive in the cache, for one process at a time."""
        archive = self._archive(kind, inputs)
        descriptor = os.open(archive.with_suffix(".lock"), os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield archive
        finally:
            os.close(descriptor)

    def _archive(self, kind: str, inputs: list[str]) -> Path:
        key = json.dumps([_CACHE_VERSION, kind, self._suite, self._sources, inputs])
        digits = hashlib.sha256(key.encode()).hexdigest()[:32]
        return self._cache / f"{kind}-{self._suite}-{digits}.tar"

    @contextmanager
    def _made(self, archive: Path, made_unix_s: int) -> Iterator[Path]:
        """A file to make the archive in, which takes its place at the end."""
        for leftover in self._cache.glob(f".{archive.name}.*"):  # the lock is ours, so is nobody's
            leftover.unlink(missing_ok=True)
        temporary = archive.with_name(f".{archive.name}.{os.getpid()}")
        try:
            yield temporary
            with temporary.open("rb", buffering=0) as file:
                reader = DigestReader(file)
                while reader.read(CHUNK_BYTES):
                    pass
                os.fsync(file.fileno())
            cached = _CachedLayer(diff_id=reader.digest, made_unix_s=made_unix_s)
            archive.with_suffix(".json").unlink(missing_ok=True)
            temporary.rename(archive)
            write_atomically(archive.with_suffix(".json"), msgspec.json.encode(cached))
        finally:
            temporary.unlink(missing_ok=True)

    def _from_cache(self, archive: Path) -> LayerRecord | None:
        """The layer from its archive in the cache, if there is a sound one."""
        try:
            cached = msgspec.json.decode(archive.with_suffix(".json").read_bytes(), type=_CachedLayer)
            file = archive.open("rb", buffering=0)
        except (FileNotFoundError, msgspec.DecodeError):
            return None
        with file:
            size_bytes = os.fstat(file.fileno()).st_size
            self._meter.expect(size_bytes)
            told = self._meter.part(size_bytes)
            source: Readable = DigestReader(FileReader(file.fileno(), 0, size_bytes), told)
            try:
                return add_layer(self._state, lambda: source, cached.diff_id)
            except ImageError:  # damaged: make it anew
                archive.unlink(missing_ok=True)
                return None

    def _run(self, options: list[str], target: Path, made_unix_s: int) -> None:
        for program in (_MMDEBSTRAP[0], _ENDS_WITH_US[0], _NAMESPACES[0]):
            if shutil.which(program) is None:
                raise ImageError(f"{program} is not installed; run apt-get install mmdebstrap util-linux")
        # Files get no later time than this, so that the same packages give the same layer.
        environment = os.environ | _proxies() | {"SOURCE_DATE_EPOCH": str(made_unix_s), "LC_ALL": "C.UTF-8"}
        command = [*_ENDS_WITH_US, *_MMDEBSTRAP, *options, self._suite, str(target), "-"]
        with ExitStack() as until_end:
            log = until_end.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
            # An ordinary user's mmdebstrap makes namespaces itself, and files that only it can remove.
            if os.geteuid() == 0:
                command[len(_ENDS_WITH_US) : len(_ENDS_WITH_US)] = _NAMESPACES
                environment["TMPDIR"] = str(until_end.enter_context(self._state.scratch("bootstrap")).path)
            try:
                with _child(command, environment, log.fileno()) as process:
                    sources = "\n".join(self._sources) + "\n"
                    process.communicate(sources.encode(), timeout=_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                raise ImageError(
                    f"mmdebstrap was not done after {_TIMEOUT_S} s; try another --mirror"
                ) from None
            if process.returncode != 0:
                log.seek(0)
                raise ImageError(f"cannot bootstrap {self._suite}: {_reason(log.read())}")


@contextmanager
def _child(command: list[str], environment: dict[str, str], log: int) -> "Iterator[subprocess.Popen[bytes]]":
    """A program that does not outlive the `with`, nor do those that it started."""
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        yield process
    except BaseException:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        # Standard output ends when the last of them is gone.
        while process.stdout.read(CHUNK_BYTES):
            pass
        raise


def _checked(suite: str, include: Sequence[str], mirror: str | None) -> list[str]:
    """The packages, sorted. Raises ImageError for words that could mean something else to mmdebstrap."""
    if not _SUITE.fullmatch(suite):
        raise ImageError(f"{shown(suite)} is no name of a Debian suite; write one like {DEFAULT_SUITE}")
    if mirror is not None and not _MIRROR.fullmatch(mirror):
        raise ImageError(f"{shown(mirror)} is no mirror; write one like {DEFAULT_MIRROR}")
    packages = sorted({name for words in include for name in words.replace(",", " ").split()})
    for name in packages:
        if not _PACKAGE.fullmatch(name):
            raise ImageError(f"{shown(name)} is no name of a package; write one like sqlite3")
    return packages


def _host_sources(suite: str) -> list[str]:
    """This machine's own sources of the suite, else Debian's."""
    wanted = {suite, f"{suite}-updates", f"{suite}-security"}
    form = "$(REPO_URI) $(RELEASE) $(COMPONENT)"
    lines = _output("apt-get", "indextargets", "--format", form, "Created-By: Packages").splitlines()
    found = [words for line in lines if len(words := line.split()) == 3]
    chosen = {
        f"deb {uri} {release} main" for uri, release, part in found if release in wanted and part == "main"
    }
    if not any(line.split()[2] == suite for line in chosen):
        return [f"deb {DEFAULT_MIRROR} {suite} main"]
    return sorted(chosen)


def _proxies() -> dict[str, str]:
    """The proxies from apt's own settings, which mmdebstrap does not read."""
    found = {}
    for scheme in ("http", "https"):
        variable = f"{scheme}_proxy"
        line = _output("apt-config", "shell", "PROXY", f"Acquire::{scheme}::Proxy")
        if variable not in os.environ and (match := re.fullmatch(r"PROXY='([^']+)'\n?", line)):
            found[variable] = match[1]
    return found


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _reason(log: str) -> str:
    """The line of a log that tells most."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("E: ")] or lines or ["mmdebstrap said nothing"]
    text = errors[0].removeprefix("E: ")
    return text if text.isprintable() else ascii(text)


def _there(record: LayerRecord | None) -> LayerRecord:
    if record is None:
        raise ImageError("what was bootstrapped is damaged in the cache; look after the disk and try again")
    return record
