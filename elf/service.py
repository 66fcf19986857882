# SPDX-License-Identifier: GPL-3.0-only
"""The service manager: what sd_notify(3) tells systemd, in datagrams."""

from __future__ import annotations

import contextlib
import os
import socket


class ServiceManager:
    """The service manager that has started this process, if one has. The environment names its socket."""

    def __init__(self) -> None:
        path = os.environ.pop("NOTIFY_SOCKET", "")  # neither a command nor the exporter may have it
        self._address = "\0" + path[1:] if path.startswith("@") else path

    @property
    def is_there(self) -> bool:
        return bool(self._address)

    def tell(self, state: str) -> None:
        """Tell it a state: READY=1, WATCHDOG=1 or STOPPING=1. Never waits."""
        if self._address:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifier:
                notifier.setblocking(False)
                notifier.sendto(state.encode(), self._address)
