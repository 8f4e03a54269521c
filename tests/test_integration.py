"Attention stays the model's own: whatever converts, freezes, copies, compiles or exports a model leaves it in use"
import copy,pickle
from pathlib import Path
import numpy as np,pytest,timm,torch
from fastai.basics import L,apply_init,norm_bias_params
from fastai.learner import Learner
from fastai.layers import ResBlock
from fastai.vision.models.xresnet import XResNet,xresnet18
from safetensors.torch import load_file
from timm.layers import convert_sync_batchnorm,freeze_batch_norm_2d,unfreeze_batch_norm_2d
from torch import nn
from torchvision import models as tv
from fastattn.callback import NoWeightDecay
from fastattn.layers.simple import SimpleSelfAttention
from fastattn.models.insert import AttnAfter,Attended,attn_layers,attn_sites,attns,insert_attn,places,remove_attn,stages_of
from fastattn.learner import dropconnect_learner,positional_learner,projection_learner,ssa_learner
from fastattn.models.timm import attn_timm,load_model,save_model
from fastattn.models.xresnet import attn_xresnet,xresnet18_deep_ssa,xresnet18_ssa,xresnet18_ssa_sym

builders = dict( # of one block in each stage, which takes half the time
    xresnet=lambda: XResNet(ResBlock, 1, [1,1,1,1], n_out=4),
    timm=lambda: timm.create_model('resnet18', num_classes=4, layers=(1,1,1,1)),
    torchvision=lambda: tv.ResNet(tv.resnet.BasicBlock, [1,1,1,1], num_classes=4),
    convnext=lambda: timm.create_model('convnext_atto', num_classes=4, depths=(1,1,1,1)))

def make(name):
    "As if trained: no branch is off"
    torch.manual_seed(0)
    return trained(builders[name]())
def trained(m):
    for p in m.parameters():
        if not p.any(): nn.init.uniform_(p, 0.1, 0.5)
    return m.eval()

def images(n=2, size=64): return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))
def gains(m): return [p for o in attn_layers(m) for k,p in o.named_parameters() if k in ('gamma','gain')]
def wake(m, gain=0.01):
    for p in gains(m): nn.init.constant_(p, gain)
    return m
def keys(m): return list(m.state_dict())
def same_state(a, b): return list(a)==list(b) and all(torch.equal(a[k], b[k]) for k in a)

def in_use(m, x, n=4):
    "`n` attentions: each gets a gradient, and each changes what the model computes"
    wake(m.eval(), 0)
    m.zero_grad()
    y = m(x)
    y.square().sum().backward()
    assert len(gains(m))==n and all(p.grad.abs().sum()>0 for p in gains(m))
    with torch.no_grad():
        for p in gains(m):
            p.fill_(1e-3)
            z = m(x)
            assert z.isfinite().all() and not torch.equal(z, y)
            p.zero_()

models = pytest.mark.parametrize('name', builders)
at_both = pytest.mark.parametrize('at', places)

@models
@at_both
def test_identity(name, at):
    "Outputs bit for bit, in training too, names of weights and their order; in use; removal restores all"
    m,plain,x = make(name),make(name),images()
    before = {k: v.clone() for k,v in m.state_dict().items()}
    assert insert_attn(m, 'ssa', stages='all', at=at) is m
    assert torch.equal(m(x), plain(x))
    if name!='convnext': assert torch.equal(m.train()(x), plain.train()(x)) and m.eval()
    assert [k for k in keys(m) if k in before]==list(before)
    assert not m.load_state_dict(before, strict=False).unexpected_keys
    in_use(m, x)
    remove_attn(m)
    assert same_state(m.state_dict(), before) and not any(o._forward_hooks or isinstance(o, Attended) for o in m.modules())
    assert torch.equal(m(x), make(name)(x))

@models
def test_places(name):
    "Both places of one block at once, told apart in sites, state and folders"
    m = insert_attn(insert_attn(make(name), 'ssa', stages=[2]), 'eca' if name=='convnext' else 'ssa', stages=[2], at='block')
    sites = [o for o in attn_sites(m) if o.attn]
    if name=='convnext': assert [o.attn for o in sites]==[['ssa','eca']]
    else:
        assert [(o.stage,o.attn,o.channels) for o in sites]==[(2,['ssa'],128)]*2
        assert sites[0].module.startswith(sites[1].module+'.')
    assert len(attn_layers(m))==2 and all(o.stage for o in sites)
    remove_attn(m, 2)
    assert keys(m)==keys(make(name))
    with pytest.raises(ValueError, match="Known: branch, block"): insert_attn(m, at='blocks')

@models
@at_both
@pytest.mark.parametrize('convert', [nn.SyncBatchNorm.convert_sync_batchnorm,convert_sync_batchnorm,freeze_batch_norm_2d,lambda m: unfreeze_batch_norm_2d(freeze_batch_norm_2d(m))],
    ids=['sync','timm_sync','freeze','unfreeze'])
def test_converted_norms(name, at, convert):
    x = images()
    m = wake(insert_attn(make(name), 'ssa', stages='all', at=at), 1e-4)
    y,names = m(x),keys(m)
    m = convert(m).eval()
    torch.testing.assert_close(m(x), y, rtol=1e-4, atol=1e-5)
    assert [k for k in names if 'num_batches' not in k]==[k for k in keys(m) if 'num_batches' not in k]
    in_use(m, x)
    for copied in (copy.deepcopy(m),pickle.loads(pickle.dumps(m))): in_use(copied, x)

@models
@at_both
@pytest.mark.parametrize('attn', ['ssa','positional'])
def test_is_no_norm(name, at, attn):
    "fastai counts no weight of attention among the norms, of which it decays none and trains all"
    m = insert_attn(make(name), attn, stages=2, at=at)
    ids = {id(p) for p in norm_bias_params(m)}
    inside = {id(p): k for o in attn_layers(m) for k,p in o.named_parameters()}
    assert all(k.endswith('bias') for i,k in inside.items() if i in ids)
    assert len({id(p) for p in norm_bias_params(make(name))}) + sum(k.endswith('bias') for k in inside.values())==len(ids)

@models
@at_both
def test_fastais_init(name, at):
    "fastai's initialisation goes through a model with attention"
    m = insert_attn(make(name), 'ssa', stages='all', at=at)
    apply_init(m, nn.init.kaiming_normal_)
    assert len(attn_layers(m))==4

@models
@at_both
def test_frozen_learner(name, at, few):
    "With a splitter that puts attention first, frozen attention does not train; it decays, but for its gain"
    def splitter(m):
        first = {id(p) for o in attn_layers(m) for p in o.parameters()}
        return L([p for p in m.parameters() if id(p) in first], [p for p in m.parameters() if id(p) not in first])
    m = wake(insert_attn(make(name), 'ssa', stages='all', at=at))
    learn = Learner(few, m, loss_func=nn.CrossEntropyLoss(), splitter=splitter, cbs=NoWeightDecay())
    learn.freeze()
    before = [p.clone() for o in attn_layers(m) for p in o.parameters()]
    with learn.no_bar(),learn.no_logging(): learn.fit(1)
    assert all(torch.equal(p, q) for p,q in zip(before, (p for o in attn_layers(m) for p in o.parameters())))
    learn.unfreeze()
    with learn.no_bar(),learn.no_logging(): learn.fit(1)
    for o in attn_layers(m): assert learn.opt.state[o.gamma]['do_wd'] is False and learn.opt.state[o.weight].get('do_wd', True)

@pytest.fixture(scope='module')
def few():
    from fastai.basics import DataLoaders
    x,y = images(8),torch.arange(8)%4
    return DataLoaders.from_dsets(list(zip(x, y)), list(zip(x, y)), bs=4, num_workers=0)

@pytest.mark.parametrize('name,at', [pytest.param(name, at, marks=[] if (name,at) in (('xresnet','branch'),('convnext','block')) else pytest.mark.slow) for name in builders for at in places])
def test_inserted_into_compiled(name, at):
    "Code that was compiled before is made anew, for the model and for a function that calls it"
    m,x = make(name),images()
    def double(x): return 2*m(x)
    compiled = torch.compile(double, backend='aot_eager')
    whole = torch.compile(m, backend='aot_eager')
    m.compile(backend='aot_eager')
    with torch.no_grad():
        y = m(x)
        whole(x),compiled(x)
        wake(insert_attn(m, 'ssa', stages=[2], at=at), 1.)
        z = m.forward(x) # not compiled
        assert not torch.allclose(z, y, atol=1e-3)
        for o in (m(x),whole(x),compiled(x)/2): torch.testing.assert_close(o, z, rtol=1e-3, atol=1e-4)
        remove_attn(m)
        torch.testing.assert_close(m(x), y, rtol=1e-3, atol=1e-4)

@models
@at_both
def test_torch_export(name, at):
    m,x = wake(insert_attn(make(name), 'ssa', stages=[1,3], at=at)),images()
    graph = torch.export.export(m, (x,)).module()
    torch.testing.assert_close(graph(x), m(x), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(graph(x), remove_attn(m)(x), atol=1e-4)

@models
@at_both
@pytest.mark.parametrize('attn', ['ssa','ssa_sym','sa','positional','local'])
def test_channels_last(name, at, attn):
    "A training step in channels_last, with the additions in place that ResNets have behind the attention"
    m = wake(insert_attn(make(name), attn, stages=[2,3], at=at), 0.1).train()
    m = m.to(memory_format=torch.channels_last)
    m(images().to(memory_format=torch.channels_last)).square().sum().backward()
    assert all(p.grad.abs().sum()>0 for p in gains(m))

@pytest.mark.parametrize('folder', ['bottleneck','squeeze'])
def test_old_folders(folder):
    "Folders of version 0.1: attention was a child of batch norms then, with the same names"
    path = Path(__file__).parent/'folders'/folder
    m,seen = load_model(path).eval(),load_file(path/'seen.safetensors')
    torch.testing.assert_close(m(seen['x']), seen['y'], rtol=1e-5, atol=1e-6)
    assert len(attn_layers(m))==4 and set(keys(m))==set(load_file(path/'model.safetensors'))

@pytest.mark.parametrize('arch', ['test_resnet','test_convnext'])
@at_both
def test_folder(arch, at, tmp_path):
    m = wake(insert_attn(trained(timm.create_model(arch, num_classes=4)), 'ssa', stages=[1,3], at=at))
    save_model(m, tmp_path)
    assert torch.equal(load_model(tmp_path).eval()(images()), m(images()))

@pytest.mark.parametrize('ndim', [1,3])
@at_both
@pytest.mark.parametrize('attn', ['ssa','sa','positional','local'])
def test_ndim(ndim, at, attn):
    "Series and volumes; a series may be as long as it has channels"
    m = trained(xresnet18(n_out=2, ndim=ndim, widen=0.25))
    x = torch.randn(2, 3, *[64 if ndim==1 else 32]*ndim)
    y = m(x)
    assert torch.equal(insert_attn(m, attn, stages=1, at=at)(x), y)
    in_use(m, x, 1)

def test_series_are_no_tokens():
    "(B, C, N) with N = C at the place behind a block"
    m = insert_attn(xresnet18(n_out=2, ndim=1, widen=0.25).eval(), lambda _: Rows(), at='block')
    m(torch.randn(1, 3, 64)) # 16 channels, 16 positions
class Rows(nn.Module):
    def forward(self, x): return x+torch.arange(x.shape[1]).view(1, -1, 1)

def test_series_keep_their_axes():
    x = torch.zeros(1, 4, 4)
    after = AttnAfter(4, ndim=1)
    after.append(Rows())
    assert torch.equal(after(x)[0,:,0], torch.arange(4.))

def test_ndim_of_timms():
    with pytest.raises(ValueError, match="'se' is timm's, for images"): insert_attn(xresnet18(ndim=1), 'se')

def test_any_layer_by_hand():
    "Norms, activations and convolutions named by hand are held beside the attention"
    for name in ('layer3.0.bn1','layer3.0.act1','layer3.0.conv1'):
        m = wake(insert_attn(make('timm'), lambda _: SimpleSelfAttention(256), stages=name))
        before = keys(m)
        m = nn.SyncBatchNorm.convert_sync_batchnorm(m)
        in_use(m, images(), 1)
        assert keys(m)==before and attn_sites(m)[-1].module==name

@pytest.mark.parametrize('stages,want', [('all',[1,2,3,4]), (-1,[4]), (np.int64(2),[2]), (np.array([1,-2]),[1,3]), ([],'stages is empty'), (0,'from -1, the last, to -4'), (-5,'got -5'), (True,'whole numbers'), (1.,'whole numbers')])
def test_stages(stages, want):
    m = make('timm')
    if isinstance(want, str):
        with pytest.raises(ValueError, match=want): insert_attn(m, stages=stages)
    else: assert [o.stage for o in attn_sites(insert_attn(m, stages=stages)) if o.attn]==want

def test_bad_arguments():
    m = make('timm')
    with pytest.raises(ValueError, match='blocks is empty'): insert_attn(m, blocks=[])
    with pytest.raises(TypeError, match='a SimpleSelfAttention that is built'): insert_attn(m, SimpleSelfAttention(64))
    assert not attn_layers(m)

def test_squeeze_and_excitation():
    "fastai's, when it was inserted, is an attention; when it belongs to the architecture, it is not"
    from fastai.layers import SEModule
    m = insert_attn(xresnet18(n_out=2), lambda n: SEModule(n, 16), stages=[1,2])
    assert [o.attn for o in attn_sites(m) if o.attn]==[['SequentialEx']]*2 and len(attn_layers(copy.deepcopy(m)))==2
    with pytest.raises(ValueError, match='already'): insert_attn(m, lambda n: SEModule(n, 16))
    assert keys(remove_attn(m))==keys(xresnet18(n_out=2))

families = dict(coat_tiny=4, crossvit_tiny_240=2, densenet121=4, hrnet_w18_small=4, mvitv2_tiny=4, rdnet_tiny=4, tnt_s_legacy_patch16_224=1, twins_svt_small=4)
@pytest.mark.parametrize('arch', families)
def test_table(arch):
    "Families whose feature_info does not name their blocks: the number of stages, and each attention gets a gradient and counts"
    torch.manual_seed(0)
    m = trained(timm.create_model(arch, num_classes=4))
    x = images(1, m.default_cfg['input_size'][1])
    y = m(x)
    assert torch.equal(insert_attn(m, stages='all')(x), y) and len(stages_of(m))==families[arch]
    in_use(m, x, families[arch])

@pytest.mark.parametrize('arch', ['test_vit','mvitv2_tiny','convnext_atto'])
def test_features_only(arch):
    m = timm.create_model(arch, features_only=True)
    assert attn_layers(insert_attn(m, stages='all'))

def test_plain_architectures_only():
    "Architectures with attention of their own are no baselines"
    for build in (lambda: attn_timm('xresnet18_ssa', 'none'), lambda: attn_timm('xresnet18_ssa', stages=2), lambda: attn_xresnet(xresnet18_ssa)):
        with pytest.raises(ValueError, match='xresnet18_ssa comes with SimpleSelfAttention'): build()

def filled(m):
    "As if attention had been trained"
    for o in attn_layers(m):
        for p in o.parameters(): nn.init.normal_(p)
    return m

@pytest.mark.parametrize('arch', ['test_resnet','test_convnext','xresnet18'])
def test_transfer(arch, tmp_path):
    "Weights of a model with attention start another: what fits is loaded, attention included, and what is left is said"
    build = (lambda: attn_xresnet(arch, stages=[1,3], n_out=5, widen=0.25)) if arch=='xresnet18' else lambda: attn_timm(arch, stages=[1,3], num_classes=5)
    source = filled(build())
    save_model(source, tmp_path)
    folder = f'local-dir:{tmp_path}'
    m = attn_timm(folder, stages=[1,3], pretrained=True)
    assert same_state(m.state_dict(), source.state_dict())
    with pytest.warns(UserWarning, match=r'not loaded: .*weight.*as initialised: .*weight'): m = attn_timm(folder, stages=[1,3], pretrained=True, num_classes=3)
    differ = [k for k,v in m.state_dict().items() if not torch.equal(v, source.state_dict()[k])]
    assert differ and all(k.startswith(('fc','head','11')) for k in differ)
    with pytest.warns(UserWarning, match='not loaded: .*gamma'): m = attn_timm(folder, stages=[1], pretrained=True, num_classes=5)
    assert len(attn_layers(m))==1 and torch.equal(attn_layers(m)[0].gamma, attn_layers(source)[0].gamma)
    m = attn_timm(folder, stages=[1,3], pretrained=True, in_chans=1)
    assert not attn_layers(attn_timm(folder, 'none'))
    assert torch.equal(attn_layers(m)[1].weight, attn_layers(source)[1].weight)

def test_transfer_of_a_file(tmp_path):
    source = filled(attn_timm('test_resnet', stages=[1,3], num_classes=5))
    torch.save(source.state_dict(), tmp_path/'w.pth')
    def load(n, **kwargs): return attn_timm('test_resnet', pretrained=True, num_classes=n, pretrained_cfg_overlay=dict(file=str(tmp_path/'w.pth'), num_classes=5), **kwargs)
    assert same_state(load(5, stages=[1,3]).state_dict(), source.state_dict())
    m = load(3, stages=[1,3])
    assert torch.equal(attn_layers(m)[1].weight, attn_layers(source)[1].weight) and torch.equal(m.layer1[0].conv1.weight, source.layer1[0].conv1.weight)
    with pytest.warns(UserWarning, match='not loaded: layer3'): load(5, stages=[1])

def test_what_a_folder_keeps(tmp_path, monkeypatch):
    "Type, home folder, compiled models; what it does not keep is refused by name"
    from fastai.layers import NormType
    from fastattn.layers.dropconnect import to_dropconnect
    m = attn_timm('test_resnet').bfloat16()
    save_model(m, tmp_path/'a')
    assert same_state(load_model(tmp_path/'a').state_dict(), m.state_dict()) and next(load_model(tmp_path/'a').parameters()).dtype==torch.bfloat16
    monkeypatch.setenv('HOME', str(tmp_path))
    save_model(m, '~/b')
    assert (tmp_path/'b'/'config.json').exists() and load_model('~/b')
    m = attn_xresnet('xresnet18', widen=0.25)
    save_model(torch.compile(m), tmp_path/'c')
    assert same_state(load_model(tmp_path/'c').state_dict(), m.state_dict())
    for m,message in ((attn_xresnet('xresnet18', norm_type=NormType.Batch),'norm_type'), (to_dropconnect(attn_timm('test_resnet')),'DropConnect'), (xresnet18(),'learn.export')):
        with pytest.raises(ValueError, match=message): save_model(m, tmp_path/'d')

def quiet_fit(learn, n=1, **kwargs):
    with learn.no_bar(),learn.no_logging(): learn.fit(n, **kwargs)
    return learn
def arrays(shape, n=8): return list(zip(torch.randn(n, *shape, generator=torch.Generator().manual_seed(0)), torch.arange(n)%2))
def loaders(shape, n_valid=8):
    from fastai.basics import DataLoaders
    return DataLoaders.from_dsets(arrays(shape), arrays(shape, n_valid), bs=4, num_workers=0)
loss = dict(n_out=2, loss_func=nn.CrossEntropyLoss())

@models
@at_both
def test_learner(name, at, few, tmp_path):
    "Insertion into a Learner, training, saving, removal"
    learn = Learner(few, make(name), loss_func=nn.CrossEntropyLoss(), path=tmp_path)
    quiet_fit(learn)
    learn.add_attn('ssa', stages=[1,3], at=at)
    assert [o.stage for o in learn.attn_sites() if o.attn]==[1,3]
    quiet_fit(learn, lr=1e-2)
    assert all(o.gamma.item()!=0 for o in attn_layers(learn.model))
    x,y = images(),learn.model.eval()(images())
    learn.save('m')
    for o in attn_layers(learn.model): nn.init.zeros_(o.gamma)
    assert not torch.equal(learn.model.eval()(x), y) and torch.equal(learn.load('m').model.eval()(x), y)
    n = sum(len(g['params']) if isinstance(g, dict) else len(g) for g in learn.opt.param_lists)
    assert learn.remove_attn() is learn and not any(o.attn for o in learn.attn_sites())
    assert sum(map(len, learn.opt.param_lists))==n-4
    quiet_fit(learn)

def test_learner_forgets_spans(few):
    from fastattn.callback import SpanRecorder
    learn = Learner(few, make('timm'), loss_func=nn.CrossEntropyLoss()).add_attn('positional', stages=3)
    assert learn._grab_cbs(SpanRecorder)
    quiet_fit(learn.remove_attn())

@pytest.mark.parametrize('arch', ['xresnet18','resnet18','convnext_atto','torchvision'])
def test_learner_places(arch, few):
    learn = ssa_learner(few, tv.resnet18 if arch=='torchvision' else arch, stages='all', at='block', n_out=4, loss_func=nn.CrossEntropyLoss())
    assert len(attn_layers(learn.model))==4
    before = [o.gamma.clone() for o in attn_layers(learn.model)]
    learn.freeze()
    quiet_fit(learn, lr=1e-2)
    assert all(not torch.equal(o.gamma, p) for o,p in zip(attn_layers(learn.model), before))

@pytest.mark.parametrize('attn', ['ssa','positional','local'])
@pytest.mark.parametrize('shape', [(2,64),(3,32,32),(1,32,32,32)])
def test_dimensions_of_the_data(shape, attn):
    "Series, images and volumes need no ndim and no c_in"
    learn = quiet_fit(ssa_learner(loaders(shape), attn=attn, widen=0.25, **loss))
    assert learn.model(torch.randn(1, *shape)).shape==(1,2)

def test_no_validation_items():
    from fastai.basics import DataLoaders
    for dls in (loaders((3,32,32), 0), DataLoaders(loaders((3,32,32)).train)): assert ssa_learner(dls, widen=0.25, **loss).model[0][0].in_channels==3

@pytest.mark.parametrize('kind', ['ssa','timm','torchvision','projection','dropconnect','positional'])
def test_loaders_of_pytorch(kind):
    "PyTorch's own DataLoader, as Learner takes it"
    from fastai.basics import DataLoaders
    from torch.utils.data import DataLoader
    dls = DataLoaders(DataLoader(arrays((3,32,32)), batch_size=4), DataLoader(arrays((3,32,32)), batch_size=4))
    build = dict(ssa=ssa_learner, timm=lambda dls,**kw: ssa_learner(dls, 'test_resnet', **kw), torchvision=lambda dls,**kw: ssa_learner(dls, tv.resnet18, **kw),
        projection=projection_learner, dropconnect=dropconnect_learner, positional=lambda dls,**kw: positional_learner(dls, dim=8, depth=1, heads=2, span=2, **kw) )[kind]
    learn = quiet_fit(build(dls, **loss))
    assert learn.model.eval()(torch.randn(1, 3, 32, 32)).shape==(1,2)

def test_normalise_loaders_of_pytorch(monkeypatch):
    from fastai.basics import DataLoaders
    from torch.utils.data import DataLoader
    plain,ours = DataLoaders(*[DataLoader(arrays((3,32,32)), batch_size=4)]*2),loaders((3,32,32))
    weights = tv.resnet18().state_dict()
    monkeypatch.setattr(tv.ResNet18_Weights, 'get_state_dict', lambda self, *args, **kwargs: weights)
    with pytest.raises(ValueError, match='normalize=False'): ssa_learner(plain, tv.resnet18, pretrained=True, **loss)
    ssa_learner(plain, tv.resnet18, pretrained=True, normalize=False, **loss)
    ssa_learner(ours, tv.resnet18, pretrained=True, normalize=False, **loss)
    assert not ours.after_batch.fs
    learn = ssa_learner(ours, tv.resnet18, pretrained=True, ps=0.1, n_in=3, **loss)
    assert len(ours.after_batch.fs)==1 and not learn.model[0][0].weight.requires_grad and torch.equal(learn.model[0][0].weight, weights['conv1.weight'])

def test_words_of_vision_learner():
    dls = loaders((3,32,32))
    learn = ssa_learner(dls, tv.resnet34, 'ssa_sym', stages=[1,-1], lin_ftrs=[16], ps=0., concat_pool=False, **loss)
    assert 16 in [o.out_features for o in learn.model[1] if isinstance(o, nn.Linear)] and [o.stage for o in attn_sites(learn.model) if o.attn]==[1,4] and len(learn.splitter(learn.model))==3
    with pytest.raises(ValueError, match="unknown option of vision_learner 'widen'"): ssa_learner(dls, tv.resnet18, widen=2, **loss)
    for arch in ('xresnet18','resnet18'):
        with pytest.raises(ValueError, match="'custom_head' is an option of vision_learner"): ssa_learner(dls, arch, custom_head=nn.Identity(), **loss)
        assert next(ssa_learner(loaders((1,32,32)), arch, n_in=1, **loss).model.parameters()).shape[1]==1
    for arch in ('xresnet18_ssa',xresnet18_ssa):
        with pytest.raises(ValueError, match='xresnet18_ssa comes with SimpleSelfAttention'): ssa_learner(dls, arch, 'none', **loss)

def test_tables():
    from fastai.tabular.all import Categorify,CategoryBlock,TabularDataLoaders,tabular_learner
    import pandas as pd
    df = pd.DataFrame(dict(a=list('xyxyxyxy'), b=np.arange(8.), y=list('ppqqppqq')))
    dls = TabularDataLoaders.from_df(df, procs=[Categorify], cat_names=['a'], cont_names=['b'], y_names='y', y_block=CategoryBlock(), bs=4, valid_idx=[6,7])
    with pytest.raises(ValueError, match='tabular_learner.*to_dropconnect'): dropconnect_learner(dls)
    quiet_fit(tabular_learner(dls).to_dropconnect())

def test_vision_learner():
    "fastai's own learner with our architectures: three groups, the attention in the last"
    from fastai.vision.learner import vision_learner
    for arch in (xresnet18_ssa_sym,xresnet18_deep_ssa):
        learn = vision_learner(loaders((3,32,32)), arch, pretrained=False, **loss)
        learn.freeze()
        groups = learn.splitter(learn.model)
        layer, = attn_layers(learn.model)
        assert len(groups)==3 and {id(p) for p in layer.parameters()}<={id(p) for p in groups[-1]}
        assert layer.gamma.requires_grad and not learn.model[0][0][0].weight.requires_grad
        quiet_fit(learn, lr=1e-2)
        assert layer.gamma.item()!=0

def test_learner_from_a_folder(tmp_path):
    for i,arch in enumerate(('test_resnet','xresnet18')):
        source = ssa_learner(loaders((3,32,32)), arch, stages=2, **loss)
        filled(source.model)
        save_model(source, tmp_path/str(i))
        with pytest.warns(UserWarning, match='not loaded'):
            learn = ssa_learner(loaders((3,32,32)), f'local-dir:{tmp_path/str(i)}', 'ssa', stages=2, pretrained=True, n_out=3, loss_func=nn.CrossEntropyLoss())
        a,b = attn_layers(learn.model)[0],attn_layers(source.model)[0]
        assert torch.equal(a.gamma, b.gamma) and torch.equal(a.weight, b.weight) and len(learn.opt.param_lists)==3
        assert not next(learn.model.parameters()).requires_grad and a.weight.requires_grad

def segmentation(tmp_path):
    "Digits on a canvas, and where their ink is, as files"
    from PIL import Image
    from sklearn.datasets import load_digits
    from fastai.vision.all import SegmentationDataLoaders
    for i,o in enumerate(load_digits().images[:12]):
        ink = np.kron(o, np.ones((4,4)))/16
        Image.fromarray(np.uint8(255*ink)).convert('RGB').save(tmp_path/f'{i}.png')
        (tmp_path/'masks').mkdir(exist_ok=True)
        Image.fromarray(np.uint8(ink>0.5)).save(tmp_path/'masks'/f'{i}.png')
    files = [tmp_path/f'{i}.png' for i in range(12)]
    return SegmentationDataLoaders.from_label_func(tmp_path, files, mask_of, codes=['paper','ink'], bs=4, num_workers=0)
def mask_of(f): return f.parent/'masks'/f.name

@pytest.mark.parametrize('how', ['arch','encoder','decoder'])
def test_unet(how, tmp_path):
    "Attention in the encoder by the architecture or by add_attn, and in the decoder by the names of its blocks; with export"
    from fastai.basics import load_learner,set_seed
    from fastai.vision.learner import unet_learner
    set_seed(0)
    dls = segmentation(tmp_path)
    learn = unet_learner(dls, xresnet18_ssa if how=='arch' else tv.resnet18, pretrained=False, n_out=2, path=tmp_path)
    if how=='encoder': learn.add_attn('ssa', stages=[1,2])
    if how=='decoder': learn.add_attn('ssa', stages=['layers.5','layers.6'])
    layers = attn_layers(learn.model)
    assert len(layers)==(1 if how=='arch' else 2)
    losses = [quiet_fit(learn, lr=1e-4).recorder.values[-1][0] for _ in range(3)]
    assert losses[-1]<losses[0] and all(o.gamma.item()!=0 for o in layers)
    learn.export()
    x = dls.valid.one_batch()[0]
    assert torch.equal(load_learner(tmp_path/'export.pkl').model.eval()(x), learn.model.eval()(x))

xresnets = timm.list_models('xresnet*ssa*')

@pytest.mark.parametrize('name', [o for o in xresnets if '18' in o or o=='xresnet50_ssa'])
def test_interface_of_timm(name):
    "What timm's own tests ask of its models: configuration, head, pooling, groups, intermediates, checkpointing, pruning"
    torch.manual_seed(0)
    m = trained(timm.create_model(name, widen=0.5))
    cfg,sd = m.default_cfg,m.state_dict()
    x = torch.randn(1, *cfg['input_size'])
    y,maps = m(x),m.forward_features(x)
    assert y.shape==(1,m.num_classes) and tuple(maps.shape[-2:])==cfg['pool_size'] and maps.shape[1]==m.num_features
    assert f"{cfg['classifier']}.weight" in sd and f"{cfg['first_conv']}.weight" in sd and m.get_classifier(name_only=True)==cfg['classifier']
    n = len(m.feature_info)
    final,taken = m.forward_intermediates(x)
    assert torch.equal(final, maps) and [o.shape[1] for o in taken]==[o['num_chs'] for o in m.feature_info] and torch.equal(taken[-1], maps)
    assert [o.shape for o in m.forward_intermediates(x, [0,2], stop_early=True, intermediates_only=True)]==[taken[0].shape,taken[2].shape]
    groups = timm.models.group_parameters(m, m.group_matcher(coarse=True))
    assert len(groups)==n+1 and sum(map(len, groups.values()))==len(list(m.parameters()))
    fine = timm.models.group_parameters(m, m.group_matcher())
    assert len(fine)==1+sum(map(len, stages_of(m)))+1
    y.square().sum().backward()
    grads = [p.grad for p in m.parameters()]
    m.zero_grad()
    m.set_grad_checkpointing()
    m(x).square().sum().backward()
    for p,g in zip(m.parameters(), grads): torch.testing.assert_close(p.grad, g, rtol=1e-3, atol=1e-4*g.abs().max().item())
    m.reset_classifier(0)
    assert m(x).shape==(1,m.num_features)==(1,m.head_hidden_size)
    m.reset_classifier(0, '')
    assert torch.equal(m(x), maps)
    m.reset_classifier(7, 'max')
    assert m(x).shape==(1,7)
    with pytest.raises(ValueError, match='unknown global_pool'): m.reset_classifier(7, 'mean')
    assert timm.create_model(name, num_classes=0, global_pool='', widen=0.5).eval()(x).shape==maps.shape
    assert m.prune_intermediate_layers([1])==[1] and m(x).shape==taken[1].shape

def test_what_no_folder_can_tell(tmp_path):
    "Models whose building nobody wrote down are refused, with the ways to keep them, which work"
    from fastai.vision.learner import vision_learner
    learn = vision_learner(loaders((3,32,32)), tv.resnet18, pretrained=False, path=tmp_path, **loss).add_attn()
    for m in (learn,tv.resnet18(),insert_attn(xresnet18(n_out=2)),positional_learner(loaders((3,8,8)), dim=8, depth=1, heads=2, **loss)):
        with pytest.raises(ValueError, match='keep model.state_dict.* learn.save .weights. or learn.export'): save_model(m, tmp_path/'m')
    assert not (tmp_path/'m').exists()
    filled(learn.model)
    learn.save('kept')
    other = vision_learner(loaders((3,32,32)), tv.resnet18, pretrained=False, path=tmp_path, **loss).add_attn()
    other.load('kept', with_opt=False)
    assert same_state(other.model.state_dict(), learn.model.state_dict())

@pytest.mark.parametrize('build', [lambda: insert_attn(insert_attn(timm.create_model('test_resnet', num_classes=4), 'ssa_sym', stages=[1,3]), 'eca', stages='layer2'),
    lambda: timm.create_model('xresnet18_ssa', num_classes=4, stages=[1,2], widen=0.25)], ids=['inserted','ours'])
def test_folder_that_timm_wrote(build, tmp_path):
    "It says of which attention: what was inserted stands in the configuration, and timm builds ours"
    from timm.models import save_for_hf
    m = filled(trained(build()))
    save_for_hf(m, tmp_path, safe_serialization=True)
    assert same_state(load_model(tmp_path).state_dict(), m.state_dict()) and [o.attn for o in attn_sites(load_model(tmp_path))]==[o.attn for o in attn_sites(m)]
    if len(attn_layers(m))==3:
        with pytest.warns(UserWarning, match='not loaded'): other = attn_timm(f'local-dir:{tmp_path}', 'ssa_sym', stages=1, num_classes=3, pretrained=True)
        assert torch.equal(attn_layers(other)[0].weight, attn_layers(m)[0].weight) and len(attn_layers(other))==1
        save_for_hf(remove_attn(m), tmp_path, safe_serialization=True)
        assert not attn_layers(load_model(tmp_path))

def test_pickled_folder_of_timm(tmp_path):
    timm.models.save_for_hf(timm.create_model('test_resnet'), tmp_path)
    with pytest.raises(ValueError, match='pickles are not read.*safe_serialization=True'): load_model(tmp_path)

def test_folder_with_unknown_attention(tmp_path):
    m = insert_attn(timm.create_model('test_resnet', num_classes=4))
    del m.pretrained_cfg['fastattn'] # as of a body that stood in another model
    timm.models.save_for_hf(m, tmp_path, safe_serialization=True)
    with pytest.raises(ValueError, match='weights of attention, but does not say of which.*save_model says so'): load_model(tmp_path)

@pytest.mark.parametrize('arch', ['resnet18','resnet50'])
def test_timms_init(arch):
    "timm's `init_weights` makes the last norm of each residual branch 0, with attention behind it too, and no other"
    m = insert_attn(timm.create_model(arch, num_classes=4), stages='all', blocks='all')
    insert_attn(m, lambda _: SimpleSelfAttention(64), stages='layer1.0.bn1')
    for p in m.parameters(): nn.init.ones_(p)
    m.init_weights()
    last = 'bn2' if arch=='resnet18' else 'bn3'
    norms = {k: p for k,p in m.named_parameters() if 'bn' in k and k.endswith('weight') and 'fastattn' not in k}
    assert all(p.any()!=(f'.{last}.' in k) for k,p in norms.items())
    timm.create_model(arch).init_weights()

@pytest.mark.parametrize('shape,order', [((2,5,8),(0,2,1)), ((1,5,8),(1,2,0)), ((2,3,4,8),(0,3,1,2)), ((1,8,3,4),(0,2,3,1)), ((2,8,3,4),(2,0,3,1))])
def test_layout_is_kept(shape, order):
    "What comes out lies in memory as what went in, so that what follows computes the same to the last bit"
    x = torch.randn(shape).permute(order).contiguous().permute([order.index(i) for i in range(len(shape))])
    after = AttnAfter(8).append(SimpleSelfAttention(8))
    y = after(x)
    assert torch.equal(y, x) and y.stride()==x.stride()
    y += 1
    y.sum().backward()
    assert after[0].gamma.grad is not None

def _gradients(m, x, y):
    m.zero_grad()
    nn.functional.cross_entropy(m(x), y).backward()
    return {k: p.grad.clone() for k,p in m.named_parameters()}

def _one_of_two(rank, folder):
    "Gradients with fixed statistics; then weights after each of two steps in training"
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
    mine = slice(2*rank, 2*rank+2)
    m,x,y = insert_attn(make('torchvision'), 'ssa', stages='all'),images(4, 32)[mine],torch.arange(4)[mine]
    seen = [_gradients(nn.parallel.DistributedDataParallel(wake(copy.deepcopy(m))), x, y)]
    net,opt = nn.parallel.DistributedDataParallel(m.train()),torch.optim.SGD(m.parameters(), 1e-7)
    for _ in range(2):
        _gradients(net, x, y)
        opt.step()
        seen.append({k: p.detach().clone() for k,p in m.named_parameters()})
    torch.save(seen, folder/f'{rank}.pt')
    torch.distributed.destroy_process_group()

@pytest.mark.slow
def test_two_processes(tmp_path):
    "Gradients are those of one process on both batches; all gains move, and weights stay equal"
    torch.multiprocessing.spawn(_one_of_two, (tmp_path,), nprocs=2)
    ours,theirs = (torch.load(tmp_path/f'{rank}.pt') for rank in range(2))
    assert all(same_state(a, b) for a,b in zip(ours, theirs))
    want = _gradients(wake(insert_attn(make('torchvision'), 'ssa', stages='all')), images(4, 32), torch.arange(4))
    got = {k.removeprefix('module.'): v for k,v in ours[0].items()}
    assert got.keys()==want.keys()
    for k,v in want.items(): torch.testing.assert_close(got[k], v, rtol=1e-3, atol=1e-4*v.abs().max().item())
    first,second = ([v.item() for k,v in o.items() if k.endswith('gamma')] for o in ours[1:])
    assert len(first)==4 and all(first) and all(i!=j for i,j in zip(first, second))
