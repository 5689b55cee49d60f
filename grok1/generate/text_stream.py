"""The text of one prompt's continuation, as it comes."""

from collections.abc import Iterator

from grok1.generate.completion import Completion
from grok1.generate.requests import Batch
from grok1.machine.jax_settings import own_settings


class TextStream(Iterator[str]):
    """The text of one prompt's continuation, piece by piece.

    Attributes:
      completion: The whole `Completion`; None until the stream has ended.
    """

    def __init__(self, batch: Batch):
        self.completion: Completion | None = None
        self._batch: Batch | None = batch
        self._pieces = (piece for _, piece in batch.run() if piece)

    def __next__(self) -> str:
        """Returns the next piece.

        Raises:
          StopIteration: At the end.
          RuntimeError: After a step that was interrupted, or failed.
        """
        if self._batch is None:
            raise StopIteration
        try:
            with own_settings():
                return next(self._pieces)
        except StopIteration:
            builder = self._batch.builders[0]
            if builder.stop_reason is None:
                raise RuntimeError(
                    "this stream was interrupted, or failed, before its end; begin a new one"
                ) from None
            self.completion = builder.build()
            self._batch = None  # and with it the model
            raise
