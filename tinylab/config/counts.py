"""Counts, sizes and durations as people write and read them: `200K`, `1.5B`, `3.2 MB`, `7 min` (powers of 1,000)."""

import re

from tinylab.errors import ConfigError

_SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_count(text: str | int, name: str = "count") -> int:
    """An integer from `200000`, `200_000`, `200K`, `1.5B` or `3T` (powers of 1,000).

    Raises ConfigError unless the value is a whole number of at least 0.
    """
    found = re.fullmatch(r"([0-9][0-9_]{0,30}(?:\.[0-9]{1,30})?)([KMBT]?)", str(text).strip().upper())
    if found:
        digits, suffix = found.groups()
        whole, _, decimals = digits.replace("_", "").partition(".")
        scaled = int(whole + decimals) * _SUFFIXES.get(suffix, 1)
        if scaled % 10 ** len(decimals) == 0:
            return scaled // 10 ** len(decimals)
    raise ConfigError(f"{name} must be a whole number such as 200000, 200K, 1.5B or 3T; found {text!r}")


def format_count(value: float) -> str:
    """`1.5M`, `300B`, `3T`: at most three digits."""
    for suffix, size in reversed(_SUFFIXES.items()):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def format_bytes(size: float) -> str:
    """`512 B`, `3.2 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def format_duration(seconds: float) -> str:
    """`42 s`, `7 min`, `3.5 h`, `12 days`."""
    for least, size, unit in ((172_800, 86_400, "days"), (5_400, 3_600, "h"), (90, 60, "min")):
        if seconds >= least:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.0f} s"
