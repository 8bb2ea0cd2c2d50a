"Write `README.md` from `nbs/index.ipynb` as it was last run: `python tools/readme.py`; `--check` only says whether they agree."
import posixpath, re, sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
PICTURES = 'nbs/images'  # where the README's pictures lie, as the README names them
DIRECTIVE = re.compile(r'^#\s*\|\s*(\S+?):?(?:\s+(.*?))?\s*$')
MIME_ORDER = ['text/markdown', 'image/png', 'image/jpeg', 'image/svg+xml', 'text/html', 'text/plain']
HIDES_CELL = {('hide', ''), ('include', 'false')}
HIDES_CODE = {('echo', 'false'), ('code-fold', 'true')}
HIDES_OUTPUT = {('output', 'false'), ('hide_output', '')}


def split_directives(source):
    "The directives at the top of a code cell as (name, value) pairs, and the code below them."
    lines, found = source.split('\n'), []
    while lines and (m := DIRECTIVE.match(lines[0])):
        found.append((m[1], (m[2] or '').lower()))
        lines.pop(0)
    return set(found), '\n'.join(lines).strip('\n')


def is_progress(out):
    "Whether an output is the last state of a progress bar."
    text = out.get('text') or out.get('data', {}).get('text/plain', '')
    return bool(re.fullmatch(r'[^\n]*\d+%\|[^\n]*\s*', ''.join(text)))


def reader_cells(cells):
    "The cells as a reader sees them: hidden ones dropped, directives removed, the richest kind of each output GitHub can show."
    for cell in cells:
        if cell.cell_type != 'code':
            yield cell
            continue
        directives, cell.source = split_directives(cell.source)
        if directives & HIDES_CELL or not (cell.source or cell.outputs): continue
        if directives & HIDES_OUTPUT: cell.outputs = []
        cell.outputs = [out for out in cell.outputs if not is_progress(out)]
        if directives & HIDES_CODE: cell.metadata.tags = ['hide_code']
        for out in cell.outputs:
            if 'data' in out:
                best = next((mime for mime in MIME_ORDER if mime in out.data), None)
                out.data = {best: out.data[best]} if best else {}
            if 'text/html' in out.get('data', {}):
                out.data['text/html'] = re.sub(r'<style.*?</style>\s*', '', out.data['text/html'], flags=re.S)
        yield cell


def relative_to_root(markdown):
    "Links of the notebook, relative to `nbs/`, as links of a file that lies beside `nbs/`."
    def moved(m):
        target = m[2]
        if re.match(r'[a-z]+:|[#/]', target) or target.startswith(PICTURES): return m[0]
        return m[1] + posixpath.normpath(posixpath.join('nbs', target)) + m[3]
    text = re.sub(r'(\]\()([^)\s]+)(\))', moved, markdown)
    return re.sub(r'(<img[^>]*?src=")([^"]+)(")', moved, text)


def render(notebook):
    "The README's text and its pictures: a dict of path (relative to the root) to bytes."
    nb = nbformat.read(notebook, as_version=4)
    nb.cells = list(reader_cells(nb.cells))
    nb.metadata.language_info = {'name': 'python'}
    exporter = MarkdownExporter(config=Config(TagRemovePreprocessor={'enabled': True, 'remove_input_tags': ['hide_code']}))
    body, resources = exporter.from_notebook_node(nb, {'unique_key': 'index', 'output_files_dir': PICTURES})
    note = '<!-- Written from nbs/index.ipynb by `make readme`; edit the notebook. -->\n\n'
    text = re.sub(r'\n{3,}', '\n\n', re.sub(r'[ \t]+$', '', relative_to_root(body), flags=re.M)).strip() + '\n'
    return note + text, resources.get('outputs', {})


def differences(text, pictures):
    "What on disk is not as rendered: paths relative to the root."
    wanted = {'README.md': text.encode(), **pictures}
    found = {p.relative_to(ROOT).as_posix() for p in (ROOT/PICTURES).glob('index_*')} | {'README.md'}
    same = {p for p in found & set(wanted) if (ROOT/p).exists() and (ROOT/p).read_bytes() == wanted[p]}
    return sorted((found | set(wanted)) - same)


def dead_links(text):
    "Relative links of the README that lead nowhere."
    links = re.findall(r'\]\(([^)\s#]+)[^)]*\)|<img[^>]*?src="([^"]+)"', text)
    return sorted({a or b for a, b in links if not re.match(r'[a-z]+:', a or b) and not (ROOT/(a or b)).exists()})


def main():
    text, pictures = render(ROOT/'nbs/index.ipynb')
    wrong = differences(text, pictures)
    if '--check' in sys.argv:
        if wrong: sys.exit(f"Not what nbs/index.ipynb says: {', '.join(wrong)}. Run `make readme`.")
    else:
        for path in (ROOT/PICTURES).glob('index_*'): path.unlink()
        for path, data in {'README.md': text.encode(), **pictures}.items():
            (ROOT/path).parent.mkdir(parents=True, exist_ok=True)
            (ROOT/path).write_bytes(data)
        print(f"README.md and {len(pictures)} pictures written from nbs/index.ipynb; changed: {', '.join(wrong) or 'nothing'}")
    if dead := dead_links(text): sys.exit(f"README.md links to files that do not exist: {', '.join(dead)}")


if __name__ == '__main__': main()
