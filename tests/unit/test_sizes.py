# SPDX-License-Identifier: Apache-2.0
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmemd.sizes import format_size, parse_size


@pytest.mark.parametrize(
    "text, value",
    [
        ("0", 0), (4096, 4096), ("4096", 4096), ("48M", 48 << 20), ("48m", 48 << 20), ("2G", 2 << 30),
        ("1.5K", 1536), ("1KiB", 1024), ("1KB", 1024), ("3T", 3 << 40), ("0x1000", 4096), ("1_000", 1000),
        ("0.5P", 1 << 49), (" 7B ", 7), ("9223372036854775807", (1 << 63) - 1),
    ],
)  # fmt: skip
def test_parse(text, value):
    assert parse_size(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "M",
        "-1",
        "-1M",
        "1X",
        "1.M",
        ".5M",
        "1MM",
        "nan",
        "inf",
        "1e9",
        True,
        -5,
        1 << 63,
        "8388608T",
        "9" * 70,
        "9" * 5000,
    ],
)
def test_refuse(text):
    with pytest.raises(ValueError, match="size|range"):
        parse_size(text)


@given(st.integers(0, (1 << 63) - 1))
def test_plain_numbers_stay(value):
    assert parse_size(str(value)) == parse_size(value) == value


@given(st.text(max_size=30))
def test_any_text_gives_a_size_or_a_value_error(text):
    try:
        assert 0 <= parse_size(text) < 1 << 63
    except ValueError:
        pass


@pytest.mark.parametrize(
    "value, text",
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (48 << 20, "48.0 MiB"), ((1 << 20) - 1, "1.0 MiB"),
     (10 << 40, "10.0 TiB"), ((1 << 63) - 1, "8192.0 PiB")],
)  # fmt: skip
def test_format(value, text):
    assert format_size(value) == text
