"Maps of attention, against what layers compute with them, and timm's own extraction; films of matrices"
import io,matplotlib.pyplot as plt,numpy as np,PIL.Image,pytest,timm,torch
from timm.layers import create_attn
from timm.layers.non_local_attn import BatNonLocalAttn
from timm.models.maxxvit import MaxxVitTransformerCfg,PartitionAttention2d,PartitionAttentionCl
from timm.models.swin_transformer import SwinTransformerBlock
from timm.utils import AttentionExtract
from torch import nn
from torchvision import models as tv
from torchvision.models.swin_transformer import ShiftedWindowAttention
from fastai.vision.models.xresnet import xresnet18
from fastattn.interpret import _all_maps,attention_map,show_attention,show_film,show_grids
from fastattn.models.insert import attn_layers,attns,insert_attn

@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    yield
    plt.close('all')

def images(size=(64,96), n=3): return torch.rand(n, *size)
def maps_of(model, x, point): return _all_maps(model, x[None], point, tuple(x.shape[1:]))

def insert(m, attn):
    for p in m.parameters():
        if not p.any(): nn.init.constant_(p, 0.1) # as if trained: no branch is off
    for o in attn_layers(insert_attn(m, attn, stages=2)):
        for k,p in o.named_parameters():
            if k in ('gamma','gain'): nn.init.constant_(p, 0.1)
    return m

kinds = dict(se='c', ese='c', eca='c', ecam='c', ceca='c', gc='mc', cbam='cm', lcbam='cm', sk='cc', splat='cc') # maps and weights of channels; of all others one map

@pytest.mark.parametrize('attn', [o for o in attns if o!='none'])
@pytest.mark.parametrize('build', [lambda: timm.create_model('resnet18', num_classes=4), lambda: xresnet18(n_out=4)], ids=['timm','xresnet'])
def test_every_attention(attn, build):
    m = insert(build(), attn).train()
    modes,before = [o.training for o in m.modules()],{k: v.clone() for k,v in m.state_dict().items()}
    maps = maps_of(m, images(), (31,47))
    assert [tuple(o.shape) for o in maps.values()]==[(8,12) if o=='m' else (128,) for o in kinds.get(attn, 'm')]
    assert all(o.isfinite().all() and o.abs().sum()>0 for o in maps.values())
    assert [o.training for o in m.modules()]==modes and all(torch.equal(v, before[k]) for k,v in m.state_dict().items())
    assert not any(o._forward_hooks and not hasattr(o, 'fastattn') or o._forward_pre_hooks for o in m.modules() if not hasattr(o, 'weight_u'))
    show_attention(m, images(), (31,47))

def test_softmax_of_positions():
    "Their branches are values weighted by the map"
    x,at = torch.randn(1, 16, 5, 6),(3,4)
    l = attns['sa'](16).eval()
    l.gamma.data.fill_(1.)
    m = attention_map(l, x, at)
    torch.testing.assert_close(l.value(x.flatten(2))[0]@m.flatten(), (l(x)-x)[0,:,3,4], rtol=1e-4, atol=1e-5)
    l = create_attn('nl', 16).eval()
    l.norm.weight.data.fill_(1.)
    m = attention_map(l, x, at)
    looked = (l.g(x)[0].flatten(1)@m.flatten()).view(1, -1, 1, 1)
    torch.testing.assert_close(l.norm(l.z(looked))[0,:,0,0], (l(x)-x)[0,:,3,4], rtol=1e-4, atol=1e-5)
    l = create_attn('gca', 16).eval()
    nn.init.normal_(l.mlp_add.fc2.weight)
    m = attention_map(l, x, at)
    torch.testing.assert_close(l.mlp_add((x*m).sum((2,3), keepdim=True)), (l(x)-x)[...,:1,:1], rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('attn', ['se','ese','eca','ecam','ceca','gc','cbam','lcbam','coord','ela'])
def test_gates(attn):
    "Channels are multiplied by their weights; of maps the mean of all channels"
    x,l = torch.rand(1, 16, 5, 6)+0.1,create_attn(attn, 16).eval()
    maps = maps_of(nn.Sequential(l), x[0], (2,3))
    gate = l(x)[0]/x[0]
    channels = next((m for m in maps.values() if m.dim()==1), torch.ones(16))
    positions = next((m for m in maps.values() if m.dim()==2 and attn!='gc'), torch.ones(5, 6))
    if attn in ('coord','ela'): # rows times columns, each a mean over channels; exact where channels agree
        with torch.no_grad():
            for p in l.parameters(): p.copy_(p[:1].expand_as(p))
        positions, = maps_of(inserted(l), x[0], (2,3)).values()
        gate = l(x)[0]/x[0]
        torch.testing.assert_close(gate.mean(0), positions, rtol=0.05, atol=0.05)
    else: torch.testing.assert_close(gate, channels[:,None,None]*positions, rtol=1e-4, atol=1e-5)

def inserted(l):
    l.attn_name = 'mine'
    return nn.Sequential(l)

def test_paths():
    l,x = create_attn('sk', 16).eval(),torch.rand(1, 16, 6, 6)
    a,b = maps_of(inserted(l), x[0], (0,0)).values()
    torch.testing.assert_close(a+b, torch.ones(16))
    paths = [p(x) for p in l.paths] if not l.split_input else [p(s) for p,s in zip(l.paths, x.split(8, 1))]
    torch.testing.assert_close(l(x), paths[0]*a[:,None,None]+paths[1]*b[:,None,None])

@pytest.mark.parametrize('size', [None,(5,6)])
def test_lambda(size):
    "The output is the values weighted by the map, in the mean of the heads"
    l,x = create_attn('lambda', 16, **({} if size is None else dict(r=None, feat_size=size))).eval(),torch.randn(1, 16, 5, 6)
    if size is None: nn.init.zeros_(l.conv_lambda.bias)
    v,y = l.norm_v(l.qkv(x)[:,-l.dim_v:]),l(x)
    for i,j in ((0,0),(4,5),(2,3)):
        torch.testing.assert_close((v[0]*attention_map(l, x, (i,j))).sum((1,2)), y[0,:,i,j].view(l.num_heads, -1).mean(0), rtol=1e-4, atol=1e-5)

def test_bilinear():
    l = BatNonLocalAttn(16, block_size=7).eval().ba
    l.conv2 = nn.Identity()
    x = torch.randn(1, 1, 14, 21).expand(1, 8, 14, 21)
    y = l(x)
    for i,j in ((0,0),(13,20),(5,9)): torch.testing.assert_close((x[0,0]*attention_map(l, x, (i,j))).sum(), y[0,:,i,j].mean())

@pytest.mark.parametrize('arch,size,before', [('test_vit',(64,64),1), ('deit_tiny_distilled_patch16_224',(32,32),2), ('vit_small_patch14_reg4_dinov2',(28,42),5), ('test_vit3',(64,48),1)])
def test_vit(arch, size, before):
    "As timm extracts it without fused attention; the rollout by its formula; the class token without a point"
    m = timm.create_model(arch, img_size=size, depth=3).eval()
    x,point,patch = images(size),(size[0]-1,5),m.patch_embed.patch_size[0]
    grid = m.patch_embed.grid_size
    maps = maps_of(m, x, point)
    for o in m.blocks: o.attn.fused_attn = False
    theirs = AttentionExtract(m, method='hook')(x[None])
    token = before+(grid[0]-1)*grid[1]+5//patch
    total = torch.eye(before+grid[0]*grid[1])
    for ours,(_,a) in zip(maps.values(), sorted(theirs.items())):
        torch.testing.assert_close(ours, a[0].mean(0)[token,before:].view(grid))
        total = (0.5*a[0].mean(0)+0.5*torch.eye(len(total)))@total
    assert list(maps)[-1]=='rollout' and list(maps)[:3]==[f'blocks.{i}.attn' for i in range(3)]
    torch.testing.assert_close(maps['rollout'], total[token,before:].view(grid))
    torch.testing.assert_close(maps_of(m, x, None)['rollout'], total[0,before:].view(grid))
    show_attention(m, x)

def test_torchvisions_vit():
    m,x = tv.VisionTransformer(32, 8, 2, 2, 16, 32).eval(),images((32,32))
    seen = []
    maps = maps_of(m, x, (9,30))
    for o in m.encoder.layers: o.self_attention.register_forward_hook(lambda l, args, out: seen.append(l.forward(*args, need_weights=True)[1]))
    m(x[None])
    for o,a in zip(maps.values(), seen): torch.testing.assert_close(o.flatten(), a[0,1+4+3,1:])
    assert len(maps)==3 and torch.backends.mha.get_fastpath_enabled()

@pytest.mark.parametrize('shift', [(0,0),(1,2)])
@pytest.mark.parametrize('grid', [(6,8),(7,9),(3,4)])
def test_windows_of_torchvision(shift, grid):
    "With one head, the output is the values weighted by the map, at every position"
    l,x = ShiftedWindowAttention(8, [3,4], list(shift), 1).eval(),torch.randn(1, *grid, 8)
    check_windows(nn.Sequential(l), l, x, l(x), grid)

@pytest.mark.parametrize('shift', [(0,0),(1,2)])
@pytest.mark.parametrize('grid', [(6,8),(9,12)])
def test_windows_of_timm(shift, grid):
    l = SwinTransformerBlock(8, grid, num_heads=1, window_size=(3,4), shift_size=shift).eval()
    l.norm1 = l.mlp = nn.Identity()
    x = torch.randn(1, *grid, 8)
    check_windows(l, l.attn, x, l._attn(x), grid)

def check_windows(m, attn, x, y, grid):
    v = nn.functional.linear(x, *(o[16:] for o in (attn.qkv.weight,attn.qkv.bias)))[0].flatten(0, 1)
    for i in range(grid[0]):
        for j in range(grid[1]):
            o, = _all_maps(m, x, (i,j), grid).values()
            if (total := o.sum().item())<0.999: continue # some of it goes to the padding
            torch.testing.assert_close(attn.proj(o.flatten()@v), y[0,i,j], rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('kind', ['block','grid'])
@pytest.mark.parametrize('cls', [PartitionAttentionCl,PartitionAttention2d])
def test_windows_of_maxvit(cls, kind):
    "Windows of neighbours, and of positions that are equally far apart; as the layer computes with one head"
    torch.manual_seed(0)
    grid,cut = (6,8),(3,2)
    m = cls(8, kind, MaxxVitTransformerCfg(dim_head=8, window_size=cut, grid_size=cut)).eval()
    m.norm1 = m.mlp = nn.Identity()
    x = torch.randn(1, 8, *grid)
    last = cls is PartitionAttentionCl
    y = m._partition_attn(x.movedim(1, -1)).movedim(-1, 1) if last else m._partition_attn(x)
    qkv,proj = m.attn.qkv,m.attn.proj
    v = nn.functional.linear(x[0].flatten(1).T, qkv.weight.view(24, 8)[16:], qkv.bias[16:])
    for i,j in ((0,0),(5,7),(2,3)):
        o, = _all_maps(m, x.movedim(1, -1) if last else x, (i,j), grid).values()
        rows,cols = ({i//3*3+k for k in range(3)},{j//2*2+k for k in range(2)}) if kind=='block' else ({i%2+2*k for k in range(3)},{j%4+4*k for k in range(2)})
        assert {tuple(p) for p in o.nonzero().tolist()}=={(a,b) for a in rows for b in cols}
        want = nn.functional.linear(o.flatten()@v, proj.weight.view(8, 8), proj.bias)
        torch.testing.assert_close(y[0,:,i,j], want, rtol=1e-4, atol=1e-5)

def test_maxvit():
    m = timm.create_model('maxvit_rmlp_pico_rw_256', img_size=64, embed_dim=(32,32,32,32), depths=(1,1,1,1))
    maps = maps_of(m, images((64,64)), (20,40))
    attended = {k: o for k,o in maps.items() if 'attn_block' in k or 'attn_grid' in k}
    assert len(attended)==8
    for o in attended.values(): torch.testing.assert_close(o.sum(), torch.tensor(1.))

@pytest.mark.parametrize('build', [
    lambda: timm.create_model('swin_tiny_patch4_window7_224', img_size=64, window_size=4, depths=(2,2), num_heads=(1,2), embed_dim=32),
    lambda: timm.create_model('swinv2_tiny_window8_256', img_size=64, window_size=4, depths=(2,2), num_heads=(1,2), embed_dim=32),
    lambda: tv.swin_transformer.SwinTransformer([4,4], 16, [2,2], [1,2], [4,4])], ids=['swin','swinv2','torchvision'])
def test_swin(build):
    m = build()
    maps = maps_of(m, images((64,64)), (20,40))
    assert [tuple(o.shape) for o in maps.values()]==[(16,16)]*2+[(8,8)]*2
    assert all((o>0).sum()==16 for o in list(maps.values())[::2])
    for o in maps.values(): torch.testing.assert_close(o.sum(), torch.tensor(1.))
    with pytest.raises(ValueError, match='no class token'): show_attention(m, images((64,64)))
    show_attention(m, images((64,64)), (20,40))

@pytest.mark.parametrize('build', [lambda: xresnet18(n_out=4), lambda: timm.create_model('test_convnext'), lambda: tv.resnet18(), lambda: timm.create_model('mambaout_femto', depths=(1,1,1,1), dims=(8,16,24,32))])
def test_class_activation(build):
    m = build().train()
    fig = show_attention(m, images((64,64)))
    titles = [o.get_title() for o in fig.axes if o.get_title()]
    assert titles[:2]==['image','class activation, stage 1'] and m.training and all(p.grad is None for p in m.parameters())

def test_class_activation_is_grad_cam():
    m,x = xresnet18(n_out=4).eval(),images((64,64))
    from fastattn.interpret import _class_maps
    body,head = nn.Sequential(*list(m)[:8]),nn.Sequential(*list(m)[8:])
    f = body(x[None]).detach().requires_grad_()
    g, = torch.autograd.grad(head(f)[0].max(), f)
    want = (g.mean((2,3), keepdim=True)*f)[0].sum(0).relu()
    torch.testing.assert_close(_class_maps(m, x[None])['class activation, stage 4'], want.detach())

def test_what_is_given():
    m = insert(xresnet18(n_out=4), 'ssa')
    x = images((64,64))
    for point in ((31.9,np.float32(2)),np.array([3,4]),torch.tensor([3,4])): show_attention(m, x, point)
    show_attention(m, (x,torch.tensor(1)), (0,0))
    for bad,message in ((x[None],r'image must be \(C, rows, columns\), got shape \(1, 3, 64, 64\)'), ('a.png','unless a Learner is given')):
        with pytest.raises(ValueError, match=message): show_attention(m, bad, (0,0))
    for point in ((64,0),(-1,0),(1,2,3)):
        with pytest.raises(ValueError, match='a row and a column of the image of 64x64'): show_attention(m, x, point)
    with pytest.raises(ValueError, match='no class token'): show_attention(m, x)
    with pytest.raises(ValueError, match='nothing to draw in Linear. There are maps of simple self-attention'): show_attention(nn.Linear(64, 2), x, (0,0))
    with pytest.raises(ValueError, match='Linear has no map'): attention_map(nn.Linear(4, 2), torch.rand(1, 1, 4, 4), (0,0))
    with pytest.raises(ValueError, match='x must be one input'): attention_map(attn_layers(m)[0], torch.rand(2, 128, 4, 4), (0,0))

@pytest.mark.parametrize('arch', ['hiera_tiny_224','nest_tiny','xcit_nano_12_p16_224'])
def test_no_scrambled_maps(arch):
    "Tokens that stand in an order of their own, in several windows, or channels that look at channels"
    m = timm.create_model(arch)
    assert all('cls' in k for k in maps_of(m, images((224,224)), (0,0)))

@pytest.mark.parametrize('arch,title', [('mobilevit_xxs','class'), ('mobilevitv2_050','class'), ('edgenext_xx_small','class'), ('halonet26t','class'), ('hiera_tiny_224',None)])
def test_no_map_of_attention(arch, title):
    "Attention that cannot be put back onto the image: Grad-CAM, or an error where stages are no maps"
    m = timm.create_model(arch)
    size = (224,224) if 'hiera' in arch else (256,256) if 'halo' in arch else (64,64)
    if title is None:
        with pytest.raises(ValueError, match='nothing to draw in Hiera'): show_attention(m, images(size), (0,0))
    else: assert {o.get_title().split()[0] for o in show_attention(m, images(size), (0,0)).axes if o.get_title()}=={'image',title}

# Films

def pages(gif):
    "The images of a GIF (RGB), and how long each stays"
    im = PIL.Image.open(io.BytesIO(gif.data))
    res = []
    for i in range(getattr(im, 'n_frames', 1)):
        im.seek(i)
        res.append((np.asarray(im.convert('RGB')).astype(int),im.info.get('duration')))
    return res,im.info.get('loop')

def test_film_shows_each_frame():
    "White, black and blue, where they belong, in order and for as long as asked; no figure stays open"
    frames = [torch.full((2,3), -1),torch.tensor([[0,-1,2],[-1,-1,-1]]),torch.tensor([[0,2,2],[2,0,0]])]
    before = plt.get_fignums()
    shown,loop = pages(show_film(frames, 3, ms=100))
    assert plt.get_fignums()==before and loop==0 and [o for _,o in shown]==[100,100,400]
    colours = {-1: (31,119,180), 0: (0,0,0), 2: (255,255,255)} # tab:blue is 1f77b4
    fig = show_grids(frames[:1], 3)
    fig.canvas.draw()
    ax = fig.axes[0]
    for (picture,_),frame in zip(shown, frames):
        for row in range(2):
            for col in range(3):
                x,y = ax.transData.transform((col,row)).round().astype(int)
                assert np.abs(picture[len(picture)-1-y,x]-colours[frame[row,col].item()]).max()<8

@pytest.mark.parametrize('frames,n', [([torch.zeros(1, 1, dtype=torch.long)],1),([torch.zeros(2, 2, 3),torch.ones(2, 2, 3)],2),(torch.arange(24).view(4, 3, 2)%7,4)])
def test_film_of_batches_text_and_one_frame(frames, n):
    frames = [o.long() for o in frames]
    assert len(pages(show_film(frames, 7))[0])==len(pages(show_film(frames, 'abcdef\n', width=2.))[0])==n

def test_film_rests_where_nothing_changes():
    "Equal frames may be one image; the time is the same"
    a,b = torch.zeros(2, 2, dtype=torch.long),torch.ones(2, 2, dtype=torch.long)
    assert sum(t for _,t in pages(show_film([a,a,b,b], 2, ms=50))[0])==3*50+200

@pytest.mark.parametrize('draw', [show_grids,show_film])
@pytest.mark.parametrize('frames', [[],[torch.zeros(3)],[torch.zeros(2, 2),torch.zeros(2, 3)],[torch.zeros(0, 3)],[torch.zeros(0, 2, 2)],[torch.zeros(1, 1, 2, 2)],torch.zeros(0, 4, 4)])
def test_what_are_no_matrices(draw, frames):
    with pytest.raises(ValueError, match='frames must be matrices'): draw(frames, 3)

@pytest.mark.parametrize('ms', [0,-1,19,10001,float('nan'),float('inf'),True,'400',None])
def test_film_times(ms):
    with pytest.raises(ValueError, match='ms must be from 20 to 10000'): show_film([torch.zeros(2, 2)], 3, ms=ms)
