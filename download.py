"""One checked download: https only, size limited, SHA-256 verified before the file gets its name.

requests and tqdm are imported inside the function, so that a script that may never download starts fast without them.
"""

import contextlib
import hashlib
import os
import socket
import sys
import time
from pathlib import Path
from urllib.parse import urljoin, urlsplit

from configurator import InputError

ADVICE = "fetch it by another way and run prepare.py with --source=PATH, which its --help explains"
MAX_HOPS = 5
CHUNK = 1 << 16  # bytes
FIRST_PAUSE = 0.5  # seconds before the second attempt; each later pause is twice as long


class _Passing(Exception):
    """A failure that another attempt may cure; its text is the short cause."""


def _is_https(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme == "https" and bool(parts.hostname)
    except ValueError:  # such as https://[oops
        return False


def _cause(error: Exception) -> str:
    """A few words for an exception of requests, whose own message is a paragraph of nested reprs."""
    from requests import exceptions

    chain, pending = [], [error]
    while pending:  # the telling error is wrapped several times, as cause, as context, as argument or as urllib3's .reason
        link = pending.pop(0)
        if isinstance(link, BaseException) and link not in chain:
            chain.append(link)
            pending += [link.__cause__, link.__context__, getattr(link, "reason", None), *link.args]
    if any(isinstance(link, exceptions.Timeout | TimeoutError) for link in chain):
        return "no answer in time"
    if isinstance(error, exceptions.SSLError):
        return "the server's certificate is not accepted"
    if isinstance(error, exceptions.ProxyError):
        return "the proxy gives no connection"
    if any(isinstance(link, socket.gaierror) for link in chain):
        return "its host name is not found (no network?)"
    if isinstance(error, exceptions.ChunkedEncodingError):
        return "the connection broke off before the end"
    for link in chain:
        if isinstance(link, OSError) and link.strerror:
            return link.strerror.lower()
    return "no connection" if isinstance(error, exceptions.ConnectionError) else type(error).__name__


def download(url: str, path: str | os.PathLike, sha256: str, max_bytes: int, timeout=30, retries: int = 3):
    """Fetches `url` into the file `path`, which appears only when it is complete and has the given SHA-256 (hexadecimal).

    timeout: seconds without an answer, or requests' pair (connect, read). retries: attempts in all; a refused or broken connection, a
    time-out and a status 5xx are tried again after a short pause, nothing else is. Redirects are followed as long as they stay https.
    Raises InputError: one line with the address, what happened and what to do. Whatever was at `path` before is then unchanged, and no
    partial file is left.
    """
    try:
        import requests
        from tqdm import tqdm
    except ImportError as error:
        raise InputError(f"cannot download {url}: the package {error.name} is missing: pip install {error.name}, or {ADVICE}") from None

    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")

    def refuse(what: str):
        raise InputError(f"cannot download {url}: {what}; {ADVICE}") from None

    def attempt(session):
        address = url
        for _ in range(MAX_HOPS + 1):
            if not _is_https(address):
                refuse("only https addresses are used" if address == url else f"it redirects to {address[:100]!r}, which is not https")
            # identity: what is counted and hashed is what is sent, and nothing small can unpack into something huge
            with session.get(address, stream=True, timeout=timeout, allow_redirects=False, headers={"Accept-Encoding": "identity"}) as answer:
                if answer.is_redirect:
                    address = urljoin(address, answer.headers["location"])
                    continue
                status = f"the server answers {answer.status_code} {(answer.reason or '')[:40]}".rstrip()
                if answer.status_code >= 500:
                    raise _Passing(status)
                if answer.status_code != 200:
                    refuse(status)
                save(answer)
                return
        refuse(f"more than {MAX_HOPS} redirects")

    def save(answer):
        announced = answer.headers.get("content-length", "")
        size = int(announced) if announced.isascii() and announced.isdigit() else None
        too_large = f"it is larger than the {max_bytes:,} bytes expected at most"
        if size is not None and size > max_bytes:
            refuse(too_large)
        digest, received = hashlib.sha256(), 0
        bar = tqdm(total=size, unit="B", unit_scale=True, desc=path.name, leave=False, disable=not sys.stderr.isatty())
        with open(temporary, "wb") as file, bar:
            for chunk in answer.iter_content(CHUNK):
                received += len(chunk)
                if received > max_bytes:
                    refuse(too_large)
                file.write(chunk)
                digest.update(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
        if size is not None and received < size:  # requests before 2.32 lets a short body pass as complete
            raise _Passing("the connection broke off before the end")
        if digest.hexdigest() != sha256.lower():
            refuse(f"the {received:,} bytes received have sha256 {digest.hexdigest()[:16]}... and not the expected {sha256[:16].lower()}...")

    try:
        with requests.Session() as session:
            for number in range(1, max(1, retries) + 1):
                try:
                    attempt(session)
                    break
                except _Passing as passing:
                    cause = str(passing)
                except requests.exceptions.SSLError as error:
                    refuse(_cause(error))
                except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
                    cause = _cause(error)
                except (requests.RequestException, ValueError) as error:  # ValueError: addresses that urllib3 cannot parse
                    refuse(_cause(error))
                if number >= retries:
                    refuse(cause + (f" ({number} attempts)" if number > 1 else ""))
                time.sleep(FIRST_PAUSE * 2 ** (number - 1))
        os.replace(temporary, path)
    except OSError as error:  # requests' errors, OSErrors too, have been dealt with above: this is the disk
        raise InputError(f"cannot write {path}: {error.strerror or error}; whatever was there before is unchanged") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
