"Triton's kernels in its interpreter, against the formulas in float64"
import os,subprocess,sys
import pytest

pytest.importorskip('triton')

oracle = """
import torch
from fastattn.layers import dropconnect as dc
from fastattn.layers.kernels import masked_sum

def mask_of(r, o, i, seed, ones):
    eye,one = torch.eye(i, dtype=torch.float64),torch.ones(o, i, dtype=torch.float64)
    return torch.stack([masked_sum(eye[j].expand(r, -1), one, None, seed, ones) for j in range(i)], -1)

def check(r, o, i, ones, seed, dtype=torch.float64, mixed=lambda t: t):
    x,w,g = (mixed(torch.randn(s, dtype=dtype)) for s in ((r,i),(o,i),(r,o)))
    m,(X,W,G) = mask_of(r, o, i, seed, ones),(t.double() for t in (x,w,g))
    tol = {} if dtype==torch.float64 else dict(rtol=1e-2, atol=5e-2)
    for got,want,like in ((masked_sum(x, w, None, seed, ones), torch.einsum('roi,oi,ri->ro', m, W, X), g),
        (masked_sum(None, w, g, seed, ones), torch.einsum('roi,oi,ro->ri', m, W, G), x),
        (masked_sum(x, None, g, seed, ones), torch.einsum('roi,ri,ro->oi', m, X, G), w)):
        assert got.dtype==like.dtype and got.shape==like.shape
        torch.testing.assert_close(got.double(), want, **tol)
    return m

torch.manual_seed(0)
for shape in ((1,1,1), (5,3,7), (17,18,5), (2,20,33)): check(*shape, 2**15, 42)
check(4, 3, 6, 2**15, 2**62+3)
check(4, 3, 6, 2**14, 7, mixed=lambda t: t.T.contiguous().T)
for dtype in (torch.float32,torch.float16,torch.bfloat16): check(4, 3, 6, 2**15, 7, dtype)
for shape in ((0,3,4), (2,3,0)):
    r,o,i = shape
    assert masked_sum(torch.randn(r, i), torch.randn(o, i), None, 1, 2**15).shape==(r,o)
big = mask_of(60, 40, 10, 5, round(0.3*2**16))
assert abs(big.mean()-0.3)<0.02 and not torch.equal(big[0], big[1]) and not torch.equal(big[:,0], big[:,1])
assert not torch.equal(big, mask_of(60, 40, 10, 6, round(0.3*2**16)))

dc._has_kernel = lambda device: True # the dispatch, as on a GPU
x,w = torch.randn(4, 6, dtype=torch.float64, requires_grad=True),torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
y = dc._masked_product(x, w, None, torch.tensor(9), 0.5)
m,g = mask_of(4, 3, 6, 9, 2**15),torch.randn(4, 3, dtype=torch.float64)
y.backward(g)
torch.testing.assert_close(y, torch.einsum('roi,oi,ri->ro', m, w, x))
torch.testing.assert_close(x.grad, torch.einsum('roi,oi,ro->ri', m, w, g))
torch.testing.assert_close(w.grad, torch.einsum('roi,ri,ro->oi', m, x, g))
print('all equal')
"""

def run(code, **env):
    return subprocess.run([sys.executable,'-c',code], capture_output=True, text=True, env={**os.environ,**env})

@pytest.mark.slow
def test_dropconnect_in_interpreter():
    "Forward and both gradients, sizes that no block divides, layouts, dtypes, nothing to do, and the share of ones"
    p = run(oracle, TRITON_INTERPRET='1')
    assert 'all equal' in p.stdout,p.stderr

def test_without_triton():
    "The package imports, and takes PyTorch's way on a CPU"
    p = run("import sys; sys.modules['triton']=None; import torch; from fastattn.layers.dropconnect import DropConnect; print(DropConnect(8, 4)(torch.randn(2, 8)).shape)")
    assert 'torch.Size([2, 4])' in p.stdout,p.stderr
