"""Stores: a folder and a bucket keep the same promises, and say why when they cannot."""

from __future__ import annotations

import http.server
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import MakeFile
from optuna.trial import Trial, TrialState

from tuner import artifacts
from tuner import session as sessions
from tuner.datasets import Data
from tuner.session import Session
from tuner.stores import BucketStore, FolderStore, NotThere, Store, StoreError, _bucket, open_store
from tuner.trainer import EpochResult
from tuner.worker import work


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """What ``--artifacts`` takes, once for every kind of store."""
    if request.param == "folder":
        return str(tmp_path / "some/artifacts")
    return str(request.getfixturevalue("bucket"))


@pytest.fixture
def store(place: str) -> Store:
    return open_store(place)


class TestEveryStore:
    def test_gives_back_what_was_written(self, store: Store) -> None:
        contents = {"a": b"", "b/c.bin": bytes(range(256)), "b/large": os.urandom(9_000_000)}
        for key, content in contents.items():
            store.write(key, content)
        assert {key: store.read(key) for key in contents} == contents

    def test_keeps_the_last_content_of_a_key(self, store: Store) -> None:
        store.write("trial-00001/x", b"long content")
        store.write("trial-00001/x", b"short")
        assert store.read("trial-00001/x") == b"short"
        assert store.keys("") == ["trial-00001/x"]

    def test_says_that_nothing_is_there(self, store: Store) -> None:
        with pytest.raises(NotThere, match="trial-00001/x"):
            store.read("trial-00001/x")
        assert store.keys("") == []

    def test_forgets_what_is_removed_and_minds_no_missing_key(self, store: Store) -> None:
        store.write("a/x", b"1")
        store.write("b/x", b"2")
        for _ in range(2):
            store.remove("a/x")
        assert store.keys("") == ["b/x"]
        with pytest.raises(NotThere):
            store.read("a/x")

    def test_lists_keys_by_their_beginning(self, store: Store) -> None:
        for key in ("trial-00010/x", "trial-00001/x", "trial-00001/y", "other/trial-1"):
            store.write(key, b"")
        assert store.keys("trial-00001/") == ["trial-00001/x", "trial-00001/y"]
        assert store.keys("trial-0") == ["trial-00001/x", "trial-00001/y", "trial-00010/x"]
        assert store.keys("none/") == []

    def test_shows_a_part_of_itself_as_a_store(self, store: Store) -> None:
        part = store.within("study").within("trial-00001")
        part.write("x", b"1")
        assert store.read("study/trial-00001/x") == b"1"
        assert part.keys("") == ["x"]
        store.write("study/trial-000012/x", b"2")
        assert part.keys("") == ["x"], "its neighbour's name begins alike"

    def test_is_the_same_store_for_whoever_opens_it_again(self, place: str, store: Store) -> None:
        store.write("x", b"1")
        assert open_store(place) == store
        assert open_store(place).read("x") == b"1"

    def test_says_where_it_is(self, place: str, store: Store) -> None:
        assert str(store.within("study")) == f"{place}/study"
        assert store.place("x") == f"{place}/x"


def test_place_is_as_given_else_of_the_environment_else_in_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TUNER_ARTIFACTS", raising=False)
    assert open_store(None, check=False) == FolderStore(Path("runs/artifacts"))
    monkeypatch.setenv("TUNER_ARTIFACTS", "s3://bucket/deep/prefix/")
    assert open_store(None, check=False) == BucketStore("bucket", "deep/prefix")
    assert open_store(Path("here"), check=False) == FolderStore(Path("here"))


@pytest.mark.parametrize(
    "given",
    [
        "s3://",
        "s3:///prefix",
        "s3://KEY:hidden@bucket/prefix",
        "s3://bucket:9000/prefix",
        "s3://bucket/prefix?endpoint_url=hidden",
        "s3:/bucket/prefix",
        "gs://hidden/prefix",
    ],
)
def test_address_that_is_no_place_is_refused_without_repeating_it(given: str) -> None:
    with pytest.raises(StoreError, match="s3://BUCKET/PREFIX") as error:
        open_store(given, check=False)
    assert "hidden" not in str(error.value)


WRITER = """
import sys
from pathlib import Path
from tuner.stores import FolderStore
store = FolderStore(Path(sys.argv[1]))
print("ready", flush=True)
while True:
    for letter in b"ab":
        store.write("trial-00001/x", bytes([letter]) * 30_000_000)
"""


class TestFolder:
    def test_content_is_whole_whenever_its_writer_is_killed(self, tmp_path: Path) -> None:
        store = FolderStore(tmp_path)
        store.write("trial-00001/x", b"a" * 30_000_000)
        draw = random.Random(0)
        for _ in range(8):
            command = [sys.executable, "-c", WRITER, str(tmp_path)]
            with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
                assert writer.stdout is not None
                writer.stdout.readline()
                time.sleep(draw.uniform(0.01, 0.2))
                writer.send_signal(signal.SIGKILL)
            content = store.read("trial-00001/x")
            assert (len(content), len(set(content))) == (30_000_000, 1)
            assert store.keys("") == ["trial-00001/x"], "what is half written is nobody's key"
        assert len(list((tmp_path / "trial-00001").iterdir())) > 1, "a writer was hit in a write"

    def test_half_written_files_of_killed_writers_go_after_a_while(self, tmp_path: Path) -> None:
        folder = tmp_path / "trial-00001"
        folder.mkdir()
        old, young = (folder / f".x.{digit * 32}.tmp" for digit in "ab")
        for path in (old, young):
            path.write_bytes(b"half")
        yesterday = time.time() - 86_400
        os.utime(old, (yesterday, yesterday))
        FolderStore(tmp_path).write("trial-00001/x", b"whole")
        assert not old.exists()
        assert young.exists(), "its writer may be at work"
        os.utime(young, (yesterday, yesterday))
        FolderStore(tmp_path).remove("trial-00001/x")
        assert not folder.exists(), "nothing is left of a trial that keeps nothing"

    def test_refused_write_leaves_the_earlier_content_and_no_litter(self, tmp_path: Path) -> None:
        store = FolderStore(tmp_path)
        store.write("trial-00001/x", b"earlier")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            with pytest.raises(StoreError, match=r"trial-00001/x: File too large.*--artifacts"):
                store.write("trial-00001/x", b"later" * 100_000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert store.read("trial-00001/x") == b"earlier"
        assert os.listdir(tmp_path / "trial-00001") == ["x"]

    def test_full_disk_leaves_the_earlier_content_and_no_litter(self, tmp_path: Path) -> None:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)],
            capture_output=True,
            check=False,
        )
        if mounted.returncode:
            pytest.skip("only root can mount a small disk")
        try:
            store = FolderStore(tmp_path)
            store.write("trial-00001/x", b"earlier")
            with pytest.raises(StoreError, match="No space left on device"):
                store.write("trial-00001/x", b"later" * 100_000)
            assert store.read("trial-00001/x") == b"earlier"
            assert os.listdir(tmp_path / "trial-00001") == ["x"]
        finally:
            subprocess.run(["umount", str(tmp_path)], check=True)

    def test_file_in_the_place_of_a_folder_is_refused_at_opening(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        for given in (tmp_path / "file", tmp_path / "file/below"):
            with pytest.raises(StoreError, match=r"file is a file.*TUNER_ARTIFACTS"):
                open_store(given)

    def test_opening_makes_nothing(self, tmp_path: Path) -> None:
        open_store(tmp_path / "new")
        assert os.listdir(tmp_path) == []


class _Stumbling(http.server.BaseHTTPRequestHandler):
    """Answers with 1000 bytes, but hangs up in the middle of the first answers."""

    hang_ups = 2

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        stumbles, type(self).hang_ups = type(self).hang_ups > 0, type(self).hang_ups - 1
        self.wfile.write(b"x" * (10 if stumbles else 1000))
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def stumbling() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Stumbling) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


class TestBucket:
    def test_missing_bucket_is_refused_at_opening(self, s3_settings: dict[str, str]) -> None:
        with pytest.raises(StoreError, match=r"s3://nowhere-1/x: .*does not exist.*--artifacts"):
            open_store("s3://nowhere-1/x")

    def test_refused_credentials_are_said_but_not_shown(
        self, bucket: str, s3_settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("moto.settings.INITIAL_NO_AUTH_ACTION_COUNT", 0)
        with pytest.raises(StoreError, match="Access Key Id.*credentials boto3 finds") as error:
            open_store(bucket)
        assert s3_settings["AWS_SECRET_ACCESS_KEY"] not in str(error.value)

    def test_unreachable_service_is_named_without_its_password(
        self, bucket: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_bucket, "ATTEMPTS", 1)
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:hidden@127.0.0.1:9")
        store = open_store(bucket, check=False)
        with pytest.raises(StoreError, match=r"write .*/x: .*127\.0\.0\.1:9") as error:
            store.write("x", b"")
        assert "hidden" not in str(error.value)

    def test_answer_that_breaks_off_is_asked_for_again(
        self, bucket: str, stumbling: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", stumbling)
        assert open_store(bucket, check=False).read("x") == b"x" * 1000
        assert _Stumbling.hang_ups < 0

    def test_more_keys_than_a_page_are_all_listed(
        self, bucket: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "3")
        store = open_store(bucket)
        keys = [f"trial-{number:05d}/x" for number in range(7)]
        for key in keys:
            store.write(key, b"")
        assert store.keys("") == keys

    def test_missing_boto3_is_said_with_the_line_that_installs_it(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "boto3", None)
        with pytest.raises(StoreError, match=r"pip install 'tuner\[s3\]'"):
            open_store("s3://bucket")


def test_checkpoint_that_cannot_be_read_is_a_reason_and_no_error(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / artifacts.CHECKPOINT).mkdir()
    monkeypatch.setattr(_bucket, "ATTEMPTS", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    for store in (FolderStore(tmp_path), open_store(bucket, check=False)):
        snapshot, reason = artifacts.load_checkpoint(store, {})
        assert snapshot is None
        assert f"cannot read {store.place(artifacts.CHECKPOINT)}: " in str(reason)


def test_what_cannot_be_cleared_away_stays_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    store = FolderStore(tmp_path / "file")
    artifacts.drop_checkpoint(store)
    artifacts.keep_weights_only_of(store, lambda: {1})
    assert [str(tmp_path / "file") in message for message in caplog.messages] == [True, True]


class Meanwhile(FolderStore):
    """A store in which another worker ends a better trial while one looks at what is there."""

    best = 1

    def keys(self, prefix: str = "") -> list[str]:
        type(self).best = 2
        self.write(f"trial-00002/{artifacts.WEIGHTS}", b"")
        return super().keys(prefix)


def test_weights_of_a_better_trial_that_ends_during_the_clearing_stay(tmp_path: Path) -> None:
    store = Meanwhile(tmp_path)
    store.write(f"trial-00001/{artifacts.WEIGHTS}", b"")
    artifacts.keep_weights_only_of(store, lambda: {store.best})
    assert FolderStore(tmp_path).keys() == [f"trial-00002/{artifacts.WEIGHTS}"]


class Interrupted:
    """Asks to stop after so many epochs, and remembers which there were."""

    def __init__(self, epochs: int | None = None) -> None:
        self.epochs, self.seen = epochs, list[tuple[int, int]]()

    def on_epoch(self, trial: Trial, result: EpochResult, _value: float) -> None:
        self.seen.append((trial.number, result.epoch))

    def __call__(self) -> bool:
        return len(self.seen) == self.epochs


def results(session: Session) -> list[object]:
    return [
        (trial.number, trial.state, trial.params, trial.intermediate_values, trial.value,
         trial.user_attrs["metrics"])
        for trial in session.trials()
    ]  # fmt: skip


def test_interrupted_trial_goes_on_on_another_machine_from_the_bucket(
    bucket: str, make_file: MakeFile, digits: Data, tmp_path: Path
) -> None:
    file = make_file(budget={"trials": 2, "epochs": 5}, search={"pruner": "none"})
    urls = [f"sqlite:///{tmp_path}/{name}.db" for name in ("whole", "split")]
    whole = sessions.create(file, urls[0], FolderStore(tmp_path / "artifacts"), digits)
    work(whole, digits)

    stop = Interrupted(epochs=8)
    first = sessions.create(file, urls[1], open_store(bucket), digits)
    work(first, digits, stop=stop, on_epoch=stop.on_epoch)
    assert [trial.state for trial in first.trials()] == [TrialState.COMPLETE, TrialState.WAITING]
    assert f"trial-00001/{artifacts.CHECKPOINT}" in first.store.keys("trial-00001/")

    _bucket._backend.cache_clear()
    rest = Interrupted()
    second = sessions.join("tiny", urls[1], open_store(bucket))
    work(second, digits, on_epoch=rest.on_epoch)
    assert rest.seen == [(1, 3), (1, 4)], "it went on from its checkpoint"
    assert results(second) == results(whole)
    kept = [key.partition("/")[2] for key in second.store.keys("trial-00001/")]
    assert artifacts.CHECKPOINT not in kept
    assert artifacts.load_validation(second.trial_store(1)) is not None
