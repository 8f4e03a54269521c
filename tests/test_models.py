"Attention in every xresnet, beside fastai's own"
import copy
import numpy as np,pytest,torch
from fastai.layers import SimpleSelfAttention as FastaiSSA
from fastai.vision.models import xresnet as fx
from torch import nn
from fastattn.layers.simple import SimpleSelfAttention,fastai_state_dict
from fastattn.models import xresnet as ours
from fastattn.models.insert import GainedBranch,attn_layers,attns,insert_attn,stages_of
from fastattn.models.projection import ProjectionClassifier
from fastattn.models.xresnet import archs,attn_xresnet,xresnet50_ssa

def n_params(m): return sum(p.numel() for p in m.parameters())
def places(m, cls=SimpleSelfAttention): return [n for n,o in m.named_modules() if isinstance(o, cls)]
def wake(m, gamma=1e-3):
    "Random batch norm gains and small gammas, so that every branch matters"
    torch.manual_seed(0)
    for n,p in m.named_parameters():
        if n.endswith('gamma'): nn.init.constant_(p, gamma)
        elif p.dim()==1: nn.init.uniform_(p, 0.1, 0.5)
    return m

named = [o for o in ours.__all__ if o.endswith(('_ssa','_ssa_sym'))]

def test_names():
    plain = [f'xresnet{n}' for n in (18,34,50,101,152)]+[f'xresnet{n}_{d}' for d in ('deep','deeper') for n in (18,34,50)]
    assert set(named)=={f'{o}_{s}' for o in plain for s in ('ssa','ssa_sym')}
    assert set(archs)=={o for o in fx.__all__ if o.startswith('x')}-{'xsenet154'}
    with pytest.raises(TypeError): fx.xsenet154() # broken in fastai; when this passes, take it in

@pytest.mark.parametrize('name', named)
def test_named(name):
    "Each builds with attention at the end of stage 1, and runs with one channel, an odd size and one example"
    big = any(o in name for o in ('101','152'))
    m = getattr(ours, name)(n_out=3, c_in=1, widen=0.25)
    at, = places(m)
    assert at.startswith('4.') and 'convpath' in at
    assert m.get_submodule(at).sym==name.endswith('sym')
    if big: return
    m.eval()
    y = m(torch.randn(1, 1, 33, 47))
    assert y.shape==(1,3)
    y.sum().backward()

@pytest.mark.parametrize('name', archs)
def test_every_arch(name):
    "Insertion adds one layer's parameters, C*C + 1, and nothing else"
    with torch.device('meta'): base = archs[name](n_out=2)
    c = [m.out_channels for m in stages_of(base)[1][-1].convpath.modules() if hasattr(m, 'out_channels')][-1]
    n = n_params(base)
    assert n_params(insert_attn(base, stages=2))==n+c*c+1

@pytest.mark.parametrize('name', ['xresnet18','xresnet34','xresnet50','xresnet101','xresnet152','xse_resnext18','xresnext50'])
def test_is_fastais(name):
    "stages=1, blocks='last' is fastai's sa=True: parameters, and outputs and gradients from the same state"
    theirs,mine = wake(archs[name](n_out=5, sa=True)),attn_xresnet(name, n_out=5)
    assert n_params(theirs)==n_params(mine)
    assert places(theirs, FastaiSSA)==places(mine)
    mine.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    ys = [m.eval()(x) for m in (theirs,mine)]
    torch.testing.assert_close(*ys, rtol=1e-3, atol=1e-4)
    back = archs[name](n_out=5, sa=True)
    back.load_state_dict(fastai_state_dict(mine))
    torch.testing.assert_close(back.eval()(x), ys[0], rtol=1e-3, atol=1e-4)

def test_fastais_flag_moves_ours_does_not():
    "In the deep and deeper variants sa=True means stages 3 and 5; here stage 1 is the first everywhere"
    for name,stage in [('xresnet18_deep',3), ('xresnet18_deeper',5)]:
        assert places(archs[name](sa=True), FastaiSSA)[0].split('.')[0]==str(3+stage)
        assert places(attn_xresnet(name))[0].split('.')[0]=='4'
        assert places(attn_xresnet(name, stages=stage))==places(archs[name](sa=True), FastaiSSA)

@pytest.mark.parametrize('stages,blocks,want', [(1,'last',['4.2']), (2,'first',['5.0']), ([4,1],'all',['4.0','4.1','4.2','7.0','7.1','7.2']),
    (3,[0,-1],['6.0','6.5']), (3,[5,-1],['6.5']), ((1,1),'last',['4.2']), ({2},-2,['5.2'])])
def test_places(stages, blocks, want):
    m = insert_attn(fx.xresnet50(), stages=stages, blocks=blocks)
    assert sorted('.'.join(o.split('.')[:2]) for o in places(m))==want

@pytest.mark.parametrize('name', [o for o in attns if o!='none'])
def test_every_attention(name):
    "Builds, runs forward and backward inside a network, and copies (but for fastai's SelfAttention, which cannot after a step)"
    m = insert_attn(fx.xresnet18(n_out=2), name, stages=2)
    m.eval()(torch.randn(2, 3, 64, 64)).sum().backward()
    assert n_params(m)>n_params(fx.xresnet18(n_out=2))
    if name!='sa': copy.deepcopy(m)

@pytest.mark.parametrize('attn', ['ssa','ssa_sym','sa'])
def test_identity(attn):
    "What starts with gamma 0 changes nothing, at all stages and blocks, in training too"
    torch.manual_seed(0)
    m = wake(fx.xresnet18(n_out=4))
    x = torch.randn(2, 3, 64, 64)
    with_attn = insert_attn(copy.deepcopy(m), attn, stages=range(1,5), blocks='all')
    assert torch.equal(m(x), with_attn(x))
    assert torch.equal(m.eval()(x), with_attn.eval()(x))

def test_device_dtype_mode():
    m = fx.xresnet18().double().eval()
    layer = insert_attn(m).get_submodule(places(m)[0])
    assert layer.weight.dtype==torch.double and not layer.training
    with torch.device('meta'): m = fx.xresnet18()
    assert m.get_submodule(places(insert_attn(m))[0]).weight.device.type=='meta'

@pytest.mark.parametrize('ndim', [1,2,3])
def test_ndim(ndim):
    m = wake(attn_xresnet('xresnet18', ndim=ndim, c_in=2, n_out=3, widen=0.25, stages=[1,2]))
    assert m.eval()(torch.randn(2, 2, *[32]*ndim)).shape==(2,3)

def test_same_weights_as_baseline():
    torch.manual_seed(1)
    base = attn_xresnet('xresnet18', 'none').state_dict()
    torch.manual_seed(1)
    ssa = attn_xresnet('xresnet18', 'ssa_sym', stages=[1,3], blocks='all').state_dict()
    assert all(torch.equal(ssa[k], v) for k,v in base.items())

def test_body_of_a_vision_learner():
    from fastai.vision.learner import create_body
    body = create_body(fx.xresnet18(), pretrained=False, cut=-4)
    assert places(insert_attn(nn.Sequential(body, nn.Identity())))==['0.4.1.convpath.2']

@pytest.mark.slow # tests/test_timm.py exports a smaller model
def test_onnx_and_export(tmp_path):
    ort = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    m = wake(attn_xresnet('xresnet18', n_out=4, widen=0.5, stages=[1,4])).eval()
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(torch.export.export(m, (x,)).module()(x), m(x))
    torch.onnx.export(m, (x,), tmp_path/'m.onnx', dynamo=True, verbose=False)
    session = ort.InferenceSession(tmp_path/'m.onnx')
    np.testing.assert_allclose(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0], m(x).detach().numpy(), rtol=1e-3, atol=1e-4)

@pytest.mark.slow # likewise
def test_compile():
    m,x = wake(attn_xresnet('xresnet18', n_out=4, widen=0.5)),torch.randn(2, 3, 64, 64)
    compiled = copy.deepcopy(m)
    compiled.compile(fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(x), m(x), rtol=1e-4, atol=1e-4)
    assert compiled.state_dict().keys()==m.state_dict().keys()

@pytest.mark.parametrize('kwargs,message', [
    (dict(attn='ssa_sim'), "Did you mean 'ssa_sym'"), (dict(attn='bottleneck'), 'Known: none, ssa'), (dict(stages=5), 'from 1 to 4'), 
    (dict(stages=True), 'whole numbers'), (dict(stages='1'), 'whole numbers'), (dict(blocks='middle'), 'Known: last, first, all'), (dict(blocks=9), 'indices from -2 to 1'),
    (dict(stages=[1,7]), 'got 7')])
def test_bad(kwargs, message):
    "An error names what is wrong, and the model is as it was"
    m = fx.xresnet18()
    with pytest.raises(ValueError, match=message): insert_attn(m, **kwargs)
    assert not places(m)

def test_bad_callables():
    with pytest.raises(TypeError, match='callable'): insert_attn(fx.xresnet18(), 3)
    with pytest.raises(TypeError, match='nn.Module'): insert_attn(fx.xresnet18(), lambda c: c)
    m = insert_attn(fx.xresnet18())
    with pytest.raises(ValueError, match='already'): insert_attn(m, stages=[2,1])
    assert len(places(m))==1
    insert_attn(insert_attn(m, 'positional'), 'local') # other layers, in wrappers of one type
    with pytest.raises(ValueError, match='a Local2DAttention behind'): insert_attn(m, 'local')
    one, = attn_layers(insert_attn(fx.xresnet18(), stages=[1,'4.1.convpath']))
    assert GainedBranch(nn.Identity())(torch.ones(1, 2, 3)).sum()==6

def test_bad_xresnet():
    for kwargs in (dict(arch='xresnet18'), dict(arch='xresnet50', c_in=1)):
        with pytest.raises(ValueError, match='weights of xresnet50 for images of 3 channels only'): attn_xresnet(pretrained=True, **kwargs)
    with pytest.raises(ValueError, match="Did you mean 'xresnet50'"): attn_xresnet('xresent50')
    for o in ('sa','sym','nout'):
        with pytest.raises(ValueError, match='xresnet option'): attn_xresnet('xresnet18', **{o: 1})

def test_pretrained(monkeypatch):
    "A new last layer for another number of outputs, all else as loaded; a network that fails is said"
    theirs = fx.xresnet50()
    monkeypatch.setattr(fx, 'load_state_dict_from_url', lambda *args, **kwargs: dict(model=theirs.state_dict()))
    for n_out in (1000,5):
        m = xresnet50_ssa(pretrained=True, n_out=n_out)
        assert m[-1].out_features==n_out and m.built=={'architecture': 'xresnet50', 'n_out': n_out}
        assert torch.equal(m[0][0].weight, theirs[0][0].weight) and torch.equal(m[-1].weight, theirs[-1].weight)==(n_out==1000)
    def fails(*args, **kwargs): raise OSError('no network')
    monkeypatch.setattr(fx, 'load_state_dict_from_url', fails)
    with pytest.raises(ValueError, match='could not be loaded .OSError: no network'): xresnet50_ssa(pretrained=True)

def test_projection_classifier():
    for size,c_in,lead in (((28,28),1,(1,)), ((28,28),1,()), ((9,4),6,(2,3)), ((1,1),1,())):
        m = ProjectionClassifier(size, 3, size_projection=4, c_in=c_in)
        for b in (0,1,5): assert m(torch.randn(b, *lead, *size)).shape==(b,3)
        m(torch.randn(2, *lead, *size)).sum().backward()
        assert all(p.grad is not None for p in m.parameters())
    for bad in (dict(n_out=0), dict(c_in=0), dict(p=1.), dict(size_projection=1), dict(size_input=(0,3))):
        with pytest.raises(ValueError, match=next(iter(bad))): ProjectionClassifier(**{**dict(size_input=(4,4), n_out=2), **bad})
    for shape in ((2,3,4,4), (4,4), (2,1,4,5)):
        with pytest.raises(ValueError, match='got shape'): ProjectionClassifier((4,4), 2)(torch.zeros(shape))

def _built():
    from fastattn.layers.dropconnect import DropConnect,DropConnectConv2d,DropConnectLSTM
    from fastattn.layers.position import GaussianSpan
    from fastattn.models.nonlinear import NonLinearTransformer
    from fastattn.models.positional import PositionalTransformer
    return dict(ssa=lambda: SimpleSelfAttention(8), ssa_sym=lambda: SimpleSelfAttention(8, ks=3, sym=True), projection=lambda: ProjectionClassifier((6,5), 3, 4),
        dropconnect=lambda: nn.Sequential(DropConnect(4, 3), DropConnectConv2d(2, 2, 1), DropConnectLSTM(3, 4)), leaning=lambda: GaussianSpan(2, full=True, heads=2),
        siren=lambda: PositionalTransformer(1, 2, dim=8, depth=2, heads=2, ff=8), sinusoid=lambda: PositionalTransformer(1, 2, dim=8, depth=1, heads=2, ff=8, encoding='sinusoid'),
        nonlinear=lambda: NonLinearTransformer(5, 8, 3, 2, 1, n_labels=2))

@pytest.mark.parametrize('name', list(_built()))
def test_start_from_meta(name):
    "Made without memory, then given some: `reset_parameters` of the parts fills all there is"
    with torch.device('meta'): m = _built()[name]()
    m.to_empty(device='cpu')
    with torch.no_grad():
        for o in (*m.parameters(),*m.buffers()): o.fill_(float('nan'))
    for o in m.modules():
        if hasattr(o, 'reset_parameters'): o.reset_parameters()
    assert [k for k,v in m.state_dict().items() if not v.isfinite().all()]==[]
