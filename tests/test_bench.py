"The benchmark measures what it says"
import csv
import pytest,torch
from fastattn import bench as mod
from fastattn.bench import *

tiny = dict(ssa=[(2,8,8),(2,64,2)], projection=[(2,5,6,3)], dropconnect=[(2,8,0.5),(129,8,0.5)], local=[(1,4,4),(1,49,0)], local2d=[(1,3,8)])

@pytest.fixture(autouse=True)
def small(monkeypatch):
    "Small layers, few rounds, and a machine of known rates"
    monkeypatch.setattr(mod, '_rates', lambda device: (1e9,1e9))
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

def test_table():
    assert md_table([dict(shape='2x3', ms=1.25, memory=0.5)])=='| shape | ms | memory |\n|---|---|---|\n| 2x3 | 1.2 | 0.50 |'
    assert md_table([dict(ms=1., mb=None), dict(ms=2., dense_ms=3.)]).splitlines()[2:]==['| 1.0 |  |  |', '| 2.0 |  | 3.0 |']

def test_rates(monkeypatch):
    "The best of the rounds counts: two operations for a multiply-add, four bytes for a number that is read and four for one that is written"
    monkeypatch.setattr(mod, 'time_in_turns', lambda fs, device: [[0.5,0.25,1.] for _ in fs])
    assert peak_rate(n=64)==2*64**3/0.25 and peak_bandwidth(n=2**10)==8*2**10/0.25

def test_floor_time():
    "What takes longer: the operations, two for a multiply-add, or the bytes, four for a number"
    assert floor_time(1000, 1, 1, 1)==2e-6 and floor_time(1, 100, 10, 1)==4*(300+20+3)/1e9

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

@pytest.mark.parametrize('sweep', [False,True])
def test_command(sweep, tmp_path, capsys):
    res = bench(None if sweep else list(bench_cases), quick=True, sweep=sweep, out=str(tmp_path))
    assert list(res)==list(bench_cases)
    for name,rows in res.items():
        saved = list(csv.DictReader(open(tmp_path/f"{name}{'-sweep'*sweep}.csv")))
        assert [float(r['ms']) for r in saved]==[r['ms'] for r in rows] and len(rows)==len(tiny[name])
        assert (tmp_path/f'{name}.png').exists()==sweep
        for r in rows:
            assert r['ms']>0 and r['forward_ms']>0 and r['mb']>0 and r['peer'] and r['of_floor']==r['floor_ms']/r['ms']
            if r['peer_ms']: assert r['low']<=r['speedup']<=r['high'] and r['peer_forward_ms']>0 and r['memory']==r['mb']/r['peer_mb']
    assert [r['order'] for r in res['ssa']]==['channel','position']
    assert [r['peer_ms'] is None for o in ('dropconnect','local') for r in res[o]]==[False,True]*2 # the formula would need too much memory
    out = capsys.readouterr().out
    assert '| SimpleSelfAttention | 2x8x8x8 |' in out and '1 Gflop/s, 1 GB/s' in out

@pytest.mark.parametrize('kwargs', [dict(what='sas'), dict(device='tpu'), dict(what='step', sweep=True)])
def test_bad(kwargs):
    with pytest.raises(ValueError, match='unknown'): bench(**kwargs)

@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_no_gpu():
    with pytest.raises(ValueError, match="device='cpu'"): bench('ssa', device='cuda')
