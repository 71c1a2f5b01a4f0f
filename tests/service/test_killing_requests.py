"""A request that workers die of is answered EIO in the end, and all others go on."""

import json
import subprocess

import pytest

from tests.conftest import Isolated
from tests.service.keepers import Keeper

ASKS = {
    "symlink": "os.symlink('target', 'link')",
    "statfs": "os.statvfs('.')",
}
PROGRAM = """
import errno, os
try:
    ASK
    raise SystemExit("it was done")
except OSError as error:
    print(errno.errorcode[error.errno], flush=True)
"""


@pytest.mark.parametrize("operation", sorted(ASKS))
def test_a_request_that_workers_die_of_is_given_up(isolated: Isolated, operation: str) -> None:
    keeper, mnt, data = Keeper(isolated), isolated.directory / "mnt", isolated.directory / "data"
    data.mkdir()
    mnt.mkdir()
    below = {"kind": "dir", "path": str(data), "coherence": "exclusive"}
    rules = [{"operation": operation, "kill": True}]
    stack = {"version": 1, "root": {"kind": "fault", "below": below, "rules": rules}}
    keeper.do("mount", stack=stack, mountpoint=str(mnt))
    program = isolated.command(
        "env", f"--chdir={mnt}", "python3", "-c", PROGRAM.replace("ASK", ASKS[operation])
    )
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as asking:
        # Others meanwhile, whose requests are sent to one worker after the other.
        for number in range(20):
            isolated.run(
                "sh", "-c", f"echo {number} >{mnt}/file{number} && cat {mnt}/file{number}", timeout_s=30
            )
        out, _ = asking.communicate(timeout=30)
    log = keeper.log.read_text()
    assert out == "EIO\n", log
    assert "since several workers died of it" in log
    assert len([line for line in log.splitlines() if " ended: signal: " in line]) == 3, log
    (told,) = keeper.do("stats")["mounts"]
    assert told["given_up"] == 1, json.dumps(told)
    assert isolated.run("cat", mnt / "file19").stdout == "19\n"
    keeper.do("unmount", mountpoint=str(mnt))
    keeper.close()
