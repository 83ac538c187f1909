"""Every error that adapter-compiler raises on purpose, in one place for users to import."""

from __future__ import annotations

from passes.base import (
    AdapterCompilerError,
    CaptureError,
    PassError,
    PostconditionError,
    PreconditionError,
    SiteError,
)


class ConfigError(AdapterCompilerError, ValueError):
    """An option has a value that cannot work."""


class BudgetError(AdapterCompilerError, ValueError):
    """A rank budget does not fit its model or optimizer."""


class NonFiniteGradientError(BudgetError):
    """An adapter's gradient is inf or nan at an optimizer step."""


class CheckpointError(AdapterCompilerError, ValueError):
    """Saved adapters are missing, damaged, or belong to another model."""


class ExportError(AdapterCompilerError):
    """The model could not be exported to ONNX."""


class VerificationError(ExportError):
    """An exported file does not compute what the model computes."""


class MissingDependencyError(AdapterCompilerError, ImportError):
    """An optional library is not installed; the message names the extra that brings it."""


__all__ = [
    "AdapterCompilerError",
    "BudgetError",
    "CaptureError",
    "CheckpointError",
    "ConfigError",
    "ExportError",
    "MissingDependencyError",
    "NonFiniteGradientError",
    "PassError",
    "PostconditionError",
    "PreconditionError",
    "SiteError",
    "VerificationError",
]
