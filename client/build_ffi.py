# SPDX-License-Identifier: Apache-2.0
"""cffi builder of gmem._client: handshake, mappings, userfaultfd and fork handlers, shared with libgmem."""

from pathlib import Path

from cffi import FFI

SOURCES = (
    "adopt.c", "agent.c", "beside.c", "copies.c", "cuda.c", "cuda_context.c", "cuda_maps.c", "files.c", "handshake.c",
    "link.c", "map.c", "ring.c", "uffd.c", "vma.c", "words.c",
)  # fmt: skip

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
    int gmem_link_map_file(struct gmem_link *link, uint64_t va, bool inherit);
    int gmem_link_overlay(struct gmem_link *link, uint64_t va);
    int gmem_link_uncover(struct gmem_link *link, uint64_t va, uint64_t bytes);
    int gmem_link_unmap(struct gmem_link *link, uint64_t va, uint64_t bytes);
    bool gmem_link_may_keep(struct gmem_link *link, uint64_t va, uint64_t bytes);
    void gmem_link_kept(struct gmem_link *link, uint64_t va, uint64_t bytes);
    int gmem_link_reuse(struct gmem_link *link, uint64_t va, uint64_t bytes);
    void gmem_link_touch(uint64_t va, uint64_t bytes, bool write);
    struct gmem_ring_sqe {
        uint64_t user_data;
        uint16_t op, flags, stream;
        int16_t hnid;
        uint64_t va, bytes, arg, hold;
        uint32_t index;
        ...;
    };
    struct gmem_ring_cqe { int32_t result; uint32_t blame; uint64_t values[6]; ...; };
    struct gmem_done { uint64_t tag; int32_t err; uint32_t op; struct gmem_ring_cqe cqe; ...; };
    struct gmem_call;
    bool gmem_link_has_ring(const struct gmem_link *link);
    int gmem_link_call(struct gmem_link *link, struct gmem_ring_sqe *sqe, uint64_t timeout_ns,
                       struct gmem_ring_cqe *ret, struct gmem_call **ret_call);
    int gmem_call_wait(struct gmem_call *call, uint64_t timeout_ns, struct gmem_ring_cqe *ret);
    void gmem_call_put(struct gmem_call *call);
    int gmem_link_start(struct gmem_link *link, const struct gmem_ring_sqe *sqe, uint64_t tag);
    int gmem_link_next_done(struct gmem_link *link, uint64_t timeout_ns, struct gmem_done *ret);
    void gmem_link_cancel(struct gmem_link *link);
    const char *gmem_ring_argument(uint32_t blame);
    void gmem_ring_words(uint32_t op, const struct gmem_ring_cqe *cqe, char *ret, size_t capacity);
    struct gmem_cuda;
    int gmem_cuda_open(struct gmem_link *session, struct gmem_link *context, uint64_t id, struct gmem_cuda **ret,
                       char *message);
    void gmem_cuda_close(struct gmem_cuda *cuda);
    int gmem_cuda_ordinal(const struct gmem_cuda *cuda);
    int gmem_cuda_release(struct gmem_cuda *cuda, uint64_t stream, const uint64_t *ranges, size_t count,
                          uint64_t *ret_ticket);
    int gmem_cuda_wait(struct gmem_cuda *cuda, uint64_t ticket, uint64_t timeout_ns);
    int gmem_cuda_status(struct gmem_cuda *cuda, char *what);
    int gmem_cuda_check(char *message);
    void gmem_cuda_enable(void);
    struct gmem_adoption { uint64_t va, bytes, done, staging, staging_bytes, offset; ...; };
    int gmem_link_adopt_begin(struct gmem_link *link, uint64_t va, uint64_t bytes, uint64_t page_bytes, bool outward,
                              struct gmem_adoption *ret, char *message);
    int gmem_link_adopt_finish(struct gmem_link *link, struct gmem_adoption *adoption, char *message);
    void gmem_link_adopt_cancel(struct gmem_link *link, struct gmem_adoption *adoption);
    int gmem_link_stays(struct gmem_link *link, uint64_t va, uint64_t bytes);
    void gmem_link_disown(struct gmem_link *link, uint64_t va, uint64_t bytes, uint64_t dead, uint64_t dead_end);
    struct gmem_wire_region { uint64_t va, bytes, offset; ...; };
    int gmem_link_give_file(const struct gmem_link *link, int fd, uint64_t offset, uint64_t bytes, uint32_t page_bytes,
                            uint32_t flags, struct gmem_wire_region *ret, char *message);
    #define GMEM_WIRE_FILE_WRITE ...
    #define GMEM_WIRE_FILE_NO_INHERIT ...
    #define GMEM_WIRE_FILE_PRIVATE ...
    void gmem_link_give_back(struct gmem_link *link);
    int gmem_link_map_beside(struct gmem_link *link, uint64_t va, uint64_t bytes, uint64_t offset);
    #define GMEM_STREAM_MAX ...
    #define GMEM_RING_NOP ...
    #define GMEM_RING_ADVISE ...
    #define GMEM_RING_PREFETCH ...
    #define GMEM_RING_DISCARD ...
    #define GMEM_RING_HMEMCPY ...
    #define GMEM_RING_MMAP ...
    #define GMEM_RING_MMAP_COMMIT ...
    #define GMEM_RING_MUNMAP ...
    #define GMEM_RING_ACQUIRE ...
    #define GMEM_RING_RELEASE ...
    #define GMEM_RING_NO_INHERIT ...
    #define GMEM_RING_SMALL ...
    #define GMEM_RING_KEEP ...
    #define GMEM_RING_WRITE ...
    #define GMEM_RING_VA ...
    #define GMEM_RING_LENGTH ...
    #define GMEM_RING_OFFSET ...
    #define GMEM_RING_PAGE_BYTES ...
    #define GMEM_RING_HUGE ...
    #define GMEM_RING_KEPT ...
    #define GMEM_RING_HOLD ...
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
    '#include "adopt.h"\n#include "cuda.h"\n#include "link.h"\n#include "ring.h"',
    sources=[f"{_HERE}/src/{name}" for name in SOURCES],
    include_dirs=[f"{_HERE}/src", f"{_HERE}/include"],
    extra_compile_args=["-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-fvisibility=hidden", "-pthread"],
    extra_link_args=["-pthread", "-ldl"],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
