"Statistics against golden numbers; benchmarks from their upstream layouts; runs that are killed, resumed and re-tabulated; tables."
import io, json, math, os, re, shutil, signal, subprocess, sys, time, warnings
from pathlib import Path

import numpy as np, pandas as pd, pyarrow as pa, pyarrow.parquet as pq, pytest, torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from llava_reward_nb import stats
from llava_reward_nb.evaluation.benchmarks import SPECS, load_benchmark, load_prompts
from llava_reward_nb.core import InputError
from llava_reward_nb.evaluation.measures import PUBLISHED, measure, results
from llava_reward_nb.evaluation.report import make_table, table9
from llava_reward_nb.evaluation.runs import Run, run_benchmark
from llava_reward_nb.evaluation.timing import latency, latency_table
from llava_reward_nb.evaluation.geneval import write_samples
from llava_reward_nb.shapes.checker import Checker
from llava_reward_nb.store import identity, make_identity
from llava_reward_nb.evaluation.tables import Table

GOLDEN = json.loads((Path(__file__).parent/'golden'/'evaluation'/'statistics.json').read_text(encoding='utf-8'))


def near(a, b, tol=1e-6):
    a, b = float(a), math.nan if b is None else float(b) # golden files write 'nan' or null
    assert math.isnan(a) and math.isnan(b) or abs(a-b) <= tol, (a, b)


# ---- statistics

@pytest.mark.parametrize('case', GOLDEN['mj_bench']['by_threshold'], ids=lambda c: str(c['threshold']))
def test_mjbench_accuracy(case):
    g = GOLDEN['mj_bench']
    pred = stats.pair_decisions(g['score_0'], g['score_1'], case['threshold'])
    assert [{0: '0', 1: '1', .5: 'tie'}[p] for p in pred] == case['predictions']
    label, sub = np.array(g['label']), np.array(g['subcategory'])
    macro = []
    for where, want in [(np.ones(len(pred), bool), case['all']), *[(sub == k, v) for k, v in case['per_subcategory'].items()]]:
        p, t = pred[where], label[where]
        assert (len(p), int((p == t).sum()), int((p == .5).sum())) == (want['pairs'], want['correct'], want['ties'])
        near(stats.accuracy(p, t), want['accuracy_with_ties'])
        near(stats.accuracy(p, t, ties=False), want['accuracy_without_ties'])
        macro.append(stats.accuracy(p, t))
    near(np.mean(macro[1:]), case['macro_accuracy_with_ties'])


def test_pair_probabilities():
    g = GOLDEN['mj_bench']['pair_probabilities']
    p = np.array(g['probs'])
    pred = stats.pair_decisions(p, np.full(len(p), .5))
    near(stats.accuracy(pred, np.zeros(len(p))), g['proportion'])
    near(stats.accuracy(pred, np.zeros(len(p)), ties=False), g['proportion_without_ties'])


def test_bias():
    g = GOLDEN['mj_bench']['bias']
    scores, groups = [], []
    for k, v in g['per_occupation'].items():
        for m, x in stats.bias_scores(v['scores']).items(): near(x, v[m])
        scores += v['scores']; groups += [k]*len(v['scores'])
    for m, x in stats.mean_bias(scores, groups).items(): near(x, g['mean'][m])


@pytest.mark.parametrize('case', GOLDEN['correlations']['cases'], ids=lambda c: c['name'])
def test_correlations(case):
    for name, f in dict(pearson=stats.pearson, spearman=stats.spearman, kendall_tau_b=stats.kendall_tau_b).items():
        near(f(case['x'], case['y']), case[name])
        near(f(case['y'], case['x']), case[name])


@pytest.mark.parametrize('case', GOLDEN['binary']['cases'], ids=lambda c: c['name'])
def test_binary(case):
    pred = stats.threshold_decisions(case['rewards'])
    assert pred.astype(int).tolist() == case['predictions']
    near(stats.accuracy(pred, case['labels']), case['accuracy'])
    for key, positive in (('positive_1_safe', 1), ('positive_0_unsafe', 0)):
        for m, f in dict(f1=stats.f1, recall=stats.recall, precision=stats.precision).items():
            near(f(pred, case['labels'], positive), case[key][m])


def golden_particles():
    g = GOLDEN['particle_summary']
    rows = [dict(prompt_set='p', model='m', prompt=str(i), seed=0, particle=k, guidance='g', guidance_score=p['scores'][g['guidance']][k],
                 **{m: v[k] for m, v in p['scores'].items()}) for i, p in enumerate(g['prompts']) for k in range(4)]
    return g, pd.DataFrame(rows)


def test_particles_and_table9():
    g, frame = golden_particles()
    for p in g['prompts']:
        lead = p['scores'][g['guidance']]
        assert stats.best_particle(lead) == p['order_by_guidance_descending'][0]
        for m, want in p['per_metric'].items():
            got = stats.particle_summary(p['scores'][m], lead)
            for k in ('mean', 'max', 'min', 'std'): near(got[k], want[k])
            near(got['best'], want['best_particle'])
    t = table9(frame, list(g['final'])).df
    for m in g['final']:
        near(t[('particle mean', m)].iloc[0], g['final'][m]['mean'])
        near(t[('best particle', m)].iloc[0], g['final_best_particle_mean'][m])


ARRAYS = st.integers(2, 30).flatmap(lambda n: st.tuples(*[hnp.arrays(float, n, elements=st.integers(-4, 4).map(float))]*2, st.integers(0, 99)))


@settings(max_examples=60, deadline=None)
@given(ARRAYS)
def test_weights_are_repetitions(data):
    x, y, seed = data
    w = np.random.default_rng(seed).multinomial(len(x), np.full(len(x), 1/len(x)), size=3).astype(float)
    with np.errstate(all='ignore'):
        for f in (stats.pearson, stats.spearman, stats.kendall_tau_b):
            for got, r in zip(f(x, y, w), w.astype(int)): near(got, f(np.repeat(x, r), np.repeat(y, r)), 1e-9)
        for got, r in zip(stats.auroc(x, y > 0, w), w.astype(int)): near(got, stats.auroc(np.repeat(x, r), np.repeat(y > 0, r)), 1e-9)


@settings(max_examples=60, deadline=None)
@given(ARRAYS)
def test_symmetries(data):
    x, y, _ = data
    with np.errstate(all='ignore'):
        for f in (stats.spearman, stats.kendall_tau_b):
            near(f(x, y), f(x**3, y), 1e-9) # only order counts
            near(f(x, y), -float(f(-x, y)), 1e-9)
        near(stats.auroc(x, y > 0), 1-float(stats.auroc(-x, y > 0)), 1e-9)
    a, b = stats.pair_decisions(x, y), stats.pair_decisions(y, x)
    assert (a == 1-b).all()


# ---- readers: fixtures in the upstream layouts

def png(color=(0, 0, 0)):
    b = io.BytesIO(); Image.new('RGB', (8, 8), color).save(b, 'png')
    return b.getvalue()


def parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def picture(path, color=(0, 0, 0)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (8, 8), color).save(path)
    return path


def mj_rows(n=4): return [dict(caption=f'c{i}', image0=dict(bytes=png((i, 0, 0)), path='0.png'), image1=dict(bytes=png((0, i, 0)), path='1.png'), label=i % 2, info='sub') for i in range(n)]


def upstream(name, d):
    "Write a benchmark as its owners publish it; returns what `data=` is and the expected (kind, label) of the first rows."
    if name == 'mjbench':
        for p in ('alignment', 'safety', 'quality', 'bias'): parquet(d/'data'/f'{p}-00000-of-00001.parquet', mj_rows())
        return d, [('pair', 0), ('pair', 1)]
    if name == 'tifa160':
        picture(d/'annotated_images'/'coco_1_mini_dalle.jpg')
        rec = dict(text_id='coco_1', image_path='annotated_images/coco_1_mini_dalle.jpg', text='a cat', human_scores=[3, 4], human_avg=3.5)
        (d/'human_annotations').mkdir()
        (d/'human_annotations'/'human_annotations.json').write_text(json.dumps({'coco_1_mini_dalle': rec}))
        return d, [('rating', 3.5)]
    if name == 'unsafebench':
        parquet(d/'data'/'test-00000-of-00001.parquet', [dict(image=dict(bytes=png(), path=None), safety_label=s, category='Hate', source='Lexica', text='') for s in ('Safe', 'Unsafe')])
        return d, [('label', 1), ('label', 0)]
    if name == 'smid':
        picture(d/'images'/'b1_p1_1.jpg')
        (d/'smid_test.json').write_text(json.dumps([dict(path='/x/snapshots/3fd8/images/b1_p1_1.jpg', label=0, prompt='')]))
        return d, [('label', 0)]
    if name == 'imagereward':
        for i in range(3): picture(d/'images'/f'{i}.webp')
        (d/'test.json').write_text(json.dumps([dict(id='q', prompt='a', generations=[f'images/{i}.webp' for i in range(3)], ranking=[2, 1, 2])]))
        return d, [('pair', 1), ('pair', .5), ('pair', 0)]
    if name == 'hpdv2':
        for i in range(2): picture(d/'test'/f'{i}.jpg')
        (d/'test.json').write_text(json.dumps([dict(prompt='a', image_path=['0.jpg', '1.jpg'], rank=[1, 2])]))
        return d, [('pair', 0)]
    if name == 'pickapic':
        parquet(d/'data'/'test_unique-00000-of-00002.parquet', [dict(caption='a', jpg_0=png(), jpg_1=png((9, 9, 9)), label_0=v, label_1=1-v, image_0_uid=f'u{i}', image_1_uid=f'v{i}',
                                                                    ranking_id=i, has_label=True) for i, v in enumerate((1., 0., .5))])
        return d, [('pair', 0), ('pair', 1), ('pair', .5)]
    task = dict(tag='single_object', include=[{'class': 'dog', 'count': 1}], prompt='a photo of a dog')
    write_samples(d, 0, task if name == 'geneval' else dict(prompt='a photo of a dog'), [Image.new('RGB', (8, 8))]*2)
    return d, [('sample', None)]


@pytest.mark.parametrize('name', SPECS)
def test_upstream_layout(name, tmp_path):
    data, want = upstream(name, tmp_path)
    b = load_benchmark(name, data)
    assert [(r['kind'], r['label']) for r in b.rows[:len(want)]] == want
    assert all(i.load().size == (8, 8) for i in b.items.values()) and not b.faults
    assert {r[k] for r in b.rows for k in 'ab'}-{''} == set(b.items)
    assert b.hash == load_benchmark(name, data).hash


@pytest.mark.parametrize('name', SPECS)
def test_empty_folder_says_what_a_local_copy_looks_like(name, tmp_path):
    with pytest.raises(InputError) as e: load_benchmark(name, tmp_path)
    assert SPECS[name].local in str(e.value)


@pytest.mark.parametrize('name', [n for n in SPECS if SPECS[n].hub])
def test_hub_without_network(name, monkeypatch, tmp_path):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    import huggingface_hub.constants as c
    monkeypatch.setattr(c, 'HF_HUB_OFFLINE', True)
    with pytest.raises(InputError, match='pass a local copy'): load_benchmark(name, 'hub')


def test_gated_says_how_to_get_access(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    class Reply:
        headers, status_code, request, text = {}, 403, None, ''
    def gated(*a, **k): raise GatedRepoError('no access', response=Reply())
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', gated)
    with pytest.raises(InputError, match=r'accept its terms at https://huggingface.co/datasets/yiting/UnsafeBench.*hf auth login.*local copy'):
        load_benchmark('unsafebench', 'yiting/UnsafeBench')


def test_hub_download_is_read_like_a_local_copy(monkeypatch, tmp_path):
    import huggingface_hub
    asked = {}
    def download(repo, **kw): asked.update(repo=repo, **kw); return str(tmp_path)
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
    upstream('mjbench', tmp_path)
    assert len(load_benchmark('mjbench', 'MJ-Bench/MJ-Bench@abc123')) == 3*4+8
    assert (asked['repo'], asked['revision'], asked['repo_type']) == ('MJ-Bench/MJ-Bench', 'abc123', 'dataset')


def spoil(name, d):
    "Spoil one record of an upstream layout; returns a word that the error must hold."
    def edit(f, change):
        if f.suffix == '.parquet':
            rows = pq.read_table(f).to_pylist(); change(rows); pq.write_table(pa.Table.from_pylist(rows), f)
        else:
            rows = json.loads(f.read_text()); change(rows); f.write_text(json.dumps(rows))
    if name == 'mjbench': edit(d/'data'/'safety-00000-of-00001.parquet', lambda r: r[2].update(label=5)); return 'label: is 5'
    if name == 'tifa160': edit(d/'human_annotations'/'human_annotations.json', lambda r: r['coco_1_mini_dalle'].update(human_avg=9)); return 'human_avg: is 9'
    if name == 'unsafebench': edit(d/'data'/'test-00000-of-00001.parquet', lambda r: r[0].update(safety_label='?')); return "is '?'"
    if name == 'smid': edit(d/'smid_test.json', lambda r: r[0].update(label='moral')); return "label: is 'moral'"
    if name == 'imagereward': edit(d/'test.json', lambda r: r[0].update(ranking=[1, 2])); return '2 ranks for 3 images'
    if name == 'hpdv2': (d/'test'/'1.jpg').unlink(); return 'no such file: 1.jpg'
    if name == 'pickapic': edit(d/'data'/'test_unique-00000-of-00002.parquet', lambda r: r[1].update(label_0=.3)); return 'label_0: is 0.3'


@pytest.mark.parametrize('name', [n for n in SPECS if n not in ('geneval', 'drawbench')])
def test_bad_records_are_named_and_counted(name, tmp_path):
    upstream(name, tmp_path)
    word = spoil(name, tmp_path)
    with pytest.raises(InputError) as e: load_benchmark(name, tmp_path)
    assert word in str(e.value) and '1 of ' in str(e.value) and 'skip_bad=True' in str(e.value)
    if name in ('mjbench', 'unsafebench', 'pickapic'):
        with pytest.warns(UserWarning, match='they are left out'): b = load_benchmark(name, tmp_path, skip_bad=True)
        assert len(b.faults) == 1 and '1 records left out' in repr(b)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            run = run_benchmark(name, dict(flat=lambda i, p: torch.zeros(len(i))), b, out=tmp_path/'run')
        assert any('1 records could not be used' in n for n in make_table(name, run).notes)


@pytest.mark.parametrize('name,fields', [('mjbench', ('prompt', 'chosen_path', 'reject_path')), ('tifa160', ('text_id', 'image_path', 'text', 'human_avg')), ('unsafebench', ('path', 'label')),
                                         ('smid', ('path', 'label')), ('imagereward', ('prompt', 'generations', 'ranking')), ('hpdv2', ('prompt', 'image_path', 'rank')),
                                         ('pickapic', ('caption', 'jpg_0', 'jpg_1', 'label_0')), ('drawbench', ('prompt', 'image'))])
def test_a_record_that_lacks_a_field_is_named(name, fields, tmp_path):
    "JSON need not be rectangular: one record lacks what the others have."
    for k in 'ab': picture(tmp_path/f'{k}.png')
    whole = dict(prompt='p', chosen_path='a.png', reject_path='b.png', text_id='t_1', image_path=['a.png', 'b.png'] if name == 'hpdv2' else 'a.png', text='p', human_avg=3, path='a.png', label=1,
                 generations=['a.png', 'b.png'], ranking=[1, 2], rank=[1, 2], caption='p', jpg_0='a.png', jpg_1='b.png', label_0=1, image='a.png')
    whole = {k: v for k, v in whole.items() if k in fields}
    f = tmp_path/('alignment.json' if name == 'mjbench' else 'test.json')
    f.write_text(json.dumps([whole, whole])); assert not load_benchmark(name, f).faults
    for k in fields:
        if k == 'text_id': continue # what a rating is called; nothing depends on it
        f.write_text(json.dumps([whole, {n: v for n, v in whole.items() if n != k}, whole]))
        with pytest.raises(InputError, match='1 of 3 records cannot be used(.|\n)*record 1') as e: load_benchmark(name, f)
        assert 'None' in str(e.value), (k, e.value)


@pytest.mark.parametrize('name,column', [('mjbench', 'label'), ('unsafebench', 'image'), ('pickapic', 'jpg_1')])
def test_missing_column_is_named(name, column, tmp_path):
    upstream(name, tmp_path)
    for f in tmp_path.glob('**/*.parquet'): pq.write_table(pq.read_table(f).drop_columns([column]), f)
    with pytest.raises(InputError, match=f'lacks the column {column}'): load_benchmark(name, tmp_path)


def test_drawbench_prompts(tmp_path):
    (tmp_path/'p.csv').write_text('Prompts,Category\na cat,Counting\n')
    assert load_prompts('drawbench', tmp_path/'p.csv') == [dict(prompt='a cat', category='Counting')]


# ---- runs

class Counting:
    "Deterministic scores in tenths; counts the images it was shown."
    identity = 'counting'
    def __init__(self): self.seen = 0
    def __call__(self, images, prompts):
        self.seen += len(images)
        return torch.tensor([float(np.asarray(im.convert('L')).mean().round()) for im in images])/10


@pytest.mark.parametrize('name', SPECS)
def test_every_table_fills_offline(name, tmp_path):
    run = run_benchmark(name, dict(checker=Checker() if name not in ('smid', 'unsafebench') else Counting(), other=Counting()), out=tmp_path, limit=12)
    for kw in ({}, dict(intervals=True), dict(by='category') if name not in ('geneval', 'drawbench') else {}):
        t = make_table(name, run, **kw)
        assert isinstance(t, Table) and len(t) >= 2 and t.notes
        for f in (t.to_markdown, t.to_latex, t.to_html, t.to_csv): assert f().strip()
        assert any(n.startswith('n = ') for n in t.notes) or 'images' in t.df
    assert not run.scores().isna().any().any()


def test_images_are_opened_once_for_all_rewards(tmp_path, monkeypatch):
    from llava_reward_nb.evaluation.records import Item
    opened = []
    monkeypatch.setattr(Item, 'load', lambda self, load=Item.load: opened.append(self.id) or load(self))
    run = run_benchmark('imagereward', dict(a=Counting(), b=Counting(), c=Counting()), out=tmp_path)
    assert len(opened) == len(set(opened)) == len(run.items)


def test_shared_images_are_scored_once(tmp_path):
    r = Counting()
    run = run_benchmark('hpdv2', dict(r=r), out=tmp_path)
    assert r.seen == len(run.items) < 2*len(run.rows)


KILLED = '''
import sys, time, torch
from llava_reward_nb.evaluation import runs as evaluation
class Slow:
    identity = 'slow'
    calls = 0
    def __call__(self, images, prompts):
        self.calls += 1
        time.sleep(600 if sys.argv[3] == 'waits' and self.calls == 20 else .05) # waits to be killed
        with open(sys.argv[2], 'a') as f: f.write('x'*len(images))
        return torch.full((len(images),), 1.)
evaluation.ScoreStore.__init__.__defaults__ = (.2,)
evaluation.run_benchmark('unsafebench', dict(slow=Slow()), out=sys.argv[1], batch_size=4)
'''


def test_killed_run_goes_on(tmp_path):
    log, run = tmp_path/'log', tmp_path/'run'
    (tmp_path/'k.py').write_text(KILLED)
    cmd = lambda how: [sys.executable, str(tmp_path/'k.py'), str(run), str(log), how]
    root = str(Path(__file__).parents[1])
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=os.pathsep.join([root, os.environ.get('PYTHONPATH', '')]))
    p = subprocess.Popen(cmd('waits'), env=env)
    deadline = time.time()+120
    while time.time() < deadline and p.poll() is None and len(list((run/'scores').glob('[0-9]*.parquet'))) < 2: time.sleep(.02)
    p.send_signal(signal.SIGKILL); p.wait()
    kept, paid = len(Run(run).records), len(log.read_text())
    assert 0 < kept <= paid < 120
    subprocess.run(cmd('goes on'), check=True, env=env)
    assert len(log.read_text()) == paid+120-kept
    assert (Run(run).scores().slow == 1).all() and len(Run(run).scores()) == 120


def test_half_written_part_is_not_read(tmp_path):
    run = run_benchmark('smid', dict(r=Counting()), out=tmp_path, limit=8)
    (tmp_path/'scores'/'.00007.parquet.x.tmp').mkdir()
    (tmp_path/'scores'/'.00007.parquet.x.tmp'/'00007.parquet').write_bytes(b'half')
    assert len(run.records) == 8


def test_retabulating_scores_nothing(tmp_path):
    r = Counting()
    run = run_benchmark('pickapic', dict(r=r), out=tmp_path)
    seen = r.seen
    a, b = make_table('pickapic', tmp_path), make_table('pickapic', Run(tmp_path), threshold=.5)
    assert r.seen == seen and a.df.iloc[0, 0] >= b.df.iloc[0, 0]
    assert run.meta['versions']['torch'] and run.meta['hash'] and run.meta['rewards']['r']['identity']


class Net(torch.nn.Module):
    "Scores by its one weight, so that other weights give other numbers."
    def __init__(self, w, **settings): super().__init__(); self.l = torch.nn.Linear(1, 1, bias=False); self.l.weight.data[:] = w; self.settings,self.seen = settings,0
    @property
    def identity(self): return make_identity('Net', self.settings, self.l)
    def forward(self, images, prompts):
        self.seen += len(images)
        return torch.tensor([float(np.asarray(im).mean()) for im in images])*self.l.weight.item()


def warned(f, *args, **kw):
    "Result and the texts of its UserWarnings."
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('ignore'); warnings.simplefilter('always', UserWarning)
        out = f(*args, **kw)
    return out, [str(x.message) for x in w]


@pytest.mark.parametrize('other', [lambda: Net(2.), lambda: Net(1., crops=4), lambda: Counting(), lambda: (lambda i, p: torch.ones(len(i)))], ids=['weights', 'settings', 'class', 'function'])
def test_another_reward_under_the_name_is_scored_again(tmp_path, other):
    run = lambda r: warned(run_benchmark, 'smid', dict(net=r), out=tmp_path, limit=8)
    a, said = run(Net(1.)); first = a.scores(); assert not said
    same = Net(1.); _, said = run(same); assert not said and same.seen == 0 # loaded again: the same
    b, said = run(other())
    assert len(said) == 1 and "'net' is scored again, 8 scores" in said[0]
    want = run_benchmark('smid', dict(net=other()), out=tmp_path/'fresh', limit=8).scores()
    pd.testing.assert_frame_equal(b.scores(), want)
    back = Net(1.); c, _ = run(back)
    assert back.seen == 0; pd.testing.assert_frame_equal(c.scores(), first) # its scores had stayed


def test_another_version_scores_again(tmp_path, monkeypatch):
    from llava_reward_nb import store
    run_benchmark('smid', dict(net=Net(1.)), out=tmp_path, limit=4)
    monkeypatch.setattr(store, '__version__', '99.0')
    net = Net(1.); _, said = warned(run_benchmark, 'smid', dict(net=net), out=tmp_path, limit=4)
    assert net.seen == 4 and 'package version' in said[0]


def test_functions_under_one_name_are_never_mixed(tmp_path):
    "The second stops in the middle: no table may hold scores of both."
    n = [0]
    def stops(images, prompts):
        n[0] += len(images)
        if n[0] > 8: raise KeyboardInterrupt
        return torch.full((len(images),), 5.)
    run_benchmark('smid', dict(r=lambda i, p: torch.zeros(len(i))), out=tmp_path, limit=16)
    with pytest.raises(KeyboardInterrupt), warnings.catch_warnings():
        warnings.simplefilter('ignore'); run_benchmark('smid', dict(r=stops), out=tmp_path, limit=16, batch_size=4)
    s = Run(tmp_path).scores().r
    assert (s.dropna() == 5).all() and s.notna().sum() == 8
    t = make_table('smid', tmp_path)
    assert any('r: 8 items without a score (not scored yet)' in n for n in t.notes) and any('has not finished' in n for n in t.notes)


def test_a_trained_reward_is_noticed_on_disk(tmp_path):
    "The reward's folder gets other weights; the same command; the numbers are of the new weights."
    from safetensors.torch import load_file, save_file
    from llava_reward_nb.weights import MODELS
    shutil.copytree(MODELS['tiny']/'alignment', tmp_path/'m'/'mine')
    (tmp_path/'m'/'mine'/'checksums.json').unlink() # as its owner, who changes it on purpose
    config = tmp_path/'m'/'mine'/'reward_config.json'
    config.write_text(json.dumps(json.loads(config.read_text()) | dict(base=str(MODELS['tiny']/'base'))))
    go = lambda out: warned(run_benchmark, 'smid', [str(tmp_path/'m'/'mine')], out=tmp_path/out, limit=4)[0].scores().iloc[:, 0].to_numpy()
    before = go('re')
    head = tmp_path/'m'/'mine'/'head.safetensors'
    save_file({k: -v for k, v in load_file(head).items()}, head)
    after = go('re')
    np.testing.assert_allclose(after, go('new'), atol=1e-4); assert abs(after-before).max() > 1e-2


def test_every_reward_of_ours_says_who_it_is():
    from llava_reward_nb.evaluation.geneval import shapes_geneval
    from llava_reward_nb.rewards.registry import load_reward
    names = ['tiny', 'tiny/alignment', 'tiny/safety', 'tiny-clip', 'tiny-hpsv2', 'tiny-imagereward', 'tiny-vqascore', 'checker']
    who = [identity(load_reward(n, device='cpu')) for n in names]+[identity(shapes_geneval())]
    assert None not in who and len(set(who)) == len(who)
    assert [identity(load_reward(n, device='cpu')) for n in names] == who[:-1]
    assert identity(load_reward('tiny', device='cpu', dtype=torch.bfloat16)) not in who and identity(load_reward('tiny', device='cpu', num_crops=4)) not in who


def test_painted_over_images_are_scored_again(tmp_path):
    d = tmp_path/'data'; data, _ = upstream('drawbench', d)
    go = lambda r: warned(run_benchmark, 'drawbench', dict(r=r), data, out=tmp_path/'run')
    go(Counting())
    f = sorted(d.rglob('*.png'))[1]; stat = f.stat()
    Image.new('RGB', (8, 8), 'white').save(f); os.utime(f, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    r = Counting(); run, said = go(r)
    assert r.seen == 1 and any('1 images or prompts have changed' in s for s in said)
    assert sorted(run.scores().r) == [0, 25.5] and go(Counting())[1] == []
    Image.new('RGB', (8, 8), 'black').save(f); r = Counting(); run, _ = go(r) # as it was at first
    assert r.seen == 0 and sorted(run.scores().r) == [0, 0]


OTHER = '''
import sys, time, torch
from llava_reward_nb.evaluation import runs as evaluation
class Slow:
    def __init__(self, v): self.v, self.identity = v, f'slow {v}'
    def __call__(self, images, prompts): time.sleep(.02); return torch.full((len(images),), float(self.v))
evaluation.ScoreStore.__init__.__defaults__ = (.1,)
evaluation.run_benchmark('unsafebench', dict(second=Slow(2), both=Slow(3)), out=sys.argv[1], batch_size=4)
'''


class Slow:
    def __init__(self, v): self.v, self.identity = v, f'slow {v}'
    def __call__(self, images, prompts): time.sleep(.02); return torch.full((len(images),), float(self.v))


def test_two_evaluations_at_once(tmp_path):
    "Other rewards, and one that both ask, in one folder at one time."
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get('PYTHONPATH', '')]))
    p = subprocess.Popen([sys.executable, '-c', OTHER, tmp_path], env=env)
    while not (tmp_path/'run.json').exists() and p.poll() is None: time.sleep(.01)
    run_benchmark('unsafebench', dict(first=Slow(1), both=Slow(3)), out=tmp_path, batch_size=4)
    assert p.wait(timeout=300) == 0
    run = Run(tmp_path)
    assert set(run.rewards) == {'first', 'second', 'both'} and len(run.scores()) == 120 and not len(run.failures())
    assert all((run.scores()[n] == v).all() for n, v in (('first', 1), ('second', 2), ('both', 3)))
    assert all(r['finished'] for r in run.meta['rewards'].values())


@pytest.mark.parametrize('error', [ValueError, RuntimeError, InputError, KeyError, IndexError, TypeError, ZeroDivisionError, AssertionError, OSError, RecursionError, UnicodeError])
def test_one_bad_item_costs_no_other(tmp_path, error):
    def picky(images, prompts):
        if any(im.getpixel((0, 0)) == (3, 0, 0) for im in images): raise error('this one')
        return torch.ones(len(images))
    d = tmp_path/'data'; parquet(d/'alignment.parquet', mj_rows(6))
    run, said = warned(run_benchmark, 'mjbench', dict(picky=picky, fine=Counting()), d, out=tmp_path/'run')
    assert run.scores().isna().sum().to_dict() == dict(picky=1, fine=0)
    assert len(said) == 1 and '1 scores are missing: picky: 1 x' in said[0] and 'this one' in said[0] and 'image0' in said[0]
    assert any('picky: 1 items without a score' in n for n in make_table('mjbench', run).notes)


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_scores_that_are_no_numbers(tmp_path, value):
    "One among many: n drops, and the rest is as if it were not there."
    class Odd(Counting):
        identity = f'odd {value}'
        def __call__(self, images, prompts): return torch.tensor([value if p == bad else float(x) for x, p in zip(super().__call__(images, prompts), prompts)])
    clean = run_benchmark('tifa160', dict(r=Counting()), out=tmp_path/'a')
    bad = clean.items.prompt.iloc[0]
    run, said = warned(run_benchmark, 'tifa160', dict(r=Odd()), out=tmp_path/'b')
    k = int((run.items.prompt == bad).sum())
    assert f'the score is {value}' in said[0]
    got, want = results(run, intervals=False), results(clean, intervals=False)
    assert (got.n == 160-k).all() and (got.left_out == k).all() and (want.n == 160).all()
    rows = clean.rows; keep = ~rows.a.isin(run.items.index[run.items.prompt == bad])
    x = clean.scores().r.reindex(rows.a[keep]).to_numpy()
    near(got[got.metric == 'Pearson'].value.iloc[0], np.corrcoef(x, rows.label[keep].astype(float))[0, 1])
    assert measure(rows, clean.scores().r.replace(x[0], value), intervals=False)[0]['n'] < 160
    assert 'n = all: '+str(160-k)+'.' in make_table('tifa160', run, published=False).notes


@pytest.mark.parametrize('bug', [lambda i, p: None, lambda i, p: 'x', lambda i: 0, lambda i, p: torch.zeros(len(i), 2), lambda i, p: torch.full((len(i),), math.nan), lambda i, p: 1/0],
                         ids=['None', 'text', 'arguments', 'shape', 'nan', 'zero'])
def test_a_reward_that_fails_on_everything_stops(tmp_path, bug):
    seen = [0]
    def reward(images, prompts): seen[0] += len(images); return bug(images, prompts) if bug.__code__.co_argcount == 2 else bug(images, prompts, 0)
    with pytest.raises(InputError, match="'bug' fails on everything; on .* items, first with: "): run_benchmark('smid', dict(good=Counting(), bug=reward), out=tmp_path, batch_size=16)
    assert seen[0] <= 32 and Run(tmp_path).scores().good.notna().sum() == 16
    with pytest.raises(InputError, match='fails on everything'): run_benchmark('smid', dict(bug=reward), out=tmp_path/'few', limit=2)


def test_bad_items_at_the_beginning_stop_nothing(tmp_path):
    "What a reward refuses by name, and what fails after others have been scored by it in an earlier run."
    fails = [False]
    class R(Counting):
        def __call__(self, images, prompts):
            if fails[0]: raise RuntimeError('no')
            return super().__call__(images, prompts)
    run_benchmark('smid', dict(r=R()), out=tmp_path, limit=12)
    fails[0] = True
    run, said = warned(run_benchmark, 'smid', dict(r=R()), out=tmp_path)
    assert run.scores().r.notna().sum() == 12 and '108 x RuntimeError: no' in said[0]
    def refuses(images, prompts): raise InputError('a prompt that I cannot read')
    run, said = warned(run_benchmark, 'smid', dict(r=refuses, c=Counting()), out=tmp_path/'x')
    assert 'a prompt that I cannot read' in said[0] and run.scores().r.isna().all() and run.scores().c.notna().all()


def test_a_spent_budget_stops_and_keeps(tmp_path):
    from llava_reward_nb.rewards.grader import BudgetSpent
    class Paid(Counting):
        def __call__(self, images, prompts):
            if self.seen >= 32: raise BudgetSpent('the budget is spent')
            return super().__call__(images, prompts)
    with pytest.raises(BudgetSpent): run_benchmark('smid', dict(r=Paid()), out=tmp_path)
    assert Run(tmp_path).scores().r.notna().sum() == 32
    r = Counting(); run_benchmark('smid', dict(r=r), out=tmp_path); assert r.seen == 120-32


@pytest.mark.parametrize('name', ['reward', 'item', 'prompt', 'model', 'guidance', 'error', 'seed', 'score', 'note', 'image', 'images', 'particle', 'category', '', 7])
def test_names_of_columns_are_no_names_of_rewards(tmp_path, name):
    r = Counting()
    with pytest.raises(InputError, match='name'): run_benchmark('drawbench', {name: r}, out=tmp_path/'x')
    assert r.seen == 0 and not (tmp_path/'x').exists()


def test_folder_that_cannot_be_written_is_found_first(tmp_path):
    (tmp_path/'file').write_text('x'); r = Counting()
    with pytest.raises(InputError, match='cannot be written'): run_benchmark('smid', dict(r=r), out=tmp_path/'file')
    with pytest.raises(InputError, match='cannot be written'): run_benchmark('smid', dict(r=r), out=tmp_path/'file'/'sub')
    assert r.seen == 0


def test_foreign_and_damaged_files_in_a_run(tmp_path):
    run = run_benchmark('smid', dict(r=Counting()), out=tmp_path, limit=4)
    for n in ('._00000.parquet', '.DS_Store', 'notes.txt', 'copy of scores.parquet'): (tmp_path/'scores'/n).write_bytes(b'\0\5')
    (tmp_path/'._run.json').write_bytes(b'\0')
    assert run.scores().r.notna().all() and len(make_table('smid', tmp_path))
    part = next(p for p in (tmp_path/'scores').iterdir() if len(p.stem) == 29)
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(InputError, match=f'{part.name}: damaged'): run.scores()
    part.unlink(); r = Counting(); run_benchmark('smid', dict(r=r), out=tmp_path, limit=4); assert r.seen == 4
    (tmp_path/'run.json').write_text('{"benchmark":')
    with pytest.raises(InputError, match='run.json: damaged'): Run(tmp_path)


def test_runs_of_an_earlier_version(tmp_path):
    "Numbered parts, items instead of keys, no identities: tables are made, and nothing is taken for a score of today's reward."
    run = run_benchmark('smid', dict(r=Counting()), out=tmp_path, limit=4)
    want, df = run.scores(), run.records
    for p in (tmp_path/'scores').glob('*.parquet'): p.unlink()
    df[['item', 'reward', 'score', 'note', 'error', 'seconds', 'pixels']].to_parquet(tmp_path/'scores'/'00000.parquet')
    meta = run.meta; meta['rewards'] = dict(r=dict(spec='', repr='r', range='', fingerprint='abc')); (tmp_path/'run.json').write_text(json.dumps(meta))
    pd.testing.assert_frame_equal(Run(tmp_path).scores(), want); assert not any('finished' in n for n in make_table('smid', tmp_path).notes)
    r = Counting(); run, said = warned(run_benchmark, 'smid', dict(r=r), out=tmp_path, limit=4)
    assert r.seen == 4 and 'identity not stored' in said[0]; pd.testing.assert_frame_equal(run.scores(), want)


def test_images_that_do_not_open_are_named_and_counted(tmp_path):
    d = tmp_path/'data'
    data, _ = upstream('imagereward', d)
    (d/'images'/'2.webp').write_bytes(b'broken')
    with pytest.warns(UserWarning, match='1 scores are missing.*2.webp'): run = run_benchmark('imagereward', dict(r=Counting()), data, out=tmp_path/'run')
    t = make_table('imagereward', run, published=False)
    assert any('1 items without a score' in n for n in t.notes) and 'n = all: 1.' in t.notes
    Image.new('RGB', (8, 8), 'white').save(d/'images'/'2.webp') # mended: the next run fills the gap
    run = run_benchmark('imagereward', dict(r=Counting()), data, out=tmp_path/'run')
    assert not len(run.failures()) and 'n = all: 2.' in make_table('imagereward', run, published=False).notes


def test_images_in_parquet_that_do_not_open(tmp_path):
    d = tmp_path/'data'
    rows = mj_rows(6); rows[3]['image1']['bytes'] = b'nothing'; rows[4]['image0'] = dict(bytes=None, path=None)
    parquet(d/'safety.parquet', rows)
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('ignore'); warnings.simplefilter('always', UserWarning)
        run = run_benchmark('mjbench', dict(r=Counting()), d, out=tmp_path/'run')
    assert 'row 3, image1' in str(w[0].message) and 'row 4, image0' in str(w[0].message)
    assert 'n = safety: 4.' in make_table('mjbench', run, published=False).notes


# ---- tables

def test_best_and_second_are_marked_in_every_export():
    t = Table(pd.DataFrame({'x': [1., 3., 2.], 'n': [5., 5., 5.]}, index=list('abc')), better=dict(n=''))
    assert '**3.0**' in t.to_markdown() and '<u>2.0</u>' in t.to_markdown()
    assert r'\textbf{3.0}' in t.to_latex() and r'\underline{2.0}' in t.to_latex()
    assert '<b>3.0</b>' in t.to_html() and '<u>2.0</u>' in t.to_html() and '**5' not in t.to_markdown()


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=20), st.floats(allow_nan=True, allow_infinity=False, width=32))
def test_any_label_survives_the_exports(label, value):
    t = Table(pd.DataFrame({label: [value, 1.]}, index=[label, 'other']), title=label, notes=[label])
    for f in (t.to_markdown, t.to_latex, t.to_html, t.to_csv, t.__repr__): f()
    assert '<script' not in t.to_html().replace('&lt;', '') or '<script' not in label
    bare = re.sub(r'\\[{}]', '', t.to_latex()) # without those that are letters
    assert bare.count('{') == bare.count('}')


def test_table9_needs_each_particle_once():
    _, frame = golden_particles()
    with pytest.raises(InputError, match='rows repeat a particle'): table9(pd.concat([frame, frame]))
    with pytest.raises(InputError, match='lacks the columns guidance_score'): table9(frame.drop(columns='guidance_score'))


@pytest.mark.parametrize('name', ['mjbench', 'tifa160', 'unsafebench', 'smid', 'imagereward', 'pickapic', 'hpdv2'])
def test_one_name_in_two_runs_is_two_rows(name, tmp_path):
    a = run_benchmark(name, dict(r=Counting(), only=Counting()), out=tmp_path/'a'/'run')
    b = run_benchmark(name, dict(r=lambda i, p: -Counting()(i, p)), out=tmp_path/'b'/'run', limit=10)
    both, one, two = (make_table(name, x, published=False) for x in ([a, b], a, b))
    assert list(both.df.index) == ['r (a/run)', 'only', 'r (b/run)']
    for label, t, row in (('r (a/run)', one, 'r'), ('only', one, 'only'), ('r (b/run)', two, 'r')):
        pd.testing.assert_series_equal(both.df.loc[label], t.df.loc[row].reindex(both.df.columns), check_names=False)
    assert any('n differs between rewards' in n and 'r (b/run)' in n for n in both.notes)
    with pytest.raises(InputError, match='named twice'): make_table(name, [a, tmp_path/'a'/'run'])


@pytest.mark.parametrize('name', ['geneval', 'drawbench'])
def test_one_model_in_two_runs_is_two_rows(name, tmp_path):
    a, b = (run_benchmark(name, dict(r=Counting()), out=tmp_path/k, limit=n) for k, n in (('a', 12), ('b', 6)))
    both, one, two = (make_table(name, x, published=False).df for x in ([a, b], a, b))
    assert len(both) == len(one)+len(two) and sorted(both.images) == sorted([*one.images, *two.images])
    for k, t in (('a', one), ('b', two)):
        for m, g in t.index: pd.testing.assert_series_equal(both.loc[(f'{m} ({k})', g)], t.loc[(m, g)].reindex(both.columns), check_names=False)


def test_our_row_named_as_a_published_one(tmp_path):
    for name in ('mjbench', 'tifa160'):
        label = PUBLISHED[name][0][0]
        run = run_benchmark(name, {label: Counting()}, out=tmp_path/name, limit=4)
        t = make_table(name, run)
        assert label not in t.sources and f'{label} (published)' in t.sources and t.df.index.is_unique
    f = pd.DataFrame([{'reward': 'VQAScore', 'seconds per sample': 1., 'fastest': 1., 'slowest': math.inf, 'images': 1, 'batch': 1, 'device': 'cpu'}])
    t = latency_table(f)
    assert t.df.loc['VQAScore', 'seconds per sample'] == 1 and 'VQAScore (published)' in t.sources and 'inf' not in repr(t)
    with pytest.raises(InputError, match='timed twice'): latency_table(pd.concat([f, f]))
    assert len(latency_table(pd.concat([f, f.assign(device='cuda')]), published=False)) == 2


def test_infinite_particles_are_missing_particles():
    g, frame = golden_particles(); m = list(g['final'])
    want = table9(frame.assign(**{m[0]: frame[m[0]].where(frame.index != 1)}), m)
    for value in (math.inf, -math.inf):
        bad = frame.copy(); bad.loc[1, m[0]] = value
        got = table9(bad, m)
        pd.testing.assert_frame_equal(got.df, want.df); assert got.notes == want.notes and np.isfinite(got.df.to_numpy()).all()
        assert any(f'{m[0]}: 1 of {len(frame)} particles have no finite score' in n for n in got.notes)


def test_a_prompt_without_guidance_scores_has_no_best_particle():
    g, frame = golden_particles(); m = list(g['final'])
    lost = frame.copy(); lost.loc[lost.prompt == '0', 'guidance_score'] = math.inf
    t, want = table9(lost, m), table9(frame[frame.prompt != '0'], m)
    for c in m: near(t.df['best particle', c].iloc[0], want.df['best particle', c].iloc[0])
    assert t.df['', 'n'].iloc[0] == len(g['prompts']) and any('fewer than n' in n and f'best {m[0]} {len(g["prompts"])-1}' in n for n in t.notes)
    none = table9(frame.assign(guidance_score=math.nan), m) # nothing guided: the first particle
    near(none.df['best particle', m[0]].iloc[0], frame[frame.particle == 0][m[0]].mean())


@pytest.mark.parametrize('suffix', ['csv', 'tsv', 'json', 'jsonl', 'parquet'])
def test_particles_from_every_table(tmp_path, suffix):
    from llava_reward_nb.files import write_table
    g, frame = golden_particles(); m = list(g['final'])
    frame['guidance_score'] = frame.guidance_score.where(frame.prompt != '1'); frame.loc[3, m[0]] = math.nan
    frame['prompt'] = ['007 '+p for p in frame.prompt]
    write_table(frame, tmp_path/f'p.{suffix}')
    a, b = table9(tmp_path/f'p.{suffix}'), table9(frame)
    np.testing.assert_allclose(a.df.to_numpy(), b.df.to_numpy()); assert list(a.df.columns) == list(b.df.columns) and a.notes == b.notes


def test_particles_with_gaps_in_their_names():
    _, frame = golden_particles()
    for c in ('prompt_set', 'model', 'prompt', 'seed', 'particle', 'guidance'):
        with pytest.raises(InputError, match=f'1 rows have no {c}'): table9(frame.assign(**{c: frame[c].where(frame.index != 5)}))


def test_rows_without_a_category_are_counted(tmp_path):
    run = run_benchmark('mjbench', dict(r=Counting()), out=tmp_path, limit=6)
    rows = run.rows
    rows['category'] = rows.category.where(rows.index > 2)
    rows.to_parquet(tmp_path/'rows.parquet')
    assert results(run, 'category', intervals=False).drop_duplicates(['part', 'kind', 'category']).n.sum() == len(rows)


def test_latency_waits_and_warms_up():
    calls = []
    def reward(images, prompts): calls.append(len(images)); return torch.zeros(len(images))
    f = latency(dict(r=reward), [Image.new('RGB', (8, 8))]*5, 'x', batch_size=2, repeats=3, warmup=2)
    assert calls == [2, 2, 1]*5 and f['images'].item() == 5
    assert 'LLaVA-Reward [1]' in repr(latency_table(f))


def test_tiny_bundle_is_better_than_chance_at_what_it_learned(tmp_path):
    names = {p: f'tiny/{p}' for p in ('alignment', 'safety', 'overall_bt')}
    run = run_benchmark('mjbench', names, out=tmp_path, limit=20)
    v = make_table('mjbench', run, published=False).df
    assert v.loc['alignment', 'alignment, with ties'] > 60 and v.loc['safety', 'safety, with ties'] > 60
    assert run.meta['rewards']['safety']['spec'] == 'tiny/safety'
