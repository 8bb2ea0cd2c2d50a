"Golden numbers, and the toy checkpoints and images they were computed with."
import importlib.util, json, os, signal, subprocess, sys
from pathlib import Path

os.environ.setdefault('HF_HUB_OFFLINE', '1')
import hypothesis, pytest

hypothesis.settings.register_profile('steady', derandomize=True, deadline=None, # the same examples every time, however slow the machine
                                     suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile('steady')

signal.signal(signal.SIGINT, signal.default_int_handler) # a shell that starts us in the background has it ignored, and children would inherit that

LONG = ('test_wheel.py', 'test_readme.py', 'test_golden_rewards.py') # they begin first, so that no worker waits for the other at the end
PHI3V = Path(__file__).resolve().parent/'golden'/'phi3v'


def script(path):
    "Import a Python file by its path."
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope='session')
def golden():
    "Everything the reference code computed, as a dict."
    return json.loads((PHI3V/'golden.json').read_text(encoding='utf-8'))


@pytest.fixture(scope='session')
def toy(tmp_path_factory):
    "Folder with `base/` in the published layout and the reward adapters beside it (45 MB, written once)."
    out = tmp_path_factory.mktemp('toy')
    subprocess.run([sys.executable, PHI3V/'make_checkpoint.py', '--spec', PHI3V/'spec_tiny.json', '--out', out], check=True)
    return out


@pytest.fixture(scope='session')
def make_checkpoint():
    "The writer of the toy checkpoints, as a module."
    return script(PHI3V/'make_checkpoint.py')


@pytest.fixture(scope='session')
def image():
    "Function from a name (`sq_a`, `port`, …) to that PIL image."
    return script(PHI3V/'make_images.py').make_image


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "A JupyterLab server for all tests that need one; skipped where Chromium cannot be had."
    from browser import Lab, chromium
    chromium()
    server = Lab(tmp_path_factory.mktemp('lab')).start()
    yield server
    server.stop()


@pytest.fixture(scope='module')
def browser():
    "Headless Chromium, until the end of the module: its event loop disturbs other tests."
    from browser import chromium
    path = chromium()
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        found = p.chromium.launch(executable_path=path, args=['--no-sandbox'])
        yield found
        found.close()


@pytest.fixture
def window(browser):
    "A new page; whoever uses it asks for its `complaints`."
    from browser import Window
    shown = Window(browser)
    yield shown
    shown.page.close()
