/* SPDX-License-Identifier: GPL-3.0-only
 *
 * elfprobe's hooks: eight functions that run in the kernel for every probe and every reply, here
 * doing nothing. Edit this file, or copy it and name the copy with -H; one that a file leaves out
 * does nothing. Maps and functions of your own may stand beside them, with BCC's macros and methods:
 *
 *	BPF_HASH(seen, u8, u64, 256);
 *
 *	static inline void elf_v4_afterrecv(struct xdp_md *ctx)
 *	{
 *		u8 *ttl = (void *)(long)ctx->data + 22; // Ethernet, then the ninth byte of IPv4
 *
 *		if ((void *)(ttl + 1) <= (void *)(long)ctx->data_end)
 *			seen.increment(*ttl);
 *	}
 *
 * The driver puts this file into elfprobe.c, in the place of its #include; the headers' structs
 * (struct ethhdr, iphdr, ipv6hdr, tcphdr, udphdr, icmphdr) and everything above it can be used.
 *
 * beforesend: the probe is complete and about to be recorded and sent. ctx is the probe, never the
 * application's packet. 0: go on; negative: drop this probe, and only the probe. What a reply is
 * known by must stay: addresses, ports, the first 8 bytes behind the IP header. A departure time (tstamp)
 * is lost where the probe is shorter than the packet that it is made of.
 *
 * afterrecv: a time exceeded answers a probe, is still whole, and its result is about to be recorded.
 *
 * Answers are read at XDP or at TC ingress (--ingress-hook; the log says which). At TC ingress `struct xdp_md`
 * is read as `struct __sk_buff`: data, data_end, data_meta and ingress_ifindex are in both. rx_queue_index and
 * egress_ifindex are there at XDP only, so a hook that uses them compiles with --ingress-hook xdp or generic
 * only. At TC ingress the answer can be read as far as an ICMP error needs (2560 bytes), a VLAN tag may be in
 * the context (vlan_tci) and not in front of the IP header, and a hook that writes to the packet makes the
 * kernel un-clone every packet that arrives.
 */

static inline int elf_v4_icmp_beforesend(struct __sk_buff *ctx)
{
	return 0;
}

static inline int elf_v4_tcp_beforesend(struct __sk_buff *ctx)
{
	return 0;
}

static inline int elf_v4_udp_beforesend(struct __sk_buff *ctx)
{
	return 0;
}

static inline int elf_v6_icmp_beforesend(struct __sk_buff *ctx)
{
	return 0;
}

static inline int elf_v6_tcp_beforesend(struct __sk_buff *ctx)
{
	return 0;
}

static inline int elf_v6_udp_beforesend(struct __sk_buff *ctx)
{
	return 0;
}

static inline void elf_v4_afterrecv(struct xdp_md *ctx)
{
}

static inline void elf_v6_afterrecv(struct xdp_md *ctx)
{
}
