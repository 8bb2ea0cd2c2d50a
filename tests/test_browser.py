"The widgets in JupyterLab, as a person uses them: drop, type, click, press keys, read."
import json, os, re, subprocess, sys, time
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from browser import Window
from PIL import Image
from project import ROOT

from llava_reward_nb.data import load_records
from llava_reward_nb.files import read_table
from llava_reward_nb.shapes.records import alignment_pairs, write_records

PLAY = '''
import time
from llava_reward_nb.widgets import Playground

def width(images, prompts):
    time.sleep(.02*len(images))
    return [float(im.width+len(p)) for im, p in zip(images, prompts)]

playground = Playground(width, [], 'a red star')
playground
'''
LABEL = '''
from llava_reward_nb.widgets import Labeller
labeller = Labeller('shapes', 'labels', 'tiny', perspectives=['alignment'])
labeller
'''
HEAT = '''
from llava_reward_nb.widgets import Playground
labeller.wait()
Playground(labeller.desk.judge, 'shapes/images', 'a red star')
'''
STEER = '''
import time
from llava_reward_nb.rewards import load_reward
from llava_reward_nb.widgets import SteeringViewer
checker = load_reward('checker')

def patient(images, prompts):
    "The checker; in the first run it waits at the third look until Stop is pressed."
    while viewer.runs==1 and len(viewer.run.looks)==2 and not viewer.worker.job.is_stopped: time.sleep(.05)
    return checker(images, prompts)

viewer = SteeringViewer('tiny', patient, n_particles=4, num_inference_steps=20, seed=1)
viewer
'''
TABLE = '''
from llava_reward_nb.evaluation import run_benchmark
from llava_reward_nb.widgets import TableExplorer
TableExplorer(run_benchmark('mjbench', rewards=['tiny-clip', 'checker'], out='mj', limit=12))
'''
DROP = '''async ([name, text, n]) => {
  const files = new DataTransfer();
  for (let i = 0; i < n; i++) {
    const canvas = new OffscreenCanvas(20 + i, 20);
    const pen = canvas.getContext('2d');
    pen.fillStyle = `hsl(${37 * i}, 80%, 50%)`;
    pen.fillRect(0, 0, 20 + i, 20);
    files.items.add(new File([await canvas.convertToBlob()], `image ${i}.png`));
  }
  if (name) files.items.add(new File([text], name));
  const stage = document.querySelector('.lr-stage');
  for (const type of ['dragenter', 'dragover', 'drop'])
    stage.dispatchEvent(new DragEvent(type, {bubbles: true, cancelable: true, dataTransfer: files}));
}'''


PASTE = '''async () => {
  const files = new DataTransfer();
  const canvas = new OffscreenCanvas(30, 30);
  canvas.getContext('2d').fillRect(0, 0, 30, 30);
  files.items.add(new File([await canvas.convertToBlob()], 'pasted.png', {type: 'image/png'}));
  const stage = document.querySelector('.lr-stage');
  stage.dispatchEvent(new ClipboardEvent('paste', {bubbles: true, cancelable: true, clipboardData: files}));
}'''


def drop_path(page, path):
    "Drop a file or folder as the file manager does."
    box = page.locator('.lr-stage').bounding_box()  # what is in it is drawn anew at any time
    devtools = page.context.new_cdp_session(page)
    data = dict(items=[], files=[str(path)], dragOperationsMask=1)
    for kind in ('dragEnter', 'dragOver', 'drop'):
        devtools.send('Input.dispatchDragEvent', dict(type=kind, x=box['x']+9, y=box['y']+9, data=data))
    devtools.detach()


def drop(page, n, name='', text=''):
    "Drop n pictures, and a file with a text."
    page.evaluate(DROP, [name, text, n])


def said(page, text): page.locator('.lr-said', has_text=text).first.wait_for()


def score(text): return float(re.search(r'tiny-clip (-?[\d.]+)', text)[1])


@pytest.fixture(scope='module')
def many(lab):
    "Five hundred images."
    (lab.folder/'many').mkdir()
    for i in range(500): Image.new('RGB', (400, 300), (i % 256, i // 2, 90)).save(lab.folder/'many'/f'{i:03d}.jpg')


@pytest.fixture(scope='module')
def shapes(lab):
    "Pairs of the shapes world in the server's folder."
    write_records(alignment_pairs(12, 0), lab.folder/'shapes')
    return lab.folder/'shapes'


def test_playground(lab, window):
    page = window.run(lab.notebook('play.ipynb', PLAY))
    page.locator('.lr-drop').wait_for()
    drop(page, 3, 'notes.txt', 'no picture')
    said(page, 'notes.txt: not an image')
    cards = page.locator('.lr-card')
    cards.nth(2).locator('.lr-bar', has_text='32').wait_for()  # 22 pixels wide, and a prompt of 10 letters
    assert cards.nth(2).locator('img').first.get_attribute('src').startswith('data:image/png')
    prompt = page.get_by_placeholder('prompt')
    prompt.fill('نجمة 星')
    cards.first.locator('.lr-bar', has_text='26').wait_for()
    page.get_by_role('button', name='by width').click()
    page.wait_for_function("document.querySelector('.lr-card .lr-name').textContent.includes('image 2')")
    cards.nth(0).click()
    cards.nth(1).click()
    page.locator('.lr-versus', has_text='+1').wait_for()
    with page.expect_download() as download: page.get_by_role('button', name='CSV').click()
    path = lab.folder/'table.csv'
    download.value.save_as(path)
    assert [r['image'] for r in read_table(path)] == ['image 2.png', 'image 1.png', 'image 0.png']
    page.screenshot(path=lab.folder/'play.png')
    assert window.complaints() == []


@pytest.fixture
def crowd(tmp_path):
    "A folder of 10,000 images, one of them deeper, and other files."
    Image.new('RGB', (24, 20), 'red').save(tmp_path/'one.png')
    inner = tmp_path/'crowd'/'inner'
    inner.mkdir(parents=True)
    os.link(tmp_path/'one.png', inner/'deep.png')
    for i in range(9_999): os.link(tmp_path/'one.png', tmp_path/'crowd'/f'{i:04d}.png')
    for name in ('.DS_Store', 'notes.txt'): (tmp_path/'crowd'/name).write_text('no image')
    return tmp_path/'crowd'


def test_folders_and_the_clipboard(lab, window, crowd):
    "Of 10,000 files in a folder the first are taken, and one line says so; folders are searched at any depth, for images only."
    page = window.run(lab.notebook('folder.ipynb', PLAY+'playground.stage.most_files = 5\nplayground'))
    page.locator('.lr-drop').wait_for()
    page.evaluate(PASTE)
    said(page, '1 image')
    drop_path(page, crowd)
    said(page, "the first 5 of 10,000 files were taken; type the folder's path to take all")
    assert page.locator('.lr-card').count() == 6
    drop_path(page, crowd/'inner')
    said(page, '7 images')
    (crowd/'empty').mkdir()
    drop_path(page, crowd/'empty')
    said(page, 'no images in what was dropped')
    drop_path(page, crowd/'notes.txt')
    said(page, 'notes.txt: not an image')
    assert page.locator('.lr-card').count() == 7
    assert window.complaints() == []


def test_five_hundred_images_stay_responsive(lab, window, many):
    "While the reward is at work, pages turn, and what is typed arrives."
    page = window.run(lab.notebook('many.ipynb', PLAY.replace("[]", "'many'")))
    page.locator('.lr-card').nth(23).wait_for()
    page.get_by_role('button', name='Stop').wait_for()
    page.locator('.lr-stage').focus()
    page.keyboard.press('ArrowRight')
    page.locator('.lr-tools', has_text='2 of 21').wait_for()
    page.locator('.lr-card img[src]').nth(23).wait_for()
    page.get_by_placeholder('prompt').fill('x')
    page.locator('.lr-card .lr-bar', has_text=re.compile(r'\d')).first.wait_for()
    page.get_by_role('button', name='Stop').click()
    page.get_by_role('button', name='Stop').wait_for(state='detached')
    assert window.complaints() == []


def test_labeller_and_heat(lab, window, shapes):
    page = window.run(lab.notebook('label.ipynb', LABEL, HEAT))
    cells = page.locator('.jp-Notebook .jp-CodeCell')
    label, play = cells.nth(0), cells.nth(1)
    label.locator('.lr-big img[src]').nth(1).wait_for()
    assert 'agreed' not in label.inner_text()
    label.locator('.lr-stage').focus()
    for k, key in enumerate(['ArrowLeft', 'ArrowRight', 't', 'd', 'd', 'x'], 1):  # elsewhere the last three delete cells
        page.keyboard.press(key)
        said(label, f'{min(k, 3)} answered')
    page.keyboard.press('u')
    said(label, '2 answered')
    shown = label.locator('[data-shows]').get_attribute('data-shows')
    page.keyboard.press('s')
    label.locator(f'[data-shows]:not([data-shows="{shown}"])').wait_for()  # a click before that is one on the old question
    label.get_by_role('button', name='← left').click()
    said(label, '3 answered')
    assert cells.count() == 2
    said(label, 'the reward agreed with you in')
    assert len(load_records(lab.folder/'labels/alignment.jsonl')) == 3
    label.get_by_role('button', name=re.compile('Train on these')).click()
    said(label, 'my_alignment, trained on')
    page.screenshot(path=lab.folder/'label.png')
    play.locator('.lr-card').nth(1).hover()
    play.locator('.lr-card').nth(1).locator('img.lr-heat[src]').wait_for()
    said(play, 'attention of SkipCA, perspective alignment')
    page.wait_for_timeout(300)  # for the screenshot: the map fades in
    page.screenshot(path=lab.folder/'heat.png')
    assert window.complaints() == []


def test_steering_viewer(lab, window):
    page = window.run(lab.notebook('steer.ipynb', STEER))
    steer, stop, save = (page.get_by_role('button', name=name, exact=True) for name in ('Steer', 'Stop', 'Save'))
    said(page, 'Type a prompt')
    steer.click()
    said(page, 'the prompt is empty')
    page.get_by_placeholder('what to paint').fill('a red circle left of a blue square')
    page.keyboard.press('Enter')
    said(page, 'look 2 of')
    cards = page.locator('.lr-card')
    cards.nth(3).locator('img[src^="data:image"]').wait_for()
    assert save.is_disabled()
    stop.click()
    said(page, 'Stopped after')
    assert stop.is_disabled()
    steer.click()
    said(page, 'Done.')
    last, kept = page.get_by_text('look 5 of 5'), page.locator('.lr-card.lr-chosen')
    last.wait_for()  # the slider followed the second run
    picture = cards.nth(1).locator('img').get_attribute('src')
    cards.nth(1).click()
    kept.wait_for()
    page.keyboard.press('ArrowLeft')
    page.get_by_text('look 4 of 5').wait_for()
    assert kept.count() == 0
    assert cards.nth(1).locator('img').get_attribute('src') != picture
    page.keyboard.press('ArrowRight')
    last.wait_for()
    kept.wait_for()
    assert cards.nth(1).locator('img').get_attribute('src') == picture
    page.screenshot(path=lab.folder/'steer.png')
    with page.expect_download() as download: save.click()
    assert download.value.suggested_filename == 'run2-look5-particle2.png'
    page.locator('.lr-stage circle').first.click()
    page.get_by_text('look 1 of 5').wait_for()
    assert window.complaints() == []


def test_table_explorer(lab, window):
    page = window.run(lab.notebook('table.ipynb', TABLE))
    tables = page.locator('.lr-stage table')
    page.locator('[data-act=open]').nth(1).click()
    page.get_by_text('tiny-clip on safety, the worst first: 12 rows, page 1 of 2').wait_for()
    assert tables.count() == 9
    sides = tables.nth(1).locator('td')
    assert sides.locator('img[src^="data:image"]').count() == 2
    wrong, right = sorted(sides.all_inner_texts(), key=lambda text: '(better)' in text)
    assert score(wrong) > score(right)
    page.keyboard.press('ArrowRight')
    page.get_by_text('page 2 of 2').wait_for()
    assert tables.count() == 5
    assert page.get_by_role('button', name='more').is_disabled()
    page.get_by_role('button', name='back').click()
    page.get_by_text('page 1 of 2').wait_for()
    page.get_by_label('compare with').select_option('checker')
    page.get_by_text('where it differs most from checker').wait_for()
    page.screenshot(path=lab.folder/'table.png')
    page.locator('[data-act=open]').nth(6).focus()
    page.keyboard.press('Enter')
    page.get_by_text('checker on quality, the worst first').wait_for()
    assert window.complaints() == []


@pytest.fixture
def app(tmp_path, browser):
    "`llava_reward app` with a labelling page; the address of its pages."
    pytest.importorskip('voila', reason="the app needs voila: pip install 'llava_reward_nb[app]'")
    write_records(alignment_pairs(6, 0), tmp_path/'shapes')
    code = 'from llava_reward_nb.commands.main import llava_reward; llava_reward()'
    command = [sys.executable, '-c', code, 'app', '--label', 'shapes', '--port', '0']
    environment = os.environ | dict(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', PYTHONPATH=str(ROOT))
    with open(tmp_path/'app.log', 'w') as log:
        served = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
    first = served.stdout.readline()
    assert first.startswith('pages at http'), (tmp_path/'app.log').read_text()
    url = first.split()[-1]
    try:
        wait_for_server(url)
        yield url
    finally: served.terminate()
    assert served.wait(60) == 0


def wait_for_server(url):
    "Until a port is listened at."
    for _ in range(600):
        try: return urlopen(url, timeout=60).close()
        except OSError: time.sleep(.1)
    raise TimeoutError(url)


def open_label(window, app):
    page = window.page
    page.goto(f'{app}voila/render/label.ipynb')
    page.locator('.lr-big img[src^="data:image"]').nth(1).wait_for()
    return page


def is_alive(app, kernel):
    "Whether the app still has a kernel."
    try: return urlopen(f'{app}api/kernels/{kernel}', timeout=60).status == 200
    except HTTPError as e: return e.code != 404


def asked(page): return page.locator('[data-shows]').get_attribute('data-shows')


def test_two_windows_without_jupyter(app, window, browser, tmp_path):
    "Each has a kernel of its own. No answer is lost, no pair is asked twice, each sees the other's answers, and nothing asks the network."
    one, two = open_label(window, app), open_label(other := Window(browser), app)
    first = asked(one)
    assert asked(two) == first  # nobody has answered yet
    one.locator('.lr-stage').focus()
    one.keyboard.press('ArrowLeft')
    said(one, '1 answered')
    two.locator('.lr-stage').focus()
    said(two, '1 answered')
    assert len({first, asked(one), asked(two)}) == 3
    two.keyboard.press('ArrowRight')
    said(two, '2 answered')
    one.locator('.lr-stage').blur()
    one.locator('.lr-stage').focus()
    said(one, '2 answered')
    for k in range(3, 7):
        one.keyboard.press('t')
        said(one, f'{k} answered')
    said(one, 'All pairs are answered')
    two.keyboard.press('ArrowRight')  # the question is still there, and its answer came from the other window
    said(two, 'its answer stands')
    said(two, 'All pairs are answered')
    records = load_records(tmp_path/'labels/overall.jsonl')
    assert len(records) == len({r['pair'] for r in records}) == 6
    assert len((tmp_path/'labels/journal.log').read_text().splitlines()) == 6
    kernel = json.loads(one.locator('#jupyter-config-data').text_content())['kernelId']
    assert is_alive(app, kernel)
    one.goto(app)
    one.get_by_role('link', name='label').wait_for()
    for _ in range(600):  # who leaves a page leaves no model in memory
        if not is_alive(app, kernel): break
        time.sleep(.1)
    assert not is_alive(app, kernel)
    assert window.complaints()+other.complaints() == []
    other.page.close()


HOSTILE = '<script>document.title="lost"</script><img src=x onerror=alert(1)> نجمة 星 🌟'


@pytest.fixture(scope='module')
def reports(tmp_path_factory):
    "The page that each command writes."
    from llava_reward_nb.commands.evaluate import llava_reward_eval, llava_reward_table
    from llava_reward_nb.commands.score import llava_reward_compare, llava_reward_score
    from llava_reward_nb.commands.steer import llava_reward_steer
    folder = tmp_path_factory.mktemp('reports')
    images = []
    for color in ('red', 'green', 'blue'):
        Image.new('RGB', (64, 64), color).save(folder/f'{color} & <b>.png')
        images.append(str(folder/f'{color} & <b>.png'))
    page = {name: str(folder/f'{name}.html') for name in ('score', 'compare', 'rank', 'steer', 'eval', 'table')}
    asked = ['--prompt', HOSTILE, '--perspective', 'alignment']
    llava_reward_score.main([*images, *asked, '--html', page['score']])
    llava_reward_compare.main([*images[:2], *asked, '--html', page['compare']])
    llava_reward_compare.main([*images, *asked, '--html', page['rank']])
    llava_reward_steer.main(['a red circle', '--reward', 'checker', '--steps', '5', '--n-particles', '2', '--out', str(folder/'steered'), '--html', page['steer']])
    run = str(folder/'tifa')
    llava_reward_eval.main(['tifa160', '--reward', 'checker', '--limit', '4', '--out', run, '--html', page['eval']])
    llava_reward_table.main(['tifa160', run, '--out', page['table']])
    return page


@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('name,pictures', dict(score=3, compare=2, rank=3, steer=2, eval=0, table=0).items())
def test_pages_of_commands(name, pictures, scheme, reports, window):
    "Every picture is shown, text is text, nothing is wider than a small window, and nothing is asked of anybody."
    page = window.page
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size(dict(width=600, height=800))
    page.goto(f'file://{reports[name]}')
    sizes = page.evaluate('[...document.images].map(image => image.naturalWidth)')
    assert len(sizes) >= pictures and all(sizes)
    assert page.evaluate('document.scripts.length') == 0 and page.title() != 'lost'
    if name in ('score', 'compare', 'rank'): assert HOSTILE in page.inner_text('body')
    assert page.evaluate('document.documentElement.scrollWidth') <= 600
    page.screenshot(path=f'{reports[name]}-{scheme}.png', full_page=True)
    assert window.complaints() == []
