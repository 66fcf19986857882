# SPDX-License-Identifier: GPL-3.0-only
"""This machine's kernel, and what this process may do, as far as /proc, /sys and uname(2) tell."""

from __future__ import annotations

import contextlib
import enum
import os
import re

PAGE = os.sysconf("SC_PAGESIZE")
LOCKDOWN = "/sys/kernel/security/lockdown"  # kernel_lockdown(7)


class Capability(enum.IntEnum):
    """Numbers of capabilities, linux/capability.h."""

    DAC_OVERRIDE = 1
    DAC_READ_SEARCH = 2
    NET_ADMIN = 12
    SYS_PTRACE = 19
    SYS_ADMIN = 21
    PERFMON = 38
    BPF = 39


def version_numbers(text: str) -> tuple[int, int, int]:
    """Return the first three numbers of a version such as "6.18.44-amd64". Those that are missing are 0."""
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    first, second, third = (int(part or 0) for part in match.groups()) if match else (0, 0, 0)
    return first, second, third


def linux_version() -> tuple[int, int, int]:
    """Return the three numbers of the kernel's version."""
    return version_numbers(os.uname().release)


def is_kernel_memory_locked() -> bool:
    """Return whether programs may not read the kernel's memory, kernel_lockdown(7)."""
    with contextlib.suppress(OSError), open(LOCKDOWN, encoding="ascii") as file:
        return "[confidentiality]" in file.read()
    return False


def missing_capabilities(by_process: bool) -> list[str]:
    """Return the names of the capabilities that a run needs and this process has not.

    Instead of a needed capability, the process may have one that includes it.
    """
    needed = {
        "cap_net_admin": (Capability.NET_ADMIN,),
        "cap_bpf": (Capability.BPF, Capability.SYS_ADMIN),
        "cap_perfmon": (Capability.PERFMON, Capability.SYS_ADMIN),
    }
    if by_process:
        needed["cap_sys_ptrace"] = (Capability.SYS_PTRACE,)
        needed["cap_dac_read_search"] = (Capability.DAC_READ_SEARCH, Capability.DAC_OVERRIDE)
    effective = effective_capabilities()
    return [name for name, any_of in needed.items() if not any(effective >> number & 1 for number in any_of)]


def effective_capabilities() -> int:
    """Return the capabilities of this process: a bit for each, by its number."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        return next(int(line.split()[1], 16) for line in file if line.startswith("CapEff:"))


def has_other_clock() -> bool:
    """Return whether this is a time namespace that shifts CLOCK_MONOTONIC, time_namespaces(7)."""
    with contextlib.suppress(OSError), open("/proc/self/timens_offsets", encoding="ascii") as file:
        return any(line.split()[1:] != ["0", "0"] for line in file if line.startswith("monotonic"))
    return False
