"""Whether programs load the preload library: the one place that knows what is done where nobody says."""

import os
from typing import Literal, cast, get_args

from polytropo.errors import PolytropoError

Mode = Literal["off", "auto", "on"]
"""Without it; with it as pays where it is used (see `DEFAULT`); with it, and soon."""

VARIABLE = "POLYTROPO_PRELOAD"
"""What a user wants where no option says it; what the library in a program goes by."""

DEFAULT: Mode = "auto"
"""Programs lose some 0.1 ms at each start and nothing else; those that read and ask much again gain a factor
of 2 to 4. With `on` roots of containers are also written through shared memory, for which the service has to
be asked for each open by FUSE: that pays for programs that write or make much, and costs all others."""


def mode_of(asked: bool | None) -> Mode:
    """What --preload (True), --no-preload (False) or neither means. Raises PolytropoError."""
    if asked is not None:
        return "on" if asked else "off"
    wanted = os.environ.get(VARIABLE, DEFAULT)
    for mode in get_args(Mode):
        if mode == wanted:
            return cast(Mode, mode)
    raise PolytropoError(f'{VARIABLE}={wanted} is not understood; set it to "off", "auto" or "on"')
