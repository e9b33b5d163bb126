"""Keeps the slots of one machine at work: starts, restarts, stops and gives up their processes."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from queue import SimpleQueue

from tuner.errors import TunerError
from tuner.session import Session
from tuner.slots import SlotPlan
from tuner.supervisor._child import MARK, TAKEN, Child, Say, words
from tuner.supervisor._watch import Sight, Watch
from tuner.worker import raise_if_broken

TICK = 0.1
MAX_CRASHES = 5
HURRY_SECONDS = 5.0
SETTLING_SECONDS = 5.0
INTERRUPTED = 130

log = logging.getLogger(__name__)


class Supervisor:
    """One process per slot, as long as the study has tickets for it.

    Args:
        session: The study.
        plans: The slots.
        name: Under which name this machine works; its slots are ``name/0``, ``name/1``, ...
        command: What a slot's process is started with, by its plan and its worker's name.
        environment: What all of them get; by default this process's own.
        wait: Whether to stay while others train the last trials, should they get lost.
        grace: Seconds a slot has to finish its step and to keep its trial.
        stop: Whether somebody asked to stop; asked ten times a second.
        say: Takes what slots say.
        show: Takes what is known of the study, whenever it was read again.
    """

    def __init__(
        self,
        session: Session,
        plans: Sequence[SlotPlan],
        name: str,
        command: Callable[[SlotPlan, str], Sequence[str]],
        *,
        environment: Mapping[str, str] | None = None,
        wait: bool = True,
        grace: float = 60.0,
        stop: Callable[[], bool] = lambda: False,
        say: Say = lambda _, __: None,
        show: Callable[[Sight], None] = lambda _: None,
    ) -> None:
        self.environment = dict(os.environ if environment is None else environment)
        self.wait, self.grace, self.stop, self.say, self.show = wait, grace, stop, say, show
        self.lines: SimpleQueue[tuple[str, str]] = SimpleQueue()
        self.children = []
        for plan in plans:
            worker_id = f"{name}/{plan.name}"
            self.children.append(Child(plan, worker_id, command(plan, worker_id), self.lines))
        self.session = session
        self.watch = Watch(session, {child.worker_id for child in self.children})
        self.seen: Sight | None = None
        self.error: BaseException | None = None

    @property
    def alive(self) -> list[Child]:
        """The slots with a process."""
        return [child for child in self.children if child.alive]

    def run(self) -> str | None:
        """Work until the study has nothing left, or somebody asks to stop.

        Returns:
            None when somebody asked, else the reason: ``over``, or ``stop`` and why.

        Raises:
            TunerError: Something that the user can cure, said by a slot that left for it or by
                the fleet that was stopped for it; the other slots kept their trials.
            KeyboardInterrupt: Asked twice, or a slot was.
        """
        self.watch.start()
        try:
            return self._run()
        except KeyboardInterrupt:
            self._end_all(HURRY_SECONDS)
            raise
        finally:
            for child in self.alive:
                child.kill()
            self.watch.close()
            self._pass_on()

    def _run(self) -> str | None:
        while not self.stop():
            self._pass_on()
            for child in self.children:
                self._attend(child)
            self.error = self.error or self.watch.failure
            if self.error is not None:
                break
            reason = self._over()
            if reason is not None:
                return reason
            self._start_due()
            time.sleep(TICK)
        error = self.error
        self._end_all(self.grace)
        if error is not None:
            raise error
        return None

    def _pass_on(self) -> None:
        """Hand over what slots said, and what is new of the study."""
        while not self.lines.empty():
            self.say(*self.lines.get())
        sight = self.watch.sight
        if sight is not None and sight is not self.seen:
            self.seen = sight
            self.show(sight)

    def _attend(self, child: Child) -> None:
        """See whether a slot's process ended, and how."""
        code = child.end()
        if code is None:
            return
        self.watch.hurry()
        if code == INTERRUPTED:
            self.error = KeyboardInterrupt()
        elif code == 1 and child.message:
            self._blame(child)
        elif code == TAKEN and child.message:
            self._refuse(child)
        elif code != 0:
            pause = child.crashed()
            self.watch.counts_ended = True
            reason = f" ({child.message.removeprefix(MARK).strip()})" if child.message else ""
            self._warn(child, f"{words(code)}{reason}; it starts again in {pause:.1f} s")

    def _refuse(self, child: Child) -> None:
        """Leave a slot to another worker of its name; the last one's message is the error.

        Two workers that were started under one name share the slots so; neither ends the other.
        """
        child.given_up = child.refused = True
        if not all(other.given_up for other in self.children):
            self._warn(child, f"stays empty: {child.message.removeprefix(MARK).strip()}")
        elif all(other.refused for other in self.children):
            self._blame(child)

    def _blame(self, child: Child) -> None:
        """Keep a slot's message as the error; further ones are shown if they say other things."""
        error = TunerError(child.message.removeprefix(MARK).strip())
        if self.error is None and not self.stop():
            self.error = error
        elif str(self.error) != str(error):
            self._warn(child, f"says: {error}")

    def _warn(self, child: Child, text: str) -> None:
        log.warning("slot %s %s", child.plan.name, text)

    def _over(self) -> str | None:
        """Why to leave; None as long as there is, or may be, something to do."""
        if self.alive:
            return None
        if all(child.given_up for child in self.children):
            raise TunerError(
                f"every slot of this machine crashed {MAX_CRASHES} times in a row without ending "
                "a trial; the lines above say how"
            )
        sight = self.seen
        if sight is None or any(sight.at < child.ended_at for child in self.children):
            return None
        if sight.order.state == "stop":
            raise_if_broken(self.session, sight.order)
            return ": ".join(filter(None, ("stop", sight.order.reason, sight.order.detail)))
        if sight.order.state == "run" and not sight.waiting and not (sight.running and self.wait):
            return "over"
        return None

    def _start_due(self) -> None:
        """Start as many slots as there are tickets for, that are not another slot's already."""
        sight = self.seen
        if sight is None or sight.order.state == "stop":
            return
        training = {row["worker_id"] for row in sight.mine}
        room = sight.waiting - sum(child.worker_id not in training for child in self.alive)
        for child in self.children:
            if room > 0 and self._may_start(child, sight):
                self._start(child)
                room -= 1

    def _may_start(self, child: Child, sight: Sight) -> bool:
        """Whether a slot may start now, judged by what is known since its process ended."""
        if child.alive or child.given_up or sight.at < child.ended_at:
            return False
        ended = sight.ended.get(child.worker_id, 0)
        if ended > child.ended_before:
            child.ended_before, child.crashes = ended, min(child.crashes, 1)
        if child.crashes >= MAX_CRASHES:
            child.given_up = True
            self._warn(child, f"crashed {child.crashes} times in a row; it is given up")
            return False
        return time.monotonic() >= child.not_before

    def _start(self, child: Child) -> None:
        try:
            child.start(self.environment)
        except OSError as error:
            child.ended_at = time.monotonic()
            pause = child.crashed()
            self._warn(child, f"cannot start ({error}); once more in {pause:.1f} s")

    def _end_all(self, seconds: float) -> None:
        """Ask all processes to stop, and kill those that are still there after ``seconds``."""
        for child in self.alive:
            child.tell()
        deadline = time.monotonic() + seconds
        while self.alive and time.monotonic() < deadline:
            self._bury()
            time.sleep(TICK)
        for child in self.alive:
            child.kill()
            self._warn(child, f"did not stop within {seconds:g} s; its trial is put back")
        while self.alive:
            self._bury()
            time.sleep(TICK)
        self._look_again()

    def _bury(self) -> None:
        for child in self.alive:
            if child.end() == 1 and child.message:
                self._blame(child)
        self._pass_on()

    def _look_again(self) -> None:
        """Read the study once more, which puts trials of processes that were killed back."""
        now = time.monotonic()
        self.watch.hurry()
        while time.monotonic() < now + SETTLING_SECONDS:
            if self.watch.sight is not None and self.watch.sight.at > now:
                return
            time.sleep(TICK)
