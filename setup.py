"Fill pyproject.toml's dynamic fields from settings.ini"
from configparser import ConfigParser
from setuptools import setup

ini = ConfigParser(interpolation=None)
with open('settings.ini', encoding='utf-8') as f: ini.read_file(f)
cfg = ini.defaults()
def words(k): return cfg[k].split()

setup(description=cfg['description'], keywords=words('keywords'), author=cfg['author'], author_email=cfg['author_email'],
    classifiers=cfg['classifiers'].strip().splitlines(), install_requires=words('requirements'),
    extras_require={k: words(f'{k}_requirements') for k in ('dev','distrib','track')}, entry_points={k: words(k) for k in ('console_scripts','nbdev')})
