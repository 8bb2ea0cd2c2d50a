"The files around the package name what exists, agree with `settings.ini`, and are no older than what they describe."
import importlib.util, json, re, subprocess, sys
from configparser import ConfigParser

import pytest, yaml
from project import LIB, ROOT

BUNDLE = ROOT/LIB/'bundle'
YAML = sorted(p for p in [*ROOT.glob('*.yml'), *ROOT.glob('.*.yaml'), *(ROOT/'.github').rglob('*.yml'), ROOT/'CITATION.cff'])


def read(name): return (ROOT/name).read_text(encoding='utf-8')


def tool(name):
    "A script of `tools/`, as a module."
    spec = importlib.util.spec_from_file_location(name, ROOT/'tools'/f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def settings():
    ini = ConfigParser(delimiters=['='], interpolation=None)
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    return ini['DEFAULT']


# --- GitHub

def workflow(name):
    found = yaml.safe_load(read(f'.github/workflows/{name}.yml'))
    return found | {'on': found[True]}  # YAML 1.1 reads `on` as a truth value


def steps(found): return [step for job in found['jobs'].values() for step in job.get('steps', [])]


@pytest.mark.parametrize('name', ['test', 'docs', 'release'])
def test_workflows_are_careful(name):
    found = workflow(name)
    assert found['permissions'] == {'contents': 'read'} and found['concurrency']['group']
    for job in found['jobs'].values(): assert 'uses' in job or job['timeout-minutes']
    for step in steps(found): assert 'run' in step or re.search(r'@(v\d+|release/v\d+)$', step['uses']), step


def test_only_publishing_jobs_get_a_token():
    have = {(name, job) for name in ('test', 'docs', 'release') for job, body in workflow(name)['jobs'].items()
            if 'id-token' in body.get('permissions', {})}
    assert have == {('docs', 'deploy'), ('release', 'publish')}


def test_pythons_of_the_workflows(settings):
    "The oldest Python that constraints.txt allows, the newest its torch has wheels for, and the oldest of all with the lowest versions."
    jobs = workflow('test')['jobs']
    oldest = re.search(r'v >= \((\d+), (\d+)\)', read('Makefile'))
    assert jobs['test']['strategy']['matrix']['python'][0] == f'{oldest[1]}.{oldest[2]}'
    python, = [s['with']['python-version'] for s in jobs['lowest']['steps'] if 'setup-python' in s.get('uses', '')]
    assert python == settings['min_python']


def test_release_follows_the_tests():
    jobs = workflow('release')['jobs']
    assert jobs['build']['needs'] == 'test' and jobs['publish']['needs'] == 'build'
    assert (ROOT/jobs['test']['uses']).is_file() and 'workflow_call' in workflow('test')['on']
    assert jobs['publish']['environment']['name'] == 'pypi'


# --- Releases

def test_this_version_can_be_released(settings):
    assert list(tool('release').problems(f"v{settings['version']}")) == []


def test_wrong_tag_is_not_released(settings):
    done = subprocess.run([sys.executable, ROOT/'tools/release.py', 'v99'], capture_output=True, text=True)
    assert done.returncode == 1 and f"the tag must be v{settings['version']}" in done.stderr


def test_citation_names_the_paper(settings):
    cff, readme = yaml.safe_load(read('CITATION.cff')), read('README.md')
    paper = cff['preferred-citation']
    assert cff['version'] == settings['version'] and cff['repository-code'] == settings['git_url']
    assert ' and '.join(f"{a['family-names']}, {a['given-names']}" for a in paper['authors']) in readme
    assert paper['title'] in readme and '2507.21391' in paper['url']


# --- The bundle's card

def test_model_card_is_what_the_log_says():
    assert (BUNDLE/'README.md').read_text(encoding='utf-8') == tool('card').render()


def test_model_card_quotes_every_perspective():
    text = (BUNDLE/'README.md').read_text(encoding='utf-8')
    assert yaml.safe_load(text.split('---')[1])['license'] == 'apache-2.0'
    for line in (BUNDLE/'log/accuracy.jsonl').read_text(encoding='utf-8').splitlines():
        row = json.loads(line)
        if row['kind'] != 'all': continue
        cells = next(t for t in text.splitlines() if t.startswith((f"| `{row['perspective']}` |", f"| {row['perspective']} |")))
        shown = cells.split('|')[4 if row['split'] == 'train' else 5]
        assert [float(x) for x in re.findall(r'\d\.\d+', shown)] == pytest.approx([row[k] for k in ('accuracy', 'low', 'high')], abs=6e-4)


def test_bundle_folders_are_on_the_card():
    text = (BUNDLE/'README.md').read_text(encoding='utf-8')
    missing = [p.name for p in BUNDLE.iterdir() if p.is_dir() and f'`{p.name}`' not in text]
    assert not missing, f'the model card does not tell what these are: {missing}'
