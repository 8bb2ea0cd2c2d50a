"""Griffe reads source, not comments; this extension gives the API pages what fastcore's docments say.

The comment beside a parameter, a return annotation or a field becomes its description, and a function under `@patch`
becomes a method of the class it patches."""
import sys
from pathlib import Path

from griffe import (Class, Docstring, DocstringParameter, DocstringReturn, DocstringSectionParameters, DocstringSectionReturns,
                    DocstringSectionText, Extension)

sys.path.insert(0, str(Path(__file__).parent))
from docs import docments


def text_of(function): return function.docstring.value if function.docstring else ''


class Docments(Extension):
    def on_function_instance(self, *, node, func, agent, **kwargs):
        "Parameters and return value as sections of the docstring."
        if not hasattr(agent, 'lines_collection') or not node: return
        lines = agent.lines_collection[func.filepath][node.lineno-1:node.end_lineno]
        told = docments('\n'.join(line[node.col_offset:] for line in lines))
        if not told: return
        sections = [DocstringSectionText(text_of(func))] if text_of(func) else []
        stars = {'variadic positional': '*', 'variadic keyword': '**'}
        known = [DocstringParameter(stars.get(p.kind.value, '') + p.name, annotation=p.annotation, description=told.get(p.name, ''), value=None if p.kind.value in stars else p.default)
                 for p in func.parameters if p.name not in ('self', 'cls')]
        if known: sections.append(DocstringSectionParameters(known))
        if 'return' in told:
            sections.append(DocstringSectionReturns([DocstringReturn(name='', annotation=func.returns, description=told['return'])]))
        if not func.docstring: func.docstring = Docstring('', parent=func)
        func.docstring.__dict__['parsed'] = sections

    def on_attribute_instance(self, *, node, attr, agent, **kwargs):
        "The comment beside a field or a constant."
        if attr.docstring or not hasattr(agent, 'lines_collection') or not node: return
        source = agent.lines_collection[attr.filepath][node.end_lineno-1]
        found = source[node.end_col_offset:].strip() if source.isascii() else source.encode()[node.end_col_offset:].decode().strip()
        if found.startswith('#'): attr.docstring = Docstring(found.lstrip('#').strip(), parent=attr)

    def on_package(self, *, pkg, **kwargs):
        "Patched functions move into their classes, wherever in the package these are."
        modules = list(walk(pkg))
        classes = {c.name: c for m in modules for c in m.members.values() if isinstance(c, Class)}
        for module in modules:
            for name, func in list(module.members.items()):
                if func.is_alias or not func.is_function or not any(str(d.value).split('(')[0] == 'patch' for d in func.decorators): continue
                first = next(iter(func.parameters), None)
                owner = classes.get(str(first.annotation).rsplit('.', 1)[-1]) if first and first.annotation else None
                if owner is None: continue
                module.del_member(name)
                owner.set_member(name, func)


def walk(module):
    "A module and all below it."
    yield module
    for child in module.members.values():
        if not child.is_alias and child.is_module: yield from walk(child)
