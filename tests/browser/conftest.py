"""Chromium, a JupyterLab on copies of the notebooks, and a place for images of what was seen.

These tests run by themselves, `make test-browser`. They need Debian's `chromium` (or CHROMIUM=/path/to/one) and the package playwright.
BROWSER_SHOTS=DIR keeps the screenshots there; otherwise they go to a temporary folder, whose path is printed at the end.
"""
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent.parent
QUIET = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run",
         "--disable-default-apps", "--disable-domain-reliability", "--disable-dev-shm-usage"]
SHOTS = Path(os.environ.get("BROWSER_SHOTS") or tempfile.mkdtemp(prefix="browser-shots-"))
SAID = []  # lines for the end of the run, such as how long a widget took


def pytest_terminal_summary(terminalreporter):
    for line in [*SAID, f"screenshots: {SHOTS}"]:
        terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def own_cache():
    "The notebooks run in other processes and use the cache of whoever runs the tests, which `make test` has filled."


@pytest.fixture(scope="session")
def note():
    return SAID.append


@pytest.fixture(scope="session")
def shot():
    "Where the screenshot of a name goes."
    SHOTS.mkdir(parents=True, exist_ok=True)
    return lambda name: SHOTS / f"{name.replace('/', '-')}.png"


@pytest.fixture(scope="session")
def browser():
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.exit("the browser tests need the Python package playwright: install the project with its extra dev.", returncode=1)
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not found:
        pytest.exit("the browser tests need Chromium: on Debian `apt-get install chromium`, or name one: CHROMIUM=/its/path.", returncode=1)
    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=found, args=QUIET)
        yield chromium
        chromium.close()


class Lab:
    "A JupyterLab server on a folder that holds copies of the notebooks."

    def __init__(self, top):
        self.top, self.token = top, "browser-tests"
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.home = f"http://127.0.0.1:{self.port}"

    def environment(self):
        "Nothing of the user's Jupyter is read or written, and no news are fetched."
        own = self.top / "jupyter"
        for folder in ("config/labconfig", "settings/@jupyterlab/notebook-extension"):
            (own / folder).mkdir(parents=True)
        (own / "config/labconfig/page_config.json").write_text(
            json.dumps({"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}))
        # every cell stays in the page, so that what was drawn above can be looked at
        (own / "settings/@jupyterlab/notebook-extension/tracker.jupyterlab-settings").write_text(json.dumps({"windowingMode": "none"}))
        places = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime", "IPYTHONDIR": "ipython",
                  "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces"}
        return {**os.environ, **{k: str(own / v) for k, v in places.items()}}

    def start(self):
        self.log = open(self.top / "lab.log", "w")
        command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={self.port}",
                   "--ServerApp.port_retries=0", f"--ServerApp.root_dir={self.top / 'course'}", f"--IdentityProvider.token={self.token}"]
        self.server = subprocess.Popen(command, cwd=self.top / "course", env=self.environment(), stdout=self.log, stderr=subprocess.STDOUT)
        for _ in range(600):
            try:
                return self.ask("api/status")
            except OSError:
                assert self.server.poll() is None, f"JupyterLab did not start:\n{(self.top / 'lab.log').read_text()[-2000:]}"
                time.sleep(.5)
        raise AssertionError("JupyterLab did not answer within five minutes")

    def ask(self, path, method="GET"):
        request = urllib.request.Request(f"{self.home}/{path}", method=method, headers={"Authorization": f"token {self.token}"})
        with urllib.request.urlopen(request, timeout=30) as reply:
            text = reply.read()
        return json.loads(text) if text else None

    def stop_kernels(self):
        for session in self.ask("api/sessions"):
            self.ask(f"api/sessions/{session['id']}", "DELETE")

    def stop(self):
        try:
            self.stop_kernels()
        finally:
            self.server.terminate()
            self.server.wait(30)
            self.log.close()


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    lab = Lab(tmp_path_factory.mktemp("lab"))
    course = lab.top / "course"
    shutil.copytree(REPO / "nbs", course / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints", "_proc", "*.bak"))
    shutil.copy(REPO / "settings.ini", course)
    lab.start()
    yield lab
    lab.stop()


class Visit:
    "A notebook opened in the browser, as a reader sees it."

    def __init__(self, lab, browser, name):
        self.lab, self.name, self.foreign = lab, name, []
        self.context = browser.new_context(viewport={"width": 1280, "height": 900})
        self.context.route(lambda url: not url.startswith((lab.home, "data:", "blob:")), self._refuse)
        self.page = self.context.new_page()
        self.page.set_default_timeout(300_000)
        self.page.goto(f"{lab.home}/lab/workspaces/{name.replace('/', '-')}/tree/nbs/{name}.ipynb?token={lab.token}")
        self.page.wait_for_selector(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Cell")
        # before the kernel stands there, Run All Cells would ask which kernel to take
        self.page.locator("#jp-main-statusbar").get_by_text("| Idle").wait_for()

    def _refuse(self, route):
        self.foreign.append(route.request.url)
        route.abort()

    def run_all(self, seconds=900):
        "Run > Run All Cells, from the menu, until nothing runs and nothing waits."
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        begun = "[...document.querySelectorAll('.jp-InputPrompt')].some(p => /[*\\d]/.test(p.textContent))"
        self.page.wait_for_function(f"() => {begun}", timeout=1000 * seconds, polling=500)
        self.wait_idle(seconds)

    def wait_idle(self, seconds=900):
        "Until no cell shows [*] any more."
        waiting = "[...document.querySelectorAll('.jp-InputPrompt')].some(p => p.textContent.includes('*'))"
        self.page.wait_for_function(f"() => !({waiting})", timeout=1000 * seconds, polling=500)

    def errors(self):
        "The text of every error output."
        return self.page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.error']").all_inner_texts()

    def cell(self, text):
        "The code cell that holds a text."
        return self.page.locator(".jp-CodeCell").filter(has=self.page.locator(".jp-InputArea-editor", has_text=text)).last

    def type_into(self, cell, text):
        "Replace what stands in a cell, and run it."
        cell.locator(".cm-content").click()
        self.page.keyboard.press("Control+A")
        self.page.keyboard.press("Delete")
        for i, line in enumerate(text.split("\n")):
            if i:
                self.page.keyboard.press("Enter")
            self.page.keyboard.insert_text(line)
        self.page.keyboard.press("Control+Enter")

    def close(self):
        self.context.close()
        for session in self.lab.ask("api/sessions"):
            if session["path"].endswith(f"{self.name}.ipynb"):
                self.lab.ask(f"api/sessions/{session['id']}", "DELETE")


KEPT = ("00_concepts", "tools/widgets")  # further tests go on in these


@pytest.fixture(scope="session")
def visit(lab, browser):
    "Open a notebook and run all its cells, once; what is not needed again is closed before the next."
    kept = {}

    def run(name):
        if name not in kept:
            for other in [n for n in kept if n not in KEPT]:
                kept.pop(other).close()
            kept[name] = Visit(lab, browser, name)
            kept[name].run_all()
        return kept[name]

    yield run
    for one in kept.values():
        one.close()
