/* SPDX-License-Identifier: GPL-3.0-only */

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
