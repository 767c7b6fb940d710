"""The models of a server, each with an engine in a process of its own: which of them are loaded, and for how long.

Owner of every engine. Whoever uses a model enters it and leaves it, and in between its engine is not ended. Without a
`keep_alive` all are loaded at the start and stay. With one, a model is loaded when somebody enters it, those who come
meanwhile wait for it, and its engine is ended when nobody has been there for so many seconds, or earlier if another
model needs the memory.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import msgspec

from afterword.engine.protocol import Card, Load, Promise
from afterword.engine.supervisor import LATER, Policy, State, Supervisor
from afterword.engine.tally import Tally
from afterword.errors import AfterwordError, LoadFailed, Overloaded, WaitedTooLong
from afterword.tasks import Work, logged

HostState = State | Literal["unloaded"]
"""`starting`: its turn to be loaded will come, or it is being loaded."""

POLICY = Policy()

_LOADING = "The model is being loaded. Please try again later."
_NO_ROOM = "The memory that this model needs is in use for other models. Please try again later."
_ENDS = "The server is shutting down."
_log = logging.getLogger("afterword")


@dataclass(frozen=True, slots=True)
class Offer:
    """A model as far as it is known without loading it.

    `created` is in Unix seconds, `context` in tokens, `needs` in bytes of memory. `make` makes an engine that is not
    open yet. `tip` is a sentence for whoever runs the server.
    """

    id: str
    created: int
    make: Callable[[], Supervisor]
    context: int = 0
    sequences: int = 0
    promise: Promise = "none"
    needs: int = 0
    tip: str | None = None


class Host:
    """A model and the engine that it has at the moment. Its roster changes it, others read."""

    def __init__(self, offer: Offer, *, kept: bool = True) -> None:
        self.offer = offer
        self.engine: Supervisor | None = None
        self.told: Card | None = None  # by the last engine that has ended
        self.tally = Tally()  # of one engine after the other
        self.users = 0
        self.waiting = 0
        self.turn = 0  # of the last who entered or left it
        self.loading: asyncio.Task[AfterwordError | None] | None = None
        self.alarm: asyncio.TimerHandle | None = None
        self._kept = kept

    @property
    def id(self) -> str:
        """Its name in requests."""
        return self.offer.id

    @property
    def state(self) -> HostState:
        """What it is at."""
        if self.engine is not None:
            return self.engine.state
        return "starting" if self._kept or self.loading else "unloaded"

    @property
    def load(self) -> Load:
        """How busy it is; those who wait until it is loaded are waiting too."""
        load = self.engine.load if self.engine else Load()
        return msgspec.structs.replace(load, waiting=load.waiting + self.waiting) if self.waiting else load

    @property
    def restarts(self) -> int:
        """How often the engine that it has now was replaced."""
        return self.engine.restarts if self.engine else 0

    @property
    def card(self) -> Card | None:
        """What its engine says of the model, or the last one said that had loaded it."""
        return self.up.card if self.up else self.told

    @property
    def promise(self) -> Promise:
        """What an engine that had loaded the model promises of its numbers; until then the most that there can be."""
        return self.card.promise if self.card else self.offer.promise

    @property
    def up(self) -> Supervisor | None:
        """Its engine, if that has loaded the model."""
        return self.engine if self.engine and self.engine.state != "starting" else None


class Roster:
    """All models of a server, in the order in which they were named. One event loop calls everything.

    `free` says how many bytes of memory can be taken at the moment.
    """

    def __init__(
        self,
        offers: Sequence[Offer],
        *,
        keep_alive: float | None = None,
        policy: Policy = POLICY,
        free: Callable[[], int] = lambda: 2**63,
    ) -> None:
        self.keep_alive = keep_alive
        self._hosts = {offer.id: Host(offer, kept=keep_alive is None) for offer in offers}
        self._policy = policy
        self._free = free
        self._budget = free()
        self._turns = itertools.count(1)
        self._moving = asyncio.Lock()  # models come and go one after the other
        self._moves: set[asyncio.Task[None]] = set()
        self._closed = False

    def __iter__(self) -> Iterator[Host]:
        return iter(self._hosts.values())

    def __len__(self) -> int:
        return len(self._hosts)

    def get(self, name: str) -> Host | None:
        """The model of that name."""
        return self._hosts.get(name)

    # ---- life

    async def open(self) -> None:
        """Load what is to be there from the start. Raises `SettingError` if that fails."""
        if self.keep_alive is None:
            for host in self:
                async with self._moving:
                    await self._start(host)

    async def close(self) -> None:
        """End every engine and whatever it is doing."""
        self._closed = True
        for host in self:
            self._hush(host)
        loading = [host.loading for host in self if host.loading]
        for task in loading:
            task.cancel()
        await asyncio.gather(*loading, return_exceptions=True)
        await asyncio.gather(*self._moves)
        await asyncio.gather(*(host.engine.close() for host in self if host.engine))

    # ---- whoever uses a model

    async def enter(self, host: Host) -> Supervisor:
        """Its engine, loaded, which is not ended until `leave`.

        Raises `Overloaded`, `WaitedTooLong` and `LoadFailed`, and then it was not entered.
        """
        if self._closed:
            raise Overloaded(_ENDS)
        host.users += 1
        self._hush(host)
        try:
            return host.up or await self._loaded(host)
        except BaseException:
            self.leave(host)
            raise

    def leave(self, host: Host) -> None:
        """Somebody who has entered it needs it no more."""
        host.users -= 1
        host.turn = next(self._turns)
        self._set_alarm(host)

    def check_started(self) -> None:
        """Nothing is told of models that are still to be loaded. Raises `Overloaded`."""
        for host in self if self.keep_alive is None else ():
            self.check_loaded(host)

    def check_loaded(self, host: Host, unloaded: str = _LOADING) -> Supervisor:
        """Its engine, loaded. Raises `Overloaded` if it is not, which says `unloaded` if it is not being loaded."""
        if host.up is None:
            raise Overloaded(unloaded if host.state == "unloaded" else _LOADING, code="loading", retry_after=5)
        return host.up

    def check_room(self, host: Host) -> None:
        """To be asked before any work is done for a request. Raises `Overloaded` if no job would be accepted."""
        if self._closed:
            raise Overloaded(_ENDS)
        if host.up or self.keep_alive is None:
            self.check_loaded(host).check_room()
        elif host.waiting >= self._policy.queue:
            raise Overloaded(LATER)

    async def _loaded(self, host: Host) -> Supervisor:
        """Wait until it is loaded, as long as anything may wait here."""
        self.check_room(host)
        host.loading = host.loading or asyncio.create_task(self._load(host))
        host.waiting += 1
        try:
            done, _ = await asyncio.wait({host.loading}, timeout=self._policy.queue_seconds or None)
        finally:
            host.waiting -= 1
        if not done:
            raise WaitedTooLong()
        (task,) = done
        problem = Overloaded(_ENDS) if task.cancelled() else task.result()
        if problem is not None:
            raise problem
        assert host.engine is not None
        return host.engine

    # ---- coming and going

    async def _load(self, host: Host) -> AfterwordError | None:
        """Load it, and end the engines of others if there is no other way. What went wrong, for those who wait."""
        try:
            async with self._moving:
                await self._make_room(host)
                await self._start(host)
        except Overloaded as problem:
            return problem
        except (AfterwordError, OSError) as problem:
            _log.warning("The model %s could not be loaded: %s", host.id, problem)
            return LoadFailed(host.id)
        except Exception:
            _log.exception("The model %s could not be loaded", host.id)
            return LoadFailed(host.id)
        finally:
            host.loading = None
            self._set_alarm(host)  # those who waited may all have left
        return None

    async def _start(self, host: Host) -> None:
        host.engine = engine = host.offer.make()
        engine.tally = host.tally
        try:
            await engine.open()
        except BaseException:
            await self._end(host)
            raise

    async def _make_room(self, wanted: Host) -> None:
        """End engines that nobody uses, those unused for longest first, until it fits. Raises `Overloaded`."""
        while wanted.offer.needs > self._room():
            idle = [host for host in self if host.engine and not _busy(host)]
            if not idle:
                raise Overloaded(_NO_ROOM, retry_after=5)
            await self._end(min(idle, key=lambda host: host.turn))

    def _room(self) -> int:
        """Bytes for another model: what is left of those at the start, or less where other programs have taken some."""
        return min(self._free(), self._budget - sum(host.offer.needs for host in self if host.engine))

    async def _end(self, host: Host) -> None:
        self._hush(host)
        if host.engine is not None:
            host.told = host.card
            engine, host.engine = host.engine, None
            await asyncio.shield(self._begin(engine.close))

    def _set_alarm(self, host: Host) -> None:
        """Look at it again when it has been unused for long enough."""
        self._hush(host)
        if self.keep_alive is not None and host.engine and not host.users and not self._closed:
            host.alarm = asyncio.get_running_loop().call_later(self.keep_alive, self._expire, host)

    def _hush(self, host: Host) -> None:
        if host.alarm is not None:
            host.alarm.cancel()
            host.alarm = None

    def _expire(self, host: Host) -> None:
        self._begin(partial(self._end_unused, host))

    def _begin(self, move: Work) -> asyncio.Task[None]:
        """Something that is carried through, whoever waits for it."""
        task = logged(move, "model load or unload")
        self._moves.add(task)
        task.add_done_callback(self._moves.discard)
        return task

    async def _end_unused(self, host: Host) -> None:
        async with self._moving:
            if host.engine and not _busy(host):
                await self._end(host)
            else:
                self._set_alarm(host)


def _busy(host: Host) -> bool:
    return host.users > 0 or host.load.running > 0 or host.load.waiting > 0
