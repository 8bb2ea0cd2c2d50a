"Rewards whose weights come with pip, from the command line and through benchmarks."
import csv, json, os, subprocess, sys
from pathlib import Path

import numpy as np, pytest, torch
from PIL import Image

from llava_reward_nb.commands import score

from llava_reward_nb.commands import evaluate
from llava_reward_nb.core import InputError
from llava_reward_nb.files import write_table
from llava_reward_nb.evaluation.runs import run_benchmark
from llava_reward_nb.evaluation.report import make_table
from llava_reward_nb.evaluation.measures import results, significance
from llava_reward_nb.rewards.ocr import OCR, Line, _by_blocks, match_texts, quoted_texts, wanted_texts
from llava_reward_nb.rewards.real import JPEG
from llava_reward_nb.rewards.registry import load_reward
from llava_reward_nb.rewards.combine import score_all
from llava_reward_nb.evaluation.benchmarks import SPECS
from llava_reward_nb.evaluation.signs import Sign, draw_sign
from llava_reward_nb.rewards.cards import CARDS

OPEN, SHUT = draw_sign(Sign('OPEN')), draw_sign(Sign('CLOSED'))


@pytest.fixture(scope='module')
def ocr():
    torch.set_num_threads(1)
    return OCR()


def command(*args, cwd, code=0, before=''):
    "Run `llava_reward_score` as a script; its output and errors."
    script = f"import sys\nfrom llava_reward_nb.commands.score import llava_reward_score\nsys.argv = ['llava_reward_score', *{[str(a) for a in args]}]\n{before}\nllava_reward_score()"
    env = {**os.environ, 'PYTHONPATH': str(Path(score.__file__).parents[2]), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, '-c', script], cwd=cwd, capture_output=True, text=True, env=env)
    assert done.returncode == code, done.stdout+done.stderr
    return done.stdout, done.stderr


def test_a_strangers_photo_of_a_sign(tmp_path):
    "A large JPEG that lies on its side, as phones store it, and one command."
    photo = OPEN.resize((1600, 1600)).crop((0, 300, 1600, 1300)).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6 # turn by 90 degrees to the right
    photo.save(tmp_path/'photo.jpg', exif=exif)
    out, _ = command('photo.jpg', '--prompt', 'a sign that says "OPEN"', '--reward', 'ocr', 'ocr:flow_grpo', 'jpeg', 'nudenet', '--out', 's.csv', cwd=tmp_path)
    row = next(csv.DictReader(open(tmp_path/'s.csv', newline='')))
    assert float(row['ocr']) == float(row['ocr:flow_grpo']) == 1 and float(row['jpeg']) < -20 and float(row['nudenet']) > .5


def test_prompts_without_text_are_named_and_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    OPEN.save('a.png')
    rows = [dict(image='a.png', prompt=p) for p in ('a "OPEN" sign', 'a red circle', 'a sign «ОТКРЫТО»', "a sign 'CLOSED'")]
    write_table(rows, 't.csv')
    with pytest.raises(InputError, match="'a red circle' asks for no text.*--skip-bad"): score.llava_reward_score([], table='t.csv', reward=['ocr'])
    score.llava_reward_score([], table='t.csv', reward=['ocr'], skip_bad=True, out='s.csv')
    got = list(csv.DictReader(open('s.csv', newline='')))
    assert [bool(r['error']) for r in got] == [False, True, True, False] and [r['ocr'] for r in got][1:3] == ['', '']
    assert float(got[0]['ocr']) == 1 and float(got[3]['ocr']) < .5
    assert 'asks for no text' in got[1]['error'] and 'knows no' in got[2]['error']


def test_rewards_that_read_no_prompt_need_none(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    OPEN.save('a.png')
    score.llava_reward_score(['a.png'], reward=['jpeg:incompressibility'])
    assert 'jpeg:incompressibility' in capsys.readouterr().out
    with pytest.raises(InputError, match='no prompt'): score.llava_reward_score(['a.png'], reward=['ocr'])


def test_a_missing_package_is_one_line(tmp_path):
    OPEN.save(tmp_path/'a.png')
    _, err = command('a.png', '--prompt', '"a"', '--reward', 'ocr', cwd=tmp_path, code=1, before="sys.modules['onnxruntime'] = None")
    assert err.strip().count('\n') == 0 and 'pip install' in err and 'onnxruntime' in err


def test_drawbench_by_ocr(tmp_path, ocr):
    "Text prompts are scored, the others are named, and none of them is 0 for it."
    for k, (prompt, im) in enumerate({"A storefront with 'OPEN' written on it.": OPEN, "A sign that says 'OPEN'.": SHUT, 'A red colored car.': OPEN}.items()):
        (tmp_path/f'd/{k:05d}/samples').mkdir(parents=True)
        (tmp_path/f'd/{k:05d}/metadata.jsonl').write_text(json.dumps(dict(prompt=prompt))+'\n')
        im.save(tmp_path/f'd/{k:05d}/samples/0000.png')
    with pytest.warns(UserWarning, match='asks for no text'): run = run_benchmark('drawbench', {'ocr': ocr}, tmp_path/'d', tmp_path/'run')
    s = run.scores()['ocr']
    assert s.isna().sum() == 1 and s.max() == 1 and 0 < s.min() < .7
    assert results(run).n.tolist() == [2]
    make_table('drawbench', run)


def test_a_reward_says_where_its_classes_part(tmp_path):
    "Scores around 0.5 make the same table as the same scores around 0, if the reward says so."
    class Dark:
        name, range, boundary = 'dark', '0 to 1', .5
        def __init__(self, boundary): self.boundary = boundary
        def __call__(self, images, prompts): return torch.tensor([np.asarray(im.convert('L')).std()/80 for im in images])-.5+self.boundary
    run = run_benchmark('unsafebench', {'half': Dark(.5), 'zero': Dark(0.)}, out=tmp_path, limit=40)
    half, zero = (results(run).query('reward==@n').drop(columns='reward').reset_index(drop=True) for n in ('half', 'zero'))
    np.testing.assert_allclose(half.value, zero.value, equal_nan=True)
    assert 0 < run.scores().half.min() and 0 < half.value[0] < 1
    assert significance(run).loc['half', 'zero'] == 1


def test_score_all_keeps_what_can_be_scored(ocr):
    with pytest.warns(UserWarning, match='asks for no text'):
        df = score_all({'ocr': ocr, 'jpeg': JPEG()}, [OPEN, OPEN], ['"open"', 'a red circle'], progress=False)
    assert df.ocr[0] == 1 and np.isnan(df.ocr[1]) and df.jpeg.notna().all()


@pytest.mark.parametrize('prompt,want', [
    ('«Bonjour» et « Au revoir »', ['Bonjour', 'Au revoir']), ("'Text to Image' in the sky", ['Text to Image']),
    ('"a" "b"', ['a', 'b']), ('(“x”)', ['x']), ('the 70\'s sign ‘Peace’', ['Peace']), ("'don't stop'", ["don't stop"]),
    ('5\'10" tall, says "HI"', ['HI']), ('『東京』と「大阪」', ['東京', '大阪']), ("it's 5 o'clock", []), ('`code` here', ['code']), ('say “he said ‘no’”', ['he said ‘no’'])])
def test_quotes(prompt, want): assert quoted_texts(prompt) == want


@pytest.mark.parametrize('prompt', ['"', 'a" b', '“a', 'a”', '「a', '"a" b"', "'a' dogs' b"])
def test_quotes_that_do_not_pair_up(prompt):
    with pytest.raises(InputError): wanted_texts(prompt)


@pytest.mark.parametrize('prompt', ['a girl reading Emma in bed', 'she says Hello', 'two dogs', 'a book. He reads Ulysses', 'reading glasses', 'a wall of text'])
def test_no_text_is_made_up(prompt):
    with pytest.raises(InputError, match='asks for no text'): wanted_texts(prompt)


def test_order_of_lines_does_not_matter_within_reason():
    "Three signs in two rows, each of two lines, are put together again."
    def at(text, x, y): return Line(text, ((x, y), (x+80, y), (x+80, y+20), (x, y+20)))
    lines = [at('Fresh', 0, 0), at('Live', 200, 1), at('bread', 0, 26), at('music', 200, 27), at('No', 100, 200), at('parking', 100, 226)]
    assert match_texts(['Live music', 'Fresh bread', 'No parking'], lines).score == 1
    assert len(_by_blocks(lines)) == 6


def test_names():
    assert repr(load_reward('jpeg')) == "JPEG('compressibility', 'ddpo')"
    assert load_reward('ocr:flow_grpo').rule == 'flow_grpo'
    for name in 'ocr', 'nudenet', 'jpeg': assert load_reward(name).name == name


def test_list_of_rewards(capsys):
    evaluate.llava_reward_rewards([])
    printed = capsys.readouterr().out
    for name in 'ocr', 'nudenet', 'jpeg', 'hpsv3', 'tiny-clip': assert name in printed


def test_cards_name_tables_that_exist():
    for name, card in CARDS.items(): assert set(card.tables) <= set(SPECS), name
