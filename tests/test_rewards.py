"Every name loads what it says; several rewards in one pass; LLaVA-Reward with gradients to the pixels."
import gc, json, os, shutil, subprocess, sys, weakref
from importlib import import_module
from pathlib import Path

import numpy as np, pytest, torch
from metrics import checkpoints
from PIL import Image
from torch.testing import assert_close

from llava_reward_nb.rewards import registry as module
from llava_reward_nb.core import CheckpointError, InputError, Reward
from llava_reward_nb.weights import MODELS
from llava_reward_nb.model import RewardModel
from llava_reward_nb.rewards.registry import REWARDS, SHORT, load_reward
from llava_reward_nb.rewards.llava import LLaVAReward
from llava_reward_nb.backbones import hd_pixels
from llava_reward_nb.rewards.combine import score_all
from llava_reward_nb.shapes.world import render
from llava_reward_nb.shapes.checker import Checker
from llava_reward_nb.shapes.records import alignment_pairs
from llava_reward_nb.shapes.prompts import parse_prompt
from llava_reward_nb.shapes.scenes import scene_for

NAMES = ['clipscore', 'pickscore', 'hpsv2', 'hpsv2.1', 'imagereward', 'vqascore', 'vqascore-xl', 'pyes', 'hpsv3', 'aesthetic', 'grader', 'ocr', 'nudenet', 'jpeg', 'checker', 'llava-reward']


def scene(text, seed=1): return render(scene_for(parse_prompt(text), np.random.default_rng(seed), distractors=False))


def tensor_of(im): return torch.from_numpy(np.array(im.convert('RGB'))).permute(2, 0, 1)[None].float()/255


@pytest.fixture(scope='module')
def tiny(): return load_reward('tiny', device='cpu')


@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
    "Files and prompts of six pairs."
    out, rows = tmp_path_factory.mktemp('pairs'), alignment_pairs(6, seed=0)
    paths, texts = [], []
    for i, r in enumerate(rows):
        for k in 'chosen_path', 'reject_path':
            paths.append(out/f'{i}_{k}.png')
            r[k].save(paths[-1])
            texts.append(r['prompt'])
    return paths, texts


# --- importing -----------------------------------------------------------------------------------------------------------

def test_imports_are_light():
    "Neither the package nor the registry and the grader import what only some rewards, tables and pictures need."
    code = ("import sys, llava_reward_nb; a = list(sys.modules)\nimport llava_reward_nb.rewards.grader, llava_reward_nb.rewards.registry\n"
            "print([m for m in ('openai','pandas','matplotlib','diffusers') if m in sys.modules], 'torch' in a)")
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(Path(module.__file__).parents[2])})
    assert done.stdout.strip() == '[] False', done.stdout+done.stderr


# --- names ---------------------------------------------------------------------------------------------------------------

def test_registry_has_the_names(): assert sorted(REWARDS) == sorted(NAMES)


def test_every_loader_exists_and_knows_its_default(monkeypatch):
    "Each name finds its class and hands on id, device, dtype and options."
    weighted = {n: e for n, e in REWARDS.items() if n not in ('checker', 'llava-reward')}
    found = {n: getattr(import_module(f'llava_reward_nb.rewards.{e.load.args[0]}'), e.load.args[1]) for n, e in weighted.items()}
    assert all(isinstance(c.name, str) and isinstance(c.range, str) for c in found.values())
    for name, entry in weighted.items():
        got = []
        class Fake:
            @classmethod
            def from_pretrained(c, id, **kw): got.append((id, kw)); return lambda images, prompts: 0
        monkeypatch.setattr(f'llava_reward_nb.rewards.{entry.load.args[0]}.{entry.load.args[1]}', Fake)
        load_reward(name, device='cpu', dtype=torch.float32, extra=1)
        load_reward(f'{name}:some/where:else')
        fixed = entry.load.keywords
        assert got == [(entry.default, dict(device='cpu', dtype=torch.float32, extra=1, **fixed)), ('some/where:else', dict(device=None, dtype=None, **fixed))]


@pytest.fixture(scope='module')
def toys(tmp_path_factory):
    "Toy checkpoints in the published layouts, for those names that have them."
    out = tmp_path_factory.mktemp('toys')
    checkpoints(out, 'clip', 'pickscore', 'hpsv2', 'imagereward', 'clip_flant5')
    return out


@pytest.mark.parametrize('name', ['clipscore', 'pickscore', 'hpsv2.1', 'imagereward', 'vqascore', 'vqascore-xl'])
def test_names_load_published_layouts(toys, pairs, name):
    "The same toy checkpoint by name gives a reward with that name, a range, and n float32 scores, whatever the batch."
    folder = toys/{'clipscore': 'clip', 'hpsv2.1': 'hpsv2', 'vqascore': 'clip_flant5', 'vqascore-xl': 'clip_flant5'}.get(name, name)
    r = load_reward(f'{name}:{folder}', device='cpu', dtype=torch.float32)
    assert r.name == name and isinstance(r.range, str) and isinstance(r, Reward)
    paths, texts = pairs
    scores = r(paths[:4], texts[:4])
    assert scores.shape == (4,) and scores.dtype == torch.float32 and scores.device.type == 'cpu' and scores.isfinite().all()
    assert_close(r(paths[:4], texts[:4], batch_size=1), scores, atol=1e-5, rtol=1e-5)
    x = torch.cat([tensor_of(Image.open(p)) for p in paths[:2]]).requires_grad_()
    r.score_pixels(x, texts[:2]).sum().backward()
    assert x.grad.isfinite().all() and (x.grad.abs().sum((1, 2, 3)) > 0).all()


def test_llava_reward_specs(tmp_path):
    for spec, perspective in [('tiny', 'overall_bt'), ('tiny/fidelity', 'fidelity'), ('llava-reward:tiny', 'overall_bt'),
                              ('llava-reward:tiny/safety', 'safety'), (MODELS['tiny']/'alignment', 'alignment'), (str(MODELS['tiny']/'safety'), 'safety')]:
        r = load_reward(spec, device='cpu')
        assert isinstance(r, LLaVAReward) and r.perspective == perspective and list(r.model.configs) == [perspective]
    one = tmp_path/'one'                          # a folder with a single perspective and its base needs no name
    shutil.copytree(MODELS['tiny']/'base', one/'base')
    shutil.copytree(MODELS['tiny']/'alignment', one/'mine')
    assert load_reward(one, device='cpu').perspective == 'mine'


def test_short_names_are_specs():
    for short, spec in SHORT.items(): assert spec.split(':')[0] in REWARDS and Path(spec.split(':', 1)[1]).name in (short.removeprefix('tiny-'), 'tiny', 'base')


def test_callables_come_back_as_they_are():
    f = lambda images, prompts: torch.zeros(len(images))
    assert load_reward(f) is f and isinstance(load_reward('checker'), Checker) and load_reward('checker').name == 'checker'


@pytest.mark.parametrize('spec, says', [
    ('imagereword', "did you mean 'imagereward'"), ('owner/name', "'llava-reward:owner/name'"), ('', 'there are tiny'), ('/no/such', 'there are tiny'),
    ('tiny/overall', 'cannot score one'), ('tiny/beauty', "no perspective 'beauty'"), (MODELS['tiny'], 'name one'), ('checker:x', 'no model to load')])
def test_bad_specs(spec, says):
    with pytest.raises(ValueError, match=says): load_reward(spec, device='cpu')


def test_folders_that_are_no_reward(tmp_path):
    with pytest.raises(ValueError, match='is no reward'): load_reward(tmp_path)
    (tmp_path/'reward_config.json').write_text('{')
    with pytest.raises(CheckpointError, match='not JSON'): load_reward(tmp_path, device='cpu')
    (tmp_path/'reward_config.json').write_text(json.dumps(dict(loss='bt')))
    with pytest.raises(CheckpointError, match='does not say which base'): load_reward(tmp_path, device='cpu')


# --- the common face ---------------------------------------------------------------------------------------------------------

def test_face_is_the_perspective(pairs):
    "One model with all perspectives behind several faces: each scores by its own, and the active one stays."
    rm = RewardModel.from_pretrained('tiny', device='cpu').set_perspective('safety')
    paths, texts = pairs
    for name in 'alignment', 'fidelity', 'overall_bt', 'safety':
        r = LLaVAReward(rm, name)
        assert_close(r(paths[:3], texts[:3]), rm.score(paths[:3], texts[:3], name))
        assert rm.active == 'safety'
    assert LLaVAReward(rm).perspective == 'safety' and 'label 1' in LLaVAReward(rm).range
    with pytest.raises(ValueError, match='compares two images'): LLaVAReward(rm, 'overall')


# --- gradients to the pixels -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('num_crops', [1, 4])
@pytest.mark.parametrize('size', [(64, 64), (100, 40), (40, 100), (333, 500)])
def test_pixels_score_like_files(size, num_crops):
    "The tensor path is the PIL path but for rounding to bytes: same tokens, crops within two steps of 255, near scores."
    r = load_reward('tiny/alignment', device='cpu', num_crops=num_crops)
    ims = [scene('a photo of a red circle').resize(size), scene('a photo of a blue star').resize(size)]
    texts = ['a photo of a red circle', 'a photo of two squares']
    b = r.model.backbone
    want, got = b.encode(ims, texts), b.encode_pixels(torch.cat([tensor_of(i) for i in ims]), texts)
    assert want.keys() == got.keys()
    for k in 'input_ids', 'attention_mask', 'image_sizes': assert torch.equal(want[k], got[k])
    assert_close(got['pixel_values'], want['pixel_values'], atol=2/255/.26, rtol=0)
    with torch.no_grad(): scores = r.score_pixels(torch.cat([tensor_of(i) for i in ims]), texts)
    assert_close(scores, r(ims, texts), atol=.05, rtol=0)


def test_pixels_are_exact_where_nothing_is_resized(tiny):
    "An image of just the tile's size takes no resize, so nothing is rounded."
    ims = [scene(t) for t in ('a photo of a red circle', 'a photo of a blue star')]
    with torch.no_grad(): got = tiny.score_pixels(torch.cat([tensor_of(i) for i in ims]), 'a photo of a red circle')
    assert_close(got, tiny(ims, 'a photo of a red circle'), atol=1e-5, rtol=1e-5)


def test_padding_is_white():
    x = hd_pixels(torch.zeros(1, 3, 20, 64), 4, 64)
    assert x.shape == (1, 3, 64, 192) and set(x.unique().tolist()) == {0., 1.} and (x[..., 0] == x[..., -1]).all()


@pytest.mark.parametrize('size', [(64, 64), (50, 120)])
def test_gradient_is_the_slope(tiny, size):
    "Central differences along random directions, in the same float32 model."
    torch.manual_seed(0)
    x = torch.rand(1, 3, *size).requires_grad_()
    s = tiny.score_pixels(x, 'a photo of a green star')
    g, = torch.autograd.grad(s.sum(), x)
    d = g.sign()                                   # the steepest one is least troubled by rounding
    with torch.no_grad(): up, down = (tiny.score_pixels(x+e*d, 'a photo of a green star') for e in (2e-4, -2e-4))
    assert_close(((up-down)/4e-4).item(), (g*d).sum().item(), rtol=.03, atol=0)


def test_gradient_ascent_raises_the_score(tiny):
    "Forty steps along the gradient lift a blue square above a red circle, also when read back from bytes; a step against it lowers the score."
    prompt, start = 'a photo of a red circle', scene('a photo of a blue square')
    x = tensor_of(start)
    grad = lambda: torch.autograd.grad(tiny.score_pixels(x.requires_grad_(), prompt).sum(), x)[0].sign()
    with torch.no_grad(): s0 = tiny.score_pixels(x, prompt)
    worse = (x-2/255*grad()).clamp(0, 1).detach()
    for _ in range(40): x = (x+8/255*grad()).clamp(0, 1).detach()
    bytes_ = Image.fromarray((x[0]*255).round().byte().permute(1, 2, 0).numpy())
    with torch.no_grad(): assert tiny.score_pixels(worse, prompt) < s0
    assert tiny(bytes_, prompt) > tiny(scene(prompt), prompt) > s0


def test_scoring_pixels_leaves_no_trace():
    rm = RewardModel.from_pretrained('tiny', device='cpu').set_perspective('fidelity').train()
    before = {n: p.requires_grad for n, p in rm.named_parameters()}
    r = LLaVAReward(rm, 'alignment')
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    one, two = r.score_pixels(x, 'a photo of a star'), r.score_pixels(x, 'a photo of a star')
    assert torch.equal(one, two)                   # dropout was off
    one.sum().backward()
    assert rm.training and rm.active == 'fidelity' and {n: p.requires_grad for n, p in rm.named_parameters()} == before
    assert all(p.grad is None for p in rm.parameters()) and x.grad.abs().sum() > 0


def test_pixels_do_not_depend_on_their_neighbours(tiny):
    x = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    texts = ['a photo of a star', 'a photo of a red circle left of a blue square', 'a photo of two green triangles']
    together = tiny.score_pixels(x, texts)
    alone = torch.cat([tiny.score_pixels(x[i:i+1], texts[i]) for i in range(3)])
    assert_close(together, alone, atol=1e-5, rtol=1e-5)
    g, = torch.autograd.grad(together[1], x)
    assert g[1].abs().sum() > 0 and g[[0, 2]].abs().sum() == 0


@pytest.mark.parametrize('bad, says', [
    ([1], 'pixels'), (torch.zeros(3, 8, 8), r'\(3, 8, 8\)'), (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 'uint8'), (torch.zeros(0, 3, 8, 8), r'\(0, 3, 8, 8\)'),
    (torch.full((1, 3, 8, 8), -1.), 'x/2'), (torch.full((1, 3, 8, 8), torch.nan), 'overflowed'), (torch.zeros(1, 3, 1, 4000), 'too thin')])
def test_bad_pixels(tiny, bad, says):
    with pytest.raises(InputError, match=says): tiny.score_pixels(bad, 'x')


# --- several rewards ------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def opened(monkeypatch):
    "The files that Pillow opens."
    seen, real = [], Image.open
    monkeypatch.setattr(Image, 'open', lambda p, *a, **kw: (seen.append(Path(getattr(p, 'name', p)).name), real(p, *a, **kw))[1])
    return seen


def brightness(images, prompts): return torch.tensor([float(np.asarray(im.convert('L'), np.float64).mean()) for im in images])


def test_images_are_decoded_once(pairs, opened, tiny):
    "Three rewards over a list in which each file occurs twice, far apart: every file is opened once."
    paths, texts = pairs
    df = score_all(dict(tiny=tiny, checker=load_reward('checker'), brightness=brightness), paths+paths[::-1], texts+texts[::-1], batch_size=5, progress=False)
    assert sorted(opened) == sorted(p.name for p in paths)
    np.testing.assert_allclose(df[:12], df[12:][::-1], atol=1e-5)


def test_columns_are_what_each_reward_says(pairs, tiny):
    paths, texts = pairs
    rewards = dict(b=brightness, tiny=tiny, a=load_reward('checker'))
    df = score_all(rewards, paths, texts, batch_size=7)
    assert list(df) == ['b', 'tiny', 'a'] and list(df.index) == list(range(12)) and df.attrs['failed'] == []
    ims = [Image.open(p) for p in paths]
    for n, r in rewards.items(): np.testing.assert_allclose(df[n], r(ims, texts), atol=1e-5, rtol=1e-5)
    assert (df.a[::2].to_numpy() > df.a[1::2].to_numpy()).all()


def test_one_image_and_tensors(tiny):
    im = scene('a photo of a red circle')
    for images in (im, [im], tensor_of(im), tensor_of(im)[0]):
        df = score_all(dict(tiny=tiny), images, 'a photo of a red circle')
        assert df.shape == (1, 1)
        np.testing.assert_allclose(df.tiny, tiny(im, 'a photo of a red circle'), atol=1e-5)


def test_batches_hold_few_images_open(pairs):
    "Never more than two batches are alive."
    alive, most = [], []
    def watch(images, prompts):
        alive.extend(map(weakref.ref, images))
        gc.collect()
        most.append(sum(r() is not None for r in alive))
        return torch.zeros(len(images))
    paths, texts = pairs
    score_all(dict(watch=watch), paths, texts, batch_size=2)
    assert len(most) == 6 and max(most) <= 4


def test_images_that_do_not_open(pairs, tmp_path):
    "Empty, cut off, not an image, missing: each keeps its row, named and counted; the others are scored."
    paths, texts = pairs
    whole = paths[0].read_bytes()
    for name, data in dict(empty=b'', cut=whole[:len(whole)//2], text=b'hello').items(): (tmp_path/f'{name}.png').write_bytes(data)
    bad = [tmp_path/f'{n}.png' for n in ('empty', 'cut', 'text', 'missing')]
    items = [paths[0], bad[0], bad[1], paths[1], bad[2], bad[3], bad[0]]
    with pytest.warns(UserWarning, match='5 of 7 images do not open'):
        df = score_all(dict(b=brightness, c=brightness), items, 'x', batch_size=3)
    assert df.isna().all(axis=1).tolist() == [False, True, True, False, True, True, True]
    assert [(f['item'], Path(f['image']).name) for f in df.attrs['failed']] == [(1, 'empty.png'), (2, 'cut.png'), (4, 'text.png'), (5, 'missing.png'), (6, 'empty.png')]
    for f, says in zip(df.attrs['failed'], ('empty', 'damaged', 'not an image', 'no such file')): assert says in f['error']
    np.testing.assert_allclose(df.b[[0, 3]], brightness([Image.open(p) for p in paths[:2]], ''), rtol=1e-6)


def test_all_images_bad(tmp_path):
    with pytest.warns(UserWarning, match='2 of 2'): df = score_all(dict(b=brightness), [tmp_path/'a.png', tmp_path/'b.png'], 'x')
    assert df.b.isna().all()


def test_stored_mode_reaches_the_rewards(tmp_path):
    "Palette and transparency arrive as stored, as if the reward had opened the file itself."
    modes = []
    def reward(images, prompts): modes.extend(im.mode for im in images); return torch.zeros(len(images))
    im = scene('a photo of a red circle')
    for k, m in enumerate(('P', 'LA', 'RGBA', 'RGB', 'L', 'CMYK')): im.convert('RGB').convert(m).save(tmp_path/f'{k}.{"tif" if m == "CMYK" else "png"}')
    score_all(dict(r=reward), sorted(tmp_path.iterdir()), 'x')
    assert modes == ['P', 'LA', 'RGBA', 'RGB', 'L', 'CMYK']


@pytest.mark.parametrize('rewards, says', [
    ({}, 'no rewards'), (dict(odd=lambda i, p: torch.zeros(len(i), 1)), r"reward 'odd' returned shape \(2, 1\) for 2 images"),
    (dict(odd=lambda i, p: 3.), r"returned shape \(\)")])
def test_bad_rewards(pairs, rewards, says):
    with pytest.raises(ValueError, match=says): score_all(rewards, pairs[0][:2], 'x')


def test_bad_prompts(pairs):
    with pytest.raises(InputError, match='1 prompts for 2 images'): score_all(dict(b=brightness), pairs[0][:2], ['x'])


def test_what_one_reward_rejects_costs_nobody_else(pairs):
    "A prompt outside the checker's grammar, and an infinite score: NaN there and nowhere else, with the reason and the reward."
    def endless(images, prompts): return torch.tensor([torch.inf if 'two' in p else 1. for p in prompts])
    paths, texts = pairs
    asked = [texts[0], 'an elephant', 'a photo of two stars', texts[3]]
    with pytest.warns(UserWarning, match='2 of 12 scores are missing: checker, item 1: .*elephant'):
        df = score_all(dict(b=brightness, checker=Checker(), endless=endless), paths[:4], asked)
    assert df.isna().to_numpy().tolist() == [[False]*3, [False, True, False], [False, False, True], [False]*3]
    assert [(f['item'], f['reward']) for f in df.attrs['failed']] == [(1, 'checker'), (2, 'endless')]
    def fails(images, prompts): raise CheckpointError('damaged')
    with pytest.raises(CheckpointError): score_all(dict(fails=fails), paths[:2], 'x')


def test_images_in_any_form(pairs, tiny):
    "Bytes, dicts of bytes and path, numpy and torch in NHWC and NCHW, uint8 and float: the same scores through every door."
    paths, texts = pairs
    want, ims = tiny(paths[:2], texts[:2]), [Image.open(p).convert('RGB') for p in paths[:2]]
    nhwc = np.stack([np.asarray(im) for im in ims])
    forms = [[p.read_bytes() for p in paths[:2]], [dict(bytes=p.read_bytes(), path=None) for p in paths[:2]], [dict(bytes=None, path=str(p)) for p in paths[:2]],
             nhwc, nhwc.astype(np.float32)/255, torch.from_numpy(nhwc).permute(0, 3, 1, 2), torch.from_numpy(nhwc).permute(0, 3, 1, 2)/255, tuple(ims)]
    rewards = dict(tiny=tiny, clip=load_reward('tiny-clip', device='cpu'), ir=load_reward('tiny-imagereward', device='cpu'), checker=Checker())
    for form in forms:
        assert_close(tiny(form, texts[:2]), want, atol=1e-5, rtol=1e-5)
        df = score_all(rewards, form, texts[:2], progress=False)
        for n, r in rewards.items(): np.testing.assert_allclose(df[n], r(paths[:2], texts[:2]), atol=1e-5, rtol=1e-5)
