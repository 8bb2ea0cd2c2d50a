"Multimodal LLMs as customised reward models for text-to-image generation. Importing this is light: a name is fetched when it is asked for."
import ast, re, sys, warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path

__version__ = "0.1.0"

_NAMES = {  # name: the module that defines it
    **dict.fromkeys(('CheckpointError', 'InputError', 'load_image'), 'core'),
    **dict.fromkeys(('read_table', 'write_table'), 'files'),
    'MODELS': 'weights',
    **dict.fromkeys(('show', 'show_pairs'), 'views'),
    **dict.fromkeys(('RewardModel', 'PerspectiveConfig'), 'model'),
    'RewardConfig': 'config',
    **dict.fromkeys(('RewardTrainer', 'train_perspective'), 'trainer'),
    **dict.fromkeys(('RewardRecords', 'load_records'), 'data'),
    **dict.fromkeys(('load_reward', 'score_all'), 'rewards'),
    **dict.fromkeys(('SteerConfig', 'SteeringError', 'fk_steer', 'load_pipeline', 'steer'), 'steering'),
    **dict.fromkeys(('Run', 'run_benchmark', 'make_table', 'load_benchmark'), 'evaluation'),
}
__all__ = ['__version__', *sorted(_NAMES)]

_MOVED = {  # where modules of the time before 0.1.0 went
    'cli': 'commands', 'listing': 'commands.evaluate', 'commands.listing': 'commands.evaluate',
    'main': 'commands.main', 'cards': 'rewards.cards',
    **{n: f'rewards.{n}' for n in ('clip', 'imagereward', 'vqa', 'grader', 'ocr', 'real')},
    **{n: f'steering.{n}' for n in ('particles', 'schedulers', 'traces')},
    **{n: f'evaluation.{n}' for n in ('geneval', 'benchmarks', 'tables', 'signs')},
    'tiny_diffusion': 'tiny.diffusion', 'tiny_metrics': 'tiny.metrics', 'guidance': 'tiny.guidance',
}
_DIVIDED = {'core': ['files', 'weights']}  # modules of the time before 0.1.0, and those that took over some of their names


def _public(path):
    "The names in `__all__` of a source file, without running it."
    found = re.search(r'^__all__ = (\[.*?\])$', Path(path).read_text(encoding='utf-8'), re.M | re.S)
    return ast.literal_eval(found[1]) if found else []


def room(
    package,  # its `__name__`
    modules,  # names of its modules, in the order of the book
):  # `__getattr__` and `__dir__` of the package
    "Let a sub-package offer the public names of its modules; a module is imported when one of its names is asked for."
    def owners(): return {name: m for m in reversed(modules) for name in _public(find_spec(f'{package}.{m}').origin)}

    def __getattr__(name):
        if name in modules: return import_module(f'{package}.{name}')
        if name == '__all__': return sorted(owners())
        if not name.startswith('__') and (module := owners().get(name)):
            return getattr(import_module(f'{package}.{module}'), name)
        raise AttributeError(f'module {package!r} has no attribute {name!r}')

    def __dir__(): return sorted({*modules, *owners()})
    return __getattr__, __dir__


def __getattr__(name):
    if name in _NAMES: return getattr(import_module(f'{__name__}.{_NAMES[name]}'), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__(): return sorted({*globals(), *_NAMES})


class _Moved(MetaPathFinder, Loader):
    "Imports a module by its old name, with a warning that tells the new one."
    def find_spec(self, fullname, path=None, target=None):
        name = fullname.removeprefix(f'{__name__}.')
        if name != fullname and name in _MOVED: return ModuleSpec(fullname, self)

    def create_module(self, spec):
        new = f"{__name__}.{_MOVED[spec.name.removeprefix(f'{__name__}.')]}"
        warnings.warn(f'{spec.name} is now {new}; the old name goes in version 0.2', DeprecationWarning, stacklevel=3)
        self.new, module = new, import_module(new)
        self.spec = module.__spec__
        return module

    def exec_module(self, module): module.__spec__ = self.spec


class _Divided(MetaPathFinder):
    "Lets a divided module offer the names that others took over, with a warning that tells where they are."
    def find_spec(self, fullname, path=None, target=None):
        package, _, name = fullname.rpartition('.')
        if package != __name__ or name not in _DIVIDED: return None
        spec = PathFinder.find_spec(fullname, path, target)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            module.__getattr__ = _successor(name)
        spec.loader.exec_module = exec_module
        return spec


def _successor(
    module,  # one of `_DIVIDED`
):  # its `__getattr__`
    "Look a name up in the modules that took over the names of `module`."
    old = f'{__name__}.{module}'

    def __getattr__(name):
        heirs = [] if name.startswith('_') else [f'{__name__}.{m}' for m in _DIVIDED[module]]
        owner = next((h for h in heirs if name in _public(find_spec(h).origin)), None)
        if owner is None: raise AttributeError(f'module {old!r} has no attribute {name!r}')
        warnings.warn(f'{old}.{name} is now {owner}.{name}; the old path goes in version 0.2',
                      DeprecationWarning, stacklevel=2)
        return getattr(import_module(owner), name)
    return __getattr__


sys.meta_path.insert(0, _Divided())
sys.meta_path.append(_Moved())
