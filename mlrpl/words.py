"""Words for messages and pages."""


def counted(number: int, noun: str) -> str:
    """A number with its noun: "1 run", "2 runs"."""
    return f"{number} {noun}" + ("" if number == 1 else "s")
