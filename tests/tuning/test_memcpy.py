"""The search for copies, its plan on disk, and copies from Python."""

import array
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from polytropo import _native
from polytropo.copy import memcpy
from polytropo.errors import PolytropoError
from polytropo.state import State
from polytropo.tuning import plans
from polytropo.tuning.choice import Compared
from polytropo.tuning.measure import LIBC, Machine, Samples, median_interval, ratio_interval
from polytropo.tuning.memcpy import by_weight, tune
from polytropo.tuning.search import decided, final_rounds, find
from polytropo.tuning.weights import gain, load, recorded, weights_of

POLYTROPO = str(Path(sys.executable).parent / "polytropo")


@pytest.fixture
def state(tmp_path: Path) -> State:
    return State.open(tmp_path / "home")


def command(state: State, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {"POLYTROPO_HOME": str(state.home), "LC_ALL": "C.UTF-8", "PATH": "/usr/bin:/bin"}
    return subprocess.run(
        [POLYTROPO, *words], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("situation", ["hot", "fresh", "handed", "relayed", "cold", "read"])
def test_memcpy_copies_what_it_is_given(situation: str) -> None:
    chance = random.Random(situation)
    for size in (0, 1, 63, 64, 1000, 4096, 100_000):
        source = chance.randbytes(size)
        destination = bytearray(size + 3)
        assert memcpy(destination, source, situation=situation) == size
        assert destination == source + bytes(3)


def test_memcpy_takes_any_buffer_in_one_piece() -> None:
    destination = array.array("d", [0.0] * 4)
    assert memcpy(destination, array.array("d", [1.5, 2.5])) == 16
    assert destination.tolist() == [1.5, 2.5, 0.0, 0.0]
    assert memcpy(memoryview(bytearray(8))[4:], b"abcd") == 4


def test_memcpy_refuses_what_it_cannot_do_rightly() -> None:
    room = bytearray(100)
    with pytest.raises(ValueError, match="do not fit"):
        memcpy(room, bytes(101))
    with pytest.raises(BufferError, match="read-only"):
        memcpy(bytes(100), room)
    with pytest.raises(BufferError, match="one piece"):
        memcpy(memoryview(room)[::2], b"x")
    with pytest.raises(ValueError, match="overlap"):
        memcpy(memoryview(room)[10:], memoryview(room)[:50])
    with pytest.raises(ValueError, match="lukewarm"):
        memcpy(room, b"x", situation="lukewarm")


def test_intervals_hold_the_median_and_shrink_with_more_values() -> None:
    few = median_interval([3.0, 1.0, 2.0])
    assert few == (2.0, 1.0, 3.0)
    many = median_interval([float(value) for value in range(101)])
    assert many.median == 50
    assert 38 <= many.low <= 42 and 58 <= many.high <= 62
    assert ratio_interval([1.0] * 20, [2.0] * 20) == (0.5, 0.5, 0.5)


def test_the_95_percent_interval_holds_the_true_median_that_often() -> None:
    chance = random.Random(1)
    for count in (15, 41):
        held = 0
        for _ in range(2000):
            found = median_interval([chance.expovariate(1) for _ in range(count)])
            held += found.low <= 0.693147 <= found.high
        assert held / 2000 >= 0.94


def test_a_search_tries_the_whole_space_and_finds_one_that_runs_here() -> None:
    machine = Machine()
    found = find(machine, "hot", 256, keep=False)
    assert found.cell.tried == len(_native.copy_space(False, 256)) > 100
    assert found.cell.variant in {*_native.copy_space(False, 256), _native.copy_kernel_method()}
    assert found.cell.by_libc[1] <= found.cell.by_libc[0] <= found.cell.by_libc[2]


def test_an_interrupted_search_goes_on_where_it_was(state: State) -> None:
    def interrupt(done: int, total: int | None, what: str) -> None:
        if "1024 B" in what:
            raise KeyboardInterrupt

    sizes = (64, 256, 1024)
    with pytest.raises(KeyboardInterrupt):
        tune(state, situations=["hot"], sizes_bytes=sizes, told=interrupt)
    begun = plans.read_journal(state)
    assert begun is not None
    assert [(cell.keep, cell.size_bytes) for cell in begun.cells] == [(False, 64), (False, 256)]
    ended, path = tune(state, situations=["hot"], sizes_bytes=sizes)
    # What had been found was not searched again, and all was looked at again in the end.
    assert [cell.tried for cell in ended.cells[:2]] == [cell.tried for cell in begun.cells]
    assert all(cell.looks > 0 for cell in ended.cells) and not any(cell.looks for cell in begun.cells)
    assert tune(state, situations=["hot"], sizes_bytes=sizes)[0].cells == ended.cells
    assert len(ended.cells) == 6
    assert path.read_text().startswith("polytropo copy plan 1\n")
    plan, reason = plans.load(state)
    assert reason is None
    for cell in ended.cells:
        assert plan.get(cell.keep, "hot", cell.size_bytes) == cell.variant


def test_damaged_foreign_and_stale_plans_are_ignored_with_a_sentence(state: State) -> None:
    default = _native.CopyPlan.default()
    assert plans.load(state)[1] is None, "no plan is no reason to complain"
    path = plans.save(state, default)
    good = path.read_text()
    vendor = _native.copy_processor()[0]
    wrong = {
        "damaged: line 5": good.replace("plain hot 64", "plain hot 63"),
        "another processor": good.replace(f"processor {vendor}", "processor Other"),
        "another version": good.replace("plan 1", "plan 9"),
        "not a plan": "\x00\x01",
        "stale": good.replace("microcode 0x", "microcode 0xf"),
        "damaged": good[: len(good) // 2],
    }
    for expected, text in wrong.items():
        path.write_text(text)
        plan, reason = plans.load(state)
        assert reason is not None and expected in reason and "polytropo tune memcpy" in reason
        assert plan.get(False, "hot", 4096) == default.get(False, "hot", 4096)
    path.write_bytes(b"\xff\xfe")
    assert "plain text" in str(plans.load(state)[1])


def test_variants_that_change_vector_registers_are_kept_out_where_they_must_not() -> None:
    with pytest.raises(ValueError, match="must be kept"):
        _native.CopyPlan.default().set(True, "hot", 64, "v16.b64")


def test_situations_that_need_another_cpu_are_refused_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    machine = Machine()
    assert machine.situations() == ("hot", "cold", "read")
    with pytest.raises(PolytropoError, match="second CPU"):
        machine.sample(["movsb"], "fresh", 64, rounds=1, sample_ns=1000)


def test_the_command_searches_shows_and_draws(state: State, tmp_path: Path) -> None:
    before = command(state, "tune", "show")
    assert before.returncode == 1 and "nothing was searched" in before.stderr
    searched = command(state, "tune", "memcpy", "--situation", "hot", "--size", "4KiB", "--json")
    assert searched.returncode == 0, searched.stderr
    cells = json.loads(searched.stdout)["cells"]
    assert [(cell["keep"], cell["size_bytes"]) for cell in cells] == [(False, 4096), (True, 4096)]
    shown = command(state, "tune", "show")
    assert cells[0]["variant"] in shown.stdout
    drawn = command(state, "tune", "show", "--picture", str(tmp_path / "gain.png"))
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "gain.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_says_what_it_does_not_take(state: State) -> None:
    wrong = command(state, "tune", "memcpy", "--size", "100")
    assert wrong.returncode != 0 and "powers of two" in wrong.stderr


def choice(
    samples: dict[str, list[float]],
    incumbent: str | None = None,
    conditions: list[str] | None = None,
    usual: tuple[str, ...] = ("movsb", "libc"),
) -> str:
    compared = Compared()
    count = len(next(iter(samples.values())))
    compared.add(list(samples), Samples(list(samples.values()), conditions or [""] * count))
    return compared.choose(incumbent, usual)


def test_the_choice_is_surely_faster_than_the_usual_ways_or_one_of_them() -> None:
    even = [1.0, 1.1] * 20
    samples = {"libc": even, "movsb": [2.0] * 40, "mine": [*even[1:], 1.0], "fast": [0.5] * 40}
    assert choice(samples) == "fast"
    assert choice(samples, "mine") == "fast"
    # No difference that is sure: the usual way stays, whoever was there before.
    del samples["fast"]
    assert choice(samples) == choice(samples, "mine") == choice(samples, "movsb") == "libc"
    samples |= {"fast": [0.5] * 40, "other": [0.51, 0.52] * 20}
    assert choice(samples, "other") == "fast"
    samples["other"] = [0.49, 0.51] * 20
    assert choice(samples, "other") == "other"


def test_the_choice_is_slower_under_no_condition() -> None:
    conditions = ["near", "far"] * 20
    samples = {"libc": [1.0, 6.0] * 20, "movsb": [1.1, 6.1] * 20, "past": [3.0, 2.0] * 20}
    assert choice(samples, "past", conditions) == "libc"
    assert choice(samples, "past", ["far"] * 40) == "libc"
    samples["both"] = [0.9, 5.0] * 20
    assert choice(samples, "past", conditions) == "both"
    # One that loses a little there, and gains much here, loses.
    samples["both"] = [1.03, 3.0] * 20
    assert choice(samples, None, conditions) == "libc"
    # Of the usual ways the one that is never far behind.
    samples = {"libc": [1.0, 1.5] * 20, "movsb": [1.1, 1.0] * 20}
    assert choice(samples, None, conditions) == "movsb"
    # Where each of these is behind the other, what is behind neither.
    samples = {"libc": [1.0, 2.0] * 20, "movsb": [2.0, 1.0] * 20, "even": [1.02, 1.02] * 20}
    assert choice(samples, None, conditions) == "even"
    # A condition that hardly occurred says nothing.
    samples = {"libc": [1.0] * 40, "movsb": [1.1] * 40, "mine": [2.0] * 2 + [0.5] * 38}
    assert choice(samples, None, ["far"] * 2 + ["near"] * 38) == "mine"


def test_what_stores_past_the_caches_is_taken_across_cores_only_where_it_was_seen_near() -> None:
    past = "v64.b64.nt.dst"

    def found(situation: str, conditions: list[str]) -> str:
        compared = Compared()
        times = [[1.0] * 40, [2.0] * 40, [2.0] * 40]
        compared.add([past, _native.copy_kernel_method(), LIBC], Samples(times, conditions))
        return decided(compared, situation, 4096, False, None, tried=1).variant

    assert found("handed", ["far"] * 40) != past
    assert found("handed", ["near", "far"] * 20) == past
    assert found("handed", ["near"] * 40) == past
    assert found("cold", [""] * 40) == past


def test_samples_of_several_times_are_joined_round_by_round() -> None:
    one = Samples([[1.0, 2.0], [3.0, 4.0]], ["near", "far"])
    both = Samples.joined([one, Samples([[5.0], [6.0]], ["near"])])
    assert both == ([[1.0, 2.0, 5.0], [3.0, 4.0, 6.0]], ["near", "far", "near"])
    # Few rounds of each tell something, if there is nothing better.
    assert both.parts() == {"far": [[2.0], [4.0]], "near": [[1.0, 5.0], [3.0, 6.0]]}


def test_rounds_tell_what_they_were_taken_under() -> None:
    machine = Machine()
    read = machine.sample(["libc", "movsb"], "read", 4096, rounds=6, sample_ns=1000)
    assert len(set(read.conditions)) == 3 and len(read.conditions) == 6
    if machine.other_cpu is not None:
        across = machine.sample(["libc"], "fresh", 4096, rounds=4, sample_ns=1000)
        assert len(across.conditions) == 4 and set(across.conditions) <= {"near", "far"}
    assert set(machine.sample(["libc"], "hot", 64, rounds=2, sample_ns=1000).conditions) == {""}


def test_what_is_copied_most_is_searched_first_and_with_the_most_care() -> None:
    weights = weights_of({"handed": {65536: 10, 32768: 2}, "hot": {4096: 7, 16: 1000}})
    assert sum(weights.values()) == pytest.approx(1)
    assert weights["handed", 65536] == pytest.approx(655360 / (655360 + 65536 + 28672))
    # 32 KiB is between two sizes of the search and counts for the smaller; 16 bytes are below all.
    assert weights.keys() == {("handed", 65536), ("handed", 16384), ("hot", 4096)}
    assert by_weight(("hot", "fresh", "handed"), weights) == ["handed", "hot", "fresh"]
    assert by_weight(("hot", "fresh"), None) == ["hot", "fresh"]
    assert final_rounds(4096, 0.5) > final_rounds(4096, None) > final_rounds(4096, 0.0)
    assert final_rounds(64 << 20, 0.5) == 16 > final_rounds(1 << 30, 0.5)


def test_the_gain_of_a_mixture_weighs_each_size() -> None:
    def cell(size_bytes: int, ns: float, libc_ns: float) -> plans.Cell:
        one = (1.0, 1.0, 1.0)
        return plans.Cell(
            situation="hot",
            size_bytes=size_bytes,
            keep=False,
            variant="movsb",
            ns=ns,
            libc_ns=libc_ns,
            kernel_ns=4 * ns,
            by_libc=one,
            by_kernel=one,
            tried=1,
            finalists=[],
        )

    cells = [cell(1024, 10, 20), cell(4096, 40, 40)]
    assert gain(cells, {("hot", 1024): 0.5, ("hot", 4096): 0.5}) == pytest.approx((1.5, 4))
    assert gain(cells, {("hot", 1024): 1.0}) == pytest.approx((2, 4))
    assert gain(cells, {("cold", 1024): 1.0}) is None


def test_weights_come_from_stats_or_from_counts(tmp_path: Path) -> None:
    path = tmp_path / "weights.json"
    tenants = [
        {"tenant": "a", "copies": {"hot": {"4096": 3}}},
        {"tenant": "b", "copies": {"hot": {"4096": 1}}},
    ]
    path.write_text(json.dumps(tenants))
    assert load(path) == {("hot", 4096): 1}
    path.write_text('{"fresh": {"65536": 2}}')
    assert load(path) == {("fresh", 65536): 1}
    wrong = {"{": "not JSON", "[]": "no copies", '{"warm": {"64": 1}}': "warm", '{"hot": 5}': "stats --json"}
    for text, why in wrong.items():
        path.write_text(text)
        with pytest.raises(PolytropoError, match=why):
            load(path)
    with pytest.raises(PolytropoError, match="cannot be read"):
        load(tmp_path / "none")
    assert sum(recorded().values()) == pytest.approx(1)
