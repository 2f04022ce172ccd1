"""Bearer tokens of services: from an environment variable, and asked for wherever others reach the address."""

from __future__ import annotations

import ipaddress
import os

from data.errors import RequestError


def bearer_token(token_env: str) -> str | None:
    """The token from an environment variable, None when it is unset or empty."""
    return os.environ.get(token_env, "").strip() or None


def required_token(where: str, host: str, token_env: str) -> str | None:
    """The token, which may be missing on a loopback address only.

    Args:
        where: the setting of the address, for the error.
        host: the address that is listened on.
        token_env: environment variable with the token.

    Raises:
        RequestError: another address without a token.
    """
    token = bearer_token(token_env)
    if token is None and not is_loopback(host):
        legal = f"127.0.0.1, ::1 or localhost, or a bearer token in the environment variable {token_env}"
        raise RequestError(where, host, legal)
    return token


def is_loopback(host: str) -> bool:
    """True for `localhost` and addresses of 127.0.0.0/8 and ::1; names other than localhost are not."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
