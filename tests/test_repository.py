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


def targets(): return set(re.findall(r'^([a-z]+):', read('Makefile'), re.M))


@pytest.mark.parametrize('name', ['test', 'docs', 'release'])
def test_workflows_run_what_exists(name):
    for words in (step['run'].split() for step in steps(workflow(name)) if 'run' in step):
        if words[0] == 'make': assert words[-1] in targets(), f'{name}.yml runs `make {words[-1]}`'
        if words[0] == 'python' and words[1] != '-m': assert (ROOT/words[1]).is_file(), words


def test_every_target_is_phony_and_explained():
    phony = set(re.search(r'^\.PHONY: (.*)$', read('Makefile'), re.M)[1].split())
    shown = set(re.findall(r'^([a-z]+):[^#\n]*## ', read('Makefile'), re.M))
    assert targets() == phony == shown


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


def test_readme_has_badges(settings):
    text = read('README.md')
    for name in ('test', 'docs'): assert f"{settings['git_url']}/actions/workflows/{name}.yml/badge.svg" in text
    for part in ('img.shields.io/pypi/v/', 'arXiv-2507.21391'): assert part in text


# --- Lowest versions

def test_lowest_takes_every_bound(settings):
    "Whatever a user may install with a lower bound is installed at it; the notebooks and tests named there exist."
    lowest = tool('lowest')
    extras = {k.removesuffix('_requirements') for k in settings if k.endswith('_requirements')} - {'dev', 'docs', 'quantize'}  # torchao needs a newer torch
    assert set(lowest.EXTRAS) == extras and all('>=' in r for r in lowest.bounded(settings))
    chosen = [p.name for p in (ROOT/'nbs').rglob('*.ipynb') if re.match(lowest.pattern(lowest.NOTEBOOKS), p.name)]
    assert len(chosen) == len(lowest.NOTEBOOKS)
    assert all((ROOT/'tests'/name).is_file() for name in lowest.TESTS)


def test_what_is_installed_satisfies_the_bounds(settings):
    "constraints.txt pins nothing below a bound of settings.ini."
    from packaging.requirements import Requirement
    pins = dict(line.lower().replace('_', '-').split('==') for line in read('constraints.txt').splitlines() if '==' in line)
    for key in settings:
        if not key.endswith('requirements'): continue
        for wanted in map(Requirement, settings[key].split()):
            pin = pins[wanted.name.lower().replace('_', '-')]
            assert wanted.specifier.contains(pin), f'{wanted}, but constraints.txt has {pin}'


# --- The site

@pytest.fixture(scope='module')
def docs(): return tool('docs')


def listed(nav):
    "Every page of a navigation."
    for entry in nav:
        for page in entry.values() if isinstance(entry, dict) else [entry]: yield from [page] if isinstance(page, str) else listed(page)


def test_navigation_has_every_notebook_and_module_once(docs):
    pages = list(listed(docs.nav()))
    notebooks = [p.relative_to(ROOT/'nbs') for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts]
    modules = [p.relative_to(ROOT/LIB) for p in (ROOT/LIB).rglob('*.py') if not p.name.startswith('_')]
    wanted = [p.with_suffix('.md').as_posix() for p in notebooks]
    wanted += [f"api/{p.with_suffix('').as_posix().replace('/', '.')}.md" for p in modules]
    wanted += ['api/index.md', *(docs.page_of(ROOT/name) for name in docs.FILES)]
    assert sorted(pages) == sorted(wanted)


def test_navigation_follows_the_book(docs):
    pages = list(listed(docs.nav()))
    numbers = [int(m[1]) for p in pages if (m := re.search(r'/(\d+)_', p))]
    assert pages[0] == 'index.md' and numbers == sorted(numbers) and len(numbers) == len(set(numbers))


def test_links_between_files_lead_somewhere(docs):
    "Without building the site: what `make docs` would say, but for headings. README's links are `tools/readme.py`'s to check."
    by_name = {p.stem for p in docs.notebooks()}
    lost = []
    for path in [*docs.notebooks()[1:], *(ROOT/name for name in docs.FILES)]:
        cells = json.loads(path.read_text(encoding='utf-8'))['cells'] if path.suffix == '.ipynb' else [{'cell_type': 'markdown', 'source': path.read_text(encoding='utf-8')}]
        for text in (''.join(c['source']) for c in cells if c['cell_type'] == 'markdown'):
            for target in re.findall(r'\]\(([^)\s#]+)[^)\s]*\)', docs.CODE.sub('', docs.FENCE.sub('', text))):
                known = re.match('[a-z]+:', target) or (path.parent/target).exists() or target.endswith('.html') and target[:-5].split('/')[-1] in by_name
                if not known: lost.append(f'{path.relative_to(ROOT).as_posix()}: {target}')
    assert not lost, f'links that lead nowhere: {lost}'


def test_site_settings_agree(settings, docs):
    site = yaml.safe_load(read('mkdocs.yml'))
    assert site['repo_url'] == settings['git_url'] and site['site_url'] == settings['doc_host'] + settings['doc_baseurl'] + '/'
    assert site['theme']['font'] is False and '/_site/' in read('.gitignore') and site['site_dir'] == docs.SITE.name


def test_markdown_is_made_ready(docs):
    "Formulas leave the text and code stays; lists get their blank line; links lead to pages or to the repository."
    there = ROOT/'nbs/index.ipynb'
    chapter = docs.notebooks()[1].relative_to(ROOT/'nbs')

    def made(text): return docs.prose(text, there, 'index.md', 'https://host/repo')
    assert re.sub(r'\d+', '7', made('a $x_1$ b `$x$`')) == 'a @@formula7@@ b `$x$`'
    assert made('[![CI](https://host/badge.svg)](https://host)\nText') == 'Text'
    assert made('Prices: $5') == 'Prices: $5' and made('text:\n- one\n- two') == 'text:\n\n- one\n- two'
    assert made(f'[c]({chapter.as_posix()}#x)') == f"[c]({chapter.with_suffix('.md').as_posix()}#x)"
    assert made('[t](../setup.py)') == '[t](https://host/repo/blob/main/setup.py)' and made('[n](nowhere.ipynb)') == '[n](nowhere.ipynb)'
    assert made('```\n$x$ [n](nowhere)\n```') == '```\n$x$ [n](nowhere)\n```'


def test_faults_of_a_site_are_found(docs, tmp_path):
    (tmp_path/'index.html').write_text('<a href="a.html#here">x</a><a href="b.html">x</a><a href="a.html#no">x</a>'
                                       '<script src="https://cdn.example/x.js"></script><a href="https://example.org">x</a>')
    (tmp_path/'a.html').write_text('<h2 id="here">x</h2><p>@@formula3@@</p>')
    wrong = list(docs.faults(tmp_path))
    assert len(wrong) == 4 and all(any(t in w for w in wrong) for t in ('cdn.example', 'b.html', 'a.html#no', 'a formula'))


def test_comments_become_descriptions(docs):
    "docments as the API pages read them: beside a parameter, above it, and after the arrow."
    told = docs.docments('def f(\n    # how much\n    a:int, # in all\n    b=1, # per item\n)->int: # their sum\n    # not this\n    return a')
    assert told == {'a': 'how much in all', 'b': 'per item', 'return': 'their sum'}


# --- What ships

def test_type_marker_ships(): assert (ROOT/LIB/'py.typed').is_file() and "'py.typed'" in read('setup.py')


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
