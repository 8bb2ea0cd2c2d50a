"""The built wheel in an environment of its own: only what the package asks for, with the newest fastcore.

Takes minutes, nearly all of them installing."""
import csv, importlib.metadata, json, subprocess, sys, zipfile
from pathlib import Path

import pytest
from project import LIB, ROOT, copy_of, run

ABSENT = ['nbdev', 'execnb', 'nbformat', 'nbconvert', 'jupyter_core', 'jupyter_client', 'ipykernel', 'notebook', 'torchvision']
LEFT = [] # processes that still clean up
PROMPTS = {'a red circle': 'red.png', 'a blue square': 'blue.png'}
DRAW = f'''
import numpy as np
from {LIB}.shapes import parse_prompt, render, scene_for
for prompt, name in {PROMPTS}.items():
    render(scene_for(parse_prompt(prompt), np.random.default_rng(0), 'all', distractors=False)).save(name)
'''


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "The wheel, built from the source distribution, built from a copy of the project."
    repo = copy_of(tmp_path_factory.mktemp('source'))
    out = tmp_path_factory.mktemp('dist')
    print(run(sys.executable, '-m', 'build', '--outdir', out, repo).splitlines()[-1])
    return next(out.glob('*.whl'))


@pytest.fixture(scope='module')
def fresh(wheel, tmp_path_factory):
    "The `bin` folder of a new environment with the wheel in it; versions as tested, but for fastcore."
    folder = tmp_path_factory.mktemp('fresh')
    pins = [line for line in (ROOT/'constraints.txt').read_text().splitlines() if not line.startswith(('fastcore', '#'))]
    (folder/'constraints.txt').write_text('\n'.join(pins))
    run(sys.executable, '-m', 'venv', folder/'venv')
    run(folder/'venv/bin/python', '-m', 'pip', 'install', '--no-compile', '-c', folder/'constraints.txt', wheel)
    yield folder/'venv/bin'
    remover = 'import shutil, sys; shutil.rmtree(sys.argv[1])'
    LEFT.append(subprocess.Popen([sys.executable, '-c', remover, folder/'venv'], start_new_session=True)) # 2 GB; nobody waits for it


def test_wheel_holds_package_and_bundle(wheel):
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith(f'{LIB}/')}
    here = {p.relative_to(ROOT).as_posix() for p in (ROOT/LIB).rglob('*') if p.is_file() and '__pycache__' not in p.parts}
    assert inside == here


def test_environment_is_lean(fresh, tmp_path):
    code = f'import json, importlib.util as u; print(json.dumps([m for m in {ABSENT} if u.find_spec(m)]))'
    assert json.loads(run(fresh/'python', '-c', code, cwd=tmp_path)) == []
    newest = run(fresh/'python', '-c', 'import importlib.metadata as m; print(m.version("fastcore"))', cwd=tmp_path)
    assert int(newest.split('.')[0]) >= 2 > int(importlib.metadata.version('fastcore').split('.')[0])


def test_every_module_imports(fresh, tmp_path):
    modules = ['.'.join(p.relative_to(ROOT).with_suffix('').parts) for p in sorted((ROOT/LIB).rglob('[!_]*.py'))]
    run(fresh/'python', '-c', f'import importlib\nfor m in {modules}: importlib.import_module(m)', cwd=tmp_path)


def test_scores_an_image_from_the_command_line(fresh, tmp_path):
    "A picture of the prompt, drawn by the installed package, gets the higher of two scores."
    run(fresh/'python', '-c', DRAW, cwd=tmp_path)
    for prompt, name in PROMPTS.items():
        run(fresh/'llava_reward_score', *PROMPTS.values(), '--prompt', prompt, '--model', 'tiny', '--perspective', 'alignment',
            '--out', 'scores.csv', cwd=tmp_path, env={'HF_HUB_OFFLINE': '1'})
        with open(tmp_path/'scores.csv', newline='') as f: rows = list(csv.DictReader(f))
        assert [Path(row['image']).name for row in rows] == list(PROMPTS.values())
        scores = {Path(row['image']).name: float(row['alignment']) for row in rows}
        assert max(scores, key=scores.get) == name, scores


def test_demo_runs_to_the_end(fresh, tmp_path):
    "With nothing but the wheel and what it asks for: rewards, tables and steering."
    out = run(fresh/'llava_reward_demo', '--n', '8', '--prompts', '1', cwd=tmp_path, env={'HF_HUB_OFFLINE': '1'})
    assert 'FK by LLaVA-Reward' in out and (tmp_path/'demo'/'steering'/'steering.png').is_file()


@pytest.mark.parametrize('command', ['score', 'compare', 'train', 'convert', 'push', 'eval', 'table', 'latency', 'steer', 'demo', 'rewards', 'bench'])
def test_help_teaches(fresh, tmp_path, command):
    assert 'usage: llava_reward_' in run(fresh/f'llava_reward_{command}', '--help', cwd=tmp_path)
