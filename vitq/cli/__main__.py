"""`python -m vitq.cli`, for launchers that start modules (`accelerate launch -m vitq.cli train …`)."""

from __future__ import annotations

from vitq.cli import main

main()
