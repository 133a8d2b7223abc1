"""Words for messages and pages."""

import re


def counted(number: int, noun: str) -> str:
    """A number with its noun: "1 run", "2 runs"."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def duration(seconds: float) -> str:
    """A time in the unit that reads best: "40 s", "12 min", "3.4 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def slug(text: str) -> str:
    """A text as part of a link or of a file's name: "Left organ (R)" is "left-organ-r"."""
    return re.sub(r"\W+", "-", text.lower()).strip("-")
