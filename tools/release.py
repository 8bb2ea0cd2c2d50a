"Is the project ready to be released as this tag? `python tools/release.py v0.1.0` says what is not."
import re, sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def version():
    "The version `settings.ini` names."
    ini = ConfigParser(delimiters=['='], interpolation=None)
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    return ini['DEFAULT']['version']


def notes(version):
    "The changelog's section for a version, without its heading, or None."
    text = (ROOT/'CHANGELOG.md').read_text(encoding='utf-8')
    found = re.search(rf'^## \[{re.escape(version)}\][^\n]*\n(.*?)(?=^## |\Z)', text, re.M | re.S)
    return found[1].strip() if found else None


def problems(tag):
    "What keeps a tag from being a release, one sentence each."
    now = version()
    cited = re.search(r'^version: (\S+)$', (ROOT/'CITATION.cff').read_text(encoding='utf-8'), re.M)
    if tag != f'v{now}': yield f'The tag is {tag}, but settings.ini has version {now}; the tag must be v{now}.'
    if not notes(now): yield f'CHANGELOG.md has no section "## [{now}]", or an empty one.'
    if not cited or cited[1] != now: yield f'CITATION.cff has version {cited[1] if cited else "none"}, settings.ini {now}.'


def main():
    if len(sys.argv) != 2: sys.exit('One argument is needed, the tag: python tools/release.py v0.1.0')
    if wrong := list(problems(sys.argv[1])): sys.exit('\n'.join(wrong))
    print(f'{sys.argv[1]} can be released')


if __name__ == '__main__': main()
