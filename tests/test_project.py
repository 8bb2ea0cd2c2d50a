"Notebooks, package and README say the same, and keep the rules of CONTRIBUTING.md."
import ast, hashlib, json, re, sys
from functools import cache

import pytest
from project import LIB, ROOT, copy_of, run, tool

MAX_LINES = 60
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if not any(part[0] in '._' for part in p.relative_to(ROOT).parts))
NUMBERED = [p for p in NOTEBOOKS if re.match(r'\d+_', p.name)]
INITS = sorted(p.relative_to(ROOT).as_posix() for p in [*(ROOT/LIB).rglob('__init__.py'), ROOT/LIB/'__main__.py'] if 'bundle' not in p.parts)  # written by hand
notebooks = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.relative_to(ROOT/'nbs').as_posix())
numbered = pytest.mark.parametrize('path', NUMBERED, ids=lambda p: p.name)


@cache
def code_cells(path):
    "The source of each code cell."
    return [''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']


def has_directive(source, pattern): return re.search(rf'^#\s*\|\s*{pattern}', source, re.M)


@cache
def module_of(path):
    "The module a notebook exports, or None."
    found = [m[1] for s in code_cells(path) if (m := has_directive(s, r'default_exp\s+(\S+)'))]
    assert len(found) <= 1, f'{path.name} has {len(found)} default_exp'
    return found[0] if found else None


def hashes(root):
    "Path and content hash of every notebook and every file of the package but the bundle."
    files = [p for top in ('nbs', LIB) for p in (root/top).rglob('*') if p.is_file() and p.suffix in ('.ipynb', '.py')]
    files += [root/'settings.ini', root/'pyproject.toml']
    return {p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files
            if not {'.ipynb_checkpoints', '__pycache__', 'bundle'} & set(p.parts)}


def test_export_and_clean_leave_no_difference(tmp_path):
    "The package, made anew from the notebooks alone, is the package that is here: nothing new, changed or left over."
    repo = copy_of(tmp_path, 'nbs', 'settings.ini', 'pyproject.toml', *INITS)
    for command in ('nbdev_export', 'nbdev_clean'): run(tool(command), cwd=repo)
    here, made = hashes(ROOT), hashes(repo)
    wrong = [f'new, not in the tree: {p}' for p in sorted(made.keys() - here.keys())]
    wrong += [f'made by no notebook: {p}' for p in sorted(here.keys() - made.keys())]
    wrong += [f'differs: {p}' for p in sorted(here.keys() & made.keys()) if here[p] != made[p]]
    assert not wrong, 'Run `make export`, and delete the modules whose notebook is gone.\n' + '\n'.join(wrong)


def test_no_undefined_or_unused_names():
    "No undefined name, star import, unused import or variable in the package. `@patch` repeats names, so F811 is off."
    run(tool('ruff'), 'check', '--isolated', '--no-cache', '--select=E9,F', '--ignore=F811', '--output-format=concise',
        '--per-file-ignores=__init__.py:F401,tests/*:F403,tests/*:F405', LIB, 'tests', 'tools', 'setup.py', cwd=ROOT)


def test_notebook_numbers_and_modules_are_unique():
    numbers, modules = [p.name.split('_')[0] for p in NUMBERED], [m for p in NOTEBOOKS if (m := module_of(p))]
    lost = [p.relative_to(ROOT).as_posix() for p in NUMBERED if not re.fullmatch(rf'{p.name[0]}_[a-z]+', p.parent.name) or p.parent.parent != ROOT/'nbs']
    assert not lost, f'a notebook stands in the part that its number begins with: {lost}'
    assert len(set(numbers)) == len(numbers), f'two notebooks share a number: {numbers}'
    assert len(set(modules)) == len(modules), f'two notebooks export one module: {modules}'


def imported_modules(source, modules):
    "Those of `modules` that a cell imports, magics left out; a room stands for all of its modules."
    tree = ast.parse('\n'.join('pass' if line[:1] in ('%', '!') else line for line in source.split('\n')))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module: names = [f'{node.module}.{a.name}' for a in node.names]
        else: continue
        for name in (n.removeprefix(f'{LIB}.') for n in names if n.startswith(f'{LIB}.')):
            owners = [m for m in modules if name == m or name.startswith(f'{m}.')]
            yield from owners or [m for m in modules if m.startswith(f"{name.split('.')[0]}.")]


@numbered
def test_imports_only_lower_notebooks(path):
    owner = {module_of(p): p for p in NUMBERED if module_of(p)}
    for source in code_cells(path):
        if source.startswith('%%'): continue
        high = [m for m in imported_modules(source, owner) if owner[m].name >= path.name]
        assert not high, f'{path.name} imports {high}, which no lower notebook owns:\n{source}'


@notebooks
def test_no_state_of_widgets_is_kept(path):
    metadata = json.loads(path.read_text(encoding='utf-8'))['metadata']
    assert 'widgets' not in metadata, f'thousands of lines that nobody sees: delete metadata.widgets of {path.name}'


@notebooks
def test_cells_are_short_and_all_run(path):
    for source in code_cells(path):
        assert not has_directive(source, r'eval:\s*false'), f'a cell that never runs proves nothing; flag it slow or gpu:\n{source}'
        lines = source.count('\n') + 1
        assert not has_directive(source, 'export') or lines <= MAX_LINES, f'exported cell of {lines} lines (at most {MAX_LINES}):\n{source}'


def test_readme_is_the_index():
    run(sys.executable, 'tools/readme.py', '--check', cwd=ROOT)
