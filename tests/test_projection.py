"Self-projection against a float64 oracle, and against the package of that name where it is installed"
import copy,pickle
import pytest,torch
from hypothesis import given,settings,strategies as st
from fastattn.layers.projection import SelfProjection

few = settings(deadline=None, derandomize=True, max_examples=40)

def oracle(l, x):
    "The formula with loops over the leading dimensions; `x` (*, I, J)"
    def norm(x, g, b): return g*(x-x.mean())/(x.std()+l.eps)+b
    ps,rs = [],[]
    for o in x.reshape(-1, *x.shape[-2:]):
        left,right = o@l.original_xj_y,o.T@l.permuted_xj_y
        r = torch.outer(norm(left.sum(0), l.gamma_o_sum, l.beta_o_sum)+1, norm(right.sum(0), l.gamma_p_sum, l.beta_p_sum)+1)
        a,b = norm(l.original_xi_y.T@left, l.gamma_o, l.beta_o),norm(l.permuted_xi_y.T@right, l.gamma_p, l.beta_p)
        ps.append(norm((a*r)@(b*r), l.gamma, l.beta))
        rs.append(r)
    s = l.size_projection
    shape = (*x.shape[:-2], s, s)
    return [torch.stack(o).view(shape) if o else x.new_zeros(shape) for o in (ps,rs)]

def layer(size, s, dtype=torch.double):
    torch.manual_seed(0)
    l = SelfProjection(size, s, dtype=dtype)
    for p in l.parameters(): p.data += 0.2*torch.randn_like(p)
    return l

def results(f, l, x):
    x = x.detach().clone().requires_grad_()
    ys = f(l, x)
    if not x.numel(): return ys
    torch.manual_seed(1)
    sum((y*torch.randn_like(y)).sum() for y in ys).backward()
    res = [*ys, x.grad, *(p.grad.clone() for p in l.parameters() if p.grad is not None)]
    l.zero_grad()
    return res

@few
@given(lead=st.lists(st.integers(0,3), max_size=3), i=st.integers(1,9), j=st.integers(1,9), s=st.integers(2,6), transposed=st.booleans())
def test_oracle(lead, i, j, s, transposed):
    l = layer((i,j), s)
    x = torch.randn(*lead, j, i).double().mT if transposed else torch.randn(*lead, i, j).double()
    a,b = results(lambda l,x: l(x), l, x),results(oracle, l, x)
    for o,p in zip(a, b): torch.testing.assert_close(o, p, rtol=1e-6, atol=1e-6)

@pytest.mark.parametrize('size,s', [((28,28),8), ((7,20),5), ((20,7),5)])
def test_package(size, s):
    "Outputs, gradients and state dict of self-projection 0.1.0"
    peer = pytest.importorskip('self_projection').SelfProjection
    ours = layer(size, s, torch.float32)
    theirs = peer(torch.Size(size), s)
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, *size)
    a,b = results(lambda l,x: l(x), ours, x),results(lambda l,x: l(x), theirs, x)
    for o,p in zip(a[:3], b[:3]): torch.testing.assert_close(o, p, rtol=1e-3, atol=1e-3)
    for k,p in ours.named_parameters(): assert p.shape==dict(theirs.named_parameters())[k].shape

@pytest.mark.parametrize('dtype', [torch.bfloat16,torch.float16])
@pytest.mark.parametrize('kind', ['random','constant','zero','large'])
def test_autocast(dtype, kind):
    l = layer((12,9), 5, torch.float32)
    x = dict(random=torch.randn(3,12,9), constant=torch.full((3,12,9), 2.), zero=torch.zeros(3,12,9), large=300*torch.randn(3,12,9))[kind].requires_grad_()
    with torch.autocast('cpu', dtype): ys = l(x)
    sum(y.sum() for y in ys).backward()
    assert all(o.isfinite().all() for o in (*ys, x.grad, *(p.grad for p in l.parameters())))
    if kind=='random':
        for a,b in zip(ys, l(x)): torch.testing.assert_close(a, b)

def test_copies_compile_export():
    l,x = layer((6,5), 4, torch.float32),torch.randn(3,6,5)
    for f in (copy.deepcopy(l), pickle.loads(pickle.dumps(l)), torch.compile(l, fullgraph=True, backend='aot_eager'), torch.export.export(l, (x,)).module()):
        for a,b in zip(f(x), l(x)): torch.testing.assert_close(a, b)

@pytest.mark.parametrize('args,message', [(((0,3),4), 'size_input'), (((3,),4), 'size_input'), (((3,3),1), 'size_projection'), (((3,3),0), 'size_projection'),
    ((28,8), r'size_input must be two positive sizes, \(rows, columns\), got 28'), ((None,8), 'size_input'), (('ab',8), 'size_input'), (((3,2.5),8), 'columns of size_input'), (((3,3),2.5), 'size_projection'),
    *((((3,3),4,eps), 'eps must be a number, at least 0 and finite') for eps in (None,-1,float('nan'),float('inf'),'1e-5'))])
def test_bad_arguments(args, message):
    with pytest.raises(ValueError, match=message): SelfProjection(*args)

def test_bad_input():
    l = layer((6,5), 4, torch.float32)
    for shape in ((2,5,6), (6,), (2,6,4)):
        with pytest.raises(ValueError, match=r'size_input=\(6, 5\)'): l(torch.zeros(shape))
    with pytest.raises(TypeError, match='floating point'): l(torch.zeros(2,6,5, dtype=torch.long))

def test_meta_forward():
    l = SelfProjection((6,5), 4, device='meta')
    ys = l(torch.empty(3, 6, 5, device='meta', requires_grad=True))
    sum(y.sum() for y in ys).backward()
    assert all(y.is_meta and y.shape==(3,4,4) for y in ys)

def test_one_graph_for_all_batches():
    torch._dynamo.reset()
    counter,l = torch._dynamo.testing.CompileCounter(),layer((6,5), 4, torch.float32)
    f = torch.compile(l, backend=counter, fullgraph=True)
    for b in range(2, 14): f(torch.randn(b, 6, 5))[0].sum().backward()
    assert counter.frame_count<=2

def sized(size, n=8):
    "`DataLoaders` of random images"
    from fastai.basics import DataLoaders
    items = [(torch.randn(1, size, size),i%3) for i in range(n)]
    return DataLoaders.from_dsets(items, items, bs=4, num_workers=0)

@pytest.mark.parametrize('kind', ['projection','dropconnect'])
def test_images_of_another_size_in_training(kind):
    "Refused in words that say what to do; and that is what works"
    from fastai.losses import CrossEntropyLossFlat
    from fastattn.learner import dropconnect_learner,projection_learner
    args = dict(n_out=3, loss_func=CrossEntropyLossFlat())
    learn = projection_learner(sized(6), 4, **args) if kind=='projection' else dropconnect_learner(sized(6), (5,), **args)
    advice = r'put nn.AdaptiveAvgPool2d\(\(6, 6\)\) in front' if kind=='projection' else 'put nn.AdaptiveAvgPool2d in front of nn.Flatten'
    with learn.no_bar(),learn.no_logging():
        learn.fit(1)
        learn.dls = sized(9)
        with pytest.raises(ValueError, match=f'to train on images of several sizes, {advice}'): learn.fit(1)
        learn.model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d((6,6)), learn.model)
        for size in (6,9,12):
            learn.dls = sized(size)
            learn.fit(1)
