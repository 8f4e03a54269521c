import multiprocessing,pytest,sys,torch
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from commands import forks,send_output

cfg = get_config(__file__)

def run_nb(nb, log):
    "Run the cells of `nb` that are not marked to be left out, with what they print in `log`"
    from nbdev.test import test_nb
    send_output(log, log)
    flags = ['cuda'] if torch.cuda.is_available() else []
    passed,_ = test_nb(nb, skip_flags=cfg.tst_flags.split(), force_flags=flags, basepath=cfg.config_path)
    sys.exit(0 if passed else 1)

# Of over 20 seconds, nearly all of them training: tutorials export nothing, and of what the others export there are quick tests here
slow = ('tutorials/','index','evidence','02_learner','04_interpret','recipes/03_compare','recipes/05_train')
notebooks = {p.relative_to(cfg.nbs_path).as_posix(): p for p in nbglob(cfg.nbs_path, as_path=True)}

@pytest.mark.parametrize('nb', [pytest.param(p, id=name, marks=pytest.mark.slow if name.startswith(slow) else []) for name,p in notebooks.items()])
def test_nb(nb, tmp_path, monkeypatch):
    log,context = tmp_path/'log',forks
    if nb.stem=='07_kernels': # Triton reads the variable when it is imported, and the forks have imported it
        pytest.importorskip('triton')
        monkeypatch.setenv('TRITON_INTERPRET', '1')
        context = multiprocessing.get_context('spawn')
    process = context.Process(target=run_nb, args=(nb.absolute(), log))
    process.start()
    process.join()
    assert process.exitcode==0, log.read_text()
