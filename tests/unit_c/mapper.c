/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "mapper.h"

#include <errno.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "harness.h"

static void import_locked(struct mapper *mapper, uint32_t frame, int fd)
{
	CHECK(!mapper->frames[frame].memory);
	mapper->frames[frame].memory = mmap(NULL, mapper->hello.frame_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	CHECK(mapper->frames[frame].memory != MAP_FAILED);
	close(fd);
}

static void let_go_locked(struct mapper *mapper, uint32_t frame)
{
	CHECK(mapper->frames[frame].memory && !mapper->frames[frame].va);
	munmap(mapper->frames[frame].memory, mapper->hello.frame_bytes);
	mapper->frames[frame].memory = NULL;
}

static void map_locked(struct mapper *mapper, const struct gmem_channel_step *step)
{
	CHECK(mapper->frames[step->frame].memory && !mapper->frames[step->frame].va && step->va);
	for (uint32_t n = 0; n < mapper->hello.frame_count; n++)
		CHECK(mapper->frames[n].va != step->va);
	mapper->frames[step->frame].va = step->va;
	mapper->frames[step->frame].writable = step->writable;
}

static void do_step_locked(struct mapper *mapper, const struct gmem_channel_step *step, const int *fds, size_t *used)
{
	CHECK(step->frame < mapper->hello.frame_count);
	switch (step->op) {
	case GMEM_CHANNEL_IMPORT:
		import_locked(mapper, step->frame, fds[(*used)++]);
		mapper->counts.imports++;
		break;
	case GMEM_CHANNEL_FORGET:
		let_go_locked(mapper, step->frame);
		mapper->counts.forgets++;
		break;
	case GMEM_CHANNEL_MAP:
		map_locked(mapper, step);
		mapper->counts.maps++;
		break;
	case GMEM_CHANNEL_UNMAP:
		CHECK(step->va && mapper->frames[step->frame].va == step->va);
		mapper->frames[step->frame].va = 0;
		mapper->counts.unmaps++;
		break;
	default:
		CHECK_EQ(step->op, GMEM_CHANNEL_PROTECT);
		CHECK(step->va && mapper->frames[step->frame].va == step->va);
		mapper->frames[step->frame].writable = step->writable;
		mapper->counts.protects++;
	}
}

static void send_list(struct mapper *mapper, struct gmem_channel_list *list)
{
	size_t bytes = offsetof(struct gmem_channel_list, frames) + list->count * sizeof(list->frames[0]);

	if (list->count)
		send(mapper->fd, list, bytes, MSG_NOSIGNAL);
	list->count = 0;
}

/* What it has, in messages that are not full, so that there are several. */
static void list_locked(struct mapper *mapper, uint64_t sequence)
{
	struct gmem_channel_list list = { .sequence = sequence };

	for (uint32_t n = 0; n < mapper->hello.frame_count; n++) {
		if (!mapper->frames[n].memory)
			continue;
		list.frames[list.count++] = (struct gmem_channel_frame){ n, mapper->frames[n].writable, mapper->frames[n].va };
		if (mapper->mood == MAPPER_LIES)
			list.frames[list.count - 1].va += 4096;
		if (list.count == 3)
			send_list(mapper, &list);
	}
	send_list(mapper, &list);
	mapper->counts.lists++;
	mapper->counts.batches = 0; /* they are counted from 1 again */
}

/* One batch and its descriptors; false: the other end has gone. */
static bool receive(struct mapper *mapper, struct gmem_channel_batch *batch, int *fds, size_t *ret_count)
{
	union {
		struct cmsghdr head;
		char room[CMSG_SPACE(GMEM_CHANNEL_STEPS * sizeof(int))];
	} control;
	struct iovec part = { batch, sizeof(*batch) };
	struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = &control,
				  .msg_controllen = sizeof(control) };
	struct cmsghdr *c;
	ssize_t n = recvmsg(mapper->fd, &message, MSG_CMSG_CLOEXEC);

	if (n <= 0)
		return false;
	CHECK(batch->count && batch->count <= GMEM_CHANNEL_STEPS);
	CHECK_EQ(n, offsetof(struct gmem_channel_batch, steps) + batch->count * sizeof(batch->steps[0]));
	CHECK(!(message.msg_flags & (MSG_TRUNC | MSG_CTRUNC)));
	c = CMSG_FIRSTHDR(&message);
	*ret_count = c ? (c->cmsg_len - CMSG_LEN(0)) / sizeof(int) : 0;
	if (c)
		memcpy(fds, CMSG_DATA(c), *ret_count * sizeof(int));
	return true;
}

static void answer(struct mapper *mapper, enum mapper_mood mood, uint64_t sequence)
{
	struct gmem_channel_done done = { .sequence = mood == MAPPER_CONFUSED ? sequence + 7 : sequence };

	if (mood == MAPPER_FAILS) {
		done.status = -EIO;
		done.error = 2;
	}
	if (mood == MAPPER_LEAVES)
		shutdown(mapper->fd, SHUT_RDWR);
	else if (mood != MAPPER_SILENT)
		send(mapper->fd, &done, sizeof(done) - (mood == MAPPER_CURT ? 1 : 0), MSG_NOSIGNAL);
}

static void *run(void *arg)
{
	struct mapper *mapper = arg;
	struct gmem_channel_batch batch;
	int fds[GMEM_CHANNEL_STEPS];
	size_t count, used;

	while (receive(mapper, &batch, fds, &count)) {
		enum mapper_mood mood;

		pthread_mutex_lock(&mapper->lock);
		used = 0;
		if (batch.steps[0].op == GMEM_CHANNEL_LIST) {
			CHECK(batch.count == 1 && batch.sequence >> 63);
			list_locked(mapper, batch.sequence);
		} else {
			CHECK_EQ(batch.sequence, ++mapper->counts.batches);
			for (uint32_t i = 0; i < batch.count; i++)
				do_step_locked(mapper, &batch.steps[i], fds, &used);
		}
		CHECK_EQ(used, count);
		mood = mapper->mood;
		pthread_mutex_unlock(&mapper->lock);
		answer(mapper, mood, batch.sequence);
	}
	pthread_mutex_lock(&mapper->lock);
	mapper->ended = true;
	for (uint32_t n = 0; n < mapper->hello.frame_count; n++)
		if (mapper->frames[n].memory) {
			mapper->frames[n].va = 0;
			let_go_locked(mapper, n);
		}
	pthread_mutex_unlock(&mapper->lock);
	return NULL;
}

void mapper_start(struct mapper *mapper, int fd)
{
	*mapper = (struct mapper){ .fd = fd };
	CHECK_EQ(recv(fd, &mapper->hello, sizeof(mapper->hello), 0), sizeof(mapper->hello));
	CHECK_EQ(mapper->hello.magic, GMEM_CHANNEL_MAGIC);
	CHECK_EQ(mapper->hello.version, GMEM_CHANNEL_VERSION);
	CHECK(mapper->hello.frame_count && mapper->hello.frame_count <= MAPPER_FRAMES);
	pthread_mutex_init(&mapper->lock, NULL);
	CHECK(!pthread_create(&mapper->thread, NULL, run, mapper));
}

void mapper_set_mood(struct mapper *mapper, enum mapper_mood mood)
{
	pthread_mutex_lock(&mapper->lock);
	mapper->mood = mood;
	pthread_mutex_unlock(&mapper->lock);
}

uint8_t *mapper_at(struct mapper *mapper, uint64_t va, bool write)
{
	uint64_t offset = va % mapper->hello.frame_bytes;
	uint8_t *found = NULL;

	pthread_mutex_lock(&mapper->lock);
	for (uint32_t n = 0; n < mapper->hello.frame_count; n++)
		if (mapper->frames[n].va == va - offset && (mapper->frames[n].writable || !write))
			found = mapper->frames[n].memory + offset;
	pthread_mutex_unlock(&mapper->lock);
	return found;
}

struct mapper_counts mapper_counts(struct mapper *mapper)
{
	struct mapper_counts counts;

	pthread_mutex_lock(&mapper->lock);
	counts = mapper->counts;
	pthread_mutex_unlock(&mapper->lock);
	return counts;
}

unsigned mapper_holds(struct mapper *mapper)
{
	unsigned count = 0;

	pthread_mutex_lock(&mapper->lock);
	for (uint32_t n = 0; n < mapper->hello.frame_count; n++)
		count += mapper->frames[n].memory != NULL;
	pthread_mutex_unlock(&mapper->lock);
	return count;
}

bool mapper_has_ended(struct mapper *mapper)
{
	bool ended;

	for (int i = 0; i < 5000; i++) { /* it takes its thread a moment to see it */
		pthread_mutex_lock(&mapper->lock);
		ended = mapper->ended;
		pthread_mutex_unlock(&mapper->lock);
		if (ended)
			return true;
		sleep_ms(1);
	}
	return false;
}

void mapper_end(struct mapper *mapper)
{
	shutdown(mapper->fd, SHUT_RDWR);
	pthread_join(mapper->thread, NULL);
	close(mapper->fd);
	pthread_mutex_destroy(&mapper->lock);
}
