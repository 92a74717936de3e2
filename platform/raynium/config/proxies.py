"""Which way a secret would go: proxies and password files that HTTP libraries take from the environment by themselves.

Loads no HTTP library before it is needed.
"""

import os
from urllib.parse import urlsplit

LOOPBACK = ("localhost", "127.0.0.1", "127.0.0.2", "::1", "127.0.0.0/8")


def spare_loopback() -> None:
    """Has the libraries of this process and its children ask no proxy for this machine's own addresses.

    A proxy elsewhere would look for them on itself, and see the tokens that are meant for a server here.
    """
    if not any(os.environ.get(name) for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")):
        return
    spared = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    missing = [each for each in LOOPBACK if each not in spared.split(",")]
    if missing and spared != "*":
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join([*filter(None, [spared]), *missing])


def proxy_for(url: str) -> str | None:
    """The proxy that requests to `url` go through, without its credentials; None if they go there straight."""
    from requests.utils import get_environ_proxies, select_proxy

    proxy = select_proxy(url, get_environ_proxies(url))
    return proxy and proxy.rpartition("@")[2]


def astray(url: str, secret: str) -> str | None:
    """Why `secret` (a variable's name) would not reach the server at `url`, or not it alone; None if it would."""
    from requests.utils import get_netrc_auth

    host = urlsplit(url).hostname
    if url.startswith("http://") and (proxy := proxy_for(url)) is not None:
        return (
            f"{secret} would be shown to the proxy {proxy} on its way to {url}, which is not encrypted. Add {host} to "
            "NO_PROXY, or use an https:// address"
        )
    if get_netrc_auth(url) is not None:
        return f"the password for {host} in .netrc would be sent in place of {secret}. Take one of the two away"
    return None
