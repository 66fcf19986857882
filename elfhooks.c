/* SPDX-License-Identifier: GPL-3.0-only
 *
 * elfprobe's hooks: eight functions that run in the kernel for every probe and every reply. Here they do nothing.
 * Edit this file, or copy it and name the copy with -H. A hook that your file leaves out does nothing. You can add
 * maps and functions of your own, with BCC's macros and methods:
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
 * elfprobe.py puts this file into elfprobe.c, in the place of its #include. You can use everything above that line: the
 * headers' structs with the kernel's names (struct ethhdr, iphdr, ipv6hdr, tcphdr, udphdr, icmphdr), and parse_frame().
 *
 * beforesend: the probe is complete. It is recorded and sent after the hook. ctx is the probe, never the application's
 * packet. Return 0 to send the probe. A negative number drops it; the application's packet leaves all the same. Do not
 * change what identifies a probe in its reply: addresses, ports, and the first 8 bytes behind the IP header. If the
 * probe is shorter than its packet, it is redirected once more, and may lose its departure time (tstamp).
 *
 * afterrecv: a time exceeded answers a probe. The hook sees the whole message, before the result is recorded.
 *
 * elfprobe reads replies at XDP or at TC ingress (--ingress-hook; the log says which). At TC ingress
 * - the compiler reads `struct xdp_md` as `struct __sk_buff`. Both have data, data_end, data_meta and ingress_ifindex.
 *   rx_queue_index and egress_ifindex exist only at XDP: a hook that uses them needs --ingress-hook xdp or generic.
 * - a program can read only the linear part of a packet. elfprobe extends it to the longest ICMP error (2560 bytes).
 * - a VLAN tag may be in the context (vlan_tci), not before the IP header.
 * - a hook that writes to the packet makes the kernel un-clone every packet that arrives.
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
