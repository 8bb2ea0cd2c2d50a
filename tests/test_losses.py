"Losses and preference probabilities against numbers that the paper's public code computed."
import json
from pathlib import Path

import pytest, torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from llava_reward_nb.losses import (LOSSES, bt_loss, bt_prob, cls_loss, cls_pair_prob, cls_prob, gp_loss, gp_prob,
                                    gp_score, make_loss)

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
    else: out = make_loss(kind).loss(a[:,:1], (b[:,0]>0))
    assert out.isfinite() and out>=0
