"""Images by web address: refused by default, and downloaded once, checked and bounded, when they are allowed."""

from __future__ import annotations

import json
import logging
import re
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from vlmtune.cli import main
from vlmtune.config import VLMDataArguments
from vlmtune.data import remote
from vlmtune.data.conversion.targets import TARGETS
from vlmtune.data.hashes import user_cache_dir
from vlmtune.data.images import content_of
from vlmtune.data.loading import LoadedData, load_samples
from vlmtune.data.sample import Sample
from vlmtune.errors import ConfigError, DataError

Write = Callable[..., Path]


class Site:
    """A server on the loopback interface; ``seen`` counts the requests for each path."""

    def __init__(self, photo: bytes) -> None:
        self.seen: Counter[str] = Counter()
        self.hosts: set[str] = set()
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.seen[self.path] += 1
                site.hosts.add(self.headers["Host"])
                status, headers, body = site.answer(self.path, photo)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body) + (1000 if self.path == "/cut.jpg" else 0)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self.server.server_address[1]}"
        self.url = f"http://{self.host}"

    def answer(self, path: str, photo: bytes) -> tuple[int, dict[str, str], bytes]:
        moved = {
            "/moved.jpg": "/0.jpg", "/loop.jpg": "/loop.jpg", "/file.jpg": "file:///etc/passwd",
            "/inside.jpg": f"http://localhost:{self.server.server_address[1]}/0.jpg",
        }  # fmt: skip
        if path in moved:
            return 302, {"Location": moved[path]}, b""
        if path == "/busy.jpg" and self.seen[path] < 3:
            return 503, {}, b""
        if path == "/down.jpg":
            return 500, {}, b""
        if path == "/page.jpg":
            return 200, {}, b"<html>Sign in</html>"
        return (404, {}, b"") if path == "/gone.jpg" else (200, {}, photo)


@pytest.fixture
def site(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSES_S", (0.0, 0.0))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    found = Site((image_folder / "0.jpg").read_bytes())
    thread = threading.Thread(target=found.server.serve_forever, args=(0.01,))
    thread.start()
    yield found
    found.server.shutdown()
    thread.join()
    found.server.server_close()


def row(url: str, number: int = 0) -> dict[str, Any]:
    asked = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": f"What is {number}?"}]
    return {"id": f"r{number}", "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "X"}]}


def read(path: Path, *hosts: str) -> LoadedData:
    return load_samples(path, max_bad_fraction=1, allow_remote_images=True, private_image_hosts=hosts)


def files() -> list[Path]:
    return sorted(file for file in (user_cache_dir() / "images").rglob("*") if file.is_file())


def test_an_address_is_downloaded_once(
    site: Site, messages_file: Write, image_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vlmtune.data")
    path = messages_file([row(f"{site.url}/0.jpg", 0), row(f"{site.url}/0.jpg", 1), row("1.jpg", 2)])
    first = read(path, site.host)
    samples = [Sample.from_row(found) for found in first.dataset]
    (file,) = files()
    assert [sample.images[0].path for sample in samples] == [str(file), str(file), str(path.parent / "1.jpg")]
    assert file.read_bytes() == (image_folder / "0.jpg").read_bytes()
    assert "1 downloaded to" in caplog.text
    assert read(path, site.host).dataset[:] == first.dataset[:]
    assert "0 downloaded to" in caplog.text and "1 found there" in caplog.text
    assert site.seen == {"/0.jpg": 1}
    assert site.hosts == {site.host}


def test_addresses_are_refused_by_default(site: Site, messages_file: Write) -> None:
    found = load_samples(messages_file([row(f"{site.url}/0.jpg"), row("1.jpg", 1)]), max_bad_fraction=1)
    (bad,) = found.quarantine.rows
    assert (bad.id, bad.kind) == ("r0", "remote image")
    assert "allow_remote_images" in bad.reason
    assert not site.seen


@pytest.mark.parametrize(
    ("name", "reason", "requests"),
    [
        ("gone.jpg", "the server answered 404", 1),
        ("down.jpg", r"the server answered 500 .*\(3 tries\)", 3),
        ("cut.jpg", r"\(3 tries\)", 3),
        ("page.jpg", "no usable image", 1),
        ("loop.jpg", "redirected more than 5 times", 6),
        ("file.jpg", "is no http or https address", 1),
        ("inside.jpg", r"its host localhost lies on this machine.*private_image_hosts: \[localhost\]", 1),
    ],
)
def test_what_fails_is_set_aside_with_the_reason(
    site: Site, messages_file: Write, name: str, reason: str, requests: int
) -> None:
    found = read(messages_file([row(f"{site.url}/{name}"), row(f"{site.url}/0.jpg", 1)]), site.host)
    (bad,) = found.quarantine.rows
    assert (bad.id, bad.kind) == ("r0", "remote image")
    assert f"{site.url}/{name} cannot be downloaded" in bad.reason
    assert re.search(reason, bad.reason)
    assert site.seen[f"/{name}"] == requests
    assert found.dataset["id"] == ["r1"]
    assert len(files()) == 1


@pytest.mark.parametrize("name", ["busy.jpg", "moved.jpg"])
def test_a_busy_server_and_a_redirect_are_followed(site: Site, messages_file: Write, name: str) -> None:
    found = read(messages_file([row(f"{site.url}/{name}")]), site.host)
    assert len(found.dataset) == 1
    assert site.seen == ({"/busy.jpg": 3} if name == "busy.jpg" else {"/moved.jpg": 1, "/0.jpg": 1})


def test_a_large_answer_is_cut_off(site: Site, messages_file: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "MAX_BYTES", 100)
    with pytest.raises(DataError, match="larger than 100 bytes"):
        load_samples(
            messages_file([row(f"{site.url}/0.jpg")]), allow_remote_images=True, private_image_hosts=[site.host]
        )
    assert not files()


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.0.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1", "::1",
     "fe80::1%2", "fd00::1", "::ffff:10.0.0.1", "2002:7f00:1::", "64:ff9b::a00:1"],
)  # fmt: skip
def test_a_name_that_leads_inside_is_refused(
    site: Site, messages_file: Write, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    entry = (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [entry])
    found = read(messages_file([row("http://photos.example/0.jpg"), row("1.jpg", 1)]))
    (bad,) = found.quarantine.rows
    assert "its host photos.example lies on this machine or a private network" in bad.reason


@pytest.mark.parametrize("url", ["http:", "http://", "https:///x.jpg", "http://a b/c.jpg", "http://e.org:99999/0.jpg"])
def test_what_is_no_address_is_set_aside(messages_file: Write, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSES_S", (0.0, 0.0))
    (bad,) = read(messages_file([row(url), row("1.jpg", 1)])).quarantine.rows
    assert bad.id == "r0"


def test_only_what_a_mixture_draws_is_downloaded(site: Site, messages_file: Write, tmp_path: Path) -> None:
    path = messages_file([row(f"{site.url}/{number}.jpg", number) for number in range(5)])
    mix = tmp_path / "mix.yaml"
    mix.write_text(f"datasets:\n- path: {path}\n  name: chat\n  max_samples: 2\n")
    assert len(read(mix, site.host).dataset) == 2
    assert site.seen.total() == 2


def test_a_cache_that_cannot_be_written_is_named(
    messages_file: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(DataError, match="XDG_CACHE_HOME"):
        read(messages_file([row("http://e.org/0.jpg")]))


def test_hosts_go_with_the_permission() -> None:
    with pytest.raises(ConfigError, match="private_image_hosts goes with allow_remote_images: true alone"):
        VLMDataArguments(dataset_path="x", private_image_hosts=["photos.lan"])


@pytest.mark.parametrize("target", TARGETS)
def test_converted_data_hold_the_images_and_need_no_address(
    site: Site,
    messages_file: Write,
    image_folder: Path,
    tmp_path: Path,
    target: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = messages_file([row(f"{site.url}/0.jpg", 0), row("1.jpg", 1), row(f"{site.url}/gone.jpg", 2)])
    out = tmp_path / "out"
    arguments = ["convert", str(path), "--to", target, "--output", str(out), "--max_bad_fraction"]
    assert main([*arguments, "0.5"]) == 1
    assert "allow_remote_images" in capsys.readouterr().err and not out.exists()
    allowed = ["--allow_remote_images", "true", "--private_image_hosts", site.host]
    assert main([*arguments, "0.5", *allowed]) == 0
    assert "2 of 3 rows written, 1 left out" in capsys.readouterr().out
    (left_out,) = json.loads((out / "manifest.json").read_text())["left_out"]
    assert left_out["id"] == "r2" and "gone.jpg" in left_out["reason"]
    site.seen.clear()
    back = load_samples(out)
    contents = [content_of(Sample.from_row(found).images[0]) for found in back.dataset]
    assert contents == [(image_folder / f"{number}.jpg").read_bytes() for number in (0, 1)]
    assert not back.quarantine.rows and not site.seen
    assert all(site.url not in str(found["images"]) for found in back.dataset)
