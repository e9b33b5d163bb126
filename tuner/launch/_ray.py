"""Workers placed by Ray: it starts their processes and starts them again, and that is all."""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import Callable
from typing import Any

from tuner.errors import TunerError
from tuner.launch._actor import Worker
from tuner.launch._cluster import Crew, check_room, shortened
from tuner.launch._place import Place
from tuner.launch._view import View
from tuner.rungs.outcome import Outcome
from tuner.session import Session
from tuner.storage import CAUSES
from tuner.supervisor import Sight
from tuner.worker import OnCohort

TICK = 0.5
SETTLING_SECONDS = 5.0
LEAVING_SECONDS = 30.0

log = logging.getLogger(__name__)


class Placement:
    """The workers of one launch, from their placing until the study has nothing left.

    Args:
        ray: Ray, connected.
        session: The study.
        place: Where the workers find it.
        crew: Which workers.
        alone: Whether Ray runs on this machine only, so that no other can come.
        stop: Whether somebody asked to stop; asked twice a second.
        show: Takes what is known of the study, whenever it was read again.
        on_trial: Called when a trial of the study ended, whoever trained it.
        on_cohort: Called instead with those of the head rung, and the seconds they took.

    Raises:
        TunerError: The machines cannot share the storage, or none has room for a worker and
            Ray runs on this one alone.
    """

    def __init__(
        self,
        ray: Any,
        session: Session,
        place: Place,
        crew: Crew,
        *,
        alone: bool = False,
        stop: Callable[[], bool] = lambda: False,
        show: Callable[[Sight], None] = lambda _: None,
        on_trial: Callable[[Outcome], None] = lambda _: None,
        on_cohort: OnCohort = lambda *_: None,
    ) -> None:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        place.check_reach([socket.gethostname(), *(n["NodeManagerHostname"] for n in nodes)])
        check_room(nodes, crew, alone=alone)
        self.ray, self.session, self.place, self.crew = ray, session, place, crew
        self.stop, self.show = stop, show
        self.on_trial, self.on_cohort = on_trial, on_cohort
        self.view = View(session, set(crew.names))
        self.actors: dict[str, Any] = {}
        self.running: dict[Any, str] = {}
        self.messages: dict[str, str] = {}
        self.over_at: float | None = None

    def run(self, *, grace: float = 60.0) -> str | None:
        """Place the workers, and follow them until they all ended or somebody asks to stop.

        Workers that Ray finds no room for wait in Ray, and are not waited for.

        Args:
            grace: Seconds a worker has to finish its step and to keep its trial.

        Returns:
            None when somebody asked, else the reason: ``over``, or what the fleet was told.

        Raises:
            TunerError: All workers ended for something that the user can cure.
        """
        self.view.start()
        try:
            self._place()
            while self.running and not self.stop() and not self._is_over():
                self._collect(self.ray.wait(list(self.running), timeout=TICK)[0])
                self._pass_on()
            if self.stop() and self.running:
                self._end_all(grace)
                return None
        except ConnectionError as error:
            raise TunerError(f"Ray does not answer any more: {shortened(error)}") from None
        finally:
            self.view.close()
            self._pass_on()
        if len(self.messages) == self.crew.workers:
            raise TunerError("every worker ended; the lines above say why")
        with contextlib.suppress(*CAUSES):
            self.view.look()
        self._pass_on()
        order = self.session.ledger.order()
        return (order.reason or "stop") if order.state == "stop" else "over"

    def _place(self) -> None:
        """Have Ray make the workers; it makes them again for as long as this process lives."""
        actor = self.ray.remote(
            num_gpus=self.crew.gpus,
            num_cpus=self.crew.cpus,
            max_restarts=-1,
            max_task_retries=-1,
            # One thread to train, one to hear that it must stop.
            max_concurrency=2,
        )(Worker)
        for name in self.crew.names:
            self.actors[name] = actor.remote(name)
            ref = self.actors[name].run.remote(
                self.place, self.crew.device, max(1, int(self.crew.cpus)), self.crew.on_device
            )
            self.running[ref] = name

    def _collect(self, done: list[Any]) -> None:
        """See how workers ended; what they had is free for those that wait for room."""
        for ref in done:
            name = self.running.pop(ref)
            try:
                message = self.ray.get(ref)
            except self.ray.exceptions.RayError as error:
                message = shortened(error)
            del self.actors[name]
            if message is None:
                self.over_at = time.monotonic()
            else:
                if message not in self.messages.values():
                    log.warning("worker %s ended: %s", name, message)
                self.messages[name] = message

    def _is_over(self) -> bool:
        """Whether those that have not ended wait for room that they no longer need."""
        sight = self.view.sight
        if sight is not None and sight.order.state == "stop" and not sight.running:
            return True
        if self.over_at is None or time.monotonic() < self.over_at + LEAVING_SECONDS:
            return False
        return sight is not None and not sight.waiting and not sight.running

    def _end_all(self, grace: float) -> None:
        """Tell the workers to stop, and wait for those that heard it."""
        start = time.monotonic()
        orders = {actor.stop.remote(): name for name, actor in self.actors.items()}
        while self.running and time.monotonic() < start + grace:
            heard = self.ray.wait(list(orders), num_returns=len(orders), timeout=0)[0]
            there = {orders[ref] for ref in heard} & set(self.running.values())
            if not (there or self._is_training()) and time.monotonic() > start + SETTLING_SECONDS:
                return
            self._collect(self.ray.wait(list(self.running), timeout=TICK)[0])
            self._pass_on()
        for name in self.running.values():
            log.warning("worker %s did not stop within %g s; its trial is put back", name, grace)

    def _is_training(self) -> bool:
        """Whether one of them has a trial: on a busy machine it may take its time to hear."""
        return self.view.sight is not None and bool(self.view.sight.mine)

    def _pass_on(self) -> None:
        """Hand over what is new of the study."""
        while not self.view.ended.empty():
            self.on_trial(self.view.ended.get())
        while not self.view.heads.empty():
            self.on_cohort(*self.view.heads.get())
        sight = self.view.news()
        if sight is not None:
            self.show(sight)
