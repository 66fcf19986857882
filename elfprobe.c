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
 *               elf_exec, elf_fork, elf_exit and user space keep the set of target processes up to date
 *
 *   device --> XDP or TC ingress: elf_ingress -- time exceeded, quotes a probe in flight --> results --> user space
 *                      |-- packet of a destination ----> teaches the path model the distance
 *                      '-- passes on unchanged (with INGRESS_DROP, replies to probes are dropped)
 *
 * elf_egress only reads. If a program writes to packets directly, the kernel adds a prologue that un-clones every
 * packet before the first instruction (bpf_unclone_prologue() in net/core/filter.c). In elf_probe only probes pay for
 * that. In elf_egress the application would. This is why there are two programs.
 *
 * Addresses are IPv6; IPv4 addresses are v4-mapped (RFC 4291, 2.5.5.2), so that both families take the same code. A
 * __be* variable holds network byte order, all others host order. elfprobe.py compiles this file with BCC, replaces
 * the #include by elfhooks.c or the user's hooks, and takes the layout of each struct in a map from BCC.
 *
 * Glossary:
 *   probe         a clone of an application packet that is sent with a lowered TTL, to expire at a router
 *   carrier       the application packet from which a probe is cloned; it leaves unchanged
 *   target        a process or a destination that the user wants to be probed
 *   hop           a TTL value, from 1, and the router at which a probe with that TTL expires
 *   responder     source of the ICMP error that answers a probe
 *   quoted packet the start of the probe, as an ICMP error contains it
 *   in flight     sent, recorded, and not answered yet; whoever removes a probe from the map in_flight owns it
 *   reservation   the right to send one probe, with its sequence number and TTL; it ends as committed or cancelled
 *   back-off      time without probes to a hop that does not respond; it grows with each unanswered probe
 *   scratch       memory of one program run outside its 512 bytes of stack
 *   lease         permission to send probes until a time (alive_until); user space renews it while it runs
 */

/* ---- Build parameters: the driver's -D flags ---------------------------------------------- */

#define FRAME_ETHERNET 0
#define FRAME_IP 1
#define FRAME_TUNNEL 2
#ifndef FRAME
#error "FRAME: packets on the device begin with 0: Ethernet's header, 1: IP's, 2: IP's, a tunnel's may be in front"
#endif
#ifndef TUNNEL
#error "TUNNEL: 0, or 4 or 41: the flows are inside IPv4 packets of this protocol"
#endif
#ifndef NOTRUNC
#error "NOTRUNC: 0 trims probes to their headers, 1 keeps the payload"
#endif
#ifndef RATE_GLOBAL
#error "RATE_GLOBAL: 0 spaces the probes to each hop by INTERVAL_NS, 1 all probes to a destination"
#endif
#ifndef INTERVAL_NS
#error "INTERVAL_NS: least time between two probes, ns; 0 makes every packet carry one"
#endif
#ifndef MAX_RATE
#error "MAX_RATE: most probes per second over all destinations, 1 or more"
#endif
#ifndef SALT
#error "SALT: 16 bits by which the numbers in probes differ from those that can be counted along"
#endif
#ifndef INGRESS_DROP
#error "INGRESS_DROP: 1 drops time exceeded that answers a probe, 0 passes it to the stack"
#endif
#ifndef INGRESS_TC
#error "INGRESS_TC: 1 compiles elf_ingress for TC ingress, 0 for XDP"
#endif
#ifndef TCX
#error "TCX: 1 where TC programs are attached by tcx links (since Linux 6.6), 0 for filters of a clsact qdisc"
#endif
#ifndef SKB_HEAD
#error "SKB_HEAD, SKB_END: offsets of head and end in struct sk_buff; 0 where the kernel does not tell them"
#endif
#ifndef ZEROCOPY_FLAGS
#error "ZEROCOPY_FLAGS, ZEROCOPY_FLAG: offset of the byte in struct skb_shared_info that marks user memory; its bit"
#endif
#ifndef DESTINATIONS_MAX
#error "DESTINATIONS_MAX: most destinations of interest at once"
#endif
#ifndef BY_OWNER
#error "BY_OWNER: 1 probes what the sockets of processes of interest send, 0 only destinations"
#endif
#ifndef BY_APP
#error "BY_APP: 1 where processes are of interest by name, so that each new one is looked at"
#endif
#ifndef FLOW_DESTINATIONS_MAX
#error "FLOW_DESTINATIONS_MAX: most destinations of processes' flows at once; the least recently used make room"
#endif
#ifndef IN_FLIGHT_MAX
#error "IN_FLIGHT_MAX: most probes waiting for their reply at once"
#endif
#ifndef TICK_NS
#error "TICK_NS: between two ticks, ns; 0 where programs cannot count them (before Linux 5.6)"
#endif
#ifndef OLD_MAPS
#error "OLD_MAPS: 1 where there are no ring buffers and no socket storage (before Linux 5.8, BCC 0.13); not with BY_OWNER"
#endif
#ifndef PREEMPTIBLE
#error "PREEMPTIBLE: 1 where a run of a program may be interrupted by another on its CPU (PREEMPT_RT)"
#endif
#ifndef RESULTS_PAGES
#error "RESULTS_PAGES: size of the result ring, pages, a power of two"
#endif
#ifndef WAKE_EVERY
#error "WAKE_EVERY: so many results of a CPU wake the driver, however soon they come"
#endif

/* ---- Limits ------------------------------------------------------------------------------- */

#define NSEC_PER_MSEC 1000000ULL
#define NSEC_PER_SEC 1000000000ULL

/* Hops are numbered as their TTL is, from 1. A packet whose own TTL is no higher than this is
 * somebody's traceroute: it is not probed, and so its replies are never taken for a probe's. */
#define MAX_HOPS 32

/* How far below the packet's own TCP sequence number a probe's may be. Both numbers grow, so that
 * those of a flow's probes differ whether it sends bytes one by one or none at all. Firewalls accept numbers
 * that are older by up to the receiver's window; this is below the smallest windows in use. */
#define TCP_SEQ_BACK 2048

/* A silent hop rests before each probe that asks whether it still is: ever longer, up to this. */
#define BACKOFF_ROUTER_MAX (10 * NSEC_PER_SEC)  /* it is a router for certain */
#define BACKOFF_BEYOND_MAX (256 * NSEC_PER_SEC) /* it may be the destination */
#define BACKOFF_ANSWERED (200 * NSEC_PER_MSEC)  /* the first rest of one that may be, but has answered before */
#define BACKOFF_NEVER_ANSWERED NSEC_PER_SEC            /* and of one that has not */
#define BACKOFF_SHIFT 3                         /* each rest is 2^3 times the one before, */
#define FALSE_ALARMS_PER_LEVEL 4                      /* but one more as long as the first for so many false alarms */
#define FALSE_ALARMS_MAX 12
/* Probes without an answer, in a row, before a router counts as silent. */
#define GRACE_ROUTER 8
/* Hops whose silence began within this time of each other fell silent together. */
#define TOGETHER NSEC_PER_SEC
#define TOGETHER_TICKS (TOGETHER / (TICK_NS + !TICK_NS))

/* While the destination has not been heard: how long a hop is waited for before the next is tried;
 * four times as long for each one before it that was silent. */
#define STEP_WAIT (500 * NSEC_PER_MSEC)
#define STEP_SHIFT_MAX 8
/* Packets in a row that must say so before a path is believed to have become longer. */
#define LONGER_AFTER 16
/* One probe in so many is sent one hop farther than the path is thought to be long. */
#define EXPLORE_EVERY 20000
/* Replies of the last router that say that it may be longer have one sent at most once in this time. */
#define EXPLORE_AGAIN (10 * NSEC_PER_SEC)

/* A TCP flow of which nothing is acknowledged for so long is in trouble, perhaps by our doing. */
#define STALL (3 * NSEC_PER_SEC)
/* As often as it may stall under probes before its destination is left alone for good. */
#define STALLS_MAX 2

/* Slack of the overall budget: a burst of as many probes as fit into it may go at once. The rate is
 * set so much lower, and by what may pass between claim and departure, that no second ever holds
 * more than MAX_RATE. */
#define BUDGET_BURST (NSEC_PER_SEC / 100)
#define BUDGET_COST ((NSEC_PER_SEC + BUDGET_BURST + NSEC_PER_MSEC) / MAX_RATE + 1)

#define EXTENSION_MAX 252 /* bytes that are kept of what a router tells besides (RFC 4884) */
#define EXTENSION_VERSION 2
#define QUOTE_PADDED 128  /* least length of a quote with something behind (RFC 4884) */
#define CHECKSUM_STEP 40507 /* between the checksums of UDP probes in a row, modulo 65535, to which it is prime:
			  * lest one that is off by some constant, as behind a NAT, be that of another probe */
#define UDP_HEAD 32      /* payload bytes that tell UDP packets with unfinished checksums apart */
#define UDP_SUM_MAX 9216 /* longest UDP payload that is summed up here: jumbo frames */
#define SUM_CHUNK 512    /* most that bpf_csum_diff() takes at once */

/* ---- Headers (no kernel header is needed to compile this) --------------------------------- */

/* BCC's own swap the bytes wherever they run. */
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
#define bpf_htons(host) ((__be16)(host))
#define bpf_ntohs(wire) ((__u16)(wire))
#define bpf_htonl(host) ((__be32)(host))
#define bpf_ntohl(wire) ((__u32)(wire))
#endif

#define ETH_P_IP 0x0800
#define ETH_P_IPV6 0x86dd
#define ETH_P_8021Q 0x8100
#define ETH_P_8021AD 0x88a8
#define VLAN_TAGS_MAX 2
#define IPPROTO_ICMP 1
#define IPPROTO_IPIP 4
#define IPPROTO_TCP 6
#define IPPROTO_UDP 17
#define IPPROTO_HOPOPTS 0 /* and other extension headers of IPv6 (RFC 8200) */
#define IPPROTO_IPV6 41
#define IPPROTO_ROUTING 43
#define IPPROTO_FRAGMENT 44
#define IPPROTO_GRE 47
#define IPPROTO_DSTOPTS 60
#define IP6_EXTENSIONS_MAX 4
#define IP6_EXTENSIONS_MASK 1023 /* and most bytes of them, a power of two less 1 */
#define IPPROTO_ICMPV6 58
#define IP_MF 0x2000
#define IP_OFFSET 0x1fff
#define IP6_MF 0x0001
#define IP6_OFFSET 0xfff8
#define GRE_CHECKSUM 0x8000 /* each of these adds 4 bytes (RFC 2784, RFC 2890) */
#define GRE_KEY 0x2000
#define GRE_SEQUENCE 0x1000
#define GRE_FLAGS (GRE_CHECKSUM | GRE_KEY | GRE_SEQUENCE)
#define ICMP_ECHO_REPLY 0
#define ICMP_DEST_UNREACH 3
#define ICMP_ECHO 8
#define ICMP_TIME_EXCEEDED 11
#define ICMPV6_DEST_UNREACH 1
#define ICMPV6_TIME_EXCEEDED 3
#define ICMPV6_ECHO 128
#define ICMPV6_ECHO_REPLY 129
#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

#define TC_ACT_UNSPEC (-1)
#define TC_ACT_SHOT 2
#define TC_ACT_STOLEN 4
/* Ends a packet that is ours to end. clsact counts TC_ACT_SHOT as a drop, but not TC_ACT_STOLEN. tcx knows only
 * TC_ACT_SHOT: it takes other verdicts for TC_ACT_UNSPEC (tcx_action_code() in include/net/tcx.h). */
#define TC_ACT_CONSUMED (TCX ? TC_ACT_SHOT : TC_ACT_STOLEN)
#define EEXIST 17
#define NET_XMIT_CN 2
#define SOCK_STREAM 1

/* elf_ingress runs at XDP or at TC ingress. Both contexts have data and data_end, which is all that it and the
 * hooks need, so that the same text is compiled for either. */
#if INGRESS_TC
#define xdp_md __sk_buff
#define VERDICT_PASS TC_ACT_UNSPEC
#define VERDICT_DROP TC_ACT_CONSUMED
#else
#define VERDICT_PASS XDP_PASS
#define VERDICT_DROP XDP_DROP
#endif

struct ethhdr {
	__u8 h_dest[6], h_source[6];
	__be16 h_proto;
};

struct vlanhdr {
	__be16 h_tci, h_proto;
};

struct iphdr {
	__u8 version_ihl, tos;
	__be16 tot_len, id, frag_off;
	__u8 ttl, protocol;
	__u16 check;
	__be32 saddr, daddr;
};

struct address {
	__be32 word[4];
};

struct ip6hdr {
	__be32 version_class_label;
	__be16 payload_len;
	__u8 nexthdr, hop_limit;
	struct address saddr, daddr;
};

/* Those that are understood begin like this, the fragment header with its offset behind nexthdr. */
struct ip6ext {
	__u8 nexthdr, len, type, segments_left;
};

struct grehdr {
	__be16 flags; /* and version, 0 */
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
	__be16 id, sequence;
};

/* ---- Types shared with the driver --------------------------------------------------------- */

/* What the quote in a time exceeded says of the probe: only fields that are quoted by every
 * router (RFC 792: IP header and 8 bytes) and that nobody on the way changes. */
struct probe_key {
	struct address dest;
	__be16 sport, dport; /* ICMP: echo identifier, 0 */
	__u32 ident;         /* TCP: sequence number. ICMP: echo sequence. UDP: length << 16 | checksum */
	__u32 protocol;
};

struct app_name {
	char text[16]; /* TASK_COMM_LEN: at most 15 characters and a zero, then zeros */
};

/* What the kernel knows of the TCP connection behind a socket; all 0 where there is none. */
struct tcp_state {
	__u32 srtt;    /* smoothed round-trip time, us; 0: not known yet */
	__u32 cwnd;    /* congestion window, segments */
	__u32 retrans; /* segments retransmitted so far */
};

struct probe {
	__u64 sendtime; /* CLOCK_MONOTONIC, ns, as are all times here */
	__u32 seq;
	__u32 origseq;
	__u32 pid; /* of the socket's owner; 0: not known */
	__u16 outipid;
	__u8 outttl;
	__u8 payload_len; /* bytes behind the headers, where that is not the packet's payload */
	struct app_name app;
	__u16 compensation; /* of trimmed UDP, what makes its checksum right, as it is on the wire */
	__u8 outtos;   /* DSCP and ECN */
	__u8 unused;
	struct tcp_state tcp; /* of the socket that sent the packet */
};

struct reply {
	__u64 recvtime;
	struct address responder;
	__u32 recvcpu;
	__u16 inipid;
	__u8 recvttl;
	__u8 intos; /* as quoted */
};

struct result {
	struct probe probe;
	struct reply reply;
	struct probe_key key;
	__u32 translated; /* the quote's source is not whom the reply is addressed to */
};

/* With what a router told behind its quote (RFC 4884), which the driver reads: from the extension's
 * header on, as far as it is there and fits. */
struct extended_result {
	struct result result;
	__u32 extension_len;
	__u8 extension[EXTENSION_MAX];
};

struct hop {
	__u64 due;        /* not to be probed before */
	__u64 since;      /* when the first of the unanswered probes left, or the last reply came */
	__u32 rtt;        /* latency of the last reply, us; 0: never answered */
	__u8 unanswered;  /* probes sent since the last reply */
	__u8 false_alarms;      /* how often it answered after its first rests, as where packets are lost */
	__u8 backoff_level;       /* taken since the last reply */
	__u8 backoff;     /* bits: */
};

/* The last rest is not over, or the probe behind it has yet to be sent; a rest has ended early since the
 * last reply, which comes only once. */
enum { BACKING_OFF = 1, RETRIED_EARLY = 2 };

/* A destination of interest and what is known of the way there. Written under schedule.lock. */
struct path {
	__u64 next_due;   /* no probe before */
	__u64 next_due_tick;      /* nor before this tick: the one field that packets between probes read */
	__u64 last_sent;  /* when the last probe left */
	__u64 farthest_reply;  /* when the farthest hop that answers did so last */
	__u64 last_received;      /* the tick at which a packet of the destination came last */
	__u64 outage_start;     /* since when nothing came any more that now does, */
	__u64 outage_end;   /* and when it came again */
	__u64 routers_proven;     /* when a hop answered that was not the next behind those that had */
	__u64 shortened_at;  /* when the way was found to be shorter: replies to older probes are of the old one */
	__u32 seq;        /* of the next probe */
	__u8 length;      /* TTL that reaches the destination; 0: not known yet */
	__u8 reverse_distance;     /* what the TTL of its packets says that to be */
	__u8 max_ttl_tried;     /* farthest hop to probe while length is not known */
	__u8 last_responsive;  /* farthest hop that answers; 0: none */
	__u8 last_probed;   /* hop probed last */
	__u8 longer_packets;      /* packets in a row that say that the way has become longer */
	__u8 explore;     /* probe one hop beyond, once */
	__u8 excluded;  /* no more probes: flows there stalled under them, or clones left as they were */
	__u8 flows_only;    /* of interest only for the flows of processes of interest */
	__u8 is_confirmed;     /* how far the destination is, by a probe that reached it */
	__u64 reply_distances;  /* bits: of the last router, by the TTLs of its replies, since length is what it is */
	__u64 last_explored;     /* when such a reply last had one hop beyond probed; 0: never */
	struct hop hops[MAX_HOPS + 1];
};

/* Where an address that is in paths or in peers has its mark, so that for most others one look into
 * an array says that they are in neither. Marks stay when addresses go, and are shared: they say
 * where to look, not what is there. */
#define FILTER_LINES 16384
#define FILTER_LINE_SIZE 64
enum { IN_PATHS = 1, IN_FLOW_PATHS = 2 };

struct filter_line {
	__u8 slots[FILTER_LINE_SIZE];
};

/* Is a process of interest? Most have no entry: no. The other answers: */
enum { UNDECIDED = 1, TARGET = 2 }; /* the driver has yet to look at it; yes */

struct process {
	__u64 id; /* tells it from others that had or will have its PID */
	__u32 status;
	__u32 unused;
	struct app_name app;
};

/* Noted with a socket, and with what is accepted from it: the process that made it. */
struct owner {
	__u64 process; /* its id */
	__u32 status;
	__u32 pid;
	struct app_name app;
};

/* What the driver hears of a process that it may have to look at. */
struct process_event {
	__u64 id;
	__u32 pid;
	__u32 status; /* 0: its first thread has ended */
};

/* The beginning of a struct task_struct, in which the driver looks for the PID that it knows. */
struct task_sample {
	__u32 parent; /* 0: nobody's */
	__u8 task[8192];
};

/* How a TCP flow gets on that carried probes. */
struct tcp_progress {
	__u64 since;  /* when it was seen to have moved last; 0: it had nothing outstanding when it was last seen */
	__u32 acked;  /* its first sequence number that was not acknowledged then */
	__u16 stalled;
	__u16 stalls; /* how often it came to that */
};

/* What the driver tells the user of a flow, or of a destination, which is all that is known of CLONE_TAKEN. */
enum { FLOW_STALLED = 1, FLOW_RESUMED = 2, DESTINATION_EXCLUDED = 3, CLONE_INTERCEPTED = 4 };

struct flow_event {
	struct probe_key flow;
	__u32 kind;
};

/* Every way in which a packet or a probe can end has a counter. */
struct counters {
	__u64 probes;          /* left, in flight from then on */
	__u64 replies;         /* time exceeded that answered one of them */
	__u64 results_lost;    /* replies for which the result ring had no room */
	__u64 send_failed;     /* dropped behind us: by a filter, the queue, the device */
	__u64 clone_lost;      /* the clone never came to us: no memory, or a filter before us had another end for it */
	__u64 build_failed;    /* the clone could not be trimmed or parsed */
	__u64 hook_dropped;    /* by the hook's verdict */
	__u64 key_busy;        /* one in flight could not have been told from it */
	__u64 in_flight_full;  /* no room to wait for the reply, or none to be had just then */
	__u64 over_max_rate;   /* due, but over the budget */
	__u64 carrier_low_ttl; /* due, but the packet is somebody's traceroute */
	__u64 carrier_unfit;   /* due, but the packet may not carry one: SYN, FIN, RST, fragment, other protocol */
	__u64 carrier_resent;  /* due, but the packet is a retransmission or a keep-alive */
	__u64 carrier_zerocopy; /* due, but the packet holds memory of the application (MSG_ZEROCOPY) */
	__u64 hop_unresponsive;      /* due, but just then the hop whose turn it was is found silent, and rests */
	__u64 flow_stalled;    /* due, but nothing of the flow is acknowledged any more */
	__u64 lease_expired;   /* due, but the driver has not been heard for too long */
	__u64 processes_full;  /* a process of interest for which there was no room */
	__u64 events_lost;     /* of processes and flows, for which their ring had no room */
	__u64 not_ours;        /* time exceeded that answers nothing in flight */
	__u64 reached;         /* probes that the destination itself answered */
};

/* ---- Maps --------------------------------------------------------------------------------- */

struct schedule {
	struct bpf_spin_lock lock; /* every claim, over all destinations and CPUs */
	__u64 budget;              /* theoretical arrival time of the next probe (GCRA) */
};

/* What the next packet on this CPU, or with PREEMPTIBLE from this task, is: a clone to make a probe of; the probe. */
enum { CLONE = 1, PROBE = 2 };

/* Carries a claim into the run of the clone, and what came of it back. */
struct reservation {
	__u32 expected; /* one of these; 0: just a packet */
	__u32 recorded; /* it is in flight, under key */
	__u32 resent;   /* the probe was sent anew in place of the clone, with this result: */
	__s32 result;
	__u32 seq;
	__u32 ttl;
	__u64 time;     /* of the claim */
	__u64 due;      /* of the hop, as the claim set it */
	__u64 sendtime;
	struct probe_key key;
	__u32 pid;
	struct app_name app;
	struct tcp_state tcp;
};

/* Tells an unfinished UDP checksum, as quoted behind a device that never finishes it, from others. */
struct udp_partial {
	struct probe_key key; /* ident: length << 16 | unfinished checksum */
	__u8 head[UDP_HEAD];
};

/* How far the cursor is into the extension headers of IPv6. */
struct ip6ext_walk {
	__u32 len;
};

struct sum_buffer {
	__u8 bytes[SUM_CHUNK + 4];
};

/* BCC's macro for a hash that takes memory only for what is in it. */
BPF_F_TABLE("hash", struct address, struct path, paths, DESTINATIONS_MAX, BPF_F_NO_PREALLOC);
BPF_TABLE("lru_hash", struct address, struct path, flow_paths, FLOW_DESTINATIONS_MAX);
BPF_ARRAY(new_path, struct path, 1); /* what a new peer starts from: of_flows, and no more */
BPF_ARRAY(address_filter, struct filter_line, FILTER_LINES);
BPF_HASH(in_flight, struct probe_key, struct probe, IN_FLIGHT_MAX);
BPF_TABLE("lru_hash", struct udp_partial, __u32, partial_checksums, IN_FLIGHT_MAX);
BPF_ARRAY(schedules, struct schedule, 1);
BPF_ARRAY(alive_until, __u64, 1); /* the driver's heartbeat: no probe after this time */
BPF_ARRAY(link_up_since, __u64, 1); /* when the device got its carrier; in the future while it has none */
BPF_PERCPU_ARRAY(reservations, struct reservation, 1);
BPF_PERCPU_ARRAY(counters, struct counters, 1);
BPF_PERCPU_ARRAY(ip6ext_walks, struct ip6ext_walk, 1);
BPF_PERCPU_ARRAY(sum_buffers, struct sum_buffer, 1);
BPF_PERCPU_ARRAY(extended_results, struct extended_result, 1);
BPF_PROG_ARRAY(programs, 2); /* 0: elf_probe; with INGRESS_TC 1: elf_ingress */

#if PREEMPTIBLE
/* The entry of a task that stopped in the midst of its run goes to another where so many others send meanwhile. */
#define TASKS_MAX 8192
BPF_PERCPU_ARRAY(tasks_expecting, __u32, 1); /* how many expect a packet, mostly none */
BPF_TABLE("lru_hash", __u64, struct reservation, task_reservations, TASKS_MAX);
BPF_TABLE("lru_hash", __u64, struct ip6ext_walk, task_ip6ext_walks, TASKS_MAX);
BPF_TABLE("lru_hash", __u64, struct sum_buffer, task_sum_buffers, TASKS_MAX);
BPF_TABLE("lru_hash", __u64, struct extended_result, task_extended_results, TASKS_MAX);
#endif

/* Never written: they tell the driver how what it gets from no map looks. */
BPF_ARRAY(result_layout, struct extended_result, 1);
BPF_ARRAY(flow_event_layout, struct flow_event, 1);

#if OLD_MAPS
BPF_PERF_OUTPUT(results);
BPF_PERF_OUTPUT(flow_events);
BPF_TABLE("lru_hash", __u64, struct tcp_progress, tcp_progress, 16384); /* by socket cookie */
#else
BPF_RINGBUF_OUTPUT(results, RESULTS_PAGES);
BPF_RINGBUF_OUTPUT(flow_events, 16);
BPF_SK_STORAGE(tcp_progress, struct tcp_progress);
#endif

#if BY_OWNER
BPF_ARRAY(process_event_layout, struct process_event, 1);
BPF_ARRAY(owner_layout, struct owner, 1);
BPF_HASH(processes, __u32, struct process, 65536); /* by PID */
BPF_HASH(apps, struct app_name, __u32, 1024);      /* lower-case names of interest -> 1: that is it;
						    * 0: its first 15 characters, or may be */
BPF_ARRAY(task_sample, struct task_sample, 1); /* of the last child of one process, if one is asked for */
BPF_ARRAY(task_pid_offset, __u32, 1); /* of pid in struct task_struct, tgid behind it; the driver finds out */
BPF_RINGBUF_OUTPUT(process_events, 64);

/* BCC's macro for socket storage has no place for the flag that hands it on to accepted sockets. */
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
#endif

#define READ_ONCE(x) (*(volatile typeof(x) *)&(x))

#define COUNT(field)                                                                                 \
	do {                                                                                         \
		struct counters *counters_ = this_cpu_counters();                                    \
		if (counters_ && PREEMPTIBLE)                                                        \
			__sync_fetch_and_add(&counters_->field, 1);                                  \
		else if (counters_)                                                                  \
			counters_->field++;                                                          \
	} while (0)

static inline struct counters *this_cpu_counters(void)
{
	int zero = 0;

	return counters.lookup(&zero);
}

/* What a run needs beside the stack is the CPU's. Where another run may interrupt it there, and use that, too,
 * it is the task's, made of the CPU's, which is never written then. Both runs of a probe are one task's. */
static inline struct reservation *own_reservation(struct reservation *reservation)
{
#if PREEMPTIBLE
	__u64 task = bpf_get_current_task();

	return reservation ? task_reservations.lookup_or_try_init(&task, reservation) : 0;
#else
	return reservation;
#endif
}

static inline struct ip6ext_walk *own_walk(struct ip6ext_walk *walk)
{
#if PREEMPTIBLE
	__u64 task = bpf_get_current_task();

	return walk ? task_ip6ext_walks.lookup_or_try_init(&task, walk) : 0;
#else
	return walk;
#endif
}

static inline struct sum_buffer *own_buffer(struct sum_buffer *buffer)
{
#if PREEMPTIBLE
	__u64 task = bpf_get_current_task();

	return buffer ? task_sum_buffers.lookup_or_try_init(&task, buffer) : 0;
#else
	return buffer;
#endif
}

static inline struct extended_result *own_extended(struct extended_result *extended)
{
#if PREEMPTIBLE
	__u64 task = bpf_get_current_task();

	return extended ? task_extended_results.lookup_or_try_init(&task, extended) : 0;
#else
	return extended;
#endif
}

/* The claim whose clone or probe comes next on this CPU, or from this task; 0: none does. */
static inline struct reservation *reservation_of_next(struct reservation *reservation)
{
#if PREEMPTIBLE
	int zero = 0;
	__u32 *any;

	any = tasks_expecting.lookup(&zero);
	reservation = any && *any ? own_reservation(reservation) : 0;
#endif
	return reservation && reservation->expected ? reservation : 0;
}

static inline void expect(struct reservation *reservation, __u32 what)
{
#if PREEMPTIBLE
	int zero = 0;
	__u32 *tasks;

	tasks = tasks_expecting.lookup(&zero);
	if (tasks)
		__sync_fetch_and_add(tasks, (__u32)!!what - !!reservation->expected);
#endif
	reservation->expected = what;
}

/* Hands a result of this size to the driver, which looks for them now and then, and is woken when so much
 * has come that this may be too late. Negative where there was no room. */
static inline int submit_result(struct xdp_md *ctx, void *result, __u64 size)
{
#if OLD_MAPS
	return results.perf_submit(ctx, result, size);
#else
	struct counters *count = this_cpu_counters();
	__u64 wakeup = count && count->replies % WAKE_EVERY == 0 ? BPF_RB_FORCE_WAKEUP : BPF_RB_NO_WAKEUP;

	return results.ringbuf_output(result, size, wakeup);
#endif
}

static inline int submit_flow_event(struct __sk_buff *ctx, struct flow_event *event)
{
#if OLD_MAPS
	return flow_events.perf_submit(ctx, event, sizeof(*event));
#else
	return flow_events.ringbuf_output(event, sizeof(*event), 0);
#endif
}

/* How the TCP flow of the packet gets on, as kept with its socket; 0: there is no room for that. */
static inline struct tcp_progress *progress_of(struct __sk_buff *skb, struct bpf_sock *sk)
{
#if OLD_MAPS
	__u64 cookie = bpf_get_socket_cookie(skb);
	struct tcp_progress *progress, none = {};

	progress = tcp_progress.lookup(&cookie);
	if (progress)
		return progress;
	tcp_progress.update(&cookie, &none);
	return tcp_progress.lookup(&cookie);
#else
	return tcp_progress.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
#endif
}

/* Bytes of payload in the first segment that is made of the packet. */
static inline __u32 segment_len(const struct __sk_buff *skb, __u32 payload)
{
#if OLD_MAPS
	__u32 segments = skb->gso_segs; /* gso_size came with Linux 5.7 */

	return segments > 1 ? (payload + segments - 1) / segments : payload;
#else
	return skb->gso_size && skb->gso_size < payload ? skb->gso_size : payload;
#endif
}

/* ---- Internet checksums (RFC 1071) -------------------------------------------------------- */

/* 16-bit one's complement sum; never 0 for a sum that is not 0, as the kernel's own. */
static inline __u16 csum_fold(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return sum;
}

/* check after a 16-bit field that it covers went from one value to another (RFC 1624). */
static inline __u16 csum_replace(__u16 check, __u16 from, __u16 to)
{
	return ~csum_fold((__u64)(__u16)~check + (__u16)~from + to);
}

static inline int is_same(const struct address *a, const struct address *b)
{
	return a->word[0] == b->word[0] && a->word[1] == b->word[1] && a->word[2] == b->word[2] &&
	       a->word[3] == b->word[3];
}

static inline __u64 csum_address(const struct address *a)
{
	return (__u64)a->word[0] + a->word[1] + a->word[2] + a->word[3];
}

/* ---- Parsing: TC, XDP and the packet that a router quotes --------------------------------- */

struct hdr_cursor {
	void *pos;
	void *end;
};

enum { FIRST_FRAGMENT = 1, LATER_FRAGMENT = 2 };

/* Both parsers refuse what goes to many: nobody answers for it (RFC 1122, 3.2.2; RFC 4443, 2.4). */
#define IPV4_MULTICAST 0xe0000000 /* multicast, and beyond it broadcast */
#define IPV6_MULTICAST 0xff

struct packet {
	void *ip; /* struct iphdr or ip6hdr, by version */
	__u32 version;
	__u32 ip_off; /* bytes in front of the IP header */
	__u32 ip_len; /* bytes of the IP header, IPv6's with its extension headers */
	__u32 l4_len; /* bytes behind it, as it says */
	__u32 protocol;
	__u32 fragment; /* 0: it is whole */
	__u32 encapsulated;  /* it is inside another IPv4 packet */
	__u32 outer_off; /* bytes in front of that one's header */
	__u32 ttl;
	__u8 tos;
	__u16 ip_id; /* IPv6: low 16 bits of the flow label */
	struct address saddr, daddr;
};

static inline void map_v4(struct address *a, __be32 v4)
{
	a->word[0] = 0;
	a->word[1] = 0;
	a->word[2] = bpf_htonl(0xffff);
	a->word[3] = v4;
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

static inline int is_ip6ext(__u32 protocol)
{
	return protocol < 64 && (1ULL << protocol & (1ULL << IPPROTO_HOPOPTS | 1ULL << IPPROTO_ROUTING |
						     1ULL << IPPROTO_FRAGMENT | 1ULL << IPPROTO_DSTOPTS));
}

/* Moves the cursor behind the extension headers. -1 also where a routing header says that the packet is
 * on its way to somewhere else first. */
static inline int parse_ip6ext(struct hdr_cursor *nh, struct packet *pkt)
{
	struct ip6ext_walk *walk;
	struct ip6ext *ext;
	int zero = 0;
	__u32 i, len;
	__be16 frag;

	walk = own_walk(ip6ext_walks.lookup(&zero));
	if (!walk)
		return -1;
	walk->len = 0;
#pragma clang loop unroll(disable)
	for (i = 0; i < IP6_EXTENSIONS_MAX && is_ip6ext(pkt->protocol); i++) {
		len = READ_ONCE(walk->len); /* from a map, so that the verifier follows one way, not all */
		ext = nh->pos + (len & IP6_EXTENSIONS_MASK);
		if ((void *)(ext + 1) > nh->end)
			return -1;
		if (pkt->protocol == IPPROTO_FRAGMENT) {
			frag = *(__be16 *)&ext->type;
			pkt->fragment = which_fragment(frag & bpf_htons(IP6_OFFSET), frag & bpf_htons(IP6_MF));
			walk->len = len + 8;
		} else {
			if (pkt->protocol == IPPROTO_ROUTING && ext->segments_left)
				return -1;
			walk->len = len + 8 + ext->len * 8;
		}
		pkt->protocol = ext->nexthdr;
	}
	len = READ_ONCE(walk->len);
	if (len > IP6_EXTENSIONS_MASK)
		return -1;
	nh->pos += len;
	pkt->ip_len += len;
	pkt->l4_len -= len;
	return 0;
}

static inline int parse_ip6hdr(struct hdr_cursor *nh, struct packet *pkt)
{
	struct ip6hdr *ip6 = nh->pos;

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
	return is_ip6ext(pkt->protocol) ? parse_ip6ext(nh, pkt) : 0;
}

/* With TUNNEL, the packet inside an IPv4 one of that protocol, if it is one: the cursor is behind its header. */
static inline int parse_inner(struct hdr_cursor *nh, struct packet *pkt)
{
	if (!TUNNEL || pkt->version != 4 || pkt->protocol != TUNNEL || pkt->fragment)
		return 0;
	pkt->encapsulated = 1;
	pkt->outer_off = pkt->ip_off;
	pkt->ip_off += pkt->ip_len;
	return TUNNEL == IPPROTO_IPIP ? parse_iphdr(nh, pkt) : parse_ip6hdr(nh, pkt);
}

/* Bytes up to the end of an IP header that is `off` bytes behind the cursor, and of GRE's, if that one is next; 0
 * unless there is one, of a packet that ends with the frame and has another inside. */
static inline __u32 outer_len(const struct hdr_cursor *nh, __u32 off)
{
	struct hdr_cursor at = { nh->pos + off, nh->end };
	struct packet outer = {};
	struct grehdr *gre;
	__u8 *first = at.pos;

	if ((void *)(first + 1) > at.end ||
	    (*first >> 4 == 4 ? parse_iphdr(&at, &outer) : parse_ip6hdr(&at, &outer)) < 0 ||
	    off + outer.ip_len + outer.l4_len != (__u32)(nh->end - nh->pos))
		return 0;
	if (outer.protocol == IPPROTO_IPIP || outer.protocol == IPPROTO_IPV6)
		return off + outer.ip_len;
	gre = at.pos;
	if (outer.protocol != IPPROTO_GRE || (void *)(gre + 1) > at.end || gre->flags & ~bpf_htons(GRE_FLAGS))
		return 0;
	return off + outer.ip_len + sizeof(*gre) + (gre->flags & bpf_htons(GRE_CHECKSUM) ? 4 : 0) +
	       (gre->flags & bpf_htons(GRE_KEY) ? 4 : 0) + (gre->flags & bpf_htons(GRE_SEQUENCE) ? 4 : 0);
}

/* Before Linux 5.14 XDP on a tunnel device is shown what the tunnel has taken off already: the outer headers,
 * and Ethernet's in front of some. The cursor is behind them then. */
static inline void skip_outer(struct hdr_cursor *nh)
{
	struct ip6ext_walk *walk;
	__u32 len;
	int zero = 0;

	walk = own_walk(ip6ext_walks.lookup(&zero));
	if (!walk)
		return;
	len = outer_len(nh, 0);
	if (!len)
		len = outer_len(nh, sizeof(struct ethhdr));
	walk->len = len <= IP6_EXTENSIONS_MASK ? len : 0;
	/* From a map, so that the verifier follows one way, not all: that of Linux 7.3 gives up. */
	nh->pos += READ_ONCE(walk->len) & IP6_EXTENSIONS_MASK;
}

/* What is in front of the IP header, and the IP header. Leaves the cursor behind; -1: not whole, or
 * something else. */
static inline int parse_frame(struct hdr_cursor *nh, struct packet *pkt)
{
	struct ethhdr *eth = nh->pos;
	struct vlanhdr *vlan;
	__u8 *first = nh->pos;
	__be16 proto;
	__u32 i;
	int err;

	if (FRAME == FRAME_ETHERNET) {
		if ((void *)(eth + 1) > nh->end)
			return -1;
		if (eth->h_dest[0] & 1)
			return -1; /* to many, perhaps by an address that only hosts there know for a broadcast */
		proto = eth->h_proto;
		nh->pos = eth + 1;
		pkt->ip_off = sizeof(*eth);
#pragma unroll
		for (i = 0; i < VLAN_TAGS_MAX; i++) {
			if (proto == bpf_htons(ETH_P_8021Q) || proto == bpf_htons(ETH_P_8021AD)) {
				vlan = nh->pos;
				if ((void *)(vlan + 1) > nh->end)
					return -1;
				proto = vlan->h_proto;
				nh->pos = vlan + 1;
				pkt->ip_off += sizeof(*vlan);
			}
		}
	} else {
		if ((void *)(first + 1) > nh->end)
			return -1;
		proto = *first >> 4 == 4 ? bpf_htons(ETH_P_IP) : bpf_htons(ETH_P_IPV6);
	}
	if (proto == bpf_htons(ETH_P_IP))
		err = parse_iphdr(nh, pkt);
	else if (proto == bpf_htons(ETH_P_IPV6))
		err = parse_ip6hdr(nh, pkt);
	else
		return -1;
	return err < 0 ? err : parse_inner(nh, pkt);
}

static inline int is_icmp(const struct packet *pkt)
{
	return pkt->version == 4 ? pkt->protocol == IPPROTO_ICMP : pkt->protocol == IPPROTO_ICMPV6;
}

static inline int is_echo(const struct packet *pkt, const struct icmphdr *icmp)
{
	return icmp->type == (pkt->version == 4 ? ICMP_ECHO : ICMPV6_ECHO);
}

static inline int is_echo_reply(const struct packet *pkt, const struct icmphdr *icmp)
{
	return icmp->type == (pkt->version == 4 ? ICMP_ECHO_REPLY : ICMPV6_ECHO_REPLY);
}

static inline int is_dest_unreach(const struct packet *pkt, const struct icmphdr *icmp)
{
	return icmp->type == (pkt->version == 4 ? ICMP_DEST_UNREACH : ICMPV6_DEST_UNREACH);
}

/* In transit (code 0); code 1 tells of fragments that did not become a packet. */
static inline int is_time_exceeded(const struct packet *pkt, const struct icmphdr *icmp)
{
	return icmp->type == (pkt->version == 4 ? ICMP_TIME_EXCEEDED : ICMPV6_TIME_EXCEEDED) && icmp->code == 0;
}

/* The key of a probe, from its IP header and the 8 bytes behind it, at the cursor. -1: no probe. */
static inline int parse_probe_key(struct hdr_cursor *nh, const struct packet *pkt, struct probe_key *key)
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
	} else if (is_icmp(pkt) && is_echo(pkt, icmp)) {
		key->sport = icmp->id;
		key->dport = 0;
		key->ident = bpf_ntohs(icmp->sequence);
	} else {
		return -1;
	}
	return 0;
}

/* The first bytes of a UDP packet's payload, zeros behind its end. -1: not all there. */
static inline int parse_udp_head(struct hdr_cursor *nh, __u8 *head)
{
	struct udphdr *udp = nh->pos;
	__u8 *payload = (__u8 *)(udp + 1);
	__u32 i, len;

	if ((void *)payload > nh->end)
		return -1;
	len = bpf_ntohs(udp->len) - sizeof(*udp);
	__builtin_memset(head, 0, UDP_HEAD);
#pragma unroll
	for (i = 0; i < UDP_HEAD; i++) {
		if (i < len) {
			if ((void *)(payload + i + 1) > nh->end)
				return -1;
			head[i] = payload[i];
		}
	}
	return 0;
}

/* ---- Hooks -------------------------------------------------------------------------------- */

/* Called when a probe is complete, just before it is recorded and sent; ctx is the probe. A
 * negative result drops it. What identifies a probe (addresses, ports, and see probe_key) must
 * stay as it is: a reply to a changed one finds no probe. */
static int elf_v4_icmp_beforesend(struct __sk_buff *ctx);
static int elf_v4_tcp_beforesend(struct __sk_buff *ctx);
static int elf_v4_udp_beforesend(struct __sk_buff *ctx);
static int elf_v6_icmp_beforesend(struct __sk_buff *ctx);
static int elf_v6_tcp_beforesend(struct __sk_buff *ctx);
static int elf_v6_udp_beforesend(struct __sk_buff *ctx);

/* Called for a time exceeded that answers a probe, before its result is recorded. */
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

/* ---- Scheduling: when a probe is due, and to which hop ------------------------------------ */

static __u64 (*jiffies64)(void) = (void *)118; /* not every BCC declares it */

/* Ticks of the kernel's clock: of no exactness, but 30 ns cheaper than bpf_ktime_get_ns(). */
static inline __u64 ticks_now(void)
{
	return TICK_NS ? jiffies64() : 0;
}

/* What a hop that answers waits between two probes, ns. */
#define HOP_INTERVAL (RATE_GLOBAL ? 0 : INTERVAL_NS)
/* The same as a measure of patience, where INTERVAL_NS may be 0. */
#define PATIENCE (INTERVAL_NS > NSEC_PER_MSEC ? INTERVAL_NS : NSEC_PER_MSEC)

static inline __u64 min64(__u64 a, __u64 b)
{
	return a < b ? a : b;
}

static inline __u64 max64(__u64 a, __u64 b)
{
	return a > b ? a : b;
}

/* The hop of this number, 0 where there is none. Verifiers before Linux 5.10 see that the number is in bounds
 * only where the register that was compared is multiplied and added as it is, not a copy and not what was saved
 * meanwhile. No compiler promises that. */
static inline struct hop *hop_at(struct path *path, __u64 nr)
{
	struct hop *hop = path->hops;

	if (nr > MAX_HOPS)
		return 0;
	asm volatile("if %1 <= %2 goto +1\n\t%1 = 0\n\t%1 *= %3\n\t%0 += %1"
		     : "+r"(hop), "+r"(nr)
		     : "i"(MAX_HOPS), "i"(sizeof(*hop)));
	return hop;
}

/* Does a hop behind this one answer, and has it done so since this one fell silent? */
static inline int is_router(const struct path *path, __u32 nr, const struct hop *hop)
{
	return nr < path->last_responsive && path->farthest_reply > hop->since;
}

/* Are the hop's replies overdue? One that may have become the destination is not asked again before
 * the last reply is there, or late. Replies that are late end its rest (learn_hop()). */
static inline int is_unresponsive(const struct path *path, __u32 nr, const struct hop *hop, __u64 now)
{
	__u64 rtt = hop->rtt * 1000ULL, silent = now - hop->since;

	if (is_router(path, nr, hop))
		return hop->unanswered > GRACE_ROUTER && (!rtt || silent > rtt + rtt / 4 + GRACE_ROUTER * PATIENCE);
	return hop->unanswered && silent > 2 * rtt + min64(PATIENCE, 4 * NSEC_PER_MSEC);
}

/* How many rests besides the first are as long as that. */
static inline __u32 free_levels(const struct hop *hop)
{
	return hop->false_alarms / FALSE_ALARMS_PER_LEVEL;
}

/* How long a silent hop rests, ns. Routers, since each probe costs them and us something. What may be
 * the destination, since no probe must reach that: the longer the farther it is behind what answers. */
static inline __u64 backoff_delay(const struct path *path, __u32 nr, const struct hop *hop)
{
	__u32 beyond, backoff_level;

	if (is_router(path, nr, hop))
		return min64(PATIENCE << min64(hop->backoff_level, 16), BACKOFF_ROUTER_MAX);
	beyond = nr > path->last_responsive ? nr - path->last_responsive - 1 : 0;
	backoff_level = hop->backoff_level > free_levels(hop) ? hop->backoff_level - free_levels(hop) : 0;
	return min64((hop->rtt ? BACKOFF_ANSWERED : BACKOFF_NEVER_ANSWERED) << min64(BACKOFF_SHIFT * (backoff_level + beyond), 12),
		     BACKOFF_BEYOND_MAX);
}

/* Is the hop's rest over before its time? Where one that fell silent together with it is heard again, or the
 * destination is; or where one so far behind it answers that it is now known to be a router. */
static inline int is_retried_early(const struct path *path, __u32 nr, const struct hop *hop)
{
	if (hop->backoff != BACKING_OFF)
		return 0;
	if (nr < path->last_responsive && hop->since < path->routers_proven)
		return 1;
	return hop->since < path->outage_end && hop->since + TOGETHER > path->outage_start;
}

/* Farthest hop to probe: short of the destination, or, while its distance is not known, step by
 * step from the first hop on, each waited for the longer the more before it were silent. */
static inline __u32 farthest_hop(struct path *path, __u64 now)
{
	struct hop *hop;

	if (path->length)
		return path->length - 1;
	if (path->max_ttl_tried <= path->last_responsive && path->last_responsive < MAX_HOPS) {
		path->max_ttl_tried = path->last_responsive + 1;
	} else if (path->max_ttl_tried < MAX_HOPS) {
		hop = hop_at(path, path->max_ttl_tried);
		if (hop && hop->unanswered && now > hop->since && /* or another CPU has just asked it */
		    now - hop->since > STEP_WAIT << min64(2 * (__u32)(path->max_ttl_tried - 1 - path->last_responsive), STEP_SHIFT_MAX))
			path->max_ttl_tried++;
	}
	return path->max_ttl_tried;
}

/* No probe before this time: for certain not before as many ticks as fit until then. */
static inline void set_next_due(struct path *path, __u64 due, __u64 now, __u64 ticks)
{
	path->next_due = due;
	path->next_due_tick = TICK_NS && due > now ? ticks + (due - now) / (TICK_NS + !TICK_NS) : 0;
}

/* Why there is none: another CPU was first, or all hops rest; the budget is spent; the hop whose turn it was
 * is found silent. */
enum { NONE_DUE = -1, OVER_MAX_RATE = -2, HOP_UNRESPONSIVE = -3 };

/* Claims the right to send one probe: fills in seq, ttl, time and due. 0, or one of these. */
static inline int reserve_probe(struct path *path, struct reservation *reservation, __u64 now)
{
	__u64 earliest = now + NSEC_PER_SEC, ticks = ticks_now();
	struct schedule *schedule;
	__u32 i, nr, farthest;
	int zero = 0, err = NONE_DUE;
	struct hop *hop;

	schedule = schedules.lookup(&zero);
	if (!schedule)
		return NONE_DUE;
	bpf_spin_lock(&schedule->lock);
	if (now < path->next_due)
		goto unlock;
	farthest = farthest_hop(path, now);
	if (path->length && path->length <= MAX_HOPS &&
	    (path->explore || path->seq % EXPLORE_EVERY == EXPLORE_EVERY - 1)) {
		hop = hop_at(path, path->length);
		if (hop && hop->due <= now) {
			path->last_probed = farthest;
			farthest = path->length;
		}
	}
#pragma unroll
	for (i = 0; i < MAX_HOPS; i++) {
		if (i < farthest) {
			path->last_probed = path->last_probed < farthest ? path->last_probed + 1 : 1;
			nr = READ_ONCE(path->last_probed); /* or else the verifier follows every hop's number apart */
			hop = hop_at(path, nr);
			if (!hop)
				goto unlock;
			if (hop->due <= now || is_retried_early(path, nr, hop))
				goto found;
			earliest = min64(earliest, hop->due);
		}
	}
	set_next_due(path, max64(earliest, RATE_GLOBAL ? path->last_sent + INTERVAL_NS : 0), now, ticks);
	goto unlock;
found:
	if (nr != path->length && is_unresponsive(path, nr, hop, now) && !(hop->backoff & BACKING_OFF)) {
		if (nr == path->last_responsive)
			path->last_responsive--;
		hop->due = now + backoff_delay(path, nr, hop);
		hop->backoff |= BACKING_OFF;
		if (hop->backoff_level < 16)
			hop->backoff_level++;
		err = HOP_UNRESPONSIVE;
		goto unlock; /* the next packet may carry a probe to another hop */
	}
	if (schedule->budget > now + BUDGET_BURST) {
		path->last_probed = nr - 1;
		err = OVER_MAX_RATE;
		goto unlock;
	}
	schedule->budget = max64(schedule->budget, now) + BUDGET_COST;
	if (path->length && nr == path->length)
		path->explore = 0;
	if (is_retried_early(path, nr, hop)) {
		hop->backoff_level = 0;
		hop->backoff = RETRIED_EARLY;
	}
	hop->backoff &= RETRIED_EARLY;
	if (hop->unanswered == 0)
		hop->since = now;
	if (hop->unanswered < 0xff)
		hop->unanswered++;
	hop->due = now + HOP_INTERVAL;
	set_next_due(path, RATE_GLOBAL ? now + INTERVAL_NS : 0, now, ticks);
	path->last_sent = now;
	reservation->seq = path->seq++;
	reservation->ttl = nr;
	reservation->time = now;
	reservation->due = hop->due;
	err = 0;
unlock:
	bpf_spin_unlock(&schedule->lock);
	if (err == OVER_MAX_RATE)
		COUNT(over_max_rate);
	if (err == HOP_UNRESPONSIVE)
		COUNT(hop_unresponsive);
	return err;
}

/* Intervals are counted from when the probe really left; one that did not is not held against its hop. */
static inline void settle_reservation(struct path *path, const struct reservation *reservation, int sent)
{
	struct schedule *schedule;
	struct hop *hop;
	int zero = 0;

	schedule = schedules.lookup(&zero);
	hop = hop_at(path, reservation->ttl);
	if (!schedule || !hop)
		return;
	bpf_spin_lock(&schedule->lock);
	if (!sent) {
		if (hop->unanswered)
			hop->unanswered--;
	} else {
		if (hop->due == reservation->due)
			hop->due += reservation->sendtime - reservation->time;
		path->last_sent = reservation->sendtime;
		if (RATE_GLOBAL)
			path->next_due = max64(path->next_due, reservation->sendtime + INTERVAL_NS);
	}
	bpf_spin_unlock(&schedule->lock);
}

/* Has the schedule looked at anew: hops became due earlier than was thought. */
static inline void reschedule(struct path *path, __u64 due)
{
	if (RATE_GLOBAL)
		due = max64(due, path->last_sent + INTERVAL_NS);
	if (due < path->next_due) {
		path->next_due = due;
		path->next_due_tick = 0;
	}
}

/* Routers between here and the sender of a packet that arrived with this TTL, which began as one
 * of the values in use, and one more: the TTL with which to reach it. */
static inline __u32 ttl_distance(__u32 ttl)
{
	__u32 initial = ttl <= 32 ? 32 : ttl <= 64 ? 64 : ttl <= 128 ? 128 : 255;

	return initial - ttl + 1;
}

/* The TTL that reaches the destination is another one than was thought; 0: it is not known any more. What
 * was learnt about the last hop goes. */
static inline void set_length(struct path *path, __u32 length)
{
	path->length = length;
	path->reply_distances = 0;
	path->is_confirmed = 0;
	path->explore = 0;
}

/* A packet of the destination came with this TTL. Ways that seem shorter are believed at once,
 * longer ones only when nothing says otherwise for a while: the error that does no harm. The first
 * packet after a gap says that the way is open again: hops that fell silent meanwhile need rest no more. */
static inline void learn_distance(struct path *path, __u32 ttl)
{
	__u64 now, ticks = ticks_now(), last_received = READ_ONCE(path->last_received);
	__u64 gap = ticks > last_received ? ticks - last_received : 0; /* another CPU may have noted a later one */
	__u32 distance = ttl_distance(ttl);
	struct schedule *schedule;
	int zero = 0;

	if (distance == path->reverse_distance && !path->longer_packets && gap <= TOGETHER_TICKS) {
		if (gap)
			path->last_received = ticks;
		return;
	}
	now = bpf_ktime_get_ns();
	schedule = schedules.lookup(&zero);
	if (!schedule)
		return;
	bpf_spin_lock(&schedule->lock);
	if (gap > TOGETHER_TICKS && last_received) {
		path->outage_start = now - gap * TICK_NS;
		path->outage_end = now;
		reschedule(path, now);
	}
	if (gap)
		path->last_received = ticks;
	if (distance == path->reverse_distance) {
		path->longer_packets = 0;
	} else if (path->reverse_distance && distance > path->reverse_distance && path->longer_packets < LONGER_AFTER) {
		path->longer_packets++;
	} else {
		path->longer_packets = 0;
		path->reverse_distance = distance;
		if (distance < path->length)
			path->shortened_at = now;
		set_length(path, distance > MAX_HOPS ? 0 : distance); /* or the TTL began as none of those values */
		if (path->last_responsive >= distance)
			path->last_responsive = distance - 1;
		reschedule(path, now);
	}
	bpf_spin_unlock(&schedule->lock);
}

/* The hop at which the probe ended has answered, with a packet that arrived with this TTL. */
static inline void learn_hop(struct path *path, const struct probe *probe, __u32 ttl, __u64 now)
{
	__u64 nr = probe->outttl, bit;
	struct schedule *schedule;
	struct hop *hop, *next;
	int zero = 0;

	schedule = schedules.lookup(&zero);
	if (!schedule || nr == 0)
		return;
	hop = hop_at(path, nr);
	next = hop_at(path, nr + 1);
	if (!hop)
		return;
	bpf_spin_lock(&schedule->lock);
	if (path->length && nr >= path->length && probe->sendtime < path->shortened_at)
		goto unlock;
	if (hop->backoff_level || !hop->rtt) {
		path->outage_start = hop->since;
		path->outage_end = now;
		reschedule(path, now);
	}
	if (nr > path->last_responsive + 1)
		path->routers_proven = now;
	if (hop->backoff_level && hop->backoff_level <= 1 + free_levels(hop) && hop->false_alarms < FALSE_ALARMS_MAX)
		hop->false_alarms++;
	hop->unanswered = 0;
	hop->backoff_level = 0;
	hop->backoff = 0;
	hop->since = now;
	hop->rtt = (now - probe->sendtime) / 1000 + 1;
	hop->due = min64(hop->due, now + HOP_INTERVAL);
	reschedule(path, hop->due);
	if (nr >= path->last_responsive) {
		path->last_responsive = nr;
		path->farthest_reply = now;
	}
	if (!path->length) {
		if (nr >= path->max_ttl_tried && nr < MAX_HOPS)
			path->max_ttl_tried = nr + 1;
	} else if (nr >= path->length) {
		set_length(path, nr + 1);
		path->explore = nr < MAX_HOPS;
	} else if (nr + 1 == path->length) {
		/* Seen from here, the last router is one hop nearer than the destination. Where it
		 * is not, the way there may be longer than the way back: look one hop farther, once
		 * for each distance that it seems to have; and not often, where the way back changes. */
		ttl = ttl_distance(ttl);
		bit = 1ULL << (ttl & 63);
		if (!path->is_confirmed && !(path->reply_distances & bit) && ttl + 1 != path->reverse_distance) {
			if (path->last_explored && now - path->last_explored < EXPLORE_AGAIN)
				goto unlock;
			path->last_explored = now;
			path->explore = 1;
		}
		path->is_confirmed = 0;
		path->reply_distances |= bit;
	}
	if (path->explore && next && nr + 1 == path->length) {
		next->due = now; /* even if it rests */
		next->backoff |= BACKING_OFF;
	}
unlock:
	bpf_spin_unlock(&schedule->lock);
}

/* A probe with this TTL reached the destination: the way there is no longer than that. */
static inline void learn_reached(struct path *path, __u32 ttl)
{
	__u64 now = bpf_ktime_get_ns();
	struct schedule *schedule;
	struct hop *last;
	int zero = 0;

	schedule = schedules.lookup(&zero);
	if (!schedule)
		return;
	bpf_spin_lock(&schedule->lock);
	if (ttl && (!path->length || ttl <= path->length)) {
		if (ttl != path->length)
			set_length(path, ttl);
		path->explore = 0;
		path->shortened_at = now;
		last = hop_at(path, ttl - 1);
		if (last && last->rtt && !last->unanswered)
			path->is_confirmed = 1;
	}
	if (ttl && path->last_responsive >= ttl)
		path->last_responsive = ttl - 1;
	bpf_spin_unlock(&schedule->lock);
	COUNT(reached);
}

/* ---- Rewriting: the clone becomes the probe ----------------------------------------------- */

/* What build_probe() tells of the probe it made. */
struct built {
	__u32 version;
	__u32 protocol;
	__u32 origseq;
	__u16 ip_id;
	__u16 compensation;
	__u8 tos;
	__u8 payload_len;
	__u16 device_check; /* the UDP checksum is left to the device */
	struct probe_key key;
	struct udp_partial quoted; /* how the probe is quoted if no device finishes it */
};

/* sum and the one's complement sum of len bytes of the packet, of SUM_CHUNK at most. */
static inline __u32 csum_chunk(struct __sk_buff *skb, __u32 off, __u32 len, __u32 sum)
{
	__u64 n = ((len - 1) & (SUM_CHUNK - 1)) + 1, words; /* a bound that the verifier sees, too */
	struct sum_buffer *buffer;
	int zero = 0;
	__u8 *end;

	buffer = own_buffer(sum_buffers.lookup(&zero));
	if (!buffer || !len)
		return 0;
	end = buffer->bytes;
	asm volatile("%0 += %1" : "+r"(end) : "r"(n)); /* now, since a saved n is a number without bounds before 5.10 */
	if (bpf_skb_load_bytes(skb, off, buffer->bytes, n))
		return 0;
	end[0] = 0; /* bpf_csum_diff() takes words */
	end[1] = 0;
	end[2] = 0;
	words = (n + 3) & ~3ULL;
	asm volatile("if %0 <= %1 goto +1\n\t%0 = %1" : "+r"(words) : "i"(SUM_CHUNK));
	return bpf_csum_diff(0, 0, (__be32 *)buffer->bytes, words, sum);
}

/* The same of UDP_SUM_MAX at most, from 0. */
static inline __u32 csum_skb(struct __sk_buff *skb, __u32 off, __u32 len)
{
	struct sum_buffer *buffer;
	__u32 i, sum = 0;
	int zero = 0;

	buffer = own_buffer(sum_buffers.lookup(&zero));
	if (!buffer)
		return 0;
#pragma unroll
	for (i = 0; i < UDP_SUM_MAX / SUM_CHUNK; i++) {
		if (len > SUM_CHUNK) {
			if (bpf_skb_load_bytes(skb, off, buffer->bytes, SUM_CHUNK))
				return 0;
			sum = bpf_csum_diff(0, 0, (__be32 *)buffer->bytes, SUM_CHUNK, sum);
			off += SUM_CHUNK;
			len -= SUM_CHUNK;
		}
	}
	return csum_chunk(skb, off, len, sum);
}

/* Bytes of header behind the IP header, -1 where they are not all there. */
static inline int l4_header_len(struct hdr_cursor *nh, const struct packet *pkt)
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

/* Trims the clone. What a probe keeps behind its headers: nothing for TCP, 2 bytes that make the
 * checksum come out as wanted for UDP and ICMP, or 4 where the echo request has 2 itself;
 * with NOTRUNC all of it, or of a packet that is yet to be segmented, what the first segment gets.
 * Tells in exact whether the payload is kept, otherwise in tail how many bytes there are. */
static inline int trim_clone(struct __sk_buff *skb, int *keep_payload, __u8 *padding)
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
	*keep_payload = NOTRUNC && (payload || pkt.protocol != IPPROTO_TCP);
	if (!*keep_payload)
		*padding = payload_len = pkt.protocol == IPPROTO_TCP ? 0 : is_icmp(&pkt) && payload == 2 ? 4 : 2;
	else
		payload_len = segment_len(skb, payload);
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

/* Makes the clone the probe that the claim says, all but its hook. 0, or -1: the clone is of no use. */
static inline int build_probe(struct __sk_buff *skb, const struct reservation *reservation, struct built *built)
{
	__u32 old_len, new_len, partial;
	struct hdr_cursor nh, l4;
	struct packet pkt = {};
	__u64 pseudo, sum;
	struct icmphdr *icmp;
	struct ip6hdr *ip6;
	struct tcphdr *tcp;
	struct udphdr *udp;
	struct iphdr *ip;
	__u16 *compensation, ttl, check;
	int keep_payload = 0;

	old_len = skb->len;
	if (trim_clone(skb, &keep_payload, &built->payload_len) < 0)
		return -1;
	nh.pos = (void *)(long)skb->data;
	nh.end = (void *)(long)skb->data_end;
	if (parse_frame(&nh, &pkt) < 0)
		return -1;
	l4 = nh;
	old_len -= pkt.ip_off + pkt.ip_len;
	new_len = skb->len - pkt.ip_off - pkt.ip_len;

	if (TUNNEL && pkt.encapsulated) {
		ip = (void *)(long)skb->data + pkt.outer_off;
		if ((void *)(ip + 1) > nh.end)
			return -1;
		set_tot_len(ip, skb->len - pkt.outer_off);
	}
	if (pkt.version == 4) {
		ip = pkt.ip;
		set_tot_len(ip, pkt.ip_len + new_len);
		ttl = *(__u16 *)&ip->ttl; /* with the protocol: checksums count in 16 bits */
		ip->ttl = reservation->ttl;
		ip->check = csum_replace(ip->check, ttl, *(__u16 *)&ip->ttl);
	} else {
		ip6 = pkt.ip;
		ip6->payload_len = bpf_htons(pkt.ip_len - sizeof(*ip6) + new_len);
		ip6->hop_limit = reservation->ttl;
	}

	/* A checksum that is left to the device is, in memory, the sum of the pseudo header. A
	 * finished one is that as well once in 65535 packets; such a probe's checksum is wrong,
	 * which no router minds. */
	pseudo = csum_address(&pkt.saddr) + csum_address(&pkt.daddr) + bpf_htonl(pkt.protocol);
	built->device_check = 0;
	if (pkt.protocol == IPPROTO_TCP) {
		tcp = l4.pos;
		if ((void *)(tcp + 1) > l4.end)
			return -1;
		built->origseq = bpf_ntohl(tcp->seq);
		partial = tcp->check == csum_fold(pseudo + bpf_htonl(old_len));
		pseudo += bpf_htonl(new_len);
		if (!keep_payload) {
			tcp->seq = bpf_htonl(built->origseq - TCP_SEQ_BACK + reservation->seq % TCP_SEQ_BACK);
			tcp->flags = TCP_ACK;
			tcp->urg_ptr = 0;
			tcp->check = 0;
			tcp->check = ~csum_fold(pseudo + csum_chunk(skb, skb->len - new_len, new_len, 0));
		}
		if (partial)
			tcp->check = csum_fold(pseudo);
	} else if (pkt.protocol == IPPROTO_UDP) {
		udp = l4.pos;
		compensation = (__u16 *)(udp + 1);
		if ((void *)compensation > l4.end)
			return -1;
		built->origseq = bpf_ntohs(udp->check);
		partial = udp->check == csum_fold(pseudo + bpf_htonl(old_len));
		pseudo += bpf_htonl(new_len);
		udp->len = bpf_htons(new_len);
		sum = pseudo + udp->source + udp->dest + udp->len;
		check = udp->check;
		if (!keep_payload) {
			if ((void *)(compensation + 1) > l4.end)
				return -1;
			check = bpf_htons(1 + ((__u64)reservation->seq * CHECKSUM_STEP + SALT) % 65535);
			*compensation = ~csum_fold(sum + check);
			built->compensation = *compensation;
			udp->check = check;
		} else if (partial) {
			check = ~csum_fold(sum + csum_skb(skb, skb->len - new_len + sizeof(*udp), new_len - sizeof(*udp)));
			if (check == 0)
				check = 0xffff;
		}
		if (partial) {
			udp->check = csum_fold(pseudo);
			built->device_check = check;
		}
	} else if (is_icmp(&pkt)) {
		icmp = l4.pos;
		compensation = (__u16 *)(icmp + 1);
		if ((void *)compensation > l4.end)
			return -1;
		built->origseq = bpf_ntohs(icmp->sequence);
		if (!keep_payload) {
			if ((void *)(compensation + 1) > l4.end)
				return -1;
			icmp->sequence = bpf_htons(reservation->seq + SALT);
			sum = pkt.version == 6 ? pseudo + bpf_htonl(new_len) : 0;
			sum += *(__u16 *)icmp + icmp->check + icmp->id + icmp->sequence;
			*compensation = ~csum_fold(sum);
		}
	} else {
		return -1;
	}

	built->version = pkt.version;
	built->protocol = pkt.protocol;
	built->ip_id = pkt.ip_id;
	built->tos = pkt.tos;
	if (parse_probe_key(&l4, &pkt, &built->key) < 0)
		return -1;
	if (built->device_check) {
		built->quoted.key = built->key;
		if (parse_udp_head(&l4, built->quoted.head) < 0)
			return -1;
		built->key.ident = new_len << 16 | bpf_ntohs(built->device_check);
	}
	return 0;
}

/* Puts the probe in flight. 0, or -1 with the reason counted. */
static inline int record_probe(const struct built *built, struct reservation *reservation)
{
	struct probe probe = {};
	__u32 *ident;
	struct probe_key key = built->key;
	int err;

	if (built->device_check) {
		ident = partial_checksums.lookup((struct udp_partial *)&built->quoted);
		if (ident) {
			key.ident = *ident;
			if (in_flight.lookup(&key)) {
				COUNT(key_busy);
				return -1;
			}
			key.ident = built->key.ident;
		}
		partial_checksums.update((struct udp_partial *)&built->quoted, &key.ident);
	}
	probe.seq = reservation->seq;
	probe.origseq = built->origseq;
	probe.outipid = built->ip_id;
	probe.outtos = built->tos;
	probe.compensation = built->compensation;
	probe.outttl = reservation->ttl;
	probe.payload_len = built->payload_len;
	probe.pid = reservation->pid;
	probe.app = reservation->app;
	probe.tcp = reservation->tcp;
	probe.sendtime = bpf_ktime_get_ns();
	err = in_flight.insert(&key, &probe);
	if (err == -EEXIST) {
		COUNT(key_busy);
		return -1;
	}
	if (err) {
		COUNT(in_flight_full);
		return -1;
	}
	reservation->sendtime = probe.sendtime;
	reservation->key = key;
	reservation->recorded = 1;
	return 0;
}

/* The probe leaves now. */
static inline void stamp_probe(struct reservation *reservation)
{
	struct probe *probe = in_flight.lookup(&reservation->key);

	if (probe)
		reservation->sendtime = probe->sendtime = bpf_ktime_get_ns();
}

/* ---- Processes and their sockets ---------------------------------------------------------- */

#if BY_OWNER

static inline struct app_name current_app(void)
{
	struct app_name app = {};

	bpf_get_current_comm(&app, sizeof(app));
	return app;
}

/* What -a makes of a command name, without regard to (ASCII) case. 0: nothing. */
static inline __u32 status_by_name(const struct app_name *app)
{
	__u64 word[sizeof(*app) / 8], low, from_a, above_z;
	__u32 i, *keep_payload;

	if (!BY_APP)
		return 0;
	__builtin_memcpy(word, app, sizeof(*app));
	/* Eight at a time and without a branch: sixteen branches are 2^16 paths to verifiers before Linux 6.8. */
#pragma unroll
	for (i = 0; i < sizeof(*app) / 8; i++) {
		low = word[i] & 0x7f7f7f7f7f7f7f7fULL;
		from_a = low + 0x3f3f3f3f3f3f3f3fULL;  /* the highest bit of each byte: 'A' or beyond */
		above_z = low + 0x2525252525252525ULL; /* beyond 'Z' */
		word[i] |= ((from_a ^ above_z) & ~word[i] & 0x8080808080808080ULL) >> 2;
	}
	keep_payload = apps.lookup((struct app_name *)word);
	if (!keep_payload)
		return 0;
	return *keep_payload ? TARGET : UNDECIDED;
}

/* Enters the process, in the place of one that had its PID. */
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

/* sched_process_exec, in the process. One that is of interest stays so, under its new name; any
 * other may now be it by a name that only the driver sees: its executable's, its script's. */
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
	if (!event.status)
		event.status = UNDECIDED;
	enter_process(&event, &app);
	report_process(&event);
	return 0;
}

/* sched_wakeup_new, in the parent, before the child runs: the child is what the parent is. At sched_process_fork
 * Linux 7.2 leaves a program out while another run of it is preempted on that CPU; here none is, with the run queue
 * locked. */
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
		return 0;
	process = processes.lookup(&pid);
	if (!process) {
		processes.delete(&child.pid); /* one that had this PID */
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

/* sched_process_exit, in every thread. Others may outlive the first one, or have become it by an exec:
 * the driver removes the process when nothing is left of it. */
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

/* cgroup sock_create, in the creating process. Always 1: go on. */
int elf_sock_create(struct bpf_sock *sk)
{
	__u64 ids = bpf_get_current_pid_tgid();
	struct process_event event = { .pid = ids >> 32 };
	struct process *process;
	struct owner owner = {};
	struct app_name app;

	process = processes.lookup(&event.pid);
	if (!process) {
		/* It may have changed its name since it was looked at. */
		if (event.pid != (__u32)ids)
			return 1;
		app = current_app();
		event.status = status_by_name(&app);
		if (!event.status)
			return 1;
		enter_process(&event, &app);
		report_process(&event);
		process = processes.lookup(&event.pid);
		if (!process)
			return 1;
	}
	owner.process = process->id;
	owner.status = process->status;
	owner.pid = event.pid;
	owner.app = event.pid == (__u32)ids ? current_app() : process->app; /* threads have names of their own */
	sockets.sk_storage_get(sk, &owner, BPF_SK_STORAGE_GET_F_CREATE);
	return 1;
}

/* The socket keeps the answer, so that it outlives the process. */
static inline int is_target(struct owner *owner)
{
	__u32 pid = owner->pid;
	struct process *process;

	if (owner->status != UNDECIDED)
		return owner->status == TARGET;
	process = processes.lookup(&pid);
	if (!process || process->id != owner->process)
		owner->status = 0; /* it was found to be of none, or ended before it was looked at */
	else if (process->status == TARGET)
		owner->status = TARGET;
	return owner->status == TARGET;
}

/* Which process of interest the packet comes from; 0: none. */
static inline struct owner *packet_owner(struct __sk_buff *skb)
{
	struct bpf_sock *sk = skb->sk; /* whether it is a full one, the helper asks itself (Linux 5.10) */
	struct owner *owner;

	owner = sk ? sockets.sk_storage_get(sk, 0, 0) : 0;
	return owner && is_target(owner) ? owner : 0;
}

#else

static inline struct owner *packet_owner(struct __sk_buff *skb)
{
	return 0;
}

#endif

/* Where the address has its mark. The driver does the same: mark_of() in elfprobe.py. */
static inline __u8 *filter_slot(const struct address *a)
{
	__u32 hash = (a->word[0] ^ a->word[1] ^ a->word[2] ^ a->word[3]) * 0x9e3779b1;
	__u32 nr = hash >> 18; /* of MARK_LINES */
	struct filter_line *line = address_filter.lookup(&nr);

	return line ? &line->slots[(hash >> 12) % FILTER_LINE_SIZE] : 0;
}

/* What is known of the way to a destination of interest, by itself or for a process's flows; 0: of none. */
static inline struct path *known_path(struct address *dest, const __u8 *slot)
{
	struct path *path = 0;

	if (*slot & IN_PATHS)
		path = paths.lookup(dest);
	if (BY_OWNER && !path && *slot & IN_FLOW_PATHS)
		path = flow_paths.lookup(dest);
	return path;
}

static inline struct path *path_to(struct address *dest)
{
	__u8 *slot = filter_slot(dest);

	return slot && *slot ? known_path(dest, slot) : 0;
}

/* A flow of interest makes its destination one. */
static inline struct path *new_flow_path(struct address *dest, __u8 *slot)
{
	struct path *path;
	int zero = 0;

	path = new_path.lookup(&zero);
	if (!path)
		return 0;
	path->flows_only = 1; /* before it is in the map, where packets of others find it at once */
	*slot |= IN_FLOW_PATHS; /* the driver writes no marks any more when packets come */
	flow_paths.insert(dest, path); /* or another CPU has */
	return flow_paths.lookup(dest);
}

/* ---- TC egress ---------------------------------------------------------------------------- */

/* The run of the clone, by tail call: makes it the probe, or drops it. */
int elf_probe(struct __sk_buff *skb)
{
	struct built built = {};
	struct reservation *reservation;
	int zero = 0;

	reservation = own_reservation(reservations.lookup(&zero));
	if (!reservation)
		return TC_ACT_SHOT;
	if (build_probe(skb, reservation, &built) < 0) {
		COUNT(build_failed);
		return TC_ACT_SHOT;
	}
	if (hook_beforesend(skb, built.version, built.protocol) < 0) {
		COUNT(hook_dropped);
		return TC_ACT_SHOT;
	}
	if (record_probe(&built, reservation) < 0)
		return TC_ACT_SHOT;
	if (skb->wire_len <= skb->len)
		return TC_ACT_UNSPEC;
	/* Queues go by the length that the kernel noted as it took the clone in, the whole packet's: a shaper would
	 * have the probe pay for that. It notes the length anew of what is sent anew. */
	expect(reservation, PROBE);
	reservation->result = bpf_clone_redirect(skb, skb->ifindex, 0);
	expect(reservation, 0);
	reservation->resent = 1;
	return TC_ACT_CONSUMED;
}

/* May a copy of this packet, with a low TTL, harm nobody? At the cursor: what follows the IP header. */
static inline int may_carry(struct hdr_cursor *nh, const struct packet *pkt)
{
	struct tcphdr *tcp = nh->pos;
	struct icmphdr *icmp = nh->pos;

	if (pkt->fragment || l4_header_len(nh, pkt) < 0)
		return 0;
	if (pkt->version == 6 && pkt->ip_len + pkt->l4_len == sizeof(struct ip6hdr))
		return 0; /* BIG TCP: a length option that no probe may have (RFC 2675), and the device takes out */
	if (pkt->protocol == IPPROTO_TCP) {
		if ((void *)(tcp + 1) > nh->end)
			return 0;
		return (tcp->flags & (TCP_SYN | TCP_FIN | TCP_RST | TCP_ACK)) == TCP_ACK;
	}
	if (is_icmp(pkt))
		return (void *)(icmp + 1) <= nh->end && is_echo(pkt, icmp);
	return pkt->protocol == IPPROTO_UDP;
}

/* Does the packet hold memory of the application's (MSG_ZEROCOPY, io_uring)? To trim its clone the kernel copies the
 * data, and tells the application that it did (skb_zcopy_clear() in __pskb_pull_tail()), once for each probe: many
 * stop using it then. The context of a TC program is the struct sk_buff itself. Behind its data is its struct
 * skb_shared_info. */
static long (*probe_read_kernel)(void *to, __u32 size, const void *from) = (void *)113; /* BCC's own may be another */

static inline int is_zerocopy(struct __sk_buff *skb)
{
	__u64 head = 0;
	__u32 end = 0;
	__u8 flags = 0;

	if (!SKB_HEAD)
		return 0;
	probe_read_kernel(&head, sizeof(head), (void *)skb + SKB_HEAD);
	probe_read_kernel(&end, sizeof(end), (void *)skb + SKB_END);
	probe_read_kernel(&flags, sizeof(flags), (void *)(head + end + ZEROCOPY_FLAGS));
	return flags & ZEROCOPY_FLAG;
}

/* Of the packet's flow, if its TCP header is given, otherwise of its destination. */
static inline void report_flow(struct __sk_buff *skb, const struct packet *pkt, const struct tcphdr *tcp,
				__u32 kind)
{
	struct flow_event event = { .kind = kind };

	event.flow.dest = pkt->daddr;
	if (tcp) {
		event.flow.sport = tcp->source;
		event.flow.dport = tcp->dest;
		event.flow.protocol = IPPROTO_TCP;
	}
	if (submit_flow_event(skb, &event))
		COUNT(events_lost);
}

/* Has nothing of the flow been acknowledged for STALL, in which the device had its carrier? Some drivers take the link
 * down for seconds when XDP is attached, and cables are pulled: that is no sign of a firewall. */
static inline int is_stalled(const struct tcp_progress *progress, __u64 now)
{
	__u64 *link_since;
	int zero = 0;

	if (!progress->since || now - progress->since <= STALL)
		return 0;
	link_since = link_up_since.lookup(&zero);
	return !link_since || (now > *link_since && now - *link_since > STALL);
}

/* May the TCP flow that the packet, parsed up to the cursor, belongs to be probed now? Not from what
 * it sends again (a firewall knows newer numbers), nor while it stalls: some firewalls take a low TTL
 * for an attack and block the flow. A flow whose TCP socket is not here passes; otherwise notes its state. */
static inline int flow_is_well(struct __sk_buff *skb, struct hdr_cursor *nh, const struct packet *pkt,
			       struct path *path, struct tcp_state *state, __u64 now)
{
	struct tcp_progress *progress;
	struct tcphdr *tcp = nh->pos;
	struct bpf_tcp_sock *tp;
	struct bpf_sock *sk;

	if (pkt->protocol != IPPROTO_TCP || (void *)(tcp + 1) > nh->end)
		return 1;
	sk = skb->sk ? bpf_sk_fullsock(skb->sk) : 0;
	if (!sk || sk->type != SOCK_STREAM) /* bpf_tcp_sock() takes raw ones for TCP, too, such as the kernel's own */
		return 1;
	tp = bpf_tcp_sock(sk);
	if (!tp)
		return 1;
	state->srtt = tp->srtt_us >> 3; /* the kernel has it in eighths */
	state->cwnd = tp->snd_cwnd;
	state->retrans = tp->total_retrans;
	progress = progress_of(skb, sk);
	if (!progress)
		return 1;
	if (!tp->packets_out || progress->acked != tp->snd_una || !progress->since) {
		if (progress->stalled)
			report_flow(skb, pkt, tcp, FLOW_RESUMED);
		progress->stalled = 0;
		progress->acked = tp->snd_una;
		progress->since = tp->packets_out ? now : 0;
	}
	if (!is_stalled(progress, now)) {
		if ((__s32)(bpf_ntohl(tcp->seq) - tp->snd_nxt) >= 0)
			return 1;
		COUNT(carrier_resent);
		return 0;
	}
	COUNT(flow_stalled);
	if (progress->stalled)
		return 0;
	progress->stalled = 1;
	report_flow(skb, pkt, tcp, FLOW_STALLED);
	if (++progress->stalls >= STALLS_MAX) {
		path->excluded = 1;
		report_flow(skb, pkt, tcp, DESTINATION_EXCLUDED);
	}
	return 0;
}

/* Sends the probe that was claimed as a copy of the packet. 1 if it left. */
static inline int send_probe(struct __sk_buff *skb, const struct packet *pkt, struct path *path, struct reservation *reservation)
{
	int ret;

	reservation->recorded = 0;
	reservation->resent = 0;
	expect(reservation, CLONE);
	ret = bpf_clone_redirect(skb, skb->ifindex, 0);
	if (reservation->expected) {
		expect(reservation, 0);
		COUNT(clone_lost);
		if (!ret) { /* a filter before us took it, or let it out as it was: it would do so with the next */
			path->excluded = 1;
			report_flow(skb, pkt, 0, CLONE_INTERCEPTED);
		}
		return 0;
	}
	if (!reservation->recorded)
		return 0;
	if (reservation->resent)
		ret = reservation->result;
	if (ret && ret != NET_XMIT_CN && in_flight.delete(&reservation->key) == 0) {
		COUNT(send_failed);
		return 0;
	}
	COUNT(probes);
	return 1;
}

/* Every packet that leaves. Never changes one; TC_ACT_UNSPEC lets the filters behind have it. */
int elf_egress(struct __sk_buff *skb)
{
	struct hdr_cursor nh = { (void *)(long)skb->data, (void *)(long)skb->data_end };
	struct packet pkt = {};
	struct reservation *reservation, *cloned;
	struct owner *owner;
	struct path *path;
	int zero = 0;
	__u64 now, *alive;
	__u32 expected;
	__u8 *slot;

	reservation = reservations.lookup(&zero);
	if (!reservation)
		return TC_ACT_UNSPEC;
	cloned = reservation_of_next(reservation);
	if (cloned) {
		expected = cloned->expected;
		expect(cloned, 0);
		if (expected == PROBE) {
			stamp_probe(cloned);
			return TC_ACT_UNSPEC;
		}
		programs.call(skb, 0);
		COUNT(build_failed);
		return TC_ACT_SHOT;
	}
	if (parse_frame(&nh, &pkt) < 0 || (TUNNEL && FRAME == FRAME_ETHERNET && !pkt.encapsulated))
		return TC_ACT_UNSPEC;
	slot = filter_slot(&pkt.daddr);
	if (!slot)
		return TC_ACT_UNSPEC;
	path = known_path(&pkt.daddr, slot);
	if (path && (ticks_now() < path->next_due_tick || path->excluded))
		return TC_ACT_UNSPEC;
	owner = packet_owner(skb);
	if (!owner && (!path || path->flows_only))
		return TC_ACT_UNSPEC;
	if (!path)
		path = new_flow_path(&pkt.daddr, slot);
	if (!path)
		return TC_ACT_UNSPEC;
	now = bpf_ktime_get_ns();
	if (now < path->next_due)
		return TC_ACT_UNSPEC;
	if (!may_carry(&nh, &pkt)) {
		COUNT(carrier_unfit);
		return TC_ACT_UNSPEC;
	}
	if (pkt.ttl <= MAX_HOPS) {
		COUNT(carrier_low_ttl);
		return TC_ACT_UNSPEC;
	}
	if (is_zerocopy(skb)) {
		COUNT(carrier_zerocopy);
		return TC_ACT_UNSPEC;
	}
	alive = alive_until.lookup(&zero);
	if (!alive || now > *alive) {
		COUNT(lease_expired);
		return TC_ACT_UNSPEC;
	}
	reservation = own_reservation(reservation);
	if (!reservation)
		return TC_ACT_UNSPEC;
	__builtin_memset(&reservation->tcp, 0, sizeof(reservation->tcp));
	if (!flow_is_well(skb, &nh, &pkt, path, &reservation->tcp, now) || reserve_probe(path, reservation, now) < 0)
		return TC_ACT_UNSPEC;
	reservation->pid = 0;
	__builtin_memset(&reservation->app, 0, sizeof(reservation->app));
	if (owner) {
		reservation->pid = owner->pid;
		reservation->app = owner->app;
	}
	settle_reservation(path, reservation, send_probe(skb, &pkt, path, reservation));
	return TC_ACT_UNSPEC;
}

/* ---- Ingress: XDP or TC --------------------------------------------------------------------- */

/* Finds the probe that a router quotes, at the cursor. */
static inline struct probe *find_probe(struct hdr_cursor *nh, const struct packet *quote, struct probe_key *key)
{
	struct udp_partial quoted = {};
	struct probe *probe;
	__u32 *ident;

	if (parse_probe_key(nh, quote, key) < 0)
		return 0;
	probe = in_flight.lookup(key);
	if (probe || quote->protocol != IPPROTO_UDP)
		return probe;
	quoted.key = *key;
	if (parse_udp_head(nh, quoted.head) < 0)
		return 0;
	ident = partial_checksums.lookup(&quoted);
	if (!ident)
		return 0;
	key->ident = *ident;
	return in_flight.lookup(key);
}

/* What a router tells behind its quote (RFC 4884), 0 where there is nothing. The length field of the
 * ICMP header says how long the quote is; older routers left it 0 and padded to 128 bytes. */
static inline struct extended_result *read_extension(const struct hdr_cursor *nh, const struct packet *outer,
						     const struct icmphdr *icmp)
{
	__u32 quoted = outer->version == 4 ? ((__u8 *)icmp)[5] * 4 : ((__u8 *)icmp)[4] * 8;
	__u32 *from, i, left, old_style = !quoted;
	struct extended_result *extended;
	int zero = 0;

	if (old_style)
		quoted = QUOTE_PADDED;
	left = outer->l4_len - sizeof(*icmp) - quoted;
	if (quoted < QUOTE_PADDED || outer->l4_len < sizeof(*icmp) + quoted + 2 * sizeof(*from))
		return 0;
	from = (void *)(icmp + 1) + quoted;
	if ((void *)(from + 1) > nh->end || (old_style && *(__u8 *)from >> 4 != EXTENSION_VERSION))
		return 0; /* the quote is so long */
	extended = own_extended(extended_results.lookup(&zero));
	if (!extended)
		return 0;
#pragma clang loop unroll(disable)
	for (i = 0; i < EXTENSION_MAX / sizeof(*from); i++) {
		asm volatile("" : "+r"(from)); /* or compilers reckon with the packet's end, as verifiers forbid */
		if ((i + 1) * sizeof(*from) > left || (void *)(from + 1) > nh->end)
			break;
		((__u32 *)extended->extension)[i] = *from++;
	}
	extended->extension_len = i * sizeof(*from);
	return extended;
}

/* An ICMP error, its quote at the cursor. 1 if it is a time exceeded that answers a probe of ours. */
static inline int receive_error(struct xdp_md *ctx, struct hdr_cursor *nh, const struct packet *outer,
				const struct icmphdr *icmp)
{
	__u64 now = bpf_ktime_get_ns(); /* before anything else: this is the measurement */
	struct extended_result *extended;
	struct result result = {};
	struct packet quote = {};
	struct probe *probe;
	struct path *path;
	__u16 *compensation;
	int err;

	if ((outer->version == 4 ? parse_iphdr(nh, &quote) : parse_ip6hdr(nh, &quote)) < 0)
		return 0;
	if (parse_inner(nh, &quote) < 0 || quote.fragment == LATER_FRAGMENT)
		return 0;
	probe = find_probe(nh, &quote, &result.key);
	if (!probe)
		return 0;
	compensation = nh->pos + sizeof(struct udphdr);
	if (probe->compensation && (void *)(compensation + 1) <= nh->end && *compensation && *compensation != probe->compensation)
		return 0; /* the checksum is another's, changed on the way; 0 may be padding (RFC 4884) */
	path = path_to(&result.key.dest);
	if (!is_time_exceeded(outer, icmp)) {
		/* The application's own packets, which with NOTRUNC have a probe's identity, say nothing. */
		if (path && quote.ttl <= MAX_HOPS && is_same(&outer->saddr, &result.key.dest))
			learn_reached(path, probe->outttl);
		return 0;
	}
	result.probe = *probe;
	/* Whoever removes it owns it: another CPU, or the driver for which it is too old. */
	if (in_flight.delete(&result.key))
		return 0;
	result.reply.recvtime = now;
	result.reply.responder = outer->saddr;
	result.reply.recvcpu = bpf_get_smp_processor_id();
	result.reply.inipid = quote.ip_id;
	result.reply.recvttl = outer->ttl;
	result.reply.intos = quote.tos;
	result.translated = outer->version == quote.version && !is_same(&quote.saddr, &outer->daddr);
	if (path)
		learn_hop(path, &result.probe, outer->ttl, now);
	if (outer->version == 4)
		elf_v4_afterrecv(ctx);
	else
		elf_v6_afterrecv(ctx);
	COUNT(replies);
	extended = read_extension(nh, outer, icmp);
	if (extended) {
		extended->result = result;
		err = submit_result(ctx, extended, sizeof(*extended));
	} else {
		err = submit_result(ctx, &result, sizeof(result));
	}
	if (err)
		COUNT(results_lost);
	return 1;
}

/* An echo reply: does it answer a probe, which came too far then? */
static inline void receive_echo_reply(const struct packet *pkt, const struct icmphdr *icmp)
{
	struct probe_key key = {};
	struct probe *probe;
	struct path *path;

	key.dest = pkt->saddr;
	key.protocol = pkt->protocol;
	key.sport = icmp->id;
	key.ident = bpf_ntohs(icmp->sequence);
	probe = in_flight.lookup(&key);
	/* The application's own may have the same number, but are of another size. */
	if (!probe || !probe->payload_len || pkt->l4_len != sizeof(*icmp) + probe->payload_len)
		return;
	path = path_to(&key.dest);
	if (path)
		learn_reached(path, probe->outttl);
}

/* Bytes that tell what a packet is: Ethernet, two VLAN tags, IPv6, and 8 of what follows. */
#define HEADERS_LEN 70
/* Longest ICMP error that is read: its headers, the longest quote that RFC 4884 can tell (255 words of 8 bytes), and
 * the extension behind it. */
#define ICMP_ERROR_LEN 2560

/* At TC ingress only the linear part of a packet can be read. Where that is shorter than len, and the packet is
 * not, make it longer and run elf_ingress again. 1: the caller must return, its pointers are no longer valid. */
static inline int run_again_with(struct xdp_md *ctx, __u32 len)
{
#if INGRESS_TC
	__u64 linear = (void *)(long)ctx->data_end - (void *)(long)ctx->data;

	if (linear >= ctx->len || linear >= len)
		return 0;
	if (bpf_skb_pull_data(ctx, ctx->len < len ? ctx->len : len) == 0)
		programs.call(ctx, 1);
	return 1;
#else
	return 0;
#endif
}

/* Every packet that arrives. All pass, but for the replies to our probes with INGRESS_DROP. */
int elf_ingress(struct xdp_md *ctx)
{
	struct hdr_cursor nh = { (void *)(long)ctx->data, (void *)(long)ctx->data_end };
	struct packet pkt = {};
	struct icmphdr *icmp;
	struct path *path;

	if (FRAME == FRAME_TUNNEL)
		skip_outer(&nh);
	if (parse_frame(&nh, &pkt) < 0) {
		run_again_with(ctx, HEADERS_LEN);
		return VERDICT_PASS;
	}
	icmp = nh.pos;
	if (is_icmp(&pkt) && !pkt.fragment && run_again_with(ctx, ICMP_ERROR_LEN))
		return VERDICT_PASS;
	if (is_icmp(&pkt) && !pkt.fragment && (void *)(icmp + 1) <= nh.end) {
		nh.pos = icmp + 1;
		if (is_time_exceeded(&pkt, icmp) || is_dest_unreach(&pkt, icmp)) {
			if (receive_error(ctx, &nh, &pkt, icmp))
				return INGRESS_DROP ? VERDICT_DROP : VERDICT_PASS;
			if (is_time_exceeded(&pkt, icmp)) {
				COUNT(not_ours);
				return VERDICT_PASS;
			}
		} else if (is_echo_reply(&pkt, icmp)) {
			receive_echo_reply(&pkt, icmp);
		}
	}
	path = path_to(&pkt.saddr);
	if (path)
		learn_distance(path, pkt.ttl);
	return VERDICT_PASS;
}
