# SPDX-License-Identifier: GPL-3.0-only
"""The counters of elfprobe.c in words: what became of the probes, and why there are none.

count is a dict of counters, by their names in elfprobe.c's struct counters.
"""

from __future__ import annotations

from typing import Iterator

LOST_PROBES = {  # why a probe was not made, or its reply not written
    "results_lost": "replies came faster than they could be written",
    "send_failed": "dropped by another filter, the queue or the device",
    "clone_lost": "copies were lost: no memory, a filter before ours, or a kind of device that this kernel "
                  "does not send copies to",
    "build_failed": "copies could not be trimmed",
    "key_busy": "identifier collision with a probe in flight",
    "in_flight_full": "no room for more probes in flight",
    "over_max_rate": "more than --max-rate",
}  # fmt: skip
UNFIT_PACKETS = {  # why a target's packet carried no probe
    "carrier_low_ttl": "TTL of 32 or less, as traceroute's",
    "carrier_unfit": "SYN, FIN, RST, fragments, other protocols",
    "carrier_resent": "retransmissions and keep-alives",
    "carrier_zerocopy": "sent with MSG_ZEROCOPY, and the kernel would tell the application that it was copied",
    "carrier_stamped": "they ask the network card for a time stamp, which their copies might get instead",
    "carrier_early": "the peer has not confirmed the TCP connection yet",
    "on_link": "the destination is on this link, with no router before it",
    "hop_unresponsive": "the next hop stopped responding and is backing off",
    "flow_stalled": "a flow had stalled, perhaps because of probes",
    "lease_expired": "elfprobe was stopped or starved",
    "hook_dropped": "a hook returned a negative number",
}
NEAR_SHOWN = 5  # destinations one hop away that are named


def in_words(words: dict[str, str], count: dict[str, int]) -> str:
    """Return the counters that are not 0, with the words for them."""
    return ", ".join(f"{name} {count[name]} ({words[name]})" for name in words if count[name])


def accounting(count: dict[str, int], rows: int) -> Iterator[str]:
    """Yield what went wrong with probes. Each probe is a row or a lost result: the sum is checked."""
    ended = rows + count["results_lost"]
    if count["probes"] != ended:
        yield f"this does not add up: {count['probes']} probes, of which {ended} ended"
    lost = in_words(LOST_PROBES, count)
    if lost:
        yield f"not measured: {lost}"


def why_no_probes(count: dict[str, int], near: list[str], device: str, is_known: bool) -> Iterator[str]:
    """Yield why there are no probes, to some destinations or at all.

    near are destinations one hop away. is_known: other reasons have been found.
    """
    if near:
        more = f" and {len(near) - NEAR_SHOWN} more" if len(near) > NEAR_SHOWN else ""
        yield f"one hop away, with no router between: {', '.join(near[:NEAR_SHOWN])}{more}"
    elif not count["probes"]:
        seen = in_words({**UNFIT_PACKETS, **LOST_PROBES}, count)
        if seen:
            yield f"packets of targets left, but none that could carry a probe: {seen}"
        elif not is_known:
            way = "'ip route get ADDRESS' names the device that leads to a destination"
            yield f"no packet of a target left by {device}; {way}"


def troubles(count: dict[str, int], malformed: int) -> Iterator[str]:
    """Yield what else went wrong. malformed is the number of replies with a malformed extension."""
    if malformed:
        yield f"malformed extensions (RFC 4884) of {malformed} replies are left out"
    if count["processes_full"]:
        yield f"no room for {count['processes_full']} target processes"
    if count["over_new_paths"]:
        what = f"{count['over_new_paths']} packets of target processes"
        yield f"{what} carried no probe: they went to more than 1000 new destinations a second"
    if count["events_lost"]:
        yield f"{count['events_lost']} events of processes or flows were not received"
    if count["reached"]:
        yield f"{count['reached']} probes reached their destination"
