"Local attention against dense attention in float64: outputs and all gradients"
import itertools
import pytest,torch
from hypothesis import given,settings,strategies as st
from fastattn.layers.local import Window,_cheapest,local_attention

few = settings(deadline=None, derandomize=True, max_examples=40)

def oracle(q, k, v, window, p=None, q_pos=None, factor=None, combine='add', causal=False):
    "All pairs; `window` one number for each dimension"
    grid,d = q.shape[2:-1],q.dim()-3
    at = torch.stack(torch.meshgrid(*(torch.arange(s) for s in grid), indexing='ij'), -1).flatten(0, -2)
    off,w = at[None]-at[:,None],torch.tensor(window)
    seen = (off.abs()<=w).all(-1)
    place = (torch.minimum(torch.maximum(off, -w), w)+w).unbind(-1)
    logits = q.flatten(2, -2)@k.flatten(2, -2).mT
    if p is not None:
        pos = torch.einsum('bhid,hijd->bhij', (q if q_pos is None else q_pos).flatten(2, -2), p[(slice(None),*place)].expand(q.shape[1], -1, -1, -1))
        logits = logits*pos if combine=='multiply' else logits+pos
    if factor is not None: logits = logits*factor[(slice(None),*place)]
    if causal: seen = seen & torch.ones(len(at), len(at), dtype=torch.bool).tril()
    return ((logits/q.shape[-1]**0.5).masked_fill(~seen, -torch.inf).softmax(-1)@v.flatten(2, -2)).unflatten(2, grid)

def same(args, options, block, lead=(2,3), rtol=1e-7):
    q,k,v,window,p,q_pos,factor = args
    ins = [o.requires_grad_() for o in (q,k,v,p,q_pos,factor) if o is not None]
    ys = local_attention(q, k, v, window, p, q_pos, factor, block=block, **options),oracle(q, k, v, window, p, q_pos, factor, **options)
    torch.testing.assert_close(*ys)
    g = torch.randn(ys[0].shape, dtype=ys[0].dtype)
    for a,b in zip(*(torch.autograd.grad(y, ins, g, allow_unused=True) for y in ys)):
        if a is None or b is None: assert not (a if b is None else b).any() if not (a is b) else True
        else: torch.testing.assert_close(a, b)

def make(grid, window, B=2, H=3, D=4, V=5, p=None, q_pos=False, factor=None, contiguous=True):
    torch.manual_seed(0)
    table = [2*w+1 for w in window]
    def qkv(c): return torch.randn(B, H, *grid, c).double() if contiguous else torch.randn(B, *grid, H, c).double().movedim(-2, 1)
    return qkv(D),qkv(D),qkv(V),window,None if p is None else torch.randn(p, *table, D).double(),qkv(D) if q_pos else None,None if factor is None else torch.rand(factor, *table).double()

@few
@given(st.data())
def test_oracle(data):
    d = data.draw(st.integers(1, 4))
    grid = [data.draw(st.integers(1, (9,6,4,3)[d-1])) for _ in range(d)]
    window = [data.draw(st.integers(0, 4)) for _ in range(d)]
    p,factor = (data.draw(st.sampled_from([None,1,3])) for _ in range(2))
    args = make(grid, window, B=data.draw(st.integers(1, 3)), p=p, q_pos=data.draw(st.booleans()), factor=factor, contiguous=data.draw(st.booleans()))
    options = dict(causal=data.draw(st.booleans()), combine=data.draw(st.sampled_from(['add','multiply'])) if p else 'add')
    same(args, options, data.draw(st.sampled_from([None,'dense',1,2,3,4,[1+i for i in range(d)]])))

@pytest.mark.parametrize('combine,causal,p,factor', itertools.product(('add','multiply'), (False,True), (None,1,3), (None,1,3)))
def test_every_option(combine, causal, p, factor):
    if p is None and combine=='multiply': return
    for block in (3,'dense'): same(make((5,7), (2,1), p=p, q_pos=True, factor=factor), dict(combine=combine, causal=causal), block)

def test_many_tiles():
    "More logits than one tile holds, in blocks and slabs"
    for grid,window in (((3000,),(5,)), ((40,37),(2,2))):
        args = [o.float() if torch.is_tensor(o) else o for o in make(grid, window, p=1, factor=3)]
        same([o.double() if torch.is_tensor(o) else o for o in args], {}, 2 if len(grid)==2 else 400)
        if len(grid)==2: same([o.double() if torch.is_tensor(o) else o for o in args], {}, 'dense')

@pytest.mark.parametrize('B,D,V', [(0,4,5), (2,4,0)])
def test_nothing(B, D, V):
    q,k,v,*_ = make((3,4), (1,1), B=B, D=D, V=V)
    y = local_attention(q.requires_grad_(), k, v, 1)
    assert y.shape==(B,3,3,4,V)
    y.sum().backward()
    assert q.grad.shape==q.shape

@pytest.mark.parametrize('block', [4,'dense'])
@pytest.mark.parametrize('dtype', [torch.bfloat16,torch.float16])
def test_halves(block, dtype):
    q,k,v,window,p,q_pos,factor = [o.float() if torch.is_tensor(o) else o for o in make((6,6), (2,2), p=3, q_pos=True, factor=1)]
    want = local_attention(q, k, v, window, p, q_pos, factor, block=block)
    for o in (q,k,v,p,factor): o.requires_grad_()
    with torch.autocast('cpu', dtype): y = local_attention(q, k, v, window, p, q_pos, factor, block=block)
    assert y.dtype==dtype
    y.float().sum().backward()
    assert all(o.grad.isfinite().all() and o.grad.dtype==torch.float32 for o in (q,k,v,p,factor))
    torch.testing.assert_close(y.float(), want, rtol=0.05, atol=0.05)
    h = local_attention(*(o.detach().to(dtype) if torch.is_tensor(o) else o for o in (q,k,v,window,p,q_pos,factor)), block=block)
    torch.testing.assert_close(h.float(), want, rtol=0.05, atol=0.05)

def test_extremes():
    "Huge logits, and factors of 0, give finite numbers and gradients"
    q,k,v,window,p,_,factor = make((5,5), (1,1), p=1, factor=1)
    for block in (2,'dense'):
        for scale,f in ((1e150,1), (1,0)):
            ins = [o.clone().requires_grad_() for o in (scale*q,k,v)]
            y = local_attention(*ins, window, p, None, f*factor, block=block)
            y.sum().backward()
            assert y.isfinite().all() and all(o.grad.isfinite().all() for o in ins)

@pytest.mark.parametrize('block', [2,'dense'])
def test_compile_export(block):
    q,k,v,window,p,q_pos,factor = [o.float() if torch.is_tensor(o) else o for o in make((5,4), (1,1), p=3, q_pos=True, factor=1)]
    class M(torch.nn.Module):
        def forward(self, q, k, v, p, factor): return local_attention(q, k, v, window, p, q, factor, block=block)
    want = M()(q, k, v, p, factor)
    torch.testing.assert_close(torch.compile(M(), fullgraph=True, backend='aot_eager')(q, k, v, p, factor), want)
    with torch.no_grad(): torch.testing.assert_close(torch.export.export(M(), (q, k, v, p, factor)).module()(q, k, v, p, factor), want)
    ins = [o.clone().requires_grad_() for o in (q,k,v,p,factor)]
    torch.compile(M(), backend='aot_eager')(*ins).sum().backward()
    other = [o.clone().requires_grad_() for o in (q,k,v,p,factor)]
    M()(*other).sum().backward()
    for a,b in zip(ins, other): torch.testing.assert_close(a.grad, b.grad)

def test_cheapest():
    "Blocks for narrow windows, the dense form for wide ones"
    def form(grid, reach, has_p): return _cheapest(Window(grid, reach), 16, has_p)[0]
    assert form((32,32), (3,3), True)!='dense' and form((32,32), (31,31), True)=='dense'
    assert form((1024,), (8,), True)!='dense' and form((8,), (7,), False)=='dense'

@pytest.mark.parametrize('change,message', [(dict(k=(2,3,4,5,6)), 'q, k and v must be'), (dict(window=(1,)), 'window must be'), (dict(window=-1), 'window must be'), (dict(combine='times'), "combine must be"),
    (dict(p=(3,3,5,4)), 'p must be'), (dict(factor=(2,3,3)), 'factor must be'), (dict(q_pos=(2,3,4,4,4)), 'q_pos must be'),
    (dict(block=0), 'block must be'), (dict(block='dnse'), 'block must be'), (dict(block=(2,)), 'one for each of the 2')])
def test_bad(change, message):
    args = dict(q=(2,3,4,5,4), k=(2,3,4,5,4), v=(2,3,4,5,4), window=1, **{k: v for k,v in change.items() if k not in ('k','window')})
    args.update(change)
    with pytest.raises(ValueError, match=message): local_attention(**{k: torch.zeros(o) if isinstance(o, tuple) and len(o)>2 else o for k,o in args.items()})
