"""Servers on several nodes: each node's address, and ending all nodes when one ends."""

import os
import secrets
import selectors
import socket
from collections.abc import Callable
from contextlib import suppress
from ipaddress import ip_address
from threading import Thread
from typing import Any

from qwen3next_plugin.config.errors import ConfigError

INTERFACE = "GLOO_SOCKET_IFNAME"
MEETING_SECONDS = 60.0
WORD_SECONDS = 5.0  # for a connected rank to send the word
ALIVE = {  # a node that is cut off, or without power, is lost after 9 s
    socket.TCP_KEEPIDLE: 5,
    socket.TCP_KEEPINTVL: 1,
    socket.TCP_KEEPCNT: 4,
}


def meet_at(flag: str, first: str, variable: str) -> None:
    """Choose this node's address for the engine and for Gloo, unless the environment does.

    It is the address from which this node reaches `first`, the first node. An engine would use that
    of the default route, and Gloo that of the host name, which on Debian is a loopback address.

    Raises:
        ConfigError: `first` cannot be reached; names the flag that gave it.
    """
    if {variable, INTERFACE} <= os.environ.keys():
        return
    address = _own_address(flag, first)
    os.environ.setdefault(variable, address)
    os.environ.setdefault(INTERFACE, _interface(address))


def end_together(
    group: Any, *, ranks_here: int, first_node: bool, own: str, lost: Callable[[str], None]
) -> None:
    """Connect the ranks of other nodes with the first rank, whose address is `own`.

    Every rank of the engine's `group` calls this. When a rank ends, those connected with it call
    `lost` with a line for the log, because ranks without work would wait forever.
    """
    if group.rank_in_group == 0:
        others = _accept(group, own, group.world_size - ranks_here)
    else:
        where, word = group.broadcast_object(None, src=0)
        others = [] if first_node else [_join(where, word)]
    if others:
        Thread(target=_watch, args=(others, lost), daemon=True, name="other-nodes").start()


def _own_address(flag: str, first: str) -> str:
    try:
        family, kind, _, _, where = socket.getaddrinfo(first, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(where)  # sends nothing
            own: str = probe.getsockname()[0]
    except OSError as error:
        raise ConfigError(
            f"{flag} {first}: this node has no way to it ({error.strerror}); give the address of "
            f"the first node"
        ) from None
    if ip_address(own.partition("%")[0]).is_loopback and _is_name(first):
        raise ConfigError(
            f"{flag} {first}: this name is a loopback address here, as /etc/hosts has it on "
            f"Debian, which other nodes cannot reach; give the address of the first node "
            f"(127.0.0.1 if all are on this machine)"
        )
    return own


def _is_name(first: str) -> bool:
    """Whether `first` is a host name; `localhost` counts as an address."""
    try:
        ip_address(first)
    except ValueError:
        return first != "localhost"
    return False


def _interface(address: str) -> str:
    """The network interface that has this address."""
    import psutil  # which both engines need

    for name, found in psutil.net_if_addrs().items():
        if address in (one.address.partition("%")[0] for one in found):
            return name
    raise ConfigError(f"no network interface has the address {address}; set {INTERFACE}")


def _accept(group: Any, own: str, count: int) -> list[socket.socket]:
    """Accept connections until `count` ranks have sent the word; ignore others."""
    word = secrets.token_bytes(16)
    joined: list[socket.socket] = []
    family = socket.AF_INET6 if ":" in own else socket.AF_INET
    with socket.create_server((own, 0), family=family) as server:
        server.settimeout(MEETING_SECONDS)
        group.broadcast_object((server.getsockname()[:2], word), src=0)
        while len(joined) < count:
            one, _ = server.accept()
            one.settimeout(WORD_SECONDS)
            with suppress(OSError):  # it resets, or sends nothing
                if one.recv(len(word), socket.MSG_WAITALL) == word:
                    joined.append(one)
                    continue
            one.close()
    return joined


def _join(where: tuple[str, int], word: bytes) -> socket.socket:
    joined = socket.create_connection(where, MEETING_SECONDS)
    joined.sendall(word)
    return joined


def _watch(others: list[socket.socket], lost: Callable[[str], None]) -> None:
    """Wait until one of the connections ends."""
    with selectors.DefaultSelector() as ends:
        for one in others:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in ALIVE.items():
                one.setsockopt(socket.IPPROTO_TCP, option, value)
            ends.register(one, selectors.EVENT_READ, one.getpeername()[0])
        ended = ends.select()[0][0].data
    lost(f"the node at {ended} has ended or is cut off, and so this one ends: start all of them")
