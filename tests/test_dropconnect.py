"DropConnect against an oracle that holds the masks, and what must survive in use"
import copy,pickle
import pytest,torch
from hypothesis import given,settings,strategies as st
from torch import nn
import torch.nn.functional as F
from fastattn.layers.dropconnect import DropConnect,_digits,_masks,_ones,dropconnect,_masked_product,to_dropconnect,to_linear

few = settings(deadline=None, derandomize=True, max_examples=40)

def whole_mask(r, i, o, p, seed):
    mask = torch.full((r, o, i), -1.).double()
    for os,rs,m in _masks(r, i, o, p, seed, torch.device('cpu')): mask[rs,os] = m.transpose(0, 1).double()
    assert ((mask==0)|(mask==1)).all() # every place has been drawn
    return mask

def seeded(f, *args, seed=0):
    torch.manual_seed(seed)
    return f(*args)

def next_seed(seed=0): return int(seeded(lambda: torch.randint(2**63-1, ()), seed=seed))

@few
@given(lead=st.lists(st.integers(0,4), max_size=3), i=st.integers(1,70), o=st.integers(1,9), p=st.sampled_from([0.01,0.1,0.25,0.5,0.9,0.999]), bias=st.booleans(), transposed=st.booleans())
def test_oracle(lead, i, o, p, bias, transposed):
    x = (torch.randn(i, *lead).double().movedim(0, -1) if transposed else torch.randn(*lead, i).double()).requires_grad_()
    w,b = torch.randn(o, i).double().requires_grad_(),torch.randn(o).double().requires_grad_() if bias else None
    y = seeded(dropconnect, x, w, b, p)
    rows = x.reshape(-1, i)
    mask = whole_mask(len(rows), i, o, p, next_seed())
    expected = (torch.einsum('roi,oi,ri->ro', mask, w, rows)*2**_digits/_ones(p) + (b if bias else 0)).view(*lead, o)
    torch.testing.assert_close(y, expected)
    given_grad,ins = torch.randn_like(y),[a for a in (x, w, b) if a is not None]
    for a,e in zip(torch.autograd.grad(y, ins, given_grad), torch.autograd.grad(expected, ins, given_grad)): torch.testing.assert_close(a, e)

@pytest.mark.parametrize('r,i,o', [(70,9000,3), (3,2**19+5,2), (300,3,2000)])
def test_many_blocks(r, i, o):
    x,w,g = torch.randn(r, i),torch.randn(o, i),torch.randn(r, o)
    mask,seed = whole_mask(r, i, o, 0.5, 7).float(),torch.tensor(7)
    for args,eq,ops in (((x,w,None),'roi,oi,ri->ro',(w,x)), ((None,w,g),'roi,oi,ro->ri',(w,g)), ((x,None,g),'roi,ri,ro->oi',(x,g))):
        torch.testing.assert_close(_masked_product(*args, seed, 0.5), torch.einsum(eq, mask, *ops), rtol=1e-3, atol=2e-2)

def test_gradients_of_gradients():
    x,w = torch.randn(3, 4).double().requires_grad_(),torch.randn(2, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda *o: seeded(dropconnect, *o), (x, w))
    assert torch.autograd.gradgradcheck(lambda *o: seeded(dropconnect, *o), (x, w))

def test_opcheck():
    x,w,g = torch.randn(3, 4, requires_grad=True),torch.randn(2, 4, requires_grad=True),torch.randn(3, 2, requires_grad=True)
    for args in ((x,w,None), (None,w,g), (x,None,g)): torch.library.opcheck(_masked_product, (*args, torch.tensor(3), 0.5))

@pytest.mark.parametrize('p', [0.5,0.25,0.1,0.9,2**-17,0.99999])
def test_share_kept(p):
    x,w = torch.ones(200, 500),torch.ones(20, 500)
    kept = (seeded(dropconnect, x, w, None, p)*_ones(p)/2**_digits).double().sum()/(200*500*20)
    assert abs(kept-(1-p)) < 5*(p*(1-p)/2e6)**0.5+2**-_digits

def test_masks_differ_and_repeat():
    "Also for a batch of one, one output feature and three axes, where the package dropconnect fails"
    x,l = torch.randn(4, 64),DropConnect(64, 64)
    for shape in ((64,), (1,64), (4,64), (1,1,64), (2,3,64)): assert l(torch.randn(shape)).shape==(*shape[:-1],64)
    assert DropConnect(64, 1)(x).shape==(4,1)
    same = l(x[:1].expand(50, -1))
    assert len(same.unique(dim=0))==50
    assert not torch.equal(l(x), l(x))
    assert torch.equal(seeded(l, x), seeded(l, x)) and not torch.equal(seeded(l, x, seed=1), seeded(l, x))

def test_gaussian():
    "Mean and variance of the Gaussian are those of a million masks"
    x,n = torch.randn(12),1_000_000
    l = DropConnect(12, 3, p=0.3, inference='gaussian')
    with torch.no_grad(): masked,sampled = (seeded(l.train(o), x.expand(n, -1)) for o in (True,False))
    for y in (masked,sampled):
        var = ((l.weight*x)**2).sum(1)*0.3/0.7
        torch.testing.assert_close(y.mean(0), F.linear(x, l.weight, l.bias), rtol=0, atol=5*(var.max()/n).sqrt().item())
        torch.testing.assert_close(y.var(0), var, rtol=0.02, atol=0)

def test_inference():
    l,x = DropConnect(5, 4).eval(),torch.randn(3, 5)
    assert torch.equal(l(x), F.linear(x, l.weight, l.bias))
    g = DropConnect(5, 4, inference='gaussian').eval()
    zero = torch.zeros(2, 5, requires_grad=True)
    g(zero).sum().backward()
    assert zero.grad.isfinite().all()
    assert torch.equal(DropConnect(5, 4, p=0.)(zero*0+1).detach()*0, torch.zeros(2, 4))

@pytest.mark.parametrize('dtype', [torch.bfloat16,torch.float16])
@pytest.mark.parametrize('inference', ['mean','gaussian'])
def test_autocast(dtype, inference):
    l,x = DropConnect(40, 30, inference=inference),(30*torch.randn(6, 40)).requires_grad_()
    for training in (True,False):
        l.train(training)
        with torch.autocast('cpu', dtype): y = seeded(l, x)
        assert y.dtype==dtype
        y.float().sum().backward()
        assert x.grad.isfinite().all() and l.weight.grad.isfinite().all() and l.weight.grad.dtype==torch.float32
        torch.testing.assert_close(y.float(), seeded(l, x), rtol=0.05, atol=2.)

def test_halves():
    l = DropConnect(40, 30, dtype=torch.bfloat16)
    x = torch.randn(6, 40, dtype=torch.bfloat16)
    y = seeded(l, x)
    torch.testing.assert_close(y.float(), seeded(copy.deepcopy(l).float(), x.float()), rtol=0.05, atol=0.1)

def test_copies_compile_export():
    l,x = DropConnect(6, 5),torch.randn(3, 6)
    l(x).sum().backward()
    for f in (copy.deepcopy(l), pickle.loads(pickle.dumps(l))): assert torch.equal(seeded(f, x), seeded(l, x))
    c = torch.compile(l, fullgraph=True, backend='aot_eager')
    a = seeded(c, x)
    assert torch.equal(a, seeded(c, x)) and not torch.equal(a, c(x))
    a.sum().backward()
    two = torch.compile(lambda x: (l(x), l(x)), fullgraph=True, backend='aot_eager')(x)
    assert not torch.equal(*two)
    e = torch.export.export(l, (x,)).module()
    assert torch.equal(seeded(e, x), seeded(l, x))
    torch.testing.assert_close(torch.export.export(l.eval(), (x,)).module()(x), l(x))
    fresh = DropConnect(6, 5)
    fresh.load_state_dict(nn.Linear(6, 5).state_dict())

def test_checkpointing():
    l,x = DropConnect(6, 5),torch.randn(3, 6, requires_grad=True)
    a, = torch.autograd.grad(seeded(lambda: torch.utils.checkpoint.checkpoint(l, x, use_reentrant=False)).sum(), x)
    b, = torch.autograd.grad(seeded(l, x).sum(), x)
    assert torch.equal(a, b)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body,self.attn = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)),nn.MultiheadAttention(8, 2)
        self.tied = self.body[0]

def test_to_dropconnect():
    net = Net()
    params = list(net.parameters())
    assert to_dropconnect(net, 0.2) is net
    assert net.tied is net.body[0] and isinstance(net.tied, DropConnect) and not isinstance(net.attn.out_proj, DropConnect)
    assert all(a is b for a,b in zip(params, net.parameters()))
    to_dropconnect(net, 0.4, layers=['body.2'], inference='gaussian')
    assert (net.body[0].p,net.body[2].p,net.body[2].inference)==(0.2,0.4,'gaussian')
    to_linear(net.eval())
    assert type(net.body[0]) is nn.Linear and net.tied is net.body[0] and not net.tied.training
    assert all(a is b for a,b in zip(params, net.parameters()))
    one = nn.Linear(3, 4, bias=False)
    assert to_linear(to_dropconnect(one)).weight is one.weight

@pytest.mark.parametrize('p', [-0.1,1,1.5,float('nan')])
def test_bad_p(p):
    for f in (lambda: DropConnect(3, 3, p=p), lambda: dropconnect(torch.zeros(2, 3), torch.zeros(3, 3), p=p), lambda: to_dropconnect(nn.Sequential(nn.Linear(2, 2)), p)):
        with pytest.raises(ValueError, match='p is the probability'): f()

def test_bad_arguments():
    with pytest.raises(ValueError, match='in_features must be at least 1'): DropConnect(0, 3)
    with pytest.raises(ValueError, match='out_features must be at least 1'): DropConnect(3, 0)
    with pytest.raises(ValueError, match="unknown inference 'means'. Did you mean 'mean'"): DropConnect(3, 3, inference='means')
    l = DropConnect(3, 3)
    for training in (True,False):
        for shape in ((2,4), (), (3,1)):
            with pytest.raises(ValueError, match='in_features=3'): l.train(training)(torch.zeros(shape))
        with pytest.raises(TypeError, match='floating point'): l(torch.zeros(2, 3, dtype=torch.int))
    hooked = nn.Sequential(nn.Linear(4, 4))
    hooked[0].register_forward_hook(lambda m, x, y: 2*y)
    with pytest.raises(ValueError, match="'0' has modules or hooks"): to_dropconnect(hooked)
    assert type(hooked[0]) is nn.Linear
    with pytest.raises(ValueError, match='has no nn.Linear'): to_dropconnect(nn.ReLU())
    with pytest.raises(ValueError, match="unknown linear layer 'x'. Known: 0"): to_dropconnect(nn.Sequential(nn.Linear(2, 2)), layers='x')
    with pytest.raises(ValueError, match='layers is empty'): to_dropconnect(nn.Sequential(nn.Linear(2, 2)), layers=[])
    with pytest.raises(ValueError, match='no DropConnect'): to_linear(nn.Linear(2, 2))
