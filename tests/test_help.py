"Every public parameter has its meaning in `help()`."
import importlib, inspect, re

import pytest
from project import LIB, ROOT

MODULES = sorted('.'.join(p.relative_to(ROOT/LIB).with_suffix('').parts) for p in (ROOT/LIB).rglob('[!_]*.py') if 'bundle' not in p.parts)
NATURAL = {'self', 'cls', 'args', 'kwargs', 'kw'}  # what needs no word


def functions(module):
    "Public functions, constructors and methods that a module defines, but for one-line methods in the body of a class: (name, function)."
    for name in getattr(module, '__all__', []):
        o = getattr(module, name)
        if inspect.isfunction(o): found = [(name, o)]
        elif inspect.isclass(o): found = [(f'{name}.{k}', getattr(o, k)) for k in vars(o) if not k.startswith('_') or k in ('__init__', '__call__')]
        else: continue
        for label, f in found:
            f = getattr(f, '__func__', f)
            if not inspect.isfunction(f) or f.__module__ != module.__name__: continue
            if not (inspect.getsourcefile(f) or '').startswith(str(ROOT/LIB)): continue  # `__init__` of a dataclass
            head = next(line for line in inspect.getsourcelines(f)[0] if line.strip().startswith(('def ', 'async def ')))
            if head.startswith(' ') and re.search(r'\)(->[^:]*)?:', head): continue
            yield label, f


@pytest.mark.parametrize('name', MODULES)
def test_help_tells_what_parameters_mean(name):
    module, silent = importlib.import_module(f'{LIB}.{name}'), []
    for label, f in functions(module):
        lines = (f.__doc__ or '').split('\n')
        silent += [f'{label}({p})' for p in inspect.signature(f).parameters
                   if p not in NATURAL and not any(line == p or line.startswith(f'{p} : ') for line in lines)]
    assert not silent, f'no docment for {len(silent)}: {", ".join(silent)}'
