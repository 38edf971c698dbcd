"""Requests, and the sources a simulation takes them from: an open loop, its lanes, and a closed loop.

A source is asked hundreds of thousands of times in a few seconds, so its state is plain attributes and integers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from heapq import heapify, heappop, heappush


class Request:
    """One request as it arrives; never changed afterwards. Compared by identity.

    Attributes:
        index: place in order of arrival, from 0.
        arrival_ps: integer picoseconds on the simulation's clock.
        prompt_tokens, output_tokens: at least 1 each.
        cached_prompt_tokens: prompt tokens that the traffic says are already cached, 0 to ``prompt_tokens``.
        prefix_hashes: one integer per hash block of the prompt, in order (``hash_block_tokens`` of the source each; the
            last may stand for a part of a block). Empty if unknown.
        client: the closed-loop client that sent it; -1 in open loops.
    """

    __slots__ = (
        "arrival_ps",
        "cached_prompt_tokens",
        "client",
        "index",
        "output_tokens",
        "prefix_hashes",
        "prompt_tokens",
    )

    def __init__(
        self,
        index: int,
        arrival_ps: int,
        prompt_tokens: int,
        output_tokens: int,
        cached_prompt_tokens: int = 0,
        prefix_hashes: tuple[int, ...] = (),
        client: int = -1,
    ) -> None:
        self.index = index
        self.arrival_ps = arrival_ps
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.cached_prompt_tokens = cached_prompt_tokens
        self.prefix_hashes = prefix_hashes
        self.client = client

    def __repr__(self) -> str:
        return (
            f"Request(index={self.index}, arrival_ps={self.arrival_ps}, prompt_tokens={self.prompt_tokens}, "
            f"output_tokens={self.output_tokens}, cached_prompt_tokens={self.cached_prompt_tokens}, "
            f"prefix_hashes=<{len(self.prefix_hashes)}>, client={self.client})"
        )


class RequestSource:
    """Hands out requests in order of arrival.

    Attributes:
        next_arrival_ps: arrival of the earliest request not yet taken; None if none is known now.
        exhausted: every request has been taken; no completion will bring another.
        hash_block_tokens: tokens per entry of ``Request.prefix_hashes``; 0 if the traffic has no hashes.
    """

    next_arrival_ps: int | None
    exhausted: bool
    hash_block_tokens: int = 0

    def take(self) -> Request:
        """The request of ``next_arrival_ps``, removed. Only while ``next_arrival_ps`` is not None."""
        raise NotImplementedError

    def completed(self, request: Request, now_ps: int) -> None:
        """Tells the source that a request has finished; an open loop does not care."""

    def notes(self) -> list[str]:
        """What a reader of the results must know about the traffic so far, such as skipped rows."""
        return []


class OpenLoop(RequestSource):
    """Arrivals that do not wait for completions: an iterator of requests with one look-ahead."""

    def __init__(
        self, requests: Iterator[Request], hash_block_tokens: int = 0, notes: Callable[[], list[str]] | None = None
    ) -> None:
        self.hash_block_tokens = hash_block_tokens
        self._requests = requests
        self._notes = notes
        self._advance()

    def _advance(self) -> None:
        ahead = self._ahead = next(self._requests, None)
        self.exhausted = ahead is None
        self.next_arrival_ps = None if ahead is None else ahead.arrival_ps

    def take(self) -> Request:
        request = self._ahead
        assert request is not None, "take() from an exhausted source"
        self._advance()
        return request

    def notes(self) -> list[str]:
        return self._notes() if self._notes else []


class ClosedLoop(RequestSource):
    """Clients with one request each in flight: a completion brings that client's next one after the think time.

    Lengths are drawn in order of arrival (ties by client number), so the n-th request is the same under every policy.
    All clients share ``num_requests``; none sends more than ``requests_per_client`` if that is given.
    """

    def __init__(
        self,
        starts_ps: Sequence[int],
        lengths: Iterator[tuple[int, int]],
        think_ps: int,
        num_requests: int,
        requests_per_client: int | None = None,
    ) -> None:
        per_client = num_requests if requests_per_client is None else requests_per_client
        self._waiting = [(start_ps, client) for client, start_ps in enumerate(starts_ps[:num_requests])]
        heapify(self._waiting)
        self._lengths = lengths
        self._think_ps = think_ps
        self._taken, self._num_requests = 0, num_requests
        self._unscheduled = num_requests - len(self._waiting)
        self._left = [per_client - 1] * len(self._waiting)
        self._in_flight = [False] * len(self._waiting)
        self.next_arrival_ps = self._waiting[0][0]
        self.exhausted = False

    def take(self) -> Request:
        arrival_ps, client = heappop(self._waiting)
        prompt_tokens, output_tokens = next(self._lengths)
        request = Request(self._taken, arrival_ps, prompt_tokens, output_tokens, 0, (), client)
        self._in_flight[client] = True
        self._taken += 1
        self.exhausted = self._taken == self._num_requests
        self.next_arrival_ps = self._waiting[0][0] if self._waiting else None
        return request

    def completed(self, request: Request, now_ps: int) -> None:
        client = request.client
        assert self._in_flight[client], f"client {client} has no request in flight"
        self._in_flight[client] = False
        if self._unscheduled and self._left[client]:
            self._unscheduled -= 1
            self._left[client] -= 1
            heappush(self._waiting, (now_ps + self._think_ps, client))
            self.next_arrival_ps = self._waiting[0][0]


class FrontEnd(RequestSource):
    """A source whose requests reach the engine `delay_ps` after they were sent: HTTP, tokenisation, queues between processes.

    They pass through side by side, so it limits no rate. `Request.arrival_ps` stays the moment of sending, which TTFT starts from.
    """

    def __init__(self, source: RequestSource, delay_ps: int) -> None:
        self.hash_block_tokens = source.hash_block_tokens
        self._source, self._delay_ps = source, delay_ps
        self._look()

    def _look(self) -> None:
        sent = self._source.next_arrival_ps
        self.exhausted = self._source.exhausted
        self.next_arrival_ps = None if sent is None else sent + self._delay_ps

    def take(self) -> Request:
        request = self._source.take()
        self._look()
        return request

    def completed(self, request: Request, now_ps: int) -> None:
        self._source.completed(request, now_ps)
        self._look()

    def notes(self) -> list[str]:
        return self._source.notes()


class Lane(RequestSource):
    """One replica's part of an open loop, split by a router whose choices depend on nothing that replicas do."""

    def __init__(self, split: Split, number: int) -> None:
        self.hash_block_tokens = split.source.hash_block_tokens
        self._split, self._number = split, number
        self._advance()

    def _advance(self) -> None:
        self.next_arrival_ps = self._split.next_arrival_ps(self._number)
        self.exhausted = self.next_arrival_ps is None

    def take(self) -> Request:
        request = self._split.queues[self._number].popleft()
        self._advance()
        return request


class Split:
    """Routes the requests of an open loop as far ahead as some lane looks.

    choose: picoseconds of an arrival → number of its lane; asked once for each request, in order.
    """

    def __init__(self, source: RequestSource, choose: Callable[[int], int], num_lanes: int) -> None:
        self.source, self._choose = source, choose
        self.queues: list[deque[Request]] = [deque() for _ in range(num_lanes)]
        self.lanes = [Lane(self, number) for number in range(num_lanes)]

    def next_arrival_ps(self, number: int) -> int | None:
        queue, source = self.queues[number], self.source
        while not queue and source.next_arrival_ps is not None:
            self.queues[self._choose(source.next_arrival_ps)].append(source.take())
        return queue[0].arrival_ps if queue else None
