"""What the environment says of the way to a server: its proxy, and the certificates that are trusted.

HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, NO_PROXY and SSL_CERT_FILE, as curl and Go read them: NO_PROXY may hold names,
domains, addresses and networks (fd07::/64), and what is none of them is passed over.
"""

from __future__ import annotations

import importlib.util
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peftopt.errors import BadInput, MissingEnvironment

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


def of(url: str, environ: Mapping[str, str]) -> Proxy | None:
    """The proxy for the server at `url`; None = none."""
    import httpx

    server = httpx.URL(url)
    if server.host in HERE or _without(server.host, server.port, environ):
        return None
    for variable in (f"{server.scheme}_proxy", "all_proxy"):
        named = next((name for name in (variable, variable.upper()) if name in environ), "")
        if proxy := environ.get(named, "").strip():
            return Proxy(named, proxy if "://" in proxy else f"http://{proxy}")
    return None


def connection(url: str, via: Proxy | None, environ: Mapping[str, str]) -> dict[str, Any]:
    """The settings of httpx's client for it: its `proxy`, and how to `verify`. Raises BadInput or MissingEnvironment
    that names the variable which cannot be followed."""
    import httpx

    around = "or go around it: NO_PROXY with the server's host"
    settings: dict[str, Any] = {"verify": False}  # nothing is encrypted, and no certificates need to be read
    if via:
        if via.scheme not in (*PLAIN, *SOCKS):
            hint = f"write it with {', '.join((*PLAIN, *SOCKS))}, {around}"
            raise BadInput(f"{via.name} names a proxy of an unknown kind, {via.scheme}://", hint)
        if via.scheme in SOCKS and not importlib.util.find_spec("socksio"):
            hint = f"pip install 'httpx[socks]', {around}"
            raise MissingEnvironment(f"{via.name} names a SOCKS proxy, which needs the package socksio", hint)
        try:
            settings["proxy"] = httpx.Proxy(via.url)
        except (ValueError, httpx.InvalidURL) as error:
            raise BadInput(
                f"{via.name} is not the URL of a proxy", f"write it as in http://host:3128, {around}"
            ) from error
    if url.startswith("https:") or (via and via.scheme == "https"):
        try:
            settings["verify"] = httpx.create_ssl_context()
        except OSError as error:
            named = next((name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if environ.get(name)), "")
            where = f"{named}={environ[named]}" if named else "the certificates"
            raise BadInput(f"cannot read {where}: {error.strerror or error}", "name a PEM file, or unset it") from error
    return settings


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
