"""What goes wrong with one deployment alone: the others are measured all the same."""

from __future__ import annotations

from vitq.core.errors import VitqError


class DeploymentError(VitqError):
    """A deployment cannot be made, loaded or run here; the message says why."""
