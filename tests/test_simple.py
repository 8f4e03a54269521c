"Simple self-attention against a float64 oracle, against fastai's layer, and in everything that is done to layers"
import copy,io,pickle
import numpy as np,pytest,torch
import torch.nn.functional as F
from fastai.layers import SimpleSelfAttention as FastaiSSA
from hypothesis import given,settings,strategies as st
from fastattn.layers.simple import *

few = settings(deadline=None, derandomize=True, max_examples=40)
sizes = st.integers(1, 6)

def oracle(x, weight, gain, scale=False):
    "The formula by loops over examples and positions; `x` (B, C, N), `weight` (C, C, ks)"
    ks,n = weight.shape[-1],x.shape[-1]
    res = []
    for o in x:
        padded = F.pad(o, (ks//2,ks//2))
        wx = torch.stack([sum(weight[...,k]@padded[:,i+k] for k in range(ks)) for i in range(n)], 1)
        res.append(o + gain * (o@o.T)@wx / (n if scale else 1))
    return torch.stack(res) if len(res) else x + 0*gain

def layer(c, gamma=0.1, **kwargs):
    l = SimpleSelfAttention(c, **kwargs)
    l.gamma.data.fill_(gamma)
    return l

def step(l, x, lr=1e-3):
    l.train()(x).square().mean().backward()
    with torch.no_grad():
        for p in l.parameters(): p -= lr*p.grad
    l.zero_grad()

@few
@given(b=st.integers(0, 3), c=sizes, grid=st.lists(sizes, min_size=1, max_size=3), ks=st.sampled_from([1,1,3,5]), scale=st.booleans(),
    layout=st.sampled_from(['contiguous','channels last','sliced']))
def test_oracle(b, c, grid, ks, scale, layout):
    torch.manual_seed(b+10*c+100*ks)
    x = torch.randn(b, c, *grid, dtype=torch.double)
    if layout=='channels last': x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout=='sliced': x = torch.randn(b, c, *grid, 2, dtype=torch.double)[...,0]
    x = x.flatten(2).requires_grad_()
    w,gain = torch.randn(c, c, ks, dtype=torch.double, requires_grad=True),torch.tensor([0.3], dtype=torch.double, requires_grad=True)
    ys = simple_attention(x, w, gain, scale),oracle(x, w, gain, scale)
    g = torch.randn_like(ys[0])
    torch.testing.assert_close(*ys)
    for a,b in zip(*(torch.autograd.grad(y, (x,w,gain), g, allow_unused=True, materialize_grads=True) for y in ys)): torch.testing.assert_close(a, b)

@pytest.mark.parametrize('c,n', [(4,40), (4,4), (14,12), (40,2)])
def test_every_order(c, n):
    "Shapes that take each order, in float64, with gradients of gradients"
    x,w = torch.randn(2, c, n, dtype=torch.double, requires_grad=True),torch.randn(c, c, 1, dtype=torch.double, requires_grad=True)
    gain = torch.tensor(0.1, dtype=torch.double, requires_grad=True)
    ys = simple_attention(x, w, gain),oracle(x, w, gain)
    torch.testing.assert_close(*ys)
    gs = [torch.autograd.grad(y.square().sum(), (x,gain), create_graph=True) for y in ys]
    hs = [torch.autograd.grad(sum(o.square().sum() for o in g), (x,gain)) for g in gs]
    for a,b in zip(*hs): torch.testing.assert_close(a, b)

def test_orders_are_taken():
    assert [cheapest_order(*o) for o in [(64,1024), (256,256), (256,225), (512,16)]]==['channel','channel','conv','position']
    assert 'channel' not in multiply_adds(8, 8, ks=3)

@pytest.mark.parametrize('c,n', [(64,256), (64,8)])
def test_multiply_adds(c, n):
    "What the hand-written order multiplies is what the table says; autograd's own may do one product of x xT more"
    from torch.utils.flop_counter import FlopCounterMode
    x,w,gain = torch.randn(2, c, n, requires_grad=True),torch.randn(c, c, 1, requires_grad=True),torch.tensor(0.1, requires_grad=True)
    with FlopCounterMode(display=False) as m: simple_attention(x, w, gain).sum().backward()
    assert m.get_total_flops()==2*2*multiply_adds(c, n)[cheapest_order(c, n)]

@few
@given(c=st.integers(2, 12), grid=st.lists(sizes, min_size=1, max_size=3), ks=st.sampled_from([1,3]))
def test_fastai(c, grid, ks):
    "Outputs, gradients and buffers as fastai's layer from the same state, in training and in evaluation"
    torch.manual_seed(c)
    theirs,ours = FastaiSSA(c, ks),SimpleSelfAttention(c, ks)
    theirs.gamma.data.fill_(0.1)
    ours.load_state_dict(theirs.state_dict())
    theirs,ours = theirs.double(),ours.double()
    for mode in (True,True,False):
        x = torch.randn(2, c, *grid, dtype=torch.double)
        xs = [x.clone().requires_grad_() for _ in range(2)]
        ys = [l.train(mode)(o) for l,o in zip((theirs,ours), xs)]
        torch.testing.assert_close(*ys, rtol=1e-5, atol=1e-6)
        for l,y in zip((theirs,ours), ys): l.zero_grad(); y.square().mean().backward()
        for a,b in [xs, (theirs.conv.weight_orig,ours.weight), (theirs.gamma,ours.gamma)]: torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(theirs.conv.weight_u, ours.u, rtol=1e-4, atol=1e-6)

def test_state_dicts():
    "From fastai, from ours, to fastai; strict, with no other keys"
    theirs,ours = FastaiSSA(8),layer(8)
    assert not any(ours.load_state_dict(theirs.state_dict()))
    assert not any(layer(8).load_state_dict(ours.state_dict()))
    assert set(ours.state_dict())=={'weight','gamma','u','v'}
    assert {k: v.shape for k,v in fastai_state_dict(ours).items()}=={k: v.shape for k,v in theirs.state_dict().items()}
    with pytest.raises(RuntimeError, match='size mismatch'): layer(4).load_state_dict(theirs.state_dict())

def test_fastai_sym_is_a_no_op_and_ours_is_not():
    x = torch.randn(2, 8, 5, 5)
    theirs = [FastaiSSA(8, sym=o) for o in (False,True)]
    ours = [SimpleSelfAttention(8, sym=o) for o in (False,True)]
    for ls in (theirs,ours):
        for l in ls: l.load_state_dict(theirs[0].state_dict()); l.gamma.data.fill_(0.1)
    assert torch.equal(theirs[0](x), theirs[1](x))
    w = theirs[1].conv.weight[...,0]
    assert (w-w.T).abs().max()>0.1
    assert (ours[0](x)-ours[1](x)).abs().max()>0.1

@pytest.mark.parametrize('ks', [1,3])
def test_sym(ks):
    "The convolution is its own adjoint: <Wx, y> = <x, Wy>, after any number of steps"
    torch.manual_seed(0)
    l = layer(6, 0.01, ks=ks, sym=True)
    start = l.weight.clone()
    for _ in range(20): step(l, torch.randn(4, 6, 5, 5))
    assert (l.weight-start).abs().max()>1e-6
    w = (l.kernel()/l.eval().sigma(l.kernel())).detach()
    assert (w-w.transpose(0,1).flip(2)).abs().max()<1e-6
    x,y = torch.randn(2, 1, 6, 9).unbind()
    conv = lambda o: F.conv1d(o, w, padding=ks//2)
    torch.testing.assert_close((conv(x)*y).sum(), (x*conv(y)).sum())

def test_spectral_norm():
    "1 after training steps, and nearly 1 at once; unchanged by evaluation"
    torch.manual_seed(0)
    l = layer(16)
    def norm(): return torch.linalg.matrix_norm((l.kernel()/l.sigma(l.kernel()))[...,0], 2).item()
    assert 1<=norm()+1e-6<1.1
    for _ in range(300): l.train()(torch.randn(1, 16, 2, 2))
    assert abs(norm()-1)<1e-4
    u = l.eval().u.clone()
    l(torch.randn(1, 16, 2, 2))
    assert torch.equal(u, l.u)

@pytest.mark.parametrize('size', [64,128,256,320])
def test_scale(size):
    "With `scale` the branch does not grow with the image, and fp16 does not overflow, forward or backward"
    torch.manual_seed(0)
    c,n = 64,size//4
    l = layer(c, 1., scale=True).eval()
    x = torch.randn(2, c, n, n)
    assert 0.2<(l(x)-x).std()<3
    xs = [(x*8).to(o).requires_grad_() for o in (torch.float32,torch.float16)]
    ys = l(xs[0]),copy.deepcopy(l).half()(xs[1])
    assert ys[1].isfinite().all()
    assert (ys[0]-ys[1]).norm()/ys[0].norm()<5e-3
    for y in ys: y.float().mean().backward()
    assert xs[1].grad.isfinite().all()

@pytest.mark.parametrize('c,n', [(1024,8), (8,64), (64,8)])
@pytest.mark.parametrize('dtype', [torch.bfloat16,torch.float16])
def test_autocast(c, n, dtype):
    torch.manual_seed(0)
    l = layer(c, 1e-3)
    x = torch.randn(2, c, n, n)
    def grads(autocast, x):
        m,x = copy.deepcopy(l),x.clone().requires_grad_()
        with torch.autocast('cpu', dtype, enabled=autocast): y = m(x)
        assert y.dtype==x.dtype
        y.square().mean().backward()
        return [y,x.grad,m.weight.grad,m.gamma.grad]
    for a,b in zip(grads(True, x), grads(False, x)): assert (a-b).norm()/b.norm()<0.03
    low = grads(True, x.to(dtype))
    assert all(o.isfinite().all() for o in low)

def test_identity_at_init():
    for dtype in (torch.float32,torch.bfloat16):
        x = torch.randn(2, 8, 5, 7, dtype=dtype)
        assert torch.equal(SimpleSelfAttention(8, dtype=dtype)(x), x)

@pytest.mark.parametrize('sym', [False,True])
@pytest.mark.parametrize('training', [True,False])
def test_copies(sym, training):
    "deepcopy and pickle after a training step compute the same and go on training the same"
    l,x = layer(8, sym=sym),torch.randn(2, 8, 5, 5)
    step(l, x)
    copies = [copy.deepcopy(l),pickle.loads(pickle.dumps(l))]
    y = l.train(training)(x)
    for o in copies: assert torch.equal(o.train(training)(x), y)

@pytest.mark.parametrize('n', [8,4,2])
def test_compile(n):
    l,x = layer(16, sym=True),torch.randn(2, 16, n, n)
    l(x)
    results = []
    for f in (o:=copy.deepcopy(l)),torch.compile(p:=copy.deepcopy(l), fullgraph=True, backend='aot_eager'):
        for _ in range(2): y = f(x)
        y.square().mean().backward()
        results.append(y)
    torch.testing.assert_close(*results)
    torch.testing.assert_close(o.u, p.u)
    torch.testing.assert_close(o.weight.grad, p.weight.grad)

@pytest.mark.parametrize('needs', [False,True])
@pytest.mark.parametrize('c,n', [(4,40), (14,12), (40,2)])
def test_compiled_gradients(c, n, needs):
    "Also where the input needs no gradient, for channels last too"
    torch._dynamo.reset()
    w,gain = torch.randn(c, c, 1, requires_grad=True),torch.tensor(0.1, requires_grad=True)
    f = torch.compile(simple_attention, fullgraph=True, backend='aot_eager')
    for x in (torch.randn(2, c, n),torch.randn(2, n, c).mT):
        x.requires_grad_(needs)
        a,b = (torch.autograd.grad(o(x, w, gain).square().mean(), [w,gain]+[x]*needs) for o in (simple_attention,f))
        for o,p in zip(a, b): torch.testing.assert_close(o, p, rtol=1e-4, atol=1e-5)

def test_one_graph_for_all_batches():
    "In training: one graph for the first batch size, one for all others"
    torch._dynamo.reset()
    counter,l = torch._dynamo.testing.CompileCounter(),layer(16)
    f = torch.compile(l, backend=counter, fullgraph=True)
    for b in range(2, 14): f(torch.randn(b, 16, 6, 6, requires_grad=True)).sum().backward()
    assert counter.frame_count<=2

@pytest.mark.parametrize('n', [8,2])
def test_export(n):
    l,x = layer(16, sym=True),torch.randn(2, 16, n, n)
    step(l, x)
    ep = torch.export.export(l.eval(), (x,), dynamic_shapes=({0: torch.export.Dim('batch')},))
    x = torch.randn(5, 16, n, n)
    torch.testing.assert_close(ep.module()(x), l(x))

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kwargs', [{}, dict(ks=3, scale=True), dict(sym=True)])
@pytest.mark.parametrize('n', [8,2])
def test_jit_trace(n, kwargs):
    "What was traced at one size is right at others"
    l = layer(16, **kwargs).eval()
    traced = torch.jit.trace(l, torch.randn(2, 16, n, n))
    for shape in ((3,16,n,n), (1,16,5,3), (4,16,2,9)):
        x = torch.randn(shape)
        torch.testing.assert_close(traced(x), l(x), rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('n', [8,2])
def test_onnx(n, tmp_path):
    ort = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    l,x = layer(16, sym=True),torch.randn(2, 16, n, n)
    step(l, x)
    torch.onnx.export(l.eval(), (x,), tmp_path/'l.onnx', dynamo=True, verbose=False)
    session = ort.InferenceSession(tmp_path/'l.onnx')
    out, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(out, l(x).detach().numpy(), rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('shape', [(2,8,6,6), (2,8,2,2)])
def test_channels_last(shape):
    l,x = layer(8),torch.randn(shape)
    y = copy.deepcopy(l)(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, l(x))

def test_two_forwards_then_buffers_overwritten():
    "What DistributedDataParallel does: buffers are written to between forward and backward"
    for training in (True,False):
        l,x = layer(8).train(training),torch.randn(2, 8, 4, 4)
        y = l(x)+l(x)
        for b in l.buffers(): b.copy_(b.clone())
        y.sum().backward()

def test_double_backward_through_layer():
    l,x = layer(4).double().eval(),torch.randn(1, 4, 3, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradgradcheck(l, x)

@pytest.mark.parametrize('needs', ['x','w','gain'])
@pytest.mark.parametrize('n', [12,2])
def test_double_backward_of_some(needs, n):
    "Gradients of gradients where only some of the inputs have gradients"
    ts = dict(x=torch.randn(2, 5, n).double(), w=torch.randn(5, 5, 1).double(), gain=torch.tensor(0.3).double())
    t = ts[needs].requires_grad_()
    gs = [torch.autograd.grad(f(**ts).square().sum(), t, create_graph=True)[0].square().sum() for f in
        (lambda x, w, gain: simple_attention(x, w, gain), lambda x, w, gain: oracle(x, w, gain))]
    torch.testing.assert_close(*[torch.autograd.grad(g, t)[0] for g in gs])

def test_functional_transforms():
    l,x = layer(4).eval(),torch.randn(3, 2, 4, 3, 3)
    torch.testing.assert_close(torch.func.vmap(l)(x), torch.stack([l(o) for o in x]))

@pytest.mark.parametrize('training', [True,False])
@pytest.mark.parametrize('shape', [(2,8,2,2), (2,8,3,3), (2,32,32,32)])
def test_vmap_over_layers(shape, training):
    "An ensemble of stacked layers, with the gradients of each"
    layers = [layer(shape[1]).train(training) for _ in range(3)]
    x,states = torch.randn(shape),[copy.deepcopy(l) for l in layers]
    params,buffers = torch.func.stack_module_state(states)
    def loss(p, b, x): return torch.func.functional_call(states[0], (p,b), (x,)).square().mean()
    for dims,xs in ((None,[x]*3), (0,torch.randn(3, *shape))):
        grads = torch.func.vmap(torch.func.grad(loss), in_dims=(0,0,dims))(params, {k: v.clone() for k,v in buffers.items()}, x if dims is None else xs)
        for i,(l,o) in enumerate(zip(layers, xs)):
            m = copy.deepcopy(l)
            m(o).square().mean().backward()
            for name,p in m.named_parameters(): torch.testing.assert_close(grads[name][i], p.grad, rtol=1e-3, atol=1e-5)

@pytest.mark.parametrize('c,n', [(8,2), (32,1024)])
def test_undefined_gradient(c, n):
    "An output that the loss does not use has none"
    x = torch.randn(2, c, n, requires_grad=True)
    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y): return y.sum()
        @staticmethod
        def backward(ctx, g): return None
    (Nothing.apply(simple_attention(x, torch.randn(c, c, 1, requires_grad=True), torch.tensor(0.1)))+x.sum()).backward()
    assert (x.grad==1).all()

def test_gradcheck_of_the_hand_written_order(monkeypatch):
    from fastattn.layers import simple
    monkeypatch.setattr(simple, '_worthwhile', 0)
    x,w = torch.randn(2, 3, 9, dtype=torch.double, requires_grad=True),torch.randn(3, 3, 1, dtype=torch.double, requires_grad=True)
    gain = torch.tensor(0.2, dtype=torch.double, requires_grad=True)
    for f in (simple_attention, lambda x, w, gain: simple_attention(x.mT.contiguous().mT, w, gain)):
        assert torch.autograd.gradcheck(f, (x,w,gain), check_undefined_grad=True)
        assert torch.autograd.gradgradcheck(f, (x,w,gain))

@pytest.mark.parametrize('reentrant', [False,True])
@pytest.mark.parametrize('sym', [False,True])
@pytest.mark.parametrize('size', [3,32])
def test_checkpointing(reentrant, sym, size):
    "Recomputed, the layer takes no second step of power iteration, and its gradients are those without checkpointing"
    from torch.utils.checkpoint import checkpoint
    a = layer(32, sym=sym)
    b,x = copy.deepcopy(a),torch.randn(2, 32, size, size, requires_grad=True)
    for _ in range(3):
        a(x).square().mean().backward()
        checkpoint(b, x, use_reentrant=reentrant).square().mean().backward()
    for p,q in zip(a.parameters(), b.parameters()): assert torch.equal(p.grad, q.grad)
    for p,q in zip(a.buffers(), b.buffers()): assert torch.equal(p, q)

@pytest.mark.parametrize('where', ['inside','around'])
@pytest.mark.parametrize('sym', [False,True])
@pytest.mark.parametrize('size', [2,3,16])
def test_checkpointing_compiled(where, sym, size):
    "The same where the checkpoint is compiled too, and where it is around compiled code"
    from torch.utils.checkpoint import checkpoint
    torch._dynamo.reset()
    a = layer(8, sym=sym)
    b,x = copy.deepcopy(a),torch.randn(2, 8, size, size, requires_grad=True)
    def checkpointed(f): return lambda x: checkpoint(f, x, use_reentrant=False)
    def compiled(f): return torch.compile(f, backend='aot_eager', fullgraph=True)
    f = compiled(checkpointed(b)) if where=='inside' else checkpointed(compiled(b))
    for _ in range(3):
        for o in (a, f): o(x).square().mean().backward()
    for p,q in zip(a.parameters(), b.parameters()): torch.testing.assert_close(q.grad, p.grad, rtol=1e-5, atol=1e-6)
    for p,q in zip(a.buffers(), b.buffers()): torch.testing.assert_close(q, p, rtol=1e-6, atol=1e-6)

def with_buffers(l, x, params=None):
    "What `torch.func` asks for in training: buffers that are handed over, for they change"
    buffers = {k: v.clone() for k,v in l.named_buffers()}
    return torch.func.functional_call(l, (params or dict(l.named_parameters()),buffers), (x,))

@pytest.mark.parametrize('by_hand', [True,False])
@pytest.mark.parametrize('training', [True,False])
@pytest.mark.parametrize('shape', [(2,4,3,3), (2,4,2), (2,6,2,3), (1,1,1)])
def test_forward_mode(shape, training, by_hand, monkeypatch):
    "`jvp` by the input and by the parameters against backward mode"
    if by_hand: monkeypatch.setattr('fastattn.layers.simple._worthwhile', 0)
    torch.manual_seed(0)
    l = layer(shape[1]).double().train(training)
    x,dx,g = torch.randn(3, *shape).double()
    params = {k: v.detach() for k,v in l.named_parameters()}
    for o,do in ((x,dx), (x.mT.contiguous().mT,dx.mT.contiguous().mT)):
        dparams = {k: torch.randn_like(v) for k,v in params.items()}
        for f,primal,tangent in ((lambda x: with_buffers(l, x),o,do), (lambda p: with_buffers(l, o, p),params,dparams)):
            y,dy = torch.func.jvp(f, (primal,), (tangent,))
            want,pull = torch.func.vjp(f, primal)
            back, = pull(g)
            torch.testing.assert_close(y, want)
            pairs = [(back,tangent)] if primal is o else [(back[k],tangent[k]) for k in params]
            torch.testing.assert_close((dy*g).sum(), sum((a*b).sum() for a,b in pairs))

@pytest.mark.parametrize('channels_last', [True,False])
def test_forward_over_backward(channels_last, monkeypatch):
    "Hessians: forward mode over the hand-written backward, and backward over backward"
    monkeypatch.setattr('fastattn.layers.simple._worthwhile', 0)
    x = torch.randn(1, 3, 5).double()
    if channels_last: x = x.mT.contiguous().mT
    l = layer(3).double()
    def loss(x): return with_buffers(l, x).pow(3).sum()
    torch.testing.assert_close(torch.func.hessian(loss)(x), torch.autograd.functional.hessian(loss, x))

def test_captured_buffers_are_refused_by_torch_func():
    "In training the buffers change: PyTorch asks for them as arguments, as for batch norm"
    l,x = layer(4),torch.randn(2, 4, 3)
    for f in (lambda: torch.func.jvp(l, (x,), (x,)), lambda: torch.func.grad(lambda x: l(x).sum())(x)):
        with pytest.raises(RuntimeError, match='mutate a captured Tensor'): f()
        l.eval()
        f()
        l.train()

@pytest.mark.parametrize('shape', [(2,8,2,2), (2,8,3,3), (2,32,64,64)])
@pytest.mark.parametrize('training', [True,False])
def test_meta_forward(shape, training):
    l = SimpleSelfAttention(shape[1], device='meta').train(training)
    y = l(torch.empty(shape, device='meta', requires_grad=True))
    y.sum().backward()
    assert y.is_meta and y.shape==shape and l.weight.grad.is_meta

def test_tensor_image():
    "fastai's models see fastai's tensors"
    from fastai.torch_core import TensorImage
    x = TensorImage(torch.randn(2, 8, 5, 5))
    l = layer(8)
    y = l(x)
    y.mean().backward()
    torch.testing.assert_close(torch.Tensor(y), copy.deepcopy(l).eval()(torch.Tensor(x)), rtol=1e-2, atol=1e-2)

def test_meta_device_and_dtype():
    assert SimpleSelfAttention(8, device='meta').weight.device.type=='meta'
    assert SimpleSelfAttention(8, dtype=torch.double)(torch.randn(1, 8, 3, dtype=torch.double)).dtype==torch.double

def test_seed():
    def make():
        torch.manual_seed(3)
        return layer(8)(torch.randn(2, 8, 4, 4))
    assert torch.equal(make(), make())

@pytest.mark.parametrize('kwargs,message', [(dict(n_in=0), 'n_in'), (dict(n_in=8, ks=2), 'ks must be odd'), (dict(n_in=8, ks=-1), 'ks must be odd'),
    (dict(n_in=64.), 'n_in must be at least 1, and a whole number, got 64.0'), (dict(n_in='8'), 'n_in'), (dict(n_in=None), 'n_in'), (dict(n_in=8, ks=1.5), 'ks must be odd'), (dict(n_in=8, ks=None), 'ks must be odd')])
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message): SimpleSelfAttention(**kwargs)

@pytest.mark.parametrize('shape', [(2,4,3,3), (2,8), (8,)])
def test_bad_input(shape):
    with pytest.raises(ValueError, match='n_in=8'): SimpleSelfAttention(8)(torch.randn(shape))

def test_bad_dtype_and_function_arguments():
    for dtype in (torch.uint8,torch.long,torch.bool):
        with pytest.raises(TypeError, match='floating point'): SimpleSelfAttention(8)(torch.ones(2, 8, 3, 3, dtype=dtype))
    with pytest.raises(ValueError, match='ks must be odd'): cheapest_order(8, 5, ks=2)
    with pytest.raises(ValueError, match='ks must be odd'): simple_attention(torch.randn(2, 8, 4), torch.randn(8, 8, 2), torch.tensor(1.))
    for n in (0,-1,1.5):
        with pytest.raises(ValueError, match='n must be at least 1'): power_iteration(torch.eye(3), torch.ones(3), n)

def test_memory_kept_for_backward():
    "Beside its input the layer keeps small matrices only"
    l,x = layer(8),torch.randn(2, 8, 32, 32, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t): l(x)
    others = {t.data_ptr(): t.numel() for t in kept if t.untyped_storage().data_ptr()!=x.untyped_storage().data_ptr()}
    assert sum(others.values())<x.numel()/4

def test_timm_builds_it():
    from timm.layers import create_attn
    assert create_attn(SimpleSelfAttention, 8, device='meta', dtype=torch.half).weight.dtype==torch.half
