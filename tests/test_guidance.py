"Comparisons of guiding rewards: their tables, runs that go on after they were killed, and the command that steers."
import os, signal, subprocess, sys
from pathlib import Path

import diffusers, numpy as np, pandas as pd, pytest, torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from llava_reward_nb import commands, guidance
from llava_reward_nb.core import CheckpointError, read_table, write_table
from llava_reward_nb.evaluation import PARTICLE_FIELDS, panels, table9
from llava_reward_nb.guidance import compare_guidance, guidances, paired, rises
from llava_reward_nb.particles import SteeringError
from llava_reward_nb.steering import load_pipeline
from llava_reward_nb.tiny_diffusion import tiny_parts

torch.set_num_threads(1)
diffusers.utils.logging.set_verbosity_error()
PROMPTS = ['a red circle', 'two stars', 'a blue square', 'a star', 'a circle above a star']
FAST = dict(n_particles=2, num_inference_steps=4, steps=[1, 2], guidance_scale=2., potential='difference')


def bright(images, prompts): return torch.tensor([np.asarray(im, dtype=np.float32).mean()/255 for im in images])
def red(images, prompts): return torch.tensor([np.asarray(im, dtype=np.float32)[..., 0].mean()/255 for im in images])
bright.identity, red.identity = 'brightness', 'red channel'


@pytest.fixture(scope='session')
def folder(tmp_path_factory):
    "A pipeline with random weights, on disk."
    out = tmp_path_factory.mktemp('sd')/'random'
    StableDiffusionPipeline(**tiny_parts(), safety_checker=None, feature_extractor=None, requires_safety_checker=False).save_pretrained(out)
    return out


@pytest.fixture(scope='session')
def pipe(folder): return load_pipeline(folder, device='cpu')


def compared(pipe, out, prompts=PROMPTS, **kw):
    return compare_guidance(pipe, prompts, dict(bright=bright, red=red), out, **{**dict(lam=dict(bright=300., red=300.), **FAST), **kw})


def test_the_table_is_what_tables_and_panels_read(pipe, tmp_path, capsys):
    df = compared(pipe, tmp_path, seeds=(0, 1))
    assert list(df.columns) == [*PARTICLE_FIELDS, 'bright', 'red', 'image'] and len(df) == 5*2*2*5
    names = [g for *_, g in guidances(['fk', 'none', 'best-of-n'], ['bright', 'red'])]
    assert list(dict.fromkeys(df.guidance)) == names == ['none', 'best-of-n by bright', 'best-of-n by red', 'FK by bright', 'FK by red']
    none, fk = (df[df.guidance == g].reset_index(drop=True) for g in ('none', 'FK by bright'))
    assert none.guidance_score.isna().all() and (fk.guidance_score == fk.bright).all()
    assert fk.bright.mean() > none.bright.mean()
    t = table9(tmp_path/'scores.parquet')
    first = none[none.particle == 0].bright.mean()
    best = df[df.guidance == 'best-of-n by bright'].groupby(['prompt', 'seed']).bright.max().mean()
    got = t.df['best particle', 'bright'].droplevel([0, 1])
    assert got['none'] == pytest.approx(first, abs=1e-6) and got['best-of-n by bright'] == pytest.approx(best, abs=1e-6)
    assert len(panels(tmp_path/'scores.parquet', PROMPTS[:2]).axes) == 2*5
    commands.llava_reward_table('table9', [str(tmp_path/'scores.parquet')], intervals=True)
    assert 'FK by red' in capsys.readouterr().out
    d = paired(df, [('FK by bright', 'none'), ('best-of-n by bright', 'none')], ['bright'])
    assert (d.difference > 0).all() and (d.prompts == 5).all() and d.low.isna().all() and (d.p > .05).all() # five prompts decide nothing
    assert rises(df).loc['FK by bright', 'bright'] > 0


def test_neighbours_do_not_matter(pipe, tmp_path):
    "One prompt at a time, all at once, in another order: the same images."
    a, b = compared(pipe, tmp_path/'a', batch_prompts=1), compared(pipe, tmp_path/'b', PROMPTS[::-1], batch_prompts=5)
    key = ['prompt', 'guidance', 'particle']
    a, b = (d.sort_values(key) for d in (a, b))
    for x, y in zip(a.image, b.image):
        x, y = (np.asarray(Image.open(f), dtype=int) for f in (x, y))
        assert abs(x-y).max() <= 2


def test_lost_rows_are_made_again(pipe, tmp_path, monkeypatch):
    whole = compared(pipe, tmp_path, PROMPTS[:3])
    table = pd.DataFrame(read_table(tmp_path/'scores.parquet'))
    write_table(table[~((table.prompt == PROMPTS[1]) & (table.guidance == 'FK by red'))], tmp_path/'scores.parquet')
    seen, fk_steer = [], guidance.fk_steer
    monkeypatch.setattr(guidance, 'fk_steer', lambda pipe, prompts, *a, **k: (seen.append(prompts), fk_steer(pipe, prompts, *a, **k))[1])
    again = compared(pipe, tmp_path, PROMPTS[:3])
    assert seen == [[PROMPTS[1]]]
    np.testing.assert_allclose(again.red, whole.red, atol=.01)
    more = compared(pipe, tmp_path, PROMPTS[:4], seeds=(0, 1))
    assert len(more) == 4*2*2*5 and more[(more.seed == 0) & more.prompt.isin(PROMPTS[:3])].red.reset_index(drop=True).equals(again.red)


def test_what_cannot_be_compared(pipe, tmp_path):
    compared(pipe, tmp_path, PROMPTS[:1])
    for kw, says in ((dict(n_particles=3), 'n_particles: 2 there, 3 asked for'), (dict(lam=dict(bright=300., red=1.)), 'lam.red'), (dict(metrics=dict(other=red)), 'metrics.other'),
                     (dict(prompt_set='x'), 'prompt_set'), (dict(lam=dict(red=1.)), 'no lam for bright'), (dict(ways=('FK',)), "called 'FK'")):
        with pytest.raises(SteeringError, match=says): compared(pipe, tmp_path, PROMPTS[:1], **kw)
    for prompts, says in (([], 'non-empty'), ('a star', 'list'), (['a', 'a'], 'twice'), (['a', ''], 'non-empty')):
        with pytest.raises(SteeringError, match=says): compared(pipe, tmp_path/'new', prompts)
    assert not (tmp_path/'new').exists()


def args(folder, out, *more):
    return [*PROMPTS, '--model', folder, '--reward', 'tiny/alignment', '--held-out', 'checker', '--n-particles', '2', '--steps', '6', '--batch-prompts', '1', '--device', 'cpu', '--out', out, *more]


def start(*a, first=''):
    "The command in a process of its own, as the console script starts it, after the code `first`."
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'} | dict(HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1', PYTHONPATH=str(Path(commands.__file__).parent.parent))
    return subprocess.Popen([sys.executable, '-c', f'{first}\nfrom llava_reward_nb.commands import llava_reward_steer\nllava_reward_steer()', *map(str, a)], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


DIES = """
import os, signal
from llava_reward_nb import guidance
write = guidance.write_table
def once(*args):
    write(*args)
    os.kill(os.getpid(), signal.SIGKILL)
guidance.write_table = once
"""


def test_killed_command_goes_on(folder, tmp_path):
    "SIGKILL after the first scores are written; the same command finishes with the images and scores of a run that was left alone."
    p = start(*args(folder, tmp_path/'cut'), first=DIES)
    p.communicate(timeout=500)
    assert p.returncode == -signal.SIGKILL
    before = len(read_table(tmp_path/'cut'/'scores.parquet'))
    assert 0 < before < 2*len(PROMPTS)
    for name in ('cut', 'whole'):
        q = start(*args(folder, tmp_path/name))
        out, err = q.communicate(timeout=500)
        assert q.returncode == 0, err
        assert 'FK by tiny/alignment' in out and (tmp_path/name/'panels.png').exists() and len(list((tmp_path/name/'best').iterdir())) == len(PROMPTS)
    cut, whole = (pd.DataFrame(read_table(tmp_path/n/'scores.parquet')) for n in ('cut', 'whole'))
    assert len(cut) == len(whole) == 2*len(PROMPTS)
    np.testing.assert_allclose(cut['tiny/alignment'], whole['tiny/alignment'], atol=.02)
    for n in sorted(f.name for f in (tmp_path/'whole'/'images').iterdir()):
        x, y = (np.asarray(Image.open(tmp_path/k/'images'/n), dtype=int) for k in ('cut', 'whole'))
        assert abs(x-y).max() <= 2


@pytest.mark.parametrize('change,error,says', [
    (dict(n_particles=1), SteeringError, 'at least 2'), (dict(potential='min'), SteeringError, 'potential'), (dict(method='fkd'), ValueError, '--method'),
    (dict(reward=['imagreward']), ValueError, 'did you mean'), (dict(reward=['tiny'], held_out=['tiny']), ValueError, 'named twice'), (dict(steps=0), ValueError, '--steps'),
    (dict(model='no/such/pipeline'), CheckpointError, 'no such folder'), (dict(prompts=['none.txt']), ValueError, 'no such file'), (dict(prompts=[' ']), ValueError, 'no prompt'),
    (dict(prompts=['a cat'], held_out=['checker']), ValueError, 'checker'), (dict(device='gpu9'), ValueError, '--device')])
def test_mistakes_are_found_before_the_run(tmp_path, change, error, says):
    with pytest.raises(error, match=says): commands.llava_reward_steer(**{**dict(prompts=['a star'], out=str(tmp_path/'x')), **change})
    assert not (tmp_path/'x').exists()
