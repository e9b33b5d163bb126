"""The dashboard changes nothing, and serves our reports."""

from __future__ import annotations

import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from fabricated import add_trial, empty_session, rich_session
from optuna.storages import BaseStorage, InMemoryStorage
from wsgi_client import send

from tuner.errors import StorageError
from tuner.session import Session
from tuner.storage import open_storage
from tuner.web import dashboard_app, read_only
from tuner.web._view import StorageView


def dashboard_routes() -> list[tuple[str, str]]:
    """Every method and rule of optuna-dashboard."""
    from optuna_dashboard import wsgi

    app: Any = wsgi(InMemoryStorage())
    return [(route.method, route.rule) for route in app.routes]


def address(rule: str, session: Session) -> str:
    """An address that matches a rule, of a study and trial that are there."""
    trial = session.trials()[-1]._trial_id
    places = {
        "<study_id:int>": str(session.study._study_id),
        "<trial_id:int>": str(trial),
        "<history_id>": "some-id",
        "<plot_type>": "edf",
        "<artifact_id:re:[0-9a-fA-F-]+>": "0abc",
        "<filename:path>": "bundle.js",
        "<:re:(/.*)?>": "/studies/1",
    }
    for place, value in places.items():
        rule = rule.replace(place, value)
    assert "<" not in rule, f"a kind of route that this test does not know: {rule}"
    return rule


def contents(storage: BaseStorage) -> list[Any]:
    """Everything a storage holds, in a form that can be compared."""
    return [
        (vars(study), storage.get_all_trials(study._study_id))
        for study in storage.get_all_studies()
    ]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    folder = tmp_path_factory.mktemp("web")
    return rich_session(folder, open_storage(f"sqlite:///{folder}/tuner.db"))


@pytest.fixture(scope="module")
def app(session: Session) -> Any:
    def load(name: str) -> Session:
        if name != session.file.name:
            raise StorageError(f"no study {name!r}")
        return session

    return dashboard_app(session.study._storage, load_session=load)


READ = [rule for method, rule in dashboard_routes() if method == "GET"]
WRITE = [(method, rule) for method, rule in dashboard_routes() if method != "GET"]
EXPECTED = {
    "/": 302,
    "/incompatible-rdb-schema": 302,
    "/artifacts/<study_id:int>/<artifact_id:re:[0-9a-fA-F-]+>": 400,
    "/artifacts/<study_id:int>/<trial_id:int>/<artifact_id:re:[0-9a-fA-F-]+>": 400,
}


class TestReadOnly:
    def test_the_dashboard_has_the_routes_this_was_written_for(self) -> None:
        assert (len(READ), len(WRITE)) == (13, 20)

    @pytest.mark.parametrize(("method", "rule"), WRITE)
    def test_mutating_routes_are_refused_and_nothing_changes(
        self, app: Any, session: Session, method: str, rule: str
    ) -> None:
        before = contents(session.study._storage)
        answer = send(app, address(rule, session), method)
        assert answer.status == 405
        assert "read-only" in answer.json["reason"]
        assert answer.headers["Allow"] == "GET, HEAD"
        assert contents(session.study._storage) == before

    @pytest.mark.parametrize(
        "method", ["PUT", "PATCH", "DELETE", "TRACE", "delete", "PROXY", "ANY"]
    )
    def test_other_methods_do_not_get_through(self, app: Any, method: str) -> None:
        assert send(app, "/api/studies", method).status == 405

    def test_a_method_named_in_a_header_does_not_count(self, app: Any, session: Session) -> None:
        answer = send(
            app,
            f"/api/studies/{session.study._study_id}",
            HTTP_X_HTTP_METHOD_OVERRIDE="DELETE",
        )
        assert answer.status == 200
        assert session.study.study_name in optuna.get_all_study_names(session.study._storage)

    @pytest.mark.parametrize("rule", READ)
    def test_reading_routes_answer_and_change_nothing(
        self, app: Any, session: Session, rule: str
    ) -> None:
        before = contents(session.study._storage)
        assert send(app, address(rule, session)).status == EXPECTED.get(rule, 200)
        assert contents(session.study._storage) == before

    def test_the_application_is_never_asked_to_write(self) -> None:
        asked: list[str] = []

        def inner(environ: Any, start: Any) -> list[bytes]:
            asked.append(environ["REQUEST_METHOD"])
            start("200 OK", [])
            return []

        for method in ("GET", "POST", "HEAD", "DELETE"):
            send(read_only(inner), "/", method)
        assert asked == ["GET", "HEAD"]

    def test_the_storage_behind_the_dashboard_cannot_be_written(self, session: Session) -> None:
        view = StorageView(session.study._storage)
        study, trial = session.study._study_id, session.trials()[0]._trial_id
        writes: list[Callable[[], object]] = [
            lambda: view.create_new_study([optuna.study.StudyDirection.MINIMIZE]),
            lambda: view.delete_study(study),
            lambda: view.set_study_user_attr(study, "a", 1),
            lambda: view.set_study_system_attr(study, "a", 1),
            lambda: view.create_new_trial(study),
            lambda: view.set_trial_param(trial, "a", 0, optuna.distributions.IntDistribution(0, 1)),
            lambda: view.set_trial_state_values(trial, optuna.trial.TrialState.FAIL),
            lambda: view.set_trial_intermediate_value(trial, 0, 0.0),
            lambda: view.set_trial_user_attr(trial, "a", 1),
            lambda: view.set_trial_system_attr(trial, "a", 1),
        ]
        for write in writes:
            with pytest.raises(StorageError, match="read-only"):
                write()


class TestHeaders:
    def test_are_on_every_answer(self, app: Any) -> None:
        for path in ("/dashboard", "/api/studies", "/report", "/healthz", "/nowhere"):
            headers = send(app, path).headers
            assert headers["X-Content-Type-Options"] == "nosniff"
            assert headers["X-Frame-Options"] == "SAMEORIGIN"
            assert "Content-Security-Policy" in headers
            assert "Access-Control-Allow-Origin" not in headers

    def test_keep_the_policy_that_a_page_brings(self, app: Any) -> None:
        assert "script-src 'self'" in send(app, "/dashboard").headers["Content-Security-Policy"]


class TestPages:
    def test_health_answers_whether_the_storage_does(self, app: Any) -> None:
        assert send(app, "/healthz").json == {"storage": "ok", "studies": 1}

    def test_health_of_a_broken_storage_tells_no_secret(self) -> None:
        class Broken(InMemoryStorage):
            def get_all_studies(self) -> Any:
                raise RuntimeError("postgresql://user:password@host")

        def load(name: str) -> Session:
            raise AssertionError

        answer = send(dashboard_app(Broken(), load_session=load), "/healthz")
        assert answer.status == 503
        assert b"password" not in answer.body

    def test_the_report_of_a_study_is_served(self, app: Any, session: Session) -> None:
        answer = send(app, f"/report/{session.file.name}")
        assert answer.status == 200
        assert b"better by 20.0 points" in answer.body

    def test_the_report_of_an_unknown_study_is_not_found(self, app: Any) -> None:
        answer = send(app, "/report/<script>")
        assert answer.status == 404
        assert b"no study &#x27;&lt;script&gt;&#x27;" in answer.body

    def test_reports_are_listed_by_names_that_lead_to_them(self, tmp_path: Path) -> None:
        name = "täil & <head> 100%"
        session = empty_session(tmp_path, name=name)
        app = dashboard_app(session.study._storage, load_session={name: session}.__getitem__)
        listing = send(app, "/report").body.decode()
        link = listing.split('href="')[1].split('"')[0]
        assert "täil &amp; &lt;head&gt; 100%" in listing
        path = urllib.request.url2pathname(link).encode().decode("latin-1")
        assert send(app, path).status == 200

    def test_studies_that_are_not_ours_are_not_listed(self, tmp_path: Path) -> None:
        storage = InMemoryStorage()
        optuna.create_study(storage=storage, study_name="foreign")
        app = dashboard_app(storage, load_session=lambda _: empty_session(tmp_path))
        assert b"no study of Tuner" in send(app, "/report").body


class TestDashboard:
    def test_takes_a_trial_that_keeps_the_floor_for_the_best(self, tmp_path: Path) -> None:
        session = empty_session(tmp_path)
        add_trial(session, 0.5, loss="cross_entropy", baseline=True)
        trial = session.study.ask()
        trial.set_constraint("floor", 0.1)
        session.study.tell(trial, 0.9)
        app = dashboard_app(session.study._storage, load_session=lambda _: session)
        detail = send(app, f"/api/studies/{session.study._study_id}").json
        assert [t["number"] for t in detail["best_trials"]] == [0]
        assert [t["constraints"] for t in detail["trials"]] == [[], [0.1]]

    def test_names_a_best_trial_even_when_none_keeps_the_floor(self, tmp_path: Path) -> None:
        session = empty_session(tmp_path)
        trial = session.study.ask()
        trial.set_constraint("floor", 0.1)
        session.study.tell(trial, 0.9)
        view = StorageView(session.study._storage)
        assert view.get_best_trial(session.study._study_id).number == 0
