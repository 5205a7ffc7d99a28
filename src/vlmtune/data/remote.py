"""Images that rows name by web address: refused, or downloaded once into the user's cache folder.

Rows are not trusted: an address that leads to this machine or its private network is refused unless a person named its
host. The IP address that was checked is the one connected to, after every redirect too.
"""

from __future__ import annotations

import hashlib
import ipaddress
import logging
import os
import socket
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import httpx2

from vlmtune.data import images
from vlmtune.data.hashes import user_cache_dir
from vlmtune.data.quarantine import Quarantine
from vlmtune.data.sample import ImageRef, Sample
from vlmtune.errors import DataError

logger = logging.getLogger("vlmtune.data")

MAX_BYTES = 50_000_000
THREADS = 16
TIMEOUT_S = 20.0
# Of one image with its redirects: a server that sends a byte a second keeps no thread for long.
DEADLINE_S = 120.0
REDIRECTS = 5
# Seconds before each new try.
PAUSES_S = (1.0, 3.0)
ROWS_AT_ONCE = 1_000
LOG_EVERY_S = 10.0

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class _Refused(Exception):
    """Why an address gives no image; another try would not help."""


class _Failed(_Refused):
    """Why an address gave no image this time."""


def is_remote(image: ImageRef) -> bool:
    """Whether an image is named by a web address."""
    return (image.path or "").lower().startswith(("http:", "https:"))


def refuse(samples: Iterable[Sample], quarantine: Quarantine) -> Iterator[Sample]:
    """Yield the samples without web addresses, and set the others aside."""
    for sample in samples:
        found = next(filter(is_remote, sample.images), None)
        if found is None:
            yield sample
        else:
            quarantine.add(sample.id, "remote image", refusal(found))


def refusal(image: ImageRef) -> str:
    """Return why an image with a web address is refused, and the way out."""
    return f"the image {_shown(image.path)} lies on the network; download it, or set allow_remote_images: true"


class Downloader:
    """Downloads images into the user's cache folder, each address once.

    Args:
        private_hosts: ``HOST`` or ``HOST:PORT`` that may lie on this machine or its private network.

    Raises:
        DataError: the cache folder cannot be written.
    """

    def __init__(self, private_hosts: Collection[str] = ()) -> None:
        self._private_hosts = frozenset(host.lower() for host in private_hosts)
        self._folder = user_cache_dir() / "images"
        self._failed: dict[str, str] = {}
        self._downloaded = self._found = 0
        self._logged = time.monotonic()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error

    def samples(self, samples: Iterable[Sample], quarantine: Quarantine) -> Iterator[Sample]:
        """Yield the samples with downloaded files in place of addresses; those whose images fail are set aside.

        Raises:
            DataError: the cache folder cannot be written.
        """
        left = iter(samples)
        # Connections are not kept: their certificate is of one host, and other hosts may share its IP address.
        limits = httpx2.Limits(max_keepalive_connections=0)
        with httpx2.Client(timeout=TIMEOUT_S, limits=limits) as client, ThreadPoolExecutor(THREADS) as pool:
            while batch := list(islice(left, ROWS_AT_ONCE)):
                refs = filter(is_remote, chain.from_iterable(sample.images for sample in batch))
                addresses = [url for url in dict.fromkeys(str(ref.path) for ref in refs) if url not in self._failed]
                files = {}
                for url, file in zip(addresses, pool.map(lambda url: self._file(client, url), addresses), strict=True):
                    self._log()
                    if isinstance(file, Path):
                        files[url] = ImageRef(str(file))
                    else:
                        self._failed[url] = file
                for sample in batch:
                    bad = next((str(ref.path) for ref in sample.images if ref.path in self._failed), None)
                    if bad is not None:
                        reason = f"the image {_shown(bad)} cannot be downloaded: {self._failed[bad]}"
                        quarantine.add(sample.id, "remote image", reason)
                        continue
                    placed = tuple(files.get(ref.path or "", ref) for ref in sample.images)
                    yield sample if placed == sample.images else replace(sample, images=placed)
        self._log(last=True)

    def _log(self, last: bool = False) -> None:
        now = time.monotonic()
        if (last and self._downloaded + self._found + len(self._failed)) or now - self._logged >= LOG_EVERY_S:
            self._logged = now
            logger.info(
                "images by address: %d downloaded to %s, %d found there, %d failed",
                self._downloaded, self._folder, self._found, len(self._failed),
            )  # fmt: skip

    def _file(self, client: httpx2.Client, url: str) -> Path | str:
        """Return the image's file in the cache, or why there is none."""
        key = hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()
        try:
            suffix = PurePosixPath(urlsplit(url).path).suffix.lower()
        except ValueError as error:
            return f"it is no address ({error})"
        file = self._folder / key[:2] / f"{key}{suffix if suffix in images.EXTENSIONS else ''}"
        if file.exists():
            self._found += 1
            return file
        for number, pause in enumerate((*PAUSES_S, None)):
            try:
                self._download(client, url, file, number)
            except _Failed as error:
                if pause is None:
                    return f"{error} ({number + 1} tries)"
                time.sleep(pause)
            except _Refused as error:
                return str(error)
            else:
                break
        self._downloaded += 1
        return file

    def _download(self, client: httpx2.Client, url: str, file: Path, attempt: int) -> None:
        deadline = time.monotonic() + DEADLINE_S
        try:
            address = httpx2.URL(url)
            for _ in range(REDIRECTS + 1):
                request = self._request(client, address, attempt)
                response = client.send(request, stream=True)
                try:
                    if not response.has_redirect_location:
                        self._keep(response, file, deadline)
                        return
                    address = address.join(response.headers["location"])
                finally:
                    response.close()
        except httpx2.InvalidURL as error:
            raise _Refused(f"it is no address ({error})") from error
        except httpx2.HTTPError as error:
            raise _Failed(f"{error}" or type(error).__name__) from error
        raise _Refused(f"it was redirected more than {REDIRECTS} times")

    def _request(self, client: httpx2.Client, url: httpx2.URL, attempt: int) -> httpx2.Request:
        """Make a request to the IP address that was checked; the host's name stands in header and certificate."""
        if url.scheme not in ("http", "https") or not url.host:
            raise _Refused(f"{_shown(str(url))} is no http or https address")
        port = url.port or (443 if url.scheme == "https" else 80)
        try:
            found = socket.getaddrinfo(url.host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise _Failed(f"the host {url.host} is not found ({error})") from error
        addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
        inside = next((address for address in addresses if not _is_public(address)), None)
        if inside is not None and self._private_hosts.isdisjoint((url.host, f"{url.host}:{port}")):
            raise _Refused(
                f"its host {url.host} lies on this machine or a private network ({inside}); if you trust it, set "
                f"private_image_hosts: [{url.host}]"
            )
        return client.build_request(
            "GET",
            url.copy_with(host=str(addresses[attempt % len(addresses)])),
            headers={"Host": url.netloc.decode("ascii"), "Accept-Encoding": "identity"},
            extensions={"sni_hostname": url.raw_host.decode("ascii")},
        )

    def _keep(self, response: httpx2.Response, file: Path, deadline: float) -> None:
        """Write an image's bytes beside its place, check them, and move them there."""
        if response.status_code != httpx2.codes.OK:
            kind = _Failed if response.status_code == 429 or response.status_code >= 500 else _Refused
            raise kind(f"the server answered {response.status_code} {response.reason_phrase}".rstrip())
        try:
            file.parent.mkdir(exist_ok=True)
            handle, name = tempfile.mkstemp(dir=file.parent, prefix=".part-")
            part = Path(name)
            try:
                with os.fdopen(handle, "wb") as opened:
                    size = 0
                    for piece in response.iter_bytes():
                        size += len(piece)
                        if size > MAX_BYTES:
                            raise _Refused(f"it is larger than {MAX_BYTES:,} bytes")
                        if time.monotonic() > deadline:
                            raise _Failed(f"it took longer than {DEADLINE_S:g} s")
                        opened.write(piece)
                if problem := images.check(ImageRef(name)):
                    raise _Refused(f"what the server sent is no usable image ({problem.replace(name, 'it')})")
                part.replace(file)
            finally:
                part.unlink(missing_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> DataError:
        return DataError(
            f"Images cannot be downloaded to {self._folder}: {error.strerror or error}. Make room there, or name "
            "another cache folder by XDG_CACHE_HOME."
        )


def _is_public(address: _Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return _is_public(inner)
    return address.is_global and not address.is_multicast


def _shown(url: str | None) -> str:
    return (url or "")[:120]
