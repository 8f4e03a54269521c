"Learners: what they take from the data, weight decay, precision, export, and DistributedDataParallel"
import copy,inspect,math,socket
import pytest,torch
from commands import forks
from fastai.basics import DataLoaders,Learner,MSELossFlat,SGD,error_rate,load_learner,partial,set_seed
from fastai.callback.all import ChannelsLast,MCDropoutCallback
from torch.optim.swa_utils import AveragedModel
from fastai.losses import CrossEntropyLossFlat
from fastai.vision.models.xresnet import XResNet
from fastcore.docments import docments
from fastai.callback.schedule import SchedCos,SchedLin
from fastattn.callback import Autocast,DropConnectSchedule,NoWeightDecay
from fastattn.layers.dropconnect import DropConnect,dropconnect_layers
from fastattn.layers.simple import SimpleSelfAttention
from fastattn.layers.positional import PositionalSelfAttention
from fastattn.learner import _learner_words,dropconnect_learner,nonlinear_learner,positional_learner,projection_learner,ssa_learner
from fastattn.models.nonlinear import NonLinearTransformer
from fastattn.models.positional import PositionalTransformer
from fastattn.models.projection import ProjectionClassifier
from fastattn.recipes.data import get_dls,get_tokens

@pytest.fixture(scope='module')
def dls(): return get_dls('digits', size=16, bs=32)

def small(dls, **kwargs): return ssa_learner(dls, **{**dict(widen=0.125, stages=[1,2]), **kwargs})
def fit(learn, n=1, **kwargs):
    "A few steps, quietly"
    with learn.no_bar(),learn.no_logging(): learn.fit(n, **kwargs)
    return learn
def ssas(m): return [o for o in m.modules() if isinstance(o, SimpleSelfAttention)]

@pytest.fixture(scope='module')
def few():
    "64 of the digits, for training and validation both"
    dls = get_dls('digits', size=16, bs=16)
    return DataLoaders(*[dls.test_dl(dls.train_ds.items[:64], with_labels=True) for _ in range(2)])

def test_from_data(dls):
    learn = small(dls)
    assert learn.model[-1].out_features==10 and learn.model[0][0].in_channels==1
    assert isinstance(learn.loss_func, CrossEntropyLossFlat)
    assert learn.metrics.attrgot('name')==['accuracy']
    assert len(ssas(learn.model))==2

def test_overrides(dls):
    learn = small(dls, n_out=4, c_in=3, metrics=error_rate, loss_func=MSELossFlat(), opt_func=partial(SGD, mom=0.5), lr=0.3, wd=0.2, path='x', moms=(1,1,1))
    assert learn.model[-1].out_features==4 and learn.model[0][0].in_channels==3
    assert learn.metrics.attrgot('name')==['error_rate'] and learn.lr==0.3 and learn.wd==0.2 and str(learn.path)=='x'

def test_no_targets():
    dls = DataLoaders.from_dsets([torch.zeros(1,8,8)]*4, [torch.zeros(1,8,8)]*4, bs=2)
    with pytest.raises(ValueError, match='pass n_out'): ssa_learner(dls, c_in=1)

def test_unknown_words(dls):
    with pytest.raises(ValueError, match="Did you mean 'widen'"): small(dls, widenn=2)

def test_no_weight_decay(few):
    "gamma keeps its value under a decay that halves everything else at each step"
    for cbs in ((), NoWeightDecay()):
        learn = small(few, opt_func=SGD, lr=1e-9, wd=5e8)
        learn.remove_cb(NoWeightDecay)
        for o in ssas(learn.model): o.gamma.data.fill_(1.)
        w = ssas(learn.model)[0].weight.clone()
        fit(learn, cbs=cbs)
        ends = {round(o.gamma.item(), 3) for o in ssas(learn.model)}
        assert ends=={1.} if cbs else 1. not in ends
        assert ssas(learn.model)[0].weight.norm()<0.5*w.norm()

def test_our_learners_have_it(few):
    learn = fit(small(few))
    assert [learn.opt.state[o.gamma].get('do_wd') for o in ssas(learn.model)]==[False,False]
    assert learn.opt.state[ssas(learn.model)[0].weight].get('do_wd') is not False

@pytest.mark.parametrize('cbs', [None,'bf16'])
@pytest.mark.filterwarnings('ignore')
def test_export(few, cbs, tmp_path):
    "The exported Learner predicts the same, trains on; the one left behind too"
    learn = fit(small(few, cbs=Autocast(cbs) if cbs else None, path=tmp_path))
    learn.export()
    loaded = load_learner(tmp_path/'export.pkl')
    x = few.valid.one_batch()[0]
    assert torch.equal(loaded.model.eval()(x), learn.model.eval()(x))
    im = few.valid_ds.items[0]
    assert loaded.predict(im)[0] in few.vocab
    fit(learn)
    loaded.dls = few
    fit(loaded)

def test_weights_only(few, tmp_path):
    learn = fit(small(few))
    torch.save(learn.model.state_dict(), tmp_path/'m.pth')
    fresh = small(few).model
    fresh.load_state_dict(torch.load(tmp_path/'m.pth', weights_only=True))
    x = few.valid.one_batch()[0]
    assert torch.equal(fresh.eval()(x), learn.model.eval()(x))

def test_autocast_trains(few):
    "bf16 follows fp32 in a short training; the model's parameters stay fp32"
    losses = {}
    for mode in (None,'bf16'):
        set_seed(0)
        learn = fit(small(few, cbs=[Autocast(mode)] if mode else None), 3)
        losses[mode] = learn.recorder.losses[-1].item()
        assert {p.dtype for p in learn.model.parameters()}=={torch.float32}
    assert abs(losses['bf16']-losses[None])<0.2

def test_autocast_bad():
    with pytest.raises(ValueError): Autocast('fp8')

def test_channels_last(few):
    learn = fit(small(few, cbs=ChannelsLast()))
    assert math.isfinite(learn.recorder.values[-1][0])

def test_averaged_model(few):
    "PyTorch's EMA copies the model in the middle of training"
    learn = fit(small(few))
    ema = AveragedModel(learn.model)
    fit(learn)
    ema.update_parameters(learn.model)
    x = few.valid.one_batch()[0]
    assert ema.eval()(x).isfinite().all()
    assert torch.equal(copy.deepcopy(learn.model).eval()(x), learn.model.eval()(x))

def test_seed(few):
    ends = []
    for _ in range(2):
        set_seed(5)
        ends.append(fit(small(few)).model.state_dict())
    assert all(torch.equal(v, ends[1][k]) for k,v in ends[0].items())

def _ddp(rank, port, q):
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank, world_size=2)
    torch.manual_seed(0)
    l = SimpleSelfAttention(8, sym=True)
    l.gamma.data.fill_(0.01)
    m = torch.nn.parallel.DistributedDataParallel(l)
    opt = torch.optim.SGD(m.parameters(), 1e-3)
    torch.manual_seed(rank)
    for _ in range(3):
        (m(torch.randn(2, 8, 5, 5))+m(torch.randn(2, 8, 5, 5))).square().mean().backward() # two forwards before a backward
        opt.step()
        opt.zero_grad()
    q.put((rank, {k: v.tolist() for k,v in l.state_dict().items()}))
    torch.distributed.destroy_process_group()

def test_ddp():
    "Two processes, other data in each, two forwards before each backward: the same weights in the end"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    q = forks.Queue()
    ps = [forks.Process(target=_ddp, args=(i,port,q)) for i in range(2)]
    for p in ps: p.start()
    ends = dict(q.get(timeout=100) for _ in ps)
    for p in ps: p.join()
    for k in ('weight','gamma'): torch.testing.assert_close(torch.tensor(ends[0][k]), torch.tensor(ends[1][k]))

def matrices(n, *shape):
    "Data of random matrices of `shape`, with two classes"
    items = [(torch.randn(*shape)+i%2, i%2) for i in range(n)]
    dls = DataLoaders.from_dsets(items, items, bs=4)
    dls.c = 2
    return dls

@pytest.mark.parametrize('shape', [(5,7), (1,6,6), (3,6,8), (2,2,5,4)])
def test_projection_learner(shape):
    learn = projection_learner(matrices(8, *shape), size_projection=3, p=0.1, loss_func=CrossEntropyLossFlat())
    assert learn.model.projection.size_input==shape[-2:] and learn.model.head[1].p==0.1
    assert fit(learn).model.head[-1].out_features==2

def test_dropconnect_learner(few):
    learn = dropconnect_learner(few, hidden=(20,10), p=0.3, inference='gaussian')
    layers = [o for o in learn.model if isinstance(o, DropConnect)]
    assert [(o.in_features,o.out_features,o.p,o.inference) for o in layers]==[(256,20,0.3,'gaussian'),(20,10,0.3,'gaussian')]
    assert type(learn.model[-1]) is torch.nn.Linear
    for drop,n in (('dropout',2),('none',0)):
        learn = dropconnect_learner(few, hidden=(20,10), p=0.3, drop=drop)
        assert [o.p for o in learn.model if isinstance(o, torch.nn.Dropout)]==[0.3]*n and not any(isinstance(o, DropConnect) for o in learn.model)
    assert [o.out_features for o in dropconnect_learner(few, hidden=()).model[1:]]==[10]

@pytest.mark.parametrize('make', [projection_learner, partial(dropconnect_learner, hidden=(8,)), partial(dropconnect_learner, hidden=(8,), inference='gaussian'), partial(positional_learner, dim=8, depth=1, heads=2)])
def test_export_others(few, tmp_path, make):
    learn = fit(make(few))
    learn.path = tmp_path
    learn.export()
    loaded,x = load_learner(tmp_path/'export.pkl'),few.one_batch()[0]
    a,b = (set_seed(0) or o.model.eval()(x) for o in (learn,loaded))
    torch.testing.assert_close(a, b)

@pytest.mark.parametrize('make', [projection_learner, partial(dropconnect_learner, hidden=(8,)), partial(positional_learner, dim=8, depth=1, heads=2)])
@pytest.mark.parametrize('amp', ['bf16',None])
def test_same_seed(few, make, amp):
    "Twice the same, also in mixed precision"
    losses = [(set_seed(0, reproducible=True), fit(make(few, cbs=Autocast(amp) if amp else None)).recorder.values)[1] for _ in range(2)]
    assert losses[0]==losses[1] and math.isfinite(losses[0][0][0])

def test_learn_to_dropconnect(few):
    "In the middle of training, with an optimiser that goes on"
    learn = fit(small(few))
    opt,weight,n = learn.opt,learn.model[-1].weight,len(learn.opt.all_params())
    assert learn.to_dropconnect(0.2) is learn
    assert isinstance(learn.model[-1], DropConnect) and learn.model[-1].weight is weight
    before = weight.clone()
    learn.create_opt = None # would fail if called
    with learn.no_bar(),learn.no_logging(): learn.fit(1)
    assert learn.opt is opt and len(opt.all_params())==n and not torch.equal(before, weight)

def test_schedule(few):
    learn = dropconnect_learner(few, hidden=(8,8), cbs=DropConnectSchedule(SchedCos(0., 0.6)))
    fit(learn, 2)
    assert {o.p for o in learn.model if isinstance(o, DropConnect)}=={learn.drop_connect_schedule.epoch_row()['p']}
    assert 0.5<learn.drop_connect_schedule.epoch_row()['p']<0.6
    learn.get_preds() # sets nothing
    with pytest.raises(ValueError, match='no DropConnect layers'): fit(small(few, cbs=DropConnectSchedule(SchedLin(0., 0.5))))
    for sched in (SchedLin(0., 1.), SchedLin(-0.1, 0.5), lambda pos: 1.5 if pos==0.5 else 0.):
        with pytest.raises(ValueError, match='p is the probability'): DropConnectSchedule(sched)

@pytest.mark.parametrize('drop', ['dropconnect','dropout'])
def test_mc_preds(few, drop):
    "Passes differ, and their spread is that of the masks; the model predicts as before afterwards"
    set_seed(0)
    learn = dropconnect_learner(few, hidden=(20,), p=0.5, drop=drop)
    before = learn.get_preds()[0]
    preds,targets = learn.mc_preds(5)
    assert preds.shape==(5,64,10) and targets.shape==(64,) and preds.std(0).mean()>0.005
    passes = [learn.get_preds(cbs=MCDropoutCallback())[0] for _ in range(2)]
    assert not torch.equal(*passes)
    assert torch.equal(learn.get_preds()[0], before) and learn.mc_preds(2, dl=few.valid)[0].shape==(2,64,10)
    assert not any(isinstance(o, MCDropoutCallback) for o in learn.cbs)

def test_mc_preds_needs_something_random(few):
    with pytest.raises(ValueError, match='neither dropout nor DropConnect'): dropconnect_learner(few, drop='none').mc_preds()
    with pytest.raises(ValueError, match='n must be at least 1'): dropconnect_learner(few).mc_preds(0)

def test_schedule_of_all_kinds(few):
    learn = small(few).to_dropconnect(0.5)
    learn.to_dropconnect(0.5, layers=[n for n,m in learn.model.named_modules() if type(m) is torch.nn.Conv2d][:1])
    fit(learn, cbs=DropConnectSchedule(SchedLin(0., 0.4)))
    assert {o.p for o in dropconnect_layers(learn.model).values()}=={learn.model[-1].p} and len(dropconnect_layers(learn.model))==2 and 0.2<learn.model[-1].p<0.4

@pytest.mark.parametrize('f,message', [(lambda d: projection_learner(d, size_projection=1), 'size_projection must be at least 2'), (lambda d: projection_learner(d, p=1.), 'p is the probability of dropping'),
    (lambda d: dropconnect_learner(d, drop='droput'), "Did you mean 'dropout'"), (lambda d: dropconnect_learner(d, hidden=(8,0)), 'hidden must be numbers of units'),
    (lambda d: dropconnect_learner(d, p=1.), 'p is the probability'), (lambda d: dropconnect_learner(d, inference='max'), 'unknown inference'), (lambda d: ssa_learner(d, n_out=0), 'n_out must be at least 1')])
def test_bad_values(few, f, message):
    with pytest.raises(ValueError, match=message): f(few)

learners = dict(ssa=ssa_learner, projection=projection_learner, dropconnect=dropconnect_learner, positional=positional_learner, nonlinear=nonlinear_learner)
of_model = dict(ssa=['widen','act_cls','ks'], projection=['size_projection'], dropconnect=['hidden','drop'], positional=['dim','depth','heads','encoding','span','causal'],
    nonlinear=['dim','depth','heads','window_size','iterations'])

@pytest.mark.parametrize('name', learners)
def test_tab_completes(name):
    "The options of the model and of `Learner` are in the signature, with their comments, each once"
    params,docs = inspect.signature(learners[name]).parameters,docments(learners[name])
    words = [o for o in _learner_words if o in params]
    assert words==_learner_words and set(of_model[name])<=set(params) and list(params)[0]=='dls'
    assert all(docs[o] for o in words) and (name=='ssa' or all(docs[o] for o in of_model[name]))

@pytest.mark.parametrize('name', learners)
@pytest.mark.parametrize('typed,meant', [('metrcs','metrics'), ('losfunc','loss_func')])
def test_unknown_options(name, typed, meant):
    "One kind of error for all, before the data is looked at"
    with pytest.raises(ValueError, match=f"unknown option of {name}_learner '{typed}'. Did you mean '{meant}'.*Known: "): learners[name](None, **{typed: 1})

@pytest.mark.parametrize('name', learners)
def test_unknown_options_of_models(name):
    word = of_model[name][0]
    with pytest.raises(ValueError, match=f"unknown option of {name}_learner '{word}x'. Did you mean '{word}'"): learners[name](None, **{word+'x': 1})

def test_what_lends_comments_stays_as_it_was():
    for o in (XResNet,ProjectionClassifier,PositionalTransformer,PositionalSelfAttention,NonLinearTransformer,Learner):
        assert 'loss_func' not in inspect.signature(o).parameters or o is Learner
        assert not hasattr(o.__init__, '__delwrap__') or o in (XResNet,)

def test_second_names(few):
    "`vision_learner`'s for channels, and the model's for its width"
    assert small(few, n_in=3).model[0][0].in_channels==3
    tokens = get_tokens('digits')
    for word in ('dim','embed_size'): assert nonlinear_learner(tokens, heads=2, **{word: 16}).model.embed.embedding_dim==16

def test_given_wins(few):
    "Over the metric and the loss that go with the data, and over the splitter"
    learn = nonlinear_learner(get_tokens('digits'), dim=8, heads=2, loss_func=MSELossFlat(), metrics=error_rate, p=0.)
    assert isinstance(learn.loss_func, type(MSELossFlat())) and learn.metrics.attrgot('name')==['error_rate'] and learn.model.drop.p==0
    assert small(few, metrics=None).metrics.attrgot('name')==['accuracy']
    assert len(small(few, splitter=lambda m: [list(m.parameters())]).splitter(small(few).model))==1

def test_not_matrices():
    with pytest.raises(ValueError, match=r'takes matrices .* shape \(6,\)'): projection_learner(matrices(8, 6))
