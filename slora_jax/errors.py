"""Every exception a user can meet, one tree.

    SloraError
    ├── ConfigError             an option of LLM(...), EngineConfig or TrainingConfig is wrong
    ├── ModelLoadError          the base model cannot be read or is not supported
    ├── AdapterError            something is wrong with one adapter
    │   ├── AdapterLoadError    its files or arrays cannot be used
    │   ├── AdapterNotFoundError   no adapter is registered under this name
    │   └── AdapterInUseError   the name is taken, or its removal must wait
    ├── InvalidRequestError     a prompt, an argument or a sampling value is wrong
    ├── CapacityError           it can never fit: the message says what is short and by how much
    ├── TrainingError           examples, or checkpoints to go on from, cannot be used
    ├── RequestFailedError      a request that had been accepted could not be finished
    │   └── DeadlineExceededError   it would have got its first token too late
    ├── OverloadedError         too many requests wait already: try again later
    ├── EngineClosedError       the engine has been closed
    ├── EngineInUseError        somebody else has the engine for itself
    └── HostLostError           another process that serves the same model is gone

Each is raised before any device work for the request it concerns, and leaves the engine serving;
each message names what was asked, what exists, and what to change.
"""


class SloraError(Exception):
    """Base class of every error that this library raises on purpose."""


class ConfigError(SloraError, ValueError):
    """An option of ``LLM(...)``, ``EngineConfig`` or ``TrainingConfig`` cannot work."""


class ModelLoadError(SloraError):
    """The base model cannot be read, or asks for what this library does not do."""


class AdapterError(SloraError):
    """Something is wrong with one adapter; the others and the base are untouched."""


class AdapterLoadError(AdapterError):
    """An adapter's files or arrays cannot be used: the message names file, tensor and reason."""


class AdapterNotFoundError(AdapterError, KeyError):
    """No adapter is registered under this name."""

    def __str__(self) -> str:
        # KeyError would print the repr of its argument.
        return str(self.args[0]) if self.args else ""


class AdapterInUseError(AdapterError):
    """The adapter name is taken, or what was asked must wait for requests that use it."""


class InvalidRequestError(SloraError, ValueError):
    """A prompt, an argument or a sampling value is wrong; nothing has been run."""


class CapacityError(SloraError):
    """What was asked can never fit in the pool or the host budget as configured."""


class TrainingError(SloraError):
    """Examples cannot be trained on, or a run cannot go on from the checkpoints that are there."""


class RequestFailedError(SloraError):
    """At least one accepted request could not be finished; the others were.

    ``outputs`` has one entry per request in input order: the failed ones carry
    ``finish_reason == "error"`` and their exception in ``error``.
    """

    def __init__(self, message: str, outputs: list | None = None):
        super().__init__(message)
        self.outputs = outputs or []


class DeadlineExceededError(RequestFailedError):
    """A waiting request could not get its first token by its deadline and was given up early."""


class OverloadedError(SloraError):
    """The bounded queue is full: nothing was queued. Try again later, or elsewhere."""


class EngineClosedError(SloraError):
    """The engine was closed: its device memory is gone, make a new ``LLM``."""


class EngineInUseError(SloraError):
    """An ``AsyncLLM`` serves this ``LLM``, or cannot while requests run that it would not know."""


class HostLostError(SloraError):
    """A process that serves the same model has died: its devices are gone, and so is the engine."""
