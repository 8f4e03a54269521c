"On every device there is: a training step without hidden waits, and augmentation by the same numbers"
import pytest,torch
from contextlib import contextmanager
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from fastattn.layers.all import *
from fastattn.models.all import *
from fastattn.recipes.cache import batch_augs,CachedImages

pytestmark = pytest.mark.device
devices = ['cpu',*['cuda']*torch.cuda.is_available(),*['mps']*torch.backends.mps.is_available()]

@pytest.fixture(params=devices)
def device(request): return torch.device(request.param)

class Waits(TorchFunctionMode):
    "Raise for what would make the CPU wait for another device, though here all is on the CPU"
    names = {'item','tolist','numpy','cpu','nonzero','__bool__','__int__','__float__','__index__'}
    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, '__name__', '')
        if name in self.names and isinstance(args[0], torch.Tensor): raise RuntimeError(f'{name} waits for the device')
        moves = [str(o) for o in (*args[1:],*(kwargs or {}).values()) if isinstance(o, (str,torch.device))]
        if name=='to' and 'cpu' in moves: raise RuntimeError('to(cpu) waits for the device')
        if name in ('tensor','as_tensor') and not isinstance(args[0], torch.Tensor) and 'device' in (kwargs or {}):
            raise RuntimeError(f'{name} of numbers waits for the device')
        return func(*args, **(kwargs or {}))

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
