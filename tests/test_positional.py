"Encodings, spans, the layer and the model: formulas, extremes, options, and what must survive in use"
import copy,math,pickle
import fastai.callback.schedule # fine_tune
import pytest,torch
from hypothesis import given,settings,strategies as st
from torch import nn
from fastai.basics import Callback,DataLoaders,set_seed
from fastai.losses import CrossEntropyLossFlat
from fastattn.callback import Autocast,Checkpoint,SpanPenalty,SpanRecorder
from fastattn.interpret import show_encodings,show_spans
from fastattn.layers.position import *
from fastattn.layers.local2d import Local2DAttention
from fastattn.layers.positional import PositionalSelfAttention
from fastattn.learner import positional_learner
from fastattn.models.positional import PositionalBlock,PositionalTransformer

few = settings(deadline=None, derandomize=True, max_examples=30)

def oracle(m, x):
    "The formula over all pairs of positions, for float64"
    grid,d = x.shape[1:-1],x.shape[-1]//m.heads
    at = torch.stack(torch.meshgrid(*(torch.arange(s) for s in grid), indexing='ij'), -1).flatten(0, -2)
    off = (at[None]-at[:,None]).double()
    rel = off/torch.tensor([max(1, s-1) for s in grid])
    q,k,v = m.qkv(x).flatten(1, -2).unflatten(-1, (3,m.heads,d)).permute(2, 0, 3, 1, 4)
    logits = (q+m.u[:,None])@k.mT
    g,pos = torch.ones(1, *off.shape[:2]).double(),0
    if isinstance(m.span, GaussianSpan): g = torch.exp(-0.5*((rel/m.span.log_sigma.exp()[:,None,None])**2).sum(-1))
    if m.encoding is not None:
        h = rel
        for i,l in enumerate(m.encoding.layers): h = l(h) if i==len(m.encoding.layers)-1 else torch.sin(m.encoding.w0[i]*l(h))
        pos = torch.einsum('bhid,ijhd->bhij', q+m.v[:,None], h.unflatten(-1, (m.heads,d)))
        if m.modulate=='positional': pos = pos*g
        logits = logits*pos if m.combine=='multiply' else logits+pos
    if m.modulate=='all': logits = logits*g
    seen = torch.stack([(off.abs()<=torch.tensor(w)).all(-1) for w in m.windows(grid)]) # (heads or 1, N, N)
    if m.causal: seen = seen&torch.ones_like(seen).tril()
    logits = (logits/d**0.5).masked_fill(~seen, -torch.inf)
    weights = (logits-logits.amax(-1, keepdim=True)).exp()
    if m.modulate=='weights': weights = weights*g
    y = weights/weights.sum(-1, keepdim=True)@v
    return m.proj(y.movedim(1, 2).flatten(-2)).unflatten(1, grid)

def layer(ndim=2, dim=8, heads=2, sigma=0.3, **kwargs):
    torch.manual_seed(0)
    span = kwargs.pop('span', GaussianSpan(ndim, sigma))
    return PositionalSelfAttention(dim, heads, ndim, span=span, **kwargs).double()

def spread_heads(ndim):
    "A narrow head and a wide one"
    span = GaussianSpan(ndim, 0.3, heads=2)
    span.log_sigma.data += torch.tensor([[-1.5],[0.5]])
    update_windows(span)
    return span

@few
@given(st.data())
def test_oracle(data):
    ndim = data.draw(st.integers(1, 3))
    grid = [data.draw(st.integers(1, (12,6,4)[ndim-1])) for _ in range(ndim)]
    encoding = data.draw(st.sampled_from(['siren',None]))
    span = data.draw(st.sampled_from([None,0,2,GaussianSpan(ndim, 0.2),spread_heads(ndim),GaussianSpan(ndim, 0.3, threshold=0)]))
    learned = isinstance(span, GaussianSpan)
    kw = dict(combine=data.draw(st.sampled_from(['add','multiply']))) if encoding else {}
    kw['modulate'] = data.draw(st.sampled_from(['weights','all','positional'][:1+learned+(learned and encoding is not None)]))
    m = layer(ndim, encoding=encoding, span=copy.deepcopy(span), causal=data.draw(st.booleans()), **kw)
    x = torch.randn(2, *grid, 8).double().requires_grad_()
    a,b = m(x),oracle(m, x)
    torch.testing.assert_close(a, b)
    ins = [x,*(p for p in m.parameters() if p.requires_grad)]
    g = torch.randn_like(a)
    for i,j in zip(*(torch.autograd.grad(y, ins, g, allow_unused=True) for y in (a,b))):
        if i is not None and j is not None: torch.testing.assert_close(i, j, rtol=1e-5, atol=1e-8)
        else: assert all(o is None or o.abs().max()<1e-9 for o in (i,j))

def test_equivariant():
    "Away from the border what counts is the offset only"
    m = layer(sigma=0.05)
    x = torch.zeros(1, 30, 30, 8).double()
    x[:,10:16,10:16] = torch.randn(6, 6, 8).double()
    a,b = m(x)[:,8:18,8:18],m(x.roll((4,5), (1,2)))[:,12:22,13:23]
    torch.testing.assert_close(a, b)

def test_window_holds_the_span():
    for full in (False,True):
        for sigma in (0.02,0.1,0.3):
            s = GaussianSpan(2, sigma, 0.1, heads=2, full=full)
            s.log_sigma.data += torch.tensor([[0.,0.2],[-0.5,0.1]])
            if full: s.lean_sigma.data += torch.tensor([[3.],[-2.]])
            update_windows(s)
            grid,w = (40,50),s.window((40,50))
            g,steps = s(window_steps((39,49)), grid),window_steps((39,49))
            outside = (steps.abs()>torch.tensor(w)).any(-1)
            assert (g[:,outside]<=0.1+1e-6).all()
            for i in range(2): # and it is no larger than it must be: where it leans, the best of the other dimension's steps counts, and those are whole
                assert w[i]==1 or g[:,steps[...,i].abs()==w[i]-1].max()>(0.1 if not full else 0.07)

def test_full_is_diagonal_at_first():
    a,b = GaussianSpan(3, 0.2),GaussianSpan(3, 0.2, full=True)
    steps = window_steps((2,3,4))
    torch.testing.assert_close(a(steps, (9,9,9)), b(steps, (9,9,9)))
    assert a.window((9,10,11))==b.window((9,10,11))

@pytest.mark.parametrize('log_sigma', [-1e30,-50.,50.,1e30])
@pytest.mark.parametrize('full', [False,True])
def test_extreme_spans(log_sigma, full):
    m = layer(span=GaussianSpan(2, full=full))
    m.span.log_sigma.data.fill_(log_sigma)
    update_windows(m)
    y = m(torch.randn(1, 5, 6, 8).double())
    y.sum().backward()
    assert y.isfinite().all() and all(p.grad is None or p.grad.isfinite().all() for p in m.parameters())
    assert m.window((5,6))==((1,1) if log_sigma<0 else (4,5))

def test_siren_initialisation():
    torch.manual_seed(0)
    e = SirenEncoding(2, 16, hidden=400, w0=30., w0_first=5.)
    assert e.layers[0].weight.abs().max()<=0.5 and 0.9*(6/400)**0.5/30<e.layers[1].weight.abs().max()<=(6/400)**0.5/30
    assert all(not l.bias.any() for l in e.layers) and e.w0.tolist()==[5.,30.] and not e.w0.requires_grad
    learned = SirenEncoding(2, 16, learn_w0=True)
    learned(window_steps((2,2)), (3,3)).sum().backward()
    assert learned.w0.grad.abs().min()>0
    for kw in (dict(depth=1), dict(depth=2), dict(normalized=False), dict(act_cls=nn.ReLU)): assert SirenEncoding(2, 5, **kw)(window_steps((2,1)), (3,3)).shape==(5,3,5)
    assert SinusoidEncoding(3, 5)(window_steps((1,2,3)), (4,4,4)).shape==(3,5,7,5)

def test_precision():
    m,x = PositionalSelfAttention(8, 2),torch.randn(2, 6, 6, 8)
    want = m(x)
    for dtype in (torch.bfloat16,torch.float16):
        with torch.autocast('cpu', dtype): y = m(x)
        assert y.dtype==dtype
        torch.testing.assert_close(y.float(), want, rtol=0.1, atol=0.05)

@pytest.mark.parametrize('size,heads', [((6,6),1), pytest.param((20,20), 1, marks=pytest.mark.slow), ((20,20),2)])
def test_copies_compile_export(size, heads):
    "In both forms of local attention, with windows of the heads' own; a compiled model follows a span that moves"
    torch.compiler.reset() # the graphs of other cases count towards one limit
    m,x = PositionalSelfAttention(8, 2, span=spread_heads(2) if heads==2 else GaussianSpan(2, 0.1)),torch.randn(2, *size, 8)
    m(x).sum().backward()
    for f in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))): torch.testing.assert_close(f(x), m(x))
    c = torch.compile(m, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(c(x), m(x))
    m.span.log_sigma.data += 0.7
    update_windows(m) # as UpdateWindows does before each batch
    y = c(x)
    want = m(x)
    torch.testing.assert_close(y, want)
    with torch.no_grad(): torch.testing.assert_close(torch.export.export(m.eval(), (x,)).module()(x), want)
    fresh = PositionalSelfAttention(8, 2, span=GaussianSpan(2, heads=heads))
    fresh.load_state_dict(m.state_dict())
    torch.testing.assert_close(fresh(x), want)
    torch.testing.assert_close(torch.compile(fresh, fullgraph=True, backend='aot_eager')(x), want)

@pytest.mark.parametrize('kwargs', [dict(ndim=1), dict(ndim=1, causal=True, token='last'), dict(encoding='sinusoid'), dict(encoding=None, span=None), dict(combine='multiply', modulate='positional'),
    dict(token='max', pool_after=[0,1]), dict(span=2), dict(ndim=1, pool_after=[0], pool=3)])
def test_transformer(kwargs):
    m = PositionalTransformer(3, 5, dim=16, depth=2, heads=2, ff=8, **kwargs)
    for b in (0,1,2): assert m(torch.randn(b, 3, 7, 5) if kwargs.get('ndim')!=1 or b else torch.randn(b, 3, 35)).shape==(b,5)
    m(torch.randn(2, 3, 1, 9)).sum().backward()
    assert all(p.grad is not None for n,p in m.named_parameters() if p.requires_grad and 'v' not in n.split('.')[-1:])

def data(n=24, *shape):
    items = [(torch.randn(*shape)+i%2, i%2) for i in range(n)]
    dls = DataLoaders.from_dsets(items, items, bs=8)
    dls.c = 2
    return dls

@pytest.mark.parametrize('shape,ndim', [((1,6,6),None), ((3,6,5),1), ((2,12),None), ((1,3,4,5),None)])
def test_learner(shape, ndim):
    "Images as grids and as sequences, series, volumes; recorded spans"
    set_seed(0)
    learn = positional_learner(data(24, *shape), ndim, dim=8, depth=2, heads=2, loss_func=CrossEntropyLossFlat(), cbs=SpanPenalty(5.))
    with learn.no_bar(),learn.no_logging(): learn.fit(2, 1e-2)
    rows = learn.span_recorder.rows
    assert len(rows)==2 and [o['layer'] for o in rows[0]['spans']]==['blocks.0.attn','blocks.1.attn']
    last = rows[-1]['spans'][0]
    assert len(last['window'])==(ndim or len(shape)-1) and 0<last['share']<=1
    assert all(s<0.3 for s in last['sigma'][0])
    show_spans(rows)
    if (ndim or len(shape)-1)<3: show_encodings(learn, (6,)*(ndim or len(shape)-1))

def test_interrupted():
    "Nothing of an interrupted fit is left in the next: no hooks, no low precision"
    class Stop(Callback):
        def before_batch(self): raise KeyboardInterrupt
    learn = positional_learner(data(24, 1, 4, 4), dim=8, depth=1, heads=2, loss_func=CrossEntropyLossFlat(), cbs=Autocast('bf16'))
    with learn.no_bar(),learn.no_logging():
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=Stop())
        assert len(learn.model.blocks[0].attn._forward_pre_hooks)==1
        learn.fit(1)
    assert not learn.model.blocks[0].attn._forward_pre_hooks and nn.Linear(2, 2)(torch.ones(1, 2)).dtype==torch.float32

def test_recorder_resumes(tmp_path):
    class Stop(Callback):
        def before_batch(self):
            if self.epoch==2: raise KeyboardInterrupt
    def make(): return positional_learner(data(24, 1, 4, 4), dim=8, depth=1, heads=2, loss_func=CrossEntropyLossFlat(), cbs=Checkpoint(tmp_path/'c.pt'))
    first,learn = make(),make()
    with first.no_bar(),first.no_logging(),learn.no_bar(),learn.no_logging():
        with pytest.raises(KeyboardInterrupt): first.fit(4, cbs=Stop())
        learn.fit(4)
    assert [len(o['spans']) for o in learn.span_recorder.rows]==[1]*4 and learn.span_recorder.rows[:2]==first.span_recorder.rows
    show_spans(learn.span_recorder.rows)

def test_siren_on_meta():
    with torch.device('meta'): m = PositionalSelfAttention(8, 2)
    m.to_empty(device='cpu').encoding.reset_parameters()
    assert m.encoding.w0.tolist()==[10.,10.]

def test_constant_frequencies_stay():
    "A constant is no parameter, which fine_tune would train; state dicts have the keys they had"
    few = [(torch.randn(1, 4, 4),i%2) for i in range(8)]
    dls = DataLoaders.from_dsets(few, few, bs=4, num_workers=0)
    learn = positional_learner(dls, dim=8, depth=1, heads=2, n_out=2, loss_func=nn.CrossEntropyLoss())
    with learn.no_bar(),learn.no_logging(): learn.fine_tune(1, 0.1)
    m = learn.model.blocks[0].attn.encoding
    assert m.w0.tolist()==[10.,10.] and 'w0' in m.state_dict() and 'w0' not in dict(m.named_parameters())
    learned = SirenEncoding(2, 8, w0=7., learn_w0=True)
    fixed = SirenEncoding(2, 8)
    fixed.load_state_dict(learned.state_dict())
    assert fixed.w0.tolist()==[7.,7.]

@pytest.mark.parametrize('full', [False,True])
def test_constant_span_stays(full):
    few = [(torch.randn(1, 4, 4),i%2) for i in range(8)]
    dls = DataLoaders.from_dsets(few, few, bs=4, num_workers=0)
    span = GaussianSpan(2, 0.2, full=full, learn=False)
    learn = positional_learner(dls, dim=8, depth=1, heads=2, n_out=2, loss_func=nn.CrossEntropyLoss(), span=span)
    with learn.no_bar(),learn.no_logging(): learn.fine_tune(1, 0.1)
    m = learn.model.blocks[0].attn.span
    assert torch.equal(m.log_sigma, span.log_sigma) and not list(m.parameters()) and m.state_dict().keys()==GaussianSpan(2, full=full).state_dict().keys()
    fixed = GaussianSpan(2, full=full, learn=False)
    fixed.load_state_dict(GaussianSpan(2, 0.1, full=full).state_dict())
    assert torch.equal(fixed.radius, GaussianSpan(2, 0.1, full=full).radius)

def test_nothing_decays():
    m = PositionalSelfAttention(8, 2)
    assert {n for n in m.span.no_weight_decay()}=={'log_sigma'} and len(m.encoding.no_weight_decay())==6 and 'w0' in PositionalSelfAttention(8, 2, encoding=SirenEncoding(2, 8, learn_w0=True)).encoding.no_weight_decay()

@pytest.mark.parametrize('f,message', [(lambda: PositionalSelfAttention(9, 2), 'heads must divide'), (lambda: PositionalSelfAttention(8, 0), 'heads must be at least 1'),
    (lambda: PositionalSelfAttention(8, 2, combine='plus'), 'unknown combine'), (lambda: PositionalSelfAttention(8, 2, modulate='none'), 'unknown modulate'),
    (lambda: PositionalSelfAttention(8, 2, encoding='sirene'), "Did you mean 'siren'"), (lambda: PositionalSelfAttention(8, 2, span='gauss'), "Did you mean 'gaussian'"),
    (lambda: PositionalSelfAttention(8, 2, span=-1), 'at least 0'), (lambda: PositionalSelfAttention(8, 2, span=GaussianSpan(1)), 'span must be of ndim=2'),
    (lambda: PositionalSelfAttention(8, 2, span=GaussianSpan(2, heads=3)), 'of 2 heads or 1'), (lambda: PositionalSelfAttention(8, 2, encoding=None, combine='multiply'), 'need an encoding'),
    (lambda: GaussianSpan(2, -1.), 'sigma must be positive'), (lambda: GaussianSpan(2, threshold=-0.1), 'threshold'), (lambda: GaussianSpan(0), 'ndim'), (lambda: SinusoidEncoding(3, 8, hidden=4), 'hidden'),
    (lambda: PositionalTransformer(3, 2, depth=0), 'depth must be at least 1'), (lambda: PositionalTransformer(3, 2, ndim=4, pool_after=[0]), '1 to 3 dimensions'),
    (lambda: PositionalTransformer(3, 2, attn=lambda i: None, span=3), 'attn builds'), (lambda: SpanPenalty(-1.), 'weight must be'), (lambda: positional_learner(data(8, 6)), r'takes \(channels'),
    (lambda: PositionalSelfAttention(8, 2)(torch.zeros(2, 8, 8)), 'got shape'), (lambda: PositionalSelfAttention(8, 2)(torch.zeros(2, 4, 4, 9)), 'got shape'),
    (lambda: PositionalSelfAttention(8, 2, span=0.3), 'whole number'), (lambda: PositionalSelfAttention(8, 2, span=(1.5,2)), 'whole number'), (lambda: PositionalSelfAttention(8, 2, span=(1,2,3)), 'each of the 2'),
    (lambda: positional_learner(data(8, 1, 4, 4), loss_func=CrossEntropyLossFlat(), attn=lambda i: 3), 'attn must be a module')])
def test_bad(f, message):
    with pytest.raises((ValueError,TypeError), match=message): f()

def test_recorder_needs_layers():
    learn = positional_learner(data(16, 1, 4, 4), dim=8, depth=1, heads=2, loss_func=CrossEntropyLossFlat())
    learn.model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    with learn.no_bar(),learn.no_logging(),pytest.raises(ValueError, match='no PositionalSelfAttention'): learn.fit(1)

def test_window_is_state():
    "Nothing that is asked changes it; it is saved, frozen where nobody updates it, and follows sigma where somebody does"
    m,x = PositionalSelfAttention(8, 2, span=GaussianSpan(2, 0.05, heads=2)),torch.randn(1, 20, 20, 8)
    m.span.log_sigma.data[1] += 1.2
    y,before = m(x),m.windows((20,20))
    assert before[0]==before[1]==m.window((20,20)) and m(x).equal(y)
    saved = copy.deepcopy(m.state_dict())
    update_windows(m)
    after = m.windows((20,20))
    assert after[0]==before[0] and after[1]>before[1] and m.window((20,20))==after[1] and not m(x).equal(y)
    m.load_state_dict(saved)
    assert m.windows((20,20))==before and m(x).equal(y)
    for f in (copy.deepcopy(m), pickle.loads(pickle.dumps(m)), copy.deepcopy(m).double().float()): assert f.windows((20,20))==before
    old = {k: v for k,v in saved.items() if not k.endswith('radius')} # a file of an older version
    m.load_state_dict(old)
    assert m.windows((20,20))==after

def test_diverged():
    span = GaussianSpan(2)
    span.log_sigma.data.fill_(math.nan)
    with pytest.raises(ValueError, match='diverged'): update_windows(span)

def test_update_windows_once():
    "Training refreshes windows, validation leaves them alone, the recorder too"
    class Watch(Callback):
        order = 10
        def before_fit(self): self.seen = []
        def after_batch(self): self.seen.append((self.training,tuple(self.learn.model.blocks[0].attn.span._numbers[0])))
    learn = positional_learner(data(24, 1, 6, 6), dim=8, depth=1, heads=2, loss_func=CrossEntropyLossFlat(), cbs=[Watch(),SpanPenalty(5.)])
    with learn.no_bar(),learn.no_logging(): learn.fit(2, 1e-1)
    train,valid = ([o for t,o in learn.watch.seen if t==kind] for kind in (True,False))
    assert len(set(train))==len(train)==6 and len(set(valid))==2 and valid[0]==train[2] and valid[-1]==train[-1]

def test_windows_are_read_once(monkeypatch):
    "However many layers there are, one reading for each update"
    net,read = PositionalTransformer(1, 2, dim=8, depth=3, heads=2, span=GaussianSpan(2, heads=2)),[]
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, 'tolist', lambda o: read.append(o.shape) or tolist(o))
    update_windows(net)
    net(torch.randn(2, 1, 6, 6)).sum().backward()
    assert read==[(3*2*2,)]

def test_span_on_meta():
    "Forward passes on the meta device, and from there to weights"
    for kw in (dict(), dict(encoding='sinusoid'), dict(encoding='rotary'), dict(span=2, encoding=None), dict(span=None), dict(modulate='all')):
        with torch.device('meta'): m,x = PositionalSelfAttention(8, 2, **kw),torch.empty(2, 6, 6, 8)
        assert m(x).is_meta
        full,x = PositionalSelfAttention(8, 2, **kw),torch.randn(2, 6, 6, 8)
        for assign in (False,True):
            empty = copy.deepcopy(m)
            if not assign: empty.to_empty(device='cpu')
            empty.load_state_dict(full.state_dict(), assign=assign)
            torch.testing.assert_close(empty(x), full(x))
    with torch.device('meta'): m = PositionalSelfAttention(8, 2, encoding='sinusoid', span=GaussianSpan(2, 0.1, full=True))
    m.to_empty(device='cpu')
    for o in m.modules():
        if hasattr(o, 'reset_parameters'): o.reset_parameters()
    assert m(x).isfinite().all() and m.span.sigma.allclose(torch.tensor(0.1)) and m.window((21,21))==GaussianSpan(2, 0.1).window((21,21))

@pytest.mark.parametrize('dtype', [torch.float16,torch.bfloat16])
def test_low_precision_models(dtype):
    "All options, in a model of low precision; sinusoids stay exact"
    x = torch.randn(2, 7, 7, 8)
    for kw in (dict(), dict(encoding='rotary'), dict(span=GaussianSpan(2, full=True)), dict(span=GaussianSpan(2, 1e-4)), dict(modulate='all'), dict(combine='multiply')):
        m = PositionalSelfAttention(8, 2, **kw).to(dtype)
        y = m(x.to(dtype))
        y.sum().backward()
        assert y.isfinite().all() and all(o.grad is None or o.grad.isfinite().all() for o in m.parameters())
    e = SinusoidEncoding(1, 8)
    steps = window_steps((500,))
    torch.testing.assert_close(copy.deepcopy(e).to(dtype)(steps, (501,)).float(), e(steps, (501,)), rtol=0.02, atol=0.02)

@pytest.mark.parametrize('kwargs,size', [(dict(), (6,5)), (dict(span=GaussianSpan(2, 0.03)), (24,20)), (dict(span=spread_heads(2)), (24,20)), *[pytest.param(*o, marks=pytest.mark.slow) for o in (
    (dict(encoding=None, span=3), (6,5)), (dict(encoding=None, span=3), (24,20)), (dict(encoding='rotary', span=None), (6,5)), (dict(span=GaussianSpan(2, 0.03), modulate='all'), (24,20)), (dict(combine='multiply'), (6,5)))]])
def test_dynamic_batch(kwargs, size, tmp_path):
    "Exported with a bounded batch, and to ONNX for any batch, narrow and wide"
    ort = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    torch.manual_seed(0)
    m = PositionalTransformer(3, 5, dim=16, depth=1, heads=2, **kwargs).eval()
    x = torch.randn(4, 3, *size)
    bounded = torch.export.export(m, (x,), dynamic_shapes=({0: torch.export.Dim('b', min=2, max=64)},)).module()
    torch.onnx.export(m, (x,), tmp_path/'m.onnx', dynamo=True, dynamic_shapes=({0: torch.export.Dim('b', min=1, max=512)},), verbose=False)
    session = ort.InferenceSession(tmp_path/'m.onnx')
    for b in (1,2,5,64):
        x = torch.randn(b, 3, *size)
        if b>1: torch.testing.assert_close(bounded(x), m(x))
        y, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.tensor(y), m(x), rtol=1e-4, atol=1e-5)

def test_transforms():
    "The layer with a narrow span: an ensemble by vmap, torch.func.grad, jvp, a penalty on gradients"
    torch.manual_seed(0)
    ms,x = [layer(sigma=0.05, heads=2) for _ in range(2)],torch.randn(2, 12, 12, 8).double()
    params,buffers = torch.func.stack_module_state(ms)
    y = torch.func.vmap(lambda *o: torch.func.functional_call(ms[0], o, (x,)))(params, buffers)
    torch.testing.assert_close(y, torch.stack([m(x) for m in ms]))
    m,t = ms[0],torch.randn_like(x)
    y,d = torch.func.jvp(m, (x,), (t,))
    torch.testing.assert_close(d, (m(x+1e-5*t)-m(x-1e-5*t))/2e-5, rtol=1e-5, atol=1e-7)
    g = torch.func.grad(lambda o: m(o).square().sum())(x)
    torch.testing.assert_close(g, torch.autograd.grad(m(x.requires_grad_()).square().sum(), x)[0])

def test_modules_are_copied():
    "Each block has its own span and encoding; sharing is asked for through `attn`"
    span,encoding = GaussianSpan(2, 0.2),SirenEncoding(2, 16)
    m = PositionalTransformer(1, 2, dim=16, depth=3, heads=2, span=span, encoding=encoding)
    for name in ('span','encoding'): assert len({id(getattr(b.attn, name)) for b in m.blocks}|{id(span),id(encoding)})==5
    m = PositionalTransformer(1, 2, dim=16, depth=3, heads=2, attn=lambda i: PositionalSelfAttention(16, 2, 2, encoding, span))
    assert all(b.attn.span is span for b in m.blocks)

def test_any_attention():
    "Whatever keeps the shape may be a block's attention"
    m = PositionalTransformer(1, 3, dim=8, depth=2, heads=2, attn=lambda i: nn.Linear(8, 8) if i else PositionalSelfAttention(8, 2), pool_after=[0])
    assert m(torch.randn(2, 1, 6, 6)).shape==(2,3)
    learn = positional_learner(data(16, 1, 4, 4), dim=8, depth=2, attn=lambda i: nn.Linear(8, 8), loss_func=CrossEntropyLossFlat())
    with learn.no_bar(),learn.no_logging(): learn.fit(1)
    with pytest.raises(ValueError, match='attn must keep the shape'): PositionalTransformer(1, 3, dim=8, depth=1, attn=lambda i: nn.Linear(8, 4))(torch.randn(2, 1, 4, 4))

def test_penalty():
    "A price by share of pairs, for layers and heads; it moves wide and narrow spans alike"
    def sigmas(weight, start=0.3, heads=1):
        set_seed(0)
        learn = positional_learner(data(24, 1, 4, 4), dim=8, depth=2, heads=2, span=GaussianSpan(2, start, heads=heads), loss_func=CrossEntropyLossFlat(), cbs=SpanPenalty(weight))
        with learn.no_bar(),learn.no_logging(): learn.fit(2, 1e-2)
        return [b.attn.span.sigma.detach().mean(1) for b in learn.model.blocks]
    for start in (0.1,0.5): assert all((o<start).all() for o in sigmas(20., start))
    a,b = sigmas({'blocks.0.attn': 20.}),sigmas(0.)
    assert a[0]<b[0]-0.01 and (a[1]-b[1]).abs()<0.01
    a,b = (sigmas({'blocks.0.attn': o}, heads=2)[0] for o in ([0.,20.],0.))
    assert a[1]<b[1]-0.01 and (a[0]-b[0]).abs()<0.01
    penalty,span = SpanPenalty(1.),GaussianSpan(2, 0.05)
    penalty.weights = {'': penalty._weight('', span)} # as before a fit
    price = penalty._price('', span)
    assert abs(price-0.28**2)<0.02 # about the share of the pairs, (2r-r^2)^2 of r=3.03*0.05
    for span,weight,message in ((GaussianSpan(2, threshold=0), 1., 'threshold above 0'), (GaussianSpan(2), {'blocks.7.attn': 1.}, 'unknown layer')):
        learn = positional_learner(data(24, 1, 4, 4), dim=8, depth=1, heads=2, span=span, loss_func=CrossEntropyLossFlat(), cbs=SpanPenalty(weight))
        with learn.no_bar(),learn.no_logging(),pytest.raises(ValueError, match=message): learn.fit(1)

def test_threshold_bound():
    "What a cut takes away is within the bound"
    torch.manual_seed(0)
    for sigma,t in ((0.05,0.01),(0.1,0.01),(0.1,0.1)):
        a,b = (PositionalSelfAttention(32, 4, span=GaussianSpan(2, sigma, o)).double() for o in (t,0))
        b.load_state_dict({**a.state_dict(), 'span.radius': b.span.radius})
        x = torch.randn(2, 24, 24, 32).double()
        y,whole = a.attend(x),b.attend(x)
        change = (y-whole).norm()/whole.norm()
        assert change<(0.01 if t==0.01 else 0.2)

class Odd(nn.Module):
    "An encoding of another size"
    def forward(self, steps, grid): return steps

@pytest.mark.parametrize('f,message', [(lambda: PositionalSelfAttention(8, 2, encoding=5), 'encoding must be'), (lambda: PositionalSelfAttention(8, 2, encoding=True), 'encoding must be'),
    (lambda: PositionalSelfAttention(8, 2, encoding=SirenEncoding), 'encoding must be'), (lambda: PositionalSelfAttention(8, 2, encoding=SirenEncoding(1, 8)), 'ndim=2'),
    (lambda: PositionalSelfAttention(8, 2, encoding=SirenEncoding(2, 6)), r'vectors \(\*, 8\)'), (lambda: PositionalSelfAttention(8, 2, encoding=Odd()), r'vectors \(\*, 8\)'),
    (lambda: PositionalSelfAttention(8, 2, span=False), 'whole number'), (lambda: PositionalSelfAttention(8, 2, span=True), 'whole number'),
    (lambda: PositionalSelfAttention(8, 2, span=None, modulate='positional'), 'needs a span'), (lambda: PositionalSelfAttention(8, 2, span=2, modulate='all'), 'needs a span'),
    (lambda: Local2DAttention(8, True, 2), 'window_size must be'), (lambda: Local2DAttention(8, (1.5,2), 2), 'window_size must be'),
    (lambda: window_steps((1.5,2)), 'window must be'), (lambda: window_steps(3), 'window must be'), (lambda: window_steps((True,1)), 'window must be'),
    (lambda: GaussianSpan(2).window((4,)), 'grid must be'), (lambda: GaussianSpan(2).window((4,0)), 'grid must be'), (lambda: GaussianSpan(2, math.nan), 'sigma must be'), (lambda: GaussianSpan(2, threshold=math.nan), 'threshold must be'),
    (lambda: SirenEncoding(2, 8, w0=0), 'w0 must be'), (lambda: SirenEncoding(2, 8, w0=math.nan), 'w0 must be'), (lambda: SirenEncoding(2, 8, w0_first=0.), 'w0_first must be'),
    (lambda: SinusoidEncoding(2, 8, base=0), 'base must be'), (lambda: rotary(torch.ones(1, 1, 4, 4, 8, dtype=torch.long)), 'floating point'), (lambda: rotary(torch.randn(1, 1, 4, 4, 8), base=0), 'base must be'),
    (lambda: rotary(torch.randn(1, 1, 4, 4, 8), base=-2.), 'base must be'), (lambda: PositionalBlock(nn.Identity(), 8, pool=0), 'pool must be'), (lambda: PositionalBlock(nn.Identity(), 8, pool=1.5), 'pool must be'),
    (lambda: PositionalBlock(nn.Identity(), 8, ff=0), 'ff must be'), (lambda: PositionalBlock(nn.Identity(), 8, p=math.nan), 'p is the probability'), (lambda: PositionalTransformer(3, 2, p=math.nan), 'p is the probability'),
    (lambda: PositionalTransformer(3, 2, pool_after=(1.5,)), 'pool_after must be'), (lambda: PositionalTransformer(3, 2, pool_after=1), 'pool_after must be'), (lambda: PositionalTransformer(3, 2, pool_after=[True]), 'pool_after must be'),
    (lambda: PositionalTransformer(3, 2, dim=8, depth=1, heads=2)(torch.ones(1, 3, 4, 4, dtype=torch.uint8)), 'floating point'), (lambda: PositionalTransformer(3, 2, dim=8, depth=1, heads=2)(torch.ones(1, 3, 0, 4)), 'at least one position'),
    (lambda: PositionalSelfAttention(8, 2)(torch.ones(1, 4, 0, 8)), 'at least one position'), (lambda: PositionalSelfAttention(8, 2)(torch.ones(1, 4, 4, 8).long()), 'floating point'),
    (lambda: SpanPenalty(math.inf), 'weight must be'), (lambda: SpanPenalty({'a': [1.,-1.]}), 'weight must be'), (lambda: PositionalTransformer(1, 2, span=None, modulate='all'), 'needs a span')])
def test_more_bad(f, message):
    with pytest.raises(ValueError, match=message): f()
