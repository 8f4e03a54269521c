"Runs that are killed, interrupted, shared between processes, or trained by two: they end as if they had not been"
import json,os,random,signal,socket,subprocess,sys,time
from pathlib import Path
import pytest,torch
from fastai.basics import Callback
from commands import Forked,command
from functools import partial
from fastattn.callback import CheckpointError
from fastattn.recipes import run as run_mod,train as mod
from fastattn.recipes.options import *
from fastattn.recipes.run import *
from fastattn.recipes.train import *

often = 'import fastattn.recipes.run; fastattn.recipes.run.checkpoint_every = 0.; ' # checkpoints after each epoch
runner = often+'import sys, json; from fastattn.recipes.train import train; train(**json.loads(sys.argv[1]))'
train_command = often+command('train')

@pytest.fixture(autouse=True)
def checkpoints():
    "After each epoch, for runs of seconds"
    was,run_mod.checkpoint_every = run_mod.checkpoint_every,0.
    yield
    run_mod.checkpoint_every = was

def train_run(config, seed, path, resume=True):
    return Run(path, variant_name(config), seed, config, partial(build_learner, config, seed), partial(mod._fit, config)).train(resume)

@pytest.fixture
def start(tmp_path_factory):
    "Starts `train` in a process of its own, or the command with the words of `args`"
    folder = tmp_path_factory.mktemp('logs')
    return lambda *args, code=train_command, env={}, **kwargs: Forked(folder, code, *args, **env) if args else Forked(folder, runner, json.dumps(kwargs))

def read(out): return {str(f.relative_to(out)): json.loads(f.read_text()) for f in Path(out).rglob('*.json')}
def trained(out): return sum(len(o['epochs']) for o in read(out).values()) # epochs of all runs
def numbers(record): return [{k: v for k,v in e.items() if k!='time'} for e in record['epochs']]
few = dict(few=8, bs=16) # 80 digits: five steps in an epoch
narrow = dict(arch='xresnet18', widen=0.125, **few)
tiny = dict(data='digits', arch='dropconnect', drop='dropconnect', hidden='16,16', size=8, lr=0.1, **few)

class Stop(Callback):
    "Raise as if Ctrl-C were pressed in a batch of training"
    def __init__(self, epoch, batch): self.at = epoch,batch
    def before_batch(self):
        if self.training and (self.epoch,self.iter)==self.at: raise KeyboardInterrupt

configs = dict(
    ssa=dict(attn='ssa', size=16, **narrow),
    sym=dict(attn='ssa_sym', channels_last=True, size=8, **narrow),
    mixup=dict(attn='eca', mixup=0.4, progressive=0.5, size=8, opt='sgd', **narrow),
    bf16=dict(arch='projection', precision='bf16', size=8, **few),
    projection=dict(arch='projection', size=8, **few),
    dropconnect=dict(arch='dropconnect', drop='dropconnect', hidden='20', **few),
    positional=dict(arch='positional', dim=8, depth=1, heads=2, size=6, penalty=1., **few),
    nonlinear=dict(arch='nonlinear', dim=8, heads=2, depth=1, size=8, bs=280)) # five steps of 1400 digits

@pytest.mark.parametrize('name', configs)
def test_exact(tmp_path, name, monkeypatch):
    "Stopped in the third epoch, and gone on with in another random state: the same rows, and the same weights"
    config, = variants('digits', epochs=4, **configs[name])
    whole = train_run(config, 1, tmp_path/'a'/'seed1.json')
    stop = Stop(2, 3)
    monkeypatch.setattr(RunFile, 'before_batch', lambda self: Stop.before_batch(stop) if stop.__dict__.update(learn=self.learn) is None else None, raising=False)
    with pytest.raises(KeyboardInterrupt): train_run(config, 1, tmp_path/'b'/'seed1.json')
    monkeypatch.undo()
    half = json.loads((tmp_path/'b'/'seed1.json').read_text())
    assert half['state']=='running' and numbers(half)==numbers(whole)[:2]
    torch.manual_seed(random.randrange(1000))
    parts = train_run(config, 1, tmp_path/'b'/'seed1.json')
    assert parts['state']=='done', parts.get('error')
    assert numbers(parts)==numbers(whole) and parts['value']==whole['value'] and parts['examples']==whole['examples']
    assert sorted(f.name for f in (tmp_path/'b').iterdir())==['seed1.json']

def test_checkpoint_of_another(tmp_path, monkeypatch):
    config, = variants(**tiny, epochs=3)
    f = tmp_path/'seed0.json'
    def stop(self):
        if self.epoch==1: raise KeyboardInterrupt
    monkeypatch.setattr(RunFile, 'before_batch', stop, raising=False)
    with pytest.raises(KeyboardInterrupt): train_run(config, 0, f)
    monkeypatch.undo()
    monkeypatch.setattr('fastattn.__version__', '9.9')
    with pytest.raises(CheckpointError, match="written by another run.*9.9"): train_run(config, 0, f)
    assert (tmp_path/'seed0.ckpt'/'state.pt').exists()
    monkeypatch.undo()
    (tmp_path/'seed0.ckpt'/'state.pt').write_bytes(b'half')
    with pytest.raises(CheckpointError, match="not a checkpoint that can be read"): train_run(config, 0, f)
    assert train_run(config, 0, f, resume=False)['state']=='done'

def test_kills(tmp_path, start):
    "kill -9 at random moments, again and again: what is done in the end is what would have been"
    kw,wanted = dict(tiny, epochs=12, runs=2),int(os.environ.get('FASTATTN_KILLS', 2))
    assert start(**kw, out=str(tmp_path/'a')).end().returncode==0
    a,rng,kills,rounds = read(tmp_path/'a'),random.Random(0),0,0
    while kills<wanted:
        out,rounds = tmp_path/f'b{rounds}',rounds+1
        while kills<wanted and (done := trained(out))<20:
            p,until = start(**kw, out=str(out)),rng.randint(done+1, 23)
            while p.running and trained(out)<until: time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.05)) # in the middle of the next epoch, or of writing
            kills += p.running
            p.kill()
            p.end()
            assert all(o['state'] in ('running','done') for o in read(out).values())
        assert start(**kw, out=str(out)).end().returncode==0
        b = read(out)
        assert a.keys()==b.keys() and all(numbers(a[k])==numbers(b[k]) for k in a)
        assert not [f for f in out.rglob('*') if f.name.endswith(('.tmp','.ckpt'))]
    print(f'{kills} kills in {rounds} rounds')

def test_shared_folder(tmp_path, start):
    "Several processes, the same command: every run once, all valid"
    n,k = (int(o) for o in os.environ.get('FASTATTN_SHARED', '3x6').split('x'))
    kw = dict(tiny, epochs=1, runs=k, out=str(tmp_path))
    ends = [p.end() for p in [start(**kw) for _ in range(n)]]
    assert [o.stderr for o in ends if o.returncode]==[]
    runs = read(tmp_path)
    assert len(runs)==k and all(o['state']=='done' for o in runs.values())
    trained = [l.split(', seed ')[1].split(':')[0] for o in ends for l in o.stdout.replace('\r', '\n').splitlines() if ', seed ' in l and '% in ' in l and 'epoch' not in l]
    assert sorted(map(int, trained))==list(range(k)) # no run was trained twice

def test_interrupt(tmp_path, start):
    "Ctrl-C: a message, an exit code, and nothing lost"
    p = start(*'digits --arch dropconnect --hidden 64 --drop none --size 8 --few 8 --bs 16 --epochs 9999 --out'.split(), tmp_path)
    while not any(o['epochs'] for o in read(tmp_path).values()):
        assert p.running, p.stderr
        time.sleep(0.1)
    p.send_signal(signal.SIGINT)
    end = p.end()
    assert end.returncode==130 and 'Interrupted' in end.stderr and 'Traceback' not in end.stderr
    record, = read(tmp_path).values()
    assert record['state']=='running' and record['epochs']

def test_full_disk(tmp_path, start):
    "A write that fails leaves what was there, and says so"
    small = 'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY)); ' # smaller than a checkpoint
    args = 'digits --arch dropconnect --hidden 16,16 --drop dropconnect --size 8 --few 8 --bs 16 --lr 0.1 --epochs 3 --out'.split()+[tmp_path]
    end = start(*args, code=small+train_command).end()
    assert end.returncode==1 and 'File too large' in end.stderr and 'state.pt' in end.stderr and 'Traceback' not in end.stderr
    record, = read(tmp_path).values()
    assert record['state']=='running' and len(record['epochs'])==1
    assert start(*args).end().returncode==0
    assert [o['state'] for o in read(tmp_path).values()]==['done'] and not list(tmp_path.rglob('*.tmp'))

def test_two_processes(tmp_path, start):
    "Two processes with the variables that accelerate and torchrun set: one file, one report, and trained"
    pytest.importorskip('accelerate')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        env = dict(WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(s.getsockname()[1]))
    words = 'digits --attn ssa --widen 0.125 --size 16 --bs 32 --lr 1e-2 --epochs 3 --out'.split()+[tmp_path]
    ends = [p.end() for p in [start(*words, env=dict(env, RANK=str(i), LOCAL_RANK=str(i))) for i in range(2)]]
    assert [o.stderr for o in ends if o.returncode]==[]
    record, = read(tmp_path).values()
    assert record['state']=='done' and record['processes']==2 and record['value']>0.5 and len(record['epochs'])==3
    assert [o.stdout.count('Runs: ') for o in ends]==[1,0]

@pytest.mark.slow
def test_accelerate(tmp_path):
    "accelerate launch with two processes on the CPU: one file, trained as well"
    pytest.importorskip('accelerate')
    script = tmp_path/'t.py'
    script.write_text(train_command)
    args = 'digits --attn ssa --size 16 --epochs 3 --out'.split()+[str(tmp_path/'runs')]
    single = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore'}
    p = subprocess.run([sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--num_machines', '1', '--mixed_precision', 'no', '--dynamo_backend', 'no', script, *args], env=single, capture_output=True, text=True)
    assert p.returncode==0, p.stderr[-3000:]
    record, = read(tmp_path/'runs').values()
    assert record['state']=='done' and record['processes']==2 and record['value']>0.9 and len(record['epochs'])==3
    assert p.stdout.count('Runs: ')==1
