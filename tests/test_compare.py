"compare: any Learner, pairs, protocols, failures, folders; what is refused"
import json,os,random,time
from types import SimpleNamespace
from functools import partial
from pathlib import Path
import numpy as np,pytest,torch
from fastai.vision.all import *
for o in [o for o in globals() if o.startswith('test')]: del globals()[o] # fastcore's, which pytest would take for tests
from fastattn.recipes import compare as mod,run as run_mod
from fastattn.recipes.answer import *
from fastattn.recipes.compare import *
from fastattn.recipes.run import *

@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path)

def data(n=64, bs=16, seed=0):
    "Points in a plane, in three classes"
    x = torch.randn(n+40, 4, generator=torch.Generator().manual_seed(seed))
    y = x[:,:3].argmax(1)
    return DataLoaders.from_dsets(list(zip(x[:n], y[:n])), list(zip(x[n:], y[n:])), bs=bs, num_workers=0)

class Net(nn.Sequential):
    "A small net; `first`: with a layer whose weights are drawn before the others', and that does nothing at the start"
    def __init__(self, hidden, first=False):
        extra = nn.Linear(3, 3) if first else None
        super().__init__(nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, 3))
        if first: self.extra,self.gain = extra,nn.Parameter(torch.zeros(1))
    def forward(self, x):
        for o in list(self)[:3]: x = o(x)
        return x+self.gain*self.extra(x) if hasattr(self, 'gain') else x

def net(dls, hidden=8, first=False, **kwargs):
    return Learner(dls, Net(hidden, first), loss_func=CrossEntropyLossFlat(), metrics=kwargs.pop('metrics', accuracy), **kwargs)

two = {'none': net, 'wide': partial(net, hidden=32)}
def numbers(answer): return {(o['variant'],o['seed']): [{k: v for k,v in e.items() if k!='time'} for e in o['epochs']] for o in answer.runs}

def test_compare(capsys):
    a = compare(two, data(), seeds=3, epochs=2, lr=1e-2)
    assert a.baseline=='none' and [o['seed'] for o in a.runs]==[0,1,2]*2 and a.rows.pairs['wide']==3
    out = capsys.readouterr().out
    assert out.count('\n')==6 and 'about' in out and '\r' not in out
    folder, = Path('runs').iterdir()
    assert sorted(o.name for o in folder.iterdir() if o.is_dir())==['none','wide'] and str(folder) in str(a)
    again = compare(two, data(), seeds=3, epochs=2, lr=1e-2)
    assert capsys.readouterr().out=='' and again.runs==a.runs
    other = compare(two, data(), seeds=3, epochs=3, lr=1e-2)
    assert len(list(Path('runs').iterdir()))==2 and other.runs!=a.runs

def test_as_a_bare_loop():
    "The numbers are those of building and fitting by hand with that seed"
    a = compare(two, data(), seeds=[4,2], epochs=2, lr=1e-2)
    dls = data()
    for seed in (4,2):
        set_seed(seed, reproducible=True)
        own = DataLoaders(*[o.new() for o in dls.loaders])
        learn = net(own)
        set_seed(seed, reproducible=True)
        with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(2, 1e-2)
        run, = [o for o in a.runs if o['seed']==seed and o['variant']=='none']
        assert run['epochs'][-1]['valid_loss']==learn.recorder.values[-1][1]

def test_pairs():
    "Order of data and shared initial weights are equal, however the models are built; the caller's random state and data stay as they are"
    seen = []
    class See(Callback):
        def before_batch(self):
            if self.training and self.iter==0: seen.append((self.xb[0].clone(), self.model[0].weight.detach().clone()))
    dls = data()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    a = compare({'none': partial(net, cbs=See()), 'first': partial(net, first=True, cbs=See())}, dls, seeds=2, epochs=1)
    assert torch.equal(torch.get_rng_state(), before)
    (xa,wa),(xb,wb),(xc,wc),_ = seen
    assert torch.equal(xa, xb) and torch.equal(wa, wb) and not torch.equal(xa, xc) and not torch.equal(wa, wc)
    assert 'Initial weights copied from the baseline: 4 of 7 of first' in str(a)

def test_only_the_start_differs():
    "An idea that is another initialisation is not copied away in silence"
    def other(dls):
        learn = net(dls)
        for p in learn.model.parameters(): nn.init.normal_(p)
        return learn
    with pytest.raises(ValueError, match='initial weights only'): compare({'none': net, 'normal': other}, data(), epochs=1)
    a = compare({'none': net, 'normal': other}, data(), seeds=2, epochs=1, share=False)
    assert a.runs[0]['epochs']!=a.runs[2]['epochs']

def test_transforms_do_not_leak():
    "What a variant adds to its DataLoaders is not in the others'"
    dls = data()
    class Half(Transform):
        def encodes(self, x:Tensor): return x/2 if x.is_floating_point() else x
    def halved(dls):
        dls.add_tfms([Half()], 'after_batch')
        return net(dls)
    batches = []
    class See(Callback):
        def before_batch(self): batches.append(self.xb[0].abs().mean().item())
    dls = DataBlock(get_x=ItemGetter(0), get_y=ItemGetter(1), splitter=RandomSplitter(0.3, 0)).dataloaders(list(zip(torch.randn(64, 4), torch.randint(0, 3, (64,)))), bs=16, num_workers=0)
    compare({'half': halved, 'none': partial(net, cbs=See())}, dls, seeds=2, epochs=1)
    n = len(dls.after_batch.fs)
    assert not any(isinstance(o, Half) for o in dls.after_batch.fs) and min(batches)>0.6

# Kinds of tasks

def images(tmp_path, n=24):
    rng = np.random.default_rng(0)
    for i in range(n):
        im = rng.integers(0, 256, (16,16,3), dtype=np.uint8)
        im[:8] //= 1+i%2*3
        f = tmp_path/'ims'/'ab'[i%2]/f'{i}.png'
        f.parent.mkdir(parents=True, exist_ok=True)
        PILImage.create(im).save(f)
    return tmp_path/'ims'

def small_cnn(dls, n_out, loss=None, metrics=None): return Learner(dls, nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, n_out)), loss_func=loss, metrics=metrics)

def test_multi_label(tmp_path):
    dls = DataBlock((ImageBlock,MultiCategoryBlock), get_items=get_image_files, get_y=lambda f: [f.parent.name,'c'], splitter=RandomSplitter(0.3, 0)).dataloaders(images(tmp_path), bs=8, num_workers=0)
    f = partial(small_cnn, n_out=3, metrics=partial(accuracy_multi, thresh=0.5))
    a = compare({'a': f, 'b': f}, dls, seeds=2, epochs=1, metric='accuracy_multi', better='higher')
    assert read_examples(a.runs[0]).dtype==np.float16 and a.runs[0]['metric']=='accuracy_multi' and a.rows['diff']['b']==0

def test_segmentation(tmp_path):
    def mask(f): return PILMask.create((np.array(PILImage.create(f))[...,0]>100).astype(np.uint8))
    dls = DataBlock((ImageBlock,MaskBlock(codes=['x','y'])), get_items=get_image_files, get_y=mask, splitter=RandomSplitter(0.3, 0), item_tfms=Resize(32)).dataloaders(images(tmp_path, 12), bs=4, num_workers=0)
    def unet(dls, self_attention): return unet_learner(dls, resnet18, pretrained=False, n_out=2, self_attention=self_attention, metrics=DiceMulti())
    a = compare({'none': partial(unet, self_attention=False), 'sa': partial(unet, self_attention=True)}, dls, seeds=1, metric='dice_multi', better='higher', fit=lambda learn: learn.fine_tune(1))
    assert a.metric=='dice_multi' and len(a.runs[0]['epochs'])==2 and len(read_examples(a.runs[0]))==3

def test_regression_with_seed():
    "A function that builds its own data and takes the seed; loss and mae; lower is better"
    got = []
    def curve(hidden, seed):
        got.append(seed)
        x = torch.linspace(-1, 1, 60)[:,None]
        y = x**2+0.1*torch.randn(60, 1, generator=torch.Generator().manual_seed(seed))
        dls = DataLoaders.from_dsets(list(zip(x[::2], y[::2])), list(zip(x[1::2], y[1::2])), bs=10, num_workers=0)
        return Learner(dls, nn.Sequential(nn.Linear(1, hidden), nn.Tanh(), nn.Linear(hidden, 1)), loss_func=MSELossFlat(), metrics=mae)
    a = compare({'2': partial(curve, 2), '20': partial(curve, 20)}, seeds=[5,6], fit=lambda learn: learn.fit_flat_cos(2, 1e-2))
    assert (a.metric,a.better,a.share)==('mae','lower',False) and set(got)=={5,6}
    b = compare({'2': partial(curve, 2), '20': partial(curve, 20)}, seeds=[5,6], metric='valid_loss', fit=lambda learn: learn.fit_flat_cos(2, 1e-2))
    assert b.metric=='valid_loss' and b.runs[0]['value']==b.runs[0]['epochs'][-1]['valid_loss']
    assert np.allclose(read_examples(b.runs[0]).mean(), b.runs[0]['value'], rtol=1e-2)

def test_tabular():
    import pandas as pd
    from fastai.tabular.all import TabularDataLoaders,tabular_learner,Categorify,Normalize
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(a=rng.normal(size=200), b=rng.choice(list('xyz'), 200)))
    df['y'] = np.where((df.a>0)^(df.b=='x'), 'yes', 'no')
    dls = TabularDataLoaders.from_df(df, procs=[Categorify,Normalize], cat_names=['b'], cont_names=['a'], y_names='y', valid_idx=list(range(60)), bs=20, num_workers=0)
    a = compare({'small': lambda d: tabular_learner(d, layers=[8], metrics=accuracy), 'large': lambda d: tabular_learner(d, layers=[50,20], metrics=accuracy)}, dls, seeds=2, epochs=1)
    assert a.rows.pairs['large']==2 and len(read_examples(a.runs[0]))==60

def test_text():
    from fastai.text.all import TextDataLoaders,text_classifier_learner,AWD_LSTM
    import pandas as pd
    df = pd.DataFrame(dict(text=['good fine nice '*4,'bad poor awful '*4]*12, label=['p','n']*12, is_valid=[False]*16+[True]*8))
    dls = TextDataLoaders.from_df(df, text_col='text', label_col='label', valid_col='is_valid', bs=4)
    config = lambda n: dict(emb_sz=8, n_hid=n, n_layers=1, pad_token=1, bidir=False, output_p=0.1, hidden_p=0.1, input_p=0.1, embed_p=0.1, weight_p=0.1)
    f = lambda n: (lambda d: text_classifier_learner(d, AWD_LSTM, config=config(n), pretrained=False, metrics=accuracy))
    a = compare({'8': f(8), '16': f(16)}, dls, seeds=1, epochs=1)
    assert a.rows.pairs['16']==1 and [o['state'] for o in a.runs]==['done']*2

# Protocols

def test_more():
    "Seeds that are added after a look make the interval one that allows for looking; the runs that were there stay"
    a = compare(two, data(), seeds=4, epochs=1)
    fixed = a.rows.high['wide']-a.rows.low['wide']
    assert a.rows.anytime['wide'] is False and a.rows.p_paired['wide'] is not None
    b = a.more(2)
    assert b.rows.pairs['wide']==6 and b.rows.anytime['wide'] is True and b.rows.p_paired['wide'] is None and numbers(a).items()<=numbers(b).items()
    c = compare(two, data(), seeds=4, epochs=1) # the same call again knows that there was a look
    assert c.rows.anytime['wide'] is True and c.rows.pairs['wide']==6
    assert 'anytime-valid' in str(b)

def test_until():
    "Pairs are added until it is known; one that is known early gets no more"
    def guess(dls): return net(dls, metrics=accuracy, opt_func=partial(SGD, mom=0.), lr=1e-9)
    nets = {'none': partial(net, hidden=64), 'idle': guess, 'same': partial(net, hidden=64), 'near': partial(net, hidden=5)}
    a = compare(nets, data(256), until=3, seeds=12, fit=lambda learn: learn.fit(3, 1e-9 if learn.lr==1e-9 else 1e-2))
    assert a.rows.verdict['idle']=='harms' and a.rows.anytime['idle'] is True and a.rows.pairs['idle']<a.rows.runs['none'] and a.rows.pairs['idle']>=3
    assert a.rows.verdict['same']=='equal' and a.rows.pairs['same']==equal_pairs
    assert a.rows.runs['none']==12 or a.rows.verdict['near']!='open'

def test_until_all_equal():
    "Pairs that are all equal end the search, long before the limit, with a sentence that says so"
    a = compare({'none': net, 'same': net}, data(), until=0.01, seeds=100, epochs=1)
    assert a.rows.runs['none']==a.rows.runs['same']==equal_pairs and a.sentences()==[f'**same** equals none: +0.00 points in each of {equal_pairs} pairs.']

def test_until_hours():
    start = time.time()
    a = compare({'none': net, 'x': partial(net, hidden=9)}, data(), until=0.01, hours=3/3600, epochs=1)
    assert time.time()-start<60 and 2<=a.rows.runs['none']<2000 and a.rows.verdict['x']=='open'
    assert read_protocol(Path(a.runs[0]['file']).parent)=={'kind': 'until', 'until': 0.01}

def test_protocols_do_not_mix():
    for first,second in ((dict(seeds=2), dict(until=1, seeds=3)), (dict(until=1, seeds=2), dict(seeds=3))):
        compare(two, data(), epochs=1, out=f'r{len(first)}', **first)
        with pytest.raises(ValueError, match='choose another folder'): compare(two, data(), epochs=1, out=f'r{len(first)}', **second)

# Failures

def test_failures(capsys):
    "An exception, NaN, in building or in training: kept with the reason, counted, and the others go on"
    def fails(dls, seed):
        if seed==1: raise RuntimeError('out of memory')
        learn = net(dls)
        if seed==2: learn.loss_func = lambda p, y: p.sum()*float('nan')
        return learn
    a = compare({'none': net, 'fails': fails}, data(), seeds=4, epochs=1)
    states = {o['seed']: (o['state'],o.get('error', '')) for o in a.runs if o['variant']=='fails'}
    assert [states[s][0] for s in range(4)]==['done','failed','failed','done'] and 'RuntimeError: out of memory' in states[1][1] and 'nan in epoch 0' in states[2][1]
    assert '2 of 4 runs failed' in a.sentences()[0] and a.rows.pairs['fails']==2 and a.rows.runs['none']==4
    assert 'fails, seed 1: failed, RuntimeError' in capsys.readouterr().out

def test_always_fails():
    "A variant that fails each time does not keep `until` going"
    def fails(dls, seed):
        learn = net(dls)
        if seed or Path('started').exists(): raise RuntimeError('no')
        return learn
    a = compare({'none': net, 'fails': lambda dls, seed: fails(dls, seed) if not Path('go').write_text('') else fails(dls, 1)}, data(), until=1, seeds=50, epochs=1)
    assert len([o for o in a.runs if o['variant']=='fails'])==4

def test_stuck_checkpoint(capsys, monkeypatch):
    "A checkpoint that cannot be gone on from: the other runs are trained, and it is said how to go on"
    monkeypatch.setattr(run_mod, 'checkpoint_every', 0.)
    class Stop(Callback):
        def before_batch(self):
            if self.epoch==1 and Path('stop').exists(): raise KeyboardInterrupt
    f = {'none': partial(net, cbs=Stop), 'wide': partial(net, hidden=32)}
    Path('stop').touch()
    with pytest.raises(KeyboardInterrupt): compare(f, data(), seeds=2, epochs=3)
    Path('stop').unlink()
    ckpt, = Path('runs').rglob('state.pt')
    ckpt.write_bytes(b'half')
    a = compare(f, data(), seeds=2, epochs=3)
    out = capsys.readouterr().out
    assert '--no-resume' in out and 'resume=False' in out and a.rows.runs['none']==1 and a.rows.runs['wide']==2 and 'not finished' in str(a)+out or len(a.left)==1
    b = compare(f, data(), seeds=2, epochs=3, resume=False)
    assert b.rows.runs['none']==2 and not b.left

def test_resume_fine_tune(monkeypatch):
    "Interrupted in the second of two fits: the same numbers as never interrupted"
    monkeypatch.setattr(run_mod, 'checkpoint_every', 0.)
    class Stop(Callback):
        def before_batch(self):
            if self.n_epoch==4 and self.epoch==2 and Path('stop').exists(): raise KeyboardInterrupt
    f = {'none': partial(net, cbs=Stop, splitter=lambda m: [list(m[0].parameters()),list(m[2].parameters())]), 'wide': partial(net, hidden=32)}
    whole = compare(f, data(), seeds=1, fit=tune, out='a')
    Path('stop').touch()
    with pytest.raises(KeyboardInterrupt): compare(f, data(), seeds=1, fit=tune, out='b')
    Path('stop').unlink()
    assert list(Path('b').rglob('state.pt'))
    assert numbers(compare(f, data(), seeds=1, fit=tune, out='b'))==numbers(whole)

def tune(learn): learn.fine_tune(4, 1e-2)

@pytest.mark.parametrize('args,kwargs,message', [
    (({'a': net},), {}, 'two or more'), (([net,net],), {}, 'must be a dict'), (({'a': net, 'b': 3},), {}, "'b': 3"), (({'a': net, 'b': net},), dict(epochs=None), 'epochs must be given'),
    (({'a': net, 'b': lambda dls: 7},), {}, "'b' builds no Learner, but int"), (({'a': net, 'b': lambda dls: 1/0},), {}, "'b' builds no Learner: ZeroDivisionError"), (({'a/b': net, 'a_b': net},), {}, 'the same name'),
    (({'a': net, 'b': net},), dict(metric='dice'), "'a': unknown metric 'dice'"), (({'a': net, 'b': net},), dict(better='more'), 'direction'), (({'a': net, 'b': partial(net, metrics=lambda p, y: p.sum())},), {}, "'b': better must be"),
    (({'a': net, 'b': net},), dict(until=0.5), 'needs a limit'), (({'a': net, 'b': net},), dict(until=0, hours=1), 'until is a half-width'), (({'a': net, 'b': net},), dict(until=1, hours=-1), 'hours must be'), (({'a': net, 'b': net},), dict(hours=1), 'hours is the limit'),
    (({'a': net, 'b': net},), dict(seeds=0), 'seeds must be'), (({'a': net, 'b': net},), dict(seeds=[1,1]), 'different seeds'), (({'a': net, 'b': net},), dict(seeds=[]), 'different seeds'), (({'a': net, 'b': net},), dict(seeds=[1.5]), 'whole number'),
    (({'a': net, 'b': net},), dict(epochs=0), 'epochs must be'), (({'a': net, 'b': net},), dict(fit=3, epochs=None), 'fit must be'), (({'a': net, 'b': net},), dict(fit=lambda l: l.fit(1)), 'with fit, give them there')])
def test_bad(args, kwargs, message):
    with pytest.raises(ValueError, match=message): compare(*args, data(), **{**dict(epochs=1), **kwargs})
    assert not list(Path().rglob('*.json'))

@pytest.mark.parametrize('share', [True,False])
@pytest.mark.parametrize('kind', ['model','part'])
@pytest.mark.parametrize('first', [True,False])
def test_same_model(first, kind, share):
    "A function that returns weights that were trained before is refused before the first run"
    model = nn.Sequential(nn.Linear(4, 3))
    def same(dls): return Learner(dls, model if kind=='model' else nn.Sequential(model[0], nn.Linear(3, 3)), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    f = {'none': same, 'f': net} if first else {'none': net, 'f': same}
    with pytest.raises(ValueError, match=f"{'none' if first else 'f'}' returns the same weights in each call .0.weight"): compare(f, data(), seeds=1, epochs=1, share=share)
    assert not list(Path().rglob('*.json'))

def test_same_frozen_body():
    "A frozen body may be one for all runs: nothing trains it"
    body = nn.Linear(4, 3).requires_grad_(False)
    def frozen(dls): return Learner(dls, nn.Sequential(body, nn.Linear(3, 3)), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    assert [o['state'] for o in compare({'none': net, 'f': frozen}, data(), seeds=1, epochs=1).runs]==['done','done']

def test_other_folder():
    "A folder with runs of other variants, or of others of these names, is refused before the first run"
    compare(two, data(), seeds=1, epochs=1, out='r')
    with pytest.raises(ValueError, match='runs of other variants: wide'): compare({'none': net, 'deep': net}, data(), seeds=1, epochs=1, out='r')
    before = {f: f.read_text() for f in Path('r').rglob('*.json')}
    with pytest.raises(ValueError, match='is not the file of none'): compare(two, data(), seeds=1, epochs=2, out='r')
    with pytest.raises(ValueError, match="learner.*'bs': 16"): compare(two, data(bs=32), seeds=1, epochs=1, out='r')
    assert before=={f: f.read_text() for f in Path('r').rglob('*.json')}

def test_leaderboard_of_compare():
    "The files alone give the same answer"
    from fastattn.recipes.leaderboard import leaderboard
    a = compare(two, data(), seeds=3, epochs=1, out='r')
    b = leaderboard('r', show=False)['r']
    assert b.sentences()==a.sentences() and b.rows.equals(a.rows)
    c = a.more(1)
    assert leaderboard('r', show=False)['r'].sentences()==c.sentences()

def test_time_left_is_never_negative():
    plan = SimpleNamespace(until=0.5, hours=0.01, start=0., variants=[], seeds=[]) # began long ago
    assert SweepProgress(plan)._left(0)==', at most 0 s left'
