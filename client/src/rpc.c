/* SPDX-License-Identifier: Apache-2.0
 *
 * A ZeroMQ socket is used by one thread at a time: each call takes an idle one, or makes one, and gives it back. So a
 * request that waits (a prefetch of gigabytes) holds up nobody else. A forked child leaves its parent's ZeroMQ state
 * alone, because ending it would end the parent's connections, and makes its own at its first request.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include <gmem.h>

#include "atfork.h"
#include "error.h"
#include "link.h"
#include "rpc.h"

#define IDLE_MAX 16
/* How often a waiting request is sent again: a gmemd that was killed and started again knows of none that the former had
 * not answered; one that works on it, or has answered, takes no notice. */
#define AGAIN_MS 500
#define PROTOCOL 1
#define ENVELOPE_FIELDS 4

struct gmem_rpc {
	struct gmem_link *link;
	pthread_mutex_t lock; /* guards what follows; held over a fork, never over a wait */
	void *zmq;            /* made by the first request */
	void *idle[IDLE_MAX];
	size_t idle_count;
	uint64_t last_id;
	struct gmem_rpc *next;
};

static pthread_mutex_t all_lock = PTHREAD_MUTEX_INITIALIZER;
static struct gmem_rpc *all; /* all_lock */

/* ---- life ---- */

static void before_fork(void)
{
	pthread_mutex_lock(&all_lock);
	for (struct gmem_rpc *rpc = all; rpc; rpc = rpc->next)
		pthread_mutex_lock(&rpc->lock);
}

static void after_fork(void)
{
	for (struct gmem_rpc *rpc = all; rpc; rpc = rpc->next)
		pthread_mutex_unlock(&rpc->lock);
	pthread_mutex_unlock(&all_lock);
}

static void after_fork_child(void)
{
	for (struct gmem_rpc *rpc = all; rpc; rpc = rpc->next) {
		rpc->zmq = NULL;
		rpc->idle_count = 0;
	}
	after_fork();
}

static void install_handlers(void)
{
	gmem_atfork(before_fork, after_fork, after_fork_child);
}

int gmem_rpc_create(struct gmem_link *link, struct gmem_rpc **ret)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;
	struct gmem_rpc *rpc = calloc(1, sizeof(*rpc));

	if (!rpc)
		return gmem_fail(-ENOMEM, "out of memory");
	pthread_once(&once, install_handlers);
	rpc->link = link;
	pthread_mutex_init(&rpc->lock, NULL);
	pthread_mutex_lock(&all_lock);
	rpc->next = all;
	all = rpc;
	pthread_mutex_unlock(&all_lock);
	*ret = rpc;
	return 0;
}

void gmem_rpc_destroy(struct gmem_rpc *rpc)
{
	struct gmem_rpc **at;

	pthread_mutex_lock(&all_lock);
	for (at = &all; *at != rpc; at = &(*at)->next)
		;
	*at = rpc->next;
	pthread_mutex_unlock(&all_lock);
	while (rpc->idle_count)
		zmq_close(rpc->idle[--rpc->idle_count]);
	if (rpc->zmq)
		zmq_ctx_term(rpc->zmq);
	pthread_mutex_destroy(&rpc->lock);
	free(rpc);
}

/* ---- sockets ---- */

static void *connect_new(struct gmem_rpc *rpc, void *zmq)
{
	const int no_linger = 0;
	void *socket = zmq_socket(zmq, ZMQ_DEALER);

	if (!socket)
		return NULL;
	zmq_setsockopt(socket, ZMQ_LINGER, &no_linger, sizeof(no_linger));
	if (zmq_connect(socket, gmem_link_control(rpc->link))) {
		int err = errno;

		zmq_close(socket);
		errno = err;
		return NULL;
	}
	return socket;
}

static int take_socket(struct gmem_rpc *rpc, void **ret_socket, uint64_t *ret_id)
{
	void *socket = NULL;

	pthread_mutex_lock(&rpc->lock);
	if (!rpc->zmq)
		rpc->zmq = zmq_ctx_new();
	if (rpc->idle_count)
		socket = rpc->idle[--rpc->idle_count];
	else if (rpc->zmq)
		socket = connect_new(rpc, rpc->zmq);
	*ret_id = ++rpc->last_id;
	pthread_mutex_unlock(&rpc->lock);
	if (!socket)
		return gmem_fail(-EMFILE, "no socket to gmemd: %s", zmq_strerror(errno));
	*ret_socket = socket;
	return 0;
}

static void give_socket(struct gmem_rpc *rpc, void *socket, bool sound)
{
	pthread_mutex_lock(&rpc->lock);
	if (sound && rpc->idle_count < IDLE_MAX) {
		rpc->idle[rpc->idle_count++] = socket;
		socket = NULL;
	}
	pthread_mutex_unlock(&rpc->lock);
	if (socket)
		zmq_close(socket);
}

/* ---- request ---- */

static void pack_str(struct gmem_request *request, const char *text)
{
	size_t bytes = strlen(text);

	request->failed |= msgpack_pack_str(&request->packer, bytes) != 0;
	request->failed |= msgpack_pack_str_body(&request->packer, text, bytes) != 0;
}

void gmem_request_init(struct gmem_request *request, const char *op, size_t arg_count)
{
	request->op = op;
	request->arg_count = arg_count;
	request->failed = false;
	msgpack_sbuffer_init(&request->args);
	msgpack_packer_init(&request->packer, &request->args, msgpack_sbuffer_write);
}

void gmem_request_uint(struct gmem_request *request, const char *key, uint64_t value)
{
	pack_str(request, key);
	request->failed |= msgpack_pack_uint64(&request->packer, value) != 0;
}

void gmem_request_int(struct gmem_request *request, const char *key, int64_t value)
{
	pack_str(request, key);
	request->failed |= msgpack_pack_int64(&request->packer, value) != 0;
}

void gmem_request_bool(struct gmem_request *request, const char *key, bool value)
{
	pack_str(request, key);
	request->failed |= (value ? msgpack_pack_true : msgpack_pack_false)(&request->packer) != 0;
}

void gmem_request_str(struct gmem_request *request, const char *key, const char *value)
{
	pack_str(request, key);
	pack_str(request, value);
}

void gmem_request_ranges(struct gmem_request *request, const char *key, const struct gmem_range *ranges, size_t count)
{
	pack_str(request, key);
	request->failed |= msgpack_pack_array(&request->packer, count) != 0;
	for (size_t i = 0; i < count; i++) {
		request->failed |= msgpack_pack_array(&request->packer, 2) != 0;
		request->failed |= msgpack_pack_uint64(&request->packer, (uintptr_t)ranges[i].va) != 0;
		request->failed |= msgpack_pack_uint64(&request->packer, ranges[i].bytes) != 0;
	}
}

void gmem_request_pair(struct gmem_request *request, const char *key, uint64_t first, uint64_t second)
{
	const struct gmem_range pair = { (void *)(uintptr_t)first, second };

	gmem_request_ranges(request, key, &pair, 1);
}

/* The envelope, then the arguments as they were packed. */
static int compose(const struct gmem_rpc *rpc, const struct gmem_request *request, uint64_t id, msgpack_sbuffer *ret)
{
	struct gmem_request whole;

	gmem_request_init(&whole, request->op, 0);
	whole.failed = request->failed;
	whole.failed |= msgpack_pack_map(&whole.packer, ENVELOPE_FIELDS + request->arg_count) != 0;
	gmem_request_uint(&whole, "v", PROTOCOL);
	gmem_request_uint(&whole, "id", id);
	gmem_request_str(&whole, "op", request->op);
	pack_str(&whole, "token");
	whole.failed |= msgpack_pack_bin(&whole.packer, GMEM_WIRE_TOKEN_BYTES) != 0;
	whole.failed |= msgpack_pack_bin_body(&whole.packer, gmem_link_token(rpc->link), GMEM_WIRE_TOKEN_BYTES) != 0;
	if (request->args.size)
		whole.failed |= msgpack_sbuffer_write(&whole.args, request->args.data, request->args.size) != 0;
	if (whole.failed) {
		msgpack_sbuffer_destroy(&whole.args);
		return gmem_fail(-ENOMEM, "%s: out of memory", request->op);
	}
	*ret = whole.args;
	return 0;
}

/* ---- reply ---- */

static int send_request(void *socket, const char *op, const msgpack_sbuffer *message)
{
	while (zmq_send(socket, message->data, message->size, ZMQ_DONTWAIT) < 0)
		if (errno == EAGAIN)
			return 0; /* many wait to be sent already */
		else if (errno != EINTR)
			return gmem_fail(-EIO, "%s: %s", op, zmq_strerror(errno));
	return 0;
}

static int wait_readable(struct gmem_rpc *rpc, void *socket, const char *op, const msgpack_sbuffer *message)
{
	zmq_pollitem_t items[] = {
		{ .socket = socket, .events = ZMQ_POLLIN },
		{ .fd = gmem_link_socket(rpc->link), .events = ZMQ_POLLIN },
	};

	for (;;) {
		int ready = zmq_poll(items, 2, AGAIN_MS), err = 0;

		if (ready < 0 && errno != EINTR)
			return gmem_fail(-EIO, "%s: %s", op, zmq_strerror(errno));
		if (!ready)
			err = send_request(socket, op, message);
		if (err)
			return err;
		if (ready <= 0)
			continue;
		if (items[0].revents)
			return 0;
		if (items[1].revents && gmem_link_is_lost(rpc->link))
			return gmem_fail(-ECONNRESET, "%s: gmemd has gone, or has ended this session", op);
	}
}

static int receive(void *socket, const char *op, struct gmem_reply *reply)
{
	size_t offset = 0;

	zmq_msg_init(&reply->message);
	msgpack_unpacked_init(&reply->unpacked);
	while (zmq_msg_recv(&reply->message, socket, 0) < 0) {
		if (errno != EINTR)
			return gmem_fail(-EIO, "%s: %s", op, zmq_strerror(errno));
	}
	if (msgpack_unpack_next(&reply->unpacked, zmq_msg_data(&reply->message), zmq_msg_size(&reply->message),
				&offset) != MSGPACK_UNPACK_SUCCESS ||
	    reply->unpacked.data.type != MSGPACK_OBJECT_MAP)
		return gmem_fail(-EPROTO, "%s: gmemd's reply can't be read", op);
	return 0;
}

/* The error that a reply stands for, 0 if none. */
static int verdict(const struct gmem_reply *reply, const char *op)
{
	const msgpack_object *root = gmem_reply_root(reply), *error;
	char message[384] = "gmemd gave no reason";
	uint64_t number = 0;
	bool ok = false;

	if (!gmem_map_bool(root, "ok", &ok) && ok)
		return 0;
	error = gmem_map_get(root, "error");
	if (!error || gmem_map_uint(error, "errno", &number) || !number || number > 4095)
		return gmem_fail(-EPROTO, "%s: gmemd's reply can't be read", op);
	gmem_map_str(error, "message", message, sizeof(message));
	return gmem_fail(-(int)number, "%s", message);
}

/* Sound: the socket has nothing outstanding. */
static int exchange(struct gmem_rpc *rpc, void *socket, const char *op, const msgpack_sbuffer *message, uint64_t id,
		    struct gmem_reply *reply, bool *ret_sound)
{
	int err;

	*ret_sound = false;
	err = send_request(socket, op, message);
	if (err)
		return err;
	for (;;) {
		uint64_t got = 0;

		err = wait_readable(rpc, socket, op, message);
		if (err)
			return err;
		err = receive(socket, op, reply);
		if (!err && !gmem_map_uint(gmem_reply_root(reply), "id", &got) && got != id && got != 0) {
			gmem_reply_deinit(reply);
			continue;
		}
		*ret_sound = !err;
		if (!err)
			err = verdict(reply, op);
		if (err)
			gmem_reply_deinit(reply);
		return err;
	}
}

int gmem_rpc_call(struct gmem_rpc *rpc, struct gmem_request *request, struct gmem_reply *ret)
{
	struct gmem_reply reply;
	msgpack_sbuffer message = { 0 };
	void *socket = NULL;
	uint64_t id = 0;
	bool sound = true;
	int err = gmem_link_status(rpc->link);

	if (err)
		gmem_fail(err, "this forked process could not join gmemd: %s", gmem_link_message(rpc->link));
	else
		err = take_socket(rpc, &socket, &id);
	if (!err) {
		err = compose(rpc, request, id, &message);
		if (!err) {
			err = exchange(rpc, socket, request->op, &message, id, &reply, &sound);
			msgpack_sbuffer_destroy(&message);
		}
		give_socket(rpc, socket, sound);
	}
	msgpack_sbuffer_destroy(&request->args);
	if (err)
		return err;
	if (ret)
		*ret = reply;
	else
		gmem_reply_deinit(&reply);
	return 0;
}

void gmem_reply_deinit(struct gmem_reply *reply)
{
	msgpack_unpacked_destroy(&reply->unpacked);
	zmq_msg_close(&reply->message);
}

const msgpack_object *gmem_reply_root(const struct gmem_reply *reply)
{
	return &reply->unpacked.data;
}

const msgpack_object *gmem_map_get(const msgpack_object *map, const char *key)
{
	size_t bytes = strlen(key);

	if (map->type != MSGPACK_OBJECT_MAP)
		return NULL;
	for (uint32_t i = 0; i < map->via.map.size; i++) {
		const msgpack_object_kv *pair = &map->via.map.ptr[i];

		if (pair->key.type == MSGPACK_OBJECT_STR && pair->key.via.str.size == bytes &&
		    !memcmp(pair->key.via.str.ptr, key, bytes))
			return &pair->val;
	}
	return NULL;
}

int gmem_map_uint(const msgpack_object *map, const char *key, uint64_t *ret)
{
	const msgpack_object *value = gmem_map_get(map, key);

	if (!value || value->type != MSGPACK_OBJECT_POSITIVE_INTEGER)
		return -EPROTO;
	*ret = value->via.u64;
	return 0;
}

int gmem_map_bool(const msgpack_object *map, const char *key, bool *ret)
{
	const msgpack_object *value = gmem_map_get(map, key);

	if (!value || value->type != MSGPACK_OBJECT_BOOLEAN)
		return -EPROTO;
	*ret = value->via.boolean;
	return 0;
}

int gmem_map_str(const msgpack_object *map, const char *key, char *ret, size_t capacity)
{
	const msgpack_object *value = gmem_map_get(map, key);
	size_t bytes;

	if (!value || value->type != MSGPACK_OBJECT_STR || !capacity)
		return -EPROTO;
	bytes = value->via.str.size < capacity ? value->via.str.size : capacity - 1;
	memcpy(ret, value->via.str.ptr, bytes);
	ret[bytes] = '\0';
	return 0;
}
