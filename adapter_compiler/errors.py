"""All error classes of adapter-compiler, for users to import."""

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
    """An option is unknown or its value cannot work."""


class BudgetError(AdapterCompilerError, ValueError):
    """A rank budget does not fit the model or the optimizer."""


class NonFiniteGradientError(BudgetError):
    """The gradient of an adapter is inf or nan at an optimizer step."""


class CheckpointError(AdapterCompilerError, ValueError):
    """Saved adapters are missing, damaged, or belong to another model."""


class DistributedError(AdapterCompilerError, RuntimeError):
    """Another rank has failed, or the ranks do not hold the same."""


class ExportError(AdapterCompilerError):
    """The model could not be exported to ONNX."""


class VerificationError(ExportError):
    """An exported file does not compute the same as the model."""


class SignatureError(AdapterCompilerError):
    """Signed files are missing, were changed, or were signed with another key."""


class MissingDependencyError(AdapterCompilerError, ImportError):
    """An optional library is not installed; the message names the extra to install."""


__all__ = [
    "AdapterCompilerError",
    "BudgetError",
    "CaptureError",
    "CheckpointError",
    "ConfigError",
    "DistributedError",
    "ExportError",
    "MissingDependencyError",
    "NonFiniteGradientError",
    "PassError",
    "PostconditionError",
    "PreconditionError",
    "SignatureError",
    "SiteError",
    "VerificationError",
]
