# SPDX-License-Identifier: Apache-2.0
"""cffi builder of gmem._client: handshake, mappings, userfaultfd and fork handlers, shared with libgmem."""

from pathlib import Path

from cffi import FFI

SOURCES = ("handshake.c", "link.c", "map.c", "uffd.c")

ffibuilder = FFI()
ffibuilder.cdef(
    """
    struct gmem_link;
    int gmem_link_open(const char *path, struct gmem_link **ret, char *message);
    int gmem_link_open_context(const char *path, const uint8_t *token, const char *device, struct gmem_link **ret,
                               char *message);
    void gmem_link_close(struct gmem_link *link);
    const uint8_t *gmem_link_token(const struct gmem_link *link);
    const char *gmem_link_control(const struct gmem_link *link);
    const char *gmem_link_events(const struct gmem_link *link);
    uint64_t gmem_link_session(const struct gmem_link *link);
    uint32_t gmem_link_flags(const struct gmem_link *link);
    uint64_t gmem_link_window_base(const struct gmem_link *link);
    uint64_t gmem_link_window_bytes(const struct gmem_link *link);
    int gmem_link_hnid(const struct gmem_link *link);
    int gmem_link_status(const struct gmem_link *link);
    int gmem_link_socket(const struct gmem_link *link);
    const char *gmem_link_message(const struct gmem_link *link);
    int gmem_link_map(struct gmem_link *link, uint64_t va, uint64_t bytes, uint64_t offset, bool huge, bool inherit);
    int gmem_link_unmap(struct gmem_link *link, uint64_t va, uint64_t bytes);
    void gmem_link_touch(uint64_t va, uint64_t bytes, bool write);
    #define GMEM_WIRE_TOKEN_BYTES ...
    #define GMEM_WIRE_MESSAGE_BYTES ...
    #define GMEM_WIRE_HAS_UFFD_DEV ...
    #define GMEM_WIRE_EVENT_FORK ...
    """
)

# setuptools builds from the project's root.
_HERE = Path(__file__).resolve().parent.name
ffibuilder.set_source(
    "gmem._client",
    '#include "link.h"',
    sources=[f"{_HERE}/src/{name}" for name in SOURCES],
    include_dirs=[f"{_HERE}/src", f"{_HERE}/include"],
    extra_compile_args=["-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-fvisibility=hidden", "-pthread"],
    extra_link_args=["-pthread"],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
