"local_attention beside PyTorch's FlexAttention, a peer that knows nothing of grids. FlexAttention has no backward on a CPU: outputs only"
import pytest,torch
from torch.nn.attention.flex_attention import flex_attention
from fastattn.layers.local import local_attention

def by_flex(q, k, v, window, p=None, q_pos=None, factor=None, log_weight=None, combine='add', causal=False):
    "`local_attention` with what depends on the offset as captured tensors; `window` has a number for each dimension"
    grid = q.shape[2:-1]
    places = torch.stack(torch.meshgrid(*[torch.arange(s) for s in grid], indexing='ij'), -1).view(-1, len(grid)) # (N, d)
    reach = torch.tensor(window)
    steps = places-places[:,None] # (queries, keys, d)
    seen = (steps.abs()<=reach).all(-1)
    if causal: seen = seen.tril()
    offset = torch.zeros(seen.shape, dtype=torch.long) # (queries, keys), the number of the offset in the window
    for i,w in enumerate(window): offset = offset*(2*w+1)+(steps[...,i]+w).clamp(0, 2*w)
    q,k,v = (o.flatten(2, -2) for o in (q,k,v)) # (B, H, N, D)
    def by_head(o): return o.flatten(1, len(grid)).expand(q.shape[1], *[-1]*(o.dim()-len(grid))) # (H, offsets, ..)
    if p is not None:
        asked = q if q_pos is None else q_pos.flatten(2, -2)
        pos = asked@by_head(p).mT*(q.shape[-1]**-0.5 if combine=='add' else 1) # (B, H, N, offsets)
    if factor is not None: factor = by_head(factor)
    if log_weight is not None: log_weight = by_head(log_weight)

    def score(s, b, h, i, j):
        if p is not None: s = s*pos[b,h,i,offset[i,j]] if combine=='multiply' else s+pos[b,h,i,offset[i,j]]
        if factor is not None: s = s*factor[h,offset[i,j]]
        if log_weight is not None: s = s+log_weight[h,offset[i,j]]
        return torch.where(seen[i,j], s, -torch.inf)
    return flex_attention(q, k, v, score).unflatten(2, grid)

@pytest.mark.parametrize('names', ['', 'p', 'p q_pos', 'factor', 'log_weight', 'p q_pos factor log_weight', 'p q_pos factor log_weight multiply'])
@pytest.mark.parametrize('grid,window,causal', [((5,6),(1,2),False), ((2,3,3),(1,1,2),True)])
def test_equals_flex(grid, window, causal, names):
    torch.manual_seed(0)
    q,k,v,q_pos = torch.randn(4, 2, 2, *grid, 8).double()
    sizes = [2*w+1 for w in window]
    every = dict(p=torch.randn(2, *sizes, 8).double(), q_pos=q_pos, factor=torch.rand(1, *sizes).double(), log_weight=-torch.rand(2, *sizes).double(), multiply='multiply')
    given = {'combine' if o=='multiply' else o: every[o] for o in names.split()}
    got = local_attention(q, k, v, window, causal=causal, **given)
    torch.testing.assert_close(got, by_flex(q, k, v, window, causal=causal, **given))
