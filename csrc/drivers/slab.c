/* SPDX-License-Identifier: Apache-2.0
 *
 * How it is shared: a class's lock guards its slabs' bitmaps and lists, and is held for a few loads and stores; memory is
 * charged, punched and copied outside of it. A slab belongs to the class that made it until it is empty and off the
 * lists; from then on only the thread that emptied it knows of it. While a slab is squeezed it is off the lists, so no
 * slot of it is given out again: a place that a squeeze has read can become free, never somebody else's.
 */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <gmem/lockrank.h>
#include <gmem/memfd.h>

#include "slab.h"

#define SHIFT_MIN 3  /* slots of 8 << 3 = 64 bytes */
#define SHIFT_MAX 11 /* to 15 << 11 = 30 KiB */
#define CLASSES (8 * (SHIFT_MAX - SHIFT_MIN + 1))
#define EXTENT_SMALL CLASSES /* in a span of 64 KiB */
#define EXTENT_LARGE (CLASSES + 1)
#define SLOTS_MAX 512
#define GROUPS 4    /* lists of slabs by how full they are: the fullest is used, the emptiest is squeezed */
#define FULL GROUPS /* on no list */
#define NONE UINT32_MAX
#define HEAD_BYTES GMEM_HUGE_BYTES /* of the file, before the spans: of it, one frame is used */
#define MAGIC 0x736c616273676d31ull
#define VERSION 1

/* At the start of the file, for whoever adopts it. */
struct head {
	uint64_t magic, version, limit, large_base;
};

struct slab {
	uint32_t previous, next; /* of its group */
	uint16_t live;
	uint8_t group;
	bool squeezed;           /* off the lists, and whoever squeezes it disposes of it */
	uint64_t used[SLOTS_MAX / 64];
};

struct size_class {
	struct gmem_mutex lock;
	uint32_t slot_bytes, slots, frames; /* (C) */
	uint32_t groups[GROUPS];            /* lock; heads */
	_Atomic uint64_t free_slots;        /* (A) changed under lock; of slabs on the lists */
};

struct spans {
	struct gmem_mutex lock;
	uint64_t base;          /* (C) file offset of the first */
	unsigned shift;         /* (C) */
	uint32_t count;         /* (C) */
	uint32_t fresh;         /* lock; from here on none was ever used */
	uint32_t spare_count;   /* lock */
	uint32_t *spare;        /* lock; those below fresh that are free */
};

struct gmem_slabs {
	struct gmem_quota *quota;         /* (C) */
	struct gmem_file *file;           /* (C) */
	struct spans small, large;
	struct slab *slabs;               /* by span, sparse; guarded by the class's lock */
	uint8_t *taken[2];                /* (C) until settled: by small and by large span, class + 1 of what is there */
	struct size_class classes[CLASSES];
};

static gmem_place_t make_place(uint32_t class_, uint32_t slot, uint32_t span)
{
	return (gmem_place_t)class_ << 41 | (gmem_place_t)slot << 32 | span;
}

static uint32_t class_of(gmem_place_t place)
{
	return (uint32_t)(place >> 41) & 127;
}

static uint32_t slot_of(gmem_place_t place)
{
	return (uint32_t)(place >> 32) & (SLOTS_MAX - 1);
}

static uint32_t span_of(gmem_place_t place)
{
	return (uint32_t)place;
}

/* ---- spans ---- */

static void *sparse_map(uint64_t bytes)
{
	void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	return at == MAP_FAILED ? NULL : at;
}

static int spans_init(struct spans *spans, uint64_t base, unsigned shift, uint32_t count)
{
	*spans = (struct spans){ .base = base, .shift = shift, .count = count };
	gmem_mutex_init(&spans->lock, GMEM_RANK_TIER_SPANS);
	spans->spare = sparse_map(count * sizeof(*spans->spare));
	return spans->spare ? 0 : -ENOMEM;
}

static void spans_deinit(struct spans *spans)
{
	if (spans->spare)
		munmap(spans->spare, spans->count * sizeof(*spans->spare));
	gmem_mutex_deinit(&spans->lock);
}

/* There is a span for each frame that the quota allows, and whoever takes one has charged more than that. */
static int span_take(struct spans *spans, uint32_t *ret)
{
	int err = 0;

	gmem_mutex_lock(&spans->lock);
	if (spans->spare_count)
		*ret = spans->spare[--spans->spare_count];
	else if (spans->fresh < spans->count)
		*ret = spans->fresh++;
	else
		err = -ENOSPC;
	gmem_mutex_unlock(&spans->lock);
	return err;
}

static void span_give(struct spans *spans, uint32_t span)
{
	gmem_mutex_lock(&spans->lock);
	spans->spare[spans->spare_count++] = span;
	gmem_mutex_unlock(&spans->lock);
}

/* Memory and its charge, for the first frames of a span. notes: what the daemon keeps of it. */
static int frames_take(struct gmem_slabs *slabs, struct spans *spans, uint64_t frames, uint64_t notes, uint32_t *ret)
{
	int err = gmem_quota_charge(slabs->quota, frames * GMEM_FRAME_BYTES + notes);

	if (err)
		return err;
	err = span_take(spans, ret);
	if (err)
		gmem_quota_return(slabs->quota, frames * GMEM_FRAME_BYTES + notes);
	return err;
}

static void frames_give(struct gmem_slabs *slabs, struct spans *spans, uint32_t span, uint64_t frames, uint64_t notes)
{
	uint64_t offset = spans->base + ((uint64_t)span << spans->shift);

	if (gmem_file_punch(slabs->file, offset, frames * GMEM_FRAME_BYTES))
		return; /* it is still there: so is its charge */
	span_give(spans, span);
	gmem_quota_return(slabs->quota, frames * GMEM_FRAME_BYTES + notes);
}

/* ---- slabs of one class ---- */

static void unlink_slab_locked(struct gmem_slabs *slabs, struct size_class *c, uint32_t span)
{
	struct slab *slab = &slabs->slabs[span];

	if (slab->group == FULL)
		return;
	if (slab->next != NONE)
		slabs->slabs[slab->next].previous = slab->previous;
	if (slab->previous != NONE)
		slabs->slabs[slab->previous].next = slab->next;
	else
		c->groups[slab->group] = slab->next;
	slab->group = FULL;
}

/* Puts a slab on the list where it belongs now. */
static void link_slab_locked(struct gmem_slabs *slabs, struct size_class *c, uint32_t span)
{
	struct slab *slab = &slabs->slabs[span];
	uint8_t group = slab->live == c->slots ? FULL : (uint8_t)(slab->live * GROUPS / c->slots);

	if (group == slab->group)
		return;
	unlink_slab_locked(slabs, c, span);
	if (group == FULL)
		return;
	slab->group = group;
	slab->previous = NONE;
	slab->next = c->groups[group];
	if (slab->next != NONE)
		slabs->slabs[slab->next].previous = span;
	c->groups[group] = span;
}

static uint32_t take_slot_locked(struct gmem_slabs *slabs, struct size_class *c, uint32_t span)
{
	struct slab *slab = &slabs->slabs[span];
	uint32_t at = 0;

	while (!~slab->used[at])
		at++;
	at = at * 64 + (uint32_t)__builtin_ctzll(~slab->used[at]);
	slab->used[at / 64] |= 1ull << at % 64;
	slab->live++;
	atomic_fetch_sub_explicit(&c->free_slots, 1, memory_order_relaxed);
	link_slab_locked(slabs, c, span);
	return at;
}

static int add_slab(struct gmem_slabs *slabs, struct size_class *c)
{
	struct slab *slab;
	uint32_t span;
	int err = frames_take(slabs, &slabs->small, c->frames, sizeof(*slab), &span);

	if (err)
		return err;
	slab = &slabs->slabs[span];
	*slab = (struct slab){ .group = FULL };
	gmem_mutex_lock(&c->lock);
	link_slab_locked(slabs, c, span);
	atomic_fetch_add_explicit(&c->free_slots, c->slots, memory_order_relaxed);
	gmem_mutex_unlock(&c->lock);
	return 0;
}

static int alloc_slot(struct gmem_slabs *slabs, uint32_t class_, gmem_place_t *ret)
{
	struct size_class *c = &slabs->classes[class_];
	int err = 0;

	while (!err) {
		int group = GROUPS - 1;

		gmem_mutex_lock(&c->lock);
		while (group >= 0 && c->groups[group] == NONE)
			group--;
		if (group >= 0) {
			uint32_t span = c->groups[group];

			*ret = make_place(class_, take_slot_locked(slabs, c, span), span);
		}
		gmem_mutex_unlock(&c->lock);
		if (group >= 0)
			return 0;
		err = add_slab(slabs, c); /* others may be quicker to fill it: look again */
	}
	return err;
}

static void free_slot(struct gmem_slabs *slabs, gmem_place_t place)
{
	struct size_class *c = &slabs->classes[class_of(place)];
	uint32_t slot = slot_of(place), span = span_of(place);
	struct slab *slab = &slabs->slabs[span];
	bool empty = false;

	gmem_mutex_lock(&c->lock);
	slab->used[slot / 64] &= ~(1ull << slot % 64);
	slab->live--;
	if (!slab->squeezed) {
		empty = !slab->live;
		atomic_fetch_add_explicit(&c->free_slots, 1, memory_order_relaxed);
		if (empty) {
			unlink_slab_locked(slabs, c, span);
			atomic_fetch_sub_explicit(&c->free_slots, c->slots, memory_order_relaxed);
		} else {
			link_slab_locked(slabs, c, span);
		}
	}
	gmem_mutex_unlock(&c->lock);
	if (empty)
		frames_give(slabs, &slabs->small, span, c->frames, sizeof(*slab));
}

/* ---- squeezing ---- */

/* The class that would give most, or NULL if none could empty a slab. */
static struct size_class *emptiest_class(struct gmem_slabs *slabs)
{
	struct size_class *best = NULL;
	uint64_t most = 0;

	for (uint32_t i = 0; i < CLASSES; i++) {
		struct size_class *c = &slabs->classes[i];
		uint64_t gain = atomic_load_explicit(&c->free_slots, memory_order_relaxed) / c->slots * c->frames;

		if (gain > most) {
			most = gain;
			best = c;
		}
	}
	return best;
}

static int begin_squeeze(struct gmem_slabs *slabs, struct size_class *c, uint32_t *ret_span, struct slab *ret_copy)
{
	int group = 0, err = -ENOSPC;

	gmem_mutex_lock(&c->lock);
	while (group < GROUPS && c->groups[group] == NONE)
		group++;
	if (group < GROUPS && atomic_load_explicit(&c->free_slots, memory_order_relaxed) >= c->slots) {
		struct slab *slab = &slabs->slabs[c->groups[group]];

		*ret_span = c->groups[group];
		unlink_slab_locked(slabs, c, *ret_span);
		slab->squeezed = true;
		*ret_copy = *slab;
		atomic_fetch_sub_explicit(&c->free_slots, c->slots - slab->live, memory_order_relaxed);
		err = 0;
	}
	gmem_mutex_unlock(&c->lock);
	return err;
}

static int end_squeeze(struct gmem_slabs *slabs, struct size_class *c, uint32_t span)
{
	struct slab *slab = &slabs->slabs[span];
	bool empty;

	gmem_mutex_lock(&c->lock);
	slab->squeezed = false;
	empty = !slab->live;
	if (!empty) {
		atomic_fetch_add_explicit(&c->free_slots, c->slots - slab->live, memory_order_relaxed);
		link_slab_locked(slabs, c, span);
	}
	gmem_mutex_unlock(&c->lock);
	if (!empty)
		return -ENOSPC;
	frames_give(slabs, &slabs->small, span, c->frames, sizeof(*slab));
	return 0;
}

int gmem_slabs_squeeze(struct gmem_slabs *slabs, gmem_slab_move_fn move, void *arg)
{
	struct size_class *c = emptiest_class(slabs);
	struct slab copy;
	uint32_t span;

	if (!c || begin_squeeze(slabs, c, &span, &copy))
		return -ENOSPC;
	for (uint32_t slot = 0; slot < c->slots; slot++) {
		gmem_place_t place = make_place((uint32_t)(c - slabs->classes), slot, span);
		uint64_t offset = slabs->small.base + ((uint64_t)span << slabs->small.shift) + slot * c->slot_bytes, key;

		/* Not written yet: whatever key it reads, the index knows nothing of it at this place. */
		if ((copy.used[slot / 64] >> slot % 64 & 1) &&
		    !gmem_file_read(slabs->file, offset, &key, sizeof(key)))
			move(arg, key, place);
	}
	return end_squeeze(slabs, c, span);
}

static uint64_t offset_of(struct gmem_slabs *slabs, gmem_place_t place)
{
	uint32_t class_ = class_of(place);
	struct spans *spans = class_ == EXTENT_LARGE ? &slabs->large : &slabs->small;
	uint64_t offset = spans->base + ((uint64_t)span_of(place) << spans->shift);

	return class_ < CLASSES ? offset + slot_of(place) * slabs->classes[class_].slot_bytes : offset;
}

int gmem_slabs_copy(struct gmem_slabs *slabs, gmem_place_t place, gmem_place_t *ret)
{
	uint8_t buffer[15 << SHIFT_MAX];
	uint64_t bytes = slabs->classes[class_of(place)].slot_bytes;
	gmem_place_t to;
	int err = gmem_file_read(slabs->file, offset_of(slabs, place), buffer, bytes);

	if (!err)
		err = alloc_slot(slabs, class_of(place), &to);
	if (err)
		return err;
	err = gmem_file_write(slabs->file, offset_of(slabs, to), buffer, bytes);
	if (err)
		free_slot(slabs, to);
	else
		*ret = to;
	return err;
}

/* ---- strings ---- */

int gmem_slabs_alloc(struct gmem_slabs *slabs, uint64_t bytes, gmem_place_t *ret)
{
	uint64_t slot = bytes + GMEM_SLOT_HEADER, frames = (bytes + GMEM_FRAME_BYTES - 1) / GMEM_FRAME_BYTES;
	uint32_t shift = SHIFT_MIN, eighths, class_, span;
	struct spans *spans;
	int err;

	if (!bytes || bytes > GMEM_HUGE_BYTES)
		return -EINVAL;
	if (slot <= 15 << SHIFT_MAX && bytes % GMEM_FRAME_BYTES) {
		while (slot > 15ull << shift)
			shift++;
		eighths = (uint32_t)((slot + (1ull << shift) - 1) >> shift);
		return alloc_slot(slabs, 8 * (shift - SHIFT_MIN) + (eighths > 8 ? eighths - 8 : 0), ret);
	}
	class_ = frames * GMEM_FRAME_BYTES > 1ull << slabs->small.shift ? EXTENT_LARGE : EXTENT_SMALL;
	spans = class_ == EXTENT_LARGE ? &slabs->large : &slabs->small;
	err = frames_take(slabs, spans, frames, 0, &span);
	if (!err)
		*ret = make_place(class_, (uint32_t)frames - 1, span);
	return err;
}

void gmem_slabs_free(struct gmem_slabs *slabs, gmem_place_t place)
{
	if (class_of(place) < CLASSES)
		free_slot(slabs, place);
	else
		frames_give(slabs, class_of(place) == EXTENT_LARGE ? &slabs->large : &slabs->small, span_of(place),
			    slot_of(place) + 1, 0);
}

int gmem_slabs_write(struct gmem_slabs *slabs, gmem_place_t place, uint64_t key, uint8_t *data, uint64_t bytes)
{
	uint64_t offset = offset_of(slabs, place);

	if (class_of(place) >= CLASSES)
		return gmem_file_write(slabs->file, offset, data, bytes);
	memcpy(data - GMEM_SLOT_HEADER, &key, GMEM_SLOT_HEADER);
	return gmem_file_write(slabs->file, offset, data - GMEM_SLOT_HEADER, GMEM_SLOT_HEADER + bytes);
}

int gmem_slabs_read(struct gmem_slabs *slabs, gmem_place_t place, uint64_t from, void *dst, uint64_t bytes)
{
	uint64_t header = class_of(place) < CLASSES ? GMEM_SLOT_HEADER : 0;

	return gmem_file_read(slabs->file, offset_of(slabs, place) + header + from, dst, bytes);
}

/* ---- a predecessor's ---- */

static int take_span(struct gmem_slabs *slabs, bool large, gmem_place_t place, bool *ret_new)
{
	struct spans *spans = large ? &slabs->large : &slabs->small;
	uint32_t span = span_of(place);
	uint8_t mine = (uint8_t)(class_of(place) + 1);

	if (span >= spans->count || (slabs->taken[large][span] && (slabs->taken[large][span] != mine || mine > CLASSES)))
		return -EPROTO;
	*ret_new = !slabs->taken[large][span];
	slabs->taken[large][span] = mine;
	if (span >= spans->fresh)
		spans->fresh = span + 1;
	return 0;
}

static int take_in_slab(struct gmem_slabs *slabs, gmem_place_t place, bool is_new)
{
	struct size_class *c = &slabs->classes[class_of(place)];
	struct slab *slab = &slabs->slabs[span_of(place)];
	uint64_t bit = 1ull << slot_of(place) % 64;

	if (is_new) {
		*slab = (struct slab){ .group = FULL };
		atomic_fetch_add(&slabs->quota->used, c->frames * GMEM_FRAME_BYTES + sizeof(*slab));
	}
	if (slot_of(place) >= c->slots || (slab->used[slot_of(place) / 64] & bit))
		return -EPROTO;
	slab->used[slot_of(place) / 64] |= bit;
	slab->live++;
	return 0;
}

int gmem_slabs_take(struct gmem_slabs *slabs, gmem_place_t place)
{
	bool large = class_of(place) == EXTENT_LARGE, is_new;
	int err = class_of(place) > EXTENT_LARGE ? -EPROTO : take_span(slabs, large, place, &is_new);

	if (err)
		return err;
	if (class_of(place) < CLASSES)
		return take_in_slab(slabs, place, is_new);
	atomic_fetch_add(&slabs->quota->used, (slot_of(place) + 1ull) * GMEM_FRAME_BYTES);
	return 0;
}

/* What nobody has taken is free, and has no memory, whatever was being written there. */
static void settle_spans(struct gmem_slabs *slabs, bool large)
{
	struct spans *spans = large ? &slabs->large : &slabs->small;

	for (uint32_t span = 0; span < spans->fresh; span++) {
		uint8_t class_ = slabs->taken[large][span];
		struct size_class *c = &slabs->classes[class_ ? class_ - 1u : 0];

		if (!class_) {
			spans->spare[spans->spare_count++] = span;
			gmem_file_punch(slabs->file, spans->base + ((uint64_t)span << spans->shift), 1ull << spans->shift);
		} else if (class_ <= CLASSES) {
			gmem_mutex_lock(&c->lock);
			atomic_fetch_add(&c->free_slots, c->slots - slabs->slabs[span].live);
			link_slab_locked(slabs, c, span);
			gmem_mutex_unlock(&c->lock);
		}
	}
	/* beyond what is known there may be what was new when the predecessor ended */
	gmem_file_punch(slabs->file, spans->base + ((uint64_t)spans->fresh << spans->shift),
			(uint64_t)(spans->count - spans->fresh) << spans->shift);
}

void gmem_slabs_settle(struct gmem_slabs *slabs)
{
	for (int large = 0; large < 2; large++) {
		if (slabs->taken[large])
			settle_spans(slabs, large);
		free(slabs->taken[large]);
		slabs->taken[large] = NULL;
	}
}

/* ---- all of it ---- */

static void init_classes(struct gmem_slabs *slabs)
{
	for (uint32_t i = 0; i < CLASSES; i++) {
		struct size_class *c = &slabs->classes[i];
		uint32_t eighths = 8 + i % 8;

		gmem_mutex_init(&c->lock, GMEM_RANK_TIER);
		c->slot_bytes = eighths << (SHIFT_MIN + i / 8);
		c->frames = eighths % 2 ? eighths : eighths / 2;
		c->slots = c->frames * GMEM_FRAME_BYTES / c->slot_bytes;
		for (int g = 0; g < GROUPS; g++)
			c->groups[g] = NONE;
	}
}

static int make_file(struct gmem_slabs *slabs, const char *name)
{
	uint64_t large_base = slabs->large.base;
	struct head head = { MAGIC, VERSION, slabs->quota->limit, large_base };
	int err = gmem_file_create(name, GMEM_CLASS_SMALL, large_base + ((uint64_t)slabs->large.count << slabs->large.shift),
				   0, &slabs->file);

	if (!err)
		err = gmem_quota_charge(slabs->quota, GMEM_FRAME_BYTES);
	return err ? err : gmem_file_write(slabs->file, 0, &head, sizeof(head));
}

static int adopt_file(struct gmem_slabs *slabs, int fd)
{
	uint64_t bytes = slabs->large.base + ((uint64_t)slabs->large.count << slabs->large.shift);
	struct head head;
	struct stat st;
	int err = fstat(fd, &st) || (uint64_t)st.st_size != bytes || pread(fd, &head, sizeof(head), 0) != sizeof(head) ||
		  head.magic != MAGIC || head.version != VERSION || head.limit != slabs->quota->limit ? -EPROTO : 0;

	slabs->taken[0] = calloc(slabs->small.count, 1);
	slabs->taken[1] = calloc(slabs->large.count, 1);
	if (!err && (!slabs->taken[0] || !slabs->taken[1]))
		err = -ENOMEM;
	if (!err)
		err = gmem_file_adopt(fd, GMEM_CLASS_SMALL, bytes, 0, &slabs->file);
	if (!err)
		atomic_fetch_add(&slabs->quota->used, GMEM_FRAME_BYTES);
	return err;
}

int gmem_slabs_fd(const struct gmem_slabs *slabs)
{
	return slabs->file->fd;
}

int gmem_slabs_create(const char *name, struct gmem_quota *quota, int fd, struct gmem_slabs **ret)
{
	uint32_t small = (uint32_t)(quota->limit / GMEM_FRAME_BYTES), large = small / 17 + 1; /* large: 17 frames or more */
	uint64_t large_base = HEAD_BYTES + (((uint64_t)small << GMEM_SHIFT_64K) + GMEM_HUGE_BYTES - 1) / GMEM_HUGE_BYTES *
					       GMEM_HUGE_BYTES;
	struct gmem_slabs *slabs = calloc(1, sizeof(*slabs));
	int err, err_large;

	if (!slabs)
		return -ENOMEM;
	slabs->quota = quota;
	init_classes(slabs);
	err = spans_init(&slabs->small, HEAD_BYTES, GMEM_SHIFT_64K, small);
	err_large = spans_init(&slabs->large, large_base, GMEM_SHIFT_2M, large);
	slabs->slabs = sparse_map(small * sizeof(*slabs->slabs));
	if (!err)
		err = err_large ? err_large : !slabs->slabs ? -ENOMEM : fd >= 0 ? adopt_file(slabs, fd) : make_file(slabs, name);
	if (err)
		gmem_slabs_destroy(slabs);
	else
		*ret = slabs;
	return err;
}

void gmem_slabs_destroy(struct gmem_slabs *slabs)
{
	for (uint32_t i = 0; i < CLASSES; i++)
		gmem_mutex_deinit(&slabs->classes[i].lock);
	if (slabs->slabs)
		munmap(slabs->slabs, slabs->small.count * sizeof(*slabs->slabs));
	spans_deinit(&slabs->small);
	spans_deinit(&slabs->large);
	free(slabs->taken[0]);
	free(slabs->taken[1]);
	gmem_file_unref(slabs->file);
	free(slabs);
}

uint64_t gmem_slabs_slack_max(void)
{
	uint64_t bytes = 0;

	for (uint32_t i = 0; i < CLASSES; i++)
		bytes += (8 + i % 8) / (i % 2 ? 1 : 2) * GMEM_FRAME_BYTES + sizeof(struct slab);
	return bytes;
}

bool gmem_slabs_is_valid(struct gmem_slabs *slabs)
{
	bool valid = slabs->small.fresh <= slabs->small.count && slabs->small.spare_count <= slabs->small.fresh;

	for (uint32_t i = 0; i < CLASSES; i++) {
		struct size_class *c = &slabs->classes[i];
		uint64_t free_slots = 0;

		for (int g = 0; g < GROUPS; g++) {
			uint32_t previous = NONE;

			for (uint32_t span = c->groups[g]; span != NONE; previous = span, span = slabs->slabs[span].next) {
				struct slab *slab = &slabs->slabs[span];
				uint32_t live = 0;

				for (int w = 0; w < SLOTS_MAX / 64; w++)
					live += (uint32_t)__builtin_popcountll(slab->used[w]);
				valid = valid && live == slab->live && live < c->slots && slab->group == g &&
					slab->previous == previous && !slab->squeezed;
				free_slots += c->slots - live;
			}
		}
		valid = valid && free_slots == atomic_load(&c->free_slots);
	}
	return valid;
}
