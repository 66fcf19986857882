/* Fuzzer of the path model in elfprobe.c, which tests/test_path_model.py puts in front of this file: see there.
 *
 *	path_fuzz SEED COUNT
 *
 * Simulates COUNT paths. Each has a distance, routers that answer, lose probes or never answer, and changes: outages, routes
 * that become longer or shorter, probes that do not leave, destinations that are quiet. Then it must hold that
 *
 *   - a probe to a hop at or beyond the known length is an exploration (explore, or one of EXPLORE_EVERY);
 *   - a probe to a hop that is not proven never has the usual form: a router at its TTL, or farther, must have answered
 *     since the last change of the path's length, and since the hop became unresponsive;
 *   - of those that are not guarded, no more than FALLBACKS_MAX in a row arrive;
 *   - once all is well again, every hop before the believed destination is probed again within the longest back-off;
 *   - then every hop before the destination is probed again within two rounds of exploration (EXPLORE_EVERY).
 *
 * Prints what does not hold, with the seed of its path, and exits with 1.
 */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MSEC NSEC_PER_MSEC
#define SEC NSEC_PER_SEC

static __u64 state, queues[RESPONDERS];

static __u64 chance(__u64 below)
{
	state ^= state << 13; /* xorshift64 */
	state ^= state >> 7;
	state ^= state << 17;
	return (state >> 11) % below;
}

struct world {
	struct path path;
	__u64 now, start;
	__u32 distance;               /* of the destination */
	__u32 reverse;                /* of the reverse path */
	__u32 loss[MAX_HOPS + 2];     /* of probes to each hop and their replies, percent */
	__u32 is_down;                /* nothing comes back */
	__u32 speaks;                 /* the destination sends packets */
	__u64 probed[MAX_HOPS + 2];   /* when each hop was probed last */
	__u64 answered[MAX_HOPS + 2]; /* and when it answered */
	__u32 proven;  /* farthest router that has answered since the path changed, as the model can know it */
	__u32 arrived; /* number of fallback probes that reached the destination, since a router answered one */
	__u32 is_nat;  /* routers from here on get no guarded probes */
	__u32 can_fall_back;
	__u32 flows; /* number of flows to the destination */
	__u64 seed;
};

static void fail(const struct world *w, const char *what, __u32 hop)
{
	const struct path *p = &w->path;

	printf("path %llu: %s: hop %u at %llu ms; distance %u, length %u, last_responsive %u, max_ttl_tried %u, "
	       "due in %lld ms\n",
	       w->seed, what, hop, (w->now - w->start) / MSEC, w->distance, p->distance.length,
	       p->liveness.last_responsive, p->distance.max_ttl_tried,
	       (long long)(p->hops[hop <= MAX_HOPS ? hop : 0].due - w->now) / (long long)MSEC);
	exit(1);
}

static __u64 ticks(const struct world *w)
{
	return TICK_NS ? w->now / TICK_NS : 0;
}

/* As note_packet() does. */
static void packet_arrives(struct world *w)
{
	__u64 last = w->path.liveness.last_received, gap = ticks(w) > last ? ticks(w) - last : 0;
	__u32 before, has_data = chance(2);

	if (is_as_expected(&w->path, w->reverse, gap, has_data)) {
		if (gap)
			w->path.liveness.last_received = ticks(w);
		return;
	}
	before = w->path.distance.reverse;
	destination_seen(&w->path, w->reverse, gap, !last, has_data, w->now, ticks(w));
	if (before && before != w->path.distance.reverse)
		w->proven = 0;
}

/* The hop may have become the destination, if none behind it has answered since its first unanswered probe. */
static void hop_is_unresponsive(struct world *w, __u32 nr)
{
	__u32 i;

	for (i = nr + 1; i <= MAX_HOPS; i++)
		if (w->answered[i] > w->path.hops[nr].since)
			return;
	if (w->proven >= nr)
		w->proven = nr - 1;
}

/* As elf_egress does. Replies come at once or after a while, which is simulated by an earlier departure. */
static void packet_leaves(struct world *w)
{
	struct path *p = &w->path;
	__u64 due, sendtime, reserved = w->now;
	enum probe_form form;
	int is_exploration, ttl;

	if (ticks(w) < p->pacing.next_due_tick || w->now < p->pacing.next_due)
		return;
	is_exploration = is_exploration_due(p);
	ttl = choose_hop(p, w->now, ticks(w));
	if (ttl == HOP_UNRESPONSIVE)
		hop_is_unresponsive(w, p->pacing.last_probed);
	if (ttl <= 0)
		return;
	if (ttl > MAX_HOPS)
		fail(w, "beyond MAX_HOPS", ttl);
	if (p->distance.length && ttl >= p->distance.length && !(is_exploration && ttl == p->distance.length))
		fail(w, "the destination is probed though its distance is known", ttl);
	if (!chance(50) || !takes_turn(p, ttl, 7 * chance(w->flows), w->now)) {
		probe_postponed(p, ttl);
		return;
	}
	form = probe_form(p, ttl, hop_at(p, ttl), w->can_fall_back, ticks(w));
	if (form == USUAL && (__u32)ttl > w->proven)
		fail(w, "a usual probe to a hop that is not proven", ttl);
	due = probe_reserved(p, ttl, queues, w->now, ticks(w));
	w->probed[ttl] = w->now;
	w->now += chance(20000);
	if (!chance(50)) {
		probe_cancelled(p, ttl, reserved);
		return;
	}
	sendtime = w->now;
	probe_sent(p, ttl, form, reserved, due, sendtime);
	if (w->is_down)
		return;
	if (form == FALLBACK && (__u32)ttl >= w->distance && ++w->arrived > FALLBACKS_MAX)
		fail(w, "fallback probes arrive, too many", ttl);
	if (chance(100) < w->loss[ttl] || (form == GUARDED && w->is_nat && (__u32)ttl >= w->is_nat))
		return;
	w->now += (1 + chance(100)) * MSEC / 10;
	if ((__u32)ttl >= w->distance) {
		if (form == GUARDED) /* nobody answers it */
			return;
		destination_reached(p, ttl, w->now);
		if (w->proven >= (__u32)ttl)
			w->proven = ttl - 1;
		return;
	}
	w->answered[ttl] = w->now;
	hop_replied(p, ttl, form, sendtime, ttl < (int)w->reverse ? ttl : w->reverse, queues, ttl, w->now);
	if (sendtime >= p->distance.changed_at && w->proven < (__u32)ttl)
		w->proven = ttl;
	if (form == FALLBACK)
		w->arrived = 0;
}

static void change(struct world *w)
{
	__u32 i;

	switch (chance(8)) {
	case 0:
		w->is_down = 1;
		break;
	case 1:
		w->distance = 2 + chance(20);
		w->reverse = w->distance;
		break;
	case 2:
		w->reverse = 2 + chance(20);
		break;
	case 3:
		w->speaks = !w->speaks;
		break;
	case 4:
		w->loss[1 + chance(MAX_HOPS)] = 100;
		break;
	case 5:
		w->loss[1 + chance(MAX_HOPS)] = chance(100);
		break;
	case 6:
		for (i = 1; i <= MAX_HOPS; i++)
			w->loss[i] = chance(3) ? 0 : 100;
		break;
	default:
		w->is_down = 0;
	}
}

static void go_on(struct world *w, __u64 until, __u64 between)
{
	while (w->now < until) {
		w->now += 1 + chance(2 * between);
		packet_leaves(w);
		if (w->speaks && !w->is_down)
			packet_arrives(w);
	}
}

static void simulate(__u64 seed)
{
	struct world w;
	__u32 i, n;
	__u64 settled;

	state = seed * 0x9e3779b97f4a7c15ULL + 1;
	memset(&w, 0, sizeof(w));
	memset(queues, 0, sizeof(queues));
	w.seed = seed;
	w.start = w.now = 1000 * SEC;
	w.distance = w.reverse = 2 + chance(20);
	w.speaks = chance(2);
	w.is_nat = chance(4) ? 0 : 1 + chance(4);
	w.can_fall_back = chance(2);
	w.flows = 1 + chance(3);
	for (i = 0, n = chance(12); i < n; i++) {
		go_on(&w, w.now + (1 + chance(chance(4) ? 3000 : 60000)) * MSEC, (1 + chance(20)) * MSEC);
		change(&w);
	}
	w.is_down = 0;
	w.speaks = 1;
	w.reverse = w.distance;
	w.is_nat = 0;
	memset(w.loss, 0, sizeof(w.loss));
	/* The path learns its length. Then no hop waits longer than the longest back-off, and two rounds through all hops:
	 * with RATE_GLOBAL each of them takes an interval. */
	settled = w.now + 20 * SEC;
	go_on(&w, settled, 10 * MSEC);
	go_on(&w, settled + BACKOFF_BEYOND_MAX + 2 * MAX_HOPS * PATIENCE + 2 * SEC, 50 * MSEC);
	for (i = 1; i < w.distance && i < w.path.distance.length; i++)
		if (w.probed[i] < settled)
			fail(&w, "never probed again", i);
	if (w.path.distance.length == 0)
		fail(&w, "the length stays unknown", 0);
	n = w.path.pacing.seq + 2 * EXPLORE_EVERY + 2 * MAX_HOPS;
	while (w.path.distance.length < w.distance && (int)(w.path.pacing.seq - n) < 0)
		go_on(&w, w.now + 10 * SEC, 5 * MSEC);
	if (w.path.distance.length < w.distance)
		fail(&w, "never explored", w.path.distance.length);
}

int main(int argc, char **argv)
{
	__u64 first = argc > 1 ? strtoull(argv[1], 0, 0) : 1, count = argc > 2 ? strtoull(argv[2], 0, 0) : 1000, i;

	for (i = 0; i < count; i++)
		simulate(first + i);
	printf("%llu paths, nothing found\n", count);
	return 0;
}
