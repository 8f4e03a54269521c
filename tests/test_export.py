"Attention exported by torch.export and to ONNX: static, for any batch, for any size; run at other sizes"
import pytest,timm,torch
from torch import nn
from torch.export import Dim
from fastai.vision.models.xresnet import xresnet18
from fastattn.layers.position import GaussianSpan
from fastattn.layers.positional import PositionalSelfAttention
from fastattn.layers.simple import SimpleSelfAttention
from fastattn.models.insert import attns,insert_attn

pytestmark = pytest.mark.filterwarnings('ignore')

def wake(m):
    "Gains that count, and spans that end inside the grid"
    for o in m.modules():
        if isinstance(o, GaussianSpan): o._set_radius([[0.4]*o.ndim for _ in o._numbers])
    for k,p in m.named_parameters():
        if k.split('.')[-1] in ('gamma','gain'): nn.init.constant_(p, 0.3)
    return m.eval()

batch,sides = Dim('b', min=1, max=64),[Dim(o, min=1, max=256) for o in 'hwd']
def dims(kind, ndim=2): return dict(static=None, batch=({0: batch},), size=({0: batch, **{2+i: sides[i] for i in range(ndim)}},))[kind]
others = dict(static=[(2,8,12,10)], batch=[(2,8,12,10),(5,8,12,10),(1,8,12,10)], size=[(2,8,12,10),(3,8,7,16),(1,8,1,1),(2,8,1,9)])

def run_onnx(file):
    ort = pytest.importorskip('onnxruntime')
    session = ort.InferenceSession(file)
    return lambda x: torch.tensor(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])

def exported(m, x, how, shapes, path):
    if how=='export': return torch.export.export(m, (x,), dynamic_shapes=shapes).module()
    pytest.importorskip('onnxscript')
    torch.onnx.export(m, (x,), path/'m.onnx', dynamo=True, dynamic_shapes=shapes, verbose=False)
    return run_onnx(path/'m.onnx')

def check(program, m, shapes):
    for shape in shapes:
        x = torch.randn(shape)
        with torch.no_grad(): torch.testing.assert_close(program(x), m(x), rtol=1e-3, atol=1e-4)

@pytest.mark.parametrize('attn', ['ssa','positional','local'])
@pytest.mark.parametrize('how,kind', [pytest.param(how, kind, marks=pytest.mark.slow if how=='onnx' and kind!='size' else []) for how in ('export','onnx') for kind in others])
def test_layers(attn, how, kind, tmp_path):
    torch.manual_seed(0)
    m = wake(attns[attn](8))
    check(exported(m, torch.randn(2, 8, 12, 10), how, dims(kind), tmp_path), m, others[kind])

@pytest.mark.parametrize('sym,ks,scale', [(False,1,False), (True,3,False), (False,1,True)])
def test_without_dynamo(sym, ks, scale, tmp_path):
    "By PyTorch's older way to ONNX, too"
    m = wake(SimpleSelfAttention(8, ks=ks, sym=sym, scale=scale))
    axes = {'x': {0: 'b', 2: 'h', 3: 'w'}}
    torch.onnx.export(m, (torch.randn(2, 8, 12, 10),), tmp_path/'m.onnx', dynamo=False, input_names=['x'], dynamic_axes=axes)
    check(run_onnx(tmp_path/'m.onnx'), m, others['size'])

class Last(nn.Module):
    "Channels last for the layer"
    def __init__(self, layer):
        super().__init__()
        self.layer = layer
    def forward(self, x): return self.layer(x.movedim(1, -1)).movedim(-1, 1)

@pytest.mark.parametrize('ndim,kwargs', [(1,dict(encoding='sinusoid')), (2,dict(span=GaussianSpan(2, heads=2))), (2,dict(span=(1,2), causal=True)), (2,dict(modulate='all')), (2,dict(encoding='rotary', span=2)), *[pytest.param(*o, marks=pytest.mark.slow) for o in (
    (2,dict(span=None, causal=True)), (2,dict(combine='multiply')), (2,dict(modulate='positional')), (2,dict(encoding=None, span=3)), (2,dict(span=GaussianSpan(2, 1., 0.))), (3,dict()))]])
def test_options_at_any_size(ndim, kwargs):
    "The program for any size is the layer"
    torch.manual_seed(0)
    m = wake(Last(PositionalSelfAttention(8, 2, ndim, **kwargs)))
    if isinstance(span := m.layer.span, GaussianSpan) and len(span.log_sigma)==2: span._set_radius([[0.1,0.6],[0.9,0.3]])
    size = (7,6,5)[:ndim]
    program = exported(m, torch.randn(2, 8, *size), 'export', dims('size', ndim), None)
    check(program, m, [(b,8,*s[:ndim]) for b,s in ((2,size), (1,(9,4,2)), (3,(1,5,3)), (2,(1,1,1)))])

@pytest.mark.parametrize('scale', [False,True])
def test_simple_at_any_size(scale):
    m = wake(SimpleSelfAttention(8, scale=scale))
    check(exported(m, torch.randn(2, 8, 12, 10), 'export', dims('size'), None), m, [*others['size'],(1,8,40,40)])

@pytest.mark.parametrize('attn,build', [('ssa',lambda: xresnet18(n_out=4, widen=0.25)), pytest.param('positional', lambda: xresnet18(n_out=4, widen=0.25), marks=pytest.mark.slow), ('ssa',lambda: timm.create_model('test_resnet', num_classes=4))])
def test_models(attn, build):
    "Images of other sides than those that were shown, small and large"
    torch.manual_seed(0)
    m = build()
    for p in m.parameters():
        if not p.any(): nn.init.constant_(p, 0.1)
    m = wake(insert_attn(m, attn, stages=[1,3]))
    h,w = 32*Dim('h', min=2, max=8),32*Dim('w', min=2, max=8)
    program = exported(m, torch.randn(2, 3, 96, 64), 'export', ({0: batch, 2: h, 3: w},), None)
    check(program, m, [(2,3,96,64),(1,3,64,64),(3,3,160,96)])
