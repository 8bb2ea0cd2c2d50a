"""The lowest versions that `settings.ini` allows, in an environment of their own, with a part of the tests.

`python tools/lowest.py [--python 3.11]` installs them in `.venv-lowest` (what is there already stays) and runs `NOTEBOOKS`
and `TESTS`. uv finds the versions: each `>=` of settings.ini becomes `==` the lowest release that satisfies it, whatever the others
are, and what these need in turn is the newest that fits; bounds that contradict each other are an error. torch 2.6 for Linux comes from PyPI as a CUDA build of
3 GB, which runs on CPUs as well; `UV_TORCH_BACKEND=cpu` takes the CPU build from download.pytorch.org."""
import argparse, os, subprocess, sys, time
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT/'.venv-lowest'
UV = 'uv==0.13.9'
# torchao is left out: it needs a newer torch than the package does, and transformers imports it wherever it is installed
EXTRAS = ('metrics', 'grader', 'ocr', 'nudenet', 'serve', 'ray', 'app', 'qlora')
NOTEBOOKS = ['losses', 'skipca', 'phi3v', 'model', 'clip', 'ocr', 'schedulers', 'particles', 'tables', 'mllm']
TESTS = ['test_losses.py', 'test_phi3v.py', 'test_clip.py', 'test_store.py', 'test_trainer.py', 'test_rewards.py']


def settings():
    ini = ConfigParser(delimiters=['='], interpolation=None)
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    return ini['DEFAULT']


def bounded(config):
    "Everything the package and its extras ask for."
    return sorted({r for key in ('requirements', *(f'{e}_requirements' for e in EXTRAS)) for r in config[key].split()})


def run(*command, **kwargs):
    print('$', *[Path(c).name if os.path.isabs(str(c)) else c for c in command], flush=True)
    return subprocess.run([str(c) for c in command], cwd=ROOT, **kwargs).returncode


def must(*command):
    if code := run(*command): sys.exit(f"{Path(str(command[0])).name} gave {code}; these versions could not be installed")


def install(config, python):
    "The environment; returns the folder of its commands."
    uv, env = HOME/'uv', HOME/'env'
    if not (uv/'bin/uv').exists():
        must(sys.executable, '-m', 'venv', uv)
        must(uv/'bin/python', '-m', 'pip', 'install', '-qq', UV)
    tools = [r for r in config['dev_requirements'].split() if not r.startswith('fastcore')]
    (HOME/'lowest.in').write_text('\n'.join(bounded(config)))
    (HOME/'tools.in').write_text('\n'.join(tools))
    if not (env/'bin/python').exists(): must(uv/'bin/uv', 'venv', '-q', '--python', python, env)
    must(uv/'bin/uv', 'pip', 'compile', '-q', '--upgrade', '--resolution', 'lowest', '--no-deps', '--python', env/'bin/python',
         '--only-binary', ':all:', HOME/'lowest.in', '-o', HOME/'lowest.txt')
    must(uv/'bin/uv', 'pip', 'install', '-q', '--python', env/'bin/python', '-r', HOME/'lowest.txt', '-r', HOME/'tools.in')
    must(uv/'bin/uv', 'pip', 'install', '-q', '--python', env/'bin/python', '--no-deps', '-e', '.')
    return env/'bin'


def pattern(names):
    "A regular expression for the notebooks of these names, whatever their numbers."
    there = {p.stem.partition('_')[2] for p in (ROOT/'nbs').rglob('[0-9]*_*.ipynb')}
    if lost := sorted(set(names) - there): sys.exit(f"no notebook is called {', '.join(lost)}; mend NOTEBOOKS in tools/lowest.py")
    return rf"^\d+_({'|'.join(names)})\.ipynb$"


def main():
    config = settings()
    parser = argparse.ArgumentParser(description='Install the lowest versions of settings.ini and test with them.')
    ours = '{}.{}'.format(*sys.version_info) == config['min_python']
    parser.add_argument('--python', default=sys.executable if ours else config['min_python'],
                        help='version or path of the Python to test with (default: min_python of settings.ini)')
    began, bin = time.time(), install(config, parser.parse_args().python)
    pins = [line for line in (HOME/'lowest.txt').read_text().splitlines() if line[0] not in '# ']
    print(*pins, f'== installed in {time.time()-began:.0f} s', sep='\n', flush=True)
    os.environ |= {'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '1'}
    wrong = run(bin/'nbdev_test', '--file_re', pattern(NOTEBOOKS), '--n_workers', 2, '--do_print', '--timing')
    wrong |= run(bin/'python', '-m', 'pytest', '-q', '--tb=short', *(f'tests/{name}' for name in TESTS))
    print(f'== {len(NOTEBOOKS)} notebooks and {len(TESTS)} test files in {time.time()-began:.0f} s')
    if wrong: sys.exit('This does not run with the lowest versions. Mend it, or raise the bound in settings.ini.')


if __name__ == '__main__': main()
