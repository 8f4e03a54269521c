"The command: answers from files, published figures, pictures, mistakes"
import csv,io,json,subprocess,sys
import pytest
from PIL import Image
from commands import command
from fastattn.recipes.leaderboard import *
from test_answer import run,write

def test_baseline(tmp_path, capsys):
    "What lacks the baseline that is asked for says so"
    write(tmp_path, *[run(a, s, 0.9+0.01*s, size=n, attn=a) for n,names in ((8,('none','ssa')), (16,('none','eca'))) for a in names for s in range(2)])
    res = leaderboard(str(tmp_path), baseline='ssa')
    assert {k: v.baseline for k,v in res.items()}=={'digits-8-2':'ssa', 'digits-16-2':'none'}
    out = capsys.readouterr().out
    assert 'digits-16-2 (without ssa; compared with none)\n' in out and 'digits-8-2\n' in out

def test_pictures(tmp_path):
    write(tmp_path/'runs', *[run(v, s, 0.9+0.01*s+0.001*s*(v=='ssa'), attn=v) for v in ('none','ssa') for s in range(3)])
    leaderboard(str(tmp_path/'runs'), plots=str(tmp_path/'p'), show=False)
    assert sorted(f.name for f in (tmp_path/'p').iterdir())==['digits-8-2-boxes.png','digits-8-2-curves.png','digits-8-2-pairs.png']
    for f in (tmp_path/'p').iterdir():
        with Image.open(f) as im: assert im.size[0]>300

def test_published():
    rows = published()
    assert {'imagenette','imagewoof','cifar10','mnist'}<={r['data'] for r in rows}
    assert all(0<r['accuracy']<1 and r['url'].startswith('http') and r['source'] for r in rows)
    best, = [r for r in published('imagenette', 128, 5) if r['source']=='fastai/imagenette board']
    assert best['accuracy']==0.8743 and best['runs']==5

def cli(monkeypatch, *args):
    "The command in this process: its exit code, which is the message where something is wrong"
    monkeypatch.setattr(sys, 'argv', ['fastattn-leaderboard',*args])
    with pytest.raises(SystemExit) as e: exec(command('leaderboard', 'out'), {})
    return e.value.code

def test_published_of_any_name(tmp_path, capsys):
    "A folder of images may be called anything; nobody has published anything about it"
    leaderboard(str(write(tmp_path, run(data='my-own-photos'))), published=True)
    assert 'my-own-photos-8-2' in capsys.readouterr().out

def test_equal_time(tmp_path):
    write(tmp_path, *[run(v, s, 0.9+0.01*s, epochs=e, attn=v) for v,e in (('none',3),('ssa',2)) for s in range(2)])
    assert set(leaderboard(str(tmp_path), show=False))=={'digits-8-2','digits-8-3'}
    assert list(leaderboard(str(tmp_path), equal_time=True, show=False)['digits-8'].by_label)==['none, epochs 3','ssa, epochs 2']

def test_command(tmp_path, monkeypatch, capsys):
    out = str(write(tmp_path, *[run(v, s, 0.8+0.01*s+0.001*s*(v=='ssa'), size=128, epochs=5, data='imagenette', attn=v) for v in ('none','ssa') for s in range(3)]))
    r = subprocess.run([sys.executable, '-c', command('leaderboard', 'out'), out, '--published', '--style', 'markdown'], capture_output=True, text=True)
    assert r.returncode==0 and '### imagenette-128-5' in r.stdout and '87.43%' in r.stdout and '**ssa** ' in r.stdout, r.stderr
    assert cli(monkeypatch, out, '--style', 'csv') is None
    assert len(list(csv.DictReader(io.StringIO(capsys.readouterr().out))))==2
    for args,m in (((out,'--baseline','nne'), "Did you mean 'none'"), ((out,'--style','x'), 'style'), ((str(tmp_path/'nothing'),), 'no folder')):
        assert m in cli(monkeypatch, *args)
