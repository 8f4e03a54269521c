"Statistics against scipy, tables and simulation; foreign files; labels; the command"
import csv,io,json,math,subprocess,sys,warnings
import numpy as np,pytest
from hypothesis import given,settings,strategies as st
from PIL import Image
from scipy import integrate,stats
from commands import command
from fastattn.recipes import leaderboard as mod
from fastattn.recipes.leaderboard import *

def run(variant='a', seed=0, accuracy=0.9, size=8, epochs=2, state='done', data='digits', **config):
    rows = [dict(epoch=i, train_loss=1., valid_loss=1., accuracy=accuracy, time=1.) for i in range(epochs)]
    return dict(state=state, variant=variant, seed=seed, config=dict(data=data, arch='net', size=size, epochs=epochs, **config), epochs=rows, accuracy=accuracy, time_s=2., params=10)

def write(folder, *runs):
    for o in runs:
        f = folder/f"{o['config']['data']}-{o['config']['size']}-{o['config']['epochs']}"/o['variant']/f"seed{o['seed']}.json"
        f.parent.mkdir(parents=True, exist_ok=True)
        f.write_text(json.dumps(o))
    return folder

accs = st.lists(st.floats(0.1, 0.9), min_size=2, max_size=8)

@settings(deadline=None, max_examples=40)
@given(accs, accs)
def test_compare(xs, ys):
    "Against scipy, from the definition; nothing is made up where all runs are equal"
    a,b = dict(enumerate(xs)),dict(enumerate(ys))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        res = compare(a, b)
    n = min(len(xs), len(ys))
    d = np.array(xs[:n])-np.array(ys[:n])
    assert res['pairs']==n and math.isclose(res['diff'], d.mean(), abs_tol=1e-12)
    if d.std(ddof=1)>1e-6:
        half = stats.t.ppf(0.975, n-1)*d.std(ddof=1)/math.sqrt(n)
        assert np.allclose([res['low'],res['high']], [d.mean()-half,d.mean()+half])
        assert math.isclose(res['p_paired'], 2*stats.t.sf(abs(d.mean())/(d.std(ddof=1)/math.sqrt(n)), n-1), rel_tol=1e-6, abs_tol=1e-12)
        assert 0.0249<=res['power']<=1
    else: assert res['p_paired'] is res['low'] is res['power'] is res['needed'] is None
    for k in ('p_welch','p_paired','power'): assert res[k] is None or 0<=res[k]<=1

def test_unpaired():
    "Without common seeds: mean against mean, Welch's interval"
    res = compare({0: 0.5, 1: 0.6, 2: 0.7}, {5: 0.4, 6: 0.45, 7: 0.38})
    test = stats.ttest_ind([0.5,0.6,0.7], [0.4,0.45,0.38], equal_var=False)
    assert res['p_paired'] is None and math.isclose(res['p_welch'], test.pvalue) and math.isclose(res['low'], test.confidence_interval().low)

def test_too_few():
    assert compare({0: 0.5}, {0: 0.4})['p_paired'] is None and math.isclose(compare({0: 0.5}, {0: 0.4})['diff'], 0.1)
    same = compare({0: 0.5, 1: 0.6}, {0: 0.5, 1: 0.6})
    assert same['diff']==0 and same['power'] is None and same['p_paired'] is None
    one_image = compare({0: 379/397, 1: 383/397}, {0: 378/397, 1: 382/397}) # better by the same image each time: two pairs do not make that certain
    assert math.isclose(one_image['diff'], 1/397) and one_image['p_paired'] is one_image['low'] is one_image['power'] is None
    apart = compare({0: 0.9, 1: 0.9}, {5: 0.8, 6: 0.8})
    assert apart['p_welch'] is apart['low'] is None and math.isclose(apart['diff'], 0.1)

def test_power():
    "Against simulation, unpaired with unequal spread"
    rng = np.random.default_rng(1)
    a,b = rng.normal(1.2, 1, (4000,6)),rng.normal(0, 0.5, (4000,9))
    found = (stats.ttest_ind(a, b, axis=1, equal_var=False).pvalue<0.05).mean()
    assert abs(found-t_power(1.2/math.sqrt(1/6+0.25/9), mod._welch_df((1/6,6), (0.25/9,9))))<0.03
    for effect,df in ((7.5, 1), (10, 1), (3, 4), (10, 4)): # where scipy gives up one tail; by the ratio of a normal to a chi
        crit = stats.t.ppf(0.975, df)
        def found(u): return sum(stats.norm.cdf(s*effect-crit*np.sqrt(stats.chi2.ppf(u, df)/df)) for s in (1,-1))
        assert abs(t_power(effect, df)-integrate.quad(found, 0, 1, limit=200)[0])<1e-6
    assert t_power(float('inf'), 3)==t_power(1e6, 3)==1 and abs(t_power(0, 10)-0.05)<1e-9
    assert mod._runs_needed(lambda n: 0.) is None

@settings(deadline=None, max_examples=60)
@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), max_size=8))
def test_holm(ps):
    "By the definition: step down, reject while p*(number left) is within the level"
    res = holm(ps)
    assert [o is None for o in res]==[o is None for o in ps]
    for level in (0.01, 0.05, 0.2):
        left = sorted((p,i) for i,p in enumerate(ps) if p is not None)
        rejected = set()
        for k,(p,i) in enumerate(left):
            if p*(len(left)-k)>level: break
            rejected.add(i)
        assert rejected=={i for i,p in enumerate(res) if p is not None and p<=level}

def test_foreign_files(tmp_path):
    "Named and skipped, whatever they hold; never deleted"
    write(tmp_path, run(seed=1))
    bad = {'a/seed0.json': '{"state": "do', 'b/seed2.json': '[]', 'c/seed3.json': '{}', 'd/seed4.json': json.dumps(run()|dict(accuracy=None)), 'e/seed5.json': b'\xff\xfe', 'f/seed6.json': json.dumps(run()|dict(config=3)), 'g/seed7.json': json.dumps({k: v for k,v in run().items() if k!='time_s'}),
        'h/seed8.json': json.dumps(run()|dict(config=dict(data=['digits'], size=8, epochs=2)))}
    for k,v in bad.items():
        (tmp_path/k).parent.mkdir()
        (tmp_path/k).write_bytes(v if isinstance(v, bytes) else v.encode())
    (tmp_path/'seed9.json').mkdir()
    with pytest.warns(UserWarning) as ws: res = read_runs(tmp_path)
    assert [o['seed'] for o in res]==[1]
    assert len(ws)==len(bad)+1 and all(any(k in str(w.message) for w in ws) for k in bad)
    assert all((tmp_path/k).exists() for k in bad)

def test_twice(tmp_path):
    write(tmp_path/'x', run())
    write(tmp_path/'y', run(accuracy=0.1))
    with pytest.warns(UserWarning, match='same name'): res = read_runs(tmp_path)
    assert [o['accuracy'] for o in res]==[0.9]

def test_labels():
    runs = [run('n', attn='none', stages=None), run('s1', attn='ssa', stages='1'), run('s2', attn='ssa', stages='2'), run('s2p', attn='ssa', stages='2', presize=True)]
    assert list(group_runs(runs)['digits-8-2'])==['none', 'ssa, stages 1', 'ssa, stages 2', 'ssa, stages 2, presize']
    two = [run('n', attn='none'), run('s', attn='ssa', epochs=1)]
    assert list(group_runs(two))==['digits-8-1','digits-8-2']
    assert list(group_runs(two, equal_time=True)['digits-8'])==['none, epochs 2', 'ssa, epochs 1']
    assert list(group_runs([run('n', attn='none')])['digits-8-2'])==['net, none']

def test_rows():
    runs = [run('n', s, 0.9+0.001*s, attn='none') for s in range(5)]+[run('s', s, 0.91+0.0015*s, attn='ssa') for s in range(5)]+[run('f', 0, 0., state='failed', attn='sa')]
    rows = board_rows(group_runs(runs)['digits-8-2'])
    assert [r['variant'] for r in rows]==['none','ssa','sa'] and rows[1]['pairs']==5 and rows[1]['p_holm']==rows[1]['p_paired']
    assert rows[2]['runs']==0 and '0 of 1' in format_rows(rows)
    md = format_rows(rows, 'markdown').splitlines()
    assert len({o.count('|') for o in md})==1
    back = list(csv.DictReader(io.StringIO(format_rows(rows, 'csv'))))
    assert float(back[1]['accuracy'])==rows[1]['accuracy'] and back[0]['diff']==''
    swapped = board_rows(group_runs(runs)['digits-8-2'], 'ssa')
    assert swapped[0]['variant']=='ssa' and math.isclose(swapped[1]['diff'], -rows[1]['diff'])
    for f,m in ((lambda: board_rows(group_runs(runs)['digits-8-2'], 'ssaa'), "Did you mean 'ssa'"), (lambda: format_rows(rows, 'html'), 'style'), (lambda: format_rows(rows, columns=['mean']), 'column'), (lambda: format_rows(rows, 'csv', columns=['sd']), 'columns are chosen')):
        with pytest.raises(ValueError, match=m): f()

def test_baseline(tmp_path, capsys):
    "None of several models; what lacks the one asked for says so; and several runs of a seed are no variant"
    runs = [run(f'{n}-{a}', s, 0.8+0.01*s+0.02*(a=='eca'), attn=a)|dict(config=dict(data='digits', arch=n, size=8, epochs=2, attn=a)) for n in ('xresnet18','xresnet50') for a in ('eca','none') for s in range(2)]
    assert board_rows(group_runs(runs)['digits-8-2'])[0]['variant']=='xresnet18, none'
    with pytest.raises(ValueError, match="'eca' has several runs of one seed"): compare_table(runs, lambda o: o['config']['attn'], 'none')
    write(tmp_path, *[run(a, s, 0.9+0.01*s, size=n, attn=a) for n,names in ((8,('none','ssa')), (16,('none','eca'))) for a in names for s in range(2)])
    res = leaderboard(str(tmp_path), baseline='ssa')
    assert {k: v[0]['variant'] for k,v in res.items()}=={'digits-8-2':'ssa', 'digits-16-2':'none'}
    out = capsys.readouterr().out
    assert 'digits-16-2 (without ssa; compared with none)\n' in out and 'digits-8-2\n' in out

def test_pictures(tmp_path):
    write(tmp_path/'runs', *[run(v, s, 0.9+0.01*s, attn=v) for v in ('none','ssa') for s in range(3)])
    leaderboard(str(tmp_path/'runs'), plots=str(tmp_path/'p'))
    assert sorted(f.name for f in (tmp_path/'p').iterdir())==['digits-8-2-boxes.png','digits-8-2-curves.png']
    for f in (tmp_path/'p').iterdir():
        with Image.open(f) as im: assert im.size[0]>500

def test_published():
    rows = published()
    assert {'imagenette','imagewoof','cifar10','mnist'}<={r['data'] for r in rows}
    assert all(0<r['accuracy']<1 and r['url'].startswith('http') and r['source'] for r in rows)
    best, = [r for r in published('imagenette', 128, 5) if r['source']=='fastai/imagenette board']
    assert best['accuracy']==0.8743 and best['runs']==5

def cli(*args): return subprocess.run([sys.executable, '-c', command('leaderboard', 'out'), *args], capture_output=True, text=True)

def test_published_of_any_name(tmp_path, capsys):
    "A folder of images may be called anything; nobody has published anything about it"
    leaderboard(str(write(tmp_path, run(data='my-own-photos'))), published=True)
    assert 'my-own-photos-8-2' in capsys.readouterr().out

def test_command(tmp_path):
    out = str(write(tmp_path, *[run(v, s, 0.8+0.01*s, size=128, epochs=5, data='imagenette', attn=v) for v in ('none','ssa') for s in range(3)]))
    r = cli(out, '--published', '--style', 'markdown')
    assert r.returncode==0 and '### imagenette-128-5' in r.stdout and '87.43%' in r.stdout, r.stderr
    assert len(list(csv.DictReader(io.StringIO(cli(out, '--style', 'csv').stdout))))==2
    for args,m in (((out,'--baseline','nne'), "Did you mean 'none'"), ((out,'--style','x'), 'style'), ((str(tmp_path/'nothing'),), 'no folder')):
        r = cli(*args)
        assert r.returncode!=0 and 'Traceback' not in r.stderr and m in r.stderr
