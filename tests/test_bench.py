"The benchmark measures what it says"
import csv
import pytest,torch
from fastattn import bench as mod
from fastattn.bench import *

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

def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mod, 'ssa_shapes', [(2,8,8),(2,64,2)])
    rows = bench('ssa', quick=True, out=str(tmp_path))['ssa']
    assert [r['order'] for r in rows]==['channel','position']
    saved = list(csv.DictReader(open(tmp_path/'ssa.csv')))
    assert [float(r['speedup']) for r in saved]==[r['speedup'] for r in rows]
    assert all(r['ms']>0 and r['mb']>0 and r['low']<=r['speedup']<=r['high'] for r in rows)
    assert '| SimpleSelfAttention | 2x8x8x8 |' in capsys.readouterr().out

@pytest.mark.parametrize('kwargs', [dict(what='sas'), dict(device='tpu')])
def test_bad(kwargs):
    with pytest.raises(ValueError, match='unknown'): bench(**kwargs)

@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_no_gpu():
    with pytest.raises(ValueError, match="device='cpu'"): bench('ssa', device='cuda')
