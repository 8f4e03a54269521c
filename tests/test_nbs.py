import multiprocessing,os,pytest,sys,torch
from pathlib import Path
from nbdev.config import get_config
from nbdev.doclinks import nbglob

cfg = get_config(__file__)
# A process for each notebook: it defines what its module has defined, and an operator of torch can be defined but once.
# They are forks of one that has imported what all import
forks = multiprocessing.get_context('forkserver')
forks.set_forkserver_preload(['fastai.vision.all', 'timm', 'scipy.stats', 'nbdev.test'])

def run_nb(nb, log):
    "Run the cells of `nb` that are not marked to be left out, with what they print in `log`"
    from nbdev.test import test_nb
    with open(log, 'w') as f:
        for fd in (1,2): os.dup2(f.fileno(), fd)
    flags = ['cuda'] if torch.cuda.is_available() else []
    passed,_ = test_nb(nb, skip_flags=cfg.tst_flags.split(), force_flags=flags, basepath=cfg.config_path)
    sys.exit(0 if passed else 1)

@pytest.mark.parametrize('nb', nbglob(cfg.nbs_path, as_path=True), ids=lambda p: p.relative_to(cfg.nbs_path).as_posix())
def test_nb(nb, tmp_path):
    if nb.stem=='07_kernels': pytest.importorskip('triton')
    log = tmp_path/'log'
    process = forks.Process(target=run_nb, args=(nb.absolute(), log))
    process.start()
    process.join()
    assert process.exitcode==0, log.read_text()
