"Building the bundle, without training: what each builder puts there, and what it leaves alone."
import json, os, re, shutil, subprocess, sys, time

import pytest
from conftest import script
from project import LIB, ROOT

from llava_reward_nb.tiny.diffusion import build_diffusion
from llava_reward_nb.tiny.metrics import METRIC_STAGES, build_metrics

BUNDLE = ROOT/LIB/'bundle'


def lines(path): return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join(json.dumps(row)+'\n' for row in rows), encoding='utf-8')


def everything(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


@pytest.fixture
def out(tmp_path):
    "A bundle with pieces that no builder here makes."
    for name in 'log/signs.parquet', 'alignment/head.safetensors', 'README.md':
        (tmp_path/'bundle'/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/'bundle'/name).write_text('theirs')
    return tmp_path/'bundle'


def test_rivals_that_are_trained_and_measured_are_put_there(tmp_path, out):
    work = tmp_path/'work'
    for name in 'clip', 'hpsv2', 'imagereward': shutil.copytree(BUNDLE/name, work/name)
    for stage in METRIC_STAGES: write(work/f'{stage}.jsonl', [dict(stage=stage, step=1)])
    (work/'results').mkdir()
    for name, folder in dict(clipscore='clip', hpsv2='hpsv2', imagereward='imagereward', vqascore='base').items():
        (work/'results'/f'rival_{folder}.json').write_text(json.dumps([dict(reward=name)]))
    theirs = everything(out)
    for _ in range(2):  # a second call has nothing left to do
        build_metrics(work, out)
        now = everything(out)
        assert {k: now[k] for k in theirs} == theirs
        assert [r['stage'] for r in lines(out/'log/metrics.jsonl')] == list(METRIC_STAGES)
        assert [r['reward'] for r in lines(out/'log/metrics_accuracy.jsonl')] == ['clipscore', 'hpsv2', 'imagereward', 'vqascore']
        for name in 'clip', 'hpsv2', 'imagereward':
            assert {k: v for k, v in now.items() if k.startswith(f'{name}/')} == {f'{name}/{k}': v for k, v in everything(BUNDLE/name).items()}


def test_pipelines_that_are_trained_and_measured_are_put_there(tmp_path, out):
    work = tmp_path/'work'
    shutil.copytree(BUNDLE/'sd', work/'sd')
    shutil.copytree(BUNDLE/'sd'/'unet', work/'sd_early'/'unet')
    for stage in 'vae', 'unet', 'early': write(work/f'{stage}.jsonl', [dict(stage=stage, step=1)])
    (work/'results').mkdir()
    for name, folder in ('tiny', 'sd'), ('tiny-early', 'sd_early'):
        (work/'results'/f'{folder}.json').write_text(json.dumps([dict(pipeline=name)]))
    theirs = everything(out)
    build_diffusion(work, out)
    now = everything(out)
    assert {k: now[k] for k in theirs} == theirs and (out/'sd/model_index.json').is_file() and (out/'sd_early/unet/config.json').is_file()
    assert [r['pipeline'] for r in lines(out/'log/satisfaction.jsonl')] == ['tiny', 'tiny-early']


def test_one_command_calls_all_builders_in_order(monkeypatch, capsys):
    bundle, called = script(ROOT/'tools'/'bundle.py'), []
    assert [piece.__name__ for piece in bundle.PIECES] == ['base', 'rivals', 'pipelines', 'signs', 'table9', 'ablations', 'card']
    def stand_in(name):
        def piece(share): called.append((name, share))
        piece.__name__ = name
        return piece
    monkeypatch.setattr(bundle, 'PIECES', [stand_in(piece.__name__) for piece in bundle.PIECES])
    monkeypatch.setattr('sys.argv', ['bundle.py', '.01'])
    monkeypatch.chdir(ROOT)
    bundle.main()
    assert called == [(name, .01) for name in ('base', 'rivals', 'pipelines', 'signs', 'table9', 'ablations', 'card')]
    assert '== 7/7 card' in capsys.readouterr().out


def test_card_quotes_rivals_and_pipelines():
    text = (BUNDLE/'README.md').read_text(encoding='utf-8')
    for row in lines(BUNDLE/'log/metrics_accuracy.jsonl'):
        if row['kind'] != 'all': continue
        cells = next(t for t in text.splitlines() if t.startswith(f"| {row['reward']} | {row['pairs']} |")).split('|')
        shown = cells[3 if row['split'] == 'train' else 4]
        assert [float(x) for x in re.findall(r'\d\.\d+', shown)] == pytest.approx([row[k] for k in ('accuracy', 'low', 'high')], abs=6e-4)
    for row in lines(BUNDLE/'log/satisfaction.jsonl'):
        if row['category'] == 'mean': assert f"{row['satisfied']:.2f} of {row['n']}" in text


def test_card_names_the_seeds_of_the_builders():
    card = script(ROOT/'tools'/'card.py')
    sources = ''.join(p.read_text(encoding='utf-8') for p in (ROOT/'llava_reward_nb/tiny').glob('*.py'))
    for stage, (_, seed) in card.STAGES.items(): assert f"{stage}.pt', seed={seed})" in sources
    stages = {r['stage'] for name in ('training', 'metrics', 'diffusion') for r in lines(BUNDLE/f'log/{name}.jsonl') if r.get('seconds')}
    assert list(card.logged()) == list(card.STAGES) and stages <= set(card.STAGES)


def wait_for(event):
    "For minutes, if the machine is slow."
    for _ in range(1500):
        if event(): return
        time.sleep(.2)
    raise AssertionError('it did not happen')


def alive(pid):
    try: os.kill(pid, 0)
    except ProcessLookupError: return False
    return True


@pytest.mark.skipif(os.name != 'posix', reason='processes are killed by signal')
def test_workers_leave_when_their_parent_is_killed(tmp_path):
    code = f"""
import os, time
from llava_reward_nb.tiny.mllm import launch
def wait(folder):
    open(f'{{folder}}/{{os.getpid()}}', 'w').close()
    time.sleep(600)
if __name__ == '__main__': launch(wait, {str(tmp_path)!r})
"""
    (tmp_path/'job').mkdir()
    (tmp_path/'job'/'run.py').write_text(code)
    parent = subprocess.Popen([sys.executable, str(tmp_path/'job'/'run.py')])
    def workers(): return [int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()]
    wait_for(lambda: len(workers()) == 2)
    parent.kill()
    parent.wait()
    wait_for(lambda: not any(alive(pid) for pid in workers()))
