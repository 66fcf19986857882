/* SPDX-License-Identifier: GPL-3.0-only
 *
 * Keeps a histogram of the TTL or hop limit with which time exceeded arrive, for each CPU, in
 * FILEBASE.reply_ttl.json after the run: how many ways back there are, and how long.
 */

BPF_PERCPU_ARRAY(reply_ttl, u64, 256); /* by TTL; no CPU waits for another's count */

static inline void count_ttl(struct xdp_md *ctx)
{
	struct hdr_cursor nh = { (void *)(long)ctx->data, (void *)(long)ctx->data_end };
	struct packet pkt = {};
	u64 *count;
	int ttl;

	if (parse_frame(&nh, &pkt) < 0)
		return;
	ttl = pkt.ttl;
	count = reply_ttl.lookup(&ttl);
	if (count)
		__sync_fetch_and_add(count, 1); /* with PREEMPT_RT another reply may come in between */
}

static inline void elf_v4_afterrecv(struct xdp_md *ctx) { count_ttl(ctx); }
static inline void elf_v6_afterrecv(struct xdp_md *ctx) { count_ttl(ctx); }
