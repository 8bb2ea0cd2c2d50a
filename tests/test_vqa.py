"VQAScore against the numbers of the reference code: tokens, pixels, image tokens, predictions and scores."
import json
from pathlib import Path

import pytest, torch
from conftest import script
from llava_reward_nb.core import CheckpointError
from llava_reward_nb.vqa import VQAScore, square_pixels, t5_ids
from torch.testing import assert_close

METRICS = Path(__file__).resolve().parent/'golden'/'metrics'
WANT = json.loads((METRICS/'vqascore.json').read_text(encoding='utf-8'))
PROMPTS, SCORES = WANT['prompts'], [(r['image'], r['prompt'], r['score']) for r in WANT['scores']]


@pytest.fixture(scope='module')
def images():
    "Function from a name to that PIL image."
    make = script(METRICS/'make_metric_checkpoints.py').make_image
    return lambda name: make(*WANT['images'][name])


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A toy CLIP-FlanT5 in the published layout."
    out, make = tmp_path_factory.mktemp('vqa'), script(METRICS/'make_metric_checkpoints.py')
    make.build_clip_flant5(json.loads((METRICS/'spec_metrics.json').read_text(encoding='utf-8')), str(out))
    return out


@pytest.fixture(scope='module')
def reward(folder): return VQAScore.from_pretrained(folder, device='cpu', dtype=torch.float32)


def close(got, want): assert_close(torch.as_tensor(got, dtype=torch.float64), torch.tensor(want, dtype=torch.float64), rtol=1e-5, atol=0)


def test_vocabulary_is_cut_to_the_tokenizer(reward):
    assert len(reward.tokenizer) == reward.lm_head.out_features == reward.t5.shared.num_embeddings == WANT['tokenizer_length']
    assert reward.labels == WANT['yes_label_ids'] and not torch.equal(reward.lm_head.weight, reward.t5.shared.weight)


@pytest.mark.parametrize('name', WANT['tokens'])
def test_tokens(reward, name):
    want = WANT['tokens'][name]
    head, tail = reward.pieces(PROMPTS[name])
    ids = head+[-200]+tail
    cut = want['ids'].index('...') if '...' in want['ids'] else len(ids)
    after = len(want['ids'])-cut-1 if '...' in want['ids'] else 0
    assert len(ids) == want['n'] and len(head) == want['sentinel_at'] and head[-1] == 1
    assert ids[:cut] == want['ids'][:cut] and ids[len(ids)-after:] == want['ids'][len(want['ids'])-after:]


@pytest.mark.parametrize('name', WANT['preprocess'])
def test_pixels(images, name):
    want, x = WANT['preprocess'][name], square_pixels(images(name).convert('RGB'), 112)
    at = x[:, torch.tensor(want['points_rows'])][:, :, torch.tensor(want['points_cols'])]
    assert list(x.shape) == want['shape']
    assert_close(at, torch.tensor(want['points']), atol=1e-5, rtol=0)
    assert_close(x.mean((1, 2)), torch.tensor(want['channel_mean']), atol=1e-5, rtol=0)
    assert_close(x.flatten(1).std(1, correction=0), torch.tensor(want['channel_std']), atol=1e-4, rtol=0)


@pytest.mark.parametrize('name', WANT['projected_image'])
def test_image_tokens(reward, images, name):
    want = WANT['projected_image'][name]
    v = reward.visual(square_pixels(images(name).convert('RGB'), 112)[None])[0]
    assert list(v.shape) == want['shape']
    assert_close(v[0, :6], torch.tensor(want['first_row_first6']), atol=2e-5, rtol=2e-4)
    assert_close(v[-1, -4:], torch.tensor(want['last_row_last4']), atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize('image, prompt, score', SCORES)
def test_scores(reward, images, image, prompt, score): close(reward(images(image), PROMPTS[prompt]), [score])


def test_batches(reward, images):
    close(reward([images(i) for i in WANT['batch']['images']], [PROMPTS[p] for p in WANT['batch']['prompts']]), WANT['batch']['scores'])
    close(reward([images(i) for i, _, _ in SCORES], [PROMPTS[p] for _, p, _ in SCORES], batch_size=7), [s for _, _, s in SCORES])


def test_predictions(reward, images):
    d = WANT['detail']
    z = reward.answer_logits(square_pixels(images(d['image']), 112)[None], [PROMPTS[d['prompt']]])
    assert list(z.shape) == d['logits_shape']
    assert_close(z[0, :, :5], torch.tensor(d['logits_first5_per_position']), atol=2e-5, rtol=2e-4)
    p = z[0].softmax(-1)
    close([p[0, 5], p[1, 1]], [d['prob_yes'], d['prob_eos_after_yes']])


def test_long_prompts_are_cut(reward, images):
    c, prompt = WANT['cut_at_2048'], ' '.join(['a']*2100)
    assert sum(map(len, reward.pieces(prompt)))+1 == 2048 and len(t5_ids(reward.tokenizer, prompt)) > 2048
    close(reward(images(c['image']), prompt), [c['score']])


@pytest.mark.parametrize('kind', ['other_answer', 'other_question', 'other_styles'])
def test_other_words(folder, images, kind):
    for r in WANT[kind]:
        own = VQAScore.from_pretrained(folder, 'cpu', torch.float32, **{k: r[k] for k in ('question', 'answer', 'style') if k in r})
        close(own(images(r['image']), PROMPTS[r['prompt']]), [r['score']])


def test_half_precision_is_near(folder, images):
    r = VQAScore.from_pretrained(folder, 'cpu', torch.bfloat16)
    s = r(images('sq'), PROMPTS['short'])
    assert s.dtype == torch.float32
    assert_close(s, torch.tensor([WANT['scores'][0]['score']]), rtol=.3, atol=0)


def test_gradients_point_uphill(reward, images):
    "A small step along the gradient of the pixels raises the score, about as much as its length says."
    x = torch.rand(1, 3, 90, 120, generator=torch.Generator().manual_seed(0)).mul_(.6).add_(.2).requires_grad_()
    y = reward.score_pixels(x, PROMPTS['short'])
    g, = torch.autograd.grad(y.log().sum(), x)
    step = 1e-3*g/g.norm()
    with torch.no_grad(): rise = float((reward.score_pixels(x+step, PROMPTS['short'])/y).log())
    assert rise == pytest.approx(1e-3*float(g.norm()), rel=.1)


def test_damaged_checkpoints_are_refused(folder, tmp_path):
    for p in folder.iterdir():
        if p.name != 'pytorch_model-00001-of-00002.bin': (tmp_path/p.name).symlink_to(p)
    with pytest.raises(CheckpointError, match='pytorch_model-00001-of-00002.bin'): VQAScore.from_pretrained(tmp_path, 'cpu')
    state = torch.load(folder/'pytorch_model-00001-of-00002.bin', weights_only=True)
    key = next(iter(state))
    torch.save({k: v for k, v in state.items() if k != 'decoder.final_layer_norm.weight'}, tmp_path/'pytorch_model-00001-of-00002.bin')
    with pytest.raises(CheckpointError, match='decoder.final_layer_norm'): VQAScore.from_pretrained(tmp_path, 'cpu')
    torch.save(state | {key: torch.full_like(state[key], float('nan'))}, tmp_path/'pytorch_model-00001-of-00002.bin')
    with pytest.raises(CheckpointError, match='NaN'): VQAScore.from_pretrained(tmp_path, 'cpu')
