/* SPDX-License-Identifier: GPL-3.0-only
 *
 * Count replies by the TTL or hop limit with which they arrive, on each CPU. The result is in FILEBASE.reply_ttl.json
 * after the run. It shows how many reverse paths there are, and how long they are.
 */

BPF_PERCPU_ARRAY(reply_ttl, u64, 256); /* by TTL; per CPU, so that no CPU waits for another */

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
		__sync_fetch_and_add(count, 1); /* with PREEMPT_RT another reply may preempt this run */
}

static inline void elf_v4_afterrecv(struct xdp_md *ctx)
{
	count_ttl(ctx);
}
static inline void elf_v6_afterrecv(struct xdp_md *ctx)
{
	count_ttl(ctx);
}
