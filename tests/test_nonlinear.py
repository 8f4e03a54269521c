"Rotation, local 2-D attention, the non-linear transformer, its training and writing, and matrices of tokens"
import copy,math
import pytest,torch
from fractions import Fraction
from hypothesis import given,settings,strategies as st
from matplotlib import pyplot as plt
from fastai.basics import DataLoaders,load_learner,set_seed
from fastai.callback.training import ShortEpochCallback
from fastai.torch_core import default_device
from torch import nn
from torch.utils.data import TensorDataset
from fastattn.callback import Autocast,MaskTokens,SpanRecorder,masked_accuracy
from fastattn.interpret import show_grids
from fastattn.layers.local import local_attention
from fastattn.layers.local2d import Local2DAttention,NonLinearBlock
from fastattn.layers.position import GaussianSpan,rotary
from fastattn.learner import nonlinear_learner
from fastattn.models.nonlinear import NonLinearTransformer,_halton
from fastattn.recipes.data import TokenMatrices,get_tokens
from fastattn.recipes.train import train
from test_device import no_waits

few = settings(deadline=None, derandomize=True, max_examples=30)

def small(**kwargs):
    torch.manual_seed(0)
    return NonLinearTransformer(**{**dict(vocab_size=7, embed_size=16, matrix_dim=5, heads=2, window_size=1, iterations=2), **kwargs})

# Rotation

def rotated(x, base):
    "By complex numbers, position by position"
    y,grid = torch.empty_like(x),x.shape[2:-1]
    d,n = len(grid),x.shape[-1]//(2*len(grid))
    for at in torch.cartesian_prod(*(torch.arange(s) for s in grid)).view(-1, d).tolist():
        for i in range(d):
            for j in range(n):
                a,b = 2*i*n+j,2*i*n+n+j
                place = (slice(None),slice(None),*at)
                z = torch.complex(x[(*place,a)], x[(*place,b)])*complex(math.cos(t := at[i]*base**(-j/n)), math.sin(t))
                y[(*place,a)],y[(*place,b)] = z.real,z.imag
    return y

@few
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(1, 3), st.integers(0, 2))
def test_rotary(grid, n, batch):
    x = torch.randn(batch, 2, *grid, 2*len(grid)*n).double().requires_grad_()
    y = rotary(x, 50.)
    torch.testing.assert_close(y, rotated(x.detach(), 50.), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=1e-5)
    g = torch.randn_like(y)
    back, = torch.autograd.grad(y, x, g)
    torch.testing.assert_close((back*x).sum(), (g*y).sum(), rtol=1e-4, atol=1e-4) # the gradient is rotated back

def test_rotary_is_relative():
    q,k = (rotary(torch.randn(12, dtype=torch.float64).expand(1, 1, 4, 5, 6, 12))[0,0] for _ in range(2))
    logits = torch.einsum('abcd,efgd->abcefg', q, k)
    torch.testing.assert_close(logits[1:,2:,3:,1:,2:,3:], logits[:-1,:-2,:-3,:-1,:-2,:-3], rtol=1e-5, atol=1e-5)

def test_rotary_precision_and_errors():
    x = torch.randn(1, 1, 3, 3, 8)
    for dtype in (torch.bfloat16,torch.float16): assert rotary(x.to(dtype)).dtype==dtype
    for bad in (torch.randn(1, 1, 3, 3, 6),torch.randn(1, 1, 8)):
        with pytest.raises(ValueError, match='a multiple of'): rotary(bad)

# The layer

def by_cell(x, w):
    y = torch.empty_like(x)
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            near = x[:,max(0, i-w):i+w+1,max(0, j-w):j+w+1].flatten(1, 2)
            y[:,i,j] = ((near@x[:,i,j,:,None]/x.shape[-1]**0.5).softmax(1)*near).sum(1)
    return y

@few
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(0, 4))
def test_parity_with_cells(batch, rows, cols, w):
    x = torch.randn(batch, rows, cols, 5).double().requires_grad_()
    a,b = local_attention(*[x[:,None]]*3, window=w)[:,0],by_cell(x, w)
    torch.testing.assert_close(a, b)
    g = torch.randn_like(a)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, g)[0] for y in (a,b)))

def test_parity_with_package():
    peer = pytest.importorskip('heptapod.model')
    x = torch.randn(2, 7, 9, 16).double().requires_grad_()
    a,b = local_attention(*[x[:,None]]*3, window=2)[:,0],peer.Local2DAttention(16, 2)(x)
    torch.testing.assert_close(a, b)
    g = torch.randn_like(a)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, g)[0] for y in (a,b)))

def test_layer_formula():
    "Projections, bias, rotation and window, against all pairs"
    m,x = Local2DAttention(16, 1, heads=2).double(),torch.randn(2, 4, 5, 16).double()
    q,k,v = m.qkv(x).unflatten(-1, (3,2,8)).permute(3, 0, 4, 1, 2, 5)
    q,k = rotary(q+m.u.view(2, 1, 1, 8)).flatten(2, 3),rotary(k).flatten(2, 3)
    at = torch.cartesian_prod(torch.arange(4), torch.arange(5))
    near = ((at[:,None]-at).abs()<=1).all(-1)
    y = (q@k.mT/8**0.5).masked_fill(~near, -torch.inf).softmax(-1)@v.flatten(2, 3)
    torch.testing.assert_close(m(x), m.proj(y.transpose(1, 2).flatten(2)).unflatten(1, (4,5)))
    assert m.v is None and all(p.grad is not None for p in m.parameters()) if m(x).sum().backward() is None else False

@pytest.mark.parametrize('window', [0,1,(1,3),None,'gaussian',GaussianSpan(2, 0.2, heads=2)])
@pytest.mark.parametrize('shape', [(2,5,6),(1,1,1),(0,3,4),(2,1,7)])
def test_windows_and_shapes(window, shape):
    block = NonLinearBlock(Local2DAttention(16, copy.deepcopy(window), 2))
    x = torch.randn(*shape, 16, requires_grad=True)
    y = block(x)
    y.sum().backward()
    assert y.shape==x.shape and x.grad.isfinite().all()

def test_precision():
    m,x = Local2DAttention(16, 2, 2),torch.randn(2, 6, 6, 16)
    for dtype in (torch.bfloat16,torch.float16):
        with torch.autocast('cpu', dtype): y = m(x)
        assert y.dtype==dtype
        torch.testing.assert_close(y.float(), m(x), rtol=0.1, atol=0.05)

@pytest.mark.parametrize('make,match', [
    (lambda: Local2DAttention(20, 3, heads=2), 'a multiple of 4'),
    (lambda: Local2DAttention(16, 3, heads=3), 'heads must divide dim'),
    (lambda: Local2DAttention(16, -1, 2), 'window_size must be a whole number, at least 0'),
    (lambda: Local2DAttention(16, 2.5, 2), 'whole number'),
    (lambda: Local2DAttention(16, (1,2,3), 2), 'one for each of the 2'),
    (lambda: Local2DAttention(16, 2, 2)(torch.randn(2, 4, 16)), r'got shape \(2, 4, 16\)'),
    (lambda: small(vocab_size=0), 'vocab_size must be at least 1'),
    (lambda: small(iterations=0), 'iterations must be at least 1'),
    (lambda: small(n_labels=-1), 'n_labels must be at least 0'),
    (lambda: small(matrix_dim=(3,0)), 'matrix_dim must be 2 whole numbers'),
    (lambda: small(embed_size=20), 'a multiple of 4'),
    (lambda: small()(torch.full((5,5), 7)), 'from 0 to 6, got 7 to 7'),
    (lambda: small()(torch.full((5,5), -1)), 'from 0 to 6, got -1'),
    (lambda: small()(torch.zeros(5, 5)), 'tokens must be whole numbers'),
    (lambda: small()(torch.zeros(1, 1, 5, 5, dtype=torch.long)), 'tokens must be whole numbers, .batch, rows, columns'),
    (lambda: small()(torch.zeros(5, 5, dtype=torch.long), torch.zeros(5, 4, dtype=torch.bool)), 'mask must be bool'),
    (lambda: small()(torch.zeros(5, 5, dtype=torch.long), label=1), 'a label needs a model with classes'),
    (lambda: small(n_labels=3)(torch.zeros(5, 5, dtype=torch.long), label=4), 'label must be from 0 to 2'),
    (lambda: small(n_labels=3).generate((2,5,5), label=torch.tensor([0,1,2])), 'one for each of 2'),
    (lambda: small().generate(steps=0), 'steps must be at least 1'),
    (lambda: small().generate(temperature=-1), 'temperature must be at least 0'),
    (lambda: small().generate(temperature=math.nan), 'temperature must be at least 0'),
    (lambda: small().generate(temperature=math.inf), 'temperature must be at least 0'),
    (lambda: small().generate(temperature=1e-39), 'temperature must be at least 0, and 0 or from 1e-6'),
    (lambda: small().generate(temperature='hot'), 'temperature must be at least 0'),
    (lambda: small().generate(torch.full((5,5), -2)), 'prompt must be -1, or tokens from 0 to 6, got -2'),
    (lambda: small().generate(torch.zeros(5, 5)), 'prompt must be whole numbers'),
    (lambda: small(n_labels=3).classify(torch.zeros(5, dtype=torch.long)), r'tokens must be whole numbers, .* of shape \(5,\)'),
    (lambda: small(n_labels=3).classify(torch.zeros(5, 5)), 'tokens must be whole numbers'),
    (lambda: small(n_labels=3).classify(torch.full((5,5), -1)), 'known in one cell'),
    (lambda: small(n_labels=3).classify(torch.full((5,5), -3)), 'tokens must be -1 where'),
    (lambda: small()(torch.ones(5, 5, dtype=torch.bool)), 'tokens must be whole numbers'),
    (lambda: small(n_labels=3)(torch.zeros(5, 5, dtype=torch.long), label=0.5), 'label must be whole numbers'),
    (lambda: small().generate(top_k=0), 'top_k must be at least 1'),
    *[(lambda o=o: small().generate(order=o), 'unknown order') for o in ('halten','',None,3,[0,1])],
    (lambda: small().generate(order='halten'), "Did you mean 'halton'"),
    (lambda: small().generate(order=torch.arange(25)), r'order must be whole numbers, one for each cell of 5x5, got torch.int64 of shape \(25,\)'),
    (lambda: small().generate((2,5,5), order=torch.arange(75).view(3, 5, 5)), 'one for each cell of 5x5'),
    (lambda: small().generate(order=torch.arange(25.).view(5, 5)), 'order must be whole numbers'),
    (lambda: small().generate(order=torch.arange(1, 26).view(5, 5)), 'each rank from 0 to 24 once, got 1 to 25'),
    (lambda: small().generate(order=torch.arange(25).clamp(min=1).view(5, 5)), 'each rank from 0 to 24 once'),
    (lambda: small().generate((2,5,5), order=torch.arange(50).view(2, 5, 5)), 'each rank from 0 to 24 once, got 0 to 49'),
    *[(lambda o=o: small(n_labels=3).generate(label=1, guidance=o), 'guidance must be from 0 to 1e6') for o in (-1,math.nan,math.inf,'1',None)],
    (lambda: small().generate(guidance=1.), 'guidance needs a model with classes'),
    (lambda: small(n_labels=3).generate(guidance=1.), 'guidance needs the class to write'),
    *[(lambda o=o: small().generate(remask=o), 'remask must be at least 0 and below 1') for o in (-0.1,1,1.5,math.nan,'0.1',None)],
    *[(lambda o=o: small().generate(top_p=o), 'top_p must be above 0 and at most 1') for o in (0,-0.1,1.1,math.nan,'1',None)],
    (lambda: small().generate((5,)), 'prompt must be 2 whole numbers'),
    (lambda: small().generate(5), 'prompt must be 2 whole numbers'),
    (lambda: small().generate((5,0)), 'prompt must be 2 whole numbers'),
    (lambda: small().generate(torch.zeros(0, 5, dtype=torch.long)), 'not empty'),
    (lambda: small().generate(torch.full((5,5), 9)), 'tokens from 0 to 6, got 9'),
    (lambda: small().generate(torch.zeros(5, dtype=torch.long)), 'prompt must be'),
    (lambda: small().classify(torch.zeros(5, 5, dtype=torch.long)), 'classify needs a model with classes'),
    (lambda: small(n_labels=3).classify(torch.zeros(5, 5, dtype=torch.long), rounds=0), 'rounds must be at least 1'),
    (lambda: MaskTokens(p_label=2), 'p_label is a probability')])
def test_errors(make, match):
    with pytest.raises(ValueError, match=match): make()

# The model

def test_readme_call():
    model = NonLinearTransformer(vocab_size=100, embed_size=128, matrix_dim=10, heads=8, window_size=3, iterations=2)
    x = torch.randint(0, 100, (10,10))
    assert model(x).shape==(10,10,100)
    torch.testing.assert_close(model(x[None].expand(3, -1, -1))[1], model(x), rtol=1e-4, atol=1e-4)
    assert model(torch.randint(0, 100, (2,4,7))).shape==(2,4,7,100)

def test_masked_tokens_do_not_matter():
    m,tokens = small(),torch.randint(0, 7, (2,5,6))
    mask = torch.rand(tokens.shape)<0.5
    torch.testing.assert_close(m(tokens, mask), m(torch.where(mask, 3, tokens), mask))
    torch.testing.assert_close(m(tokens, mask), m(torch.where(mask, -9, tokens), mask))
    assert (m(tokens, mask)-m(tokens)).abs().max()>1e-3

def test_rows_and_columns_are_seen():
    "A matrix of nothing has other scores in every cell, and is not its transpose's"
    m = small(window_size=2)
    y = m(torch.zeros(6, 6, dtype=torch.long), torch.ones(6, 6, dtype=torch.bool)).flatten(0, 1)
    assert torch.cdist(y, y).fill_diagonal_(1).min()>1e-3

def test_depth_and_iterations():
    once,twice = small(iterations=1),small(iterations=2)
    twice.load_state_dict(once.state_dict())
    assert sum(p.numel() for p in once.parameters())==sum(p.numel() for p in twice.parameters())
    x = torch.randint(0, 7, (5,5))
    assert (once(x)-twice(x)).abs().max()>1e-4 and len(small(depth=3).blocks)==3
    windows = [b.attn.window((9,9)) for b in small(depth=4, global_every=2).blocks]
    assert windows==[(1,1),(8,8)]*2

def test_activations_stay_finite():
    m = small(depth=12, iterations=2)
    x = m.embed(torch.randint(0, 7, (1,8,8)))
    for _ in range(2): x = m.blocks(x)
    assert x.std()<100

def test_labels():
    m,x = small(n_labels=3),torch.randint(0, 7, (2,5,5))
    torch.testing.assert_close(m(x, label=1), m(x, label=torch.tensor([1,1])))
    torch.testing.assert_close(m(x), m(x, label=3)) # no class
    assert (m(x, label=0)-m(x, label=1)).abs().max()>1e-3

def test_copies_compile_export():
    m,x = small(n_labels=2).eval(),torch.randint(0, 7, (2,5,6))
    mask = torch.rand(x.shape)<0.5
    want = m(x, mask, torch.tensor([0,1]))
    fresh = small(n_labels=2)
    fresh.load_state_dict(m.state_dict())
    torch._dynamo.reset()
    exported = torch.export.export(m, (x,mask,torch.tensor([0,1]))).module()
    for o in (copy.deepcopy(m),fresh,torch.compile(m, backend='eager', fullgraph=True),exported): torch.testing.assert_close(o(x, mask, torch.tensor([0,1])), want, rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('dtype', [torch.uint8,torch.int16,torch.int32])
def test_small_types(dtype):
    m,x = small(n_labels=3).eval(),torch.randint(0, 7, (2,5,5))
    mask = torch.rand(x.shape)<0.5
    assert torch.equal(m(x.to(dtype), mask), m(x, mask)) and torch.equal(m(x.to(dtype)), m(x))
    g = lambda o: m.generate(o, temperature=0)
    assert torch.equal(g(x.to(dtype)), x)
    c = lambda o: m.classify(o, generator=torch.Generator().manual_seed(0))
    assert torch.equal(c(x.to(dtype)), c(x))
    assert torch.equal(m(x, label=torch.tensor([0,1], dtype=dtype)), m(x, label=torch.tensor([0,1])))

def test_every_parameter_has_a_gradient():
    "Also in batches without a mask or a class, as DistributedDataParallel asks"
    m,x = small(n_labels=3),torch.randint(0, 7, (2,5,5))
    for kwargs in ({}, dict(mask=torch.zeros_like(x, dtype=torch.bool)), dict(mask=torch.ones_like(x, dtype=torch.bool)), dict(label=1)):
        m.zero_grad()
        m(x, **kwargs).sum().backward()
        assert all(p.grad is not None for p in m.parameters() if p.requires_grad)

@pytest.mark.parametrize('kwargs', [{},dict(n_labels=3),dict(window_size=None),dict(window_size='gaussian'),dict(global_every=2)])
@pytest.mark.parametrize('shape', [(1,5,20),(5,6),(0,3,3)])
def test_meta(kwargs, shape):
    "Forward and backward, by models that were moved there and that were built there; labels by numbers and by tensors"
    x = torch.zeros(shape, dtype=torch.long, device='meta')
    with torch.device('meta'): built = small(iterations=1, **kwargs)
    for m in (built,small(iterations=1, **kwargs).to('meta')):
        for label in (1,torch.zeros(shape[:-2], dtype=torch.long, device='meta')) if m.label else (None,):
            y = m(x, x.bool(), label)
            y.sum().backward()
            assert y.is_meta and y.shape==(*shape,7) and m(x, label=label).shape==y.shape

def test_values_are_not_read():
    "Wrong tokens and labels raise on a CPU; with right ones no value is read"
    m,x = small(n_labels=3),torch.randint(0, 7, (2,5,5))
    with no_waits(torch.device('cpu')): m(x, x==3, 1).sum().backward()
    with no_waits(torch.device('cpu')): m(x, x==3, torch.tensor([0,3])).sum().backward()
    for bad in (7,-1,10**12):
        with pytest.raises(ValueError, match=f'tokens must be from 0 to 6, got .*{bad}'): m(x.index_fill(1, torch.tensor(2), bad))
        with pytest.raises(ValueError, match=f'label must be from 0 to 2 .or 3 for none., got {bad} to {bad}'): m(x, label=bad if bad!=7 else torch.tensor(7))

@pytest.fixture
def alone(tmp_path):
    "A group of one process"
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/group', rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()

@pytest.mark.parametrize('n_labels', [0,3])
def test_ddp(alone, n_labels):
    "Batches with and without masks and classes, in turn: DistributedDataParallel wants a gradient of every parameter in each"
    m,x = small(n_labels=n_labels),torch.randint(0, 7, (2,5,5))
    parallel = nn.parallel.DistributedDataParallel(m)
    masks = (None,torch.zeros_like(x, dtype=torch.bool),x==3,torch.ones_like(x, dtype=torch.bool),None)
    for i,mask in enumerate(masks):
        m.zero_grad()
        parallel(x, mask, i%4 if n_labels else None).square().sum().backward()
        assert all(p.grad is not None for p in m.parameters() if p.requires_grad)
        assert (m.masked.grad.abs().max()>0)==(mask is not None and mask.any().item())

# Writing

@few
@given(st.data())
def test_given_tokens_stay(data):
    m,shape = small(),[data.draw(st.integers(1, 3)),data.draw(st.integers(1, 6)),data.draw(st.integers(1, 6))]
    prompt = torch.randint(0, 7, shape).masked_fill(torch.rand(shape)<data.draw(st.sampled_from([0.,0.5,1.])), -1)
    before,steps = prompt.clone(),data.draw(st.integers(1, 40))
    frames = m.generate(prompt, steps=steps, frames=True, temperature=data.draw(st.sampled_from([0.,1.])), top_k=data.draw(st.sampled_from([None,3,99])))
    assert (prompt==before).all() and len(frames)==steps+1 and (frames[0]==prompt).all()
    for a,b in zip(frames, frames[1:]): assert (b[a>=0]==a[a>=0]).all() # what is written stays too
    assert ((frames[-1]>=0)&(frames[-1]<7)).all()

def test_generate_is_repeatable():
    m = small(n_labels=3).train()
    def write(**kwargs): return m.generate((2,5,5), generator=torch.Generator().manual_seed(1), **kwargs)
    assert (write()==write()).all() and m.training
    assert (write(temperature=0)==m.generate((2,5,5), temperature=0)).all() and (write(top_k=1, steps=1)==write(temperature=0, steps=1)).all()
    assert m.generate().shape==(5,5) and m.generate((3,4)).shape==(3,4) and m.generate((2,3,4), label=torch.tensor([0,2])).shape==(2,3,4)
    with pytest.raises(ValueError): m.generate((2,5,5), label=7)
    assert m.training

def test_one_cell_at_a_time():
    frames = small().generate((4,5), steps=20, frames=True)
    written = [(o>=0).sum().item() for o in frames]
    assert written[0]==0 and written[-1]==20 and all(a<=b for a,b in zip(written, written[1:]))

# Order, guidance, masking again, nucleus

def halton(rows, cols):
    "Ranks by fractions, point after point"
    def inverse(i, base):
        x,f = Fraction(0),Fraction(1, base)
        while i: x,i,f = x+f*(i%base),i//base,f/base
        return x
    ranks,i = {},1
    while len(ranks)<rows*cols:
        ranks.setdefault((int(inverse(i, 2)*rows),int(inverse(i, 3)*cols)), len(ranks))
        i += 1
    return torch.tensor([[ranks[r,c] for c in range(cols)] for r in range(rows)])

@few
@given(st.integers(1, 12), st.integers(1, 12))
def test_halton(rows, cols): assert torch.equal(_halton(rows, cols), halton(rows, cols))

@few
@given(st.data())
def test_order_is_kept(data):
    "Each step writes the cells of the lowest ranks, as many as the schedule says"
    shape = [data.draw(st.integers(1, 3)),data.draw(st.integers(1, 5)),data.draw(st.integers(1, 5))]
    n,steps,temperature = shape[1]*shape[2],data.draw(st.integers(1, 9)),data.draw(st.sampled_from([0.,1.]))
    each = torch.stack([torch.randperm(n).view(shape[1:]) for _ in range(shape[0])])
    order,ranks = data.draw(st.sampled_from([('halton',halton(*shape[1:]).expand(shape)),(each,each),(each[0].int(),each[:1].expand(shape))]))
    prompt = torch.randint(0, 7, shape).masked_fill(torch.rand(shape)<0.7, -1)
    frames = small().generate(prompt, steps=steps, temperature=temperature, order=order, frames=True)
    for i,frame in enumerate(frames):
        for ours,given_,rank in zip(frame, prompt, ranks):
            todo = (given_<0).sum().item()
            late = rank[given_<0].sort().values[todo-todo*(steps-i)//steps:] # what is still masked
            assert set(rank[ours<0].tolist())==set(late.tolist())
            assert torch.equal(ours[given_>=0], given_[given_>=0])

def test_random_order():
    "Each matrix and call has its own, the generator's"
    def first(seed): return small().generate((50,3,3), steps=9, order='random', frames=True, generator=torch.Generator().manual_seed(seed))[1]>=0
    assert torch.equal(first(0), first(0)) and not torch.equal(first(0), first(1))
    assert (first(0).flatten(1).sum(1)==1).all() and first(0).any(0).all()

def test_neutral_options_change_nothing():
    m = small(n_labels=3)
    def write(**kwargs): return m.generate((3,5,5), label=1, generator=torch.Generator().manual_seed(3), **kwargs)
    want = write()
    for kwargs in (dict(order='certain'), dict(guidance=0), dict(remask=0), dict(top_p=1), dict(top_k=7)): assert torch.equal(write(**kwargs), want)
    assert torch.equal(write(top_p=1e-9, order='halton'), write(temperature=0, order='halton'))
    assert torch.equal(m.generate((3,5,5), label=3, guidance=5., order='halton', temperature=0), m.generate((3,5,5), order='halton', temperature=0)) # no class

def former(model, prompt, steps, generator, label=None, temperature=1.):
    "Writing as it was before there were options"
    tokens,todo = prompt.clamp(min=0),prompt<0
    n = todo.flatten(1).sum(1)
    for i in range(steps):
        logits = model(tokens, todo, label).float()
        left = n*(steps-1-i)//steps
        noise = torch.rand(todo.shape, generator=generator).clamp(1e-6, 1-1e-6).log().neg().log()
        logp = logits.log_softmax(-1)
        keys = -(logp.exp()*logp).sum(-1)+0.5*(1-i/steps)*noise
        rank = keys.masked_fill(~todo, math.inf).flatten(1).argsort(1).argsort(1)
        now = (rank<(todo.flatten(1).sum(1)-left)[:,None]).view_as(todo) & todo
        drawn = torch.multinomial((logits/temperature).softmax(-1).flatten(0, -2), 1, generator=generator).view(todo.shape)
        tokens,todo = torch.where(now, drawn, tokens),todo & ~now
    return tokens

@pytest.mark.parametrize('kwargs', [{},dict(label=torch.tensor([0,3])),dict(temperature=0.7)])
def test_default_is_the_former_way(kwargs):
    m,prompt = small(n_labels=3).eval(),torch.full((2,5,6), -1)
    prompt[:,2] = 4
    ours = m.generate(prompt, steps=7, generator=torch.Generator().manual_seed(0), **kwargs)
    with torch.no_grad(): assert torch.equal(ours, former(m, prompt, 7, torch.Generator().manual_seed(0), **kwargs))

class Scores(NonLinearTransformer):
    "The same scores in every cell, one set for each class, the last for none; calls are counted"
    def __init__(self, *scores):
        super().__init__(len(scores[0]), 4, heads=1, n_labels=len(scores)-1)
        self.scores,self.calls = torch.tensor(scores),0
    def forward(self, tokens, mask=None, label=None):
        self.calls += 1
        label = self._labels(label, len(tokens), tokens.device)
        return self.scores[label][:,None,None].expand(*tokens.shape, -1)

def shares(model, **kwargs):
    "How often each token is written"
    return torch.bincount(model.generate((1,100,200), generator=torch.Generator().manual_seed(0), **kwargs).flatten(), minlength=model.vocab_size)/20000

def test_guidance():
    m = Scores([1.,0.,0.,-1.], [0.,0.,2.,0.], [0.,0.5,0.,0.])
    for w in (0,0.5,2.):
        want = ((1+w)*m.scores[0]-w*m.scores[2]).softmax(0)
        assert (shares(m, label=0, guidance=w, order='random')-want).abs().max()<0.015
    each = m.generate((2,50,50), label=torch.tensor([0,1]), guidance=30., order='halton')
    assert (each[0]==0).all() and (each[1]==2).all() # and on a prompt:
    prompt = torch.full((4,4), -1)
    prompt[0] = 3
    assert m.generate(prompt, label=1, guidance=30.).tolist()==[[3]*4,*[[2]*4]*3]

@pytest.mark.parametrize('top_p,kept', [(0.01,1),(0.49,1),(0.51,2),(0.79,2),(0.81,3),(0.96,4),(1.,4)])
def test_nucleus(top_p, kept):
    probs = torch.tensor([0.3,0.5,0.05,0.15])
    m = Scores(probs.log().tolist(), [0.]*4)
    want = torch.where(torch.isin(torch.arange(4), probs.argsort(descending=True)[:kept]), probs, 0)
    got = shares(m, label=0, top_p=top_p)
    assert ((got>0)==(want>0)).all() and (got-want/want.sum()).abs().max()<0.015

@few
@given(st.data())
def test_remask(data):
    "The schedule and what is given stay; each step masks again the asked share of what was written, as far as the schedule has room"
    m,shape = small(n_labels=3),[data.draw(st.integers(1, 3)),data.draw(st.integers(1, 6)),data.draw(st.integers(1, 6))]
    prompt = torch.randint(0, 7, shape).masked_fill(torch.rand(shape)<data.draw(st.sampled_from([0.,0.6,1.])), -1)
    steps,remask = data.draw(st.integers(1, 9)),data.draw(st.sampled_from([0.25,0.5,0.75]))
    options = dict(order=data.draw(st.sampled_from(['certain','halton','random'])), temperature=data.draw(st.sampled_from([0.,1.])), guidance=data.draw(st.sampled_from([0,1])))
    frames = m.generate(prompt, steps=steps, remask=remask, label=1, frames=True, **options)
    todo = (prompt<0).flatten(1).sum(1)
    for i,(a,b) in enumerate(zip(frames, frames[1:])):
        left = todo*(steps-1-i)//steps
        written = ((prompt<0)&(a>=0)).flatten(1).sum(1)
        assert torch.equal((b<0).flatten(1).sum(1), left)
        assert torch.equal(((a>=0)&(b<0)).flatten(1).sum(1), (remask*written).long().minimum(left))
        assert torch.equal(torch.where(prompt>=0, b, prompt), prompt) and ((a==b)|(a<0)|(b<0)).all()

def test_remask_prefers_the_improbable():
    "Chances are as exp(-probability): with tokens of 0.9 and 0.1, and few cells masked again, 2.2 to 1"
    m = Scores([math.log(0.9),math.log(0.1)], [0.,0.])
    a,b,c = m.generate((1,300,300), steps=3, label=0, order='halton', remask=0.1, frames=True, generator=torch.Generator().manual_seed(0))[1:]
    again = (a>=0)&(b<0)
    odds = (again&(a==1)).sum()/(a==1).sum()/((again&(a==0)).sum()/(a==0).sum())
    assert again.sum()==3000 and odds.item()==pytest.approx(math.exp(0.8), rel=0.15)
    a,b,_ = m.generate((1,30,30), steps=3, label=0, order='halton', remask=0.01, temperature=0, frames=True)[1:]
    assert ((a>=0)&(b<0)).sum()==3

@pytest.mark.parametrize('order', ['certain','halton','random',torch.arange(25).view(5, 5)])
def test_generate_on_meta(order):
    y = small(n_labels=3).to('meta').generate((2,5,5), steps=3, label=1, order=order, guidance=1, remask=0.2, top_p=0.9)
    assert y.is_meta and y.shape==(2,5,5)

@pytest.mark.parametrize('kwargs', [{},dict(remask=0.5),dict(guidance=1),dict(order='halton', remask=0.2, guidance=1, top_p=0.9)])
def test_calls_of_the_model(kwargs):
    m = Scores([0.,0.], [0.,0.])
    m.generate((2,5,5), steps=6, label=0, **kwargs)
    assert m.calls==6

def test_writes_what_it_has_learned():
    "Two patterns, one for each class"
    patterns = torch.stack([torch.arange(16).view(4, 4)%3,(torch.arange(16).view(4, 4)//4)%3])
    data = TokenMatrices(patterns.repeat(32, 1, 1), range(3), torch.arange(64)%2, ['a','b'])
    set_seed(0)
    learn = nonlinear_learner(DataLoaders.from_dsets(data, data, bs=32, device='cpu'), embed_size=32, heads=2, window_size=1, p=0., p_label=0.3)
    with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(30, 1e-2)
    assert learn.recorder.values[-1][-1]>0.95
    for k in range(2): assert (learn.model.generate((5,4,4), label=k)==patterns[k]).all()
    prompt = torch.full((4,4), -1)
    prompt[0] = patterns[1,0]
    assert (learn.model.generate(prompt, temperature=0)==patterns[1]).all() # without a class, by what is given
    logp = learn.model.classify(torch.stack([prompt,patterns[0]]))
    assert logp.argmax(-1).tolist()==[1,0] and logp.exp().sum(-1).allclose(torch.ones(2), atol=1e-4)
    assert learn.model.classify(prompt).shape==(2,)

# Training

class Fake:
    def __init__(self, training, model): self.training,self.model = training,model

def masks(cb, tokens, labels=None, training=True):
    "What the callback makes of a batch"
    cb.learn = Fake(training, small(n_labels=3))
    cb.learn.xb,cb.learn.yb = (tokens,),(() if labels is None else (labels,))
    cb.before_batch()
    return *cb.learn.xb,*cb.learn.yb

def test_mask_tokens():
    tokens,cb = torch.randint(0, 7, (200,8,8)),MaskTokens()
    x,mask,y = masks(cb, tokens)
    assert (x==tokens).all() and (y[mask]==tokens[mask]).all() and (y[~mask]==-100).all()
    share = mask.float().flatten(1).mean(1).sort().values
    want = torch.cos(math.pi/2*(torch.arange(200)+0.5)/200).sort().values
    assert (share-want).abs().mean()<0.06 and mask.flatten(1).any(1).all()
    *_,label,_ = masks(MaskTokens(0.5), tokens, torch.zeros(200, dtype=torch.long))
    assert 60<(label==3).sum()<140 and set(label.tolist())=={0,3}
    *_,label,_ = masks(MaskTokens(1.), tokens[:1,:1,:1], torch.zeros(1, dtype=torch.long))
    assert label.item()==3

def test_validation_is_repeatable():
    tokens,cb = torch.randint(0, 7, (20,8,8)),MaskTokens(1.)
    def seen():
        cb.before_validate()
        return [masks(cb, tokens, torch.zeros(20, dtype=torch.long), training=False) for _ in range(2)]
    (a,b),(c,d) = seen(),seen()
    assert (a[1]==c[1]).all() and (b[1]==d[1]).all() and (a[1]!=b[1]).any() and not a[2].any() # and the class is told

def test_learner(tmp_path):
    set_seed(0)
    dls = get_tokens('digits')
    learn = nonlinear_learner(dls, embed_size=16, heads=2, window_size='gaussian', cbs=Autocast('bf16'))
    assert learn.model.matrix_dim==(8,8) and learn.model.vocab_size==17 and learn.model.label.num_embeddings==11
    with learn.no_bar(),learn.no_logging(): learn.fit(1)
    assert learn.span_recorder.rows[0]['spans'][0]['window']
    learn.path = tmp_path
    learn.export()
    loaded = load_learner(tmp_path/'export.pkl')
    x = dls.valid.one_batch()[0]
    torch.testing.assert_close(loaded.model.eval()(x), learn.model.eval()(x))
    preds,targets = learn.get_preds(with_input=False)
    assert preds.shape==(397,8,8,17) and (targets==-100).any()

def test_learner_without_classes():
    "The data has classes, the model takes none; batches go where fastai puts them"
    dls = get_tokens('digits', levels=256)
    assert dls.device==default_device() and dls.train_ds.tokens.max()==255
    learn = nonlinear_learner(dls, embed_size=16, heads=2, depth=1, n_labels=0, cbs=ShortEpochCallback(0.1))
    with learn.no_bar(),learn.no_logging(): learn.fit(1)
    learn.model = nn.DataParallel(learn.model) # as several GPUs do
    with learn.no_bar(),learn.no_logging(): learn.fit(1)

def test_learner_on_text_and_errors(tmp_path):
    (tmp_path/'a.txt').write_text('to be or not to be, that is the question. '*40)
    dls = get_tokens(tmp_path/'a.txt', size=5, bs=8)
    learn = nonlinear_learner(dls, embed_size=16, heads=2)
    assert learn.model.label is None and learn.model.vocab_size==len(dls.train_ds.vocab)
    with learn.no_bar(),learn.no_logging(): learn.fit(1)
    assert learn.model.generate().shape==(5,5)
    tokens = torch.zeros(20, 4, 4, dtype=torch.long)
    plain = DataLoaders.from_dsets(TensorDataset(tokens), TensorDataset(tokens), bs=4, n_inp=1)
    with pytest.raises(ValueError, match='pass vocab_size'): nonlinear_learner(plain)
    learn = nonlinear_learner(plain, vocab_size=3, embed_size=16, heads=2)
    with learn.no_bar(),learn.no_logging(): learn.fit(1)
    flat = DataLoaders.from_dsets(TensorDataset(tokens.flatten(1)), TensorDataset(tokens.flatten(1)), bs=4, n_inp=1)
    with pytest.raises(ValueError, match='takes matrices of tokens'): nonlinear_learner(flat, vocab_size=3)

def test_masked_accuracy():
    scores = torch.randn(4, 5, 5, 7)
    targets = scores.argmax(-1)
    targets[0] = -100
    targets[1,0,0] = (targets[1,0,0]+1)%7
    assert masked_accuracy(scores, targets).item()==pytest.approx(74/75)

# Data

def test_tokens_are_the_digits():
    from sklearn.datasets import load_digits
    dls,d = get_tokens('digits'),load_digits()
    both = torch.cat([o.tokens for o in (dls.train_ds,dls.valid_ds)]).flatten(1).sort(0).values
    assert (len(dls.train_ds),len(dls.valid_ds))==(1400,397)
    assert (both==torch.tensor(d.images).round().byte().flatten(1).sort(0).values).all()
    assert get_tokens('digits', size=5, levels=2).train_ds.tokens.max()==1

def test_text_matrices(tmp_path):
    text = ''.join(chr(97+i%26) for i in range(1000))
    (tmp_path/'a.txt').write_text(text)
    train,valid = (o.dataset for o in get_tokens(tmp_path/'a.txt', size=4, bs=2))
    def read(m): return ''.join(train.vocab[i] for i in m.flatten())
    assert read(train[1][0])==text[4:20] and read(valid[1][0])==text[916:932]
    assert len(train)==(900-16)//4+1 and len(valid)==6

@pytest.mark.parametrize('kwargs,match', [(dict(data='digit'), "Did you mean 'digits'"), (dict(size=0), 'size must be at least 1'), (dict(levels=1), 'levels must be at least 2'), (dict(levels=257), 'levels must be at most 256'),
    (dict(bs=2000), 'bs must be at most'), (dict(data='text', size=999), 'too short')])
def test_data_errors(kwargs, match):
    with pytest.raises(ValueError, match=match): get_tokens(**kwargs)

def test_train_command(tmp_path):
    runs = train('digits', 'nonlinear', dim=16, heads=2, epochs=1, window_size=['1','none'], depth=1, out=tmp_path).runs
    assert [o['state'] for o in runs]==['done']*2 and 0<runs[0]['value']<1 and runs[0]['metric']=='masked_accuracy' and (tmp_path/'digits-8-1').is_dir()
    with pytest.raises(ValueError, match='tokens cannot be mixed'): train('digits', 'nonlinear', mixup=0.4, out=tmp_path)
    with pytest.raises(ValueError, match='window_size'): train('digits', 'nonlinear', window_size='wide', out=tmp_path)
    with pytest.raises(ValueError, match='Did you mean'): train('digit', 'nonlinear', out=tmp_path)

# Pictures

def test_show_grids():
    film = small().generate((2,4,5), steps=3, frames=True)
    assert len(show_grids(film, 7).axes)==8 and len(show_grids([o[0] for o in film], range(7)).axes)==4
    texts = [t.get_text() for t in show_grids(film[-1:], 'abcdef\n').axes[0].texts]
    assert len(texts)==20 and set(texts)<=set('abcdef↵')
    plt.close('all')

def test_modes_of_parts():
    "Writing and reading leave every part in the mode it was in"
    m = small(n_labels=3).train()
    m.drop.eval()
    m.generate((2,2), label=1)
    m.classify(torch.zeros(2, 2, dtype=torch.long))
    assert m.training and not m.drop.training and m.norm.training
