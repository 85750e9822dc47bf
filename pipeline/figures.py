"""Numbers as people read them: sizes, times, shares, changes. Every table and page of a run uses these."""

from __future__ import annotations

import math

from dwindle.report import Metric

__all__ = ["UNKNOWN", "change", "count", "metric_text", "named", "number", "ratio", "seconds", "share", "size"]

UNKNOWN = "\N{EN DASH}"
"""What stands where a number was not measured."""


def count(value: int | None) -> str:
    """Return a count with a suffix once it is long.

    >>> count(950), count(4_123_456), count(2_730_000_000)
    ('950', '4.12M', '2.73B')
    """
    if value is None:
        return UNKNOWN
    for limit, suffix in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if suffix == 'k' else limit):.3g}{suffix}"
    return f"{value:,}"


def size(value: float | None) -> str:
    """Return bytes in the decimal unit that leaves up to three digits (GB = 10^9).

    >>> size(999), size(1_343_000_000), size(316_400), size(999_999)
    ('999 B', '1.34 GB', '316 kB', '1 MB')
    """
    if value is None:
        return UNKNOWN
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(value) >= 0.9995 * scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f} B"


def seconds(value: float | None) -> str:
    """Return a time in the unit people would say.

    >>> seconds(0.0123), seconds(4.56), seconds(184), seconds(7322)
    ('12.3 ms', '4.56 s', '3 min 4 s', '2 h 2 min')
    """
    if value is None:
        return UNKNOWN
    if value < 0.9995:
        return f"{value * 1e3:.3g} ms"
    if value < 99.95:
        return f"{value:.3g} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def share(value: float | None) -> str:
    """Return a share as a percentage.

    >>> share(0.9876)
    '98.8 %'
    """
    return UNKNOWN if value is None else f"{value:.1%}".replace("%", " %")


def number(value: float | None, digits: int = 4) -> str:
    """Return a number with so many significant digits, never in exponents unless it is tiny.

    >>> number(1.23456), number(0.00001234), number(31.0)
    ('1.235', '1.23e-05', '31')
    """
    if value is None:
        return UNKNOWN
    if value != 0 and abs(value) < 1e-4:
        return f"{value:.2e}"
    if abs(value) >= 10**digits:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def change(before: float | None, after: float | None, digits: int = 3) -> str:
    """Return a signed difference, or nothing when it cannot be told or is none.

    >>> change(1.5, 1.62), change(2.0, 2.0), change(None, 1.0)
    ('+0.12', '', '')
    """
    if before is None or after is None or before == after:
        return ""
    text = number(abs(after - before), digits)
    return f"{'+' if after > before else MINUS}{text}"


def ratio(before: float | None, after: float | None) -> str:
    """Return how many times smaller (or larger) a size became.

    >>> ratio(800, 100), ratio(100, 200), ratio(100, 100)
    ('8\N{MULTIPLICATION SIGN} smaller', '2\N{MULTIPLICATION SIGN} larger', '')
    """
    if not before or not after or math.isclose(before, after, rel_tol=0.005):
        return ""
    larger = after > before
    times = after / before if larger else before / after
    return f"{times:.3g}\N{MULTIPLICATION SIGN} {'larger' if larger else 'smaller'}"


def metric_text(metric: Metric, value: float | None) -> str:
    """Return a value of a target's metric in readable units."""
    if value is None:
        return UNKNOWN
    if metric.unit == "bytes":
        return size(value)
    if metric.unit == "seconds":
        return seconds(value)
    if metric.unit == "share":
        return share(value)
    return f"{number(value, 3)} {metric.unit}"


def metric_range(metric: Metric) -> str:
    """Return the range of a metric as text, or nothing."""
    if metric.low is None or metric.high is None or metric.low == metric.high:
        return ""
    low, high = metric_text(metric, metric.low), metric_text(metric, metric.high)
    return f"{low.removesuffix(f' {metric.unit}')} to {high}"


def named(name: str, value: float | None) -> str:
    """Return a number of a report in the unit that its name tells.

    >>> named("bytes", 5_000_000), named("seconds", 4.5), named("top1_agreement", 0.5), named("nats_per_token", 1.25)
    ('5 MB', '4.5 s', '50.0 %', '1.25')
    """
    if value is None:
        return UNKNOWN
    if name.endswith("bytes"):
        return size(value)
    if name.endswith("seconds"):
        return seconds(value)
    if name == "top1_agreement":
        return share(value)
    return count(int(value)) if name == "parameters" else number(value)


MINUS = "\N{MINUS SIGN}"
