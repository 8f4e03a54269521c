"The script of the page about GPUs: what it runs is there, and it goes on where it was stopped"
import importlib.util,json,time
from pathlib import Path
import pytest
from fastattn.bench import benches
from fastattn.recipes.train import words_of

file = Path(__file__).parents[1]/'nbs'/'gpu'/'run.py'
spec = importlib.util.spec_from_file_location('gpu_run', file)
mod = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mod)

@pytest.mark.parametrize('device,toy', [('cuda',False),('cpu',False),('cpu',True)])
def test_steps(device, toy, tmp_path):
    "Files, benchmarks, options and presets that the steps name are there"
    steps = mod.steps_of(device, tmp_path, toy)
    for name,words in steps.items():
        if name.startswith('test-'): assert Path(words[-1]).exists()
        elif name.startswith('bench-'):
            given = json.loads(words[2])
            assert given['what'] in benches and given['device']==device and name==f"bench-{given['what']}-{given['dtype']}"
            assert device=='cuda' or given['dtype']!='tf32'
        else: assert words_of(words[2:])['out']==str(tmp_path/'runs')
    assert {'test-device','imagenette','thesis-2d'}<=set(steps) and (toy or 'sdoria-5' in steps)

def test_goes_on(tmp_path, monkeypatch, capsys):
    "What is done is not done again; what was interrupted goes on; what failed says why, and is left until asked for"
    long = f"import pathlib,time; p=pathlib.Path({str(tmp_path/'n')!r}); p.write_text(p.read_text()+'x' if p.exists() else 'x'); time.sleep(60*(p.read_text()=='x'))"
    steps = dict(good="print('one'); print('all is well')", bad="raise ValueError('for a reason')", long=long, last="print('end')")
    monkeypatch.setattr(mod, 'steps_of', lambda device, out, toy: {k: ['-c',o] for k,o in steps.items()})
    def states(**kwargs): return {k: o['state'] for k,o in mod.run(out=str(tmp_path), **kwargs).items()}
    assert states(minutes=0.05)==dict(good='done', bad='failed', long='begun')
    read = mod.read_states(tmp_path)
    assert read['good']['said']=='all is well' and read['bad']['said']=='ValueError: for a reason' and read['long']['seconds']>2
    assert '2 of 4 steps are left: long, last' in capsys.readouterr().out
    assert states()==dict(good='done', bad='failed', long='done', last='done') and (tmp_path/'n').read_text()=='xx'
    assert '0 of 4 steps are left' in capsys.readouterr().out
    steps['bad'] = "print('mended')"
    assert states()['bad']=='failed' and states(what='bad', again=True)['bad']=='done'

def test_bad(tmp_path):
    with pytest.raises(ValueError, match="unknown step 'bench-fp32'"): mod.run('bench-fp32', out=str(tmp_path))
    with pytest.raises(ValueError, match="unknown device 'tpu'"): mod.run(device='tpu', out=str(tmp_path))
