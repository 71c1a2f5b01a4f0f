"""`python -m tests.semantics EMPTY IMAGE [passthrough]`: prints the promises that were broken, as JSON."""

import json
import sys
import traceback
from pathlib import Path

from tests.semantics import attributes, files, names  # noqa: F401  they register their promises
from tests.semantics.registry import LARGE_BYTES, LARGE_DATA, PROMISES, Ground


def make_image(directory: Path) -> None:
    (directory / "tree" / "inner").mkdir(parents=True)
    (directory / "tree" / "inner" / "file").write_text("inner")
    (directory / "file").write_bytes(b"image" * 20_000)
    with (directory / "large").open("wb") as large:
        for at in LARGE_DATA:
            large.seek(at)
            large.write(b"image" * 20_000)
        large.truncate(LARGE_BYTES)
    (directory / "linked").write_bytes(b"linked")
    (directory / "also-linked").hardlink_to(directory / "linked")


if __name__ == "__main__":
    empty, image = map(Path, sys.argv[1:3])
    broken: dict[str, str] = {}
    for name, promise in PROMISES.items():
        directory = empty / name
        directory.mkdir(mode=0o755)
        try:
            promise(Ground(directory, image / name, passthrough="passthrough" in sys.argv[3:]))
        except Exception:
            broken[name] = traceback.format_exc()
    print(json.dumps({"tried": sorted(PROMISES), "broken": broken}))
