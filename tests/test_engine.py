"The scoring engine under a reward model: a score is the same in any company, by any route, with little memory."
import copy, shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np, pytest, torch
from PIL import Image
from torch.testing import assert_close

from llava_reward_nb.generic import load_backbone
from llava_reward_nb.model import PerspectiveConfig, RewardModel
from llava_reward_nb.rewards.llava import LLaVAReward

NEAR = dict(atol=2e-5, rtol=0)
KINDS = dict(bt=PerspectiveConfig(), cls=PerspectiveConfig('cls', skipca=False), gpm=PerspectiveConfig('gpm', dim=4, gate=True),
             mean=PerspectiveConfig(pooling='mean'), layer0=PerspectiveConfig(layer=0), layer2=PerspectiveConfig(layer=2),
             last=PerspectiveConfig(layer=4), mean_layer=PerspectiveConfig(pooling='mean', layer=1))
PROMPTS = ['a red circle', '', 'a photo of a green square left of a blue triangle', 'two stars', 'x']


@pytest.fixture(scope='module')
def images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in [(64, 64), (200, 50), (40, 90), (150, 140), (30, 300)]]


@pytest.fixture(scope='module')
def rm():
    "A perspective of every kind on one base of up to 4 crops, all with random weights."
    model = RewardModel(load_backbone('tiny', num_crops=4))
    torch.manual_seed(0)
    for name, config in KINDS.items(): model.add_perspective(name, config, lora_rank=4, lora_alpha=8)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if 'lora_B' in n: p.normal_(std=.05)
            if 'gate' in n: p.normal_(std=.3)
    return model.eval()


@pytest.fixture(scope='module')
def alone(rm, images):
    return {n: torch.cat([rm.embed(im, t, n) for im, t in zip(images, PROMPTS)]) for n in KINDS}


def test_mixed_batch_equals_rows_alone(rm, images, alone):
    together = rm.embed_all(images, PROMPTS)
    for n in KINDS:
        assert together[n].std() > .001, n
        assert_close(together[n], alone[n], **NEAR, msg=lambda m: f'{n}: {m}')


@pytest.mark.parametrize('budget', [1, 150, 300])
def test_any_budget(rm, images, alone, budget):
    small = copy.deepcopy(rm)
    small.budget = budget
    for n, v in small.embed_all(images, PROMPTS).items(): assert_close(v, alone[n], **NEAR)


def test_full_computation_of_the_last_layer(rm, images, alone):
    "States of all tokens, read at the last real one, by a head of the same weights."
    batch = rm.backbone.encode(images, PROMPTS)
    for name in 'bt', 'layer2', 'last':
        with torch.no_grad(), rm.using(name):
            read = rm.backbone(batch, layer=KINDS[name].layer, pooling='mean')
            states = read.states[range(len(images)), read.real.sum(1)-1]
            assert_close(rm.heads[name](states, read.visual, read.mask), alone[name], **NEAR)


def test_gradients_of_training_are_those_of_the_full_computation(rm, images):
    model = copy.deepcopy(rm).train().set_perspective('bt')
    for m in model.modules():
        if isinstance(m, torch.nn.Dropout): m.p = 0.
    batch = model.backbone.encode(images, PROMPTS)
    def gradients(vectors):
        model.zero_grad()
        vectors.square().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    read = model.backbone(batch, pooling='mean')
    full = gradients(model.heads['bt'](read.states[range(len(images)), read.real.sum(1)-1], read.visual, read.mask))
    for n, g in gradients(model(**batch)).items(): assert_close(g, full[n], atol=2e-5*max(1, full[n].abs().max().item()), rtol=1e-4, msg=lambda m: f'{n}: {m}')


def test_grid_equals_pairs(rm, images):
    table = rm.score_grid(images, PROMPTS, 'mean')
    assert table.shape == (5, 5)
    for i, im in enumerate(images):
        for k, t in enumerate(PROMPTS): assert_close(table[i, k], rm.score(im, t, 'mean')[0], **NEAR)


def test_repeated_files_pass_the_tower_once(rm, images, tmp_path):
    files = [tmp_path/f'{i}.png' for i in range(3)]
    for im, f in zip(images, files): im.save(f)
    seen = []
    hook = rm.backbone.tower.register_forward_hook(lambda m, args, kw, out: seen.append(len(kw['pixel_values'])), with_kwargs=True)
    once = rm.score(files, PROMPTS[0], 'bt')
    crops = sum(seen)
    many = rm.score([*files, *map(str, files), *files], PROMPTS[0], 'bt')
    hook.remove()
    assert sum(seen) == 2*crops
    assert_close(many, once.repeat(3), **NEAR)


def test_eight_threads_and_grids(rm, images):
    names = ['bt', 'cls', 'mean', 'layer2']
    want = {n: rm.score_grid(images[:3], PROMPTS[:3], n) for n in names}
    with ThreadPoolExecutor(8) as pool: got = list(pool.map(lambda k: rm.score_grid(images[:3], PROMPTS[:3], names[k % 4]), range(16)))
    for k, table in enumerate(got): assert_close(table, want[names[k % 4]], **NEAR)


def test_too_little_memory(rm, images, alone):
    "The decoder refuses more than two rows; the batch is halved, and stays so."
    model = copy.deepcopy(rm)
    most, refused = 2, []
    def allocate(module, args, kwargs):
        if len(args[0]) > most:
            refused.append(len(args[0]))
            raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')
    hook = model.backbone.language_model.layers[0].register_forward_pre_hook(allocate, with_kwargs=True)
    assert_close(model.embed(images, PROMPTS, 'bt'), alone['bt'], **NEAR)
    assert refused[0] == len(images)
    times = len(refused)
    assert_close(model.embed(images, PROMPTS, 'bt'), alone['bt'], **NEAR)
    assert len(refused) == times # the budget is remembered
    assert_close(model.score_grid(images[0], PROMPTS, 'bt')[0, 0], alone['bt'][0, 0], **NEAR) # rows of one image are halved too
    most = 0
    with pytest.raises(torch.OutOfMemoryError, match='image 4: memory does not suffice for its .* tokens alone'): model.embed(images, PROMPTS, 'bt')
    hook.remove()


def test_merged_and_not(rm, images, alone):
    merged = copy.deepcopy(rm).merge('bt')
    assert_close(merged.embed(images, PROMPTS), alone['bt'], **NEAR)


def test_bfloat16_keeps_what_is_trained_in_float32(images):
    model = RewardModel.from_pretrained('tiny', ['alignment', 'safety'], device='cpu', dtype=torch.bfloat16)
    kinds = {p.dtype for n, p in model.named_parameters() if 'lora_' in n or 'modules_to_save' in n or 'heads' in n}
    assert kinds == {torch.float32}
    exact = RewardModel.from_pretrained('tiny', ['alignment', 'safety'], device='cpu')
    for n in 'alignment', 'safety':
        got, want = model.score(images, PROMPTS, n), exact.score(images, PROMPTS, n)
        assert got.dtype == torch.float32
        assert_close(got, want, atol=.3, rtol=.05)


def test_pixels_get_the_same_gradients(rm, images):
    "Folded adapters let gradients through to the image."
    reward = LLaVAReward(rm, 'bt')
    x = torch.from_numpy(np.array(images[0])).permute(2, 0, 1)[None].float()/255
    def gradient(model):
        y = x.clone().requires_grad_()
        LLaVAReward(model, 'bt').score_pixels(y, 'a red circle').sum().backward()
        return y.grad
    g = gradient(reward.model)
    assert_close(g, gradient(copy.deepcopy(rm).merge('bt')), atol=1e-4*g.abs().max().item(), rtol=1e-3)


@pytest.mark.skipif(not any(map(shutil.which, ('g++', 'clang++', 'c++'))), reason='torch.compile needs a C++ compiler on a CPU')
def test_compiled_layers(rm, images, alone):
    "By PyTorch's own compiler; merged, so that there is less to compile."
    model = copy.deepcopy(rm).merge('bt').compile()
    try: assert_close(model.embed(images, PROMPTS, 'bt'), alone['bt'], **NEAR)
    finally: torch._dynamo.reset()
