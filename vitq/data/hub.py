"""Downloads that fail at once where there is no network, and say what to do instead."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies

from vitq.core.errors import InputError

CONNECT_SECONDS = 3.0


def _reachable(host: str, port: int) -> bool:
    """Whether a connection opens within CONNECT_SECONDS, the name look-up included."""
    import socket

    answers: list[bool] = []

    def attempt() -> None:
        try:
            socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
            answers.append(True)
        except OSError:
            pass

    # A name look-up has no timeout of its own, so it waits in a thread that may be left behind.
    worker = threading.Thread(target=attempt, daemon=True)
    worker.start()
    worker.join(CONNECT_SECONDS)
    return bool(answers)


@contextmanager
def fail_fast() -> Iterator[None]:
    """Inside, the Hugging Face hub answers from its cache only, if it cannot be reached.

    Its client otherwise retries for up to a minute before it gives up. Behind a proxy nothing is probed.
    """
    try:
        from huggingface_hub import constants
    except ImportError:
        yield
        return
    address = urlsplit(constants.ENDPOINT)
    known_offline = bool(constants.HF_HUB_OFFLINE)
    port = address.port or (80 if address.scheme == "http" else 443)
    probe = not known_offline and not getproxies() and address.hostname is not None
    if probe and not _reachable(str(address.hostname), port):
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = known_offline


def not_fetched(spec: str, what: str, reason: BaseException) -> InputError:
    """The error for weights or a configuration that could not be downloaded."""
    return InputError(
        f"the {what} of {spec!r} could not be fetched ({type(reason).__name__}; is there a network?). "
        "Give a local weight file with --checkpoint FILE (checkpoint=...), "
        "or pass pretrained=False for random weights."
    )
