"""The site's pages and navigation, made from the notebooks and the package: a hook of MkDocs (see `mkdocs.yml`).

`python tools/docs.py` checks the site that was built: every link leads somewhere, and nothing comes from another host."""
import ast, base64, io, json, posixpath, re, shutil, sys, tokenize
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
LIB = 'llava_reward_nb'
PAGES = ROOT/'build/pages'  # what MkDocs reads
SITE = ROOT/'_site'
FILES = {'CHANGELOG.md': 'Changes', 'CONTRIBUTING.md': 'Contributing', f'{LIB}/bundle/README.md': 'The tiny bundle'}
FENCE = re.compile(r'^( *)(```+|~~~+).*?^\1\2[ \t]*$', re.M | re.S)
MATH = re.compile(r'(?<![\\$])(\$\$?)(?!\s*\$)(.+?)(?<!\\)\1(?!\$)', re.S)
PLAINER = {'lVert': r'\Vert', 'rVert': r'\Vert', 'lvert': r'\vert', 'rvert': r'\vert', 'arg': r'\operatorname{arg}'}  # what latex2mathml does not know
BADGES = re.compile(r'^(\[!\[[^]]*\]\([^)]*\)\]\([^)]*\)\s*)+', re.M)  # pictures from other hosts, for GitHub alone
CODE = re.compile(r'(`+)(?!`).+?(?<!`)\1(?!`)', re.S)
CSS = '''
.md-grid { max-width: 76rem; }
.md-typeset .output { margin: -.6em 0 1.2em; padding-left: .8em; border-left: .15rem solid var(--md-default-fg-color--lightest); overflow-x: auto; }
.md-typeset .output pre { margin: 0; }
.md-typeset .output pre > code { background: transparent; padding-top: .2em; padding-bottom: .2em; }
.md-typeset .output img { background: white; }
.md-typeset .math { overflow-x: auto; margin: 1em 0; }
.md-typeset math { font-size: 1.08em; }
'''

# --- What there is


def notebooks():
    "Every notebook, in the order of the book: numbered parts, then tutorials; the index first."
    found = [p for p in (ROOT/'nbs').rglob('*.ipynb') if not any(part[0] in '._' for part in p.relative_to(ROOT/'nbs').parts)]
    return sorted(found, key=lambda p: (p.name != 'index.ipynb', p.relative_to(ROOT/'nbs').as_posix()))


def modules():
    "Dotted name to source file of every exported module; rooms and private ones are left out."
    found = {p.relative_to(ROOT).with_suffix('').as_posix().replace('/', '.'): p for p in sorted((ROOT/LIB).rglob('*.py'))
             if p.name[0] != '_' and 'bundle' not in p.parts}
    return dict(sorted(found.items(), key=lambda item: (item[0].count('.') > 1, item[0])))


def title_of(notebook):
    "A notebook's first heading."
    for cell in json.loads(notebook.read_text(encoding='utf-8'))['cells']:
        found = re.search(r'^# (.+)$', ''.join(cell['source']), re.M) if cell['cell_type'] == 'markdown' else None
        if found: return found[1].replace('`', '')
    return notebook.stem


def part_name(folder):
    "`3_paper` as a reader says it."
    number, _, name = folder.name.partition('_')
    return f'{number}. {name.replace("_", " ").capitalize()}' if name else folder.name.capitalize()


def page_of(path):
    "Where in the site the page of a file of this project lies; None if it has none."
    if path.suffix == '.ipynb': return path.relative_to(ROOT/'nbs').with_suffix('.md').as_posix()
    name = path.relative_to(ROOT).as_posix()
    return f'project/{Path(FILES[name].lower().replace(" ", "-")).name}.md' if name in FILES else None


def module_page(name): return f"api/{name.removeprefix(f'{LIB}.')}.md"


def nav():
    "The navigation, as MkDocs wants it."
    index, *chapters = notebooks()
    parts = {}
    for path in chapters:
        number = path.stem.split('_')[0]
        title = f'{number} {title_of(path)}' if number.isdigit() else title_of(path)
        parts.setdefault(path.parent, []).append({title: page_of(path)})
    api, rooms = [], {}
    for name in modules():
        short = name.removeprefix(f'{LIB}.')
        place = rooms.setdefault(short.split('.')[0], []) if '.' in short else api
        place.append({short: module_page(name)})
    api += [{room: pages} for room, pages in rooms.items()]
    return [{'Home': page_of(index)}, *({part_name(folder): pages} for folder, pages in parts.items()),
            {'API': ['api/index.md', *api]}, {'Project': [{title: page_of(ROOT/name)} for name, title in FILES.items()]}]


# --- Pages


class Formulas:
    "Formulas are taken out before Markdown is read, and put back into its HTML as MathML, which browsers draw by themselves."
    def __init__(self): self.all = []

    def take(self, match):
        self.all.append((match[2].strip(), match[1] == '$$'))
        return f'@@formula{len(self.all)-1}@@'

    def back(self, match):
        from latex2mathml.converter import convert
        latex, block = self.all[int(match[1])]
        for command, known in PLAINER.items(): latex = re.sub(rf'\\{command}(?![a-zA-Z])', lambda _: known, latex)
        html = convert(latex, display='block' if block else 'inline')
        return f'<span class="math">{html}</span>' if block else html


FORMULAS = Formulas()


def outside_code(text, change):
    "Markdown with `change` applied to all but its code."
    kept = []

    def keep(match):
        kept.append(match[0])
        return f'\0{len(kept)-1}\0'
    text = change(CODE.sub(keep, FENCE.sub(keep, text)))
    while '\0' in text: text = re.sub('\0(\\d+)\0', lambda m: kept[int(m[1])], text)
    return text


def loose_lists(text):
    "A list that begins right below a line of prose begins after a blank one: Python's Markdown needs it."
    item = r'(?:[-*+]|\d+\.) +\S'
    return re.sub(rf'^(?! *{item}| *\||\s)(.+)\n(?={item})', r'\1\n\n', text, flags=re.M)


def moved_links(text, source, page, repository):
    "Links of a file of this project, as links of its page: to other pages, or to the repository for what has none."
    by_name = {p.stem: p for p in notebooks()}

    def moved(match):
        target, mark, anchor = match[2].partition('#')
        if not target or re.match(r'[a-z]+:|/', target): return match[0]
        path = (source.parent/target).resolve()
        if path.suffix == '.html' and path.stem in by_name: path = by_name[path.stem]
        where = page_of(path) if path.is_file() and path.is_relative_to(ROOT) else None
        if where: target = posixpath.relpath(where, posixpath.dirname(page) or '.')
        elif path.exists() and not path.is_relative_to(ROOT/'nbs/images'): target = f'{repository}/blob/main/{path.relative_to(ROOT).as_posix()}'
        return f'{match[1]}{target}{mark}{anchor}{match[3]}'
    return re.sub(r'(\]\()([^)\s]+)(\))', moved, text)


def prose(text, source, page, repository):
    "A Markdown cell or file, as a part of a page."
    def change(text): return MATH.sub(FORMULAS.take, loose_lists(moved_links(text, source, page, repository)))
    return outside_code(BADGES.sub('', text), change)


def fenced(text, language):
    ticks = max(['``', *re.findall(r'`{3,}', text)], key=len) + '`'
    return f'{ticks}{language}\n{text.rstrip()}\n{ticks}'


def output_of(output, save, read):
    "One stored output: text, a picture, a table; `read` turns Markdown into that of the page."
    if output.output_type == 'stream': return fenced(output.text, 'text')
    if output.output_type == 'error': return fenced(f'{output.ename}: {output.evalue}', 'text')
    data = output.data
    for mime in ('image/png', 'image/jpeg'):
        if mime in data: return f'![output]({save(base64.b64decode(data[mime]), mime.split("/")[1])})'
    if 'image/svg+xml' in data: return f"![output]({save(''.join(data['image/svg+xml']).encode(), 'svg')})"
    if 'text/markdown' in data: return read(data['text/markdown'])
    if 'text/html' in data:  # a table of pandas takes the theme's looks when it brings none
        html = re.sub(r'<table border="1" class="dataframe">', '<table>', data['text/html'])
        return '<div>' + re.sub(r'\n\s*\n', '\n', html) + '</div>'
    return fenced(data['text/plain'], 'text') if 'text/plain' in data else ''


def chapter(path, repository):
    "The page of a notebook: what a reader sees of it, with its outputs as they were stored."
    import nbformat
    from readme import reader_cells
    page, pieces, saved = page_of(path), [], []

    def read(text): return prose(text, path, page, repository)

    def save(data, kind):
        name = f'{path.stem}_files/{len(saved)}.{kind}'
        saved.append(name)
        target = PAGES/Path(page).parent/name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        return name
    for cell in reader_cells(nbformat.read(path, as_version=4).cells):
        if cell.cell_type == 'markdown': pieces.append(read(cell.source))
        if cell.cell_type != 'code': continue
        if cell.source and 'hide_code' not in cell.metadata.get('tags', []): pieces.append(fenced(cell.source, 'python'))
        outputs = [text for text in (output_of(o, save, read) for o in cell.outputs) if text]
        if outputs: pieces.append('<div class="output" markdown>\n\n' + '\n\n'.join(outputs) + '\n\n</div>')
    source = f'[Notebook]({repository}/blob/main/{path.relative_to(ROOT).as_posix()})'
    return '\n\n'.join([*pieces, source]) + '\n'


def api_page(name, chapters):
    "The page of a module: its docstring, classes and functions; written by mkdocstrings from the source."
    page, found = module_page(name), chapters.get(name.removeprefix(f'{LIB}.'))
    told = f'Explained, run and tested in [{title_of(found)}]({posixpath.relpath(page_of(found), "api")}).\n\n' if found else ''
    return page, f'# {name.removeprefix(f"{LIB}.")}\n\n{told}::: {name}\n'


def overview():
    "The API's first page: every module with its first sentence."
    rows = [f'| [{name.removeprefix(f"{LIB}.")}]({Path(module_page(name)).name}) | {(ast.get_docstring(ast.parse(p.read_text(encoding="utf-8"))) or "").splitlines()[0]} |'
            for name, p in modules().items()]
    return '\n'.join(['# API', '', f'`import {LIB}` is light: names are fetched when they are asked for.', '', '| module | what it is for |', '|---|---|', *rows, ''])


def exported_by():
    "Module to the notebook that exports it."
    found = {}
    for path in notebooks():
        for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
            if name := re.match(r'#\s*\|\s*default_exp\s+(\S+)', ''.join(cell['source'])): found[name[1]] = path
    return found


def stage(repository):
    "Write every page to `PAGES`."
    shutil.rmtree(PAGES, ignore_errors=True)
    pages = {page_of(path): chapter(path, repository) for path in notebooks()}
    for name in FILES:
        text = re.sub(r'\A---\n.*?\n---\n', '', (ROOT/name).read_text(encoding='utf-8'), flags=re.S)
        pages[page_of(ROOT/name)] = prose(text, ROOT/name, page_of(ROOT/name), repository)
    chapters = exported_by()
    pages |= dict(api_page(name, chapters) for name in modules()) | {'api/index.md': overview(), 'site.css': CSS}
    for name, text in pages.items():
        (PAGES/name).parent.mkdir(parents=True, exist_ok=True)
        (PAGES/name).write_text(text, encoding='utf-8')


# --- What comments say


def comments_of(source):
    "Line number to comment, and the numbers of those lines that hold nothing else."
    found, alone = {}, set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT: continue
        found[token.start[0]] = token.string.lstrip('#').strip()
        if not token.line[:token.start[1]].strip(): alone.add(token.start[0])
    return found, alone


def docments(source):
    "Parameter to description for the function in `source`; `return` names what comes back."
    found, alone = comments_of(source)
    node = ast.parse(source).body[0]
    args = [*node.args.posonlyargs, *node.args.args, node.args.vararg, *node.args.kwonlyargs, node.args.kwarg]
    lines, body = {}, node.body[0].lineno
    for arg in filter(None, args): lines[arg.lineno] = arg.arg  # of two on a line the last one counts
    told = {}
    for line, text in found.items():
        if line >= body: continue
        if line in alone: name = next((name for at, name in sorted(lines.items()) if at > line), None)
        else: name = lines.get(line, 'return' if line > max(lines, default=0) or node.returns and line >= node.returns.lineno else None)
        if name: told[name] = f'{told[name]} {text}' if name in told else text
    return told


# --- Hooks of MkDocs


def on_config(config):
    sys.path.insert(0, str(ROOT/'tools'))
    stage(config['repo_url'].rstrip('/'))
    config['docs_dir'], config['nav'] = str(PAGES), nav()
    return config


def on_page_content(html, **kwargs): return re.sub(r'@@formula(\d+)@@', FORMULAS.back, html)


# --- The finished site


class Page(HTMLParser):
    "What a page links to, loads, and can be linked at."
    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.anchors = set(), set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs[k] for k in ('id', 'name') if attrs.get(k)}
        if tag == 'a' and 'href' in attrs: self.links.add(attrs['href'] or '')
        loaded = attrs.get('src') or (attrs.get('href') if tag == 'link' and attrs.get('rel') not in ('canonical', 'next', 'prev') else None)
        if loaded: self.loads.add(loaded)


def faults(site):
    "What is wrong with the built site, one line each."
    pages = {p: Page(p.read_text(encoding='utf-8')) for p in sorted(site.rglob('*.html'))}
    for path, page in pages.items():
        here = path.relative_to(site).as_posix()
        for target in sorted(page.loads):
            if urlsplit(target).netloc: yield f'{here} loads {target} from another host'
        for target in sorted(page.links | page.loads):
            parts = urlsplit(target)
            if parts.scheme or parts.netloc or here == '404.html': continue
            found = (path.parent/unquote(parts.path)).resolve() if parts.path else path
            if found.is_dir(): found = found/'index.html'
            if not found.exists(): yield f'{here} links to {target}, which does not exist'
            elif parts.fragment and found in pages and unquote(parts.fragment) not in pages[found].anchors | {'__top'}:
                yield f'{here} links to {target}, which has no such heading'
        if lost := re.search(r'@@formula\d+@@|<m[io]>\\\w+', path.read_text(encoding='utf-8')): yield f'{here} has a formula that was not drawn: {lost[0]}'


def main():
    if not (SITE/'index.html').exists(): sys.exit(f'{SITE.name}/ has no site. Run `make docs`.')
    if wrong := list(faults(SITE)): sys.exit('\n'.join(wrong))
    print(f"{SITE.name}/index.html and {len(list(SITE.rglob('*.html')))-1} more pages; every link leads somewhere")


if __name__ == '__main__': main()
