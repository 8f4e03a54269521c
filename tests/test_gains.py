"Gains: what a run records of them, what the answer says, and their own learning rate"
import json
import numpy as np
import pytest,torch
from torch import nn
from fastai.basics import DataLoader,DataLoaders,Learner,Adam,SGD,CrossEntropyLossFlat,accuracy,set_seed
from fastai.optimizer import OptimWrapper,ranger
from fastai.layers import SelfAttention
from fastattn.callback import GainRate,GainRecorder,gain_of,gained_layers
from fastattn.learner import ssa_learner
from fastattn.layers.simple import SimpleSelfAttention
from fastattn.models.insert import attn_layers
from fastattn.recipes.answer import Answer,show_gains
from fastattn.recipes.run import Run

def loaders(n_valid=20):
    g = torch.Generator().manual_seed(0)
    items = [(torch.randn(3, 8, 8, generator=g),i%2) for i in range(32+n_valid)]
    return DataLoaders(DataLoader(items[:32], bs=8), DataLoader(items[32:], bs=8) if n_valid else [])

def learner(attn='ssa', **kwargs):
    set_seed(0, reproducible=True)
    words = dict(widen=0.25, n_out=2, loss_func=CrossEntropyLossFlat(), metrics=accuracy, opt_func=Adam, **kwargs)
    return ssa_learner(loaders(), 'xresnet18', attn, **words)

def fit(learn, epochs=1, cbs=None, lr=1e-2):
    set_seed(1, reproducible=True)
    with learn.no_bar(),learn.no_logging(): learn.fit(epochs, lr, cbs=cbs)
    return learn

def weights(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()])

@pytest.mark.parametrize('attn', ['ssa','sa','local','positional','se'])
def test_share_is_branch_over_input(attn):
    "Gain and share are those of the trained layers, on the first 16 validation examples"
    rec = GainRecorder()
    learn = fit(learner(attn, stages=[1,2], at='block'), 2, rec)
    layers = attn_layers(learn.model)
    assert len(rec.rows)==2 and [o['layer'] for o in rec.rows[-1]['gains']]==[k for k in gained_layers(learn.model)]
    seen = []
    for m in layers: m.register_forward_hook(lambda m, args, out: seen.append((args[0],out)))
    x = next(iter(learn.dls.valid))[0][:16]
    with torch.no_grad(): learn.model.eval()(x)
    for row,(x,y),m in zip(rec.rows[-1]['gains'], seen, layers):
        assert row['share']==pytest.approx(((y-x).double().square().mean().sqrt()/x.double().square().mean().sqrt()).item(), rel=1e-4)
        assert row['gain']==(None if attn=='se' else pytest.approx(gain_of(m).item()))

def test_recording_changes_nothing():
    "Training is the same to the last bit with the recorder and without, for dropout too; models without attention have no row"
    def trained(*cbs, **kwargs): return weights(fit(learner(p=0.5, **kwargs), 2, list(cbs)))
    assert torch.equal(trained(), trained(GainRecorder()))
    learn = fit(learner('none'), 1, rec := GainRecorder())
    assert rec.rows==[{}] and not gained_layers(learn.model)
    assert not any(m._forward_hooks for m in fit(learner(), 1, GainRecorder()).model.modules())

def test_recorder_without_input_and_validation():
    "An input of zeros has no share; without a validation set there are gains alone"
    rec = GainRecorder()
    learn = learner()
    with torch.no_grad():
        for m in learn.model.modules():
            if isinstance(m, nn.BatchNorm2d): nn.init.zeros_(m.weight).add_(nn.init.zeros_(m.bias))
    fit(learn, 1, rec, lr=0.)
    assert rec.rows[0]['gains'][0]['share'] is None
    learn = learner()
    learn.dls = loaders(0)
    fit(learn, 1, rec := GainRecorder())
    row, = rec.rows[0]['gains']
    assert row['share'] is None and isinstance(row['gain'], float)

def test_recorder_under_compile():
    "Compiled code does not hide the layers"
    learn = learner(at='block')
    learn.model.compile(backend='eager')
    fit(learn, 1, rec := GainRecorder())
    assert rec.rows[0]['gains'][0]['share']>0

def test_fastais_own_attention():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), SelfAttention(8), nn.Flatten(), nn.Linear(512, 2))
    learn = fit(Learner(loaders(), model, CrossEntropyLossFlat()), 1, rec := GainRecorder())
    assert rec.rows[0]['gains'][0]['gain']==pytest.approx(model[1].gamma.item())

def test_run_keeps_gains(tmp_path):
    "In the run's file, for each epoch"
    def build(): return learner(at='block')
    record = Run(tmp_path/'seed0.json', 'ssa', 0, {}, build, lambda learn: learn.fit(2, 1e-2)).train()
    assert record['state']=='done'
    kept = json.loads((tmp_path/'seed0.json').read_text())['epochs']
    assert [set(o['gains'][0]) for o in kept]==[{'layer','gain','share'}]*2

@pytest.mark.parametrize('opt', [Adam, SGD, ranger])
def test_gain_rate(opt):
    "One step from the same start: gains move `factor` times as far, everything else as before"
    def step(**kwargs):
        learn = learner(at='block', gain_lr=kwargs.pop('gain_lr', 1.))
        learn.opt_func = opt
        learn.dls = DataLoaders(DataLoader([(torch.ones(3, 8, 8),0),(torch.arange(192.).view(3,8,8)/100,1)], bs=2), [])
        return fit(learn, 1, lr=1e-3)
    plain,fast = step(),step(gain_lr=5.)
    a,b = (gain_of(attn_layers(o.model)[0]).item() for o in (plain,fast))
    assert a!=0 and b==pytest.approx(5*a, rel=1e-4)
    for (k,p),q in zip(plain.model.named_parameters(), fast.model.parameters()):
        if not k.endswith('gamma'): assert torch.equal(p, q), k

def test_gain_rate_in_several_fits():
    "It is set once, however often the Learner is trained, and after a new optimiser too"
    learn = fit(fit(learner(gain_lr=3.)))
    learn.create_opt()
    fit(learn)
    assert sum(type(o).__name__=='_ScaledStep' for o in learn.opt.cbs)==len(learn.opt.cbs) and not any(type(o.step).__name__=='_ScaledStep' for o in learn.opt.cbs)

def test_gain_rate_refuses():
    for bad in (0, -1., float('inf'), float('nan')):
        with pytest.raises(ValueError, match='factor must be positive and finite'): GainRate(bad)
    with pytest.raises(ValueError, match='no attention with a gain'): fit(learner('none'), cbs=GainRate(2.))
    learn = learner()
    learn.opt_func = lambda params, lr: OptimWrapper(params, torch.optim.Adam, lr=lr)
    with pytest.raises(ValueError, match="one of fastai's optimisers, got OptimWrapper"): fit(learn, cbs=GainRate(2.))

def run(variant, seed, value, shares=(), **config):
    epochs = [dict(epoch=i, train_loss=1., valid_loss=1., accuracy=value, **({'gains': [dict(layer='a', gain=-s/10, share=s)]} if s is not None else {})) for i,s in enumerate(shares)]
    return dict(state='done', variant=variant, seed=seed, config=dict(data='digits', size=8, epochs=2, attn=variant, **config), epochs=epochs, value=value, time_s=1.)

def runs(shares, **config): return [run(v, s, 0.9+0.01*s, o, **(config if v=='ssa' else {})) for v,o in (('none',(None,None)), ('ssa',shares)) for s in range(3)]

def test_words():
    "The report says where attention hardly moved, in text and in Markdown"
    still = Answer(runs((1e-5,2e-3)))
    note, = [o for o in still.notes() if 'hardly moved' in o]
    assert "gain 0.0002, 0.002 of its input" in note and "at='block'" in note and note in still._repr_markdown_() and 'hardly moved' in str(still)
    assert "learn faster" in str(Answer(runs((1e-5,2e-3), at='block')))
    assert 'hardly moved' not in str(Answer(runs((1e-5,0.2))))
    assert still.moved('ssa')=={'a': (pytest.approx(2e-4),2e-3)} and still.moved('none')=={}
    with pytest.raises(ValueError, match='unknown variant'): still.moved('sa')

def test_older_runs():
    "Runs without gains are read as before, and have no picture of them"
    old = Answer(runs((None,None)))
    assert 'hardly moved' not in str(old) and old.gains('ssa')==[]
    with pytest.raises(ValueError, match='none of the runs has kept its gains'): show_gains(old)

def test_picture(tmp_path):
    fig = show_gains(Answer(runs((1e-5,2e-3))), tmp_path/'g.png')
    assert (tmp_path/'g.png').stat().st_size>5000 and len(fig.axes)==2 and len(fig.axes[1].lines)==5
