"""The way to a server, as the environment says it: followed, or one clear error that names the variable."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from helpers.command_line import command
from helpers.proxy import Led, http, socks5
from helpers.scripted import WHOLE, scripted, streamed

from peftopt.errors import BadInput, MissingEnvironment
from peftopt.loadtest import proxies

URL = "http://10.1.2.3:8000"
PROXY = {"HTTP_PROXY": "http://proxy:3128"}


@pytest.mark.parametrize(
    ("listed", "direct"),
    [
        ("10.1.2.3", True),
        ("10.0.0.0/8", True),
        ("10.1.2.3:8000", True),
        ("10.1.2.3:9000", False),
        ("*", True),
        ("localhost,fd07:b51a:cc66:f0::/64,10.1.2.3", True),
        ("fd07:b51a:cc66:f0::/64,[::1]", False),
        ("[::1]", False),
        ("///,[,a b,%%", False),
        ("", False),
    ],
)
def test_no_proxy_holds_addresses_and_networks_and_what_is_odd_is_passed_over(listed: str, direct: bool) -> None:
    assert (proxies.of(URL, {**PROXY, "NO_PROXY": listed}) is None) is direct


@pytest.mark.parametrize(
    ("listed", "direct"), [("example.org", True), (".org", True), ("*.example.org", True), ("ample.org", False)]
)
def test_no_proxy_holds_domains(listed: str, direct: bool) -> None:
    environ = {"https_proxy": "proxy:3128", "no_proxy": listed}
    assert (proxies.of("https://api.example.org/x", environ) is None) is direct


def test_a_proxy_is_named_by_its_variable_and_no_way_to_this_machine() -> None:
    assert proxies.of(URL, {"ALL_PROXY": "proxy:1"}) == proxies.Proxy("ALL_PROXY", "http://proxy:1")
    assert proxies.of(URL, {"http_proxy": "", "HTTP_PROXY": "http://proxy:1"}) is None, "the one in small letters rules"
    for here in ("http://localhost:1", "http://127.0.0.1:1", "http://[::1]:8000", "http://[::1]"):
        assert proxies.of(here, PROXY) is None
    assert proxies.of("http://[fd07::1]:80", {**PROXY, "NO_PROXY": "fd07::/16"}) is None


@pytest.mark.parametrize("proxy", ["socks://127.0.0.1:1080/", "ftp://x", "http://[::1", "http://x:port"])
def test_a_proxy_that_is_none_is_refused_by_its_variable(proxy: str) -> None:
    environ = {"ALL_PROXY": proxy}
    with pytest.raises(BadInput, match="ALL_PROXY") as refused:
        proxies.way(URL, proxies.of(URL, environ), environ)
    assert "NO_PROXY" in refused.value.hint


def test_a_socks_proxy_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingEnvironment, match="ALL_PROXY"):
        proxies.way(URL, proxies.Proxy("ALL_PROXY", "socks5://127.0.0.1:1080"), {})


def test_certificates_are_read_where_something_is_encrypted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for broken in (tmp_path / "none.pem", tmp_path / "text.pem"):
        monkeypatch.setenv("SSL_CERT_FILE", str(broken))
        environ = {"SSL_CERT_FILE": str(broken)}
        assert proxies.way(URL, None, environ) == proxies.Way()
        with pytest.raises(BadInput, match="SSL_CERT_FILE"):
            proxies.way("https://10.1.2.3", None, environ)
        (tmp_path / "text.pem").write_text("no certificate")


@pytest.mark.parametrize(
    ("variable", "value", "code", "says"),
    [
        ("NO_PROXY", "fd07:b51a:cc66:f0::/64,[::1]", 4, "no server at http://127.0.0.2:9"),
        ("HTTP_PROXY", "http://127.0.0.1:9", 4, "through the proxy of HTTP_PROXY"),
        ("ALL_PROXY", "socks://127.0.0.1:1080/", 2, "ALL_PROXY"),
        ("SSL_CERT_FILE", "/nonexistent.pem", 4, "no server at http://127.0.0.2:9"),
    ],
)
def test_the_verb_says_which_variable(
    variable: str,
    value: str,
    code: int,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv(variable, value)
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "hi"}\n')
    assert command("load", "http://127.0.0.2:9", "--prompts", prompts, "--requests", 1) == code
    assert says in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("kind", [http, socks5])
def test_a_load_goes_through_the_proxy_of_the_environment(
    kind: Callable[[Led], AbstractContextManager[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "hi"}\n')
    with scripted(streamed(WHOLE)) as server:
        led = Led(server.url)
        with kind(led) as proxy:
            monkeypatch.setenv("ALL_PROXY", proxy)
            flags = ["--prompts", prompts, "--requests", 2, "--concurrency", 1, "--new-tokens", 4]
            assert command("load", "http://10.1.2.3:8000", *flags) == 0
        assert len(server.bodies) >= 2
    assert set(led.asked) == {("10.1.2.3", 8000)}, "nothing went around the proxy"


@pytest.mark.parametrize("url", ["http://[::1", "http://x:port", "http://"])
def test_a_url_that_is_none_is_refused(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "hi"}\n')
    assert command("load", url, "--prompts", prompts) == 2
    assert "hint:" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["secret\n", "sécret", "a\nb"])
def test_an_api_key_is_one_line_of_ascii(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "hi"}\n')
    monkeypatch.setenv("THE_KEY", key)
    with scripted(streamed(WHOLE)) as server:
        flags = ["--prompts", prompts, "--requests", 1, "--concurrency", 1, "--new-tokens", 4]
        code = command("load", server.url, *flags, "--api-key-env", "THE_KEY")
    assert code == (0 if key.strip() == "secret" else 2)
    assert key.strip() not in capsys.readouterr().err
