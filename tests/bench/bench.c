/* Programs of the benchmarks. They are compiled into elfprobe.c in the place of its hooks: see packets.py, driver.py. */

int empty_egress(struct __sk_buff *skb)
{
	return TC_ACT_UNSPEC;
}

int empty_ingress(struct xdp_md *ctx)
{
	return VERDICT_PASS;
}

/* ---- Many destinations: each run gets another packet --------------------------------------- */

BPF_ARRAY(others, __be32, 1 << 16); /* addresses of the other end, one per packet */
BPF_PERCPU_ARRAY(turns, __u16, 1);
BPF_PROG_ARRAY(egress, 1); /* 0: the program under test */
BPF_PROG_ARRAY(ingress, 1);

static inline __be32 next_other(void)
{
	int zero = 0, turn;
	__be32 *other;
	__u16 *next;

	next = turns.lookup(&zero);
	if (!next)
		return 0;
	turn = (*next)++;
	other = others.lookup(&turn);
	return other ? *other : 0;
}

int cycle_egress(struct __sk_buff *skb)
{
	__be32 other = next_other();

	bpf_skb_store_bytes(skb, sizeof(struct ethhdr) + __builtin_offsetof(struct iphdr, daddr), &other,
			    sizeof(other), 0);
	egress.call(skb, 0);
	return TC_ACT_SHOT;
}

int cycle_ingress(struct xdp_md *ctx)
{
	struct iphdr *ip = (void *)(long)ctx->data + sizeof(struct ethhdr);
	__be32 other = next_other();

	if ((void *)(ip + 1) <= (void *)(long)ctx->data_end)
		ip->saddr = other;
	ingress.call(ctx, 0);
	return VERDICT_DROP;
}

/* ---- Probes: the time that a carrier takes -------------------------------------------------- */

struct timing {
	__u64 start;
	__u32 inside; /* a packet is being timed: the next one is its clone */
	__u32 cloned;
};

struct sample {
	__u32 took; /* ns */
	__u32 len;
};

BPF_PERCPU_ARRAY(timings, struct timing, 1);
BPF_RINGBUF_OUTPUT(samples, 256);

/* The first of two TC filters. The clone passes both filters, too; tc_index marks it. */
int begin_egress(struct __sk_buff *skb)
{
	struct timing *timing;
	int zero = 0;

	timing = timings.lookup(&zero);
	if (!timing)
		return TC_ACT_UNSPEC;
	if (timing->inside) {
		timing->cloned = 1;
		skb->tc_index = 1;
	} else {
		timing->inside = 1;
		timing->cloned = 0;
		timing->start = bpf_ktime_get_ns();
	}
	egress.call(skb, 0);
	return TC_ACT_UNSPEC;
}

/* The second filter. Drops the clone, so that the network takes the same time for every kind of clone. */
int end_egress(struct __sk_buff *skb)
{
	__u64 now = bpf_ktime_get_ns();
	struct sample sample = {};
	struct timing *timing;
	int zero = 0;

	if (skb->tc_index == 1)
		return TC_ACT_SHOT;
	timing = timings.lookup(&zero);
	if (!timing)
		return TC_ACT_UNSPEC;
	timing->inside = 0;
	sample.took = now - timing->start;
	sample.len = skb->len;
	if (timing->cloned)
		samples.ringbuf_output(&sample, sizeof(sample), BPF_RB_NO_WAKEUP);
	return TC_ACT_UNSPEC;
}

/* Between the two filters, as the floor: only a clone. */
int clone_egress(struct __sk_buff *skb)
{
	if (skb->tc_index != 1)
		bpf_clone_redirect(skb, skb->ifindex, 0);
	return TC_ACT_UNSPEC;
}

/* ---- User space: results as fast as it can take them ----------------------------------------- */

int one_result(struct xdp_md *ctx)
{
	struct layouts *all;
	int zero = 0;

	all = layouts.lookup(&zero);
	COUNT(replies);
	if (all && submit_result(ctx, &all->result.result, sizeof(all->result.result)))
		COUNT(results_lost);
	return VERDICT_PASS;
}
