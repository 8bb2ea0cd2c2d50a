"Records from every kind of source, every fault named, and what goes in comes out."
import json, warnings
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from llava_reward_nb.core import InputError
from llava_reward_nb.files import write_table
from llava_reward_nb.data import (Mixture, RewardCollator, RewardRecords, check_image, drop_leaks, held_out, load_records, mix_records,
                                  prompt_words, record_kind, split_by_prompt)

FORMATS = ('json', 'jsonl', 'csv', 'parquet')

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp('records')
    for i,c in enumerate(('red', 'blue', 'green')): Image.new('RGB', (20+i,16), c).save(home/f'{c}.png')
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200,200,3), dtype=np.uint8))
    for f in ('noise.jpg', 'noise.png', 'noise.webp'): noise.save(home/f)
    return home

def pair(**kw): return dict(prompt='a red wall', chosen_path='red.png', reject_path='blue.png', c_rate=1, r_rate=0) | kw
def label(**kw): return dict(prompt='', path='red.png', label=1) | kw
def processor(images, prompts):
    return dict(width=torch.tensor([im.width for im in images]), letters=torch.tensor([len(p) for p in prompts]))

@pytest.mark.parametrize('suffix', FORMATS)
def test_pairs_from_files(home, suffix):
    rows = [pair(), pair(c_rate=2, r_rate=2, note='kept'), pair(prompt='007')]
    recs = load_records(write_table(rows, home/f'pairs.{suffix}'))
    assert recs.kind=='pair' and [r['target'] for r in recs]==[1., .5, 1.]
    assert recs[0]['chosen_path']==home/'red.png' and recs[1]['note']=='kept' and recs[2]['prompt']=='007'

@pytest.mark.parametrize('suffix', FORMATS)
def test_labels_from_files(home, suffix):
    rows = [label(category='x', source='y', safety_label='Safe'), label(label=0, category='', source='', safety_label='')]
    recs = load_records(write_table(rows, home/f'labels.{suffix}'))
    assert recs.kind=='label' and [r['label'] for r in recs]==[1,0] and recs[0]['category']=='x' and recs[0]['prompt']==''

@pytest.mark.parametrize('suffix', ('json', 'jsonl', 'parquet'))
def test_two_prompts(home, suffix):
    recs = load_records(write_table([pair(prompt=['a red wall', 'a blue wall'])], home/f'two.{suffix}'))
    assert recs[0]['prompt']==['a red wall', 'a blue wall']
    assert RewardCollator(processor)([recs[0]])['letters'].tolist()==[10,11]

def test_csv_that_holds_only_numbers_as_prompts(home):
    (home/'n.csv').write_text('prompt,chosen_path,reject_path\n007,red.png,blue.png\n1e3,red.png,blue.png\n')
    assert [r['prompt'] for r in load_records(home/'n.csv')]==['007', '1e3']

def test_csv_with_empty_ratings(home):
    (home/'e.csv').write_text('prompt,chosen_path,reject_path,c_rate,r_rate\nNA,red.png,blue.png,,\nx,red.png,blue.png,3,3\n')
    recs = load_records(home/'e.csv')
    assert [r['target'] for r in recs]==[1., .5] and recs[0]['prompt']=='NA'

def test_images_inside_parquet(home):
    raw = lambda f: dict(bytes=(home/f).read_bytes(), path=None)
    write_table([pair(chosen_path=raw('red.png'), reject_path=raw('blue.png'))], home/'inside.parquet')
    recs = load_records(home/'inside.parquet')
    assert RewardCollator(processor)([recs[0]])['width'].tolist()==[20,21]

def test_other_sources(home):
    rows = [pair(), pair(prompt='b')]
    for source in (rows, iter(rows), pd.DataFrame(rows), load_records(rows, folder=home)):
        assert len(load_records(source, folder=home))==2
    with pytest.raises(InputError, match='one split'): load_records(dict(train=rows))

def test_paths_start_at_the_file_then_at_the_working_directory(home, tmp_path, monkeypatch):
    write_table([pair(reject_path='here.png')], home/'mixed.json')
    Image.new('RGB', (9,9)).save(tmp_path/'here.png'); Image.new('RGB', (9,9)).save(tmp_path/'red.png')
    monkeypatch.chdir(tmp_path)
    r = load_records(home/'mixed.json')[0]
    assert r['chosen_path']==home/'red.png' and r['reject_path']==Path('here.png')

FAULTS = [(pair(prompt=None), 'prompt', 'must be a string'), (pair(prompt=3), 'prompt', 'must be a string'),
          (pair(prompt=['a']), 'prompt', 'list of two'), (pair(prompt=['a','b','c']), 'prompt', 'list of two'),
          (pair(chosen_path='nope.png'), 'chosen_path', 'no such file'), (pair(reject_path=''), 'reject_path', 'must be a path'),
          (pair(reject_path=7), 'reject_path', 'must be a path'), (pair(c_rate='high'), 'c_rate', 'must be a number'),
          (pair(c_rate=0, r_rate=1), 'c_rate', 'swap'), (pair(r_rate=None), 'c_rate', 'only one rating'),
          (dict(prompt='a', chosen_path='red.png'), 'reject_path', 'is missing'), ('red.png', 'record', 'not a dict')]

@pytest.mark.parametrize('row,field,reason', FAULTS)
def test_faults_of_pairs(home, row, field, reason):
    with pytest.raises(InputError) as e: load_records([pair(), row], folder=home)
    assert f'1 of 2 records cannot be used:\n  record 1, {field}: ' in str(e.value) and reason in str(e.value)

@pytest.mark.parametrize('value', [2, -1, .5, None, 'safe', '', [1]])
def test_faulty_labels(home, value):
    with pytest.raises(InputError, match='record 1, label: is .* a label is 1'): load_records([label(), label(label=value)], folder=home)

@pytest.mark.parametrize('keep', [0, 10, 200, -30])
@pytest.mark.parametrize('file', ['noise.jpg', 'noise.png', 'noise.webp'])
def test_cut_images_are_found(home, tmp_path, file, keep):
    data = (home/file).read_bytes()
    (tmp_path/file).write_bytes(data[:keep])
    with pytest.raises(InputError, match=f'record 0, chosen_path: .*{file}'): load_records([pair(chosen_path=tmp_path/file)], folder=home)
    check_image(home/file)

def test_faults_are_counted_and_the_first_five_are_listed(home):
    with pytest.raises(InputError) as e: load_records([label()]+[label(label=5)]*8, folder=home)
    assert '8 of 9 records' in str(e.value) and str(e.value).count('record ')==5 and '… and 3 more' in str(e.value)

def test_skip_bad(home):
    with pytest.warns(UserWarning, match='2 of 3 records'):
        recs = load_records([pair(prompt=None), pair(), pair(chosen_path='no.png', c_rate='x')], folder=home, skip_bad=True)
    assert len(recs)==1 and [(f.index, f.field) for f in recs.faults]==[(0,'prompt'), (2,'chosen_path'), (2,'c_rate')]

def test_a_good_file_warns_of_nothing(home):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert load_records([pair()], folder=home).faults==[]

def test_a_file_that_is_no_list(home):
    (home/'d.json').write_text(json.dumps(dict(data=[pair()])))
    with pytest.raises(InputError, match='holds a dict'): load_records(home/'d.json')
    (home/'broken.json').write_text('[{"prompt": ')
    with pytest.raises(InputError, match='broken.json'): load_records(home/'broken.json')

def test_collate_in_workers(home):
    recs = load_records([pair(), pair(reject_path='green.png', c_rate=0), label()|pair(c_rate=None, r_rate=None)], folder=home)
    batches = list(DataLoader(recs, batch_size=2, collate_fn=RewardCollator(processor), num_workers=1))
    assert [b['width'].tolist() for b in batches]==[[20,20,21,22], [20,21]]
    assert [b['target'].tolist() for b in batches]==[[1,.5], [1]] and 'label' not in batches[1]

# hypothesis: any text survives any format

text = st.text(st.characters(codec='utf-8', exclude_categories=('Cc', 'Zl', 'Zp')), max_size=30)
texts = st.lists(text, min_size=1, max_size=5)
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

@pytest.mark.parametrize('suffix', FORMATS)
@quick
@given(texts, st.integers(0,3), st.integers(0,3))
def test_round_trip(home, suffix, prompts, a, b):
    rows = [pair(prompt=p, c_rate=max(a,b), r_rate=min(a,b)) for p in prompts]
    recs = load_records(write_table(rows, home/f'any.{suffix}'))
    assert [r['prompt'] for r in recs]==prompts and all(r['target']==(.5 if a==b else 1.) for r in recs)

@quick
@given(st.lists(st.tuples(st.sampled_from('abcdef'), st.sampled_from('abcdef')), min_size=2, max_size=30), st.floats(.05,.9), st.integers(0,9))
def test_split_has_no_prompt_on_both_sides(prompts, share, seed):
    rows = [dict(prompt=p if p==q else [p,q], chosen_path=Path('a'), reject_path=Path('b'), target=1.) for p,q in map(list, prompts) ]
    recs = RewardRecords(rows, 'pair')
    try: train, valid = split_by_prompt(recs, share, seed)
    except InputError: return
    said = lambda rs: {p for r in rs for p in ([r['prompt']] if isinstance(r['prompt'], str) else r['prompt'])}
    assert len(train) and len(valid) and len(train)+len(valid)==len(recs) and not said(train) & said(valid)

@given(st.dictionaries(st.sampled_from(['prompt','chosen_path','reject_path','path','label','c_rate','x']), st.integers()))
def test_kind_depends_on_fields_never_on_their_number(row):
    kind = record_kind(row)
    assert kind==record_kind(row | {f'extra{i}': i for i in range(5)})
    if kind is None: assert not {'chosen_path','reject_path'}<=set(row) and not {'path','label'}<=set(row)

# what a stranger's files hold

@pytest.mark.parametrize('suffix,cell', [('csv', ','), ('tsv', '\t')])
@pytest.mark.parametrize('row', [4, 2])
def test_ragged_rows_are_refused_and_never_shifted(home, suffix, cell, row):
    lines = [['prompt', 'chosen_path', 'reject_path'], ['x', 'red.png', 'blue.png'], (['y', 'blue.png', 'red.png', 'green.png'])[:row]]
    (home/f'ragged.{suffix}').write_text('\n'.join(map(cell.join, lines))+'\n')
    with pytest.raises(InputError, match=rf'row 2 \(line 3\): {row} cells under 3'): load_records(home/f'ragged.{suffix}')

def test_a_list_that_csv_made_text_is_refused(home):
    with pytest.raises(InputError, match='CSV holds no lists'): load_records(write_table([pair(prompt=['a', 'b'])], home/'two.csv'))

@pytest.mark.parametrize('names', [dict(prompt='caption', chosen_path='chosen', reject_path='rejected'), dict(prompt='text', reject_path='rejected_path')])
@pytest.mark.parametrize('suffix', FORMATS)
def test_names_of_common_sources(home, names, suffix):
    rows = [{names.get(k, k): v for k, v in pair().items()}]
    assert load_records(write_table(rows, home/f'names.{suffix}')).rows[0]['reject_path'] == home/'blue.png'
    rows = [dict(image='red.png', caption='x', label=1), dict(image='blue.png', caption='', label=0)]
    assert [r['label'] for r in load_records(write_table(rows, home/f'names.{suffix}'))] == [1, 0]

@pytest.mark.parametrize('more', [dict(caption='another'), dict(chosen='green.png'), dict(rejected='green.png'),
                                  dict(jpg_0='red.png', jpg_1='blue.png', label_0=1, label_1=0)])
def test_two_candidates_for_a_field_are_refused_by_name(home, more):
    with pytest.raises(InputError, match=f'both .*{next(iter(more))}'): load_records([pair() | more], folder=home)

def test_labels_may_be_truth_values(home):
    values = [True, False, np.True_, np.False_, 'True', 'false', 1, 0, '1', '0', 1., np.int64(0)]
    recs = load_records([label(label=v) for v in values], folder=home)
    assert [r['label'] for r in recs] == [1, 0]*6 and {type(r['label']) for r in recs} == {int}

def test_pictures_are_upright_through_every_door(home):
    upright = Image.new('RGB', (40, 20), 'red')
    upright.paste('blue', (20, 0, 40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(home/'phone.jpg', quality=98, exif=exif)
    raw = (home/'phone.jpg').read_bytes()
    doors = [home/'phone.jpg', raw, dict(bytes=raw, path='x.jpg'), dict(bytes=None, path='phone.jpg'), Image.open(home/'phone.jpg'), upright, np.asarray(upright)]
    recs = load_records([label(path=x) for x in doors], folder=home)
    seen = RewardCollator(lambda images, prompts: dict(size=torch.tensor([im.size for im in images]), left=torch.tensor([im.getpixel((5, 10)) for im in images])))(list(recs))
    assert seen['size'].tolist() == [[40, 20]]*len(doors)
    assert (seen['left'][:, 0] > 200).all() and (seen['left'][:, 2] < 60).all() # red is on the left

def test_identity_is_of_content_and_order(home, tmp_path):
    for f in 'red', 'blue': (tmp_path/f'{f}.png').write_bytes((home/f'{f}.png').read_bytes())
    rows = [pair(), pair(prompt='b', chosen_path='blue.png', reject_path='red.png')]
    was = load_records(rows, folder=home).identity()
    assert load_records(rows, folder=tmp_path).identity() == was != load_records(rows[::-1], folder=home).identity()
    assert load_records([pair(chosen_path=(home/'red.png').read_bytes()), rows[1]], folder=home).identity() == was
    (tmp_path/'red.png').write_bytes((home/'green.png').read_bytes())
    assert load_records(rows, folder=tmp_path).identity() != was

# votes, ratings, mixtures, leaks

@pytest.mark.parametrize('suffix', FORMATS)
def test_votes_are_soft_targets_in_every_format(home, suffix):
    votes = [[3,1], [2,2], [5,0]]
    rows = [pair(choice_dist=json.dumps(v) if suffix == 'csv' else v) for v in votes]
    recs = load_records(write_table(rows, home/f'votes.{suffix}'))
    assert [r['target'] for r in recs] == [.75, .5, 1.]
    assert RewardCollator(processor)(list(recs))['target'].tolist() == [.75, .5, 1.]
    assert load_records(list(recs)).identity() == recs.identity() != load_records([pair()]*3, folder=home).identity()

@pytest.mark.parametrize('votes', [[1,3], [0,0], [1], 'many', [-1,2], [None,2], ['x',1]])
def test_votes_that_say_nothing_are_named(home, votes):
    with pytest.raises(InputError, match='record 0, choice_dist: is'): load_records([pair(choice_dist=votes)], folder=home)

def test_points_of_ratings_are_in_the_batch_on_demand(home):
    recs = load_records([pair(c_rate=7, r_rate=1), pair(c_rate='3', r_rate='3')], folder=home)
    assert RewardCollator(processor, points=True)(list(recs))['points'].tolist() == [6., 0.]
    assert 'points' not in RewardCollator(processor)(list(recs))
    bare = load_records([pair(c_rate=None, r_rate=None)], folder=home)
    with pytest.raises(InputError, match='has no ratings'): RewardCollator(processor, points=True)(list(bare))
    assert 'points' not in RewardCollator(processor, points=True)(list(load_records([label()], folder=home)))

sizes = st.dictionaries(st.sampled_from('abcd'), st.integers(1, 12), min_size=1)
@quick
@given(sizes, st.integers(0, 99), st.sampled_from(['all', 'first']), st.data())
def test_a_mixture_cut_anywhere_goes_on_as_if_it_had_not_been(sizes, seed, stop, data):
    sources = {name: [f'{name}{i}' for i in range(n)] for name, n in sizes.items()}
    weights = {name: data.draw(st.floats(.1, 9), name) for name in sources}
    whole = list(Mixture(sources, weights, seed, stop))
    cut = data.draw(st.integers(0, len(whole)), 'cut')
    first, before = Mixture(sources, weights, seed, stop), []
    for record in first:
        if len(before) == cut: break
        before.append(record)
    stored = Mixture(sources, weights, seed, stop)
    for _ in zip(range(cut), stored): pass
    state = json.loads(json.dumps(stored.state()))
    second = Mixture(sources, weights, seed, stop).resume(state)
    assert before+list(second) == whole and sum(second.taken.values()) == len(whole)
    if stop == 'all': assert set(whole) == {r for rows in sources.values() for r in rows}
    for name, rows in sources.items(): # each pass in the order of the source
        drawn = [r for r in whole if r[0] == name]
        assert drawn == [rows[i % len(rows)] for i in range(len(drawn))]

def test_a_mixture_is_the_same_everywhere():
    "Numbers written down once: hashes do not depend on versions or machines."
    drawn = list(Mixture(dict(x=range(100), y=range(100, 110)), dict(x=3, y=1), seed=7))
    assert drawn[:12] == [0, 1, 2, 100, 3, 4, 5, 6, 7, 8, 9, 10] and (sum(r < 100 for r in drawn), sum(r >= 100 for r in drawn)) == (100, 26)

def test_mixed_records_tell_their_shares(home):
    two = {name: load_records([pair(prompt=f'{name} {i}') for i in range(n)], folder=home) for name, n in (('big', 40), ('small', 4))}
    mixed = mix_records(two, dict(big=9, small=1), seed=3)
    assert mixed.parts == {name: sum(r['prompt'].startswith(name) for r in mixed) for name in two}
    assert mixed.name == ', '.join(f'{name} {n} ({n/len(mixed):.1%})' for name, n in mixed.parts.items())
    assert mixed.identity() == mix_records(two, dict(big=9, small=1), seed=3).identity()

@given(text)
def test_words_of_a_prompt_do_not_change_twice(prompt):
    words = prompt_words(prompt)
    assert prompt_words(words) == words == prompt_words(f'  {prompt}... ') and words.strip() == words

def test_leaks_by_prompt_and_by_pixels(home, tmp_path):
    Image.open(home/'green.png').save(tmp_path/'same.bmp') # other bytes, the same picture
    recs = load_records([pair(), pair(prompt=['x', 'THE Test prompt']), pair(prompt='y', reject_path='green.png'), pair(prompt='z')], folder=home)
    screened = drop_leaks(recs, held_out('test', ['the test prompt?', ''], [tmp_path/'same.bmp']))
    assert [r['prompt'] for r in screened.records] == ['a red wall', 'z'] and screened.leaks == dict(prompt=1, image=1)
    assert str(screened) == '2 of 4 records dropped: 1 by their prompt, 1 by an image'
    assert screened.records.places == [0, 3]
