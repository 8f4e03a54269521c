"What tests/test_kernels.py runs in processes of its own: the kernels against oracles, in Triton's interpreter on the CPU, or on a GPU"
import os
import numpy as np,pytest,torch
from hypothesis import given,settings,strategies as st
from fastattn.layers import dropconnect as module
from fastattn.layers.dropconnect import DropConnect,dropconnect,_digits,_ones
from fastattn.layers.kernels import masks_of_kernel,product_by_kernel

device = 'cpu' if os.environ.get('TRITON_INTERPRET')=='1' else 'cuda'
few = settings(deadline=None, derandomize=True, max_examples=10)
sizes = st.sampled_from([1,7,8,16,17,33])

@pytest.fixture(autouse=True, scope='module')
def by_kernels():
    "The kernels are taken on every device and for small inputs too"
    with pytest.MonkeyPatch.context() as m:
        m.setattr(module, '_few', -1)
        m.setattr(module, 'takes_kernels', lambda device: True)
        yield

def randn(*shape, dtype=torch.float32): return torch.randn(*shape, device=device).to(dtype)
def masks(r, o, i, seed=3, k=2**15): return masks_of_kernel(r, o, i, seed, k, device)

def seeded(f, *args, seed=0):
    torch.manual_seed(seed)
    return f(*args)

def next_seed(seed=0): return int(seeded(lambda: torch.randint(2**63-1, ()), seed=seed))

def philox(counter, seed):
    "Philox4x32-10 as Salmon et al. write it, in Python's numbers: four words for a counter of four words and a seed of 64 bits"
    (a,b,c,d),low,high = counter,seed&0xffffffff,seed>>32
    for _ in range(10):
        left,right = 0xD2511F53*a,0xCD9E8D57*c
        a,b,c,d = (right>>32)^b^low,right&0xffffffff,(left>>32)^d^high,left&0xffffffff
        low,high = (low+0x9E3779B9)&0xffffffff,(high+0xBB67AE85)&0xffffffff
    return a,b,c,d

def test_known_answers():
    "The oracle gives the authors' own numbers (Random123, kat_vectors)"
    assert philox((0,0,0,0), 0)==(0x6627e8d5,0xe169c58d,0xbc57ac4c,0x9b00dbd8)
    assert philox((2**32-1,)*4, 2**64-1)==(0x408f276d,0x41c83b0e,0xa20bc7c6,0x6d5451fd)

@pytest.mark.parametrize('seed', [0,1,5,2**31,2**32,2**63-2])
@pytest.mark.parametrize('k', [1,2**13,40000,2**16])
def test_masks_are_philox(seed, k):
    got = masks(3, 2, 19, seed, k).cpu()
    for r,o,i in np.ndindex(3, 2, 19):
        a,b,c,d = philox((r,o,i//8,0), seed)
        word = (a,c,b,d)[i%8//2]
        assert got[r,o,i]==((word>>16 if i%2 else word&0xffff)<k)

@few
@given(lead=st.sampled_from([(),(1,),(5,),(17,),(2,3)]), i=sizes, o=sizes, p=st.sampled_from([2**-16,0.01,0.25,0.5,0.9,0.99999]), bias=st.booleans(),
    transposed=st.booleans(), dtype=st.sampled_from([torch.float64,torch.float32,torch.float16,torch.bfloat16]))
def test_oracle(lead, i, o, p, bias, transposed, dtype):
    x = randn(i, *lead, dtype=dtype).movedim(0, -1) if transposed else randn(*lead, i, dtype=dtype)
    w = randn(i, o, dtype=dtype).T if transposed else randn(o, i, dtype=dtype)
    ins = [x,w,*[randn(o, dtype=dtype)]*bias]
    exact = [a.detach().double().requires_grad_() for a in ins]
    ins = [a.requires_grad_() for a in ins]
    y = seeded(lambda: dropconnect(*ins, p=p))
    rows = exact[0].reshape(-1, i)
    mask = masks(len(rows), o, i, next_seed(), _ones(p)).double()
    expected = torch.einsum('roi,oi,ri->ro', mask, exact[1], rows)*2**_digits/_ones(p)
    expected = (expected+exact[2] if bias else expected).view(*lead, o)
    assert y.dtype==dtype and y.shape==expected.shape
    g = torch.randn_like(y)
    grads = torch.autograd.grad(y, ins, g),torch.autograd.grad(expected, exact, g.double())
    eps = torch.finfo(dtype).eps
    for a,e in ((y,expected),*zip(*grads)):
        assert a.dtype==dtype
        torch.testing.assert_close(a.double(), e, rtol=4*eps, atol=16*eps*float(e.detach().abs().max()))

@pytest.mark.parametrize('r,o,i', [(1,1,1), (50,3,5), (3,50,5), (3,5,50)])
def test_many_squares(r, o, i):
    "Each axis longer than several blocks"
    x,w,g,mask = randn(r, i),randn(o, i),randn(r, o),masks(r, o, i).double()
    for args,eq,ops in (((x,w,None),'roi,oi,ri->ro',(w,x)), ((None,w,g),'roi,oi,ro->ri',(w,g)), ((x,None,g),'roi,ri,ro->oi',(x,g))):
        expected = torch.einsum(eq, mask, *[a.double() for a in ops])
        got = product_by_kernel(torch.empty(expected.shape, device=device), *args, 3, 2**15)
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-4)

def test_nothing_beyond_the_border():
    "What stands behind the tensors in memory is neither read into sums nor overwritten"
    store = torch.full((3, 40), float('nan'), device=device)
    x,w,out = randn(5, 7),randn(3, 7),store.flatten()[:15].view(5, 3)
    product_by_kernel(out, x, w, None, 3, 2**15)
    assert out.isfinite().all() and store.flatten()[15:].isnan().all()

def test_a_dropped_weight_counts_for_nothing():
    mask = masks(4, 3, 9)
    w = torch.ones(3, 9, device=device)
    w[0,2] = float('inf')
    y = product_by_kernel(torch.empty(4, 3, device=device), torch.ones(4, 9, device=device), w, None, 3, 2**15)
    assert 0<mask[:,0,2].sum()<4 and torch.equal(y[:,0].isinf(), mask[:,0,2].bool()) and not y.isnan().any()

def test_gradients_of_gradients():
    x,w = randn(3, 4, dtype=torch.float64).requires_grad_(),randn(2, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda *o: seeded(dropconnect, *o), (x, w), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *o: seeded(dropconnect, *o), (x, w), fast_mode=True)

def test_empty_batch():
    layer,x = DropConnect(5, 3).to(device),randn(0, 5).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.shape==(0,3) and x.grad.shape==(0,5) and not layer.weight.grad.any() and not layer.bias.grad.any()

def test_autocast():
    layer = DropConnect(20, 3).to(device)
    with torch.autocast(device, dtype=torch.bfloat16): y = layer(randn(4, 20))
    y.float().sum().backward()
    assert y.dtype==torch.bfloat16 and layer.weight.grad.dtype==torch.float32

def test_compiled():
    layer,x = DropConnect(20, 3).to(device),randn(4, 20)
    compiled = torch.compile(layer, backend='aot_eager', fullgraph=True)
    got = []
    for f in (layer,compiled):
        layer.zero_grad()
        y = seeded(f, x)
        y.square().sum().backward()
        got.append((y,layer.weight.grad.clone()))
    for a,b in zip(*got): torch.testing.assert_close(a, b)

def test_same_seed_same_result():
    layer,x = DropConnect(17, 3).to(device),randn(5, 17)
    def step(seed):
        layer.zero_grad()
        y = seeded(layer, x, seed=seed)
        y.square().sum().backward()
        return y.detach(),layer.weight.grad.clone()
    for a,b,c in zip(step(1), step(1), step(2)): assert torch.equal(a, b) and not torch.equal(a, c)

def test_an_element_does_not_depend_on_the_sizes():
    assert torch.equal(masks(20, 18, 40)[:3,:17,:9], masks(3, 17, 9))

@pytest.mark.parametrize('k', [1,2**10,2**15,50000,2**16-1,2**16])
def test_share_kept(k):
    "Within five standard deviations of the binomial: of all, of each of the eight draws of a counter, and of each output"
    mask,q = masks(64, 16, 64, 11, k).double(),k/2**16
    for part in (mask[None], mask.view(64, 16, 8, 8).permute(3, 0, 1, 2), mask.transpose(0, 1)):
        share = part.flatten(1).mean(1)
        assert ((share-q).abs() <= 5*(q*(1-q)/part[0].numel())**0.5).all()

def test_draws_are_independent():
    "Neighbours in each direction, and masks of neighbouring seeds, agree as often as coins do"
    mask = masks(64, 16, 64).bool()
    pairs = [(mask[1:],mask[:-1]), (mask[:,1:],mask[:,:-1]), *[(mask[...,n:],mask[...,:-n]) for n in (1,2,4,8)], (mask,masks(64, 16, 64, 4).bool()),
        (mask,masks(64, 16, 64, 3+2**32).bool())]
    for a,b in pairs: assert abs((a==b).double().mean()-0.5) < 5*0.5/a.numel()**0.5
