"""Faults that people met, each through the command at which it showed, with what is right instead. `faults/inputs.py` makes the inputs.

A test stands for a kind: its cases are the one that was met and others of the same sort."""
import importlib, json, os, shutil, signal, subprocess, sys, threading, time
from pathlib import Path

import numpy as np, pandas as pd, pyarrow as pa, pyarrow.parquet as pq, pytest
from conftest import script
from PIL import Image
from safetensors.torch import load_file

from llava_reward_nb.commands import items, score, terminal
from llava_reward_nb.weights import MODELS
from llava_reward_nb.files import read_table, write_table
from llava_reward_nb.evaluation.runs import Run
from llava_reward_nb.evaluation.tables import text_width
from llava_reward_nb.model import RewardModel
from llava_reward_nb.store import ScoreStore

INPUTS = script(Path(__file__).parent/'faults'/'inputs.py')
PROMPT = 'a red circle left of a blue square'
FAST = ('--perspective', 'alignment')


@pytest.fixture
def here(tmp_path, monkeypatch):
    "The inputs in a folder of their own, which is the working directory."
    INPUTS.write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def do(here, monkeypatch, capsys):
    "A command as a console script runs it, in this process: exit code, stdout and stderr."
    def do(command, *args):
        module = 'bench' if command == 'bench' else 'commands'
        name = f'llava_reward_{command}'
        monkeypatch.setattr(sys, 'argv', [name, *map(str, args)])
        code = 0
        try: exec(f'{name}()', {'__name__': '__main__', name: getattr(importlib.import_module(f'llava_reward_nb.{module}'), name)})
        except SystemExit as e: code = e.code
        return code, *capsys.readouterr()
    return do


def start(code, *args, **kwargs):
    "A Python process."
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'} | dict(HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1', PYTHONPATH=str(Path(score.__file__).parents[2]))
    env |= kwargs.pop('env', {})
    return subprocess.Popen([sys.executable, '-c', code, *map(str, args)], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)


def run(command, *args, **kwargs):
    "A command in a process of its own: exit code, stdout and stderr."
    p = start(f'from llava_reward_nb.commands import llava_reward_{command} as c; c()', *args, **kwargs)
    out, err = p.communicate(timeout=300)
    return p.returncode, out, err


def cells(path, column): return [r[column] for r in read_table(path)]


@pytest.fixture
def asked(monkeypatch):
    "The sizes of the batches that the model was asked about."
    seen = []
    monkeypatch.setattr(RewardModel, 'embed_all', lambda self, images, *a, f=RewardModel.embed_all: (seen.append(len(images)), f(self, images, *a))[1])
    return seen


# A. A stored result is reused although what decides it has changed

def put_perspective(name, folder):
    "A perspective of the bundle as `mine`, beside the base."
    shutil.rmtree(folder/'mine', ignore_errors=True)
    shutil.copytree(MODELS['tiny']/name, folder/'mine')
    if not (folder/'base').exists(): shutil.copytree(MODELS['tiny']/'base', folder/'base')


def test_evaluation_notices_other_weights(do, here):
    eval_mine = ('eval', 'tifa160', '--reward', 'm/mine', '--limit', 6, '--out', 're')
    put_perspective('alignment', here/'m')
    assert do(*eval_mine)[0] == 0
    put_perspective('fidelity', here/'m')
    code, out, err = do(*eval_mine)
    assert do('eval', 'tifa160', '--reward', 'tiny/fidelity', '--limit', 6, '--out', 'new')[0] == 0
    if code == 0: np.testing.assert_allclose(Run('re').scores()['m/mine'], Run('new').scores()['tiny/fidelity'], atol=1e-4)
    else: assert 'm/mine' in err and 'Traceback' not in err


@pytest.fixture
def three(here):
    "Arguments for a table of three images that differ."
    for k, color in enumerate(('red', 'green', 'blue')): Image.new('RGB', (64, 64), color).save(here/f'{k}.png')
    write_table([dict(image=f'{k}.png', prompt='a red circle') for k in range(3)], here/'three.csv')
    return ('--table', 'three.csv', *FAST, '--batch-size', 1, '--out', 's.csv')


KILLED = '''
import time
from llava_reward_nb.commands import score
from llava_reward_nb.commands.score import llava_reward_score
from llava_reward_nb.model import RewardModel
score.PIECE = 1
done,quick = [],RewardModel.embed_all
def slow(self, images, *args):
    if len(done)==2: time.sleep(1000)
    done.append(images)
    return quick(self, images, *args)
RewardModel.embed_all = slow
llava_reward_score()
'''


def test_killed_scoring_goes_on(do, here, three, asked):
    "What was done some seconds before a power cut is not done again."
    p = start(KILLED, *three)
    parts = here/'.s.csv.parts'
    while p.poll() is None and len(ScoreStore(parts).known() if parts.exists() else ()) < 2: time.sleep(.1)
    p.kill()
    assert p.wait() == -signal.SIGKILL and not (here/'s.csv').exists()
    assert do('score', *three)[0] == 0 and sum(asked) == 1 and not parts.exists()
    assert do('score', *three[:-1], 'whole.csv')[0] == 0
    np.testing.assert_allclose(cells('s.csv', 'alignment'), cells('whole.csv', 'alignment'), atol=1e-4)


@pytest.fixture
def stop(do, monkeypatch):
    "A command in which Ctrl-C is pressed when two images are judged."
    def stop(*args):
        with monkeypatch.context() as m:
            m.setattr(score, 'PIECE', 1)
            quick, done = RewardModel.embed_all, []
            def tired(self, images, *a):
                if len(done) == 2: raise KeyboardInterrupt
                done.append(images)
                return quick(self, images, *a)
            m.setattr(RewardModel, 'embed_all', tired)
            code, out, err = do(*args)
        assert code == 130 and 'the same command goes on' in err
    return stop


def test_kept_scores_belong_to_pixels_and_weights(do, here, three, stop, asked):
    "Overwritten images and other weights are judged again; what is as it was is not."
    stop('score', *three)
    assert not (here/'s.csv').exists()
    Image.new('RGB', (64, 64), 'yellow').save(here/'0.png')
    asked.clear()
    code, out, err = do('score', *three)
    assert code == 0 and sum(asked) == 2 and 'going on' in err
    assert do('score', *three[:-1], 'whole.csv')[0] == 0
    np.testing.assert_allclose(cells('s.csv', 'alignment'), cells('whole.csv', 'alignment'), atol=1e-4)
    put_perspective('alignment', here/'m')
    mine = ('--table', 'three.csv', '--model', 'm', '--batch-size', 1, '--out', 'm.csv')
    stop('score', *mine)
    put_perspective('fidelity', here/'m')
    asked.clear()
    assert do('score', *mine)[0] == 0 and sum(asked) == 3


def test_compare_goes_on_where_it_was_stopped(do, here, three, stop, asked):
    pairs = [dict(image_a=f'{a}.png', image_b=f'{b}.png', prompt='a red circle') for a, b in ((0, 1), (1, 2), (2, 0))]
    for args in (('--table', write_table(pairs, here/'pairs.csv')), ('0.png', '1.png', '2.png', '--prompt', 'a red circle')):
        args = (*args, '--perspective', 'overall', '--batch-size', 1, '--out', 'p.csv')
        stop('compare', *args)
        asked.clear()
        assert do('compare', *args)[0] == 0 and sum(asked) == 1


# B, J, L, O. Tables

def test_ragged_rows_are_an_error(do, here):
    code, out, err = do('train', 'ragged_pairs.csv', '--name', 'x', '--out', 'r')
    assert code == 1 and 'row 1' in err and not (here/'r').exists()
    (here/'ragged.csv').write_text('image,prompt\na.png,a red circle\nb.png,a circle, red\n')
    code, out, err = do('score', '--table', 'ragged.csv', *FAST, '--out', 'o.csv')
    assert code == 1 and 'row 2' in err and not (here/'o.csv').exists()
    code, out, err = do('steer', 'ragged.csv')
    assert code == 1 and 'row 2' in err and not (here/'steered').exists()


@pytest.mark.parametrize('suffix', ['csv', 'tsv', 'json', 'jsonl', 'parquet'])
def test_tables_of_every_form(do, here, suffix):
    "Byte-order marks are read; what was there is there afterwards, as it was."
    rows = [dict(image='a.png', prompt='007', id=2**60+1, n=None, note='1e5', share=.1), dict(image='b.png', prompt='1', id=7, n=3, note='', share=2.)]
    write_table(rows, here/f't.{suffix}')
    if suffix != 'parquet': (here/f't.{suffix}').write_bytes(b'\xef\xbb\xbf'+(here/f't.{suffix}').read_bytes())
    assert do('score', '--table', f't.{suffix}', *FAST, '--out', f'o.{suffix}')[0] == 0
    for got, row in zip(read_table(here/f'o.{suffix}'), rows): assert {k: got[k] for k in row} == row and isinstance(got['alignment'], float)


def test_byte_order_mark(do): assert do('score', '--table', 'bom.json', *FAST)[0] == 0


def test_lists_stay_lists(do, here):
    assert do('score', '--table', 'lists.parquet', *FAST, '--out', 'o.jsonl')[0] == 0
    assert cells('o.jsonl', 'ranking') == [[1, 2, 3], [2, 1]]


def test_images_in_a_table(do, here):
    "As the hub stores them, with and without a path, and as plain bytes; what is written is a name."
    png = INPUTS.as_bytes(INPUTS.scene())
    pq.write_table(pa.table(dict(image=[dict(bytes=png, path=None), dict(bytes=None, path='a.png'), dict(bytes=b'GIF', path=None)], prompt=['x']*3)), here/'three.parquet')
    pq.write_table(pa.table(dict(jpg_0=[png], jpg_1=[png], caption=['a red circle'])), here/'pick.parquet')
    assert do('score', '--table', 'hub.parquet', *FAST, '--out', 'o.csv')[0] == 0
    assert cells('o.csv', 'image') == ['a.png'] and isinstance(cells('o.csv', 'alignment')[0], float)
    code, out, err = do('score', '--table', 'three.parquet', *FAST, '--skip-bad', '--out', 'o.jsonl')
    assert code == 0 and '1 of 3 rows left out' in err and 'row 3' in err
    assert cells('o.jsonl', 'image') == ['row 1', 'a.png', 'row 3'] and 'not an image' in cells('o.jsonl', 'error')[2]
    assert do('compare', '--table', 'pick.parquet', *FAST, '--out', 'p.csv')[0] == 0
    assert cells('p.csv', 'jpg_0') == ['row 1a'] and cells('p.csv', 'alignment') == [.5]
    code, out, err = do('score', '--table', 'pick.parquet', '--image-column', 'jpg_0', *FAST, '--out', 'q.csv')
    assert code == 0 and 'jpg_1' in err and cells('q.csv', 'jpg_1') == ['row 1']


def test_columns_of_other_sources(do, here):
    write_table([dict(file_name='a.png', text='a red circle')], here/'metadata.jsonl')
    assert do('score', '--table', 'metadata.jsonl', *FAST, '--out', 'o.csv')[0] == 0
    assert {k: v for k, v in read_table('o.csv')[0].items() if k != 'alignment'} == dict(file_name='a.png', text='a red circle')
    write_table([dict(image='missing.png', file_name='a.png', prompt='x', caption='y')], here/'two.csv')
    code, out, err = do('score', '--table', 'two.csv', *FAST)
    assert code == 1 and '--image-column' in err
    code, out, err = do('score', '--table', 'two.csv', *FAST, '--image-column', 'file_name')
    assert code == 1 and '--prompt-column' in err
    assert do('score', '--table', 'two.csv', *FAST, '--image-column', 'file_name', '--prompt-column', 'caption', '--out', 't.csv')[0] == 0
    assert cells('t.csv', 'image') == ['missing.png']
    assert do('score', '--table', 'metadata.jsonl', *FAST, '--image-column', 'picture')[0] == 1
    assert do('score', 'a.png', '--prompt', 'x', '--image-column', 'image')[0] == 2


# E. Pixels

def test_pictures_as_viewers_show_them(do, here):
    code, out, err = do('score', 'exif6.jpg', 'upright.png', 'invisible.png', '--prompt', PROMPT, *FAST, '--out', 'o.csv')
    turned, upright, invisible = cells('o.csv', 'alignment')
    assert code == 0 and abs(turned-upright) < .1 and invisible == upright
    assert err.count('transparent') == 1 and 'invisible.png' in err
    assert do('compare', 'exif6.jpg', 'upright.png', '--prompt', PROMPT, *FAST, '--out', 'p.csv')[0] == 0
    assert abs(cells('p.csv', 'alignment')[0]-.5) < .25 # a tenth of a reward is little beside the temperature


def test_transparent_images_are_counted(do, here):
    for k in range(4): shutil.copy('invisible.png', f'clear{k}.png')
    code, out, err = do('score', *(f'clear{k}.png' for k in range(4)), '--prompt', PROMPT, '--reward', 'tiny/alignment', 'tiny-clip')
    assert code == 0 and err.count('transparent') == 1 and '4 images' in err


# F. Two runs in one folder

def test_two_evaluations_in_one_folder(here):
    "Both survive, or the second is refused."
    both = [start('from llava_reward_nb.commands.evaluate import llava_reward_eval as c; c()', 'tifa160', '--reward', r, '--limit', 4, '--out', 'one')
            for r in ('checker', 'tiny/alignment')]
    ends = [p.communicate(timeout=300)+(p.returncode,) for p in both]
    scores = Run('one').scores()
    for (out, err, code), name in zip(ends, ('checker', 'tiny/alignment')):
        assert 'Traceback' not in err
        if code == 0: assert scores[name].notna().all(), err
        else: assert 'another process' in err
    assert 0 in [code for *_, code in ends]


def test_two_scorings_into_one_file(do, here):
    with items.kept_scores(here/'s.csv'):
        code, out, err = do('score', 'a.png', '--prompt', 'a red circle', *FAST, '--out', 's.csv')
    assert code == 1 and 'another process' in err and not (here/'s.csv').exists()


# I. One bad item

@pytest.mark.parametrize('reward', [('--reward', 'tiny/alignment', 'tiny-clip'), FAST])
def test_one_bad_item_costs_no_other(do, here, reward):
    rows = [dict(image='a.png', prompt='a red circle'), dict(image='thin.png', prompt='a red circle'), dict(image='a.png', prompt='very '*5000),
            dict(image='none.png', prompt='x'), dict(image='', prompt='x'), dict(image='b.png', prompt='a blue square')]
    write_table(rows, here/'bad.csv')
    code, out, err = do('score', '--table', 'bad.csv', '--skip-bad', *reward, '--out', 'o.csv')
    assert code == 0 and '4 of 6 rows left out' in err and 'row 2' in err and '1 no such file (row 4)' in err
    got, name = read_table('o.csv'), 'tiny/alignment' if len(reward) > 2 else 'alignment'
    assert [bool(r['error']) for r in got] == [False, True, True, True, True, False]
    assert [r[name] is None for r in got] == [bool(r['error']) for r in got]
    code, out, err = do('score', '--table', 'bad.csv', *reward, '--out', 'p.csv')
    assert code == 1 and 'row ' in err and '--skip-bad' in err and not (here/'p.csv').exists()


def test_thin_table(do, here):
    code, out, err = do('score', '--table', 'thin.csv', '--skip-bad', '--reward', 'tiny/alignment', 'tiny-clip', '--out', 'o.csv')
    good, bad = read_table('o.csv')
    assert code == 0 and good['error'] == '' and bad['tiny/alignment'] is None and 'too thin' in bad['error'] and bad['tiny-clip'] is not None


# K. Old cells

def test_old_cells_do_not_survive(do, here):
    code, out, err = do('score', '--table', 'old.csv', '--skip-bad', *FAST, '--out', 'o.csv')
    good, bad = read_table('o.csv')
    assert code == 0 and 'alignment' in err
    assert (good['error'], bad['alignment']) == ('', None) and good['alignment'] != 456 and 'no such file' in bad['error']
    assert do('score', '--table', 'old.csv', '--skip-bad', '--reward', 'tiny/alignment', '--out', 'p.csv')[0] == 0
    assert cells('p.csv', 'alignment') == [456., 789.] and cells('p.csv', 'error')[0] == '' # not a column that this run writes
    write_table([dict(image_a='a.png', image_b='none.png', prompt='x', alignment=.9), dict(image_a='a.png', image_b='b.png', prompt='x', alignment=.9)], here/'q.csv')
    assert do('compare', '--table', 'q.csv', '--skip-bad', *FAST, '--out', 'r.csv')[0] == 0
    assert cells('r.csv', 'alignment') == [None, .5]


# M. Folders

def test_folders_as_people_have_them(do, here):
    (here/'in'/'.hidden').mkdir(parents=True)
    (here/'elsewhere').mkdir()
    im = INPUTS.scene()
    for name in ('.x.png', '._a.png', '.hidden/y.png', 'A.JFIF', 'b.Png', 'c.jp2'): im.save(here/'in'/name, format='JPEG2000' if name.endswith('jp2') else 'png')
    im.save(here/'elsewhere'/'far.webp')
    (here/'in'/'linked').symlink_to(here/'elsewhere')
    (here/'in'/'round').symlink_to(here/'in')
    for name in ('a.txt', 'b.txt', 'c.heic'): (here/'in'/name).touch()
    code, out, err = do('score', 'in', '--prompt', 'a red circle', *FAST, '--out', 'o.csv')
    assert code == 0, err
    assert [Path(p).name for p in cells('o.csv', 'image')] == ['A.JFIF', 'b.Png', 'c.jp2', 'far.webp']
    assert '2 .txt' in err and '1 .heic' in err and '3 hidden' in err


# N. Endings

@pytest.mark.parametrize('command,args', [
    ('score', ('a.png', '--prompt', 'x', '--out')), ('compare', ('a.png', 'b.png', '--prompt', 'x', '--out')),
    ('table', ('tifa160', 're', '--out')), ('latency', ('--reward', 'checker', '--out')), ('bench', ('--quick', '--out'))])
def test_impossible_files_are_found_first(do, here, monkeypatch, command, args):
    def load(*args, **kwargs): raise AssertionError('long work was begun')
    for name in ('RewardModel.from_pretrained', ): monkeypatch.setattr(f'llava_reward_nb.model.{name}', load)
    (here/'re').mkdir()
    (here/'folder.csv').mkdir()
    ends = [('x.doc', 'x.doc'), ('a.png/x.csv', 'cannot be written')]
    if command != 'score': ends += [('x', 'x'), ('folder.csv', 'folder')]  # there both are folders
    for end, why in ends:
        code, out, err = do(command, *args, end)
        assert code == 1 and why in err and '--out' in err+'--out' and 'Traceback' not in err, err


@pytest.mark.parametrize('command,args', [('eval', ('tifa160', '--reward', 'checker')), ('steer', ('two stars', )), ('demo', ('--n', '8'))])
def test_impossible_folders_are_found_first(do, here, command, args):
    for end in ('a.png', 'a.png/deep'):
        code, out, err = do(command, *args, '--out', end)
        assert code == 1 and 'a.png' in err and 'Traceback' not in err, err


# S. Memory

def test_images_are_opened_a_few_at_a_time(do, here, monkeypatch):
    write_table([dict(image=f'n{k}.png', prompt='a red circle') for k in range(20)], here/'many.csv')
    for k in range(20): shutil.copy('a.png', f'n{k}.png')
    monkeypatch.setattr(score, 'PIECE', 4)
    most, seen = [], []
    def open_looks(looks, f=score._open_looks):
        f(looks)
        seen.extend(looks)
        most.append(sum(look.image is not None for look in seen))
    monkeypatch.setattr(score, '_open_looks', open_looks)
    assert do('score', '--table', 'many.csv', *FAST, '--batch-size', 2)[0] == 0
    assert most == [4]*5


# X. Names that collide

def test_a_score_called_like_a_column(do, here):
    "A column that says what is judged is not overwritten with what comes out."
    write_table([dict(image='a.png', alignment='a red circle', label=1)], here/'t.csv')
    code, out, err = do('score', '--table', 't.csv', '--prompt-column', 'alignment', *FAST, '--out', 'o.csv')
    assert code == 1 and "'alignment'" in err and not (here/'o.csv').exists()
    assert do('score', '--table', 't.csv', '--prompt-column', 'alignment', '--perspective', 'fidelity', '--out', 'o.csv')[0] == 0
    assert cells('o.csv', 'alignment') == ['a red circle'] and isinstance(cells('o.csv', 'fidelity')[0], float)
    put_perspective('alignment', here/'m')
    (here/'m'/'mine').rename(here/'m'/'prompt')
    code, out, err = do('score', 'a.png', '--prompt', 'a red circle', '--model', 'm', '--out', 'p.csv')
    assert code == 1 or cells('p.csv', 'prompt') == ['a red circle']
    assert do('score', 'a.png', '--prompt', 'x', '--reward', 'tiny', 'tiny')[0] == 2


# The terminal

def test_closed_pipe(here):
    "`| head` gets its lines; nothing is said, and the file is written."
    write_table([dict(image='a.png', prompt='a red circle', note='x'*40) for _ in range(40)], here/'long.csv')
    p = start('from llava_reward_nb.commands.score import llava_reward_score as c; c()', '--table', 'long.csv', *FAST, '--out', 'o.csv')
    p.stdout.close()
    err = p.stderr.read()
    assert p.wait(300) == 141 and 'Traceback' not in err and 'roken' not in err, err
    assert len(read_table('o.csv')) == 40


def test_missing_package(do, here, monkeypatch):
    "One line that installs it, and works before a release."
    monkeypatch.setitem(sys.modules, 'openai', None)
    monkeypatch.setenv('OPENAI_API_KEY', 'x')
    for args in (('score', 'a.png', '--prompt', 'a red circle', '--reward', 'grader'), ('eval', 'tifa160', '--reward', 'grader', '--limit', '2', '--out', 'x'),
                 ('steer', 'two stars', '--reward', 'grader')):
        code, out, err = do(*args)
        last = err.strip().splitlines()[-1]
        assert code == 1 and 'pip install openai' in last and 'llava_reward_nb[' not in last


def test_tiny_says_what_it_does_not_know(do, here):
    Image.new('RGB', (640, 480), 'green').save('photo.png')
    for args in (('score', 'a.png', '--prompt', 'a photograph of a cat', *FAST), ('score', 'a.png', '--prompt', 'a cat', '--reward', 'tiny-clip'),
                 ('compare', 'a.png', 'b.png', '--prompt', 'a cat', *FAST), ('score', 'photo.png', '--perspective', 'safety')):
        code, out, err = do(*args)
        assert code == 0 and err.count('note: tiny') == 1, args
    assert 'note: tiny' not in do('score', 'a.png', '--prompt', PROMPT, *FAST)[2]
    assert 'note: tiny' not in do('score', 'a.png', '--prompt', 'a cat', '--reward', 'aesthetic')[2] # another model, which is not here


@pytest.mark.parametrize('args,guess', [
    (('score', 'a.png', '--prompt', 'x', '--perspective', 'aligment'), 'alignment'), (('score', 'a.png', '--promt', 'x'), '--prompt'),
    (('score', 'a.png', '--prompt', 'x', '--reward', 'tiny/safty'), 'safety'), (('score', 'a.png', '--prompt', 'x', '--reward', 'imagreward'), 'imagereward'),
    (('eval', 'tifa', '--reward', 'checker'), 'tifa160'), (('table', 'mjbensh'), 'mjbench'), (('steer', 'two stars', '--method', 'bem'), 'beam')])
def test_mistyped_names_are_guessed(do, args, guess):
    code, out, err = do(*args)
    assert code in (1, 2) and f"did you mean '{guess}'" in err


def test_prompts_in_any_script(do, here):
    write_table([dict(image='a.png', prompt=p) for p in ('紅い円', 'красный круг', 'عربي', 'ein Kreis 🔴', '\x1b[2J')], here/'words.csv')
    code, out, err = do('score', '--table', 'words.csv', *FAST, '--out', 'o.csv')
    assert code == 0 and cells('o.csv', 'prompt') == cells('words.csv', 'prompt') and '\x1b' not in out
    lines = [line for line in out.splitlines() if line.startswith('a.png')]
    assert len({text_width(line) for line in lines}) == 1


@pytest.mark.parametrize('env', [dict(LANG='C', LC_ALL='C', TERM='dumb', PYTHONIOENCODING='ascii', COLUMNS='')])
def test_poor_terminals(here, env):
    p = run('score', 'a.png', '--prompt', '紅い円', *FAST, env=env, stdin=subprocess.DEVNULL)
    assert p[0] == 0 and 'a.png' in p[1], p


def test_a_heartbeat_where_no_bar_is_seen(capfd):
    twice, calls = threading.Event(), []
    def say():
        calls.append(1)
        if len(calls) == 2: twice.set()
        return 'still at it'
    with terminal.heartbeat(say, every=.01): assert twice.wait(60)
    assert 'still at it …' in capfd.readouterr().err


def test_steering_by_default_collides_with_nothing(do, here):
    steer = lambda *args: do('steer', *args, '--steps', 8, '--n-particles', 2)
    assert steer('two stars')[0] == 0 and steer('two stars')[0] == 0 and steer('a red circle')[0] == 0
    code, out, err = steer('two stars', '--lam', 3)
    assert code == 0 and 'steered-2' in err and (here/'steered-2'/'scores.parquet').is_file()
    assert set(pd.read_parquet('steered/scores.parquet').prompt) == {'two stars', 'a red circle'}
    code, out, err = steer('two stars', 'two stars', 'two stars')
    assert code == 0 and '2 of 3 prompts occur before' in err


# Rows of other chapters, at their commands

def test_broken_checkpoints_are_one_error(do, here):
    "R. What a decoder raises becomes one line that names the file."
    put_perspective('alignment', here/'m')
    for file, damage in (('base/config.json', b'\x80'), ('base/config.json', b'{"model_type"'), ('mine/adapter_config.json', b'{"r": 8}'),
                         ('mine/reward_config.json', b'[]'), ('base/tokenizer.json', b'{}'), ('mine/head.safetensors', b'\xff'*40)):
        whole = (here/'m'/file).read_bytes()
        (here/'m'/file).write_bytes(damage)
        code, out, err = do('score', 'a.png', '--prompt', 'a red circle', '--model', 'm')
        assert code == 1 and Path(file).name in err and 'Traceback' not in err, (file, damage, err)
        (here/'m'/file).write_bytes(whole)


def test_a_flipped_bit_is_noticed(do, here):
    "R. Weights that are not those that were saved."
    assert do('train', write_pairs(here), '--name', 'own', '--out', 'run', '--lora-rank', 4)[0] == 0
    (file,) = (here/'run'/'own').glob('head.safetensors')
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    code, out, err = do('score', 'a.png', '--prompt', 'a red circle', '--model', 'run')
    assert code == 1 and 'head.safetensors' in err


def write_pairs(here, n=12):
    "Pairs in which red is better than blue."
    for color in ('red', 'blue'): Image.new('RGB', (64, 64), color).save(here/f'{color}.png')
    return write_table([dict(prompt='a red circle', chosen_path='red.png', reject_path='blue.png')]*n, here/'pairs.jsonl')


def test_a_small_training_learns(do, here):
    "T. The first update of the default recipe has a rate."
    assert do('train', write_pairs(here), '--base', 'tiny', '--name', 'colour', '--loss', 'bt', '--out', 'r12', '--lora-rank', 4)[0] == 0
    weights = load_file(here/'r12'/'colour'/'adapter_model.safetensors')
    assert any(v.abs().max() > 0 for k, v in weights.items() if 'lora_B' in k)


def test_names_that_peft_would_confuse(do, here):
    "X. Names that occur in the paths of modules."
    for name in ('mlp', 'base', 'model'):
        code, out, err = do('train', write_pairs(here), '--name', name, '--out', 'run')
        assert code == 1 and name in err and not (here/'run').exists()


def test_one_reward_in_two_runs(do, here):
    "U. Duplicates are kept apart, or are an error; never one row of two."
    for k in 'ab': assert do('eval', 'mjbench', '--reward', 'checker', '--limit', 2+(k == 'b'), '--out', f'run_{k}')[0] == 0
    code, out, err = do('table', 'mjbench', 'run_a', 'run_b', '--out', 't.csv')
    if code == 0: assert 'run_a' in out and 'run_b' in out
    else: assert 'checker' in err


def test_significance_of_one_pair(do, here):
    "W. No mark and no interval from what cannot decide anything."
    assert do('eval', 'mjbench', '--reward', 'checker', 'tiny/alignment', '--limit', 1, '--out', 'one')[0] == 0
    code, out, err = do('table', 'mjbench', 'one', '--intervals')
    assert code == 0 and '†' not in ''.join(line for line in out.splitlines() if 'checker' in line) and '[100.0, 100.0]' not in out


def test_options_of_adapters(do, here):
    "Y. Rank-stabilised LoRA has another scale: honoured or refused."
    put_perspective('alignment', here/'m')
    assert do('score', 'a.png', '--prompt', PROMPT, '--model', 'm', '--out', 'o.csv')[0] == 0
    file = here/'m'/'mine'/'adapter_config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(use_rslora=True)))
    code, out, err = do('score', 'a.png', '--prompt', PROMPT, '--model', 'm', '--out', 'p.csv')
    if code == 0: assert abs(cells('p.csv', 'mine')[0]-cells('o.csv', 'mine')[0]) > 1e-3
    else: assert 'rslora' in err or 'adapter_config.json' in err


def test_foreign_files_among_scores(do, here):
    "Z. What a Mac leaves in a folder is not read; a damaged part is named."
    eval_checker = ('eval', 'tifa160', '--reward', 'checker', '--limit', 2, '--out', 're')
    assert do(*eval_checker)[0] == 0
    (part, *_) = (here/'re'/'scores').glob('*.parquet')
    (part.parent/f'._{part.name}').write_bytes(b'\x00\x05\x16\x07')
    assert do(*eval_checker)[0] == 0 and do('table', 'tifa160', 're')[0] == 0
    part.write_bytes(b'PAR1')
    code, out, err = do('table', 'tifa160', 're')
    assert code == 1 and part.name in err


def test_folders_with_dots_as_perspectives(do, here):
    "AA. A folder's name need not be usable as a perspective's."
    put_perspective('alignment', here/'m')
    (here/'m'/'mine').rename(here/'m'/'v1.2')
    assert do('score', 'a.png', '--prompt', PROMPT, '--model', 'm/v1.2', '--out', 'o.csv')[0] == 0
    assert do('score', 'a.png', '--prompt', PROMPT, '--reward', 'm/v1.2', '--out', 'p.csv')[0] == 0


def test_tables_escape_their_syntax(do, here):
    "AB. A pipe in a label, and a label that begins with a bracket."
    for name in ('a|b', '[x]'):
        put_perspective('alignment', here/name)
        assert do('eval', 'tifa160', '--reward', f'{name}/mine', '--limit', 4, '--out', 're')[0] == 0
    for form in ('md', 'tex'): assert do('table', 'tifa160', 're', '--out', f't.{form}')[0] == 0
    lines = [line for line in (here/'t.md').read_text().splitlines() if line.startswith('|')]
    assert len({line.replace(r'\|', '').count('|') for line in lines}) == 1
    assert r'\\ [' not in (here/'t.tex').read_text() and '\\\\\n[' not in (here/'t.tex').read_text()


def test_prompts_of_steering(do, here):
    "AB. What is no text costs nothing."
    (here/'p.json').write_text('[{"prompt": "a\\ud800"}]')
    code, out, err = do('steer', 'p.json')
    assert code == 1 and 'surrogate' in err and not (here/'steered').exists()
    code, out, err = do('steer', 'two stars', '--device', 'cuda:7')
    assert code == 1 and '--device cuda:7' in err and not (here/'steered').exists()


@pytest.mark.parametrize('args', [
    ('score', '~nobody-here/a.png', '--prompt', PROMPT), ('score', '--table', '~nobody-here/t.csv'),
    ('score', 'a.png', '--prompt', PROMPT, '--out', '~nobody-here/o.csv'), ('compare', '~nobody-here/a.png', 'a.png', '--prompt', PROMPT),
    ('eval', 'tifa160', '--reward', 'checker', '--out', '~nobody-here/runs'), ('eval', 'tifa160', '--reward', 'checker', '--data', '~nobody-here/tifa'),
    ('table', 'tifa160', '~nobody-here/runs'), ('steer', '~nobody-here/prompts.txt'), ('steer', PROMPT, '--out', '~nobody-here/steered'),
    ('latency', '--reward', 'checker', '--images', '~nobody-here/a')], ids=lambda args: ' '.join(args[:2]))
def test_homes_that_do_not_exist(do, here, args):
    code, _, said = do(*args)
    assert code == 1 and '~nobody-here' in said and not (here/'~nobody-here').exists()


def test_each_row_without_an_image_is_named(do, here):
    (here/'gaps.csv').write_text(f'image,prompt\na.png,{PROMPT}\n,{PROMPT}\nhttps://x.org/a.png,{PROMPT}\n,{PROMPT}\n')
    code, _, said = do('score', '--table', 'gaps.csv', '--skip-bad', '--out', 'o.csv', *FAST)
    errors = [r['error'] for r in read_table('o.csv')]
    assert code == 0 and [e.split(':')[0] for e in errors] == ['', 'row 2', 'https', 'row 4']
    assert 'is an address' in errors[2] and '2 no image (row 2, row 4)' in said and 'row 2: row 2' not in do('score', '--table', 'gaps.csv', *FAST)[2]


def test_classifiers_need_no_prompts_in_a_table(do, here):
    write_table([dict(image='a.png')], 'alone.csv')
    assert do('score', '--table', 'alone.csv', '--perspective', 'safety', '--out', 'o.csv')[0] == 0
    assert list(read_table('o.csv')[0]) == ['image', 'safety', 'safety_prob']
    assert "no column 'prompt'" in do('score', '--table', 'alone.csv', *FAST)[2]


@pytest.mark.parametrize('args, why', [
    (('compare', '--table', 'pairs.csv', '--image-column', 'chosen', 'chosen'), 'name a column twice'),
    (('score', '--table', 'pairs.csv', '--image-column', 'chosen', '--prompt-column', 'chosen'), 'name a column twice'),
    (('score', 'a.png', '--prompt', PROMPT, '--model', 'tiny', '--reward', 'checker'), '--num-crops and --model out'),
    (('eval', 'tifa160', '--reward', 'checker', '--images', 'nowhere'), 'brings its own images'),
    (('table', 'latency', 'times.csv', '--intervals'), 'no intervals'), (('table', 'latency', 'times.csv', '--by', 'reward'), 'no columns to split'),
    (('table', 'latency', 'times.csv'), 'lacks seconds per sample'), (('table', 'latency', 'times.csv', '--threshold', 'nan'), 'pairs of images')])
def test_options_without_a_use_are_refused(do, here, args, why):
    write_table([dict(prompt=PROMPT, chosen='a.png', rejected='a.png')], 'pairs.csv')
    write_table([dict(reward='a')], 'times.csv')
    code, _, said = do(*args)
    assert code in (1, 2) and why in said


def test_pixels_in_a_table(do, here):
    pixels = np.asarray(Image.open('a.png').convert('RGB'))
    write_table([dict(image=p, prompt=PROMPT) for p in (pixels.tolist(), pixels.tolist())], 'pixels.parquet')
    assert do('score', 'a.png', '--prompt', PROMPT, '--out', 'file.csv', *FAST)[0] == 0
    assert do('score', '--table', 'pixels.parquet', '--out', 'o.csv', *FAST)[0] == 0
    want = read_table('file.csv')[0]['alignment']
    assert [r['alignment'] for r in read_table('o.csv')] == pytest.approx([want, want], abs=1e-4)
    write_table([dict(image=[[1, 300]], prompt=PROMPT)], 'odd.jsonl')
    assert 'list is not an image' in do('score', '--table', 'odd.jsonl', *FAST)[2]
