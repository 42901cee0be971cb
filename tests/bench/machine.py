# SPDX-License-Identifier: Apache-2.0
"""What the figures were measured on."""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import struct
from pathlib import Path
from typing import Any

USERFAULTFD_IOC_NEW = 0xAA00
SYS_USERFAULTFD = 282 if platform.machine() == "aarch64" else 323
USER_MODE_ONLY = 1
UFFDIO_API = 0xC018AA3F
UFFD_API = 0xAA
UFFD_FEATURES = (
    "pagefault_flag_wp",
    "event_fork",
    "event_remap",
    "event_remove",
    "missing_hugetlbfs",
    "missing_shmem",
    "event_unmap",
    "sigbus",
    "thread_id",
    "minor_hugetlbfs",
    "minor_shmem",
    "exact_address",
    "wp_hugetlbfs_shmem",
    "wp_unpopulated",
    "poison",
    "wp_async",
    "move",
)


def _new_uffd() -> int:
    """From /dev/userfaultfd; where that can't be opened, one for faults of user code only, as any process may have."""
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    try:
        device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        fd = ctypes.CDLL(None, use_errno=True).syscall(SYS_USERFAULTFD, flags | USER_MODE_ONLY)
        if fd < 0:
            raise OSError(ctypes.get_errno(), "userfaultfd") from None
        return fd
    try:
        return fcntl.ioctl(device, USERFAULTFD_IOC_NEW, flags)
    finally:
        os.close(device)


def uffd_features() -> list[str]:
    """Names of the userfaultfd features the kernel has; empty if it has no userfaultfd."""
    try:
        fd = _new_uffd()
        try:
            answer = fcntl.ioctl(fd, UFFDIO_API, struct.pack("QQQ", UFFD_API, 0, 0))
        finally:
            os.close(fd)
    except OSError:
        return []
    features = struct.unpack("QQQ", answer)[1]
    return [name for bit, name in enumerate(UFFD_FEATURES) if features >> bit & 1]


def _numbers(path: str) -> dict[str, int]:
    lines = (line.split(":") for line in Path(path).read_text().splitlines() if ":" in line)
    return {key.strip(): int(value.split()[0]) for key, value in lines if value.split()[0].isdigit()}


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _setting(name: str) -> int:
    return int(Path("/proc/sys/vm", name).read_text())


def facts() -> dict[str, Any]:
    memory = _numbers("/proc/meminfo")
    return {
        "kernel": platform.release(),
        "cpus": len(os.sched_getaffinity(0)),
        "cpu_model": _cpu_model(),
        "memory_bytes": memory["MemTotal"] * 1024,
        "memory_available_bytes": memory["MemAvailable"] * 1024,
        "huge_page_bytes": memory.get("Hugepagesize", 0) * 1024,
        "huge_pages": memory.get("HugePages_Total", 0),
        "huge_pages_overcommit": _setting("nr_overcommit_hugepages"),
        "load_average": os.getloadavg()[0],
        "uffd_features": uffd_features(),
    }
