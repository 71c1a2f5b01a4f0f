"""`python -m tests.reference MOUNT PLAIN --seed N --steps N --actors N`: random operations compared."""

import argparse
from pathlib import Path

from tests.reference.comparison import compare

parser = argparse.ArgumentParser(prog="tests.reference", description=__doc__)
parser.add_argument("mount", type=Path)
parser.add_argument("plain", type=Path)
parser.add_argument("--seed", type=int, required=True)
parser.add_argument("--steps", type=int, default=1500)
parser.add_argument("--actors", type=int, default=1)
parser.add_argument("--variable", action="append", default=[], help="NAME=VALUE for half of the actors")
parser.add_argument("--closed", action="store_true", help="keep no file open between operations")
parser.add_argument("--named", action="store_true", help="close files before names may go")
arguments = parser.parse_args()
succeeded = compare(
    arguments.mount,
    arguments.plain,
    seed=arguments.seed,
    steps=arguments.steps,
    actors=arguments.actors,
    closed=arguments.closed,
    named=arguments.named,
    variables=dict(word.split("=", 1) for word in arguments.variable),
)
print(f"{succeeded} of {arguments.steps} operations succeeded, all alike")
