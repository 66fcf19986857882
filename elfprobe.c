/* SPDX-License-Identifier: GPL-3.0-only
 *
 * elfprobe: hop-by-hop latency inside an application's own flow. The kernel's half.
 *
 *   application --> TC egress: elf_egress ------------------------------------> device
 *                      | a probe is due: bpf_clone_redirect()
 *                      +--> the clone enters elf_egress at once, on the same CPU
 *                             '-- tail call --> elf_probe: trim, lower the TTL, record --> device
 *                                    (a trimmed clone passes elf_egress once more)
 *
 *   process --> cgroup sock_create: elf_sock_create stores the owning process with the socket;
 *               accept(), getpeername(): elf_accept_v4, elf_accept_v6 do so for accepted sockets;
 *               elf_exec, elf_fork, elf_exit and user space keep the set of target processes up to date
 *
 *   device --> XDP or TC ingress: elf_ingress -- time exceeded, quotes a probe in flight --> results --> user space
 *                      |-- packet of a destination ----> teaches the path model the distance
 *                      '-- passes on unchanged (dropped: replies to probes with INGRESS_DROP, and see harms_tcp())
 *
 * elf_egress only reads. If a program writes to packets directly, the kernel adds a prologue that un-clones every
 * packet before the first instruction (bpf_unclone_prologue() in net/core/filter.c). In elf_probe only probes pay for
 * that. In elf_egress the application would pay. This is why there are two programs.
 *
 * Addresses are IPv6; IPv4 addresses are v4-mapped (RFC 4291, 2.5.5.2), so that both families share the code.
 * __be* variables and Internet checksums (__u16) hold network byte order, all others host order. elfprobe.py
 * compiles this file with BCC, replaces the #include by elfhooks.c or the user's hooks, and takes the layout of
 * each struct in a map from BCC.
 *
 * Glossary:
 *   probe         a clone of an application packet that is sent with a lowered TTL, to expire at a router
 *   carrier       the application packet from which a probe is cloned; it leaves unchanged
 *   target        a process or a destination that the user wants to be probed
 *   hop           a TTL value, from 1, and the router at which a probe with that TTL expires
 *   proven        of a hop: a time exceeded shows that the present path has a router at its TTL, or farther
 *   guarded probe a probe to a hop that is not proven: it may arrive, so it is broken, and every host discards it
 *   responder     source of the ICMP error that answers a probe
 *   quoted packet the start of the probe, as an ICMP error contains it
 *   in flight     sent, recorded, and not answered yet; whoever removes a probe from the map in_flight owns it
 *   reservation   the right to send one probe, with its sequence number and TTL; it ends as committed or cancelled
 *   back-off      time without probes to a hop that does not respond; each is longer than the one before
 *   scratch       memory of one program run outside its 512 bytes of stack
 *   lease         permission to send probes until a time (alive_until); user space renews it while it runs
 */

/* ---- Build parameters: -D flags from user space ------------------------------------------- */

#define FRAME_ETHERNET 0
#define FRAME_IP 1
#define FRAME_TUNNEL 2
#ifndef FRAME
#error "FRAME: packets begin with an Ethernet header (0), an IP header (1), or an IP header, perhaps a tunnel's (2)"
#endif
#ifndef TUNNEL
#error "TUNNEL: 4 or 41 if the flows are inside IPv4 packets of this protocol, else 0"
#endif
#ifndef INGRESS_TC
#error "INGRESS_TC: 1 compiles elf_ingress for TC ingress, 0 for XDP"
#endif
#ifndef TCX
#error "TCX: 1 if TC programs are attached by tcx links (since Linux 6.6), 0 if as filters of a clsact qdisc"
#endif
#ifndef SKB_HEAD
#error "SKB_HEAD, SKB_END: offsets of head and end in struct sk_buff; 0 if unknown"
#endif
#ifndef ZEROCOPY_FLAGS
#error "ZEROCOPY_FLAGS, ZEROCOPY_FLAG: byte (offset in struct skb_shared_info) and bit in it that mark user memory"
#endif
#ifndef SKB_DST
#error "SKB_DST, DST_FLAGS: offsets of _skb_refdst in struct sk_buff, of flags in struct dst_entry; 0 if unknown"
#endif
#ifndef RT4_GATEWAY
#error "RT4_GATEWAY, RT6_FLAGS: offsets of rt_gw_family in struct rtable, of rt6i_flags in struct rt6_info"
#endif
#ifndef SKB_SK
#error "SKB_SK, SOCK_OWNED: offsets of sk in struct sk_buff, of sk_lock.owned in struct sock; 0 if unknown"
#endif
#ifndef BPRM_FILE
#error "BPRM_FILE, FILE_DENTRY, DENTRY_NAME: offsets of a new program's file, its dentry, its name; 0 if unknown"
#endif
#ifndef TASK_PARENT
#error "TASK_PARENT: offset of real_parent in struct task_struct"
#endif
#ifndef MPTCP
#error "MPTCP: 1 if TC programs can find the MPTCP socket of a TCP socket (Linux 5.19), 0 if not"
#endif
#ifndef TX_FLAGS
#error "TX_FLAGS: offset of tx_flags in struct skb_shared_info"
#endif
#ifndef BY_OWNER
#error "BY_OWNER: 1 probes the flows of target processes and target destinations, 0 only target destinations"
#endif
#ifndef TICK_NS
#error "TICK_NS: length of a jiffy, ns; 0 if programs cannot read jiffies (before Linux 5.6)"
#endif
#ifndef OLD_MAPS
#error "OLD_MAPS: 1 without ring buffers and socket storage (before Linux 5.8, BCC 0.13); excludes BY_OWNER"
#endif
#ifndef PREEMPTIBLE
#error "PREEMPTIBLE: 1 if a program run can be preempted by another run on its CPU (PREEMPT_RT)"
#endif

/* ---- Parameters that user space puts into the compiled instructions ----------------------- */

/* User space caches compiled programs. One serves all values of these parameters. Each parameter is an instruction
 * that loads a 64-bit constant, the mark. User space replaces the mark by the value before it loads the program
 * (PARAMETERS in elfprobe.py). */
#define PARAMETER_MARK 0xe1f0be0000000000ULL
#define PARAMETER(nr) \
	({ \
		__u64 _value; \
		asm("%0 = %1 ll" : "=r"(_value) : "i"(PARAMETER_MARK + (nr))); \
		_value; \
	})

#ifndef INTERVAL_NS              /* on the host, where the path model is tested, these two are numbers */
#define INTERVAL_NS PARAMETER(0) /* minimum time between two probes, ns; 0 makes every packet carry one */
#define RATE_GLOBAL PARAMETER(3) /* 0: INTERVAL_NS separates the probes to one hop, 1: all to one destination */
#endif
#define MAX_RATE PARAMETER(1) /* maximum number of probes per second over all destinations, 1 or more */
#define WAKE_EVERY \
	PARAMETER(2)         /* number of results after which a CPU wakes user space, which also polls by itself */
#define NOTRUNC PARAMETER(4) /* 0 trims probes to their headers, 1 keeps the payload */
#define INGRESS_DROP PARAMETER(5) /* 1 drops replies to probes, 0 passes them to the stack: but see harms_tcp() */
#define BY_APP PARAMETER(6) /* 1 if target processes are chosen by name, so that each new process must be checked */
#define ODD_NAMES PARAMETER(7) /* 1 if some names are paths, or not in ASCII: only user space can compare them */

/* ---- Protocol headers (no kernel header is needed to compile this file) ------------------- */

#define NSEC_PER_MSEC 1000000ULL
#define NSEC_PER_SEC 1000000000ULL

#define ETH_P_IP 0x0800
#define ETH_P_IPV6 0x86dd
#define ETH_P_8021Q 0x8100
#define ETH_P_8021AD 0x88a8
#define VLAN_TAGS_MAX 2
#define IPPROTO_ICMP 1
#define IPPROTO_IPIP 4
#define IPPROTO_TCP 6
#define IPPROTO_UDP 17
#define IPPROTO_HOPOPTS 0 /* this, ROUTING, FRAGMENT and DSTOPTS: extension headers of IPv6 (RFC 8200) */
#define IPPROTO_IPV6 41
#define IPPROTO_ROUTING 43
#define IPPROTO_FRAGMENT 44
#define IPPROTO_GRE 47
#define IPPROTO_DSTOPTS 60
#define IPV6_EXTENSIONS_MAX 4
#define IPV6_EXTENSIONS_MASK 1023 /* maximum length of all extension headers; a power of two less 1 */
#define HEADERS_MASK 4095 /* more than all headers of a packet and of the one it quotes; a power of two less 1 */
#define IPPROTO_ICMPV6 58
#define IPPROTO_MPTCP 262 /* of sockets, never of packets */
#define IP_MF 0x2000
#define IP_OFFSET 0x1fff
#define IP6_MF 0x0001
#define IP6_OFFSET 0xfff8
#define GRE_CSUM 0x8000 /* each of these flags adds 4 bytes (RFC 2784, RFC 2890) */
#define GRE_KEY 0x2000
#define GRE_SEQ 0x1000
#define GRE_FLAGS (GRE_CSUM | GRE_KEY | GRE_SEQ)
#define ICMP_ECHOREPLY 0
#define ICMP_DEST_UNREACH 3
#define ICMP_ECHO 8
#define ICMP_TIME_EXCEEDED 11
#define ICMPV6_DEST_UNREACH 1
#define ICMPV6_TIME_EXCEED 3
#define ICMPV6_ECHO_REQUEST 128
#define ICMPV6_ECHO_REPLY 129
#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_PSH 0x08
#define TCP_ACK 0x10

#define TC_ACT_UNSPEC (-1)
#define TC_ACT_SHOT 2
#define TC_ACT_STOLEN 4
#define EEXIST 17
#define NET_XMIT_CN 2
#define SOCK_STREAM 1

/* Structs and fields have the kernel's names. But bit fields are joined into one field (version_ihl,
 * version_class_label, data_offset), because their order depends on the byte order. */
struct ethhdr {
	__u8 h_dest[6], h_source[6];
	__be16 h_proto;
};

struct vlan_hdr {
	__be16 h_vlan_TCI, h_vlan_encapsulated_proto;
};

struct iphdr {
	__u8 version_ihl, tos;
	__be16 tot_len, id, frag_off;
	__u8 ttl, protocol;
	__u16 check;
	__be32 saddr, daddr;
};

struct in6_addr {
	__be32 s6_addr32[4];
};

struct ipv6hdr {
	__be32 version_class_label;
	__be16 payload_len;
	__u8 nexthdr, hop_limit;
	struct in6_addr saddr, daddr;
};

/* Every extension header that we parse begins like this one. A fragment header has its offset in place of type. */
struct ipv6_rt_hdr {
	__u8 nexthdr, hdrlen, type, segments_left;
};

struct gre_base_hdr {
	__be16 flags; /* and the version, which is 0 */
	__be16 protocol;
};

struct tcphdr {
	__be16 source, dest;
	__be32 seq, ack_seq;
	__u8 data_offset, flags;
	__be16 window;
	__u16 check;
	__be16 urg_ptr;
};

struct udphdr {
	__be16 source, dest, len;
	__u16 check;
};

struct icmphdr {
	__u8 type, code;
	__u16 check;
	__be16 id, sequence; /* of echo requests and replies */
};

/* ---- Types shared with user space --------------------------------------------------------- */

/* Farthest hop that we probe. A packet with a TTL up to this belongs to somebody's traceroute and carries no probe.
 * So we never take a reply to a traceroute for a reply to a probe. */
#define MAX_HOPS 32

#define EXTENSION_MAX 252 /* maximum number of bytes that we keep of an ICMP extension (RFC 4884) */

/* Identifies a probe in the packet that an ICMP error quotes. Contains only fields that every router quotes (RFC
 * 792: IP header and 8 bytes) and that nothing on the forward path changes. SCTP cannot have a key: of the 8 bytes,
 * only the checksum differs between packets of an association. It is a CRC32c, which no helper computes. */
struct probe_key {
	struct in6_addr dest;
	__be16 sport, dport; /* ICMP: echo identifier, 0 */
	__u32 protocol;
	__u32 ident; /* TCP: sequence number. ICMP: echo sequence. UDP: length << 16 | checksum */
};

struct app_name {
	char text[16]; /* TASK_COMM_LEN: at most 15 characters, the rest zeros */
};

/* State of the TCP connection of a socket; all 0 if there is none. */
struct tcp_state {
	__u32 srtt;     /* smoothed round-trip time, us; 0: not measured yet */
	__u32 cwnd;     /* congestion window, segments */
	__u32 retrans;  /* segments retransmitted so far */
	__u32 inflight; /* segments sent and not acknowledged; a new carrier is not counted yet */
};

/* Most probes of a flow to a hop agree in some fields of struct result. These are next to each other, from outttl
 * to rsize and from translated to protocol: user space makes rows faster then. See SHARED in elf/rows.py. */
struct probe {
	__u64 sendtime; /* CLOCK_MONOTONIC, ns, as all times in this file */
	__u32 seq;
	__u32 origseq;
	struct tcp_state tcp; /* of the socket that sent the packet */
	__u32 seq_offset; /* of an answered probe: what was added to its TCP sequence number before it was quoted */
	__u16 outipid;
	__u16 compensation; /* trimmed UDP: payload word that makes the checksum right, in network order; else 0 */
	__u8 payload_len;   /* payload bytes of a trimmed UDP or ICMP probe; else 0 */
	__u8 form;          /* enum probe_form */
	__u8 outttl;
	__u8 outtos; /* DSCP and ECN */
	__u32 pid;   /* of the socket's owner; 0: not known */
	struct app_name app;
	struct in6_addr source;
};

struct reply {
	struct in6_addr responder;
	__u8 recvttl; /* this, rtos, rsize (total length) and ripid are the reply's own */
	__u8 rtos;    /* DSCP and ECN */
	__u8 intos;   /* DSCP and ECN; this, qttl, qlen (total length) and inipid are the quoted packet's */
	__u8 qttl;
	__u16 qlen;
	__u16 rsize;
	__u16 inipid;
	__u16 ripid;
	__u32 recvcpu;
	__u64 recvtime;
};

/* How the quoted packet differs from the probe. SOURCE: its source is not the address to which the reply was sent.
 * NUMBER: its TCP sequence number is higher by seq_offset. */
enum translation { SOURCE_TRANSLATED = 1, NUMBER_TRANSLATED = 2 };

struct result {
	struct probe probe;
	struct reply reply;
	__u32 translated; /* bits of enum translation */
	struct probe_key key;
};

/* A result with the ICMP extension (RFC 4884) that follows the quoted packet. The extension begins with its header
 * and may be cut. User space parses it. */
struct extended_result {
	struct result result;
	__u32 extension_len; /* UNMATCHED: the reply quotes TCP, but no probe; there is no extension */
	__u8 extension[EXTENSION_MAX];
};

#define UNMATCHED 0xffff

/* Status of a process. A process without an entry in the map is no target; most have none. */
enum { UNDECIDED = 1, TARGET = 2, OURSELVES = 3 }; /* UNDECIDED: user space has to check the process */

struct process {
	__u64 id; /* distinguishes processes that have the same PID one after the other */
	__u32 status;
	__u32 unused;
	struct app_name app;
	/* Its shares of the budgets, as theoretical arrival times (GCRA): */
	__u64 probes;
	__u64 new_paths;
};

/* The process that created a socket, or has used it since. Stored with the socket. A connection inherits the owner of
 * its listener, until a process accepts it or sends by it. */
struct owner {
	__u64 process; /* its id */
	__u64 socket;  /* its cookie. Another socket's: inherited from it. 0: MPTCP, which sends by other sockets */
	__u32 status;
	__u32 pid;
	struct app_name app;
};

/* Tells user space about a process that it may have to check. */
struct process_event {
	__u64 id;
	__u32 pid;
	__u32 status; /* 0: its first thread has ended */
};

/* The start of a struct task_struct. User space searches it for a known PID, to find the offset of the PID. */
struct task_sample {
	__u32 parent; /* PID of the process whose next child is copied; 0: none */
	__u8 task[8192];
};

enum { FLOW_STALLED = 1, FLOW_RESUMED = 2, DESTINATION_EXCLUDED = 3, CLONE_INTERCEPTED = 4, PROBE_ARRIVED = 5 };

/* Tells user space about a flow. For PROBE_ARRIVED, only the destination is known. */
struct flow_event {
	struct probe_key flow;
	__u32 kind;
};

/* Each reason why a packet carries no probe, and each end of a probe, has a counter. "Due": a probe was due when a
 * packet of a target left. */
struct counters {
	__u64 probes;          /* sent, and in flight from then on */
	__u64 replies;         /* time exceeded that answers a probe */
	__u64 results_lost;    /* replies for which the result ring had no room */
	__u64 send_failed;     /* probes dropped after elf_probe: by a filter, the queue, the device */
	__u64 clone_lost;      /* clones that did not reach elf_egress (again): no memory, or a filter before it */
	__u64 build_failed;    /* clones that could not be trimmed or parsed */
	__u64 hook_dropped;    /* probes dropped by the hook's verdict */
	__u64 key_busy;        /* probes whose key another probe in flight has */
	__u64 in_flight_full;  /* probes for which the map in_flight had no room, or could not be locked */
	__u64 over_max_rate;   /* due, but over the budget */
	__u64 over_new_paths;  /* packets of targets to new destinations, over the budget for these */
	__u64 no_room;         /* packets of targets to new destinations, for which there was no room */
	__u64 carrier_low_ttl; /* due, but the packet belongs to somebody's traceroute */
	__u64 carrier_unfit;   /* due, but the packet must not be cloned: SYN, FIN, RST, fragment, other protocol */
	__u64 carrier_resent;  /* due, but the packet is a retransmission or a keep-alive */
	__u64 carrier_zerocopy; /* due, but the packet holds memory of the application (MSG_ZEROCOPY) */
	__u64 carrier_stamped;  /* due, but the packet asks the network card for a time stamp */
	__u64 carrier_early;    /* due, but nothing proves yet that the peer knows the TCP connection */
	__u64 hop_unresponsive; /* due, but the next hop just turned out to be unresponsive and backs off */
	__u64 flow_stalled;     /* due, but flows stalled, perhaps because of probes, or this one does not move */
	__u64 lease_expired;    /* due, but user space has not renewed the lease */
	__u64 processes_full;   /* target processes for which there was no room */
	__u64 events_lost;      /* events of processes and flows for which the ring had no room */
	__u64 not_ours;         /* time exceeded that answers no probe in flight */
	__u64 reached;          /* probes that the destination itself answered */
	__u64 on_link;          /* due, but no router is between here and the destination */
};

/* How a flow progresses. It moves if something new is acknowledged or received. */
struct progress {
	__u64 moved;         /* when it moved last */
	__u64 since;         /* when it moved, or had nothing outstanding, whichever was last */
	__u64 last_probed;   /* when a probe left last */
	__u64 last_unproven; /* when a probe to a hop that was not proven left last; 0: none, or it was survived */
	__u64 last_repeat;   /* when it was last seen to repeat itself, in place of moving */
	__u64 stalled_at;    /* when it was found to be stalled; 0: it is not */
	__u32 position;      /* number of bytes acknowledged and received, or of packets received, modulo 2^32 */
	__u32 segments;      /* number of data segments received, or of packets that should have moved it */
	__u32 exams;         /* those of its struct trust when it stalled */
	__u8 repeats;        /* number of times since it moved that it was seen to repeat itself */
	__u8 doubted;        /* this flow raised the doubt (enum doubt) */
	__u8 withheld;       /* this flow is not probed, to settle the doubt */
	__u8 under_probes;   /* a probe may be why it stalled, and its loss has not been counted yet */
	__u8 resend_probed;  /* its last packet during the stall carried a probe */
	__u8 tries;          /* number of packets that it sent in the stall while other flows were moving */
	__u8 reported;       /* user space knows that it is stalled */
};

/* ---- Types of this file ------------------------------------------------------------------- */

#define UDP_HEAD_LEN 32 /* payload bytes that distinguish UDP packets with partial checksums */
#define SUM_CHUNK 512   /* maximum length for bpf_csum_diff() */

/* Functions that decide about a probe return 0, or the reason why there is none: REASON() of a counter. NOT_SENT is
 * a reason that has no counter, or was counted already. */
#define NOT_SENT (-1)

/* The right to send one probe. */
struct reservation {
	__u32 seq;
	__u32 ttl;
	__u32 salt; /* of struct schedule */
	__u32 form; /* enum probe_form */
	__u64 time; /* when it was made */
	__u64 due;  /* the hop's next due time, as the reservation set it */
	__u64 kept; /* part of the budget that is kept for other processes, ns */
	__u32 flow; /* slot of the carrier's flow, see struct turns */
};

/* Identifies a quoted UDP packet whose partial checksum no device has completed. Packets of a flow that have the
 * same length have the same partial checksum; the first bytes of the payload tell them apart. */
struct udp_partial {
	struct probe_key key; /* ident: length << 16 | partial checksum */
	__u8 head[UDP_HEAD_LEN];
};

/* A flow, seen from here. */
struct flow_key {
	struct in6_addr source, dest;
	__be16 sport, dport; /* ICMP: echo identifier, 0 */
	__u32 protocol;
};

/* What the socket of a TCP flow says, or what we know of a flow without a TCP socket here. */
struct flow_look {
	__u32 position, segments; /* as in struct progress */
	__u32 timeouts; /* number of retransmission timers that expired since something was acknowledged */
	__u32 outstanding;
	__u32 srtt;       /* us */
	__u32 port;       /* of the destination, as in the packet */
	__u32 is_one_way; /* the flow had one answer: perhaps the destination is not to send another */
	__u32 is_probed;  /* a packet of the flow carried a probe already */
	__u64 patience;   /* time in which it should move */
};

/* What the next packet in elf_egress is. 0: an application packet. */
enum { CLONE = 1, PROBE = 2 };

/* Result for a probe that another filter took before elf_egress saw it again. No error number. */
#define INTERCEPTED (-4096)

/* What a program run needs outside its stack. */
struct scratch {
	/* Shared by elf_egress and the run for its clone, elf_probe: */
	struct reservation reservation;
	__u32 expected;   /* CLONE or PROBE: the next packet is ours */
	__u32 recorded;   /* the probe is in flight, under the key below */
	__u32 redirected; /* elf_probe redirected the probe once more and dropped the clone; the result: */
	__s32 redirect_result;
	struct probe_key key;
	struct probe probe;    /* elf_egress fills in pid, app and tcp */
	__u32 charged;         /* PID of the process whose share the probe counts against; 0: none */
	__u32 acked;           /* first sequence number that is not acknowledged, if probe.tcp has a window */
	__u32 next;            /* first sequence number that was not sent yet */
	__u32 resent;          /* the carrier is a retransmission */
	struct flow_key flow;  /* of the carrier */
	struct flow_look look; /* at it */
	__u32 early;           /* nothing proves yet that the peer knows its connection */
	__u32 stalled;
	__u32 may_carry;     /* as the path model says */
	__u32 can_fall_back; /* it may carry a fallback probe */
	__u32 unfit;         /* reason why the packet carries no probe, although its flow is looked at; 0: none */
	/* In elf_probe: */
	__u8 sum_buffer[SUM_CHUNK + 4];
	/* In elf_ingress: */
	struct extended_result result;
	/* In both: */
	struct udp_partial partial;
	/* While headers are parsed: */
	__u32 parsed_len;
	__u32 hidden; /* see hidden() */
};

/* ---- Platform: everything that depends on kernel, BCC or byte order ------------------------
 *
 * Each #if is a fallback that can be deleted by itself, when nobody needs it any more. */

/* Big endian. BCC's own macros swap bytes on every machine. */
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
#define bpf_htons(host) ((__be16)(host))
#define bpf_ntohs(wire) ((__u16)(wire))
#define bpf_htonl(host) ((__be32)(host))
#define bpf_ntohl(wire) ((__u32)(wire))
#define first_lowest(word) __builtin_bswap64(word)
#else
#define first_lowest(word) (word) /* 8 characters: move the first into the lowest byte, or back to its place */
#endif

/* Helpers by number, because some versions of BCC do not declare them, or give their names to other helpers. */
static __u64 (*jiffies64)(void) = (void *)118;
static long (*probe_read_kernel)(void *to, __u32 size, const void *from) = (void *)113;

/* Return the time in jiffies: coarse, but 30 ns cheaper than bpf_ktime_get_ns(). Always 0 before Linux 5.6. */
static inline __u64 ticks_now(void)
{
	return TICK_NS ? jiffies64() : 0;
}

#define READ_ONCE(x) (*(volatile typeof(x) *)&(x))
/* clang keeps the variable, and knows nothing of its value. */
#define barrier_var(var) asm volatile("" : "+r"(var))

/* Advance a pointer to element nr of an array. Callers know that nr is at most max; this checks it again. Symptom:
 * "math between map_value pointer and register with unbounded min value", or "invalid access to map value". Cause:
 * verifiers before Linux 5.10 lose the bounds of a register that is copied or spilled. They accept it only if the
 * same register is compared, multiplied and added, which no compiler promises. Can go: when test_all_builds passes
 * on the oldest kernel with "pointer += nr" in its place. */
#define ADVANCE(pointer, nr, max) \
	asm volatile("if %1 <= %2 goto +1\n\t%1 = 0\n\t%1 *= %3\n\t%0 += %1" \
		     : "+r"(pointer), "+r"(nr) \
		     : "i"(max), "i"(sizeof(*(pointer))))

/* Verdict for a packet that we consume. clsact counts TC_ACT_SHOT as a drop, but not TC_ACT_STOLEN. tcx
 * does not know TC_ACT_STOLEN and takes it for TC_ACT_UNSPEC (tcx_action_code() in include/net/tcx.h). */
#define TC_ACT_CONSUMED (TCX ? TC_ACT_SHOT : TC_ACT_STOLEN)

BPF_PROG_ARRAY(programs, 2); /* 0: elf_probe; with INGRESS_TC 1: elf_ingress */

/* elf_ingress runs at XDP or at TC ingress. Both contexts have data, data_end, data_meta and ingress_ifindex.
 * elf_ingress and most hooks need no more, so the same source compiles for both.
 *
 * At TC ingress a program can read only the linear part of a packet. pull_and_rerun() makes the linear part len
 * bytes long, if the packet is that long, and runs elf_ingress again. If it returns 1, the caller must return,
 * because the caller's pointers are no longer valid. */
#if INGRESS_TC
#define xdp_md __sk_buff
#define VERDICT_PASS TC_ACT_UNSPEC
#define VERDICT_DROP TC_ACT_CONSUMED

static inline int pull_and_rerun(struct xdp_md *ctx, __u32 len)
{
	__u64 linear = (void *)(long)ctx->data_end - (void *)(long)ctx->data;

	if (linear >= ctx->len || linear >= len)
		return 0;
	if (bpf_skb_pull_data(ctx, ctx->len < len ? ctx->len : len) == 0)
		programs.call(ctx, 1);
	return 1;
}
#else
#define VERDICT_PASS XDP_PASS
#define VERDICT_DROP XDP_DROP

static inline int pull_and_rerun(struct xdp_md *ctx, __u32 len)
{
	return 0;
}
#endif

BPF_PERCPU_ARRAY(counters, struct counters, 1);

static inline struct counters *this_cpu_counters(void)
{
	int zero = 0;

	return counters.lookup(&zero);
}

/* The number of a counter, for functions that return why there is no probe. 0, the counter of probes, is no reason.
 */
#define REASON(field) ((int)(__builtin_offsetof(struct counters, field) / sizeof(__u64)))

static inline void count_reason(__u64 reason)
{
	struct counters *all = this_cpu_counters();
	__u64 *counter = (__u64 *)all;

	if (!all)
		return;
	ADVANCE(counter, reason, sizeof(*all) / sizeof(*counter) - 1);
	if (PREEMPTIBLE)
		__sync_fetch_and_add(counter, 1);
	else
		(*counter)++;
}

#define COUNT(field) count_reason(REASON(field))

/* Scratch is per CPU: no other run on this CPU begins before ours ends, except those for our own clone. With
 * PREEMPT_RT another run can preempt ours, so scratch is per task instead: the runs for a packet and its clone
 * belong to the same task. A task's scratch begins as a copy of cpu_scratch, which no run writes then. */
BPF_PERCPU_ARRAY(cpu_scratch, struct scratch, 1);

#if PREEMPTIBLE
/* A task that is preempted in a run loses its scratch once so many other tasks have had runs. */
#define TASKS_MAX 8192
BPF_TABLE("lru_hash", __u64, struct scratch, task_scratch, TASKS_MAX);
BPF_PERCPU_ARRAY(tasks_expecting, __u32, 1); /* number of tasks that expect a clone or a probe, mostly 0 */

static inline struct scratch *scratch_of_run(void)
{
	__u64 task = bpf_get_current_task();
	struct scratch *initial;
	int zero = 0;

	initial = cpu_scratch.lookup(&zero);
	return initial ? task_scratch.lookup_or_try_init(&task, initial) : 0;
}

static inline int is_any_expected(void)
{
	int zero = 0;
	__u32 *tasks;

	tasks = tasks_expecting.lookup(&zero);
	return tasks && *tasks;
}

static inline void expect(struct scratch *scratch, __u32 what)
{
	int zero = 0;
	__u32 *tasks;

	tasks = tasks_expecting.lookup(&zero);
	if (tasks)
		__sync_fetch_and_add(tasks, (__u32) !!what - !!scratch->expected);
	scratch->expected = what;
}
#else
static inline struct scratch *scratch_of_run(void)
{
	int zero = 0;

	return cpu_scratch.lookup(&zero);
}

static inline int is_any_expected(void)
{
	return 1;
}

static inline void expect(struct scratch *scratch, __u32 what)
{
	scratch->expected = what;
}
#endif

/* Return the scratch of the run whose clone or probe this packet is, 0 for an application packet. */
static inline struct scratch *scratch_expecting(void)
{
	struct scratch *scratch = is_any_expected() ? scratch_of_run() : 0;

	return scratch && scratch->expected ? scratch : 0;
}

/* Return the same number, but unknown to the verifier, as every value in a map is. Otherwise the verifier follows
 * the rest of the program once for each value of the number. */
static inline __u32 hidden(struct scratch *scratch, __u32 number)
{
	scratch->hidden = number;
	return READ_ONCE(scratch->hidden);
}

/* submit_result() and submit_flow_event() return a negative number if there is no room. User space polls the result
 * ring. submit_result() also wakes it after WAKE_EVERY results, before the ring is full (OLD_MAPS: after each).
 *
 * progress_of() returns the progress of the packet's TCP flow, or 0 if there is no memory for it.
 *
 * first_segment_len() returns the payload length of the first segment that the device makes of a packet. Before
 * Linux 5.7, programs cannot read gso_size. */
#if OLD_MAPS
BPF_PERF_OUTPUT(results);
BPF_PERF_OUTPUT(flow_events);
BPF_TABLE("lru_hash", __u64, struct progress, tcp_progress, 16384); /* by socket cookie */

static inline int submit_result(struct xdp_md *ctx, void *result, __u64 size)
{
	return results.perf_submit(ctx, result, size);
}

static inline int submit_flow_event(void *ctx, struct flow_event *event)
{
	return flow_events.perf_submit(ctx, event, sizeof(*event));
}

static inline struct progress *progress_of(struct __sk_buff *skb, struct bpf_sock *sk)
{
	__u64 cookie = bpf_get_socket_cookie(skb);
	struct progress *progress, none = {};

	progress = tcp_progress.lookup(&cookie);
	if (progress)
		return progress;
	tcp_progress.update(&cookie, &none);
	return tcp_progress.lookup(&cookie);
}

static inline __u32 first_segment_len(const struct __sk_buff *skb, __u32 payload)
{
	__u32 segments = skb->gso_segs;

	return segments > 1 ? (payload + segments - 1) / segments : payload;
}
#else
BPF_RINGBUF_OUTPUT(results, 1); /* 1: map_sizes() in elfprobe.py gives the size, also for maps below */
BPF_RINGBUF_OUTPUT(flow_events, 16);
BPF_SK_STORAGE(tcp_progress, struct progress);

static inline int submit_result(struct xdp_md *ctx, void *result, __u64 size)
{
	struct counters *all = this_cpu_counters();
	__u64 wakeup = all && all->replies % WAKE_EVERY == 0 ? BPF_RB_FORCE_WAKEUP : BPF_RB_NO_WAKEUP;

	return results.ringbuf_output(result, size, wakeup);
}

static inline int submit_flow_event(void *ctx, struct flow_event *event)
{
	return flow_events.ringbuf_output(event, sizeof(*event), 0);
}

static inline struct progress *progress_of(struct __sk_buff *skb, struct bpf_sock *sk)
{
	return tcp_progress.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
}

static inline __u32 first_segment_len(const struct __sk_buff *skb, __u32 payload)
{
	return skb->gso_size && skb->gso_size < payload ? skb->gso_size : payload;
}
#endif

/* Return a byte of struct skb_shared_info, 0 if we cannot read it. The context of a TC program is the struct sk_buff
 * itself. struct skb_shared_info is behind the packet's data. */
static inline __u8 read_shared_info(struct __sk_buff *skb, __u32 offset)
{
	__u64 head = 0;
	__u32 end = 0;
	__u8 byte = 0;

	if (!SKB_HEAD)
		return 0;
	probe_read_kernel(&head, sizeof(head), (void *)skb + SKB_HEAD);
	probe_read_kernel(&end, sizeof(end), (void *)skb + SKB_END);
	probe_read_kernel(&byte, sizeof(byte), (void *)(head + end + offset));
	return byte;
}

/* Does the packet hold memory of the application (MSG_ZEROCOPY, io_uring)? If we trim its clone, the kernel copies
 * the data and tells the application so, once for each probe (skb_zcopy_clear() in __pskb_pull_tail()). Many
 * applications stop using MSG_ZEROCOPY then. */
static inline int is_zerocopy(struct __sk_buff *skb)
{
	return read_shared_info(skb, ZEROCOPY_FLAGS) & ZEROCOPY_FLAG;
}

/* include/net/dst.h, include/linux/skbuff.h, include/uapi/linux/route.h */
#define SKB_DST_NOREF 1
#define DST_FAKE_RTABLE 0x40
#define DST_METADATA 0x80
#define RTF_GATEWAY 2

/* Does the route of the packet have no gateway, so that the next hop is the destination itself? The kernel has
 * chosen the route before TC egress, by all its rules. bpf_fib_lookup() cannot tell: it refuses a device that does
 * not forward. Return 0 if we cannot know: without BTF, for a packet without a route, or behind a device that has no
 * link layer, where routers need no address. */
static inline int is_on_link(struct __sk_buff *skb, __u32 version)
{
	__u8 gateway_family = 0;
	__u32 route_flags = 0;
	__u16 flags = 0;
	__u64 dst = 0;

	if (!SKB_DST || FRAME != FRAME_ETHERNET || TUNNEL)
		return 0;
	probe_read_kernel(&dst, sizeof(dst), (void *)skb + SKB_DST);
	dst &= ~SKB_DST_NOREF;
	if (!dst || probe_read_kernel(&flags, sizeof(flags), (void *)(dst + DST_FLAGS)) ||
	    flags & (DST_FAKE_RTABLE | DST_METADATA))
		return 0;
	if (version == 4)
		return !probe_read_kernel(&gateway_family, sizeof(gateway_family), (void *)(dst + RT4_GATEWAY)) &&
		       !gateway_family;
	return !probe_read_kernel(&route_flags, sizeof(route_flags), (void *)(dst + RT6_FLAGS)) &&
	       !(route_flags & RTF_GATEWAY);
}

/* Does the packet ask the network card for a time stamp? Its clone would ask, too. Some cards take one at a time
 * (igb, igc), so the packet would get none. The kernel's own time stamps need a socket, which clones lack. */
#define SKBTX_HW_TSTAMP 1

static inline int wants_card_stamp(struct __sk_buff *skb)
{
	return read_shared_info(skb, TX_FLAGS) & SKBTX_HW_TSTAMP;
}

/* ---- Path model: pacing, distance, liveness, back-off --------------------------------------
 *
 * What we know of the path to a destination, and which hop to probe next. The functions of this section are pure: no
 * lock, no helper, no map. They also compile on the host, without the kernel: see tests/test_path_model.py.
 *
 * event                 pacing              distance                   liveness             hop, back-off
 * --------------------  ------------------  -------------------------  -------------------  ----------------------
 * choose_hop            last_probed; none   try one TTL more after a   unresponsive: is no  unresponsive: next level,
 *                       due: next_due       wait; unresponsive: may    last_responsive      due later
 *                                           end what it proved
 * probe_postponed       last_probed - 1
 * takes_turn                                                                                turns
 * probe_reserved        next_due, seq + 1,  exploration done                                unanswered + 1, due: its
 *                       last_sent                                                           responder's next turn;
 *                                                                                           early retry: level 0
 * probe_sent            last_sent, next_due fallbacks                                       due counts from now
 * probe_cancelled                                                                           unanswered - 1, due
 * hop_replied           next_due, if this   proven, next TTL to try;   outage ends;         level 0, unanswered 0,
 *                       hop is due earlier  beyond length: longer;     last_responsive, if  rtt, due, false_alarms
 *                                           last router: may explore   farther
 * destination_seen      next_due: now, if   shorter at once, longer    outage ends;
 *                       anything changed    after LONGER_AFTER         last_received;
 *                                           packets, bare ACKs count   last_responsive < length
 *                                           less; none proven
 * destination_reached                       length <= this TTL,        last_responsive < TTL
 *                                           proven < TTL
 *
 * flow_looked, flow_probed and flow_received are about flows that stall: see *Firewalls* below.
 *
 * Wrappers below call these functions under the lock. Some fields are used without it:
 * - note_packet() writes liveness.last_received. If two CPUs write it at the same time, it is wrong by a tick.
 *   That does not matter, because it is compared with a second.
 * - elf_egress reads pacing.next_due and next_due_tick. choose_hop() checks next_due again. If next_due_tick is
 *   outdated, the probe leaves with the next packet.
 * - elf_egress and user space set excluded, which is never cleared. elf_egress sets watched_until of a trust.
 *   flows_only is written before the entry is in a map.
 * - elf_ingress counts what was received of a flow. If its entry in the map is reused meanwhile, one packet is counted
 *   for another flow.
 * - elf_egress postpones next_due while the destination is on-link. If that is lost, the next packet repeats it.
 * - is_as_expected(), may_begin_probed(), flow_slot() and look_at_foreign() read fields that may be outdated by one
 *   event.
 * - elf_ingress sets arrival_reported. If two CPUs do so at the same time, the log has the line twice. */

/* What a probe looks like. Only a probe to a proven hop has the usual form (see NOTRUNC). Any other may arrive. */
enum probe_form {
	USUAL,
	GUARDED,  /* every receiver discards it; a NAT does not translate it, and a stateful firewall may drop it */
	FALLBACK, /* a NAT translates it, and the application of the receiver cannot tell it from its own packets */
};

/* Two kinds of hop back off. For a hop that is certainly a router, the first level is one interval (1 ms at least)
 * and each further level is twice as long as the one before. For a hop that may be the destination, each further
 * level is eight times as long. The shifts are the logarithms of these factors. */
#define BACKOFF_ROUTER_SHIFT 1
#define BACKOFF_ROUTER_MAX (10 * NSEC_PER_SEC)
#define BACKOFF_BEYOND_SHIFT 3
#define BACKOFF_BEYOND_MAX (256 * NSEC_PER_SEC)
#define BACKOFF_ANSWERED (200 * NSEC_PER_MSEC) /* first level of such a hop, if it has answered before */
#define BACKOFF_NEVER_ANSWERED NSEC_PER_SEC    /* first level if it has not */
/* At this level every back-off has reached its maximum. The limit also keeps the shifts inside 64 bits. */
#define BACKOFF_LEVEL_MAX 16
#define BEYOND_LEVEL_MAX 4       /* 0.2 s * 8^4 is more than the maximum */
#define FALSE_ALARMS_PER_LEVEL 4 /* so many false alarms make one more level as short as the first */
#define FALSE_ALARMS_MAX 12
/* Number of consecutive unanswered probes up to which a router counts as responsive. */
#define ROUTER_LOSSES_MAX 8
/* Hops whose first unanswered probes left within this time became unresponsive together. */
#define TOGETHER NSEC_PER_SEC
#define TOGETHER_TICKS (TOGETHER / (TICK_NS + !TICK_NS))

/* While the distance is unknown: time to wait for a hop before the next one is tried. Each unresponsive hop before
 * makes it four times as long. */
#define STEP_WAIT (500 * NSEC_PER_MSEC)
#define STEP_WAIT_MIN (20 * NSEC_PER_MSEC) /* added to four round-trip times of the farthest hop that answers */
#define STEP_SHIFT_MAX 8
/* Number of consecutive packets from farther away, before we believe that the path has become longer. */
#define LONGER_AFTER 16
/* Number of bare ACKs from nearer by, before we believe that the path is shorter than packets with data say. */
#define SHORTER_AFTER 3
/* One probe out of so many goes one hop beyond the believed last router. */
#define EXPLORE_EVERY 20000
/* Minimum time between two explorations that replies of the last router cause. */
#define EXPLORE_AGAIN (10 * NSEC_PER_SEC)

/* Maximum number of fallback probes without a router's reply: so many datagrams may arrive twice. */
#define FALLBACKS_MAX 3
/* Without an interval, at most so many probes to a hop are in flight. All may arrive if the path becomes shorter. */
#define HOP_IN_FLIGHT 8

/* Time between two probes to a responsive hop. */
#define HOP_INTERVAL (RATE_GLOBAL ? 0 : INTERVAL_NS)
/* The first routers answer the probes to all destinations. Each responder has a queue of turns, this far apart. A
 * probe to it puts the destination's next probe at the end of the queue. So all destinations get the same share. */
#define RESPONDER_INTERVAL (INTERVAL_NS < 10 * NSEC_PER_MSEC ? INTERVAL_NS : 10 * NSEC_PER_MSEC)
/* Number of queues. The hash of a responder's address gives its queue, which it may share. Queue 0: not known. */
#define RESPONDERS (1 << 13)
#define QUEUES_SIZE 65536 /* bytes: RESPONDERS times 8. BCC wants a plain number here. */
/* Unit of waiting: the interval, but 1 ms at least, because INTERVAL_NS may be 0. */
#define PATIENCE (INTERVAL_NS > NSEC_PER_MSEC ? INTERVAL_NS : NSEC_PER_MSEC)

/* Flows to the same destination take turns at each hop. A flow that had its turn in this round leaves a due probe to
 * the others for a while. Then the next round begins. It waits for
 * - PATIENCE, if fewer flows had a turn than expected.
 * - else LOOK_WAIT, to look for new flows, if a probe has just left, because packets come in bursts. A flow that is
 *   alone does so for one probe of LOOK_EVERY. Without bursts, a new flow's packet is sometimes the first one after
 *   the due time. */
#define FLOW_SLOTS 32 /* flows with the same slot share their turns */
#define LOOK_EVERY 5  /* a prime number, or it would always be the same hop's turn */
#define LOOK_WAIT NSEC_PER_MSEC
#define WAIT_SHIFT 17 /* waiting is measured in units of 2^17 ns, 0.13 ms */

enum backoff_state {
	BACKING_OFF = 1,   /* bit: no probe until the hop is due, or may be retried early */
	RETRIED_EARLY = 2, /* bit: the one early retry since the last reply is used up */
};

struct backoff {
	__u8 level;        /* number of back-offs since the last reply */
	__u8 state;        /* bits of enum backoff_state */
	__u8 false_alarms; /* how often a shortest back-off ended with a reply: packets were only lost */
};

/* Which flows have probed a hop in this round? */
struct turns {
	__u32 flows;   /* bits: slots of flows that had their turn */
	__u16 since;   /* when a due probe began to wait for others, units of waiting; 0: it does not */
	__u8 taken;    /* number of turns in this round */
	__u8 expected; /* number that is expected: as in the round before, or one less than expected then */
};

struct hop {
	__u64 due;       /* no probe before this time */
	__u64 since;     /* when the first of the unanswered probes left, or when the last reply came */
	__u32 rtt;       /* latency of the last reply, us; 0: never answered */
	__u8 unanswered; /* number of probes since the last reply */
	struct backoff backoff;
	struct turns turns;
};

struct pacing {
	__u64 next_due;      /* no probe before this time */
	__u64 next_due_tick; /* nor before this tick; the only field that packets read between two probes */
	__u64 last_sent;     /* when the last probe left */
	__u32 seq;           /* of the next probe */
	__u8 last_probed;    /* hop of the last probe */
};

struct distance {
	__u64 changed_at;      /* when the path changed: replies to older probes are about the old path */
	__u64 reply_distances; /* bits: distances from which the last router replied, since length has this value */
	__u64 last_explored;   /* last exploration because of such a reply; 0: never */
	__u8 length;           /* TTL that reaches the destination; 0: unknown */
	__u8 reverse;          /* length of the reverse path, by the TTL of the destination's packets */
	__u8 longer_packets;   /* number of consecutive packets that say that the path is longer */
	__u8 max_ttl_tried;    /* farthest hop to probe for now: hops before it are proven, or do not respond */
	__u8 explore;          /* send one probe one hop beyond the last router */
	__u8 is_confirmed;     /* a probe has reached the destination */
	__u8 proven;           /* farthest proven hop; those before it are proven, too; 0: none */
	__u8 symmetric;        /* farthest proven hop, if its reply came from the same distance; else 0 */
	__u8 fallbacks;        /* number of fallback probes since a router answered one */
	__u8 guards_blocked;   /* a router answered a fallback probe, but no guarded one */
	__u8 by_data;          /* packets with data came from the distance reverse: see destination_seen() */
	__u8 shorter_acks; /* number of bare ACKs since the last such packet that say that the path is shorter */
};

struct liveness {
	__u64 last_received;  /* tick of the destination's last packet */
	__u64 outage_start;   /* last sign of life before the last outage */
	__u64 outage_end;     /* first sign of life after it */
	__u64 farthest_reply; /* time of the last reply of last_responsive */
	__u64 routers_proven; /* when a hop answered behind unresponsive ones, which proves that these are routers */
	__u8 last_responsive; /* farthest hop that answers; 0: none */
};

/* Do flows survive probes? A firewall may treat TCP and other protocols differently. */
struct trust {
	__u64 last_moved;   /* when a flow moved last */
	__u64 paused_until; /* no flow is probed until then */
	__u64 last_strike;  /* when the last strike was counted */
	__u64 exam;         /* when the first probe left in this exam; 0: none did */
	__u64 episode; /* when the last stall began that counts, or may; others at that time do not count again */
	__u32 exams;   /* number of all exams that were passed */
	int suspicion; /* that probes to hops that are not proven stall flows; negative: flows stall without them */
	__u64 suspected_at; /* when the last stall began that raised suspicion, or belonged to the same episode */
	__u8 awaits;        /* the pause waits for a stalled flow to move: then that is a strike */
	__u8 strikes;       /* signs that stalls are a firewall's doing */
	__u8 passed;        /* number of exams without a stall */
	__u8 max_ttl;       /* farthest hop that was probed in these exams */
	__u8 has_stalled;   /* a probed flow stalled, in spite of trust, and no stalled flow has moved again */
	__u8 doubt;         /* enum doubt: do flows stop after one answer because of probes? */
	__u32 doubted_port; /* of the destination, in such flows */
	__u64 doubted_at;
	__u64 watched_until; /* up to this tick, each packet received is looked at */
};

enum doubt { NO_DOUBT, DOUBTED, ONE_WAY };

struct path {
	struct pacing pacing;
	struct distance distance;
	struct liveness liveness;
	__u8 excluded;          /* no more probes: they make flows stall, or clones were intercepted */
	__u8 flows_only;        /* the destination is no target itself: probe only the flows of target processes */
	__u8 arrival_reported;  /* user space knows that probes reach the destination */
	struct trust trusts[2]; /* of TCP, of all others */
	__u16 responders[MAX_HOPS + 1]; /* the queue of each hop's last responder */
	struct hop hops[MAX_HOPS + 1];
};

static inline __u64 min64(__u64 a, __u64 b)
{
	return a < b ? a : b;
}

static inline __u64 max64(__u64 a, __u64 b)
{
	return a > b ? a : b;
}

static inline struct hop *hop_at(struct path *path, __u64 nr)
{
	struct hop *hop = path->hops;

	if (nr > MAX_HOPS)
		return 0;
	ADVANCE(hop, nr, MAX_HOPS);
	return hop;
}

static inline __u16 *responder_at(struct path *path, __u64 nr)
{
	__u16 *responder = path->responders;

	if (nr > MAX_HOPS)
		return 0;
	ADVANCE(responder, nr, MAX_HOPS);
	return responder;
}

/* Return the trust in flows of this protocol. */
static inline struct trust *trust_in(struct path *path, __u32 protocol)
{
	struct trust *trust = path->trusts;
	__u64 nr = protocol != IPPROTO_TCP;

	ADVANCE(trust, nr, 1);
	return trust;
}

/* Return the queue of this hop's responder, 0 if that is not known. */
static inline __u64 queue_of(struct path *path, __u32 nr)
{
	__u16 *responder = responder_at(path, nr);

	return responder ? *responder : 0;
}

/* Return the end of a queue. That of queue 0 stays 0. */
static inline __u64 *queue_end(__u64 *queues, __u64 queue)
{
	if (queue >= RESPONDERS)
		queue = 0;
	ADVANCE(queues, queue, RESPONDERS - 1);
	return queues;
}

/* Is the hop certainly a router? It is if a hop behind it answers, and has done so since this one became
 * unresponsive. */
static inline int is_router(const struct path *path, __u32 nr, const struct hop *hop)
{
	return nr <= path->distance.proven && nr < path->liveness.last_responsive &&
	       path->liveness.farthest_reply > hop->since;
}

/* Return how long to wait for the reply of a hop that may be the destination, ns. For a hop that never answered,
 * the round-trip time of the farthest hop that answers counts. */
static inline __u64 reply_wait(struct path *path, const struct hop *hop)
{
	struct hop *last;

	if (hop->rtt)
		return 2000ULL * hop->rtt + min64(PATIENCE, 4 * NSEC_PER_MSEC);
	last = hop_at(path, path->liveness.last_responsive);
	if (!last || !last->rtt)
		return STEP_WAIT;
	return min64(4000ULL * last->rtt + STEP_WAIT_MIN, STEP_WAIT);
}

/* Are the hop's replies overdue? A late reply ends the back-off (hop_replied()). */
static inline int is_unresponsive(struct path *path, __u32 nr, const struct hop *hop, __u64 now)
{
	__u64 rtt = hop->rtt * 1000ULL, waited = now - hop->since;

	if (is_router(path, nr, hop))
		return hop->unanswered > ROUTER_LOSSES_MAX &&
		       (!rtt || waited > rtt + rtt / 4 + ROUTER_LOSSES_MAX * PATIENCE);
	return hop->unanswered && waited >= reply_wait(path, hop);
}

/* Return the number of levels, besides the first, that are as short as the first. */
static inline __u32 short_levels(const struct backoff *backoff)
{
	return backoff->false_alarms / FALSE_ALARMS_PER_LEVEL;
}

/* Return how long an unresponsive hop backs off, ns. A router backs off because each probe costs it and us
 * something. A hop that may be the destination backs off because probes must not reach the destination. The
 * farther it is behind the last hop that answers, the longer is its back-off. */
static inline __u64 backoff_delay(const struct path *path, __u32 nr, const struct hop *hop)
{
	__u32 beyond, level = hop->backoff.level, last = path->liveness.last_responsive;
	__u64 first;

	if (is_router(path, nr, hop))
		return min64(PATIENCE << BACKOFF_ROUTER_SHIFT * min64(level, BACKOFF_LEVEL_MAX),
			     BACKOFF_ROUTER_MAX);
	beyond = nr > last ? nr - last - 1 : 0;
	level = level > short_levels(&hop->backoff) ? level - short_levels(&hop->backoff) : 0;
	first = hop->rtt ? BACKOFF_ANSWERED : BACKOFF_NEVER_ANSWERED;
	return min64(first << BACKOFF_BEYOND_SHIFT * min64(level + beyond, BEYOND_LEVEL_MAX), BACKOFF_BEYOND_MAX);
}

/* May the hop be probed before its back-off is over? It may, once, if it stopped responding with an outage that has
 * ended, or if a hop behind it has answered, so that it is certainly a router. */
static inline int may_retry_early(const struct path *path, __u32 nr, const struct hop *hop)
{
	const struct liveness *liveness = &path->liveness;

	if (hop->backoff.state != BACKING_OFF)
		return 0;
	if (nr < liveness->last_responsive && hop->since < liveness->routers_proven)
		return 1;
	return hop->since < liveness->outage_end && hop->since + TOGETHER > liveness->outage_start;
}

/* Return the form of a probe to this hop. can_fall_back: the packet may carry a fallback probe. */
static inline enum probe_form probe_form(const struct path *path, __u32 nr, const struct hop *hop,
					 int can_fall_back, __u64 ticks)
{
	const struct distance *distance = &path->distance;

	if (nr <= distance->proven)
		return USUAL;
	if (!can_fall_back || distance->fallbacks >= FALLBACKS_MAX ||
	    (!hop->backoff.level && !distance->guards_blocked) ||
	    ticks - path->liveness.last_received > TOGETHER_TICKS) /* an outage is not the guarded probes' fault */
		return GUARDED;
	/* The TTL of the destination's own packets must show that it is clearly farther away. */
	return nr + (nr != distance->symmetric + 1U) < distance->reverse ? FALLBACK : GUARDED;
}

/* Return how long to wait for a hop that is not proven, before the next one is tried. While the length is unknown,
 * each unresponsive hop before makes the wait longer. */
static inline __u64 step_wait(struct path *path, __u32 nr, const struct hop *hop)
{
	__u32 last = path->liveness.last_responsive;

	if (path->distance.length)
		return reply_wait(path, hop);
	return STEP_WAIT << min64(nr > last ? 2 * (nr - 1 - last) : 0, STEP_SHIFT_MAX);
}

/* Return the farthest hop to probe: at most the last one before the destination. Beyond the proven hops one more is
 * tried at a time. */
static inline __u32 farthest_hop(struct path *path, __u64 now)
{
	__u32 limit = path->distance.length ? path->distance.length - 1 : MAX_HOPS;
	__u32 tried = path->distance.max_ttl_tried;
	struct hop *hop;

	if (limit > MAX_HOPS)
		limit = MAX_HOPS;
	if (tried <= path->distance.proven && tried < limit) {
		tried = min64(path->distance.proven + 1, limit);
	} else if (tried < limit) {
		hop = hop_at(path, tried);
		if (hop && hop->unanswered && now > hop->since && /* another CPU may just have probed it */
		    now - hop->since > step_wait(path, tried, hop))
			tried++;
	}
	path->distance.max_ttl_tried = tried;
	return min64(tried, limit);
}

/* Allow no probe before this time. Round down to ticks, so that no probe is late. */
static inline void set_next_due(struct pacing *pacing, __u64 due, __u64 now, __u64 ticks)
{
	pacing->next_due = due;
	pacing->next_due_tick = TICK_NS && due > now ? ticks + (due - now) / (TICK_NS + !TICK_NS) : 0;
}

/* A hop is now due at this time. If that is earlier than the path's due time, the path is due then, too. */
static inline void set_due_earlier(struct pacing *pacing, __u64 due)
{
	if (RATE_GLOBAL)
		due = max64(due, pacing->last_sent + INTERVAL_NS);
	if (due < pacing->next_due) {
		pacing->next_due = due;
		pacing->next_due_tick = 0;
	}
}

/* Return the first due hop behind the last probed one, and make it the last probed. Begin again at hop 1 after the
 * farthest. If none is due, return 0 and set earliest to the first due time. */
static inline struct hop *next_due_hop(struct path *path, __u32 farthest, __u64 now, __u64 *earliest)
{
	struct pacing *pacing = &path->pacing;
	struct hop *hop;
	__u32 i, nr;

#pragma unroll
	for (i = 0; i < MAX_HOPS; i++) {
		if (i < farthest) {
			pacing->last_probed = pacing->last_probed < farthest ? pacing->last_probed + 1 : 1;
			nr = READ_ONCE(pacing->last_probed); /* else the verifier follows a path for each number */
			hop = hop_at(path, nr);
			if (!hop)
				return 0;
			if (hop->due <= now || may_retry_early(path, nr, hop))
				return hop;
			*earliest = min64(*earliest, hop->due);
		}
	}
	return 0;
}

static inline int is_exploration_due(const struct path *path)
{
	return path->distance.length && path->distance.length <= MAX_HOPS &&
	       (path->distance.explore || path->pacing.seq % EXPLORE_EVERY == EXPLORE_EVERY - 1);
}

/* Only the hops before nr may still be proven. If the last of them does not answer itself, only hop nr proved it:
 * then no hop is proven. An underestimate is harmless. */
static inline void limit_proven(struct path *path, __u32 nr)
{
	struct hop *last = hop_at(path, nr - 1);

	if (path->distance.proven >= nr)
		path->distance.proven = last && last->rtt && !last->unanswered ? nr - 1 : 0;
}

/* A hop turned out to be unresponsive: it backs off. Unless it is certainly a router, it may have become the
 * destination: then it does not prove the hops before it any longer. */
static inline void back_off(struct path *path, __u32 nr, struct hop *hop, __u64 now)
{
	if (nr && !is_router(path, nr, hop))
		limit_proven(path, nr);
	if (nr == path->liveness.last_responsive)
		path->liveness.last_responsive--;
	hop->due = now + backoff_delay(path, nr, hop);
	hop->backoff.state |= BACKING_OFF;
	if (hop->backoff.level < BACKOFF_LEVEL_MAX)
		hop->backoff.level++;
}

#define NONE_DUE 0
#define HOP_UNRESPONSIVE (-1)

/* A packet may carry a probe. Return the TTL of that probe, NONE_DUE, or HOP_UNRESPONSIVE if the next hop just
 * turned out to be unresponsive; then the next packet may carry a probe to another hop. */
static inline int choose_hop(struct path *path, __u64 now, __u64 ticks)
{
	__u64 earliest = now + NSEC_PER_SEC;
	__u32 nr, farthest;
	struct hop *hop;

	if (now < path->pacing.next_due) /* another CPU was faster */
		return NONE_DUE;
	farthest = farthest_hop(path, now);
	if (is_exploration_due(path) && farthest + 1 == path->distance.length) {
		hop = hop_at(path, path->distance.length);
		if (hop && hop->due <= now) {
			path->pacing.last_probed = farthest;
			farthest = path->distance.length;
		}
	}
	hop = next_due_hop(path, farthest, now, &earliest);
	if (!hop) {
		if (RATE_GLOBAL)
			earliest = max64(earliest, path->pacing.last_sent + INTERVAL_NS);
		set_next_due(&path->pacing, earliest, now, ticks);
		return NONE_DUE;
	}
	nr = READ_ONCE(path->pacing.last_probed);
	if (nr != path->distance.length && is_unresponsive(path, nr, hop, now) &&
	    !(hop->backoff.state & BACKING_OFF)) {
		back_off(path, nr, hop, now);
		return HOP_UNRESPONSIVE;
	}
	return nr;
}

/* The chosen hop is not probed now: all paths together are over their budget, or it is another flow's turn. Choose
 * the hop again next time. */
static inline void probe_postponed(struct path *path, __u32 nr)
{
	path->pacing.last_probed = nr - 1;
}

/* Does the packet, whose flow has this slot, carry the probe to the chosen hop? If not, it is another flow's turn.
 * A packet whose slot is FLOW_SLOTS always does. */
static inline int takes_turn(struct path *path, __u32 nr, __u64 slot, __u64 now)
{
	struct hop *hop = hop_at(path, nr);
	__u32 own = 1U << slot % FLOW_SLOTS;
	__u16 clock = now >> WAIT_SHIFT | 1;
	struct turns *turns;
	__u64 wait = 0;

	if (!hop || slot >= FLOW_SLOTS)
		return 1;
	turns = &hop->turns;
	if (turns->flows & own) {
		if (turns->taken < turns->expected)
			wait = PATIENCE;
		else if (now - path->pacing.last_sent < LOOK_WAIT &&
			 (turns->taken > 1 || path->pacing.seq % LOOK_EVERY == 0))
			wait = LOOK_WAIT;
		if (INTERVAL_NS && wait) {
			if (!turns->since)
				turns->since = clock;
			if ((__u16)(clock - turns->since) < wait >> WAIT_SHIFT)
				return 0;
		}
		turns->expected = max64(turns->taken, turns->expected - !!turns->expected);
		turns->taken = 0;
		turns->flows = 0;
	}
	turns->since = 0;
	turns->flows |= own;
	turns->taken++;
	return 1;
}

/* A probe to the chosen hop is about to be sent. Return the hop's next due time. It is not before the next turn
 * that its responder has for this destination. */
static inline __u64 probe_reserved(struct path *path, __u32 nr, __u64 *queues, __u64 now, __u64 ticks)
{
	__u64 queue = queue_of(path, nr), *end;
	struct hop *hop = hop_at(path, nr);

	if (!hop)
		return 0;
	if (nr == path->distance.length)
		path->distance.explore = 0;
	if (may_retry_early(path, nr, hop)) {
		hop->backoff.level = 0;
		hop->backoff.state = RETRIED_EARLY;
	}
	hop->backoff.state &= RETRIED_EARLY;
	if (hop->unanswered == 0)
		hop->since = now;
	if (hop->unanswered < 0xff)
		hop->unanswered++;
	if (nr > path->distance.proven)
		hop->due = now + reply_wait(path, hop); /* one probe at a time */
	else
		hop->due = now + (INTERVAL_NS ? HOP_INTERVAL : hop->rtt * 1000ULL / HOP_IN_FLIGHT);
	if (queue) {
		end = queue_end(queues, queue);
		*end = max64(*end, now) + RESPONDER_INTERVAL;
		hop->due = max64(hop->due, *end);
	}
	set_next_due(&path->pacing, RATE_GLOBAL ? now + INTERVAL_NS : 0, now, ticks);
	path->pacing.last_sent = now;
	path->pacing.seq++;
	return hop->due;
}

/* The reserved probe left. Intervals begin at its departure, unless a reply has changed the hop's due time. */
static inline void probe_sent(struct path *path, __u32 nr, enum probe_form form, __u64 reserved, __u64 due,
			      __u64 sendtime)
{
	struct hop *hop = hop_at(path, nr);

	if (form == FALLBACK)
		path->distance.fallbacks++;
	if (hop && hop->due == due)
		hop->due += sendtime - reserved;
	path->pacing.last_sent = sendtime;
	if (RATE_GLOBAL)
		path->pacing.next_due = max64(path->pacing.next_due, sendtime + INTERVAL_NS);
}

/* The reserved probe did not leave. That says nothing about its hop. */
static inline void probe_cancelled(struct path *path, __u32 nr, __u64 reserved)
{
	struct hop *hop = hop_at(path, nr);

	if (!hop)
		return;
	if (hop->unanswered)
		hop->unanswered--;
	hop->due = min64(hop->due, reserved + HOP_INTERVAL);
}

/* Return the length of the path of a packet that arrived with this TTL, as the TTL that would reach its sender. The
 * packet probably left with one of the usual values: 32, 64, 128 or 255. */
static inline __u32 ttl_distance(__u32 ttl)
{
	__u32 below = (ttl - 1) | 31;

	/* Make it 31, 63, 127 or 255. Without a branch, the verifier has less to follow. */
	below |= below >> 1;
	below |= below >> 2;
	below |= below >> 4;
	return (below & 0xff) - (below >> 7 & 1) + 1 - ttl + 1;
}

/* The length has changed (0: it is unknown now). Forget what we learnt about the last hop. */
static inline void set_length(struct distance *distance, __u32 length)
{
	distance->length = length;
	distance->reply_distances = 0;
	distance->is_confirmed = 0;
	distance->explore = 0;
}

/* The path is another one now, or may be: no hop is proven. Begin with the first one again. */
static inline void path_changed(struct distance *distance, __u64 now)
{
	distance->changed_at = now;
	distance->proven = 0;
	distance->symmetric = 0;
	distance->guards_blocked = 0;
	distance->max_ttl_tried = 0;
}

static inline void end_outage(struct path *path, __u64 start, __u64 now)
{
	path->liveness.outage_start = start;
	path->liveness.outage_end = now;
	set_due_earlier(&path->pacing, now);
}

/* Does a packet of the destination tell nothing new? Needs no lock. gap: ticks since its last packet. */
static inline int is_as_expected(const struct path *path, __u32 distance, __u64 gap, int has_data)
{
	return distance == path->distance.reverse && !path->distance.longer_packets && gap <= TOGETHER_TICKS &&
	       (!has_data || (path->distance.by_data && !path->distance.shorter_acks));
}

/* A packet of the destination arrived from this distance, with a gap of ticks since the one before. Believe a
 * shorter path at once, a longer one only after LONGER_AFTER consecutive packets: an underestimate is harmless, an
 * overestimate sends probes to the destination. After a gap, the path works again: hops that became unresponsive in
 * it are retried.
 *
 * A SYN proxy or a load balancer opens each connection with a bare ACK that it sends in the destination's name. So
 * data is believed at once against bare ACKs. A bare ACK from nearer by than data is believed only if SHORTER_AFTER
 * such ACKs came before it, with no data from the believed distance in between. */
static inline void destination_seen(struct path *path, __u32 seen, __u64 gap, int is_first, int has_data, __u64 now,
				    __u64 ticks)
{
	struct distance *distance = &path->distance;
	int is_shorter = seen < distance->reverse && !has_data && distance->by_data;
	int is_longer = seen > distance->reverse && (!has_data || distance->by_data);

	if (gap > TOGETHER_TICKS && !is_first)
		end_outage(path, now - gap * TICK_NS, now);
	if (gap)
		path->liveness.last_received = ticks;
	if (seen == distance->reverse) {
		distance->longer_packets = 0;
		if (has_data)
			distance->shorter_acks = 0;
	} else if (is_shorter && distance->shorter_acks < SHORTER_AFTER) {
		distance->longer_packets = 0;
		distance->shorter_acks++;
	} else if (distance->reverse && is_longer && distance->longer_packets < LONGER_AFTER) {
		distance->longer_packets++;
	} else {
		distance->longer_packets = 0;
		distance->shorter_acks = 0;
		if (distance->reverse)
			path_changed(distance, now);
		distance->reverse = seen;
		set_length(distance, seen > MAX_HOPS ? 0 : seen); /* beyond: the TTL began with an unusual value */
		if (path->liveness.last_responsive >= seen)
			path->liveness.last_responsive = seen - 1;
		set_due_earlier(&path->pacing, now);
	}
	if (has_data && seen == distance->reverse)
		distance->by_data = 1;
}

/* The hop answered: it is responsive, and the hops before it are routers. */
static inline void note_alive(struct path *path, __u32 nr, struct hop *hop, __u64 sendtime, __u64 *queues,
			      __u64 now)
{
	__u64 *end = queue_end(queues, queue_of(path, nr));
	struct liveness *liveness = &path->liveness;
	struct backoff *backoff = &hop->backoff;

	if (backoff->level || !hop->rtt)
		end_outage(path, hop->since, now);
	if (nr > liveness->last_responsive + 1U)
		liveness->routers_proven = now;
	if (backoff->level && backoff->level <= 1 + short_levels(backoff) &&
	    backoff->false_alarms < FALSE_ALARMS_MAX)
		backoff->false_alarms++;
	hop->unanswered = 0;
	backoff->level = 0;
	backoff->state = 0;
	hop->since = now;
	hop->rtt = (now - sendtime) / 1000 + 1;
	hop->due = min64(hop->due, max64(now + HOP_INTERVAL, *end));
	set_due_earlier(&path->pacing, hop->due);
	if (nr >= liveness->last_responsive) {
		liveness->last_responsive = nr;
		liveness->farthest_reply = now;
	}
}

/* The last router answered from this distance. It should be one hop nearer than the destination. If not, the
 * forward path may be longer than the reverse path: explore. Do so once for each distance, and not within
 * EXPLORE_AGAIN, in case the reverse path changes all the time. */
static inline void last_router_replied(struct distance *distance, __u32 seen, __u64 now)
{
	__u64 bit = 1ULL << (seen & 63);

	if (!distance->is_confirmed && !(distance->reply_distances & bit) && seen + 1 != distance->reverse) {
		if (distance->last_explored && now - distance->last_explored < EXPLORE_AGAIN)
			return;
		distance->last_explored = now;
		distance->explore = 1;
	}
	distance->is_confirmed = 0;
	distance->reply_distances |= bit;
}

/* A router answered a probe of this form: this proves its hop, and those before it. */
static inline void note_proof(struct distance *distance, __u32 nr, enum probe_form form, __u32 seen)
{
	if (form == FALLBACK)
		distance->fallbacks = 0;
	if (form != USUAL)
		distance->guards_blocked = form == FALLBACK;
	if (nr < distance->proven)
		return;
	distance->proven = nr;
	distance->symmetric = seen == nr ? nr : 0;
	if (nr >= distance->max_ttl_tried && nr < MAX_HOPS)
		distance->max_ttl_tried = nr + 1;
}

/* A probe expired at the hop, which replied. The reply came from this distance, from the responder of this queue.
 */
static inline void hop_replied(struct path *path, __u32 nr, enum probe_form form, __u64 sendtime, __u32 seen,
			       __u64 *queues, __u32 queue, __u64 now)
{
	struct hop *hop = hop_at(path, nr), *next = hop_at(path, nr + 1);
	struct distance *distance = &path->distance;
	__u16 *responder = responder_at(path, nr);

	if (!hop || nr == 0)
		return;
	if (distance->length && nr >= distance->length && sendtime < distance->changed_at)
		return;
	if (responder)
		*responder = queue;
	note_alive(path, nr, hop, sendtime, queues, now);
	if (sendtime >= distance->changed_at)
		note_proof(distance, nr, form, seen);
	if (distance->length && nr >= distance->length) {
		set_length(distance, nr + 1);
		distance->explore = nr < MAX_HOPS;
	} else if (nr + 1 == distance->length) {
		last_router_replied(distance, seen, now);
	}
	if (distance->explore && next && nr + 1 == distance->length) {
		next->due = now; /* even during a back-off */
		next->backoff.state |= BACKING_OFF;
	}
}

/* A probe with this TTL reached the destination: the length of the path is at most this TTL. */
static inline void destination_reached(struct path *path, __u32 ttl, __u64 now)
{
	struct distance *distance = &path->distance;
	struct hop *last = hop_at(path, ttl - 1);

	if (ttl && (!distance->length || ttl <= distance->length)) {
		if (ttl != distance->length)
			set_length(distance, ttl);
		distance->explore = 0;
		distance->changed_at = now;
		if (last && last->rtt && !last->unanswered)
			distance->is_confirmed = 1;
	}
	if (ttl)
		limit_proven(path, ttl);
	if (ttl && path->liveness.last_responsive >= ttl)
		path->liveness.last_responsive = ttl - 1;
}

/* Firewalls. Some take packets with a low TTL for an attack, and block the flow, for good or for a while. A flow
 * that stalls after it was probed may be blocked, or there may be an outage. A TCP flow stalls if its
 * retransmission timer expires, or its peer repeats itself. A flow of another protocol stalls if the destination
 * has answered in it, packets go on leaving, and nothing is received for some time. This is the sum of half a
 * second, the flow's longest usual gap, and two round trips of the farthest hop that answers. TCP and all other
 * protocols are judged separately:
 *
 * - While nothing is known of a destination, the first stall pauses the probes of all its flows. If the stalled
 *   flow moves before it is probed again, that is one strike. If it does not, but others do, the connection is
 *   lost: three strikes. STRIKES_MAX exclude the destination.
 * - A flow that stops after one answer may be one-way, so it stays probed. But the next flow to the same port is
 *   not probed. If that one gets a second answer, the first counts as lost: three strikes. If it stops after one
 *   answer as well, such flows are one-way.
 * - If a flow that was not probed stalls during a pause, stalls have another cause. The pause ends, and the strikes
 *   are cleared.
 * - Each half second with probes and without a stall is an exam that is passed. After more than two for each hop
 *   the destination is trusted. There a stall is taken for an outage: retransmissions carry probes, to the nearest
 *   hop first. One in four does not, in case that it is a firewall. A connection that is lost nevertheless ends the
 *   trust, and so does a new flow that moves while the stalled one does not: after an outage, both move.
 * - A firewall may drop the probes that reach it, too. Then its hop and those behind it are never proven, and
 *   probes to them are rare: exams say little about such a firewall. Each stall after a probe to a hop that is not
 *   proven raises a suspicion, each other stall lowers it, and a flow that survives such a probe ends it. At
 *   SUSPICION_MAX the destination is excluded, trusted or not. */
#define EXAM (NSEC_PER_SEC / 2)
#define PAUSE (10 * NSEC_PER_SEC)
/* Pause after a strike, to see whether flows stall unprobed. It doubles with each strike. */
#define PAUSE_CONTROL (NSEC_PER_SEC / 2)
#define STRIKES_MAX 6
#define STRIKES_LOST 3
#define SUSPICION_MAX 3
#define SUSPICION_MIN (-16)
#define FORGIVEN (60 * NSEC_PER_SEC) /* after so long without a strike, a trusted destination has none */
#define SURVIVED \
	(20 * NSEC_PER_MSEC) /* a flow that moves later than two round trips and this after a probe survived it */
/* NATs and firewalls forget connections that are idle for minutes. So a flow that was idle for so long is not probed
 * before it moves again. If it stalls, that is put down to the idle time, not to probes. */
#define IDLE (60 * NSEC_PER_SEC)
/* A flow stalls if its peer repeats itself so often, with so much time between. Sooner it may be reordered data. */
#define REPEATS_MIN 2
#define REPEATS_TIME (150 * NSEC_PER_MSEC)
/* A conversation, a flow of another protocol than TCP, repeats itself if nothing was received for the sum of this,
 * half its usual gap, and a round trip. Once it is stalled, the time is longer: for one of four such times it
 * carries no probe, and that must outlast a firewall that blocks for half a second. If gaps are longer than
 * GAP_MAX, a stall cannot be told from a gap. */
#define SILENCE (250 * NSEC_PER_MSEC)
#define SILENCE_STALLED (550 * NSEC_PER_MSEC)
#define GAP_MAX (5 * NSEC_PER_SEC)
#define GAP_DECAY 64
#define RETRIES_UNPROBED 4
#define TRIES_LOST 3                    /* a stalled flow is lost after so many retries while others were moving, */
#define LOST_TIME (5 * NSEC_PER_SEC)    /* and so long a time */
#define SAME_EPISODE (2 * NSEC_PER_SEC) /* stalls that begin within this time are one */

/* What was received of a flow without a TCP socket here. */
struct reception {
	__u64 last;  /* when */
	__u64 gap;   /* the longest time that usually is between two packets */
	__u64 left;  /* when a packet left last */
	__u32 count; /* number of packets that were looked at */
};

static inline int is_trusted(const struct trust *trust)
{
	return trust->max_ttl && trust->passed > 2 * trust->max_ttl;
}

static inline int is_paused(const struct trust *trust, __u64 now)
{
	return now < trust->paused_until;
}

/* Exams begin anew, with the hops that are probed from now on. */
static inline void end_trust(struct trust *trust)
{
	trust->passed = 0;
	trust->max_ttl = 0;
	trust->exam = 0;
	trust->has_stalled = 0;
}

static inline void add_strikes(struct path *path, struct trust *trust, __u32 count, __u64 now)
{
	trust->strikes += count;
	trust->last_strike = now;
	end_trust(trust);
	if (trust->strikes >= STRIKES_MAX)
		path->excluded = 1;
}

static inline void pause_probes(struct trust *trust, __u64 until, int awaits)
{
	trust->paused_until = until;
	trust->awaits = awaits;
	trust->exam = 0;
}

/* The pause for a stalled flow is over, and it has not moved. If others have, it is lost. If none has, this is an
 * outage. */
static inline void end_pause(struct path *path, struct trust *trust, __u64 now)
{
	if (!trust->awaits || is_paused(trust, now))
		return;
	trust->awaits = 0;
	if (trust->last_moved + PAUSE > trust->paused_until + NSEC_PER_SEC)
		add_strikes(path, trust, STRIKES_LOST, now);
}

/* A flow moves: the path works. */
static inline void end_exam(struct trust *trust, __u64 now)
{
	trust->last_moved = now;
	if (!trust->exam || now - trust->exam < EXAM)
		return;
	trust->exam = 0;
	trust->exams++;
	if (trust->passed < 0xff)
		trust->passed++;
	if (is_trusted(trust) && now - trust->last_strike > FORGIVEN)
		trust->strikes = 0;
}

/* Return the time after which a flow must have moved to have survived a probe that left at `probed`. */
static inline __u64 survived_after(__u64 probed, __u32 srtt)
{
	return probed + 2000ULL * srtt + SURVIVED;
}

/* Can a probe that left at this time be the reason why the flow does not move? */
static inline int may_have_stopped(const struct progress *flow, __u64 probed, __u32 srtt)
{
	return probed && flow->moved <= survived_after(probed, srtt) && flow->since - flow->moved <= IDLE;
}

static inline void begin_stall(struct path *path, struct trust *trust, struct progress *flow, __u32 srtt, __u64 now)
{
	flow->stalled_at = now;
	flow->tries = 0;
	flow->exams = trust->exams;
	flow->under_probes = may_have_stopped(flow, flow->last_probed, srtt);
	if (flow->under_probes)
		trust->exam = 0;
	if (may_have_stopped(flow, flow->last_unproven, srtt)) {
		if (trust->suspicion <= 0 || now - trust->suspected_at > SAME_EPISODE)
			trust->suspicion++; /* stalls at the same time are one sign */
		trust->suspected_at = now;
	} else if (trust->suspicion > SUSPICION_MIN) {
		trust->suspicion--;
	}
	if (trust->suspicion >= SUSPICION_MAX)
		path->excluded = 1;
	if (!flow->under_probes && is_paused(trust, now)) {
		pause_probes(trust, 0, 0);
		trust->strikes = 0;
	} else if (flow->under_probes && is_trusted(trust)) {
		path->pacing.last_probed = 0;
		trust->has_stalled = 1;
	} else if (flow->under_probes && !trust->awaits) {
		pause_probes(trust, now + PAUSE, 1);
		trust->episode = now;
	}
}

static inline void end_stall(struct path *path, struct trust *trust, struct progress *flow, __u64 now)
{
	flow->stalled_at = 0;
	flow->last_unproven = 0;
	trust->exam = 0;
	if (!flow->under_probes)
		return;
	trust->has_stalled = 0;
	if (trust->awaits) {
		add_strikes(path, trust, 1, now);
		pause_probes(trust, now + (PAUSE_CONTROL << (trust->strikes & 7)), 0);
	} else if (!flow->resend_probed) {
		trust->passed = min64(trust->passed, 2 * trust->max_ttl); /* it moves by a packet without a probe */
	}
}

/* A stalled flow tries again. Is it lost, because others are moving right now? If others pass their exams, probes are
 * not the reason. */
static inline void check_lost(struct path *path, struct trust *trust, struct progress *flow, __u64 now)
{
	if (flow->stalled_at < trust->episode + SAME_EPISODE)
		return;
	if (trust->max_ttl && trust->exams - flow->exams > 2 * trust->max_ttl)
		flow->under_probes = trust->has_stalled = 0;
	if (!flow->under_probes || trust->last_moved <= flow->stalled_at || now - trust->last_moved > NSEC_PER_SEC)
		return;
	if (flow->tries < TRIES_LOST) {
		flow->tries++;
	} else if (now - flow->stalled_at > LOST_TIME && trust->exams - flow->exams < 2) {
		flow->under_probes = 0;
		trust->episode = flow->stalled_at;
		add_strikes(path, trust, STRIKES_LOST, now);
		if (!trust->awaits)
			pause_probes(trust, now + PAUSE, 0);
	}
}

/* The flow has had one answer, and a packet leaves. Return whether it may carry a probe. */
static inline int one_way_looked(struct trust *trust, struct progress *flow, __u32 port, __u64 now)
{
	int is_silent = flow->repeats >= REPEATS_MIN;

	if (trust->doubt == DOUBTED && trust->doubted_port == port && !flow->last_probed) {
		flow->withheld = !is_silent;
		if (flow->withheld)
			return 0;
		trust->doubt = ONE_WAY;
	} else if (trust->doubt == NO_DOUBT && flow->last_probed && is_silent && !flow->doubted &&
		   !is_trusted(trust)) {
		flow->doubted = 1;
		trust->doubt = DOUBTED;
		trust->doubted_port = port;
		trust->doubted_at = now;
	}
	return 1;
}

/* The flow has had more than one answer. */
static inline void end_doubt(struct path *path, struct trust *trust, struct progress *flow, __u64 now)
{
	if (trust->doubt == DOUBTED && (flow->withheld || flow->doubted)) {
		trust->doubt = NO_DOUBT;
		if (flow->withheld && now - trust->last_strike > SAME_EPISODE)
			add_strikes(path, trust, STRIKES_LOST, now);
	}
	flow->withheld = flow->doubted = 0;
}

/* A packet of the flow leaves. Return whether it may carry a probe. can_stall: the device's link was up. */
static inline int flow_looked(struct path *path, struct trust *trust, struct progress *flow,
			      const struct flow_look *look, int can_stall, __u64 now)
{
	int moves = look->position != flow->position;
	__u32 retries;

	end_pause(path, trust, now);
	if (moves) {
		if (flow->stalled_at)
			end_stall(path, trust, flow, now);
		else if (!flow->moved && trust->has_stalled)
			end_trust(trust);
		end_exam(trust, now);
		if (!look->is_one_way)
			end_doubt(path, trust, flow, now);
		flow->moved = now;
		flow->repeats = 0;
		if (flow->last_unproven && now > survived_after(flow->last_unproven, look->srtt)) {
			flow->last_unproven = 0;
			if (trust->suspicion > 0)
				trust->suspicion = 0;
		}
	} else if (look->segments != flow->segments && flow->repeats < 0xff &&
		   now - max64(flow->last_repeat, flow->since) > look->patience) {
		flow->repeats++;
		flow->last_repeat = now;
	}
	if (moves || !flow->since || !(look->outstanding || flow->repeats))
		flow->since = now;
	flow->position = look->position;
	flow->segments = look->segments;
	flow->resend_probed = 0;
	retries = look->timeouts + flow->repeats;
	if (look->is_one_way)
		return !path->excluded && !is_paused(trust, now) && one_way_looked(trust, flow, look->port, now);
	if (flow->stalled_at)
		check_lost(path, trust, flow, now);
	else if (can_stall && (look->timeouts || flow->repeats >= REPEATS_MIN))
		begin_stall(path, trust, flow, look->srtt, now);
	if (path->excluded || is_paused(trust, now))
		return 0;
	return flow->stalled_at ? retries % RETRIES_UNPROBED != 0 : now - flow->moved <= IDLE;
}

/* The packet carried a probe of this form. If it went farther than any before, exams begin anew: a firewall may be
 * behind the hops that were probed so far. */
static inline void flow_probed(struct trust *trust, struct progress *flow, __u32 ttl, enum probe_form form,
			       __u64 now)
{
	if (trust->max_ttl < ttl) {
		trust->max_ttl = ttl;
		trust->passed = 0;
	}
	flow->last_probed = now;
	if (form != USUAL)
		flow->last_unproven = now;
	flow->resend_probed = 1;
	if (!trust->exam)
		trust->exam = now;
}

/* A packet of a flow without a TCP socket here was received. Learn the flow's longest usual gap. A stall that may
 * be due to probes does not count, and neither does a long gap in which nothing was sent. */
static inline void flow_received(struct reception *received, const struct progress *flow, __u64 now)
{
	__u64 gap = now > received->last ? now - received->last : 0; /* another CPU may have been faster */

	if (received->count++ && !(flow->stalled_at && flow->under_probes) &&
	    (gap < GAP_MAX || now > flow->since + GAP_MAX))
		received->gap = max64(gap, received->gap - (gap ? received->gap / GAP_DECAY : 0));
	received->last = now;
}

/* A packet of a flow that is not TCP leaves: the destination should answer. Fill in what the look still lacks. */
static inline void look_at_conversation(struct reception *received, const struct progress *flow,
					struct flow_look *look, __u64 now)
{
	look->position = received->count;
	look->segments = flow->segments + 1;
	look->outstanding = now - received->left <= GAP_MAX; /* else there is nothing to be answered yet */
	received->left = now;
	look->is_one_way = received->count == 1;
	look->patience = (flow->stalled_at ? SILENCE_STALLED : SILENCE) + received->gap / 2 + look->srtt * 1000ULL;
}

/* Can a flow without a TCP socket here be seen to stall, or to move again? */
static inline int is_conversation(const struct reception *received, const struct progress *flow)
{
	return flow->stalled_at || (received->count && received->gap <= GAP_MAX);
}

/* May a flow carry a probe that could not be seen to stall, because nothing was received of it, or too rarely? Not
 * while we suspect a firewall. It may after a while, since perhaps there are no other flows, which could end the
 * suspicion. While it is in doubt whether flows to its port are one-way, a flow that was probed before may go on,
 * but no other may: only a flow without probes can settle the doubt. */
static inline int may_begin_probed(const struct trust *trust, __u32 port, __u32 is_probed, __u64 now)
{
	__u64 suspected = max64(trust->last_strike, trust->episode);

	if (is_paused(trust, now))
		return 0;
	if (trust->doubt == DOUBTED && trust->doubted_port == port && !is_probed &&
	    now - trust->doubted_at <= FORGIVEN)
		return 0;
	return (!trust->strikes && trust->last_moved >= trust->episode) || now - suspected > FORGIVEN;
}

/* ---- Maps --------------------------------------------------------------------------------- */

struct flow {
	struct progress progress;
	struct reception received;
	/* Of TCP: */
	__u32 first_seq, first_ack; /* of the first packet that we saw */
	__u32 next_seq, last_ack;   /* the number behind the last packet; its acknowledgement */
	__u32 acked;                /* what the peer acknowledged last */
	__u32 repeats;              /* number of packets with data that were received, or that were sent again */
	__u32 is_open;              /* the peer knows the connection */
};

/* Pre-filter for the maps paths and flow_paths: a Bloom filter with one hash function, in an array. An empty slot
 * proves that the address is in neither map. Slots are never cleared, and addresses may share one. */
#define FILTER_LINES 16384
#define FILTER_LINE_SIZE 64
enum { IN_PATHS = 1, IN_FLOW_PATHS = 2 };

struct filter_line {
	__u8 slots[FILTER_LINE_SIZE];
};

struct schedule {
	struct bpf_spin_lock lock; /* of the path model, for all paths */
	__u32 salt;                /* random 16 bits in the numbers of probes, so that others cannot guess them */
	__u64 budget;              /* over all paths: theoretical arrival time of the next probe (GCRA) */
	__u64 new_paths;           /* and of the next new destination of a flow */
	/* End of each responder's queue: the next turn that is free (__u64). These are bytes here because BCC makes code
	 * for each element of other arrays, which takes a second at each start. */
	__u8 queues[QUEUES_SIZE];
};

/* User space reads the layout of these structs here, because BCC tells it of no other map. Never written. */
struct layouts {
	struct extended_result result;
	struct flow_event flow_event;
	struct process_event process_event;
	struct owner owner;
};

BPF_ARRAY(layouts, struct layouts, 1);

/* Target destinations. With BPF_F_NO_PREALLOC a hash has memory only for the entries that exist. */
BPF_F_TABLE("hash", struct in6_addr, struct path, paths, 1, BPF_F_NO_PREALLOC);
/* Destinations of the flows of target processes. If it is full, user space makes room. */
BPF_F_TABLE("hash", struct in6_addr, struct path, flow_paths, 1, BPF_F_NO_PREALLOC);
BPF_ARRAY(new_path, struct path, 1); /* the first value of an entry in flow_paths: all 0, but for flows_only */
BPF_ARRAY(address_filter, struct filter_line, FILTER_LINES);
BPF_F_TABLE("hash", struct probe_key, struct probe, in_flight, 1, BPF_F_NO_PREALLOC);
/* Finds the ident under which the probe is in in_flight. The kernel allocates the whole map at once. */
BPF_TABLE("lru_hash", struct udp_partial, __u32, partial_checksums, 1);
/* What a middlebox adds to the TCP sequence numbers of a flow: a key without ident -> a constant. User space finds it. */
BPF_TABLE("lru_hash", struct probe_key, __u32, seq_offsets, 2048);
/* Flows that have no TCP socket here: of other protocols than TCP, forwarded, of a container, or of a raw socket. */
BPF_TABLE("lru_hash", struct flow_key, struct flow, flows, 8192);
BPF_ARRAY(new_flow, struct flow, 1); /* the first value of an entry: all 0 */
BPF_ARRAY(unmatched_left, __u32, 1); /* number of replies without a probe that user space still takes */
BPF_ARRAY(schedules, struct schedule, 1);
BPF_ARRAY(alive_until, __u64, 1); /* the lease: no probe after this time. 0: before and after the run */
/* When a device's link came up, by ifindex; in the future while it is down. No entry: it never was down. */
BPF_HASH(link_up_since, __u32, __u64, 1024);

static inline __u32 hash_address(const struct in6_addr *a)
{
	return (a->s6_addr32[0] ^ a->s6_addr32[1] ^ a->s6_addr32[2] ^ a->s6_addr32[3]) * 0x9e3779b1;
}

/* Return the slot of an address in the filter. User space does the same: filter_slot() in elfprobe.py. */
static inline __u8 *filter_slot(const struct in6_addr *a)
{
	__u32 hash = hash_address(a);
	__u32 nr = hash >> 18; /* of FILTER_LINES */
	struct filter_line *line = address_filter.lookup(&nr);

	return line ? &line->slots[(hash >> 12) % FILTER_LINE_SIZE] : 0;
}

/* Return the path to a target destination, or to the destination of a target process's flow; else 0. */
static inline struct path *lookup_path(struct in6_addr *dest, const __u8 *slot)
{
	struct path *path = 0;

	if (*slot & IN_PATHS)
		path = paths.lookup(dest);
	if (BY_OWNER && !path && *slot & IN_FLOW_PATHS)
		path = flow_paths.lookup(dest);
	return path;
}

static inline struct path *path_to(struct in6_addr *dest)
{
	__u8 *slot = filter_slot(dest);

	return slot && *slot ? lookup_path(dest, slot) : 0;
}

/* ---- Path model: its events, under the lock ----------------------------------------------- */

/* The overall budget allows a burst of BUDGET_BURST. So the rate is lower than MAX_RATE: a second, the burst, and
 * the time between a reservation and the departure of its probe (1 ms) together hold MAX_RATE probes at most. */
#define BUDGET_BURST (NSEC_PER_SEC / 100)
#define BUDGET_COST ((NSEC_PER_SEC + BUDGET_BURST + NSEC_PER_MSEC) / MAX_RATE + 1)

static inline struct schedule *lookup_schedule(void)
{
	int zero = 0;

	return schedules.lookup(&zero);
}

/* A process that takes more than one part in PROCESS_SHARE of a budget gets only what others leave of it: a part of
 * each burst is kept for them. So a process that sends as fast as it can, or to thousands of destinations, does not
 * starve the others. */
#define PROCESS_SHARE 8
#define SHARE_BURST NSEC_PER_SEC
#define KEPT_BUDGET max64(BUDGET_BURST / 2, BUDGET_COST / 4)

/* Maximum number of new destinations of flows in a second; a burst may have as many. Each costs user space 50 us,
 * and unanswered probes until it is known that no router answers. */
#define NEW_PATHS_RATE 1000
#define NEW_PATHS_BURST NSEC_PER_SEC
#define NEW_PATH_COST (NSEC_PER_SEC / NEW_PATHS_RATE)

/* Count one more against a process's share. Without a lock: if two CPUs do so at once, one more is free. */
static inline void take_share(__u64 *share, __u64 cost, __u64 now)
{
	*share = max64(*share, now) + cost * PROCESS_SHARE;
}

/* Take a new destination from the budget, for a process (0: it has ended). Return 0 if there is none left. */
static inline int take_new_path(struct process *process, __u64 now)
{
	__u64 burst = process && process->new_paths <= now + SHARE_BURST ? NEW_PATHS_BURST : NEW_PATHS_BURST / 2;
	struct schedule *all = lookup_schedule();
	int is_left;

	if (!all || READ_ONCE(all->new_paths) > now + burst)
		return 0;
	bpf_spin_lock(&all->lock);
	is_left = all->new_paths <= now + burst;
	if (is_left)
		all->new_paths = max64(all->new_paths, now) + NEW_PATH_COST;
	bpf_spin_unlock(&all->lock);
	if (is_left && process)
		take_share(&process->new_paths, NEW_PATH_COST, now);
	return is_left;
}

/* Make the path to the destination of a target's flow. Return it, 0 if there is no budget or no room for it. */
static inline struct path *add_flow_path(struct in6_addr *dest, __u8 *slot, struct process *process, __u64 now)
{
	struct path *path;
	int zero = 0;

	path = new_path.lookup(&zero);
	if (!path)
		return 0;
	if (!take_new_path(process, now)) {
		COUNT(over_new_paths);
		return 0;
	}
	path->flows_only = 1;   /* before the insert, because packets of other processes find the entry at once */
	*slot |= IN_FLOW_PATHS; /* no race with user space: it has written all its slots before packets come */
	flow_paths.insert(dest, path); /* fails if another CPU was faster, or there is no room */
	path = flow_paths.lookup(dest);
	if (!path)
		COUNT(no_room);
	return path;
}

/* Reserve one probe, and keep reservation->kept of the budget for others. Return 0, the reason why there is none,
 * or NOT_SENT. */
static inline int reserve_probe(struct path *path, struct reservation *reservation, int can_fall_back, __u64 now)
{
	__u64 ticks = ticks_now();
	struct schedule *all = lookup_schedule();
	int ttl, reason = NOT_SENT;
	struct hop *hop;

	if (!all)
		return NOT_SENT;
	bpf_spin_lock(&all->lock);
	ttl = choose_hop(path, now, ticks);
	if (ttl == HOP_UNRESPONSIVE) {
		reason = REASON(hop_unresponsive);
	} else if (ttl != NONE_DUE && all->budget + reservation->kept > now + BUDGET_BURST) {
		probe_postponed(path, ttl);
		reason = REASON(over_max_rate);
	} else if (ttl != NONE_DUE && !takes_turn(path, ttl, reservation->flow, now)) {
		probe_postponed(path, ttl);
	} else if (ttl != NONE_DUE) {
		all->budget = max64(all->budget, now) + BUDGET_COST;
		reservation->seq = path->pacing.seq;
		reservation->salt = all->salt;
		reservation->ttl = ttl;
		hop = hop_at(path, ttl);
		reservation->form = hop ? probe_form(path, ttl, hop, can_fall_back, ticks) : GUARDED;
		reservation->time = now;
		reservation->due = probe_reserved(path, ttl, (__u64 *)all->queues, now, ticks);
		reason = 0;
	}
	bpf_spin_unlock(&all->lock);
	return reason;
}

/* Commit the reservation if the probe was sent, else cancel it. */
static inline void settle_reservation(struct path *path, const struct reservation *reservation, __u64 sendtime,
				      int is_sent)
{
	__u64 time = reservation->time, due = reservation->due;
	struct schedule *all = lookup_schedule();
	__u32 ttl = reservation->ttl, form = reservation->form;

	if (!all)
		return;
	bpf_spin_lock(&all->lock);
	if (is_sent)
		probe_sent(path, ttl, form, time, due, sendtime);
	else
		probe_cancelled(path, ttl, time);
	bpf_spin_unlock(&all->lock);
}

/* A packet of the destination arrived. Return whether to look at its flow. Once a tick is enough, unless a flow is
 * about to stall. Without ticks (before Linux 5.6), never: so flows without a TCP socket here are not judged. */
static inline int looks_at_flow(struct path *path, __u32 protocol, __u64 ticks)
{
	return ticks > READ_ONCE(path->liveness.last_received) || ticks < trust_in(path, protocol)->watched_until;
}

/* Note that a packet of the destination arrived, with this TTL. */
static inline void note_packet(struct path *path, __u32 ttl, int has_data, __u64 ticks)
{
	__u64 now, last = READ_ONCE(path->liveness.last_received);
	__u64 gap = ticks > last ? ticks - last : 0; /* another CPU may have written a later tick */
	__u32 distance = ttl_distance(ttl);
	struct schedule *all;

	if (is_as_expected(path, distance, gap, has_data)) {
		if (gap)
			path->liveness.last_received = ticks;
		return;
	}
	now = bpf_ktime_get_ns();
	all = lookup_schedule();
	if (!all)
		return;
	bpf_spin_lock(&all->lock);
	destination_seen(path, distance, gap, !last, has_data, now, ticks);
	bpf_spin_unlock(&all->lock);
}

static inline void note_reply(struct path *path, const struct probe *probe, const struct in6_addr *responder,
			      __u32 ttl, __u64 now)
{
	__u32 nr = probe->outttl, form = probe->form, distance = ttl_distance(ttl);
	__u32 queue = hash_address(responder) / (~0U / RESPONDERS + 1);
	struct schedule *all = lookup_schedule();
	__u64 sendtime = probe->sendtime;

	if (!all)
		return;
	bpf_spin_lock(&all->lock);
	hop_replied(path, nr, form, sendtime, distance, (__u64 *)all->queues, queue ? queue : 1, now);
	bpf_spin_unlock(&all->lock);
}

static inline void note_reached(struct path *path, __u32 ttl)
{
	__u64 now = bpf_ktime_get_ns();
	struct schedule *all = lookup_schedule();

	if (!all)
		return;
	bpf_spin_lock(&all->lock);
	destination_reached(path, ttl, now);
	bpf_spin_unlock(&all->lock);
	COUNT(reached);
}

/* ---- Internet checksums (RFC 1071) -------------------------------------------------------- */

/* Return the 16-bit one's complement sum. Unlike the kernel's, it is not inverted. It is 0 only for a sum of 0. */
static inline __u16 csum_fold(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return sum;
}

/* Return the checksum after a 16-bit field that it covers has changed (RFC 1624). */
static inline __u16 csum_replace(__u16 check, __u16 from, __u16 to)
{
	return ~csum_fold((__u64)(__u16)~check + (__u16)~from + to);
}

static inline __u64 csum_address(const struct in6_addr *a)
{
	return (__u64)a->s6_addr32[0] + a->s6_addr32[1] + a->s6_addr32[2] + a->s6_addr32[3];
}

/* Return sum plus the sum of len bytes of the packet, SUM_CHUNK at most. */
static inline __u32 csum_chunk(struct __sk_buff *skb, __u8 *buffer, __u32 off, __u32 len, __u32 sum)
{
	__u64 n = ((len - 1) & (SUM_CHUNK - 1)) + 1, words; /* the mask gives the verifier a bound */
	__u8 *end = buffer;

	if (!len)
		return 0;
	asm volatile("%0 += %1" : "+r"(end) : "r"(n)); /* before n is spilled: see ADVANCE */
	if (bpf_skb_load_bytes(skb, off, buffer, n))
		return 0;
	end[0] = 0; /* bpf_csum_diff() takes words of 4 bytes */
	end[1] = 0;
	end[2] = 0;
	words = (n + 3) & ~3ULL;
	asm volatile("if %0 <= %1 goto +1\n\t%0 = %1" : "+r"(words) : "i"(SUM_CHUNK));
	return bpf_csum_diff(0, 0, (__be32 *)buffer, words, sum);
}

/* Return the sum of len bytes of the packet. Bytes beyond SUM_MAX, the length of a jumbo frame, may be left out. */
#define SUM_MAX 9216

static inline __u32 csum_skb(struct __sk_buff *skb, __u8 *buffer, __u32 off, __u32 len)
{
	__u32 i, sum = 0;

#pragma unroll
	for (i = 0; i < SUM_MAX / SUM_CHUNK; i++) {
		if (len > SUM_CHUNK) {
			if (bpf_skb_load_bytes(skb, off, buffer, SUM_CHUNK))
				return 0;
			sum = bpf_csum_diff(0, 0, (__be32 *)buffer, SUM_CHUNK, sum);
			off += SUM_CHUNK;
			len -= SUM_CHUNK;
		}
	}
	return csum_chunk(skb, buffer, off, len, sum);
}

/* ---- Parsing: TC, XDP and quoted packets -------------------------------------------------- */

struct hdr_cursor {
	void *pos;
	void *end;
};

enum { FIRST_FRAGMENT = 1, LATER_FRAGMENT = 2 };

/* Both parsers reject multicast and broadcast, because no ICMP error answers them (RFC 1122, 3.2.2; RFC 4443, 2.4).
 */
#define IPV4_MULTICAST 0xe0000000 /* and all addresses above, up to broadcast */
#define IPV6_MULTICAST 0xff

struct packet {
	void *ip; /* struct iphdr or ipv6hdr, by version */
	__u32 version;
	__u32 ip_off; /* bytes before the IP header */
	__u32 ip_len; /* bytes of the IP header, with the extension headers of IPv6 */
	__u32 l4_len; /* bytes behind the IP header, by its length field, which may be wrong in a quoted packet */
	__u32 protocol;
	__u32 fragment;     /* 0: not a fragment */
	__u32 encapsulated; /* the packet is inside another IPv4 packet */
	__u32 outer_off;    /* bytes before that packet's header */
	__u32 ttl;
	__u8 tos;
	__u16 ip_id; /* IPv6: low 16 bits of the flow label */
	struct in6_addr saddr, daddr;
};

static inline int is_same(const struct in6_addr *a, const struct in6_addr *b)
{
	/* With one branch, the verifier has less to follow. */
	return !((a->s6_addr32[0] ^ b->s6_addr32[0]) | (a->s6_addr32[1] ^ b->s6_addr32[1]) |
		 (a->s6_addr32[2] ^ b->s6_addr32[2]) | (a->s6_addr32[3] ^ b->s6_addr32[3]));
}

static inline void map_v4(struct in6_addr *a, __be32 v4)
{
	a->s6_addr32[0] = 0;
	a->s6_addr32[1] = 0;
	a->s6_addr32[2] = bpf_htonl(0xffff);
	a->s6_addr32[3] = v4;
}

/* Return the length of the packet by its IP header, at most 65535. An IPv6 header can give more, which no device
 * here sends. */
static inline __u16 total_len(const struct packet *pkt)
{
	__u32 len = pkt->ip_len + pkt->l4_len;

	return len < 0xffff ? len : 0xffff;
}

static inline __u32 which_fragment(__be16 offset, __be16 more)
{
	return offset ? LATER_FRAGMENT : more ? FIRST_FRAGMENT : 0;
}

static inline int parse_iphdr(struct hdr_cursor *nh, struct packet *pkt)
{
	struct iphdr *ip = nh->pos;
	__u32 len;

	if ((void *)(ip + 1) > nh->end || ip->version_ihl >> 4 != 4)
		return -1;
	len = (ip->version_ihl & 0xf) * 4;
	if (len < sizeof(*ip) || nh->pos + len > nh->end || bpf_ntohl(ip->daddr) >= IPV4_MULTICAST)
		return -1;
	pkt->ip = ip;
	pkt->version = 4;
	pkt->ip_len = len;
	pkt->l4_len = bpf_ntohs(ip->tot_len) - len;
	pkt->protocol = ip->protocol;
	pkt->fragment = which_fragment(ip->frag_off & bpf_htons(IP_OFFSET), ip->frag_off & bpf_htons(IP_MF));
	pkt->ttl = ip->ttl;
	pkt->tos = ip->tos;
	pkt->ip_id = bpf_ntohs(ip->id);
	map_v4(&pkt->saddr, ip->saddr);
	map_v4(&pkt->daddr, ip->daddr);
	nh->pos += len;
	return 0;
}

static inline int is_ipv6_extension(__u32 protocol)
{
	return protocol < 64 && (1ULL << protocol & (1ULL << IPPROTO_HOPOPTS | 1ULL << IPPROTO_ROUTING |
						     1ULL << IPPROTO_FRAGMENT | 1ULL << IPPROTO_DSTOPTS));
}

/* Move the cursor behind the extension headers. Return -1 if a routing header says that the packet visits another
 * destination first. The length is in scratch, because a value in a map is unknown to the verifier: it then follows
 * one path through the loop, not one for each combination of headers. */
static inline int parse_ipv6_extensions(struct hdr_cursor *nh, struct packet *pkt)
{
	struct scratch *scratch = scratch_of_run();
	struct ipv6_rt_hdr *ext;
	__u32 i, len;
	__be16 frag;

	if (!scratch)
		return -1;
	scratch->parsed_len = 0;
#pragma clang loop unroll(disable)
	for (i = 0; i < IPV6_EXTENSIONS_MAX && is_ipv6_extension(pkt->protocol); i++) {
		len = READ_ONCE(scratch->parsed_len);
		ext = nh->pos + (len & IPV6_EXTENSIONS_MASK);
		if ((void *)(ext + 1) > nh->end)
			return -1;
		if (pkt->protocol == IPPROTO_FRAGMENT) {
			frag = *(__be16 *)&ext->type;
			pkt->fragment = which_fragment(frag & bpf_htons(IP6_OFFSET), frag & bpf_htons(IP6_MF));
			scratch->parsed_len = len + 8;
		} else {
			if (pkt->protocol == IPPROTO_ROUTING && ext->segments_left)
				return -1;
			scratch->parsed_len = len + 8 + ext->hdrlen * 8;
		}
		pkt->protocol = ext->nexthdr;
	}
	len = READ_ONCE(scratch->parsed_len);
	if (len > IPV6_EXTENSIONS_MASK)
		return -1;
	nh->pos += len;
	pkt->ip_len += len;
	pkt->l4_len -= len;
	return 0;
}

static inline int parse_ipv6hdr(struct hdr_cursor *nh, struct packet *pkt)
{
	struct ipv6hdr *ip6 = nh->pos;

	if ((void *)(ip6 + 1) > nh->end || (bpf_ntohl(ip6->version_class_label) >> 28) != 6 ||
	    *(__u8 *)&ip6->daddr == IPV6_MULTICAST)
		return -1;
	pkt->ip = ip6;
	pkt->version = 6;
	pkt->ip_len = sizeof(*ip6);
	pkt->l4_len = bpf_ntohs(ip6->payload_len);
	pkt->protocol = ip6->nexthdr;
	pkt->fragment = 0;
	pkt->ttl = ip6->hop_limit;
	pkt->tos = bpf_ntohl(ip6->version_class_label) >> 20;
	pkt->ip_id = bpf_ntohl(ip6->version_class_label);
	pkt->saddr = ip6->saddr;
	pkt->daddr = ip6->daddr;
	nh->pos = ip6 + 1;
	return is_ipv6_extension(pkt->protocol) ? parse_ipv6_extensions(nh, pkt) : 0;
}

/* With TUNNEL, parse the packet inside an IPv4 packet of that protocol. The cursor is behind the outer header. */
static inline int parse_inner(struct hdr_cursor *nh, struct packet *pkt)
{
	if (!TUNNEL || pkt->version != 4 || pkt->protocol != TUNNEL || pkt->fragment)
		return 0;
	pkt->encapsulated = 1;
	pkt->outer_off = pkt->ip_off;
	pkt->ip_off += pkt->ip_len;
	return TUNNEL == IPPROTO_IPIP ? parse_iphdr(nh, pkt) : parse_ipv6hdr(nh, pkt);
}

/* Return the number of bytes before an inner packet: `off`, then an outer IP header, perhaps a GRE header. Return 0
 * unless the outer packet ends with the frame and contains another packet. */
static inline __u32 outer_len(const struct hdr_cursor *nh, __u32 off)
{
	struct hdr_cursor at = { nh->pos + off, nh->end };
	struct packet outer = {};
	struct gre_base_hdr *gre;
	__u8 *first = at.pos;

	if ((void *)(first + 1) > at.end ||
	    (*first >> 4 == 4 ? parse_iphdr(&at, &outer) : parse_ipv6hdr(&at, &outer)) < 0 ||
	    off + outer.ip_len + outer.l4_len != (__u32)(nh->end - nh->pos))
		return 0;
	if (outer.protocol == IPPROTO_IPIP || outer.protocol == IPPROTO_IPV6)
		return off + outer.ip_len;
	gre = at.pos;
	if (outer.protocol != IPPROTO_GRE || (void *)(gre + 1) > at.end || gre->flags & ~bpf_htons(GRE_FLAGS))
		return 0;
	return off + outer.ip_len + sizeof(*gre) + (gre->flags & bpf_htons(GRE_CSUM) ? 4 : 0) +
	       (gre->flags & bpf_htons(GRE_KEY) ? 4 : 0) + (gre->flags & bpf_htons(GRE_SEQ) ? 4 : 0);
}

/* Move the cursor behind the outer headers of a tunnel.
 * Symptom: elf_ingress sees headers that the tunnel device has already removed, on some devices with an Ethernet
 * header before them. Cause: XDP on tunnel devices before Linux 5.14. Can go: with FRAME_TUNNEL, when no older
 * kernel matters. The length goes through scratch so that the verifier follows one path (see
 * parse_ipv6_extensions()). The verifier of Linux 7.3 gives up otherwise. */
static inline void skip_outer(struct hdr_cursor *nh)
{
	struct scratch *scratch = scratch_of_run();
	__u32 len;

	if (!scratch)
		return;
	len = outer_len(nh, 0);
	if (!len)
		len = outer_len(nh, sizeof(struct ethhdr));
	scratch->parsed_len = len <= IPV6_EXTENSIONS_MASK ? len : 0;
	nh->pos += READ_ONCE(scratch->parsed_len) & IPV6_EXTENSIONS_MASK;
}

/* Move the cursor behind the Ethernet header and the VLAN tags. Return the protocol. Return 0 if the packet is too
 * short, or if its Ethernet destination is multicast or broadcast: then its IP destination may be a broadcast
 * address that only hosts of that network know. */
static inline __be16 parse_ethhdr(struct hdr_cursor *nh, struct packet *pkt)
{
	struct ethhdr *eth = nh->pos;
	struct vlan_hdr *vlan;
	__be16 proto;
	__u32 i;

	if ((void *)(eth + 1) > nh->end || eth->h_dest[0] & 1)
		return 0;
	proto = eth->h_proto;
	nh->pos = eth + 1;
	pkt->ip_off = sizeof(*eth);
#pragma unroll
	for (i = 0; i < VLAN_TAGS_MAX; i++) {
		if (proto == bpf_htons(ETH_P_8021Q) || proto == bpf_htons(ETH_P_8021AD)) {
			vlan = nh->pos;
			if ((void *)(vlan + 1) > nh->end)
				return 0;
			proto = vlan->h_vlan_encapsulated_proto;
			nh->pos = vlan + 1;
			pkt->ip_off += sizeof(*vlan);
		}
	}
	return proto;
}

/* Parse a frame, and leave the cursor behind the IP header. Return -1 if it is cut, or no unicast IP packet. */
static inline int parse_frame(struct hdr_cursor *nh, struct packet *pkt)
{
	__u8 *first = nh->pos;
	__be16 proto;
	int err;

	if (FRAME == FRAME_ETHERNET) {
		proto = parse_ethhdr(nh, pkt);
	} else {
		if ((void *)(first + 1) > nh->end)
			return -1;
		proto = *first >> 4 == 4 ? bpf_htons(ETH_P_IP) : bpf_htons(ETH_P_IPV6);
	}
	if (proto == bpf_htons(ETH_P_IP))
		err = parse_iphdr(nh, pkt);
	else if (proto == bpf_htons(ETH_P_IPV6))
		err = parse_ipv6hdr(nh, pkt);
	else
		return -1;
	return err < 0 ? err : parse_inner(nh, pkt);
}

/* Make the verifier forget how a packet was parsed: see hidden(). The cursor stays where it is. Before bytes behind
 * it are read, they must be compared with the packet's end again. start is the packet's first byte. */
static inline void forget_headers(struct scratch *scratch, void *start, struct hdr_cursor *nh, struct packet *pkt)
{
	nh->pos = start + (hidden(scratch, nh->pos - start) & HEADERS_MASK);
	pkt->version = hidden(scratch, pkt->version);
	pkt->protocol = hidden(scratch, pkt->protocol);
	pkt->fragment = hidden(scratch, pkt->fragment);
}

static inline int is_icmp(const struct packet *pkt)
{
	return pkt->version == 4 ? pkt->protocol == IPPROTO_ICMP : pkt->protocol == IPPROTO_ICMPV6;
}

/* Set the key of the flow of a packet that leaves, or is received, whose layer 4 begins at l4. Return a negative number
 * if its header is cut: it has no ports then. */
static inline int set_flow_key(struct flow_key *key, const struct packet *pkt, const __be16 *l4, const void *end,
			       int is_received)
{
	key->source = is_received ? pkt->daddr : pkt->saddr;
	key->dest = is_received ? pkt->saddr : pkt->daddr;
	key->sport = key->dport = 0;
	key->protocol = pkt->protocol;
	if ((void *)(l4 + 3) > end)
		return -1;
	key->sport = is_icmp(pkt) ? l4[2] : l4[is_received];
	key->dport = is_icmp(pkt) ? 0 : l4[!is_received];
	return 0;
}

enum icmp_kind { OTHER_ICMP, ECHO_REQUEST, ECHO_REPLY, DEST_UNREACHABLE, TIME_EXCEEDED };

/* Return the kind of an ICMP or ICMPv6 message. A time exceeded with code 1 is OTHER_ICMP: it says that fragments
 * were not reassembled in time. */
static inline enum icmp_kind icmp_kind(const struct packet *pkt, const struct icmphdr *icmp)
{
	__u32 v4 = pkt->version == 4, type = icmp->type;

	if (type == (v4 ? ICMP_TIME_EXCEEDED : ICMPV6_TIME_EXCEED))
		return icmp->code == 0 ? TIME_EXCEEDED : OTHER_ICMP;
	if (type == (v4 ? ICMP_ECHO : ICMPV6_ECHO_REQUEST))
		return ECHO_REQUEST;
	if (type == (v4 ? ICMP_ECHOREPLY : ICMPV6_ECHO_REPLY))
		return ECHO_REPLY;
	return type == (v4 ? ICMP_DEST_UNREACH : ICMPV6_DEST_UNREACH) ? DEST_UNREACHABLE : OTHER_ICMP;
}

/* Fill in the key of a packet from its IP header and the 8 bytes at the cursor. Return -1 if it cannot be a probe. */
static inline int parse_probe_key(const struct hdr_cursor *nh, const struct packet *pkt, struct probe_key *key)
{
	struct udphdr *udp = nh->pos; /* TCP has its sequence number where UDP has length and checksum */
	struct icmphdr *icmp = nh->pos;

	if ((void *)(udp + 1) > nh->end)
		return -1;
	key->dest = pkt->daddr;
	key->protocol = pkt->protocol;
	key->sport = udp->source;
	key->dport = udp->dest;
	if (pkt->protocol == IPPROTO_TCP || pkt->protocol == IPPROTO_UDP) {
		key->ident = (__u32)bpf_ntohs(udp->len) << 16 | bpf_ntohs(udp->check);
	} else if (is_icmp(pkt) && icmp_kind(pkt, icmp) == ECHO_REQUEST) {
		key->sport = icmp->id;
		key->dport = 0;
		key->ident = bpf_ntohs(icmp->sequence);
	} else {
		return -1;
	}
	return 0;
}

/* The length field of a guarded UDP probe is too large by this. */
#define UDP_EXCESS 0x4000

/* Copy the first whole 16-bit words of a UDP payload, and zeros behind. Return -1 if the packet ends before. */
static inline int parse_udp_head(const struct hdr_cursor *nh, __u8 *head)
{
	struct udphdr *udp = nh->pos;
	__u16 *payload = (__u16 *)(udp + 1);
	__u32 i, words;

	if ((void *)payload > nh->end)
		return -1;
	words = ((bpf_ntohs(udp->len) & (UDP_EXCESS - 1)) - sizeof(*udp)) / sizeof(*payload);
	__builtin_memset(head, 0, UDP_HEAD_LEN);
#pragma clang loop unroll(disable)
	for (i = 0; i < UDP_HEAD_LEN / sizeof(*payload); i++) {
		barrier_var(payload); /* otherwise clang computes with data_end, which verifiers reject */
		if (i >= words)
			break;
		if ((void *)(payload + 1) > nh->end)
			return -1;
		((__u16 *)head)[i] = *payload++;
	}
	return 0;
}

/* ---- Hooks -------------------------------------------------------------------------------- */

/* Called when a probe is complete, just before it is recorded and sent. ctx is the probe. A negative result drops
 * it. A hook must not change what identifies the probe (addresses, ports, see struct probe_key): a reply to a
 * changed probe matches no probe in flight. */
static int elf_v4_icmp_beforesend(struct __sk_buff *ctx);
static int elf_v4_tcp_beforesend(struct __sk_buff *ctx);
static int elf_v4_udp_beforesend(struct __sk_buff *ctx);
static int elf_v6_icmp_beforesend(struct __sk_buff *ctx);
static int elf_v6_tcp_beforesend(struct __sk_buff *ctx);
static int elf_v6_udp_beforesend(struct __sk_buff *ctx);

/* Called for a time exceeded that answers a probe, before the result is recorded. */
static void elf_v4_afterrecv(struct xdp_md *ctx);
static void elf_v6_afterrecv(struct xdp_md *ctx);

#include "elfhooks.c"

static inline int hook_beforesend(struct __sk_buff *skb, __u32 version, __u32 protocol)
{
	if (protocol == IPPROTO_TCP)
		return version == 4 ? elf_v4_tcp_beforesend(skb) : elf_v6_tcp_beforesend(skb);
	if (protocol == IPPROTO_UDP)
		return version == 4 ? elf_v4_udp_beforesend(skb) : elf_v6_udp_beforesend(skb);
	return version == 4 ? elf_v4_icmp_beforesend(skb) : elf_v6_icmp_beforesend(skb);
}

/* ---- Protocols: what may be a carrier, and how its clone becomes a probe ------------------
 *
 * A reply finds its probe by the 8 quoted bytes behind the IP header. Each protocol says what identifies a probe
 * there. Ports, addresses, flow label, DSCP and the ICMP checksum stay as they are: routers choose the path by them.
 *
 * If a guarded probe arrives, every receiver discards it without an answer. With UDP and ICMP its checksum is wrong
 * by GUARD_ERROR. For UDP this is not enough: nobody completes, or checks, the partial checksum of a packet that
 * stays on the machine (veth). So the length field says more than the packet has, too. A guarded TCP probe is an
 * old ACK, like every trimmed TCP probe: it is trimmed even with NOTRUNC.
 *
 * In memory, a partial checksum (CHECKSUM_PARTIAL) is the sum of the pseudo header. A complete checksum has the
 * same value once in 65535 packets. That probe gets a wrong checksum, which routers do not check. */

#define GUARD_ERROR 1

/* A clone while it becomes a probe. */
struct clone {
	struct packet pkt;
	struct hdr_cursor l4; /* behind the IP header */
	__u32 old_len;        /* bytes behind the IP header before the clone was trimmed */
	__u32 new_len;        /* and after */
	__u64 pseudo;         /* sum of the pseudo header without its length */
	__u16 device_check;   /* UDP: the checksum that the device will compute; 0: it is complete */
	int keep_payload;
};

static inline int is_partial(const struct clone *clone, __u16 check)
{
	return check == csum_fold(clone->pseudo + bpf_htonl(clone->old_len));
}

/* TCP: ports and sequence number. A trimmed probe is an empty ACK with an older sequence number: the receiver
 * discards it as a duplicate. It has PSH, which without data means nothing to a receiver. But queues with an ACK
 * filter (CAKE's ack-filter, cable modems) do not take it for a pure ACK then (cake_tcph_may_drop() in the kernel).
 * Of pure ACKs they keep the newest: the next packet of the flow would replace the probe, or even get its TTL,
 * where the filter writes the newer ACK into the older one.
 *
 * A probe's sequence number grows with the carrier's and with the number of the probe. So the probes of a flow
 * differ, whether it sends byte by byte or nothing. Firewalls accept numbers that are older by up to the receiver's
 * window. TCP_SEQ_BACK is below the smallest windows in use. A firewall that knows newer numbers may drop what is
 * much older. So if the carrier is a retransmission, the probe has the number of a new carrier, and NOTRUNC does
 * not keep the payload.
 *
 * The sender's TCP takes an ICMP error for its own if the quoted number is outstanding (tcp_v4_err() in the kernel):
 * it becomes the socket's SO_ERROR. If replies pass to the stack, the numbers are therefore below everything that is
 * outstanding. Where that is not possible, elf_ingress drops the reply nevertheless (harms_tcp()). */
#define TCP_SEQ_BACK 2048

static inline int tcp_may_carry(const struct hdr_cursor *l4)
{
	struct tcphdr *tcp = l4->pos;

	return (void *)(tcp + 1) <= l4->end && (tcp->flags & (TCP_SYN | TCP_FIN | TCP_RST | TCP_ACK)) == TCP_ACK;
}

static inline int rewrite_tcp(struct __sk_buff *skb, struct clone *clone, struct scratch *scratch)
{
	__u64 pseudo = clone->pseudo + bpf_htonl(clone->new_len);
	__u32 partial, seq, len = clone->new_len;
	struct tcphdr *tcp = clone->l4.pos;

	if ((void *)(tcp + 1) > clone->l4.end)
		return -1;
	partial = is_partial(clone, tcp->check);
	scratch->probe.origseq = seq = bpf_ntohl(tcp->seq);
	if (!clone->keep_payload) {
		if (scratch->resent)
			seq = scratch->next;
		if (!INGRESS_DROP && scratch->probe.tcp.cwnd && (__s32)(seq - scratch->acked) > 0)
			seq = scratch->acked;
		tcp->seq = bpf_htonl(seq - TCP_SEQ_BACK + scratch->reservation.seq % TCP_SEQ_BACK);
		tcp->flags = TCP_ACK | TCP_PSH;
		tcp->urg_ptr = 0;
		tcp->check = 0;
		tcp->check = ~csum_fold(pseudo + csum_chunk(skb, scratch->sum_buffer, skb->len - len, len, 0));
	}
	if (partial)
		tcp->check = csum_fold(pseudo);
	return 0;
}

/* UDP: ports, length and checksum. A trimmed probe has a checksum of our choice, and 2 bytes of payload that make
 * it right. If no device completes a partial checksum, as on veth, routers quote the partial one. So a reply must
 * find its probe by either checksum.
 *
 * CHECKSUM_STEP is the distance between the checksums of consecutive probes. It is coprime to 65535, so that every
 * value is used before one repeats. It is large, so that a checksum that a NAT shifts by a constant does not match
 * another probe in flight. */
#define CHECKSUM_STEP 40507

static inline int rewrite_udp(struct __sk_buff *skb, struct clone *clone, struct scratch *scratch)
{
	struct udphdr *udp = clone->l4.pos;
	__u16 *compensation = (__u16 *)(udp + 1), check;
	__u32 partial, len = clone->new_len;
	__u64 pseudo, sum;

	if ((void *)compensation > clone->l4.end)
		return -1;
	partial = is_partial(clone, udp->check);
	scratch->probe.origseq = bpf_ntohs(udp->check);
	udp->len = bpf_htons(len);
	pseudo = clone->pseudo + bpf_htonl(len);
	if (scratch->reservation.form == GUARDED) {
		udp->len = bpf_htons(len | UDP_EXCESS);
		pseudo += GUARD_ERROR;
	}
	sum = pseudo + udp->source + udp->dest + udp->len;
	check = udp->check;
	if (!clone->keep_payload) {
		if ((void *)(compensation + 1) > clone->l4.end)
			return -1;
		check = bpf_htons(
			1 + ((__u64)scratch->reservation.seq * CHECKSUM_STEP + scratch->reservation.salt) % 65535);
		*compensation = ~csum_fold(sum + check);
		scratch->probe.compensation = *compensation;
		udp->check = check;
	} else if (partial) {
		check = ~csum_fold(sum + csum_skb(skb, scratch->sum_buffer, skb->len - len + sizeof(*udp),
						  len - sizeof(*udp)));
		if (check == 0)
			check = 0xffff; /* RFC 768 */
	}
	if (partial) {
		udp->check = csum_fold(pseudo);
		clone->device_check = check;
	}
	return 0;
}

/* ICMP echo requests: identifier and sequence. A trimmed probe has a sequence number of our choice, and 2 bytes of
 * payload that keep the checksum as it was. */
static inline int icmp_may_carry(const struct hdr_cursor *l4, const struct packet *pkt)
{
	struct icmphdr *icmp = l4->pos;

	return (void *)(icmp + 1) <= l4->end && icmp_kind(pkt, icmp) == ECHO_REQUEST;
}

static inline int rewrite_icmp(struct clone *clone, struct scratch *scratch)
{
	struct icmphdr *icmp = clone->l4.pos;
	__u16 *compensation = (__u16 *)(icmp + 1);
	__u64 sum;

	if ((void *)compensation > clone->l4.end)
		return -1;
	scratch->probe.origseq = bpf_ntohs(icmp->sequence);
	if (clone->keep_payload)
		return 0;
	if ((void *)(compensation + 1) > clone->l4.end)
		return -1;
	icmp->sequence = bpf_htons(scratch->reservation.seq + scratch->reservation.salt);
	sum = clone->pkt.version == 6 ? clone->pseudo + bpf_htonl(clone->new_len) : 0;
	sum += *(__u16 *)icmp + icmp->check + icmp->id + icmp->sequence;
	if (scratch->reservation.form == GUARDED)
		sum += GUARD_ERROR;
	*compensation = ~csum_fold(sum);
	return 0;
}

/* Return the number of header bytes behind the IP header, -1 if the packet is cut before their end. */
static inline int l4_header_len(const struct hdr_cursor *nh, const struct packet *pkt)
{
	struct tcphdr *tcp = nh->pos;
	int len = sizeof(struct udphdr);

	if (pkt->protocol == IPPROTO_TCP) {
		if ((void *)(tcp + 1) > nh->end)
			return -1;
		len = (tcp->data_offset >> 4) * 4;
		if (len < (int)sizeof(*tcp))
			return -1;
	}
	return nh->pos + len > nh->end ? -1 : len;
}

/* Return the payload length of a trimmed probe. UDP and ICMP need 2 bytes for their checksums. An echo request with
 * 2 bytes gets 4, so that its reply is longer than the reply to the application's own request. */
static inline __u32 trimmed_len(const struct packet *pkt, __u32 payload)
{
	if (pkt->protocol == IPPROTO_TCP)
		return 0;
	return is_icmp(pkt) && payload == 2 ? 4 : 2;
}

/* Does the probe keep the payload of the packet? With NOTRUNC it does if its hop is proven; but a TCP packet
 * without payload gets a sequence number of our own even then. A fallback probe of UDP does, because an application
 * that receives it must not see a difference. A fallback echo request does not, because we drop its reply. */
static inline int keeps_payload(const struct packet *pkt, __u32 payload, __u32 form)
{
	if (form == FALLBACK)
		return pkt->protocol == IPPROTO_UDP;
	return NOTRUNC && form == USUAL && (payload || pkt->protocol != IPPROTO_TCP);
}

/* Trim the clone. A probe that keeps the payload gets the first segment's if the packet is yet to be segmented. */
static inline int trim_clone(struct __sk_buff *skb, struct clone *clone, struct scratch *scratch)
{
	struct hdr_cursor nh = { (void *)(long)skb->data, (void *)(long)skb->data_end };
	__u32 headers, payload, payload_len;
	struct packet pkt = {};
	int l4_len;

	if (parse_frame(&nh, &pkt) < 0)
		return -1;
	l4_len = l4_header_len(&nh, &pkt);
	if (l4_len < 0)
		return -1;
	headers = pkt.ip_off + pkt.ip_len + l4_len;
	if (skb->len < headers)
		return -1;
	payload = skb->len - headers;
	clone->keep_payload = !scratch->resent && keeps_payload(&pkt, payload, scratch->reservation.form);
	payload_len = clone->keep_payload ? first_segment_len(skb, payload) : trimmed_len(&pkt, payload);
	scratch->probe.payload_len = clone->keep_payload ? 0 : payload_len;
	if (payload_len == payload)
		return bpf_skb_pull_data(skb, skb->len);
	return bpf_skb_change_tail(skb, headers + payload_len, 0);
}

static inline void set_tot_len(struct iphdr *ip, __u32 len)
{
	__u16 check = csum_replace(ip->check, ip->tot_len, bpf_htons(len));

	ip->tot_len = bpf_htons(len);
	ip->check = check;
}

/* Set the TTL, and the lengths in the IP header and in the outer one. */
static inline int rewrite_ip(struct __sk_buff *skb, const struct clone *clone, __u8 ttl)
{
	struct ipv6hdr *ip6 = clone->pkt.ip;
	struct iphdr *ip = clone->pkt.ip, *outer;
	__u16 ttl_and_protocol; /* one word for the checksum */

	if (TUNNEL && clone->pkt.encapsulated) {
		outer = (void *)(long)skb->data + clone->pkt.outer_off;
		if ((void *)(outer + 1) > clone->l4.end)
			return -1;
		set_tot_len(outer, skb->len - clone->pkt.outer_off);
	}
	if (clone->pkt.version == 4) {
		set_tot_len(ip, clone->pkt.ip_len + clone->new_len);
		ttl_and_protocol = *(__u16 *)&ip->ttl;
		ip->ttl = ttl;
		ip->check = csum_replace(ip->check, ttl_and_protocol, *(__u16 *)&ip->ttl);
	} else {
		ip6->payload_len = bpf_htons(clone->pkt.ip_len - sizeof(*ip6) + clone->new_len);
		ip6->hop_limit = ttl;
	}
	return 0;
}

static inline int rewrite_l4(struct __sk_buff *skb, struct clone *clone, struct scratch *scratch)
{
	if (clone->pkt.protocol == IPPROTO_TCP)
		return rewrite_tcp(skb, clone, scratch);
	if (clone->pkt.protocol == IPPROTO_UDP)
		return rewrite_udp(skb, clone, scratch);
	return is_icmp(&clone->pkt) ? rewrite_icmp(clone, scratch) : -1;
}

/* Make the clone the probe of the reservation, ready for its hook. Fill in its record and key in scratch. Return -1
 * if the clone cannot become a probe. */
static inline int build_probe(struct __sk_buff *skb, struct clone *clone, struct scratch *scratch)
{
	struct hdr_cursor nh;
	__u32 ip_end;

	clone->old_len = skb->len;
	scratch->probe.compensation = 0;
	if (trim_clone(skb, clone, scratch) < 0)
		return -1;
	nh.pos = (void *)(long)skb->data;
	nh.end = (void *)(long)skb->data_end;
	if (parse_frame(&nh, &clone->pkt) < 0)
		return -1;
	clone->l4 = nh;
	ip_end = clone->pkt.ip_off + clone->pkt.ip_len;
	clone->old_len -= ip_end;
	clone->new_len = skb->len - ip_end;
	clone->pseudo =
		csum_address(&clone->pkt.saddr) + csum_address(&clone->pkt.daddr) + bpf_htonl(clone->pkt.protocol);
	if (rewrite_ip(skb, clone, scratch->reservation.ttl) < 0 || rewrite_l4(skb, clone, scratch) < 0 ||
	    parse_probe_key(&clone->l4, &clone->pkt, &scratch->key) < 0)
		return -1;
	if (clone->device_check) {
		scratch->partial.key = scratch->key;
		if (parse_udp_head(&clone->l4, scratch->partial.head) < 0)
			return -1;
		scratch->key.ident = (scratch->key.ident & 0xffff0000) | bpf_ntohs(clone->device_check);
	}
	return 0;
}

/* ---- Processes and their sockets ---------------------------------------------------------- */

#if BY_OWNER

BPF_HASH(processes, __u32, struct process, 16384);  /* by PID */
BPF_HASH(apps, struct app_name, __u32, 1024);       /* target names in lower case -> 1: the whole name;
						    * 0: its first 15 characters, so that user space must check */
BPF_HASH(interpreters, struct app_name, __u8, 256); /* their executables' names up to a digit or dot, cut to 15 */
BPF_ARRAY(task_sample, struct task_sample, 1);
BPF_ARRAY(task_pid_offset, __u32, 1); /* of pid in struct task_struct, with tgid behind it; user space finds it */
BPF_RINGBUF_OUTPUT(process_events, 64);

/* Declared by hand, because BCC's macro for socket storage does not set BPF_F_CLONE. With it, accepted sockets
 * inherit the owner of their listener. */
struct sockets_table_t {
	int key;
	struct owner leaf;
	void *(*sk_storage_get)(void *, void *, int);
	__u32 max_entries;
	int flags;
};
__attribute__((section("maps/sk_storage"))) struct sockets_table_t sockets = {
	.flags = BPF_F_NO_PREALLOC | BPF_F_CLONE,
};
BPF_ANNOTATE_KV_PAIR(sockets, int, struct owner);

static inline struct app_name current_app(void)
{
	struct app_name app = {};

	bpf_get_current_comm(&app, sizeof(app));
	return app;
}

/* Return the status that a command name gives a process by -a, 0 for none. Upper and lower case (ASCII) are the same.
 * Converts 8 characters at a time and without a branch: 16 branches are 2^16 paths to verifiers before Linux 6.8. */
static inline __u32 status_by_name(const struct app_name *app)
{
	__u64 word[sizeof(*app) / 8], low, from_a, above_z;
	__u32 i, *is_whole;

	if (!BY_APP)
		return 0;
	__builtin_memcpy(word, app, sizeof(*app));
#pragma unroll
	for (i = 0; i < sizeof(*app) / 8; i++) {
		low = word[i] & 0x7f7f7f7f7f7f7f7fULL;
		from_a = low + 0x3f3f3f3f3f3f3f3fULL;  /* highest bit of each byte: 'A' or above */
		above_z = low + 0x2525252525252525ULL; /* above 'Z' */
		word[i] |= ((from_a ^ above_z) & ~word[i] & 0x8080808080808080ULL) >> 2;
	}
	is_whole = apps.lookup((struct app_name *)word);
	if (!is_whole)
		return 0;
	return *is_whole ? TARGET : UNDECIDED;
}

/* Return a name up to its first digit or dot: what follows is the version of an interpreter. It has no branch:
 * see status_by_name(). */
static inline struct app_name without_version(const struct app_name *app)
{
	__u64 word[sizeof(*app) / 8], low, from_0, above_9, no_dot, end, ended = 0;
	const __u64 top = 0x8080808080808080ULL;
	struct app_name stem;
	__u32 i;

	__builtin_memcpy(word, app, sizeof(*app));
#pragma unroll
	for (i = 0; i < sizeof(*app) / 8; i++) {
		word[i] = first_lowest(word[i]);
		low = word[i] & ~top;
		from_0 = low + 0x5050505050505050ULL;  /* highest bit of each byte: '0' or above */
		above_9 = low + 0x4646464646464646ULL; /* above '9' */
		no_dot = (low ^ 0x2e2e2e2e2e2e2e2eULL) + 0x7f7f7f7f7f7f7f7fULL; /* not '.' */
		end = ((from_0 ^ above_9) | ~no_dot) & ~word[i] & top;
		end &= -end;                                               /* of the first such byte only */
		word[i] = first_lowest(word[i] & (end >> 7) - 1 & ~ended); /* what is in front of it */
		ended |= -((end | -end) >> 63);
	}
	__builtin_memcpy(&stem, word, sizeof(stem));
	return stem;
}

/* Return the PID of the process that a task (struct task_struct) belongs to, 0 if we cannot know. */
static inline __u32 tgid_of(__u64 task)
{
	__u32 tgid = 0, *offset;
	int zero = 0;

	offset = task_pid_offset.lookup(&zero);
	if (!offset || !*offset || probe_read_kernel(&tgid, sizeof(tgid), (void *)(task + *offset + sizeof(tgid))))
		return 0;
	return tgid;
}

/* Return whether the parent of a task is a target, or may become one, or whether we cannot know. */
static inline int has_target_parent(__u64 task)
{
	struct process *process;
	__u64 parent;
	__u32 tgid;

	if (probe_read_kernel(&parent, sizeof(parent), (void *)(task + TASK_PARENT)))
		return 1;
	tgid = tgid_of(parent);
	if (!tgid)
		return 1;
	process = processes.lookup(&tgid);
	return process && process->status != OURSELVES;
}

/* Return whether no name of -a can mean the program that the current process runs now, by its executable's name. If
 * the executable is an interpreter, the command line may have the name, and only user space reads that: return 0.
 * bprm: struct linux_binprm. */
static inline int is_other_program(__u64 bprm)
{
	struct app_name name = {}, stem;
	__u64 file, dentry, text;

	if (ODD_NAMES || probe_read_kernel(&file, sizeof(file), (void *)(bprm + BPRM_FILE)) ||
	    probe_read_kernel(&dentry, sizeof(dentry), (void *)(file + FILE_DENTRY)) ||
	    probe_read_kernel(&text, sizeof(text), (void *)(dentry + DENTRY_NAME)) ||
	    bpf_probe_read_kernel_str(&name, sizeof(name), (void *)text) <= 1 || status_by_name(&name))
		return 0;
	stem = without_version(&name);
	return !interpreters.lookup(&stem);
}

/* Enter the process into the map. It replaces a former process with the same PID. */
static inline void enter_process(struct process_event *event, const struct app_name *app)
{
	struct process process = { .status = event->status, .app = *app };

	event->id = process.id = bpf_ktime_get_ns();
	if (processes.update(&event->pid, &process))
		COUNT(processes_full);
}

static inline void report_process(struct process_event *event)
{
	if (process_events.ringbuf_output(event, sizeof(*event), 0))
		COUNT(events_lost);
}

/* sched_process_exec, in the process. A target stays one, under its new name. Any other process may become one by a
 * name that only user space sees: of a script, or a long one. Without BTF, user space must look at each. */
int elf_exec(struct bpf_raw_tracepoint_args *ctx)
{
	struct process_event event = { .pid = bpf_get_current_pid_tgid() >> 32 };
	struct app_name app = current_app();
	struct process *process;

	process = processes.lookup(&event.pid);
	if (process && process->status == TARGET) {
		process->app = app;
		return 0;
	}
	if (!BY_APP)
		return 0;
	event.status = status_by_name(&app);
	if (BPRM_FILE && !process && !event.status && !has_target_parent(ctx->args[0]) &&
	    is_other_program(ctx->args[2]))
		return 0;
	if (!event.status)
		event.status = UNDECIDED;
	enter_process(&event, &app);
	report_process(&event);
	return 0;
}

/* sched_wakeup_new, in the parent, before the child runs. The child inherits the status of its parent.
 * Not at sched_process_fork: Linux 7.2 skips a program there while another run of it is preempted on that CPU. Here
 * no run is preempted, because the run queue is locked. */
int elf_fork(struct bpf_raw_tracepoint_args *ctx)
{
	__u32 pid = bpf_get_current_pid_tgid() >> 32, *offset;
	struct process_event event = {};
	struct task_sample *sample;
	struct process *process;
	struct {
		__u32 pid, tgid;
	} child = {};
	struct app_name app;
	int zero = 0;

	sample = task_sample.lookup(&zero);
	if (sample && sample->parent == pid)
		bpf_probe_read_kernel(sample->task, sizeof(sample->task), (void *)ctx->args[0]);
	offset = task_pid_offset.lookup(&zero);
	if (!offset || bpf_probe_read_kernel(&child, sizeof(child), (void *)(ctx->args[0] + *offset)))
		return 0;
	if (child.pid != child.tgid)
		return 0; /* a thread */
	process = processes.lookup(&pid);
	if (!process || process->status == OURSELVES) {
		processes.delete(&child.pid); /* a former process with that PID */
		return 0;
	}
	app = process->app;
	event.pid = child.pid;
	event.status = process->status;
	enter_process(&event, &app);
	if (event.status == UNDECIDED)
		report_process(&event);
	return 0;
}

/* sched_process_exit, in every thread. Report the end of the first one. Other threads may outlive it, or may have
 * taken its place by an exec. So user space removes the process when all its threads have ended. */
int elf_exit(struct bpf_raw_tracepoint_args *ctx)
{
	__u64 ids = bpf_get_current_pid_tgid();
	struct process_event event = { .pid = ids >> 32 };
	struct process *process;

	if (event.pid != (__u32)ids)
		return 0;
	process = processes.lookup(&event.pid);
	if (process) {
		event.id = process->id;
		report_process(&event);
	}
	return 0;
}

/* Return the entry of the current process, 0 if it has none. Enter it if it now has the name of a target. */
static inline struct process *current_process(void)
{
	__u64 ids = bpf_get_current_pid_tgid();
	struct process_event event = { .pid = ids >> 32 };
	struct process *process;
	struct app_name app;

	process = processes.lookup(&event.pid);
	if (process || event.pid != (__u32)ids)
		return process;
	app = current_app(); /* the process may have changed its name since user space checked it */
	event.status = status_by_name(&app);
	if (!event.status)
		return 0;
	enter_process(&event, &app);
	report_process(&event);
	return processes.lookup(&event.pid);
}

/* Fill in the owner of a socket: the current process, which has this entry. */
static inline void set_owner(struct owner *owner, const struct process *process, __u32 protocol, __u64 cookie)
{
	__u64 ids = bpf_get_current_pid_tgid();

	owner->process = process->id;
	owner->socket = protocol == IPPROTO_MPTCP ? 0 : cookie;
	owner->status = process->status;
	owner->pid = ids >> 32;
	owner->app = owner->pid == (__u32)ids ? current_app() : process->app; /* threads have names of their own */
}

/* cgroup sock_create, in the creating process. Always returns 1, which allows the socket. */
int elf_sock_create(struct bpf_sock *sk)
{
	struct process *process = current_process();
	struct owner owner = {};

	if (!process)
		return 1;
	set_owner(&owner, process, sk->protocol, bpf_get_socket_cookie(sk));
	sockets.sk_storage_get(sk, &owner, BPF_SK_STORAGE_GET_F_CREATE);
	return 1;
}

/* A process accepts a connection, or asks for the peer of one that it was given. If it is a target, it owns the
 * connection. If not, a connection that inherited the owner of its listener has no owner from now on. */
static inline int note_user(struct bpf_sock_addr *ctx)
{
	struct process *process = current_process();
	struct owner owner = {}, *stored;
	struct bpf_sock *sk = ctx->sk;
	__u64 cookie = bpf_get_socket_cookie(ctx);

	if (!sk || (process && process->status == OURSELVES))
		return 1;
	if (process)
		set_owner(&owner, process, ctx->protocol, cookie);
	stored = sockets.sk_storage_get(sk, process ? &owner : 0, process ? BPF_SK_STORAGE_GET_F_CREATE : 0);
	if (stored && process)
		*stored = owner;
	else if (stored && stored->socket != cookie)
		stored->status = 0;
	return 1;
}

/* cgroup getpeername, in the calling process. The kernel also runs it in accept() and accept4() if they return an
 * address. Always returns 1: the address stays as it is. */
int elf_accept_v4(struct bpf_sock_addr *ctx)
{
	return note_user(ctx);
}

int elf_accept_v6(struct bpf_sock_addr *ctx)
{
	return note_user(ctx);
}

/* Return the entry of the owning process, 0 if it has ended or is no target. */
static inline struct process *process_of(const struct owner *owner)
{
	__u32 pid = owner->pid;
	struct process *process;

	process = processes.lookup(&pid);
	return process && process->id == owner->process ? process : 0;
}

/* Count a probe against the share of a process. */
static inline void take_probe_of(__u32 pid, __u64 now)
{
	struct process *process = processes.lookup(&pid);

	if (process)
		take_share(&process->probes, BUDGET_COST, now);
}

/* Is the owner a target, or elfprobe itself? Stores the answer with the socket, which may outlive the process. */
static inline int is_known(struct owner *owner)
{
	struct process *process;

	if (owner->status != UNDECIDED)
		return owner->status;
	process = process_of(owner);
	if (!process)
		owner->status = 0; /* user space found it to be no target, or it ended before that */
	else if (process->status == TARGET)
		owner->status = TARGET;
	return owner->status == TARGET;
}

static void *(*skc_to_mptcp_sock)(void *sk) = (void *)196; /* BCC before 0.25 does not declare it */

/* Return the target process that the packet comes from, or elfprobe itself, 0 for all others. */
static inline struct owner *packet_owner(struct __sk_buff *skb)
{
	struct bpf_sock *sk = skb->sk; /* the helper itself checks that it is a full socket (Linux 5.10) */
	struct owner *owner;
	void *mptcp;

	owner = sk ? sockets.sk_storage_get(sk, 0, 0) : 0;
	if (MPTCP && sk && !owner) { /* the kernel itself makes the TCP sockets below one of MPTCP */
		mptcp = skc_to_mptcp_sock(sk);
		owner = mptcp ? sockets.sk_storage_get(mptcp, 0, 0) : 0;
	}
	return owner && is_known(owner) ? owner : 0;
}

/* Return the PID of the process in whose system call the packet is sent, 0 if there is none. A process that sends holds
 * the lock of its TCP socket. Interrupts that find a socket locked do not send by it. */
static inline __u32 sending_process(struct __sk_buff *skb)
{
	__u32 owned = 0;
	__u64 sk = 0;

	probe_read_kernel(&sk, sizeof(sk), (void *)skb + SKB_SK);
	probe_read_kernel(&owned, sizeof(owned), (void *)(sk + SOCK_OWNED));
	return owned ? tgid_of(bpf_get_current_task()) : 0;
}

/* Does the socket of the packet belong to a target? A target that sends by the socket becomes its owner. A
 * connection that inherited the owner of its listener belongs to nobody until a process sends. */
static inline int is_owned(struct __sk_buff *skb, struct owner *owner)
{
	struct process *process;
	__u64 cookie;
	__u32 pid;

	if (!SOCK_OWNED)
		return 1;
	cookie = bpf_get_socket_cookie(skb);
	pid = sending_process(skb);
	if (pid && pid != owner->pid) {
		process = processes.lookup(&pid);
		if (process && process->status == TARGET) {
			owner->process = process->id;
			owner->pid = pid;
			owner->app = process->app;
		} else if (owner->socket && owner->socket != cookie) {
			owner->status = 0;
			return 0;
		}
	}
	if (pid && owner->socket)
		owner->socket = cookie;
	return !owner->socket || owner->socket == cookie;
}

#else

static inline struct process *process_of(const struct owner *owner)
{
	return 0;
}

static inline void take_probe_of(__u32 pid, __u64 now)
{
}

static inline struct owner *packet_owner(struct __sk_buff *skb)
{
	return 0;
}

static inline int is_owned(struct __sk_buff *skb, struct owner *owner)
{
	return 0;
}

#endif

/* ---- TC egress: the clone ----------------------------------------------------------------- */

/* Record the probe as in flight. Return 0, or the reason why it is not. */
static inline int record_probe(const struct clone *clone, struct scratch *scratch)
{
	__u32 ident = scratch->key.ident, *other;
	int err;

	if (clone->device_check) {
		other = partial_checksums.lookup(&scratch->partial);
		if (other) {
			scratch->key.ident = *other;
			if (in_flight.lookup(&scratch->key))
				return REASON(key_busy);
			scratch->key.ident = ident;
		}
		partial_checksums.update(&scratch->partial, &ident);
	}
	scratch->probe.seq = scratch->reservation.seq;
	scratch->probe.outttl = scratch->reservation.ttl;
	scratch->probe.outipid = clone->pkt.ip_id;
	scratch->probe.outtos = clone->pkt.tos;
	scratch->probe.source = clone->pkt.saddr;
	scratch->probe.form = scratch->reservation.form;
	scratch->probe.sendtime = bpf_ktime_get_ns();
	err = in_flight.insert(&scratch->key, &scratch->probe);
	if (err)
		return err == -EEXIST ? REASON(key_busy) : REASON(in_flight_full);
	scratch->recorded = 1;
	return 0;
}

/* Make the clone a probe in flight. Return 0, or the reason why it is not. */
static inline int make_probe(struct __sk_buff *skb, struct scratch *scratch)
{
	struct clone clone = {};

	if (build_probe(skb, &clone, scratch) < 0)
		return REASON(build_failed);
	if (hook_beforesend(skb, clone.pkt.version, clone.pkt.protocol) < 0)
		return REASON(hook_dropped);
	return record_probe(&clone, scratch);
}

/* Runs for the clone, by tail call: makes it the probe, or drops it.
 *
 * qdisc_pkt_len was set before we trimmed the clone, so a shaper would charge the probe for the whole packet.
 * Redirecting it once more makes the kernel compute it again. */
int elf_probe(struct __sk_buff *skb)
{
	struct scratch *scratch = scratch_of_run();
	int reason;

	if (!scratch)
		return TC_ACT_CONSUMED;
	reason = make_probe(skb, scratch);
	if (reason) {
		count_reason(reason);
		return TC_ACT_CONSUMED;
	}
	if (skb->wire_len <= skb->len)
		return TC_ACT_UNSPEC;
	expect(scratch, PROBE);
	scratch->redirect_result = bpf_clone_redirect(skb, skb->ifindex, 0);
	if (scratch->expected && !scratch->redirect_result)
		scratch->redirect_result = INTERCEPTED;
	expect(scratch, 0);
	scratch->redirected = 1;
	return TC_ACT_CONSUMED;
}

/* Handle a packet in elf_egress that is our clone, or our probe on its second way through. */
static inline int pass_ours(struct __sk_buff *skb, struct scratch *scratch)
{
	__u32 expected = scratch->expected;
	struct probe *probe;

	expect(scratch, 0);
	if (expected == PROBE) {
		probe = in_flight.lookup(&scratch->key);
		if (probe) /* it leaves only now */
			scratch->probe.sendtime = probe->sendtime = bpf_ktime_get_ns();
		return TC_ACT_UNSPEC;
	}
	programs.call(skb, 0);
	COUNT(build_failed);
	return TC_ACT_CONSUMED;
}

/* ---- TC egress: the carrier --------------------------------------------------------------- */

/* User space tells the user about a flow that is stalled for so long. */
#define STALL_REPORTED (3 * NSEC_PER_SEC)

/* May a copy of this packet be sent with a low TTL? The cursor is behind the IP header. */
static inline int may_carry(const struct hdr_cursor *nh, const struct packet *pkt)
{
	if (pkt->fragment || l4_header_len(nh, pkt) < 0)
		return 0;
	if (pkt->version == 6 && pkt->ip_len + pkt->l4_len == sizeof(struct ipv6hdr))
		return 0; /* BIG TCP: has a jumbo option (RFC 2675), which the device removes and no probe may have */
	if (pkt->protocol == IPPROTO_TCP)
		return tcp_may_carry(nh);
	return pkt->protocol == IPPROTO_UDP || (is_icmp(pkt) && icmp_may_carry(nh, pkt));
}

/* Return 0 if the packet may carry a probe, else the reason. */
static inline int check_carrier(struct __sk_buff *skb, const struct hdr_cursor *nh, const struct packet *pkt,
				__u64 now)
{
	__u64 *lease;
	int zero = 0;

	if (!may_carry(nh, pkt))
		return REASON(carrier_unfit);
	if (pkt->ttl <= MAX_HOPS)
		return REASON(carrier_low_ttl);
	if (is_zerocopy(skb))
		return REASON(carrier_zerocopy);
	if (wants_card_stamp(skb))
		return REASON(carrier_stamped);
	lease = alive_until.lookup(&zero);
	if (!lease || !*lease)
		return NOT_SENT;
	return now <= *lease ? 0 : REASON(lease_expired);
}

/* Report an event of this flow. */
static inline void report_flow(struct __sk_buff *skb, const struct flow_key *flow, __u32 kind)
{
	struct flow_event event = { .kind = kind };

	event.flow.dest = flow->dest;
	event.flow.sport = flow->sport;
	event.flow.dport = flow->dport;
	event.flow.protocol = flow->protocol;
	if (submit_flow_event(skb, &event))
		COUNT(events_lost);
}

/* Has the link of the packet's device been up since this time? A lost link is no sign of a firewall: cables are
 * pulled, and some drivers take the link down for seconds when XDP is attached. */
static inline int had_carrier(struct __sk_buff *skb, __u64 since)
{
	__u32 device = skb->ifindex;
	__u64 *link_since;

	link_since = link_up_since.lookup(&device);
	return !link_since || *link_since < since;
}

/* Let the path model look at the flow of a packet, and report what it finds. Return whether the packet may carry a probe.
 */
static inline int look_at_flow(struct __sk_buff *skb, struct path *path, struct progress *progress,
			       struct scratch *scratch, __u64 now)
{
	int may_carry, can_stall = hidden(scratch, had_carrier(skb, progress->since));
	struct trust *trust = trust_in(path, scratch->flow.protocol);
	struct schedule *all = lookup_schedule();
	__u32 kind = 0;

	if (!all)
		return 0;
	bpf_spin_lock(&all->lock);
	may_carry = flow_looked(path, trust, progress, &scratch->look, can_stall, now);
	bpf_spin_unlock(&all->lock);
	if (path->excluded) {
		kind = DESTINATION_EXCLUDED;
	} else if (progress->reported && !progress->stalled_at) {
		progress->reported = 0;
		kind = FLOW_RESUMED;
	} else if (!progress->reported && progress->stalled_at && now - progress->since > STALL_REPORTED &&
		   (progress->under_probes || scratch->flow.protocol == IPPROTO_TCP)) {
		progress->reported = 1;
		kind = FLOW_STALLED;
	}
	if (kind)
		report_flow(skb, &scratch->flow, kind);
	return may_carry;
}

/* No sender has more outstanding before the first acknowledgement: windows of SYN packets are not scaled (RFC 7323).
 */
#define FIRST_WINDOW_MAX 65535
/* If both numbers differ from the last packet's by more, it is another connection with the same ports. */
#define SAME_CONNECTION (1 << 24)

/* Return the flow with this key, which has no TCP socket here; 0 if there is no room. seq and ack are the numbers
 * in the packet, 0 for other protocols than TCP. */
static inline struct flow *flow_of(struct flow_key *key, __u32 seq, __u32 ack)
{
	struct flow *flow, *none;
	int zero = 0;

	flow = flows.lookup(key);
	if (flow && (seq - flow->next_seq + SAME_CONNECTION <= 2 * SAME_CONNECTION ||
		     ack - flow->last_ack + SAME_CONNECTION <= 2 * SAME_CONNECTION))
		return flow;
	none = new_flow.lookup(&zero);
	if (!none)
		return 0;
	if (flow)
		flows.update(key, none);
	else
		flows.insert(key, none); /* another CPU may have been faster */
	flow = flows.lookup(key);
	if (!flow)
		return 0;
	flow->first_seq = flow->next_seq = seq;
	flow->first_ack = flow->last_ack = ack;
	return flow;
}

/* A packet of a TCP flow without a socket here leaves. Fill in the look. The peer knows the connection if it has sent
 * something since the first packet that we saw, or if more was sent than fits into the first window. */
static inline void look_at_foreign_tcp(struct __sk_buff *skb, struct flow *flow, const struct packet *pkt,
				       const struct tcphdr *tcp, struct scratch *scratch)
{
	__u32 seq = bpf_ntohl(tcp->seq), ack = bpf_ntohl(tcp->ack_seq), headers = (tcp->data_offset >> 4) * 4;
	struct flow_look *look = &scratch->look;
	__s32 len = pkt->l4_len - headers;

	scratch->next = flow->next_seq;
	scratch->resent = (__s32)(seq - scratch->next) < 0;
	if (len < 0) /* of BIG TCP: the length field of the IP header is 0 */
		len = skb->len - pkt->ip_off - pkt->ip_len - headers;
	if (!scratch->resent)
		flow->next_seq = seq + len;
	flow->last_ack = ack;
	if (ack != flow->first_ack || (__s32)(seq - flow->first_seq) > FIRST_WINDOW_MAX)
		flow->is_open = 1;
	scratch->early = !flow->is_open;
	look->outstanding = flow->next_seq != flow->acked;
	if (scratch->resent && look->outstanding) /* else it is a keep-alive */
		flow->repeats++;
	look->position = ack + flow->acked;
	look->segments = flow->repeats;
	look->patience = REPEATS_TIME;
}

/* A packet of a flow without a TCP socket here leaves. tcp is 0 for other protocols. Fill in the look. Return the
 * flow's progress. Return 0 if it could not be seen to stall: there is no room, or nothing was received of it, or
 * too rarely. */
static inline struct progress *look_at_foreign(struct __sk_buff *skb, struct path *path, const struct packet *pkt,
					       const struct tcphdr *tcp, struct scratch *scratch, __u64 now)
{
	struct hop *last = hop_at(path, path->liveness.last_responsive);
	struct trust *trust = trust_in(path, scratch->flow.protocol);
	struct flow_look *look = &scratch->look;
	struct flow *flow;

	flow = flow_of(&scratch->flow, tcp ? bpf_ntohl(tcp->seq) : 0, tcp ? bpf_ntohl(tcp->ack_seq) : 0);
	look->is_probed = flow && flow->progress.last_probed;
	if (!flow)
		return 0;
	look->timeouts = look->is_one_way = 0;
	look->port = scratch->flow.dport;
	look->srtt = last ? last->rtt : 0;
	if (tcp)
		look_at_foreign_tcp(skb, flow, pkt, tcp, scratch);
	else
		look_at_conversation(&flow->received, &flow->progress, look, now);
	if (!is_conversation(&flow->received, &flow->progress))
		return 0;
	/* If half the time to a stall is over without progress, look at every packet that is received. */
	if (look->position == flow->progress.position && now - flow->progress.since > look->patience &&
	    flow->progress.repeats <= REPEATS_MIN)
		trust->watched_until = ticks_now() + (look->patience + NSEC_PER_SEC) / (TICK_NS + !TICK_NS);
	return &flow->progress;
}

/* Return 0 if the flow of the packet may be probed now, else the reason. Fill in its TCP state. A flow carries no
 * probe
 * - before the peer has acknowledged or sent data, if it is of TCP. With SYN cookies, the peer knows the connection
 *   only from the first packet behind the handshake. It answers a probe before that, which has an older number,
 *   with a reset.
 * - from retransmissions, unless it is stalled: then there is nothing else.
 * - while the path model suspects a firewall. */
static inline int check_flow(struct __sk_buff *skb, const struct hdr_cursor *nh, const struct packet *pkt,
			     struct path *path, struct scratch *scratch, __u64 now)
{
	__u64 is_tcp = pkt->protocol == IPPROTO_TCP;
	struct tcphdr *tcp = nh->pos;
	struct tcp_state *state = &scratch->probe.tcp;
	struct flow_look *look = &scratch->look;
	struct progress *progress;
	struct bpf_tcp_sock *tp = 0;
	struct bpf_sock *sk;

	/* The verifier follows 0 and 1. If clang compared the protocol again, the verifier would forget that the
	 * header is whole. */
	barrier_var(is_tcp);
	scratch->resent = 0;
	scratch->early = 0;
	if (set_flow_key(&scratch->flow, pkt, nh->pos, nh->end, 0) < 0 || (is_tcp && (void *)(tcp + 1) > nh->end))
		return 0;
	sk = is_tcp && skb->sk ? bpf_sk_fullsock(skb->sk) : 0;
	if (sk && sk->type == SOCK_STREAM) /* bpf_tcp_sock() takes raw sockets for TCP, such as the kernel's own */
		tp = bpf_tcp_sock(sk);
	if (tp) {
		scratch->acked = tp->snd_una;
		scratch->next = tp->snd_nxt;
		state->srtt = tp->srtt_us >> 3; /* the kernel stores eighths */
		state->cwnd = tp->snd_cwnd;
		state->retrans = tp->total_retrans;
		state->inflight = tp->packets_out;
		scratch->resent = (__s32)(bpf_ntohl(tcp->seq) - tp->snd_nxt) < 0;
		scratch->early = tp->bytes_acked <= 1 && !tp->bytes_received;   /* 1: the SYN */
		look->position = (__u32)(tp->bytes_acked + tp->bytes_received); /* a SYN: 0, which is no progress */
		look->segments = tp->data_segs_in;
		look->timeouts = tp->icsk_retransmits;
		look->is_one_way = look->port = look->is_probed = 0;
		look->outstanding = tp->packets_out;
		look->srtt = tp->srtt_us >> 3;
		look->patience = REPEATS_TIME;
		progress = progress_of(skb, sk);
	} else if (!is_tcp || tcp_may_carry(nh)) {
		progress = look_at_foreign(skb, path, pkt, is_tcp ? tcp : 0, scratch, now);
	} else {
		return 0;
	}
	scratch->stalled = 0;
	if (progress) {
		scratch->may_carry = look_at_flow(skb, path, progress, scratch, now);
		scratch->stalled = progress->stalled_at != 0;
	} else {
		scratch->may_carry =
			may_begin_probed(trust_in(path, pkt->protocol), scratch->flow.dport, look->is_probed, now);
	}
	if (READ_ONCE(scratch->early)) /* first: it has not moved yet, but has not stalled either */
		return REASON(carrier_early);
	if (!READ_ONCE(scratch->may_carry))
		return REASON(flow_stalled);
	return scratch->resent && !scratch->stalled ? REASON(carrier_resent) : 0;
}

/* Send the reserved probe as a clone of the packet. Return 0 if it left, the reason why it did not, or NOT_SENT if
 * the run for the clone has counted a reason. */
static inline int send_probe(struct __sk_buff *skb, const struct packet *pkt, struct path *path,
			     struct scratch *scratch)
{
	int ret;

	scratch->recorded = 0;
	scratch->redirected = 0;
	expect(scratch, CLONE);
	ret = bpf_clone_redirect(skb, skb->ifindex, 0);
	if (scratch->expected) {
		expect(scratch, 0);
		if (!ret) { /* a filter before ours consumed the clone or let it out whole, and would do so again */
			path->excluded = 1;
			report_flow(skb, &scratch->flow, CLONE_INTERCEPTED);
		}
		return REASON(clone_lost);
	}
	if (!scratch->recorded)
		return NOT_SENT;
	if (scratch->redirected)
		ret = scratch->redirect_result;
	if (ret && ret != NET_XMIT_CN && in_flight.delete(&scratch->key) == 0)
		return ret == INTERCEPTED ? REASON(clone_lost) : REASON(send_failed);
	COUNT(probes);
	return 0;
}

/* Is the address in a network whose addresses a NAT translates? RFC 1918, RFC 6598, RFC 4193. */
static inline int is_private(const struct in6_addr *a)
{
	__u32 v4 = bpf_ntohl(a->s6_addr32[3]);
	__u64 first, second; /* 0 in one of two networks. The verifier follows each comparison both ways */

	if (a->s6_addr32[0] | a->s6_addr32[1] | (a->s6_addr32[2] ^ bpf_htonl(0xffff)))
		return (bpf_ntohl(a->s6_addr32[0]) & 0xfe000000) == 0xfc000000;
	first = (__u64)((v4 ^ 0x0a000000) & 0xff000000) * ((v4 ^ 0xac100000) & 0xfff00000);
	second = (__u64)((v4 ^ 0xc0a80000) & 0xffff0000) * ((v4 ^ 0x64400000) & 0xffc00000);
	return !first || !second;
}

/* May the packet carry a fallback probe? Only if its addresses prove that a router translates it: then no hop
 * behind that router ever gets a guarded probe. If a fallback probe arrives after all, a UDP application receives
 * one more copy of its packet, and we drop the reply to an echo request. FALLBACKS_MAX limits both. */
static inline int can_fall_back(const struct packet *pkt)
{
	return (pkt->protocol == IPPROTO_UDP || (INGRESS_DROP && is_icmp(pkt))) && is_private(&pkt->saddr) &&
	       !is_private(&pkt->daddr);
}

/* Return the slot of the packet's flow, see struct turns. Ports of clients are often consecutive, or every other
 * one. Of two flows with the same slot that send in bursts, one would take all the turns. So flows get new slots
 * every 256 probes. */
static inline __u32 flow_slot(const struct flow_key *flow, const struct path *path)
{
	__u32 number = bpf_ntohs(flow->sport ^ flow->dport);

	return ((number >> 1) + (number >> 6) * (path->pacing.seq >> 8)) % FLOW_SLOTS;
}

/* Time between two checks whether a destination is still on-link. */
#define ON_LINK_WAIT NSEC_PER_SEC

/* Note what the rows and the budget need of the packet's owner. The caller uses neither owner nor process after
 * this. So the verifier checks the rest once, not for each combination of them. */
static inline void note_owner(struct scratch *scratch, const struct owner *owner, struct process *process,
			      __u64 now)
{
	scratch->probe.pid = 0;
	__builtin_memset(&scratch->probe.app, 0, sizeof(scratch->probe.app));
	scratch->reservation.kept = 0;
	scratch->charged = 0;
	if (!owner)
		return;
	scratch->probe.pid = owner->pid;
	scratch->probe.app = owner->app;
	if (process)
		scratch->charged = owner->pid;
	if (!process || process->probes > now + SHARE_BURST)
		scratch->reservation.kept = KEPT_BUDGET;
}

/* The packet carried a probe: note that its flow did. */
static inline void note_flow_probed(struct __sk_buff *skb, struct path *path, struct scratch *scratch, __u64 now)
{
	struct bpf_sock *sk = scratch->flow.protocol == IPPROTO_TCP && skb->sk ? bpf_sk_fullsock(skb->sk) : 0;
	struct trust *trust = trust_in(path, scratch->flow.protocol);
	struct schedule *all = lookup_schedule();
	struct progress *progress;
	struct flow *flow;

	if (sk && sk->type == SOCK_STREAM) {
		progress = progress_of(skb, sk);
	} else {
		flow = flows.lookup(&scratch->flow);
		progress = flow ? &flow->progress : 0;
	}
	if (!progress || !all)
		return;
	bpf_spin_lock(&all->lock);
	flow_probed(trust, progress, scratch->reservation.ttl, scratch->reservation.form, now);
	bpf_spin_unlock(&all->lock);
}

/* A probe is due: send it with this packet. Return 0, the reason why it did not leave, or NOT_SENT. */
static inline int probe_with(struct __sk_buff *skb, struct hdr_cursor *nh, struct packet *pkt, struct path *path,
			     const struct owner *owner, struct process *process, __u64 now)
{
	struct scratch *scratch = scratch_of_run();
	int reason, unfit;

	if (!scratch)
		return NOT_SENT;
	forget_headers(scratch, (void *)(long)skb->data, nh, pkt);
	note_owner(scratch, owner, process, now);
	reason = check_carrier(skb, nh, pkt, now);
	if (reason && (reason != REASON(carrier_unfit) || pkt->protocol != IPPROTO_TCP || pkt->fragment))
		return reason;
	scratch->unfit = reason;
	if (is_on_link(skb, pkt->version)) {
		set_next_due(&path->pacing, now + ON_LINK_WAIT, now, ticks_now());
		return REASON(on_link);
	}
	__builtin_memset(&scratch->probe.tcp, 0, sizeof(scratch->probe.tcp));
	/* Kept in scratch, so that the verifier does not know it: see hidden(). */
	scratch->can_fall_back = can_fall_back(pkt);
	/* Also for a SYN or FIN, which may show a stall. */
	reason = check_flow(skb, nh, pkt, path, scratch, now);
	unfit = READ_ONCE(scratch->unfit);
	if (unfit || reason)
		return unfit ? unfit : reason;
	scratch->reservation.flow = FLOW_SLOTS;
	if (!READ_ONCE(scratch->resent)) /* retransmissions are few: they take no turns */
		scratch->reservation.flow = flow_slot(&scratch->flow, path);
	reason = reserve_probe(path, &scratch->reservation, READ_ONCE(scratch->can_fall_back), now);
	if (reason)
		return reason;
	take_probe_of(scratch->charged, now);
	reason = send_probe(skb, pkt, path, scratch);
	if (!reason)
		note_flow_probed(skb, path, scratch, now);
	settle_reservation(path, &scratch->reservation, scratch->probe.sendtime, reason == 0);
	return reason;
}

/* Runs for every packet that leaves. Never changes an application packet. TC_ACT_UNSPEC leaves it to the next
 * filter. */
int elf_egress(struct __sk_buff *skb)
{
	struct hdr_cursor nh = { (void *)(long)skb->data, (void *)(long)skb->data_end };
	struct packet pkt = {};
	struct process *process;
	struct scratch *scratch;
	struct owner *owner;
	struct path *path;
	__u8 *slot;
	int reason;
	__u64 now;

	scratch = scratch_expecting();
	if (scratch)
		return pass_ours(skb, scratch);
	if (parse_frame(&nh, &pkt) < 0 || (TUNNEL && FRAME == FRAME_ETHERNET && !pkt.encapsulated))
		return TC_ACT_UNSPEC;
	slot = filter_slot(&pkt.daddr);
	if (!slot)
		return TC_ACT_UNSPEC;
	path = lookup_path(&pkt.daddr, slot);
	if (path && (ticks_now() < path->pacing.next_due_tick || path->excluded))
		return TC_ACT_UNSPEC;
	owner = packet_owner(skb);
	if (owner ? owner->status == OURSELVES : !path || path->flows_only)
		return TC_ACT_UNSPEC;
	now = bpf_ktime_get_ns();
	if (path && now < path->pacing.next_due)
		return TC_ACT_UNSPEC;
	if (owner && !is_owned(skb, owner)) {
		if (!path || path->flows_only)
			return TC_ACT_UNSPEC;
		owner = 0;
	}
	process = owner ? process_of(owner) : 0;
	if (!path)
		path = add_flow_path(&pkt.daddr, slot, process, now);
	if (!path)
		return TC_ACT_UNSPEC;
	reason = probe_with(skb, &nh, &pkt, path, owner, process, now);
	if (reason > 0)
		count_reason(reason);
	return TC_ACT_UNSPEC;
}

/* ---- Ingress: XDP or TC ------------------------------------------------------------------- */

#define EXTENSION_VERSION 2
#define QUOTE_LEN_MIN 128 /* of a quoted packet with an extension behind it (RFC 4884) */

/* Number of bytes that show what a packet is: Ethernet, two VLAN tags, IPv6, and 8 bytes. */
#define HEADERS_LEN 70
/* Length of the longest ICMP error that we read: headers, the longest quoted packet of RFC 4884 (255 words of 8
 * bytes), and the extension. */
#define ICMP_ERROR_LEN 2560

/* Return the TCP probe in flight whose sequence number a middlebox has changed before the router quoted it. If
 * there is none, return 0, and mark the result for report_unmatched(). */
static inline struct probe *find_rewritten(struct extended_result *extended)
{
	struct result *result = &extended->result;
	__u32 number = result->key.ident, *offset;
	struct probe *probe = 0;

	result->key.ident = 0;
	offset = seq_offsets.lookup(&result->key);
	if (offset) {
		result->key.ident = number - *offset;
		probe = in_flight.lookup(&result->key);
	}
	if (probe && offset) {
		probe->seq_offset = *offset;
	} else {
		result->key.ident = number;
		extended->extension_len = UNMATCHED;
	}
	return probe;
}

/* Return the probe in flight whose first bytes are at the cursor, and its key; 0 for none. */
static inline struct probe *find_probe(struct hdr_cursor *nh, const struct packet *quote,
				       struct extended_result *extended, struct udp_partial *partial)
{
	struct probe_key *key = &extended->result.key;
	struct probe *probe;
	__u32 *ident;

	if (parse_probe_key(nh, quote, key) < 0)
		return 0;
	probe = in_flight.lookup(key);
	if (!probe && quote->protocol == IPPROTO_TCP)
		return find_rewritten(extended);
	if (probe || quote->protocol != IPPROTO_UDP)
		return probe;
	partial->key = *key;
	if (parse_udp_head(nh, partial->head) < 0)
		return 0;
	ident = partial_checksums.lookup(partial);
	if (!ident)
		return 0;
	key->ident = *ident;
	return in_flight.lookup(key);
}

/* Parse the quoted packet at the cursor. Return the probe in flight that it quotes, and its key in the result; 0 for
 * none. */
static inline struct probe *match_quote(struct scratch *scratch, void *start, struct hdr_cursor *nh,
					const struct packet *outer, struct packet *quote)
{
	struct probe *probe;
	__u16 *compensation;

	if ((outer->version == 4 ? parse_iphdr(nh, quote) : parse_ipv6hdr(nh, quote)) < 0)
		return 0;
	if (parse_inner(nh, quote) < 0 || quote->fragment == LATER_FRAGMENT)
		return 0;
	forget_headers(scratch, start, nh, quote);
	probe = find_probe(nh, quote, &scratch->result, &scratch->partial);
	if (!probe || !probe->compensation)
		return probe;
	compensation = nh->pos + sizeof(struct udphdr);
	if ((void *)(compensation + 1) <= nh->end && *compensation && *compensation != probe->compensation)
		return 0; /* another packet, whose checksum was changed on the way; 0 may be padding (RFC 4884) */
	return probe;
}

/* Copy the ICMP extension behind the quoted packet (RFC 4884). Return its length, 0 if there is none. The ICMP
 * header tells the length of the quoted packet. Older routers leave that 0 and pad the quoted packet to 128 bytes.
 * Some routers pad it as well, but give a length that cannot be right: in another unit, or without the padding. */
static inline __u32 read_extension(const struct hdr_cursor *nh, const struct packet *outer,
				   const struct icmphdr *icmp, struct extended_result *result)
{
	__u32 quote_len = outer->version == 4 ? ((__u8 *)icmp)[5] * 4 : ((__u8 *)icmp)[4] * 8;
	__u32 *from, i, left, is_guess = 0;

	if (quote_len < QUOTE_LEN_MIN || sizeof(*icmp) + quote_len > outer->l4_len) {
		is_guess = 1;
		quote_len = QUOTE_LEN_MIN;
	}
	left = outer->l4_len - sizeof(*icmp) - quote_len;
	if (outer->l4_len < sizeof(*icmp) + quote_len + 2 * sizeof(*from))
		return 0;
	from = (void *)(icmp + 1) + quote_len;
	if ((void *)(from + 1) > nh->end || (is_guess && *(__u8 *)from >> 4 != EXTENSION_VERSION))
		return 0; /* no extension: all of this is the quoted packet */
#pragma clang loop unroll(disable)
	for (i = 0; i < EXTENSION_MAX / sizeof(*from); i++) {
		barrier_var(from); /* otherwise clang computes with data_end, which verifiers reject */
		if ((i + 1) * sizeof(*from) > left || (void *)(from + 1) > nh->end)
			break;
		((__u32 *)result->extension)[i] = *from++;
	}
	return i * sizeof(*from);
}

/* A probe reached the destination, which answered it. User space tells the user of the first one. */
static inline void receive_arrival(struct xdp_md *ctx, struct path *path, const struct in6_addr *dest, __u32 ttl)
{
	struct flow_event event = { .kind = PROBE_ARRIVED };

	note_reached(path, ttl);
	if (path->arrival_reported)
		return;
	path->arrival_reported = 1;
	event.flow.dest = *dest;
	if (submit_flow_event(ctx, &event))
		COUNT(events_lost);
}

static inline int is_still_in_flight(struct probe_key *key)
{
	return in_flight.delete(key) == 0;
}

/* Does a packet answer a probe, and is it passed or dropped then? */
enum answer { NO_ANSWER, PASSED_ANSWER, DROPPED_ANSWER };
#define ANSWER (INGRESS_DROP ? DROPPED_ANSWER : PASSED_ANSWER)

/* Would the sender's TCP take this reply for its own (see TCP_SEQ_BACK)? It may, if the probe has the packet's own
 * number, or if we cannot know what is outstanding: no window, so the flow's socket is not on this machine. */
static inline int harms_tcp(const struct probe_key *key, const struct probe *probe)
{
	return key->protocol == IPPROTO_TCP && (key->ident == probe->origseq || !probe->tcp.cwnd);
}

/* Let user space look at a time exceeded that quotes TCP, but no probe: see find_rewritten(). */
static inline void report_unmatched(struct xdp_md *ctx)
{
	struct scratch *scratch = scratch_of_run();
	int zero = 0;
	__u32 *left;

	left = unmatched_left.lookup(&zero);
	if (!scratch || scratch->result.extension_len != UNMATCHED || !left || !*left)
		return;
	(*left)--; /* without a lock: a few more do no harm */
	submit_result(ctx, &scratch->result, sizeof(scratch->result));
}

/* Handle an ICMP error, with the cursor at its header. */
static inline enum answer receive_error(struct xdp_md *ctx, struct hdr_cursor *nh, struct packet *outer,
					enum icmp_kind kind)
{
	__u64 now = bpf_ktime_get_ns(); /* first of all: this is the measurement */
	struct scratch *scratch = scratch_of_run();
	struct packet quote = {};
	struct icmphdr *icmp;
	struct result *result;
	struct probe *probe;
	struct path *path;
	__u32 extension_len;

	if (!scratch)
		return NO_ANSWER;
	forget_headers(scratch, (void *)(long)ctx->data, nh, outer);
	icmp = nh->pos;
	if ((void *)(icmp + 1) > nh->end)
		return NO_ANSWER;
	nh->pos = icmp + 1;
	result = &scratch->result.result;
	scratch->result.extension_len = 0;
	probe = match_quote(scratch, (void *)(long)ctx->data, nh, outer, &quote);
	result->reply.recvtime = now;
	result->reply.responder = outer->saddr;
	result->reply.recvcpu = bpf_get_smp_processor_id();
	result->reply.inipid = quote.ip_id;
	result->reply.recvttl = outer->ttl;
	result->reply.intos = quote.tos;
	result->reply.qttl = quote.ttl;
	result->reply.qlen = total_len(&quote);
	result->reply.rtos = outer->tos;
	result->reply.ripid = outer->ip_id;
	result->reply.rsize = total_len(outer);
	result->translated =
		outer->version == quote.version && !is_same(&quote.saddr, &outer->daddr) ? SOURCE_TRANSLATED : 0;
	if (!probe)
		return NO_ANSWER;
	path = path_to(&result->key.dest);
	if (kind != TIME_EXCEEDED) {
		/* With NOTRUNC, application packets have the key of a probe, but not its TTL. */
		if (!path || (quote.ttl > MAX_HOPS && !probe->payload_len) ||
		    !is_same(&outer->saddr, &result->key.dest))
			return NO_ANSWER;
		receive_arrival(ctx, path, &result->key.dest, probe->outttl);
		return ANSWER;
	}
	result->probe = *probe;
	if (!is_still_in_flight(&result->key))
		return NO_ANSWER; /* another CPU was faster, or user space has removed the probe as too old */
	if (result->probe.seq_offset)
		result->translated |= NUMBER_TRANSLATED;
	if (path)
		note_reply(path, &result->probe, &result->reply.responder, outer->ttl, now);
	if (outer->version == 4)
		elf_v4_afterrecv(ctx);
	else
		elf_v6_afterrecv(ctx);
	COUNT(replies);
	extension_len = read_extension(nh, outer, icmp, &scratch->result);
	scratch->result.extension_len = extension_len;
	if (extension_len ? submit_result(ctx, &scratch->result, sizeof(scratch->result))
			  : submit_result(ctx, result, sizeof(*result)))
		COUNT(results_lost);
	return harms_tcp(&result->key, &result->probe) ? DROPPED_ANSWER : ANSWER;
}

/* Handle an echo reply. If it answers a probe, the probe reached the destination. The reply to an
 * application packet with the same number has another length. */
static inline enum answer receive_echo_reply(struct xdp_md *ctx, const struct packet *pkt,
					     const struct icmphdr *icmp)
{
	struct probe_key key = {};
	struct probe *probe;
	struct path *path;

	key.dest = pkt->saddr;
	key.protocol = pkt->protocol;
	key.sport = icmp->id;
	key.ident = bpf_ntohs(icmp->sequence);
	probe = in_flight.lookup(&key);
	if (!probe || !probe->payload_len || pkt->l4_len != sizeof(*icmp) + probe->payload_len)
		return NO_ANSWER;
	path = path_to(&key.dest);
	if (path)
		receive_arrival(ctx, path, &key.dest, probe->outttl);
	return ANSWER;
}

/* Note that a packet was received, if its flow has no TCP socket here. Its layer 4 begins at l4. */
static inline void note_flow(const struct packet *pkt, const void *l4, const void *end)
{
	const struct tcphdr *tcp = l4;
	struct flow_key key = {};
	struct flow *flow;

	if (pkt->fragment == LATER_FRAGMENT || set_flow_key(&key, pkt, l4, end, 1) < 0)
		return;
	flow = flows.lookup(&key);
	if (!flow)
		return;
	flow_received(&flow->received, &flow->progress, bpf_ktime_get_ns());
	if (pkt->protocol != IPPROTO_TCP || (void *)(tcp + 1) > end)
		return;
	flow->acked = bpf_ntohl(tcp->ack_seq);
	if (pkt->l4_len > (tcp->data_offset >> 4) * 4)
		flow->repeats++;
}

/* Does the packet begin or reset a TCP connection? Somebody on the way may have sent it in the destination's name: a SYN
 * proxy, a load balancer, a firewall. Its TTL does not tell the distance. The cursor is behind the IP header. */
static inline int is_for_connection(const struct hdr_cursor *nh, const struct packet *pkt)
{
	struct tcphdr *tcp = nh->pos;

	return pkt->protocol == IPPROTO_TCP && (void *)(tcp + 1) <= nh->end && tcp->flags & (TCP_SYN | TCP_RST);
}

/* Is the packet a TCP segment without data? The cursor is behind the IP header. */
static inline int is_bare(const struct hdr_cursor *nh, const struct packet *pkt)
{
	struct tcphdr *tcp = nh->pos;

	return pkt->protocol == IPPROTO_TCP && !pkt->fragment && (void *)(tcp + 1) <= nh->end &&
	       pkt->l4_len <= (tcp->data_offset >> 4) * 4;
}

/* Runs for every packet that arrives. It drops a reply to a probe if INGRESS_DROP is set, or if the reply would harm
 * the sender's TCP (harms_tcp()). All other packets pass. */
int elf_ingress(struct xdp_md *ctx)
{
	struct hdr_cursor nh = { (void *)(long)ctx->data, (void *)(long)ctx->data_end };
	enum icmp_kind kind = OTHER_ICMP;
	enum answer answer = NO_ANSWER;
	struct packet pkt = {};
	struct scratch *scratch;
	struct icmphdr *icmp;
	struct path *path;
	__u64 ticks;

	if (FRAME == FRAME_TUNNEL)
		skip_outer(&nh);
	if (parse_frame(&nh, &pkt) < 0) {
		pull_and_rerun(ctx, HEADERS_LEN);
		return VERDICT_PASS;
	}
	icmp = nh.pos;
	if (is_icmp(&pkt) && !pkt.fragment) {
		if (pull_and_rerun(ctx, ICMP_ERROR_LEN))
			return VERDICT_PASS;
		if ((void *)(icmp + 1) <= nh.end)
			kind = icmp_kind(&pkt, icmp);
	}
	if (kind == TIME_EXCEEDED || kind == DEST_UNREACHABLE)
		answer = receive_error(ctx, &nh, &pkt, kind);
	else if (kind == ECHO_REPLY)
		answer = receive_echo_reply(ctx, &pkt, icmp);
	if (answer != NO_ANSWER)
		return answer == DROPPED_ANSWER ? VERDICT_DROP : VERDICT_PASS;
	if (kind == TIME_EXCEEDED) {
		COUNT(not_ours);
		report_unmatched(ctx);
		return VERDICT_PASS;
	}
	path = path_to(&pkt.saddr);
	if (!path)
		return VERDICT_PASS;
	scratch = scratch_of_run();
	if (!scratch)
		return VERDICT_PASS;
	nh.pos = icmp; /* an error may have moved it behind the quoted header */
	forget_headers(scratch, (void *)(long)ctx->data, &nh, &pkt);
	if (is_for_connection(&nh, &pkt))
		return VERDICT_PASS;
	ticks = ticks_now();
	if (looks_at_flow(path, pkt.protocol, ticks))
		note_flow(&pkt, nh.pos, nh.end);
	note_packet(path, pkt.ttl, !is_bare(&nh, &pkt), ticks);
	return VERDICT_PASS;
}
