# SPDX-License-Identifier: GPL-3.0-only
"""The ways that flows to one destination take, where a router balances flows over several links."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Iterable, Iterator, NamedTuple, Tuple

from elf.addresses import PROTOCOLS
from elf.paths import Destination

if TYPE_CHECKING:
    from elf.summary import Flow, FlowKey

    Flows = Iterable[Tuple[FlowKey, Flow]]

FLOWS_COMPARED = 1024  # of a destination, the newest ones; to look at more takes too long
WAYS_SHOWN, FLOWS_SHOWN = 4, 4


class Way(NamedTuple):
    """The routers that some flows have in common, and not with all others."""

    responders: dict[int, str]  # by hop
    flows: list[FlowKey]
    last: int  # the last hop that answered flows of all ways; 0: there is none
    answered: int  # answers of that hop to the flows of this way
    mean: float | None  # latency of that hop to these flows, ns; None: no answer


def ways_to(destination: Destination, flows: Flows) -> list[Way]:
    """Return the ways that flows to a destination take, the fastest first; none if they do not differ.

    flows are those to it, the newest first.

    Flows differ if at some hop another router answered each, at the same time. A flow that is not known to have an
    answer from each of these hops is left out, since its way is not known. So is a hop at which the responders
    change within flows: it balances packets.
    """
    if all(len(hop.responders) < 2 for hop in destination.hops.values()):
        return []
    known = list(itertools.islice(flows, FLOWS_COMPARED))
    apart = [number for number, hop in sorted(destination.hops.items()) if are_apart(known, number, hop.changes)]
    by_way: dict[tuple[str, ...], list[tuple[FlowKey, Flow]]] = {}
    for key, flow in known:
        responders = tuple(flow.hops[number].responder if number in flow.hops else "" for number in apart)
        if all(responders):
            by_way.setdefault(responders, []).append((key, flow))
    if len(by_way) < 2:
        return []
    last = max(
        (number for number in destination.hops if all(answers(its, number)[0] for its in by_way.values())),
        default=0,
    )
    ways = []
    for responders, its in by_way.items():
        answered, total = answers(its, last)
        mean = total / answered if answered else None
        ways.append(Way(dict(zip(apart, responders)), [key for key, _ in its], last, answered, mean))
    return sorted(ways, key=lambda way: (way.mean or 0, -len(way.flows)))


def are_apart(flows: Flows, number: int, changes: int) -> bool:
    """Return whether different routers answered flows at a hop at the same time."""
    spans = sorted(
        (its.since, its.until, its.responder)
        for _, flow in flows
        for its in (flow.hops.get(number),)
        if its and its.responder
    )
    if changes >= len(spans):
        return False
    ends: dict[str, int] = {}  # by responder
    for begin, end, responder in spans:
        if any(begin < other for who, other in ends.items() if who != responder):
            return True
        ends[responder] = max(ends.get(responder, 0), end)
    return False


def answers(flows: Flows, number: int) -> tuple[int, int]:
    """Return the number of a hop's answers to these flows, and the sum of their latencies, ns."""
    found = [flow.updated_hops()[number] for _, flow in flows if number in flow.hops]
    return sum(its.answered for its in found), sum(its.total for its in found)


def ways_texts(ways: list[Way]) -> Iterator[str]:
    """Yield lines that tell the ways apart."""
    if not ways:
        return
    last = ways[0].last
    yield f"flows take {len(ways)} ways" + (
        f"; mean latency of hop {last}, ms, the fastest first:" if last else ":"
    )
    for way in ways[:WAYS_SHOWN]:
        routers = ", ".join(f"{responder} (hop {number})" for number, responder in way.responders.items())
        names = [f"{PROTOCOLS.get(protocol, protocol)} {sport}" for _, sport, _, protocol in sorted(way.flows)]
        named = ", ".join(names[:FLOWS_SHOWN]) + f" and {len(names) - FLOWS_SHOWN} more" * (
            len(names) > FLOWS_SHOWN
        )
        mean = "-" if way.mean is None else f"{way.mean / 1e6:.3f}"
        yield f"{mean:>12}  by {routers}: {named}"
    if len(ways) > WAYS_SHOWN:
        yield f"{'':12}  and {len(ways) - WAYS_SHOWN} more"
