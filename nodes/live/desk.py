"""Questions of pages, answered one at a time, in a thread that nothing else of the server waits for."""

import asyncio
import concurrent.futures
from dataclasses import dataclass, field

MOST_WAITING = 100


class Replaced(Exception):
    """The same asker has asked something newer, or has gone."""


class Full(Exception):
    """Too many are waiting."""


@dataclass
class _Question:
    key: object
    args: tuple
    answer: asyncio.Future
    askers: set = field(default_factory=set)
    wanted: list = field(default_factory=list)


class Desk:
    """answer(*args) is what takes time. All methods belong to the event loop's thread."""

    def __init__(self, answer):
        self._answer = answer
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="guidance-interval")
        self._waiting = {}  # Asker -> its question, in the order of their first one: a newer one keeps the place.
        self._open = {}  # Key -> question, waiting or under way.
        self._busy = False

    async def ask(self, asker, key, args, wanted=lambda: True):
        """answer(*args), which equal questions, by `key`, share.

        A newer question of the same asker takes the place of one that waits. wanted(): whether anybody still listens.
        Raises Replaced and Full, and whatever answer raises.
        """
        question = self._open.get(key)
        if question is None:
            if len(self._open) >= MOST_WAITING and asker not in self._waiting:
                raise Full
            question = self._open[key] = _Question(key, args, asyncio.get_running_loop().create_future())
        question.wanted.append(wanted)
        before = self._waiting.get(asker)
        if before is not question:
            if before is not None:
                before.askers.discard(asker)
                if not before.askers:
                    self._close(before, error=Replaced())
            question.askers.add(asker)
            self._waiting[asker] = question
        self._next()
        return await asyncio.shield(question.answer)

    def _next(self):
        while self._waiting and not self._busy:
            question = self._waiting.pop(next(iter(self._waiting)))
            if self._open.get(question.key) is not question:
                continue  # Answered for another asker.
            if not any(wanted() for wanted in question.wanted):
                self._close(question, error=Replaced())
                continue
            self._busy = True
            work = asyncio.get_running_loop().run_in_executor(self._thread, self._answer, *question.args)
            work.add_done_callback(lambda work, question=question: self._done(question, work))

    def _done(self, question, work):
        self._busy = False
        if work.cancelled() or work.exception():
            self._close(question, error=work.exception() if not work.cancelled() else Replaced())
        else:
            self._close(question, work.result())
        self._next()

    def _close(self, question, result=None, error=None):
        self._open.pop(question.key, None)
        if question.answer.done():
            return
        if error is None:
            question.answer.set_result(result)
        else:
            question.answer.set_exception(error)
            question.answer.exception()  # Seen, if nobody listens any more.
