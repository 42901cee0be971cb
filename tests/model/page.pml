/* SPDX-License-Identifier: Apache-2.0
 *
 * The page protocol (csrc/migrate.c, csrc/recover.c) for one page, the host and two devices, with a daemon that can be
 * killed between any two steps, in recovery too. Accessors read and write through their mapping, or fault and wait.
 *
 * Checked: a read sees the last write (nothing lost, nothing stale, never zeros instead); who writes is alone; everybody is
 * served in the end (an accessor that waits for ever is an invalid end state).
 *
 * Each WITHOUT_* takes one guard out of the protocol, and must make the check fail: page.py.
 */
#define HOST 0
#define HNODES 3
#define NOBODY 3
#define GARBAGE 15

#ifndef CRASHES
#define CRASHES 2
#endif
#ifndef EVICTIONS
#define EVICTIONS 2
#endif
#ifndef ACCESSES
#define ACCESSES 2
#endif

mtype = { NOMAP, RESIDENT, BUSY };       /* of the word */
mtype = { MAP, FILL, UPGRADE };          /* its direction */
mtype = { NONE, READ_ONLY, WRITABLE };   /* of a mapping */

/* the word, in memory that outlives the daemon */
mtype state = NOMAP;
mtype dir = MAP;
byte target = 0, valid = 0, writer = NOBODY;

/* memory and page tables */
bool present[HNODES];
byte content[HNODES];
mtype mapping[HNODES] = NONE;

bool wants_read[HNODES], wants_write[HNODES]; /* faults that wait */
byte last = 0;                                /* what was written last */
byte crashes = 0, evictions = 0, running = HNODES;

#define BIT(h) (1 << (h))
#define ALONE(h) (mapping[((h) + 1) % HNODES] == NONE && mapping[((h) + 2) % HNODES] == NONE)

proctype accessor(byte me)
{
	byte left = ACCESSES;

	do
	:: left == 0 -> break
	:: left > 0 ->
		if
		:: /* read */
			do
			:: atomic { mapping[me] != NONE -> assert(present[me]); assert(content[me] == last); break }
			:: atomic { mapping[me] == NONE -> wants_read[me] = true }
				(!wants_read[me])
			od
		:: /* write */
			do
			:: atomic { mapping[me] == WRITABLE ->
				assert(present[me]); assert(ALONE(me));
				last = (last + 1) % 8; content[me] = last; break }
			:: atomic { mapping[me] != WRITABLE -> wants_write[me] = true }
				(!wants_write[me])
			od
		fi
		left--
	od
	running--
}

/* What one thread of the daemon remembers of the page that it has locked. */
byte w_valid, w_writer, source, asker, i;
bool write;

inline publish(d, t) { atomic { state = BUSY; dir = d; target = t; valid = w_valid; writer = w_writer } }
inline punch(h) { atomic { present[h] = false; content[h] = GARBAGE; mapping[h] = NONE } }
inline die() { atomic { crashes < CRASHES -> crashes++; goto recovery } }

inline downgrade()
{
	if
	:: w_writer != NOBODY ->
#ifndef WITHOUT_PROTECT
		atomic { if :: mapping[w_writer] == WRITABLE -> mapping[w_writer] = READ_ONLY :: else fi }
#endif
		w_writer = NOBODY
	:: else
	fi
}

inline choose_source()
{
	if
	:: w_valid == 0 -> source = NOBODY
	:: w_valid & BIT(0) -> source = 0
	:: w_valid & BIT(1) -> source = 1
	:: w_valid & BIT(2) -> source = 2
	fi
}

/* FILL: nobody maps the target before the commit. */
inline fetch(to)
{
	downgrade();
	choose_source();
#ifdef WITHOUT_FILL_MARK
	w_valid = w_valid | BIT(to);
	publish(MAP, to);
#else
	publish(FILL, to);
#endif
	if :: die() :: skip fi;
	atomic { present[to] = true; content[to] = GARBAGE }
	if :: die() :: skip fi;
	if
	:: source == NOBODY -> content[to] = 0
	:: else -> content[to] = content[source]
	fi;
	w_valid = w_valid | BIT(to)
}

inline drop_others(keep)
{
	i = 0;
	do
	:: i < HNODES ->
		if
		:: !(keep & BIT(i)) && present[i] -> punch(i);
			if :: die() :: skip fi
		:: else
		fi;
		i++
	:: else -> break
	od
}

/* Committed before the other copies go: the word says that they are nothing any more. */
inline own(h)
{
	if
	:: w_valid != BIT(h) ->
		w_valid = BIT(h);
		w_writer = NOBODY;
		publish(UPGRADE, h);
		if :: die() :: skip fi;
#ifndef WITHOUT_INVALIDATE
		drop_others(BIT(h))
#endif
	:: else
	fi;
	w_writer = h;
#ifndef WITHOUT_UPGRADE_MARK
	if
	:: valid != BIT(h) -> publish(UPGRADE, h)
	:: else
	fi
#endif
}

inline map(h)
{
	atomic {
		mapping[h] = (w_writer == h -> WRITABLE : READ_ONLY);
		wants_read[h] = false;
		if :: w_writer == h -> wants_write[h] = false :: else fi
	}
}

inline commit()
{
	atomic {
		state = (w_valid -> RESIDENT : NOMAP);
		dir = MAP; target = 0; valid = w_valid; writer = w_writer
	}
}

inline lock() { atomic { state != BUSY; w_valid = valid; w_writer = writer; state = BUSY; dir = MAP } }

active proctype daemon()
{
	byte h;

	run accessor(0); run accessor(1); run accessor(2);
again:
	do
	:: running == 0 -> break

	/* a fault */
	:: atomic { wants_read[0] || wants_write[0] -> asker = 0 } goto fault
	:: atomic { wants_read[1] || wants_write[1] -> asker = 1 } goto fault
	:: atomic { wants_read[2] || wants_write[2] -> asker = 2 } goto fault

	/* room is needed where the page is */
	:: atomic { evictions < EVICTIONS && state == RESIDENT && valid != 0 -> evictions++ }
		if :: valid & BIT(0) -> h = 0 :: valid & BIT(1) -> h = 1 :: valid & BIT(2) -> h = 2 fi;
		goto evict
	od;
	goto done;

fault:
	write = wants_write[asker];
	lock();
	if :: die() :: skip fi;
	if
	:: !(w_valid & BIT(asker)) -> fetch(asker)
	:: else
	fi;
	if :: die() :: skip fi;
	if
	:: write || w_valid == BIT(asker) -> own(asker) /* nobody else has it: it may as well be written */
	:: else
	fi;
	if :: die() :: skip fi;
	map(asker);
	if :: die() :: skip fi;
	commit();
	goto again;

evict:
	lock();
	if
	:: w_valid == BIT(h) -> fetch((h + 1) % HNODES)
	:: else
	fi;
	if :: die() :: skip fi;
	downgrade();
	w_valid = w_valid & ~BIT(h);
	publish(UPGRADE, 0);
	if :: die() :: skip fi;
	punch(h);
	if :: die() :: skip fi;
	commit();
	goto again;

recovery: /* what the daemon remembered is gone; by the direction alone */
	if
	:: state == BUSY ->
		w_valid = valid;
		if
#ifndef WITHOUT_UNDO
		:: dir == FILL -> if :: !(valid & BIT(target)) -> punch(target) :: else fi
#else
		:: dir == FILL -> w_valid = valid | BIT(target)
#endif
#ifndef WITHOUT_FINISH
		:: dir == UPGRADE -> drop_others(valid)
#endif
		:: else
		fi;
		if :: die() :: skip fi;
#ifndef WITHOUT_PROTECT_ALL
		i = 0;
		do
		:: i < HNODES ->
			atomic { if :: mapping[i] == WRITABLE -> mapping[i] = READ_ONLY :: else fi }
			i++
		:: else -> break
		od;
#endif
		if :: die() :: skip fi;
		w_writer = NOBODY;
		commit()
	:: else
	fi;
#ifdef WITHOUT_WAKE
	/* a fault that was read is not told again by itself */
	atomic { run deaf(0); run deaf(1); run deaf(2) }
#endif
	goto again;

done:
	skip
}

/* Its fault is forgotten: it waits for a wake-up that nobody will give. */
proctype deaf(byte h)
{
	atomic { wants_read[h] || wants_write[h] -> wants_read[h] = false; wants_write[h] = false; false }
}
