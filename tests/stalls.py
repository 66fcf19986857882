"""Applications, a network and firewalls, simulated around the path model of elfprobe.c: who stalls, and why."""

from __future__ import annotations

import heapq
import math
import random
from itertools import count
from typing import Any, Callable, Sequence

from path_model import Flow, Look, PathModel, Reception, new_path

MS, SECOND = 10**6, 10**9  # ns
START = 1000 * SECOND
CWND = 10
TCP, UDP = 6, 17
REPEATS_TIME = 150 * MS  # of elfprobe.c


class Network:
    """A path of `hops` routers to one destination: outages, loss, a firewall at hop `firewall`.

    `block`: ns for which the firewall blocks a flow that had more than `counted` packets with a low TTL; 0: it does
    not. `drops`: it also drops these packets, so that nobody answers them. `lowers`: it lowers the TTL of the flow
    for good, in the forward direction only. `outages` are (hop, begin, end), for one connection out of `share`.
    Routers from `silent` on do not answer. `forgets`: ns after which a NAT forgets an idle flow.
    """

    def __init__(
        self,
        model: PathModel,
        hops: int = 4,
        rtt: int = 10 * MS,
        block: int = 0,
        counted: int = 0,
        lowers: bool = False,
        drops: bool = False,
        outages: Sequence[tuple[int, int, int]] = (),
        share: int = 1,
        firewall: int = 2,
        loss: float = 0.0,
        forgets: int = 0,
        silent: int = 1 << 8,
    ) -> None:
        self.share, self.forgets, self.firewall = share, forgets, firewall
        self._seen: dict[Any, int] = {}
        self.model, self.hops, self.rtt = model, hops, rtt
        self.block, self.lowers, self.drops = block, lowers, drops
        self.outages = [(hop, START + begin, START + end) for hop, begin, end in outages]
        self.loss, self.random, self.counted, self.silent = loss, random.Random(1), counted, silent
        self.path = new_path(length=hops + 1, reverse=hops + 1)
        self.now, self._events, self._number = START, [], count()
        self.rows: list[tuple[int, int, bool]] = []  # sent, TTL, whether it is answered
        self.blocked: dict[Any, int] = {}
        self.low: dict[Any, int] = {}
        self.connections = self.moved = 0

    def at(self, time: int, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time, next(self._number), action))

    def after(self, delay: int, action: Callable[[], None]) -> None:
        self.at(self.now + delay, action)

    def run(self, seconds: float) -> None:
        end = self.now + int(seconds * SECOND)
        while self._events and self._events[0][0] <= end:
            self.now, _, action = heapq.heappop(self._events)
            action()
        self.now = end

    def passes(self, flow: Any, ttl: int = 64, forward: bool = True) -> bool:
        """Whether a packet gets as far as that."""
        if self.is_down(flow, ttl):
            return False
        if ttl >= self.firewall and self.now < self.blocked.get(flow, 0) and (forward or not self.lowers):
            return False
        if self.forgets and flow is not None:
            if self.now - self._seen.get(flow, self.now) > self.forgets:
                return False
            self._seen[flow] = self.now
        return self.random.random() >= self.loss

    def is_down(self, flow: Any, ttl: int) -> bool:
        if flow is not None and flow.number % self.share:
            return False
        return any(begin <= self.now < end and ttl >= hop for hop, begin, end in self.outages)

    def probe(self, connection: Any) -> None:
        """A packet of the flow may carry a probe."""
        path, now, model = self.path, self.now, self.model
        if now < path.pacing.next_due:
            return
        ttl = model.choose_hop(path, now, 0)
        if ttl <= 0:
            return
        form = model.probe_form(path, ttl, 0, 0)
        model.probe_sent(path, ttl, form, now, model.probe_reserved(path, ttl, now, 0), now)
        model.flow_probed(path, connection.protocol, connection.flow, ttl, form, now)
        answered = self.passes(connection, ttl) and not (self.drops and ttl >= self.firewall)
        self.rows.append((now, ttl, answered))
        if answered and ttl <= self.hops and ttl < self.silent:
            self.after(self.rtt * ttl // (self.hops + 1), lambda: self._reply(ttl, form, now))
        if ttl >= self.firewall and (self.block or self.lowers) and not self.is_down(connection, self.firewall):
            self.low[connection] = self.low.get(connection, 0) + 1
            if self.low[connection] > self.counted:
                self.blocked[connection] = now + (self.block or 1 << 60)

    def _reply(self, ttl: int, form: int, sent: int) -> None:
        self.model.hop_replied(self.path, ttl, form, sent, ttl, 0, self.now)


class Connection:
    """A TCP connection, from its SYN on."""

    protocol = TCP

    def __init__(self, net: Network) -> None:
        self.net, self.flow = net, Flow()
        net.connections += 1
        self.number = net.connections
        self.una = self.next = self.received = self.segments = self.timeouts = 0
        self.is_open, self.is_established = True, False
        self.last_moved = net.now
        self._timer = 0  # number of the running one
        self.closing = False

    def look(self) -> None:
        """A packet leaves: a SYN before the connection is established."""
        net = self.net
        if net.path.excluded or net.now < net.path.pacing.next_due:
            return
        position = 1 + self.una + self.received if self.is_established else 0
        look = Look(
            position, self.segments, self.timeouts, self.next - self.una, net.rtt // 1000,
            0, 0, 0, REPEATS_TIME,
        )  # fmt: skip
        may_carry = net.model.flow_looked(net.path, TCP, self.flow, look, 1, net.now)
        if may_carry and self.is_established and not self.closing:
            net.probe(self)

    # Upload

    def send(self, resend: bool = False) -> None:
        """The application has a segment; or the first one is sent again."""
        net = self.net
        if not resend:
            if self.next - self.una >= CWND or not self.is_open:
                return
            self.next += 1
            if self.next - self.una == 1:
                self._arm()
        upto = self.next
        self.look()
        if net.passes(self):
            net.after(net.rtt // 2, lambda: self._acknowledge(upto))

    def _acknowledge(self, upto: int) -> None:
        net = self.net
        if net.passes(self, forward=False):
            net.after(net.rtt // 2, lambda: self._acknowledged(upto))

    def _acknowledged(self, upto: int) -> None:
        if upto > self.una:
            self.una, self.timeouts = upto, 0
            self._moved()
            self._arm()

    def _moved(self) -> None:
        self.last_moved = self.net.now
        self.net.moved += 1

    def _arm(self) -> None:
        self._timer += 1
        if self.next > self.una and (self.is_open or self.closing):
            number = self._timer
            delay = (200 * MS + self.net.rtt) << self.timeouts
            self.net.after(delay, lambda: self._expired(number))

    def _expired(self, number: int) -> None:
        if number == self._timer and self.next > self.una and self.timeouts < 12:
            self.timeouts += 1
            self.send(resend=True)
            self._arm()

    # Download

    def serve(self, interval: int) -> None:
        """The server sends a segment every so often, and again what is not acknowledged."""
        net, state = self.net, dict(una=0, next=0, timeouts=0, timer=0)

        def arm() -> None:
            state['timer'] += 1
            number = state['timer']
            net.after((200 * MS + net.rtt) << state['timeouts'], lambda: expired(number))

        def expired(number: int) -> None:
            if number == state['timer'] and state['next'] > state['una'] and state['timeouts'] < 12:
                state['timeouts'] += 1
                transmit(state['una'] + 1)
                arm()

        def transmit(segment: int) -> None:
            if net.passes(self, forward=False):
                net.after(net.rtt // 2, lambda: arrived(segment))

        def arrived(segment: int) -> None:
            self.segments += 1
            if segment == self.received + 1:
                self.received += 1
                self._moved()
            if not self.is_open:
                return
            self.look()
            if net.passes(self):
                upto = self.received
                net.after(net.rtt // 2, lambda: acknowledged(upto))

        def acknowledged(upto: int) -> None:
            if upto > state['una']:
                recovers = state['timeouts'] > 0
                state.update(una=upto, timeouts=0)
                arm()
                if recovers and state['next'] > upto:  # what was lost behind it
                    state['timeouts'] = 0
                    state['recover'] = state['next']
                if upto < state.get('recover', 0):
                    transmit(upto + 1)

        def produce() -> None:
            if self.is_open:
                if state['next'] - state['una'] < CWND:
                    state['next'] += 1
                    if state['next'] - state['una'] == 1:
                        arm()
                    transmit(state['next'])
                net.after(interval, produce)

        produce()

    def close(self, reset: bool = False) -> None:
        self.is_open = False
        if not reset:
            self.closing = True
            self.next += 1
            self.look()
            if self.net.passes(self):
                upto = self.next
                self.net.after(self.net.rtt // 2, lambda: self._acknowledge(upto))
            self._arm()


class Conversation:
    """A flow of UDP. Each request is answered after `delay`, but not between these two seconds of its life."""

    protocol = UDP

    def __init__(self, net: Network, port: int = 7, delay: int = 0, mute: tuple[float, float] = (0, 0)) -> None:
        self.port = port
        self.net, self.flow, self.received = net, Flow(), Reception()
        net.connections += 1
        self.number, self.begin, self.last_moved = net.connections, net.now, net.now
        self._delay, self._mute = delay, [net.now + int(each * SECOND) for each in mute]

    def send(self) -> None:
        net, look = self.net, Look(srtt=self.net.rtt // 1000, port=self.port)
        if not net.path.excluded and net.now >= net.path.pacing.next_due:
            if net.model.look_at_conversation(net.path, self.received, self.flow, look, net.now):
                may_carry = net.model.flow_looked(net.path, UDP, self.flow, look, 1, net.now)
            else:
                is_probed = self.flow.last_probed > 0
                may_carry = net.model.may_begin_probed(net.path, UDP, self.port, is_probed, net.now)
            if may_carry:
                net.probe(self)
        if net.passes(self):
            net.after(net.rtt // 2 + self._delay, self._answer)

    def _answer(self) -> None:
        net = self.net
        if not self._mute[0] <= net.now < self._mute[1] and net.passes(self, forward=False):
            net.after(net.rtt // 2, self._answered)

    def _answered(self) -> None:
        self.last_moved = self.net.now
        self.net.moved += 1
        self.net.model.flow_received(self.net.path, self.received, self.flow, self.net.now)


class Talk:
    """Sends requests over one UDP flow after the other; gives up after `patience`, and begins anew.

    After 20 requests it says nothing for `rest`, and nothing more after `end` seconds.
    """

    def __init__(
        self, net: Network, kind: str = 'requests', interval: int = 10 * MS, patience: int = 3500 * MS,
        life: int = 0, rest: int = 0, end: float = math.inf, **answers: Any,
    ) -> None:  # fmt: skip
        self._rest, self._end, self._sent = rest, net.now + end * SECOND, 0
        self.net, self._interval, self._patience, self._life = net, interval, patience, life
        self._answers, self.lost = answers, 0
        self.connection = Conversation(net, **answers)
        self._tick()

    def _tick(self) -> None:
        net, flow = self.net, self.connection
        is_lost = net.now - flow.last_moved > self._patience
        self.lost += is_lost
        if is_lost or (self._life and net.now - flow.begin > self._life):
            self.connection = Conversation(net, **self._answers)
        self.connection.send()
        self._sent += 1
        if net.now < self._end:
            net.after(self._rest if self._rest and self._sent % 20 == 0 else self._interval, self._tick)


class Application:
    """Keeps `kind` of traffic going over one connection after the other; gives up after `patience`."""

    def __init__(
        self, net: Network, kind: str = 'upload', interval: int = 10 * MS, patience: int = 3500 * MS,
        reset: bool = False, life: int = 0, pause: int = 0,
    ) -> None:  # fmt: skip
        self.net, self.kind, self.interval, self.patience = net, kind, interval, patience
        self.reset, self.life, self.pause = reset, life, pause
        self.connections = self.lost = 0
        self._connect(Connection(net))

    def _connect(self, connection: Connection, tries: int = 0) -> None:
        net = self.net
        connection.timeouts, connection.next = tries, 1
        connection.look()
        connection.timeouts = connection.next = 0
        if net.passes(None):
            net.after(net.rtt, lambda: self._connected(connection))
        else:
            net.after(SECOND << tries, lambda: self._connect(connection, min(tries + 1, 6)))

    def _connected(self, connection: Connection) -> None:
        self.connections += 1
        self.connection, self._since = connection, self.net.now
        connection.is_established, connection.last_moved = True, self.net.now
        if self.kind == 'download':
            self.connection.serve(self.interval)
        self._tick()

    def _tick(self) -> None:
        net, connection = self.net, self.connection
        waits = self.kind == 'download' or connection.next > connection.una
        if waits and net.now - connection.last_moved > self.patience:
            self.lost += 1
            connection.close(self.reset)
            self._connect(Connection(net))
            return
        if self.life and net.now - self._since > self.life:
            connection.close()
            net.after(self.pause, lambda: self._connect(Connection(net)))
            return
        if self.kind == 'upload':
            connection.send()
        net.after(self.interval, self._tick)
