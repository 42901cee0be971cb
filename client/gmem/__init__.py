# SPDX-License-Identifier: Apache-2.0
"""gmem: one memory for the CPU and every attached device, at one address, moved to whoever touches it."""

from gmem._adopt import adopt
from gmem._advice import (
    ADVICE,
    DIRTY,
    PAGE_DTYPE,
    PINNED,
    READ_MOSTLY,
    STATES,
    acquire,
    advise,
    advise_async,
    discard,
    memcpy,
    memcpy_async,
    prefetch,
    prefetch_async,
    stats,
    where,
)  # fmt: skip
from gmem._buffer import Buffer, MemoryResource, alloc
from gmem._cuda import CudaContext, DeviceView
from gmem._device import Context, Device, device, devices
from gmem._errors import (
    Busy,
    ConnectionLost,
    ContextLost,
    Exists,
    GmemError,
    InvalidArgument,
    KernelError,
    KernelTimeout,
    LeaseLost,
    NotFound,
    NotReplicated,
    NotSupported,
    OutOfMemory,
    PermissionDenied,
    Poisoned,
    QuotaExceeded,
    Unreachable,
)  # fmt: skip
from gmem._fence import Fence
from gmem._file import flush, from_file, memmap
from gmem._launch import cfunc
from gmem._memory import array, empty, full, zeros
from gmem._pool import Pool, pool
from gmem._session import Session, connect, default

__all__ = [
    "ADVICE", "Buffer", "Busy", "ConnectionLost", "Context", "ContextLost", "CudaContext", "DIRTY", "Device",
    "DeviceView", "Exists", "Fence", "GmemError", "InvalidArgument", "KernelError", "KernelTimeout",
    "LeaseLost", "MemoryResource", "NotFound", "NotReplicated", "NotSupported", "OutOfMemory", "PAGE_DTYPE", "PINNED",
    "PermissionDenied", "Poisoned", "Pool", "QuotaExceeded", "READ_MOSTLY", "STATES", "Session", "Unreachable",
    "acquire", "adopt", "advise", "advise_async", "alloc", "array", "cfunc", "connect", "default", "device", "devices",
    "discard", "empty", "flush", "from_file", "full", "memcpy", "memcpy_async", "memmap", "pool", "prefetch",
    "prefetch_async", "stats", "where", "zeros",
]  # fmt: skip
