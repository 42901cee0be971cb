# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, binding=False
"""Drivers written in Python behind the ops table of gmem/driver.h; gmemd/drivers/base.py tells what they look like.

The core calls from its own threads: each op takes the GIL, lends memory as memoryviews for the length of the call, and
turns exceptions into -errno.
"""

import errno

import structlog

from cpython.buffer cimport PyBuffer_FillInfo
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memset, strncpy

from gmemd.caps import cap_mask, page_mask

log = structlog.get_logger("gmemd.driver")

_OPTIONAL_OPS = (
    "health", "copy", "fill", "fence_wait", "invalidate", "peer_va_alloc_fixed", "peer_va_free", "peer_map",
    "peer_unmap", "peer_free", "peer_hmemcpy", "peer_map_batch", "peer_unmap_batch", "peer_usage", "pmap_create", "pmap_enter", "pmap_release", "pmap_protect",
    "tlb_invl", "tlb_invl_coalesced",
)

cdef object _probing = None


cdef object probing(object driver):
    """Whose probe comes next; None when it is over."""
    global _probing
    _probing = driver


cdef struct py_device:
    PyObject *driver
    char error[160]


cdef struct py_pmap:
    py_device *device
    PyObject *pmap


cdef int _failed(py_device *device, str op, object error) noexcept:
    """What the core is told, and the log; the text stays for last_error."""
    cdef bytes text = f"{type(error).__name__}: {error}".encode("utf-8", "replace")[:159]
    strncpy(device.error, text, 159)
    log.error("driver failed", driver=type(<object>device.driver).__name__, op=op, error=text.decode("utf-8", "replace"))
    if isinstance(error, OSError) and error.errno:
        return -abs(error.errno)
    return -errno.ENOMEM if isinstance(error, MemoryError) else -errno.EIO


cdef object _call(py_device *device, str op, tuple args):
    return getattr(<object>device.driver, op)(*args)


cdef int _plain(py_device *device, str op, tuple args) noexcept:
    try:
        _call(device, op, args)
        return 0
    except BaseException as error:
        return _failed(device, op, error)


cdef class _Lent:
    """Memory of the core's for the length of one call, and who still looks at it."""

    cdef void *memory
    cdef Py_ssize_t size
    cdef bint readonly
    cdef int lookers

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        if PyBuffer_FillInfo(buffer, self, self.memory, self.size, self.readonly, flags) == 0:
            self.lookers += 1

    def __releasebuffer__(self, Py_buffer *buffer):
        self.lookers -= 1


cdef object _lend(const void *memory, size_t size, bint readonly):
    cdef _Lent lent = _Lent()
    lent.memory = <void *>memory
    lent.size = size
    lent.readonly = readonly
    return memoryview(lent)


cdef object _with_views(py_device *device, str op, list views, tuple args):
    """Calls op and takes the memory back: BufferError if the driver kept a way to it."""
    cdef list lent = [view.obj for view in views]
    try:
        return _call(device, op, args)
    finally:
        for view in views:
            view.release()
        if any([(<_Lent>one).lookers for one in lent]):
            raise BufferError(f"{op} kept a reference to memory that was lent to it")


cdef int _py_probe(const gmem_driver_config *config, gmem_device **ret) noexcept with gil:
    cdef py_device *device = <py_device *>calloc(1, sizeof(py_device))
    cdef bytes text
    driver = _probing
    if device is NULL:
        return -errno.ENOMEM
    try:
        options = {config.keys[i].decode(): config.values[i].decode() for i in range(config.count)}
        driver.probe(config.name.decode(), options)
    except BaseException as error:
        free(device)
        text = (str(error) or type(error).__name__).encode("utf-8", "replace")[:159]
        strncpy(config.message, text, 159)
        if isinstance(error, OSError) and error.errno:
            return -abs(error.errno)
        return -errno.EINVAL if isinstance(error, (ValueError, TypeError, KeyError)) else -errno.EIO
    Py_INCREF(driver)
    device.driver = <PyObject *>driver
    ret[0] = <gmem_device *>device
    return 0


cdef void _py_remove(gmem_device *handle) noexcept with gil:
    cdef py_device *device = <py_device *>handle
    if hasattr(<object>device.driver, "remove"):
        _plain(device, "remove", ())
    Py_DECREF(<object>device.driver)
    free(device)


cdef int _py_info(gmem_device *handle, gmem_device_info *ret) noexcept with gil:
    cdef py_device *device = <py_device *>handle
    cdef gmem_device_info made
    try:
        info = _call(device, "info", ())
        memset(&made, 0, sizeof(made))
        made.capacity_bytes = info.capacity_bytes
        made.page_bytes_mask = page_mask(info.page_bytes)
        made.caps = cap_mask(info.caps) | <uint32_t>GMEM_CAP_SLOW
        made.bandwidth_bytes_per_s = info.bandwidth_bytes_per_s
        made.latency_ns = info.latency_ns
        made.assured_bytes = info.assured_bytes
        ret[0] = made
        return 0
    except BaseException as error:
        return _failed(device, "info", error)


cdef int _py_health(gmem_device *handle) noexcept with gil:
    return _plain(<py_device *>handle, "health", ())


cdef const char *_py_last_error(gmem_device *handle) noexcept with gil:
    cdef py_device *device = <py_device *>handle
    cdef bytes text
    try:
        if hasattr(<object>device.driver, "last_error"):
            text = str(_call(device, "last_error", ())).encode("utf-8", "replace")[:159]
            strncpy(device.error, text, 159)
    except BaseException as error:
        _failed(device, "last_error", error)
    return device.error


cdef int _py_peer_map(gmem_device *handle, uint64_t key, const void *src, size_t size) noexcept with gil:
    cdef py_device *device = <py_device *>handle
    try:
        view = _lend(src, size, True)
        _with_views(device, "peer_map", [view], (key, view))
        return 0
    except BaseException as error:
        return _failed(device, "peer_map", error)


cdef int _py_peer_unmap(gmem_device *handle, uint64_t key, void *dst, size_t size) noexcept with gil:
    cdef py_device *device = <py_device *>handle
    try:
        view = _lend(dst, size, False)
        _with_views(device, "peer_unmap", [view], (key, view))
        return 0
    except BaseException as error:
        return _failed(device, "peer_unmap", error)


cdef int _batch(py_device *device, str op, gmem_peer_io *io, size_t count, bint readonly) noexcept:
    """The method's answer is None, or for each page None or the exception that befell it. An exception that it raises
    says that no page was touched."""
    cdef size_t i
    try:
        pages = [(io[i].key, _lend(io[i].memory, io[i].bytes, readonly)) for i in range(count)]
        outcomes = _with_views(device, op, [view for _, view in pages], (pages,))
        if outcomes is None:
            outcomes = [None] * len(pages)
        outcomes = list(outcomes)
        if len(outcomes) != len(pages):
            raise ValueError(f"{op} answered for {len(outcomes)} of {len(pages)} pages")
        for i in range(count):
            io[i].result = 0 if outcomes[i] is None else _failed(device, op, outcomes[i])
        return 0
    except BaseException as error:
        return _failed(device, op, error)


cdef int _py_peer_map_batch(gmem_device *handle, gmem_peer_io *io, size_t count) noexcept with gil:
    return _batch(<py_device *>handle, "peer_map_batch", io, count, True)


cdef int _py_peer_unmap_batch(gmem_device *handle, gmem_peer_io *io, size_t count) noexcept with gil:
    return _batch(<py_device *>handle, "peer_unmap_batch", io, count, False)


cdef int _py_peer_usage(gmem_device *handle, gmem_device_usage *ret) noexcept with gil:
    cdef py_device *device = <py_device *>handle
    cdef gmem_device_usage made
    try:
        usage = _call(device, "peer_usage", ())
        memset(&made, 0, sizeof(made))
        made.pages = usage.pages
        made.page_bytes = usage.page_bytes
        made.stored_bytes = usage.stored_bytes
        made.raw_pages = usage.raw_pages
        ret[0] = made
        return 0
    except BaseException as error:
        return _failed(device, "peer_usage", error)


cdef int _py_peer_free(gmem_device *handle, uint64_t key, size_t size) noexcept with gil:
    return _plain(<py_device *>handle, "peer_free", (key, size))


cdef int _py_peer_hmemcpy(
    gmem_device *handle, uint64_t key, size_t offset, void *buffer, size_t size, c_bool to_peer
) noexcept with gil:
    cdef py_device *device = <py_device *>handle
    try:
        view = _lend(buffer, size, to_peer)
        _with_views(device, "peer_hmemcpy", [view], (key, offset, view, bool(to_peer)))
        return 0
    except BaseException as error:
        return _failed(device, "peer_hmemcpy", error)


cdef int _py_peer_va_alloc_fixed(gmem_device *handle, gmem_range r) noexcept with gil:
    return _plain(<py_device *>handle, "peer_va_alloc_fixed", (r.va, r.bytes))


cdef int _py_peer_va_free(gmem_device *handle, gmem_range r) noexcept with gil:
    return _plain(<py_device *>handle, "peer_va_free", (r.va, r.bytes))


cdef int _py_copy(
    gmem_device *handle, const gmem_sg *sg, size_t count, gmem_fence_t after, gmem_fence_t *ret
) noexcept with gil:
    cdef py_device *device = <py_device *>handle
    try:
        pieces = [(_lend(sg[i].dst, sg[i].bytes, False), _lend(sg[i].src, sg[i].bytes, True))
                  for i in range(count)]
        fence = _with_views(device, "copy", [view for piece in pieces for view in piece], (pieces, after))
        ret[0] = fence or 0
        return 0
    except BaseException as error:
        return _failed(device, "copy", error)


cdef int _py_fill(gmem_device *handle, void *dst, int byte, size_t size, gmem_fence_t *ret) noexcept with gil:
    cdef py_device *device = <py_device *>handle
    try:
        view = _lend(dst, size, False)
        fence = _with_views(device, "fill", [view], (view, byte))
        ret[0] = fence or 0
        return 0
    except BaseException as error:
        return _failed(device, "fill", error)


cdef int _py_fence_wait(gmem_device *handle, gmem_fence_t fence, uint64_t timeout_ns) noexcept with gil:
    return _plain(<py_device *>handle, "fence_wait", (fence, timeout_ns))


cdef int _py_pmap_create(gmem_device *handle, uint64_t as_id, gmem_pmap **ret) noexcept with gil:
    cdef py_device *device = <py_device *>handle
    cdef py_pmap *made = <py_pmap *>malloc(sizeof(py_pmap))
    if made is NULL:
        return -errno.ENOMEM
    try:
        pmap = _call(device, "pmap_create", (as_id,))
    except BaseException as error:
        free(made)
        return _failed(device, "pmap_create", error)
    Py_INCREF(pmap)
    made.device = device
    made.pmap = <PyObject *>pmap
    ret[0] = <gmem_pmap *>made
    return 0


cdef void _py_pmap_destroy(gmem_pmap *handle) noexcept with gil:
    cdef py_pmap *made = <py_pmap *>handle
    if hasattr(<object>made.device.driver, "pmap_destroy"):
        _plain(made.device, "pmap_destroy", (<object>made.pmap,))
    Py_DECREF(<object>made.pmap)
    free(made)


cdef int _py_pmap_enter(gmem_pmap *handle, gmem_range r, uint64_t frame, gmem_prot prot) noexcept with gil:
    cdef py_pmap *made = <py_pmap *>handle
    return _plain(made.device, "pmap_enter", (<object>made.pmap, r.va, r.bytes, frame, <int>prot))


cdef int _py_pmap_release(gmem_pmap *handle, gmem_range r) noexcept with gil:
    cdef py_pmap *made = <py_pmap *>handle
    return _plain(made.device, "pmap_release", (<object>made.pmap, r.va, r.bytes))


cdef int _py_pmap_protect(gmem_pmap *handle, gmem_range r, gmem_prot prot) noexcept with gil:
    cdef py_pmap *made = <py_pmap *>handle
    return _plain(made.device, "pmap_protect", (<object>made.pmap, r.va, r.bytes, <int>prot))


cdef int _py_tlb_invl(gmem_pmap *handle, gmem_range r) noexcept with gil:
    cdef py_pmap *made = <py_pmap *>handle
    return _plain(made.device, "tlb_invl", (<object>made.pmap, r.va, r.bytes))


cdef int _py_tlb_invl_coalesced(gmem_pmap *handle, const gmem_range *r, size_t count) noexcept with gil:
    cdef py_pmap *made = <py_pmap *>handle
    return _plain(
        made.device, "tlb_invl_coalesced", (<object>made.pmap, [(r[i].va, r[i].bytes) for i in range(count)])
    )


cdef void _py_invalidate(
    gmem_device *handle, uint64_t as_id, gmem_range r, gmem_cause cause, uint64_t sequence
) noexcept with gil:
    _plain(<py_device *>handle, "invalidate", (as_id, r.va, r.bytes, <int>cause, sequence))


cdef class Table:
    """The ops table of one Python driver: an op that the object lacks is NULL."""

    def __cinit__(self, object driver, str name):
        self._name = name.encode()
        memset(&self.ops, 0, sizeof(self.ops))
        self.ops.abi = GMEM_DRIVER_ABI
        self.ops.size = sizeof(gmem_driver_ops)
        self.ops.name = self._name
        self.ops.probe = _py_probe
        self.ops.remove = _py_remove
        self.ops.info = _py_info
        self.ops.last_error = _py_last_error
        has = {op for op in _OPTIONAL_OPS if callable(getattr(driver, op, None))}
        if "health" in has:
            self.ops.health = _py_health
        if "copy" in has:
            self.ops.copy = _py_copy
        if "fill" in has:
            self.ops.fill = _py_fill
        if "fence_wait" in has:
            self.ops.fence_wait = _py_fence_wait
        if "invalidate" in has:
            self.ops.invalidate = _py_invalidate
        self._set_peer(has)
        self._set_pmap(has)

    cdef void _set_peer(self, set has):
        if "peer_va_alloc_fixed" in has:
            self.ops.peer_va_alloc_fixed = _py_peer_va_alloc_fixed
        if "peer_va_free" in has:
            self.ops.peer_va_free = _py_peer_va_free
        if "peer_map" in has:
            self.ops.peer_map = _py_peer_map
        if "peer_unmap" in has:
            self.ops.peer_unmap = _py_peer_unmap
        if "peer_free" in has:
            self.ops.peer_free = _py_peer_free
        if "peer_hmemcpy" in has:
            self.ops.peer_hmemcpy = _py_peer_hmemcpy
        if "peer_map_batch" in has:
            self.ops.peer_map_batch = _py_peer_map_batch
        if "peer_unmap_batch" in has:
            self.ops.peer_unmap_batch = _py_peer_unmap_batch
        if "peer_usage" in has:
            self.ops.peer_usage = _py_peer_usage

    cdef void _set_pmap(self, set has):
        if "pmap_create" not in has:
            return
        self.ops.pmap_create = _py_pmap_create
        self.ops.pmap_destroy = _py_pmap_destroy
        if "pmap_enter" in has:
            self.ops.pmap_enter = _py_pmap_enter
        if "pmap_release" in has:
            self.ops.pmap_release = _py_pmap_release
        if "pmap_protect" in has:
            self.ops.pmap_protect = _py_pmap_protect
        if "tlb_invl" in has:
            self.ops.tlb_invl = _py_tlb_invl
        if "tlb_invl_coalesced" in has:
            self.ops.tlb_invl_coalesced = _py_tlb_invl_coalesced
