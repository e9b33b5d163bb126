"""What every store can do, and how it says that it cannot."""

from __future__ import annotations

from abc import ABC, abstractmethod

from tuner.errors import TunerError


class StoreError(TunerError):
    """A store, or a file in one, that cannot be read or written."""


class NotThere(KeyError):
    """A key under which a store holds nothing."""


class Store(ABC):
    """Bytes under keys such as ``trial-00007/model.safetensors``; printed, it says where it is.

    Every method that touches the store raises StoreError when it cannot do its work: the text
    names the place and the reason and holds no credentials.
    """

    @abstractmethod
    def check(self) -> None:
        """Make sure, before anything is trained, that the store can be used."""

    @abstractmethod
    def read(self, key: str) -> bytes:
        """The content under a key.

        Raises:
            NotThere: The store holds nothing under it.
        """

    @abstractmethod
    def write(self, key: str, content: bytes) -> None:
        """Put content under a key, whole or not at all; afterwards it survives a crash.

        Who reads at the same time gets the earlier content or the new one. After an error the
        earlier content is still there.
        """

    @abstractmethod
    def remove(self, key: str) -> None:
        """Remove what is under a key, if anything is."""

    @abstractmethod
    def keys(self, prefix: str = "") -> list[str]:
        """All keys that start with ``prefix``, sorted."""

    @abstractmethod
    def within(self, prefix: str) -> Store:
        """The part of this store whose keys start with ``prefix/``."""

    @abstractmethod
    def __str__(self) -> str: ...

    def place(self, key: str) -> str:
        """Where a key is, for messages."""
        return f"{self}/{key}" if key else str(self)
