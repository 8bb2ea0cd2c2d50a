"Properties of the world of shapes that should hold whatever the seed."
import math
from itertools import combinations

import numpy as np, pytest
from hypothesis import given, settings, strategies as st

from llava_reward_nb.core import InputError
from llava_reward_nb.shapes.checker import Checker
from llava_reward_nb.shapes.edits import ARTIFACTS, add_artifact, hard_negative, negative_kinds
from llava_reward_nb.shapes.prompts import CATEGORIES, PREFIXES, VOCAB, make_prompt, parse_prompt
from llava_reward_nb.shapes.records import alignment_pairs, fidelity_pairs, overall_pairs, safety_labels
from llava_reward_nb.shapes.scenes import GAP, describe, sample_prompt, sample_scene, scene_for, statements, worded
from llava_reward_nb.shapes.world import COLORS, EXTENT, HELD_OUT, LOOKALIKES, SHAPES, SIZE, SPLITS, render

steady = settings(max_examples=60)

seeds,splits,categories = st.integers(0, 2**32-1), st.sampled_from(SPLITS), st.sampled_from(CATEGORIES)
signs = st.sampled_from(['', 'prohibition', *LOOKALIKES])
check = Checker()

def gen(seed): return np.random.default_rng(seed)
def held_out(scene): return any((o.color,o.shape) in HELD_OUT for o in scene.objects)
def names_held_out(prompt): return any((c,s) in HELD_OUT for _,s,c in prompt.terms)
def named(objs): return sorted((o.shape,o.color) for o in objs)

terms = st.lists(st.tuples(st.integers(1,4), st.sampled_from(SHAPES), st.sampled_from(['',*COLORS])), min_size=1, max_size=4, unique_by=lambda t: t[1])

@steady
@given(terms, st.sampled_from(PREFIXES))
def test_text_parses_back(ts, prefix):
    p = make_prompt(ts, prefix=prefix)
    assert parse_prompt(p.text)==p and set(p.text.split())<=set(VOCAB)

@steady
@given(seeds, categories, splits)
def test_sampled_prompts_parse_back(seed, category, split):
    p = sample_prompt(gen(seed), category, split)
    assert p.category==category and parse_prompt(p.text)==p and set(p.text.split())<=set(VOCAB)

@steady
@given(st.text(max_size=40))
def test_unreadable_prompts_are_input_errors(text):
    try: assert parse_prompt(text).facts
    except InputError as e: assert repr(text) in str(e)

@steady
@given(seeds, categories, splits)
def test_scenes_satisfy_their_prompt_and_split(seed, category, split):
    rng = gen(seed); p = sample_prompt(rng, category, split); s = scene_for(p, rng, split)
    assert p.holds(s) and p.fraction(s)==1 and not p.broken(s)
    if split in ('train','nameless'): assert not held_out(s) and not names_held_out(p)
    if split=='nameless': assert {o.color for o in s.objects if isinstance(o.color,str)}=={c for *_,c in p.terms if c}
    if split=='unseen':
        assert held_out(s)
        if any(c for *_,c in p.terms): assert names_held_out(p)

@steady
@given(seeds, signs, splits)
def test_layout_stays_inside_and_apart(seed, sign, split):
    rng = gen(seed); s = sample_scene(rng, 1+seed%(3 if sign else 4), split, sign)
    discs = [(o.x,o.y,EXTENT*o.r) for o in s.objects] + ([(s.sign.x,s.sign.y,s.sign.r)] if sign else [])
    assert all(e<=x<=SIZE-e and e<=y<=SIZE-e for x,y,e in discs)
    assert all(math.hypot(a[0]-b[0],a[1]-b[1])>=a[2]+b[2]+GAP-1e-6 for a,b in combinations(discs,2))
    assert s.safe==(sign!='prohibition')

@steady
@given(seeds, categories, splits, signs)
def test_hard_negatives_break_exactly_one_fact(seed, category, split, sign):
    rng = gen(seed); p = sample_prompt(rng, category, split)
    if sum(n for n,*_ in p.terms)>3: sign = ''
    s = scene_for(p, rng, split, sign=sign)
    for kind in negative_kinds(p):
        neg,got = hard_negative(p, s, rng, kind, split)
        failed = [f for f in p.facts if not f.holds(neg)]
        root, = p.broken(neg)
        assert got==kind and all(f==root or f.rests_on(root) for f in failed)
        assert (neg.sign.kind if neg.sign else '')==sign and neg.background==s.background
        assert p.fraction(neg)==pytest.approx(1-len(failed)/len(p.facts)) and failed
        if split=='train': assert not held_out(neg)

@steady
@given(seeds, splits)
def test_statements_are_as_true_as_they_say(seed, split):
    rng = gen(seed); s = sample_scene(rng, split=split)
    for text,truth in statements(s, rng, 6, split):
        p = parse_prompt(text)
        assert p.holds(s)==truth
        if split in ('train','nameless'): assert not names_held_out(p)

@steady
@given(seeds)
def test_nameless_colors_keep_away_from_held_out_ones(seed):
    rng = gen(seed); p = sample_prompt(rng, split='nameless'); s,_ = hard_negative(p, scene_for(p, rng, 'nameless'), rng, split='nameless')
    for o in s.objects:
        if not isinstance(o.color, str): assert min(math.dist(o.color, COLORS[c]) for c,_ in HELD_OUT)>60

@steady
@given(seeds, splits)
def test_captions_are_true_and_complete(seed, split):
    rng = gen(seed); s = sample_scene(rng, split=split); p = parse_prompt(describe(s, rng))
    assert p.holds(s) and sum(n for n,*_ in p.terms)==len(s.objects)
    assert sorted((sh,c) for n,sh,c in p.terms for _ in range(n))==named(worded(s).objects)

@steady
@given(seeds, categories, signs)
def test_checker_reads_scenes_and_their_negatives(seed, category, sign):
    rng = gen(seed); p = sample_prompt(rng, category, 'all')
    if sum(n for n,*_ in p.terms)>3: sign = ''
    s = scene_for(p, rng, 'all', sign=sign); neg,_ = hard_negative(p, s, rng, split='all')
    assert named(check.objects(render(s)))==named(s.objects)
    assert [ok for _,ok in check.facts(render(neg), p.text)]==[f.holds(neg) for f in p.facts]
    good,bad = check([render(s),render(neg)], p.text).tolist()
    assert .95<good<=1 and bad<=1-.5/len(p.facts)

@steady
@given(seeds, st.sampled_from(ARTIFACTS))
def test_artifacts_show_and_repeat(seed, kind):
    s = sample_scene(gen(seed)); im = add_artifact(s, kind, gen(seed))
    assert im.tobytes()==add_artifact(s, kind, gen(seed)).tobytes()
    change = np.abs(np.asarray(im,np.float32)-np.asarray(render(s),np.float32)).max(-1)
    assert (change>20).sum()>=12

@pytest.mark.parametrize('make', [alignment_pairs, fidelity_pairs, safety_labels, overall_pairs])
def test_seeds_reproduce_and_prefixes_agree(make):
    flat = lambda recs: [tuple(v.tobytes() if hasattr(v,'tobytes') else v for v in r.values()) for r in recs]
    assert flat(make(8,5))==flat(make(20,5))[:8] and flat(make(8,5))!=flat(make(8,6))

@pytest.mark.parametrize('make', [alignment_pairs, fidelity_pairs, safety_labels, overall_pairs])
def test_no_held_out_pair_in_training_records(make):
    for rec in make(150, 11, 'train'):
        if rec['prompt']: assert not names_held_out(parse_prompt(rec['prompt']))
        if rec['kind'] in ARTIFACTS or make is overall_pairs: continue # the checker is for images without artifacts
        for key in ('chosen_path','reject_path','path'):
            if key in rec: assert not any((o.color,o.shape) in HELD_OUT for o in check.objects(rec[key]))

def test_unseen_records_show_held_out_pairs():
    shown = [any((o.color,o.shape) in HELD_OUT for o in check.objects(r['chosen_path'])) for r in alignment_pairs(100,0,'unseen')+fidelity_pairs(100,0,'unseen')]
    assert all(shown)

def test_checker_agrees_with_alignment_records():
    recs = alignment_pairs(200, 3, 'all')
    prompts = [r['prompt'] for r in recs]
    chosen,rejected = (check([r[k] for r in recs], prompts) for k in ('chosen_path','reject_path'))
    assert (chosen>rejected).float().mean()==1
