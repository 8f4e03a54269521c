"Images decoded once: the file they are kept in, the augmentation of batches, and fastai's DataLoaders on top"
import math,random,sys,time
import numpy as np,pytest,torch
from pathlib import Path
from hypothesis import given,settings,strategies as st
from PIL import Image
from scipy.stats import ks_2samp
from fastai.basics import Learner,load_learner,set_seed
from fastai.vision.all import (Brightness,ClassificationInterpretation,IntToFloatTensor,Normalize,RandomResizedCrop,Resize,Transform,
    accuracy,fastai_cfg,get_image_files)
import fastai.vision.augment as augment
from commands import Forked
from fastattn.recipes import cache as C
from fastattn.recipes.cache import *
from fastattn.recipes.data import *

pytestmark = pytest.mark.filterwarnings('ignore')

def photo(seed, h=48, w=40, mode='RGB'):
    "Smooth random pixels, of any of Pillow's modes"
    rng = np.random.default_rng(seed)
    im = Image.fromarray(rng.integers(0, 255, (6,6,3), np.uint8)).resize((w,h), Image.Resampling.BICUBIC)
    if mode=='I;16': return Image.fromarray(np.asarray(im.convert('L')).astype(np.uint16)*257)
    if mode=='F': return Image.fromarray(np.asarray(im.convert('L'), dtype=np.float32)/255)
    return im.convert(mode)

def folder(path, n=10, sizes=((48,40),), suffix='png', modes=('RGB',)):
    for c in 'ab':
        (path/c).mkdir(parents=True, exist_ok=True)
        for i in range(n): photo(i+100*(c=='b'), *sizes[i%len(sizes)], modes[i%len(modes)]).save(path/c/f'{i}.{suffix}')
    return path

odd = (48,40),(33,91),(120,31),(17,18),(9,9),(64,64)
@pytest.fixture
def ims(tmp_path): return folder(tmp_path/'ims', sizes=odd)

def dls_of(path, size=32, bs=4, **kwargs): return get_dls(path, size=size, bs=bs, workers=0, **kwargs)
def batches(dl): return [(x.clone(),y) for x,y in dl]
def same(a, b): return len(a)==len(b) and all(torch.equal(x, u) and torch.equal(y, v) for (x,y),(u,v) in zip(a, b))
def numbers(n, seed=0): return torch.rand(n, 23, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
def caches(path): return sorted(o.name for o in (path/'.fastattn').glob('*.pt'))

# Boxes

class Given:
    "Python's `random` as fastai's transform uses it, with numbers that are given"
    def __init__(self, u): self.uniforms,self.ints = iter([v for o in zip(u[:10], u[10:20]) for v in o]),iter([u[21],u[20]])
    def uniform(self, a, b): return a+(b-a)*next(self.uniforms)
    def randint(self, a, b): return a+math.floor(next(self.ints)*(b-a+1))
    def random(self): return next(self.ints)

@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 1000))
def test_crop_boxes_exact(h, w, seed):
    "With the numbers that `RandomResizedCrop` draws, its boxes, the one at the centre included"
    u,tfm = numbers(4, seed),RandomResizedCrop(64, min_scale=0.35)
    ours = crop_boxes(u, torch.tensor([[h,w]]).expand(4, 2))
    for row,box in zip(u.tolist(), ours.tolist()):
        with pytest.MonkeyPatch.context() as m:
            m.setattr(augment, 'random', Given(row))
            tfm.before_call(Image.new('L', (w,h)), 0)
        assert box==[tfm.tl[1],tfm.tl[0],tfm.cp_size[1],tfm.cp_size[0]]

@pytest.mark.parametrize('h,w', [(160,160),(120,160),(375,500),(40,160),(500,90)])
def test_crop_boxes_distributed(h, w):
    "Drawn by each one's own generator, boxes have the same scale, ratio and place"
    random.seed(1)
    n,tfm,theirs = 3000,RandomResizedCrop(64, min_scale=0.35),[]
    im = Image.new('L', (w,h))
    for _ in range(n):
        tfm.before_call(im, 0)
        theirs.append([tfm.tl[1],tfm.tl[0],tfm.cp_size[1],tfm.cp_size[0]])
    theirs,ours = np.array(theirs),crop_boxes(numbers(n, 2), torch.tensor([[h,w]]).expand(n, 2)).numpy()
    def seen(o): return [o[:,2]*o[:,3],o[:,3]/o[:,2],o[:,0],o[:,1]]
    for a,b in zip(seen(theirs), seen(ours)): assert ks_2samp(a, b).pvalue>0.01
    wrong = crop_boxes(numbers(n, 2), torch.tensor([[h,w]]).expand(n, 2), min_scale=0.25).numpy()
    if max(h, w)<2*min(h, w): assert ks_2samp(seen(theirs)[0], seen(wrong)[0]).pvalue<1e-6

@pytest.mark.parametrize('h,w', [(160,160),(120,160),(37,500),(1,1),(7,3)])
def test_square_boxes_exact(h, w, monkeypatch):
    u = numbers(20)
    for row,box in zip(u.tolist(), square_boxes(u, torch.tensor([[h,w]]).expand(20, 2)).tolist()):
        side = min(h, w)
        assert box[2:]==[side,side] and box[:2]==[int(row[0]*(h-side)),int(row[1]*(w-side))]

def test_no_boxes():
    assert crop_boxes(numbers(0), torch.zeros(0, 2, dtype=torch.int32)).shape==(0,4)

@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 90), st.integers(1, 90), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_stored_boxes(h, w, height, width, seed):
    "Boxes stay within the stored image, have a pixel at least, and are the same if the image is stored as it is"
    sizes = torch.tensor([[height,width]]).expand(8, 2)
    boxes = crop_boxes(numbers(8, seed), sizes)
    top,left,bh,bw = stored_boxes(boxes, sizes, h, w).T
    assert (top>=0).all() and (left>=0).all() and (bh>=1).all() and (bw>=1).all() and (top+bh<=h).all() and (left+bw<=w).all()
    assert torch.equal(stored_boxes(boxes, sizes, height, width), boxes.long())

# Pixels

def plain_resize(part, size):
    "Pillow's bilinear filter, pixel by pixel in float64"
    def weights(n):
        res = np.zeros((size,n))
        for o in range(size):
            centre,support = (o+0.5)*n/size,max(n/size, 1)
            for i in range(n): res[o,i] = max(0, 1-abs(i+0.5-centre)/support)
        return res/res.sum(1, keepdims=True)
    return np.einsum('oh,pw,hwc->cop', weights(part.shape[0]), weights(part.shape[1]), part.astype(np.float64))

@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 40), st.sampled_from([1,3]), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_resize(h, w, size, channels, seed):
    "One by one (CPU) and by products (GPU): the numbers of a plain loop, rounded, and so near to Pillow's"
    rng = np.random.default_rng(seed)
    images = torch.from_numpy(rng.integers(0, 256, (3,h,w,channels), np.uint8))
    sizes = torch.tensor([[h,w]]).expand(3, 2)
    boxes = stored_boxes(crop_boxes(numbers(3, seed), sizes), sizes, h, w)
    flip = torch.tensor([False,True,False])
    for o in (resize_boxes(images, boxes, flip, size),C._resize_batch(images, boxes, flip, size)):
        assert o.shape==(3,channels,size,size) and o.dtype==torch.uint8 and o.is_contiguous()
        o[1] = o[1].flip(2)
        for x,im,(top,left,bh,bw) in zip(o, images.numpy(), boxes.tolist()):
            part = im[top:top+bh,left:left+bw]
            assert np.abs(x.numpy()-plain_resize(part, size)).max()<=1.01
            pil = Image.fromarray(part if channels==3 else part[...,0]).resize((size,size), Image.Resampling.BILINEAR)
            assert np.abs(x.numpy().astype(int)-np.array(pil).reshape(size, size, channels).transpose(2, 0, 1)).max()<=2 # both round twice

def test_resize_nothing():
    none = torch.zeros(0, 4, dtype=torch.long)
    assert resize_boxes(torch.zeros(0, 9, 9, 3, dtype=torch.uint8), none, none[:,0].bool(), 5).shape==(0,3,5,5)

def test_resize_under_autocast():
    "Low precision around it changes no pixel"
    images,boxes = torch.randint(0, 256, (4,40,40,3), dtype=torch.uint8),torch.tensor([[3,4,30,35]]).expand(4, 4)
    flip = torch.arange(4)%2==0
    want = C._resize_batch(images, boxes, flip, 24)
    with torch.autocast('cpu', dtype=torch.bfloat16): assert torch.equal(C._resize_batch(images, boxes, flip, 24), want)

@pytest.mark.parametrize('size', [1,3,4,5,28,32])
def test_shift(size):
    "fastai's `CropPad` with reflection and `RandomCrop`, by the same numbers"
    images,u = torch.randint(0, 256, (40,size,size,3), dtype=torch.uint8),numbers(40)
    res,pad,moves = shift_images(images, None, u, size),size//4,set()
    for im,row,x in zip(images, u.tolist(), res):
        low = (pad+1)//2
        wide = np.pad(im.numpy(), ((low,pad-low),(low,pad-low),(0,0)), mode='reflect')
        top,left = (math.floor(o*(pad+1)) for o in row[:2])
        part = wide[top:top+size,left:left+size]
        want = part[:,::-1] if row[22]<0.5 else part
        assert np.array_equal(x.numpy(), want.transpose(2, 0, 1))
        moves.add((top,left))
    assert len(moves)==1 if not pad else len(moves)>3

def test_cutout():
    images,u = torch.full((60,32,32,3), 255, dtype=torch.uint8),numbers(60)
    x = cutout_images(images, None, u, 32)
    painted = (x==120)
    assert torch.equal(painted.any(1), painted.all(1)) and ((x==255)|painted).all()
    for p,row in zip(painted[:,0], u.tolist()):
        rows,cols = p.any(1).nonzero()[:,0],p.any(0).nonzero()[:,0]
        cy,cx = int(row[2]*32),int(row[3]*32)
        assert rows.tolist()==list(range(max(0, cy-8), min(32, cy+8))) and cols.tolist()==list(range(max(0, cx-8), min(32, cx+8)))
        assert p.sum()==len(rows)*len(cols)

# Images of all kinds

@pytest.mark.parametrize('mode', ['RGB','L','RGBA','LA','P','1','CMYK'])
def test_modes(mode):
    im = photo(0, mode=mode)
    assert np.array_equal(np.array(PhotoImage()(im)), np.array(im.convert('RGB')))

@pytest.mark.parametrize('suffix', ['png','tif'])
def test_sixteen_bits(tmp_path, suffix):
    "A ramp over all 16-bit greys is a ramp over all 8-bit greys, in files, arrays, bytes and tensors"
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16)[None].repeat(8, 0)
    Image.fromarray(ramp).save(f := tmp_path/f'ramp.{suffix}')
    for o in (f,str(f),f.read_bytes(),ramp,Image.fromarray(ramp),Image.open(f)):
        assert np.array_equal(np.array(PhotoImage()(o))[0,:,0], np.arange(256))
        assert np.array_equal(np.array(DigitImage(8)(o)), np.array(DigitImage(8)(ramp)))
    assert np.array(DigitImage(8)(f)).mean()<150

@pytest.mark.parametrize('cache', [True,False])
def test_sixteen_bit_folder(tmp_path, cache):
    "16-bit greys are seen as their 8-bit copies are"
    a = folder(tmp_path/'a', modes=['I;16'], suffix='png')
    b = folder(tmp_path/'b', modes=['L'], suffix='png')
    assert same(*(batches(dls_of(o, cache=cache).valid) for o in (a,b)))

@pytest.mark.parametrize('cache', [True,False])
def test_floats_refused(tmp_path, cache):
    folder(tmp_path, modes=['F','RGB'], suffix='tif')
    why = r'10 of 20 images cannot be read: .*0\.tif \(pixels must have 8 or 16 bits, got floats\)'
    with pytest.raises(ValueError, match=why): dls_of(tmp_path, cache=cache)

@pytest.mark.parametrize('o,got', [(np.zeros((4,4)),'float64'), (np.zeros((4,4,3), np.int64),'int64'), (torch.zeros(4, 4),'float32')])
def test_arrays_refused(o, got):
    with pytest.raises(ValueError, match=f'uint8 or uint16, got {got}'): PhotoImage()(o)

def test_too_large(tmp_path, monkeypatch):
    "The reason why a file cannot be read stands beside its name"
    folder(tmp_path, sizes=((48,40),(20,20)))
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 300)
    with pytest.raises(ValueError, match=r'10 of 20 .*0\.png \(Image size \(1920 pixels\) exceeds limit of 600 pixels'): dls_of(tmp_path)

# Batches

@pytest.mark.parametrize('aug', ['crop','flip'])
@pytest.mark.parametrize('size', [16,32,50])
def test_held_out(ims, aug, size):
    "Held-out images are those of fastai's transforms, byte for byte, whatever their size"
    assert same(*(batches(dls_of(ims, size=size, aug=aug, cache=o).valid) for o in (True,False)))

@pytest.mark.parametrize('modes', [('L','RGB'),('RGBA','LA','P'),('1','I;16')])
def test_held_out_modes(tmp_path, modes):
    folder(tmp_path, modes=modes)
    assert same(*(batches(dls_of(tmp_path, cache=o).valid) for o in (True,False)))

@pytest.mark.parametrize('size', [8,32])
def test_digits_same(size):
    "Batches of digits are the same without the cache, those of training too"
    res = []
    for cache in (True,False,None):
        set_seed(3)
        res.append([batches(dl) for dl in get_dls('digits', size=size, cache=cache)])
    assert all(same(a, b) for o in res[1:] for a,b in zip(res[0], o))

def test_training_images(ims):
    "Labels belong to their images, and each image comes once in an epoch"
    dls = dls_of(ims, bs=16, aug='flip', cache=True)
    x,y = dls.train.one_batch()
    assert x.shape==(16,3,32,32) and sorted(y.tolist())==[0]*8+[1]*8
    flat = dls.train.new(shuffle=False)
    for im,label,fn in zip(dls.train.cached.images, flat.one_batch()[1], dls.train_ds.items):
        assert dls.vocab[label]==fn.parent.name
        assert np.array_equal(im.numpy(), np.array(Image.open(fn).convert('RGB').resize(im.shape[:2], Image.Resampling.BILINEAR)))

def test_crops_close(tmp_path):
    "A crop from the cache is what Pillow cuts from the file with that box, but for the shrinking before"
    folder(tmp_path, sizes=((150,200),(200,150)))
    dls = dls_of(tmp_path, size=64, bs=16, cache=True)
    cached,u = dls.train.cached,numbers(16)
    ours = C.batch_augs['crop'](cached.images, cached.sizes, u, 64)
    for x,fn,size,row,(top,left,h,w) in zip(ours, dls.train_ds.items, cached.sizes, u, crop_boxes(u, cached.sizes).int().tolist()):
        im = Image.open(fn)
        assert tuple(size)==im.size[::-1]
        want = np.array(im.crop((left,top,left+w,top+h)).resize((64,64), Image.Resampling.BILINEAR)).transpose(2, 0, 1).astype(float)
        if row[22]<0.5: want = want[:,:,::-1]
        assert np.abs(x.numpy()-want).mean()<4 # of 255

def test_seed(ims):
    "The state of the DataLoader's own generator is all that batches depend on"
    dls = dls_of(ims, cache=True)
    state = dls.train.rng.getstate()
    first = [batches(dls.train) for _ in range(2)]
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    dls.train.rng.setstate(state)
    again = []
    for _ in range(2):
        seen = []
        for x,y in dls.train:
            torch.rand(7), random.random() # a model that draws numbers
            seen.append((x.clone(),y))
        again.append(seen)
    assert all(same(a, b) for a,b in zip(first, again)) and not same(*first)
    sets = []
    for workers in (0,2,None):
        set_seed(5)
        sets.append(batches(get_dls(ims, size=32, bs=4, workers=workers, cache=True).train))
    assert same(sets[0], sets[1]) and same(sets[0], sets[2])

def test_resume(ims):
    "From the state after an epoch, the next epoch is the same"
    dls = dls_of(ims, cache=True)
    batches(dls.train)
    state = dls.train.rng.getstate()
    want = batches(dls.train)
    other = dls_of(ims, cache=True)
    other.train.rng.setstate(state)
    assert same(batches(other.train), want)

def test_processes_differ(ims):
    "Processes that share an epoch have its images between them, each with crops of its own"
    pytest.importorskip('accelerate')
    from fastai.distributed import DistributedDL
    class Alone(DistributedDL):
        def _broadcast(self, t, rank): return t
    set_seed(0)
    dls = dls_of(ims, bs=2, cache=True)
    state = dls.train.rng.getstate()
    def part(rank):
        dls.train.rng.setstate(state)
        return [y for x,y in Alone(dls.train.new(shuffle=False), rank=rank, world_size=2)]
    ys = [part(0),part(1)]
    assert [len(o) for o in ys]==[4,4] and sorted(torch.cat(ys[0]+ys[1]).tolist())==[0]*8+[1]*8

# fastai's API

@pytest.fixture
def learn(ims, tmp_path):
    set_seed(1)
    net = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, 2))
    learn = Learner(dls_of(ims, cache=True), net, metrics=accuracy, path=tmp_path)
    with learn.no_bar(), learn.no_logging(): yield learn

def test_predict(learn, ims):
    "Files, images and arrays are seen as the cache has them"
    want = learn.get_preds(ds_idx=1)[0]
    files = learn.dls.valid_ds.items
    assert torch.allclose(learn.get_preds(dl=learn.dls.test_dl(files, with_labels=True, num_workers=0))[0], want, atol=1e-6)
    for f,w in zip(files, want):
        for o in (f,str(f),Image.open(f),np.array(Image.open(f)),f.read_bytes()):
            label,idx,probs = learn.predict(o)
            assert label==learn.dls.vocab[w.argmax()] and torch.allclose(probs, w, atol=1e-5)

def test_fit(learn):
    learn.fit(2, 0.01)
    assert len(learn.recorder.values)==2 and all(math.isfinite(v) for o in learn.recorder.values for v in o)

def test_show(learn):
    learn.dls.show_batch(max_n=4)
    learn.dls.train.show_batch(max_n=4, unique=True)
    learn.dls.valid.show_batch(max_n=4)
    learn.show_results(max_n=4)

def test_unique(learn):
    "One image over and over, each time cropped anew"
    dl = learn.dls.train
    square = next(i for i,f in enumerate(learn.dls.train_ds.items) if Image.open(f).size==(64,64)) # long ones have one box only
    dl.get_idxs = lambda: iter(lambda: square, None)
    x,y = dl.one_batch()
    assert len(set(y.tolist()))==1 and not torch.equal(x[0], x[1])

def test_interpretation(learn):
    interp = ClassificationInterpretation.from_learner(learn)
    assert interp.confusion_matrix().sum()==4
    interp.plot_top_losses(2)
    assert ClassificationInterpretation.from_learner(learn, ds_idx=0).confusion_matrix().sum()==16

def test_tta(learn):
    "Held-out images are augmented where that is asked for"
    seen = []
    dl = learn.dls.valid.new(shuffle=False)
    with dl.dataset.set_split_idx(0): seen = [batches(dl)[0][0] for _ in range(2)]
    assert not torch.equal(*seen)
    learn.tta(n=2)

def test_training_images_as_held_out(learn):
    dl = learn.dls.train.new(shuffle=False)
    with dl.dataset.set_split_idx(1): a,b = batches(dl),batches(dl)
    assert same(a, b)

def test_export(learn, tmp_path):
    "What is exported holds no images"
    want = learn.get_preds(ds_idx=1)[0]
    learn.export()
    assert (tmp_path/'export.pkl').stat().st_size<200_000
    other = load_learner(tmp_path/'export.pkl')
    dl = other.dls.test_dl(learn.dls.valid_ds.items, num_workers=0)
    with other.no_bar(): assert torch.allclose(other.get_preds(dl=dl)[0], want, atol=1e-6)

class Black(Transform):
    order = 0
    def encodes(self, o:Image.Image): return o.point(lambda v: 0)

def test_other_transforms(learn):
    "Transforms of items that are added or exchanged later are not passed over"
    dls = learn.dls
    other = dls.valid.new(after_item=[Resize(32), *dls.valid.after_item.fs[-1:]])
    assert not torch.equal(other.one_batch()[0], dls.valid.one_batch()[0])
    dls.train.after_item.add([Black()])
    x = dls.train.one_batch()[0]
    assert (x.amax((2,3))-x.amin((2,3))).abs().max()<1e-6
    y = dls.train.new().one_batch()[0]
    assert (y.amax((2,3))-y.amin((2,3))).abs().max()<1e-6

def test_batch_transforms(learn):
    learn.dls.add_tfms([Brightness(max_lighting=0.9, p=1., draw=0.99)], 'after_batch', 'train')
    assert learn.dls.train.one_batch()[0].mean()>1

def test_statistics(learn):
    "Transforms that look at a batch when the loader is made"
    dls = learn.dls
    dl = CachedDL(dls.train_ds, cached=dls.train.cached, bs=4, num_workers=0, after_item=dls.train.after_item,
        after_batch=[IntToFloatTensor,Normalize()])
    assert dl.one_batch()[0].shape==(4,3,32,32) and dl.after_batch.fs[-1].mean.shape==(1,3,1,1)

def test_n_and_bs(learn):
    dl = learn.dls.train
    dl.n = 5
    assert [len(y) for x,y in dl]==[4]
    dl.drop_last = False
    assert [len(y) for x,y in dl]==[4,1]
    dl.bs = 2
    assert [len(y) for x,y in dl]==[2,2,1]
    assert [len(y) for x,y in dl.new(bs=3, shuffle=False)]==[3,3,3,3,3,1]

def test_memory_mapped(ims):
    "The images are not copied into memory, and not written to"
    a,b = dls_of(ims, cache=True),dls_of(ims, cache=True)
    file, = (o for o in (ims/'.fastattn').glob('train*.pt'))
    before = file.read_bytes()
    a.train.cached.images.zero_()
    assert b.train.cached.images.any() and file.read_bytes()==before

# The file

def test_decoded_once(ims, monkeypatch):
    first = batches(dls_of(ims, cache=True).valid)
    def never(*args): raise AssertionError('decoded again')
    monkeypatch.setattr(data_module(), 'decode_images', never)
    assert same(batches(dls_of(ims, cache=True).valid), first)
    with pytest.raises(AssertionError): dls_of(ims, size=33, cache=True)

def data_module(): return sys.modules['fastattn.recipes.data']

@pytest.mark.parametrize('how', ['changed','added','removed','renamed'])
def test_stale(ims, how):
    "Whatever happens to the files, what is read is what stands there now, and no old cache is left"
    dls_of(ims, cache=True)
    old = caches(ims)
    f = ims/'a'/'3.png'
    if how=='changed': photo(77).save(f)
    if how=='added': photo(77).save(ims/'a'/'77.png')
    if how=='removed': f.unlink()
    if how=='renamed': f.rename(ims/'a'/'z.png')
    dls = dls_of(ims, cache=True)
    assert same(batches(dls.valid), batches(dls_of(ims, cache=False).valid))
    assert dls.train.cached.images.shape[0]==len(dls.train_ds)
    if how in ('added','renamed'): assert not set(old)&set(caches(ims))
    assert len(caches(ims))==2

def test_each_size_and_kind_has_its_own(ims):
    for size,aug in ((32,'crop'),(32,'flip'),(24,'crop')): dls_of(ims, size=size, aug=aug, cache=True)
    names = [o.rsplit('-', 1)[0] for o in caches(ims)]
    assert names==['train-squeezed-24','train-squeezed-32','valid-crop-24','valid-crop-32','valid-flip-32']

def test_side(tmp_path):
    "Images are stored at 1.5 times the size, small ones as they are"
    a = dls_of(folder(tmp_path/'a', sizes=((90,120),)), size=32, cache=True).train.cached
    b = dls_of(folder(tmp_path/'b', sizes=((30,40),)), size=32, cache=True).train.cached
    assert a.images.shape[1:]==(48,48,3) and b.images.shape[1:]==(40,40,3)

@pytest.mark.parametrize('what', ['cut','empty','other'])
def test_damaged(ims, what):
    "A cache that cannot be read is made anew"
    want = batches(dls_of(ims, cache=True).valid)
    for f in (ims/'.fastattn').glob('*.pt'):
        f.write_bytes(dict(cut=f.read_bytes()[:5000], empty=b'', other=b'x'*9999)[what])
    assert same(batches(dls_of(ims, cache=True).valid), want)

def test_not_writable(ims, monkeypatch, tmp_path):
    "Where the folder cannot be written to, fastai's data folder is; and the error says so if neither can"
    (ims/'.fastattn').write_text('a file in the way')
    monkeypatch.setenv('FASTAI_HOME', str(tmp_path/'home'))
    fastai_cfg.cache_clear()
    try:
        dls_of(ims, cache=True)
        assert len(list((tmp_path/'home').rglob('*.pt')))==2
        monkeypatch.setattr(C, '_writable', lambda folder: False)
        dls_of(ims, cache=True) # what is there is read
        why = 'neither .*ims/.fastattn nor .*home.* can be written to. With cache=False'
        with pytest.raises(OSError, match=why): dls_of(ims, size=33, cache=True)
    finally: fastai_cfg.cache_clear()

def test_disk_full(ims, monkeypatch):
    def full(*args): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(C.torch, 'save', full)
    why = r'train-squeezed-32-.*pt could not be written: .*No space left.* With cache=False'
    with pytest.raises(OSError, match=why): dls_of(ims, cache=True)
    assert not list((ims/'.fastattn').glob('*.pt*'))

killed = '''
import sys,time,torch
from fastattn.recipes import cache
from fastattn.recipes.data import get_dls
def slow(o, f):
    f.write(b'half of it')
    f.flush()
    print('writing', flush=True)
    time.sleep(60)
cache.torch.save = slow
get_dls(sys.argv[1], size=32, bs=4, workers=0, cache=True)
'''

def wait_for(seen, *processes):
    while not seen():
        assert all(p.running for p in processes), [p.stderr for p in processes]
        time.sleep(0.01)

def test_killed_writer(ims, tmp_path):
    "A process that is killed while it writes leaves nothing that is used, and nothing for long"
    p = Forked(tmp_path/'logs', killed, ims)
    wait_for(lambda: p.stdout=='writing\n', p)
    p.kill()
    p.end()
    assert len(list((ims/'.fastattn').glob('*.tmp')))==1 and not caches(ims)
    assert same(*(batches(dls_of(ims, cache=o).valid) for o in (True,False)))
    assert len(caches(ims))==2 and not list((ims/'.fastattn').glob('*.tmp'))

racer = '''
import sys,time,torch
from pathlib import Path
from fastai.basics import set_seed
from fastattn.recipes import data
decode = data.decode_images
def slow(*args):
    with open(sys.argv[2], 'a') as f: f.write('decoded\\n')
    time.sleep(1)
    return decode(*args)
data.decode_images = slow
print('ready')
while not Path(sys.argv[3]).exists(): time.sleep(0.01)
set_seed(4)
dls = data.get_dls(sys.argv[1], size=32, bs=4, workers=0, cache=True)
print(sum(float(x.abs().sum()) for dl in dls for x,_ in dl))
'''
def test_race(ims, tmp_path):
    "Of processes that start together one decodes each part, and all see the same"
    ps = [Forked(tmp_path/'logs', racer, ims, tmp_path/'log', tmp_path/'go') for _ in range(2)]
    wait_for(lambda: all(p.stdout for p in ps), *ps)
    (tmp_path/'go').touch()
    ends = [p.end() for p in ps]
    assert len({o.stdout for o in ends})==1 and all(o.returncode==0 for o in ends), ends
    assert (tmp_path/'log').read_text().count('decoded')==2

# What may be asked for

@pytest.mark.parametrize('spelled', ['ims','ims/','./ims','../{0}/ims','{1}','{1}/'])
def test_paths(ims, spelled, monkeypatch):
    "However a folder is spelled, it is one data set, with one cache"
    monkeypatch.chdir(ims.parent)
    dls_of(ims, cache=True)
    before = caches(ims)
    spelled = spelled.format(ims.parent.name, ims)
    assert dls_of(spelled, cache=True).path==ims.resolve() and caches(ims)==before
    assert data_name(spelled)==data_name(Path(spelled))==str(ims.resolve())

def test_names_and_folders(tmp_path, monkeypatch):
    "A name is a name, even if there is such a folder; with ./ or as a Path it is the folder"
    folder(tmp_path/'digits')
    monkeypatch.chdir(tmp_path)
    assert data_name('digits')=='digits' and len(get_dls('digits', size=8).train_ds)==1400
    for o in ('./digits',Path('digits')):
        assert data_name(o)==str(tmp_path.resolve()/'digits') and len(dls_of(o).train_ds)==16
    assert data_name('nowhere')=='nowhere'

def test_link(ims, tmp_path):
    (tmp_path/'link').symlink_to(ims)
    assert dls_of(tmp_path/'link').path==ims.resolve()

@pytest.mark.parametrize('cache', ['yes',1,0,2.])
def test_bad_cache(ims, cache):
    with pytest.raises(ValueError, match='cache must be True, False or None, got'): dls_of(ims, cache=cache)

def test_default(ims, monkeypatch):
    "By default images are cached where they fit in a quarter of the memory"
    assert dls_of(ims).train.cached is not None
    monkeypatch.setattr(data_module(), '_memory', lambda: 4*20*48*48*3-1)
    assert not hasattr(dls_of(ims).train, 'cached')
    assert dls_of(ims, cache=True).train.cached is not None
    assert not hasattr(dls_of(ims, cache=False).train, 'cached')

def test_hidden(ims):
    "The cache is no image and no class"
    dls_of(ims, cache=True)
    assert len(get_image_files(ims))==20 and list(dls_of(ims, cache=True).vocab)==['a','b']

def test_no_bar_in_a_file(tmp_path):
    "Nothing is drawn where nobody can see it"
    code = 'from fastattn.recipes.cache import _progress; assert sum(_progress(range(5000), 5000))==12497500'
    end = Forked(tmp_path, code).end()
    assert (end.returncode,end.stdout,end.stderr)==(0,'','')
