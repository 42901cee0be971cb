/* SPDX-License-Identifier: Apache-2.0
 *
 * A server of pages for tests: speaks as much RESP as the remote tier does, keeps values in a list, and misbehaves when
 * it is told to. It runs in threads of the test.
 */
#ifndef FAKESERVER_H
#define FAKESERVER_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct fake_value {
	char *name;
	uint8_t *bytes;
	size_t size;
	struct fake_value *next;
};

struct fake_server {
	char address[32]; /* "127.0.0.1:PORT" */
	int listener;
	pthread_t thread;
	pthread_mutex_t lock;
	struct fake_value *values; /* lock */
	unsigned count;            /* lock */
	_Atomic unsigned open; /* connections */
	_Atomic unsigned commands, connections, sets, gets, ranges, drops, waits, askings, auths;
	/* how it misbehaves */
	_Atomic(const char *) answer; /* said instead of an answer, so many times ... */
	_Atomic int answer_times;     /* (-1: always) */
	_Atomic(const char *) word;   /* ... to this command only; NULL: to any */
	_Atomic int cut;              /* so many connections are closed in the middle of a value that is sent */
	_Atomic int hang;             /* so many commands are never answered */
	_Atomic bool refuses;         /* closes each new connection */
	_Atomic bool corks;           /* the answer to a SET goes with the next one; new connections take little ahead */
	_Atomic unsigned replicas;    /* what WAIT says */
	_Atomic(const char *) password;
	_Atomic bool stop;
};

struct fake_server *fake_start(void);
void fake_stop(struct fake_server *server); /* all connections have been closed */
/* Misbehaves so many times. "@" in answer: the slot of the key that was asked for. */
void fake_answer(struct fake_server *server, const char *word, const char *answer, int times);
/* Flips a byte of each value. */
void fake_damage(struct fake_server *server);
void fake_forget(struct fake_server *server);
unsigned fake_count(struct fake_server *server);

#endif
