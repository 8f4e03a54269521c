"Bad arguments of layers and models are refused by the function that was called, in words that name the argument; one table for all"
import math,traceback
from pathlib import Path
import numpy as np,pytest,torch
from torch import nn
import fastattn
from fastattn.core import check_flags,check_least,is_number,per_dim
from fastattn.layers.dropconnect import *
from fastattn.layers.local import local_attention
from fastattn.layers.local2d import Local2DAttention
from fastattn.layers.position import GaussianSpan,SinusoidEncoding,SirenEncoding,rotary,window_steps
from fastattn.layers.positional import PositionalSelfAttention
from fastattn.layers.projection import SelfProjection
from fastattn.layers.simple import SimpleSelfAttention,cheapest_order,power_iteration,simple_attention
from fastattn.models.nonlinear import NonLinearTransformer
from fastattn.models.positional import PositionalBlock,PositionalTransformer
from fastattn.models.projection import ProjectionClassifier

nan,inf = math.nan,math.inf
no_whole = [-1, 1.5, '3', True, nan, inf, [3], np.float64(2.5)]
not_least_1 = [0, None, *no_whole]
no_flag = ['no', 2, None, 0.5]
no_share = [-0.1, 1.5, nan, inf, '0.5', None, True, [0.5]]
no_share_below_1 = [1, 1., *no_share]
no_name = ['x', 3, True]
no_window = [-1, 1.5, '3', True, False, nan, inf, (1,), (1,2,3), (1,1.5), (1,True), np.float64(2.5)]
x4,x5 = torch.randn(2, 8, 3, 3),torch.randn(2, 2, 3, 3, 4)
ints = torch.ones(2, 8, 3, 3, dtype=torch.long)
weight,gain = torch.randn(8, 8, 1),torch.tensor(0.1)
lstm = dict(input_size=3, hidden_size=4)
conv = dict(in_channels=4, out_channels=4, kernel_size=3)
net = lambda: nn.Sequential(nn.Linear(2, 2), nn.Conv1d(2, 2, 1))
small_transformer = dict(c_in=1, n_out=2, ndim=2, dim=8, depth=1, heads=2, ff=8)
small_nonlinear = dict(vocab_size=5, embed_size=8, matrix_dim=3, heads=2, window_size=1, depth=1, iterations=1)
grids = [torch.randn(2, 3, 3), torch.randn(2, 3, 3, 5), torch.randn(2, 0, 3, 8), torch.ones(2, 3, 3, 8, dtype=torch.long), torch.randn(2, 3, 8)]

# function or class, arguments that are right, and for each argument what is wrong
table = [
    (SimpleSelfAttention, dict(n_in=8), dict(n_in=not_least_1, ks=[2, 0, None, *no_whole], sym=no_flag, scale=no_flag)),
    (cheapest_order, dict(c=8, n=5), dict(c=[None, *no_whole], n=[None, *no_whole], ks=[2, 0, None, *no_whole])),
    (power_iteration, dict(w=torch.eye(3), u=torch.ones(3)), dict(n=not_least_1)),
    (simple_attention, dict(x=torch.randn(2, 8, 4), weight=weight, gain=gain), dict(x=[x4, x4[0,0], torch.randn(2, 7, 4), ints[:,:,0]],
        weight=[weight[...,0], weight[:4], torch.randn(8, 8, 2)], gain=[torch.ones(2), torch.ones(0)])),
    (SelfProjection, dict(size_input=(6,5), size_projection=4), dict(size_input=[28, None, 'ab', (3,), (3,4,5), (0,3), (3,-1), (3,2.5), (True,3), ('3',3), (nan,3), (inf,3)],
        size_projection=[1, *not_least_1], eps=[None, -1, nan, inf, '1e-5', True])),
    (ProjectionClassifier, dict(size_input=(6,5), n_out=3), dict(size_input=[28, None, (3,), (0,3)], n_out=not_least_1, size_projection=[1, *not_least_1], p=no_share_below_1, c_in=not_least_1)),
    (dropconnect, dict(x=torch.randn(2, 3), weight=torch.randn(4, 3)), dict(x=[torch.randn(2, 4), torch.tensor(1.), torch.ones(2, 3, dtype=torch.int)],
        weight=[torch.randn(4), torch.randn(4, 3, 1)], bias=[torch.randn(3), torch.randn(4, 1)], p=no_share_below_1)),
    (DropConnect, dict(in_features=3, out_features=3), dict(in_features=not_least_1, out_features=not_least_1, bias=[0.3, 1, None, 'no'], p=no_share_below_1, inference=[None, *no_name])),
    (DropConnectConv2d, conv, dict(p=no_share_below_1, padding_mode=['circular'])),
    (DropConnectLSTM, lstm, dict(p=no_share_below_1)),
    (DropConnectGRU, lstm, dict(p=no_share_below_1)),
    (lambda **kwargs: to_dropconnect(net(), **kwargs), {}, dict(p=no_share_below_1, layers=[0, [], 0.5, {}, 'x', ['0','x'], [0]], inference=[None, *no_name])),
    (to_dropconnect, {}, dict(model=[nn.ReLU()])),
    (to_linear, {}, dict(model=[nn.Linear(2, 2)])),
    (window_steps, {}, dict(window=[3, None, '3', (1.5,2), (-1,), (True,), (nan,)])),
    (SirenEncoding, dict(ndim=2, n_out=4), dict(ndim=not_least_1, n_out=not_least_1, hidden=not_least_1, depth=not_least_1, w0=[0, nan, inf, None, '10', True], w0_first=[0, nan, inf, '10', True])),
    (SinusoidEncoding, dict(ndim=2, n_out=4), dict(ndim=not_least_1, n_out=not_least_1, hidden=[3, *not_least_1], base=[1, 0, -1, nan, inf, None, '10', True])),
    (rotary, dict(x=torch.randn(1, 2, 3, 3, 8)), dict(x=[torch.randn(1, 2, 3, 3, 6), torch.randn(1, 2, 8), torch.ones(1, 2, 3, 3, 8, dtype=torch.long)], base=[1, 0, -1, nan, inf, None, '10', True])),
    (GaussianSpan, dict(ndim=2), dict(ndim=not_least_1, sigma=[0, -1, nan, inf, None, '0.3', True], threshold=[-0.1, 1, nan, inf, None, '0.1', True], heads=not_least_1, full=no_flag, learn=no_flag)),
    (PositionalSelfAttention, dict(dim=8, heads=2, ndim=2), dict(dim=[9, *not_least_1], heads=[3, *not_least_1], ndim=not_least_1, encoding=[5, True, 'x', SirenEncoding, SirenEncoding(1, 8), SirenEncoding(2, 4)],
        span=['x', *no_window, GaussianSpan(1), GaussianSpan(2, heads=3)], combine=[None, *no_name], modulate=[None, *no_name], causal=no_flag)),
    (Local2DAttention, dict(dim=8, heads=2), dict(dim=[6, *not_least_1], window_size=['x', *no_window], heads=[3, *not_least_1], rotary=no_flag)),
    (local_attention, dict(q=x5, k=x5, v=x5, window=1), dict(q=[x4, x5.long(), x5[:1], x5[...,:3]], k=[x4, x5[:1], x5[...,:3]], v=[x4, x5[:1]], window=[None, *no_window], p=[torch.randn(1, 3, 3), torch.randn(2, 3, 5, 4)],
        q_pos=[x4], factor=[torch.randn(3, 3)], log_weight=[torch.randn(3, 3)], combine=[None, *no_name], causal=no_flag, block=['x', 0, *no_window])),
    (PositionalBlock, dict(attn=nn.Identity(), dim=8), dict(attn=[None, 'x'], dim=not_least_1, ff=not_least_1, p=no_share, pool=not_least_1)),
    (PositionalTransformer, small_transformer, dict(c_in=not_least_1, n_out=not_least_1, ndim=not_least_1, dim=not_least_1, depth=not_least_1, heads=[3, *not_least_1], ff=not_least_1, p=no_share, token=[None, *no_name],
        pool_after=[1, [1], [-1], 'x', [0.], [True], None], pool=not_least_1, attn=[3, 'x', True])),
    (NonLinearTransformer, small_nonlinear, dict(vocab_size=not_least_1, embed_size=[6, *not_least_1], matrix_dim=[0, -1, 1.5, '3', None, True, (3,), (3,3,3), (0,3)], heads=[3, *not_least_1], window_size=['x', *no_window],
        iterations=not_least_1, depth=not_least_1, n_labels=[None, *no_whole], global_every=[None, *no_whole], p=no_share)),
]
inputs = [ # a layer, and what it does not take
    ('SimpleSelfAttention', lambda: SimpleSelfAttention(8), [torch.randn(2, 4, 3, 3), torch.randn(2, 8), torch.randn(8), ints, ints.to(torch.uint8), ints.bool()], 'n_in=8|floating point'),
    ('SelfProjection', lambda: SelfProjection((6,5), 4), [torch.randn(2, 5, 6), torch.randn(6), torch.randn(2, 6, 4), torch.ones(2, 6, 5, dtype=torch.long)], 'size_input|floating point'),
    ('ProjectionClassifier', lambda: ProjectionClassifier((6,5), 3), [torch.randn(2, 5), torch.randn(2, 3, 6, 5), torch.randn(2, 1, 12, 10), torch.ones(2, 1, 6, 5, dtype=torch.uint8)], 'the input must be|size_input|floating point'),
    ('DropConnect', lambda: DropConnect(3, 4), [torch.randn(2, 4), torch.tensor(1.), torch.ones(2, 3, dtype=torch.int)], 'in_features=3|floating point'),
    ('DropConnectConv2d', lambda: DropConnectConv2d(**conv), [torch.randn(2, 3, 5, 5), torch.randn(2, 4, 5), torch.randn(5), torch.ones(2, 4, 5, 5, dtype=torch.long)], 'the input must be|floating point'),
    ('PositionalSelfAttention', lambda: PositionalSelfAttention(8, 2, 2), grids, 'takes floating point'),
    ('Local2DAttention', lambda: Local2DAttention(8, 1, 2), grids, 'takes floating point'),
    ('PositionalTransformer', lambda: PositionalTransformer(**small_transformer), [torch.randn(2, 1, 3), torch.randn(2, 3, 3, 3), torch.randn(2, 1, 0, 3), torch.ones(2, 1, 3, 3, dtype=torch.long)], 'the input must be floating point'),
    ('NonLinearTransformer', lambda: NonLinearTransformer(**small_nonlinear), [torch.ones(2, 3, 3), torch.full((2, 3, 3), 5), torch.full((2, 3, 3), -1), torch.ones(2, dtype=torch.long), torch.ones(2, 3, 3, dtype=torch.bool)], 'tokens must be'),
]

def verdict(f, kwargs, known):
    "'clear', or what is wrong"
    try: f(**kwargs)
    except Exception as e:
        ours = Path(fastattn.__file__).parent in Path(traceback.extract_tb(e.__traceback__)[-1].filename).parents
        named = any(o in str(e) for o in known.split('|'))
        if ours and named and isinstance(e, (ValueError,TypeError)): return 'clear'
        return f'obscure: {type(e).__name__}: {str(e)[:150]}'
    return 'silent'

def name(f): return 'to_dropconnect' if f.__name__=='<lambda>' else f.__name__
also = dict(dim='channels of a head|dim', embed_size='embed_size|dim', x='x|input|shape', model='the model', weight='weight|ks', window_size='window_size|span', k='q, k', v='q, k', layers='layer')
def find(f, right, arg, wrong): return {repr(o)[:60]: v for o in wrong if (v := verdict(f, {**right, arg: o}, also.get(arg, arg)))!='clear'}

@pytest.mark.parametrize('f,right,arg,wrong', [pytest.param(f, right, arg, wrong, id=f'{name(f)}-{arg}') for f,right,args in table for arg,wrong in args.items()])
def test_arguments(f, right, arg, wrong):
    assert not find(f, right, arg, wrong)

@pytest.mark.parametrize('f,right', [pytest.param(f, right, id=name(f)) for f,right,_ in table if f not in (to_dropconnect,to_linear,window_steps)])
def test_right_arguments(f, right): f(**right)

@pytest.mark.parametrize('make,wrong,known', [pytest.param(*o[1:], id=o[0]) for o in inputs])
def test_inputs(make, wrong, known):
    for training in (True,False):
        layer = make().train(training)
        assert not {f'{tuple(o.shape)} {o.dtype}': v for o in wrong if (v := verdict(lambda x: layer(x), dict(x=o), known))!='clear'}

def test_enough_cases():
    assert sum(len(o) for *_,args in table for o in args.values())+sum(len(o[2]) for o in inputs)>=600

def test_numbers_of_numpy_are_numbers():
    i,f = np.int64,np.float32
    SimpleSelfAttention(i(8), ks=i(3))
    SelfProjection((i(6),i(5)), i(4), eps=f(1e-5))
    DropConnect(i(3), i(4), p=f(0.5))
    ProjectionClassifier((i(6),i(5)), i(3), i(4), p=f(0.25), c_in=i(2))
    PositionalTransformer(**{k: i(v) for k,v in small_transformer.items()}, span=i(2))
    NonLinearTransformer(**{k: i(v) for k,v in small_nonlinear.items()})
    local_attention(x5, x5, x5, window=i(1), block=i(2))
    SirenEncoding(i(2), i(4), w0=f(5))
    GaussianSpan(i(2), sigma=f(0.3), threshold=f(0.1))
    assert is_number(f(1)) and not is_number(torch.tensor(1.)) and per_dim(i(2), 2, 'window')==(2,2)

def test_checks():
    for o in (True, False, 1., '1', None, nan):
        with pytest.raises(ValueError, match='n must be at least 1, and a whole number'): check_least(1, n=o)
    check_least(0, n=np.int64(0))
    for o in (0, 1, None, 'True', np.bool_(True)):
        with pytest.raises(ValueError, match='sym must be True or False'): check_flags(scale=True, sym=o)
