"Data sets by name and folders of images, with all that can be wrong in them"
import shutil,tarfile
import numpy as np,pytest,torch
import fastdownload.core
from pathlib import Path
from PIL import Image
from fastai.basics import Learner,URLs,fastai_cfg,load_learner,set_seed
from sklearn.datasets import load_digits
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
    theirs = {(o*255/16).round().astype(np.uint8).tobytes() for o in load_digits().images}
    assert {np.array(o).tobytes() for o in get_dls('digits', size=8).valid_ds.items}<=theirs

def test_digits_kept():
    "What is read is what was enlarged once: nothing is left to do for an item"
    dls = get_dls('digits')
    im = dls.train_ds.items[0]
    assert DigitImage(32)(im) is im and dls.train_ds[0][0] is im

@pytest.mark.parametrize('size', [1,8,20,32])
def test_digit_image(size):
    "Whatever a digit comes as, the model sees the same"
    floats = load_digits().images[5]
    u8 = (floats*255/16).round().astype(np.uint8)
    im = Image.fromarray(u8)
    want = np.array(im.resize((size,size), Image.Resampling.BILINEAR))
    for o in (floats, floats.astype(np.float32), u8, im, im.convert('RGB'), torch.tensor(floats), torch.tensor(u8)):
        res = DigitImage(size)(o)
        assert res.mode=='L' and np.array_equal(np.array(res), want)

def test_digit_file(tmp_path):
    image(tmp_path/'1.png')
    for o in (tmp_path/'1.png', str(tmp_path/'1.png')): assert DigitImage(16)(o).size==(16,16)

@pytest.mark.filterwarnings('ignore')
def test_digits_predict(tmp_path):
    "An exported Learner takes an array or an image of any size, and sees what it saw in training"
    dls = get_dls('digits', size=16)
    learn = Learner(dls, torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 10)), path=tmp_path)
    want = learn.get_preds(ds_idx=1)[0][:3]
    learn.export()
    learn = load_learner(tmp_path/'export.pkl')
    floats = {(o*255/16).round().astype(np.uint8).tobytes(): o for o in load_digits().images}
    small = [np.array(o).tobytes() for o in get_dls('digits', size=8).valid_ds.items[:3]]
    for k,w in zip(small, want):
        u8 = np.frombuffer(k, dtype=np.uint8).reshape(8,8)
        for o in (u8, floats[k], Image.fromarray(u8), Image.fromarray(u8).convert('RGB')):
            label,idx,probs = learn.predict(o)
            assert torch.allclose(probs, w, atol=1e-5) and label==dls.vocab[w.argmax()]
    assert learn.predict(Image.new('L', (20,30)))[0] in dls.vocab

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

def test_split_is_fixed(flat, tmp_path_factory):
    "The same images are held out whatever the order in which a disk lists them"
    other = tmp_path_factory.mktemp('other')
    for fn in sorted(flat.rglob('*.png'), reverse=True):
        (other/fn.parent.name).mkdir(exist_ok=True)
        shutil.copy(fn, other/fn.parent.name)
    held = [[o.relative_to(p) for o in get_dls(p, size=32, bs=4, workers=0).valid_ds.items] for p in (flat,other)]
    assert held[0]==held[1]

def test_crops(flat):
    "Held-out images are always cropped alike, those of training each time anew"
    set_seed(0)
    dls = get_dls(flat, size=32, bs=4, workers=0)
    def batch(dl): return dl.new(shuffle=False).one_batch()[0]
    assert torch.equal(batch(dls.valid), batch(dls.valid))
    assert not torch.equal(batch(dls.train), batch(dls.train))

def test_stray_images(flat):
    "An image outside the class folders is not a class"
    image(flat/'cover.png')
    assert list(get_dls(flat, size=32, bs=4, workers=0).vocab)==['a','b']

def test_nested_images(flat):
    image(flat/'a'/'more'/'1.png')
    with pytest.raises(ValueError, match='folders within a class: .*more'): get_dls(flat)

def test_other_parts_unused(split):
    "A third part, of other classes, is neither trained on nor looked at"
    (split/'test'/'z').mkdir(parents=True)
    (split/'test'/'z'/'1.jpg').write_bytes(b'')
    dls = get_dls(split, size=32, bs=4, workers=0)
    assert (len(dls.train_ds),len(dls.valid_ds),list(dls.vocab))==(12,6,['a','b'])

def test_no_images(tmp_path):
    with pytest.raises(ValueError, match='no images'): get_dls(tmp_path)

def test_images_without_classes(tmp_path):
    image(tmp_path/'1.png')
    with pytest.raises(ValueError, match='must hold a folder of images for each class'): get_dls(tmp_path)

def test_empty_class_of_a_part(split):
    (split/'valid'/'c').mkdir()
    with pytest.raises(ValueError, match='no images for the class c in .*valid'): get_dls(split)

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
    with pytest.raises(ValueError, match=r'13 of 20 .*, \.\.\.') as e: get_dls(flat)
    assert str(e.value).count('.png')==10

def test_ten_corrupt(flat):
    for fn in (flat/'a').iterdir(): fn.write_bytes(b'')
    with pytest.raises(ValueError, match='10 of 20') as e: get_dls(flat)
    assert str(e.value).count('.png')==10 and '...' not in str(e.value)

def test_mended(flat):
    "A file that has changed is looked at again"
    fn = flat/'a'/'1.png'
    good = fn.read_bytes()
    fn.write_bytes(b'')
    with pytest.raises(ValueError, match='1 of 20'): get_dls(flat, size=32, bs=4, workers=0)
    fn.write_bytes(good)
    get_dls(flat, size=32, bs=4, workers=0)

def test_batch_too_large(flat):
    with pytest.raises(ValueError, match='bs must be at most .* 16, got 17'): get_dls(flat, size=32, bs=17, workers=0)
    assert len(get_dls(flat, size=32, bs=16, workers=0).train)==1

def test_unknown_name():
    with pytest.raises(ValueError, match="path to a folder of images.*Did you mean 'imagenette'.*cifar10"): get_dls('imagenete')
    with pytest.raises(ValueError, match='path to a folder of images'): get_dls(Path(__file__))

@pytest.mark.parametrize('kwargs', [dict(size=0), dict(size=31.5), dict(size='32'), dict(bs=0), dict(bs=-3), dict(workers=-1)])
def test_bad_numbers(kwargs):
    with pytest.raises(ValueError, match=f'{next(iter(kwargs))} must be at least'): get_dls('digits', **kwargs)

@pytest.fixture
def home(tmp_path, monkeypatch):
    "An empty folder for fastai's data, and no network"
    def no_network(*args, **kwargs): raise OSError('network is unreachable')
    monkeypatch.setenv('FASTAI_HOME', str(tmp_path))
    monkeypatch.setattr(fastdownload.core, 'download_url', no_network)
    fastai_cfg.cache_clear()
    yield tmp_path
    fastai_cfg.cache_clear()

@pytest.mark.parametrize('name,folder,arch', [('mnist','mnist_png','mnist_png.tgz'), ('cifar10','cifar10','cifar10.tgz'),
    ('imagenette','imagenette2-160','imagenette2-160.tgz'), ('imagewoof','imagewoof2-160','imagewoof2-160.tgz')])
def test_no_network_no_data(home, name, folder, arch):
    "The error says where the data are looked for, and how to put them there"
    with pytest.raises(FileNotFoundError) as e: get_dls(name, size=64)
    for o in (str(home/'data'/folder), arch, str(home/'archive'), 'network is unreachable', 'FASTAI_HOME'): assert o in str(e.value)

def woof(path):
    for part in ('train','val'):
        for c in 'ab':
            for i in range(3): image(path/part/c/f'{i}.jpg', i)

def test_folder_by_hand(home):
    woof(home/'data'/'imagewoof2-160')
    dls = get_dls('imagewoof', size=64, bs=2, workers=0)
    assert (len(dls.train_ds),len(dls.valid_ds),dls.path.name)==(6,6,'imagewoof2-160')

def test_archive_by_hand(home, monkeypatch):
    monkeypatch.setattr(fastdownload.core, 'check', lambda *args: True)
    woof(home/'made'/'imagewoof2-160')
    (home/'archive').mkdir(exist_ok=True)
    with tarfile.open(home/'archive'/'imagewoof2-160.tgz', 'w:gz') as f: f.add(home/'made'/'imagewoof2-160', 'imagewoof2-160')
    assert len(get_dls('imagewoof', size=64, bs=2, workers=0).train_ds)==6

def test_empty_data_folder(home):
    (home/'data'/'imagewoof2-160').mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match='no images in .*imagewoof2-160'): get_dls('imagewoof', size=64)

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

@pytest.mark.parametrize('name', [pytest.param('mnist', marks=have(URLs.MNIST)), pytest.param('cifar10', marks=have(URLs.CIFAR))])
def test_held_out_pixels(name):
    "At their own size held-out images are the files', neither cropped nor flipped; those of cifar10's training are"
    set_seed(0)
    dls = get_dls(name, bs=20, workers=0)
    mean,std = (o.cpu() for o in (dls.after_batch[-1].mean,dls.after_batch[-1].std))
    for dl,same in ((dls.valid,True),(dls.train,name=='mnist')):
        dl = dl.new(shuffle=False)
        ims = torch.stack([torch.tensor(np.array(dl.dataset[i][0])) for i in range(20)])
        ims = ims.movedim(-1, 1) if name=='cifar10' else ims[:,None]
        off = (dl.one_batch()[0].cpu()-(ims/255-mean)/std).abs().amax((1,2,3))
        assert (off<1e-5).all() if same else (off>0.1).sum()>10

@pytest.mark.parametrize('cache', [True,False])
def test_few(cache):
    "So many training images of each class, the same each time, with their own labels; held-out images stay"
    whole,few = (get_dls('digits', size=8, bs=10, cache=cache, **kw) for kw in ({}, dict(few=3)))
    again = get_dls('digits', size=8, bs=10, cache=cache, few=3)
    assert sorted(o.label for o in few.train_ds.items)==[str(i) for i in range(10) for _ in range(3)]
    assert [id(o.label) for o in few.train_ds.items]==[id(o.label) for o in again.train_ds.items] or [o.label for o in few.train_ds.items]==[o.label for o in again.train_ds.items]
    assert len(few.valid_ds)==len(whole.valid_ds)
    dl = few.train.new(shuffle=False)
    x,y = next(iter(dl))
    for i in range(10):
        assert few.vocab[y[i]]==few.train_ds.items[i].label
        same = (whole.train_ds.items[j] for j in range(len(whole.train_ds)) if np.array_equal(whole.train_ds.items[j], few.train_ds.items[i]))
        assert next(same).label==few.train_ds.items[i].label
    for bad in (0, -1, 2.5, 10_000):
        with pytest.raises(ValueError, match='few must be at'): get_dls('digits', size=8, few=bad)

def test_same_different():
    "Half the images hold two equal shapes, one on each side; the halves of an image alone tell nothing"
    dls = get_dls('same_different', size=20)
    assert (len(dls.train_ds),len(dls.valid_ds)) == (4000,1000) and dls.c==2
    def shape(half):
        rows,cols = np.nonzero(half)
        return half[rows.min():rows.max()+1,cols.min():cols.max()+1]
    def equal(im):
        a,b = (shape(o) for o in np.split(np.array(im), 2, 1))
        return a.shape==b.shape and (a==b).all()
    items = dls.train_ds.items[:200]
    assert all(equal(o) for o in items if o.label=='same') and np.mean([o.label=='same' for o in items])==0.5
    assert np.mean([equal(o) for o in items if o.label=='different'])<0.2 # an empty row at the edge may hide a difference
    again = get_dls('same_different', size=20)
    assert np.array_equal(dls.valid_ds.items[7], again.valid_ds.items[7])
    with pytest.raises(ValueError, match='size must be at least 10'): get_dls('same_different', size=9)
