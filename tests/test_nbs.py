import pytest,torch
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import test_nb as run_nb

cfg = get_config(__file__)
cuda = ['cuda'] if torch.cuda.is_available() else []

@pytest.mark.parametrize('nb', nbglob(cfg.nbs_path, as_path=True), ids=lambda p: p.relative_to(cfg.nbs_path).as_posix())
def test_nb(nb): assert run_nb(nb, skip_flags=cfg.tst_flags.split(), force_flags=cuda, basepath=cfg.config_path)[0]
