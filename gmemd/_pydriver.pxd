# SPDX-License-Identifier: Apache-2.0
from gmemd._core cimport (
    GMEM_CAP_SLOW, GMEM_DRIVER_ABI, c_bool, gmem_cause, gmem_device, gmem_device_info, gmem_device_usage,
    gmem_driver_config, gmem_driver_ops, gmem_fence_t, gmem_peer_io, gmem_pmap, gmem_prot, gmem_range, gmem_sg,
)


cdef class Table:
    cdef gmem_driver_ops ops
    cdef bytes _name
    cdef void _set_peer(self, set has)
    cdef void _set_pmap(self, set has)


cdef object probing(object driver)
