"The small networks of the page of evidence, for `fastattn-train same_different nbs/evidence/nets.py:small`"
from fastai.vision.models.xresnet import ResBlock,XResNet
from fastattn.layers.simple import SimpleSelfAttention
from fastattn.learner import ssa_learner

def xresnet10(**kwargs):
    "An xresnet with one block in each stage, and few channels"
    return XResNet(ResBlock, 1, [1,1,1,1], stem_szs=(8,8,64), **{'widen': 0.25, **kwargs})

def small(dls,
    attn=['none','ssa'], # none, ssa, ssa_sym, sa, positional, local
    stages='2', # Stage that gets attention: 1 to 4
    at='block', # branch or block
    scale=False, # Divide simple self-attention by the number of positions
    gain_lr=1., # Learning rate of gains, in that of the rest
    widen=0.25, # Channels, in those of xresnet18
    **kwargs):
    "An xresnet of 10 layers"
    if scale: attn = lambda n_in: SimpleSelfAttention(n_in, scale=True)
    return ssa_learner(dls, xresnet10, attn, int(stages), at=at, gain_lr=gain_lr, widen=widen, **kwargs)
