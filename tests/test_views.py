"Results as HTML: hostile text stays text, pages fetch nothing, pictures stay light."
import base64, io, re
from html.parser import HTMLParser

import numpy as np
import pytest, torch
from PIL import Image

from llava_reward_nb.core import InputError
from llava_reward_nb.views import bar_html, page_html, picture_html, save_page, show, show_pairs, text_html, thumbnail

HOSTILE = ['<script>alert(1)</script>', '"><img src=x onerror=alert(1)>', "' onmouseover='alert(1)", '</title></style></bdi><iframe src=//evil>',
           '&lt;b&gt;', '\u202egnirts', 'a\x00b\x1b[31m', 'half \ud83d of a face', '红色的圆', 'עיגול אדום', '🟥' * 400, '$x_1$ %s {0}', '', '\r\n\t', 'x' * 100_000]
RGB = Image.new('RGB', (64, 64), (250, 250, 250))


class Tags(HTMLParser):
    "All tags and attributes of a page, and its text."
    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.words, self.open = [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in ('img', 'br', 'meta'): self.open.append(tag)

    def handle_endtag(self, tag): assert self.open.pop() == tag, f'{tag} closes another'
    def handle_data(self, data): self.words.append(data)


def check(page):
    "Well formed; no script, handler, frame or address."
    found = Tags(page)
    assert not found.open, found.open
    assert set(found.tags) <= {'html', 'head', 'meta', 'title', 'style', 'body', 'h1', 'h2', 'p', 'b', 'br', 'div', 'span', 'small', 'bdi', 'img',
                               'table', 'thead', 'tbody', 'tr', 'th', 'td'}, set(found.tags)
    for name, value in found.attributes:
        assert not name.startswith('on'), name
        assert name not in ('src', 'href') or value.startswith('data:image/'), (name, value)
    page.encode('utf-8')
    return found


@pytest.mark.parametrize('text', HOSTILE, ids=lambda t: repr(t[:12]))
def test_hostile_text_stays_text(text):
    found = check(page_html(text, [show([RGB, RGB], [text, 'other'], {text or 'x': [.5, float('nan')]}), show(RGB, text, [1.]),
                                   show_pairs(RGB, RGB, text, {text or 'x': [.5]}), picture_html(text or '.', words=text)]))
    assert 'script' not in found.tags and 'iframe' not in found.tags
    if text.isprintable() and 0 < len(text) < 100: assert text in ''.join(found.words)
    assert len(text_html(text)) < 5000


def pixels(uri): return Image.open(io.BytesIO(base64.b64decode(uri.split(',')[1])))


@pytest.mark.parametrize('size', [(1, 1), (8, 8), (5000, 1), (1, 3000), (64, 64), (511, 1023)])
@pytest.mark.parametrize('mode', ['RGB', 'L', 'RGBA', 'P', 'CMYK', '1'])
@pytest.mark.filterwarnings('ignore::UserWarning')
def test_thumbnails_are_light_for_any_picture(size, mode):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    uri = thumbnail(Image.fromarray(noise).convert(mode))
    assert len(uri) <= 10_000
    small = pixels(uri)
    assert max(small.size) <= 128 and min(small.size) >= 1


def test_what_a_camera_wrote_stays_behind(tmp_path):
    exif = Image.Exif()
    exif[0x010f] = 'secret camera'
    RGB.save(tmp_path/'a.jpg', exif=exif)
    RGB.save(tmp_path/'a.png', exif=exif)
    for name in ('a.jpg', 'a.png'):
        for most in (10_000, 1):  # PNG, and the smallest JPEG
            data = base64.b64decode(thumbnail(tmp_path/name, most=most).split(',')[1])
            assert b'secret' not in data and b'Exif' not in data


def test_thousands_of_rows_show_the_first():
    shown = show([RGB] * 3000, [f'prompt {i}' for i in range(3000)], torch.arange(3000.))
    page = shown.html()
    assert page.count('<img') == 60 and 'The first 60 of 3,000 images' in page and len(page) < 600_000
    assert 'prompt 59' in page and 'prompt 60' not in page
    assert shown.scale('') == (0., 2999.)  # of all rows, not of those that are shown


def test_a_missing_picture_costs_no_other(tmp_path):
    (tmp_path/'damaged.png').write_bytes(b'nothing')
    found = check(show([RGB, str(tmp_path/'damaged.png'), str(tmp_path/'gone.png')], 'a', [1, 2, 3]).html())
    assert found.tags.count('img') == 1
    assert 'not an image' in ''.join(found.words) and 'no such file' in ''.join(found.words)


@pytest.mark.parametrize('value', [0., -0., 1., -1., 1e-30, 1e30, float('inf'), float('-inf'), float('nan')])
@pytest.mark.parametrize('scale', [(0, 1), (-1, 1), (0, 0), (-5, -2), (2, 5)])
def test_bars_stay_in_their_box(value, scale):
    numbers = [float(x) for x in re.findall(r'(?:margin-left|width):([\d.]+)%', bar_html(value, *scale))]
    assert len(numbers) in (0, 2) and sum(numbers) <= 100.11
    if value != value or abs(value) == float('inf') or scale == (0, 0): assert not numbers


def test_a_page_is_whole_or_not_there(tmp_path):
    class Broken:
        def _repr_html_(self): raise RuntimeError('no')
    with pytest.raises(RuntimeError): save_page(tmp_path/'a.html', 'a', [Broken()])
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match='ends with .html'): show(RGB).save(tmp_path/'a.png')
    check(show(RGB).save(tmp_path/'sub'/'a.HTML').read_text(encoding='utf-8'))


def test_scores_of_any_form():
    pd = pytest.importorskip('pandas')
    two = [RGB, RGB]
    for scores in (torch.tensor([1, 2]), [1., 2.], np.array([1, 2]), torch.tensor([1., 2.], dtype=torch.bfloat16), torch.tensor([1., 2.], requires_grad=True)):
        assert show(two, 'a', scores).values == {'': [1., 2.]}
    assert show(two, 'a', pd.DataFrame({'x': [1., 2.], 3: [5, 6]}, index=[7, 9])).values == {'x': [1., 2.], '3': [5., 6.]}
    for wrong in ([1.], [[1., 2.]], ['a', 'b'], None, torch.zeros(2, 1)):
        with pytest.raises(InputError): show(two, 'a', wrong)


def test_a_prompt_is_no_mathematics_in_figures():
    pd = pytest.importorskip('pandas')
    import matplotlib
    matplotlib.use('Agg')
    from llava_reward_nb.data import RewardRecords
    from llava_reward_nb.evaluation.report import panels
    prompt = r'costs $5, not $\frac$'
    rows = [dict(prompt_set='a', model='m', prompt=prompt, seed=0, particle=0, guidance='none', guidance_score=1., mine=1., image=RGB)]
    drawn = [panels(pd.DataFrame(rows), metrics=['mine']).figure, show(RGB, [prompt], [1.]).plot(), show_pairs(RGB, RGB, prompt, [.5]).plot(),
             RewardRecords([dict(path=RGB, prompt=prompt, label=1)], 'label').plot()]
    for figure in drawn: figure.savefig(io.BytesIO())
