# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""Memory at an address, as an object with the buffer protocol that knows whether anyone still looks at it."""

from cpython.buffer cimport PyBuffer_FillInfo


cdef class Mapping:
    """`nbytes` bytes at `address`. Whoever makes it sees to it that they stay mapped until it is closed or gone."""

    cdef readonly size_t address
    cdef readonly size_t nbytes
    cdef readonly bint closed
    cdef readonly bint read_only
    cdef Py_ssize_t exports
    cdef object __weakref__

    def __init__(self, size_t address, size_t nbytes, bint read_only=False):
        self.address = address
        self.nbytes = nbytes
        self.read_only = read_only

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        if self.closed:
            raise ValueError("the buffer is closed")
        PyBuffer_FillInfo(buffer, self, <void *>self.address, <Py_ssize_t>self.nbytes, self.read_only, flags)
        self.exports += 1

    def __releasebuffer__(self, Py_buffer *buffer):
        self.exports -= 1

    def __len__(self):
        return self.nbytes

    def _close(self):
        """Raises BufferError while arrays or memoryviews of it exist."""
        if self.exports:
            raise BufferError(f"{self.exports} arrays or views of this buffer still exist")
        self.closed = True
