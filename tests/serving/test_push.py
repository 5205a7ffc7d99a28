"""``vlmtune push`` against a stand-in for the Hub: what goes there, and what never does."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml

from vlmtune.errors import ModelError, OutputError
from vlmtune.evaluation.card import MARK, model_card, write_card
from vlmtune.models.checkpoint import save_model_and_processor
from vlmtune.models.loading import load_model_for_training
from vlmtune.models.lora import setup_lora
from vlmtune.serving.push import files_to_push


class Hub:
    """Keeps what is asked of it."""

    def __init__(self) -> None:
        self.repositories: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()


@pytest.fixture
def hub():
    """A stand-in for the Hub on this machine; gives its address and what it was given."""
    kept = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_) -> None:
            pass

        def reply(self, body, code: int = 200) -> None:
            data = json.dumps(body).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            name = self.path.removeprefix("/api/models/")
            self.reply({"id": name, "private": kept.repositories[name], "siblings": []})

        def do_POST(self) -> None:
            kept.tokens.add(self.headers.get("Authorization"))
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/api/repos/create":
                body = json.loads(raw)
                name = "/".join(filter(None, [body.get("organization"), body["name"]]))
                known = name in kept.repositories
                kept.repositories.setdefault(name, body.get("private", body.get("visibility") == "private"))
                self.reply({"url": f"{address}/{name}", "id": name}, 409 if known else 200)
            elif self.path.endswith("/preupload/main"):
                files = json.loads(raw)["files"]
                modes = {"uploadMode": "regular", "shouldIgnore": False}
                self.reply({"files": [{"path": file["path"]} | modes for file in files]})
            elif self.path.endswith("/commit/main"):
                for line in raw.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        kept.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                name = "/".join(self.path.split("/")[3:5])
                self.reply({"success": True, "commitOid": "0" * 40, "commitUrl": f"{address}/{name}/commit/0"})
            else:
                self.reply({"errors": [], "warnings": []})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield address, kept
    server.shutdown()


@pytest.fixture
def run_folder(tiny_gemma3_dir, processor, tmp_path) -> Path:
    """What a run leaves: an adapter, its records, a checkpoint, answers."""
    folder = tmp_path / "shapes"
    model = setup_lora(load_model_for_training(tiny_gemma3_dir, torch_dtype=torch.float32), lora_r=2)
    save_model_and_processor(model, processor, folder)
    arguments = {
        "model": {"lora_r": 2, "use_lora": True},
        "data": {"dataset_path": "/home/me/secret place/<b>shapes</b>"},
        "training": {"learning_rate": 1e-4},
    }
    data = {"format": "messages", "train": {"samples": 12, "tokens": 345, "fingerprint": "abc123"}}
    (folder / "run.json").write_text(json.dumps({"arguments": arguments, "data": data, "versions": {"torch": "2.13"}}))
    (folder / "left_out.jsonl").write_text('{"id": "private"}\n')
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "adapter_model.safetensors").write_bytes(b"not this")
    (folder / "evaluation").mkdir()
    table = {"vqa": {"value": 71.234, "low": 65.0, "high": 77.5, "n": 200}}
    (folder / "evaluation" / "scores.json").write_text(json.dumps({"metrics": table}))
    (folder / "evaluation" / "predictions.jsonl").write_text('{"answer": "private"}\n')
    return folder


def _push(address: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "HF_ENDPOINT": address,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        "HF_TOKEN": "hf_standin",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-m", "vlmtune.cli", "push", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_private_and_nothing_but_the_model(hub, run_folder) -> None:
    address, kept = hub
    done = _push(address, run_folder, "me/shapes")
    assert done.returncode == 0, done.stderr
    assert f"to {address}/me/shapes" in done.stdout
    assert kept.repositories == {"me/shapes": True} and kept.tokens == {"Bearer hf_standin"}
    assert kept.files["adapter_model.safetensors"] == (run_folder / "adapter_model.safetensors").read_bytes()
    assert {"adapter_config.json", "README.md", "tokenizer.json", "chat_template.jinja"} <= kept.files.keys()
    for name, content in kept.files.items():
        assert not name.endswith((".jsonl", "run.json")) and "/" not in name and b"secret place" not in content


def test_a_public_repository_must_be_asked_for(hub, run_folder) -> None:
    address, kept = hub
    kept.repositories["me/shapes"] = False
    done = _push(address, run_folder, "me/shapes")
    assert done.returncode == 1 and "everyone can see it" in done.stderr and not kept.files
    assert _push(address, run_folder, "me/shapes", "--public").returncode == 0 and kept.files


def test_a_hub_that_cannot_be_reached(run_folder) -> None:
    done = _push("http://127.0.0.1:9", run_folder, "me/shapes")
    assert done.returncode == 1 and "error: The Hub did not take" in done.stderr and "Traceback" not in done.stderr


def test_names(hub, run_folder) -> None:
    for name in ("shapes", "me/a shape"):
        done = _push(hub[0], run_folder, name)
        assert done.returncode == 2 and "no name of a repository" in done.stderr


def test_keys_and_empty_folders(run_folder, tmp_path) -> None:
    with pytest.raises(ModelError, match="nothing to push"):
        files_to_push(tmp_path)
    (run_folder / "README.md").write_text("my key: hf_abcdefghijklmnopqrstuvwx")
    with pytest.raises(OutputError, match="looks like an access key"):
        files_to_push(run_folder)


class TestCard:
    """What the card says."""

    def test_of_an_adapter(self, run_folder) -> None:
        text = model_card(run_folder)
        head = yaml.safe_load(text.split("---")[1])
        assert head["library_name"] == "peft" and head["license"] == "gemma" and "gemma3" in head["tags"]
        # The base is a folder here: no name on the Hub, and its place is not told.
        assert "base_model" not in head and "/home" not in text and "/tmp" not in text
        for words in ("12 samples", "345 tokens", "`abc123`", "learning_rate: 0.0001", "torch 2.13", "Gemma Terms"):
            assert words in text
        assert "| vqa | 71.23 | 65 to 77.5 | 200 |" in text and "vlmtune serve shapes" in text

    def test_texts_of_others_have_no_power(self, run_folder) -> None:
        record = json.loads((run_folder / "run.json").read_text())
        record["versions"] = {"<script>alert(1)</script>": "[x](javascript:1)"}
        record["data"]["format"] = "`</code><img src=x>"
        record["arguments"]["model"]["lora_scopes"] = ["```\n<script>"]
        (run_folder / "run.json").write_text(json.dumps(record))
        text = model_card(run_folder)
        assert r"\<script\>alert\(1\)" in text and r"\[x\]\(javascript" in text
        assert text.count("```") == 4

    def test_without_records(self, run_folder) -> None:
        (run_folder / "run.json").unlink()
        shutil.rmtree(run_folder / "evaluation")
        text = model_card(run_folder)
        assert "Not evaluated." in text and text.count("No record.") == 3

    def test_a_persons_card_is_kept(self, run_folder) -> None:
        assert write_card(run_folder) and MARK in (run_folder / "README.md").read_text()
        assert write_card(run_folder)
        (run_folder / "README.md").write_text("mine")
        assert not write_card(run_folder) and (run_folder / "README.md").read_text() == "mine"
