"""Counts and durations as people write and read them."""

from __future__ import annotations

import pytest

from tinylab.config.counts import format_count, format_duration


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (999, "999"), (1000, "1K"), (999_999, "1M"), (1.5e9, "1.5B"), (3e12, "3T")]
)
def test_a_count_has_three_digits_and_a_suffix(value: float, text: str):
    assert format_count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (89, "89 s"), (90, "1.5 min"), (5_399, "90 min"), (12_600, "3.5 h"), (90 * 86_400, "90 days")],
)
def test_a_duration_has_the_largest_unit_that_people_would_choose(seconds: float, text: str):
    assert format_duration(seconds) == text
