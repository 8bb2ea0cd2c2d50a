"The style of the exported code, as far as a machine can tell: line length, one statement a line, no private traffic between modules."
import ast, io, json, re, tokenize

import pytest
from test_project import LIB, NUMBERED, ROOT, code_cells, has_directive, numbered

MAX_COLUMNS = 110
MODULES = sorted(p for p in (ROOT/LIB).rglob('*.py') if p.name != '_modidx.py' and 'bundle' not in p.parts)
modules = pytest.mark.parametrize('path', MODULES, ids=lambda p: p.relative_to(ROOT/LIB).as_posix())


def exported(path): return [s for s in code_cells(path) if has_directive(s, 'export')]


@numbered
def test_exported_lines_are_short(path):
    long = [line for s in exported(path) for line in s.split('\n') if len(line) > MAX_COLUMNS]
    assert not long, f'{len(long)} lines of more than {MAX_COLUMNS} columns:\n' + '\n'.join(long)


@numbered
def test_one_statement_a_line(path):
    "No `;` in exported code."
    found = [t.line for s in exported(path) for t in tokenize.generate_tokens(io.StringIO(s).readline) if t.type == tokenize.OP and t.string == ';']
    assert not found, '\n'.join(found)


@modules
def test_no_private_names_cross_modules(path):
    "What another module needs is public."
    tree, private, ours = ast.parse(path.read_text(encoding='utf-8')), [], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or '').split('.')[0] == LIB):
            private += [a.name for a in node.names if re.match(r'_(?!_)', a.name)]
            ours |= {a.asname or a.name for a in node.names if (ROOT/LIB/f'{a.name}.py').exists()}
    private += [f'{n.value.id}.{n.attr}' for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)
                and n.value.id in ours and re.match(r'_(?!_)', n.attr)]
    assert not private, f'private names of other modules: {private}'


@modules
def test_classes_grow_in_their_own_module(path):
    "`@patch` extends a class of the same module only."
    tree = ast.parse(path.read_text(encoding='utf-8'))
    own = {n.name for n in tree.body if isinstance(n, ast.ClassDef)}
    for n in tree.body:
        if not isinstance(n, ast.FunctionDef) or not any(ast.unparse(d).startswith('patch') for d in n.decorator_list): continue
        first = n.args.args[0].annotation
        names = {x.id for x in ast.walk(first) if isinstance(x, ast.Name)}
        assert names <= own, f'{n.name} is patched onto {names-own}, which another module defines'


@numbered
def test_a_chapter_has_a_title_and_something_to_see(path):
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    title = next(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
    assert re.match(r'# \S.*\n+> \S', title), f'begin with "# Title" and "> subtitle":\n{title}'
    assert any(c.get('outputs') for c in cells if c['cell_type'] == 'code'), 'no stored output: run the notebook and keep what it shows'


def test_all_chapters_are_checked(): assert len(NUMBERED) > 30


@numbered
def test_outputs_tell_nothing_of_the_machine(path):
    "No error and no path of whoever ran the notebook last."
    for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
        for output in cell.get('outputs', []):
            assert output['output_type'] != 'error', 'a stored error'
            text = json.dumps({k: v for k, v in output.get('data', output).items() if not k.startswith('image/')})
            found = re.search(r'(?:/work|/home|/root|/Users|[A-Z]:\\\\)/[^"\\ ]*|[^" ]*/site-packages/[^"\\ ]*', text)
            assert not found, f'a path of this machine in an output: {found[0]}'
