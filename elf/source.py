# SPDX-License-Identifier: GPL-3.0-only
"""What BCC compiles: elfprobe.c with the hooks file, and the few kernel headers that BCC includes."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from typing import Iterator

from elf.machine import PAGE, linux_version
from elf.usage import FOLDER, Failure

C_FILE = os.path.join(FOLDER, "elfprobe.c")
HOOKS = {
    **{
        f"elf_v{version}_{protocol}_beforesend": "static inline int %s(struct __sk_buff *ctx) { return 0; }"
        for version in (4, 6)
        for protocol in ("icmp", "tcp", "udp")
    },
    **{f"elf_v{version}_afterrecv": "static inline void %s(struct xdp_md *ctx) { }" for version in (4, 6)},
}

# The few headers that BCC's own prelude includes; elfprobe.c itself includes none.
KERNEL_TYPES = """\
typedef signed char __s8; typedef unsigned char __u8; typedef short __s16; typedef unsigned short __u16;
typedef int __s32; typedef unsigned int __u32; typedef long long __s64; typedef unsigned long long __u64;
typedef __s8 s8; typedef __u8 u8; typedef __s16 s16; typedef __u16 u16;
typedef __s32 s32; typedef __u32 u32; typedef __s64 s64; typedef __u64 u64;
typedef __u16 __be16; typedef __u32 __be32; typedef __u64 __be64; typedef __u16 __sum16; typedef __u32 __wsum;
typedef __u64 __aligned_u64 __attribute__((aligned(8)));
typedef _Bool bool; typedef unsigned long size_t; typedef unsigned long uintptr_t;
"""


@contextlib.contextmanager
def kernel_headers() -> Iterator[None]:
    """Give BCC a folder with the few kernel headers that it needs, so that none need be installed.

    If the user names a folder in BCC_KERNEL_SOURCE, BCC uses that one.
    """
    if "BCC_KERNEL_SOURCE" in os.environ:
        yield
        return
    numbers = ",".join(map(str, linux_version()))
    files = {
        "linux/kconfig.h": "#define CONFIG_BPF_SYSCALL 1\n",
        "linux/types.h": KERNEL_TYPES,
        "linux/version.h": "#define KERNEL_VERSION(a, b, c) "
        "(((a) << 16) + ((b) << 8) + ((c) > 255 ? 255 : (c)))\n"
        f"#define LINUX_VERSION_CODE KERNEL_VERSION({numbers})\n",
        "asm/page.h": f"#define PAGE_SIZE {PAGE}\n",
        "linux/bpf_common.h": "",
        "linux/log2.h": "",
        "uapi/linux/bpf.h": "",
        "uapi/linux/if_packet.h": "",
    }
    with tempfile.TemporaryDirectory(prefix="elfprobe-") as folder:
        for name, text in files.items():
            path = os.path.join(folder, "include", name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "w", encoding="ascii") as file:
                file.write(text)
        os.environ["BCC_KERNEL_SOURCE"] = folder
        try:
            yield
        finally:
            del os.environ["BCC_KERNEL_SOURCE"]


def read_source(path: str, what: str) -> str:
    """Return the text of a source file. Raises Failure, in which what names the file's kind."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as err:
        reason = err.strerror if isinstance(err, OSError) else "not a text file"
        raise Failure(f"{what} '{path}': {reason}") from err


def program_text(hooks_file: str) -> str:
    """Return elfprobe.c with the hooks file in the place of its #include. Raises Failure.

    BCC knows the methods of maps only in the main buffer, so an #include would not do. #line makes compiler
    messages name the right file and line. A hook that the hooks file does not define does nothing.
    """
    program = read_source(C_FILE, "program")
    hooks = read_source(hooks_file, "argument -H/--hooks:")
    code = re.sub(r"/\*.*?\*/|//[^\n]*", " ", hooks, flags=re.DOTALL)
    absent = "\n".join(text % name for name, text in HOOKS.items() if not re.search(rf"\b{name}\b", code))
    before, after = program.split('#include "elfhooks.c"\n')
    pieces = (
        (f'#line 1 "{C_FILE}"', before),
        (f'#line 1 "{hooks_file}"', hooks),
        ('#line 1 "absent hooks"', absent),
        (f'#line {before.count(chr(10)) + 2} "{C_FILE}"', after),
    )
    return "\n".join(line for piece in pieces for line in piece)
