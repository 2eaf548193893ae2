"""The errors a user can meet, each saying what was set, why it cannot be, and what to do instead."""

from __future__ import annotations


class _Explained(Exception):  # noqa: N818
    """Builds one message from its parts, so that every error names setting, value, arithmetic and remedy."""

    def __init__(
        self,
        message: str | None = None,
        *,
        setting: str | None = None,
        value: object = None,
        why: str | None = None,
        remedy: str | None = None,
    ) -> None:
        if message is None:
            subject = f"{setting}={value!r}" if value is not None else f"{setting}"
            message = f"{subject}: {why}."
            if remedy:
                message += f" {remedy[0].upper()}{remedy[1:]}" + ("" if remedy.endswith("?") else ".")
        super().__init__(message)


class SequenceParallelConfigError(_Explained, ValueError):
    """A setting is illegal by itself, or does not fit the world, the model or the data."""


class DamagedCheckpointError(SequenceParallelConfigError):
    """A file of a checkpoint is cut, missing or another one. Starting again does not help."""


class UnsupportedError(_Explained, RuntimeError):
    """A legal request that this build, device, kernel or method cannot serve."""


class PatchError(_Explained, RuntimeError):
    """An upstream package is not what a patch was written for; nothing has been patched."""


class CollectiveMismatchError(_Explained, RuntimeError):
    """Debug mode found ranks about to enter collectives that do not fit together."""
