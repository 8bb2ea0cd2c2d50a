"Losses and preference probabilities against numbers that the paper's public code computed."
import itertools, json, math
from pathlib import Path

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from llava_reward_nb.losses import (LOSSES, balanced_weights, bt_loss, bt_prob, cls_loss, cls_pair_prob, cls_prob,
                                    gauss_loss, gauss_prob, gp_loss, gp_prob, gp_score, make_loss, pl_loss)
from llava_reward_nb.model import PerspectiveConfig, RewardModel
from llava_reward_nb.shapes.records import alignment_pairs, safety_labels
from llava_reward_nb.trainer import RewardTrainer
from llava_reward_nb.config import RewardConfig
from llava_reward_nb.weights import MODELS

GOLDEN = json.loads((Path(__file__).parent/'golden'/'losses.json').read_text())
T = {k: torch.tensor(v) for k,v in GOLDEN['inputs'].items()}
near = dict(rtol=0, atol=1e-6)

def test_bt():
    assert_close(bt_loss(T['c1'], T['r1']).item(), GOLDEN['bt']['loss'], **near)
    assert_close(bt_prob(T['c1'], T['r1']).mean().item(), GOLDEN['bt']['prob_mean'], **near)

def test_bt_margin():
    assert_close(bt_loss(T['c1'], T['r1'], margin=.05).item(), GOLDEN['bt_margin_005']['loss'], **near)
    assert_close(bt_prob(T['c1']-.05, T['r1']).mean().item(), GOLDEN['bt_margin_005']['prob_mean'], **near)

@pytest.mark.parametrize('name,c,r', [('gpm2','c2','r2'), ('gpm2_blocks','c2','r2'), ('gpm4','c4','r4')])
def test_gpm(name, c, r):
    assert_close(gp_loss(T[c], T[r]).item(), GOLDEN[name]['loss'], **near)
    assert_close(gp_prob(T[c], T[r]).mean().item(), GOLDEN[name]['prob_mean'], **near)

def test_cls_is_not_rounded():
    loss = cls_loss(T['c1'], T['labels'])
    assert_close(loss.item(), GOLDEN['cls']['loss'], **near)
    assert_close(cls_prob(T['c1']).mean().item(), GOLDEN['cls']['prob_mean'], **near)
    assert loss.bfloat16().item()==GOLDEN['cls']['loss_rounded_to_bfloat16']!=loss.item()

@pytest.mark.parametrize('name,kind,dim', [('bt','bt',1), ('gpm2','gpm',2), ('gpm4','gpm',4)])
def test_pair_probabilities_of_a_model(name, kind, dim):
    g = GOLDEN['pair'][name]
    a, b, loss = torch.tensor([g['a']]), torch.tensor([g['b']]), make_loss(kind, dim)
    if 'prob' in g: assert_close(loss.prob(a, b).item(), g['prob'], **near)
    if 'loss' in g: assert_close(loss.loss(a, b).item(), g['loss'], **near)

def test_unpaired():
    g = GOLDEN['unpaired']
    right = (cls_prob(torch.tensor(g['rewards']))>=.5).long() == torch.tensor(g['labels'])
    assert right.float().mean().item()==pytest.approx(g['accuracy'])
    m = GOLDEN['unpaired_model']
    assert_close(cls_prob(torch.tensor(m['rewards']).flatten()), torch.tensor(m['prob']).flatten(), **near)

steady = settings(max_examples=60)
numbers = st.floats(-50, 50, width=32)
targets = st.integers(0, 64).map(lambda i: i/64) # 1-t is exact
@st.composite
def two_batches(draw):
    n, k = draw(st.integers(1,4)), draw(st.integers(1,3))
    rows = st.lists(st.lists(numbers, min_size=2*k, max_size=2*k), min_size=n, max_size=n)
    return torch.tensor(draw(rows)), torch.tensor(draw(rows))

@steady
@given(two_batches(), st.floats(.05, 5))
def test_swapping_two_images_gives_the_complement(ab, tau):
    a, b = ab
    assert torch.equal(gp_score(a, b), -gp_score(b, a))
    assert_close(gp_prob(a, b, tau)+gp_prob(b, a, tau), torch.ones(len(a)))
    assert_close(bt_prob(a, b, tau)+bt_prob(b, a, tau), torch.ones_like(a))
    assert_close(cls_pair_prob(a, b)+cls_pair_prob(b, a), torch.ones_like(a))

@steady
@given(two_batches(), st.floats(.05, 5), targets, st.floats(0, 2))
def test_naming_the_other_image_chosen_does_not_change_the_loss(ab, tau, t, margin):
    a, b = ab
    t = torch.full((len(a),), t)
    assert_close(gp_loss(a, b, tau, t), gp_loss(b, a, tau, 1-t))
    assert_close(bt_loss(a[:,0], b[:,0], tau, margin, t), bt_loss(b[:,0], a[:,0], tau, margin, 1-t))

@steady
@given(two_batches(), st.sampled_from(list(LOSSES)))
def test_losses_are_finite_and_never_negative(ab, kind):
    a, b = ab
    if kind=='gpm': out = make_loss(kind, a.shape[1]).loss(a, b)
    elif kind=='bt': out = make_loss(kind).loss(a[:,:1], b[:,:1])
    elif kind=='gauss': out = make_loss(kind, 2).loss(a[:,:2], b[:,:2])
    elif kind=='pl': out = make_loss(kind).loss(a[...,None], 1+torch.arange(a.shape[1]).expand(a.shape)//2)
    else: out = make_loss(kind).loss(a[:,:1], (b[:,0]>0))
    assert out.isfinite() and out>=0

# margins, focal factor, smoothing, weights, Gaussian scores, rankings: against float64 arithmetic written out here

def log_sigmoid(z): return -np.logaddexp(0, -np.asarray(z, np.float64))

def cross_entropy(z, t, gamma=0., smoothing=0., weights=(1.,1.)):
    t = t*(1-smoothing)+(1-t)*smoothing
    yes, no = log_sigmoid(z), log_sigmoid(-z)
    return np.mean(-weights[1]*t*np.exp(gamma*no)*yes - weights[0]*(1-t)*np.exp(gamma*yes)*no)

def gradient(f, x, step=1e-6):
    "Central differences of a function of an array."
    out = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[i] += step
        down[i] -= step
        out[i] = (f(up)-f(down))/(2*step)
    return out

RNG = np.random.default_rng(0)
C, R = RNG.normal(size=(2, 9))
SOFT, POINTS = RNG.random(9), RNG.random(9)*3
SHAPES = [dict(gamma=g, smoothing=e) for g in (0., .5, 2.) for e in (0., .2)]

@pytest.mark.parametrize('shape', SHAPES)
def test_pair_losses_and_gradients_in_float64(shape):
    def plain(c): # margins are asked of the side that the target names
        return cross_entropy((c-R-(2*SOFT-1)*.1*POINTS)/.3, SOFT, **shape)
    c = torch.tensor(C, requires_grad=True)
    loss = make_loss('bt', tau=.3, margin=.1, **shape).loss(c[:,None], torch.tensor(R)[:,None], torch.tensor(SOFT), torch.tensor(POINTS))
    loss.backward()
    assert loss.item() == pytest.approx(plain(C), rel=1e-10)
    np.testing.assert_allclose(c.grad.numpy(), gradient(plain, C), rtol=1e-5, atol=1e-8)

@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('gate', [False, True])
def test_general_preference_with_and_without_a_gate(shape, gate):
    a, b = RNG.normal(size=(2, 5, 6))
    scale = np.repeat(np.sqrt(RNG.random((5, 3))), 2, 1) if gate else np.ones((5, 6)) # a gate scales the planes
    def plain(a):
        u, v = a*scale, b*scale
        s = sum(u[:,2*j]*v[:,2*j+1]-u[:,2*j+1]*v[:,2*j] for j in range(3))
        return cross_entropy(s/.5, SOFT[:5], **shape)
    x = torch.tensor(a, requires_grad=True)
    loss = make_loss('gpm', 6, tau=.5, **shape).loss(x*torch.tensor(scale), torch.tensor(b*scale), torch.tensor(SOFT[:5]))
    loss.backward()
    assert loss.item() == pytest.approx(plain(a), rel=1e-10)
    np.testing.assert_allclose(x.grad.numpy(), gradient(plain, a), rtol=1e-5, atol=1e-8)

@pytest.mark.parametrize('shape', SHAPES)
def test_class_weights(shape):
    labels = (RNG.random(9)>.4).astype(float)
    weights = balanced_weights(labels)
    def plain(s): return cross_entropy(s, labels, weights=weights, **shape)
    s = torch.tensor(C, requires_grad=True)
    loss = make_loss('cls', weights=weights, **shape).loss(s[:,None], torch.tensor(labels))
    loss.backward()
    assert loss.item() == pytest.approx(plain(C), rel=1e-10)
    np.testing.assert_allclose(s.grad.numpy(), gradient(plain, C), rtol=1e-5, atol=1e-8)
    assert np.mean([weights[int(y)] for y in labels]) == pytest.approx(1)

@pytest.mark.parametrize('shape', SHAPES)
def test_gaussian_scores(shape):
    a, b = RNG.normal(size=(2, 9, 2))
    def plain(a):
        variance = np.exp(2*a[:,1])+np.exp(2*b[:,1])
        return cross_entropy((a[:,0]-b[:,0])/np.sqrt(.3**2+math.pi/8*variance), SOFT, **shape)
    x = torch.tensor(a, requires_grad=True)
    loss = make_loss('gauss', 2, tau=.3, **shape).loss(x, torch.tensor(b), torch.tensor(SOFT))
    loss.backward()
    assert loss.item() == pytest.approx(plain(a), rel=1e-10)
    np.testing.assert_allclose(x.grad.numpy(), gradient(plain, a), rtol=1e-5, atol=1e-8)

def orders(ranks):
    groups = [[i for i,r in enumerate(ranks) if r==q] for q in sorted({r for r in ranks if r>0})]
    for order in itertools.product(*map(itertools.permutations, groups)): yield list(itertools.chain(*order))

@pytest.mark.parametrize('ranks', [[1,2,3,4,5], [2,2,1,3,3], [1,1,1,1,1], [0,4,4,4,1], [5,0,0,5,9], [1.5,1.5,3,4,5]])
def test_rankings(ranks):
    def plain(s):
        s = s/.5
        return np.mean([sum(np.logaddexp.reduce(s[o[i:]])-s[o[i]] for i in range(len(o))) for o in orders(ranks)])
    s = torch.tensor(C[:5], requires_grad=True)
    loss = make_loss('pl', tau=.5).loss(s[None,:,None], torch.tensor([ranks]))
    loss.backward()
    assert loss.item() == pytest.approx(plain(C[:5]), rel=1e-10)
    np.testing.assert_allclose(s.grad.numpy(), gradient(plain, C[:5]), rtol=1e-5, atol=1e-8)

@pytest.mark.parametrize('size', [1e4, 1e-4])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('shape', SHAPES)
def test_extremes_are_finite(size, dtype, shape):
    "Also for all signs of scores, spreads and sides; losses of bfloat16 are float32."
    corners = torch.tensor(list(itertools.product((-size, 0., size), repeat=4))).to(dtype)
    soft = torch.arange(len(corners))/(len(corners)-1)
    losses = [lambda x: bt_loss(x[:,0], x[:,1], margin=size, target=soft, **shape), lambda x: gp_loss(x[:,:2], x[:,2:], target=soft, **shape),
              lambda x: cls_loss(x[:,0], soft, (.1,9.), **shape), lambda x: gauss_loss(x[:,:2], x[:,2:], target=soft, **shape),
              lambda x: pl_loss(x[::5], torch.tensor([1,2,2,3]).expand(len(x[::5]), 4))]
    for f in losses:
        x = corners.clone().requires_grad_()
        loss = f(x)
        loss.backward()
        assert loss.dtype==torch.float32 and loss.isfinite() and loss>=0 and x.grad.isfinite().all()

@steady
@given(two_batches(), st.floats(.05, 5))
def test_gaussian_probabilities_of_swapped_images(ab, tau):
    a, b = (x[:,:2] for x in ab)
    assert_close(gauss_prob(a, b, tau)+gauss_prob(b, a, tau), torch.ones(len(a)))
    assert (gauss_prob(a, b, tau)-.5).abs().le((bt_prob(a[:,0], b[:,0], tau)-.5).abs()+1e-6).all() # spread never adds certainty

def test_an_option_that_a_loss_lacks_is_refused():
    for kind,dim,option in (('bt',1,'weights'), ('gpm',2,'ties'), ('gauss',2,'weights'), ('pl',1,'gamma'), ('cls',1,'ties'), ('bt',1,'pairs')):
        with pytest.raises(ValueError, match=f"'{kind}' has no {option}"): make_loss(kind, dim, **{option: 1})


# the same losses, options and all, through the trainer

def run_config(folder, **kw):
    small = dict(use_cpu=True, disable_tqdm=True, save_strategy='no', per_device_train_batch_size=4, gradient_accumulation_steps=1)
    return RewardConfig(str(folder), **{**small, **kw})


def plain_loss(kind, v, truth, points, gamma=0., smoothing=0., margin=0., weights=(1.,1.)):
    "The loss of head vectors (numpy, float64), written out; tau is .1."
    if kind == 'cls': return cross_entropy(v[:,0], truth, gamma, smoothing, weights)
    c, r = v[:len(v)//2], v[len(v)//2:]
    if kind == 'bt': z = c[:,0]-r[:,0]-(2*truth-1)*margin*points
    elif kind == 'gpm': z = (c[:,0::2]*r[:,1::2]-c[:,1::2]*r[:,0::2]).sum(1)
    else: return cross_entropy((c[:,0]-r[:,0])/np.sqrt(.1**2+math.pi/8*(np.exp(2*c[:,1])+np.exp(2*r[:,1]))), truth, gamma, smoothing)
    return cross_entropy(z/.1, truth, gamma, smoothing)


SOFT_PAIRS = [dict(choice_dist=[3,1], c_rate=7, r_rate=1), dict(c_rate=4, r_rate=4), dict(c_rate=2, r_rate=1), dict(c_rate=5, r_rate=1.5)]


@pytest.mark.parametrize('kind,dim,gate,options', [
    ('bt', 1, False, dict(margin=.04)), ('bt', 1, False, dict(margin=.04, margin_by_ratings=True, smoothing=.1)),
    ('bt', 1, False, dict(focal_gamma=2.)), ('gpm', 2, False, dict(smoothing=.2)), ('gpm', 6, True, dict(focal_gamma=.5)), ('gpm', 6, False, {}),
    ('gauss', 2, False, dict(smoothing=.1)), ('cls', 1, False, dict(class_weights='balanced')), ('cls', 1, False, dict(class_weights=[3,.5], focal_gamma=1.))])
def test_through_the_trainer(kind, dim, gate, options, tmp_path):
    "Loss, and gradients on the head vectors, of a batch of the trainer: soft labels, ties and ratings included."
    torch.manual_seed(0)
    rm = RewardModel.from_pretrained(MODELS['tiny']/'base', device='cpu')
    rm.add_perspective('mine', PerspectiveConfig(kind, dim, gate=gate), lora_rank=4, lora_dropout=0.)
    rows = safety_labels(5, seed=1) if kind == 'cls' else [{**r, **more} for r, more in zip(alignment_pairs(4, seed=1), SOFT_PAIRS)]
    trainer = RewardTrainer(rm, run_config(tmp_path, **options), rows)
    records = trainer.train_dataset
    batch = trainer._prepare_inputs(trainer.data_collator(records[:5].rows))
    seen = []
    rm.register_forward_hook(lambda module, inputs, output: (output.retain_grad(), seen.append(output)) and None)
    loss = trainer.compute_loss(rm, batch, num_items_in_batch=10)
    loss.backward()
    vectors = seen[0].detach().double().numpy()
    truth = np.array([float(r['label' if kind == 'cls' else 'target']) for r in records])
    points = np.array([r['c_rate']-r['r_rate'] if options.get('margin_by_ratings') else 1. for r in records]) if kind != 'cls' else None
    weights = options.get('class_weights', (1.,1.))
    if weights == 'balanced': weights = (5/(2*(5-truth.sum())), 5/(2*truth.sum()))
    how = dict(gamma=options.get('focal_gamma', 0.), smoothing=options.get('smoothing', 0.), margin=options.get('margin', 0.), weights=weights)
    plain = lambda v: plain_loss(kind, v, truth, points, **how)*len(truth)/10
    assert loss.item() == pytest.approx(plain(vectors), rel=1e-4)
    want = gradient(plain, vectors)
    np.testing.assert_allclose(seen[0].grad.numpy(), want, rtol=2e-3, atol=1e-4*np.abs(want).max())
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in rm.named_parameters() if p.requires_grad and 'lora_A' not in n)
