"Draw the picture of the home page: `python docs/picture.py`"
import csv,torch
from functools import partial
import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from PIL import Image
from safetensors.torch import load_file,save_file
from sklearn.datasets import load_sample_image
from torch import nn
from fastai.vision.all import image2tensor,imagenet_stats,set_seed
from fastcore.script import call_parse
from nbdev.config import get_config
from fastattn.layers.simple import SimpleSelfAttention
from fastattn.interpret import attention_map
from fastattn.learner import ssa_learner
from fastattn.models.xresnet import attn_xresnet
from fastattn.recipes.answer import Answer,read_runs
from fastattn.recipes.data import get_dls

nbs = get_config(__file__).nbs_path
weights = nbs/'runs/picture/stages.safetensors'
stage = 5 # of the model's parts, the second stage
options = dict(attn=partial(SimpleSelfAttention, scale=True), stages=[1,2,3], at='block', widen=0.25)
size,point = 128,(50,65) # pixels, and the position that looks
ink,grey,blue = '#24292f','#8c959f','#1f77b4'

def train_network():
    "Train a small network for four epochs on 300 images of each class of Imagenette, and keep it up to the stage that we draw"
    set_seed(0)
    learn = ssa_learner(get_dls('imagenette', size=64, bs=64, workers=0, few=300), 'xresnet18', gain_lr=10., **options)
    with learn.no_bar(): learn.fit_one_cycle(4, 6e-3)
    weights.parent.mkdir(exist_ok=True)
    save_file({k: o.contiguous() for k,o in learn.model.state_dict().items() if int(k.split('.')[0])<=stage}, weights)

def read_photo():
    "A square of the flower that comes with scikit-learn"
    return Image.fromarray(load_sample_image('flower.jpg')).crop((110,0,537,427))

def look(photo):
    "What `point` takes from the photo (rows, columns)"
    body = nn.Sequential(*list(attn_xresnet('xresnet18', **options))[:stage+1]).eval()
    body.load_state_dict(load_file(weights))
    mean,std = (torch.tensor(o)[:,None,None] for o in imagenet_stats)
    x = (image2tensor(photo.resize((size,size), Image.LANCZOS))/255-mean)/std
    layer,seen = body[stage][-1].fastattn[0],[]
    layer.register_forward_pre_hook(lambda m,args: seen.append(args[0]))
    with torch.no_grad(): body(x[None])
    return attention_map(layer, seen[0], [p*seen[0].shape[-1]//size for p in point])

def draw_look(ax):
    photo = read_photo()
    seen,edges = look(photo),(0,size,size,0)
    top = seen.abs().quantile(0.97).item()
    ax.imshow(photo.convert('L'), cmap='gray', extent=edges)
    ax.imshow(seen, cmap='RdBu_r', vmin=-top, vmax=top, alpha=0.62, extent=edges, interpolation='bicubic')
    ax.plot(point[1], point[0], marker='o', ms=9, mec='black', mfc='yellow')
    ax.set(xticks=[], yticks=[], xlabel='red: adds, blue: subtracts')
    ax.spines[:].set_visible(False)
    ax.set_anchor('N')

def draw_answer(ax):
    answer,label = Answer(read_runs(nbs/'runs/evidence/digits-16-4')),'ssa, at block'
    answer._plot_pairs(ax, label)
    row = 100*answer.rows.loc[label,['diff','low','high']].astype(float)
    words = f"{row['diff']:+.2f}\n({row['low']:+.2f} to {row['high']:+.2f})".replace('-', '\N{MINUS SIGN}')
    ax.text(0.98, 0.03, words, transform=ax.transAxes, ha='right', fontweight='bold', color=blue)
    ax.set(title='', xlabel='pairs of runs', ylabel='points of accuracy', ylim=(-2.5,2.5))
    ax.spines[['top','right']].set_visible(False)

bars = {
    'Local attention\n(dense attention)': ('local','4x8x48x48x8'),
    'DropConnect\n(a mask for each example)': ('dropconnect','128x1024 to 1024'),
    'Local 2-D attention\n(nonlinear-transformer)': ('local2d','4x32x32x128'),
    "Simple self-attention\n(fastai's)": ('ssa','8x1024x8x8')}

def speedup(name, shape):
    with open(nbs/f'runs/bench/{name}.csv') as f: return next(float(r['speedup']) for r in csv.DictReader(f) if r['shape']==shape)

def draw_speed(ax):
    times = [speedup(*o) for o in bars.values()]
    ax.barh(range(len(bars)), times, color=blue, height=0.55)
    for i,t in enumerate(times): ax.text(t+1.5, i, f'{t:.0f}x' if t>=10 else f'{t:.1f}x', va='center', fontweight='bold')
    ax.set(yticks=range(len(bars)), yticklabels=bars, xticks=[], xlim=(0,1.2*max(times)), xlabel='times as fast as (its peer)')
    ax.tick_params(left=False)
    ax.invert_yaxis()
    ax.spines[['top','right','bottom']].set_visible(False)

@call_parse
def main(
    train:bool=False, # Train the network that looks first? It takes some minutes, and needs Imagenette
    out:str=nbs/'images/home.png' # The picture to write
):
    "Draw what a position looks at, an answer pair by pair, and how fast layers are"
    if train: train_network()
    colors = dict.fromkeys(('text.color','axes.labelcolor','xtick.color','ytick.color'), ink)
    mpl.rcParams.update({'font.size': 10.5, 'axes.edgecolor': grey} | colors)
    fig = Figure(figsize=(9.2,3.2), layout='constrained', facecolor='none')
    fig.get_layout_engine().set(w_pad=0.16, h_pad=0.13)
    axs = fig.subplots(1, 3, width_ratios=[1.2,1,0.85])
    for ax,title,draw in zip(axs, ('Where does it look?','Did it help?','How fast is it?'), (draw_look,draw_answer,draw_speed)):
        draw(ax)
        ax.set_facecolor('none')
        ax.set_title(title, fontweight='bold', fontsize=12, pad=10)
    corners = dict(boxstyle='round,pad=0,rounding_size=0.02', mutation_aspect=9.2/3.2)
    card = FancyBboxPatch((0.003,0.01), 0.994, 0.98, fc='white', ec='#d0d7de', lw=1, **corners) # legible on light and dark pages
    fig.add_artist(card).set(transform=fig.transFigure, zorder=-1)
    fig.savefig(out, dpi=180)
