"Public data sets in their owners' layouts: what they say is kept, what cannot be used is named, and little is held in memory."
import io, json, os, random, tracemalloc
from datetime import date, datetime
from decimal import Decimal
from itertools import islice

import numpy as np, pyarrow as pa, pyarrow.parquet as pq, pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from llava_reward_nb.commands.items import llava_reward_data
from llava_reward_nb.core import InputError, load_image
from llava_reward_nb.data import load_records
from llava_reward_nb.evaluation.benchmarks import load_benchmark
from llava_reward_nb.sources import (EDIT_KINDS, SOURCES, Source, edit_prompt, html_report, open_source, prompt_negatives,
                                     report_data, stream_rows, unpack)

COLORS = dict(red=(255,0,0), blue=(0,0,255), lime=(0,255,0), gold=(255,215,0), navy=(0,0,128))


def encoded(color, format='png'):
    out = io.BytesIO()
    Image.new('RGB', (8,8), color).save(out, format)
    return out.getvalue()


def picture(path, color):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (8,8), color).save(path)


def parquet(path, rows, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **options)


def as_json(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))


def hub_image(color): return dict(bytes=encoded(color), path=None)


@pytest.fixture
def homes(tmp_path):
    "Every source, as its owner publishes it."
    h = {name: tmp_path/name for name in SOURCES}
    names = list(COLORS)
    for split in ('train', 'test'):
        for i, c in enumerate(names):
            picture(h['imagereward']/'images'/split/f'{split}_1'/f'{i}.webp', c)
            picture(h['hpdv2']/split/f'{i}.jpg', c)
    for i, c in enumerate(names):
        picture(h['hpdv3']/'images'/f'{i}.jpg', c)
        picture(h['llava']/'images'/f'{i}.png', c)
        picture(h['folder']/f'{i}.png', c)
    for split in ('train', 'test'):
        parquet(h['imagereward']/f'metadata-{split}.parquet', [
            dict(image_path=f'images/{split}/{split}_1/{i}.webp', prompt_id='000-1', prompt='a cat, oil on canvas', classification='Animals', image_amount_in_total=3,
                 rank=r, overall_rating=8-r, image_text_alignment_rating=a, fidelity_rating=f) for i, r, a, f in ((0,2,7,1), (1,1,5,1), (2,2,5,4))])
        pick = [dict(are_different=True, best_image_uid='x', caption=f'a dog {i}', has_label=True, image_0_uid=f'a{i}', image_1_uid=f'b{i}', jpg_0=encoded('red', 'jpeg'),
                     jpg_1=encoded('blue', 'jpeg'), label_0=l, label_1=1-l, model_0='m', model_1='n', ranking_id=i) for i, l in enumerate((1., 0., .5))]
        parquet(h['pickapic']/'data'/f'{split}-00000-of-00001-abc.parquet', pick)
        parquet(h['unsafebench']/'data'/f'{split}-00000-of-00001.parquet', [
            dict(image=hub_image(c), safety_label=l, category='Violence', source='Laion5B', text=t) for c, l, t in (('red','Safe','a hut'), ('blue','Unsafe',None))])
    as_json(h['hpdv2']/'train.json', [dict(prompt='a hut', image_path=['0.jpg','1.jpg'], human_preference=[0,1], raw_annotations=[1], user_hash='u'),
                                      dict(prompt='a sea', image_path=['2.jpg','3.jpg'], human_preference=[1,0])])
    as_json(h['hpdv2']/'test.json', [dict(prompt='a hut', image_path=['0.jpg','1.jpg','2.jpg'], rank=[3,1,1])])
    as_json(h['hpdv3']/'train.json', [dict(prompt='a sea', choice_dist=[1,5], confidence=.97, path1='images/1.jpg', path2='images/0.jpg', model1='flux', model2='sdxl'),
                                      dict(prompt='a bay', choice_dist=[2,2], confidence=.5, path1='images/2.jpg', path2='images/3.jpg', model1='flux', model2='sdxl')])
    as_json(h['llava']/'ir_pairs.json', [dict(prompt_id='7', prompt='a cow', chosen_path='images/0.png', reject_path='images/1.png', c_rate=2, r_rate=1)])
    (h['folder']/'metadata.csv').write_text('file_name,text,label\n0.png,a sign,1\n1.png,"a sign, red",0\n')
    return h


def color_of(image):
    seen = np.asarray(load_image(image)).mean((0,1))
    return min(COLORS, key=lambda c: np.abs(seen-COLORS[c]).sum())


def told(source):
    "Prompt, colours (the better first), target or label of each record."
    return [(r['prompt'], *(color_of(r[f]) for f in ('chosen_path','reject_path','path') if f in r), r['target'] if 'target' in r else r['label']) for r in source]


WANTED = dict(
    imagereward=[('a cat, oil on canvas','blue','red',1), ('a cat, oil on canvas','red','lime',.5), ('a cat, oil on canvas','blue','lime',1)],
    pickapic=[('a dog 0','red','blue',1), ('a dog 1','blue','red',1), ('a dog 2','red','blue',.5)],
    hpdv2=[('a hut','blue','red',1), ('a sea','lime','gold',1)],
    hpdv3=[('a sea','blue','red',5/6), ('a bay','lime','gold',.5)],
    unsafebench=[('a hut','red',1), ('','blue',0)],
    llava=[('a cow','red','blue',1)],
    folder=[('a sign','red',1), ('a sign, red','blue',0)])


@pytest.mark.parametrize('name', SOURCES)
def test_each_source_says_what_its_owner_says(homes, name):
    source = open_source(f'{name}:{homes[name]}')
    assert told(source) == WANTED[name] == told(source) and source.faults == []
    assert told(source.records()) == WANTED[name]
    back = load_records(unpack(source, homes[name]/'mine'))
    assert told(back) == WANTED[name]
    if name != 'folder': assert told(open_source(f'{name}:{source.files[0]}')) == WANTED[name] # a file instead of its folder


@pytest.mark.parametrize('perspective, want', [
    ('overall', [('blue','red',1), ('red','lime',.5), ('blue','lime',1)]),
    ('alignment', [('red','blue',1), ('red','lime',1), ('blue','lime',.5)]),
    ('fidelity', [('red','blue',.5), ('lime','red',1), ('lime','blue',1)])])
def test_perspectives_of_imagereward(homes, perspective, want):
    source = Source('imagereward', homes['imagereward'], perspective=perspective)
    assert [r[1:] for r in told(source)] == want
    dropped = Source('imagereward', homes['imagereward'], perspective=perspective, ties='drop')
    assert [r[1:] for r in told(dropped)] == [w for w in want if w[-1] != .5] and dropped.dropped == 1
    gaps = {r['chosen_path'].stem+r['reject_path'].stem: r['c_rate']-r['r_rate'] for r in source}
    if perspective == 'fidelity': assert gaps == {'01': 0, '20': 3, '21': 3}


@pytest.mark.parametrize('name, file', [('imagereward', 'metadata-test.parquet'), ('hpdv2', 'test.json'), ('pickapic', 'data'), ('unsafebench', 'data')])
def test_training_and_evaluation_read_the_same_judgements(homes, name, file):
    bench = load_benchmark(name, homes[name]/file if name != 'imagereward' else homes[name])
    seen = []
    for row in bench.rows:
        a, b = row['a'], row['b']
        if row['label'] == 1 and b: a, b = b, a
        colors = [color_of(bench.items[i].load()) for i in (a, b) if i]
        seen.append((bench.items[a].prompt, *colors, row['label'] if not b else .5 if row['label'] == .5 else 1))
    assert sorted(seen) == sorted(told(Source(name, homes[name], split='test')))


BROKEN = [
    ('pickapic', dict(label_0=.25), 'label_0'), ('pickapic', dict(label_1=1.), 'label_0'), ('pickapic', dict(caption=None), 'prompt'),
    ('pickapic', dict(jpg_0=b'no image'), 'chosen_path'), ('pickapic', dict(jpg_1=b''), 'reject_path'), ('pickapic', dict(has_label=False), 'label_0'),
    ('unsafebench', dict(safety_label='Perhaps'), 'safety_label'), ('unsafebench', dict(image=dict(bytes=b'x', path=None)), 'path'),
    ('hpdv2', dict(human_preference=[1]), 'human_preference'), ('hpdv2', dict(image_path=['0.jpg']), 'human_preference'), ('hpdv2', dict(image_path=['0.jpg','no.jpg']), 'chosen_path'),
    ('hpdv3', dict(choice_dist=[0,0]), 'choice_dist'), ('hpdv3', dict(choice_dist='many'), 'choice_dist'), ('hpdv3', dict(path2=None), 'reject_path'), ('hpdv3', dict(prompt=7), 'prompt'),
    ('llava', dict(c_rate=0), 'c_rate'), ('llava', dict(chosen_path='images/9.png'), 'chosen_path'), ('llava', dict(prompt=['x']), 'prompt'),
    ('imagereward', dict(rank=None), 'ranking'), ('imagereward', dict(image_path='nowhere.webp'), '_path'), ('imagereward', dict(prompt='another'), 'prompt')]


@pytest.mark.parametrize('name, change, field', BROKEN)
def test_a_bad_record_is_named_with_its_row_and_the_others_are_read(homes, tmp_path, name, change, field):
    file = Source(name, homes[name]).files[0]
    rows = pq.read_table(file).to_pylist() if file.suffix == '.parquet' else json.loads(file.read_text())
    if name == 'imagereward': bad = [rows[0] | change, *rows[1:]]
    else: bad = [*rows, dict(rows[0]) | change]
    (parquet if file.suffix == '.parquet' else as_json)(file, bad)
    source = Source(name, homes[name])
    good = list(source)
    assert source.faults and all(field in f.field for f in source.faults), source.faults
    assert all(f'of {file.name})' in f.reason for f in source.faults)
    assert len(good)+len({f.index for f in source.faults}) == source.seen
    if name != 'imagereward': assert told(good) == WANTED[name]
    with pytest.raises(InputError, match=f'{field}: '): source.records()
    with pytest.raises(InputError): unpack(iter([]), tmp_path/'none')
    if good:
        with pytest.warns(UserWarning, match='they are left out'): assert len(source.records(skip_bad=True)) == len(good)


def test_images_are_not_held(tmp_path):
    "Thirty-two megabytes of pictures pass through a few."
    rng = np.random.default_rng(0)
    rows = [dict(caption=f'p{i}', jpg_0=rng.bytes(250_000), jpg_1=encoded('red'), label_0=1.) for i in range(64)]
    for r in rows: r['jpg_0'] = encoded('blue')+r['jpg_0'] # a picture with a long tail
    parquet(tmp_path/'train-0.parquet', rows, row_group_size=4)
    del rows
    source = Source('pickapic', tmp_path)
    list(islice(source, 2)) # imports and caches
    tracemalloc.start()
    held = pa.total_allocated_bytes()
    n = 0
    for r in source:
        n += 1
        if n % 16 == 0: load_image(r['chosen_path'])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert n == 64 and peak < 4e6 and pa.total_allocated_bytes()-held < 10e6


def test_a_long_list_is_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr('llava_reward_nb.sources._PIECE', 1<<16)
    with open(tmp_path/'train.json', 'w') as f:
        f.write('['+','.join(json.dumps(dict(prompt='long '*200, path1=f'{i}.jpg', path2='x.jpg')) for i in range(6_000))+']')
    tracemalloc.start()
    assert sum(1 for _ in stream_rows(tmp_path/'train.json')) == 6_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < (tmp_path/'train.json').stat().st_size/5


values = st.recursive(st.none() | st.booleans() | st.integers(-2**60, 2**60) | st.text(max_size=8), lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.dictionaries(st.text(max_size=5), values, max_size=4), max_size=6), st.sampled_from([None, 1, 2]), st.integers(1, 9))
def test_any_json_list_streams_as_it_is(tmp_path, monkeypatch, rows, indent, piece):
    "Also when the text is read a few characters at a time."
    monkeypatch.setattr('llava_reward_nb.sources._PIECE', piece)
    (tmp_path/'t.json').write_text(json.dumps(rows, indent=indent, ensure_ascii=False), encoding='utf-8', errors='surrogatepass')
    assert list(stream_rows(tmp_path/'t.json')) == rows


def test_a_report_counts_what_is_there(homes):
    rows = json.loads((homes['hpdv3']/'train.json').read_text())
    turned = dict(rows[0], path1=rows[0]['path2'], path2=rows[0]['path1'])
    (homes['hpdv3']/'images'/'cut.jpg').write_bytes(encoded('red', 'jpeg')[:200])
    more = [*rows, rows[0], turned, dict(rows[1], path2='images/cut.jpg'), dict(rows[1], path2='images/none.jpg'), dict(prompt='', path1='images/4.jpg', path2='images/4.jpg')]
    as_json(homes['hpdv3']/'train.json', more)
    report = report_data(Source('hpdv3', homes['hpdv3']))
    facts = report.facts
    assert (facts['pairs'], facts['cannot be used'], facts['ties'], facts['by a majority']) == ('6', '2', '2', '3')
    assert (facts['repeated records'], facts['contradictions'], facts['the same picture twice in a pair']) == ('1', '1', '1')
    assert facts['prompts'] == '3 different, 1 empty, 5 said more than once' and facts['pictures'] == '5 different, in 10 places'
    assert 'record 5, reject_path: no such file' in str(report)
    page = html_report([report])
    assert page.count('<img') == 11 and 'http' not in page


def test_a_page_shows_text_as_text(homes):
    (homes['folder']/'metadata.csv').write_text('file_name,text,label\n0.png,<script>alert(1)</script>,1\n1.png,x & y,0\n')
    page = report_data(Source('folder', homes['folder']))._repr_html_()
    assert '<script' not in page and '&lt;script&gt;' in page and 'x &amp; y' in page


def test_the_command_writes_a_mixture_without_leaks(homes, tmp_path, capsys):
    (tmp_path/'test.txt').write_text('A HUT!\n')
    run = dict(weights=['1','1'], without=[str(tmp_path/'test.txt')], ties='drop')
    specs = [f"{n}:{homes[n]}" for n in ('hpdv2', 'hpdv3')]
    llava_reward_data.main(['write', *specs, '--out', str(tmp_path/'w'), '--weights', '1', '1', '--without', str(tmp_path/'test.txt'), '--ties', 'drop'])
    said = capsys.readouterr().out
    assert '1 records of pairs of hpdv2' in said and '1 ties of pairs of hpdv3' in said
    assert {r[0] for r in told(load_records(tmp_path/'w'/'records.jsonl'))} == {'a sea'}
    before = (tmp_path/'w'/'records.jsonl').read_bytes()
    llava_reward_data('write', specs, out=str(tmp_path/'w'), **run)
    assert (tmp_path/'w'/'records.jsonl').read_bytes() == before # the same seed, the same file


@pytest.mark.parametrize('args, code, said', [
    (['look', 'x'], 2, 'report or write'), (['report'], 2, 'name at least one source'), (['write', 'hpdv3:nowhere', '--out', 'w'], 1, 'a local copy of hpdv3 is'),
    (['report', 'nowhere.csv'], 1, 'no such file or folder'), (['report', 'x', '--weights', '1'], 2, '--weights is not of report')])
def test_the_command_explains_what_it_cannot_do(args, code, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e: llava_reward_data.main(args)
    out, err = capsys.readouterr()
    assert e.value.code == code and said in err and 'Traceback' not in err and os.listdir(tmp_path) == []


text = st.lists(st.sampled_from('a an the red blue orange Black two three 7 dogs house cat left of above behind near , . 4k mm and white gold'.split()), max_size=10).map(' '.join)
@settings(max_examples=80, deadline=None)
@given(text, st.sampled_from(EDIT_KINDS), st.integers(0, 99))
def test_an_edit_changes_the_prompt_and_only_the_words_it_names(prompt, kind, seed):
    edit = edit_prompt(prompt, kind, random.Random(seed))
    assert edit == edit_prompt(prompt, kind, random.Random(seed))
    if edit is None: return
    assert edit.prompt != prompt and edit.kind == kind and edit.old != edit.new
    drop = lambda words: [w for w in words.replace('… ', '').split() if w.lower() not in ('a', 'an')]
    rest = iter(drop(edit.prompt))
    assert all(w in rest for w in drop(prompt) if w not in edit.old.split()), edit # the other words, in their order


def test_negatives_keep_the_image_and_change_the_words(homes):
    source = Source('unsafebench', homes['unsafebench'])
    assert list(prompt_negatives(source)) == [] # 'a hut' has neither colour nor number
    (homes['folder']/'metadata.csv').write_text('file_name,text,label\n0.png,two red signs,1\n1.png,,0\n')
    made = load_records(list(prompt_negatives(Source('folder', homes['folder']))))
    assert len(made) == 1 and made[0]['chosen_path'] == made[0]['reject_path'] and made[0]['prompt'][0] == 'two red signs' != made[0]['prompt'][1]


def test_rankings_whose_images_are_inside(homes):
    "ImageRewardDB's other form: a row for each prompt, with lists of pictures."
    rows = [dict(prompt='p', image=[hub_image(c) for c in ('red','blue','lime')], rank=[2,1,3], fidelity_rating=[7,7,1], image_text_alignment_rating=[1,2,3])]
    parquet(homes['imagereward']/'train-0.parquet', rows)
    source = Source('imagereward', homes['imagereward']/'train-0.parquet')
    assert told(source) == [('p','blue','red',1), ('p','red','lime',1), ('p','blue','lime',1)]
    assert told(load_records(unpack(source, homes['imagereward']/'mine'))) == told(source)
    assert told(Source('imagereward', homes['imagereward']/'train-0.parquet', perspective='fidelity', ties='drop')) == [('p','red','lime',1), ('p','blue','lime',1)]


def test_images_elsewhere(homes, tmp_path):
    (homes['hpdv3']/'images').rename(tmp_path/'other')
    lost = Source('hpdv3', homes['hpdv3'])
    assert list(lost) == [] and len(lost.faults) == 4 and 'pass images=' in lost.faults[0].reason
    for r in (rows := json.loads((homes['hpdv3']/'train.json').read_text())):
        for k in ('path1', 'path2'): r[k] = r[k].removeprefix('images/')
    as_json(homes['hpdv3']/'train.json', rows)
    assert told(Source('hpdv3', homes['hpdv3'], images=tmp_path/'other')) == WANTED['hpdv3']


@pytest.mark.parametrize('name', ['pickapic', 'unsafebench', 'imagereward', 'hpdv2', 'hpdv3'])
@pytest.mark.parametrize('split', ['test', 'validation', 'test_unique'])
def test_a_split_is_not_another_whose_name_begins_alike(tmp_path, name, split):
    for end in ('-00000-of-00002-a.parquet', '-00001-of-00002-b.parquet'):
        for other in ('train', 'test', 'test_unique', 'validation', 'validation_unique'): parquet(tmp_path/'data'/f'{other}{end}', [dict(caption='')])
    assert [f.name for f in Source(name, tmp_path, split=split).files] == [f'{split}-00000-of-00002-a.parquet', f'{split}-00001-of-00002-b.parquet']
    parquet(tmp_path/'one'/f'{split}.parquet', [dict(caption='')])
    parquet(tmp_path/'one'/f'{split}_more.parquet', [dict(caption='')])
    assert [f.name for f in Source(name, tmp_path/'one', split=split).files] == [f'{split}.parquet']
    with pytest.raises(InputError, match='holds no file'): Source(name, tmp_path/'one', split=split[:3])


def test_dates_and_decimals_are_written_as_text(tmp_path):
    picture(tmp_path/'a.png', 'red')
    parquet(tmp_path/'own.parquet', [dict(path='a.png', prompt='a sign', label=1, made=datetime(2024, 5, 17, 9, 30), day=date(2024, 5, 17), price=Decimal('1.50'))])
    llava_reward_data('write', [str(tmp_path/'own.parquet')], out=str(tmp_path/'mine'))
    row = json.loads((tmp_path/'mine'/'records.jsonl').read_text())
    assert (row['made'], row['day'], row['price']) == ('2024-05-17 09:30:00', '2024-05-17', '1.50')
    assert told(load_records(tmp_path/'mine'/'records.jsonl')) == [('a sign', 'red', 1)]
