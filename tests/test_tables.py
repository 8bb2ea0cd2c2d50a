"Tables: whatever labels they have, every export can be read back; duplicates are refused; marks, legend and widths."
import html, io, re, unicodedata

import numpy as np, pandas as pd, pytest
from hypothesis import example, given, settings, strategies as st
from llava_reward_nb.core import InputError
from llava_reward_nb.evaluation.tables import Table, one_line, pad, rank_marks, tex, text_width

HARD = ['a|b', 'a||b|', 'a\nb', 'a\r\nb', '`x`', '``', '*x*', '**', '_x_', '__x__', 'snake_case_name', '~~x~~', '<b>x</b>', '<script>', '&amp;', '&', 'AT&T', '[x](y)', '![x](y)',
        '[1]', '[y]', '*y', '# x', '- x', '1. x', '1) x', '> x', '---', '$x$', '\\', '\\|', '\\\\', '%', '{', '}', '{}', '^2', '~', '"q"', "''", '--', '---', ',', 'a,b', '=1+1', 'x\ty',
        '図形', '🎨', 'e\u0301', '\u2028', '†', '–', 'x_', '_', 'http://a_b.c', '\x00', 'a\x1fb', '|---|', ':-:', '***x', '`', 'a`b', '&#124;', '<!-- x -->', '</td>', 'NA x']


def seen(s): return ' '.join(one_line(s).split())


def table(labels, column='x', **kw):
    df = pd.DataFrame({column: np.arange(len(labels))/7}, index=pd.Index(labels, name='label'))
    return Table(df, **kw)


def cells(page, tag): return [' '.join(html.unescape(re.sub('<[^>]*>', '', c)).split()) for c in re.findall(f'<{tag}\\b[^>]*>(.*?)</{tag}>', page, re.S)]


def markdown_page(t):
    markdown_it = pytest.importorskip('markdown_it')
    return markdown_it.MarkdownIt('commonmark').enable(['table', 'strikethrough']).render(t.to_markdown())


def check_page(page, labels, column):
    assert cells(page, 'th') == ['label', seen(column)]
    got = cells(page, 'td')
    assert len(got) == 2*len(labels) and got[::2] == [seen(l) for l in labels]


def check_latex(t, labels):
    text = t.to_latex()
    bare = re.sub(r'\\[\\{}&%$#_]', '', text.replace('\\\\\n', '\n'))
    assert bare.count('{') == bare.count('}') and not re.search(r'[%$#^~]', bare) and '_' not in bare
    rows = [l for l in text.split('\n') if l.endswith(r' \\')]
    assert len(rows) == len(labels)+1 and all(len(re.findall(r'(?<!\\)&', r)) == 1 for r in rows)
    assert not any(re.match(r'\s*[\[*]', r) for r in rows)


def check_all(labels, column):
    t = table(labels, column, title=column, notes=[labels[0]])
    check_page(t.to_html(), labels, column)
    check_page(markdown_page(t), labels, column)
    check_latex(t, labels)
    back = pd.read_csv(io.StringIO(t.to_csv()), keep_default_na=False, float_precision='round_trip')
    assert back.iloc[:, 1].tolist() == pytest.approx(t.df.iloc[:, 0].tolist(), rel=1e-14) and [str(x) for x in back.iloc[:, 0]] == labels
    lines = repr(t).split('\n')
    title = 1 if t.title else 0 # an empty title has no line
    assert len(lines) == title+1+len(labels)+(2 if len(labels) > 1 else 0)+(len(labels) == 1)


@pytest.mark.parametrize('label', [l for l in HARD if '\x00' not in l])
def test_hard_labels_come_back(label):
    check_all([label+' ', 'other', 'z'+label+'z'], 'c'+label)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=('Cs', 'Cc', 'Zl', 'Zp')), min_size=1, max_size=12).filter(lambda s: s.strip() == s and s), min_size=1, max_size=4, unique=True),
       st.text('ab|*_`<>&[]()\\$#~-!{}^% 1.', min_size=1, max_size=8).filter(lambda s: s.strip()))
@example(['\\|'], '|')
def test_any_label_comes_back(labels, column):
    if seen(column) == 'label' or column == 'label': return
    t = table(labels, column, title=column)
    check_page(t.to_html(), labels, column)
    check_page(markdown_page(t), labels, column)
    check_latex(t, labels)


def test_files_are_read_back_whole(tmp_path):
    t = table([l for l in HARD if '\x00' not in l and l != '---'], 'x')
    back = pd.read_csv(t.save(tmp_path/'t.csv'), keep_default_na=False, float_precision='round_trip')
    assert back['label'].tolist() == list(t.df.index) and back['x'].tolist() == pytest.approx(t.df['x'].tolist(), rel=1e-14)
    for s in ('md', 'tex', 'html', 'txt'): assert b'\r' not in t.save(tmp_path/f't.{s}').read_bytes()
    half = table(['r'], title='half \ud83d', notes=['\ud83d'])
    for s in ('md', 'tex', 'html', 'txt'): assert '\ufffd' in half.save(tmp_path/f't.{s}').read_text(encoding='utf-8')


def test_duplicates_are_refused_whenever_they_appear():
    with pytest.raises(InputError, match='rows occur twice: r'): table(['r', 'r'])
    with pytest.raises(InputError, match='columns occur twice'): Table(pd.DataFrame([[1., 2.]], columns=['x', 'x']))
    t = table(['r', 's'])
    t.df = pd.concat([t.df, t.df[:1]]) # rows from elsewhere are added later
    for show in (t.to_markdown, t.to_html, t.to_latex, t.to_csv, t.__repr__):
        with pytest.raises(InputError, match='rows occur twice: r'): show()
    index = pd.MultiIndex.from_tuples([('a', 'b'), ('a', 'b')])
    with pytest.raises(InputError, match='rows occur twice'): Table(pd.DataFrame({'x': [1., 2.]}, index=index))


def test_intervals_belong_to_their_rows():
    t = table(['r', 's'])
    with pytest.raises(InputError, match='`low` has other rows'): Table(t.df, low=t.df[::-1], high=t.df[::-1])
    shown = Table(t.df, low=t.df-1, high=t.df.assign(x=[np.nan, 5.]))
    assert shown.cell(0, 'x') == '0.0' and shown.cell(1, 'x') == '0.1 [-0.9, 5.0]'


def test_what_is_no_number_is_not_ranked():
    assert rank_marks([np.inf, 1, 2, np.nan, None, 'x', -np.inf, True]) == ['', 'second', 'best', '', '', '', '', '']
    assert rank_marks([-.04, 0., .01]) == ['best']*3
    df = pd.DataFrame({'x': [-.04, np.nan, np.inf], 'y': ['a|b', None, 'c']}, index=list('abc'))
    t = Table(df)
    assert [t.cell(i, 'x') for i in range(3)] == ['0.0', '–', 'inf'] and [t.cell(i, 'y') for i in range(3)] == ['a|b', '–', 'c']


def test_text_tables_have_a_legend_and_stand_straight():
    t = table(['図形', '🎨 paint', 'e\u0301te\u0301', 'plain'])
    lines = repr(t).split('\n')
    assert lines[-1] == '* best, + second best'
    assert len({text_width(l[:l.index('.')]) for l in lines[1:5]}) == 1
    assert 'best' not in repr(table(['alone'])) and 'second' not in repr(Table(pd.DataFrame({'x': [1., 1.]}, index=list('ab'))))
    assert text_width('👩\u200d🚀') == 2 and pad('🎨', 4) == '🎨  ' and pad('x', 3, True) == '  x'


def test_csv_columns_of_one_name_are_refused():
    df = pd.DataFrame({('a', 'b'): [1.], ('a, b', ''): [2.]}, index=['r'])
    with pytest.raises(InputError, match="two columns 'a, b'"): Table(df).to_csv()
    with pytest.raises(InputError, match="two columns 'source'"): Table(pd.DataFrame({'source': [1.]}, index=['r']), sources=dict(r='paper')).to_csv()


def test_tex_has_no_ligatures_and_no_specials():
    assert tex('a--b---c') == 'a-{}-b-{}-{}-c' and tex('x<y>z|') == r'x\textless{}y\textgreater{}z\textbar{}'
    assert not set(re.sub(r'\\[a-zA-Z]+\{\}|\\[&%$#_{}]|\{\}', '', tex(''.join(map(chr, range(32, 127)))))) & set('&%$#_{}~^\\<>|"`')
    assert all(unicodedata.category(c) != 'Cc' for c in tex('a\n\nb\tc'))
