"""Composition: any stack survives its document, and both readers of documents agree on hostile ones."""

import copy
import json
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from polytropo.compose import (
    DEPTH_MAX,
    FAULT_ERRNOS,
    FAULT_OPERATIONS,
    LOWERS_MAX,
    Dir,
    Fault,
    FaultRule,
    Image,
    Layer,
    Stack,
    StackError,
    Union,
    Volume,
)
from polytropo.errors import PolytropoError
from polytropo.service import service_binary
from polytropo.state import State
from polytropo.tenants import create_tenant
from polytropo.volumes import create_volume, volume_data

_U64 = st.one_of(st.integers(0, 3), st.integers(0, 2**64 - 1))
_PATHS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).map(lambda text: "/" + text)
_DIRS = st.builds(
    Dir,
    _PATHS,
    read_only=st.booleans(),
    coherence=st.sampled_from(["immutable", "exclusive", "shared"]),
    ownership=st.sampled_from(["native", "xattr"]),
)
_RULES = st.builds(
    FaultRule,
    operation=st.sampled_from(FAULT_OPERATIONS),
    after=_U64,
    times=_U64,
    probability=st.floats(0, 1),
    errno=st.sampled_from(sorted(FAULT_ERRNOS)),
    delay_ms=_U64,
    short_bytes=st.none() | st.integers(1, 2**64 - 1),
)
_LAYERS: st.SearchStrategy[Layer] = st.recursive(
    _DIRS,
    lambda below: st.one_of(
        st.builds(Union, st.lists(below, min_size=1, max_size=3), upper=st.none() | below),
        st.builds(Fault, below, st.lists(_RULES, max_size=2), seed=_U64),
    ),
    max_leaves=8,
)


@given(_LAYERS)
def test_any_stack_survives_its_document(root: Layer) -> None:
    stack = Stack(root)
    stack.check()
    assert Stack.from_json(stack.to_json()) == stack
    assert Stack.from_json(json.dumps(stack.to_document()).encode()) == stack


def test_values_are_hashable_and_take_path_objects() -> None:
    stack = Stack(Union([Dir(Path("/a")), Dir("/b")], upper=Dir(Path("/c"))))
    assert hash(stack) == hash(Stack(Union((Dir("/a"), Dir("/b")), upper=Dir("/c"))))


@pytest.mark.parametrize(
    ("root", "place"),
    [
        (Dir("a"), "root.path"),
        (Dir("/\udcff"), "root.path"),
        (Union([]), "root.lowers"),
        (Union([Dir("/a")] * (LOWERS_MAX + 1)), "root.lowers"),
        (Union([Dir("/a"), Union([Dir("/b")], upper=Dir("c"))]), "root.lowers[1].upper.path"),
        (Union([3]), "root.lowers[0]"),  # type: ignore[list-item]
        (Dir("/a", coherence="sometimes"), "root.coherence"),  # type: ignore[arg-type]
        (Fault(Dir("/a"), [FaultRule(operation="read")]), "root.rules[0]"),
        (Fault(Dir("/a"), [FaultRule(operation="read", errno="EIO", after=-1)]), "root.rules[0].after"),
        (
            Fault(Dir("/a"), [FaultRule(operation="read", errno="EIO", probability=2)]),
            "root.rules[0].probability",
        ),
        (Fault(Dir("/a"), [FaultRule(operation="red", errno="EIO")]), "root.rules[0].operation"),
        (Fault(Dir("/a"), [FaultRule(operation="read", errno="EWHAT")]), "root.rules[0].errno"),
        (Fault(Dir("/a"), [], seed=2**64), "root.seed"),
        (Image(""), "root.name"),
    ],
)
def test_wrong_stacks_name_the_place(root: Layer, place: str) -> None:
    with pytest.raises(StackError) as caught:
        Stack(root).check()
    assert caught.value.place == place, caught.value


def test_depth_is_bounded() -> None:
    root: Layer = Dir("/a")
    for _ in range(DEPTH_MAX - 1):
        root = Union([root])
    Stack(root).check()
    with pytest.raises(StackError, match="nested deeper than"):
        Stack(Union([root])).check()
    endless = '{"kind":"union","lowers":[' * 100_000
    with pytest.raises(StackError):
        Stack.from_json('{"version":1,"root":' + endless)


def test_names_are_resolved(tmp_path: Path) -> None:
    state = State.open(tmp_path / "home")
    create_tenant(state, "shop")
    create_volume(state, "shop", "data")
    stack = Stack(Union([Dir("/base")], upper=Volume("data")))
    document = stack.to_document(state, "shop")
    assert document["root"]["upper"] == {
        "kind": "dir",
        "path": str(volume_data(state, "shop", "data")),
        "coherence": "exclusive",
    }
    with pytest.raises(StackError, match=r"root\.upper: there is no volume of the tenant default"):
        stack.to_document(state)
    with pytest.raises(PolytropoError, match=r'^there is no volume of the tenant shop named "x"'):
        Stack(Volume("x")).to_document(state, "shop")
    with pytest.raises(StackError, match="names an image or volume"):
        Stack.from_json('{"version":1,"root":{"kind":"volume","name":"data"}}')


# What a hostile or clumsy hand puts into a document.
_ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1.0, 1e400, 2**53, 2**64 - 1, 2**64, -(2**63), "", "/", "a",
    "/a\x00b", "é", "EIO", "dir", "union", "fault", "immutable", "native", [], [[]], {}, {"kind": "dir"},
    {"immutable": None}, {"native": None}, {"kind": "dir", "path": "/x"},
    {"kind": "union", "lowers": [{"kind": "dir", "path": "/x"}]},
]  # fmt: skip
_KEYS = ["kind", "path", "read_only", "coherence", "ownership", "lowers", "upper", "below", "rules", "seed",
         "operation", "after", "times", "probability", "errno", "delay_ms", "short_bytes", "version", "root",
         "name", "passthrough", "passthrough_min_bytes", "write_back",
         "channel_writes", ""]  # fmt: skip


def mutated(dice: random.Random, document: Any) -> Any:
    """The document with one to three odd changes anywhere in it."""
    value = json.loads(json.dumps(document))
    for _ in range(dice.randint(1, 3)):
        holder, key = dice.choice(list(_places(value)))
        match dice.randrange(5):
            case 0 if isinstance(holder, dict):
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[dice.choice(_KEYS)] = copy.deepcopy(holder[key])
            case 2 if isinstance(holder, list):
                holder.append(copy.deepcopy(holder[key]))
            case 3 if isinstance(holder, dict):
                holder[dice.choice(_KEYS)] = copy.deepcopy(dice.choice(_ODD))
            case _:
                holder[key] = copy.deepcopy(dice.choice(_ODD))
        if not list(_places(value)):
            break
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, below in list(entries):
        yield value, key
        yield from _places(below)


def mangled(dice: random.Random, text: str) -> bytes:
    """The text with some bytes changed, doubled or cut."""
    content = bytearray(text.encode())
    for _ in range(dice.randint(1, 3)):
        at = dice.randrange(len(content) + 1)
        match dice.randrange(3):
            case 0:
                content[at:at] = dice.choice(
                    [b"{", b"}", b",", b'"', b"\\", b"\xff", b"\x00", b" ", b"1", b"\\ud800", b"-"]
                )
            case 1:
                del content[at : at + dice.randint(1, 4)]
            case _:
                content[at:at] = content[at : at + 12]
    return bytes(content)


def python_accepts(document: bytes) -> bool:
    try:
        Stack.from_json(document)
    except StackError:
        return False
    return True


def service_accepts(document: bytes) -> tuple[bool, str]:
    done = subprocess.run(
        [service_binary(), "check-stack"], input=document, capture_output=True, timeout=60, check=False
    )
    assert done.returncode in (0, 1), done
    return done.returncode == 0, done.stderr.decode(errors="replace")


def check_agreement(root: Layer, seed: int, bytewise: bool) -> None:
    """What Python lets pass, the service takes; what the service takes, Python lets pass."""
    dice = random.Random(seed)
    document = Stack(root).to_document()
    content = (
        mangled(dice, json.dumps(document)) if bytewise else json.dumps(mutated(dice, document)).encode()
    )
    accepted, told = service_accepts(content)
    assert python_accepts(content) == accepted, (content, told)
    assert accepted or (told.count("\n") == 1 and "stack document: " in told), told


_HOSTILE = given(_LAYERS, st.integers(0, 2**32), st.booleans())


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@_HOSTILE
@example(Dir("/a"), 0, False)
def test_both_readers_agree_on_hostile_documents(root: Layer, seed: int, bytewise: bool) -> None:
    check_agreement(root, seed, bytewise)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@settings(deadline=None, max_examples=20_000, suppress_health_check=[HealthCheck.too_slow])
@_HOSTILE
def test_both_readers_agree_for_long(root: Layer, seed: int, bytewise: bool) -> None:
    check_agreement(root, seed, bytewise)


@settings(deadline=None, max_examples=50)
@given(_LAYERS)
def test_the_service_takes_every_stack_that_python_writes(root: Layer) -> None:
    accepted, told = service_accepts(Stack(root).to_json().encode())
    assert accepted, told
