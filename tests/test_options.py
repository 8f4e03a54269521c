"Every option arrives where it belongs: from the command line to the Learner. Drop any on its way and a test fails"
import inspect,sys
from pathlib import Path
import pytest
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import MixUp
from fastai.callback.channelslast import ChannelsLast
from fastattn.recipes.answer import group_runs
from fastattn.callback import Autocast,ProgressiveResize
from fastattn.recipes import train as mod
from fastattn.recipes.options import *
from fastattn.recipes.options import _extras
from fastattn.recipes.train import *

small = dict(positional=dict(size=6), nonlinear=dict(size=8), dropconnect=dict(size=6), projection=dict(size=8), xresnet18=dict(size=8, widen=0.125))
# another value than the default for every option of every kind of model
other = dict(attn='sa', stages='2', blocks='first', act='GELU', pool='MaxPool', size_projection=5, p=0.3, drop='dropout', inference='gaussian', hidden='20,30',
    ndim=1, dim=32, depth=1, heads=2, token='mean', encoding='sinusoid', span='none', sigma=0.2, threshold=0.05, combine='multiply', modulate='positional', causal=True, penalty=0.5, per_head=True, at='block', scale=True, gain_lr=3., widen=0.5,
    window_size='1', iterations=1, global_every=2, size=9, epochs=7, lr=3e-2, bs=16, sched='flat', wd=0.5, opt='sgd', mom=0.5, sqr_mom=0.8, eps=1e-3, beta=5., smooth=0.3, mixup=0.4,
    presize=True, aug='flip', few=3, progressive=0.5, precision='bf16', channels_last=True, compile=True)
models = ['xresnet18','projection','dropconnect','positional','nonlinear']

def test_every_option_has_another_value():
    for o in models: assert set(learner_of(o).options)<=set(other)
    assert set(train_options)<=set(other)

def words(k):
    v = other[k]
    return [f"--{k.replace('_', '-')}"]+([] if v is True else [str(v)])

@pytest.mark.parametrize('arch,k', [(o,k) for o in models for k in [*learner_of(o).options, *train_options]])
def test_command_to_configuration(arch, k, monkeypatch):
    "What the command line says is what the configuration holds"
    data = 'imagenette' if k in ('presize','aug') else 'digits'
    given = words_of([data,'--arch',arch,*words(k)])
    assert given.pop('arch')==[arch] and given.pop('data')==data and set(given)<={k,'seed','out','resume','dry_run','lr_find','dump'}|{k}
    monkeypatch.setattr(mod, '_plans', lambda configs, *args: (_ for _ in ()).throw(Seen(configs)))
    if k not in option_defaults(data, arch) :
        with pytest.raises(ValueError, match=f"unknown option for {arch}.*{k}"): train(data, [arch], **{k: given[k]})
        return
    with pytest.raises(Seen) as e: train(data, [arch], **{k: given[k]})
    values = [c.get(k) for c in e.value.configs]
    assert all(str(v)==str(other[k]) for v in values if v is not None) and any(v is not None for v in values)

class Seen(Exception):
    def __init__(self, configs): self.configs = configs

def config_of(arch, **kwargs):
    base = dict(xresnet18=dict(attn='ssa'), dropconnect=dict(drop='dropconnect')).get(arch, {})
    return variants(arch=arch, **{**small[arch], **base, **kwargs})[0]

def state(learn): return repr(learn.model)+repr([(type(o).__name__, {k: v for k,v in vars(o).items() if isinstance(v, (int,float,str))}) for o in learn.cbs])

@pytest.mark.parametrize('arch,k', [(o,k) for o in models for k in learner_of(o).options])
def test_configuration_to_model(arch, k):
    "Another value of an option of a model makes another Learner"
    extra = dict(global_every=2, depth=2) if arch=='nonlinear' else dict(dim=16, depth=2, heads=4) if arch=='positional' else {}
    extra.pop(k, None)
    a,b = (build_learner(config_of(arch, **extra, **o), 0, 0) for o in ({}, {k: dict(other, global_every=1)[k]}))
    assert state(a)!=state(b) or _hidden(a)!=_hidden(b), k

def _hidden(learn):
    "What no repr tells: plain attributes of modules, and where spans start"
    plain = (int,float,str,tuple,type(None))
    attrs = [(n,{k: v for k,v in vars(m).items() if isinstance(v, plain)}) for n,m in learn.model.named_modules()]
    return repr(attrs)+repr([(n,p.mean().item()) for n,p in learn.model.named_parameters() if 'sigma' in n])

def test_training_options(monkeypatch):
    "Options of training, each looked for where it acts"
    def learner(**kwargs): return build_learner(config_of('xresnet18', **kwargs), 0, 0)
    def has(learn, cls): return [o for o in learn.cbs if isinstance(o, cls)]
    assert learner(bs=16).dls.bs==16 and learner(lr=3e-2).lr==3e-2 and learner(wd=0.5).wd==0.5 and learner(smooth=0.3).loss_func.eps==0.3
    assert learner(size=9).dls.one_batch()[0].shape[-1]==9 and len(learner(few=3, bs=10).dls.train_ds)==30
    for opt,params in (('sgd',dict(mom=0.5)), ('adam',dict(mom=0.5, sqr_mom=0.8, eps=1e-3)), ('ranger',dict(mom=0.5, sqr_mom=0.8, eps=1e-3, beta=5.)), ('rmsprop',dict(mom=0.5, sqr_mom=0.8, eps=1e-3))):
        f = learner(opt=opt, **params).opt_func
        assert f.func is opt_funcs[opt][0] and f.keywords==params
    assert has(learner(mixup=0.4), MixUp)[0].distrib.concentration0.item()==pytest.approx(0.4)
    assert has(learner(progressive=0.5), ProgressiveResize)[0].start==0.5 and has(learner(precision='bf16'), Autocast)[0].amp_mode.value=='bf16' and has(learner(channels_last=True), ChannelsLast)
    compiled = learner(compile=True).model
    assert compiled._compiled_call_impl is not None
    plain = learner()
    assert not any(has(plain, o) for o in (MixUp,ProgressiveResize,Autocast,ChannelsLast)) and plain.model._compiled_call_impl is None
    seen = []
    monkeypatch.setitem(mod.scheds, 'flat', lambda *args: seen.append(args))
    mod._fit(config_of('xresnet18', sched='flat', epochs=7, lr=3e-2), plain)
    assert seen==[(plain,7,3e-2)]

def test_photo_options(monkeypatch):
    "aug and presize reach the data; so do size, bs and workers"
    seen = {}
    def source(*args, **kwargs):
        seen.update(kwargs, data=args[0])
        raise Seen(None)
    monkeypatch.setitem(mod.learners, 'xresnet18', Registered(*[getattr(learners['xresnet18'], o) for o in ('func','options','defaults','recipe')], source))
    with pytest.raises(Seen): build_learner(variants('imagenette', attn='ssa', aug='flip', presize=True, size=48, bs=32)[0] | {'aug': 'flip', 'presize': True}, 0, 3)
    assert seen==dict(data='imagenette', size=48, bs=32, workers=3, aug='flip', presize=True)

@pytest.mark.parametrize('words,expected', [('--until 0.5 --hours 8', dict(until=0.5, hours=8.)), ('--runs 3 --seed 4', dict(runs=3, seed=4)), ('--no-resume', dict(resume=False)), ('--dry-run', dict(dry_run=True)),
    ('--track csv --workers 2', dict(track='csv', workers=2)), ('--preset list', dict(preset='list')), ('--board 128/5', dict(board='128/5')), ('--out there', dict(out='there')), ('--bf16', dict(precision=['bf16'])),
    ('--lr-find --dump', dict(lr_find=True, dump=True)), ('imagewoof', dict(data='imagewoof')), ('--attn none ssa', dict(attn=['none','ssa']))])
def test_words(words, expected):
    given = words_of(words.split())
    for k,v in expected.items(): assert given[k]==v

def test_bad_words(capsys):
    with pytest.raises(ValueError, match='choose one'): words_of(['--fp16','--bf16'])
    with pytest.raises(ValueError, match='one data set'): words_of(['digits','mnist'])
    with pytest.raises(SystemExit): words_of(['--atn','ssa'])
    assert '--atn' in capsys.readouterr().err
    with pytest.raises(ValueError, match="unknown option for xresnet18 with ranger 'window_size'"): train(**words_of(['--window-size','3']))

def test_help_is_short(capsys):
    "The help of no model fits on a screen, and tells its own options with their defaults"
    for args in ([],['--arch','positional'],['mnist','--arch','projection']):
        with pytest.raises(SystemExit): words_of([*args,'--help'])
        out = capsys.readouterr().out
        assert len(out.splitlines())<60 and '--dry-run' in out and 'sqr-mom' not in out
    assert '--size-projection' in out and '(default: 0.01)' in out and '--heads' not in out
    with pytest.raises(SystemExit): words_of(['--help-all'])
    out = capsys.readouterr().out
    assert all(f"--{k.replace('_', '-')}" in out for k in train_options)

def test_each_option_has_help():
    for arch in models:
        assert all(o.help for o in learner_of(arch).options.values()), arch

def test_registered(monkeypatch, tmp_path):
    "One line, and the command knows a model: its options, its recipe, its runs"
    from fastai.basics import Learner,nn,accuracy
    def tiny_learner(dls,
        width=4, # Units
        **kwargs): return Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(36, width), nn.ReLU(), nn.Linear(width, 10)), metrics=accuracy, **kwargs)
    monkeypatch.setattr(mod, 'learners', learners)
    monkeypatch.delitem(learners, 'tiny', raising=False)
    register_learner('tiny', tiny_learner, lr=0.02, opt='sgd')
    try:
        answer = train(**words_of(['digits','--arch','tiny','--width','4','8','--size','6','--epochs','1','--out',str(tmp_path)]))
        assert [(o['config']['width'],o['config']['lr'],o['config']['opt'],o['params']) for o in answer.runs]==[(4,0.02,'sgd',198),(8,0.02,'sgd',386)]
        assert learner_of('tiny').options['width'].help=='Units'
    finally: learners.pop('tiny')
    with pytest.raises(ValueError, match="unknown option of training 'lrr'"): register_learner('x', tiny_learner, lrr=1)

def test_files(tmp_path, monkeypatch):
    "Functions and layers in a file of one's own; a change of the file makes other variants"
    monkeypatch.chdir(tmp_path)
    code = 'from fastai.basics import *\ndef f(dls, width=4, **kwargs): return Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(36, width), nn.Linear(width, 10)), metrics=accuracy, **kwargs)\ndef g(dls, attn="ssa", **kwargs): return f(dls, 4 if attn=="none" else 6, **kwargs)\n'
    Path('mine.py').write_text(code)
    a = train(**words_of('mine.py:f --size 6 --few 4 --bs 16 --epochs 1'.split()))
    assert [o['config']['arch'] for o in a.runs]==['xresnet18','mine.py:f'] and a.baseline.startswith('xresnet18')
    b = train(**words_of('mine.py:g --size 6 --few 4 --bs 16 --epochs 1'.split()))
    assert [o['config']['attn'] for o in b.runs]==['none','ssa'] and b.baseline=='none'
    before = variants(arch='mine.py:f')
    Path('mine.py').write_text(code+'\n')
    assert variant_name(variants(arch='mine.py:f')[0])!=variant_name(before[0])
    with pytest.raises(ValueError, match='cannot be loaded'):
        Path('bad.py').write_text('1/0')
        train(**words_of(['bad.py:f']))

def test_folders_of_one_name(tmp_path):
    "The same folder is one data set however it is spelled; others of its name are others"
    for o in ('a','b'): (tmp_path/o/'ims').mkdir(parents=True)
    paths = {variants(str(o))[0]['data'] for o in (tmp_path/'a'/'ims', f"{tmp_path/'a'/'ims'}/", tmp_path/'b'/'..'/'a'/'ims')}
    assert paths=={str((tmp_path/'a'/'ims').resolve())}
    groups = {group_path('runs', variants(str(tmp_path/o/'ims'))[0]) for o in 'ab'}
    assert len(groups)==2 and all(o.name.startswith('ims-') for o in groups)

def test_few_images_are_another_group(tmp_path):
    "Runs on a part of the images are compared with each other only, and older runs stay where they are"
    few,whole = variants(attn='none', few=5)[0],variants(attn='none')[0]
    assert group_path('runs', few).name=='digits-few5-32-5' and group_path('runs', whole).name=='digits-32-5' and 'few' not in whole
    assert list(group_runs([dict(variant=str(i), config=c) for i,c in enumerate((few,whole))]))==['digits-32-5','digits-few5-32-5']

def test_scale_needs_simple_self_attention():
    with pytest.raises(ValueError, match="unknown attention with scale 'sa'"): build_learner(variants(attn='sa', scale=True, size=8)[0], 0, 0)
    assert 'scale=True' in repr(build_learner(variants(attn='ssa_sym', scale=True, size=8, widen=0.25)[0], 0, 0).model)
