"What can be imported from where: the package itself, its rooms, and the paths of before."
import ast, subprocess, sys
from importlib import import_module

import pytest
from project import LIB, ROOT

import llava_reward_nb as package

ROOMS = sorted(p.parent.name for p in (ROOT/LIB).glob('*/__init__.py'))


def public(module):
    "The names a module exports, read from its source."
    tree = ast.parse((ROOT/LIB).joinpath(*module.split('.')).with_suffix('.py').read_text(encoding='utf-8'))
    return next(ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == '__all__')


def modules_of(room): return sorted(p.stem for p in (ROOT/LIB/room).glob('[!_]*.py'))


def test_the_package_offers_its_main_names():
    from llava_reward_nb import RewardModel, __version__, fk_steer, load_reward  # noqa: F401
    for name in package.__all__: assert getattr(package, name) is not None
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match='nothing'): package.nothing  # noqa: B018


@pytest.mark.parametrize('name', ['', *(f'.{r}' for r in ROOMS)])
def test_importing_a_package_is_light(name):
    code = f"import sys, {LIB}{name}; print([m for m in ('torch', 'numpy', 'transformers', 'PIL') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == '[]'


@pytest.mark.parametrize('room', ROOMS)
def test_a_room_offers_what_its_modules_export(room):
    "All of it, each name once, and no module bears the name of what another exports."
    inside = import_module(f'{LIB}.{room}')
    names = {m: public(f'{room}.{m}') for m in modules_of(room)}
    everything = [n for found in names.values() for n in found]
    twice = {n for n in everything if everything.count(n) > 1}
    assert not twice, f'exported by two modules of {room}: {twice}'
    assert not set(names) & set(everything), 'a module and a name are called the same'
    assert set(dir(inside)) == {*names, *everything}
    for module, found in names.items():
        for name in found: assert getattr(inside, name) is getattr(import_module(f'{LIB}.{room}.{module}'), name)
    with pytest.raises(AttributeError, match='nothing'): inside.nothing  # noqa: B018


@pytest.mark.parametrize('old, new', package._MOVED.items())
def test_old_paths_lead_to_new_ones(old, new):
    sys.modules.pop(f'{LIB}.{old}', None)
    with pytest.warns(DeprecationWarning, match=f'{LIB}.{old} is now {LIB}.{new}'): module = import_module(f'{LIB}.{old}')
    assert module is import_module(f'{LIB}.{new}')
    assert module.__name__ == module.__spec__.name == f'{LIB}.{new}'


@pytest.mark.parametrize('old, new, name', [(old, new, name) for old, heirs in package._DIVIDED.items() for new in heirs for name in public(new)])
def test_a_divided_module_leads_to_names_that_left_it(old, new, name):
    assert not set(public(old)) & set(public(new))
    with pytest.warns(DeprecationWarning, match=f'{LIB}.{old}.{name} is now {LIB}.{new}.{name}') as said:
        exec(f'from {LIB}.{old} import {name}', found := {})
    assert found[name] is getattr(import_module(f'{LIB}.{new}'), name)
    assert said[0].filename == '<string>', 'the warning points at whoever imports'


@pytest.mark.parametrize('old', package._DIVIDED)
def test_a_divided_module_has_no_other_names(old):
    module = import_module(f'{LIB}.{old}')
    for name in ('nothing', '_private', '__path__'):
        with pytest.raises(AttributeError, match=name): getattr(module, name)
    with pytest.raises(ImportError, match='nothing'): exec(f'from {LIB}.{old} import nothing', {})
