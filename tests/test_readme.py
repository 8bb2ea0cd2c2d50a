"Every Python block and every command of the README runs, in order, in a fresh folder and without a network."
import ast, os, re, shlex, socket, subprocess, tarfile

import matplotlib, numpy as np, pytest, torch
from project import ROOT, tool

from llava_reward_nb.weights import MODELS
from llava_reward_nb.data import load_records
from llava_reward_nb.shapes.world import render
from llava_reward_nb.shapes.records import alignment_pairs, write_records
from llava_reward_nb.shapes.prompts import parse_prompt
from llava_reward_nb.shapes.scenes import scene_for

TINY = MODELS['tiny']
STAND_INS = {  # what is full-size in the README, and what takes its place here
    'path/to/llava-reward-phi-alignment': str(TINY/'alignment'),
    'microsoft/Phi-3.5-vision-instruct': str(TINY/'base'),
    "device='cuda'": "device='cpu'",
    "('llava-reward', 'imagereward', 'hpsv2.1', 'vqascore')": "('tiny', 'tiny-imagereward', 'tiny-clip', 'tiny/fidelity')",
    "RECIPES['sdxl']": "'tiny', RECIPES['sdxl'][1] | dict(height=64, width=64, num_inference_steps=20, steps=[4, 8, 12, 16])",
    'fidelity_pairs(128': 'fidelity_pairs(16',
    'fidelity_pairs(100': 'fidelity_pairs(8',
    "'tiny', out=": "'tiny', limit=8, out=",
    '--limit 20': '--limit 4',
    '--limit 4 --steps 8 --out table9': '--limit 1 --particles 2 --steps 5 --guidance none clipscore --metrics clipscore --out table9',
    'phi-alignment-bt data.train': 'tiny-alignment-bt data.train',
    '--particles 2 --steps 8 --out figures': '--particles 2 --steps 5 --metrics clipscore --out figures',
}
NOT_RUN = {'make': 'it makes .venv, and `make test` is what runs this test'}
SERVERS = {'llava_reward serve': 'serving', 'llava_reward app': 'pages at'}  # runs until the end; what it says when it answers
LANGUAGES = {'python': 'run', 'py': 'run', 'sh': 'run', 'json': 'read as records', 'bibtex': 'nothing to run'}


def blocks():
    "Language and text of each fenced block, with the stand-ins."
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    for full, small in STAND_INS.items():
        assert full in text, f'STAND_INS has {full!r}, which the README no longer says'
        text = text.replace(full, small)
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        text = text.replace(':8123/', f':{free.getsockname()[1]}/').replace('--port 8123', f'--port {free.getsockname()[1]}')
    assert len(re.findall(r'^```', text, re.M)) % 2 == 0
    return re.findall(r'^```(\w*)\n(.*?)^```$', text, re.M | re.S)


def run_python(source, names):
    "As a notebook cell: the value of a last expression is shown."
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) and not source.rstrip().endswith(';') else None
    exec(compile(tree, 'README.md', 'exec'), names)
    if last:
        value = eval(compile(ast.Expression(last.value), 'README.md', 'eval'), names)
        shown = repr(value) + (value._repr_markdown_() if hasattr(value, '_repr_markdown_') else '')
        assert shown and not (isinstance(value, torch.Tensor) and value.isnan().any())


def run_command(line, folder):
    "Its console script; what it says it writes must be there."
    name, *args = shlex.split(line, comments=True)
    if name in NOT_RUN: return
    env = os.environ | dict(HF_HUB_OFFLINE='1', HTTP_PROXY='http://127.0.0.1:9', HTTPS_PROXY='http://127.0.0.1:9')
    done = subprocess.run([tool(name), *args], cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0 and done.stdout, f'{line}\n{done.stdout}'
    if '--out' in args: assert (folder/args[args.index('--out')+1]).exists(), f'{line} wrote no such file or folder'


def start_server(line, folder, says):
    "Its process, as soon as it answers."
    name, *args = shlex.split(line, comments=True)
    port = [] if '--port' in args else ['--port', '0']
    server = subprocess.Popen([tool(name), *args, *port], cwd=folder, env=os.environ | dict(HF_HUB_OFFLINE='1'), text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    said = server.stdout.readline()
    assert says in said, f'{line}\n{said}'
    return server


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "The files that the README's reader is taken to have."
    monkeypatch.chdir(tmp_path)
    for name, text in {'a.png': 'a red circle', 'b.jpg': 'a blue square', 'photo.jpg': 'two stars', 'other.png': 'a green triangle'}.items():
        render(scene_for(parse_prompt(text), np.random.default_rng(0), 'all')).save(tmp_path/name)
    (tmp_path/'photos').mkdir()
    (tmp_path/'shards').mkdir()
    with tarfile.open(tmp_path/'shards'/'0.tar', 'w') as tar:
        for i in range(4):
            path = tmp_path/'photos'/f'{i}.png'
            render(scene_for(parse_prompt('a star'), np.random.default_rng(i), 'all')).save(path)
            path.with_suffix('.txt').write_text('a star')
            for file in path, path.with_suffix('.txt'): tar.add(file, file.name)
    os.rename(write_records(alignment_pairs(16, seed=1), tmp_path), tmp_path/'pairs.jsonl')
    return tmp_path


def test_every_block_runs(folder, monkeypatch, request):
    monkeypatch.setattr(matplotlib, 'get_backend', matplotlib.get_backend)  # put back after
    matplotlib.use('Agg')
    names, ran, servers = {'__name__': 'readme'}, [], []
    request.addfinalizer(lambda: [server.kill() for server in servers])
    for language, text in blocks():
        assert language in LANGUAGES, f'a block in {language or "no language"} would not be run:\n{text}'
        if language in ('python', 'py'): run_python(text, names)
        elif language == 'sh':
            for line in text.replace('\\\n', ' ').splitlines():
                says = next((said for start, said in SERVERS.items() if line.startswith(start)), None)
                if says: servers.append(start_server(line, folder, says))
                elif line.strip(): run_command(line, folder)
        elif language == 'json':
            (folder/'record.jsonl').write_text(text, encoding='utf-8')
            assert len(load_records(folder/'record.jsonl')) == text.count('\n')
        ran.append(language)
    assert {'python', 'py', 'sh', 'json'} <= set(ran)
