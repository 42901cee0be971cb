/* SPDX-License-Identifier: Apache-2.0
 *
 * The part of NVIDIA's driver API (libcuda.so.1) that gmem calls, declared by ourselves and found with dlopen: nothing
 * of CUDA is needed to build, and nothing changes on machines without a GPU. A leaf, for the daemon and for clients; files
 * that include it define _GNU_SOURCE. Names, values and layouts as the CUDA
 * driver API documentation gives them (11.0 and later; stable ABI, the _v2 symbols where there are some).
 */
#ifndef GMEM_CUDA_API_H
#define GMEM_CUDA_API_H

#include <dlfcn.h>
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int CUresult;
typedef int CUdevice;
typedef uint64_t CUdeviceptr;
typedef uint64_t CUmemhandle; /* CUmemGenericAllocationHandle */
typedef struct CUctx_st *CUcontext;
typedef struct CUstream_st *CUstream;
typedef struct CUevent_st *CUevent;
typedef struct CUmod_st *CUmodule;
typedef struct CUfunc_st *CUfunction;

enum {
	CUDA_SUCCESS = 0,
	CUDA_ERROR_INVALID_VALUE = 1,
	CUDA_ERROR_OUT_OF_MEMORY = 2,
	CUDA_ERROR_DEINITIALIZED = 4,
	CUDA_ERROR_DEVICE_UNAVAILABLE = 46,
	CUDA_ERROR_NO_DEVICE = 100,
	CUDA_ERROR_INVALID_DEVICE = 101,
	CUDA_ERROR_ECC_UNCORRECTABLE = 214,
	CUDA_ERROR_NOT_READY = 600,
	CUDA_ERROR_ILLEGAL_ADDRESS = 700,
	CUDA_ERROR_LAUNCH_FAILED = 719,
	CUDA_ERROR_NOT_SUPPORTED = 801,
};

enum {
	CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING = 41,
	CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75,
	CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76,
	CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS = 88,
	CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS = 89,
	CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM = 91,
	CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED = 99,
	CU_DEVICE_ATTRIBUTE_PAGEABLE_USES_HOST_PAGE_TABLES = 100,
	CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED = 102,
	CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED = 103,
	CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID = 134,
	CU_DEVICE_ATTRIBUTE_HOST_NUMA_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED = 141,
};

enum { CU_MEM_ALLOCATION_TYPE_PINNED = 1 };
enum { CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR = 1 };
enum { CU_MEM_LOCATION_TYPE_DEVICE = 1, CU_MEM_LOCATION_TYPE_HOST = 2, CU_MEM_LOCATION_TYPE_HOST_NUMA = 3 };
enum { CU_MEM_ACCESS_FLAGS_PROT_NONE = 0, CU_MEM_ACCESS_FLAGS_PROT_READ = 1, CU_MEM_ACCESS_FLAGS_PROT_READWRITE = 3 };
enum { CU_MEM_ALLOC_GRANULARITY_MINIMUM = 0, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED = 1 };
enum { CU_STREAM_NON_BLOCKING = 1 };
enum { CU_EVENT_DEFAULT = 0, CU_EVENT_DISABLE_TIMING = 2 };
enum { CU_MEMHOSTREGISTER_PORTABLE = 1, CU_MEMHOSTREGISTER_DEVICEMAP = 2 };

typedef struct CUmemLocation {
	int type;
	int id;
} CUmemLocation;

typedef struct CUmemAllocationProp {
	int type;
	int requestedHandleTypes;
	CUmemLocation location;
	void *win32HandleMetaData;
	struct {
		unsigned char compressionType;
		unsigned char gpuDirectRDMACapable;
		unsigned short usage;
		unsigned char reserved[4];
	} allocFlags;
} CUmemAllocationProp;

typedef struct CUmemAccessDesc {
	CUmemLocation location;
	int flags;
} CUmemAccessDesc;

/* X(member, symbol, parameters) */
#define GMEM_CUDA_API(X) \
	X(init, cuInit, (unsigned flags)) \
	X(driver_version, cuDriverGetVersion, (int *ret)) \
	X(error_name, cuGetErrorName, (CUresult error, const char **ret)) \
	X(error_string, cuGetErrorString, (CUresult error, const char **ret)) \
	X(device_count, cuDeviceGetCount, (int *ret)) \
	X(device_get, cuDeviceGet, (CUdevice *ret, int ordinal)) \
	X(device_name, cuDeviceGetName, (char *ret, int bytes, CUdevice device)) \
	X(device_attribute, cuDeviceGetAttribute, (int *ret, int attribute, CUdevice device)) \
	X(device_total, cuDeviceTotalMem_v2, (size_t *ret, CUdevice device)) \
	X(device_uuid, cuDeviceGetUuid_v2, (unsigned char ret[16], CUdevice device)) \
	X(primary_retain, cuDevicePrimaryCtxRetain, (CUcontext *ret, CUdevice device)) \
	X(primary_release, cuDevicePrimaryCtxRelease_v2, (CUdevice device)) \
	X(ctx_set, cuCtxSetCurrent, (CUcontext ctx)) \
	X(ctx_get, cuCtxGetCurrent, (CUcontext *ret)) \
	X(ctx_synchronize, cuCtxSynchronize, (void)) \
	X(mem_info, cuMemGetInfo_v2, (size_t *ret_free, size_t *ret_total)) \
	X(granularity, cuMemGetAllocationGranularity, (size_t *ret, const CUmemAllocationProp *prop, int option)) \
	X(reserve, cuMemAddressReserve, (CUdeviceptr *ret, size_t bytes, size_t align, CUdeviceptr hint, unsigned long long flags)) \
	X(unreserve, cuMemAddressFree, (CUdeviceptr va, size_t bytes)) \
	X(create, cuMemCreate, (CUmemhandle *ret, size_t bytes, const CUmemAllocationProp *prop, unsigned long long flags)) \
	X(release, cuMemRelease, (CUmemhandle handle)) \
	X(export_fd, cuMemExportToShareableHandle, (void *ret, CUmemhandle handle, int type, unsigned long long flags)) \
	X(import_fd, cuMemImportFromShareableHandle, (CUmemhandle *ret, void *fd, int type)) \
	X(map, cuMemMap, (CUdeviceptr va, size_t bytes, size_t offset, CUmemhandle handle, unsigned long long flags)) \
	X(unmap, cuMemUnmap, (CUdeviceptr va, size_t bytes)) \
	X(set_access, cuMemSetAccess, (CUdeviceptr va, size_t bytes, const CUmemAccessDesc *desc, size_t count)) \
	X(host_register, cuMemHostRegister_v2, (void *p, size_t bytes, unsigned flags)) \
	X(host_unregister, cuMemHostUnregister, (void *p)) \
	X(copy, cuMemcpyAsync, (CUdeviceptr dst, CUdeviceptr src, size_t bytes, CUstream stream)) \
	X(copy_h2d, cuMemcpyHtoDAsync_v2, (CUdeviceptr dst, const void *src, size_t bytes, CUstream stream)) \
	X(copy_d2h, cuMemcpyDtoHAsync_v2, (void *dst, CUdeviceptr src, size_t bytes, CUstream stream)) \
	X(copy_d2d, cuMemcpyDtoDAsync_v2, (CUdeviceptr dst, CUdeviceptr src, size_t bytes, CUstream stream)) \
	X(fill8, cuMemsetD8Async, (CUdeviceptr dst, unsigned char byte, size_t bytes, CUstream stream)) \
	X(stream_create, cuStreamCreate, (CUstream *ret, unsigned flags)) \
	X(stream_destroy, cuStreamDestroy_v2, (CUstream stream)) \
	X(stream_synchronize, cuStreamSynchronize, (CUstream stream)) \
	X(stream_query, cuStreamQuery, (CUstream stream)) \
	X(stream_wait, cuStreamWaitEvent, (CUstream stream, CUevent event, unsigned flags)) \
	X(event_create, cuEventCreate, (CUevent *ret, unsigned flags)) \
	X(event_destroy, cuEventDestroy_v2, (CUevent event)) \
	X(event_record, cuEventRecord, (CUevent event, CUstream stream)) \
	X(event_query, cuEventQuery, (CUevent event)) \
	X(event_synchronize, cuEventSynchronize, (CUevent event)) \
	X(event_elapsed, cuEventElapsedTime, (float *ret_ms, CUevent from, CUevent to)) \
	X(module_load, cuModuleLoadData, (CUmodule *ret, const void *image)) \
	X(module_unload, cuModuleUnload, (CUmodule module)) \
	X(module_function, cuModuleGetFunction, (CUfunction *ret, CUmodule module, const char *name)) \
	X(launch, cuLaunchKernel, (CUfunction fn, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, \
				   unsigned shared_bytes, CUstream stream, void **params, void **extra))

struct gmem_cuda_api {
#define X(member, symbol, parameters) CUresult (*member) parameters; /* NOLINT(bugprone-macro-parentheses) */
	GMEM_CUDA_API(X)
#undef X
};

/* Loads libcuda into ret; 0, -ENOENT (no libcuda here) or -ENOSYS (one without a symbol; *ret_missing names it). The
 * environment's GMEM_LIBCUDA names another library, as tests do with their double. It is never unloaded. */
/* NOLINTNEXTLINE(readability-function-size): of which most is the list */
static inline int gmem_cuda_api_load(struct gmem_cuda_api *ret, const char **ret_missing)
{
	const char *name = secure_getenv("GMEM_LIBCUDA");
	void *library = dlopen(name && *name ? name : "libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
	const char *missing = NULL;

	if (!library)
		return -ENOENT;
#define X(member, symbol, parameters) \
	do { \
		void *found = dlsym(library, #symbol); \
		if (!found) \
			missing = #symbol; \
		memcpy(&ret->member, &found, sizeof(found)); \
	} while (0);
	GMEM_CUDA_API(X)
#undef X
	if (missing && ret_missing)
		*ret_missing = missing;
	return missing ? -ENOSYS : 0;
}

#endif
