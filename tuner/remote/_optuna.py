"""Optuna's gRPC client and service over our own channel and server; its private parts are here.

Optuna's own functions take no secret, no time limit and no second service on the same port.
"""

from __future__ import annotations

import warnings

import grpc
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, GrpcStorageProxy
from optuna.storages._grpc.auto_generated.api_pb2_grpc import (
    StorageServiceStub,
    add_StorageServiceServicer_to_server,
)
from optuna.storages._grpc.client import GrpcClientCache
from optuna.storages._grpc.servicer import OptunaStorageProxyService

SERVICE = "/optuna.StorageService/"


def storage_through(channel: grpc.Channel) -> BaseStorage:
    """Optuna's view of the storage behind a channel."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        storage = GrpcStorageProxy()
    storage.close()
    storage._channel = channel
    storage._stub = StorageServiceStub(channel)  # type: ignore[no-untyped-call]
    storage._cache = GrpcClientCache(storage._stub)
    return storage


def add_service(storage: BaseStorage, server: grpc.Server) -> None:
    """Let ``server`` answer Optuna's calls from ``storage``."""
    add_StorageServiceServicer_to_server(  # type: ignore[no-untyped-call]
        OptunaStorageProxyService(storage), server
    )


def is_refused(method: str) -> bool:
    """Whether a call is one of Optuna's that would get round the leases, or delete a study."""
    if not method.startswith(SERVICE):
        return False
    name = method.removeprefix(SERVICE)
    return not name.startswith("Get") and name not in (
        "SetStudyUserAttribute",
        "SetStudySystemAttribute",
    )
