"Everything about the package comes from `settings.ini`, which nbdev reads too; only names of commands and extras stand here."
import re
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
ini = ConfigParser(delimiters=['='], interpolation=None)
ini.read(here/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
lib = cfg['lib_name']
COMMANDS = ('llava_reward', *(f'llava_reward_{name}' for name in (
    'score', 'compare', 'train', 'data', 'convert', 'push', 'demo', 'eval', 'table', 'latency', 'steer', 'table9', 'figures',
    'rewards', 'serve', 'app')))
statuses = {'3': '3 - Alpha', '4': '4 - Beta', '5': '5 - Production/Stable'}



def as_on_pypi(text):
    "The README where its files are not: relative links lead to the repository."
    text = re.sub(r'(!\[[^\]]*\]\()(?![a-z]+:|#)', rf"\1{cfg['git_url']}/raw/main/", text)
    return re.sub(r'((?<!!)\[[^\]]*\]\()(?![a-z]+:|#)', rf"\1{cfg['git_url']}/blob/main/", text)


setup(
    name=lib,
    version=cfg['version'],
    description=cfg['description'],
    long_description=as_on_pypi((here/'README.md').read_text(encoding='utf-8')) if (here/'README.md').exists() else '',
    long_description_content_type='text/markdown',
    keywords=cfg['keywords'].split(),
    author=cfg['author'],
    author_email=cfg['author_email'],
    url=cfg['git_url'],
    license={'apache2': 'Apache-2.0'}[cfg['license']],
    license_files=['LICENSE'],
    classifiers=[
        f"Development Status :: {statuses[cfg['status']]}",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        'Programming Language :: Python :: 3',
    ],
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg['requirements'].split(),
    extras_require={k: cfg[f'{k}_requirements'].split() for k in ('metrics', 'grader', 'ocr', 'nudenet', 'serve', 'ray', 'app', 'qlora', 'quantize',
                                                               'docs', 'dev')},
    packages=find_packages(include=[lib, f'{lib}.*']),
    package_data={lib: ['py.typed', 'bundle/**', 'recipes/**']},
    entry_points={
        'console_scripts': [
            *(f'{name} = {lib}.commands:{name}' for name in COMMANDS),
            f'llava_reward_bench = {lib}.bench:llava_reward_bench',
        ],
        'nbdev': [f'{lib} = {lib}._modidx:d'],
    },
    zip_safe=False,
)
