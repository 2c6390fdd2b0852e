"""Numbers as people read them, a dash if nothing was measured."""

from __future__ import annotations

MISSING = "-"


def number(value: float | None, digits: int) -> str:
    """``1,234.5`` with `digits` behind the point."""
    return MISSING if value is None else f"{value:,.{digits}f}"


def count(value: int | None) -> str:
    """``460,800``."""
    return MISSING if value is None else f"{value:,}"


def percent(share: float | None) -> str:
    """``37.5 %`` for 0.375."""
    return MISSING if share is None else f"{100 * share:.1f} %"


def seconds(value: float | None) -> str:
    """``41 s``, ``2 min 05 s``, ``3 h 20 min``."""
    if value is None:
        return MISSING
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
