"""A real browser: notebook 06 in JupyterLab, its form used, and the exported page opened with the network off."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import sync_playwright

from tinylab.notebook.run import find_notebook, run_notebook
from tinylab.report import write_report

pytestmark = pytest.mark.ui
ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)


@pytest.fixture(scope="module")
def browser() -> Iterator:
    if CHROMIUM is None:
        pytest.skip("no Chromium found (apt-get install chromium)")
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def screenshots(tmp_path: Path) -> Path:
    """Where pictures go: TINYLAB_SCREENSHOTS, or the test's own folder."""
    folder = Path(os.environ.get("TINYLAB_SCREENSHOTS") or tmp_path / "screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def server(lab: Path, tmp_path: Path) -> Iterator[tuple[str, str, Path]]:
    """(URL, token, root folder) of a JupyterLab of its own, with nothing of the user's configuration."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token, root = secrets.token_hex(16), tmp_path / "root"
    root.mkdir()
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--ip=127.0.0.1", f"--port={port}"]
    command += ["--ServerApp.port_retries=0", f"--IdentityProvider.token={token}", "--LabApp.news_url=None"]
    command += [f"--ServerApp.root_dir={root}", *(["--allow-root"] if os.getuid() == 0 else [])]
    names = ("JUPYTER_CONFIG_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR", "JUPYTER_RUNTIME_DIR")
    environment = os.environ | {name: str(tmp_path / name.lower()) for name in names}
    settings = [
        (tmp_path / "settings", "overrides.json"),
        (tmp_path / "jupyter_config_dir", "jupyter_server_config.py"),
    ]
    for folder, name in settings:  # what `make setup` puts into the environment
        folder.mkdir()
        shutil.copy(ROOT / "env" / "jupyter" / name, folder / name)
    command.append(f"--LabApp.app_settings_dir={tmp_path / 'settings'}")
    with open(tmp_path / "lab.log", "wb") as log:
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    base, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 90
    while True:
        try:
            urllib.request.urlopen(f"{base}/api/status?token={token}", timeout=5).close()
            break
        except (urllib.error.URLError, OSError):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "lab.log").read_text()
            time.sleep(0.3)
    yield base, token, root
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(30)


def test_notebook_06_runs_in_the_browser_and_its_form_answers(browser, server, screenshots: Path):
    base, token, root = server
    notebook = nbformat.read(find_notebook("06"), 4)
    cell = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    for name, ref in (("a", "tiny@4"), ("b", "tiny")):
        cell.source = re.sub(rf'^{name}: str = "[^"]*"', f'{name}: str = "{ref}"', cell.source, flags=re.MULTILINE)
    cell.source = cell.source.replace("= 40", "= 5")
    nbformat.write(notebook, root / "06.ipynb")
    page, errors = browser.new_page(viewport={"width": 1300, "height": 1000}), []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto(f"{base}/lab/tree/06.ipynb?token={token}&reset")
    page.get_by_text(re.compile(r"\| Idle")).first.wait_for(timeout=90_000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    form = page.locator(".widget-vbox")
    form.first.wait_for(timeout=120_000)
    form.first.scroll_into_view_if_needed()
    state = page.locator(".widget-hbox .widget-label").last
    form.locator("select").first.select_option(label=_option(form, "tiny@8"))
    page.get_by_role("button", name="Compare", exact=True).focus()
    page.keyboard.press("Enter")
    page.get_by_text("done: tiny@24 against tiny@8").wait_for(timeout=120_000)
    assert "done" in (state.text_content() or "")
    result = form.locator(".widget-html-content")
    assert "tiny@24 is better on average" in (result.text_content() or "") and result.locator("img").count() == 4
    form.first.screenshot(path=str(screenshots / "06_form.png"))
    page.screenshot(path=str(screenshots / "06_lab.png"))
    assert page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
    assert not [e for e in errors if "favicon" not in e], errors
    page.close()


def test_run_all_and_save_is_no_change_for_git_and_nobody_asks_about_news(browser, server, screenshots: Path):
    base, token, root = server
    path = root / "notebooks" / "a.ipynb"
    for name in (".gitattributes", "env/jupyter/strip_notebook.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    path.parent.mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("print('a line')")]), path)
    for line in (
        'git init -q && git config filter.tinylab-notebook.clean "python3 env/jupyter/strip_notebook.py"',
        "python3 env/jupyter/strip_notebook.py notebooks/a.ipynb && git add .",
        "git -c user.name=a -c user.email=a@example.org commit -q -m first",
    ):
        subprocess.run(["sh", "-c", line], cwd=root, check=True)
    page = browser.new_page()
    page.goto(f"{base}/lab/tree/notebooks/a.ipynb?token={token}&reset")
    page.get_by_text(re.compile(r"tinylab \| Idle")).first.wait_for(timeout=90_000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.get_by_text("a line", exact=True).first.wait_for(timeout=60_000)
    page.keyboard.press("Control+s")
    deadline = time.monotonic() + 30
    while '"a line' not in path.read_text() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert '"a line' in path.read_text(), "saved with its output"
    time.sleep(3)  # the hook runs after the save; the question about news would be there by now
    state = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=True)
    page.screenshot(path=str(screenshots / "saved.png"))
    assert [line for line in state.stdout.splitlines() if ".ipynb_checkpoints" not in line] == []
    assert page.get_by_text("Jupyter news").count() == 0
    page.close()


def _option(form, text: str) -> str:
    """The whole label of the choice that begins with `text`."""
    labels = form.locator("select").first.locator("option").all_text_contents()
    return next(label for label in labels if label.startswith(text + ","))


def test_report_and_exported_notebook_show_every_picture_offline(browser, lab: Path, screenshots: Path):
    from nbconvert import HTMLExporter

    out = run_notebook("06", lab / "out", {"a": "tiny@4", "b": "tiny", "max_new_tokens": 5})
    exported = lab / "06.html"
    exported.write_text(HTMLExporter().from_filename(str(out))[0], encoding="utf-8")
    context = browser.new_context(offline=True, viewport={"width": 1200, "height": 900})
    for path, least in ((write_report(["tiny"], lab / "report.html"), 8), (exported, 8)):
        page, refused = context.new_page(), []
        page.on("console", lambda message, refused=refused: refused.append(message.text))
        page.goto(path.as_uri())
        page.wait_for_load_state("load")
        shown, there = page.evaluate(
            "[[...document.images].filter(i => i.complete && i.naturalWidth > 0).length, document.images.length]"
        )
        page.screenshot(path=str(screenshots / f"{path.stem}.png"), full_page=True)
        assert shown == there >= least
        if path.stem == "report":
            assert refused == []
        page.close()
    context.close()
