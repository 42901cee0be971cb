/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "fakeserver.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "../../csrc/drivers/resp.h"
#include "harness.h"

#define ARGUMENTS 8

struct connection {
	struct fake_server *server;
	int fd;
	FILE *in;
	bool known; /* it has given the password */
	bool asking;
};

struct command {
	unsigned count;
	char *words[ARGUMENTS];
	size_t sizes[ARGUMENTS];
};

static bool read_command(FILE *in, struct command *command)
{
	unsigned long count, size;

	memset(command, 0, sizeof(*command));
	if (fscanf(in, "*%lu\r\n", &count) != 1 || !count || count > ARGUMENTS)
		return false;
	for (; command->count < count; command->count++) {
		char *word, end[2];

		if (fscanf(in, "$%lu", &size) != 1 || fread(end, 1, 2, in) != 2)
			return false;
		word = malloc(size + 1);
		command->words[command->count] = word;
		command->sizes[command->count] = size;
		word[size] = '\0';
		if ((size && fread(word, 1, size, in) != size) || fread(end, 1, 2, in) != 2 || memcmp(end, "\r\n", 2)) {
			command->count++;
			return false;
		}
	}
	return true;
}

static void send_all(int fd, const void *data, size_t bytes)
{
	const char *at = data;

	while (bytes) {
		ssize_t n = send(fd, at, bytes, MSG_NOSIGNAL);

		if (n <= 0)
			return;
		at += n;
		bytes -= (size_t)n;
	}
}

static void say(int fd, const char *text)
{
	send_all(fd, text, strlen(text));
}

static void say_number(int fd, char type, long number)
{
	char text[32];

	snprintf(text, sizeof(text), "%c%ld\r\n", type, number);
	say(fd, text);
}

static struct fake_value **find(struct fake_server *server, const char *name)
{
	struct fake_value **at = &server->values;

	while (*at && strcmp((*at)->name, name))
		at = &(*at)->next;
	return at;
}

static void drop(struct fake_server *server, struct fake_value **at)
{
	struct fake_value *value = *at;

	*at = value->next;
	free(value->name);
	free(value->bytes);
	free(value);
	server->count--;
}

static void set(struct connection *c, struct command *command)
{
	struct fake_server *server = c->server;
	struct fake_value *value = malloc(sizeof(*value)), **old;

	pthread_mutex_lock(&server->lock);
	old = find(server, command->words[1]);
	if (*old)
		drop(server, old);
	*value = (struct fake_value){ strdup(command->words[1]), (uint8_t *)command->words[2], command->sizes[2], server->values };
	command->words[2] = NULL;
	server->values = value;
	server->count++;
	pthread_mutex_unlock(&server->lock);
	atomic_fetch_add(&server->sets, 1);
	send(c->fd, "+OK\r\n", 5, MSG_NOSIGNAL | (atomic_load(&server->corks) ? MSG_MORE : 0));
}

static bool take_one(_Atomic int *times)
{
	int left = atomic_load(times);

	while (left > 0 && !atomic_compare_exchange_weak(times, &left, left - 1))
		;
	return left > 0 || left < 0;
}

/* False: the connection is cut. */
static bool get(struct connection *c, const char *name, size_t first, size_t last)
{
	struct fake_server *server = c->server;
	struct fake_value *value;
	uint8_t *bytes = NULL;
	size_t size = 0;
	bool found;

	pthread_mutex_lock(&server->lock);
	value = *find(server, name);
	found = value;
	if (found && first < value->size) {
		size = (last < value->size - 1 ? last : value->size - 1) - first + 1;
		bytes = malloc(size);
		memcpy(bytes, value->bytes + first, size);
	}
	pthread_mutex_unlock(&server->lock);
	if (!found && last == SIZE_MAX) {
		say(c->fd, "$-1\r\n");
		return true;
	}
	say_number(c->fd, '$', (long)size);
	if (size && take_one(&server->cut)) {
		send_all(c->fd, bytes, size / 2);
		free(bytes);
		return false;
	}
	send_all(c->fd, bytes, size);
	free(bytes);
	say(c->fd, "\r\n");
	return true;
}

static void unlink_value(struct connection *c, const char *name)
{
	struct fake_server *server = c->server;
	struct fake_value **at;
	bool found;

	pthread_mutex_lock(&server->lock);
	at = find(server, name);
	found = *at;
	if (found)
		drop(server, at);
	pthread_mutex_unlock(&server->lock);
	atomic_fetch_add(&server->drops, 1);
	say_number(c->fd, ':', found);
}

static void authenticate(struct connection *c, const struct command *command)
{
	const char *password = atomic_load(&c->server->password);

	atomic_fetch_add(&c->server->auths, 1);
	c->known = password && !strcmp(command->words[command->count - 1], password);
	say(c->fd, c->known ? "+OK\r\n" : "-WRONGPASS invalid username-password pair or user is disabled.\r\n");
}

/* "@" in it is the slot of the command's key. */
static void misbehave(struct connection *c, const struct command *command)
{
	const char *answer = atomic_load(&c->server->answer), *at = strchr(answer, '@');
	char text[128];

	if (!at || command->count < 2) {
		say(c->fd, answer);
		return;
	}
	snprintf(text, sizeof(text), "%.*s%u%s", (int)(at - answer), answer,
		 gmem_resp_slot(command->words[1], command->sizes[1]), at + 1);
	say(c->fd, text);
}

static bool serve(struct connection *c, struct command *command)
{
	struct fake_server *server = c->server;
	const char *word = command->words[0], *only = atomic_load(&server->word);

	atomic_fetch_add(&server->commands, 1);
	if (!strcmp(word, "AUTH")) {
		authenticate(c, command);
		return true;
	}
	if (atomic_load(&server->password) && !c->known) {
		say(c->fd, "-NOAUTH Authentication required.\r\n");
		return true;
	}
	if (take_one(&server->hang))
		return true;
	if ((!only || !strcmp(only, word)) && take_one(&server->answer_times)) {
		misbehave(c, command);
		return true;
	}
	if (!strcmp(word, "SET") && command->count == 3)
		set(c, command);
	else if (!strcmp(word, "GET") && command->count == 2)
		return atomic_fetch_add(&server->gets, 1), get(c, command->words[1], 0, SIZE_MAX);
	else if (!strcmp(word, "GETRANGE") && command->count == 4)
		return atomic_fetch_add(&server->ranges, 1), get(c, command->words[1], strtoul(command->words[2], NULL, 10),
								 strtoul(command->words[3], NULL, 10));
	else if (!strcmp(word, "UNLINK") && command->count == 2)
		unlink_value(c, command->words[1]);
	else if (!strcmp(word, "WAIT") && command->count == 3)
		atomic_fetch_add(&server->waits, 1), say_number(c->fd, ':', (long)atomic_load(&server->replicas));
	else if (!strcmp(word, "ASKING"))
		atomic_fetch_add(&server->askings, 1), say(c->fd, "+OK\r\n");
	else
		say(c->fd, "-ERR unknown command\r\n");
	return true;
}

static void *connection_thread(void *arg)
{
	struct connection *c = arg;
	struct command command;
	bool goes_on = true;

	while (goes_on && !atomic_load(&c->server->stop)) {
		goes_on = read_command(c->in, &command) && serve(c, &command);
		for (unsigned i = 0; i < command.count; i++)
			free(command.words[i]);
	}
	shutdown(c->fd, SHUT_RDWR);
	fclose(c->in);
	close(c->fd);
	atomic_fetch_sub(&c->server->open, 1);
	free(c);
	return NULL;
}

static void *listener_thread(void *arg)
{
	struct fake_server *server = arg;
	pthread_t thread;
	int one = 1, little = 32768;

	while (!atomic_load(&server->stop)) {
		struct pollfd p = { .fd = server->listener, .events = POLLIN };
		struct connection *c;
		int fd;

		if (poll(&p, 1, 20) <= 0)
			continue;
		fd = accept(server->listener, NULL, NULL);
		if (fd < 0)
			continue;
		atomic_fetch_add(&server->connections, 1);
		if (atomic_load(&server->refuses)) {
			close(fd);
			continue;
		}
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
		if (atomic_load(&server->corks))
			setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &little, sizeof(little));
		atomic_fetch_add(&server->open, 1);
		c = calloc(1, sizeof(*c));
		c->server = server;
		c->fd = fd;
		c->in = fdopen(dup(fd), "r");
		CHECK(!pthread_create(&thread, NULL, connection_thread, c));
		pthread_detach(thread);
	}
	return NULL;
}

struct fake_server *fake_start(void)
{
	struct sockaddr_in at = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	struct fake_server *server = calloc(1, sizeof(*server));
	socklen_t bytes = sizeof(at);

	server->listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	CHECK(!bind(server->listener, (struct sockaddr *)&at, sizeof(at)) && !listen(server->listener, 64));
	CHECK(!getsockname(server->listener, (struct sockaddr *)&at, &bytes));
	snprintf(server->address, sizeof(server->address), "127.0.0.1:%u", ntohs(at.sin_port));
	pthread_mutex_init(&server->lock, NULL);
	CHECK(!pthread_create(&server->thread, NULL, listener_thread, server));
	return server;
}

void fake_stop(struct fake_server *server)
{
	atomic_store(&server->stop, true);
	pthread_join(server->thread, NULL);
	close(server->listener);
	for (int i = 0; i < 500 && atomic_load(&server->open); i++)
		usleep(10000);
	CHECK(!atomic_load(&server->open)); /* whoever is done with it has closed everything */
	usleep(10000);                      /* the last thread's last step */
	fake_forget(server);
	pthread_mutex_destroy(&server->lock);
	free(server);
}

void fake_answer(struct fake_server *server, const char *word, const char *answer, int times)
{
	atomic_store(&server->answer_times, 0);
	atomic_store(&server->word, word);
	atomic_store(&server->answer, answer);
	atomic_store(&server->answer_times, times);
}

void fake_damage(struct fake_server *server)
{
	pthread_mutex_lock(&server->lock);
	for (struct fake_value *v = server->values; v; v = v->next)
		v->bytes[v->size / 2] ^= 1;
	pthread_mutex_unlock(&server->lock);
}

void fake_forget(struct fake_server *server)
{
	pthread_mutex_lock(&server->lock);
	while (server->values)
		drop(server, &server->values);
	pthread_mutex_unlock(&server->lock);
}

unsigned fake_count(struct fake_server *server)
{
	unsigned count;

	pthread_mutex_lock(&server->lock);
	count = server->count;
	pthread_mutex_unlock(&server->lock);
	return count;
}
