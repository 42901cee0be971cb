# SPDX-License-Identifier: Apache-2.0
"""TLS towards the servers: what people write about it, and what that means for connections of the `valkey` package. The
driver's own connections do the same in C (csrc/drivers/tls.c), with the same files."""

from __future__ import annotations

import errno
import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gmemd.errors import refuse

OPTIONS = {
    "tls": "on: connections to the servers are encrypted, and who they are is checked",
    "tls_ca_file": "certificates of the authorities that are trusted; those of the system without",
    "tls_cert_file": "our certificate, for servers that ask for one",
    "tls_key_file": "its key, readable by gmemd's user alone; in tls_cert_file without",
    "tls_server_name": "the name in the servers' certificates, if it is not what the endpoints are called",
    "tls_verify": "full; ca: whatever name the certificate is for; none: any certificate",
}
_YES, _NO = ("on", "true", "yes", "1"), ("off", "false", "no", "0")
_VERIFY = ("full", "ca", "none")
_FILES = ("tls_ca_file", "tls_cert_file", "tls_key_file")


def _no_passphrase() -> str:
    """Instead of asking at the terminal."""
    return ""


@dataclass(frozen=True)
class Tls:
    """Files are read for each connection: certificates are renewed."""

    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    server_name: str = ""
    verify: str = "full"

    @classmethod
    def of(cls, options: Mapping[str, str]) -> Tls | None:
        """None: not wanted. RequestError names the option."""
        on = options.get("tls", "off")
        if on not in _YES + _NO:
            raise refuse("tls", f"{on!r} is not on or off")
        given = {key: value for key, value in options.items() if key in OPTIONS and key != "tls"}
        if on in _NO:
            for key in given:
                raise refuse(key, "needs tls=on")
            return None
        made = cls(**{key.removeprefix("tls_"): value for key, value in given.items()})
        if made.verify not in _VERIFY:
            raise refuse("tls_verify", f"{made.verify!r} is not {', '.join(_VERIFY)}")
        if made.key_file and not made.cert_file:
            raise refuse("tls_key_file", "needs a tls_cert_file")
        for option in _FILES:
            path = options.get(option, "")
            if path:
                _check_file(option, path, private=path in (made.key_file or made.cert_file,))
        made.context()
        return made

    def context(self) -> ssl.SSLContext:
        """For one connection. RequestError names the file that can't be used."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.check_hostname = self.verify == "full"
        context.verify_mode = ssl.CERT_NONE if self.verify == "none" else ssl.CERT_REQUIRED
        option = "tls_ca_file"
        try:
            if self.ca_file:
                context.load_verify_locations(cafile=self.ca_file)
            else:
                context.load_default_certs()
            option = "tls_key_file" if self.key_file else "tls_cert_file"
            if self.cert_file:
                context.load_cert_chain(self.cert_file, self.key_file or None, _no_passphrase)
        except OSError as error:
            raise refuse(option, f"can't be used: {explain(error)}") from None
        return context

    def connections(self) -> Any:
        """A class of pools of the package's, whose connections are in TLS. Its own would ask clusters for no name."""
        import valkey

        tls = self

        class Connection(valkey.SSLConnection):
            def _wrap_socket_with_ssl(self, sock: Any) -> ssl.SSLSocket:
                return tls.context().wrap_socket(sock, server_hostname=tls.server_name or self.host)

        class Pool(valkey.ConnectionPool):
            def __init__(self, **arguments: Any) -> None:
                super().__init__(**{**arguments, "connection_class": Connection})

        return Pool

    def options(self) -> dict[str, str]:
        """The driver's."""
        named = {f"tls_{key}": value for key, value in vars(self).items() if value}
        return {"tls": "on", **named}


def _check_file(option: str, path: str, *, private: bool) -> None:
    if not path.startswith("/"):
        raise refuse(option, "must be an absolute path")
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
    except OSError as error:
        raise refuse(option, f"{path} can't be read: {error.strerror}") from None
    if private and status.st_mode & 0o037:
        raise refuse(option, f"{path} can be read by others: chmod 600", errno.EACCES)


def explain(error: BaseException) -> str:
    """What TLS has against it, without where in OpenSSL that is; of other errors what they say."""
    at: BaseException | None = error
    while at is not None and not isinstance(at, ssl.SSLError):
        at = at.__cause__ or at.__context__
    if isinstance(at, ssl.SSLCertVerificationError):
        return f"tls: the certificate: {at.verify_message}"
    if isinstance(at, ssl.SSLError):
        if at.reason == "WRONG_VERSION_NUMBER":
            return "tls: it does not speak TLS on that port"
        return f"tls: {at.reason.replace('_', ' ').lower() if at.reason else at}"
    return str(error)
