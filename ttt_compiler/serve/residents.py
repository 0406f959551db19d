"""How many sessions are in memory, and which one goes when there is no room.

May be changed here: the bound and the order of eviction. Only names are kept, so a pool that counts bytes
can take this place.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from ttt_compiler.serve.errors import BusyError


class Residents:
    """Names of the sessions in memory, the longest unused first.

    Args:
        limit: sessions in memory at most.
        evictable: whether a session at rest may go, because it can be read again.
    """

    def __init__(self, limit: int, *, evictable: bool) -> None:
        self.limit, self.evictable = limit, evictable
        self._busy: OrderedDict[Hashable, bool] = OrderedDict()

    def __len__(self) -> int:
        return len(self._busy)

    def admit(self, name: Hashable) -> Hashable | None:
        """Make room for a session and mark it busy; returns the name of one that has to go for it.

        Raises:
            BusyError: there is no room; nothing changed.
        """
        gone = None
        if name not in self._busy and len(self._busy) >= self.limit:
            resting = (other for other, busy in self._busy.items() if not busy)
            gone = next(resting, None) if self.evictable else None
            if gone is None:
                raise BusyError(
                    f"all {self.limit} sessions that the server keeps in memory are "
                    + (
                        "busy. Send the request again later, or start the server with a larger --max-sessions"
                        if self.evictable
                        else "taken, and none can be put on disk. Delete one (DELETE /v1/sessions/ID), or "
                        "start the server with --sessions DIR or a larger --max-sessions"
                    )
                )
            del self._busy[gone]
        self._busy[name] = True
        self._busy.move_to_end(name)
        return gone

    def rest(self, name: Hashable) -> None:
        """The session stays in memory, and may go."""
        self._busy[name] = False

    def remove(self, name: Hashable) -> None:
        """The session is not in memory."""
        self._busy.pop(name, None)
