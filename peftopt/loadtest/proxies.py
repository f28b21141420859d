"""What the environment says of the way to a server: its proxy, and the certificates that are trusted.

HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, NO_PROXY and SSL_CERT_FILE, as curl and Go read them: NO_PROXY may hold names,
domains, addresses and networks (fd07::/64), and what is none of them is passed over.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from peftopt.errors import BadInput, MissingEnvironment

if TYPE_CHECKING:
    import aiohttp

HERE = ("localhost", "127.0.0.1", "::1")
"""A proxy is no way to this machine."""

PLAIN, SOCKS = ("http", "https"), ("socks5", "socks5h")


@dataclass(frozen=True)
class Proxy:
    """The proxy on the way to a server, and the variable that `name`s it."""

    name: str
    url: str

    @property
    def scheme(self) -> str:
        """How the proxy is spoken to, in lower case: "http", "socks5"."""
        return self.url.partition("://")[0].lower()


@dataclass(frozen=True)
class Way:
    """How to connect: through an HTTP `proxy` (a URL; None = none) or a `socks` proxy ("" = none), trusting `ssl`
    (False = nothing is encrypted, so no certificates are read)."""

    proxy: str | None = None
    socks: str = ""
    ssl: ssl.SSLContext | bool = False

    def connector(self, settings: Mapping[str, Any]) -> aiohttp.BaseConnector:
        """What opens the connections. `settings` are those of aiohttp.TCPConnector."""
        import aiohttp

        if not self.socks:
            return aiohttp.TCPConnector(**settings)
        from aiohttp_socks import ProxyConnector  # type: ignore[import-not-found, unused-ignore]

        connector: aiohttp.BaseConnector = ProxyConnector.from_url(self.socks, **settings)
        return connector


def of(url: str, environ: Mapping[str, str]) -> Proxy | None:
    """The proxy for the server at `url`; None = none."""
    server = urlsplit(url)
    host = server.hostname or ""
    if host in HERE or _without(host, server.port, environ):
        return None
    for variable in (f"{server.scheme}_proxy", "all_proxy"):
        name = next((name for name in (variable, variable.upper()) if name in environ), "")
        proxy = environ.get(name, "").strip()
        if proxy:
            return Proxy(name, proxy if "://" in proxy else f"http://{proxy}")
    return None


def way(url: str, via: Proxy | None, environ: Mapping[str, str]) -> Way:
    """How to connect to the server at `url`. Raises BadInput or MissingEnvironment that names the variable which
    cannot be followed."""
    around = "or go around it: NO_PROXY with the server's host"
    if via:
        _check(via, around)
    encrypted = url.startswith("https:") or (via is not None and via.scheme == "https")
    trusted = _certificates(environ) if encrypted else False
    if via is None:
        return Way(ssl=trusted)
    if via.scheme not in SOCKS:
        return Way(via.url, ssl=trusted)
    if not importlib.util.find_spec("aiohttp_socks"):
        hint = f"pip install aiohttp-socks, {around}"
        raise MissingEnvironment(f"{via.name} names a SOCKS proxy, which needs the package aiohttp-socks", hint)
    return Way(socks=via.url.replace("socks5h://", "socks5://", 1), ssl=trusted)


def _check(via: Proxy, around: str) -> None:
    """Raises BadInput for what is not the URL of a proxy."""
    if via.scheme not in (*PLAIN, *SOCKS):
        hint = f"write it with {', '.join((*PLAIN, *SOCKS))}, {around}"
        raise BadInput(f"{via.name} names a proxy of an unknown kind, {via.scheme}://", hint)
    try:
        address = urlsplit(via.url)
        known = address.hostname and (address.port or True)
    except ValueError:
        known = False
    if not known:
        raise BadInput(f"{via.name} is not the URL of a proxy", f"write it as in http://host:3128, {around}")


def _certificates(environ: Mapping[str, str]) -> ssl.SSLContext:
    """The certificates that are trusted: those of the system, or those that the environment names."""
    name = next((name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if environ.get(name)), "")
    file, folder = environ.get("SSL_CERT_FILE") or None, environ.get("SSL_CERT_DIR") or None
    try:
        return ssl.create_default_context(cafile=file, capath=folder)
    except OSError as error:
        where = f"{name}={environ[name]}" if name else "the certificates"
        raise BadInput(f"cannot read {where}: {error.strerror or error}", "name a PEM file, or unset it") from error


def _without(host: str, port: int | None, environ: Mapping[str, str]) -> bool:
    """Whether NO_PROXY holds a host."""
    listed = environ.get("no_proxy", environ.get("NO_PROXY", ""))
    return any(_covers(entry.strip().lower(), host, port) for entry in listed.split(",") if entry.strip())


def _covers(entry: str, host: str, port: int | None) -> bool:
    entry = entry.rpartition("://")[2]
    if entry == "*":
        return True
    network = _network(entry)
    if network is not None:
        try:
            return ipaddress.ip_address(host) in network
        except ValueError:
            return False
    name, colon, at = entry.rpartition(":")
    if colon and at.isdigit():
        if port != int(at):
            return False
        entry = name
    domain = entry.strip("[]").removeprefix("*").removeprefix(".")
    return bool(domain) and (host == domain or host.endswith(f".{domain}"))


def _network(entry: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(entry.replace("[", "").replace("]", ""), strict=False)
    except ValueError:
        return None
