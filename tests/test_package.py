"The package as a whole: names, docs, imports, and the README's commands"
import ast,importlib,inspect,pkgutil,re,subprocess,sys
from pathlib import Path
import pytest
import fastattn
from fastattn import all as everything
from nbdev.config import get_config
from nbdev.doclinks import nbglob

root = get_config(__file__).config_path
modules = [o.name for o in pkgutil.walk_packages(fastattn.__path__, 'fastattn.') if o.name.split('.')[-1] not in ('all','_modidx')]
leaves = [importlib.import_module(o) for o in modules]
public = [(m.__name__, n) for m in leaves for n in getattr(m, '__all__', [])]

def test_all():
    "`from fastattn.all import *` brings every public name, and each name means one thing"
    names = [n for _,n in public]
    assert len(names)==len(set(names))
    for m,n in public: assert getattr(everything, n) is getattr(sys.modules[m], n)

@pytest.mark.parametrize('module,name', [o for o in public if callable(getattr(sys.modules[o[0]], o[1]))])
def test_documented(module, name):
    o = getattr(sys.modules[module], name)
    if name.startswith(('xresnet','xse','xresnext')): return # fastai's own have none either
    assert inspect.getdoc(o)

def test_no_name_of_fastais_is_taken():
    "After both star imports, fastai's names mean what they did"
    from fastai.vision import all as fv
    fastai_names = set(dir(fv))
    ours = {n for _,n in public}
    assert ours & fastai_names <= {'SimpleSelfAttention'}

def test_import_leaves_cuda_alone():
    code = 'import torch; import fastattn.all; assert not torch.cuda.is_initialized()'
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code], check=True)

def test_imports_point_one_way():
    "layers <- models <- callback, learner <- recipes; bench looks on"
    rank = lambda m: ['core','layers','models','callback','learner','recipes','bench'].index(m.split('.')[0])
    for f in Path(fastattn.__path__[0]).rglob('*.py'):
        rel = f.relative_to(Path(fastattn.__path__[0])).with_suffix('')
        if rel.name in ('all','__init__','_modidx'): continue
        me = '.'.join(rel.parts)
        for node in ast.walk(ast.parse(f.read_text())):
            if not isinstance(node, ast.ImportFrom) or not node.level or not node.module: continue
            to = '.'.join([*rel.parts[:len(rel.parts)-node.level], node.module])
            assert rank(to)<=rank(me), f'{me} imports {to}'

def test_modules_come_from_notebooks():
    exps = {m.group(1) for f in nbglob(get_config(__file__).nbs_path, as_path=True) if (m := re.search(r'#\| default_exp ([\w.]+)', f.read_text()))}
    assert exps=={m.__name__.removeprefix('fastattn.') for m in leaves if hasattr(m, '__all__')}

def test_readme_commands():
    text = (root/'README.md').read_text()
    assert re.search(r'^pip install -e "\.\[dev\]" && pytest$', text, re.M)
    assert re.search(r'^pip install \. && fastattn-train$', text, re.M)
