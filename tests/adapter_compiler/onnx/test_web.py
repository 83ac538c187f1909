"""The page of examples/web in headless Chromium: the numbers that onnxruntime-web computes are PyTorch's."""

from __future__ import annotations

import base64
import contextlib
import functools
import http.server
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import adapter_compiler as ac
from adapter_compiler.errors import CheckpointError, ConfigError
from adapter_compiler.onnx.serving.web_files import write_web_files

ROOT = Path(__file__).parent.parent.parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
#: The npm package's folder dist; the example's own, or another one that is named.
RUN_TIME = Path(os.environ.get("ONNXRUNTIME_WEB", ROOT / "examples/web/node_modules/onnxruntime-web/dist"))
HEADLESS: tuple[str, ...] = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
)
HEADLESS += ("--disable-component-update", "--disable-sync", "--disable-quic", "--window-size=760,900")


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the page and takes what it posts."""

    def __init__(self, *args: Any, posted: queue.Queue[Any], **kwargs: Any) -> None:
        self.posted = posted
        self.extensions_map = {**self.extensions_map, ".mjs": "text/javascript"}
        super().__init__(*args, **kwargs)

    def do_POST(self) -> None:
        self.posted.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@contextlib.contextmanager
def served(folder: Path) -> Iterator[tuple[str, queue.Queue[Any]]]:
    posted: queue.Queue[Any] = queue.Queue()
    handler = functools.partial(Handler, directory=str(folder), posted=posted)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/", posted
        finally:
            server.shutdown()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("web") / "page"
    options = ("--out", str(folder), "--steps", "100", "--run-time", str(RUN_TIME))
    command = [sys.executable, str(ROOT / "examples" / "web/build.py"), *options]
    subprocess.run(command, check=True, capture_output=True, timeout=600, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return folder


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.skipif(not (RUN_TIME / "ort.wasm.min.mjs").is_file(), reason="onnxruntime-web is not installed")
def test_the_page_computes_what_pytorch_computes(page: Path, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    samples = json.loads((page / "samples.json").read_text())
    with served(page) as (address, posted):
        command = [CHROMIUM, *HEADLESS, f"--user-data-dir={tmp_path / 'profile'}", f"{address}?check=result"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as browser:
            try:
                found = posted.get(timeout=300)
            finally:
                browser.terminate()
    assert list(found) == ["base", "turned", "negative"]
    for name, one in samples.items():
        expected = torch.tensor(one["logits"])
        assert expected.std() > 0.01
        torch.testing.assert_close(torch.tensor(found[name]), expected, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def runtime_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("runtime")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).eval()
    adapted = ac.compile_with_adapters(model, (torch.randn(3, 4),), config=ac.AdapterConfig(rank=2))
    with torch.no_grad():
        for parameter in adapted.adapters.parameters():
            parameter.normal_(0, 0.3)
    ac.export_onnx(adapted, folder / "base.onnx", (torch.randn(3, 4),), adapters="runtime")
    ac.save_onnx_adapter(adapted, folder / "task.onnx_adapter")
    return adapted, folder


def test_files_for_the_web_hold_all_that_an_adapter_changes(runtime_file: tuple[Any, Path], tmp_path: Path) -> None:
    adapted, folder = runtime_file
    model, stored = write_web_files(folder / "base.onnx", {"task": folder / "task.onnx_adapter"}, tmp_path / "web")
    session = onnxruntime.InferenceSession(str(model))
    assert not session.get_overridable_initializers()
    entries = json.loads(stored.read_text())
    x = torch.randn(5, 4)
    for name, expected in (("base", adapted.copy_base().eval()(x)), ("task", adapted.fold().eval()(x))):
        feeds = {
            key: numpy.frombuffer(base64.b64decode(one["data"]), dtype=one["type"]).reshape(one["dims"])
            for key, one in entries[name].items()
        }
        assert {value.name for value in session.get_inputs()} == {"input", *feeds}
        found = session.run(None, {"input": x.numpy(), **feeds})[0]
        torch.testing.assert_close(torch.from_numpy(found), expected.detach(), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_served_is_refused(runtime_file: tuple[Any, Path], tmp_path: Path) -> None:
    _, folder = runtime_file
    with pytest.raises(ConfigError, match="means the model alone"):
        write_web_files(folder / "base.onnx", {"base": folder / "task.onnx_adapter"}, tmp_path)
    with pytest.raises(CheckpointError):
        write_web_files(folder / "base.onnx", {"task": folder / "missing.onnx_adapter"}, tmp_path)
    ac.export_onnx(nn.Linear(2, 2), tmp_path / "plain.onnx", (torch.randn(2, 2),))
    with pytest.raises(ConfigError, match="has no inputs for adapters"):
        write_web_files(tmp_path / "plain.onnx", {}, tmp_path / "web")
    assert [value.name for value in onnx.load(tmp_path / "plain.onnx").graph.input] == ["input"]
    assert not (tmp_path / "web").exists()
