"""`python -m polytropo.containers.reap HOME ID`: run by a container's monitor at its end.

Cleans up if no command is attached that would.
"""

import sys
from pathlib import Path

from polytropo.containers.engine import reap
from polytropo.errors import PolytropoError
from polytropo.state import State


def main(arguments: list[str]) -> int:
    home, container_id = arguments
    try:
        reap(State.open(Path(home)), container_id)
    except PolytropoError as error:
        print(f"polytropo: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
