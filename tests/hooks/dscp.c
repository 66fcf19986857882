/* SPDX-License-Identifier: GPL-3.0-only
 *
 * Count the bytes of probes by DSCP (RFC 2474). The result is in FILEBASE.bytes_by_dscp.json after the run.
 * With -T probes are as long as their packets, so that this is what the application sends in each class.
 */

BPF_HASH(bytes_by_dscp, u8, u64, 64);

static inline int count_bytes(struct __sk_buff *ctx)
{
	struct hdr_cursor nh = { (void *)(long)ctx->data, (void *)(long)ctx->data_end };
	struct packet pkt = {}; /* parse_frame() of elfprobe.c knows IPv4, IPv6 and VLAN tags */
	u8 dscp;

	if (parse_frame(&nh, &pkt) == 0) {
		dscp = pkt.tos >> 2;
		bytes_by_dscp.increment(dscp, ctx->len - pkt.ip_off);
	}
	return 0; /* send the probe */
}

static inline int elf_v4_icmp_beforesend(struct __sk_buff *ctx)
{
	return count_bytes(ctx);
}
static inline int elf_v4_tcp_beforesend(struct __sk_buff *ctx)
{
	return count_bytes(ctx);
}
static inline int elf_v4_udp_beforesend(struct __sk_buff *ctx)
{
	return count_bytes(ctx);
}
static inline int elf_v6_icmp_beforesend(struct __sk_buff *ctx)
{
	return count_bytes(ctx);
}
static inline int elf_v6_tcp_beforesend(struct __sk_buff *ctx)
{
	return count_bytes(ctx);
}
static inline int elf_v6_udp_beforesend(struct __sk_buff *ctx)
{
	return count_bytes(ctx);
}
