"What a labelling session and a playground promise: no label is lost, whoever else writes, whatever the disk and the files are like."
import json, os, signal, subprocess, sys, threading
from pathlib import Path

import pytest
from PIL import Image

from llava_reward_nb.data import load_records
from llava_reward_nb.widgets import Board, Journal, Labeller, LabelSession, Playground, find_pairs, folder_pairs, open_judge

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def shades(tmp_path):
    "Six images of one prompt."
    (tmp_path/'a grey square').mkdir()
    for k in range(6): Image.new('L', (8, 8), 40*k).save(tmp_path/'a grey square'/f'{k}.png')
    return tmp_path/'a grey square'


def label_many(session, start, trouble):
    "One window: answers and undoes as fast as it can."
    start.wait()
    for i in range(15):
        session.answer(['left', 'right', 'tie', 'skip'][i % 4])
        if i % 5 == 4: session.undo()
    trouble.append(session.trouble or session.unsaved)


def test_windows_that_write_at_once_lose_no_label(shades, tmp_path):
    "Every line of the journal is whole, and the records are those of the journal. Threads lock files as processes do."
    start, trouble = threading.Event(), []
    sessions = [LabelSession(folder_pairs(shades, 'x'), tmp_path/'labels', ['overall', 'looks'], seed=k) for k in range(4)]
    windows = [threading.Thread(target=label_many, args=(s, start, trouble)) for s in sessions]
    for w in windows: w.start()
    start.set()
    for w in windows: w.join(120)
    assert not any(trouble) and len(trouble) == 4
    lines = [json.loads(line) for line in (tmp_path/'labels/journal.log').read_text().splitlines()]
    undone = {line['undo'] for line in lines if 'undo' in line}
    told = {line['id'] for line in lines if 'undo' not in line}
    labels, damaged = Journal(tmp_path/'labels').read()
    assert damaged == 0 and {x.id for x in labels} == told-undone
    assert {x.id for s in sessions for x in s.mine} == told-undone, 'what the windows believe to have answered'
    for perspective in ('overall', 'looks'):
        votes = {x.pair for x in labels if x.perspective == perspective and x.choice != 'skip'}
        assert {r['pair'] for r in load_records(tmp_path/f'labels/{perspective}.jsonl')} == votes


WINDOW = '''
import sys
from llava_reward_nb.widgets import Labeller
labeller = Labeller(sys.argv[1], sys.argv[2], prompt='x')
print('ready', flush=True)
sys.stdin.readline()
while asked := labeller.desk.asked(): labeller._hear('key', 't', asked)
labeller._hear('focus', '', '')
print(len(labeller.desk.session.mine), len(labeller.desk.session.labels), flush=True)
'''


def test_two_labellers_in_two_processes(shades, tmp_path):
    "Both answer as fast as they can: each pair has one answer, and each window sees all of them."
    for k in range(6, 12): Image.new('L', (8, 8), 20*k+1).save(shades/f'{k}.png')
    other = subprocess.Popen([sys.executable, '-c', WINDOW, shades, tmp_path/'labels'], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    here = Labeller(shades, tmp_path/'labels', prompt='x')
    assert other.stdout.readline() == 'ready\n'
    other.stdin.write('\n')
    other.stdin.flush()
    while asked := here.desk.asked(): here._hear('key', 'ArrowLeft', asked)
    theirs, seen = map(int, other.communicate(timeout=120)[0].split())
    here._hear('focus', '', '')
    labels, damaged = Journal(tmp_path/'labels').read()
    assert (len(labels), len({x.pair for x in labels}), damaged, seen) == (24, 24, 0, 24)
    assert len(here.desk.session.mine)+theirs == 24
    assert '24 answered' in here.stage.html and 'All pairs are answered' in here.stage.html
    assert len(load_records(tmp_path/'labels/overall.jsonl')) == 24


@pytest.fixture
def loading(monkeypatch):
    "A reward that loads until the event is set."
    ready = threading.Event()

    def wait_and_open(rm):
        ready.wait(60)
        return open_judge(rm)
    for module in ('labeller', 'playground'): monkeypatch.setattr(f'llava_reward_nb.widgets.{module}.open_judge', wait_and_open)
    yield ready
    ready.set()


def brightness(images, prompts): return [float(im.convert('L').getpixel((0, 0))) for im in images]


def test_a_model_that_is_still_loading(shades, tmp_path, loading):
    "Pairs are answered and prompts typed meanwhile; one line says what is missing."
    labeller, playground = Labeller(shades, tmp_path/'labels', brightness, prompt='x'), Playground(brightness, shades, 'x')
    labeller._hear('key', 'ArrowLeft', labeller.desk.asked())
    playground.text.value = 'y'
    playground._hear('click', 'choose-image', '0')
    for widget in (labeller, playground): assert 'loading the reward …' in widget.stage.html
    assert '1 answered' in labeller.stage.html and 'agreed' not in labeller.stage.html
    loading.set()
    for widget in (labeller, playground): assert widget.wait(60)
    assert 'the reward agreed with you in' in labeller.stage.html
    assert len(playground.board.values()['brightness']) == 6 and playground.board.prompt == 'y'
    assert len(load_records(tmp_path/'labels/overall.jsonl')) == 1


def test_a_full_disk_while_a_widget_labels(shades, tmp_path, monkeypatch):
    "Pictures from memory, which go to the disk with their labels: one line says what waits, and the next answer takes it along."
    images = [Image.open(file).copy() for file in sorted(shades.iterdir())]
    labeller = Labeller([(images[0], im, 'x') for im in images[1:]], tmp_path/'labels')

    def full(*args, **kwargs): raise OSError(28, 'No space left on device')
    with monkeypatch.context() as broken:
        broken.setattr('PIL.Image.Image.save', full)
        broken.setattr('os.fsync', full)
        monkeypatch.setattr('llava_reward_nb.widgets.labeller.thumbnail', lambda *args: '')  # in memory, but by the same function
        for _ in range(2): labeller._hear('key', 'ArrowLeft', labeller.desk.asked())
    assert 'not on the disk: No space left on device; 2 answers wait in memory' in labeller.stage.html
    labeller._hear('key', 't', labeller.desk.asked())
    assert 'wait' not in labeller.stage.html and '3 answered' in labeller.stage.html
    assert len(load_records(tmp_path/'labels/overall.jsonl')) == 3


FULL = '''
import os, resource, signal, sys
from llava_reward_nb.widgets import LabelSession, folder_pairs
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
session = LabelSession(folder_pairs(sys.argv[1], 'x'), sys.argv[2])
session.answer('left')
size = session.journal.path.stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size+100, resource.RLIM_INFINITY)) # half a line more
for _ in range(3): session.answer('right')
assert session.trouble and len(session.unsaved) == 3 and len(session.labels) == 4
assert session.journal.path.stat().st_size == size
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
session.answer('tie')
assert not session.trouble and not session.unsaved
print(len(session.labels), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
'''


@pytest.mark.skipif(os.name == 'nt', reason='Windows has no limit on the size of files')
def test_a_full_disk_and_a_killed_window(shades, tmp_path):
    "The system refuses the second half of a line: it is cut off, and the answers follow when there is room. Then the window is killed."
    done = subprocess.run([sys.executable, '-c', FULL, shades, tmp_path/'labels'], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ('5', -9), done.stderr
    labels, damaged = Journal(tmp_path/'labels').read()
    assert (len(labels), damaged) == (5, 0)
    assert len(load_records(tmp_path/'labels/overall.jsonl')) == 5
    session = LabelSession(folder_pairs(shades, 'x'), tmp_path/'labels')
    assert len(session.open_keys()) == len(session.pairs)-5
    assert session.answer('left') and len(session.labels) == 6


def test_ten_thousand_files(tmp_path):
    "Links to one image: pairs are found, asked and answered; only what is shown is opened."
    Image.new('L', (8, 8)).save(tmp_path/'one.png')
    (tmp_path/'many').mkdir()
    for i in range(10_000): os.link(tmp_path/'one.png', tmp_path/'many'/f'{i:05d}.png')
    pairs = find_pairs(tmp_path/'many', 'x')
    assert len(pairs) == 20_000
    session = LabelSession(pairs, tmp_path/'labels')
    for _ in range(3): session.answer('tie')
    assert (len(session.labels), len(session.open_keys())) == (3, 19_997)
    board = Board(lambda images, prompts: [0.]*len(images))
    board.add(tmp_path/'many')
    board.cancel()
    board.wait()
    assert (len(board.items), len(board.pictures)) == (10_000, 24)


@pytest.mark.skipif(os.name == 'nt', reason='Windows has no signals between threads')
def test_an_interrupt_keeps_the_state():
    "Ctrl-C while a cell waits ends the waiting; the thread finishes what it does."
    begun, go_on = threading.Event(), threading.Event()

    def reward(images, prompts):
        begun.set()
        go_on.wait(60)
        return [1.]*len(images)
    board = Board(reward)
    board.add([Image.new('L', (4, 4))]*3)
    assert begun.wait(60)
    with pytest.raises(KeyboardInterrupt):
        threading.Timer(.1, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT]).start()
        board.wait(60)
    go_on.set()
    assert board.wait(60)
    assert board.values() == {'reward': {0: 1., 1: 1., 2: 1.}}


@pytest.mark.parametrize('prompt', ['ein „Stern“', 'نجمة حمراء', '紅い星 🌟', '<script>alert(1)</script>', '" onmouseover="x', 'a\nb\u2028c', '', 'x'*10_000, 'שלום '*2000])
def test_prompts_of_any_kind(prompt, shades, tmp_path):
    "They are kept as they are, and shown as text."
    images = sorted(shades.iterdir())
    session = LabelSession(find_pairs([(images[0], images[1], prompt)]), tmp_path/'labels')
    session.answer('left')
    record, = load_records(tmp_path/'labels/overall.jsonl')
    assert record['prompt'] == prompt
    board = Board(lambda images, prompts: [float(len(p)) for p in prompts])
    board.prompt = prompt
    board.add(images)
    board.wait()
    assert set(board.values()['reward'].values()) == {float(len(prompt))}
    for shown in (board.page_html(), board.still().html(), Labeller(session.pairs.values(), tmp_path/'others').stage.html):
        assert '<script>' not in shown and 'onmouseover="x' not in shown and len(shown) < 20_000
