"Statistics against scipy, tables and simulation; foreign files; labels; what is said"
import io,json,math,warnings
import numpy as np,pandas as pd,pytest
from hypothesis import given,settings,strategies as st
from PIL import Image
from scipy import stats
from fastattn.recipes import answer as mod
from fastattn.recipes.answer import *

def run(variant='a', seed=0, accuracy=0.9, size=8, epochs=2, state='done', data='digits', **config):
    rows = [dict(epoch=i, train_loss=1., valid_loss=1., accuracy=accuracy, time=1.) for i in range(epochs)]
    return dict(state=state, variant=variant, seed=seed, config=dict(data=data, arch='net', size=size, epochs=epochs, **config), epochs=rows, accuracy=accuracy, time_s=2., params=10)

def free(variant, seed, value, **kwargs):
    "A run of compare"
    return dict(state='done', variant=variant, seed=seed, config=dict(comparison='c', variant=variant), epochs=[dict(train_loss=1., valid_loss=1., accuracy=value)], metric='accuracy', better='higher', value=value, time_s=1.)|kwargs

def write(folder, *runs):
    for o in runs:
        f = folder/f"{o['config']['data']}-{o['config']['size']}-{o['config']['epochs']}"/o['variant']/f"seed{o['seed']}.json"
        f.parent.mkdir(parents=True, exist_ok=True)
        f.write_text(json.dumps(o))
    return folder

accs = st.lists(st.floats(0.1, 0.9), min_size=2, max_size=8)

@settings(deadline=None, max_examples=40)
@given(accs, accs)
def test_differences(xs, ys):
    "Against scipy, from the definition; nothing is made up where all runs are equal"
    a,b = dict(enumerate(xs)),dict(enumerate(ys))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        res = differences(a, b)
    n = min(len(xs), len(ys))
    d = np.array(xs[:n])-np.array(ys[:n])
    assert res['pairs']==n and res['unpaired']==abs(len(xs)-len(ys)) and math.isclose(res['diff'], d.mean(), abs_tol=1e-12)
    if d.std(ddof=1)>1e-6:
        half = stats.t.ppf(0.975, n-1)*d.std(ddof=1)/math.sqrt(n)
        assert np.allclose([res['low'],res['high']], [d.mean()-half,d.mean()+half])
        assert math.isclose(res['p_paired'], 2*stats.t.sf(abs(d.mean())/(d.std(ddof=1)/math.sqrt(n)), n-1), rel_tol=1e-6, abs_tol=1e-12)
        assert 0.0249<=res['power']<=1
        wide = differences(a, b, anytime=True)
        assert wide['p_paired'] is wide['p_welch'] is None and wide['high']-wide['low']>res['high']-res['low']
    else: assert res['p_paired'] is res['low'] is res['power'] is res['needed'] is None
    for k in ('p_welch','p_paired','power'): assert res[k] is None or 0<=res[k]<=1

def test_unpaired():
    "Without common seeds: mean against mean, Welch's interval"
    res = differences({0: 0.5, 1: 0.6, 2: 0.7}, {5: 0.4, 6: 0.45, 7: 0.38})
    test = stats.ttest_ind([0.5,0.6,0.7], [0.4,0.45,0.38], equal_var=False)
    assert res['p_paired'] is None and math.isclose(res['p_welch'], test.pvalue) and math.isclose(res['low'], test.confidence_interval().low)

def test_too_few():
    one = differences({0: 0.5}, {0: 0.4})
    assert one['p_paired'] is None and math.isclose(one['diff'], 0.1)
    same = differences({0: 0.5, 1: 0.6}, {0: 0.5, 1: 0.6})
    assert same['diff']==0 and same['power'] is None and same['p_paired'] is None
    one_image = differences({0: 379/397, 1: 383/397}, {0: 378/397, 1: 382/397}) # better by the same image each time: two pairs do not make that certain
    assert math.isclose(one_image['diff'], 1/397) and one_image['p_paired'] is one_image['low'] is one_image['power'] is None
    apart = differences({0: 0.9, 1: 0.9}, {5: 0.8, 6: 0.8})
    assert apart['p_welch'] is apart['low'] is None and math.isclose(apart['diff'], 0.1)

def test_power():
    "Against simulation: how often would 8 pairs with this effect be clear?"
    rng = np.random.default_rng(1)
    found = (stats.ttest_1samp(rng.normal(1, 1, (4000,8)), 0, axis=1).pvalue<0.05).mean()
    assert abs(found-mod._power(mod.TTestPower(), 1., 8))<0.03
    assert mod._power(mod.TTestPower(), 1e6, 3)==pytest.approx(1) and mod._least(lambda n: False) is None
    needed = pairs_needed(1., 0.5)
    for n,ok in ((needed,True),(needed-1,False)): assert (stats.t.ppf(0.975, n-1)/math.sqrt(n)<=0.5)==ok
    assert pairs_needed(1., 0.5, anytime=True)>needed and pairs_needed(1., 1e-4) is None

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
        assert {i for i,p in enumerate(res) if p is not None and p<=level*(1+1e-12)}==rejected

# Anytime-valid intervals

def boundary(d, g, alpha, mu):
    "From the definition: log of the mixture likelihood ratio of the t-statistic at `mu`, over log(1/alpha)"
    n,x = len(d),np.asarray(d)-mu
    G,t2 = 1+n*g,n*x.mean()**2/x.var(ddof=1)
    return -0.5*math.log(G)+n/2*(math.log1p(t2/(n-1))-math.log1p(t2/(n-1)/G))-math.log(1/alpha)

@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(-1, 1), min_size=2, max_size=40), st.sampled_from([0.1,1.,10.]), st.sampled_from([0.01,0.05,0.2]))
def test_anytime_interval(d, g, alpha):
    "Its ends are where the mixture of likelihood ratios (Gaussian effects of scale sqrt(g)) crosses 1/alpha"
    if np.std(d)<1e-3: return
    low,high = anytime_interval(d, g, alpha)
    if not math.isfinite(low):
        assert boundary(d, g, alpha, np.mean(d)+1e6*np.std(d))<1e-6 # however far away, it never crosses
        return
    assert low<np.mean(d)<high
    for mu in (low,high): assert abs(boundary(d, g, alpha, mu))<1e-6

def test_false_alarms():
    "Looked at after each of up to 100 pairs without an effect: a fixed interval is wrong in two of five sequences, this one in fewer than 5%"
    d = np.random.default_rng(0).standard_normal((3000,100))
    n = np.arange(1, 101)
    mean = d.cumsum(1)/n
    with np.errstate(all='ignore'): t = np.abs(mean)/np.sqrt((np.square(d).cumsum(1)-n*mean**2)/(n-1)/n)
    wrong = {k: (t>w)[:,1:].any(1).mean() for k,w in dict(fixed=np.array([math.inf,*stats.t.ppf(0.975, n[1:]-1)]), anytime=np.array([mod._half_width(k, 1., 0.05) for k in n])).items()}
    assert 0.3<wrong['fixed']<0.5 and 0.01<wrong['anytime']<0.04

def test_price():
    for n,width in ((10,3.87),(20,3.42)): assert abs(mod._half_width(n, 1., 0.05)-width)<0.01
    assert mod._half_width(1, 1., 0.05)==math.inf and mod._half_width(2, 1., 0.05)==math.inf

@pytest.mark.parametrize('kwargs,message', [(dict(g=0), 'g must be'), (dict(g=-1), 'g must be'), (dict(alpha=0), 'alpha is'), (dict(alpha=1.), 'alpha is'), (dict(differences=[]), 'differences must'), (dict(differences=[[1.]]), 'differences must')])
def test_bad_interval(kwargs, message):
    with pytest.raises(ValueError, match=message): anytime_interval(**{**dict(differences=[1.,2.]), **kwargs})

# Files

def test_foreign_files(tmp_path):
    "Named and skipped, whatever they hold; never deleted"
    write(tmp_path, run(seed=1))
    deep = '{"state": "done", "config": '+'['*100_000+']'*100_000+'}'
    bad = {'a/seed0.json': '{"state": "do', 'b/seed2.json': '[]', 'c/seed3.json': '{}', 'd/seed4.json': json.dumps(run(seed=4)|dict(accuracy=None)), 'e/seed5.json': b'\xff\xfe', 'f/seed6.json': json.dumps(run(seed=6)|dict(config=3)), 'g/seed7.json': json.dumps({k: v for k,v in run(seed=7).items() if k!='time_s'}),
        'h/seed8.json': json.dumps(run(seed=8)|dict(config=dict(data=['digits'], size=8, epochs=2))), 'i/seed9.json': deep, 'j/seed10.json': json.dumps(run(seed=10)|dict(params='many')), 'k/seed11.json': json.dumps(run(seed=11)|dict(epochs=[dict(valid_loss=None)])),
        'l/seed12.json': json.dumps(run(seed=12, accuracy=98.2)), 'm/seed0 (1).json': json.dumps(run())}
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
    assert [o['value'] for o in res]==[0.9]

def test_groups(tmp_path):
    "Never across data sets: folders of one name are different ones"
    runs = [run('n', s, data=d) for d in ('/a/ims','/b/ims') for s in range(2)]+[run('n')]
    groups = group_runs([o|dict(value=o['accuracy']) for o in runs])
    assert sorted(map(len, groups.values()))==[1,2,2] and 'digits-8-2' in groups and '/a/ims-8-2' in groups

def labels(*runs): return list(Answer(runs).by_label)

def test_labels():
    runs = [run('n', attn='none', stages=None), run('s1', attn='ssa', stages='1'), run('s2', attn='ssa', stages='2'), run('s2p', attn='ssa', stages='2', presize=True)]
    assert labels(*runs)==['none', 'ssa, stages 1', 'ssa, stages 2', 'ssa, stages 2, presize']
    two = [run('n', attn='none'), run('s', attn='ssa', epochs=1)]
    assert list(group_runs(two))==['digits-8-1','digits-8-2']
    assert labels(*group_runs(two, equal_time=True)['digits-8'])==['none, epochs 2', 'ssa, epochs 1']
    assert labels(run('n', attn='none'))==['net, none']
    mine = run('m')
    mine['config'].update(arch='mine.py:f', arch_file='abc')
    assert labels(run('n', attn='none', act='Mish'), mine)==['net','mine.py:f']

# What is said

def answer(*diffs, base=0.9, **kwargs):
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.01, 20)
    return Answer([free('none', s, base+noise[s], **kwargs) for s in range(len(diffs))]+[free('x', s, base+noise[s]+d, **kwargs) for s,d in enumerate(diffs)])

def test_sentences():
    helps = answer(0.008, 0.009, 0.007, 0.0085)
    assert helps.sentences()==['**x** helps: +0.81 points, 95% interval +0.68 to +0.95, 4 pairs.']
    assert answer(-0.008, -0.009, -0.007, -0.0085).rows.verdict['x']=='harms'
    assert answer(0.001, -0.001, 0.0015, -0.0005).sentences()==['**x** has no effect larger than 0.21 points: +0.03, 95% interval -0.16 to +0.21, 4 pairs.']
    far = answer(0.03, -0.02, 0.04, -0.01).sentences()[0]
    assert far.startswith('**x** may help or harm: +1.00 points, 95% interval') and far.endswith('4 pairs. About 132 more pairs would narrow the interval to ±0.5 points.')
    assert answer(0.01).sentences()==['**x** may help or harm: +1.00 points, 1 pair. That is too few for an interval.']
    failed = Answer([free('none', s, 0.9+s/100) for s in range(3)]+[free('x', 0, 0.95), free('x', 1, 0.95)]+[free('x', 2, 0.)|dict(state='failed', error='NaN in epoch 3')])
    assert '1 of 3 runs failed (NaN in epoch 3)' in failed.sentences()[0]
    assert 'same seed: 1 of x and its baseline' in ' '.join(failed.notes())
    none = Answer([free('none', 0, 0.9), free('x', 0, 0.)|dict(state='failed', error='why')])
    assert none.sentences()==['**x** has no finished run; 1 of 1 runs failed (why).']

@pytest.mark.parametrize('n', [2,equal_pairs-1,equal_pairs,12])
@pytest.mark.parametrize('points,words', [(0,'equals none: +0.00 points'), (25,'differs from none by the same: +25.00 points')])
@pytest.mark.parametrize('protocol', ['fixed','until'])
def test_equal_pairs(n, points, words, protocol):
    "Pairs without a spread: said so, without an interval; from five pairs on the search for a difference ends"
    a = answer(*[points/100]*n, base=0.5, protocol=protocol)
    more = '' if n>=equal_pairs else ' Without a spread between pairs, there is no interval.'
    assert a.sentences()==[f'**x** {words} in each of {n} pairs.{more}']
    assert a.rows.verdict['x']==('equal' if n>=equal_pairs else 'open') and a.rows.low['x'] is None
    a.plot()

def test_one_pair_differs():
    "Nearly equal is not equal"
    a = answer(0, 0, 0, 0, 0, 1/397)
    assert a.rows.verdict['x']=='bounded' and 'no effect larger than' in a.sentences()[0]

@pytest.mark.parametrize('metric,better,sign', [('accuracy','higher',1), ('mae','lower',-1)])
def test_clear_alone(metric, better, sign):
    "Clear, but not after correction: the direction is said, and that chance can produce it"
    rng = np.random.default_rng(3)
    runs = [free('none', s, 0.5, metric=metric, better=better) for s in range(5)]
    runs += [free(f'v{i}', s, 0.5+rng.normal(0, 0.01), metric=metric, better=better) for i in range(14) for s in range(5)]
    for name,way in (('good',sign), ('bad',-sign)): runs += [free(name, s, 0.5+way*d, metric=metric, better=better) for s,d in enumerate([0.002,0.0035,0.001,0.004,0.0025])]
    a = Answer(runs)
    for name,verb in (('good','may help'), ('bad','may harm')):
        assert a.sentence(name).startswith(f'**{name}** {verb}: ') and 'among 16 comparisons, chance alone can produce one like this (Holm p 0.' in a.sentence(name)

def test_lower_is_better():
    lower = Answer([free(v, s, 1.+s/10-(v=='x')*(0.2+s/1000), metric='mae', better='lower') for v in ('base','x') for s in range(4)])
    assert lower.baseline=='base' and lower.rows.verdict['x']=='helps' and lower.sentences()[0].startswith('**x** helps: -0.202 of mae')
    assert 'mae' in lower.table().columns and lower.rows.best['base']==1.

def test_several():
    "Among fifteen that do nothing, one that is clear alone is not said to help; with looks, the 5% are shared"
    rng = np.random.default_rng(3)
    base = [free('none', s, 0.9) for s in range(5)]
    idle = [free(f'v{i}', s, 0.9+rng.normal(0, 0.01)) for i in range(14) for s in range(5)]
    d = [0.002,0.0035,0.001,0.004,0.0025]
    a = Answer(base+idle+[free('z', s, 0.9+d[s]) for s in range(5)])
    assert a.rows.p['z']<0.05<a.rows.p_holm['z'] and a.rows.verdict['z']=='open' and 'among 15 comparisons' in a.sentence('z')
    looked = Answer([o|dict(protocol='looked') for o in a.runs])
    assert np.allclose([looked.rows.low['v0'],looked.rows.high['v0']], anytime_interval([o['value']-0.9 for o in idle[:5]], alpha=0.05/15))
    assert 'Bonferroni' in ' '.join(looked.notes()) and looked.rows.p.isna().all()

def test_shares_stay_shares():
    "The interval of a mean accuracy does not exceed 100%"
    a = Answer([free('none', s, v) for s,v in enumerate((0.999,1.,0.97))])
    assert a.rows.mean_high['none']==1 and a.rows.mean_low['none']<0.97

def test_spread_parts():
    "Against simulation: coins alone leave no spread for the seed, and a seed's spread is found"
    rng = np.random.default_rng(0)
    p = rng.beta(3, 1, 500)
    coins = np.mean([spread_parts(rng.random((10,500))<p)['seed'] for _ in range(200)])
    both = np.mean([spread_parts(rng.random((10,500))<(p*0.8+rng.normal(0, 0.02, (10,1))).clip(0, 1))['seed']**2 for _ in range(200)])**0.5
    assert coins<0.008 and abs(both-0.02)<0.003

def test_table_and_csv():
    runs = [run('n', s, 0.9+0.001*s, attn='none') for s in range(5)]+[run('s', s, 0.91+0.0015*s, attn='ssa') for s in range(5)]+[run('f', 0, 0., state='failed', attn='sa')|dict(error='why')]
    a = Answer(runs)
    assert list(a.rows.index)==['none','ssa','sa'] and a.rows.pairs['ssa']==5 and a.rows.p_holm['ssa']==a.rows.p_paired['ssa']
    assert a.table().runs.tolist()==['5','5','0 of 1']
    back = pd.read_csv(io.StringIO(a.csv()), index_col='variant')
    assert back['mean']['ssa']==a.rows['mean']['ssa'] and math.isnan(back['diff']['none'])
    swapped = Answer(runs, 'ssa')
    assert swapped.rows.index[0]=='ssa' and math.isclose(swapped.rows['diff']['none'], -a.rows['diff']['ssa'])
    lines = [l for l in a._repr_markdown_().splitlines() if l.startswith('|')]
    assert len({o.count('|') for o in lines})==1 and str(a).splitlines()[0].startswith('ssa ')
    for f,m in ((lambda: Answer(runs, 'ssaa'), "Did you mean 'ssa'"), (lambda: a.table(['mean']), 'column'), (lambda: a.sentence('z'), 'variant'), (lambda: a.more(3), 'more runs')):
        with pytest.raises(ValueError, match=m): f()

def test_baseline():
    "None of several models; and several runs of a seed are no variant"
    runs = [run(f'{n}-{a}', s, 0.8+0.01*s+0.02*(a=='eca'))|dict(config=dict(data='digits', arch=n, size=8, epochs=2, attn=a)) for n in ('xresnet18','xresnet50') for a in ('eca','none') for s in range(2)]
    assert Answer(runs).baseline=='xresnet18, none'
    with pytest.raises(ValueError, match="'eca' has several runs of one seed"): Answer(runs, by=lambda o: o['config']['attn'])
    with pytest.raises(ValueError, match='different metrics'): Answer([free('a', 0, 0.9), free('b', 0, 0.9, metric='dice')])

def test_nothing():
    a = Answer([])
    assert a.sentences()==[] and 'No run has finished' in str(a)
    with pytest.raises(ValueError, match='no pairs'): a.plot()

def test_protocol(tmp_path):
    assert read_protocol(tmp_path)==dict(kind='fixed', seeds=None)
    for text,m in (('{', 'cannot be read'), ('{"kind": "mine"}', 'is not a protocol'), ('[]', 'is not a protocol')):
        (tmp_path/'protocol').write_text(text)
        with pytest.raises(ValueError, match=m): read_protocol(tmp_path)

def test_pictures(tmp_path):
    a = answer(0.008, 0.009, 0.007, 0.0085)
    for f in ('plot','plot_boxes','plot_curves'):
        getattr(a, f)(tmp_path/f'{f}.png')
        with Image.open(tmp_path/f'{f}.png') as im: assert im.size[0]>300

@pytest.mark.parametrize('baseline', ['none','a name of many words, '*6,'x'*200])
@pytest.mark.parametrize('n', [1,2,7])
def test_labels_fit(baseline, n):
    "The label of the y axis stays within the picture, however long the baseline's name is"
    runs = [free(k, s, 0.9+0.01*s*(i+1)) for i,k in enumerate([baseline,*map(str, range(n))]) for s in range(3)]
    fig = Answer(runs, baseline).plot()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    FigureCanvasAgg(fig).draw()
    box,(width,height) = fig._supylabel.get_window_extent(),fig.get_size_inches()*fig.dpi
    assert box.x0>=0 and box.y0>=0 and box.x1<=width and box.y1<=height

def test_one_pair():
    "The difference of one pair is that pair's, whatever runs without a partner say"
    row = differences({0: 0.8, 1: 0.5}, {0: 0.7, 2: 0.1})
    assert math.isclose(row['diff'], 0.1) and row['pairs']==1 and row['unpaired']==2

@pytest.mark.parametrize('n', [1,2,3])
def test_too_few_that_differ_by_the_same(n):
    "An interval without a bound, whatever the spread: not a number was what infinity times 0 gave"
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert anytime_interval([0.25]*n)==(-math.inf,math.inf)
