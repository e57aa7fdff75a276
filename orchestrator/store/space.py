"""Room on the disk, reserved before the work that needs it begins."""

from __future__ import annotations


class Reservation:
    """Room that was set aside.

    Attributes:
        nbytes: How much is still set aside.
    """

    nbytes: int

    def spend(self, nbytes: int) -> None:
        """Say that so much was written: the disk counts it now, the reservation no longer."""
        raise NotImplementedError
