import subprocess,sys,pytest,torch
from pathlib import Path
from nbdev.config import get_config
from nbdev.doclinks import nbglob

cfg = get_config(__file__)
run = [Path(sys.executable).with_name('nbdev-test'), '--flags', 'cuda' if torch.cuda.is_available() else '']

# In an interpreter of its own: a notebook defines what its module has defined, and an operator of torch can be defined but once
@pytest.mark.parametrize('nb', nbglob(cfg.nbs_path, as_path=True), ids=lambda p: p.relative_to(cfg.nbs_path).as_posix())
def test_nb(nb):
    p = subprocess.run([*run, nb], capture_output=True, text=True)
    assert 'Success' in p.stdout,p.stdout+p.stderr
