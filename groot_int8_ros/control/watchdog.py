"""Silence that has lasted too long.

Owns: `Watchdog`. Must not import ROS. It lives on the steady clock: a jump of the wall clock must
neither fire it nor feed it.
"""

from __future__ import annotations

from groot_int8_ros.control.types import NANOSECONDS


class Watchdog:
    """Tells when something was last seen, and whether that is too long ago.

    Args:
        timeout_s: Longest silence, seconds.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_ns = round(timeout_s * NANOSECONDS)
        self._fed_ns: int | None = None

    @property
    def timeout_s(self) -> float:
        """Longest silence, seconds."""
        return self._timeout_ns / NANOSECONDS

    @timeout_s.setter
    def timeout_s(self, timeout_s: float) -> None:
        self._timeout_ns = round(timeout_s * NANOSECONDS)

    def feed(self, steady_ns: int) -> None:
        """Note that it was seen."""
        self._fed_ns = steady_ns

    def reset(self) -> None:
        """Forget that it was ever seen."""
        self._fed_ns = None

    def silence_s(self, steady_ns: int) -> float | None:
        """Return the seconds since it was last seen, or None if it never was."""
        return None if self._fed_ns is None else (steady_ns - self._fed_ns) / NANOSECONDS

    def expired(self, steady_ns: int) -> bool:
        """Return whether it was never seen or not for too long."""
        return self._fed_ns is None or steady_ns - self._fed_ns > self._timeout_ns
