"DropConnect against an oracle that holds the masks, and what must survive in use"
import copy,pickle
import pytest,torch
from hypothesis import given,settings,strategies as st
from torch import nn
import torch.nn.functional as F
from fastattn.layers import dropconnect as module
from fastattn.layers.dropconnect import *
from fastattn.layers.dropconnect import _called,_digits,_masks,_masked_product,_ones

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

@pytest.fixture
def blocks(monkeypatch):
    "Masks block by block for small inputs too"
    monkeypatch.setattr(module, '_few', 0)

@few
@given(lead=st.lists(st.integers(0,4), max_size=3), i=st.integers(1,70), o=st.integers(1,9), p=st.sampled_from([0.01,0.1,0.25,0.5,0.9,0.999]), bias=st.booleans(), transposed=st.booleans(), held=st.booleans())
def test_oracle(lead, i, o, p, bias, transposed, held):
    x = (torch.randn(i, *lead).double().movedim(0, -1) if transposed else torch.randn(*lead, i).double()).requires_grad_()
    w,b = torch.randn(o, i).double().requires_grad_(),torch.randn(o).double().requires_grad_() if bias else None
    with pytest.MonkeyPatch.context() as m:
        if not held: m.setattr(module, '_few', -1)
        y = seeded(dropconnect, x, w, b, p)
    rows = x.reshape(-1, i)
    if held: mask,scale = seeded(lambda: torch.rand(len(rows), o, i)>=p).double(),1/(1-p)
    else: mask,scale = whole_mask(len(rows), i, o, p, next_seed()),2**_digits/_ones(p)
    expected = (torch.einsum('roi,oi,ri->ro', mask, w, rows)*scale + (b if bias else 0)).view(*lead, o)
    torch.testing.assert_close(y, expected)
    given_grad,ins = torch.randn_like(y),[a for a in (x, w, b) if a is not None]
    for a,e in zip(torch.autograd.grad(y, ins, given_grad), torch.autograd.grad(expected, ins, given_grad)): torch.testing.assert_close(a, e)

@pytest.mark.parametrize('r,i,o', [(70,9000,3), (3,2**19+5,2), (300,3,2000)])
def test_many_blocks(r, i, o):
    x,w,g = torch.randn(r, i),torch.randn(o, i),torch.randn(r, o)
    mask,seed = whole_mask(r, i, o, 0.5, 7).float(),torch.tensor(7)
    for args,eq,ops in (((x,w,None),'roi,oi,ri->ro',(w,x)), ((None,w,g),'roi,oi,ro->ri',(w,g)), ((x,None,g),'roi,ri,ro->oi',(x,g))):
        torch.testing.assert_close(_masked_product(*args, seed, 0.5), torch.einsum(eq, mask, *ops), rtol=1e-3, atol=2e-2)

@pytest.mark.parametrize('held', [True,False])
def test_gradients_of_gradients(held, monkeypatch):
    if not held: monkeypatch.setattr(module, '_few', 0)
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

def test_copies_compile_export(blocks):
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

@pytest.mark.parametrize('p', [-0.1,1,1.5,float('nan'),'0.5',None,True,False])
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
    for bias in (0.3, 1, None):
        with pytest.raises(ValueError, match='p is given by name'): DropConnect(3, 3, bias)
    for layers in (0, [], 0.5, {}):
        with pytest.raises(ValueError, match='layers must name one or more of 0'): to_dropconnect(nn.Sequential(nn.Linear(2, 2)), layers=layers)
    with pytest.raises(ValueError, match="unknown inference of Conv1d 'gaussian'"): to_dropconnect(net := nn.Sequential(nn.Linear(2, 2), nn.Conv1d(2, 2, 1)), layers=['0','1'], inference='gaussian')
    assert type(net[0]) is nn.Linear # nothing was changed
    with pytest.raises(ValueError, match='has no nn.Linear .*; layers may name 0'): to_dropconnect(nn.Sequential(nn.Conv1d(2, 2, 1)))
    with pytest.raises(ValueError, match="takes padding_mode='zeros'"): DropConnectConv1d(2, 2, 3, padding_mode='circular')
    for shape in ((2,3,5,5), (2,4,5), (5,)):
        with pytest.raises(ValueError, match=r'the input must be \(batch, 4'): DropConnectConv2d(4, 4, 1)(torch.zeros(shape))
    with pytest.raises(ValueError, match='has no nn.Linear'): to_dropconnect(nn.ReLU())
    with pytest.raises(ValueError, match="unknown layer 'x'. Known: 0"): to_dropconnect(nn.Sequential(nn.Linear(2, 2)), layers='x')
    with pytest.raises(ValueError, match='no DropConnect'): to_linear(nn.Linear(2, 2))

def test_hooks_stay():
    net = nn.Sequential(nn.Linear(4, 4))
    net[0].register_forward_hook(lambda m, x, y: 0*y)
    for f in (to_dropconnect, to_dropconnect, to_linear):
        f(net)
        assert not net(torch.randn(2, 4)).any() and len(net[0]._forward_hooks)==1 and len(net[0]._forward_pre_hooks)==(f is to_dropconnect)
    assert type(net[0]) is nn.Linear and not hasattr(net[0], 'p')

@pytest.mark.parametrize('inference', ['mean','gaussian'])
@pytest.mark.parametrize('built', ['layer','encoder','by hand'])
def test_transformer_layers(inference, built):
    "PyTorch's fast path reads weights, and would leave out what drops them"
    make = lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.)
    m,x,mask = nn.TransformerEncoder(make(), 2) if built=='encoder' else make(),torch.randn(2, 5, 16),torch.arange(5)>torch.tensor([[2],[4]])
    m.eval()
    with torch.no_grad(): plain = m(x),m(x, src_key_padding_mask=mask)
    if built=='by hand': m.linear1 = DropConnect(16, 32, inference=inference).eval()
    else: to_dropconnect(m, inference=inference)
    if built!='by hand' and inference=='mean':
        with torch.no_grad(): torch.testing.assert_close(m(x), plain[0], rtol=1e-4, atol=1e-4)
    else:
        with torch.no_grad(): assert inference=='mean' or ((m(x)-m(x)).abs().max()>1e-3 and (m(x, src_key_padding_mask=mask)-m(x, src_key_padding_mask=mask)).abs().max()>1e-3)
    for l in dropconnect_layers(m).values(): l.train() # as for Monte Carlo
    with torch.no_grad(): assert (m(x)-m(x)).abs().max()>1e-3

# Convolutions

convs = {1: (DropConnectConv1d,F.conv1d), 2: (DropConnectConv2d,F.conv2d), 3: (DropConnectConv3d,F.conv3d)}

@few
@given(st.data())
def test_conv_oracle(data):
    "Example by example, with masks drawn part by part; gradients too"
    draw = lambda *o: data.draw(st.sampled_from(o))
    ndim,b,groups,p = draw(1, 2, 3),draw(0, 1, 3, 5),draw(1, 2),draw(0.1, 0.5, 0.9)
    args = dict(stride=draw(1, 2), padding=draw(0, 1, 2), dilation=draw(1, 2))
    (cls,conv),size = convs[ndim],draw(3, 5)
    l = cls(2*groups, 2*draw(1, 2), draw(1, 2), groups=groups, bias=draw(True, False), p=p, **args).double()
    x = torch.randn(b, 2*groups, *[size]*ndim).double()
    if draw(True, False): x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    x.requires_grad_()
    with pytest.MonkeyPatch.context() as m:
        step = draw(2, 9)
        m.setattr(module, '_held', step*l.weight.numel())
        y = seeded(l, x)
        g = torch.randn_like(y)
        ins = [o for o in (x,l.weight,l.bias) if o is not None]
        grads = torch.autograd.grad(y, ins, g)
    torch.manual_seed(0)
    masks = torch.cat([torch.rand(len(o), *l.weight.shape)>=p for o in x.split(step)]) if b else []
    want = torch.cat([conv(x[i:i+1], masks[i]*l.weight/(1-p), l.bias, groups=groups, **args) for i in range(b)]) if b else l.eval()(x)
    torch.testing.assert_close(y, want)
    for a,e in zip(grads, torch.autograd.grad(want, ins, g)): torch.testing.assert_close(a, e)

@pytest.mark.parametrize('ndim', [1,2,3])
def test_conv_in_use(ndim):
    cls,conv = convs[ndim]
    l,x = cls(4, 6, 3, padding='same', p=0.4),torch.randn(3, 4, *[5]*ndim)
    same = l(x[:1].expand(8, *x.shape[1:]))
    assert len(same.unique(dim=0))==8 and l(x[0]).shape==l(x)[0].shape
    torch.testing.assert_close(l.eval()(x), conv(x, l.weight, l.bias, padding='same'))
    for f in (copy.deepcopy(l.train()), pickle.loads(pickle.dumps(l))): assert torch.equal(seeded(f, x), seeded(l, x))
    with torch.autocast('cpu', torch.bfloat16): y = l(x)
    assert y.dtype==torch.bfloat16 and y.float().sum().backward() is None and l.weight.grad.isfinite().all()
    names = [n for n,_ in l.named_parameters()]
    net = to_dropconnect(nn.Sequential({1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[ndim](4, 6, 3), nn.Flatten(), nn.LazyLinear(3)), 0.2, layers='0')
    assert net[0].p==0.2 and [n for n,_ in net[0].named_parameters()]==names and not torch.equal(net(x), net(x))
    assert type(to_linear(net)[0]) in (nn.Conv1d,nn.Conv2d,nn.Conv3d) and torch.equal(net(x), net(x))
    with torch.device('meta'): assert cls(4, 6, 3)(torch.empty(2, 4, *[5]*ndim)).is_meta

def test_conv_memory():
    "What is kept for backward does not grow with the batch beyond inputs and outputs"
    l = DropConnectConv2d(64, 64, 3, padding=1)
    def kept(b):
        sizes,x = {},torch.randn(b, 64, 2, 2)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.update({t.untyped_storage().data_ptr(): t.numel()}) or t, lambda t: t): y = l(x)
        return sum(sizes.values())-2*x.numel()
    assert kept(600)<kept(100)+l.weight.numel()

# Recurrent layers

@pytest.mark.parametrize('cls,plain', [(DropConnectLSTM,nn.LSTM),(DropConnectGRU,nn.GRU)])
@pytest.mark.parametrize('kwargs', [{}, dict(num_layers=2, bidirectional=True, batch_first=True), dict(bias=False)])
def test_recurrent_oracle(cls, plain, kwargs):
    "The plain layer with masked weights, drawn in the order of the weights; gradients too"
    l,x = cls(3, 5, p=0.3, **kwargs).double(),torch.randn(4, 2, 3).double()
    other = plain(3, 5, **kwargs).double()
    torch.manual_seed(0)
    masks = {n: F.dropout(torch.ones_like(p), 0.3) if 'weight_hh' in n else torch.ones_like(p) for n,p in l.named_parameters()}
    other.load_state_dict({n: p*masks[n] for n,p in l.named_parameters()})
    a,b = seeded(l, x)[0],other(x)[0]
    torch.testing.assert_close(a, b)
    g = torch.randn_like(a)
    a.backward(g)
    b.backward(g)
    for (n,p),q in zip(l.named_parameters(), other.parameters()): torch.testing.assert_close(p.grad, q.grad*masks[n])
    assert all(w is p for w,p in zip(l._flat_weights, l.parameters()))
    for f in (copy.deepcopy(l), pickle.loads(pickle.dumps(l))): assert torch.equal(seeded(f, x)[0], seeded(l, x)[0])
    l.eval()
    other.load_state_dict(l.state_dict())
    assert torch.equal(l(x)[0], other(x)[0])

def test_recurrent_to_and_from():
    net = nn.ModuleDict(dict(rnn=nn.LSTM(3, 4), head=nn.Linear(4, 2)))
    params = list(net.parameters())
    to_dropconnect(net, 0.3, layers=['rnn'])
    x = torch.randn(5, 1, 3)
    assert type(net['head']) is nn.Linear and not torch.equal(net['rnn'](x)[0], net['rnn'](x)[0])
    with pytest.raises(RuntimeError): net['rnn'](x[...,:2])
    assert all(a is b for a,b in zip(net['rnn']._flat_weights, params)) # put back after an error too
    to_linear(net)
    assert type(net['rnn']) is nn.LSTM and torch.equal(net['rnn'](x)[0], net['rnn'](x)[0]) and all(a is b for a,b in zip(params, net.parameters()))

# Graphs and devices

def test_one_graph_for_all_batches():
    "Compiled in training: one graph for the first batch size, one for all others"
    torch._dynamo.reset()
    counter,l = torch._dynamo.testing.CompileCounter(),DropConnect(6, 5)
    f = torch.compile(l, backend=counter, fullgraph=True)
    for b in range(2, 14): assert f(torch.randn(b, 6, requires_grad=True)).shape==(b,5)
    assert counter.frame_count<=2

def test_compiled_with_other_p():
    "As a schedule sets it"
    torch._dynamo.reset()
    l,x = DropConnect(6, 5),torch.randn(3, 6)
    f = torch.compile(l, backend='aot_eager', fullgraph=True)
    for p in (0., 0.3, 0.5, 0.9, 0.99):
        l.p = p
        assert f(x).shape==(3,5)

def test_export_in_training_with_dynamic_batch():
    l = DropConnect(6, 5)
    e = torch.export.export(l, (torch.randn(4, 6),), dynamic_shapes=({0: torch.export.Dim('b')},)).module()
    for b in (1, 3, 70): assert e(torch.randn(b, 6)).shape==(b,5)

@pytest.mark.parametrize('training', [True,False])
@pytest.mark.parametrize('rows', [2,10**6])
def test_meta(training, rows):
    for inference in ('mean','gaussian'):
        l = DropConnect(6, 5, inference=inference, device='meta').train(training)
        y = l(torch.empty(rows, 6, device='meta', requires_grad=True))
        assert y.is_meta and y.shape==(rows,5)
        y.sum().backward()
