"Comparisons of guiding rewards: their tables, runs that go on after they were killed, and the command that steers."
import os, signal, subprocess, sys, time, warnings, zlib
from pathlib import Path
from types import SimpleNamespace

import diffusers, numpy as np, pandas as pd, pytest, torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from llava_reward_nb.commands import evaluate as commands
from llava_reward_nb.commands.steer import llava_reward_steer

from llava_reward_nb.tiny import guidance

from llava_reward_nb import store
from llava_reward_nb.core import CheckpointError, InputError
from llava_reward_nb.files import read_table, write_table
from llava_reward_nb.evaluation.runs import PARTICLE_FIELDS
from llava_reward_nb.evaluation.report import panels, table9
from llava_reward_nb.tiny.guidance import compare_guidance, guidances, paired, rises
from llava_reward_nb.steering.particles import SteeringError
from llava_reward_nb.steering.pipelines import load_pipeline
from llava_reward_nb.store import make_identity
from llava_reward_nb.tiny.diffusion import tiny_parts

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


# ---- what made a comparison, and who else is at it: with a sampler that costs nothing

def paint(prompt, seed, way, j, size=8):
    rng = np.random.default_rng(zlib.crc32(f'{prompt} {seed} {way} {j}'.encode()))
    return Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8))


def sampler(pipe, prompts, reward, seed=0, method='fk', n_particles=2, lam=10., **kw):
    "In place of `fk_steer`: noise that depends on prompt, seed and method alone."
    return SimpleNamespace(images=[[paint(p, seed, method if method == 'best-of-n' else getattr(reward, '__name__', ''), j) for j in range(n_particles)] for p in prompts])


class Weighted(torch.nn.Module):
    def __init__(self, w): super().__init__(); self.l = torch.nn.Linear(1, 1, bias=False); self.l.weight.data[:] = w; self.seen = 0
    @property
    def identity(self): return make_identity('Weighted', {}, self)
    def forward(self, images, prompts): self.seen += len(images); return bright(images, prompts)*self.l.weight.item()


@pytest.fixture
def quick(monkeypatch):
    "`compare_guidance` of a pipeline of one weight with the sampler above; `asked` lists what was sampled."
    asked = []
    def watched(pipe, prompts, reward, **kw): asked.append(list(prompts)); return sampler(pipe, prompts, reward, **kw)
    monkeypatch.setattr(guidance, 'fk_steer', watched)
    def go(out, prompts=PROMPTS, rewards=None, pipe=None, **kw):
        return compare_guidance(pipe or fake_pipe(), prompts, rewards or dict(bright=bright, red=red), out, **{**dict(lam=300., n_particles=2), **kw})
    go.asked = asked
    return go


def fake_pipe(w=1., **config):
    scheduler = diffusers.DDIMScheduler(**config)
    return SimpleNamespace(components=dict(unet=Weighted(w), scheduler=scheduler, none=None), scheduler=scheduler)


def test_what_made_a_comparison_may_not_change(quick, tmp_path, monkeypatch):
    go = lambda **kw: quick(tmp_path, **{**dict(rewards=dict(w=Weighted(1.)), metrics=dict(m=Weighted(5.)), negative_prompt='blue', extra=None), **kw})
    go(); n = len(quick.asked); go(); assert len(quick.asked) == n # all loaded again: the same
    for kw, says in ((dict(pipe=fake_pipe(1.0001)), 'pipeline'), (dict(pipe=fake_pipe(prediction_type='v_prediction')), 'pipeline'), (dict(rewards=dict(w=Weighted(1.0001))), 'rewards.w'),
                     (dict(metrics=dict(m=Weighted(6.))), 'metrics.m'), (dict(negative_prompt='red'), 'negative_prompt'), (dict(extra=lambda x: x), 'extra'), (dict(guidance_scale=3.), 'guidance_scale')):
        with pytest.raises(SteeringError, match=f'other settings.*{says}'): go(**kw)
    monkeypatch.setattr(store, '__version__', '99')
    with pytest.raises(SteeringError, match='pipeline.*rewards.w'): go()
    assert len(quick.asked) == n


def test_an_argument_that_nobody_can_compare(quick, tmp_path):
    quick(tmp_path, PROMPTS[:1], decode=lambda z: z)
    with pytest.raises(SteeringError, match='decode: function without identity'): quick(tmp_path, PROMPTS[:1], decode=lambda z: z)


def test_a_reward_without_identity_goes_on_with_nothing(quick, tmp_path):
    f = lambda images, prompts: bright(images, prompts)
    for where, kw in (('guides', dict(rewards=dict(f=f))), ('judges', dict(metrics=dict(f=f)))):
        assert len(quick(tmp_path/where, PROMPTS[:1], **kw))
        with pytest.raises(SteeringError, match="nobody knows whether 'f' is the reward"): quick(tmp_path/where, PROMPTS[:1], **kw)


@pytest.mark.parametrize('kw,says', [
    (dict(metrics=dict(reward=red)), "'reward' is the name of a column"), (dict(rewards=dict(prompt=red)), "'prompt' is the name of a column"), (dict(metrics=dict(bright=red)), "'bright' names a reward and another"),
    (dict(negative_prompt=['a']*5), 'negative_prompt: a comparison needs one value'), (dict(latents=torch.zeros(2)), 'latents: a comparison needs'), (dict(prompt_embeds=np.zeros(2)), 'prompt_embeds: a comparison')])
def test_collisions_and_lists_are_refused(quick, tmp_path, kw, says):
    with pytest.raises(ValueError, match=says): quick(tmp_path/'x', **kw)
    assert not (tmp_path/'x').exists() and not quick.asked


def test_images_that_changed_on_disk(quick, tmp_path):
    before = quick(tmp_path, seeds=(0, 1))
    n = len(quick.asked)
    fk, none = before[(before.guidance == 'FK by red') & (before.prompt == PROMPTS[1])].iloc[0], before[(before.guidance == 'none') & (before.prompt == PROMPTS[2])].iloc[0]
    Image.new('RGB', (8, 8), 'white').save(fk.image); Path(none.image).unlink()
    with pytest.warns(UserWarning, match='2 images are not what they were'): after = quick(tmp_path, seeds=(0, 1))
    assert quick.asked[n:] == [[PROMPTS[2]], [PROMPTS[1]]]
    pd.testing.assert_frame_equal(after, before); assert Image.open(fk.image).getpixel((0, 0)) != (255, 255, 255) and Path(none.image).is_file()
    Path(none.image).write_bytes(b'no image')
    with pytest.warns(UserWarning, match='1 images are not'): quick(tmp_path, seeds=(0, 1))
    with warnings.catch_warnings(): warnings.simplefilter('error'); quick(tmp_path, seeds=(0, 1))


def test_rewards_whose_names_look_alike_keep_their_images(quick, tmp_path):
    f = lambda w: Weighted(w)
    long = 'runs/a-very-long-name-of-a-folder-that-goes-on/'
    df = quick(tmp_path, PROMPTS[:2], rewards={n: f(i+1.) for i, n in enumerate(('a b', 'a-b', 'A B', long+'x', long+'y'))}, ways=('none', 'fk'))
    assert df.image.str.lower().nunique() == len(df) == len(list((tmp_path/'images').glob('*.png')))


def test_a_judge_that_stumbles_leaves_a_gap(quick, tmp_path):
    class Odd:
        identity = 'odd'
        def __init__(self, bad): self.bad = bad
        def __call__(self, images, prompts):
            if PROMPTS[1] in prompts and isinstance(self.bad, type): raise self.bad('this one')
            return torch.tensor([self.bad if p == PROMPTS[1] else 1. for p in prompts])
    for i, bad in enumerate((ValueError, KeyError, float('inf'), float('nan'))):
        with pytest.warns(UserWarning, match='4 scores are missing.*odd'): df = quick(tmp_path/str(i), metrics=dict(odd=Odd(bad)), ways=('none', 'fk'), rewards=dict(bright=bright))
        assert df.odd.isna().sum() == 4 and df.bright.notna().all()
        assert any('odd: 4 of 20 particles' in n for n in table9(df).notes)
    class Broken:
        identity = 'broken'
        def __call__(self, images, prompts): return images.not_there
    with pytest.raises(InputError, match="'broken' fails on everything"): quick(tmp_path/'x', metrics=dict(broken=Broken()))


def test_infinite_scores_rise_nowhere(quick, tmp_path):
    df = quick(tmp_path); bad = df.copy(); bad.loc[3, 'red'] = np.inf
    lost = df.copy(); lost.loc[3, 'red'] = np.nan
    pd.testing.assert_frame_equal(rises(bad), rises(lost)); assert np.isfinite(rises(bad).to_numpy()).all()
    pair = [('FK by red', 'none')]
    pd.testing.assert_frame_equal(paired(bad, pair), paired(lost, pair))


def test_interrupted_comparison_keeps_what_is_done(quick, tmp_path, monkeypatch):
    calls = []
    def tired(pipe, prompts, reward, **kw):
        calls.append(prompts)
        if len(calls) > 3: raise KeyboardInterrupt
        return sampler(pipe, prompts, reward, **kw)
    monkeypatch.setattr(guidance, 'fk_steer', tired)
    with pytest.raises(KeyboardInterrupt): quick(tmp_path, batch_prompts=2)
    assert len(read_table(tmp_path/'scores.parquet')) == 2*2*5 # the first two prompts: unsteered (three guidances), and steered by each reward
    monkeypatch.setattr(guidance, 'fk_steer', sampler)
    pd.testing.assert_frame_equal(quick(tmp_path, batch_prompts=2), quick(tmp_path/'whole', batch_prompts=5).assign(image=lambda d: d.image.str.replace('/whole/', '/')))


BESIDE = """
import sys, time
sys.path.insert(0, sys.argv[2])
import test_guidance as t
from llava_reward_nb.tiny import guidance
def slow(*a, **k): time.sleep(.05); return t.sampler(*a, **k)
guidance.fk_steer = slow
guidance.compare_guidance(t.fake_pipe(), t.PROMPTS[:3]+['a circle'], dict(bright=t.bright, red=t.red), sys.argv[1], lam=300., n_particles=2, batch_prompts=1, seeds=(0, 1))
"""


def test_two_comparisons_in_one_folder(tmp_path, monkeypatch):
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'} | dict(HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1', PYTHONPATH=str(Path(commands.__file__).parents[2]))
    p = subprocess.Popen([sys.executable, '-c', BESIDE, str(tmp_path), str(Path(__file__).parent)], env=env)
    def slow(*a, **k): time.sleep(.05); return sampler(*a, **k)
    monkeypatch.setattr(guidance, 'fk_steer', slow)
    while not (tmp_path/'scores.parquet').exists() and p.poll() is None: time.sleep(.01)
    go = lambda prompts: compare_guidance(fake_pipe(), prompts, dict(bright=bright, red=red), tmp_path, lam=300., n_particles=2, batch_prompts=1, seeds=(1, 0))
    go(PROMPTS[2::-1]+['a square'])
    assert p.wait(timeout=300) == 0
    df = pd.DataFrame(read_table(tmp_path/'scores.parquet'))
    assert len(df) == 5*2*2*5 and not df.duplicated(['seed', 'prompt', 'guidance', 'particle']).any()
    monkeypatch.setattr(guidance, 'fk_steer', None) # nothing is left to sample, and all images are those that were scored
    with warnings.catch_warnings(): warnings.simplefilter('error'); assert len(go(PROMPTS[:3]+['a square', 'a circle'])) == len(df)


# ---- the command

def args(folder, out, *more):
    return [*PROMPTS, '--model', folder, '--reward', 'tiny/alignment', '--held-out', 'checker', '--n-particles', '2', '--steps', '6', '--batch-prompts', '1', '--device', 'cpu', '--out', out, *more]


def start(*a, first=''):
    "The command in a process of its own, as the console script starts it, after the code `first`."
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'} | dict(HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1', PYTHONPATH=str(Path(commands.__file__).parents[2]))
    return subprocess.Popen([sys.executable, '-c', f'{first}\nfrom llava_reward_nb.commands.steer import llava_reward_steer\nllava_reward_steer()', *map(str, a)], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


DIES = """
import os, signal
from llava_reward_nb.tiny import guidance
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
    with pytest.raises(error, match=says): llava_reward_steer(**{**dict(prompts=['a star'], out=str(tmp_path/'x')), **change})
    assert not (tmp_path/'x').exists()
