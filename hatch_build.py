"""The wheel carries the service program and the preload library: it is for one platform and needs both."""

import platform
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PROGRAM = "src/polytropo/_bin/polytropo-service"
# There is one for x86-64 only.
PRELOAD = "src/polytropo/_bin/libpolytropo_preload.so"


class ServiceHook(BuildHookInterface[Any]):
    """Called by hatchling for each build; an editable install runs from the clone and needs nothing."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        program = Path(self.root) / PROGRAM
        if not program.is_file() or not program.stat().st_mode & 0o111:
            raise FileNotFoundError(f"{program} is missing or not executable; run `make build` first")
        preload = Path(self.root) / PRELOAD
        if platform.machine() == "x86_64" and not preload.is_file():
            raise FileNotFoundError(f"{preload} is missing; run `make build` first")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-linux_{platform.machine()}"
