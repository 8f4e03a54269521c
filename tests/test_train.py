"The command: variants, paired seeds, files, pictures, and mistakes that end before any training"
import json,os,subprocess,sys
import pytest,torch
from PIL import Image
from fastai.basics import Callback,set_seed
from fastai.callback.schedule import SchedLin
from fastattn.callback import DropConnectSchedule
from fastattn.recipes import train as mod
from commands import command
from fastattn.recipes.answer import Answer,read_examples
from fastattn.recipes.options import *
from fastattn.recipes.run import *
from fastattn.recipes.train import *

few = dict(few=4, bs=16) # 40 digits: two steps in an epoch
narrow = dict(widen=0.125) # an xresnet that starts with 8 channels

def quick(tmp_path, **kwargs):
    "Records of the runs, in the order of variants and seeds"
    words = dict(size=8, epochs=1, out=str(tmp_path/'runs'), **few)
    if 'xresnet' in kwargs.get('arch', 'xresnet18'): words |= narrow
    res = train('digits', **{**words, **kwargs})
    return res.runs if isinstance(res, Answer) else res
tiny = dict(arch='dropconnect', drop='none', hidden='8') # for what is not about the model

def steps(config, n=3):
    "Losses of the first steps, and the batches' labels"
    learn,losses,ys = build_learner(config, 1, 0),[],[]
    opt = torch.optim.SGD(learn.model.parameters(), 1e-2)
    for _,(x,y) in zip(range(n), learn.dls.train):
        x,y = (o.as_subclass(torch.Tensor) for o in (x,y))
        loss = learn.loss_func(learn.model(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
        ys.append(y)
    return losses,torch.cat(ys)

def test_variants():
    assert [o['attn'] for o in variants()]==['none','ssa']
    assert variants()[0]['size']==32 and variants('imagenette')[0]['size']==128
    assert variants('imagenette')[0]['lr']==variants('some/folder')[0]['lr']==8e-3
    sweep = variants(arch=['xresnet18','xresnet50'], attn=['none','ssa'], stages=['1','2'], lr=[1e-3,1e-2], opt=['sgd','adam'])
    assert len(sweep)==2*3*2*2
    assert 'sqr_mom' not in sweep[0] and 'sqr_mom' in sweep[-1]

def test_names():
    "The same in every sweep; different for whatever differs; good for a file system"
    sweep = variants(attn=['none','ssa'], stages=['1','1,2'], lr=[1e-3,4e-3], opt=['sgd','ranger'], mixup=[0.,0.4])
    names = [variant_name(o) for o in sweep]
    assert len(set(names))==len(names)
    assert variant_name(variants(attn='ssa')[0])==variant_name(variants(attn=['none','ssa'])[1])
    assert 'stages1,2' in variant_name(variants(attn='ssa', stages='1,2')[0])
    assert not any(c in o for o in names for c in ' /:*')

def test_long_names():
    "No longer than file systems take, and still apart"
    many = dict(arch='positional', ndim=1, dim=48, depth=3, heads=6, token='mean', encoding='sinusoid', sigma=0.123456, threshold=0.0123456, combine='multiply', modulate='positional', causal=True, penalty=0.123456,
        bs=40, lr=0.00123456, wd=0.0123456, opt='adam', mom=0.912345, sqr_mom=0.9912345, eps=1.23456e-6, mixup=0.412345, sched='flat', precision='bf16', progressive=0.512345)
    names = {variant_name(variants(**many, smooth=o)[0]) for o in (0.1,0.2)}
    assert len(names)==2 and max(map(len, names))<220

def test_run_files(tmp_path):
    runs = quick(tmp_path, runs=2, seed=3)
    files = sorted((tmp_path/'runs').rglob('*.json'))
    assert [f.name for f in files]==['seed3.json','seed4.json']*2
    assert {f.parents[1].name for f in files}=={'digits-few4-8-1'}
    for r in runs:
        f = run_path(tmp_path/'runs', r['config'], r['seed'])
        assert json.loads(f.read_text())=={k: v for k,v in r.items() if k not in ('file','protocol')} and r['file']==str(f) and r['protocol']=='fixed'
        assert r['state']=='done' and len(r['epochs'])==1 and r['metric']=='accuracy' and r['value']==r['epochs'][-1]['accuracy']
        gains = {'gains'} if r['config']['attn']=='ssa' else set()
        assert set(r['epochs'][0])=={'epoch','train_loss','valid_loss','accuracy','time'}|gains
        assert {'fastattn','fastai','torch'}<=set(r['versions']) and r['time_s']>0 and r['device']
        assert abs(read_examples(r).mean()-r['value'])<1e-6 and len(read_examples(r))==397
    assert [r['params'] for r in runs]==[sum(p.numel() for p in build_learner(r['config']).model.parameters()) for r in runs]
    assert runs[2]['params']-runs[0]['params']==8*8+1 and runs[0]['processes']==1
    for f in ('curves.png','pairs.png'):
        with Image.open(tmp_path/'runs'/'digits-few4-8-1'/f) as im: assert im.size[0]>300
    assert not [f for f in (tmp_path/'runs').rglob('*') if f.suffix not in ('.json','.png') and f.is_file() and f.name not in ('protocol','.protocol.lock')]

def test_done_is_done(tmp_path, monkeypatch):
    a = quick(tmp_path, **tiny)
    monkeypatch.setattr(mod, 'LabelSmoothingCrossEntropy', None) # would fail if it were to train
    monkeypatch.setattr(mod, 'build_learner', lambda *args: None)
    assert quick(tmp_path, **tiny)==a

def test_unfinished_is_run_again(tmp_path):
    a, = quick(tmp_path, **tiny)
    f = run_path(tmp_path/'runs', a['config'], 0)
    f.write_text(json.dumps({**a, 'state': 'running', 'value': 0}))
    b, = quick(tmp_path, **tiny)
    assert b['state']=='done' and b['value']==a['value'] and b['epochs'][0]['train_loss']==a['epochs'][0]['train_loss']

def test_paired():
    "The baseline and attention at gamma 0 see the same data and lose the same at first; another seed differs"
    none,ssa = variants(size=16, few=8, bs=16, **narrow)
    (a,ya),(b,yb) = steps(none),steps(ssa)
    assert torch.equal(ya, yb)
    assert a[0]==b[0]
    set_seed(99)
    assert steps(none)[0]==a

def test_same_seed_same_result(tmp_path):
    a,b = (quick(tmp_path/o, attn='ssa')[0] for o in 'ab')
    for k in ('train_loss','valid_loss','accuracy'): assert a['epochs'][0][k]==b['epochs'][0][k]

@pytest.fixture(scope='module')
def plain(tmp_path_factory): return quick(tmp_path_factory.mktemp('plain'), attn='ssa')[0]

@pytest.mark.parametrize('kwargs', [dict(precision='bf16'), dict(channels_last=True), dict(mixup=0.4), dict(opt='sgd', lr=0.1), dict(opt='adam', eps=1e-4), dict(opt='rmsprop', lr=1e-3),
    dict(act='GELU', pool='MaxPool', size=32), dict(attn='eca', stages='2,3', blocks='0,-1'), dict(arch='xresnet18_deep', attn='ssa_sym', stages='6')])
def test_options(tmp_path, kwargs, plain):
    "A run with another value of an option ends, and with other numbers: but for channels_last, which changes their last digits at most"
    run = quick(tmp_path, **{'attn': 'ssa', **kwargs})[0]
    assert run['state']=='done', run.get('error')
    loss,before = (o['epochs'][0]['train_loss'] for o in (run,plain))
    assert loss==pytest.approx(before, rel=1e-4) if 'channels_last' in kwargs else loss!=before

@pytest.mark.filterwarnings('ignore')
def test_nan(tmp_path, capsys):
    "A run that diverges is marked as failed, with its epoch; the sweep goes on"
    words = dict(size=8, out=str(tmp_path/'runs'), **tiny, **few, lr=[1e30,1e-3], epochs=2)
    answer = train(**words)
    bad,good = answer.runs
    assert bad['state']=='failed' and 'epoch 0' in bad['error']
    assert good['state']=='done'
    assert 'failed, training loss is nan in epoch 0' in capsys.readouterr().out
    again = train(**words)
    assert [o['state'] for o in again.runs]==['failed','done'] and f"To try failed runs again, delete their files: {bad['file']}." in str(again)
    json.loads(run_path(tmp_path/'runs', bad['config'], 0).read_text())

def test_answer_is_shown_once(tmp_path, capsys):
    "`train` returns the answer and leaves it to the caller to show it; the command prints it, once"
    words = dict(data='digits', size=8, epochs=1, out=str(tmp_path/'runs'), arch='dropconnect', drop=['none','dropout'], hidden='8')
    answer = train(**words)
    assert answer.sentences() and 'dropout may' not in capsys.readouterr().out
    options = f"digits --arch dropconnect --drop none dropout --hidden 8 --size 8 --epochs 1 --out {tmp_path/'runs'}".split()
    assert main(options)==0 and capsys.readouterr().out.count(str(answer))==1
    assert main([*options,'--size','8','16'])==0 # several groups: each has an answer
    assert capsys.readouterr().out.count('points')==2

def test_interrupted(tmp_path, monkeypatch):
    "What is there when one presses Ctrl-C is not taken for done"
    def stop(self): raise KeyboardInterrupt
    monkeypatch.setattr(RunFile, 'before_batch', stop, raising=False)
    with pytest.raises(KeyboardInterrupt): quick(tmp_path)
    f, = (tmp_path/'runs').rglob('*.json')
    assert json.loads(f.read_text())['state']=='running'

def test_dump(tmp_path, capsys):
    quick(tmp_path, dump=True, attn='ssa')
    assert 'SimpleSelfAttention' in capsys.readouterr().out
    assert not list((tmp_path/'runs').iterdir())

@pytest.mark.filterwarnings('ignore')
def test_lr_find(tmp_path, capsys):
    quick(tmp_path, lr_find=True, attn='ssa', size=8)
    assert 'learning rate' in capsys.readouterr().out
    assert [f.name for f in (tmp_path/'runs'/'digits-few4-8-1').glob('*/*.*')]==['lr_find.png']

@pytest.mark.parametrize('kwargs,message', [(dict(data='digit'), "Did you mean 'digits'"), (dict(arch='xresnet19'), "Did you mean 'xresnet18'"),
    (dict(attn=['none','sas']), "Did you mean 'sa'"), (dict(stages='9'), 'from 1 to 4'), (dict(stages='x'), 'whole numbers'), (dict(blocks='5'), 'indices from -2 to 1'),
    (dict(blocks='lats'), "Did you mean 'last'"), (dict(opt='rangers'), "Did you mean 'ranger'"), (dict(opt='sgd', sqr_mom=0.9), 'unknown option for xresnet18 with sgd'),
    (dict(act='mish'), "Did you mean 'Mish'"), (dict(pool='Avg'), 'pooling'), (dict(epochs=0), 'epochs must be at least 1'), (dict(size=-1), 'size must be'), (dict(bs=1), 'bs must be'),
    (dict(lr=0.), 'lr must be positive'), (dict(preset='sdoria'), "Did you mean 'sdoria-"), (dict(board='128/6'), "unknown board"), (dict(board='128/5', size=64), 'a board sets size'), (dict(data='digits', board='128/5'), 'boards are for'),
    (dict(board='128/5', preset='blurpool-5'), 'choose one'), (dict(track='mlflow'), 'unknown tracker'), (dict(presize=True), "unknown option for digits 'presize'"), (dict(progressive=0.), 'start is a share'), (dict(arch='nonlinear', progressive=0.5), 'unknown option for nonlinear'), (dict(runs=0), 'runs must be'), (dict(precision='fp8'), "unknown precision 'fp8'"), (dict(until=-1., hours=1.), 'until is a half-width'), (dict(until=0.5), 'until needs a limit'), (dict(hours=1.), 'hours is the limit'), (dict(arch='no.py:f'), 'no file no.py'), (dict(wd=-1.), 'wd must be'), (dict(wd=float('nan')), 'wd must be'), (dict(lr=float('nan')), 'lr must be positive'), (dict(smooth=2.), 'smooth must be'), (dict(opt='sgd', mom=-3.), 'mom must be'),
    (dict(epochs=2.7), 'epochs must be a whole number'), (dict(arch='positional', causal='no'), 'causal must be True or False'), (dict(blocks='last,first'), 'indices from -2 to 1'), (dict(arch='nonlinear', window_size='3,4,5'), 'each of the 2'), (dict(mixup=-1.), 'mixup must be')])
def test_bad(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message): train(**{**dict(out=str(tmp_path/'runs')), **kwargs})
    assert not list(tmp_path.rglob('*.json'))

def test_out_is_a_file(tmp_path):
    (tmp_path/'f').write_text('')
    with pytest.raises(ValueError, match='cannot be written'): quick(tmp_path, out=str(tmp_path/'f'))

@pytest.mark.skipif(os.name=='nt' or os.geteuid()==0, reason='root may write anywhere')
def test_out_is_read_only(tmp_path):
    (tmp_path/'r').mkdir(mode=0o500)
    with pytest.raises(ValueError, match='cannot be written'): quick(tmp_path, out=str(tmp_path/'r'))

def test_progressive_and_pool(tmp_path):
    seen = []
    class See(Callback):
        def before_batch(self):
            if self.training: seen.append(self.xb[0].shape[-1])
    learn = build_learner(variants(attn='none', progressive=0.5, pool='MaxBlurPool', size=16, **few, **narrow)[0])
    learn.fit(2, cbs=See())
    assert seen[0]==8 and seen[-1]==16 and sorted(seen)==seen
    assert sum('BlurPool' in type(m).__name__ for m in learn.model.modules())==4 # the stem and three stages

@pytest.mark.parametrize('arch,backend', [('test_resnet','aot_eager'), pytest.param('xresnet18', 'inductor', marks=pytest.mark.slow)])
def test_compile(tmp_path, monkeypatch, arch, backend):
    "The default backend takes minutes, nearly all of them in a compiler of C++"
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self, *args, **kwargs: compile(self, *args, **{'backend': backend, **kwargs}))
    run, = quick(tmp_path, arch=arch, attn='ssa', compile=True, channels_last=True)
    assert run['state']=='done' and run['config']['compile']

@pytest.mark.parametrize('track,pattern', [('csv','seed0.csv'), ('tensorboard','seed0.tb/events*')])
def test_track(tmp_path, track, pattern):
    if track!='csv': pytest.importorskip(track)
    run, = quick(tmp_path, **tiny, epochs=2, track=track)
    f, = (tmp_path/'runs').rglob('seed0.json')
    files = list(f.parent.glob(pattern))
    assert files and (track!='csv' or len(files[0].read_text().splitlines())==3)
    f.unlink() # and anew
    quick(tmp_path, **tiny, epochs=2, track=track, resume=False)
    assert track!='csv' or len(files[0].read_text().splitlines())==3

def test_preset(tmp_path, capsys):
    train(preset='list')
    assert 'sdoria-50-47' in capsys.readouterr().out
    runs = train(preset='projection-4', epochs=1, data='digits', size=8, out=str(tmp_path/'runs')).runs
    assert len(runs)==1 and runs[0]['config']['size_projection']==4 and runs[0]['config']['p']==0.75
    sgd, *_ = mod._configs('digits', None, 'sgd', 'sdoria-5', None, {})[0]
    assert (sgd['opt'],sgd['mom'],sgd['lr'])==('sgd',0.9,3e-3) and 'sqr_mom' not in sgd
    adam, *_ = mod._configs(None, None, ['adam'], 'sdoria-5', None, {})[0] # as a command line has it
    assert adam['eps']==1e-6==mod._configs(None, None, None, 'sdoria-5', None, {})[0][0]['eps']
    assert mod._configs(None, None, ['sgd'], 'projection-8', None, {})[0][0]['opt']=='sgd' # a preset that names no optimiser

def test_boards():
    runs = [dict(state='done', variant='v', seed=s, accuracy=0.87+s/1000, config=dict(size=128, epochs=5), commit='abc', versions=dict(fastattn='0'), archive='imagenette2-160') for s in range(5)]
    row,below = board_row(runs).splitlines()
    assert row=='|128|5|[fastattn v](link to your code)|87.20%|5, mean|' and 'abc' in below and 'imagenette2-160' in below

def test_other_files(tmp_path):
    "A broken file of a run is kept under another name, one of another run is refused"
    a, = quick(tmp_path, **tiny)
    f = run_path(tmp_path/'runs', a['config'], 0)
    f.write_text('{"state": "do')
    b, = quick(tmp_path, **tiny)
    assert b['epochs'][0]['train_loss']==a['epochs'][0]['train_loss'] and f.with_name('seed0.json.unreadable').read_text()=='{"state": "do'
    f.write_text(json.dumps({**a, 'seed': 3}))
    with pytest.raises(ValueError, match='is not the file of'): quick(tmp_path, **tiny)
    assert json.loads(f.read_text())['seed']==3

def test_command_line(tmp_path, monkeypatch, capsys):
    "As from a terminal: words after an option are several values; what is wrong is one line and an exit code"
    monkeypatch.chdir(tmp_path)
    words = 'digits --size 8 --epochs 1 --few 4 --bs 16 --widen 0.125 --attn none ssa_sym --lr 1e-3 --out x'.split()
    assert main(words)==0
    out,err = capsys.readouterr()
    assert len(list((tmp_path/'x').rglob('*.json')))==2 and 'ssa_sym' in out and '\x1b' not in out and 'left' in out
    monkeypatch.setattr(sys, 'argv', ['fastattn-train',*words,'--runs','2','--dry-run'])
    assert main()==0
    assert '2 of 4 runs finished; the others take about' in capsys.readouterr().out and len(list((tmp_path/'x').rglob('*.json')))==2
    assert main(['--attn','sssa'])==1
    out,err = capsys.readouterr()
    assert err.count('\n')==1 and "Did you mean 'ssa'?" in err

def test_process():
    "The command in a process of its own: no library's warning comes before its answer, and its exit code is main's"
    env = {k: v for k,v in os.environ.items() if k!='PYTHONWARNINGS'}
    p = subprocess.run([sys.executable, '-c', command('train'), '--attn', 'sssa'], env=env, capture_output=True, text=True)
    assert p.returncode==1 and p.stderr.startswith('fastattn-train: ') and p.stderr.count('\n')==1 and not p.stdout

def test_other_models(tmp_path):
    "projection and dropconnect, their baselines and their options"
    runs = quick(tmp_path, arch=['projection','dropconnect'])
    assert [r['config'].get('drop') for r in runs]==['none',None,'dropconnect'] and runs[0]['config']['p'] is None # the baseline first
    assert [r['config']['opt'] for r in runs]==['sgd','adam','sgd'] and runs[1]['config']['sched']=='one_cycle'
    runs = quick(tmp_path, arch='dropconnect', drop=['none','dropout','dropconnect'], p=[0.2,0.5], hidden='20,10', inference='gaussian')
    assert [(r['config']['drop'],r['config']['p'],r['config']['inference']) for r in runs]==[('none',None,None), ('dropout',0.2,None), ('dropout',0.5,None),
        ('dropconnect',0.2,'gaussian'), ('dropconnect',0.5,'gaussian')]
    assert runs[0]['variant'].startswith('dropconnect-none-hidden20,10-') and runs[-1]['variant'].startswith('dropconnect-dropconnect-inferencegaussian-hidden20,10-')
    for kwargs,message in ((dict(hidden='20,x'), 'hidden must be numbers'), (dict(p=1.), 'p is the probability'), (dict(attn='ssa'), 'unknown option for dropconnect'), (dict(sched='cos'), "unknown schedule")):
        with pytest.raises(ValueError, match=message): quick(tmp_path, arch='dropconnect', **kwargs)

def test_curves_of_all(tmp_path, monkeypatch):
    "The folder's picture holds what other commands have trained there"
    drawn = []
    monkeypatch.setattr(Answer, 'plot_curves', lambda self, path: drawn.append(list(self.by_label)))
    for drop in ('none','dropconnect'): quick(tmp_path, arch='dropconnect', drop=drop, hidden='8')
    assert [len(o) for o in drawn]==[1,2]

def test_rows_of_callbacks(tmp_path):
    learn = build_learner(variants(arch='dropconnect', drop='dropconnect', hidden='8', size=8)[0])
    learn.fit(2, cbs=[RunFile(tmp_path/'a.json', {}), DropConnectSchedule(SchedLin(0., 0.5))])
    ps = [r['p'] for r in json.loads((tmp_path/'a.json').read_text())['epochs']]
    assert 0.2<ps[0]<0.25 and 0.4<ps[1]<0.5

def test_positional(tmp_path):
    "Spans are in the file; options that mean nothing without a span are not told apart"
    runs = quick(tmp_path, arch='positional', dim=8, depth=1, heads=2, size=6, span=['none','gaussian'], threshold=[0.,0.1], modulate='all')
    assert [(r['config']['span'],r['config']['threshold']) for r in runs]==[('none',None),('gaussian',0.),('gaussian',0.1)]
    spans = [r['epochs'][0]['spans'][0] for r in runs]
    assert spans[0]['sigma'] is None and spans[0]['share']==spans[1]['share']==1 and spans[2]['sigma'][0][0]<0.3
    quick(tmp_path, arch='positional', dim=8, depth=1, heads=2, size=6, ndim=1, encoding='sinusoid', causal=True, combine='multiply')
    for kwargs,message in ((dict(heads=3), 'heads must divide'), (dict(encoding='sines'), 'unknown encoding'), (dict(span='box'), 'unknown span'), (dict(sigma=0.), 'sigma must be'), (dict(token='first'), 'unknown token')):
        with pytest.raises(ValueError, match=message): quick(tmp_path, arch='positional', dim=8, depth=1, size=6, **kwargs)

def test_commit(tmp_path, monkeypatch):
    "A new run has the commit of the code: of the repository, else the one that pip has noted"
    from importlib import metadata
    from types import SimpleNamespace
    from fastattn.recipes import run as run_mod
    record = Run(tmp_path/'seed0.json', 'v', 0, {}, None, None)._start()
    head = subprocess.run(['git','-C',os.path.dirname(mod.__file__),'rev-parse','HEAD'], capture_output=True, text=True).stdout.strip()
    if head: assert record['commit'].rstrip('+')==head
    def installed(noted): return lambda name: SimpleNamespace(read_text=lambda file: noted)
    for noted,commit in (('{"url": "x", "vcs_info": {"vcs": "git", "commit_id": "abc"}}','abc'), ('{"url": "x", "dir_info": {}}',None), (None,None)):
        monkeypatch.setattr(metadata, 'distribution', installed(noted))
        assert run_mod._installed_commit()==commit
    def missing(name): raise metadata.PackageNotFoundError(name)
    monkeypatch.setattr(metadata, 'distribution', missing)
    assert run_mod._installed_commit() is None
