"The benchmark measures what it says"
import csv,sys,types
import pytest,torch
from torch.nn.attention.flex_attention import flex_attention
from fastattn import bench as mod
from fastattn.bench import *

tiny = dict(ssa=[(2,8,8),(2,64,2)], projection=[(2,5,6,3)], dropconnect=[(2,8,0.5),(129,8,0.5)], local=[(1,4,4),(1,49,0)], local2d=[(1,3,8)])

@pytest.fixture(autouse=True)
def small(monkeypatch):
    "Small layers, few rounds, and a machine of known rates"
    monkeypatch.setattr(mod, '_rates', lambda device, dtype: (1e9,1e9))
    for k,o in bench_cases.items(): monkeypatch.setitem(bench_cases, k, {**o, 'rounds':2, 'shapes':tiny[k], 'quick':tiny[k], 'sweep':dict(enumerate(tiny[k], 1))})

def test_peak_extra():
    "Held at the same time is added, held one after the other is not; what was there before does not count"
    before = torch.zeros(2**20)
    def one(): return (before+1).sum()
    def both():
        a,b = before+1,before+2
        return (a+b).sum()
    for f,n in ((one,1), (both,3)): assert abs(peak_extra(f)-n*2**22)<2**12

def test_time_in_turns():
    calls = []
    res = time_in_turns([lambda: calls.append('a'), lambda: calls.append('b')], rounds=3, warmup=1)
    assert calls==['a','b']*4 and [len(o) for o in res]==[3,3] and min(res[0])>=0

class Event:
    "A GPU's event, of a clock that goes on by 5 ms with each thing done"
    now = 0.
    def __init__(self, enable_timing): assert enable_timing
    def record(self): self.at = Event.now
    def synchronize(self): self.waited = True
    def elapsed_time(self, end):
        assert end.waited
        return end.at-self.at

def test_cuda_timer(monkeypatch):
    "Between two events, which are waited for; the cache is cleared before, outside of them"
    done = []
    def note(what):
        done.append(what)
        Event.now += 5.
    monkeypatch.setattr(torch.cuda, 'Event', Event)
    timer = CudaTimer('cpu', 2**10)
    monkeypatch.setattr(timer, 'filler', types.SimpleNamespace(zero_=lambda: note('clear')))
    assert timer(lambda: note('f'))==5e-3 and done==['clear','f']
    monkeypatch.setitem(timers, 'cuda', lambda: timer)
    assert time_in_turns([lambda: note('a'), lambda: (note('b'), note('b'))], 'cuda', rounds=2, warmup=1)==[[5e-3]*2,[1e-2]*2]
    assert done[2:]==['clear','a','clear','b','b']*3

def test_cuda_timer_writes():
    filler = CudaTimer('cpu', 2**10).filler
    assert filler.nbytes==2**10 and filler.dtype==torch.uint8

@pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU')
@pytest.mark.device
def test_cuda_timer_on_cuda():
    a = torch.ones(2**26, device='cuda')
    short,long = (min(o) for o in time_in_turns([lambda: a.add_(1), lambda: [a.add_(1) for _ in range(20)]], 'cuda', rounds=3))
    assert 10*short<long<40*short

@pytest.mark.parametrize('dtype,precision', [('fp32','highest'),('tf32','high'),('bf16','highest')])
def test_precision(dtype, precision):
    "The flags are set within, and are afterwards what they were, whatever happens"
    def flags(): return torch.get_float32_matmul_precision(),torch.backends.cudnn.allow_tf32
    before = flags()
    with pytest.raises(RuntimeError, match='enough'), in_precision(dtype):
        assert flags()==(precision,dtype=='tf32')
        raise RuntimeError('enough')
    assert flags()==before

def test_table():
    assert md_table([dict(shape='2x3', ms=1.25, memory=0.5)])=='| shape | ms | memory |\n|---|---|---|\n| 2x3 | 1.2 | 0.50 |'
    assert md_table([dict(flex_ms=1.26, images_per_s=17.4)]).splitlines()[2]=='| 1.3 | 17 |'
    assert md_table([dict(ms=1., mb=None), dict(ms=2., dense_ms=3.)]).splitlines()[2:]==['| 1.0 |  |  |', '| 2.0 |  | 3.0 |']

@pytest.mark.parametrize('dtype', ['fp32','bf16'])
def test_rates(monkeypatch, dtype):
    "The best of the rounds counts: two operations for a multiply-add, in the type that is asked for; four bytes for a number that is read, four for one that is written"
    seen = []
    monkeypatch.setattr(mod, 'time_in_turns', lambda fs, device: [seen.append(f()) or [0.5,0.25,1.] for f in fs])
    assert peak_rate(n=64, dtype=dtype)==2*64**3/0.25 and peak_bandwidth(n=2**10)==8*2**10/0.25
    assert [(o.dtype,o.shape) for o in seen]==[(mod.dtypes[dtype],(64,64)),(torch.float32,(2**10,))]

def test_floor_time():
    "What takes longer: the operations, two for a multiply-add, or the bytes, four for a number, in bf16 two, but for parameters"
    assert floor_time(1000, 1, 1, 1)==2e-6 and floor_time(1, 100, 10, 1)==4*(300+20+3)/1e9
    assert floor_time(1, 100, 10, 1, 'cpu', 'bf16')==(2*(300+20)+4*3)/1e9

@pytest.mark.parametrize('name', ['projection','dropconnect','local','local2d'])
def test_operations(name, monkeypatch):
    "The formulas' products are those that are counted (where every cell sees every other, for attention)"
    monkeypatch.setattr(mod, '_of_package', lambda module, name, formula: (formula,'formula'))
    o = bench_cases[name]['case'](*tiny[name][0])
    assert mod._counted(mod._training_step(o['theirs'], o['x']))==o['madds']

@pytest.mark.parametrize('name', ['ssa','projection','local','local2d'])
def test_same(name):
    "Ours and the peer compute the same"
    o = bench_cases[name]['case'](*tiny[name][0])
    for m in (o['ours'],o['theirs']): m.eval()
    ours,theirs = (mod._tuple(o[k](o['x'])) for k in ('ours','theirs'))
    for a,b in zip(ours, theirs): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)

def test_of_package():
    "The package where it is installed, the formula elsewhere"
    assert mod._of_package('math', 'tau', None)[1]=='package' and mod._of_package('not_installed', 'Layer', 5)==(5,'formula')

@pytest.mark.parametrize('size,window,heads,d', [(4,1,2,8), (5,2,1,16), (3,4,2,4)])
def test_flex_is_local(size, window, heads, d):
    "The peers by FlexAttention and by a mask compute what local_attention does"
    ours,flex = mod._Local(heads, d, window),mod._FlexLocal(heads, d, window, size)
    flex.load_state_dict(ours.state_dict())
    x = torch.randn(3, 2, heads, size, size, d)
    with torch.no_grad(): torch.testing.assert_close(flex(x), ours(x), rtol=1e-4, atol=1e-5)
    x = torch.randn(2, size, size, d)
    for o in (mod._FlexLocal2D(d, window, size),mod._SdpaLocal2D(d, window, size)): torch.testing.assert_close(o(x), mod._Local2D(d, window)(x), rtol=1e-4, atol=1e-5)

def test_natten(monkeypatch):
    "Given as the package takes them: (batch, rows, columns, heads, channels), and a size of the window"
    def na2d(q, k, v, size):
        assert q.shape==k.shape==v.shape==(2,3,4,1,8) and size==5
        return 2*v
    monkeypatch.setitem(sys.modules, 'natten', types.ModuleType('natten'))
    monkeypatch.setitem(sys.modules, 'natten.functional', types.SimpleNamespace(na2d=na2d))
    x = torch.randn(2, 3, 4, 8)
    torch.testing.assert_close(mod._NattenLocal2D(8, 2)(x), 2*x)
    monkeypatch.setattr(mod, '_is_installed', lambda name: name=='natten')
    assert set(bench_cases['local2d']['case'](1, 3, 8)['others'])=={'sdpa','natten'}

def test_peers_on_cuda(monkeypatch):
    "FlexAttention is made, and compiled whole, on a GPU only"
    compiled = []
    class Peer(torch.nn.Linear):
        def compile(self, **kwargs): compiled.append(kwargs)
    assert mod._on_cuda('cpu', flex=lambda: Peer(1, 1))=={}
    assert list(mod._on_cuda('cuda', flex=lambda: Peer(1, 1)))==['flex'] and compiled==[dict(fullgraph=True, dynamic=False)]

def test_left_out():
    "A peer that fails is left out, and the row says why"
    class Broken(torch.nn.Linear):
        def forward(self, x): raise NotImplementedError('no | here\nand more')
    x = torch.randn(2, 3, requires_grad=True)
    row = bench_pair(torch.nn.Linear(3, 3), None, x, 18, rounds=1, others=dict(flex=Broken(3, 3), other=torch.nn.Linear(3, 3)))
    assert row['left_out']=='flex: NotImplementedError: no / here' and row['flex_ms'] is None and row['other_ms']>0
    assert 'left_out' not in bench_pair(torch.nn.Linear(3, 3), None, x, 18, rounds=1)

@pytest.mark.parametrize('dtype', ['fp32','bf16'])
def test_bf16(dtype, monkeypatch):
    "In bf16 the input is in bf16 and products are; what is right in fp32 is so in bf16, up to its rounding"
    seen = []
    class Sees(torch.nn.Linear):
        def forward(self, x):
            seen.append((x.dtype,(y := super().forward(x)).dtype,self.weight.dtype))
            return y
    bench_pair(Sees(3, 3), None, torch.randn(2, 3, requires_grad=True), 18, rounds=1, dtype=dtype)
    assert set(seen)=={(mod.dtypes[dtype],mod.dtypes[dtype],torch.float32)}

@pytest.mark.parametrize('sweep,dtype', [(False,'fp32'),(True,'fp32'),(False,['fp32','bf16'])])
def test_command(sweep, dtype, tmp_path, capsys):
    n = len(dtype) if isinstance(dtype, list) else 1
    res = bench(None if sweep else list(bench_cases), quick=True, sweep=sweep, dtype=dtype, out=str(tmp_path))
    assert list(res)==list(bench_cases)
    for name,rows in res.items():
        saved = list(csv.DictReader(open(tmp_path/f"{name}{'-sweep'*sweep}.csv")))
        assert [float(r['ms']) for r in saved]==[r['ms'] for r in rows] and len(rows)==n*len(tiny[name])
        assert (tmp_path/f'{name}.png').exists()==sweep
        for r in rows:
            assert r['ms']>0 and r['forward_ms']>0 and r['mb']>0 and r['peer'] and r['of_floor']==r['floor_ms']/r['ms']
            if r['peer_ms']: assert r['low']<=r['speedup']<=r['high'] and r['peer_forward_ms']>0 and r['memory']==r['mb']/r['peer_mb']
    assert [r['order'] for r in res['ssa']]==['channel','position']*n
    assert [r['peer_ms'] is None for o in ('dropconnect','local') for r in res[o]]==[False,True]*n*2 # the formula would need too much memory
    out = capsys.readouterr().out
    assert '| SimpleSelfAttention | 2x8x8x8 |' in out and '1 Gflop/s in fp32, ' in out and ', 1 GB/s' in out

@pytest.mark.parametrize('dtype', ['fp32','bf16'])
def test_networks(dtype, tmp_path):
    "The quick forms of what measures whole networks"
    res = bench(['train','recipe'], quick=True, dtype=dtype, out=str(tmp_path))
    assert [r['layer'] for r in res['train']]==[f'xresnet18 training, {o}' for o in ('none','ssa','ssa_sym')]
    assert [r['layer'] for r in res['recipe']]==[f'xresnet18 recipe, {o}' for o in ('cache','fastai')]
    for r in res['train']+res['recipe']: assert r['images_per_s']>0 and r['dtype']==dtype
    for r in res['train']: assert r['share_low']<=r['share']<=r['share_high']<1
    for r in res['recipe']: assert r['read_per_s']>r['images_per_s']
    assert (tmp_path/'recipe.csv').exists()

def test_tf32():
    with pytest.raises(ValueError, match="tf32' is for GPUs"): bench('ssa', dtype='tf32')

@pytest.mark.parametrize('kwargs', [dict(what='sas'), dict(device='tpu'), dict(what='step', sweep=True), dict(dtype='fp8')])
def test_bad(kwargs):
    with pytest.raises(ValueError, match='unknown'): bench(**kwargs)

@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_no_gpu():
    with pytest.raises(ValueError, match="device='cpu'"): bench('ssa', device='cuda')
