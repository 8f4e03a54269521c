import warnings
__version__ = "0.0.1"
# fastai scripts an activation when it is imported, and torch warns of that before the first word of every command
warnings.filterwarnings('ignore', '`torch.jit.script` is deprecated')
