"""The measured errors of the identities: every check goes through ``within``, which keeps the largest error seen."""

WORST: dict[int | str, tuple[float, float]] = {}  # identity -> (largest error, largest tolerance)
CONTROLS: dict[int | str, float] = {}  # identity -> the least distance of an object that must be caught


def within(identity: int | str, error: float, tolerance: float) -> None:
    """Assert an error and remember it."""
    before = WORST.get(identity, (0.0, 0.0))
    WORST[identity] = (max(error, before[0]), max(tolerance, before[1]))
    assert error <= tolerance, f"identity {identity}: {error} > {tolerance}"


def caught(identity: int | str, distance: float, least: float = 1e-3) -> None:
    """Assert that a wrong object is far from the truth, and remember how far."""
    CONTROLS[identity] = min(CONTROLS.get(identity, float("inf")), distance)
    assert distance > least, f"identity {identity}: the planted fault is only {distance} away"
