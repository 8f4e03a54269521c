"Learners: what they take from the data, weight decay, precision, export, and DistributedDataParallel"
import copy,math,socket
import pytest,torch
import torch.multiprocessing as mp
from fastai.basics import DataLoaders,MSELossFlat,SGD,error_rate,load_learner,partial,set_seed
from fastai.callback.all import ChannelsLast
from torch.optim.swa_utils import AveragedModel
from fastai.losses import CrossEntropyLossFlat
from fastattn.callback import Autocast,NoWeightDecay
from fastattn.layers.simple import SimpleSelfAttention
from fastattn.learner import ssa_learner
from fastattn.recipes.data import get_dls

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
    ctx = mp.get_context('spawn')
    q = ctx.Queue()
    ps = [ctx.Process(target=_ddp, args=(i,port,q)) for i in range(2)]
    for p in ps: p.start()
    ends = dict(q.get(timeout=100) for _ in ps)
    for p in ps: p.join()
    for k in ('weight','gamma'): torch.testing.assert_close(torch.tensor(ends[0][k]), torch.tensor(ends[1][k]))
