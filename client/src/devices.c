/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <string.h>

#include "devices.h"
#include "error.h"
#include "session.h"

static const struct {
	const char *word;
	uint32_t bit;
} caps[] = {
	{ "replayable", GMEM_CAP_REPLAYABLE }, { "peer", GMEM_CAP_PEER },
	{ "coherent", GMEM_CAP_COHERENT },     { "compute", GMEM_CAP_COMPUTE },
	{ "persistent", GMEM_CAP_PERSISTENT }, { "export_fd", GMEM_CAP_EXPORT_FD },
	{ "remote", GMEM_CAP_REMOTE },         { "same_va", GMEM_CAP_SAME_VA },
	{ "own_frames", GMEM_CAP_OWN_FRAMES },
};

static uint32_t caps_of(const msgpack_object *device)
{
	const msgpack_object *words = gmem_map_get(device, "caps");
	uint32_t mask = 0;

	if (!words || words->type != MSGPACK_OBJECT_ARRAY)
		return 0;
	for (uint32_t i = 0; i < words->via.array.size; i++) {
		const msgpack_object *word = &words->via.array.ptr[i];

		for (size_t j = 0; word->type == MSGPACK_OBJECT_STR && j < sizeof(caps) / sizeof(caps[0]); j++)
			if (strlen(caps[j].word) == word->via.str.size &&
			    !memcmp(caps[j].word, word->via.str.ptr, word->via.str.size))
				mask |= caps[j].bit;
	}
	return mask;
}

static int describe(const msgpack_object *device, struct gmem_device_info *ret)
{
	struct gmem_device_info info = { .caps = caps_of(device) };
	uint64_t hnid;

	if (gmem_map_uint(device, "hnid", &hnid) || gmem_map_str(device, "name", info.name, sizeof(info.name)) ||
	    gmem_map_str(device, "driver", info.driver, sizeof(info.driver)) ||
	    gmem_map_uint(device, "capacity_bytes", &info.capacity_bytes) ||
	    gmem_map_uint(device, "used_bytes", &info.used_bytes) ||
	    gmem_map_uint(device, "peak_bytes", &info.peak_bytes) ||
	    gmem_map_uint(device, "pinned_bytes", &info.pinned_bytes) ||
	    gmem_map_uint(device, "contexts", &info.contexts) || gmem_map_uint(device, "faults", &info.faults) ||
	    gmem_map_uint(device, "in_bytes", &info.in_bytes) || gmem_map_uint(device, "out_bytes", &info.out_bytes) ||
	    gmem_map_uint(device, "evictions", &info.evictions))
		return gmem_fail(-EPROTO, "devices: gmemd's reply can't be read");
	info.hnid = (int32_t)hnid;
	*ret = info;
	return 0;
}

typedef int (*visit_fn)(const struct gmem_device_info *info, size_t index, void *arg);

static int visit_all(struct gmem *session, visit_fn visit, void *arg, size_t *ret_count)
{
	struct gmem_request request;
	struct gmem_reply reply;
	const msgpack_object *list;
	int err;

	gmem_request_init(&request, "devices", 0);
	err = gmem_rpc_call(session->rpc, &request, &reply);
	if (err)
		return err;
	list = gmem_map_get(gmem_reply_root(&reply), "devices");
	if (!list || list->type != MSGPACK_OBJECT_ARRAY)
		err = gmem_fail(-EPROTO, "devices: gmemd's reply can't be read");
	for (uint32_t i = 0; !err && i < list->via.array.size; i++) {
		struct gmem_device_info info;

		err = describe(&list->via.array.ptr[i], &info);
		if (!err)
			err = visit(&info, i, arg);
	}
	if (!err)
		*ret_count = list->via.array.size;
	gmem_reply_deinit(&reply);
	return err;
}

struct output {
	char *at;
	size_t each, capacity;
};

static int store(const struct gmem_device_info *info, size_t index, void *arg)
{
	struct output *out = arg;

	if (index < out->capacity)
		memcpy(out->at + index * out->each, info, out->each);
	return 0;
}

int gmem_devices(struct gmem *session, struct gmem_device_info *devices, size_t device_bytes, size_t capacity,
		 size_t *ret)
{
	struct output out = { (char *)devices, device_bytes, capacity };
	int err;

	if (!session)
		return gmem_fail(-EINVAL, "session: is NULL");
	if (capacity && (!device_bytes || device_bytes > sizeof(*devices)))
		return gmem_fail(-EINVAL, "device_bytes: %zu is not the size of struct gmem_device_info",
				 device_bytes);
	if (!ret || (capacity && !devices))
		return gmem_fail(-EINVAL, "%s: is NULL", ret ? "devices" : "ret");
	err = visit_all(session, store, &out, &capacity);
	if (!err)
		*ret = capacity;
	return err;
}

struct search {
	const char *name;
	bool found;
	struct gmem_device_info info;
};

static int compare(const struct gmem_device_info *info, size_t index, void *arg)
{
	struct search *search = arg;

	(void)index;
	if (!strcmp(info->name, search->name)) {
		search->info = *info;
		search->found = true;
	}
	return 0;
}

int gmem_device_find(struct gmem *session, const char *name, struct gmem_device_info *ret)
{
	struct search search = { .name = name };
	size_t count;
	int err = visit_all(session, compare, &search, &count);

	if (err)
		return err;
	if (!search.found)
		return gmem_fail(-ENOENT, "device: no device %s is attached", name);
	*ret = search.info;
	return 0;
}
