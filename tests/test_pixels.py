"Arrays and tensors, as trainers hold them, get the scores of the same pictures as PIL images."
import numpy as np, pytest, torch
from PIL import Image
from torch.testing import assert_close

import families
from llava_reward_nb import pixels
from llava_reward_nb.core import InputError
from llava_reward_nb.generic import load_backbone
from llava_reward_nb.model import RewardModel
from llava_reward_nb.pixels import as_pictures, one_device, resize_bytes
from llava_reward_nb.rewards import AestheticScore, CLIPScore, HPSv2, PickScore, load_reward
from llava_reward_nb.rewards.clip import clip_tokenizer

SIZES = [(64, 64), (70, 40), (64, 64), (30, 90), (20, 24)]  # width, height
PROMPTS = ['a red circle', 'two blue squares', 'a green star', '', 'a photo of a red circle']
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')


def pictures(sizes=SIZES):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


def channels_first(im): return torch.from_numpy(np.array(im)).permute(2, 0, 1)


FORMS = dict(
    arrays=lambda ims: [np.asarray(im) for im in ims],
    tensors=lambda ims: [torch.from_numpy(np.array(im)) for im in ims],
    channels_first=lambda ims: [channels_first(im) for im in ims],
    floats=lambda ims: [channels_first(im)/255 for im in ims],
    half=lambda ims: [(channels_first(im)/255).half() for im in ims],  # eleven bits of precision hold eight
    double=lambda ims: [(channels_first(im).double()/255).requires_grad_() for im in ims],
    mixed=lambda ims: [im if i%2 else np.asarray(im) for i, im in enumerate(ims)])

SOME = {name: FORMS[name] for name in ('arrays', 'floats', 'mixed')}


def same_scores(reward, forms=FORMS, ims=None):
    "Each form of some pictures gets the scores of the pictures; a batch of one size also as one array."
    ims = ims or pictures()
    prompts = PROMPTS[:len(ims)]
    want = reward(ims, prompts)
    assert want.isfinite().all() and want.std()>0
    scale = max(1., want.abs().max().item())
    for name, form in forms.items():
        got = reward(form(ims), prompts)
        assert not got.requires_grad
        assert_close(got, want, atol=1e-4*scale, rtol=0, msg=lambda m: f'{name}: {m}')
    square = pictures([(48, 48)]*3)
    want = reward(square, 'a star')
    batch = np.stack([np.asarray(im) for im in square])
    floats = torch.from_numpy(batch).permute(0, 3, 1, 2)/255
    for many in batch, batch.transpose(0, 3, 1, 2), floats: assert_close(reward(many, 'a star'), want, atol=1e-4*scale, rtol=0)


@pytest.mark.parametrize('name', ['tiny', 'tiny-clip', 'tiny-hpsv2', 'tiny-imagereward', 'tiny-vqascore', 'jpeg', 'checker'])
def test_named_rewards(name):
    reward = load_reward(name, device='cpu')
    if name in ('jpeg', 'checker'):  # these read the pixels and nothing else
        ims = pictures()
        want = reward(ims, 'a red circle')
        for form in FORMS.values(): assert_close(reward(form(ims), 'a red circle'), want)
        return
    same_scores(reward, SOME if name in ('tiny', 'tiny-vqascore') else FORMS)


@pytest.mark.parametrize('cls', [CLIPScore, PickScore, HPSv2])
def test_clips(cls):
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    reward = cls.from_config(dict(sizes, max_position_embeddings=32), dict(sizes, image_size=32, patch_size=8), 16,
                             clip_tokenizer(['red', 'blue', 'circle', 'star']), device='cpu')
    same_scores(reward)


def test_aesthetic():
    from transformers import CLIPVisionConfig
    from llava_reward_nb.rewards.clip import _VisionHead
    config = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8, projection_dim=16)
    torch.manual_seed(0)
    head = _VisionHead(config)
    for rule in 'down', 'even': same_scores(AestheticScore(head, config, rule, 'cpu'))


@pytest.mark.parametrize('family', ['qwen2_5_vl', 'qwen3_vl', 'llava_next', 'llava', 'idefics3'])
def test_backbones(family, tmp_path):
    "Where a processor's steps are written for bytes, and where Pillow does them."
    model = RewardModel(load_backbone(families.FAMILIES[family](tmp_path/family)))
    torch.manual_seed(0)
    model.add_perspective('bt')
    with torch.no_grad(): model.heads['bt'].load_state_dict({k: torch.randn_like(v)*.1 for k, v in model.heads['bt'].state_dict().items()})
    same_scores(model.eval(), SOME, pictures(SIZES[:4]))


def test_same_object_twice():
    "An array that comes several times passes the tower once and is scored for each prompt."
    reward = load_reward('tiny', device='cpu')
    x = np.asarray(pictures()[0])
    want = torch.cat([reward(x, p) for p in PROMPTS])
    assert_close(reward([x]*len(PROMPTS), PROMPTS), want, atol=1e-4, rtol=0)


UNCLEAR = [  # what a trainer passes by mistake; words of the error
    (np.zeros((2, 3, 3, 3), np.uint8), 'image 0: ndarray of shape \\(3, 3, 3\\) and uint8; its first and its last axis'),
    (torch.zeros(1, 3, 64, 3), 'image: Tensor|can both hold the channels'),
    (np.zeros((2, 64, 64, 3))+200., 'for \\[0,255\\] uint8'),
    (torch.rand(2, 3, 64, 64)*2-1, 'for \\[-1,1\\] use x/2\\+0.5'),
    (torch.full((2, 3, 64, 64), torch.nan), 'NaN means'),
    (np.zeros((2, 64, 64, 3), np.int64), 'needed: uint8'),
    (torch.zeros(2, 5, 64, 64), 'needed: \\(h,w,3\\) or \\(3,h,w\\)'),
    (torch.zeros(1, 2, 3, 64, 64), 'one image of shape|needed')]


@pytest.mark.parametrize('images,says', UNCLEAR, ids=range(len(UNCLEAR)))
@pytest.mark.parametrize('name', ['tiny', 'tiny-clip', 'tiny-imagereward'])
def test_unclear_arrays_are_errors(name, images, says):
    with pytest.raises(InputError, match=says): load_reward(name, device='cpu')(images, 'a star')


def test_no_picture_is_made_where_an_accelerator_resizes(monkeypatch):
    "With the resize of accelerators, here on the CPU: Pillow sees no pixel, and no score changes."
    rewards = [load_reward(name, device='cpu') for name in ('tiny', 'tiny-clip', 'tiny-hpsv2', 'tiny-imagereward')]
    ims = pictures()[:3]
    want = [reward(ims, PROMPTS[:3]) for reward in rewards]
    x = [channels_first(im)/255 for im in ims]
    monkeypatch.setattr(pixels, '_resize_pillow', pixels._resize_integers)
    monkeypatch.setattr(Image, 'fromarray', lambda *a, **k: pytest.fail('a picture was made'))
    for reward, scores in zip(rewards, want): assert_close(reward(x, PROMPTS[:3]), scores, atol=1e-4, rtol=1e-5)


@needs_gpu
def test_resize_on_a_gpu():
    rng = np.random.default_rng(0)
    for _ in range(100):
        w, h, W, H = (int(n) for n in rng.integers(1, 200, 4))
        pixels = rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
        for how in Image.Resampling.BILINEAR, Image.Resampling.BICUBIC:
            want = channels_first(Image.fromarray(pixels).resize((W, H), how))
            assert torch.equal(resize_bytes(channels_first(pixels).cuda(), (W, H), how).cpu(), want)


@needs_gpu
@pytest.mark.parametrize('name', ['tiny', 'tiny-clip', 'tiny-hpsv2', 'tiny-imagereward'])
def test_scores_on_a_gpu(name):
    "Wherever the pixels are: the same pixels reach the model, in its own precision."
    reward = load_reward(name, device='cuda', dtype=torch.float32)
    ims = pictures()
    want = reward(ims, PROMPTS)
    for where in 'cpu', 'cuda':
        tensors = [(channels_first(im)/255).to(where) for im in ims]
        for form in tensors, [im if i%2 else t for i, (im, t) in enumerate(zip(ims, tensors))]:
            assert_close(reward(form, PROMPTS), want, atol=1e-3, rtol=1e-3)
    with pytest.raises(InputError, match='for .-1,1. use'): reward(torch.rand(2, 3, 64, 64, device='cuda')*2-1, 'a')


@needs_gpu
def test_mixed_devices():
    x = torch.zeros(3, 8, 8, dtype=torch.uint8)
    assert [t.device.type for t in one_device([x, x.cuda()])]==['cuda', 'cuda']
    assert as_pictures(torch.rand(2, 3, 8, 8, device='cuda'))[1].device.type=='cuda'
