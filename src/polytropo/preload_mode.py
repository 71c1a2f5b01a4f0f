"""Whether programs load the preload library: the one place that knows what is done where nobody says."""

import os
from typing import Literal, cast, get_args

from polytropo.errors import PolytropoError

Mode = Literal["off", "auto", "on"]
"""Without it; with it, but by FUSE until shared memory would have paid (`on` alone); with it, and soon."""

VARIABLE = "POLYTROPO_PRELOAD"
"""What a user wants where no option says it; what the library in a program goes by."""

DEFAULT: Mode = "off"
"""It costs every program some 0.1 ms at its start, and pays for those that ask and read much again."""


def mode_of(asked: bool | None) -> Mode:
    """What --preload (True), --no-preload (False) or neither means. Raises PolytropoError."""
    if asked is not None:
        return "on" if asked else "off"
    wanted = os.environ.get(VARIABLE, DEFAULT)
    for mode in get_args(Mode):
        if mode == wanted:
            return cast(Mode, mode)
    raise PolytropoError(f'{VARIABLE}={wanted} is not understood; set it to "off", "auto" or "on"')
