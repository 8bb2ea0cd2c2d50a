"GenEval: every golden decision of the original code, positions, overlaps, summary; the detector and classifier through their own folders."
import json
from pathlib import Path

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from llava_reward_nb.core import CheckpointError, InputError
from llava_reward_nb.weights import check_loaded
from llava_reward_nb.evaluation.geneval import *

GOLDEN = json.loads((Path(__file__).parent/'golden'/'evaluation'/'geneval.json').read_text(encoding='utf-8'))


def told(label, detections): return [d.color for d in detections]


def detections(case): return [Detection(d['class'], tuple(d['box']), d['score'], color=d['color']) for d in case['detections']]


def rules(case):
    names = dict(threshold='threshold', counting_threshold='counting_threshold', max_objects='max_objects', max_overlap='max_overlap',
                 position_threshold='position_threshold')
    return Rules(**{names[k]: v for k, v in case.get('options', {}).items()})


def plain(reason): return {k: sorted(v) if k == 'found' and isinstance(v, list) else v for k, v in reason.items()}


@pytest.mark.parametrize('case', GOLDEN['cases'], ids=[c['name'] for c in GOLDEN['cases']])
def test_decision(case):
    v = judge(case['metadata'], detections(case), told, rules(case))
    want = case['expected']
    assert v.correct == want['correct'] and dict(v.kept) == want['kept_per_class']
    assert [plain(r) for r in v.reasons] == [plain(r) for r in want['reasons']]
    assert (str(v) == 'correct') == v.correct


def test_scenes_and_summary():
    rows = []
    for s in GOLDEN['scenes']:
        v = judge(check_task(s['metadata']), detections(s), told)
        assert v.correct == s['expected']['correct'] and [plain(r) for r in v.reasons] == [plain(r) for r in s['expected']['reasons']]
        rows.append(dict(tag=s['metadata']['tag'], prompt=s['metadata']['prompt'], correct=v.correct))
    got, want = geneval_scores(rows), GOLDEN['summary_of_scenes']
    assert got['tasks'] == {t: (v['correct'], v['images']) for t, v in want['per_task'].items()}
    assert got['images'][1] == want['images'] and got['prompts'][1] == want['prompts']
    assert round(got['overall'], 5) == want['overall']
    assert round(100*got['images'][0]/got['images'][1], 2) == want['percent_correct_images']
    assert round(100*got['prompts'][0]/got['prompts'][1], 2) == want['percent_correct_prompts']


def test_positions():
    for r in GOLDEN['relative_position']: assert sorted(box_relations(r['a'], r['b'])) == sorted(r['relations']), r


def test_overlaps():
    for r in GOLDEN['iou']: assert abs(box_iou(r['a'], r['b'])-r['iou']) < 1e-6, r


def test_defaults():
    want = GOLDEN['defaults']
    assert {k: getattr(RULES, k) for k in want} == want


BOX = st.tuples(*[st.integers(0, 300)]*4).map(lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3])))


@settings(max_examples=200, deadline=None)
@given(BOX, BOX)
def test_relations_reverse_when_swapped(a, b):
    other = {'left of': 'right of', 'right of': 'left of', 'above': 'below', 'below': 'above'}
    assert sorted(other[r] for r in box_relations(a, b)) == sorted(box_relations(b, a))
    assert abs(box_iou(a, b)-box_iou(b, a)) < 1e-12 and 0 <= box_iou(a, b) <= 1


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(['dog', 'cat']), st.floats(0, 1, width=32)), max_size=25), st.randoms())
def test_counting_is_exact_below_the_cap(found, rnd):
    ds = [Detection(k, (0, 0, 5, 5), s) for k, s in found]
    n = sum(k == 'dog' and round(s, 6) > .9 for k, s in found)
    for want in (1, 2, 3):
        task = dict(tag='counting', prompt='', include=[{'class': 'dog', 'count': want}], exclude=[{'class': 'dog', 'count': want+1}])
        assert judge(task, ds, told).correct == (n == want)


# ---- tasks and folders in the original layout

DOG = dict(tag='single_object', include=[{'class': 'dog', 'count': 1}], prompt='a photo of a dog')


def test_prompt_file(tmp_path):
    f = tmp_path/'evaluation_metadata.jsonl'
    tasks = [DOG, dict(tag='position', include=[{'class': 'bench', 'count': 1}, {'class': 'dog', 'count': 1, 'position': ['left of', 0]}], prompt='x')]
    f.write_text('\n'.join(map(json.dumps, tasks))+'\n')
    assert read_tasks(f) == tasks
    f.write_text(json.dumps(DOG)+'\n{"tag": ')
    with pytest.raises(InputError, match='line 2'): read_tasks(f)
    with pytest.raises(InputError, match='no such file'): read_tasks(tmp_path/'x.jsonl')


def test_sample_folders(tmp_path):
    for i in (0, 12): write_samples(tmp_path, i, DOG, [Image.new('RGB', (8, 8))]*4)
    assert (tmp_path/'00012'/'metadata.jsonl').is_file() and (tmp_path/'00012'/'samples'/'00003.png').is_file()
    got = read_samples(tmp_path)
    assert [(g['index'], g['task'], len(g['images'])) for g in got] == [(0, DOG, 4), (12, DOG, 4)]
    (tmp_path/'00012'/'metadata.jsonl').write_text('{"tag":"single_object","include":[{"class":"hound","count":1}],"prompt":""}')
    with pytest.raises(InputError, match="class 'hound'"): read_samples(tmp_path)


def test_tasks_nobody_could_meet_are_refused():
    ge = shapes_geneval()
    im = Image.new('RGB', (64, 64), 'white')
    with pytest.raises(InputError, match="class 'dog'"): ge(im, DOG)
    pink = dict(tag='colors', prompt='', include=[{'class': 'star', 'count': 1, 'color': 'pink'}])
    with pytest.raises(InputError, match="color 'pink'"): ge(im, pink)
    with pytest.raises(InputError, match='2 tasks for 1'): ge(im, [pink, pink])


def test_missing_and_leftover_weights_are_named():
    with pytest.raises(CheckpointError, match='lacks weights: a.bias'): check_loaded(dict(missing_keys=['a.bias']), 'here')
    with pytest.raises(CheckpointError, match='unknown weights: b'): check_loaded(dict(unexpected_keys={'b'}), 'here')
    with pytest.raises(CheckpointError, match='misshapen weights: c'): check_loaded(dict(mismatched_keys=[('c', (1,), (2,))]), 'here')
    check_loaded(dict(missing_keys=set(), unexpected_keys=set(), mismatched_keys=set()), 'here')


# ---- colours with a real (random) CLIP: the upstream recipe written again, independently

def test_color_classifier_follows_the_recipe(tmp_path):
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.configuration_clip import CLIPTextConfig, CLIPVisionConfig
    torch.manual_seed(0)
    text = CLIPTextConfig(vocab_size=99, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16,
                          bos_token_id=97, eos_token_id=98, pad_token_id=98).to_dict()
    vision = CLIPVisionConfig(image_size=16, patch_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2).to_dict()
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    words = {}

    class Batch(dict):
        def to(self, device): return self

    def tokenize(texts, **kw):
        rows = [[97]+[words.setdefault(w, len(words)) for w in t.replace('-', ' ').split()]+[98] for t in texts]
        n = max(map(len, rows))
        return Batch(input_ids=torch.tensor([r+[98]*(n-len(r)) for r in rows]),
                     attention_mask=torch.tensor([[1]*len(r)+[0]*(n-len(r)) for r in rows]))

    name = ColorClassifier(clip, tokenize, 'cpu')
    im = Image.effect_noise((40, 30), 90).convert('RGB')
    mask = np.zeros((30, 40), bool); mask[5:20, 8:30] = True
    d = Detection('dog', (8., 5., 30., 20.), .9, mask)
    got = name(im, 'dog', [d, d])
    a = np.asarray(im).copy(); a[~mask] = 153
    crop = Image.fromarray(a[5:20, 8:30])
    size = (int(16*22/15), 16)
    x = np.asarray(crop.resize(size, Image.BICUBIC), np.float32)[:, round((size[0]-16)/2):][:, :16]/255
    x = (x-[.48145466, .4578275, .40821073])/[.26862954, .26130258, .27577711]
    with torch.no_grad():
        img = clip.get_image_features(pixel_values=torch.tensor(x, dtype=torch.float32).permute(2, 0, 1)[None]).pooler_output[0]
        sims = []
        for c in COLOR_NAMES:
            es = []
            for t in (f'a photo of a {c} dog', f'a photo of a {c}-colored dog', f'a photo of a {c} object'):
                e = clip.get_text_features(**tokenize([t])).pooler_output[0]
                es.append(e/e.norm())
            e = torch.stack(es).mean(0)
            sims.append(float(100*(img/img.norm())@(e/e.norm())))
    assert got == [COLOR_NAMES[int(np.argmax(sims))]]*2


# ---- decisions that do not hang on the last bit; who judged

@pytest.mark.parametrize('least, tag', [(.3, 'single_object'), (.9, 'counting')])
def test_a_confidence_at_the_threshold_does_not_count(least, tag):
    "In whatever precision, and a rounding above it."
    up = np.float32(1)
    for s in (least, float(np.float32(least)), float(np.nextafter(np.float32(least), up)), np.nextafter(least, 1.)):
        assert keep_detections([Detection('dog', (0, 0, 5, 5), float(s))], tag) == {}
    assert keep_detections([Detection('dog', (0, 0, 5, 5), least+1e-5)], tag)


def test_equal_confidences_but_for_noise_keep_their_order():
    rng = np.random.default_rng(0)
    for _ in range(50):
        noise = 1e-8*rng.normal(size=5)
        found = [Detection('dog', (0, 0, 5, 5), .7+e, color=str(i)) for i, e in enumerate(noise)]
        assert [d.color for d in keep_detections(found, 'colors')['dog']] == list('43210')


def test_an_offset_of_exactly_half_is_no_relation():
    "Boxes of 50 by 0, 10 apart from a point: shortened by 5 of 10."
    for scale in np.geomspace(.01, 1e4, 400):
        for a, b in (((0, 0, 50, 0), (35, 0, 35, 0)), ((0, 0, 0, 50), (0, 35, 0, 35))):
            assert box_relations(scale*np.array(a), scale*np.array(b)) == []


def test_identity_covers_the_rules():
    from llava_reward_nb.store import identity
    one = shapes_geneval()
    assert identity(one) and identity(one) == identity(shapes_geneval())
    assert len({identity(one), *(identity(GenEval(one.detector, one.colors, Rules(**{k: .5}))) for k in ('threshold', 'counting_threshold', 'position_threshold'))}) == 4
    assert identity(GenEval(lambda images: [], one.colors)) is None
