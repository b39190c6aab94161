"""What can go wrong with the metadata store. Every message begins with which store it is and where."""

from __future__ import annotations

from xllm.errors import XllmError


class StoreError(XllmError):
    """Root of these errors."""


class StoreUnreachableError(StoreError):
    """No answer came: no connection, or none in time. Of what was to be written it is not known whether it was."""


class StoreRefusedError(StoreError):
    """The store, or TLS on the way to it, refused: wrong or missing credentials, no permission, an untrusted
    certificate, a value too large. Trying again does not help."""


class StoreClosedError(StoreError):
    """This end was closed; watches that were open end with it."""


class LeaseLostError(StoreError):
    """The lease has ended, and with it every key that was put under it."""


class CompactedError(StoreError):
    """Changes from that revision on are not kept any more."""
