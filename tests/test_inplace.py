"What our layers return may be changed in place, as the residual branches of ResNets do, whatever the layout, the class of tensor, the mode"
import copy
import pytest,torch
from fastai.torch_core import TensorBase,TensorImage,TensorImageBW
from torch import nn
from fastattn.layers.dropconnect import DropConnect
from fastattn.layers.local2d import Local2DAttention
from fastattn.layers.positional import PositionalSelfAttention
from fastattn.layers.projection import SelfProjection
from fastattn.layers.simple import SimpleSelfAttention

def simple(c, **kwargs):
    l = SimpleSelfAttention(c, **kwargs)
    l.gamma.data.fill_(0.1)
    return l

class First(SelfProjection):
    "The projections only"
    def forward(self, x): return super().forward(x)[0]

makes = { # layer and shape of the input: the three orders of simple attention, and the hand-written one
    'ssa': (lambda: simple(8), (2,8,6,6)), 'ssa hand-written': (lambda: simple(32), (2,32,24,24)), 'ssa position': (lambda: simple(16), (2,16,2,2)),
    'ssa conv': (lambda: simple(8, ks=3), (2,8,6,6)), 'ssa sym': (lambda: simple(32, sym=True), (2,32,24,24)),
    'projection': (lambda: First((6,6), 6), (2,3,6,6)),
    'dropconnect': (lambda: DropConnect(6, 6), (2,3,5,6)), 'dropconnect blocks': (lambda: DropConnect(64, 64), (2,3,40,64)), 'dropconnect gaussian': (lambda: DropConnect(6, 6, inference='gaussian'), (2,3,5,6)),
    'local': (lambda: Local2DAttention(16, 1, 2), (2,6,5,16)),
    'positional': (lambda: PositionalSelfAttention(16, 2, 2), (2,6,5,16)), 'positional span': (lambda: PositionalSelfAttention(16, 2, 2, span=1), (2,9,9,16))}
behind = {'+=': lambda y, x: y.add_(x.flatten()[0]), 'relu': lambda y, x: nn.functional.relu(y, inplace=True)}
modes = ('train','eval','no grad')

def outcome(layer, shape, cls, layout, mode, act, compiled):
    "Output and gradients, with something in place behind a layer that stands behind another, as in a network"
    torch.manual_seed(0)
    x = torch.randn(shape).to(memory_format=layout)
    w = torch.ones((), requires_grad=True)
    net = copy.deepcopy(layer).train(mode=='train')
    def f(x): return behind[act](net(x*w), x)
    if compiled: f = torch.compile(f, backend='aot_eager')
    torch.manual_seed(1)
    with torch.set_grad_enabled(mode!='no grad'): y = f(x.as_subclass(cls))
    if mode=='no grad': return [y]
    y.as_subclass(torch.Tensor).square().sum().backward()
    return [y,w.grad,*(p.grad for p in net.parameters())]

layouts = (torch.contiguous_format,torch.channels_last)
classes = (torch.Tensor,TensorBase,TensorImage,TensorImageBW)

@pytest.mark.parametrize('mode', modes)
@pytest.mark.parametrize('act', list(behind))
@pytest.mark.parametrize('name', list(makes))
def test_inplace(name, act, mode):
    make,shape = makes[name]
    torch.manual_seed(0)
    layer = make()
    want = outcome(layer, shape, torch.Tensor, layouts[0], mode, act, False)
    for cls in classes:
        for layout in layouts:
            for a,b in zip(outcome(layer, shape, cls, layout, mode, act, False), want):
                torch.testing.assert_close(None if a is None else a.as_subclass(torch.Tensor), b, rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize('mode', ['train', *[pytest.param(o, marks=pytest.mark.slow) for o in ('eval','no grad')]])
@pytest.mark.parametrize('name', list(makes))
def test_inplace_compiled(name, mode):
    "Plain tensors only: PyTorch cannot compile an `nn.Linear` or `nn.Conv2d` for fastai's classes"
    make,shape = makes[name]
    torch.manual_seed(0)
    layer = make()
    for act,layout in zip(behind, layouts):
        torch._dynamo.reset()
        got,want = (outcome(layer, shape, torch.Tensor, layout, mode, act, o) for o in (True,False))
        if 'dropconnect' in name and (mode=='train' or 'gaussian' in name): continue # compiled code draws other numbers
        for a,b in zip(got, want): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

def test_result_is_plain():
    for name,(make,shape) in makes.items():
        if 'local' not in name and 'positional' not in name: assert type(make()(TensorImage(torch.randn(shape)))) is torch.Tensor

@pytest.mark.parametrize('sym', [False,True])
@pytest.mark.parametrize('package', ['timm','torchvision'])
def test_resnets_with_channels_last(package, sym):
    "Their residual branches end in `x += shortcut`"
    from fastattn.models.insert import insert_attn
    if package=='timm': from timm import create_model as build
    else: from torchvision.models import get_model as build
    net = insert_attn(build('resnet18', num_classes=3), 'ssa_sym' if sym else 'ssa', stages=[1,2,3,4]).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    for cls in (torch.Tensor,TensorImage):
        y = net(x.as_subclass(cls))
        y.sum().backward()
        assert y.shape==(2,3)
