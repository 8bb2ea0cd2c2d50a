"The commands end to end: what goes in, what comes out, and every bad input named before long work starts."
import csv, io, json, os, shutil, signal, struct, subprocess, sys, zlib
from pathlib import Path

import numpy as np, pytest, torch
from PIL import Image
from safetensors.torch import load_file, save_file

from llava_reward_nb.commands import score
from llava_reward_nb.commands.demo import llava_reward_demo
from llava_reward_nb.commands.items import JudgeItem
from llava_reward_nb.commands.score import llava_reward_compare, llava_reward_score
from llava_reward_nb.commands.terminal import UsageError
from llava_reward_nb.commands.train import llava_reward_train
from llava_reward_nb.core import CheckpointError, InputError
from llava_reward_nb.files import read_table, write_table
from llava_reward_nb.weights import resolve_model
from llava_reward_nb.model import RewardModel
from llava_reward_nb.shapes.world import render
from llava_reward_nb.shapes.records import alignment_pairs, safety_labels, write_records
from llava_reward_nb.shapes.prompts import parse_prompt
from llava_reward_nb.shapes.scenes import scene_for

TINY = 'tiny'
NAMES = ['alignment', 'fidelity', 'overall', 'overall_bt', 'safety']


def start(command, *args, code=None, **kwargs):
    "A command in a process of its own, as the console script starts it."
    code = code or f'from llava_reward_nb.commands import {command}; {command}()'
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'} | dict(HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1', PYTHONPATH=str(Path(score.__file__).parents[2]))
    return subprocess.Popen([sys.executable, '-c', code, *map(str, args)], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)


def run(command, *args, **kwargs):
    "Exit code, stdout and stderr."
    p = start(command, *args, **kwargs)
    out, err = p.communicate(timeout=300)
    return p.returncode, out, err


def said(err):
    "Lines on stderr, without those that only say that something takes long."
    return [line for line in err.splitlines() if not line.endswith(' …')]


def draw(text, seed=0): return render(scene_for(parse_prompt(text), np.random.default_rng(seed), 'all', distractors=False))


def png(w, h):
    "A PNG of a few hundred bytes that claims to have w x h pixels."
    def chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind+data))
    return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, 8, 2, 0, 0, 0)) + chunk(b'IDAT', zlib.compress(b'\0'*1000))
            + chunk(b'IEND', b''))


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "Good images, and one of each bad kind in `bad/`."
    home = tmp_path_factory.mktemp('cli')
    for name, text in {'circle': 'a red circle', 'square': 'a blue square', 'star': 'a yellow star'}.items(): draw(text).save(home/f'{name}.png')
    bad = home/'bad'
    bad.mkdir()
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(buffer, 'png')
    (bad/'cut.png').write_bytes(buffer.getvalue()[:4000])
    (bad/'empty.png').touch()
    (bad/'page.png').write_text('<html>404</html>')
    (bad/'zero.png').write_bytes(png(0, 7))
    (bad/'bomb.png').write_bytes(png(60_000, 60_000))
    Image.new('F', (8, 8)).save(bad/'depth.tiff')
    Image.new('RGB', (5000, 2)).save(bad/'thin.png')
    return home


@pytest.fixture(scope='module')
def rm(): return RewardModel.from_pretrained(TINY, device='cpu')


@pytest.fixture
def no_model(monkeypatch):
    "Loading a model is long work: a test with this fixture shows that the fault is found before."
    def load(*args, **kwargs): raise AssertionError('the model was loaded')
    monkeypatch.setattr(score, 'load', load)
    monkeypatch.setattr(RewardModel, 'from_pretrained', load)


def test_score_writes_what_the_model_says(home, tmp_path, rm):
    code, out, err = run('llava_reward_score', home/'circle.png', home/'square.png', '--prompt', 'a red circle', '--model', TINY, '--out', tmp_path/'s.csv')
    assert code == 0 and not said(err), err
    with open(tmp_path/'s.csv', newline='') as f: rows = list(csv.DictReader(f))
    assert list(rows[0]) == ['image', 'prompt', 'alignment', 'fidelity', 'overall_bt', 'safety', 'safety_prob']
    assert 'prompt: a red circle' in out and 'circle.png' in out and 'not shown: overall' in out
    images = [str(home/'circle.png'), str(home/'square.png')]
    for n in NAMES:
        if n != 'overall':
            torch.testing.assert_close(torch.tensor([float(r[n]) for r in rows]), rm(images, 'a red circle', n), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('suffix', ['csv', 'json', 'jsonl', 'parquet'])
def test_tables_keep_their_columns(home, tmp_path, suffix):
    rows = [dict(image=str(home/'circle.png'), prompt='a red circle', seed=1), dict(image='../star.png', prompt='007', seed=2)]
    (home/'t').mkdir(exist_ok=True)
    llava_reward_score([], table=write_table(rows, home/f't/t.{suffix}'), model=TINY, perspective=['fidelity'], out=tmp_path/f'o.{suffix}')
    got = read_table(tmp_path/f'o.{suffix}')
    assert [str(r['seed']) for r in got] == ['1', '2'] and [str(r['prompt']) for r in got] == ['a red circle', '007']
    assert list(got[0]) == ['image', 'prompt', 'seed', 'fidelity']


def test_folders_and_modes(home, tmp_path):
    "Everything in a folder, at any depth; modes that are not RGB are converted."
    for mode in ('P', 'L', 'LA', 'CMYK', '1', 'RGBA', 'I;16'):
        im = draw('a red circle').convert('L') if mode == 'I;16' else draw('a red circle').convert(mode)
        (tmp_path/'in'/'deep').mkdir(parents=True, exist_ok=True)
        im.save(tmp_path/'in'/'deep'/f"{mode.replace(';', '')}.{'tiff' if mode == 'CMYK' else 'png'}")
    shutil.copy(home/'star.png', tmp_path/'in'/'a.png')
    llava_reward_score(tmp_path/'in', 'a star', model=TINY, perspective=['alignment'], out=tmp_path/'o.json')
    rows = read_table(tmp_path/'o.json')
    assert len(rows) == 8 and rows[0]['image'].endswith('a.png') and all(np.isfinite(r['alignment']) for r in rows)


def test_ranking_and_pairs(home, tmp_path, rm):
    images = [str(home/f'{n}.png') for n in ('circle', 'square', 'star')]
    llava_reward_compare(images, 'a red circle', model=TINY, out=tmp_path/'r.csv')
    rows = read_table(tmp_path/'r.csv')
    pairs = write_table([dict(image_a='circle.png', image_b='star.png', prompt='a star', id=7)], home/'pairs.jsonl')
    llava_reward_compare([], table=pairs, model=TINY, out=tmp_path/'p.csv')
    p, = read_table(tmp_path/'p.csv')
    for n in NAMES:
        assert [r[f'{n}_rank'] for r in rows] == [rm.rank(images, 'a red circle', n).order.index(i)+1 for i in range(3)]
        assert p['id'] == 7 and p[n] == pytest.approx(rm.compare(images[0], images[2], 'a star', n).item(), abs=1e-4)


def test_an_image_in_many_pairs_is_run_once(home, monkeypatch, rm):
    seen = []
    monkeypatch.setattr(rm, 'embed_all', lambda images, *a, f=rm.embed_all: (seen.extend(images), f(images, *a))[1], raising=False)
    monkeypatch.setattr(score, 'PIECE', 2)
    a, b, c = ((str(home/f'{n}.png'), 'a star') for n in ('circle', 'square', 'star'))
    pairs = [(a, b), (a, c), (b, c)]
    items = [JudgeItem((x, y), text, {}) for (x, text), (y, _) in pairs]
    got = score.judge_items([score.perspective_judge(rm, ['overall'])], items)
    assert len(seen) == 3 and got[0][0] == got[1][0] and got[1][1] == got[2][1]
    torch.testing.assert_close(torch.tensor([got[0][0]['overall'], got[0][1]['overall'], got[1][1]['overall']]),
                               rm.embed([x for x, _ in (a, b, c)], 'a star', 'overall'))


# Bad input

IMAGES = dict(cut='damaged', empty='is empty', page='not an image', zero='', bomb='pixels', nothere='no such file', depth='mode', thin='too thin')


@pytest.mark.parametrize('name', IMAGES)
def test_bad_images_stop_the_run(home, tmp_path, name, request):
    if name != 'thin': request.getfixturevalue('no_model') # how thin is too thin depends on the model
    path = home/'bad'/f"{name}.{'tiff' if name == 'depth' else 'png'}"
    with pytest.raises(InputError, match=name) as e:
        llava_reward_score([home/'circle.png', path], 'a red circle', model=TINY, out=tmp_path/'o.csv')
    assert IMAGES[name] in str(e.value) and '\n' not in str(e.value) and '--skip-bad' in str(e.value) and list(tmp_path.iterdir()) == []


def test_bad_images_are_recorded_and_the_run_goes_on(home, tmp_path):
    llava_reward_score([home/'circle.png', home/'bad', home/'none.png'], 'a red circle', model=TINY, perspective=['alignment'], skip_bad=True, out=tmp_path/'o.csv')
    rows = read_table(tmp_path/'o.csv')
    assert len(rows) == 9 and rows[0]['error'] == '' and float(rows[0]['alignment'])
    for r in rows[1:]: assert r['alignment'] is None and Path(r['image']).name in r['error']


@pytest.mark.parametrize('prompt,why', [(None, 'is a NoneType'), (3, 'is a int'), (['a'], 'is a list'), ('', 'no prompt'), ('  ', 'no prompt'),
                                        ('very '*5000, 'shorten it'), ('\ud800', 'Unicode')])
def test_bad_prompts(home, tmp_path, prompt, why):
    rows = [dict(image='circle.png', prompt='a red circle'), dict(image='star.png', prompt=prompt)]
    table = home/'prompts.json'
    table.write_text(json.dumps(rows))
    with pytest.raises(InputError, match=why): llava_reward_score([], table=table, model=TINY, out=tmp_path/'o.json')
    llava_reward_score([], table=table, model=TINY, perspective=['alignment'], skip_bad=True, out=tmp_path/'o.json')
    good, bad = read_table(tmp_path/'o.json')
    assert good['error'] == '' and why in bad['error'] and bad['alignment'] is None


def test_classifiers_need_no_prompt(home, tmp_path, no_model):
    with pytest.raises(InputError, match='--perspective safety'): llava_reward_score(home/'circle.png', model=TINY)
    with pytest.raises(AssertionError, match='the model was loaded'): llava_reward_score(home/'circle.png', model=TINY, perspective=['safety'])


def test_special_tokens_are_plain_text(home, tmp_path):
    prompts = ['a red circle', 'a red circle<|end|>', '<|image_1|> a red circle', '<|endoftext|>']
    write_table([dict(image='circle.png', prompt=p) for p in prompts], home/'special.csv')
    llava_reward_score([], table=home/'special.csv', model=TINY, perspective=['alignment'], out=tmp_path/'o.json')
    assert len({r['alignment'] for r in read_table(tmp_path/'o.json')}) == 4


@pytest.mark.parametrize('kwargs,why', [
    (dict(perspective=['beauty']), "no perspective 'beauty'"), (dict(perspective=['overall']), 'use llava_reward_compare'), (dict(model='./nowhere'), 'no such folder'),
    (dict(model='nowhere'), 'no such folder'), (dict(dtype='int8'), '--dtype int8'), (dict(device='tpu9'), '--device tpu9'), (dict(batch_size=0), '--batch-size 0'),
    (dict(num_crops=0), '--num-crops 0'), (dict(out='scores.txt'), 'scores.txt'), (dict(out='.'), '--out'),
    (dict(perspective=['aligment']), "did you mean 'alignment'"), (dict(dtype='float'), "did you mean 'float")])
def test_bad_settings(home, no_model, kwargs, why):
    with pytest.raises(ValueError, match=why): llava_reward_score(home/'circle.png', 'a red circle', **{**dict(model=TINY), **kwargs})


@pytest.mark.parametrize('text,why', [('', 'has no rows|cannot be read'), ('image,prompt\n', 'no rows'), ('picture,prompt\na,b\n', "no column 'image' or 'path'"),
                                      ('image,words\na.png,b\n', "no column 'prompt'"), ('image,prompt\n"a.png,b\n', 'line 2'),
                                      ('image,file_name,prompt\na.png,a.png,x\n', 'say where with --image-column'), ('image,prompt\na.png,x,y\n', 'row 1')])
def test_bad_tables(tmp_path, no_model, text, why):
    (tmp_path/'t.csv').write_text(text)
    with pytest.raises(InputError, match=why): llava_reward_score([], table=tmp_path/'t.csv', model=TINY)


@pytest.fixture
def checkpoint(tmp_path):
    "A copy of the alignment perspective, to be damaged."
    shutil.copytree(resolve_model(TINY)/'alignment', tmp_path/'m'/'alignment')
    shutil.copytree(resolve_model(TINY)/'base', tmp_path/'m'/'base')
    return tmp_path/'m'


def edit(path, **changes):
    "Change tensors of a safetensors file."
    save_file({k: f(v) if (f := next((f for s, f in changes.items() if s in k), None)) else v for k, v in load_file(path).items()}, path)


@pytest.mark.parametrize('fault,why', [
    (lambda m: (m/'alignment'/'head.safetensors').unlink(), 'head.safetensors: no such file'),
    (lambda m: (m/'alignment'/'adapter_config.json').unlink(), 'adapter_config.json: no such file'),
    (lambda m: (m/'base'/'config.json').unlink(), 'config.json'),
    (lambda m: (m/'base'/'tokenizer.json').unlink(), 'tokenizer.json'),
    (lambda m: (m/'base'/'model.safetensors').write_bytes((m/'base'/'model.safetensors').read_bytes()[:5000]), 'model.safetensors'),
    (lambda m: (m/'alignment'/'reward_config.json').write_text('{"loss"'), 'not JSON'),
    (lambda m: edit(m/'alignment'/'head.safetensors', value_head=lambda v: v[:, :-1].contiguous()), r'hidden size \d+ \(the width of value_head.weight\).* has hidden size \d+'),
    (lambda m: edit(m/'alignment'/'head.safetensors', W_q=lambda v: v*float('nan')), 'W_q.weight holds NaN'),
    (lambda m: edit(m/'base'/'model.safetensors', embed_tokens=lambda v: v+1), 'another base')])
def test_broken_checkpoints(home, checkpoint, fault, why):
    fault(checkpoint)
    with pytest.raises(CheckpointError, match=why): llava_reward_score(home/'circle.png', 'a red circle', model=checkpoint)


def test_folder_without_images(tmp_path, no_model):
    with pytest.raises(InputError, match='a folder without images'): llava_reward_score(tmp_path, 'a red circle', model=TINY)


# The terminal

def test_errors_are_one_line(home, tmp_path):
    code, out, err = run('llava_reward_score', home/'circle.png', home/'bad'/'cut.png', '--prompt', 'x', '--model', TINY, '--out', tmp_path/'o.csv')
    assert (code, out) == (1, '') and err.count('\n') == 1 and err.startswith('llava_reward_score: error: ') and 'cut.png: damaged' in err
    assert not list(tmp_path.iterdir())


def test_wrong_usage_exits_with_2():
    code, out, err = run('llava_reward_score', 'a.png', '--table', 't.csv')
    assert (code, out) == (2, '') and err == 'llava_reward_score: error: name images or folders, or a table with --table, not both (see llava_reward_score --help)\n'
    for f in llava_reward_score, llava_reward_compare, llava_reward_train:
        with pytest.raises(SystemExit) as e: f.parser().parse_args(['x', '--no-such'])
        assert e.value.code == 2
    with pytest.raises(UsageError, match='name images'): llava_reward_score([])
    with pytest.raises(UsageError, match='two or more'): llava_reward_compare('a.png')
    with pytest.raises(UsageError, match='--name'): llava_reward_train('r.jsonl')


@pytest.mark.parametrize('f', [llava_reward_score, llava_reward_compare, llava_reward_train, llava_reward_demo])
def test_help_teaches(f):
    text = f.parser().format_help()
    assert f'usage: {f.__name__}' in text and f'examples:\n  {f.__name__}' in text and '_bad' not in text


SLOW = '''
import sys, time
from pathlib import Path
from llava_reward_nb.commands.terminal import plain_errors, report
def slow(self, data): open(self, 'w').write('image,al'); print('writing', flush=True); time.sleep(100)
Path.write_bytes = slow
with plain_errors('score'): report([dict(image='a.png', alignment=1.)], sys.argv[1])
'''


@pytest.mark.parametrize('sign', [signal.SIGINT, signal.SIGKILL])
def test_interrupted_while_writing(tmp_path, sign):
    "What was there before is there after, whole."
    (tmp_path/'o.csv').write_text('old')
    p = start('', tmp_path/'o.csv', code=SLOW)
    while 'writing' not in p.stdout.readline(): assert p.poll() is None
    p.send_signal(sign)
    err = p.communicate(timeout=60)[1]
    assert (tmp_path/'o.csv').read_text() == 'old'
    if sign == signal.SIGINT: assert p.returncode == 130 and err == 'score: interrupted\n' and [f.name for f in tmp_path.iterdir()] == ['o.csv']


# Training and the demo

SMALL = dict(lora_rank=4, batch_size=4, accumulation=1, device='cpu')


def test_train_and_use(home, tmp_path):
    pairs = write_records(alignment_pairs(8, seed=1), tmp_path/'pairs')
    llava_reward_train(pairs, 'mine', tmp_path/'run', base=TINY, loss='gpm', eval=pairs, **SMALL)
    llava_reward_compare([home/'circle.png', home/'star.png'], 'a star', model=tmp_path/'run', out=tmp_path/'o.json')
    assert 0 <= read_table(tmp_path/'o.json')[0]['mine'] <= 1
    with pytest.raises(InputError, match='is there already'): llava_reward_train(pairs, 'mine', tmp_path/'run', base=TINY, **SMALL)


@pytest.mark.parametrize('change,kwargs,why', [
    (dict(chosen_path='none.png'), {}, 'record 3, chosen_path: no such file'), (dict(prompt=5), {}, 'record 3, prompt'), (dict(c_rate=0, r_rate=1), {}, 'record 3, c_rate'),
    ({}, dict(loss='cls'), "learn from pairs|'cls' from labels"), ({}, dict(loss='hinge'), "no loss is called 'hinge'"), ({}, dict(loss='gpm', dim=3), 'even count'),
    ({}, dict(name='a b'), "--name 'a b'"), ({}, dict(tau=0), 'tau is 0'), ({}, dict(eval='none.jsonl'), 'none.jsonl: no such file'), ({}, dict(base='./none'), 'no such folder')])
def test_bad_training_input(tmp_path, no_model, change, kwargs, why):
    pairs = write_records(alignment_pairs(4, seed=1), tmp_path/'pairs')
    rows = read_table(pairs)
    rows[3] |= change
    write_table(rows, pairs)
    with pytest.raises(ValueError, match=why): llava_reward_train(pairs, **{**dict(name='mine', out=tmp_path/'run', base=TINY), **SMALL, **kwargs})
    assert not (tmp_path/'run').exists()


def test_train_skips_bad_records(tmp_path, capsys):
    labels = write_records(safety_labels(8, seed=1), tmp_path/'labels')
    rows = read_table(labels)
    rows[2]['label'] = 'maybe'
    write_table(rows, labels)
    llava_reward_train(labels, 'mine', tmp_path/'run', base=TINY, skip_bad=True, **SMALL)
    said = capsys.readouterr()
    assert 'record 2, label' in said.err and '7 labels' in said.out and (tmp_path/'run'/'mine'/'head.safetensors').is_file()


def test_demo(tmp_path, capsys):
    llava_reward_demo(tmp_path/'demo', n=8, prompts=1)
    out = capsys.readouterr().out
    assert len(read_table(tmp_path/'demo'/'scores.csv')) == len(list((tmp_path/'demo'/'images').glob('*.png'))) == 49
    with Image.open(tmp_path/'demo'/'demo.png') as im: assert min(im.size) > 1000
    assert {r['perspective'] for r in read_table(tmp_path/'demo'/'accuracy.csv')} == set(NAMES) and 'never-trained' in out
