"JupyterLab in headless Chromium, as a person uses it."
import json, os, re, socket, subprocess, sys, time
from pathlib import Path
from shutil import which
from urllib.request import urlopen

import pytest
from project import ROOT

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable')
RUN = """async () => {
  const shown = window.jupyterapp?.shell.currentWidget;
  if (!shown?.sessionContext) return false;
  await shown.context.ready;
  await shown.sessionContext.ready;
  await shown.sessionContext.session?.kernel?.info;
  if (shown.sessionContext.session?.kernel?.status !== 'idle') return false;
  jupyterapp.commands.execute('notebook:run-all-cells');
  return true;
}"""
OURS = re.compile(r'(https?|wss?)://(127\.0\.0\.1|localhost)[:/]|(data|blob|file|about):')  # nothing leaves this machine
NOT_OURS = ('/lsp/status',)  # what JupyterLab itself complains of


def chromium():
    "Where Chromium is; the test is skipped if there is none, or no playwright to drive it."
    pytest.importorskip('playwright', reason='playwright drives the browser: pip install playwright')
    pytest.importorskip('anywidget', reason='the widgets need anywidget: pip install anywidget')
    found = os.environ.get('CHROMIUM') or next(filter(None, map(which, NAMES)), None)
    if not found: pytest.skip(f'no Chromium: none of {", ".join(NAMES)} is on the PATH; name one with CHROMIUM=')
    return found


class Lab:
    "A JupyterLab server on this machine, in a folder of its own."
    def __init__(self, folder):
        self.folder = Path(folder)
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            self.port = s.getsockname()[1]
        self.url = f'http://127.0.0.1:{self.port}'

    def start(self):
        quiet = self.folder/'settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings'
        quiet.parent.mkdir(parents=True)
        quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}')
        own = {f'JUPYTER_{k}_DIR': str(self.folder/k.lower()) for k in ('CONFIG', 'DATA', 'RUNTIME')}
        env = os.environ | own | dict(JUPYTERLAB_SETTINGS_DIR=str(self.folder/'settings'), IPYTHONDIR=str(self.folder/'ipython'),
                                      OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', PYTHONPATH=str(ROOT))
        self.log = open(self.folder/'lab.log', 'w')
        command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--ip=127.0.0.1', f'--port={self.port}',
                   '--expose-app-in-browser', '--ServerApp.port_retries=0', '--IdentityProvider.token=', f'--ServerApp.root_dir={self.folder}',
                   '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate']
        self.process = subprocess.Popen(command, env=env, cwd=self.folder, stdout=self.log, stderr=self.log)
        for _ in range(600):
            if self.process.poll() is not None: break
            try: return urlopen(f'{self.url}/api', timeout=5).read() and self
            except OSError: time.sleep(.1)
        self.stop()
        raise RuntimeError((self.folder/'lab.log').read_text())

    def stop(self):
        self.process.terminate()
        try: self.process.wait(20)
        except subprocess.TimeoutExpired: self.process.kill()
        self.log.close()

    def notebook(self, name, *cells):
        "Write a notebook; its address."
        code = [dict(cell_type='code', id=f'cell{i}', execution_count=None, metadata={}, outputs=[], source=source) for i, source in enumerate(cells)]
        kernel = dict(kernelspec=dict(display_name='python3', language='python', name='python3'))
        (self.folder/name).write_text(json.dumps(dict(cells=code, metadata=kernel, nbformat=4, nbformat_minor=5)))
        return f'{self.url}/doc/tree/{name}'


class Window:
    "A page of the browser that remembers what its console said, and what it asked other machines for."
    def __init__(self, browser):
        self.page = browser.new_page(viewport=dict(width=1200, height=1000))
        self.page.set_default_timeout(60_000)
        self.errors = []
        self.page.on('pageerror', lambda e: self.errors.append(str(e)))
        self.page.on('request', lambda r: OURS.match(r.url) or self.errors.append(f'asked for {r.url}'))
        self.page.on('console', lambda m: m.type == 'error' and self.errors.append(f'{m.text} {m.location.get("url", "")}'))

    def run(self, url):
        "Open a notebook and run all of its cells, once JupyterLab has reached the kernel: it drops what is asked before."
        self.page.goto(url)
        for _ in range(600):
            if self.page.evaluate(RUN): return self.page
            self.page.wait_for_timeout(100)
        raise TimeoutError('JupyterLab does not reach the kernel')

    def complaints(self): return [e for e in self.errors if not any(word in e for word in NOT_OURS)]
