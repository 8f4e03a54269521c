"Runs back to back in one process, and several at once: the numbers of each are those of a run alone"
import json,os,signal,subprocess,sys,time
from pathlib import Path
import pytest,torch
from commands import command
from fastattn.recipes import train as mod
from fastattn.recipes.options import *
from fastattn.recipes.run import *
from fastattn.recipes.train import *

env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore', 'PYTHONUNBUFFERED': '1'}
tiny = dict(data='digits', arch='dropconnect', drop='none', hidden='4', size=4, epochs=1)
small = dict(arch='xresnet18', widen=1/16, size=8)
compiled = dict(none=dict(attn='none', **small), block=dict(attn='ssa', at='block', gain_lr=100., **small), span=dict(arch='positional', dim=8, depth=1, heads=2, size=6))

def record_of(config, seed, path):
    Run(path/f'{variant_name(config)}-{seed}'/f'seed{seed}.json', 'a', seed, config, lambda: build_learner(config, seed), lambda learn: learn.fit_flat_cos(1, config['lr'])).train()
    return json.loads((path/f'{variant_name(config)}-{seed}'/f'seed{seed}.json').read_text())

def numbers(record): return [{k: v for k,v in e.items() if k!='time'} for e in record['epochs']],record['value'],record['examples']

@pytest.fixture
def graphs(monkeypatch):
    "The shapes for which code was compiled; the code is that of PyTorch's eager mode"
    shapes = []
    def backend(graph, inputs):
        shapes.append([tuple(o.shape) for o in inputs if isinstance(o, torch.Tensor) and o.dim()==4 and o.shape[0]>3][:1])
        return graph
    compile_ = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda f, **kwargs: compile_(f, backend=backend, **kwargs))
    monkeypatch.setattr(mod, '_own_code', {})
    torch.compiler.reset()
    yield shapes
    torch.compiler.reset()

@pytest.mark.slow
def test_compiled_once(tmp_path, graphs):
    "Further seeds compile nothing, other variants have code of their own, and the numbers are those of a new process"
    configs = {k: variants('digits', epochs=1, few=26, compile=True, **o)[0] for k,o in compiled.items()}
    got,n = {},{}
    for seed in (0,1):
        for k,config in configs.items():
            before = len(graphs)
            got[k,seed] = record_of(config, seed, tmp_path/'together')
            assert got[k,seed]['state']=='done', got[k,seed].get('error')
            n[k,seed] = len(graphs)-before
    assert all(n[k,0] for k in configs) and not any(n[k,1] for k in configs), n
    for k,config in configs.items():
        torch.compiler.reset()
        mod._own_code.clear()
        assert numbers(record_of(config, 1, tmp_path/'alone'))==numbers(got[k,1]), k
        assert numbers(got[k,1])!=numbers(got[k,0])

def test_compiled_is_eager(tmp_path, graphs):
    "Attention by a hook is in the compiled code too, though another variant without it was compiled before"
    none,block = [variants('digits', epochs=1, compile=True, **compiled[k])[0] for k in ('none','block')]
    build_learner(none, 0).model(torch.randn(4, 1, 8, 8))
    model = build_learner(block, 0).model.eval()
    for k,p in model.named_parameters():
        if k.endswith('gamma'): torch.nn.init.constant_(p, 1.)
    x = torch.randn(4, 1, 8, 8)
    with torch.no_grad(): torch.testing.assert_close(model(x), model.forward(x))
    assert len(graphs)==2

two = {**tiny, 'drop': ['none','dropconnect']}

def test_parallel(tmp_path, capsys, monkeypatch):
    "The numbers of runs one after the other, each run told once; a second time nothing is left to do"
    alone = train(**two, runs=2, out=str(tmp_path/'a'))
    before = capsys.readouterr().out.splitlines()
    answer = train(**two, runs=2, out=str(tmp_path/'b'), parallel=2)
    after = capsys.readouterr().out.splitlines()
    def by(answer): return {(o['variant'],o['seed']): numbers(o) for o in answer.runs}
    assert by(answer)==by(alone) and len(by(answer))==4
    def runs(lines): return sorted(o.split(' in ')[0] for o in lines if 'seed' in o)
    assert runs(before)==runs(after) and len(runs(after))==4
    assert not list((tmp_path/'b').rglob('*.ckpt'))
    monkeypatch.setattr(mod, 'Popen', None) # no process is started
    assert by(train(**two, runs=2, out=str(tmp_path/'b'), parallel=2))==by(alone)

@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
def test_parallel_failures(tmp_path, capsys):
    "A run that fails is told, counted, and does not keep the others from ending; of several sizes each has an answer"
    answers = train(**{**tiny, 'size': [4,5], 'lr': [1e-3,1e30]}, out=str(tmp_path), parallel=2)
    assert len(answers)==2
    for answer in answers.values():
        assert sorted(o['state'] for o in answer.runs)==['done','failed'] and answer.rows.failed.sum()==1
    assert capsys.readouterr().out.count('failed, training loss is')>=2

@pytest.mark.slow
def test_parallel_until(tmp_path):
    "As many pairs as the answer takes, or as are allowed"
    answer = train(**two, until=1e-3, runs=3, out=str(tmp_path), parallel=2)
    seeds = [sorted(o['seed'] for o in answer.runs if o['config']['drop']==k) for k in ('none','dropconnect')]
    assert seeds[0]==seeds[1]==list(range(len(seeds[0]))) and all(o['state']=='done' for o in answer.runs)

def test_parallel_ends_early(tmp_path, capsys, monkeypatch):
    "What a process cannot do, here for want of a model that only this one knows, is told, and done in the end"
    monkeypatch.setitem(learners, 'mine', learners['dropconnect'])
    answer = train(**{**tiny, 'arch': 'mine'}, out=str(tmp_path), parallel=2)
    out = capsys.readouterr().out
    assert out.count("one of 2 processes ended early: ValueError: unknown arch")==2 and [o['state'] for o in answer.runs]==['done']

@pytest.mark.parametrize('parallel', [0,-1,1.5,True])
def test_bad_parallel(tmp_path, parallel):
    with pytest.raises(ValueError, match='parallel must be at least 1'): train(**tiny, out=str(tmp_path), parallel=parallel)

def wait_for(f, seconds=240):
    end = time.time()+seconds
    while not (res := f()):
        assert time.time()<end, 'waited too long'
        time.sleep(0.1)
    return res

def is_empty(group):
    try: os.killpg(group, 0)
    except ProcessLookupError: return True

@pytest.mark.slow
@pytest.mark.parametrize('signal_,code', [(signal.SIGINT,130),(signal.SIGKILL,-9)])
def test_parallel_ends(tmp_path, signal_, code):
    "Ctrl-C ends all processes, and so does the end of the first"
    words = f'digits --arch dropconnect --drop none --hidden 4 --size 4 --epochs 100000 --runs 2 --parallel 2 --out {tmp_path}'
    p = subprocess.Popen([sys.executable, '-c', command('train'), *words.split()], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)) # also where the tests themselves run in the background and ignore it
    def begun(): return [f for f in tmp_path.rglob('seed*.json') if json.loads(f.read_text())['state']=='running']
    try:
        assert len(wait_for(lambda: len(o := begun())==2 and o))==2
        os.kill(p.pid, signal_)
        _,errors = p.communicate(timeout=60)
        assert p.returncode==code
        if code==130: assert 'Interrupted' in errors and 'Traceback' not in errors
        wait_for(lambda: is_empty(p.pid), 60)
    finally:
        if not is_empty(p.pid): os.killpg(p.pid, signal.SIGKILL)
