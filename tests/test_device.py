"On every device there is: layers, models, learners, callbacks; training steps without hidden waits; the same numbers for the same seed"
import pytest,torch
from contextlib import contextmanager
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from fastai.basics import Callback,DataLoaders,Learner,load_learner,set_seed
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.schedule import SchedCos
from fastai.losses import CrossEntropyLossFlat
from fastattn.callback import *
from fastattn.layers.all import *
from fastattn.learner import *
from fastattn.models.all import *
from fastattn.recipes.cache import batch_augs,CachedImages
from fastattn.recipes.data import get_tokens

pytestmark = pytest.mark.device
devices = ['cpu',*['cuda']*torch.cuda.is_available(),*['mps']*torch.backends.mps.is_available()]

@pytest.fixture(params=devices)
def device(request): return torch.device(request.param)

class Waits(TorchFunctionMode):
    "Raise for what would make the CPU wait for another device, though here all is on the CPU"
    names = {'item','tolist','numpy','cpu','nonzero','__bool__','__int__','__float__','__index__'}
    def seen(self, name): raise RuntimeError(f'{name} waits for the device')
    def __torch_function__(self, func, types, args=(), kwargs=None):
        name,kwargs = getattr(func, '__name__', ''),kwargs or {}
        if name in self.names and isinstance(args[0], torch.Tensor): self.seen(name)
        moves = [str(o) for o in (*args[1:],*kwargs.values()) if isinstance(o, (str,torch.device))]
        if name=='to' and 'cpu' in moves and not kwargs.get('non_blocking'): self.seen('to(cpu)')
        if name in ('tensor','as_tensor') and not isinstance(args[0], torch.Tensor) and 'device' in kwargs: self.seen(f'{name} of numbers')
        return func(*args, **kwargs)

class Counts(Waits):
    "Counts them"
    def __init__(self):
        super().__init__()
        self.n = 0
    def seen(self, name): self.n += 1

class HiddenWaits(TorchDispatchMode):
    "The same below autograd: in backward, and in what C++ calls"
    names = {'_local_scalar_dense','nonzero','masked_select','unique','_unique2','unique_consecutive','equal','is_nonzero'}
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split('.')[0]
        if name in self.names: raise RuntimeError(f'{name} waits for the device')
        indices = args[1] if name in ('index','index_put','index_put_') else ()
        if any(o is not None and o.dtype in (torch.bool,torch.uint8) for o in indices):
            raise RuntimeError(f'{name} with a mask waits for the device')
        return func(*args, **(kwargs or {}))

@contextmanager
def no_waits(device):
    if device.type=='cpu':
        with Waits(), HiddenWaits(): yield
    else:
        if device.type=='cuda': torch.cuda.set_sync_debug_mode('error')
        try: yield
        finally:
            if device.type=='cuda': torch.cuda.set_sync_debug_mode('default')

@pytest.mark.parametrize('f', [lambda x: x.sum().item(), lambda x: x.tolist(), lambda x: bool(x.any()), lambda x: x[x>0],
    lambda x: x.nonzero(), lambda x: x.cpu(), lambda x: x.to('cpu'), lambda x: float(x.sum()), lambda x: x.masked_select(x>0),
    lambda x: int(x.argmax()), lambda x: torch.tensor([1.,2.], device=x.device), lambda x: torch.as_tensor(1, device=x.device)])
def test_waits_are_seen(f):
    with pytest.raises(RuntimeError, match='waits for the device'), no_waits(torch.device('cpu')): f(torch.randn(3, 4))

def test_waits_in_backward_are_seen():
    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): return x*2
        @staticmethod
        def backward(ctx, g): return g*g.sum().item()
    x = torch.randn(3, requires_grad=True)
    with pytest.raises(RuntimeError, match='waits for the device'), no_waits(torch.device('cpu')): Reads.apply(x).sum().backward()

def images(*shape): return torch.randn(2, *shape)
cases = {
    'ssa': (lambda: SimpleSelfAttention(8), images(8,6,6)),
    'ssa sym': (lambda: SimpleSelfAttention(8, sym=True), images(8,6,6)),
    'ssa few positions': (lambda: SimpleSelfAttention(16), images(16,2,2)),
    'ssa ks 3': (lambda: SimpleSelfAttention(8, 3), images(8,6,6)),
    'projection': (lambda: SelfProjection((6,7), 4), images(6,7)),
    'dropconnect': (lambda: DropConnect(20, 10), images(20)),
    'dropconnect gaussian': (lambda: DropConnect(20, 10, inference='gaussian'), images(20)),
    'positional': (lambda: PositionalSelfAttention(16, 2, 2, span=None), images(6,6,16)),
    'positional without encoding': (lambda: PositionalSelfAttention(16, 2, 2, None, span=None), images(6,6,16)),
    'positional window': (lambda: PositionalSelfAttention(16, 2, 2, span=2), images(12,12,16)),
    'positional sinusoid causal': (lambda: PositionalSelfAttention(16, 2, 1, 'sinusoid', causal=True, span=None), images(12,16)),
    'positional span': (lambda: PositionalSelfAttention(16, 2, 2, 'siren', GaussianSpan(2, 0.1)), images(16,16,16)),
    'local 2-D': (lambda: Local2DAttention(16, 2, 2), images(8,8,16)),
    'local 2-D large': (lambda: Local2DAttention(16, 1, 2), images(24,24,16)),
    'xresnet18': (lambda: xresnet18_ssa(n_out=3, widen=0.25), images(3,32,32)),
    'projection classifier': (lambda: ProjectionClassifier((8,8), 4, 3), images(1,8,8)),
    'nonlinear': (lambda: NonLinearTransformer(10, 16, 8, 2, 2, 1), torch.randint(0, 10, (2,8,8))),
    'nonlinear classes': (lambda: NonLinearTransformer(10, 16, 8, 2, 2, 1, n_labels=3), torch.randint(0, 10, (2,8,8)))}

@pytest.mark.parametrize('name', cases)
def test_step(name, device):
    "Forward and backward of a second training step, when tables are made, do not wait"
    torch.manual_seed(0)
    make,x = cases[name]
    m,x = make().to(device).train(),x.to(device)
    def step():
        y = m(x)
        (y[0] if isinstance(y, tuple) else y).square().mean().backward()
    step()
    with no_waits(device): step()

@pytest.mark.parametrize('name', batch_augs)
def test_augmentation(name, device):
    "The CPU's batches up to rounding, whatever the device"
    torch.manual_seed(0)
    cached = CachedImages(torch.randint(0, 256, (20,32,32,3), dtype=torch.uint8), torch.randint(20, 90, (20,2)), torch.arange(20), name, 32)
    def batch(device):
        x,y = cached.batch(list(range(12)), device, torch.Generator().manual_seed(1))
        assert x.device.type==device.type and x.shape==(12,3,32,32) and x.dtype==torch.uint8 and y.tolist()==list(range(12))
        return x.cpu().int()
    assert (batch(device)-batch(torch.device('cpu'))).abs().max()<=1

@pytest.mark.parametrize('dtype', [torch.bfloat16,torch.float16])
@pytest.mark.parametrize('name', cases)
def test_autocast_step(name, dtype, device):
    "A training step in mixed precision: finite, and parameters' gradients in fp32 on their device"
    torch.manual_seed(0)
    make,x = cases[name]
    m,x = make().to(device).train(),x.to(device)
    with torch.autocast(device.type, dtype): y = m(x)
    (y[0] if isinstance(y, tuple) else y).float().square().mean().backward()
    grads = [p.grad for p in m.parameters() if p.grad is not None]
    assert grads
    for g in grads: assert g.dtype==torch.float32 and g.device.type==device.type and g.isfinite().all()

@pytest.mark.parametrize('name', [o for o in cases if not o.startswith('nonlinear')])
def test_same_seed(name, device):
    "The same seed gives the same gradients, bit for bit"
    make,x = cases[name]
    def step():
        torch.manual_seed(0)
        m = make().to(device).train()
        y = m(x.to(device))
        (y[0] if isinstance(y, tuple) else y).square().mean().backward()
        return [p.grad for p in m.parameters() if p.grad is not None]
    for a,b in zip(step(), step(), strict=True): assert torch.equal(a, b)

def out_of(y): return y[0] if isinstance(y, tuple) else y
def seeded(m, x): # some draw, in evaluation too
    torch.manual_seed(1)
    return out_of(m(x))
def grads_of(m): return [p.grad for p in m.parameters() if p.grad is not None]

@pytest.mark.skipif(len(devices)==1, reason='there is no other device than the CPU')
@pytest.mark.parametrize('name', [o for o in cases if o!='dropconnect gaussian']) # each device draws its own
def test_equals_cpu(name, device):
    "Outputs and gradients are those of the CPU, up to rounding"
    torch.manual_seed(0)
    make,x = cases[name]
    m,got = make().eval(),[]
    state = {k: v.clone() for k,v in m.state_dict().items()}
    for d in (torch.device('cpu'),device):
        m.load_state_dict(state)
        m.to(d).zero_grad()
        y = out_of(m(x.to(d)))
        y.square().mean().backward()
        got.append([o.detach().cpu() for o in (y,*grads_of(m))])
    for a,b in zip(*got, strict=True): torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3*float(a.abs().max())+1e-6)

@pytest.mark.parametrize('name', [o for o in cases if cases[o][1].dim()==4 and cases[o][1].is_floating_point() and not o.startswith(('positional','local'))])
def test_channels_last(name, device):
    "The memory layout changes no result"
    torch.manual_seed(0)
    make,x = cases[name]
    m,x,got = make().to(device).eval(),x.to(device),[]
    for layout in (torch.contiguous_format,torch.channels_last):
        m.zero_grad()
        y = out_of(m.to(memory_format=layout)(x.contiguous(memory_format=layout)))
        y.square().mean().backward()
        got.append([y.detach(),*[o.clone() for o in grads_of(m)]])
    for a,b in zip(*got, strict=True): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3*float(a.abs().max())+1e-6)

@pytest.mark.parametrize('name', ['ssa','ssa sym','projection','dropconnect','positional window','local 2-D'])
def test_compiled(name, device):
    "By inductor on a GPU, and without its code on a CPU, where other tests have it: the outputs and gradients of eager mode"
    torch.manual_seed(0)
    make,x = cases[name]
    m,x,got = make().to(device),x.to(device),[]
    m.train('dropconnect' not in name)
    state = {k: v.clone() for k,v in m.state_dict().items()}
    torch.compiler.reset()
    for f in (m.forward,torch.compile(m, backend='aot_eager' if device.type=='cpu' else 'inductor')):
        m.load_state_dict(state)
        m.zero_grad()
        y = seeded(f, x)
        y.square().mean().backward()
        got.append([y.detach(),*[o.clone() for o in grads_of(m)]])
    for a,b in zip(*got, strict=True): torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3*float(a.abs().max())+1e-6)

@pytest.mark.parametrize('name', cases)
def test_from_meta(name, device):
    "Built without memory, given some, filled and loaded: what it would have been"
    torch.manual_seed(0)
    make,x = cases[name]
    m = make().to(device).eval()
    with torch.device('meta'): copy = make()
    assert all(o.is_meta for o in copy.state_dict().values())
    copy = copy.to_empty(device=device).eval()
    for o in copy.modules():
        own = [*o.parameters(recurse=False),*o.buffers(recurse=False)]
        if hasattr(o, 'reset_parameters'): o.reset_parameters()
        else: assert not own or not type(o).__module__.startswith('fastattn'), type(o)
    copy.load_state_dict(m.state_dict())
    with torch.no_grad(): torch.testing.assert_close(seeded(copy, x.to(device)), seeded(m, x.to(device)))

@pytest.mark.parametrize('name', cases)
def test_two_devices(name, device):
    "Input and parameters on different devices are an error that names devices"
    make,x = cases[name]
    other = next((o for o in devices if o!=device.type), 'meta')
    if other=='meta' and not x.is_floating_point(): pytest.skip('PyTorch looks up indices without values')
    with pytest.raises((RuntimeError,ValueError,NotImplementedError), match='(?i)device|meta|cpu'): out_of(make().to(device)(x.to(other))).sum().item()

class Points(list):
    def new_empty(self): return Points() # for `learn.export`

def points(device):
    generator = torch.Generator().manual_seed(0)
    items = Points((torch.randn(1, 8, 8, generator=generator),i%3) for i in range(24))
    return DataLoaders.from_dsets(items, Points(items[:8]), bs=8, num_workers=0, device=device)

classes = dict(n_out=3, loss_func=CrossEntropyLossFlat())
learner_functions = dict(
    ssa=lambda device, **kwargs: ssa_learner(points(device), widen=1/16, **classes, **kwargs),
    projection=lambda device, **kwargs: projection_learner(points(device), 4, **classes, **kwargs),
    dropconnect=lambda device, **kwargs: dropconnect_learner(points(device), (8,), **classes, **kwargs),
    positional=lambda device, **kwargs: positional_learner(points(device), dim=8, depth=1, heads=2, **classes, **kwargs),
    nonlinear=lambda device, **kwargs: nonlinear_learner(get_tokens('digits', 4, 512, levels=3).to(device), embed_size=8, depth=1, heads=2, window_size=1, **kwargs))

def fit(learn, n=1, seed=3, **kwargs):
    set_seed(seed, reproducible=True)
    for o in learn.dls.loaders: o.rng.seed(seed)
    with learn.no_bar(),learn.no_logging(): learn.fit(n, 1e-2, **kwargs)
    return learn

def weights_of(learn): return [o.detach().clone() for o in learn.model.state_dict().values()]

def build(name, device, **kwargs):
    set_seed(0, reproducible=True)
    return learner_functions[name](device, **kwargs)

@pytest.mark.parametrize('name', learner_functions)
def test_learner(name, device, tmp_path):
    "Trains on its device, bit for bit the same twice; is exported, and read on the CPU"
    learn = fit(build(name, device))
    assert {o.device.type for o in learn.model.parameters()}=={device.type} and all(o.isfinite().all() for o in weights_of(learn))
    again = fit(build(name, device))
    for a,b in zip(weights_of(learn), weights_of(again), strict=True): assert torch.equal(a, b)
    x = learn.dls.valid.one_batch()[0]
    learn.export(tmp_path/'a.pkl')
    read = load_learner(tmp_path/'a.pkl', cpu=True).model.eval()
    assert {o.device.type for o in read.parameters()}=={'cpu'}
    if name!='nonlinear':
        with torch.no_grad(): torch.testing.assert_close(out_of(read(x.cpu())), out_of(learn.model.eval()(x)).cpu(), rtol=1e-2, atol=1e-3)

class Stop(Callback):
    def before_epoch(self):
        if self.epoch==1: raise KeyboardInterrupt

@pytest.mark.parametrize('name,cbs', [('ssa',[]),('dropconnect',[]),('nonlinear',[]),('projection',[lambda: Autocast('fp16')]),('ssa',[lambda: Autocast('bf16'),ChannelsLast])])
def test_resume(name, cbs, device, tmp_path):
    "Interrupted after an epoch, and gone on with in another random state: the same weights"
    def learner(): return build(name, device, cbs=[o() for o in cbs])
    whole = fit(learner(), 2, cbs=Checkpoint(tmp_path/'a'))
    with pytest.raises(KeyboardInterrupt): fit(learner(), 2, cbs=[Checkpoint(tmp_path/'b'),Stop()])
    parts = fit(learner(), 2, seed=77, cbs=Checkpoint(tmp_path/'b'))
    for a,b in zip(weights_of(whole), weights_of(parts), strict=True): assert torch.equal(a, b)

@pytest.mark.parametrize('name', learner_functions)
@pytest.mark.parametrize('mode', ['bf16','fp16'])
def test_mixed_precision(name, mode, device):
    "Trains in mixed precision; parameters stay in fp32, and change"
    learn = build(name, device, cbs=Autocast(mode))
    before = [o.detach().clone() for o in learn.model.parameters()]
    fit(learn)
    after = list(learn.model.parameters())
    assert all(o.dtype==torch.float32 and o.isfinite().all() for o in after)
    assert any(not torch.equal(a, b) for a,b in zip(before, after))

def test_gradscaler_skips(device):
    "A gradient that overflows in fp16 changes no weight, and lowers the scale"
    learn = build('dropconnect', device, cbs=Autocast('fp16'))
    before,scales = weights_of(learn),[]
    class Overflow(Callback):
        def before_backward(self): self.learn.loss_grad = self.loss_grad*1e38
        def after_batch(self):
            if self.training: scales.append(self.learn.scaler.get_scale())
    fit(learn, cbs=Overflow())
    for a,b in zip(before, weights_of(learn), strict=True): assert torch.equal(a, b)
    assert len(scales)==3 and scales[0]>scales[1]>scales[2]

batch_events = {'before_batch','after_pred','after_loss','before_backward','after_backward','before_step','after_step','after_batch'}
callbacks = {
    'gains': ('ssa', lambda path: [GainRecorder(),GainRate(10.)]),
    'bf16': ('ssa', lambda path: [Autocast('bf16')]),
    'progressive': ('ssa', lambda path: [ProgressiveResize(0.5)]),
    'schedule': ('dropconnect', lambda path: [DropConnectSchedule(SchedCos(0., 0.5))]),
    'checkpoint': ('dropconnect', lambda path: [Checkpoint(path/'state')]),
    'spans': ('positional', lambda path: [SpanPenalty(0.1)]),
    'spans by name': ('positional', lambda path: [SpanPenalty({'blocks.0.attn': 0.1})]),
    'masks': ('nonlinear', lambda path: [])}

@pytest.mark.parametrize('name', callbacks)
def test_callback(name, device, tmp_path, monkeypatch):
    "What our callbacks do in a step of training does not wait, but for `UpdateWindows`, which does once"
    learner,make = callbacks[name]
    learn,call,seen = build(learner, device),Callback.__call__,[]
    def watched(self, event):
        ours = type(self).__module__=='fastattn.callback' and event in batch_events and self.learn.training and self.learn.train_iter>0
        if not ours: return call(self, event)
        seen.append(type(self).__name__)
        if not isinstance(self, UpdateWindows):
            with no_waits(device): return call(self, event)
        with Counts() as counts: call(self, event)
        assert counts.n==(event=='before_batch')
    monkeypatch.setattr(Callback, '__call__', watched)
    cbs = make(tmp_path)
    fit(learn, cbs=cbs)
    assert {type(o).__name__ for o in cbs}<=set(seen)
