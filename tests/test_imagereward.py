"ImageReward against the numbers of the reference code; files that are not as they should be."
import json, shutil, zlib

import numpy as np, pytest, torch
from llava_reward_nb.rewards.clip import crop_image, shortest_side, to_floats
from llava_reward_nb.core import CheckpointError, InputError, Reward
from llava_reward_nb.rewards.imagereward import *
from llava_reward_nb.rewards.imagereward import MEAN, STD
from metrics import checkpoints, maker, numbers, same_pixels
from safetensors.torch import load_file
from torch.testing import assert_close

ALL = numbers('clip')
GOLDEN, PROMPTS = ALL['imagereward'], ALL['prompts']
EMBEDDING = dict(atol=2e-5, rtol=2e-4)
SCORE = dict(atol=5e-6, rtol=0)


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    "The toy checkpoint; it is the one the numbers belong to."
    out = tmp_path_factory.mktemp('metrics')
    assert checkpoints(out, 'imagereward') == {'imagereward': ALL['about']['checkpoint_crc32']['imagereward']}
    return out/'imagereward'


@pytest.fixture(scope='module')
def reward(toy): return ImageReward.from_pretrained(toy, device='cpu')


def image(name): return maker().make_image(*ALL['images'][name])


# ---- golden values

def test_constants(): assert GOLDEN['constants'] == dict(mean=MEAN, std=STD, max_length=MAX_LENGTH)


def test_tokens(reward):
    tok, special = reward.tokenizer, dict(GOLDEN['special_ids'])
    assert len(tok) == special.pop('len')
    for t, i in special.items(): assert tok.convert_tokens_to_ids(t) == i, t
    for name, want in GOLDEN['tokens'].items():
        ids, mask = prompt_ids(tok, [PROMPTS[name]])
        n = want['n_attended']
        assert ids[0].tolist() == want['ids']+[special['[PAD]']]*(35-n) and mask[0].tolist() == [1]*n+[0]*(35-n), name


def test_preprocessing(reward):
    for name, want in GOLDEN['preprocess'].items():
        same_pixels(reward.preprocess([image(name)])[0], want, 1e-5)
        assert zlib.crc32(np.asarray(crop_image(image(name), 224, 'even')).tobytes()) == want['uint8_crc32'], name
        assert list(shortest_side(*image(name).size, 224)) == want['resized_size_wh']


def test_vision(reward):
    for name, want in GOLDEN['vision'].items():
        with torch.no_grad(): V = reward.model.vision(pixel_values=reward.preprocess([image(name)])).last_hidden_state[0]
        close = lambda x, k: assert_close(x, torch.tensor(want[k]), **EMBEDDING, msg=lambda m: f'{name} {k}: {m}')
        assert list(V.shape) == want['shape']
        close(V[0, :8], 'cls_first8'); close(V[1, :4], 'token1_first4'); close(V[-1, -4:], 'last_token_last4')
        close(V.mean(), 'mean'); close(V.std(unbiased=False), 'std'); close(V.min(), 'min'); close(V.max(), 'max')


@pytest.mark.parametrize('batch_size', [1, 8])
def test_scores(reward, batch_size):
    rows = GOLDEN['scores']
    images, prompts = [image(w['image']) for w in rows], [PROMPTS[w['prompt']] for w in rows]
    assert_close(reward(images, prompts, batch_size=batch_size), torch.tensor([w['score'] for w in rows]), **SCORE)
    with torch.no_grad(): parts = [reward.raw(reward.preprocess(images[i:i+batch_size]), prompts[i:i+batch_size]) for i in range(0, len(rows), batch_size)]
    assert_close(torch.cat([p[0] for p in parts]), torch.tensor([w['raw_mlp'] for w in rows]), **SCORE)
    assert_close(torch.cat([p[1] for p in parts])[:, :6], torch.tensor([w['h_cls_first6'] for w in rows]), **EMBEDDING)


def test_batch(reward):
    b = GOLDEN['batch']
    assert_close(reward([image(i) for i in b['images']], [PROMPTS[p] for p in b['prompts']]), torch.tensor(b['scores']), **SCORE)


def test_rank(reward):
    w = GOLDEN['rank']
    images, prompt = [image(i) for i in w['images']], PROMPTS[w['prompt']]
    assert_close(reward(images, prompt), torch.tensor(w['scores']), **SCORE)
    assert reward.rank(images, prompt) == w['ranking']


# ---- files

def test_paths_and_tensors_give_the_score_of_the_image(reward, tmp_path):
    assert isinstance(reward, Reward)
    names = ['land', 'pal', 'gray', 'alpha']
    for n in names: image(n).save(tmp_path/f'{n}.png')
    assert_close(reward([tmp_path/f'{n}.png' for n in names], 'a dog'), reward([image(n) for n in names], 'a dog'), **SCORE)
    t = torch.from_numpy(np.array(image('land'))).permute(2, 0, 1)/255
    assert_close(reward(t, 'a dog'), reward(image('land'), 'a dog'), **SCORE)


def test_every_weight_is_loaded_and_saved(toy, reward, tmp_path):
    sd = torch.load(toy/'ImageReward.pt', weights_only=True)
    for k, v in reward.model.state_dict().items(): assert_close(sd.pop(published_name(k)), v, atol=0, rtol=0)
    assert sorted(sd) == sorted(['blip.text_encoder.embeddings.position_ids', *(f'blip.{k}_proj.{w}' for k in ('text', 'vision') for w in ('weight', 'bias'))])
    reward.save_pretrained(tmp_path/'ir')
    again = ImageReward.from_pretrained(tmp_path/'ir', device='cpu')
    assert_close(again(image('sq'), PROMPTS['short']), reward(image('sq'), PROMPTS['short']), **SCORE)
    assert prompt_ids(again.tokenizer, list(PROMPTS.values()))[0].equal(prompt_ids(reward.tokenizer, list(PROMPTS.values()))[0])
    saved = load_file(tmp_path/'ir'/'ImageReward.safetensors')
    assert saved.keys() == {published_name(k) for k in reward.model.state_dict()}
    assert json.loads((tmp_path/'ir'/'med_config.json').read_text())['encoder_width'] == 128


def test_bfloat16(toy, reward):
    half = ImageReward.from_pretrained(toy, device='cpu', dtype=torch.bfloat16)
    a, b = (r([image('sq'), image('wide')], 'a dog') for r in (half, reward))
    assert a.dtype == torch.float32 and (a-b).abs().max() < .1 and half.model.layers[0].weight.dtype == torch.float32


@pytest.mark.parametrize('fault', ['missing', 'extra', 'shape', 'nan', 'cut', 'gone', 'pickle', 'config', 'no config', 'tokenizer'])
def test_bad_checkpoints(toy, tmp_path, fault):
    bad = tmp_path/'bad'
    shutil.copytree(toy, bad)
    f = bad/'ImageReward.pt'
    sd, k, say = torch.load(f, weights_only=True), 'blip.visual_encoder.norm.weight', 'vision.post_layernorm.weight'
    if fault == 'missing': del sd[k]
    if fault == 'extra': sd['blip.visual_encoder.more'], say = torch.ones(1), 'blip.visual_encoder.more'
    if fault == 'shape': sd[k], say = sd[k][1:].clone(), k
    if fault == 'nan': sd[k][3], say = torch.nan, k
    torch.save(sd, f)
    if fault == 'cut': f.write_bytes(f.read_bytes()[:5000]); say = 'cannot be read'
    if fault == 'gone': f.unlink(); say = 'holds no ImageReward.safetensors or ImageReward.pt'
    if fault == 'pickle': torch.save(print, f); say = 'cannot be read'
    if fault == 'config': (bad/'med_config.json').write_text('{}'); say = 'states no hidden_size'
    if fault == 'no config': (bad/'med_config.json').unlink(); say = 'holds no med_config.json'
    if fault == 'tokenizer': bert_tokenizer(['a']).save_pretrained(bad/'bert'); say = 'the tokenizer has'
    with pytest.raises(CheckpointError, match=say): ImageReward.from_pretrained(bad, device='cpu')


def test_offline_error_says_what_is_needed(monkeypatch):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(CheckpointError, match='cannot be fetched(.|\n)*pass a local copy(.|\n)*ImageReward.pt'): ImageReward.from_pretrained('nobody-at-all/imagereward')


# ---- gradients, bad input

def test_gradient_is_the_slope(toy):
    r = ImageReward.from_pretrained(toy, device='cpu')
    r.model.double()
    torch.manual_seed(0)
    x = (.1+.8*torch.rand(2, 3, 40, 50, dtype=torch.float64)).requires_grad_()
    f = lambda x: r.score_pixels(x, ['a dog', 'a red cube']).sum()
    (g,) = torch.autograd.grad(f(x), x)
    assert g.isfinite().all() and (g.flatten(1).norm(dim=1) > 0).all()
    u = torch.randn_like(x)/x[0].numel()**.5
    with torch.no_grad(): rise = (f(x+1e-3*u)-f(x-1e-3*u)).item()/2e-3
    assert_close(rise, (g*u).sum().item(), rtol=1e-3, atol=1e-6)
    assert not any(p.requires_grad for p in r.model.parameters())


def test_pixels_score_as_images(reward):
    ims = [image('sq224'), image('sq')]
    got = torch.cat([reward.score_pixels(to_floats([im]), 'a dog') for im in ims])
    assert_close(got[:1], reward(ims[:1], 'a dog'), **SCORE)
    assert_close(got, reward(ims, 'a dog'), atol=5e-2, rtol=0)


def test_bad_input(reward):
    ok = image('tiny')
    for images, prompts, say in (([], 'a', 'no images'), ([ok, 'none.png'], 'a', 'none.png: no such file'), ([ok, None], 'a', 'image 1'),
                                 ([ok], ['a', 'b'], '2 prompts for 1'), (ok, 3, 'pass a string'), (ok, 'a \ud800', 'not valid Unicode')):
        with pytest.raises(InputError, match=say): reward(images, prompts)
    with pytest.raises(InputError, match='needed: float tensor'): reward.score_pixels(torch.zeros(3, 8, 8), 'a')


def test_small_models_of_any_size():
    tok = bert_tokenizer(['a', 'red', 'circle'])
    med = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, max_position_embeddings=35)
    make = lambda seed: ImageReward.from_config(med, dict(hidden_size=128, num_hidden_layers=1, patch_size=8, image_size=32), tok, seed, 'cpu')
    a, b, c = (make(s)(image('sq'), 'a red circle') for s in (0, 0, 1))
    assert a == b != c
    with pytest.raises(ValueError, match='multiple of 64'): vision_config(96, 1, 8, 32)
