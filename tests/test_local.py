"Local attention against dense attention in float64: outputs and all gradients"
import itertools
import numpy as np
import pytest,torch
from hypothesis import given,settings,strategies as st
from math import prod
from torch.nn import functional as F
from fastattn.layers import local
from fastattn.layers.local import Window,_cheapest,_groups,local_attention

few = settings(deadline=None, derandomize=True, max_examples=40)

def oracle(q, k, v, window, p=None, q_pos=None, factor=None, log_weight=None, combine='add', causal=False):
    "All pairs; `window` one number for each dimension, or a list of such, one for each head"
    grid,d = q.shape[2:-1],q.dim()-3
    at = torch.stack(torch.meshgrid(*(torch.arange(s) for s in grid), indexing='ij'), -1).flatten(0, -2)
    off,windows = at[None]-at[:,None],window if isinstance(window[0], (tuple,list)) else [window]
    w = torch.tensor(windows).amax(0)
    seen = torch.stack([(off.abs()<=torch.tensor(o)).all(-1) for o in windows]) # (H or 1, N, N)
    place = (torch.minimum(torch.maximum(off, -w), w)+w).unbind(-1)
    logits = q.flatten(2, -2)@k.flatten(2, -2).mT
    if p is not None:
        pos = torch.einsum('bhid,hijd->bhij', (q if q_pos is None else q_pos).flatten(2, -2), p[(slice(None),*place)].expand(q.shape[1], -1, -1, -1))
        logits = logits*pos if combine=='multiply' else logits+pos
    if factor is not None: logits = logits*factor[(slice(None),*place)]
    logits = logits/q.shape[-1]**0.5
    if log_weight is not None: logits = logits+log_weight[(slice(None),*place)]
    if causal: seen = seen & torch.ones(len(at), len(at), dtype=torch.bool).tril()
    return (logits.masked_fill(~seen, -torch.inf).softmax(-1)@v.flatten(2, -2)).unflatten(2, grid)

def same(args, options, block):
    ins = [o.requires_grad_() for o in args if torch.is_tensor(o)]
    ys = local_attention(*args, block=block, **options),oracle(*args, **options)
    torch.testing.assert_close(*ys)
    g = torch.randn(ys[0].shape, dtype=ys[0].dtype)
    for a,b in zip(*(torch.autograd.grad(y, ins, g, allow_unused=True) for y in ys)):
        if a is None or b is None: assert not (a if b is None else b).any() if not (a is b) else True
        else: torch.testing.assert_close(a, b)

def make(grid, window, B=2, H=3, D=4, V=5, p=None, q_pos=False, factor=None, log_weight=None, contiguous=True):
    torch.manual_seed(0)
    widest = [max(o) for o in zip(*window)] if isinstance(window[0], (tuple,list)) else window
    sizes = [2*w+1 for w in widest]
    def qkv(c): return torch.randn(B, H, *grid, c).double() if contiguous else torch.randn(B, *grid, H, c).double().movedim(-2, 1)
    def table(n, *tail): return None if n is None else torch.rand(n, *sizes, *tail).double()-0.5
    return qkv(D),qkv(D),qkv(V),window,table(p, D),qkv(D) if q_pos else None,table(factor),table(log_weight)

@few
@given(st.data())
def test_oracle(data):
    d = data.draw(st.integers(1, 4))
    grid = [data.draw(st.integers(1, (9,6,4,3)[d-1])) for _ in range(d)]
    window = [data.draw(st.integers(0, 4)) for _ in range(d)]
    if data.draw(st.booleans()): window = [[data.draw(st.integers(0, 4)) for _ in range(d)] for _ in range(3)] # one for each head
    tables = {o: data.draw(st.sampled_from([None,1,3])) for o in ('p','factor','log_weight')}
    args = make(grid, window, B=data.draw(st.integers(1, 3)), q_pos=data.draw(st.booleans()), contiguous=data.draw(st.booleans()), **tables)
    options = dict(causal=data.draw(st.booleans()), combine=data.draw(st.sampled_from(['add','multiply'])) if tables['p'] else 'add')
    same(args, options, data.draw(st.sampled_from([None,'dense',1,2,3,4,[1+i for i in range(d)]])))

@pytest.mark.parametrize('combine,causal,p', itertools.product(('add','multiply'), (False,True), (None,1,3)))
def test_every_option(combine, causal, p):
    "All options with each other, in both forms, and with windows of the heads' own"
    if p is None and combine=='multiply': return
    for factor,log_weight,block,window in itertools.product((None,1,3), (None,1,3), (3,'dense'), ((2,1),[(0,1),(2,1),(1,0)])):
        same(make((5,7), window, p=p, q_pos=True, factor=factor, log_weight=log_weight), dict(combine=combine, causal=causal), block)

@pytest.mark.parametrize('block', [4,'dense'])
@pytest.mark.parametrize('tables', [dict(), dict(p=3), dict(factor=1), dict(log_weight=3), dict(p=1, factor=3, log_weight=1)])
def test_derivatives(tables, block):
    "First and second derivatives, forward-mode ones, and `torch.func`, in each form"
    q,k,v,window,*rest = make((4,5), (1,2), B=1, H=2 if 3 not in tables.values() else 3, D=2, V=2, **tables)
    names = [i for i,o in enumerate(rest) if o is not None]
    def f(q, k, v, *given):
        full = list(rest)
        for i,o in zip(names, given): full[i] = o
        return local_attention(q, k, v, window, *full, block=block)
    ins = [o.requires_grad_() for o in (q,k,v,*(rest[i] for i in names))]
    assert torch.autograd.gradcheck(f, ins)
    if tables: assert torch.autograd.gradgradcheck(f, ins, fast_mode=True) # in random directions
    want = f(*ins)
    for a,b in zip(torch.func.grad(lambda *o: f(*o).square().sum(), tuple(range(len(ins))))(*ins), torch.autograd.grad(want.square().sum(), ins)):
        torch.testing.assert_close(a, b)
    tangents = [torch.randn_like(o) for o in ins]
    d = torch.func.jvp(f, tuple(o.detach() for o in ins), tuple(tangents))[1]
    near = [f(*(o.detach()+e*t for o,t in zip(ins, tangents))) for e in (1e-5,-1e-5)]
    torch.testing.assert_close(d, (near[0]-near[1])/2e-5, rtol=1e-5, atol=1e-7)
    stacked = [torch.stack([o.detach(),2*o.detach()]) for o in ins]
    torch.testing.assert_close(torch.func.vmap(f)(*stacked), torch.stack([f(*(o[i] for o in stacked)) for i in range(2)]))

def test_no_second_derivative_is_wrong():
    "A penalty on a gradient has the same gradient in both forms"
    args = make((12,11), (1,2), p=3, log_weight=1)
    ins = [o.requires_grad_() for o in args if torch.is_tensor(o)]
    res = []
    for block in (4,'dense'):
        g, = torch.autograd.grad(local_attention(*args, block=block).square().sum(), args[0], create_graph=True)
        res.append(torch.autograd.grad(g.square().sum(), ins))
    for a,b in zip(*res): torch.testing.assert_close(a, b)

def test_windows_of_heads():
    "However heads are grouped, the numbers are the same; groups follow the cost"
    windows = [(1,1)]*5+[(8,8)]+[(2,1)]*2
    args = make((9,9), windows, H=8, p=8, log_weight=8)
    want = oracle(*args)
    torch.testing.assert_close(local_attention(*args), want)
    torch.testing.assert_close(local_attention(*args, block='dense'), want)
    def area(window): return 1e6*prod(2*o+1 for o in window)
    assert _groups(windows, area)==[[0,1,2,3,4],[6,7],[5]] # the wide head alone
    assert _groups(windows, lambda w: 0)==[[*range(5),6,7,5]] and _groups([(3,)]*4, area)==[[0,1,2,3]]
    assert _groups([(i,) for i in range(8)], lambda w: 1e9*w[0])==[[i] for i in range(8)]

@pytest.mark.parametrize('grid,window,block', [((750,),(5,),200), ((24,24),(2,2),12)])
def test_many_tiles(grid, window, block, monkeypatch):
    "More logits than one tile holds: three blocks in the first of each head, the last in another, forward and backward"
    tiles,seen = local._tiles,[]
    monkeypatch.setattr(local, '_tiles', lambda *args: seen.append(tiles(*args)) or seen[-1])
    same(make(grid, window, p=1, factor=3, log_weight=3), {}, block)
    assert [[(o.start,o.stop) for _,o in each] for each in seen]==[[(0,3),(3,6)]*3]*2

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
    args = [o.float() if torch.is_tensor(o) else o for o in make((6,6), (2,2), p=3, q_pos=True, factor=1, log_weight=3)]
    want,ins = local_attention(*args, block=block),[o.requires_grad_() for o in args if torch.is_tensor(o)]
    with torch.autocast('cpu', dtype): y = local_attention(*args, block=block)
    assert y.dtype==dtype
    y.float().sum().backward()
    assert all(o.grad.isfinite().all() and o.grad.dtype==torch.float32 for o in ins)
    torch.testing.assert_close(y.float(), want, rtol=0.05, atol=0.05)
    h = local_attention(*(o.detach().to(dtype) if torch.is_tensor(o) else o for o in args), block=block)
    torch.testing.assert_close(h.float(), want, rtol=0.05, atol=0.05)

def test_extremes():
    "Huge logits, and factors of 0, give finite numbers and gradients"
    q,k,v,window,p,_,factor,_ = make((5,5), (1,1), p=1, factor=1)
    for block in (2,'dense'):
        for scale,f in ((1e150,1), (1,0)):
            ins = [o.clone().requires_grad_() for o in (scale*q,k,v)]
            y = local_attention(*ins, window, p, None, f*factor, block=block)
            y.sum().backward()
            assert y.isfinite().all() and all(o.grad.isfinite().all() for o in ins)

@pytest.mark.parametrize('block', [2,'dense'])
def test_compile_export(block):
    q,k,v,window,p,_,factor,log_weight = [o.float() if torch.is_tensor(o) else o for o in make((5,4), (1,1), p=3, factor=1, log_weight=3)]
    class M(torch.nn.Module):
        def forward(self, q, k, v, p, factor): return local_attention(q, k, v, window, p, q, factor, log_weight, block=block)
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
    def plain(grid, reach): return _cheapest(Window(grid, reach), 32, False, True)[0] # of PyTorch's attention
    assert plain((16,16), (3,3))=='dense' and plain((16,16), (1,1))!='dense' and plain((32,32), (3,3))!='dense'

def kept_bytes(monkeypatch, f):
    "What autograd keeps for the backward pass of `f`, each storage once, and the result"
    kept,cut_again = {},local._cut_again
    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x
    def watched(cuts):
        hooks = cut_again(cuts)
        def pack(x):
            res = hooks.pack_hook(x)
            keep(res if isinstance(res, torch.Tensor) else res[0])
            return res
        return torch.autograd.graph.saved_tensors_hooks(pack, hooks.unpack_hook)
    with monkeypatch.context() as patch, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        patch.setattr(local, '_cut_again', watched)
        y = f()
    return sum(kept.values()),y

@pytest.mark.parametrize('grid,window,block', [((512,),100,32), ((32,32),7,8), ((20,19),(2,3),(4,8))])
def test_halos_are_not_kept(monkeypatch, grid, window, block):
    "Blocks keep no more than PyTorch's attention with a mask; gradients are the dense ones"
    q,k,v = (torch.randn(2, 2, *grid, 8, requires_grad=True) for _ in range(3))
    mine,y = kept_bytes(monkeypatch, lambda: local_attention(q, k, v, window, block=block))
    mask = torch.zeros(prod(grid), prod(grid))
    theirs,_ = kept_bytes(monkeypatch, lambda: F.scaled_dot_product_attention(*(o.flatten(2, -2) for o in (q,k,v)), mask))
    assert mine<=theirs
    g = torch.randn_like(y)
    for a,b in zip(torch.autograd.grad(y, (q,k,v), g), torch.autograd.grad(local_attention(q, k, v, window, block='dense'), (q,k,v), g)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)

def test_changed_in_place():
    "Refused in the backward pass, as PyTorch does for what it keeps itself"
    q,k,v = (torch.randn(1, 1, 64, 4, requires_grad=True) for _ in range(3))
    keys = k*1
    y = local_attention(q, keys, v, 3, block=8)
    keys.mul_(2)
    with pytest.raises(RuntimeError, match='changed in place'): y.sum().backward()

@pytest.mark.parametrize('grid,reach', [((1,),(0,)), ((7,),(2,)), ((3,5),(1,2)), ((4,1),(3,0)), ((2,3,4),(1,0,2))])
@pytest.mark.parametrize('causal', [False,True])
def test_pairs(grid, reach, causal):
    "Pairs of positions, one by one"
    at = list(itertools.product(*map(range, grid)))
    def sees(i, j): return all(abs(a-b)<=r for a,b,r in zip(at[i], at[j], reach)) and (j<=i or not causal)
    want = torch.tensor([[sees(i, j) for j in range(len(at))] for i in range(len(at))])
    assert Window(grid, reach, causal).pairs('cpu').equal(want)

@pytest.mark.parametrize('change,message', [(dict(k=(2,3,4,5,6)), 'q, k and v must be'), (dict(window=(1,)), 'window must be'), (dict(window=-1), 'window must be'), (dict(window=True), 'window must be'), (dict(window=1.5), 'window must be'), (dict(window=[(1,1)]*2), 'each of the 3, got 2'),
    (dict(log_weight=(2,3,3)), 'log_weight must be'), (dict(q=(2,3,0,5,4), k=(2,3,0,5,4), v=(2,3,0,5,4)), 'at least one position'), (dict(combine='times'), "combine must be"),
    (dict(p=(3,3,5,4)), 'p must be'), (dict(factor=(2,3,3)), 'factor must be'), (dict(q_pos=(2,3,4,4,4)), 'q_pos must be'),
    (dict(block=0), 'block must be'), (dict(block='dnse'), "Did you mean 'dense'"), (dict(block=(2,)), 'one for each of the 2')])
def test_bad(change, message):
    args = dict(q=(2,3,4,5,4), k=(2,3,4,5,4), v=(2,3,4,5,4), window=1, **{k: v for k,v in change.items() if k not in 'qkv' and k!='window'})
    args.update(change)
    with pytest.raises(ValueError, match=message): local_attention(**{k: torch.zeros(o) if isinstance(o, tuple) and len(o)>2 else o for k,o in args.items()})

def test_numpy_numbers():
    q = torch.randn(1, 1, 5, 5, 2)
    torch.testing.assert_close(local_attention(q, q, q, np.int64(1)), local_attention(q, q, q, 1))

def test_whole_numbers_are_refused():
    q = torch.ones(1, 1, 5, 5, 2, dtype=torch.long)
    with pytest.raises(ValueError, match='floating point, got torch.int64'): local_attention(q, q, q, 1)
