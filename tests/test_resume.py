"Runs that are killed, interrupted, shared between processes, or trained by two: they end as if they had not been"
import json,os,random,resource,signal,subprocess,sys,time
from pathlib import Path
import pytest,torch
from fastai.basics import Callback
from commands import command
from functools import partial
from fastattn.callback import CheckpointError
from fastattn.recipes import run as run_mod,train as mod
from fastattn.recipes.options import *
from fastattn.recipes.run import *
from fastattn.recipes.train import *

env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore', 'PYTHONUNBUFFERED': '1'}
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
def start(code=runner, *args, **kwargs):
    return subprocess.Popen([sys.executable, '-c', code, *(args or [json.dumps(kwargs)])], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

def read(out): return {str(f.relative_to(out)): json.loads(f.read_text()) for f in Path(out).rglob('*.json')}
def trained(out): return sum(len(o['epochs']) for o in read(out).values()) # epochs of all runs
def numbers(record): return [{k: v for k,v in e.items() if k!='time'} for e in record['epochs']]
tiny = dict(data='digits', arch='dropconnect', drop='dropconnect', hidden='16,16', size=8, lr=0.1)

class Stop(Callback):
    "Raise as if Ctrl-C were pressed in a batch of training"
    def __init__(self, epoch, batch): self.at = epoch,batch
    def before_batch(self):
        if self.training and (self.epoch,self.iter)==self.at: raise KeyboardInterrupt

configs = dict(ssa=dict(arch='xresnet18', widen=0.25, attn='ssa', size=16), bf16=dict(arch='projection', precision='bf16', size=8), sym=dict(arch='xresnet18', widen=0.25, attn='ssa_sym', channels_last=True, size=8), mixup=dict(arch='xresnet18', widen=0.25, attn='eca', mixup=0.4, progressive=0.5, size=8, opt='sgd'),
    projection=dict(arch='projection', size=8), dropconnect=dict(arch='dropconnect', drop='dropconnect', hidden='20'), positional=dict(arch='positional', dim=8, depth=1, heads=2, size=6, penalty=1.),
    nonlinear=dict(arch='nonlinear', dim=16, heads=2, size=8))

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
    monkeypatch.setattr('fastattn.recipes.run.__version__', '9.9')
    with pytest.raises(CheckpointError, match="written by another run.*9.9"): train_run(config, 0, f)
    assert (tmp_path/'seed0.ckpt'/'state.pt').exists()
    monkeypatch.undo()
    (tmp_path/'seed0.ckpt'/'state.pt').write_bytes(b'half')
    with pytest.raises(CheckpointError, match="not a checkpoint that can be read"): train_run(config, 0, f)
    assert train_run(config, 0, f, resume=False)['state']=='done'

def test_kills(tmp_path):
    "kill -9 at random moments, again and again: what is done in the end is what would have been"
    kw,wanted = dict(tiny, epochs=30, runs=2),int(os.environ.get('FASTATTN_KILLS', 2))
    assert start(**kw, out=str(tmp_path/'a')).wait()==0
    a,rng,kills,rounds = read(tmp_path/'a'),random.Random(0),0,0
    while kills<wanted:
        out,rounds = tmp_path/f'b{rounds}',rounds+1
        while kills<wanted and (done := trained(out))<50:
            p,until = start(**kw, out=str(out)),rng.randint(done+1, 59)
            while p.poll() is None and trained(out)<until: time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.05)) # in the middle of the next epoch, or of writing
            kills += p.poll() is None
            p.send_signal(signal.SIGKILL)
            p.wait()
            assert all(o['state'] in ('running','done') for o in read(out).values())
        assert start(**kw, out=str(out)).wait()==0
        b = read(out)
        assert a.keys()==b.keys() and all(numbers(a[k])==numbers(b[k]) for k in a)
        assert not [f for f in out.rglob('*') if f.name.endswith(('.tmp','.ckpt'))]
    print(f'{kills} kills in {rounds} rounds')

def test_shared_folder(tmp_path):
    "Several processes, the same command: every run once, all valid"
    n,k = (int(o) for o in os.environ.get('FASTATTN_SHARED', '3x6').split('x'))
    kw = dict(tiny, epochs=1, runs=k, out=str(tmp_path))
    ps = [start(**kw) for _ in range(n)]
    outs = [p.communicate()[0] for p in ps]
    assert all(p.returncode==0 for p in ps), outs
    runs = read(tmp_path)
    assert len(runs)==k and all(o['state']=='done' for o in runs.values())
    trained = [l.split(', seed ')[1].split(':')[0] for o in outs for l in o.replace('\r', '\n').splitlines() if ', seed ' in l and '% in ' in l and 'epoch' not in l]
    assert sorted(map(int, trained))==list(range(k)) # no run was trained twice

def test_interrupt(tmp_path):
    "Ctrl-C: a message, an exit code, and nothing lost"
    args = 'digits --arch dropconnect --hidden 64 --drop none --size 8 --epochs 200 --out'.split()+[str(tmp_path)]
    p = start(train_command, *args)
    while not any(o['epochs'] for o in read(tmp_path).values()):
        assert p.poll() is None, p.stdout.read()
        time.sleep(0.1)
    p.send_signal(signal.SIGINT)
    out = p.communicate()[0]
    assert p.returncode==130 and 'Interrupted' in out and 'Traceback' not in out
    record, = read(tmp_path).values()
    assert record['state']=='running' and record['epochs']

def test_full_disk(tmp_path):
    "A write that fails leaves what was there, and says so"
    config, = variants(**tiny, epochs=3)
    f = tmp_path/'seed0.json'
    def small(): resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY)) # smaller than a checkpoint
    args = 'digits --arch dropconnect --hidden 16,16 --drop dropconnect --size 8 --lr 0.1 --epochs 3 --out'.split()+[str(tmp_path)]
    p = subprocess.run([sys.executable, '-c', train_command, *args], env=env, preexec_fn=small, capture_output=True, text=True)
    assert p.returncode==1 and 'File too large' in p.stderr and 'state.pt' in p.stderr and 'Traceback' not in p.stderr
    record, = read(tmp_path).values()
    assert record['state']=='running' and len(record['epochs'])==1
    assert subprocess.run([sys.executable, '-c', train_command, *args], env=env).returncode==0
    assert [o['state'] for o in read(tmp_path).values()]==['done'] and not list(tmp_path.rglob('*.tmp'))

def test_two_processes(tmp_path):
    "accelerate launch with two processes on the CPU: one file, trained as well"
    pytest.importorskip('accelerate')
    script = tmp_path/'t.py'
    script.write_text(train_command)
    args = 'digits --attn ssa --size 16 --epochs 3 --out'.split()+[str(tmp_path/'runs')]
    p = subprocess.run([sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--num_machines', '1', '--mixed_precision', 'no', '--dynamo_backend', 'no', script, *args], env=env, capture_output=True, text=True)
    assert p.returncode==0, p.stderr[-3000:]
    record, = read(tmp_path/'runs').values()
    assert record['state']=='done' and record['processes']==2 and record['value']>0.9 and len(record['epochs'])==3
    assert p.stdout.count('Runs: ')==1
