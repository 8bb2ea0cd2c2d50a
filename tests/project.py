"Where the project lies, and clean copies of it."
import os, shutil, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIB = 'llava_reward_nb'
NOT_SOURCE = shutil.ignore_patterns('.*', '__pycache__', '*.egg-info', 'build', 'dist', 'demo', 'runs', '_docs', '_proc', '_site')


def copy_of(folder, *names):
    "A copy in `folder` of these files and folders of the project (all of its sources if none is named)."
    for source in [ROOT/n for n in names] or [ROOT]:
        target = folder/source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir(): shutil.copytree(source, target, ignore=NOT_SOURCE, dirs_exist_ok=True)
        elif source.exists(): shutil.copy2(source, target)
    return folder


def run(*command, **kwargs):
    "Run a command; its output, which a failure shows whole."
    env = {k: v for k, v in os.environ.items() if k not in ('IN_TEST', 'PYTHONPATH')} | kwargs.pop('env', {})
    done = subprocess.run([str(c) for c in command], text=True, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kwargs)
    assert done.returncode == 0, f"{' '.join(map(str, command))} gave {done.returncode}:\n{done.stdout}"
    return done.stdout


def tool(name):
    "A command of the environment the tests run in."
    return Path(sys.executable).parent/name
