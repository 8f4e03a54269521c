"Data sets by name and folders of images, with all that can be wrong in them"
import numpy as np,pytest,torch
from pathlib import Path
from PIL import Image
from fastai.basics import Learner,URLs,fastai_cfg,load_learner,set_seed
from fastattn.recipes.data import *
from fastattn.recipes import data

def image(fn, color=0, size=(48,40)):
    fn.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(color)
    Image.fromarray(rng.integers(0, 255, (*size,3), dtype=np.uint8)).save(fn)

@pytest.fixture
def flat(tmp_path):
    "Two classes of ten images each"
    for c in 'ab':
        for i in range(10): image(tmp_path/c/f'{i}.png', i)
    return tmp_path

@pytest.fixture
def split(tmp_path):
    for part,n in (('train',6),('valid',3)):
        for c in 'ab':
            for i in range(n): image(tmp_path/part/c/f'{i}.jpg', i)
    return tmp_path

def have(url): return pytest.mark.skipif(not (fastai_cfg().path('data')/Path(url).stem).is_dir(), reason=f'{Path(url).stem} is not on disk')

def test_digits():
    dls = get_dls('digits')
    assert (len(dls.train_ds),len(dls.valid_ds),dls.c)==(1400,397,10)
    x,y = dls.one_batch()
    assert x.shape==(64,1,32,32)
    counts = np.bincount([int(o.label) for o in dls.valid_ds.items])
    assert counts.min()>=34 and counts.max()<=42
    xs = torch.cat([o[0] for o in dls.train.new(shuffle=False, drop_last=False)])
    assert abs(xs.mean())<1e-3 and abs(xs.std()-1)<1e-2

def test_digits_split_is_fixed():
    def held_out(): return [np.array(o).tobytes() for o in get_dls('digits', size=8).valid_ds.items]
    a,b = held_out(),held_out()
    assert a==b
    train = {np.array(o).tobytes() for o in get_dls('digits', size=8).train_ds.items}
    assert not train & set(a)

def test_digits_pixels():
    "At 8 px the images are scikit-learn's"
    from sklearn.datasets import load_digits
    theirs = {(o*255/16).round().astype(np.uint8).tobytes() for o in load_digits().images}
    assert {np.array(o).tobytes() for o in get_dls('digits', size=8).valid_ds.items}<=theirs

@pytest.mark.filterwarnings('ignore')
def test_digits_predict(tmp_path):
    "An exported Learner takes an array or an image of any size"
    dls = get_dls('digits', size=16)
    learn = Learner(dls, torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 10)), path=tmp_path)
    learn.export()
    learn = load_learner(tmp_path/'export.pkl')
    for o in (np.zeros((8,8), dtype=np.uint8), Image.new('L', (20,30))): assert learn.predict(o)[0] in dls.vocab

@pytest.mark.parametrize('workers', [0,2])
def test_seed(flat, workers):
    batches = []
    for _ in range(2):
        set_seed(3)
        dls = get_dls(flat, size=32, bs=8, workers=workers)
        batches.append([x for _ in range(2) for x,_ in dls.train])
    assert all(torch.equal(a, b) for a,b in zip(*batches))
    assert not torch.equal(batches[0][0], batches[0][-1])

def test_flat(flat):
    dls = get_dls(flat, size=32, bs=4, workers=0)
    assert (len(dls.train_ds),len(dls.valid_ds),list(dls.vocab))==(16,4,['a','b'])
    assert sorted(y for _,y in dls.valid_ds)==[0,0,1,1]
    assert dls.one_batch()[0].shape==(4,3,32,32)

@pytest.mark.parametrize('valid', ['val','valid','test'])
def test_split(split, valid):
    (split/'valid').rename(split/valid)
    dls = get_dls(split, size=32, bs=4, workers=0)
    assert (len(dls.train_ds),len(dls.valid_ds))==(12,6)

def test_no_images(tmp_path):
    with pytest.raises(ValueError, match='no images'): get_dls(tmp_path)

def test_empty_class(flat):
    (flat/'c').mkdir()
    (flat/'c'/'readme.txt').write_text('no image')
    with pytest.raises(ValueError, match='no images for the class c'): get_dls(flat)

def test_one_class(tmp_path):
    for i in range(5): image(tmp_path/'a'/f'{i}.png')
    with pytest.raises(ValueError, match='only one class, a'): get_dls(tmp_path)

def test_classes_differ(split):
    image(split/'valid'/'c'/'1.jpg')
    with pytest.raises(ValueError, match='differ in the classes c'): get_dls(split)

def test_too_few_for_a_split(tmp_path):
    for c in 'ab': image(tmp_path/c/'1.png')
    with pytest.raises(ValueError, match='fewer than 5 images for a, b'): get_dls(tmp_path)

@pytest.mark.parametrize('how', ['text','empty','cut'])
def test_corrupt(split, how):
    fn = split/'train'/'a'/'3.jpg'
    fn.write_bytes({'text': b'not an image', 'empty': b'', 'cut': fn.read_bytes()[:400]}[how])
    with pytest.raises(ValueError, match=r'1 of 18 images cannot be read: .*3\.jpg'): get_dls(split)

def test_many_corrupt(flat):
    for fn in (flat/'a').iterdir(): fn.write_bytes(b'')
    for fn in list((flat/'b').iterdir())[:3]: fn.write_bytes(b'')
    with pytest.raises(ValueError, match=r'13 of 20 .*, \.\.\.'): get_dls(flat)

def test_unknown_name():
    with pytest.raises(ValueError, match="no folder of that name.*Did you mean 'imagenette'"): get_dls('imagenete')

@pytest.mark.parametrize('kwargs', [dict(size=0), dict(bs=0), dict(workers=-1)])
def test_bad_numbers(kwargs):
    with pytest.raises(ValueError, match=f'{next(iter(kwargs))} must be at least'): get_dls('digits', **kwargs)

def test_no_network_no_data(tmp_path, monkeypatch):
    "The error says where the data are looked for, and how to put them there"
    def no_network(*args, **kwargs): raise OSError('network is unreachable')
    monkeypatch.setattr(data, 'untar_data', no_network)
    with pytest.raises(FileNotFoundError) as e: get_dls('imagewoof', size=64)
    for o in (str(fastai_cfg().path('data')), str(fastai_cfg().path('archive')), 'imagewoof2-160.tgz', 'network is unreachable'): assert o in str(e.value)

@pytest.mark.parametrize('size,url', [(64,URLs.IMAGENETTE_160), (128,URLs.IMAGENETTE_160), (129,URLs.IMAGENETTE_320), (256,URLs.IMAGENETTE_320), (257,URLs.IMAGENETTE)])
def test_archive(size, url, monkeypatch):
    asked = []
    def untar(url):
        asked.append(url)
        raise OSError
    monkeypatch.setattr(data, 'untar_data', untar)
    with pytest.raises(FileNotFoundError): get_dls('imagenette', size=size)
    assert asked==[url]

@pytest.mark.parametrize('name,size,shape,n', [pytest.param('mnist', None, (1,28,28), (60000,10000), marks=have(URLs.MNIST)),
    pytest.param('cifar10', None, (3,32,32), (50000,10000), marks=have(URLs.CIFAR)), pytest.param('imagenette', 64, (3,64,64), (9469,3925), marks=have(URLs.IMAGENETTE_160))])
def test_real(name, size, shape, n):
    dls = get_dls(name, size=size, bs=4, workers=0)
    assert (len(dls.train_ds),len(dls.valid_ds))==n and dls.c==10
    for dl in dls: assert next(iter(dl))[0].shape==(4,*shape)
