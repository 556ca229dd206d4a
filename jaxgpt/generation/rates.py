"""Limits on what a client may do in a minute, and on the connections that the process has files for."""

import collections
import ipaddress
import math
import os

from jaxgpt.errors import UserError
from jaxgpt.generation.api import ApiError

SPARE_FILES = 12  # left for whatever else the process opens
CROWD = 8  # connections beyond the limit that are still told so in an answer
AT_ONCE = 2  # connections that are accepted in one turn of the event loop
ON_THE_WAY = 4 * (AT_ONCE + 1)  # until one that is too many is closed, the loop has made four turns


class Rate:
    """Counts what clients have done in the last minute.

    Args:
        most: How often each may do it in a minute; 0 for no limit.
        what: What it is, in the plural, for the message.
    """

    def __init__(self, most: int, what: str):
        self._most, self._what = most, what
        self._times: dict[str, collections.deque[float]] = {}
        self._next_cleaning = 0.0

    def check(self, client: str, now: float) -> None:
        """Raises an ApiError where the client has to wait."""
        times = self._times.get(client)
        while times and times[0] <= now - 60:
            times.popleft()
        if self._most and times and len(times) >= self._most:
            wait = max(1, math.ceil(times[0] + 60 - now))
            raise ApiError(
                429,
                f"more than {self._most} {self._what} in a minute: wait {wait} seconds",
                code="rate_limit_exceeded",
                retry_after=wait,
            )

    def count(self, client: str, now: float) -> None:
        """Notes that the client has done it once more."""
        if not self._most:
            return
        if now >= self._next_cleaning:
            self._times = {name: times for name, times in self._times.items() if times and times[-1] > now - 60}
            self._next_cleaning = now + 1
        self._times.setdefault(client, collections.deque(maxlen=self._most)).append(now)


def client_name(address: str) -> str:
    """Returns what an address is counted as: itself, or of IPv6 the network of 64 bits, which one machine may have."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    return str(ipaddress.ip_network((ip.packed[:8] + bytes(8), 64))) if ip.version == 6 else address


def most_connections(asked: int) -> int:
    """Returns how many connections the process can have at once: `asked`, or what its limit of open files leaves.

    Raises:
        UserError: It leaves none.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return asked
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files == resource.RLIM_INFINITY:
        return asked
    left = files - _open_files() - SPARE_FILES - CROWD - ON_THE_WAY
    if left < 1:
        raise UserError(f"the limit of open files is {files}, which leaves none for connections: raise it by ulimit -n")
    return min(asked, left)


def _open_files() -> int:
    try:
        return len(os.listdir("/dev/fd"))
    except OSError:
        return 32
