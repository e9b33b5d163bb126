"""The pages that are served: reports and health of our own, everything else optuna-dashboard."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import quote

from optuna.storages import BaseStorage

from tuner.errors import TunerError
from tuner.web._guards import answer, json_answer, read_only, with_headers
from tuner.web._view import StorageView

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

    from tuner.session import Session

    Page = Callable[[WSGIEnvironment, StartResponse], Iterable[bytes]]

PAGE_POLICY = "style-src 'unsafe-inline'; default-src 'none'; frame-ancestors 'none'"
REPORT_POLICY = "frame-ancestors 'none'; form-action 'none'"
"""The report's own policy, in the page, says what it may load and run: nothing else."""

log = logging.getLogger(__name__)


def dashboard_app(
    storage: BaseStorage, *, load_session: Callable[[str], Session]
) -> WSGIApplication:
    """The whole dashboard as a WSGI application that changes nothing.

    ``/`` is optuna-dashboard over ``storage``, which should have Optuna's cache in front;
    ``/report`` lists the studies, ``/report/<study>`` is the report of one, and ``/healthz``
    says whether the storage answers. There is no artifact store, so that no uploaded file can
    be served as a page.

    Args:
        storage: The storage to show.
        load_session: Finds a study by its name; raises a TunerError when there is none.
    """
    from optuna_dashboard import wsgi

    rest: WSGIApplication = wsgi(StorageView(storage))

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "").encode("latin-1").decode("utf-8", "replace")
        path = path.rstrip("/")
        if path == "/healthz":
            return _health(storage, start_response)
        if path == "/report":
            return _index(storage, start_response)
        if path.startswith("/report/"):
            return _report(path.removeprefix("/report/"), load_session, start_response)
        # The dashboard answers 500 to clients that do not say which encodings they accept.
        environ.setdefault("HTTP_ACCEPT_ENCODING", "")
        return rest(environ, start_response)

    return with_headers(read_only(app))


def _health(storage: BaseStorage, start_response: StartResponse) -> Iterable[bytes]:
    try:
        studies = len(storage.get_all_studies())
    except Exception:
        log.exception("the storage does not answer")
        unavailable = HTTPStatus.SERVICE_UNAVAILABLE
        return json_answer(start_response, unavailable, {"storage": "does not answer"})
    return json_answer(start_response, HTTPStatus.OK, {"storage": "ok", "studies": studies})


def _index(storage: BaseStorage, start_response: StartResponse) -> Iterable[bytes]:
    studies = storage.get_all_studies()
    names = [study.study_name for study in studies if "study_file" in study.user_attrs]
    return _page(start_response, HTTPStatus.OK, "Reports", _links(names))


def _report(
    name: str, load_session: Callable[[str], Session], start_response: StartResponse
) -> Iterable[bytes]:
    from tuner.report import report_html

    try:
        text = report_html(load_session(name))
    except TunerError as error:
        return _page(start_response, HTTPStatus.NOT_FOUND, "No such report", [str(error)])
    policy = ("Content-Security-Policy", REPORT_POLICY)
    return answer(start_response, HTTPStatus.OK, text, policy, ("Cache-Control", "no-store"))


def _links(names: Iterable[str]) -> list[object]:
    from tuner.report.markup import element

    items = [
        element("li", element("a", name, href=f"/report/{quote(name, safe='')}"))
        for name in sorted(names)
    ]
    listed = element("ul", *items) if items else "This storage holds no study of Tuner's yet."
    return [
        listed,
        element("p", element("a", "All trials, in optuna-dashboard", href="/dashboard")),
    ]


def _page(
    start_response: StartResponse, status: HTTPStatus, title: str, content: Iterable[object]
) -> Iterable[bytes]:
    from tuner.report.markup import page

    policy = ("Content-Security-Policy", PAGE_POLICY)
    body = page(title, *content)
    return answer(start_response, status, body, policy)
