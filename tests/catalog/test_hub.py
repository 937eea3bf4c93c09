"""Downloads from a Hub made here: a local HTTP server that speaks as much of the protocol as huggingface_hub needs."""

from __future__ import annotations

import errno
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import huggingface_hub
import pytest

from tinylab.catalog import hub
from tinylab.errors import CheckpointError, NothingFoundError

COMMITS = {"main": "a" * 40, "step-2": "b" * 40}
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model.safetensors": bytes(range(256)) * 400,
    "README.md": b"not wanted",
    "modeling_evil.py": b"raise SystemExit",
    "pytorch_model.bin": b"not wanted either",
}


class FakeHub:
    """Repositories by name; `requests` are what was asked for; `cut` breaks off the next weights half-way."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {"tiny/llama": dict(FILES)}
        self.requests: list[tuple[str, str, str | None]] = []
        self.cut = False
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.answer(with_body=False)

            def do_GET(self) -> None:
                self.answer(with_body=True)

            def answer(self, with_body: bool) -> None:
                path = unquote(self.path.partition("?")[0])
                fake.requests.append((self.command, path, self.headers.get("Range")))
                status, headers, body = fake.respond(path)
                wanted = self.headers.get("Range")
                if status == 200 and wanted:
                    first = int(wanted.removeprefix("bytes=").split("-")[0])
                    headers["Content-Range"] = f"bytes {first}-{len(body) - 1}/{len(body)}"
                    status, body = 206, body[first:]
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if with_body and fake.cut and path.endswith(".safetensors"):
                    fake.cut = False
                    self.wfile.write(body[: len(body) // 2])
                    self.close_connection = True
                elif with_body:
                    self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def respond(self, path: str) -> tuple[int, dict[str, str], bytes]:
        parts = path.strip("/").split("/")
        is_api = parts[0] == "api"
        name = "/".join(parts[2:4] if is_api else parts[:2])
        files = self.repositories.get(name)
        if files is None:
            return 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b"{}"
        revision = (parts[5] if len(parts) > 5 else "main") if is_api else parts[3]
        commit = revision if revision in COMMITS.values() else COMMITS.get(revision)
        if commit is None:
            return 404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"}, b"{}"
        if is_api and len(parts) > 4 and parts[4] == "tree":
            tree = [{"type": "file", "path": n, "size": len(b), "oid": etag(b)} for n, b in files.items()]
            return 200, {"Content-Type": "application/json"}, json.dumps(tree).encode()
        if is_api:
            siblings = [{"rfilename": n, "size": len(b), "blobId": etag(b)} for n, b in files.items()]
            info = {"id": name, "modelId": name, "sha": commit, "private": False, "siblings": siblings, "tags": []}
            info |= {"downloads": 0, "likes": 0, "gated": False, "disabled": False}
            return 200, {"Content-Type": "application/json"}, json.dumps(info).encode()
        body = files.get("/".join(parts[4:]))
        if body is None:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        return 200, {"ETag": f'"{etag(body)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}, body


def etag(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()


@pytest.fixture
def fake() -> Iterator[FakeHub]:
    served = FakeHub()
    yield served
    served.server.shutdown()
    served.server.server_close()


def test_only_weights_configuration_and_tokenizer_are_fetched(fake: FakeHub, tmp_path: Path):
    folder = hub.fetch("tiny/llama", cache=tmp_path, endpoint=fake.endpoint)
    assert {p.name for p in folder.iterdir()} == {"config.json", "tokenizer.json", "model.safetensors"}
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert folder.name == COMMITS["main"]
    assert hub.fetch("tiny/llama", "step-2", cache=tmp_path, endpoint=fake.endpoint).name == COMMITS["step-2"]


def test_pickled_weights_are_fetched_only_where_there_are_no_others(fake: FakeHub, tmp_path: Path):
    del fake.repositories["tiny/llama"]["model.safetensors"]
    folder = hub.fetch("tiny/llama", cache=tmp_path, endpoint=fake.endpoint)
    assert (folder / "pytorch_model.bin").is_file() and not (folder / "modeling_evil.py").exists()


def test_an_interrupted_download_resumes_where_it_stopped(
    fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1024)
    fake.cut = True
    folder = hub.fetch("tiny/llama", cache=tmp_path, endpoint=fake.endpoint)
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    ranges = [r for method, path, r in fake.requests if method == "GET" and path.endswith(".safetensors") and r]
    assert ranges == [f"bytes={len(FILES['model.safetensors']) // 2}-"]


def test_the_cache_serves_when_the_hub_is_gone(fake: FakeHub, tmp_path: Path):
    first = hub.fetch("tiny/llama", cache=tmp_path, endpoint=fake.endpoint)
    asked = len(fake.requests)
    assert hub.fetch("tiny/llama", cache=tmp_path, offline=True) == first
    assert len(fake.requests) == asked
    with pytest.raises(NothingFoundError, match=r"tiny/llama at revision step-2 is not in the cache and the .*Connect"):
        hub.fetch("tiny/llama", "step-2", cache=tmp_path, offline=True)


def test_an_unreachable_hub_says_what_to_do(fake: FakeHub, tmp_path: Path):
    fake.server.shutdown()
    fake.server.server_close()
    with pytest.raises(NothingFoundError, match="is not in the cache and the Hugging Face Hub cannot be reached"):
        hub.fetch("tiny/llama", cache=tmp_path, endpoint=fake.endpoint)


def test_what_does_not_exist_is_named(fake: FakeHub, tmp_path: Path):
    with pytest.raises(NothingFoundError, match="the Hub has no model tiny/lama, or it is private"):
        hub.fetch("tiny/lama", cache=tmp_path, endpoint=fake.endpoint)
    with pytest.raises(NothingFoundError, match="tiny/llama has no revision step-3"):
        hub.fetch("tiny/llama", "step-3", cache=tmp_path, endpoint=fake.endpoint)
    fake.repositories["tiny/empty"] = {"config.json": b"{}"}
    with pytest.raises(NothingFoundError, match=r"must hold weights as safetensors or \.bin"):
        hub.fetch("tiny/empty", cache=tmp_path, endpoint=fake.endpoint)


@pytest.mark.parametrize("name", ["../../etc", "a/b/c", "a", "-/-", "tiny/..", "https://x/y"])
def test_names_that_are_no_hub_ids_never_reach_the_network(fake: FakeHub, tmp_path: Path, name: str):
    with pytest.raises(NothingFoundError, match="must look like owner/name"):
        hub.fetch(name, cache=tmp_path, endpoint=fake.endpoint)
    with pytest.raises(NothingFoundError, match="must be a branch, tag or commit"):
        hub.fetch("tiny/llama", "../../../x", cache=tmp_path, endpoint=fake.endpoint)
    assert not fake.requests and not list(tmp_path.iterdir())


def test_an_index_that_names_absent_files_is_an_incomplete_model(fake: FakeHub, tmp_path: Path):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    files = fake.repositories["tiny/llama"]
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    files["model-00001-of-00002.safetensors"] = files.pop("model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: model-00002-of-00002\.safetensors"):
        hub.fetch("tiny/llama", cache=tmp_path, endpoint=fake.endpoint)


def test_a_full_disk_names_the_path_and_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*args: object, **kwargs: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "blobs" / "x.incomplete"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(CheckpointError, match=r"x\.incomplete: No space left on device .* bytes free\); make room"):
        hub.fetch("tiny/llama", cache=tmp_path)


def test_disk_use_and_removal_by_revision(fake: FakeHub, tmp_path: Path):
    assert hub.disk_use(tmp_path / "none") == []
    first = hub.fetch("tiny/llama", cache=tmp_path, endpoint=fake.endpoint)
    fake.repositories["tiny/llama"]["model.safetensors"] = b"x" * 1000
    second = hub.fetch("tiny/llama", "step-2", cache=tmp_path, endpoint=fake.endpoint)
    rows = {row["revisions"]: row for row in hub.disk_use(tmp_path)}
    assert set(rows) == {"main", "step-2"} and rows["main"]["bytes"] > 100_000 > rows["step-2"]["bytes"]
    assert hub.remove("tiny/llama", "main", cache=tmp_path) >= 100_000
    assert not first.exists() and (second / "config.json").is_file()
    with pytest.raises(NothingFoundError, match="tiny/llama@main must be in the cache to be removed"):
        hub.remove("tiny/llama", "main", cache=tmp_path)
