"Attention in models of timm and torchvision: insertion, removal, sites, folders, registry, export, Learners"
import copy,json,pickle
from pathlib import Path
import numpy as np,pytest,timm,torch
from fastai.basics import load_learner,partial,set_seed
from fastai.losses import CrossEntropyLossFlat
from fastai.vision.learner import create_body,vision_learner
from fastai.vision.models.xresnet import xresnet18
from torch import nn
from torchvision import models as tv
from commands import Forked
from fastattn.callback import NoWeightDecay,SpanRecorder
from fastattn.interpret import attention_map,show_attention
from fastattn.layers.positional import PositionalSelfAttention
from fastattn.layers.projection import SelfProjection
from fastattn.layers.simple import SimpleSelfAttention
from fastattn.learner import ssa_learner
from fastattn.models.insert import AttnAfter,GainedBranch,attn_layers,attn_sites,attns,insert_attn,remove_attn,stages_of
from fastattn.models.timm import attn_timm,load_model,save_model
from fastattn.models.xresnet import attn_xresnet
from fastattn.recipes.data import get_dls

def wake(m, gain=0.01):
    "Gains that let every attention count"
    for o in attn_layers(m):
        for n,p in o.named_parameters():
            if n in ('gamma','gain'): nn.init.constant_(p, gain)
    return m
def make(arch, size=64, **kwargs):
    torch.manual_seed(0)
    fixed = dict(img_size=size) if arch.startswith(('test_vit','swin')) else {}
    m = timm.create_model(arch, num_classes=4, **fixed, **kwargs).eval()
    for p in m.parameters():
        if not p.any(): nn.init.uniform_(p, 0.1, 0.5) # as if trained: no branch is off
    return m
def state(m): return {k: v.clone() for k,v in m.state_dict().items()}
def same(a, b): return list(a)==list(b) and all(torch.equal(a[k], b[k]) for k in a)

families = ['resnet18','resnet50','test_resnet','resnetv2_18','regnetx_002','regnety_002','convnext_atto','convnextv2_atto','efficientnet_b0','mobilenetv3_small_050',
    'mobilenetv2_035','ghostnet_050','repghostnet_050','lcnet_035','tinynet_e','dla46x_c','vovnet39a','cspresnet50','edgenext_xx_small','fasternet_t0','starnet_s050',
    'inception_next_atto','poolformer_s12','levit_conv_128s','test_vit','swin_tiny_patch4_window7_224','mambaout_femto','repvit_m0_9','shvit_s1','efficientvit_m0','mobileone_s0','hgnetv2_b0']

@pytest.mark.parametrize('arch', families)
def test_identity_and_removal(arch):
    "At all stages: outputs and names as before; it does count; removal restores all"
    size = 224 if 'levit' in arch else 64
    m = make(arch, size)
    x = torch.randn(2, 3, size, size)
    before,y,maps = state(m),m(x),m.forward_features(x)
    n = len(stages_of(m))
    insert_attn(m, 'ssa', stages=range(1, n+1))
    assert len(attn_layers(m))==n
    after = m.state_dict()
    assert all(torch.equal(after[k], v) for k,v in before.items()) and len(after)==len(before)+4*n
    assert torch.equal(m(x), y)
    assert not torch.equal(wake(m, 1.).forward_features(x), maps)
    assert not m.load_state_dict(before, strict=False).unexpected_keys # pretrained weights still find their places
    remove_attn(m)
    assert torch.equal(m(x), y) and same(state(m), before)
    assert not any(o._forward_hooks for o in m.modules()) and not attn_layers(m)

@pytest.mark.parametrize('attn', ['ssa','ssa_sym','sa','positional','local'])
def test_layers(attn):
    "Identity in both modes, gradients reach the gain, and then the rest"
    m = insert_attn(make('resnet18'), attn, stages=[2,3], blocks='all')
    plain = make('resnet18')
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(m(x), plain(x)) and torch.equal(m.train()(x), plain.train()(x))
    m(x).square().sum().backward()
    gains = [p for o in attn_layers(m) for n,p in o.named_parameters() if n in ('gamma','gain')]
    assert len(gains)==4 and all(p.grad.abs().sum()>0 for p in gains)

def test_projection():
    m = make('resnet18')
    x = torch.randn(2, 3, 64, 64)
    y = m(x)
    insert_attn(m, lambda _: GainedBranch(SelfProjection((8,8), 8)), stages=2)
    assert torch.equal(m(x), y)
    assert not torch.equal(wake(m)(x), y)
    with pytest.raises(ValueError, match='size_input'): m(torch.randn(1, 3, 96, 96))

@pytest.mark.parametrize('arch,want', [('resnet50', (3,4,6,3)), ('regnetx_002', (1,1,4,7)), ('convnext_atto', (2,2,6,2)), ('efficientnet_b0', (1,2,2,3,1)), ('test_vit', (6,)),
    ('swin_tiny_patch4_window7_224', (2,2,6,2)), ('cspresnet50', (1,1,1,1)), ('dla34', (1,1,1,1)), ('vgg11', (1,1,1,1)), ('xresnet18_ssa', (2,2,2,2))])
def test_stages(arch, want):
    with torch.device('meta'): m = timm.create_model(arch)
    assert tuple(len(o) for o in stages_of(m))==want

def test_place_in_resnets():
    "At the end of the residual branch, as in xresnets: behind the last batch norm"
    for m,end in ((make('resnet18'),'bn2'), (make('resnet50'),'bn3'), (tv.resnet18(),'bn2'), (tv.resnext50_32x4d(),'bn3')):
        assert all(o.module.endswith(end) and o.channels==m.get_submodule(o.module).num_features for o in attn_sites(m))
    assert [o.module for o in attn_sites(insert_attn(tv.resnet18(), stages=[1,4])) if o.attn]==['layer1.1.bn2','layer4.1.bn2']

@pytest.mark.parametrize('make_body', [lambda: create_body(tv.resnet18(), pretrained=False, cut=-2), lambda: create_body(xresnet18(), pretrained=False, cut=-4)])
def test_bodies(make_body):
    m = nn.Sequential(make_body(), nn.Identity()).eval()
    x = torch.randn(1, 3, 64, 64)
    y = m(x)
    assert torch.equal(insert_attn(m, stages=[1,2,3,4], blocks='all')(x), y)
    assert len(attn_layers(m))==8

def test_layouts():
    "Tokens, maps with channels last, maps with channels first and tuples; where the shape can be read both ways, as told"
    class Scale(nn.Module):
        def forward(self, x): return x*torch.arange(1., 1+x.shape[1]).view(-1, *[1]*(x.dim()-2))
    def after(last): return AttnAfter(4, last).append(Scale())
    c = torch.arange(1., 5)
    for last in (False,True):
        assert torch.equal(after(last)(torch.ones(2,4,3,3)), c.view(4,1,1).expand(2,4,3,3))
        assert torch.equal(after(last)(torch.ones(2,3,3,4)), c.expand(2,3,3,4))
        assert torch.equal(after(last)(torch.ones(2,4,4)), c.expand(2,4,4)) # tokens
        assert torch.equal(after(last)(torch.ones(2,4,5)), c.view(4,1).expand(2,4,5))
        assert torch.equal(after(last)(torch.ones(2,4,3,4)), c.expand(2,4,3,4) if last else c.view(4,1,1).expand(2,4,3,4))
    x,rest = after(False)((torch.ones(2,4,3,3),'h'))
    assert rest=='h' and torch.equal(x, c.view(4,1,1).expand(2,4,3,3))

@pytest.mark.parametrize('arch', ['resnet18','convnext_atto','swin_tiny_patch4_window7_224'])
def test_survives(arch):
    "deepcopy, pickle, and hooks of others on the same modules"
    m = wake(insert_attn(make(arch), 'ssa', stages=[1,2]))
    x = torch.randn(1, 3, 64, 64)
    y = m(x)
    for copied in (copy.deepcopy(m), pickle.loads(pickle.dumps(m)), copy.deepcopy(copy.deepcopy(m))):
        assert torch.equal(copied(x), y)
        for o in attn_layers(copied): nn.init.zeros_(o.gamma)
        assert not torch.equal(copied(x), y) and torch.equal(m(x), y) # the copy's attention is its own
        remove_attn(copied)
        assert not any(o._forward_hooks for o in copied.modules())
    fresh = wake(insert_attn(make(arch), 'ssa', stages=[1,2]))
    fresh.load_state_dict(m.state_dict())
    assert torch.equal(fresh(x), y)

def test_new_process(tmp_path):
    "In a new process, a hook that is registered first does not push out the attention"
    m = wake(insert_attn(make('resnet18'), 'ssa', stages=[1,2,3,4], blocks='all'))
    x = torch.randn(1, 3, 64, 64)
    torch.save((m,x,m(x)), tmp_path/'m.pt')
    code = f'''import torch
m,x,y = torch.load({str(tmp_path/'m.pt')!r}, weights_only=False)
for o in m.modules(): o.register_forward_hook(lambda *a: None)
assert torch.allclose(m(x), y, atol=1e-5)'''
    end = Forked(tmp_path/'logs', code).end()
    assert end.returncode==0, end.stderr

def test_dtype_device_mode():
    m = make('resnet18').double()
    layer, = attn_layers(insert_attn(m))
    assert layer.weight.dtype==torch.double and not layer.training
    assert attn_layers(insert_attn(make('resnet18').train()))[0].training
    with torch.device('meta'): m = timm.create_model('resnet18')
    assert attn_layers(insert_attn(m))[0].weight.is_meta

def test_sites():
    m = insert_attn(insert_attn(make('resnet18'), 'ssa', stages=[1,2]), 'se', stages=2)
    insert_attn(m, 'eca', stages='layer3.0.bn1')
    sites = attn_sites(m)
    assert [(o.stage,o.block,o.module,o.channels,o.attn) for o in sites if o.attn]==[(1,1,'layer1.1.bn2',64,['ssa']), (2,1,'layer2.1.bn2',128,['ssa','se']), (None,None,'layer3.0.bn1',256,['eca'])]
    assert len(sites)==9
    text,table = repr(sites).splitlines(),sites._repr_markdown_().splitlines()
    assert text[0].split()==['stage','block','module','channels','attention'] and len(text)==10 and len(table)==11
    remove_attn(m, 2)
    assert [o.module for o in attn_sites(m) if o.attn]==['layer1.1.bn2','layer3.0.bn1']
    remove_attn(m, 'layer3.0.bn1')
    assert [o.module for o in attn_sites(m) if o.attn]==['layer1.1.bn2']
    assert not any(o.attn for o in attn_sites(remove_attn(m)))

def test_xresnet_removal():
    "What fastai put in line goes too; squeeze-and-excitation, which belongs to the architecture, stays"
    for kwargs in (dict(sa=True), {}):
        m = insert_attn(xresnet18(**kwargs), 'ssa_sym', stages=[3,4])
        assert remove_attn(m).state_dict().keys()==xresnet18().state_dict().keys()
    m = attn_xresnet('xse_resnext18', 'none')
    keys = list(m.state_dict())
    assert list(remove_attn(insert_attn(m, 'cbam')).state_dict())==keys
    m = insert_attn(insert_attn(xresnet18(), 'cbam'), 'ssa') # behind a layer whose last convolution has one channel
    assert attn_layers(m)[1].n_in==64

@pytest.mark.parametrize('kwargs,message', [(dict(stages=5), 'from 1 to 4'), (dict(stages='1'), 'whole numbers'), (dict(stages='layer9'), "Did you mean 'layer"), (dict(blocks=7), 'indices from -2 to 1'), (dict(attn='sssa'), "Did you mean 'ssa'")])
def test_bad(kwargs, message):
    m = make('resnet18')
    with pytest.raises(ValueError, match=message): insert_attn(m, **kwargs)
    assert not attn_layers(m)

def test_bad_places():
    with pytest.raises(ValueError, match="stages='features.8'"): insert_attn(nn.Sequential(nn.Conv2d(3, 3, 1)))
    with pytest.raises(ValueError, match='in a way of its own'): insert_attn(timm.create_model('densenet121'), stages='features.denseblock1')
    with pytest.raises(ValueError, match='does not tell'): insert_attn(make('resnet18'), stages='act1')
    m = insert_attn(make('resnet18'), lambda _: SimpleSelfAttention(64), stages='act1')
    assert torch.equal(m(x := torch.randn(1, 3, 64, 64)), make('resnet18')(x))
    with pytest.raises(ValueError, match='already'): insert_attn(insert_attn(make('resnet18')), stages=[2,1])

def test_bad_names():
    with pytest.raises(ValueError, match="Did you mean 'resnet18'"): attn_timm('resnet81')
    with pytest.raises(ValueError, match="unknown option 'foo'"): attn_timm('resnet18', foo=1)
    with pytest.raises(ValueError, match='could not be loaded'): attn_timm('test_resnet', pretrained=True, pretrained_cfg_overlay=dict(file='nowhere.pth'))

def test_pretrained_file(tmp_path):
    "Weights from a file of timm's names"
    sd = make('test_resnet').state_dict()
    torch.save(sd, tmp_path/'w.pth')
    m = attn_timm('test_resnet', stages=[1,2], pretrained=True, num_classes=4, pretrained_cfg_overlay=dict(file=str(tmp_path/'w.pth'), num_classes=4))
    assert all(torch.equal(m.state_dict()[k], v) for k,v in sd.items())

def test_registry():
    names = timm.list_models('*xresnet*ssa*')
    assert len(names)==22 and set(names)<=set(timm.list_models())
    m = timm.create_model('xresnet50_ssa', num_classes=10, in_chans=1).eval()
    assert m(x := torch.randn(2, 1, 64, 64)).shape==(2,10)
    theirs = attn_xresnet('xresnet50', n_out=10, c_in=1)
    theirs.load_state_dict(m.state_dict()) # fastai's names
    torch.testing.assert_close(theirs.eval()(x), m(x))
    assert torch.equal(m.forward_head(m.forward_features(x)), m(x)) and m.forward_head(m.forward_features(x), pre_logits=True).shape==(2,2048)
    m.reset_classifier(3)
    assert m(x).shape==(2,3) and m.num_classes==3
    m.reset_classifier(0)
    assert m(x).shape==(2,2048)
    assert timm.create_model('xresnet18_ssa', num_classes=0)(torch.randn(2, 3, 64, 64)).shape==(2,512)
    assert timm.create_model('xresnet18_ssa_sym', stages=[1,2]).default_cfg['architecture']=='xresnet18_ssa_sym'

@pytest.mark.parametrize('name', ['xresnet18_ssa','xresnet34_deep_ssa_sym'])
def test_features_only(name):
    m = timm.create_model(name, features_only=True)
    x = torch.randn(1, 3, 128, 128)
    for y,c,r in zip(m(x), m.feature_info.channels(), m.feature_info.reduction()): assert y.shape==(1,c,128//r,128//r)
    m = attn_timm('convnext_atto', stages=[2,4], features_only=True)
    assert len(attn_layers(m))==2 and len(m(x))==4

@pytest.mark.parametrize('build', [lambda: attn_timm('test_resnet', 'ssa_sym', stages=[1,2], num_classes=5, in_chans=1), lambda: attn_timm('test_convnext', 'positional', stages=2, blocks='all', num_classes=5, in_chans=1),
    lambda: attn_xresnet('xresnet18', stages=[1,3], n_out=5, c_in=1, widen=0.25, act_cls=nn.Mish), lambda: timm.create_model('xresnet18_ssa', num_classes=5, in_chans=1, widen=0.25, stages=[2]),
    lambda: insert_attn(insert_attn(timm.create_model('test_resnet', num_classes=5, in_chans=1), 'ssa'), 'eca'), lambda: remove_attn(timm.create_model('xresnet18_ssa', num_classes=5, in_chans=1, widen=0.25))])
def test_folder(build, tmp_path):
    m = wake(build()).eval()
    save_model(m, tmp_path/'a'/'b')
    assert sorted(o.name for o in (tmp_path/'a'/'b').iterdir())==['config.json','model.safetensors']
    back = load_model(tmp_path/'a'/'b').eval()
    x = torch.randn(2, 1, 64, 64)
    assert torch.equal(back(x), m(x)) and same(back.state_dict(), m.state_dict())
    assert [o.attn for o in attn_sites(back)]==[o.attn for o in attn_sites(m)]
    save_model(back, tmp_path/'c') # and again
    assert (tmp_path/'c'/'config.json').read_text()==(tmp_path/'a'/'b'/'config.json').read_text()

def test_folder_of_timm(tmp_path):
    "What timm wrote is read here, and the other way round"
    m = make('test_resnet')
    timm.models.save_for_hf(m, tmp_path/'theirs', safe_serialization=True)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(load_model(tmp_path/'theirs').eval()(x), m(x))
    save_model(m, tmp_path/'ours')
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path/'ours'}", pretrained=True).eval()(x), m(x))
    config = json.loads((tmp_path/'ours'/'config.json').read_text())
    assert config['architecture']=='test_resnet' and config['num_classes']==4 and config['pretrained_cfg']['input_size'] and config['fastattn']=={}

def test_hub(tmp_path):
    "torch.hub finds our models in the repository, and load_model"
    repo = str(Path(__file__).parents[1])
    m = torch.hub.load(repo, 'xresnet18_ssa', source='local', n_out=3, widen=0.25).eval()
    save_model(m, tmp_path)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(torch.hub.load(repo, 'load_model', str(tmp_path), source='local').eval()(x), m(x))

def test_bad_folders(tmp_path):
    for m,message in ((insert_attn(make('resnet18'), partial(SimpleSelfAttention, scale=True)),'without a name'), (vision_model(),'tell how they were built'), (attn_xresnet('xresnet18', act_cls=lambda: nn.ReLU()),'no name')):
        with pytest.raises(ValueError, match=message): save_model(m, tmp_path/'m')
    assert not (tmp_path/'m').exists()
    (tmp_path/'config.json').write_text('{"architecture": "resnet81"}')
    with pytest.raises(ValueError, match='model.safetensors not found'): load_model(tmp_path)
    (tmp_path/'model.safetensors').write_bytes(b'')
    with pytest.raises(ValueError, match="Did you mean 'resnet18'"): load_model(tmp_path)
    attns['mine'] = partial(SimpleSelfAttention, scale=True)
    try:
        save_model(m := insert_attn(make('test_resnet'), 'mine'), tmp_path)
        assert attn_layers(load_model(tmp_path))[0].scale and attn_layers(m)[0].scale
    finally: del attns['mine']

def vision_model(): return nn.Sequential(create_body(tv.resnet18(), pretrained=False, cut=-2), nn.Flatten())

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('attn', ['ssa','positional'])
def test_export_and_onnx(attn, tmp_path):
    ort = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    m = wake(attn_timm('regnetx_002', attn, stages=[2,4], num_classes=4), dict(ssa=0.1, positional=1.)[attn]).eval()
    x = torch.randn(2, 3, 64, 64)
    graph = torch.export.export(m, (x,))
    torch.testing.assert_close(graph.module()(x), m(x), rtol=1e-3, atol=1e-4)
    if attn!='ssa': return # one of both is enough for the slow part
    torch.onnx.export(graph, (), tmp_path/'m.onnx', dynamo=True, verbose=False)
    session = ort.InferenceSession(tmp_path/'m.onnx')
    y = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    np.testing.assert_allclose(y, m(x).detach().numpy(), rtol=1e-3, atol=1e-4)
    assert np.abs(y-remove_attn(m)(x).detach().numpy()).max()>1e-3 # the attention is in the graph

def test_compile():
    m,x = wake(attn_timm('test_convnext', stages=[1,2], num_classes=4)).eval(),torch.randn(2, 3, 64, 64)
    compiled = copy.deepcopy(m)
    compiled.compile(fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(x), m(x), rtol=1e-4, atol=1e-4)
    assert compiled.state_dict().keys()==m.state_dict().keys()

@pytest.fixture(scope='module')
def dls(): return get_dls('digits', size=32, bs=32)

@pytest.fixture(scope='module')
def few(dls):
    from fastai.basics import DataLoaders
    return DataLoaders(*[dls.test_dl(dls.train_ds.items[:64], with_labels=True, bs=32) for _ in range(2)])

def fit(learn, n=1, **kwargs):
    with learn.no_bar(),learn.no_logging(): learn.fit(n, **kwargs)
    return learn
def moved(learn, before): return {k for k,p in learn.model.named_parameters() if not torch.equal(p, before[k])}
def params(m): return {k: p.clone() for k,p in m.named_parameters()}

@pytest.mark.parametrize('arch', ['test_resnet','test_convnext','xresnet18'])
def test_learner_groups(few, arch):
    "Stem, stages, head with attention; each parameter once; a frozen Learner trains attention, head and norms"
    kwargs = dict(widen=0.25) if arch=='xresnet18' else {}
    learn = ssa_learner(few, arch, stages=1, **kwargs)
    groups = learn.splitter(learn.model)
    assert len(groups)==3 and sorted(id(p) for g in groups for p in g)==sorted(id(p) for p in learn.model.parameters())
    attn = {id(p) for o in attn_layers(learn.model) for p in o.parameters()}
    assert attn and attn<={id(p) for p in groups[-1]}
    before = params(learn.model)
    learn.freeze()
    fit(fit(learn, lr=1e-2), lr=1e-2) # the second time the gain lets gradients through to W
    names = {id(p): k for k,p in learn.model.named_parameters()}
    last = {names[id(p)] for p in groups[-1]}
    norms = {k+'.'+n for k,m in learn.model.named_modules() if isinstance(m, (nn.BatchNorm2d,nn.LayerNorm)) for n,_ in m.named_parameters()}
    assert {names[i] for i in attn}<=moved(learn, before)<=last|norms
    learn.unfreeze()
    fit(learn, lr=slice(1e-5, 1e-3))
    assert learn.opt.hypers[0]['lr']<learn.opt.hypers[1]['lr']<learn.opt.hypers[2]['lr']

def test_fine_tune(few):
    learn = ssa_learner(few, 'test_resnet', stages=[1,2])
    before = params(learn.model)
    with learn.no_bar(),learn.no_logging(): learn.fine_tune(1, 1e-2)
    assert all('fastattn' in k for k in set(before)-moved(learn, before)) # W follows where its gain has left 0
    assert [learn.opt.state[o.gamma].get('do_wd') for o in attn_layers(learn.model)]==[False,False]

def test_pretrained_learner(tmp_path):
    "Weights, the statistics they expect, and a frozen start, as `vision_learner`"
    dls = get_dls('digits', size=32, bs=32)
    torch.save(make('test_resnet', in_chans=1).state_dict(), tmp_path/'w.pth')
    n = len(dls.after_batch.fs)
    learn = ssa_learner(dls, 'test_resnet', pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path/'w.pth'), num_classes=4, input_size=(1,32,32)))
    assert len(dls.after_batch.fs)==n # digits are normalised already
    assert learn.opt.frozen_idx==2 and not learn.splitter(learn.model)[0][0].requires_grad
    assert attn_layers(learn.model)[0].gamma.requires_grad

def test_in_place_after(dls):
    "What comes behind the layer may change its output in place, also when it is one of fastai's tensors"
    from fastai.torch_core import TensorImage
    for shape in ((2,8,2,2),(2,8,16,16)): # each in another order of multiplication
        x = TensorImage(torch.randn(shape))
        layer = SimpleSelfAttention(8)
        y = layer(x)
        y += 1
        y.sum().backward()
        assert layer.gamma.grad is not None

@pytest.mark.parametrize('trained', [False,True])
def test_add_attn(few, trained):
    "Weights and predictions stay; the optimiser is new and knows the attention; the frozen stay frozen"
    learn = ssa_learner(few, 'test_resnet', 'none')
    if trained: fit(learn)
    learn.freeze()
    x = few.one_batch()[0]
    y,weights,opt = learn.model.eval()(x),params(learn.model),learn.opt
    assert learn.add_attn('ssa', stages=[1,2]) is learn
    assert torch.equal(learn.model.eval()(x), y) and learn.opt is not opt and learn.opt.frozen_idx==opt.frozen_idx
    assert all(torch.equal(learn.model.state_dict()[k], v) for k,v in weights.items())
    before = params(learn.model)
    fit(learn, lr=1e-2)
    assert all(o.gamma.item()!=0 for o in attn_layers(learn.model))
    assert 'conv1.weight' not in moved(learn, before)
    learn.add_attn('eca', stages=2)
    assert len(learn._grab_cbs(NoWeightDecay))==1 and len(attn_layers(learn.model))==3
    learn.add_attn('positional', stages=2)
    assert len(learn._grab_cbs(SpanRecorder))==1
    fit(learn)
    with pytest.raises(ValueError, match='already'): learn.add_attn('eca', stages=2)

def test_add_attn_to_vision_learner(tmp_path):
    "fastai's own Learner with a torchvision body, and its export"
    dls = get_dls('digits', size=32, bs=32)
    learn = vision_learner(dls, tv.resnet18, pretrained=False, n_in=1, n_out=10, loss_func=CrossEntropyLossFlat(), path=tmp_path)
    n = len(learn.splitter(learn.model))
    learn.freeze()
    learn.add_attn('ssa', stages=[1,2])
    assert len(learn.opt.param_lists)==n
    assert all(o.gamma.requires_grad for o in attn_layers(learn.model)) and not learn.model[0][0].weight.requires_grad
    wake(learn.model)
    learn.export()
    back = load_learner(tmp_path/'export.pkl')
    x = dls.one_batch()[0]
    assert torch.equal(back.model.eval()(x), learn.model.eval()(x)) and len(attn_layers(back.model))==2

def test_export_learner(few, tmp_path):
    learn = fit(ssa_learner(few, 'test_convnext', 'positional', stages=2, path=tmp_path))
    assert learn.span_recorder.rows
    learn.export()
    x = few.one_batch()[0]
    assert torch.equal(load_learner(tmp_path/'export.pkl').model.eval()(x), learn.model.eval()(x))
    save_model(learn, tmp_path/'m')
    assert json.loads((tmp_path/'m'/'config.json').read_text())['label_names']==[str(o) for o in few.vocab]
    assert torch.equal(load_model(tmp_path/'m').eval()(x), learn.model.eval()(x))

def test_bad_learner(few):
    with pytest.raises(ValueError, match="Did you mean 'xresnet18'"): ssa_learner(few, 'xresnet81')
    with pytest.raises(ValueError, match="unknown option 'widen'"): ssa_learner(few, 'resnet18', widen=2)

@pytest.mark.parametrize('sym,ks', [(False,1), (True,3)])
def test_map_is_the_layer(sym, ks):
    "The branch of simple self-attention is the input weighted by the map, at every position"
    torch.manual_seed(0)
    layer,x = SimpleSelfAttention(6, ks=ks, sym=sym).eval(),torch.randn(1, 6, 4, 5)
    layer.gamma.data.fill_(0.5)
    y = layer(x)-x
    for at in ((0,0),(1,4),(3,2)):
        torch.testing.assert_close(0.5*(x[0]*attention_map(layer, x, at)).sum((1,2)), y[0,:,at[0],at[1]], rtol=1e-4, atol=1e-4)

def test_map_of_positional():
    torch.manual_seed(0)
    layer,x = PositionalSelfAttention(8, 2, span=(1,2)),torch.randn(1, 5, 7, 8)
    m = attention_map(layer, x, (2,3))
    assert (m>0).nonzero().tolist()==[[i,j] for i in (1,2,3) for j in range(1,6)]
    torch.testing.assert_close(m.sum(), torch.tensor(1.))
    with pytest.raises(ValueError, match='Identity has no map. There are maps of'): attention_map(nn.Identity(), x, (0,0))

@pytest.mark.parametrize('attn', ['ssa','positional'])
def test_show_attention(attn):
    m = wake(attn_timm('test_resnet', attn, stages=[1,2], num_classes=4, in_chans=1)).train()
    m.conv1.eval() if hasattr(m, 'conv1') else None
    modes,hooks = [o.training for o in m.modules()],[len(o._forward_pre_hooks) for o in m.modules()]
    before = state(m)
    fig = show_attention(m, torch.rand(1, 32, 48), (31,47))
    assert len(fig.axes)==3
    assert [o.training for o in m.modules()]==modes and [len(o._forward_pre_hooks) for o in m.modules()]==hooks and same(state(m), before)
    with pytest.raises(ValueError, match='of 32x48'): show_attention(m, torch.rand(1, 32, 48), (0,48))
    import matplotlib.pyplot as plt
    plt.close(fig)

@pytest.mark.parametrize('make', [lambda: timm.create_model('xresnet18_ssa', num_classes=3), lambda: insert_attn(timm.create_model('resnet18', num_classes=3), 'ssa', stages=[1,2])], ids=['ours','inserted'])
def test_fx(make):
    "timm's feature extraction by torch.fx takes attention as one node"
    m,x = make().eval(),torch.randn(1, 3, 64, 64)
    last = timm.models.get_graph_node_names(m)[1][-1]
    features = timm.models.create_feature_extractor(m, return_nodes={last: 'y'})
    assert any('attn' in type(o).__name__.lower() for o in features.modules())
    assert torch.equal(features(x)['y'], m(x))
