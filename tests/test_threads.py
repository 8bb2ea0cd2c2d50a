"One reward, many threads: the same numbers as from one, and nothing is left behind."
import asyncio, copy, json, os, pickle, shutil, subprocess, sys, threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np, pytest, torch
from torch.testing import assert_close

from llava_reward_nb.weights import MODELS
from llava_reward_nb.model import RewardModel
from llava_reward_nb.rewards.registry import load_reward
from llava_reward_nb.rewards.llava import LLaVAReward
from llava_reward_nb.shapes.records import alignment_pairs

NEAR = dict(atol=1e-5, rtol=1e-5)
NAMES = ['alignment', 'fidelity', 'overall_bt', 'safety']


@pytest.fixture(scope='module')
def rm(): return RewardModel.from_pretrained('tiny', device='cpu')


@pytest.fixture(scope='module')
def pairs():
    rows = alignment_pairs(3, seed=0)
    return [r[k] for r in rows for k in ('chosen_path', 'reject_path')], [r['prompt'] for r in rows for _ in '12']


@pytest.fixture(scope='module')
def want(rm, pairs): return {n: rm.score(*pairs, perspective=n) for n in NAMES}


def state(rm):
    "All that a call could leave behind."
    used = {n: m.active_adapters for n, m in rm.backbone.model.named_modules() if hasattr(type(m), 'active_adapters')}
    return rm.active, used, [n for n, p in rm.named_parameters() if p.requires_grad], [m.training for m in rm.modules()], torch.is_grad_enabled()


def test_eight_threads_and_four_perspectives(rm, pairs, want):
    "Scores by name, by the active perspective and of pixels, mixed; meanwhile nobody sees another perspective as the active one."
    ims, texts = pairs
    rm.set_perspective('fidelity')
    before = state(rm)
    go = threading.Barrier(8)
    x = torch.stack([torch.from_numpy(np.array(im)) for im in ims[:2]]).permute(0, 3, 1, 2).float()/255
    def work(k):
        go.wait()
        name = NAMES[k % 4]
        out = [rm.score(ims, texts, perspective=name), rm.score(ims, texts), rm.active, rm.embed_all(ims[:2], texts[:2], NAMES)]
        return name, *out, LLaVAReward(rm, name).score_pixels(x.clone().requires_grad_(), texts[:2])
    with ThreadPoolExecutor(8) as pool: done = list(pool.map(work, range(8)))
    for name, by_name, by_active, active, every, pixels in done:
        assert_close(by_name, want[name], **NEAR)
        assert_close(by_active, want['fidelity'], **NEAR)
        assert active == 'fidelity'
        for n in NAMES: assert_close(every[n][:, 0], want[n][:2], **NEAR)
        assert_close(pixels.detach(), want[name][:2], atol=1e-4, rtol=1e-4)
    assert state(rm) == before


def test_async(rm, pairs, want):
    ims, texts = pairs
    async def ask(): return await asyncio.gather(*(asyncio.to_thread(rm.score, ims, texts, NAMES[i % 4]) for i in range(8)))
    for i, got in enumerate(asyncio.run(ask())): assert_close(got, want[NAMES[i % 4]], **NEAR)


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize('where', ['vision_tower', 'language_model.norm', 'img_projection'])
def test_an_exception_leaves_all_as_it_was(rm, pairs, want, where, error):
    ims, texts = pairs
    rm.set_perspective('alignment').train()
    rm.heads.eval()                                # a part in another mode than the rest
    before = state(rm)
    def fail(*args): raise error
    hook = rm.backbone.model.get_submodule(where).register_forward_pre_hook(fail)
    x = torch.rand(1, 3, 64, 64).requires_grad_()
    for call in (lambda: rm.score(ims, texts, 'safety'), lambda: rm.embed_all(ims, texts), lambda: LLaVAReward(rm, 'safety').score_pixels(x, texts[0])):
        with pytest.raises(error): call()
        assert state(rm) == before
    hook.remove()
    assert_close(rm.score(ims, texts, 'safety'), want['safety'], **NEAR)
    assert_close(rm.score(ims, texts), want['alignment'], **NEAR)
    assert state(rm) == before
    rm.eval()


def test_another_thread_can_go_on_after_an_exception(rm, pairs, want):
    "The lock is given back."
    def fail(*args): raise ValueError
    hook = rm.backbone.language_model.norm.register_forward_pre_hook(fail)
    with pytest.raises(ValueError): rm.score(*pairs, 'safety')
    hook.remove()
    with ThreadPoolExecutor(1) as pool: assert_close(pool.submit(rm.score, *pairs, 'safety').result(timeout=100), want['safety'], **NEAR)


def test_copies_score_alike(rm, pairs, want):
    for twin in copy.deepcopy(rm), pickle.loads(pickle.dumps(rm)):
        assert_close(twin.score(*pairs, 'safety'), want['safety'], **NEAR)
        assert twin.lock is not rm.lock and twin.identity_of('safety') == rm.identity_of('safety')


def test_another_process_has_the_same_identity(rm):
    code = "import sys; from llava_reward_nb.model import RewardModel; print(RewardModel.from_pretrained('tiny', 'safety', device='cpu').identity)"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(Path(__file__).parent.parent)})
    assert done.stdout.strip() == rm.identity_of('safety'), done.stderr


def test_training_forward_does_not_see_a_passing_perspective(rm, pairs):
    "Head vectors of a batch of tensors, as a training loop asks for them, while other threads score by other perspectives."
    ims, texts = pairs
    rm.set_perspective('overall_bt').eval()
    batch = rm.backbone.encode(ims, texts)
    with torch.no_grad(): alone = rm(**batch)
    def forward(_):
        with torch.no_grad(): return rm(**batch)
    with ThreadPoolExecutor(4) as pool:
        noise = [pool.submit(rm.score, ims, texts, n) for n in ('safety', 'fidelity')*3]
        for got in list(pool.map(forward, range(4))): assert_close(got, alone, **NEAR)
        for f in noise: f.result()


@pytest.mark.parametrize('name', ['tiny-clip', 'tiny-hpsv2', 'tiny-imagereward', 'tiny-vqascore', 'tiny/alignment', 'checker'])
def test_every_reward_of_the_bundle(name, pairs):
    r = load_reward(name, device='cpu')
    ims, texts = pairs
    alone = r(ims, texts)
    with ThreadPoolExecutor(8) as pool: got = list(pool.map(lambda i: (i, r(ims[i % 6], texts[i % 6])), range(16)))
    for i, s in got: assert_close(s[0], alone[i % 6], **NEAR)
    assert isinstance(r.identity, str) and r.identity == load_reward(name, device='cpu').identity


def test_compiled(pairs, want):
    "torch.compile leaves preprocessing alone and compiles the rest."
    compiled = torch.compile(RewardModel.from_pretrained('tiny', 'safety', device='cpu'), backend='eager')
    assert_close(compiled(pairs[0][0], pairs[1][0]), want['safety'][:1], **NEAR)
    torch._dynamo.reset()


def test_perspectives_from_before_checksums_and_long_fingerprints_load(pairs, tmp_path):
    for name in 'base', 'alignment': shutil.copytree(MODELS['tiny']/name, tmp_path/name)
    (tmp_path/'alignment'/'checksums.json').unlink(missing_ok=True)
    path = tmp_path/'alignment'/'reward_config.json'
    config = json.loads(path.read_text(encoding='utf-8'))
    path.write_text(json.dumps(config | dict(fingerprint=config['fingerprint'][:16])), encoding='utf-8')
    old = RewardModel.from_pretrained(tmp_path, 'alignment', device='cpu')
    assert_close(old(*pairs), RewardModel.from_pretrained('tiny', 'alignment', device='cpu')(*pairs), **NEAR)
    assert RewardModel.from_pretrained('tiny', 'alignment', device='cpu').config.base == 'tiny'
