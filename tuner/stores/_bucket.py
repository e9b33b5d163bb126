"""A store in a bucket of an S3-type service, through Optuna's artifact store for boto3."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from tuner.stores._base import NotThere, Store, StoreError

if TYPE_CHECKING:
    from optuna.artifacts import Boto3ArtifactStore

ATTEMPTS = 10
READS = 3
CONNECT_SECONDS, ANSWER_SECONDS = 10, 30


@dataclass(frozen=True)
class BucketStore(Store):
    """Keys are object names below ``prefix``; boto3's own settings say where the service is.

    The endpoint, the region and the credentials come from the environment (``AWS_ENDPOINT_URL``,
    ``AWS_ACCESS_KEY_ID``, ...), from boto3's files, or from the machine's role.
    """

    bucket: str
    prefix: str = ""

    @classmethod
    def from_url(cls, url: str) -> BucketStore:
        """The store at ``s3://BUCKET/PREFIX``.

        Raises:
            StoreError: The address has no bucket, or more than bucket and prefix.
        """
        parts = urlsplit(url)
        if not parts.netloc or set("@:") & set(parts.netloc) or parts.query or parts.fragment:
            # The address is not repeated: who writes credentials into one would find them here.
            raise StoreError(
                "artifacts in a bucket are addressed as s3://BUCKET/PREFIX and nothing more; the "
                "endpoint and the credentials come from boto3's settings, such as "
                "AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        return cls(parts.netloc, parts.path.strip("/"))

    def check(self) -> None:
        """Ask for one name below the prefix."""
        with self._named("open", ""):
            self._artifacts.client.list_objects_v2(
                Bucket=self.bucket, Prefix=self._name(""), MaxKeys=1
            )

    def read(self, key: str) -> bytes:
        """See ``Store``."""
        from optuna.artifacts.exceptions import ArtifactNotFound

        with self._named("read", key):
            try:
                return self._read(self._name(key))
            except ArtifactNotFound:
                raise NotThere(self.place(key)) from None

    def _read(self, name: str) -> bytes:
        from botocore.exceptions import HTTPClientError, IncompleteReadError

        # boto3 asks again by itself, but not once an answer has begun to come.
        for left in reversed(range(READS)):
            with contextlib.closing(self._artifacts.open_reader(name)) as reader:
                try:
                    return reader.read()
                except (HTTPClientError, IncompleteReadError):
                    if not left:
                        raise
        raise AssertionError("the last attempt returns or raises")

    def write(self, key: str, content: bytes) -> None:
        """See ``Store``."""
        with self._named("write", key):
            self._artifacts.write(self._name(key), BytesIO(content))

    def remove(self, key: str) -> None:
        """See ``Store``."""
        with self._named("remove", key):
            self._artifacts.remove(self._name(key))

    def keys(self, prefix: str = "") -> list[str]:
        """See ``Store``."""
        with self._named("list", prefix):
            pages = self._artifacts.client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=self._name(prefix)
            )
            names = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        return sorted(name.removeprefix(self._name("")) for name in names)

    def within(self, prefix: str) -> BucketStore:
        """See ``Store``."""
        return BucketStore(self.bucket, self._name(prefix))

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def _name(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    @property
    def _artifacts(self) -> Boto3ArtifactStore:
        return _backend(self.bucket, os.getpid())

    @contextlib.contextmanager
    def _named(self, verb: str, key: str) -> Iterator[None]:
        _require_boto3()
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except (Boto3Error, BotoCoreError, ClientError, OSError, ValueError) as error:
            raise StoreError(
                f"cannot {verb} {self.place(key)}: {_without_credentials(str(error))}; check the "
                "bucket's name and rights, AWS_ENDPOINT_URL and the credentials boto3 finds, or "
                "name another place with --artifacts or TUNER_ARTIFACTS"
            ) from error


@functools.cache
def _backend(bucket: str, process: int) -> Boto3ArtifactStore:
    """Optuna's store with a client of this process: connections do not survive a fork.

    Optuna's ``Backoff`` around it would also ask again after a refusal, and again after every
    removal that worked; boto3 knows itself which errors pass.
    """
    import boto3
    from botocore.config import Config
    from optuna.artifacts import Boto3ArtifactStore

    retries = {"mode": "standard", "total_max_attempts": ATTEMPTS}
    config = Config(connect_timeout=CONNECT_SECONDS, read_timeout=ANSWER_SECONDS, retries=retries)
    return Boto3ArtifactStore(bucket, boto3.client("s3", config=config), avoid_buf_copy=True)


def _require_boto3() -> None:
    try:
        import boto3  # noqa: F401
    except ImportError:
        raise StoreError(
            "artifacts in a bucket need boto3, which is not installed: pip install 'tuner[s3]'"
        ) from None


def _without_credentials(text: str) -> str:
    return re.sub(r"//[^/@\s]*@", "//", text)
