/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <gmem/event.h>

int gmem_events_init(struct gmem_events *events)
{
	events->fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (events->fd < 0)
		return -errno;
	gmem_mutex_init(&events->lock, GMEM_RANK_EVENT);
	events->head = events->count = 0;
	events->lost = 0;
	return 0;
}

void gmem_events_deinit(struct gmem_events *events)
{
	close(events->fd);
	gmem_mutex_deinit(&events->lock);
}

void gmem_events_post(struct gmem_events *events, const struct gmem_event *event)
{
	uint64_t one = 1;
	bool posted = false;

	gmem_mutex_lock(&events->lock);
	if (events->count < GMEM_EVENT_RING) {
		events->ring[(events->head + events->count++) % GMEM_EVENT_RING] = *event;
		posted = true;
	} else {
		events->lost++;
	}
	gmem_mutex_unlock(&events->lock);
	if (posted && write(events->fd, &one, sizeof(one)) < 0) {
		/* EAGAIN: the counter is at its maximum, so it is readable anyway */
	}
}

size_t gmem_events_read(struct gmem_events *events, struct gmem_event *ret, size_t capacity)
{
	uint64_t count;
	size_t n = 0;

	gmem_mutex_lock(&events->lock);
	while (n < capacity && events->count) {
		ret[n++] = events->ring[events->head];
		events->head = (events->head + 1) % GMEM_EVENT_RING;
		events->count--;
	}
	if (!events->count && read(events->fd, &count, sizeof(count)) < 0) {
		/* EAGAIN: nothing was signalled since the last read */
	}
	gmem_mutex_unlock(&events->lock);
	return n;
}
