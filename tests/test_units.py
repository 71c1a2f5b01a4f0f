"""Sizes, CPU lists and names: what is accepted, what is refused and how."""

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polytropo import compose, names, units
from polytropo.errors import PolytropoError
from polytropo.names import check_name, unknown
from polytropo.units import format_cpus, format_size, parse_cpus, parse_size


@pytest.mark.parametrize("module", [compose, names, units])
def test_examples_in_docstrings(module: object) -> None:
    result = doctest.testmod(module)  # type: ignore[arg-type]
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("4096", 4096),
        ("2GiB", 2 << 30),
        ("2g", 2 << 30),
        ("512m", 512 << 20),
        ("1.5 KiB", 1536),
        ("10MB", 10_000_000),
        ("1t", 1 << 40),
        ("7b", 7),
        ("1Ki", 1024),
    ],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1", "1e9", "2XiB", "1 2", "٣GiB", "9" * 30, "2PB2", "1000000P"]
)
def test_wrong_sizes_are_refused(text: str) -> None:
    with pytest.raises(PolytropoError, match=r"is not a size|is too large"):
        parse_size(text)


@given(st.integers(0, 2**60))
def test_printed_sizes_read_back_within_their_digits(size_bytes: int) -> None:
    assert abs(parse_size(format_size(size_bytes)) - size_bytes) <= size_bytes * 0.006 + 0.5


@given(st.sets(st.integers(0, 8191), min_size=1))
def test_cpu_lists_round_trip(cpus: set[int]) -> None:
    assert parse_cpus(format_cpus(cpus)) == sorted(cpus)


@pytest.mark.parametrize("text", ["", ",", "1-", "-1", "2-1", "a", "0,", "0-99999", "٣"])
def test_wrong_cpu_lists_are_refused(text: str) -> None:
    with pytest.raises(PolytropoError, match="not a list of CPUs"):
        parse_cpus(text)


@pytest.mark.parametrize("name", ["a", "0", "shop-1", "A_b.c", "x" * 64])
def test_names(name: str) -> None:
    assert check_name("tenant", name) == name


@pytest.mark.parametrize("name", ["", ".", "..", "-a", "_a", "a/b", "a b", "a\n", "ä", "x" * 65, "\x1b[31m"])
def test_wrong_names_are_refused_in_a_printable_sentence(name: str) -> None:
    with pytest.raises(PolytropoError, match="cannot name a volume") as refusal:
        check_name("volume", name)
    assert str(refusal.value).isprintable()


def test_unknown_names_say_what_there_is() -> None:
    assert str(unknown("tenant", "a", ["b", "c"], "")) == 'there is no tenant "a"; there are: b, c'
    assert "make one" in str(unknown("tenant", "a", [], "make one"))
