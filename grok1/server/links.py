"""How the processes of a server hear of each turn: from process 0, over connections of its own."""

import contextlib
from collections.abc import Iterator

from jax.sharding import Mesh

from grok1.server.replica import Plan


class Leader:
    """Tells the others what process 0 does."""

    @classmethod
    @contextlib.contextmanager
    def of(cls, mesh: Mesh) -> Iterator["Leader"]:
        """Yields what tells them."""
        yield cls()

    def send(self, plan: Plan) -> None:
        """Sends a plan."""
