"""Why a request was not answered."""


class ServingError(RuntimeError):
    """A request was not answered; subclasses say why."""


class QueueFullError(ServingError):
    """As many requests wait as may.

    Attributes:
      retry_after: Seconds after which there may be room.
    """

    def __init__(self, message: str, retry_after: int):
        super().__init__(message)
        self.retry_after = retry_after


class UnavailableError(ServingError):
    """The server takes no requests: it has not started, is closing, or has failed for good."""


class DeadlineError(ServingError):
    """The request was not over at its deadline."""


class CancelledError(ServingError):
    """The request was cancelled."""


class SlowReaderError(CancelledError):
    """The request was cancelled because nobody took its tokens."""


class NoTokenError(ServingError, ValueError):
    """No token could be drawn or scored, as where the model's logits are not finite."""


class StepError(ServingError):
    """A step of the model failed, and with it every request that it ran.

    Attributes:
      reference: What the log has the cause under.
    """

    def __init__(self, reference: str):
        super().__init__(
            f"a step of the model failed; the server's log has the cause under {reference}"
        )
        self.reference = reference
