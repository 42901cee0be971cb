/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <gmem/stats.h>

#include "nodes.h"

#define ASK_NS 100000000ull    /* stale is said no more often */
#define REFUSED_NS 100000000ull

/* ---- life ---- */

static int add_node(struct gmem_nodes *nodes, const struct gmem_address *address, unsigned *ret)
{
	for (unsigned i = 0; i < nodes->count; i++)
		if (gmem_address_equal(&nodes->nodes[i]->address, address)) {
			*ret = i;
			return 0;
		}
	if (nodes->count == GMEM_NODES_MAX)
		return -ENOSPC;
	nodes->nodes[nodes->count] = calloc(1, sizeof(struct gmem_node));
	if (!nodes->nodes[nodes->count])
		return -ENOMEM;
	nodes->nodes[nodes->count]->address = *address;
	*ret = nodes->count++;
	return 0;
}

int gmem_nodes_init(struct gmem_nodes *nodes, const struct gmem_identity *identity, const struct gmem_address *address,
		    int control, uint64_t connect_ns)
{
	unsigned only;
	int err = 0;

	*nodes = (struct gmem_nodes){ .identity = *identity, .control = control, .connect_ns = connect_ns };
	for (unsigned s = 0; s < GMEM_SLOT_COUNT; s++)
		nodes->slots[s] = address ? 0 : GMEM_NODE_NONE;
	if (address)
		err = add_node(nodes, address, &only);
	if (err)
		return err;
	gmem_mutex_init(&nodes->lock, GMEM_RANK_DRIVER);
	pthread_cond_init(&nodes->changed, NULL);
	return 0;
}

void gmem_nodes_deinit(struct gmem_nodes *nodes)
{
	for (unsigned i = 0; i < nodes->count; i++) {
		while (nodes->nodes[i]->idle_count)
			gmem_wire_close(nodes->nodes[i]->idle[--nodes->nodes[i]->idle_count]);
		free(nodes->nodes[i]);
	}
	if (nodes->control >= 0)
		close(nodes->control);
	gmem_mutex_deinit(&nodes->lock);
	pthread_cond_destroy(&nodes->changed);
}

void gmem_nodes_note(struct gmem_nodes *nodes, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	gmem_mutex_lock(&nodes->lock);
	vsnprintf(nodes->error, sizeof(nodes->error), format, args);
	gmem_mutex_unlock(&nodes->lock);
	va_end(args);
}

void gmem_nodes_error(struct gmem_nodes *nodes, char *ret_text)
{
	gmem_mutex_lock(&nodes->lock);
	memcpy(ret_text, nodes->error, sizeof(nodes->error));
	gmem_mutex_unlock(&nodes->lock);
}

/* ---- the map ---- */

struct map {
	unsigned count;
	struct gmem_address addresses[GMEM_NODES_MAX];
	uint16_t slots[GMEM_SLOT_COUNT]; /* numbers of the message */
};

static int read_range(const char *line, struct map *map)
{
	unsigned first, last, number;
	int end = -1;

	if (sscanf(line, "slots %u %u %u%n", &first, &last, &number, &end) != 3 || line[end] || first > last ||
	    last >= GMEM_SLOT_COUNT || number >= map->count)
		return -EPROTO;
	for (unsigned s = first; s <= last; s++)
		map->slots[s] = (uint16_t)number;
	return 0;
}

static int read_node(const char *line, struct gmem_address *ret)
{
	char address[112], name[112];
	int end = -1;

	if (sscanf(line, "node %111s %111s%n", address, name, &end) != 2 || line[end])
		return -EPROTO;
	return gmem_address_parse(address, name, ret) ? -EPROTO : 0;
}

static int read_map(char *text, struct map *map)
{
	char *save = NULL, *line = strtok_r(text, "\n", &save);
	int end = -1, err = 0;

	if (!line || sscanf(line, "topology %u%n", &map->count, &end) != 1 || line[end] || !map->count ||
	    map->count > GMEM_NODES_MAX)
		return -EPROTO;
	memset(map->slots, 0xff, sizeof(map->slots));
	for (unsigned i = 0; !err && i < map->count; i++) {
		line = strtok_r(NULL, "\n", &save);
		err = line ? read_node(line, &map->addresses[i]) : -EPROTO;
	}
	while (!err && (line = strtok_r(NULL, "\n", &save)))
		err = read_range(line, map);
	return err;
}

static int take_map(struct gmem_nodes *nodes, const struct map *map)
{
	unsigned numbers[GMEM_NODES_MAX];
	int err = 0;

	gmem_mutex_lock(&nodes->lock);
	for (unsigned i = 0; !err && i < map->count; i++)
		err = add_node(nodes, &map->addresses[i], &numbers[i]);
	if (!err) {
		for (unsigned s = 0; s < GMEM_SLOT_COUNT; s++)
			nodes->slots[s] = map->slots[s] == GMEM_NODE_NONE ? GMEM_NODE_NONE : (uint16_t)numbers[map->slots[s]];
		nodes->epoch++;
		pthread_cond_broadcast(&nodes->changed);
	}
	gmem_mutex_unlock(&nodes->lock);
	return err;
}

int gmem_nodes_listen(struct gmem_nodes *nodes)
{
	char *text = malloc(GMEM_TOPOLOGY_MAX + 1);
	struct map *map = malloc(sizeof(*map));
	ssize_t n = -1;
	int err = text && map ? 0 : -ENOMEM;

	if (!err)
		n = recv(nodes->control, text, GMEM_TOPOLOGY_MAX, MSG_DONTWAIT | MSG_TRUNC);
	if (!err && n <= 0)
		err = n ? -errno : -EPIPE;
	if (!err && n > GMEM_TOPOLOGY_MAX)
		err = -EPROTO;
	if (!err && n > 0) {
		text[n] = '\0';
		err = strlen(text) == (size_t)n ? read_map(text, map) : -EPROTO;
	}
	if (!err)
		err = take_map(nodes, map);
	free(map);
	free(text);
	return err;
}

void gmem_nodes_stale(struct gmem_nodes *nodes)
{
	uint64_t now = gmem_now_ns();
	bool ask;

	if (nodes->control < 0)
		return;
	gmem_mutex_lock(&nodes->lock);
	ask = now - nodes->asked_ns >= ASK_NS;
	if (ask)
		nodes->asked_ns = now;
	gmem_mutex_unlock(&nodes->lock);
	if (ask)
		(void)!send(nodes->control, "stale", 5, MSG_DONTWAIT | MSG_NOSIGNAL);
}

void gmem_nodes_wait(struct gmem_nodes *nodes, uint64_t ns)
{
	gmem_mutex_lock(&nodes->lock);
	gmem_mutex_wait(&nodes->lock, &nodes->changed, ns);
	gmem_mutex_unlock(&nodes->lock);
}

unsigned gmem_nodes_of_slot(struct gmem_nodes *nodes, unsigned slot)
{
	unsigned node;

	gmem_mutex_lock(&nodes->lock);
	node = nodes->slots[slot];
	gmem_mutex_unlock(&nodes->lock);
	return node;
}

/* ":7001" is another port of whoever says so. */
static int resolve(const struct gmem_address *from, const char *text, struct gmem_address *ret)
{
	char *end;
	unsigned long port;

	if (text[0] != ':')
		return gmem_address_parse(text, NULL, ret);
	port = strtoul(text + 1, &end, 10);
	if (*end || !port || port > 65535 || from->any.sa_family == AF_UNIX)
		return -EINVAL;
	*ret = *from;
	if (from->any.sa_family == AF_INET)
		ret->in.sin_port = htons((uint16_t)port);
	else
		ret->in6.sin6_port = htons((uint16_t)port);
	return 0;
}

unsigned gmem_nodes_redirect(struct gmem_nodes *nodes, unsigned from, const struct gmem_redirection *to, bool moved)
{
	unsigned found = GMEM_NODE_NONE;
	struct gmem_address address;

	gmem_mutex_lock(&nodes->lock);
	if (!resolve(&nodes->nodes[from]->address, to->address, &address))
		for (unsigned i = 0; i < nodes->count; i++)
			if (gmem_address_equal(&nodes->nodes[i]->address, &address))
				found = i;
	if (moved && found != GMEM_NODE_NONE)
		nodes->slots[to->slot] = (uint16_t)found;
	gmem_mutex_unlock(&nodes->lock);
	return found;
}

/* ---- connections ---- */

/* NULL: a new one is to be made, and counts as lent. */
static int take_idle(struct gmem_nodes *nodes, struct gmem_node *node, struct gmem_wire **ret)
{
	int err = 0;

	gmem_mutex_lock(&nodes->lock);
	*ret = NULL;
	if (node->idle_count)
		*ret = node->idle[--node->idle_count];
	else if (node->lent >= GMEM_NODE_WIRES || gmem_now_ns() < node->refused_until_ns)
		err = -EAGAIN;
	if (!err)
		node->lent++;
	gmem_mutex_unlock(&nodes->lock);
	return err;
}

int gmem_nodes_lend(struct gmem_nodes *nodes, unsigned number, uint64_t deadline_ns, struct gmem_wire **ret)
{
	struct gmem_node *node = nodes->nodes[number];
	uint64_t latest = gmem_now_ns() + nodes->connect_ns;
	char why[GMEM_MESSAGE_MAX];
	int err = take_idle(nodes, node, ret);

	if (err || *ret)
		return err;
	err = gmem_wire_open(&node->address, &nodes->identity, latest < deadline_ns ? latest : deadline_ns, why, ret);
	if (!err)
		return 0;
	gmem_nodes_note(nodes, "%s", why);
	gmem_mutex_lock(&nodes->lock);
	node->lent--;
	node->refused_until_ns = gmem_now_ns() + REFUSED_NS;
	gmem_mutex_unlock(&nodes->lock);
	return err;
}

void gmem_nodes_return(struct gmem_nodes *nodes, unsigned number, struct gmem_wire *wire, bool broken)
{
	struct gmem_node *node = nodes->nodes[number];

	broken |= gmem_wire_out(wire) || wire->rx_begin < wire->rx_end || wire->more;
	gmem_mutex_lock(&nodes->lock);
	node->lent--;
	if (broken) /* the others to that server are not better */
		while (node->idle_count)
			gmem_wire_close(node->idle[--node->idle_count]);
	if (!broken && node->idle_count < GMEM_NODE_IDLE) {
		wire->reused = true;
		wire->rx_begin = wire->rx_end = 0;
		node->idle[node->idle_count++] = wire;
		wire = NULL;
	}
	gmem_mutex_unlock(&nodes->lock);
	if (wire)
		gmem_wire_close(wire);
}
