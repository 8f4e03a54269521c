"The package as a whole: names, docs, imports, and the README's commands"
import ast,importlib,pkgutil,re,sys
from pathlib import Path
import pytest
import fastattn
from commands import Forked
from nbdev.config import get_config
from nbdev.doclinks import nbglob

cfg = get_config(__file__)
package = Path(fastattn.__path__[0])
modules = [o.name for o in pkgutil.walk_packages(fastattn.__path__, 'fastattn.') if o.name.split('.')[-1] not in ('all','_modidx')]
leaves = [importlib.import_module(o) for o in modules]
public = [(m.__name__, n) for m in leaves for n in getattr(m, '__all__', [])]

def test_all():
    "`from fastattn.all import *` brings every public name, and each name means one thing"
    names,brought = [n for _,n in public],{}
    assert len(names)==len(set(names))
    exec('from fastattn.all import *', brought)
    for m,n in public: assert brought[n] is getattr(sys.modules[m], n), f'{m}.{n}'

@pytest.mark.parametrize('module,name', [o for o in public if callable(getattr(sys.modules[o[0]], o[1]))])
def test_documented(module, name):
    if re.fullmatch(r'x(res|se)\w+_ssa(_sym)?', name): return # models by name: fastai's own have none either
    assert (getattr(sys.modules[module], name).__doc__ or '').strip()

def test_no_name_of_fastais_is_taken():
    "After both star imports, fastai's names mean what they did, but for the layer that ours replaces, and two functions that `learn.save` and `learn.load` call by themselves"
    from fastai.vision import all as fv
    assert {n for _,n in public} & set(dir(fv)) <= {'SimpleSelfAttention','save_model','load_model'}

def test_import_leaves_cuda_alone(tmp_path):
    "A fork of a process that has begun with CUDA can't use it, and says so in `_is_in_bad_fork`: PyTorch has no public name for that"
    code = f'import sys,torch,fastattn.all,{",".join(modules)}; sys.exit(torch.cuda.is_initialized() or torch.cuda._is_in_bad_fork())'
    assert Forked(tmp_path, code).end().returncode==0

def test_imports_point_one_way():
    "layers <- models <- callback, learner <- recipes; interpret and bench look on"
    rooms = ['core','layers','models','callback','learner','recipes','interpret','bench']
    def rank(m): return rooms.index(m.split('.')[0])
    for f in package.rglob('*.py'):
        rel = f.relative_to(package).with_suffix('')
        if rel.name in ('all','__init__','_modidx'): continue
        me = '.'.join(rel.parts)
        for node in ast.walk(ast.parse(f.read_text(encoding='utf-8'))):
            if not isinstance(node, ast.ImportFrom) or not node.level or not node.module: continue
            to = '.'.join([*rel.parts[:len(rel.parts)-node.level], node.module])
            assert rank(to)<=rank(me), f'{me} imports {to}'

def test_modules_come_from_notebooks():
    "Every exporting notebook has its module, and every module with an `__all__` its notebook"
    nbs = [f.read_text(encoding='utf-8') for f in nbglob(cfg.nbs_path, as_path=True)]
    exported = {m.group(1) for o in nbs if (m := re.search(r'#\| default_exp ([\w.]+)', o))}
    assert exported=={m.__name__.removeprefix('fastattn.') for m in leaves if hasattr(m, '__all__')}

def test_readme_commands():
    "One command runs the main job, one the tests; `.ci/run` finds the second by its beginning and its end"
    lines = (cfg.config_path/'README.md').read_text(encoding='utf-8').splitlines()
    assert [o for o in lines if re.match('pip install .* && ', o)]==['pip install . && fastattn-train', 'pip install -e ".[dev]" && pytest -n auto']
